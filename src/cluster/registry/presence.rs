//! What this node writes about itself: its own row, its heartbeat, and the rows of its tunnels.
//!
//! The tunnels that the node holds are kept here, and one background future ([`Registry::run`]) makes the database
//! agree. While it is away nothing is queued: when it returns, its rows are compared with what is held, once. The same
//! future removes the rows of nodes that died.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::Registry;
use crate::{
    cluster::{
        now_ms,
        store::{ConnectionRow, NodeRow, StoreError},
    },
    ids::{ClientId, NodeId, TunnelId},
};

/// One write a node, not one a tunnel; four may be lost before the node is taken for dead.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);
/// A node whose heartbeat has not moved for so long is dead.
const NODE_DEAD_AFTER: Duration = Duration::from_secs(20);
/// Signatures live for days: an expired one may lie about for an hour.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3600);
/// Rows a transaction: small enough that other writers of a SQLite file do not wait long.
const BATCH: usize = 256;
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A clean stop does not wait longer than this for the database; what is left, the reaper of another node removes.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// This process, as the others shall see it.
#[derive(Debug, Clone)]
pub struct Node {
    /// New at each start.
    pub node_id: NodeId,
    /// Where its admin listener is reached, for people.
    pub address: String,
}

impl Node {
    /// A new node.
    pub fn new(address: &str) -> Self {
        Self {
            node_id: NodeId::new(),
            address: address.to_owned(),
        }
    }
}

pub(super) struct Presence {
    node: Node,
    started_at: i64,
    draining: AtomicBool,
    held: Mutex<Held>,
    changed: Notify,
}

/// What the database shall say about this node's tunnels, and where it may not yet.
#[derive(Default)]
struct Held {
    tunnels: HashMap<TunnelId, ConnectionRow>,
    /// Tunnels whose row may differ from `tunnels`. Not kept while `reconcile` is due, which finds them all: so it
    /// does not grow while the database is away.
    unwritten: HashSet<TunnelId>,
    /// When clients came or went, as far as the database has not heard.
    seen: HashMap<ClientId, i64>,
    /// A write failed, or our rows were reaped: compare all of them.
    reconcile: bool,
}

/// One transaction's worth of differences.
struct Batch {
    put: Vec<ConnectionRow>,
    remove: Vec<TunnelId>,
    seen: Vec<(ClientId, i64)>,
}

impl Presence {
    pub fn new(node: Node) -> Self {
        Self {
            node,
            started_at: now_ms(),
            draining: AtomicBool::new(false),
            held: Mutex::default(),
            changed: Notify::new(),
        }
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Held for a few instructions, never across an await; what it guards is whole between any two of them.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn row(&self, now: i64, draining: bool) -> NodeRow {
        NodeRow {
            node_id: self.node.node_id,
            address: self.node.address.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started_at,
            heartbeat_at: now,
            draining,
        }
    }
}

impl Held {
    fn touch(&mut self, tunnel: TunnelId, client: &ClientId, now: i64) {
        if !self.reconcile {
            self.unwritten.insert(tunnel);
        }
        self.see(client.clone(), now);
    }

    fn see(&mut self, client: ClientId, at: i64) {
        let seen = self.seen.entry(client).or_insert(at);
        *seen = at.max(*seen);
    }

    /// `stored` is what the database had before this lock was taken: what changed since differs from it too.
    fn reconcile_with(&mut self, stored: &HashSet<TunnelId>) {
        self.reconcile = false;
        self.unwritten
            .extend(self.tunnels.keys().filter(|id| !stored.contains(id)));
        self.unwritten
            .extend(stored.iter().filter(|id| !self.tunnels.contains_key(id)));
    }

    fn take_batch(&mut self) -> Option<Batch> {
        let mut batch = Batch {
            put: Vec::new(),
            remove: Vec::new(),
            seen: Vec::new(),
        };
        let ids: Vec<TunnelId> = self.unwritten.iter().take(BATCH).copied().collect();
        for id in ids {
            self.unwritten.remove(&id);
            match self.tunnels.get(&id) {
                Some(row) => batch.put.push(row.clone()),
                None => batch.remove.push(id),
            }
        }
        let clients: Vec<ClientId> = self.seen.keys().take(BATCH).cloned().collect();
        batch
            .seen
            .extend(clients.into_iter().filter_map(|client| self.seen.remove_entry(&client)));
        (!batch.put.is_empty() || !batch.remove.is_empty() || !batch.seen.is_empty()).then_some(batch)
    }

