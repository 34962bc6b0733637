//! The bus between nodes: the same stories on the one inside a process and on the one over Redis; and those of Redis alone,
//! in each form that a URL may name.

#[path = "harness/servers.rs"]
mod servers;

use std::{sync::Arc, time::Duration};

use adit::{
    cluster::bus::{Bus, Channel, Inbox, Reached, local::Hub},
    ids::{ClientId, NodeId, RequestId},
};
use bytes::Bytes;
use servers::Redis;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

/// Longer than anything takes on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("hangs: {what}"),
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let mut looks = tokio::time::interval(Duration::from_millis(5));
    within(what, async {
        while !holds().await {
            looks.tick().await;
        }
    })
    .await;
}

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Message(Bytes),
    Interrupted,
}

struct Ear(mpsc::UnboundedSender<Heard>);

impl Inbox for Ear {
    fn on_message(&self, message: Bytes) {
        self.0.send(Heard::Message(message)).ok();
    }

    fn on_interrupted(&self) {
        self.0.send(Heard::Interrupted).ok();
    }
}

/// One node on the bus.
struct Node {
    bus: Arc<Bus>,
    heard: mpsc::UnboundedReceiver<Heard>,
    _task: AbortOnDropHandle<()>,
}

impl Node {
    async fn on(bus: Bus) -> Self {
        let (heard_tx, heard) = mpsc::unbounded_channel();
        let bus = Arc::new(bus);
        let running = bus.clone();
        let task = tokio::spawn(async move { running.run(Arc::new(Ear(heard_tx))).await });
        eventually("the bus is up", async || bus.is_up()).await;
        Self {
            bus,
            heard,
            _task: AbortOnDropHandle::new(task),
        }
    }

    async fn over(url: &str) -> Self {
        Self::on(Bus::redis(&url.parse().expect("a url")).expect("a bus")).await
    }

    async fn publish(&self, channel: &Channel, text: impl Into<Bytes>) -> Reached {
        within("a receipt", self.bus.publish(channel.clone(), text.into()).reached()).await
    }

    /// The next message, past interruptions.
    async fn hears(&mut self) -> Bytes {
        loop {
            if let Heard::Message(message) = within("a message", self.heard.recv()).await.expect("it runs") {
                return message;
            }
        }
    }

    /// Waits until it was interrupted so many times in all.
    async fn interrupted(&self, times: u64) {
        eventually("an interruption", async || self.bus.counts().interrupted >= times).await;
    }

    /// Takes part in a channel, and knows that it does.
    async fn joins(&mut self, channel: &Channel) {
        self.bus.subscribe(channel.clone());
        let mark = RequestId::new().to_string();
        assert!(matches!(
            self.publish(channel, mark.clone()).await,
            Reached::Somebody(_)
        ));
        while self.hears().await != mark {}
    }
}

fn request() -> Channel {
    Channel::Request(RequestId::new())
}

/// Two nodes on either bus.
enum Pair {
    Local(Arc<Hub>),
    Redis(Redis),
}

impl Pair {
    async fn node(&self) -> Node {
        match self {
            Pair::Local(hub) => Node::on(Bus::local(hub)).await,
            Pair::Redis(redis) => Node::over(&redis.url()).await,
        }
    }

