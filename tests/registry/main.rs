//! Stories of the registry and of who is let in: what operators, agents and downstreams see, also while the database
//! is away or a node is dead. Each is told twice: with a SQLite file and with MySQL (MariaDB, here).

mod database;
mod mysql_only;
#[path = "../harness/servers.rs"]
mod servers;

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use adit::{
    cluster::{
        registry::{NewAuth, Registry, RegistryAway, RegistryError, RegistryEvent, Watch},
        store::{NodeRow, SchemaVersion, Store},
    },
    error::Cause,
    ids::{NodeId, TunnelId},
    relay::auth::{Auth, Consumed},
    secret::Secret,
};
use axum::response::IntoResponse;
use database::{Database, id, tunnel, turn};
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use http_body_util::BodyExt;
use tokio::{sync::oneshot, time::Instant};

const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn bearer(token: &str) -> HeaderMap {
    let value = HeaderValue::try_from(format!("Bearer {token}")).expect("a header value");
    HeaderMap::from_iter([(AUTHORIZATION, value)])
}

async fn body_without_id(cause: Cause) -> String {
    let body = cause
        .into_response()
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    let mut problem: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
    problem
        .as_object_mut()
        .expect("a problem")
        .remove("request_id")
        .expect("an id");
    problem.to_string()
}

async fn an_access_token_works_until_it_is_revoked_and_not_a_moment_longer(database: Database) {
    let registry = database.node();
    let auth = Auth::new(registry.clone());
    let mut events = registry.events();
    let (first, secret) = registry
        .create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created");
    let (second, another) = registry.create_token(&id("home"), Some("nas")).await.expect("made");

    assert_eq!(auth.agent(&id("home"), HERE, &bearer(secret.expose())).await, Ok(first));
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(another.expose())).await,
        Ok(second)
    );
    registry.revoke_token(&id("home"), first).await.expect("revoked");
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(secret.expose())).await,
        Err(Cause::Unauthorized)
    );
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(another.expose())).await,
        Ok(second)
    );
    assert_eq!(
        events.recv().await,
        Ok(RegistryEvent::TokenRevoked {
            client_id: id("home"),
            token_id: first
        })
    );
}

async fn a_deleted_client_is_unknown_and_its_name_comes_back_without_its_credentials(database: Database) {
    let registry = database.node();
    let auth = Auth::new(registry.clone());
    let (_, secret) = registry
        .create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created");
    let signature = registry.create_signature(&id("home")).await.expect("signed");
    let query = format!("signature={}", signature.expose());
    let get = async || {
        auth.authorize_downstream(&id("home"), HERE, &HeaderMap::new(), Some(&query))
            .await
    };
    assert_eq!(get().await.expect("let in").1, Consumed::Signature);

    let mut events = registry.events();
    registry.delete_client(&id("home")).await.expect("deleted");
    assert_eq!(
        events.recv().await,
        Ok(RegistryEvent::ClientDeleted { client_id: id("home") })
    );
    let nobody = auth
        .authorize_downstream(&id("home"), HERE, &HeaderMap::new(), None)
        .await;
    assert_eq!(nobody.err(), Some(Cause::UnknownClient));

    registry
        .create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created again");
    assert_eq!(get().await.err(), Some(Cause::Unauthorized));
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(secret.expose())).await,
        Err(Cause::Unauthorized)
    );
}

async fn whatever_is_wrong_with_a_token_the_answer_is_the_same(database: Database) {
    let registry = database.node();
    let auth = Auth::new(registry.clone());
    let (_, home) = registry
        .create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created");
    let (_, other) = registry
        .create_client(&id("other"), NewAuth::Token)
        .await
        .expect("created");
    let (unknown, wrong, truncated) = ("nobody", "adit_wrong", &home.expose()[..47]);

    let mut bodies = Vec::new();
    for (client, token) in [
        (unknown, home.expose()),
        ("home", wrong),
        ("home", truncated),
        ("home", other.expose()),
        ("home", ""),
    ] {
        let agent = auth
            .agent(&id(client), HERE, &bearer(token))
            .await
            .expect_err("refused");
        let downstream = auth
            .authorize_downstream(&id(client), HERE, &bearer(token), None)
            .await
            .expect_err("refused");
        bodies.extend([body_without_id(agent).await, body_without_id(downstream).await]);
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "{bodies:#?}");
    assert!(!bodies[0].contains(wrong) && !bodies[0].contains("home"));
}

