//! HTTP on a stream: heads, body and trailers as records, as HTTP/3 puts them on QUIC (RFC 9114 §4).
//!
//! A record is `u8 kind | u32 length | payload`. A request is one REQUEST, any number of DATA, at most one TRAILERS; a
//! response is any number of interim RESPONSEs, one final one, then the same. The stream's end ends the message; a stream
//! that ends inside a record was broken. After an upgrade the DATA of both streams is the connection's bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 3;
const TRAILERS: u8 = 4;

const RECORD_HEADER: usize = 5;

/// The longest head or trailers, bytes: twice what the relay lets a request have, so that an upstream may answer more.
pub const MAX_HEAD: usize = 80 * 1024;

/// The head of a request as it goes to the upstream.
#[derive(Debug, Clone)]
pub struct RequestHead {
    /// The method, as sent.
    pub method: Method,
    /// Path and query, byte for byte as sent.
    pub target: Bytes,
    /// What the agent needs to know beside the message.
    pub flags: RequestFlags,
    /// The fields, `host` among them.
    pub headers: HeaderMap,
}

/// How the upstream is to be called.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestFlags {
    /// The request has no body.
    pub empty: bool,
    /// It asks for an upgrade to a WebSocket.
    pub upgrade: bool,
}

/// The head of a response, final or interim.
#[derive(Debug, Clone)]
pub struct ResponseHead {
    /// 100 to 999; below 200 interim, except 101.
    pub status: StatusCode,
    /// The fields.
    pub headers: HeaderMap,
}

/// One record, or a part of a DATA record.
#[derive(Debug)]
pub enum Record {
    /// The first record of a request.
    Request(RequestHead),
    /// An interim or the final head of a response.
    Response(ResponseHead),
    /// Bytes of the body.
    Data(Bytes),
    /// What follows the body.
    Trailers(HeaderMap),
}

/// Bytes that are no records. The exchange is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// A length field points outside its record, or a head is longer than [`MAX_HEAD`].
    #[error("a record is malformed or too long")]
    Malformed,
    /// A method, status, name or value that HTTP does not allow.
    #[error("a head is not valid HTTP")]
    NotHttp,
    /// The stream ended inside a record.
    #[error("the stream ended inside a record")]
    Unfinished,
}

impl RequestHead {
    /// The record that carries it.
    pub fn encode(&self) -> Bytes {
        record(REQUEST, |out| {
            out.put_u8(u8::from(self.flags.empty) | u8::from(self.flags.upgrade) << 1);
            put_short(out, self.method.as_str().as_bytes());
            put_short(out, &self.target);
            put_headers(out, &self.headers);
        })
    }

    fn decode(mut body: Bytes) -> Result<Self, HeadError> {
        let flags = take(&mut body, 1)?[0];
        let method = Method::from_bytes(&take_short(&mut body)?).map_err(|_| HeadError::NotHttp)?;
        let target = take_short(&mut body)?;
        let flags = RequestFlags {
            empty: flags & 1 != 0,
            upgrade: flags & 2 != 0,
        };
        Ok(Self {
            method,
            target,
            flags,
            headers: take_headers(&mut body)?,
        })
    }
}

impl ResponseHead {
    /// The record that carries it.
    pub fn encode(&self) -> Bytes {
        record(RESPONSE, |out| {
            out.put_u16(self.status.as_u16());
            put_headers(out, &self.headers);
        })
    }

    fn decode(mut body: Bytes) -> Result<Self, HeadError> {
        let status = take(&mut body, 2)?.get_u16();
        let status = StatusCode::from_u16(status).map_err(|_| HeadError::NotHttp)?;
        Ok(Self {
            status,
            headers: take_headers(&mut body)?,
        })
    }
}

/// The record that carries trailers.
pub fn encode_trailers(trailers: &HeaderMap) -> Bytes {
    record(TRAILERS, |out| put_headers(out, trailers))
}

/// What goes before `length` bytes of body.
pub fn data_header(length: usize) -> Bytes {
    let mut out = BytesMut::with_capacity(RECORD_HEADER);
    out.put_u8(DATA);
    out.put_u32(length as u32);
    out.freeze()
}

