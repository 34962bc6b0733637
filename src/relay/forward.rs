//! Headers on their way through, both ways: what belongs to one connection, to the relay or to a forger stays behind.
//! Pure. What any proxy leaves behind is `wire::fields`'; who forwarded for whom is `forwarded`'s.

use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::{
    forwarded::{self, Hop},
    strict::{Target, has_token},
};
use crate::{error::Cause, wire::fields};

/// Makes a request's headers fit for the upstream. They have passed [`strict::check`](super::strict::check).
pub fn to_upstream(headers: &mut HeaderMap, target: &Target, hop: &Hop<'_>) {
    let trailers = headers.get_all(header::TE).iter().any(|te| has_token(te, "trailers"));
    fields::strip_hop_by_hop(headers);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if target.websocket {
        ask_for_websocket(headers);
    }
    // Of an HTTP/1.0 client, which could not read a 100 (RFC 9110 §10.1.1).
    if !target.expects_continue {
        headers.remove(header::EXPECT);
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
    fields::strip_hop_by_hop(headers);
    if status.is_informational() || status == StatusCode::NO_CONTENT {
        headers.remove(header::CONTENT_LENGTH);
    }
    one_length(headers)
}

/// Makes the headers of a 101 to a WebSocket fit for the downstream, which has asked for nothing else.
pub fn to_downstream_websocket(headers: &mut HeaderMap) {
    fields::strip_hop_by_hop(headers);
    headers.remove(header::CONTENT_LENGTH);
    ask_for_websocket(headers);
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

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
