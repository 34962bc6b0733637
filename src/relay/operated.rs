//! What operators see of a running node and do to it, for the admin API.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::broadcast::error::RecvError;

use super::{
    State,
    admin::{Control, Live},
    switchboard::Switchboard,
    tunnels::{Place, Tunnel},
};
use crate::{
    cluster::{
        bus::Reached,
        letter::{News, Traffic},
    },
    ids::{ClientId, NodeId, TunnelId},
};

/// How long peers get to say what they have counted: many times what the bus takes, and short for whoever looks.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// A node, as its admin listener has it.
pub(super) struct Operated(pub Arc<State>);

impl Control for Operated {
    fn traffic(&self) -> Traffic {
        self.0.board.metrics.traffic()
    }

    fn traffic_of(&self, peers: Vec<NodeId>) -> BoxFuture<'_, HashMap<NodeId, Traffic>> {
        Box::pin(traffic_of(&self.0.board, peers))
    }

    fn live(&self, client_id: &ClientId, tunnel_ws_id: TunnelId) -> Option<Live> {
        let tunnel = self.0.board.tunnels.find(client_id, tunnel_ws_id)?;
        tunnel.is_here().then(|| Live {
            exchanges_in_flight: tunnel.path.in_flight(),
            rtt: tunnel.path.rtt(),
        })
    }

    fn find(&self, tunnel_ws_id: TunnelId) -> Option<(NodeId, ClientId)> {
        let board = &self.0.board;
        let tunnel = board.tunnels.known().into_iter().find(|one| one.id == tunnel_ws_id)?;
        let node_id = match tunnel.place {
            Place::Here => board.node_id(),
            Place::At(node_id) => node_id,
        };
        Some((node_id, tunnel.path.owner.client_id.clone()))
    }

    fn disconnect(&self, node_id: NodeId, client_id: ClientId, tunnel_ws_id: TunnelId) -> BoxFuture<'_, Reached> {
        let board = &self.0.board;
        if node_id != board.node_id() {
            let news = News::Disconnect { tunnel_ws_id };
            return Box::pin(board.peers.tell_node(node_id, &client_id, news).reached());
        }
        let done = match board.tunnels.find(&client_id, tunnel_ws_id) {
            Some(tunnel) if disconnect(&tunnel) => Reached::Somebody(1),
            _ => Reached::Nobody,
        };
        Box::pin(std::future::ready(done))
    }

    fn drain(&self, node_id: NodeId) -> BoxFuture<'_, Reached> {
        let board = &self.0.board;
        if node_id != board.node_id() {
            return Box::pin(board.peers.send_away(node_id).reached());
        }
        board.leave.cancel();
        Box::pin(std::future::ready(Reached::Somebody(1)))
    }
}

/// Closes a tunnel for an operator, if it is here. Its agent may dial again: only a revoked token keeps it away.
pub(super) fn disconnect(tunnel: &Tunnel) -> bool {
    if !tunnel.is_here() {
        return false;
    }
    tracing::info!(client.id = %tunnel.path.owner.client_id, tunnel.id = %tunnel.id, "an operator disconnects it: closing the tunnel");
    tunnel.close(None);
    true
}

/// Asks peers over the bus; who is not there or does not answer in time is left out.
async fn traffic_of(board: &Switchboard, peers: Vec<NodeId>) -> HashMap<NodeId, Traffic> {
    let mut counts = board.counts();
    let mut found = HashMap::new();
    let collect = async {
        let asked = peers.into_iter().map(async |peer| {
            let reached = board.peers.ask_count(peer).reached().await;
            (!matches!(reached, Reached::Nobody | Reached::Unsent)).then_some(peer)
        });
        let mut due: HashSet<NodeId> = join_all(asked).await.into_iter().flatten().collect();
        while !due.is_empty() {
            match counts.recv().await {
                Ok((peer, traffic)) if due.remove(&peer) => drop(found.insert(peer, traffic)),
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => break,
            }
        }
    };
    // Late or not, what has come is told.
    tokio::time::timeout(ANSWER_TIMEOUT, collect).await.ok();
    found
}
