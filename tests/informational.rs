//! What an upstream says before its answer: hints, and whether it wants the body.

mod harness;

use std::sync::Arc;

use adit::cluster::registry::NewAuth;
use bytes::Bytes;
use harness::{
    TestAgent, TestRelay, bodies,
    by_hand::{Raw, RawUpstream},
    home::ask,
    send, within,
};
use http::{Method, StatusCode};
use tokio::sync::Notify;

async fn before(upstream: &RawUpstream) -> (TestRelay, TestAgent) {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    (relay, agent)
}

const POST: &str =
    "POST /up HTTP/1.1\r\nhost: relay\r\nadit-client: home\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";

#[tokio::test]
async fn early_hints_arrive_before_the_answer() {
    let hinted = Arc::new(Notify::new());
    let told = hinted.clone();
    let upstream = RawUpstream::start(move |mut peer| {
        let hinted = told.clone();
        async move {
            peer.head().await;
            peer.write("HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\nadit-x: forged\r\n\r\n")
                .await;
            hinted.notified().await;
            peer.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            let _ = peer.rest().await;
        }
    })
    .await;
    let (relay, _agent) = before(&upstream).await;
    let mut downstream = Raw::connect(relay.address).await;
    downstream
        .write("GET / HTTP/1.1\r\nhost: relay\r\nadit-client: home\r\n\r\n")
        .await;
    let hints = downstream.head().await;
    assert!(
        hints.starts_with("HTTP/1.1 103 ") && hints.contains("link: </a.css>\r\n"),
        "{hints}"
    );
    assert!(!hints.contains("forged"), "{hints}");
    hinted.notify_one();
    let head = downstream.head().await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    downstream.until("ok").await;
    drop(downstream);
    relay.stop().await;
}

#[tokio::test]
async fn an_upstream_that_says_continue_gets_the_body() {
    let upstream = RawUpstream::start(|mut peer| async move {
        let head = peer.head().await;
        assert!(head.to_lowercase().contains("expect: 100-continue\r\n"), "{head}");
        peer.write("HTTP/1.1 100 Continue\r\n\r\n").await;
        peer.until("hello").await;
        peer.write("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nread").await;
        let _ = peer.rest().await;
    })
    .await;
    let (relay, _agent) = before(&upstream).await;
    let mut downstream = Raw::connect(relay.address).await;
    downstream.write(POST).await;
    assert!(downstream.head().await.starts_with("HTTP/1.1 100 "));
    downstream.write("hello").await;
    assert!(downstream.head().await.starts_with("HTTP/1.1 200 "));
    downstream.until("read").await;
    drop(downstream);
    relay.stop().await;
}

#[tokio::test]
async fn an_upstream_that_refuses_never_gets_the_body() {
    let upstream = RawUpstream::start(|mut peer| async move {
        peer.head().await;
        peer.write("HTTP/1.1 417 Expectation Failed\r\ncontent-length: 2\r\n\r\nno")
            .await;
        let (rest, _) = peer.rest().await;
        assert!(!rest.windows(5).any(|seen| seen == b"hello"), "the body came");
    })
    .await;
    let (relay, _agent) = before(&upstream).await;
    let mut downstream = Raw::connect(relay.address).await;
    downstream.write(POST).await;
    let head = downstream.head().await;
    assert!(head.starts_with("HTTP/1.1 417 "), "{head}");
    downstream.until("no").await;
    drop(downstream);
    let (status, _, body) = relay.get("home", "/next").await;
    assert_eq!((status, body), (417, Bytes::from("no")), "the next request works");
    relay.stop().await;
}

#[tokio::test]
async fn an_upstream_that_answers_at_once_may_still_read_the_body() {
    let upstream =
        harness::TestUpstream::start(
            |request| async move { http::Response::new(harness::home::echo(request.into_body())) },
        )
        .await;
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let asked = ask(Method::POST, "/echo").header("expect", "100-continue");
    let request = asked.body(bodies::long(9, 3_000_000)).expect("a request");
    let answer = send(relay.address, request).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let sum = within("the echo", bodies::sum(answer.into_body())).await;
    assert_eq!(sum, Ok(bodies::sum_of_long(9, 3_000_000)));
    relay.stop().await;
}

#[tokio::test]
async fn an_upstream_that_says_nothing_gets_the_body_after_a_while() {
    let upstream = RawUpstream::start(|mut peer| async move {
        peer.head().await;
        peer.until("hello").await;
        peer.write("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nread").await;
        let _ = peer.rest().await;
    })
    .await;
    let (relay, _agent) = before(&upstream).await;
    let mut downstream = Raw::connect(relay.address).await;
    downstream.write(POST).await;
    assert!(downstream.head().await.starts_with("HTTP/1.1 100 "));
    downstream.write("hello").await;
    assert!(downstream.head().await.starts_with("HTTP/1.1 200 "));
    drop(downstream);
    relay.stop().await;
}

#[tokio::test]
async fn a_body_that_nobody_reads_does_not_hold_up_the_answer() {
    let upstream = RawUpstream::start(|mut peer| async move {
        peer.head().await;
        peer.write("HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbig")
            .await;
        // Closed now, with the body unread, the kernel would take the answer back.
        std::future::pending().await
    })
    .await;
    let (relay, _agent) = before(&upstream).await;
    let (up, body) = bodies::written();
    let request = ask(Method::POST, "/up").body(body).expect("a request");
    let sending = tokio::spawn(up.write_long(1, 64 << 20));
    let answer = send(relay.address, request).await;
    assert_eq!(harness::home::whole(answer).await, (413, Bytes::from("big")));
    within("the downstream stops sending", sending).await.expect("no panic");
    relay.stop().await;
}
