//! W1: raw WebSocket frames, good and bad, directly at an echo server and through the tunnel: the same verdict, which is
//! the bytes that came back and how the connection ended.

#[path = "harness/mod.rs"]
mod harness;

use std::net::SocketAddr;

use adit::cluster::registry::NewAuth;
use futures_util::{SinkExt, StreamExt};
use harness::{TestAgent, TestRelay, within};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::task::AbortOnDropHandle;

/// Echoes messages; says with a close code what it did not like, and reads to the end.
async fn echo_server() -> (SocketAddr, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(echo(stream));
        }
    });
    (address, AbortOnDropHandle::new(task))
}

async fn echo(stream: TcpStream) {
    let Ok(mut ws) = tokio_tungstenite::accept_async(stream).await else {
        return;
    };
    let code = loop {
        match ws.next().await {
            Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                if ws.send(message).await.is_err() {
                    break None;
                }
            }
            Some(Ok(_)) => {}
            None | Some(Err(Error::ConnectionClosed)) => break None,
            Some(Err(Error::Utf8(_))) => break Some(1007u16),
            Some(Err(Error::Capacity(_))) => break Some(1009),
            Some(Err(_)) => break Some(1002),
        }
    };
    let stream = ws.get_mut();
    if let Some(code) = code {
        let [high, low] = code.to_be_bytes();
        stream.write_all(&[0x88, 2, high, low]).await.ok();
    }
    stream.shutdown().await.ok();
    tokio::io::copy(stream, &mut tokio::io::sink()).await.ok();
}

/// What came back after the handshake, and whether it ended in a reset.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    bytes: Vec<u8>,
    reset: bool,
}

async fn verdict(address: SocketAddr, input: &[u8]) -> Verdict {
    let mut socket = TcpStream::connect(address).await.expect("it listens");
    socket.set_nodelay(true).expect("a socket");
    let ask = "GET / HTTP/1.1\r\nhost: a\r\nadit-client: home\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n";
    socket.write_all(ask.as_bytes()).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within("the 101", socket.read_u8()).await.expect("a head"));
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    let (mut reader, mut writer) = socket.split();
    let send = async {
        writer.write_all(input).await.ok();
        writer.shutdown().await.ok();
    };
    let mut bytes = Vec::new();
    let ((), ended) = within("the end", async { tokio::join!(send, reader.read_to_end(&mut bytes)) }).await;
    Verdict {
        bytes,
        reset: ended.is_err(),
    }
}

