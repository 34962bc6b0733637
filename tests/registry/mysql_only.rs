//! Stories that only a server tells: it is killed, silent, full, refuses, or gives way to another.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use adit::cluster::{
    registry::{ConnectionRow, NewAuth, Registry, Watch},
    store::{Store, StoreError},
};
use base64::Engine;
use sqlx::{Connection, MySqlConnection};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::{
    database::{Database, PATIENCE, id, tunnel, turn},
    servers::MariaDb,
};

/// For a database that is known to be silent.
const SHORT: Duration = Duration::from_millis(200);

/// A database of a server of its own, and a node that holds a tunnel which is recorded.
async fn on(server: &MariaDb) -> (Database, Arc<Registry>, Watch, ConnectionRow) {
    let database = Database::open(server.database().await, None).await;
    let (node, mut watch, held) = (database.node(), Watch::default(), tunnel("home"));
    node.record(held.clone());
    node.turn(&mut watch, Instant::now()).await.expect("written");
    (database, node, watch, held)
}

#[tokio::test]
async fn tunnels_that_open_while_mysql_is_killed_and_restarted_are_recorded() {
    let mut server = MariaDb::start();
    let (database, node, mut watch, first) = on(&server).await;
    let (before, during, after) = (tunnel("home"), tunnel("home"), tunnel("home"));
    node.record(before.clone());
    server.kill();
    node.turn(&mut watch, Instant::now()).await.expect_err("away");
    node.record(during.clone());
    node.forget(first.tunnel_ws_id);
    node.turn(&mut watch, Instant::now()).await.expect_err("still away");

    server.restart();
    node.record(after.clone());
    turn(&node, &mut watch, Instant::now()).await;
    let held = [before, during, after].map(|row| row.tunnel_ws_id);
    assert_eq!(
        BTreeSet::from_iter(database.tunnels("home").await),
        BTreeSet::from(held)
    );
}

#[tokio::test]
async fn a_mysql_that_says_nothing_is_an_error_and_not_a_wait() {
    let server = MariaDb::start();
    let (database, node, mut watch, held) = on(&server).await;
    let impatient = database.store.clone().with_patience(SHORT);
    server.stop_process();
    for _ in 0..10 {
        let answer = impatient.client(&id("home")).await;
        assert!(matches!(answer, Err(StoreError::Slow)), "{answer:?}");
    }
    let next = tunnel("home");
    let written = impatient.write_connections(node.node_id(), std::slice::from_ref(&next), &[], &[]);
    assert!(matches!(written.await, Err(StoreError::Slow)));

    server.continue_process();
    node.record(next.clone());
    turn(&node, &mut watch, Instant::now()).await;
    let held = [held, next].map(|row| row.tunnel_ws_id);
    assert_eq!(
        BTreeSet::from_iter(database.tunnels("home").await),
        BTreeSet::from(held)
    );
}

#[tokio::test]
async fn a_mysql_without_a_free_connection_is_an_error_and_tunnels_are_recorded_later() {
    let server = MariaDb::with(&["--max-connections=10"]);
    let (database, node, mut watch, first) = on(&server).await;
    database.raw.close().await;
    let mut hogs = hog(&server).await;
    lose_connections(&mut hogs[0], &database).await;
    hogs.extend(hog(&server).await);
    Store::open(&database.url).await.expect_err("no connection is left");
    let next = tunnel("home");
    node.record(next.clone());
    node.turn(&mut watch, Instant::now())
        .await
        .expect_err("no connection is left");

    drop(hogs);
    turn(&node, &mut watch, Instant::now()).await;
    let held = [first, next].map(|row| row.tunnel_ws_id);
    assert_eq!(
        BTreeSet::from_iter(database.tunnels("home").await),
        BTreeSet::from(held)
    );
}

/// All the connections that the server will give.
async fn hog(server: &MariaDb) -> Vec<MySqlConnection> {
    let (url, mut hogs) = (server.url(""), Vec::new());
    while let Ok(hog) = MySqlConnection::connect(&url).await {
        hogs.push(hog);
    }
    hogs
}

/// The server closes the connections to this database.
async fn lose_connections(admin: &mut MySqlConnection, database: &Database) {
    let name = database.url.rsplit('/').next().expect("a name");
    let select = "SELECT CAST(id AS SIGNED) FROM information_schema.processlist WHERE db = ?";
    let lose = async {
        loop {
            let ids: Vec<i64> = sqlx::query_scalar(select)
                .bind(name)
                .fetch_all(&mut *admin)
                .await
                .expect("numbers");
            for id in &ids {
                // It may have gone by itself.
                let kill = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("KILL {id}")));
                let _ = kill.execute(&mut *admin).await;
            }
            if ids.is_empty() {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, lose).await.expect("gone");
}

