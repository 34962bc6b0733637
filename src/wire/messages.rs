//! Text and binary messages over one WebSocket, for either side: what subscribers and apps speak. Beside
//! [`FrameSocket`](super::socket::FrameSocket), which carries frames; the handshake is somebody else's.

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
        self, Utf8Bytes,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::socket::{Side, SocketError};

/// The library fills this before every read and keeps it for the connection's life, bytes: a relay holds thousands of
/// these sockets, and most of them say little.
const READ_BUFFER: usize = 4 * 1024;
/// Messages are gathered up to this before a write to the socket, bytes.
const WRITE_BUFFER: usize = 16 * 1024;
/// The longest reason that a close frame holds (RFC 6455 §5.5: 125 bytes with the code).
const MAX_REASON: usize = 123;

/// One message, as it came or goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// UTF-8 text.
    Text(Utf8Bytes),
    /// Any bytes.
    Binary(Bytes),
}

impl Message {
    /// Text where the bytes are UTF-8, else binary. Copies nothing.
    pub fn of(body: Bytes) -> Self {
        Utf8Bytes::try_from(body.clone()).map_or(Message::Binary(body), Message::Text)
    }

    /// What it says.
    pub fn into_bytes(self) -> Bytes {
        match self {
            Message::Text(text) => text.into(),
            Message::Binary(bytes) => bytes,
        }
    }
}

/// A WebSocket whose handshake is done.
pub struct MessageSocket<S> {
    ws: WebSocketStream<S>,
    heard: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> MessageSocket<S> {
    /// Wraps a connection behind its handshake. A message of the peer that is longer than `max_message` bytes ends it.
    pub async fn new(io: S, side: Side, max_message: usize) -> Self {
        let role = match side {
            Side::Relay => Role::Server,
            Side::Agent => Role::Client,
        };
        // What waits to be written needs no limit of its own: once a write would block, `poll_ready` waits for all of it.
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(WRITE_BUFFER)
            .max_message_size(Some(max_message))
            .max_frame_size(Some(max_message));
        Self {
            ws: WebSocketStream::from_raw_socket(io, role, Some(config)).await,
            heard: 0,
        }
    }

    /// How often the peer was heard of while messages were waited for, pings and pongs included: while this stands still,
    /// it is silent.
    pub fn heard(&self) -> u64 {
        self.heard
    }

    /// The next message; `None` when the peer closed. Safe to drop and call again.
    pub fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, SocketError>>> {
        loop {
            let next = ready!(Pin::new(&mut self.ws).poll_next(cx));
            self.heard += u64::from(matches!(next, Some(Ok(_))));
            return Poll::Ready(match next {
                Some(Ok(tungstenite::Message::Text(text))) => Some(Ok(Message::Text(text))),
                Some(Ok(tungstenite::Message::Binary(bytes))) => Some(Ok(Message::Binary(bytes))),
                Some(Ok(tungstenite::Message::Close(_))) | None => None,
                // The library answers pings by itself.
                Some(Ok(_)) => continue,
                Some(Err(error)) => Some(Err(error.into())),
            });
        }
    }

    /// Ready when the socket takes another message.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Pin::new(&mut self.ws).poll_ready(cx).map_err(SocketError::from)
    }

    /// Hands over a message; call [`poll_ready`](Self::poll_ready) before and [`poll_flush`](Self::poll_flush) after.
    pub fn start_send(&mut self, message: Message) -> Result<(), SocketError> {
        self.start(match message {
            Message::Text(text) => tungstenite::Message::Text(text),
            Message::Binary(bytes) => tungstenite::Message::Binary(bytes),
        })
    }

    /// Ready when all that was handed over is with the operating system.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Pin::new(&mut self.ws).poll_flush(cx).map_err(SocketError::from)
    }

    /// The next message, awaited.
    pub async fn message(&mut self) -> Option<Result<Message, SocketError>> {
        std::future::poll_fn(|cx| self.poll_message(cx)).await
    }

    /// Sends one message, awaited.
    pub async fn send(&mut self, message: Message) -> Result<(), SocketError> {
        std::future::poll_fn(|cx| self.poll_ready(cx)).await?;
        self.start_send(message)?;
        std::future::poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Sends a ping, which the peer answers by itself, awaited.
    pub async fn send_ping(&mut self) -> Result<(), SocketError> {
        std::future::poll_fn(|cx| self.poll_ready(cx)).await?;
        self.start(tungstenite::Message::Ping(Bytes::new()))?;
        std::future::poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Closes with a code and a reason (cut at 123 bytes), and waits until the peer closed too, so that what was said last
    /// is not lost with the connection. A peer that reads nothing makes it wait for ever: bound it.
    pub async fn close(&mut self, code: u16, reason: &str) -> Result<(), SocketError> {
        let cut = reason.floor_char_boundary(MAX_REASON);
        let frame = CloseFrame {
            code: CloseCode::from(code),
            reason: reason[..cut].into(),
        };
        std::future::poll_fn(|cx| self.poll_ready(cx)).await?;
        self.start(tungstenite::Message::Close(Some(frame)))?;
        std::future::poll_fn(|cx| self.poll_flush(cx)).await?;
        while let Some(Ok(_)) = self.message().await {}
        Ok(())
    }

    fn start(&mut self, message: tungstenite::Message) -> Result<(), SocketError> {
        Pin::new(&mut self.ws).start_send(message).map_err(SocketError::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair(
        max_message: usize,
    ) -> (
        MessageSocket<impl AsyncRead + AsyncWrite>,
        MessageSocket<impl AsyncRead + AsyncWrite>,
    ) {
        let (one, other) = tokio::io::duplex(64 * 1024);
        let relay = MessageSocket::new(one, Side::Relay, max_message).await;
        (relay, MessageSocket::new(other, Side::Agent, max_message).await)
    }

    #[tokio::test]
    async fn text_stays_text_bytes_stay_bytes_and_pings_are_heard_but_no_messages() {
        let (mut relay, mut app) = pair(1024).await;
        relay.send_ping().await.expect("sent");
        for said in [Message::of("täxt".into()), Message::of(Bytes::from_static(b"\xff\x00"))] {
            relay.send(said.clone()).await.expect("sent");
            assert_eq!(app.message().await.expect("open").expect("a message"), said);
        }
        assert_eq!(app.heard(), 3);
        app.send(Message::Text("back".into())).await.expect("sent");
        assert_eq!(
            relay.message().await.expect("open").expect("a message").into_bytes(),
            "back"
        );
        assert_eq!(relay.heard(), 2, "the pong and the message");
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_ends_it() {
        let (mut relay, mut app) = pair(16).await;
        app.send(Message::Text("x".repeat(17).into())).await.expect("sent");
        assert!(matches!(relay.message().await, Some(Err(SocketError::TooLong))));
    }

    #[tokio::test]
    async fn a_close_is_heard_and_answered() {
        let (mut relay, mut app) = pair(1024).await;
        let reason = "ä".repeat(100);
        let (closed, heard) = tokio::join!(relay.close(4001, &reason), async {
            let heard = app.message().await;
            drop(app);
            heard
        });
        closed.expect("closed");
        assert!(heard.is_none());
    }
}
