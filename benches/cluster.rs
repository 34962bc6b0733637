//! `cargo bench --bench cluster`: what it costs when a request lands on the wrong node, beside the right node of the same
//! cluster in one run: two nodes, Redis and MariaDB between them; what a broken bus costs; and what many tunnels cost.
//!
//! Needs `wrk`, `nginx`, `redis-server` and `mariadbd` (Debian packages) and the release binary. Loopback only; every loop
//! is bounded. Medians of rounds; ratios within one run are what counts.

mod common;
#[path = "../tests/harness/servers.rs"]
mod servers;

use std::{
    fs,
    io::Read,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use common::*;
use servers::{MariaDb, Redis};

/// Tunnels of other clients, while the cost of a request is measured again.
const TUNNELS: usize = 10_000;
/// Downloads at once, and the bytes of all of them together.
const DOWNLOADS: usize = 16;
/// Nodes that are killed, one after the other.
const KILLED: usize = 5;
const KILL_EVERY: Duration = Duration::from_millis(200);

struct Bench {
    /// Holds the tunnels.
    right: Target,
    /// Does not.
    wrong: Target,
    redis: Redis,
    idle_token: String,
    database: String,
    bus: String,
    upstream: SocketAddr,
    _processes: Vec<Process>,
    _mariadb: MariaDb,
}

fn main() {
    need(&["wrk", "nginx"]);
    let dir = tempfile::tempdir().expect("a directory");
    let bench = Bench::start(dir.path());
    println!("CPU: of the right node, the wrong node, Redis, and the agent\n");
    println!("| what | connections | requests/s | p50 µs | p99 µs | CPU µs a request: right | wrong | Redis | agent |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for connections in [1, 16, 64] {
        for target in [&bench.right, &bench.wrong] {
            requests(target, connections);
        }
    }
    println!("\n| 1 GiB | MiB/s | CPU s a GiB: right | wrong | Redis | agent |\n|---|---|---|---|---|---|");
    for target in [&bench.right, &bench.wrong] {
        transfer(target, "one download", |target| download(target, "/big"));
        transfer(target, "sixteen downloads", downloads);
    }
    let kills = AtomicU64::new(0);
    transfer(
        &bench.wrong,
        "sixteen downloads, subscribers killed every 200 ms",
        |target| {
            while_killing(&bench.redis, &kills, || downloads(target));
        },
    );
    println!(
        "\n{} kills in those rounds; Redis at most: {}",
        kills.load(Ordering::Relaxed),
        peak(&bench.redis)
    );
    println!(
        "\n| with {TUNNELS} more tunnels | connections | requests/s | p50 µs | p99 µs | CPU µs a request: right | wrong | Redis | agent |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let tunnels = open_tunnels(bench.right.address, &bench.idle_token, TUNNELS);
    for target in [&bench.right, &bench.wrong] {
        requests(target, 64);
    }
    drop(tunnels);
    let times: Vec<f64> = (0..KILLED)
        .map(|round| after_a_kill(&bench, dir.path(), round))
        .collect();
    let worst = times.iter().copied().fold(0.0, f64::max);
    println!(
        "\nkill -9 of the node with both tunnels: the next request through another node is answered after {:.0} ms (at most {worst:.0}, of {KILLED})",
        median(times)
    );
}

/// Milliseconds from the death of the node that holds an agent's tunnels until a request through another is answered.
fn after_a_kill(bench: &Bench, dir: &Path, round: usize) -> f64 {
    let [node, admin] = std::array::from_fn(|_| free_port());
    let shared = ["--database-url", &bench.database, "--redis-url", &bench.bus];
    let (victim, _) = serve(dir, node, admin, &shared);
    let client: &'static str = format!("killed-{round}").leak();
    let balancer = forward(vec![node, bench.wrong.address]);
    let (_agent, _) = agent(balancer, client, &create(admin, client), bench.upstream);
    let target = Target {
        name: "after a kill",
        address: bench.right.address,
        client: Some(client),
        hops: vec![],
    };
    wait_until_answered(&target);
    drop(victim);
    let since = Instant::now();
    wait_until_answered(&target);
    since.elapsed().as_secs_f64() * 1e3
}

/// A load balancer: connections go to the first of these that listens.
fn forward(nodes: Vec<SocketAddr>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for from in listener.incoming().flatten() {
            let Some(to) = nodes.iter().find_map(|node| TcpStream::connect(node).ok()) else {
                continue;
            };
            for (mut from, mut to) in [
                (from.try_clone().expect("a socket"), to.try_clone().expect("a socket")),
                (to, from),
            ] {
                std::thread::spawn(move || {
                    std::io::copy(&mut from, &mut to).ok();
                    to.shutdown(std::net::Shutdown::Both).ok();
                });
            }
        }
    });
    address
}

