//! The tunnels that this node holds, by client; who was here a moment ago; and the requests that wait for a tunnel.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::{
    exchange::path::{Owner, Path},
    ids::{ClientId, TokenId, TunnelId},
    wire::frame::Frame,
};

/// One agent WebSocket that this node holds.
#[derive(Debug)]
pub struct Tunnel {
    /// Its name in the registry.
    pub id: TunnelId,
    /// Which of its instance's tunnels it is.
    pub slot: u32,
    /// The access token it was opened with: revoking that closes it.
    pub token_id: TokenId,
    /// Where the agent's connection comes from.
    pub remote: IpAddr,
    /// Where its frames go.
    pub path: Arc<Path>,
}

impl Tunnel {
    fn client_id(&self) -> &ClientId {
        &self.path.owner.client_id
    }

    /// Tells the agent why, and closes.
    pub fn close(&self, last: Option<Frame>) {
        if let Some(frame) = last {
            self.path.send(frame);
        }
        self.path.close();
    }
}

/// All tunnels of this node.
#[derive(Debug, Default)]
pub struct Tunnels {
    /// Guards the table; held for a look-up or a change.
    clients: RwLock<HashMap<ClientId, Held>>,
}

/// What is known here of one client.
#[derive(Debug, Default)]
struct Held {
    tunnels: Vec<Arc<Tunnel>>,
    /// When the last of them left, if none is here.
    left_at: Option<Instant>,
    came: Arc<Notify>,
}

/// A client holds as many tunnels as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMany;

