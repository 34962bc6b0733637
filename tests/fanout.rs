//! A client speaks to its subscribers: what is published at any node reaches those at every node, in order and without
//! holes, or they are told.

mod harness;

use std::net::SocketAddr;

use adit::{
    agent::{self, Agent},
    cluster::{
        bus::local::{Faults, Hub},
        registry::NewAuth,
    },
    config::RelayConfig,
    shutdown::Shutdown,
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use harness::{
    AnyBody, TestRelay, full,
    home::{metric, whole},
    send, within,
};
use http::{Method, Request};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest},
};
use tokio_util::task::AbortOnDropHandle;

/// A relay whose nodes can speak with each other.
async fn started() -> TestRelay {
    let relay = TestRelay::start().await;
    for admin in [Some(relay.admin), relay.peer.as_ref().map(|peer| peer.admin)]
        .into_iter()
        .flatten()
    {
        within("the bus is there", async {
            loop {
                let ask = Request::get("/readyz").header("host", "admin").body(full(""));
                let (_, answer) = whole(send(admin, ask.expect("a request")).await).await;
                if !String::from_utf8_lossy(&answer).contains("the bus is away") {
                    break;
                }
            }
        })
        .await;
    }
    relay
}

fn request(method: Method, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(path).header("host", "relay")
}

/// Publishes, and returns the status and the answer.
async fn try_publish(node: SocketAddr, client: &str, token: &str, body: impl Into<Bytes>) -> (u16, Bytes) {
    let request = request(Method::POST, &format!("/adit/publish?clientId={client}"))
        .header("authorization", format!("Bearer {token}"))
        .body(full(body));
    whole(send(node, request.expect("a request")).await).await
}

async fn publish(node: SocketAddr, client: &str, token: &str, body: impl Into<Bytes>) -> String {
    let (status, answer) = try_publish(node, client, token, body).await;
    assert_eq!(status, 202, "{answer:?}");
    let answer: serde_json::Value = serde_json::from_slice(&answer).expect("JSON");
    answer["position"].as_str().expect("a position").to_owned()
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Event {
    name: String,
    id: String,
    data: String,
}

/// A stream of server-sent events.
struct Events {
    body: Incoming,
    read: BytesMut,
}

impl Events {
    async fn subscribe(node: SocketAddr, client: &str, last_event_id: Option<&str>) -> Self {
        let mut request = request(Method::GET, &format!("/adit/subscribe?clientId={client}"));
        request = request.header("accept", "text/event-stream");
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        let response = send(node, request.body(full("")).expect("a request")).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            body: response.into_body(),
            read: BytesMut::new(),
        }
    }

    /// The next event; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(end) = self.read.windows(2).position(|pair| pair == b"\n\n") {
                let block = self.read.split_to(end + 2);
                match parsed(&String::from_utf8_lossy(&block)) {
                    Some(event) => return Some(event),
                    None => continue,
                }
            }
            let frame = within("an event", self.body.frame()).await?;
            let data = frame.expect("the stream goes on").into_data();
            self.read.extend_from_slice(&data.expect("no trailers"));
        }
    }

    async fn data(&mut self) -> String {
        self.next().await.expect("an event").data
    }
}

fn parsed(block: &str) -> Option<Event> {
    let mut event = Event::default();
    let mut lines = Vec::new();
    for line in block.trim_end_matches('\n').split('\n') {
        match line.split_once(": ").unwrap_or((line, "")) {
            ("data", data) => lines.push(data),
            ("id", id) => event.id = id.to_owned(),
            ("event", name) => event.name = name.to_owned(),
            _ => {}
        }
    }
    event.data = lines.join("\n");
    (!lines.is_empty()).then_some(event)
}

type Socket = WebSocketStream<TcpStream>;

async fn websocket(node: SocketAddr, client: &str, more: &str) -> Socket {
    let url = format!("ws://relay/adit/subscribe?clientId={client}{more}");
    let stream = TcpStream::connect(node).await.expect("the relay listens");
    let request = url.into_client_request().expect("a request");
    let connected = within("a handshake", tokio_tungstenite::client_async(request, stream));
    connected.await.expect("a handshake").0
}

