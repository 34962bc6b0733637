//! Private copies of MariaDB and Redis, on ports and with directories of their own, gone when dropped.
//!
//! Each runs under a shell that ends it and removes its directory when the test process ends, however that happens: the
//! shell reads a pipe that only the test process holds.
#![allow(dead_code, reason = "each story uses its part")]

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use sqlx::{Connection, MySqlConnection};
use tempfile::TempDir;

/// Longer than a server takes to start on any machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at whether a server is ready.
const LOOK: Duration = Duration::from_millis(5);

/// Tells the server's pid; ends it when it is told so or when the test process has gone, and then tidies up.
const KEEPER: &str = r#"
"$@" </dev/null >log 2>&1 &
server=$!
echo "$server"
read -r word
kill -KILL "$server"
wait "$server"
[ "$word" = keep ] || rm -rf "$PWD"
"#;

/// A server process in a directory of its own, which may be killed and started again.
struct Server {
    dir: TempDir,
    port: u16,
    command: Vec<String>,
    /// What its log says once it takes connections.
    ready: &'static str,
    running: Option<Running>,
}

struct Running {
    keeper: Child,
    pid: u32,
}

impl Server {
    /// Starts what `command` says for a port.
    fn start(dir: TempDir, ready: &'static str, command: impl Fn(u16) -> Vec<String>) -> Self {
        let mut server = Self {
            dir,
            port: 0,
            command: Vec::new(),
            ready,
            running: None,
        };
        // Another process may take the port before the server does: then it says so, and another is chosen.
        loop {
            server.port = free_port();
            server.command = command(server.port);
            if server.run() {
                return server;
            }
        }
    }

    /// `false`: the port is another's.
    fn run(&mut self) -> bool {
        // What the run before has said is not about this one.
        let _ = fs::remove_file(self.dir.path().join("log"));
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "sh"])
            .args(&self.command)
            .current_dir(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let mut pid = String::new();
        let stdout = keeper.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut pid).expect("a line");
        let pid = pid.trim().parse().expect("a pid");
        self.running = Some(Running { keeper, pid });
        let ready = self.wait_until_ready();
        if !ready {
            self.kill();
        }
        ready
    }

    fn wait_until_ready(&self) -> bool {
        let started = Instant::now();
        loop {
            let log = fs::read(self.dir.path().join("log")).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            if log.contains(self.ready) {
                return true;
            }
            if log.contains("already in use") {
                return false;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "{:?} does not start:\n{log}",
                self.command
            );
            thread::sleep(LOOK);
        }
    }

    /// As a crash: at once, and nothing is written any more.
    fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            let mut pipe = running.keeper.stdin.take().expect("piped");
            pipe.write_all(b"keep\n").expect("the keeper reads");
            running.keeper.wait().expect("it ends");
        }
    }

    fn restart(&mut self) {
        self.kill();
        assert!(self.run(), "port {} was taken", self.port);
    }

    fn signal(&self, name: &str) {
        let running = self.running.as_ref().expect("it runs");
        let kill = Command::new("sh")
            .arg("-c")
            .arg(format!("kill -{name} {}", running.pid))
            .status();
        assert!(kill.expect("a shell").success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut running) = self.running.take() {
            drop(running.keeper.stdin.take());
            let _ = running.keeper.wait();
        }
    }
}

