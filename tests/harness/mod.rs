//! What the stories are told with: a relay, agents and upstreams of their own, on free ports, gone when dropped.
#![allow(dead_code, reason = "each story uses its part")]

pub mod bodies;
pub mod by_hand;
pub mod home;
pub mod moosicbox;
pub mod proxy;
pub mod raw;
pub mod servers;
pub mod tunnel;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use adit::{
    agent::{self, Agent, Event},
    cluster::{
        bus::local::Hub,
        registry::{NewAuth, Registry},
    },
    config::RelayConfig,
    ids::ClientId,
    relay::{Listeners, Relay},
    shutdown::Shutdown,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use servers::{MariaDb, Redis};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{broadcast, oneshot},
};
use tokio_util::task::AbortOnDropHandle;

pub type AnyError = std::io::Error;
pub type AnyBody = BoxBody<Bytes, AnyError>;

/// Longer than anything should take on any machine: a story that waits so long hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for a condition; panics when it hangs.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("hangs: {what}"),
    }
}

/// Waits until a condition holds, looking again whenever the runtime has nothing else to do.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let mut looks = tokio::time::interval(Duration::from_millis(5));
    within(what, async {
        while !holds() {
            looks.tick().await;
        }
    })
    .await;
}

pub fn full(bytes: impl Into<Bytes>) -> AnyBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// Where a story's agents are, seen from its downstreams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nodes {
    /// At the same node.
    One,
    /// At another node: both in this process, on its bus, with one SQLite file.
    Embedded,
    /// At another node, with a MySQL-protocol server and Redis between them.
    Servers,
}

impl Nodes {
    /// As `ADIT_TEST_NODES` says: tests/run tells each story in each of the three.
    pub fn of_this_run() -> Self {
        match std::env::var("ADIT_TEST_NODES").as_deref() {
            Ok("embedded") => Nodes::Embedded,
            Ok("servers") => Nodes::Servers,
            _ => Nodes::One,
        }
    }
}

/// A relay node on free ports.
pub struct TestRelay {
    /// Where downstreams connect.
    pub address: SocketAddr,
    /// Where agents connect: to another node, if the story has two.
    pub agents: SocketAddr,
    /// The node of the agents, if that is another.
    pub peer: Option<Box<TestRelay>>,
    pub admin: SocketAddr,
    pub admin_token: String,
    pub registry: Arc<Registry>,
    pub shutdown: Shutdown,
    task: AbortOnDropHandle<()>,
    /// The server between the nodes, if there is one.
    pub redis: Option<Redis>,
    _dir: Option<tempfile::TempDir>,
}

impl TestRelay {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// With a changed configuration; the registry is a file of its own.
    pub async fn with(change: impl FnOnce(&mut RelayConfig)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = RelayConfig::default();
        let url = format!("sqlite:{}", dir.path().join("adit.db").display());
        config.database_url = url.parse().expect("a url");
        change(&mut config);
        let mut relay = match Nodes::of_this_run() {
            Nodes::One => Self::run(config, "127.0.0.1:0").await,
            Nodes::Embedded => Self::two(config, &Hub::shared()).await,
            Nodes::Servers => {
                let redis = Redis::start();
                config.redis_url = Some(redis.url().parse().expect("a url"));
                config.database_url = MariaDb::shared().database().await.parse().expect("a url");
                let mut relay = Self::two(config, &Hub::new()).await;
                relay.redis = Some(redis);
                relay
            }
        };
        relay._dir = Some(dir);
        relay
    }

    /// Two nodes of one relay: downstreams at the one, agents at the other.
    pub async fn two(config: RelayConfig, hub: &Arc<Hub>) -> Self {
        let mut one = Self::start_node(Relay::on_hub(config.clone(), hub.clone()), "127.0.0.1:0").await;
        let other = Self::start_node(Relay::on_hub(config, hub.clone()), "127.0.0.1:0").await;
        one.agents = other.address;
        one.peer = Some(Box::new(other));
        one
    }

    /// A node on a given port, with a given registry.
    pub async fn run(config: RelayConfig, listen: &str) -> Self {
        Self::start_node(Relay::new(config), listen).await
    }

    /// A node on a given port.
    pub async fn start_node(relay: Relay, listen: &str) -> Self {
        let public = TcpListener::bind(listen).await.expect("a free port");
        let admin = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let (address, admin_address) = (public.local_addr().expect("bound"), admin.local_addr().expect("bound"));
        let shutdown = Shutdown::new();
        let (ready_tx, ready_rx) = oneshot::channel();
        let told = shutdown.clone();
        let task = tokio::spawn(async move {
            let listeners = Listeners { public, admin };
            let run = relay.run(listeners, told, |ready| drop(ready_tx.send(ready)));
            run.await.expect("the relay runs");
        });
        let ready = within("the relay starts", ready_rx).await.expect("it is ready");
        let admin_token = ready
            .new_admin_token
            .map(|token| token.expose().to_owned())
            .unwrap_or_default();
        Self {
            address,
            agents: address,
            peer: None,
            admin: admin_address,
            admin_token,
            registry: ready.registry,
            shutdown,
            task: AbortOnDropHandle::new(task),
            redis: None,
            _dir: None,
        }
    }

    /// A new client; returns its access token.
    pub async fn client(&self, client_id: &str, auth: NewAuth) -> String {
        let (_, token) = self
            .registry
            .create_client(&id(client_id), auth)
            .await
            .expect("a new client");
        token.expose().to_owned()
    }

