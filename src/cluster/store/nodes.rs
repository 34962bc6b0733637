//! `nodes`: one row a relay process.

use sqlx::{Any, QueryBuilder, Row, any::AnyRow};

use super::{
    Store, StoreError,
    row::{parsed, text},
    session::{Transaction, retried},
};
use crate::ids::{ClientId, NodeId};

/// Clients a statement, when their node died: far below what either database takes as parameters.
const CLIENTS_AT_ONCE: usize = 512;

/// A node as the others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRow {
    /// New at each start.
    pub node_id: NodeId,
    /// Where its admin listener is reached, for people.
    pub address: String,
    /// The version of adit it runs.
    pub version: String,
    /// When it started.
    pub started_at: i64,
    /// What its clock said when it was last known to be alive.
    pub heartbeat_at: i64,
    /// Whether it is leaving: no new tunnels there.
    pub draining: bool,
}

impl Store {
    /// Makes or renews a node's row.
    pub async fn put_node(&self, node: &NodeRow) -> Result<(), StoreError> {
        let upsert = || {
            sqlx::query(self.dialect.upsert_node())
                .bind(node.node_id.to_string())
                .bind(&node.address)
                .bind(&node.version)
                .bind(node.started_at)
                .bind(node.heartbeat_at)
                .bind(i64::from(node.draining))
        };
        self.execute(upsert).await?;
        Ok(())
    }

    /// Says that the node lives. `false`: its row is gone, because another node took it for dead.
    pub async fn heartbeat(&self, node_id: NodeId, now: i64, draining: bool) -> Result<bool, StoreError> {
        let update = || {
            sqlx::query("UPDATE nodes SET heartbeat_at = ?, draining = ? WHERE node_id = ?")
                .bind(now)
                .bind(i64::from(draining))
                .bind(node_id.to_string())
        };
        Ok(self.execute(update).await? > 0)
    }

    /// Every node that has a row.
    pub async fn nodes(&self) -> Result<Vec<NodeRow>, StoreError> {
        let select = || sqlx::query("SELECT node_id, address, version, started_at, heartbeat_at, draining FROM nodes");
        self.fetch(select, node).await
    }

    /// Removes a dead node and its tunnels, unless its heartbeat has moved since it was read. Its clients were seen as
    /// late as the node was. `false`: it lives.
    pub async fn reap_node(&self, node_id: NodeId, heartbeat_at: i64) -> Result<bool, StoreError> {
        let node = node_id.to_string();
        retried(|| self.try_reap_node(&node, heartbeat_at)).await
    }

    async fn try_reap_node(&self, node: &str, heartbeat_at: i64) -> Result<bool, StoreError> {
        let mut transaction = self.begin().await?;
        // First, and held to the end: a node that is not dead waits here with its heartbeat, and then records all.
        let delete = sqlx::query("DELETE FROM nodes WHERE node_id = ? AND heartbeat_at = ?");
        if transaction.execute(delete.bind(node).bind(heartbeat_at)).await? == 0 {
            return Ok(false);
        }
        let clients = clients_of(&mut transaction, node).await?;
        delete_tunnels(&mut transaction, node).await?;
        for clients in clients.chunks(CLIENTS_AT_ONCE) {
            see(&mut transaction, clients, heartbeat_at).await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    /// Removes tunnels whose node has no row: a node that was reaped as it wrote its last one.
    pub async fn remove_orphans(&self) -> Result<u64, StoreError> {
        // Looks first, which locks nothing: every node does this often, and hardly ever finds any.
        let select =
            || sqlx::query("SELECT DISTINCT node_id FROM connections WHERE node_id NOT IN (SELECT node_id FROM nodes)");
        let mut removed = 0;
        for node in self.fetch(select, |row| Ok(text(row, "node_id")?.to_owned())).await? {
            removed += self.delete_orphans(&node).await?;
        }
        Ok(removed)
    }

    /// Asks again whether the node has a row: it may have come back since.
    async fn delete_orphans(&self, node: &str) -> Result<u64, StoreError> {
        let delete = || {
            sqlx::query(
                "DELETE FROM connections \
                 WHERE node_id = ? AND NOT EXISTS (SELECT 1 FROM nodes n WHERE n.node_id = ?)",
            )
            .bind(node)
            .bind(node)
        };
        self.execute(delete).await
    }

    /// A clean stop: the node takes its own rows with it.
    pub async fn remove_node(&self, node_id: NodeId) -> Result<(), StoreError> {
        let node = node_id.to_string();
        retried(|| self.try_remove_node(&node)).await
    }

    async fn try_remove_node(&self, node: &str) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let delete = sqlx::query("DELETE FROM nodes WHERE node_id = ?");
        transaction.execute(delete.bind(node)).await?;
        delete_tunnels(&mut transaction, node).await?;
        transaction.commit().await
    }
}

fn node(row: &AnyRow) -> Result<NodeRow, sqlx::Error> {
    Ok(NodeRow {
        node_id: parsed(row, "node_id")?,
        address: text(row, "address")?.to_owned(),
        version: text(row, "version")?.to_owned(),
        started_at: row.try_get("started_at")?,
        heartbeat_at: row.try_get("heartbeat_at")?,
        draining: row.try_get::<i64, _>("draining")? != 0,
    })
}

/// In order, so that two nodes never wait for each other's.
async fn clients_of(transaction: &mut Transaction, node: &str) -> Result<Vec<ClientId>, StoreError> {
    let select = sqlx::query("SELECT DISTINCT client_id FROM connections WHERE node_id = ? ORDER BY client_id");
    transaction
        .fetch(select.bind(node), |row| parsed(row, "client_id"))
        .await
}

async fn delete_tunnels(transaction: &mut Transaction, node: &str) -> Result<(), StoreError> {
    let delete = sqlx::query("DELETE FROM connections WHERE node_id = ?");
    transaction.execute(delete.bind(node)).await?;
    Ok(())
}

async fn see(transaction: &mut Transaction, clients: &[ClientId], at: i64) -> Result<(), StoreError> {
    let mut update = QueryBuilder::<Any>::new("UPDATE clients SET last_seen_at = ");
    update.push_bind(at);
    update.push(" WHERE (last_seen_at IS NULL OR last_seen_at < ");
    update.push_bind(at);
    update.push(") AND client_id IN (");
    let mut names = update.separated(", ");
    for client in clients {
        names.push_bind(client.as_str());
    }
    update.push(")");
    transaction.execute(update.build().persistent(false)).await?;
    Ok(())
}
