//! The tunnels that this node knows, by client: those that it holds, and those that it has heard its peers hold; who was
//! here a moment ago; and the requests that wait for a tunnel.

use std::{
    cmp::Reverse,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::{
    cluster::{
        letter::Card,
        peer::{Listening, Peers},
    },
    exchange::{
        Clock,
        path::{Owner, Path},
    },
    ids::{ClientId, NodeId, ReplayableMap, TokenId, TunnelId},
    planted::Bug,
    wire::{Dialect, frame::Frame},
};

/// What a peer holds is looked up again when it was last looked up so long ago: the longest that news which was lost
/// goes unnoticed.
const FRESH_FOR: Duration = Duration::from_secs(10);
/// A peer's tunnel that turned out to be gone is not believed in again for so long, whatever the registry says.
const SHUNNED_FOR: Duration = Duration::from_secs(2);
/// A peer's tunnel that was heard of so lately may not be in the registry yet.
const UNRECORDED_FOR: Duration = Duration::from_secs(3);

/// In place of the token of a tunnel that was not opened with one: no token has this name.
const NO_TOKEN: TokenId = TokenId::from_bytes([0; 16]);

/// One agent WebSocket.
#[derive(Debug)]
pub struct Tunnel {
    /// Its name in the registry.
    pub id: TunnelId,
    /// Which of its instance's tunnels it is.
    pub slot: u32,
    /// The agent's count of its dials of this slot, or when a MoosicBox server came.
    pub generation: u64,
    /// What is spoken in it.
    pub dialect: Dialect,
    /// The access token it was opened with: revoking that closes it.
    pub token_id: TokenId,
    /// Who holds it.
    pub place: Place,
    /// Where its frames go.
    pub path: Arc<Path>,
    /// When it was first heard of.
    since: Instant,
}

/// Who holds a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// This node.
    Here,
    /// Another.
    At(NodeId),
}

impl Tunnel {
    /// A tunnel that this node holds.
    pub fn here(slot: u32, generation: u64, token_id: TokenId, path: Arc<Path>) -> Arc<Self> {
        Self::of(Dialect::Adit, slot, generation, token_id, path)
    }

    /// A MoosicBox server's that this node holds. It has one, came with a signature, and says no more of itself.
    pub fn of_moosicbox(came_ms: u64, path: Arc<Path>) -> Arc<Self> {
        Self::of(Dialect::MoosicBox, 0, came_ms, NO_TOKEN, path)
    }

    fn of(dialect: Dialect, slot: u32, generation: u64, token_id: TokenId, path: Arc<Path>) -> Arc<Self> {
        Arc::new(Self {
            id: TunnelId::new(),
            slot,
            generation,
            dialect,
            token_id,
            place: Place::Here,
            path,
            since: Instant::now(),
        })
    }

    fn at_peer(card: &Card, path: Arc<Path>) -> Arc<Self> {
        Arc::new(Self {
            id: card.tunnel_ws_id,
            slot: card.slot,
            generation: card.generation,
            dialect: card.dialect,
            token_id: card.token_id,
            place: Place::At(card.node_id),
            path,
            since: Instant::now(),
        })
    }

    fn client_id(&self) -> &ClientId {
        &self.path.owner.client_id
    }

    /// When it came, if it is a MoosicBox server's: the newest of those gets all requests.
    fn came_as_moosicbox(&self) -> Option<u64> {
        (self.dialect == Dialect::MoosicBox).then_some(self.generation)
    }

    /// Whether this node holds it.
    pub fn is_here(&self) -> bool {
        self.place == Place::Here
    }

    /// How peers are told of it; `None` when it is a peer's.
    pub fn card(&self, node_id: NodeId) -> Option<Card> {
        self.is_here().then(|| Card {
            node_id,
            tunnel_ws_id: self.id,
            client_id: self.client_id().clone(),
            instance_id: self.path.owner.instance_id,
            slot: self.slot,
            generation: self.generation,
            dialect: self.dialect,
            token_id: self.token_id,
        })
    }

    /// Tells the agent why, and closes.
    pub fn close(&self, last: Option<Frame>) {
        if let Some(frame) = last.filter(|_| self.is_here()) {
            self.path.send(frame);
        }
        self.path.close();
    }
}

/// All tunnels that this node knows.
pub struct Tunnels {
    peers: Arc<Peers>,
    clock: Clock,
    /// Guards the table; held for a look-up or a change.
    clients: RwLock<ReplayableMap<ClientId, Held>>,
}

