//! A TCP proxy between an agent and its relay, whose cables the test cuts.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// What the proxy does with the connections it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Weather {
    Fair,
    /// Nothing passes, nothing is closed: the laptop's network is gone.
    Frozen,
    /// The same, for the connections up to this number only: one tunnel is half-open, later ones are fine.
    FrozenTo(u64),
}

struct Shared {
    to: SocketAddr,
    weather: watch::Sender<Weather>,
    /// Counts up; connections of an earlier generation are reset.
    generation: watch::Sender<u64>,
    refuse: AtomicBool,
    /// Connections so far: the first is 1.
    connections: AtomicU64,
    /// Resets a connection once it has carried this many bytes; 0: never.
    cut_after: AtomicU64,
    carried: AtomicU64,
    held_back: AtomicU64,
    cuts: AtomicU64,
}

/// Forwards connections to one address.
pub struct FaultProxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _task: tokio_util::task::AbortOnDropHandle<()>,
}

impl FaultProxy {
    pub async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            to,
            weather: watch::Sender::new(Weather::Fair),
            generation: watch::Sender::new(0),
            refuse: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            cut_after: AtomicU64::new(0),
            carried: AtomicU64::new(0),
            held_back: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
        });
        let task = tokio::spawn(accept(listener, shared.clone()));
        Self {
            address,
            shared,
            _task: tokio_util::task::AbortOnDropHandle::new(task),
        }
    }

    /// Resets every connection.
    pub fn cut(&self) {
        self.shared.generation.send_modify(|generation| *generation += 1);
    }

    /// Resets each connection after it has carried so many bytes more.
    pub fn cut_after(&self, bytes: u64) {
        self.shared.cut_after.store(bytes, Ordering::SeqCst);
    }

    /// No new connections until [`Self::heal`].
    pub fn refuse(&self) {
        self.shared.refuse.store(true, Ordering::SeqCst);
    }

    /// Stops forwarding, silently, on all connections and new ones.
    pub fn freeze(&self) {
        self.shared.weather.send_replace(Weather::Frozen);
    }

    /// Stops forwarding, silently, on the first connections, counted from 1.
    pub fn freeze_first(&self, connections: u64) {
        self.shared.weather.send_replace(Weather::FrozenTo(connections));
    }

    /// Connections that were accepted so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Bytes that were held back by a freeze so far: proof that it was felt.
    pub fn held_back(&self) -> u64 {
        self.shared.held_back.load(Ordering::SeqCst)
    }

    /// Forwards again.
    pub fn heal(&self) {
        self.shared.refuse.store(false, Ordering::SeqCst);
        self.shared.cut_after.store(0, Ordering::SeqCst);
        self.shared.weather.send_replace(Weather::Fair);
    }

    /// Connections that were reset so far.
    pub fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::SeqCst)
    }

    /// Bytes carried so far, both ways.
    pub fn carried(&self) -> u64 {
        self.shared.carried.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((inner, _)) = accepted else { continue };
                if shared.refuse.load(Ordering::SeqCst) {
                    reset(&inner);
                    continue;
                }
                connections.spawn(forward(inner, shared.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream)
        .set_linger(Some(std::time::Duration::ZERO))
        .ok();
}

async fn forward(agent: TcpStream, shared: Arc<Shared>) {
    let Ok(relay) = TcpStream::connect(shared.to).await else {
        return;
    };
    agent.set_nodelay(true).ok();
    relay.set_nodelay(true).ok();
    let mut generation = shared.generation.subscribe();
    generation.mark_unchanged();
    let (mut from_agent, mut to_agent) = tokio::io::split(agent);
    let (mut from_relay, mut to_relay) = tokio::io::split(relay);
    let connection = Connection {
        number: shared.connections.fetch_add(1, Ordering::SeqCst) + 1,
        carried: AtomicU64::new(0),
    };
    let cut = {
        let both = async {
            tokio::try_join!(
                pipe(&mut from_agent, &mut to_relay, &shared, &connection),
                pipe(&mut from_relay, &mut to_agent, &shared, &connection),
            )
        };
        tokio::select! {
            ended = both => ended.is_err(),
            _ = generation.changed() => true,
        }
    };
    if cut {
        shared.cuts.fetch_add(1, Ordering::SeqCst);
        reset(&from_agent.unsplit(to_agent));
        reset(&from_relay.unsplit(to_relay));
    }
}

struct Connection {
    number: u64,
    carried: AtomicU64,
}

/// The connection has carried its bytes and is to be reset.
struct Cut;

async fn pipe<R, W>(from: &mut R, to: &mut W, shared: &Shared, connection: &Connection) -> Result<(), Cut>
where
    R: tokio::io::AsyncRead + Unpin,
    W: tokio::io::AsyncWrite + Unpin,
{
    let mut buffer = vec![0; 64 * 1024];
    let mut weather = shared.weather.subscribe();
    loop {
        let Ok(length) = from.read(&mut buffer).await else {
            return Ok(());
        };
        let passes = |weather: &Weather| match weather {
            Weather::Fair => true,
            Weather::Frozen => false,
            Weather::FrozenTo(last) => connection.number > *last,
        };
        if !passes(&weather.borrow()) {
            shared.held_back.fetch_add(length as u64, Ordering::SeqCst);
        }
        weather.wait_for(passes).await.ok();
        if length == 0 {
            to.shutdown().await.ok();
            return Ok(());
        }
        let limit = shared.cut_after.load(Ordering::SeqCst);
        let before = connection.carried.fetch_add(length as u64, Ordering::SeqCst);
        let length = if limit == 0 {
            length
        } else {
            length.min(limit.saturating_sub(before) as usize)
        };
        if to.write_all(&buffer[..length]).await.is_err() {
            return Ok(());
        }
        shared.carried.fetch_add(length as u64, Ordering::SeqCst);
        if limit != 0 && before + length as u64 >= limit {
            return Err(Cut);
        }
    }
}
