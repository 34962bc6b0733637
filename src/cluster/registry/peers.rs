//! Which of the other nodes are dead. Pure: what the database says and the time are given to it.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::presence::HEARTBEAT_INTERVAL;
use crate::{cluster::store::NodeRow, ids::NodeId};

/// A node whose heartbeat has not moved for so long is dead.
const NODE_DEAD_AFTER: Duration = Duration::from_secs(20);

/// The other nodes' heartbeats and since when each has stood still **by this node's clock**: nodes' wall clocks may
/// differ by minutes.
#[derive(Default)]
pub(super) struct Peers {
    beats: HashMap<NodeId, (i64, Instant)>,
    looked: Option<Instant>,
}

impl Peers {
    /// Takes in what the database says now, and names those who are dead with their last heartbeat.
    pub fn look(&mut self, now: Instant, nodes: &[NodeRow]) -> Vec<(NodeId, i64)> {
        // We looked away, because the database did, or because we were stopped: perhaps so were they.
        if self.looked.is_some_and(|looked| now >= looked + 2 * HEARTBEAT_INTERVAL) {
            self.beats.clear();
        }
        self.looked = Some(now);
        let before = std::mem::take(&mut self.beats);
        self.beats = nodes
            .iter()
            .map(|node| match before.get(&node.node_id) {
                Some(&(beat, since)) if beat == node.heartbeat_at => (node.node_id, (beat, since)),
                _ => (node.node_id, (node.heartbeat_at, now)),
            })
            .collect();
        let dead = |since: Instant| now >= since + NODE_DEAD_AFTER;
        self.beats
            .iter()
            .filter(|(_, (_, since))| dead(*since))
            .map(|(node, (beat, _))| (*node, *beat))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: Duration = HEARTBEAT_INTERVAL;

    fn node(node_id: NodeId, heartbeat_at: i64) -> NodeRow {
        NodeRow {
            node_id,
            address: String::new(),
            version: String::new(),
            started_at: 0,
            heartbeat_at,
            draining: false,
        }
    }

    #[test]
    fn a_node_is_dead_when_its_heartbeat_stands_still_whatever_its_clock_says() {
        let (mut peers, start) = (Peers::default(), Instant::now());
        let (silent, lively) = (NodeId::new(), NodeId::new());
        for turn in 0..4 {
            let dead = peers.look(
                start + BEAT * turn,
                &[node(silent, -600_000), node(lively, i64::from(turn))],
            );
            assert_eq!(dead, [], "turn {turn}");
        }
        let dead = peers.look(start + BEAT * 4, &[node(silent, -600_000), node(lively, 4)]);
        assert_eq!(dead, [(silent, -600_000)]);
    }

    #[test]
    fn nobody_is_dead_for_what_happened_while_we_looked_away() {
        let (mut peers, start) = (Peers::default(), Instant::now());
        let peer = NodeId::new();
        assert_eq!(peers.look(start, &[node(peer, 1)]), []);
        let back = start + Duration::from_secs(60);
        assert_eq!(peers.look(back, &[node(peer, 1)]), []);
        assert_eq!(peers.look(back + BEAT, &[node(peer, 2)]), []);
    }
}
