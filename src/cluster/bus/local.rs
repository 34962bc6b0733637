//! The bus inside one process: the embedded default, mostly with one node; and the place where tests make a bus lose,
//! repeat, reorder and delay, and cut nodes off, under a seed.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::{sync::mpsc, time::Instant};

use super::{Channel, Counts, Inbox, Reached, Receipt};
use crate::ids::NodeId;

/// Messages that wait for a node that does not take them; more are lost, and it is told so.
const QUEUE: usize = 4096;

/// How a bus misbehaves; of messages, shares from 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Faults {
    /// Lost, though the publisher hears that somebody was there.
    pub loss: f64,
    /// Delivered twice.
    pub duplicate: f64,
    /// Held back until the next message for the same node.
    pub reorder: f64,
    /// The longest that a message is on its way.
    pub delay: Duration,
}

struct Delivery {
    /// `None`: messages may have been missed.
    message: Option<Bytes>,
    /// Not before this.
    due: Option<Instant>,
    /// How often its node had been cut off when it left.
    cuts: u64,
}

/// What the nodes of a process share.
#[derive(Default)]
pub struct Hub {
    /// Whether several nodes may be on it.
    shared: bool,
    /// Guards who listens where; held for a look-up, never across an await.
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    nodes: BTreeMap<u64, Node>,
    channels: HashMap<Channel, Vec<u64>>,
    faults: Option<(Faults, SmallRng)>,
}

struct Node {
    deliveries: mpsc::Sender<Delivery>,
    line: Arc<Line>,
    /// When the last delivery is due: a bus keeps order.
    due: Option<Instant>,
    held_back: Option<Bytes>,
    /// The queue was full: it has to be told that it missed something.
    missed: bool,
    /// Messages lost, repeated or held back on purpose.
    tampered: u64,
}

/// A node's connection to the bus.
#[derive(Default)]
struct Line {
    is_cut: AtomicBool,
    /// What left before the last cut is lost.
    cuts: AtomicU64,
}

impl Hub {
    /// For one node alone.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// For several nodes.
    pub fn shared() -> Arc<Self> {
        Arc::new(Self {
            shared: true,
            ..Self::default()
        })
    }

    /// From now on it misbehaves, the same way for the same seed and the same messages.
    pub fn misbehave(&self, faults: Faults, seed: u64) {
        self.table().faults = Some((faults, SmallRng::seed_from_u64(seed)));
    }

    /// From now on it behaves.
    pub fn behave(&self) {
        self.table().faults = None;
    }

    /// How many messages it has lost, repeated or held back on purpose.
    pub fn tampered_with(&self) -> u64 {
        self.table().nodes.values().map(|node| node.tampered).sum()
    }

    /// Cuts a node off: what is on its way to it is lost, and what it says is not sent.
    pub fn cut_off(&self, node_id: NodeId) {
        self.with(node_id, |node| {
            node.line.is_cut.store(true, Ordering::Relaxed);
            node.line.cuts.fetch_add(1, Ordering::Relaxed);
        });
    }

    /// Connects a node again: it is told that it may have missed messages.
    pub fn reconnect(&self, node_id: NodeId) {
        self.with(node_id, |node| {
            node.line.is_cut.store(false, Ordering::Relaxed);
            node.interrupt();
        });
    }

    fn with(&self, node_id: NodeId, act: impl FnOnce(&mut Node)) {
        let mut table = self.table();
        let id = table
            .channels
            .get(&Channel::Node(node_id))
            .and_then(|ids| ids.first().copied());
        if let Some(node) = id.and_then(|id| table.nodes.get_mut(&id)) {
            act(node);
        }
    }

    /// Tells every node that it may have missed messages, as a bus does that was cut.
    pub fn interrupt(&self) {
        let mut table = self.table();
        table.nodes.values_mut().for_each(Node::interrupt);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn endpoint(self: &Arc<Self>) -> Endpoint {
        let (deliveries, queue) = mpsc::channel(QUEUE);
        let mut table = self.table();
        table.next += 1;
        let id = table.next;
        let line = Arc::new(Line::default());
        let node = Node {
            deliveries,
            line: line.clone(),
            due: None,
            held_back: None,
            missed: false,
            tampered: 0,
        };
        table.nodes.insert(id, node);
        Endpoint {
            hub: self.clone(),
            id,
            line,
            queue: tokio::sync::Mutex::new(queue),
            published: AtomicU64::new(0),
            received: AtomicU64::new(0),
            interrupted: AtomicU64::new(0),
        }
    }
}

impl Node {
    /// False when there is no room for it.
    fn put(&mut self, message: Option<Bytes>) -> bool {
        let delivery = Delivery {
            message,
            due: self.due,
            cuts: self.line.cuts.load(Ordering::Relaxed),
        };
        self.deliveries.try_send(delivery).is_ok()
    }

