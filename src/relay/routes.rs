//! Every route of the public listener, in the order in which a request meets them. One parsed target says who is meant,
//! for authentication and for routing alike.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header, request::Parts};
use hyper::{body::Incoming, upgrade::OnUpgrade};

use super::{
    State, accept,
    client_of::{Addressed, client_of},
    downstream::handle::ConnHandle,
    forwarded::Hop,
    ingress::{self, Arrival},
    out_body::OutBody,
    strict::{self, Target},
};
use crate::{
    config::Domain,
    error::Cause,
    ids::{ClientId, RequestId},
};

/// Answers one request. Never fails: an error is an answer too.
pub async fn handle(state: Arc<State>, request: Request<Incoming>) -> Result<Response<OutBody>, Infallible> {
    let request_id = RequestId::new();
    let answer = dispatch(&state, request_id, request).await;
    Ok(answer.unwrap_or_else(|cause| {
        tracing::debug!(request.id = %request_id, error = cause.code(), "answered with an error: {cause}");
        cause.respond(request_id)
    }))
}

async fn dispatch(
    state: &Arc<State>,
    request_id: RequestId,
    request: Request<Incoming>,
) -> Result<Response<OutBody>, Cause> {
    let (mut parts, body) = request.into_parts();
    let connection = parts.extensions.remove::<ConnHandle>().ok_or(Cause::Internal)?;
    let target = strict::check(&parts, &state.limits)?;
    let domain = state.config.domain.as_ref().map(Domain::as_str);
    let (client_id, apex) = match client_of(&target, &parts.headers, domain)? {
        // On a client's own host every path is the client's.
        Addressed::ClientHost(client_id) => (Some(client_id), false),
        Addressed::Apex(client_id) => (client_id, true),
    };
    match (target.path(), client_id) {
        ("/ws", client_id) if apex => tunnel(state, client_id, &target, parts, &connection).await,
        ("/health", None) if apex => Ok(json(&parts.method, &health())),
        ("/auth/signature-token", Some(client_id)) if apex => signature(state, client_id, &parts, &connection).await,
        (_, Some(client_id)) => {
            ingress::serve(
                state,
                Arrival {
                    client_id,
                    request_id,
                    target,
                    parts,
                    body,
                    connection,
                },
            )
            .await
        }
        (_, None) => Err(Cause::NoClient),
    }
}

async fn tunnel(
    state: &Arc<State>,
    client_id: Option<ClientId>,
    target: &Target,
    mut parts: Parts,
    connection: &ConnHandle,
) -> Result<Response<OutBody>, Cause> {
    let client_id = client_id.ok_or(Cause::BadRequest("a tunnel needs `?clientId=<client_id>`"))?;
    let remote = remote(state, connection, &parts.headers);
    let knock = accept::Knock {
        client_id: client_id.clone(),
        remote,
        websocket: target.websocket,
        on_upgrade: parts.extensions.remove::<OnUpgrade>(),
    };
    let accepted = accept::accept(state, knock, parts.headers).await;
    accepted.inspect_err(|cause| {
        tracing::info!(client.id = %client_id, %remote, error = cause.code(), "a tunnel was refused: {cause}");
    })
}

/// The address to count by and to write down: the peer's, or what a trusted proxy says.
fn remote(state: &State, connection: &ConnHandle, headers: &HeaderMap) -> std::net::IpAddr {
    let trusted = &state.config.trusted_proxies;
    Hop {
        peer: connection.peer().ip(),
        tls: false,
        http2: false,
        trusted,
    }
    .client_address(headers)
}

/// A signature for URLs that cannot carry a header: 14 days, for whoever has an access token of the client.
async fn signature(
    state: &State,
    client_id: ClientId,
    parts: &Parts,
    connection: &ConnHandle,
) -> Result<Response<OutBody>, Cause> {
    if !matches!(parts.method, Method::POST | Method::HEAD) {
        return Err(Cause::MethodNotAllowed);
    }
    state
        .auth
        .agent(&client_id, remote(state, connection, &parts.headers), &parts.headers)
        .await?;
    let secret = state
        .registry
        .create_signature(&client_id)
        .await
        .map_err(|_| Cause::RegistryAway)?;
    Ok(json(&parts.method, &serde_json::json!({ "token": secret.expose() })))
}

fn health() -> serde_json::Value {
    serde_json::json!({ "hash": env!("CARGO_PKG_VERSION"), "healthy": true })
}

fn json(method: &Method, value: &serde_json::Value) -> Response<OutBody> {
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
