//! Headers on their way through, both ways: what belongs to one connection, to the relay or to a forger stays behind.
//! Pure. Who forwarded for whom is `forwarded`'s.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::{
    forwarded::{self, Hop},
    strict::{Target, has_token},
};
use crate::error::Cause;

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

/// Makes a request's headers fit for the upstream. They have passed [`strict::check`](super::strict::check).
pub fn to_upstream(headers: &mut HeaderMap, target: &Target, hop: &Hop<'_>) {
    let trailers = headers.get_all(header::TE).iter().any(|te| has_token(te, "trailers"));
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    strip(headers);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if target.websocket {
        ask_for_websocket(headers);
    }
    if hop.http2 {
        join_cookies(headers);
    }
    // HTTP/2 has it in `:authority`; the upstream may speak HTTP/1.1, which needs it.
    if !headers.contains_key(header::HOST)
        && let Ok(host) = HeaderValue::from_str(target.authority())
    {
        headers.insert(header::HOST, host);
    }
    forwarded::set(headers, target, hop);
}

/// Makes a final response's headers fit for the downstream. The error is [`Cause::UpstreamFailed`]: several different
/// lengths, or one that is no number.
pub fn to_downstream(headers: &mut HeaderMap, status: StatusCode) -> Result<(), Cause> {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    strip(headers);
    if status.is_informational() || status == StatusCode::NO_CONTENT {
        headers.remove(header::CONTENT_LENGTH);
    }
    one_length(headers)
}

/// Makes the headers of a 101 to a WebSocket fit for the downstream, which has asked for nothing else.
pub fn to_downstream_websocket(headers: &mut HeaderMap) {
    strip(headers);
    headers.remove(header::CONTENT_LENGTH);
    ask_for_websocket(headers);
}

/// Drops what a trailer must not say (RFC 9110 §6.5.1), in either direction.
pub fn trailers(trailers: &mut HeaderMap) {
    remove_where(trailers, |name| !may_trail(name));
}

fn strip(headers: &mut HeaderMap) {
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

fn ask_for_websocket(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

/// HTTP/2 splits cookies for its compression; HTTP/1.1 has one line of them (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if let Ok(joined) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Equal lengths, on several lines or in a list, become one (RFC 9110 §8.6); anything else but a number is an error.
fn one_length(headers: &mut HeaderMap) -> Result<(), Cause> {
    let mut values = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(first) = values.next() else { return Ok(()) };
    let plain = values.next().is_none() && first.as_bytes().iter().all(u8::is_ascii_digit);
    let mut lengths = headers
        .get_all(header::CONTENT_LENGTH)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&b| b == b','))
        .map(|item| parse_length(item.trim_ascii()));
    let length = lengths.next().flatten().ok_or(Cause::UpstreamFailed)?;
    if !lengths.all(|other| other == Some(length)) {
        return Err(Cause::UpstreamFailed);
    }
    if !plain {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(())
}

fn parse_length(digits: &[u8]) -> Option<u64> {
    let all_digits = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(digits).ok().filter(|_| all_digits)?;
    text.parse().ok()
}

/// Framing, routing, authentication, the body's own description, and what the relay or a proxy says stay in the head.
fn may_trail(name: &HeaderName) -> bool {
    const NEVER: [HeaderName; 23] = [
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
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        header::FORWARDED,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
    ];
    let prefixes = [ADIT_PREFIX, "content-", "x-forwarded-", "x-real-ip", "if-", "sec-"];
    !HOP_BY_HOP.contains(name) && !NEVER.contains(name) && !prefixes.iter().any(|p| name.as_str().starts_with(p))
}

/// Removes the headers whose name is one of those. Allocates only when there is one.
pub(super) fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    let names: Vec<HeaderName> = headers.keys().filter(|name| unwanted(name)).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
