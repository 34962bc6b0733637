//! One client, as a node's fan-out knows it: what this node said to its subscribers, and who subscribes here. Speaks to the
//! other nodes through the bus, but never waits.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use super::{
    position::Position,
    ring::Ring,
    sources::{Message, Sources},
    subscriber::{Delivery, Left, Subscriber},
};
use crate::{
    cluster::{
        bus::{Channel, Receipt},
        letter::{Audience, Letter, Part, Standing},
        peer::{Listening, Peers},
    },
    ids::{ClientId, NodeId},
    telemetry::{GapEnd, Metrics, Unsubscribed},
};

/// Questions to a client's nodes have at least this between them.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// Whoever begins to listen asks where the others stand, and again after so long: a question may be lost.
const ASK_AGAIN: [Duration; 3] = [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(5)];
/// What one question is answered with, bytes: the next asks for the rest.
const MAX_ANSWER: usize = 512 * 1024;
/// Subscribers that come back to different positions, at a time; more are told that they have missed something.
const MAX_COHORTS: usize = 64;

/// What a client's state needs to speak: who it is, whose, and when.
pub(super) struct Around<'a> {
    pub peers: &'a Arc<Peers>,
    pub metrics: &'a Metrics,
    pub client_id: &'a ClientId,
    pub now: Duration,
}

/// See the module.
#[derive(Default)]
pub(super) struct Client {
    ring: Option<Ring>,
    /// While there is a ring: whoever misses something of it asks on the client's channel.
    heard: Option<Listening>,
    listening: Option<Here>,
}

/// There is a subscriber here.
struct Here {
    _listening: Listening,
    /// Those who have all that this node has, and behind it those who still wait for something older.
    cohorts: Vec<Cohort>,
    since: Duration,
    /// How many of [`ASK_AGAIN`] were asked.
    asked: usize,
    asked_at: Option<Duration>,
    ask: bool,
}

/// Subscribers that have come equally far.
struct Cohort {
    sources: Sources,
    /// Where it began, while nothing has come since.
    from: Option<Position>,
    subscribers: HashMap<u64, Arc<Subscriber>>,
    was_behind: bool,
    is_lost: bool,
}

impl Cohort {
    fn new(sources: Sources, from: Option<Position>) -> Self {
        Self {
            sources,
            from,
            subscribers: HashMap::new(),
            was_behind: false,
            is_lost: false,
        }
    }

    fn on_part(&mut self, source: u64, part: &Part, around: &Around<'_>) {
        let mut whole = Vec::new();
        self.is_lost |= self.sources.on_part(source, part, around.now, &mut whole).is_err();
        self.deliver(whole, around);
    }

    fn on_standing(&mut self, source: u64, standing: Standing, around: &Around<'_>) {
        let mut whole = Vec::new();
        self.is_lost |= self
            .sources
            .on_standing(source, standing, around.now, &mut whole)
            .is_err();
        self.deliver(whole, around);
    }

    fn deliver(&mut self, whole: Vec<Message>, around: &Around<'_>) {
        if !whole.is_empty() {
            self.from = None; // whoever comes from there now would miss these
        }
        for Message { audience, body } in whole {
            let delivery = Delivery::new(self.sources.position(), body);
            let (mut slow, mut reached) = (Vec::new(), 0);
            let mut give = |subscriber: &Arc<Subscriber>| match subscriber.push(&delivery) {
                true => reached += 1,
                false => slow.push(subscriber.conn_id),
            };
            match &*audience {
                Audience::All => self.subscribers.values().for_each(&mut give),
                Audience::Only(ids) => ids.iter().filter_map(|id| self.subscribers.get(id)).for_each(&mut give),
                Audience::AllBut(ids) => {
                    let others = self.subscribers.values().filter(|one| !ids.contains(&one.conn_id));
                    others.for_each(&mut give);
                }
            }
            around.metrics.delivered(reached);
            for conn_id in slow {
                self.subscribers.remove(&conn_id);
                around.metrics.unsubscribed(Left::TooSlow.counted());
            }
        }
    }

