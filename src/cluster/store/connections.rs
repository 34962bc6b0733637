//! `connections`: one row a tunnel, written and removed by the node that holds it.

use sqlx::{Row, sqlite::SqliteRow};

use super::{Store, StoreError, dialect, parsed, parsed_opt};
use crate::ids::{ClientId, InstanceId, NodeId, TokenId, TunnelId};

/// A tunnel, as its node records it. It never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionRow {
    /// The tunnel: the key.
    pub tunnel_ws_id: TunnelId,
    /// The name that it serves.
    pub client_id: ClientId,
    /// What is spoken in it: `adit` or `moosicbox`; text, because a newer node may speak another.
    pub dialect: String,
    /// The agent's process; MoosicBox servers do not say.
    pub instance_id: Option<InstanceId>,
    /// Which of its instance's tunnels this is.
    pub slot: Option<u32>,
    /// The token that opened it, so that revoking the token closes it.
    pub token_id: Option<TokenId>,
    /// What the agent says it is.
    pub agent_version: Option<String>,
    /// Where the agent dialled from.
    pub remote_addr: String,
    /// When it was accepted.
    pub connected_at: i64,
}

/// A tunnel and the node that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The tunnel.
    pub tunnel: ConnectionRow,
    /// Who holds it.
    pub node_id: NodeId,
    /// Whether that node is leaving.
    pub draining: bool,
}

impl Store {
    /// Makes the rows `put` exist and the rows `remove` not, and notes when clients were last seen; all or nothing.
    pub async fn write_connections(
        &self,
        node_id: NodeId,
        put: &[ConnectionRow],
        remove: &[TunnelId],
        seen: &[(ClientId, i64)],
    ) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        for row in put {
            insert(node_id, row).execute(&mut *transaction).await?;
        }
        for tunnel in remove {
            sqlx::query("DELETE FROM connections WHERE tunnel_ws_id = ?")
                .bind(tunnel.to_string())
                .execute(&mut *transaction)
                .await?;
        }
        for (client, at) in seen {
            sqlx::query("UPDATE clients SET last_seen_at = ? WHERE client_id = ? AND (last_seen_at IS NULL OR last_seen_at < ?)")
                .bind(at)
                .bind(client.as_str())
                .bind(at)
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// The tunnels that the store believes a node to hold.
    pub async fn tunnels_of_node(&self, node_id: NodeId) -> Result<Vec<TunnelId>, StoreError> {
        let tunnels = sqlx::query("SELECT tunnel_ws_id FROM connections WHERE node_id = ?")
            .bind(node_id.to_string())
            .try_map(|row| parsed(&row, "tunnel_ws_id"))
            .fetch_all(&self.pool)
            .await?;
        Ok(tunnels)
    }

    /// Who holds a tunnel of this client, oldest first; only nodes that have a row count.
    pub async fn holders(&self, client_id: &ClientId) -> Result<Vec<Holder>, StoreError> {
        let holders = sqlx::query(
            "SELECT c.tunnel_ws_id, c.client_id, c.node_id, c.dialect, c.instance_id, c.slot, c.token_id, \
             c.agent_version, c.remote_addr, c.connected_at, n.draining \
             FROM connections c JOIN nodes n ON n.node_id = c.node_id \
             WHERE c.client_id = ? ORDER BY c.connected_at, c.tunnel_ws_id",
        )
        .bind(client_id.as_str())
        .try_map(|row| holder(&row))
        .fetch_all(&self.pool)
        .await?;
        Ok(holders)
    }
}

fn insert(node_id: NodeId, row: &ConnectionRow) -> sqlx::query::Query<'_, sqlx::Sqlite, sqlx::sqlite::SqliteArguments> {
    sqlx::query(dialect::INSERT_CONNECTION_ONCE)
        .bind(row.tunnel_ws_id.to_string())
        .bind(row.client_id.as_str())
        .bind(node_id.to_string())
        .bind(&row.dialect)
        .bind(row.instance_id.map(|id| id.to_string()))
        .bind(row.slot.map(i64::from))
        .bind(row.token_id.map(|id| id.to_string()))
        .bind(&row.agent_version)
        .bind(&row.remote_addr)
        .bind(row.connected_at)
}

fn holder(row: &SqliteRow) -> Result<Holder, sqlx::Error> {
    let slot: Option<i64> = row.try_get("slot")?;
    Ok(Holder {
        tunnel: ConnectionRow {
            tunnel_ws_id: parsed(row, "tunnel_ws_id")?,
            client_id: parsed(row, "client_id")?,
            dialect: row.try_get("dialect")?,
            instance_id: parsed_opt(row, "instance_id")?,
            slot: slot.and_then(|slot| u32::try_from(slot).ok()),
            token_id: parsed_opt(row, "token_id")?,
            agent_version: row.try_get("agent_version")?,
            remote_addr: row.try_get("remote_addr")?,
            connected_at: row.try_get("connected_at")?,
        },
        node_id: parsed(row, "node_id")?,
        draining: row.try_get::<i64, _>("draining")? != 0,
    })
}
