//! The command line: arguments and environment laid over the configuration, then the library is started.
//!
//! [`Cli::plan`] does all that can be wrong in what the user wrote, before anything is opened; [`Plan::run`] does the rest.

mod admin_api;
mod agent;
mod client;
mod demo;
mod healthcheck;
mod http;
mod migrate;
mod sample;
mod serve;
mod status;
mod token;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, builder::Styles};

pub use agent::{AgentArgs, LinkArgs};
pub use demo::DemoArgs;
pub use healthcheck::HealthcheckArgs;
pub use http::HttpArgs;
pub use migrate::MigrateArgs;
pub use sample::SampleArgs;
pub use serve::ServeArgs;

use crate::{
    config::{AgentConfig, ConfigError, LogConfig, RelayConfig, UpstreamUrl},
    secret::Secret,
    shutdown,
    telemetry::LogFormat,
};

/// Reach a local server from the internet through a relay of your own.
///
/// A relay (`adit serve`) runs where the internet can reach it. An agent (`adit http 3000`) runs next to the local
/// server, dials out to the relay, and answers through it. `adit demo` shows both on this machine.
#[derive(Debug, Parser)]
#[command(name = "adit", version, styles = Styles::plain(), arg_required_else_help = true)]
#[command(after_help = "A flag wins over its environment variable, that over the file, and the file over the default.")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<ServeArgs>),
    Http(HttpArgs),
    Agent(AgentArgs),
    Demo(DemoArgs),
    Client(client::ClientCommand),
    Token(token::TokenCommand),
    Status(status::StatusCommand),
    Migrate(MigrateArgs),
    Sample(SampleArgs),
    Healthcheck(HealthcheckArgs),
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Logs (on standard error)")]
struct LogArgs {
    /// How logs are written: `auto` is `human` on a terminal and `json` otherwise [default: auto]
    #[arg(
        long,
        global = true,
        env = "ADIT_LOG_FORMAT",
        value_name = "FORMAT",
        hide_possible_values = true
    )]
    #[arg(value_parser = given(log_format))]
    log_format: Option<Given<LogFormat>>,
    /// What is logged: a level, or levels by module like `info,adit::relay=debug` [default: info]
    #[arg(long, global = true, env = "ADIT_LOG", value_name = "FILTER", value_parser = given(log_filter))]
    log: Option<Given<String>>,
}

impl LogArgs {
    fn over(&self, log: &mut LogConfig) {
        set(&mut log.format, &self.log_format);
        set(&mut log.filter, &self.log);
    }
}

/// What is to be run, with a configuration that is complete and valid.
#[derive(Debug)]
pub enum Plan {
    /// `adit serve`.
    Serve(Box<RelayConfig>),
    /// `adit serve --check`.
    Check(Box<RelayConfig>),
    /// `adit http` and `adit agent`.
    Agent(AgentConfig),
    /// `adit demo`: a relay, and the upstream to show instead of the sample.
    Demo(Box<RelayConfig>, Option<UpstreamUrl>),
    /// `adit client`.
    Client(client::ClientCommand),
    /// `adit token`.
    Token(token::TokenCommand),
    /// `adit status`.
    Status(status::StatusCommand),
    /// `adit migrate`: of this database, which is waited for so long.
    Migrate(Secret, Duration),
    /// `adit sample`: on this address.
    Sample(SocketAddr),
    /// `adit healthcheck`: the admin listener to ask, and for what path.
    Healthcheck(String, &'static str),
}

impl Cli {
    /// What is to be run and how it logs, or what is wrong with the configuration.
    pub fn plan(self) -> anyhow::Result<(LogConfig, Plan)> {
        let mut log = LogConfig::default();
        let plan = match self.command {
            Command::Serve(args) => {
                let mut config = Box::new(args.config()?);
                self.log.over(&mut config.log);
                log = config.log.clone();
                if args.check {
                    Plan::Check(config)
                } else {
                    Plan::Serve(config)
                }
            }
            Command::Http(args) => Plan::Agent(args.config()?),
            Command::Agent(args) => Plan::Agent(args.config()?),
            Command::Demo(args) => {
                // What it prints is the story; the logs would tell it twice.
                log.filter = "warn".to_owned();
                Plan::Demo(Box::new(args.config()?), args.to)
            }
            Command::Client(command) => Plan::Client(command),
            Command::Token(command) => Plan::Token(command),
            Command::Status(command) => Plan::Status(command),
            Command::Migrate(args) => {
                let (database_url, wait) = args.database()?;
                Plan::Migrate(database_url, wait)
            }
            Command::Sample(args) => Plan::Sample(args.listen),
            Command::Healthcheck(args) => Plan::Healthcheck(args.address()?, args.path()),
        };
        self.log.over(&mut log);
        Ok((log, plan))
    }
}

impl Plan {
    /// What it is called in traces, if it serves requests; `OTEL_SERVICE_NAME` replaces it.
    pub fn service(&self) -> Option<&'static str> {
        match self {
            Self::Serve(_) => Some("adit-relay"),
            Self::Agent(_) => Some("adit-agent"),
            Self::Demo(..) => Some("adit-demo"),
            _ => None,
        }
    }

    /// Runs it to its end, or until a signal ends it. Inside a tokio runtime.
    pub async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Serve(config) => serve::run(*config, shutdown::signals()?).await,
            Self::Check(config) => serve::check(&config),
            Self::Agent(config) => agent::run(config, shutdown::signals()?).await,
            Self::Demo(config, to) => demo::run(*config, to, shutdown::signals()?).await,
            Self::Client(command) => command.run().await,
            Self::Token(command) => command.run().await,
            Self::Status(command) => command.run().await,
            Self::Migrate(database_url, wait) => migrate::run(database_url, wait).await,
            Self::Sample(listen) => sample::run(listen, shutdown::signals()?).await,
            Self::Healthcheck(address, path) => healthcheck::run(address, path).await,
        }
    }
}

/// A flag's or variable's value; an empty one is as if it were not there, which is how compose files leave one out.
#[derive(Debug, Clone)]
struct Given<T>(Option<T>);

/// Makes clap's parser of a [`Given`] value from the parser of the value.
fn given<T, E>(parse: fn(&str) -> Result<T, E>) -> impl Fn(&str) -> Result<Given<T>, E> + Clone {
    move |text| {
        if text.is_empty() {
            Ok(Given(None))
        } else {
            parse(text).map(|value| Given(Some(value)))
        }
    }
}

/// As [`given`], of a value that parses from text.
fn parsed<T: FromStr>(text: &str) -> Result<Given<T>, T::Err> {
    given(T::from_str)(text)
}

/// Puts a given value in its place.
fn set<T: Clone>(place: &mut T, flag: &Option<Given<T>>) {
    if let Some(Given(Some(value))) = flag {
        place.clone_from(value);
    }
}

/// The file to read, if one is given.
fn file(flag: &Option<Given<PathBuf>>) -> Option<&Path> {
    flag.as_ref()?.0.as_deref()
}

/// As [`set`], in a place that may be empty.
fn set_some<T: Clone>(place: &mut Option<T>, flag: &Option<Given<T>>) {
    if let Some(Given(Some(value))) = flag {
        *place = Some(value.clone());
    }
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    clap::ValueEnum::from_str(text, true).map_err(|_| "write auto, human or json".to_owned())
}

fn log_filter(text: &str) -> Result<String, ConfigError> {
    let log = LogConfig {
        format: LogFormat::Auto,
        filter: text.to_owned(),
    };
    log.validate().map(|()| log.filter)
}
