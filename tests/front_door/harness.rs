//! A listener with a service that checks heads and does what the path says, and raw sockets to it.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use adit::{
    error::Cause,
    ids::RequestId,
    relay::{
        downstream::{
            caps::Caps,
            handle::ConnHandle,
            listener::{Limits, Listener},
        },
        forward,
        strict::{self, Target},
    },
    wire::fields,
};
use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
    task::JoinHandle,
};

/// Far more than anything here takes: a test that gets here hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What the service saw of a request that passed the check.
#[derive(Debug, Clone)]
pub struct Seen {
    pub path: String,
    pub headers: HeaderMap,
    pub websocket: bool,
}

/// What happens to the service, for tests to wait for.
#[derive(Default)]
pub struct Events {
    pub seen: Mutex<Vec<Seen>>,
    /// A request's body ended in an error.
    pub broken_uploads: Notify,
    /// A response's body was dropped.
    pub dropped_bodies: Notify,
    /// Lets `/hint`, `/slow` answer.
    pub release: Notify,
    /// A request for `/hint` or `/slow` has come.
    pub waiting: Notify,
}

pub struct FrontDoor {
    pub address: SocketAddr,
    pub events: Arc<Events>,
    pub caps: Arc<Caps>,
    shutdown_tx: Option<oneshot::Sender<()>>,
    served: Option<JoinHandle<()>>,
}

impl FrontDoor {
    pub async fn open() -> Self {
        Self::with(Limits::default()).await
    }

    pub async fn with(limits: Limits) -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = tcp.local_addr().expect("an address");
        let events = Arc::new(Events::default());
        let listener = Listener::new(limits);
        let caps = listener.caps();
        let (shutdown_tx, shutdown_rx) = oneshot::channel::<()>();
        let service = {
            let events = events.clone();
            service_fn(move |request| serve(events.clone(), request))
        };
        let served = tokio::spawn(listener.serve(tcp, service, async {
            let _ = shutdown_rx.await;
        }));
        Self {
            address,
            events,
            caps,
            shutdown_tx: Some(shutdown_tx),
            served: Some(served),
        }
    }

    pub async fn connect(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).await.expect("a connection");
        socket.set_nodelay(true).expect("a socket");
        socket
    }

    /// Sends all of it and reads until the relay closes.
    pub async fn send(&self, bytes: impl AsRef<[u8]>) -> Answer {
        let mut socket = self.connect().await;
        socket.write_all(bytes.as_ref()).await.expect("sent");
        Answer::read_to_end(&mut socket).await
    }

    /// That what the test did has harmed nobody else.
    pub async fn still_serves(&self) {
        let answer = self
            .send("GET /after HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await;
        assert_eq!(answer.status(), 200, "{answer:?}");
        assert_eq!(self.take_seen().last().expect("seen").path, "/after");
    }

    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.events.seen.lock().expect("not poisoned"))
    }

    /// Refused by the relay with this status, as a problem, and closed; unseen by the service.
    pub async fn refuses(&self, status: u16, bytes: impl AsRef<[u8]>) -> Answer {
        let shown = String::from_utf8_lossy(&bytes.as_ref()[..bytes.as_ref().len().min(120)]).into_owned();
        let answer = self.send(bytes).await;
        assert_eq!(answer.status(), status, "{shown:?}: {answer:?}");
        assert!(answer.head().contains("adit-error: "), "{shown:?}: {answer:?}");
        assert!(
            answer.head().contains("content-type: application/problem+json"),
            "{shown:?}: {answer:?}"
        );
        assert!(answer.body().contains("\"detail\":"), "{shown:?}: {answer:?}");
        assert_eq!(
            answer.text.matches("adit-error: ").count(),
            1,
            "one answer to {shown:?}: {answer:?}"
        );
        assert_eq!(self.take_seen().len(), 0, "the service saw {shown:?}");
        answer
    }

    pub fn shut_down(&mut self) {
        self.shutdown_tx.take().expect("once").send(()).expect("still serving");
    }

    pub async fn served(&mut self) {
        let served = self.served.take().expect("once");
        tokio::time::timeout(PATIENCE, served)
            .await
            .expect("it ends")
            .expect("no panic");
    }
}

#[derive(Debug)]
pub struct Answer {
    pub text: String,
}

impl Answer {
    pub async fn read_to_end(socket: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        tokio::time::timeout(PATIENCE, socket.read_to_end(&mut bytes))
            .await
            .expect("closed")
            .expect("not reset");
        Self {
            text: String::from_utf8_lossy(&bytes).into_owned(),
        }
    }

