//! Where an exchange's frames go: a queue in which exchanges take turns, drained by whatever carries the frames away
//! (a tunnel's socket in [`super::link`]; the bus, for a peer). It holds no frames of streams, only who has some.
//!
//! Order: connection frames, then control frames of exchanges, then one frame of data from each exchange in turn. So one
//! exchange never slows another, and a grant of credit never waits behind data.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::Waker,
    time::Duration,
};

use bytes::BytesMut;
use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use super::{Clock, Exchange};
use crate::{
    ids::{ClientId, InstanceId, RequestId},
    wire::frame::{Frame, MAX_MESSAGE, MAX_PAYLOAD},
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

/// Who may speak on a path: one process of one client. An exchange belongs to it, not to a path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The tenant.
    pub client_id: ClientId,
    /// The agent's process.
    pub instance_id: InstanceId,
}

/// One way for frames. Shared by the exchanges that use it and the task that carries them.
#[derive(Debug)]
pub struct Path {
    /// Who is at the agent's end.
    pub owner: Owner,
    clock: Clock,
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
    done: Vec<RequestId>,
    done_asked: bool,
}

enum Next {
    Frame(Frame),
    Control(Arc<Exchange>),
    Turn(Arc<Exchange>),
}

impl Path {
    /// A path that nobody carries yet; it queues from the start.
    pub fn new(owner: Owner, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            owner,
            clock,
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

    /// Fills a message with the frames whose turn it is. It stays empty when there is nothing to send.
    pub fn fill(self: &Arc<Self>, message: &mut BytesMut) {
        while message.len() + MIN_ROOM <= MAX_PAYLOAD {
            match self.next() {
                Some(Next::Frame(frame)) => frame.encode(message),
                Some(Next::Control(exchange)) => exchange.write_control(self, message),
                Some(Next::Turn(exchange)) => {
                    if exchange.write_turn(self, message, MAX_PAYLOAD - message.len()) {
                        self.queue().turns.push_back(exchange);
                    }
                }
                None => break,
            }
        }
        self.fill_done(message);
    }

    /// DONE rides on what goes anyway, or goes by itself when it was asked for.
    fn fill_done(&self, message: &mut BytesMut) {
        let mut queue = self.queue();
        if message.is_empty() && !queue.done_asked {
            return;
        }
        let room = (MAX_MESSAGE - message.len().min(MAX_MESSAGE)) / DONE_LENGTH;
        let first = queue.done.len().saturating_sub(room);
        queue.done.drain(first..).for_each(|id| Frame::Done(id).encode(message));
        queue.done_asked &= !queue.done.is_empty();
    }

    fn next(&self) -> Option<Next> {
        let mut queue = self.queue();
        let Queue {
            frames, urgent, turns, ..
        } = &mut *queue;
        (frames.pop_front().map(Next::Frame))
            .or_else(|| urgent.pop_front().map(Next::Control))
            .or_else(|| turns.pop_front().map(Next::Turn))
    }

    /// Counts an exchange as in flight until the value is dropped.
    pub(super) fn hold(self: &Arc<Self>) -> Held {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Held(self.clone())
    }
}

/// A path that an exchange uses.
#[derive(Debug)]
pub(super) struct Held(pub Arc<Path>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
