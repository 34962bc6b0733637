//! `cargo bench --bench fanout`: one client's messages to 1,000 and 10,000 subscribers on two nodes, with Redis between
//! them: how long until each has it, how many deliveries a second, and the CPU that one delivery costs.
//!
//! Needs `redis-server` and `mariadbd` (Debian packages) and the release binary. Loopback only. The subscribers are in this
//! process, on the same cores: delays and rates are lower bounds of what the relay does, its CPU is not.

mod common;
#[path = "../tests/harness/servers.rs"]
mod servers;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use common::*;
use servers::{MariaDb, Redis};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

/// Bytes of a message: one frame of two bytes more.
const MESSAGE: usize = 100;
/// Messages with a pause between them, so that each delay is its own.
const PACED: u64 = 30;
const PAUSE: Duration = Duration::from_millis(300);
/// Messages without one.
const BURST: u64 = 200;

struct Bench {
    nodes: [SocketAddr; 2],
    pids: [u32; 3],
    token: String,
    began: Instant,
    /// Microseconds from the publisher to the subscriber.
    delays: Mutex<Vec<u32>>,
    delivered: AtomicU64,
}

fn main() {
    need(&["redis-server"]);
    let dir = tempfile::tempdir().expect("a directory");
    let (redis, mariadb) = (Redis::start(), MariaDb::start());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (database, bus) = (runtime.block_on(mariadb.database()), redis.url());
    let shared = ["--database-url", &database, "--redis-url", &bus];
    let [one, one_admin, other, other_admin] = std::array::from_fn(|_| free_port());
    let (_one, one_pid) = serve(dir.path(), one, one_admin, &shared);
    let (_other, other_pid) = serve(dir.path(), other, other_admin, &shared);
    let info = redis.command(&["INFO", "server"]);
    let redis_pid = info.lines().find_map(|line| line.strip_prefix("process_id:"));
    let bench = Arc::new(Bench {
        nodes: [one, other],
        pids: [
            one_pid,
            other_pid,
            redis_pid.expect("a pid").trim().parse().expect("a pid"),
        ],
        token: create(one_admin, "home"),
        began: Instant::now(),
        delays: Mutex::default(),
        delivered: AtomicU64::new(0),
    });
    println!("{MESSAGE}-byte messages; CPU µs a delivery: of the publishing node, the other, Redis\n");
    println!("| subscribers | delay p50 µs | p99 µs | deliveries/s | CPU µs a delivery: one | other | Redis |");
    println!("|---|---|---|---|---|---|---|");
    for subscribers in [1_000, 10_000] {
        runtime.block_on(measure(&bench, subscribers));
    }
}

async fn measure(bench: &Arc<Bench>, subscribers: usize) {
    let mut listening = tokio::task::JoinSet::new();
    for at in 0..subscribers {
        let stream = subscribe(bench.nodes[at % 2]).await;
        listening.spawn(listen(bench.clone(), stream));
    }
    let mut publisher = TcpStream::connect(bench.nodes[0]).await.expect("it listens");
    publisher.set_nodelay(true).expect("set");
    let begins = bench.delivered.load(Ordering::Relaxed);
    bench.delays.lock().expect("no panic").clear();
    for n in 1..=PACED {
        publish(bench, &mut publisher).await;
        tokio::time::sleep(PAUSE).await;
        all_have(bench, begins + n * subscribers as u64).await;
    }
    let mut delays = std::mem::take(&mut *bench.delays.lock().expect("no panic"));
    delays.sort_unstable();
    let (before, started) = (bench.pids.map(cpu), Instant::now());
    for _ in 0..BURST {
        publish(bench, &mut publisher).await;
    }
    all_have(bench, begins + (PACED + BURST) * subscribers as u64).await;
    let (took, after) = (started.elapsed(), bench.pids.map(cpu));
    let deliveries = (BURST * subscribers as u64) as f64;
    let each: Vec<f64> = after
        .iter()
        .zip(before)
        .map(|(after, before)| (*after - before).as_secs_f64() * 1e6 / deliveries)
        .collect();
    println!(
        "| {subscribers} | {} | {} | {:.0} | {:.2} | {:.2} | {:.3} |",
        delays[delays.len() / 2],
        delays[delays.len() * 99 / 100],
        deliveries / took.as_secs_f64(),
        each[0],
        each[1],
        each[2]
    );
}

async fn all_have(bench: &Bench, deliveries: u64) {
    let whole = async {
        while bench.delivered.load(Ordering::Relaxed) < deliveries {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), whole)
        .await
        .expect("every subscriber gets every message");
}

async fn subscribe(node: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(node).await.expect("it listens");
    let head = "GET /adit/subscribe?clientId=home HTTP/1.1\r\nhost: bench\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("it reads");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.expect("an answer"));
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"), "switched");
    stream
}

/// Reads frames: all are shorter than 126 bytes. Pings are answered, so that the relay keeps it.
async fn listen(bench: Arc<Bench>, stream: TcpStream) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::with_capacity(4096, read);
    let mut payload = [0; 125];
    while let Ok(kind) = read.read_u8().await {
        let Ok(length) = read.read_u8().await else { return };
        let payload = &mut payload[..usize::from(length)];
        if read.read_exact(payload).await.is_err() {
            return;
        }
        match kind {
            0x81 => {
                let sent = String::from_utf8_lossy(&payload[..20])
                    .trim()
                    .parse::<u64>()
                    .expect("a time");
                let delay = bench.began.elapsed().as_micros() as u64 - sent;
                bench.delays.lock().expect("no panic").push(delay as u32);
                bench.delivered.fetch_add(1, Ordering::Relaxed);
            }
            0x89 => drop(write.write_all(&[0x8a, 0x80, 0, 0, 0, 0]).await),
            other => panic!("a frame of kind {other:#x}"),
        }
    }
}

/// One message that says when it left, and the relay's answer.
async fn publish(bench: &Bench, stream: &mut TcpStream) {
    let now = bench.began.elapsed().as_micros();
    let request = format!(
        "POST /adit/publish?clientId=home HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {}\r\n\
         content-length: {MESSAGE}\r\n\r\n{now:>20}{}",
        bench.token,
        ".".repeat(MESSAGE - 20)
    );
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut answer = [0; 1024];
    let mut length = 0;
    while !answer[..length].ends_with(b"}") {
        let read = stream.read(&mut answer[length..]).await.expect("an answer");
        assert!(read > 0, "the relay answers");
        length += read;
    }
    assert!(
        answer.starts_with(b"HTTP/1.1 202"),
        "{}",
        String::from_utf8_lossy(&answer[..length])
    );
}
