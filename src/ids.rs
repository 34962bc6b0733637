//! The names of things: UUIDv7 ids for what lives and dies, and the validated `client_id`.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasherDefault, DefaultHasher},
    str::FromStr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_id {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new id: UUIDv7, so ids sort by the time they were made (RFC 9562 §5.7).
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            /// The 16 bytes that go on the wire.
            pub fn to_bytes(self) -> [u8; 16] {
                self.0.into_bytes()
            }

            /// From the 16 bytes of the wire. Any 16 bytes are an id.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    )*};
}

uuid_id! {
    /// One relay process: new at each start.
    NodeId;
    /// One agent WebSocket (`tunnel_ws_id`).
    TunnelId;
    /// One agent process: random per process, the owner of its exchanges.
    InstanceId;
    /// One exchange: a request and its response, in flight.
    RequestId;
    /// One access token's public name; the secret is never stored.
    TokenId;
}

impl NodeId {
    /// The random half of it: enough to tell the nodes apart that speak of one client.
    pub fn short(self) -> u64 {
        let [.., a, b, c, d, e, f, g, h] = self.to_bytes();
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

/// A map by ids, or by names that an operator gave: the same keys are in the same order in every run, so that a simulation
/// can be replayed. Not for keys that strangers choose: they could choose them to collide.
pub type ReplayableMap<K, V> = HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// The longest `client_id`: one DNS label (RFC 1035 §2.3.4), because it is one in `{client_id}.{domain}`.
pub const CLIENT_ID_MAX: usize = 63;

/// The name that a tunnel serves: 1 to 63 of `a-z`, `0-9` and `-`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClientId(Arc<str>);

/// Why a text is not a [`ClientId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a client id is 1 to 63 characters of a-z, 0-9 and '-'")]
pub struct InvalidClientId;

impl ClientId {
    /// The text of the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClientId {
    type Err = InvalidClientId;
    fn from_str(text: &str) -> Result<Self, InvalidClientId> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if text.is_empty() || text.len() > CLIENT_ID_MAX || !text.bytes().all(allowed) {
            return Err(InvalidClientId);
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for ClientId {
    type Error = InvalidClientId;
    fn try_from(text: String) -> Result<Self, InvalidClientId> {
        text.parse()
    }
}

impl From<ClientId> for String {
    fn from(id: ClientId) -> String {
        id.0.as_ref().to_owned()
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_ids_are_dns_labels_and_nothing_else() {
        for good in [
            "a",
            "home",
            "a-b-9",
            &"x".repeat(63),
            "7785179f-9d6c-4f2a-8a51-0123456789ab",
        ] {
            assert_eq!(good.parse::<ClientId>().expect(good).as_str(), good);
        }
        for bad in [
            "",
            "A",
            "a:b",
            "../x",
            "*",
            "a\0",
            "home ",
            "hömе",
            "a.b",
            &"x".repeat(64),
            &"x".repeat(10_000),
        ] {
            assert_eq!(bad.parse::<ClientId>(), Err(InvalidClientId), "{bad:?}");
        }
    }

    #[test]
    fn ids_survive_the_wire() {
        let id = RequestId::new();
        assert_eq!(RequestId::from_bytes(id.to_bytes()), id);
        assert_eq!(id.to_string().parse::<RequestId>().expect("a uuid"), id);
    }
}
