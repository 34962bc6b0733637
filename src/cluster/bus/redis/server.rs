//! Which Redis: one server, the master that Sentinels name, or a Cluster, by the form of the URL; and a connection to it.

use std::{collections::HashMap, fmt, time::Duration};

use futures_util::{FutureExt, future::join_all};
use redis::{
    Arg, AsyncConnectionConfig, Client, Cmd, ConnectionInfo, IntoConnectionInfo, Pipeline, ProtocolVersion, PushInfo,
    RedisError, Value,
    aio::{ConnectionLike, MultiplexedConnection, SendError},
    cluster::ClusterClientBuilder,
    cluster_async::ClusterConnection,
    io::tcp::TcpSettings,
    sentinel::{SentinelClientBuilder, SentinelServerType},
};

use super::super::BusError;
use crate::secret::Secret;

/// Connecting, TLS and authentication together take no longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A pipeline is answered within this, or the connection is given up: it may be open and deaf.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pipelines that the connection takes before it makes the sender wait. Two are on their way at most.
const PIPELINES: usize = 8;

const HELP: &str = "a Redis URL is redis://[user:password@]host:port, rediss:// for TLS, \
     redis+sentinel://[user:password@]host:port,…/master-name or redis+cluster://[user:password@]host:port,…";

/// Where the server is.
pub(super) struct Server {
    kind: Kind,
    /// For people: without credentials.
    name: String,
}

enum Kind {
    One(ConnectionInfo),
    Sentinels {
        sentinels: Vec<ConnectionInfo>,
        master: String,
        user: Option<String>,
        password: Option<String>,
        tls: bool,
    },
    Cluster(Vec<ConnectionInfo>),
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Server {
    pub fn parse(url: &Secret) -> Result<Self, BusError> {
        let bad = || BusError::Url(HELP.into());
        let (scheme, rest) = url.expose().split_once("://").ok_or_else(bad)?;
        let (credentials, hosts) = match rest.rsplit_once('@') {
            Some((credentials, hosts)) => (Some(credentials), hosts),
            None => (None, rest),
        };
        let name = format!("{scheme}://{hosts}");
        let (scheme, form) = scheme.split_once('+').unwrap_or((scheme, ""));
        if !matches!(scheme, "redis" | "rediss") {
            return Err(bad());
        }
        let kind = match form {
            "" => Kind::One(info(url.expose()).ok_or_else(bad)?),
            "cluster" => Kind::Cluster(infos(scheme, credentials, hosts).ok_or_else(bad)?),
            "sentinel" => sentinels(scheme, credentials, hosts).ok_or_else(bad)?,
            _ => return Err(bad()),
        };
        Ok(Self { kind, name })
    }

    /// A connection whose pushes go to `on_push`, called in the connection's own task.
    pub async fn connect<F>(&self, on_push: F) -> Result<Connection, RedisError>
    where
        F: Fn(PushInfo) -> Result<(), SendError> + Send + Sync + 'static,
    {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT))
            .set_pipeline_buffer_size(PIPELINES);
        match &self.kind {
            Kind::One(info) => one(Client::open(info.clone())?, config.set_push_sender(on_push)).await,
            Kind::Sentinels {
                sentinels,
                master,
                user,
                password,
                tls,
            } => {
                let addresses = sentinels.iter().map(|info| info.addr().clone());
                let mut builder = SentinelClientBuilder::new(addresses, master.clone(), SentinelServerType::Master)?
                    .set_client_to_redis_protocol(ProtocolVersion::RESP3)
                    .set_client_to_redis_tcp_settings(TcpSettings::default().set_nodelay(true));
                if *tls {
                    builder = builder.set_client_to_redis_tls_mode(redis::TlsMode::Secure);
                }
                if let Some(user) = user {
                    builder = builder.set_client_to_redis_username(user);
                }
                if let Some(password) = password {
                    builder = builder.set_client_to_redis_password(password);
                }
                let asked = async { builder.build()?.async_get_client().await };
                let client = tokio::time::timeout(CONNECT_TIMEOUT, asked)
                    .await
                    .map_err(|_| slow())??;
                one(client, config.set_push_sender(on_push)).await
            }
            Kind::Cluster(nodes) => {
                let client = ClusterClientBuilder::new(nodes.clone())
                    .use_protocol(ProtocolVersion::RESP3)
                    .connection_timeout(CONNECT_TIMEOUT)
                    .response_timeout(RESPONSE_TIMEOUT)
                    .tcp_settings(TcpSettings::default().set_nodelay(true))
                    .push_sender(on_push)
                    .build()?;
                let connecting = client.get_async_connection();
                let connection = tokio::time::timeout(2 * CONNECT_TIMEOUT, connecting).await;
                Ok(Connection::Cluster(connection.map_err(|_| slow())??))
            }
        }
    }
}

async fn one(client: Client, config: AsyncConnectionConfig) -> Result<Connection, RedisError> {
    Ok(Connection::One(
        client.get_multiplexed_async_connection_with_config(&config).await?,
    ))
}

