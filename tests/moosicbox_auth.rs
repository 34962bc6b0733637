//! MoosicBox's servers and apps get their credentials under `/auth/…` of the relay's own host, in the words that they
//! know, and pages of other origins call their clients.

mod harness;

use adit::{
    cluster::{hash::TokenHash, registry::NewAuth, store::Store},
    config::RelayConfig,
};
use harness::{
    TestAgent, TestRelay, TestUpstream, full,
    home::{upstream, whole},
    id, within,
};
use http::{HeaderMap, Method, Request, header};

/// Real ids are UUIDv4.
const CLIENT: &str = "7785179f-9d6c-4f2a-8a51-0123456789ab";
const APP: &str = "https://app.example.org";

/// An answer, with its body as text.
struct Answer {
    status: u16,
    headers: HeaderMap,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name).map(|value| value.to_str().expect("text"));
        value.unwrap_or_default()
    }

    fn is_unauthorized(&self) -> bool {
        let plain = self.header("content-type").starts_with("text/plain");
        self.status == 401 && plain && self.body == "Unauthorized"
    }

    /// `{"token":"…"}` and nothing else.
    fn token(&self) -> String {
        assert_eq!(
            (self.status, self.header("content-type")),
            (200, "application/json"),
            "{}",
            self.body
        );
        let token = self
            .body
            .strip_prefix("{\"token\":\"")
            .and_then(|rest| rest.strip_suffix("\"}"));
        let token = token.unwrap_or_else(|| panic!("no token alone: {}", self.body));
        assert!(!token.is_empty() && !token.contains('"'), "{token}");
        token.to_owned()
    }
}

async fn ask(relay: &TestRelay, method: Method, target: &str, headers: &[(&str, &str)]) -> Answer {
    let mut request = Request::builder()
        .method(method)
        .uri(target)
        .header("host", "relay.test");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = relay.send(request.body(full("")).expect("a request")).await;
    let headers = response.headers().clone();
    let (status, body) = whole(response).await;
    Answer {
        status,
        headers,
        body: String::from_utf8(body.to_vec()).expect("text"),
    }
}

async fn post(relay: &TestRelay, target: &str, authorization: &str) -> Answer {
    ask(relay, Method::POST, target, &[("authorization", authorization)]).await
}

fn of(path: &str) -> String {
    format!("/auth/{path}?clientId={CLIENT}")
}

/// A relay and the two access tokens that a client was registered with.
async fn registered() -> (TestRelay, [String; 2]) {
    let relay = TestRelay::start().await;
    let (register, admin) = (of("register-client"), relay.admin_token.clone());
    let bare = post(&relay, &register, &admin).await.token();
    let bearer = post(&relay, &register, &format!("bEaReR {admin}")).await.token();
    (relay, [bare, bearer])
}

#[tokio::test]
async fn a_client_that_is_registered_twice_has_two_access_tokens() {
    let (relay, tokens) = registered().await;
    assert_ne!(tokens[0], tokens[1]);
    for token in &tokens {
        post(&relay, &of("signature-token"), token).await.token();
    }
    let kept = relay.registry.list_tokens(&id(CLIENT)).await.expect("a client");
    assert_eq!(kept.len(), 2);
    let client = relay.registry.describe_client(&id(CLIENT)).await.expect("a client");
    assert_eq!(client.auth, "token");
}

#[tokio::test]
async fn a_client_that_was_there_keeps_what_its_downstreams_show() {
    let relay = TestRelay::start().await;
    relay.client(CLIENT, NewAuth::Public).await;
    post(&relay, &of("register-client"), &relay.admin_token).await.token();
    let client = relay.registry.describe_client(&id(CLIENT)).await.expect("a client");
    assert_eq!(client.auth, "public");
}

#[tokio::test]
async fn head_checks_the_credential_and_makes_nothing() {
    let (relay, [token, _]) = registered().await;
    let admin = relay.admin_token.clone();
    for (path, authorization) in [("register-client", &admin), ("signature-token", &token)] {
        let target = of(path);
        let good = ask(&relay, Method::HEAD, &target, &[("authorization", authorization)]).await;
        assert_eq!((good.status, good.body.as_str()), (200, ""), "{path}");
        assert_eq!(good.header("content-type"), "application/json", "{path}");
        let bad = ask(&relay, Method::HEAD, &target, &[("authorization", "guess")]).await;
        assert_eq!((bad.status, bad.body.as_str()), (401, ""), "{path}");
    }
    let kept = relay.registry.list_tokens(&id(CLIENT)).await.expect("a client");
    assert_eq!(kept.len(), 2);
    let unknown = "/auth/register-client?clientId=nobody";
    let head = ask(&relay, Method::HEAD, unknown, &[("authorization", &admin)]).await;
    assert_eq!(head.status, 200);
    relay
        .registry
        .describe_client(&id("nobody"))
        .await
        .expect_err("not made");
}

