//! Finding the tunnel for a request (DESIGN.md §4): one held here, or, if its client was connected a moment ago, the next
//! one to come.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::tunnels::{Tunnel, Tunnels};
use crate::{
    cluster::{now_ms, registry::Client},
    error::Cause,
    exchange::path::{Owner, Path},
};

/// How long requests wait for a tunnel, and for whom.
#[derive(Debug, Clone, Copy)]
pub struct Parking {
    /// A request waits this long for a tunnel.
    pub timeout: Duration,
    /// If its client was connected within this.
    pub memory: Duration,
}

/// A tunnel of the client, not one of `not`'s if given. Waits for one if the client was just here.
pub async fn route(
    tunnels: &Tunnels,
    client: &Client,
    not: Option<&Owner>,
    parking: Parking,
) -> Result<Arc<Tunnel>, Cause> {
    if let Some(tunnel) = tunnels.pick(&client.client_id, not) {
        return Ok(tunnel);
    }
    if !tunnels.was_here(&client.client_id, parking.memory) && !seen_lately(client, parking.memory) {
        return Err(Cause::NoTunnel);
    }
    tunnels
        .wait(&client.client_id, not, parking.timeout)
        .await
        .ok_or(Cause::NoTunnel)
}

/// Whether any node saw it: after a restart, the agents are about to come back.
fn seen_lately(client: &Client, memory: Duration) -> bool {
    let since = client.last_seen_at_ms.map(|at| now_ms().saturating_sub(at));
    since.is_some_and(|since| since < memory.as_millis() as i64)
}

/// An agent without a tunnel for this long is given up for a request that another agent could answer as well.
const DESERTED_AFTER: Duration = Duration::from_secs(2);
/// How often that is looked at, once its tunnel is lost.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Waits until the agent at the end of `path` has lost its tunnels and not come back, while another agent of the client
/// is here: a killed agent that was started again is another.
pub async fn deserted(tunnels: &Tunnels, path: &Arc<Path>) {
    let mut path = path.clone();
    loop {
        path.closed().await;
        let lost_at = Instant::now();
        path = loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Some(back) = tunnels.other_path(&path.owner, Some(&path)) {
                break back;
            }
            let another = || tunnels.pick(&path.owner.client_id, Some(&path.owner));
            if lost_at.elapsed() >= DESERTED_AFTER && another().is_some() {
                return;
            }
        };
    }
}