    /// Drains, and waits until it is gone.
    pub async fn stop(self) {
        self.shutdown.begin_drain();
        within("the relay drains", self.task).await.expect("no panic");
        if let Some(peer) = self.peer {
            Box::pin(peer.stop()).await;
        }
    }

    /// One request on a connection of its own.
    pub async fn send(&self, request: Request<AnyBody>) -> Response<Incoming> {
        send(self.address, request).await
    }

    /// `GET path` for a client.
    pub async fn get(&self, client_id: &str, path: &str) -> (u16, HeaderMap, Bytes) {
        let request = Request::get(path)
            .header("host", "relay")
            .header("adit-client", client_id);
        let (head, body) = self.send(request.body(full("")).expect("a request")).await.into_parts();
        let body = within("the body", body.collect())
            .await
            .expect("a whole body")
            .to_bytes();
        (head.status.as_u16(), head.headers, body)
    }
}

pub fn id(client_id: &str) -> ClientId {
    client_id.parse().expect("a client id")
}

/// One request on a connection of its own, with upgrades.
pub async fn send(address: SocketAddr, request: Request<AnyBody>) -> Response<Incoming> {
    let stream = TcpStream::connect(address).await.expect("the relay listens");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .expect("a connection");
    tokio::spawn(connection.with_upgrades());
    within("an answer", sender.send_request(request))
        .await
        .expect("an answer")
}

/// An agent, running.
pub struct TestAgent {
    pub events: broadcast::Sender<Event>,
    shutdown: Shutdown,
    task: AbortOnDropHandle<()>,
}

impl TestAgent {
    /// An agent for `to`, dialling `relay`; waits until all its tunnels are up.
    pub async fn start(relay: SocketAddr, client_id: &str, token: &str, to: SocketAddr) -> Self {
        Self::with(relay, client_id, token, &to.to_string(), |_| {}).await
    }

    pub async fn with(
        relay: SocketAddr,
        client_id: &str,
        token: &str,
        to: &str,
        change: impl FnOnce(&mut agent::Config),
    ) -> Self {
        let relay = format!("http://{relay}").parse().expect("a url");
        let mut config = agent::Config::new(
            relay,
            id(client_id),
            token.parse().expect("a token"),
            to.parse().expect("an upstream"),
        );
        change(&mut config);
        let connections = config.connections;
        let (events, mut heard) = broadcast::channel(4096);
        let (shutdown, tell) = (Shutdown::new(), events.clone());
        let told = shutdown.clone();
        let task = tokio::spawn(async move {
            let agent = Agent::new(config).expect("a configuration");
            agent.run(told, move |event| drop(tell.send(event))).await;
        });
        for _ in 0..connections {
            within("a tunnel", connected(&mut heard)).await;
        }
        Self {
            events,
            shutdown,
            task: AbortOnDropHandle::new(task),
        }
    }

    /// Waits for the next tunnel that comes up.
    pub async fn reconnected(&self) {
        within("a tunnel comes back", connected(&mut self.events.subscribe())).await;
    }

    /// Finishes what is in flight, and says goodbye.
    pub async fn stop(self) {
        self.shutdown.begin_drain();
        within("the agent leaves", self.task).await.expect("no panic");
    }

    /// Says goodbye, and ends what is in flight.
    pub async fn end_now(self) {
        self.shutdown.end_now();
        within("the agent leaves", self.task).await.expect("no panic");
    }

    /// Ends like a killed process: no goodbye.
    pub async fn kill(self) {
        self.task.abort();
        let _ = within("the agent dies", self.task).await;
    }
}

async fn connected(events: &mut broadcast::Receiver<Event>) {
    loop {
        match events.recv().await {
            Ok(Event::Connected { .. }) => return,
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => panic!("the agent ended"),
        }
    }
}

/// A local server that answers by a function, HTTP/1.1 and HTTP/2, with upgrades.
pub struct TestUpstream {
    pub address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

impl TestUpstream {
    pub async fn start<F, Fut>(serve: F) -> Self
    where
        F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).ok();
                connections.spawn(serve_connection(stream, serve.clone()));
            }
        });
        Self {
            address,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// Answers with method, target, headers and body of the request, as text.
    pub async fn echo() -> Self {
        Self::start(|request| async move {
            let (head, body) = request.into_parts();
            let mut text = format!("{} {}\n", head.method, head.uri).into_bytes();
            for (name, value) in &head.headers {
                text.extend_from_slice(name.as_str().as_bytes());
                text.extend_from_slice(b": ");
                text.extend_from_slice(value.as_bytes());
                text.push(b'\n');
            }
            text.push(b'\n');
            text.extend_from_slice(&body.collect().await.map(|body| body.to_bytes()).unwrap_or_default());
            Response::new(full(text))
        })
        .await
    }
}

/// Serves one connection of an upstream, until it ends.
pub async fn serve_connection<S, F, Fut>(stream: S, serve: F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response<AnyBody>> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = serve(request);
        async move { Ok::<_, AnyError>(answer.await) }
    });
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    connection.await.ok();
}

/// Bytes that tell where they belong: any crossing or loss is seen.
pub fn pattern(stream: u64, offset: u64, length: usize) -> Bytes {
    (offset..offset + length as u64)
        .map(|at| ((at ^ stream).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
        .collect()
}
