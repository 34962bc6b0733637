//! A relay of several processes of the real binary, with Redis and MariaDB of its own, behind a load balancer; and a
//! tenant whose bodies tell whose they are.
#![allow(dead_code, reason = "each story uses its part")]

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use sqlx::{Connection, MySqlConnection, Row};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::harness::{
    AnyBody, TestAgent, full,
    proxy::FaultProxy,
    servers::{MariaDb, Redis},
    within,
};

pub mod balancer;
pub mod tenant;

use balancer::Balancer;
use tenant::Tenant;

const ADMIN_TOKEN: &str = "the-admin-token-of-the-stories";
/// Clusters at a time: each is half a dozen processes, and a machine may have two cores.
static ROOM: Semaphore = Semaphore::const_new(2);

/// Waits until a condition holds that takes asking.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    within(what, async {
        while !holds().await {
            looks.tick().await;
        }
    })
    .await;
}

/// What a story needs of its cluster.
pub struct Plan {
    pub nodes: usize,
    /// Of each node's configuration file.
    pub settings: &'static str,
    pub redis: &'static [&'static str],
    /// Options of a database server of its own; `None`: it breaks none, and shares one.
    pub database: Option<&'static [&'static str]>,
    /// The most descriptors the first node may have open; `None`: as many as the system lets it.
    pub descriptors: Option<usize>,
    /// Nodes are no superusers of the database: what is forbidden there is forbidden to them. For a server of its own.
    pub plain_user: bool,
    /// Each node reaches Redis, and the database, through a proxy of its own.
    pub proxies: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            nodes: 2,
            settings: "",
            redis: &[],
            database: None,
            descriptors: None,
            plain_user: false,
            proxies: false,
        }
    }
}

/// The relay.
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub redis: Redis,
    /// The database server, if it is the story's own.
    pub mariadb: Option<MariaDb>,
    pub balancer: Balancer,
    /// The story's own way in.
    database_url: String,
    nodes_database_url: String,
    /// Of the next node.
    descriptors: Option<usize>,
    dir: tempfile::TempDir,
    _room: SemaphorePermit<'static>,
}

impl Cluster {
    pub async fn start(nodes: usize) -> Self {
        let plan = Plan {
            nodes,
            ..Plan::default()
        };
        Self::with(plan).await
    }