    fn put_message(&mut self, message: &Bytes) {
        self.missed |= !self.put(Some(message.clone()));
    }

    fn interrupt(&mut self) {
        self.missed = !self.put(None);
    }

    fn deliver(&mut self, message: &Bytes, faults: Option<&mut (Faults, SmallRng)>) {
        if self.missed {
            self.interrupt();
        }
        let Some((faults, rng)) = faults else {
            return self.put_message(message);
        };
        if !faults.delay.is_zero() {
            let due = Instant::now() + faults.delay.mul_f64(rng.random());
            self.due = Some(self.due.map_or(due, |last| last.max(due)));
        }
        if rng.random_bool(faults.loss) {
            self.tampered += 1;
            return;
        }
        if self.held_back.is_none() && rng.random_bool(faults.reorder) {
            self.tampered += 1;
            self.held_back = Some(message.clone());
            return;
        }
        self.put_message(message);
        if rng.random_bool(faults.duplicate) {
            self.tampered += 1;
            self.put_message(message);
        }
        if let Some(late) = self.held_back.take() {
            self.put_message(&late);
        }
    }
}

/// One node's end.
pub(super) struct Endpoint {
    hub: Arc<Hub>,
    id: u64,
    line: Arc<Line>,
    /// Taken by whoever runs the endpoint.
    queue: tokio::sync::Mutex<mpsc::Receiver<Delivery>>,
    published: AtomicU64,
    received: AtomicU64,
    interrupted: AtomicU64,
}

impl Endpoint {
    pub fn is_alone(&self) -> bool {
        !self.hub.shared
    }

    pub fn is_up(&self) -> bool {
        !self.line.is_cut.load(Ordering::Relaxed)
    }

    pub fn publish(&self, channel: &Channel, message: &Bytes) -> Receipt {
        if !self.is_up() {
            return Receipt::settled(Reached::Unsent);
        }
        self.published.fetch_add(1, Ordering::Relaxed);
        let mut table = self.hub.table();
        let Table {
            nodes,
            channels,
            faults,
            ..
        } = &mut *table;
        let Some(listeners) = channels.get(channel) else {
            return Receipt::settled(Reached::Nobody);
        };
        let mut reached = 0;
        for id in listeners {
            if let Some(node) = nodes
                .get_mut(id)
                .filter(|node| !node.line.is_cut.load(Ordering::Relaxed))
            {
                node.deliver(message, faults.as_mut());
                reached += 1;
            }
        }
        Receipt::settled(match reached {
            0 => Reached::Nobody,
            reached => Reached::Somebody(reached),
        })
    }

    pub fn subscribe(&self, channel: Channel) {
        let mut table = self.hub.table();
        let listeners = table.channels.entry(channel).or_default();
        if !listeners.contains(&self.id) {
            listeners.push(self.id);
        }
    }

    pub fn unsubscribe(&self, channel: &Channel) {
        let mut table = self.hub.table();
        if let Some(listeners) = table.channels.get_mut(channel) {
            listeners.retain(|id| *id != self.id);
            if listeners.is_empty() {
                table.channels.remove(channel);
            }
        }
    }

    pub async fn run(&self, inbox: &dyn Inbox) {
        let mut queue = self.queue.lock().await;
        while let Some(delivery) = queue.recv().await {
            if let Some(due) = delivery.due {
                tokio::time::sleep_until(due).await;
            }
            match delivery.message {
                _ if delivery.cuts != self.line.cuts.load(Ordering::Relaxed) => {}
                Some(message) => {
                    self.received.fetch_add(1, Ordering::Relaxed);
                    inbox.on_message(message);
                }
                None => {
                    self.interrupted.fetch_add(1, Ordering::Relaxed);
                    inbox.on_interrupted();
                }
            }
        }
    }

    pub fn counts(&self) -> Counts {
        Counts {
            published: self.published.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
            dropped: 0,
            interrupted: self.interrupted.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Endpoint {
    /// A node that ends is heard of no more, as when its connection to a server breaks.
    fn drop(&mut self) {
        let mut table = self.hub.table();
        table.nodes.remove(&self.id);
        table.channels.retain(|_, listeners| {
            listeners.retain(|id| *id != self.id);
            !listeners.is_empty()
        });
    }
}
