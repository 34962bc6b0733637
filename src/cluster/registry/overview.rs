//! What operators look at: all nodes, and the tunnels of all of them, as the database has them.

use super::{Holder, NodeRow, Registry, RegistryError};
use crate::ids::{ClientId, TunnelId};

impl Registry {
    /// Every node that has a row, oldest first. A node that died without a word is among them until it is reaped.
    pub async fn nodes(&self) -> Result<Vec<NodeRow>, RegistryError> {
        let mut nodes = self.store.nodes().await?;
        nodes.sort_by_key(|node| node.node_id);
        Ok(nodes)
    }

    /// Up to `limit` tunnels of all nodes, of all clients or of one, in the order of their names, from the first one after
    /// `after`.
    pub async fn list_tunnels(
        &self,
        client_id: Option<&ClientId>,
        after: &str,
        limit: u32,
    ) -> Result<Vec<Holder>, RegistryError> {
        Ok(self.store.connections(client_id, after, limit).await?)
    }

    /// A tunnel by its name, if it is recorded.
    pub async fn find_tunnel(&self, tunnel_ws_id: TunnelId) -> Result<Option<Holder>, RegistryError> {
        Ok(self.store.connection(tunnel_ws_id).await?)
    }
}
