//! The agents' door: `GET /ws?clientId=…` with sub-protocol `adit.v1`. Checks, switches protocols, and runs the tunnel
//! until it ends. The only place of the relay that knows the WebSocket handshake.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;

use super::{
    State,
    out_body::OutBody,
    taker::TunnelTaker,
    tunnels::{Joined, Refused, Tunnel},
};
use crate::{
    cluster::{now_ms, registry::ConnectionRow},
    error::Cause,
    exchange::{
        link::{KeepAlive, LinkEnd, drive},
        path::{Owner, Path},
    },
    ids::{ClientId, TokenId},
    telemetry::{self, AuthFailure, Dialect, Violation},
    wire::{
        frame::{Frame, FrameError, SUBPROTOCOL},
        hello::{self, AgentHello, RelayHello},
        socket::{self, FrameSocket, Side, SocketError},
    },
};

/// An agent that has upgraded says hello within this.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a closed tunnel may take to flush its last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A request for a tunnel, from the head of an HTTP request.
pub struct Knock {
    /// The client it would serve.
    pub client_id: ClientId,
    /// The agent's address.
    pub remote: IpAddr,
    /// Whether it asks for a WebSocket, well formed.
    pub websocket: bool,
    /// Resolves to the connection.
    pub on_upgrade: Option<OnUpgrade>,
}

/// Answers a request for a tunnel: 101, and the tunnel runs in a task of the relay's; or an error that says what to do.
pub async fn accept(state: &Arc<State>, knock: Knock, headers: HeaderMap) -> Result<Response<OutBody>, Cause> {
    let token_id = state
        .auth
        .agent(&knock.client_id, knock.remote, &headers)
        .await
        .inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Agent))?;
    let (client_id, remote) = (knock.client_id.clone(), knock.remote);
    switch(state, knock, headers, Some(SUBPROTOCOL), move |state, upgraded| {
        run(state, client_id, token_id, remote, upgraded)
    })
}

/// Whether the WebSocket that is asked for is an agent's.
pub fn offers_adit(headers: &HeaderMap) -> bool {
    let offers = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    offers
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|one| one.trim() == SUBPROTOCOL)
}

/// 101, and what `run` makes of the connection, in a task of the relay's. An error if there can be no WebSocket now.
pub(super) fn switch<F>(
    state: &Arc<State>,
    knock: Knock,
    headers: HeaderMap,
    protocol: Option<&'static str>,
    run: impl FnOnce(Arc<State>, Upgraded) -> F + Send + 'static,
) -> Result<Response<OutBody>, Cause>
where
    F: Future<Output = ()> + Send + 'static,
{
    if !knock.websocket {
        return Err(Cause::BadRequest(
            "a tunnel is a WebSocket: connect with `adit http`, or upgrade the connection",
        ));
    }
    if state.is_draining() {
        return Err(Cause::Unavailable(
            "this relay node is leaving; connect again to reach another",
        ));
    }
    let key = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .ok_or(Cause::BadRequest("Sec-WebSocket-Key is missing"))?;
    let response = switching(key, protocol)?;
    drop(headers); // they would pin the read buffer of the connection for the tunnel's life
    let on_upgrade = knock
        .on_upgrade
        .ok_or(Cause::BadRequest("this connection cannot become a WebSocket"))?;
    let running = state.clone();
    state.tasks.spawn(async move {
        if let Ok(upgraded) = on_upgrade.await {
            Box::pin(run(running, upgraded)).await;
        }
    });
    Ok(response)
}

