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
use tracing::Span;

use super::{
    State, downstream::handle::ConnHandle, ingress::Arrival, limits::Taken, subscribe::Events, tunnels::Tunnel,
};
use crate::{
    error::Cause,
    exchange::{Exchange, body::Broken, ingress::AnswerBody},
    ids::{ClientId, RequestId, TunnelId},
    telemetry::{self, Dialect, InFlight, Outcome, Place, Via},
    wire::{self, frame::Code},
};

/// The body of any answer of the public listener.
pub enum OutBody {
    /// All here.
    Whole(Full<Bytes>, Option<Record>),
    /// As it comes through the tunnel.
    Streamed(Box<AnswerBody>, Option<Record>),
    /// What is published to subscribers.
    Events(Box<Events>),
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
            OutBody::Events(events) => {
                let bytes = ready!(events.poll_bytes(cx));
                return Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))));
            }
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
            OutBody::Events(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            OutBody::Whole(body, _) => body.size_hint(),
            OutBody::Streamed(body, _) => body.size_hint(),
            OutBody::Events(_) => SizeHint::default(),
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
    /// When what of it happened.
    pub times: Times,
    /// The tunnel that it was last sent by.
    pub tunnel_id: Option<TunnelId>,
    /// What that speaks, and who holds it.
    pub via: Via,
    /// It, for whoever follows traces.
    pub span: Span,
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
            times: Times::begin(),
            tunnel_id: None,
            via: Via::default(),
            span: span_of(state, arrival),
            bytes: 0,
            declared: None,
            in_flight: Some(state.board.metrics.exchange()),
            taken: Taken::default(),
            outcome: Outcome::DownstreamLeft,
            budget: None,
        }
    }

    /// It goes by this tunnel.
    pub fn through(&mut self, tunnel: &Tunnel) {
        self.times.sent = Some(Instant::now());
        self.tunnel_id = Some(tunnel.id);
        self.via = Via {
            place: place(!tunnel.is_here()),
            dialect: match tunnel.dialect {
                wire::Dialect::Adit => Dialect::Adit,
                wire::Dialect::MoosicBox => Dialect::MoosicBox,
            },
        };
    }

    /// It is answered with this; a `declared` body is whole at that many bytes.
    pub fn answered(mut self, exchange: &Arc<Exchange>, status: StatusCode, declared: Option<u64>) -> Self {
        (self.request_id, self.status, self.declared) = (exchange.id, status.as_u16(), declared);
        self.times.answered = Some(Instant::now());
        if let Some(path) = exchange.path() {
            self.via.place = place(path.is_over_bus()); // it may have moved
        }
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

fn place(elsewhere: bool) -> Place {
    if elsewhere { Place::Peer } else { Place::Local }
}

fn span_of(state: &State, arrival: &Arrival) -> Span {
    let Arrival { parts, target, .. } = arrival;
    let request = (&parts.method, target.path(), target.authority());
    let node_id = state.registry.node_id();
    telemetry::ingress_span(node_id, &arrival.client_id, arrival.request_id, request, &parts.headers)
}

/// When what of a request happened.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// It came.
    pub started: Instant,
    /// It was last sent by a tunnel.
    pub sent: Option<Instant>,
    /// The head of its answer was there.
    pub answered: Option<Instant>,
}

impl Times {
    fn begin() -> Self {
        Self {
            started: Instant::now(),
            sent: None,
            answered: None,
        }
    }

    /// As `Server-Timing` (W3C), in milliseconds: until now in all, and since it was sent by a tunnel.
    pub fn server_timing(&self) -> String {
        let ms = |since: Instant| since.elapsed().as_secs_f64() * 1000.0;
        let tunnel = self.sent.map(|sent| format!(", tunnel;dur={:.3}", ms(sent)));
        format!("total;dur={:.3}{}", ms(self.started), tunnel.unwrap_or_default())
    }
}

impl Record {
    fn count(&mut self) {
        let metrics = &self.state.board.metrics;
        metrics.from_upstream(self.bytes);
        if let Some(exchange) = &self.exchange {
            metrics.to_upstream(exchange.body_sent());
            let (resent, stalls) = exchange.troubles();
            metrics.troubles(resent, stalls);
        }
        let head_after = self.times.answered.map(|answered| answered - self.times.started);
        if let Some(in_flight) = self.in_flight.take() {
            in_flight.end(self.outcome, self.via, head_after);
        }
    }

    fn end_span(&self) {
        if self.span.is_disabled() {
            return;
        }
        if let Some(id) = self.tunnel_id {
            self.span.record("tunnel.id", tracing::field::display(id));
        }
        self.span.record("adit.tunnel.place", self.via.place.as_str());
        self.span.record("adit.tunnel.dialect", self.via.dialect.as_str());
        // A refusal is the downstream's fault, and so is a downstream that left.
        let ours = !matches!(self.outcome, Outcome::Ok | Outcome::Refused | Outcome::DownstreamLeft);
        let error = ours.then(|| self.outcome.as_str());
        telemetry::end_span(&self.span, Some(self.status), self.bytes, error);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.count();
        self.end_span();
        let duration_ms = self.times.started.elapsed().as_millis() as u64;
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
            tunnel.id = self.tunnel_id.map(tracing::field::display),
            tunnel.place = self.via.place.as_str(),
            tunnel.dialect = self.via.dialect.as_str(),
            node.id = %self.state.registry.node_id(),
            "request"
        );
    }
}
