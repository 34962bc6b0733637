//! Two nodes' fan-outs on a bus of their own, without anything else of a relay.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio_util::task::AbortOnDropHandle;

use super::{Audience, Fanout, Left, Subscription};
use crate::{
    cluster::{
        bus::{Bus, Channel, Inbox, local::Hub},
        letter::Letter,
        peer::Peers,
    },
    ids::{ClientId, NodeId},
    telemetry::{Metrics, RegistryMeter},
};

struct Node {
    id: NodeId,
    fanout: Arc<Fanout>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

struct Takes(Arc<Fanout>);

impl Inbox for Takes {
    fn on_message(&self, message: Bytes) {
        match Letter::decode(message).expect("a letter") {
            Letter::Said { from, client_id, part } => self.0.on_part(from, &client_id, &part),
            Letter::Stands {
                from,
                client_id,
                standing,
            } => self.0.on_standing(from, &client_id, standing),
            Letter::Asks { from, client_id, known } => self.0.on_asks(from, &client_id, &known),
            other => panic!("{other:?}"),
        }
    }

    fn on_interrupted(&self) {
        self.0.on_interrupted();
    }
}

fn node(hub: &Arc<Hub>) -> Node {
    let id = NodeId::new();
    let peers = Arc::new(Peers::new(Arc::new(Bus::local(hub)), id));
    let fanout = Fanout::new(peers.clone(), Arc::new(Metrics::new(&RegistryMeter::default())));
    peers.bus().subscribe(Channel::Node(id));
    let (takes, ticks) = (Arc::new(Takes(fanout.clone())), fanout.clone());
    let run = tokio::spawn(async move { peers.bus().run(takes).await });
    let tick = tokio::spawn(async move {
        let mut times = tokio::time::interval(super::LOOK_EVERY);
        loop {
            times.tick().await;
            ticks.on_tick();
        }
    });
    Node {
        id,
        fanout,
        _tasks: [run, tick].map(AbortOnDropHandle::new),
    }
}

fn home() -> ClientId {
    "home".parse().expect("a client id")
}

async fn say(node: &Node, audience: Audience, body: &'static str) {
    let published = node.fanout.publish(&home(), audience, body.into()).await;
    published.expect("published");
}

async fn got(subscription: &mut Subscription) -> Bytes {
    // The time of a paused clock: what never comes does not hang.
    let next = tokio::time::timeout(Duration::from_secs(60), subscription.next());
    next.await.expect("it comes").expect("a message").body
}

#[tokio::test(start_paused = true)]
async fn an_audience_is_who_is_named_or_who_is_not_on_every_node() {
    let hub = Hub::shared();
    let nodes = [node(&hub), node(&hub)];
    let mut all: Vec<_> = (1..5)
        .map(|conn_id| nodes[conn_id as usize % 2].fanout.subscribe(&home(), conn_id, None))
        .collect();
    say(&nodes[0], Audience::Only(vec![1, 4, 99]), "one and four").await;
    say(&nodes[1], Audience::AllBut(vec![1, 2]), "three and four").await;
    say(&nodes[0], Audience::Only(vec![]), "nobody").await;
    say(&nodes[1], Audience::All, "all").await;
    let expected: [&[&str]; 4] = [
        &["one and four", "all"],
        &["all"],
        &["three and four", "all"],
        &["one and four", "three and four", "all"],
    ];
    for (subscription, expected) in all.iter_mut().zip(expected) {
        let mut messages = Vec::new();
        for _ in expected {
            messages.push(got(subscription).await);
        }
        messages.sort_by_key(|message| expected.iter().position(|one| message == one));
        assert_eq!(messages, expected, "{}", subscription.conn_id());
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_node_takes_to_the_grave_is_a_gap_for_who_comes_back() {
    let hub = Hub::shared();
    let [one, other, third] = [node(&hub), node(&hub), node(&hub)];
    let mut subscription = one.fanout.subscribe(&home(), 1, None);
    say(&other, Audience::All, "first").await;
    let position = subscription.next().await.expect("a message").position;
    say(&other, Audience::All, "second").await;
    assert_eq!(got(&mut subscription).await, "second");
    // Whoever stays missed nothing when the publisher dies; whoever comes to a node that never heard it cannot know.
    drop(other);
    let mut back = third.fanout.subscribe(&home(), 2, Some(position));
    assert_eq!(back.next().await.expect_err("nobody has it"), Left::Gap);
    say(&third, Audience::All, "third").await;
    assert_eq!(got(&mut subscription).await, "third");
}

#[tokio::test(start_paused = true)]
async fn a_last_message_that_is_lost_comes_when_its_node_is_quiet() {
    let hub = Hub::shared();
    let nodes = [node(&hub), node(&hub)];
    let mut subscription = nodes[0].fanout.subscribe(&home(), 1, None);
    say(&nodes[1], Audience::All, "first").await;
    assert_eq!(got(&mut subscription).await, "first");
    hub.misbehave(
        crate::cluster::bus::local::Faults {
            loss: 1.0,
            ..Default::default()
        },
        1,
    );
    say(&nodes[1], Audience::All, "last").await;
    hub.behave();
    assert_eq!(got(&mut subscription).await, "last");
    // The same when a node was cut off, and when it cannot speak it says so.
    hub.cut_off(nodes[1].id);
    let refused = nodes[1].fanout.publish(&home(), Audience::All, "never".into()).await;
    assert_eq!(refused, Err(super::PublishError::BusAway));
    hub.reconnect(nodes[1].id);
    say(&nodes[1], Audience::All, "again").await;
    assert_eq!(got(&mut subscription).await, "again");
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_later_to_the_same_place_gets_all_the_same() {
    let hub = Hub::shared();
    let [one, other] = [node(&hub), node(&hub)];
    let mut subscription = one.fanout.subscribe(&home(), 1, None);
    say(&one, Audience::All, "0").await;
    say(&other, Audience::All, "0").await;
    got(&mut subscription).await;
    let position = subscription.next().await.expect("a message").position;
    drop(subscription);
    say(&one, Audience::All, "1").await;
    say(&other, Audience::All, "2").await;
    // Its own messages this node has at once, the other's it asks for meanwhile: the second comes in between.
    let mut first = one.fanout.subscribe(&home(), 2, Some(position.clone()));
    assert_eq!(got(&mut first).await, "1");
    let mut second = one.fanout.subscribe(&home(), 3, Some(position));
    assert_eq!([got(&mut second).await, got(&mut second).await], ["1", "2"]);
    assert_eq!(got(&mut first).await, "2");
}

#[tokio::test(start_paused = true)]
async fn one_number_is_one_subscriber_and_its_end_is_only_its_own() {
    let node = node(&Hub::new());
    let mut first = node.fanout.subscribe(&home(), 7, None);
    let mut second = node.fanout.subscribe(&home(), 7, None);
    assert_eq!(first.next().await.expect_err("another took its place"), Left::Gap);
    drop(first);
    say(&node, Audience::Only(vec![7]), "x").await;
    assert_eq!(got(&mut second).await, "x");
    node.fanout.forget(&home());
    assert_eq!(second.next().await.expect_err("gone"), Left::ClientGone);
}
