//! Where an exchange's frames go: a queue in which exchanges take turns, drained by whatever carries the frames away
//! (a tunnel's socket in [`super::link`]; the bus, for a tunnel that a peer holds). It holds no frames of streams of its
//! own, only who has some; and what a peer handed over for this tunnel, as it came.
//!
//! Order: connection frames, then control frames of exchanges, then one frame of data from each exchange in turn, what
//! peers handed over being one more in the round. So one exchange never slows another, and a grant of credit never waits
//! behind data.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::Waker,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use super::{Clock, Exchange};
use crate::{
    ids::{ClientId, InstanceId, RequestId, TunnelId},
    wire::{
        frame::{Frame, INITIAL_WINDOW, MAX_MESSAGE, MAX_PAYLOAD},
        stream::MAX_WINDOW,
    },
};

/// A message with less room than this is full, bytes. One of data has about one payload, so that a piece of it that
/// waits for its reader pins no neighbours.
const MIN_ROOM: usize = 1024;
/// Answers that wait for the socket. Beyond it they are dropped: whoever wants one asks again.
const MAX_FRAMES: usize = 1024;
/// Finished exchanges are reported together; with this many waiting, at once.
const MAX_DONE: usize = 64;
/// What one DONE takes in a message, bytes.
const DONE_LENGTH: usize = 20;

/// What peers handed over and the socket has not taken, bytes. Beyond it, it is dropped: their ends send again.
const MAX_FORWARDED: usize = 4 * 1024 * 1024;
/// What a node may be behind by on the bus, bytes, where the bus does not say: Redis's default for 60 s
/// (`client-output-buffer-limit pubsub 32mb 8mb 60`).
const BUS_LIMIT: u64 = 8 * 1024 * 1024;
/// Of that, what all exchanges over the bus together may have on their way to this node…
const CREDIT_IN: fn(u64) -> u64 = |limit| limit / 4 * 3;
/// … and on its way to the other nodes, several of which may send to one.
const CREDIT_OUT: fn(u64) -> u64 = |limit| limit / 8;

/// Who may speak on a path: one process of one client. An exchange belongs to it, not to a path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The tenant.
    pub client_id: ClientId,
    /// The agent's process.
    pub instance_id: InstanceId,
}

/// The credit that the exchanges of a node divide whose frames go over the bus: no publisher may overrun a subscriber.
#[derive(Debug)]
pub struct BusCredit {
    sharers: AtomicUsize,
    limit: AtomicU64,
}

impl Default for BusCredit {
    fn default() -> Self {
        Self {
            sharers: AtomicUsize::new(0),
            limit: AtomicU64::new(BUS_LIMIT),
        }
    }
}

impl BusCredit {
    /// What a node may be behind by on this bus, bytes.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    fn share(&self, of: fn(u64) -> u64) -> u64 {
        let sharers = self.sharers.load(Ordering::Relaxed).max(1) as u64;
        (of(self.limit.load(Ordering::Relaxed)) / sharers).clamp(INITIAL_WINDOW, MAX_WINDOW)
    }
}

/// A path over the bus ends at this tunnel of another node's.
#[derive(Debug)]
struct OverBus {
    tunnel_ws_id: TunnelId,
    /// What bounds its exchanges.
    credit: Arc<BusCredit>,
}

/// One way for frames. Shared by the exchanges that use it and the task that carries them.
#[derive(Debug)]
pub struct Path {
    /// Who is at the agent's end.
    pub owner: Owner,
    clock: Clock,
    /// Of a path over the bus.
    bus: Option<OverBus>,
    /// Guards the queue; held for a push or a pop.
    queue: Mutex<Queue>,
    carrier: AtomicWaker,
    closing: Notify,
    rtt_us: AtomicU64,
    heard_ms: AtomicU64,
    in_flight: AtomicUsize,
    leaving: AtomicBool,
    /// Written under the queue's lock, so that nothing is pushed behind it.
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Frame>,
    urgent: VecDeque<Arc<Exchange>>,
    turns: VecDeque<Arc<Exchange>>,
    forwarded: VecDeque<Bytes>,
    forwarded_bytes: usize,
    /// Whether the next turn is for what peers handed over.
    peers_turn: bool,
    done: Vec<RequestId>,
    done_asked: bool,
}

enum Next {
    Frame(Frame),
    Control(Arc<Exchange>),
    Turn(Arc<Exchange>),
    Forwarded(Bytes),
}

