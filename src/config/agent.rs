//! What an agent may be told: `adit.toml` as it is written, and the complete values made of it.

use std::{
    collections::HashSet,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    ConfigError, HostHeader, RelayUrl, UpstreamUrl, check, from_table, read_table,
    values::{de_optional, de_parsed},
};
use crate::{ids::ClientId, secret::Secret};

/// The file that an agent reads if none is named and it is there.
pub const DEFAULT_FILE: &str = "adit.toml";
/// Two, so that one can be lost, or its node be restarted, without a pause.
pub const DEFAULT_CONNECTIONS: u8 = 2;
/// The most connections: more would only spend the relay's memory.
pub const MAX_CONNECTIONS: u8 = 8;

/// An `adit.toml` with every key, as `adit agent --help` shows it.
pub const EXAMPLE_TOML: &str = r#"relay = "https://tunnel.example.org"   # the relay's address
token = "…"                            # the access token of the clients below
connections = 2                        # tunnels held for each client, 1 to 8
client = "home"                        # the client of `adit http` and of tunnels that name none

[[tunnel]]
to = 3000                              # 3000, host:port, http://…, https://…, h2c://… or unix:/path

[[tunnel]]
client = "office"
token = "…"                            # if it is not the one above
to = "https://127.0.0.1:8443"
host_header = "rewrite"                # "keep" (default), "rewrite", or a host
insecure = true                        # accept any certificate of an https upstream
publish = "127.0.0.1:4090"             # POST /publish here reaches the client's subscribers; off by default
"#;

/// `adit.toml` as it is written: everything may be left out, because flags and environment can say it too.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentFile {
    /// The relay's address.
    #[serde(deserialize_with = "de_optional")]
    pub relay: Option<RelayUrl>,
    /// The access token of the tunnels that have none of their own.
    #[serde(deserialize_with = "de_optional")]
    pub token: Option<Secret>,
    /// Tunnels held for each client.
    pub connections: Option<u8>,
    /// The client of the tunnels that name none.
    #[serde(deserialize_with = "de_optional")]
    pub client: Option<ClientId>,
    /// What is tunnelled.
    #[serde(rename = "tunnel")]
    pub tunnels: Vec<TunnelFile>,
}

/// One `[[tunnel]]` as it is written.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunnelFile {
    /// The client that it serves.
    #[serde(default, deserialize_with = "de_optional")]
    pub client: Option<ClientId>,
    /// Its upstream.
    #[serde(deserialize_with = "de_parsed")]
    pub to: UpstreamUrl,
    /// The client's access token, if it is not the file's.
    #[serde(default, deserialize_with = "de_optional")]
    pub token: Option<Secret>,
    /// What the upstream is told as `Host`.
    #[serde(default, deserialize_with = "de_parsed")]
    pub host_header: HostHeader,
    /// Whether any certificate of the upstream is accepted.
    #[serde(default)]
    pub insecure: bool,
    /// Where the upstream may speak to the client's subscribers.
    #[serde(default, deserialize_with = "de_optional")]
    pub publish: Option<SocketAddr>,
}

/// What an agent runs on, complete.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentConfig {
    /// The relay to dial.
    pub relay: RelayUrl,
    /// Tunnels held for each client: 1 to [`MAX_CONNECTIONS`].
    pub connections: u8,
    /// What is tunnelled: at least one, each client once.
    pub tunnels: Vec<TunnelConfig>,
}

/// One tunnel, complete.
#[derive(Debug, Clone, PartialEq)]
pub struct TunnelConfig {
    /// The client that it serves.
    pub client: ClientId,
    /// The client's access token.
    pub token: Secret,
    /// Its upstream.
    pub to: UpstreamUrl,
    /// What the upstream is told as `Host`.
    pub host_header: HostHeader,
    /// Whether any certificate of an `https` upstream is accepted.
    pub insecure: bool,
    /// Where the upstream may speak to the client's subscribers: a loopback address.
    pub publish: Option<SocketAddr>,
}

impl AgentFile {
    /// The file at `path`; without one, [`DEFAULT_FILE`] if it is there, else nothing.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let found = Path::new(DEFAULT_FILE);
        let path = match path {
            Some(path) => path.to_owned(),
            None if found.exists() => PathBuf::from(found),
            None => return Ok(Self::default()),
        };
        from_table(read_table(&path)?, &path)
    }

    /// The complete, valid configuration, or what is missing from it.
    pub fn complete(self) -> Result<AgentConfig, ConfigError> {
        let relay = self.relay.clone().ok_or_else(|| {
            missing(
                "no relay is given: pass --relay URL, set ADIT_RELAY, or write `relay = \"https://…\"` in adit.toml",
            )
        })?;
        let tunnels = self
            .tunnels
            .iter()
            .map(|tunnel| self.complete_tunnel(tunnel))
            .collect::<Result<_, _>>()?;
        let connections = self.connections.unwrap_or(DEFAULT_CONNECTIONS);
        let config = AgentConfig {
            relay,
            connections,
            tunnels,
        };
        config.validate().map(|()| config)
    }

    fn complete_tunnel(&self, tunnel: &TunnelFile) -> Result<TunnelConfig, ConfigError> {
        let to = &tunnel.to;
        let client = tunnel.client.as_ref().or(self.client.as_ref()).ok_or_else(|| {
            missing(format!(
                "no client is given for the tunnel to {to}: pass --client NAME, set ADIT_CLIENT, or write `client = \"…\"` in adit.toml"
            ))
        })?;
        let token = tunnel.token.as_ref().or(self.token.as_ref()).ok_or_else(|| {
            missing(format!(
                "no token is given for client `{client}`: pass --token, set ADIT_TOKEN, or write `token = \"…\"` in adit.toml (`adit client create {client}` prints one)"
            ))
        })?;
        Ok(TunnelConfig {
            client: client.clone(),
            token: token.clone(),
            to: to.clone(),
            host_header: tunnel.host_header.clone(),
            insecure: tunnel.insecure,
            publish: tunnel.publish,
        })
    }
}

