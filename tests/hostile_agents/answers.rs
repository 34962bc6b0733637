//! A3: answers that are not valid HTTP, from upstreams and from agents. What comes out is a 502 or a visible break.

use adit::{cluster::registry::NewAuth, ids::InstanceId};

use crate::{
    ask,
    harness::raw::{OK, RawAnswer, RawUpstream},
    harness::tunnel::{RawTunnel, data, response, trailers},
    harness::{TestAgent, TestRelay},
};

/// What a downstream may take the answer for.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Verdict {
    /// A 502 of the relay's.
    Refused,
    /// A head, and then a body that is visibly not whole.
    Broken,
    /// A whole response of this status.
    Whole(u16),
}

fn verdict(answer: &RawAnswer) -> Verdict {
    if answer.status() / 100 == 1 {
        let interim = answer.bytes.len() - answer.body().len();
        let (bytes, reset) = (answer.bytes[interim..].to_vec(), answer.reset);
        return verdict(&RawAnswer { bytes, reset });
    }
    let head = answer.head();
    if head.is_empty() {
        return Verdict::Broken; // closed or reset before a head was out
    }
    let lines: Vec<&str> = head.split("\r\n").filter(|line| !line.is_empty()).collect();
    assert!(
        lines.first().is_some_and(|line| line.starts_with("http/1.1 ")),
        "{answer:?}"
    );
    for line in &lines {
        assert!(!line.contains(['\r', '\n', '\0']), "{answer:?}");
    }
    assert!(lines[1..].iter().all(|line| line.contains(": ")), "{answer:?}");
    let (lengths, codings) = (answer.values("content-length"), answer.values("transfer-encoding"));
    assert!(lengths.len() + codings.len() <= 1, "{answer:?}");
    assert!(codings.iter().all(|coding| coding == b"chunked"), "{answer:?}");
    if answer.status() == 502 {
        assert!(head.contains("adit-error: upstream-failed"), "{answer:?}");
        return Verdict::Refused;
    }
    let bodiless = [204, 304].contains(&answer.status());
    let whole = match (lengths.first(), codings.is_empty()) {
        (_, _) if bodiless => answer.body().is_empty(),
        (Some(length), _) => {
            let length: usize = String::from_utf8_lossy(length).parse().expect("a length");
            assert!(answer.body().len() <= length, "more than declared: {answer:?}");
            answer.body().len() == length
        }
        (None, false) => {
            answer.body().ends_with(b"0\r\n\r\n") || String::from_utf8_lossy(answer.body()).contains("\r\n0\r\n")
        }
        (None, true) => !answer.reset,
    };
    match whole {
        true => Verdict::Whole(answer.status()),
        false => Verdict::Broken,
    }
}

const BAD_ANSWERS: &[(&str, &[u8], &[Verdict])] = {
    use Verdict::{Broken, Refused, Whole};
    &[
        (
            "/nul",
            b"HTTP/1.1 200 OK\r\nx: a\0b\r\ncontent-length: 2\r\n\r\nok",
            &[Refused],
        ),
        (
            "/cr",
            b"HTTP/1.1 200 OK\r\nx: a\rb\r\ncontent-length: 2\r\n\r\nok",
            &[Refused],
        ),
        (
            "/name",
            b"HTTP/1.1 200 OK\r\na b: c\r\ncontent-length: 2\r\n\r\nok",
            &[Refused],
        ),
        (
            "/lengths",
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
            &[Refused],
        ),
        ("/plus", b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok", &[Refused]),
        (
            "/gzip",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            &[Refused, Broken, Whole(200)],
        ),
        (
            "/both",
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            &[Refused, Whole(200)],
        ),
        (
            "/short",
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",
            &[Refused, Broken],
        ),
        (
            "/long",
            b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nok",
            &[Whole(200), Broken],
        ),
        (
            "/cut",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
            &[Refused, Broken],
        ),
        (
            "/chunk",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0x2\r\nok\r\n0\r\n\r\n",
            &[Refused, Broken],
        ),
        ("/99", b"HTTP/1.1 99 Low\r\ncontent-length: 2\r\n\r\nok", &[Refused]),
        (
            "/1000",
            b"HTTP/1.1 1000 High\r\ncontent-length: 2\r\n\r\nok",
            &[Refused],
        ),
        (
            "/101",
            b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
            &[Refused],
        ),
        (
            "/204",
            b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\nok",
            &[Whole(204)],
        ),
        (
            "/304",
            b"HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\nok",
            &[Whole(304)],
        ),
        ("/empty", b"", &[Refused]),
        ("/half", b"HTTP/1.1 200 OK\r\ncontent-", &[Refused]),
        ("/garbage", b"\x16\x03\x01\0\0hello hello\r\n\r\n", &[Refused]),
        ("/100", b"HTTP/1.1 100 Continue\r\n\r\n", &[Refused]),
    ]
};

#[tokio::test]
async fn a3_answers_of_upstreams_that_are_not_valid() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let upstream = RawUpstream::start(|call| {
        if call.path() == "/flood" {
            return [b"HTTP/1.1 103 Early Hints\r\nx: 1\r\n\r\n".repeat(5000), OK.to_vec()].concat();
        }
        let bad = BAD_ANSWERS.iter().find(|(path, ..)| *path == call.path());
        bad.map_or(OK, |(_, answer, _)| answer).to_vec()
    })
    .await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    for (path, _, allowed) in BAD_ANSWERS {
        let answer = ask(&relay, "home", &format!("GET {path}")).await;
        let verdict = verdict(&answer);
        assert!(allowed.contains(&verdict), "{path}: {verdict:?} of {answer:?}");
        assert_eq!(ask(&relay, "home", "GET /").await.body(), b"ok", "after {path}");
    }
    let flood = ask(&relay, "home", "GET /flood").await;
    let text = String::from_utf8_lossy(&flood.bytes).into_owned();
    assert!(text.matches("HTTP/1.1 103").count() <= 16, "the flood is not passed on");
    assert!(
        text.contains("HTTP/1.1 200 OK") || text.contains("HTTP/1.1 502"),
        "{flood:?}"
    );
    assert_eq!(ask(&relay, "home", "GET /").await.body(), b"ok", "after the flood");
}

