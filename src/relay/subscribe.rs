//! `GET /adit/subscribe?clientId=…` on the relay's own host: what is published to the client's subscribers, as server-sent
//! events or as the messages of a WebSocket. For whomever the client lets in.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header, request::Parts};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::{
    State,
    fanout::{Delivery, Left, Position, Subscription},
    out_body::OutBody,
    strict::Target,
};
use crate::{
    error::Cause,
    ids::ClientId,
    telemetry::AuthFailure,
    wire::{
        messages::MessageSocket,
        socket::{self, Side},
    },
};

/// Where a subscriber was that comes back: what an `EventSource` sends by itself.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// The same in the query, for a WebSocket.
const LAST_EVENT_ID_PARAMETER: &str = "lastEventId=";
/// So often something is sent, so that what is in between does not take the connection for idle (60 s is usual).
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// The longest message of a subscriber, bytes: it has nothing to say.
const MAX_HEARD: usize = 4 * 1024;
/// How long a subscriber may take to read why it is closed.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Begins a subscription: an answer that does not end by itself, or a connection of messages.
pub(super) async fn subscribe(
    state: &Arc<State>,
    client_id: &ClientId,
    remote: std::net::IpAddr,
    target: &Target,
    parts: &mut Parts,
) -> Result<Response<OutBody>, Cause> {
    if parts.method != Method::GET {
        return Err(Cause::MethodNotAllowed);
    }
    let let_in = state
        .auth
        .authorize_downstream(client_id, remote, &parts.headers, target.query());
    let let_in = let_in.await;
    let_in.inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Downstream))?;
    let from = last_position(&parts.headers, target)?;
    if !target.websocket && !accepts_events(&parts.headers) {
        return Err(Cause::BadRequest(
            "subscribe with `Accept: text/event-stream`, or with a WebSocket",
        ));
    }
    if state.is_draining() {
        return Err(Cause::Unavailable(
            "this relay node is leaving; subscribe again to reach another",
        ));
    }
    if !state.board.peers.bus().is_up() {
        return Err(Cause::Unavailable(
            "the relay's nodes cannot speak with each other right now: messages would be missed",
        ));
    }
    let conn_id = rand::random_range(1..=u64::MAX);
    let subscription = state.board.fanout.subscribe(client_id, conn_id, from);
    // Whatever is published once the answer is there comes.
    subscription.begun().await;
    match target.websocket {
        true => messages(state, subscription, parts),
        false => Ok(events(subscription)),
    }
}

fn last_position(headers: &HeaderMap, target: &Target) -> Result<Option<Position>, Cause> {
    let header = headers.get(LAST_EVENT_ID).map(|value| value.to_str().unwrap_or("?"));
    let mut parameters = target.query().into_iter().flat_map(|query| query.split('&'));
    let query = || parameters.find_map(|parameter| parameter.strip_prefix(LAST_EVENT_ID_PARAMETER));
    let given = header.or_else(query).filter(|text| !text.is_empty());
    let position = given.map(|text| text.parse::<Position>()).transpose();
    position.map_err(|_| Cause::BadRequest("the last event id is none that a subscriber was given here: leave it out"))
}

fn accepts_events(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter();
    accepted
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|one| {
            one.split(';')
                .next()
                .unwrap_or_default()
                .trim()
                .eq_ignore_ascii_case("text/event-stream")
        })
}

// --- server-sent events ---------------------------------------------------------------------------------------------

fn events(subscription: Subscription) -> Response<OutBody> {
    let mut response = Response::new(OutBody::Events(Box::new(Events::new(subscription))));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would hold it back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// A subscription as the body of an answer.
pub struct Events {
    /// `None` when the last word is said.
    subscription: Option<Subscription>,
    keep_alive: Interval,
}

impl Events {
    fn new(subscription: Subscription) -> Self {
        // The first tick is at once: a first comment shows that the subscription is there.
        let mut keep_alive = tokio::time::interval(KEEP_ALIVE);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            subscription: Some(subscription),
            keep_alive,
        }
    }

    /// The next bytes; `None` at the end.
    pub fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Some(subscription) = &mut self.subscription else {
            return Poll::Ready(None);
        };
        match subscription.poll_next(cx) {
            Poll::Ready(Ok(delivery)) => Poll::Ready(Some(delivery.event(event))),
            Poll::Ready(Err(left)) => {
                self.subscription = None;
                Poll::Ready(Some(last_event(left)))
            }
            Poll::Pending => Pin::new(&mut self.keep_alive)
                .poll_tick(cx)
                .map(|_| Some(Bytes::from_static(b":\n\n"))),
        }
    }
}

