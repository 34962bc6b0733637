//! What the relay counts, as OpenMetrics text. Labels are enums, so nobody outside can add a time series.

use std::{fmt::Error, hash::Hash, sync::atomic::Ordering};

use prometheus_client::{
    encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use crate::{
    cluster::{bus::Counts, letter::Traffic},
    error::Cause,
};

macro_rules! label {
    ($(#[$doc:meta])* $name:ident = $label:literal { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// Every value, in the order of their description.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The label's value, as it is scraped.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl EncodeLabelSet for $name {
            fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), Error> {
                ($label, self.as_str()).encode(encoder.encode_label())
            }
        }
    };
}

label! {
    /// How an exchange ended.
    Outcome = "outcome" {
        /// The whole answer of the upstream went to the downstream, whatever its status.
        Ok = "ok",
        /// The upstream refused, broke off, or answered with no valid HTTP.
        UpstreamFailed = "upstream_failed",
        /// The upstream did not answer in time.
        UpstreamTimeout = "upstream_timeout",
        /// Its tunnel was lost and did not come back in time.
        TunnelLost = "tunnel_lost",
        /// The downstream went away first.
        DownstreamLeft = "downstream_left",
        /// No tunnel was there for the client.
        NoTunnel = "no_tunnel",
        /// The relay refused it: authentication, a limit, a rule of HTTP.
        Refused = "refused",
        /// A bug of ours.
        Internal = "internal",
    }
}

label! {
    /// What an agent did against the protocol, for which its tunnel was closed.
    Violation = "kind" {
        /// Bytes that are no frame, or no valid head.
        Malformed = "malformed",
        /// A frame or message longer than the protocol allows.
        TooLong = "too_long",
        /// A frame in an exchange that is not its client's.
        Foreign = "foreign",
        /// A first message that is no hello.
        Hello = "hello",
    }
}

label! {
    /// Who failed to authenticate.
    AuthFailure = "who" {
        /// An agent at `/ws`.
        Agent = "agent",
        /// A downstream at a client's door.
        Downstream = "downstream",
        /// Somebody at the admin API.
        Admin = "admin",
    }
}

label! {
    /// Why a frame was dropped.
    FrameDrop = "reason" {
        /// Its exchange has ended, or never was.
        UnknownExchange = "unknown_exchange",
        /// It came by a tunnel that a newer one had superseded.
        Superseded = "superseded",
        /// It came over the bus, by a tunnel that is not its exchange's client's.
        Foreign = "foreign",
        /// It came over the bus and is nothing that this version knows.
        Unreadable = "unreadable",
        /// It came over the bus for a tunnel whose agent reads too slowly; it is sent again.
        Full = "full",
    }
}

label! {
    /// A limit for which a request was refused.
    Limited = "limit" {
        /// Requests a second of its client.
        ClientRate = "client_rate",
        /// Requests at a time of its client.
        ClientConcurrent = "client_concurrent",
        /// Requests a second of its address.
        AddressRate = "address_rate",
        /// Requests at a time of its address.
        AddressConcurrent = "address_concurrent",
    }
}

label! {
    /// Which way body bytes went.
    Direction = "direction" {
        /// Of requests, toward the upstream.
        ToUpstream = "to_upstream",
        /// Of responses, from the upstream.
        FromUpstream = "from_upstream",
    }
}

/// The relay's metrics: shared in an `Arc`, written without a lock but for the look-up of a label.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    exchanges: Family<Outcome, Counter>,
    exchanges_in_flight: Gauge,
    tunnels: Gauge,
    to_upstream: Counter,
    from_upstream: Counter,
    violations: Family<Violation, Counter>,
    auth_failures: Family<AuthFailure, Counter>,
    exchanges_moved: Counter,
    frames_dropped: Family<FrameDrop, Counter>,
    limited: Family<Limited, Counter>,
    bus: BusCounters,
}

