//! What the relay counts, as OpenMetrics text. Labels are enums, so nobody outside can add a time series.

use std::{
    fmt::Error,
    hash::Hash,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

use super::registry_meter::RegistryMeter;
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
    /// Who held the tunnel that an exchange went by.
    Place = "place" {
        /// The node of its downstream.
        Local = "local",
        /// Another node, over the bus.
        Peer = "peer",
        /// There was none.
        None = "none",
    }
}

label! {
    /// What was spoken in the tunnel that an exchange went by.
    Dialect = "dialect" {
        /// adit's own frames.
        Adit = "adit",
        /// What MoosicBox's servers speak.
        MoosicBox = "moosicbox",
        /// There was none.
        None = "none",
    }
}

/// The tunnel that an exchange went by, as far as it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Via {
    /// Who held it.
    pub place: Place,
    /// What was spoken in it.
    pub dialect: Dialect,
}

impl Default for Via {
    /// None.
    fn default() -> Self {
        Self {
            place: Place::None,
            dialect: Dialect::None,
        }
    }
}

/// How an exchange ended, and by what tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Ended(Outcome, Via);

impl EncodeLabelSet for Ended {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), Error> {
        let Self(outcome, Via { place, dialect }) = self;
        outcome.encode(encoder)?;
        dialect.encode(encoder)?;
        place.encode(encoder)
    }
}

impl Ended {
    /// Every one there can be.
    fn all() -> Vec<Self> {
        let tunnels = [Place::Local, Place::Peer]
            .into_iter()
            .flat_map(|place| [Dialect::Adit, Dialect::MoosicBox].map(|dialect| Via { place, dialect }));
        let vias: Vec<Via> = tunnels.chain([Via::default()]).collect();
        let of = |outcome: &Outcome| vias.iter().map(|via| Self(*outcome, *via)).collect::<Vec<_>>();
        Outcome::ALL.iter().flat_map(of).collect()
    }
}

/// Upper bounds of latencies, seconds. A tunnel adds well under a millisecond on one machine and a round trip between
/// two; whoever waits notices from a tenth of a second on; `park_timeout` is 5 s, `response_timeout` 120 s. So three steps
/// a decade where the relay's own part is seen, and two where the upstream's is.
const LATENCY_BUCKETS: [f64; 16] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0,
];

/// Latencies by the place of the tunnel.
type Latencies = Family<Place, Histogram, fn() -> Histogram>;

fn latencies() -> Latencies {
    let latencies = Latencies::new_with_constructor(latency);
    for place in Place::ALL {
        drop(latencies.get_or_create(place));
    }
    latencies
}

fn latency() -> Histogram {
    Histogram::new(LATENCY_BUCKETS)
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

label! {
    /// Why a subscription ended.
    Unsubscribed = "reason" {
        /// The subscriber went away.
        Itself = "itself",
        /// It did not take what came.
        TooSlow = "too_slow",
        /// It missed something that could not be had any more.
        Gap = "gap",
        /// The client was deleted, or a token of its revoked.
        ClientGone = "client_gone",
        /// The node was leaving.
        Leaving = "leaving",
    }
}

label! {
    /// What became of messages that were missed on the way to this node's subscribers.
    GapEnd = "end" {
        /// They came after all.
        Repaired = "repaired",
        /// Nobody had them any more: the subscribers were closed.
        Unrepaired = "unrepaired",
    }
}

/// The relay's metrics: shared in an `Arc`, written without a lock but for the look-up of a label.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    exchanges: Family<Ended, Counter>,
    exchanges_in_flight: Gauge,
    heads: Latencies,
    durations: Latencies,
    tunnels: Gauge,
    to_upstream: Counter,
    from_upstream: Counter,
    resent: Counter,
    stalls: Counter,
    violations: Family<Violation, Counter>,
    auth_failures: Family<AuthFailure, Counter>,
    exchanges_moved: Counter,
    frames_dropped: Family<FrameDrop, Counter>,
    limited: Family<Limited, Counter>,
    fanout: FanoutMetrics,
    seen: SeenMetrics,
}

/// What clients say to their subscribers.
#[derive(Debug)]
struct FanoutMetrics {
    subscribers: Gauge,
    published: Counter,
    delivered: Counter,
    gaps: Family<GapEnd, Counter>,
    unsubscribed: Family<Unsubscribed, Counter>,
}

