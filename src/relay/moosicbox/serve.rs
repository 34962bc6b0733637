//! An exchange served by a MoosicBox server: one JSON request down its socket, packets up, and an abort when the exchange
//! ends before them. What the dialect cannot carry is refused with an answer that says so.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use http_body::Frame as BodyFrame;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody, combinators::UnsyncBoxBody};
use tokio::{io::DuplexStream, sync::mpsc};

use super::{
    apps::{self, Apps},
    requests::{InFlight, Requests},
};
use crate::{
    error::Cause,
    exchange::{
        Exchange,
        body::Broken,
        host::{RequestBody, Served, serve},
        hosting::Service,
    },
    ids::RequestId,
    wire::{
        fields,
        frame::Code,
        head::{RequestHead, ResponseHead},
        moosicbox::{self, Piece},
    },
};

/// The longest request body: it goes down as one JSON text, which a sender holds whole.
const MAX_BODY: usize = 4 * 1024 * 1024;
/// A sender that fails says nothing at all: without a packet for this long, it has.
const PACKET_TIMEOUT: Duration = Duration::from_secs(60);

/// Texts on their way to a sender.
pub(super) type Outbox = mpsc::Sender<String>;
pub(super) type Body = UnsyncBoxBody<Bytes, Broken>;
type Answered = Served<Body, DuplexStream>;

/// Serves exchanges by what is behind one sender's socket.
pub(super) struct Sender {
    pub requests: Arc<Requests>,
    pub apps: Arc<Apps>,
    pub outbox: Outbox,
}

impl Service for Sender {
    async fn serve(&self, exchange: Arc<Exchange>) {
        let asking = exchange.clone();
        serve(
            exchange,
            fields::keep_trailers as fn(&mut HeaderMap),
            |head, body, _| self.answer(asking, head, body),
        )
        .await;
    }
}

impl Sender {
    async fn answer(
        &self,
        exchange: Arc<Exchange>,
        head: RequestHead,
        body: Option<RequestBody>,
    ) -> Result<Answered, Code> {
        if head.flags.upgrade {
            return Ok(refused(
                exchange.id,
                &Cause::NotImplemented("a MoosicBox server takes no upgrades through its tunnel: apps connect to /ws"),
            ));
        }
        match apps::conn_id(&head.headers) {
            Some(conn_id) => Ok(Served::Response(
                ok(),
                self.apps.serve(conn_id, &head, body, &self.outbox),
            )),
            None => self.request(exchange, head, body).await,
        }
    }

    async fn request(
        &self,
        exchange: Arc<Exchange>,
        head: RequestHead,
        body: Option<RequestBody>,
    ) -> Result<Answered, Code> {
        let id = exchange.id;
        let body = match collect(body).await {
            Ok(body) => body,
            Err(Some(cause)) => return Ok(refused(id, &cause)),
            Err(None) => return Err(Code::RequestBroken),
        };
        let in_flight = self.requests.begin(exchange);
        let text = moosicbox::http_request(in_flight.id, &head.method, &head.target, &head.headers, body);
        let Ok(text) = text else {
            return Ok(refused(id, &Cause::UnsupportedMediaType));
        };
        self.outbox.send(text).await.map_err(|_| Code::PathLost)?;
        let asked = Asked {
            in_flight,
            outbox: self.outbox.clone(),
        };
        let answer = asked.head().await?;
        let body = match moosicbox::carries_body(&head.method, answer.status) {
            true => asked.into_body(),
            false => empty(),
        };
        Ok(Served::Response(checked(&head.method, answer), body))
    }
}

fn ok() -> ResponseHead {
    ResponseHead {
        status: StatusCode::OK,
        headers: HeaderMap::new(),
    }
}

/// The sender's Content-Length is of what it sends: what is not there is missed.
fn checked(method: &Method, mut head: ResponseHead) -> ResponseHead {
    if *method != Method::HEAD && head.headers.get_all(header::CONTENT_LENGTH).iter().count() > 1 {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    head
}

fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed_unsync()
}

/// An answer of the relay's own, at the host's end.
fn refused(id: RequestId, cause: &Cause) -> Answered {
    let response: http::Response<Full<Bytes>> = cause.respond(id);
    let (parts, body) = response.into_parts();
    let head = ResponseHead {
        status: parts.status,
        headers: parts.headers,
    };
    Served::Response(head, body.map_err(|never| match never {}).boxed_unsync())
}

/// The whole body. `Err(None)`: it broke off.
async fn collect(body: Option<RequestBody>) -> Result<Option<Bytes>, Option<Cause>> {
    let Some(body) = body else { return Ok(None) };
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(Some(collected.to_bytes())),
        Err(error) if error.is::<LengthLimitError>() => Err(Some(Cause::BodyTooLarge)),
        Err(_) => Err(None),
    }
}

/// A request that the sender was asked; it is told when nobody waits for the answer any more.
struct Asked {
    in_flight: InFlight,
    outbox: Outbox,
}

impl Asked {
    async fn next(&self) -> Result<Piece, Code> {
        let next = tokio::time::timeout(PACKET_TIMEOUT, self.in_flight.next()).await;
        next.unwrap_or(Err(Code::Timeout))
    }

    async fn head(&self) -> Result<ResponseHead, Code> {
        let Piece::Head(head) = self.next().await? else {
            return Err(Code::UpstreamFailed);
        };
        head.parse().map_err(|error| {
            tracing::warn!(%error, "a MoosicBox server's answer is no HTTP");
            Code::UpstreamFailed
        })
    }

    fn into_body(self) -> Body {
        let stream = futures_util::stream::try_unfold(self, |asked| async move {
            match asked.next().await {
                Ok(Piece::Body(data)) => Ok(Some((BodyFrame::data(data), asked))),
                Ok(Piece::End) => Ok(None),
                Ok(Piece::Head(_)) => Err(Broken(Code::UpstreamFailed)),
                Err(code) => Err(Broken(code)),
            }
        });
        StreamBody::new(Box::pin(stream)).boxed_unsync()
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if !self.in_flight.has_ended() {
            // A sender that takes so little that this is full is about to be closed.
            self.outbox.try_send(moosicbox::abort(self.in_flight.id)).ok();
        }
    }
}
