//! Who forwarded for whom: `X-Forwarded-*` and `Forwarded` (RFC 7239), believed only from trusted proxies. Pure.

use std::{
    fmt::Write,
    net::{IpAddr, SocketAddr},
};

use http::{HeaderMap, HeaderName, HeaderValue, header::FORWARDED};
use ipnet::IpNet;

use super::strict::Target;
use crate::wire::fields::remove_where;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// The hop that a request came over.
#[derive(Debug, Clone, Copy)]
pub struct Hop<'a> {
    /// The other end of the socket.
    pub peer: IpAddr,
    /// Whether the socket was TLS.
    pub tls: bool,
    /// Whether the request was HTTP/2.
    pub http2: bool,
    /// The proxies whose word is believed.
    pub trusted: &'a [IpNet],
}

impl Hop<'_> {
    fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.trusted.iter().any(|net| net.contains(&address))
    }

    fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    /// The true client: the last address, read from the nearest hop outwards, that no trusted proxy has. Believes
    /// `X-Forwarded-For`, else `Forwarded`; where they end or cannot be read, it is the proxy that wrote that.
    pub fn client_address(&self, headers: &HeaderMap) -> IpAddr {
        let mut client = self.peer.to_canonical();
        let name = if headers.contains_key(X_FORWARDED_FOR) {
            X_FORWARDED_FOR
        } else {
            FORWARDED
        };
        let lines: Vec<&HeaderValue> = headers.get_all(&name).iter().collect();
        let mut outwards = lines
            .iter()
            .rev()
            .flat_map(|line| line.as_bytes().rsplit(|&b| b == b','));
        while self.trusts(client) {
            let Some(element) = outwards.next() else { break };
            let node = if name == FORWARDED {
                for_of(element)
            } else {
                Some(element)
            };
            let Some(address) = node.and_then(parse_node) else {
                break;
            };
            client = address;
        }
        client
    }
}

/// Says over which hop the request came: after what a trusted proxy has said, or instead of what anyone else has.
pub(super) fn set(headers: &mut HeaderMap, target: &Target, hop: &Hop<'_>) {
    let peer = hop.peer.to_canonical();
    let trusted = hop.trusts(peer);
    if !trusted {
        remove_where(headers, is_hearsay);
    }
    append(headers, X_FORWARDED_FOR, &peer.to_string());
    append(headers, FORWARDED, &element(peer, target.authority(), hop.scheme()));
    if !headers.contains_key(X_FORWARDED_PROTO) {
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(hop.scheme()));
    }
    if !headers.contains_key(X_FORWARDED_HOST)
        && let Ok(host) = HeaderValue::from_str(target.authority())
    {
        headers.insert(X_FORWARDED_HOST, host);
    }
}

fn is_hearsay(name: &HeaderName) -> bool {
    *name == FORWARDED || name.as_str().starts_with("x-forwarded-") || name.as_str() == "x-real-ip"
}

