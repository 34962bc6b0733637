//! The relay: one node. [`Relay::new`] touches nothing; [`Relay::run`] serves until told to stop, then drains.
//!
//! In the order in which a request meets them:
//! - [`downstream`]: connections, their limits and deadlines
//! - [`routes`]: every route · [`strict`]: which heads are let in · [`client_of`]: whose they are
//! - `auth_api`: credentials, made and checked · `cors`: who else's pages may read the answers
//! - [`ingress`]: a request for a client, step by step · [`limits`] · [`auth`] · [`router`] · [`respond`]: its answer
//! - [`switchboard`]: tunnels, exchanges and peers, and how they follow each other; without sockets
//! - [`tunnels`]: the agents' sockets that this node holds, or knows its peers to hold
//! - [`fanout`]: a client's messages to its subscribers, on all nodes · `publish` and [`subscribe`]: its two doors
//! - [`accept`]: the door that agents come in by · [`taker`]: what comes by it · [`inbox`]: what comes from peers
//! - [`moosicbox`]: the tunnels of MoosicBox's servers, and their apps
//! - [`lifecycle`]: time, revocations, drain · [`admin`]: the operator's listener · `operated`: what of the node it shows

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{net::TcpListener, sync::Semaphore, sync::watch};
use tokio_util::task::TaskTracker;

pub mod accept;
mod address;
pub mod admin;
pub mod auth;
mod auth_api;
mod authority;
pub mod client_of;
mod cors;
pub mod downstream;
pub mod fanout;
pub mod forward;
pub mod forwarded;
mod inbox;
pub mod ingress;
pub mod lifecycle;
pub mod limits;
pub mod moosicbox;
mod operated;
pub mod out_body;
mod publish;
pub mod respond;
pub mod router;
pub mod routes;
pub mod strict;
pub mod subscribe;
pub mod switchboard;
pub mod taker;
pub mod tunnels;

use self::switchboard::Switchboard;
use crate::{
    cluster::{
        bus::{Bus, local::Hub},
        registry::{Node, Registry},
        store::Store,
    },
    config::RelayConfig,
    error::Cause,
    secret::Secret,
    shutdown::Shutdown,
    telemetry::AuthFailure,
};

/// The memory for buffered responses is counted in pieces of this many bytes.
const BUFFER_UNIT: usize = 4 * 1024;

/// What all parts of a running node share.
pub struct State {
    /// The configuration, as validated.
    pub config: RelayConfig,
    /// Where the public listener is.
    pub bound: SocketAddr,
    /// The limits of request heads.
    pub limits: strict::Limits,
    /// Who holds what, and who may do what.
    pub registry: Arc<Registry>,
    /// What one client and one address may ask.
    pub quotas: limits::Limits,
    /// Credentials and their checks.
    pub auth: auth::Auth,
    /// Tunnels, exchanges, peers.
    pub board: Arc<Switchboard>,
    /// Tunnels and upgraded connections: waited for at the end.
    pub tasks: TaskTracker,
    /// Memory left for buffered responses, in [`BUFFER_UNIT`]s.
    pub buffers: Arc<Semaphore>,
    /// Room left for what slow downstreams have not taken of MoosicBox servers' answers.
    pub spool: Arc<moosicbox::spool::Budget>,
    /// Set once, when the node begins to leave: by when it has to be gone.
    pub drain_until: watch::Sender<Option<Instant>>,
}

impl State {
    fn new(config: RelayConfig, registry: Arc<Registry>, bus: Bus, bound: SocketAddr) -> Self {
        let board = Switchboard::new(config.tunnels.clone(), registry.node_id(), bus, registry.clone());
        let limits = strict::Limits {
            target: config.http.max_target,
            headers: config.http.max_header_bytes,
            fields: config.http.max_headers,
        };
        Self {
            limits,
            quotas: limits::Limits::new(&config.limits, config.trusted_proxies.clone(), board.exchanges.clock()),
            auth: auth::Auth::new(registry.clone()),
            registry,
            board: Arc::new(board),
            tasks: TaskTracker::new(),
            buffers: Arc::new(Semaphore::new(config.http.buffered_total / BUFFER_UNIT)),
            spool: moosicbox::spool::Budget::new(config.moosicbox.spool_limit as u64),
            drain_until: watch::Sender::new(None),
            bound,
            config,
        }
    }

