//! adit: a self-hosted reverse-tunnel relay.

pub mod agent;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod error;
pub mod exchange;
pub mod ids;
pub mod relay;
pub mod secret;
pub mod shutdown;
pub mod telemetry;
pub mod wire;
