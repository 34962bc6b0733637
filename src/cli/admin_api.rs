//! The relay's admin API as the subcommands use it: one call, and errors that say what to do.

use std::{error::Error as StdError, io, io::Write, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio::time::timeout;

use crate::{error::ADIT_ERROR, relay::admin::ADIT_API, secret::Secret, tls};

/// From the first packet to the last byte; the slowest call stretches a password, which takes 0.1 s.
const PATIENCE: Duration = Duration::from_secs(15);
/// A page of 1,000 clients is some 200 KiB.
const ANSWER_MAX: usize = 4 * 1024 * 1024;

/// Which relay, and by what right.
#[derive(clap::Args, Debug)]
pub struct AdminArgs {
    /// The relay's admin listener
    #[arg(
        long,
        global = true,
        env = "ADIT_RELAY",
        value_name = "URL",
        default_value = "http://127.0.0.1:9090"
    )]
    relay: String,
    /// The relay's admin token: the one it was given, or the one it printed at its first start
    #[arg(
        long,
        global = true,
        env = "ADIT_ADMIN_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true
    )]
    admin_token: Option<Secret>,
}

/// Why it was not done, for whoever typed the command.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Neither the argument nor the variable is there.
    #[error("this needs the relay's admin token: give --admin-token, or set ADIT_ADMIN_TOKEN")]
    NoToken,
    /// Not a text that can be sent.
    #[error("the admin token has characters that no token has: was it copied whole?")]
    BadToken,
    /// Not a URL of a relay.
    #[error("--relay {0} is not a URL such as http://127.0.0.1:9090")]
    BadUrl(String),
    /// No roots to trust.
    #[error("cannot read this machine's certificate authorities, which https:// needs: {0}")]
    Roots(#[source] io::Error),
    /// Nobody there.
    #[error("nothing listens at {0}: is the relay running there, and is this the address of its --admin-listen?")]
    Refused(String),
    /// Somewhere between here and there.
    #[error("cannot reach {0}: {1}")]
    Unreachable(String, String),
    /// No answer in time.
    #[error("{0} did not answer within 15 s")]
    Slow(String),
    /// The relay, but the wrong door.
    #[error(
        "{0}: this is the relay's public address; the admin API listens on --admin-listen, by default http://127.0.0.1:9090"
    )]
    PublicListener(String),
    /// Something else altogether.
    #[error(
        "{0} answered ({1}), but it is not a relay's admin API, which listens on --admin-listen, by default http://127.0.0.1:9090"
    )]
    NotTheApi(String, StatusCode),
    /// 401.
    #[error(
        "the relay does not accept this admin token: use the one that it was given as ADIT_ADMIN_TOKEN, or that it printed at its first start"
    )]
    Unauthorized,
    /// The relay says why.
    #[error("{0}")]
    Problem(String),
}

/// What a command says: `note` is for people and goes to stderr, `result` is what `$(…)` captures.
pub struct Said {
    pub note: String,
    pub result: String,
}

impl Said {
    /// Not `println!`: a reader that has left is not a reason to panic.
    pub fn print(self) {
        if !self.note.is_empty() {
            let _ = writeln!(io::stderr(), "{}", self.note);
        }
        if !self.result.is_empty() {
            let _ = writeln!(io::stdout(), "{}", self.result);
        }
    }
}

/// The admin API of one relay.
pub struct AdminApi {
    /// Without the slash at the end.
    relay: String,
    authorization: HeaderValue,
    http: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl AdminApi {
    pub fn new(args: AdminArgs) -> Result<Self, ApiError> {
        let token = args.admin_token.ok_or(ApiError::NoToken)?;
        let bearer = format!("Bearer {}", token.expose());
        let mut authorization = HeaderValue::try_from(bearer).map_err(|_| ApiError::BadToken)?;
        authorization.set_sensitive(true);
        let https = match args
            .relay
            .parse::<Uri>()
            .ok()
            .filter(|uri| uri.host().is_some())
            .as_ref()
            .map(Uri::scheme_str)
        {
            Some(Some("https")) => true,
            Some(Some("http")) => false,
            _ => return Err(ApiError::BadUrl(args.relay)),
        };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls::client_config(https).map_err(ApiError::Roots)?)
            .https_or_http()
            .enable_http1()
            .build();
        let http = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self {
            relay: args.relay.trim_end_matches('/').to_owned(),
            authorization,
            http,
        })
    }

    /// One call; `path` starts below `/api/v1`. An answer without a body is [`Value::Null`].
    pub async fn call(&self, method: Method, path: &str, body: Value) -> Result<Value, ApiError> {
        match timeout(PATIENCE, self.exchange(method, path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(ApiError::Slow(self.relay.clone())),
        }
    }

    async fn exchange(&self, method: Method, path: &str, body: Value) -> Result<Value, ApiError> {
        let body = if body.is_null() {
            Bytes::new()
        } else {
            Bytes::from(body.to_string())
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("{}/api/v1{path}", self.relay))
            .header(header::AUTHORIZATION, &self.authorization)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|_| ApiError::BadUrl(self.relay.clone()))?;
        let (head, body) = self
            .http
            .request(request)
            .await
            .map_err(|error| self.unreachable(&error))?
            .into_parts();
        if !head.headers.contains_key(ADIT_API) {
            return Err(match head.headers.contains_key(ADIT_ERROR) {
                true => ApiError::PublicListener(self.relay.clone()),
                false => ApiError::NotTheApi(self.relay.clone(), head.status),
            });
        }
        let body = Limited::new(body, ANSWER_MAX)
            .collect()
            .await
            .map_err(|error| self.unreachable(&*error))?
            .to_bytes();
        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        match head.status {
            status if status.is_success() => Ok(answer),
            StatusCode::UNAUTHORIZED => Err(ApiError::Unauthorized),
            status => Err(ApiError::Problem(
                answer["detail"]
                    .as_str()
                    .map_or_else(|| status.to_string(), str::to_owned),
            )),
        }
    }

    fn unreachable(&self, error: &(dyn StdError + 'static)) -> ApiError {
        let refused = |cause: &(dyn StdError + 'static)| {
            cause
                .downcast_ref::<io::Error>()
                .is_some_and(|cause| cause.kind() == io::ErrorKind::ConnectionRefused)
        };
        if anyhow::Chain::new(error).any(refused) {
            return ApiError::Refused(self.relay.clone());
        }
        // The innermost cause is the one that says what happened.
        let innermost = anyhow::Chain::new(error).last().unwrap_or(error);
        ApiError::Unreachable(self.relay.clone(), innermost.to_string())
    }
}

