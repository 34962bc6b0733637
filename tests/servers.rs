//! The servers that other stories break do what those stories count on.

#[path = "harness/servers.rs"]
mod servers;

use std::{io::Read, net::TcpStream, time::Duration};

use servers::{MariaDb, Redis};
use sqlx::{Connection, MySqlConnection};

#[test]
fn redis_answers_is_killed_and_comes_back_empty_on_the_same_port() {
    let mut redis = Redis::start();
    assert_eq!(redis.command(&["SET", "greeting", "hello world"]), "OK");
    assert_eq!(redis.command(&["GET", "greeting"]), "hello world");
    assert_eq!(redis.command(&["KEYS", "*"]), "greeting");
    assert!(redis.command(&["CONFIG", "SET", "nonsense", "1"]).starts_with("ERR"));
    let (url, address) = (redis.url(), ("127.0.0.1", redis.port()));
    redis.kill();
    TcpStream::connect(address).expect_err("nobody listens");
    redis.restart();
    assert_eq!(redis.command(&["GET", "greeting"]), "");
    assert_eq!(redis.url(), url);
}

#[test]
fn redis_asks_for_a_password_and_may_fall_silent() {
    let redis = Redis::with(&["--requirepass", "hunter2"]);
    assert_eq!(redis.url(), format!("redis://:hunter2@127.0.0.1:{}", redis.port()));
    assert_eq!(redis.command(&["PING"]), "PONG");

    redis.stop_process();
    let mut silent = TcpStream::connect(("127.0.0.1", redis.port())).expect("the kernel accepts");
    std::io::Write::write_all(&mut silent, b"PING\r\n").expect("sent");
    silent.set_read_timeout(Some(Duration::from_millis(100))).expect("set");
    silent.read(&mut [0; 64]).expect_err("no answer");
    redis.continue_process();
    silent.set_read_timeout(None).expect("set");
    let mut answer = [0; 7];
    silent.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"-NOAUTH");
}

#[tokio::test]
async fn mariadb_gives_each_story_a_database_and_keeps_it_through_a_crash() {
    let mut server = MariaDb::start();
    let (one, other) = (server.database().await, server.database().await);
    assert_ne!(one, other);
    let run = async |url: &str, statement: &'static str| {
        let mut connection = MySqlConnection::connect(url).await.expect("a connection");
        let done = sqlx::raw_sql(statement).execute(&mut connection).await;
        done.map(|done| done.rows_affected())
    };
    run(&one, "CREATE TABLE t (a INT)").await.expect("made");
    run(&one, "INSERT INTO t VALUES (1)").await.expect("inserted");
    run(&other, "INSERT INTO t VALUES (1)").await.expect_err("not here");
    server.kill();
    server.restart();
    assert_eq!(run(&one, "DELETE FROM t").await.expect("still there"), 1);
}
