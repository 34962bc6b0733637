//! What SQLite and MySQL spell differently: the upserts.

use super::StoreError;

/// Which of the two is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    /// Also MariaDB, and whatever else speaks it: so no foreign keys, no `AS new`, no RETURNING, no SKIP LOCKED.
    MySql,
}

impl Dialect {
    /// The one that a database URL asks for.
    pub fn of(url: &str) -> Result<Self, StoreError> {
        match url.split_once(':').map_or("", |(scheme, _)| scheme) {
            "sqlite" => Ok(Self::Sqlite),
            "mysql" | "mariadb" => Ok(Self::MySql),
            _ => Err(StoreError::Url(
                "a database URL is `sqlite:<path>` or `mysql://user:password@host:3306/database`",
            )),
        }
    }

    /// A node's row, made or renewed.
    pub fn upsert_node(self) -> &'static str {
        match self {
            Self::Sqlite => {
                "INSERT INTO nodes (node_id, address, version, started_at, heartbeat_at, draining) \
                 VALUES (?, ?, ?, ?, ?, ?) \
                 ON CONFLICT (node_id) DO UPDATE SET heartbeat_at = excluded.heartbeat_at, draining = excluded.draining"
            }
            Self::MySql => {
                "INSERT INTO nodes (node_id, address, version, started_at, heartbeat_at, draining) \
                 VALUES (?, ?, ?, ?, ?, ?) \
                 ON DUPLICATE KEY UPDATE heartbeat_at = VALUES(heartbeat_at), draining = VALUES(draining)"
            }
        }
    }

    /// After the rows of an INSERT into `connections`. A row never changes, so writing it twice (a retry whose first try
    /// did arrive) is the same as once. Not MySQL's INSERT IGNORE, which ignores more than that.
    pub fn unless_there(self) -> &'static str {
        match self {
            Self::Sqlite => " ON CONFLICT (tunnel_ws_id) DO NOTHING",
            Self::MySql => " ON DUPLICATE KEY UPDATE tunnel_ws_id = VALUES(tunnel_ws_id)",
        }
    }
}
