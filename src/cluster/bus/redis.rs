//! The bus over Redis pub/sub: one connection a node, kept by a loop of its own. The only place that says Redis.
//!
//! What a node subscribes to and what it publishes go down one connection in the order in which they were asked for: so a
//! request's way back is open before the request leaves, in one round trip. While a pipeline is on its way, what comes
//! meanwhile gathers for the next. A server that does not answer is left; channels are taken up again on the next
//! connection, and [`Inbox::on_interrupted`] says that something may have been missed. Nothing is kept in Redis.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesOrdered};
use redis::{Pipeline, PushInfo, PushKind, RedisError, Value};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{BusError, Channel, Counts, Inbox, Reached, Receipt};
use crate::secret::Secret;

mod server;
use server::{Connection, Server};

/// What waits to be sent, bytes; more is dropped. Exchanges have far less on their way; it is for a server that stalls.
const MAX_QUEUED: usize = 8 * 1024 * 1024;
/// One pipeline, bytes and commands: it is written at once, and answered before the next but one is sent.
const MAX_BATCH_BYTES: usize = 256 * 1024;
const MAX_BATCH: usize = 512;
/// Pipelines on their way: one being answered, one being sent.
const MAX_FLIGHTS: usize = 2;
/// The client of a Redis Cluster does not keep the order of what is sent at once.
const MAX_FLIGHTS_SHARDED: usize = 1;
/// A command that costs the queue this much beside its payload, bytes.
const COMMAND: usize = 64;
/// An idle connection is asked whether it lives this often. Commands not answered in time mean that it does not.
const PING_EVERY: Duration = Duration::from_secs(1);
/// A server that leaves commands unanswered for so long does not count as there, though it may come back.
const STALLED_AFTER: Duration = Duration::from_millis(1500);
/// A subscriber's limit below this slows transfers, bytes: the default is 8 MiB.
const LIMIT_WISHED: u64 = 8 * 1024 * 1024;
/// Between attempts to connect: from this, doubled up to that, each somewhere in its upper half.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_millis(500);

enum Op {
    Subscribe(Channel),
    Unsubscribe(Channel),
    Publish(Channel, Bytes, oneshot::Sender<Reached>),
    Ping,
}

impl Op {
    fn size(&self) -> usize {
        match self {
            Op::Publish(_, message, _) => COMMAND + message.len(),
            _ => COMMAND,
        }
    }
}

#[derive(Default)]
struct Queue {
    /// What this node listens to, whatever the connection.
    channels: HashSet<Channel>,
    /// Channels to leave, with the next pipeline.
    left: Vec<Channel>,
    ops: VecDeque<Op>,
    bytes: usize,
    connected: bool,
}

impl Queue {
    fn push(&mut self, op: Op) {
        self.bytes += op.size();
        self.ops.push_back(op);
    }

    /// The next pipeline, in order.
    fn take(&mut self) -> Vec<Op> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < MAX_BATCH && bytes < MAX_BATCH_BYTES {
            let Some(op) = self.ops.pop_front() else { break };
            bytes += op.size();
            batch.push(op);
        }
        self.bytes -= bytes;
        if self.ops.is_empty() {
            let left = std::mem::take(&mut self.left).into_iter();
            // Some may have been taken up again.
            batch.extend(
                left.filter(|channel| !self.channels.contains(channel))
                    .map(Op::Unsubscribe),
            );
        }
        batch
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.left.clear();
        self.bytes = 0;
        for op in self.ops.drain(..) {
            if let Op::Publish(_, _, receipt) = op {
                receipt.send(Reached::Unsent).ok();
            }
        }
    }
}

/// One node's link to Redis.
pub(super) struct Link {
    server: Server,
    /// Guards what waits to be sent; held for a push or a take.
    queue: Mutex<Queue>,
    work: Notify,
    room: Notify,
    up: AtomicBool,
    /// Since when an answer is awaited, milliseconds since `epoch`; 0: none is.
    waits_since: AtomicU64,
    epoch: Instant,
    rtt_us: AtomicU64,
    /// What a subscriber may be behind by before the server cuts it, bytes; 0: not known.
    limit: AtomicU64,
    published: AtomicU64,
    received: AtomicU64,
    dropped: AtomicU64,
    interrupted: AtomicU64,
}

