//! One downstream connection from its first byte to its close: detection, then hyper over a [`DownstreamIo`].

use std::{future::poll_fn, io, net::SocketAddr, pin::pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response};
use http_body::Body;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::{Service, service_fn},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    time::{Instant, timeout_at},
};
use tokio_util::task::TaskTracker;

use super::{
    caps::Slot,
    handle::{Shared, Watched},
    io::{DownstreamIo, Reset, Timeouts},
    opening::{self, Opening},
    own_words,
    tls::{self, Tls, Transport},
};
use crate::error::Cause;

/// The error of a service or a body, as hyper takes it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// hyper's buffers: above the 8 KiB target and 32 KiB of headers that `strict` allows, so that it is `strict` who
/// refuses what is only a little too long; and one connection's read and write buffer at most.
const H1_BUFFER: usize = 64 * 1024;

/// At a drain, how long a connection that has said nothing yet may still begin: its first request may be on its way.
const LAST_CALL: Duration = Duration::from_secs(1);

const H2_STREAMS: u32 = 256;
const H2_STREAM_WINDOW: u32 = 256 * 1024;
const H2_CONNECTION_WINDOW: u32 = 1024 * 1024;
const H2_SEND_BUFFER: usize = 64 * 1024;
/// RFC 9113 §6.5.2 counts 32 bytes for each field on top of its own: 32 KiB and 100 fields are below this.
const H2_HEADER_LIST: u32 = 64 * 1024;
const H2_PING_INTERVAL: Duration = Duration::from_secs(20);
const H2_PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Streams reset by the peer before we looked at them, and reset by us for its faults: more is a flood
/// (CVE-2023-44487, CVE-2025-8671) and closes the connection.
const H2_PENDING_RESETS: usize = 50;
const H2_LOCAL_RESETS: usize = 256;

/// What every connection of a listener is served with.
pub(super) struct Door {
    http1: http1::Builder,
    http2: http2::Builder<Streams>,
    timeouts: Arc<Timeouts>,
}

impl Door {
    /// `streams` owns the tasks of HTTP/2 streams.
    pub fn new(timeouts: Timeouts, streams: TaskTracker) -> Self {
        Self {
            http1: http1_builder(),
            http2: http2_builder(streams),
            timeouts: Arc::new(timeouts),
        }
    }

    /// Serves one connection to its end; `leave_rx` (sent to, or dropped at its other end) asks it to end soon.
    pub async fn serve<T, S, B>(
        &self,
        mut io: T,
        peer: SocketAddr,
        tls: bool,
        slot: Slot,
        service: S,
        leave_rx: oneshot::Receiver<()>,
    ) where
        T: AsyncRead + AsyncWrite + Reset + Unpin + Send + 'static,
        S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: Body<Data = Bytes> + Unpin + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let head_due = Instant::now() + self.timeouts.header;
        let Some((opening, leave)) = open(&mut io, head_due, leave_rx).await else {
            return;
        };
        let shared = Arc::new(Shared::new(peer, tls));
        poll_fn(|cx| {
            shared.drive_by(cx);
            Poll::Ready(())
        })
        .await;
        let wrap = |kept, head_due| {
            let timeouts = self.timeouts.clone();
            DownstreamIo::new(io, kept, shared.clone(), timeouts, head_due, Some(slot))
        };
        let done = match opening {
            Opening::Http1(kept) => {
                self.http1(wrap(kept, Some(head_due)), shared.clone(), service, leave)
                    .await
            }
            Opening::Http2(kept) => Box::pin(self.http2(wrap(kept, None), shared.clone(), service, leave)).await,
            Opening::Wrong(why) => return refuse(wrap(Bytes::new(), None), why).await,
            Opening::Silent => return,
        };
        if let Err(error) = done {
            tracing::debug!(peer = %peer, %error, "a downstream connection ended badly");
        }
    }

    /// As [`Door::serve`], of a connection that begins with a TLS handshake. One that begins otherwise is told so.
    pub async fn serve_tls<S, B>(
        &self,
        tls: &Tls,
        io: TcpStream,
        peer: SocketAddr,
        slot: Slot,
        service: S,
        mut leave_rx: oneshot::Receiver<()>,
    ) where
        S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: Body<Data = Bytes> + Unpin + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let head_due = Instant::now() + self.timeouts.header;
        let Some((opened, told)) = in_time(begin_tls(tls, io), head_due, &mut leave_rx).await else {
            return;
        };
        match opened {
            Ok(Transport::Plain(io)) => {
                let (shared, timeouts) = (Arc::new(Shared::new(peer, false)), self.timeouts.clone());
                let io = DownstreamIo::new(io, Bytes::new(), shared, timeouts, None, Some(slot));
                refuse(io, "this port speaks TLS and was sent plain text: use https://").await;
            }
            Ok(io) => {
                // One whose other end is gone says the same as the one that has spoken.
                let leave_rx = if told { oneshot::channel().1 } else { leave_rx };
                self.serve(io, peer, true, slot, service, leave_rx).await;
            }
            Err(error) => tracing::debug!(peer = %peer, %error, "a TLS handshake failed"),
        }
    }

    async fn http1<T, S, B>(
        &self,
        io: DownstreamIo<T>,
        shared: Arc<Shared>,
        service: S,
        leave: impl Future<Output = ()>,
    ) -> hyper::Result<()>
    where
        T: AsyncRead + AsyncWrite + Reset + Unpin + Send + 'static,
        S: Service<Request<Incoming>, Response = Response<B>> + 'static,
        S::Error: Into<BoxError>,
        B: Body<Data = Bytes> + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let service = service_fn(move |request| call(&shared, &service, request));
        let mut conn = pin!(self.http1.serve_connection(TokioIo::new(io), service).with_upgrades());
        tokio::select! {
            biased;
            done = conn.as_mut() => return done,
            () = leave => conn.as_mut().graceful_shutdown(),
        }
        conn.await
    }

    async fn http2<T, S, B>(
        &self,
        io: DownstreamIo<T>,
        shared: Arc<Shared>,
        service: S,
        leave: impl Future<Output = ()>,
    ) -> hyper::Result<()>
    where
        T: AsyncRead + AsyncWrite + Reset + Unpin + Send + 'static,
        S: Service<Request<Incoming>, Response = Response<B>> + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: Body<Data = Bytes> + Unpin + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let service = service_fn(move |request| call(&shared, &service, request));
        let mut conn = pin!(self.http2.serve_connection(TokioIo::new(io), service));
        tokio::select! {
            biased;
            done = conn.as_mut() => return done,
            () = leave => conn.as_mut().graceful_shutdown(),
        }
        conn.await
    }
}

