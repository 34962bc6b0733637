//! A service's hold on the connection under its request: the peer's address, interim responses, and cutting it.
//!
//! `Shared` is what the connection's task, its [`DownstreamIo`](super::io::DownstreamIo) and the handles have
//! in common. Its flags are written by the connection's task only, except where a field says otherwise.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use http::{HeaderMap, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};

use super::own_words;

/// The most interim responses that wait to be written, in bytes; what does not fit is dropped: they are advice.
const MAX_INTERIM: usize = 16 * 1024;

/// What a service may do to the connection that its request came on. In the request's extensions; cheap to clone.
#[derive(Debug, Clone)]
pub struct ConnHandle {
    shared: Arc<Shared>,
    call: u64,
    version: Version,
}

impl ConnHandle {
    /// Who is at the other end of the socket (perhaps a proxy).
    pub fn peer(&self) -> SocketAddr {
        self.shared.peer
    }

    /// Whether the socket is inside of TLS.
    pub fn is_tls(&self) -> bool {
        self.shared.tls
    }

    /// Whether the request came over HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.version == Version::HTTP_2
    }

    /// Sends an interim response (102 to 199, such as 103 Early Hints) at once, ahead of the response. `false` when it
    /// was dropped: the response has begun, 16 KiB are waiting, or the request is not HTTP/1.1 (1.0 knows none, and
    /// hyper's server cannot send them in HTTP/2). A 100 is hyper's to send, once the body is read.
    pub fn informational(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        let sendable = status.is_informational() && status.as_u16() > StatusCode::SWITCHING_PROTOCOLS.as_u16();
        if !sendable || self.version != Version::HTTP_11 {
            return false;
        }
        let accepted = self
            .shared
            .queue_interim(self.call, &own_words::interim(status, headers));
        if accepted {
            self.shared.task.wake();
        }
        accepted
    }

    /// The connection's next close is a reset instead of an end, so that a body which only the close delimits
    /// (HTTP/1.0) is not taken for complete. Nothing in HTTP/2, where the stream alone is reset.
    pub fn abort(&self) {
        if self.version != Version::HTTP_2 {
            self.shared.aborted.store(true, Ordering::Relaxed);
        }
    }
}

/// One connection's state, between its task, its socket and its handles.
#[derive(Debug)]
pub(super) struct Shared {
    peer: SocketAddr,
    tls: bool,
    /// Wakes the connection's task.
    task: AtomicWaker,
    /// Calls since the start. Any task in HTTP/2.
    calls: AtomicU64,
    /// Calls whose response is not at its end. Any task in HTTP/2.
    in_flight: AtomicUsize,
    /// hyper's write buffer was empty when it last asked for a flush, and has not been written from since.
    flushed: AtomicBool,
    /// As `flushed`, and no call was in flight then, nor has one begun since: what hyper writes now is its own.
    between_calls: AtomicBool,
    /// The response was 101: the socket is a tunnel.
    upgraded: AtomicBool,
    /// Set through a handle, from any task.
    aborted: AtomicBool,
    /// `interim` is not empty. Written under its lock.
    interim_waits: AtomicBool,
    interim: Mutex<Interim>,
}

/// Interim responses on their way out.
#[derive(Debug, Default)]
struct Interim {
    /// The call that may still send them; 0 for none.
    call: u64,
    bytes: BytesMut,
}

impl Shared {
    pub fn new(peer: SocketAddr, tls: bool) -> Self {
        Self {
            peer,
            tls,
            task: AtomicWaker::new(),
            calls: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            flushed: AtomicBool::new(true),
            between_calls: AtomicBool::new(true),
            upgraded: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            interim_waits: AtomicBool::new(false),
            interim: Mutex::default(),
        }
    }

    /// A service is called: the guard is kept until its response is at its end.
    pub fn begin(self: &Arc<Self>, version: Version) -> Call {
        let number = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.between_calls.store(false, Ordering::Relaxed);
        if version == Version::HTTP_11 {
            self.lock_interim().call = number;
        }
        Call {
            shared: self.clone(),
            number,
            version,
        }
    }

