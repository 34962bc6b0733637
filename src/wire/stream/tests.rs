//! Properties of a stream between two ends, under schedules that lose, repeat, reorder and cut.

use std::{collections::VecDeque, time::Duration};

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::wire::frame::INITIAL_WINDOW;

const MAX: usize = 1000;

fn data(from: u64, length: usize) -> Bytes {
    (from..from + length as u64)
        .map(|at| (at * 7 + at / 251) as u8)
        .collect()
}

fn chunk(offset: u64, length: usize, fin: bool) -> Chunk<Bytes> {
    Chunk {
        offset,
        data: data(offset, length),
        fin,
    }
}

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// One frame on its way.
#[derive(Clone, Debug)]
enum Item {
    Chunk(Chunk<Bytes>),
    Probe(u8),
    Ack(Ack),
}

/// What the path does with the frames it holds, one step of a schedule.
#[derive(Clone, Debug)]
enum Step {
    Write(usize),
    Send,
    /// Delivers the frame at this place of the queue: 0 keeps the order.
    Deliver {
        back: bool,
        at: usize,
    },
    Lose {
        back: bool,
        at: usize,
    },
    Repeat {
        back: bool,
        at: usize,
    },
    Read(usize),
    /// The path breaks: all in it is gone, a new one is there.
    Cut,
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    let place = 0usize..4;
    prop_oneof![
        3 => (1usize..30_000).prop_map(Step::Write),
        6 => Just(Step::Send),
        8 => (any::<bool>(), place.clone()).prop_map(|(back, at)| Step::Deliver { back, at }),
        2 => (any::<bool>(), place.clone()).prop_map(|(back, at)| Step::Lose { back, at }),
        1 => (any::<bool>(), place).prop_map(|(back, at)| Step::Repeat { back, at }),
        4 => (0usize..6).prop_map(Step::Read),
        1 => Just(Step::Cut),
        2 => Just(Step::Tick),
    ]
}

/// Two ends and the path between them.
struct Pair {
    tx: Sender,
    rx: Receiver,
    forth: VecDeque<Item>,
    back: VecDeque<Item>,
    now: Duration,
    written: u64,
    read: Vec<u8>,
    most: usize,
}

impl Pair {
    fn new() -> Self {
        Self {
            tx: Sender::default(),
            rx: Receiver::default(),
            forth: VecDeque::new(),
            back: VecDeque::new(),
            now: Duration::ZERO,
            written: 0,
            read: Vec::new(),
            most: 0,
        }
    }

    fn write(&mut self, length: usize) {
        if self.tx.capacity() > 0 && !self.tx.is_finished() {
            self.tx.write(data(self.written, length));
            self.written += length as u64;
        }
    }

    fn send(&mut self) {
        let probe = self.tx.take_probe();
        if let Some(chunk) = self.tx.next_chunk(MAX, self.now) {
            let mut out = BytesMut::new();
            self.tx.copy(&chunk, &mut out);
            assert_eq!(out.len(), chunk.data);
            self.forth.push_back(Item::Chunk(Chunk {
                offset: chunk.offset,
                data: out.freeze(),
                fin: chunk.fin,
            }));
        }
        if probe != 0 {
            self.forth.push_back(Item::Probe(probe));
        }
        if self.rx.ack_due() {
            let ack = self.rx.take_ack(ms(1), MAX_WINDOW, self.now);
            self.back.push_back(Item::Ack(ack));
        }
    }

    fn arrive(&mut self, item: Item) {
        match item {
            Item::Chunk(chunk) => drop(self.rx.on_chunk(chunk, self.now).expect("an honest sender")),
            Item::Probe(number) => self.rx.on_probe(number),
            Item::Ack(ack) => self.tx.on_ack(&ack, self.now).expect("an honest receiver"),
        }
    }

    fn read(&mut self, pieces: usize) {
        for _ in 0..pieces {
            let Some(piece) = self.rx.read() else { return };
            assert_eq!(piece, data(self.read.len() as u64, piece.len()), "bytes in order, once");
            self.read.extend_from_slice(&piece);
        }
    }

    fn tick(&mut self) {
        self.now += ms(150);
        self.tx.on_tick(self.now);
        self.rx.on_tick(self.now);
    }

    fn cut(&mut self) {
        self.forth.clear();
        self.back.clear();
        self.tx.path_changed(self.now);
        self.rx.path_changed();
    }

