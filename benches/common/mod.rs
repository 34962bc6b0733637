//! What the benchmarks share: processes and their CPU time, load by wrk and by hand, and the rows of their tables.
#![allow(dead_code, reason = "each benchmark uses its part")]

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub const ROUNDS: usize = 3;
pub const SECONDS: u32 = 3;
pub const GIB: u64 = 1 << 30;
/// How long a started process may take to listen.
pub const START: Duration = Duration::from_secs(20);

/// Ends with what to do when a tool is missing.
pub fn need(tools: &[&str]) {
    for tool in tools {
        let mut ask = Command::new(tool);
        if ask
            .arg("-v")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_err()
        {
            eprintln!(
                "this benchmark needs {tool}: apt-get install -y --no-install-recommends {}",
                tools.join(" ")
            );
            std::process::exit(1);
        }
    }
}

/// A process, killed when dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Something to send requests to, and the processes whose CPU is counted.
pub struct Target {
    pub name: &'static str,
    pub address: SocketAddr,
    pub client: Option<&'static str>,
    pub hops: Vec<u32>,
}

pub fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a free port")
}

pub fn wait_for(address: SocketAddr) {
    let since = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(since.elapsed() < START, "{address} does not listen");
        std::thread::yield_now();
    }
}

pub fn nginx(dir: &Path, name: &str, http: &str, listens: SocketAddr) -> (Process, u32) {
    let config = dir.join(format!("{name}.conf"));
    let text = format!(
        "worker_processes 1; daemon off; master_process off; pid {0}/{name}.pid; error_log {0}/{name}.log; \
         events {{ worker_connections 4096; }} http {{ access_log off; sendfile on; keepalive_requests 100000000; \
         client_max_body_size 0; client_body_temp_path {0}/{name}-body; proxy_temp_path {0}/{name}-proxy; {http} }}",
        dir.display()
    );
    fs::write(&config, text).expect("a configuration");
    let mut command = Command::new("nginx");
    command.arg("-c").arg(&config).arg("-p").arg(dir);
    let child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nginx");
    wait_for(listens);
    let pid = child.id();
    (Process(child), pid)
}

pub fn adit() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_adit"))
}

/// A relay node. Its limits per address and client are for strangers; here everybody is 127.0.0.1.
pub fn serve(dir: &Path, relay: SocketAddr, admin: SocketAddr, more: &[&str]) -> (Process, u32) {
    let config = dir.join("adit.toml");
    fs::write(
        &config,
        "[tunnels]\nmax_tunnels_per_client = 20000\n[http]\nmax_connections = 19000\nmax_connections_per_address = 19000\n",
    )
    .expect("a configuration");
    let mut command = Command::new(adit());
    command
        .args(["serve", "--log", "warn", "--admin-token", "bench"])
        .args(["--listen", &relay.to_string(), "--admin-listen", &admin.to_string()])
        .arg("--config")
        .arg(config)
        .args(more);
    let child = command.stdout(Stdio::null()).spawn().expect("adit serve");
    wait_for(relay);
    let pid = child.id();
    (Process(child), pid)
}

pub fn create(admin: SocketAddr, client: &str) -> String {
    let mut command = Command::new(adit());
    command.args(["client", "create", client, "--auth", "public", "--admin-token", "bench"]);
    let output = command
        .args(["--relay", &format!("http://{admin}")])
        .output()
        .expect("adit client create");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub fn agent(relay: SocketAddr, client: &str, token: &str, to: SocketAddr) -> (Process, u32) {
    let mut command = Command::new(adit());
    command.args([
        "http",
        &to.to_string(),
        "--client",
        client,
        "--token",
        token,
        "--log",
        "warn",
    ]);
    command.args(["--relay", &format!("http://{relay}")]);
    let child = command.stdout(Stdio::null()).spawn().expect("adit http");
    let pid = child.id();
    (Process(child), pid)
}

/// Takes uploads and answers when each has ended.
pub fn sink() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || take_requests(stream));
        }
    });
    address
}

