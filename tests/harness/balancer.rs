//! A TCP load balancer: connections go to the nodes in turns, past those that refuse and those that it was told to spare.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

struct Shared {
    /// Nodes, and whether each is sent connections.
    nodes: Mutex<Vec<(SocketAddr, bool)>>,
    turn: AtomicU64,
    /// Counts up; connections of before are reset.
    generation: watch::Sender<u64>,
    cuts: AtomicU64,
}

pub struct Balancer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _task: AbortOnDropHandle<()>,
}

impl Balancer {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            nodes: Mutex::default(),
            turn: AtomicU64::new(0),
            generation: watch::Sender::new(0),
            cuts: AtomicU64::new(0),
        });
        let task = tokio::spawn(accept(listener, shared.clone()));
        Self {
            address,
            shared,
            _task: AbortOnDropHandle::new(task),
        }
    }

    pub fn add(&self, node: SocketAddr) {
        self.shared.nodes().push((node, true));
    }

    /// No new connection goes there.
    pub fn spare(&self, node: SocketAddr) {
        self.set(node, false);
    }

    /// New connections go there again.
    pub fn use_again(&self, node: SocketAddr) {
        self.set(node, true);
    }

    fn set(&self, node: SocketAddr, used: bool) {
        for (_, is_used) in self.shared.nodes().iter_mut().filter(|(address, _)| *address == node) {
            *is_used = used;
        }
    }

    /// Resets every connection through it.
    pub fn cut(&self) {
        self.shared.generation.send_modify(|generation| *generation += 1);
    }

    /// Connections that were reset so far.
    pub fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn nodes(&self) -> MutexGuard<'_, Vec<(SocketAddr, bool)>> {
        self.nodes.lock().expect("not poisoned")
    }

    /// A connection to the node whose turn it is, or the next one that takes it.
    async fn connect(&self) -> Option<TcpStream> {
        let used: Vec<SocketAddr> = {
            let nodes = self.nodes();
            nodes
                .iter()
                .filter(|(_, used)| *used)
                .map(|(address, _)| *address)
                .collect()
        };
        let turn = self.turn.fetch_add(1, Ordering::SeqCst) as usize;
        for at in 0..used.len() {
            if let Ok(stream) = TcpStream::connect(used[(turn + at) % used.len()]).await {
                return Some(stream);
            }
        }
        None
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(forward(stream, shared.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn forward(mut from: TcpStream, shared: Arc<Shared>) {
    let mut generation = shared.generation.subscribe();
    generation.mark_unchanged();
    let Some(mut to) = shared.connect().await else { return };
    from.set_nodelay(true).ok();
    to.set_nodelay(true).ok();
    let broke = tokio::select! {
        ended = tokio::io::copy_bidirectional_with_sizes(&mut from, &mut to, 64 * 1024, 64 * 1024) => ended.is_err(),
        _ = generation.changed() => {
            shared.cuts.fetch_add(1, Ordering::SeqCst);
            true
        }
    };
    if broke {
        for stream in [&from, &to] {
            socket2::SockRef::from(stream)
                .set_linger(Some(std::time::Duration::ZERO))
                .ok();
        }
    }
}
