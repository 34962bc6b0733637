//! Logs on standard error: for people on a terminal, JSON lines otherwise.

use std::io::{self, IsTerminal};

use serde::Deserialize;
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, registry::LookupSpan, util::SubscriberInitExt};

use super::{export::Traces, spans::SPANS};

/// For whom the logs are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `human` on a terminal, `json` otherwise.
    #[default]
    Auto,
    /// A line of text an event.
    Human,
    /// A JSON object an event, one a line.
    Json,
}

/// Why logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// Not what `tracing_subscriber::EnvFilter` reads.
    #[error("`{0}` is not a log filter: write a level (\"info\") or levels by module (\"info,adit::relay=debug\")")]
    Filter(String),
    /// Only the first call in a process counts.
    #[error("logs are set up already in this process")]
    Again,
}

/// Whether `filter` is levels by module: `info`, `info,adit::relay=debug`.
pub fn is_filter(filter: &str) -> bool {
    EnvFilter::try_new(filter).is_ok()
}

/// Sends the process's logs to standard error, and its spans to a collector if there is one. Once a process, before
/// anything else runs.
pub fn init(format: LogFormat, filter: &str, traces: Option<&Traces>) -> Result<(), LogsError> {
    let levels = levels(filter, traces.is_some()).ok_or_else(|| LogsError::Filter(filter.to_owned()))?;
    let terminal = io::stderr().is_terminal();
    let lines = match format {
        LogFormat::Human => human(terminal),
        LogFormat::Auto if terminal => human(terminal),
        LogFormat::Auto | LogFormat::Json => json(),
    };
    let mut layers = vec![lines];
    layers.extend(traces.map(Traces::layer));
    let subscriber = tracing_subscriber::registry().with(levels).with(layers);
    subscriber.try_init().map_err(|_| LogsError::Again)
}

/// One filter in front of everything. Not one for each layer: whoever asks whether something is enabled, as sqlx does for
/// each statement, would make those forget the next event (tracing-subscriber 0.3).
fn levels(filter: &str, traces: bool) -> Option<EnvFilter> {
    let spans = format!("{SPANS}={}", if traces { "info" } else { "off" });
    let levels = EnvFilter::try_new(filter).ok()?;
    Some(levels.add_directive(spans.parse().ok()?))
}

type Lines<S> = Box<dyn Layer<S> + Send + Sync>;

/// `NO_COLOR` (no-color.org) is honoured by the layer itself unless it is told otherwise.
fn human<S: tracing::Subscriber + for<'a> LookupSpan<'a>>(terminal: bool) -> Lines<S> {
    let lines = tracing_subscriber::fmt::layer()
        .compact()
        .with_target(false)
        .with_writer(io::stderr);
    if terminal {
        lines.boxed()
    } else {
        lines.with_ansi(false).boxed()
    }
}

fn json<S: tracing::Subscriber + for<'a> LookupSpan<'a>>() -> Lines<S> {
    let lines = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false);
    lines.with_writer(io::stderr).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_levels_by_module() {
        assert!(is_filter("info") && is_filter("warn,adit::relay=debug") && is_filter("off"));
        assert!(!is_filter("adit=loud"));
    }

    #[test]
    fn logs_are_set_up_once() {
        assert!(matches!(
            init(LogFormat::Auto, "adit=loud", None),
            Err(LogsError::Filter(_))
        ));
        let _first = init(LogFormat::Json, "off", None);
        assert!(matches!(init(LogFormat::Human, "off", None), Err(LogsError::Again)));
    }
}
