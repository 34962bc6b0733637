//! A process is told to end: the first signal drains, the second ends it at once, and both kinds count alike.

use std::{process::Command, time::Duration};

use adit::shutdown;
use tokio::time::timeout;

/// Long for a local signal on a busy machine; reached only if it is lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends this very process a signal. The file has one test, so nobody else hears it.
fn signal_myself(name: &str) {
    let kill = Command::new("sh")
        .arg("-c")
        .arg(format!("kill -{name} {}", std::process::id()))
        .status();
    assert!(kill.expect("a shell").success());
}

#[tokio::test]
async fn first_drain_then_the_end() {
    let shutdown = shutdown::signals().expect("handlers");
    assert!(!shutdown.is_draining());
    signal_myself("TERM");
    timeout(PATIENCE, shutdown.drain()).await.expect("told to drain");
    let early = timeout(Duration::ZERO, shutdown.now()).await;
    assert!(early.is_err(), "the first signal is only a drain");
    signal_myself("INT");
    timeout(PATIENCE, shutdown.now()).await.expect("told to end");
}