fn record(kind: u8, payload: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::with_capacity(512);
    out.put_u8(kind);
    out.put_u32(0);
    payload(&mut out);
    let length = (out.len() - RECORD_HEADER) as u32;
    out[1..RECORD_HEADER].copy_from_slice(&length.to_be_bytes());
    out.freeze()
}

/// At most 65,535 bytes: heads are bounded far below that before they come here, and a longer text is cut, never wrapped.
fn put_short(out: &mut BytesMut, text: &[u8]) {
    let text = &text[..text.len().min(usize::from(u16::MAX))];
    out.put_u16(text.len() as u16);
    out.put_slice(text);
}

fn put_headers(out: &mut BytesMut, headers: &HeaderMap) {
    out.put_u16(headers.len().min(usize::from(u16::MAX)) as u16);
    for (name, value) in headers {
        put_short(out, name.as_str().as_bytes());
        put_short(out, value.as_bytes());
    }
}

fn take(body: &mut Bytes, length: usize) -> Result<Bytes, HeadError> {
    if body.len() < length {
        Err(HeadError::Malformed)
    } else {
        Ok(body.split_to(length))
    }
}

fn take_short(body: &mut Bytes) -> Result<Bytes, HeadError> {
    let length = take(body, 2)?.get_u16();
    take(body, usize::from(length))
}

fn take_headers(body: &mut Bytes) -> Result<HeaderMap, HeadError> {
    let count = usize::from(take(body, 2)?.get_u16());
    let mut headers = HeaderMap::with_capacity(count.min(64));
    for _ in 0..count {
        let name = HeaderName::from_bytes(&take_short(body)?).map_err(|_| HeadError::NotHttp)?;
        let value = HeaderValue::from_maybe_shared(take_short(body)?).map_err(|_| HeadError::NotHttp)?;
        headers.try_append(name, value).map_err(|_| HeadError::Malformed)?;
    }
    Ok(headers)
}

/// Reads records from a stream's bytes, however they were cut.
#[derive(Debug, Default)]
pub struct RecordReader {
    /// A record that is not whole yet.
    partial: BytesMut,
    chunk: Bytes,
    data_left: usize,
}

impl RecordReader {
    /// Gives it the next bytes. Call [`next_record`](Self::next_record) until it returns `None` before giving more.
    pub fn push(&mut self, chunk: Bytes) {
        debug_assert!(self.chunk.is_empty(), "what was pushed before has been read");
        self.chunk = chunk;
    }

    /// The next record, as far as its bytes are here.
    pub fn next_record(&mut self) -> Result<Option<Record>, HeadError> {
        loop {
            if self.data_left > 0 {
                let part = self.chunk.split_to(self.chunk.len().min(self.data_left));
                self.data_left -= part.len();
                return Ok((!part.is_empty()).then_some(Record::Data(part)));
            }
            let Some((kind, length)) = self.header()? else {
                return Ok(None);
            };
            if kind == DATA {
                self.partial.clear();
                self.data_left = length;
                continue;
            }
            if !self.gather(RECORD_HEADER + length) {
                return Ok(None);
            }
            let mut whole = std::mem::take(&mut self.partial).freeze();
            whole.advance(RECORD_HEADER);
            match kind {
                REQUEST => return RequestHead::decode(whole).map(|head| Some(Record::Request(head))),
                RESPONSE => return ResponseHead::decode(whole).map(|head| Some(Record::Response(head))),
                TRAILERS => return take_headers(&mut whole).map(|trailers| Some(Record::Trailers(trailers))),
                _ => {} // of a later version
            }
        }
    }

    fn header(&mut self) -> Result<Option<(u8, usize)>, HeadError> {
        if !self.gather(RECORD_HEADER) {
            return Ok(None);
        }
        let length = u32::from_be_bytes([self.partial[1], self.partial[2], self.partial[3], self.partial[4]]) as usize;
        let kind = self.partial[0];
        if kind != DATA && length > MAX_HEAD {
            return Err(HeadError::Malformed);
        }
        Ok(Some((kind, length)))
    }