/// What is known here of one client. While there is this, the node listens to the client's channel.
#[derive(Debug)]
struct Held {
    tunnels: Vec<Arc<Tunnel>>,
    /// When the last of them left, if none is left.
    left_at: Option<Instant>,
    came: Arc<Notify>,
    /// Whether its last tunnel was a MoosicBox server's.
    was_moosicbox: bool,
    /// When the registry was last asked who holds its tunnels.
    looked_at: Option<Instant>,
    /// When anybody last asked for a tunnel of it, seconds of the node's clock.
    used_at: AtomicU64,
    shunned: Vec<(TunnelId, Instant)>,
    _listening: Listening,
}

/// Why a tunnel is not taken into the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The client holds as many tunnels as it may.
    TooMany,
    /// A newer one of the same instance and slot is known.
    Old,
}

/// What became of a peer's tunnel that was heard of.
#[derive(Debug)]
pub struct Learned {
    /// The tunnel, as it is known now.
    pub tunnel: Arc<Tunnel>,
    /// The older one of the same instance and slot, which is to be closed.
    pub superseded: Option<Arc<Tunnel>>,
    /// Whether it was not known before.
    pub is_new: bool,
}

impl Held {
    /// A client that nothing is known of here: remembered from now.
    fn unseen(used_at: u64, listening: Listening) -> Self {
        let now = Instant::now();
        Self {
            tunnels: Vec::new(),
            left_at: Some(now),
            came: Arc::default(),
            was_moosicbox: false,
            looked_at: None,
            used_at: AtomicU64::new(used_at),
            shunned: Vec::new(),
            _listening: listening,
        }
    }

    /// The older tunnel of the same instance and slot, taken out.
    fn supersede(
        &mut self,
        owner: &Owner,
        slot: u32,
        is_older: impl Fn(&Tunnel) -> bool,
    ) -> Result<Option<Arc<Tunnel>>, Refused> {
        let same = |old: &Arc<Tunnel>| old.path.owner == *owner && old.slot == slot;
        match self.tunnels.iter().position(same) {
            Some(at) if is_older(&self.tunnels[at]) || Bug::Epoch.is_planted() => {
                Ok(Some(self.tunnels.swap_remove(at)))
            }
            Some(_) => Err(Refused::Old),
            None => Ok(None),
        }
    }

    fn add(&mut self, tunnel: Arc<Tunnel>) {
        self.was_moosicbox = tunnel.dialect == Dialect::MoosicBox;
        self.tunnels.push(tunnel);
        self.left_at = None;
        self.came.notify_waiters();
    }

    fn take_out(&mut self, gone: impl Fn(&Tunnel) -> bool) -> Vec<Arc<Tunnel>> {
        let gone: Vec<_> = self.tunnels.extract_if(.., |tunnel| gone(tunnel)).collect();
        if self.tunnels.is_empty() {
            self.left_at.get_or_insert(Instant::now());
        }
        gone
    }

    fn shuns(&self, id: TunnelId) -> bool {
        self.shunned
            .iter()
            .any(|(shunned, at)| *shunned == id && at.elapsed() < SHUNNED_FOR)
    }
}

impl Tunnels {
    /// An empty table of a node with these peers.
    pub fn new(peers: Arc<Peers>, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            peers,
            clock,
            clients: RwLock::default(),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, ReplayableMap<ClientId, Held>> {
        self.clients.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, ReplayableMap<ClientId, Held>> {
        self.clients.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.clock.now().as_secs()
    }

    fn entry<'a>(&self, clients: &'a mut ReplayableMap<ClientId, Held>, client_id: &ClientId) -> &'a mut Held {
        clients
            .entry(client_id.clone())
            .or_insert_with(|| Held::unseen(self.now(), self.peers.listen(client_id)))
    }

    /// A tunnel of this node's is up. It supersedes an older one of the same instance and slot, wherever that is, and
    /// wakes what waits for its client. Dropping the guard takes it out again.
    pub fn join(self: &Arc<Self>, tunnel: Arc<Tunnel>, limit: usize) -> Result<Joined, Refused> {
        let mut clients = self.write();
        let held = self.entry(&mut clients, tunnel.client_id());
        let is_older = |old: &Tunnel| old.generation <= tunnel.generation;
        let superseded = held.supersede(&tunnel.path.owner, tunnel.slot, is_older)?;
        if held.tunnels.iter().filter(|other| other.is_here()).count() >= limit {
            return Err(Refused::TooMany);
        }
        held.add(tunnel.clone());
        drop(clients);
        Ok(Joined {
            tunnels: self.clone(),
            tunnel,
            superseded,
        })
    }

