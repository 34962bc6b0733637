//! A client `home`: relay, agent and an upstream whose answers the story gives one by one.

use std::net::SocketAddr;

use adit::{agent, cluster::registry::NewAuth, config::RelayConfig};
use bytes::Bytes;
use http::{Method, Request, Response, request};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::{Mutex, mpsc, oneshot};

use super::{AnyBody, TestAgent, TestRelay, TestUpstream, bodies::BodyWriter, bodies::written, full, within};

/// A request that reached the upstream, to be answered.
pub struct Call {
    pub head: request::Parts,
    pub body: Incoming,
    answer: oneshot::Sender<Response<AnyBody>>,
}

impl Call {
    pub fn answer(self, response: Response<AnyBody>) {
        drop(self.begin_with(response));
    }

    /// Answers, and goes on reading the request.
    pub fn begin_with(self, response: Response<AnyBody>) -> (request::Parts, Incoming) {
        self.answer.send(response).ok();
        (self.head, self.body)
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_given_up(&self) -> bool {
        self.answer.is_closed()
    }

    pub fn ok(self, text: impl Into<Bytes>) {
        self.answer(Response::new(full(text)));
    }

    /// Begins an answer whose body the story writes.
    pub fn begin(self, response: http::response::Builder) -> (BodyWriter, request::Parts, Incoming) {
        let (writer, body) = written();
        let (head, incoming) = self.begin_with(response.body(body).expect("a response"));
        (writer, head, incoming)
    }

    /// Answers with the request's own bytes as they come.
    pub fn echo(self) {
        self.answer.send(Response::new(echo(self.body))).ok();
    }

    /// Reads the request whole, and answers it with its length.
    pub async fn read(self) -> (request::Parts, Bytes) {
        let body = within("the request's body", self.body.collect()).await;
        let body = body.expect("a whole body").to_bytes();
        let length = body.len().to_string();
        self.answer.send(Response::new(full(length))).ok();
        (self.head, body)
    }
}

pub fn echo(body: Incoming) -> AnyBody {
    body.map_err(std::io::Error::other).boxed()
}

/// The requests that reach an upstream.
pub struct Calls(Mutex<mpsc::UnboundedReceiver<Call>>);

impl Calls {
    pub async fn next(&self) -> Call {
        let next = async { self.0.lock().await.recv().await };
        within("a request reaches the upstream", next)
            .await
            .expect("the upstream runs")
    }

    /// How many wait that nobody has looked at.
    pub async fn waiting(&self) -> usize {
        self.0.lock().await.len()
    }
}

/// An upstream whose requests the story takes one by one.
pub async fn upstream() -> (TestUpstream, Calls) {
    let (calls_tx, calls_rx) = mpsc::unbounded_channel();
    let upstream = TestUpstream::start(move |request: Request<Incoming>| {
        let calls = calls_tx.clone();
        async move {
            let (head, body) = request.into_parts();
            let (answer, answered) = oneshot::channel();
            calls.send(Call { head, body, answer }).ok();
            match answered.await {
                Ok(response) => response,
                Err(_) => std::future::pending().await,
            }
        }
    })
    .await;
    (upstream, Calls(Mutex::new(calls_rx)))
}

/// Relay, agent, upstream.
pub struct Home {
    pub relay: TestRelay,
    pub token: String,
    pub agent: TestAgent,
    pub upstream: TestUpstream,
    pub calls: Calls,
}

impl Home {
    pub async fn start() -> Self {
        Self::with(|_| {}, |_| {}).await
    }

    pub async fn with(relay: impl FnOnce(&mut RelayConfig), agent: impl FnOnce(&mut agent::Config)) -> Self {
        let (upstream, calls) = upstream().await;
        let relay = TestRelay::with(relay).await;
        let token = relay.client("home", NewAuth::Public).await;
        let to = upstream.address.to_string();
        let agent = TestAgent::with(relay.agents, "home", &token, &to, agent).await;
        Self {
            relay,
            token,
            agent,
            upstream,
            calls,
        }
    }

    /// Sends a request, whose answer the story takes later.
    pub fn send(&self, request: Request<AnyBody>) -> tokio::task::JoinHandle<Response<Incoming>> {
        tokio::spawn(super::send(self.relay.address, request))
    }

    pub fn get(&self, path: &str) -> tokio::task::JoinHandle<Response<Incoming>> {
        self.send(ask(Method::GET, path).body(full("")).expect("a request"))
    }

    /// One more exchange goes through.
    pub async fn works(&self) {
        let answer = self.get("/works");
        self.calls.next().await.ok("it works");
        let answer = within("an answer", answer).await.expect("no panic");
        assert_eq!(whole(answer).await, (200, Bytes::from("it works")));
    }
}

/// A request for `home`.
pub fn ask(method: Method, path: &str) -> request::Builder {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "relay")
        .header("adit-client", "home")
}

/// An answer with its whole body.
pub async fn whole(response: Response<Incoming>) -> (u16, Bytes) {
    let (head, body) = response.into_parts();
    let body = within("the answer's body", body.collect()).await.expect("a whole body");
    (head.status.as_u16(), body.to_bytes())
}

/// An HTTP/2 connection with prior knowledge.
pub async fn http2(address: SocketAddr) -> hyper::client::conn::http2::SendRequest<AnyBody> {
    let stream = tokio::net::TcpStream::connect(address)
        .await
        .expect("the relay listens");
    let io = hyper_util::rt::TokioIo::new(stream);
    let (sender, connection) = hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io)
        .await
        .expect("HTTP/2");
    tokio::spawn(connection);
    sender
}

/// The value of a metric, by its full name, over all nodes.
pub async fn metric(relay: &TestRelay, name: &str) -> u64 {
    let peers = match &relay.peer {
        Some(peer) => Box::pin(metric(peer, name)).await,
        None => 0,
    };
    peers + metric_of_node(relay, name).await
}

async fn metric_of_node(relay: &TestRelay, name: &str) -> u64 {
    let request = Request::get("/metrics").header("host", "admin").body(full(""));
    let response = super::send(relay.admin, request.expect("a request")).await;
    let (_, page) = whole(response).await;
    let page = String::from_utf8_lossy(&page).into_owned();
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {page}"))
        .parse()
        .expect("a number")
}
