//! A local HTTP endpoint for the upstream: `POST /publish` there reaches the client's subscribers on all nodes. Messages go
//! to the relay one at a time, in the order in which they were here whole, with the agent's token.
//!
//! Programs on this machine are trusted, pages in its browsers are not: a request from a page, or by another host name
//! (DNS rebinding), is refused.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header, uri::Authority};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{body::Incoming, service::service_fn};
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};

use super::{AgentError, Config};

/// The longest message, bytes: what the relay takes.
const MAX_MESSAGE: usize = 1024 * 1024;
/// Messages that wait for the relay, each up to [`MAX_MESSAGE`]; more are answered with 503.
const QUEUE: usize = 32;
/// Connections at a time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// A local program sends its message without dawdling.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// The relay answers within this, or is away.
const RELAY_TIMEOUT: Duration = Duration::from_secs(30);
/// How much of the relay's answer is passed on, bytes.
const MAX_ANSWER: usize = 16 * 1024;
/// After the system would not give another connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

type Answer = Response<Full<Bytes>>;

/// A message on its way, and who waits for the answer.
struct Message {
    body: Bytes,
    answer: oneshot::Sender<Answer>,
}

/// Carries messages to the relay.
pub(super) struct Publisher {
    relay: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    uri: Uri,
    bearer: HeaderValue,
}

impl Publisher {
    pub fn new(config: &Config, tls: rustls::ClientConfig) -> Result<Self, AgentError> {
        let invalid = |what: &str| AgentError::Invalid(format!("{what} cannot be written in a request"));
        let uri = format!("{}/adit/publish?clientId={}", config.relay, config.client_id);
        let uri = uri.parse().map_err(|_| invalid("the relay's address"))?;
        let bearer = HeaderValue::try_from(format!("Bearer {}", config.token.expose()));
        let mut bearer = bearer.map_err(|_| invalid("the token"))?;
        bearer.set_sensitive(true);
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(BODY_TIMEOUT));
        let https = hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls);
        let connector = https.https_or_http().enable_http1().wrap_connector(tcp);
        let relay = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .build(connector);
        Ok(Self { relay, uri, bearer })
    }

    /// Serves the endpoint until dropped.
    pub async fn serve(self, listener: TcpListener) {
        let (messages_tx, mut messages) = mpsc::channel::<Message>(QUEUE);
        let accepting = accept(listener, messages_tx);
        let carrying = async {
            while let Some(Message { body, answer }) = messages.recv().await {
                answer.send(self.carry(body).await).ok();
            }
        };
        tokio::join!(accepting, carrying);
    }

    /// One message to the relay, and its answer.
    async fn carry(&self, body: Bytes) -> Answer {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        request.headers_mut().insert(header::AUTHORIZATION, self.bearer.clone());
        let asked = tokio::time::timeout(RELAY_TIMEOUT, async {
            let (head, body) = self.relay.request(request).await.ok()?.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await.ok()?;
            Some((head, body.to_bytes()))
        });
        let Ok(Some((head, body))) = asked.await else {
            return refusal(
                StatusCode::BAD_GATEWAY,
                "the relay cannot be reached, or did not answer: the message may or may not have reached subscribers\n",
            );
        };
        let mut answer = Response::new(Full::new(body));
        *answer.status_mut() = head.status;
        for name in [header::CONTENT_TYPE, header::RETRY_AFTER] {
            if let Some(value) = head.headers.get(&name) {
                answer.headers_mut().insert(name, value.clone());
            }
        }
        answer
    }
}

async fn accept(listener: TcpListener, messages_tx: mpsc::Sender<Message>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let messages_tx = messages_tx.clone();
                connections.spawn(async move {
                    serve_connection(stream, messages_tx).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection to publish on was not accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, messages_tx: mpsc::Sender<Message>) {
    stream.set_nodelay(true).ok();
    let service = service_fn(move |request| {
        let messages_tx = messages_tx.clone();
        async move { Ok::<_, Infallible>(answer(request, messages_tx).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(RELAY_TIMEOUT);
    builder.serve_connection(TokioIo::new(stream), service).await.ok();
}

async fn answer(request: Request<Incoming>, messages_tx: mpsc::Sender<Message>) -> Answer {
    if let Err((status, why)) = check(&request) {
        return refusal(status, why);
    }
    // A place first: what waits in memory is bounded.
    let Ok(place) = messages_tx.try_reserve_owned() else {
        let mut full = refusal(
            StatusCode::SERVICE_UNAVAILABLE,
            "as many messages wait for the relay as may: try again\n",
        );
        full.headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        return full;
    };
    let body = match read(request.into_body()).await {
        Ok(body) => body,
        Err((status, why)) => return refusal(status, why),
    };
    let (answer, answered) = oneshot::channel();
    place.send(Message { body, answer });
    let ending = |_| refusal(StatusCode::SERVICE_UNAVAILABLE, "the agent is ending\n");
    answered.await.unwrap_or_else(ending)
}

async fn read(body: Incoming) -> Result<Bytes, (StatusCode, &'static str)> {
    let whole = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_MESSAGE).collect());
    match whole.await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err((StatusCode::PAYLOAD_TOO_LARGE, "a message is 1 MiB at most\n"))
        }
        Ok(Err(_)) => Err((StatusCode::BAD_REQUEST, "the message broke off: send it again\n")),
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, "the message did not arrive in time\n")),
    }
}

/// Whether a program on this machine means this endpoint; else what it is told.
fn check<B>(request: &Request<B>) -> Result<(), (StatusCode, &'static str)> {
    if !is_ours(request.headers()) {
        return Err((
            StatusCode::FORBIDDEN,
            "ask for this by a loopback address or `localhost`, from a program and not from a web page\n",
        ));
    }
    match (request.uri().path(), request.method()) {
        ("/publish", &Method::POST) => Ok(()),
        ("/publish", _) => Err((StatusCode::METHOD_NOT_ALLOWED, "POST a message to /publish\n")),
        _ => Err((StatusCode::NOT_FOUND, "POST a message to /publish\n")),
    }
}

/// A page that was served under another name, or by another server, says so in one of these.
fn is_ours(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    let authority = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
    let is_local = authority.is_some_and(|authority| {
        let name = authority.host().trim_start_matches('[').trim_end_matches(']');
        let address = name.parse::<IpAddr>();
        name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
    });
    is_local && !headers.contains_key(header::ORIGIN)
}

fn refusal(status: StatusCode, why: &'static str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from_static(why.as_bytes())));
    *answer.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, plain);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: Method, path: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(()).expect("a request");
        check(&request).map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    #[test]
    fn programs_here_are_let_in_and_pages_are_not() {
        for host in ["127.0.0.1:4090", "127.9.9.9", "localhost", "LOCALHOST:1", "[::1]:4090"] {
            assert_eq!(status(Method::POST, "/publish", &[("host", host)]), 200, "{host}");
        }
        for host in [
            "evil.example",
            "192.168.1.1:4090",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            "[::2]",
        ] {
            assert_eq!(status(Method::POST, "/publish", &[("host", host)]), 403, "{host}");
        }
        let local = ("host", "localhost");
        assert_eq!(status(Method::POST, "/publish", &[]), 403);
        assert_eq!(status(Method::POST, "/publish", &[local, local]), 403);
        assert_eq!(status(Method::POST, "/publish", &[local, ("origin", "null")]), 403);
        assert_eq!(status(Method::GET, "/publish", &[local]), 405);
        assert_eq!(status(Method::POST, "/", &[local]), 404);
    }
}
