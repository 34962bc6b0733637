//! `adit agent`: the tunnels of an `adit.toml`, and the arguments that every agent has.

use std::{
    io::Write,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Args;
use tokio::{net::TcpListener, task::JoinSet};

use super::{Given, file, parsed, set_some};
use crate::{
    agent::{self, Agent, Event},
    config::{AgentConfig, AgentFile, RelayUrl, TunnelConfig, agent::EXAMPLE_TOML},
    secret::Secret,
    shutdown::Shutdown,
    wire::frame::Code,
};

/// Run the agent of every `[[tunnel]]` in adit.toml
///
/// Reconnects for ever. SIGTERM or Ctrl-C lets exchanges finish, a second one does not.
#[derive(Debug, Args)]
#[command(after_long_help = format!("An adit.toml with every key:\n\n{EXAMPLE_TOML}"))]
pub struct AgentArgs {
    #[command(flatten)]
    link: LinkArgs,
}

/// To which relay, and with what credential.
#[derive(Debug, Args)]
pub struct LinkArgs {
    /// The relay's address, like https://tunnel.example.org [default: from the file]
    #[arg(long, env = "ADIT_RELAY", value_name = "URL", value_parser = parsed::<RelayUrl>)]
    relay: Option<Given<RelayUrl>>,
    /// The client's access token; `adit client create` prints one [default: from the file]
    #[arg(long, env = "ADIT_TOKEN", value_name = "TOKEN", hide_env_values = true, value_parser = parsed::<Secret>)]
    token: Option<Given<Secret>>,
    /// Tunnels held for each client, 1 to 8 [default: 2]
    #[arg(long, env = "ADIT_CONNECTIONS", value_name = "COUNT", value_parser = parsed::<u8>)]
    connections: Option<Given<u8>>,
    /// The file with the rest [default: adit.toml, if it is there]
    #[arg(long, env = "ADIT_CONFIG", value_name = "FILE", value_parser = parsed::<PathBuf>)]
    config: Option<Given<PathBuf>>,
}

impl LinkArgs {
    /// The file, under flags and environment.
    pub(super) fn file(&self) -> anyhow::Result<AgentFile> {
        let mut below = AgentFile::load(file(&self.config))?;
        set_some(&mut below.relay, &self.relay);
        set_some(&mut below.token, &self.token);
        set_some(&mut below.connections, &self.connections);
        Ok(below)
    }
}

impl AgentArgs {
    /// Flags and environment over the file over the defaults, complete and validated.
    pub fn config(&self) -> anyhow::Result<AgentConfig> {
        let file = self.link.file()?;
        ensure!(
            !file.tunnels.is_empty(),
            "there is nothing to tunnel: write a `[[tunnel]]` with `client` and `to` in adit.toml (see `adit agent --help`), or run `adit http PORT`"
        );
        Ok(file.complete()?)
    }
}

/// Runs an agent until it is told to end.
pub(super) async fn run(config: AgentConfig, shutdown: Shutdown) -> anyhow::Result<()> {
    let mut agents = JoinSet::new();
    for tunnel in config.tunnels {
        let printer = Printer::new(&tunnel);
        let publish = tunnel.publish;
        let mut agent = Agent::new(agent::Config {
            relay: config.relay.clone(),
            client_id: tunnel.client,
            token: tunnel.token,
            upstream: tunnel.to,
            host_header: tunnel.host_header,
            insecure: tunnel.insecure,
            connections: u32::from(config.connections),
        })?;
        if let Some(address) = publish {
            let listener = TcpListener::bind(address).await;
            let listener = listener.with_context(|| {
                format!("cannot listen on {address} (--publish): is another program using that port?")
            })?;
            agent = agent.publishing_on(listener)?;
            tracing::info!(%address, "POST /publish here reaches the client's subscribers");
        }
        agents.spawn(agent.run(shutdown.clone(), move |event| printer.print(event)));
    }
    while let Some(ended) = agents.join_next().await {
        ended?;
    }
    Ok(())
}

/// Tells a person what an agent does: where it is reached, and one line a request.
pub(super) struct Printer {
    client: String,
    to: String,
    /// The URL that was printed last: it is the same for all tunnels.
    url: Mutex<Option<String>>,
    lines: Lines,
    /// Why there is no tunnel, as it was said last: attempts go on for ever, and each may fail for the same reason.
    trouble: Mutex<Option<String>>,
}

impl Printer {
    pub(super) fn new(tunnel: &TunnelConfig) -> Self {
        Self {
            client: tunnel.client.to_string(),
            to: tunnel.to.to_string(),
            url: Mutex::default(),
            lines: Lines::start(),
            trouble: Mutex::default(),
        }
    }

    pub(super) fn print(&self, event: Event) {
        match event {
            Event::Connected {
                slot,
                node_id,
                public_url,
            } => self.connected(slot, &node_id.to_string(), public_url),
            Event::Disconnected { slot, why, retry_in } => self.disconnected(slot, why, retry_in),
            Event::Request {
                method,
                target,
                status,
                bytes,
                duration,
                broken,
            } => {
                let status = status.map_or_else(|| "---".to_owned(), |status| status.to_string());
                let broken = broken
                    .map(|code| format!("  broke off: {}", why(code)))
                    .unwrap_or_default();
                // A query may hold credentials.
                let path = target.split('?').next().unwrap_or_default();
                let line = format!(
                    "{method} {path}  {status}  {bytes} B  {} ms{broken}",
                    duration.as_millis()
                );
                self.lines.print(line.replace(char::is_control, "?"));
            }
        }
    }

    fn connected(&self, slot: u32, node_id: &str, url: String) {
        tracing::info!(client.id = %self.client, tunnel.slot = slot, node.id = node_id, "tunnel open");
        lock(&self.trouble).take();
        let mut printed = lock(&self.url);
        if printed.as_ref() != Some(&url) {
            self.lines.print(format!("{url}  ->  {}", self.to));
            *printed = Some(url);
        }
    }

    /// A warning the first time, and the same again only for whoever debugs.
    fn disconnected(&self, slot: u32, why: String, retry_in: Duration) {
        let mut said = lock(&self.trouble);
        let retry_ms = retry_in.as_millis() as u64;
        if said.as_ref() == Some(&why) {
            tracing::debug!(client.id = %self.client, tunnel.slot = slot, retry_ms, "no tunnel: {why}");
        } else {
            tracing::warn!(client.id = %self.client, tunnel.slot = slot, retry_ms, "no tunnel: {why}; trying again");
            *said = Some(why);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a request broke off, for whoever watches the agent.
fn why(code: Code) -> String {
    let why = match code {
        Code::Cancelled => "the downstream left",
        Code::RequestBroken => "the downstream's request body broke off",
        Code::UpstreamUnreachable => "the upstream cannot be reached: is the local server running?",
        Code::UpstreamFailed => "the upstream broke off, or its answer was not valid HTTP",
        Code::PathLost | Code::Gone => "the tunnel was lost and did not come back in time",
        Code::Timeout => "it took too long",
        Code::AgentLeft => "this agent is ending",
        Code::Refused => "this agent has too many requests in flight",
        Code::Protocol | Code::Finished | Code::Other(_) => return format!("{code:?}"),
    };
    why.to_owned()
}

/// Lines that wait to be printed; more are dropped, and counted: a slow terminal must not slow requests.
const MAX_LINES: usize = 1024;

/// Prints lines on standard output from a thread of its own, as many at once as there are.
struct Lines {
    lines_tx: Option<mpsc::SyncSender<String>>,
    dropped: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Lines {
    fn start() -> Self {
        let (lines_tx, lines_rx) = mpsc::sync_channel(MAX_LINES);
        let dropped = Arc::new(AtomicU64::new(0));
        let missed = dropped.clone();
        let thread = std::thread::spawn(move || print_all(&lines_rx, &missed));
        Self {
            lines_tx: Some(lines_tx),
            dropped,
            thread: Some(thread),
        }
    }

    fn print(&self, line: String) {
        let sent = self.lines_tx.as_ref().map(|lines_tx| lines_tx.try_send(line));
        if let Some(Err(mpsc::TrySendError::Full(_))) = sent {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A closed output does not stop the agent.
fn print_all(lines_rx: &mpsc::Receiver<String>, dropped: &AtomicU64) {
    while let Ok(first) = lines_rx.recv() {
        let mut page = first;
        page.push('\n');
        for line in lines_rx.try_iter().take(MAX_LINES) {
            page.push_str(&line);
            page.push('\n');
        }
        let dropped = dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            page.push_str(&format!("({dropped} more requests)\n"));
        }
        let _ = std::io::stdout().write_all(page.as_bytes());
        let _ = std::io::stdout().flush();
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        drop(self.lines_tx.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::{Cli, Plan};

    #[test]
    fn flags_win_over_the_file_except_over_a_tunnels_own_token() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = "relay = \"http://file\"\nconnections = 3\ntoken = \"file\"\nclient = \"a\"\n\
                    [[tunnel]]\nto = 1\n[[tunnel]]\nclient = \"b\"\nto = 2\ntoken = \"own\"";
        std::fs::write(file.path(), text).expect("written");
        let path = file.path().to_str().expect("text");
        let cli = Cli::try_parse_from(["adit", "agent", "--config", path, "--relay=http://flag", "--token=flag"]);
        let (_, plan) = cli.expect("arguments").plan().expect("valid");
        let Plan::Agent(config) = plan else { panic!("an agent") };
        assert_eq!(
            (config.relay.to_string().as_str(), config.connections),
            ("http://flag", 3)
        );
        let tokens: Vec<_> = config.tunnels.iter().map(|tunnel| tunnel.token.expose()).collect();
        assert_eq!(tokens, ["flag", "own"]);
    }

    #[test]
    fn nothing_to_tunnel_is_said_so() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().to_str().expect("text");
        let cli = Cli::try_parse_from(["adit", "agent", "--config", path]).expect("arguments");
        assert!(cli.plan().expect_err("nothing").to_string().contains("adit http PORT"));
    }
}
