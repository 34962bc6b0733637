//! adit: a self-hosted reverse-tunnel relay.

pub mod error;
pub mod exchange;
pub mod ids;
pub mod wire;