/// The next message that is no ping.
async fn message(socket: &mut Socket) -> Message {
    loop {
        let next = within("a message", socket.next()).await;
        match next.expect("the socket is open").expect("a message") {
            Message::Ping(_) => {}
            message => return message,
        }
    }
}

fn code_of(message: Message) -> u16 {
    match message {
        Message::Close(Some(frame)) => u16::from(frame.code),
        other => panic!("{other:?} is no close"),
    }
}

#[tokio::test]
async fn what_is_published_at_any_node_reaches_the_subscribers_of_every_node() {
    let relay = started().await;
    let token = relay.client("home", NewAuth::Public).await;
    let (one, other) = (relay.address, relay.agents);
    let mut events = [
        Events::subscribe(one, "home", None).await,
        Events::subscribe(other, "home", None).await,
    ];
    let mut sockets = [websocket(one, "home", "").await, websocket(other, "home", "").await];
    let long = "long ".repeat(100_000);
    for (node, said) in [
        (one, "first"),
        (other, "second\nof two lines"),
        (one, &long),
        (other, ""),
    ] {
        publish(node, "home", &token, said.to_owned()).await;
        for events in &mut events {
            assert_eq!(events.data().await, said);
        }
        for socket in &mut sockets {
            assert_eq!(message(socket).await, Message::text(said));
        }
    }
    publish(one, "home", &token, &b"\xff\x00"[..]).await;
    for events in &mut events {
        let event = events.next().await.expect("an event");
        assert_eq!((event.name.as_str(), event.data.as_str()), ("binary", "/wA="));
    }
    for socket in &mut sockets {
        assert_eq!(message(socket).await, Message::binary(&b"\xff\x00"[..]));
    }
    assert_eq!(metric(&relay, "adit_subscribers").await, 4);
    assert_eq!(metric(&relay, "adit_fanout_published_total").await, 5);
    assert_eq!(metric(&relay, "adit_fanout_delivered_total").await, 20);
    drop((events, sockets));
    no_subscribers_are_left(&relay).await;
    relay.stop().await;
}

