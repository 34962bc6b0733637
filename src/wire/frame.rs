//! The frames of `adit.v1` and their encoding.
//!
//! A WebSocket binary message holds one or more frames. A frame is `u8 kind | u24 length | body`, big-endian; a body may
//! grow at its end in later versions, and a kind that this version does not know is skipped by its length. Numbers are
//! never reused. Words and meanings follow QUIC (RFC 9000 §19), with a request id in place of the stream id.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::stream::{Ack, Chunk};
use crate::ids::RequestId;

/// The WebSocket sub-protocol, and with it the version.
pub const SUBPROTOCOL: &str = "adit.v1";

/// The most payload one OPEN or STREAM frame carries, bytes. 16 KiB keeps turns short, WebSocket buffers small
/// (they never shrink), and values on the bus under Redis's 32 KiB threshold.
pub const MAX_PAYLOAD: usize = 16 * 1024;

/// The largest message that is accepted, bytes. Those sent hold about one payload.
pub const MAX_MESSAGE: usize = 2 * MAX_PAYLOAD + 1024;

/// What a stream may send before it has heard from its peer, bytes. A constant of `adit.v1`, both directions.
pub const INITIAL_WINDOW: u64 = 64 * 1024;

const HEADER: usize = 4;
const ID: usize = 16;

mod kind {
    pub const HELLO: u8 = 0x01;
    pub const PING: u8 = 0x02;
    pub const PONG: u8 = 0x03;
    pub const DRAIN: u8 = 0x04;
    pub const SUPERSEDED: u8 = 0x05;
    pub const GOODBYE: u8 = 0x06;
    pub const OPEN: u8 = 0x10;
    pub const STREAM: u8 = 0x11;
    pub const ACK: u8 = 0x12;
    pub const STOP: u8 = 0x13;
    pub const RESET: u8 = 0x14;
    pub const DONE: u8 = 0x15;
}

const FLAG_FIN: u8 = 1;
const FLAG_MOVED: u8 = 1;

/// One frame. Payloads share the message they came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Who is speaking, as JSON: see [`super::hello`]. The first frame of each side.
    Hello(Bytes),
    /// Answer with a [`Frame::Pong`] of the same number.
    Ping(u64),
    /// The answer to a [`Frame::Ping`].
    Pong(u64),
    /// Open a tunnel elsewhere, then leave this one; the milliseconds that are left for it.
    Drain(u32),
    /// A newer tunnel of the same instance and slot took over; this one is about to be closed.
    Superseded,
    /// The agent's process ends: its exchanges will not be resumed.
    Goodbye,
    /// Begin an exchange: the first bytes of its request stream, from offset 0. Safe to repeat.
    Open(RequestId, Chunk<Bytes>),
    /// Bytes of the stream that runs in this frame's direction.
    Stream(RequestId, Chunk<Bytes>),
    /// What has been received of the stream that runs the other way, and what more may be sent.
    Ack(RequestId, Ack),
    /// Send no more: what comes will not be read (STOP_SENDING).
    Stop(RequestId, Code),
    /// The exchange is over in both directions, abruptly (RESET_STREAM).
    Reset(RequestId, Code),
    /// The exchange is over and whole: forget it. Batched.
    Done(RequestId),
}

/// One frame, not looked into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raw {
    /// The exchange that it belongs to.
    pub id: Option<RequestId>,
    /// Whether it is an OPEN.
    pub opens: bool,
    /// All of it, as on the wire.
    pub bytes: Bytes,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// Why an exchange was reset. Unknown numbers of a later version are kept as they are.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code { $($(#[$doc])* $name,)* /** A number that this version does not know. */ Other(u32) }
        impl Code {
            /// The number on the wire.
            pub fn number(self) -> u32 {
                match self { $(Code::$name => $number,)* Code::Other(number) => number }
            }
            /// From the number on the wire.
            pub fn from_number(number: u32) -> Self {
                match number { $($number => Code::$name,)* other => Code::Other(other) }
            }
        }
    };
}

codes! {
    /// The other end does not know this exchange (any more).
    Gone = 1,
    /// The downstream left.
    Cancelled = 2,
    /// The upstream could not be reached: no byte of the request was sent to it.
    UpstreamUnreachable = 3,
    /// The upstream broke off, or its answer was not valid HTTP.
    UpstreamFailed = 4,
    /// The agent is at its limit of exchanges: the request did not reach the upstream.
    Refused = 5,
    /// The peer broke the rules of this protocol.
    Protocol = 6,
    /// The path was lost and did not come back in time.
    PathLost = 7,
    /// A deadline passed.
    Timeout = 8,
    /// The downstream's request body broke off.
    RequestBroken = 9,
    /// The agent's process ended.
    AgentLeft = 10,
    /// The exchange was here and is over.
    Finished = 11,
}

