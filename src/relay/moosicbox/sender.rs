//! A MoosicBox server's tunnel (it is the *sender* there), from its socket's opening to its end. This node is the host of
//! its exchanges: between the tunnel's path and the host lies no socket, and behind the host lies this one.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::Instant,
};

use super::{
    apps::Apps,
    requests::{Answer, Requests},
    serve::Sender,
};
use crate::{
    cluster::{letter::News, now_ms, registry::ConnectionRow},
    exchange::{
        hosting::{Host, ToldWatch},
        link::join,
        path::{Owner, Path},
        table::TICK,
    },
    ids::{ClientId, InstanceId},
    relay::{
        State, fanout,
        taker::TunnelTaker,
        tunnels::{Joined, Refused, Tunnel},
    },
    telemetry::{self, Violation},
    wire::{
        Dialect,
        frame::Code,
        messages::{Message, MessageSocket},
        moosicbox::{Audience, MAX_PACKET, Packet, WsAnswer},
        socket::Side,
    },
};

/// The longest message of a sender, bytes: a packet, or what it says to its apps.
const MAX_MESSAGE: usize = if MAX_PACKET > super::apps::MAX_MESSAGE {
    MAX_PACKET
} else {
    super::apps::MAX_MESSAGE
};
/// Requests that one sender answers at a time; each may hold 4 MiB here.
const MAX_REQUESTS: usize = 128;
/// Texts that wait for its socket; whoever has another waits too.
const OUTBOX: usize = 256;
/// How often it is pinged, and how long it may be silent: what the system we succeed does.
pub(super) const PING_EVERY: Duration = Duration::from_secs(5);
pub(super) const SILENT_FOR: Duration = Duration::from_secs(10);
/// A socket that takes nothing for so long is dead.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a closed connection may take to be told why.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long its socket is not read for one answer that nobody takes. Then that answer is given up.
const FULL_FOR: Duration = Duration::from_secs(5);
/// When the node leaves, its server is let go at the first moment that it answers nothing, and at the latest this long
/// before the node has to be gone.
const LEAVE_BEFORE: Duration = Duration::from_secs(3);

/// Serves a client by its server's socket, until that ends.
pub(super) async fn run<S>(state: Arc<State>, client_id: ClientId, remote: IpAddr, io: S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let owner = Owner {
        client_id,
        instance_id: InstanceId::new(),
    };
    let path = Path::new(owner.clone(), state.board.exchanges.clock());
    let tunnel = Tunnel::of_moosicbox(now_ms().unsigned_abs(), path);
    let joined = match state
        .board
        .tunnels
        .join(tunnel, state.config.tunnels.max_tunnels_per_client)
    {
        Ok(joined) => joined,
        Err(Refused::TooMany | Refused::Old) => {
            return tracing::warn!(client.id = %owner.client_id, "the client holds as many tunnels as it may: refused");
        }
    };
    let _counted = state.board.metrics.tunnel();
    let (node_id, dialect) = (state.registry.node_id(), telemetry::Dialect::MoosicBox.as_str());
    let _span = telemetry::tunnel_span(node_id, &owner.client_id, joined.tunnel.id, dialect);
    begin(&state, &joined, remote);
    let (outbox, texts) = mpsc::channel(OUTBOX);
    let sender = Sender {
        requests: Requests::new(state.spool.clone()),
        apps: Arc::default(),
        outbox,
    };
    let mut line = Line {
        socket: MessageSocket::new(io, Side::Relay, MAX_MESSAGE).await,
        texts,
        client_id: owner.client_id.clone(),
        requests: sender.requests.clone(),
        apps: sender.apps.clone(),
        state: state.clone(),
    };
    let host = Arc::new(Host::new(owner, sender, MAX_REQUESTS));
    let why = serve(&state, &joined, &host, &mut line).await;
    finish(&state, joined, &host, &why).await;
    if let Some((code, reason)) = why.told() {
        let closing = line.socket.close(code, reason);
        tokio::time::timeout(CLOSE_TIMEOUT, closing).await.ok();
    }
}