    /// A peer holds this tunnel, or so it says itself. It supersedes an older one of the same instance and slot.
    pub fn learn(&self, card: &Card) -> Result<Learned, Refused> {
        if let Some(tunnel) = self.find(&card.client_id, card.tunnel_ws_id) {
            return Ok(Learned {
                tunnel,
                superseded: None,
                is_new: false,
            });
        }
        let mut clients = self.write();
        let held = self.entry(&mut clients, &card.client_id);
        let superseded = held.supersede(&card.owner(), card.slot, |old| {
            // A node that has held both knows which is newer, also of an agent that does not count.
            let of_one_node = old.place == Place::At(card.node_id);
            old.generation < card.generation || (old.generation == card.generation && of_one_node)
        })?;
        let tunnel = Tunnel::at_peer(card, self.peers.path_to(card, self.clock));
        held.add(tunnel.clone());
        Ok(Learned {
            tunnel,
            superseded,
            is_new: true,
        })
    }

    /// A peer's tunnel is gone; if `shun`, it is not believed in again for a while. Returns it, to be closed.
    pub fn unlearn(&self, client_id: &ClientId, id: TunnelId, shun: bool) -> Option<Arc<Tunnel>> {
        let mut clients = self.write();
        let held = clients.get_mut(client_id)?;
        if shun {
            held.shunned.retain(|(_, at)| at.elapsed() < SHUNNED_FOR);
            held.shunned.push((id, Instant::now()));
        }
        held.take_out(|tunnel| tunnel.id == id && !tunnel.is_here()).pop()
    }

    /// What the registry says of a client: its tunnels at peers. Returns those that are new, and those that are gone.
    pub fn reconcile(&self, client_id: &ClientId, cards: &[Card]) -> (Vec<Learned>, Vec<Arc<Tunnel>>) {
        let gone = {
            let mut clients = self.write();
            let held = self.entry(&mut clients, client_id);
            held.looked_at = Some(Instant::now());
            held.take_out(|tunnel| {
                let listed = cards.iter().any(|card| card.tunnel_ws_id == tunnel.id);
                !tunnel.is_here() && !listed && tunnel.since.elapsed() >= UNRECORDED_FOR
            })
        };
        let shunned: Vec<TunnelId> = {
            let clients = self.read();
            let held = clients.get(client_id);
            let ids = cards.iter().map(|card| card.tunnel_ws_id);
            ids.filter(|id| held.is_some_and(|held| held.shuns(*id))).collect()
        };
        let believed = cards.iter().filter(|card| !shunned.contains(&card.tunnel_ws_id));
        let new = believed
            .filter_map(|card| self.learn(card).ok())
            .filter(|learned| learned.is_new);
        (new.collect(), gone)
    }

    /// Whether the registry has to be asked who else holds tunnels of this client.
    pub fn is_stale(&self, client_id: &ClientId, fresh_for: Option<Duration>) -> bool {
        let looked_at = self.read().get(client_id).and_then(|held| held.looked_at);
        looked_at.is_none_or(|at| at.elapsed() >= fresh_for.unwrap_or(FRESH_FOR))
    }

    /// News may have been missed: what peers hold is to be looked up again.
    pub fn all_stale(&self) {
        self.write().values_mut().for_each(|held| held.looked_at = None);
    }

    fn leave(&self, tunnel: &Arc<Tunnel>) {
        if let Some(held) = self.write().get_mut(tunnel.client_id()) {
            held.take_out(|other| other.id == tunnel.id || Bug::DeleteByClient.is_planted());
        }
    }

    /// A tunnel of a client by its name.
    pub fn find(&self, client_id: &ClientId, id: TunnelId) -> Option<Arc<Tunnel>> {
        let clients = self.read();
        let mut tunnels = clients.get(client_id)?.tunnels.iter();
        tunnels.find(|tunnel| tunnel.id == id).cloned()
    }

