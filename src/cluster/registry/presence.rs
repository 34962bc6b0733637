//! What this node writes about itself: its own row, its heartbeat, and the rows of its tunnels.
//!
//! What the node holds is in [`held`](super::held), and one background future ([`Registry::run`]) makes the database
//! agree. While it is away nothing is queued: when it returns, its rows are compared with what is held, once. The same
//! future removes the rows of nodes that died, as [`peers`](super::peers) judges.

use std::{
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

use super::{Registry, held::Held, peers::Peers};
use crate::{
    cluster::{
        now_ms,
        store::{ConnectionRow, NodeRow, StoreError},
    },
    ids::{NodeId, TunnelId},
};

/// One write a node, not one a tunnel; four may be lost before the node is taken for dead.
pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);
/// Signatures live for days: an expired one may lie about for an hour.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3600);
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

    pub fn is_behind(&self) -> bool {
        self.held().is_behind()
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
        self.presence.held().insert(row, now_ms());
        self.presence.changed.notify_one();
    }

    /// This node does not hold this tunnel any more. Nothing but this tunnel's row is ever removed for it, so a slow
    /// disconnect cannot erase the reconnect that overtook it.
    pub fn forget(&self, tunnel_ws_id: TunnelId) {
        if self.presence.held().remove(tunnel_ws_id, now_ms()) {
            self.presence.changed.notify_one();
        }
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
        let done = self.try_turn(watch, now).await;
        if done.is_err() {
            self.presence.held().fall_behind();
        }
        done
    }

    async fn try_turn(&self, watch: &mut Watch, now: Instant) -> Result<(), StoreError> {
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
                self.presence.held().fall_behind();
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
        if self.presence.held().is_behind() {
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
