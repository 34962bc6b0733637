//! `settings`: what the relay itself remembers.

use super::{Store, StoreError, row::text};

impl Store {
    /// A setting's value.
    pub async fn setting(&self, name: &str) -> Result<Option<String>, StoreError> {
        let select = || sqlx::query("SELECT value FROM settings WHERE name = ?").bind(name);
        let mut values = self.fetch(select, |row| Ok(text(row, "value")?.to_owned())).await?;
        Ok(values.pop())
    }

    /// Sets what was never set. [`StoreError::Exists`] if somebody, perhaps another node, was first.
    pub async fn insert_setting(&self, name: &str, value: &str) -> Result<(), StoreError> {
        let insert = || {
            sqlx::query("INSERT INTO settings (name, value) VALUES (?, ?)")
                .bind(name)
                .bind(value)
        };
        self.execute(insert).await?;
        Ok(())
    }
}
