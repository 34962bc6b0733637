//! One request and its response, in flight between two ends: the *ingress*, which holds the downstream, and the *host*,
//! which calls the upstream. Both are the same thing here: a stream out, a stream in, and the path that carries their
//! frames, which may be cut and replaced while the exchange lives.
//!
//! - [`ingress`] and [`host`]: what each end does with the streams
//! - [`body`]: an HTTP body read from a stream, and one written to it
//! - [`table`]: all exchanges of a process; time, cut paths and resumption
//! - [`path`]: where frames go, in turns; [`link`]: the WebSocket that carries them
//!
//! An exchange does no I/O. Frames and time are put in ([`Exchange::on_frame`], [`Exchange::on_tick`]); frames are taken
//! out by the path's carrier; readers and writers are woken.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

pub mod body;
pub mod host;
pub mod ingress;
pub mod link;
pub mod path;
pub mod table;

use self::path::{Held, Owner, Path};
use crate::{
    ids::RequestId,
    wire::{
        frame::{self, Code, Frame, MAX_PAYLOAD},
        head,
        stream::{Ack, Chunk, Receiver, Sender, StreamError},
    },
};

/// An exchange that hears nothing asks after this long whether the other end still knows it.
const IDLE_PROBE: Duration = Duration::from_secs(15);
/// A host that was heard and then knows the exchange no more is believed after this long.
const GONE_AFTER: Duration = Duration::from_secs(1);
/// Without an answer for this long, another path is tried if there is one (DESIGN.md §3.1).
const REROUTE_AFTER: Duration = Duration::from_secs(2);

/// The time of one process: a [`Duration`] since it was made.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// The time since the clock was made.
    pub fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Which end of the exchange this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Holds the downstream; opens the exchange.
    Ingress,
    /// Calls the upstream.
    Host,
}

/// One end of an exchange.
#[derive(Debug)]
pub struct Exchange {
    /// Its name, the same at both ends.
    pub id: RequestId,
    /// Whose it is; frames of anyone else are not its frames.
    pub owner: Owner,
    role: Role,
    clock: Clock,
    /// Body bytes written to the outgoing stream.
    body_sent: AtomicU64,
    /// Guards the streams; held while a frame is taken in or written out, never across an await.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    tx: Sender,
    rx: Receiver,
    path: Option<Held>,
    /// Since when there is no path.
    cut_at: Option<Duration>,
    /// Whether the path's queues hold it.
    in_urgent: bool,
    in_turns: bool,
    /// To be told to the peer: that this end moved to a new path.
    moved: bool,
    /// The peer has been heard, so it knows the exchange.
    confirmed: bool,
    /// The last time that bytes moved.
    active_at: Duration,
    /// The last time that the peer was heard, or asked whether it is there.
    heard_at: Duration,
    /// Since when the host says nothing but that it does not know the exchange.
    gone_since: Option<Duration>,
    /// How often another path was tried since bytes moved: each time waits twice as long.
    reroutes: u32,
    /// No response head within this long of the last progress: the exchange is reset.
    answer_within: Option<Duration>,
    ended: Option<Code>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    watcher: Option<Waker>,
}

/// Wakers to call once the lock is released: at most the reader, the writer and the watcher.
#[derive(Default)]
struct Wakes([Option<Waker>; 3]);

impl Wakes {
    fn add(&mut self, waker: &mut Option<Waker>) {
        if let Some(place) = self.0.iter_mut().find(|place| place.is_none()) {
            *place = waker.take();
        }
    }
}

impl Drop for Wakes {
    fn drop(&mut self) {
        self.0.iter_mut().filter_map(Option::take).for_each(Waker::wake);
    }
}

/// What the table has to do for an exchange after a tick.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wants {
    Nothing,
    /// Another path, if there is one.
    Path,
}

