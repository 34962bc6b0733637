//! A node's dealings with tunnels and what runs through them: tunnels come and go, here and at peers; exchanges follow
//! them; frames find their way. It knows no sockets, no requests and no database: the node gives it those, and a
//! simulation gives it others.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::{
    fanout::Fanout,
    inbox::NodeInbox,
    tunnels::{Joined, Learned, Tunnel, Tunnels},
};
use crate::{
    cluster::{
        bus::{Bus, Channel},
        letter::{News, Traffic},
        peer::{Peers, Undelivered},
        registry::{ConnectionRow, Holder, Registry, RegistryAway},
    },
    config::TunnelsConfig,
    exchange::{
        Clock,
        path::{Owner, Path},
        table::{Exchanges, TICK},
    },
    ids::{ClientId, NodeId, TunnelId},
    telemetry::{Metrics, RegistryMeter},
    wire::{
        Dialect,
        frame::{Code, Frame},
    },
};

/// A tunnel that carries exchanges and says nothing is asked whether it lives this often, so that one that is wedged is
/// noticed long before its keep-alive gives up.
const ASK_SILENT_EVERY: Duration = Duration::from_secs(1);
/// How often clients that left long ago are forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(10);

/// Answers of peers that an operator's request may be behind by: as many nodes as a relay may well have.
const COUNTS: usize = 1024;

/// What it needs of the registry.
pub trait Directory: Send + Sync {
    /// Who holds tunnels of this client, on all nodes.
    fn holders<'a>(&'a self, client_id: &'a ClientId) -> BoxFuture<'a, Result<Arc<[Holder]>, RegistryAway>>;
    /// This node holds this tunnel now. Returns at once.
    fn record(&self, row: ConnectionRow);
    /// This node does not hold it any more. Returns at once.
    fn forget(&self, tunnel_ws_id: TunnelId);
    /// What is remembered of this client is to be asked for again.
    fn heard_of_change(&self, client_id: &ClientId);
    /// What it counts of itself.
    fn meter(&self) -> RegistryMeter {
        RegistryMeter::default()
    }
}

impl Directory for Registry {
    fn holders<'a>(&'a self, client_id: &'a ClientId) -> BoxFuture<'a, Result<Arc<[Holder]>, RegistryAway>> {
        Box::pin(self.holders(client_id))
    }

    fn record(&self, row: ConnectionRow) {
        self.record(row);
    }

    fn forget(&self, tunnel_ws_id: TunnelId) {
        self.forget(tunnel_ws_id);
    }

    fn heard_of_change(&self, client_id: &ClientId) {
        self.heard_of_change(client_id);
    }

    fn meter(&self) -> RegistryMeter {
        self.meter()
    }
}

/// See the module. One a node.
pub struct Switchboard {
    /// How long requests and exchanges wait for a tunnel.
    pub config: TunnelsConfig,
    /// The registry.
    pub directory: Arc<dyn Directory>,
    /// The other nodes, by the bus.
    pub peers: Arc<Peers>,
    /// The tunnels held here, or known to be held by peers.
    pub tunnels: Arc<Tunnels>,
    /// The exchanges whose downstream is here.
    pub exchanges: Arc<Exchanges>,
    /// What clients say to their subscribers.
    pub fanout: Arc<Fanout>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// An operator wants this node to drain.
    pub leave: CancellationToken,
    /// What peers have counted, as they answer: to whoever asks just now.
    counted_tx: broadcast::Sender<(NodeId, Traffic)>,
}

impl Switchboard {
    /// Of the node of this name.
    pub fn new(config: TunnelsConfig, node_id: NodeId, bus: Bus, directory: Arc<dyn Directory>) -> Self {
        let (clock, resume_timeout) = (Clock::default(), config.resume_timeout);
        let peers = Arc::new(Peers::new(Arc::new(bus), node_id));
        let exchanges = match peers.bus().is_alone() {
            true => Exchanges::new(clock, resume_timeout),
            false => Exchanges::with_way_back(clock, resume_timeout, peers.clone()),
        };
        let metrics = Arc::new(Metrics::new(&directory.meter()));
        Self {
            tunnels: Tunnels::new(peers.clone(), clock),
            exchanges: Arc::new(exchanges),
            fanout: Fanout::new(peers.clone(), metrics.clone()),
            peers,
            metrics,
            leave: CancellationToken::new(),
            counted_tx: broadcast::Sender::new(COUNTS),
            directory,
            config,
        }
    }

    /// This node.
    pub fn node_id(&self) -> NodeId {
        self.peers.node_id()
    }

    /// Speaks with the other nodes over the bus, until dropped.
    pub async fn speak_with_peers(self: &Arc<Self>) {
        let bus = self.peers.bus();
        bus.subscribe(Channel::Node(self.node_id()));
        tokio::select! {
            biased;
            () = bus.run(Arc::new(NodeInbox(self.clone()))) => {}
            () = self.peers.carry(|lost| self.undelivered(lost)) => {}
        }
    }

    // --- tunnels here -----------------------------------------------------------------------------------------------

    /// A tunnel of this node's is up: the older one of its slot goes, peers and registry hear of it, and what waits for
    /// its agent goes on. Returns how many exchanges that were.
    pub fn up(&self, joined: &Joined, row: ConnectionRow) -> usize {
        let tunnel = &joined.tunnel;
        if let Some(old) = &joined.superseded {
            self.supersede(old, &tunnel.path);
        }
        self.directory.record(row);
        if let Some(card) = tunnel.card(self.node_id()) {
            self.peers.tell(&card.client_id.clone(), News::Up(card));
        }
        let resumed = self.exchanges.path_found(&tunnel.path);
        self.metrics.exchanges_moved(resumed);
        resumed
    }

