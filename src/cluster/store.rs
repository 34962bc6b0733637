//! The registry's tables: the only SQL of the relay. Small methods, plain structs, no opinions.
//!
//! SQLite for one node, MySQL (or MariaDB) for many, through sqlx's `Any`: every statement is written once, in what both
//! understand (`?`, no RETURNING); the few that differ are in [`dialect`]. How a database is opened is in [`open`], how it
//! is brought to this version in [`migrate`], and what a statement may take of time and tries in [`session`].

mod clients;
mod connections;
mod dialect;
mod migrate;
mod nodes;
mod open;
mod row;
mod session;
mod settings;
mod tokens;

use std::time::Duration;

use sqlx::{AnyPool, migrate::MigrateError};
use tokio::time::{Instant, sleep};

pub use clients::{Client, ClientSummary, DownstreamAuth, TokenRecord};
pub use connections::{ConnectionRow, Holder};
pub use migrate::SchemaVersion;
pub use nodes::NodeRow;
pub use tokens::TokenRow;

use crate::telemetry::RegistryMeter;
use dialect::Dialect;
use session::Bounds;

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL is of no database that this build speaks to. Never contains the URL: it may hold a password.
    #[error("{0}")]
    Url(&'static str),
    /// A migration failed.
    #[error("the database could not be brought to this version: {0}")]
    Migrate(#[from] MigrateError),
    /// A row of this key is there already.
    #[error("it exists already")]
    Exists,
    /// A stored value that cannot be read; the name says which.
    #[error("the database holds something unreadable under {0}")]
    Corrupt(&'static str),
    /// The database did not answer in time.
    #[error("the database did not answer in time")]
    Slow,
    /// The database failed or cannot be reached.
    #[error("the database failed: {0}")]
    Database(#[source] sqlx::Error),
}

impl StoreError {
    /// Whether nobody answered at all.
    fn is_absence(&self) -> bool {
        matches!(self, StoreError::Slow | StoreError::Database(sqlx::Error::Io(_)))
    }
}

/// Long for a server to take a connection, short for whoever starts one beside this.
const OPEN_AGAIN_AFTER: Duration = Duration::from_millis(500);

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            // Also what a refused port is, while the pool tries again.
            sqlx::Error::PoolTimedOut => StoreError::Slow,
            sqlx::Error::Database(database) if database.is_unique_violation() => StoreError::Exists,
            error => StoreError::Database(error),
        }
    }
}

/// The registry's database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    pool: AnyPool,
    dialect: Dialect,
    bounds: Bounds,
}

impl Store {
    /// Opens the database (and makes it, if it is a new SQLite file), and brings its tables to this version.
    pub async fn open(database_url: &str) -> Result<Store, StoreError> {
        let (dialect, pool) = open::pool(database_url).await?;
        let store = Store {
            pool,
            dialect,
            bounds: Bounds::default(),
        };
        store.migrate().await?;
        Ok(store)
    }

    /// As [`Store::open`], of a database that may not be there yet: one that cannot be reached is tried again for so long.
    /// One that answers, with a refusal, is not.
    pub async fn open_within(database_url: &str, wait: Duration) -> Result<Store, StoreError> {
        let until = Instant::now() + wait;
        let mut told = false;
        loop {
            let error = match Self::open(database_url).await {
                Err(error) if error.is_absence() && Instant::now() + OPEN_AGAIN_AFTER <= until => error,
                opened => return opened,
            };
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(%error, "the database is not there yet: waiting up to {} s", wait.as_secs());
            }
            sleep(OPEN_AGAIN_AFTER).await;
        }
    }

    /// The same database, given up on after another time than five seconds a statement.
    pub fn with_patience(self, patience: Duration) -> Store {
        let bounds = Bounds {
            patience,
            ..self.bounds
        };
        Store { bounds, ..self }
    }

    /// What asking it costs.
    pub fn meter(&self) -> &RegistryMeter {
        &self.bounds.meter
    }

    /// Waits for what is under way and closes the database; everything after this fails.
    pub async fn close(&self) {
        // What a dead database still owes an answer for is left behind.
        let _ = tokio::time::timeout(session::PATIENCE, self.pool.close()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_url_that_is_not_ours_is_refused_without_repeating_it() {
        for url in [
            "mysql://adit:hunter2@db",
            "mysql://adit:hunter2@db/adit?ssl-mod=REQUIRED",
            "mysql://adit:hunter2@db:port/adit",
            "postgres://adit:hunter2@db/adit",
            "hunter2",
            "",
        ] {
            let error = Store::open(url).await.expect_err(url);
            let text = format!("{error} {error:?}");
            assert!(
                matches!(error, StoreError::Url(_)) && !text.contains("hunter2"),
                "{text}"
            );
        }
    }

    #[tokio::test]
    async fn a_database_that_refuses_says_so_at_once_without_repeating_the_password() {
        // Port 9 (discard) is in nobody's ephemeral range, and nothing listens there.
        let error = Store::open("mysql://adit:hunter2@127.0.0.1:9/adit")
            .await
            .expect_err("nobody listens");
        let text = format!("{error} {error:?}");
        assert!(text.contains("refused") && !text.contains("hunter2"), "{text}");
    }

    #[tokio::test]
    async fn a_database_that_is_not_there_is_waited_for_and_a_bad_url_is_not() {
        let started = Instant::now();
        let waited = Store::open_within("mysql://adit@127.0.0.1:9/adit", OPEN_AGAIN_AFTER * 2).await;
        assert!(waited.expect_err("nobody listens").is_absence());
        assert!(started.elapsed() >= OPEN_AGAIN_AFTER);
        let refused = Store::open_within("hunter2", Duration::from_secs(3600)).await;
        assert!(matches!(refused, Err(StoreError::Url(_))));
    }

    #[tokio::test]
    async fn a_file_is_made_and_found_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let url = format!("sqlite:{}", dir.path().join("adit.db").display());
        let store = Store::open(&url).await.expect("made");
        store.insert_setting("greeting", "hello").await.expect("written");
        store.close().await;
        let store = Store::open(&url).await.expect("found");
        assert_eq!(store.setting("greeting").await.expect("read").as_deref(), Some("hello"));
        assert!(matches!(
            store.insert_setting("greeting", "again").await,
            Err(StoreError::Exists)
        ));
    }
}
