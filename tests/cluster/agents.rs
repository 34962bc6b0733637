//! Agents lose their links and come back at other nodes, one at a time and all at once; and one is killed.

use adit::ids::InstanceId;
use tokio::task::JoinSet;

use crate::{
    LONG, MOVED,
    cluster::{Cluster, Plan, eventually, tenant::Broken},
    harness::{proxy::FaultProxy, tunnel::RawTunnel, until, within},
};

/// Notices a silent link within two seconds.
const HASTY: &str = "[tunnels]\nping_interval = \"1s\"\nping_timeout = \"1s\"\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_cut_goes_on_at_another_node() {
    let cluster = Cluster::start(3).await;
    let tenant = cluster.tenant("home", 1).await;
    let ingress = &cluster.nodes[2];
    cluster.balancer.spare(ingress.public);
    let cable = FaultProxy::start(cluster.balancer.address).await;
    let agent = cluster.agent(&tenant, cable.address, 1).await;
    let mut holders = vec![cluster.holder().await];
    for stream in 0..4 {
        let mut down = tenant.begin(ingress.public, stream, LONG / 2).await.expect("it begins");
        down.read(1).await.expect("it has begun");
        let cuts = cable.cuts();
        cable.cut();
        until("the cut", || cable.cuts() > cuts).await;
        down.rest().await.expect("whole");
        holders.push(cluster.holder().await);
    }
    assert!(holders.contains(&0) && holders.contains(&1), "{holders:?}");
    assert!(ingress.metric(MOVED).await >= 4);
    assert_eq!(tenant.most_calls(), 1, "each once");
    eventually("the registry has what lives", async || cluster.rows_are_sockets().await).await;
    agent.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_falls_silent_is_replaced_while_its_node_still_believes_in_it() {
    let cluster = Cluster::with(Plan {
        nodes: 3,
        settings: HASTY,
        ..Plan::default()
    })
    .await;
    let tenant = cluster.tenant("home", 1).await;
    let [first, second, ingress] = &cluster.nodes[..] else {
        panic!("three")
    };
    for node in [second, ingress] {
        cluster.balancer.spare(node.public);
    }
    let cable = FaultProxy::start(cluster.balancer.address).await;
    let agent = cluster.agent(&tenant, cable.address, 1).await;
    cluster.balancer.spare(first.public);
    cluster.balancer.use_again(second.public);
    let mut down = tenant.begin(ingress.public, 1, LONG).await.expect("it begins");
    down.read(1).await.expect("it has begun");
    // The node would notice as soon as the agent does: so it is stopped until the agent is elsewhere.
    first.signal("STOP");
    cable.freeze_first(1);
    down.rest().await.expect("whole");
    assert!(cable.held_back() > 0, "the freeze was felt");
    assert!(ingress.metric(MOVED).await > 0);
    assert_eq!(second.metric("adit_tunnels").await, 1);
    let old = format!("SELECT COUNT(*) FROM connections WHERE node_id = '{}'", first.id());
    assert_eq!(cluster.count(old).await, 1, "the old row stands");
    tenant
        .download(ingress.public, 2, 10_000)
        .await
        .expect("and is not believed in");
    first.signal("CONT");
    eventually("the registry has what lives", async || cluster.rows_are_sockets().await).await;
    assert_eq!(cluster.tunnels().await, 1);
    assert_eq!(tenant.most_calls(), 1, "each once");
    agent.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wedged_tunnel_of_two_leaves_everything_to_the_other() {
    let cluster = Cluster::start(3).await;
    let tenant = cluster.tenant("home", 1).await;
    let ingress = &cluster.nodes[2];
    cluster.balancer.spare(ingress.public);
    let cable = FaultProxy::start(cluster.balancer.address).await;
    let agent = cluster.agent(&tenant, cable.address, 2).await;
    let mut downs = Vec::new();
    let mut talks = Vec::new();
    for stream in 0..4 {
        let mut down = tenant.begin(ingress.public, stream, LONG / 4).await.expect("it begins");
        down.read(1).await.expect("it has begun");
        downs.push(down);
        talks.push(tenant.talk(ingress.public, 10 + stream).await);
    }
    let dialled = cable.connections();
    cable.freeze_first(1);
    for talk in &mut talks {
        talk.say("over the other").await;
    }
    for down in downs {
        down.rest().await.expect("whole");
    }
    assert!(cable.held_back() > 0, "the freeze was felt");
    assert!(ingress.metric(MOVED).await > 0);
    assert_eq!(cable.connections(), dialled, "without a new tunnel");
    cable.heal();
    for talk in talks {
        talk.end().await;
    }
    assert_eq!(tenant.most_calls(), 1, "each once");
    agent.stop().await;
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_agents_whose_node_was_killed_come_back_at_once() {
    const TENANTS: u64 = 6;
    const EACH: usize = 50;
    let mut cluster = Cluster::with(Plan {
        nodes: 3,
        // These agents do not answer pings.
        settings: "[tunnels]\nping_interval = \"5m\"\n",
        ..Plan::default()
    })
    .await;
    let mut tenants = Vec::new();
    for number in 0..TENANTS {
        tenants.push(cluster.tenant(&format!("t{number}"), number).await);
    }
    let tenants = &tenants;
    let all = async |at| {
        let mut dials = JoinSet::new();
        for tenant in tenants {
            for _ in 0..EACH {
                let (name, token) = (tenant.name.clone(), tenant.token.clone());
                dials.spawn(async move { RawTunnel::open(at, &name, &token, InstanceId::new()).await });
            }
        }
        within("all tunnels", dials.join_all()).await
    };
    let before = all(cluster.nodes[0].public).await;
    let count = before.len() as u64;
    eventually("all are recorded", async || cluster.rows_are_sockets().await).await;
    assert_eq!(cluster.tunnels().await, count);
    cluster.nodes[0].kill().await;
    for mut tunnel in before {
        tunnel.closed().await;
    }
    let after = all(cluster.balancer.address).await;
    eventually("all are back", async || cluster.tunnels().await == count).await;
    eventually("the registry has what lives, and nothing of the dead", async || {
        cluster.rows_are_sockets().await
    })
    .await;
    let shares = [
        cluster.nodes[1].metric("adit_tunnels").await,
        cluster.nodes[2].metric("adit_tunnels").await,
    ];
    assert!(shares.iter().all(|share| *share > 0), "{shares:?}");
    drop(after);
    cluster.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_agent_had_in_flight_breaks_visibly() {
    let cluster = Cluster::with(Plan {
        settings: "[tunnels]\nresume_timeout = \"1s\"\n",
        ..Plan::default()
    })
    .await;
    let tenant = cluster.tenant("home", 1).await;
    let killed = cluster.agent_process(&tenant, cluster.nodes[0].public, 2).await;
    let mut downs = Vec::new();
    for node in &cluster.nodes {
        let stream = u64::from(node.public.port());
        let mut down = tenant.begin(node.public, stream, LONG).await.expect("it begins");
        down.read(1).await.expect("it has begun");
        downs.push(down);
    }
    killed.kill().await;
    for down in downs {
        let end = down.rest().await;
        assert!(matches!(end, Err(Broken::Body)), "{end:?}");
    }
    eventually("its tunnels are gone", async || cluster.tunnels().await == 0).await;
    until("its upstream is left alone", || tenant.open() == 0).await;
    let again = cluster.agent_process(&tenant, cluster.nodes[1].public, 2).await;
    for node in &cluster.nodes {
        let stream = 100_000 + u64::from(node.public.port());
        tenant
            .download(node.public, stream, 10_000)
            .await
            .expect("another serves");
    }
    assert_eq!(tenant.most_calls(), 1, "each once");
    again.signal("TERM");
    assert!(again.ended().await.success());
    cluster.ends().await;
}
