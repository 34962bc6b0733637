//! An app's WebSocket, at whichever node it came to. What it says goes to its server through an exchange, which is opened
//! when it first speaks and again when its server has come back; what the server says to all apps comes by the fan-out.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use http_body::Frame as BodyFrame;
use http_body_util::StreamBody;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::Instant,
};

use super::{
    apps::{CONNECTION, MAX_MESSAGE, Messages, PROFILE, framed},
    sender::{PING_EVERY, SILENT_FOR, WRITE_TIMEOUT},
};
use crate::{
    cluster::registry::Client,
    exchange::{
        Exchange,
        ingress::{AnswerBody, Ingress},
    },
    ids::RequestId,
    relay::{State, fanout::Subscription, router},
    wire::{
        Dialect, fields,
        head::{RequestFlags, RequestHead},
        messages::{Message, MessageSocket},
        socket::Side,
    },
};

/// What an app has said and its server has not taken; an app that says more waits.
const SAYS: usize = 16;
/// A server that takes nothing for so long is not there.
const TAKEN_WITHIN: Duration = Duration::from_secs(30);

/// An app may say nothing for as long as it is connected.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// An app's server is not there (RFC 6455's "try again later", in IANA's list).
const TRY_AGAIN: u16 = 1013;

/// Serves an app until it leaves, or has to.
pub(super) async fn run<S>(state: Arc<State>, client: Arc<Client>, profile: Option<HeaderValue>, io: S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let conn_id = rand::random::<u64>().max(1);
    let mut app = App {
        socket: MessageSocket::new(io, Side::Relay, MAX_MESSAGE).await,
        messages: state.board.fanout.subscribe(&client.client_id, conn_id, None),
        uplink: None,
        conn_id,
        profile,
        client,
        state,
    };
    let leaves = app.converse().await;
    tracing::debug!(client.id = %app.client.client_id, ?leaves, "an app's connection has ended");
    if let Leaves::Told(code, reason) = leaves {
        let closing = app.socket.close(code, reason);
        tokio::time::timeout(WRITE_TIMEOUT, closing).await.ok();
    }
}

/// Why an app's connection ends.
#[derive(Debug)]
enum Leaves {
    /// It has left, or does not read.
    Gone,
    /// It is told why.
    Told(u16, &'static str),
}

struct App<S> {
    socket: MessageSocket<S>,
    messages: Subscription,
    uplink: Option<Uplink>,
    conn_id: u64,
    profile: Option<HeaderValue>,
    client: Arc<Client>,
    state: Arc<State>,
}

/// The exchange that carries what one app says, and what it alone is answered.
struct Uplink {
    says: mpsc::Sender<Bytes>,
    answers: Messages<AnswerBody>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> App<S> {
    async fn converse(&mut self) -> Leaves {
        let mut pings = tokio::time::interval(PING_EVERY);
        let mut heard = (self.socket.heard(), Instant::now());
        loop {
            let done = tokio::select! {
                message = self.socket.message() => match message {
                    Some(Ok(Message::Text(text))) => self.say(text.into()).await,
                    Some(Ok(Message::Binary(_))) => self.explain("a message has to be JSON text").await,
                    Some(Err(_)) | None => Err(Leaves::Gone),
                },
                message = self.messages.next() => match message {
                    Ok(delivery) => self.send(delivery.message()).await,
                    Err(left) => Err(Leaves::Told(left.close_code(), left.why())),
                },
                answer = next_answer(&mut self.uplink) => match answer {
                    Some(answer) => self.send(Message::of(answer)).await,
                    None => {
                        self.uplink = None; // its server has gone; the next thing it says finds another
                        Ok(())
                    }
                },
                _ = pings.tick() => self.ping(&mut heard).await,
            };
            if let Err(leaves) = done {
                return leaves;
            }
        }
    }

    /// What the app said goes to its server. It is told what cannot, never left without a word.
    async fn say(&mut self, said: Bytes) -> Result<(), Leaves> {
        if serde_json::from_slice::<serde::de::IgnoredAny>(&said).is_err() {
            return self.explain("a message has to be JSON").await;
        }
        if self.uplink.as_ref().is_none_or(|uplink| uplink.says.is_closed()) {
            self.uplink = self.open_uplink().await;
        }
        let Some(uplink) = &self.uplink else {
            return Err(Leaves::Told(TRY_AGAIN, "the MoosicBox server is not connected"));
        };
        let taken = tokio::time::timeout(TAKEN_WITHIN, uplink.says.send(framed(&said))).await;
        match taken {
            Ok(Ok(())) => Ok(()),
            _ => Err(Leaves::Told(TRY_AGAIN, "the MoosicBox server was lost: say it again")),
        }
    }

    /// An exchange to the client's newest sender. `None`: there is none, or it does not answer.
    async fn open_uplink(&mut self) -> Option<Uplink> {
        let board = &self.state.board;
        let tunnel = router::route(board, &self.client, None).await.ok()?;
        if tunnel.dialect != Dialect::MoosicBox {
            return None;
        }
        let open = board.exchanges.open(RequestId::new(), &tunnel.path);
        let exchange: Arc<Exchange> = open.exchange.clone();
        let (says, said) = mpsc::channel::<Bytes>(SAYS);
        let body = futures_util::stream::unfold(said, |mut said| async move {
            let message = said.recv().await?;
            Some((Ok::<_, Infallible>(BodyFrame::data(message)), said))
        });
        let ingress = Ingress {
            response_timeout: self.state.config.http.response_timeout,
            body_idle: FOR_EVER,
            keep_trailers: fields::keep_trailers,
        };
        let head = self.head();
        let called = tokio::select! {
            biased;
            answer = ingress.call(open, &head, Some(StreamBody::new(Box::pin(body))), |_| {}) => answer.ok()?,
            _ = router::follow(board, &self.client, false, &exchange) => return None,
        };
        Some(Uplink {
            says,
            answers: Messages::new(called.into_body(None, fields::keep_trailers)),
        })
    }

    fn head(&self) -> RequestHead {
        let mut headers = HeaderMap::from_iter([(CONNECTION, HeaderValue::from(self.conn_id))]);
        if let Some(profile) = &self.profile {
            headers.insert(PROFILE, profile.clone());
        }
        RequestHead {
            method: Method::POST,
            target: Bytes::from_static(b"/ws"),
            flags: RequestFlags {
                empty: false,
                upgrade: false,
            },
            headers,
        }
    }

    async fn explain(&mut self, error: &str) -> Result<(), Leaves> {
        let text = serde_json::json!({ "error": error }).to_string();
        self.send(Message::Text(text.into())).await
    }

    async fn send(&mut self, message: Message) -> Result<(), Leaves> {
        let sent = tokio::time::timeout(TAKEN_WITHIN, self.socket.send(message)).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            _ => Err(Leaves::Gone),
        }
    }

    async fn ping(&mut self, heard: &mut (u64, Instant)) -> Result<(), Leaves> {
        if self.socket.heard() != heard.0 {
            *heard = (self.socket.heard(), Instant::now());
        }
        if heard.1.elapsed() >= PING_EVERY + SILENT_FOR {
            return Err(Leaves::Gone);
        }
        let sent = tokio::time::timeout(WRITE_TIMEOUT, self.socket.send_ping()).await;
        sent.is_ok_and(|sent| sent.is_ok()).then_some(()).ok_or(Leaves::Gone)
    }
}

async fn next_answer(uplink: &mut Option<Uplink>) -> Option<Bytes> {
    match uplink {
        Some(uplink) => uplink.answers.next().await,
        None => std::future::pending().await,
    }
}
