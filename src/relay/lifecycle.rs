//! A node's life: what runs beside requests, and how it leaves without anyone noticing.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::service::service_fn;
use tokio::{sync::broadcast, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    Listeners, State,
    admin::{self, Readiness},
    downstream::{io::Timeouts, listener},
    inbox::NodeInbox,
    routes,
    tunnels::Tunnel,
};
use crate::{
    cluster::{bus::Channel, letter::News, registry::RegistryEvent},
    exchange::{path::Path, table::TICK},
    shutdown::Shutdown,
    wire::frame::{Code, Frame},
};

/// How often clients that left long ago are forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(10);
/// How long agents get to open tunnels elsewhere, where there is an elsewhere. Each closes as its successor is up.
const MOVING: Duration = Duration::from_secs(10);
/// A tunnel that carries exchanges and says nothing is asked whether it lives this often, so that one that is wedged is
/// noticed long before its keep-alive gives up.
const ASK_SILENT_EVERY: Duration = Duration::from_secs(1);
/// How long closed tunnels may take to flush their last words.
const CLOSING: Duration = Duration::from_secs(3);

/// Serves until told to stop, then leaves.
pub(super) async fn run(
    state: Arc<State>,
    listeners: Listeners,
    shutdown: Shutdown,
    on_ready: impl FnOnce(),
) -> anyhow::Result<()> {
    let (close_public, close_rest) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(serve_public(state.clone(), listeners.public, close_public.clone()));
    tasks.spawn(serve_admin(state.clone(), listeners.admin, close_rest.clone()));
    tasks.spawn({
        let (registry, close) = (state.registry.clone(), close_rest.clone());
        async move { registry.run(close.cancelled_owned()).await }
    });
    tasks.spawn(speak_with_peers(state.clone(), close_rest.clone()));
    tasks.spawn(pass_time(state.clone(), close_rest.clone()));
    tasks.spawn(obey_revocations(state.clone(), close_rest.clone()));
    on_ready();
    tokio::select! {
        () = shutdown.drain() => {}
        // A part that ends by itself has failed: the others cannot go on without it.
        Some(ended) = tasks.join_next() => ended?,
    }
    tokio::select! {
        () = leave(&state, &close_public) => {}
        () = shutdown.now() => tracing::warn!("told twice to stop: leaving at once"),
    }
    close_public.cancel();
    close_tunnels(&state, &shutdown).await;
    state.peers.flush().await;
    close_rest.cancel();
    tokio::select! {
        () = async { while tasks.join_next().await.is_some() {} } => {}
        () = shutdown.now() => tasks.shutdown().await,
    }
    tracing::info!("the relay has ended");
    Ok(())
}

/// Leaves without anyone noticing, within the drain timeout.
async fn leave(state: &State, close_public: &CancellationToken) {
    let until = Instant::now() + state.config.drain_timeout;
    // 1. Not ready, so that load balancers look elsewhere; new tunnels are refused, requests are still served.
    state.drain_until.send_replace(Some(until));
    state.registry.set_draining();
    tracing::info!(
        exchanges = state.exchanges.len(),
        tunnels = state.tunnels.len(),
        "draining"
    );
    // 2. Peers send nothing new through this node, and agents open tunnels elsewhere first.
    let left = state.config.drain_timeout.as_millis() as u32;
    for tunnel in state.tunnels.held() {
        let tunnel_ws_id = tunnel.id;
        state
            .peers
            .tell(&tunnel.path.owner.client_id, News::Leaving { tunnel_ws_id });
        tunnel.path.send(Frame::Drain(left));
    }
    if !state.peers.bus().is_alone() && state.registry.has_peers().await == Ok(true) {
        let moved = async {
            while !state.tunnels.is_empty() {
                tokio::time::sleep(TICK).await;
            }
        };
        let patience = Instant::now() + state.config.drain_timeout.min(MOVING);
        tokio::time::timeout_at(patience.into(), moved).await.ok();
    }
    // 3. What is in flight ends by itself.
    let idle = async {
        while !state.exchanges.is_empty() {
            tokio::time::sleep(TICK).await;
        }
    };
    if tokio::time::timeout_at(until.into(), idle).await.is_err() {
        tracing::warn!(
            exchanges = state.exchanges.len(),
            "the drain timeout passed: what is still in flight is cut"
        );
    }
    // 4. The port closes; idle connections with it.
    close_public.cancel();
}

/// The tunnels say goodbye; their rows go with them.
async fn close_tunnels(state: &State, shutdown: &Shutdown) {
    state.tunnels.held().iter().for_each(|tunnel| tunnel.close(None));
    state.tasks.close();
    tokio::select! {
        done = tokio::time::timeout(CLOSING, state.tasks.wait()) => {
            if done.is_err() {
                tracing::warn!(tasks = state.tasks.len(), "some connections did not close in time");
            }
        }
        () = shutdown.now() => {}
    }
}

async fn serve_public(state: Arc<State>, socket: tokio::net::TcpListener, close: CancellationToken) {
    let config = &state.config;
    let listener = listener::Listener::new(listener::Limits {
        max_connections: config.http.max_connections,
        max_connections_per_address: config.http.max_connections_per_address,
        trusted_proxies: config.trusted_proxies.clone(),
        timeouts: Timeouts {
            header: config.http.head_timeout,
            write_idle: config.http.write_idle_timeout,
            ..Timeouts::default()
        },
        drain_timeout: CLOSING,
    });
    let service = {
        let state = state.clone();
        service_fn(move |request| routes::handle(state.clone(), request))
    };
    listener.serve(socket, service, close.cancelled_owned()).await;
}