    /// Reads just as far as `end`.
    pub async fn read_until(socket: &mut TcpStream, end: &str) -> Self {
        let mut bytes = Vec::new();
        while !bytes.ends_with(end.as_bytes()) {
            let byte = tokio::time::timeout(PATIENCE, socket.read_u8()).await.expect("more");
            bytes.push(byte.unwrap_or_else(|e| panic!("{e} after {:?}", String::from_utf8_lossy(&bytes))));
        }
        Self {
            text: String::from_utf8_lossy(&bytes).into_owned(),
        }
    }

    pub fn status(&self) -> u16 {
        self.text.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    pub fn head(&self) -> &str {
        self.text.split_once("\r\n\r\n").map_or("", |(head, _)| head)
    }

    pub fn body(&self) -> &str {
        self.text.split_once("\r\n\r\n").map_or("", |(_, body)| body)
    }
}

async fn serve(events: Arc<Events>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let target = match strict::check(&parts, &strict::Limits::default()) {
        Ok(target) => target,
        Err(cause) => return Ok(cause.respond(RequestId::new())),
    };
    events.seen.lock().expect("not poisoned").push(Seen {
        path: target.path_and_query().to_owned(),
        headers: parts.headers.clone(),
        websocket: target.websocket,
    });
    let handle = parts.extensions.get::<ConnHandle>().expect("a handle").clone();
    assert!(handle.peer().ip().is_loopback());
    Ok(match target.path() {
        "/early" => early(),
        "/hint" => hint(&events, handle).await,
        "/slow" => slow(&events).await,
        "/endless" => Response::new(Body::new(Feed::endless(events))),
        "/broken" => broken(events, &handle, parts.version),
        "/ws" if target.websocket => websocket(Request::from_parts(parts, body), &target),
        _ => echo(&events, body).await,
    })
}

async fn echo(events: &Events, body: Incoming) -> Response<Body> {
    match body.collect().await {
        Ok(body) => {
            let mut trailers = body.trailers().cloned().unwrap_or_default();
            fields::keep_trailers(&mut trailers);
            let mut response = Response::new(Body::from(body.to_bytes()));
            response
                .headers_mut()
                .insert("x-trailers", HeaderValue::from(trailers.len()));
            response
        }
        Err(_) => {
            events.broken_uploads.notify_one();
            Cause::BadRequest("the body's framing is broken").respond(RequestId::new())
        }
    }
}

fn early() -> Response<Body> {
    let mut response = Response::new(Body::from("too much"));
    *response.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
    response
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

async fn hint(events: &Events, handle: ConnHandle) -> Response<Body> {
    let mut headers = HeaderMap::new();
    headers.insert("link", HeaderValue::from_static("</a.css>; rel=preload"));
    let late = handle.clone();
    // From another task, with the service's own future asleep.
    let sent = tokio::spawn(async move { handle.informational(StatusCode::EARLY_HINTS, &headers) });
    let sent = sent.await.expect("no panic");
    slow(events).await;
    let mut response = Response::new(Body::from(format!("hinted: {sent}")));
    response.extensions_mut().insert(late);
    response
}

async fn slow(events: &Events) -> Response<Body> {
    events.waiting.notify_one();
    events.release.notified().await;
    Response::new(Body::from("slow"))
}

fn broken(events: Arc<Events>, handle: &ConnHandle, version: Version) -> Response<Body> {
    if version != Version::HTTP_11 {
        handle.abort();
    }
    Response::new(Body::new(Feed {
        events,
        left: 3,
        then_fail: true,
        paused: false,
    }))
}

fn websocket(mut request: Request<Incoming>, target: &Target) -> Response<Body> {
    assert!(target.websocket);
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut io = TokioIo::new(upgrade.await.expect("an upgrade"));
        let mut word = [0; 5];
        while io.read_exact(&mut word).await.is_ok() {
            io.write_all(&word).await.expect("echoed");
        }
        io.write_all(b"bye").await.expect("said");
        io.shutdown().await.expect("ended");
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    forward::to_downstream_websocket(response.headers_mut());
    response
}

/// A response's body: chunks, without end or up to a failure.
struct Feed {
    events: Arc<Events>,
    left: usize,
    then_fail: bool,
    paused: bool,
}

impl Feed {
    fn endless(events: Arc<Events>) -> Self {
        Self {
            events,
            left: usize::MAX,
            then_fail: false,
            paused: false,
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.events.dropped_bodies.notify_one();
    }
}

impl http_body::Body for Feed {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        if self.left == 0 && !self.paused {
            // What was before goes out first.
            self.paused = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.left == 0 {
            return Poll::Ready(self.then_fail.then_some(Err("the upstream broke off")));
        }
        self.left -= 1;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 1024])))))
    }
}
