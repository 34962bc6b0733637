//! The real binary, as its users run it: a relay, clients, tokens, an agent; what it says when something is wrong; how it
//! ends; and that no secret gets into its logs, its metrics or its database.

#[path = "harness/raw.rs"]
mod raw;

use std::{
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use base64::Engine;
use raw::{RawUpstream, send_raw};

const PATIENCE: Duration = Duration::from_secs(60);

fn adit(place: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
    command.args(arguments).env_clear().current_dir(place);
    command
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|bound| bound.local_addr())
        .expect("a port")
        .port()
}

/// A running process, ended when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: String,
}

impl Running {
    fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        let (lines_tx, lines) = channel();
        let streams: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(child.stdout.take().expect("piped")),
            Box::new(child.stderr.take().expect("piped")),
        ];
        for stream in streams {
            let lines_tx = lines_tx.clone();
            std::thread::spawn(move || {
                BufReader::new(stream)
                    .lines()
                    .map_while(Result::ok)
                    .for_each(|line| drop(lines_tx.send(line)));
            });
        }
        Self {
            child,
            lines,
            seen: String::new(),
        }
    }

    /// Waits for a line with this in it.
    fn says(&mut self, text: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("no {text:?} in\n{}", self.seen));
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(text) {
                return line;
            }
        }
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status();
        assert!(sent.expect("kill runs").success());
    }

    /// Waits for its end; all that it printed, and its exit code.
    fn ended(&mut self) -> (String, Option<i32>) {
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.seen.push_str(&line);
            self.seen.push('\n');
        }
        (self.seen.clone(), self.child.wait().expect("it ended").code())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A relay in a directory of its own.
struct Relay {
    place: tempfile::TempDir,
    public: SocketAddr,
    admin: SocketAddr,
    token: String,
    process: Running,
}

impl Relay {
    fn start() -> Self {
        let place = tempfile::tempdir().expect("a directory");
        let (public, admin) = (free_port(), free_port());
        let [public, admin] = [public, admin].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let mut command = adit(
            place.path(),
            &[
                "serve",
                "--listen",
                &public.to_string(),
                "--admin-listen",
                &admin.to_string(),
            ],
        );
        command.env("ADIT_LOG", "info,adit=trace");
        let mut process = Running::start(command);
        let line = process.says("export ADIT_ADMIN_TOKEN=");
        let token = line.split('=').nth(1).expect("the token").trim().to_owned();
        Self {
            place,
            public,
            admin,
            token,
            process,
        }
    }

    /// An administrative command.
    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = adit(self.place.path(), arguments);
        let url = format!("http://{}", self.admin);
        command
            .env("ADIT_RELAY", url)
            .env("ADIT_ADMIN_TOKEN", &self.token)
            .output()
            .expect("it runs")
    }

    fn result(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn agent(&self, client: &str, token: &str, to: SocketAddr) -> Running {
        let relay = format!("http://{}", self.public);
        let to = to.to_string();
        let mut command = adit(self.place.path(), &["http", &to, "--relay", &relay, "--client", client]);
        command.env("ADIT_TOKEN", token).env("ADIT_LOG", "info,adit=trace");
        Running::start(command)
    }

    async fn get(&self, client: &str, headers: &str) -> raw::RawAnswer {
        let request =
            format!("GET /hello HTTP/1.1\r\nhost: a\r\nadit-client: {client}\r\nconnection: close\r\n{headers}\r\n");
        send_raw(self.public, request).await
    }
}

fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn from_nothing_to_an_answer_and_to_a_revocation() {
    let relay = Relay::start();
    let token = relay.result(&["client", "create", "home"]);
    assert!(
        token.starts_with("adit_") && !token.contains(char::is_whitespace),
        "{token}"
    );
    let upstream = RawUpstream::ok().await;
    let mut agent = relay.agent("home", &token, upstream.address);
    agent.says("clientId=home");
    let bearer = format!("authorization: Bearer {token}\r\n");
    assert_eq!(relay.get("home", "").await.status(), 401);
    assert_eq!(relay.get("home", &bearer).await.body(), b"ok");
    agent.says("GET /hello  200  2 B");

    let second = relay.result(&["token", "create", "home", "--label", "nas"]);
    let tokens = relay.result(&["token", "list", "home"]);
    assert!(tokens.contains("nas") && !tokens.contains("adit_"), "{tokens}");
    let first = tokens
        .lines()
        .skip(1)
        .find(|line| !line.ends_with("nas"))
        .expect("the first");
    relay.result(&["token", "revoke", "home", first.split(' ').next().expect("an id")]);
    agent.says("does not accept the token for client `home`");
    drop(agent);
    relay.result(&["client", "update", "home", "--auth", "public"]);
    let mut agent = relay.agent("home", &second, upstream.address);
    agent.says("clientId=home");
    assert_eq!(relay.get("home", "").await.body(), b"ok");
    assert!(relay.result(&["client", "list"]).contains("public"));
    let status = relay.result(&["status"]);
    assert!(
        status.starts_with("1 node, 2 tunnels") && status.contains(&relay.admin.to_string()),
        "{status}"
    );
    let status = relay.result(&["status", "--json"]);
    assert!(status.starts_with('{') && status.contains("\"this\":true"), "{status}");
    let mut watch = adit(relay.place.path(), &["status", "--watch"]);
    watch
        .env("ADIT_RELAY", format!("http://{}", relay.admin))
        .env("ADIT_ADMIN_TOKEN", &relay.token);
    let mut watch = Running::start(watch);
    watch.says("1 node, 2 tunnels");
    watch.says("requests/s");
    drop(watch);
    relay.result(&["client", "delete", "home"]);
    assert_eq!(relay.get("home", "").await.status(), 404);
}

#[tokio::test]
async fn what_is_wrong_is_said_plainly() {
    let mut relay = Relay::start();
    let public = format!("http://{}", relay.public);
    let wrong_door = complaint(&relay.run(&["client", "create", "home", "--relay", &public]));
    assert!(wrong_door.contains("--admin-listen"), "{wrong_door}");
    let wrong_token = complaint(&relay.run(&["client", "list", "--admin-token", "wrong"]));
    assert!(
        wrong_token.contains("does not accept this admin token"),
        "{wrong_token}"
    );
    let token = relay.result(&["client", "create", "home", "--auth", "public"]);
    let nobody = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let mut agent = relay.agent("home", &token, nobody);
    agent.says("clientId=home");
    let answer = relay.get("home", "").await;
    assert!(
        answer.status() == 502 && answer.head().contains("adit-error: upstream-unreachable"),
        "{answer:?}"
    );
    agent.says("GET /hello  ---");
    relay
        .agent("home", "wrong", nobody)
        .says("does not accept the token for client `home`");
    relay.process.signal("KILL");
    relay.process.ended();
    agent.says("cannot reach the relay at");
    assert!(complaint(&relay.run(&["client", "list"])).contains("nothing listens at"));
    let bad = adit(relay.place.path(), &["serve", "--listen", "8080"])
        .output()
        .expect("it runs");
    assert_eq!(bad.status.code(), Some(2), "{bad:?}");
}

#[tokio::test]
async fn a_signal_drains_and_a_second_ends_at_once() {
    let mut relay = Relay::start();
    relay.process.signal("TERM");
    let (printed, code) = relay.process.ended();
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains("draining"), "{printed}");
    assert_eq!(printed.matches("export ADIT_ADMIN_TOKEN=").count(), 1);

    let mut relay = Relay::start();
    let token = relay.result(&["client", "create", "home", "--auth", "public"]);
    let upstream = RawUpstream::start(|_| Vec::new()).await;
    let mut agent = relay.agent("home", &token, upstream.address);
    agent.says("clientId=home");
    let request = format!("GET {} HTTP/1.1\r\nhost: a\r\nadit-client: home\r\n\r\n", raw::ENDLESS);
    let public = relay.public;
    let endless = tokio::spawn(async move {
        let mut socket = tokio::net::TcpStream::connect(public).await.expect("it listens");
        tokio::io::AsyncWriteExt::write_all(&mut socket, request.as_bytes())
            .await
            .expect("sent");
        let mut sink = tokio::io::sink();
        tokio::io::copy(&mut socket, &mut sink).await.ok();
    });
    while upstream.heads() == 0 {
        tokio::task::yield_now().await;
    }
    let printed = tokio::task::spawn_blocking(move || {
        relay.process.signal("TERM");
        relay.process.says("draining");
        relay.process.signal("TERM");
        relay.process.ended().0
    });
    let printed = printed.await.expect("no panic");
    assert!(printed.contains("told twice to stop"), "{printed}");
    endless.await.expect("no panic");
}