    /// Moves bytes from the chunk until `partial` has `length`; false when there are not enough.
    fn gather(&mut self, length: usize) -> bool {
        let wanted = length.saturating_sub(self.partial.len()).min(self.chunk.len());
        self.partial.extend_from_slice(&self.chunk.split_to(wanted));
        self.partial.len() >= length
    }

    /// Whether everything that was pushed has been read, and no record is open.
    pub fn is_between_records(&self) -> bool {
        self.chunk.is_empty() && self.end().is_ok()
    }

    /// The stream has ended: an error when it did so inside a record.
    pub fn end(&self) -> Result<(), HeadError> {
        if self.partial.is_empty() && self.data_left == 0 {
            Ok(())
        } else {
            Err(HeadError::Unfinished)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> (Vec<u8>, HeaderMap) {
        let mut headers = HeaderMap::new();
        headers.append("set-cookie", HeaderValue::from_static("a=1"));
        headers.append("x-raw", HeaderValue::from_bytes(b"\xff\xfe").expect("obs-text"));
        headers.append("set-cookie", HeaderValue::from_static("b=2"));
        let interim = ResponseHead {
            status: StatusCode::EARLY_HINTS,
            headers: HeaderMap::new(),
        };
        let head = ResponseHead {
            status: StatusCode::OK,
            headers: headers.clone(),
        };
        let mut bytes = [
            interim.encode(),
            head.encode(),
            data_header(5),
            Bytes::from_static(b"hello"),
        ]
        .concat();
        bytes.extend_from_slice(&[9, 0, 0, 0, 2, 1, 2]);
        bytes.extend_from_slice(&encode_trailers(&headers));
        (bytes, headers)
    }

    fn read(bytes: &[u8], cut: usize) -> Result<Vec<Record>, HeadError> {
        let mut reader = RecordReader::default();
        let mut records = Vec::new();
        for chunk in bytes.chunks(cut) {
            reader.push(Bytes::copy_from_slice(chunk));
            while let Some(record) = reader.next_record()? {
                records.push(record);
            }
        }
        reader.end().map(|()| records)
    }

    #[test]
    fn records_survive_any_cut() {
        let (bytes, headers) = message();
        for cut in 1..=bytes.len() {
            let (mut statuses, mut body, mut trailers) = (Vec::new(), Vec::new(), None);
            for record in read(&bytes, cut).expect("records") {
                match record {
                    Record::Response(head) => statuses.push((head.status.as_u16(), head.headers)),
                    Record::Data(data) => body.extend_from_slice(&data),
                    Record::Trailers(fields) => trailers = Some(fields),
                    Record::Request(_) => panic!("there is no request in it"),
                }
            }
            assert_eq!(statuses, [(103, HeaderMap::new()), (200, headers.clone())]);
            assert_eq!(body, b"hello");
            assert_eq!(trailers, Some(headers.clone()));
        }
    }

    #[test]
    fn a_request_head_survives() {
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("home.example"));
        let flags = RequestFlags {
            empty: true,
            upgrade: true,
        };
        let head = RequestHead {
            method: Method::PATCH,
            target: Bytes::from_static(b"/a/../b?x=%2e"),
            flags,
            headers,
        };
        match read(&head.encode(), 3).expect("records").pop() {
            Some(Record::Request(read)) => {
                assert_eq!(
                    (read.method, read.target, read.flags),
                    (head.method, head.target, flags)
                );
                assert_eq!(read.headers, head.headers);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_end_inside_a_record_is_an_error() {
        let (bytes, _) = message();
        let whole: Vec<usize> = (1..bytes.len()).filter(|&end| read(&bytes[..end], 7).is_ok()).collect();
        // The ends of the two heads, of the body, and of the record that this version does not know.
        assert_eq!(whole.len(), 4, "{whole:?}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), cut in 1usize..50) {
            let _ = read(&bytes, cut);
        }

        #[test]
        fn no_record_makes_it_panic(kind in 1u8..5, body in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&record(kind, |out| out.put_slice(&body)), 1000);
        }
    }
}
