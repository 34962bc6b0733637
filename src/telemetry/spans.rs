//! The spans of a request: at the node that it came to, at the node that holds its tunnel if that is another, and at the
//! agent. Names and attributes follow OpenTelemetry's semantic conventions for HTTP, where they have one.
//!
//! They are `tracing` spans of a target of their own, [`SPANS`], that only an exporter's layer takes: without one, making
//! a span is a comparison and nothing is allocated.

use http::{HeaderMap, Method};
use tracing::{Level, Span, field::Empty};

use super::trace;
use crate::ids::{ClientId, NodeId, RequestId, TunnelId};

/// The target of all spans that are exported; logs leave it out.
pub(super) const SPANS: &str = "adit::spans";

/// Whether anybody takes spans: what it costs to make one of bytes can be saved.
pub fn spans_are_taken() -> bool {
    tracing::span_enabled!(target: SPANS, Level::INFO)
}

/// A request at the node that it came to, from its head to the last byte of its answer: the parent is whoever sent it, if
/// it says so.
pub fn ingress_span(
    node_id: NodeId,
    client_id: &ClientId,
    request_id: RequestId,
    (method, path, authority): (&Method, &str, &str),
    headers: &HeaderMap,
) -> Span {
    let span = tracing::info_span!(
        target: SPANS,
        "request",
        otel.name = known(method),
        otel.kind = "server",
        otel.status_code = Empty,
        http.request.method = known(method),
        http.response.status_code = Empty,
        url.path = path,
        server.address = authority,
        error.type = Empty,
        client.id = client_id.as_str(),
        request.id = %request_id,
        tunnel.id = Empty,
        adit.node.id = %node_id,
        adit.tunnel.place = Empty,
        adit.tunnel.dialect = Empty,
        adit.response.bytes = Empty,
    );
    trace::adopt(&span, headers);
    span
}

/// A tunnel at the node that holds it, from the agent's hello to its end: a trace of its own. The requests that go by it
/// name it as `tunnel.id`.
pub fn tunnel_span(node_id: NodeId, client_id: &ClientId, tunnel_id: TunnelId, dialect: &str) -> Span {
    tracing::info_span!(
        target: SPANS,
        parent: None,
        "tunnel",
        otel.kind = "server",
        client.id = client_id.as_str(),
        tunnel.id = %tunnel_id,
        adit.node.id = %node_id,
        adit.tunnel.dialect = dialect,
        adit.tunnel.end = Empty,
    )
}

/// A request on its way through the node that holds its tunnel. Nothing if it is of no trace.
pub fn owner_span(node_id: NodeId, tunnel_id: TunnelId, request_id: RequestId, headers: &HeaderMap) -> Option<Span> {
    let parent = trace::context_of(headers)?;
    let span = tracing::info_span!(
        target: SPANS,
        "forward",
        otel.kind = "internal",
        otel.status_code = Empty,
        error.type = Empty,
        request.id = %request_id,
        tunnel.id = %tunnel_id,
        adit.node.id = %node_id,
        adit.tunnel.place = "local",
    );
    trace::set_parent(&span, parent);
    Some(span)
}

/// A request at the agent, until the upstream's answer is through.
pub fn upstream_span(
    client_id: &ClientId,
    request_id: RequestId,
    upstream: &str,
    (method, target): (&Method, &[u8]),
    headers: &HeaderMap,
) -> Span {
    // A query may hold credentials.
    let path = || {
        let path = target.split(|&byte| byte == b'?').next().unwrap_or_default();
        String::from_utf8_lossy(path).into_owned()
    };
    let span = tracing::info_span!(
        target: SPANS,
        "upstream",
        otel.name = known(method),
        otel.kind = "client",
        otel.status_code = Empty,
        http.request.method = known(method),
        http.response.status_code = Empty,
        url.path = path(),
        server.address = upstream,
        error.type = Empty,
        client.id = client_id.as_str(),
        request.id = %request_id,
        adit.response.bytes = Empty,
    );
    trace::adopt(&span, headers);
    span
}

/// How a request's span ends: the status answered, and what failed, if something did.
pub fn end_span(span: &Span, status: Option<u16>, bytes: u64, error: Option<&str>) {
    if span.is_disabled() {
        return;
    }
    if let Some(status) = status.filter(|status| *status > 0) {
        span.record("http.response.status_code", i64::from(status));
    }
    span.record("adit.response.bytes", i64::try_from(bytes).unwrap_or(i64::MAX));
    if let Some(error) = error {
        fail_span(span, error);
    }
}

/// Something of it failed.
pub fn fail_span(span: &Span, error: &str) {
    span.record("error.type", error);
    span.record("otel.status_code", "ERROR");
}

/// The conventions want few values: what is no method of RFC 9110 or 5789 is `_OTHER`.
fn known(method: &Method) -> &str {
    match *method {
        Method::GET | Method::HEAD | Method::POST | Method::PUT | Method::DELETE => method.as_str(),
        Method::CONNECT | Method::OPTIONS | Method::TRACE | Method::PATCH => method.as_str(),
        _ => "_OTHER",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_nobody_knows_are_one() {
        let unknown = Method::from_bytes(b"BREW").expect("a method");
        assert_eq!((known(&Method::PATCH), known(&unknown)), ("PATCH", "_OTHER"));
    }

    #[test]
    fn without_an_exporter_there_are_no_spans() {
        let (node, client, request) = (NodeId::new(), "home".parse().expect("an id"), RequestId::new());
        let span = ingress_span(node, &client, request, (&Method::GET, "/", "a"), &HeaderMap::new());
        assert!(span.is_disabled() && !spans_are_taken());
        end_span(&span, Some(200), 1, None);
    }
}