impl Tunnels {
    fn read(&self) -> RwLockReadGuard<'_, HashMap<ClientId, Held>> {
        self.clients.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<ClientId, Held>> {
        self.clients.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tunnel is up. It supersedes an older one of the same instance and slot, and wakes what waits for its client.
    /// Dropping the guard takes it out again.
    pub fn join(self: &Arc<Self>, tunnel: Arc<Tunnel>, limit: usize) -> Result<Joined, TooMany> {
        let mut clients = self.write();
        let held = clients.entry(tunnel.client_id().clone()).or_default();
        let same = |old: &Arc<Tunnel>| old.path.owner == tunnel.path.owner && old.slot == tunnel.slot;
        let superseded = held
            .tunnels
            .iter()
            .position(same)
            .map(|at| held.tunnels.swap_remove(at));
        if held.tunnels.len() >= limit {
            return Err(TooMany);
        }
        held.tunnels.push(tunnel.clone());
        held.left_at = None;
        held.came.notify_waiters();
        drop(clients);
        Ok(Joined {
            tunnels: self.clone(),
            tunnel,
            superseded,
        })
    }

    fn leave(&self, tunnel: &Arc<Tunnel>) {
        let mut clients = self.write();
        let Some(held) = clients.get_mut(tunnel.client_id()) else {
            return;
        };
        held.tunnels.retain(|other| !Arc::ptr_eq(other, tunnel));
        if held.tunnels.is_empty() {
            held.left_at.get_or_insert(Instant::now());
        }
    }

    /// The tunnel of a client with the fewest exchanges in flight.
    pub fn pick(&self, client_id: &ClientId, not: Option<&Owner>) -> Option<Arc<Tunnel>> {
        let clients = self.read();
        let tunnels = clients.get(client_id)?.tunnels.iter();
        let open = tunnels.filter(|tunnel| not != Some(&tunnel.path.owner) && tunnel.path.takes_more());
        open.min_by_key(|tunnel| tunnel.path.in_flight()).cloned()
    }

    /// A path of the same owner that is not the given one.
    pub fn other_path(&self, owner: &Owner, not: Option<&Arc<Path>>) -> Option<Arc<Path>> {
        let clients = self.read();
        let paths = clients.get(&owner.client_id)?.tunnels.iter().map(|tunnel| &tunnel.path);
        let fit = |path: &&Arc<Path>| {
            path.owner == *owner && not.is_none_or(|not| !Arc::ptr_eq(path, not)) && !path.is_closed()
        };
        paths.filter(fit).min_by_key(|path| path.in_flight()).cloned()
    }

    /// Whether the client has a tunnel here, or had one within `memory`.
    pub fn was_here(&self, client_id: &ClientId, memory: Duration) -> bool {
        let clients = self.read();
        clients
            .get(client_id)
            .is_some_and(|held| held.left_at.is_none_or(|at| at.elapsed() <= memory))
    }

    /// Waits for the client's next tunnel; `None` when `patience` ran out.
    pub async fn wait(&self, client_id: &ClientId, not: Option<&Owner>, patience: Duration) -> Option<Arc<Tunnel>> {
        let coming = async {
            loop {
                let came = self
                    .write()
                    .entry(client_id.clone())
                    .or_insert_with(Self::unseen)
                    .came
                    .clone();
                let next = came.notified();
                if let Some(tunnel) = self.pick(client_id, not) {
                    return tunnel;
                }
                next.await;
            }
        };
        tokio::time::timeout(patience, coming).await.ok()
    }

    /// A client that was seen by another node, not here: remembered from now.
    fn unseen() -> Held {
        Held {
            left_at: Some(Instant::now()),
            ..Held::default()
        }
    }

    /// Forgets clients that left longer than `memory` ago.
    pub fn forget(&self, memory: Duration) {
        self.write().retain(|_, held| {
            !held.tunnels.is_empty()
                || Arc::strong_count(&held.came) > 1
                || held.left_at.is_some_and(|at| at.elapsed() <= memory)
        });
    }

    /// All tunnels.
    pub fn all(&self) -> Vec<Arc<Tunnel>> {
        self.read()
            .values()
            .flat_map(|held| held.tunnels.iter().cloned())
            .collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.read().values().map(|held| held.tunnels.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tunnel in the table, for as long as this lives.
#[derive(Debug)]
pub struct Joined {
    tunnels: Arc<Tunnels>,
    /// The tunnel.
    pub tunnel: Arc<Tunnel>,
    /// The older one of the same instance and slot, which is to be closed.
    pub superseded: Option<Arc<Tunnel>>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.tunnels.leave(&self.tunnel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{exchange::Clock, ids::InstanceId};

    fn tunnel(client: &str, instance_id: InstanceId, slot: u32) -> Arc<Tunnel> {
        let owner = Owner {
            client_id: client.parse().expect("a client id"),
            instance_id,
        };
        let path = Path::new(owner, Clock::default());
        let remote = [127, 0, 0, 1].into();
        Arc::new(Tunnel {
            id: TunnelId::new(),
            slot,
            token_id: TokenId::new(),
            remote,
            path,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_tunnel_of_the_slot_supersedes_and_the_slow_leave_of_the_old_takes_nothing_away() {
        let (tunnels, instance) = (Arc::new(Tunnels::default()), InstanceId::new());
        let old = tunnels.join(tunnel("home", instance, 0), 2).expect("room");
        let new = tunnels.join(tunnel("home", instance, 0), 2).expect("room");
        assert_eq!(new.superseded.as_ref().map(|old| old.id), Some(old.tunnel.id));
        drop(old);
        let home = "home".parse().expect("a client id");
        assert_eq!(tunnels.pick(&home, None).map(|tunnel| tunnel.id), Some(new.tunnel.id));
        drop(new);
        assert!(tunnels.is_empty() && tunnels.was_here(&home, Duration::from_secs(60)));
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(!tunnels.was_here(&home, Duration::from_secs(60)));
        tunnels.forget(Duration::from_secs(60));
        assert!(tunnels.read().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_waits_gets_the_tunnel_that_comes() {
        let (tunnels, home) = (
            Arc::new(Tunnels::default()),
            "home".parse::<ClientId>().expect("a client id"),
        );
        let (waiting, table) = (home.clone(), tunnels.clone());
        let waiter =
            tokio::spawn(async move { table.wait(&waiting, None, Duration::from_secs(5)).await.map(|t| t.id) });
        tokio::task::yield_now().await;
        let joined = tunnels.join(tunnel("home", InstanceId::new(), 0), 2).expect("room");
        assert_eq!(waiter.await.expect("no panic"), Some(joined.tunnel.id));
        let nobody = "nobody".parse().expect("a client id");
        assert!(tunnels.wait(&nobody, None, Duration::from_secs(5)).await.is_none());
    }

    #[test]
    fn the_limit_holds() {
        let tunnels = Arc::new(Tunnels::default());
        let _one = tunnels.join(tunnel("home", InstanceId::new(), 0), 1).expect("room");
        assert_eq!(
            tunnels.join(tunnel("home", InstanceId::new(), 0), 1).err(),
            Some(TooMany)
        );
    }
}
