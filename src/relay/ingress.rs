//! A request for a client, from its head to its answer: authorised, routed, called over a tunnel, answered as it comes or
//! whole. The steps in their order are [`serve`]; how bytes travel is the exchange's.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, Method, Response, Version, request::Parts};
use http_body::Body;
use hyper::{body::Incoming, upgrade::OnUpgrade};
use tracing::Span;

use super::{
    State,
    auth::Consumed,
    downstream::handle::ConnHandle,
    forward,
    forwarded::Hop,
    limits::{Exceeded, Taken},
    out_body::{OutBody, Record},
    respond::{self, Failed},
    router,
    strict::Target,
};
use crate::{
    cluster::registry::Client,
    error::Cause,
    exchange::{
        ingress::{Answer, Failure, Ingress},
        table::Open,
    },
    ids::{ClientId, RequestId},
    telemetry::{self, AuthFailure},
    wire::{
        fields,
        head::{RequestFlags, RequestHead},
    },
};

/// Asks for the response whole when it says `buffered`; else it streams.
const RESPONSE_MODE: HeaderName = HeaderName::from_static("adit-response");
/// The same, as a query parameter.
const RESPONSE_MODE_PARAMETER: &str = "responseMode=buffered";
/// Asks for `Server-Timing` in the answer when it says `1`.
const TIMING: HeaderName = HeaderName::from_static("adit-server-timing");

/// A request that is let in, as it goes to the upstream.
pub(super) struct Asked {
    pub client: Arc<Client>,
    pub head: RequestHead,
    pub connection: ConnHandle,
    /// Resolves to the connection after a 101.
    pub on_upgrade: Option<OnUpgrade>,
    /// The response is wanted whole.
    pub buffered: bool,
    /// The response shall say how long it took.
    pub timed: bool,
    /// Once more does no harm, and there is nothing that could not be sent again.
    pub repeatable: bool,
}

/// A request for a client, as it came.
pub struct Arrival {
    /// Whom it is for.
    pub client_id: ClientId,
    /// The name of the exchange that it becomes.
    pub request_id: RequestId,
    /// What it asks for.
    pub target: Target,
    /// Its head.
    pub parts: Parts,
    /// Its body.
    pub body: Incoming,
    /// The connection it came on.
    pub connection: ConnHandle,
    /// Let in already: nothing of it is a credential for its client's door.
    pub let_in: Option<Arc<Client>>,
}

/// Answers a request for a client. Whatever becomes of it is counted and logged, once.
pub async fn serve(state: &Arc<State>, arrival: Arrival) -> Result<Response<OutBody>, Cause> {
    let mut record = Some(Record::begin(state, &arrival));
    let answer = serve_recorded(state, arrival, &mut record).await;
    if let (Err(cause), Some(record)) = (&answer, record) {
        record.fail(cause);
    }
    answer
}

async fn serve_recorded(
    state: &Arc<State>,
    arrival: Arrival,
    record: &mut Option<Record>,
) -> Result<Response<OutBody>, Cause> {
    let mut request_id = arrival.request_id;
    let span = record.as_ref().map_or_else(Span::none, |record| record.span.clone());
    let mut taken = Taken::default();
    let asked = ask(state, arrival, &span, &mut taken).await;
    if let Some(record) = record {
        record.taken = taken;
    }
    let (mut asked, mut body) = asked?;
    let mut not = None;
    loop {
        let tunnel = router::route(&state.board, &asked.client, not.as_ref()).await?;
        if let Some(record) = record {
            record.through(&tunnel);
        }
        let open = state.board.exchanges.open(request_id, &tunnel.path);
        let exchange = open.exchange.clone();
        let called = tokio::select! {
            called = call(state, &asked, open, body.take()) => called.map_err(Failed::Exchange),
            failed = router::follow(&state.board, &asked.client, asked.repeatable, &exchange) => Err(failed),
        };
        let failed = match called {
            Ok(answer) => match respond::respond(state, &mut asked, answer, record).await {
                Ok(response) => return Ok(response),
                Err(failed) => failed,
            },
            Err(failed) => failed,
        };
        if !asked.repeatable || !failed.may_succeed_elsewhere(asked.buffered) {
            return Err(failed.cause());
        }
        asked.repeatable = false;
        request_id = RequestId::new(); // an agent answers each name once
        not = failed.left_for_good().then(|| exchange.owner());
    }
}

