//! One request to the local server, and its answer back: the function that the host end serves exchanges with.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header, uri::PathAndQuery};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{Either, Empty};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use tracing::Span;

use super::{AgentError, Config, Event};
use crate::config::{HostHeader, UpstreamUrl};
use crate::{
    exchange::host::{Interim, RequestBody, Served, Summary},
    ids::{ClientId, RequestId},
    telemetry,
    wire::{
        fields,
        frame::Code,
        head::{RequestHead, ResponseHead},
        socket,
    },
};

/// A local server that takes longer to accept a connection counts as away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle connections to the upstream are kept this long; many servers close theirs after 60 s or more.
const IDLE_CONNECTION: Duration = Duration::from_secs(30);
/// Read and written at once from an upstream connection, bytes: with the window, what a stalled download holds.
const CONNECTION_BUFFER: usize = 64 * 1024;
/// Interim responses of one request that are passed on; the rest of a flood is dropped.
const MAX_INTERIM: u64 = 16;

type OutBody = Either<RequestBody, Empty<Bytes>>;
type Http = Client<HttpsConnector<Dial>, OutBody>;
pub(super) type Answered = Served<Counted, TokioIo<Upgraded>>;

/// Calls one upstream, keeping connections to it.
pub(super) struct Caller {
    upstream: UpstreamUrl,
    /// The same, as traces name it.
    name: Box<str>,
    host: Option<HeaderValue>,
    http1: Http,
    http2: Http,
}

impl Caller {
    pub fn new(config: &Config) -> Result<Self, AgentError> {
        let upstream = config.upstream.clone();
        let host = match &config.host_header {
            HostHeader::Keep => None,
            HostHeader::Rewrite => HeaderValue::try_from(upstream.authority().as_str()).ok(),
            HostHeader::Literal(host) => Some(host.clone()),
        };
        let https = matches!(upstream, UpstreamUrl::Https(_));
        let tls = tls(https, config.insecure)?;
        let connector = || {
            hyper_rustls::HttpsConnectorBuilder::new()
                .with_tls_config(tls.clone())
                .https_or_http()
        };
        let dial = Dial(Arc::new(upstream.clone()));
        let mut builder = Client::builder(TokioExecutor::new());
        builder
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_CONNECTION)
            .http1_max_buf_size(CONNECTION_BUFFER);
        let http1 = builder.build(connector().enable_http1().wrap_connector(dial.clone()));
        let http2 = builder
            .http2_only(true)
            .build(connector().enable_http2().wrap_connector(dial));
        Ok(Self {
            name: upstream.authority().host().into(),
            upstream,
            host,
            http1,
            http2,
        })
    }

    /// Whom it calls.
    pub fn upstream(&self) -> &str {
        &self.name
    }

    /// Sends a request and returns the head of its response, with the body to come.
    pub async fn call(
        &self,
        head: RequestHead,
        body: Option<RequestBody>,
        interim: Interim,
        record: &Record,
    ) -> Result<Answered, Code> {
        let key = head
            .flags
            .upgrade
            .then(|| head.headers.get(header::SEC_WEBSOCKET_KEY).cloned())
            .flatten();
        let upgrade = head.flags.upgrade;
        let grpc = is_grpc(&head.headers) || matches!(self.upstream, UpstreamUrl::H2c(_));
        let mut request = self.request(head, body, grpc && !upgrade)?;
        let seen = AtomicU64::new(0);
        hyper::ext::on_informational(&mut request, move |response| {
            let status = response.status();
            if status != StatusCode::SWITCHING_PROTOCOLS && seen.fetch_add(1, Ordering::Relaxed) < MAX_INTERIM {
                let mut headers = response.headers().clone();
                fields::strip_hop_by_hop(&mut headers);
                interim.send(&ResponseHead { status, headers });
            }
        });
        let client = if grpc && !upgrade { &self.http2 } else { &self.http1 };
        let response = client.request(request).await.map_err(|error| self.failed(&error))?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return upgraded(response, key).await;
        }
        let (parts, body) = response.into_parts();
        let mut headers = parts.headers;
        fields::strip_hop_by_hop(&mut headers);
        let head = ResponseHead {
            status: parts.status,
            headers,
        };
        Ok(Served::Response(
            head,
            Counted {
                body,
                bytes: record.bytes.clone(),
            },
        ))
    }

    fn request(&self, head: RequestHead, body: Option<RequestBody>, http2: bool) -> Result<Request<OutBody>, Code> {
        let target = PathAndQuery::from_maybe_shared(head.target).map_err(|_| Code::Protocol)?;
        let scheme = if matches!(self.upstream, UpstreamUrl::Https(_)) {
            "https"
        } else {
            "http"
        };
        let uri = Uri::builder().scheme(scheme).authority(self.upstream.authority());
        let uri = uri.path_and_query(target).build().map_err(|_| Code::Protocol)?;
        let body = body.map_or_else(|| Either::Right(Empty::new()), Either::Left);
        let mut request = Request::new(body);
        *request.method_mut() = head.method;
        *request.uri_mut() = uri;
        *request.headers_mut() = head.headers;
        if let Some(host) = &self.host {
            request.headers_mut().insert(header::HOST, host.clone());
        }
        if http2 {
            *request.version_mut() = Version::HTTP_2;
            request.headers_mut().remove(header::HOST);
        }
        Ok(request)
    }

    fn failed(&self, error: &hyper_util::client::legacy::Error) -> Code {
        let (code, what) = if error.is_connect() {
            (Code::UpstreamUnreachable, "the upstream cannot be reached")
        } else {
            (Code::UpstreamFailed, "the upstream did not answer a request properly")
        };
        let cause = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
        tracing::warn!(upstream = %self.upstream, cause, "{what}");
        code
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .map_or(&b""[..], HeaderValue::as_bytes);
    kind.strip_prefix(b"application/grpc")
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// Holds a 101 against the request that asked for it: what does not match is no upgrade.
async fn upgraded(mut response: Response<Incoming>, key: Option<HeaderValue>) -> Result<Answered, Code> {
    let accept = response
        .headers()
        .get(header::SEC_WEBSOCKET_ACCEPT)
        .map(HeaderValue::as_bytes);
    let expected = key.map(|key| socket::accept_key(key.as_bytes()));
    if expected.is_none() || accept != expected.as_ref().map(String::as_bytes) {
        tracing::warn!("the upstream switched protocols without being asked, or with a wrong Sec-WebSocket-Accept");
        return Err(Code::UpstreamFailed);
    }
    let connection = hyper::upgrade::on(&mut response)
        .await
        .map_err(|_| Code::UpstreamFailed)?;
    let (parts, _) = response.into_parts();
    let mut headers = parts.headers;
    fields::strip_hop_by_hop(&mut headers);
    Ok(Served::Upgraded(
        ResponseHead {
            status: parts.status,
            headers,
        },
        TokioIo::new(connection),
    ))
}

fn tls(https: bool, insecure: bool) -> Result<rustls::ClientConfig, AgentError> {
    let mut config = crate::tls::client_config(https && !insecure).map_err(AgentError::Certificates)?;
    if insecure {
        let any = AnyCertificate(config.crypto_provider().clone());
        config.dangerous().set_certificate_verifier(Arc::new(any));
    }
    Ok(config)
}

/// Accepts every certificate, for `--insecure`: a local server's self-signed one.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects to the upstream, whatever the URI says.
#[derive(Clone)]
struct Dial(Arc<UpstreamUrl>);

impl tower_service::Service<Uri> for Dial {
    type Response = TokioIo<Socket>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<TokioIo<Socket>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let upstream = self.0.clone();
        Box::pin(async move {
            let connecting = connect(&upstream);
            tokio::time::timeout(CONNECT_TIMEOUT, connecting)
                .await?
                .map(TokioIo::new)
        })
    }
}

