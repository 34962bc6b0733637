//! What goes over a path: frames, the reliable stream in them, and HTTP on that stream; and the MoosicBox dialect, which
//! has none of that. No runtime, no clock, no sockets but in [`socket`] and [`messages`], which only turn frames and messages
//! into a WebSocket's and back.

pub mod fields;
pub mod frame;
pub mod head;
pub mod hello;
pub mod messages;
pub mod moosicbox;
mod rope;
pub mod socket;
pub mod stream;

use serde::{Deserialize, Serialize};

/// The protocol that is spoken inside a tunnel's WebSocket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// Frames of exchanges: [`frame`].
    #[default]
    Adit,
    /// That of MoosicBox's servers: [`moosicbox`].
    MoosicBox,
}

impl Dialect {
    /// As the registry has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Dialect::Adit => "adit",
            Dialect::MoosicBox => "moosicbox",
        }
    }

    /// As the registry has it; `None` is one that this version does not speak.
    pub fn from_name(name: &str) -> Option<Self> {
        [Dialect::Adit, Dialect::MoosicBox]
            .into_iter()
            .find(|dialect| dialect.as_str() == name)
    }
}