    fn queue(&mut self, back: bool) -> &mut VecDeque<Item> {
        if back { &mut self.back } else { &mut self.forth }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(length) => self.write(length),
            Step::Send => self.send(),
            Step::Deliver { back, at } => {
                if let Some(item) = self.queue(back).remove(at) {
                    self.arrive(item);
                }
            }
            Step::Lose { back, at } => drop(self.queue(back).remove(at)),
            Step::Repeat { back, at } => {
                if let Some(item) = self.queue(back).get(at).cloned() {
                    self.queue(back).push_back(item);
                }
            }
            Step::Read(pieces) => self.read(pieces),
            Step::Cut => self.cut(),
            Step::Tick => self.tick(),
        }
        self.most = self.most.max(self.rx.buffered());
        assert!(
            self.rx.buffered() as u64 + self.rx.early_bytes <= 2 * MAX_WINDOW,
            "memory is bounded by the window"
        );
        assert!(
            self.tx.buffered() as u64 <= MAX_WINDOW + 30_000,
            "and so it is at the sender"
        );
    }

    /// From now on the path is good: everything must arrive, in a bounded number of rounds.
    fn heal(&mut self) {
        for _ in 0..3000 {
            self.send();
            while let Some(item) = self.forth.pop_front() {
                self.arrive(item);
            }
            self.read(usize::MAX);
            if self.rx.ack_due() {
                let ack = self.rx.take_ack(ms(1), MAX_WINDOW, self.now);
                self.back.push_back(Item::Ack(ack));
            }
            while let Some(item) = self.back.pop_front() {
                self.arrive(item);
            }
            if self.tx.is_done() && self.rx.is_at_end() {
                return;
            }
            if !self.tx.has_chunk() {
                self.tick();
            }
        }
        panic!("it hangs: {:?} {:?}", self.tx, self.rx);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Bytes arrive once, in order, whole, whatever the path does; and no schedule dead-locks.
    #[test]
    fn any_schedule_ends_whole(steps in prop::collection::vec(step(), 0..400)) {
        let mut pair = Pair::new();
        for step in steps {
            pair.step(step);
        }
        pair.tx.finish();
        pair.heal();
        prop_assert_eq!(pair.read.len() as u64, pair.written);
    }

    /// A path that keeps its order repairs a loss without sending anything twice that arrived.
    #[test]
    fn an_ordered_path_resends_only_what_is_lost(count in 2u64..60, lost in 0u64..60) {
        let mut pair = Pair::new();
        pair.write(count as usize * MAX);
        while pair.tx.has_chunk() {
            pair.send();
        }
        let sent = pair.forth.len();
        if (lost as usize) < sent {
            pair.forth.remove(lost as usize);
        }
        while let Some(item) = pair.forth.pop_front() {
            pair.arrive(item);
        }
        let mut resent = 0;
        pair.tx.finish();
        for _ in 0..20 {
            pair.send();
            resent += pair.forth.iter().filter(|item| matches!(item, Item::Chunk(c) if !c.data.is_empty())).count();
            while let Some(item) = pair.forth.pop_front() {
                pair.arrive(item);
            }
            pair.read(usize::MAX);
            pair.send();
            while let Some(item) = pair.back.pop_front() {
                pair.arrive(item);
            }
            pair.tick();
        }
        prop_assert!(pair.tx.is_done());
        prop_assert!(resent <= 1, "{} resent", resent);
    }

    /// Whatever a hostile peer sends, neither end panics and memory stays bounded.
    #[test]
    fn hostile_frames_end_in_errors(
        frames in prop::collection::vec((any::<u8>(), 0u64..200_000, 0usize..2000, any::<bool>()), 0..200),
        far in any::<u64>(),
    ) {
        let (mut tx, mut rx) = (Sender::default(), Receiver::default());
        tx.write(data(0, 5000));
        for (what, at, length, fin) in frames {
            let at = if what % 16 == 15 { far } else { at };
            match what % 3 {
                0 => drop(rx.on_chunk(Chunk { offset: at, data: data(0, length), fin }, ms(at % 99))),
                1 => drop(tx.on_ack(&Ack { upto: at, max_data: far, missing_to: length as u64, answer: what, ..Ack::default() }, ms(1))),
                _ => { tx.next_chunk(length, ms(2)); rx.read(); rx.on_probe(what); rx.take_ack(ms(1), MAX_WINDOW, ms(3)); }
            }
            prop_assert!(rx.buffered() as u64 + rx.early_bytes <= 2 * MAX_WINDOW);
        }
    }
}