async fn an_address_that_keeps_guessing_is_told_to_wait_but_the_right_token_still_works(database: Database) {
    let registry = database.node();
    let auth = Auth::new(registry.clone());
    let (_, secret) = registry
        .create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created");
    for _ in 0..20 {
        assert_eq!(
            auth.agent(&id("home"), HERE, &bearer("guess")).await,
            Err(Cause::Unauthorized)
        );
    }
    let blocked = auth
        .authorize_downstream(&id("home"), HERE, &bearer("guess"), None)
        .await
        .expect_err("refused");
    assert_eq!(
        blocked,
        Cause::TooMany("too many failed attempts from this address", 60)
    );
    assert!(auth.agent(&id("home"), HERE, &bearer(secret.expose())).await.is_ok());
    let elsewhere = "192.0.2.1".parse().expect("an address");
    assert_eq!(
        auth.agent(&id("home"), elsewhere, &bearer("guess")).await,
        Err(Cause::Unauthorized)
    );
    // Showing nothing is not guessing.
    assert_eq!(
        auth.agent(&id("home"), HERE, &HeaderMap::new()).await,
        Err(Cause::Unauthorized)
    );
}

async fn a_client_asks_its_downstreams_for_what_its_operator_chose(database: Database) {
    let registry = database.node();
    let auth = Auth::new(registry.clone());
    let password = Secret::from("hunter2".to_owned());
    let basic = NewAuth::Basic {
        user: "ann".into(),
        password,
    };
    registry.create_client(&id("home"), basic).await.expect("created");
    let get = async |headers: &HeaderMap| {
        auth.authorize_downstream(&id("home"), HERE, headers, None)
            .await
            .map(|(_, consumed)| consumed)
    };
    let basic = |value: &'static str| HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static(value))]);

    assert_eq!(get(&HeaderMap::new()).await, Err(Cause::UnauthorizedBasic));
    assert_eq!(get(&basic("Basic YW5uOmh1bnRlcjI=")).await, Ok(Consumed::Authorization));
    assert_eq!(
        get(&basic("Basic YW5uOmh1bnRlcjM=")).await,
        Err(Cause::UnauthorizedBasic)
    );
    assert_eq!(
        get(&basic("Basic Ym9iOmh1bnRlcjI=")).await,
        Err(Cause::UnauthorizedBasic)
    );

    let mut events = registry.events();
    registry
        .update_client(&id("home"), NewAuth::Public)
        .await
        .expect("changed");
    assert_eq!(
        events.recv().await,
        Ok(RegistryEvent::ClientChanged { client_id: id("home") })
    );
    assert_eq!(get(&HeaderMap::new()).await, Ok(Consumed::Nothing));
}

async fn a_slow_disconnect_does_not_erase_the_reconnect_that_overtook_it(database: Database) {
    let (old, new) = (database.node(), database.node());
    let (mut old_watch, mut new_watch) = (Watch::default(), Watch::default());
    let (before, after) = (tunnel("home"), tunnel("home"));
    old.record(before.clone());
    old.turn(&mut old_watch, Instant::now()).await.expect("written");
    new.record(after.clone());
    new.turn(&mut new_watch, Instant::now()).await.expect("written");
    assert_eq!(
        database.tunnels("home").await,
        [before.tunnel_ws_id, after.tunnel_ws_id]
    );

    old.forget(before.tunnel_ws_id);
    old.turn(&mut old_watch, Instant::now()).await.expect("written");
    old.forget(after.tunnel_ws_id);
    old.turn(&mut old_watch, Instant::now())
        .await
        .expect("nothing to write");
    let holders = database.store.holders(&id("home")).await.expect("holders");
    assert_eq!(
        (&holders[0].tunnel, holders[0].node_id, holders.len()),
        (&after, new.node_id(), 1)
    );
}

