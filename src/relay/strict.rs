//! Which request heads are let in: whatever two parsers could read in two ways is refused, and the rest is one [`Target`]
//! that authentication and routing both use. Pure; never normalises anything.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, header, request::Parts, uri::PathAndQuery};

use super::authority::{Named, host_and_port};
use crate::error::Cause;

/// How long a head may be.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of the request target.
    pub target: usize,
    /// Bytes of all header lines.
    pub headers: usize,
    /// Header lines.
    pub fields: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            target: 8 * 1024,
            headers: 32 * 1024,
            fields: 100,
        }
    }
}

/// Registered methods have at most 17 letters (UPDATEREDIRECTREF).
const MAX_METHOD: usize = 32;

/// What a request asks for, of whom: parsed once.
#[derive(Debug, Clone)]
pub struct Target {
    authority: Named,
    /// The authority in lower case, where that differs from what was sent.
    lowered: Option<Box<str>>,
    host_len: usize,
    path_and_query: PathAndQuery,
    /// A well-formed request to switch to a WebSocket.
    pub websocket: bool,
    /// The client waits for a 100 before it sends the body, and can read one.
    pub expects_continue: bool,
}

impl Target {
    /// The host in lower case, without port and without the root's dot: what names the client.
    pub fn host(&self) -> &str {
        let host = self.lowered.as_deref().unwrap_or(self.authority.as_str());
        host.get(..self.host_len).unwrap_or(host)
    }

    /// Host and port as they were sent.
    pub fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// Byte for byte what was sent. (A `#fragment`, which no client sends, is cut off by the parser below us.)
    pub fn path_and_query(&self) -> &str {
        self.path_and_query.as_str()
    }

    /// The path as it was sent.
    pub fn path(&self) -> &str {
        self.path_and_query.path()
    }

    /// The same host, asked for something else, and plainly.
    pub(super) fn instead(self, path_and_query: PathAndQuery) -> Self {
        Self {
            path_and_query,
            websocket: false,
            expects_continue: false,
            ..self
        }
    }

    /// What follows the first `?`.
    pub fn query(&self) -> Option<&str> {
        self.path_and_query.query()
    }
}

/// Checks a head that hyper has parsed. Errors are 400, 405, 414, 417, 426, 431 and 501.
pub fn check(parts: &Parts, limits: &Limits) -> Result<Target, Cause> {
    check_method(&parts.method)?;
    let path_and_query = check_target(&parts.uri, &parts.method, limits)?;
    let fields = Fields::scan(&parts.headers, parts.version, limits)?;
    let (authority, host_len) = check_authority(&parts.uri, &fields)?;
    let sent = authority.as_str();
    let lowered = sent.bytes().any(|b| b.is_ascii_uppercase());
    Ok(Target {
        lowered: lowered.then(|| sent.to_ascii_lowercase().into()),
        websocket: fields.check_websocket(&parts.method, parts.version)?,
        expects_continue: fields.expects_continue && parts.version != Version::HTTP_10,
        authority,
        host_len,
        path_and_query,
    })
}

fn check_method(method: &Method) -> Result<(), Cause> {
    match *method {
        Method::GET | Method::POST => Ok(()),
        Method::CONNECT | Method::TRACE => Err(Cause::MethodNotAllowed),
        _ if method.as_str().len() > MAX_METHOD => Err(Cause::NotImplemented("no method has so long a name")),
        _ => Ok(()),
    }
}

fn check_target(uri: &Uri, method: &Method, limits: &Limits) -> Result<PathAndQuery, Cause> {
    if let Some(scheme) = uri.scheme_str()
        && scheme != "http"
        && scheme != "https"
    {
        return Err(Cause::BadRequest("the request target's scheme must be http or https"));
    }
    let Some(path_and_query) = uri.path_and_query() else {
        return Err(Cause::BadRequest(
            "the request target must be a path, or a whole http:// URL",
        ));
    };
    let text = path_and_query.as_str();
    if text.len() + uri.authority().map_or(0, |authority| authority.as_str().len()) > limits.target {
        return Err(Cause::UriTooLong);
    }
    if text == "*" && method == Method::OPTIONS {
        return Err(Cause::NotImplemented(
            "`OPTIONS *` asks about the relay and is not relayed: name a path",
        ));
    }
    if !text.starts_with('/') {
        return Err(Cause::BadRequest("the request target must begin with `/`"));
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Cause::BadRequest(
            "the request target has bytes outside ASCII: percent-encode them",
        ));
    }
    if has_forbidden_escape(text.as_bytes()) {
        return Err(Cause::BadRequest("the request target must not contain %00, %0A or %0D"));
    }
    Ok(path_and_query.clone())
}

