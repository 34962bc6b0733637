//! TLS on the public listener: both versions of HTTP and WebSockets, what the upstream is told of it, and a certificate that
//! changes while the relay runs.

mod harness;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use adit::{
    cluster::{bus::local::Hub, registry::NewAuth},
    config::RelayConfig,
    relay::Relay,
};
use base64::Engine;
use futures_util::{SinkExt, StreamExt};
use harness::{AnyBody, PATIENCE, TestAgent, TestRelay, TestUpstream, full, home::whole, within};
use http::{Request, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;

/// As files have it (RFC 7468).
fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// A certificate for `localhost`, in its files.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> (Self, CertificateDer<'static>) {
        let files = Self {
            dir: tempfile::tempdir().expect("a directory"),
        };
        let der = files.renew();
        (files, der)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn renew(&self) -> CertificateDer<'static> {
        let new = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("a certificate");
        std::fs::write(self.path("cert.pem"), pem("CERTIFICATE", new.cert.der())).expect("written");
        std::fs::write(
            self.path("key.pem"),
            pem("PRIVATE KEY", &new.signing_key.serialize_der()),
        )
        .expect("written");
        new.cert.der().clone()
    }
}

/// A node with TLS, and one without for the agent, whose roots are this machine's.
struct Line {
    relay: TestRelay,
    _agents: TestRelay,
    _agent: TestAgent,
}

impl Line {
    async fn start(files: &Files, to: SocketAddr) -> Self {
        let (hub, mut config) = (Hub::shared(), RelayConfig::default());
        let url = format!("sqlite:{}", files.path("adit.db").display());
        config.database_url = url.parse().expect("a url");
        let agents = TestRelay::start_node(Relay::on_hub(config.clone(), hub.clone()), "127.0.0.1:0").await;
        config.tls.cert = Some(files.path("cert.pem"));
        config.tls.key = Some(files.path("key.pem"));
        let relay = TestRelay::start_node(Relay::on_hub(config, hub), "127.0.0.1:0").await;
        let token = relay.client("home", NewAuth::Public).await;
        let agent = TestAgent::start(agents.address, "home", &token, to).await;
        Self {
            relay,
            _agents: agents,
            _agent: agent,
        }
    }
}

/// A connection to whoever shows exactly this certificate.
async fn connect(
    to: SocketAddr,
    trusted: &CertificateDer<'static>,
    protocol: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let stream = TcpStream::connect(to).await.expect("the relay listens");
    let name = "localhost".try_into().expect("a name");
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, stream);
    within("a handshake", connecting).await
}

fn request(uri: &str) -> Request<AnyBody> {
    let request = Request::get(uri).header("adit-client", "home");
    request.body(full("")).expect("a request")
}

#[tokio::test]
async fn both_versions_of_http_by_alpn_and_the_upstream_is_told_https() {
    let (files, der) = Files::new();
    let upstream = TestUpstream::echo().await;
    let line = Line::start(&files, upstream.address).await;

    let io = connect(line.relay.address, &der, "http/1.1").await.expect("TLS");
    assert_eq!(io.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io))
        .await
        .expect("HTTP/1.1");
    tokio::spawn(connection);
    let mut asked = request("/one");
    asked.headers_mut().insert("host", "localhost".parse().expect("a host"));
    let (status, seen) = whole(sender.send_request(asked).await.expect("an answer")).await;
    let seen = String::from_utf8_lossy(&seen).into_owned();
    assert!(status == 200 && seen.contains("x-forwarded-proto: https\n"), "{seen}");
    assert!(seen.contains(";proto=https\n"), "{seen}");

    let io = connect(line.relay.address, &der, "h2").await.expect("TLS");
    assert_eq!(io.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io))
        .await
        .expect("HTTP/2");
    tokio::spawn(connection);
    let answer = sender
        .send_request(request("https://localhost/two"))
        .await
        .expect("an answer");
    assert_eq!(answer.version(), Version::HTTP_2);
    let (status, seen) = whole(answer).await;
    let seen = String::from_utf8_lossy(&seen).into_owned();
    assert!(status == 200 && seen.contains("x-forwarded-proto: https\n"), "{seen}");
    line.relay.stop().await;
}

