//! What an operator sees: logs, the trace that a request belongs to, and metrics.

mod logs;
mod metrics;
mod trace;

pub use logs::{LogFormat, LogsError, init_logs, is_filter};
pub use metrics::{AuthFailure, Direction, FrameDrop, InFlight, Limited, Metrics, OpenTunnel, Outcome, Violation};
pub use trace::continue_trace;
