//! Sockets without an HTTP library: an upstream that writes down the exact bytes it gets and answers with exact bytes, and
//! a downstream's view of an answer.
#![allow(dead_code, reason = "each story uses its part")]

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// Far more than anything here takes: a test that gets here hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// One whole request, as it came.
#[derive(Clone)]
pub struct Call(pub Vec<u8>);

impl Call {
    fn head(&self) -> &[u8] {
        &self.0[..head_length(&self.0).unwrap_or(0)]
    }

    pub fn body(&self) -> &[u8] {
        &self.0[head_length(&self.0).unwrap_or(0)..]
    }

    /// The request line.
    pub fn line(&self) -> String {
        let head = String::from_utf8_lossy(self.head()).into_owned();
        head.split("\r\n").next().unwrap_or_default().to_owned()
    }

    pub fn path(&self) -> String {
        self.line().split(' ').nth(1).unwrap_or_default().to_owned()
    }

    /// Every value of a header, byte for byte, in order.
    pub fn values(&self, name: &str) -> Vec<Vec<u8>> {
        let lines = split_lines(self.head());
        let named = lines.iter().filter_map(|line| {
            let colon = line.iter().position(|b| *b == b':')?;
            let found = line[..colon].eq_ignore_ascii_case(name.as_bytes());
            found.then(|| line[colon + 1..].trim_ascii().to_vec())
        });
        named.collect()
    }

    pub fn value(&self, name: &str) -> String {
        let values = self.values(name);
        assert!(values.len() <= 1, "{name} is there more than once: {self:?}");
        values
            .first()
            .map(|v| String::from_utf8_lossy(v).into_owned())
            .unwrap_or_default()
    }
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        String::from_utf8_lossy(&self.0).fmt(f)
    }
}

fn split_lines(head: &[u8]) -> Vec<Vec<u8>> {
    let (mut lines, mut rest) = (Vec::new(), head);
    while let Some(at) = rest.windows(2).position(|two| two == b"\r\n") {
        lines.push(rest[..at].to_vec());
        rest = &rest[at + 2..];
    }
    lines
}

fn head_length(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

/// Whether a whole request is there.
fn is_whole(bytes: &[u8]) -> bool {
    let Some(at) = head_length(bytes) else { return false };
    let call = Call(bytes.to_vec());
    if call.value("transfer-encoding") == "chunked" {
        return chunks_end(&bytes[at..]);
    }
    let length = call.value("content-length").parse().unwrap_or(0);
    bytes.len() - at >= length
}

fn chunks_end(mut body: &[u8]) -> bool {
    loop {
        let Some(line) = body.windows(2).position(|two| two == b"\r\n") else {
            return false;
        };
        let size = std::str::from_utf8(&body[..line])
            .ok()
            .and_then(|size| usize::from_str_radix(size, 16).ok());
        let size = size.expect("a chunk of ours has a plain size");
        if size == 0 {
            return head_length(&body[line..]).is_some();
        }
        if body.len() < line + 2 + size + 2 {
            return false;
        }
        body = &body[line + 2 + size + 2..];
    }
}

/// How a connection to the upstream ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// A whole request had come on it.
    pub whole: bool,
    /// What came after the request.
    pub tail: Vec<u8>,
}

#[derive(Default, Debug)]
struct Log {
    heads: usize,
    calls: Vec<Call>,
    ended: Vec<Ended>,
}

type AnswerFn = Arc<dyn Fn(&Call) -> Vec<u8> + Send + Sync>;

/// An upstream that reads one request a connection, answers, and reads to the end.
pub struct RawUpstream {
    pub address: SocketAddr,
    log: Arc<Mutex<Log>>,
    _task: AbortOnDropHandle<()>,
}

pub const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
/// A path that is answered with a body without end.
pub const ENDLESS: &str = "/endless";

impl RawUpstream {
    pub async fn ok() -> Self {
        Self::start(|_| OK.to_vec()).await
    }

