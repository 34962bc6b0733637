//! One trace through downstream, ingress, owner, agent and upstream; to a collector, as the `OTEL_` variables say.

#[path = "harness/collector.rs"]
mod collector;
mod harness;

use std::process::Stdio;

use adit::telemetry::{self, LogFormat, Traces};
use collector::{Collector, Span};
use harness::{AnyBody, Nodes, full, home::Home, send, until, within};
use http::{HeaderMap, Request};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const DOWNSTREAM: &str = "00f067aa0ba902b7";

fn request(path: &str, headers: &[(&str, &str)]) -> Request<AnyBody> {
    let request = Request::get(path).header("host", "relay").header("adit-client", "home");
    let add = |request: http::request::Builder, (name, value): &(&str, &str)| request.header(*name, *value);
    let request = headers.iter().fold(request, add);
    request.body(full("")).expect("a request")
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers[name].to_str().expect("text")
}

/// Its trace and its parent, as the upstream is told them.
fn traceparent(headers: &HeaderMap) -> (&str, &str, &str) {
    let text = text(headers, "traceparent");
    (&text[3..35], &text[36..52], &text[53..])
}

/// The spans of an answered request: at the ingress, at the owner if that is another, at the agent.
struct Spans {
    ingress: Span,
    owner: Option<Span>,
    agent: Span,
}

async fn spans(collector: &Collector, request_id: &str) -> Spans {
    let nodes = Nodes::of_this_run();
    let count = if nodes == Nodes::One { 2 } else { 3 };
    let mut spans = collector.spans_of(request_id, count).await;
    assert_eq!(spans.len(), count, "{spans:?}");
    let mut of_kind = |kind| {
        let at = spans.iter().position(|span| span.kind == kind);
        at.map(|at| spans.remove(at))
    };
    Spans {
        ingress: of_kind(2).expect("a server's span"),
        owner: of_kind(1),
        agent: of_kind(3).expect("a client's span"),
    }
}

/// A process has one place for its spans, and that has one runtime: so this is one story.
#[tokio::test]
async fn a_request_is_one_trace_from_its_downstream_to_its_upstream() {
    let collector = Collector::start().await;
    let traces = Traces::to(&format!("{}/v1/traces", collector.endpoint()), "adit-test").expect("an exporter");
    telemetry::init(LogFormat::Json, "off", Some(&traces)).expect("the first");
    let home = Home::start().await;

    goes_on(&collector, &traces, &home).await;
    begins(&collector, &traces, &home).await;
    fails(&collector, &traces, &home).await;
    is_not_sampled(&collector, &traces, &home).await;
    home.relay.stop().await;
    traces.flush().await;
    until("the spans of both tunnels come", || collector.tunnels() == 2).await;
}

async fn goes_on(collector: &Collector, traces: &Traces, home: &Home) {
    let parent = format!("00-{TRACE}-{DOWNSTREAM}-01");
    let sent = [("traceparent", parent.as_str()), ("tracestate", "a=1")];
    let answer = home.send(request("/track?token=secret", &sent));
    let call = home.calls.next().await;
    let told = call.head.headers.clone();
    call.ok("hello");
    let answer = within("an answer", answer).await.expect("no panic");
    let request_id = text(answer.headers(), "adit-request-id").to_owned();
    assert_eq!(harness::home::whole(answer).await.1, "hello");
    traces.flush().await;

    let Spans { ingress, owner, agent } = spans(collector, &request_id).await;
    assert_eq!(
        (ingress.trace_id.as_str(), ingress.parent.as_str()),
        (TRACE, DOWNSTREAM)
    );
    assert_eq!((&agent.trace_id, &agent.parent), (&ingress.trace_id, &ingress.span_id));
    assert_eq!(traceparent(&told), (TRACE, agent.span_id.as_str(), "01"));
    assert_eq!(text(&told, "tracestate"), "a=1");
    assert_eq!(owner.is_some(), Nodes::of_this_run() != Nodes::One);
    if let Some(owner) = owner {
        assert_eq!((&owner.trace_id, &owner.parent), (&ingress.trace_id, &ingress.span_id));
        assert_eq!(owner.is("tunnel.id"), ingress.is("tunnel.id"));
        assert_ne!(owner.is("adit.node.id"), ingress.is("adit.node.id"));
    }
    let place = if Nodes::of_this_run() == Nodes::One {
        "local"
    } else {
        "peer"
    };
    for (attribute, value) in [
        ("http.request.method", "GET"),
        ("url.path", "/track"),
        ("server.address", "relay"),
        ("http.response.status_code", "200"),
        ("client.id", "home"),
        ("adit.tunnel.place", place),
        ("adit.tunnel.dialect", "adit"),
        ("adit.response.bytes", "5"),
    ] {
        assert_eq!(ingress.is(attribute), value, "{attribute} of {ingress:?}");
    }
    for (attribute, value) in [
        ("url.path", "/track"),
        ("server.address", "127.0.0.1"),
        ("http.response.status_code", "200"),
    ] {
        assert_eq!(agent.is(attribute), value, "{attribute} of {agent:?}");
    }
    assert_eq!((ingress.name.as_str(), ingress.service.as_str()), ("GET", "adit-test"));
    assert!(!ingress.failed && !agent.failed);
    assert!(
        ![&ingress, &agent]
            .iter()
            .any(|span| format!("{span:?}").contains("secret"))
    );
}