/// This machine's certificate authorities, but only where they are needed: a container may have none.
#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use axum::{Router, body::Body};
    use hyper::{server::conn::http1, service::service_fn};
    use hyper_util::rt::TokioIo;
    use tokio::{net::TcpListener, task::JoinSet};
    use tower_service::Service;

    use super::*;
    use crate::{
        cluster::{
            registry::{Node, Registry},
            store::Store,
        },
        error::Cause,
        relay::admin::{Admin, Quiet, Readiness, router},
    };

    /// A listener on port 0 that ends with the value.
    pub struct Listening {
        url: String,
        _serving: JoinSet<()>,
    }

    impl Listening {
        pub async fn serve(router: Router) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let url = format!("http://{}", listener.local_addr().expect("an address"));
            let mut serving = JoinSet::new();
            serving.spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    let router = router.clone();
                    let service = service_fn(move |request: Request<_>| router.clone().call(request.map(Body::new)));
                    connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
                }
            });
            Self { url, _serving: serving }
        }

        /// The admin listener of a relay whose admin token is `right`.
        pub async fn admin() -> Self {
            let store = Store::open("sqlite::memory:").await.expect("a store");
            let registry = Arc::new(Registry::new(store, Node::new("test")));
            registry.ensure_admin_token(Some("right")).await.expect("settled");
            let admin = Admin {
                registry,
                node: Box::new(Quiet),
                readiness: Box::new(|| Readiness::Ready),
                metrics: Box::new(String::new),
            };
            Self::serve(router(Arc::new(admin))).await
        }

        pub fn api(&self, token: &str) -> AdminApi {
            api(&self.url, token).expect("an API")
        }
    }

    fn api(relay: &str, token: &str) -> Result<AdminApi, ApiError> {
        AdminApi::new(AdminArgs {
            relay: relay.to_owned(),
            admin_token: Some(Secret::from(token.to_owned())),
        })
    }

    async fn list(api: &AdminApi) -> Result<Value, ApiError> {
        api.call(Method::GET, "/clients", Value::Null).await
    }

    #[tokio::test]
    async fn the_right_token_at_the_right_door_gets_an_answer_and_the_wrong_one_a_reason() {
        let relay = Listening::admin().await;
        assert!(list(&relay.api("right")).await.expect("an answer")["clients"].is_array());
        assert!(matches!(list(&relay.api("wrong")).await, Err(ApiError::Unauthorized)));
        let unknown = relay
            .api("right")
            .call(Method::DELETE, "/clients/nobody", Value::Null)
            .await;
        assert!(matches!(unknown, Err(ApiError::Problem(detail)) if detail.starts_with("no client of this name")));
    }

    #[tokio::test]
    async fn the_public_listener_is_recognised_and_so_is_a_stranger() {
        for cause in [Cause::NoClient, Cause::Unauthorized] {
            let public = Listening::serve(Router::new().fallback(async move || cause.clone())).await;
            let error = list(&public.api("right")).await.expect_err("not the API");
            assert!(matches!(error, ApiError::PublicListener(_)), "{error}");
        }
        let stranger = Listening::serve(Router::new()).await;
        assert!(matches!(
            list(&stranger.api("right")).await,
            Err(ApiError::NotTheApi(_, StatusCode::NOT_FOUND))
        ));
    }

    #[tokio::test]
    async fn a_closed_port_is_called_that() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        drop(listener);
        assert!(matches!(
            list(&api(&url, "right").expect("an API")).await,
            Err(ApiError::Refused(_))
        ));
    }

    #[test]
    fn what_cannot_work_is_said_before_anything_is_sent() {
        for url in ["", "127.0.0.1:9090", "ftp://relay", "http://", "/api"] {
            assert!(matches!(api(url, "right"), Err(ApiError::BadUrl(_))), "{url}");
        }
        assert!(matches!(api("http://relay", "two\nlines"), Err(ApiError::BadToken)));
        let args = AdminArgs {
            relay: "http://relay".into(),
            admin_token: None,
        };
        assert!(matches!(AdminApi::new(args), Err(ApiError::NoToken)));
    }
}