impl Link {
    pub fn new(url: &Secret) -> Result<Self, BusError> {
        Ok(Self {
            server: Server::parse(url)?,
            queue: Mutex::default(),
            work: Notify::new(),
            room: Notify::new(),
            up: AtomicBool::new(false),
            waits_since: AtomicU64::new(0),
            epoch: Instant::now(),
            rtt_us: AtomicU64::new(0),
            limit: AtomicU64::new(0),
            published: AtomicU64::new(0),
            received: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            interrupted: AtomicU64::new(0),
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64 + 1
    }

    pub fn is_up(&self) -> bool {
        let since = self.waits_since.load(Ordering::Relaxed);
        let stalled = since != 0 && self.now_ms().saturating_sub(since) >= STALLED_AFTER.as_millis() as u64;
        self.up.load(Ordering::Relaxed) && !stalled
    }

    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    pub fn limit(&self) -> Option<u64> {
        Some(self.limit.load(Ordering::Relaxed)).filter(|limit| *limit > 0)
    }

    pub fn counts(&self) -> Counts {
        Counts {
            published: self.published.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            interrupted: self.interrupted.load(Ordering::Relaxed),
        }
    }

    pub fn publish(&self, channel: Channel, message: Bytes) -> Receipt {
        let (receipt_tx, receipt) = Receipt::pending();
        let mut queue = self.queue();
        if !queue.connected || queue.bytes + message.len() > MAX_QUEUED {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            receipt_tx.send(Reached::Unsent).ok();
            return receipt;
        }
        self.published.fetch_add(1, Ordering::Relaxed);
        queue.push(Op::Publish(channel, message, receipt_tx));
        drop(queue);
        self.work.notify_one();
        receipt
    }

    pub fn subscribe(&self, channel: Channel) {
        let mut queue = self.queue();
        if queue.channels.insert(channel.clone()) && queue.connected {
            queue.push(Op::Subscribe(channel));
            drop(queue);
            self.work.notify_one();
        }
    }

    pub fn unsubscribe(&self, channel: Channel) {
        let mut queue = self.queue();
        if queue.channels.remove(&channel) && queue.connected {
            queue.left.push(channel);
            let many = queue.left.len() >= MAX_BATCH;
            drop(queue);
            if many {
                self.work.notify_one();
            }
        }
    }

    pub async fn room(&self) {
        loop {
            let room = self.room.notified();
            if self.has_room() {
                return;
            }
            room.await;
        }
    }

    fn has_room(&self) -> bool {
        let queue = self.queue();
        !queue.connected || queue.bytes < MAX_BATCH_BYTES
    }

    /// Connects, serves, connects again, for ever.
    pub async fn run(&self, inbox: Arc<dyn Inbox>) {
        let received = Arc::new(AtomicU64::new(0));
        let mut failures = 0;
        loop {
            let gone = Arc::new(Notify::new());
            match self.connect(&inbox, &gone, &received).await {
                Ok(connection) => {
                    tracing::info!(redis = %self.server, "connected to Redis");
                    failures = 0;
                    let error = self.serve(connection, &gone, &received).await;
                    tracing::warn!(redis = %self.server, %error, "lost Redis: requests whose tunnel is on another node wait or fail");
                }
                Err(error) if failures == 0 => {
                    tracing::warn!(redis = %self.server, %error, "cannot reach Redis: trying for ever");
                    failures = 1;
                }
                Err(_) => failures += 1,
            }
            self.lose();
            tokio::time::sleep(pause(failures)).await;
        }
    }

    /// A connection on which all channels are subscribed.
    async fn connect(
        &self,
        inbox: &Arc<dyn Inbox>,
        gone: &Arc<Notify>,
        received: &Arc<AtomicU64>,
    ) -> Result<Connection, RedisError> {
        let (taker, count, cut) = (inbox.clone(), received.clone(), gone.clone());
        let on_push = move |push: PushInfo| {
            match push.kind {
                PushKind::Message | PushKind::SMessage => {
                    count.fetch_add(1, Ordering::Relaxed);
                    if let Some(Value::BulkString(message)) = push.data.into_iter().nth(1) {
                        taker.on_message(Bytes::from(message));
                    }
                }
                PushKind::Disconnection => cut.notify_one(),
                _ => {}
            }
            Ok::<(), redis::aio::SendError>(())
        };
        let mut connection = self.server.connect(on_push).await?;
        self.ask_limit(&mut connection).await;
        let channels: Vec<Channel> = {
            let mut queue = self.queue();
            queue.connected = true;
            queue.channels.iter().cloned().collect()
        };
        for channels in channels.chunks(MAX_BATCH) {
            let ops: Vec<Op> = channels.iter().cloned().map(Op::Subscribe).collect();
            self.send(&mut connection, &ops).await?.iter().try_for_each(refusal)?;
        }
        self.up.store(true, Ordering::Relaxed);
        self.interrupted.fetch_add(1, Ordering::Relaxed);
        inbox.on_interrupted();
        Ok(connection)
    }

    /// Servers that keep their configuration to themselves have the usual limit, as far as we know.
    async fn ask_limit(&self, connection: &mut Connection) {
        let mut pipeline = Pipeline::with_capacity(1);
        pipeline.cmd("CONFIG").arg("GET").arg("client-output-buffer-limit");
        let answer = connection.send(&pipeline, 1).await.unwrap_or_default();
        let Some(limit) = answer.first().and_then(subscriber_limit) else {
            return;
        };
        let known = self.limit.swap(limit, Ordering::Relaxed);
        if known != limit && limit < LIMIT_WISHED {
            tracing::warn!(
                redis = %self.server, limit,
                "Redis cuts a subscriber that is this many bytes behind: transfers between nodes are kept below, and slower; \
                 set `client-output-buffer-limit pubsub 64mb 32mb 60` for more"
            );
        }
    }

    fn lose(&self) {
        self.up.store(false, Ordering::Relaxed);
        self.waits_since.store(0, Ordering::Relaxed);
        self.queue().disconnect();
        self.room.notify_waiters();
    }

    /// Sends what is asked for until the connection breaks.
    async fn serve(&self, connection: Connection, gone: &Notify, received: &AtomicU64) -> RedisError {
        let mut flights: FuturesOrdered<BoxFuture<'_, Result<(), RedisError>>> = FuturesOrdered::new();
        let most_flights = if connection.is_sharded() {
            MAX_FLIGHTS_SHARDED
        } else {
            MAX_FLIGHTS
        };
        let mut pings = tokio::time::interval(PING_EVERY);
        pings.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = gone.notified() => return closed(),
                Some(answered) = flights.next(), if !flights.is_empty() => {
                    if let Err(error) = answered {
                        return error;
                    }
                    // It answers: whatever else is on its way is waited for from now.
                    let since = if flights.is_empty() { 0 } else { self.now_ms() };
                    self.waits_since.store(since, Ordering::Relaxed);
                }
                () = self.work.notified(), if flights.len() < most_flights => {
                    let batch = self.queue().take();
                    self.room.notify_waiters();
                    if batch.is_empty() {
                        continue;
                    }
                    let mut flight = self.fly(connection.clone(), batch).boxed();
                    self.waits_since.compare_exchange(0, self.now_ms(), Ordering::Relaxed, Ordering::Relaxed).ok();
                    // The first poll hands the pipeline over: what is sent next comes behind it.
                    match futures_util::poll!(&mut flight) {
                        std::task::Poll::Ready(Err(error)) => return error,
                        std::task::Poll::Ready(Ok(())) => {}
                        std::task::Poll::Pending => flights.push_back(flight),
                    }
                    if !self.queue().ops.is_empty() {
                        self.work.notify_one();
                    }
                }
                _ = pings.tick() => {
                    self.received.store(received.load(Ordering::Relaxed), Ordering::Relaxed);
                    self.queue().push(Op::Ping);
                    self.work.notify_one();
                }
            }
        }
    }