async fn connect(upstream: &UpstreamUrl) -> std::io::Result<Socket> {
    let (authority, port) = match upstream {
        UpstreamUrl::Unix(path) => return UnixStream::connect(path).await.map(Socket::Unix),
        UpstreamUrl::Https(authority) => (authority, 443),
        UpstreamUrl::Http(authority) | UpstreamUrl::H2c(authority) => (authority, 80),
    };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let tcp = TcpStream::connect((host, authority.port_u16().unwrap_or(port))).await?;
    tcp.set_nodelay(true)?;
    Ok(Socket::Tcp(tcp))
}

/// A connection to the upstream.
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection for Socket {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

macro_rules! either_socket {
    ($self:ident, $socket:ident => $call:expr) => {
        match $self.get_mut() {
            Socket::Tcp(socket) => {
                let $socket = Pin::new(socket);
                $call
            }
            Socket::Unix(socket) => {
                let $socket = Pin::new(socket);
                $call
            }
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        either_socket!(self, socket => socket.poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        either_socket!(self, socket => socket.poll_write(cx, data))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        either_socket!(self, socket => socket.poll_write_vectored(cx, data))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        either_socket!(self, socket => socket.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        either_socket!(self, socket => socket.poll_shutdown(cx))
    }
}

/// What is told of a request when it has ended.
#[derive(Debug)]
pub(super) struct Record {
    request: OnceLock<(Method, Bytes)>,
    started: Instant,
    bytes: Arc<AtomicU64>,
    /// It, for whoever follows traces; the parent of what the upstream makes of it.
    span: OnceLock<Span>,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            request: OnceLock::new(),
            started: Instant::now(),
            bytes: Arc::default(),
            span: OnceLock::new(),
        }
    }
}

impl Record {
    pub fn begin(&self, client_id: &ClientId, id: RequestId, upstream: &str, head: &mut RequestHead) {
        self.request.get_or_init(|| (head.method.clone(), head.target.clone()));
        let request = (&head.method, &head.target[..]);
        let span = telemetry::upstream_span(client_id, id, upstream, request, &head.headers);
        telemetry::carry_trace(&mut head.headers, &span);
        self.span.get_or_init(|| span);
    }

    pub fn event(self, summary: Summary) -> Option<Event> {
        if let Some(span) = self.span.get() {
            let error = summary.broken.map(|code| format!("{code:?}"));
            let bytes = self.bytes.load(Ordering::Relaxed);
            telemetry::end_span(span, summary.status, bytes, error.as_deref());
        }
        let (method, target) = self.request.into_inner()?;
        Some(Event::Request {
            method,
            target: String::from_utf8_lossy(&target).into_owned(),
            status: summary.status,
            bytes: self.bytes.load(Ordering::Relaxed),
            duration: self.started.elapsed(),
            broken: summary.broken,
        })
    }
}

/// A response's body, counted as it passes.
pub(super) struct Counted {
    body: Incoming,
    bytes: Arc<AtomicU64>,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            self.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_is_told_from_grpc_web() {
        let is = |kind: &'static str| {
            is_grpc(&HeaderMap::from_iter([(
                header::CONTENT_TYPE,
                HeaderValue::from_static(kind),
            )]))
        };
        assert!(is("application/grpc") && is("application/grpc+proto") && is("application/grpc;x=1"));
        assert!(!is("application/grpc-web") && !is("text/plain"));
    }
}
