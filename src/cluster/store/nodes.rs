//! `nodes`: one row a relay process.

use sqlx::Row;

use super::{Store, StoreError, dialect, parsed};
use crate::ids::NodeId;

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
        sqlx::query(dialect::UPSERT_NODE)
            .bind(node.node_id.to_string())
            .bind(&node.address)
            .bind(&node.version)
            .bind(node.started_at)
            .bind(node.heartbeat_at)
            .bind(i64::from(node.draining))
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Says that the node lives. `false`: its row is gone, because another node took it for dead.
    pub async fn heartbeat(&self, node_id: NodeId, now: i64, draining: bool) -> Result<bool, StoreError> {
        let updated = sqlx::query("UPDATE nodes SET heartbeat_at = ?, draining = ? WHERE node_id = ?")
            .bind(now)
            .bind(i64::from(draining))
            .bind(node_id.to_string())
            .execute(&self.pool)
            .await?;
        Ok(updated.rows_affected() > 0)
    }

    /// Every node that has a row.
    pub async fn nodes(&self) -> Result<Vec<NodeRow>, StoreError> {
        let nodes = sqlx::query("SELECT node_id, address, version, started_at, heartbeat_at, draining FROM nodes")
            .try_map(|row| {
                Ok(NodeRow {
                    node_id: parsed(&row, "node_id")?,
                    address: row.try_get("address")?,
                    version: row.try_get("version")?,
                    started_at: row.try_get("started_at")?,
                    heartbeat_at: row.try_get("heartbeat_at")?,
                    draining: row.try_get::<i64, _>("draining")? != 0,
                })
            })
            .fetch_all(&self.pool)
            .await?;
        Ok(nodes)
    }

    /// Removes a dead node and its tunnels, unless its heartbeat has moved since it was read. Its clients were seen as
    /// late as the node was. `false`: it lives.
    pub async fn reap_node(&self, node_id: NodeId, heartbeat_at: i64) -> Result<bool, StoreError> {
        let node = node_id.to_string();
        let mut transaction = self.begin().await?;
        let removed = sqlx::query("DELETE FROM nodes WHERE node_id = ? AND heartbeat_at = ?")
            .bind(&node)
            .bind(heartbeat_at)
            .execute(&mut *transaction)
            .await?;
        if removed.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query(
            "UPDATE clients SET last_seen_at = ? WHERE (last_seen_at IS NULL OR last_seen_at < ?) \
             AND client_id IN (SELECT client_id FROM connections WHERE node_id = ?)",
        )
        .bind(heartbeat_at)
        .bind(heartbeat_at)
        .bind(&node)
        .execute(&mut *transaction)
        .await?;
        sqlx::query("DELETE FROM connections WHERE node_id = ?")
            .bind(&node)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Removes tunnels whose node has no row: a node that was reaped as it wrote its last one.
    pub async fn remove_orphans(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query("DELETE FROM connections WHERE node_id NOT IN (SELECT node_id FROM nodes)")
            .execute(&self.pool)
            .await?;
        Ok(removed.rows_affected())
    }

    /// A clean stop: the node takes its own rows with it.
    pub async fn remove_node(&self, node_id: NodeId) -> Result<(), StoreError> {
        let node = node_id.to_string();
        let mut transaction = self.begin().await?;
        sqlx::query("DELETE FROM connections WHERE node_id = ?")
            .bind(&node)
            .execute(&mut *transaction)
            .await?;
        sqlx::query("DELETE FROM nodes WHERE node_id = ?")
            .bind(&node)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(())
    }
}
