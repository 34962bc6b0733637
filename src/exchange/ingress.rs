//! The ingress end: opens an exchange from a request and hands back the response, interim heads first.

use std::{pin::pin, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body::Body;
use tokio_util::task::AbortOnDropHandle;

use super::{
    body::{ExchangeBody, Pump, PumpError, Records},
    table::Open,
};
use crate::wire::{
    frame::Code,
    head::{Record, RequestHead, ResponseHead},
};

/// How long a downstream that asked for `100 Continue` waits for the upstream's word on it, before its body is read
/// anyway (RFC 9110 §10.1.1 lets a proxy decide).
const CONTINUE_AFTER: Duration = Duration::from_secs(1);

/// How the ingress end serves one request.
#[derive(Debug, Clone, Copy)]
pub struct Ingress {
    /// No response head within this long of the last progress: 504.
    pub response_timeout: Duration,
    /// No bytes of the request body for this long: 408.
    pub body_idle: Duration,
    /// Drops the trailers that may not pass.
    pub keep_trailers: fn(&mut HeaderMap),
}

/// Why there is no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The exchange was reset with this code.
    Reset(Code),
    /// The downstream's body broke off or made no progress.
    Body(PumpError),
}

/// A response whose head has come. The exchange lives as long as this.
#[derive(Debug)]
pub struct Answer {
    /// The final head.
    pub head: ResponseHead,
    /// What follows it.
    pub records: Records,
    /// The exchange; dropping it ends it.
    pub open: Open,
    /// Still sending the request's body.
    pub upload: Option<Upload>,
}

/// A response's body, and with it the exchange.
pub type AnswerBody = ExchangeBody<(Open, Option<Upload>)>;

impl Answer {
    /// The response's body, which keeps the exchange alive.
    pub fn into_body(self, declared: Option<u64>, keep_trailers: fn(&mut HeaderMap)) -> AnswerBody {
        ExchangeBody::new(self.records, declared, keep_trailers, (self.open, self.upload))
    }
}

impl Ingress {
    /// Sends a request through an exchange that was just opened for it, and waits for the head of its response. `interim`
    /// is called with each 1xx before it.
    pub async fn call<B>(
        &self,
        open: Open,
        head: &RequestHead,
        body: Option<B>,
        mut interim: impl FnMut(ResponseHead),
    ) -> Result<Answer, Failure>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
    {
        let exchange = &open.exchange;
        exchange.set_answer_within(Some(self.response_timeout));
        exchange.write([head.encode()]);
        let mut records = Records::new(exchange.clone());
        let waits = head.headers.contains_key(http::header::EXPECT);
        let mut upload = None;
        match body {
            None if head.flags.upgrade => exchange.flush(),
            None => {
                exchange.finish();
                exchange.flush();
            }
            Some(body) if waits => {
                exchange.flush();
                let pump = Pump::new(body, exchange.clone(), Some(self.body_idle), self.keep_trailers);
                return self.call_expecting(open, records, pump, interim).await;
            }
            Some(body) => {
                let pump = Pump::new(body, exchange.clone(), Some(self.body_idle), self.keep_trailers);
                upload = Upload::start(pump).await?;
            }
        }
        let head = self.final_head(&open, &mut records, &mut upload, &mut interim).await?;
        Ok(Answer {
            head,
            records,
            open,
            upload,
        })
    }

    /// With `Expect: 100-continue` the body is read only when the upstream wants it, or says nothing for a while.
    async fn call_expecting<B>(
        &self,
        open: Open,
        mut records: Records,
        pump: Pump<B>,
        mut interim: impl FnMut(ResponseHead),
    ) -> Result<Answer, Failure>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
    {
        let mut patience = pin!(tokio::time::sleep(CONTINUE_AFTER));
        loop {
            let head = tokio::select! {
                head = next_head(&mut records) => head.map_err(Failure::Reset)?,
                () = &mut patience => break,
            };
            match head.status {
                StatusCode::CONTINUE => break,
                status if is_interim(status) => interim(head),
                status => {
                    open.exchange.set_answer_within(None);
                    // It did not wait for the body, but may read it yet: only a refusal says that it will not.
                    let refused = status.is_client_error() || status.is_server_error();
                    let upload = if refused { None } else { Upload::start(pump).await? };
                    return Ok(Answer {
                        head,
                        records,
                        open,
                        upload,
                    });
                }
            }
        }
        let mut upload = Upload::start(pump).await?;
        let head = self.final_head(&open, &mut records, &mut upload, &mut interim).await?;
        Ok(Answer {
            head,
            records,
            open,
            upload,
        })
    }

    async fn final_head(
        &self,
        open: &Open,
        records: &mut Records,
        upload: &mut Option<Upload>,
        interim: &mut impl FnMut(ResponseHead),
    ) -> Result<ResponseHead, Failure> {
        loop {
            let head = match upload {
                None => next_head(records).await.map_err(Failure::Reset)?,
                Some(sending) => tokio::select! {
                    biased;
                    failed = sending.failure() => match failed {
                        Some(failure) => return Err(failure),
                        None => { *upload = None; continue }
                    },
                    head = next_head(records) => head.map_err(Failure::Reset)?,
                },
            };
            match head.status {
                StatusCode::CONTINUE => {}
                status if is_interim(status) => interim(head),
                _ => {
                    open.exchange.set_answer_within(None);
                    return Ok(head);
                }
            }
        }
    }
}

fn is_interim(status: StatusCode) -> bool {
    status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
}

async fn next_head(records: &mut Records) -> Result<ResponseHead, Code> {
    match std::future::poll_fn(|cx| records.poll_next(cx)).await? {
        Some(Record::Response(head)) => Ok(head),
        _ => Err(Code::UpstreamFailed),
    }
}

/// A request body on its way, in a task that ends with this value.
#[derive(Debug)]
pub struct Upload(AbortOnDropHandle<Result<(), PumpError>>);

impl Upload {
    /// Sends what is there; a task goes on with what is not.
    async fn start<B>(mut pump: Pump<B>) -> Result<Option<Self>, Failure>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
    {
        match futures_util::poll!(&mut pump) {
            std::task::Poll::Ready(Ok(())) | std::task::Poll::Ready(Err(PumpError::Peer(_))) => Ok(None),
            std::task::Poll::Ready(Err(error)) => Err(Failure::Body(error)),
            std::task::Poll::Pending => Ok(Some(Self(AbortOnDropHandle::new(tokio::spawn(Self::go_on(pump)))))),
        }
    }

    /// A body that breaks off must not look whole to the upstream, whether or not it has answered.
    async fn go_on<B>(pump: Pump<B>) -> Result<(), PumpError>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
    {
        let exchange = pump.exchange().clone();
        let result = pump.await;
        if let Err(PumpError::Source | PumpError::Idle) = result {
            exchange.reset(Code::RequestBroken);
        }
        result
    }

    /// Waits until it has ended; `None` when the body is through, or the peer wants no more of it.
    async fn failure(&mut self) -> Option<Failure> {
        match (&mut self.0).await {
            Ok(Err(error @ (PumpError::Source | PumpError::Idle))) => Some(Failure::Body(error)),
            _ => None,
        }
    }
}