/// Why a sender's tunnel ended.
#[derive(Debug, thiserror::Error)]
enum Why {
    #[error("it closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("it has been silent for too long")]
    Silent,
    #[error("it does not take what it is sent")]
    Stuck,
    #[error("{0}")]
    Malformed(String),
    #[error("this end closed it")]
    ClosedHere,
    #[error("this node is leaving")]
    Leaving,
}

impl Why {
    /// What the sender is told, where it is not its own doing (RFC 6455 §7.4 and IANA's list).
    fn told(&self) -> Option<(u16, &'static str)> {
        match self {
            Why::Leaving => Some((1012, "this relay node is leaving: connect again")),
            Why::ClosedHere => Some((1001, "the relay has closed this tunnel")),
            Why::Malformed(_) => Some((
                1002,
                "a message was not what MoosicBox's protocol has: see the relay's log",
            )),
            Why::Closed | Why::Broken(_) | Why::Silent | Why::Stuck => None,
        }
    }
}

fn begin(state: &State, joined: &Joined, remote: IpAddr) {
    let tunnel = &joined.tunnel;
    let Owner { client_id, instance_id } = &tunnel.path.owner;
    let row = ConnectionRow {
        tunnel_ws_id: tunnel.id,
        client_id: client_id.clone(),
        dialect: Dialect::MoosicBox.as_str().into(),
        instance_id: Some(*instance_id),
        slot: Some(tunnel.slot),
        generation: i64::try_from(tunnel.generation).unwrap_or(i64::MAX),
        token_id: Some(tunnel.token_id),
        agent_version: None,
        remote_addr: remote.to_string(),
        connected_at: now_ms(),
    };
    state.board.up(joined, row);
    tracing::info!(client.id = %client_id, tunnel.id = %tunnel.id, remote = %remote, "tunnel of a MoosicBox server open");
}

async fn serve<S>(state: &Arc<State>, joined: &Joined, host: &Arc<Host<Sender>>, line: &mut Line<S>) -> Why
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let path = &joined.tunnel.path;
    let taker = TunnelTaker::new(state.board.clone(), &joined.tunnel);
    let (far, far_taker, told) = host.link_up(state.config.tunnels.resume_timeout);
    let why = tokio::select! {
        biased;
        () = leave_when_told(told, state, host) => Why::Leaving,
        _ = join((path, &taker), (&far, &far_taker)) => Why::ClosedHere,
        why = line.converse() => why,
        () = host.clone().pass_time() => Why::ClosedHere,
    };
    host.link_lost(&far);
    why
}

/// Resolves when the node is leaving and nothing is being answered, or it is late.
async fn leave_when_told(mut told: ToldWatch, state: &State, host: &Host<Sender>) {
    told.changed_to_leave().await;
    let patience = state.drain_left().unwrap_or_default().saturating_sub(LEAVE_BEFORE);
    let idle = async {
        while host.exchanges() > 0 {
            tokio::time::sleep(TICK).await;
        }
    };
    tokio::time::timeout(patience, idle).await.ok();
}

/// Its exchanges end with it, wherever their downstreams are: it cannot take them up again.
async fn finish(state: &State, joined: Joined, host: &Host<Sender>, why: &Why) {
    let (tunnel, owner) = (joined.tunnel.clone(), &host.owner());
    state.board.agent_left(owner);
    let instance_id = owner.instance_id;
    state
        .board
        .peers
        .tell(&owner.client_id, News::AgentLeft { instance_id });
    let in_flight = state.board.down(joined);
    host.service.requests.fail(None, Code::PathLost);
    host.leave().await;
    if let Why::Malformed(_) = why {
        state.board.metrics.violation(Violation::Malformed);
    }
    tracing::info!(client.id = %owner.client_id, tunnel.id = %tunnel.id, %why, exchanges = in_flight, "tunnel of a MoosicBox server closed");
}

