//! The data blocking request: the whole answer at once, or none of it.

mod harness;

use bytes::Bytes;
use harness::{
    bodies, full,
    home::{Home, ask, whole},
    within,
};
use http::{Method, Request, Response};
use hyper::body::Incoming;
use tokio::task::JoinHandle;

fn buffered(method: Method) -> Request<harness::AnyBody> {
    let asked = ask(method, "/b").header("adit-response", "buffered");
    asked.body(full("")).expect("a request")
}

async fn answered(task: JoinHandle<Response<Incoming>>) -> Response<Incoming> {
    within("an answer", task).await.expect("no panic")
}

fn code(response: &Response<Incoming>) -> String {
    response.headers()["adit-error"].to_str().expect("text").to_owned()
}

#[tokio::test]
async fn an_answer_without_a_length_gets_one() {
    let home = Home::start().await;
    let by_query = ask(Method::GET, "/b?responseMode=buffered&x=1")
        .body(full(""))
        .expect("a request");
    for request in [buffered(Method::GET), buffered(Method::POST), by_query] {
        let answer = home.send(request);
        let call = home.calls.next().await;
        assert!(!call.head.headers.contains_key("adit-response"));
        let (body, ..) = call.begin(Response::builder().header("x-a", "1"));
        assert!(body.write("one ").await && body.write("two").await);
        assert!(!answer.is_finished(), "nothing before the end");
        drop(body);
        let answer = answered(answer).await;
        assert_eq!(
            (&answer.headers()["content-length"], &answer.headers()["x-a"]),
            (&"7".parse().expect("a value"), &"1".parse().expect("a value"))
        );
        assert_eq!(whole(answer).await, (200, Bytes::from("one two")));
    }
    let answer = home.send(buffered(Method::HEAD));
    let response = Response::builder().header("content-length", 99).body(full(""));
    home.calls.next().await.answer(response.expect("a response"));
    let answer = answered(answer).await;
    assert_eq!(answer.headers()["content-length"], "99");
    home.relay.stop().await;
}

#[tokio::test]
async fn an_answer_over_the_limit_is_a_502() {
    let home = Home::with(|relay| relay.http.buffered_limit = 100_000, |_| {}).await;
    for declared in [true, false] {
        let answer = home.send(buffered(Method::GET));
        let mut response = Response::builder();
        if declared {
            response = response.header("content-length", 100_001);
        }
        let response = response.body(bodies::long(1, 100_001)).expect("a response");
        home.calls.next().await.answer(response);
        let answer = answered(answer).await;
        assert_eq!(
            (answer.status().as_u16(), code(&answer).as_str()),
            (502, "response-too-large")
        );
    }
    let answer = home.send(buffered(Method::GET));
    home.calls.next().await.answer(Response::new(bodies::long(1, 100_000)));
    let answer = answered(answer).await;
    assert_eq!(answer.headers()["content-length"], "100000");
    assert_eq!(
        bodies::sum(answer.into_body()).await,
        Ok(bodies::sum_of_long(1, 100_000))
    );
    assert_eq!(home.calls.waiting().await, 0, "what is too large is not tried again");
    home.relay.stop().await;
}

async fn break_next(home: &Home) {
    let (body, ..) = home
        .calls
        .next()
        .await
        .begin(Response::builder().header("content-length", 100));
    assert!(body.write("half").await);
    body.fail().await;
}

#[tokio::test]
async fn a_get_that_broke_is_tried_once_more() {
    let home = Home::start().await;
    let answer = home.send(buffered(Method::GET));
    break_next(&home).await;
    home.calls.next().await.ok("whole");
    assert_eq!(whole(answered(answer).await).await, (200, Bytes::from("whole")));

    let answer = home.send(buffered(Method::GET));
    break_next(&home).await;
    break_next(&home).await;
    let answer = answered(answer).await;
    assert_eq!(
        (answer.status().as_u16(), code(&answer).as_str()),
        (502, "upstream-failed")
    );
    assert_eq!(home.calls.waiting().await, 0, "twice, not more");
    home.relay.stop().await;
}

#[tokio::test]
async fn a_post_that_broke_is_not() {
    let home = Home::start().await;
    let answer = home.send(buffered(Method::POST));
    break_next(&home).await;
    let answer = answered(answer).await;
    assert_eq!(
        (answer.status().as_u16(), code(&answer).as_str()),
        (502, "upstream-failed")
    );
    home.works().await;
    assert_eq!(home.calls.waiting().await, 0);
    home.relay.stop().await;
}
