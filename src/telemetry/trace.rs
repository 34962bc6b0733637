//! The trace that a request belongs to (W3C Trace Context, <https://www.w3.org/TR/trace-context/>), carried through.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{SpanContext, TraceContextExt, TraceFlags, TraceState},
};
use opentelemetry_sdk::{
    propagation::TraceContextPropagator,
    trace::{IdGenerator, RandomIdGenerator},
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The length of a version 00 `traceparent`: `00-{32 hex}-{16 hex}-{2 hex}`.
const TRACEPARENT_LEN: usize = 55;

/// Leaves exactly one `traceparent` in a request's headers: the relay's span in the trace that the request came with,
/// or in a new trace if it came with none.
///
/// A `traceparent` that is malformed or there twice counts as none, and its `tracestate` goes with it; a malformed
/// `tracestate` goes alone. Where spans are exported, `span` is the relay's, and whether it is sampled is what it says.
/// Else one is made up; a new trace then says "sampled", because a server behind the relay that follows its parent's
/// decision would otherwise record nothing.
pub fn continue_trace(headers: &mut HeaderMap, span: &Span) {
    if span.is_disabled() {
        let made_up = made_up(headers);
        inject(headers, &Context::new().with_remote_span_context(made_up));
    } else {
        carry_trace(headers, span);
    }
}

/// Makes `span` the parent of what is called with these headers; leaves them as they are where spans are not exported.
pub fn carry_trace(headers: &mut HeaderMap, span: &Span) {
    if !span.is_disabled() {
        inject(headers, &span.context());
    }
}

/// Makes whoever sent these headers the parent of `span`, if they are of a trace.
pub(super) fn adopt(span: &Span, headers: &HeaderMap) {
    if span.is_disabled() {
        return;
    }
    if let Some(context) = context_of(headers) {
        set_parent(span, context);
    }
}

/// The trace that these headers are of.
pub(super) fn context_of(headers: &HeaderMap) -> Option<Context> {
    parent(headers).map(|parent| Context::new().with_remote_span_context(parent))
}

/// Before anything asks for the span's own context, which begins it.
pub(super) fn set_parent(span: &Span, context: Context) {
    // It fails where spans are not exported, and then nothing is missing.
    span.set_parent(context).ok();
}

fn made_up(headers: &HeaderMap) -> SpanContext {
    let ids = RandomIdGenerator::default();
    match parent(headers) {
        Some(parent) => SpanContext::new(
            parent.trace_id(),
            ids.new_span_id(),
            parent.trace_flags(),
            false,
            parent.trace_state().clone(),
        ),
        None => SpanContext::new(
            ids.new_trace_id(),
            ids.new_span_id(),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        ),
    }
}

fn inject(headers: &mut HeaderMap, context: &Context) {
    headers.remove(TRACESTATE);
    TraceContextPropagator::new().inject_context(context, &mut Outgoing(headers));
}

fn parent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut parents = headers.get_all(TRACEPARENT).iter();
    let (traceparent, None) = (parents.next()?, parents.next()) else {
        return None;
    };
    if !is_well_formed(traceparent.as_bytes()) {
        return None;
    }
    let incoming = Incoming {
        traceparent: traceparent.to_str().ok()?,
        tracestate: joined(headers),
    };
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &incoming);
    let span = context.span().span_context().clone();
    span.is_valid().then_some(span)
}

/// The lengths and digits that the propagator leaves unchecked (§3.2.2): it would take `00-1-1-1`, and `+` for a digit.
///
/// A later version may have more after the flags, behind a `-` (§4).
fn is_well_formed(text: &[u8]) -> bool {
    let Some((known, rest)) = text.split_at_checked(TRACEPARENT_LEN) else {
        return false;
    };
    let hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let dash_at = |index: usize| matches!(index, 2 | 35 | 52);
    let shaped = known
        .iter()
        .enumerate()
        .all(|(index, byte)| if dash_at(index) { *byte == b'-' } else { hex(byte) });
    let version = known.get(..2);
    shaped && version != Some(b"ff") && (rest.is_empty() || (version != Some(b"00") && rest.first() == Some(&b'-')))
}

/// All `tracestate` fields as the one list that they are (§3.3.1.1); `None` if one is not text.
fn joined(headers: &HeaderMap) -> Option<String> {
    let fields = headers.get_all(TRACESTATE).iter().map(HeaderValue::to_str);
    let fields = fields.collect::<Result<Vec<_>, _>>().ok()?;
    Some(fields.join(","))
}

struct Incoming<'a> {
    traceparent: &'a str,
    tracestate: Option<String>,
}

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => Some(self.traceparent),
            "tracestate" => self.tracestate.as_deref(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

struct Outgoing<'a>(&'a mut HeaderMap);

