//! Frames over the bus: a tunnel that another node holds looks to an exchange like one that is here.
//!
//! Toward the agent: [`Peers::path_to`] makes a path whose frames one task ([`Peers::carry`]) takes out in turns and
//! publishes to the inbox of the node that holds the tunnel. Toward the ingress: a node that holds a tunnel publishes what
//! its agent says of an exchange that is not its own to that exchange's channel ([`Parcel`]), and vouches for whose it is.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Wake, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{sync::Notify, time::Instant};

use super::{
    bus::{Bus, Channel, Reached, Receipt},
    letter::{self, Card, Letter, News, Traffic},
};
use crate::{
    exchange::{
        Clock,
        path::{BusCredit, Path},
        table::WayBack,
    },
    ids::{ClientId, NodeId, ReplayableMap, RequestId, TunnelId},
    wire::frame::{Code, Frame},
};

/// An exchange that broke off is listened for so much longer: its host may have missed the word, and is told again.
const LINGER: Duration = Duration::from_secs(5);
/// How long a node that leaves waits for its last words to be taken.
const FLUSH: Duration = Duration::from_secs(1);
/// Exchanges listened for in that way; more are left at once.
const MAX_LINGERING: usize = 16 * 1024;

/// One node's dealings with the others.
pub struct Peers {
    bus: Arc<Bus>,
    node_id: NodeId,
    credit: Arc<BusCredit>,
    ready: Arc<Ready>,
    /// Guards the exchanges that broke off a moment ago, oldest first.
    lingering: Mutex<VecDeque<(RequestId, Instant)>>,
    /// Guards how many parts of this node listen to the channel of each client.
    listeners: Mutex<ReplayableMap<ClientId, usize>>,
}

/// While there is one, the node listens to the client's channel.
#[derive(Debug)]
pub struct Listening {
    peers: Weak<Peers>,
    client_id: ClientId,
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(peers) = self.peers.upgrade() {
            peers.leave(&self.client_id);
        }
    }
}

/// Paths with something to send, in the order in which they came to have it.
#[derive(Default)]
struct Ready {
    /// Guards the queue; each path is in it once at most.
    paths: Mutex<VecDeque<Arc<PeerPath>>>,
    some: Notify,
}

/// A path over the bus, as its carrier knows it.
struct PeerPath {
    node_id: NodeId,
    tunnel_ws_id: TunnelId,
    /// Its waker is kept in the path itself.
    path: Weak<Path>,
    is_ready: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for PeerPath {
    fn wake(self: Arc<Self>) {
        if !self.is_ready.swap(true, Ordering::AcqRel) {
            let ready = self.ready.clone();
            ready.paths().push_back(self);
            ready.some.notify_one();
        }
    }
}

impl Ready {
    fn paths(&self) -> MutexGuard<'_, VecDeque<Arc<PeerPath>>> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn next(&self) -> Arc<PeerPath> {
        loop {
            let some = self.some.notified();
            if let Some(path) = self.paths().pop_front() {
                path.is_ready.store(false, Ordering::Release);
                return path;
            }
            some.await;
        }
    }
}

/// Frames that certainly did not arrive.
#[derive(Debug)]
pub struct Undelivered {
    /// Whose tunnel they were for.
    pub client_id: ClientId,
    /// The tunnel.
    pub tunnel_ws_id: TunnelId,
    /// The exchanges that they were to open.
    pub opens: Vec<RequestId>,
    /// Whether the node that held the tunnel is gone, or only the bus away.
    pub gone: bool,
}

impl Peers {
    /// For a node on this bus.
    pub fn new(bus: Arc<Bus>, node_id: NodeId) -> Self {
        Self {
            bus,
            node_id,
            credit: Arc::default(),
            ready: Arc::default(),
            lingering: Mutex::default(),
            listeners: Mutex::default(),
        }
    }

    /// Listens to the client's channel until what it returns is dropped, whoever else does here.
    pub fn listen(self: &Arc<Self>, client_id: &ClientId) -> Listening {
        let mut listeners = self.listeners();
        let count = listeners.entry(client_id.clone()).or_default();
        *count += 1;
        if *count == 1 {
            // Under the lock, so that who leaves and who comes do not overtake each other.
            self.bus.subscribe(Channel::Client(client_id.clone()));
        }
        Listening {
            peers: Arc::downgrade(self),
            client_id: client_id.clone(),
        }
    }

