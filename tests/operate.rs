//! An operator looks at a running relay and acts on it, through the admin API of any node: nodes, tunnels, traffic; a
//! tunnel is disconnected, a node drained.

mod harness;

use std::{net::SocketAddr, time::Duration};

use adit::ids::{NodeId, TunnelId};
use bytes::Bytes;
use harness::{
    AnyBody, Nodes, TestRelay, full,
    home::{Home, whole},
    send, within,
};
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::net::TcpStream;

/// One call of the admin API at a node.
async fn call(node: &TestRelay, token: &str, method: Method, path: &str) -> (u16, Value) {
    let request: Request<AnyBody> = Request::builder()
        .method(method)
        .uri(format!("/api/v1{path}"))
        .header("host", "admin")
        .header("authorization", format!("Bearer {token}"))
        .body(full(""))
        .expect("a request");
    let (head, body) = send(node.admin, request).await.into_parts();
    let body = within("an answer", body.collect()).await.expect("whole").to_bytes();
    (head.status.as_u16(), serde_json::from_slice(&body).unwrap_or_default())
}

/// Asks until the answer is as it should be: the registry is written a moment later.
async fn eventually(home: &Home, path: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    within(what, async {
        loop {
            looks.tick().await;
            let (status, answer) = call(&home.relay, &home.relay.admin_token, Method::GET, path).await;
            assert_eq!(status, 200, "{answer}");
            if holds(&answer) {
                return answer;
            }
        }
    })
    .await
}

fn length(answer: &Value, list: &str) -> usize {
    answer[list].as_array().expect("a list").len()
}

/// The node that the agent's tunnels are at.
fn holder(home: &Home) -> &TestRelay {
    home.relay.peer.as_deref().unwrap_or(&home.relay)
}

fn nodes_of_this_run() -> usize {
    match Nodes::of_this_run() {
        Nodes::One => 1,
        Nodes::Embedded | Nodes::Servers => 2,
    }
}

async fn closed(address: SocketAddr) {
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    within("the port closes", async {
        while TcpStream::connect(address).await.is_ok() {
            looks.tick().await;
        }
    })
    .await;
}

#[tokio::test]
async fn nodes_and_their_traffic_are_seen_from_any_node() {
    let home = Home::start().await;
    let answer = home.get("/");
    let call = home.calls.next().await;
    let all = |answer: &Value| {
        let nodes = answer["nodes"].as_array().expect("a list");
        nodes.len() == nodes_of_this_run() && nodes.iter().all(|node| node["traffic"].is_object())
    };
    let nodes = eventually(&home, "/nodes", "all nodes answer", all).await;
    let sum = |nodes: &Value, field: &str| -> u64 {
        let nodes = nodes["nodes"].as_array().expect("a list").iter();
        nodes
            .map(|node| node["traffic"][field].as_u64().expect("a number"))
            .sum()
    };
    assert_eq!((sum(&nodes, "tunnels"), sum(&nodes, "exchanges_in_flight")), (2, 1));
    for node in nodes["nodes"].as_array().expect("a list") {
        assert_eq!(
            (&node["version"], &node["draining"]),
            (&env!("CARGO_PKG_VERSION").into(), &false.into())
        );
        assert_eq!(
            node["this"],
            node["node_id"] == home.relay.registry.node_id().to_string()
        );
        assert!(node["heartbeat_age_ms"].as_i64().expect("a number") < 20_000, "{node}");
    }
    call.ok("four");
    within("an answer", answer).await.expect("an answer");
    let stats = eventually(&home, "/stats", "it is counted", |stats| stats["outcomes"]["ok"] == 1).await;
    assert_eq!(stats["node_id"], home.relay.registry.node_id().to_string());
    assert_eq!(stats["from_upstream_bytes"], 4);
    home.relay.stop().await;
}

