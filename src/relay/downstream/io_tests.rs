//! `io` over an in-memory stream, with paused time.

use std::sync::atomic::{AtomicBool, Ordering};

use http::{HeaderMap, StatusCode, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

/// Whether some test's stream was reset: asserted by the one test that resets.
static WAS_RESET: AtomicBool = AtomicBool::new(false);

impl Reset for DuplexStream {
    fn reset_on_close(&self) {
        WAS_RESET.store(true, Ordering::SeqCst);
    }
}

struct Bench {
    near: DownstreamIo<DuplexStream>,
    far: DuplexStream,
    shared: Arc<Shared>,
}

fn bench(kept: &'static [u8]) -> Bench {
    let (near, far) = duplex(1024);
    let shared = Arc::new(Shared::new(([127, 0, 0, 1], 1).into(), false));
    let timeouts = Arc::new(Timeouts::default());
    let head_due = Instant::now() + timeouts.header;
    let kept = Bytes::from_static(kept);
    let near = DownstreamIo::new(near, kept, shared.clone(), timeouts, Some(head_due), None);
    Bench { near, far, shared }
}

async fn read_error(io: &mut DownstreamIo<DuplexStream>) -> io::ErrorKind {
    let mut buf = [0; 64];
    loop {
        match io.read(&mut buf).await {
            Ok(0) => panic!("the stream ended"),
            Ok(_) => {}
            Err(e) => return e.kind(),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_trickles_is_cut_at_its_deadline() {
    let mut bench = bench(b"GET");
    let started = Instant::now();
    let mut far = bench.far;
    let trickle = tokio::spawn(async move {
        while far.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    assert_eq!(read_error(&mut bench.near).await, io::ErrorKind::TimedOut);
    assert_eq!(started.elapsed(), Timeouts::default().header);
    trickle.abort();
}

#[tokio::test(start_paused = true)]
async fn between_requests_the_idle_time_counts_and_then_the_heads() {
    let mut bench = bench(b"");
    drop(bench.shared.begin(Version::HTTP_11).answered(http::Response::new(())));
    let started = Instant::now();
    let idle = Timeouts::default().idle;
    tokio::time::timeout(idle - Duration::from_secs(1), bench.near.read_u8())
        .await
        .expect_err("still waiting");
    bench.far.write_all(b"G").await.expect("a first byte");
    assert_eq!(read_error(&mut bench.near).await, io::ErrorKind::TimedOut);
    assert_eq!(
        started.elapsed(),
        idle - Duration::from_secs(1) + Timeouts::default().header
    );
}

#[tokio::test(start_paused = true)]
async fn nothing_is_timed_while_a_call_is_in_flight_or_after_an_upgrade() {
    let mut bench = bench(b"");
    let call = bench.shared.begin(Version::HTTP_11);
    let hour = Duration::from_secs(3600);
    let silent = tokio::time::timeout(hour, bench.near.read_u8()).await;
    silent.expect_err("a call in flight");
    let mut response = http::Response::new(());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    drop(call.answered(response));
    let silent = tokio::time::timeout(hour, bench.near.read_u8()).await;
    silent.expect_err("a tunnel");
}

#[tokio::test(start_paused = true)]
async fn a_write_that_makes_no_progress_is_an_error() {
    let mut bench = bench(b"");
    let _call = bench.shared.begin(Version::HTTP_11);
    let started = Instant::now();
    let error = bench.near.write_all(&[7; 4096]).await.expect_err("nobody reads");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(started.elapsed(), Timeouts::default().write_idle);
}

#[tokio::test(start_paused = true)]
async fn progress_starts_the_write_deadline_again() {
    let mut bench = bench(b"");
    let _call = bench.shared.begin(Version::HTTP_11);
    let mut far = bench.far;
    let slow_reader = tokio::spawn(async move {
        let mut taken = 0;
        while taken < 4096 {
            tokio::time::sleep(Timeouts::default().write_idle / 2).await;
            taken += far.read(&mut [0; 512]).await.expect("bytes");
        }
    });
    bench.near.write_all(&[7; 4096]).await.expect("slow, but it moves");
    slow_reader.await.expect("read it all");
}

#[tokio::test]
async fn an_interim_response_goes_out_by_a_flush_and_ahead_of_the_response() {
    let mut bench = bench(b"");
    let call = bench.shared.begin(Version::HTTP_11);
    let mut headers = HeaderMap::new();
    headers.insert("link", http::HeaderValue::from_static("</a.css>"));
    assert!(call.handle().informational(StatusCode::EARLY_HINTS, &headers));
    bench.near.flush().await.expect("written");
    let expected = b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n";
    let mut first = vec![0; expected.len()];
    bench.far.read_exact(&mut first).await.expect("the interim response");
    assert_eq!(first, expected);
    assert!(call.handle().informational(StatusCode::EARLY_HINTS, &headers));
    let _body = call.answered(http::Response::new(()));
    bench.near.write_all(b"HTTP/1.1 200 OK\r\n").await.expect("written");
    let mut both = vec![0; expected.len() + 17];
    bench.far.read_exact(&mut both).await.expect("both");
    assert!(both.starts_with(expected) && both.ends_with(b"HTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn hypers_bare_errors_become_problems_and_a_services_answers_do_not() {
    let mut bench = bench(b"");
    let bare = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
    let call = bench.shared.begin(Version::HTTP_11);
    let body = call.answered(http::Response::new(()));
    drop(body);
    bench.near.write_all(bare).await.expect("written");
    bench.near.flush().await.expect("flushed");
    let mut first = vec![0; bare.len()];
    bench.far.read_exact(&mut first).await.expect("the service's own 400");
    assert_eq!(first, bare);
    bench.near.write_all(bare).await.expect("taken");
    bench.near.flush().await.expect("flushed");
    drop(bench.near);
    let mut second = String::new();
    bench.far.read_to_string(&mut second).await.expect("text");
    assert!(second.contains("adit-error: bad-request"), "{second}");
}

#[tokio::test(start_paused = true)]
async fn the_close_lingers_until_the_client_has_closed_or_time_is_up() {
    let mut quick = bench(b"");
    quick.far.write_all(&[1; 512]).await.expect("an upload");
    drop(quick.far);
    let started = Instant::now();
    quick.near.shutdown().await.expect("closed");
    assert_eq!(started.elapsed(), Duration::ZERO, "the client had closed already");

    let mut slow = bench(b"");
    slow.near.shutdown().await.expect("closed");
    assert_eq!(started.elapsed(), Timeouts::default().linger);
    assert_eq!(slow.far.read(&mut [0; 8]).await.expect("no error"), 0, "it saw our end");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_half_closes_without_reading_what_is_not_its() {
    let mut bench = bench(b"");
    let mut response = http::Response::new(());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    drop(bench.shared.begin(Version::HTTP_11).answered(response));
    bench.far.write_all(b"late").await.expect("bytes");
    bench.near.shutdown().await.expect("half-closed");
    let mut late = [0; 4];
    bench.near.read_exact(&mut late).await.expect("still there");
    assert_eq!(&late, b"late");
}

#[tokio::test]
async fn an_aborted_connection_is_reset_without_an_end() {
    let mut bench = bench(b"");
    bench.shared.begin(Version::HTTP_10).handle().abort();
    bench.near.shutdown().await.expect("nothing done");
    drop(bench.near);
    assert!(WAS_RESET.load(Ordering::SeqCst));
}
