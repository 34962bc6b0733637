//! Tunnels come and go: several of one agent, newer ones that take over, requests that wait for one, tokens that are
//! revoked, agents that leave.

mod harness;

use std::{net::SocketAddr, time::Duration};

use adit::{
    cluster::registry::NewAuth,
    config::RelayConfig,
    ids::InstanceId,
    wire::{
        frame::Frame,
        hello::{self, AgentHello, RelayHello},
    },
};
use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use harness::{
    TestAgent, TestRelay, bodies, full,
    home::{Home, ask, metric, upstream, whole},
    send, until, within,
};
use http::{Method, Response};
use hyper::body::Incoming;
use tokio::{net::TcpStream, task::JoinHandle};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error, Message, client::IntoClientRequest},
};

async fn answered(task: JoinHandle<Response<Incoming>>) -> Response<Incoming> {
    within("an answer", task).await.expect("no panic")
}

/// An agent by hand: one tunnel, frame by frame.
struct ByHand {
    socket: WebSocketStream<TcpStream>,
    frames: Bytes,
}

impl ByHand {
    async fn dial(relay: SocketAddr, token: &str) -> Result<Self, Error> {
        let mut request = format!("ws://{relay}/ws?clientId=home").into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("authorization", format!("Bearer {token}").parse().expect("a value"));
        headers.insert("sec-websocket-protocol", "adit.v1".parse().expect("a value"));
        let stream = TcpStream::connect(relay).await.expect("the relay listens");
        let (socket, response) = within("a handshake", tokio_tungstenite::client_async(request, stream)).await?;
        assert_eq!(response.headers()["sec-websocket-protocol"], "adit.v1");
        Ok(Self {
            socket,
            frames: Bytes::new(),
        })
    }

    async fn tunnel(relay: SocketAddr, token: &str, instance_id: InstanceId, slot: u32) -> (Self, RelayHello) {
        let mut agent = Self::dial(relay, token).await.expect("a tunnel");
        let version = "by hand".into();
        agent
            .send(hello::to_frame(&AgentHello {
                generation: 1,
                instance_id,
                slot,
                version,
            }))
            .await;
        let Some(Frame::Hello(json)) = agent.next().await else {
            panic!("no hello")
        };
        (agent, hello::from_json(&json).expect("a hello"))
    }

    async fn send(&mut self, frame: Frame) {
        let mut message = BytesMut::new();
        frame.encode(&mut message);
        self.socket
            .send(Message::Binary(message.freeze()))
            .await
            .expect("the tunnel is open");
    }

    /// The next frame that is no ping; `None` when the tunnel is closed.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            match Frame::decode(&mut self.frames).expect("frames") {
                Some(Frame::Ping(_)) => continue,
                Some(frame) => return Some(frame),
                None => {}
            }
            match within("a message", self.socket.next()).await {
                Some(Ok(Message::Binary(message))) => self.frames = message,
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(_)) => {}
            }
        }
    }
}

#[tokio::test]
async fn one_agent_serves_through_two_tunnels() {
    let home = Home::start().await;
    assert_eq!(metric(&home.relay, "adit_tunnels").await, 2);
    let (mut bodies, mut answers) = (Vec::new(), Vec::new());
    for _ in 0..8 {
        let answer = home.get("/");
        bodies.push(home.calls.next().await.begin(Response::builder()).0);
        answers.push(answered(answer).await);
    }
    assert_eq!(metric(&home.relay, "adit_exchanges_in_flight").await, 8);
    for (body, answer) in bodies.into_iter().zip(answers) {
        assert!(body.write("x").await);
        drop(body);
        assert_eq!(whole(answer).await, (200, Bytes::from("x")));
    }
    home.relay.stop().await;
}

