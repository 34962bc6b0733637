//! Messages of frames over one WebSocket, for either side. The only place that knows how the WebSocket library reads and
//! writes; it leaves the handshake to `relay::accept` and `agent::dial`, and the frames to [`super::frame`].

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        handshake::derive_accept_key,
        protocol::{Role, WebSocketConfig},
    },
};

use super::frame::MAX_MESSAGE;

/// The library fills this before every read and keeps it for the connection's life, bytes. At the relay it is most of
/// what an idle tunnel costs; an agent holds few tunnels and reads faster with more.
const RELAY_READ_BUFFER: usize = 8 * 1024;
const AGENT_READ_BUFFER: usize = 64 * 1024;
/// Messages are gathered up to this before a write to the socket, bytes.
const WRITE_BUFFER: usize = 64 * 1024;

/// What a server answers a WebSocket key with (RFC 6455 §4.2.2).
pub fn accept_key(key: &[u8]) -> String {
    derive_accept_key(key)
}

/// Which end of the WebSocket this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The server: reads masked frames.
    Relay,
    /// The client: masks what it sends (RFC 6455 §5.3).
    Agent,
}

/// Why a socket ended.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(std::io::Error),
    /// The peer sent a message longer than [`MAX_MESSAGE`].
    #[error("the peer sent a message that is too long")]
    TooLong,
    /// The peer broke RFC 6455.
    #[error("the peer does not speak WebSocket as agreed: {0}")]
    WebSocket(Error),
    /// A text message: this protocol has none.
    #[error("the peer sent a text message")]
    Text,
}

impl From<Error> for SocketError {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => SocketError::Io(error),
            Error::Capacity(_) => SocketError::TooLong,
            other => SocketError::WebSocket(other),
        }
    }
}

/// A WebSocket whose handshake is done.
pub struct FrameSocket<S> {
    ws: WebSocketStream<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> FrameSocket<S> {
    /// Wraps a connection behind its handshake.
    pub async fn new(io: S, side: Side) -> Self {
        let (role, read_buffer) = match side {
            Side::Relay => (Role::Server, RELAY_READ_BUFFER),
            Side::Agent => (Role::Client, AGENT_READ_BUFFER),
        };
        let config = WebSocketConfig::default()
            .read_buffer_size(read_buffer)
            .write_buffer_size(WRITE_BUFFER)
            .max_write_buffer_size(4 * WRITE_BUFFER)
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE));
        Self {
            ws: WebSocketStream::from_raw_socket(io, role, Some(config)).await,
        }
    }

    /// The next message; `None` when the peer closed. Safe to drop and call again.
    pub fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, SocketError>>> {
        loop {
            return Poll::Ready(match ready!(Pin::new(&mut self.ws).poll_next(cx)) {
                Some(Ok(Message::Binary(message))) => Some(Ok(message)),
                Some(Ok(Message::Text(_))) => Some(Err(SocketError::Text)),
                // The library answers pings by itself.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(_))) | None => None,
                Some(Err(error)) => Some(Err(error.into())),
            });
        }
    }

    /// Ready when the socket takes another message.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Pin::new(&mut self.ws).poll_ready(cx).map_err(SocketError::from)
    }

    /// Hands over a message; call [`poll_ready`](Self::poll_ready) before and [`poll_flush`](Self::poll_flush) after.
    pub fn start_send(&mut self, message: Bytes) -> Result<(), SocketError> {
        Pin::new(&mut self.ws)
            .start_send(Message::Binary(message))
            .map_err(SocketError::from)
    }

    /// Ready when all that was handed over is with the operating system.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Pin::new(&mut self.ws).poll_flush(cx).map_err(SocketError::from)
    }

    /// Sends a close frame and flushes.
    pub fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Pin::new(&mut self.ws).poll_close(cx).map_err(SocketError::from)
    }

    /// The next message, awaited.
    pub async fn message(&mut self) -> Option<Result<Bytes, SocketError>> {
        std::future::poll_fn(|cx| self.poll_message(cx)).await
    }

    /// Sends one message, awaited.
    pub async fn send(&mut self, message: Bytes) -> Result<(), SocketError> {
        std::future::poll_fn(|cx| self.poll_ready(cx)).await?;
        self.start_send(message)?;
        std::future::poll_fn(|cx| self.poll_flush(cx)).await
    }
}
