//! What the nodes of a relay share. Here: the registry, which says who holds what.
//!
//! [`store`] is the only SQL. [`registry`] is what the rest of the relay sees: it answers from memory where it can and
//! goes on working while the database is away.

mod cache;
pub mod hash;
pub mod registry;
pub mod store;

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, as the registry's tables say it: UTC epoch milliseconds.
pub fn now_ms() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}