#[tokio::test]
async fn a_newer_tunnel_of_the_same_slot_takes_over_what_runs() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let instance = InstanceId::new();
    let (mut old, first) = ByHand::tunnel(relay.agents, &token, instance, 0).await;
    let request = ask(Method::GET, "/").body(full("")).expect("a request");
    let answer = tokio::spawn(send(relay.address, request));
    let Some(Frame::Open(id, _)) = old.next().await else {
        panic!("no request")
    };
    // The agent has heard of the exchange.
    old.send(Frame::Ack(
        id,
        adit::wire::stream::Ack {
            max_data: 1 << 16,
            ..Default::default()
        },
    ))
    .await;
    let (mut new, second) = ByHand::tunnel(relay.agents, &token, instance, 0).await;
    assert_ne!(first.tunnel_ws_id, second.tunnel_ws_id);
    assert_eq!(first.node_id, second.node_id);
    let mut last = None;
    while let Some(frame) = old.next().await {
        last = Some(frame);
    }
    assert_eq!(last, Some(Frame::Superseded), "its last word");
    let moved = loop {
        match new.next().await.expect("the exchange comes over") {
            Frame::Ack(moved, ack) if ack.moved => break moved,
            _ => {}
        }
    };
    assert_eq!(moved, id);
    assert_eq!(metric(&relay, "adit_tunnels").await, 1);
    new.send(Frame::Reset(id, adit::wire::frame::Code::UpstreamUnreachable))
        .await;
    assert_eq!(answered(answer).await.headers()["adit-error"], "upstream-unreachable");
    // Another slot, and another instance, supersede nothing.
    let (_beside, _) = ByHand::tunnel(relay.agents, &token, instance, 1).await;
    let (_other, _) = ByHand::tunnel(relay.agents, &token, InstanceId::new(), 0).await;
    assert_eq!(metric(&relay, "adit_tunnels").await, 3);
    drop((new, _beside, _other));
    relay.stop().await;
}

#[tokio::test]
async fn a_request_waits_for_an_agent_that_was_just_here() {
    let patient = |relay: &mut RelayConfig| relay.tunnels.park_timeout = Duration::from_secs(60);
    let home = Home::with(patient, |_| {}).await;
    home.agent.kill().await;
    let relay = &home.relay;
    let mut gone = metric(relay, "adit_tunnels").await;
    within("the tunnels are gone", async {
        while gone > 0 {
            gone = metric(relay, "adit_tunnels").await;
        }
    })
    .await;
    let answer = tokio::spawn(send(
        relay.address,
        ask(Method::POST, "/").body(full("x")).expect("a request"),
    ));
    within("the request is here", async {
        while metric(relay, "adit_exchanges_in_flight").await == 0 {}
    })
    .await;
    assert_eq!(home.calls.waiting().await, 0);
    let agent = TestAgent::start(relay.agents, "home", &home.token, home.upstream.address).await;
    home.calls.next().await.ok("late, not lost");
    assert_eq!(
        whole(answered(answer).await).await,
        (200, Bytes::from("late, not lost"))
    );
    agent.stop().await;
    home.relay.stop().await;
}

#[tokio::test]
async fn without_an_agent_the_answer_is_503_and_when_to_try_again() {
    let brief = |relay: &mut RelayConfig| relay.tunnels.park_timeout = Duration::from_millis(200);
    let home = Home::with(brief, |_| {}).await;
    home.relay.client("never", NewAuth::Public).await;
    home.agent.stop().await;
    for client in ["home", "never"] {
        let (status, headers, body) = home.relay.get(client, "/").await;
        assert_eq!(
            (status, &headers["adit-error"]),
            (503, &"no-tunnel".parse().expect("a value")),
            "{body:?}"
        );
        assert!(
            headers["retry-after"]
                .to_str()
                .expect("text")
                .parse::<u32>()
                .is_ok_and(|seconds| seconds > 0)
        );
    }
    assert_eq!(home.relay.get("unknown", "/").await.0, 404);
    assert_eq!(home.calls.waiting().await, 0);
    home.relay.stop().await;
}

