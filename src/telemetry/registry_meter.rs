//! What the registry's database costs: counted where it is asked, shown with the other metrics.

use std::time::Duration;

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};

/// Upper bounds of what a statement takes, seconds: a few rows by their key, 64 µs on SQLite and 180 µs on MariaDB beside
/// it (measured); a database in another zone takes milliseconds, and after 5 s it is given up.
const STATEMENT_BUCKETS: [f64; 12] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 5.0,
];

/// Shared by who asks the database and who shows it.
#[derive(Debug, Clone)]
pub struct RegistryMeter {
    pub(super) statements: Histogram,
    pub(super) errors: Counter,
    pub(super) lookups: Counter,
    pub(super) misses: Counter,
}

impl Default for RegistryMeter {
    fn default() -> Self {
        Self {
            statements: Histogram::new(STATEMENT_BUCKETS),
            errors: Counter::default(),
            lookups: Counter::default(),
            misses: Counter::default(),
        }
    }
}

impl RegistryMeter {
    /// The database was asked, and took so long to answer, or failed to.
    pub fn asked(&self, took: Duration, failed: bool) {
        self.statements.observe(took.as_secs_f64());
        if failed {
            self.errors.inc();
        }
    }

    /// Something was looked up.
    pub fn looked_up(&self) {
        self.lookups.inc();
    }

    /// It was not in memory, or too old there.
    pub fn missed(&self) {
        self.misses.inc();
    }
}