#[tokio::test]
async fn tunnels_are_seen_from_any_node_page_by_page_and_by_client() {
    let home = Home::start().await;
    home.relay
        .client("other", adit::cluster::registry::NewAuth::Public)
        .await;
    let two = |answer: &Value| length(answer, "tunnels") == 2;
    let tunnels = eventually(&home, "/tunnels?client_id=home", "both are recorded", two).await;
    let here = nodes_of_this_run() == 1;
    for tunnel in tunnels["tunnels"].as_array().expect("a list") {
        assert_eq!(
            (&tunnel["client_id"], &tunnel["dialect"]),
            (&"home".into(), &"adit".into())
        );
        assert_eq!(tunnel["node_id"], holder(&home).registry.node_id().to_string());
        assert_eq!(tunnel["remote_addr"], "127.0.0.1");
        // How it is just now only its own node knows.
        assert_eq!(tunnel["exchanges_in_flight"].is_number(), here, "{tunnel}");
    }
    let token = &home.relay.admin_token;
    let (_, there) = call(holder(&home), token, Method::GET, "/tunnels").await;
    assert_eq!(there["tunnels"][0]["exchanges_in_flight"], 0, "{there}");
    let (_, first) = call(&home.relay, token, Method::GET, "/tunnels?limit=1").await;
    let next = first["next"].as_str().expect("another page");
    let (_, last) = call(
        &home.relay,
        token,
        Method::GET,
        &format!("/tunnels?limit=1&after={next}"),
    )
    .await;
    assert_eq!((length(&last, "tunnels"), &last["next"]), (1, &Value::Null));
    let (_, none) = call(&home.relay, token, Method::GET, "/tunnels?client_id=other").await;
    assert_eq!(length(&none, "tunnels"), 0);
    home.relay.stop().await;
}

#[tokio::test]
async fn a_tunnel_is_disconnected_from_any_node_and_what_runs_through_it_goes_on() {
    let home = Home::start().await;
    let answer = home.get("/");
    let (writer, _, _) = home.calls.next().await.begin(Response::builder());
    let answer = within("the head", answer).await.expect("an answer");
    assert!(writer.write("be").await);
    let two = |answer: &Value| length(answer, "tunnels") == 2;
    let before = eventually(&home, "/tunnels", "both are recorded", two).await;
    let id = |tunnels: &Value, at: usize| tunnels["tunnels"][at]["tunnel_id"].as_str().expect("an id").to_owned();
    for at in 0..2 {
        let back = home.agent.events.subscribe();
        let path = format!("/tunnels/{}", id(&before, at));
        let (status, answer) = call(&home.relay, &home.relay.admin_token, Method::DELETE, &path).await;
        assert_eq!(status, 204, "{answer}");
        drop(back);
    }
    let replaced = |answer: &Value| {
        let old = [id(&before, 0), id(&before, 1)];
        let ids = answer["tunnels"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|one| one["tunnel_id"].as_str());
        length(answer, "tunnels") == 2 && ids.flatten().all(|id| !old.contains(&id.to_owned()))
    };
    eventually(&home, "/tunnels", "the agent dials again", replaced).await;
    assert!(writer.write("gun").await);
    drop(writer);
    assert_eq!(whole(answer).await, (200, Bytes::from("begun")));
    let gone = format!("/tunnels/{}", id(&before, 0));
    for path in [
        gone,
        format!("/tunnels/{}", TunnelId::new()),
        "/tunnels/home".to_owned(),
    ] {
        let (status, _) = call(&home.relay, &home.relay.admin_token, Method::DELETE, &path).await;
        assert_eq!(status, 404, "{path}");
    }
    home.relay.stop().await;
}

#[tokio::test]
async fn a_node_is_told_to_drain_from_any_node_and_what_it_carries_ends_whole() {
    let home = Home::start().await;
    let answer = home.get("/");
    let (writer, _, _) = home.calls.next().await.begin(Response::builder());
    let answer = within("the head", answer).await.expect("an answer");
    let all = |answer: &Value| length(answer, "nodes") == nodes_of_this_run();
    eventually(&home, "/nodes", "all nodes are recorded", all).await;
    let token = &home.relay.admin_token;
    let unknown = format!("/nodes/{}/drain", NodeId::new());
    assert_eq!(call(&home.relay, token, Method::POST, &unknown).await.0, 404);

    // The node that the request came to, told at the other.
    let path = format!("/nodes/{}/drain", home.relay.registry.node_id());
    let (status, problem) = call(holder(&home), token, Method::POST, &path).await;
    assert_eq!(status, 202, "{problem}");
    let id = home.relay.registry.node_id().to_string();
    let leaving = |answer: &Value| {
        let nodes = answer["nodes"].as_array().expect("a list");
        nodes
            .iter()
            .any(|node| node["node_id"] == id && node["draining"] == true)
    };
    eventually(&home, "/nodes", "it says that it leaves", leaving).await;
    assert!(writer.write("whole").await);
    drop(writer);
    assert_eq!(whole(answer).await, (200, Bytes::from("whole")));
    closed(home.relay.address).await;
    if let Some(peer) = &home.relay.peer {
        assert!(TcpStream::connect(peer.address).await.is_ok(), "the other stays");
    }
    home.relay.stop().await;
}
