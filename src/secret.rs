//! A credential in the clear: made, carried, shown to whom it is for, and never printed by accident.
//!
//! What is stored of one, and how it is compared, is `cluster::hash`'s.

use std::{convert::Infallible, fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng;
use serde::{Deserialize, Deserializer, de};

/// A text that prints as `***`, in `Debug` and `Display`; [`Secret::expose`] is the only way to it.
///
/// `==` is for comparing configurations: what a stranger presents is compared by its hash, in constant time.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// A new token: 256 random bits, as `adit_` and 43 characters of base64url.
    pub fn new_token() -> Self {
        let mut bits = [0; 32];
        rand::rng().fill_bytes(&mut bits);
        Self(format!("adit_{}", URL_SAFE_NO_PAD.encode(bits)))
    }

    /// The text itself, for whoever must send it or show it once.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is no text at all: how "not set" is written in a file or an environment variable.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl FromStr for Secret {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // The usual error would quote the value.
        String::deserialize(from)
            .map(Self)
            .map_err(|_| de::Error::custom("a secret is a string"))
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_256_bits_of_url_safe_text() {
        let token = Secret::new_token();
        assert_eq!(token.expose().len(), 5 + 43);
        assert!(token.expose().starts_with("adit_"));
        assert_ne!(token, Secret::new_token());
    }

    #[test]
    fn a_secret_never_prints() {
        let secret = Secret::from("hunter2".to_owned());
        for printed in [
            format!("{secret}"),
            format!("{secret:?}"),
            format!("{:#?}", Some(&secret)),
        ] {
            assert!(!printed.contains("hunter2") && printed.contains("***"), "{printed}");
        }
        assert_eq!(secret.expose(), "hunter2");
        let refused = serde_json::from_str::<Secret>("20261123")
            .expect_err("no text")
            .to_string();
        assert!(!refused.contains("20261123"), "{refused}");
    }
}
