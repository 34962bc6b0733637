//! Bodies that a story writes piece by piece, and long ones that are compared by hash.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use aws_lc_rs::digest;
use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tokio::sync::mpsc;

use super::{AnyBody, AnyError, pattern, within};

/// The writing end of a body; dropping it ends the body well.
pub struct BodyWriter(mpsc::Sender<Result<Frame<Bytes>, AnyError>>);

struct Written(mpsc::Receiver<Result<Frame<Bytes>, AnyError>>);

impl Body for Written {
    type Data = Bytes;
    type Error = AnyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnyError>>> {
        self.0.poll_recv(cx)
    }
}

/// A body, and who writes it.
pub fn written() -> (BodyWriter, AnyBody) {
    let (frames_tx, frames_rx) = mpsc::channel(1);
    (BodyWriter(frames_tx), Written(frames_rx).boxed())
}

impl BodyWriter {
    /// Hands over bytes; false when nobody reads any more.
    pub async fn write(&self, bytes: impl Into<Bytes>) -> bool {
        self.0.send(Ok(Frame::data(bytes.into()))).await.is_ok()
    }

    /// Ends the body with trailers.
    pub async fn trailers(self, trailers: http::HeaderMap) {
        self.0.send(Ok(Frame::trailers(trailers))).await.ok();
    }

    /// Ends the body badly: its connection breaks.
    pub async fn fail(self) {
        self.0.send(Err(AnyError::other("the story says so"))).await.ok();
    }

    /// Waits until the body is read no more.
    pub async fn closed(&self) {
        within("the body's reader leaves", self.0.closed()).await;
    }

    /// Writes a long body, as fast as it is read, then ends it.
    pub async fn write_long(self, seed: u64, length: u64) {
        for piece in Pieces::new(seed, length) {
            if !self.write(piece).await {
                return;
            }
        }
    }
}

const PIECE: u64 = 64 * 1024;

/// The pieces of a long body, no two of them alike.
pub struct Pieces {
    block: Bytes,
    at: u64,
    length: u64,
}

impl Pieces {
    pub fn new(seed: u64, length: u64) -> Self {
        let block = pattern(seed, 0, PIECE as usize);
        Self { block, at: 0, length }
    }
}

impl Iterator for Pieces {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let length = PIECE.min(self.length - self.at) as usize;
        if length == 0 {
            return None;
        }
        let mut piece = self.block.to_vec();
        piece[..8].copy_from_slice(&self.at.to_be_bytes());
        self.at += length as u64;
        Some(Bytes::from(piece).slice(..length))
    }
}

/// A body of so many bytes, made as it is read.
pub fn long(seed: u64, length: u64) -> AnyBody {
    let (writer, body) = written();
    tokio::spawn(writer.write_long(seed, length));
    body
}

/// What a body was: its length and the hash of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sum(pub u64, pub Vec<u8>);

pub fn sum_of_long(seed: u64, length: u64) -> Sum {
    let mut hash = digest::Context::new(&digest::SHA256);
    Pieces::new(seed, length).for_each(|piece| hash.update(&piece));
    Sum(length, hash.finish().as_ref().to_vec())
}

/// Reads a body to its end; `Err` with what came when it broke off.
pub async fn sum<B>(mut body: B) -> Result<Sum, u64>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Debug,
{
    let (mut hash, mut length) = (digest::Context::new(&digest::SHA256), 0);
    while let Some(frame) = within("the next piece of a body", body.frame()).await {
        let Ok(frame) = frame.inspect_err(|error| eprintln!("a body broke off: {error:?}")) else {
            return Err(length);
        };
        if let Ok(data) = frame.into_data() {
            length += data.len() as u64;
            hash.update(&data);
        }
    }
    Ok(Sum(length, hash.finish().as_ref().to_vec()))
}

/// The next bytes of a body.
pub async fn next<B>(body: &mut B) -> Option<Bytes>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Debug,
{
    let frame = within("the next piece of a body", body.frame()).await?;
    Some(frame.expect("the body goes on").into_data().unwrap_or_default())
}

/// Reads what is left; true when the body ends well.
pub async fn ends_well<B>(body: &mut B) -> bool
where
    B: Body<Data = Bytes> + Unpin,
{
    while let Some(frame) = within("the end of a body", body.frame()).await {
        if frame.is_err() {
            return false;
        }
    }
    true
}