fn missing(text: impl Into<String>) -> ConfigError {
    ConfigError::Missing(text.into())
}

impl AgentConfig {
    /// Whether the values make sense together and alone; the error names the key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let connections = (1..=MAX_CONNECTIONS).contains(&self.connections);
        check(connections, "connections", "must be from 1 to 8")?;
        check(
            !self.tunnels.is_empty(),
            "tunnel",
            "is missing: write a `[[tunnel]]` with `client` and `to`",
        )?;
        let mut clients = HashSet::new();
        for tunnel in &self.tunnels {
            tunnel.validate()?;
            if !clients.insert(&tunnel.client) {
                let why = format!(
                    "is `{}` in two tunnels, but a client has one upstream: rename one",
                    tunnel.client
                );
                return Err(ConfigError::Key {
                    key: "tunnel.client",
                    why,
                });
            }
        }
        Ok(())
    }
}

impl TunnelConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let tls = matches!(self.to, UpstreamUrl::Https(_));
        let why = "is about certificates, but the upstream is not https: leave it out, or write https://…";
        check(tls || !self.insecure, "tunnel.insecure", why)?;
        let is_local = self.publish.is_none_or(|address| address.ip().is_loopback());
        let why = "must be a loopback address, like 127.0.0.1:4090: whoever reaches it may publish";
        check(is_local, "tunnel.publish", why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AgentConfig, ConfigError> {
        let file: AgentFile = from_table(text.parse().expect("TOML"), Path::new("adit.toml"))?;
        file.complete()
    }

    const TOP: &str = "relay = \"http://r:1\"\ntoken = \"t\"\n";

    #[test]
    fn the_example_of_the_help_is_complete() {
        let config = parse(EXAMPLE_TOML).expect("valid");
        assert_eq!(config.relay.to_string(), "https://tunnel.example.org");
        assert_eq!(config.connections, DEFAULT_CONNECTIONS);
        let [home, office] = config.tunnels.as_slice() else {
            panic!("two tunnels")
        };
        assert_eq!(
            (home.client.as_str(), home.to.to_string().as_str()),
            ("home", "http://localhost:3000")
        );
        assert_eq!((&home.host_header, home.insecure), (&HostHeader::Keep, false));
        assert_eq!(
            (office.client.as_str(), &office.host_header),
            ("office", &HostHeader::Rewrite)
        );
        assert!(office.insecure);
        assert_eq!(office.publish, Some("127.0.0.1:4090".parse().expect("an address")));
    }

    #[test]
    fn a_tunnels_own_token_wins() {
        let config = parse(&format!(
            "{TOP}[[tunnel]]\nclient = \"a\"\nto = \"3000\"\ntoken = \"own\""
        ))
        .expect("valid");
        assert_eq!(config.tunnels[0].token.expose(), "own");
        assert!(!format!("{config:?}").contains("own"));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let tunnel = "[[tunnel]]\nclient = \"a\"\nto = 3000\n";
        for (text, said) in [
            ("".to_owned(), "--relay"),
            (TOP.to_owned(), "`tunnel`"),
            (format!("relay = \"http://r:1\"\n{tunnel}"), "ADIT_TOKEN"),
            (format!("{TOP}[[tunnel]]\nto = 3000"), "ADIT_CLIENT"),
            (format!("{TOP}[[tunnel]]\nclient = \"a\""), "`to`"),
            (format!("{TOP}[[tunnel]]\nclient = \"A\"\nto = 1"), "client id"),
            (format!("{TOP}[[tunnel]]\nclient = \"a\"\nto = \"x\""), "has no port"),
            (format!("{TOP}[[tunnel]]\nclient = \"a\"\nto = true"), "tunnel.to"),
            (format!("{TOP}{tunnel}hots_header = \"x\""), "`hots_header`"),
            (format!("{TOP}{tunnel}insecure = true"), "`tunnel.insecure`"),
            (format!("{TOP}{tunnel}publish = \"0.0.0.0:4090\""), "`tunnel.publish`"),
            (format!("{TOP}{tunnel}publish = \"4090\""), "tunnel.publish"),
            (format!("{TOP}{tunnel}{tunnel}"), "`tunnel.client`"),
            (format!("{TOP}connections = 9\n{tunnel}"), "`connections`"),
            (format!("{TOP}connections = 900\n{tunnel}"), "`connections`"),
            (format!("relais = \"x\"\n{TOP}{tunnel}"), "`relais`"),
        ] {
            let refused = parse(&text).expect_err(&text).to_string();
            assert!(refused.contains(said), "{text}: {refused}");
        }
    }

    #[test]
    fn a_named_file_must_be_there() {
        let refused = AgentFile::load(Some(Path::new("/nowhere/adit.toml")))
            .expect_err("not there")
            .to_string();
        assert!(refused.contains("/nowhere/adit.toml"), "{refused}");
    }
}
