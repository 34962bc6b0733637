//! A link: one WebSocket driven by one task. Messages in, to whoever takes their frames; messages out, filled from the
//! path in turns; pings. Reading never waits for writing, so two ends that both write cannot block each other.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Sleep,
};

use super::path::Path;
use crate::wire::{
    frame::{Frame, FrameError, MAX_MESSAGE},
    socket::{FrameSocket, SocketError},
};

/// Messages read before it is somebody else's turn on this thread.
const READS_A_TURN: usize = 32;

/// When a silent link counts as dead.
#[derive(Debug, Clone, Copy)]
pub struct KeepAlive {
    /// A ping after this long.
    pub interval: Duration,
    /// Nothing at all from the peer for this long after a ping was due: dead.
    pub timeout: Duration,
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkEnd {
    /// The peer closed it.
    #[error("the peer closed the connection")]
    PeerClosed,
    /// This end closed it, by [`Path::close`].
    #[error("this end closed it")]
    Closed,
    /// Nothing was heard for too long.
    #[error("the peer has been silent for too long")]
    Silent,
    /// The socket broke.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A message was not made of frames.
    #[error("a message cannot be read: {0}")]
    Frame(#[from] FrameError),
    /// It spoke in an exchange that is not its own.
    #[error("it spoke in somebody else's exchange")]
    Foreign,
    /// The taker of frames refused to go on; the text says why.
    #[error("{0}")]
    Violation(&'static str),
}

/// Takes the frames of a link that concern exchanges or the connection; pings never reach it.
pub trait Taker {
    /// Takes one frame; an error ends the link.
    fn on_frame(&self, frame: Frame, path: &Arc<Path>) -> Result<(), LinkEnd>;

    /// The message is through: what was gathered of it may go on.
    fn on_message_end(&self, _path: &Arc<Path>) {}
}

/// Drives a link until it ends. Owns the socket.
pub async fn drive<S, T>(socket: FrameSocket<S>, path: Arc<Path>, taker: &T, keep_alive: KeepAlive) -> LinkEnd
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: Taker + ?Sized,
{
    let mut timer = pin!(tokio::time::sleep(keep_alive.interval));
    let mut link = Link {
        socket,
        path,
        taker,
        keep_alive,
        closing: false,
        unflushed: false,
    };
    link.ping();
    std::future::poll_fn(|cx| link.poll(cx, timer.as_mut())).await
}

/// Carries frames between two paths of one process until either is closed: for a tunnel whose host is the relay itself.
/// What comes out of `near` goes to the far end's taker, and the other way round.
pub async fn join<N: Taker, F: Taker>(near: (&Arc<Path>, &N), far: (&Arc<Path>, &F)) -> LinkEnd {
    std::future::poll_fn(|cx| {
        near.0.register(cx.waker());
        far.0.register(cx.waker());
        for _ in 0..READS_A_TURN {
            match (carry(near.0, far.0, far.1), carry(far.0, near.0, near.1)) {
                (Err(end), _) | (_, Err(end)) => return Poll::Ready(end),
                (Ok(false), Ok(false)) if near.0.is_closed() || far.0.is_closed() => {
                    return Poll::Ready(LinkEnd::Closed);
                }
                (Ok(false), Ok(false)) => return Poll::Pending,
                _ => {}
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// One message from one path to whoever takes it at the other end; false when there is none.
fn carry<T: Taker>(from: &Arc<Path>, to: &Arc<Path>, taker: &T) -> Result<bool, LinkEnd> {
    let mut message = BytesMut::new();
    from.fill(&mut message);
    if message.is_empty() {
        return Ok(false);
    }
    take_message(message.freeze(), to, taker)?;
    Ok(true)
}

fn take_message<T: Taker + ?Sized>(mut message: Bytes, path: &Arc<Path>, taker: &T) -> Result<(), LinkEnd> {
    path.heard(path.clock().now());
    while let Some(frame) = Frame::decode(&mut message)? {
        match frame {
            Frame::Ping(number) => path.send(Frame::Pong(number)),
            Frame::Pong(sent_us) => {
                let now = path.clock().now();
                path.set_rtt(now.saturating_sub(Duration::from_micros(sent_us)));
            }
            other => taker.on_frame(other, path)?,
        }
    }
    taker.on_message_end(path);
    Ok(())
}

struct Link<'a, S, T: ?Sized> {
    socket: FrameSocket<S>,
    path: Arc<Path>,
    taker: &'a T,
    keep_alive: KeepAlive,
    closing: bool,
    unflushed: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin, T: Taker + ?Sized> Link<'_, S, T> {
    fn poll(&mut self, cx: &mut Context<'_>, timer: Pin<&mut Sleep>) -> Poll<LinkEnd> {
        self.path.register(cx.waker());
        if let Poll::Ready(end) = self.poll_read(cx) {
            return Poll::Ready(end);
        }
        match self.poll_write(cx) {
            Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
            Poll::Ready(Ok(())) if self.closing => return self.poll_close(cx),
            _ => {}
        }
        self.poll_time(cx, timer)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<LinkEnd> {
        for _ in 0..READS_A_TURN {
            let message = match ready!(self.socket.poll_message(cx)) {
                Some(Ok(message)) => message,
                Some(Err(error)) => return Poll::Ready(error.into()),
                None => return Poll::Ready(LinkEnd::PeerClosed),
            };
            if let Err(end) = take_message(message, &self.path, self.taker) {
                return Poll::Ready(end);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what the path has until there is no more or the socket takes no more. Ready when all is flushed.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        loop {
            ready!(self.socket.poll_ready(cx))?;
            self.closing |= self.path.is_closed();
            let mut message = BytesMut::new();
            self.path.fill(&mut message);
            if message.is_empty() {
                break;
            }
            debug_assert!(message.len() <= MAX_MESSAGE);
            self.socket.start_send(message.freeze())?;
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(self.socket.poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<LinkEnd> {
        ready!(self.socket.poll_close(cx)).ok();
        Poll::Ready(LinkEnd::Closed)
    }

    fn poll_time(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> Poll<LinkEnd> {
        while timer.as_mut().poll(cx).is_ready() {
            let silent = self.path.silent_for(self.path.clock().now());
            if self.closing || silent >= self.keep_alive.interval + self.keep_alive.timeout {
                return Poll::Ready(LinkEnd::Silent);
            }
            let next = if silent >= self.keep_alive.interval {
                self.keep_alive.timeout
            } else {
                self.keep_alive.interval
            };
            timer.as_mut().reset(tokio::time::Instant::now() + next);
            self.ping();
        }
        Poll::Pending
    }

    /// The number in a ping is the time it was sent: the pong then tells the round trip.
    fn ping(&self) {
        self.path.send(Frame::Ping(self.path.clock().now().as_micros() as u64));
    }
}
