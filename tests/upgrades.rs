//! WebSockets through the tunnel: the handshake, the messages, and how they end.

mod harness;

use std::net::SocketAddr;

use adit::cluster::registry::NewAuth;
use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use harness::{
    TestAgent, TestRelay,
    by_hand::{Raw, RawUpstream},
    home::metric,
    proxy::FaultProxy,
    until, within,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest,
        handshake::server::{Request, Response},
        protocol::{
            CloseFrame,
            frame::{
                Frame,
                coding::{CloseCode, Data, OpCode},
            },
        },
    },
};
use tokio_util::task::AbortOnDropHandle;

/// A WebSocket server: one function a connection.
async fn websocket<F, Fut>(serve: F) -> (SocketAddr, AbortOnDropHandle<()>)
where
    F: Fn(WebSocketStream<TcpStream>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let chosen = tokio_tungstenite::accept_hdr_async(stream, choose).await;
            tokio::spawn(serve(chosen.expect("a handshake")));
        }
    });
    (address, AbortOnDropHandle::new(task))
}

/// Chooses the second of the sub-protocols, if there are two.
#[expect(clippy::result_large_err, reason = "the library's signature")]
fn choose(
    request: &Request,
    mut response: Response,
) -> Result<Response, tokio_tungstenite::tungstenite::handshake::server::ErrorResponse> {
    let offered = request
        .headers()
        .get("sec-websocket-protocol")
        .and_then(|offered| offered.to_str().ok());
    if let Some(second) = offered.and_then(|offered| offered.split(", ").nth(1)) {
        response
            .headers_mut()
            .insert("sec-websocket-protocol", second.parse().expect("a value"));
    }
    Ok(response)
}

/// Sends every message back as it is, and answers a close with its own.
async fn echo(socket: WebSocketStream<TcpStream>) {
    let (mut out, mut messages) = socket.split();
    while let Some(Ok(message)) = messages.next().await {
        if message.is_text() || message.is_binary() {
            out.send(message).await.ok();
        }
    }
}

struct Line {
    relay: TestRelay,
    _agent: TestAgent,
}

async fn line(to: SocketAddr) -> Line {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let agent = TestAgent::start(relay.agents, "home", &token, to).await;
    Line { relay, _agent: agent }
}

async fn connect(relay: SocketAddr, protocols: &str) -> (WebSocketStream<TcpStream>, http::Response<Option<Vec<u8>>>) {
    let mut request = format!("ws://{relay}/socket?clientId=home")
        .into_client_request()
        .expect("a url");
    if !protocols.is_empty() {
        let offered = protocols.parse().expect("a value");
        request.headers_mut().insert("sec-websocket-protocol", offered);
    }
    let stream = TcpStream::connect(relay).await.expect("the relay listens");
    within("a handshake", tokio_tungstenite::client_async(request, stream))
        .await
        .expect("a WebSocket")
}

async fn next<S: Stream<Item = Result<Message, Error>> + Unpin>(socket: &mut S) -> Message {
    within("a message", socket.next())
        .await
        .expect("one more")
        .expect("a message")
}

async fn send<S: Sink<Message, Error = Error> + Unpin>(socket: &mut S, message: Message) {
    within("a message leaves", socket.send(message))
        .await
        .expect("the socket is open");
}

fn fragment(text: &'static str, code: Data, last: bool) -> Message {
    Message::Frame(Frame::message(Bytes::from(text), OpCode::Data(code), last))
}

#[tokio::test]
async fn messages_of_every_kind_come_back() {
    let (upstream, _task) = websocket(echo).await;
    let line = line(upstream).await;
    let (mut socket, response) = connect(line.relay.address, "chat.v1, chat.v2").await;
    assert_eq!(response.headers()["sec-websocket-protocol"], "chat.v2");
    let long = harness::pattern(1, 0, 1 << 20);
    for message in [
        Message::text("grüße"),
        Message::binary(long),
        Message::text(""),
        Message::binary(vec![0]),
    ] {
        send(&mut socket, message.clone()).await;
        assert_eq!(next(&mut socket).await, message);
    }
    for part in [
        fragment("one ", Data::Text, false),
        fragment("two ", Data::Continue, false),
    ] {
        send(&mut socket, part).await;
    }
    send(&mut socket, Message::Ping(Bytes::from("between"))).await;
    assert_eq!(next(&mut socket).await, Message::Pong(Bytes::from("between")));
    send(&mut socket, fragment("three", Data::Continue, true)).await;
    assert_eq!(next(&mut socket).await, Message::text("one two three"));
    drop(socket);
    line.relay.stop().await;
}

