//! `cargo bench --bench moosicbox`: what a request and a download cost through a MoosicBox server's tunnel, beside an adit
//! agent's on the same relay, in one run. MoosicBox's own sender takes some 4 ms of CPU a request and cannot load a relay:
//! this one is a fast one, in this process.
//!
//! Needs `wrk` and `nginx` (Debian packages) and the release binary. Loopback only; every loop is bounded.

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use common::*;
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

/// What a sender puts in a packet of a long answer, bytes.
const PIECE: usize = 60_000;
const SMALL: &[u8] = b"hello, this is 24 bytes\n";

fn main() {
    need(&["wrk", "nginx"]);
    let dir = tempfile::tempdir().expect("a directory");
    let [upstream, relay, admin] = std::array::from_fn(|_| free_port());
    fs::create_dir(dir.path().join("www")).expect("a directory");
    fs::File::create(dir.path().join("www/big"))
        .and_then(|big| big.set_len(GIB))
        .expect("a sparse file");
    let root = dir.path().join("www");
    let files = format!(
        "server {{ listen {upstream} backlog=4096; tcp_nodelay on; root {}; \
         location = / {{ return 200 \"hello, this is 24 bytes\\n\"; }} }}",
        root.display()
    );
    let (_upstream, _) = nginx(dir.path(), "upstream", &files, upstream);
    let database = format!("sqlite:{}", dir.path().join("adit.db").display());
    let (_serve, relay_pid) = serve(dir.path(), relay, admin, &["--database-url", &database]);
    let (_agent, agent_pid) = agent(relay, "home", &create(admin, "home"), upstream);
    start_sender(relay, &signature(relay, &create(admin, "music")));
    let adit = Target {
        name: "adit",
        address: relay,
        client: Some("home"),
        hops: vec![relay_pid, agent_pid],
    };
    let moosicbox = Target {
        name: "MoosicBox",
        address: relay,
        client: Some("music"),
        hops: vec![relay_pid, std::process::id()],
    };
    println!("| dialect | connections | requests/s | p50 µs | p99 µs | CPU µs a request: relay | agent or sender |");
    println!("|---|---|---|---|---|---|---|");
    for target in [&adit, &moosicbox] {
        wait_until_answered(target);
    }
    for connections in [1, 16, 64] {
        for target in [&adit, &moosicbox] {
            requests(target, connections);
        }
    }
    println!("\n| one download of 1 GiB | MiB/s | CPU s a GiB: relay | agent or sender |\n|---|---|---|---|");
    for target in [&adit, &moosicbox] {
        transfer(target, "download", |target| download(target, "/big"));
    }
}

/// What the client's server gets with its access token.
fn signature(relay: SocketAddr, token: &str) -> String {
    let mut stream = TcpStream::connect(relay).expect("it listens");
    let head = format!(
        "POST /auth/signature-token?clientId=music HTTP/1.1\r\nhost: bench\r\nauthorization: {token}\r\n\
         content-length: 0\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let token = answer
        .split("\"token\":\"")
        .nth(1)
        .and_then(|rest| rest.split('"').next());
    token.unwrap_or_else(|| panic!("no signature: {answer}")).to_owned()
}

/// Answers requests in this process, for as long as it runs.
fn start_sender(relay: SocketAddr, signature: &str) {
    let url = format!("ws://{relay}/ws?clientId=music&sender=true&signature={signature}");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(send_for_ever(url));
    });
}

async fn send_for_ever(url: String) {
    let stream = tokio::net::TcpStream::connect(url.split('/').nth(2).expect("an address")).await;
    let stream = stream.expect("it listens");
    stream.set_nodelay(true).expect("a socket");
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.expect("a tunnel");
    while let Some(Ok(message)) = socket.next().await {
        let Message::Text(text) = message else { continue };
        let request: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let (Some(id), "HTTP") = (
            request["request_id"].as_u64(),
            request["type"].as_str().unwrap_or_default(),
        ) else {
            continue;
        };
        if request["path"] != "big" {
            socket.send(packet(id, 1, true, SMALL)).await.expect("a tunnel");
            continue;
        }
        let (piece, count) = (vec![0; PIECE], GIB.div_ceil(PIECE as u64) as u32);
        for number in 1..=count {
            socket
                .send(packet(id, number, number == count, &piece))
                .await
                .expect("a tunnel");
        }
    }
}

fn packet(id: u64, number: u32, last: bool, body: &[u8]) -> Message {
    let mut frame = Vec::with_capacity(body.len() + 64);
    frame.extend(id.to_be_bytes());
    frame.extend(number.to_be_bytes());
    frame.push(last.into());
    if number == 1 {
        frame.extend(200u16.to_be_bytes());
        frame.extend(2u32.to_be_bytes());
        frame.extend(b"{}");
    }
    frame.extend(body);
    Message::Binary(frame.into())
}