fn slow() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

/// RESP3, where pushes are told from answers; TCP without Nagle's delay.
fn info(url: &str) -> Option<ConnectionInfo> {
    let info = url.into_connection_info().ok()?;
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    Some(
        info.set_redis_settings(settings)
            .set_tcp_settings(TcpSettings::default().set_nodelay(true)),
    )
}

fn infos(scheme: &str, credentials: Option<&str>, hosts: &str) -> Option<Vec<ConnectionInfo>> {
    let credentials = credentials
        .map(|credentials| format!("{credentials}@"))
        .unwrap_or_default();
    let hosts = hosts.trim_end_matches('/').split(',');
    hosts
        .map(|host| info(&format!("{scheme}://{credentials}{host}")))
        .collect()
}

fn sentinels(scheme: &str, credentials: Option<&str>, hosts: &str) -> Option<Kind> {
    let (hosts, master) = hosts.split_once('/')?;
    let with_credentials = infos(scheme, credentials, hosts)?;
    let settings = with_credentials.first()?.redis_settings();
    (!master.is_empty()).then_some(Kind::Sentinels {
        user: settings.username().map(str::to_owned),
        password: settings.password().map(str::to_owned),
        sentinels: infos("redis", None, hosts)?,
        master: master.to_owned(),
        tls: scheme == "rediss",
    })
}

/// A connection, cheap to clone.
#[derive(Clone)]
pub(super) enum Connection {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Connection {
    /// Whether channels belong to shards, and are spoken to with the sharded commands.
    pub fn is_sharded(&self) -> bool {
        matches!(self, Connection::Cluster(_))
    }

    /// Sends commands in their order, and waits for the answer to each.
    pub async fn send(&mut self, pipeline: &Pipeline, count: usize) -> Result<Vec<Value>, RedisError> {
        match self {
            Connection::One(connection) => connection.send_packed_commands(pipeline, 0, count).await,
            Connection::Cluster(connection) => by_channel(connection, pipeline, count).await,
        }
    }
}

/// Channels of one pipeline live on several shards, and the client sends what it is given at once in any order: so what
/// is published on one channel goes as a pipeline of its own, and all else command by command.
async fn by_channel(
    connection: &ClusterConnection,
    pipeline: &Pipeline,
    count: usize,
) -> Result<Vec<Value>, RedisError> {
    let mut groups: Vec<(Pipeline, Vec<usize>)> = Vec::new();
    let mut of_channel: HashMap<&[u8], usize> = HashMap::new();
    for (at, command) in pipeline.cmd_iter().enumerate() {
        let next = groups.len();
        let group = match published_on(command) {
            Some(channel) => *of_channel.entry(channel).or_insert(next),
            None => next,
        };
        if group == next {
            groups.push(Default::default());
        }
        groups[group].0.add_command(command.clone());
        groups[group].1.push(at);
    }
    let answers = groups.into_iter().map(|(pipeline, places)| {
        let mut connection = connection.clone();
        async move {
            let commands: Vec<&Cmd> = pipeline.cmd_iter().collect();
            let answers = match commands[..] {
                [command] => vec![connection.req_packed_command(command).await?],
                _ => connection.req_packed_commands(&pipeline, 0, places.len()).await?,
            };
            Ok::<_, RedisError>(places.into_iter().zip(answers).collect::<Vec<_>>())
        }
        .boxed()
    });
    let mut all = vec![Value::Nil; count];
    for answers in join_all(answers).await {
        for (at, answer) in answers? {
            all[at] = answer;
        }
    }
    Ok(all)
}

/// The channel of a command that publishes.
fn published_on(command: &Cmd) -> Option<&[u8]> {
    let mut words = command.args_iter();
    match (words.next(), words.next()) {
        (Some(Arg::Simple(b"SPUBLISH")), Some(Arg::Simple(channel))) => Some(channel),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<Server, BusError> {
        Server::parse(&url.parse().expect("any text"))
    }

    #[test]
    fn the_url_says_which_kind_of_redis() {
        for (url, name) in [
            ("redis://127.0.0.1:6379", "redis://127.0.0.1:6379"),
            ("rediss://adit:hunter2@redis:6380/", "rediss://redis:6380/"),
            ("redis+cluster://:hunter2@a:1,b:2", "redis+cluster://a:1,b:2"),
            (
                "redis+sentinel://adit:hunter2@a:1,b:2/main",
                "redis+sentinel://a:1,b:2/main",
            ),
        ] {
            let server = parsed(url).map_err(|error| error.to_string()).expect(url);
            assert_eq!(server.to_string(), name);
        }
    }

    #[test]
    fn what_is_no_redis_url_is_refused_without_repeating_it() {
        for url in [
            "",
            "hunter2",
            "http://hunter2@a",
            "redis+sentinel://:hunter2@a:1",
            "redis+x://hunter2@a:1",
            "redis://:hunter2@a:port",
        ] {
            let Err(error) = parsed(url) else {
                panic!("{url} was taken")
            };
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
}
