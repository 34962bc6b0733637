//! The answer's way back: checked, made fit for the downstream, and streamed, collected, or made a tunnel of.

use std::sync::Arc;

use bytes::BytesMut;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    BUFFER_UNIT, State,
    downstream::{io::DownstreamIo, tls::Transport},
    forward,
    ingress::Asked,
    out_body::{OutBody, Record, outcome_of},
};
use crate::{
    error::Cause,
    exchange::{
        body::{Broken, PumpError, tunnel},
        ingress::{Answer, Failure},
    },
    ids::RequestId,
    telemetry::Outcome,
    wire::{fields, frame::Code, head::ResponseHead, socket},
};

/// Tells the downstream under which name the log has its request.
const REQUEST_ID: HeaderName = HeaderName::from_static("adit-request-id");
/// How long the answer took, for whoever asked (W3C Server Timing).
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Why a request got no answer of its upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failed {
    /// The exchange ended before the answer was there.
    Exchange(Failure),
    /// The answer cannot be passed on.
    Answer(Cause),
}

impl Failed {
    /// Whether another tunnel may do better: this one was lost or full, or what was collected from it broke off.
    pub fn may_succeed_elsewhere(&self, buffered: bool) -> bool {
        match self {
            Failed::Exchange(Failure::Reset(code)) => {
                let lost = matches!(
                    code,
                    Code::PathLost | Code::AgentLeft | Code::Gone | Code::Finished | Code::Refused
                );
                lost || (buffered && *code == Code::UpstreamFailed)
            }
            _ => false,
        }
    }

    /// Whether it was the agent's process that failed, not a tunnel of it.
    pub fn left_for_good(&self) -> bool {
        matches!(self, Failed::Exchange(Failure::Reset(Code::AgentLeft | Code::Refused)))
    }

    /// What the downstream is told.
    pub fn cause(self) -> Cause {
        let code = match self {
            Failed::Answer(cause) => return cause,
            Failed::Exchange(Failure::Body(PumpError::Idle)) => return Cause::RequestTimeout,
            Failed::Exchange(Failure::Body(_)) => Code::RequestBroken,
            Failed::Exchange(Failure::Reset(code)) => code,
        };
        match code {
            Code::UpstreamUnreachable => Cause::UpstreamUnreachable,
            Code::PathLost | Code::AgentLeft | Code::Gone | Code::Finished => Cause::TunnelLost,
            Code::Timeout => Cause::UpstreamTimeout,
            Code::Refused => Cause::Unavailable("the agent serves as many requests as it can: try again"),
            Code::RequestBroken => {
                Cause::BadRequest("the request body broke off or its framing is invalid: send it again")
            }
            _ => Cause::UpstreamFailed,
        }
    }
}

/// Makes the response of an answer whose head is there.
pub(super) async fn respond(
    state: &Arc<State>,
    asked: &mut Asked,
    mut answer: Answer,
    record: &mut Option<Record>,
) -> Result<Response<OutBody>, Failed> {
    let exchange = answer.open.exchange.clone();
    let times = record.as_ref().map(|record| record.times).filter(|_| asked.timed);
    let status = answer.head.status;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return upgrade(state, asked, answer, record).map_err(Failed::Answer);
    }
    let mut headers = std::mem::take(&mut answer.head.headers);
    forward::to_downstream(&mut headers, status).map_err(Failed::Answer)?;
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    let bodiless = asked.head.method == Method::HEAD || status == StatusCode::NOT_MODIFIED;
    let declared = length.filter(|_| !bodiless);
    let body = if asked.buffered && !bodiless {
        let (whole, budget) = collect(state, answer, declared).await?;
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(whole.len()));
        let record = record.take().map(|record| {
            record
                .answered(&exchange, status, Some(whole.len() as u64))
                .with_budget(budget)
        });
        OutBody::Whole(Full::new(whole.freeze()), record)
    } else if asked.connection.is_http2() && answer.records.is_at_end() {
        // HTTP/2 tells an answer that is all head from one with an empty body: gRPC's errors are the former.
        let record = record
            .take()
            .map(|record| record.answered(&exchange, status, None).ended());
        OutBody::Whole(Full::default(), record)
    } else {
        let record = record.take().map(|record| {
            record
                .answered(&exchange, status, declared)
                .on(asked.connection.clone())
        });
        OutBody::Streamed(Box::new(answer.into_body(declared, fields::keep_trailers)), record)
    };
    if let Some(timing) = times.and_then(|times| HeaderValue::try_from(times.server_timing()).ok()) {
        headers.append(SERVER_TIMING, timing); // beside the upstream's own
    }
    Ok(head_of(status, headers, exchange.id, body))
}

