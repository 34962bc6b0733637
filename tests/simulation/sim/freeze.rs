//! A process that stands still, and goes on later where it was; one that does not stand still ends.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

/// A node is polled some 20,000 times a seed.
const MOST_POLLS: u64 = 2_000_000;

/// Stops what it wraps.
#[derive(Clone, Default)]
pub struct Freezer(Arc<Mutex<Frost>>);

#[derive(Default)]
struct Frost {
    polls: u64,
    is_frozen: bool,
    waiting: Vec<Waker>,
}

impl Freezer {
    pub fn freeze(&self) {
        self.0.lock().expect("no panic").is_frozen = true;
    }

    pub fn thaw(&self) {
        let mut frost = self.0.lock().expect("no panic");
        frost.is_frozen = false;
        frost.waiting.drain(..).for_each(Waker::wake);
    }

    pub fn is_frozen(&self) -> bool {
        self.0.lock().expect("no panic").is_frozen
    }

    /// A future that moves only while nothing is frozen.
    pub fn wrap<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        let (freezer, mut future) = (self.clone(), Box::pin(future));
        std::future::poll_fn(move |cx| freezer.poll(future.as_mut(), cx))
    }

    /// Whether what is wrapped was polled more often than any cluster has a reason to: it turns without time passing.
    pub fn spins(&self) -> bool {
        self.0.lock().expect("no panic").polls > MOST_POLLS
    }

    fn poll<F: Future>(&self, future: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<F::Output> {
        {
            let mut frost = self.0.lock().expect("no panic");
            frost.polls += 1;
            if frost.polls > MOST_POLLS {
                return Poll::Pending;
            }
            if frost.is_frozen {
                frost.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
        }
        future.poll(cx)
    }
}