impl FanoutMetrics {
    fn register(&self, registry: &mut Registry) {
        let subscribers = self.subscribers.clone();
        registry.register("subscribers", "Subscribers at this node", subscribers);
        let published = self.published.clone();
        registry.register(
            "fanout_published",
            "Messages to subscribers, said at this node",
            published,
        );
        let delivered = self.delivered.clone();
        registry.register(
            "fanout_delivered",
            "Messages given to subscribers of this node",
            delivered,
        );
        let gaps = self.gaps.clone();
        registry.register(
            "fanout_gaps",
            "Times that messages to subscribers were missed, by what became of it",
            gaps,
        );
        let unsubscribed = self.unsubscribed.clone();
        registry.register("subscriptions_ended", "Subscriptions that ended, by why", unsubscribed);
    }
}

/// What a node is asked for when the page is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// What the bus counts itself.
    pub bus: Counts,
    /// Whether the bus carries.
    pub bus_up: bool,
    /// Whether the database was away when it was last needed.
    pub registry_away: bool,
    /// Whether the node is leaving.
    pub draining: bool,
}

#[derive(Debug, Default)]
struct SeenMetrics {
    published: Counter,
    received: Counter,
    dropped: Counter,
    interrupted: Counter,
    bus_up: Gauge,
    registry_away: Gauge,
    draining: Gauge,
}

impl SeenMetrics {
    fn set(&self, seen: Seen) {
        let set = |counter: &Counter, value| counter.inner().store(value, Ordering::Relaxed);
        set(&self.published, seen.bus.published);
        set(&self.received, seen.bus.received);
        set(&self.dropped, seen.bus.dropped);
        set(&self.interrupted, seen.bus.interrupted);
        self.bus_up.set(i64::from(seen.bus_up));
        self.registry_away.set(i64::from(seen.registry_away));
        self.draining.set(i64::from(seen.draining));
    }
}

impl Metrics {
    /// All at zero, and all there: a series that begins at its first event has no rate for it.
    pub fn new(meter: &RegistryMeter) -> Self {
        let bytes = Family::<Direction, Counter>::default();
        let mut metrics = Self {
            registry: Registry::with_prefix("adit"),
            exchanges: zeros(&Ended::all()),
            exchanges_in_flight: Gauge::default(),
            heads: latencies(),
            durations: latencies(),
            tunnels: Gauge::default(),
            to_upstream: bytes.get_or_create_owned(&Direction::ToUpstream),
            from_upstream: bytes.get_or_create_owned(&Direction::FromUpstream),
            resent: Counter::default(),
            stalls: Counter::default(),
            violations: zeros(Violation::ALL),
            auth_failures: zeros(AuthFailure::ALL),
            exchanges_moved: Counter::default(),
            frames_dropped: zeros(FrameDrop::ALL),
            limited: zeros(Limited::ALL),
            fanout: FanoutMetrics {
                subscribers: Gauge::default(),
                published: Counter::default(),
                delivered: Counter::default(),
                gaps: zeros(GapEnd::ALL),
                unsubscribed: zeros(Unsubscribed::ALL),
            },
            seen: SeenMetrics::default(),
        };
        metrics.register_requests(bytes);
        metrics.register_tunnels();
        metrics.register_bus();
        metrics.register_registry(meter);
        metrics
    }