fn head_of(status: StatusCode, headers: http::HeaderMap, request_id: RequestId, body: OutBody) -> Response<OutBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    if let Ok(id) = HeaderValue::try_from(request_id.to_string()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Collects a body whole: never half of one, and never more than the limits.
async fn collect(
    state: &State,
    answer: Answer,
    declared: Option<u64>,
) -> Result<(BytesMut, OwnedSemaphorePermit), Failed> {
    let limit = state.config.http.buffered_limit;
    if declared.is_some_and(|declared| declared > limit as u64) {
        return Err(Failed::Answer(Cause::ResponseTooLarge));
    }
    let full = || {
        Failed::Answer(Cause::Unavailable(
            "the relay buffers as many responses as it may: try again",
        ))
    };
    let mut budget = state.buffers.clone().try_acquire_many_owned(1).map_err(|_| full())?;
    let mut whole = BytesMut::new();
    let mut body = answer.into_body(declared, fields::keep_trailers);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|Broken(code)| Failed::Exchange(Failure::Reset(code)))?;
        let Ok(data) = frame.into_data() else { continue };
        if whole.len() + data.len() > limit {
            return Err(Failed::Answer(Cause::ResponseTooLarge));
        }
        let missing = (whole.len() + data.len())
            .div_ceil(BUFFER_UNIT)
            .saturating_sub(budget.num_permits());
        let more = state
            .buffers
            .clone()
            .try_acquire_many_owned(missing as u32)
            .map_err(|_| full())?;
        budget.merge(more);
        whole.extend_from_slice(&data);
    }
    Ok((whole, budget))
}

/// The upstream switched to a WebSocket: so do we, and from then on the two bodies are the connection's bytes.
fn upgrade(
    state: &Arc<State>,
    asked: &mut Asked,
    answer: Answer,
    record: &mut Option<Record>,
) -> Result<Response<OutBody>, Cause> {
    let on_upgrade = asked.on_upgrade.take().ok_or(Cause::UpstreamFailed)?;
    let Answer {
        head: ResponseHead { status, mut headers },
        records,
        open,
        ..
    } = answer;
    let key = asked
        .head
        .headers
        .get(header::SEC_WEBSOCKET_KEY)
        .ok_or(Cause::UpstreamFailed)?;
    let accept = headers.get(header::SEC_WEBSOCKET_ACCEPT).map(HeaderValue::as_bytes);
    if accept != Some(socket::accept_key(key.as_bytes()).as_bytes()) {
        return Err(Cause::UpstreamFailed);
    }
    forward::to_downstream_websocket(&mut headers);
    let request_id = open.exchange.id;
    let record = record
        .take()
        .map(|record| record.answered(&open.exchange, status, None));
    state.tasks.spawn(async move {
        let Ok(upgraded) = on_upgrade.await else { return };
        // Bytes that came before the 101 were not meant for the upstream, or want to get past whoever checks.
        let Ok(parts) = upgraded.downcast::<TokioIo<DownstreamIo<Transport>>>() else { return };
        if !parts.read_buf.is_empty() {
            return tracing::warn!(request.id = %request_id, "a downstream sent bytes before its upgrade was accepted: closed");
        }
        let ended = tunnel(parts.io.into_inner(), records, open.exchange.clone()).await;
        match ended {
            // What the downstream said last is not acknowledged yet.
            Ok(()) => open.exchange.delivered().await,
            Err(code) => open.exchange.reset(code),
        }
        if let Some(mut record) = record {
            record.outcome = ended.map_or_else(outcome_of, |()| Outcome::Ok);
        }
        drop(open);
    });
    Ok(head_of(status, headers, request_id, OutBody::empty()))
}
