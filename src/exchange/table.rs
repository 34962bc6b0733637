//! All exchanges of a process, by id: where frames find theirs, where time passes for all of them, and where those whose
//! path was lost wait for another.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    Clock, Exchange, NotYours, Role, Wants,
    path::{Owner, Path},
};
use crate::{
    ids::{ReplayableMap, RequestId, TunnelId},
    planted::Bug,
    wire::frame::{Code, Frame},
};

/// How often time passes for exchanges. Acknowledgements that nothing carries wait for it.
pub const TICK: Duration = Duration::from_millis(100);
/// Locks are shared by this many: frames of different exchanges seldom meet.
const SHARDS: usize = 16;
/// Ids of finished exchanges that are remembered, at least; twice that at most (4 MiB).
const REMEMBERED: usize = 64 * 1024;

/// What is over is remembered at least this long: longer than any frame travels.
const TURN_EVERY: Duration = Duration::from_secs(30);

/// How frames find an exchange's ingress when they come by a tunnel that another node holds: addressed by request.
pub trait WayBack: Send + Sync {
    /// What comes for this exchange must reach this process from now on, before anything that is sent after this.
    fn open(&self, id: RequestId);
    /// Nothing more is expected; `whole`, or else the host may not know yet that it is over.
    fn close(&self, id: RequestId, whole: bool);
}

type Shard = ReplayableMap<RequestId, Arc<Exchange>>;

/// The exchanges of one process.
pub struct Exchanges {
    clock: Clock,
    resume_timeout_ms: AtomicU64,
    /// At the ingress of a relay.
    way_back: Option<Arc<dyn WayBack>>,
    /// Each guards a part of the map; held for a look-up.
    shards: [Mutex<Shard>; SHARDS],
    /// Paths on which finished exchanges wait to be reported.
    done_on: Mutex<Vec<Arc<Path>>>,
    /// At the host: what is over, so that an OPEN that comes late never calls the upstream again.
    over: Mutex<Over>,
}

impl std::fmt::Debug for Exchanges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Exchanges({})", self.len())
    }
}

/// Ids of what is over, in two generations.
#[derive(Debug, Default)]
struct Over {
    young: HashMap<RequestId, Code>,
    old: HashMap<RequestId, Code>,
    turned_at: Duration,
}

impl Over {
    fn get(&self, id: RequestId) -> Option<Code> {
        self.young.get(&id).or_else(|| self.old.get(&id)).copied()
    }

    fn insert(&mut self, id: RequestId, code: Code) {
        if self.young.len() >= REMEMBERED {
            self.turn(self.turned_at);
        }
        self.young.insert(id, code);
    }

    fn turn(&mut self, now: Duration) {
        self.old = std::mem::take(&mut self.young);
        self.turned_at = now;
    }
}

impl Exchanges {
    /// An empty table of hosts, or of ingresses that only local tunnels reach. Exchanges without a path wait for
    /// `resume_timeout`.
    pub fn new(clock: Clock, resume_timeout: Duration) -> Self {
        Self::make(clock, resume_timeout, None)
    }

    /// An empty table of ingresses: those whose tunnel is elsewhere, or was lost, are reached by `way_back`.
    pub fn with_way_back(clock: Clock, resume_timeout: Duration, way_back: Arc<dyn WayBack>) -> Self {
        Self::make(clock, resume_timeout, Some(way_back))
    }

    fn make(clock: Clock, resume_timeout: Duration, way_back: Option<Arc<dyn WayBack>>) -> Self {
        Self {
            clock,
            way_back,
            resume_timeout_ms: AtomicU64::new(resume_timeout.as_millis() as u64),
            shards: Default::default(),
            done_on: Mutex::default(),
            over: Mutex::default(),
        }
    }

    fn resume_timeout(&self) -> Duration {
        Duration::from_millis(self.resume_timeout_ms.load(Ordering::Relaxed))
    }

    /// At the host: the relay says how long it waits for a lost tunnel.
    pub fn set_resume_timeout(&self, timeout: Duration) {
        self.resume_timeout_ms
            .store(timeout.as_millis() as u64, Ordering::Relaxed);
    }