/// Why a message is not a sequence of frames. The link it came on is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The message ends inside a frame.
    #[error("a frame is cut short")]
    Truncated,
    /// A payload exceeds [`MAX_PAYLOAD`].
    #[error("a frame's payload exceeds 16 KiB")]
    TooLong,
}

impl Frame {
    /// Takes the next frame of `message`; `None` at its end. Unknown kinds are skipped.
    pub fn decode(message: &mut Bytes) -> Result<Option<Frame>, FrameError> {
        while message.has_remaining() {
            if message.len() < HEADER {
                return Err(FrameError::Truncated);
            }
            let kind = message.get_u8();
            let length = message.get_uint(3) as usize;
            if message.len() < length {
                return Err(FrameError::Truncated);
            }
            let mut body = message.split_to(length);
            if let Some(frame) = Self::decode_body(kind, &mut body)? {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    fn decode_body(kind: u8, body: &mut Bytes) -> Result<Option<Frame>, FrameError> {
        Ok(Some(match kind {
            kind::HELLO => Frame::Hello(body.split_off(0)),
            kind::PING => Frame::Ping(u64_of(body)?),
            kind::PONG => Frame::Pong(u64_of(body)?),
            kind::DRAIN => Frame::Drain(u32_of(body)?),
            kind::SUPERSEDED => Frame::Superseded,
            kind::GOODBYE => Frame::Goodbye,
            kind::OPEN => Frame::Open(id_of(body)?, open_of(body)?),
            kind::STREAM => Frame::Stream(id_of(body)?, chunk_of(body)?),
            kind::ACK => Frame::Ack(id_of(body)?, ack_of(body)?),
            kind::STOP => Frame::Stop(id_of(body)?, Code::from_number(u32_of(body)?)),
            kind::RESET => Frame::Reset(id_of(body)?, Code::from_number(u32_of(body)?)),
            kind::DONE => Frame::Done(id_of(body)?),
            _ => return Ok(None),
        }))
    }

    /// Takes the next frame of `message` as it is on the wire, with the exchange that it belongs to; `None` at the end.
    /// Frames of the connection itself, and unknown kinds, belong to none. For whoever only passes frames on.
    pub fn split(message: &mut Bytes) -> Result<Option<Raw>, FrameError> {
        if message.is_empty() {
            return Ok(None);
        }
        if message.len() < HEADER {
            return Err(FrameError::Truncated);
        }
        let length = usize::from(message[1]) << 16 | usize::from(message[2]) << 8 | usize::from(message[3]);
        if message.len() - HEADER < length {
            return Err(FrameError::Truncated);
        }
        let bytes = message.split_to(HEADER + length);
        let of_exchange = (kind::OPEN..=kind::DONE).contains(&bytes[0]);
        let id = bytes.get(HEADER..HEADER + ID).filter(|_| of_exchange);
        let id = id.and_then(|id| id.try_into().ok()).map(RequestId::from_bytes);
        let opens = bytes[0] == kind::OPEN;
        Ok(Some(Raw { id, opens, bytes }))
    }

    /// Appends this frame to a message.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Frame::Hello(json) => {
                header(out, kind::HELLO, json.len());
                out.put_slice(json);
            }
            Frame::Ping(number) => number_frame(out, kind::PING, *number),
            Frame::Pong(number) => number_frame(out, kind::PONG, *number),
            Frame::Drain(milliseconds) => {
                header(out, kind::DRAIN, 4);
                out.put_u32(*milliseconds);
            }
            Frame::Superseded => header(out, kind::SUPERSEDED, 0),
            Frame::Goodbye => header(out, kind::GOODBYE, 0),
            Frame::Open(id, chunk) => {
                open_header(out, *id, chunk.data.len(), chunk.fin);
                out.put_slice(&chunk.data);
            }
            Frame::Stream(id, chunk) => {
                stream_header(out, *id, chunk.offset, chunk.data.len(), chunk.fin);
                out.put_slice(&chunk.data);
            }
            Frame::Ack(id, ack) => put_ack(out, *id, ack),
            Frame::Stop(id, code) => code_frame(out, kind::STOP, *id, *code),
            Frame::Reset(id, code) => code_frame(out, kind::RESET, *id, *code),
            Frame::Done(id) => {
                header(out, kind::DONE, ID);
                out.put_slice(&id.to_bytes());
            }
        }
    }
}