#[test]
fn more_than_the_credit_is_an_error() {
    let mut rx = Receiver::default();
    assert_eq!(
        rx.on_chunk(chunk(INITIAL_WINDOW - 10, 11, false), ms(0)),
        Err(StreamError::FlowControl)
    );
    assert_eq!(
        rx.on_chunk(
            Chunk {
                offset: u64::MAX,
                data: data(0, 1),
                fin: false
            },
            ms(0)
        ),
        Err(StreamError::FlowControl)
    );
}

#[test]
fn the_final_size_cannot_move() {
    let mut rx = Receiver::default();
    assert_eq!(rx.on_chunk(chunk(0, 10, true), ms(0)), Ok(true));
    assert_eq!(rx.on_chunk(chunk(0, 10, true), ms(0)), Ok(false));
    assert_eq!(rx.on_chunk(chunk(5, 6, false), ms(0)), Err(StreamError::FinalSize));
    assert_eq!(rx.on_chunk(chunk(0, 9, true), ms(0)), Err(StreamError::FinalSize));
    let mut rx = Receiver::default();
    assert_eq!(rx.on_chunk(chunk(20, 5, false), ms(0)), Ok(false));
    assert_eq!(rx.on_chunk(chunk(0, 10, true), ms(0)), Err(StreamError::FinalSize));
}

#[test]
fn what_was_never_sent_cannot_be_acknowledged() {
    let mut tx = Sender::default();
    tx.write(data(0, 100));
    assert_eq!(
        tx.on_ack(
            &Ack {
                upto: 1,
                ..Ack::default()
            },
            ms(0)
        ),
        Err(StreamError::BadAck)
    );
    tx.next_chunk(50, ms(0));
    assert_eq!(
        tx.on_ack(
            &Ack {
                upto: 50,
                ..Ack::default()
            },
            ms(0)
        ),
        Ok(())
    );
    assert_eq!(tx.buffered(), 50);
}

#[test]
fn a_reader_that_stalls_holds_the_sender_at_its_window() {
    let mut pair = Pair::new();
    for _ in 0..100 {
        pair.write(10_000);
        pair.send();
        while let Some(item) = pair.forth.pop_front() {
            pair.arrive(item);
        }
        pair.tick();
    }
    while pair.tx.has_chunk() {
        pair.send();
    }
    assert_eq!(pair.tx.sent, INITIAL_WINDOW);
    assert_eq!(pair.tx.capacity(), 0);
}

#[test]
fn a_window_that_holds_the_sender_back_grows() {
    let mut pair = Pair::new();
    for _ in 0..2000 {
        pair.write(60_000);
        for _ in 0..60 {
            pair.send();
        }
        while let Some(item) = pair.forth.pop_front() {
            pair.arrive(item);
        }
        pair.read(usize::MAX);
        pair.send();
        while let Some(item) = pair.back.pop_front() {
            pair.arrive(item);
        }
    }
    assert_eq!(pair.rx.window, MAX_WINDOW);
}

#[test]
fn a_path_that_breaks_at_once_again_and_again_makes_progress() {
    let mut pair = Pair::new();
    pair.write(INITIAL_WINDOW as usize);
    pair.tx.finish();
    while pair.tx.has_chunk() {
        pair.send();
    }
    for _ in 0..20 {
        pair.cut();
        while pair.tx.has_chunk() {
            pair.send();
        }
        // What one path carries before it breaks is a third of the window, and the way back carries what is due.
        let carried: Vec<_> = pair.forth.drain(..).take(22).collect();
        carried.into_iter().for_each(|item| pair.arrive(item));
        pair.read(usize::MAX);
        pair.send();
        while let Some(item) = pair.back.pop_front() {
            pair.arrive(item);
        }
    }
    assert!(pair.tx.is_done() && pair.rx.is_at_end());
}

#[test]
fn a_lost_grant_heals_by_asking() {
    let mut pair = Pair::new();
    pair.write(INITIAL_WINDOW as usize);
    while pair.tx.has_chunk() {
        pair.send();
    }
    while let Some(item) = pair.forth.pop_front() {
        pair.arrive(item);
    }
    pair.read(usize::MAX);
    pair.send();
    pair.back.clear();
    assert_eq!(pair.tx.capacity(), 0);
    for _ in 0..10 {
        pair.tick();
        pair.send();
        while let Some(item) = pair.forth.pop_front() {
            pair.arrive(item);
        }
        pair.send();
        while let Some(item) = pair.back.pop_front() {
            pair.arrive(item);
        }
    }
    assert!(pair.tx.capacity() > 0);
}
