//! The database is killed, frozen, locked, full, read-only, or takes another's side in a deadlock: who is connected is
//! served throughout, also through other nodes; new tunnels serve at once, and are recorded later.

use sqlx::{Connection, MySqlConnection, Row};

use crate::{
    LONG,
    cluster::{Cluster, Plan, eventually, tenant::Tenant},
    harness::TestAgent,
};

const AWAY: &str = "degraded: the database is away";

struct Story {
    cluster: Cluster,
    tenant: Tenant,
    agent: TestAgent,
    stream: u64,
}

impl Story {
    /// An agent at the first of two nodes, known at both.
    async fn with(plan: Plan) -> Self {
        let cluster = Cluster::with(plan).await;
        let tenant = cluster.tenant("home", 1).await;
        let agent = cluster.agent(&tenant, cluster.nodes[0].public, 1).await;
        let mut story = Self {
            cluster,
            tenant,
            agent,
            stream: 100,
        };
        story.serves().await;
        story
    }

    async fn start(options: &'static [&'static str]) -> Self {
        Self::with(Plan {
            database: Some(options),
            ..Plan::default()
        })
        .await
    }

    /// Both nodes serve the client.
    async fn serves(&mut self) {
        for node in &self.cluster.nodes {
            for _ in 0..5 {
                self.stream += 2;
                let (down, up) = (self.stream, self.stream + 1);
                self.tenant.download(node.public, down, 50_000).await.expect("served");
                self.tenant.upload(node.public, up, 50_000, None).await.expect("served");
            }
        }
    }

    /// From here on the database does nothing for the nodes. `heal` ends that.
    async fn goes_on_without<T>(mut self, broken: T, heal: impl AsyncFnOnce(&mut Cluster, T)) {
        let at = self.cluster.nodes[1].public;
        let mut down = self.tenant.begin(at, 1, LONG / 4).await.expect("served");
        // A tunnel that cannot be written down is how the node comes to notice.
        let second = self.cluster.agent(&self.tenant, self.cluster.nodes[0].public, 1).await;
        self.cluster.nodes[0].is_ready(200, AWAY).await;
        self.serves().await;
        down.read(LONG / 8).await.expect("it goes on");
        down.rest().await.expect("whole");
        // Only the one is left that no registry knows.
        self.agent.stop().await;
        let (tenant, nodes) = (&self.tenant, &self.cluster.nodes);
        tenant.download(nodes[0].public, 2, 50_000).await.expect("served");
        tenant.download(nodes[1].public, 3, 50_000).await.expect("served");
        heal(&mut self.cluster, broken).await;
        for node in &self.cluster.nodes {
            node.is_ready(200, "ready").await;
        }
        self.agent = second;
        self.ends().await;
    }

    async fn ends(mut self) {
        eventually("the registry has what lives", async || {
            self.cluster.rows_are_sockets().await
        })
        .await;
        self.serves().await;
        self.tenant.assert_untouched();
        self.agent.stop().await;
        self.cluster.ends().await;
    }

    fn server(&mut self) -> &mut crate::harness::servers::MariaDb {
        self.cluster.mariadb.as_mut().expect("its own")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_killed_is_not_missed_by_who_is_connected() {
    let mut story = Story::start(&[]).await;
    story.server().kill();
    story
        .goes_on_without((), async |cluster, ()| {
            cluster.mariadb.as_mut().expect("its own").restart();
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_freezes_is_not_waited_for_by_who_is_connected() {
    let mut story = Story::start(&[]).await;
    story.server().stop_process();
    story
        .goes_on_without((), async |cluster, ()| {
            cluster.mariadb.as_mut().expect("its own").continue_process();
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locked_tables_are_not_waited_for_by_who_is_connected() {
    let story = Story::start(&[]).await;
    let mut locker = story.cluster.database().await;
    let lock = sqlx::raw_sql("LOCK TABLES nodes WRITE, connections WRITE, clients WRITE, client_access_tokens WRITE");
    lock.execute(&mut locker).await.expect("locked");
    story
        .goes_on_without(locker, async |_, mut locker| {
            sqlx::raw_sql("UNLOCK TABLES")
                .execute(&mut locker)
                .await
                .expect("unlocked");
            locker.close().await.expect("closed");
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_without_a_free_connection_is_away() {
    // The least that it can be told; a superuser gets one more.
    const ALL: usize = 11;
    let story = Story::start(&["--max-connections=10"]).await;
    let mut held: Vec<MySqlConnection> = vec![story.cluster.database().await];
    let mut own = vec![own_id(&mut held[0]).await];
    eventually("the story has every connection", async || {
        for id in others(&mut held[0], &own).await {
            let kill = sqlx::AssertSqlSafe(format!("KILL {id}"));
            // It may have left by itself.
            sqlx::raw_sql(kill).execute(&mut held[0]).await.ok();
        }
        while held.len() < ALL
            && let Ok(mut more) = story.cluster.try_database().await
        {
            own.push(own_id(&mut more).await);
            held.push(more);
        }
        held.len() == ALL && others(&mut held[0], &own).await.is_empty()
    })
    .await;
    story
        .goes_on_without(held, async |_, held| {
            for connection in held {
                connection.close().await.expect("closed");
            }
        })
        .await;
}

async fn own_id(connection: &mut MySqlConnection) -> u64 {
    let row = sqlx::query("SELECT CAST(CONNECTION_ID() AS UNSIGNED)").fetch_one(connection);
    row.await.expect("a row").get(0)
}

async fn others(connection: &mut MySqlConnection, own: &[u64]) -> Vec<u64> {
    let ids = "SELECT CAST(id AS UNSIGNED) FROM information_schema.processlist WHERE user = 'root'";
    let rows = sqlx::query(ids).fetch_all(connection).await.expect("rows");
    let ids = rows.iter().map(|row| row.get::<u64, _>(0));
    ids.filter(|id| !own.contains(id)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_database_is_read_and_written_later() {
    let story = Story::with(Plan {
        database: Some(&[]),
        plain_user: true,
        ..Plan::default()
    })
    .await;
    story.cluster.sql("SET GLOBAL read_only = 1").await;
    story
        .goes_on_without((), async |cluster, ()| {
            cluster.sql("SET GLOBAL read_only = 0").await;
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_loses_a_deadlock_does_it_again() {
    const DEADLOCKS: &str = "Innodb_deadlocks";
    const WAITING: &str = "Innodb_row_lock_current_waits";
    let status = |name: &str| {
        format!(
            "SELECT CAST(variable_value AS SIGNED) FROM information_schema.global_status WHERE variable_name = '{name}'"
        )
    };
    let mut story = Story::start(&[]).await;
    story.cluster.sql("CREATE TABLE ballast (a INT)").await;
    let mut other = story.cluster.database().await;
    let run = async |connection: &mut MySqlConnection, statement: &'static str| {
        sqlx::raw_sql(statement).execute(connection).await.expect(statement);
    };
    run(&mut other, "BEGIN").await;
    // Of two in a deadlock, the one that has changed less is rolled back.
    run(&mut other, "INSERT INTO ballast SELECT seq FROM seq_1_to_5000").await;
    run(&mut other, "UPDATE clients SET basic_user = 'x'").await;
    // The node writes its tunnel's row, and waits for the client's, in which it notes that it was seen.
    let node = story.cluster.nodes[0].public;
    let second = story.cluster.agent(&story.tenant, node, 1).await;
    eventually("the node waits for the row", async || {
        story.cluster.count(status(WAITING)).await == 1
    })
    .await;
    run(&mut other, "UPDATE connections SET agent_version = 'x'").await;
    assert!(story.cluster.count(status(DEADLOCKS)).await >= 1);
    run(&mut other, "ROLLBACK").await;
    other.close().await.expect("closed");
    story.serves().await;
    second.stop().await;
    story.ends().await;
}