/// Adds to the end of a list, on one line: some upstreams read only the first.
fn append(headers: &mut HeaderMap, name: HeaderName, last: &str) {
    let mut list = Vec::with_capacity(last.len());
    for value in headers.get_all(&name) {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(last.as_bytes());
    if let Ok(value) = HeaderValue::from_maybe_shared(bytes::Bytes::from(list)) {
        headers.insert(name, value);
    }
}

/// RFC 7239 §4 and §6: an IPv6 address stands in brackets, and what has a colon in quotes.
fn element(peer: IpAddr, authority: &str, scheme: &str) -> String {
    let mut text = String::with_capacity(64);
    // Writing to a String cannot fail.
    let _ = match peer {
        IpAddr::V4(v4) => write!(text, "for={v4}"),
        IpAddr::V6(v6) => write!(text, "for=\"[{v6}]\""),
    };
    let quote = if authority.contains(':') { "\"" } else { "" };
    let _ = write!(text, ";host={quote}{authority}{quote};proto={scheme}");
    text
}

/// The `for` of one element of `Forwarded`.
fn for_of(element: &[u8]) -> Option<&[u8]> {
    element.split(|&b| b == b';').find_map(|pair| {
        let (name, value) = pair.trim_ascii().split_at_checked(4)?;
        name.eq_ignore_ascii_case(b"for=").then_some(value)
    })
}

/// An address as proxies write it: bare, with a port, bracketed, quoted.
fn parse_node(node: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(node).ok()?.trim().trim_matches('"');
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text);
    let address = bare
        .parse()
        .ok()
        .or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip()))?;
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;
    use crate::relay::strict;

    fn nets() -> Vec<IpNet> {
        vec![
            "10.0.0.0/8".parse().expect("a net"),
            "2001:db8::/32".parse().expect("a net"),
        ]
    }

    fn hop<'a>(peer: &str, trusted: &'a [IpNet]) -> Hop<'a> {
        Hop {
            peer: peer.parse().expect("an address"),
            tls: false,
            http2: false,
            trusted,
        }
    }

    fn map(headers: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        headers.iter().map(pair).collect()
    }

    fn after(peer: &str, host: &str, sent: &[(&'static str, &'static str)]) -> HeaderMap {
        let (parts, ()) = Request::builder()
            .uri("/")
            .header("host", host)
            .body(())
            .expect("a request")
            .into_parts();
        let target = strict::check(&parts, &strict::Limits::default()).expect("a good head");
        let mut headers = map(sent);
        set(&mut headers, &target, &hop(peer, &nets()));
        headers
    }

    #[test]
    fn p19_a_strangers_word_is_dropped_and_ours_set() {
        let forged = [
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "bank.example"),
            ("x-forwarded-port", "443"),
            ("x-real-ip", "1.2.3.4"),
            ("forwarded", "for=1.2.3.4"),
        ];
        let headers = after("192.0.2.7", "a.example:8080", &forged);
        let ours = map(&[
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "a.example:8080"),
            ("forwarded", "for=192.0.2.7;host=\"a.example:8080\";proto=http"),
        ]);
        assert_eq!(headers, ours);
    }

    #[test]
    fn p19_a_trusted_proxys_word_is_kept_and_added_to() {
        let told = [
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-for", "10.9.9.9"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "a.example"),
            ("forwarded", "for=1.2.3.4"),
        ];
        let headers = after("::ffff:10.0.0.1", "a.internal", &told);
        let ours = map(&[
            ("x-forwarded-for", "1.2.3.4, 10.9.9.9, 10.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "a.example"),
            ("forwarded", "for=1.2.3.4, for=10.0.0.1;host=a.internal;proto=http"),
        ]);
        assert_eq!(headers, ours);
    }

    #[test]
    fn ipv6_is_quoted_in_forwarded() {
        let headers = after("2001:db9::1", "a", &[]);
        assert_eq!(headers["forwarded"], "for=\"[2001:db9::1]\";host=a;proto=http");
        assert_eq!(headers["x-forwarded-for"], "2001:db9::1");
    }

    #[test]
    fn the_client_is_the_first_stranger_outwards() {
        let nets = nets();
        let client =
            |peer: &str, sent: &[(&'static str, &'static str)]| hop(peer, &nets).client_address(&map(sent)).to_string();
        let xff = |list: &'static str| [("x-forwarded-for", list)];
        assert_eq!(
            client("192.0.2.7", &xff("1.2.3.4")),
            "192.0.2.7",
            "a stranger is not believed"
        );
        assert_eq!(client("10.0.0.1", &xff("6.6.6.6, 1.2.3.4, 10.2.2.2")), "1.2.3.4");
        assert_eq!(client("10.0.0.1", &xff("1.2.3.4:5678")), "1.2.3.4");
        assert_eq!(client("10.0.0.1", &xff("[2001:db9::5]:80")), "2001:db9::5");
        assert_eq!(client("10.0.0.1", &xff("junk, 10.3.3.3")), "10.3.3.3");
        assert_eq!(client("10.0.0.1", &xff("10.3.3.3")), "10.3.3.3", "all are ours");
        assert_eq!(client("10.0.0.1", &[]), "10.0.0.1");
        let two = [("x-forwarded-for", "1.1.1.1"), ("x-forwarded-for", "2.2.2.2")];
        assert_eq!(client("10.0.0.1", &two), "2.2.2.2");
        let forwarded = [(
            "forwarded",
            "for=9.9.9.9, by=10.1.1.1;FOR=\"[2001:db9::8]:4711\";proto=http",
        )];
        assert_eq!(client("2001:db8::1", &forwarded), "2001:db9::8");
    }
}
