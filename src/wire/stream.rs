//! A reliable, ordered byte stream over a path that loses, repeats, reorders and breaks. Pure: no I/O, no clock of its own.
//!
//! A stream runs one way: a [`Sender`] at one end, a [`Receiver`] at the other; an exchange has two of them. Bytes are
//! freed only by the receiver's cumulative acknowledgement, and sent only within the credit that it granted; both are
//! absolute, so that repeating one is harmless and losing one heals. The end of a stream is counted as one more byte
//! behind the last: an acknowledgement of `final size + 1` says that the end has arrived too.
//!
//! How loss is repaired: a receiver that sees a gap names it ([`Ack::missing_to`]). A sender that hears nothing asks
//! ([`Ack::probe`]); paths keep the order of what one sender hands them, so whatever was sent before the question and is
//! not in the answer is lost, and goes again. A path that broke is replaced ([`Sender::path_changed`]): all that is not
//! acknowledged goes again at once.
//!
//! Time is a [`Duration`] since an arbitrary start, the same for all calls on one value.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};

use super::{
    frame::INITIAL_WINDOW,
    rope::{Cursor, PACK_BELOW, Rope},
};

/// The first question after this long without an acknowledgement; each further one after twice as long.
pub const PROBE_AFTER: Duration = Duration::from_millis(400);
/// Questions are never further apart than this.
pub const PROBE_MAX: Duration = Duration::from_secs(2);
/// What has been received is acknowledged at the latest after this long, if nothing carried it earlier.
pub const ACK_DELAY: Duration = Duration::from_millis(100);
/// A window grows to this at most, bytes: 40 MiB/s over 50 ms of round trip, with the sender a quarter of a window
/// behind its grants.
pub const MAX_WINDOW: u64 = 4 * 1024 * 1024;
/// On a new path so much is sent before the receiver is heard, bytes, then twice as much each time: a path that breaks
/// again at once has then carried news, not only a window's worth of what is lost with it.
const FIRST_FLIGHT: u64 = 16 * 1024;
/// Pieces that wait behind a gap; what comes beyond them is dropped and asked for again.
const MAX_EARLY: usize = 256;
/// Gaps a sender remembers to fill at once; beyond it the neighbours are joined, and some bytes go twice.
const MAX_LOST: usize = 64;

/// A run of a stream's bytes, as a frame carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk<D> {
    /// The position of the first byte in the stream.
    pub offset: u64,
    /// The bytes, or their number.
    pub data: D,
    /// Whether the stream ends behind them.
    pub fin: bool,
}

/// What a receiver tells its sender, and the questions between them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ack {
    /// All before this position has arrived; final size + 1 when the end has too.
    pub upto: u64,
    /// The position up to which the sender may send.
    pub max_data: u64,
    /// When above `upto`: the bytes from `upto` to here are missing, others behind them have arrived.
    pub missing_to: u64,
    /// The end that says this has moved to the path that this comes on.
    pub moved: bool,
    /// Not 0: a question, to be answered with the same number. About the stream that runs in this frame's direction.
    pub probe: u8,
    /// Not 0: the answer to the question of that number.
    pub answer: u8,
}

/// A peer broke the rules of the stream. The exchange is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// More was sent than the credit allowed.
    #[error("the peer sent beyond the credit it was given")]
    FlowControl,
    /// The end moved, or bytes lie behind it.
    #[error("the peer changed the final size of a stream")]
    FinalSize,
    /// Something was acknowledged that was never sent.
    #[error("the peer acknowledged bytes that were never sent")]
    BadAck,
}

/// The sending end.
#[derive(Debug)]
pub struct Sender {
    /// The bytes from `acked` to `written`.
    buffer: Rope,
    cursor: Cursor,
    acked: u64,
    sent: u64,
    written: u64,
    finished: bool,
    max_data: u64,
    /// To be sent again: disjoint, ascending, all within `acked..sent`.
    lost: VecDeque<Range<u64>>,
    stopped: bool,
    /// On a path that has not proved itself yet: what may still be sent before the receiver is heard.
    flight: Option<Flight>,
    /// Since when news is awaited: something is on its way, or credit is wanted.
    waits_since: Option<Duration>,
    /// When to ask for it, and how long to wait after that.
    ask_at: Duration,
    pause: Duration,
    probe: Option<Probe>,
    last_probe: u8,
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    size: u64,
    left: u64,
}

