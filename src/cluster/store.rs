//! The registry's tables: the only SQL of the relay. Small methods, plain structs, no opinions.
//!
//! SQLite today. Statements are kept to what MySQL also understands (`?`, no RETURNING); what differs between the two
//! is in [`dialect`].

mod clients;
mod connections;
mod dialect;
mod nodes;
mod settings;
mod tokens;

use std::{str::FromStr, time::Duration};

use sqlx::{
    Row, Sqlite, Transaction,
    migrate::MigrateError,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};

pub use clients::{Client, ClientSummary, DownstreamAuth, TokenRecord};
pub use connections::{ConnectionRow, Holder};
pub use nodes::NodeRow;
pub use tokens::TokenRow;

/// How long a statement waits for another one's write lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a caller waits for a connection; with [`BUSY_TIMEOUT`] it bounds what any one statement can take.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// SQLite has one writer at a time; the others are for readers, who do not wait for it (WAL).
const FILE_CONNECTIONS: u32 = 4;

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL is of no database that this build speaks to. Never contains the URL: it may hold a password.
    #[error("{0}")]
    Url(String),
    /// The database is of a newer version, or its migration failed.
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

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error.as_database_error() {
            Some(database) if database.is_unique_violation() => StoreError::Exists,
            _ => StoreError::Database(error),
        }
    }
}

/// The registry's database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    pool: SqlitePool,
}

impl Store {
    /// Opens the database (and makes it, if it is a new SQLite file), and brings its tables to this version.
    pub async fn open(database_url: &str) -> Result<Store, StoreError> {
        let (options, pool) = sqlite_options(database_url)?;
        let pool = pool.acquire_timeout(ACQUIRE_TIMEOUT).connect_with(options).await?;
        sqlx::migrate!("./migrations/sqlite").run(&pool).await?;
        Ok(Store { pool })
    }

    /// Waits for what is under way and closes the database; everything after this fails.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.pool.begin().await?)
    }
}

fn sqlite_options(url: &str) -> Result<(SqliteConnectOptions, SqlitePoolOptions), StoreError> {
    let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme);
    match scheme {
        "sqlite" => {}
        "mysql" | "mariadb" => {
            return Err(StoreError::Url(
                "MySQL comes with the cluster and is not in this build: use `sqlite:adit.db`".into(),
            ));
        }
        _ => {
            return Err(StoreError::Url(
                "a database URL is `sqlite:<path>` or `sqlite::memory:`".into(),
            ));
        }
    }
    let options = SqliteConnectOptions::from_str(url)
        .map_err(|_| {
            StoreError::Url("this is not a SQLite URL: write `sqlite:<path>`, with `?` only before options".into())
        })?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(BUSY_TIMEOUT);
    let in_memory = url.contains(":memory:") || url.contains("mode=memory");
    let pool = if in_memory {
        // The database lives as long as its one connection does.
        SqlitePoolOptions::new()
            .min_connections(1)
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
    } else {
        SqlitePoolOptions::new().max_connections(FILE_CONNECTIONS)
    };
    Ok((options, pool))
}

/// A text column that must parse; what does not is an error that names the column, never a panic.
fn parsed<T>(row: &SqliteRow, column: &str) -> Result<T, sqlx::Error>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    parse(row.try_get(column)?, column)
}

/// Like [`parsed`], for a column that may be NULL.
fn parsed_opt<T>(row: &SqliteRow, column: &str) -> Result<Option<T>, sqlx::Error>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    row.try_get::<Option<&str>, _>(column)?
        .map(|text| parse(text, column))
        .transpose()
}

fn parse<T>(text: &str, column: &str) -> Result<T, sqlx::Error>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    text.parse().map_err(|error: T::Err| sqlx::Error::ColumnDecode {
        index: column.into(),
        source: Box::new(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_url_that_is_not_ours_is_refused_without_repeating_it() {
        for url in [
            "mysql://adit:hunter2@db/adit",
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
