//! A registry that answers late, is away, and knows of dead nodes for a while.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use adit::{
    cluster::registry::{ConnectionRow, Holder, RegistryAway},
    ids::{ClientId, NodeId, TunnelId},
    relay::switchboard::Directory,
};
use futures_util::future::BoxFuture;
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// The database.
pub struct Rows(Mutex<State>);

struct State {
    rows: Vec<Holder>,
    /// What nodes have to say once it is back.
    late: Vec<Change>,
    is_away: bool,
    /// The longest that an answer takes.
    delay: Duration,
    random: StdRng,
}

enum Change {
    Put(Holder),
    Remove(TunnelId),
}

/// What one node sees of it.
pub struct SimDirectory {
    pub node_id: NodeId,
    pub rows: Arc<Rows>,
}

impl Rows {
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            rows: Vec::new(),
            late: Vec::new(),
            is_away: false,
            delay: Duration::from_millis(5),
            random: StdRng::seed_from_u64(seed),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic")
    }

    pub fn set_away(&self, is_away: bool) {
        let mut state = self.state();
        state.is_away = is_away;
        if !is_away {
            let late = std::mem::take(&mut state.late);
            late.into_iter().for_each(|change| state.apply(change));
        }
    }

    pub fn set_draining(&self, node_id: NodeId) {
        let mut state = self.state();
        let rows = state.rows.iter_mut();
        rows.filter(|row| row.node_id == node_id)
            .for_each(|row| row.draining = true);
    }

    /// Takes out the rows of nodes that are not among the living.
    pub fn reap(&self, living: &HashSet<NodeId>) {
        self.state().rows.retain(|row| living.contains(&row.node_id));
    }

    fn change(&self, change: Change) {
        let mut state = self.state();
        match state.is_away {
            true => state.late.push(change),
            false => state.apply(change),
        }
    }
}

impl State {
    fn apply(&mut self, change: Change) {
        match change {
            Change::Put(row) => self.rows.push(row),
            Change::Remove(id) => self.rows.retain(|row| row.tunnel.tunnel_ws_id != id),
        }
    }
}

impl Directory for SimDirectory {
    fn holders<'a>(&'a self, client_id: &'a ClientId) -> BoxFuture<'a, Result<Arc<[Holder]>, RegistryAway>> {
        let delay = {
            let mut state = self.rows.state();
            state.delay.mul_f64(state.random.random())
        };
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            let state = self.rows.state();
            if state.is_away {
                return Err(RegistryAway);
            }
            let rows = state.rows.iter().filter(|row| row.tunnel.client_id == *client_id);
            Ok(rows.cloned().collect())
        })
    }

    fn record(&self, row: ConnectionRow) {
        self.rows.change(Change::Put(Holder {
            tunnel: row,
            node_id: self.node_id,
            draining: false,
        }));
    }

    fn forget(&self, tunnel_ws_id: TunnelId) {
        self.rows.change(Change::Remove(tunnel_ws_id));
    }

    fn heard_of_change(&self, _client_id: &ClientId) {}
}
