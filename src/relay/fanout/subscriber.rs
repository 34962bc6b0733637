//! One subscriber's queue, between the node's deliveries and whoever writes them to a socket.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

use super::position::Position;
use crate::{telemetry::Unsubscribed, wire::messages::Message};

/// Bodies that wait for a subscriber, bytes; one that is behind by more is cut off.
const MAX_QUEUED: usize = 1024 * 1024;
/// What a delivery costs beside its body, about: empty messages are bounded too.
const DELIVERY: usize = 128;

/// Why a subscription has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The subscriber did not take what came: more than 1 MiB waited for it.
    TooSlow,
    /// Something was missed and cannot be had any more.
    Gap,
    /// The client is deleted, or a token of its was revoked: whoever is still let in subscribes again.
    ClientGone,
    /// This node is leaving: another goes on where this one stopped.
    Leaving,
}

impl Left {
    /// For whoever subscribed.
    pub fn why(self) -> &'static str {
        match self {
            Left::TooSlow => "you read too slowly: more than 1 MiB waited",
            Left::Gap => "messages were missed that cannot be had any more",
            Left::ClientGone => "the client is deleted, or a token of it was revoked",
            Left::Leaving => "this node is leaving: subscribe again",
        }
    }

    /// What a WebSocket is closed with: 4001 to 4003 are ours, 1012 is "service restart" in IANA's list.
    pub fn close_code(self) -> u16 {
        match self {
            Left::TooSlow => 4001,
            Left::Gap => 4002,
            Left::ClientGone => 4003,
            Left::Leaving => 1012,
        }
    }

    pub(super) fn counted(self) -> Unsubscribed {
        match self {
            Left::TooSlow => Unsubscribed::TooSlow,
            Left::Gap => Unsubscribed::Gap,
            Left::ClientGone => Unsubscribed::ClientGone,
            Left::Leaving => Unsubscribed::Leaving,
        }
    }
}

/// One message for a subscriber. Cheap to clone: all subscribers share it.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Where the subscriber is, once it has this.
    pub position: Position,
    /// What was published.
    pub body: Bytes,
    encoded: Arc<Encoded>,
}

/// Made once for all who share a delivery, when the first needs it.
#[derive(Debug, Default)]
struct Encoded {
    event: OnceLock<Bytes>,
    message: OnceLock<Message>,
}

impl Delivery {
    pub(in crate::relay) fn new(position: Position, body: Bytes) -> Self {
        Self {
            position,
            body,
            encoded: Arc::default(),
        }
    }

    /// As a server-sent event, which is made only once.
    pub fn event(&self, encode: impl FnOnce(&Self) -> Bytes) -> Bytes {
        self.encoded.event.get_or_init(|| encode(self)).clone()
    }

    /// As a message of a WebSocket: text where it is UTF-8.
    pub fn message(&self) -> Message {
        let message = self.encoded.message.get_or_init(|| Message::of(self.body.clone()));
        message.clone()
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Subscriber {
    pub conn_id: u64,
    /// Guards the queue; held for a push or a pop.
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
    left: Option<Left>,
    waker: Option<Waker>,
}

impl Subscriber {
    pub fn new(conn_id: u64) -> Arc<Self> {
        Arc::new(Self {
            conn_id,
            queue: Mutex::default(),
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when it is cut off, now: it has not taken what came before.
    pub fn push(&self, delivery: &Delivery) -> bool {
        let mut queue = self.queue();
        let bytes = queue.bytes + delivery.body.len() + DELIVERY;
        if bytes > MAX_QUEUED && !queue.deliveries.is_empty() {
            drop(queue);
            self.cut(Left::TooSlow);
            return false;
        }
        queue.bytes = bytes;
        queue.deliveries.push_back(delivery.clone());
        wake(queue);
        true
    }

    /// Ends it behind what waits.
    pub fn end(&self, left: Left) {
        let mut queue = self.queue();
        queue.left.get_or_insert(left);
        wake(queue);
    }

    /// Ends it at once.
    pub fn cut(&self, left: Left) {
        let mut queue = self.queue();
        queue.left.get_or_insert(left);
        (queue.deliveries, queue.bytes) = (VecDeque::new(), 0);
        wake(queue);
    }

    /// The next delivery, or why there is none any more.
    pub fn poll_next(&self, cx: &Context<'_>) -> Poll<Result<Delivery, Left>> {
        let mut queue = self.queue();
        if let Some(delivery) = queue.deliveries.pop_front() {
            queue.bytes -= delivery.body.len() + DELIVERY;
            return Poll::Ready(Ok(delivery));
        }
        match queue.left {
            Some(left) => Poll::Ready(Err(left)),
            None => {
                queue.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Ready when it is cut off.
    pub fn poll_cut(&self, cx: &Context<'_>) -> Poll<Left> {
        let mut queue = self.queue();
        match queue.left.filter(|_| queue.deliveries.is_empty()) {
            Some(left) => Poll::Ready(left),
            None => {
                queue.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Outside the lock: whoever is woken may look at once.
fn wake(mut queue: MutexGuard<'_, Queue>) {
    let waker = queue.waker.take();
    drop(queue);
    waker.into_iter().for_each(Waker::wake);
}
