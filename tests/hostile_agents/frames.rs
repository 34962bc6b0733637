//! A1, A2, A6: frames for others, frames out of all order, and tunnels that take each other's place.

use adit::{
    cluster::registry::NewAuth,
    ids::{InstanceId, RequestId},
    wire::{
        frame::{Code, Frame, MAX_PAYLOAD, SUBPROTOCOL},
        hello::{self, AgentHello, RelayHello},
        socket::{FrameSocket, Side},
        stream::Ack,
    },
};
use bytes::{BufMut, Bytes, BytesMut};
use proptest::{
    prelude::*,
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

use crate::{
    ask, counted, get,
    harness::raw::RawAnswer,
    harness::tunnel::{RawTunnel, data, response, stream_frame},
    harness::{TestAgent, TestRelay, TestUpstream, within},
};

const OK: &[(&[u8], &[u8])] = &[(b"content-length", b"5")];

fn whole(body: &[u8]) -> Vec<u8> {
    [response(200, OK), data(body)].concat()
}

fn ack() -> Ack {
    Ack {
        upto: 1 << 40,
        max_data: 1 << 50,
        missing_to: 0,
        moved: true,
        probe: 1,
        answer: 1,
    }
}

#[tokio::test]
async fn a1_an_agent_that_speaks_in_anothers_exchange_is_closed_and_nothing_reaches_the_other() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let evil_token = relay.client("evil", NewAuth::Public).await;
    let mut home = RawTunnel::open(relay.agents, "home", &token, InstanceId::new()).await;
    let forgeries: [fn(RequestId) -> Frame; 4] = [
        |id| stream_frame(id, 0, whole(b"owned"), true),
        |id| Frame::Ack(id, ack()),
        |id| Frame::Reset(id, Code::UpstreamFailed),
        |id| Frame::Stop(id, Code::Cancelled),
    ];
    // Of another tenant, and of another process of the same tenant.
    let liars = [("evil", &evil_token), ("home", &token)];
    let mut closed = 0;
    for forge in forgeries {
        for (client, token) in liars {
            let mut socket = TcpStream::connect(relay.address).await.expect("the relay listens");
            socket.write_all(get("home", "GET /").as_bytes()).await.expect("sent");
            let id = home.opened().await;
            let mut liar = RawTunnel::open(relay.agents, client, token, InstanceId::new()).await;
            liar.send(&[forge(id)]).await;
            within("the liar is closed", liar.closed()).await;
            closed += 1;
            counted(
                &relay,
                &format!("adit_protocol_violations_total{{kind=\"foreign\"}} {closed}"),
            )
            .await;
            home.answer(id, whole(b"right")).await;
            let answer = RawAnswer::read(&mut socket).await;
            assert_eq!((answer.status(), answer.body()), (200, &b"right"[..]), "{answer:?}");
        }
    }
}

#[tokio::test]
async fn a2_frames_in_any_disorder_end_their_tunnel_or_exchange_at_most() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let other_token = relay.client("other", NewAuth::Public).await;
    let upstream = TestUpstream::echo().await;
    let _other = TestAgent::start(relay.agents, "other", &other_token, upstream.address).await;
    let encoded = |frame: Frame| {
        let mut out = BytesMut::new();
        frame.encode(&mut out);
        out.freeze()
    };
    let id = RequestId::new();
    let hello = AgentHello {
        generation: 1,
        instance_id: InstanceId::new(),
        slot: 0,
        version: String::new(),
    };
    let truncated = |frame: Frame| {
        let bytes = encoded(frame);
        bytes.slice(..bytes.len() - 1)
    };
    let mut long = BytesMut::new();
    long.put_slice(b"\x11\0\x40\x1a");
    long.put_slice(&[0; MAX_PAYLOAD + 26]);
    let endings: Vec<(&str, Bytes, &str)> = vec![
        (
            "an OPEN",
            encoded(Frame::Open(
                id,
                adit::wire::stream::Chunk {
                    offset: 0,
                    fin: true,
                    data: Bytes::new(),
                },
            )),
            "malformed",
        ),
        ("a DONE", encoded(Frame::Done(id)), "malformed"),
        ("a second hello", encoded(hello::to_frame(&hello)), "malformed"),
        (
            "half a STREAM",
            truncated(stream_frame(id, 0, vec![1], true)),
            "malformed",
        ),
        ("half a header", Bytes::from_static(b"\x11\0"), "malformed"),
        ("a body too short", Bytes::from_static(b"\x14\0\0\x03abc"), "malformed"),
        ("too much payload", long.freeze(), "too_long"),
        ("a message too long", Bytes::from(vec![0x7f; 64 * 1024]), "too_long"),
    ];
    for (what, message, kind) in endings {
        let before = violations(&relay, kind).await;
        let mut agent = RawTunnel::open(relay.agents, "home", &token, InstanceId::new()).await;
        agent.send_bytes(message).await;
        within(what, agent.closed()).await;
        counted(
            &relay,
            &format!("adit_protocol_violations_total{{kind=\"{kind}\"}} {}", before + 1),
        )
        .await;
        assert_eq!(relay.get("other", "/").await.0, 200, "after {what}");
    }
    // What is of a later version, or late, is no reason to end anything.
    let mut agent = RawTunnel::open(relay.agents, "home", &token, InstanceId::new()).await;
    agent.send_bytes(Bytes::from_static(b"\x7f\0\0\x03new")).await;
    agent
        .send(&[
            stream_frame(id, 7, b"late".to_vec(), true),
            Frame::Ack(id, ack()),
            Frame::Reset(id, Code::Gone),
        ])
        .await;
    let answered = async {
        let id = agent.opened().await;
        agent.answer(id, whole(b"hello")).await;
        agent.answer(id, whole(b"twice")).await;
        agent.answer(id, whole(b"after")).await;
        agent
    };
    let (answer, _agent) = tokio::join!(ask(&relay, "home", "GET /"), answered);
    assert_eq!((answer.status(), answer.body()), (200, &b"hello"[..]), "{answer:?}");
}