    pub async fn with(plan: Plan) -> Self {
        // Not within anybody's patience: the stories before this one take their time.
        let room = ROOM.acquire().await.expect("never closed");
        let redis = Redis::with(plan.redis);
        let mariadb = plan.database.map(MariaDb::with);
        let database_url = match &mariadb {
            Some(own) => own.database().await,
            None => MariaDb::shared().database().await,
        };
        let nodes_database_url = match &mariadb {
            Some(own) if plan.plain_user => plain_user(own, &database_url).await,
            _ => database_url.clone(),
        };
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("adit.toml"), plan.settings).expect("written");
        let mut cluster = Self {
            nodes: Vec::new(),
            balancer: Balancer::start().await,
            redis,
            mariadb,
            database_url,
            nodes_database_url,
            descriptors: None,
            dir,
            _room: room,
        };
        for at in 0..plan.nodes {
            cluster.descriptors = plan.descriptors.filter(|_| at == 0);
            cluster.add_node(plan.proxies).await;
        }
        cluster
    }

    /// One more node, known to the balancer.
    pub async fn add_node(&mut self, proxies: bool) {
        let (redis_url, database_url) = (self.redis.url(), self.nodes_database_url.clone());
        let (redis_url, redis_proxy) = behind(redis_url, proxies).await;
        let (database_url, database_proxy) = behind(database_url, proxies).await;
        self.add(redis_url, database_url, redis_proxy.zip(database_proxy)).await;
    }

    /// A node that has another idea of where Redis is.
    pub async fn add_node_with_redis(&mut self, redis_url: String) {
        self.add(redis_url, self.nodes_database_url.clone(), None).await;
    }

    async fn add(&mut self, redis_url: String, database_url: String, proxies: Option<(FaultProxy, FaultProxy)>) {
        let (redis_proxy, database_proxy) = proxies.unzip();
        let name = format!("node-{}", self.nodes.len());
        // Another process may take the ports before the node does: then it ends, and others are chosen.
        for _ in 0..20 {
            let [public, admin] = [free_address(), free_address()];
            let mut node = Node {
                public,
                admin,
                redis_proxy: None,
                database_proxy: None,
                command: (redis_url.clone(), database_url.clone()),
                most_descriptors: self.descriptors,
                dir: self.dir.path().to_owned(),
                log: self.dir.path().join(format!("{name}.log")),
                log_of_this_run: 0,
                running: None,
            };
            if node.start().await {
                node.redis_proxy = redis_proxy;
                node.database_proxy = database_proxy;
                self.balancer.add(node.public);
                return self.nodes.push(node);
            }
        }
        panic!("no free ports");
    }

    /// A new client that anybody may ask, with the upstream of its agents.
    pub async fn tenant(&self, name: &str, number: u64) -> Tenant {
        let body = format!(r#"{{"client_id": "{name}", "auth": "public"}}"#);
        let request = Request::post("/api/v1/clients")
            .header("host", "admin")
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {ADMIN_TOKEN}"))
            .body(full(body))
            .expect("a request");
        let (status, body) = ask(self.nodes[0].admin, request).await.expect("an answer");
        assert_eq!(status, 201, "{body:?}");
        let answer: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        let token = answer["token"].as_str().expect("a token").to_owned();
        Tenant::start(name, number, token).await
    }

    /// An agent of a tenant, with so many tunnels, dialling an address.
    pub async fn agent(&self, tenant: &Tenant, at: SocketAddr, connections: u32) -> TestAgent {
        let to = tenant.upstream().to_string();
        TestAgent::with(at, &tenant.name, &tenant.token, &to, |config| {
            config.connections = connections
        })
        .await
    }

    /// An agent as a process, dialling an address.
    pub async fn agent_process(&self, tenant: &Tenant, at: SocketAddr, connections: u32) -> Process {
        let log = self.dir.path().join(format!("agent-{}.log", rand::random::<u32>()));
        // Not in the nodes' directory, whose adit.toml is theirs.
        let home = self.dir.path().join("agent");
        fs::create_dir_all(&home).expect("a directory");
        let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
        command
            .args(["http", &tenant.upstream().to_string(), "--client", &tenant.name])
            .args(["--relay", &format!("http://{at}")])
            .args(["--connections", &connections.to_string()])
            .env_clear()
            .env("ADIT_TOKEN", &tenant.token)
            .env("ADIT_LOG", "info,adit=debug")
            .current_dir(home);
        let before = self.tunnels().await;
        let agent = Process::start(command, &log);
        eventually("the agent process has its tunnels", async || {
            self.tunnels().await == before + u64::from(connections)
        })
        .await;
        agent
    }

    /// Nodes that run.
    pub fn live(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.running.is_some())
    }

    /// Tunnels that all nodes hold.
    pub async fn tunnels(&self) -> u64 {
        self.sum("adit_tunnels").await
    }

    /// A metric over all nodes that run.
    pub async fn sum(&self, metric: &str) -> u64 {
        let mut sum = 0;
        for node in self.live() {
            sum += node.metric(metric).await;
        }
        sum
    }

    /// The node that holds a tunnel; there must be one.
    pub async fn holder(&self) -> usize {
        for (at, node) in self.nodes.iter().enumerate() {
            if node.running.is_some() && node.metric("adit_tunnels").await > 0 {
                return at;
            }
        }
        panic!("nobody holds a tunnel");
    }

    pub async fn database(&self) -> MySqlConnection {
        self.try_database().await.expect("the database is there")
    }

    pub async fn try_database(&self) -> Result<MySqlConnection, sqlx::Error> {
        MySqlConnection::connect(&self.database_url).await
    }

    pub async fn sql(&self, statement: impl Into<String>) -> u64 {
        let mut connection = self.database().await;
        let run = sqlx::query(sqlx::AssertSqlSafe(statement.into()))
            .execute(&mut connection)
            .await;
        let changed = run.expect("executed").rows_affected();
        connection.close().await.expect("closed");
        changed
    }

    /// A number that the database tells.
    pub async fn count(&self, query: impl Into<String>) -> i64 {
        let mut connection = self.database().await;
        let query = sqlx::query(sqlx::AssertSqlSafe(query.into()));
        let row = query.fetch_one(&mut connection).await.expect("a row");
        connection.close().await.expect("closed");
        row.get(0)
    }

    /// Whether the registry has exactly the tunnels that live, by node, and no other.
    pub async fn rows_are_sockets(&self) -> bool {
        let mut all = 0;
        for node in self.live() {
            let held = node.metric("adit_tunnels").await as i64;
            let query = format!("SELECT COUNT(*) FROM connections WHERE node_id = '{}'", node.id());
            if self.count(query).await != held {
                return false;
            }
            all += held;
        }
        self.count("SELECT COUNT(*) FROM connections").await == all
            && self.count("SELECT COUNT(*) FROM nodes").await == self.live().count() as i64
    }

    /// When the agents have left: nothing is left of the story but the nodes, and none has panicked. (I5, I7, I8)
    pub async fn ends(mut self) {
        for node in &mut self.nodes {
            assert!(node.is_as_it_should_be(), "a node ended by itself");
            if node.running.is_none() {
                node.start_again().await;
            }
        }
        for gauge in ["adit_exchanges_in_flight", "adit_tunnels"] {
            eventually(gauge, async || self.sum(gauge).await == 0).await;
        }
        let ids: Vec<String> = self.nodes.iter().map(|node| format!("'{}'", node.id())).collect();
        let rows = format!("SELECT COUNT(*) FROM connections WHERE node_id IN ({})", ids.join(", "));
        eventually("the registry holds nothing that is not there", async || {
            self.count(rows.as_str()).await == 0
        })
        .await;
        eventually("descriptors are closed", async || {
            self.nodes.iter().all(|node| node.descriptors() < IDLE_DESCRIPTORS)
        })
        .await;
        for node in &self.nodes {
            assert!(!node.whole_log().contains("panicked"), "no panic");
        }
    }
}