#[tokio::test]
async fn the_demos_own_curl_line_answers() {
    let place = tempfile::tempdir().expect("a directory");
    let listen = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let mut demo = Running::start(adit(place.path(), &["demo", "--listen", &listen.to_string()]));
    demo.says("curl http://demo.localhost");
    demo.says("->");
    let request = format!(
        "GET / HTTP/1.1\r\nhost: demo.localhost:{}\r\nconnection: close\r\n\r\n",
        listen.port()
    );
    let answer = send_raw(listen, request).await;
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert!(
        String::from_utf8_lossy(answer.body()).contains("Hello from behind the tunnel"),
        "{answer:?}"
    );
    demo.signal("TERM");
    assert_eq!(demo.ended().1, Some(0));
}

/// A8: a secret in header, query, cookie and body, through the paths that work and those that fail.
#[tokio::test]
async fn a_canary_is_nowhere_but_at_the_upstream() {
    const CANARY: &str = "c4n4ry7f3a9";
    let mut relay = Relay::start();
    let token = relay.result(&["client", "create", "home", "--auth", "public"]);
    let closed = relay.result(&["client", "create", "closed"]);
    let upstream = RawUpstream::start(|call| match call.path().starts_with("/bad") {
        true => format!("HTTP/1.1 200 OK\r\nx: {CANARY}\0\r\n\r\n{CANARY}").into_bytes(),
        false => raw::OK.to_vec(),
    })
    .await;
    let mut agent = relay.agent("home", &token, upstream.address);
    agent.says("clientId=home");
    let mut answers = Vec::new();
    for (client, path) in [
        ("home", "/x"),
        ("home", "/bad"),
        ("closed", "/x"),
        ("nobody", "/x"),
        ("B%D", "/x"),
        ("home", "/%00"),
    ] {
        for extra in [
            "",
            "content-length: x\r\n",
            "host: b\r\n",
            "connection: upgrade\r\nupgrade: websocket\r\n",
        ] {
            let request = format!(
                "POST {path}?key={CANARY}&signature={CANARY} HTTP/1.1\r\nhost: a\r\nadit-client: {client}\r\n\
                 authorization: Bearer {CANARY}\r\ncookie: s={CANARY}\r\nx-secret: {CANARY}\r\nconnection: close\r\n\
                 {extra}content-length: {}\r\n\r\n{CANARY}",
                CANARY.len()
            );
            answers.push(send_raw(relay.public, request).await);
        }
    }
    assert_eq!(answers[0].body(), b"ok");
    assert!(
        String::from_utf8_lossy(&upstream.take()[0].0).contains(CANARY),
        "it went through"
    );
    let knock = format!(
        "GET /ws?clientId=home&x={CANARY} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {CANARY}\r\n\
        connection: upgrade, close\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
        sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: adit.v1\r\n\r\n"
    );
    answers.push(send_raw(relay.public, knock).await);
    let admin = |path: &str| {
        format!(
            "GET {path}?x={CANARY} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {CANARY}\r\nconnection: close\r\n\r\n"
        )
    };
    answers.push(send_raw(relay.admin, admin("/api/v1/clients")).await);
    answers.push(send_raw(relay.admin, admin("/metrics")).await);
    agent.signal("TERM");
    relay.process.signal("TERM");
    let logs = [agent.ended().0, relay.process.ended().0];
    assert!(logs[1].contains("adit::access"), "the log is there:\n{}", logs[1]);
    for (what, text) in logs.iter().map(|log| ("a log", log.clone())).chain(
        answers
            .iter()
            .map(|answer| ("an answer", String::from_utf8_lossy(&answer.bytes).into_owned())),
    ) {
        for secret in [CANARY, &token, &closed] {
            assert!(!text.contains(secret), "{what} has it:\n{text}");
        }
    }
    for file in std::fs::read_dir(relay.place.path()).expect("the directory").flatten() {
        let bytes = std::fs::read(file.path()).expect("a file");
        for secret in [CANARY, &token, &closed, &relay.token] {
            assert!(
                !bytes.windows(secret.len()).any(|at| at == secret.as_bytes()),
                "{:?} has it",
                file.path()
            );
        }
    }
}

#[test]
fn the_database_is_brought_to_this_version_before_a_roll_out() {
    let place = tempfile::tempdir().expect("a directory");
    for _ in 0..2 {
        let migrated = adit(place.path(), &["migrate", "--database-url", "sqlite:new.db"])
            .output()
            .expect("the binary runs");
        let said = String::from_utf8_lossy(&migrated.stdout);
        assert!(migrated.status.success(), "{migrated:?}");
        assert_eq!(said, "the database is at version 2, as this adit needs it\n");
    }
    assert!(place.path().join("new.db").is_file());
}