    /// Everybody's connection is cut.
    fn cut(&self) {
        match self {
            Pair::Local(hub) => hub.interrupt(),
            Pair::Redis(redis) => drop(redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"])),
        }
    }
}

/// Tells a story on both.
async fn on_both(story: impl AsyncFn(Pair)) {
    story(Pair::Local(Hub::shared())).await;
    story(Pair::Redis(Redis::start())).await;
}

#[tokio::test]
async fn what_nobody_hears_is_known_to_have_reached_nobody() {
    on_both(async |pair| {
        let (one, mut other) = (pair.node().await, pair.node().await);
        let channel = request();
        assert_eq!(one.publish(&channel, "to nobody").await, Reached::Nobody);
        other.bus.subscribe(channel.clone());
        eventually("it is subscribed", async || {
            one.publish(&channel, "hello").await == Reached::Somebody(1)
        })
        .await;
        assert_eq!(other.hears().await, "hello");
        assert_eq!(one.publish(&request(), "elsewhere").await, Reached::Nobody);
    })
    .await;
}

#[tokio::test]
async fn what_one_node_says_comes_in_order_and_once_over_all_its_channels() {
    on_both(async |pair| {
        let (one, mut other) = (pair.node().await, pair.node().await);
        let client: ClientId = "home".parse().expect("a client id");
        let channels = [request(), Channel::Node(NodeId::new()), Channel::Client(client)];
        for channel in &channels {
            other.joins(channel).await;
        }
        let mut last = None;
        for number in 0..3000_usize {
            within("room", one.bus.room()).await;
            let text = format!("{number} {}", "x".repeat(number));
            last = Some(one.bus.publish(channels[number % 3].clone(), text.into()));
            if number % 500 == 0 {
                tokio::task::yield_now().await;
            }
        }
        let last = within("the last receipt", last.expect("many").reached()).await;
        assert_eq!(last, Reached::Somebody(1));
        for number in 0..3000 {
            let text = other.hears().await;
            assert!(text.starts_with(format!("{number} ").as_bytes()), "{number}");
        }
        assert!(other.heard.is_empty());
        assert_eq!(other.bus.counts().dropped + one.bus.counts().dropped, 0);
    })
    .await;
}

#[tokio::test]
async fn everybody_who_takes_part_hears_it_also_who_said_it() {
    on_both(async |pair| {
        let (mut one, mut other) = (pair.node().await, pair.node().await);
        let channel = request();
        one.joins(&channel).await;
        other.joins(&channel).await;
        let says = "to all of us";
        assert_eq!(one.publish(&channel, says).await, Reached::Somebody(2));
        while one.hears().await != says {}
        while other.hears().await != says {}
    })
    .await;
}

#[tokio::test]
async fn who_subscribes_and_then_asks_hears_the_answer() {
    on_both(async |pair| {
        let (mut one, mut other) = (pair.node().await, pair.node().await);
        let inbox = request();
        other.joins(&inbox).await;
        for _ in 0..200 {
            let back = RequestId::new();
            one.bus.subscribe(Channel::Request(back));
            drop(one.bus.publish(inbox.clone(), back.to_string().into()));
            let asked = String::from_utf8_lossy(&other.hears().await).into_owned();
            let answer = Channel::Request(asked.parse().expect("an id"));
            assert_eq!(other.publish(&answer, asked.clone()).await, Reached::Somebody(1));
            assert_eq!(one.hears().await, asked);
            one.bus.unsubscribe(answer);
        }
    })
    .await;
}

#[tokio::test]
async fn who_has_left_hears_no_more_and_may_come_back() {
    on_both(async |pair| {
        let (one, mut other) = (pair.node().await, pair.node().await);
        let (left, kept) = (request(), request());
        other.joins(&left).await;
        other.joins(&kept).await;
        other.bus.unsubscribe(left.clone());
        eventually("it has left", async || {
            one.publish(&left, "late").await == Reached::Nobody
        })
        .await;
        assert_eq!(one.publish(&kept, "still").await, Reached::Somebody(1));
        while other.hears().await != "still" {}
        other.bus.subscribe(left.clone());
        eventually("it is back", async || {
            one.publish(&left, "again").await == Reached::Somebody(1)
        })
        .await;
        assert_eq!(other.hears().await, "again");
    })
    .await;
}

#[tokio::test]
async fn a_node_that_ends_is_heard_of_no_more() {
    on_both(async |pair| {
        let (one, mut other) = (pair.node().await, pair.node().await);
        let channel = request();
        other.joins(&channel).await;
        drop(other);
        eventually("nobody is there", async || {
            one.publish(&channel, "anybody?").await == Reached::Nobody
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn who_was_cut_off_is_told_so_and_hears_again_without_asking() {
    on_both(async |pair| {
        let (one, mut other) = (pair.node().await, pair.node().await);
        let channels: Vec<Channel> = (0..1500).map(|_| request()).collect();
        for channel in &channels {
            other.bus.subscribe(channel.clone());
        }
        other.joins(&channels[0]).await;
        for _ in 0..5 {
            let before = other.bus.counts().interrupted;
            pair.cut();
            other.interrupted(before + 1).await;
            eventually("the publisher is up", async || one.bus.is_up()).await;
            for channel in [&channels[0], &channels[700], &channels[1499]] {
                eventually("it is heard", async || {
                    one.publish(channel, "again").await == Reached::Somebody(1)
                })
                .await;
                while other.hears().await != "again" {}
            }
        }
    })
    .await;
}

#[tokio::test]
async fn in_one_process_who_does_not_listen_misses_the_excess_and_is_told_so() {
    let hub = Hub::shared();
    let (one, slow) = (Node::on(Bus::local(&hub)).await, Bus::local(&hub));
    let channel = request();
    slow.subscribe(channel.clone());
    for number in 0..10_000 {
        let reached = one.publish(&channel, number.to_string()).await;
        assert_eq!(reached, Reached::Somebody(1));
    }
    let mut slow = Node::on(slow).await;
    let mut next = 0;
    while next < 4096 {
        assert_eq!(slow.hears().await, next.to_string());
        next += 1;
    }
    one.publish(&channel, "and now?").await;
    assert_eq!(
        within("news", slow.heard.recv()).await,
        Some(Heard::Interrupted),
        "before what comes behind the gap"
    );
    assert_eq!(slow.hears().await, "and now?");
}

#[tokio::test]
async fn a_redis_that_stalls_is_not_given_more_than_a_bounded_backlog() {
    let redis = Redis::start();
    let (one, mut other) = (Node::over(&redis.url()).await, Node::over(&redis.url()).await);
    let channel = request();
    other.joins(&channel).await;
    redis.stop_process();
    let mut accepted = Vec::new();
    // Sixty-four megabytes, if anybody took them.
    for number in 0..4096_u32 {
        let mut message = vec![0; 16 * 1024];
        message[..4].copy_from_slice(&number.to_be_bytes());
        let before = one.bus.counts().dropped;
        let receipt = one.bus.publish(channel.clone(), message.into());
        if one.bus.counts().dropped > before {
            assert_eq!(
                receipt.reached().await,
                Reached::Unsent,
                "what is dropped is known to be"
            );
            continue;
        }
        accepted.push(number);
        tokio::task::yield_now().await;
    }
    assert!(accepted.len() < 1024, "{} messages wait", accepted.len());
    let room = one.bus.room();
    assert!(futures_util::FutureExt::now_or_never(room).is_none(), "there is none");
    redis.continue_process();
    within("room", one.bus.room()).await;
    for number in accepted {
        assert_eq!(other.hears().await[..4], number.to_be_bytes());
    }
}

#[tokio::test]
async fn without_redis_nothing_is_sent_and_that_is_known() {
    let mut redis = Redis::start();
    let (one, mut other) = (Node::over(&redis.url()).await, Node::over(&redis.url()).await);
    let channel = request();
    other.joins(&channel).await;
    redis.kill();
    eventually("both have noticed", async || !one.bus.is_up() && !other.bus.is_up()).await;
    assert_eq!(one.publish(&channel, "lost").await, Reached::Unsent);
    within("no room is needed", one.bus.room()).await;
    let meanwhile = request();
    other.bus.subscribe(meanwhile.clone());
    redis.restart();
    for channel in [&channel, &meanwhile] {
        eventually("it is heard", async || {
            one.publish(channel, "again").await == Reached::Somebody(1)
        })
        .await;
        assert_eq!(other.hears().await, "again");
    }
    assert!(other.bus.counts().interrupted >= 2);
}

#[tokio::test]
async fn sentinels_say_where_redis_is() {
    let mut redis = Redis::start();
    let sentinel = redis.sentinel("main");
    let url = format!("redis+sentinel://127.0.0.1:{}/main", sentinel.port());
    let (one, mut other) = (Node::over(&url).await, Node::over(&url).await);
    let channel = request();
    other.joins(&channel).await;
    assert_eq!(one.publish(&channel, "hello").await, Reached::Somebody(1));
    assert_eq!(other.hears().await, "hello");
    assert!(redis.command(&["PUBSUB", "CHANNELS"]).contains(&channel.to_string()));
    let before = other.bus.counts().interrupted;
    redis.kill();
    eventually("it is missed", async || !one.bus.is_up()).await;
    redis.restart();
    other.interrupted(before + 1).await;
    eventually("it is heard", async || {
        one.publish(&channel, "again").await == Reached::Somebody(1)
    })
    .await;
    assert_eq!(other.hears().await, "again");
}

/// Three servers that share the channels.
async fn cluster() -> Vec<Redis> {
    let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"];
    let servers: Vec<Redis> = (0..3).map(|_| Redis::with(&options)).collect();
    for (server, slots) in servers
        .iter()
        .zip([("0", "5461"), ("5462", "10922"), ("10923", "16383")])
    {
        assert_eq!(server.command(&["CLUSTER", "ADDSLOTSRANGE", slots.0, slots.1]), "OK");
        let port = servers[0].port().to_string();
        assert_eq!(server.command(&["CLUSTER", "MEET", "127.0.0.1", &port]), "OK");
    }
    eventually("the cluster agrees", async || {
        servers.iter().all(|server| {
            let info = server.command(&["CLUSTER", "INFO"]);
            info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
        })
    })
    .await;
    servers
}

#[tokio::test]
async fn a_redis_cluster_shares_the_channels_among_its_servers() {
    let servers = cluster().await;
    let url = format!("redis+cluster://127.0.0.1:{}", servers[0].port());
    let (one, mut other) = (Node::over(&url).await, Node::over(&url).await);
    let channels: Vec<Channel> = (0..60).map(|_| request()).collect();
    for channel in &channels {
        assert_eq!(one.publish(channel, "to nobody").await, Reached::Nobody);
        other.bus.subscribe(channel.clone());
        eventually("it is subscribed", async || {
            one.publish(channel, channel.to_string()).await == Reached::Somebody(1)
        })
        .await;
        while other.hears().await != channel.to_string() {}
    }
    for server in &servers {
        let here = server.command(&["PUBSUB", "SHARDCHANNELS"]);
        assert!(here.contains("adit:req:"), "each server has some of them");
    }
    for number in 0..300_usize {
        within("room", one.bus.room()).await;
        one.bus
            .publish(channels[number % 60].clone(), number.to_string().into());
    }
    // In order on each channel; between servers there is no order.
    let mut last = vec![None; 60];
    for _ in 0..300 {
        let number: usize = String::from_utf8_lossy(&other.hears().await).parse().expect("a number");
        assert!(
            last[number % 60] < Some(number),
            "{number} after {:?}",
            last[number % 60]
        );
        last[number % 60] = Some(number);
    }
}
