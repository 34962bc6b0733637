//! The public listener: accepts, counts, serves and drains downstream connections. What a request means is the service's.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::{body::Incoming, service::Service};
use ipnet::IpNet;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::{Id, JoinError, JoinSet},
};
use tokio_util::task::TaskTracker;

pub use super::connection::BoxError;
use super::{
    caps::Caps,
    connection::Door,
    io::Timeouts,
    tls::{Tls, Transport},
};

/// What a listener allows.
#[derive(Clone)]
pub struct Limits {
    /// Connections in all. One costs about 20 KiB, so this many cost 320 MiB.
    pub max_connections: usize,
    /// Connections of one address (an IPv6 /64). Well above what a browser or an office opens.
    pub max_connections_per_address: usize,
    /// Addresses that the cap per address is not for: the load balancers in front.
    pub trusted_proxies: Vec<IpNet>,
    /// The certificate, if connections are TLS.
    pub tls: Option<Arc<Tls>>,
    /// How long a downstream may take.
    pub timeouts: Timeouts,
    /// From the shutdown's start until what is still open is cut.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            max_connections_per_address: 1_024,
            trusted_proxies: Vec::new(),
            tls: None,
            timeouts: Timeouts::default(),
            drain_timeout: Duration::from_secs(60),
        }
    }
}

/// The public door of a relay: HTTP/1.1 and HTTP/2 on the same port, with prior knowledge or, with TLS, by ALPN.
pub struct Listener {
    limits: Limits,
    caps: Arc<Caps>,
}

impl Listener {
    /// Touches nothing yet.
    pub fn new(limits: Limits) -> Self {
        let caps = Caps::new(
            limits.max_connections,
            limits.max_connections_per_address,
            limits.trusted_proxies.clone(),
        );
        Self {
            limits,
            caps: Arc::new(caps),
        }
    }

    /// The counts of its connections, for metrics.
    pub fn caps(&self) -> Arc<Caps> {
        self.caps.clone()
    }

    /// Serves until `shutdown` is ready, then drains: at most [`Limits::drain_timeout`]. Dropping it cuts everything,
    /// except sockets that a service took over by an upgrade: those are the service's.
    ///
    /// Each request has a [`ConnHandle`](super::handle::ConnHandle) in its extensions.
    pub async fn serve<S, B>(self, listener: TcpListener, service: S, shutdown: impl Future<Output = ()>)
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: Body<Data = Bytes> + Unpin + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let streams = TaskTracker::new();
        let door = Arc::new(Door::new(self.limits.timeouts.clone(), streams.clone()));
        let mut conns = Conns::default();
        let mut acceptor = Acceptor::new(&listener, self.caps.clone());
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let (io, peer) = tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(done) = conns.tasks.join_next_with_id() => {
                    conns.forget(done);
                    continue;
                }
                accepted = acceptor.accept() => accepted,
            };
            // Over the cap: dropped, so closed at once, which costs nobody else anything.
            let Some(slot) = self.caps.enter(peer.ip()) else {
                continue;
            };
            let (door, service) = (door.clone(), service.clone());
            let tls = self.limits.tls.clone();
            conns.spawn(|leave_rx| async move {
                match tls {
                    Some(tls) => Box::pin(door.serve_tls(&tls, io, peer, slot, service, leave_rx)).await,
                    None => {
                        door.serve(Transport::Plain(io), peer, false, slot, service, leave_rx)
                            .await
                    }
                }
            });
        }
        // 1. Nobody new: the port is closed before anyone is told to leave, so that no one comes back here.
        drop(listener);
        // 2. Idle connections close; busy ones say `Connection: close` or GOAWAY with what they answer next.
        conns.tell_to_leave();
        // 3. They finish, or are cut.
        conns.finish(self.limits.drain_timeout).await;
        // 4. An HTTP/2 stream's task ends when its connection has.
        streams.close();
        streams.wait().await;
    }
}

/// The connections' tasks, and the way to ask each to leave.
#[derive(Default)]
struct Conns {
    tasks: JoinSet<()>,
    leave_txs: HashMap<Id, oneshot::Sender<()>>,
}

impl Conns {
    fn spawn<F>(&mut self, serve: impl FnOnce(oneshot::Receiver<()>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (leave_tx, leave_rx) = oneshot::channel();
        let task = self.tasks.spawn(serve(leave_rx));
        self.leave_txs.insert(task.id(), leave_tx);
    }

    fn forget(&mut self, done: Result<(Id, ()), JoinError>) {
        let id = match &done {
            Ok((id, ())) => *id,
            Err(error) => error.id(),
        };
        self.leave_txs.remove(&id);
        if let Err(error) = done
            && error.is_panic()
        {
            tracing::error!(%error, "a downstream connection's task panicked: this is a bug");
        }
    }

    /// A dropped sender is the message.
    fn tell_to_leave(&mut self) {
        self.leave_txs.clear();
    }

    async fn finish(&mut self, timeout: Duration) {
        let all_done = async {
            while let Some(done) = self.tasks.join_next_with_id().await {
                if let Err(error) = done
                    && error.is_panic()
                {
                    tracing::error!(%error, "a downstream connection's task panicked: this is a bug");
                }
            }
        };
        if tokio::time::timeout(timeout, all_done).await.is_err() {
            tracing::warn!(
                connections = self.tasks.len(),
                "cut what was open at the drain's deadline"
            );
            self.tasks.shutdown().await;
        }
    }
}

/// Accepts for ever: an error is the connection's, or the system's and will pass.
struct Acceptor<'a> {
    listener: &'a TcpListener,
    caps: Arc<Caps>,
    pause: Duration,
}

impl<'a> Acceptor<'a> {
    const FIRST_PAUSE: Duration = Duration::from_millis(10);
    /// A descriptor freed is taken up within this time.
    const LONGEST_PAUSE: Duration = Duration::from_secs(1);

    fn new(listener: &'a TcpListener, caps: Arc<Caps>) -> Self {
        Self {
            listener,
            caps,
            pause: Self::FIRST_PAUSE,
        }
    }

    /// Cancel-safe: a pause cut short is an earlier try.
    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((io, peer)) => {
                    self.pause = Self::FIRST_PAUSE;
                    // Without it a small answer waits for the peer's delayed ack (40 ms). It fails only on a dead socket.
                    let _ = io.set_nodelay(true);
                    return (io, peer);
                }
                Err(error) => {
                    self.caps.count_accept_error();
                    if !is_the_connections_own(&error) {
                        self.back_off(&error).await;
                    }
                }
            }
        }
    }

    async fn back_off(&mut self, error: &io::Error) {
        if self.pause == Self::FIRST_PAUSE {
            tracing::warn!(%error, "cannot accept connections now (out of descriptors?), trying again");
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(Self::LONGEST_PAUSE);
        tokio::time::sleep(pause).await;
    }
}

/// The peer left before it was accepted: nothing is wrong here.
fn is_the_connections_own(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_pause_after_a_failed_accept_doubles_up_to_a_second() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let caps = Arc::new(Caps::new(1, 1, Vec::new()));
        let mut acceptor = Acceptor::new(&listener, caps);
        let started = tokio::time::Instant::now();
        for _ in 0..10 {
            acceptor.back_off(&io::Error::other("EMFILE")).await;
        }
        assert_eq!(started.elapsed(), Duration::from_millis(1270 + 3 * 1000));
    }
}
