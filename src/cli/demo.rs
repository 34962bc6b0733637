//! `adit demo`: a relay, an agent and a sample upstream in one process, to see it work.

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr},
};

use clap::Args;
use tokio::{net::TcpListener, sync::oneshot};

use super::{agent, sample, serve::bind};

use crate::{
    cluster::registry::NewAuth,
    config::{
        AgentConfig, HostHeader, RelayConfig, TunnelConfig, UpstreamUrl, agent::DEFAULT_CONNECTIONS, relay::reachable,
    },
    relay::{Listeners, Ready, Relay},
    secret::Secret,
    shutdown::Shutdown,
};

/// Show a relay, an agent and a local server together on this machine
///
/// Keeps nothing: its database is in memory. Prints a URL and a curl line that answer through the tunnel. Ctrl-C ends it.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The local server to tunnel to: 3000, host:port, http://…, https://…, h2c://… or unix:/path [default: a sample]
    #[arg(long, value_name = "PORT_OR_URL")]
    pub(super) to: Option<UpstreamUrl>,
    /// Where the relay listens
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
}

impl DemoArgs {
    /// The demo's relay: clients under `localhost`, whose sub-domains resolvers take for this machine (RFC 6761 §6.3).
    pub fn config(&self) -> anyhow::Result<RelayConfig> {
        let config = RelayConfig {
            listen: self.listen,
            admin_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            database_url: Secret::from("sqlite::memory:".to_owned()),
            domain: Some("localhost".parse()?),
            ..RelayConfig::default()
        };
        config.validate()?;
        Ok(config)
    }
}

/// The demo's only client.
const CLIENT: &str = "demo";

/// Runs the demo until it is told to end.
pub(super) async fn run(config: RelayConfig, to: Option<UpstreamUrl>, shutdown: Shutdown) -> anyhow::Result<()> {
    let listeners = Listeners {
        public: bind(config.listen, "--listen").await?,
        admin: bind(config.admin_listen, "--admin-listen").await?,
    };
    let address = reachable(listeners.public.local_addr()?);
    let (ready_tx, ready_rx) = oneshot::channel();
    let relay = Relay::new(config).run(listeners, shutdown.clone(), |ready| drop(ready_tx.send(ready)));
    let rest = async {
        // The relay ends with an error of its own if it never gets ready.
        let Ok(ready) = ready_rx.await else { return Ok(()) };
        tunnel(&ready, address, to, shutdown).await
    };
    tokio::try_join!(relay, rest).map(|_| ())
}

/// The demo's other half: a client anyone may reach, the upstream, and the agent.
async fn tunnel(ready: &Ready, relay: SocketAddr, to: Option<UpstreamUrl>, shutdown: Shutdown) -> anyhow::Result<()> {
    let (_, token) = ready.registry.create_client(&CLIENT.parse()?, NewAuth::Public).await?;
    let sample = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let to = to.map_or_else(
        || sample.local_addr()?.to_string().parse().map_err(anyhow::Error::from),
        Ok,
    )?;
    let tunnel = TunnelConfig {
        client: CLIENT.parse()?,
        token,
        to,
        host_header: HostHeader::Keep,
        insecure: false,
        publish: None,
    };
    let _ = writeln!(
        std::io::stdout(),
        "A relay listens on http://{relay}, an agent dials it, and behind the agent is {}.\n\n    \
         curl http://{CLIENT}.localhost:{port}/\n    curl -H 'Adit-Client: {CLIENT}' http://{relay}/\n\nCtrl-C ends it.\n",
        tunnel.to,
        port = relay.port()
    );
    let config = AgentConfig {
        relay: format!("http://{relay}").parse()?,
        connections: DEFAULT_CONNECTIONS,
        tunnels: vec![tunnel],
    };
    tokio::select! {
        ended = agent::run(config, shutdown) => ended,
        ended = sample::serve(sample) => Ok(ended?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_is_valid() {
        let listen = "127.0.0.1:8080".parse().expect("an address");
        let config = DemoArgs { to: None, listen }.config().expect("valid");
        let client = "demo".parse().expect("an id");
        assert_eq!(config.client_url(&client, listen), "http://demo.localhost:8080/");
    }
}