impl Injector for Outgoing<'_> {
    fn set(&mut self, key: &str, value: String) {
        let name = match key {
            "traceparent" => TRACEPARENT,
            "tracestate" if !value.is_empty() => TRACESTATE,
            _ => return,
        };
        if let Ok(value) = HeaderValue::try_from(value) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    fn continued(fields: &[(HeaderName, &[u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name, HeaderValue::from_bytes(value).expect("a field value"));
        }
        continue_trace(&mut headers, &Span::none());
        headers
    }

    fn traceparent(headers: &HeaderMap) -> &str {
        let mut found = headers.get_all(TRACEPARENT).iter();
        let only = found.next().expect("a traceparent").to_str().expect("text");
        assert!(
            found.next().is_none() && only.len() == TRACEPARENT_LEN && is_well_formed(only.as_bytes()),
            "{only}"
        );
        only
    }

    #[test]
    fn a_request_without_a_trace_begins_one() {
        let (one, other) = (continued(&[]), continued(&[]));
        assert_ne!(traceparent(&one)[3..35], traceparent(&other)[3..35]);
        assert!(traceparent(&one).ends_with("-01") && !one.contains_key(TRACESTATE));
    }

    #[test]
    fn a_trace_is_continued_with_a_span_of_our_own() {
        for (version, flags, tail, kept) in [
            ("00", "01", "", "01"),
            ("00", "00", "", "00"),
            ("00", "ff", "", "01"),
            ("cc", "01", "-more", "01"),
        ] {
            let sent = format!("{version}-{TRACE}-{SPAN}-{flags}{tail}");
            let headers = continued(&[
                (TRACEPARENT, sent.as_bytes()),
                (TRACESTATE, b"a=1, b=2"),
                (TRACESTATE, b"c=3"),
            ]);
            let got = traceparent(&headers);
            assert_eq!(
                (&got[..36], &got[52..]),
                (format!("00-{TRACE}-").as_str(), format!("-{kept}").as_str())
            );
            assert_ne!(&got[36..52], SPAN);
            assert_eq!(headers.get_all(TRACESTATE).iter().collect::<Vec<_>>(), ["a=1,b=2,c=3"]);
        }
    }

    #[test]
    fn a_malformed_trace_is_replaced_and_its_state_dropped() {
        let zero_trace = format!("00-{}-{SPAN}-01", "0".repeat(32));
        let zero_span = format!("00-{TRACE}-{}-01", "0".repeat(16));
        let upper = format!("00-{}-{SPAN}-01", TRACE.to_uppercase());
        let plus = format!("00-+{}-{SPAN}-01", &TRACE[1..]);
        for bad in [
            "",
            "00",
            "00-1-1-01",
            &zero_trace,
            &zero_span,
            &upper,
            &plus,
            &format!("ff-{TRACE}-{SPAN}-01"),
            &format!("00-{TRACE}-{SPAN}-01-"),
            &format!("00-{TRACE}-{SPAN}-01-more"),
            &format!("01-{TRACE}-{SPAN}-01more"),
            &format!("00-{TRACE}-{SPAN}-"),
            &format!("00_{TRACE}-{SPAN}-01"),
            &format!("00-{TRACE}-{SPAN}-01, 00-{TRACE}-{SPAN}-01"),
        ] {
            let headers = continued(&[(TRACEPARENT, bad.as_bytes()), (TRACESTATE, b"a=1")]);
            assert!(!traceparent(&headers).contains(TRACE), "{bad}");
            assert!(!headers.contains_key(TRACESTATE), "{bad}");
        }
    }

    #[test]
    fn two_traceparents_are_none() {
        let sent = format!("00-{TRACE}-{SPAN}-01");
        let headers = continued(&[
            (TRACEPARENT, sent.as_bytes()),
            (TRACEPARENT, sent.as_bytes()),
            (TRACESTATE, b"a=1"),
        ]);
        assert!(!traceparent(&headers).contains(TRACE) && !headers.contains_key(TRACESTATE));
    }

    #[test]
    fn a_malformed_state_goes_alone() {
        let sent = format!("00-{TRACE}-{SPAN}-01");
        for bad in [&b"no list"[..], b"A=1", b"a=\xff", b"a=1,\xff", b""] {
            let headers = continued(&[(TRACEPARENT, sent.as_bytes()), (TRACESTATE, bad)]);
            assert!(
                traceparent(&headers).contains(TRACE) && !headers.contains_key(TRACESTATE),
                "{bad:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(parent in prop::collection::vec(any::<u8>(), 0..80), state in prop::collection::vec(any::<u8>(), 0..80)) {
            let fields = [(TRACEPARENT, parent), (TRACESTATE, state)];
            let mut headers = HeaderMap::new();
            for (name, value) in fields {
                if let Ok(value) = HeaderValue::from_bytes(&value) {
                    headers.append(name, value);
                }
            }
            continue_trace(&mut headers, &Span::none());
            traceparent(&headers);
        }
    }
}