    fn register_requests(&mut self, bytes: Family<Direction, Counter>) {
        let registry = &mut self.registry;
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "The version that runs", Info::new(version));
        let draining = self.seen.draining.clone();
        registry.register("draining", "Whether this node is leaving", draining);
        registry.register(
            "exchanges",
            "Requests that ended, by how, and by what tunnel",
            self.exchanges.clone(),
        );
        registry.register(
            "exchanges_in_flight",
            "Requests that this node holds the downstream of",
            self.exchanges_in_flight.clone(),
        );
        registry.register_with_unit(
            "exchange_head",
            "From the head of a request to that of its answer",
            Unit::Seconds,
            self.heads.clone(),
        );
        registry.register_with_unit(
            "exchange_duration",
            "From the head of a request to the end of its answer",
            Unit::Seconds,
            self.durations.clone(),
        );
        registry.register_with_unit("upstream", "Body bytes relayed", Unit::Bytes, bytes);
        registry.register("auth_failures", "Failed authentications", self.auth_failures.clone());
    }

    fn register_tunnels(&mut self) {
        let registry = &mut self.registry;
        registry.register("tunnels", "Tunnels that this node holds", self.tunnels.clone());
        registry.register(
            "protocol_violations",
            "Tunnels closed for what the agent sent",
            self.violations.clone(),
        );
        registry.register("limited", "Requests refused for a limit", self.limited.clone());
        registry.register(
            "exchanges_moved",
            "Times an exchange went on through another tunnel",
            self.exchanges_moved.clone(),
        );
        registry.register_with_unit(
            "resent",
            "Bytes of requests that went toward upstreams again",
            Unit::Bytes,
            self.resent.clone(),
        );
        registry.register(
            "credit_stalls",
            "Times a request body waited for its upstream to take more",
            self.stalls.clone(),
        );
        registry.register("frames_dropped", "Frames that led nowhere", self.frames_dropped.clone());
        self.fanout.register(registry);
    }

    fn register_bus(&mut self) {
        let (registry, seen) = (&mut self.registry, &self.seen);
        registry.register("bus_up", "Whether the bus carries messages", seen.bus_up.clone());
        registry.register("bus_published", "Messages sent to other nodes", seen.published.clone());
        registry.register("bus_received", "Messages of other nodes", seen.received.clone());
        registry.register(
            "bus_dropped",
            "Messages not sent: the bus was away or full",
            seen.dropped.clone(),
        );
        registry.register(
            "bus_interruptions",
            "Times that messages may have been missed, each connect being one",
            seen.interrupted.clone(),
        );
    }

    fn register_registry(&mut self, meter: &RegistryMeter) {
        let registry = &mut self.registry;
        registry.register(
            "registry_away",
            "Whether the database was away when it was last needed",
            self.seen.registry_away.clone(),
        );
        registry.register_with_unit(
            "registry_statement",
            "What the database took to answer",
            Unit::Seconds,
            meter.statements.clone(),
        );
        let errors = meter.errors.clone();
        registry.register("registry_errors", "Statements that the database failed", errors);
        let lookups = meter.lookups.clone();
        registry.register("registry_lookups", "Look-ups of clients, tunnels, signatures", lookups);
        registry.register(
            "registry_misses",
            "Look-ups that memory could not answer",
            meter.misses.clone(),
        );
    }

    /// Counts an exchange in, until what it returns is ended or dropped.
    pub fn exchange(&self) -> InFlight {
        self.exchanges_in_flight.inc();
        InFlight {
            in_flight: self.exchanges_in_flight.clone(),
            exchanges: self.exchanges.clone(),
            heads: self.heads.clone(),
            durations: self.durations.clone(),
            began: Instant::now(),
            ended: Ended(Outcome::DownstreamLeft, Via::default()),
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

    /// Of a request that ended: bytes that went again, and how often its body waited for credit.
    pub fn troubles(&self, resent: u64, stalls: u64) {
        self.resent.inc_by(resent);
        self.stalls.inc_by(stalls);
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

    /// A subscriber came.
    pub fn subscribed(&self) {
        self.fanout.subscribers.inc();
    }

    /// A subscription ended.
    pub fn unsubscribed(&self, why: Unsubscribed) {
        self.fanout.subscribers.dec();
        self.fanout.unsubscribed.get_or_create(&why).inc();
    }

    /// This node said something to a client's subscribers.
    pub fn published(&self) {
        self.fanout.published.inc();
    }

    /// A message was given to so many subscribers here.
    pub fn delivered(&self, subscribers: u64) {
        self.fanout.delivered.inc_by(subscribers);
    }

    /// Messages to subscribers were missed.
    pub fn gap(&self, end: GapEnd) {
        self.fanout.gaps.get_or_create(&end).inc();
    }

    /// What of it operators are shown of a node.
    pub fn traffic(&self) -> Traffic {
        let now = |gauge: &Gauge| u64::try_from(gauge.get()).unwrap_or(0);
        let by_any_tunnel = |outcome: &Outcome| {
            let of_it = Ended::all().into_iter().filter(|Ended(of, _)| of == outcome);
            of_it.map(|ended| self.exchanges.get_or_create(&ended).get()).sum()
        };
        let ended = |outcome: &Outcome| (outcome.as_str().to_owned(), by_any_tunnel(outcome));
        Traffic {
            exchanges_in_flight: now(&self.exchanges_in_flight),
            tunnels: now(&self.tunnels),
            to_upstream_bytes: self.to_upstream.get(),
            from_upstream_bytes: self.from_upstream.get(),
            outcomes: Outcome::ALL.iter().map(ended).collect(),
        }
    }

    /// All of it as OpenMetrics text (`application/openmetrics-text; version=1.0.0; charset=utf-8`).
    pub fn render(&self, seen: Seen) -> String {
        self.seen.set(seen);
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
    exchanges: Family<Ended, Counter>,
    heads: Latencies,
    durations: Latencies,
    began: Instant,
    ended: Ended,
}

impl InFlight {
    /// Counts it out, by how it ended, and by what tunnel; `head_after`: when the head of its answer was there.
    pub fn end(mut self, outcome: Outcome, via: Via, head_after: Option<Duration>) {
        if let Some(head_after) = head_after {
            self.heads.get_or_create(&via.place).observe(head_after.as_secs_f64());
        }
        self.ended = Ended(outcome, via);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.in_flight.dec();
        self.exchanges.get_or_create(&self.ended).inc();
        let place = self.ended.1.place;
        let duration = self.began.elapsed().as_secs_f64();
        self.durations.get_or_create(&place).observe(duration);
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
        let meter = RegistryMeter::default();
        meter.asked(Duration::from_millis(2), true);
        let seen = Seen {
            draining: true,
            ..Seen::default()
        };
        let page = Metrics::new(&meter).render(seen);
        for line in [
            "adit_build_info{version=\"0.1.0\"} 1",
            "adit_exchanges_total{outcome=\"ok\",dialect=\"adit\",place=\"peer\"} 0",
            "adit_exchanges_total{outcome=\"refused\",dialect=\"none\",place=\"none\"} 0",
            "adit_exchange_head_seconds_count{place=\"local\"} 0",
            "adit_exchange_duration_seconds_bucket{le=\"+Inf\",place=\"peer\"} 0",
            "adit_exchanges_in_flight 0",
            "adit_tunnels 0",
            "adit_upstream_bytes_total{direction=\"from_upstream\"} 0",
            "adit_protocol_violations_total{kind=\"foreign\"} 0",
            "adit_auth_failures_total{who=\"admin\"} 0",
            "adit_exchanges_moved_total 0",
            "adit_draining 1",
            "adit_bus_up 0",
            "adit_registry_statement_seconds_bucket{le=\"0.0025\"} 1",
            "adit_registry_errors_total 1",
            "adit_registry_lookups_total 0",
            "adit_registry_misses_total 0",
            "adit_frames_dropped_total{reason=\"superseded\"} 0",
            "adit_subscribers 0",
            "adit_fanout_gaps_total{end=\"unrepaired\"} 0",
            "adit_subscriptions_ended_total{reason=\"too_slow\"} 0",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
        }
        assert!(page.ends_with("# EOF\n"));
    }

    #[test]
    fn what_is_counted_in_is_counted_out() {
        let metrics = Metrics::new(&RegistryMeter::default());
        let (one, other, tunnel) = (metrics.exchange(), metrics.exchange(), metrics.tunnel());
        let page = metrics.render(Seen::default());
        assert!(
            page.contains("adit_exchanges_in_flight 2\n") && page.contains("adit_tunnels 1\n"),
            "{page}"
        );
        let via = Via {
            place: Place::Peer,
            dialect: Dialect::Adit,
        };
        one.end(Outcome::from(&Cause::TunnelLost), via, Some(Duration::from_millis(7)));
        drop((other, tunnel));
        metrics.to_upstream(7);
        let page = metrics.render(Seen::default());
        for line in [
            "adit_exchanges_in_flight 0\n",
            "adit_tunnels 0\n",
            "{outcome=\"tunnel_lost\",dialect=\"adit\",place=\"peer\"} 1\n",
            "{outcome=\"downstream_left\",dialect=\"none\",place=\"none\"} 1\n",
            "adit_exchange_head_seconds_bucket{le=\"0.01\",place=\"peer\"} 1\n",
            "adit_exchange_duration_seconds_count{place=\"none\"} 1\n",
            "direction=\"to_upstream\"} 7\n",
        ] {
            assert!(page.contains(line), "{line} is not in\n{page}");
        }
    }
}
