//! The head of a sender's response, which its first packet carries as JSON, and what of it the downstream may see.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};

use crate::wire::{fields, head::ResponseHead};

/// A head as it came: of whichever request, so that a bad one fails that request and not the tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawHead {
    /// Any number.
    pub status: u16,
    /// A JSON object of texts, or it is a [`HeadError`].
    pub headers: Bytes,
}

/// The response cannot be passed on: 502 for whoever asked, and an abort for the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Not from 100 to 999.
    #[error("{0} is no status")]
    NoStatus(u16),
    /// Below 200: after it another head would have to come, which the dialect has not.
    #[error("{0} is no final status")]
    NotFinal(u16),
    /// The headers are no JSON object of texts.
    #[error("the headers are no JSON object of texts")]
    NotTexts,
    /// A name or a value that HTTP does not allow.
    #[error("a header is not valid HTTP")]
    NotHttp,
}

impl RawHead {
    /// The head as any upstream would have sent it: without what concerned the sender's own connection.
    pub fn parse(&self) -> Result<ResponseHead, HeadError> {
        let status = StatusCode::from_u16(self.status).map_err(|_| HeadError::NoStatus(self.status))?;
        if status.is_informational() {
            return Err(HeadError::NotFinal(self.status));
        }
        let texts: BTreeMap<String, String> = serde_json::from_slice(&self.headers).map_err(|_| HeadError::NotTexts)?;
        let mut headers = HeaderMap::with_capacity(texts.len());
        for (name, value) in texts {
            let name = HeaderName::try_from(name).map_err(|_| HeadError::NotHttp)?;
            headers.append(name, HeaderValue::try_from(value).map_err(|_| HeadError::NotHttp)?);
        }
        fields::strip_hop_by_hop(&mut headers);
        if is_bodiless(status) {
            headers.remove(header::CONTENT_LENGTH);
        }
        Ok(ResponseHead { status, headers })
    }
}

/// Whether the response to this method has a body; if not, bytes that come all the same are not passed on.
pub fn carries_body(method: &Method, status: StatusCode) -> bool {
    *method != Method::HEAD && !is_bodiless(status)
}

/// RFC 9110 §6.4.1.
fn is_bodiless(status: StatusCode) -> bool {
    matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(status: u16, headers: &'static str) -> Result<ResponseHead, HeadError> {
        let headers = Bytes::from_static(headers.as_bytes());
        RawHead { status, headers }.parse()
    }

    #[test]
    fn what_concerned_the_senders_connection_stays_behind() {
        let sent = r#"{"content-type":"audio/flac","Transfer-Encoding":"chunked","connection":"close, x-once",
            "x-once":"1","keep-alive":"1","x-utf8":"ö","content-length":"5","adit-error":"forged"}"#;
        let head = parse(206, sent).expect("a head");
        let mut left: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!((head.status.as_u16(), left), (206, vec!["content-type", "x-utf8"]));
    }

    #[test]
    fn a_length_is_kept_where_there_may_be_a_body() {
        let length = |status| {
            let head = parse(status, r#"{"content-length":"5"}"#).expect("a head");
            head.headers.contains_key("content-length")
        };
        assert!(length(200) && length(404) && length(999));
        assert!(!length(204) && !length(304));
        assert!(carries_body(&Method::GET, StatusCode::OK));
        assert!(!carries_body(&Method::HEAD, StatusCode::OK));
        assert!(!carries_body(&Method::GET, StatusCode::NOT_MODIFIED));
    }

    #[test]
    fn a_head_that_is_no_head_is_an_error() {
        for status in [0, 99, 1000, u16::MAX] {
            assert_eq!(parse(status, "{}").err(), Some(HeadError::NoStatus(status)));
        }
        assert_eq!(parse(101, "{}").err(), Some(HeadError::NotFinal(101)));
        for bad in ["", "[]", "{", r#"{"a":1}"#, r#"{"a":null}"#, "null", "{}x"] {
            assert_eq!(parse(200, bad).err(), Some(HeadError::NotTexts), "{bad}");
        }
        for bad in [
            r#"{"a b":"1"}"#,
            r#"{"":"1"}"#,
            r#"{"a":"x\r\ny: z"}"#,
            r#"{"a\r\nb":"x"}"#,
        ] {
            assert_eq!(parse(200, bad).err(), Some(HeadError::NotHttp), "{bad}");
        }
    }
}