async fn no_subscribers_are_left(relay: &TestRelay) {
    within("all subscribers have left", async {
        while metric(relay, "adit_subscribers").await > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn another_clients_subscribers_never_see_it() {
    let relay = started().await;
    let home = relay.client("home", NewAuth::Public).await;
    let office = relay.client("office", NewAuth::Public).await;
    let mut at_home = Events::subscribe(relay.address, "home", None).await;
    let mut at_office = websocket(relay.address, "office", "").await;
    for n in 0..10 {
        publish(relay.agents, "home", &home, format!("home {n}")).await;
        publish(relay.agents, "office", &office, format!("office {n}")).await;
    }
    for n in 0..10 {
        assert_eq!(at_home.data().await, format!("home {n}"));
        assert_eq!(message(&mut at_office).await, Message::text(format!("office {n}")));
    }
    // The token of one says nothing for the other.
    assert_eq!(try_publish(relay.agents, "home", &office, "x").await.0, 401);
    relay.stop().await;
}

#[tokio::test]
async fn a_subscriber_that_comes_back_elsewhere_goes_on_where_it_was() {
    let relay = started().await;
    let token = relay.client("home", NewAuth::Public).await;
    let (one, other) = (relay.address, relay.agents);
    let mut events = Events::subscribe(one, "home", None).await;
    publish(one, "home", &token, "1").await;
    publish(other, "home", &token, "2").await;
    assert_eq!(events.data().await, "1");
    let last = events.next().await.expect("an event");
    assert_eq!(last.data, "2");
    drop(events);
    for (node, said) in [(one, "3"), (other, "4"), (one, &"5".repeat(100_000)), (other, "6")] {
        publish(node, "home", &token, said.to_owned()).await;
    }
    let mut again = Events::subscribe(other, "home", Some(&last.id)).await;
    let mut socket = websocket(other, "home", &format!("&lastEventId={}", last.id)).await;
    publish(one, "home", &token, "7").await;
    let (mut by_events, mut by_socket) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        by_events.push(again.data().await.chars().next().expect("a digit"));
        by_socket.push(message(&mut socket).await.to_text().expect("text").chars().next());
    }
    // Of each node in order; between nodes there is no order.
    for node in [&['3', '5', '7'][..], &['4', '6']] {
        let of = |got: &mut dyn Iterator<Item = char>| got.filter(|c| node.contains(c)).collect::<Vec<_>>();
        if one != other {
            assert_eq!(of(&mut by_events.iter().copied()), node);
            assert_eq!(of(&mut by_socket.iter().flatten().copied()), node);
        }
    }
    by_events.sort_unstable();
    assert_eq!(by_events, ['3', '4', '5', '6', '7']);
    relay.stop().await;
}

#[tokio::test]
async fn what_nobody_has_any_more_is_said_and_not_skipped() {
    let relay = started().await;
    let token = relay.client("home", NewAuth::Public).await;
    let mut events = Events::subscribe(relay.address, "home", None).await;
    publish(relay.agents, "home", &token, "1").await;
    let last = events.next().await.expect("an event").id;
    drop(events);
    for n in 0..300 {
        publish(relay.agents, "home", &token, format!("{n}")).await;
    }
    let mut again = Events::subscribe(relay.address, "home", Some(&last)).await;
    let end = again.next().await.expect("the last event");
    assert_eq!((end.name.as_str(), end.id.as_str()), ("gap", ""));
    assert_eq!(again.next().await, None);
    let mut socket = websocket(relay.address, "home", &format!("&lastEventId={last}")).await;
    assert_eq!(code_of(message(&mut socket).await), 4002);
    // Whoever begins anew is served.
    let mut anew = Events::subscribe(relay.address, "home", None).await;
    publish(relay.agents, "home", &token, "on").await;
    assert_eq!(anew.data().await, "on");
    relay.stop().await;
}

#[tokio::test]
async fn who_does_not_read_is_closed_and_the_others_get_everything() {
    let relay = started().await;
    let token = relay.client("home", NewAuth::Public).await;
    let mut stalled = websocket(relay.address, "home", "").await;
    let mut stalled_events = Events::subscribe(relay.address, "home", None).await;
    let mut reads = websocket(relay.address, "home", "").await;
    let body = "x".repeat(200_000);
    let too_slow = "adit_subscriptions_ended_total{reason=\"too_slow\"}";
    let mut said = 0;
    while metric(&relay, too_slow).await < 2 {
        publish(relay.agents, "home", &token, format!("{said} {body}")).await;
        let got = message(&mut reads).await;
        assert!(got.to_text().expect("text").starts_with(&format!("{said} ")));
        said += 1;
        assert!(said < 500, "it is never too slow");
    }
    // What was on its way comes, without holes, and then the reason.
    let mut got = 0;
    let end = loop {
        match message(&mut stalled).await {
            Message::Text(text) => assert!(text.starts_with(&format!("{got} "))),
            other => break other,
        }
        got += 1;
    };
    assert_eq!(code_of(end), 4001);
    assert!(got < said);
    let mut got = 0;
    loop {
        let event = stalled_events.next().await.expect("a last event");
        if event.name == "too-slow" {
            break;
        }
        assert!(event.data.starts_with(&format!("{got} ")));
        got += 1;
    }
    assert_eq!(stalled_events.next().await, None);
    relay.stop().await;
}

#[tokio::test]
async fn deleting_the_client_or_revoking_a_token_ends_subscriptions() {
    let relay = started().await;
    let token = relay.client("home", NewAuth::Token).await;
    let client = harness::id("home");
    let signature = relay.registry.create_signature(&client).await.expect("a signature");
    let more = format!("&signature={}", signature.expose());
    let mut socket = websocket(relay.agents, "home", &more).await;
    publish(relay.address, "home", &token, "0").await;
    let before = publish(relay.address, "home", &token, "1").await;
    publish(relay.address, "home", &token, "after").await;
    for said in ["0", "1", "after"] {
        assert_eq!(message(&mut socket).await, Message::text(said));
    }
    let (token_id, _) = relay.registry.create_token(&client, None).await.expect("a token");
    relay.registry.revoke_token(&client, token_id).await.expect("revoked");
    assert_eq!(code_of(message(&mut socket).await), 4003);
    let mut again = websocket(relay.agents, "home", &more).await;
    relay.registry.delete_client(&client).await.expect("deleted");
    assert_eq!(code_of(message(&mut again).await), 4003);
    // Whoever has the name next is somebody else, and hears nothing of what was said before.
    let token = relay.client("home", NewAuth::Public).await;
    within("a new client of the name", async {
        while try_publish(relay.address, "home", &token, "2").await.0 != 202 {}
    })
    .await;
    let mut old = Events::subscribe(relay.address, "home", Some(&before)).await;
    assert_eq!(old.next().await.expect("the last event").name, "gap");
    relay.stop().await;
}

#[tokio::test]
async fn who_may_not_is_refused_and_too_much_is_too_much() {
    let relay = started().await;
    let token = relay.client("home", NewAuth::Token).await;
    assert_eq!(try_publish(relay.address, "home", "wrong", "x").await.0, 401);
    assert_eq!(try_publish(relay.address, "nobody", &token, "x").await.0, 401);
    let refused = |request: Request<AnyBody>| async { send(relay.address, request).await.status().as_u16() };
    let bare = request(Method::POST, "/adit/publish?clientId=home").body(full("x"));
    assert_eq!(refused(bare.expect("a request")).await, 401);
    let subscribe = |path: &str| {
        request(Method::GET, path)
            .header("accept", "text/event-stream")
            .body(full(""))
            .expect("a request")
    };
    assert_eq!(refused(subscribe("/adit/subscribe?clientId=home")).await, 401);
    assert_eq!(
        refused(subscribe("/adit/subscribe?clientId=home&signature=x")).await,
        401
    );
    let with_token = |method, path: &str| request(method, path).header("authorization", format!("Bearer {token}"));
    let bad_id =
        with_token(Method::GET, "/adit/subscribe?clientId=home&lastEventId=x").header("accept", "text/event-stream");
    assert_eq!(refused(bad_id.body(full("")).expect("a request")).await, 400);
    let no_events = with_token(Method::GET, "/adit/subscribe?clientId=home").body(full(""));
    assert_eq!(refused(no_events.expect("a request")).await, 400);
    let get = with_token(Method::GET, "/adit/publish?clientId=home").body(full(""));
    assert_eq!(refused(get.expect("a request")).await, 405);
    let longest = vec![b'x'; 1024 * 1024];
    assert_eq!(try_publish(relay.address, "home", &token, longest.clone()).await.0, 202);
    assert_eq!(
        try_publish(relay.address, "home", &token, [&longest[..], b"x"].concat())
            .await
            .0,
        413
    );
    relay.stop().await;
}

#[tokio::test]
async fn a_node_that_leaves_sends_its_subscribers_elsewhere() {
    let relay = started().await;
    relay.client("home", NewAuth::Public).await;
    let mut socket = websocket(relay.address, "home", "").await;
    let mut events = Events::subscribe(relay.address, "home", None).await;
    relay.shutdown.begin_drain();
    assert_eq!(code_of(message(&mut socket).await), 1012);
    assert_eq!(events.next().await.expect("the last event").name, "leaving");
    assert_eq!(events.next().await, None);
    drop((socket, events));
    relay.stop().await;
}

/// An agent whose upstream may publish; returns where.
async fn publishing_agent(relay: &TestRelay, token: &str) -> (SocketAddr, Shutdown, AbortOnDropHandle<()>) {
    let to = "http://127.0.0.1:9".parse().expect("an upstream");
    let url = format!("http://{}", relay.agents).parse().expect("a url");
    let config = agent::Config::new(url, harness::id("home"), token.parse().expect("a token"), to);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let agent = Agent::new(config).and_then(|agent| agent.publishing_on(listener));
    let shutdown = Shutdown::new();
    let run = agent.expect("an agent").run(shutdown.clone(), |_| {});
    (address, shutdown, AbortOnDropHandle::new(tokio::spawn(run)))
}

#[tokio::test]
async fn an_upstream_speaks_to_its_subscribers_through_its_agent() {
    let relay = started().await;
    let token = relay.client("home", NewAuth::Public).await;
    let (address, shutdown, agent) = publishing_agent(&relay, &token).await;
    let mut events = Events::subscribe(relay.address, "home", None).await;
    let post = |host: &str, body: Bytes| {
        let request = Request::post("/publish").header("host", host).body(full(body));
        send(address, request.expect("a request"))
    };
    for n in 0..10 {
        let (status, answer) = whole(post("localhost:4090", format!("{n}").into()).await).await;
        assert_eq!(status, 202, "{answer:?}");
        assert!(answer.starts_with(b"{\"position\":\""), "{answer:?}");
    }
    for n in 0..10 {
        assert_eq!(events.data().await, n.to_string());
    }
    assert_eq!(post("evil.example", "x".into()).await.status(), 403);
    let longest = Bytes::from(vec![b'x'; 1024 * 1024]);
    assert_eq!(post("127.0.0.1", longest.clone()).await.status(), 202);
    assert_eq!(
        post("127.0.0.1", [&longest[..], b"x"].concat().into()).await.status(),
        413
    );
    assert_eq!(events.data().await.len(), longest.len());
    // A token that is no good any more is the relay's to refuse, and its words are passed on.
    relay
        .registry
        .delete_client(&harness::id("home"))
        .await
        .expect("deleted");
    within("the relay refuses", async {
        while post("127.0.0.1", "x".into()).await.status() != 401 {}
    })
    .await;
    shutdown.end_now();
    within("the agent leaves", agent).await.expect("no panic");
    relay.stop().await;
}

#[tokio::test]
async fn an_agent_says_which_port_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_adit"));
    command.args([
        "http",
        "9",
        "--relay=http://127.0.0.1:9",
        "--client=home",
        "--token=t",
        "--publish",
        &address,
    ]);
    let output = within("it ends", command.env_clear().output())
        .await
        .expect("the binary runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(said.contains(&address) && said.contains("--publish"), "{said}");
}

/// The bus between two nodes loses, repeats and reorders, under printed seeds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_over_a_bus_that_loses_repeats_and_reorders() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = RelayConfig::default();
    let url = format!("sqlite:{}", dir.path().join("adit.db").display());
    config.database_url = url.parse().expect("a url");
    let hub = Hub::shared();
    let relay = TestRelay::two(config, &hub).await;
    let token = relay.client("home", NewAuth::Public).await;
    let faults = Faults {
        loss: 0.1,
        duplicate: 0.1,
        reorder: 0.1,
        ..Faults::default()
    };
    let mut events = Events::subscribe(relay.agents, "home", None).await;
    publish(relay.address, "home", &token, "begins").await;
    assert_eq!(events.data().await, "begins");
    for seed in 1..5 {
        println!("seed {seed}");
        let before = hub.tampered_with();
        hub.misbehave(faults, seed);
        for n in 0..50 {
            let body = format!("{seed} {n} {}", "x".repeat(n * 1000));
            publish(relay.address, "home", &token, body).await;
        }
        // Whoever says the last word is heard in the end: it says where it stands when it is quiet.
        for n in 0..50 {
            let event = events.next().await.expect("an event");
            let begin: String = event.data.chars().take(20).collect();
            assert!(
                event.data.starts_with(&format!("{seed} {n} ")),
                "seed {seed}, {n}: {} {begin}",
                event.name
            );
            if n == 40 {
                hub.behave();
            }
        }
        assert!(hub.tampered_with() > before, "seed {seed}: the bus behaved");
    }
    // Cut off and connected again: what was published meanwhile comes.
    let other = relay.peer.as_ref().expect("two nodes").registry.node_id();
    hub.cut_off(other);
    publish(relay.address, "home", &token, "while it was away").await;
    hub.reconnect(other);
    assert_eq!(events.data().await, "while it was away");
    let repaired = metric(&relay, "adit_fanout_gaps_total{end=\"repaired\"}").await;
    assert!(repaired > 0, "there were gaps");
    assert_eq!(metric(&relay, "adit_fanout_gaps_total{end=\"unrepaired\"}").await, 0);
    relay.stop().await;
}
