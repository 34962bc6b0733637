//! The agent's link is cut, frozen, gone for a while: what is in flight goes on byte for byte, and the upstream sees each
//! request once.

mod harness;

use std::time::Duration;

use adit::{agent, cluster::registry::NewAuth, config::RelayConfig};
use bytes::Bytes;
use harness::{
    TestAgent, TestRelay, TestUpstream, bodies, full,
    home::{Calls, ask, metric, upstream, whole},
    proxy::FaultProxy,
    send, until, within,
};
use http::{Method, Request, Response};
use hyper::body::Incoming;
use tokio::task::JoinHandle;

const LONG: u64 = 32 * 1024 * 1024;
const MOVED: &str = "adit_exchanges_moved_total";

/// An agent that reaches its relay over a bad cable.
struct BadCable {
    relay: TestRelay,
    proxy: FaultProxy,
    agent: TestAgent,
    calls: Calls,
    _upstream: TestUpstream,
}

impl BadCable {
    async fn with(relay: impl FnOnce(&mut RelayConfig), agent: impl FnOnce(&mut agent::Config)) -> Self {
        let (upstream, calls) = upstream().await;
        let relay = TestRelay::with(relay).await;
        let token = relay.client("home", NewAuth::Public).await;
        let proxy = FaultProxy::start(relay.agents).await;
        let to = upstream.address.to_string();
        let agent = TestAgent::with(proxy.address, "home", &token, &to, agent).await;
        Self {
            relay,
            proxy,
            agent,
            calls,
            _upstream: upstream,
        }
    }

    fn send(&self, request: Request<harness::AnyBody>) -> JoinHandle<Response<Incoming>> {
        tokio::spawn(send(self.relay.address, request))
    }

    fn post(&self, body: harness::AnyBody) -> JoinHandle<Response<Incoming>> {
        self.send(ask(Method::POST, "/").body(body).expect("a request"))
    }

    async fn moved(&self) -> u64 {
        metric(&self.relay, MOVED).await
    }

    /// Nothing reached the upstream twice, and all is well again.
    async fn ends(self) {
        self.proxy.heal();
        assert_eq!(self.calls.waiting().await, 0, "each request once");
        let answer = self.post(full("x"));
        self.calls.next().await.ok("well");
        assert_eq!(whole(answered(answer).await).await, (200, Bytes::from("well")));
        self.agent.kill().await;
        self.relay.stop().await;
    }
}

async fn answered(task: JoinHandle<Response<Incoming>>) -> Response<Incoming> {
    within("an answer", task).await.expect("no panic")
}

