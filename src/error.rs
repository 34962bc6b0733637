//! Every error a downstream, an agent or an operator can be answered with: one enum, one place that maps it to a status.
//!
//! The body is `application/problem+json` (RFC 9457) and the header `Adit-Error` carries the code, so that an error of
//! the relay is never mistaken for one of the upstream (whose `Adit-*` headers are stripped).

use axum::{body::Body, response::IntoResponse};
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use serde::Serialize;

use crate::ids::RequestId;

/// The header that marks an answer as the relay's own: its value is [`Cause::code`].
pub const ADIT_ERROR: &str = "adit-error";

/// What went wrong, in the terms of whoever has to act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// The request breaks a rule of HTTP or of the relay; the text names the rule and what to do. Closes the connection.
    #[error("{0}")]
    BadRequest(&'static str),
    /// A value given to the API is not acceptable; the text says why.
    #[error("{0}")]
    Invalid(String),
    /// No credential, or one that is wrong, expired, revoked, or another client's: all the same to the caller.
    #[error("this needs a valid credential: send `Authorization: Bearer <token>` with an access token of this client")]
    Unauthorized,
    /// The admin API, without the admin token.
    #[error("this needs the relay's admin token: send `Authorization: Bearer <admin token>`")]
    UnauthorizedAdmin,
    /// The client asks for HTTP basic authentication.
    #[error("this client asks for a user name and a password (HTTP Basic)")]
    UnauthorizedBasic,
    /// The relay knows no such client.
    #[error(
        "no client of this name is registered here: check the host name, or the `Adit-Client` header, or `clientId`"
    )]
    UnknownClient,
    /// No client was named at all.
    #[error(
        "the request names no client: use its host name, or send `Adit-Client: <client_id>`, or add `?clientId=<client_id>`"
    )]
    NoClient,
    /// No such thing on the relay's own host or in its API.
    #[error("{0}")]
    NotFound(&'static str),
    /// The API cannot do that to a thing in this state.
    #[error("{0}")]
    Conflict(String),
    /// CONNECT, TRACE, or a method that this route of the relay does not have.
    #[error("this method is not relayed")]
    MethodNotAllowed,
    /// A method that this resource of the admin API does not have.
    #[error("this resource does not have this method: see `Allow`")]
    ApiMethod,
    /// A body longer than this resource of the relay takes.
    #[error("the request body is longer than this resource takes: send a shorter one")]
    BodyTooLarge,
    /// What serves the client takes another kind of body.
    #[error("what serves this client takes JSON bodies only")]
    UnsupportedMediaType,
    /// The downstream did not send its body in time.
    #[error("the request body did not arrive in time: send it without pauses of more than a minute")]
    RequestTimeout,
    /// Longer than the target limit.
    #[error("the request target is longer than 8 KiB: shorten the URL")]
    UriTooLong,
    /// More or longer headers than the limits.
    #[error(
        "the request headers exceed 32 KiB or 100 fields: send fewer or shorter ones (cookies are the usual cause)"
    )]
    HeadersTooLarge,
    /// An expectation other than `100-continue`.
    #[error("the only expectation served here is `100-continue`")]
    ExpectationFailed,
    /// A WebSocket version other than 13.
    #[error("WebSocket version 13 is the only one served here")]
    UpgradeRequired,
    /// Too many failed attempts, tunnels or requests; the number is seconds to wait.
    #[error("{0}; wait the number of seconds in Retry-After")]
    TooMany(&'static str, u32),
    /// The relay does not do this with this method or coding.
    #[error("{0}")]
    NotImplemented(&'static str),
    /// The agent could not reach its upstream.
    #[error("the agent is connected but its upstream refused the connection: is the local server running?")]
    UpstreamUnreachable,
    /// The upstream answered with something that is not valid HTTP, or broke off before its head.
    #[error("the upstream broke off, or its answer was not valid HTTP: see the agent's log")]
    UpstreamFailed,
    /// A buffered response exceeded the relay's limit.
    #[error(
        "the response is larger than this relay buffers: ask for it without `Adit-Response: buffered`, or raise the limit"
    )]
    ResponseTooLarge,
    /// The tunnel went away with the request in flight, and did not come back in time.
    #[error("the tunnel was lost while the request was in flight and did not come back in time")]
    TunnelLost,
    /// The client exists but no agent of its is connected now.
    #[error("no agent is connected for this client right now: start `adit http`, or try again")]
    NoTunnel,
    /// The relay's database does not answer and the client is not in the cache.
    #[error("the relay cannot look this client up right now: try again")]
    RegistryAway,
    /// The relay is at one of its limits, or leaving.
    #[error("{0}")]
    Unavailable(&'static str),
    /// The upstream sent no response head within the deadline.
    #[error("the upstream did not answer in time")]
    UpstreamTimeout,
    /// A bug of ours.
    #[error("the relay failed inside: the log has this request id")]
    Internal,
}

impl Cause {
    /// The status it is answered with.
    pub fn status(&self) -> StatusCode {
        self.facts().0
    }