#[tokio::test]
async fn who_shows_the_wrong_credential_is_told_so_in_the_words_that_are_known() {
    let (relay, [token, _]) = registered().await;
    let admin = relay.admin_token.clone();
    relay.client("other", NewAuth::Token).await;
    for (target, authorization) in [
        (of("register-client"), token.as_str()),
        (of("register-client"), "Bearer guess"),
        (of("register-client"), "Basic dTpw"),
        (of("signature-token"), "guess"),
        (of("signature-token"), &admin),
        ("/auth/signature-token?clientId=other".into(), &token),
        ("/auth/signature-token?clientId=nobody".into(), &token),
        (of("magic-token") + "&magicToken=m", "guess"),
        (of("validate-signature-token"), &token),
        (of("validate-signature-token") + "&signature=guess", &token),
    ] {
        let answer = post(&relay, &target, authorization).await;
        assert!(answer.is_unauthorized(), "{target}: {} {}", answer.status, answer.body);
        assert_eq!(answer.header("adit-error"), "unauthorized");
    }
    let nothing = ask(&relay, Method::POST, &of("register-client"), &[]).await;
    assert!(nothing.is_unauthorized());
    let get = ask(
        &relay,
        Method::GET,
        &of("register-client"),
        &[("authorization", &admin)],
    )
    .await;
    assert_eq!(get.status, 405);
    let bad = post(&relay, "/auth/register-client?clientId=No_Id", &admin).await;
    assert_eq!(bad.status, 400);
}

