//! `clients`: who may have tunnels, and what a downstream must show to use them.

use serde::{Deserialize, Serialize};
use sqlx::{Row, any::AnyRow};

use super::{
    Store, StoreError,
    row::{parsed, parsed_opt, text, text_opt, unreadable},
    session::retried,
};
use crate::{
    cluster::hash::{PasswordHash, TokenHash},
    ids::{ClientId, TokenId},
};

/// What a downstream must show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownstreamAuth {
    /// An access token of the client, or a signature.
    Token,
    /// A user name and a password.
    Basic {
        /// The user name.
        user: String,
        /// The password, stretched.
        hash: PasswordHash,
    },
    /// Nothing.
    Public,
}

impl DownstreamAuth {
    /// The mode's name: `token`, `basic` or `public`.
    pub fn name(&self) -> &'static str {
        match self {
            DownstreamAuth::Token => "token",
            DownstreamAuth::Basic { .. } => "basic",
            DownstreamAuth::Public => "public",
        }
    }

    fn basic(&self) -> (Option<&str>, Option<&str>) {
        match self {
            DownstreamAuth::Basic { user, hash } => (Some(user), Some(hash.as_str())),
            DownstreamAuth::Token | DownstreamAuth::Public => (None, None),
        }
    }
}

/// One access token, as it is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRecord {
    /// Its public name.
    pub token_id: TokenId,
    /// What is stored of the secret.
    pub hash: TokenHash,
}

/// A client and the hashes of its access tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// The name.
    pub client_id: ClientId,
    /// What a downstream must show.
    pub auth: DownstreamAuth,
    /// The client's access tokens.
    pub tokens: Vec<TokenRecord>,
    /// When an agent of its last connected or left; `None`: never.
    pub last_seen_at_ms: Option<i64>,
}

/// A client as a list shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientSummary {
    /// The name.
    pub client_id: ClientId,
    /// The mode's name.
    pub auth: String,
    /// The user name, in mode `basic`.
    pub basic_user: Option<String>,
    /// When it was created.
    pub created_at: i64,
    /// When an agent of its last connected or left.
    pub last_seen_at: Option<i64>,
    /// How many tunnels it has now, on all nodes.
    pub tunnels: i64,
}

/// One look-up, one statement: a client without tokens is one row with NULLs.
const SELECT_CLIENT: &str = "SELECT c.client_id, c.auth, c.basic_user, c.basic_hash, c.last_seen_at, \
     t.token_id, t.token_hash \
     FROM clients c LEFT JOIN client_access_tokens t ON t.client_id = c.client_id WHERE c.client_id = ?";

macro_rules! select_summary {
    ($which:literal) => {
        concat!(
            "SELECT c.client_id, c.auth, c.basic_user, c.created_at, c.last_seen_at, ",
            "(SELECT COUNT(*) FROM connections x WHERE x.client_id = c.client_id) AS tunnels FROM clients c ",
            $which
        )
    };
}

impl Store {
    /// A client with its tokens.
    pub async fn client(&self, client_id: &ClientId) -> Result<Option<Client>, StoreError> {
        let select = || sqlx::query(SELECT_CLIENT).bind(client_id.as_str());
        let mut rows = self.fetch(select, client_and_token).await?.into_iter();
        let Some((mut client, token)) = rows.next() else {
            return Ok(None);
        };
        client.tokens.extend(token);
        client.tokens.extend(rows.filter_map(|(_, token)| token));
        Ok(Some(client))
    }

    /// A new client and its first token. [`StoreError::Exists`] if the name is taken.
    pub async fn insert_client(&self, row: &Client, label: Option<&str>, now: i64) -> Result<(), StoreError> {
        retried(|| self.try_insert_client(row, label, now)).await
    }

