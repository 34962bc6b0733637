//! Shutting down: nobody new, the idle go, the busy finish, the stuck are cut.

use std::time::Duration;

use adit::relay::downstream::listener::Limits;
use axum::body::Body;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    harness::{Answer, FrontDoor, PATIENCE},
    other_protocols::{http2, request},
};

#[tokio::test]
async fn a_drain_lets_the_busy_finish_and_closes_the_idle() {
    let mut door = FrontDoor::open().await;
    let mut silent = door.connect().await;
    let mut idle = door.connect().await;
    idle.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    Answer::read_until(&mut idle, "\r\n\r\n").await;
    let mut busy = door.connect().await;
    busy.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    door.events.waiting.notified().await;

    door.shut_down();
    assert_eq!(Answer::read_to_end(&mut idle).await.text, "");
    assert!(TcpStream::connect(door.address).await.is_err(), "nobody new");
    door.events.release.notify_one();
    let answer = Answer::read_to_end(&mut busy).await;
    assert_eq!((answer.status(), answer.body()), (200, "slow"));
    assert!(answer.head().contains("connection: close"), "{answer:?}");
    drop((idle, busy));
    assert_eq!(Answer::read_to_end(&mut silent).await.text, "", "it never said a thing");
    door.served().await;
    assert_eq!(door.caps.open(), 0);
}

#[tokio::test]
async fn what_never_finishes_is_cut_at_the_drains_deadline() {
    let limits = Limits {
        drain_timeout: Duration::from_millis(100),
        ..Limits::default()
    };
    let mut door = FrontDoor::with(limits).await;
    let mut stuck = door.connect().await;
    stuck.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    door.events.waiting.notified().await;
    door.shut_down();
    door.served().await;
    assert_eq!(Answer::read_to_end(&mut stuck).await.text, "");
    assert_eq!(door.caps.open(), 0);
}

#[tokio::test]
async fn http2_streams_finish_or_are_cut_like_the_rest() {
    for finishes in [true, false] {
        let limits = Limits {
            drain_timeout: if finishes { PATIENCE } else { Duration::from_millis(100) },
            ..Limits::default()
        };
        let mut door = FrontDoor::with(limits).await;
        let mut sender = http2(&door).await;
        let answer = tokio::spawn(sender.send_request(request("/slow", Body::empty())));
        door.events.waiting.notified().await;
        door.shut_down();
        if finishes {
            door.events.release.notify_one();
        }
        assert_eq!(answer.await.expect("no panic").is_ok(), finishes);
        drop(sender);
        door.served().await;
        assert_eq!(door.caps.open(), 0);
    }
}
