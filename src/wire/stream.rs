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
//! acknowledged goes again, little at first, more each time that the receiver is heard.
//!
//! Time is a [`Duration`](std::time::Duration) since an arbitrary start, the same for all calls on one value.

mod receive;
mod send;

pub use receive::{ACK_DELAY, Receiver};
pub use send::{PROBE_AFTER, PROBE_MAX, Sender};

/// A window grows to this at most, bytes: 40 MiB/s over 50 ms of round trip, with the sender a quarter of a window
/// behind its grants.
pub const MAX_WINDOW: u64 = 4 * 1024 * 1024;

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

#[cfg(test)]
mod tests;