#[tokio::test]
async fn a_revoked_token_closes_its_tunnels_and_cuts_what_runs_through_them() {
    let home = Home::with(|relay| relay.tunnels.resume_timeout = Duration::from_secs(3600), |_| {}).await;
    let reading = home.get("/");
    let (body, ..) = home.calls.next().await.begin(Response::builder());
    assert!(body.write("half").await);
    let mut reading = answered(reading).await.into_body();
    assert_eq!(bodies::next(&mut reading).await, Some(Bytes::from("half")));
    let waiting = home.send(ask(Method::POST, "/").body(full("x")).expect("a request"));
    let unanswered = home.calls.next().await;
    let mut events = home.agent.events.subscribe();

    let client = home
        .relay
        .registry
        .client(&harness::id("home"))
        .await
        .expect("the registry")
        .expect("known");
    let tokens = home
        .relay
        .registry
        .list_tokens(&client.client_id)
        .await
        .expect("the registry");
    for token in tokens {
        home.relay
            .registry
            .revoke_token(&client.client_id, token.token_id)
            .await
            .expect("revoked");
    }
    assert!(!bodies::ends_well(&mut reading).await);
    assert_eq!(answered(waiting).await.status(), 502);
    until("the upstream's request is given up", || unanswered.is_given_up()).await;
    body.closed().await;
    let refused = async {
        loop {
            if let Ok(adit::agent::Event::Disconnected { why, .. }) = events.recv().await
                && why.contains("token")
            {
                return;
            }
        }
    };
    within("the agent is told why", refused).await;
    assert_eq!(metric(&home.relay, "adit_tunnels").await, 0);
    home.relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_stops_finishes_and_another_takes_over() {
    let home = Home::start().await;
    let down = home.get("/");
    let (body, ..) = home.calls.next().await.begin(Response::builder());
    let mut down = answered(down).await.into_body();
    let (second, calls) = upstream().await;
    let other = TestAgent::start(home.relay.agents, "home", &home.token, second.address).await;
    let stopping = tokio::spawn(home.agent.stop());
    // Its tunnels take no more as soon as the relay has heard.
    within("new requests go to the other", async {
        loop {
            let answer = tokio::spawn(send(
                home.relay.address,
                ask(Method::GET, "/").body(full("")).expect("a request"),
            ));
            let by_other = tokio::select! {
                call = calls.next() => { call.ok("other"); true }
                call = home.calls.next() => { call.ok("first"); false }
            };
            assert_eq!(whole(answered(answer).await).await.0, 200);
            if by_other {
                break;
            }
        }
    })
    .await;
    assert!(!stopping.is_finished(), "it finishes first");
    tokio::spawn(body.write_long(1, 3_000_000));
    assert_eq!(bodies::sum(&mut down).await, Ok(bodies::sum_of_long(1, 3_000_000)));
    within("the agent leaves", stopping).await.expect("no panic");
    for _ in 0..10 {
        let answer = tokio::spawn(send(
            home.relay.address,
            ask(Method::GET, "/").body(full("")).expect("a request"),
        ));
        calls.next().await.ok("other");
        assert_eq!(answered(answer).await.status(), 200);
    }
    other.stop().await;
    home.relay.stop().await;
}

/// How ready the node says it is.
async fn ready(relay: &TestRelay) -> u16 {
    let request = http::Request::get("/readyz").header("host", "admin").body(full(""));
    send(relay.admin, request.expect("a request")).await.status().as_u16()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_drains_finishes_what_it_holds() {
    let home = Home::start().await;
    let down = home.get("/");
    let (body, ..) = home.calls.next().await.begin(Response::builder());
    let mut down = answered(down).await.into_body();
    assert_eq!(ready(&home.relay).await, 200);
    home.relay.shutdown.begin_drain();
    within("it says so", async { while ready(&home.relay).await != 503 {} }).await;
    let refused = ByHand::dial(home.relay.address, &home.token).await.err();
    let Some(Error::Http(refusal)) = refused else {
        panic!("a new tunnel: {refused:?}")
    };
    assert_eq!(refusal.status(), 503);
    home.works().await;
    tokio::spawn(body.write_long(1, 3_000_000));
    assert_eq!(bodies::sum(&mut down).await, Ok(bodies::sum_of_long(1, 3_000_000)));
    drop(down);
    home.relay.stop().await;
}

#[tokio::test]
async fn the_second_signal_ends_at_once_and_breaks_what_is_left() {
    let home = Home::start().await;
    let down = home.get("/");
    let (body, ..) = home.calls.next().await.begin(Response::builder());
    assert!(body.write("half").await);
    let mut down = answered(down).await.into_body();
    assert_eq!(bodies::next(&mut down).await, Some(Bytes::from("half")));
    home.relay.shutdown.begin_drain();
    within("it drains", async { while ready(&home.relay).await != 503 {} }).await;
    home.relay.shutdown.end_now();
    home.relay.stop().await;
    assert!(!bodies::ends_well(&mut down).await);
}
