//! What is known of what each node said to a client's subscribers: parts are put in order, messages together, and what is
//! missing is noticed. Pure: the rim asks for what is missing, and tells what time it is.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};

use super::{
    MAX_MESSAGE,
    position::{MAX_SOURCES, Position},
};
use crate::cluster::letter::{Audience, Part, Standing};

/// Parts that wait for one that is missing; more than a ring holds could not be repaired anyway.
const MAX_WAITING: usize = 256;
const MAX_WAITING_BYTES: usize = 2 * 1024 * 1024;
/// What is missing has to begin to come within this, or nobody can say it again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Something was missed that cannot be had any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost;

/// One whole message, in its turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub audience: Arc<Audience>,
    pub body: Bytes,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Sources {
    known: BTreeMap<u64, Source>,
    /// A source that is new has to be heard from its beginning on; else from where it is when it is first heard of.
    strict: bool,
}

#[derive(Debug)]
struct Source {
    /// All parts up to this one are taken.
    last: u64,
    /// The highest that is known to have been said.
    heard: u64,
    /// The last part of the last whole message.
    complete: u64,
    /// That it has come to `last` is a subscriber's word only, so far.
    is_claimed: bool,
    open: Option<Open>,
    waiting: BTreeMap<u64, Part>,
    waiting_bytes: usize,
    /// Since when something is missing and nothing of it has come.
    behind_since: Option<Duration>,
    spoke_at: Duration,
}

/// A message whose last part is to come.
#[derive(Debug)]
struct Open {
    audience: Arc<Audience>,
    bytes: BytesMut,
}

impl Source {
    fn at(last: u64, now: Duration) -> Self {
        Self {
            last,
            heard: last,
            complete: last,
            is_claimed: false,
            open: None,
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            behind_since: None,
            spoke_at: now,
        }
    }

    fn is_behind(&self) -> bool {
        self.heard > self.last || self.is_claimed
    }

    fn look(&mut self, progress: bool, now: Duration) {
        if !self.is_behind() {
            self.behind_since = None;
        } else if progress {
            self.behind_since = Some(now);
        } else {
            self.behind_since.get_or_insert(now);
        }
    }

    /// A part that is not the next waits.
    fn hold(&mut self, part: &Part) -> Result<(), Lost> {
        if self.waiting.insert(part.seq, part.clone()).is_none() {
            self.waiting_bytes += part.bytes.len();
        }
        match self.waiting.len() > MAX_WAITING || self.waiting_bytes > MAX_WAITING_BYTES {
            true => Err(Lost),
            false => Ok(()),
        }
    }

    /// The next that waits, if it is its turn.
    fn next_waiting(&mut self) -> Option<Part> {
        let part = self.waiting.remove(&self.last.saturating_add(1))?;
        self.waiting_bytes -= part.bytes.len();
        Some(part)
    }

    /// Takes the next part; returns the message that is whole with it.
    fn take(&mut self, part: Part) -> Option<Message> {
        self.last = part.seq;
        self.heard = self.heard.max(part.seq);
        let whole = match (part.is_first, part.is_last) {
            (true, true) => Some(Message {
                audience: part.audience,
                body: part.bytes,
            }),
            (true, false) => {
                let (audience, bytes) = (part.audience, BytesMut::from(&part.bytes[..]));
                self.open = Some(Open { audience, bytes });
                None
            }
            (false, is_last) => self.go_on(&part.bytes, is_last),
        };
        if part.is_last {
            self.complete = part.seq;
        }
        whole
    }

    /// Without a beginning it belongs to a message that began before this was listened to.
    fn go_on(&mut self, bytes: &Bytes, is_last: bool) -> Option<Message> {
        let open = self.open.as_mut()?;
        open.bytes.extend_from_slice(bytes);
        if open.bytes.len() > MAX_MESSAGE {
            self.open = None; // no node says so much
        }
        let open = self.open.take_if(|_| is_last)?;
        Some(Message {
            audience: open.audience,
            body: open.bytes.freeze(),
        })
    }
}

impl Sources {
    /// Begins with whatever is said from now on.
    pub fn from_now() -> Self {
        Self::default()
    }

