//! The database that the stories are told with, and what they put into it.

use std::{sync::Arc, time::Duration};

use adit::{
    cluster::{
        now_ms,
        registry::{ConnectionRow, Node, Registry, Watch},
        store::Store,
    },
    ids::{ClientId, InstanceId, TokenId, TunnelId},
};
use sqlx::{AnyPool, Row};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::servers::MariaDb;

/// Longer than anything should take on any machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A database that nodes share, and that can be away.
pub struct Database {
    pub store: Store,
    /// A way in beside the store, to break things.
    pub raw: AnyPool,
    pub url: String,
    /// Where the file is, if it is one.
    dir: Option<TempDir>,
}

impl Database {
    pub async fn sqlite() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let url = format!("sqlite:{}", dir.path().join("adit.db").display());
        Self::open(url, Some(dir)).await
    }

    pub async fn mysql() -> Self {
        Self::open(MariaDb::shared().database().await, None).await
    }

    pub async fn open(url: String, dir: Option<TempDir>) -> Self {
        let store = Store::open(&url).await.expect("a store");
        let raw = AnyPool::connect(&url).await.expect("a way in");
        Self { store, raw, url, dir }
    }

    pub fn node(&self) -> Arc<Registry> {
        Arc::new(Registry::new(self.store.clone(), Node::new("127.0.0.1:9090")))
    }

    /// A node that asks the database every time, and so notices when it is away.
    pub fn forgetful_node(&self) -> Arc<Registry> {
        Arc::new(Registry::with_freshness(
            self.store.clone(),
            Node::new("127.0.0.1:9090"),
            Duration::ZERO,
        ))
    }

    pub async fn go_away(&self) {
        for table in ["nodes", "connections", "clients"] {
            self.run(format!("ALTER TABLE {table} RENAME TO away_{table}")).await;
        }
    }

    pub async fn return_(&self) {
        for table in ["nodes", "connections", "clients"] {
            self.run(format!("ALTER TABLE away_{table} RENAME TO {table}")).await;
        }
    }

    pub async fn run(&self, statement: String) {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
            .execute(&self.raw)
            .await
            .expect("executed");
    }

    /// Nothing is there yet but the file or the database itself.
    pub async fn begin_anew(&self) {
        for table in TABLES.iter().chain(&["_sqlx_migrations"]) {
            self.run(format!("DROP TABLE {table}")).await;
        }
    }

    /// Everything that is stored, in whatever form.
    pub async fn contents(&self) -> Vec<u8> {
        let mut contents = Vec::new();
        if let Some(dir) = &self.dir {
            for file in std::fs::read_dir(dir.path()).expect("files") {
                contents.extend(std::fs::read(file.expect("a file").path()).expect("read"));
            }
            return contents;
        }
        for table in TABLES {
            let select = sqlx::AssertSqlSafe(format!("SELECT * FROM {table}"));
            for row in sqlx::query(select).fetch_all(&self.raw).await.expect("rows") {
                for column in 0..row.len() {
                    contents.extend(bytes(&row, column));
                }
            }
        }
        contents
    }

    pub async fn tunnels(&self, client: &str) -> Vec<TunnelId> {
        let holders = self.store.holders(&id(client)).await.expect("holders");
        holders.into_iter().map(|holder| holder.tunnel.tunnel_ws_id).collect()
    }
}

pub const TABLES: [&str; 7] = [
    "nodes",
    "connections",
    "clients",
    "client_access_tokens",
    "signature_tokens",
    "magic_tokens",
    "settings",
];

/// A value as it is stored; numbers hold no secrets.
fn bytes(row: &sqlx::any::AnyRow, column: usize) -> Vec<u8> {
    let text = row
        .try_get::<Option<String>, _>(column)
        .map(|text| text.map(String::into_bytes));
    let value = text.or_else(|_| row.try_get::<Option<Vec<u8>>, _>(column));
    value.unwrap_or_default().unwrap_or_default()
}

pub fn id(name: &str) -> ClientId {
    name.parse().expect("a client id")
}

pub fn tunnel(client: &str) -> ConnectionRow {
    ConnectionRow {
        tunnel_ws_id: TunnelId::new(),
        client_id: id(client),
        dialect: "adit".into(),
        instance_id: Some(InstanceId::new()),
        slot: Some(1),
        generation: 3,
        token_id: Some(TokenId::new()),
        agent_version: Some("0.1.0".into()),
        remote_addr: "192.0.2.1:1234".into(),
        connected_at: now_ms(),
    }
}

/// A turn, again until the database has taken it, as the node itself does it: SQLite's writers may be too many for it.
pub async fn turn(node: &Registry, watch: &mut Watch, now: Instant) {
    let written = async { while node.turn(watch, now).await.is_err() {} };
    tokio::time::timeout(PATIENCE, written).await.expect("written");
}
