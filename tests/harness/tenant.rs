//! A client of the relay with an upstream of its own. Every body is made from the tenant's number, the stream's and the
//! offset, so that bytes that come from elsewhere are recognised; and the upstream counts who calls it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use aws_lc_rs::digest;
use bytes::Bytes;
use http::{Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::harness::{
    AnyBody, AnyError, TestUpstream,
    bodies::{self, Pieces, Sum},
    full, within,
};

/// What the upstream has seen.
#[derive(Default)]
struct Seen {
    /// Calls by stream.
    calls: Mutex<HashMap<u64, usize>>,
    /// Requests whose answer is not over.
    open: AtomicUsize,
    /// Bytes of request bodies.
    uploaded: AtomicU64,
    /// What is no request of this tenant's.
    foreign: AtomicUsize,
}

pub struct Tenant {
    pub name: String,
    pub token: String,
    number: u64,
    upstream: TestUpstream,
    seen: Arc<Seen>,
}

/// What the bytes of a stream are made from.
fn seed(tenant: u64, stream: u64) -> u64 {
    (tenant << 40) ^ stream
}

impl Tenant {
    pub async fn start(name: &str, number: u64, token: String) -> Self {
        let seen = Arc::<Seen>::default();
        let (upstream, seen_by) = (Self::serve(name, number, seen.clone()).await, seen);
        Self {
            name: name.to_owned(),
            token,
            number,
            upstream,
            seen: seen_by,
        }
    }

    /// `GET /down/{stream}/{length}` gives that body, `POST /up/{stream}/…` takes one and says what it was,
    /// `POST /echo/{stream}/…` gives it back.
    async fn serve(name: &str, number: u64, seen: Arc<Seen>) -> TestUpstream {
        let name = name.to_owned();
        TestUpstream::start(move |request: Request<Incoming>| {
            let (seen, name) = (seen.clone(), name.clone());
            async move {
                if request.headers().get("x-tenant").is_none_or(|tenant| *tenant != *name) {
                    seen.foreign.fetch_add(1, Ordering::SeqCst);
                }
                let path = request.uri().path().to_owned();
                let mut parts = path.split('/').skip(1);
                let kind = parts.next().unwrap_or_default();
                let numbers: Vec<u64> = parts.filter_map(|part| part.parse().ok()).collect();
                let [stream, length] = numbers[..] else {
                    panic!("{path} is asked for by nobody")
                };
                *seen.calls.lock().expect("not poisoned").entry(stream).or_default() += 1;
                let open = Open::new(seen.clone());
                match kind {
                    "down" => Response::builder()
                        .header(header::CONTENT_LENGTH, length)
                        .body(open.over(bodies::long(seed(number, stream), length)))
                        .expect("a response"),
                    "echo" => {
                        let body = request.into_body().map_err(AnyError::other).boxed();
                        Response::new(open.over(Counted::new(seen, body).boxed()))
                    }
                    _ => {
                        let sum = bodies::sum(Counted::new(seen, request.into_body())).await;
                        Response::new(open.over(full(format!("{sum:?}"))))
                    }
                }
            }
        })
        .await
    }

    pub fn upstream(&self) -> SocketAddr {
        self.upstream.address
    }

    /// How often a stream was asked of the upstream.
    pub fn calls(&self, stream: u64) -> usize {
        let calls = self.seen.calls.lock().expect("not poisoned");
        calls.get(&stream).copied().unwrap_or(0)
    }

    /// The most that any stream was asked for.
    pub fn most_calls(&self) -> usize {
        let calls = self.seen.calls.lock().expect("not poisoned");
        calls.values().copied().max().unwrap_or(0)
    }

    /// Requests that the upstream is at.
    pub fn open(&self) -> usize {
        self.seen.open.load(Ordering::SeqCst)
    }

    /// Bytes of request bodies that have reached the upstream.
    pub fn uploaded(&self) -> u64 {
        self.seen.uploaded.load(Ordering::SeqCst)
    }

    fn request(&self, method: &str, kind: &str, stream: u64, length: u64) -> http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("/{kind}/{stream}/{length}"))
            .header("host", "relay")
            .header("adit-client", &self.name)
            .header("x-tenant", &self.name)
    }

    /// Asks for a body and waits for the head of the answer.
    pub async fn begin(&self, at: SocketAddr, stream: u64, length: u64) -> Result<Download, Broken> {
        let request = self.request("GET", "down", stream, length).body(full(""));
        let response = try_send(at, request.expect("a request"))
            .await
            .map_err(Broken::Connection)?;
        if response.status() != 200 {
            return Err(Broken::Status(response.status().as_u16(), response));
        }
        Ok(Download {
            body: response.into_body(),
            hash: digest::Context::new(&digest::SHA256),
            so_far: 0,
            expected: bodies::sum_of_long(seed(self.number, stream), length),
        })
    }

    /// A whole body.
    pub async fn download(&self, at: SocketAddr, stream: u64, length: u64) -> Result<(), Broken> {
        self.begin(at, stream, length).await?.rest().await
    }

    /// Sends a body, the second half of it when `more` is dropped, and hears of the upstream what it was.
    pub async fn upload(
        &self,
        at: SocketAddr,
        stream: u64,
        length: u64,
        more: Option<tokio::sync::oneshot::Receiver<()>>,
    ) -> Result<(), Broken> {
        let seed = seed(self.number, stream);
        let (writer, body) = bodies::written();
        tokio::spawn(async move {
            let (mut sent, mut more) = (0, more);
            for piece in Pieces::new(seed, length) {
                sent += piece.len() as u64;
                if sent > length / 2
                    && let Some(more) = more.take()
                {
                    more.await.ok();
                }
                if !writer.write(piece).await {
                    return;
                }
            }
        });
        let request = self.request("POST", "up", stream, length).body(body);
        let response = try_send(at, request.expect("a request"))
            .await
            .map_err(Broken::Connection)?;
        if response.status() != 200 {
            return Err(Broken::Status(response.status().as_u16(), response));
        }
        let said = within("the answer", response.into_body().collect())
            .await
            .map_err(|_| Broken::Body)?;
        let expected: Result<Sum, u64> = Ok(bodies::sum_of_long(seed, length));
        assert_eq!(
            String::from_utf8_lossy(&said.to_bytes()),
            format!("{expected:?}"),
            "what was sent is what came"
        );
        assert_eq!(self.calls(stream), 1, "a POST is sent once");
        Ok(())
    }

    /// A conversation: what is written comes back.
    pub async fn talk(&self, at: SocketAddr, stream: u64) -> Talk {
        let (writer, body) = bodies::written();
        let request = self.request("POST", "echo", stream, 0).body(body).expect("a request");
        let asked = tokio::spawn(async move { try_send(at, request).await });
        assert!(writer.write("hello").await);
        let response = within("an answer", asked).await.expect("no panic").expect("an answer");
        assert_eq!(response.status(), 200);
        let mut talk = Talk {
            writer,
            heard: response.into_body(),
        };
        talk.hears("hello").await;
        talk
    }

    /// Nothing of another's came here, and no POST of these came twice.
    pub fn assert_untouched(&self) {
        assert_eq!(self.seen.foreign.load(Ordering::SeqCst), 0, "no request of another's");
    }
}

