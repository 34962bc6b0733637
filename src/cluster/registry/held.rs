//! The tunnels that this node holds, and what of them the database may not know yet. Pure.

use std::collections::{HashMap, HashSet};

use crate::{
    cluster::store::ConnectionRow,
    ids::{ClientId, TunnelId},
};

/// Rows a transaction: small enough that other writers of a SQLite file do not wait long.
const BATCH: usize = 256;

/// What the database shall say about this node's tunnels, and where it may not yet.
#[derive(Default)]
pub(super) struct Held {
    tunnels: HashMap<TunnelId, ConnectionRow>,
    /// Tunnels whose row may differ from `tunnels`. Not kept while `reconcile` is due, which finds them all: so it
    /// does not grow while the database is away.
    unwritten: HashSet<TunnelId>,
    /// When clients came or went, as far as the database has not heard.
    seen: HashMap<ClientId, i64>,
    /// The database was away, or our rows were reaped: compare all of them.
    reconcile: bool,
}

/// One transaction's worth of differences.
pub(super) struct Batch {
    pub put: Vec<ConnectionRow>,
    pub remove: Vec<TunnelId>,
    pub seen: Vec<(ClientId, i64)>,
}

impl Held {
    pub fn insert(&mut self, row: ConnectionRow, now: i64) {
        self.touch(row.tunnel_ws_id, row.client_id.clone(), now);
        self.tunnels.insert(row.tunnel_ws_id, row);
    }

    /// `false`: it was not held.
    pub fn remove(&mut self, tunnel: TunnelId, now: i64) -> bool {
        let Some(row) = self.tunnels.remove(&tunnel) else {
            return false;
        };
        self.touch(tunnel, row.client_id, now);
        true
    }

    fn touch(&mut self, tunnel: TunnelId, client: ClientId, now: i64) {
        if !self.reconcile {
            self.unwritten.insert(tunnel);
        }
        self.see(client, now);
    }

    fn see(&mut self, client: ClientId, at: i64) {
        let seen = self.seen.entry(client).or_insert(at);
        *seen = at.max(*seen);
    }

    /// `stored` is what the database had before this lock was taken: what changed since differs from it too.
    pub fn reconcile_with(&mut self, stored: &HashSet<TunnelId>) {
        self.reconcile = false;
        self.unwritten
            .extend(self.tunnels.keys().filter(|id| !stored.contains(id)));
        self.unwritten
            .extend(stored.iter().filter(|id| !self.tunnels.contains_key(id)));
    }

    pub fn take_batch(&mut self) -> Option<Batch> {
        let mut batch = Batch {
            put: Vec::new(),
            remove: Vec::new(),
            seen: Vec::new(),
        };
        let ids: Vec<TunnelId> = self.unwritten.iter().take(BATCH).copied().collect();
        for id in ids {
            self.unwritten.remove(&id);
            match self.tunnels.get(&id) {
                Some(row) => batch.put.push(row.clone()),
                None => batch.remove.push(id),
            }
        }
        let clients: Vec<ClientId> = self.seen.keys().take(BATCH).cloned().collect();
        batch
            .seen
            .extend(clients.into_iter().filter_map(|client| self.seen.remove_entry(&client)));
        (!batch.put.is_empty() || !batch.remove.is_empty() || !batch.seen.is_empty()).then_some(batch)
    }

    /// The batch could not be written, or may have been: all is compared when the database is back.
    pub fn give_back(&mut self, batch: Batch) {
        for (client, at) in batch.seen {
            self.see(client, at);
        }
        self.fall_behind();
    }

    /// The database is away, or has lost our rows.
    pub fn fall_behind(&mut self) {
        self.reconcile = true;
        self.unwritten.clear();
    }

    pub fn is_behind(&self) -> bool {
        self.reconcile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(client: &str) -> ConnectionRow {
        ConnectionRow {
            tunnel_ws_id: TunnelId::new(),
            client_id: client.parse().expect("a client id"),
            dialect: "moosicbox".into(),
            instance_id: None,
            slot: None,
            generation: 0,
            token_id: None,
            agent_version: None,
            remote_addr: String::new(),
            connected_at: 0,
        }
    }

    #[test]
    fn what_came_and_went_is_written_once_with_when_the_client_was_last_seen() {
        let (mut held, kept, gone) = (Held::default(), row("home"), row("home"));
        held.insert(kept.clone(), 1);
        held.insert(gone.clone(), 2);
        assert!(held.remove(gone.tunnel_ws_id, 3));
        assert!(!held.remove(gone.tunnel_ws_id, 4));
        let batch = held.take_batch().expect("differences");
        assert_eq!(
            (&batch.put, &batch.remove),
            (&vec![kept.clone()], &vec![gone.tunnel_ws_id])
        );
        assert_eq!(batch.seen, [(kept.client_id, 3)]);
        assert!(held.take_batch().is_none());
    }

    #[test]
    fn while_writes_fail_nothing_is_queued_and_then_everything_is_compared() {
        let (mut held, before, after) = (Held::default(), row("home"), row("home"));
        held.insert(before.clone(), 1);
        let batch = held.take_batch().expect("differences");
        held.give_back(batch);
        held.remove(before.tunnel_ws_id, 2);
        held.insert(after.clone(), 3);
        assert!(held.reconcile && held.unwritten.is_empty());

        // The failed write had arrived after all, and something older had been left behind.
        let forgotten = TunnelId::new();
        held.reconcile_with(&HashSet::from([before.tunnel_ws_id, forgotten]));
        let mut batch = held.take_batch().expect("differences");
        batch.remove.sort();
        assert_eq!(
            (batch.put, batch.remove),
            (vec![after.clone()], vec![before.tunnel_ws_id, forgotten])
        );
        assert_eq!(batch.seen, [(after.client_id, 3)]);
    }

    #[test]
    fn many_differences_are_many_small_batches() {
        let mut held = Held::default();
        (0..BATCH + 1).for_each(|_| held.insert(row("home"), 1));
        let sizes =
            [held.take_batch(), held.take_batch(), held.take_batch()].map(|batch| batch.map(|batch| batch.put.len()));
        assert_eq!(sizes, [Some(BATCH), Some(1), None]);
    }
}