/// A frame with a mask; `first` is FIN, reserved bits and opcode.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let mut out = vec![first];
    match payload.len() {
        n @ 0..126 => out.push(0x80 | n as u8),
        n @ 126..65_536 => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(n as u16).to_be_bytes());
        }
        n => {
            out.push(0x80 | 127);
            out.extend_from_slice(&(n as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out
}

const FIN: u8 = 0x80;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

fn close(code: u16) -> Vec<u8> {
    frame(FIN | CLOSE, &code.to_be_bytes())
}

/// Frames, and then a proper goodbye.
fn polite(frames: &[Vec<u8>]) -> Vec<u8> {
    [frames.concat(), close(1000)].concat()
}

fn fragments(opcode: u8, payload: &[u8], between: &[u8]) -> Vec<u8> {
    let last = payload.len() - 1;
    let piece = |(at, byte): (usize, &u8)| {
        let first = if at == 0 { opcode } else { 0 } | if at == last { FIN } else { 0 };
        [
            frame(first, &[*byte]),
            if at == last { Vec::new() } else { between.to_vec() },
        ]
        .concat()
    };
    payload.iter().enumerate().flat_map(piece).collect()
}

fn whole() -> Vec<(String, Vec<u8>)> {
    let mut cases = vec![
        ("nothing", Vec::new()),
        ("a close", polite(&[])),
        ("a text", polite(&[frame(FIN | TEXT, b"hello")])),
        ("an empty text", polite(&[frame(FIN | TEXT, b"")])),
        ("an empty binary", polite(&[frame(FIN | BINARY, b"")])),
        (
            "text beyond ASCII",
            polite(&[frame(FIN | TEXT, "κόσμε \u{10ffff}".as_bytes())]),
        ),
        (
            "a character in two fragments",
            polite(&[frame(TEXT, b"\xce"), frame(FIN, b"\xba")]),
        ),
        ("1-byte fragments", polite(&[fragments(BINARY, &[7; 5000], b"")])),
        (
            "1-byte fragments of text",
            polite(&[fragments(TEXT, &[b'x'; 2000], b"")]),
        ),
        (
            "pings between fragments",
            polite(&[fragments(TEXT, b"hello", &frame(FIN | PING, b"p"))]),
        ),
        (
            "empty fragments",
            polite(&[frame(TEXT, b""), frame(0, b"").repeat(500), frame(FIN, b"x")]),
        ),
        ("a ping", polite(&[frame(FIN | PING, b"")])),
        ("a long ping", polite(&[frame(FIN | PING, &[1; 125])])),
        ("a pong unasked", polite(&[frame(FIN | PONG, b"x")])),
        ("many pings", polite(&[frame(FIN | PING, b"f").repeat(500)])),
        ("a long unmasked frame", [&[0x82, 126, 1, 0][..], &[0; 256]].concat()),
        ("an unmasked frame", b"\x81\x05hello".to_vec()),
        ("an unmasked close", b"\x88\x02\x03\xe8".to_vec()),
        ("2^63 bytes", [&[0x82, 0xff, 0x80][..], &[0; 11]].concat()),
        (
            "2^63 - 1 bytes",
            [&[0x82, 0xff, 0x7f][..], &[0xff; 7], &[0; 4]].concat(),
        ),
        (
            "a gigabyte announced",
            [&[0x82, 0xff][..], &(1u64 << 30).to_be_bytes(), &[0; 4]].concat(),
        ),
        (
            "a length in more bytes than needed",
            polite(&[b"\x82\xfe\0\x01\0\0\0\0x".to_vec()]),
        ),
        ("bad UTF-8", frame(FIN | TEXT, b"\xff\xfe")),
        ("a surrogate", frame(FIN | TEXT, b"\xed\xa0\x80")),
        ("an overlong slash", frame(FIN | TEXT, b"\xc0\xaf")),
        ("text that ends in a character", frame(FIN | TEXT, b"\xce")),
        (
            "bad UTF-8 in a fragment",
            [frame(TEXT, b"ok"), frame(FIN, b"\xff")].concat(),
        ),
        ("a continuation of nothing", frame(FIN, b"x")),
        (
            "a continuation after an end",
            [frame(FIN | TEXT, b"a"), frame(FIN, b"x")].concat(),
        ),
        (
            "a text inside a text",
            [frame(TEXT, b"a"), frame(FIN | TEXT, b"b")].concat(),
        ),
        (
            "a binary inside a text",
            [frame(TEXT, b"a"), frame(FIN | BINARY, b"b")].concat(),
        ),
        ("a ping in fragments", [frame(PING, b"a"), frame(FIN, b"b")].concat()),
        (
            "a close in fragments",
            [frame(CLOSE, b"\x03"), frame(FIN, b"\xe8")].concat(),
        ),
        ("a ping too long", frame(FIN | PING, &[1; 126])),
        ("a close too long", frame(FIN | CLOSE, &[3; 126])),
        ("a close of one byte", frame(FIN | CLOSE, b"\x03")),
        ("a close with a reason", frame(FIN | CLOSE, b"\x03\xe8bye")),
        ("a close with bad UTF-8", frame(FIN | CLOSE, b"\x03\xe8\xff")),
        ("a close without a code", frame(FIN | CLOSE, b"")),
        (
            "a text after the close",
            [close(1000), frame(FIN | TEXT, b"late")].concat(),
        ),
        ("two closes", [close(1000), close(1001)].concat()),
        ("half a header", b"\x81".to_vec()),
        ("half a frame", frame(FIN | BINARY, &[1; 100])[..50].to_vec()),
        ("half a message", frame(TEXT, b"half")),
        ("not WebSocket at all", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_vec()),
        ("a message of 1 MiB", polite(&[frame(FIN | BINARY, &vec![9; 1 << 20])])),
    ]
    .into_iter()
    .map(|(what, input)| (what.to_owned(), input))
    .collect::<Vec<_>>();
    for reserved in [0x40, 0x20, 0x10, 0x70] {
        cases.push((
            format!("reserved bits {reserved:#x}"),
            frame(FIN | reserved | TEXT, b"x"),
        ));
    }
    for opcode in [3, 7, 0xb, 0xf] {
        cases.push((format!("opcode {opcode:#x}"), frame(FIN | opcode, b"x")));
    }
    for code in [
        0u16, 999, 1001, 1004, 1005, 1006, 1011, 1014, 1015, 1016, 2999, 3000, 4999, 5000, 65_535,
    ] {
        cases.push((format!("close code {code}"), close(code)));
    }
    cases
}

#[tokio::test]
async fn the_tunnel_changes_no_verdict() {
    let (upstream, _server) = echo_server().await;
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream).await;
    for (what, input) in whole() {
        let direct = verdict(upstream, &input).await;
        let tunnelled = verdict(relay.address, &input).await;
        assert!(!direct.reset, "{what}: the server reads to the end");
        assert!(
            direct == tunnelled,
            "{what}: directly {:.200?}, through the tunnel {:.200?}",
            brief(&direct),
            brief(&tunnelled)
        );
    }
    relay.stop().await;
}

fn brief(verdict: &Verdict) -> (usize, &[u8], &[u8], bool) {
    let bytes = &verdict.bytes;
    (
        bytes.len(),
        &bytes[..bytes.len().min(20)],
        &bytes[bytes.len().saturating_sub(20)..],
        verdict.reset,
    )
}
