//! stub
#![allow(missing_docs, dead_code)]
use crate::ids::ClientId;
use bytes::Bytes;
use std::sync::Arc;
#[derive(Debug)]
pub enum Audience {
    All,
    Only(Vec<u64>),
    AllBut(Vec<u64>),
}
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct PublishError;
#[derive(Debug)]
pub enum Left {
    TooSlow,
    Gap,
    ClientGone,
}
pub struct Delivery {
    pub body: Bytes,
}
pub struct Position;
#[derive(Default)]
pub struct Fanout;
pub struct Subscription;
impl Subscription {
    pub async fn next(&mut self) -> Result<Delivery, Left> {
        std::future::pending().await
    }
}
impl Fanout {
    pub async fn publish(&self, _: &ClientId, _: Audience, _: Bytes) -> Result<(), PublishError> {
        Ok(())
    }
    pub fn subscribe(self: &Arc<Self>, _: &ClientId, _: u64, _: Option<Position>) -> Subscription {
        Subscription
    }
}