/// What the bus counts itself; taken over when the page is made.
#[derive(Debug, Default)]
struct BusCounters {
    published: Counter,
    received: Counter,
    dropped: Counter,
    interrupted: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero, and all there: a series that begins at its first event has no rate for it.
    pub fn new() -> Self {
        let bytes = Family::<Direction, Counter>::default();
        let mut metrics = Self {
            registry: Registry::with_prefix("adit"),
            exchanges: zeros(Outcome::ALL),
            exchanges_in_flight: Gauge::default(),
            tunnels: Gauge::default(),
            to_upstream: bytes.get_or_create_owned(&Direction::ToUpstream),
            from_upstream: bytes.get_or_create_owned(&Direction::FromUpstream),
            violations: zeros(Violation::ALL),
            auth_failures: zeros(AuthFailure::ALL),
            exchanges_moved: Counter::default(),
            frames_dropped: zeros(FrameDrop::ALL),
            limited: zeros(Limited::ALL),
            bus: BusCounters::default(),
        };
        metrics.register(bytes);
        metrics
    }

    fn register(&mut self, bytes: Family<Direction, Counter>) {
        let registry = &mut self.registry;
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "The version that runs", Info::new(version));
        registry.register("exchanges", "Requests that ended, by how", self.exchanges.clone());
        let in_flight = self.exchanges_in_flight.clone();
        registry.register(
            "exchanges_in_flight",
            "Requests that this node holds the downstream of",
            in_flight,
        );
        registry.register("tunnels", "Tunnels that this node holds", self.tunnels.clone());
        registry.register_with_unit("upstream", "Body bytes relayed", Unit::Bytes, bytes);
        let violations = self.violations.clone();
        registry.register(
            "protocol_violations",
            "Tunnels closed for what the agent sent",
            violations,
        );
        registry.register("auth_failures", "Failed authentications", self.auth_failures.clone());
        registry.register("limited", "Requests refused for a limit", self.limited.clone());
        let moved = self.exchanges_moved.clone();
        registry.register(
            "bus_published",
            "Messages sent to other nodes",
            self.bus.published.clone(),
        );
        registry.register("bus_received", "Messages of other nodes", self.bus.received.clone());
        let dropped = self.bus.dropped.clone();
        registry.register("bus_dropped", "Messages not sent: the bus was away or full", dropped);
        let interrupted = self.bus.interrupted.clone();
        registry.register(
            "bus_interruptions",
            "Times that messages may have been missed",
            interrupted,
        );
        registry.register(
            "exchanges_moved",
            "Times an exchange went on through another tunnel",
            moved,
        );
        registry.register("frames_dropped", "Frames that led nowhere", self.frames_dropped.clone());
    }

    /// Counts an exchange in, until what it returns is ended or dropped.
    pub fn exchange(&self) -> InFlight {
        self.exchanges_in_flight.inc();
        InFlight {
            in_flight: self.exchanges_in_flight.clone(),
            exchanges: self.exchanges.clone(),
            outcome: Outcome::DownstreamLeft,
        }
    }

    /// Counts a tunnel in, until what it returns is dropped.
    pub fn tunnel(&self) -> OpenTunnel {
        self.tunnels.inc();
        OpenTunnel(self.tunnels.clone())
    }

    /// Body bytes of requests that went toward upstreams.
    pub fn to_upstream(&self, bytes: u64) {
        self.to_upstream.inc_by(bytes);
    }

    /// Body bytes of responses that came from upstreams.
    pub fn from_upstream(&self, bytes: u64) {
        self.from_upstream.inc_by(bytes);
    }

    /// An agent's tunnel was closed for what it sent.
    pub fn violation(&self, kind: Violation) {
        self.violations.get_or_create(&kind).inc();
    }

    /// Somebody failed to authenticate.
    pub fn auth_failure(&self, who: AuthFailure) {
        self.auth_failures.get_or_create(&who).inc();
    }

    /// A request was refused for this limit.
    pub fn limited(&self, limit: Limited) {
        self.limited.get_or_create(&limit).inc();
    }

    /// So many exchanges went on through another tunnel than before.
    pub fn exchanges_moved(&self, count: usize) {
        self.exchanges_moved.inc_by(count as u64);
    }

    /// A frame was dropped.
    pub fn frame_dropped(&self, reason: FrameDrop) {
        self.frames_dropped.get_or_create(&reason).inc();
    }

    /// What of it operators are shown of a node.
    pub fn traffic(&self) -> Traffic {
        let now = |gauge: &Gauge| u64::try_from(gauge.get()).unwrap_or(0);
        let ended = |outcome: &Outcome| {
            let count = self.exchanges.get_or_create(outcome).get();
            (outcome.as_str().to_owned(), count)
        };
        Traffic {
            exchanges_in_flight: now(&self.exchanges_in_flight),
            tunnels: now(&self.tunnels),
            to_upstream_bytes: self.to_upstream.get(),
            from_upstream_bytes: self.from_upstream.get(),
            outcomes: Outcome::ALL.iter().map(ended).collect(),
        }
    }

    /// All of it as OpenMetrics text (`application/openmetrics-text; version=1.0.0; charset=utf-8`).
    pub fn render(&self, bus: Counts) -> String {
        let set = |counter: &Counter, value| counter.inner().store(value, Ordering::Relaxed);
        set(&self.bus.published, bus.published);
        set(&self.bus.received, bus.received);
        set(&self.bus.dropped, bus.dropped);
        set(&self.bus.interrupted, bus.interrupted);
        let mut page = String::new();
        text::encode(&mut page, &self.registry).expect("writing to a String does not fail");
        page
    }
}

