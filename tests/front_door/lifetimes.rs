//! How connections live and end: interim responses, lingering closes, resets, deadlines, caps.

use std::{io::ErrorKind, time::Duration};

use adit::relay::downstream::{io::Timeouts, listener::Limits};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::harness::{Answer, FrontDoor, PATIENCE};

fn with(change: impl FnOnce(&mut Limits)) -> Limits {
    let mut limits = Limits::default();
    change(&mut limits);
    limits
}

#[tokio::test]
async fn early_hints_go_out_while_the_service_is_still_at_work() {
    let door = FrontDoor::open().await;
    let mut socket = door.connect().await;
    for _ in 0..2 {
        socket
            .write_all(b"GET /hint HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        let interim = Answer::read_until(&mut socket, "\r\n\r\n").await;
        assert_eq!(
            interim.text,
            "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n"
        );
        door.events.release.notify_one();
        let answer = Answer::read_until(&mut socket, "hinted: true").await;
        assert_eq!(answer.status(), 200);
    }
}

#[tokio::test]
async fn http_1_0_knows_no_interim_responses() {
    let door = FrontDoor::open().await;
    door.events.release.notify_one();
    let answer = door.send("GET /hint HTTP/1.0\r\nhost: a\r\n\r\n").await;
    assert_eq!((answer.status(), answer.body()), (200, "hinted: false"));
}

#[tokio::test]
async fn an_early_answer_outlives_the_upload_it_refuses() {
    const UPLOAD: usize = 8 * 1024 * 1024;
    let door = FrontDoor::open().await;
    let (mut reader, mut writer) = door.connect().await.into_split();
    let head = format!("POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: {UPLOAD}\r\n\r\n");
    writer.write_all(head.as_bytes()).await.unwrap();
    let upload = tokio::spawn(async move {
        // It may be cut short: the answer has been sent.
        let _ = writer.write_all(&vec![7; UPLOAD]).await;
    });
    let mut answer = vec![0; "HTTP/1.1 413 Payload Too Large".len()];
    timeout(PATIENCE, reader.read_exact(&mut answer))
        .await
        .expect("in time")
        .expect("an answer");
    assert_eq!(answer, b"HTTP/1.1 413 Payload Too Large");
    let mut rest = Vec::new();
    timeout(PATIENCE, reader.read_to_end(&mut rest))
        .await
        .expect("in time")
        .expect("an end, no reset");
    assert!(rest.ends_with(b"too much"));
    drop(reader);
    upload.await.unwrap();
    door.still_serves().await;
}

#[tokio::test]
async fn an_upload_sent_in_full_before_reading_still_gets_the_early_answer() {
    const UPLOAD: usize = 900 * 1024;
    let door = FrontDoor::open().await;
    let mut request = format!("POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: {UPLOAD}\r\n\r\n").into_bytes();
    request.resize(request.len() + UPLOAD, 7);
    let answer = door.send(request).await;
    assert_eq!((answer.status(), answer.body()), (413, "too much"));
}

#[tokio::test]
async fn a_broken_http_1_0_body_ends_in_a_reset() {
    let door = FrontDoor::open().await;
    let mut socket = door.connect().await;
    socket
        .write_all(b"GET /broken HTTP/1.0\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let mut bytes = Vec::new();
    let error = timeout(PATIENCE, socket.read_to_end(&mut bytes))
        .await
        .expect("in time")
        .expect_err("no clean end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    door.events.dropped_bodies.notified().await;
}

#[tokio::test]
async fn a_broken_chunked_body_has_no_last_chunk() {
    let door = FrontDoor::open().await;
    let answer = door.send("GET /broken HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(answer.status(), 200);
    assert!(!answer.text.ends_with("0\r\n\r\n"), "it looks complete");
}

#[tokio::test]
async fn p24_silence_is_cut_at_the_header_deadline() {
    let short = Duration::from_millis(200);
    let door = FrontDoor::with(with(|limits| {
        limits.timeouts = Timeouts {
            header: short,
            idle: short,
            ..Timeouts::default()
        };
    }))
    .await;
    let is_cut = async |sent: &[u8]| {
        let mut socket = door.connect().await;
        socket.write_all(sent).await.unwrap();
        let mut bytes = Vec::new();
        // A reset is a close too.
        let cut = timeout(PATIENCE, socket.read_to_end(&mut bytes)).await;
        assert!(cut.is_ok(), "not cut: {:?}", String::from_utf8_lossy(sent));
        String::from_utf8_lossy(&bytes).into_owned()
    };
    assert_eq!(is_cut(b"").await, "", "silent");
    assert_eq!(is_cut(b"P").await, "", "undecided");
    assert_eq!(is_cut(b"GET / HTTP/1.1\r\nhost: a\r\n").await, "", "half a head");
    assert!(
        is_cut(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 200"),
        "idle"
    );
    let second = is_cut(b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HT").await;
    assert_eq!(second.matches("HTTP/1.1").count(), 1, "half a second head");
    assert_eq!(door.take_seen().len(), 2);
    door.still_serves().await;
}

#[tokio::test]
async fn p24_a_service_at_work_is_not_timed() {
    let door = FrontDoor::with(with(|limits| {
        let short = Duration::from_millis(50);
        limits.timeouts = Timeouts {
            header: short,
            idle: short,
            ..Timeouts::default()
        };
    }))
    .await;
    let mut busy = door.connect().await;
    busy.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    door.events.waiting.notified().await;
    // Another connection's whole idle time goes by meanwhile.
    assert_eq!(Answer::read_to_end(&mut door.connect().await).await.text, "");
    door.events.release.notify_one();
    assert_eq!(Answer::read_to_end(&mut busy).await.body(), "slow");
}

#[tokio::test]
async fn p24_a_downstream_that_takes_nothing_is_cut() {
    let door = FrontDoor::with(with(|limits| limits.timeouts.write_idle = Duration::from_millis(200))).await;
    let mut stalled = door.connect().await;
    stalled
        .write_all(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    timeout(PATIENCE, door.events.dropped_bodies.notified())
        .await
        .expect("its body is dropped");
    door.take_seen();
    door.still_serves().await;
    drop(stalled);
}

#[tokio::test]
async fn a_downstream_that_leaves_ends_its_response() {
    let door = FrontDoor::open().await;
    let mut leaver = door.connect().await;
    leaver
        .write_all(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    Answer::read_until(&mut leaver, "\r\n\r\n").await;
    drop(leaver);
    timeout(PATIENCE, door.events.dropped_bodies.notified())
        .await
        .expect("its body is dropped");
}

#[tokio::test]
async fn p24_connections_over_the_cap_are_closed_and_room_is_given_back() {
    let door = FrontDoor::with(with(|limits| limits.max_connections_per_address = 2)).await;
    let (mut first, mut second) = (door.connect().await, door.connect().await);
    for socket in [&mut first, &mut second] {
        socket.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        Answer::read_until(socket, "\r\n\r\n").await;
    }
    assert_eq!(
        Answer::read_to_end(&mut door.connect().await).await.text,
        "",
        "closed at once"
    );
    assert_eq!((door.caps.open(), door.caps.refused()), (2, 1));
    drop(first);
    while door.caps.open() == 2 {
        tokio::task::yield_now().await;
    }
    door.still_serves().await;
}
