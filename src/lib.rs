//! adit: a self-hosted reverse-tunnel relay, as a library. The binary `adit` is [`cli`] and nothing else.
//!
//! A local server behind NAT (the *upstream*) is reached through an *agent* that dials out and holds WebSockets to a
//! *relay*. Requests from the internet (the *downstream*) come to the relay and stream to the upstream and back.
//!
//! # A request's path
//!
//! In the order in which a request meets them; each step is one file, and answers come back through return values:
//!
//! ```text
//! downstream
//!   │  relay::downstream   the connection: caps, deadlines, HTTP/1.1 or HTTP/2
//!   │  relay::routes       which heads are let in (strict), whose they are (client_of), every route
//!   │  relay::ingress      a request for a client, step by step:
//!   │    relay::limits       how much may the address and the client ask
//!   │    relay::auth         is the downstream let in, and what of the request was the credential
//!   │    relay::forward      the head, fit for the upstream
//!   │    relay::router       a tunnel of the client: here, at another node, or the next one to come
//!   │    exchange::ingress   this end of the exchange: opens it, sends the body, waits for the head
//!   │    relay::respond      the answer: as it comes, whole, or an upgraded connection
//!   │  exchange::path      frames of many exchanges take turns on one socket
//!   │  exchange::link      one tunnel's WebSocket, written and read (relay::accept is the door it came in by)
//!   ⇣
//!   ┊  when another node holds the tunnel, the path's frames go there first, and nothing else is different:
//!   ┊    cluster::peer       takes the path's frames out in turns, as letters (cluster::letter)
//!   ┊    cluster::bus        to the inbox of that node ⇢ relay::inbox there ⇢ the tunnel's path, as they are
//!   ┊    and back: relay::taker there ⇢ the exchange's own channel ⇢ relay::inbox here ⇢ the exchange
//!   ┊  when a MoosicBox server holds it, the node itself is the host: relay::moosicbox there ⇢ its WebSocket, as JSON
//!   │  agent::slot, dial   holds a tunnel open: dials, says hello, dials again
//!   │  exchange::hosting   frames of all tunnels to their exchanges
//!   │  exchange::host      the other end of the exchange: serves it with a function from request to response
//!   │  agent::upstream     that function: calls the local server
//! upstream
//! ```
//!
//! Between the two ends of an exchange nothing is reliable and nothing needs to be: [`wire::stream`] numbers, acknowledges
//! and resends bytes, so an exchange outlives the socket that carries it.
//!
//! What a client says to its subscribers takes another way: `relay::publish` (or, on the agent's machine,
//! `agent::publish`) ⇢ [`relay::fanout`] ⇢ the client's channel of the bus ⇢ `relay::fanout` of every node with subscribers
//! ⇢ [`relay::subscribe`].
//!
//! # Where to look
//!
//! | module | is |
//! |---|---|
//! | [`relay`] | one node: [`relay::Relay::new`] touches nothing, [`relay::Relay::run`] serves and drains |
//! | [`agent`] | the program next to the upstream |
//! | [`exchange`] | one request and its response in flight: two ends, and a path that may be replaced under them |
//! | [`wire`] | streams, records and frames: no I/O and no clock of its own, but for [`wire::socket`] and [`wire::messages`] |
//! | [`wire::moosicbox`] | the other dialect that a tunnel may speak: what MoosicBox servers and their apps say |
//! | [`cluster`] | what nodes share: the registry (who holds what, who may do what) and the bus between them |
//! | [`config`] | what an operator may set |
//! | [`telemetry`] | what an operator sees: logs, metrics, and traces through all of a request's path |
//! | [`error`] | every error answer, and its status |
//! | [`secret`], [`ids`], [`shutdown`] | values that all of them use |
//! | [`cli`] | arguments, laid over the configuration, start the library |
//!
//! Layers: `wire`, `ids` and `secret` know nobody; `exchange` knows `wire`; `agent` and `cluster` know `exchange`; `relay`
//! knows all but `agent`; only `cli` knows both. Only `cluster::store` says SQL, only `cluster::bus::redis` says Redis.
//! Only `wire::socket`, `wire::messages`, `relay::accept` and `agent::dial` name a WebSocket library.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | upstream, downstream | the local server behind the agent; whoever sends the request |
//! | agent | the program next to the upstream that dials out |
//! | relay, node | the server; one process of it, with a `node_id` that is new at each start |
//! | client, `client_id` | the name a tunnel serves: what the downstream asks for |
//! | tunnel, `tunnel_ws_id` | one agent WebSocket held by one node; a client may have several |
//! | slot, instance | the place of a tunnel among its agent's; one agent process, with an `instance_id` |
//! | exchange, `request_id` | one request and its response, in flight |
//! | ingress, host | the two ends of an exchange: the node with the downstream; whoever calls the upstream |
//! | dialect | what is spoken inside a tunnel: adit's own frames, or what MoosicBox servers speak |
//! | path | what carries an exchange's frames between its ends: a socket, or the bus and a socket |
//! | owner | the node that holds a tunnel's WebSocket |
//! | peer | another node of the same relay |
//! | bus | pub/sub between nodes: Redis, or inside one process |
//! | to publish, subscriber | to say something to all who listen to a client; one of them |
//! | registry | who holds what, and who may do what: a SQLite file, or a MySQL-protocol database |
//! | to park | to let a request wait for a tunnel that was here a moment ago |
//! | to drain | to take nothing new, finish what is held, and end |
//!
//! # A relay and an agent in one process
//!
//! ```
//! use adit::{
//!     agent::{self, Agent},
//!     cluster::registry::NewAuth,
//!     config::RelayConfig,
//!     relay::{Listeners, Relay},
//!     shutdown::Shutdown,
//! };
//! use tokio::{
//!     io::{AsyncReadExt, AsyncWriteExt},
//!     net::{TcpListener, TcpStream},
//!     sync::oneshot,
//! };
//!
//! # #[tokio::main]
//! # async fn main() -> anyhow::Result<()> {
//! // The upstream: any HTTP server on this machine.
//! let upstream = TcpListener::bind("127.0.0.1:0").await?;
//! let to = upstream.local_addr()?.to_string().parse()?;
//! let app = axum::Router::new().fallback(|| async { "hello from behind the tunnel" });
//! tokio::spawn(async { axum::serve(upstream, app).await });
//!
//! // The relay, with its registry in memory.
//! let listeners = Listeners {
//!     public: TcpListener::bind("127.0.0.1:0").await?,
//!     admin: TcpListener::bind("127.0.0.1:0").await?,
//! };
//! let address = listeners.public.local_addr()?;
//! let config = RelayConfig { database_url: "sqlite::memory:".parse()?, ..RelayConfig::default() };
//! let (shutdown, (ready_tx, ready_rx)) = (Shutdown::new(), oneshot::channel());
//! let relay = tokio::spawn(Relay::new(config).run(listeners, shutdown.clone(), |ready| drop(ready_tx.send(ready))));
//! let registry = ready_rx.await?.registry;
//!
//! // The agent, with an access token of a client that anyone may reach.
//! let (_, token) = registry.create_client(&"home".parse()?, NewAuth::Public).await?;
//! let relay_url = format!("http://{address}").parse()?;
//! let agent = Agent::new(agent::Config::new(relay_url, "home".parse()?, token, to))?;
//! let (up_tx, mut up_rx) = tokio::sync::mpsc::channel(1);
//! let agent = tokio::spawn(agent.run(shutdown.clone(), move |event| drop(up_tx.try_send(event))));
//! assert!(matches!(up_rx.recv().await, Some(agent::Event::Connected { .. })));
//!
//! // A downstream.
//! let mut downstream = TcpStream::connect(address).await?;
//! let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nAdit-Client: home\r\nConnection: close\r\n\r\n");
//! downstream.write_all(request.as_bytes()).await?;
//! let mut answer = String::new();
//! downstream.read_to_string(&mut answer).await?;
//! assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
//! assert!(answer.contains("hello from behind the tunnel"), "{answer}");
//!
//! shutdown.begin_drain();
//! agent.await?;
//! relay.await??;
//! # Ok(())
//! # }
//! ```

pub mod agent;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod error;
pub mod exchange;
pub mod ids;
mod planted;
pub mod relay;
pub mod secret;
pub mod shutdown;
pub mod telemetry;
mod tls;
pub mod wire;
