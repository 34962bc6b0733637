//! Spans to a collector by OTLP, as the standard `OTEL_*` variables say. Nothing of this runs when they name no collector.

use std::{
    env,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use opentelemetry::{Key, KeyValue, trace::TracerProvider};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SdkTracerProvider, SpanData},
};
use tokio::runtime::Handle;
use tracing_subscriber::{Layer, registry::LookupSpan};

use crate::tls;

/// A collector that takes longer for a batch has not taken it (the default of `OTEL_EXPORTER_OTLP_TIMEOUT`).
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// What the last spans may take to leave when the process ends.
const LAST_SPANS: Duration = Duration::from_secs(3);
/// What a collector answers is a status and a few bytes; more is not read.
const MAX_ANSWER: usize = 64 * 1024;

/// Why traces cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// A protocol that is not spoken here.
    #[error("OTEL_EXPORTER_OTLP_PROTOCOL is `{0}`: write `http/protobuf` or `grpc`")]
    Protocol(String),
    /// What the exporter says of its variables.
    #[error("the OTEL_ variables are not right: {0}")]
    Exporter(#[from] ExporterBuildError),
    /// The system's certificates cannot be read.
    #[error("https:// needs this machine's root certificates (install ca-certificates): {0}")]
    Certificates(std::io::Error),
}

/// The way of this process's spans to a collector: a bounded queue (`OTEL_BSP_*`) that a thread of its own empties. What
/// does not fit is dropped; nobody waits.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// As the environment says; `None` when it names no collector, or switches traces off. `service` is the name that
    /// `OTEL_SERVICE_NAME` replaces. Inside a tokio runtime, which the connections to the collector live in.
    pub fn from_env(service: &'static str) -> Result<Option<Self>, TracesError> {
        let off = is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none");
        let endpoint = of_traces("ENDPOINT");
        let Some(endpoint) = endpoint.filter(|_| !off) else {
            return Ok(None);
        };
        let exporter = match of_traces("PROTOCOL").as_deref() {
            None | Some("http/protobuf") => over_http(None, endpoint.starts_with("https:"))?,
            Some("grpc") => SpanExporter::builder().with_tonic().build()?,
            Some(other) => return Err(TracesError::Protocol(other.to_owned())),
        };
        Ok(Some(Self::by(exporter, service)))
    }

    /// To the collector whose OTLP/HTTP endpoint is this URL, all of it: `http://127.0.0.1:4318/v1/traces`.
    pub fn to(endpoint: &str, service: &'static str) -> Result<Self, TracesError> {
        let exporter = over_http(Some(endpoint), endpoint.starts_with("https:"))?;
        Ok(Self::by(exporter, service))
    }

    fn by(exporter: SpanExporter, service: &'static str) -> Self {
        let exporter = Telling {
            exporter,
            failing: AtomicBool::new(false),
        };
        let provider = SdkTracerProvider::builder().with_resource(resource(service));
        Self {
            provider: provider.with_batch_exporter(exporter).build(),
        }
    }

    /// Takes spans out of what is traced: those of [`super::spans`], and what a library has if the log's filter lets it.
    pub(super) fn layer<S>(&self) -> Box<dyn Layer<S> + Send + Sync>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("adit"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_level(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .boxed()
    }

    /// Sends what waits, as far as the collector takes it in a few seconds.
    pub async fn flush(&self) {
        let provider = self.provider.clone();
        let flush = tokio::task::spawn_blocking(move || provider.force_flush());
        tokio::time::timeout(LAST_SPANS, flush).await.ok();
    }

    /// Sends what waits, and nothing from then on.
    pub async fn end(self) {
        // It waits for a thread that needs this runtime.
        let end = tokio::task::spawn_blocking(move || self.provider.shutdown_with_timeout(LAST_SPANS));
        end.await.ok();
    }
}

/// A variable's value; an empty one is as if it were not there.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn is(name: &str, value: &str) -> bool {
    variable(name).is_some_and(|found| found.eq_ignore_ascii_case(value))
}

/// The exporter's variable for traces, or else that for all signals.
fn of_traces(what: &str) -> Option<String> {
    variable(&format!("OTEL_EXPORTER_OTLP_TRACES_{what}")).or_else(|| variable(&format!("OTEL_EXPORTER_OTLP_{what}")))
}

/// `endpoint`: `None` leaves it to the variables.
fn over_http(endpoint: Option<&str>, https: bool) -> Result<SpanExporter, TracesError> {
    let exporter = SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_http_client(Http::new(https)?);
    Ok(match endpoint {
        Some(endpoint) => exporter.with_endpoint(endpoint).build()?,
        None => exporter.build()?,
    })
}

/// Who the spans are of. The SDK reads `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`.
fn resource(service: &'static str) -> Resource {
    let given = Resource::builder().build();
    let name = given.get(&Key::from_static_str("service.name"));
    let is_named = name.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    match is_named {
        true => resource.build(),
        false => resource.with_service_name(service).build(),
    }
}

/// Says once that spans do not arrive, and once that they do again: the thread that exports has nobody to tell.
#[derive(Debug)]
struct Telling {
    exporter: SpanExporter,
    failing: AtomicBool,
}

impl opentelemetry_sdk::trace::SpanExporter for Telling {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let exported = self.exporter.export(batch).await;
        let failed_before = self.failing.swap(exported.is_err(), Ordering::Relaxed);
        match &exported {
            Err(error) if !failed_before => {
                tracing::warn!(%error, "the collector does not take traces: they are dropped until it does");
            }
            Ok(()) if failed_before => tracing::info!("the collector takes traces again"),
            _ => {}
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// Sends batches from the runtime: the thread that exports has none, and hyper needs one.
#[derive(Debug)]
struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    runtime: Handle,
}

impl Http {
    fn new(https: bool) -> Result<Self, TracesError> {
        let tls = tls::client_config(https).map_err(TracesError::Certificates)?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .build();
        Ok(Self {
            client: Client::builder(TokioExecutor::new()).build(connector),
            runtime: Handle::current(),
        })
    }
}

#[async_trait]
impl HttpClient for Http {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let asking = ask(self.client.clone(), request.map(Full::new));
        // The timeout too is made where there is a clock.
        let asking = async { tokio::time::timeout(EXPORT_TIMEOUT, asking).await };
        self.runtime.spawn(asking).await??
    }
}

async fn ask(
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> Result<Response<Bytes>, HttpError> {
    let (head, body) = client.request(request).await?.into_parts();
    let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
    Ok(Response::from_parts(head, body))
}
