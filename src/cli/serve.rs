//! `adit serve`: the relay's arguments, laid over its configuration file.

use std::{io::Write, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Args;
use ipnet::IpNet;
use tokio::net::TcpListener;

use super::{Given, file, given, parsed, set, set_some};
use crate::{
    config::{Domain, RelayConfig, RelayUrl, relay::reachable, values},
    relay::{Listeners, Ready, Relay},
    secret::Secret,
    shutdown::Shutdown,
};

/// Run a relay: the side that the internet and the agents connect to
///
/// Complete on its own, with a SQLite file beside it; or with a MySQL database that may be elsewhere. Every setting that has no flag here can be set in the file;
/// config.default.toml in the source documents them all. SIGTERM or Ctrl-C lets exchanges finish, a second one does not.
#[derive(Debug, Default, Args)]
pub struct ServeArgs {
    /// A TOML file with settings, as documented in config.default.toml [default: none]
    #[arg(long, env = "ADIT_CONFIG", value_name = "FILE", value_parser = parsed::<PathBuf>)]
    config: Option<Given<PathBuf>>,
    /// Where downstreams and agents connect [default: 0.0.0.0:8080]
    #[arg(long, env = "ADIT_LISTEN", value_name = "ADDRESS:PORT", value_parser = given(values::address))]
    listen: Option<Given<SocketAddr>>,
    /// Where /healthz, /readyz and /metrics are served [default: 127.0.0.1:9090]
    #[arg(long, env = "ADIT_ADMIN_LISTEN", value_name = "ADDRESS:PORT", value_parser = given(values::address))]
    admin_listen: Option<Given<SocketAddr>>,
    /// The registry: sqlite:FILE or mysql://user:password@host/adit [default: sqlite:adit.db]
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true, value_parser = parsed::<Secret>)]
    database_url: Option<Given<Secret>>,
    /// The bus between nodes, like redis://HOST:PORT [default: none, this node is alone]
    #[arg(long, env = "REDIS_URL", value_name = "URL", hide_env_values = true, value_parser = parsed::<Secret>)]
    redis_url: Option<Given<Secret>>,
    /// Clients are reached as {client_id}.DOMAIN [default: only by header or query]
    #[arg(long, env = "ADIT_DOMAIN", value_name = "DOMAIN", value_parser = parsed::<Domain>)]
    domain: Option<Given<Domain>>,
    /// How the internet sees this relay, like https://tunnel.example.org [default: from --domain and --listen]
    #[arg(long, env = "ADIT_PUBLIC_URL", value_name = "URL", value_parser = parsed::<RelayUrl>)]
    public_url: Option<Given<RelayUrl>>,
    /// The credential of the admin API, also read from TUNNEL_ACCESS_TOKEN [default: one is made and printed once]
    #[arg(long, env = "ADIT_ADMIN_TOKEN", value_name = "TOKEN", hide_env_values = true, value_parser = parsed::<Secret>)]
    admin_token: Option<Given<Secret>>,
    /// The same, by the name that MoosicBox's relay knows
    #[arg(long, hide = true, env = "TUNNEL_ACCESS_TOKEN", value_name = "TOKEN", hide_env_values = true, value_parser = parsed::<Secret>)]
    tunnel_access_token: Option<Given<Secret>>,
    /// Load balancers whose forwarding headers are believed, separated by commas [default: none]
    #[arg(long, env = "ADIT_TRUSTED_PROXIES", value_name = "NETWORKS", value_parser = given(values::networks))]
    trusted_proxies: Option<Given<Vec<IpNet>>>,
    /// How long a relay that starts waits for its database [default: 30s]
    #[arg(long, env = "ADIT_DATABASE_WAIT", value_name = "DURATION", value_parser = given(values::duration))]
    database_wait: Option<Given<Duration>>,
    /// TLS on --listen: the certificate, with those between it and a root, in PEM [default: none, plain HTTP]
    #[arg(long, env = "ADIT_TLS_CERT", value_name = "FILE", value_parser = parsed::<PathBuf>)]
    tls_cert: Option<Given<PathBuf>>,
    /// Its key, in PEM [default: none]
    #[arg(long, env = "ADIT_TLS_KEY", value_name = "FILE", value_parser = parsed::<PathBuf>)]
    tls_key: Option<Given<PathBuf>>,
    /// How long a request waits for a reconnecting agent [default: 5s]
    #[arg(long, env = "ADIT_PARK_TIMEOUT", value_name = "DURATION", value_parser = given(values::duration))]
    park_timeout: Option<Given<Duration>>,
    /// How long exchanges outlive the loss of their last tunnel [default: 30s]
    #[arg(long, env = "ADIT_RESUME_TIMEOUT", value_name = "DURATION", value_parser = given(values::duration))]
    resume_timeout: Option<Given<Duration>>,
    /// How long exchanges may take to finish once the relay is told to end [default: 60s]
    #[arg(long, env = "ADIT_DRAIN_TIMEOUT", value_name = "DURATION", value_parser = given(values::duration))]
    drain_timeout: Option<Given<Duration>>,
    /// Check the configuration, print it with secrets hidden, and exit
    #[arg(long)]
    pub(super) check: bool,
}

