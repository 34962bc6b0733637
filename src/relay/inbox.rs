//! What comes over the bus: frames for agents whose tunnels are here, frames of agents whose exchanges are here, and news
//! of clients. The counterpart of what [`accept`](super::accept) does for a socket.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    State, lifecycle,
    tunnels::{Learned, Tunnel},
};
use crate::{
    cluster::{
        bus::Inbox,
        letter::{Card, Letter, News, Unreadable},
        peer::Undelivered,
    },
    exchange::{NotYours, path::Owner, table::Taken},
    ids::{ClientId, NodeId, TunnelId},
    telemetry::{FrameDrop, Violation},
    wire::frame::{Code, Frame, Raw},
};

/// Takes what comes over the bus, for one node.
pub(super) struct NodeInbox(pub Arc<State>);

impl Inbox for NodeInbox {
    fn on_message(&self, message: Bytes) {
        let state = &self.0;
        match Letter::decode(message) {
            Ok(Letter::ToAgent {
                from,
                tunnel_ws_id,
                client_id,
                frames,
            }) => to_agent(state, from, client_id, tunnel_ws_id, frames),
            Ok(Letter::ToIngress { card, rtt_us, frames }) => to_ingress(state, &card, rtt_us, frames),
            Ok(Letter::NotMine {
                client_id,
                tunnel_ws_id,
                opens,
                ..
            }) => state.undelivered(Undelivered {
                client_id,
                tunnel_ws_id,
                opens,
                gone: true,
            }),
            Ok(Letter::Foreign {
                client_id,
                tunnel_ws_id,
                ..
            }) => expel(state, &client_id, tunnel_ws_id),
            Ok(Letter::News { from, client_id, news }) if from != state.peers.node_id() => {
                on_news(state, &client_id, news)
            }
            Ok(Letter::News { .. }) => {}
            Err(Unreadable) => state.metrics.frame_dropped(FrameDrop::Unreadable),
        }
    }

    fn on_interrupted(&self) {
        self.0.tunnels.all_stale();
        self.0.exchanges.missed();
    }
}

/// Frames go on to the agent as they are; the ends are answerable for them.
fn to_agent(state: &State, from: NodeId, client_id: ClientId, id: TunnelId, frames: Bytes) {
    let tunnel = state.tunnels.find(&client_id, id);
    match tunnel.filter(|tunnel| tunnel.is_here() && !tunnel.path.is_closed()) {
        Some(tunnel) => {
            if !tunnel.path.forward(frames) {
                state.metrics.frame_dropped(FrameDrop::Full);
            }
        }
        None => state.peers.not_mine(from, client_id, id, frames),
    }
}

/// Frames of an agent, all of one exchange. The node that sends them vouches for the agent; the exchange knows whose it is.
fn to_ingress(state: &State, card: &Card, rtt_us: u32, mut frames: Bytes) {
    let first = Frame::split(&mut frames.clone());
    let Ok(Some(Raw { id: Some(id), .. })) = first else {
        return state.metrics.frame_dropped(FrameDrop::Unreadable);
    };
    let Some(exchange) = state.exchanges.get(id) else {
        state.metrics.frame_dropped(FrameDrop::UnknownExchange);
        return state.peers.refuse(card, id);
    };
    if !exchange.is_of(&card.owner()) {
        state.metrics.frame_dropped(FrameDrop::Foreign);
        return state.peers.denounce(card);
    }
    let Ok(learned) = state.tunnels.learn(card) else {
        return state.metrics.frame_dropped(FrameDrop::Superseded);
    };
    let path = learned.tunnel.path.clone();
    state.follow_news(learned);
    path.heard(path.clock().now());
    path.set_rtt(Duration::from_micros(rtt_us.into()) + 2 * state.peers.bus().rtt());
    while let Ok(Some(frame)) = Frame::decode(&mut frames) {
        match state.exchanges.on_frame(id, frame, &path) {
            Ok(Taken::Known) => {}
            Ok(Taken::Moved) => state.metrics.exchanges_moved(1),
            Ok(Taken::Unknown(_)) => state.metrics.frame_dropped(FrameDrop::UnknownExchange),
            Err(NotYours) => state.metrics.frame_dropped(FrameDrop::Foreign),
        }
    }
}

