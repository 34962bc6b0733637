//! Finding the tunnel for a request (DESIGN.md §4): one held here, or, if its client was connected a moment ago, the next
//! one to come.

use std::{sync::Arc, time::Duration};

use super::tunnels::{Tunnel, Tunnels};
use crate::{
    cluster::{now_ms, registry::Client},
    error::Cause,
    exchange::path::Owner,
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