/// A question that has no answer yet.
#[derive(Debug, Clone, Copy)]
struct Probe {
    number: u8,
    /// `sent` when it went out; `None` while it waits for a frame.
    mark: Option<u64>,
}

impl Default for Sender {
    fn default() -> Self {
        Self {
            buffer: Rope::default(),
            cursor: Cursor::default(),
            acked: 0,
            sent: 0,
            written: 0,
            finished: false,
            max_data: INITIAL_WINDOW,
            lost: VecDeque::new(),
            stopped: false,
            flight: None,
            waits_since: None,
            ask_at: Duration::ZERO,
            pause: PROBE_AFTER,
            probe: None,
            last_probe: 0,
        }
    }
}

impl Sender {
    /// Bytes that may be written now without exceeding the credit. A write may exceed it, by the rest of one piece.
    pub fn capacity(&self) -> u64 {
        if self.stopped {
            u64::MAX
        } else {
            self.max_data.saturating_sub(self.written)
        }
    }

    /// Puts bytes at the end of the stream. Bytes behind a [`finish`](Self::finish) or a stop go nowhere.
    pub fn write(&mut self, data: Bytes) {
        if self.finished || self.stopped {
            return;
        }
        self.written += data.len() as u64;
        self.buffer.push(data);
    }

    /// Ends the stream behind what was written.
    pub fn finish(&mut self) {
        self.finished = true;
    }

    /// The peer reads no more: what is left goes nowhere, and writes do nothing.
    pub fn stop(&mut self) {
        self.stopped = true;
        self.finished = true;
        self.buffer.clear();
        self.lost.clear();
        self.probe = None;
        self.waits_since = None;
    }

    /// Whether the peer has everything, the end included, or wants no more.
    pub fn is_done(&self) -> bool {
        self.stopped || (self.finished && self.acked == self.end())
    }

    /// Whether the peer asked for no more.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Whether [`finish`](Self::finish) was called.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Bytes held for sending or sending again.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// The position behind the last byte, or behind the end.
    fn end(&self) -> u64 {
        self.written + u64::from(self.finished)
    }

    /// Whether there is something that may be sent now.
    pub fn has_chunk(&self) -> bool {
        let may_fly = self.flight.is_none_or(|flight| flight.left > 0);
        !self.stopped && may_fly && (!self.lost.is_empty() || self.has_fresh())
    }

    fn has_fresh(&self) -> bool {
        self.sent < self.written.min(self.max_data) || (self.finished && self.sent == self.written)
    }

    /// The next run of bytes to send, at most `max` long, whose bytes [`copy`](Self::copy) then appends to a frame.
    pub fn next_chunk(&mut self, max: usize, now: Duration) -> Option<Chunk<usize>> {
        if !self.has_chunk() {
            return None;
        }
        let max = self.flight.map_or(max, |flight| max.min(flight.left as usize));
        let chunk = match self.lost.pop_front() {
            Some(range) => self.chunk_of_lost(range, max),
            None => {
                let upto = self.written.min(self.max_data).min(self.sent + max as u64);
                let chunk = self.chunk(self.sent, upto.max(self.sent));
                self.sent = chunk.offset + chunk.data as u64 + u64::from(chunk.fin);
                chunk
            }
        };
        self.await_news(now);
        self.fly(chunk.data as u64);
        Some(chunk)
    }

    /// At the end of a flight the receiver is asked where it is.
    fn fly(&mut self, length: u64) {
        if let Some(flight) = &mut self.flight {
            flight.left = flight.left.saturating_sub(length);
            if flight.left == 0 {
                self.ask();
            }
        }
    }

    /// The receiver was heard on this path: more may be sent before it is heard again.
    fn land(&mut self) {
        let size = self.flight.map_or(u64::MAX, |flight| flight.size * 2);
        self.flight = (size <= MAX_WINDOW).then_some(Flight { size, left: size });
    }

