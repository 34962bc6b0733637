//! HTTP bodies on streams, the same at both ends: [`ExchangeBody`] is read from the incoming stream, [`Pump`] writes one
//! to the outgoing stream. An upgraded connection is the same two streams with a socket behind: [`tunnel`].

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame as BodyFrame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Sleep,
};

use super::Exchange;
use crate::wire::{
    frame::Code,
    head::{self, Record, RecordReader},
};

/// Read at once from an upgraded connection, bytes.
const COPY_BUFFER: usize = 16 * 1024;

/// Why a body broke off. It is never reported as an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other end of the tunnel broke off ({0:?})")]
pub struct Broken(pub Code);

/// The records of an exchange's incoming stream.
#[derive(Debug)]
pub struct Records {
    exchange: Arc<Exchange>,
    reader: RecordReader,
    ended: bool,
}

impl Records {
    /// Reads from the stream's beginning, once.
    pub fn new(exchange: Arc<Exchange>) -> Self {
        Self {
            exchange,
            reader: RecordReader::default(),
            ended: false,
        }
    }

    /// Whether the stream is known to be at its end already, without waiting.
    pub fn is_at_end(&self) -> bool {
        self.reader.is_between_records() && self.exchange.is_read_to_end()
    }

    /// The next record; `None` at the stream's end.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Record>, Code>> {
        loop {
            match self.reader.next_record() {
                Ok(Some(record)) => return Poll::Ready(Ok(Some(record))),
                Ok(None) if self.ended => return Poll::Ready(Ok(None)),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(self.malformed(error))),
            }
            match ready!(self.exchange.poll_read(cx))? {
                Some(chunk) => self.reader.push(chunk),
                None => {
                    self.ended = true;
                    if let Err(error) = self.reader.end() {
                        return Poll::Ready(Err(self.malformed(error)));
                    }
                }
            }
        }
    }

    fn malformed(&self, error: head::HeadError) -> Code {
        tracing::warn!(request.id = %self.exchange.id, client.id = %self.exchange.owner().client_id, %error, "a stream cannot be read");
        self.exchange.reset(Code::Protocol);
        Code::Protocol
    }
}

/// The body of a message whose head was read: DATA and TRAILERS until the stream's end. It keeps `K` alive as long.
#[derive(Debug)]
pub struct ExchangeBody<K> {
    records: Records,
    _keep: K,
    /// What the head said is still to come, if it did.
    declared: Option<u64>,
    keep_trailers: fn(&mut HeaderMap),
    done: bool,
}

impl<K> ExchangeBody<K> {
    /// `declared` is the Content-Length, against which the bytes are held; `keep_trailers` drops forbidden trailers.
    pub fn new(records: Records, declared: Option<u64>, keep_trailers: fn(&mut HeaderMap), keep: K) -> Self {
        Self {
            records,
            declared,
            keep_trailers,
            done: false,
            _keep: keep,
        }
    }

    fn count(&mut self, length: usize) -> Result<(), Broken> {
        let Some(left) = &mut self.declared else { return Ok(()) };
        *left = left.checked_sub(length as u64).ok_or(Broken(Code::UpstreamFailed))?;
        Ok(())
    }

    fn end(&mut self) -> Option<Result<BodyFrame<Bytes>, Broken>> {
        self.done = true;
        self.declared
            .is_some_and(|left| left > 0)
            .then_some(Err(Broken(Code::UpstreamFailed)))
    }
}

