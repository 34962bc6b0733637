//! What `adit serve` may be told. The values' meaning and defaults are in `config.default.toml`, which is part of this.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use serde::Deserialize;

use super::{
    ConfigError, Domain, RelayUrl, check, from_table, overlay, read_table,
    values::{de_address, de_duration, de_networks, de_optional, de_size},
};
use crate::{cluster::bus::Bus, ids::ClientId, secret::Secret, telemetry::LogFormat};

/// The documented defaults: every key is in it, and it is what [`RelayConfig::default`] reads.
pub const DEFAULT_TOML: &str = include_str!("../../config.default.toml");

/// The least [`HttpConfig::max_header_bytes`]: hyper reads a head into a buffer of at least this.
const HEADER_BYTES_MIN: usize = 8 * 1024;
/// The most header fields that may be allowed: each costs memory before anything is known about the request.
const HEADERS_MAX: usize = 1_000;
/// The largest head that may be allowed, for the same reason.
const HEADER_BYTES_MAX: usize = 1024 * 1024;

/// The whole of it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayConfig {
    /// Where downstreams and agents connect.
    #[serde(deserialize_with = "de_address")]
    pub listen: SocketAddr,
    /// Where health and metrics are served.
    #[serde(deserialize_with = "de_address")]
    pub admin_listen: SocketAddr,
    /// The registry's database; a secret because it may hold a password.
    pub database_url: Secret,
    /// The bus between nodes; a secret because it may hold a password. `None`: this node is alone.
    #[serde(deserialize_with = "de_optional")]
    pub redis_url: Option<Secret>,
    /// The domain whose sub-domains are the clients.
    #[serde(deserialize_with = "de_optional")]
    pub domain: Option<Domain>,
    /// How the internet sees this relay.
    #[serde(deserialize_with = "de_optional")]
    pub public_url: Option<RelayUrl>,
    /// The credential of the admin API; `None`: to be made and printed once.
    #[serde(deserialize_with = "de_optional")]
    pub admin_token: Option<Secret>,
    /// Whose forwarding headers are believed.
    #[serde(deserialize_with = "de_networks")]
    pub trusted_proxies: Vec<IpNet>,
    /// How long a relay that starts waits for its database.
    #[serde(deserialize_with = "de_duration")]
    pub database_wait: Duration,
    /// How long a leaving relay lets its exchanges finish.
    #[serde(deserialize_with = "de_duration")]
    pub drain_timeout: Duration,
    /// Tunnels: waiting for them, losing them, and whether they live.
    pub tunnels: TunnelsConfig,
    /// The limits of a request and its response.
    pub http: HttpConfig,
    /// TLS on the public listener.
    pub tls: TlsConfig,
    /// What one client and one address may ask.
    pub limits: LimitsConfig,
    /// The pages that may call clients from elsewhere.
    pub cors: CorsConfig,
    /// What MoosicBox servers cost.
    pub moosicbox: MoosicBoxConfig,
    /// What is logged, and how.
    pub log: LogConfig,
}

/// `[tunnels]`: waiting for them, losing them, and whether they live.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunnelsConfig {
    /// How long a request waits for a tunnel; zero: not at all.
    #[serde(deserialize_with = "de_duration")]
    pub park_timeout: Duration,
    /// A request waits only if its client was connected within this time.
    #[serde(deserialize_with = "de_duration")]
    pub park_memory: Duration,
    /// How long exchanges outlive their last tunnel; zero: not at all.
    #[serde(deserialize_with = "de_duration")]
    pub resume_timeout: Duration,
    /// How often an idle tunnel is asked whether it lives.
    #[serde(deserialize_with = "de_duration")]
    pub ping_interval: Duration,
    /// How long it has to answer.
    #[serde(deserialize_with = "de_duration")]
    pub ping_timeout: Duration,
    /// The most tunnels of one client on this node.
    pub max_tunnels_per_client: usize,
}

