//! Every route of the public listener, in the order in which a request meets them. One parsed target says who is meant,
//! for authentication and for routing alike.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use http_body::Body;
use hyper::{body::Incoming, upgrade::OnUpgrade};
use serde_json::Value;

use super::{
    State, accept, auth_api,
    client_of::{Addressed, client_of},
    cors,
    downstream::handle::ConnHandle,
    forwarded::Hop,
    ingress::{self, Arrival},
    moosicbox,
    out_body::OutBody,
    publish,
    strict::{self, Target},
    subscribe,
};
use crate::{
    cluster::registry::Client,
    config::Domain,
    error::Cause,
    ids::{ClientId, RequestId},
};

/// Answers one request. Never fails: an error is an answer too.
pub async fn handle(state: Arc<State>, request: Request<Incoming>) -> Result<Response<OutBody>, Infallible> {
    let request_id = RequestId::new();
    let (parts, body) = request.into_parts();
    let origin = cors::Origin::allowed(&state.config.cors, &parts.headers);
    let (answer, origin) = match check(&state, request_id, parts, body) {
        Ok((Addressed::Apex(_), came)) if origin.is_some() && cors::is_preflight(&came.parts) => {
            (Ok(cors::preflight()), origin)
        }
        Ok((addressed, came)) => {
            let origin = origin.filter(|_| matches!(addressed, Addressed::Apex(_)));
            (dispatch(&state, addressed, came).await, origin)
        }
        Err(cause) => (Err(cause), None),
    };
    let mut response = answer.unwrap_or_else(|cause| {
        tracing::debug!(request.id = %request_id, error = cause.code(), "answered with an error: {cause}");
        cause.respond(request_id)
    });
    if let Some(origin) = origin {
        origin.tell(response.headers_mut());
    }
    Ok(response)
}

/// Whether the head is let in, and of whom it asks.
fn check(state: &State, request_id: RequestId, mut parts: Parts, body: Incoming) -> Result<(Addressed, Came), Cause> {
    let connection = parts.extensions.remove::<ConnHandle>().ok_or(Cause::Internal)?;
    let target = strict::check(&parts, &state.limits)?;
    let domain = state.config.domain.as_ref().map(Domain::as_str);
    let addressed = client_of(&target, &parts.headers, domain)?;
    let came = Came {
        request_id,
        target,
        parts,
        body,
        connection,
    };
    Ok((addressed, came))
}

/// A request whose head is let in.
struct Came {
    request_id: RequestId,
    target: Target,
    parts: Parts,
    body: Incoming,
    connection: ConnHandle,
}

impl Came {
    fn to(self, client_id: ClientId, let_in: Option<Arc<Client>>) -> Arrival {
        Arrival {
            client_id,
            request_id: self.request_id,
            target: self.target,
            parts: self.parts,
            body: self.body,
            connection: self.connection,
            let_in,
        }
    }
}

async fn dispatch(state: &Arc<State>, addressed: Addressed, came: Came) -> Result<Response<OutBody>, Cause> {
    let (client_id, apex) = match addressed {
        // On a client's own host every path is the client's.
        Addressed::ClientHost(client_id) => (Some(client_id), false),
        Addressed::Apex(client_id) => (client_id, true),
    };
    match (came.target.path(), client_id) {
        ("/ws", client_id) if apex => tunnel(state, client_id, came).await,
        ("/health", None) if apex => Ok(json(&came.parts.method, &health())),
        ("/adit/publish", Some(client_id)) if apex => publish_message(state, client_id, came).await,
        ("/adit/subscribe", Some(client_id)) if apex => subscribe_to(state, client_id, came).await,
        (path, client_id) if apex && path.starts_with("/auth/") => auth(state, client_id, came).await,
        (_, Some(client_id)) => ingress::serve(state, came.to(client_id, None)).await,
        (_, None) => Err(Cause::NoClient),
    }
}

