//! `connections`: one row a tunnel, written and removed by the node that holds it.

use sqlx::{Any, QueryBuilder, Row, any::AnyRow};

use super::{
    Store, StoreError,
    dialect::Dialect,
    row::{parsed, parsed_opt, text, text_opt},
    session::{Transaction, retried},
};
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
    /// The agent's own count of its dials of this slot; the higher one of an instance's slot is the newer.
    pub generation: i64,
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

macro_rules! select_holder {
    ($which:literal) => {
        concat!(
            "SELECT c.tunnel_ws_id, c.client_id, c.node_id, c.dialect, c.instance_id, c.slot, c.generation, ",
            "c.token_id, c.agent_version, c.remote_addr, c.connected_at, n.draining ",
            "FROM connections c JOIN nodes n ON n.node_id = c.node_id ",
            $which
        )
    };
}

impl Store {
    /// Makes the rows `put` exist and the rows `remove` not, and notes when clients were last seen; all or nothing.
    ///
    /// Nodes do this at the same time, so each touches rows by their keys only and in the order of the keys.
    pub async fn write_connections(
        &self,
        node_id: NodeId,
        put: &[ConnectionRow],
        remove: &[TunnelId],
        seen: &[(ClientId, i64)],
    ) -> Result<(), StoreError> {
        let (put, remove, seen) = (
            sorted(put, |row| row.tunnel_ws_id),
            sorted(remove, |tunnel| *tunnel),
            sorted(seen, |(client, _)| client.clone()),
        );
        let node = node_id.to_string();
        retried(|| self.try_write_connections(&node, &put, &remove, &seen)).await
    }

    async fn try_write_connections(
        &self,
        node: &str,
        put: &[&ConnectionRow],
        remove: &[&TunnelId],
        seen: &[&(ClientId, i64)],
    ) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        if !put.is_empty() {
            let mut insert = insert(self.dialect, node, put);
            transaction.execute(insert.build().persistent(false)).await?;
        }
        for tunnel in remove {
            delete(&mut transaction, **tunnel).await?;
        }
        for (client, at) in seen {
            see(&mut transaction, client, *at).await?;
        }
        transaction.commit().await
    }

    /// The tunnels that the store believes a node to hold.
    pub async fn tunnels_of_node(&self, node_id: NodeId) -> Result<Vec<TunnelId>, StoreError> {
        let select = || sqlx::query("SELECT tunnel_ws_id FROM connections WHERE node_id = ?").bind(node_id.to_string());
        self.fetch(select, |row| parsed(row, "tunnel_ws_id")).await
    }

    /// Who holds a tunnel of this client, oldest first; only nodes that have a row count.
    pub async fn holders(&self, client_id: &ClientId) -> Result<Vec<Holder>, StoreError> {
        let select = || {
            sqlx::query(select_holder!(
                "WHERE c.client_id = ? ORDER BY c.connected_at, c.tunnel_ws_id"
            ))
            .bind(client_id.as_str())
        };
        self.fetch(select, holder).await
    }

    /// Up to `limit` tunnels, of all clients or of one, in the order of their names, from the first one after `after`.
    pub async fn connections(
        &self,
        client_id: Option<&ClientId>,
        after: &str,
        limit: u32,
    ) -> Result<Vec<Holder>, StoreError> {
        let all = || {
            sqlx::query(select_holder!(
                "WHERE c.tunnel_ws_id > ? ORDER BY c.tunnel_ws_id LIMIT ?"
            ))
            .bind(after)
            .bind(i64::from(limit))
        };
        let Some(client_id) = client_id else {
            return self.fetch(all, holder).await;
        };
        let of_client = || {
            sqlx::query(select_holder!(
                "WHERE c.client_id = ? AND c.tunnel_ws_id > ? ORDER BY c.tunnel_ws_id LIMIT ?"
            ))
            .bind(client_id.as_str())
            .bind(after)
            .bind(i64::from(limit))
        };
        self.fetch(of_client, holder).await
    }

    /// A tunnel by its name.
    pub async fn connection(&self, tunnel: TunnelId) -> Result<Option<Holder>, StoreError> {
        let select = || sqlx::query(select_holder!("WHERE c.tunnel_ws_id = ?")).bind(tunnel.to_string());
        Ok(self.fetch(select, holder).await?.pop())
    }
}

fn sorted<T, K: Ord>(rows: &[T], key: impl Fn(&T) -> K) -> Vec<&T> {
    let mut rows: Vec<&T> = rows.iter().collect();
    rows.sort_by_key(|row| key(row));
    rows
}

/// All rows in one statement: one round trip.
fn insert(dialect: Dialect, node: &str, rows: &[&ConnectionRow]) -> QueryBuilder<Any> {
    let mut insert = QueryBuilder::new(
        "INSERT INTO connections (tunnel_ws_id, client_id, node_id, dialect, instance_id, slot, generation, token_id, \
         agent_version, remote_addr, connected_at) ",
    );
    insert.push_values(rows, |mut values, row| {
        values
            .push_bind(row.tunnel_ws_id.to_string())
            .push_bind(row.client_id.as_str())
            .push_bind(node)
            .push_bind(row.dialect.as_str())
            .push_bind(row.instance_id.map(|id| id.to_string()))
            .push_bind(row.slot.map(i64::from))
            .push_bind(row.generation)
            .push_bind(row.token_id.map(|id| id.to_string()))
            .push_bind(row.agent_version.as_deref())
            .push_bind(row.remote_addr.as_str())
            .push_bind(row.connected_at);
    });
    insert.push(dialect.unless_there());
    insert
}

/// One by one: of many at once MySQL may make a scan of a small table, and lock the rows of other nodes.
async fn delete(transaction: &mut Transaction, tunnel: TunnelId) -> Result<(), StoreError> {
    let delete = sqlx::query("DELETE FROM connections WHERE tunnel_ws_id = ?");
    transaction.execute(delete.bind(tunnel.to_string())).await?;
    Ok(())
}

async fn see(transaction: &mut Transaction, client: &ClientId, at: i64) -> Result<(), StoreError> {
    let update = sqlx::query(
        "UPDATE clients SET last_seen_at = ? WHERE client_id = ? AND (last_seen_at IS NULL OR last_seen_at < ?)",
    );
    transaction
        .execute(update.bind(at).bind(client.as_str()).bind(at))
        .await?;
    Ok(())
}

fn holder(row: &AnyRow) -> Result<Holder, sqlx::Error> {
    let slot: Option<i64> = row.try_get("slot")?;
    Ok(Holder {
        tunnel: ConnectionRow {
            tunnel_ws_id: parsed(row, "tunnel_ws_id")?,
            client_id: parsed(row, "client_id")?,
            dialect: text(row, "dialect")?.to_owned(),
            instance_id: parsed_opt(row, "instance_id")?,
            slot: slot.and_then(|slot| u32::try_from(slot).ok()),
            generation: row.try_get("generation")?,
            token_id: parsed_opt(row, "token_id")?,
            agent_version: text_opt(row, "agent_version")?.map(str::to_owned),
            remote_addr: text(row, "remote_addr")?.to_owned(),
            connected_at: row.try_get("connected_at")?,
        },
        node_id: parsed(row, "node_id")?,
        draining: row.try_get::<i64, _>("draining")? != 0,
    })
}
