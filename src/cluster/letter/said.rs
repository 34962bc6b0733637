//! What is said to a client's subscribers, as letters carry it.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{Unreadable, number};

/// Bits of a [`Part`].
mod flag {
    pub const FIRST: u8 = 1;
    pub const LAST: u8 = 2;
}

/// Kinds of [`Audience`].
mod audience {
    pub const ALL: u8 = 0;
    pub const ONLY: u8 = 1;
    pub const ALL_BUT: u8 = 2;
}

/// The most subscribers that an [`Audience`] names: 8 KiB of a letter.
pub const MAX_NAMED: usize = 1024;

/// Which of a client's subscribers a message is for, by `conn_id`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audience {
    /// Everybody.
    All,
    /// Those, where they are subscribed.
    Only(Vec<u64>),
    /// Everybody else.
    AllBut(Vec<u64>),
}

impl Audience {
    /// Those that it names.
    pub fn named(&self) -> &[u64] {
        match self {
            Audience::All => &[],
            Audience::Only(ids) | Audience::AllBut(ids) => ids,
        }
    }
}

/// What fits one letter of what was said to a client's subscribers: a message, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its number among all parts that its node said to this client's subscribers; they have no holes.
    pub seq: u64,
    /// Whether a message begins with it.
    pub is_first: bool,
    /// Whether a message ends with it.
    pub is_last: bool,
    /// For whom the message is; told with its first part only.
    pub audience: Arc<Audience>,
    /// The bytes.
    pub bytes: Bytes,
}

/// Where a node stands that says things to a client's subscribers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// It has never said anything up to this number.
    pub began: u64,
    /// The oldest part that it can say again; one more than the last when it can none.
    pub oldest: u64,
    /// The last part that it said.
    pub last: u64,
}

/// `u64 seq | u8 flags`, and for a first part `u8 audience | u16 count | count × u64 conn_id`; then the bytes.
pub(super) fn put_part(out: &mut BytesMut, part: &Part) {
    out.reserve(64 + 8 * part.audience.named().len() + part.bytes.len());
    out.put_u64(part.seq);
    let bit = |is_set: bool, bit: u8| if is_set { bit } else { 0 };
    out.put_u8(bit(part.is_first, flag::FIRST) | bit(part.is_last, flag::LAST));
    if part.is_first {
        let named = part.audience.named();
        out.put_u8(match &*part.audience {
            Audience::All => audience::ALL,
            Audience::Only(_) => audience::ONLY,
            Audience::AllBut(_) => audience::ALL_BUT,
        });
        // Whoever says it names no more than MAX_NAMED.
        out.put_u16(named.len() as u16);
        named.iter().for_each(|conn_id| out.put_u64(*conn_id));
    }
    out.put_slice(&part.bytes);
}

pub(super) fn part(mut bytes: Bytes) -> Result<Part, Unreadable> {
    let seq = number(&mut bytes)?;
    let flags = bytes.try_get_u8().map_err(|_| Unreadable)?;
    let is_first = flags & flag::FIRST != 0;
    let audience = match is_first {
        true => audience_of(&mut bytes)?,
        false => Audience::All,
    };
    Ok(Part {
        seq,
        is_first,
        is_last: flags & flag::LAST != 0,
        audience: Arc::new(audience),
        bytes,
    })
}

fn audience_of(bytes: &mut Bytes) -> Result<Audience, Unreadable> {
    let kind = bytes.try_get_u8().map_err(|_| Unreadable)?;
    let count = bytes.try_get_u16().map_err(|_| Unreadable)?;
    let named = (0..count).map(|_| number(bytes)).collect::<Result<_, _>>()?;
    match kind {
        audience::ALL => Ok(Audience::All),
        audience::ONLY => Ok(Audience::Only(named)),
        audience::ALL_BUT => Ok(Audience::AllBut(named)),
        _ => Err(Unreadable),
    }
}
