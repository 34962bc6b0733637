//! The packets of one response, which come in any order, put in order.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{head::RawHead, packet::Packet};

/// What a packet that waits costs beside its bytes, so that empty ones are not free.
const PACKET_COST: usize = 128;

/// The next part of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// First, and once.
    Head(RawHead),
    /// Never empty.
    Body(Bytes),
    /// Last, and once.
    End,
}

/// Packets that are no response. The request has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OutOfOrder {
    /// More would wait for a missing packet than may.
    #[error("too much waits for packet {0}")]
    TooFar(u64),
    /// There is a packet behind the last one, or there are two last ones.
    #[error("a packet is behind the last one")]
    BehindLast,
}

/// Puts the packets of one response in order: each is given to [`push`](Self::push), and what has become readable is
/// taken from [`next_piece`](Self::next_piece). A packet that comes again is ignored.
#[derive(Debug)]
pub struct Reassembler {
    /// The packet that is read next: 64 bits, to be one more than any.
    next: u64,
    last: Option<u32>,
    highest: u32,
    held: BTreeMap<u32, Packet>,
    held_cost: usize,
    limit: usize,
    /// The rest of the packet that was read before `next`.
    body: Option<Bytes>,
    ended: bool,
}

impl Reassembler {
    /// At most `limit` bytes wait for packets that are missing.
    pub fn new(limit: usize) -> Self {
        Self {
            next: 1,
            last: None,
            highest: 0,
            held: BTreeMap::new(),
            held_cost: 0,
            limit,
            body: None,
            ended: false,
        }
    }

    /// Takes a packet of this response. The one that is read next is always taken; another one only if it may wait.
    pub fn push(&mut self, packet: Packet) -> Result<(), OutOfOrder> {
        let id = packet.packet_id;
        if u64::from(id) < self.next || self.held.contains_key(&id) {
            return Ok(());
        }
        let two_lasts = packet.last && (self.last.is_some() || id < self.highest);
        if two_lasts || self.last.is_some_and(|last| id > last) {
            return Err(OutOfOrder::BehindLast);
        }
        let cost = cost(&packet);
        if u64::from(id) != self.next && self.held_cost + cost > self.limit {
            return Err(OutOfOrder::TooFar(self.next));
        }
        if packet.last {
            self.last = Some(id);
        }
        self.highest = self.highest.max(id);
        self.held_cost += cost;
        self.held.insert(id, packet);
        Ok(())
    }

    /// What comes next, as far as it is here. After [`Piece::End`] there is nothing.
    pub fn next_piece(&mut self) -> Option<Piece> {
        loop {
            if let Some(body) = self.body.take().filter(|body| !body.is_empty()) {
                return Some(Piece::Body(body));
            }
            if self.last.is_some_and(|last| u64::from(last) < self.next) {
                return (!std::mem::replace(&mut self.ended, true)).then_some(Piece::End);
            }
            let id = u32::try_from(self.next).ok()?;
            let packet = self.held.remove(&id)?;
            self.held_cost -= cost(&packet);
            self.next += 1;
            self.body = Some(packet.body);
            if let Some(head) = packet.head {
                return Some(Piece::Head(head));
            }
        }
    }

    /// Whether every packet is here and has been read.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Bytes that wait, whether for a packet or for being read.
    pub fn held(&self) -> usize {
        self.held_cost
    }
}