/// A request, by hand, on a connection of its own.
pub async fn try_send(address: SocketAddr, request: Request<AnyBody>) -> Result<Response<Incoming>, String> {
    let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).ok();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    within("an answer", sender.send_request(request))
        .await
        .map_err(|error| error.to_string())
}

/// How a request failed, visibly.
#[derive(Debug)]
pub enum Broken {
    /// Its connection broke, or there was none.
    Connection(String),
    /// It was answered with an error.
    Status(u16, Response<Incoming>),
    /// The body broke off.
    Body,
}

/// A response on its way.
pub struct Download {
    body: Incoming,
    hash: digest::Context,
    so_far: u64,
    expected: Sum,
}

impl Download {
    /// Reads at least so many bytes in all.
    pub async fn read(&mut self, at_least: u64) -> Result<(), Broken> {
        while self.so_far < at_least {
            let frame = within("the next piece", self.body.frame()).await;
            let piece = frame.expect("there is more").map_err(|_| Broken::Body)?;
            if let Ok(data) = piece.into_data() {
                self.hash.update(&data);
                self.so_far += data.len() as u64;
            }
        }
        Ok(())
    }

    /// Reads to the end. If that comes, it is the right one, with the right bytes before it.
    pub async fn rest(mut self) -> Result<(), Broken> {
        self.read(self.expected.0).await?;
        let end = within("the end", self.body.frame()).await;
        match end {
            None => {}
            Some(Err(_)) => return Err(Broken::Body),
            Some(Ok(more)) => panic!("more than was asked for: {more:?}"),
        }
        let sum = Sum(self.so_far, self.hash.finish().as_ref().to_vec());
        assert_eq!(sum, self.expected, "these are not the bytes of this stream");
        Ok(())
    }
}

/// A conversation with the upstream.
pub struct Talk {
    writer: bodies::BodyWriter,
    heard: Incoming,
}

impl Talk {
    async fn hears(&mut self, text: &str) {
        let mut heard = Vec::new();
        while heard.len() < text.len() {
            let more = bodies::next(&mut self.heard).await.expect("the talk goes on");
            heard.extend_from_slice(&more);
        }
        assert_eq!(heard, text.as_bytes());
    }

    pub async fn say(&mut self, text: &str) {
        assert!(self.writer.write(text.to_owned()).await, "the talk goes on");
        self.hears(text).await;
    }

    pub async fn end(mut self) {
        drop(self.writer);
        assert!(bodies::ends_well(&mut self.heard).await);
    }
}

/// Counts a request in, until its answer is over or given up.
struct Open(Arc<Seen>);

impl Open {
    fn new(seen: Arc<Seen>) -> Self {
        seen.open.fetch_add(1, Ordering::SeqCst);
        Self(seen)
    }

    fn over(self, body: AnyBody) -> AnyBody {
        OpenBody { body, _open: self }.boxed()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

struct OpenBody {
    body: AnyBody,
    _open: Open,
}

impl Body for OpenBody {
    type Data = Bytes;
    type Error = AnyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Counts what of a request body comes.
struct Counted<B> {
    seen: Arc<Seen>,
    body: B,
}

impl<B> Counted<B> {
    fn new(seen: Arc<Seen>, body: B) -> Self {
        Self { seen, body }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.seen.uploaded.fetch_add(data.len() as u64, Ordering::SeqCst);
        }
        polled
    }
}