fn switching(key: &HeaderValue, protocol: Option<&'static str>) -> Result<Response<OutBody>, Cause> {
    let accept = HeaderValue::try_from(socket::accept_key(key.as_bytes())).map_err(|_| Cause::Internal)?;
    let mut response = Response::new(OutBody::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    if let Some(protocol) = protocol {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    Ok(response)
}

/// A tunnel's life, from its hello to its end.
async fn run(state: Arc<State>, client_id: ClientId, token_id: TokenId, remote: IpAddr, upgraded: Upgraded) {
    let mut socket = FrameSocket::new(TokioIo::new(upgraded), Side::Relay).await;
    let hello = match tokio::time::timeout(HELLO_TIMEOUT, read_hello(&mut socket)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(why)) => {
            state.board.metrics.violation(Violation::Hello);
            return tracing::info!(client.id = %client_id, remote = %remote, why, "an agent did not say hello");
        }
        Err(_) => return tracing::info!(client.id = %client_id, remote = %remote, "an agent did not say hello in time"),
    };
    let owner = Owner {
        client_id,
        instance_id: hello.instance_id,
    };
    let path = Path::new(owner, state.board.exchanges.clock());
    let tunnel = Tunnel::here(hello.slot, hello.generation, token_id, path);
    let Some(joined) = join(&state, &tunnel) else { return };
    let _counted = state.board.metrics.tunnel();
    let (node_id, client_id) = (state.registry.node_id(), &tunnel.path.owner.client_id);
    let span = telemetry::tunnel_span(node_id, client_id, tunnel.id, Dialect::Adit.as_str());
    begin(&state, &joined, &hello, remote);
    let taker = TunnelTaker::new(state.board.clone(), &tunnel);
    let keep_alive = KeepAlive {
        interval: state.config.tunnels.ping_interval,
        timeout: state.config.tunnels.ping_timeout,
    };
    let end = drive_to_end(socket, &tunnel, &taker, keep_alive).await;
    span.record("adit.tunnel.end", tracing::field::display(&end));
    finish(&state, joined, &end);
}

/// Puts the tunnel into the table, or says why it may not be there.
fn join(state: &State, tunnel: &Arc<Tunnel>) -> Option<Joined> {
    let (limit, client_id) = (
        state.config.tunnels.max_tunnels_per_client,
        &tunnel.path.owner.client_id,
    );
    match state.board.tunnels.join(tunnel.clone(), limit) {
        Ok(joined) => return Some(joined),
        Err(Refused::TooMany) => {
            tracing::warn!(client.id = %client_id, "the client holds as many tunnels as it may: refused");
        }
        Err(Refused::Old) => {
            tracing::info!(client.id = %client_id, "the agent has dialled again meanwhile: this tunnel is not needed");
        }
    }
    None
}

async fn read_hello(socket: &mut FrameSocket<TokioIo<Upgraded>>) -> Result<AgentHello, String> {
    let mut message: Bytes = match socket.message().await {
        Some(message) => message.map_err(|error| error.to_string())?,
        None => return Err("it closed the connection".into()),
    };
    match Frame::decode(&mut message) {
        Ok(Some(Frame::Hello(json))) => hello::from_json(&json),
        Ok(_) => Err("its first frame is no hello".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// The tunnel is in the table: the older one of its slot goes, the agent learns where it is, the registry too, and what
/// waits for this agent goes on.
fn begin(state: &State, joined: &Joined, hello: &AgentHello, remote: IpAddr) {
    let tunnel = &joined.tunnel;
    let Owner { client_id, instance_id } = &tunnel.path.owner;
    tunnel.path.send(hello::to_frame(&RelayHello {
        node_id: state.registry.node_id(),
        tunnel_ws_id: tunnel.id,
        public_url: state.config.client_url(client_id, state.bound),
        ping_interval_ms: state.config.tunnels.ping_interval.as_millis() as u64,
        ping_timeout_ms: state.config.tunnels.ping_timeout.as_millis() as u64,
        resume_timeout_ms: state.config.tunnels.resume_timeout.as_millis() as u64,
    }));
    if let Some(left) = state.drain_left() {
        tunnel.path.send(Frame::Drain(left.as_millis() as u32));
    }
    let row = ConnectionRow {
        tunnel_ws_id: tunnel.id,
        client_id: client_id.clone(),
        dialect: "adit".into(),
        instance_id: Some(*instance_id),
        slot: Some(tunnel.slot),
        generation: i64::try_from(tunnel.generation).unwrap_or(i64::MAX),
        token_id: Some(tunnel.token_id),
        agent_version: Some(hello.version.chars().take(64).collect()),
        remote_addr: remote.to_string(),
        connected_at: now_ms(),
    };
    let resumed = state.board.up(joined, row);
    tracing::info!(
        client.id = %client_id, tunnel.id = %tunnel.id, tunnel.slot = tunnel.slot, remote = %remote,
        agent.version = hello.version, exchanges.resumed = resumed, "tunnel open"
    );
}

/// Drives the tunnel; once it is closed here, its last words get a little time to leave.
async fn drive_to_end<S>(socket: FrameSocket<S>, tunnel: &Tunnel, taker: &TunnelTaker, keep_alive: KeepAlive) -> LinkEnd
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let last_words = async {
        tunnel.path.closed().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        end = drive(socket, tunnel.path.clone(), taker, keep_alive) => end,
        () = last_words => LinkEnd::Closed,
    }
}

/// The tunnel is over: out of the table and the registry; its exchanges go on over another of the same agent, or wait.
fn finish(state: &State, joined: Joined, end: &LinkEnd) {
    let tunnel = joined.tunnel.clone();
    let in_flight = state.board.down(joined);
    if let Some(violation) = violation_of(end) {
        state.board.metrics.violation(violation);
    }
    tracing::info!(
        client.id = %tunnel.path.owner.client_id, tunnel.id = %tunnel.id, why = %end, exchanges = in_flight,
        "tunnel closed"
    );
}

/// What of an end is the agent's fault.
fn violation_of(end: &LinkEnd) -> Option<Violation> {
    match end {
        LinkEnd::Foreign => Some(Violation::Foreign),
        LinkEnd::Frame(FrameError::TooLong) | LinkEnd::Socket(SocketError::TooLong) => Some(Violation::TooLong),
        LinkEnd::Violation(_) | LinkEnd::Frame(_) => Some(Violation::Malformed),
        LinkEnd::Socket(SocketError::WebSocket(_) | SocketError::Text) => Some(Violation::Malformed),
        LinkEnd::PeerClosed | LinkEnd::Closed | LinkEnd::Silent | LinkEnd::Socket(SocketError::Io(_)) => None,
    }
}