    /// The tunnel of a client with the fewest exchanges in flight: of those here, else of those at peers. Of MoosicBox
    /// servers the one that came last, wherever that is.
    pub fn pick(&self, client_id: &ClientId, not: Option<&Owner>) -> Option<Arc<Tunnel>> {
        let clients = self.read();
        let held = clients.get(client_id)?;
        held.used_at.store(self.now(), Ordering::Relaxed);
        let tunnels = held.tunnels.iter();
        let open = tunnels.filter(|tunnel| not != Some(&tunnel.path.owner) && tunnel.path.takes_more());
        let rank = |tunnel: &&Arc<Tunnel>| {
            (
                Reverse(tunnel.came_as_moosicbox()),
                !tunnel.is_here(),
                tunnel.path.in_flight(),
            )
        };
        open.min_by_key(rank).cloned()
    }

    /// A path of the same owner that is not the given one; rather one to a tunnel that is here.
    pub fn other_path(&self, owner: &Owner, not: Option<&Arc<Path>>) -> Option<Arc<Path>> {
        let clients = self.read();
        let tunnels = clients.get(&owner.client_id)?.tunnels.iter();
        let fit = |tunnel: &&Arc<Tunnel>| {
            let path = &tunnel.path;
            path.owner == *owner && not.is_none_or(|not| !Arc::ptr_eq(path, not)) && !path.is_closed()
        };
        let best = tunnels
            .filter(fit)
            .min_by_key(|tunnel| (!tunnel.is_here(), tunnel.path.in_flight()));
        best.map(|tunnel| tunnel.path.clone())
    }

    /// Whether the client has a tunnel that is known here, or had one within `memory`.
    pub fn was_here(&self, client_id: &ClientId, memory: Duration) -> bool {
        let clients = self.read();
        clients
            .get(client_id)
            .is_some_and(|held| held.left_at.is_none_or(|at| at.elapsed() <= memory))
    }

    /// Whether who was here last is a MoosicBox server: when it does not get through at once, it tries again after 5 s.
    pub fn comes_slowly(&self, client_id: &ClientId) -> bool {
        self.read().get(client_id).is_some_and(|held| held.was_moosicbox)
    }

    /// Notified when the client's next tunnel comes, to this node or a peer.
    pub fn coming(&self, client_id: &ClientId) -> Arc<Notify> {
        let mut clients = self.write();
        self.entry(&mut clients, client_id).came.clone()
    }

    /// Forgets clients without a tunnel that left longer than `memory` ago, and those at peers that nobody asked for in
    /// that time.
    pub fn forget(&self, memory: Duration) {
        self.write().retain(|_, held| {
            let busy = |tunnel: &Arc<Tunnel>| tunnel.is_here() || tunnel.path.in_flight() > 0;
            let left_lately = held.tunnels.is_empty() && held.left_at.is_some_and(|at| at.elapsed() <= memory);
            let unused = self.now().saturating_sub(held.used_at.load(Ordering::Relaxed));
            let used_lately = !held.tunnels.is_empty() && unused <= memory.as_secs();
            left_lately || used_lately || held.tunnels.iter().any(busy) || Arc::strong_count(&held.came) > 1
        });
    }

    /// All tunnels, here and at peers.
    pub fn known(&self) -> Vec<Arc<Tunnel>> {
        let clients = self.read();
        clients.values().flat_map(|held| held.tunnels.iter().cloned()).collect()
    }

    /// All tunnels that this node holds.
    pub fn held(&self) -> Vec<Arc<Tunnel>> {
        let clients = self.read();
        let tunnels = clients.values().flat_map(|held| held.tunnels.iter());
        tunnels.filter(|tunnel| tunnel.is_here()).cloned().collect()
    }

