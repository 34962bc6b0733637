//! The bus between two nodes loses, repeats and reorders, under printed seeds: bodies are whole and exact both ways, and
//! the upstream sees each request once.

mod harness;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use adit::{
    cluster::{
        bus::local::{Faults, Hub},
        registry::NewAuth,
    },
    config::RelayConfig,
};
use harness::{
    TestAgent, TestRelay, TestUpstream, bodies,
    home::{ask, echo},
    send, within,
};
use http::{Method, Response};

const SEEDS: std::ops::Range<u64> = 1..9;
const LONG: u64 = 2 * 1024 * 1024;

const FAULTS: Faults = Faults {
    loss: 0.03,
    duplicate: 0.05,
    reorder: 0.05,
    delay: Duration::ZERO,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_are_whole_over_a_bus_that_loses_repeats_and_reorders() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = RelayConfig::default();
    let url = format!("sqlite:{}", dir.path().join("adit.db").display());
    config.database_url = url.parse().expect("a url");
    let hub = Hub::shared();
    let relay = TestRelay::two(config, &hub).await;
    let token = relay.client("home", NewAuth::Public).await;
    let calls = Arc::new(Mutex::new(HashMap::<String, u32>::new()));
    let counted = calls.clone();
    let upstream = TestUpstream::start(move |request| {
        *counted
            .lock()
            .expect("no panic")
            .entry(request.uri().to_string())
            .or_default() += 1;
        async move { Response::new(echo(request.into_body())) }
    })
    .await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    for seed in SEEDS {
        println!("seed {seed}");
        let before = hub.tampered_with();
        hub.misbehave(FAULTS, seed);
        let request = ask(Method::POST, &format!("/{seed}")).body(bodies::long(seed, LONG));
        let answer = send(relay.address, request.expect("a request")).await;
        let sum = within("the answer", bodies::sum(answer.into_body())).await;
        assert_eq!(sum, Ok(bodies::sum_of_long(seed, LONG)), "seed {seed}");
        hub.behave();
        assert!(hub.tampered_with() > before, "seed {seed}: the bus behaved");
    }
    let calls = calls.lock().expect("no panic").clone();
    assert_eq!(calls.len() as u64, SEEDS.end - SEEDS.start);
    assert!(calls.values().all(|times| *times == 1), "each request once: {calls:?}");
    relay.stop().await;
}
