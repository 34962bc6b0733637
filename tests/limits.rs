//! What one client and one address may ask: more is answered with 429 and when to come again, and what is over makes room.

mod harness;

use adit::config::LimitsConfig;
use harness::{
    full,
    home::{Home, ask, metric, whole},
    within,
};
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;

async fn home(limits: LimitsConfig) -> Home {
    Home::with(|relay| relay.limits = limits, |_| {}).await
}

fn none() -> LimitsConfig {
    LimitsConfig {
        client_requests_per_second: 0,
        client_concurrent: 0,
        address_requests_per_second: 0,
        address_concurrent: 0,
    }
}

/// A refusal of ours: what to do, and when.
async fn refused(answer: Response<Incoming>, whose: &str) {
    assert_eq!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
    let headers = answer.headers().clone();
    assert_eq!(
        (&headers["retry-after"], &headers["adit-error"]),
        (&"1".parse().expect("a value"), &"too-many".parse().expect("a value"))
    );
    assert_eq!(headers["content-type"], "application/problem+json");
    let (_, problem) = whole(answer).await;
    let problem: serde_json::Value = serde_json::from_slice(&problem).expect("JSON");
    assert!(problem["detail"].as_str().expect("text").contains(whose), "{problem}");
}

async fn now(home: &Home, path: &str) -> Response<Incoming> {
    within("an answer", home.get(path)).await.expect("an answer")
}

#[tokio::test]
async fn requests_at_a_time_of_a_client_last_as_long_as_their_answers() {
    let home = home(LimitsConfig {
        client_concurrent: 1,
        ..none()
    })
    .await;
    let answer = home.get("/");
    let (writer, _, _) = home.calls.next().await.begin(Response::builder());
    let answer = within("the head", answer).await.expect("an answer");
    assert!(writer.write("long").await);
    refused(now(&home, "/").await, "this client").await;
    assert_eq!(home.calls.waiting().await, 0, "it did not come through");
    drop(writer);
    assert_eq!(whole(answer).await.0, 200);
    // Its place is given back with its record, a moment after the last byte.
    let record = async { while metric(&home.relay, "adit_exchanges_in_flight").await > 0 {} };
    within("the place is free", record).await;
    home.works().await;
    assert_eq!(
        metric(&home.relay, "adit_limited_total{limit=\"client_concurrent\"}").await,
        1
    );
    home.relay.stop().await;
}

#[tokio::test]
async fn requests_a_second_of_a_client_are_bounded_whoever_asks() {
    let home = home(LimitsConfig {
        client_requests_per_second: 1,
        ..none()
    })
    .await;
    home.works().await;
    home.works().await;
    refused(now(&home, "/").await, "this client").await;
    // What strangers try is not counted against a client: there is none of this name.
    let stranger = ask(Method::GET, "/")
        .header("adit-client", "other")
        .body(full(""))
        .expect("a request");
    let answer = within("an answer", home.send(stranger)).await.expect("an answer");
    assert_ne!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
    home.relay.stop().await;
}

#[tokio::test]
async fn an_address_is_bounded_before_anything_is_looked_up_and_by_what_a_trusted_proxy_says() {
    let limits = LimitsConfig {
        address_requests_per_second: 1,
        ..none()
    };
    let trusting = |relay: &mut adit::config::RelayConfig| {
        relay.limits = limits;
        relay.trusted_proxies = vec!["127.0.0.1/32".parse().expect("a net")];
    };
    let home = Home::with(trusting, |_| {}).await;
    let from = async |address: &str| {
        let request = ask(Method::GET, "/").header("x-forwarded-for", address).body(full(""));
        let answer = home.send(request.expect("a request"));
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => return answer.expect("an answer").status(),
            call = home.calls.next() => call.ok("in"),
        }
        within("an answer", answer).await.expect("an answer").status()
    };
    for expected in [200, 200, 429] {
        assert_eq!(from("192.0.2.1").await.as_u16(), expected);
    }
    assert_eq!(from("192.0.2.2").await.as_u16(), 200, "another address");
    for _ in 0..4 {
        home.works().await;
    }
    home.relay.stop().await;
}

#[tokio::test]
async fn requests_at_a_time_of_an_address() {
    let home = home(LimitsConfig {
        address_concurrent: 1,
        ..none()
    })
    .await;
    let answer = home.get("/");
    let call = home.calls.next().await;
    refused(now(&home, "/").await, "your address").await;
    call.ok("done");
    assert_eq!(
        whole(within("an answer", answer).await.expect("an answer")).await.0,
        200
    );
    home.relay.stop().await;
}
