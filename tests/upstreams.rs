//! The ways to an upstream: TLS, a Unix socket, HTTP/2 in the clear; and the name by which it is called.

mod harness;

use std::sync::Arc;

use adit::{agent, cluster::registry::NewAuth, config::HostHeader};
use bytes::Bytes;
use harness::{TestAgent, TestRelay, TestUpstream, full, serve_connection};
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::task::AbortOnDropHandle;

/// Says how it was reached.
async fn seen(request: Request<Incoming>) -> Response<harness::AnyBody> {
    let host = request.headers().get("host").and_then(|host| host.to_str().ok());
    let authority = request.uri().authority().map(|authority| authority.as_str());
    let text = format!("{:?} {}", request.version(), host.or(authority).unwrap_or("-"));
    Response::new(full(text))
}

async fn reached(to: &str, change: impl FnOnce(&mut agent::Config)) -> (u16, Bytes) {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let agent = TestAgent::with(relay.agents, "home", &token, to, change).await;
    let (status, _, body) = relay.get("home", "/").await;
    agent.stop().await;
    relay.stop().await;
    (status, body)
}

#[tokio::test]
async fn over_tls_whose_certificate_is_not_checked_when_told_so() {
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(certified.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .expect("a certificate");
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let _task = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(stream).await {
                tokio::spawn(serve_connection(stream, seen));
            }
        }
    }));
    let to = format!("https://localhost:{port}");
    assert_eq!(
        reached(&to, |agent| agent.insecure = true).await,
        (200, "HTTP/1.1 relay".into())
    );
    let (status, body) = reached(&to, |_| {}).await;
    assert_eq!(status, 502, "a certificate that nobody vouches for: {body:?}");
}

#[tokio::test]
async fn over_a_unix_socket() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("upstream.sock");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let _task = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve_connection(stream, seen));
        }
    }));
    let to = format!("unix:{}", socket.display());
    assert_eq!(reached(&to, |_| {}).await, (200, "HTTP/1.1 relay".into()));
    assert_eq!(
        reached(&to, |agent| agent.host_header = HostHeader::Rewrite).await,
        (200, "HTTP/1.1 localhost".into())
    );
}

#[tokio::test]
async fn over_http2_in_the_clear() {
    let upstream = TestUpstream::start(seen).await;
    let to = format!("h2c://{}", upstream.address);
    let expected = format!("HTTP/2.0 {}", upstream.address);
    assert_eq!(reached(&to, |_| {}).await, (200, expected.into()));
}

#[tokio::test]
async fn by_its_own_name_or_any_other() {
    let upstream = TestUpstream::start(seen).await;
    let to = upstream.address.to_string();
    assert_eq!(reached(&to, |_| {}).await, (200, "HTTP/1.1 relay".into()));
    let own = format!("HTTP/1.1 {to}");
    assert_eq!(
        reached(&to, |agent| agent.host_header = HostHeader::Rewrite).await,
        (200, own.into())
    );
    let other = |agent: &mut agent::Config| agent.host_header = "other.example".parse().expect("a host");
    assert_eq!(reached(&to, other).await, (200, "HTTP/1.1 other.example".into()));
}

#[tokio::test]
async fn a_grpc_error_that_is_all_head_stays_one() {
    let home = harness::home::Home::start().await;
    let mut connection = harness::home::http2(home.relay.address).await;
    let request = http::Request::post("http://relay/service/none")
        .header("adit-client", "home")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let answer = tokio::spawn(connection.send_request(request.body(harness::full("")).expect("a request")));
    let head = Response::builder()
        .header("content-type", "application/grpc")
        .header("grpc-status", "12");
    home.calls
        .next()
        .await
        .answer(head.body(harness::full("")).expect("a response"));
    let answer = harness::within("the answer", answer)
        .await
        .expect("no panic")
        .expect("an answer");
    assert_eq!(answer.headers()["grpc-status"], "12");
    assert!(
        http_body::Body::is_end_stream(answer.body()),
        "the stream ends with the head"
    );
}
