//! `forward`, row by row of HOSTILE.md.

use http::{Request, Version};
use proptest::prelude::*;

use super::*;
use crate::relay::strict;

const HOP: Hop<'_> = Hop {
    peer: std::net::IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7)),
    tls: false,
    http2: false,
    trusted: &[],
};

fn map(headers: &[(&'static str, &'static [u8])]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, HeaderValue::from_bytes(value).expect("a value"));
    }
    map
}

fn target(headers: &HeaderMap, version: Version) -> Target {
    let mut request = Request::builder()
        .uri("http://a.example/")
        .version(version)
        .body(())
        .expect("a request");
    *request.headers_mut() = headers.clone();
    strict::check(&request.into_parts().0, &strict::Limits::default()).expect("a good head")
}

fn upstream(sent: &[(&'static str, &'static [u8])]) -> HeaderMap {
    let mut headers = map(sent);
    let target = target(&headers, Version::HTTP_11);
    to_upstream(&mut headers, &target, &HOP);
    headers
}

#[test]
fn p1_a_chunked_body_has_no_length_upstream() {
    let mut headers = map(&[("content-length", b"3")]);
    let target = target(&headers, Version::HTTP_11);
    headers.insert("transfer-encoding", HeaderValue::from_static("chunked"));
    to_upstream(&mut headers, &target, &HOP);
    assert!(!headers.contains_key("content-length") && !headers.contains_key("transfer-encoding"));
    assert_eq!(upstream(&[("content-length", b"3")])["content-length"], "3");
}

#[test]
fn p18_the_nominated_go_but_not_what_matters_end_to_end() {
    let headers = upstream(&[
        ("connection", b"close, X-Hop, X-Forwarded-For, Authorization"),
        ("connection", b"Host,Cookie ,content-length, (bad)"),
        ("host", b"a.example"),
        ("authorization", b"Basic eDp5"),
        ("cookie", b"a=b"),
        ("content-length", b"3"),
        ("x-hop", b"1"),
        ("x-forwarded-for", b"1.2.3.4"),
        ("keep-alive", b"timeout=5"),
        ("proxy-connection", b"keep-alive"),
        ("proxy-authorization", b"Basic eDp5"),
        ("trailer", b"x-sum"),
        ("upgrade", b"h2c"),
    ]);
    for kept in ["host", "authorization", "cookie", "content-length", "trailer"] {
        assert!(headers.contains_key(kept), "{kept}");
    }
    for gone in [
        "connection",
        "x-hop",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "upgrade",
    ] {
        assert!(!headers.contains_key(gone), "{gone}");
    }
    assert_eq!(headers["x-forwarded-for"], "192.0.2.7", "ours is added after the strip");
}

#[test]
fn p19_the_relays_own_headers_stay_here() {
    let headers = upstream(&[
        ("adit-client", b"home"),
        ("adit-authorization", b"Bearer x"),
        ("audit-x", b"1"),
    ]);
    assert!(headers.keys().all(|name| !name.as_str().starts_with("adit-")));
    assert!(headers.contains_key("audit-x"));
}

#[test]
fn te_says_trailers_or_nothing() {
    assert_eq!(upstream(&[("te", b"gzip, Trailers")])["te"], "trailers");
    assert!(!upstream(&[("te", b"gzip")]).contains_key("te"));
}

#[test]
fn p20_only_a_websocket_is_asked_for_again() {
    let headers = upstream(&[
        ("connection", b"keep-alive, Upgrade, Sec-WebSocket-Key"),
        ("upgrade", b"h2c, WebSocket"),
        ("sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-version", b"13"),
    ]);
    assert_eq!(headers["connection"], "Upgrade");
    assert_eq!(headers["upgrade"], "websocket");
    assert_eq!(headers["sec-websocket-key"], "dGhlIHNhbXBsZSBub25jZQ==");
}

#[test]
fn http2_gets_a_host_and_one_line_of_cookies() {
    let mut headers = map(&[("cookie", b"a=b"), ("cookie", b"c=\xff")]);
    let target = target(&headers, Version::HTTP_2);
    to_upstream(&mut headers, &target, &Hop { http2: true, ..HOP });
    assert_eq!(headers["host"], "a.example");
    let cookies: Vec<_> = headers.get_all("cookie").iter().map(HeaderValue::as_bytes).collect();
    assert_eq!(cookies, [&b"a=b; c=\xff"[..]]);
}