fn header(out: &mut BytesMut, kind: u8, length: usize) {
    debug_assert!(length < 1 << 24, "every body is below MAX_MESSAGE");
    out.reserve(HEADER + length);
    out.put_u8(kind);
    out.put_uint(length as u64, 3);
}

fn number_frame(out: &mut BytesMut, kind: u8, number: u64) {
    header(out, kind, 8);
    out.put_u64(number);
}

fn code_frame(out: &mut BytesMut, kind: u8, id: RequestId, code: Code) {
    header(out, kind, ID + 4);
    out.put_slice(&id.to_bytes());
    out.put_u32(code.number());
}

/// The head of an OPEN whose `length` bytes of payload the caller appends.
pub fn open_header(out: &mut BytesMut, id: RequestId, length: usize, fin: bool) {
    header(out, kind::OPEN, ID + 1 + length);
    out.put_slice(&id.to_bytes());
    out.put_u8(if fin { FLAG_FIN } else { 0 });
}

/// The head of a STREAM whose `length` bytes of payload the caller appends.
pub fn stream_header(out: &mut BytesMut, id: RequestId, offset: u64, length: usize, fin: bool) {
    header(out, kind::STREAM, ID + 9 + length);
    out.put_slice(&id.to_bytes());
    out.put_u64(offset);
    out.put_u8(if fin { FLAG_FIN } else { 0 });
}

fn put_ack(out: &mut BytesMut, id: RequestId, ack: &Ack) {
    header(out, kind::ACK, ID + 27);
    out.put_slice(&id.to_bytes());
    out.put_u64(ack.upto);
    out.put_u64(ack.max_data);
    out.put_u64(ack.missing_to);
    out.put_u8(if ack.moved { FLAG_MOVED } else { 0 });
    out.put_u8(ack.probe);
    out.put_u8(ack.answer);
}

fn need(body: &Bytes, length: usize) -> Result<(), FrameError> {
    if body.len() < length {
        Err(FrameError::Truncated)
    } else {
        Ok(())
    }
}

fn u64_of(body: &mut Bytes) -> Result<u64, FrameError> {
    need(body, 8)?;
    Ok(body.get_u64())
}

fn u32_of(body: &mut Bytes) -> Result<u32, FrameError> {
    need(body, 4)?;
    Ok(body.get_u32())
}

fn id_of(body: &mut Bytes) -> Result<RequestId, FrameError> {
    need(body, ID)?;
    let mut id = [0; ID];
    body.copy_to_slice(&mut id);
    Ok(RequestId::from_bytes(id))
}

fn open_of(body: &mut Bytes) -> Result<Chunk<Bytes>, FrameError> {
    need(body, 1)?;
    let fin = body.get_u8() & FLAG_FIN != 0;
    payload_of(0, fin, body)
}

fn chunk_of(body: &mut Bytes) -> Result<Chunk<Bytes>, FrameError> {
    need(body, 9)?;
    let offset = body.get_u64();
    let fin = body.get_u8() & FLAG_FIN != 0;
    payload_of(offset, fin, body)
}

fn payload_of(offset: u64, fin: bool, body: &mut Bytes) -> Result<Chunk<Bytes>, FrameError> {
    if body.len() > MAX_PAYLOAD {
        return Err(FrameError::TooLong);
    }
    Ok(Chunk {
        offset,
        fin,
        data: body.split_off(0),
    })
}

