//! adit: a self-hosted reverse-tunnel relay.

pub mod agent;
pub mod error;
pub mod exchange;
pub mod ids;
pub mod wire;
