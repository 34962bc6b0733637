//! Which client a request is for: its host name, else `Adit-Client`, else `clientId` in the query (in any case, if none
//! is written so: MoosicBox's apps do).

use std::str;

use http::HeaderMap;

use super::strict::Target;
use crate::{
    error::Cause,
    ids::{CLIENT_ID_MAX, ClientId},
};

/// The header that names a client on the relay's own host.
pub const ADIT_CLIENT: &str = "adit-client";
/// The query parameter that does.
const CLIENT_ID_PARAMETER: &str = "clientId";

/// Whom a request is addressed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addressed {
    /// A client's own host: every path is the client's.
    ClientHost(ClientId),
    /// The relay's host, where some paths are the relay's; and the client that header or query names.
    Apex(Option<ClientId>),
}

/// Reads the client off a request. `domain` is the relay's, in lower case. A name that is no client id, or that is
/// there twice in one place, is a 400.
pub fn client_of(target: &Target, headers: &HeaderMap, domain: Option<&str>) -> Result<Addressed, Cause> {
    if let Some(label) = domain.and_then(|domain| label_under(target.host(), domain)) {
        return parse(label).map(Addressed::ClientHost);
    }
    if let Some(id) = from_header(headers)? {
        return Ok(Addressed::Apex(Some(id)));
    }
    target.query().map_or(Ok(None), from_query).map(Addressed::Apex)
}

/// `home` of `home.example.com` under `example.com`.
fn label_under<'a>(host: &'a str, domain: &str) -> Option<&'a str> {
    host.strip_suffix(domain)?.strip_suffix('.')
}

fn from_header(headers: &HeaderMap) -> Result<Option<ClientId>, Cause> {
    let mut values = headers.get_all(ADIT_CLIENT).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Cause::BadRequest("there is more than one Adit-Client header"));
    }
    parse(value.to_str().unwrap_or_default()).map(Some)
}

fn from_query(query: &str) -> Result<Option<ClientId>, Cause> {
    let value = match the_one(query, |name| name == CLIENT_ID_PARAMETER)? {
        None => the_one(query, |name| name.eq_ignore_ascii_case(CLIENT_ID_PARAMETER))?,
        exact => exact,
    };
    let Some(value) = value else { return Ok(None) };
    let mut room = [0; CLIENT_ID_MAX];
    let decoded = percent_decode(value.as_bytes(), &mut room).and_then(|bytes| str::from_utf8(bytes).ok());
    parse(decoded.unwrap_or_default()).map(Some)
}

/// The value of the parameter of such a name, which may be there once.
fn the_one(query: &str, is_name: fn(&str) -> bool) -> Result<Option<&str>, Cause> {
    let mut values = query.split('&').filter_map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        is_name(name).then_some(value)
    });
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        _ => Err(Cause::BadRequest("there is more than one clientId in the query")),
    }
}

fn parse(text: &str) -> Result<ClientId, Cause> {
    text.parse()
        .map_err(|_| Cause::BadRequest("a client id is 1 to 63 characters of a-z, 0-9 and '-'"))
}

/// Decodes `%XX` into `room`; `None` when it does not fit or an escape is broken.
fn percent_decode<'a>(mut text: &[u8], room: &'a mut [u8]) -> Option<&'a [u8]> {
    let mut len = 0;
    while let Some((&first, rest)) = text.split_first() {
        let (byte, rest) = match (first, rest) {
            (b'%', [high, low, rest @ ..]) => (hex(*high)? << 4 | hex(*low)?, rest),
            (b'%', _) => return None,
            _ => (first, rest),
        };
        *room.get_mut(len)? = byte;
        len += 1;
        text = rest;
    }
    room.get(..len)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| value.try_into().ok())
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request};
    use proptest::prelude::*;

    use super::*;
    use crate::relay::strict;

    const DOMAIN: Option<&str> = Some("example.com");

    fn ask(target: &str, host: &str, named: &[&str]) -> Result<Addressed, Cause> {
        let mut request = Request::builder().uri(target).header("host", host);
        for name in named {
            request = request.header(ADIT_CLIENT, *name);
        }
        let (parts, ()) = request.body(()).expect("a request").into_parts();
        let target = strict::check(&parts, &strict::Limits::default())?;
        client_of(&target, &parts.headers, DOMAIN)
    }

    fn id(text: &str) -> ClientId {
        text.parse().expect("a client id")
    }

    #[test]
    fn the_host_comes_first_then_the_header_then_the_query() {
        for host in ["home.example.com", "HOME.Example.com:8080", "home.example.com."] {
            let addressed = ask("/?clientId=c", host, &["b"]);
            assert_eq!(addressed, Ok(Addressed::ClientHost(id("home"))), "{host}");
        }
        let apex = |client: Option<&str>| Ok(Addressed::Apex(client.map(id)));
        assert_eq!(ask("/?clientId=c", "example.com", &["b"]), apex(Some("b")));
        assert_eq!(ask("/?a=1&clientId=c&b", "example.com", &[]), apex(Some("c")));
        assert_eq!(ask("/?clientId=%63%2D9", "relay.internal", &[]), apex(Some("c-9")));
        assert_eq!(ask("/?xclientId=c&a=clientId=c", "example.com", &[]), apex(None));
        assert_eq!(ask("/?a=1&ClientID=c", "example.com", &[]), apex(Some("c")));
        assert_eq!(ask("/?clientid=d&clientId=c", "example.com", &[]), apex(Some("c")));
        assert_eq!(ask("/", "notexample.com", &[]), apex(None), "a suffix, but not a label");
    }

    #[test]
    fn a4_a_name_that_is_no_client_id_is_refused() {
        let refused = |addressed: Result<Addressed, Cause>| matches!(addressed, Err(Cause::BadRequest(_)));
        for host in ["a.b.example.com", "_x.example.com", ".example.com", "a~b.example.com"] {
            assert!(refused(ask("/", host, &[])), "{host}");
        }
        for bad in [
            "*",
            "a:b",
            "../x",
            "A",
            "home ",
            "a%00",
            "%zz",
            "%",
            "%6",
            "",
            "a+b",
            &"x".repeat(64),
        ] {
            let target = format!("/?clientId={}", bad.replace(' ', "%20"));
            assert!(refused(ask(&target, "example.com", &[])), "{bad}");
        }
        for bad in ["*", "a:b", "../x", "A", "h ome", "", &"x".repeat(64)] {
            assert!(refused(ask("/", "example.com", &[bad])), "{bad}");
        }
    }

    #[test]
    fn a_client_named_twice_is_refused() {
        assert!(ask("/?clientId=a&clientId=a", "example.com", &[]).is_err());
        assert!(ask("/?clientid=a&CLIENTID=a", "example.com", &[]).is_err());
        assert!(ask("/", "example.com", &["a", "a"]).is_err());
    }

    proptest! {
        #[test]
        fn it_never_panics(query in "[!-~]{0,80}", host in "[ -~]{0,40}", name in any::<Vec<u8>>()) {
            let mut request = Request::builder().uri("/").header("host", host);
            if let Ok(uri) = format!("/?{query}").parse::<http::Uri>() {
                request = request.uri(uri);
            }
            if let Ok(name) = HeaderValue::from_bytes(&name) {
                request = request.header(ADIT_CLIENT, name);
            }
            let (parts, ()) = request.body(()).expect("a request").into_parts();
            if let Ok(target) = strict::check(&parts, &strict::Limits::default()) {
                let _ = client_of(&target, &parts.headers, DOMAIN);
            }
        }
    }
}
