//! `adit http`: one tunnel, to one local server.

use std::net::SocketAddr;

use clap::Args;

use super::{Given, LinkArgs, parsed, set_some};
use crate::{
    config::{AgentConfig, HostHeader, TunnelFile, UpstreamUrl},
    ids::ClientId,
};

/// Reach one local server through a relay
///
/// Prints its public URL, and a line a request. Reconnects for ever. What the flags leave out is taken from adit.toml,
/// except its `[[tunnel]]`s: those are for `adit agent`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    adit http 3000 --relay https://tunnel.example.org --client home --token adit_…\n  \
    adit http https://127.0.0.1:8443 --insecure --host-header rewrite\n  \
    adit http h2c://127.0.0.1:50051\n  \
    adit http unix:/run/app.sock\n  \
    adit http 3000 --publish 127.0.0.1:4090\n")]
pub struct HttpArgs {
    /// The local server: 3000, host:port, http://…, https://…, h2c://… (gRPC) or unix:/path/to.sock
    #[arg(value_name = "PORT_OR_URL")]
    to: UpstreamUrl,
    /// The client that it answers as [default: from the file]
    #[arg(long, env = "ADIT_CLIENT", value_name = "NAME", value_parser = parsed::<ClientId>)]
    client: Option<Given<ClientId>>,
    /// What the local server is told as Host: `keep`, `rewrite` (its own address), or a host [default: keep]
    #[arg(long, env = "ADIT_HOST_HEADER", value_name = "HOST", value_parser = parsed::<HostHeader>)]
    host_header: Option<Given<HostHeader>>,
    /// Accept any certificate of a local server on https:// [default: only valid ones]
    #[arg(long)]
    insecure: bool,
    /// Let the local server speak to the client's subscribers by POST /publish on this address, like 127.0.0.1:4090
    /// [default: off]
    #[arg(long, env = "ADIT_PUBLISH", value_name = "ADDRESS", value_parser = parsed::<SocketAddr>)]
    publish: Option<Given<SocketAddr>>,
    #[command(flatten)]
    link: LinkArgs,
}

impl HttpArgs {
    /// Flags and environment over the file over the defaults, complete and validated.
    pub fn config(&self) -> anyhow::Result<AgentConfig> {
        let mut file = self.link.file()?;
        set_some(&mut file.client, &self.client);
        let mut host_header = None;
        set_some(&mut host_header, &self.host_header);
        let mut publish = None;
        set_some(&mut publish, &self.publish);
        file.tunnels = vec![TunnelFile {
            client: None,
            to: self.to.clone(),
            token: None,
            host_header: host_header.unwrap_or_default(),
            insecure: self.insecure,
            publish,
        }];
        Ok(file.complete()?)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Plan};

    fn config(arguments: &[&str]) -> anyhow::Result<AgentConfig> {
        let cli = Cli::try_parse_from(["adit", "http"].iter().chain(arguments))?;
        match cli.plan()?.1 {
            Plan::Agent(config) => Ok(config),
            other => panic!("{other:?} is no agent"),
        }
    }

    const LINK: [&str; 3] = ["--relay=http://127.0.0.1:8080", "--client=home", "--token=t"];

    #[test]
    fn one_tunnel_from_flags_alone() {
        let found =
            config(&[&["3000", "--host-header=rewrite", "--connections=1"], &LINK[..]].concat()).expect("valid");
        assert_eq!(
            (found.relay.to_string().as_str(), found.connections),
            ("http://127.0.0.1:8080", 1)
        );
        let [tunnel] = found.tunnels.as_slice() else {
            panic!("one tunnel")
        };
        assert_eq!((tunnel.client.as_str(), tunnel.token.expose()), ("home", "t"));
        assert_eq!(
            (tunnel.to.to_string().as_str(), &tunnel.host_header),
            ("http://localhost:3000", &HostHeader::Rewrite)
        );
    }

    #[test]
    fn the_rest_comes_from_the_file_without_its_tunnels() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = "relay = \"https://r\"\ntoken = \"f\"\nclient = \"file\"\n[[tunnel]]\nclient = \"other\"\nto = 1";
        std::fs::write(file.path(), text).expect("written");
        let found = config(&["3000", "--config", file.path().to_str().expect("text")]).expect("valid");
        let [tunnel] = found.tunnels.as_slice() else {
            panic!("one tunnel")
        };
        assert_eq!(
            (tunnel.client.as_str(), tunnel.token.expose(), found.connections),
            ("file", "f", 2)
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (arguments, said) in [
            (&["localhost"][..], "has no port"),
            (&["3000", "--client=A"], "--client"),
            (&["3000", "--host-header=a b"], "--host-header"),
            (&["3000", "--connections=many"], "--connections"),
            (&["3000", "--connections=9"], "`connections`"),
            (&["3000", "--insecure"], "`tunnel.insecure`"),
            (&["3000", "--publish=0.0.0.0:4090"], "`tunnel.publish`"),
            (&["3000", "--publish=4090"], "--publish"),
            (&["3000", "--relay="], "--relay URL"),
        ] {
            let mut all = arguments.to_vec();
            all.extend(LINK.iter().filter(|flag| {
                !arguments
                    .iter()
                    .any(|given| flag.starts_with(&given[..given.len().min(8)]))
            }));
            let refused = config(&all).expect_err(said).to_string();
            assert!(refused.contains(said), "{all:?}: {refused}");
        }
    }
}