#[test]
fn a_database_that_cannot_be_migrated_is_said_without_its_password() {
    let place = tempfile::tempdir().expect("a directory");
    for (url, why) in [
        ("mysql://adit:hunter2@127.0.0.1:9/adit", "refused"),
        ("mysql://adit:hunter2@127.0.0.1:9/", "names no database"),
        ("postgres://adit:hunter2@127.0.0.1/adit", "`database_url`"),
    ] {
        let mut migrate = adit(place.path(), &["migrate"]);
        let migrated = migrate.env("DATABASE_URL", url).output().expect("the binary runs");
        let said = format!("{migrated:?}");
        assert!(!migrated.status.success(), "{said}");
        assert!(said.contains(why) && !said.contains("hunter2"), "{said}");
    }
}

/// As files have it (RFC 7468).
fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

#[tokio::test]
async fn an_agent_dials_a_relay_that_speaks_tls_itself_and_reaches_the_sample() {
    let place = tempfile::tempdir().expect("a directory");
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("a certificate");
    let path = |name: &str| place.path().join(name).display().to_string();
    std::fs::write(path("cert.pem"), pem("CERTIFICATE", certified.cert.der())).expect("written");
    std::fs::write(
        path("key.pem"),
        pem("PRIVATE KEY", &certified.signing_key.serialize_der()),
    )
    .expect("written");
    let (port, admin) = (free_port(), free_port());
    let (listen, admin) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{admin}"));
    let mut serve = adit(place.path(), &["serve", "--listen", &listen, "--admin-listen", &admin]);
    serve
        .env("ADIT_TLS_CERT", path("cert.pem"))
        .env("ADIT_TLS_KEY", path("key.pem"));
    serve.env("ADIT_ADMIN_TOKEN", "right");
    let mut relay = Running::start(serve);
    relay.says("the relay is up");
    let well = adit(
        place.path(),
        &[
            "healthcheck",
            "--ready",
            "--admin-listen",
            &admin.replace("127.0.0.1", "localhost"),
        ],
    )
    .output()
    .expect("it runs");
    assert!(well.status.success(), "{well:?}");

    let mut sample = Running::start(adit(place.path(), &["sample", "--listen", "127.0.0.1:0"]));
    let line = sample.says("A sample server listens on http://");
    let to = line
        .split("http://")
        .nth(1)
        .and_then(|rest| rest.split(". ").next())
        .expect("an address")
        .to_owned();
    let admin_url = format!("http://{admin}");
    let created = adit(
        place.path(),
        &["client", "create", "home", "--auth", "public", "--relay", &admin_url],
    )
    .env("ADIT_ADMIN_TOKEN", "right")
    .output()
    .expect("it runs");
    let token = String::from_utf8_lossy(&created.stdout).trim().to_owned();
    let url = format!("https://localhost:{port}");
    let mut agent = adit(place.path(), &["http", &to, "--relay", &url, "--client", "home"]);
    // The roots that this process trusts, as OpenSSL's programs take them.
    agent.env("ADIT_TOKEN", token).env("SSL_CERT_FILE", path("cert.pem"));
    let mut agent = Running::start(agent);
    agent.says(&format!("https://127.0.0.1:{port}/?clientId=home"));
    sample.signal("TERM");
    assert_eq!(sample.ended().1, Some(0));
    relay.signal("TERM");
    assert_eq!(relay.ended().1, Some(0));
}

#[test]
fn a_database_that_is_not_there_is_waited_for_and_that_is_said() {
    let place = tempfile::tempdir().expect("a directory");
    let nobody = format!("mysql://adit:hunter2@127.0.0.1:{}/adit", free_port());
    for command in ["migrate", "serve"] {
        let mut run = adit(place.path(), &[command]);
        run.env("DATABASE_URL", &nobody).env("ADIT_DATABASE_WAIT", "1s");
        run.env("ADIT_LISTEN", "127.0.0.1:0")
            .env("ADIT_ADMIN_LISTEN", "127.0.0.1:0");
        let complaint = complaint(&run.output().expect("it runs"));
        assert!(
            complaint.contains("waiting up to 1 s") && complaint.contains("refused"),
            "{complaint}"
        );
        assert!(!complaint.contains("hunter2"), "{complaint}");
    }
}
