//! From a database URL to a pool of connections, with each database's own settings.

use std::{str::FromStr, time::Duration};

use sqlx::{
    AnyConnection, AnyPool, ConnectOptions, Connection,
    any::{AnyConnectOptions, AnyPoolOptions},
};
use tokio::time::timeout;

use super::{StoreError, dialect::Dialect, session::PATIENCE};

/// How long a caller waits for a connection; with a statement's patience it bounds what any one call can take.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the first connection may take, over a network and with TLS.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// SQLite has one writer at a time; the others are for readers, who do not wait for it (WAL).
const FILE_CONNECTIONS: u32 = 4;
/// Look-ups are cached and writes are batched, so a node needs few; 8 nodes stay far below MySQL's default of 151.
const MYSQL_CONNECTIONS: u32 = 8;

/// WAL stays with the file; the other two are each connection's own. A statement waits 2 s for another one's write lock.
const SQLITE_FILE: &str = "PRAGMA journal_mode = WAL";
const SQLITE_CONNECTION: &str = "PRAGMA busy_timeout = 2000; PRAGMA synchronous = NORMAL";

/// What of a MySQL URL is passed on. An option that is misspelt would be ignored, and the connection not be secure.
const MYSQL_OPTIONS: [&str; 5] = ["ssl-mode", "ssl-ca", "ssl-cert", "ssl-key", "socket"];

/// Opens what the URL names. Connects once by itself, so that what is wrong is said: a pool only knows that time is up.
pub(super) async fn pool(url: &str) -> Result<(Dialect, AnyPool), StoreError> {
    sqlx::any::install_default_drivers();
    let dialect = Dialect::of(url)?;
    let options = match dialect {
        Dialect::Sqlite => sqlite_options(url)?,
        Dialect::MySql => mysql_options(url)?,
    };
    let in_memory = dialect == Dialect::Sqlite && is_in_memory(url);
    if !in_memory {
        timeout(OPEN_TIMEOUT, probe(dialect, &options))
            .await
            .map_err(|_| StoreError::Slow)??;
    }
    let pool = match dialect {
        Dialect::Sqlite if in_memory => memory_pool(),
        Dialect::Sqlite => sqlite_pool().max_connections(FILE_CONNECTIONS),
        Dialect::MySql => mysql_pool(),
    };
    let pool = pool.acquire_timeout(ACQUIRE_TIMEOUT);
    Ok((dialect, pool.connect_lazy_with(options)))
}

async fn probe(dialect: Dialect, options: &AnyConnectOptions) -> Result<(), sqlx::Error> {
    let mut connection = options.connect().await?;
    if dialect == Dialect::Sqlite {
        set(&mut connection, SQLITE_CONNECTION).await?;
        set(&mut connection, SQLITE_FILE).await?;
    }
    connection.close().await
}

async fn set(connection: &mut AnyConnection, pragmas: &'static str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(pragmas).execute(connection).await?;
    Ok(())
}

fn sqlite_pool() -> AnyPoolOptions {
    AnyPoolOptions::new().after_connect(|connection, _| Box::pin(set(connection, SQLITE_CONNECTION)))
}

/// The database lives as long as its one connection does.
fn memory_pool() -> AnyPoolOptions {
    sqlite_pool()
        .min_connections(1)
        .max_connections(1)
        .idle_timeout(None)
        .max_lifetime(None)
}

/// The pool asks a connection whether it lives before it takes it back, and would wait for the answer of a dead server
/// without end: so it is asked here first, and closed if it does not answer.
fn mysql_pool() -> AnyPoolOptions {
    AnyPoolOptions::new()
        .max_connections(MYSQL_CONNECTIONS)
        .after_release(|connection, _| {
            Box::pin(async {
                let answer = timeout(PATIENCE, connection.ping()).await;
                answer.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map(|()| true)
            })
        })
}

fn is_in_memory(url: &str) -> bool {
    url.contains(":memory:") || url.contains("mode=memory")
}

fn sqlite_options(url: &str) -> Result<AnyConnectOptions, StoreError> {
    let wrong = |_| StoreError::Url("this is not a SQLite URL: write `sqlite:<path>`, with `?` only before options");
    // The file is made when it is missing, unless the URL says otherwise.
    let url = match url.split_once('?') {
        _ if is_in_memory(url) => url.to_owned(),
        Some((_, options)) if options.contains("mode=") => url.to_owned(),
        Some(_) => format!("{url}&mode=rwc"),
        None => format!("{url}?mode=rwc"),
    };
    let options = AnyConnectOptions::from_str(&url).map_err(wrong)?;
    sqlx::sqlite::SqliteConnectOptions::from_url(&options.database_url).map_err(wrong)?;
    Ok(options)
}

fn mysql_options(url: &str) -> Result<AnyConnectOptions, StoreError> {
    let wrong = |_| StoreError::Url("this is not a MySQL URL: write `mysql://user:password@host:3306/database`");
    let options = AnyConnectOptions::from_str(url).map_err(wrong)?;
    let url = &options.database_url;
    if url.path().trim_matches('/').is_empty() {
        return Err(StoreError::Url("the MySQL URL names no database: end it with `/adit`"));
    }
    if !url.query_pairs().all(|(key, _)| MYSQL_OPTIONS.contains(&&*key)) {
        return Err(StoreError::Url(
            "the MySQL URL has an option other than ssl-mode, ssl-ca, ssl-cert, ssl-key and socket",
        ));
    }
    sqlx::mysql::MySqlConnectOptions::from_url(url)
        .map_err(|_| StoreError::Url("the MySQL URL has an option with a value that MySQL does not know"))?;
    Ok(options)
}