async fn a_dead_node_loses_its_tunnels_and_nobody_else_does(database: Database) {
    let living = database.node();
    living
        .create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created");
    let dead = NodeRow {
        node_id: NodeId::new(),
        address: "gone".into(),
        version: "0".into(),
        started_at: 1,
        heartbeat_at: 2,
        draining: false,
    };
    let (lost, kept) = (tunnel("home"), tunnel("home"));
    database.store.put_node(&dead).await.expect("written");
    database
        .store
        .write_connections(dead.node_id, &[lost], &[], &[])
        .await
        .expect("written");
    living.record(kept.clone());

    let (mut watch, start) = (Watch::default(), Instant::now());
    for seconds in [0, 5, 10, 15] {
        living
            .turn(&mut watch, start + Duration::from_secs(seconds))
            .await
            .expect("a turn");
        assert_eq!(database.tunnels("home").await.len(), 2, "after {seconds} s");
    }
    living
        .turn(&mut watch, start + Duration::from_secs(20))
        .await
        .expect("a turn");
    assert_eq!(database.tunnels("home").await, [kept.tunnel_ws_id]);
    let nodes = database.store.nodes().await.expect("nodes");
    assert_eq!(
        nodes.iter().map(|node| node.node_id).collect::<Vec<_>>(),
        [living.node_id()]
    );
}

async fn a_node_that_was_taken_for_dead_and_is_not_records_its_tunnels_again(database: Database) {
    let zombie = database.node();
    let (mut watch, start) = (Watch::default(), Instant::now());
    let (kept, left) = (tunnel("home"), tunnel("home"));
    zombie.record(kept.clone());
    zombie.record(left.clone());
    zombie.turn(&mut watch, start).await.expect("written");
    let row = database.store.nodes().await.expect("nodes").remove(0);
    assert!(
        database
            .store
            .reap_node(row.node_id, row.heartbeat_at)
            .await
            .expect("reaped")
    );
    assert_eq!(database.tunnels("home").await, []);

    zombie.forget(left.tunnel_ws_id);
    zombie
        .turn(&mut watch, start + Duration::from_secs(30))
        .await
        .expect("back");
    assert_eq!(database.tunnels("home").await, [kept.tunnel_ws_id]);
}

async fn while_the_database_is_away_known_clients_go_on_and_tunnels_are_recorded_later(database: Database) {
    let registry = database.forgetful_node();
    let auth = Auth::new(registry.clone());
    let (token_id, secret) = registry
        .create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created");
    let mut watch = Watch::default();
    let (leaving, arriving, passing) = (tunnel("home"), tunnel("home"), tunnel("home"));
    registry.record(leaving.clone());
    registry.turn(&mut watch, Instant::now()).await.expect("written");
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(secret.expose())).await,
        Ok(token_id)
    );

    database.go_away().await;
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(secret.expose())).await,
        Ok(token_id)
    );
    assert_eq!(registry.client(&id("never-seen")).await, Err(RegistryAway));
    registry.create_token(&id("home"), None).await.expect_err("away");
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(secret.expose())).await,
        Ok(token_id)
    );
    registry.forget(leaving.tunnel_ws_id);
    registry.record(arriving.clone());
    registry.record(passing.clone());
    registry.turn(&mut watch, Instant::now()).await.expect_err("away");
    registry.forget(passing.tunnel_ws_id);
    registry.turn(&mut watch, Instant::now()).await.expect_err("still away");

    database.return_().await;
    registry.turn(&mut watch, Instant::now()).await.expect("back");
    assert_eq!(database.tunnels("home").await, [arriving.tunnel_ws_id]);
    let client = registry.client(&id("home")).await.expect("answered").expect("known");
    assert!(client.last_seen_at_ms.is_some());
}

