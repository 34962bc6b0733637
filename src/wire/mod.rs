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