#[test]
fn p17_values_and_their_order_survive_both_ways() {
    let two = [
        ("x-a", &b"\xff\xfe"[..]),
        ("x-a", b" b\t"),
        ("set-cookie", b"a=1"),
        ("set-cookie", b"b=2"),
    ];
    for headers in [upstream(&two), {
        let mut headers = map(&two);
        to_downstream(&mut headers, StatusCode::OK).expect("good");
        headers
    }] {
        let values = |name: &str| {
            headers
                .get_all(name)
                .iter()
                .map(|v| v.as_bytes().to_vec())
                .collect::<Vec<_>>()
        };
        assert_eq!(values("x-a"), [b"\xff\xfe".to_vec(), b" b\t".to_vec()]);
        assert_eq!(values("set-cookie"), [b"a=1".to_vec(), b"b=2".to_vec()]);
    }
}

#[test]
fn a3_a_responses_length_is_one_number_or_an_error() {
    let length = |values: &[&'static [u8]]| {
        let mut headers = map(&values
            .iter()
            .map(|value| ("content-length", *value))
            .collect::<Vec<_>>());
        to_downstream(&mut headers, StatusCode::OK).map(|()| {
            let lengths: Vec<_> = headers
                .get_all("content-length")
                .iter()
                .map(HeaderValue::as_bytes)
                .collect();
            lengths.join(&b"|"[..])
        })
    };
    assert_eq!(length(&[]), Ok(Vec::new()));
    assert_eq!(length(&[b"5"]), Ok(b"5".to_vec()));
    assert_eq!(length(&[b"5", b"5"]), Ok(b"5".to_vec()));
    assert_eq!(length(&[b"5, 5"]), Ok(b"5".to_vec()));
    for bad in [
        &[&b"5"[..], b"6"][..],
        &[b"5, 6"],
        &[b"+5"],
        &[b""],
        &[b"5,"],
        &[b"0x5"],
        &[b"18446744073709551616"],
    ] {
        assert_eq!(length(bad), Err(Cause::UpstreamFailed), "{bad:?}");
    }
}

#[test]
fn a3_a_response_says_nothing_of_its_hop_or_the_relay() {
    let hostile: &[(&str, &[u8])] = &[
        ("transfer-encoding", b"chunked"),
        ("content-length", b"5"),
        ("connection", b"x-hop, set-cookie"),
        ("x-hop", b"1"),
        ("set-cookie", b"a=b"),
        ("proxy-authenticate", b"Basic"),
        ("upgrade", b"h2c"),
        ("adit-error", b"forged"),
    ];
    let mut headers = map(hostile);
    to_downstream(&mut headers, StatusCode::OK).expect("good");
    assert_eq!(headers, map(&[("set-cookie", b"a=b")]));

    let mut headers = map(&[("content-length", b"5")]);
    to_downstream(&mut headers, StatusCode::NO_CONTENT).expect("good");
    assert!(headers.is_empty(), "a 204 has no body");
    let mut headers = map(&[("content-length", b"5")]);
    to_downstream(&mut headers, StatusCode::NOT_MODIFIED).expect("good");
    assert!(!headers.is_empty(), "a 304 may say what a 200 would have had");
}

#[test]
fn a_101_is_for_a_websocket_and_has_no_body() {
    let mut headers = map(&[
        ("connection", b"upgrade"),
        ("upgrade", b"WebSocket"),
        ("content-length", b"5"),
        ("transfer-encoding", b"chunked"),
        ("sec-websocket-accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        ("adit-x", b"1"),
    ]);
    to_downstream_websocket(&mut headers);
    let expected = map(&[
        ("connection", b"Upgrade"),
        ("upgrade", b"websocket"),
        ("sec-websocket-accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
    ]);
    assert_eq!(headers, expected);
}

proptest! {
    #[test]
    fn it_never_panics(lines in prop::collection::vec((0..12_usize, any::<Vec<u8>>()), 0..12), status in 100..600_u16) {
        const NAMES: [&str; 12] = [
            "connection", "te", "transfer-encoding", "content-length", "upgrade", "forwarded", "x-forwarded-for",
            "cookie", "adit-client", "x-a", "trailer", "keep-alive",
        ];
        let mut headers = HeaderMap::new();
        for (name, value) in &lines {
            if let Ok(value) = HeaderValue::from_bytes(value) {
                headers.append(NAMES[*name], value);
            }
        }
        let target = target(&HeaderMap::new(), Version::HTTP_11);
        let trusted = ["192.0.2.0/24".parse().expect("a net")];
        let hop = Hop { trusted: &trusted, http2: true, ..HOP };
        let _ = hop.client_address(&headers);
        let (mut up, mut down, mut websocket) = (headers.clone(), headers.clone(), headers.clone());
        to_upstream(&mut up, &target, &hop);
        prop_assert!(!up.contains_key("connection") && !up.contains_key("transfer-encoding"));
        let _ = to_downstream(&mut down, StatusCode::from_u16(status).expect("a status"));
        to_downstream_websocket(&mut websocket);
        fields::keep_trailers(&mut headers);
    }
}
