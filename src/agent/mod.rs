//! The agent: dials out from next to the upstream, holds tunnels to relay nodes, and calls the upstream for what comes
//! through them. `adit http` is this and a printer of [`Event`]s; a Rust program can embed it the same way:
//!
//! ```
//! # #[tokio::main]
//! # async fn main() -> anyhow::Result<()> {
//! use adit::{agent::{Agent, Config, Event}, shutdown::Shutdown};
//!
//! // No relay listens there: the agent says so, and goes on trying until it is told to end.
//! let relay = "http://127.0.0.1:9".parse()?;
//! let mut config = Config::new(relay, "home".parse()?, "adit_token".parse()?, "3000".parse()?);
//! config.connections = 1;
//! let shutdown = Shutdown::new(); // a program of its own takes `shutdown::signals()`
//! let told = shutdown.clone();
//! Agent::new(config)?
//!     .run(shutdown, move |event| match event {
//!         Event::Connected { public_url, .. } => println!("reached at {public_url}"),
//!         Event::Disconnected { why, .. } => {
//!             println!("{why}");
//!             told.begin_drain();
//!         }
//!         Event::Request { method, target, .. } => println!("{method} {target}"),
//!     })
//!     .await;
//! # Ok(())
//! # }
//! ```
//!
//! - [`dial`]: one tunnel's connection and handshake
//! - [`slot`]: keeps one tunnel open for ever
//! - [`host`]: what is done with an exchange
//! - [`upstream`]: one request to the local server, and its answer back
//! - [`publish`]: the local endpoint by which the upstream speaks to the client's subscribers

use std::{sync::Arc, time::Duration};

mod dial;
mod host;
mod publish;
mod slot;
mod upstream;

pub use dial::DialError;

use tokio::net::TcpListener;

use crate::{
    config::{self, HostHeader, RelayUrl, UpstreamUrl},
    exchange::path::Owner,
    ids::{ClientId, InstanceId, NodeId},
    secret::Secret,
    shutdown::Shutdown,
    tls,
};

/// Tunnels an agent may hold: a few, on as many nodes, are enough (Teleport RFD 69 tells of the others).
pub const MAX_CONNECTIONS: u32 = config::agent::MAX_CONNECTIONS as u32;

/// What an agent needs to know.
#[derive(Clone)]
pub struct Config {
    /// Where the relay's public listener is.
    pub relay: RelayUrl,
    /// The client it serves.
    pub client_id: ClientId,
    /// An access token of that client.
    pub token: Secret,
    /// What it serves it with.
    pub upstream: UpstreamUrl,
    /// The Host header that the upstream sees.
    pub host_header: HostHeader,
    /// Whether an `https` upstream's certificate is not checked.
    pub insecure: bool,
    /// Tunnels to hold, 1 to [`MAX_CONNECTIONS`].
    pub connections: u32,
}

impl Config {
    /// A configuration with defaults for what is optional.
    pub fn new(relay: RelayUrl, client_id: ClientId, token: Secret, upstream: UpstreamUrl) -> Self {
        Self {
            relay,
            client_id,
            token,
            upstream,
            host_header: HostHeader::Keep,
            insecure: false,
            connections: u32::from(config::agent::DEFAULT_CONNECTIONS),
        }
    }
}

/// Why an agent cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A value of the configuration; the text says which and what to do.
    #[error("{0}")]
    Invalid(String),
    /// The system's certificates cannot be read.
    #[error("https:// needs this machine's root certificates (install ca-certificates): {0}")]
    Certificates(std::io::Error),
}

/// What an agent tells whoever runs it.
#[derive(Debug, Clone)]
pub enum Event {
    /// A tunnel is up.
    Connected {
        /// Which of the tunnels, from 0.
        slot: u32,
        /// The node that holds it.
        node_id: NodeId,
        /// Where the client is reached.
        public_url: String,
    },
    /// A tunnel could not be opened, or was lost.
    Disconnected {
        /// Which of the tunnels.
        slot: u32,
        /// Why, as a sentence that says what to do.
        why: String,
        /// The next attempt comes after this.
        retry_in: Duration,
    },
    /// A request was served, or broke off.
    Request {
        /// Its method.
        method: http::Method,
        /// Its path and query; bytes that are not UTF-8 are replaced.
        target: String,
        /// The upstream's status, if it answered.
        status: Option<u16>,
        /// Bytes of the response's body.
        bytes: u64,
        /// From its arrival to its end.
        duration: Duration,
        /// Why it broke off, if it did.
        broken: Option<crate::wire::frame::Code>,
    },
}

/// Takes the events of an agent; called from its tasks, so it must not block for long.
pub(crate) type Listener = Arc<dyn Fn(Event) + Send + Sync>;

/// An agent that is not running yet.
pub struct Agent {
    config: Config,
    tls: Arc<rustls::ClientConfig>,
    caller: upstream::Caller,
    publishing: Option<(publish::Publisher, TcpListener)>,
}

impl Agent {
    /// Checks the configuration; connects to nothing.
    pub fn new(config: Config) -> Result<Self, AgentError> {
        if !(1..=MAX_CONNECTIONS).contains(&config.connections) {
            return Err(AgentError::Invalid(format!(
                "connections must be 1 to {MAX_CONNECTIONS}"
            )));
        }
        if config.token.is_empty() || !config.token.expose().bytes().all(|b| b.is_ascii_graphic()) {
            return Err(AgentError::Invalid(
                "the token is empty or has characters that no token has".into(),
            ));
        }
        let tls = tls::client_config(config.relay.tls).map_err(AgentError::Certificates)?;
        let caller = upstream::Caller::new(&config)?;
        Ok(Self {
            config,
            tls: Arc::new(tls),
            caller,
            publishing: None,
        })
    }

    /// Serves `POST /publish` on this listener too, for the programs of this machine: what they post reaches the client's
    /// subscribers. Whoever reaches the listener may publish: a loopback address is the right place for it.
    pub fn publishing_on(mut self, listener: TcpListener) -> Result<Self, AgentError> {
        let publisher = publish::Publisher::new(&self.config, (*self.tls).clone())?;
        self.publishing = Some((publisher, listener));
        Ok(self)
    }

    /// Holds the tunnels and serves requests until `shutdown` says to drain: then the relay is asked for no more, what is
    /// in flight finishes, and the agent says goodbye; at once if told so.
    pub async fn run(self, shutdown: Shutdown, on_event: impl Fn(Event) + Send + Sync + 'static) {
        let owner = Owner {
            client_id: self.config.client_id.clone(),
            instance_id: InstanceId::new(),
        };
        let host = Arc::new(host::Host::new(
            owner,
            host::Upstream::new(self.config.client_id.clone(), self.caller, Arc::new(on_event)),
            host::MAX_EXCHANGES,
        ));
        let dialer = Arc::new(dial::Dialer::new(&self.config, self.tls, host.owner().instance_id));
        let mut slots = tokio::task::JoinSet::new();
        for slot in 0..self.config.connections {
            slots.spawn(slot::hold(slot, host.clone(), dialer.clone()));
        }
        if let Some((publisher, listener)) = self.publishing {
            slots.spawn(publisher.serve(listener));
        }
        let serving = async {
            shutdown.drain().await;
            host.drain().await;
        };
        tokio::select! {
            () = serving => {}
            () = shutdown.now() => {}
            () = host.clone().pass_time() => {}
        }
        host.leave().await;
        slots.shutdown().await;
    }
}