/// A cut after each so many bytes: through messages, heads, handshakes.
async fn cut_again_and_again(every: u64) {
    let cable = BadCable::with(|_| {}, |_| {}).await;
    let down = cable.post(full("go"));
    cable.proxy.cut_after(every);
    cable.calls.next().await.answer(Response::new(bodies::long(1, LONG)));
    let sum = bodies::sum(answered(down).await.into_body()).await;
    assert_eq!(sum, Ok(bodies::sum_of_long(1, LONG)));
    let after_download = cable.proxy.cuts();
    assert!(after_download >= 3, "{after_download} cuts");

    let up = cable.post(bodies::long(2, LONG));
    let (answer, _, body) = cable.calls.next().await.begin(Response::builder());
    assert_eq!(bodies::sum(body).await, Ok(bodies::sum_of_long(2, LONG)));
    drop(answer);
    assert_eq!(whole(answered(up).await).await, (200, Bytes::new()));
    let after_upload = cable.proxy.cuts();
    assert!(after_upload > after_download);

    let echo = cable.post(bodies::long(3, LONG));
    cable.calls.next().await.echo();
    let sum = bodies::sum(answered(echo).await.into_body()).await;
    assert_eq!(sum, Ok(bodies::sum_of_long(3, LONG)));
    assert!(cable.proxy.cuts() > after_upload);
    assert!(cable.moved().await > 0);
    cable.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_bodies_survive_a_cut_every_eight_megabytes() {
    cut_again_and_again(8_000_001).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_bodies_survive_dozens_of_cuts() {
    cut_again_and_again(3_000_007).await;
}

/// Only downwards: the other way, a reset takes with it all that the agent has not read of a first window.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_survives_cuts_inside_its_first_window() {
    for every in [100_003, 200_001] {
        let cable = BadCable::with(|_| {}, |_| {}).await;
        let down = cable.post(full("go"));
        cable.proxy.cut_after(every);
        cable.calls.next().await.answer(Response::new(bodies::long(1, 500_000)));
        let sum = bodies::sum(answered(down).await.into_body()).await;
        assert_eq!(sum, Ok(bodies::sum_of_long(1, 500_000)), "every {every}");
        assert!(cable.proxy.cuts() > 0 && cable.moved().await > 0);
        cable.ends().await;
    }
}

#[tokio::test]
async fn a_conversation_survives_a_cut_after_each_word() {
    let cable = BadCable::with(|_| {}, |_| {}).await;
    let (asks, body) = bodies::written();
    let answer = cable.post(body);
    cable.calls.next().await.echo();
    assert!(asks.write("0").await);
    let mut heard = answered(answer).await.into_body();
    for round in 0..10 {
        assert_eq!(bodies::next(&mut heard).await, Some(Bytes::from(round.to_string())));
        let cuts = cable.proxy.cuts();
        cable.proxy.cut();
        assert!(asks.write((round + 1).to_string()).await);
        until("the cut", || cable.proxy.cuts() > cuts).await;
    }
    assert_eq!(bodies::next(&mut heard).await, Some(Bytes::from("10")));
    drop(asks);
    assert!(bodies::ends_well(&mut heard).await);
    assert!(cable.moved().await > 0);
    cable.ends().await;
}

#[tokio::test]
async fn an_answer_that_is_awaited_survives_a_cut_and_the_post_is_not_repeated() {
    let cable = BadCable::with(|_| {}, |_| {}).await;
    let answer = cable.post(full("pay"));
    let call = cable.calls.next().await;
    cable.proxy.cut();
    until("both cuts", || cable.proxy.cuts() == 2).await;
    let (_, body) = call.read().await;
    assert_eq!(body, "pay");
    assert_eq!(whole(answered(answer).await).await, (200, Bytes::from("3")));
    assert!(cable.moved().await > 0);
    cable.ends().await;
}

fn hasty(relay: &mut RelayConfig) {
    relay.tunnels.ping_interval = Duration::from_secs(1);
    relay.tunnels.ping_timeout = Duration::from_secs(1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_freezes_and_comes_back_loses_nothing() {
    let cable = BadCable::with(hasty, |_| {}).await;
    let down = cable.post(full("go"));
    cable.calls.next().await.answer(Response::new(bodies::long(4, LONG)));
    let mut down = answered(down).await;
    let first = bodies::next(down.body_mut())
        .await
        .map_or(0, |piece| piece.len() as u64);
    let rest = tokio::spawn(bodies::sum(down.into_body()));
    cable.proxy.freeze();
    let mut events = cable.agent.events.subscribe();
    let gave_up = async {
        for _ in 0..2 {
            while !matches!(events.recv().await, Ok(agent::Event::Disconnected { .. })) {}
        }
    };
    within("the agent gives both tunnels up", gave_up).await;
    until("the freeze is felt", || cable.proxy.held_back() > 0).await;
    cable.proxy.heal();
    let sum = within("the rest", rest).await.expect("no panic");
    assert_eq!(sum.map(|sum| sum.0), Ok(LONG - first));
    assert!(cable.moved().await > 0);
    cable.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_that_freezes_hands_its_exchanges_to_the_other() {
    // The keep-alive is far too slow to help.
    let cable = BadCable::with(|_| {}, |_| {}).await;
    let mut talks = Vec::new();
    for _ in 0..4 {
        let (asks, body) = bodies::written();
        let answer = cable.post(body);
        cable.calls.next().await.echo();
        assert!(asks.write("before").await);
        let mut heard = answered(answer).await.into_body();
        assert_eq!(bodies::next(&mut heard).await, Some(Bytes::from("before")));
        talks.push((asks, heard));
    }
    assert_eq!(cable.proxy.connections(), 2);
    cable.proxy.freeze_first(1);
    for (asks, heard) in &mut talks {
        assert!(asks.write("after").await);
        assert_eq!(bodies::next(heard).await, Some(Bytes::from("after")));
    }
    assert!(cable.proxy.held_back() > 0 && cable.moved().await > 0);
    assert_eq!(cable.proxy.connections(), 2, "without a new tunnel");
    for (asks, mut heard) in talks {
        drop(asks);
        assert!(bodies::ends_well(&mut heard).await);
    }
    cable.ends().await;
}

#[tokio::test]
async fn a_network_that_is_gone_too_long_breaks_what_was_in_flight() {
    let brief = |relay: &mut RelayConfig| relay.tunnels.resume_timeout = Duration::from_millis(500);
    let cable = BadCable::with(brief, |_| {}).await;
    let (declared, chunked) = (cable.post(full("x")), cable.calls.next().await);
    let (one, ..) = chunked.begin(Response::builder().header("content-length", 100));
    assert!(one.write("half").await);
    let mut declared = answered(declared).await.into_body();
    assert_eq!(bodies::next(&mut declared).await, Some(Bytes::from("half")));
    let waiting = cable.post(full("y"));
    let unanswered = cable.calls.next().await;
    cable.proxy.refuse();
    cable.proxy.cut();
    until("both cuts", || cable.proxy.cuts() == 2).await;
    assert!(!bodies::ends_well(&mut declared).await);
    let lost = answered(waiting).await;
    assert_eq!(
        (lost.status().as_u16(), &lost.headers()["adit-error"]),
        (502, &"tunnel-lost".parse().expect("a value"))
    );
    cable.proxy.heal();
    within("the agent is back", one.closed()).await;
    until("the upstream's request is given up", || unanswered.is_given_up()).await;
    drop(unanswered);
    cable.ends().await;
}
