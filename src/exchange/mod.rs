//! One request and its response, in flight between two ends: the *ingress*, which holds the downstream, and the *host*,
//! which calls the upstream. Both are the same thing here: a stream out, a stream in, and the path that carries their
//! frames, which may be cut and replaced while the exchange lives.
//!
//! - [`ingress`] and [`host`]: what each end does with the streams
//! - [`body`]: an HTTP body read from a stream, and one written to it
//! - [`table`]: all exchanges of a process; time, cut paths and resumption · [`hosting`]: those it is the host of, and its
//!   tunnels
//! - [`path`]: where frames go, in turns; [`link`]: the WebSocket that carries them. A path over the bus to another node
//!   is the same to an exchange
//!
//! An exchange does no I/O. Frames and time are put in ([`Exchange::on_frame`], [`Exchange::on_tick`]); frames are taken
//! out by the path's carrier; readers and writers are woken.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

pub mod body;
pub mod host;
pub mod hosting;
pub mod ingress;
pub mod link;
pub mod path;
pub mod table;

use self::path::{Held, Owner, Path};
use crate::{
    ids::{RequestId, TunnelId},
    planted::Bug,
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
    role: Role,
    clock: Clock,
    /// Body bytes written to the outgoing stream.
    body_sent: AtomicU64,
    /// At the ingress: its way back over the bus is open.
    listens: AtomicBool,
    /// Guards the streams; held while a frame is taken in or written out, never across an await.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Whose it is; frames of anyone else are not its frames.
    owner: Owner,
    tx: Sender,
    rx: Receiver,
    path: Option<Held>,
    /// How often the writer waited for credit.
    stalls: u64,
    /// Since when there is no path.
    cut_at: Option<Duration>,
    /// Whether the path's queues hold it.
    in_urgent: bool,
    in_turns: bool,
    /// To be told to the peer: that this end moved to a new path.
    moved: bool,
    /// The peer has been heard, so it knows the exchange.
    confirmed: bool,
    /// By which tunnels OPENs went, and how many, that have not come back undelivered: while there is one, the host may
    /// have it.
    opens: Vec<(Option<TunnelId>, u32)>,
    /// Every OPEN came back: nothing of the request has reached anybody.
    unreached: bool,
    /// The last time that bytes moved.
    active_at: Duration,
    /// The last time that the peer was heard, or asked whether it is there.
    heard_at: Duration,
    /// Since when it has been asked and has not been heard.
    asked_since: Option<Duration>,
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

/// A peer spoke in an exchange that is not its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame for somebody else's exchange")]
pub struct NotYours;

/// What the table has to do for an exchange after a tick.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wants {
    Nothing,
    /// Its path says nothing: what comes another way must be heard.
    Ear,
    /// Another path, if there is one.
    Path,
}