/// An agent here spoke in an exchange that is not its own: another node noticed.
fn expel(state: &State, client_id: &ClientId, id: TunnelId) {
    let tunnel = state.tunnels.find(client_id, id);
    if let Some(tunnel) = tunnel.filter(|tunnel| tunnel.is_here() && !tunnel.path.is_closed()) {
        state.metrics.violation(Violation::Foreign);
        tracing::warn!(client.id = %client_id, tunnel.id = %id, "it spoke in somebody else's exchange, at another node: closing the tunnel");
        tunnel.close(None);
    }
}

fn on_news(state: &State, client_id: &ClientId, news: News) {
    match news {
        News::Up(card) if card.client_id == *client_id => {
            if let Ok(learned) = state.tunnels.learn(&card) {
                state.follow_news(learned);
            }
        }
        News::Leaving { tunnel_ws_id } => {
            if let Some(tunnel) = state.tunnels.find(client_id, tunnel_ws_id) {
                tunnel.path.set_leaving();
            }
        }
        News::Down { tunnel_ws_id } => {
            if let Some(tunnel) = state.tunnels.unlearn(client_id, tunnel_ws_id, true) {
                state.lose_peer(&tunnel);
            }
        }
        News::AgentLeft { instance_id } => {
            let owner = Owner {
                client_id: client_id.clone(),
                instance_id,
            };
            state.exchanges.owner_left(&owner, Code::AgentLeft);
        }
        News::TokenRevoked { token_id } => {
            state.registry.heard_of_change(client_id);
            lifecycle::revoke(state, |tunnel| tunnel.token_id == token_id);
        }
        News::ClientDeleted => {
            state.registry.heard_of_change(client_id);
            lifecycle::revoke(state, |tunnel| tunnel.path.owner.client_id == *client_id);
        }
        News::ClientChanged => state.registry.heard_of_change(client_id),
        News::Up(_) | News::Unknown => {}
    }
}

impl State {
    /// A peer's tunnel is known now: the one that it supersedes goes, and what waits for its agent goes on over it.
    pub(super) fn follow_news(&self, learned: Learned) {
        let path = &learned.tunnel.path;
        if let Some(old) = &learned.superseded {
            old.close(Some(Frame::Superseded));
            self.metrics
                .exchanges_moved(self.exchanges.path_lost(&old.path, Some(path)));
        }
        if learned.is_new {
            self.metrics.exchanges_moved(self.exchanges.path_found(path));
        }
    }

    /// A peer's tunnel is gone: its exchanges go on over another of the same agent, or wait.
    pub(super) fn lose_peer(&self, tunnel: &Tunnel) {
        tunnel.path.close();
        let other = self.tunnels.other_path(&tunnel.path.owner, Some(&tunnel.path));
        self.metrics
            .exchanges_moved(self.exchanges.path_lost(&tunnel.path, other.as_ref()));
    }

    /// Frames for a peer's tunnel went nowhere: it is gone, unless only the bus is away. Requests that it was the first to
    /// hear of may go elsewhere.
    pub(super) fn undelivered(&self, lost: Undelivered) {
        let gone = lost
            .gone
            .then(|| self.tunnels.unlearn(&lost.client_id, lost.tunnel_ws_id, true));
        if let Some(tunnel) = gone.flatten() {
            tracing::debug!(client.id = %lost.client_id, tunnel.id = %tunnel.id, "a peer's tunnel is gone");
            self.lose_peer(&tunnel);
        }
        lost.opens.iter().for_each(|id| self.exchanges.open_returned(*id));
    }
}
