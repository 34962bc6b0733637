//! What the nodes of a relay share: the registry, which says who holds what, and the bus, over which they speak.
//!
//! [`bus`] carries [`letter`]s; [`peer`] makes a tunnel that another node holds look like one that is here.
//! [`store`] is the only SQL. [`registry`] is what the rest of the relay sees: it answers from memory where it can and
//! goes on working while the database is away.

pub mod bus;
mod cache;
pub mod hash;
pub mod letter;
pub mod peer;
pub mod registry;
pub mod store;

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, as the registry's tables say it: UTC epoch milliseconds.
pub fn now_ms() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}