/// Text as it is, but that every end of a line becomes LF; other bytes as base64, in an event of type `binary`.
fn event(delivery: &Delivery) -> Bytes {
    let mut out = BytesMut::with_capacity(delivery.body.len() + 256);
    out.put_slice(b"id: ");
    out.put_slice(delivery.position.as_str().as_bytes());
    match std::str::from_utf8(&delivery.body) {
        Ok(text) => put_data(&mut out, text),
        Err(_) => {
            out.put_slice(b"\nevent: binary");
            put_data(&mut out, &STANDARD.encode(&delivery.body));
        }
    }
    out.put_slice(b"\n\n");
    out.freeze()
}

fn put_data(out: &mut BytesMut, text: &str) {
    let text = match text.contains('\r') {
        true => std::borrow::Cow::Owned(text.replace("\r\n", "\n").replace('\r', "\n")),
        false => text.into(),
    };
    for line in text.split('\n') {
        out.put_slice(b"\ndata: ");
        out.put_slice(line.as_bytes());
    }
}

/// Why the stream ends. After a gap the place where it was is worth nothing: an empty id makes an `EventSource` forget it.
fn last_event(left: Left) -> Bytes {
    let (name, id) = match left {
        Left::Gap => ("gap", "id\n"),
        Left::TooSlow => ("too-slow", ""),
        Left::ClientGone => ("gone", ""),
        Left::Leaving => ("leaving", ""),
    };
    format!("event: {name}\n{id}data: {}\n\n", left.why()).into()
}

// --- a WebSocket ----------------------------------------------------------------------------------------------------

fn messages(state: &State, subscription: Subscription, parts: &mut Parts) -> Result<Response<OutBody>, Cause> {
    let key = parts.headers.get(header::SEC_WEBSOCKET_KEY);
    let response = switch(key.ok_or(Cause::BadRequest("Sec-WebSocket-Key is missing"))?)?;
    parts.headers.clear(); // they would pin the read buffer of the connection
    let on_upgrade = parts.extensions.remove::<OnUpgrade>();
    let on_upgrade = on_upgrade.ok_or(Cause::BadRequest("this connection cannot become a WebSocket"))?;
    state.tasks.spawn(async move {
        if let Ok(upgraded) = on_upgrade.await {
            Box::pin(run(subscription, upgraded)).await;
        }
    });
    Ok(response)
}

fn switch(key: &HeaderValue) -> Result<Response<OutBody>, Cause> {
    let accept = HeaderValue::try_from(socket::accept_key(key.as_bytes())).map_err(|_| Cause::Internal)?;
    let mut response = Response::new(OutBody::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    Ok(response)
}

async fn run(mut subscription: Subscription, upgraded: Upgraded) {
    let mut socket = MessageSocket::new(TokioIo::new(upgraded), Side::Relay, MAX_HEARD).await;
    let Some(left) = speak(&mut subscription, &mut socket).await else {
        return;
    };
    drop(subscription);
    let closing = socket.close(left.close_code(), left.why());
    tokio::time::timeout(LAST_WORDS, closing).await.ok();
}

/// Sends what comes until either side ends it: why this one does, or `None` if the subscriber has gone. What that says is
/// not listened to.
async fn speak(subscription: &mut Subscription, socket: &mut MessageSocket<TokioIo<Upgraded>>) -> Option<Left> {
    let mut keep_alive = tokio::time::interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard_before = None;
    loop {
        tokio::select! {
            biased;
            said = socket.message() => drop(said?.ok()?),
            delivery = subscription.next() => {
                let message = match delivery {
                    Ok(delivery) => delivery.message(),
                    Err(left) => return Some(left),
                };
                tokio::select! {
                    biased;
                    left = subscription.cut() => return Some(left),
                    sent = socket.send(message) => sent.ok()?,
                }
            }
            _ = keep_alive.tick() => {
                // It answers pings, if it is there.
                let heard = Some(socket.heard());
                if std::mem::replace(&mut heard_before, heard) == heard {
                    return None;
                }
                socket.send_ping().await.ok()?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(body: &'static [u8]) -> String {
        let position = Position::default();
        let event = event(&Delivery::new(position, Bytes::from_static(body)));
        String::from_utf8(event.to_vec()).expect("text")
    }

    #[test]
    fn no_message_can_forge_an_event() {
        assert_eq!(encoded(b"one"), "id: \ndata: one\n\n");
        assert_eq!(encoded(b""), "id: \ndata: \n\n");
        assert_eq!(
            encoded(b"a\nb\r\nc\rid: 7\n\nevent: x"),
            "id: \ndata: a\ndata: b\ndata: c\ndata: id: 7\ndata: \ndata: event: x\n\n"
        );
        assert_eq!(encoded(b"\xff\x00"), "id: \nevent: binary\ndata: /wA=\n\n");
    }
}