/// `[http]`: the limits of a request and its response. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// Until the request line and headers are in.
    #[serde(deserialize_with = "de_duration")]
    pub head_timeout: Duration,
    /// The longest pause inside a request body.
    #[serde(deserialize_with = "de_duration")]
    pub body_idle_timeout: Duration,
    /// The longest time that an answer stays unread.
    #[serde(deserialize_with = "de_duration")]
    pub write_idle_timeout: Duration,
    /// Until the upstream's response head.
    #[serde(deserialize_with = "de_duration")]
    pub response_timeout: Duration,
    /// The longest request target.
    #[serde(deserialize_with = "de_size")]
    pub max_target: usize,
    /// The most header fields.
    pub max_headers: usize,
    /// The longest request head.
    #[serde(deserialize_with = "de_size")]
    pub max_header_bytes: usize,
    /// The largest response answered whole.
    #[serde(deserialize_with = "de_size")]
    pub buffered_limit: usize,
    /// All of them together.
    #[serde(deserialize_with = "de_size")]
    pub buffered_total: usize,
    /// The most connections.
    pub max_connections: usize,
    /// The most connections from one address.
    pub max_connections_per_address: usize,
}

/// `[tls]`: TLS on the public listener, from files in PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The certificate, and those between it and a root.
    #[serde(deserialize_with = "de_optional")]
    pub cert: Option<PathBuf>,
    /// Its key.
    #[serde(deserialize_with = "de_optional")]
    pub key: Option<PathBuf>,
}

/// `[limits]`: what one client and one address may ask of this node; zero: no limit.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsConfig {
    /// Requests a second for one client.
    pub client_requests_per_second: u32,
    /// Requests at a time for one client.
    pub client_concurrent: usize,
    /// Requests a second from one address.
    pub address_requests_per_second: u32,
    /// Requests at a time from one address.
    pub address_concurrent: usize,
}

/// `[cors]`: the pages of other origins that may call clients on the relay's own host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorsConfig {
    /// Origins as browsers write them, or `*` for any; none: the relay says nothing of it.
    pub origins: Vec<String>,
}

/// `[moosicbox]`: what MoosicBox servers cost. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoosicBoxConfig {
    /// What slow downstreams have not taken of all answers together, in files; zero: none.
    #[serde(deserialize_with = "de_size")]
    pub spool_limit: usize,
}

/// `[log]`: what is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// For people or for machines.
    pub format: LogFormat,
    /// Levels by module, as `tracing_subscriber::EnvFilter` reads them.
    pub filter: String,
}

impl Default for RelayConfig {
    fn default() -> Self {
        let table = DEFAULT_TOML
            .parse()
            .expect("config.default.toml is TOML: a test reads it");
        from_table(table, Path::new("config.default.toml")).expect("it has every key: a test reads it")
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        RelayConfig::default().log
    }
}

impl RelayConfig {
    /// The defaults, under what the file at `path` says. Not yet validated: flags may still change it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::over_defaults(read_table(path)?, path)
    }

    fn over_defaults(file: toml::Table, path: &Path) -> Result<Self, ConfigError> {
        let mut table = DEFAULT_TOML
            .parse()
            .expect("config.default.toml is TOML: a test reads it");
        overlay(&mut table, file);
        from_table(table, path)
    }

    /// Whether the values make sense together and alone; the error names the key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let same = self.listen == self.admin_listen && self.listen.port() != 0;
        check(
            !same,
            "admin_listen",
            "is the same as `listen`: give it an address or a port of its own",
        )?;
        let url = self.database_url.expose();
        check(
            ["sqlite:", "mysql://", "mariadb://"]
                .iter()
                .any(|scheme| url.starts_with(scheme)),
            "database_url",
            "is not a database served here: write `sqlite:FILE` or `mysql://user:password@host:3306/database`",
        )?;
        if let Some(Err(error)) = self.redis_url.as_ref().map(Bus::redis) {
            return check(false, "redis_url", &error.to_string());
        }
        self.tunnels.validate()?;
        self.http.validate()?;
        self.tls.validate()?;
        self.cors.validate()?;
        self.log.validate()
    }

    /// What agents and people are told: the URL at which `client` is reached on this relay.
    ///
    /// `bound` is the address that [`RelayConfig::listen`] became (its port may have been 0).
    pub fn client_url(&self, client: &ClientId, bound: SocketAddr) -> String {
        let (bare, usual_port) = match self.tls.is_on() {
            true => ("https", 443),
            false => ("http", 80),
        };
        let scheme = self.public_url.as_ref().map_or(bare, RelayUrl::scheme);
        match (&self.domain, &self.public_url) {
            (Some(domain), Some(public)) => match public.authority.port_u16() {
                Some(port) => format!("{scheme}://{client}.{domain}:{port}/"),
                None => format!("{scheme}://{client}.{domain}/"),
            },
            (Some(domain), None) if bound.port() == usual_port => format!("{scheme}://{client}.{domain}/"),
            (Some(domain), None) => format!("{scheme}://{client}.{domain}:{}/", bound.port()),
            (None, Some(public)) => format!("{public}/?clientId={client}"),
            (None, None) => format!("{scheme}://{}/?clientId={client}", reachable(bound)),
        }
    }
}