impl ServeArgs {
    /// Flags and environment over the file over the defaults, validated.
    pub fn config(&self) -> anyhow::Result<RelayConfig> {
        let mut config = match file(&self.config) {
            Some(path) => RelayConfig::load(path)?,
            None => RelayConfig::default(),
        };
        set(&mut config.listen, &self.listen);
        set(&mut config.admin_listen, &self.admin_listen);
        set(&mut config.database_url, &self.database_url);
        set_some(&mut config.redis_url, &self.redis_url);
        set_some(&mut config.domain, &self.domain);
        set_some(&mut config.public_url, &self.public_url);
        set_some(&mut config.admin_token, &self.tunnel_access_token);
        set_some(&mut config.admin_token, &self.admin_token);
        set(&mut config.trusted_proxies, &self.trusted_proxies);
        set(&mut config.database_wait, &self.database_wait);
        set_some(&mut config.tls.cert, &self.tls_cert);
        set_some(&mut config.tls.key, &self.tls_key);
        set(&mut config.tunnels.park_timeout, &self.park_timeout);
        set(&mut config.tunnels.resume_timeout, &self.resume_timeout);
        set(&mut config.drain_timeout, &self.drain_timeout);
        config.validate()?;
        Ok(config)
    }
}

/// Prints a configuration that is valid, since it came this far.
pub(super) fn check(config: &RelayConfig) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{config:#?}")?;
    Ok(())
}

/// Runs a relay until it is told to end.
pub(super) async fn run(config: RelayConfig, shutdown: Shutdown) -> anyhow::Result<()> {
    let listeners = Listeners {
        public: bind(config.listen, "--listen").await?,
        admin: bind(config.admin_listen, "--admin-listen").await?,
    };
    let (public, admin) = (listeners.public.local_addr()?, listeners.admin.local_addr()?);
    let ready = |ready: Ready| {
        tracing::info!(listen = %public, admin = %admin, node.id = %ready.registry.node_id(), "the relay is up");
        if let Some(token) = ready.new_admin_token {
            // Not through the log, which is kept; a closed standard error must not end the relay.
            let _ = writeln!(
                std::io::stderr(),
                "\nAn admin token was made. It is shown this once:\n\n    export ADIT_ADMIN_TOKEN={}\n\n\
                 Create a client with it:  adit client create home --relay http://{}\n",
                token.expose(),
                reachable(admin)
            );
        }
    };
    Relay::new(config).run(listeners, shutdown, ready).await
}