    /// The clock of this process.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    fn shard(&self, id: RequestId) -> MutexGuard<'_, Shard> {
        // The last byte of a UUIDv7 is random.
        let at = usize::from(id.to_bytes()[15]) % SHARDS;
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The exchange of this id, if it is known.
    pub fn get(&self, id: RequestId) -> Option<Arc<Exchange>> {
        self.shard(id).get(&id).cloned()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len())
            .sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A new exchange at the ingress, on `path`, under an id that no other exchange has had. The guard closes it: DONE when it is whole, else RESET.
    pub fn open(self: &Arc<Self>, id: RequestId, path: &Arc<Path>) -> Open {
        let exchange = Arc::new(Exchange::new(id, path.owner.clone(), Role::Ingress, self.clock));
        exchange.state().path = Some(path.hold());
        self.shard(id).insert(id, exchange.clone());
        if path.is_over_bus() {
            self.listen(&exchange);
        }
        Open {
            exchange,
            table: self.clone(),
        }
    }

    /// An OPEN at the host: `Ok` with a new exchange, once for each id. A repeat goes to the exchange that there is; one
    /// that is over is answered with how it ended.
    pub fn accept(&self, id: RequestId, path: &Arc<Path>, limit: usize) -> Accepted {
        if Bug::OpenTwice.is_planted() {
            self.shard(id).remove(&id);
        } else if let Some(code) = self.over.lock().unwrap_or_else(PoisonError::into_inner).get(id) {
            return Accepted::Over(code);
        }
        if path.in_flight() >= limit {
            return Accepted::Over(Code::Refused);
        }
        match self.shard(id).entry(id) {
            Entry::Occupied(known) => Accepted::Known(known.get().clone()),
            Entry::Vacant(place) => {
                let exchange = Arc::new(Exchange::new(id, path.owner.clone(), Role::Host, self.clock));
                exchange.state().path = Some(path.hold());
                Accepted::New(place.insert(exchange).clone())
            }
        }
    }

    /// Opens the exchange's way back, once.
    fn listen(&self, exchange: &Exchange) {
        let Some(way_back) = self.way_back.as_ref().filter(|_| exchange.role == Role::Ingress) else {
            return;
        };
        if !exchange.listens.swap(true, Ordering::Relaxed) {
            way_back.open(exchange.id);
        }
    }

    /// Forgets an exchange; at the host it stays known as over.
    pub fn remove(&self, exchange: &Exchange) {
        let known = self.shard(exchange.id).remove(&exchange.id);
        let whole = exchange.is_whole();
        if !whole {
            // The word of it may be lost with its tunnel: then its host asks by another, perhaps at another node.
            self.listen(exchange);
        }
        if let Some(way_back) = self
            .way_back
            .as_ref()
            .filter(|_| exchange.listens.load(Ordering::Relaxed))
        {
            way_back.close(exchange.id, whole);
        }
        if exchange.role == Role::Host && known.is_some() {
            let code = exchange.ended().unwrap_or(Code::Finished);
            self.over
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(exchange.id, code);
        }
    }

    /// A frame of an exchange, come on `path`. `Err` when the exchange is somebody else's: the peer lies.
    pub fn on_frame(&self, id: RequestId, frame: Frame, path: &Arc<Path>) -> Result<Taken, NotYours> {
        let Some(exchange) = self.get(id) else {
            return Ok(Taken::Unknown(frame));
        };
        let followed = exchange.on_frame(frame, path)?;
        if followed && path.is_over_bus() {
            self.listen(&exchange);
        }
        if exchange.role == Role::Host && exchange.ended().is_some() {
            self.remove(&exchange);
        }
        Ok(if followed { Taken::Moved } else { Taken::Known })
    }

    /// A frame of an exchange that is not known here, or no more: the other end, which still believes in it, is told.
    pub fn refuse(&self, id: RequestId, frame: &Frame, path: &Path) {
        if !matches!(frame, Frame::Reset(..) | Frame::Done(_)) {
            let over = self.over.lock().unwrap_or_else(PoisonError::into_inner).get(id);
            path.send(Frame::Reset(id, over.unwrap_or(Code::Gone)));
        }
    }