impl<K: Unpin> Body for ExchangeBody<K> {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<BodyFrame<Bytes>, Broken>>> {
        if self.done {
            return Poll::Ready(None);
        }
        let record = match ready!(self.records.poll_next(cx)) {
            Ok(record) => record,
            Err(code) => {
                self.done = true;
                return Poll::Ready(Some(Err(Broken(code))));
            }
        };
        Poll::Ready(match record {
            Some(Record::Data(data)) => Some(self.count(data.len()).map(|()| BodyFrame::data(data))),
            Some(Record::Trailers(mut trailers)) => {
                (self.keep_trailers)(&mut trailers);
                Some(Ok(BodyFrame::trailers(trailers)))
            }
            Some(_) => Some(Err(Broken(Code::Protocol))),
            None => self.end(),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.done
    }

    fn size_hint(&self) -> SizeHint {
        self.declared.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Why a body that was to be sent did not go out whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PumpError {
    /// The body's source broke off.
    #[error("the body broke off")]
    Source,
    /// The source sent nothing for too long.
    #[error("the body made no progress for too long")]
    Idle,
    /// The exchange ended, or the peer reads no more.
    #[error("the other end reads no more ({0:?})")]
    Peer(Code),
}

/// Writes a body to an exchange's outgoing stream as its bytes come and as credit allows, then ends the stream. Bytes
/// that are there together leave together; whatever was written leaves before this waits.
pub struct Pump<B> {
    body: B,
    exchange: Arc<Exchange>,
    idle: Option<Duration>,
    idle_timer: Option<Pin<Box<Sleep>>>,
    keep_trailers: fn(&mut HeaderMap),
}

impl<B: Body<Data = Bytes> + Unpin> Pump<B> {
    /// `idle` bounds each wait for the body's next bytes.
    pub fn new(body: B, exchange: Arc<Exchange>, idle: Option<Duration>, keep_trailers: fn(&mut HeaderMap)) -> Self {
        Self {
            body,
            exchange,
            idle,
            idle_timer: None,
            keep_trailers,
        }
    }

    /// The exchange it writes to.
    pub fn exchange(&self) -> &Arc<Exchange> {
        &self.exchange
    }

    fn poll_pump(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PumpError>> {
        loop {
            ready!(self.exchange.poll_writable(cx)).map_err(PumpError::Peer)?;
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.idle_timer = None;
                    self.write(frame);
                    if self.body.is_end_stream() {
                        self.exchange.finish(); // the end leaves with the last bytes
                        return Poll::Ready(Ok(()));
                    }
                }
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Err(PumpError::Source)),
                Poll::Ready(None) => {
                    self.exchange.finish();
                    return Poll::Ready(Ok(()));
                }
                Poll::Pending => return self.poll_idle(cx),
            }
        }
    }

    fn write(&mut self, frame: BodyFrame<Bytes>) {
        match frame.into_data() {
            Ok(data) if data.is_empty() => {}
            Ok(data) => self.exchange.write_data(data),
            Err(frame) => {
                if let Ok(mut trailers) = frame.into_trailers() {
                    (self.keep_trailers)(&mut trailers);
                    self.exchange.write([head::encode_trailers(&trailers)]);
                }
            }
        }
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PumpError>> {
        let Some(idle) = self.idle else { return Poll::Pending };
        let timer = self
            .idle_timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(idle)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(PumpError::Idle))
    }
}

impl<B: Body<Data = Bytes> + Unpin> Future for Pump<B> {
    type Output = Result<(), PumpError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = self.poll_pump(cx);
        self.exchange.flush();
        result
    }
}

/// After an upgrade: copies both ways between a connection and the exchange until both directions have ended, or one
/// broke. Half-closes pass through.
pub async fn tunnel<S: AsyncRead + AsyncWrite>(
    connection: S,
    records: Records,
    exchange: Arc<Exchange>,
) -> Result<(), Code> {
    let (mut read_half, mut write_half) = tokio::io::split(connection);
    let outward = async {
        loop {
            std::future::poll_fn(|cx| exchange.poll_writable(cx)).await?;
            let mut buffer = bytes::BytesMut::with_capacity(COPY_BUFFER);
            match read_half.read_buf(&mut buffer).await {
                Ok(0) => break,
                Ok(_) => exchange.write_data(buffer.freeze()),
                Err(_) => return Err(Code::Cancelled),
            }
            exchange.flush();
        }
        exchange.finish();
        exchange.flush();
        Ok(())
    };
    let inward = async {
        let mut records = records;
        loop {
            match std::future::poll_fn(|cx| records.poll_next(cx)).await? {
                Some(Record::Data(data)) => write_half.write_all(&data).await.map_err(|_| Code::Cancelled)?,
                Some(_) => return Err(Code::Protocol),
                None => break,
            }
        }
        write_half.shutdown().await.map_err(|_| Code::Cancelled)
    };
    tokio::try_join!(outward, inward).map(|_| ())
}