    fn give_back(&mut self, batch: Batch) {
        self.reconcile = true;
        self.unwritten.clear();
        for (client, at) in batch.seen {
            self.see(client, at);
        }
    }
}

/// What [`Registry::run`] remembers from turn to turn.
#[derive(Default)]
pub struct Watch {
    /// When the heartbeat was last written, and what it said about draining; `None`: the node has no row yet.
    beaten: Option<(Instant, bool)>,
    swept: Option<Instant>,
    peers: Peers,
}

impl Watch {
    fn beat_due(&self, now: Instant, draining: bool) -> bool {
        self.beaten
            .is_none_or(|(at, said)| said != draining || now >= at + HEARTBEAT_INTERVAL)
    }

    fn sweep_due(&self, now: Instant) -> bool {
        self.swept.is_none_or(|at| now >= at + SWEEP_INTERVAL)
    }

    fn next_beat(&self) -> Option<Instant> {
        self.beaten.map(|(at, _)| at + HEARTBEAT_INTERVAL)
    }
}

/// The other nodes' heartbeats and since when each has stood still **by this node's clock**: nodes' wall clocks may
/// differ by minutes.
#[derive(Default)]
struct Peers {
    beats: HashMap<NodeId, (i64, Instant)>,
    looked: Option<Instant>,
}

impl Peers {
    /// Takes in what the database says now, and names those who are dead with their last heartbeat.
    fn look(&mut self, now: Instant, nodes: &[NodeRow]) -> Vec<(NodeId, i64)> {
        // We looked away, because the database did, or because we were stopped: perhaps so were they.
        if self.looked.is_some_and(|looked| now >= looked + 2 * HEARTBEAT_INTERVAL) {
            self.beats.clear();
        }
        self.looked = Some(now);
        let before = std::mem::take(&mut self.beats);
        self.beats = nodes
            .iter()
            .map(|node| match before.get(&node.node_id) {
                Some(&(beat, since)) if beat == node.heartbeat_at => (node.node_id, (beat, since)),
                _ => (node.node_id, (node.heartbeat_at, now)),
            })
            .collect();
        let dead = |since: Instant| now >= since + NODE_DEAD_AFTER;
        self.beats
            .iter()
            .filter(|(_, (_, since))| dead(*since))
            .map(|(node, (beat, _))| (*node, *beat))
            .collect()
    }
}

/// 100 ms, doubled up to 5 s, each pause somewhere in its upper half so that nodes do not return in step.
#[derive(Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn pause(&mut self) -> Duration {
        let full = RETRY_MIN.saturating_mul(1 << self.failures.min(16)).min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        full.mul_f64(rand::random_range(0.5..=1.0))
    }
}

impl Registry {
    /// This node holds this tunnel now. Returns at once; [`Registry::run`] writes the row promptly, or when the
    /// database is back: until then the node serves the tunnel all the same.
    pub fn record(&self, row: ConnectionRow) {
        let mut held = self.presence.held();
        held.touch(row.tunnel_ws_id, &row.client_id, now_ms());
        held.tunnels.insert(row.tunnel_ws_id, row);
        drop(held);
        self.presence.changed.notify_one();
    }

    /// This node does not hold this tunnel any more. Nothing but this tunnel's row is ever removed for it, so a slow
    /// disconnect cannot erase the reconnect that overtook it.
    pub fn forget(&self, tunnel_ws_id: TunnelId) {
        let mut held = self.presence.held();
        let Some(row) = held.tunnels.remove(&tunnel_ws_id) else {
            return;
        };
        held.touch(tunnel_ws_id, &row.client_id, now_ms());
        drop(held);
        self.presence.changed.notify_one();
    }

    /// This node is leaving: the others shall not send agents here.
    pub fn set_draining(&self) {
        self.presence.draining.store(true, Ordering::Release);
        self.presence.changed.notify_one();
    }

