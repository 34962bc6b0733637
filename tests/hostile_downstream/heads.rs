//! Heads that are refused: nothing of them reaches the upstream.

use crate::world::{World, get, post, request};

const BAD: &str = "bad-request";

#[tokio::test]
async fn p2_p3_lengths_that_are_no_one_number() {
    let world = World::open().await;
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
        let request = post(&format!("content-length: {bad}\r\n"), "abc");
        world.refuses(400, BAD, request).await;
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p4_p5_codings_that_are_not_exactly_chunked() {
    let world = World::open().await;
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
        world.refuses(400, BAD, post(&format!("{bad}\r\n"), "0\r\n\r\n")).await;
    }
    let old = post("transfer-encoding: chunked\r\n", "0\r\n\r\n").replace("HTTP/1.1", "HTTP/1.0");
    world.refuses(400, BAD, old).await;
    world.still_serves().await;
}

#[tokio::test]
async fn p6_p16_header_lines_that_parsers_disagree_on() {
    let world = World::open().await;
    for bad in [
        &b"content_length: 3"[..],
        b"x_y: 1",
        b"x: a\0b",
        b"x: a\rb",
        b"x: a\x07b",
        b"x: a\r\n folded",
        b"x: a\r\n\tfolded",
        b"no colon",
        b"a b: c",
        b"a : c",
        b" x: y",
        b": x",
        b"x\xff: y",
    ] {
        let mut request = b"GET / HTTP/1.1\r\nhost: a\r\nadit-client: home\r\n".to_vec();
        request.extend_from_slice(bad);
        request.extend_from_slice(b"\r\n\r\n");
        world.refuses(400, BAD, request).await;
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p9_p10_hosts_that_are_not_one_host() {
    let world = World::open().await;
    for bad in [
        "",
        "host:\r\n",
        "host: a, b\r\n",
        "host: a\r\nhost: a\r\n",
        "host: a\r\nhost: b\r\n",
        "host: u@a\r\n",
        "host: a/b\r\n",
        "host: a b\r\n",
        "host: a:99999\r\n",
    ] {
        let request = format!("GET / HTTP/1.1\r\nadit-client: home\r\n{bad}\r\n");
        world.refuses(400, BAD, request).await;
    }
    for target in ["http://b/", "http://u@a/", "http://u:p@a/", "ftp://a/"] {
        world.refuses(400, BAD, request(&format!("GET {target}"), "", "")).await;
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p11_p12_methods_that_are_not_relayed() {
    let world = World::open().await;
    let not_allowed = "method-not-allowed";
    for line in ["CONNECT a:443", "TRACE /"] {
        world.refuses(405, not_allowed, request(line, "", "")).await;
    }
    let smuggling = request("CONNECT a:443", "", &get(""));
    world.refuses(405, not_allowed, smuggling).await;
    world.refuses(400, BAD, request("GET *", "", "")).await;
    let long = "X".repeat(10_000);
    world
        .refuses(501, "not-implemented", request(&format!("{long} /"), "", ""))
        .await;
    world.still_serves().await;
}

#[tokio::test]
async fn p13_targets_with_raw_or_forbidden_bytes() {
    let world = World::open().await;
    for bad in [
        &b"/\xc3\xa9"[..],
        b"/\xff",
        b"/%00",
        b"/%0d",
        b"/%0D%0A",
        b"/?a=%0A",
        b"/ a",
        b"/\x01",
        b"/\x7f",
    ] {
        let request = [b"GET ", bad, b" HTTP/1.1\r\nhost: a\r\nadit-client: home\r\n\r\n"].concat();
        world.refuses(400, BAD, request).await;
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p15_heads_that_are_too_long() {
    let world = World::open().await;
    for n in [8 * 1024, 32 * 1024] {
        let long = request(&format!("GET /{}", "a".repeat(n)), "", "");
        world.refuses(414, "uri-too-long", long).await;
    }
    let too_large = "headers-too-large";
    for n in [32 * 1024, 40 * 1024, 500 * 1024] {
        world
            .refuses(431, too_large, get(&format!("x: {}\r\n", "a".repeat(n))))
            .await;
    }
    for n in [99, 150, 5000] {
        world.refuses(431, too_large, get(&"x: 1\r\n".repeat(n))).await;
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p20_other_protocols() {
    let world = World::open().await;
    world
        .refuses(400, BAD, b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03")
        .await;
    let proxy = format!("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n{}", get(""));
    world.refuses(400, BAD, proxy).await;
    world.refuses(400, BAD, b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c").await;
    world.refuses(400, BAD, "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n").await;
    world.refuses(400, BAD, get("").replace("HTTP/1.1", "HTTP/3.0")).await;
    world.still_serves().await;
}

#[tokio::test]
async fn p23_an_expectation_that_is_not_served() {
    let world = World::open().await;
    let request = post("expect: x\r\ncontent-length: 3\r\n", "abc");
    world.refuses(417, "expectation-failed", request).await;
    world.still_serves().await;
}