/// NUL and line ends, which break out of lines and strings once decoded.
fn has_forbidden_escape(text: &[u8]) -> bool {
    let mut rest = text;
    while let Some(at) = rest.iter().position(|&b| b == b'%') {
        rest = &rest[at + 1..];
        if let [b'0', b'0' | b'a' | b'A' | b'd' | b'D', ..] = rest {
            return true;
        }
    }
    false
}

/// The headers that decide where a request ends and where it goes, found in one pass.
#[derive(Default)]
struct Fields<'a> {
    host: Option<&'a HeaderValue>,
    content_length: Option<&'a HeaderValue>,
    chunked: bool,
    upgrade_websocket: bool,
    connection_upgrade: bool,
    expects_continue: bool,
    websocket_keys: usize,
    websocket_key: Option<&'a HeaderValue>,
    websocket_versions: usize,
    websocket_version: Option<&'a HeaderValue>,
}

impl<'a> Fields<'a> {
    fn scan(headers: &'a HeaderMap, version: Version, limits: &Limits) -> Result<Self, Cause> {
        if headers.len() > limits.fields {
            return Err(Cause::HeadersTooLarge);
        }
        let mut fields = Self::default();
        let mut size = 0;
        for (name, value) in headers {
            // As on the wire: `name: value\r\n`.
            size += name.as_str().len() + value.len() + 4;
            if name.as_str().as_bytes().contains(&b'_') {
                return Err(Cause::BadRequest(
                    "a header name has `_` in it, which some servers read as `-`",
                ));
            }
            fields.take(name, value)?;
            if version == Version::HTTP_2 {
                check_http2(name, value)?;
            }
        }
        if size > limits.headers {
            return Err(Cause::HeadersTooLarge);
        }
        if fields.chunked && fields.content_length.is_some() {
            // hyper has read the body as chunked and dropped the length (RFC 9112 §6.3); this is a head it did not read.
            return Err(Cause::BadRequest("send either Content-Length or Transfer-Encoding"));
        }
        Ok(fields)
    }

    fn take(&mut self, name: &HeaderName, value: &'a HeaderValue) -> Result<(), Cause> {
        match *name {
            header::HOST => {
                put_once(&mut self.host, value, "there is more than one Host header")?;
            }
            header::CONTENT_LENGTH => {
                const NOT_ONE: &str = "Content-Length must be one plain decimal number";
                put_once(&mut self.content_length, value, NOT_ONE)?;
                if !is_canonical_length(value.as_bytes()) {
                    return Err(Cause::BadRequest(NOT_ONE));
                }
            }
            header::TRANSFER_ENCODING => {
                if self.chunked || !value.as_bytes().eq_ignore_ascii_case(b"chunked") {
                    return Err(Cause::BadRequest("Transfer-Encoding must be exactly `chunked`"));
                }
                self.chunked = true;
            }
            header::EXPECT => {
                if self.expects_continue || !value.as_bytes().eq_ignore_ascii_case(b"100-continue") {
                    return Err(Cause::ExpectationFailed);
                }
                self.expects_continue = true;
            }
            header::CONNECTION => self.connection_upgrade |= has_token(value, "upgrade"),
            header::UPGRADE => self.upgrade_websocket |= has_token(value, "websocket"),
            header::SEC_WEBSOCKET_KEY => {
                self.websocket_keys += 1;
                self.websocket_key = Some(value);
            }
            header::SEC_WEBSOCKET_VERSION => {
                self.websocket_versions += 1;
                self.websocket_version = Some(value);
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether it asks for a WebSocket, and if so, whether it does so properly (RFC 6455 §4.2.1). Any other upgrade is
    /// not relayed, and the request is served as if it had not been asked for (RFC 9110 §7.8).
    fn check_websocket(&self, method: &Method, version: Version) -> Result<bool, Cause> {
        if !self.upgrade_websocket || !self.connection_upgrade || version == Version::HTTP_2 {
            return Ok(false);
        }
        if version != Version::HTTP_11 {
            return Err(Cause::BadRequest("a WebSocket needs HTTP/1.1"));
        }
        if method != Method::GET {
            return Err(Cause::BadRequest("a WebSocket begins with GET"));
        }
        if self.chunked || self.content_length.is_some_and(|length| length != "0") {
            return Err(Cause::BadRequest("a WebSocket's request has no body"));
        }
        if self.websocket_versions != 1 || self.websocket_version.is_none_or(|version| version != "13") {
            return Err(Cause::UpgradeRequired);
        }
        if self.websocket_keys != 1 || !self.websocket_key.is_some_and(is_websocket_key) {
            return Err(Cause::BadRequest("Sec-WebSocket-Key must be 16 bytes in base64, once"));
        }
        Ok(true)
    }
}

fn put_once<'a>(
    place: &mut Option<&'a HeaderValue>,
    value: &'a HeaderValue,
    otherwise: &'static str,
) -> Result<(), Cause> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Cause::BadRequest(otherwise)),
    }
}