/// What the peer speaks, and a future that is ready when the connection shall end; `None` when it did not say in time.
async fn open<T: AsyncRead + Unpin>(
    io: &mut T,
    head_due: Instant,
    mut leave_rx: oneshot::Receiver<()>,
) -> Option<(Opening, impl Future<Output = ()> + use<T>)> {
    let (opening, leaving) = in_time(opening::read(io), head_due, &mut leave_rx).await?;
    let opening = opening.ok()?;
    let leave = async move {
        if !leaving {
            // Sent or dropped: the same.
            let _ = leave_rx.await;
        }
    };
    Some((opening, leave))
}

/// What comes of a connection's beginning, and whether it was told to leave meanwhile; `None` when it took too long.
async fn in_time<T>(
    beginning: impl Future<Output = T>,
    mut due: Instant,
    leave_rx: &mut oneshot::Receiver<()>,
) -> Option<(T, bool)> {
    let (mut beginning, mut leaving) = (pin!(beginning), false);
    loop {
        tokio::select! {
            biased;
            begun = timeout_at(due, beginning.as_mut()) => return Some((begun.ok()?, leaving)),
            _ = &mut *leave_rx, if !leaving => {
                leaving = true;
                due = due.min(Instant::now() + LAST_CALL);
            }
        }
    }
}

/// The handshake, or the connection as it is when it does not begin with one.
async fn begin_tls(tls: &Tls, io: TcpStream) -> io::Result<Transport> {
    let mut first = [0];
    match io.peek(&mut first).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ if first[0] == tls::HANDSHAKE => tls.accept(io).await,
        _ => Ok(Transport::Plain(io)),
    }
}

/// Calls the service with a handle in the request's extensions, and counts the call until its body has ended.
fn call<S, B>(
    shared: &Arc<Shared>,
    service: &S,
    mut request: Request<Incoming>,
) -> impl Future<Output = Result<Response<Watched<B>>, S::Error>> + use<S, B>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
{
    let call = shared.begin(request.version());
    request.extensions_mut().insert(call.handle());
    service
        .call(request)
        .map(move |answer| answer.map(|response| call.answered(response)))
}

/// Says in plain HTTP/1.1 why not, to whoever speaks another protocol here.
async fn refuse<T>(mut io: DownstreamIo<T>, why: &'static str)
where
    T: AsyncRead + AsyncWrite + Reset + Unpin,
{
    let answer = own_words::whole(&Cause::BadRequest(why));
    // If it cannot be written, the peer has gone, and that was all there was to say.
    if io.write_all(&answer).await.is_ok() {
        let _ = io.shutdown().await;
    }
}

fn http1_builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        // Heads and idle times are timed by DownstreamIo, which can tell the two apart; hyper cannot.
        .header_read_timeout(None)
        // A downstream that ends its side has left, and its exchange is cancelled. To notice, hyper must read on
        // while it waits for the response, which it does not with half_close.
        .half_close(false)
        // No max_headers: hyper's default is our limit, 100, and has no heap cost. Its 431 is replaced by ours.
        .max_buf_size(H1_BUFFER);
    builder
}

fn http2_builder(streams: TaskTracker) -> http2::Builder<Streams> {
    let mut builder = http2::Builder::new(Streams(streams));
    builder
        .timer(TokioTimer::new())
        .adaptive_window(false)
        .initial_stream_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_concurrent_streams(H2_STREAMS)
        .max_send_buf_size(H2_SEND_BUFFER)
        .max_header_list_size(H2_HEADER_LIST)
        .max_pending_accept_reset_streams(H2_PENDING_RESETS)
        .max_local_error_reset_streams(H2_LOCAL_RESETS)
        .keep_alive_interval(H2_PING_INTERVAL)
        .keep_alive_timeout(H2_PING_TIMEOUT);
    builder
}

/// Runs HTTP/2 streams as tasks that the listener waits for.
#[derive(Clone)]
struct Streams(TaskTracker);

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, stream: F) {
        self.0.spawn(stream);
    }
}