    async fn try_insert_client(&self, row: &Client, label: Option<&str>, now: i64) -> Result<(), StoreError> {
        let (user, hash) = row.auth.basic();
        let mut transaction = self.begin().await?;
        let insert = sqlx::query(
            "INSERT INTO clients (client_id, auth, basic_user, basic_hash, created_at) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(row.client_id.as_str())
        .bind(row.auth.name())
        .bind(user)
        .bind(hash)
        .bind(now);
        transaction.execute(insert).await?;
        for token in &row.tokens {
            let insert = super::tokens::insert(token.token_id, &row.client_id, token.hash, label, now);
            transaction.execute(insert).await?;
        }
        transaction.commit().await
    }

    /// Changes what a downstream must show. `false`: no such client.
    pub async fn update_auth(&self, client_id: &ClientId, auth: &DownstreamAuth) -> Result<bool, StoreError> {
        let (user, hash) = auth.basic();
        let update = || {
            sqlx::query("UPDATE clients SET auth = ?, basic_user = ?, basic_hash = ? WHERE client_id = ?")
                .bind(auth.name())
                .bind(user)
                .bind(hash)
                .bind(client_id.as_str())
        };
        Ok(self.execute(update).await? > 0)
    }

    /// Up to `limit` clients in the order of their names, from the first one after `after`.
    pub async fn clients(&self, after: &str, limit: u32) -> Result<Vec<ClientSummary>, StoreError> {
        let select = || {
            sqlx::query(select_summary!("WHERE c.client_id > ? ORDER BY c.client_id LIMIT ?"))
                .bind(after)
                .bind(i64::from(limit))
        };
        self.fetch(select, summary).await
    }

    /// One client as a list shows it.
    pub async fn client_summary(&self, client_id: &ClientId) -> Result<Option<ClientSummary>, StoreError> {
        let select = || sqlx::query(select_summary!("WHERE c.client_id = ?")).bind(client_id.as_str());
        Ok(self.fetch(select, summary).await?.pop())
    }

    /// Removes a client and every credential of its. `false`: no such client.
    pub async fn delete_client(&self, client_id: &ClientId) -> Result<bool, StoreError> {
        retried(|| self.try_delete_client(client_id)).await
    }

    async fn try_delete_client(&self, client_id: &ClientId) -> Result<bool, StoreError> {
        let mut transaction = self.begin().await?;
        let delete = sqlx::query("DELETE FROM clients WHERE client_id = ?");
        let removed = transaction.execute(delete.bind(client_id.as_str())).await?;
        for credentials in [
            "DELETE FROM client_access_tokens WHERE client_id = ?",
            "DELETE FROM signature_tokens WHERE client_id = ?",
            "DELETE FROM magic_tokens WHERE client_id = ?",
        ] {
            let delete = sqlx::query(credentials);
            transaction.execute(delete.bind(client_id.as_str())).await?;
        }
        transaction.commit().await?;
        Ok(removed > 0)
    }
}

/// A row of [`SELECT_CLIENT`]: the client, without tokens, and one of them.
fn client_and_token(row: &AnyRow) -> Result<(Client, Option<TokenRecord>), sqlx::Error> {
    let client = Client {
        client_id: parsed(row, "client_id")?,
        auth: auth(row)?,
        tokens: Vec::new(),
        last_seen_at_ms: row.try_get("last_seen_at")?,
    };
    let Some(token_id) = parsed_opt(row, "token_id")? else {
        return Ok((client, None));
    };
    let hash = parsed(row, "token_hash")?;
    Ok((client, Some(TokenRecord { token_id, hash })))
}

fn auth(row: &AnyRow) -> Result<DownstreamAuth, sqlx::Error> {
    match text(row, "auth")? {
        "token" => Ok(DownstreamAuth::Token),
        "public" => Ok(DownstreamAuth::Public),
        "basic" => Ok(DownstreamAuth::Basic {
            user: text(row, "basic_user")?.to_owned(),
            hash: PasswordHash::stored(text(row, "basic_hash")?.to_owned()),
        }),
        other => Err(unreadable("auth", format!("no such mode: {other}"))),
    }
}

fn summary(row: &AnyRow) -> Result<ClientSummary, sqlx::Error> {
    Ok(ClientSummary {
        client_id: parsed(row, "client_id")?,
        auth: text(row, "auth")?.to_owned(),
        basic_user: text_opt(row, "basic_user")?.map(str::to_owned),
        created_at: row.try_get("created_at")?,
        last_seen_at: row.try_get("last_seen_at")?,
        tunnels: row.try_get("tunnels")?,
    })
}