    fn all(&self) -> Vec<Arc<Exchange>> {
        let shards = self
            .shards
            .iter()
            .map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner));
        shards
            .flat_map(|shard| shard.values().cloned().collect::<Vec<_>>())
            .collect()
    }

    /// Time passed. `other` finds a path of an owner that is not the given one. Returns how many exchanges moved.
    pub fn tick(&self, other: impl Fn(&Owner, Option<&Arc<Path>>) -> Option<Arc<Path>>) -> usize {
        let now = self.clock.now();
        let flush = std::mem::take(&mut *self.done_on.lock().unwrap_or_else(PoisonError::into_inner));
        flush.iter().for_each(|path| path.flush_done());
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_sub(over.turned_at) >= self.resume_timeout().max(TURN_EVERY) {
            over.turn(now);
        }
        drop(over);
        self.all()
            .into_iter()
            .filter(|exchange| self.tick_one(exchange, now, &other))
            .count()
    }

    fn tick_one(
        &self,
        exchange: &Arc<Exchange>,
        now: Duration,
        other: &impl Fn(&Owner, Option<&Arc<Path>>) -> Option<Arc<Path>>,
    ) -> bool {
        let wants = exchange.on_tick(now, self.resume_timeout());
        if exchange.role == Role::Host && exchange.ended().is_some() {
            self.remove(exchange);
        }
        if wants == Wants::Nothing {
            return false;
        }
        self.listen(exchange);
        let (owner, current) = {
            let state = exchange.state();
            (state.owner.clone(), state.path.as_ref().map(|held| held.0.clone()))
        };
        wants == Wants::Path && other(&owner, current.as_ref()).is_some_and(|path| exchange.resume_on(&path))
    }

    /// A path is gone: its exchanges go on over another of the same owner, or wait. Returns how many moved.
    pub fn path_lost(&self, path: &Arc<Path>, other: Option<&Arc<Path>>) -> usize {
        if path.in_flight() == 0 {
            return 0;
        }
        let moves = |exchange: &Arc<Exchange>| {
            if other.is_none_or(|other| other.is_over_bus()) {
                self.listen(exchange);
            }
            match other {
                Some(other) => exchange.resume_on(other),
                None => {
                    exchange.cut_off(path);
                    false
                }
            }
        };
        self.all()
            .iter()
            .filter(|exchange| exchange.is_on(path))
            .filter(|exchange| moves(exchange))
            .count()
    }

    /// A path is there: exchanges of its owner that have none go on over it. Returns how many.
    pub fn path_found(&self, path: &Arc<Path>) -> usize {
        let waits = |exchange: &&Arc<Exchange>| exchange.is_of(&path.owner) && exchange.cut_for().is_some();
        self.all()
            .iter()
            .filter(waits)
            .inspect(|exchange| {
                if path.is_over_bus() {
                    self.listen(exchange);
                }
            })
            .filter(|exchange| exchange.resume_on(path))
            .count()
    }

    /// An exchange that reached nobody goes to whoever is at the end of `path`. False when something has reached somebody
    /// after all, or it is over.
    pub fn rehome(&self, exchange: &Arc<Exchange>, path: &Arc<Path>) -> bool {
        if path.is_over_bus() {
            self.listen(exchange);
        }
        exchange.rehome(path)
    }

    /// Messages of the bus may have been missed: every exchange that is reached over it tells where it stands, and asks.
    pub fn missed(&self) {
        self.all()
            .iter()
            .filter(|exchange| exchange.listens.load(Ordering::Relaxed))
            .for_each(Exchange::missed);
    }

    /// An OPEN of this exchange came back undelivered from this tunnel.
    pub fn open_returned(&self, id: RequestId, tunnel_ws_id: TunnelId) {
        if let Some(exchange) = self.get(id) {
            exchange.open_returned(tunnel_ws_id);
        }
    }

    /// Ends all exchanges of one owner: its process is gone.
    pub fn owner_left(&self, owner: &Owner, code: Code) {
        self.all()
            .iter()
            .filter(|exchange| exchange.is_of(owner))
            .for_each(|exchange| exchange.reset(code));
    }

    /// Ends all exchanges that `doomed` names.
    pub fn reset_owners(&self, doomed: &HashSet<Owner>, code: Code) {
        self.all()
            .iter()
            .filter(|exchange| doomed.contains(&exchange.owner()))
            .for_each(|exchange| exchange.reset(code));
    }
}

/// Whether a frame found its exchange.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// It did.
    Known,
    /// It did, and the exchange goes on over the path that it came on.
    Moved,
    /// The exchange is not known here: the frame comes back.
    Unknown(Frame),
}

/// What became of an OPEN at the host.
#[derive(Debug)]
pub enum Accepted {
    /// Call the upstream.
    New(Arc<Exchange>),
    /// A repeat.
    Known(Arc<Exchange>),
    /// It will not be called; answer with RESET and this code.
    Over(Code),
}

/// An exchange that this process opened; dropping it ends it.
#[derive(Debug)]
pub struct Open {
    /// The exchange.
    pub exchange: Arc<Exchange>,
    table: Arc<Exchanges>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.table.remove(&self.exchange);
        if !self.exchange.is_whole() {
            return self.exchange.reset(Code::Cancelled);
        }
        let path = self.exchange.state().path.take();
        if let Some(held) = path.filter(|held| held.0.done(self.exchange.id)) {
            self.table
                .done_on
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(held.0.clone());
        }
    }
}