impl Queue {
    fn pop(&mut self) -> Option<Next> {
        if let Some(frame) = self.frames.pop_front() {
            return Some(Next::Frame(frame));
        }
        if let Some(exchange) = self.urgent.pop_front() {
            return Some(Next::Control(exchange));
        }
        self.peers_turn = !self.forwarded.is_empty() && (self.peers_turn || self.turns.is_empty());
        if std::mem::take(&mut self.peers_turn) {
            return self.pop_forwarded();
        }
        self.peers_turn = true;
        self.turns.pop_front().map(Next::Turn)
    }

    fn pop_forwarded(&mut self) -> Option<Next> {
        let message = self.forwarded.pop_front()?;
        self.forwarded_bytes -= message.len();
        Some(Next::Forwarded(message))
    }

    fn put_back(&mut self, message: Bytes) {
        self.forwarded_bytes += message.len();
        self.forwarded.push_front(message);
        self.peers_turn = true;
    }
}

impl Path {
    /// A path to a tunnel that is here. Nobody carries it yet; it queues from the start.
    pub fn new(owner: Owner, clock: Clock) -> Arc<Self> {
        Self::make(owner, clock, None)
    }

    /// A path to a tunnel that another node holds: over the bus, whose `credit` all such paths of a node share.
    pub fn over_bus(owner: Owner, clock: Clock, tunnel_ws_id: TunnelId, credit: Arc<BusCredit>) -> Arc<Self> {
        Self::make(owner, clock, Some(OverBus { tunnel_ws_id, credit }))
    }