async fn a_revoked_token_stays_revoked_when_the_database_goes_away(database: Database) {
    let registry = database.forgetful_node();
    let auth = Auth::new(registry.clone());
    let (token_id, secret) = registry
        .create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created");
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(secret.expose())).await,
        Ok(token_id)
    );
    registry.revoke_token(&id("home"), token_id).await.expect("revoked");
    database.go_away().await;
    assert_eq!(
        auth.agent(&id("home"), HERE, &bearer(secret.expose())).await,
        Err(Cause::RegistryAway)
    );
}

async fn a_node_writes_promptly_while_it_runs_and_takes_its_rows_with_it(database: Database) {
    let registry = database.node();
    let (stop_tx, stop_rx) = oneshot::channel::<()>();
    let running = tokio::spawn({
        let registry = registry.clone();
        async move { registry.run(async { drop(stop_rx.await) }).await }
    });
    let row = tunnel("home");
    registry.record(row.clone());
    let written = async { while database.tunnels("home").await != [row.tunnel_ws_id] {} };
    tokio::time::timeout(Duration::from_secs(20), written)
        .await
        .expect("written");
    registry.set_draining();
    let draining = async { while !database.store.nodes().await.expect("nodes")[0].draining {} };
    tokio::time::timeout(Duration::from_secs(20), draining)
        .await
        .expect("announced");

    drop(stop_tx);
    running.await.expect("ended");
    assert_eq!(database.tunnels("home").await, []);
    assert_eq!(database.store.nodes().await.expect("nodes"), []);
}

async fn nothing_that_is_stored_or_printed_holds_a_secret(database: Database) {
    let registry = database.node();
    let basic = NewAuth::Basic {
        user: "ann".into(),
        password: Secret::from("canary-password".to_owned()),
    };
    let printed = format!("{basic:?}");
    let (_, secret) = registry.create_client(&id("home"), basic).await.expect("created");
    let client = registry.client(&id("home")).await.expect("answered").expect("known");
    let printed = format!("{printed} {client:?} {secret:?}");
    let stored = database.contents().await;
    assert!(
        stored.windows(4).any(|window| window == b"home"),
        "this is the right place"
    );
    for canary in ["canary-password", secret.expose()] {
        assert!(!printed.contains(canary), "{printed}");
        assert!(
            !stored.windows(canary.len()).any(|window| window == canary.as_bytes()),
            "in the database"
        );
    }
}

async fn a_magic_token_leads_to_its_client_from_any_node_until_the_client_is_deleted(database: Database) {
    let (one, other) = (database.node(), database.node());
    let auth = Auth::new(other.clone());
    let unknown = one.register_magic_token(&id("home"), "canary-magic").await;
    assert!(matches!(unknown, Err(RegistryError::UnknownClient)));
    for client in ["home", "work"] {
        one.create_client(&id(client), NewAuth::Token).await.expect("created");
    }
    for _ in 0..2 {
        let made = one.register_magic_token(&id("home"), "canary-magic").await;
        made.expect("made, or made before");
    }
    let taken = other.register_magic_token(&id("work"), "canary-magic").await;
    assert!(matches!(taken, Err(RegistryError::TokenTaken)));
    for _ in 0..2 {
        let found = auth.magic_token(HERE, "canary-magic").await.expect("found");
        assert_eq!(found.client_id, id("home"));
    }
    for wrong in ["", "canary-magi", "CANARY-MAGIC", "canary-magic "] {
        let found = auth.magic_token(HERE, wrong).await;
        assert_eq!(found, Err(Cause::Unauthorized), "{wrong:?}");
    }
    let stored = database.contents().await;
    let canary = b"canary-magic";
    assert!(!stored.windows(canary.len()).any(|window| window == canary));

    one.delete_client(&id("home")).await.expect("deleted");
    one.create_client(&id("home"), NewAuth::Token)
        .await
        .expect("created again");
    assert_eq!(other.client_of_magic_token("canary-magic").await, Ok(None));
}

