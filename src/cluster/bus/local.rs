//! The bus inside one process: the embedded default, mostly with one node; and the place where tests make a bus lose,
//! repeat and reorder, under a seed.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::sync::mpsc;

use super::{Channel, Counts, Inbox, Reached, Receipt};

/// Messages that wait for a node that does not take them; more are lost, and it is told so.
const QUEUE: usize = 4096;

/// How a bus misbehaves: shares of messages, 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Faults {
    /// Lost, though the publisher hears that somebody was there.
    pub loss: f64,
    /// Delivered twice.
    pub duplicate: f64,
    /// Held back until the next message for the same node.
    pub reorder: f64,
}

enum Delivery {
    Message(Bytes),
    Interrupted,
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
    nodes: HashMap<u64, Node>,
    channels: HashMap<Channel, Vec<u64>>,
    faults: Option<(Faults, SmallRng)>,
}

struct Node {
    deliveries: mpsc::Sender<Delivery>,
    held_back: Option<Bytes>,
    /// The queue was full: it has to be told that it missed something.
    missed: bool,
    /// Messages lost, repeated or held back on purpose.
    tampered: u64,
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
        let node = Node {
            deliveries,
            held_back: None,
            missed: false,
            tampered: 0,
        };
        table.nodes.insert(id, node);
        Endpoint {
            hub: self.clone(),
            id,
            queue: tokio::sync::Mutex::new(queue),
            published: AtomicU64::new(0),
            received: AtomicU64::new(0),
            interrupted: AtomicU64::new(0),
        }
    }
}

impl Node {
    fn put(&mut self, delivery: Delivery) {
        if self.deliveries.try_send(delivery).is_err() {
            self.missed = true;
        }
    }

    fn interrupt(&mut self) {
        self.missed = self.deliveries.try_send(Delivery::Interrupted).is_err();
    }

    fn deliver(&mut self, message: &Bytes, faults: Option<&mut (Faults, SmallRng)>) {
        if self.missed {
            self.interrupt();
        }
        let Some((faults, rng)) = faults else {
            return self.put(Delivery::Message(message.clone()));
        };
        if rng.random_bool(faults.loss) {
            self.tampered += 1;
            return;
        }
        if self.held_back.is_none() && rng.random_bool(faults.reorder) {
            self.tampered += 1;
            self.held_back = Some(message.clone());
            return;
        }
        self.put(Delivery::Message(message.clone()));
        if rng.random_bool(faults.duplicate) {
            self.tampered += 1;
            self.put(Delivery::Message(message.clone()));
        }
        if let Some(late) = self.held_back.take() {
            self.put(Delivery::Message(late));
        }
    }
}

/// One node's end.
pub(super) struct Endpoint {
    hub: Arc<Hub>,
    id: u64,
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

    pub fn publish(&self, channel: &Channel, message: &Bytes) -> Receipt {
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
        for id in listeners {
            if let Some(node) = nodes.get_mut(id) {
                node.deliver(message, faults.as_mut());
            }
        }
        Receipt::settled(Reached::Somebody(listeners.len() as u64))
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
            match delivery {
                Delivery::Message(message) => {
                    self.received.fetch_add(1, Ordering::Relaxed);
                    inbox.on_message(message);
                }
                Delivery::Interrupted => {
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