/// Just enough HTTP for this file's own requests and the agent's: Content-Length bodies, one after the other.
pub fn take_requests(mut stream: TcpStream) -> Option<()> {
    let mut buffer = vec![0; 256 * 1024];
    let mut held = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = held.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            let read = stream.read(&mut buffer).ok().filter(|read| *read > 0)?;
            held.extend_from_slice(&buffer[..read]);
        };
        let head = String::from_utf8_lossy(&held[..end]).to_ascii_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
        let mut left = length.unwrap_or(0u64).saturating_sub((held.len() - end) as u64);
        held.clear();
        while left > 0 {
            let read = stream.read(&mut buffer).ok().filter(|read| *read > 0)?;
            left -= read as u64;
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            .ok()?;
    }
}

pub fn wait_until_answered(target: &Target) {
    let since = Instant::now();
    loop {
        let mut stream = get(target, "/");
        let mut status = [0; 12];
        if stream.read_exact(&mut status).is_ok() && status.ends_with(b"200") {
            return;
        }
        assert!(since.elapsed() < START, "{} does not answer", target.name);
    }
}

pub fn get(target: &Target, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(target.address).expect("it listens");
    let client = target
        .client
        .map(|client| format!("adit-client: {client}\r\n"))
        .unwrap_or_default();
    let head = format!("GET {path} HTTP/1.1\r\nhost: bench\r\n{client}connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("it reads");
    stream
}

/// User and system CPU of a process so far.
pub fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<u64> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split(' ')
        .filter_map(|f| f.parse().ok())
        .collect();
    // utime and stime are fields 14 and 15 (proc(5)); the state before them is no number. A tick is 10 ms.
    let ticks = fields.get(10).copied().unwrap_or(0) + fields.get(11).copied().unwrap_or(0);
    Duration::from_millis(ticks * 10)
}

pub fn cpus(target: &Target) -> Vec<Duration> {
    target.hops.iter().map(|pid| cpu(*pid)).collect()
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

pub fn columns(rounds: &[Vec<f64>]) -> Vec<f64> {
    let width = rounds.first().map_or(0, Vec::len);
    (0..width)
        .map(|column| median(rounds.iter().map(|round| round[column]).collect()))
        .collect()
}

pub fn requests(target: &Target, connections: u32) {
    let rounds: Vec<Vec<f64>> = (0..ROUNDS).map(|_| wrk(target, connections)).collect();
    let figures: Vec<String> = columns(&rounds).iter().map(|value| format!("{value:.0}")).collect();
    println!("| {} | {connections} | {} |", target.name, figures.join(" | "));
}

/// Requests a second, p50 and p99 in µs, then CPU µs a request for each hop.
pub fn wrk(target: &Target, connections: u32) -> Vec<f64> {
    let before = cpus(target);
    let mut command = Command::new("wrk");
    command.args([
        "-t1",
        "--latency",
        &format!("-c{connections}"),
        &format!("-d{SECONDS}s"),
    ]);
    if let Some(client) = target.client {
        command.args(["-H", &format!("adit-client: {client}")]);
    }
    let output = command
        .arg(format!("http://{}/", target.address))
        .output()
        .expect("wrk");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("Non-2xx"), "every answer is a good one: {text}");
    let after = |label: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(label).map(str::trim))
    };
    let count: f64 = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in")?.0.parse().ok())
        .unwrap_or(f64::NAN);
    let mut figures = vec![
        after("Requests/sec:")
            .and_then(|value| value.parse().ok())
            .unwrap_or(f64::NAN),
        after("50%").map_or(f64::NAN, micros),
        after("99%").map_or(f64::NAN, micros),
    ];
    let spent = cpus(target)
        .into_iter()
        .zip(before)
        .map(|(now, then)| (now - then).as_secs_f64());
    figures.extend(spent.map(|seconds| seconds * 1e6 / count));
    figures
}

pub fn micros(text: &str) -> f64 {
    let number = |unit: &str| text.strip_suffix(unit).and_then(|value| value.parse::<f64>().ok());
    number("us")
        .or_else(|| number("ms").map(|ms| ms * 1e3))
        .or_else(|| number("s").map(|s| s * 1e6))
        .unwrap_or(f64::NAN)
}