    /// Keeps the database in step with this node until `shutdown`, then takes the node's rows out of it. The relay
    /// spawns it once, and waits for it after the last tunnel has closed.
    pub async fn run(&self, shutdown: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = shutdown => {}
            () = self.keep_up() => {}
        }
        match timeout(LEAVE_PATIENCE, self.leave()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "left without removing this node's rows: another node will"),
            Err(_) => tracing::warn!("left without removing this node's rows: the database did not answer in time"),
        }
    }

    async fn keep_up(&self) {
        let mut watch = Watch::default();
        let mut backoff = Backoff::default();
        loop {
            match self.turn(&mut watch, Instant::now()).await {
                Ok(()) => {
                    if std::mem::take(&mut backoff).failures > 0 {
                        tracing::info!("the registry's database is back, and in step with this node");
                    }
                    let next_beat = watch.next_beat().unwrap_or_else(Instant::now);
                    tokio::select! {
                        () = self.presence.changed.notified() => {}
                        () = sleep_until(next_beat) => {}
                    }
                }
                Err(error) => {
                    if backoff.failures == 0 {
                        tracing::warn!(%error, "the registry's database is away: tunnels are served and recorded later");
                    }
                    sleep(backoff.pause()).await;
                }
            }
        }
    }

    /// One turn of [`Registry::run`]: the heartbeat and the reaper if they are due, then whatever differs. Public so
    /// that a story can be told without waiting.
    pub async fn turn(&self, watch: &mut Watch, now: Instant) -> Result<(), StoreError> {
        let draining = self.presence.draining.load(Ordering::Acquire);
        if watch.beat_due(now, draining) {
            self.beat(watch, now, draining).await?;
            self.reap(watch, now).await?;
        }
        if watch.sweep_due(now) {
            self.store.delete_expired_signatures(now_ms()).await?;
            watch.swept = Some(now);
        }
        self.write_differences().await
    }

    async fn beat(&self, watch: &mut Watch, now: Instant, draining: bool) -> Result<(), StoreError> {
        let row = self.presence.row(now_ms(), draining);
        let known = watch.beaten.is_some();
        if !(known && self.store.heartbeat(row.node_id, row.heartbeat_at, draining).await?) {
            self.store.put_node(&row).await?;
            if known {
                tracing::warn!("another node took this one for dead: recording its tunnels again");
                self.presence.held().reconcile = true;
            }
        }
        watch.beaten = Some((now, draining));
        Ok(())
    }

    async fn reap(&self, watch: &mut Watch, now: Instant) -> Result<(), StoreError> {
        let nodes = self.store.nodes().await?;
        for (node_id, last_beat) in watch.peers.look(now, &nodes) {
            if self.store.reap_node(node_id, last_beat).await? {
                tracing::warn!(node.id = %node_id, "a node died: its tunnels are removed from the registry");
            }
        }
        self.store.remove_orphans().await?;
        Ok(())
    }

    async fn write_differences(&self) -> Result<(), StoreError> {
        let node_id = self.node_id();
        if self.presence.held().reconcile {
            let stored = self.store.tunnels_of_node(node_id).await?;
            self.presence.held().reconcile_with(&stored.into_iter().collect());
        }
        loop {
            let Some(batch) = self.presence.held().take_batch() else {
                return Ok(());
            };
            if let Err(error) = self
                .store
                .write_connections(node_id, &batch.put, &batch.remove, &batch.seen)
                .await
            {
                self.presence.held().give_back(batch);
                return Err(error);
            }
            // So that `last_seen_at_ms` is not as old as the cache allows, just after a disconnect.
            for (client, _) in &batch.seen {
                self.clients.expire(client).await;
            }
        }
    }

    async fn leave(&self) -> Result<(), StoreError> {
        // Clients may have left a moment ago; whether that is noted is not worth staying for.
        let _ = self.write_differences().await;
        self.store.remove_node(self.node_id()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: Duration = HEARTBEAT_INTERVAL;

    fn node(node_id: NodeId, heartbeat_at: i64) -> NodeRow {
        NodeRow {
            node_id,
            address: String::new(),
            version: String::new(),
            started_at: 0,
            heartbeat_at,
            draining: false,
        }
    }

    #[test]
    fn a_node_is_dead_when_its_heartbeat_stands_still_whatever_its_clock_says() {
        let (mut peers, start) = (Peers::default(), Instant::now());
        let (silent, lively) = (NodeId::new(), NodeId::new());
        for turn in 0..4 {
            let dead = peers.look(
                start + BEAT * turn,
                &[node(silent, -600_000), node(lively, i64::from(turn))],
            );
            assert_eq!(dead, [], "turn {turn}");
        }
        let dead = peers.look(start + BEAT * 4, &[node(silent, -600_000), node(lively, 4)]);
        assert_eq!(dead, [(silent, -600_000)]);
    }

    #[test]
    fn nobody_is_dead_for_what_happened_while_we_looked_away() {
        let (mut peers, start) = (Peers::default(), Instant::now());
        let peer = NodeId::new();
        assert_eq!(peers.look(start, &[node(peer, 1)]), []);
        let back = start + Duration::from_secs(60);
        assert_eq!(peers.look(back, &[node(peer, 1)]), []);
        assert_eq!(peers.look(back + BEAT, &[node(peer, 2)]), []);
    }

    #[test]
    fn pauses_grow_to_five_seconds_and_no_further() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = (0..100).map(|_| backoff.pause()).collect();
        assert!(pauses[0] >= RETRY_MIN / 2 && pauses[0] <= RETRY_MIN);
        assert!(
            pauses[20..]
                .iter()
                .all(|pause| *pause >= RETRY_MAX / 2 && *pause <= RETRY_MAX)
        );
    }
}
