//! Downstreams that are wrong, odd or slow, end to end: the answer, the exact bytes that the upstream got, and that the
//! next request works. Rows P1 to P24 of the table of hostile inputs.

#[path = "../harness/mod.rs"]
mod harness;

mod bodies;
mod heads;
mod passed;
mod slow;
mod upgrades;
mod world;
