//! `adit healthcheck`: asks a relay whether it lives, for container health checks.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use clap::Args;
use http_body_util::Empty;
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};

use super::{Given, file, given, parsed};
use crate::config::{RelayConfig, relay::reachable, values};

/// Long for a local answer, shorter than the interval of any health check.
const PATIENCE: Duration = Duration::from_secs(3);

/// Ask a relay, if not told otherwise the one on this machine, whether it is well: exit code 0 if so, 1 if not
#[derive(Debug, Args)]
pub struct HealthcheckArgs {
    /// Whether it takes new requests (/readyz), not only whether it lives (/healthz)
    #[arg(long)]
    ready: bool,
    /// The relay's admin listener; also by host name, as `relay:9090` [default: 127.0.0.1:9090]
    #[arg(long, env = "ADIT_ADMIN_LISTEN", value_name = "HOST:PORT", value_parser = given(place))]
    admin_listen: Option<Given<String>>,
    /// The relay's file, which may name the listener [default: none]
    #[arg(long, env = "ADIT_CONFIG", value_name = "FILE", value_parser = parsed::<PathBuf>)]
    config: Option<Given<PathBuf>>,
}

impl HealthcheckArgs {
    /// The address to ask: flag or environment over the file over the default.
    pub fn address(&self) -> anyhow::Result<String> {
        if let Some(Given(Some(place))) = &self.admin_listen {
            return Ok(place.clone());
        }
        let config = match file(&self.config) {
            Some(path) => RelayConfig::load(path)?,
            None => RelayConfig::default(),
        };
        Ok(reachable(config.admin_listen).to_string())
    }

    /// The path to ask for.
    pub fn path(&self) -> &'static str {
        if self.ready { "/readyz" } else { "/healthz" }
    }
}

/// Where to ask: an address, or of one to listen on that by which it is reached here, or a host name and a port.
fn place(text: &str) -> Result<String, values::Invalid> {
    let named = || {
        let (host, port) = text.rsplit_once(':')?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let is_name = !host.is_empty() && host.bytes().all(plain);
        (is_name && port.parse::<u16>().is_ok()).then(|| text.to_owned())
    };
    match (text.parse::<SocketAddr>(), named()) {
        (Ok(address), _) => Ok(reachable(address).to_string()),
        (Err(_), Some(name)) => Ok(name),
        (Err(_), None) => values::address(text).map(|address| address.to_string()),
    }
}

/// Asks once; the error says what was answered instead of a success.
pub(super) async fn run(address: String, path: &'static str) -> anyhow::Result<()> {
    let answer = timeout(PATIENCE, ask(&address, path)).await;
    answer.with_context(|| format!("no answer from http://{address}{path} within {} s", PATIENCE.as_secs()))?
}

async fn ask(address: &str, path: &'static str) -> anyhow::Result<()> {
    let stream = TcpStream::connect(address).await;
    let stream = stream.with_context(|| format!("no relay answers on {address}"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header("host", address).body(Empty::<Bytes>::new())?;
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let response = sender.send_request(request).await;
    let status = response
        .with_context(|| format!("no answer from http://{address}{path}"))?
        .status();
    ensure!(status.is_success(), "http://{address}{path} answered {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// The verdict about a relay whose answer is `status`.
    async fn verdict(status: &str) -> anyhow::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        let server = async {
            let (mut stream, _) = listener.accept().await?;
            let read = stream.read(&mut [0; 1024]).await?;
            ensure!(read > 0, "nothing was asked");
            stream.write_all(answer.as_bytes()).await?;
            Ok(stream)
        };
        let (asked, served) = tokio::join!(
            run(format!("localhost:{}", listener.local_addr()?.port()), "/readyz"),
            server
        );
        served.and(asked)
    }

    #[tokio::test]
    async fn only_a_success_is_well() {
        verdict("200 OK").await.expect("well");
        let refused = verdict("503 Service Unavailable")
            .await
            .expect_err("not well")
            .to_string();
        assert!(refused.contains("503"), "{refused}");
    }

    #[test]
    fn a_place_is_an_address_or_a_name() {
        for (text, is) in [
            ("0.0.0.0:9090", Some("127.0.0.1:9090")),
            ("[::1]:9090", Some("[::1]:9090")),
            ("relay-1.internal:9090", Some("relay-1.internal:9090")),
            ("relay", None),
            (":9090", None),
            ("re lay:9090", None),
            ("relay:70000", None),
        ] {
            assert_eq!(place(text).ok().as_deref(), is, "{text}");
        }
    }

    #[tokio::test]
    async fn nobody_there_is_not_well() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let refused = run(address.to_string(), "/healthz").await.expect_err("not well");
        assert!(
            format!("{refused:#}").contains("no relay answers on 127.0.0.1"),
            "{refused:#}"
        );
    }
}
