//! A queue of bytes that keeps large pieces as they came and packs small ones together, so that its memory follows its
//! length: a one-byte slice must not pin the message that it came in.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Pieces below this are copied, bytes: a kept piece is then at least an eighth of the message that it pins.
pub(super) const PACK_BELOW: usize = 4 * 1024;

#[derive(Debug, Default)]
pub(super) struct Rope {
    pieces: VecDeque<Bytes>,
    /// Small pieces behind the last of `pieces`, still open for more.
    tail: BytesMut,
    length: usize,
}

impl Rope {
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn push(&mut self, data: Bytes) {
        self.length += data.len();
        if data.len() < PACK_BELOW {
            self.tail.extend_from_slice(&data);
            if self.tail.len() >= PACK_BELOW {
                self.seal();
            }
        } else {
            self.seal();
            self.pieces.push_back(data);
        }
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.pieces.push_back(std::mem::take(&mut self.tail).freeze());
        }
    }

    /// Takes the first piece.
    pub fn pop(&mut self) -> Option<Bytes> {
        if self.pieces.is_empty() {
            self.seal();
        }
        let piece = self.pieces.pop_front()?;
        self.length -= piece.len();
        Some(piece)
    }

    /// Drops the first `count` bytes.
    pub fn advance(&mut self, mut count: usize) {
        debug_assert!(count <= self.length);
        while count > 0 {
            let Some(mut piece) = self.pop() else { return };
            if piece.len() > count {
                piece.advance(count);
                self.length += piece.len();
                self.pieces.push_front(piece);
                return;
            }
            count -= piece.len();
        }
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Copies `length` bytes from `from` on into `out`; `near` is where an earlier call ended, to go on from there.
    pub fn copy(&self, from: usize, length: usize, near: &mut Cursor, out: &mut BytesMut) {
        if near.start > from {
            *near = Cursor::default();
        }
        let mut length = length;
        let mut from = from;
        while length > 0 {
            let piece: &[u8] = match self.pieces.get(near.piece) {
                Some(piece) if from >= near.start + piece.len() => {
                    near.start += piece.len();
                    near.piece += 1;
                    continue;
                }
                Some(piece) => piece,
                None => &self.tail,
            };
            let rest = piece.get(from - near.start..).unwrap_or_default();
            let part = &rest[..rest.len().min(length)];
            if part.is_empty() {
                return;
            }
            out.put_slice(part);
            from += part.len();
            length -= part.len();
        }
    }
}

/// A place in a rope: the piece, and the offset from the rope's front at which it starts.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Cursor {
    piece: usize,
    start: usize,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is pushed, dropped and copied, the rope answers like one flat vector.
        #[test]
        fn a_rope_is_a_vector(steps in prop::collection::vec((0usize..3, 0usize..9000), 1..60)) {
            let (mut rope, mut flat, mut cursor) = (Rope::default(), Vec::new(), Cursor::default());
            for (step, (what, size)) in steps.into_iter().enumerate() {
                match what {
                    0 => {
                        let data: Vec<u8> = (0..size).map(|i| (i * 31 + step) as u8).collect();
                        flat.extend_from_slice(&data);
                        rope.push(Bytes::from(data));
                    }
                    1 => {
                        let count = size.min(flat.len());
                        flat.drain(..count);
                        rope.advance(count);
                        cursor = Cursor::default();
                    }
                    _ => {
                        let from = size.min(flat.len());
                        let length = (flat.len() - from).min(5000);
                        let mut out = BytesMut::new();
                        rope.copy(from, length, &mut cursor, &mut out);
                        prop_assert_eq!(&out[..], &flat[from..from + length]);
                    }
                }
                prop_assert_eq!(rope.len(), flat.len());
            }
            let mut rest = Vec::new();
            while let Some(piece) = rope.pop() {
                rest.extend_from_slice(&piece);
            }
            prop_assert_eq!(rest, flat);
        }
    }
}