/// What belongs to a connection has no place in HTTP/2 (RFC 9113 §8.2.2).
fn check_http2(name: &HeaderName, value: &HeaderValue) -> Result<(), Cause> {
    let forbidden = match *name {
        header::CONNECTION | header::TRANSFER_ENCODING | header::UPGRADE => true,
        header::TE => !value.as_bytes().eq_ignore_ascii_case(b"trailers"),
        _ => matches!(name.as_str(), "keep-alive" | "proxy-connection"),
    };
    if forbidden {
        return Err(Cause::BadRequest("HTTP/2 has no headers that belong to a connection"));
    }
    Ok(())
}

/// `0`, or digits that do not begin with `0`.
fn is_canonical_length(value: &[u8]) -> bool {
    value == b"0" || (value.iter().all(u8::is_ascii_digit) && value.first().is_some_and(|b| *b != b'0'))
}

/// Whether a comma-separated list has this token, in any case.
pub(super) fn has_token(value: &HeaderValue, token: &str) -> bool {
    value
        .as_bytes()
        .split(|&b| b == b',')
        .any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// 16 bytes in base64: 22 characters and `==`.
fn is_websocket_key(value: &HeaderValue) -> bool {
    let is_base64 = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/');
    match value.as_bytes().split_last_chunk::<2>() {
        Some((digits, b"==")) => digits.len() == 22 && digits.iter().all(is_base64),
        _ => false,
    }
}

/// The one authority of a request: from its target and from `Host`, which must agree. With the length of its host.
fn check_authority(uri: &Uri, fields: &Fields<'_>) -> Result<(Named, usize), Cause> {
    const BAD_HOST: Cause = Cause::BadRequest("the host must be one name or address, with or without a port");
    let sent = fields.host.map(HeaderValue::as_bytes);
    let host = sent.map(|sent| host_and_port(sent).ok_or(BAD_HOST)).transpose()?;
    let Some(authority) = uri.authority() else {
        let (Some(value), Some(host)) = (fields.host, host) else {
            return Err(Cause::BadRequest("the request names no host: send a Host header"));
        };
        return Ok((Named::InHost(value.clone()), host.0.len()));
    };
    let target = host_and_port(authority.as_str().as_bytes()).ok_or(BAD_HOST)?;
    let default_port = if uri.scheme_str() == Some("https") { 443 } else { 80 };
    let same = |(name, port): (&[u8], Option<u16>)| {
        name.eq_ignore_ascii_case(target.0) && port.unwrap_or(default_port) == target.1.unwrap_or(default_port)
    };
    if !host.is_none_or(same) {
        return Err(Cause::BadRequest(
            "the request target and the Host header name different hosts",
        ));
    }
    Ok((Named::InTarget(authority.clone()), target.0.len()))
}

#[cfg(test)]
#[path = "strict_tests.rs"]
mod tests;
