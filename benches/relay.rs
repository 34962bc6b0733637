//! `cargo bench --bench relay`: what a tunnel costs, beside two nginx proxies in a row (the same number of hops), in one run.
//!
//! Needs `wrk` and `nginx` (Debian packages) and the release binary. Loopback only; every loop is bounded. Figures are
//! medians of [`ROUNDS`] rounds; ratios within one run are what counts, because machines differ and are shared.

mod common;

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::Path,
};

use common::*;

/// Idle tunnels and stalled downloads held at once.
const TUNNELS: usize = 2_000;
const STALLED: usize = 500;

fn main() {
    need(&["wrk", "nginx"]);
    let dir = tempfile::tempdir().expect("a directory");
    let bench = Bench::start(dir.path());
    println!("| what | connections | requests/s | p50 µs | p99 µs | CPU µs a request, 1st hop | 2nd hop |");
    println!("|---|---|---|---|---|---|---|");
    for connections in [1, 16, 64] {
        for target in [&bench.direct, &bench.nginx, &bench.adit] {
            requests(target, connections);
        }
    }
    println!("\n| one transfer of 1 GiB | MiB/s | CPU s a GiB, 1st hop | 2nd hop |\n|---|---|---|---|");
    for target in [&bench.direct, &bench.nginx, &bench.adit] {
        transfer(target, "download", |target| download(target, "/big"));
    }
    for target in [&bench.direct_sink, &bench.adit_sink] {
        transfer(target, "upload", upload);
    }
    memory(&bench);
}

struct Bench {
    direct: Target,
    nginx: Target,
    adit: Target,
    direct_sink: Target,
    adit_sink: Target,
    relay_pid: u32,
    /// Of the client whose tunnels stay idle.
    idle_token: String,
    _processes: Vec<Process>,
}

impl Bench {
    fn start(dir: &Path) -> Self {
        let [upstream, first, second, relay, admin] = std::array::from_fn(|_| free_port());
        fs::create_dir(dir.join("www")).expect("a directory");
        fs::File::create(dir.join("www/big"))
            .and_then(|big| big.set_len(GIB))
            .expect("a sparse file");
        let root = dir.join("www");
        let files = format!(
            "server {{ listen {upstream} backlog=4096; tcp_nodelay on; root {}; \
             location = / {{ return 200 \"hello, this is 24 bytes\\n\"; }} }}",
            root.display()
        );
        let proxy = |listen: SocketAddr, to: SocketAddr| {
            format!(
                "upstream u {{ server {to}; keepalive 256; keepalive_requests 100000000; }} \
                 server {{ listen {listen} backlog=4096; tcp_nodelay on; location / {{ proxy_pass http://u; \
                 proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_max_temp_file_size 0; }} }}"
            )
        };
        let (nginx_up, up_pid) = nginx(dir, "upstream", &files, upstream);
        let (nginx_2, second_pid) = nginx(dir, "second", &proxy(second, upstream), second);
        let (nginx_1, first_pid) = nginx(dir, "first", &proxy(first, second), first);
        let database = format!("sqlite:{}", dir.join("adit.db").display());
        let sink = sink();
        let (serve, relay_pid) = serve(dir, relay, admin, &["--database-url", &database]);
        let (agent_process, agent_pid) = agent(relay, "home", &create(admin, "home"), upstream);
        let (sink_process, sink_pid) = agent(relay, "sink", &create(admin, "sink"), sink);
        let target = |name, address, client, hops| Target {
            name,
            address,
            client,
            hops,
        };
        let bench = Self {
            direct: target("direct", upstream, None, vec![up_pid]),
            nginx: target("nginx ×2", first, None, vec![first_pid, second_pid]),
            adit: target("adit", relay, Some("home"), vec![relay_pid, agent_pid]),
            direct_sink: target("direct", sink, None, vec![]),
            adit_sink: target("adit", relay, Some("sink"), vec![relay_pid, sink_pid]),
            relay_pid,
            idle_token: create(admin, "idle"),
            _processes: vec![nginx_up, nginx_2, nginx_1, agent_process, sink_process, serve],
        };
        wait_until_answered(&bench.adit);
        wait_until_answered(&bench.adit_sink);
        bench
    }
}

/// Resident memory of the relay per idle tunnel, and of relay and agent per download that nobody reads.
fn memory(bench: &Bench) {
    println!("\n| resident memory | KiB each |\n|---|---|");
    let before = rss_kib(bench.relay_pid);
    let tunnels = open_tunnels(bench.adit.address, &bench.idle_token, TUNNELS);
    println!(
        "| relay, an idle tunnel (of {TUNNELS}) | {:.1} |",
        (rss_kib(bench.relay_pid) - before) / TUNNELS as f64
    );
    drop(tunnels);
    let before: Vec<f64> = bench.adit.hops.iter().map(|pid| rss_kib(*pid)).collect();
    let stalled: Vec<TcpStream> = (0..STALLED).map(|_| get(&bench.adit, "/big")).collect();
    settle(&bench.adit);
    for (hop, (pid, before)) in ["relay", "agent"].iter().zip(bench.adit.hops.iter().zip(before)) {
        println!(
            "| {hop}, a stalled download (of {STALLED}) | {:.1} |",
            (rss_kib(*pid) - before) / STALLED as f64
        );
    }
    drop(stalled);
}
