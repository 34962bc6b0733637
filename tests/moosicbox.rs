//! MoosicBox's servers and apps, by hand: requests down a server's socket and packets up, apps' messages, and what the
//! system that this one succeeds got wrong. Facts and figures: MOOSICBOX.md.

mod harness;

use harness::{
    TestRelay, bodies, full,
    home::whole,
    moosicbox::{App, Sender, Tenant},
    within,
};
use http::Response;
use hyper::body::Incoming;
use serde_json::json;
use tokio::task::JoinHandle;

struct Story {
    relay: TestRelay,
    home: Tenant,
}

impl Story {
    async fn start() -> Self {
        let relay = TestRelay::start().await;
        let home = Tenant::new(&relay, "home").await;
        Self { relay, home }
    }

    /// Sends a request of a tenant, on a connection of its own.
    fn send(&self, request: http::request::Builder, body: impl Into<bytes::Bytes>) -> JoinHandle<Response<Incoming>> {
        let request = request.body(full(body)).expect("a request");
        tokio::spawn(harness::send(self.relay.address, request))
    }

    fn get(&self, tenant: &Tenant, path: &str) -> JoinHandle<Response<Incoming>> {
        self.send(tenant.ask("GET", path), "")
    }
}

async fn answer(sent: JoinHandle<Response<Incoming>>) -> Response<Incoming> {
    within("an answer", sent).await.expect("no panic")
}

async fn text(sent: JoinHandle<Response<Incoming>>) -> (u16, String) {
    let (status, body) = whole(answer(sent).await).await;
    (status, String::from_utf8(body.to_vec()).expect("text"))
}

#[tokio::test]
async fn a_request_goes_down_as_json_and_its_packets_come_back_as_they_are() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let request = story.home.ask("GET", "/files/track?trackId=7&a=x%20y&flag");
    let request = request.header("user-agent", "an app").header("accept", "audio/*");
    let sent = story.send(
        request.header("range", "bytes=0-4").header("moosicbox-profile", "main"),
        "",
    );
    let (id, request) = server.request().await;
    assert_ne!(id, 0);
    assert_eq!(
        (&request["method"], &request["path"], &request["profile"]),
        (&json!("GET"), &json!("files/track"), &json!("main"))
    );
    assert_eq!(
        request["query"],
        json!({"trackId": "7", "a": "x%20y", "flag": "", "clientId": "home"})
    );
    // Its sender says who it is, and MoosicBox believes the first that does.
    assert_eq!(request["headers"], json!({"accept": "audio/*", "range": "bytes=0-4"}));
    assert!(request.get("payload").is_none());
    let headers = r#"{"content-type":"audio/flac","content-range":"bytes 0-4/9","transfer-encoding":"chunked"}"#;
    server.packet_of(id, 1, true, 206, headers, b"hello").await;
    let response = answer(sent).await;
    assert_eq!(response.status(), 206);
    assert_eq!(response.headers()["content-range"], "bytes 0-4/9");
    assert_eq!(whole(response).await.1, "hello");
}

#[tokio::test]
async fn what_comes_is_passed_on_before_there_is_more_and_packets_out_of_order_are_put_in_order() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let sent = story.get(&story.home, "/a");
    let (id, _) = server.request().await;
    server.packet(id, 1, false, b"one ").await;
    let mut body = answer(sent).await.into_body();
    assert_eq!(bodies::next(&mut body).await.as_deref(), Some(&b"one "[..]));
    server.packet(id, 4, true, b"four").await;
    server.packet(id, 3, false, b"three ").await;
    server.packet(id, 3, false, b"three ").await;
    server.packet(id, 2, false, b"two ").await;
    let mut rest = Vec::new();
    while let Some(piece) = bodies::next(&mut body).await {
        rest.extend(piece);
    }
    assert_eq!(rest, b"two three four");
}

#[tokio::test]
async fn the_first_packet_may_come_last() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let sent = story.get(&story.home, "/a");
    let (id, _) = server.request().await;
    server.packet(id, 2, true, b"world").await;
    server.packet_of(id, 1, false, 201, r#"{"x-a":"1"}"#, b"hello ").await;
    assert_eq!(text(sent).await, (201, "hello world".into()));
}