    /// The task to wake when a handle has something to say. Once: a task's waker does not change.
    pub fn drive_by(&self, cx: &Context<'_>) {
        self.task.register(cx.waker());
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub fn is_upgraded(&self) -> bool {
        self.upgraded.load(Ordering::Relaxed)
    }

    pub fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Relaxed)
    }

    /// A service is at work, or the socket is a tunnel: silence is not ours to judge.
    pub fn is_busy(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) > 0 || self.is_upgraded()
    }

    /// hyper hands bytes down: whether it made them up itself, between calls.
    pub fn hypers_own_write(&self) -> bool {
        self.flushed.store(false, Ordering::Relaxed);
        self.between_calls.load(Ordering::Relaxed)
    }

    /// hyper has handed down all it had.
    pub fn all_handed_down(&self) {
        self.flushed.store(true, Ordering::Relaxed);
        if !self.is_busy() {
            self.between_calls.store(true, Ordering::Relaxed);
        }
    }

    /// The interim responses that may be written now: between two of hyper's messages, never inside one.
    pub fn take_interim(&self) -> Option<Bytes> {
        let may = self.interim_waits.load(Ordering::Acquire) && self.flushed.load(Ordering::Relaxed);
        may.then(|| {
            let mut interim = self.lock_interim();
            self.interim_waits.store(false, Ordering::Relaxed);
            interim.bytes.split().freeze()
        })
    }

    fn queue_interim(&self, call: u64, bytes: &[u8]) -> bool {
        let mut interim = self.lock_interim();
        let fits = interim.call == call && interim.bytes.len() + bytes.len() <= MAX_INTERIM;
        if fits {
            interim.bytes.extend_from_slice(bytes);
            self.interim_waits.store(true, Ordering::Release);
        }
        fits
    }

    /// The response begins: no more interim ones. What waits still goes first, unless hyper is in the middle of
    /// writing the response before and would append this one's head to it.
    fn end_interim(&self) {
        let mut interim = self.lock_interim();
        interim.call = 0;
        if !self.flushed.load(Ordering::Relaxed) {
            interim.bytes.clear();
            self.interim_waits.store(false, Ordering::Relaxed);
        }
    }

    fn lock_interim(&self) -> std::sync::MutexGuard<'_, Interim> {
        self.interim.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call in flight: ends on drop.
pub(super) struct Call {
    shared: Arc<Shared>,
    number: u64,
    version: Version,
}

impl Call {
    pub fn handle(&self) -> ConnHandle {
        ConnHandle {
            shared: self.shared.clone(),
            call: self.number,
            version: self.version,
        }
    }

    /// The service has answered; the call lasts as long as the response's body.
    pub fn answered<B>(self, response: Response<B>) -> Response<Watched<B>> {
        if self.version == Version::HTTP_11 {
            self.shared.end_interim();
        }
        if response.status() == StatusCode::SWITCHING_PROTOCOLS && self.version != Version::HTTP_2 {
            self.shared.upgraded.store(true, Ordering::Relaxed);
        }
        response.map(|body| Watched { body, _call: self })
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A response's body, and the call that lasts as long as it.
pub(super) struct Watched<B> {
    body: B,
    _call: Call,
}

impl<B: Body + Unpin> Body for Watched<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> Arc<Shared> {
        Arc::new(Shared::new(([127, 0, 0, 1], 1).into(), false))
    }

    fn hint(handle: &ConnHandle) -> bool {
        handle.informational(StatusCode::EARLY_HINTS, &HeaderMap::new())
    }

    #[test]
    fn interim_responses_belong_to_their_call_and_end_with_the_response() {
        let shared = shared();
        let call = shared.begin(Version::HTTP_11);
        let old = call.handle();
        assert!(hint(&old));
        drop(call.answered(Response::new(())));
        assert!(!hint(&old), "the response has begun");
        assert!(shared.take_interim().is_some(), "what was queued before it goes first");
        let _next = shared.begin(Version::HTTP_11);
        assert!(!hint(&old), "another request's turn");
        assert_eq!(shared.take_interim(), None);
    }

    #[test]
    fn interim_responses_never_cut_into_a_message() {
        let shared = shared();
        shared.hypers_own_write();
        let call = shared.begin(Version::HTTP_11);
        assert!(hint(&call.handle()));
        assert_eq!(shared.take_interim(), None, "the response before is not written out");
        drop(call.answered(Response::new(())));
        shared.all_handed_down();
        assert_eq!(shared.take_interim(), None, "its own response went before it");
    }

    #[test]
    fn interim_responses_are_bounded_and_for_http_1_1_only() {
        let shared = shared();
        let call = shared.begin(Version::HTTP_11);
        let sent = (0..10_000).filter(|_| hint(&call.handle())).count();
        assert!(sent > 100 && sent < 1000, "{sent} of 27 bytes");
        assert!(!call.handle().informational(StatusCode::CONTINUE, &HeaderMap::new()));
        assert!(
            !call
                .handle()
                .informational(StatusCode::SWITCHING_PROTOCOLS, &HeaderMap::new())
        );
        assert!(!call.handle().informational(StatusCode::OK, &HeaderMap::new()));
        for version in [Version::HTTP_10, Version::HTTP_2] {
            assert!(!hint(&shared.begin(version).handle()), "{version:?}");
        }
    }

    #[test]
    fn hypers_own_writes_are_those_between_calls() {
        let shared = shared();
        assert!(shared.hypers_own_write(), "before the first call");
        shared.all_handed_down();
        let call = shared.begin(Version::HTTP_11);
        assert!(!shared.hypers_own_write(), "an interim 100");
        shared.all_handed_down();
        drop(call.answered(Response::new(())));
        assert!(!shared.hypers_own_write(), "the response, though its body is gone");
        shared.all_handed_down();
        assert!(shared.hypers_own_write());
    }
}
