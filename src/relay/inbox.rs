//! What comes over the bus: frames for agents whose tunnels are here, frames of agents whose exchanges are here, and news
//! of clients, and what they say to their subscribers. The counterpart of what [`taker`](super::taker) does for a tunnel's socket.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tracing::Span;

use super::{fanout::Left, switchboard::Switchboard};
use crate::{
    cluster::{
        bus::Inbox,
        letter::{Card, Letter, News, Unreadable},
        peer::Undelivered,
    },
    exchange::{NotYours, path::Owner, table::Taken},
    ids::{ClientId, NodeId, TunnelId},
    planted::Bug,
    telemetry::{self, FrameDrop, Violation},
    wire::{
        frame::{Frame, Raw},
        head::{Record, RecordReader},
    },
};

/// Takes what comes over the bus, for one node.
pub(super) struct NodeInbox(pub Arc<Switchboard>);

impl Inbox for NodeInbox {
    fn on_message(&self, message: Bytes) {
        let board = &self.0;
        match Letter::decode(message) {
            Ok(Letter::ToAgent {
                from,
                tunnel_ws_id,
                client_id,
                frames,
            }) => to_agent(board, from, client_id, tunnel_ws_id, frames),
            Ok(Letter::ToIngress { card, rtt_us, frames }) => to_ingress(board, &card, rtt_us, frames),
            Ok(Letter::NotMine {
                client_id,
                tunnel_ws_id,
                opens,
                ..
            }) => board.undelivered(Undelivered {
                client_id,
                tunnel_ws_id,
                opens,
                gone: true,
            }),
            Ok(Letter::Foreign {
                client_id,
                tunnel_ws_id,
                ..
            }) => expel(board, &client_id, tunnel_ws_id),
            Ok(Letter::News { from, client_id, news }) if from != board.node_id() => on_news(board, &client_id, news),
            Ok(Letter::News { .. }) => {}
            Ok(Letter::Said { from, client_id, part }) => board.fanout.on_part(from, &client_id, &part),
            Ok(Letter::Stands {
                from,
                client_id,
                standing,
            }) => board.fanout.on_standing(from, &client_id, standing),
            Ok(Letter::Asks { from, client_id, known }) => board.fanout.on_asks(from, &client_id, &known),
            Ok(Letter::Leave { .. }) => board.leave.cancel(),
            Ok(Letter::Count { from }) => board.peers.tell_count(from, board.metrics.traffic()),
            Ok(Letter::Counted { from, traffic }) => board.heard_count(from, traffic),
            Err(Unreadable) => board.metrics.frame_dropped(FrameDrop::Unreadable),
        }
    }

    fn on_interrupted(&self) {
        self.0.tunnels.all_stale();
        self.0.exchanges.missed();
        self.0.fanout.on_interrupted();
    }
}

/// Frames go on to the agent as they are; the ends are answerable for them.
fn to_agent(board: &Switchboard, from: NodeId, client_id: ClientId, id: TunnelId, frames: Bytes) {
    let tunnel = board.tunnels.find(&client_id, id);
    match tunnel.filter(|tunnel| tunnel.is_here() && !tunnel.path.is_closed()) {
        Some(tunnel) => {
            let spans = match telemetry::spans_are_taken() {
                true => spans_of(board, id, frames.clone()),
                false => Vec::new(),
            };
            if !tunnel.path.forward(frames) {
                board.metrics.frame_dropped(FrameDrop::Full);
                let full = FrameDrop::Full.as_str();
                spans.iter().for_each(|span| telemetry::fail_span(span, full));
            }
        }
        None => board.peers.not_mine(from, client_id, id, frames),
    }
}

/// A span for each request that begins with these frames and is of a trace. Its head tells, and comes whole with the OPEN
/// that begins it but for one of unusual length, which goes without a span.
fn spans_of(board: &Switchboard, tunnel_id: TunnelId, mut frames: Bytes) -> Vec<Span> {
    let mut spans = Vec::new();
    while let Ok(Some(Raw { opens, mut bytes, .. })) = Frame::split(&mut frames) {
        let Some(Ok(Some(Frame::Open(id, chunk)))) = opens.then(|| Frame::decode(&mut bytes)) else {
            continue;
        };
        let mut records = RecordReader::default();
        records.push(chunk.data);
        if let Ok(Some(Record::Request(head))) = records.next_record() {
            spans.extend(telemetry::owner_span(board.node_id(), tunnel_id, id, &head.headers));
        }
    }
    spans
}