#[tokio::test]
async fn websockets_inside_of_tls() {
    let (files, der) = Files::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let to = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("a connection");
        let mut socket = tokio_tungstenite::accept_async(stream).await.expect("a handshake");
        while let Some(Ok(message)) = socket.next().await {
            socket.send(message).await.ok();
        }
    });
    let line = Line::start(&files, to).await;
    let io = connect(line.relay.address, &der, "http/1.1").await.expect("TLS");
    let opening = tokio_tungstenite::client_async("wss://localhost/socket?clientId=home", io);
    let (mut socket, _) = Box::pin(within("a handshake", opening)).await.expect("a WebSocket");
    socket.send(Message::text("there and back")).await.expect("sent");
    let back = within("a message", socket.next())
        .await
        .expect("one")
        .expect("a message");
    assert_eq!(back, Message::text("there and back"));
    drop(socket);
    line.relay.stop().await;
}

#[tokio::test]
async fn plain_text_is_told_to_speak_tls_and_the_silent_hurt_nobody() {
    let (files, der) = Files::new();
    let upstream = TestUpstream::echo().await;
    let line = Line::start(&files, upstream.address).await;
    let _silent = TcpStream::connect(line.relay.address).await.expect("a connection");
    let mut plain = TcpStream::connect(line.relay.address).await.expect("a connection");
    plain
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .expect("sent");
    let mut answer = String::new();
    within("an answer", plain.read_to_string(&mut answer))
        .await
        .expect("text");
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.contains("use https://"),
        "{answer}"
    );
    let mut junk = TcpStream::connect(line.relay.address).await.expect("a connection");
    junk.write_all(b"\x16\x03\x01\xff\xff junk").await.expect("sent");
    let mut rest = Vec::new();
    within("a close", junk.read_to_end(&mut rest)).await.ok();
    connect(line.relay.address, &der, "h2")
        .await
        .expect("the others are served");
    line.relay.stop().await;
}

#[tokio::test]
async fn a_changed_certificate_is_taken_and_a_bad_one_is_not() {
    let (files, first) = Files::new();
    let upstream = TestUpstream::echo().await;
    let line = Line::start(&files, upstream.address).await;
    let old = connect(line.relay.address, &first, "http/1.1").await.expect("TLS");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(old))
        .await
        .expect("HTTP/1.1");
    tokio::spawn(connection);
    let mut asks = async || {
        let mut asked = request("/");
        asked.headers_mut().insert("host", "localhost".parse().expect("a host"));
        whole(sender.send_request(asked).await.expect("an answer")).await.0
    };
    assert_eq!(asks().await, 200);
    std::fs::write(files.path("key.pem"), "no key").expect("written");
    let looked = tokio::time::Instant::now() + 2 * std::time::Duration::from_secs(5);
    while tokio::time::Instant::now() < looked {
        connect(line.relay.address, &first, "http/1.1")
            .await
            .expect("the old one is in force");
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    let second = files.renew();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while connect(line.relay.address, &second, "http/1.1").await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the new one is taken");
    }
    assert_eq!(asks().await, 200, "what was open stays");
    line.relay.stop().await;
}

#[tokio::test]
async fn a_relay_does_not_start_with_files_that_are_no_certificate() {
    let (files, _) = Files::new();
    let good = std::fs::read(files.path("key.pem")).expect("read");
    files.renew();
    for (key, said) in [
        (Some(&b"no key"[..]), "has no private key in PEM"),
        (Some(&good[..]), "is not the key of the certificate"),
        (None, "cannot read"),
    ] {
        match key {
            Some(key) => std::fs::write(files.path("key.pem"), key).expect("written"),
            None => std::fs::remove_file(files.path("key.pem")).expect("removed"),
        }
        let mut config = RelayConfig {
            database_url: "sqlite::memory:".parse().expect("a url"),
            ..RelayConfig::default()
        };
        config.tls.cert = Some(files.path("cert.pem"));
        config.tls.key = Some(files.path("key.pem"));
        let listeners = adit::relay::Listeners {
            public: TcpListener::bind("127.0.0.1:0").await.expect("a free port"),
            admin: TcpListener::bind("127.0.0.1:0").await.expect("a free port"),
        };
        let run = Relay::new(config).run(listeners, adit::shutdown::Shutdown::new(), |_| {});
        let refused = within("a refusal", run).await.expect_err(said).to_string();
        assert!(refused.contains(said) && refused.contains("key.pem"), "{refused}");
    }
}
