//! How far a subscriber has come: the last part that it has of each node that says things. Opaque to whoever keeps it.

use std::{fmt, str::FromStr, sync::Arc};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// Nodes that a position tells apart: more than ever speak to one client's subscribers at a time.
pub const MAX_SOURCES: usize = 32;
/// `u64 source | u64 seq`.
const PAIR: usize = 16;

/// See the module. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Position(Arc<str>);

/// Why a text is no [`Position`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is not a position that a subscriber was given")]
pub struct NotAPosition;

impl Position {
    /// The last part of each source.
    pub(super) fn of(pairs: impl Iterator<Item = (u64, u64)>) -> Self {
        let mut bytes = Vec::with_capacity(4 * PAIR);
        for (source, seq) in pairs.take(MAX_SOURCES) {
            bytes.extend_from_slice(&source.to_be_bytes());
            bytes.extend_from_slice(&seq.to_be_bytes());
        }
        Self(URL_SAFE_NO_PAD.encode(bytes).into())
    }

    pub(super) fn pairs(&self) -> Vec<(u64, u64)> {
        decode(&self.0).unwrap_or_default()
    }

    /// The text of it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Position {
    type Err = NotAPosition;
    fn from_str(text: &str) -> Result<Self, NotAPosition> {
        decode(text).map(|_| Self(text.into()))
    }
}

fn decode(text: &str) -> Result<Vec<(u64, u64)>, NotAPosition> {
    // Four characters for three bytes.
    if text.len() > (MAX_SOURCES * PAIR).div_ceil(3) * 4 {
        return Err(NotAPosition);
    }
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| NotAPosition)?;
    let (pairs, []) = bytes.as_chunks::<PAIR>() else {
        return Err(NotAPosition);
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    Ok(pairs
        .iter()
        .map(|pair| (number(&pair[..8]), number(&pair[8..])))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_survive_and_other_texts_are_none() {
        let pairs = vec![(1, 2), (u64::MAX, u64::MAX - 1)];
        let position = Position::of(pairs.clone().into_iter());
        assert_eq!(
            position.to_string().parse::<Position>().expect("a position").pairs(),
            pairs
        );
        let full = Position::of((0..100).map(|n| (n, n)));
        assert_eq!(
            full.as_str().parse::<Position>().expect("a position").pairs().len(),
            MAX_SOURCES
        );
        for bad in ["x", "AAAA", "AAAAAAAAAAAAAAAAAAAAA=", "ä", &"A".repeat(10_000)] {
            assert_eq!(bad.parse::<Position>(), Err(NotAPosition), "{bad}");
        }
    }
}
