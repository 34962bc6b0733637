//! A request from the internet reaches a local server through a tunnel, and everything about it survives.

mod harness;

use adit::cluster::registry::NewAuth;
use harness::{TestAgent, TestRelay, TestUpstream};

#[tokio::test]
async fn a_get_reaches_the_upstream() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let upstream = TestUpstream::echo().await;
    let _agent = TestAgent::start(relay.address, "home", &token, upstream.address).await;
    let (status, headers, body) = relay.get("home", "/a/../b?x=%2e&clientId=home").await;
    assert_eq!(status, 200);
    assert!(headers.contains_key("adit-request-id"));
    let text = String::from_utf8_lossy(&body);
    assert!(text.starts_with("GET /a/../b?x=%2e&clientId=home\n"), "{text}");
    assert!(text.contains("x-forwarded-for: 127.0.0.1\n"), "{text}");
    relay.stop().await;
}
