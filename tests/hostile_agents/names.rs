//! A4, A5, A9: names that are none, credentials that are wrong, and labels that nobody outside can add to.

use adit::cluster::registry::NewAuth;

use crate::{
    ask,
    harness::raw::{RawAnswer, send_raw},
    harness::tunnel::RawTunnel,
    harness::{TestAgent, TestRelay, TestUpstream},
    metrics,
};

const WEBSOCKET: &str = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
    sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: adit.v1\r\n";

/// As a header or host has them, and as a query has them.
fn bad_names() -> Vec<(Vec<u8>, String)> {
    let long = "a".repeat(64);
    let longer = "a".repeat(7000);
    [
        ("*", "*"),
        ("a:b", "a:b"),
        ("../x", "../x"),
        ("Home", "Home"),
        ("HOME", "HOME"),
        ("h\u{43e}me", "h%D0%BEme"),
        ("ho me", "ho%20me"),
        ("home.", "home."),
        ("home/", "home/"),
        ("home%", "home%"),
        ("", ""),
        (&long, &long),
        (&longer, &longer),
    ]
    .into_iter()
    .map(|(raw, query)| (raw.as_bytes().to_vec(), query.to_owned()))
    .collect()
}

#[tokio::test]
async fn a4_names_that_are_no_client_ids_in_every_place() {
    let relay = TestRelay::with(|config| config.domain = Some("t.org".parse().expect("a domain"))).await;
    let token = relay.client("home", NewAuth::Public).await;
    let upstream = TestUpstream::echo().await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let refused = |answer: &RawAnswer, what: &str| {
        assert_eq!(answer.status(), 400, "{what}: {answer:?}");
        assert!(answer.head().contains("adit-error: bad-request"), "{what}: {answer:?}");
    };
    for (raw, query) in bad_names() {
        let header = [b"GET / HTTP/1.1\r\nhost: t.org\r\nadit-client: ", &raw[..], b"\r\n\r\n"].concat();
        refused(&send_raw(relay.address, header).await, &format!("header {query}"));
        let in_query = format!("GET /?clientId={query} HTTP/1.1\r\nhost: t.org\r\n\r\n");
        refused(&send_raw(relay.address, in_query).await, &format!("query {query}"));
        let tunnel = format!(
            "GET /ws?clientId={query} HTTP/1.1\r\nhost: t.org\r\nauthorization: Bearer {token}\r\n{WEBSOCKET}\r\n"
        );
        refused(&send_raw(relay.address, tunnel).await, &format!("tunnel {query}"));
    }
    for query in [
        "home%00",
        "%00",
        "home%20",
        "home&clientId=other",
        "home%0",
        "%68ome%c3",
    ] {
        let in_query = format!("GET /?clientId={query} HTTP/1.1\r\nhost: t.org\r\n\r\n");
        refused(&send_raw(relay.address, in_query).await, &format!("query {query}"));
    }
    for host in [
        "*.t.org",
        "a.b.t.org",
        "..t.org",
        &format!("{}.t.org", "a".repeat(64)),
        "-_.t.org",
    ] {
        refused(
            &send_raw(relay.address, format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n")).await,
            host,
        );
    }
    for name in [
        "*",
        "a:b",
        "../x",
        "A",
        "home ",
        "",
        "\\u0000",
        "h\u{43e}me",
        &"a".repeat(10_000),
    ] {
        let body = format!("{{\"client_id\":\"{name}\"}}");
        let answer = admin(&relay, "POST /api/v1/clients", &body).await;
        assert!([400, 422].contains(&answer.status()), "{name}: {answer:?}");
    }
    // Hosts know no case; the names of clients are what they are.
    let upper = send_raw(
        relay.address,
        "GET / HTTP/1.1\r\nhost: HOME.T.org\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert_eq!(upper.status(), 200, "{upper:?}");
    assert_eq!(relay.get("home", "/").await.0, 200);
}

async fn admin(relay: &TestRelay, line: &str, body: &str) -> RawAnswer {
    let request = format!(
        "{line} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        relay.admin_token,
        body.len()
    );
    send_raw(relay.admin, request).await
}

/// A refusal without what is of one request.
fn sameness(answer: &RawAnswer) -> (String, serde_json::Value) {
    let head: Vec<String> = answer.head().split("\r\n").map(str::to_owned).collect();
    let kept = head
        .into_iter()
        .filter(|line| !line.starts_with("adit-request-id") && !line.starts_with("date"));
    let mut body: serde_json::Value = serde_json::from_slice(answer.body()).expect("a problem");
    body.as_object_mut().expect("an object").remove("request_id");
    (kept.collect::<Vec<_>>().join("\n"), body)
}

#[tokio::test]
async fn a5_one_401_for_whatever_is_wrong_and_429_but_never_for_who_is_right() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Token).await;
    let other = relay.client("other", NewAuth::Token).await;
    let wrong = format!("{}x", &token[..token.len() - 1]);
    let cases = [
        ("home", wrong.as_str()),
        ("home", &token[..token.len() / 2]),
        ("home", &other),
        ("home", "x"),
        ("nobody", &token),
        ("nobody", "x"),
    ];
    let agent = |client: &str, token: &str| {
        let head = format!("GET /ws?clientId={client} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\n");
        send_raw(
            relay.address,
            format!(
                "{head}{}\r\n",
                WEBSOCKET.replace("connection: upgrade", "connection: upgrade, close")
            ),
        )
    };
    let downstream = |client: &str, token: &str| {
        let head = format!("GET / HTTP/1.1\r\nhost: a\r\nadit-client: {client}\r\nauthorization: Bearer {token}\r\n");
        send_raw(relay.address, format!("{head}connection: close\r\n\r\n"))
    };
    let (mut agents, mut downstreams) = (Vec::new(), Vec::new());
    for (client, token) in cases {
        agents.push(agent(client, token).await);
        downstreams.push(downstream(client, token).await);
    }
    for answer in agents.iter().chain(&downstreams) {
        assert_eq!(answer.status(), 401, "{answer:?}");
        assert_eq!(sameness(answer), sameness(&agents[0]), "{answer:?}");
    }
    for _ in agents.len() + downstreams.len()..20 {
        assert_eq!(agent("home", "x").await.status(), 401);
    }
    for answer in [
        agent("home", "x").await,
        downstream("nobody", "x").await,
        downstream("home", "x").await,
    ] {
        assert_eq!(answer.status(), 429, "{answer:?}");
        assert_eq!(answer.values("retry-after").len(), 1, "{answer:?}");
    }
    let upstream = TestUpstream::echo().await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    assert_eq!(downstream("home", &token).await.status(), 200);
    assert!(RawTunnel::connect(relay.agents, "other", &wrong).await.is_err());
}

/// Names and labels, without the values.
fn series(page: &str) -> Vec<String> {
    let lines = page.lines().filter(|line| line.starts_with("adit_"));
    lines
        .filter_map(|line| line.rsplit_once(' ').map(|(series, _)| series.to_owned()))
        .collect()
}

#[tokio::test]
async fn a9_nobody_outside_adds_a_time_series() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let upstream = TestUpstream::echo().await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let before = series(&metrics(&relay).await);
    assert!(!before.is_empty());
    for n in 0..20 {
        assert_eq!(ask(&relay, "home", &format!("GET /path-{n}?q={n}")).await.status(), 200);
        ask(&relay, &format!("client-{n}"), "GET /").await;
        ask(&relay, "home", &format!("M{n} /")).await;
        let host = format!("GET / HTTP/1.1\r\nhost: host-{n}\r\nconnection: close\r\n\r\n");
        assert_eq!(send_raw(relay.address, host).await.status(), 404);
        let admin = format!("GET /api/v1/x-{n} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        send_raw(relay.admin, admin).await;
        let _ = RawTunnel::connect(relay.agents, &format!("agent-{n}"), "x").await;
    }
    assert_eq!(series(&metrics(&relay).await), before);
}