#[tokio::test]
async fn what_mysql_rolls_back_in_favour_of_another_is_done_again() {
    let server = MariaDb::start();
    let (database, node, ..) = on(&server).await;
    for client in ["a", "b"] {
        node.create_client(&id(client), NewAuth::Token).await.expect("created");
    }
    let lock = |client: &str| {
        let update = format!("UPDATE clients SET auth = 'public' WHERE client_id = '{client}'");
        sqlx::raw_sql(sqlx::AssertSqlSafe(update))
    };
    // The other has changed more, so it is not the one that MySQL gives up.
    let mut other = database.raw.begin().await.expect("begun");
    for name in 0..100 {
        let insert = format!("INSERT INTO settings (name, value) VALUES ('{name}', '')");
        let insert = sqlx::raw_sql(sqlx::AssertSqlSafe(insert));
        insert.execute(&mut *other).await.expect("inserted");
    }
    lock("b").execute(&mut *other).await.expect("locked");

    let store = database.store.clone();
    let (row, node_id) = (tunnel("a"), node.node_id());
    let written = row.clone();
    let writing = tokio::spawn(async move {
        let seen = [(id("a"), 5), (id("b"), 5)];
        store.write_connections(node_id, &[row], &[], &seen).await
    });
    waits_for_a_lock(&database).await;
    lock("a").execute(&mut *other).await.expect("the other gives way");
    other.commit().await.expect("committed");

    writing.await.expect("no panic").expect("written");
    assert_eq!(database.tunnels("a").await, [written.tunnel_ws_id]);
    for client in ["a", "b"] {
        let client = database
            .store
            .client(&id(client))
            .await
            .expect("answered")
            .expect("known");
        assert_eq!(client.last_seen_at_ms, Some(5));
    }
}

async fn waits_for_a_lock(database: &Database) {
    let waits = "SELECT variable_value FROM information_schema.global_status \
                 WHERE variable_name = 'innodb_row_lock_current_waits'";
    let look = async || {
        let waits: String = sqlx::query_scalar(waits)
            .fetch_one(&database.raw)
            .await
            .expect("a number");
        waits != "0"
    };
    let found = async { while !look().await {} };
    tokio::time::timeout(PATIENCE, found).await.expect("it waits");
}

#[tokio::test]
async fn a_migration_that_died_midway_in_mysql_is_done_again() {
    let database = Database::mysql().await;
    database.run("DROP TABLE settings".to_owned()).await;
    database
        .run("UPDATE _sqlx_migrations SET success = FALSE".to_owned())
        .await;
    let store = Store::open(&database.url).await.expect("opened");
    store
        .insert_setting("greeting", "hello")
        .await
        .expect("its table is there");
}

#[tokio::test]
async fn a_wrong_password_for_mysql_is_said_and_not_repeated() {
    let server = MariaDb::shared();
    let url = server.url("mysql").replace("root@", "adit:hunter2@");
    let error = Store::open(&url).await.expect_err("refused");
    let text = format!("{error} {error:?}");
    assert!(text.contains("Access denied") && !text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn mysql_is_reached_by_tls_and_its_certificate_is_looked_at() {
    let (dir, server) = with_tls();
    let url = server.database().await;
    let (own, other) = (dir.path().join("cert.pem"), dir.path().join("other.pem"));
    let verify = |ca: &std::path::Path| format!("{url}?ssl-mode=VERIFY_CA&ssl-ca={}", ca.display());
    for url in [format!("{url}?ssl-mode=REQUIRED"), verify(&own)] {
        let store = Store::open(&url).await.expect("opened");
        store.setting("greeting").await.expect("answered");
    }
    Store::open(&verify(&other)).await.expect_err("another's certificate");
    let plain = MariaDb::shared().database().await;
    Store::open(&format!("{plain}?ssl-mode=REQUIRED"))
        .await
        .expect_err("without TLS");
}

/// A server with a certificate, which is in `cert.pem`; `other.pem` is one that it does not have.
fn with_tls() -> (TempDir, MariaDb) {
    let dir = tempfile::tempdir().expect("a directory");
    let certified = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let (own, other) = (certified(), certified());
    let write = |name: &str, text: String| {
        let file = dir.path().join(name);
        std::fs::write(&file, text).expect("written");
        file.display().to_string()
    };
    let cert = write("cert.pem", pem("CERTIFICATE", own.cert.der()));
    let key = write("key.pem", pem("PRIVATE KEY", &own.signing_key.serialize_der()));
    write("other.pem", pem("CERTIFICATE", other.cert.der()));
    let server = MariaDb::with(&[&format!("--ssl-cert={cert}"), &format!("--ssl-key={key}")]);
    (dir, server)
}

/// RFC 7468, with one long line, which everybody reads.
fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}