/// The address by which a listener at `bound` is reached from this machine.
pub fn reachable(bound: SocketAddr) -> SocketAddr {
    let mut address = bound;
    if bound.ip().is_unspecified() {
        address.set_ip(match bound {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

impl TunnelsConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        positive(self.ping_interval, "tunnels.ping_interval")?;
        positive(self.ping_timeout, "tunnels.ping_timeout")?;
        let some = self.max_tunnels_per_client > 0;
        check(
            some,
            "tunnels.max_tunnels_per_client",
            "must be at least 1, or no agent can connect",
        )
    }
}

impl HttpConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        positive(self.head_timeout, "http.head_timeout")?;
        positive(self.body_idle_timeout, "http.body_idle_timeout")?;
        positive(self.write_idle_timeout, "http.write_idle_timeout")?;
        positive(self.response_timeout, "http.response_timeout")?;
        let headers = (1..=HEADERS_MAX).contains(&self.max_headers);
        check(headers, "http.max_headers", "must be from 1 to 1000")?;
        let head = (HEADER_BYTES_MIN..=HEADER_BYTES_MAX).contains(&self.max_header_bytes);
        check(head, "http.max_header_bytes", "must be from \"8KiB\" to \"1MiB\"")?;
        let target = (1..=self.max_header_bytes).contains(&self.max_target);
        check(
            target,
            "http.max_target",
            "must be at least 1 and at most `http.max_header_bytes`",
        )?;
        check(
            self.buffered_total >= self.buffered_limit,
            "http.buffered_total",
            "is less than `http.buffered_limit`, so the largest response would never fit: raise it",
        )?;
        check(self.max_connections > 0, "http.max_connections", "must be at least 1")?;
        let per_address = self.max_connections_per_address > 0;
        check(per_address, "http.max_connections_per_address", "must be at least 1")
    }
}

impl TlsConfig {
    /// Whether the public listener speaks TLS.
    pub fn is_on(&self) -> bool {
        self.cert.is_some()
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let both = self.cert.is_some() == self.key.is_some();
        check(
            both,
            if self.cert.is_some() { "tls.key" } else { "tls.cert" },
            "is not set, and a certificate is of no use without its key: set both, or neither",
        )
    }
}

impl CorsConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let good = self.origins.iter().all(|origin| origin == "*" || is_origin(origin));
        check(
            good,
            "cors.origins",
            "has something else than origins: write them as browsers do, in lower case and without a path, like \
             \"https://app.example.org\" or \"tauri://localhost\", or \"*\" for any",
        )
    }
}

/// Scheme, host and port, as they stand in the header `Origin` (RFC 6454 §6.2).
fn is_origin(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !byte.is_ascii_uppercase() && !b"/?#@*\"<>".contains(&byte);
    let fits = |part: &str| !part.is_empty() && part.bytes().all(allowed);
    text.split_once("://")
        .is_some_and(|(scheme, host)| fits(scheme) && fits(host))
}

impl LogConfig {
    /// Whether the filter can be read.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let why = "is not a log filter: write a level (\"info\") or levels by module (\"info,adit::relay=debug\")";
        check(crate::telemetry::is_filter(&self.filter), "log.filter", why)
    }
}

