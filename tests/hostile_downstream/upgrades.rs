//! Upgrades: asked for badly, answered badly, and bytes that came too early.

use tokio::io::AsyncWriteExt;

use crate::{
    harness::raw::{Call, OK, RawAnswer, RawUpstream},
    harness::until,
    world::{CLOSE, World, assert_problem, get, request},
};

const WEBSOCKET: &str = "connection: upgrade\r\nupgrade: websocket\r\n";
const KEY: &str = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const VERSION: &str = "sec-websocket-version: 13\r\n";
/// Of the key above (RFC 6455 §1.3).
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
/// A masked text frame, or the beginning of anything.
const EARLY: &[u8] = b"\x81\x85\0\0\0\0hello";

fn ask(path: &str) -> String {
    request(&format!("GET {path}"), &format!("{WEBSOCKET}{KEY}{VERSION}"), "")
}

#[tokio::test]
async fn p20_other_upgrades_are_plain_requests_and_the_next_one_follows() {
    let world = World::open().await;
    for other in ["foo", "h2c", "TLS/1.0", "websocket2"] {
        let settings = "connection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n";
        let plain = request("GET /1", &format!("{settings}upgrade: {other}\r\n"), "");
        let answer = world.send(format!("{plain}{}", get(CLOSE))).await;
        let text = String::from_utf8_lossy(&answer.bytes).into_owned();
        assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 2, "{other}: {answer:?}");
        let seen = world.upstream.take();
        assert_eq!(seen.iter().map(Call::path).collect::<Vec<_>>(), ["/1", "/x"], "{other}");
        for name in ["upgrade", "connection", "http2-settings"] {
            assert_eq!(seen[0].value(name), "", "{other}: {name}");
        }
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p21_websockets_that_are_not_asked_for_properly() {
    let world = World::open().await;
    let full = format!("{WEBSOCKET}{KEY}{VERSION}");
    let bad = "bad-request";
    world
        .refuses(
            400,
            bad,
            request("GET /", &format!("{full}content-length: 3\r\n"), "abc"),
        )
        .await;
    world
        .refuses(
            400,
            bad,
            request("GET /", &format!("{full}transfer-encoding: chunked\r\n"), "0\r\n\r\n"),
        )
        .await;
    world.refuses(400, bad, request("POST /", &full, "")).await;
    world
        .refuses(400, bad, request("GET /", &format!("{WEBSOCKET}{VERSION}"), ""))
        .await;
    world
        .refuses(
            400,
            bad,
            request("GET /", &format!("{WEBSOCKET}{VERSION}sec-websocket-key: bad\r\n"), ""),
        )
        .await;
    world
        .refuses(400, bad, request("GET /", &format!("{full}{KEY}"), ""))
        .await;
    world
        .refuses(400, bad, request("GET /", &full, "").replace("HTTP/1.1", "HTTP/1.0"))
        .await;
    let old = format!("{WEBSOCKET}{KEY}sec-websocket-version: 12\r\n");
    world.refuses(426, "upgrade-required", request("GET /", &old, "")).await;
    world.still_serves().await;
}

fn answers(call: &Call) -> Vec<u8> {
    let switch = |accept: &str| {
        format!("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n{accept}\r\n")
            .into_bytes()
    };
    match call.path().as_str() {
        "/good" => switch(&format!("sec-websocket-accept: {ACCEPT}\r\n")),
        "/wrong" => switch("sec-websocket-accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n"),
        "/missing" | "/unasked" => switch(""),
        "/403" => b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno".to_vec(),
        _ => OK.to_vec(),
    }
}

#[tokio::test]
async fn p22_an_upgrade_that_is_declined_is_a_framed_response() {
    let world = World::with(|_| {}, RawUpstream::start(answers).await).await;
    for (path, status, body) in [("/200", 200, "ok"), ("/403", 403, "no")] {
        let mut socket = world.begin(ask(path)).await;
        let answer = RawAnswer::read_until(&mut socket, format!("\r\n\r\n{body}").as_bytes()).await;
        assert_eq!(answer.status(), status, "{answer:?}");
        assert_eq!(answer.values("content-length"), [b"2".to_vec()]);
        assert!(answer.values("upgrade").is_empty(), "{answer:?}");
        // It is no tunnel: what comes now is not for the upstream.
        socket.write_all(EARLY).await.expect("sent");
        let rest = RawAnswer::read(&mut socket).await;
        assert!(rest.bytes.is_empty() || rest.status() == 400, "{rest:?}");
        assert_eq!(world.upstream.take().len(), 1);
    }
    assert_no_tail(&world, 2).await;
    world.still_serves().await;
}

#[tokio::test]
async fn p22_a_switch_that_does_not_match_is_a_502() {
    let world = World::with(|_| {}, RawUpstream::start(answers).await).await;
    for (at, path) in ["/wrong", "/missing"].into_iter().enumerate() {
        let mut socket = world.begin([ask(path).as_bytes(), EARLY].concat()).await;
        let answer = RawAnswer::read_until(&mut socket, b"}").await;
        assert_eq!(answer.status(), 502, "{answer:?}");
        assert!(answer.head().contains("adit-error: upstream-failed"), "{answer:?}");
        assert_no_tail(&world, at + 1).await;
    }
    let unasked = world.send(request("GET /unasked", CLOSE, "")).await;
    assert_problem(&unasked, 502, "upstream-failed", "unasked");
    assert_no_tail(&world, 3).await;
    world.still_serves().await;
}

#[tokio::test]
async fn p22_bytes_before_the_101_are_never_delivered() {
    let world = World::with(|_| {}, RawUpstream::start(answers).await).await;
    let smuggled = request("GET /smuggled", "", "");
    for (at, early) in [EARLY, smuggled.as_bytes(), b"x"].into_iter().enumerate() {
        for path in ["/200", "/403", "/good"] {
            world.upstream.take();
            world
                .send([ask(path).as_bytes(), early, get(CLOSE).as_bytes()].concat())
                .await;
            if path == "/good" {
                let calls = world.upstream.take();
                assert_eq!(calls.iter().map(Call::path).collect::<Vec<_>>(), ["/good"], "{at}");
            }
        }
    }
    world.upstream.take();
    until("all have ended", || world.upstream.ended().len() >= 9).await;
    assert!(
        world.upstream.ended().iter().all(|ended| ended.tail.is_empty()),
        "{:?}",
        world.upstream.ended()
    );
    world.still_serves().await;
}

#[tokio::test]
async fn p22_bytes_after_the_101_are_delivered() {
    let world = World::with(|_| {}, RawUpstream::start(answers).await).await;
    let mut socket = world.begin(ask("/good")).await;
    let answer = RawAnswer::read_until(&mut socket, b"\r\n\r\n").await;
    assert_eq!(answer.status(), 101, "{answer:?}");
    assert_eq!(answer.values("sec-websocket-accept"), [ACCEPT.as_bytes().to_vec()]);
    socket.write_all(EARLY).await.expect("sent");
    socket.shutdown().await.expect("ended");
    let rest = RawAnswer::read(&mut socket).await;
    assert!(rest.bytes.is_empty() && !rest.reset, "{rest:?}");
    assert_eq!(world.upstream.ended()[0].tail, EARLY);
    world.still_serves().await;
}

async fn assert_no_tail(world: &World, connections: usize) {
    until("the upstream's connection ends", || {
        world.upstream.ended().len() >= connections
    })
    .await;
    let tails = world.upstream.ended();
    assert!(tails.iter().all(|ended| ended.tail.is_empty()), "{tails:?}");
}