    /// Whether a question waits to be put into an [`Ack`].
    pub fn has_probe(&self) -> bool {
        self.probe.is_some_and(|probe| probe.mark.is_none())
    }

    fn chunk_of_lost(&mut self, range: Range<u64>, max: usize) -> Chunk<usize> {
        let upto = range.end.min(self.written).min(range.start + max as u64);
        let chunk = self.chunk(range.start, upto);
        let next = upto + u64::from(chunk.fin);
        self.sent = self.sent.max(next);
        if next < range.end {
            self.lost.push_front(next..range.end);
        }
        chunk
    }

    fn chunk(&self, from: u64, upto: u64) -> Chunk<usize> {
        Chunk {
            offset: from,
            data: (upto - from) as usize,
            fin: self.finished && upto == self.written,
        }
    }

    /// Appends the bytes of a chunk that [`next_chunk`](Self::next_chunk) just returned.
    pub fn copy(&mut self, chunk: &Chunk<usize>, out: &mut BytesMut) {
        let from = chunk.offset.saturating_sub(self.acked) as usize;
        self.buffer.copy(from, chunk.data, &mut self.cursor, out);
    }

    /// Takes in what the receiver says.
    pub fn on_ack(&mut self, ack: &Ack, now: Duration) -> Result<(), StreamError> {
        if self.stopped {
            return Ok(());
        }
        if ack.upto > self.sent || ack.missing_to > self.sent {
            return Err(StreamError::BadAck);
        }
        let moves = ack.upto > self.acked || ack.max_data > self.max_data;
        self.max_data = self.max_data.max(ack.max_data);
        if ack.upto > self.acked {
            self.free(ack.upto);
        }
        if moves {
            self.pause = PROBE_AFTER;
        }
        self.waits_since = None;
        if self.awaits_news() {
            self.await_news(now);
        }
        self.find_lost(ack);
        Ok(())
    }

    fn find_lost(&mut self, ack: &Ack) {
        let from = self.acked.max(ack.upto);
        match self.probe {
            Some(Probe {
                number,
                mark: Some(mark),
            }) if number == ack.answer => {
                self.probe = None;
                self.land();
                self.mark_lost(from..mark);
            }
            _ => self.mark_lost(from..ack.missing_to),
        }
    }

    fn free(&mut self, upto: u64) {
        let bytes = upto.min(self.written) - self.acked.min(self.written);
        self.buffer.advance(bytes as usize);
        self.cursor = Cursor::default();
        self.acked = upto;
        while let Some(first) = self.lost.front_mut() {
            if first.end <= upto {
                self.lost.pop_front();
            } else {
                first.start = first.start.max(upto);
                break;
            }
        }
    }

    fn mark_lost(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut joined = range;
        self.lost.retain(|old| {
            let apart = old.end < joined.start || joined.end < old.start;
            if !apart {
                joined = old.start.min(joined.start)..old.end.max(joined.end);
            }
            apart
        });
        let at = self.lost.partition_point(|old| old.start < joined.start);
        self.lost.insert(at, joined);
        while self.lost.len() > MAX_LOST {
            let last = self.lost.pop_back().map_or(self.sent, |last| last.end);
            if let Some(before) = self.lost.back_mut() {
                before.end = last;
            }
        }
    }

    /// The path was replaced: what is not acknowledged may be lost, and goes again.
    pub fn path_changed(&mut self, now: Duration) {
        if self.stopped {
            return;
        }
        self.lost.clear();
        self.mark_lost(self.acked..self.sent);
        self.flight = Some(Flight {
            size: FIRST_FLIGHT,
            left: FIRST_FLIGHT,
        });
        self.probe = None;
        self.pause = PROBE_AFTER;
        self.waits_since = None;
        if self.awaits_news() {
            self.await_news(now);
        }
    }

    /// Whether the receiver has to say something before this end can go on.
    fn awaits_news(&self) -> bool {
        !self.stopped
            && (self.acked < self.sent || self.sent < self.written || (!self.finished && self.capacity() == 0))
    }

