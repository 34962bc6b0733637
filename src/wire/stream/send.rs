//! The sending end of a stream: what is kept until it is acknowledged, what goes next, and what to ask.

use std::{collections::VecDeque, ops::Range, time::Duration};

use bytes::{Bytes, BytesMut};

use super::{Ack, Chunk, MAX_WINDOW, StreamError};
use crate::wire::{
    frame::INITIAL_WINDOW,
    rope::{Cursor, Rope},
};

/// The first question after this long without an acknowledgement; each further one after twice as long.
pub const PROBE_AFTER: Duration = Duration::from_millis(400);
/// Questions are never further apart than this.
pub const PROBE_MAX: Duration = Duration::from_secs(2);
/// On a new path so much is sent before the receiver is heard, bytes, then twice as much each time: a path that breaks
/// again at once has then carried news, not only a window's worth of what is lost with it.
const FIRST_FLIGHT: u64 = 16 * 1024;
/// Gaps a sender remembers to fill at once; beyond it the neighbours are joined, and some bytes go twice.
const MAX_LOST: usize = 64;

/// The sending end.
#[derive(Debug)]
pub struct Sender {
    /// The bytes from `acked` to `written`.
    buffer: Rope,
    cursor: Cursor,
    acked: u64,
    pub(super) sent: u64,
    /// Bytes that went more than once.
    resent: u64,
    written: u64,
    finished: bool,
    max_data: u64,
    /// To be sent again: disjoint, ascending, all within `acked..sent`.
    lost: VecDeque<Range<u64>>,
    stopped: bool,
    /// On a path that has not proved itself yet: what may still be sent before the receiver is heard.
    flight: Option<Flight>,
    /// The largest flight: a path that must not be overrun always has one.
    most_flight: Option<u64>,
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
            resent: 0,
            written: 0,
            finished: false,
            max_data: INITIAL_WINDOW,
            lost: VecDeque::new(),
            stopped: false,
            flight: None,
            most_flight: None,
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

    /// Bytes that went more than once, counted each time but the first.
    pub fn resent(&self) -> u64 {
        self.resent
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
        let Some(flight) = self.flight else { return };
        let size = (flight.size * 2).min(self.most_flight.unwrap_or(u64::MAX));
        self.flight = (size <= MAX_WINDOW).then_some(Flight { size, left: size });
    }

    /// The path allows at most `most` bytes on their way without word from the receiver; `None`: as many as it granted.
    pub fn limit_flight(&mut self, most: Option<u64>) {
        self.most_flight = most;
        match (most, &mut self.flight) {
            (Some(most), Some(flight)) => flight.size = flight.size.min(most),
            (Some(most), None) => self.flight = Some(Flight { size: most, left: most }),
            (None, _) => {}
        }
    }

    /// Whether a question waits to be put into an [`Ack`].
    pub fn has_probe(&self) -> bool {
        self.probe.is_some_and(|probe| probe.mark.is_none())
    }

    fn chunk_of_lost(&mut self, range: Range<u64>, max: usize) -> Chunk<usize> {
        let upto = range.end.min(self.written).min(range.start + max as u64);
        let chunk = self.chunk(range.start, upto);
        self.resent += chunk.data as u64;
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
