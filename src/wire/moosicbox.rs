//! The MoosicBox dialect: what a MoosicBox server (the *sender*), its apps and a relay say to each other. No I/O, no
//! clock, and no memory but [`Reassembler`]'s of one response.
//!
//! | frame | direction | is |
//! |---|---|---|
//! | text | to the sender | [`http_request`], [`ws_request`] or [`abort`] |
//! | binary | from the sender | one [`Packet`] of a response; [`Reassembler`] puts those of one request in order |
//! | text | from the sender | a [`WsAnswer`] for the apps |
//!
//! The dialect answers no errors: what a sender cannot do it does not answer at all. Deadlines are the caller's.

mod head;
mod packet;
mod query;
mod reassembly;
mod request;
mod ws;

pub use head::{HeadError, RawHead, carries_body};
pub use packet::{BadPacket, MAX_PACKET, Malformed, Packet};
pub use query::decode;
pub use reassembly::{OutOfOrder, Piece, Reassembler};
pub use request::{NotJson, abort, http_request};
pub use ws::{Audience, NotAnAnswer, WsAnswer, ws_request};
