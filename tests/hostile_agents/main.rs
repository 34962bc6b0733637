//! Agents, upstreams and tenants that lie, break rules or fight: nobody else is touched. Rows A1 to A6 and A9 of the table
//! of hostile inputs (A8 is `secrets`).

#[path = "../harness/mod.rs"]
mod harness;

mod answers;
mod frames;
mod names;

use harness::TestRelay;
use harness::raw::{RawAnswer, send_raw};

/// A request for a client; read to the close.
async fn ask(relay: &TestRelay, client: &str, line: &str) -> RawAnswer {
    send_raw(relay.address, get(client, line)).await
}

fn get(client: &str, line: &str) -> String {
    format!("{line} HTTP/1.1\r\nhost: relay\r\nadit-client: {client}\r\nconnection: close\r\n\r\n")
}

/// The page of metrics.
async fn metrics(relay: &TestRelay) -> String {
    let request = "GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let answer = send_raw(relay.admin, request).await;
    assert_eq!(answer.status(), 200, "{answer:?}");
    String::from_utf8_lossy(&answer.bytes).into_owned()
}

/// Waits until a line is on the page of metrics.
async fn counted(relay: &TestRelay, line: &str) {
    harness::within(line, async {
        let says = async |relay| metrics(relay).await.contains(&format!("{line}\n"));
        // Tunnels are counted where they are.
        let node = relay.peer.as_deref().unwrap_or(relay);
        while !says(node).await {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