    /// Begins behind a position that a subscriber was given, perhaps elsewhere. `known` is what this node has by now.
    pub fn from_position(position: &Position, known: &Sources, now: Duration) -> Self {
        let mut sources = Self {
            known: BTreeMap::new(),
            strict: true,
        };
        for (source, seq) in position.pairs() {
            let mut claimed = Source::at(seq, now);
            let here = known.known.get(&source).map(|here| here.last);
            claimed.is_claimed = here.is_none_or(|last| last < seq);
            claimed.heard = here.unwrap_or(seq).max(seq);
            claimed.look(false, now);
            sources.known.insert(source, claimed);
        }
        for (source, here) in &known.known {
            sources
                .known
                .entry(*source)
                .or_insert_with(|| Source::unheard(here.heard, now));
        }
        sources
    }

    /// From now on a source that is new is heard from its beginning on.
    pub fn be_strict(&mut self) {
        self.strict = true;
    }

    /// A source has said all up to here, and begins now for whoever listens.
    pub fn begin_at(&mut self, source: u64, last: u64, now: Duration) {
        self.known.entry(source).or_insert_with(|| Source::at(last, now));
    }

    /// A part of a source came; what is whole with it goes to `out`, in order.
    pub fn on_part(&mut self, source: u64, part: &Part, now: Duration, out: &mut Vec<Message>) -> Result<(), Lost> {
        let strict = self.strict;
        let source = self.entry(source, || match strict {
            true => Source::unheard(0, now),
            false => Source::at(part.seq.saturating_sub(1), now),
        });
        source.spoke_at = now;
        source.heard = source.heard.max(part.seq);
        if part.seq <= source.last {
            return Ok(()); // once more
        }
        if part.seq > source.last.saturating_add(1) {
            let held = source.hold(part);
            source.look(false, now);
            return held;
        }
        out.extend(source.take(part.clone()));
        while let Some(part) = source.next_waiting() {
            out.extend(source.take(part));
        }
        source.look(true, now);
        Ok(())
    }

    /// A source said where it stands.
    pub fn on_standing(
        &mut self,
        source: u64,
        standing: Standing,
        now: Duration,
        out: &mut Vec<Message>,
    ) -> Result<(), Lost> {
        let strict = self.strict;
        let source = self.entry(source, || match strict {
            true => Source::unheard(0, now),
            false => Source::at(standing.last, now),
        });
        source.spoke_at = now;
        if std::mem::take(&mut source.is_claimed) && source.last > standing.last {
            return Err(Lost); // it never said that much
        }
        source.heard = source.heard.max(standing.last);
        let mut progress = false;
        if source.last < standing.began {
            (source.last, source.complete, progress) = (standing.began, standing.began, true);
            while let Some(part) = source.next_waiting() {
                out.extend(source.take(part));
            }
        }
        if source.heard > source.last && standing.oldest > source.last.saturating_add(1) {
            return Err(Lost); // it cannot say again what is missing
        }
        source.look(progress, now);
        Ok(())
    }

    fn entry(&mut self, source: u64, new: impl FnOnce() -> Source) -> &mut Source {
        if !self.known.contains_key(&source) && self.known.len() >= MAX_SOURCES {
            // The one that is silent for longest has most likely ended. If not, it is heard from its beginning on.
            let silent = self.known.iter().min_by_key(|(_, known)| known.spoke_at);
            let silent = silent.map(|(source, _)| *source);
            silent.and_then(|source| self.known.remove(&source));
            self.strict = true;
        }
        self.known.entry(source).or_insert_with(new)
    }

    /// Whether something is missing.
    pub fn is_behind(&self) -> bool {
        self.known.values().any(Source::is_behind)
    }

    /// Whether something is missing for too long.
    pub fn is_overdue(&self, now: Duration) -> bool {
        let overdue = |source: &Source| {
            source
                .behind_since
                .is_some_and(|since| now.saturating_sub(since) >= PATIENCE)
        };
        self.known.values().any(overdue)
    }

    /// Whether `main` has exactly the same, of every source that it knows.
    pub fn is_level_with(&self, main: &Sources) -> bool {
        let same = |(source, main): (&u64, &Source)| {
            self.known.get(source).is_some_and(|known| {
                known.last == main.last
                    && known.complete == main.complete
                    && known.open.is_some() == main.open.is_some()
            })
        };
        !self.is_behind() && main.known.iter().all(same)
    }

    /// What these know and `main` does not; both are level.
    pub fn teach(&mut self, main: &mut Sources) {
        while let Some((source, known)) = self.known.pop_first() {
            if main.known.len() < MAX_SOURCES {
                main.known.entry(source).or_insert(known);
            }
        }
    }