async fn begins(collector: &Collector, traces: &Traces, home: &Home) {
    let answer = home.send(request("/", &[("traceparent", "no trace")]));
    let call = home.calls.next().await;
    let told = call.head.headers.clone();
    call.ok("");
    let answer = within("an answer", answer).await.expect("no panic");
    let request_id = text(answer.headers(), "adit-request-id").to_owned();
    drop(harness::home::whole(answer).await);
    traces.flush().await;
    let Spans { ingress, agent, .. } = spans(collector, &request_id).await;
    assert_eq!((ingress.parent.as_str(), &agent.parent), ("", &ingress.span_id));
    let expected = (ingress.trace_id.as_str(), agent.span_id.as_str(), "01");
    assert_eq!(traceparent(&told), expected);
}

/// The answer breaks off: both ends say so.
async fn fails(collector: &Collector, traces: &Traces, home: &Home) {
    let answer = home.send(request("/", &[]));
    let (body, ..) = home
        .calls
        .next()
        .await
        .begin(http::Response::builder().header("content-length", 9));
    assert!(body.write("half").await);
    let answer = within("an answer", answer).await.expect("no panic");
    let request_id = text(answer.headers(), "adit-request-id").to_owned();
    drop(body);
    let broken = http_body_util::BodyExt::collect(answer.into_body());
    assert!(within("its end", broken).await.is_err());
    traces.flush().await;
    let Spans { ingress, agent, .. } = spans(collector, &request_id).await;
    assert!(ingress.failed && agent.failed);
    assert_eq!(ingress.is("error.type"), "upstream_failed");
}

async fn is_not_sampled(collector: &Collector, traces: &Traces, home: &Home) {
    let before = collector.count();
    let parent = format!("00-{TRACE}-{DOWNSTREAM}-00");
    let answer = home.send(request("/", &[("traceparent", &parent)]));
    let call = home.calls.next().await;
    let told = call.head.headers.clone();
    call.ok("");
    drop(harness::home::whole(within("an answer", answer).await.expect("no panic")).await);
    traces.flush().await;
    let (trace, _, flags) = traceparent(&told);
    assert_eq!((trace, flags, collector.count()), (TRACE, "00", before));
}

async fn is_answered(relay: std::net::SocketAddr) -> bool {
    if tokio::net::TcpStream::connect(relay).await.is_err() {
        return false;
    }
    let ask = Request::get("/?key=secret")
        .header("host", "relay")
        .header("adit-client", "demo");
    let answer = send(relay, ask.body(full("")).expect("a request")).await;
    harness::home::whole(answer).await.0 == 200
}