    pub async fn start(answer: impl Fn(&Call) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (log, answer) = (Arc::new(Mutex::new(Log::default())), Arc::new(answer) as AnswerFn);
        let task = {
            let log = log.clone();
            tokio::spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    connections.spawn(serve(stream, log.clone(), answer.clone()));
                }
            })
        };
        Self {
            address,
            log,
            _task: AbortOnDropHandle::new(task),
        }
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().expect("not poisoned")
    }

    /// The whole requests since the last look.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.log().calls)
    }

    /// How many heads have come, whole requests or not.
    pub fn heads(&self) -> usize {
        self.log().heads
    }

    /// The connections that have ended.
    pub fn ended(&self) -> Vec<Ended> {
        self.log().ended.clone()
    }
}

async fn serve(mut stream: TcpStream, log: Arc<Mutex<Log>>, answer: AnswerFn) {
    stream.set_nodelay(true).ok();
    let locked = || log.lock().expect("not poisoned");
    let (mut bytes, mut seen_head) = (Vec::new(), false);
    while !is_whole(&bytes) {
        let read = stream.read_buf(&mut bytes).await.unwrap_or(0);
        if !seen_head && head_length(&bytes).is_some() {
            seen_head = true;
            locked().heads += 1;
        }
        if read == 0 {
            if !bytes.is_empty() {
                let ended = Ended {
                    whole: false,
                    tail: Vec::new(),
                };
                locked().ended.push(ended);
            }
            return;
        }
    }
    let call = Call(bytes);
    let reply = if call.path() == ENDLESS {
        Vec::new()
    } else {
        answer(&call)
    };
    let endless = call.path() == ENDLESS;
    locked().calls.push(call);
    if endless {
        let mut sent = stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n")
            .await;
        while sent.is_ok() {
            sent = stream.write_all(&[b'x'; 16 * 1024]).await;
        }
    } else {
        stream.write_all(&reply).await.ok();
        if !reply.starts_with(b"HTTP/1.1 101") {
            stream.shutdown().await.ok();
        }
    }
    let mut tail = Vec::new();
    stream.read_to_end(&mut tail).await.ok();
    locked().ended.push(Ended { whole: true, tail });
}

/// What a downstream read.
pub struct RawAnswer {
    pub bytes: Vec<u8>,
    /// The connection ended in a reset.
    pub reset: bool,
}

impl std::fmt::Debug for RawAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = &self.bytes[..self.bytes.len().min(2000)];
        write!(f, "{:?} (reset: {})", String::from_utf8_lossy(shown), self.reset)
    }
}

impl RawAnswer {
    /// Reads until the relay closes.
    pub async fn read(socket: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut bytes)).await;
        let ended = ended.unwrap_or_else(|_| panic!("not closed after {:?}", String::from_utf8_lossy(&bytes)));
        Self {
            bytes,
            reset: ended.is_err(),
        }
    }

    /// Reads just as far as `end`.
    pub async fn read_until(socket: &mut TcpStream, end: &[u8]) -> Self {
        let mut bytes = Vec::new();
        while !bytes.ends_with(end) {
            let byte = tokio::time::timeout(PATIENCE, socket.read_u8()).await;
            match byte.unwrap_or_else(|_| panic!("no more after {:?}", String::from_utf8_lossy(&bytes))) {
                Ok(byte) => bytes.push(byte),
                Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&bytes)),
            }
        }
        Self { bytes, reset: false }
    }

    pub fn status(&self) -> u16 {
        let status = self.bytes.get(9..12).unwrap_or_default();
        std::str::from_utf8(status)
            .ok()
            .and_then(|status| status.parse().ok())
            .unwrap_or(0)
    }

    pub fn head(&self) -> String {
        let head = &self.bytes[..head_length(&self.bytes).unwrap_or(0)];
        String::from_utf8_lossy(head).to_ascii_lowercase()
    }

    pub fn body(&self) -> &[u8] {
        &self.bytes[head_length(&self.bytes).unwrap_or(0)..]
    }

    /// Every value of a header, byte for byte, in order.
    pub fn values(&self, name: &str) -> Vec<Vec<u8>> {
        Call(self.bytes.clone()).values(name)
    }
}

/// Sends all of it on a connection of its own and reads until the relay closes.
pub async fn send_raw(address: SocketAddr, bytes: impl AsRef<[u8]>) -> RawAnswer {
    let mut socket = TcpStream::connect(address).await.expect("a connection");
    socket.set_nodelay(true).ok();
    // It may be refused before all of it is read.
    socket.write_all(bytes.as_ref()).await.ok();
    RawAnswer::read(&mut socket).await
}
