//! What goes over a path: frames, the reliable stream in them, and HTTP on that stream. No runtime, no clock, no sockets
//! but in [`socket`], which only turns frames into WebSocket messages and back.

pub mod fields;
pub mod frame;
pub mod head;
pub mod hello;
mod rope;
pub mod socket;
pub mod stream;