impl Exchange {
    fn new(id: RequestId, owner: Owner, role: Role, clock: Clock) -> Self {
        let now = clock.now();
        Self {
            id,
            role,
            clock,
            body_sent: AtomicU64::new(0),
            listens: AtomicBool::new(false),
            state: Mutex::new(State::new(owner, now)),
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
        state.stalls += u64::from(state.writer.is_none());
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

    /// Bytes of the outgoing stream that went again, and how often its writer waited for credit.
    pub fn troubles(&self) -> (u64, u64) {
        let state = self.state();
        (state.tx.resent(), state.stalls)
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

    /// Waits until it is sure that nothing of it reached a host: it may be sent to any other, by [`Self::rehome`].
    pub async fn unreached(&self) {
        std::future::poll_fn(|cx| {
            let mut state = self.state();
            // One that has ended goes nowhere any more.
            if state.unreached && state.ended.is_none() {
                return Poll::Ready(());
            }
            state.watcher = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Whether it is an exchange of this owner.
    pub fn is_of(&self, owner: &Owner) -> bool {
        self.state().owner == *owner
    }

    /// Whose it is.
    pub fn owner(&self) -> Owner {
        self.state().owner.clone()
    }

    /// The path that it uses now.
    pub fn path(&self) -> Option<Arc<Path>> {
        self.state().path.as_ref().map(|held| held.0.clone())
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

    /// Takes in a frame of this exchange that came on `path`. True when the exchange followed its peer to that path. An
    /// error when the path is not of the exchange's owner.
    pub fn on_frame(self: &Arc<Self>, frame: Frame, path: &Arc<Path>) -> Result<bool, NotYours> {
        let now = self.clock.now();
        let mut wakes = Wakes::default();
        let mut state = self.state();
        if state.owner != path.owner && !Bug::Unstamped.is_planted() {
            return Err(NotYours);
        }
        if state.ended.is_some() {
            return Ok(false);
        }
        let moved = matches!(&frame, Frame::Ack(_, ack) if ack.moved);
        let follows = (state.path.is_none() || (moved && !state.is_on(path))) && !path.is_closed();
        if follows {
            self.move_to(&mut state, path, now);
        } else if moved {
            state.tx.path_changed(now); // the same path, and the peer may have missed something
        }
        (state.heard_at, state.asked_since) = (now, None);
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
        if state.tx.has_chunk() {
            self.queue_turn(&mut state);
        }
        Ok(follows)
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
        }
    }

    fn broken(&self, state: &mut State, error: StreamError, wakes: &mut Wakes) {
        tracing::warn!(request.id = %self.id, client.id = %state.owner.client_id, %error, "the peer broke the protocol of a stream");
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
        let ack = state.rx.take_ack(path.rtt(), path.most_window(), self.clock.now());
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
        state.tx.limit_flight(path.most_flight());
        if let Some(chunk) = state.tx.next_chunk(room.min(MAX_PAYLOAD), self.clock.now()) {
            match chunk.offset {
                0 if self.role == Role::Ingress => {
                    state.count_open(path.tunnel_ws_id());
                    frame::open_header(message, self.id, chunk.data, chunk.fin);
                }
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
        // Who leaves a path for another because nobody answers has not been answered yet.
        let asked_since = state.asked_since.filter(|_| state.path.is_some());
        state.reroutes += u32::from(state.path.is_some());
        self.move_to(&mut state, path, self.clock.now());
        state.asked_since = asked_since;
        true
    }

    /// Goes to another owner over `path`, if nothing of it has reached one. False when something has, or it is over.
    pub(crate) fn rehome(self: &Arc<Self>, path: &Arc<Path>) -> bool {
        let mut state = self.state();
        if state.ended.is_some() || !state.unreached {
            return false;
        }
        state.owner = path.owner.clone();
        self.move_to(&mut state, path, self.clock.now());
        true
    }

    /// An OPEN that went to this tunnel came back: it was not delivered, nor was what went with it. Where several went,
    /// nobody knows which of them it was; and the word of it may come twice.
    pub(crate) fn open_returned(&self, tunnel_ws_id: TunnelId) {
        let mut wakes = Wakes::default();
        let mut state = self.state();
        let before = state.opens.len();
        state.opens.retain(|open| *open != (Some(tunnel_ws_id), 1));
        let last = before > 0 && state.opens.is_empty() || Bug::RetryAfterWrite.is_planted();
        // It may have gone on over another path meanwhile, which is about to take the OPEN.
        let elsewhere = |held: &Held| held.0.tunnel_ws_id() != Some(tunnel_ws_id) && !held.0.is_closed();
        let waits = !state.path.as_ref().is_some_and(elsewhere);
        if last && waits && !state.confirmed && state.ended.is_none() {
            state.unreached = true;
            state.path = None; // nothing more goes out before it has another
            state.cut_at.get_or_insert(self.clock.now());
            wakes.add(&mut state.watcher);
        }
    }

    /// Frames of this exchange may have been missed: the peer is told where it stands, and asked.
    pub(crate) fn missed(self: &Arc<Self>) {
        let mut state = self.state();
        if state.ended.is_none() && state.path.is_some() {
            state.moved = true;
            state.tx.ask();
            self.queue_urgent(&mut state);
        }
    }

    fn move_to(self: &Arc<Self>, state: &mut State, path: &Arc<Path>, now: Duration) {
        state.path = Some(path.hold());
        (state.in_urgent, state.in_turns) = (false, false);
        (state.cut_at, state.asked_since) = (None, None);
        state.unreached = false;
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
        if asks {
            state.asked_since.get_or_insert(now);
        }
        if state.rx.on_tick(now) | asks {
            self.queue_urgent(&mut state);
        }
        if asks && !state.confirmed && self.role == Role::Ingress {
            // The question itself would only be answered "gone": repeat the OPEN, which is safe.
            state.tx.path_changed(now);
            self.queue_turn(&mut state);
        }
        match state.is_silent(now) {
            true if state.is_unanswered(now) => Wants::Path,
            true => Wants::Ear,
            false => Wants::Nothing,
        }
    }
}

impl State {
    fn new(owner: Owner, now: Duration) -> Self {
        Self {
            owner,
            tx: Sender::default(),
            rx: Receiver::default(),
            path: None,
            stalls: 0,
            cut_at: None,
            in_urgent: false,
            in_turns: false,
            moved: false,
            confirmed: false,
            opens: Vec::new(),
            unreached: false,
            active_at: now,
            heard_at: now,
            asked_since: None,
            gone_since: None,
            reroutes: 0,
            answer_within: None,
            ended: None,
            reader: None,
            writer: None,
            watcher: None,
        }
    }

    fn count_open(&mut self, tunnel_ws_id: Option<TunnelId>) {
        match self.opens.iter_mut().find(|(tunnel, _)| *tunnel == tunnel_ws_id) {
            Some((_, times)) => *times += 1,
            None => self.opens.push((tunnel_ws_id, 1)),
        }
    }

    fn is_on(&self, path: &Arc<Path>) -> bool {
        self.path.as_ref().is_some_and(|held| Arc::ptr_eq(&held.0, path))
    }

    fn overdue(&self, now: Duration, resume_timeout: Duration) -> Option<Code> {
        let too_long = |since: Option<Duration>| since.is_some_and(|at| now.saturating_sub(at) >= resume_timeout);
        if too_long(self.cut_at) || (too_long(self.asked_since) && !resume_timeout.is_zero()) {
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

    /// Whether nothing has come on its path for a while.
    fn is_silent(&self, now: Duration) -> bool {
        let silent = |held: &Held| held.0.silent_for(now) >= REROUTE_AFTER;
        self.path.as_ref().is_some_and(silent)
    }

    /// Whether questions go unanswered: on a silent path, another is then worth a try.
    fn is_unanswered(&self, now: Duration) -> bool {
        self.tx.quiet_for(now) >= REROUTE_AFTER * (1 << self.reroutes.min(4))
    }
}