/// The sender's socket.
struct Line<S> {
    socket: MessageSocket<S>,
    texts: mpsc::Receiver<String>,
    client_id: ClientId,
    requests: Arc<Requests>,
    apps: Arc<Apps>,
    state: Arc<State>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    /// Reads and writes until it ends.
    async fn converse(&mut self) -> Why {
        let mut pings = tokio::time::interval(PING_EVERY);
        // An answer that nobody takes, and until when the socket is not read for it.
        let mut full: Option<(Arc<Answer>, Instant)> = None;
        let mut heard = (self.socket.heard(), Instant::now());
        loop {
            let ended = tokio::select! {
                message = self.socket.message(), if full.is_none() => match message {
                    None => Err(Why::Closed),
                    Some(Err(error)) => Err(Why::Broken(error.to_string())),
                    Some(Ok(message)) => self.take(message).await.map(|answer| {
                        full = answer.map(|answer| (answer, Instant::now() + FULL_FOR));
                    }),
                },
                () = until_room(&full), if full.is_some() => {
                    full = None;
                    heard.1 = Instant::now();
                    Ok(())
                }
                text = self.texts.recv() => match text {
                    Some(text) => self.send(text).await,
                    None => Err(Why::ClosedHere),
                },
                _ = pings.tick() => self.ping(&mut heard, full.is_some()).await,
            };
            if let Err(why) = ended {
                return why;
            }
        }
    }

    async fn take(&mut self, message: Message) -> Result<Option<Arc<Answer>>, Why> {
        match message {
            Message::Binary(packet) => match Packet::decode(packet) {
                Ok(packet) => Ok(self.requests.take(packet)),
                Err(bad) => {
                    self.requests.fail(bad.request_id, Code::UpstreamFailed);
                    Err(Why::Malformed(bad.to_string()))
                }
            },
            Message::Text(text) => {
                let answer = WsAnswer::decode(&text).map_err(|error| Why::Malformed(error.to_string()))?;
                self.answer(answer).await;
                Ok(None)
            }
        }
    }

    async fn answer(&mut self, answer: WsAnswer) {
        let body = answer.body.into();
        let audience = match answer.audience {
            Audience::WhoAsked(request_id) => return self.apps.answer(request_id, body),
            Audience::Only(only) => fanout::Audience::Only(only),
            Audience::AllBut(but) if but.is_empty() => fanout::Audience::All,
            Audience::AllBut(but) => fanout::Audience::AllBut(but),
        };
        if let Err(error) = self.state.board.fanout.publish(&self.client_id, audience, body).await {
            tracing::warn!(client.id = %self.client_id, %error, "a message of a MoosicBox server to its apps is lost");
        }
    }

    async fn send(&mut self, text: String) -> Result<(), Why> {
        let sent = tokio::time::timeout(WRITE_TIMEOUT, self.socket.send(Message::Text(text.into()))).await;
        sent.map_err(|_| Why::Stuck)?
            .map_err(|error| Why::Broken(error.to_string()))
    }

    /// `heard`: how often it was heard, and when that last grew.
    async fn ping(&mut self, heard: &mut (u64, Instant), is_full: bool) -> Result<(), Why> {
        if self.socket.heard() != heard.0 || is_full {
            *heard = (self.socket.heard(), Instant::now());
        }
        if heard.1.elapsed() >= PING_EVERY + SILENT_FOR {
            return Err(Why::Silent);
        }
        let sent = tokio::time::timeout(WRITE_TIMEOUT, self.socket.send_ping()).await;
        sent.map_err(|_| Why::Stuck)?
            .map_err(|error| Why::Broken(error.to_string()))
    }
}

/// Waits until an answer has room again, or is given up for holding up the others.
async fn until_room(full: &Option<(Arc<Answer>, Instant)>) {
    let Some((answer, until)) = full else { return };
    if tokio::time::timeout_at(*until, answer.has_room()).await.is_err() {
        tracing::info!("a downstream takes too little of a MoosicBox server's answer: given up");
        answer.fail(Code::Timeout);
    }
}
