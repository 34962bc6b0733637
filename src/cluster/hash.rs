//! What is stored of a credential, and how one that is presented is compared with it.
//!
//! Tokens are 256 random bits, so one SHA-256 is enough to store them. Passwords are chosen by people, so they are
//! stretched with PBKDF2 and their checking costs real CPU time: callers remember the verdict and bound the work.

use std::{fmt, fmt::Write, num::NonZeroU32, str::FromStr};

use aws_lc_rs::pbkdf2;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::secret::Secret;

/// What OWASP's Password Storage Cheat Sheet asks of PBKDF2-HMAC-SHA256 (2023): about 0.1 s of one core.
const PBKDF2_ITERATIONS: u32 = 600_000;
/// A stored hash that asks for more than this is not ours; it would hold a core for seconds.
const PBKDF2_ITERATIONS_MAX: u32 = 4 * PBKDF2_ITERATIONS;
const PBKDF2_NAME: &str = "pbkdf2-sha256";

/// SHA-256 of a token: what is stored of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// The hash of a token as it was presented: any text, so that foreign tokens can be checked too.
    pub fn of(presented: &str) -> Self {
        Self(Sha256::digest(presented.as_bytes()).into())
    }

    /// Whether both are the same, in a time that does not depend on where they differ.
    pub fn matches(&self, other: &TokenHash) -> bool {
        self.0.ct_eq(&other.0).into()
    }

    /// 64 lower-case hex digits, as stored.
    pub fn to_hex(self) -> String {
        self.0.iter().fold(String::with_capacity(64), |mut hex, byte| {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

/// A stored hash that is not 64 hex digits.
#[derive(Debug, thiserror::Error)]
#[error("a token hash is 64 hex digits")]
pub struct InvalidTokenHash;

impl FromStr for TokenHash {
    type Err = InvalidTokenHash;
    fn from_str(hex: &str) -> Result<Self, InvalidTokenHash> {
        let digit = |c: u8| {
            (c as char)
                .to_digit(16)
                .and_then(|d| u8::try_from(d).ok())
                .ok_or(InvalidTokenHash)
        };
        let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
        let mut bytes = [0; 32];
        if pairs.len() != bytes.len() || !rest.is_empty() {
            return Err(InvalidTokenHash);
        }
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenHash(***)")
    }
}

/// What is stored of a password: `pbkdf2-sha256$iterations$salt$hash`, salt and hash as base64url.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash(String);

impl PasswordHash {
    /// Stretches a password. **Takes about 0.1 s of CPU**: call it where blocking is allowed.
    pub fn of(password: &Secret) -> Self {
        let mut salt = [0; 16];
        rand::rng().fill_bytes(&mut salt);
        let mut hash = [0; 32];
        let iterations = NonZeroU32::new(PBKDF2_ITERATIONS).unwrap_or(NonZeroU32::MIN);
        pbkdf2::derive(
            pbkdf2::PBKDF2_HMAC_SHA256,
            iterations,
            &salt,
            password.expose().as_bytes(),
            &mut hash,
        );
        let (salt, hash) = (URL_SAFE_NO_PAD.encode(salt), URL_SAFE_NO_PAD.encode(hash));
        Self(format!("{PBKDF2_NAME}${iterations}${salt}${hash}"))
    }

    /// As read from the store.
    pub fn stored(text: String) -> Self {
        Self(text)
    }

    /// As the store keeps it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is the password. As costly as [`PasswordHash::of`]. A stored text that is no hash matches nothing.
    pub fn verify(&self, password: &[u8]) -> bool {
        let Some((iterations, salt, hash)) = self.parts() else {
            return false;
        };
        pbkdf2::verify(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &salt, password, &hash).is_ok()
    }

    fn parts(&self) -> Option<(NonZeroU32, Vec<u8>, Vec<u8>)> {
        let mut parts = self.0.split('$');
        let name = parts.next()?;
        let iterations: NonZeroU32 = parts.next()?.parse().ok()?;
        let salt = URL_SAFE_NO_PAD.decode(parts.next()?).ok()?;
        let hash = URL_SAFE_NO_PAD.decode(parts.next()?).ok()?;
        let ours = name == PBKDF2_NAME && iterations.get() <= PBKDF2_ITERATIONS_MAX && hash.len() == 32;
        (ours && parts.next().is_none()).then_some((iterations, salt, hash))
    }
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_hash_survives_the_store_and_nothing_else_parses() {
        let hash = TokenHash::of("a MoosicBox UUID, or anything");
        assert_eq!(hash.to_hex().parse::<TokenHash>().expect("hex"), hash);
        assert_eq!(
            TokenHash::of("").to_hex(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(format!("{hash:?}"), "TokenHash(***)");
        for bad in [
            "",
            "00",
            &"g".repeat(64),
            &"0".repeat(63),
            &"0".repeat(66),
            &"ö".repeat(32),
        ] {
            assert!(bad.parse::<TokenHash>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_password_is_salted_and_stretched() {
        let password = Secret::from("correct horse".to_owned());
        let hash = PasswordHash::of(&password);
        assert!(hash.as_str().starts_with("pbkdf2-sha256$600000$"));
        assert!(hash.verify(b"correct horse"));
        assert!(!hash.verify(b"correct horsf"));
        assert_ne!(hash, PasswordHash::of(&password));
        assert_eq!(format!("{hash:?}"), "PasswordHash(***)");
    }

    #[test]
    fn a_stored_text_that_is_no_hash_matches_nothing_and_costs_nothing() {
        let good = PasswordHash::of(&Secret::from(String::new())).as_str().to_owned();
        for bad in [
            "",
            "plain",
            "pbkdf2-sha256$0$$",
            "md5$1$AA$AA",
            &good.replace("600000", "4000000000"),
            &format!("{good}$"),
        ] {
            assert!(!PasswordHash::stored(bad.to_owned()).verify(b""), "{bad}");
        }
    }
}
