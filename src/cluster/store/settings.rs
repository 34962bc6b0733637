//! `settings`: what the relay itself remembers.

use sqlx::Row;

use super::{Store, StoreError};

impl Store {
    /// A setting's value.
    pub async fn setting(&self, name: &str) -> Result<Option<String>, StoreError> {
        let value = sqlx::query("SELECT value FROM settings WHERE name = ?")
            .bind(name)
            .try_map(|row| row.try_get("value"))
            .fetch_optional(&self.pool)
            .await?;
        Ok(value)
    }

    /// Sets what was never set. [`StoreError::Exists`] if somebody, perhaps another node, was first.
    pub async fn insert_setting(&self, name: &str, value: &str) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO settings (name, value) VALUES (?, ?)")
            .bind(name)
            .bind(value)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