async fn a_client_that_is_registered_again_has_one_more_token(database: Database) {
    let (one, other) = (database.node(), database.node());
    let first = one.register_client(&id("home"), "by hand").await.expect("made");
    let second = other.register_client(&id("home"), "by hand").await.expect("added");
    let auth = Auth::new(database.node());
    for secret in [&first, &second] {
        let known = auth.agent(&id("home"), HERE, &bearer(secret.expose())).await;
        known.expect("let in");
    }
    assert_eq!(one.list_tokens(&id("home")).await.expect("known").len(), 2);
    // At once, on two nodes.
    let work = id("work");
    let both = join_all([&one, &other].map(|node| node.register_client(&work, "by hand"))).await;
    assert!(both.iter().all(Result::is_ok), "{both:?}");
    assert_eq!(one.list_tokens(&id("work")).await.expect("known").len(), 2);
}

async fn nodes_that_start_at_once_bring_the_database_to_their_version_together(database: Database) {
    database.begin_anew().await;
    let opened = join_all((0..6).map(|_| Store::open(&database.url))).await;
    for store in opened {
        let version = store.expect("opened").schema_version().await.expect("a version");
        assert_eq!(version.found, version.known);
    }
}

async fn a_database_that_a_newer_version_has_changed_still_serves_this_one(database: Database) {
    database
        .run(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
             VALUES (9999, 'of the future', TRUE, 'x', 1)"
                .to_owned(),
        )
        .await;
    let store = Store::open(&database.url).await.expect("opened");
    let SchemaVersion { found, known } = store.schema_version().await.expect("a version");
    assert!(found == 9999 && known < found, "{found} {known}");
}

async fn names_that_are_nearly_the_same_are_not(database: Database) {
    let registry = database.node();
    let auth = Auth::new(registry.clone());
    let (token_id, secret) = registry
        .create_client(&id("abc"), NewAuth::Token)
        .await
        .expect("created");
    for (at, name) in ["ABC", "abc ", "Abc", "ábc"].into_iter().enumerate() {
        let client = format!("INSERT INTO clients (client_id, auth, created_at) VALUES ('{name}', 'public', 1)");
        database.run(client).await;
        let token = "INSERT INTO client_access_tokens (token_id, client_id, token_hash, created_at)";
        database
            .run(format!("{token} VALUES ('{at}', '{name}', 'not a hash', 1)"))
            .await;
        let tunnel = "INSERT INTO connections (tunnel_ws_id, client_id, node_id, dialect, remote_addr, connected_at)";
        database
            .run(format!("{tunnel} VALUES ('{at}', '{name}', 'nobody', 'adit', '', 1)"))
            .await;
        database.store.insert_setting(name, name).await.expect("its own");
    }

    assert_eq!(
        auth.agent(&id("abc"), HERE, &bearer(secret.expose())).await,
        Ok(token_id)
    );
    let summary = registry.describe_client(&id("abc")).await.expect("known");
    assert_eq!((summary.auth.as_str(), summary.tunnels), ("token", 0));
    assert_eq!(registry.list_tokens(&id("abc")).await.expect("tokens").len(), 1);
    assert_eq!(database.store.setting("abc").await.expect("answered"), None);
    let spaced = database.store.setting("abc ").await.expect("answered");
    assert_eq!(spaced.as_deref(), Some("abc "));

    registry.delete_client(&id("abc")).await.expect("deleted");
    for table in ["clients", "client_access_tokens"] {
        let count = sqlx::AssertSqlSafe(format!("SELECT COUNT(*) FROM {table}"));
        let left: i64 = sqlx::query_scalar(count)
            .fetch_one(&database.raw)
            .await
            .expect("a number");
        assert_eq!(left, 4, "{table}");
    }
}

