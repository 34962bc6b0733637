//! A relay, an agent and an upstream that writes down what it gets.

use adit::{cluster::registry::NewAuth, config::RelayConfig};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    harness::raw::{Call, RawAnswer, RawUpstream, send_raw},
    harness::{TestAgent, TestRelay},
};

pub const CLOSE: &str = "connection: close\r\n";

pub struct World {
    pub relay: TestRelay,
    pub upstream: RawUpstream,
    _agent: TestAgent,
}

/// A request for the client, with more headers and a body.
pub fn request(line: &str, headers: &str, body: &str) -> String {
    format!("{line} HTTP/1.1\r\nhost: a\r\nadit-client: home\r\n{headers}\r\n{body}")
}

pub fn get(headers: &str) -> String {
    request("GET /x", headers, "")
}

pub fn post(headers: &str, body: &str) -> String {
    request("POST /x", headers, body)
}

impl World {
    pub async fn open() -> Self {
        Self::with(|_| {}, RawUpstream::ok().await).await
    }

    pub async fn with(change: impl FnOnce(&mut RelayConfig), upstream: RawUpstream) -> Self {
        let relay = TestRelay::with(change).await;
        let token = relay.client("home", NewAuth::Public).await;
        let agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
        Self {
            relay,
            upstream,
            _agent: agent,
        }
    }

    pub async fn connect(&self) -> TcpStream {
        let socket = TcpStream::connect(self.relay.address).await.expect("a connection");
        socket.set_nodelay(true).expect("a socket");
        socket
    }

    /// A connection on which this was sent.
    pub async fn begin(&self, bytes: impl AsRef<[u8]>) -> TcpStream {
        let mut socket = self.connect().await;
        socket.write_all(bytes.as_ref()).await.expect("sent");
        socket
    }

    pub async fn send(&self, bytes: impl AsRef<[u8]>) -> RawAnswer {
        send_raw(self.relay.address, bytes).await
    }

    /// Refused by the relay, as a problem, and closed; the upstream saw nothing of it.
    pub async fn refuses(&self, status: u16, code: &str, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(160)]).into_owned();
        let heads = self.upstream.heads();
        let answer = self.send(bytes).await;
        assert_problem(&answer, status, code, &shown);
        assert!(!answer.reset, "{shown:?}: {answer:?}");
        assert_eq!(self.upstream.heads(), heads, "the upstream saw {shown:?}");
    }

    /// Relayed and answered 200: what the upstream saw of it.
    pub async fn passes(&self, bytes: impl AsRef<[u8]>) -> Call {
        let bytes = bytes.as_ref();
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(160)]).into_owned();
        let answer = self.send(bytes).await;
        assert_eq!(
            (answer.status(), answer.body()),
            (200, &b"ok"[..]),
            "{shown:?}: {answer:?}"
        );
        let mut calls = self.upstream.take();
        assert_eq!(calls.len(), 1, "{shown:?}: {calls:?}");
        calls.remove(0)
    }

    /// That what the test did has harmed nobody else.
    pub async fn still_serves(&self) {
        self.upstream.take();
        let seen = self.passes(request("GET /after", CLOSE, "")).await;
        assert_eq!(seen.line(), "GET /after HTTP/1.1");
    }
}

/// One answer of the relay's own, and only one.
pub fn assert_problem(answer: &RawAnswer, status: u16, code: &str, shown: &str) {
    let head = answer.head();
    assert_eq!(answer.status(), status, "{shown:?}: {answer:?}");
    for line in [
        &format!("adit-error: {code}\r\n"),
        "content-type: application/problem+json\r\n",
        "connection: close",
    ] {
        assert!(head.contains(line), "{shown:?}: no {line:?} in {answer:?}");
    }
    let problem: serde_json::Value = serde_json::from_slice(answer.body()).expect("one JSON object and nothing else");
    assert_eq!(problem["status"], status, "{shown:?}");
    assert_eq!(problem["type"], format!("urn:adit:error:{code}"), "{shown:?}");
    assert!(
        problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()),
        "{shown:?}"
    );
}
