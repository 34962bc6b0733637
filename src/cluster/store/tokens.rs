//! `client_access_tokens`, `signature_tokens` and `magic_tokens`: hashes only, the secrets are never stored.

use serde::{Deserialize, Serialize};
use sqlx::{Row, any::AnyRow};

use super::{
    Store, StoreError,
    row::{parsed, text_opt},
    session::Statement,
};
use crate::{
    cluster::hash::TokenHash,
    ids::{ClientId, TokenId},
};

/// An access token as a list shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRow {
    /// Its public name.
    pub token_id: TokenId,
    /// What people call it.
    pub label: Option<String>,
    /// When it was made.
    pub created_at: i64,
}

pub(super) fn insert<'q>(
    token_id: TokenId,
    client_id: &'q ClientId,
    hash: TokenHash,
    label: Option<&'q str>,
    now: i64,
) -> Statement<'q> {
    // Not of a client that was deleted meanwhile: its tokens would outlive it.
    sqlx::query(
        "INSERT INTO client_access_tokens (token_id, client_id, token_hash, label, created_at) \
         SELECT ?, client_id, ?, ?, ? FROM clients WHERE client_id = ?",
    )
    .bind(token_id.to_string())
    .bind(hash.to_hex())
    .bind(label)
    .bind(now)
    .bind(client_id.as_str())
}

impl Store {
    /// One more access token. `false`: no such client.
    pub async fn insert_token(
        &self,
        token_id: TokenId,
        client_id: &ClientId,
        hash: TokenHash,
        label: Option<&str>,
        now: i64,
    ) -> Result<bool, StoreError> {
        let inserted = self.execute(|| insert(token_id, client_id, hash, label, now)).await?;
        Ok(inserted > 0)
    }

    /// A client's access tokens, oldest first.
    pub async fn tokens(&self, client_id: &ClientId) -> Result<Vec<TokenRow>, StoreError> {
        let select = || {
            sqlx::query(
                "SELECT token_id, label, created_at FROM client_access_tokens WHERE client_id = ? \
                 ORDER BY created_at, token_id",
            )
            .bind(client_id.as_str())
        };
        self.fetch(select, token).await
    }

    /// Revokes an access token. `false`: the client has no such token.
    pub async fn delete_token(&self, client_id: &ClientId, token_id: TokenId) -> Result<bool, StoreError> {
        let delete = || {
            sqlx::query("DELETE FROM client_access_tokens WHERE token_id = ? AND client_id = ?")
                .bind(token_id.to_string())
                .bind(client_id.as_str())
        };
        Ok(self.execute(delete).await? > 0)
    }

    /// One more signature. `false`: no such client.
    pub async fn insert_signature(
        &self,
        client_id: &ClientId,
        hash: TokenHash,
        now: i64,
        expires_at: i64,
    ) -> Result<bool, StoreError> {
        let insert = || {
            sqlx::query(
                "INSERT INTO signature_tokens (client_id, token_hash, created_at, expires_at) \
                 SELECT client_id, ?, ?, ? FROM clients WHERE client_id = ?",
            )
            .bind(hash.to_hex())
            .bind(now)
            .bind(expires_at)
            .bind(client_id.as_str())
        };
        Ok(self.execute(insert).await? > 0)
    }

    /// Until when a signature of this client is good; `None`: there is none such.
    pub async fn signature_expiry(&self, client_id: &ClientId, hash: TokenHash) -> Result<Option<i64>, StoreError> {
        let select = || {
            sqlx::query("SELECT expires_at FROM signature_tokens WHERE client_id = ? AND token_hash = ?")
                .bind(client_id.as_str())
                .bind(hash.to_hex())
        };
        Ok(self.fetch(select, |row| row.try_get("expires_at")).await?.pop())
    }

    /// One more magic token. `false`: no such client. [`StoreError::Exists`]: it is there already, whosever it is.
    pub async fn insert_magic_token(
        &self,
        client_id: &ClientId,
        hash: TokenHash,
        now: i64,
    ) -> Result<bool, StoreError> {
        let insert = || {
            sqlx::query(
                "INSERT INTO magic_tokens (token_hash, client_id, created_at) \
                 SELECT ?, client_id, ? FROM clients WHERE client_id = ?",
            )
            .bind(hash.to_hex())
            .bind(now)
            .bind(client_id.as_str())
        };
        Ok(self.execute(insert).await? > 0)
    }

    /// The magic token of this hash, as it is stored, and whose it is.
    pub async fn magic_token(&self, hash: TokenHash) -> Result<Option<(TokenHash, ClientId)>, StoreError> {
        let select =
            || sqlx::query("SELECT token_hash, client_id FROM magic_tokens WHERE token_hash = ?").bind(hash.to_hex());
        let found = self.fetch(select, |row| {
            Ok((parsed(row, "token_hash")?, parsed(row, "client_id")?))
        });
        Ok(found.await?.pop())
    }

    /// Removes signatures that are no good any more.
    pub async fn delete_expired_signatures(&self, now: i64) -> Result<u64, StoreError> {
        self.execute(|| sqlx::query("DELETE FROM signature_tokens WHERE expires_at <= ?").bind(now))
            .await
    }
}

fn token(row: &AnyRow) -> Result<TokenRow, sqlx::Error> {
    Ok(TokenRow {
        token_id: parsed(row, "token_id")?,
        label: text_opt(row, "label")?.map(str::to_owned),
        created_at: row.try_get("created_at")?,
    })
}