impl Exchange {
    fn new(id: RequestId, owner: Owner, role: Role, clock: Clock) -> Self {
        let now = clock.now();
        let state = State {
            active_at: now,
            heard_at: now,
            ..State::default()
        };
        Self {
            id,
            owner,
            role,
            clock,
            body_sent: AtomicU64::new(0),
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- what the ends do -------------------------------------------------------------------------------------------

    /// The next bytes of the incoming stream; `None` at its end.
    pub fn poll_read(self: &Arc<Self>, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Code>> {
        let mut state = self.state();
        if let Some(piece) = state.rx.read() {
            if state.rx.ack_due() {
                self.queue_urgent(&mut state);
            }
            return Poll::Ready(Ok(Some(piece)));
        }
        if state.rx.is_at_end() {
            return Poll::Ready(Ok(None));
        }
        if let Some(code) = state.ended {
            return Poll::Ready(Err(code));
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Ready when there is credit for more bytes. An error when the peer reads no more.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<Result<(), Code>> {
        let mut state = self.state();
        if let Some(code) = state.ended {
            return Poll::Ready(Err(code));
        }
        if state.tx.is_stopped() {
            return Poll::Ready(Err(Code::Cancelled));
        }
        if state.tx.capacity() > 0 {
            return Poll::Ready(Ok(()));
        }
        state.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Puts bytes into the outgoing stream; they leave with the next [`flush`](Self::flush).
    pub fn write(&self, pieces: impl IntoIterator<Item = Bytes>) {
        let mut state = self.state();
        pieces.into_iter().for_each(|piece| state.tx.write(piece));
    }

    /// Puts a part of the body into the outgoing stream.
    pub fn write_data(&self, data: Bytes) {
        self.body_sent.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.write([head::data_header(data.len()), data]);
    }

    /// Body bytes written to the outgoing stream so far.
    pub fn body_sent(&self) -> u64 {
        self.body_sent.load(Ordering::Relaxed)
    }

    /// Ends the outgoing stream, with the next [`flush`](Self::flush).
    pub fn finish(&self) {
        self.state().tx.finish();
    }

    /// Waits until the peer has all of the finished outgoing stream, or the exchange ended. For whoever wrote it.
    pub async fn delivered(&self) {
        std::future::poll_fn(|cx| {
            let mut state = self.state();
            if state.tx.is_done() || state.ended.is_some() {
                return Poll::Ready(());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Takes a turn on the path for what was written.
    pub fn flush(self: &Arc<Self>) {
        let mut state = self.state();
        if state.tx.has_chunk() {
            self.queue_turn(&mut state);
        }
    }

    /// Whether all of the incoming stream has been read.
    pub fn is_read_to_end(&self) -> bool {
        self.state().rx.is_at_end()
    }

    /// Reads no more: the peer is asked to stop sending.
    pub fn stop_reading(self: &Arc<Self>) {
        let mut state = self.state();
        if !state.rx.is_complete() {
            state.rx.stop();
            self.queue_urgent(&mut state);
        }
    }

    /// Ends the exchange at this end and tells the peer.
    pub fn reset(&self, code: Code) {
        let mut wakes = Wakes::default();
        self.end(&mut self.state(), code, true, &mut wakes);
    }

    /// Why it ended before both streams were whole, if it did.
    pub fn ended(&self) -> Option<Code> {
        self.state().ended
    }

    /// Waits until the exchange is ended by the peer, by time, or here.
    pub async fn end_of_it(&self) -> Code {
        std::future::poll_fn(|cx| {
            let mut state = self.state();
            if let Some(code) = state.ended {
                return Poll::Ready(code);
            }
            state.watcher = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// The response head has to come within this long of the last progress; `None` once it is here.
    pub fn set_answer_within(&self, limit: Option<Duration>) {
        self.state().answer_within = limit;
    }

    /// For how long it has been without a path.
    pub fn cut_for(&self) -> Option<Duration> {
        self.state().cut_at.map(|at| self.clock.now().saturating_sub(at))
    }

    /// Whether both streams are whole: nothing is left to be said but DONE.
    fn is_whole(&self) -> bool {
        let state = self.state();
        state.ended.is_none() && state.rx.is_at_end()
    }

    // --- frames in --------------------------------------------------------------------------------------------------

    /// Takes in a frame of this exchange that came on `path`. True when the exchange followed its peer to that path.
    pub fn on_frame(self: &Arc<Self>, frame: Frame, path: &Arc<Path>) -> bool {
        let now = self.clock.now();
        let mut wakes = Wakes::default();
        let mut state = self.state();
        if state.ended.is_some() {
            return false;
        }
        let moved = matches!(&frame, Frame::Ack(_, ack) if ack.moved);
        let follows = (state.path.is_none() || (moved && !state.is_on(path))) && !path.is_closed();
        if follows {
            self.move_to(&mut state, path, now);
        }
        state.heard_at = now;
        if !matches!(frame, Frame::Reset(_, Code::Gone)) {
            state.confirmed = true;
            state.gone_since = None;
        }
        match frame {
            Frame::Open(_, chunk) | Frame::Stream(_, chunk) => self.on_chunk(&mut state, chunk, now, &mut wakes),
            Frame::Ack(_, ack) => self.on_ack(&mut state, &ack, now, &mut wakes),
            Frame::Stop(..) => {
                state.tx.stop();
                wakes.add(&mut state.writer);
            }
            Frame::Reset(_, code) => self.on_reset(&mut state, code, now, &mut wakes),
            Frame::Done(_) => self.end(&mut state, Code::Finished, false, &mut wakes),
            _ => {}
        }
        follows
    }

    fn on_chunk(self: &Arc<Self>, state: &mut State, chunk: Chunk<Bytes>, now: Duration, wakes: &mut Wakes) {
        match state.rx.on_chunk(chunk, now) {
            Ok(true) => {
                state.moved_bytes(now);
                wakes.add(&mut state.reader);
            }
            Ok(false) => {}
            Err(error) => return self.broken(state, error, wakes),
        }
        if state.rx.ack_due() {
            self.queue_urgent(state);
        }
    }

    fn on_ack(self: &Arc<Self>, state: &mut State, ack: &Ack, now: Duration, wakes: &mut Wakes) {
        let before = state.tx.buffered();
        if let Err(error) = state.tx.on_ack(ack, now) {
            return self.broken(state, error, wakes);
        }
        if state.tx.buffered() < before {
            state.moved_bytes(now);
        }
        state.rx.on_probe(ack.probe);
        if state.rx.ack_due() {
            self.queue_urgent(state);
        }
        if state.tx.has_chunk() {
            self.queue_turn(state);
        }
        if state.tx.capacity() > 0 || state.tx.is_done() {
            wakes.add(&mut state.writer);
        }
    }

    /// The host does not know the exchange. Its OPEN was lost, if it was never heard; else a frame may have overtaken the
    /// OPEN on another path: it is asked again, and gone if it says nothing else for a while. Any other code ends it.
    fn on_reset(self: &Arc<Self>, state: &mut State, code: Code, now: Duration, wakes: &mut Wakes) {
        if code != Code::Gone || self.role == Role::Host {
            return self.end(state, code, false, wakes);
        }
        if state.confirmed {
            state.gone_since.get_or_insert(now);
            state.tx.ask();
            self.queue_urgent(state);
        } else {
            state.tx.path_changed(now);
            self.queue_turn(state);
        }
    }

    fn broken(&self, state: &mut State, error: StreamError, wakes: &mut Wakes) {
        tracing::warn!(request.id = %self.id, client.id = %self.owner.client_id, %error, "the peer broke the protocol of a stream");
        self.end(state, Code::Protocol, true, wakes);
    }

    fn end(&self, state: &mut State, code: Code, tell: bool, wakes: &mut Wakes) {
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(code);
        if let Some(held) = state.path.take().filter(|_| tell) {
            held.0.send(Frame::Reset(self.id, code));
        }
        wakes.add(&mut state.reader);
        wakes.add(&mut state.writer);
        wakes.add(&mut state.watcher);
    }

    // --- frames out -------------------------------------------------------------------------------------------------

    fn queue_urgent(self: &Arc<Self>, state: &mut State) {
        if let Some(held) = state.path.as_ref().filter(|_| !state.in_urgent) {
            held.0.push_urgent(self.clone());
            state.in_urgent = true;
        }
    }

    fn queue_turn(self: &Arc<Self>, state: &mut State) {
        if let Some(held) = state.path.as_ref().filter(|_| !state.in_turns) {
            held.0.push_turn(self.clone());
            state.in_turns = true;
        }
    }

    /// Writes the acknowledgement, question or stop that is due.
    fn write_control(&self, path: &Arc<Path>, message: &mut BytesMut) {
        let mut state = self.state();
        if !state.is_on(path) {
            return;
        }
        state.in_urgent = false;
        if state.rx.is_stopped() {
            Frame::Stop(self.id, Code::Cancelled).encode(message);
        }
        let ack = state.rx.take_ack(path.rtt(), self.clock.now());
        let (probe, moved) = (state.tx.take_probe(), std::mem::take(&mut state.moved));
        Frame::Ack(self.id, Ack { probe, moved, ..ack }).encode(message);
    }

    /// Writes one frame of the outgoing stream, of at most `room` bytes of payload; true when there is more, and another
    /// turn is due.
    fn write_turn(self: &Arc<Self>, path: &Arc<Path>, message: &mut BytesMut, room: usize) -> bool {
        let mut state = self.state();
        if !state.is_on(path) {
            return false;
        }
        if let Some(chunk) = state.tx.next_chunk(room.min(MAX_PAYLOAD), self.clock.now()) {
            match chunk.offset {
                0 if self.role == Role::Ingress => frame::open_header(message, self.id, chunk.data, chunk.fin),
                offset => frame::stream_header(message, self.id, offset, chunk.data, chunk.fin),
            }
            state.tx.copy(&chunk, message);
        }
        if state.tx.has_probe() {
            self.queue_urgent(&mut state);
        }
        state.in_turns = state.tx.has_chunk();
        state.in_turns
    }

    // --- time and paths ---------------------------------------------------------------------------------------------

    /// Goes on over `path`, telling the peer where the streams stand. False when it is over.
    pub(crate) fn resume_on(self: &Arc<Self>, path: &Arc<Path>) -> bool {
        let mut state = self.state();
        if state.ended.is_some() || state.is_on(path) {
            return false;
        }
        state.moved = true;
        state.reroutes += u32::from(state.path.is_some());
        self.move_to(&mut state, path, self.clock.now());
        true
    }

    fn move_to(self: &Arc<Self>, state: &mut State, path: &Arc<Path>, now: Duration) {
        state.path = Some(path.hold());
        (state.in_urgent, state.in_turns, state.cut_at) = (false, false, None);
        state.tx.path_changed(now);
        state.rx.path_changed();
        self.queue_urgent(state);
        if state.tx.has_chunk() {
            self.queue_turn(state);
        }
    }

    /// The path is gone and there is no other: wait for one.
    pub(crate) fn cut_off(&self, path: &Arc<Path>) {
        let mut state = self.state();
        if state.is_on(path) {
            state.path = None;
            state.cut_at = Some(self.clock.now());
        }
    }

    pub(crate) fn is_on(&self, path: &Arc<Path>) -> bool {
        self.state().is_on(path)
    }

    /// Time passed: questions and acknowledgements fall due, deadlines end it.
    pub(crate) fn on_tick(self: &Arc<Self>, now: Duration, resume_timeout: Duration) -> Wants {
        let mut wakes = Wakes::default();
        let mut state = self.state();
        if state.ended.is_some() {
            return Wants::Nothing;
        }
        if let Some(code) = state.overdue(now, resume_timeout) {
            self.end(&mut state, code, true, &mut wakes);
            return Wants::Nothing;
        }
        // It may have come to the path just as that was closed, when nobody looked for it there any more.
        if state.path.as_ref().is_none_or(|held| held.0.is_closed()) {
            state.path = None;
            state.cut_at.get_or_insert(now);
            return Wants::Path;
        }
        let asks = state.tx.on_tick(now) | state.asks_if_idle(now);
        if state.rx.on_tick(now) | asks {
            self.queue_urgent(&mut state);
        }
        if asks && !state.confirmed && self.role == Role::Ingress {
            // The question itself would only be answered "gone": repeat the OPEN, which is safe.
            state.tx.path_changed(now);
            self.queue_turn(&mut state);
        }
        if state.is_unanswered(now) {
            Wants::Path
        } else {
            Wants::Nothing
        }
    }
}

impl State {
    fn is_on(&self, path: &Arc<Path>) -> bool {
        self.path.as_ref().is_some_and(|held| Arc::ptr_eq(&held.0, path))
    }

    fn overdue(&self, now: Duration, resume_timeout: Duration) -> Option<Code> {
        if self.cut_at.is_some_and(|at| now.saturating_sub(at) >= resume_timeout) {
            return Some(Code::PathLost);
        }
        if self
            .gone_since
            .is_some_and(|since| now.saturating_sub(since) >= GONE_AFTER)
        {
            return Some(Code::Gone);
        }
        let quiet = now.saturating_sub(self.active_at);
        self.answer_within
            .is_some_and(|limit| quiet >= limit)
            .then_some(Code::Timeout)
    }

    fn moved_bytes(&mut self, now: Duration) {
        (self.active_at, self.reroutes) = (now, 0);
    }

    /// Long silence: is the other end still there? Keeps asking until it is heard.
    fn asks_if_idle(&mut self, now: Duration) -> bool {
        let due = now.saturating_sub(self.heard_at) >= IDLE_PROBE;
        if due {
            self.tx.ask();
            self.heard_at = now;
        }
        due
    }

    /// Whether questions go unanswered and the whole path is silent: then another is worth a try.
    fn is_unanswered(&self, now: Duration) -> bool {
        let patience = REROUTE_AFTER * (1 << self.reroutes.min(4));
        let silent = self
            .path
            .as_ref()
            .is_some_and(|held| held.0.silent_for(now) >= REROUTE_AFTER);
        silent && self.tx.quiet_for(now) >= patience
    }
}
