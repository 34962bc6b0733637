//! Redis between the nodes is killed, frozen, paused, cuts its subscribers, is full, or knows another password.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::{sync::oneshot, task::JoinSet};

use crate::{
    INTERRUPTED, LONG,
    cluster::{
        Cluster, Plan, eventually,
        tenant::{Broken, Tenant},
    },
    harness::{TestAgent, within},
};

const AWAY: &str = "degraded: the bus is away";

/// A node that holds the tunnel of a tenant, and one where its downstreams are.
struct Crossing {
    cluster: Cluster,
    tenant: Arc<Tenant>,
    agent: TestAgent,
}

const OWNER: usize = 0;
const INGRESS: usize = 1;

impl Crossing {
    async fn with(plan: Plan) -> Self {
        let cluster = Cluster::with(plan).await;
        let tenant = Arc::new(cluster.tenant("home", 1).await);
        let agent = cluster.agent(&tenant, cluster.nodes[OWNER].public, 1).await;
        Self { cluster, tenant, agent }
    }

    async fn start() -> Self {
        Self::with(Plan::default()).await
    }

    async fn interruptions(&self) -> u64 {
        self.cluster.sum(INTERRUPTED).await
    }

    /// Both nodes have noticed that Redis does not serve, and say so; load balancers keep them all the same.
    async fn redis_is_missed(&self) {
        for node in &self.cluster.nodes {
            node.is_ready(200, AWAY).await;
        }
    }

    async fn redis_is_back(&self) {
        for node in &self.cluster.nodes {
            node.is_ready(200, "ready").await;
        }
    }

    /// A download and an upload that are under way while the fault happens come through it whole.
    async fn both_ways_through(&mut self, fault: impl AsyncFnOnce(&mut Self)) {
        let at = self.cluster.nodes[INGRESS].public;
        let mut down = self.tenant.begin(at, 1, LONG).await.expect("it begins");
        down.read(1).await.expect("it has begun");
        let (more_tx, more) = oneshot::channel();
        let tenant = self.tenant.clone();
        let up = tokio::spawn(async move { tenant.upload(at, 2, LONG, Some(more)).await });
        eventually("half of it is sent", async || self.tenant.uploaded() > 0).await;
        let before = self.interruptions().await;
        fault(self).await;
        drop(more_tx);
        down.rest().await.expect("the download is whole");
        within("the upload", up)
            .await
            .expect("no panic")
            .expect("the upload is whole");
        println!("{} interruptions", self.interruptions().await - before);
    }

    async fn works(&self) {
        for node in &self.cluster.nodes {
            let stream = rand::random_range(1_000_000..u64::MAX >> 32);
            self.tenant
                .download(node.public, stream, 100_000)
                .await
                .expect("it works");
        }
    }

