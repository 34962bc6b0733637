//! A client's messages to its subscribers, on all nodes: what one node publishes, the subscribers of every node get, in
//! order and without holes, or they are told that they missed something.
//!
//! The node that publishes numbers what it says ([`ring`]) and keeps it for a while; it goes out on the client's channel.
//! A node with subscribers listens to that channel, puts parts in order and notices what is missing ([`sources`]), asks
//! for it, and gives whole messages to its subscribers' queues ([`subscriber`]). [`client`] holds these together for one
//! client; this file is the door. A subscriber that comes back with the [`Position`] that it was given is served from there
//! on, wherever it comes back. The handlers are in [`publish`](super::publish) and [`subscribe`](super::subscribe).

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::Semaphore, time::Instant};

mod client;
mod position;
mod ring;
mod sources;
mod subscriber;
#[cfg(test)]
mod tests;

use self::{
    client::{Around, Client},
    subscriber::Subscriber,
};
pub use self::{
    position::{NotAPosition, Position},
    subscriber::{Delivery, Left},
};
pub use crate::cluster::letter::Audience;
use crate::{
    cluster::{
        bus::{Reached, Receipt},
        letter::{MAX_NAMED, Part, Standing},
        peer::Peers,
    },
    ids::{ClientId, NodeId, ReplayableMap},
    telemetry::Metrics,
};

/// The longest message, bytes.
pub const MAX_MESSAGE: usize = 1024 * 1024;
/// Bytes on their way to the bus at a time, in [`UNIT`]s; who says more waits. A share of what the bus lets wait (8 MiB).
const IN_FLIGHT: usize = 2 * MAX_MESSAGE / UNIT;
const UNIT: usize = 1024;
/// The longest that a message waits to be sent.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often each client is looked at: the least time between two questions.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Numbers of a client without subscribers are kept so long after its last message...
const REMEMBERED_FOR: Duration = Duration::from_secs(60 * 60);
/// ...and those that were silent for longest go first when there are more than this.
const MAX_REMEMBERED: usize = 16 * 1024;

/// Why a message was not published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Longer than [`MAX_MESSAGE`], or for more named subscribers than a message can have.
    #[error("the message is longer than 1 MiB, or names more than 1,024 subscribers")]
    TooLong,
    /// It may have reached some subscribers, and may reach others yet.
    #[error("the bus between the nodes is away or full: try again")]
    BusAway,
}

/// See the module. One a node.
pub struct Fanout {
    peers: Arc<Peers>,
    metrics: Arc<Metrics>,
    started: Instant,
    /// Guards the table; held for a look-up. Taken before a client's lock, never after.
    table: Mutex<Table>,
    in_flight: Semaphore,
}

#[derive(Default)]
struct Table {
    clients: ReplayableMap<ClientId, Arc<Mutex<Client>>>,
    /// Higher than every number that was forgotten: numbers are never given twice.
    floor: u64,
    looked_at: Option<Duration>,
}