    fn close(&mut self, left: Left, metrics: &Metrics) {
        for (_, subscriber) in self.subscribers.drain() {
            match left {
                Left::ClientGone => subscriber.cut(left),
                _ => subscriber.end(left),
            }
            metrics.unsubscribed(left.counted());
        }
    }
}

impl Client {
    // --- what this node says ----------------------------------------------------------------------------------------

    /// Numbers a message, gives it to the subscribers here, and sends it to the other nodes. `began`: where numbers begin
    /// if this is the first.
    pub fn publish(
        &mut self,
        audience: Audience,
        body: &Bytes,
        began: u64,
        around: &Around<'_>,
    ) -> (Position, Vec<Receipt>) {
        let source = around.peers.node_id().short();
        let begins = self.ring.is_none();
        let ring = self.ring.get_or_insert_with(|| Ring::new(began, around.now));
        let parts = ring.say(audience, body, around.now);
        let position = Position::of([(source, ring.last())].into_iter());
        if begins {
            self.heard = Some(around.peers.listen(around.client_id));
            self.each(|cohort| cohort.sources.begin_at(source, began, around.now));
        }
        let alone = around.peers.bus().is_alone();
        let mut receipts = Vec::new();
        for part in parts {
            self.each(|cohort| cohort.on_part(source, &part, around));
            if !alone {
                receipts.push(said(part, Channel::Client(around.client_id.clone()), around));
            }
        }
        self.settle(around);
        (position, receipts)
    }

    /// A node asks where this one stands, and for what it misses.
    pub fn answer(&self, to: NodeId, known: &[(u64, u64)], around: &Around<'_>) {
        let Some(ring) = &self.ring else { return };
        stands(ring, Channel::Node(to), around);
        let source = around.peers.node_id().short();
        let has = known.iter().find(|(of, _)| *of == source).map(|(_, seq)| *seq);
        for part in has.into_iter().flat_map(|seq| ring.behind(seq, MAX_ANSWER)) {
            said(part.clone(), Channel::Node(to), around);
        }
    }

    // --- what others say --------------------------------------------------------------------------------------------

    /// A part came.
    pub fn on_part(&mut self, from: NodeId, part: &Part, around: &Around<'_>) {
        self.each(|cohort| cohort.on_part(from.short(), part, around));
        self.settle(around);
    }

    /// A node says where it stands.
    pub fn on_standing(&mut self, from: NodeId, standing: Standing, around: &Around<'_>) {
        self.each(|cohort| cohort.on_standing(from.short(), standing, around));
        self.settle(around);
    }

    /// Messages may have been missed, both ways.
    pub fn on_interrupted(&mut self, now: Duration) {
        if let Some(ring) = &mut self.ring {
            ring.repeat(now);
        }
        if let Some(here) = &mut self.listening {
            here.ask = true;
        }
    }

    /// Time passed.
    pub fn on_tick(&mut self, around: &Around<'_>) {
        let alone = around.peers.bus().is_alone();
        if let Some(ring) = &mut self.ring
            && ring.on_tick(around.now)
            && !alone
        {
            stands(ring, Channel::Client(around.client_id.clone()), around);
        }
        if let Some(here) = &mut self.listening {
            here.on_tick(around.now);
            self.settle(around);
        }
    }

    // --- who subscribes here ----------------------------------------------------------------------------------------

    /// One more subscriber, from now on or from behind a position.
    pub fn admit(&mut self, subscriber: Arc<Subscriber>, from: Option<Position>, around: &Around<'_>) {
        let here = self
            .listening
            .get_or_insert_with(|| Here::begin(self.ring.as_ref(), around));
        here.forget(subscriber.conn_id, |twice| {
            twice.end(Left::Gap);
            around.metrics.unsubscribed(Left::Gap.counted());
        });
        match from {
            None => here.cohorts[0].add(subscriber),
            Some(from) => here.recover(subscriber, from, self.ring.as_ref(), around),
        }
        self.settle(around);
    }

