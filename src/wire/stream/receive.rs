//! The receiving end of a stream: what has come, in order or not, and what the sender is told of it.

use std::{collections::BTreeMap, time::Duration};

use bytes::{Buf, Bytes};

use super::{Ack, Chunk, MAX_WINDOW, StreamError};
use crate::{
    planted::Bug,
    wire::{
        frame::INITIAL_WINDOW,
        rope::{PACK_BELOW, Rope},
    },
};

/// What has been received is acknowledged at the latest after this long, if nothing carried it earlier.
pub const ACK_DELAY: Duration = Duration::from_millis(100);
/// Pieces that wait behind a gap; what comes beyond them is dropped and asked for again.
const MAX_EARLY: usize = 256;

/// The receiving end.
#[derive(Debug)]
pub struct Receiver {
    /// In order, not yet read: `read..next`.
    ready: Rope,
    /// Behind a gap, by position, all above `next`; they may overlap.
    early: BTreeMap<u64, Bytes>,
    pub(super) early_bytes: u64,
    next: u64,
    /// The end of what was seen, gaps included.
    highest: u64,
    read: u64,
    final_size: Option<u64>,
    max_data: u64,
    pub(super) window: u64,
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
        self.stopped || self.final_size == Some(self.read) || (Bug::FinalSize.is_planted() && self.final_size.is_some())
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
    /// them is what holds the sender back, and doubles, up to `most` (at least [`INITIAL_WINDOW`]). A larger one shrinks
    /// to it as it is read; credit that was granted is never taken back.
    pub fn take_ack(&mut self, rtt: Duration, most: u64, now: Duration) -> Ack {
        self.window = self.window.min(most);
        let grant = self.grantable();
        if grant > 0 && self.final_size.is_none() {
            if grant >= self.window / 4 && now.saturating_sub(self.granted_at) < rtt * 2 {
                self.window = (self.window * 2).min(most.min(MAX_WINDOW));
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
