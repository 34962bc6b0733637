//! The accept loop outlives running out of file descriptors. Alone in its process, because it uses them all up.

use std::{convert::Infallible, fs::File};

use adit::relay::downstream::listener::{Limits, Listener};
use axum::body::Body;
use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket},
};

#[tokio::test]
async fn connections_wait_for_a_descriptor_and_are_then_served() {
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = tcp.local_addr().expect("an address");
    let listener = Listener::new(Limits::default());
    let caps = listener.caps();
    let service = service_fn(|_: Request<Incoming>| async { Ok::<_, Infallible>(Response::new(Body::from("here"))) });
    let serving = tokio::spawn(listener.serve(tcp, service, std::future::pending()));

    let socket = TcpSocket::new_v4().expect("the client's descriptor");
    let mut all: Vec<File> = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        all.push(file);
    }
    let mut client = socket
        .connect(address)
        .await
        .expect("the kernel's side of a connection");
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .expect("sent");
    while caps.accept_errors() == 0 {
        tokio::task::yield_now().await;
    }
    drop(all);

    let mut answer = String::new();
    client.read_to_string(&mut answer).await.expect("an answer");
    assert!(
        answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("here"),
        "{answer}"
    );
    serving.abort();
}
