//! Networks between the parts break: a node and Redis, a node and the database, the load balancer.

use crate::{
    INTERRUPTED, LONG, MOVED,
    cluster::{Cluster, Plan, eventually, tenant::Broken},
    harness::until,
};

const PROXIED: Plan = Plan {
    nodes: 3,
    settings: "",
    redis: &[],
    database: None,
    descriptors: None,
    plain_user: false,
    proxies: true,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_from_redis_concerns_only_itself() {
    let cluster = Cluster::with(PROXIED).await;
    let tenant = cluster.tenant("home", 1).await;
    let [owner, fine, cut_off] = &cluster.nodes[..] else {
        panic!("three")
    };
    let agent = cluster.agent(&tenant, owner.public, 1).await;
    let cable = cut_off.redis_proxy.as_ref().expect("asked for");
    let mut downs = Vec::new();
    for (stream, node) in [(1, fine), (2, cut_off)] {
        let mut down = tenant.begin(node.public, stream, LONG / 2).await.expect("it begins");
        down.read(1).await.expect("it has begun");
        downs.push(down);
    }
    let waits = downs.pop().expect("two");
    // Its packets are lost.
    cable.freeze();
    cut_off.is_ready(200, "degraded: the bus is away").await;
    assert!(cable.held_back() > 0);
    downs.pop().expect("one").rest().await.expect("others go on");
    for stream in 10..20 {
        tenant
            .download(fine.public, stream, 50_000)
            .await
            .expect("others go on");
    }
    let refused = tenant.download(cut_off.public, 3, 1000).await;
    assert!(matches!(refused, Err(Broken::Status(503, _))), "{refused:?}");
    assert_eq!(tenant.calls(3), 0);
    cable.heal();
    waits.rest().await.expect("whole, as soon as the packets are back");
    cut_off.is_ready(200, "ready").await;

    // Its connections are reset.
    let mut down = tenant.begin(cut_off.public, 4, LONG / 2).await.expect("it begins");
    for _ in 0..3 {
        let (cuts, before) = (cable.cuts(), cut_off.metric(INTERRUPTED).await);
        cable.cut();
        until("the cut", || cable.cuts() > cuts).await;
        eventually("it is back", async || cut_off.metric(INTERRUPTED).await > before).await;
        down.read(1).await.expect("it goes on");
    }
    down.rest().await.expect("whole");
    assert_eq!(tenant.most_calls(), 1, "each once");
    agent.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_from_the_database_serves_on() {
    let cluster = Cluster::with(PROXIED).await;
    let tenant = cluster.tenant("home", 1).await;
    let [cut_off, other, _] = &cluster.nodes[..] else {
        panic!("three")
    };
    let agent = cluster.agent(&tenant, cut_off.public, 1).await;
    tenant.download(other.public, 1, 10_000).await.expect("it works");
    let cable = cut_off.database_proxy.as_ref().expect("asked for");
    cable.freeze();
    let second = cluster.agent(&tenant, cut_off.public, 1).await;
    cut_off.is_ready(200, "degraded: the database is away").await;
    assert!(cable.held_back() > 0);
    agent.stop().await;
    for (stream, node) in [(2, cut_off), (3, other)] {
        tenant
            .download(node.public, stream, 50_000)
            .await
            .expect("the tunnel that nobody recorded serves");
    }
    let unrecorded = cluster.count("SELECT COUNT(*) FROM connections").await;
    println!("{unrecorded} rows meanwhile");
    // What it had begun fails, and it begins again.
    cable.cut();
    cable.heal();
    cut_off.is_ready(200, "ready").await;
    eventually("the registry has what lives", async || cluster.rows_are_sockets().await).await;
    let held = format!("SELECT COUNT(*) FROM connections WHERE node_id = '{}'", cut_off.id());
    assert_eq!(cluster.count(held).await, 1);
    second.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_balancer_that_resets_everything_breaks_only_who_came_through_it() {
    let cluster = Cluster::start(2).await;
    let tenant = cluster.tenant("home", 1).await;
    let balancer = &cluster.balancer;
    let agent = cluster.agent(&tenant, balancer.address, 2).await;
    let mut direct = Vec::new();
    for (stream, node) in cluster.nodes.iter().enumerate() {
        let mut down = tenant
            .begin(node.public, stream as u64, LONG / 2)
            .await
            .expect("it begins");
        down.read(1).await.expect("it has begun");
        direct.push(down);
    }
    let mut through = tenant.begin(balancer.address, 10, LONG).await.expect("it begins");
    through.read(1).await.expect("it has begun");
    let cuts = balancer.cuts();
    balancer.cut();
    until("three cuts", || balancer.cuts() == cuts + 3).await;
    let end = through.rest().await;
    assert!(matches!(end, Err(Broken::Body)), "{end:?}");
    for down in direct {
        down.rest().await.expect("whole");
    }
    assert!(cluster.sum(MOVED).await > 0);
    until("what nobody waits for is cancelled", || tenant.open() == 0).await;
    tenant
        .upload(balancer.address, 11, 100_000, None)
        .await
        .expect("all is well");
    eventually("the registry has what lives", async || {
        cluster.tunnels().await == 2 && cluster.rows_are_sockets().await
    })
    .await;
    assert_eq!(tenant.most_calls(), 1, "each once");
    agent.stop().await;
    cluster.ends().await;
}