impl Bench {
    fn start(dir: &Path) -> Self {
        let [upstream, right, right_admin, wrong, wrong_admin] = std::array::from_fn(|_| free_port());
        fs::create_dir(dir.join("www")).expect("a directory");
        for (name, length) in [("big", GIB), ("part", GIB / DOWNLOADS as u64)] {
            let file = fs::File::create(dir.join("www").join(name));
            file.and_then(|file| file.set_len(length)).expect("a sparse file");
        }
        let files = format!(
            "server {{ listen {upstream} backlog=4096; tcp_nodelay on; root {}/www; \
             location = / {{ return 200 \"hello, this is 24 bytes\\n\"; }} }}",
            dir.display()
        );
        let (nginx, _) = nginx(dir, "upstream", &files, upstream);
        let (redis, mariadb) = (Redis::start(), MariaDb::start());
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (database, bus) = (runtime.block_on(mariadb.database()), redis.url());
        let shared = ["--database-url", &database, "--redis-url", &bus];
        let (right_node, right_pid) = serve(dir, right, right_admin, &shared);
        let (wrong_node, wrong_pid) = serve(dir, wrong, wrong_admin, &shared);
        let (agent_process, agent_pid) = agent(right, "home", &create(right_admin, "home"), upstream);
        let redis_pid = redis_pid(&redis);
        let target = |name, address: SocketAddr| Target {
            name,
            address,
            client: Some("home"),
            hops: vec![right_pid, wrong_pid, redis_pid, agent_pid],
        };
        let bench = Self {
            right: target("right node", right),
            wrong: target("wrong node", wrong),
            redis,
            database,
            bus,
            upstream,
            idle_token: create(right_admin, "idle"),
            _processes: vec![nginx, right_node, wrong_node, agent_process],
            _mariadb: mariadb,
        };
        wait_until_answered(&bench.right);
        wait_until_answered(&bench.wrong);
        bench
    }
}

fn info(redis: &Redis, section: &str, name: &str) -> String {
    let info = redis.command(&["INFO", section]);
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn redis_pid(redis: &Redis) -> u32 {
    info(redis, "server", "process_id").parse().expect("a pid")
}

fn peak(redis: &Redis) -> String {
    info(redis, "memory", "used_memory_peak_human")
}

fn downloads(target: &Target) {
    std::thread::scope(|scope| {
        for _ in 0..DOWNLOADS {
            scope.spawn(|| {
                let mut stream = get(target, "/part");
                let (mut buffer, mut total) = (vec![0; 256 * 1024], 0);
                loop {
                    match stream.read(&mut buffer).expect("it sends") {
                        0 => break,
                        read => total += read as u64,
                    }
                }
                assert!(total >= GIB / DOWNLOADS as u64, "a whole body: {total}");
            });
        }
    });
}

/// Cuts every subscriber's connection again and again while `work` runs.
fn while_killing(redis: &Redis, kills: &AtomicU64, work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = Instant::now() + KILL_EVERY;
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
                next += KILL_EVERY;
                redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
                kills.fetch_add(1, Ordering::Relaxed);
            }
        });
        work();
        done.store(true, Ordering::Relaxed);
    });
}
