//! Nodes are killed, replaced one after the other, frozen, and remembered by the registry when they are long gone.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::task::JoinSet;
use uuid::Uuid;

use crate::{
    LONG, MOVED,
    cluster::{Cluster, Plan, eventually, tenant::Broken},
    harness::{until, within},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_that_pass_through_a_node_that_is_killed_go_on_through_another() {
    let mut cluster = Cluster::start(3).await;
    let tenants = [cluster.tenant("ann", 1).await, cluster.tenant("bob", 2).await];
    cluster.balancer.spare(cluster.nodes[1].public);
    cluster.balancer.spare(cluster.nodes[2].public);
    let mut agents = Vec::new();
    for tenant in &tenants {
        agents.push(cluster.agent(tenant, cluster.balancer.address, 1).await);
    }
    cluster.balancer.use_again(cluster.nodes[2].public);
    let ingress = cluster.nodes[1].public;
    let mut downs = Vec::new();
    for tenant in &tenants {
        for stream in 0..3 {
            let mut down = tenant.begin(ingress, stream, LONG / 3).await.expect("it begins");
            down.read(1).await.expect("it has begun");
            downs.push(down);
        }
    }
    let mut talk = tenants[0].talk(ingress, 9).await;
    let killed = cluster.nodes[0].id();
    cluster.nodes[0].kill().await;
    for down in downs {
        down.rest().await.expect("whole");
    }
    talk.say("again").await;
    talk.end().await;
    assert!(cluster.nodes[1].metric(MOVED).await >= 7, "all have moved");
    let stands = format!("SELECT COUNT(*) FROM connections WHERE node_id = '{killed}'");
    println!("{} rows of the dead", cluster.count(stands.as_str()).await);
    for tenant in &tenants {
        let anew = tenant.download(ingress, 10, 10_000).await;
        anew.expect("a new request finds where the agent is now");
        assert_eq!(tenant.most_calls(), 1, "each once");
        tenant.assert_untouched();
    }
    eventually("the dead node's rows are gone", async || {
        cluster.rows_are_sockets().await
    })
    .await;
    for agent in agents {
        agent.stop().await;
    }
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_entered_through_a_node_that_is_killed_breaks_and_its_upstream_is_left_alone() {
    let mut cluster = Cluster::with(Plan {
        nodes: 3,
        // A host that hears of nobody gives up this much and fifteen seconds later.
        settings: "[tunnels]\nresume_timeout = \"1s\"\n",
        ..Plan::default()
    })
    .await;
    let tenant = cluster.tenant("home", 1).await;
    let ingress = cluster.nodes[2].public;
    cluster.balancer.spare(ingress);
    let agent = cluster.agent(&tenant, cluster.balancer.address, 2).await;
    let mut downs = Vec::new();
    for stream in 0..4 {
        let mut down = tenant.begin(ingress, stream, LONG).await.expect("it begins");
        down.read(1).await.expect("it has begun");
        downs.push(down);
    }
    assert_eq!(tenant.open(), 4);
    cluster.nodes[2].kill().await;
    for down in downs {
        let end = down.rest().await;
        assert!(matches!(end, Err(Broken::Body)), "{end:?}");
    }
    let others = tenant.download(cluster.nodes[0].public, 10, 100_000).await;
    others.expect("nobody else is concerned");
    until("the upstream is left alone", || tenant.open() == 0).await;
    assert_eq!(tenant.most_calls(), 1, "each once");
    agent.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_every_node_is_noticed_by_nobody() {
    let mut cluster = Cluster::start(3).await;
    let tenants = [
        Arc::new(cluster.tenant("ann", 1).await),
        Arc::new(cluster.tenant("bob", 2).await),
    ];
    let at = cluster.balancer.address;
    let agents = [
        cluster.agent(&tenants[0], at, 2).await,
        cluster.agent(&tenants[1], at, 2).await,
    ];
    let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut load = JoinSet::new();
    for worker in 0..4_u64 {
        let tenant = tenants[worker as usize % 2].clone();
        let (stop, served) = (stop.clone(), served.clone());
        load.spawn(async move {
            for turn in 0.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let (stream, length) = (1000 + worker * 1_000_000 + turn, 1 + (turn * 7919) % 300_000);
                let answer = match turn % 3 {
                    0 => tenant.upload(at, stream, length, None).await,
                    _ => tenant.download(at, stream, length).await,
                };
                answer.unwrap_or_else(|broken| panic!("{} {stream}: {broken:?}", tenant.name));
                served.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    let more = async |count: usize| {
        let enough = served.load(Ordering::SeqCst) + count;
        eventually("the load goes on", async || served.load(Ordering::SeqCst) >= enough).await;
    };
    for leaving in 0..3 {
        let node = &cluster.nodes[leaving];
        let (public, before) = (node.public, node.id());
        // What entered through it finishes within the drain.
        let mut entered = Vec::new();
        for tenant in &tenants {
            let mut down = tenant.begin(public, leaving as u64, LONG).await.expect("it begins");
            down.read(1).await.expect("it has begun");
            entered.push(down);
        }
        node.signal("TERM");
        node.is_ready(503, "leaving").await;
        cluster.balancer.spare(public);
        eventually("its agents are elsewhere", async || {
            node.metric("adit_tunnels").await == 0
        })
        .await;
        more(20).await;
        for down in entered {
            down.rest().await.expect("whole");
        }
        cluster.nodes[leaving].ended().await;
        more(20).await;
        cluster.nodes[leaving].start_again().await;
        assert_ne!(cluster.nodes[leaving].id(), before, "another node");
        cluster.balancer.use_again(public);
        more(20).await;
    }
    stop.store(true, Ordering::SeqCst);
    while let Some(worker) = within("the load ends", load.join_next()).await {
        worker.expect("no request failed, and none was cut short");
    }
    println!("{} requests", served.load(Ordering::SeqCst));
    for tenant in &tenants {
        assert_eq!(tenant.most_calls(), 1, "each once");
        tenant.assert_untouched();
    }
    eventually("the registry has what lives", async || cluster.rows_are_sockets().await).await;
    for agent in agents {
        agent.stop().await;
    }
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_frozen_and_taken_for_dead_disturbs_nobody_when_it_is_back() {
    let cluster = Cluster::start(3).await;
    let tenant = cluster.tenant("home", 1).await;
    let [zombie, other, ingress] = &cluster.nodes[..] else {
        panic!("three")
    };
    cluster.balancer.spare(ingress.public);
    let agent = cluster.agent(&tenant, cluster.balancer.address, 2).await;
    for node in [zombie, other] {
        assert_eq!(node.metric("adit_tunnels").await, 1);
    }
    let mut talks = Vec::new();
    for stream in 0..4 {
        talks.push(tenant.talk(ingress.public, stream).await);
    }
    let before = ingress.metric(MOVED).await;
    zombie.signal("STOP");
    for talk in &mut talks {
        talk.say("while it is frozen").await;
    }
    assert!(ingress.metric(MOVED).await > before, "what went through it has moved");
    // As the reaper of another node does, had it waited for so long.
    let id = zombie.id();
    cluster
        .sql(format!("DELETE FROM connections WHERE node_id = '{id}'"))
        .await;
    assert_eq!(
        cluster.sql(format!("DELETE FROM nodes WHERE node_id = '{id}'")).await,
        1
    );
    zombie.signal("CONT");
    zombie.says("another node took this one for dead").await;
    for (at, talk) in talks.iter_mut().enumerate() {
        for word in ["it is back", "and says again", "what it had to say"] {
            talk.say(&format!("{at} {word}")).await;
        }
    }
    for talk in talks {
        talk.end().await;
    }
    eventually("the registry has what lives", async || cluster.rows_are_sockets().await).await;
    assert_eq!(tenant.most_calls(), 1, "each once");
    for node in &cluster.nodes {
        tenant
            .download(node.public, 100 + u64::from(node.public.port()), 100_000)
            .await
            .expect("all is well");
    }
    agent.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_whose_node_is_gone_costs_a_retry_and_no_error() {
    let cluster = Cluster::start(2).await;
    let tenant = cluster.tenant("home", 1).await;
    let agent = cluster.agent(&tenant, cluster.nodes[0].public, 1).await;
    eventually("its row is there", async || cluster.rows_are_sockets().await).await;
    let ghost = Uuid::now_v7();
    let insert = |tunnel: Uuid| {
        format!(
            "INSERT INTO connections (tunnel_ws_id, client_id, node_id, dialect, instance_id, slot, token_id, remote_addr, \
             connected_at, generation) SELECT '{tunnel}', client_id, '{ghost}', dialect, '{}', 0, token_id, remote_addr, 1, 1 \
             FROM connections WHERE node_id <> '{ghost}'",
            Uuid::now_v7()
        )
    };
    let node = format!("INSERT INTO nodes VALUES ('{ghost}', 'nowhere', '0', 1, 1, 0)");
    assert_eq!(cluster.sql(node).await, 1);
    for _ in 0..5 {
        assert_eq!(cluster.sql(insert(Uuid::now_v7())).await, 1);
    }
    let at = cluster.nodes[1].public;
    for stream in 0..10 {
        tenant.upload(at, 2 * stream, 10_000, None).await.expect("no error");
        tenant.download(at, 2 * stream + 1, 10_000).await.expect("no error");
    }
    let log = cluster.nodes[1].log();
    assert_eq!(log.matches("a peer's tunnel is gone").count(), 5, "each was tried once");
    assert_eq!(tenant.most_calls(), 1, "each once");
    agent.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_descriptors_serves_what_it_has_and_recovers() {
    let cluster = Cluster::with(Plan {
        // Fewer connections than descriptors is how a node protects itself; here it does not.
        settings: "[http]\nmax_connections_per_address = 15000\n",
        descriptors: Some(64),
        ..Plan::default()
    })
    .await;
    let tenant = cluster.tenant("home", 1).await;
    let agent = cluster.agent(&tenant, cluster.nodes[0].public, 2).await;
    let [poor, ingress] = [&cluster.nodes[0], &cluster.nodes[1]];
    let mut down = tenant.begin(ingress.public, 1, LONG / 4).await.expect("it begins");
    down.read(1).await.expect("it has begun");
    let mut idle = Vec::new();
    for _ in 0..100 {
        idle.push(
            tokio::net::TcpStream::connect(poor.public)
                .await
                .expect("the kernel accepts"),
        );
    }
    eventually("it has no descriptor left", async || poor.descriptors() >= 64).await;
    down.rest().await.expect("what it has goes on");
    tenant
        .download(ingress.public, 2, 100_000)
        .await
        .expect("also anew, through another");
    drop(idle);
    tenant.download(poor.public, 3, 100_000).await.expect("it recovers");
    agent.stop().await;
    cluster.ends().await;
}