fn zeros<L: Clone + Eq + Hash>(labels: &[L]) -> Family<L, Counter> {
    let family = Family::default();
    for label in labels {
        drop(family.get_or_create(label));
    }
    family
}

/// An exchange in flight. Dropped without [`InFlight::end`] it counts as left by its downstream, because that is how
/// hyper tells of it.
#[derive(Debug)]
#[must_use]
pub struct InFlight {
    in_flight: Gauge,
    exchanges: Family<Outcome, Counter>,
    outcome: Outcome,
}

impl InFlight {
    /// Counts it out, by how it ended.
    pub fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.in_flight.dec();
        self.exchanges.get_or_create(&self.outcome).inc();
    }
}

/// A tunnel that is held; dropping it counts it out.
#[derive(Debug)]
#[must_use]
pub struct OpenTunnel(Gauge);

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl From<&Cause> for Outcome {
    fn from(cause: &Cause) -> Self {
        match cause {
            Cause::UpstreamUnreachable | Cause::UpstreamFailed | Cause::ResponseTooLarge => Self::UpstreamFailed,
            Cause::UpstreamTimeout => Self::UpstreamTimeout,
            Cause::TunnelLost => Self::TunnelLost,
            Cause::NoTunnel => Self::NoTunnel,
            Cause::Internal => Self::Internal,
            _ => Self::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_every_series_from_the_start() {
        let page = Metrics::new().render(Counts::default());
        for line in [
            "adit_build_info{version=\"0.1.0\"} 1",
            "adit_exchanges_total{outcome=\"ok\"} 0",
            "adit_exchanges_total{outcome=\"refused\"} 0",
            "adit_exchanges_in_flight 0",
            "adit_tunnels 0",
            "adit_upstream_bytes_total{direction=\"from_upstream\"} 0",
            "adit_protocol_violations_total{kind=\"foreign\"} 0",
            "adit_auth_failures_total{who=\"admin\"} 0",
            "adit_exchanges_moved_total 0",
            "adit_frames_dropped_total{reason=\"superseded\"} 0",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
        }
        assert!(page.ends_with("# EOF\n"));
    }

    #[test]
    fn what_is_counted_in_is_counted_out() {
        let metrics = Metrics::new();
        let (one, other, tunnel) = (metrics.exchange(), metrics.exchange(), metrics.tunnel());
        let page = metrics.render(Counts::default());
        assert!(
            page.contains("adit_exchanges_in_flight 2\n") && page.contains("adit_tunnels 1\n"),
            "{page}"
        );
        one.end(Outcome::from(&Cause::TunnelLost));
        drop((other, tunnel));
        metrics.to_upstream(7);
        let page = metrics.render(Counts::default());
        for line in [
            "adit_exchanges_in_flight 0\n",
            "adit_tunnels 0\n",
            "outcome=\"tunnel_lost\"} 1\n",
            "outcome=\"downstream_left\"} 1\n",
            "direction=\"to_upstream\"} 7\n",
        ] {
            assert!(page.contains(line), "{line} is not in\n{page}");
        }
    }
}