pub fn transfer(target: &Target, what: &str, run: impl Fn(&Target)) {
    let round = |_| {
        let (before, since) = (cpus(target), Instant::now());
        run(target);
        let mut figures = vec![1024.0 / since.elapsed().as_secs_f64()];
        figures.extend(
            cpus(target)
                .into_iter()
                .zip(before)
                .map(|(now, then)| (now - then).as_secs_f64()),
        );
        figures
    };
    let rounds: Vec<Vec<f64>> = (0..ROUNDS).map(round).collect();
    let figures: Vec<String> = columns(&rounds).iter().map(|value| format!("{value:.2}")).collect();
    println!("| {what}, {} | {} |", target.name, figures.join(" | "));
}

pub fn download(target: &Target, path: &str) {
    let mut stream = get(target, path);
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).expect("it sends") {
            0 => break,
            read => total += read as u64,
        }
    }
    assert!(total >= GIB, "a whole body: {total}");
}

pub fn upload(target: &Target) {
    let mut stream = TcpStream::connect(target.address).expect("it listens");
    let client = target
        .client
        .map(|client| format!("adit-client: {client}\r\n"))
        .unwrap_or_default();
    let head = format!("POST / HTTP/1.1\r\nhost: bench\r\n{client}content-length: {GIB}\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("it reads");
    let chunk = vec![0; 256 * 1024];
    for _ in 0..GIB / chunk.len() as u64 {
        stream.write_all(&chunk).expect("it reads");
    }
    let mut status = [0; 12];
    stream.read_exact(&mut status).expect("an answer");
    assert!(status.ends_with(b"200"), "taken whole");
}

pub fn rss_kib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.trim().split(' ').next()?.parse().ok())
        .unwrap_or(f64::NAN)
}

/// Waits until the processes have stopped working: their CPU time stands still for a while.
pub fn settle(target: &Target) {
    for _ in 0..60 {
        let before = cpus(target);
        std::thread::sleep(Duration::from_millis(500));
        if cpus(target) == before {
            return;
        }
    }
}

/// Opens tunnels by hand, from a process that does nothing else: their memory is the relay's alone.
pub fn open_tunnels(relay: SocketAddr, token: &str, count: usize) -> Vec<TcpStream> {
    use adit::{
        ids::InstanceId,
        wire::hello::{AgentHello, to_frame},
    };
    let open = |_| {
        let mut stream = TcpStream::connect(relay).expect("it listens");
        let head = format!(
            "GET /ws?clientId=idle HTTP/1.1\r\nhost: bench\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             sec-websocket-protocol: adit.v1\r\nauthorization: Bearer {}\r\n\r\n",
            token
        );
        stream.write_all(head.as_bytes()).expect("it reads");
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).expect("an answer");
        assert!(answer.ends_with(b"101"), "switched");
        let mut hello = bytes::BytesMut::new();
        to_frame(&AgentHello {
            instance_id: InstanceId::new(),
            slot: 0,
            generation: 1,
            version: "bench".into(),
        })
        .encode(&mut hello);
        let mut frame = vec![0x82, 0xfe];
        frame.extend_from_slice(&(hello.len() as u16).to_be_bytes());
        frame.extend_from_slice(&[0; 4]); // a mask of zeros
        frame.extend_from_slice(&hello);
        stream.write_all(&frame).expect("it reads");
        stream
    };
    let tunnels: Vec<TcpStream> = (0..count).map(open).collect();
    for mut stream in &tunnels {
        // Once the relay's hello is here, the tunnel is up.
        let mut seen = Vec::new();
        while !seen.windows(7).any(|window| window == b"node_id") {
            let mut more = [0; 512];
            let read = stream.read(&mut more).expect("a hello");
            assert!(read > 0, "the relay keeps the tunnel");
            seen.extend_from_slice(&more[..read]);
        }
    }
    tunnels
}
