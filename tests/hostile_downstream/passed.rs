//! Requests that are odd and pass: what of them reaches the upstream, byte for byte.

use crate::{
    harness::raw::{OK, RawUpstream},
    world::{CLOSE, World, get, post, request},
};

#[tokio::test]
async fn p1_length_and_chunked_nothing_is_smuggled() {
    let world = World::open().await;
    for headers in [
        "content-length: 3\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 3\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 3\r\nconnection: keep-alive\r\n",
    ] {
        let smuggled = request("GET /smuggled", "", "");
        let seen = world
            .passes(post(headers, &format!("3\r\nabc\r\n0\r\n\r\n{smuggled}")))
            .await;
        assert_eq!(
            (
                seen.value("content-length").as_str(),
                seen.value("transfer-encoding").as_str()
            ),
            ("", "chunked")
        );
        assert_eq!(seen.body(), b"3\r\nabc\r\n0\r\n\r\n");
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p3_two_equal_lengths_become_one() {
    let world = World::open().await;
    let twice = format!("{CLOSE}content-length: 3\r\ncontent-length: 3\r\n");
    let answer = world.send(post(&twice, "abc")).await;
    if answer.status() == 200 {
        let calls = world.upstream.take();
        assert_eq!(
            (calls[0].value("content-length").as_str(), calls[0].body()),
            ("3", &b"abc"[..])
        );
    } else {
        assert_eq!(answer.status(), 400, "{answer:?}");
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p8_trailers_are_filtered() {
    let world = World::open().await;
    let trailers = "content-length: 9\r\nauthorization: x\r\nadit-client: other\r\nx-sum: 1\r\nhost: b\r\n";
    let headers = format!(
        "{CLOSE}transfer-encoding: chunked\r\ntrailer: content-length, authorization, adit-client, x-sum, host\r\n"
    );
    let seen = world
        .passes(post(&headers, &format!("3\r\nabc\r\n0\r\n{trailers}\r\n")))
        .await;
    assert_eq!(seen.body(), b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n", "{seen:?}");
    world.still_serves().await;
}

#[tokio::test]
async fn p10_an_absolute_target_that_agrees() {
    let world = World::open().await;
    let seen = world.passes(request("GET http://a/x?y", CLOSE, "")).await;
    assert_eq!(
        (seen.line().as_str(), seen.value("host").as_str()),
        ("GET /x?y HTTP/1.1", "a")
    );
    world.still_serves().await;
}

#[tokio::test]
async fn p14_targets_are_passed_on_untouched() {
    let world = World::open().await;
    for odd in [
        "/a/../b",
        "/%2e%2e%2f",
        "//evil",
        "/\\",
        "/a?b?c=%zz",
        "/{\"a\"}",
        "/./",
        "/a;b=c",
        "/?",
        "/a//b/",
        "/%41",
        "/ws/../x",
        "/health",
    ] {
        let seen = world.passes(request(&format!("GET {odd}"), CLOSE, "")).await;
        assert_eq!(seen.line(), format!("GET {odd} HTTP/1.1"));
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p15_the_longest_that_fit() {
    let world = World::open().await;
    let path = format!("/{}", "a".repeat(8 * 1024 - 64));
    let seen = world.passes(request(&format!("GET {path}"), CLOSE, "")).await;
    assert_eq!(seen.path(), path);
    let seen = world.passes(get(&format!("{CLOSE}{}", "x: 1\r\n".repeat(97)))).await;
    assert_eq!(seen.values("x").len(), 97);
    world.still_serves().await;
}

#[tokio::test]
async fn p17_values_come_through_as_bytes_both_ways() {
    let cookies =
        b"HTTP/1.1 200 OK\r\nset-cookie: a=1\r\nx: \xff\xfe\r\nset-cookie: b=\x80\r\nx: 2\r\ncontent-length: 2\r\n\
        connection: close\r\n\r\nok";
    let world = World::with(|_| {}, RawUpstream::start(|_| cookies.to_vec()).await).await;
    let mut request = b"GET / HTTP/1.1\r\nhost: a\r\nadit-client: home\r\nconnection: close\r\n".to_vec();
    request.extend_from_slice(b"x: \xff\xfe\r\ncookie: a=1\r\nx: 2\r\nx: \xe9t\xe9\r\n\r\n");
    let answer = world.send(request).await;
    assert_eq!(answer.values("set-cookie"), [b"a=1".to_vec(), b"b=\x80".to_vec()]);
    assert_eq!(answer.values("x"), [b"\xff\xfe".to_vec(), b"2".to_vec()]);
    let seen = world.upstream.take();
    assert_eq!(
        seen[0].values("x"),
        [b"\xff\xfe".to_vec(), b"2".to_vec(), b"\xe9t\xe9".to_vec()]
    );
    assert_eq!(seen[0].value("cookie"), "a=1");
    world.still_serves().await;
}

#[tokio::test]
async fn p18_nominated_headers_are_stripped_but_never_those_for_the_far_end() {
    let world = World::open().await;
    let nominates = "connection: close, X-Forwarded-For, Authorization, Host, Cookie, X-Hop, Keep-Alive\r\n\
        x-forwarded-for: 9.9.9.9\r\nauthorization: mine\r\ncookie: c\r\nx-hop: 1\r\nkeep-alive: 5\r\nte: gzip\r\n\
        proxy-connection: x\r\nproxy-authorization: y\r\n";
    let seen = world.passes(get(nominates)).await;
    for (name, value) in [
        ("host", "a"),
        ("authorization", "mine"),
        ("cookie", "c"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-hop", ""),
        ("keep-alive", ""),
        ("te", ""),
        ("proxy-connection", ""),
        ("proxy-authorization", ""),
        ("connection", ""),
    ] {
        assert_eq!(seen.value(name), value, "{name} in {seen:?}");
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p19_forged_hops_are_replaced_and_a_trusted_one_is_believed() {
    let forged = format!(
        "{CLOSE}x-forwarded-for: 9.9.9.9\r\nx-forwarded-host: evil\r\nx-forwarded-proto: https\r\nx-real-ip: 9.9.9.9\r\n\
         x-forwarded-port: 1\r\nforwarded: for=9.9.9.9\r\nadit-request-id: 1\r\nadit-anything: 2\r\n"
    );
    let world = World::open().await;
    let seen = world.passes(get(&forged)).await;
    for (name, value) in [
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-host", "a"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-port", ""),
        ("x-real-ip", ""),
        ("adit-request-id", ""),
        ("adit-anything", ""),
        ("adit-client", ""),
    ] {
        assert_eq!(seen.value(name), value, "{name} in {seen:?}");
    }
    assert!(!String::from_utf8_lossy(&seen.0).contains("9.9.9.9"), "{seen:?}");
    world.still_serves().await;

    let trusting = |config: &mut adit::config::RelayConfig| {
        config.trusted_proxies = vec!["127.0.0.0/8".parse().expect("a network")];
    };
    let world = World::with(trusting, RawUpstream::ok().await).await;
    let seen = world.passes(get(&forged)).await;
    assert_eq!(seen.value("x-forwarded-for"), "9.9.9.9, 127.0.0.1");
    assert_eq!(
        (
            seen.value("x-forwarded-proto").as_str(),
            seen.value("adit-anything").as_str()
        ),
        ("https", "")
    );
    world.still_serves().await;
}

#[tokio::test]
async fn an_upstream_cannot_speak_for_the_relay() {
    let forged = b"HTTP/1.1 404 Not Found\r\nadit-error: no-tunnel\r\nadit-request-id: x\r\nconnection: close\r\n\
        content-length: 2\r\n\r\nok";
    let world = World::with(
        |_| {},
        RawUpstream::start(|call| {
            if call.path() == "/x" {
                forged.to_vec()
            } else {
                OK.to_vec()
            }
        })
        .await,
    )
    .await;
    let answer = world.send(get(CLOSE)).await;
    assert_eq!(answer.status(), 404);
    assert!(
        answer.values("adit-error").is_empty() && answer.values("adit-request-id").len() == 1,
        "{answer:?}"
    );
    assert_ne!(answer.values("adit-request-id")[0], b"x");
    world.still_serves().await;
}