async fn serve_admin(state: Arc<State>, socket: tokio::net::TcpListener, close: CancellationToken) {
    let (readiness, metrics) = (state.clone(), state.clone());
    let admin = admin::Admin {
        registry: state.registry.clone(),
        readiness: Box::new(move || readiness_of(&readiness)),
        metrics: Box::new(move || metrics.metrics.render(metrics.peers.bus().counts())),
    };
    let served = axum::serve(socket, admin::router(Arc::new(admin)));
    if let Err(error) = served.with_graceful_shutdown(close.cancelled_owned()).await {
        tracing::error!(%error, "the admin listener failed");
    }
}

/// A database or a bus that is away is no reason to send traffic elsewhere: it would be away there too.
fn readiness_of(state: &State) -> Readiness {
    if state.is_draining() {
        return Readiness::NotReady("this node is leaving");
    }
    match (state.peers.bus().is_up(), state.registry.is_away()) {
        (true, false) => Readiness::Ready,
        (false, _) => Readiness::Degraded("the bus is away: requests whose tunnel is on another node fail"),
        (true, true) => Readiness::Degraded("the database is away: clients that are not cached fail"),
    }
}

/// Speaks with the other nodes, over the bus.
async fn speak_with_peers(state: Arc<State>, close: CancellationToken) {
    let peers = &state.peers;
    peers.bus().subscribe(Channel::Node(peers.node_id()));
    tokio::select! {
        () = peers.bus().run(Arc::new(NodeInbox(state.clone()))) => {}
        () = peers.carry(|lost| state.undelivered(lost)) => {}
        () = close.cancelled() => {}
    }
}

/// Lets time pass for exchanges and for the memory of who was here.
async fn pass_time(state: Arc<State>, close: CancellationToken) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut forget = tokio::time::interval(FORGET_EVERY);
    let mut ask = tokio::time::interval(ASK_SILENT_EVERY);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let moved = state.exchanges.tick(|owner, not| state.tunnels.other_path(owner, not));
                state.metrics.exchanges_moved(moved);
                state.peers.on_tick();
            }
            _ = ask.tick() => ask_silent(&state),
            _ = forget.tick() => state.tunnels.forget(state.config.tunnels.park_memory),
            () = close.cancelled() => return,
        }
    }
}

fn ask_silent(state: &State) {
    let now = state.exchanges.clock().now();
    let silent = |path: &Path| path.in_flight() > 0 && path.silent_for(now) >= ASK_SILENT_EVERY;
    for tunnel in state.tunnels.held().iter().filter(|tunnel| silent(&tunnel.path)) {
        tunnel.path.send(Frame::Ping(now.as_micros() as u64));
    }
}

/// Closes the tunnels of tokens that are revoked and clients that are deleted, and ends what runs through them.
async fn obey_revocations(state: Arc<State>, close: CancellationToken) {
    let mut events = state.registry.events();
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = close.cancelled() => return,
        };
        match event {
            Ok(RegistryEvent::TokenRevoked { client_id, token_id }) => {
                state.peers.tell(&client_id, News::TokenRevoked { token_id });
                revoke(&state, |tunnel| tunnel.token_id == token_id);
            }
            Ok(RegistryEvent::ClientDeleted { client_id }) => {
                state.peers.tell(&client_id, News::ClientDeleted);
                revoke(&state, |tunnel| tunnel.path.owner.client_id == client_id);
            }
            Ok(RegistryEvent::ClientChanged { client_id }) => {
                state.peers.tell(&client_id, News::ClientChanged);
            }
            // Too many at once to be told one by one: look which tokens are still good.
            Err(broadcast::error::RecvError::Lagged(_)) => recheck(&state).await,
            Err(broadcast::error::RecvError::Closed) => return close.cancelled().await,
        }
    }
}

/// Ends what runs through these tunnels, wherever they are; those that are here are closed, and peers close theirs.
pub(super) fn revoke(state: &State, doomed: impl Fn(&Tunnel) -> bool) {
    let known = state.tunnels.known().into_iter();
    let tunnels: Vec<_> = known.filter(|tunnel| doomed(tunnel)).collect();
    let owners: HashSet<_> = tunnels.iter().map(|tunnel| tunnel.path.owner.clone()).collect();
    // What is tried again must not come back to them.
    tunnels.iter().for_each(|tunnel| tunnel.path.set_leaving());
    state.exchanges.reset_owners(&owners, Code::PathLost);
    for tunnel in tunnels.iter().filter(|tunnel| tunnel.is_here()) {
        tracing::info!(client.id = %tunnel.path.owner.client_id, tunnel.id = %tunnel.id, "its token was revoked: closing the tunnel");
        tunnel.close(None);
    }
}

async fn recheck(state: &State) {
    for tunnel in state.tunnels.held() {
        let client_id = &tunnel.path.owner.client_id;
        let Ok(client) = state.registry.client(client_id).await else {
            continue;
        };
        if !client.is_some_and(|client| client.has_token(tunnel.token_id)) {
            revoke(state, |other| other.id == tunnel.id);
        }
    }
}