#[tokio::test]
async fn head_and_answers_without_a_body_have_none() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let sent = story.send(story.home.ask("HEAD", "/a"), "");
    let (id, request) = server.request().await;
    assert_eq!(request["method"], "HEAD");
    server
        .packet_of(id, 1, true, 200, r#"{"content-length":"1000"}"#, b"")
        .await;
    let response = answer(sent).await;
    assert_eq!(response.headers()["content-length"], "1000");
    let sent = story.get(&story.home, "/b");
    let (id, _) = server.request().await;
    server
        .packet_of(id, 1, true, 304, r#"{"content-length":"5"}"#, b"")
        .await;
    assert_eq!(text(sent).await, (304, String::new()));
}

#[tokio::test]
async fn json_goes_along_and_what_is_no_json_is_refused_in_words() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let (status, why) = text(story.send(story.home.ask("POST", "/a"), "no json")).await;
    assert_eq!(status, 415);
    assert!(why.contains("JSON"), "{why}");
    let sent = story.send(story.home.ask("POST", "/b"), r#"{"a": [1]}"#);
    let (id, request) = server.request().await;
    assert_eq!(
        (&request["path"], &request["payload"]),
        (&json!("b"), &json!({"a": [1]}))
    );
    server.packet(id, 1, true, b"ok").await;
    assert_eq!(text(sent).await, (200, "ok".into()));
}

#[tokio::test]
async fn packets_of_another_tenants_request_are_nobodys() {
    let story = Story::start().await;
    let other = Tenant::new(&story.relay, "other").await;
    let mut server = story.home.sender(story.relay.agents).await;
    let mut liar = other.sender(story.relay.agents).await;
    let sent = story.get(&story.home, "/a");
    let (id, _) = server.request().await;
    liar.packet(id, 1, true, b"a lie").await;
    // The liar is heard before the server is: it answers something of its own in between.
    let own = story.get(&other, "/b");
    let (own_id, _) = liar.request().await;
    liar.packet(own_id, 1, true, b"its own").await;
    assert_eq!(text(own).await, (200, "its own".into()));
    server.packet(id, 1, true, b"the truth").await;
    assert_eq!(text(sent).await, (200, "the truth".into()));
}

#[tokio::test]
async fn the_newest_server_gets_the_requests_and_the_older_serves_again_when_it_is_gone() {
    let story = Story::start().await;
    let mut older = story.home.sender(story.relay.agents).await;
    while !serves_rather(&story, &mut older, None).await {}
    let mut newer = story.home.sender(story.relay.agents).await;
    // Until the node that is asked has heard of it.
    while !serves_rather(&story, &mut newer, Some(&mut older)).await {}
    assert!(serves_rather(&story, &mut newer, Some(&mut older)).await);
    drop(newer);
    assert!(serves_rather(&story, &mut older, None).await);
}

/// One request: whether it went to this server, and not to the other.
async fn serves_rather(story: &Story, server: &mut Sender, other: Option<&mut Sender>) -> bool {
    let sent = story.get(&story.home, "/which");
    let other = async {
        match other {
            Some(other) => {
                let (id, _) = other.request().await;
                other.packet(id, 1, true, b"the other").await;
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        (id, _) = server.request() => server.packet(id, 1, true, b"this").await,
        () = other => {}
    }
    text(sent).await == (200, "this".into())
}

#[tokio::test]
async fn a_server_that_dies_fails_its_requests_at_once() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let waits = story.send(story.home.ask("POST", "/waits"), "1");
    server.request().await;
    let begun = story.send(story.home.ask("POST", "/begun"), "2");
    let (id, _) = server.request().await;
    server.packet(id, 1, false, b"half").await;
    let mut body = answer(begun).await.into_body();
    assert_eq!(bodies::next(&mut body).await.as_deref(), Some(&b"half"[..]));
    drop(server);
    assert_eq!(answer(waits).await.status(), 502);
    assert!(!bodies::ends_well(&mut body).await, "cut short, and it looks so");
}

#[tokio::test]
async fn a_downstream_that_leaves_aborts_its_request() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let sent = story.get(&story.home, "/a");
    let (id, _) = server.request().await;
    sent.abort();
    assert_eq!(server.next().await, json!({"type": "ABORT", "request_id": id}));
}

/// A player that reads a long track as it plays it: all of it is here already, and its other requests do not wait.
#[tokio::test]
async fn a_downstream_that_reads_slowly_gets_everything_and_the_others_go_on() {
    const PIECE: usize = 60_000;
    const PIECES: u32 = 600;
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let slow = story.get(&story.home, "/slow");
    let (slow_id, _) = server.request().await;
    for packet_id in 1..=PIECES {
        let piece = vec![packet_id as u8; PIECE];
        server.packet(slow_id, packet_id, packet_id == PIECES, &piece).await;
    }
    let lively = story.get(&story.home, "/lively");
    let (lively_id, _) = server.request().await;
    server.packet(lively_id, 1, true, b"here").await;
    assert_eq!(text(lively).await, (200, "here".into()));
    let (status, body) = whole(answer(slow).await).await;
    assert_eq!((status, body.len()), (200, PIECE * PIECES as usize));
    let right = |(at, byte): (usize, &u8)| *byte == (at / PIECE + 1) as u8;
    assert!(body.iter().enumerate().all(right));
}

#[tokio::test]
async fn without_room_for_files_who_does_not_read_is_given_up_and_the_others_go_on() {
    const PIECE: usize = 60_000;
    let relay = TestRelay::with(|config| config.moosicbox.spool_limit = 0).await;
    let home = Tenant::new(&relay, "home").await;
    let story = Story { relay, home };
    let mut server = story.home.sender(story.relay.agents).await;
    let stalled = story.get(&story.home, "/stalled");
    let (stalled_id, _) = server.request().await;
    let lively = story.get(&story.home, "/lively");
    let (lively_id, _) = server.request().await;
    let stop = tokio::spawn(async move {
        let response = answer(stalled).await; // and its body is not read
        std::future::pending::<()>().await;
        drop(response);
    });
    // More than the windows and sockets on the way and the 4 MiB that may wait.
    for packet_id in 1..=600 {
        server.packet(stalled_id, packet_id, false, &vec![7; PIECE]).await;
    }
    server.packet(lively_id, 1, true, b"here").await;
    assert_eq!(text(lively).await, (200, "here".into()));
    assert_eq!(server.next().await, json!({"type": "ABORT", "request_id": stalled_id}));
    stop.abort();
}

/// Another tenant's server goes on.
async fn serves(story: &Story, other: &Tenant, server: &mut Sender) {
    let sent = story.get(other, "/a");
    let (id, _) = server.request().await;
    server.packet(id, 1, true, b"fine").await;
    assert_eq!(text(sent).await, (200, "fine".into()));
}

#[tokio::test]
async fn what_is_no_packet_closes_that_socket_and_nothing_else() {
    let story = Story::start().await;
    let other = Tenant::new(&story.relay, "other").await;
    let mut bystander = other.sender(story.relay.agents).await;
    for bad in [b"short".to_vec(), vec![0; 13], vec![9; 40]] {
        let mut server = story.home.sender(story.relay.agents).await;
        server.binary(bad).await;
        server.closed().await;
    }
    serves(&story, &other, &mut bystander).await;
}

#[tokio::test]
async fn a_head_that_is_no_http_is_a_502_and_an_abort() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    for (status, headers) in [
        (42, "{}"),
        (200, r#"{"bad name":"x"}"#),
        (200, "not json"),
        (200, r#"{"n":1}"#),
    ] {
        let sent = story.get(&story.home, "/a");
        let (id, _) = server.request().await;
        server.packet_of(id, 1, false, status, headers, b"x").await;
        assert_eq!(answer(sent).await.status(), 502, "{status} {headers}");
        assert_eq!(server.next().await, json!({"type": "ABORT", "request_id": id}));
    }
}

#[tokio::test]
async fn what_an_app_says_reaches_its_server_and_the_answer_reaches_the_app_alone() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let mut app = story.home.app(story.relay.address).await;
    let mut bystander = story.home.app(story.relay.address).await;
    app.say(r#"{"type":"PING", "n": 1}"#).await;
    let asked = server.next().await;
    assert_eq!(
        (&asked["type"], &asked["body"]),
        (&json!("WS"), &json!({"type": "PING", "n": 1}))
    );
    assert!(asked["conn_id"].as_u64() > Some(0) && asked["profile"].is_null());
    let answer = json!({"request_id": asked["request_id"], "body": {"a": "b c"}});
    server.text(answer.clone()).await;
    server.text(answer).await; // any number of times
    assert_eq!(app.hear().await, r#"{"a":"b c"}"#);
    assert_eq!(app.hear().await, r#"{"a":"b c"}"#);
    bystander.say(r#"{"other":true}"#).await;
    let asked = server.next().await;
    server.text(json!({"request_id": asked["request_id"], "body": 2})).await;
    assert_eq!(bystander.hear().await, "2");
}

/// What a server learns of an app that speaks: its connection's number.
async fn met(server: &mut Sender, app: &mut App) -> u64 {
    app.say(r#""hello""#).await;
    let asked = server.next().await;
    server
        .text(json!({"request_id": asked["request_id"], "body": "welcome"}))
        .await;
    assert_eq!(app.hear().await, r#""welcome""#);
    asked["conn_id"].as_u64().expect("a number")
}

#[tokio::test]
async fn what_a_server_says_to_all_reaches_all_its_own_apps_on_all_nodes_and_nobody_elses() {
    let story = Story::start().await;
    let other = Tenant::new(&story.relay, "other").await;
    let mut server = story.home.sender(story.relay.agents).await;
    let mut others_server = other.sender(story.relay.agents).await;
    let mut here = story.home.app(story.relay.address).await;
    let mut there = story.home.app(story.relay.agents).await;
    let mut stranger = other.app(story.relay.address).await;
    let (here_id, there_id) = (met(&mut server, &mut here).await, met(&mut server, &mut there).await);
    met(&mut others_server, &mut stranger).await;
    server.text(json!({"request_id": 0, "body": {"to": "all"}})).await;
    server
        .text(json!({"request_id": 0, "body": "one", "to_connection_ids": [here_id], "exclude_connection_ids": null}))
        .await;
    server
        .text(json!({"request_id": 0, "body": "but one", "exclude_connection_ids": [here_id]}))
        .await;
    server
        .text(json!({"request_id": 0, "body": "both", "to_connection_ids": [here_id, there_id]}))
        .await;
    for expected in [r#"{"to":"all"}"#, r#""one""#, r#""both""#] {
        assert_eq!(here.hear().await, expected);
    }
    for expected in [r#"{"to":"all"}"#, r#""but one""#, r#""both""#] {
        assert_eq!(there.hear().await, expected);
    }
    others_server.text(json!({"request_id": 0, "body": "its own"})).await;
    assert_eq!(stranger.hear().await, r#""its own""#);
}

#[tokio::test]
async fn an_app_that_does_not_read_is_closed_and_the_others_get_everything() {
    const MESSAGES: usize = 200;
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let mut stalled = story.home.app(story.relay.address).await;
    let mut lively = story.home.app(story.relay.address).await;
    met(&mut server, &mut stalled).await;
    met(&mut server, &mut lively).await;
    let long = "x".repeat(60_000);
    for number in 0..MESSAGES {
        server.text(json!({"request_id": 0, "body": [number, long]})).await;
        assert!(lively.hear().await.starts_with(&format!("[{number},")));
    }
    assert_eq!(stalled.close_code().await, Some(4001));
}

#[tokio::test]
async fn an_app_that_says_no_json_is_told_so() {
    let story = Story::start().await;
    let _server = story.home.sender(story.relay.agents).await;
    let mut app = story.home.app(story.relay.address).await;
    app.say("no json").await;
    assert!(app.hear().await.contains("JSON"));
}

#[tokio::test]
async fn an_app_goes_on_when_its_server_has_come_back() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let mut app = story.home.app(story.relay.address).await;
    app.say("1").await;
    assert_eq!(server.next().await["body"], 1);
    drop(server);
    let mut server = story.home.sender(story.relay.agents).await;
    let mut said = 2;
    // What it said while nobody knew that its server was gone is lost with that, as ever; it says the next thing.
    let mut again = tokio::time::interval(std::time::Duration::from_millis(50));
    within("the new server hears it", async {
        loop {
            tokio::select! {
                asked = server.next() => return assert!(asked["body"].as_u64() > Some(1)),
                _ = again.tick() => app.say(&said.to_string()).await,
            }
            said += 1;
        }
    })
    .await;
}

#[tokio::test]
async fn text_of_a_server_that_is_no_answer_closes_that_socket_and_nothing_else() {
    let story = Story::start().await;
    let other = Tenant::new(&story.relay, "other").await;
    let mut bystander = other.sender(story.relay.agents).await;
    for bad in [
        json!("text"),
        json!({"request_id": "1", "body": 1}),
        json!({"body": 1}),
        json!([]),
    ] {
        let mut server = story.home.sender(story.relay.agents).await;
        server.text(bad).await;
        server.closed().await;
    }
    serves(&story, &other, &mut bystander).await;
}

#[tokio::test]
async fn headers_that_are_not_ascii_harm_nobody() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let binary = http::HeaderValue::from_bytes(b"\xff\xfe").expect("a value");
    let sent = story.send(
        story
            .home
            .ask("GET", "/a")
            .header("hx-prompt", "é")
            .header("hx-target", binary),
        "",
    );
    let (id, request) = server.request().await;
    assert_eq!(request["headers"]["hx-prompt"], "é");
    assert!(request["headers"].get("hx-target").is_none(), "it has no form in JSON");
    server.packet_of(id, 1, true, 200, r#"{"x-c":"ü"}"#, b"").await;
    let response = answer(sent).await;
    assert_eq!(response.headers()["x-c"].as_bytes(), "ü".as_bytes());
}

#[tokio::test]
async fn a_server_that_never_answers_is_a_504_and_an_abort() {
    let relay = TestRelay::with(|config| config.http.response_timeout = std::time::Duration::from_millis(500)).await;
    let home = Tenant::new(&relay, "home").await;
    let story = Story { relay, home };
    let mut server = story.home.sender(story.relay.agents).await;
    let sent = story.get(&story.home, "/a");
    let (id, _) = server.request().await;
    assert_eq!(answer(sent).await.status(), 504);
    assert_eq!(server.next().await, json!({"type": "ABORT", "request_id": id}));
}

#[tokio::test]
async fn a_request_waits_for_a_server_that_was_just_here() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let sent = story.get(&story.home, "/a");
    server.request().await;
    drop(server); // nobody was answered, and once more does no harm
    let mut server = story.home.sender(story.relay.agents).await;
    let (id, request) = server.request().await;
    assert_eq!(request["path"], "a");
    server.packet(id, 1, true, b"back").await;
    assert_eq!(text(sent).await, (200, "back".into()));
}

#[tokio::test]
async fn a_node_that_leaves_lets_its_server_answer_first() {
    let story = Story::start().await;
    let mut server = story.home.sender(story.relay.agents).await;
    let sent = story.get(&story.home, "/a");
    let (id, _) = server.request().await;
    server.packet(id, 1, false, b"half ").await;
    let mut body = answer(sent).await.into_body();
    assert_eq!(bodies::next(&mut body).await.as_deref(), Some(&b"half "[..]));
    let node = story.relay.peer.as_deref().unwrap_or(&story.relay);
    node.shutdown.begin_drain();
    server.packet(id, 2, false, b"and ").await;
    assert_eq!(bodies::next(&mut body).await.as_deref(), Some(&b"and "[..]));
    server.packet(id, 3, true, b"half").await;
    assert_eq!(bodies::next(&mut body).await.as_deref(), Some(&b"half"[..]));
    assert!(bodies::ends_well(&mut body).await);
    server.closed().await;
}

#[tokio::test]
async fn nobody_is_let_in_without_a_signature() {
    let story = Story::start().await;
    for query in [
        "clientId=home",
        "clientId=home&signature=guess&sender=true",
        "clientId=nobody&signature=x",
    ] {
        let request = http::Request::get(format!("/ws?{query}"))
            .header("host", "relay.test")
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(answer(story.send(request, "")).await.status(), 401, "{query}");
    }
}
