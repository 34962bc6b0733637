//! Request bodies that break: never an end at the upstream.

use tokio::io::AsyncWriteExt;

use crate::{
    harness::raw::RawAnswer,
    harness::until,
    world::{World, assert_problem, post, request},
};

const BROKEN: [&str; 9] = [
    "0x3\r\nabc\r\n0\r\n\r\n",
    "+3\r\nabc\r\n0\r\n\r\n",
    "-3\r\nabc\r\n0\r\n\r\n",
    "fffffffffffffffff\r\nabc",
    "3\nabc\r\n0\r\n\r\n",
    "3;a=\rb\r\nabc\r\n0\r\n\r\n",
    "3\r\nabcX\r\n0\r\n\r\n",
    "\r\n0\r\n\r\n",
    "g\r\n",
];

#[tokio::test]
async fn p7_a_chunk_that_is_broken_from_the_start() {
    let world = World::open().await;
    for bad in BROKEN {
        let smuggled = request("GET /smuggled", "", "");
        let answer = world
            .send(post("transfer-encoding: chunked\r\n", &format!("{bad}{smuggled}")))
            .await;
        assert_problem(&answer, 400, "bad-request", bad);
        assert_eq!(world.upstream.take().len(), 0, "{bad:?} looked whole");
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p7_a_chunk_that_breaks_after_good_ones_is_an_abort_at_the_upstream() {
    let world = World::open().await;
    for (before, bad) in BROKEN.into_iter().enumerate() {
        let heads = world.upstream.heads();
        let mut socket = world
            .begin(post("transfer-encoding: chunked\r\n", "3\r\nabc\r\n"))
            .await;
        until("the upstream has the head", || world.upstream.heads() > heads).await;
        let smuggled = request("GET /smuggled", "", "");
        socket
            .write_all(format!("{bad}{smuggled}").as_bytes())
            .await
            .expect("sent");
        let answer = RawAnswer::read(&mut socket).await;
        assert_problem(&answer, 400, "bad-request", bad);
        until("the upstream sees an end", || world.upstream.ended().len() > before).await;
        let ended = world.upstream.ended().pop().expect("ended");
        assert!(!ended.whole, "{bad:?} looked whole");
        assert_eq!(world.upstream.take().len(), 0, "{bad:?} looked whole");
    }
    world.still_serves().await;
}

#[tokio::test]
async fn p7_a_downstream_that_leaves_in_its_body_is_an_abort_at_the_upstream() {
    let world = World::open().await;
    for (at, headers) in ["transfer-encoding: chunked\r\n", "content-length: 100\r\n"]
        .into_iter()
        .enumerate()
    {
        let socket = world.begin(post(headers, "3\r\nabc\r\n")).await;
        until("the upstream has the head", || world.upstream.heads() > at).await;
        drop(socket);
        until("the upstream sees an end", || world.upstream.ended().len() > at).await;
        assert!(
            world.upstream.ended().iter().all(|ended| !ended.whole),
            "{headers:?} looked whole"
        );
    }
    world.still_serves().await;
}
