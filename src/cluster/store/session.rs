//! How the store talks to its pool: every statement is bounded in time, and what lost a race inside the database is
//! tried again.

use std::time::{Duration, Instant};

use sqlx::{
    Any, Transaction as Inner,
    any::{AnyArguments, AnyRow},
    mysql::MySqlDatabaseError,
    query::Query,
};
use tokio::time::timeout;

use super::{Store, StoreError};
use crate::telemetry::RegistryMeter;

/// What a statement may take before the database counts as gone. A statement here touches a few rows by their key.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How often something that MySQL rolled back in favour of another transaction is done again, at once.
const TRIES: u32 = 8;

pub(super) type Statement<'q> = Query<'q, Any, AnyArguments>;

impl Store {
    /// Changes rows; says how many. Of an upsert, MySQL counts a changed row twice.
    pub(super) async fn execute<'q>(&self, statement: impl Fn() -> Statement<'q>) -> Result<u64, StoreError> {
        let execute = || self.bounds.wait(statement().execute(&self.pool));
        Ok(retried(execute).await?.rows_affected())
    }

    /// Reads rows, and takes each apart.
    pub(super) async fn fetch<'q, T>(
        &self,
        statement: impl Fn() -> Statement<'q>,
        map: impl Fn(&AnyRow) -> Result<T, sqlx::Error>,
    ) -> Result<Vec<T>, StoreError> {
        let fetch = || self.bounds.wait(statement().fetch_all(&self.pool));
        mapped(retried(fetch).await?, map)
    }

    /// Begins what is done as a whole or not at all. It is rolled back unless it is committed.
    pub(super) async fn begin(&self) -> Result<Transaction, StoreError> {
        let bounds = self.bounds.clone();
        let inner = bounds.wait(self.pool.begin()).await?;
        Ok(Transaction { inner, bounds })
    }
}

/// Several statements, as a whole or not at all.
pub(super) struct Transaction {
    inner: Inner<'static, Any>,
    bounds: Bounds,
}

impl Transaction {
    /// As [`Store::execute`], once.
    pub async fn execute(&mut self, statement: Statement<'_>) -> Result<u64, StoreError> {
        let execute = statement.execute(&mut *self.inner);
        Ok(self.bounds.wait(execute).await?.rows_affected())
    }

    /// As [`Store::fetch`], once.
    pub async fn fetch<T>(
        &mut self,
        statement: Statement<'_>,
        map: impl Fn(&AnyRow) -> Result<T, sqlx::Error>,
    ) -> Result<Vec<T>, StoreError> {
        let fetch = statement.fetch_all(&mut *self.inner);
        mapped(self.bounds.wait(fetch).await?, map)
    }

    pub async fn commit(self) -> Result<(), StoreError> {
        self.bounds.wait(self.inner.commit()).await
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

/// How long the database is waited for, and who counts it.
#[derive(Debug, Clone)]
pub(super) struct Bounds {
    /// What any one statement may take.
    pub patience: Duration,
    pub meter: RegistryMeter,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            patience: PATIENCE,
            meter: RegistryMeter::default(),
        }
    }
}

impl Bounds {
    /// The one place where the database is waited for.
    async fn wait<T>(&self, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
        let began = Instant::now();
        let answer = match timeout(self.patience, work).await {
            Ok(answer) => answer.map_err(StoreError::from),
            Err(_) => Err(StoreError::Slow),
        };
        // A row that is there already is an answer.
        let failed = matches!(answer, Err(StoreError::Slow | StoreError::Database(_)));
        self.meter.asked(began.elapsed(), failed);
        answer
    }
}

fn mapped<T>(rows: Vec<AnyRow>, map: impl Fn(&AnyRow) -> Result<T, sqlx::Error>) -> Result<Vec<T>, StoreError> {
    Ok(rows.iter().map(map).collect::<Result<_, _>>()?)
}