    fn leave(&self, client_id: &ClientId) {
        let mut listeners = self.listeners();
        let Some(count) = listeners.get_mut(client_id) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            listeners.remove(client_id);
            self.bus.unsubscribe(Channel::Client(client_id.clone()));
        }
    }

    fn listeners(&self) -> MutexGuard<'_, ReplayableMap<ClientId, usize>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bus that they are reached by.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// This node.
    pub fn node_id(&self) -> NodeId {
        self.node_id
    }

    /// A path to a tunnel that another node holds.
    pub fn path_to(&self, card: &Card, clock: Clock) -> Arc<Path> {
        let path = Path::over_bus(card.owner(), clock, card.tunnel_ws_id, self.credit.clone());
        path.register(&Waker::from(Arc::new(PeerPath {
            node_id: card.node_id,
            tunnel_ws_id: card.tunnel_ws_id,
            path: Arc::downgrade(&path),
            is_ready: AtomicBool::new(false),
            ready: self.ready.clone(),
        })));
        path
    }

    /// Carries the frames of all paths to peers, until dropped. `undelivered` hears of those that went nowhere.
    pub async fn carry(&self, undelivered: impl Fn(Undelivered)) {
        let mut on_their_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                Some(lost) = on_their_way.next(), if !on_their_way.is_empty() => {
                    if let Some(lost) = lost {
                        undelivered(lost);
                    }
                }
                peer = self.ready.next() => {
                    self.bus.room().await;
                    if let Some(sent) = self.send_some(&peer) {
                        on_their_way.push(sent);
                    }
                }
            }
        }
    }

    /// One message of a path whose turn it is; what is left takes another turn.
    fn send_some(&self, peer: &Arc<PeerPath>) -> Option<impl Future<Output = Option<Undelivered>> + use<>> {
        let path = peer.path.upgrade()?;
        path.register(&Waker::from(peer.clone()));
        let client_id = path.owner.client_id.clone();
        let mut letter = letter::to_agent(self.node_id, peer.tunnel_ws_id, &client_id);
        let head = letter.len();
        path.fill(&mut letter);
        if letter.len() == head {
            return None;
        }
        peer.clone().wake();
        let letter = letter.freeze();
        let frames = letter.slice(head..);
        let receipt = self.bus.publish(Channel::Node(peer.node_id), letter);
        let tunnel_ws_id = peer.tunnel_ws_id;
        Some(async move {
            let reached = receipt.reached().await;
            matches!(reached, Reached::Nobody | Reached::Unsent).then(|| Undelivered {
                client_id,
                tunnel_ws_id,
                opens: opens(frames),
                gone: reached == Reached::Nobody,
            })
        })
    }

    /// Tells another node that a tunnel it believes to be here is not.
    pub fn not_mine(&self, to: NodeId, client_id: ClientId, tunnel_ws_id: TunnelId, frames: Bytes) {
        let letter = Letter::NotMine {
            from: self.node_id,
            client_id,
            tunnel_ws_id,
            opens: opens(frames),
        };
        self.bus.publish(Channel::Node(to), letter.encode());
    }

    /// Tells an agent elsewhere that an exchange it believes in is not known to its ingress.
    pub fn refuse(&self, card: &Card, id: RequestId) {
        let mut letter = letter::to_agent(self.node_id, card.tunnel_ws_id, &card.client_id);
        Frame::Reset(id, Code::Gone).encode(&mut letter);
        self.bus.publish(Channel::Node(card.node_id), letter.freeze());
    }

    /// Tells a node that an agent of its spoke in somebody else's exchange.
    pub fn denounce(&self, card: &Card) {
        let letter = Letter::Foreign {
            from: self.node_id,
            client_id: card.client_id.clone(),
            tunnel_ws_id: card.tunnel_ws_id,
        };
        self.bus.publish(Channel::Node(card.node_id), letter.encode());
    }

    /// Tells the nodes that know a client something about it.
    pub fn tell(&self, client_id: &ClientId, news: News) -> Receipt {
        let letter = Letter::News {
            from: self.node_id,
            client_id: client_id.clone(),
            news,
        };
        self.bus.publish(Channel::Client(client_id.clone()), letter.encode())
    }

    /// Tells one node something about a client.
    pub fn tell_node(&self, to: NodeId, client_id: &ClientId, news: News) -> Receipt {
        let letter = Letter::News {
            from: self.node_id,
            client_id: client_id.clone(),
            news,
        };
        self.bus.publish(Channel::Node(to), letter.encode())
    }

    /// Tells another node to drain.
    pub fn send_away(&self, to: NodeId) -> Receipt {
        let letter = Letter::Leave { from: self.node_id };
        self.bus.publish(Channel::Node(to), letter.encode())
    }

    /// Asks another node what it has counted; it answers with [`Letter::Counted`].
    pub fn ask_count(&self, to: NodeId) -> Receipt {
        let letter = Letter::Count { from: self.node_id };
        self.bus.publish(Channel::Node(to), letter.encode())
    }

    /// Answers who asked.
    pub fn tell_count(&self, to: NodeId, traffic: Traffic) {
        let letter = Letter::Counted {
            from: self.node_id,
            traffic,
        };
        drop(self.bus.publish(Channel::Node(to), letter.encode()));
    }

    /// Waits until what was said so far has left, if the bus carries.
    pub async fn flush(&self) {
        // Behind everything else; nobody listens to it.
        let last = self.bus.publish(Channel::Request(RequestId::new()), Bytes::new());
        tokio::time::timeout(FLUSH, last.reached()).await.ok();
    }

    /// Time passed: the bus may have other limits, and what broke off long ago is not listened for any more.
    pub fn on_tick(&self) {
        if let Some(limit) = self.bus.limit() {
            self.credit.set_limit(limit);
        }
        let now = Instant::now();
        let mut lingering = self.lingering();
        while lingering.front().is_some_and(|(_, until)| *until <= now) {
            if let Some((id, _)) = lingering.pop_front() {
                self.bus.unsubscribe(Channel::Request(id));
            }
        }
    }

    fn lingering(&self) -> MutexGuard<'_, VecDeque<(RequestId, Instant)>> {
        self.lingering.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WayBack for Peers {
    fn open(&self, id: RequestId) {
        self.bus.subscribe(Channel::Request(id));
    }

    fn close(&self, id: RequestId, whole: bool) {
        let mut lingering = self.lingering();
        if whole || lingering.len() >= MAX_LINGERING {
            drop(lingering);
            return self.bus.unsubscribe(Channel::Request(id));
        }
        lingering.push_back((id, Instant::now() + LINGER));
    }
}