/// Listeners, runtime, log, the pool of the database, Redis, what asks for metrics: nothing that grew with a story.
const IDLE_DESCRIPTORS: usize = 40;

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for entry in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
                if entry.path().extension().is_some_and(|extension| extension == "log") {
                    let log = fs::read_to_string(entry.path()).unwrap_or_default();
                    let lines: Vec<_> = log.lines().collect();
                    let last = &lines[lines.len().saturating_sub(80)..];
                    eprintln!("--- {:?}\n{}", entry.file_name(), last.join("\n"));
                }
            }
        }
    }
}

/// A user who may do everything in this database, and nothing to the server.
async fn plain_user(server: &MariaDb, database_url: &str) -> String {
    let (_, database) = database_url.rsplit_once('/').expect("a database");
    // Both hosts: else the anonymous user of one of them would be who connects.
    for host in ["localhost", "127.0.0.1"] {
        server.run(format!("CREATE USER adit@'{host}'")).await;
        server.run(format!("GRANT ALL ON {database}.* TO adit@'{host}'")).await;
    }
    database_url.replace("root@", "adit@")
}

/// The same URL through a proxy.
async fn behind(url: String, proxied: bool) -> (String, Option<FaultProxy>) {
    if !proxied {
        return (url, None);
    }
    let (before, port) = url.split_once("127.0.0.1:").expect("a local server");
    let end = port.find('/').unwrap_or(port.len());
    let to = SocketAddr::from(([127, 0, 0, 1], port[..end].parse().expect("a port")));
    let proxy = FaultProxy::start(to).await;
    (format!("{before}{}{}", proxy.address, &port[end..]), Some(proxy))
}