    /// The last part that is had of each source.
    pub fn known(&self) -> impl Iterator<Item = (u64, u64)> {
        self.known.iter().map(|(source, known)| (*source, known.last))
    }

    /// Where a subscriber is that has got every whole message.
    pub fn position(&self) -> Position {
        Position::of(self.known.iter().map(|(source, known)| (*source, known.complete)))
    }
}

impl Source {
    /// Nothing of it was heard, and it has said something: where it began, it has to say.
    fn unheard(heard: u64, now: Duration) -> Self {
        let mut source = Self::at(0, now);
        source.heard = heard;
        source.look(false, now);
        source
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::ring::Ring, *};

    const NOW: Duration = Duration::ZERO;

    /// A node that publishes, and what is on its way from it: everything may be lost, repeated and overtaken.
    struct Node {
        ring: Ring,
        said: u32,
        way: Vec<Sent>,
    }

    #[derive(Clone)]
    enum Sent {
        Part(Part),
        Stands(Standing),
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// A node says something of so many parts.
        Say(usize, usize),
        /// What is at this place on the way arrives, and stays there to arrive again if so told.
        Arrive(usize, prop::sample::Index, bool),
        Lose(usize, prop::sample::Index),
        /// The listener asks, and the question arrives at this node.
        Ask(usize),
        Stand(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let node = 0..2usize;
        prop_oneof![
            3 => (node.clone(), prop_oneof![8 => Just(1usize), 1 => 2..4usize]).prop_map(|(node, parts)| Step::Say(node, parts)),
            6 => (node.clone(), any::<prop::sample::Index>(), prop::bool::weighted(0.1)).prop_map(|(n, i, again)| Step::Arrive(n, i, again)),
            1 => (node.clone(), any::<prop::sample::Index>()).prop_map(|(n, i)| Step::Lose(n, i)),
            1 => node.clone().prop_map(Step::Ask),
            1 => node.prop_map(Step::Stand),
        ]
    }

    /// A message that tells whose it is and which, and is so many parts long.
    fn message(node: usize, number: u32, parts: usize) -> Bytes {
        let mut body = format!("{node} {number} ").into_bytes();
        body.resize((parts - 1) * super::super::ring::MAX_PART + 20, b'.');
        body.into()
    }

    fn nodes() -> [Node; 2] {
        [0, 100].map(|began| Node {
            ring: Ring::new(began, NOW),
            said: 0,
            way: Vec::new(),
        })
    }

    impl Node {
        fn say(&mut self, node: usize, parts: usize) {
            self.said += 1;
            let parts = self.ring.say(Audience::All, &message(node, self.said, parts), NOW);
            self.way.extend(parts.into_iter().map(Sent::Part));
        }

        fn answer(&mut self, known: Option<u64>) {
            self.way.push(Sent::Stands(self.ring.standing()));
            let again = known.into_iter().flat_map(|seq| self.ring.behind(seq, usize::MAX));
            self.way.extend(again.cloned().map(Sent::Part));
        }
    }

    /// What a subscriber got of each node, checked to be a run without holes.
    #[derive(Default)]
    struct Got([Vec<u32>; 2]);

    impl Got {
        fn take(&mut self, messages: Vec<Message>) {
            for Message { body, .. } in messages {
                let text = String::from_utf8_lossy(&body).into_owned();
                let mut words = text.split(' ');
                let mut word = || words.next().expect("a word").parse::<u32>().expect("a number");
                let (node, number) = (word() as usize, word());
                if let Some(last) = self.0[node].last() {
                    assert_eq!(number, last + 1, "node {node}");
                }
                assert!(body.ends_with(b"."));
                self.0[node].push(number);
            }
        }
    }

    fn arrive(sources: &mut Sources, node: usize, sent: &Sent, got: &mut Got) -> Result<(), Lost> {
        let mut whole = Vec::new();
        let arrived = match sent {
            Sent::Part(part) => sources.on_part(node as u64, part, NOW, &mut whole),
            Sent::Stands(standing) => sources.on_standing(node as u64, *standing, NOW, &mut whole),
        };
        got.take(whole);
        arrived
    }

    fn known(sources: &Sources, node: usize) -> Option<u64> {
        sources
            .known()
            .find(|(source, _)| *source == node as u64)
            .map(|(_, seq)| seq)
    }