#[tokio::test]
async fn a_signature_is_made_with_an_access_token_and_checked_without_one() {
    let (relay, [token, _]) = registered().await;
    relay.client("other", NewAuth::Token).await;
    let bearer = format!("Bearer {token}");
    let mut signatures = Vec::new();
    for authorization in [&token, &bearer, &bearer] {
        signatures.push(post(&relay, &of("signature-token"), authorization).await.token());
    }
    for signature in &signatures {
        for name in ["signature", "Signature", "SIGNATURE"] {
            let target = of("validate-signature-token") + &format!("&{name}={signature}");
            let valid = ask(&relay, Method::POST, &target, &[]).await;
            assert_eq!((valid.status, valid.body.as_str()), (200, r#"{"valid":true}"#));
            assert_eq!(valid.header("content-type"), "application/json");
            assert_eq!(ask(&relay, Method::HEAD, &target, &[]).await.status, 200);
        }
    }
    let of_another = format!(
        "/auth/validate-signature-token?clientId=other&signature={}",
        signatures[0]
    );
    assert!(ask(&relay, Method::POST, &of_another, &[]).await.is_unauthorized());
}

#[tokio::test]
async fn a_signature_outlives_the_relay_and_not_its_fourteen_days() {
    let dir = tempfile::tempdir().expect("a directory");
    let url = format!("sqlite:{}", dir.path().join("adit.db").display());
    let config = RelayConfig {
        database_url: url.parse().expect("a url"),
        ..RelayConfig::default()
    };
    let relay = TestRelay::run(config.clone(), "127.0.0.1:0").await;
    let token = relay.client(CLIENT, NewAuth::Token).await;
    let signature = post(&relay, &of("signature-token"), &token).await.token();
    relay.stop().await;

    let relay = TestRelay::run(config, "127.0.0.1:0").await;
    let validate = |signature: &str| of("validate-signature-token") + "&signature=" + signature;
    let valid = ask(&relay, Method::POST, &validate(&signature), &[]).await;
    assert_eq!((valid.status, valid.body.as_str()), (200, r#"{"valid":true}"#));
    let store = Store::open(&url).await.expect("the same database");
    let (client, hash) = (id(CLIENT), TokenHash::of("expired"));
    let expired = store.insert_signature(&client, hash, 1, 2).await;
    assert!(expired.expect("written"));
    assert!(
        ask(&relay, Method::POST, &validate("expired"), &[])
            .await
            .is_unauthorized()
    );
}

#[tokio::test]
async fn a_magic_token_leads_to_the_client_that_made_it_again_and_again() {
    let (relay, [token, _]) = registered().await;
    let other = relay.client("other", NewAuth::Token).await;
    let upstream = TestUpstream::echo().await;
    let _agent = TestAgent::start(relay.agents, CLIENT, &token, upstream.address).await;
    let register = of("magic-token") + "&magicToken=m-1";
    for _ in 0..2 {
        let made = post(&relay, &register, &token).await;
        assert_eq!((made.status, made.body.as_str()), (200, r#"{"success":true}"#));
    }
    let taken = post(&relay, "/auth/magic-token?clientId=other&magicToken=m-1", &other).await;
    assert_eq!(taken.status, 409);

    let headers = [("authorization", "upstream's"), ("cookie", "a=1"), ("x-anything", "1")];
    for target in [
        "/auth/magic-token?magicToken=m-1",
        "/auth/magic-token?a=1&magicToken=m-1&signature=s",
        "/auth/magic-token?magicToken=m-1&clientId=other",
    ] {
        let found = ask(&relay, Method::GET, target, &headers).await;
        assert_eq!(found.status, 200, "{target}: {}", found.body);
        let (line, rest) = found.body.split_once('\n').expect("a line");
        assert_eq!(line, "GET /auth/magic-token?magicToken=m-1", "{target}");
        for (name, _) in headers {
            assert!(!rest.contains(&format!("{name}: ")), "{target}: {rest}");
        }
    }
    for unknown in ["/auth/magic-token?magicToken=m-2", "/auth/magic-token?magicToken=M-1"] {
        assert!(
            ask(&relay, Method::GET, unknown, &[]).await.is_unauthorized(),
            "{unknown}"
        );
    }
    assert_eq!(ask(&relay, Method::GET, "/auth/magic-token", &[]).await.status, 400);
    assert_eq!(
        ask(&relay, Method::PUT, "/auth/magic-token?magicToken=m-1", &[])
            .await
            .status,
        405
    );
}

#[tokio::test]
async fn a_client_is_reached_with_what_was_given_out() {
    let (relay, [token, _]) = registered().await;
    let upstream = TestUpstream::echo().await;
    let _agent = TestAgent::start(relay.agents, CLIENT, &token, upstream.address).await;
    let signature = post(&relay, &of("signature-token"), &token).await.token();
    for (names, header) in [
        (format!("clientId={CLIENT}&signature={signature}"), None),
        (format!("ClientID={CLIENT}&SIGNATURE={signature}"), None),
        (format!("clientId={CLIENT}"), Some(token.clone())),
        (format!("clientid={CLIENT}"), Some(format!("bearer {token}"))),
    ] {
        let headers: Vec<_> = header.iter().map(|value| ("authorization", value.as_str())).collect();
        let target = format!("/files/track?trackId=1&{names}");
        let answer = ask(&relay, Method::GET, &target, &headers).await;
        assert_eq!(answer.status, 200, "{names}: {}", answer.body);
        assert!(
            answer.body.starts_with("GET /files/track?trackId=1&"),
            "{names}: {}",
            answer.body
        );
        let leaked = answer.body.contains(&signature) || answer.body.contains(&token);
        assert!(!leaked, "{names}: {}", answer.body);
    }
    let wrong = format!("/files/track?clientId={CLIENT}&signature=guess");
    assert_eq!(ask(&relay, Method::GET, &wrong, &[]).await.status, 401);
}

#[tokio::test]
async fn on_a_clients_own_host_every_path_is_the_clients() {
    let relay = TestRelay::with(|config| config.domain = Some("relay.test".parse().expect("a domain"))).await;
    let token = relay.client("home", NewAuth::Public).await;
    let upstream = TestUpstream::echo().await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    for path in [
        "/health",
        "/auth/register-client?clientId=home",
        "/auth/magic-token?magicToken=m",
    ] {
        let request = Request::get(path).header("host", "home.relay.test");
        let response = relay.send(request.body(full("")).expect("a request")).await;
        let (status, body) = whole(response).await;
        let asked = format!("GET {path}\n");
        assert!(
            status == 200 && body.starts_with(asked.as_bytes()),
            "{path}: {status} {body:?}"
        );
    }
}

fn preflight(origin: &str) -> [(&str, &str); 3] {
    [
        ("origin", origin),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "authorization,hx-request"),
    ]
}

#[tokio::test]
async fn a_page_of_an_allowed_origin_may_call_a_client_and_read_its_answers() {
    let relay = TestRelay::with(|config| config.cors.origins = vec![APP.into(), "tauri://localhost".into()]).await;
    let token = relay.client("home", NewAuth::Token).await;
    let (upstream, calls) = upstream().await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;

    let allowed = ask(&relay, Method::OPTIONS, "/library?clientId=home", &preflight(APP)).await;
    assert_eq!((allowed.status, allowed.body.as_str()), (204, ""));
    for (name, value) in [
        ("access-control-allow-origin", APP),
        ("access-control-allow-credentials", "true"),
        ("access-control-max-age", "3600"),
        ("access-control-allow-methods", "GET, POST, OPTIONS, DELETE, PUT, PATCH"),
    ] {
        assert_eq!(allowed.header(name), value);
    }
    let headers = allowed.header("access-control-allow-headers");
    for name in [
        "authorization",
        "accept",
        "content-type",
        "moosicbox-profile",
        "hx-request",
        "hx-trigger",
    ] {
        assert!(
            headers.split(", ").any(|allowed| allowed == name),
            "{name} is not in {headers}"
        );
    }
    let vary: Vec<_> = allowed.headers.get_all(header::VARY).iter().collect();
    assert!(vary.contains(&&header::HeaderValue::from_static("origin")), "{vary:?}");
    assert_eq!(calls.waiting().await, 0, "a preflight is the relay's");

    let asked = [("origin", "tauri://localhost"), ("authorization", token.as_str())];
    let get = ask(&relay, Method::GET, "/library?clientId=home", &asked);
    let serve = async {
        let response = http::Response::builder().header("access-control-allow-origin", "*");
        let call = calls.next().await;
        assert_eq!(call.head.headers["origin"], "tauri://localhost");
        call.answer(response.body(full("mine")).expect("a response"));
    };
    let (answer, ()) = within("an answer", async { tokio::join!(get, serve) }).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "mine"));
    let origins: Vec<_> = answer.headers.get_all("access-control-allow-origin").iter().collect();
    assert_eq!(origins, ["tauri://localhost"]);
    assert!(answer.header("access-control-expose-headers").contains("hx-redirect"));
    // Why it was refused, it may read too.
    let refused = ask(&relay, Method::GET, "/library?clientId=home", &[("origin", APP)]).await;
    assert_eq!(
        (refused.status, refused.header("access-control-allow-origin")),
        (401, APP)
    );
}

#[tokio::test]
async fn a_page_of_another_origin_is_not_told_anything() {
    let by_default = TestRelay::start().await;
    let of_another = TestRelay::with(|config| config.cors.origins = vec!["https://another.example.org".into()]).await;
    for relay in [by_default, of_another] {
        relay.client("home", NewAuth::Token).await;
        let answer = ask(&relay, Method::OPTIONS, "/library?clientId=home", &preflight(APP)).await;
        assert_eq!(answer.status, 401);
        let said = answer
            .headers
            .keys()
            .any(|name| name.as_str().starts_with("access-control-"));
        assert!(!said, "{:?}", answer.headers);
    }
}

#[tokio::test]
async fn on_a_clients_own_host_the_upstream_says_who_may_read_it() {
    let relay = TestRelay::with(|config| {
        config.domain = Some("relay.test".parse().expect("a domain"));
        config.cors.origins = vec!["*".into()];
    })
    .await;
    let token = relay.client("home", NewAuth::Public).await;
    let upstream = TestUpstream::echo().await;
    let _agent = TestAgent::start(relay.agents, "home", &token, upstream.address).await;
    let request = Request::options("/x")
        .header("host", "home.relay.test")
        .header("origin", APP)
        .header("access-control-request-method", "PUT");
    let response = relay.send(request.body(full("")).expect("a request")).await;
    assert!(!response.headers().contains_key("access-control-allow-origin"));
    let (status, body) = whole(response).await;
    assert!(status == 200 && body.starts_with(b"OPTIONS /x\n"), "{status} {body:?}");
    let any = ask(&relay, Method::GET, "/health", &[("origin", "null")]).await;
    assert_eq!((any.status, any.header("access-control-allow-origin")), (200, "null"));
}