async fn auth(state: &Arc<State>, client_id: Option<ClientId>, mut came: Came) -> Result<Response<OutBody>, Cause> {
    let caller = auth_api::Caller {
        remote: remote(state, &came.connection, &came.parts.headers),
        method: &came.parts.method,
        headers: &came.parts.headers,
        query: came.target.query(),
        has_body: !came.body.is_end_stream(),
    };
    let answer = match (came.target.path(), client_id) {
        ("/auth/register-client", Some(id)) => auth_api::register_client(state, id, &caller).await,
        ("/auth/signature-token", Some(id)) => auth_api::signature_token(state, id, &caller).await,
        ("/auth/validate-signature-token", Some(id)) => auth_api::validate_signature_token(state, id, &caller).await,
        ("/auth/magic-token", Some(id)) if caller.method == Method::POST => {
            auth_api::register_magic_token(state, id, &caller).await
        }
        ("/auth/magic-token", _) => match auth_api::by_magic_token(state, &caller, &came.target).await {
            Ok((client, target)) => {
                came.target = target;
                came.parts.headers.clear();
                return ingress::serve(state, came.to(client.client_id.clone(), Some(client))).await;
            }
            Err(cause) => Err(cause),
        },
        (_, Some(client_id)) => return ingress::serve(state, came.to(client_id, None)).await,
        (_, None) => Err(Cause::NoClient),
    };
    match answer {
        Ok(value) => Ok(json(&came.parts.method, &value)),
        Err(cause) => auth_api::as_known(cause, came.request_id),
    }
}

async fn publish_message(state: &Arc<State>, client_id: ClientId, came: Came) -> Result<Response<OutBody>, Cause> {
    let remote = remote(state, &came.connection, &came.parts.headers);
    let published = publish::publish(state, &client_id, remote, &came.parts, came.body).await?;
    let mut response = json(&came.parts.method, &published);
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

async fn subscribe_to(state: &Arc<State>, client_id: ClientId, mut came: Came) -> Result<Response<OutBody>, Cause> {
    let remote = remote(state, &came.connection, &came.parts.headers);
    subscribe::subscribe(state, &client_id, remote, &came.target, &mut came.parts).await
}

async fn tunnel(state: &Arc<State>, client_id: Option<ClientId>, mut came: Came) -> Result<Response<OutBody>, Cause> {
    let client_id = client_id.ok_or(Cause::BadRequest("a tunnel needs `?clientId=<client_id>`"))?;
    let remote = remote(state, &came.connection, &came.parts.headers);
    let knock = accept::Knock {
        client_id: client_id.clone(),
        remote,
        websocket: came.target.websocket,
        on_upgrade: came.parts.extensions.remove::<OnUpgrade>(),
    };
    let accepted = match accept::offers_adit(&came.parts.headers) {
        true => accept::accept(state, knock, came.parts.headers).await,
        false => moosicbox::accept(state, knock, came.parts.headers, came.target.query()).await,
    };
    accepted.inspect_err(|cause| {
        tracing::info!(client.id = %client_id, %remote, error = cause.code(), "a tunnel was refused: {cause}");
    })
}

/// The address to count by and to write down: the peer's, or what a trusted proxy says.
fn remote(state: &State, connection: &ConnHandle, headers: &HeaderMap) -> std::net::IpAddr {
    let trusted = &state.config.trusted_proxies;
    Hop {
        peer: connection.peer().ip(),
        tls: connection.is_tls(),
        http2: false,
        trusted,
    }
    .client_address(headers)
}

fn health() -> Value {
    serde_json::json!({ "hash": env!("CARGO_PKG_VERSION"), "healthy": true })
}

fn json(method: &Method, value: &Value) -> Response<OutBody> {
    let body = if *method == Method::HEAD {
        Bytes::new()
    } else {
        Bytes::from(value.to_string())
    };
    let mut response = Response::new(OutBody::from(body));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
