//! A request's authority: what may stand in `Host` and in the target. Whether the two agree is `strict`'s.

use std::str;

use http::{HeaderValue, uri::Authority};

/// Where the authority stands. Either shares hyper's buffer, so neither costs an allocation.
#[derive(Debug, Clone)]
pub(super) enum Named {
    InTarget(Authority),
    InHost(HeaderValue),
}

impl Named {
    pub fn as_str(&self) -> &str {
        match self {
            Named::InTarget(authority) => authority.as_str(),
            // Checked to be ASCII.
            Named::InHost(value) => value.to_str().unwrap_or_default(),
        }
    }
}

/// A name, IPv4 address or bracketed IPv6 address (without the root's dot), and a port of 1 to 65535 if there is one.
pub(super) fn host_and_port(text: &[u8]) -> Option<(&[u8], Option<u16>)> {
    let is_name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    let is_ipv6 = |b: &u8| b.is_ascii_hexdigit() || matches!(b, b':' | b'.');
    let host_len = match text.iter().position(|&b| b == b']') {
        Some(end) => end + 1,
        None => text.iter().position(|&b| b == b':').unwrap_or(text.len()),
    };
    let (host, rest) = text.split_at_checked(host_len)?;
    let port = match rest {
        [] => None,
        [b':', digits @ ..] => Some(parse_port(digits)?),
        _ => return None,
    };
    let well_formed = match host {
        [b'[', inner @ .., b']'] => inner.len() >= 2 && inner.iter().all(is_ipv6),
        name => name.iter().all(is_name),
    };
    let host = host.strip_suffix(b".").unwrap_or(host);
    (well_formed && !host.is_empty()).then_some((host, port))
}

fn parse_port(digits: &[u8]) -> Option<u16> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(digits).ok()?.parse().ok().filter(|port| *port > 0)
}