/// Binds a listener, or says which flag moves it.
pub(super) async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    bound.with_context(|| format!("cannot listen on {address}: choose another address with {flag}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::Parser;

    use super::*;
    use crate::{
        cli::{Cli, Plan},
        config::relay::DEFAULT_TOML,
    };

    fn plan(arguments: &[&str]) -> anyhow::Result<Plan> {
        let cli = Cli::try_parse_from(["adit"].iter().chain(arguments))?;
        Ok(cli.plan()?.1)
    }

    fn config(arguments: &[&str]) -> RelayConfig {
        let arguments = [&["serve"], arguments].concat();
        let Ok(Plan::Serve(config)) = plan(&arguments) else {
            panic!("{arguments:?} is a relay")
        };
        *config
    }

    #[test]
    fn the_defaults_need_no_flag() {
        assert_eq!(config(&[]), RelayConfig::default());
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text =
            "listen = \"127.0.0.1:1\"\ndrain_timeout = \"1s\"\ntrusted_proxies = [\"::1\"]\n[log]\nfilter = \"warn\"";
        std::fs::write(file.path(), text).expect("written");
        let path = file.path().to_str().expect("text");
        let config = config(&[
            "--config",
            path,
            "--listen",
            "127.0.0.1:2",
            "--park-timeout=0s",
            "--log=debug",
        ]);
        assert_eq!(config.listen.to_string(), "127.0.0.1:2", "the flag");
        assert_eq!(
            (config.tunnels.park_timeout, config.log.filter.as_str()),
            (Duration::ZERO, "debug"),
            "the flag"
        );
        assert_eq!(
            (config.drain_timeout, config.trusted_proxies.len()),
            (Duration::from_secs(1), 1),
            "the file"
        );
        assert_eq!(config.admin_listen.to_string(), "127.0.0.1:9090", "the default");
    }

    #[test]
    fn every_flag_reaches_its_setting() {
        let found = config(&[
            "--admin-listen=127.0.0.1:3",
            "--database-url=sqlite:x",
            "--domain=T.org",
            "--public-url=https://t.org",
            "--admin-token=hunter2",
            "--trusted-proxies=10.0.0.0/8,::1",
            "--resume-timeout=2m",
            "--drain-timeout=250ms",
        ]);
        assert_eq!(found.admin_listen.port(), 3);
        assert_eq!(
            (found.database_url.expose(), found.domain.expect("set").as_str()),
            ("sqlite:x", "t.org")
        );
        assert_eq!(found.public_url.expect("set").to_string(), "https://t.org");
        assert_eq!(
            (found.admin_token.expect("set").expose(), found.trusted_proxies.len()),
            ("hunter2", 2)
        );
        assert_eq!(
            (found.tunnels.resume_timeout.as_secs(), found.drain_timeout.as_millis()),
            (120, 250)
        );
    }

    #[test]
    fn of_two_names_of_a_setting_our_own_wins() {
        let found = config(&["--admin-token=ours", "--tunnel-access-token=theirs"]);
        assert_eq!(found.admin_token.expect("set").expose(), "ours");
    }

    #[test]
    fn an_empty_value_is_no_value() {
        assert_eq!(
            config(&[
                "--config=",
                "--listen=",
                "--domain=",
                "--admin-token=",
                "--drain-timeout=",
                "--log="
            ]),
            RelayConfig::default()
        );
    }

    #[test]
    fn a_bad_value_names_its_flag() {
        for (flag, value) in [
            ("--listen", "8080"),
            ("--domain", "http://x"),
            ("--public-url", "x"),
            ("--trusted-proxies", "10/8"),
            ("--drain-timeout", "60"),
            ("--log", "adit=loud"),
            ("--log-format", "xml"),
        ] {
            let refused = plan(&["serve", flag, value]).expect_err(flag).to_string();
            assert!(refused.contains(flag) && refused.contains(value), "{refused}");
        }
        let refused = plan(&["serve", "--database-url=postgres://u:hunter2@x"])
            .expect_err("not served")
            .to_string();
        assert!(
            refused.contains("`database_url`") && !refused.contains("hunter2"),
            "{refused}"
        );
    }

    /// A setting as the README's table has it: key, default, flag, variable.
    fn readme_row(line: &str) -> Option<[String; 4]> {
        let mut cells = line
            .strip_prefix("| `")?
            .split('|')
            .map(|cell| cell.trim().replace('`', ""));
        let row = [cells.next()?, cells.next()?, cells.next()?, cells.next()?];
        cells.next().is_some().then_some(row)
    }

    /// Every key of the defaults and how the README writes its value.
    fn defaults(table: &toml::Table, prefix: &str) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for (key, value) in table {
            let value = match value {
                toml::Value::Table(inner) => {
                    found.extend(defaults(inner, &format!("{key}.")));
                    continue;
                }
                toml::Value::String(text) if text.is_empty() => "not set".to_owned(),
                toml::Value::String(text) => text.clone(),
                toml::Value::Array(items) if items.is_empty() => "none".to_owned(),
                toml::Value::Integer(number) => number.to_string(),
                other => panic!("{other:?} needs a way to be written"),
            };
            found.push((format!("{prefix}{key}"), value));
        }
        found
    }

    #[test]
    fn the_readme_has_every_key_with_its_default_flag_and_variable() {
        let readme = include_str!("../../README.md");
        let table = readme
            .split("\n## ")
            .find(|part| part.starts_with("Configuration"))
            .expect("there");
        let rows: Vec<_> = table.lines().filter_map(readme_row).collect();
        let mut keys = defaults(&DEFAULT_TOML.parse().expect("TOML"), "");
        for [key, default, ..] in &rows {
            let at = keys
                .iter()
                .position(|(known, value)| known == key && default.starts_with(value.as_str()));
            keys.swap_remove(at.unwrap_or_else(|| panic!("{key} = {default} is not in config.default.toml")));
        }
        assert!(keys.is_empty(), "not in the README: {keys:?}");

        let mut command = Cli::command();
        command.build();
        let serve = command.find_subcommand("serve").expect("serve");
        let mut flags: Vec<_> = serve
            .get_arguments()
            .filter(|argument| !argument.is_hide_set())
            .filter_map(|argument| {
                let variable = argument.get_env()?.to_str()?.to_owned();
                (argument.get_id() != "config")
                    .then(|| (format!("--{}", argument.get_long().unwrap_or_default()), variable))
            })
            .collect();
        let mut told: Vec<_> = rows
            .into_iter()
            .map(|[_, _, flag, variable]| (flag, variable))
            .filter(|(flag, _)| !flag.is_empty())
            .collect();
        flags.sort();
        told.sort();
        assert_eq!(told, flags);
    }

    #[test]
    fn the_help_states_each_default_and_variable() {
        Cli::command().debug_assert();
        let mut command = Cli::command();
        let serve = command.find_subcommand_mut("serve").expect("serve");
        let shown = serve.get_arguments().filter(|argument| !argument.is_hide_set());
        for argument in shown.filter(|argument| argument.get_id() != "check") {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(
                argument.get_env().is_some() && help.contains("[default: "),
                "{}: {help}",
                argument.get_id()
            );
        }
        let (help, defaults) = (serve.render_long_help().to_string(), RelayConfig::default());
        for (default, unit) in [
            (defaults.listen.to_string(), ""),
            (defaults.admin_listen.to_string(), ""),
            (defaults.database_url.expose().to_owned(), ""),
            (defaults.tunnels.park_timeout.as_secs().to_string(), "s"),
            (defaults.tunnels.resume_timeout.as_secs().to_string(), "s"),
            (defaults.drain_timeout.as_secs().to_string(), "s"),
        ] {
            assert!(
                help.contains(&format!("[default: {default}{unit}]")),
                "{default}{unit} is not in\n{help}"
            );
        }
    }
}
