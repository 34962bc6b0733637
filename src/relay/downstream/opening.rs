//! What a new connection's first bytes say: HTTP/1, HTTP/2 with prior knowledge, or something that is not for this port.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::tls;

/// RFC 9113 §3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first bytes of the PROXY protocol's version 2; version 1 is a text line.
const PROXY_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const PROXY_V1: [&[u8]; 2] = [b"PROXY T", b"PROXY U"];
/// From here on a version 2 header is no run of empty lines, which HTTP/1 allows before a request.
const PROXY_V2_CERTAIN: usize = 5;
/// Room for a usual head, so that hyper's first read has it whole.
const FIRST_READ: usize = 2 * 1024;

/// What the peer speaks; the bytes read so far go to whoever serves it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opening {
    Http1(Bytes),
    Http2(Bytes),
    /// Not for this port; the text says what to do.
    Wrong(&'static str),
    /// Closed without a byte.
    Silent,
}

/// Reads until the protocol is certain: one byte for most requests, 24 for HTTP/2. The caller sets the deadline.
pub(super) async fn read<T: AsyncRead + Unpin>(io: &mut T) -> io::Result<Opening> {
    let mut seen = BytesMut::with_capacity(FIRST_READ);
    loop {
        let ended = io.read_buf(&mut seen).await? == 0;
        match judge(&seen) {
            Verdict::Http1 => return Ok(Opening::Http1(seen.freeze())),
            Verdict::Http2 => return Ok(Opening::Http2(seen.freeze())),
            Verdict::Wrong(why) => return Ok(Opening::Wrong(why)),
            Verdict::More if ended && seen.is_empty() => return Ok(Opening::Silent),
            Verdict::More if ended => return Ok(Opening::Http1(seen.freeze())),
            Verdict::More => {}
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    More,
    Http1,
    Http2,
    Wrong(&'static str),
}

fn judge(seen: &[u8]) -> Verdict {
    match seen.first() {
        None => return Verdict::More,
        Some(&tls::HANDSHAKE) => {
            return Verdict::Wrong("this port speaks plain HTTP and was sent a TLS handshake: use http://");
        }
        Some(_) => {}
    }
    let proxy_v2 = seen.len() >= PROXY_V2_CERTAIN && starts_alike(seen, PROXY_V2);
    if proxy_v2 || PROXY_V1.iter().any(|start| seen.starts_with(start)) {
        return Verdict::Wrong("this port was sent a PROXY protocol header: turn it off at the load balancer");
    }
    if seen.starts_with(PREFACE) {
        return Verdict::Http2;
    }
    let undecided =
        PREFACE.starts_with(seen) || PROXY_V2.starts_with(seen) || PROXY_V1.iter().any(|p| p.starts_with(seen));
    if undecided { Verdict::More } else { Verdict::Http1 }
}

fn starts_alike(a: &[u8], b: &[u8]) -> bool {
    a.iter().zip(b).all(|(a, b)| a == b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_decide_however_they_are_cut() {
        let wrong = |verdict: &Verdict| matches!(verdict, Verdict::Wrong(_));
        for (bytes, is) in [
            (&b"GET / HTTP/1.1\r\n"[..], Some(Verdict::Http1)),
            (b"POST / HTTP/1.1\r\n", Some(Verdict::Http1)),
            (b"PUT / HTTP/1.1\r\n", Some(Verdict::Http1)),
            (b"PROXY /x HTTP/1.1\r\n", Some(Verdict::Http1)),
            (b"PRI * HTTP/2.0\r\n\r\nSX", Some(Verdict::Http1)),
            (b"\r\n\r\nGET / HTTP/1.1\r\n", Some(Verdict::Http1)),
            (b"\xff\xfe", Some(Verdict::Http1)),
            (PREFACE, Some(Verdict::Http2)),
            (b"\x16\x03\x01\x02\x00\x01", None),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", None),
            (b"PROXY UNKNOWN\r\n", None),
            (PROXY_V2, None),
        ] {
            let whole = judge(bytes);
            assert!(is.map_or(wrong(&whole), |is| whole == is), "{bytes:?}: {whole:?}");
            let decided = (0..=bytes.len())
                .map(|n| judge(&bytes[..n]))
                .find(|v| *v != Verdict::More);
            assert_eq!(decided, Some(whole), "{bytes:?}, a byte at a time");
        }
    }

    #[tokio::test]
    async fn a_peer_that_ends_early_is_left_to_the_parser() {
        assert_eq!(read(&mut &b""[..]).await.expect("no error"), Opening::Silent);
        let cut = read(&mut &b"PRI"[..]).await.expect("no error");
        assert_eq!(cut, Opening::Http1(Bytes::from_static(b"PRI")));
    }
}
