//! What an operator sees: logs, the trace that a request belongs to, its spans, and metrics.

mod export;
mod logs;
mod metrics;
mod registry_meter;
mod spans;
mod trace;

pub use export::{Traces, TracesError};
pub use logs::{LogFormat, LogsError, init, is_filter};
pub use metrics::{
    AuthFailure, Dialect, Direction, FrameDrop, GapEnd, InFlight, Limited, Metrics, OpenTunnel, Outcome, Place, Seen,
    Unsubscribed, Via, Violation,
};
pub use registry_meter::RegistryMeter;
pub use spans::{end_span, fail_span, ingress_span, owner_span, spans_are_taken, tunnel_span, upstream_span};
pub use trace::{carry_trace, continue_trace};
