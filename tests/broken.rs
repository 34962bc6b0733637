//! What breaks midway is seen to break: a body that did not come whole never ends well.

mod harness;

use std::time::Duration;

use adit::cluster::registry::NewAuth;
use bytes::Bytes;
use harness::{
    TestAgent, TestRelay, bodies,
    by_hand::Raw,
    full,
    home::{Home, ask, whole},
    send, until, within,
};
use http::{Method, Response};

/// How a downstream is told where a body ends.
const KINDS: [(&str, &str, bool); 3] = [
    ("HTTP/1.1", "content-length", true),
    ("HTTP/1.1", "chunked", false),
    ("HTTP/1.0", "close", false),
];

/// Begins a download of each kind, of which the first bytes have come.
async fn begun(home: &Home, version: &str, declared: bool) -> (Raw, bodies::BodyWriter) {
    let mut downstream = Raw::connect(home.relay.address).await;
    downstream
        .write(format!("GET / {version}\r\nhost: relay\r\nadit-client: home\r\n\r\n"))
        .await;
    let mut response = Response::builder();
    if declared {
        response = response.header("content-length", 1000);
    }
    let (body, ..) = home.calls.next().await.begin(response);
    assert!(body.write("half").await);
    let head = downstream.head().await;
    assert!(head.contains(" 200 "), "{head}");
    downstream.until("half").await;
    (downstream, body)
}

/// Whether a body that the connection's end or its framing delimits was seen to break.
async fn breaks(kind: &str, mut downstream: Raw) {
    let (rest, end) = downstream.rest().await;
    assert!(
        !rest.windows(5).any(|seen| seen == b"0\r\n\r\n"),
        "{kind}: a clean last chunk"
    );
    if kind == "close" {
        assert!(
            end.is_err(),
            "the connection must be reset: its end would be the body's"
        );
    }
}

#[tokio::test]
async fn an_agent_killed_midway_breaks_the_body() {
    for (version, kind, declared) in KINDS {
        let resume = |relay: &mut adit::config::RelayConfig| relay.tunnels.resume_timeout = Duration::from_millis(300);
        let home = Home::with(resume, |_| {}).await;
        let (downstream, _body) = begun(&home, version, declared).await;
        home.agent.kill().await;
        breaks(kind, downstream).await;
        home.relay.stop().await;
    }
}

#[tokio::test]
async fn an_agent_that_says_goodbye_breaks_the_body_at_once() {
    for (version, kind, declared) in KINDS {
        let home = Home::with(|relay| relay.tunnels.resume_timeout = Duration::from_secs(3600), |_| {}).await;
        let (downstream, _body) = begun(&home, version, declared).await;
        home.agent.end_now().await;
        breaks(kind, downstream).await;
        home.relay.stop().await;
    }
}

#[tokio::test]
async fn an_upstream_that_dies_midway_breaks_the_body() {
    let home = Home::start().await;
    for (version, kind, declared) in KINDS {
        let (downstream, body) = begun(&home, version, declared).await;
        body.fail().await;
        breaks(kind, downstream).await;
    }
    home.works().await;
    home.relay.stop().await;
}

#[tokio::test]
async fn an_upstream_that_breaks_off_before_its_head_is_a_502() {
    let upstream = harness::by_hand::RawUpstream::start(|mut peer| async move {
        peer.head().await;
    })
    .await;
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let (status, headers, body) = relay.get("home", "/").await;
    assert_eq!(
        (status, &headers["adit-error"]),
        (502, &"upstream-failed".parse().expect("a value")),
        "{body:?}"
    );
    relay.stop().await;
}

#[tokio::test]
async fn an_upstream_that_refuses_connections_is_a_502_that_says_so() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port")
        .local_addr()
        .expect("bound");
    let _agent = TestAgent::start(relay.agents, "home", &token, nobody).await;
    for method in [Method::GET, Method::POST] {
        let answer = send(relay.address, ask(method, "/").body(full("x")).expect("a request")).await;
        assert_eq!(answer.headers()["adit-error"], "upstream-unreachable");
        assert_eq!(answer.headers()["content-type"], "application/problem+json");
        let (status, body) = whole(answer).await;
        let problem: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(
            (status, &problem["type"]),
            (502, &"urn:adit:error:upstream-unreachable".into())
        );
    }
    relay.stop().await;
}

#[tokio::test]
async fn an_upstream_that_does_not_answer_in_time_is_a_504() {
    let home = Home::with(|relay| relay.http.response_timeout = Duration::from_millis(500), |_| {}).await;
    let answer = home.get("/slow");
    let call = home.calls.next().await;
    let answer = within("an answer", answer).await.expect("no panic");
    assert_eq!(answer.headers()["adit-error"], "upstream-timeout");
    assert_eq!(whole(answer).await.0, 504);
    until("the upstream's request is given up", || call.is_given_up()).await;
    drop(call);
    // The deadline is the head's: a body may take its time.
    let answer = home.get("/slow-body");
    let (body, ..) = home.calls.next().await.begin(Response::builder());
    let answer = within("an answer", answer).await.expect("no panic");
    let slow = home.get("/beside");
    let unanswered = home.calls.next().await;
    assert_eq!(within("an answer", slow).await.expect("no panic").status(), 504);
    drop(unanswered);
    assert!(body.write("late").await);
    drop(body);
    assert_eq!(whole(answer).await, (200, Bytes::from("late")));
    home.relay.stop().await;
}
