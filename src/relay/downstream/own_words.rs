//! The relay's own answers as bytes, for when hyper has no say: before it starts, and in place of its bare 400s.

use std::io::IoSlice;

use axum::body::to_bytes;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use http::{HeaderMap, StatusCode};

use crate::{error::Cause, ids::RequestId};

/// What a downstream whose bytes are not HTTP/1.1 is told.
const NOT_HTTP: Cause = Cause::BadRequest(
    "the request is not valid HTTP/1.1: its request line, a header line, or the length of its body is malformed",
);

/// More than any problem+json of ours.
const MAX_BODY: usize = 16 * 1024;

/// A whole HTTP/1.1 response, problem+json, after which the connection is closed.
pub(super) fn whole(cause: &Cause) -> Bytes {
    let (parts, body) = cause.respond(RequestId::new()).into_parts();
    // The body is in memory, so it is there at the first poll.
    let body = to_bytes(body, MAX_BODY)
        .now_or_never()
        .and_then(Result::ok)
        .unwrap_or_default();
    let mut out = BytesMut::with_capacity(512 + body.len());
    put_status_line(&mut out, parts.status);
    put_headers(&mut out, &parts.headers);
    if !parts.headers.contains_key(http::header::CONNECTION) {
        out.put_slice(b"connection: close\r\n");
    }
    out.put_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
    out.put_slice(&body);
    out.freeze()
}

/// An interim (1xx) response as HTTP/1.1 bytes.
pub(super) fn interim(status: StatusCode, headers: &HeaderMap) -> Bytes {
    let mut out = BytesMut::with_capacity(256);
    put_status_line(&mut out, status);
    put_headers(&mut out, headers);
    out.put_slice(b"\r\n");
    out.freeze()
}

fn put_status_line(out: &mut BytesMut, status: StatusCode) {
    out.put_slice(b"HTTP/1.1 ");
    out.put_slice(status.as_str().as_bytes());
    out.put_slice(b" ");
    out.put_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    out.put_slice(b"\r\n");
}

fn put_headers(out: &mut BytesMut, headers: &HeaderMap) {
    for (name, value) in headers {
        out.put_slice(name.as_str().as_bytes());
        out.put_slice(b": ");
        out.put_slice(value.as_bytes());
        out.put_slice(b"\r\n");
    }
}

/// Which answer replaces the bare one that hyper wrote by itself on a parse error (hyper 1.12 `Server::on_error`:
/// 400, 414 or 431 and nothing else).
pub(super) fn in_place_of(bare: &[IoSlice<'_>]) -> Option<Cause> {
    let head = bare.first()?;
    let status = head
        .strip_prefix(b"HTTP/1.1 ")
        .or_else(|| head.strip_prefix(b"HTTP/1.0 "))?;
    match status.get(..4)? {
        b"400 " => Some(NOT_HTTP),
        b"414 " => Some(Cause::UriTooLong),
        b"431 " => Some(Cause::HeadersTooLarge),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_and_says_who_made_it() {
        let bytes = whole(&Cause::BadRequest("why"));
        let text = std::str::from_utf8(&bytes).expect("text");
        assert!(text.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{text}");
        assert!(text.contains("\r\nadit-error: bad-request\r\n"), "{text}");
        assert_eq!(text.matches("connection: close\r\n").count(), 1, "{text}");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(head.contains(&format!("content-length: {}", body.len())), "{text}");
        assert!(body.contains("\"detail\":\"why\""), "{body}");
    }

    #[test]
    fn only_hypers_own_errors_are_replaced() {
        let replaced = |text: &str| in_place_of(&[IoSlice::new(text.as_bytes())]).map(|cause| cause.code());
        assert_eq!(replaced("HTTP/1.1 400 Bad Request\r\n"), Some("bad-request"));
        assert_eq!(replaced("HTTP/1.0 414 URI Too Long\r\n"), Some("uri-too-long"));
        assert_eq!(replaced("HTTP/1.1 431 \r\n"), Some("headers-too-large"));
        assert_eq!(replaced("HTTP/1.1 200 OK\r\n"), None);
        assert_eq!(replaced("HTTP/1.1 40"), None);
        assert_eq!(in_place_of(&[]), None);
    }
}
