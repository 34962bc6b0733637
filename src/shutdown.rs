//! How a process is told to end: first to finish what it holds, then at once.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The two words that end a process. Clones hear the same; a word once said stays said.
///
/// Tasks are owned by `tokio::task::JoinSet` or `tokio_util::task::TaskTracker`; this only tells them.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    drain: CancellationToken,
    now: CancellationToken,
}

impl Shutdown {
    /// Nobody has asked to end yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says: take nothing new, finish what is held, and end.
    pub fn begin_drain(&self) {
        self.drain.cancel();
    }

    /// Says: end at once. Includes [`Shutdown::begin_drain`].
    pub fn end_now(&self) {
        self.drain.cancel();
        self.now.cancel();
    }

    /// Waits until the process is asked to end, gently or not. Cancel-safe.
    pub async fn drain(&self) {
        self.drain.cancelled().await;
    }

    /// Waits until the process is asked to end at once. Cancel-safe.
    pub async fn now(&self) {
        self.now.cancelled().await;
    }

    /// Whether [`Shutdown::drain`] would return.
    pub fn is_draining(&self) -> bool {
        self.drain.is_cancelled()
    }
}

/// A [`Shutdown`] led by the process's signals: the first SIGTERM or SIGINT drains, the second ends at once.
///
/// Its task ends with the second signal or with the runtime. To be called inside a tokio runtime; the error is the
/// system's, when it refuses a signal handler.
pub fn signals() -> io::Result<Shutdown> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = Shutdown::new();
    let told = shutdown.clone();
    tokio::spawn(async move {
        for say in [Shutdown::begin_drain, Shutdown::end_now] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            say(&told);
        }
    });
    Ok(shutdown)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn drain_comes_before_the_end() {
        let shutdown = Shutdown::new();
        let heard = shutdown.clone();
        assert!(heard.drain().now_or_never().is_none() && !heard.is_draining());
        shutdown.begin_drain();
        heard.drain().await;
        assert!(heard.is_draining() && heard.now().now_or_never().is_none());
        shutdown.end_now();
        heard.now().await;
    }

    #[tokio::test]
    async fn the_end_is_a_drain_too() {
        let shutdown = Shutdown::new();
        shutdown.end_now();
        shutdown.drain().await;
        shutdown.now().await;
    }
}