    /// The stable, machine-readable name: the value of `Adit-Error` and the end of the problem's `type`.
    pub fn code(&self) -> &'static str {
        self.facts().1
    }

    fn facts(&self) -> (StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Cause::BadRequest(_) => (S::BAD_REQUEST, "bad-request"),
            Cause::Invalid(_) => (S::UNPROCESSABLE_ENTITY, "invalid"),
            Cause::Unauthorized | Cause::UnauthorizedAdmin | Cause::UnauthorizedBasic => {
                (S::UNAUTHORIZED, "unauthorized")
            }
            Cause::BodyTooLarge => (S::PAYLOAD_TOO_LARGE, "body-too-large"),
            Cause::UnsupportedMediaType => (S::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type"),
            Cause::UnknownClient => (S::NOT_FOUND, "unknown-client"),
            Cause::NoClient => (S::NOT_FOUND, "no-client"),
            Cause::NotFound(_) => (S::NOT_FOUND, "not-found"),
            Cause::Conflict(_) => (S::CONFLICT, "conflict"),
            Cause::MethodNotAllowed | Cause::ApiMethod => (S::METHOD_NOT_ALLOWED, "method-not-allowed"),
            Cause::RequestTimeout => (S::REQUEST_TIMEOUT, "request-timeout"),
            Cause::UriTooLong => (S::URI_TOO_LONG, "uri-too-long"),
            Cause::HeadersTooLarge => (S::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers-too-large"),
            Cause::ExpectationFailed => (S::EXPECTATION_FAILED, "expectation-failed"),
            Cause::UpgradeRequired => (S::UPGRADE_REQUIRED, "upgrade-required"),
            Cause::TooMany(..) => (S::TOO_MANY_REQUESTS, "too-many"),
            Cause::NotImplemented(_) => (S::NOT_IMPLEMENTED, "not-implemented"),
            Cause::UpstreamUnreachable => (S::BAD_GATEWAY, "upstream-unreachable"),
            Cause::UpstreamFailed => (S::BAD_GATEWAY, "upstream-failed"),
            Cause::ResponseTooLarge => (S::BAD_GATEWAY, "response-too-large"),
            Cause::TunnelLost => (S::BAD_GATEWAY, "tunnel-lost"),
            Cause::NoTunnel => (S::SERVICE_UNAVAILABLE, "no-tunnel"),
            Cause::RegistryAway => (S::SERVICE_UNAVAILABLE, "registry-away"),
            Cause::Unavailable(_) => (S::SERVICE_UNAVAILABLE, "unavailable"),
            Cause::UpstreamTimeout => (S::GATEWAY_TIMEOUT, "upstream-timeout"),
            Cause::Internal => (S::INTERNAL_SERVER_ERROR, "internal"),
        }
    }

    /// Whether the connection cannot be trusted to be in step after this, so it is closed.
    fn closes(&self) -> bool {
        matches!(
            self.status(),
            StatusCode::BAD_REQUEST
                | StatusCode::METHOD_NOT_ALLOWED
                | StatusCode::REQUEST_TIMEOUT
                | StatusCode::URI_TOO_LONG
                | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
                | StatusCode::EXPECTATION_FAILED
                | StatusCode::UPGRADE_REQUIRED
                | StatusCode::NOT_IMPLEMENTED
        )
    }

    fn retry_after(&self) -> Option<u32> {
        match self {
            Cause::TooMany(_, seconds) => Some(*seconds),
            Cause::NoTunnel | Cause::RegistryAway | Cause::Unavailable(_) => Some(2),
            _ => None,
        }
    }

    /// The answer, with the id under which the log has it.
    pub fn respond<B: From<Bytes>>(&self, request_id: RequestId) -> Response<B> {
        let (status, code) = self.facts();
        let problem = Problem {
            kind: format!("urn:adit:error:{code}"),
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: self.to_string(),
            request_id,
        };
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = Response::new(B::from(Bytes::from(body)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(ADIT_ERROR, HeaderValue::from_static(code));
        if let Ok(id) = HeaderValue::try_from(request_id.to_string()) {
            headers.insert("adit-request-id", id);
        }
        if let Some(seconds) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        match self {
            Cause::Unauthorized | Cause::UnauthorizedAdmin => {
                headers.insert(
                    header::WWW_AUTHENTICATE,
                    HeaderValue::from_static("Bearer realm=\"adit\""),
                );
            }
            Cause::UnauthorizedBasic => {
                headers.insert(
                    header::WWW_AUTHENTICATE,
                    HeaderValue::from_static("Basic realm=\"adit\", charset=\"UTF-8\""),
                );
            }
            Cause::UpgradeRequired => {
                headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            }
            _ => {}
        }
        if self.closes() {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl IntoResponse for Cause {
    fn into_response(self) -> Response<Body> {
        self.respond(RequestId::new())
    }
}

/// The body of an error answer (RFC 9457 §3).
#[derive(Serialize)]
struct Problem {
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    status: u16,
    detail: String,
    request_id: RequestId,
}
