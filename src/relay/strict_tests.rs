//! `strict`, row by row of HOSTILE.md.

use http::{HeaderValue, Request};
use proptest::prelude::*;

use super::*;

const KEY: (&str, &str) = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
const VERSION: (&str, &str) = ("sec-websocket-version", "13");
const UPGRADE: (&str, &str) = ("upgrade", "websocket");
const CONNECTION: (&str, &str) = ("connection", "Upgrade");

/// A head that is good but for what the test changes.
struct Head {
    parts: Parts,
}

impl Head {
    fn bare(method: &str, target: &str) -> Self {
        let request = Request::builder()
            .method(method)
            .uri(target)
            .body(())
            .expect("a request");
        Self {
            parts: request.into_parts().0,
        }
    }

    fn new(method: &str, target: &str) -> Self {
        Self::bare(method, target).with(&[("host", "a.example")])
    }

    fn get(headers: &[(&'static str, &str)]) -> Self {
        Self::new("GET", "/").with(headers)
    }

    fn with(mut self, headers: &[(&'static str, &str)]) -> Self {
        for (name, value) in headers {
            self.parts
                .headers
                .append(*name, HeaderValue::from_str(value).expect("a value"));
        }
        self
    }

    fn version(mut self, version: Version) -> Self {
        self.parts.version = version;
        self
    }

    fn check(&self) -> Result<Target, Cause> {
        check(&self.parts, &Limits::default())
    }

    fn status(&self) -> u16 {
        self.check().map_or_else(|cause| cause.status().as_u16(), |_| 200)
    }
}

#[test]
fn a_usual_head_is_let_in_as_it_is() {
    let target = Head::new("POST", "/a/../b%2e//c?x=%20&y")
        .with(&[("content-length", "12"), ("cookie", "a=b"), ("expect", "100-Continue")])
        .check()
        .expect("good");
    assert_eq!(target.path_and_query(), "/a/../b%2e//c?x=%20&y");
    assert_eq!((target.path(), target.query()), ("/a/../b%2e//c", Some("x=%20&y")));
    assert_eq!((target.authority(), target.host()), ("a.example", "a.example"));
    assert!(target.expects_continue && !target.websocket);
}

#[test]
fn p3_a_length_is_one_canonical_number() {
    for good in ["0", "3", "18446744073709551615"] {
        assert_eq!(Head::get(&[("content-length", good)]).status(), 200, "{good}");
    }
    for bad in ["003", "00", "+3", "-1", "0x3", "", "3, 3", "3 3", "3."] {
        assert_eq!(Head::get(&[("content-length", bad)]).status(), 400, "{bad:?}");
    }
    assert_eq!(
        Head::get(&[("content-length", "3"), ("content-length", "3")]).status(),
        400
    );
}

#[test]
fn p4_transfer_encoding_is_exactly_chunked() {
    for good in ["chunked", "Chunked"] {
        assert_eq!(Head::get(&[("transfer-encoding", good)]).status(), 200, "{good}");
    }
    for bad in [
        "gzip, chunked",
        "chunked, chunked",
        "xchunked",
        "identity",
        "",
        "chunked ",
    ] {
        assert_eq!(Head::get(&[("transfer-encoding", bad)]).status(), 400, "{bad:?}");
    }
    let twice = [("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")];
    assert_eq!(Head::get(&twice).status(), 400);
    assert_eq!(
        Head::get(&[("transfer-encoding", "chunked"), ("content-length", "3")]).status(),
        400,
        "P1"
    );
}

#[test]
fn p6_names_have_no_underscore() {
    assert_eq!(Head::get(&[("content_length", "3")]).status(), 400);
    assert_eq!(Head::get(&[("x-forwarded_for", "3")]).status(), 400);
}

#[test]
fn p9_there_is_one_host_and_it_is_one() {
    let host = |value: &str| Head::bare("GET", "/").with(&[("host", value)]);
    for good in [
        "a",
        "a.b-c.d",
        "A.example:8080",
        "127.0.0.1:1",
        "[::1]",
        "[2001:db8::1]:65535",
        "my_box:80",
        "a.",
    ] {
        assert_eq!(host(good).status(), 200, "{good}");
    }
    for bad in [
        "", "a, b", "a,b", "u@a", "a/b", "a b", "a:99999", "a:0", "a:", ":80", "a:8a", "a:+1", "a:-1", "[::1", "::1",
        "[]", "[::1]x", "[g::1]", "a?b", "a#b", "a\\b", "a%41", ".", "a:1:2", "http://a", "a\tb", "*", "[::1].", "a]",
        "x[::1]",
    ] {
        assert_eq!(host(bad).status(), 400, "{bad:?}");
    }
    assert_eq!(Head::bare("GET", "/").status(), 400);
    assert_eq!(Head::bare("GET", "/").version(Version::HTTP_10).status(), 400);
    assert_eq!(Head::get(&[("host", "a.example")]).status(), 400, "twice");
    assert_eq!(host("HOME.Example.:80").check().expect("good").host(), "home.example");
}

#[test]
fn p10_the_target_and_the_host_agree() {
    let absolute = |target: &str| Head::new("GET", target).status();
    for good in ["http://a.example/", "http://A.Example:80/x?y", "https://a.example:443/"] {
        assert_eq!(absolute(good), 200, "{good}");
    }
    for bad in [
        "http://b.example/",
        "http://a.example:81/",
        "http://u@a.example/",
        "ftp://a.example/",
        "http://a.example?q",
    ] {
        assert_eq!(absolute(bad), 400, "{bad}");
    }
    let target = Head::new("GET", "http://a.example/x/../y?z").check().expect("good");
    assert_eq!(target.path_and_query(), "/x/../y?z");
}

#[test]
fn p11_connect_and_trace_are_not_relayed() {
    assert_eq!(Head::new("CONNECT", "a.example:443").status(), 405);
    assert_eq!(Head::new("TRACE", "/").status(), 405);
}

#[test]
fn p12_odd_methods_and_targets() {
    assert_eq!(Head::new("GET", "*").status(), 400);
    assert_eq!(Head::new("OPTIONS", "*").status(), 501);
    assert_eq!(Head::new("GET", "a.example").status(), 400);
    assert_eq!(Head::new(&"X".repeat(10_000), "/").status(), 501);
    assert_eq!(Head::new("PROPFIND", "/").status(), 200);
}

#[test]
fn p13_the_target_is_ascii_without_breaks() {
    for bad in ["/é", "/?é", "/a%00", "/%0d", "/%0Ab", "/?x=%0D", "/%2%00"] {
        assert_eq!(Head::new("GET", bad).status(), 400, "{bad}");
    }
}

#[test]
fn p14_odd_paths_are_not_touched() {
    for odd in [
        "/a/../b",
        "/%2e%2e%2f",
        "//evil",
        "/\\",
        "/%",
        "/%zz",
        "/%0",
        "/a;b|c\"{}",
        "/%250a",
        "/?a?b",
    ] {
        let target = Head::new("GET", odd).check().expect(odd);
        assert_eq!(target.path_and_query(), odd);
    }
}

#[test]
fn p15_heads_have_a_size() {
    let path = |n: usize| format!("/{}", "a".repeat(n - 1));
    assert_eq!(Head::new("GET", &path(8 * 1024)).status(), 200);
    assert_eq!(Head::new("GET", &path(8 * 1024 + 1)).status(), 414);
    let wide = |n: usize| Head::get(&[("x", &"a".repeat(n))]).status();
    let rest = "host: a.example\r\n".len() + "x: \r\n".len();
    assert_eq!(wide(32 * 1024 - rest), 200);
    assert_eq!(wide(32 * 1024 - rest + 1), 431);
    let many = |n: usize| Head::get(&vec![("x", "1"); n - 1]).status();
    assert_eq!((many(100), many(101)), (200, 431));
}

#[test]
fn p20_other_upgrades_are_plain_requests() {
    for other in ["h2c", "foo", "websocketx", "TLS/1.0, HTTP/1.1"] {
        let target = Head::get(&[CONNECTION, ("upgrade", other)]).check().expect("good");
        assert!(!target.websocket, "{other}");
    }
    let unconnected = Head::get(&[UPGRADE, KEY, VERSION]).check().expect("good");
    assert!(!unconnected.websocket, "Connection does not say so");
    let listed = Head::get(&[
        ("connection", "keep-alive, UPGRADE"),
        ("upgrade", "h2c, WebSocket"),
        KEY,
        VERSION,
    ]);
    assert!(listed.check().expect("good").websocket);
}

#[test]
fn p21_a_websocket_is_asked_for_properly() {
    let good = [UPGRADE, CONNECTION, KEY, VERSION];
    assert!(Head::get(&good).check().expect("good").websocket);
    assert!(
        Head::get(&good)
            .with(&[("content-length", "0")])
            .check()
            .expect("good")
            .websocket
    );
    assert_eq!(Head::get(&good).with(&[("content-length", "1")]).status(), 400);
    assert_eq!(Head::get(&good).with(&[("transfer-encoding", "chunked")]).status(), 400);
    assert_eq!(Head::get(&good).version(Version::HTTP_10).status(), 400);
    assert_eq!(Head::new("POST", "/").with(&good).status(), 400);
    assert_eq!(Head::get(&[UPGRADE, CONNECTION, KEY]).status(), 426);
    for version in ["12", "13, 8", "013", ""] {
        let head = Head::get(&[UPGRADE, CONNECTION, KEY, ("sec-websocket-version", version)]);
        assert_eq!(head.status(), 426, "{version}");
    }
    for key in [
        "",
        "short==",
        "dGhlIHNhbXBsZSBub25jZQ=",
        "dGhlIHNhbXBsZSBub25jZ!==",
        "dGhlIHNhbXBsZSBub25jZQAAAA==",
    ] {
        let head = Head::get(&[UPGRADE, CONNECTION, VERSION, ("sec-websocket-key", key)]);
        assert_eq!(head.status(), 400, "{key}");
    }
    assert_eq!(Head::get(&good).with(&[KEY]).status(), 400, "two keys");
    assert_eq!(Head::get(&good).with(&[VERSION]).status(), 426, "two versions");
}

#[test]
fn p23_the_only_expectation_is_100_continue() {
    assert_eq!(Head::get(&[("expect", "x")]).status(), 417);
    assert_eq!(Head::get(&[("expect", "100-continue, x")]).status(), 417);
    assert_eq!(
        Head::get(&[("expect", "100-continue"), ("expect", "100-continue")]).status(),
        417
    );
    let old = Head::get(&[("expect", "100-continue")]).version(Version::HTTP_10);
    assert!(!old.check().expect("good").expects_continue, "RFC 9110 §10.1.1");
}

#[test]
fn http2_has_an_authority_and_nothing_of_a_connection() {
    let h2 = |target: &str, headers: &[(&'static str, &str)]| {
        Head::bare("GET", target)
            .with(headers)
            .version(Version::HTTP_2)
            .status()
    };
    assert_eq!(h2("http://a.example/", &[]), 200);
    assert_eq!(
        h2("http://a.example/", &[("host", "A.example"), ("te", "trailers")]),
        200
    );
    assert_eq!(h2("/", &[("host", "a.example")]), 200, "RFC 9113 §8.3.1");
    assert_eq!(h2("/", &[]), 400);
    assert_eq!(h2("http://a.example/", &[("host", "b.example")]), 400);
    for (name, value) in [
        CONNECTION,
        UPGRADE,
        ("keep-alive", "1"),
        ("proxy-connection", "x"),
        ("te", "gzip"),
    ] {
        assert_eq!(h2("http://a.example/", &[(name, value)]), 400, "{name}");
    }
    assert_eq!(h2("http://a.example/", &[("transfer-encoding", "chunked")]), 400);
}

proptest! {
    #[test]
    fn it_never_panics(
        target in "[!-~é]{1,40}",
        method in "[A-Z]{1,8}",
        lines in prop::collection::vec((0..10_usize, any::<Vec<u8>>()), 0..8),
        version in 0..3_usize,
    ) {
        const NAMES: [&str; 10] = [
            "host", "content-length", "transfer-encoding", "expect", "connection", "upgrade", "sec-websocket-key",
            "sec-websocket-version", "te", "x_y",
        ];
        let Ok(uri) = target.parse::<Uri>() else { return Ok(()) };
        let mut head = Head::bare(&method, "/").version([Version::HTTP_10, Version::HTTP_11, Version::HTTP_2][version]);
        head.parts.uri = uri;
        for (name, value) in &lines {
            if let Ok(value) = HeaderValue::from_bytes(value) {
                head.parts.headers.append(NAMES[*name], value);
            }
        }
        if let Ok(target) = head.check() {
            prop_assert!(!target.host().is_empty());
            prop_assert!(target.path_and_query().starts_with('/'));
            prop_assert_eq!(target.host().to_ascii_lowercase(), target.host());
        }
    }
}
