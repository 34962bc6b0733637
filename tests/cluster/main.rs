//! A relay of several processes, and what happens to them: Redis and the database break, nodes are killed, frozen and
//! replaced, agents and networks come and go. Bodies are whole and exact or visibly broken, no tenant sees a byte of
//! another's, a POST is sent once at most, and afterwards nothing is left over. Each story proves that its fault happened.

#[path = "../harness/cluster.rs"]
mod cluster;
#[path = "../harness/mod.rs"]
mod harness;

mod agents;
mod downstreams;
mod mysql;
mod network;
mod nodes;
mod redis;

/// Longer than what fits on the way: when its first bytes are here, its last ones are not sent yet.
const LONG: u64 = 24 * 1024 * 1024;

const INTERRUPTED: &str = "adit_bus_interruptions_total";
const MOVED: &str = "adit_exchanges_moved_total";