    /// One pipeline, from its sending to its receipts.
    async fn fly(&self, mut connection: Connection, batch: Vec<Op>) -> Result<(), RedisError> {
        let sent = Instant::now();
        let answers = self.send(&mut connection, &batch).await?;
        self.rtt_us.store(sent.elapsed().as_micros() as u64, Ordering::Relaxed);
        let mut refused = None;
        for (op, answer) in batch.into_iter().zip(answers) {
            let failed = refusal(&answer).err();
            match op {
                Op::Publish(_, _, receipt) => drop(receipt.send(reached(&answer))),
                // A channel that is not heard would be a hole that nobody notices.
                Op::Subscribe(_) => refused = refused.or(failed),
                Op::Unsubscribe(_) | Op::Ping => {}
            }
        }
        refused.map_or(Ok(()), Err)
    }

    async fn send(&self, connection: &mut Connection, ops: &[Op]) -> Result<Vec<Value>, RedisError> {
        let sharded = connection.is_sharded();
        let mut pipeline = Pipeline::with_capacity(ops.len());
        for op in ops {
            match op {
                Op::Subscribe(channel) => pipeline
                    .cmd(if sharded { "SSUBSCRIBE" } else { "SUBSCRIBE" })
                    .arg(channel.to_string()),
                Op::Unsubscribe(channel) => pipeline
                    .cmd(if sharded { "SUNSUBSCRIBE" } else { "UNSUBSCRIBE" })
                    .arg(channel.to_string()),
                Op::Publish(channel, message, _) => pipeline
                    .cmd(if sharded { "SPUBLISH" } else { "PUBLISH" })
                    .arg(channel.to_string())
                    .arg(&message[..]),
                Op::Ping => pipeline.cmd("PING"),
            };
        }
        connection.send(&pipeline, ops.len()).await
    }
}