    async fn ends(self) {
        self.works().await;
        self.tenant.assert_untouched();
        self.agent.stop().await;
        assert_eq!(self.tenant.open(), 0);
        self.cluster.ends().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_survive_a_redis_that_is_killed_and_comes_back() {
    let mut story = Crossing::start().await;
    let before = story.interruptions().await;
    story
        .both_ways_through(async |story| {
            story.cluster.redis.kill();
            story.redis_is_missed().await;
            story.cluster.redis.restart();
        })
        .await;
    assert!(story.interruptions().await >= before + 2, "both nodes were cut off");
    story.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_survive_a_redis_that_freezes() {
    let mut story = Crossing::start().await;
    story
        .both_ways_through(async |story| {
            story.cluster.redis.stop_process();
            story.redis_is_missed().await;
            story.cluster.redis.continue_process();
        })
        .await;
    story.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_survive_a_redis_that_is_paused() {
    let mut story = Crossing::start().await;
    story
        .both_ways_through(async |story| {
            // PUBLISH counts as a write; nothing else does of what nodes say.
            assert_eq!(
                story.cluster.redis.command(&["CLIENT", "PAUSE", "3600000", "WRITE"]),
                "OK"
            );
            story.redis_is_missed().await;
            assert_eq!(story.cluster.redis.command(&["CLIENT", "UNPAUSE"]), "OK");
        })
        .await;
    story.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_each_node_serves_its_own_tunnels_and_says_so_of_the_others() {
    let mut story = Crossing::start().await;
    story.works().await;
    story.cluster.redis.kill();
    story.redis_is_missed().await;
    let (owner, ingress) = (&story.cluster.nodes[OWNER], &story.cluster.nodes[INGRESS]);
    for stream in 1..=20 {
        let local = story.tenant.download(owner.public, stream, 100_000);
        local.await.expect("local tunnels serve");
    }
    for stream in 21..=24 {
        match story.tenant.download(ingress.public, stream, 1000).await {
            Err(Broken::Status(503, answer)) => {
                assert!(answer.headers().contains_key("retry-after"), "{answer:?}");
                assert_eq!(answer.headers()["content-type"], "application/problem+json");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(story.tenant.calls(stream), 0);
    }
    story.cluster.redis.restart();
    story.redis_is_back().await;
    story.ends().await;
}

/// Asks for many bodies of two tenants through a node that holds neither's tunnel, 32 at a time, while `fault` is called
/// after each so many. The number may be another one: `ADIT_ANSWERS`.
async fn many(per_tenant: u64, every: usize, fault: impl Fn(&mut Cluster, usize)) {
    const AT_A_TIME: usize = 32;
    let mut cluster = Cluster::start(3).await;
    let tenants = [
        Arc::new(cluster.tenant("ann", 1).await),
        Arc::new(cluster.tenant("bob", 2).await),
    ];
    let agents = [
        cluster.agent(&tenants[0], cluster.nodes[0].public, 2).await,
        cluster.agent(&tenants[1], cluster.nodes[1].public, 2).await,
    ];
    let at = cluster.nodes[2].public;
    let before = cluster.nodes[2].metric(INTERRUPTED).await;
    let mut faults = 0;
    let mut running = JoinSet::new();
    let mut todo = (0..per_tenant).flat_map(|stream| [(stream, 0), (stream, 1)]);
    let done = Arc::new(AtomicUsize::new(0));
    loop {
        while running.len() < AT_A_TIME
            && let Some((stream, of)) = todo.next()
        {
            let (tenant, done) = (tenants[of].clone(), done.clone());
            running.spawn(async move {
                // Both tenants are asked for the same paths and lengths.
                let length = 1 + (stream * 7919) % 50_000;
                let answer = match stream % 4 {
                    0 => tenant.upload(at, stream, length, None).await,
                    _ => tenant.download(at, stream, length).await,
                };
                if let Err(broken) = answer {
                    panic!("{} {stream}: {broken:?}", tenant.name);
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        let Some(ended) = within("one of many", running.join_next()).await else {
            break;
        };
        ended.expect("it is right");
        if done.load(Ordering::SeqCst) / every > faults {
            faults += 1;
            fault(&mut cluster, faults);
        }
    }
    assert_eq!(done.load(Ordering::SeqCst) as u64, 2 * per_tenant);
    let interrupted = cluster.nodes[2].metric(INTERRUPTED).await - before;
    assert!(interrupted >= 2, "{faults} faults, {interrupted} interruptions");
    for tenant in &tenants {
        tenant.assert_untouched();
        assert_eq!(tenant.most_calls(), 1, "each once");
    }
    for agent in agents {
        agent.stop().await;
    }
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_answers_are_right_while_redis_is_restarted_and_subscribers_are_killed_again_and_again() {
    let answers = std::env::var("ADIT_ANSWERS").map_or(2000, |answers| answers.parse().expect("a number"));
    many(answers / 2, 100, |cluster, fault| match fault % 4 {
        0 => cluster.redis.restart(),
        _ => drop(cluster.redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"])),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_that_redis_cuts_for_its_backlog_misses_nothing() {
    let story = Crossing::with(Plan {
        redis: &["--client-output-buffer-limit", "pubsub 1mb 1mb 1"],
        ..Plan::default()
    })
    .await;
    let at = story.cluster.nodes[INGRESS].public;
    let mut downs = Vec::new();
    for stream in 1..=6 {
        let mut down = story.tenant.begin(at, stream, LONG / 4).await.expect("it begins");
        down.read(1).await.expect("it has begun");
        downs.push(down);
    }
    let before = story.cluster.nodes[INGRESS].metric(INTERRUPTED).await;
    // A node that takes nothing from Redis: what its exchanges are owed piles up there. What is owed is made sure of by
    // another node's letters to it, because how much of the bodies is on its way depends on who was faster.
    story.cluster.nodes[INGRESS].signal("STOP");
    let inbox = format!("adit:node:{}", story.cluster.nodes[INGRESS].id());
    let letter = "x".repeat(16 * 1024);
    eventually("Redis has cut the frozen node off", async || {
        story.cluster.redis.command(&["PUBLISH", &inbox, &letter]) == "0"
    })
    .await;
    story.cluster.nodes[INGRESS].signal("CONT");
    for down in downs {
        down.rest().await.expect("whole");
    }
    assert!(story.cluster.nodes[INGRESS].metric(INTERRUPTED).await > before);
    story.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_said_and_is_no_reason_to_end() {
    let mut story = Crossing::with(Plan {
        redis: &["--requirepass", "hunter2"],
        ..Plan::default()
    })
    .await;
    story.works().await;
    let url = story.cluster.redis.url().replace("hunter2", "swordfish");
    story.cluster.add_node_with_redis(url).await;
    let stranger = story.cluster.nodes.last().expect("added");
    stranger.is_ready(200, AWAY).await;
    stranger.says("cannot reach Redis").await;
    let log = stranger.log();
    assert!(log.contains("WRONGPASS"), "{log}");
    assert!(!log.contains("swordfish") && !log.contains("hunter2"), "{log}");
    let refused = story.tenant.download(stranger.public, 1, 1000).await;
    assert!(matches!(refused, Err(Broken::Status(503, _))), "{refused:?}");
    // Now Redis knows it too.
    let user = [
        "ACL",
        "SETUSER",
        "default",
        "on",
        ">swordfish",
        ">hunter2",
        "~*",
        "&*",
        "+@all",
    ];
    assert_eq!(story.cluster.redis.command(&user), "OK");
    stranger.is_ready(200, "ready").await;
    story.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_is_full_or_read_only_carries_all_the_same() {
    let story = Crossing::start().await;
    let redis = &story.cluster.redis;
    assert_eq!(redis.command(&["CONFIG", "SET", "maxmemory", "1"]), "OK");
    assert!(redis.command(&["SET", "a", "b"]).starts_with("OOM"));
    story.works().await;
    assert_eq!(redis.command(&["CONFIG", "SET", "maxmemory", "0"]), "OK");
    assert_eq!(redis.command(&["REPLICAOF", "127.0.0.1", "1"]), "OK");
    assert!(redis.command(&["SET", "a", "b"]).starts_with("READONLY"));
    story.works().await;
    // Also for who connects anew.
    let before = story.interruptions().await;
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    eventually("both nodes are back", async || {
        story.interruptions().await == before + 2
    })
    .await;
    story.ends().await;
}
