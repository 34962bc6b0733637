//! Brings the tables to this version: one node at a time, also while nodes of the version before run.
//!
//! A database that is *newer* than this build is left as it is: migrations only add until no node needs the old.

use std::time::Duration;

use sqlx::{
    Any, AnyConnection, AnyPool, Connection, Row, Transaction,
    migrate::{Migrate, MigrateError, Migrator},
};
use tokio::time::timeout;

use super::{Store, StoreError, dialect::Dialect};

/// A migration may rewrite a table; the others wait for it.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(300);
/// How often a SQLite file that another process is migrating is tried again: each try waits for its lock.
const SQLITE_TRIES: u32 = 15;

/// What the tables are at, and what this build knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchemaVersion {
    /// The number of the last migration that the database has had.
    pub found: i64,
    /// The number of the last one that this build knows. Less than `found`: a newer version has been here.
    pub known: i64,
}

impl Dialect {
    fn migrator(self) -> Migrator {
        let mut migrator = match self {
            Self::Sqlite => sqlx::migrate!("./migrations/sqlite"),
            Self::MySql => sqlx::migrate!("./migrations/mysql"),
        };
        // MariaDB refuses sqlx's GET_LOCK(…, -1), and sqlx does not look: it is locked here.
        migrator.set_ignore_missing(true).set_locking(false);
        migrator
    }
}

impl Store {
    pub(super) async fn migrate(&self) -> Result<(), StoreError> {
        let migrate = async {
            match self.dialect {
                Dialect::Sqlite => sqlite(&self.pool).await,
                Dialect::MySql => mysql(&self.pool).await,
            }
        };
        timeout(MIGRATE_TIMEOUT, migrate).await.map_err(|_| StoreError::Slow)?
    }

    /// What the tables are at.
    pub async fn schema_version(&self) -> Result<SchemaVersion, StoreError> {
        let last = || sqlx::query("SELECT MAX(version) AS version FROM _sqlx_migrations");
        let found = self.fetch(last, |row| row.try_get("version")).await?;
        let known = self.dialect.migrator().iter().map(|migration| migration.version).max();
        Ok(SchemaVersion {
            found: found.first().copied().unwrap_or_default(),
            known: known.unwrap_or_default(),
        })
    }
}

/// In one transaction that holds the file's write lock from its start.
async fn sqlite(pool: &AnyPool) -> Result<(), StoreError> {
    let mut transaction = locked(pool).await?;
    let migrator = Dialect::Sqlite.migrator();
    migrator.run_direct(None, &mut *transaction, false).await?;
    Ok(transaction.commit().await?)
}

async fn locked(pool: &AnyPool) -> Result<Transaction<'static, Any>, sqlx::Error> {
    let mut tries = 1;
    loop {
        match pool.begin_with("BEGIN IMMEDIATE").await {
            Err(error) if is_busy(&error) && tries < SQLITE_TRIES => tries += 1,
            done => return done,
        }
    }
}

/// SQLITE_BUSY, whichever kind: <https://www.sqlite.org/rescode.html#busy>.
fn is_busy(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.and_then(|code| code.parse::<u32>().ok())
        .is_some_and(|code| code & 0xff == 5)
}

/// Under a lock of the server's that ends with the connection, if it must.
async fn mysql(pool: &AnyPool) -> Result<(), StoreError> {
    // Not given back: on failure, the lock must not stay with an idle connection.
    let mut connection = pool.acquire().await?.detach();
    if !lock(&mut connection).await? {
        return Err(StoreError::Slow);
    }
    forget_half_done(&mut connection).await?;
    Dialect::MySql
        .migrator()
        .run_direct(None, &mut connection, false)
        .await?;
    Ok(connection.close().await?)
}

/// One lock a database, since they are the server's. `false`: another node is not done yet.
async fn lock(connection: &mut AnyConnection) -> Result<bool, sqlx::Error> {
    let lock = sqlx::query("SELECT GET_LOCK(CONCAT('adit_migrate_', MD5(DATABASE())), 240) AS locked");
    let row = lock.fetch_one(connection).await?;
    Ok(row.try_get::<Option<i64>, _>("locked")? == Some(1))
}

/// MySQL commits each statement of a migration by itself, so a node that dies in one leaves it half done and marked so.
/// Every migration for MySQL can be repeated; with the lock held, whoever left the mark is gone.
async fn forget_half_done(connection: &mut AnyConnection) -> Result<(), MigrateError> {
    connection.ensure_migrations_table("_sqlx_migrations").await?;
    sqlx::query("DELETE FROM _sqlx_migrations WHERE success = FALSE")
        .execute(connection)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeId, TunnelId};

    #[tokio::test]
    async fn a_tunnel_that_the_version_before_writes_meanwhile_is_read_as_its_generation_zero() {
        let store = Store::open("sqlite::memory:").await.expect("a store");
        let (tunnel, node) = (TunnelId::new(), NodeId::new());
        let statements = [
            format!("INSERT INTO nodes VALUES ('{node}', '', '', 1, 1, 0)"),
            format!(
                "INSERT INTO connections (tunnel_ws_id, client_id, node_id, dialect, instance_id, slot, token_id, \
                 agent_version, remote_addr, connected_at) VALUES ('{tunnel}', 'home', '{node}', 'adit', NULL, 1, NULL, \
                 NULL, '', 1)"
            ),
        ];
        for statement in statements {
            let old = || sqlx::query(sqlx::AssertSqlSafe(statement.clone()));
            store.execute(old).await.expect("as the version before writes it");
        }
        let holders = store.holders(&"home".parse().expect("an id")).await.expect("holders");
        let found: Vec<_> = holders
            .iter()
            .map(|held| (held.tunnel.tunnel_ws_id, held.tunnel.generation))
            .collect();
        assert_eq!(found, [(tunnel, 0)]);
    }

    #[tokio::test]
    async fn a_file_of_the_first_version_is_brought_to_this_one_with_what_is_in_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let url = format!("sqlite:{}?mode=rwc", dir.path().join("adit.db").display());
        sqlx::any::install_default_drivers();
        let old = AnyPool::connect(&url).await.expect("a file");
        Dialect::Sqlite.migrator().run_to(1, &old).await.expect("as it was");
        sqlx::query("INSERT INTO settings (name, value) VALUES ('greeting', 'hello')")
            .execute(&old)
            .await
            .expect("written");

        let store = Store::open(&url).await.expect("opened");
        assert_eq!(store.setting("greeting").await.expect("read").as_deref(), Some("hello"));
        let version = store.schema_version().await.expect("a version");
        assert_eq!(version.found, version.known);
    }
}
