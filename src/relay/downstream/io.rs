//! The byte stream under hyper, with what hyper lacks: deadlines on reads between requests and on writes, a lingering
//! close, a close by reset, interim responses, and problem+json in place of hyper's bare errors.
//!
//! Deadlines on a request's body and on its answer are the exchange's.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

use super::{caps::Slot, deadline::Deadline, handle::Shared, own_words};

/// After an early answer: how much of the request is read and thrown away before the socket is left alone.
const LINGER_BYTES: usize = 1024 * 1024;
/// What one read throws away at most.
const DISCARD: usize = 8 * 1024;

/// A transport whose close can be made a reset.
pub trait Reset {
    /// The next close sends RST, not FIN, and drops what is unsent.
    fn reset_on_close(&self);
}

impl Reset for TcpStream {
    fn reset_on_close(&self) {
        // It fails only on a socket that is gone already.
        let _ = self.set_zero_linger();
    }
}

/// How long a downstream may take.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// From the first byte of a request's head to its last; for the first request, from the accept.
    pub header: Duration,
    /// Between requests on a kept-alive connection.
    pub idle: Duration,
    /// A write that makes no progress.
    pub write_idle: Duration,
    /// The lingering close: how long the socket stays for the client to read the answer.
    pub linger: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            header: Duration::from_secs(10),
            // Above the 60 s for which the usual load balancers keep theirs, so that they close first.
            idle: Duration::from_secs(75),
            write_idle: Duration::from_secs(60),
            linger: Duration::from_secs(2),
        }
    }
}

/// One downstream's socket (or TLS stream) as hyper sees it.
pub struct DownstreamIo<T: Reset> {
    io: T,
    /// What was read to tell the protocol, not yet given to hyper.
    kept: Bytes,
    /// Bytes of our own that go before hyper's next ones.
    ours: Bytes,
    shared: Arc<Shared>,
    timeouts: Arc<Timeouts>,
    /// HTTP/1: heads are timed and bare errors replaced. HTTP/2 multiplexes, so only its idle time counts.
    http1: bool,
    waiting: Waiting,
    write_deadline: Deadline,
    closing: Closing,
    _slot: Option<Slot>,
}

/// What is waited for while no call is in flight.
struct Waiting {
    /// The number of calls when this wait began: another number is another wait.
    since_call: u64,
    in_head: bool,
    deadline: Deadline,
}

enum Closing {
    Not,
    Lingering { left: usize, until: Deadline },
}

impl<T: Reset> DownstreamIo<T> {
    /// `head_due`: when the first request's head must be complete, in HTTP/1. The slot is given back with the socket,
    /// which an upgrade carries past the end of its connection's task.
    pub(super) fn new(
        io: T,
        kept: Bytes,
        shared: Arc<Shared>,
        timeouts: Arc<Timeouts>,
        head_due: Option<Instant>,
        slot: Option<Slot>,
    ) -> Self {
        Self {
            io,
            kept,
            ours: Bytes::new(),
            waiting: Waiting {
                since_call: shared.calls(),
                in_head: head_due.is_some(),
                deadline: head_due.map(Deadline::at).unwrap_or_default(),
            },
            shared,
            timeouts,
            http1: head_due.is_some(),
            write_deadline: Deadline::default(),
            closing: Closing::Not,
            _slot: slot,
        }
    }

    /// Bytes came while no call was in flight: in HTTP/1 they begin a head, or go on with it.
    fn note_read(&mut self) {
        if !self.http1 || self.shared.is_busy() {
            return;
        }
        self.waiting.begin_if_new(self.shared.calls());
        if !self.waiting.in_head {
            self.waiting.in_head = true;
            self.waiting.deadline.set(Instant::now() + self.timeouts.header);
        }
    }

    /// Nothing to read: an error once it has taken too long.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shared.is_busy() {
            return Poll::Pending;
        }
        self.waiting.begin_if_new(self.shared.calls());
        ready!(self.waiting.deadline.poll_passed(cx, self.timeouts.idle));
        Poll::Ready(Err(timed_out("the downstream sent no request in time")))
    }
}