    /// A tunnel of this node's is over: its exchanges go on over another of the same agent, or wait. Returns how many it
    /// had.
    pub fn down(&self, joined: Joined) -> usize {
        let tunnel = joined.tunnel.clone();
        drop(joined);
        tunnel.path.close();
        self.directory.forget(tunnel.id);
        let tunnel_ws_id = tunnel.id;
        self.peers
            .tell(&tunnel.path.owner.client_id, News::Down { tunnel_ws_id });
        let in_flight = tunnel.path.in_flight();
        self.lose(&tunnel);
        in_flight
    }

    /// Lets time pass for exchanges and for the memory of who was here, until dropped.
    pub async fn pass_time(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut forget = tokio::time::interval(FORGET_EVERY);
        let mut ask = tokio::time::interval(ASK_SILENT_EVERY);
        loop {
            tokio::select! {
                biased;
                _ = ticks.tick() => self.tick(),
                _ = ask.tick() => self.ask_silent(),
                _ = forget.tick() => self.tunnels.forget(self.config.park_memory),
            }
        }
    }

    fn tick(&self) {
        let moved = self.exchanges.tick(|owner, not| self.tunnels.other_path(owner, not));
        self.metrics.exchanges_moved(moved);
        self.peers.on_tick();
        self.fanout.on_tick();
    }

    /// Tunnels here that carry exchanges and have been silent are asked whether they live.
    fn ask_silent(&self) {
        let now = self.exchanges.clock().now();
        let silent = |path: &Path| path.in_flight() > 0 && path.silent_for(now) >= ASK_SILENT_EVERY;
        for tunnel in self.tunnels.held().iter().filter(|tunnel| silent(&tunnel.path)) {
            tunnel.path.send(Frame::Ping(now.as_micros() as u64));
        }
    }

    /// Ends what runs through these tunnels, wherever they are; those that are here are closed, and peers close theirs.
    pub fn revoke(&self, doomed: impl Fn(&Tunnel) -> bool) {
        let known = self.tunnels.known().into_iter();
        let tunnels: Vec<_> = known.filter(|tunnel| doomed(tunnel)).collect();
        let owners = tunnels.iter().map(|tunnel| tunnel.path.owner.clone()).collect();
        // What is tried again must not come back to them.
        tunnels.iter().for_each(|tunnel| tunnel.path.set_leaving());
        self.exchanges.reset_owners(&owners, Code::PathLost);
        for tunnel in tunnels.iter().filter(|tunnel| tunnel.is_here()) {
            tracing::info!(client.id = %tunnel.path.owner.client_id, tunnel.id = %tunnel.id, "its token was revoked: closing the tunnel");
            tunnel.close(None);
        }
    }

    /// This node will be gone in so long: peers send nothing new through it, and agents open tunnels elsewhere first. A
    /// MoosicBox server has no other tunnel before this one closes: it is served until then.
    pub fn send_away(&self, left: Duration) {
        for tunnel in self.tunnels.held() {
            let tunnel_ws_id = tunnel.id;
            if tunnel.dialect == Dialect::Adit {
                self.peers
                    .tell(&tunnel.path.owner.client_id, News::Leaving { tunnel_ws_id });
            }
            tunnel.path.send(Frame::Drain(left.as_millis() as u32));
        }
    }

    /// The agent's process has said goodbye: nothing of it will come any more.
    pub fn agent_left(&self, owner: &Owner) {
        self.exchanges.owner_left(owner, Code::AgentLeft);
    }

    // --- tunnels at peers -------------------------------------------------------------------------------------------

    /// A peer's tunnel is known now: the one that it supersedes goes, and what waits for its agent goes on over it.
    pub fn follow_news(&self, learned: Learned) {
        let path = &learned.tunnel.path;
        if let Some(old) = &learned.superseded {
            self.supersede(old, path);
        }
        if learned.is_new {
            self.metrics.exchanges_moved(self.exchanges.path_found(path));
        }
    }

    /// A tunnel is gone: its exchanges go on over another of the same agent, or wait.
    pub fn lose(&self, tunnel: &Tunnel) {
        tunnel.path.close();
        let other = self.tunnels.other_path(&tunnel.path.owner, Some(&tunnel.path));
        self.metrics
            .exchanges_moved(self.exchanges.path_lost(&tunnel.path, other.as_ref()));
    }

    fn supersede(&self, old: &Tunnel, new: &Arc<Path>) {
        old.close(Some(Frame::Superseded));
        self.metrics
            .exchanges_moved(self.exchanges.path_lost(&old.path, Some(new)));
    }

    /// Frames for a peer's tunnel went nowhere: it is gone, unless only the bus is away. Requests that it was the first to
    /// hear of may go elsewhere.
    pub fn undelivered(&self, lost: Undelivered) {
        let gone = lost
            .gone
            .then(|| self.tunnels.unlearn(&lost.client_id, lost.tunnel_ws_id, true));
        if let Some(tunnel) = gone.flatten() {
            tracing::debug!(client.id = %lost.client_id, tunnel.id = %tunnel.id, "a peer's tunnel is gone");
            self.lose(&tunnel);
        }
        for id in lost.opens {
            self.exchanges.open_returned(id, lost.tunnel_ws_id);
        }
    }

    // --- operators --------------------------------------------------------------------------------------------------

    /// What peers say that they have counted, from now on.
    pub fn counts(&self) -> broadcast::Receiver<(NodeId, Traffic)> {
        self.counted_tx.subscribe()
    }

    /// A peer says what it has counted. Nobody may be asking any more.
    pub fn heard_count(&self, node_id: NodeId, traffic: Traffic) {
        drop(self.counted_tx.send((node_id, traffic)));
    }
}
