//! A collector of traces: takes OTLP over HTTP and over gRPC, and tells of each span.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span as Sent, status::StatusCode},
};
use prost::Message;

use crate::harness::{AnyBody, TestUpstream, full, until};

/// What comes before a message of gRPC: whether it is compressed, and its length.
const GRPC_PREFIX: usize = 5;

/// A span that came.
#[derive(Debug, Clone)]
pub struct Span {
    pub service: String,
    pub name: String,
    /// As OTLP numbers them: 1 internal, 2 server, 3 client.
    pub kind: i32,
    pub trace_id: String,
    pub span_id: String,
    /// Empty if it has none.
    pub parent: String,
    pub failed: bool,
    pub attributes: HashMap<String, String>,
}

impl Span {
    /// An attribute's value as text.
    pub fn is(&self, attribute: &str) -> &str {
        self.attributes.get(attribute).map_or("", String::as_str)
    }
}

pub struct Collector {
    server: TestUpstream,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    pub async fn start() -> Self {
        let spans: Arc<Mutex<Vec<Span>>> = Arc::default();
        let taken = spans.clone();
        let server = TestUpstream::start(move |request| take(taken.clone(), request)).await;
        Self { server, spans }
    }

    /// What `OTEL_EXPORTER_OTLP_ENDPOINT` is set to.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// Waits until a request has so many spans; in the order of their ends.
    pub async fn spans_of(&self, request_id: &str, count: usize) -> Vec<Span> {
        let found = || {
            let spans = self.spans.lock().expect("no panic");
            let of_it = spans.iter().filter(|span| span.is("request.id") == request_id);
            of_it.cloned().collect::<Vec<_>>()
        };
        until("the spans come", || found().len() >= count).await;
        found()
    }

    /// Whose spans of requests that were answered came, in the order of their coming.
    pub fn services(&self) -> Vec<String> {
        let spans = self.spans.lock().expect("no panic");
        let answered = spans
            .iter()
            .filter(|span| span.is("http.response.status_code") == "200");
        answered.map(|span| span.service.clone()).collect()
    }

    /// How many of those came.
    pub fn count(&self) -> usize {
        self.services().len()
    }

    /// How many tunnels' spans came.
    pub fn tunnels(&self) -> usize {
        let spans = self.spans.lock().expect("no panic");
        spans.iter().filter(|span| span.name == "tunnel").count()
    }
}

async fn take(spans: Arc<Mutex<Vec<Span>>>, request: Request<Incoming>) -> Response<AnyBody> {
    let grpc = request.uri().path() == "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    assert!(grpc || request.uri().path() == "/v1/traces", "{}", request.uri());
    let mut body = request.into_body().collect().await.expect("a body").to_bytes();
    if grpc {
        body.advance(GRPC_PREFIX);
    }
    let export = ExportTraceServiceRequest::decode(body).expect("OTLP");
    for of_resource in export.resource_spans {
        let resource = attributes(&of_resource.resource.expect("a resource").attributes);
        let sent = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
        let found = sent.map(|sent| span(&resource["service.name"], sent));
        spans.lock().expect("no panic").extend(found);
    }
    match grpc {
        true => grpc_answer(),
        false => Response::new(full("")),
    }
}

fn grpc_answer() -> Response<AnyBody> {
    let empty = Full::new(Bytes::from_static(&[0; GRPC_PREFIX])).map_err(|never| match never {});
    let status = HeaderMap::from_iter([("grpc-status".parse().expect("a name"), HeaderValue::from_static("0"))]);
    let body = empty.with_trailers(std::future::ready(Some(Ok(status))));
    let mut response = Response::new(body.boxed());
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert("content-type", kind);
    response
}

fn span(service: &str, sent: Sent) -> Span {
    let hex = |id: &[u8]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Span {
        service: service.to_owned(),
        kind: sent.kind,
        trace_id: hex(&sent.trace_id),
        span_id: hex(&sent.span_id),
        parent: hex(&sent.parent_span_id),
        failed: sent
            .status
            .is_some_and(|status| status.code == StatusCode::Error as i32),
        attributes: attributes(&sent.attributes),
        name: sent.name,
    }
}

fn attributes(pairs: &[KeyValue]) -> HashMap<String, String> {
    let text = |pair: &KeyValue| match pair.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    pairs.iter().map(|pair| (pair.key.clone(), text(pair))).collect()
}