    /// A subscriber has gone by itself, if it was still here.
    pub fn leave(&mut self, subscriber: &Arc<Subscriber>, around: &Around<'_>) {
        let Some(here) = &mut self.listening else { return };
        let is_it = |found: Option<&Arc<Subscriber>>| found.is_some_and(|found| Arc::ptr_eq(found, subscriber));
        for cohort in &mut here.cohorts {
            if is_it(cohort.subscribers.get(&subscriber.conn_id)) {
                cohort.subscribers.remove(&subscriber.conn_id);
                around.metrics.unsubscribed(Unsubscribed::Itself);
            }
        }
        self.settle(around);
    }

    /// Ends all subscriptions.
    pub fn end(&mut self, left: Left, around: &Around<'_>) {
        self.each(|cohort| cohort.close(left, around.metrics));
        self.settle(around);
    }

    /// What was said is not said again: whoever has the client's name next is somebody else.
    pub fn forget(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.forget();
        }
    }

    /// Whether there is nothing but numbers, and for how long nothing was said.
    pub fn is_idle(&self, now: Duration) -> Option<Duration> {
        match (&self.listening, &self.ring) {
            (Some(_), _) => None,
            (None, Some(ring)) => Some(ring.quiet(now)),
            (None, None) => Some(Duration::MAX),
        }
    }

    /// The last number given.
    pub fn last(&self) -> u64 {
        self.ring.as_ref().map_or(0, Ring::last)
    }

    fn each(&mut self, act: impl FnMut(&mut Cohort)) {
        self.listening
            .iter_mut()
            .flat_map(|here| &mut here.cohorts)
            .for_each(act);
    }

    /// Draws the conclusions of what happened: the lost are closed, the level joined, what is missing is asked for, and a
    /// node without subscribers stops listening.
    fn settle(&mut self, around: &Around<'_>) {
        let Some(here) = &mut self.listening else { return };
        here.close_lost(self.ring.as_ref(), around);
        here.join_level();
        if here.cohorts.iter().all(|cohort| cohort.subscribers.is_empty()) {
            self.listening = None;
            return;
        }
        here.count_repairs(around.metrics);
        here.ask_if_due(around);
    }
}

impl Here {
    fn begin(ring: Option<&Ring>, around: &Around<'_>) -> Self {
        Self {
            _listening: around.peers.listen(around.client_id),
            cohorts: vec![Self::main(ring, around)],
            since: around.now,
            asked: 0,
            asked_at: None,
            ask: false,
        }
    }

    /// The cohort of those who begin now.
    fn main(ring: Option<&Ring>, around: &Around<'_>) -> Cohort {
        let mut sources = Sources::from_now();
        if let Some(ring) = ring {
            sources.begin_at(around.peers.node_id().short(), ring.last(), around.now);
        }
        Cohort::new(sources, None)
    }

    fn on_tick(&mut self, now: Duration) {
        let listened = now.saturating_sub(self.since);
        match ASK_AGAIN.get(self.asked) {
            Some(after) => self.ask |= listened >= *after,
            // Whoever said something before has been heard of by now.
            None if listened > ASK_AGAIN[ASK_AGAIN.len() - 1] + ASK_AGAIN[1] => self.cohorts[0].sources.be_strict(),
            None => {}
        }
        for cohort in &mut self.cohorts {
            cohort.is_lost |= cohort.sources.is_overdue(now);
        }
    }

    /// A subscriber that comes back.
    fn recover(&mut self, subscriber: Arc<Subscriber>, from: Position, ring: Option<&Ring>, around: &Around<'_>) {
        let same = self
            .cohorts
            .iter_mut()
            .find(|cohort| cohort.from.as_ref() == Some(&from));
        if let Some(cohort) = same {
            return cohort.add(subscriber);
        }
        if self.cohorts.len() >= MAX_COHORTS {
            around.metrics.unsubscribed(Left::Gap.counted());
            return subscriber.end(Left::Gap);
        }
        let sources = Sources::from_position(&from, &self.cohorts[0].sources, around.now);
        let mut cohort = Cohort::new(sources, Some(from));
        cohort.add(subscriber);
        if let Some(ring) = ring {
            let source = around.peers.node_id().short();
            cohort.on_standing(source, ring.standing(), around);
            let has = cohort
                .sources
                .known()
                .find(|(of, _)| *of == source)
                .map_or(0, |(_, seq)| seq);
            ring.behind(has, usize::MAX)
                .for_each(|part| cohort.on_part(source, part, around));
        }
        self.ask |= cohort.sources.is_behind();
        self.cohorts.push(cohort);
    }