    fn await_news(&mut self, now: Duration) {
        if self.waits_since.is_none() {
            self.waits_since = Some(now);
            self.ask_at = now + self.pause;
        }
    }

    /// For how long news has been awaited without a word from the receiver.
    pub fn quiet_for(&self, now: Duration) -> Duration {
        self.waits_since
            .map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// Time passed. True when a question is due: [`take_probe`](Self::take_probe) then has its number.
    pub fn on_tick(&mut self, now: Duration) -> bool {
        if !self.awaits_news() {
            self.waits_since = None;
            return false;
        }
        self.await_news(now);
        if now < self.ask_at || (!self.lost.is_empty() && self.has_chunk()) {
            return false;
        }
        self.pause = (self.pause * 2).min(PROBE_MAX);
        self.ask_at = now + self.pause;
        self.ask();
        true
    }

    /// Asks the receiver where it is, whatever the time.
    pub fn ask(&mut self) {
        self.last_probe = self.last_probe.checked_add(1).unwrap_or(1);
        self.probe = Some(Probe {
            number: self.last_probe,
            mark: None,
        });
    }

    /// The number of the question to put into the next [`Ack`] that goes the same way, once; else 0.
    pub fn take_probe(&mut self) -> u8 {
        match &mut self.probe {
            Some(probe) if probe.mark.is_none() => {
                probe.mark = Some(self.sent);
                probe.number
            }
            _ => 0,
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver {
    /// In order, not yet read: `read..next`.
    ready: Rope,
    /// Behind a gap, by position, all above `next`; they may overlap.
    early: BTreeMap<u64, Bytes>,
    early_bytes: u64,
    next: u64,
    /// The end of what was seen, gaps included.
    highest: u64,
    read: u64,
    final_size: Option<u64>,
    max_data: u64,
    window: u64,
    stopped: bool,
    granted_at: Duration,
    /// Since when something waits to be acknowledged.
    waits_since: Option<Duration>,
    /// The gap that was last reported.
    reported: u64,
    due: bool,
    answer: u8,
}

impl Default for Receiver {
    fn default() -> Self {
        Self {
            ready: Rope::default(),
            early: BTreeMap::new(),
            early_bytes: 0,
            next: 0,
            highest: 0,
            read: 0,
            final_size: None,
            max_data: INITIAL_WINDOW,
            window: INITIAL_WINDOW,
            stopped: false,
            granted_at: Duration::ZERO,
            waits_since: None,
            reported: u64::MAX,
            due: false,
            answer: 0,
        }
    }
}

impl Receiver {
    /// Takes in a run of bytes, wherever it lies. True when there is more to read than before, or the end came.
    pub fn on_chunk(&mut self, chunk: Chunk<Bytes>, now: Duration) -> Result<bool, StreamError> {
        let end = chunk
            .offset
            .checked_add(chunk.data.len() as u64)
            .ok_or(StreamError::FlowControl)?;
        self.check(&chunk, end)?;
        if self.stopped {
            self.due = true;
            return Ok(false);
        }
        self.highest = self.highest.max(end);
        let before = self.upto();
        if chunk.fin {
            self.final_size = Some(end);
        }
        if chunk.offset > self.next {
            self.keep_early(chunk.offset, chunk.data);
            return Ok(false);
        }
        if end > self.next {
            self.append(chunk.offset, chunk.data);
            self.join_early();
        }
        let moved = self.upto() > before;
        if moved {
            self.waits_since.get_or_insert(now);
        } else {
            self.due = true; // a repeat: the peer does not know that it is here
        }
        Ok(moved)
    }

    fn check(&self, chunk: &Chunk<Bytes>, end: u64) -> Result<(), StreamError> {
        if end > self.max_data {
            return Err(StreamError::FlowControl);
        }
        match self.final_size {
            Some(size) if end > size || (chunk.fin && end != size) => Err(StreamError::FinalSize),
            None if chunk.fin && end < self.highest => Err(StreamError::FinalSize),
            _ => Ok(()),
        }
    }

    fn append(&mut self, offset: u64, mut data: Bytes) {
        data.advance((self.next - offset) as usize);
        self.next += data.len() as u64;
        self.ready.push(data);
    }

    fn keep_early(&mut self, offset: u64, data: Bytes) {
        if self.reported != self.next {
            self.reported = self.next;
            self.due = true;
        }
        let full = self.early.len() >= MAX_EARLY || self.early_bytes + data.len() as u64 > self.window;
        if data.is_empty() || full || self.early.contains_key(&offset) {
            return;
        }
        self.early_bytes += data.len() as u64;
        // Copied when small, so as not to pin the message that it came in.
        let data = if data.len() < PACK_BELOW {
            Bytes::copy_from_slice(&data)
        } else {
            data
        };
        self.early.insert(offset, data);
    }

    fn join_early(&mut self) {
        while let Some(first) = self.early.first_entry() {
            if *first.key() > self.next {
                return;
            }
            let (offset, data) = first.remove_entry();
            self.early_bytes -= data.len() as u64;
            if offset + data.len() as u64 > self.next {
                self.append(offset, data);
            }
        }
    }

    /// All before this has arrived, the end counted as one byte.
    fn upto(&self) -> u64 {
        self.next + u64::from(self.final_size == Some(self.next))
    }

    /// The next bytes in order.
    pub fn read(&mut self) -> Option<Bytes> {
        let piece = self.ready.pop()?;
        self.read += piece.len() as u64;
        Some(piece)
    }

    /// Whether all bytes have been read and none will come.
    pub fn is_at_end(&self) -> bool {
        self.stopped || self.final_size == Some(self.read)
    }

    /// Whether all bytes have arrived, the end included, read or not.
    pub fn is_complete(&self) -> bool {
        self.stopped || self.final_size == Some(self.next)
    }

    /// Reads no more: what is held is dropped, what comes is ignored, and the peer is told so.
    pub fn stop(&mut self) {
        self.stopped = true;
        self.ready.clear();
        self.early.clear();
        self.early_bytes = 0;
        self.due = true;
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Bytes that have arrived and are not read yet.
    pub fn buffered(&self) -> usize {
        self.ready.len()
    }

    /// The peer asked where we are.
    pub fn on_probe(&mut self, number: u8) {
        if number != 0 {
            self.answer = number;
            self.due = true;
        }
    }

    /// The path was replaced: the peer is to be told where we are.
    pub fn path_changed(&mut self) {
        self.due = true;
        self.reported = u64::MAX;
    }

    /// Time passed. True when an acknowledgement is due.
    pub fn on_tick(&mut self, now: Duration) -> bool {
        if self
            .waits_since
            .is_some_and(|since| now.saturating_sub(since) >= ACK_DELAY)
        {
            self.due = true;
        }
        self.due
    }

    /// Whether an acknowledgement should go now: an answer, a gap, a repeat, or a quarter of the window to grant.
    pub fn ack_due(&self) -> bool {
        self.due || (self.final_size.is_none() && !self.stopped && self.grantable() >= self.window / 4)
    }

    fn grantable(&self) -> u64 {
        (self.read + self.window).saturating_sub(self.max_data)
    }

    /// The acknowledgement to send. `rtt` is the path's round trip: a window of which a quarter is read within two of
    /// them is what holds the sender back, and doubles.
    pub fn take_ack(&mut self, rtt: Duration, now: Duration) -> Ack {
        let grant = self.grantable();
        if grant > 0 && self.final_size.is_none() {
            if grant >= self.window / 4 && now.saturating_sub(self.granted_at) < rtt * 2 {
                self.window = (self.window * 2).min(MAX_WINDOW);
            }
            self.max_data = self.max_data.max(self.read + self.window);
            self.granted_at = now;
        }
        self.due = false;
        self.waits_since = None;
        let missing_to = self.early.first_key_value().map_or(0, |(at, _)| *at);
        Ack {
            upto: self.upto(),
            max_data: self.max_data,
            missing_to,
            answer: std::mem::take(&mut self.answer),
            ..Ack::default()
        }
    }
}

#[cfg(test)]
mod tests;
