//! `/api/v1/nodes`, `/tunnels` and `/stats`: what the relay's nodes are, hold and do, and what an operator does to them.

use axum::{
    Json,
    extract::{FromRequestParts, Path, Query, State, rejection::QueryRejection},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use super::api::{PAGE, Shared};
use crate::{
    cluster::{
        bus::Reached,
        letter::Traffic,
        now_ms,
        registry::{Holder, NodeRow},
    },
    error::Cause,
    ids::{ClientId, InstanceId, NodeId, TunnelId},
};

const NO_NODE: Cause = Cause::NotFound("no node of this id is running: list them with GET /api/v1/nodes");
const NO_TUNNEL: Cause = Cause::NotFound("no tunnel of this id is open: list them with GET /api/v1/tunnels");
const NO_BUS: Cause = Cause::Unavailable("the bus did not take the message to the other node: try again");

#[derive(Serialize)]
struct NodeList {
    nodes: Vec<NodeView>,
}

/// A node as the list shows it; times are UTC epoch milliseconds.
#[derive(Serialize)]
struct NodeView {
    node_id: NodeId,
    address: String,
    version: String,
    started_at: i64,
    heartbeat_at: i64,
    /// By the clock of the node that was asked.
    heartbeat_age_ms: i64,
    draining: bool,
    /// Whether it is the node that was asked.
    this: bool,
    /// Null: it did not answer.
    traffic: Option<Traffic>,
}

#[derive(Serialize)]
struct Stats {
    node_id: NodeId,
    #[serde(flatten)]
    traffic: Traffic,
}

#[derive(Deserialize)]
pub(super) struct TunnelsQuery {
    client_id: Option<ClientId>,
    #[serde(default)]
    after: String,
    limit: Option<u32>,
}

#[derive(Serialize)]
struct TunnelList {
    tunnels: Vec<TunnelView>,
    /// Where the next page starts (`?after=`); null: this was the last one.
    next: Option<TunnelId>,
}

/// A tunnel as the list shows it. The last two are known of tunnels of the node that was asked.
#[derive(Serialize)]
struct TunnelView {
    tunnel_id: TunnelId,
    client_id: ClientId,
    node_id: NodeId,
    dialect: String,
    instance_id: Option<InstanceId>,
    slot: Option<u32>,
    agent_version: Option<String>,
    remote_addr: String,
    connected_at: i64,
    exchanges_in_flight: Option<usize>,
    rtt_us: Option<u64>,
}

pub(super) async fn list_nodes(State(admin): Shared) -> Result<Response, Cause> {
    let (rows, me) = (admin.registry.nodes().await?, admin.registry.node_id());
    let peers = rows.iter().map(|row| row.node_id).filter(|id| *id != me).collect();
    let mut traffic = admin.node.traffic_of(peers).await;
    traffic.insert(me, admin.node.traffic());
    let now = now_ms();
    let view = |row: NodeRow| NodeView {
        heartbeat_age_ms: now.saturating_sub(row.heartbeat_at).max(0),
        this: row.node_id == me,
        traffic: traffic.remove(&row.node_id),
        node_id: row.node_id,
        address: row.address,
        version: row.version,
        started_at: row.started_at,
        heartbeat_at: row.heartbeat_at,
        draining: row.draining,
    };
    let nodes = rows.into_iter().map(view).collect();
    Ok(Json(NodeList { nodes }).into_response())
}

pub(super) async fn drain_node(State(admin): Shared, OfNode(node_id): OfNode) -> Result<StatusCode, Cause> {
    if node_id != admin.registry.node_id() {
        let nodes = admin.registry.nodes().await?;
        nodes.iter().find(|node| node.node_id == node_id).ok_or(NO_NODE)?;
    }
    match admin.node.drain(node_id).await {
        Reached::Somebody(_) => Ok(StatusCode::ACCEPTED),
        Reached::Nobody => Err(NO_NODE),
        Reached::Unknown | Reached::Unsent => Err(NO_BUS),
    }
}

pub(super) async fn stats(State(admin): Shared) -> Response {
    let (node_id, traffic) = (admin.registry.node_id(), admin.node.traffic());
    Json(Stats { node_id, traffic }).into_response()
}

pub(super) async fn list_tunnels(
    State(admin): Shared,
    page: Result<Query<TunnelsQuery>, QueryRejection>,
) -> Result<Response, Cause> {
    let refused = |_| {
        let why = "`client_id` is a client id, `limit` a number of tunnels, `after` a tunnel id";
        Cause::Invalid(why.into())
    };
    let Query(page) = page.map_err(refused)?;
    let limit = page.limit.unwrap_or(PAGE).clamp(1, PAGE);
    let registry = &admin.registry;
    let mut rows = registry
        .list_tunnels(page.client_id.as_ref(), &page.after, limit + 1)
        .await?;
    let more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    let next = rows.last().filter(|_| more).map(|row| row.tunnel.tunnel_ws_id);
    let tunnels = rows.into_iter().map(|row| view(&*admin.node, row)).collect();
    Ok(Json(TunnelList { tunnels, next }).into_response())
}

fn view(node: &dyn super::Control, Holder { tunnel, node_id, .. }: Holder) -> TunnelView {
    let live = node.live(&tunnel.client_id, tunnel.tunnel_ws_id);
    TunnelView {
        tunnel_id: tunnel.tunnel_ws_id,
        client_id: tunnel.client_id,
        node_id,
        dialect: tunnel.dialect,
        instance_id: tunnel.instance_id,
        slot: tunnel.slot,
        agent_version: tunnel.agent_version,
        remote_addr: tunnel.remote_addr,
        connected_at: tunnel.connected_at,
        exchanges_in_flight: live.as_ref().map(|live| live.exchanges_in_flight),
        rtt_us: live.map(|live| u64::try_from(live.rtt.as_micros()).unwrap_or(u64::MAX)),
    }
}

/// What the node knows itself is closed also while the database is away.
pub(super) async fn disconnect(State(admin): Shared, OfTunnel(id): OfTunnel) -> Result<StatusCode, Cause> {
    let (node_id, client_id) = match admin.node.find(id) {
        Some(known) => known,
        None => {
            let row = admin.registry.find_tunnel(id).await?.ok_or(NO_TUNNEL)?;
            (row.node_id, row.tunnel.client_id)
        }
    };
    match admin.node.disconnect(node_id, client_id, id).await {
        Reached::Somebody(_) => Ok(StatusCode::NO_CONTENT),
        Reached::Nobody => Err(NO_TUNNEL),
        Reached::Unknown | Reached::Unsent => Err(NO_BUS),
    }
}

/// The `{node_id}` of the path. What cannot be one is none.
pub(super) struct OfNode(NodeId);

impl<S: Send + Sync> FromRequestParts<S> for OfNode {
    type Rejection = Cause;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Cause> {
        let Path(node_id) = Path::from_request_parts(parts, state).await.map_err(|_| NO_NODE)?;
        Ok(Self(node_id))
    }
}

/// The `{tunnel_id}` of the path.
pub(super) struct OfTunnel(TunnelId);

impl<S: Send + Sync> FromRequestParts<S> for OfTunnel {
    type Rejection = Cause;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Cause> {
        let Path(tunnel_id) = Path::from_request_parts(parts, state).await.map_err(|_| NO_TUNNEL)?;
        Ok(Self(tunnel_id))
    }
}
