//! An agent is killed with requests in flight, and started again: it is another process, but whoever waits need not know.

mod harness;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use adit::cluster::registry::NewAuth;
use harness::{TestAgent, TestRelay, TestUpstream, full, send, until, within};
use http::{Request, Response};

/// An upstream that never answers its first request, and all others at once.
async fn forgetful() -> (TestUpstream, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let upstream = TestUpstream::start(move |_| {
        let first = counted.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            if first {
                std::future::pending::<()>().await;
            }
            Response::new(full("at last"))
        }
    });
    (upstream.await, calls)
}

fn request(method: &str, relay: &TestRelay) -> Request<harness::AnyBody> {
    let request = Request::builder()
        .method(method)
        .uri("/")
        .header("host", relay.address.to_string());
    request.header("adit-client", "home").body(full("")).expect("a request")
}

#[tokio::test]
async fn a_get_goes_on_with_the_agent_that_was_started_again() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let (upstream, calls) = forgetful().await;
    let killed = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let waiting = tokio::spawn(send(relay.address, request("GET", &relay)));
    until("the upstream is called", || calls.load(Ordering::SeqCst) == 1).await;
    killed.kill().await;
    let _again = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let answer = within("the answer", waiting).await.expect("no panic");
    assert_eq!((answer.status().as_u16(), calls.load(Ordering::SeqCst)), (200, 2));
}

#[tokio::test]
async fn a_post_is_not_repeated() {
    let relay = TestRelay::with(|config| config.tunnels.resume_timeout = std::time::Duration::from_millis(300)).await;
    let token = relay.client("home", NewAuth::Public).await;
    let (upstream, calls) = forgetful().await;
    let killed = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let waiting = tokio::spawn(send(relay.address, request("POST", &relay)));
    until("the upstream is called", || calls.load(Ordering::SeqCst) == 1).await;
    killed.kill().await;
    let _again = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let answer = within("the answer", waiting).await.expect("no panic");
    assert_eq!(answer.headers()["adit-error"], "tunnel-lost");
    assert_eq!((answer.status().as_u16(), calls.load(Ordering::SeqCst)), (502, 1));
}