    /// How many it holds.
    pub fn len(&self) -> usize {
        let here = |held: &Held| held.tunnels.iter().filter(|tunnel| tunnel.is_here()).count();
        self.read().values().map(here).sum()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tunnel in the table, for as long as this lives.
pub struct Joined {
    tunnels: Arc<Tunnels>,
    /// The tunnel.
    pub tunnel: Arc<Tunnel>,
    /// The older one of the same instance and slot, which is to be closed.
    pub superseded: Option<Arc<Tunnel>>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.tunnels.leave(&self.tunnel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::bus::{Bus, local::Hub},
        ids::InstanceId,
    };

    fn table() -> Arc<Tunnels> {
        let bus = Arc::new(Bus::local(&Hub::new()));
        Tunnels::new(Arc::new(Peers::new(bus, NodeId::new())), Clock::default())
    }

    fn home() -> ClientId {
        "home".parse().expect("a client id")
    }

    fn tunnel(instance_id: InstanceId, slot: u32, generation: u64) -> Arc<Tunnel> {
        let owner = Owner {
            client_id: home(),
            instance_id,
        };
        let path = Path::new(owner, Clock::default());
        Tunnel::here(slot, generation, TokenId::new(), path)
    }

    fn card(instance_id: InstanceId, slot: u32, generation: u64) -> Card {
        Card {
            node_id: NodeId::new(),
            tunnel_ws_id: TunnelId::new(),
            client_id: home(),
            instance_id,
            slot,
            generation,
            dialect: Dialect::Adit,
            token_id: TokenId::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_tunnel_of_the_slot_supersedes_and_the_slow_leave_of_the_old_takes_nothing_away() {
        let (tunnels, instance) = (table(), InstanceId::new());
        let old = tunnels.join(tunnel(instance, 0, 1), 2).expect("room");
        let new = tunnels.join(tunnel(instance, 0, 2), 2).expect("room");
        assert_eq!(new.superseded.as_ref().map(|old| old.id), Some(old.tunnel.id));
        drop(old);
        assert_eq!(tunnels.pick(&home(), None).map(|tunnel| tunnel.id), Some(new.tunnel.id));
        drop(new);
        assert!(tunnels.is_empty() && tunnels.was_here(&home(), Duration::from_secs(60)));
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(!tunnels.was_here(&home(), Duration::from_secs(60)));
        tunnels.forget(Duration::from_secs(60));
        assert!(tunnels.read().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_is_where_the_agent_dialled_last_whatever_comes_last() {
        let (tunnels, instance) = (table(), InstanceId::new());
        let held = tunnels.join(tunnel(instance, 0, 2), 2).expect("room");
        assert_eq!(tunnels.learn(&card(instance, 0, 1)).err(), Some(Refused::Old));
        assert_eq!(tunnels.learn(&card(instance, 0, 2)).err(), Some(Refused::Old));
        let elsewhere = tunnels.learn(&card(instance, 0, 3)).expect("newer");
        assert_eq!(elsewhere.superseded.map(|old| old.id), Some(held.tunnel.id));
        assert_eq!(tunnels.join(tunnel(instance, 0, 2), 2).err(), Some(Refused::Old));
        assert_eq!(
            tunnels.pick(&home(), None).map(|tunnel| tunnel.id),
            Some(elsewhere.tunnel.id)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_here_is_asked_before_one_at_a_peer() {
        let (tunnels, instance) = (table(), InstanceId::new());
        let there = tunnels.learn(&card(instance, 1, 1)).expect("news").tunnel;
        assert_eq!(tunnels.pick(&home(), None).map(|tunnel| tunnel.id), Some(there.id));
        let here = tunnels.join(tunnel(instance, 0, 1), 2).expect("room");
        assert_eq!(
            tunnels.pick(&home(), None).map(|tunnel| tunnel.id),
            Some(here.tunnel.id)
        );
        assert_eq!((tunnels.len(), tunnels.held().len()), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_registry_lists_no_more_is_gone_and_what_proved_gone_is_not_believed_in_for_a_while() {
        let (tunnels, instance) = (table(), InstanceId::new());
        let (first, second) = (card(instance, 0, 1), card(instance, 1, 1));
        let (new, _) = tunnels.reconcile(&home(), &[first.clone(), second.clone()]);
        assert_eq!(new.len(), 2);
        assert!(!tunnels.is_stale(&home(), None));
        tokio::time::advance(UNRECORDED_FOR).await;
        let (new, gone) = tunnels.reconcile(&home(), std::slice::from_ref(&first));
        assert_eq!((new.len(), gone[0].id), (0, second.tunnel_ws_id));
        assert!(tunnels.unlearn(&home(), first.tunnel_ws_id, true).is_some());
        assert!(tunnels.reconcile(&home(), std::slice::from_ref(&first)).0.is_empty());
        tokio::time::advance(SHUNNED_FOR).await;
        assert_eq!(tunnels.reconcile(&home(), std::slice::from_ref(&first)).0.len(), 1);
        tunnels.all_stale();
        assert!(tunnels.is_stale(&home(), None));
    }

    #[test]
    fn the_limit_holds() {
        let tunnels = table();
        let _one = tunnels.join(tunnel(InstanceId::new(), 0, 1), 1).expect("room");
        assert_eq!(
            tunnels.join(tunnel(InstanceId::new(), 0, 1), 1).err(),
            Some(Refused::TooMany)
        );
    }
}
