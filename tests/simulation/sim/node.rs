//! A relay node without sockets: its switchboard, what time does to it, and the tunnels that it accepts.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use adit::{
    cluster::{
        bus::{Bus, local::Hub},
        registry::ConnectionRow,
    },
    config::{RelayConfig, TunnelsConfig},
    exchange::{
        link::{KeepAlive, drive},
        path::{Owner, Path},
        table::TICK,
    },
    ids::{NodeId, TokenId},
    relay::{switchboard::Switchboard, taker::TunnelTaker, tunnels::Tunnel},
    wire::socket::{FrameSocket, Side},
};
use tokio::{sync::oneshot, task::JoinSet};

use super::{
    freeze::Freezer,
    net::End,
    registry::{Rows, SimDirectory},
};

pub const KEEP_ALIVE: KeepAlive = KeepAlive {
    interval: Duration::from_secs(15),
    timeout: Duration::from_secs(10),
};
/// Longer than all that fails, a silent connection's keep-alive included: nothing may break for it.
pub const RESUME_TIMEOUT: Duration = Duration::from_secs(90);
const LAST_WORDS: Duration = Duration::from_secs(2);
const MAX_TUNNELS: usize = 16;

pub struct Node {
    pub id: NodeId,
    pub board: Arc<Switchboard>,
    pub freezer: Freezer,
    hub: Arc<Hub>,
    /// All that runs in this process; `None` once it is dead.
    tasks: Mutex<Option<JoinSet<()>>>,
    leaving: std::sync::atomic::AtomicBool,
}

/// An agent's hello.
pub struct Hello {
    pub owner: Owner,
    pub slot: u32,
    pub generation: u64,
}

impl Node {
    pub fn start(id: NodeId, hub: &Arc<Hub>, rows: &Arc<Rows>) -> Arc<Self> {
        let directory = SimDirectory {
            node_id: id,
            rows: rows.clone(),
        };
        let config = TunnelsConfig {
            resume_timeout: RESUME_TIMEOUT,
            ..RelayConfig::default().tunnels
        };
        let node = Arc::new(Self {
            id,
            board: Arc::new(Switchboard::new(config, id, Bus::local(hub), Arc::new(directory))),
            freezer: Freezer::default(),
            hub: hub.clone(),
            tasks: Mutex::new(Some(JoinSet::new())),
            leaving: Default::default(),
        });
        let board = node.board.clone();
        node.spawn(async move { board.speak_with_peers().await });
        let board = node.board.clone();
        node.spawn(async move { board.pass_time().await });
        node
    }

    /// A short one, for the log.
    pub fn name(&self) -> String {
        format!("node {:02x}", self.id.to_bytes()[0])
    }

    /// Runs in the node's process: it stands still and dies with it. Nothing runs in one that is dead.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        if let Some(tasks) = self.tasks.lock().expect("no panic").as_mut() {
            tasks.spawn(self.freezer.wrap(future));
        }
    }

    /// As by SIGKILL.
    pub fn kill(&self) {
        self.hub.cut_off(self.id);
        self.tasks.lock().expect("no panic").take();
    }

    pub fn is_alive(&self) -> bool {
        self.tasks.lock().expect("no panic").is_some()
    }

    pub fn is_leaving(&self) -> bool {
        self.leaving.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// As by SIGTERM: returns at once, and dies when nothing is left.
    pub fn leave(self: &Arc<Self>, rows: &Rows) {
        self.leaving.store(true, std::sync::atomic::Ordering::Relaxed);
        rows.set_draining(self.id);
        self.board.send_away(Duration::from_secs(60));
        let node = self.clone();
        tokio::spawn(async move {
            for _ in 0..600 {
                tokio::time::sleep(TICK).await;
                if node.board.tunnels.is_empty() && node.board.exchanges.is_empty() {
                    break;
                }
            }
            let held = node.board.tunnels.held();
            held.iter().for_each(|tunnel| tunnel.close(None));
            tokio::time::sleep(LAST_WORDS).await;
            node.kill();
        });
    }

    /// An agent has dialled. What is sent on `accepted` is the node's hello.
    pub fn accept(&self, io: End, hello: Hello, accepted: oneshot::Sender<()>) {
        let board = self.board.clone();
        self.spawn(hold(board, io, hello, accepted));
    }
}

async fn hold(board: Arc<Switchboard>, io: End, hello: Hello, accepted: oneshot::Sender<()>) {
    let path = Path::new(hello.owner.clone(), board.exchanges.clock());
    let tunnel = Tunnel::here(hello.slot, hello.generation, TokenId::from_bytes([7; 16]), path.clone());
    let Ok(joined) = board.tunnels.join(tunnel.clone(), MAX_TUNNELS) else {
        return;
    };
    let row = ConnectionRow {
        tunnel_ws_id: tunnel.id,
        client_id: hello.owner.client_id,
        dialect: "adit".into(),
        instance_id: Some(hello.owner.instance_id),
        slot: Some(hello.slot),
        generation: hello.generation as i64,
        token_id: Some(tunnel.token_id),
        agent_version: None,
        remote_addr: String::new(),
        connected_at: 0,
    };
    board.up(&joined, row);
    accepted.send(()).ok();
    let taker = TunnelTaker::new(board.clone(), &tunnel);
    let socket = FrameSocket::new(io, Side::Relay).await;
    let last_words = async {
        path.closed().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        biased;
        _ = drive(socket, path.clone(), &taker, KEEP_ALIVE) => {}
        () = last_words => {}
    }
    board.down(joined);
}