async fn violations(relay: &TestRelay, kind: &str) -> u64 {
    let page = crate::metrics(relay.peer.as_deref().unwrap_or(relay)).await;
    let name = format!("adit_protocol_violations_total{{kind=\"{kind}\"}} ");
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(&name))
        .expect("the series");
    line.trim().parse().expect("a number")
}

/// Chunks of an answer at odd offsets, and frames of the exchange with any values.
fn disorder() -> impl Strategy<Value = Vec<(u8, u64, Vec<u8>, bool)>> {
    let offset = prop_oneof![Just(0u64), 0u64..64, Just(u64::MAX), Just(u64::MAX - 3), any::<u64>()];
    let payload = prop_oneof![Just(whole(b"right")), prop::collection::vec(any::<u8>(), 0..64)];
    prop::collection::vec((0u8..9, offset, payload, any::<bool>()), 1..8)
}

#[tokio::test]
async fn a2_random_frames_and_bytes_harm_nobody_else() {
    let relay = TestRelay::with(|config| {
        config.tunnels.park_timeout = std::time::Duration::ZERO;
        config.tunnels.resume_timeout = std::time::Duration::from_millis(100);
    })
    .await;
    let token = relay.client("home", NewAuth::Public).await;
    let other_token = relay.client("other", NewAuth::Public).await;
    let upstream = TestUpstream::echo().await;
    let _other = TestAgent::start(relay.agents, "other", &other_token, upstream.address).await;
    let mut runner = TestRunner::deterministic();
    for round in 0..60 {
        let frames = disorder().new_tree(&mut runner).expect("a tree").current();
        let mut agent = RawTunnel::open(relay.agents, "home", &token, InstanceId::new()).await;
        let (mut socket, id) = reached(&relay, &mut agent).await;
        for (kind, offset, bytes, fin) in &frames {
            match kind {
                0..4 => agent.send(&[stream_frame(id, *offset, bytes.clone(), *fin)]).await,
                4 => {
                    agent
                        .send(&[Frame::Ack(
                            id,
                            Ack {
                                upto: *offset,
                                max_data: *offset,
                                ..ack()
                            },
                        )])
                        .await
                }
                5 => agent.send(&[Frame::Stop(id, Code::Other(*offset as u32))]).await,
                6 => {
                    agent
                        .send(&[Frame::Ack(
                            id,
                            Ack {
                                missing_to: *offset,
                                ..ack()
                            },
                        )])
                        .await
                }
                _ => agent.send_bytes(Bytes::from(bytes.clone())).await,
            }
        }
        agent.send(&[Frame::Goodbye]).await;
        drop(agent);
        let answer = RawAnswer::read(&mut socket).await;
        assert!(
            [200, 502, 503].contains(&answer.status()) || answer.bytes.is_empty(),
            "{round}: {frames:?}: {answer:?}"
        );
        assert_eq!(relay.get("other", "/").await.0, 200, "after {frames:?}");
    }
    relay.stop().await;
}

