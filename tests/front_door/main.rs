//! The front door over real sockets: HOSTILE.md's rows P1 to P24, as far as a listener and the head's check go.

#![allow(clippy::unwrap_used, reason = "tests")]

mod drain;
mod harness;
mod hostile;
mod lifetimes;
mod other_protocols;