/// The exchanges that these frames open.
fn opens(mut frames: Bytes) -> Vec<RequestId> {
    let mut opens = Vec::new();
    while let Ok(Some(frame)) = Frame::split(&mut frames) {
        opens.extend(frame.id.filter(|_| frame.opens));
    }
    opens
}

/// What an agent says of exchanges whose ingress is elsewhere, gathered by exchange while one message lasts.
#[derive(Debug)]
pub struct Parcel {
    card: Card,
    open: Option<(RequestId, BytesMut)>,
}

impl Parcel {
    /// For the tunnel of this card, which this node holds.
    pub fn new(card: Card) -> Self {
        Self { card, open: None }
    }

    /// One more frame. What was gathered of another exchange goes first.
    pub fn add(&mut self, id: RequestId, frame: &Frame, path: &Path, peers: &Peers) {
        if self.open.as_ref().is_some_and(|(open, _)| *open != id) {
            self.send(peers);
        }
        let rtt_us = u32::try_from(path.rtt().as_micros()).unwrap_or(u32::MAX);
        let begin = || (id, letter::to_ingress(&self.card, rtt_us));
        let (_, letter) = self.open.get_or_insert_with(begin);
        frame.encode(letter);
    }

    /// Sends what was gathered. The ends send again what is lost.
    pub fn send(&mut self, peers: &Peers) {
        if let Some((id, letter)) = self.open.take() {
            drop(peers.bus.publish(Channel::Request(id), letter.freeze()));
        }
    }
}