/// A request that has reached the agent. Where requests do not wait, one may come before its node has heard of the agent.
async fn reached(relay: &TestRelay, agent: &mut RawTunnel) -> (TcpStream, RequestId) {
    loop {
        let mut socket = TcpStream::connect(relay.address).await.expect("the relay listens");
        socket.write_all(get("home", "GET /").as_bytes()).await.expect("sent");
        tokio::select! {
            id = agent.opened() => return (socket, id),
            answer = RawAnswer::read(&mut socket) => assert_eq!(answer.status(), 503, "{answer:?}"),
        }
    }
}

#[tokio::test]
async fn a2_a_first_message_that_is_no_hello() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let bad: [&[u8]; 7] = [
        b"",
        b"\x02\0\0\x08\0\0\0\0\0\0\0\x01",
        b"\x01\0\0\x02{}",
        b"\x01\0\0\x01\xff",
        b"\x01",
        b"{}",
        b"\x01\0\0\x04null",
    ];
    for (at, message) in bad.into_iter().enumerate() {
        let mut agent = RawTunnel::connect(relay.agents, "home", &token)
            .await
            .expect("a WebSocket");
        agent.send_bytes(Bytes::copy_from_slice(message)).await;
        within("it is closed", agent.closed()).await;
        counted(
            &relay,
            &format!("adit_protocol_violations_total{{kind=\"hello\"}} {}", at + 1),
        )
        .await;
    }
    relay.stop().await;
}

#[tokio::test]
async fn a6_the_older_tunnel_of_a_slot_is_told_and_closed_every_time() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let instance_id = InstanceId::new();
    let mut held = RawTunnel::open(relay.agents, "home", &token, instance_id).await;
    for _ in 0..20 {
        let newer = RawTunnel::open(relay.agents, "home", &token, instance_id).await;
        let mut older = std::mem::replace(&mut held, newer);
        assert_eq!(older.next().await, Some(Frame::Superseded));
        within("it is closed", older.closed()).await;
        counted(&relay, "adit_tunnels 1").await;
    }
    let (answer, ()) = tokio::join!(ask(&relay, "home", "GET /"), async {
        let id = held.opened().await;
        held.answer(id, whole(b"right")).await;
    });
    assert_eq!((answer.status(), answer.body()), (200, &b"right"[..]), "{answer:?}");
}

/// A relay by hand that tells an agent that it was superseded, and closes.
#[tokio::test]
async fn a6_an_agent_that_is_superseded_stays_away() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let relay = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("the agent");
        #[expect(clippy::result_large_err, reason = "the library's own signature")]
        let agree = |_: &_, mut response: tokio_tungstenite::tungstenite::handshake::server::Response| {
            let protocol = http::HeaderValue::from_static(SUBPROTOCOL);
            response.headers_mut().insert("sec-websocket-protocol", protocol);
            Ok(response)
        };
        let ws = tokio_tungstenite::accept_hdr_async(stream, agree)
            .await
            .expect("a handshake");
        let mut socket = FrameSocket::new(ws.into_inner(), Side::Relay).await;
        socket.message().await.expect("a hello").expect("a message");
        let hello = RelayHello {
            node_id: adit::ids::NodeId::new(),
            tunnel_ws_id: adit::ids::TunnelId::new(),
            public_url: "http://x/".into(),
            ping_interval_ms: 15_000,
            ping_timeout_ms: 10_000,
            resume_timeout_ms: 30_000,
        };
        let mut message = BytesMut::new();
        hello::to_frame(&hello).encode(&mut message);
        Frame::Superseded.encode(&mut message);
        socket.send(message.freeze()).await.expect("sent");
        drop(socket);
    });
    let (events_tx, mut events_rx) = tokio::sync::mpsc::unbounded_channel();
    let mut config = adit::agent::Config::new(
        format!("http://{address}").parse().expect("a url"),
        "home".parse().expect("an id"),
        "token".parse().expect("a token"),
        "1".parse().expect("an upstream"),
    );
    config.connections = 1;
    let shutdown = adit::shutdown::Shutdown::new();
    let agent = adit::agent::Agent::new(config).expect("an agent");
    let running = tokio::spawn(agent.run(shutdown.clone(), move |event| drop(events_tx.send(event))));
    relay.await.expect("no panic");
    let retry_in = within("it is told", async {
        loop {
            if let Some(adit::agent::Event::Disconnected { retry_in, .. }) = events_rx.recv().await {
                return retry_in;
            }
        }
    })
    .await;
    assert!(retry_in >= std::time::Duration::from_secs(30), "{retry_in:?}");
    shutdown.end_now();
    within("the agent ends", running).await.expect("no panic");
}