    fn count_auth_failure(&self, cause: &Cause, who: AuthFailure) {
        if matches!(
            cause,
            Cause::Unauthorized | Cause::UnauthorizedBasic | Cause::TooMany(..)
        ) {
            self.board.metrics.auth_failure(who);
        }
    }

    /// Whether the node is leaving.
    pub fn is_draining(&self) -> bool {
        self.drain_until.borrow().is_some()
    }

    /// How long it still may take, if it is leaving.
    pub fn drain_left(&self) -> Option<Duration> {
        self.drain_until
            .borrow()
            .map(|until| until.saturating_duration_since(Instant::now()))
    }
}

/// The sockets a relay listens on; port 0 is as good as any.
pub struct Listeners {
    /// For downstreams and agents.
    pub public: TcpListener,
    /// For the operator.
    pub admin: TcpListener,
}

/// What a relay says once it is serving.
pub struct Ready {
    /// For whoever embeds the relay: clients and tokens, without the admin API.
    pub registry: Arc<Registry>,
    /// The admin token, if one was made now: shown once, stored only as a hash.
    pub new_admin_token: Option<Secret>,
}

/// A relay node that is not running yet.
///
/// ```
/// # #[tokio::main]
/// # async fn main() -> anyhow::Result<()> {
/// use adit::{config::RelayConfig, relay::{Listeners, Relay}, shutdown::Shutdown};
/// use tokio::net::TcpListener;
///
/// let listeners = Listeners {
///     public: TcpListener::bind("127.0.0.1:0").await?,
///     admin: TcpListener::bind("127.0.0.1:0").await?,
/// };
/// let config = RelayConfig { database_url: "sqlite::memory:".parse()?, ..RelayConfig::default() };
/// let shutdown = Shutdown::new(); // a program of its own takes `shutdown::signals()`
/// let told = shutdown.clone();
/// Relay::new(config).run(listeners, shutdown, move |ready| {
///     if let Some(token) = ready.new_admin_token {
///         println!("node {}, admin token {}", ready.registry.node_id(), token.expose());
///     }
///     told.begin_drain(); // this one has done enough
/// }).await
/// # }
/// ```
pub struct Relay {
    config: RelayConfig,
    hub: Arc<Hub>,
}

impl Relay {
    /// Touches nothing.
    pub fn new(config: RelayConfig) -> Self {
        let hub = Hub::new();
        Self { config, hub }
    }

    /// One of several nodes in this process, which share a registry and, instead of Redis, this hub. Touches nothing.
    pub fn on_hub(config: RelayConfig, hub: Arc<Hub>) -> Self {
        Self { config, hub }
    }

    /// Opens the registry, serves, and drains when `shutdown` says so. `on_ready` is called once requests are served.
    pub async fn run(
        self,
        listeners: Listeners,
        shutdown: Shutdown,
        on_ready: impl FnOnce(Ready),
    ) -> anyhow::Result<()> {
        let bus = match &self.config.redis_url {
            Some(url) => Bus::redis(url)?,
            None => Bus::local(&self.hub),
        };
        let tls = downstream::tls::Tls::load(&self.config.tls)?;
        let store = tokio::select! {
            opened = Store::open_within(self.config.database_url.expose(), self.config.database_wait) => opened?,
            () = shutdown.drain() => return Ok(()),
        };
        let node = Node::new(&address::of_machine(listeners.admin.local_addr()?).to_string());
        let registry = Arc::new(Registry::new(store, node));
        let given = self.config.admin_token.as_ref().map(|token| token.expose());
        let new_admin_token = registry.ensure_admin_token(given).await?;
        let state = Arc::new(State::new(
            self.config,
            registry.clone(),
            bus,
            listeners.public.local_addr()?,
        ));
        lifecycle::run(state, listeners, tls, shutdown, move || {
            on_ready(Ready {
                registry,
                new_admin_token,
            })
        })
        .await
    }
}
