//! Raw requests that are wrong or odd: the answer, what the service saw, and that the next connection works.

use tokio::io::AsyncWriteExt;

use crate::harness::{Answer, FrontDoor};

const CLOSE: &str = "connection: close\r\n";

fn post(headers: &str, body: &str) -> String {
    format!("POST /echo HTTP/1.1\r\nhost: a\r\n{headers}\r\n{body}")
}

fn get(headers: &str) -> String {
    format!("GET /x HTTP/1.1\r\nhost: a\r\n{CLOSE}{headers}\r\n")
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";

#[tokio::test]
async fn p1_length_and_chunked_nothing_is_smuggled() {
    let door = FrontDoor::open().await;
    for headers in [
        "content-length: 3\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 3\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 3\r\nconnection: keep-alive\r\n",
    ] {
        let answer = door
            .send(post(headers, &format!("3\r\nabc\r\n0\r\n\r\n{SMUGGLED}")))
            .await;
        assert_eq!((answer.status(), answer.body()), (200, "abc"), "{answer:?}");
        let seen = door.take_seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert!(!seen[0].headers.contains_key("content-length"));
    }
    door.still_serves().await;
}

#[tokio::test]
async fn p2_p3_lengths_that_are_no_one_number() {
    let door = FrontDoor::open().await;
    for bad in [
        "+3",
        "-1",
        "0x3",
        "",
        "3, 3",
        "18446744073709551616",
        "003",
        "3\r\ncontent-length: 4",
    ] {
        door.refuses(400, post(&format!("content-length: {bad}\r\n"), "abc"))
            .await;
    }
    let twice = format!("{CLOSE}content-length: 3\r\ncontent-length: 3\r\n");
    assert_eq!(door.send(post(&twice, "abc")).await.body(), "abc");
    assert_eq!(door.take_seen()[0].headers.get_all("content-length").iter().count(), 1);
    door.still_serves().await;
}

#[tokio::test]
async fn p4_p5_codings_that_are_not_exactly_chunked() {
    let door = FrontDoor::open().await;
    for bad in [
        "transfer-encoding: gzip, chunked",
        "transfer-encoding: chunked, chunked",
        "transfer-encoding: xchunked",
        "transfer-encoding: identity",
        "transfer-encoding:",
        "transfer-encoding : chunked",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ntransfer-encoding: identity",
    ] {
        door.refuses(400, post(&format!("{bad}\r\n"), "0\r\n\r\n")).await;
    }
    door.refuses(
        400,
        "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    )
    .await;
    door.still_serves().await;
}

#[tokio::test]
async fn p6_p16_header_lines_that_parsers_disagree_on() {
    let door = FrontDoor::open().await;
    for bad in [
        &b"content_length: 3"[..],
        b"x: a\0b",
        b"x: a\rb",
        b"x: a\x07b",
        b"x: a\r\n folded",
        b"no colon",
        b"a b: c",
        b" x: y",
        b": x",
        b"x\xff: y",
    ] {
        let mut request = b"GET / HTTP/1.1\r\nhost: a\r\n".to_vec();
        request.extend_from_slice(bad);
        request.extend_from_slice(b"\r\n\r\n");
        door.refuses(400, request).await;
    }
    door.still_serves().await;
}

#[tokio::test]
async fn p7_broken_chunks_break_the_body() {
    let door = FrontDoor::open().await;
    for bad in [
        "0x3\r\nabc\r\n0\r\n\r\n",
        "+3\r\nabc\r\n0\r\n\r\n",
        "-3\r\nabc\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nabc",
        "3\nabc\r\n0\r\n\r\n",
        "3;a=\rb\r\nabc\r\n0\r\n\r\n",
        "3\r\nabcX\r\n0\r\n\r\n",
        "\r\n0\r\n\r\n",
    ] {
        let answer = door
            .send(post("transfer-encoding: chunked\r\n", &format!("{bad}{SMUGGLED}")))
            .await;
        assert_eq!(answer.status(), 400, "{bad:?}: {answer:?}");
        assert!(answer.head().contains("adit-error: bad-request"), "{answer:?}");
        door.events.broken_uploads.notified().await;
        let seen = door.take_seen();
        assert_eq!(seen.len(), 1, "{bad:?}: nothing after it is a request: {seen:?}");
    }
    door.still_serves().await;
}

#[tokio::test]
async fn p8_trailers_are_filtered() {
    let door = FrontDoor::open().await;
    let trailers = "content-length: 9\r\nauthorization: x\r\nx-sum: 1\r\n";
    let body = format!("3\r\nabc\r\n0\r\n{trailers}\r\n");
    let answer = door
        .send(post(&format!("{CLOSE}transfer-encoding: chunked\r\n"), &body))
        .await;
    assert!(answer.head().contains("x-trailers: 1"), "{answer:?}");
    door.still_serves().await;
}

#[tokio::test]
async fn p9_p10_hosts_that_are_not_one_host() {
    let door = FrontDoor::open().await;
    for bad in [
        "",
        "host:\r\n",
        "host: a, b\r\n",
        "host: a\r\nhost: a\r\n",
        "host: u@a\r\n",
        "host: a/b\r\n",
        "host: a b\r\n",
    ] {
        door.refuses(400, format!("GET / HTTP/1.1\r\n{bad}\r\n")).await;
    }
    door.refuses(400, "GET / HTTP/1.1\r\nhost: a:99999\r\n\r\n").await;
    door.refuses(400, "GET http://b/ HTTP/1.1\r\nhost: a\r\n\r\n").await;
    door.refuses(400, "GET http://u@a/ HTTP/1.1\r\nhost: a\r\n\r\n").await;
    door.still_serves().await;
}

#[tokio::test]
async fn p11_p12_methods_that_are_not_relayed() {
    let door = FrontDoor::open().await;
    door.refuses(405, "CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n").await;
    door.refuses(405, "TRACE / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    door.refuses(400, "GET * HTTP/1.1\r\nhost: a\r\n\r\n").await;
    door.refuses(501, format!("{} / HTTP/1.1\r\nhost: a\r\n\r\n", "X".repeat(10_000)))
        .await;
    door.still_serves().await;
}

#[tokio::test]
async fn p13_p14_targets_are_refused_or_passed_on_untouched() {
    let door = FrontDoor::open().await;
    for bad in [
        &b"/\xc3\xa9"[..],
        b"/\xff",
        b"/%00",
        b"/%0d",
        b"/?a=%0A",
        b"/ a",
        b"/\x01",
    ] {
        let request = [b"GET ", bad, b" HTTP/1.1\r\nhost: a\r\n\r\n"].concat();
        door.refuses(400, request).await;
    }
    for odd in ["/a/../b", "/%2e%2e%2f", "//evil", "/\\", "/a?b?c=%zz", "/{\"a\"}"] {
        let answer = door.send(format!("GET {odd} HTTP/1.1\r\nhost: a\r\n{CLOSE}\r\n")).await;
        assert_eq!(answer.status(), 200, "{odd}: {answer:?}");
        assert_eq!(door.take_seen()[0].path, odd);
    }
    door.still_serves().await;
}

#[tokio::test]
async fn p15_heads_that_are_too_long() {
    let door = FrontDoor::open().await;
    for n in [8 * 1024 + 1, 32 * 1024] {
        door.refuses(414, format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(n)))
            .await;
    }
    for n in [32 * 1024, 40 * 1024, 500 * 1024] {
        door.refuses(431, get(&format!("x: {}\r\n", "a".repeat(n)))).await;
    }
    for n in [99, 150, 5000] {
        door.refuses(431, get(&"x: 1\r\n".repeat(n))).await;
    }
    assert_eq!(
        door.send(get(&"x: 1\r\n".repeat(98))).await.status(),
        200,
        "a hundred in all"
    );
    door.take_seen();
    door.still_serves().await;
}

#[tokio::test]
async fn p17_values_come_through_as_bytes() {
    let door = FrontDoor::open().await;
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx: \xff\xfe\r\nx: 2\r\n\r\n";
    assert_eq!(door.send(request).await.status(), 200);
    let seen = door.take_seen();
    let values: Vec<_> = seen[0]
        .headers
        .get_all("x")
        .iter()
        .map(|v| v.as_bytes().to_vec())
        .collect();
    assert_eq!(values, [b"\xff\xfe".to_vec(), b"2".to_vec()]);
}

#[tokio::test]
async fn p20_other_upgrades_are_plain_requests_and_the_next_one_follows() {
    let door = FrontDoor::open().await;
    for other in ["foo", "h2c"] {
        let plain = format!("GET /1 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: {other}\r\n\r\n");
        let answer = door.send(format!("{plain}{}", get(""))).await;
        assert_eq!(answer.text.matches("HTTP/1.1 200 OK").count(), 2, "{answer:?}");
        let seen = door.take_seen();
        assert_eq!(
            seen.iter().map(|seen| seen.path.as_str()).collect::<Vec<_>>(),
            ["/1", "/x"]
        );
        assert!(!seen[0].websocket);
    }
    door.still_serves().await;
}

const WEBSOCKET: &str = "connection: upgrade\r\nupgrade: websocket\r\n";
const KEY: &str = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const VERSION: &str = "sec-websocket-version: 13\r\n";

#[tokio::test]
async fn p21_websockets_that_are_not_asked_for_properly() {
    let door = FrontDoor::open().await;
    let ask = |method: &str, headers: &str, body: &str| {
        format!("{method} /ws HTTP/1.1\r\nhost: a\r\n{WEBSOCKET}{headers}\r\n{body}")
    };
    let full = format!("{KEY}{VERSION}");
    door.refuses(400, ask("GET", &format!("{full}content-length: 3\r\n"), "abc"))
        .await;
    door.refuses(400, ask("POST", &full, "")).await;
    door.refuses(400, ask("GET", &format!("{VERSION}sec-websocket-key: bad\r\n"), ""))
        .await;
    door.refuses(400, format!("GET /ws HTTP/1.0\r\nhost: a\r\n{WEBSOCKET}{full}\r\n"))
        .await;
    door.refuses(
        426,
        ask("GET", &format!("{KEY}sec-websocket-version: 12\r\n{CLOSE}"), ""),
    )
    .await;
    door.still_serves().await;
}

#[tokio::test]
async fn a_websocket_is_a_tunnel_both_ways_to_the_last_byte() {
    let door = FrontDoor::open().await;
    let mut socket = door.connect().await;
    let ask = format!("GET /ws HTTP/1.1\r\nhost: a\r\n{WEBSOCKET}{KEY}{VERSION}\r\n");
    socket.write_all(ask.as_bytes()).await.unwrap();
    let answer = Answer::read_until(&mut socket, "\r\n\r\n").await;
    assert_eq!(answer.status(), 101);
    socket.write_all(b"hello").await.unwrap();
    assert_eq!(Answer::read_until(&mut socket, "hello").await.text, "hello");
    socket.shutdown().await.unwrap();
    assert_eq!(Answer::read_to_end(&mut socket).await.text, "bye");
    assert!(door.take_seen()[0].websocket);
    door.still_serves().await;
}

#[tokio::test]
async fn p23_expectations() {
    let door = FrontDoor::open().await;
    door.refuses(417, post("expect: x\r\ncontent-length: 3\r\n", "")).await;
    let mut socket = door.connect().await;
    let waits = post(&format!("{CLOSE}expect: 100-continue\r\ncontent-length: 3\r\n"), "");
    socket.write_all(waits.as_bytes()).await.unwrap();
    let go = Answer::read_until(&mut socket, "\r\n\r\n").await;
    assert_eq!(go.status(), 100);
    socket.write_all(b"abc").await.unwrap();
    assert_eq!(Answer::read_to_end(&mut socket).await.body(), "abc");
    door.take_seen();
    door.still_serves().await;
}

#[tokio::test]
async fn a_bare_error_after_good_requests_is_a_problem_too() {
    let door = FrontDoor::open().await;
    let answer = door
        .send("GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\nbad\r\n\r\n")
        .await;
    assert_eq!(answer.text.matches("HTTP/1.1 200 OK").count(), 2, "{answer:?}");
    assert_eq!(answer.text.matches("adit-error: bad-request").count(), 1, "{answer:?}");
    assert_eq!(door.take_seen().len(), 2);
    door.still_serves().await;
}
