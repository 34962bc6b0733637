//! How the store talks to its pool: every statement is bounded in time, and what lost a race inside the database is
//! tried again.

use std::time::Duration;

use sqlx::{
    Any, Transaction as Inner,
    any::{AnyArguments, AnyRow},
    mysql::MySqlDatabaseError,
    query::Query,
};
use tokio::time::timeout;

use super::{Store, StoreError};

/// What a statement may take before the database counts as gone. A statement here touches a few rows by their key.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How often something that MySQL rolled back in favour of another transaction is done again, at once.
const TRIES: u32 = 8;

pub(super) type Statement<'q> = Query<'q, Any, AnyArguments>;

impl Store {
    /// Changes rows; says how many. Of an upsert, MySQL counts a changed row twice.
    pub(super) async fn execute<'q>(&self, statement: impl Fn() -> Statement<'q>) -> Result<u64, StoreError> {
        let execute = || bounded(self.patience, statement().execute(&self.pool));
        Ok(retried(execute).await?.rows_affected())
    }

    /// Reads rows, and takes each apart.
    pub(super) async fn fetch<'q, T>(
        &self,
        statement: impl Fn() -> Statement<'q>,
        map: impl Fn(&AnyRow) -> Result<T, sqlx::Error>,
    ) -> Result<Vec<T>, StoreError> {
        let fetch = || bounded(self.patience, statement().fetch_all(&self.pool));
        mapped(retried(fetch).await?, map)
    }

    /// Begins what is done as a whole or not at all. It is rolled back unless it is committed.
    pub(super) async fn begin(&self) -> Result<Transaction, StoreError> {
        let patience = self.patience;
        let inner = bounded(patience, self.pool.begin()).await?;
        Ok(Transaction { inner, patience })
    }
}

/// Several statements, as a whole or not at all.
pub(super) struct Transaction {
    inner: Inner<'static, Any>,
    patience: Duration,
}

impl Transaction {
    /// As [`Store::execute`], once.
    pub async fn execute(&mut self, statement: Statement<'_>) -> Result<u64, StoreError> {
        let execute = statement.execute(&mut *self.inner);
        Ok(bounded(self.patience, execute).await?.rows_affected())
    }

    /// As [`Store::fetch`], once.
    pub async fn fetch<T>(
        &mut self,
        statement: Statement<'_>,
        map: impl Fn(&AnyRow) -> Result<T, sqlx::Error>,
    ) -> Result<Vec<T>, StoreError> {
        let fetch = statement.fetch_all(&mut *self.inner);
        mapped(bounded(self.patience, fetch).await?, map)
    }

    pub async fn commit(self) -> Result<(), StoreError> {
        bounded(self.patience, self.inner.commit()).await
    }
}

/// Does it again as long as it did not happen because another transaction was in the way.
pub(super) async fn retried<T, F>(work: impl Fn() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut tries = 1;
    loop {
        match work().await {
            Err(error) if lost_a_race(&error) && tries < TRIES => tries += 1,
            done => return done,
        }
    }
}

/// A deadlock, or a row that another transaction held for too long. Either way ours did not happen.
fn lost_a_race(error: &StoreError) -> bool {
    const LOCK_WAIT_TIMEOUT: u16 = 1205;
    const DEADLOCK: u16 = 1213;
    let StoreError::Database(error) = error else {
        return false;
    };
    error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<MySqlDatabaseError>())
        .is_some_and(|error| [LOCK_WAIT_TIMEOUT, DEADLOCK].contains(&error.number()))
}

/// The one place where the database is waited for.
async fn bounded<T>(patience: Duration, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    Ok(timeout(patience, work).await.map_err(|_| StoreError::Slow)??)
}

fn mapped<T>(rows: Vec<AnyRow>, map: impl Fn(&AnyRow) -> Result<T, sqlx::Error>) -> Result<Vec<T>, StoreError> {
    Ok(rows.iter().map(map).collect::<Result<_, _>>()?)
}
