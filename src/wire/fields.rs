//! Header fields that mean something to a proxy, at both ends of a tunnel.

use http::{HeaderMap, HeaderName, header};

/// Never taken away by being named in `Connection`: they are for the far end.
const KEPT: [HeaderName; 3] = [header::HOST, header::AUTHORIZATION, header::COOKIE];

/// Removes what concerns one connection only (RFC 9110 §7.6.1), and what `Connection` names. `TE: trailers` stays.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    // The length that was beside it does not count (RFC 9112 §6.3), and must not outlive it.
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    if let Some(named) = headers.contains_key(header::CONNECTION).then(|| nominated(headers)) {
        named
            .into_iter()
            .filter(|name| !KEPT.contains(name))
            .for_each(|name| drop(headers.remove(name)));
    }
    for name in [
        "connection",
        "keep-alive",
        "proxy-connection",
        "transfer-encoding",
        "upgrade",
    ] {
        headers.remove(name);
    }
    if let Some(te) = headers.remove(header::TE) {
        let trailers = te
            .as_bytes()
            .split(|&b| b == b',')
            .any(|part| part.trim_ascii().eq_ignore_ascii_case(b"trailers"));
        if trailers {
            headers.insert(header::TE, http::HeaderValue::from_static("trailers"));
        }
    }
}

fn nominated(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(header::CONNECTION).iter();
    let names = values.flat_map(|value| value.as_bytes().split(|&b| b == b','));
    names
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect()
}

/// Drops the trailers that frame, route, authenticate or describe (RFC 9110 §6.5.1), which must not come so late.
pub fn keep_trailers(trailers: &mut HeaderMap) {
    let doomed: Vec<HeaderName> = trailers.keys().filter(|name| !may_trail(name)).cloned().collect();
    doomed.into_iter().for_each(|name| drop(trailers.remove(name)));
}

fn may_trail(name: &HeaderName) -> bool {
    let name = name.as_str();
    let prefixes = [
        "content-",
        "adit-",
        "x-forwarded-",
        "proxy-",
        "sec-",
        "if-",
        "access-control-",
    ];
    let exact = [
        "transfer-encoding",
        "host",
        "authorization",
        "cookie",
        "set-cookie",
        "connection",
        "keep-alive",
        "te",
        "trailer",
        "upgrade",
        "forwarded",
        "expect",
        "range",
        "max-forwards",
        "cache-control",
        "www-authenticate",
        "age",
        "date",
        "expires",
        "location",
        "retry-after",
        "vary",
        "warning",
        "traceparent",
        "tracestate",
    ];
    !prefixes.iter().any(|prefix| name.starts_with(prefix)) && !exact.contains(&name)
}
