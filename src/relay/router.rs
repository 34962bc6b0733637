//! Finding the tunnel for a request (DESIGN.md §4): one held here, or one that a peer holds, or, if its client was connected
//! a moment ago, the next one to come to any node.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{respond::Failed, switchboard::Switchboard, tunnels::Tunnel};
use crate::{
    cluster::{
        letter::Card,
        now_ms,
        registry::{Client, Holder, RegistryAway},
    },
    error::Cause,
    exchange::{Exchange, ingress::Failure, path::Owner},
    ids::ClientId,
    wire::{Dialect, frame::Code},
};

/// A request that waits has the registry asked this often: news of a tunnel may have been lost.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A request whose tunnels are all at peers waits so long for the bus when that is away.
const BUS_PATIENCE: Duration = Duration::from_millis(1500);
/// MoosicBox's sender dials again at once, then every 5 s: as measured, it is back within 6.5 s.
const MOOSICBOX_COMES_BACK: Duration = Duration::from_secs(8);
/// How often the bus is looked at meanwhile.
const BUS_LOOK: Duration = Duration::from_millis(50);

/// A tunnel of the client, not one of `not`'s if given. Waits for one if the client was just here.
pub async fn route(board: &Switchboard, client: &Client, not: Option<&Owner>) -> Result<Arc<Tunnel>, Cause> {
    let here = board
        .tunnels
        .pick(&client.client_id, not)
        .filter(|tunnel| tunnel.is_here());
    if let Some(tunnel) = here {
        return Ok(tunnel);
    }
    let looked = look_up(board, &client.client_id, None).await;
    match board.tunnels.pick(&client.client_id, not) {
        Some(tunnel) => reachable(board, tunnel).await,
        None => park(board, client, not, looked).await,
    }
}

/// How long a request waits. A MoosicBox server comes back when it does, and not before.
fn patience(board: &Switchboard, client_id: &ClientId) -> Duration {
    let configured = board.config.park_timeout;
    match !configured.is_zero() && board.tunnels.comes_slowly(client_id) {
        true => configured.max(MOOSICBOX_COMES_BACK),
        false => configured,
    }
}

/// Waits for a tunnel of a client that was connected a moment ago. `looked`: what came of asking the registry.
async fn park(
    board: &Switchboard,
    client: &Client,
    not: Option<&Owner>,
    mut looked: Result<(), RegistryAway>,
) -> Result<Arc<Tunnel>, Cause> {
    let (client_id, config) = (&client.client_id, &board.config);
    let until = Instant::now() + patience(board, client_id);
    loop {
        let coming = board.tunnels.coming(client_id);
        let mut next = std::pin::pin!(coming.notified());
        next.as_mut().enable();
        if let Some(tunnel) = board.tunnels.pick(client_id, not) {
            return reachable(board, tunnel).await;
        }
        if !board.tunnels.was_here(client_id, config.park_memory) && !seen_lately(client, config.park_memory) {
            return Err(looked.map_or_else(Cause::from, |()| Cause::NoTunnel));
        }
        tokio::select! {
            biased;
            () = next => {}
            () = tokio::time::sleep(LOOK_EVERY) => looked = look_up(board, client_id, Some(LOOK_EVERY)).await,
            () = tokio::time::sleep_until(until) => return Err(Cause::NoTunnel),
        }
    }
}

/// A peer's tunnel is of use while the bus carries.
async fn reachable(board: &Switchboard, tunnel: Arc<Tunnel>) -> Result<Arc<Tunnel>, Cause> {
    let until = Instant::now() + BUS_PATIENCE;
    while !tunnel.is_here() && !board.peers.bus().is_up() {
        if Instant::now() >= until {
            return Err(Cause::Unavailable(
                "the relay's nodes cannot reach each other right now: try again",
            ));
        }
        tokio::time::sleep(BUS_LOOK).await;
    }
    Ok(tunnel)
}

/// Asks the registry which peers hold tunnels of this client, unless it was asked just now.
async fn look_up(board: &Switchboard, client_id: &ClientId, fresh_for: Option<Duration>) -> Result<(), RegistryAway> {
    if board.peers.bus().is_alone() || !board.tunnels.is_stale(client_id, fresh_for) {
        return Ok(());
    }
    let holders = board.directory.holders(client_id).await?;
    let me = board.node_id();
    let at_peers = || holders.iter().filter(|holder| holder.node_id != me);
    let cards: Vec<Card> = at_peers().filter_map(card).collect();
    let (new, gone) = board.tunnels.reconcile(client_id, &cards);
    new.into_iter().for_each(|learned| board.follow_news(learned));
    gone.iter().for_each(|tunnel| board.lose(tunnel));
    for leaving in at_peers().filter(|holder| holder.draining) {
        if let Some(tunnel) = board.tunnels.find(client_id, leaving.tunnel.tunnel_ws_id) {
            tunnel.path.set_leaving();
        }
    }
    Ok(())
}

/// A row as a peer would tell of it; `None`: of a version that this one does not know.
fn card(holder: &Holder) -> Option<Card> {
    let row = &holder.tunnel;
    Some(Card {
        node_id: holder.node_id,
        tunnel_ws_id: row.tunnel_ws_id,
        client_id: row.client_id.clone(),
        instance_id: row.instance_id?,
        slot: row.slot?,
        generation: u64::try_from(row.generation).ok()?,
        dialect: Dialect::from_name(&row.dialect)?,
        token_id: row.token_id?,
    })
}

/// Whether any node saw it: after a restart, the agents are about to come back.
fn seen_lately(client: &Client, memory: Duration) -> bool {
    let since = client.last_seen_at_ms.map(|at| now_ms().saturating_sub(at));
    since.is_some_and(|since| since < memory.as_millis() as i64)
}

/// An agent without a tunnel for this long is given up for a request that another agent could answer as well.
const DESERTED_AFTER: Duration = Duration::from_secs(2);
/// How often that is looked at, once its tunnel is lost.
const DESERTED_LOOK: Duration = Duration::from_millis(200);

/// Keeps a request on its way until its answer is here. What certainly reached nobody goes elsewhere, at once, whatever
/// it is. What may have reached an agent stays with that, but for a repeatable one whose agent is gone. Returns when
/// there is nowhere to go.
pub async fn follow(board: &Switchboard, client: &Client, repeatable: bool, exchange: &Arc<Exchange>) -> Failed {
    loop {
        tokio::select! {
            biased;
            () = exchange.unreached() => match route(board, client, None).await {
                Ok(tunnel) => drop(board.exchanges.rehome(exchange, &tunnel.path)),
                Err(cause) => return Failed::Answer(cause),
            },
            () = deserted(board, exchange), if repeatable => {
                return Failed::Exchange(Failure::Reset(Code::PathLost));
            }
        }
    }
}

/// Waits until the exchange's agent has lost its tunnels and not come back, while another agent of the client is here: a
/// killed agent that was started again is another.
async fn deserted(board: &Switchboard, exchange: &Exchange) {
    loop {
        match exchange.path().filter(|path| !path.is_closed()) {
            Some(path) => path.closed().await,
            None => tokio::time::sleep(DESERTED_LOOK).await,
        }
        let owner = exchange.owner();
        let lost = exchange.cut_for().is_some_and(|time| time >= DESERTED_AFTER);
        if lost && board.tunnels.pick(&owner.client_id, Some(&owner)).is_some() {
            return;
        }
    }
}
