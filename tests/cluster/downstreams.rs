//! Downstreams leave in the middle, or do not read: nobody pays for them but they.

use rand::{RngExt, SeedableRng, rngs::SmallRng};

use crate::{
    LONG,
    cluster::{Cluster, eventually},
    harness::until,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_leaves_in_the_middle_takes_the_upstreams_work_along() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let cluster = Cluster::start(2).await;
    let tenant = cluster.tenant("home", 1).await;
    let agent = cluster.agent(&tenant, cluster.nodes[0].public, 2).await;
    for round in 0..5 {
        let mut downs = Vec::new();
        for of_round in 0..6 {
            let node = &cluster.nodes[of_round as usize % 2];
            let stream = round * 100 + of_round;
            let mut down = tenant.begin(node.public, stream, LONG).await.expect("it begins");
            down.read(random.random_range(0..2 * 1024 * 1024))
                .await
                .expect("it goes on");
            downs.push(down);
        }
        assert_eq!(tenant.open(), 6, "all are far from their end");
        drop(downs);
        until("the upstream's requests are cancelled", || tenant.open() == 0).await;
        eventually("nothing is in flight", async || {
            cluster.sum("adit_exchanges_in_flight").await == 0
        })
        .await;
    }
    let mut left = 0;
    for place in ["local", "peer"] {
        let name = format!(r#"adit_exchanges_total{{outcome="downstream_left",dialect="adit",place="{place}"}}"#);
        left += cluster.sum(&name).await;
    }
    assert_eq!(left, 30);
    tenant
        .download(cluster.nodes[1].public, 1000, 100_000)
        .await
        .expect("all is well");
    agent.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downstreams_that_do_not_read_cost_a_bounded_memory() {
    const DOWNSTREAMS: u64 = 32;
    const MEMORY: u64 = 128 * 1024 * 1024;
    let cluster = Cluster::start(2).await;
    let tenant = cluster.tenant("home", 1).await;
    let agent = cluster.agent(&tenant, cluster.nodes[0].public, 2).await;
    let at = cluster.nodes[1].public;
    tenant.download(at, 1, LONG).await.expect("it works");
    let before: Vec<u64> = cluster.nodes.iter().map(|node| node.most_memory()).collect();
    let mut downs = Vec::new();
    for stream in 0..DOWNSTREAMS {
        // Two gigabytes, if anybody took them.
        let down = tenant.begin(at, 100 + stream, 64 * 1024 * 1024).await;
        downs.push(down.expect("it begins"));
    }
    // A sip each, again and again.
    for sip in 1..=4_u64 {
        for down in &mut downs {
            down.read(sip * 256 * 1024).await.expect("it goes on");
        }
        // Who reads is served at once, in between.
        tenant.download(at, 200 + sip, 500_000).await.expect("neighbours go on");
    }
    assert_eq!(tenant.open() as u64, DOWNSTREAMS, "none has ended");
    for (node, before) in cluster.nodes.iter().zip(before) {
        let grown = node.most_memory() - before;
        println!("{} KiB more", grown / 1024);
        assert!(grown < MEMORY, "{grown} bytes");
    }
    let info = cluster.redis.command(&["INFO", "memory"]);
    let peak = info.lines().find_map(|line| line.strip_prefix("used_memory_peak:"));
    let peak: u64 = peak.expect("a peak").trim().parse().expect("a number");
    println!("{} KiB at Redis", peak / 1024);
    assert!(peak < MEMORY, "{peak} bytes at Redis");
    drop(downs);
    until("the upstream's requests are cancelled", || tenant.open() == 0).await;
    agent.stop().await;
    cluster.ends().await;
}