/// Outside of the range from which the kernel serves outgoing connections (from 32768).
fn free_address() -> SocketAddr {
    loop {
        let address = SocketAddr::from(([127, 0, 0, 1], rand::random_range(20_000..32_000)));
        if std::net::TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// One request on a connection of its own, with its whole answer; `Err` when it broke.
pub async fn ask(address: SocketAddr, request: Request<AnyBody>) -> Result<(u16, Bytes), String> {
    let response = tenant::try_send(address, request).await?;
    let (head, body) = response.into_parts();
    let body = within("the answer's body", body.collect()).await;
    Ok((
        head.status.as_u16(),
        body.map_err(|error| error.to_string())?.to_bytes(),
    ))
}

/// A process, killed when dropped or when the test process ends, however that happens.
pub struct Process {
    child: Child,
    /// Kills it when the pipe breaks that only the test process holds.
    guard: Child,
}

impl Process {
    fn start(mut command: Command, log: &Path) -> Self {
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("cloned"))
            .stderr(log)
            .spawn()
            .expect("the binary runs");
        let guard = Command::new("sh")
            .args(["-c", "read -r _ || kill -KILL $0", &child.id().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        Self { child, guard }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status();
        assert!(sent.expect("kill runs").success());
    }

    fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    /// Waits for its end.
    pub async fn ended(mut self) -> ExitStatus {
        let mut status = None;
        eventually("a process ends", async || {
            status = self.has_ended();
            status.is_some()
        })
        .await;
        status.expect("it ended")
    }

    /// kill -9, and it is gone.
    pub async fn kill(self) {
        self.signal("KILL");
        assert!(!self.ended().await.success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.guard.kill();
        let _ = self.guard.wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One process of the relay.
pub struct Node {
    pub public: SocketAddr,
    pub admin: SocketAddr,
    /// Between it and Redis, if the story asked for that.
    pub redis_proxy: Option<FaultProxy>,
    /// Between it and the database.
    pub database_proxy: Option<FaultProxy>,
    command: (String, String),
    most_descriptors: Option<usize>,
    dir: PathBuf,
    log: PathBuf,
    log_of_this_run: u64,
    pub running: Option<Process>,
}

impl Node {
    /// False when it ended, because a port was taken.
    async fn start(&mut self) -> bool {
        self.log_of_this_run = fs::metadata(&self.log).map_or(0, |log| log.len());
        let (redis_url, database_url) = &self.command;
        let limit = self.most_descriptors.map(|most| format!("ulimit -n {most};"));
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", &format!("{} exec \"$0\" serve", limit.unwrap_or_default())])
            .arg(env!("CARGO_BIN_EXE_adit"))
            .env_clear()
            .env("ADIT_CONFIG", self.dir.join("adit.toml"))
            .env("ADIT_LISTEN", self.public.to_string())
            .env("ADIT_ADMIN_LISTEN", self.admin.to_string())
            .env("ADIT_ADMIN_TOKEN", ADMIN_TOKEN)
            .env("DATABASE_URL", database_url)
            .env("REDIS_URL", redis_url)
            .env("ADIT_LOG", "info,adit=debug")
            .env("ADIT_LOG_FORMAT", "human")
            .current_dir(&self.dir);
        let mut process = Process::start(command, &self.log);
        let mut ended = None;
        eventually("a node starts", async || {
            ended = process.has_ended();
            ended.is_some() || self.log().contains("the relay is up")
        })
        .await;
        if ended.is_some() {
            let log = self.log();
            assert!(log.contains("cannot listen"), "a node does not start:\n{log}");
            return false;
        }
        self.running = Some(process);
        true
    }

    /// A new process in the place of the one that ended.
    pub async fn start_again(&mut self) {
        assert!(self.running.is_none(), "it runs");
        // Its port may have been taken meanwhile by a connection of somebody's, for a moment.
        for _ in 0..20 {
            if self.start().await {
                return;
            }
        }
        panic!("its port is another's");
    }

    fn process(&self) -> &Process {
        self.running.as_ref().expect("it runs")
    }

    pub fn signal(&self, name: &str) {
        self.process().signal(name);
    }

    /// kill -9, and it is gone.
    pub async fn kill(&mut self) {
        self.running.take().expect("it runs").kill().await;
    }

    /// SIGTERM was sent: waits for its end, which is a success.
    pub async fn ended(&mut self) {
        let process = self.running.take().expect("it runs");
        assert!(process.ended().await.success(), "it leaves well");
    }

    fn is_as_it_should_be(&mut self) -> bool {
        self.running
            .as_mut()
            .is_none_or(|process| process.has_ended().is_none())
    }

    /// What this process has logged.
    pub fn log(&self) -> String {
        let mut log = Vec::new();
        if let Ok(mut file) = File::open(&self.log) {
            file.seek(SeekFrom::Start(self.log_of_this_run)).expect("seek");
            file.read_to_end(&mut log).expect("read");
        }
        String::from_utf8_lossy(&log).into_owned()
    }

    /// What all its processes have logged.
    pub fn whole_log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits for a line of this process with this in it.
    pub async fn says(&self, text: &str) {
        eventually(&format!("a node says {text:?}"), async || self.log().contains(text)).await;
    }

    /// Its name in the registry.
    pub fn id(&self) -> String {
        let log = self.log();
        let line = log
            .lines()
            .find(|line| line.contains("the relay is up"))
            .expect("it is up");
        let (_, id) = line.split_once("node.id").expect("it says its id");
        let is_id = |c: char| c.is_ascii_hexdigit() || c == '-';
        let id = id.trim_start_matches(|c| !is_id(c));
        id[..id.find(|c| !is_id(c)).unwrap_or(id.len())].to_owned()
    }

    async fn page(&self, path: &str) -> (u16, String) {
        let request = Request::get(path)
            .header("host", "admin")
            .body(full(""))
            .expect("a request");
        let (status, page) = ask(self.admin, request).await.expect("the admin listener answers");
        (status, String::from_utf8_lossy(&page).into_owned())
    }

    /// Its readiness: a status, and why.
    pub async fn ready(&self) -> (u16, String) {
        self.page("/readyz").await
    }

    /// Waits until its readiness says this. What it says is served all the same is 200.
    pub async fn is_ready(&self, status: u16, text: &str) {
        eventually(&format!("a node is {text:?}"), async || {
            let (found, page) = self.ready().await;
            found == status && page.contains(text)
        })
        .await;
    }

    /// A metric by its full name.
    pub async fn metric(&self, name: &str) -> u64 {
        let (_, page) = self.page("/metrics").await;
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {page}"))
            .parse()
            .expect("a number")
    }

    /// The most memory that was resident so far, bytes.
    pub fn most_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process().id())).expect("Linux");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let number = line.and_then(|line| line.trim().strip_suffix(" kB")).expect("a size");
        number.trim().parse::<u64>().expect("a number") * 1024
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.process().id()));
        open.expect("Linux").count()
    }
}