/// Frames of an agent, all of one exchange. The node that sends them vouches for the agent; the exchange knows whose it is.
fn to_ingress(board: &Switchboard, card: &Card, rtt_us: u32, mut frames: Bytes) {
    let first = Frame::split(&mut frames.clone());
    let Ok(Some(Raw { id: Some(id), .. })) = first else {
        return board.metrics.frame_dropped(FrameDrop::Unreadable);
    };
    let Some(exchange) = board.exchanges.get(id) else {
        board.metrics.frame_dropped(FrameDrop::UnknownExchange);
        return board.peers.refuse(card, id);
    };
    if !exchange.is_of(&card.owner()) && !Bug::Unstamped.is_planted() {
        board.metrics.frame_dropped(FrameDrop::Foreign);
        return board.peers.denounce(card);
    }
    let Ok(learned) = board.tunnels.learn(card) else {
        return board.metrics.frame_dropped(FrameDrop::Superseded);
    };
    let path = learned.tunnel.path.clone();
    board.follow_news(learned);
    path.heard(path.clock().now());
    path.set_rtt(Duration::from_micros(rtt_us.into()) + 2 * board.peers.bus().rtt());
    while let Ok(Some(frame)) = Frame::decode(&mut frames) {
        match board.exchanges.on_frame(id, frame, &path) {
            Ok(Taken::Known) => {}
            Ok(Taken::Moved) => board.metrics.exchanges_moved(1),
            Ok(Taken::Unknown(_)) => board.metrics.frame_dropped(FrameDrop::UnknownExchange),
            Err(NotYours) => board.metrics.frame_dropped(FrameDrop::Foreign),
        }
    }
}

/// An agent here spoke in an exchange that is not its own: another node noticed.
fn expel(board: &Switchboard, client_id: &ClientId, id: TunnelId) {
    let tunnel = board.tunnels.find(client_id, id);
    if let Some(tunnel) = tunnel.filter(|tunnel| tunnel.is_here() && !tunnel.path.is_closed()) {
        board.metrics.violation(Violation::Foreign);
        tracing::warn!(client.id = %client_id, tunnel.id = %id, "it spoke in somebody else's exchange, at another node: closing the tunnel");
        tunnel.close(None);
    }
}

fn on_news(board: &Switchboard, client_id: &ClientId, news: News) {
    match news {
        News::Up(card) if card.client_id == *client_id => {
            if let Ok(learned) = board.tunnels.learn(&card) {
                board.follow_news(learned);
            }
        }
        News::Leaving { tunnel_ws_id } => {
            if let Some(tunnel) = board.tunnels.find(client_id, tunnel_ws_id) {
                tunnel.path.set_leaving();
            }
        }
        News::Down { tunnel_ws_id } => {
            if let Some(tunnel) = board.tunnels.unlearn(client_id, tunnel_ws_id, true) {
                board.lose(&tunnel);
            }
        }
        News::AgentLeft { instance_id } => {
            let owner = Owner {
                client_id: client_id.clone(),
                instance_id,
            };
            board.agent_left(&owner);
        }
        News::TokenRevoked { token_id } => {
            board.directory.heard_of_change(client_id);
            board.revoke(|tunnel| tunnel.token_id == token_id);
            board.fanout.end(client_id, Left::ClientGone);
        }
        News::ClientDeleted => {
            board.directory.heard_of_change(client_id);
            board.revoke(|tunnel| tunnel.path.owner.client_id == *client_id);
            board.fanout.forget(client_id);
        }
        News::ClientChanged => board.directory.heard_of_change(client_id),
        News::Disconnect { tunnel_ws_id } => {
            if let Some(tunnel) = board.tunnels.find(client_id, tunnel_ws_id) {
                super::operated::disconnect(&tunnel);
            }
        }
        News::Up(_) | News::Unknown => {}
    }
}