/// Lets the request in, and makes of it what goes to the upstream.
async fn ask(
    state: &State,
    arrival: Arrival,
    span: &Span,
    taken: &mut Taken,
) -> Result<(Asked, Option<Incoming>), Cause> {
    let Arrival {
        client_id,
        target,
        mut parts,
        body,
        connection,
        let_in,
        ..
    } = arrival;
    let trusted = &state.config.trusted_proxies;
    let hop = Hop {
        peer: connection.peer().ip(),
        tls: connection.is_tls(),
        http2: parts.version == Version::HTTP_2,
        trusted,
    };
    let from = hop.client_address(&parts.headers);
    let limited = |exceeded: Exceeded| {
        state.board.metrics.limited(exceeded.0);
        Cause::from(exceeded)
    };
    state.quotas.of_address(from, taken).map_err(limited)?;
    let authorized = match let_in {
        Some(client) => Ok((client, Consumed::Nothing)),
        None => {
            let (headers, query) = (&parts.headers, target.query());
            state.auth.authorize_downstream(&client_id, from, headers, query).await
        }
    };
    let (client, consumed) =
        authorized.inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Downstream))?;
    state.quotas.of_client(&client.client_id, taken).map_err(limited)?;
    let buffered = wants_it_whole(&parts, &target);
    let timed = parts.headers.get(TIMING).is_some_and(|asked| asked == "1");
    let path_and_query = strip_credentials(consumed, &mut parts, &target);
    forward::to_upstream(&mut parts.headers, &target, &hop);
    telemetry::continue_trace(&mut parts.headers, span);
    let flags = RequestFlags {
        empty: body.is_end_stream() && !target.websocket,
        upgrade: target.websocket,
    };
    let repeatable = flags.empty && is_idempotent(&parts.method);
    let asked = Asked {
        client,
        head: RequestHead {
            method: parts.method,
            target: path_and_query,
            flags,
            headers: parts.headers,
        },
        connection,
        on_upgrade: parts.extensions.remove::<OnUpgrade>().filter(|_| target.websocket),
        buffered,
        timed,
        repeatable,
    };
    let body = (!flags.empty && !flags.upgrade).then_some(body);
    Ok((asked, body))
}

fn wants_it_whole(parts: &Parts, target: &Target) -> bool {
    let asked = parts.headers.get(RESPONSE_MODE).is_some_and(|mode| mode == "buffered");
    let query = || {
        target
            .query()
            .is_some_and(|query| query.split('&').any(|pair| pair == RESPONSE_MODE_PARAMETER))
    };
    !target.websocket && (asked || query())
}

/// What the relay consumed does not go on; all else of the target goes byte for byte.
fn strip_credentials(consumed: Consumed, parts: &mut Parts, target: &Target) -> Bytes {
    let query = consumed.strip(&mut parts.headers, target.query());
    if query.as_deref() == target.query() {
        return Bytes::copy_from_slice(target.path_and_query().as_bytes());
    }
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    Bytes::from(format!("{}{query}", target.path()))
}

/// RFC 9110 §9.2.2, of the methods that are known.
fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE
    )
}

/// Sends it through its exchange, and waits for the head of the answer.
async fn call(state: &State, asked: &Asked, open: Open, body: Option<Incoming>) -> Result<Answer, Failure> {
    let ingress = Ingress {
        response_timeout: state.config.http.response_timeout,
        body_idle: state.config.http.body_idle_timeout,
        keep_trailers: fields::keep_trailers,
    };
    let interim = |mut head: crate::wire::head::ResponseHead| {
        if forward::to_downstream(&mut head.headers, head.status).is_ok() {
            asked.connection.informational(head.status, &head.headers);
        }
    };
    ingress.call(open, &asked.head, body, interim).await
}
