//! Header fields that mean something to a proxy: what both ends of a tunnel leave behind, in heads and in trailers.
//! Pure. What only the relay does to a head is `relay::forward`'s.

use http::{HeaderMap, HeaderName, header};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// The relay's own headers, in both directions.
const ADIT_PREFIX: &str = "adit-";

/// Belong to one connection (RFC 9110 §7.6.1), or to the proxy that asked for or was given the credential (§11.7).
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Removes what concerns one connection only, what `Connection` names, what only the relay says, and a length that a
/// transfer coding overrides (RFC 9112 §6.3).
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    if headers.contains_key(header::CONNECTION) {
        strip_nominated(headers);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    remove_where(headers, |name| name.as_str().starts_with(ADIT_PREFIX));
}

/// Removes what `Connection` names, unless it means something end to end: a client must not be able to take its
/// credentials or its length away from behind us.
fn strip_nominated(headers: &mut HeaderMap) {
    let nominated: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&b| b == b','))
        .map(|token| token.trim_ascii())
        .filter(|token| !token.eq_ignore_ascii_case(b"close") && !token.eq_ignore_ascii_case(b"keep-alive"))
        .filter_map(|token| HeaderName::from_bytes(token).ok())
        .filter(|name| !is_end_to_end(name))
        .collect();
    for name in nominated {
        headers.remove(name);
    }
}

fn is_end_to_end(name: &HeaderName) -> bool {
    matches!(
        *name,
        header::HOST | header::AUTHORIZATION | header::COOKIE | header::SET_COOKIE | header::EXPECT | header::RANGE
    ) || ["content-", "sec-websocket-"]
        .iter()
        .any(|prefix| name.as_str().starts_with(prefix))
}

/// Drops the trailers that must not come so late (RFC 9110 §6.5.1), in either direction.
pub fn keep_trailers(trailers: &mut HeaderMap) {
    remove_where(trailers, |name| !may_trail(name));
}

/// Framing, routing, authentication, the body's own description, and what the relay or a proxy says stay in the head.
fn may_trail(name: &HeaderName) -> bool {
    const NEVER: [HeaderName; 19] = [
        header::HOST,
        header::TRAILER,
        header::AUTHORIZATION,
        header::WWW_AUTHENTICATE,
        header::COOKIE,
        header::SET_COOKIE,
        header::EXPECT,
        header::RANGE,
        header::MAX_FORWARDS,
        header::CACHE_CONTROL,
        header::PRAGMA,
        header::AGE,
        header::DATE,
        header::EXPIRES,
        header::LOCATION,
        header::RETRY_AFTER,
        header::VARY,
        header::WARNING,
        header::FORWARDED,
    ];
    const NEVER_PREFIXES: [&str; 9] = [
        ADIT_PREFIX,
        "access-control-",
        "content-",
        "if-",
        "proxy-",
        "sec-",
        "trace", // traceparent, tracestate
        "x-forwarded-",
        "x-real-ip",
    ];
    !HOP_BY_HOP.contains(name)
        && !NEVER.contains(name)
        && !NEVER_PREFIXES.iter().any(|prefix| name.as_str().starts_with(prefix))
}

/// Removes the headers whose name is one of those. Allocates only when there is one.
pub fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    let names: Vec<HeaderName> = headers.keys().filter(|name| unwanted(name)).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn p8_trailers_say_nothing_that_belongs_in_the_head() {
        let kept = ["grpc-status", "grpc-message", "x-sum", "traffic", "digest"];
        let dropped = [
            "content-length",
            "content-type",
            "transfer-encoding",
            "authorization",
            "cookie",
            "set-cookie",
            "host",
            "trailer",
            "connection",
            "adit-client",
            "forwarded",
            "x-forwarded-for",
            "if-range",
            "proxy-authorization",
            "traceparent",
        ];
        let mut trailers: HeaderMap = kept
            .iter()
            .chain(&dropped)
            .map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1")))
            .collect();
        trailers.append("x-sum", HeaderValue::from_static("2"));
        keep_trailers(&mut trailers);
        assert_eq!(trailers.keys_len(), kept.len(), "{trailers:?}");
        assert!(kept.iter().all(|name| trailers.contains_key(*name)), "{trailers:?}");
        assert_eq!(trailers.get_all("x-sum").iter().count(), 2);
    }

    #[test]
    fn a_coding_overrides_a_length() {
        let mut headers = HeaderMap::new();
        headers.insert("content-length", HeaderValue::from_static("3"));
        headers.insert("transfer-encoding", HeaderValue::from_static("chunked"));
        strip_hop_by_hop(&mut headers);
        assert!(headers.is_empty(), "{headers:?}");
    }
}