/// A port that nobody has, outside of the range from which the kernel serves outgoing connections (from 32768).
fn free_port() -> u16 {
    loop {
        let port = rand::random_range(20_000..32_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A program in PATH or where servers are.
fn program(name: &str) -> String {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    let found = places.map(|place| place.join(name)).find(|file| file.is_file());
    let found = found.unwrap_or_else(|| panic!("{name} is not installed: see tests/run"));
    text(&found)
}

fn text(path: &Path) -> String {
    path.to_str().expect("text").to_owned()
}

fn new_dir() -> TempDir {
    TempDir::with_prefix("adit-test-").expect("a directory")
}

/// MariaDB refuses to run as root unless it is told to.
fn as_root() -> Option<String> {
    let me = fs::metadata("/proc/self").expect("Linux");
    (me.uid() == 0).then(|| "--user=root".to_owned())
}

/// A MariaDB server, with `root` and no password.
pub struct MariaDb {
    server: Server,
    databases: AtomicU32,
}

impl MariaDb {
    /// The one that all stories of this test binary share, each with a database of its own.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<MariaDb> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    /// One to break.
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// One with more options.
    pub fn with(options: &[&str]) -> Self {
        let dir = new_dir();
        let data = dir.path().join("data");
        let copied = Command::new("cp").arg("-r").arg(template()).arg(&data).status();
        assert!(copied.expect("cp").success(), "the template is copied");
        let socket = format!("--socket={}", text(&dir.path().join("socket")));
        let command = |port: u16| {
            let mut command = vec![program("mariadbd"), "--no-defaults".to_owned()];
            command.extend(as_root());
            command.extend([
                format!("--datadir={}", text(&data)),
                socket.clone(),
                format!("--port={port}"),
            ]);
            command.extend(FAST.iter().chain(options).map(ToString::to_string));
            command
        };
        Self {
            server: Server::start(dir, "ready for connections", command),
            databases: AtomicU32::new(0),
        }
    }

    /// The URL of a new, empty database.
    pub async fn database(&self) -> String {
        let name = format!("adit_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.run(format!("CREATE DATABASE {name}")).await;
        self.url(&name)
    }

    /// The URL of a database.
    pub fn url(&self, name: &str) -> String {
        format!("mysql://root@127.0.0.1:{}/{name}", self.server.port)
    }

    /// Runs a statement as root, in no database.
    pub async fn run(&self, statement: String) {
        let mut connection = MySqlConnection::connect(&self.url("")).await.expect("a connection");
        let run = sqlx::raw_sql(sqlx::AssertSqlSafe(statement));
        run.execute(&mut connection).await.expect("executed");
        connection.close().await.expect("closed");
    }

    /// The port it listens on, also while it is killed.
    pub fn port(&self) -> u16 {
        self.server.port
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.server.kill();
    }

    /// Starts it again, on the same port and data; kills it first if it runs.
    pub fn restart(&mut self) {
        self.server.restart();
    }

    /// It says nothing any more, and its connections stay open.
    pub fn stop_process(&self) {
        self.server.signal("STOP");
    }

    /// It goes on.
    pub fn continue_process(&self) {
        self.server.signal("CONT");
    }
}

/// Safe from the crash of the process, not of the machine; small; nobody else's.
const FAST: [&str; 9] = [
    "--bind-address=127.0.0.1",
    "--innodb-flush-log-at-trx-commit=2",
    "--innodb-flush-method=nosync",
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=4M",
    "--skip-log-bin",
    "--performance-schema=OFF",
    "--thread-stack=256K",
    "--skip-stack-trace",
];

/// A data directory to copy: it takes seconds to make, so it is made once for all test binaries.
fn template() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let template = target.join("mariadb-template");
    let lock = File::create(target.join("mariadb-template.lock")).expect("a lock file");
    lock.lock().expect("locked");
    if template.is_dir() {
        return template;
    }
    // What a killed process left half done stays out of the way.
    let new = TempDir::new_in(target).expect("a directory");
    let data = new.path().join("data");
    let made = Command::new(program("mariadb-install-db"))
        .arg("--no-defaults")
        .args(as_root())
        .arg(format!("--datadir={}", text(&data)))
        .args(["--auth-root-authentication-method=normal", "--skip-test-db"])
        .args(["--innodb-log-file-size=4M"])
        .output()
        .expect("mariadb-install-db");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    fs::rename(&data, &template).expect("renamed");
    template
}

/// A Redis server.
pub struct Redis {
    server: Server,
    password: Option<String>,
}

impl Redis {
    /// One that keeps nothing.
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// One with more options, such as `["--requirepass", "secret"]`.
    pub fn with(options: &[&str]) -> Self {
        let dir = new_dir();
        let path = text(dir.path());
        let command = |port: u16| {
            let port = port.to_string();
            let mut command = vec![program("redis-server")];
            let own = [
                "--port",
                &port,
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
                "--dir",
                &path,
            ];
            command.extend(own.iter().chain(options).map(ToString::to_string));
            command
        };
        let password = options.iter().position(|option| *option == "--requirepass");
        Self {
            server: Server::start(dir, "Ready to accept connections", command),
            password: password.map(|at| options[at + 1].to_owned()),
        }
    }

    /// A Sentinel that watches this server under a name.
    pub fn sentinel(&self, name: &str) -> Self {
        let dir = new_dir();
        let file = dir.path().join("sentinel.conf");
        let watch = format!("sentinel monitor {name} 127.0.0.1 {} 1\n", self.port());
        fs::write(&file, watch).expect("written");
        let file = text(&file);
        let command = |port: u16| {
            let port = port.to_string();
            let own = [&file, "--sentinel", "--port", &port, "--bind", "127.0.0.1"];
            let mut command = vec![program("redis-server")];
            command.extend(own.map(str::to_owned));
            command
        };
        Self {
            server: Server::start(dir, "+monitor master", command),
            password: None,
        }
    }

    /// Where it is reached, with its password.
    pub fn url(&self) -> String {
        let password = self.password.as_ref().map(|password| format!(":{password}@"));
        format!("redis://{}127.0.0.1:{}", password.unwrap_or_default(), self.server.port)
    }

    /// The port it listens on, also while it is killed.
    pub fn port(&self) -> u16 {
        self.server.port
    }

    /// Sends one command on a connection of its own. An array's items come back as lines; an error as Redis says it.
    pub fn command(&self, words: &[&str]) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.server.port)).expect("Redis listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
        if let Some(password) = &self.password {
            send(&mut stream, &["AUTH", password]);
            assert_eq!(reply(&mut reader), "OK");
        }
        send(&mut stream, words);
        reply(&mut reader)
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.server.kill();
    }

    /// Starts it again, on the same port; kills it first if it runs.
    pub fn restart(&mut self) {
        self.server.restart();
    }

    /// It says nothing any more, and its connections stay open.
    pub fn stop_process(&self) {
        self.server.signal("STOP");
    }

    /// It goes on.
    pub fn continue_process(&self) {
        self.server.signal("CONT");
    }
}

/// RESP: <https://redis.io/docs/latest/develop/reference/protocol-spec/>.
fn send(stream: &mut TcpStream, words: &[&str]) {
    let mut command = format!("*{}\r\n", words.len());
    for word in words {
        command += &format!("${}\r\n{word}\r\n", word.len());
    }
    stream.write_all(command.as_bytes()).expect("sent");
}

fn reply(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).expect("a reply");
    let line = line.trim_end();
    let (kind, rest) = line.split_at_checked(1).expect("a reply");
    let length = || rest.parse::<i64>().expect("a number");
    match kind {
        "$" if length() >= 0 => {
            let mut bytes = vec![0; length() as usize + 2];
            reader.read_exact(&mut bytes).expect("the whole reply");
            bytes.truncate(bytes.len() - 2);
            String::from_utf8_lossy(&bytes).into_owned()
        }
        "*" => (0..length()).map(|_| reply(reader)).collect::<Vec<_>>().join("\n"),
        "$" => String::new(),
        _ => rest.to_owned(),
    }
}