fn cost(packet: &Packet) -> usize {
    PACKET_COST + packet.body.len() + packet.head.as_ref().map_or(0, |head| head.headers.len())
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::Index};

    use super::*;

    fn packet(packet_id: u32, last: bool, body: &[u8]) -> Packet {
        let head = RawHead {
            status: 200,
            headers: Bytes::from_static(b"{}"),
        };
        Packet {
            request_id: 7,
            packet_id,
            last,
            head: (packet_id == 1).then_some(head),
            body: Bytes::copy_from_slice(body),
        }
    }

    /// All that can be read: the head is `H`, the end is `.`.
    fn read(packets: &mut Reassembler) -> String {
        let pieces = std::iter::from_fn(|| packets.next_piece());
        let shown = pieces.map(|piece| match piece {
            Piece::Head(_) => "H".to_owned(),
            Piece::Body(body) => String::from_utf8_lossy(&body).into_owned(),
            Piece::End => ".".to_owned(),
        });
        shown.collect()
    }

    #[test]
    fn packets_are_read_in_order_however_they_come() {
        let mut packets = Reassembler::new(1024);
        for (id, last, body, readable) in [
            (2, false, "b", ""),
            (1, false, "a", "Hab"),
            (3, false, "", ""),
            (8, true, "h", ""),
            (5, false, "e", ""),
            (5, false, "again", ""),
            (2, false, "again", ""),
            (4, false, "d", "de"),
            (7, false, "g", ""),
            (6, false, "f", "fgh."),
            (8, true, "again", ""),
        ] {
            packets.push(packet(id, last, body.as_bytes())).expect("in order");
            assert_eq!(read(&mut packets), readable, "after {id}");
        }
        assert!(packets.has_ended() && packets.held() == 0);
        assert_eq!(packets.push(packet(9, false, b"")), Err(OutOfOrder::BehindLast));
    }

    #[test]
    fn a_response_may_be_one_packet_without_a_body() {
        let mut packets = Reassembler::new(0);
        packets.push(packet(1, true, b"")).expect("in order");
        assert_eq!(read(&mut packets), "H.");
    }

    #[test]
    fn nothing_is_behind_the_last_packet() {
        for packets in [
            [packet(3, true, b""), packet(4, false, b"")],
            [packet(3, true, b""), packet(2, true, b"")],
            [packet(3, true, b""), packet(4, true, b"")],
            [packet(4, false, b""), packet(3, true, b"")],
        ] {
            let [first, second] = packets;
            let mut packets = Reassembler::new(1024);
            packets.push(first).expect("in order");
            assert_eq!(packets.push(second), Err(OutOfOrder::BehindLast));
        }
    }

    #[test]
    fn what_waits_is_bounded_and_what_is_missing_is_always_taken() {
        let mut packets = Reassembler::new(2 * PACKET_COST + 20);
        packets.push(packet(3, false, &[b'3'; 10])).expect("it fits");
        assert_eq!(packets.push(packet(4, false, &[b'4'; 11])), Err(OutOfOrder::TooFar(1)));
        packets.push(packet(4, false, &[b'4'; 10])).expect("it fits");
        assert_eq!(packets.push(packet(2, false, b"")), Err(OutOfOrder::TooFar(1)));
        packets.push(packet(1, false, &[b'1'; 1000])).expect("it is the next");
        assert_eq!(read(&mut packets).len(), 1001);
        packets.push(packet(2, false, b"2")).expect("it is the next");
        assert_eq!(read(&mut packets), "2".to_owned() + &"3".repeat(10) + &"4".repeat(10));
        assert_eq!(packets.held(), 0);
    }

    #[test]
    fn numbers_end_where_they_end() {
        let mut packets = Reassembler::new(1024);
        packets.next = u64::from(u32::MAX);
        packets.push(packet(u32::MAX, false, b"x")).expect("in order");
        assert_eq!(read(&mut packets), "x");
        assert_eq!(packets.push(packet(u32::MAX, true, b"x")), Ok(()), "it comes again");
    }

    proptest! {
        #[test]
        fn any_order_with_any_repetition_is_the_response(
            bodies in prop::collection::vec("[a-z]{0,3}", 1..12),
            order in prop::collection::vec(any::<Index>(), 0..60),
        ) {
            let mut packets = Reassembler::new(usize::MAX);
            let mut seen = String::new();
            let all = 1..=bodies.len();
            for id in order.iter().map(|index| 1 + index.index(bodies.len())).chain(all) {
                let pushed = packet(id as u32, id == bodies.len(), bodies[id - 1].as_bytes());
                prop_assert_eq!(packets.push(pushed), Ok(()));
                seen.push_str(&read(&mut packets));
            }
            prop_assert_eq!(seen, format!("H{}.", bodies.concat()));
            prop_assert!(packets.has_ended() && packets.held() == 0);
        }

        #[test]
        fn no_packets_make_it_panic_or_hold_more_than_it_may(
            given in prop::collection::vec((1u32..9, any::<bool>(), 0usize..300, any::<bool>()), 0..40),
            limit in 0usize..2000,
        ) {
            let mut packets = Reassembler::new(limit);
            for (id, last, length, reads) in given {
                let before = packets.held();
                let outcome = packets.push(packet(id, last, &vec![b'x'; length]));
                prop_assert!(packets.held() <= limit.max(before + PACKET_COST + 2 + 300), "{:?}", outcome);
                if reads {
                    read(&mut packets);
                    prop_assert!(packets.held() <= limit);
                }
            }
        }
    }
}
