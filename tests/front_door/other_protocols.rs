//! HTTP/2 with prior knowledge on the same port, and what is neither.

use axum::body::Body;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::harness::FrontDoor;

pub async fn http2(door: &FrontDoor) -> SendRequest<Body> {
    let io = TokioIo::new(door.connect().await);
    let (sender, connection) = handshake(TokioExecutor::new(), io).await.expect("a handshake");
    tokio::spawn(connection);
    sender
}

pub fn request(path: &str, body: Body) -> Request<Body> {
    Request::post(format!("http://a.example{path}"))
        .body(body)
        .expect("a request")
}

#[tokio::test]
async fn p20_http2_with_prior_knowledge_is_served() {
    let door = FrontDoor::open().await;
    let mut sender = http2(&door).await;
    for _ in 0..3 {
        let response = sender
            .send_request(request("/echo", Body::from("abc")))
            .await
            .expect("an answer");
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.into_body().collect().await.expect("a body").to_bytes(), "abc");
    }
    let long = format!("/{}", "a".repeat(9 * 1024));
    let response = sender
        .send_request(request(&long, Body::empty()))
        .await
        .expect("an answer");
    assert_eq!(response.status(), StatusCode::URI_TOO_LONG);
    assert_eq!(response.headers()["adit-error"], "uri-too-long");
    assert_eq!(door.take_seen().len(), 3);
    door.still_serves().await;
}

#[tokio::test]
async fn a_broken_http2_body_resets_its_stream_only() {
    let door = FrontDoor::open().await;
    let mut sender = http2(&door).await;
    // Its service calls `abort`, which is nothing in HTTP/2.
    let response = sender
        .send_request(request("/broken", Body::empty()))
        .await
        .expect("an answer");
    let error = response.into_body().collect().await.expect_err("a broken body");
    assert!(!error.is_timeout() && !error.is_canceled(), "{error:?}");
    let response = sender
        .send_request(request("/echo", Body::from("on")))
        .await
        .expect("the same connection");
    assert_eq!(response.into_body().collect().await.expect("a body").to_bytes(), "on");
}

#[tokio::test]
async fn interim_responses_are_dropped_in_http2() {
    let door = FrontDoor::open().await;
    let mut sender = http2(&door).await;
    door.events.release.notify_one();
    let response = sender
        .send_request(request("/hint", Body::empty()))
        .await
        .expect("an answer");
    assert_eq!(
        response.into_body().collect().await.expect("a body").to_bytes(),
        "hinted: false"
    );
}

#[tokio::test]
async fn p20_tls_and_proxy_headers_are_told_where_they_are() {
    let door = FrontDoor::open().await;
    let client_hello = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03";
    let answer = door.refuses(400, client_hello).await;
    assert!(answer.body().contains("TLS"), "{answer:?}");
    door.refuses(
        400,
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    )
    .await;
    door.refuses(400, b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c").await;
    door.refuses(400, "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n").await;
    door.refuses(400, "PRI / HTTP/2.0\r\n\r\n").await;
    door.refuses(400, "GET / HTTP/3.0\r\nhost: a\r\n\r\n").await;
    door.still_serves().await;
}