impl Fanout {
    /// Of a node with these peers.
    pub fn new(peers: Arc<Peers>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            peers,
            metrics,
            started: Instant::now(),
            table: Mutex::default(),
            in_flight: Semaphore::new(IN_FLIGHT),
        })
    }

    /// Sends a message to the client's subscribers on all nodes. Returns when the bus has it, with its number.
    pub async fn publish(
        &self,
        client_id: &ClientId,
        audience: Audience,
        body: Bytes,
    ) -> Result<Position, PublishError> {
        if body.len() > MAX_MESSAGE || audience.named().len() > MAX_NAMED {
            return Err(PublishError::TooLong);
        }
        if !self.peers.bus().is_up() {
            return Err(PublishError::BusAway);
        }
        let units = body.len() / UNIT + 1;
        let room = tokio::time::timeout(PATIENCE, self.in_flight.acquire_many(units as u32)).await;
        let Ok(Ok(_room)) = room else {
            return Err(PublishError::BusAway);
        };
        let (position, receipts) = self.say(client_id, audience, &body);
        self.metrics.published();
        for receipt in receipts {
            if receipt.reached().await == Reached::Unsent {
                return Err(PublishError::BusAway);
            }
        }
        Ok(position)
    }

    fn say(&self, client_id: &ClientId, audience: Audience, body: &Bytes) -> (Position, Vec<Receipt>) {
        let (client, floor) = self.entry(client_id);
        lock(&client).publish(audience, body, floor, &self.around(client_id))
    }

    /// One more subscriber of the client: of what is published from now on, or behind a position that it was given before.
    /// `conn_id` is the caller's choice, random and not 0; a second one of the same number takes the first one's place.
    pub fn subscribe(self: &Arc<Self>, client_id: &ClientId, conn_id: u64, from: Option<Position>) -> Subscription {
        let (client, _) = self.entry(client_id);
        let subscriber = Subscriber::new(conn_id);
        self.metrics.subscribed();
        lock(&client).admit(subscriber.clone(), from, &self.around(client_id));
        Subscription {
            fanout: self.clone(),
            client_id: client_id.clone(),
            client,
            subscriber,
        }
    }

    /// Ends the subscriptions of a client here.
    pub fn end(&self, client_id: &ClientId, left: Left) {
        if let Some(client) = self.find(client_id) {
            lock(&client).end(left, &self.around(client_id));
        }
    }

    /// The client is deleted: its subscriptions here end, and nobody hears again what it said.
    pub fn forget(&self, client_id: &ClientId) {
        if let Some(client) = self.find(client_id) {
            let mut client = lock(&client);
            client.end(Left::ClientGone, &self.around(client_id));
            client.forget();
        }
    }

    /// Ends all subscriptions here.
    pub fn end_all(&self, left: Left) {
        for (client_id, client) in self.all() {
            lock(&client).end(left, &self.around(&client_id));
        }
    }

    // --- what comes over the bus ------------------------------------------------------------------------------------

    /// A part of a message came.
    pub fn on_part(&self, from: NodeId, client_id: &ClientId, part: &Part) {
        self.on_peer(from, client_id, |client, around| client.on_part(from, part, around));
    }

    /// A node says where it stands.
    pub fn on_standing(&self, from: NodeId, client_id: &ClientId, standing: Standing) {
        self.on_peer(from, client_id, |client, around| {
            client.on_standing(from, standing, around);
        });
    }

    /// A node asks for what it misses.
    pub fn on_asks(&self, from: NodeId, client_id: &ClientId, known: &[(u64, u64)]) {
        self.on_peer(from, client_id, |client, around| client.answer(from, known, around));
    }

    /// What this node says itself it hears too.
    fn on_peer(&self, from: NodeId, client_id: &ClientId, act: impl FnOnce(&mut Client, &Around<'_>)) {
        if from == self.peers.node_id() {
            return;
        }
        if let Some(client) = self.find(client_id) {
            act(&mut lock(&client), &self.around(client_id));
        }
    }

    /// Messages may have been missed.
    pub fn on_interrupted(&self) {
        let now = self.now();
        self.all()
            .into_iter()
            .for_each(|(_, client)| lock(&client).on_interrupted(now));
    }

    /// Time passed.
    pub fn on_tick(&self) {
        let now = self.now();
        {
            let mut table = self.table();
            if table.looked_at.is_some_and(|at| now.saturating_sub(at) < LOOK_EVERY) {
                return;
            }
            table.looked_at = Some(now);
            table.forget(now);
        }
        for (client_id, client) in self.all() {
            lock(&client).on_tick(&self.around(&client_id));
        }
    }

    fn around<'a>(&'a self, client_id: &'a ClientId) -> Around<'a> {
        Around {
            peers: &self.peers,
            metrics: &self.metrics,
            client_id,
            now: self.now(),
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, client_id: &ClientId) -> (Arc<Mutex<Client>>, u64) {
        let mut table = self.table();
        let floor = table.floor;
        (table.clients.entry(client_id.clone()).or_default().clone(), floor)
    }

    fn find(&self, client_id: &ClientId) -> Option<Arc<Mutex<Client>>> {
        self.table().clients.get(client_id).cloned()
    }

    fn all(&self) -> Vec<(ClientId, Arc<Mutex<Client>>)> {
        let table = self.table();
        let all = table.clients.iter();
        all.map(|(client_id, client)| (client_id.clone(), client.clone()))
            .collect()
    }
}

impl Table {
    /// Forgets clients that nobody subscribes to and that were silent for long. Nobody else has them meanwhile: whoever
    /// takes one takes it from here.
    fn forget(&mut self, now: Duration) {
        let crowded = self.clients.len() > MAX_REMEMBERED;
        let kept_for = match crowded {
            true => Duration::from_secs(60),
            false => REMEMBERED_FOR,
        };
        let floor = &mut self.floor;
        self.clients.retain(|_, client| {
            if Arc::strong_count(client) > 1 {
                return true;
            }
            let client = lock(client);
            let gone = client.is_idle(now).is_some_and(|quiet| quiet > kept_for);
            if gone {
                *floor = (*floor).max(client.last());
            }
            !gone
        });
    }
}

fn lock(client: &Mutex<Client>) -> MutexGuard<'_, Client> {
    client.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes part in what is published to a client's subscribers, until dropped.
pub struct Subscription {
    fanout: Arc<Fanout>,
    client_id: ClientId,
    client: Arc<Mutex<Client>>,
    subscriber: Arc<Subscriber>,
}

impl Subscription {
    /// The next message, or why there is none any more. Safe to drop and call again.
    pub async fn next(&mut self) -> Result<Delivery, Left> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The same, polled.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Delivery, Left>> {
        self.subscriber.poll_next(cx)
    }

    /// Resolves once whatever is published on any node after this comes here; or after a second, if the bus is away.
    pub async fn begun(&self) {
        if !self.fanout.peers.bus().is_alone() {
            self.fanout.peers.flush().await; // behind what listens to the channel
        }
    }

    /// Resolves once the subscription has ended and nothing waits any more: for whoever is busy writing a delivery.
    pub async fn cut(&self) -> Left {
        std::future::poll_fn(|cx| self.subscriber.poll_cut(cx)).await
    }

    /// Its number, as audiences name it.
    pub fn conn_id(&self) -> u64 {
        self.subscriber.conn_id
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let around = self.fanout.around(&self.client_id);
        lock(&self.client).leave(&self.subscriber, &around);
    }
}
