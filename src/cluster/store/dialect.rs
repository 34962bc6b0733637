//! The statements that SQLite and MySQL spell differently: the upserts.

/// A node's row, made or renewed.
pub(super) const UPSERT_NODE: &str = "INSERT INTO nodes (node_id, address, version, started_at, heartbeat_at, draining) \
     VALUES (?, ?, ?, ?, ?, ?) \
     ON CONFLICT (node_id) DO UPDATE SET heartbeat_at = excluded.heartbeat_at, draining = excluded.draining";

/// A tunnel's row. It never changes, so writing it twice (a retry whose first try did arrive) is the same as once.
pub(super) const INSERT_CONNECTION_ONCE: &str = "INSERT INTO connections (tunnel_ws_id, client_id, node_id, dialect, \
     instance_id, slot, token_id, agent_version, remote_addr, connected_at) \
     VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
     ON CONFLICT (tunnel_ws_id) DO NOTHING";