fn positive(duration: Duration, key: &'static str) -> Result<(), ConfigError> {
    check(!duration.is_zero(), key, "must be longer than zero, like \"10s\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RelayConfig, ConfigError> {
        let table = text.parse().expect("TOML");
        let config = RelayConfig::over_defaults(table, Path::new("relay.toml"))?;
        config.validate().map(|()| config)
    }

    fn refusal(text: &str) -> String {
        parse(text).expect_err(text).to_string()
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let config = RelayConfig::default();
        config.validate().expect("the defaults are valid");
        let seconds = Duration::from_secs;
        assert_eq!(config.listen.to_string(), "0.0.0.0:8080");
        assert_eq!(config.admin_listen.to_string(), "127.0.0.1:9090");
        assert_eq!(config.database_url.expose(), "sqlite:adit.db");
        assert_eq!(
            (&config.domain, &config.public_url, &config.admin_token),
            (&None, &None, &None)
        );
        assert_eq!((config.trusted_proxies, config.drain_timeout), (vec![], seconds(60)));
        assert_eq!(config.database_wait, seconds(30));
        assert_eq!((config.tls.cert, config.tls.key), (None, None));
        let limits = LimitsConfig {
            client_requests_per_second: 0,
            client_concurrent: 0,
            address_requests_per_second: 0,
            address_concurrent: 0,
        };
        assert_eq!(config.limits, limits);
        let tunnels = TunnelsConfig {
            park_timeout: seconds(5),
            park_memory: seconds(60),
            resume_timeout: seconds(30),
            ping_interval: seconds(15),
            ping_timeout: seconds(10),
            max_tunnels_per_client: 64,
        };
        assert_eq!(config.tunnels, tunnels);
        let http = HttpConfig {
            head_timeout: seconds(10),
            body_idle_timeout: seconds(60),
            write_idle_timeout: seconds(60),
            response_timeout: seconds(120),
            max_target: 8 << 10,
            max_headers: 100,
            max_header_bytes: 32 << 10,
            buffered_limit: 16 << 20,
            buffered_total: 256 << 20,
            max_connections: 16_000,
            max_connections_per_address: 1_024,
        };
        assert_eq!(config.http, http);
        assert_eq!(
            (config.log.format, config.log.filter.as_str()),
            (LogFormat::Auto, "info")
        );
        assert_eq!(config.cors.origins, [""; 0]);
        assert_eq!(config.moosicbox.spool_limit, 1 << 30);
    }

    #[test]
    fn every_key_is_in_the_default_file() {
        // A key without a default in the file would make the parse of the file fail when its line is taken out, and a
        // key that the struct does not have would be refused: so lines and fields match one to one.
        let complete: toml::Table = DEFAULT_TOML.parse().expect("TOML");
        let parses = |table: &toml::Table| table.clone().try_into::<RelayConfig>().is_ok();
        assert!(parses(&complete));
        for (key, value) in &complete {
            let mut without = complete.clone();
            without.remove(key);
            assert!(!parses(&without), "{key} is not needed");
            for inner in value.as_table().into_iter().flat_map(toml::Table::keys) {
                let mut without = complete.clone();
                without[key].as_table_mut().expect("a table").remove(inner);
                assert!(!parses(&without), "{key}.{inner} is not needed");
            }
        }
    }

    #[test]
    fn a_file_changes_only_what_it_says() {
        let config =
            parse("listen = \"[::1]:80\"\ndomain = \"T.example.org\"\n[http]\nmax_target = 4096").expect("valid");
        assert_eq!(config.listen.to_string(), "[::1]:80");
        assert_eq!(config.domain.expect("set").as_str(), "t.example.org");
        assert_eq!((config.http.max_target, config.http.max_headers), (4096, 100));
    }

    #[test]
    fn the_registry_may_be_sqlite_or_mysql() {
        for url in [
            "sqlite:adit.db",
            "sqlite::memory:",
            "mysql://u:p@db:3306/adit",
            "mariadb://db/adit",
        ] {
            let config = parse(&format!("database_url = \"{url}\"")).expect(url);
            assert_eq!(config.database_url.expose(), url);
        }
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        assert!(refusal("lisen = \"0.0.0.0:80\"").contains("`lisen`"));
        let text = refusal("[http]\nmax_heders = 1");
        assert!(
            text.contains("`max_heders`") && text.contains("`http`") && text.contains("relay.toml"),
            "{text}"
        );
    }

    #[test]
    fn a_bad_value_is_refused_by_the_name_of_its_key() {
        for (text, key) in [
            ("listen = \"8080\"", "`listen`"),
            ("listen = 8080", "`listen`"),
            ("listen = \"127.0.0.1:9090\"", "`admin_listen`"),
            ("database_url = \"postgres://x\"", "`database_url`"),
            ("redis_url = \"http://x\"", "`redis_url`"),
            ("database_url = \"mysql:x\"", "`database_url`"),
            ("domain = \"https://x.org\"", "`domain`"),
            ("public_url = \"tunnel.example.org\"", "`public_url`"),
            ("trusted_proxies = [\"10/8\"]", "`trusted_proxies`"),
            ("trusted_proxies = \"10.0.0.0/8\"", "`trusted_proxies`"),
            ("drain_timeout = 60", "`drain_timeout`"),
            ("drain_timeout = \"2d\"", "`drain_timeout`"),
            ("tunnels = 1", "`tunnels`"),
            ("[tunnels]\nping_interval = \"0s\"", "`tunnels.ping_interval`"),
            (
                "[tunnels]\nmax_tunnels_per_client = 0",
                "`tunnels.max_tunnels_per_client`",
            ),
            ("[http]\nmax_headers = -1", "`http.max_headers`"),
            ("[http]\nmax_headers = 0", "`http.max_headers`"),
            ("[http]\nmax_header_bytes = \"1KiB\"", "`http.max_header_bytes`"),
            ("[http]\nmax_target = \"64KiB\"", "`http.max_target`"),
            ("[http]\nbuffered_limit = \"1GiB\"", "`http.buffered_total`"),
            ("[tls]\ncert = \"c.pem\"", "`tls.key`"),
            ("[tls]\nkey = \"k.pem\"", "`tls.cert`"),
            ("[limits]\nclient_concurrent = -1", "`limits.client_concurrent`"),
            ("database_wait = 5", "`database_wait`"),
            ("[cors]\norigins = \"*\"", "`cors.origins`"),
            ("[cors]\norigins = [\"app.example.org\"]", "`cors.origins`"),
            ("[cors]\norigins = [\"https://app.example.org/\"]", "`cors.origins`"),
            ("[cors]\norigins = [\"https://*.example.org\"]", "`cors.origins`"),
            ("[cors]\norigins = [\"https://App.example.org\"]", "`cors.origins`"),
            ("[cors]\norigins = [\"https://u@example.org\"]", "`cors.origins`"),
            ("[cors]\norigins = [\"https://\"]", "`cors.origins`"),
            ("[log]\nformat = \"xml\"", "`log.format`"),
            ("[log]\nfilter = \"adit=loud\"", "`log.filter`"),
        ] {
            let refused = refusal(text);
            assert!(refused.contains(key), "{text}: {refused}");
        }
    }

    #[test]
    fn origins_are_written_as_browsers_write_them() {
        let text =
            "[cors]\norigins = [\"https://app.example.org\", \"tauri://localhost\", \"http://[::1]:5173\", \"*\"]";
        assert_eq!(parse(text).expect("valid").cors.origins.len(), 4);
    }

    #[test]
    fn secrets_stay_out_of_what_is_printed() {
        let config = parse("admin_token = \"hunter2\"\ndatabase_url = \"sqlite:hunter2\"").expect("valid");
        assert!(!format!("{config:?}").contains("hunter2"));
        let refused = refusal("admin_token = [\"hunter2\"]");
        assert!(
            refused.contains("`admin_token`") && !refused.contains("hunter2"),
            "{refused}"
        );
    }

    #[test]
    fn a_client_is_told_where_it_is_reached() {
        let url = |text: &str, bound: &str| {
            let client = "home".parse().expect("an id");
            parse(text)
                .expect(text)
                .client_url(&client, bound.parse().expect("an address"))
        };
        let (domain, public) = ("domain = \"t.org\"", "public_url = \"https://t.org\"");
        assert_eq!(url("", "0.0.0.0:8080"), "http://127.0.0.1:8080/?clientId=home");
        assert_eq!(url("", "[::]:8080"), "http://[::1]:8080/?clientId=home");
        assert_eq!(url(public, "0.0.0.0:8080"), "https://t.org/?clientId=home");
        assert_eq!(url(domain, "0.0.0.0:8080"), "http://home.t.org:8080/");
        assert_eq!(url(domain, "0.0.0.0:80"), "http://home.t.org/");
        let tls = "[tls]\ncert = \"c\"\nkey = \"k\"";
        assert_eq!(url(tls, "0.0.0.0:8443"), "https://127.0.0.1:8443/?clientId=home");
        assert_eq!(url(&format!("{domain}\n{tls}"), "0.0.0.0:443"), "https://home.t.org/");
        assert_eq!(
            url(&format!("{domain}\n{public}"), "0.0.0.0:8080"),
            "https://home.t.org/"
        );
        assert_eq!(
            url("domain = \"t.org\"\npublic_url = \"https://t.org:8443\"", "0.0.0.0:1"),
            "https://home.t.org:8443/"
        );
    }
}
