//! A connection between an agent and a node: late, stalled, silent, or cut, as the world wants it.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

/// What a kernel holds of what was written and not read, bytes.
const BUFFER: usize = 64 * 1024;

/// Both directions of a connection.
pub struct Cable {
    state: Mutex<State>,
}

struct State {
    lines: [Line; 2],
    latency: Duration,
    /// Nothing arrives before this.
    stalled_until: Instant,
    is_cut: bool,
    /// What is written vanishes, and nobody notices.
    is_silent: bool,
}

#[derive(Default)]
struct Line {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    size: usize,
    due: Option<Instant>,
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// One end of it.
pub struct End {
    cable: Arc<Cable>,
    side: usize,
    timer: Pin<Box<Sleep>>,
}

impl Cable {
    pub fn new(latency: Duration) -> (Arc<Self>, End, End) {
        let now = Instant::now();
        let cable = Arc::new(Self {
            state: Mutex::new(State {
                lines: Default::default(),
                latency,
                stalled_until: now,
                is_cut: false,
                is_silent: false,
            }),
        });
        let end = |side| End {
            cable: cable.clone(),
            side,
            timer: Box::pin(tokio::time::sleep_until(now)),
        };
        (cable.clone(), end(0), end(1))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    /// Both ends hear of it; what was on its way is lost.
    pub fn cut(&self) {
        let mut state = self.state();
        state.is_cut = true;
        for line in &mut state.lines {
            line.pieces.clear();
            line.wake();
        }
    }

    /// Neither end hears of it.
    pub fn fall_silent(&self) {
        let mut state = self.state();
        state.is_silent = true;
        state.lines.iter_mut().for_each(|line| line.pieces.clear());
    }

    pub fn stall(&self, time: Duration) {
        self.state().stalled_until = Instant::now() + time;
    }

    pub fn is_over(&self) -> bool {
        let state = self.state();
        state.is_cut || state.lines.iter().any(|line| line.ended)
    }
}

impl Line {
    fn wake(&mut self) {
        [self.reader.take(), self.writer.take()]
            .into_iter()
            .flatten()
            .for_each(Waker::wake);
    }
}

impl AsyncRead for End {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let cable = self.cable.clone();
        let mut state = cable.state();
        if state.is_cut {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let line = &mut state.lines[1 - self.side];
        let now = Instant::now();
        match line.pieces.front_mut() {
            Some((due, piece)) if *due <= now => {
                let length = piece.len().min(buf.remaining());
                buf.put_slice(&piece[..length]);
                piece.drain(..length);
                if piece.is_empty() {
                    line.pieces.pop_front();
                }
                line.size -= length;
                line.writer.take().into_iter().for_each(Waker::wake);
                Poll::Ready(Ok(()))
            }
            Some((due, _)) => {
                let due = *due;
                line.reader = Some(cx.waker().clone());
                drop(state);
                self.timer.as_mut().reset(due);
                if self.timer.as_mut().poll(cx).is_ready() {
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
            None if line.ended => Poll::Ready(Ok(())),
            None => {
                line.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.cable.state();
        if state.is_cut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let (silent, earliest) = (state.is_silent, state.stalled_until.max(Instant::now() + state.latency));
        let line = &mut state.lines[self.side];
        if line.size >= BUFFER {
            line.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let length = bytes.len().min(BUFFER - line.size);
        line.size += length;
        if !silent {
            let due = line.due.map_or(earliest, |due| due.max(earliest));
            line.due = Some(due);
            line.pieces.push_back((due, bytes[..length].to_vec()));
            line.reader.take().into_iter().for_each(Waker::wake);
        }
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut state = self.cable.state();
        if !state.is_silent {
            state.lines[self.side].ended = true;
            state.lines.iter_mut().for_each(Line::wake);
        }
    }
}