async fn many_nodes_come_and_go_at_once_and_no_row_is_lost(database: Database) {
    let clients = ["a", "b", "c", "d"];
    for client in clients {
        let node = database.node();
        node.create_client(&id(client), NewAuth::Token).await.expect("created");
    }
    let nodes: Vec<_> = (0..6).map(|_| database.node()).collect();
    let mut kept = BTreeSet::new();
    let gone_through = join_all(nodes.iter().map(|node| keep_some(node, &clients))).await;
    // Whoever was taken for dead at the very end notices it at the next heartbeat.
    for (node, (mut watch, now, tunnels)) in nodes.iter().zip(gone_through) {
        turn(node, &mut watch, now + Duration::from_secs(5)).await;
        kept.extend(tunnels);
    }

    let mut stored = BTreeSet::new();
    for client in clients {
        stored.extend(database.tunnels(client).await);
        let client = database
            .store
            .client(&id(client))
            .await
            .expect("answered")
            .expect("known");
        assert!(client.last_seen_at_ms.is_some());
    }
    assert!(stored == kept, "{} stored, {} held", stored.len(), kept.len());
}

/// A node that opens tunnels and closes half of them. Its clock runs ahead, so that others may be taken for dead.
async fn keep_some(node: &Registry, clients: &[&str]) -> (Watch, Instant, Vec<TunnelId>) {
    let (mut watch, mut now) = (Watch::default(), Instant::now());
    let mut kept = Vec::new();
    for _ in 0..8 {
        for client in clients {
            let (keep, close) = (tunnel(client), tunnel(client));
            kept.push(keep.tunnel_ws_id);
            node.record(keep);
            node.record(close.clone());
            turn(node, &mut watch, now).await;
            node.forget(close.tunnel_ws_id);
        }
        now += Duration::from_secs(5);
        turn(node, &mut watch, now).await;
    }
    (watch, now, kept)
}

/// Makes of each story one test with SQLite and one with MySQL.
macro_rules! with_both {
    ($($story:ident,)*) => {
        mod sqlite {$(
            #[tokio::test]
            async fn $story() {
                super::$story(super::Database::sqlite().await).await;
            }
        )*}
        mod mysql {$(
            #[tokio::test]
            async fn $story() {
                super::$story(super::Database::mysql().await).await;
            }
        )*}
    };
}

with_both! {
    an_access_token_works_until_it_is_revoked_and_not_a_moment_longer,
    a_deleted_client_is_unknown_and_its_name_comes_back_without_its_credentials,
    whatever_is_wrong_with_a_token_the_answer_is_the_same,
    an_address_that_keeps_guessing_is_told_to_wait_but_the_right_token_still_works,
    a_client_asks_its_downstreams_for_what_its_operator_chose,
    a_slow_disconnect_does_not_erase_the_reconnect_that_overtook_it,
    a_dead_node_loses_its_tunnels_and_nobody_else_does,
    a_node_that_was_taken_for_dead_and_is_not_records_its_tunnels_again,
    while_the_database_is_away_known_clients_go_on_and_tunnels_are_recorded_later,
    a_revoked_token_stays_revoked_when_the_database_goes_away,
    a_node_writes_promptly_while_it_runs_and_takes_its_rows_with_it,
    nothing_that_is_stored_or_printed_holds_a_secret,
    a_magic_token_leads_to_its_client_from_any_node_until_the_client_is_deleted,
    a_client_that_is_registered_again_has_one_more_token,
    nodes_that_start_at_once_bring_the_database_to_their_version_together,
    a_database_that_a_newer_version_has_changed_still_serves_this_one,
    names_that_are_nearly_the_same_are_not,
    many_nodes_come_and_go_at_once_and_no_row_is_lost,
}
