//! Requests that a MoosicBox server (the *sender*) is answering: each waits for its packets here, in any order and within
//! bounds. Nothing slows a sender down but its socket not being read: what a downstream is behind by is spooled, and who is
//! behind by more than there is room for is given up.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::spool::{Budget, Spool};
use crate::{
    exchange::Exchange,
    wire::{
        frame::Code,
        moosicbox::{OutOfOrder, Packet, Piece, RawHead, Reassembler},
    },
};

/// What may wait for a packet that is missing, bytes: what a sender has on its way out of order, and that is little.
const MAX_EARLY: usize = 1024 * 1024;

/// The answers that are on their way, by request id.
pub(super) struct Requests {
    budget: Arc<Budget>,
    /// Guards the map; held for a look-up.
    answers: Mutex<HashMap<u64, Arc<Answer>>>,
}

/// One answer as it comes.
pub(super) struct Answer {
    /// What it is the answer of.
    exchange: Arc<Exchange>,
    /// Guards what has come of it; held to put a packet in or take a piece out.
    state: Mutex<State>,
    /// More has come, or nothing will.
    came: Notify,
    /// Something was taken.
    taken: Notify,
}

struct State {
    packets: Reassembler,
    head: Option<RawHead>,
    body: Spool,
    ended: bool,
    failed: Option<Code>,
}

impl Requests {
    /// None yet. What slow downstreams have not taken is kept in files within this budget.
    pub fn new(budget: Arc<Budget>) -> Arc<Self> {
        Arc::new(Self {
            budget,
            answers: Mutex::default(),
        })
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<u64, Arc<Answer>>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new request, under an id that no other has now. The guard takes it out again.
    pub fn begin(self: &Arc<Self>, exchange: Arc<Exchange>) -> InFlight {
        let answer = Arc::new(Answer {
            exchange,
            state: Mutex::new(State {
                packets: Reassembler::new(MAX_EARLY),
                head: None,
                body: Spool::new(self.budget.clone()),
                ended: false,
                failed: None,
            }),
            came: Notify::new(),
            taken: Notify::new(),
        });
        let mut answers = self.answers();
        let id = loop {
            // 0 is everybody's.
            let id = rand::random::<u64>().max(1);
            if !answers.contains_key(&id) {
                break id;
            }
        };
        answers.insert(id, answer.clone());
        drop(answers);
        InFlight {
            id,
            answer,
            requests: self.clone(),
        }
    }

    /// A packet has come. Returns its answer if that now holds all it may: read no more before something is taken.
    pub fn take(&self, packet: Packet) -> Option<Arc<Answer>> {
        // One that is not known was given up, and the sender has not heard of it yet.
        let answer = self.answers().get(&packet.request_id).cloned()?;
        let is_full = answer.push(packet);
        is_full.then_some(answer)
    }

    /// One has failed; all have, when the sender is gone.
    pub fn fail(&self, which: Option<u64>, code: Code) {
        let doomed: Vec<_> = {
            let answers = self.answers();
            let named = answers.iter().filter(|(id, _)| which.is_none_or(|which| which == **id));
            named.map(|(_, answer)| answer.clone()).collect()
        };
        doomed.iter().for_each(|answer| answer.fail(code));
    }
}

impl Answer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when it is full now.
    fn push(&self, packet: Packet) -> bool {
        let taken = self.state().take(packet);
        self.came.notify_one();
        taken.unwrap_or_else(|error| {
            tracing::warn!(request.id = %self.exchange.id, %error, "a MoosicBox server's answer cannot be put together");
            self.fail(Code::UpstreamFailed);
            false
        })
    }

    /// Nothing more of it is of use: what it holds is dropped, and its exchange ends.
    pub fn fail(&self, code: Code) {
        {
            let mut state = self.state();
            state.failed.get_or_insert(code);
            state.drop_all();
        }
        self.exchange.reset(code);
        self.came.notify_one();
        self.taken.notify_one();
    }

    /// Waits until there is room again, or nobody wants more.
    pub async fn has_room(&self) {
        loop {
            {
                let state = self.state();
                if !state.body.is_full() || state.failed.is_some() {
                    return;
                }
            }
            self.taken.notified().await;
        }
    }

    async fn next(&self) -> Result<Piece, Code> {
        loop {
            if let Some(piece) = self.state().next()? {
                self.taken.notify_one();
                return Ok(piece);
            }
            self.came.notified().await;
        }
    }
}

impl State {
    /// Takes a packet, and what has become readable by it. True when it is full now.
    fn take(&mut self, packet: Packet) -> Result<bool, OutOfOrder> {
        if self.failed.is_some() {
            return Ok(false);
        }
        self.packets.push(packet)?;
        while let Some(piece) = self.packets.next_piece() {
            match piece {
                Piece::Head(head) => self.head = Some(head),
                Piece::Body(body) => self.body.push(body),
                Piece::End => self.ended = true,
            }
        }
        Ok(self.body.is_full())
    }

    fn next(&mut self) -> Result<Option<Piece>, Code> {
        if let Some(head) = self.head.take() {
            return Ok(Some(Piece::Head(head)));
        }
        let body = self.body.pop().map_err(|error| {
            tracing::error!(%error, "what a slow downstream has not taken cannot be read again");
            Code::UpstreamFailed
        })?;
        match (body, self.failed) {
            (Some(body), _) => Ok(Some(Piece::Body(body))),
            (None, Some(code)) => Err(code),
            (None, None) => Ok(self.ended.then_some(Piece::End)),
        }
    }

    fn drop_all(&mut self) {
        self.packets = Reassembler::new(0);
        self.head = None;
        self.body.clear();
    }
}

/// A request that a sender was, or is about to be, asked. Dropping it forgets it.
pub(super) struct InFlight {
    /// Its name toward the sender.
    pub id: u64,
    answer: Arc<Answer>,
    requests: Arc<Requests>,
}

impl InFlight {
    /// The next piece of the answer.
    pub async fn next(&self) -> Result<Piece, Code> {
        self.answer.next().await
    }

    /// Whether the sender has said all, read or not.
    pub fn has_ended(&self) -> bool {
        self.answer.state().ended
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.requests.answers().remove(&self.id);
        self.answer.taken.notify_one(); // whoever waits for it to be taken need not
        let mut state = self.answer.state();
        state.failed.get_or_insert(Code::Cancelled);
        state.drop_all();
    }
}
