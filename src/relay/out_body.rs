//! What goes to the downstream, and what is written down about it when it has gone.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use tokio::sync::OwnedSemaphorePermit;

use super::{State, downstream::handle::ConnHandle, ingress::Arrival, limits::Taken};
use crate::{
    error::Cause,
    exchange::{Exchange, body::Broken, ingress::AnswerBody},
    ids::{ClientId, RequestId},
    telemetry::{InFlight, Outcome},
    wire::frame::Code,
};

/// The body of any answer of the public listener.
pub enum OutBody {
    /// All here.
    Whole(Full<Bytes>, Option<Record>),
    /// As it comes through the tunnel.
    Streamed(Box<AnswerBody>, Option<Record>),
}

impl OutBody {
    /// No bytes.
    pub fn empty() -> Self {
        OutBody::Whole(Full::default(), None)
    }
}

impl From<Bytes> for OutBody {
    /// Bytes that are of no exchange.
    fn from(bytes: Bytes) -> Self {
        OutBody::Whole(Full::new(bytes), None)
    }
}

impl Body for OutBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let (frame, record) = match self.get_mut() {
            OutBody::Whole(body, record) => {
                let frame = ready!(Pin::new(body).poll_frame(cx));
                (
                    frame.map(|frame| frame.map_err(|never| match never {})),
                    record.as_mut(),
                )
            }
            OutBody::Streamed(body, record) => (ready!(Pin::new(&mut **body).poll_frame(cx)), record.as_mut()),
        };
        if let Some(record) = record {
            record.on_frame(frame.as_ref());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            OutBody::Whole(body, _) => body.is_end_stream(),
            OutBody::Streamed(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            OutBody::Whole(body, _) => body.size_hint(),
            OutBody::Streamed(body, _) => body.size_hint(),
        }
    }
}

/// One exchange as the log and the metrics see it; written when it is dropped.
pub struct Record {
    /// Who counts.
    pub state: Arc<State>,
    /// The connection, to be cut when a body breaks whose end only the close tells.
    pub connection: Option<ConnHandle>,
    /// The exchange that answered it.
    pub exchange: Option<Arc<Exchange>>,
    /// Whose exchange.
    pub client_id: ClientId,
    /// Its name, if one was opened.
    pub request_id: RequestId,
    /// The request's method.
    pub method: Method,
    /// The request's path, without the query: that may hold credentials.
    pub path: Box<str>,
    /// The status answered.
    pub status: u16,
    /// When the request came.
    pub started: Instant,
    /// Bytes of the body that went out.
    pub bytes: u64,
    /// The Content-Length: at which the body is whole, whether or not anyone asks for its end.
    pub declared: Option<u64>,
    /// Counts it as in flight.
    pub in_flight: Option<InFlight>,
    /// Its places among those of its address and its client.
    pub taken: Taken,
    /// How it ended.
    pub outcome: Outcome,
    /// Its share of the memory for buffered responses.
    pub budget: Option<OwnedSemaphorePermit>,
}

impl Record {
    /// A request has come.
    pub fn begin(state: &Arc<State>, arrival: &Arrival) -> Self {
        Self {
            state: state.clone(),
            connection: None,
            exchange: None,
            client_id: arrival.client_id.clone(),
            request_id: arrival.request_id,
            method: arrival.parts.method.clone(),
            path: arrival.target.path().into(),
            status: 0,
            started: Instant::now(),
            bytes: 0,
            declared: None,
            in_flight: Some(state.board.metrics.exchange()),
            taken: Taken::default(),
            outcome: Outcome::DownstreamLeft,
            budget: None,
        }
    }

    /// It is answered with this; a `declared` body is whole at that many bytes.
    pub fn answered(mut self, exchange: &Arc<Exchange>, status: StatusCode, declared: Option<u64>) -> Self {
        (self.request_id, self.status, self.declared) = (exchange.id, status.as_u16(), declared);
        self.exchange = Some(exchange.clone());
        self
    }

    /// It has no body to wait for.
    pub fn ended(mut self) -> Self {
        self.outcome = Outcome::Ok;
        self
    }

    /// Its body goes out on this connection.
    pub fn on(mut self, connection: ConnHandle) -> Self {
        self.connection = Some(connection);
        self
    }

    /// Its body is held in memory.
    pub fn with_budget(mut self, budget: OwnedSemaphorePermit) -> Self {
        self.budget = Some(budget);
        self
    }

    /// It is answered with an error of ours.
    pub fn fail(mut self, cause: &Cause) {
        (self.status, self.outcome) = (cause.status().as_u16(), Outcome::from(cause));
    }

    fn on_frame(&mut self, frame: Option<&Result<Frame<Bytes>, Broken>>) {
        match frame {
            Some(Ok(frame)) => {
                self.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                if self.declared == Some(self.bytes) {
                    self.outcome = Outcome::Ok;
                }
            }
            Some(Err(Broken(code))) => {
                self.outcome = outcome_of(*code);
                if let Some(connection) = &self.connection {
                    connection.abort();
                }
            }
            None => self.outcome = Outcome::Ok,
        }
    }
}

/// How an exchange that ended with this code is counted.
pub fn outcome_of(code: Code) -> Outcome {
    match code {
        Code::PathLost | Code::AgentLeft | Code::Gone => Outcome::TunnelLost,
        Code::Cancelled | Code::RequestBroken => Outcome::DownstreamLeft,
        Code::Refused => Outcome::NoTunnel,
        Code::Timeout => Outcome::UpstreamTimeout,
        _ => Outcome::UpstreamFailed,
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.state.board.metrics.from_upstream(self.bytes);
        self.state
            .board
            .metrics
            .to_upstream(self.exchange.as_ref().map_or(0, |exchange| exchange.body_sent()));
        self.in_flight
            .take()
            .into_iter()
            .for_each(|in_flight| in_flight.end(self.outcome));
        let duration_ms = self.started.elapsed().as_millis() as u64;
        tracing::event!(
            target: "adit::access",
            tracing::Level::INFO,
            client.id = %self.client_id,
            request.id = %self.request_id,
            method = %self.method,
            path = %self.path,
            status = self.status,
            bytes = self.bytes,
            duration_ms,
            outcome = self.outcome.as_str(),
            "request"
        );
    }
}