type Stream = Vec<u8>;

fn hand_made() -> Vec<(&'static str, Stream, Vec<Verdict>)> {
    use Verdict::{Broken, Refused, Whole};
    let ok = |headers: &[(&[u8], &[u8])]| [response(200, headers), data(b"ok")].concat();
    let two = (&b"content-length"[..], &b"2"[..]);
    vec![
        ("CR in a value", ok(&[two, (b"x", b"a\rb")]), vec![Refused]),
        (
            "LF in a value",
            ok(&[two, (b"x", b"a\nset-cookie: evil")]),
            vec![Refused],
        ),
        ("NUL in a value", ok(&[two, (b"x", b"a\0b")]), vec![Refused]),
        ("CRLF in a name", ok(&[two, (b"x\r\ny", b"1")]), vec![Refused]),
        ("an empty name", ok(&[two, (b"", b"1")]), vec![Refused]),
        (
            "a coding",
            ok(&[two, (b"transfer-encoding", b"gzip")]),
            vec![Whole(200)],
        ),
        ("chunked", ok(&[(b"transfer-encoding", b"chunked")]), vec![Whole(200)]),
        (
            "hop by hop",
            ok(&[two, (b"connection", b"x"), (b"x", b"1"), (b"upgrade", b"h2c")]),
            vec![Whole(200)],
        ),
        (
            "the relay's own",
            ok(&[two, (b"adit-error", b"no-tunnel")]),
            vec![Whole(200)],
        ),
        ("two lengths", ok(&[two, (b"content-length", b"3")]), vec![Refused]),
        ("no length", ok(&[(b"content-length", b"x")]), vec![Refused]),
        (
            "too little",
            [response(200, &[(b"content-length", b"9")]), data(b"ok")].concat(),
            vec![Refused, Broken],
        ),
        (
            "too much",
            [response(200, &[(b"content-length", b"1")]), data(b"ok")].concat(),
            vec![Refused, Broken],
        ),
        ("status 99", [response(99, &[two]), data(b"ok")].concat(), vec![Refused]),
        ("status 0", response(0, &[]), vec![Refused]),
        (
            "status 1000",
            [response(1000, &[two]), data(b"ok")].concat(),
            vec![Refused],
        ),
        (
            "101 unasked",
            [response(101, &[(b"upgrade", b"websocket")]), data(b"ok")].concat(),
            vec![Refused],
        ),
        (
            "204 with a body",
            [response(204, &[two]), data(b"ok")].concat(),
            vec![Whole(204)],
        ),
        (
            "304 with a body",
            [response(304, &[two]), data(b"ok")].concat(),
            vec![Whole(304)],
        ),
        ("999", [response(999, &[two]), data(b"ok")].concat(), vec![Whole(999)]),
        ("no head", data(b"ok"), vec![Refused]),
        ("nothing", Vec::new(), vec![Refused]),
        ("an interim only", response(103, &[]), vec![Refused]),
        (
            "two heads",
            [response(200, &[]), response(200, &[])].concat(),
            vec![Refused, Broken],
        ),
        ("half a record", data(b"ok")[..6].to_vec(), vec![Refused]),
        (
            "half a body",
            [response(200, &[two]), data(b"ok")[..6].to_vec()].concat(),
            vec![Refused, Broken],
        ),
        ("a length beyond", vec![2, 0xff, 0xff, 0xff, 0xff], vec![Refused]),
        (
            "data after trailers",
            [response(200, &[]), trailers(&[(b"x", b"1")]), data(b"ok")].concat(),
            vec![Refused, Broken, Whole(200)],
        ),
        (
            "bad trailers",
            [response(200, &[]), data(b"ok"), trailers(&[(b"x", b"a\r\nb")])].concat(),
            vec![Refused, Broken],
        ),
    ]
}

#[tokio::test]
async fn a3_answers_of_agents_that_are_not_valid() {
    let relay = TestRelay::start().await;
    let token = relay.client("home", NewAuth::Public).await;
    let mut agent = RawTunnel::open(relay.agents, "home", &token, InstanceId::new()).await;
    for (what, stream, allowed) in hand_made() {
        let (answer, ()) = tokio::join!(ask(&relay, "home", "POST /"), async {
            let id = agent.opened().await;
            agent.answer(id, stream).await;
        });
        let verdict = verdict(&answer);
        assert!(allowed.contains(&verdict), "{what}: {verdict:?} of {answer:?}");
        let text = String::from_utf8_lossy(&answer.bytes).to_ascii_lowercase();
        assert!(
            !text.contains("evil") && !text.contains("h2c") && !text.contains("no-tunnel"),
            "{what}: {answer:?}"
        );
        let (next, ()) = tokio::join!(ask(&relay, "home", "POST /"), async {
            let id = agent.opened().await;
            agent.answer(id, [response(200, &[]), data(b"ok")].concat()).await;
        });
        assert_eq!(next.status(), 200, "after {what}");
    }
}
