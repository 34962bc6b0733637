//! P23 and P24: downstreams that are silent or slow, under short deadlines, and what the upstream sees of them.

use std::time::Duration;

use adit::config::RelayConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    harness::raw::{ENDLESS, RawAnswer, RawUpstream},
    harness::{until, within},
    world::{CLOSE, World, assert_problem, get, post, request},
};

const SHORT: Duration = Duration::from_millis(300);

async fn world(change: impl FnOnce(&mut RelayConfig)) -> World {
    World::with(change, RawUpstream::ok().await).await
}

#[tokio::test]
async fn p23_a_body_that_was_announced_and_never_comes() {
    let world = world(|config| config.http.body_idle_timeout = SHORT).await;
    let headers = format!("{CLOSE}expect: 100-continue\r\ncontent-length: 3\r\n");
    let mut socket = world.begin(post(&headers, "")).await;
    // The upstream says nothing about it, so the relay asks for the body in its place.
    let asked = RawAnswer::read_until(&mut socket, b"\r\n\r\n").await;
    assert_eq!(asked.status(), 100, "{asked:?}");
    assert_problem(&RawAnswer::read(&mut socket).await, 408, "request-timeout", "no body");
    until("the upstream sees an abort", || !world.upstream.ended().is_empty()).await;
    assert!(world.upstream.take().is_empty() && !world.upstream.ended()[0].whole);
    world.still_serves().await;
}

#[tokio::test]
async fn p24_a_body_that_pauses_too_long() {
    let world = world(|config| config.http.body_idle_timeout = SHORT).await;
    for (at, (headers, body)) in [
        ("content-length: 100\r\n", "abc"),
        ("transfer-encoding: chunked\r\n", "3\r\nabc\r\n"),
        ("transfer-encoding: chunked\r\n", "ff\r\na"),
    ]
    .into_iter()
    .enumerate()
    {
        let answer = world.send(post(headers, body)).await;
        assert_problem(&answer, 408, "request-timeout", headers);
        until("the upstream sees an abort", || world.upstream.ended().len() > at).await;
        assert!(world.upstream.take().is_empty() && world.upstream.ended().iter().all(|ended| !ended.whole));
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p24_silence_and_a_head_byte_by_byte() {
    let world = world(|config| config.http.head_timeout = SHORT).await;
    let silent = world.send("").await;
    assert!(silent.bytes.is_empty() || silent.status() == 408, "{silent:?}");
    let mut dripping = world.connect().await;
    let head = get("");
    let mut drops = head.bytes().cycle();
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    let (mut reader, mut writer) = dripping.split();
    let mut answer = Vec::new();
    let drip = async {
        while writer
            .write_u8(drops.next().map_or(b'x', |b| if b == b'\n' { b'x' } else { b }))
            .await
            .is_ok()
        {
            pace.tick().await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = drip => {}
        ended = within("the head deadline", reader.read_to_end(&mut answer)) => drop(ended),
    }
    assert_eq!(world.upstream.heads(), 0);
    world.still_serves().await;
}

#[tokio::test]
async fn p24_an_answer_that_is_not_read_or_read_byte_by_byte() {
    let world = world(|config| config.http.write_idle_timeout = SHORT).await;
    let _stalled = world.begin(request(&format!("GET {ENDLESS}"), "", "")).await;
    until("the upstream is told", || world.upstream.ended().len() == 1).await;
    let mut slow = world.begin(request(&format!("GET {ENDLESS}"), "", "")).await;
    let mut pace = tokio::time::interval(Duration::from_millis(100));
    within("the slow one is cut", async {
        while world.upstream.ended().len() < 2 {
            pace.tick().await;
            let _ = slow.read_u8().await;
        }
    })
    .await;
    world.still_serves().await;
}

#[tokio::test]
async fn p24_too_many_of_one_address_and_room_is_given_back() {
    let world = world(|config| config.http.max_connections_per_address = 4).await;
    // Two of the four are the agent's.
    let held = [world.begin(get("")).await, world.begin(get("")).await];
    until("both are served", || world.upstream.heads() == 2).await;
    let refused = world.send("").await;
    assert!(refused.bytes.is_empty(), "{refused:?}");
    drop(held);
    world.upstream.take();
    within("room again", async {
        while world.send(get(CLOSE)).await.status() != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
