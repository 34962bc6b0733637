//! A node's life: what runs beside requests, and how it leaves without anyone noticing.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::service::service_fn;
use tokio::{sync::broadcast, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    Listeners, State,
    admin::{self, Readiness},
    downstream::{io::Timeouts, listener, tls::Tls},
    fanout::Left,
    operated, routes,
    tunnels::Tunnel,
};
use crate::{
    cluster::{letter::News, registry::RegistryEvent},
    exchange::table::TICK,
    shutdown::Shutdown,
    telemetry::Seen,
    wire::Dialect,
};

/// How long agents get to open tunnels elsewhere, where there is an elsewhere. Each closes as its successor is up.
const MOVING: Duration = Duration::from_secs(10);
/// How long closed tunnels may take to flush their last words.
const CLOSING: Duration = Duration::from_secs(3);

/// Serves until told to stop, then leaves.
pub(super) async fn run(
    state: Arc<State>,
    listeners: Listeners,
    tls: Option<Arc<Tls>>,
    shutdown: Shutdown,
    on_ready: impl FnOnce(),
) -> anyhow::Result<()> {
    let (close_public, close_rest) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(serve_public(state.clone(), listeners.public, tls, close_public.clone()));
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
        () = state.board.leave.cancelled() => tracing::info!("an operator asked this node to drain"),
        // A part that ends by itself has failed: the others cannot go on without it.
        Some(ended) = tasks.join_next() => ended?,
    }
    tokio::select! {
        () = leave(&state, &close_public) => {}
        () = shutdown.now() => tracing::warn!("told twice to stop: leaving at once"),
    }
    close_public.cancel();
    close_tunnels(&state, &shutdown).await;
    state.board.peers.flush().await;
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
        exchanges = state.board.exchanges.len(),
        tunnels = state.board.tunnels.len(),
        "draining"
    );
    // 2. Peers send nothing new through this node, and agents open tunnels elsewhere first.
    state.board.send_away(state.config.drain_timeout);
    if !state.board.peers.bus().is_alone() && state.registry.has_peers().await == Ok(true) {
        let moved = async {
            while !state.board.tunnels.is_empty() {
                tokio::time::sleep(TICK).await;
            }
        };
        let patience = Instant::now() + state.config.drain_timeout.min(MOVING);
        tokio::time::timeout_at(patience.into(), moved).await.ok();
    }
    // 3. Subscribers go on at another node where they were; what is in flight ends by itself, and MoosicBox servers are
    //    let go as they have answered.
    state.board.fanout.end_all(Left::Leaving);
    let answering = |tunnel: &Arc<Tunnel>| tunnel.dialect == Dialect::MoosicBox;
    let idle = async {
        while !state.board.exchanges.is_empty() || state.board.tunnels.held().iter().any(answering) {
            tokio::time::sleep(TICK).await;
        }
    };
    if tokio::time::timeout_at(until.into(), idle).await.is_err() {
        tracing::warn!(
            exchanges = state.board.exchanges.len(),
            "the drain timeout passed: what is still in flight is cut"
        );
    }
    // 4. The port closes; idle connections with it.
    close_public.cancel();
}

/// The tunnels say goodbye; their rows go with them.
async fn close_tunnels(state: &State, shutdown: &Shutdown) {
    state.board.tunnels.held().iter().for_each(|tunnel| tunnel.close(None));
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

async fn serve_public(
    state: Arc<State>,
    socket: tokio::net::TcpListener,
    tls: Option<Arc<Tls>>,
    close: CancellationToken,
) {
    let config = &state.config;
    let listener = listener::Listener::new(listener::Limits {
        max_connections: config.http.max_connections,
        max_connections_per_address: config.http.max_connections_per_address,
        trusted_proxies: config.trusted_proxies.clone(),
        tls: tls.clone(),
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
    let serving = listener.serve(socket, service, close.cancelled_owned());
    match tls {
        Some(tls) => tokio::select! {
            () = serving => {}
            () = tls.follow_files() => {}
        },
        None => serving.await,
    }
}

async fn serve_admin(state: Arc<State>, socket: tokio::net::TcpListener, close: CancellationToken) {
    let (readiness, metrics) = (state.clone(), state.clone());
    let admin = admin::Admin {
        registry: state.registry.clone(),
        node: Box::new(operated::Operated(state.clone())),
        readiness: Box::new(move || readiness_of(&readiness)),
        metrics: Box::new(move || metrics.board.metrics.render(seen(&metrics))),
    };
    let served = axum::serve(socket, admin::router(Arc::new(admin)));
    if let Err(error) = served.with_graceful_shutdown(close.cancelled_owned()).await {
        tracing::error!(%error, "the admin listener failed");
    }
}

fn seen(state: &State) -> Seen {
    let bus = state.board.peers.bus();
    Seen {
        bus: bus.counts(),
        bus_up: bus.is_up(),
        registry_away: state.registry.is_away(),
        draining: state.is_draining(),
    }
}

/// A database or a bus that is away is no reason to send traffic elsewhere: it would be away there too.
fn readiness_of(state: &State) -> Readiness {
    if state.is_draining() {
        return Readiness::NotReady("this node is leaving");
    }
    match (state.board.peers.bus().is_up(), state.registry.is_away()) {
        (true, false) => Readiness::Ready,
        (false, _) => Readiness::Degraded("the bus is away: requests whose tunnel is on another node fail"),
        (true, true) => Readiness::Degraded("the database is away: clients that are not cached fail"),
    }
}

/// Speaks with the other nodes, over the bus.
async fn speak_with_peers(state: Arc<State>, close: CancellationToken) {
    tokio::select! {
        () = state.board.speak_with_peers() => {}
        () = close.cancelled() => {}
    }
}

/// Lets time pass for exchanges and for the memory of who was here.
async fn pass_time(state: Arc<State>, close: CancellationToken) {
    tokio::select! {
        () = state.board.pass_time() => {}
        () = close.cancelled() => {}
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
                state.board.peers.tell(&client_id, News::TokenRevoked { token_id });
                state.board.revoke(|tunnel| tunnel.token_id == token_id);
                state.board.fanout.end(&client_id, Left::ClientGone);
            }
            Ok(RegistryEvent::ClientDeleted { client_id }) => {
                state.board.peers.tell(&client_id, News::ClientDeleted);
                state.board.revoke(|tunnel| tunnel.path.owner.client_id == client_id);
                state.board.fanout.forget(&client_id);
            }
            Ok(RegistryEvent::ClientChanged { client_id }) => {
                state.board.peers.tell(&client_id, News::ClientChanged);
            }
            // Too many at once to be told one by one: look which tokens are still good.
            Err(broadcast::error::RecvError::Lagged(_)) => recheck(&state).await,
            Err(broadcast::error::RecvError::Closed) => return close.cancelled().await,
        }
    }
}

async fn recheck(state: &State) {
    for tunnel in state.board.tunnels.held() {
        let client_id = &tunnel.path.owner.client_id;
        let Ok(client) = state.registry.client(client_id).await else {
            continue;
        };
        if !client.is_some_and(|client| client.has_token(tunnel.token_id)) {
            state.board.revoke(|other| other.id == tunnel.id);
        }
    }
    // Which tokens its subscribers came with is not known: whoever is still let in subscribes again.
    state.board.fanout.end_all(Left::ClientGone);
}