impl Waiting {
    fn begin_if_new(&mut self, calls: u64) {
        if self.since_call != calls {
            self.since_call = calls;
            self.in_head = false;
            self.deadline.clear();
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin + Reset> DownstreamIo<T> {
    /// Writes what goes before hyper's next bytes.
    fn poll_ours(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while !self.ours.is_empty() {
                let written = Pin::new(&mut self.io).poll_write(cx, &self.ours);
                let n = ready!(self.watch_write(cx, written))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.ours.advance(n);
            }
            match self.shared.take_interim() {
                Some(interim) => self.ours = interim,
                None => return Poll::Ready(Ok(())),
            }
        }
    }

    /// A pending write is an error once it has been pending for too long.
    fn watch_write(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.write_deadline.clear();
            return written;
        }
        ready!(self.write_deadline.poll_passed(cx, self.timeouts.write_idle));
        Poll::Ready(Err(timed_out(
            "the downstream took nothing of its response for too long",
        )))
    }

    fn poll_write_through(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        ready!(self.poll_ours(cx))?;
        if self.shared.hypers_own_write()
            && self.http1
            && let Some(cause) = own_words::in_place_of(bufs)
        {
            self.ours = own_words::whole(&cause);
            return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
        }
        let written = match bufs {
            [buf] => Pin::new(&mut self.io).poll_write(cx, buf),
            bufs => Pin::new(&mut self.io).poll_write_vectored(cx, bufs),
        };
        self.watch_write(cx, written)
    }

    /// Half-closes, then reads and discards until the client has closed too, so that the kernel does not answer its
    /// upload with a reset that destroys our answer on the way (RFC 9112 §9.6).
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Closing::Not = self.closing {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            self.closing = Closing::Lingering {
                left: LINGER_BYTES,
                until: Deadline::default(),
            };
        }
        let Closing::Lingering { left, until } = &mut self.closing else {
            return Poll::Ready(Ok(()));
        };
        match poll_discard(&mut self.io, cx, left) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => until.poll_passed(cx, self.timeouts.linger).map(Ok),
        }
    }
}

/// Ready at the peer's end or an error. Past `left` bytes it reads no more: the peer's own window stops it.
fn poll_discard<T: AsyncRead + Unpin>(io: &mut T, cx: &mut Context<'_>, left: &mut usize) -> Poll<()> {
    let mut scratch = [0; DISCARD];
    while *left > 0 {
        let mut buf = ReadBuf::new(&mut scratch);
        match ready!(Pin::new(&mut *io).poll_read(cx, &mut buf)) {
            Ok(()) if !buf.filled().is_empty() => *left = left.saturating_sub(buf.filled().len()),
            _ => return Poll::Ready(()),
        }
    }
    Poll::Pending
}

fn timed_out(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

impl<T: AsyncRead + AsyncWrite + Unpin + Reset> AsyncRead for DownstreamIo<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.kept.is_empty() {
            let n = this.kept.len().min(buf.remaining());
            buf.put_slice(&this.kept.split_to(n));
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        match Pin::new(&mut this.io).poll_read(cx, buf) {
            Poll::Pending => this.poll_silence(cx),
            ready => {
                if buf.filled().len() > before {
                    this.note_read();
                }
                ready
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin + Reset> AsyncWrite for DownstreamIo<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_through(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_through(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.shared.all_handed_down();
        ready!(this.poll_ours(cx))?;
        // hyper may not read again after a response, trusting in the read that was pending while the service worked,
        // when silence was not timed.
        if let Poll::Ready(Err(timed_out)) = this.poll_silence(cx) {
            return Poll::Ready(Err(timed_out));
        }
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.shared.is_aborted() {
            return Poll::Ready(Ok(()));
        }
        ready!(this.poll_ours(cx))?;
        if this.shared.is_upgraded() {
            // One direction of a tunnel has ended; what the client still sends is for its other end.
            return Pin::new(&mut this.io).poll_shutdown(cx);
        }
        this.poll_linger(cx)
    }
}

impl<T: Reset> Drop for DownstreamIo<T> {
    fn drop(&mut self) {
        if self.shared.is_aborted() {
            self.io.reset_on_close();
        }
    }
}

#[cfg(test)]
#[path = "io_tests.rs"]
mod tests;
