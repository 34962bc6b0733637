//! One packet of a sender's response, as a binary frame holds it.
//!
//! `u64 request_id | u32 packet_id | u8 last | of packet 1: u16 status, u32 length, headers as JSON | body`, big-endian.

use bytes::{Buf, Bytes};

use super::head::RawHead;

/// The largest packet that a sender makes, all in all.
pub const MAX_PACKET: usize = 64 * 1024;

/// Its body and its headers are slices of the frame: nothing is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Of which request.
    pub request_id: u64,
    /// From 1, without gaps, in any order.
    pub packet_id: u32,
    /// No packet has a higher id.
    pub last: bool,
    /// Of packet 1, and only of that.
    pub head: Option<RawHead>,
    /// May be empty.
    pub body: Bytes,
}

/// A frame that is no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no packet of a response: {why}")]
pub struct BadPacket {
    /// Of which request it says to be: that one has failed.
    pub request_id: Option<u64>,
    /// What is wrong.
    pub why: Malformed,
}

/// What is wrong with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends inside its fixed part.
    #[error("it is too short")]
    Short,
    /// Packets are counted from 1.
    #[error("its number is 0")]
    Zero,
    /// Neither 0 nor 1.
    #[error("whether it is the last is neither 0 nor 1")]
    Last,
    /// Its headers are said to be longer than it is.
    #[error("its headers end behind it")]
    HeadLength,
}

impl Packet {
    /// Reads a binary frame. Any bytes may come: what the head says is not looked at yet ([`RawHead::parse`]).
    pub fn decode(mut frame: Bytes) -> Result<Self, BadPacket> {
        let bad = |request_id, why| move |_| BadPacket { request_id, why };
        let request_id = frame.try_get_u64().map_err(bad(None, Malformed::Short))?;
        let bad = |why| bad(Some(request_id), why);
        let packet_id = frame.try_get_u32().map_err(bad(Malformed::Short))?;
        let last = frame.try_get_u8().map_err(bad(Malformed::Short))?;
        let head = match packet_id {
            0 => Err(Malformed::Zero),
            1 => take_head(&mut frame).map(Some),
            _ => Ok(None),
        };
        let why = |why| BadPacket {
            request_id: Some(request_id),
            why,
        };
        Ok(Self {
            request_id,
            packet_id,
            last: flag(last).map_err(why)?,
            head: head.map_err(why)?,
            body: frame,
        })
    }
}

fn flag(byte: u8) -> Result<bool, Malformed> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed::Last),
    }
}

fn take_head(frame: &mut Bytes) -> Result<RawHead, Malformed> {
    let status = frame.try_get_u16().map_err(|_| Malformed::Short)?;
    let length = frame.try_get_u32().map_err(|_| Malformed::Short)? as usize;
    if length > frame.len() {
        return Err(Malformed::HeadLength);
    }
    let headers = frame.split_to(length);
    Ok(RawHead { status, headers })
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use proptest::prelude::*;

    use super::*;

    impl Packet {
        /// As a sender writes it.
        fn encode(&self) -> Bytes {
            let mut out = Vec::new();
            out.put_u64(self.request_id);
            out.put_u32(self.packet_id);
            out.put_u8(self.last.into());
            if let Some(head) = &self.head {
                out.put_u16(head.status);
                out.put_u32(head.headers.len() as u32);
                out.put_slice(&head.headers);
            }
            out.put_slice(&self.body);
            out.into()
        }
    }

    fn of_hex(text: &str) -> Bytes {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("hex"), 16).expect("hex");
        digits.chunks(2).map(pair).collect()
    }

    #[test]
    fn a_response_in_one_packet_reads() {
        // Request 0x6c0a5d0b1f0e3d73, packet 1, last, 200, `{"a":"b"}`, `hello`.
        let frame = of_hex("6c0a5d0b1f0e3d73 00000001 01 00c8 00000009 7b2261223a2262227d 68656c6c6f");
        let packet = Packet::decode(frame.clone()).expect("a packet");
        let head = RawHead {
            status: 200,
            headers: Bytes::from_static(br#"{"a":"b"}"#),
        };
        let expected = Packet {
            request_id: 0x6c0a_5d0b_1f0e_3d73,
            packet_id: 1,
            last: true,
            head: Some(head),
            body: Bytes::from_static(b"hello"),
        };
        assert_eq!((&packet, packet.encode()), (&expected, frame));
    }

    #[test]
    fn a_later_packet_is_all_body_and_may_be_empty() {
        let packet = Packet::decode(of_hex("ffffffffffffffff ffffffff 00")).expect("a packet");
        assert_eq!((packet.request_id, packet.packet_id), (u64::MAX, u32::MAX));
        assert_eq!((packet.last, packet.head, packet.body), (false, None, Bytes::new()));
    }

    #[test]
    fn what_is_no_packet_says_whose_it_is_when_it_can() {
        for (frame, request_id, why) in [
            ("", None, Malformed::Short),
            ("00000000000000", None, Malformed::Short),
            ("0000000000000007", Some(7), Malformed::Short),
            ("0000000000000007 00000002", Some(7), Malformed::Short),
            ("0000000000000007 00000000 00", Some(7), Malformed::Zero),
            ("0000000000000007 00000002 02", Some(7), Malformed::Last),
            ("0000000000000007 00000001 01 00c8 0000", Some(7), Malformed::Short),
            (
                "0000000000000007 00000001 01 00c8 00000003 7b7d",
                Some(7),
                Malformed::HeadLength,
            ),
            (
                "0000000000000007 00000001 01 00c8 ffffffff 7b7d",
                Some(7),
                Malformed::HeadLength,
            ),
        ] {
            assert_eq!(
                Packet::decode(of_hex(frame)),
                Err(BadPacket { request_id, why }),
                "{frame}"
            );
        }
    }

    proptest! {
        #[test]
        fn packets_survive(
            request_id: u64,
            packet_id in 1u32..4,
            last: bool,
            status: u16,
            headers in prop::collection::vec(any::<u8>(), 0..20),
            body in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let head = (packet_id == 1).then(|| RawHead { status, headers: headers.into() });
            let packet = Packet { request_id, packet_id, last, head, body: body.into() };
            prop_assert_eq!(Packet::decode(packet.encode()), Ok(packet));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(Packet { head: Some(head), .. }) = Packet::decode(bytes.into()) {
                let _ = head.parse();
            }
        }

        #[test]
        fn no_head_makes_it_panic(status: u16, headers in "[{\"a:,}\\\\rn\u{0}-\u{ff}]{0,30}") {
            let _ = RawHead { status, headers: headers.into() }.parse();
        }
    }
}