/// The lower of a subscriber's limits, of `… pubsub 33554432 8388608 60`; 0 is none.
fn subscriber_limit(answer: &Value) -> Option<u64> {
    let text = match answer {
        Value::Map(pairs) => &pairs.first()?.1,
        Value::Array(items) => items.get(1)?,
        _ => return None,
    };
    let Value::BulkString(text) = text else { return None };
    let text = String::from_utf8_lossy(text);
    let mut words = text
        .split_ascii_whitespace()
        .skip_while(|word| *word != "pubsub")
        .skip(1);
    let limits = words.by_ref().take(2).filter_map(|word| word.parse::<u64>().ok());
    limits.filter(|limit| *limit > 0).min()
}

fn reached(answer: &Value) -> Reached {
    match answer {
        Value::Int(0) => Reached::Nobody,
        Value::Int(receivers) => Reached::Somebody(receivers.unsigned_abs()),
        Value::ServerError(_) => Reached::Unsent,
        _ => Reached::Unknown,
    }
}

fn refusal(answer: &Value) -> Result<(), RedisError> {
    match answer {
        Value::ServerError(error) => Err(error.clone().into()),
        _ => Ok(()),
    }
}

fn closed() -> RedisError {
    std::io::Error::new(std::io::ErrorKind::ConnectionAborted, "the connection broke").into()
}

fn pause(failures: u32) -> Duration {
    let full = RETRY_MIN.saturating_mul(1 << failures.min(16)).min(RETRY_MAX);
    full.mul_f64(rand::random_range(0.5..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Channel {
        Channel::Request(crate::ids::RequestId::new())
    }

    fn connected() -> Queue {
        Queue {
            connected: true,
            ..Queue::default()
        }
    }

    fn publish(length: usize) -> Op {
        let (receipt, _) = Receipt::pending();
        Op::Publish(request(), Bytes::from(vec![0; length]), receipt)
    }

    #[test]
    fn a_pipeline_keeps_the_order_and_is_bounded() {
        let mut queue = connected();
        (0..10).for_each(|_| queue.push(publish(100 * 1024)));
        let sizes: Vec<usize> = std::iter::from_fn(|| Some(queue.take().len()).filter(|length| *length > 0)).collect();
        assert_eq!(sizes, [3, 3, 3, 1]);
        assert_eq!(queue.bytes, 0);
    }

    #[test]
    fn channels_are_left_behind_what_waits_and_not_if_taken_up_again() {
        let (kept, left) = (request(), request());
        let mut queue = connected();
        queue.channels.insert(kept.clone());
        queue.left.extend([kept, left.clone()]);
        queue.push(Op::Ping);
        let batch = queue.take();
        assert!(matches!(&batch[..], [Op::Ping, Op::Unsubscribe(channel)] if *channel == left));
    }

    #[tokio::test]
    async fn without_a_server_nothing_is_kept_and_it_is_known_that_nothing_was_sent() {
        let link = Link::new(&"redis://127.0.0.1:1".parse().expect("a url")).expect("a link");
        let receipt = link.publish(request(), Bytes::from_static(b"hello"));
        assert_eq!(receipt.reached().await, Reached::Unsent);
        assert!(!link.is_up() && link.counts().dropped == 1);
        link.room().await;
    }

    #[test]
    fn the_servers_limit_for_subscribers_is_read() {
        let says = |text: &str| {
            let text = Value::BulkString(text.as_bytes().to_vec());
            subscriber_limit(&Value::Map(vec![(
                Value::SimpleString("client-output-buffer-limit".into()),
                text,
            )]))
        };
        let default = "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60";
        assert_eq!(says(default), Some(8_388_608));
        assert_eq!(says("pubsub 0 0 0"), None);
        assert_eq!(says("pubsub 1mb"), None);
        assert_eq!(subscriber_limit(&Value::Okay), None);
    }

    #[test]
    fn pauses_grow_to_half_a_second_and_no_further() {
        assert!(pause(0) <= RETRY_MIN);
        assert!((0..100).all(|failures| pause(failures) <= RETRY_MAX));
    }
}