fn ack_of(body: &mut Bytes) -> Result<Ack, FrameError> {
    need(body, 27)?;
    Ok(Ack {
        upto: body.get_u64(),
        max_data: body.get_u64(),
        missing_to: body.get_u64(),
        moved: body.get_u8() & FLAG_MOVED != 0,
        probe: body.get_u8(),
        answer: body.get_u8(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id() -> RequestId {
        RequestId::from_bytes([7; 16])
    }

    fn every_kind() -> Vec<Frame> {
        let chunk = |offset| Chunk {
            offset,
            fin: true,
            data: Bytes::from_static(b"hi"),
        };
        let ack = Ack {
            upto: 5,
            max_data: 65_536,
            missing_to: 9,
            moved: true,
            probe: 3,
            answer: 2,
        };
        vec![
            Frame::Hello(Bytes::from_static(b"{}")),
            Frame::Ping(1),
            Frame::Pong(2),
            Frame::Drain(60_000),
            Frame::Superseded,
            Frame::Goodbye,
            Frame::Open(id(), chunk(0)),
            Frame::Stream(id(), chunk(5)),
            Frame::Ack(id(), ack),
            Frame::Stop(id(), Code::Cancelled),
            Frame::Reset(id(), Code::Other(99)),
            Frame::Done(id()),
        ]
    }

    fn encoded(frames: &[Frame]) -> Bytes {
        let mut out = BytesMut::new();
        frames.iter().for_each(|frame| frame.encode(&mut out));
        out.freeze()
    }

    fn decoded(mut message: Bytes) -> Result<Vec<Frame>, FrameError> {
        std::iter::from_fn(|| Frame::decode(&mut message).transpose()).collect()
    }

    #[test]
    fn frames_survive_the_wire() {
        assert_eq!(decoded(encoded(&every_kind())), Ok(every_kind()));
    }

    /// The bytes are a promise to agents in the field: a change here is a new sub-protocol.
    #[test]
    fn the_bytes_of_version_1_never_change() {
        let hex = |frame: Frame| encoded(&[frame]).iter().map(|b| format!("{b:02x}")).collect::<String>();
        let ids = "07".repeat(16);
        let snapshots = [
            "010000027b7d".to_owned(),
            "020000080000000000000001".to_owned(),
            "030000080000000000000002".to_owned(),
            "040000040000ea60".to_owned(),
            "05000000".to_owned(),
            "06000000".to_owned(),
            format!("10000013{ids}016869"),
            format!("1100001b{ids}0000000000000005016869"),
            format!("1200002b{ids}000000000000000500000000000100000000000000000009010302"),
            format!("13000014{ids}00000002"),
            format!("14000014{ids}00000063"),
            format!("15000010{ids}"),
        ];
        for (frame, snapshot) in every_kind().into_iter().zip(snapshots) {
            assert_eq!(hex(frame), snapshot);
        }
    }

    #[test]
    fn what_this_version_does_not_know_is_skipped() {
        let mut message = BytesMut::from(&b"\x7f\x00\x00\x03new"[..]);
        Frame::Ping(1).encode(&mut message);
        message.extend_from_slice(b"\x02\x00\x00\x0a\0\0\0\0\0\0\0\x02+!");
        assert_eq!(decoded(message.freeze()), Ok(vec![Frame::Ping(1), Frame::Ping(2)]));
    }

    #[test]
    fn frames_are_passed_on_whole_and_known_by_their_exchange() {
        let mut message = encoded(&every_kind());
        let raws: Vec<Raw> = std::iter::from_fn(|| Frame::split(&mut message).transpose())
            .collect::<Result<_, _>>()
            .expect("frames");
        for (frame, raw) in every_kind().into_iter().zip(&raws) {
            assert_eq!(decoded(raw.bytes.clone()), Ok(vec![frame.clone()]));
            assert_eq!(raw.opens, matches!(frame, Frame::Open(..)));
        }
        let known = raws.iter().filter(|raw| raw.id == Some(id())).count();
        assert_eq!((raws.len(), known), (12, 6));
    }

    #[test]
    fn cut_short_or_too_long_is_an_error() {
        for frame in every_kind() {
            let whole = encoded(&[frame]);
            for cut in 1..whole.len() {
                assert_eq!(decoded(whole.slice(..cut)), Err(FrameError::Truncated));
            }
        }
        let data = Bytes::from(vec![0; MAX_PAYLOAD + 1]);
        let long = encoded(&[Frame::Stream(
            id(),
            Chunk {
                offset: 0,
                fin: false,
                data,
            },
        )]);
        assert_eq!(decoded(long), Err(FrameError::TooLong));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = decoded(Bytes::from(bytes.clone()));
            let mut message = Bytes::from(bytes);
            while let Ok(Some(_)) = Frame::split(&mut message) {}
        }

        #[test]
        fn no_body_makes_it_panic(kind in 0u8..0x20, body in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut message = BytesMut::new();
            header(&mut message, kind, body.len());
            message.extend_from_slice(&body);
            let _ = decoded(message.freeze());
        }
    }
}