    fn make(owner: Owner, clock: Clock, bus: Option<OverBus>) -> Arc<Self> {
        Arc::new(Self {
            owner,
            clock,
            bus,
            queue: Mutex::default(),
            carrier: AtomicWaker::new(),
            closing: Notify::new(),
            rtt_us: AtomicU64::new(0),
            heard_ms: AtomicU64::new(clock.now().as_millis() as u64),
            in_flight: AtomicUsize::new(0),
            leaving: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether frames come back over the bus, addressed by request.
    pub fn is_over_bus(&self) -> bool {
        self.bus.is_some()
    }

    /// The other node's tunnel at its end, if it is over the bus.
    pub(super) fn tunnel_ws_id(&self) -> Option<TunnelId> {
        self.bus.as_ref().map(|bus| bus.tunnel_ws_id)
    }

    /// The most credit that one exchange may grant on this path.
    pub(super) fn most_window(&self) -> u64 {
        self.bus.as_ref().map_or(MAX_WINDOW, |bus| bus.credit.share(CREDIT_IN))
    }

    /// The most that one exchange may have on its way without having heard from its peer; `None`: what it was granted.
    pub(super) fn most_flight(&self) -> Option<u64> {
        self.bus.as_ref().map(|bus| bus.credit.share(CREDIT_OUT))
    }

    /// The round trip of a frame and its answer, as last measured.
    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    /// Takes in a measured round trip.
    pub fn set_rtt(&self, rtt: Duration) {
        self.rtt_us.store(rtt.as_micros() as u64, Ordering::Relaxed);
    }

    /// Notes that the peer was heard.
    pub fn heard(&self, now: Duration) {
        self.heard_ms.store(now.as_millis() as u64, Ordering::Relaxed);
    }

    /// For how long nothing has come from the peer.
    pub fn silent_for(&self, now: Duration) -> Duration {
        now.saturating_sub(Duration::from_millis(self.heard_ms.load(Ordering::Relaxed)))
    }

    /// Exchanges that use this path now.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The agent at its end asked for no new exchanges.
    pub fn set_leaving(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Whether new exchanges are welcome on it.
    pub fn takes_more(&self) -> bool {
        !self.leaving.load(Ordering::Relaxed) && !self.is_closed()
    }

    /// The clock that all who use this path share.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Whether it was closed: nothing goes out any more.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Sends what the queue holds of connection frames, then nothing more.
    pub fn close(&self) {
        let mut queue = self.queue();
        self.closed.store(true, Ordering::Release);
        queue.urgent.clear();
        queue.turns.clear();
        queue.forwarded.clear();
        queue.forwarded_bytes = 0;
        queue.done.clear();
        drop(queue);
        self.carrier.wake();
        self.closing.notify_waiters();
    }

    /// Waits until it is closed.
    pub async fn closed(&self) {
        loop {
            let closing = self.closing.notified();
            if self.is_closed() {
                return;
            }
            closing.await;
        }
    }

    /// Puts a frame before all data. When too many wait it is dropped: frames that come here are repeated on demand.
    pub fn send(&self, frame: Frame) {
        let mut queue = self.queue();
        if self.is_closed() || queue.frames.len() >= MAX_FRAMES || queue.frames.back() == Some(&frame) {
            return;
        }
        queue.frames.push_back(frame);
        drop(queue);
        self.carrier.wake();
    }

    /// Puts a message of frames that a peer handed over into the round. False when too much waits, and it was dropped.
    pub fn forward(&self, message: Bytes) -> bool {
        let mut queue = self.queue();
        if self.is_closed() || queue.forwarded_bytes + message.len() > MAX_FORWARDED || message.len() > MAX_MESSAGE {
            return false;
        }
        queue.forwarded_bytes += message.len();
        queue.forwarded.push_back(message);
        drop(queue);
        self.carrier.wake();
        true
    }

    /// Tells the peer to forget an exchange that ended well, with the next message; true when it is the first that
    /// waits, so that somebody has to call [`flush_done`](Self::flush_done) in case no message comes.
    pub fn done(&self, id: RequestId) -> bool {
        let mut queue = self.queue();
        if self.is_closed() {
            return false;
        }
        queue.done.push(id);
        let (first, full) = (queue.done.len() == 1, queue.done.len() >= MAX_DONE);
        queue.done_asked |= full;
        drop(queue);
        if full {
            self.carrier.wake();
        }
        first
    }

    /// Sends what [`done`](Self::done) gathered.
    pub fn flush_done(&self) {
        let mut queue = self.queue();
        queue.done_asked = !queue.done.is_empty();
        drop(queue);
        self.carrier.wake();
    }

    pub(super) fn push_urgent(&self, exchange: Arc<Exchange>) {
        self.push(|queue| queue.urgent.push_back(exchange));
    }

    pub(super) fn push_turn(&self, exchange: Arc<Exchange>) {
        self.push(|queue| queue.turns.push_back(exchange));
    }

    fn push(&self, put: impl FnOnce(&mut Queue)) {
        let mut queue = self.queue();
        if self.is_closed() {
            return;
        }
        put(&mut queue);
        drop(queue);
        self.carrier.wake();
    }

    /// Whoever carries the frames: is woken when there are some.
    pub fn register(&self, waker: &Waker) {
        self.carrier.register(waker);
    }

    /// Appends to a message the frames whose turn it is: nothing when there is nothing to send.
    pub fn fill(self: &Arc<Self>, message: &mut BytesMut) {
        let start = message.len();
        while message.len() - start + MIN_ROOM <= MAX_PAYLOAD {
            match self.next() {
                Some(Next::Frame(frame)) => frame.encode(message),
                Some(Next::Control(exchange)) => exchange.write_control(self, message),
                Some(Next::Turn(exchange)) => {
                    if exchange.write_turn(self, message, MAX_PAYLOAD + start - message.len()) {
                        self.queue().turns.push_back(exchange);
                    }
                }
                Some(Next::Forwarded(frames)) if message.len() - start + frames.len() <= MAX_MESSAGE => {
                    message.extend_from_slice(&frames);
                }
                Some(Next::Forwarded(frames)) => {
                    self.queue().put_back(frames);
                    break;
                }
                None => break,
            }
        }
        self.fill_done(message, start);
    }

    /// DONE rides on what goes anyway, or goes by itself when it was asked for.
    fn fill_done(&self, message: &mut BytesMut, start: usize) {
        let mut queue = self.queue();
        let length = message.len() - start;
        if length == 0 && !queue.done_asked {
            return;
        }
        let room = MAX_MESSAGE.saturating_sub(length) / DONE_LENGTH;
        let first = queue.done.len().saturating_sub(room);
        queue.done.drain(first..).for_each(|id| Frame::Done(id).encode(message));
        queue.done_asked &= !queue.done.is_empty();
    }

    fn next(&self) -> Option<Next> {
        self.queue().pop()
    }

    /// Counts an exchange as in flight until the value is dropped.
    pub(super) fn hold(self: &Arc<Self>) -> Held {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        if let Some(OverBus { credit, .. }) = &self.bus {
            credit.sharers.fetch_add(1, Ordering::Relaxed);
        }
        Held(self.clone())
    }
}

/// A path that an exchange uses.
#[derive(Debug)]
pub(super) struct Held(pub Arc<Path>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        if let Some(OverBus { credit, .. }) = &self.0.bus {
            credit.sharers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
