//! HTTP by hand, for what no library shows or says.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

use super::within;

/// A connection that is written and read by hand.
pub struct Raw {
    pub stream: TcpStream,
    seen: Vec<u8>,
}

impl Raw {
    pub async fn connect(address: SocketAddr) -> Self {
        Self::of(TcpStream::connect(address).await.expect("the relay listens"))
    }

    fn of(stream: TcpStream) -> Self {
        stream.set_nodelay(true).ok();
        Self {
            stream,
            seen: Vec::new(),
        }
    }

    pub async fn write(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).await.expect("the peer is there");
    }

    /// Reads up to and including `end`.
    pub async fn until(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = find(&self.seen, end.as_bytes()) {
                let rest = self.seen.split_off(at + end.len());
                let text = std::mem::replace(&mut self.seen, rest);
                return String::from_utf8_lossy(&text).into_owned();
            }
            let read = within(&format!("waiting for {end:?}"), self.stream.read_buf(&mut self.seen)).await;
            let seen = String::from_utf8_lossy(&self.seen).into_owned();
            assert!(read.expect("the peer is there") > 0, "ended before {end:?}: {seen}");
        }
    }

    pub async fn head(&mut self) -> String {
        self.until("\r\n\r\n").await
    }

    /// Reads to the connection's end. `Err` when it was reset.
    pub async fn rest(&mut self) -> (Vec<u8>, std::io::Result<()>) {
        let read = within("the end of a connection", self.stream.read_to_end(&mut self.seen)).await;
        (std::mem::take(&mut self.seen), read.map(|_| ()))
    }
}

fn find(text: &[u8], end: &[u8]) -> Option<usize> {
    text.windows(end.len()).position(|window| window == end)
}

/// An upstream that speaks by hand: one function a connection.
pub struct RawUpstream {
    pub address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

impl RawUpstream {
    pub async fn start<F, Fut>(serve: F) -> Self
    where
        F: Fn(Raw) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(Raw::of(stream)));
            }
        });
        Self {
            address,
            _task: AbortOnDropHandle::new(task),
        }
    }
}