    fn forget(&mut self, conn_id: u64, forgotten: impl Fn(Arc<Subscriber>)) {
        let found = self
            .cohorts
            .iter_mut()
            .filter_map(|cohort| cohort.subscribers.remove(&conn_id));
        found.for_each(forgotten);
    }

    fn close_lost(&mut self, ring: Option<&Ring>, around: &Around<'_>) {
        for cohort in self.cohorts.iter_mut().filter(|cohort| cohort.is_lost) {
            around.metrics.gap(GapEnd::Unrepaired);
            tracing::info!(client.id = %around.client_id, subscribers = cohort.subscribers.len(), "messages were missed that nobody has any more: closing its subscribers");
            cohort.close(Left::Gap, around.metrics);
        }
        if self.cohorts[0].is_lost {
            self.cohorts[0] = Self::main(ring, around);
            (self.since, self.asked) = (around.now, 0);
        }
        self.cohorts.retain(|cohort| !cohort.is_lost);
    }

    /// Those who have caught up are like the others now.
    fn join_level(&mut self) {
        let Some((main, behind)) = self.cohorts.split_first_mut() else {
            return;
        };
        for cohort in behind {
            if cohort.sources.is_level_with(&main.sources) {
                cohort.sources.teach(&mut main.sources);
                main.subscribers.extend(cohort.subscribers.drain());
            }
        }
        let mut at = 0;
        self.cohorts.retain(|cohort| {
            at += 1;
            at == 1 || !cohort.subscribers.is_empty()
        });
    }

    fn count_repairs(&mut self, metrics: &Metrics) {
        for cohort in &mut self.cohorts {
            let is_behind = cohort.sources.is_behind();
            if std::mem::replace(&mut cohort.was_behind, is_behind) && !is_behind {
                metrics.gap(GapEnd::Repaired);
            }
        }
    }

    fn ask_if_due(&mut self, around: &Around<'_>) {
        let beginning = self.asked == 0;
        let missing = self.cohorts.iter().any(|cohort| cohort.sources.is_behind());
        let lately = self
            .asked_at
            .is_some_and(|at| around.now.saturating_sub(at) < ASK_EVERY);
        if around.peers.bus().is_alone() || lately || !(self.ask || missing || beginning) {
            return;
        }
        self.ask = false;
        self.asked_at = Some(around.now);
        let due = ASK_AGAIN
            .get(self.asked)
            .is_some_and(|after| around.now.saturating_sub(self.since) >= *after);
        self.asked += usize::from(due);
        let mut known = BTreeMap::new();
        for (source, seq) in self.cohorts.iter().flat_map(|cohort| cohort.sources.known()) {
            let least: &mut u64 = known.entry(source).or_insert(seq);
            *least = seq.min(*least);
        }
        let letter = Letter::Asks {
            from: around.peers.node_id(),
            client_id: around.client_id.clone(),
            known: known.into_iter().collect(),
        };
        let channel = Channel::Client(around.client_id.clone());
        drop(around.peers.bus().publish(channel, letter.encode()));
    }
}

impl Cohort {
    fn add(&mut self, subscriber: Arc<Subscriber>) {
        self.subscribers.insert(subscriber.conn_id, subscriber);
    }
}

fn said(part: Part, channel: Channel, around: &Around<'_>) -> Receipt {
    let letter = Letter::Said {
        from: around.peers.node_id(),
        client_id: around.client_id.clone(),
        part,
    };
    around.peers.bus().publish(channel, letter.encode())
}

fn stands(ring: &Ring, channel: Channel, around: &Around<'_>) {
    let letter = Letter::Stands {
        from: around.peers.node_id(),
        client_id: around.client_id.clone(),
        standing: ring.standing(),
    };
    drop(around.peers.bus().publish(channel, letter.encode()));
}
