//! Pub/sub between nodes: at most once, no back-pressure, in order on each channel. What is lost the exchanges send again;
//! what the bus owes is to say when something may have been lost, and to know what it could not deliver.
//!
//! [`redis`] connects the nodes of a cluster; [`local`] those of one process, one node mostly.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::{
    ids::{ClientId, NodeId, RequestId},
    secret::Secret,
};

pub mod local;
pub mod redis;

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Channel {
    /// A node's inbox.
    Node(NodeId),
    /// One exchange's way back to its ingress.
    Request(RequestId),
    /// What the nodes that know a client have to know.
    Client(ClientId),
}

impl fmt::Display for Channel {
    /// The name of the channel at the server.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Channel::Node(id) => write!(f, "adit:node:{id}"),
            Channel::Request(id) => write!(f, "adit:req:{id}"),
            Channel::Client(id) => write!(f, "adit:client:{id}"),
        }
    }
}

/// What became of a message, as far as the bus can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// Nobody was subscribed: it has certainly not been delivered.
    Nobody,
    /// So many were subscribed. Whether it arrives nobody knows.
    Somebody(u64),
    /// The bus failed, or was full: it may have been delivered or not.
    Unknown,
    /// It was never sent: the bus is away, or too much waits. It has certainly not been delivered.
    Unsent,
}

/// Resolves to what became of a message. Dropping it is fine.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<Reached>);

impl Receipt {
    fn pending() -> (oneshot::Sender<Reached>, Self) {
        let (tx, rx) = oneshot::channel();
        (tx, Self(rx))
    }

    fn settled(reached: Reached) -> Self {
        let (tx, receipt) = Self::pending();
        tx.send(reached).ok();
        receipt
    }

    /// Waits until it is known.
    pub async fn reached(self) -> Reached {
        self.0.await.unwrap_or(Reached::Unknown)
    }
}

/// Who takes what comes. Called by the bus's own task, one message after the other: it must not block.
pub trait Inbox: Send + Sync {
    /// A message on a channel that is subscribed.
    fn on_message(&self, message: Bytes);
    /// Messages may have been missed, on any channel, between what came before this and what comes after.
    fn on_interrupted(&self);
}

/// One node's end of the bus. Channels are subscribed until unsubscribed, whatever happens to the connection.
pub struct Bus(Kind);

enum Kind {
    Local(local::Endpoint),
    Redis(Box<redis::Link>),
}

/// Why there is no bus.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The URL is not one. Never contains it: it may hold a password.
    #[error("{0}")]
    Url(String),
}

impl Bus {
    /// Over the Redis of this URL; nothing is connected until [`Bus::run`].
    pub fn redis(url: &Secret) -> Result<Self, BusError> {
        Ok(Self(Kind::Redis(Box::new(redis::Link::new(url)?))))
    }

    /// Between the nodes of this process that share `hub`.
    pub fn local(hub: &Arc<local::Hub>) -> Self {
        Self(Kind::Local(hub.endpoint()))
    }

    /// Whether no other node can ever be on it.
    pub fn is_alone(&self) -> bool {
        match &self.0 {
            Kind::Local(endpoint) => endpoint.is_alone(),
            Kind::Redis(_) => false,
        }
    }

    /// Whether it carries messages now, as far as is known.
    pub fn is_up(&self) -> bool {
        match &self.0 {
            Kind::Local(endpoint) => endpoint.is_up(),
            Kind::Redis(link) => link.is_up(),
        }
    }

    /// What this node may be behind by before the server cuts it off, bytes, where that is known.
    pub fn limit(&self) -> Option<u64> {
        match &self.0 {
            Kind::Local(_) => None,
            Kind::Redis(link) => link.limit(),
        }
    }

    /// A message's round trip to the server, as last measured.
    pub fn rtt(&self) -> Duration {
        match &self.0 {
            Kind::Local(_) => Duration::ZERO,
            Kind::Redis(link) => link.rtt(),
        }
    }

    /// Sends a message. It is dropped when the bus is away or too much waits.
    pub fn publish(&self, channel: Channel, message: Bytes) -> Receipt {
        match &self.0 {
            Kind::Local(endpoint) => endpoint.publish(&channel, &message),
            Kind::Redis(link) => link.publish(channel, message),
        }
    }

    /// Takes part in a channel from now on: it is heard before what is published after this can be answered.
    pub fn subscribe(&self, channel: Channel) {
        match &self.0 {
            Kind::Local(endpoint) => endpoint.subscribe(channel),
            Kind::Redis(link) => link.subscribe(channel),
        }
    }

    /// Leaves a channel, soon.
    pub fn unsubscribe(&self, channel: Channel) {
        match &self.0 {
            Kind::Local(endpoint) => endpoint.unsubscribe(&channel),
            Kind::Redis(link) => link.unsubscribe(channel),
        }
    }

    /// Waits until there is room for another message.
    pub async fn room(&self) {
        match &self.0 {
            Kind::Local(_) => {}
            Kind::Redis(link) => link.room().await,
        }
    }

    /// Carries messages until dropped.
    pub async fn run(&self, inbox: Arc<dyn Inbox>) {
        match &self.0 {
            Kind::Local(endpoint) => endpoint.run(&*inbox).await,
            Kind::Redis(link) => link.run(inbox).await,
        }
    }

    /// What happened so far, for the metrics.
    pub fn counts(&self) -> Counts {
        match &self.0 {
            Kind::Local(endpoint) => endpoint.counts(),
            Kind::Redis(link) => link.counts(),
        }
    }
}

/// What happened on a node's end of the bus since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages handed over to be sent.
    pub published: u64,
    /// Messages that came.
    pub received: u64,
    /// Messages that were dropped here: the bus was away or full.
    pub dropped: u64,
    /// Times that messages may have been missed.
    pub interrupted: u64,
}
