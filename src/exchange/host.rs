//! The host end: reads a request from an exchange, has it served by a function from request to response, and writes the
//! response. Cancelled at once when the exchange ends.

use std::{future::Future, pin::pin, sync::Arc};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Body;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Exchange,
    body::{ExchangeBody, Pump, PumpError, Records, tunnel},
};
use crate::wire::{
    frame::Code,
    head::{Record, RequestHead, ResponseHead},
};

/// The request's body; dropped early, the ingress is told to send no more.
pub type RequestBody = ExchangeBody<Reading>;

/// Tells the peer to stop sending when the body is dropped before its end.
#[derive(Debug)]
pub struct Reading(Arc<Exchange>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.stop_reading();
    }
}

/// Sends interim (1xx) heads while a request is served.
#[derive(Debug, Clone)]
pub struct Interim(Arc<Exchange>);

impl Interim {
    /// Sends one.
    pub fn send(&self, head: &ResponseHead) {
        self.0.write([head.encode()]);
        self.0.flush();
    }
}

/// How a request was served.
pub enum Served<B, U> {
    /// With a response.
    Response(ResponseHead, B),
    /// With 101 and a connection: what follows are its bytes.
    Upgraded(ResponseHead, U),
}

/// What a request was answered with, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The response's status, if there was one.
    pub status: Option<u16>,
    /// Why it ended before its end, if it did.
    pub broken: Option<Code>,
}

/// Serves one exchange to its end. `call` gets the head and, unless the request has none, the body.
pub async fn serve<F, Fut, B, U>(exchange: Arc<Exchange>, keep_trailers: fn(&mut HeaderMap), call: F) -> Summary
where
    F: FnOnce(RequestHead, Option<RequestBody>, Interim) -> Fut,
    Fut: Future<Output = Result<Served<B, U>, Code>>,
    B: Body<Data = Bytes> + Unpin,
    U: AsyncRead + AsyncWrite,
{
    let mut status = None;
    let broken = {
        let mut work = pin!(work(exchange.clone(), keep_trailers, call, &mut status));
        tokio::select! {
            biased;
            result = &mut work => result.err().inspect(|code| exchange.reset(*code)),
            code = exchange.end_of_it() => match code {
                // All is here; what came through an upgraded connection may still be on its way to the upstream.
                Code::Finished => work.await.err().filter(|code| *code != Code::Finished),
                code => Some(code),
            },
        }
    };
    Summary { status, broken }
}

async fn work<F, Fut, B, U>(
    exchange: Arc<Exchange>,
    keep_trailers: fn(&mut HeaderMap),
    call: F,
    status: &mut Option<u16>,
) -> Result<(), Code>
where
    F: FnOnce(RequestHead, Option<RequestBody>, Interim) -> Fut,
    Fut: Future<Output = Result<Served<B, U>, Code>>,
    B: Body<Data = Bytes> + Unpin,
    U: AsyncRead + AsyncWrite,
{
    let mut records = Records::new(exchange.clone());
    let Some(Record::Request(head)) = std::future::poll_fn(|cx| records.poll_next(cx)).await? else {
        return Err(Code::Protocol);
    };
    let (records, body) = if head.flags.upgrade {
        (Some(records), None)
    } else if head.flags.empty {
        (None, None)
    } else {
        (
            None,
            Some(ExchangeBody::new(
                records,
                None,
                keep_trailers,
                Reading(exchange.clone()),
            )),
        )
    };
    let served = call(head, body, Interim(exchange.clone())).await?;
    match (served, records) {
        (Served::Response(head, body), _) => {
            *status = Some(head.status.as_u16());
            exchange.write([head.encode()]);
            match Pump::new(body, exchange, None, keep_trailers).await {
                Ok(()) => Ok(()),
                Err(PumpError::Peer(code)) => Err(code),
                Err(PumpError::Source | PumpError::Idle) => Err(Code::UpstreamFailed),
            }
        }
        (Served::Upgraded(head, connection), Some(records)) => {
            *status = Some(head.status.as_u16());
            exchange.write([head.encode()]);
            exchange.flush();
            tunnel(connection, records, exchange).await
        }
        (Served::Upgraded(..), None) => Err(Code::UpstreamFailed),
    }
}
