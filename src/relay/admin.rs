//! The admin listener: health, metrics, and the API that operators manage clients, tokens, tunnels and nodes with.
//!
//! `admin/openapi.json` is the API's description, and served; a test compares it with the routes.
//!
//! Every answer carries `Adit-Api`, so that a client of the API notices when it talks to something else. Every error is
//! problem+json. The API is behind the admin token; health and metrics are not: the listener is not a public one.

mod api;
mod cluster;

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::{Next, from_fn_with_state, map_response},
    response::{IntoResponse, Response},
    routing::{MethodRouter, delete, get, post},
};
use futures_util::future::BoxFuture;

use super::auth::bearer;
use crate::{
    cluster::{bus::Reached, letter::Traffic, registry::Registry},
    error::Cause,
    ids::{ClientId, NodeId, TunnelId},
};

/// Says that this is the admin API, and its version.
pub const ADIT_API: HeaderName = HeaderName::from_static("adit-api");
const API_VERSION: HeaderValue = HeaderValue::from_static("v1");
/// The longest body: a client's description is well under 1 KiB.
const BODY_LIMIT: usize = 64 * 1024;
const OPENAPI: &str = include_str!("admin/openapi.json");

/// Whether this node shall be sent traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Everything is there.
    Ready,
    /// It serves, but not all of it; why.
    Degraded(&'static str),
    /// It must not be sent traffic; why.
    NotReady(&'static str),
}

/// What the admin listener shows and changes.
pub struct Admin {
    /// Clients and tokens, and what nodes have recorded.
    pub registry: Arc<Registry>,
    /// The node itself.
    pub node: Box<dyn Control>,
    /// Asked at each `/readyz`.
    pub readiness: Box<dyn Fn() -> Readiness + Send + Sync>,
    /// The metrics in OpenMetrics text, rendered at each `/metrics`.
    pub metrics: Box<dyn Fn() -> String + Send + Sync>,
}

/// What operators see of the node itself, and do to it and its peers.
pub trait Control: Send + Sync {
    /// What it has counted.
    fn traffic(&self) -> Traffic;
    /// What these peers have counted, of those who answer soon.
    fn traffic_of(&self, peers: Vec<NodeId>) -> BoxFuture<'_, HashMap<NodeId, Traffic>>;
    /// A tunnel that it holds, as it is now.
    fn live(&self, client_id: &ClientId, tunnel_ws_id: TunnelId) -> Option<Live>;
    /// Who holds a tunnel, and whose it is, if the node knows that without asking.
    fn find(&self, tunnel_ws_id: TunnelId) -> Option<(NodeId, ClientId)>;
    /// Closes a tunnel that this node holds.
    fn disconnect(&self, node_id: NodeId, client_id: ClientId, tunnel_ws_id: TunnelId) -> BoxFuture<'_, Reached>;
    /// Lets this node drain, as SIGTERM does.
    fn drain(&self, node_id: NodeId) -> BoxFuture<'_, Reached>;
}

/// A tunnel at its node.
#[derive(Debug, Clone, Copy)]
pub struct Live {
    /// Requests that run through it.
    pub exchanges_in_flight: usize,
    /// Its round trip.
    pub rtt: Duration,
}

/// Every route of the API below `/api/v1` that needs the admin token.
fn api() -> [(&'static str, MethodRouter<Arc<Admin>>); 9] {
    let client = get(api::get_client)
        .patch(api::update_client)
        .delete(api::delete_client);
    [
        ("/clients", get(api::list_clients).post(api::create_client)),
        ("/clients/{client_id}", client),
        (
            "/clients/{client_id}/tokens",
            get(api::list_tokens).post(api::create_token),
        ),
        ("/clients/{client_id}/tokens/{token_id}", delete(api::revoke_token)),
        ("/nodes", get(cluster::list_nodes)),
        ("/nodes/{node_id}/drain", post(cluster::drain_node)),
        ("/stats", get(cluster::stats)),
        ("/tunnels", get(cluster::list_tunnels)),
        ("/tunnels/{tunnel_id}", delete(cluster::disconnect)),
    ]
}

/// Every route of the admin listener.
pub fn router(admin: Arc<Admin>) -> Router {
    let api = api()
        .into_iter()
        .fold(Router::new(), |router, (path, methods)| router.route(path, methods))
        .route_layer(from_fn_with_state(admin.clone(), require_admin))
        // It tells nothing of this relay, and what reads it seldom has a token.
        .route("/openapi.json", get(openapi));
    Router::new()
        .nest("/api/v1", api)
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(async || {
            Cause::NotFound("nothing here: the API is below /api/v1, and /api/v1/openapi.json describes it")
        })
        .method_not_allowed_fallback(async || Cause::ApiMethod)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(map_response(async |mut response: Response| {
            response.headers_mut().insert(ADIT_API, API_VERSION);
            response
        }))
        .with_state(admin)
}

/// Before anything of the request but its head is looked at.
async fn require_admin(State(admin): State<Arc<Admin>>, request: Request, next: Next) -> Response {
    match bearer(request.headers()).is_some_and(|token| admin.registry.check_admin(token)) {
        true => next.run(request).await,
        false => Cause::UnauthorizedAdmin.into_response(),
    }
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

async fn readyz(State(admin): State<Arc<Admin>>) -> Response {
    match (admin.readiness)() {
        Readiness::Ready => "ready\n".into_response(),
        Readiness::Degraded(why) => format!("degraded: {why}\n").into_response(),
        Readiness::NotReady(why) => Cause::Unavailable(why).into_response(),
    }
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    let open_metrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (
        StatusCode::OK,
        [(header::CONTENT_TYPE, open_metrics)],
        (admin.metrics)(),
    )
        .into_response()
}

/// A node that has no peers and no tunnels, for tests of the API alone.
#[cfg(test)]
pub(crate) struct Quiet;

#[cfg(test)]
impl Control for Quiet {
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    fn traffic_of(&self, _: Vec<NodeId>) -> BoxFuture<'_, HashMap<NodeId, Traffic>> {
        Box::pin(std::future::ready(HashMap::new()))
    }

    fn live(&self, _: &ClientId, _: TunnelId) -> Option<Live> {
        None
    }

    fn find(&self, _: TunnelId) -> Option<(NodeId, ClientId)> {
        None
    }

    fn disconnect(&self, _: NodeId, _: ClientId, _: TunnelId) -> BoxFuture<'_, Reached> {
        Box::pin(std::future::ready(Reached::Nobody))
    }

    fn drain(&self, _: NodeId) -> BoxFuture<'_, Reached> {
        Box::pin(std::future::ready(Reached::Somebody(1)))
    }
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Method};
    use http_body_util::BodyExt;
    use serde_json::{Value, json};
    use tower_service::Service;

    use super::*;
    use crate::{
        cluster::{registry::Node, store::Store},
        secret::Secret,
    };

    struct Api {
        router: Router,
        token: Secret,
    }

    impl Api {
        async fn start() -> Self {
            let store = Store::open("sqlite::memory:").await.expect("a store");
            let registry = Arc::new(Registry::new(store, Node::new("test")));
            let token = registry
                .ensure_admin_token(None)
                .await
                .expect("settled")
                .expect("a new token");
            let readiness = Box::new(|| Readiness::Degraded("Redis is away"));
            let metrics = Box::new(|| "# EOF\n".to_owned());
            Self {
                router: router(Arc::new(Admin {
                    registry,
                    node: Box::new(Quiet),
                    readiness,
                    metrics,
                })),
                token,
            }
        }

        async fn send(&self, method: Method, path: &str, token: &str, body: Body) -> (StatusCode, Value) {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(header::AUTHORIZATION, format!("Bearer {token}"))
                .body(body)
                .expect("a request");
            let response = self.router.clone().call(request).await.expect("infallible");
            assert_eq!(response.headers()[ADIT_API], "v1");
            let status = response.status();
            if status == StatusCode::METHOD_NOT_ALLOWED {
                assert_eq!(response.headers()[header::ALLOW], "GET,HEAD,POST");
            }
            let kind = response.headers().get(header::CONTENT_TYPE).cloned();
            let body = response.into_body().collect().await.expect("a body").to_bytes();
            if status.is_client_error() || status.is_server_error() {
                assert_eq!(kind.expect("a type"), "application/problem+json");
            }
            (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
        }

        async fn call(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
            self.send(method, path, self.token.expose(), Body::from(body.to_string()))
                .await
        }
    }

    #[tokio::test]
    async fn a_client_is_made_listed_changed_and_deleted() {
        let api = Api::start().await;
        let (status, made) = api
            .call(Method::POST, "/api/v1/clients", json!({"client_id": "home"}))
            .await;
        assert_eq!(status, StatusCode::CREATED);
        assert!(made["token"].as_str().expect("a token").starts_with("adit_"));
        let (status, _) = api
            .call(Method::POST, "/api/v1/clients", json!({"client_id": "home"}))
            .await;
        assert_eq!(status, StatusCode::CONFLICT);

        let basic = json!({"auth": "basic", "basic_user": "ann", "basic_password": "hunter2"});
        let (status, changed) = api.call(Method::PATCH, "/api/v1/clients/home", basic).await;
        assert_eq!((status, &changed["basic_user"]), (StatusCode::OK, &json!("ann")));
        assert!(!changed.to_string().contains("hunter2"));

        let (_, list) = api.call(Method::GET, "/api/v1/clients", Value::Null).await;
        assert_eq!(
            (&list["clients"][0]["client_id"], &list["next"]),
            (&json!("home"), &Value::Null)
        );
        let (status, _) = api.call(Method::DELETE, "/api/v1/clients/home", Value::Null).await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        let (status, _) = api.call(Method::GET, "/api/v1/clients/home", Value::Null).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn a_list_is_read_page_by_page() {
        let api = Api::start().await;
        for name in ["c", "a", "b"] {
            api.call(Method::POST, "/api/v1/clients", json!({"client_id": name}))
                .await;
        }
        let (_, first) = api.call(Method::GET, "/api/v1/clients?limit=2", Value::Null).await;
        assert_eq!(
            (&first["clients"][1]["client_id"], &first["next"]),
            (&json!("b"), &json!("b"))
        );
        let (_, rest) = api
            .call(Method::GET, "/api/v1/clients?limit=2&after=b", Value::Null)
            .await;
        assert_eq!(
            (&rest["clients"][0]["client_id"], &rest["next"]),
            (&json!("c"), &Value::Null)
        );
    }

    #[tokio::test]
    async fn tokens_are_added_listed_without_secrets_and_revoked() {
        let api = Api::start().await;
        api.call(Method::POST, "/api/v1/clients", json!({"client_id": "home"}))
            .await;
        let (status, made) = api
            .call(Method::POST, "/api/v1/clients/home/tokens", json!({"label": "nas"}))
            .await;
        assert_eq!(status, StatusCode::CREATED);
        let (_, list) = api.call(Method::GET, "/api/v1/clients/home/tokens", Value::Null).await;
        assert_eq!(list["tokens"][1]["label"], "nas");
        assert!(!list.to_string().contains("adit_"));
        let path = format!(
            "/api/v1/clients/home/tokens/{}",
            made["token_id"].as_str().expect("an id")
        );
        assert_eq!(
            api.call(Method::DELETE, &path, Value::Null).await.0,
            StatusCode::NO_CONTENT
        );
        assert_eq!(
            api.call(Method::DELETE, &path, Value::Null).await.0,
            StatusCode::NOT_FOUND
        );
    }

    #[tokio::test]
    async fn without_the_admin_token_nothing_is_done_or_told() {
        let api = Api::start().await;
        for token in ["", "guess", &api.token.expose()[..20]] {
            for (method, path) in [
                (Method::GET, "/api/v1/clients"),
                (Method::GET, "/api/v1/clients/home"),
                (Method::GET, "/api/v1/clients/%ff/tokens"),
                (Method::GET, "/api/v1/nodes"),
                (Method::GET, "/api/v1/stats"),
                (Method::GET, "/api/v1/tunnels"),
                (Method::POST, "/api/v1/nodes/1/drain"),
                (Method::DELETE, "/api/v1/tunnels/1"),
            ] {
                let (status, _) = api.send(method, path, token, Body::empty()).await;
                assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
            }
        }
        for path in ["/healthz", "/readyz", "/metrics", "/api/v1/openapi.json"] {
            assert_eq!(api.send(Method::GET, path, "", Body::empty()).await.0, StatusCode::OK);
        }
    }

    #[tokio::test]
    async fn what_cannot_be_is_refused_with_a_problem() {
        let api = Api::start().await;
        for body in [
            json!({"client_id": "A"}),
            json!({"client_id": "a", "auth": "magic"}),
            json!({"client_id": "a", "auth": "basic", "basic_user": "u"}),
            json!({"client_id": "a", "auth": "basic", "basic_user": "u:v", "basic_password": "p"}),
            json!({"client_id": "a", "basic_user": "u", "basic_password": "p"}),
            json!({"client_id": "a", "surprise": 1}),
            json!({}),
        ] {
            let (status, _) = api.call(Method::POST, "/api/v1/clients", body.clone()).await;
            assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
        }
        let token = api.token.expose();
        let too_long = Body::from(vec![b' '; BODY_LIMIT + 1]);
        for (method, path, body, expected) in [
            (
                Method::POST,
                "/api/v1/clients",
                Body::from("{"),
                StatusCode::BAD_REQUEST,
            ),
            (Method::POST, "/api/v1/clients", too_long, StatusCode::PAYLOAD_TOO_LARGE),
            (
                Method::GET,
                "/api/v1/clients?limit=x",
                Body::empty(),
                StatusCode::UNPROCESSABLE_ENTITY,
            ),
            (
                Method::PUT,
                "/api/v1/clients",
                Body::empty(),
                StatusCode::METHOD_NOT_ALLOWED,
            ),
            (Method::GET, "/api/v1/clients/A", Body::empty(), StatusCode::NOT_FOUND),
            (Method::GET, "/api/v1/clients/%ff", Body::empty(), StatusCode::NOT_FOUND),
            (
                Method::DELETE,
                "/api/v1/clients/a/tokens/1",
                Body::empty(),
                StatusCode::NOT_FOUND,
            ),
            (
                Method::GET,
                "/api/v1/tunnels?client_id=A",
                Body::empty(),
                StatusCode::UNPROCESSABLE_ENTITY,
            ),
            (
                Method::DELETE,
                "/api/v1/tunnels/1",
                Body::empty(),
                StatusCode::NOT_FOUND,
            ),
            (
                Method::POST,
                "/api/v1/nodes/1/drain",
                Body::empty(),
                StatusCode::NOT_FOUND,
            ),
            (Method::GET, "/api/v2", Body::empty(), StatusCode::NOT_FOUND),
            (Method::GET, "/", Body::empty(), StatusCode::NOT_FOUND),
        ] {
            assert_eq!(api.send(method, path, token, body).await.0, expected, "{path}");
        }
    }

    /// The operations of the document: method and path.
    fn described() -> Vec<String> {
        let document: Value = serde_json::from_str(OPENAPI).expect("JSON");
        let paths = document["paths"].as_object().expect("paths");
        let methods = |path: &Value| path.as_object().expect("a path").keys().cloned().collect::<Vec<_>>();
        let mut all: Vec<String> = paths
            .iter()
            .flat_map(|(path, of)| methods(of).into_iter().map(move |method| (path, method)))
            .filter(|(_, method)| method != "parameters")
            .map(|(path, method)| format!("{} {path}", method.to_uppercase()))
            .collect();
        all.sort();
        all
    }

    #[tokio::test]
    async fn the_document_describes_every_route_and_no_other() {
        let own = ["/api/v1/openapi.json", "/healthz", "/readyz", "/metrics"].map(str::to_owned);
        let below = api().map(|(path, _)| format!("/api/v1{path}"));
        let (routes, mut served) = (Api::start().await, Vec::new());
        for path in own.into_iter().chain(below) {
            // A method that none has is answered with those that the route has.
            let request = Request::builder().method(Method::TRACE).uri(&path).body(Body::empty());
            let answer = routes.router.clone().call(request.expect("a request")).await;
            let allow = answer.expect("infallible").headers()[header::ALLOW].clone();
            let methods = allow
                .to_str()
                .expect("text")
                .split(',')
                .filter(|method| *method != "HEAD");
            served.extend(methods.map(|method| format!("{method} {path}")));
        }
        served.sort();
        assert_eq!(served, described());
    }

    #[tokio::test]
    async fn the_document_is_served_and_what_it_refers_to_is_in_it() {
        let (_, document) = Api::start()
            .await
            .call(Method::GET, "/api/v1/openapi.json", Value::Null)
            .await;
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        for reference in OPENAPI.split("\"$ref\": \"#").skip(1) {
            let pointer = reference.split('"').next().expect("closed");
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }
}
