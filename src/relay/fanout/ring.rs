//! What one node said lately to a client's subscribers, numbered, to be said again to whoever missed it. Pure.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::cluster::letter::{Audience, Part, Standing};

/// The longest part of a message, bytes: with its head a value of the size that Redis likes best (16 to 31 KiB).
pub const MAX_PART: usize = 20 * 1024;
/// Parts that are kept: so many short messages.
const MAX_PARTS: usize = 256;
/// Bytes that are kept: the longest message, and what was said around it.
const MAX_BYTES: usize = 2 * 1024 * 1024;
/// What was said is kept so long after the last that was said.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// A node that has gone quiet says where it stands after so long: a last part that was lost is noticed by that.
const REPEATED_AFTER: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// See the module.
#[derive(Debug)]
pub struct Ring {
    began: u64,
    last: u64,
    parts: VecDeque<Part>,
    bytes: usize,
    said_at: Duration,
    repeats: usize,
}

impl Ring {
    /// Numbers begin behind `began`.
    pub fn new(began: u64, now: Duration) -> Self {
        Self {
            began,
            last: began,
            parts: VecDeque::new(),
            bytes: 0,
            said_at: now,
            repeats: REPEATED_AFTER.len(),
        }
    }

    /// Takes in a message; returns its parts, numbered. Never none. What is too old or too much is forgotten.
    pub fn say(&mut self, audience: Audience, body: &Bytes, now: Duration) -> Vec<Part> {
        let audience = Arc::new(audience);
        let count = body.len().div_ceil(MAX_PART).max(1);
        let part = |at: usize| Part {
            seq: self.last + 1 + at as u64,
            is_first: at == 0,
            is_last: at + 1 == count,
            audience: audience.clone(),
            bytes: body.slice(at * MAX_PART..body.len().min((at + 1) * MAX_PART)),
        };
        let parts: Vec<Part> = (0..count).map(part).collect();
        self.last += count as u64;
        self.bytes += body.len();
        self.parts.extend(parts.iter().cloned());
        while self.parts.len() > MAX_PARTS || self.bytes > MAX_BYTES {
            let Some(old) = self.parts.pop_front() else { break };
            self.bytes -= old.bytes.len();
        }
        (self.said_at, self.repeats) = (now, 0);
        parts
    }

    /// Where it stands.
    pub fn standing(&self) -> Standing {
        Standing {
            began: self.began,
            oldest: self.last + 1 - self.parts.len() as u64,
            last: self.last,
        }
    }

    /// The last number.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The parts behind this number, up to so many bytes but at least one.
    pub fn behind(&self, seq: u64, max_bytes: usize) -> impl Iterator<Item = &Part> {
        let mut bytes = 0;
        self.parts
            .iter()
            .filter(move |part| part.seq > seq)
            .take_while(move |part| {
                let taken = bytes < max_bytes;
                bytes += part.bytes.len();
                taken
            })
    }

    /// Messages may have been missed by others: where it stands is to be repeated again, if there is anything to miss.
    pub fn repeat(&mut self, now: Duration) {
        if !self.parts.is_empty() {
            (self.said_at, self.repeats) = (now, 0);
        }
    }

    /// Time passed. Whether to say where it stands.
    pub fn on_tick(&mut self, now: Duration) -> bool {
        let quiet = now.saturating_sub(self.said_at);
        if quiet >= KEPT_FOR && !self.parts.is_empty() {
            self.forget();
        }
        let due = REPEATED_AFTER.get(self.repeats).is_some_and(|after| quiet >= *after);
        self.repeats += usize::from(due);
        due
    }

    /// Nothing is said again; the numbers go on.
    pub fn forget(&mut self) {
        self.parts = VecDeque::new();
        self.bytes = 0;
    }

    /// How long nothing was said.
    pub fn quiet(&self, now: Duration) -> Duration {
        now.saturating_sub(self.said_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    #[test]
    fn parts_are_numbered_and_make_up_the_message() {
        let mut ring = Ring::new(7, NOW);
        let body = Bytes::from(vec![b'x'; 2 * MAX_PART + 1]);
        let parts = ring.say(Audience::All, &body, NOW);
        let seqs: Vec<_> = parts
            .iter()
            .map(|part| (part.seq, part.is_first, part.is_last))
            .collect();
        assert_eq!(seqs, [(8, true, false), (9, false, false), (10, false, true)]);
        assert_eq!(parts.iter().map(|part| part.bytes.len()).sum::<usize>(), body.len());
        let empty = ring.say(Audience::All, &Bytes::new(), NOW);
        assert!(empty.len() == 1 && empty[0].is_first && empty[0].is_last);
        let again: Vec<_> = ring.behind(9, usize::MAX).map(|part| part.seq).collect();
        assert_eq!(again, [10, 11]);
        assert_eq!(ring.behind(0, 1).count(), 1);
        assert_eq!(
            ring.standing(),
            Standing {
                began: 7,
                oldest: 8,
                last: 11
            }
        );
    }

    #[test]
    fn it_forgets_what_is_too_much_or_too_old_but_not_its_numbers() {
        let mut ring = Ring::new(0, NOW);
        (0..300).for_each(|_| drop(ring.say(Audience::All, &"x".into(), NOW)));
        assert_eq!(
            ring.standing(),
            Standing {
                began: 0,
                oldest: 45,
                last: 300
            }
        );
        (0..3).for_each(|_| drop(ring.say(Audience::All, &Bytes::from(vec![0; 1 << 20]), NOW)));
        assert!(ring.bytes <= MAX_BYTES);
        ring.on_tick(KEPT_FOR);
        let last = ring.last();
        assert_eq!(
            ring.standing(),
            Standing {
                began: 0,
                oldest: last + 1,
                last
            }
        );
    }

    #[test]
    fn where_it_stands_is_repeated_twice_when_it_is_quiet() {
        let mut ring = Ring::new(0, NOW);
        let told = |ring: &mut Ring| {
            (0..20)
                .filter(|second| ring.on_tick(Duration::from_secs(*second)))
                .count()
        };
        assert_eq!(told(&mut ring), 0);
        ring.say(Audience::All, &"x".into(), NOW);
        assert_eq!(told(&mut ring), 2);
        ring.repeat(NOW);
        assert_eq!(told(&mut ring), 2);
    }
}
