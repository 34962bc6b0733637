//! A deadline that costs a clock reading when it is set anew and a timer only when it is first waited for.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// A moment by which something must have happened. The timer is kept and moved only when it fires too early, so
/// setting and clearing the deadline over and over (once a request, once a write) touches no timer wheel.
#[derive(Debug, Default)]
pub(super) struct Deadline {
    due: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Deadline {
    /// Already running.
    pub fn at(due: Instant) -> Self {
        Self {
            due: Some(due),
            timer: None,
        }
    }

    /// From now on `due`.
    pub fn set(&mut self, due: Instant) {
        self.due = Some(due);
    }

    /// What was waited for has happened.
    pub fn clear(&mut self) {
        self.due = None;
    }

    /// Whether it has passed; starts it at `now + timeout` when it is not running, and wakes the task when it passes.
    pub fn poll_passed(&mut self, cx: &mut Context<'_>, timeout: Duration) -> Poll<()> {
        let due = *self.due.get_or_insert_with(|| Instant::now() + timeout);
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if timer.deadline() > due {
            timer.as_mut().reset(due);
        }
        while timer.as_mut().poll(cx).is_ready() {
            if timer.deadline() >= due {
                return Poll::Ready(());
            }
            timer.as_mut().reset(due);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const SHORT: Duration = Duration::from_secs(10);
    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn it_passes_after_the_timeout_and_not_before_when_it_was_moved() {
        let started = Instant::now();
        let mut deadline = Deadline::default();
        let polled = poll_fn(|cx| Poll::Ready(deadline.poll_passed(cx, SHORT))).await;
        assert!(polled.is_pending());
        deadline.set(started + LONG);
        poll_fn(|cx| deadline.poll_passed(cx, SHORT)).await;
        assert_eq!(started.elapsed(), LONG, "the timer at 10 s was moved, not believed");
        deadline.clear();
        poll_fn(|cx| deadline.poll_passed(cx, SHORT)).await;
        assert_eq!(started.elapsed(), LONG + SHORT);
    }

    #[tokio::test(start_paused = true)]
    async fn it_can_be_moved_earlier() {
        let started = Instant::now();
        let mut deadline = Deadline::at(started + LONG);
        let polled = poll_fn(|cx| Poll::Ready(deadline.poll_passed(cx, LONG))).await;
        assert!(polled.is_pending());
        deadline.set(started + SHORT);
        poll_fn(|cx| deadline.poll_passed(cx, LONG)).await;
        assert_eq!(started.elapsed(), SHORT);
    }
}