    fn run(steps: Vec<Step>, mut nodes: [Node; 2], sources: &mut Sources, got: &mut Got) -> Result<[Node; 2], Lost> {
        for step in steps {
            match step {
                Step::Say(node, parts) => nodes[node].say(node, parts),
                Step::Stand(node) => nodes[node].way.push(Sent::Stands(nodes[node].ring.standing())),
                Step::Ask(node) => nodes[node].answer(known(sources, node)),
                Step::Lose(node, _) | Step::Arrive(node, ..) if nodes[node].way.is_empty() => {}
                Step::Lose(node, at) => drop(nodes[node].way.remove(at.index(nodes[node].way.len()))),
                Step::Arrive(node, at, again) => {
                    let way = &mut nodes[node].way;
                    // Mostly in order.
                    let at = at.index(way.len() * 3).saturating_sub(way.len() * 2);
                    let sent = way[at].clone();
                    if !again {
                        way.remove(at);
                    }
                    arrive(sources, node, &sent, got)?;
                }
            }
        }
        Ok(nodes)
    }

    /// The bus behaves now: whoever is behind asks until nothing is missing.
    fn heal(mut nodes: [Node; 2], sources: &mut Sources, got: &mut Got) -> Result<(), Lost> {
        for (at, node) in nodes.iter_mut().enumerate() {
            node.way.clear();
            node.answer(known(sources, at));
            let heard = node.way.drain(..).collect::<Vec<_>>();
            heard.iter().try_for_each(|sent| arrive(sources, at, sent, got))?;
            node.answer(known(sources, at));
            node.way
                .drain(..)
                .try_for_each(|sent| arrive(sources, at, &sent, got))?;
            // One that was not heard of before begins now.
            if let Some(last) = got.0[at].last() {
                assert_eq!(*last, node.said, "node {at}");
            }
        }
        assert!(!sources.is_behind());
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Whatever the bus loses, repeats and reorders: a run without holes, up to the last that was said.
        #[test]
        fn from_now_on_every_run_is_whole(steps in prop::collection::vec(step(), 0..200)) {
            let (mut sources, mut got) = (Sources::from_now(), Got::default());
            if let Ok(nodes) = run(steps, nodes(), &mut sources, &mut got) {
                heal(nodes, &mut sources, &mut got).ok();
            }
        }

        /// A subscriber that comes back elsewhere goes on exactly where it was, or is told that it cannot.
        #[test]
        fn whoever_comes_back_goes_on_where_it_was(
            before in prop::collection::vec(step(), 0..100),
            away in prop::collection::vec(step(), 0..50),
            after in prop::collection::vec(step(), 0..100),
        ) {
            let (mut sources, mut got) = (Sources::from_now(), Got::default());
            let Ok(nodes) = run(before, nodes(), &mut sources, &mut got) else { return Ok(()) };
            let position = sources.position().as_str().parse().expect("a position");
            let (mut elsewhere, mut others) = (Sources::from_now(), Got::default());
            let Ok(nodes) = run(away, nodes, &mut elsewhere, &mut others) else { return Ok(()) };
            let mut back = Sources::from_position(&position, &elsewhere, NOW);
            let Ok(nodes) = run(after, nodes, &mut back, &mut got) else { return Ok(()) };
            heal(nodes, &mut back, &mut got).ok();
        }
    }

    #[test]
    fn what_a_subscriber_says_of_itself_is_believed_only_if_it_can_be() {
        let (mut node, mut got) = (nodes(), Got::default());
        node[0].say(0, 1);
        let ahead = Position::of([(0, u64::MAX)].into_iter());
        let mut sources = Sources::from_position(&ahead, &Sources::from_now(), NOW);
        let stands = Sent::Stands(node[0].ring.standing());
        assert_eq!(arrive(&mut sources, 0, &stands, &mut got), Err(Lost));
        let gone = Position::of([(7, 3)].into_iter());
        let sources = Sources::from_position(&gone, &Sources::from_now(), NOW);
        assert!(sources.is_behind() && !sources.is_overdue(NOW) && sources.is_overdue(PATIENCE));
    }

    #[test]
    fn too_much_that_waits_is_lost() {
        let (mut node, mut got) = (nodes(), Got::default());
        let mut sources = Sources::from_now();
        (0..300).for_each(|_| node[0].say(0, 1));
        let way = std::mem::take(&mut node[0].way);
        arrive(&mut sources, 0, &way[0], &mut got).expect("the first");
        let lost = way[2..]
            .iter()
            .try_for_each(|sent| arrive(&mut sources, 0, sent, &mut got));
        assert_eq!(lost, Err(Lost));
        assert_eq!(got.0[0], [1]);
    }
}
