//! Where a relay is: its URL, its domain, and the `host:port` that all addresses of a configuration share.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use http::uri::Authority;

use super::values::Invalid;

/// The longest host name (RFC 1035 §2.3.4, without the root's dot).
const HOST_MAX: usize = 253;
/// The longest [`Domain`]: a client's label of 63 and a dot go before it.
const DOMAIN_MAX: usize = HOST_MAX - 64;

/// The host name under which each client has its own: `{client_id}.{domain}`. Lower case, without a final dot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

impl Domain {
    /// The host name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Domain {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let name = text.to_ascii_lowercase();
        let numeric = name
            .rsplit('.')
            .next()
            .is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if name.len() > DOMAIN_MAX || numeric || !name.split('.').all(is_label) {
            return Err(Invalid(format!(
                "`{text}` is not a host name: write it like tunnel.example.org, without scheme, port or path"
            )));
        }
        Ok(Self(name))
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_label(label: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&label.len()) && label.bytes().all(allowed) && !label.starts_with('-') && !label.ends_with('-')
}

/// Where a relay is: `http://host[:port]` or `https://…`; `ws` and `wss` are taken for the same. Prints as `http(s)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayUrl {
    /// Whether TLS is spoken (`https`, `wss`).
    pub tls: bool,
    /// Host, and port unless it is the scheme's default.
    pub authority: Authority,
}

impl RelayUrl {
    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.authority.port_u16().unwrap_or(if self.tls { 443 } else { 80 })
    }
}

impl FromStr for RelayUrl {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = |why: &str| {
            Invalid(format!(
                "`{text}` {why}: write the relay's address like https://tunnel.example.org or http://127.0.0.1:8080"
            ))
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| wrong("has no scheme"))?;
        let (tls, default_port) = match scheme.to_ascii_lowercase().as_str() {
            "http" | "ws" => (false, 80),
            "https" | "wss" => (true, 443),
            _ => return Err(wrong("has another scheme than http and https")),
        };
        let authority = authority(rest, Some(default_port)).map_err(wrong)?;
        Ok(Self { tls, authority })
    }
}

impl fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme(), self.authority)
    }
}

/// Parses `host[:port]` with an optional final `/`, lower-cases it and drops the port if it is the default.
///
/// Without a default, the port must be there. The error is a phrase that follows the text.
pub(super) fn authority(text: &str, default_port: Option<u16>) -> Result<Authority, &'static str> {
    let text = text.strip_suffix('/').unwrap_or(text);
    if text.contains(['/', '?', '#']) {
        return Err("has a path, but a tunnel has none of its own");
    }
    if text.contains('@') {
        return Err("has a user name, which is not served");
    }
    let (host, port) = split_port(text)?;
    if !is_host(host) {
        return Err("has no valid host");
    }
    let port = match (port, default_port) {
        (None, None) => return Err("has no port"),
        (None, Some(_)) => None,
        (Some(port), _) => Some(port_number(port)?),
    };
    let found = match port {
        Some(port) if Some(port) != default_port => format!("{host}:{port}"),
        _ => host.to_owned(),
    };
    Authority::try_from(found.to_ascii_lowercase()).map_err(|_| "has no valid host")
}

fn split_port(text: &str) -> Result<(&str, Option<&str>), &'static str> {
    let after_host = if text.starts_with('[') {
        text.find(']').ok_or("has no valid host")? + 1
    } else {
        0
    };
    match text.get(after_host..).and_then(|rest| rest.find(':')) {
        Some(colon) => Ok((&text[..after_host + colon], Some(&text[after_host + colon + 1..]))),
        None => Ok((text, None)),
    }
}

fn is_host(host: &str) -> bool {
    if let Some(address) = host.strip_prefix('[') {
        return address
            .strip_suffix(']')
            .is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    (1..=HOST_MAX).contains(&host.len()) && host.bytes().all(allowed) && !host.starts_with(['.', '-'])
}

fn port_number(text: &str) -> Result<u16, &'static str> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<u16>() {
        Ok(port) if digits && port != 0 => Ok(port),
        _ => Err("has no valid port"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn relays_are_http_or_websocket_urls() {
        let url: RelayUrl = "wss://Tunnel.Example.org/".parse().expect("a relay");
        assert_eq!(
            (url.to_string().as_str(), url.port()),
            ("https://tunnel.example.org", 443)
        );
        let url: RelayUrl = "http://127.0.0.1:8080".parse().expect("a relay");
        assert_eq!((url.to_string().as_str(), url.port()), ("http://127.0.0.1:8080", 8080));
        for bad in ["", "127.0.0.1:8080", "ftp://x", "https://", "https://x/ws"] {
            assert!(bad.parse::<RelayUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn domains_are_host_names() {
        assert_eq!(
            "Tunnel.Example.org".parse::<Domain>().expect("a domain").as_str(),
            "tunnel.example.org"
        );
        assert!("localhost".parse::<Domain>().is_ok());
        for bad in [
            "",
            ".",
            "a..b",
            "a.",
            "-a.org",
            "https://a.org",
            "a.org:80",
            "a.org/x",
            "10.0.0.1",
            "a_b.org",
            "ö.org",
        ] {
            assert!(bad.parse::<Domain>().is_err(), "{bad}");
        }
        assert!(format!("{}.org", "a.".repeat(100)).parse::<Domain>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*", tail in "[\\[\\]:/@a1]*") {
            for text in [text, format!("http://{tail}"), tail] {
                let _ = (text.parse::<Domain>(), text.parse::<RelayUrl>());
            }
        }
    }
}