#[tokio::test]
async fn the_close_codes_of_both_sides_are_kept() {
    let close = |code: u16, reason: &str| CloseFrame {
        code: CloseCode::from(code),
        reason: reason.into(),
    };
    let (upstream, _task) = websocket(move |mut socket| async move {
        send(&mut socket, Message::text("the upstream speaks first")).await;
        match next(&mut socket).await {
            Message::Close(frame) => assert_eq!(frame, Some(close(4001, "mine"))),
            _ => drop(socket.close(Some(close(4002, "yours"))).await),
        }
        while let Some(Ok(_)) = socket.next().await {}
    })
    .await;
    let line = line(upstream).await;
    let first = Message::text("the upstream speaks first");

    let (mut socket, response) = connect(line.relay.address, "").await;
    assert!(!response.headers().contains_key("sec-websocket-protocol"));
    assert_eq!(next(&mut socket).await, first);
    socket.close(Some(close(4001, "mine"))).await.expect("it closes");
    assert_eq!(
        next(&mut socket).await,
        Message::Close(Some(close(4001, "mine"))),
        "answered"
    );
    assert!(within("the end", socket.next()).await.is_none(), "and ended");
    drop(socket);

    let (mut socket, _) = connect(line.relay.address, "").await;
    assert_eq!(next(&mut socket).await, first);
    send(&mut socket, Message::text("leave")).await;
    assert_eq!(next(&mut socket).await, Message::Close(Some(close(4002, "yours"))));
    drop(socket);
    line.relay.stop().await;
}

#[tokio::test]
async fn a_side_that_vanishes_takes_the_other_with_it() {
    let (ended_tx, mut ended_rx) = tokio::sync::mpsc::channel(1);
    let (upstream, _task) = websocket(move |mut socket| {
        let ended = ended_tx.clone();
        async move {
            while let Some(Ok(message)) = socket.next().await {
                if message == Message::text("vanish") {
                    return;
                }
                send(&mut socket, message).await;
            }
            ended.send(()).await.ok();
        }
    })
    .await;
    let line = line(upstream).await;
    let (mut socket, _) = connect(line.relay.address, "").await;
    send(&mut socket, Message::text("there")).await;
    assert_eq!(next(&mut socket).await, Message::text("there"));
    drop(socket);
    within("the upstream's socket ends", ended_rx.recv()).await;

    let (mut socket, _) = connect(line.relay.address, "").await;
    send(&mut socket, Message::text("vanish")).await;
    assert!(
        within("the downstream's socket ends", socket.next())
            .await
            .is_none_or(|ended| ended.is_err())
    );
    drop(socket);
    line.relay.stop().await;
}

#[tokio::test]
async fn messages_in_flight_survive_cuts_of_the_agents_cable() {
    let (upstream, _task) = websocket(echo).await;
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let proxy = FaultProxy::start(relay.agents).await;
    let _agent = TestAgent::start(proxy.address, "home", &token, upstream).await;
    let (mut socket, _) = connect(relay.address, "").await;
    for round in 0..8 {
        let cuts = proxy.cuts();
        let length = if round % 2 == 0 { 10 } else { 300_000 };
        let messages: Vec<_> = (0..4)
            .map(|n| Message::binary(harness::pattern(round, n, length)))
            .collect();
        for message in &messages {
            send(&mut socket, message.clone()).await;
        }
        proxy.cut();
        until("the cut", || proxy.cuts() > cuts).await;
        for message in messages {
            assert!(next(&mut socket).await == message, "round {round}");
        }
    }
    assert!(metric(&relay, "adit_exchanges_moved_total").await > 0);
    drop(socket);
    proxy.heal();
    relay.stop().await;
}

#[tokio::test]
async fn an_upstream_that_refuses_the_upgrade_is_heard() {
    let upstream = RawUpstream::start(|mut peer| async move {
        peer.head().await;
        peer.write("HTTP/1.1 403 Forbidden\r\ncontent-length: 3\r\n\r\nno!")
            .await;
        let _ = peer.rest().await;
    })
    .await;
    let line = line(upstream.address).await;
    let mut downstream = Raw::connect(line.relay.address).await;
    downstream.write(HANDSHAKE).await;
    let head = downstream.head().await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    downstream.until("no!").await;
    drop(downstream);
    line.relay.stop().await;
}

const HANDSHAKE: &str = "GET / HTTP/1.1\r\nhost: relay\r\nadit-client: home\r\nconnection: Upgrade\r\n\
     upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

#[tokio::test]
async fn what_one_side_says_after_the_other_has_ended_arrives() {
    let (heard_tx, mut heard_rx) = tokio::sync::mpsc::channel(1);
    let upstream = RawUpstream::start(move |mut peer| {
        let heard = heard_tx.clone();
        async move {
            peer.head().await;
            peer.write("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nbye").await;
            tokio::io::AsyncWriteExt::shutdown(&mut peer.stream).await.expect("half-closed");
            let (rest, end) = peer.rest().await;
            heard.send((rest.len(), end.is_ok())).await.ok();
        }
    })
    .await;
    let line = line(upstream.address).await;
    let mut downstream = Raw::connect(line.relay.address).await;
    downstream.write(HANDSHAKE).await;
    downstream.head().await;
    downstream.until("bye").await;
    downstream.write(harness::pattern(1, 0, 1_000_000)).await;
    tokio::io::AsyncWriteExt::shutdown(&mut downstream.stream)
        .await
        .expect("half-closed");
    assert_eq!(
        within("the upstream hears the end", heard_rx.recv()).await,
        Some((1_000_000, true))
    );
    line.relay.stop().await;
}
