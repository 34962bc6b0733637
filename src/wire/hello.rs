//! What the two ends of a tunnel say first. JSON, so that either may add fields: unknown ones are ignored.

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::frame::Frame;
use crate::ids::{InstanceId, NodeId, TunnelId};

/// The longest hello that is read, bytes.
pub const MAX_HELLO: usize = 8 * 1024;

/// The agent's first frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentHello {
    /// Random per process: exchanges belong to it, not to a tunnel.
    pub instance_id: InstanceId,
    /// Which of the instance's tunnels this is, from 0; a newer tunnel in a slot supersedes the older.
    pub slot: u32,
    /// The agent's own count of its dials of this slot: of two tunnels in a slot the higher one is the newer, wherever
    /// they are and whatever the clocks say.
    #[serde(default)]
    pub generation: u64,
    /// The agent's version, for people.
    #[serde(default)]
    pub version: String,
}

/// The relay's first frame, sent once the tunnel is recorded and serves requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayHello {
    /// The node that holds the tunnel.
    pub node_id: NodeId,
    /// The tunnel's name in the registry.
    pub tunnel_ws_id: TunnelId,
    /// Where the client is reached from the internet.
    pub public_url: String,
    /// Milliseconds between pings.
    pub ping_interval_ms: u64,
    /// Milliseconds after a ping until the link counts as dead.
    pub ping_timeout_ms: u64,
    /// Milliseconds for which exchanges wait for a lost tunnel.
    pub resume_timeout_ms: u64,
}

/// A hello as the frame that carries it.
pub fn to_frame<T: Serialize>(hello: &T) -> Frame {
    Frame::Hello(serde_json::to_vec(hello).map(Bytes::from).unwrap_or_default())
}

/// Reads a hello; the text says what is wrong with it.
pub fn from_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    if json.len() > MAX_HELLO {
        return Err(format!("a hello has at most {MAX_HELLO} bytes"));
    }
    serde_json::from_slice(json).map_err(|error| format!("the hello cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_later_versions_are_ignored() {
        let json = br#"{"instance_id":"01890a5d-ac96-774b-bcce-b302099a8057","slot":1,"tricks":["fly"]}"#;
        let hello: AgentHello = from_json(json).expect("a hello");
        assert_eq!((hello.slot, hello.generation, hello.version.as_str()), (1, 0, ""));
        assert!(from_json::<AgentHello>(b"{}").is_err());
    }
}
