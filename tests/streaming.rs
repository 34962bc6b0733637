//! A request from the internet reaches a local server through a tunnel, and everything about it survives.

mod harness;

use bytes::Bytes;
use harness::{
    AnyBody, bodies, full,
    home::{Home, ask, http2, whole},
    until, within,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;

const LONG: u64 = 64 * 1024 * 1024;

async fn answered(task: tokio::task::JoinHandle<Response<Incoming>>) -> Response<Incoming> {
    within("an answer", task).await.expect("no panic")
}

fn request(method: &str, path: &str, body: AnyBody) -> Request<AnyBody> {
    let method = Method::from_bytes(method.as_bytes()).expect("a method");
    ask(method, path).body(body).expect("a request")
}

#[tokio::test]
async fn every_method_and_target_goes_through_as_it_is() {
    let home = Home::start().await;
    let methods = [
        "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND", "REPORT", "BREW",
    ];
    for method in methods {
        let target = "/a/../b//c?x=%2e&clientId=home&y=%FF";
        let answer = home.send(request(method, target, full("")));
        let call = home.calls.next().await;
        assert_eq!(
            (call.head.method.as_str(), call.head.uri.to_string().as_str()),
            (method, target)
        );
        call.ok("yes");
        let answer = answered(answer).await;
        assert!(answer.headers().contains_key("adit-request-id"), "{method}");
        let body = if method == "HEAD" { "" } else { "yes" };
        assert_eq!(whole(answer).await, (200, Bytes::from(body)), "{method}");
    }
    assert_eq!(home.calls.waiting().await, 0, "each once");
    home.relay.stop().await;
}

#[tokio::test]
async fn bodies_with_a_length_and_without_arrive_whole_both_ways() {
    let home = Home::start().await;
    for (length, declared) in [
        (0, true),
        (1, true),
        (70_000, true),
        (0, false),
        (1, false),
        (300_000, false),
    ] {
        let mut builder = ask(Method::POST, "/up");
        if declared {
            builder = builder.header("content-length", length);
        }
        let answer = home.send(builder.body(bodies::long(1, length)).expect("a request"));
        let call = home.calls.next().await;
        let sent = call.head.headers.get("content-length").cloned();
        assert_eq!(sent.is_some(), declared, "{length}");
        let mut response = Response::builder();
        if declared {
            response = response.header("content-length", length);
        }
        let (answered_with, head, body) = call.begin(response);
        assert_eq!(head.method, Method::POST);
        assert_eq!(bodies::sum(body).await, Ok(bodies::sum_of_long(1, length)));
        tokio::spawn(answered_with.write_long(2, length));
        let answer = answered(answer).await;
        let said = answer
            .headers()
            .get("content-length")
            .map(|value| value.to_str().expect("digits").to_owned());
        assert_eq!(said, declared.then(|| length.to_string()));
        assert_eq!(
            bodies::sum(answer.into_body()).await,
            Ok(bodies::sum_of_long(2, length))
        );
    }
    home.relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_bodies_arrive_byte_for_byte() {
    let home = Home::start().await;
    let down = home.get("/down");
    home.calls.next().await.answer(Response::new(bodies::long(3, LONG)));
    let down = bodies::sum(answered(down).await.into_body()).await;
    assert_eq!(down, Ok(bodies::sum_of_long(3, LONG)));

    let up = home.send(request("PUT", "/up", bodies::long(4, LONG)));
    let call = home.calls.next().await;
    let (writer, _, body) = call.begin(Response::builder());
    assert_eq!(bodies::sum(body).await, Ok(bodies::sum_of_long(4, LONG)));
    drop(writer);
    assert_eq!(whole(answered(up).await).await, (200, Bytes::new()));
    home.relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_directions_flow_at_once() {
    let home = Home::start().await;
    let answer = home.send(request("POST", "/echo", bodies::long(5, LONG)));
    home.calls.next().await.echo();
    let back = bodies::sum(answered(answer).await.into_body()).await;
    assert_eq!(back, Ok(bodies::sum_of_long(5, LONG)));
    home.relay.stop().await;
}

#[tokio::test]
async fn a_conversation_goes_back_and_forth_in_one_exchange() {
    let home = Home::start().await;
    let (asks, body) = bodies::written();
    let answer = home.send(request("POST", "/talk", body));
    home.calls.next().await.echo();
    assert!(asks.write("0").await);
    let mut heard = answered(answer).await.into_body();
    for round in 0..50 {
        assert_eq!(bodies::next(&mut heard).await, Some(Bytes::from(round.to_string())));
        assert!(asks.write((round + 1).to_string()).await);
    }
    assert_eq!(bodies::next(&mut heard).await, Some(Bytes::from("50")));
    drop(asks);
    assert!(bodies::ends_well(&mut heard).await);
    home.relay.stop().await;
}

#[tokio::test]
async fn events_arrive_one_by_one() {
    let home = Home::start().await;
    let answer = home.get("/events");
    let call = home.calls.next().await;
    let (events, ..) = call.begin(Response::builder().header("content-type", "text/event-stream"));
    let answer = answered(answer).await;
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut heard = answer.into_body();
    for number in 0..100 {
        let event = format!("data: {number}\n\n");
        assert!(events.write(event.clone()).await);
        assert_eq!(bodies::next(&mut heard).await, Some(Bytes::from(event)));
    }
    drop(events);
    assert!(bodies::ends_well(&mut heard).await);
    home.relay.stop().await;
}

fn checksum() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", HeaderValue::from_static("42"));
    trailers
}

#[tokio::test]
async fn trailers_pass_both_ways_in_http1() {
    let home = Home::start().await;
    let (up, body) = bodies::written();
    let asked = ask(Method::POST, "/t")
        .header("te", "trailers")
        .header("trailer", "x-checksum");
    let answer = home.send(asked.body(body).expect("a request"));
    let call = home.calls.next().await;
    assert_eq!(call.head.headers["te"], "trailers");
    let (down, _, received) = call.begin(Response::builder().header("trailer", "x-checksum"));
    assert!(up.write("up").await && down.write("down").await);
    up.trailers(checksum()).await;
    let received = within("the request", received.collect()).await.expect("whole");
    assert_eq!(received.trailers(), Some(&checksum()));
    down.trailers(checksum()).await;
    let answer = within("the answer", answered(answer).await.collect())
        .await
        .expect("whole");
    assert_eq!(answer.trailers(), Some(&checksum()));
    home.relay.stop().await;
}

#[tokio::test]
async fn grpc_streams_both_ways_over_http2_and_ends_with_trailers() {
    let home = Home::start().await;
    let mut connection = http2(home.relay.address).await;
    let (asks, body) = bodies::written();
    let asked = Request::post("http://relay/pkg.Service/Talk")
        .header("adit-client", "home")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .expect("a request");
    let answer = tokio::spawn(connection.send_request(asked));
    let call = home.calls.next().await;
    assert_eq!(
        (call.head.version, call.head.uri.path()),
        (Version::HTTP_2, "/pkg.Service/Talk")
    );
    assert_eq!(call.head.headers["te"], "trailers");
    assert_eq!(
        call.head.uri.authority().map(|a| a.as_str()),
        Some(home.upstream.address.to_string().as_str())
    );
    let (tells, _, mut received) = call.begin(Response::builder().header("content-type", "application/grpc"));
    let answer = within("an answer", answer).await.expect("no panic").expect("an answer");
    assert_eq!(answer.version(), Version::HTTP_2);
    let mut heard = answer.into_body();
    for round in 0..20 {
        let (there, back) = (format!("ask {round}"), format!("tell {round}"));
        assert!(asks.write(there.clone()).await);
        assert_eq!(bodies::next(&mut received).await, Some(Bytes::from(there)));
        assert!(tells.write(back.clone()).await);
        assert_eq!(bodies::next(&mut heard).await, Some(Bytes::from(back)));
    }
    drop(asks);
    assert!(bodies::ends_well(&mut received).await);
    let status = HeaderMap::from_iter([("grpc-status".parse().expect("a name"), HeaderValue::from_static("0"))]);
    tells.trailers(status.clone()).await;
    let end = within("the end", heard.collect()).await.expect("whole");
    assert_eq!(end.trailers(), Some(&status));
    drop(connection);
    home.relay.stop().await;
}

#[tokio::test]
async fn head_keeps_its_length_and_a_range_its_part() {
    let home = Home::start().await;
    let answer = home.send(request("HEAD", "/file", full("")));
    let response = Response::builder()
        .header("content-length", "123456789")
        .header("etag", "\"x\"");
    home.calls
        .next()
        .await
        .answer(response.body(full("")).expect("a response"));
    let answer = answered(answer).await;
    assert_eq!(
        (&answer.headers()["content-length"], &answer.headers()["etag"]),
        (
            &"123456789".parse().expect("a value"),
            &"\"x\"".parse().expect("a value")
        )
    );
    assert_eq!(whole(answer).await, (200, Bytes::new()));

    let answer = home.send(
        ask(Method::GET, "/file")
            .header("range", "bytes=2-4")
            .body(full(""))
            .expect("a request"),
    );
    let call = home.calls.next().await;
    assert_eq!(call.head.headers["range"], "bytes=2-4");
    let response = Response::builder().status(206).header("content-range", "bytes 2-4/9");
    call.answer(response.body(full("cde")).expect("a response"));
    let answer = answered(answer).await;
    assert_eq!(answer.headers()["content-range"], "bytes 2-4/9");
    assert_eq!(whole(answer).await, (206, Bytes::from("cde")));

    for status in [204, 304] {
        let answer = home.get("/nothing");
        let response = Response::builder().status(status);
        home.calls
            .next()
            .await
            .answer(response.body(full("")).expect("a response"));
        assert_eq!(whole(answered(answer).await).await, (status, Bytes::new()));
    }
    home.relay.stop().await;
}

#[tokio::test]
async fn header_bytes_and_the_order_of_equal_names_survive() {
    let home = Home::start().await;
    let raw = HeaderValue::from_bytes(b"caf\xe9 \xff\x80").expect("obs-text");
    let asked = ask(Method::GET, "/h")
        .header("x-raw", &raw)
        .header("x-two", "1")
        .header("x-two", "2");
    let answer = home.send(asked.body(full("")).expect("a request"));
    let call = home.calls.next().await;
    assert_eq!(call.head.headers["x-raw"], raw);
    assert!(call.head.headers.get_all("x-two").iter().eq(["1", "2"]));
    let response = Response::builder()
        .header("set-cookie", "b=2")
        .header("set-cookie", "a=1")
        .header("x-raw", &raw);
    call.answer(response.body(full("")).expect("a response"));
    let answer = answered(answer).await;
    assert!(answer.headers().get_all("set-cookie").iter().eq(["b=2", "a=1"]));
    assert_eq!(answer.headers()["x-raw"], raw);
    home.relay.stop().await;
}

#[tokio::test]
async fn the_upstream_learns_who_asked_and_the_trace_goes_on() {
    let home = Home::start().await;
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let asked = ask(Method::GET, "/f")
        .header("x-forwarded-for", "6.6.6.6")
        .header("x-forwarded-proto", "https")
        .header("traceparent", parent);
    let answer = home.send(asked.body(full("")).expect("a request"));
    let call = home.calls.next().await;
    let said = |name: &str| call.head.headers[name].to_str().expect("text").to_owned();
    assert_eq!(
        (said("x-forwarded-for"), said("x-forwarded-proto")),
        ("127.0.0.1".into(), "http".into()),
        "a stranger is not believed"
    );
    assert_eq!(
        (said("x-forwarded-host"), said("host")),
        ("relay".into(), "relay".into())
    );
    assert_eq!(said("forwarded"), "for=127.0.0.1;host=relay;proto=http");
    assert!(
        said("traceparent").starts_with("00-0af7651916cd43dd8448eb211c80319c-"),
        "{}",
        said("traceparent")
    );
    assert!(!call.head.headers.keys().any(|name| name.as_str().starts_with("adit-")));
    call.ok("");
    assert_eq!(answered(answer).await.status(), StatusCode::OK);
    home.relay.stop().await;

    let home = Home::with(
        |relay| relay.trusted_proxies = vec!["127.0.0.0/8".parse().expect("a net")],
        |_| {},
    )
    .await;
    let asked = ask(Method::GET, "/f")
        .header("x-forwarded-for", "192.0.2.1")
        .header("x-forwarded-proto", "https");
    let answer = home.send(asked.body(full("")).expect("a request"));
    let call = home.calls.next().await;
    assert_eq!(
        call.head.headers["x-forwarded-for"], "192.0.2.1, 127.0.0.1",
        "a trusted proxy is"
    );
    assert_eq!(call.head.headers["x-forwarded-proto"], "https");
    assert!(call.head.headers.contains_key("traceparent"), "a trace begins here");
    call.ok("");
    assert_eq!(answered(answer).await.status(), StatusCode::OK);
    home.relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_that_nobody_reads_slow_nobody() {
    let home = Home::with(|_| {}, |agent| agent.connections = 1).await;
    let mut stalled = Vec::new();
    for number in 0..64 {
        let answer = home.get("/stalled");
        home.calls
            .next()
            .await
            .answer(Response::new(bodies::long(number, LONG)));
        stalled.push(answered(answer).await);
    }
    let mut live = Vec::new();
    for _ in 0..136 {
        let answer = home.get("/live");
        home.calls.next().await.answer(Response::new(bodies::long(7, 100_000)));
        live.push(answer);
    }
    for answer in live {
        let sum = bodies::sum(answered(answer).await.into_body()).await;
        assert_eq!(sum, Ok(bodies::sum_of_long(7, 100_000)));
    }
    let answer = home.get("/live");
    home.calls.next().await.answer(Response::new(bodies::long(8, 16 << 20)));
    assert_eq!(
        bodies::sum(answered(answer).await.into_body()).await,
        Ok(bodies::sum_of_long(8, 16 << 20))
    );
    drop(stalled);
    home.works().await;
    home.relay.stop().await;
}

#[tokio::test]
async fn a_downstream_that_leaves_cancels_the_upstreams_request() {
    let home = Home::start().await;
    let answer = home.get("/left-while-reading");
    let (down, ..) = home.calls.next().await.begin(Response::builder());
    assert!(down.write("some").await);
    let mut answer = answered(answer).await;
    assert_eq!(bodies::next(answer.body_mut()).await, Some(Bytes::from("some")));
    drop(answer);
    down.closed().await;

    let (up, body) = bodies::written();
    let answer = home.send(request("POST", "/left-while-sending", body));
    assert!(up.write("half").await);
    let mut call = home.calls.next().await;
    assert_eq!(bodies::next(&mut call.body).await, Some(Bytes::from("half")));
    up.fail().await;
    assert!(
        !bodies::ends_well(&mut call.body).await,
        "half a body does not look whole"
    );
    answer.abort();

    let answer = home.get("/left-while-waiting");
    let waiting = home.calls.next().await;
    answer.abort();
    let mut given_up = Some(waiting);
    until("the upstream's request is given up", || {
        given_up.as_ref().is_some_and(harness::home::Call::is_given_up)
    })
    .await;
    drop(given_up.take());
    home.works().await;
    home.relay.stop().await;
}