#[tokio::test]
async fn how_long_it_took_is_said_to_whoever_asks() {
    let home = Home::start().await;
    for (asked, said) in [(Some("1"), true), (Some("0"), false), (None, false)] {
        let headers: Vec<_> = asked.iter().map(|asked| ("adit-server-timing", *asked)).collect();
        let answer = home.send(request("/", &headers));
        let call = home.calls.next().await;
        assert!(!call.head.headers.contains_key("adit-server-timing"));
        let response = http::Response::builder().header("server-timing", "db;dur=1");
        call.answer(response.body(full("")).expect("a response"));
        let answer = within("an answer", answer).await.expect("no panic");
        let timing: Vec<_> = answer.headers().get_all("server-timing").iter().collect();
        assert_eq!(timing[0], "db;dur=1");
        let ours = timing.get(1).map(|ours| ours.to_str().expect("text"));
        let is_ours = |text: &str| text.starts_with("total;dur=") && text.contains(", tunnel;dur=");
        assert_eq!(ours.is_some_and(is_ours), said, "{ours:?}");
    }
    home.relay.stop().await;
}

#[tokio::test]
async fn a_request_is_a_line_of_json() {
    let collector = Collector::start().await;
    let (_, log) = demo(&collector, &[("ADIT_LOG", "adit::access=info")]).await;
    let mut lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let line = lines.rfind(|line| line["status"] == 200).expect(&log);
    for (field, value) in [
        ("client.id", "demo"),
        ("method", "GET"),
        ("path", "/"),
        ("outcome", "ok"),
        ("tunnel.place", "local"),
        ("tunnel.dialect", "adit"),
        ("target", "adit::access"),
    ] {
        assert_eq!(line[field], value, "{field} of {line}");
    }
    for field in ["request.id", "tunnel.id", "node.id"] {
        assert!(
            line[field].as_str().is_some_and(|id| id.len() > 20),
            "{field} of {line}"
        );
    }
    assert!(
        line["bytes"].as_u64() > Some(0) && line["duration_ms"].is_u64(),
        "{line}"
    );
    assert!(!log.contains("secret"), "{log}");
}

/// The binary, with nothing but the variables.
async fn demo(collector: &Collector, variables: &[(&str, &str)]) -> (usize, String) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|bound| bound.local_addr());
    let listen = port.expect("a port");
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_adit"));
    command.args(["demo", "--listen", &listen.to_string()]).env_clear();
    command.envs(variables.iter().copied()).kill_on_drop(true);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let demo = command.spawn().expect("the binary runs");
    within("it answers", async {
        while !is_answered(listen).await {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    let pid = demo.id().expect("it runs").to_string();
    std::process::Command::new("kill")
        .args(["-TERM", &pid])
        .status()
        .expect("told");
    let ended = within("its end", demo.wait_with_output()).await.expect("ended");
    assert!(ended.status.success(), "{ended:?}");
    (collector.count(), String::from_utf8_lossy(&ended.stderr).into_owned())
}

#[tokio::test]
async fn the_variables_say_whereto_and_how() {
    let collector = Collector::start().await;
    let endpoint = collector.endpoint();
    let to = ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str());
    let (none, _) = demo(&collector, &[]).await;
    let (off, _) = demo(&collector, &[to, ("OTEL_SDK_DISABLED", "true")]).await;
    let (unsampled, _) = demo(&collector, &[to, ("OTEL_TRACES_SAMPLER", "always_off")]).await;
    assert_eq!((none, off, unsampled), (0, 0, 0));
    let (http, _) = demo(&collector, &[to, ("OTEL_SERVICE_NAME", "mine")]).await;
    let (both, _) = demo(&collector, &[to, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]).await;
    assert_eq!((http, both), (2, 4), "the last spans leave when the process ends");
    until("they are there", || {
        collector.services() == ["mine", "mine", "adit-demo", "adit-demo"]
    })
    .await;
}

#[tokio::test]
async fn a_collector_that_is_away_is_told_of_once_and_costs_nothing_else() {
    let collector = Collector::start().await;
    let nobody = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")];
    let (count, log) = demo(&collector, &nobody).await;
    assert_eq!((count, log.matches("does not take traces").count()), (0, 1), "{log}");
}
