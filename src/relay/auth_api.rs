//! `/auth/…` on the relay's own host: how MoosicBox's servers and apps get credentials and have them checked. Their JSON,
//! and their 401, are the ones that those programs know.
//!
//! HEAD checks what POST checks, and makes nothing: nobody would read the token (RFC 9110 §9.2.1).

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, header, uri::PathAndQuery};
use serde_json::{Value, json};

use super::{State, out_body::OutBody, strict::Target};
use crate::{
    cluster::registry::{Client, RegistryError},
    error::Cause,
    ids::{ClientId, RequestId},
    telemetry::AuthFailure,
    wire::moosicbox,
};

/// What a token is called that was made by [`register_client`]: `adit token list` shows it.
const LABEL: &str = "register-client";
/// The query parameter of a magic token.
const MAGIC_TOKEN: &str = "magicToken";

/// Who asks, and how.
pub(super) struct Caller<'a> {
    pub remote: IpAddr,
    pub method: &'a Method,
    pub headers: &'a HeaderMap,
    pub query: Option<&'a str>,
    pub has_body: bool,
}

/// `POST /auth/register-client`: one more access token of a client, which is made if need be. For the operator.
pub(super) async fn register_client(state: &State, client_id: ClientId, caller: &Caller<'_>) -> Result<Value, Cause> {
    let makes = makes(caller.method)?;
    let operator = state.auth.operator(caller.remote, caller.headers);
    operator.inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Admin))?;
    if !makes {
        return Ok(Value::Null);
    }
    let made = state.registry.register_client(&client_id, LABEL).await;
    let token = made.map_err(refusal)?;
    tracing::info!(client.id = %client_id, remote = %caller.remote, "a client was registered: it has one more access token");
    Ok(json!({ "token": token.expose() }))
}

/// `POST /auth/signature-token`: a signature for URLs that cannot carry a header, good for 14 days. For whoever has an
/// access token of the client.
pub(super) async fn signature_token(state: &State, client_id: ClientId, caller: &Caller<'_>) -> Result<Value, Cause> {
    let makes = makes(caller.method)?;
    access(state, &client_id, caller).await?;
    if !makes {
        return Ok(Value::Null);
    }
    let made = state.registry.create_signature(&client_id).await;
    Ok(json!({ "token": made.map_err(refusal)?.expose() }))
}

/// `POST /auth/validate-signature-token`: whether the signature in the query is one of the client's.
pub(super) async fn validate_signature_token(
    state: &State,
    client_id: ClientId,
    caller: &Caller<'_>,
) -> Result<Value, Cause> {
    makes(caller.method)?;
    let valid = state.auth.signature(&client_id, caller.remote, caller.query).await;
    valid.inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Downstream))?;
    Ok(json!({ "valid": true }))
}

/// `POST /auth/magic-token`: from now on the magic token in the query leads to this client. For whoever has an access
/// token of it.
pub(super) async fn register_magic_token(
    state: &State,
    client_id: ClientId,
    caller: &Caller<'_>,
) -> Result<Value, Cause> {
    access(state, &client_id, caller).await?;
    let (_, token) = magic_token(caller.query)?;
    let registered = state.registry.register_magic_token(&client_id, &token).await;
    registered.map_err(refusal)?;
    Ok(json!({ "success": true }))
}

/// `GET /auth/magic-token`: whose the magic token in the query is, and what is asked of that client: this path, and
/// nothing else of what was sent.
pub(super) async fn by_magic_token(
    state: &State,
    caller: &Caller<'_>,
    target: &Target,
) -> Result<(Arc<Client>, Target), Cause> {
    if *caller.method != Method::GET {
        return Err(Cause::MethodNotAllowed);
    }
    if caller.has_body {
        return Err(Cause::BadRequest("a magic token is asked for without a body"));
    }
    let (sent, token) = magic_token(caller.query)?;
    let found = state.auth.magic_token(caller.remote, &token).await;
    let client = found.inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Downstream))?;
    let anew = format!("{}?{MAGIC_TOKEN}={sent}", target.path());
    let anew = PathAndQuery::try_from(anew).map_err(|_| Cause::Internal)?;
    Ok((client, target.clone().instead(anew)))
}

/// The 401 that MoosicBox's programs know. Every other error is the relay's usual one.
pub(super) fn as_known(refused: Cause, request_id: RequestId) -> Result<Response<OutBody>, Cause> {
    if refused != Cause::Unauthorized {
        return Err(refused);
    }
    let mut response: Response<OutBody> = refused.respond(request_id);
    *response.body_mut() = OutBody::from(Bytes::from_static(b"Unauthorized"));
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    Ok(response)
}

fn makes(method: &Method) -> Result<bool, Cause> {
    match *method {
        Method::POST => Ok(true),
        Method::HEAD => Ok(false),
        _ => Err(Cause::MethodNotAllowed),
    }
}

async fn access(state: &State, client_id: &ClientId, caller: &Caller<'_>) -> Result<(), Cause> {
    let known = state.auth.agent(client_id, caller.remote, caller.headers).await;
    known
        .map(drop)
        .inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Agent))
}

/// The magic token as it stands in the query, and as it is meant.
fn magic_token(query: Option<&str>) -> Result<(&str, String), Cause> {
    let pairs = query
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='));
    let mut tokens = pairs.filter(|(name, _)| *name == MAGIC_TOKEN).map(|(_, value)| value);
    let (Some(sent), None) = (tokens.next(), tokens.next()) else {
        return Err(Cause::BadRequest("this needs `?magicToken=<token>`, once"));
    };
    match String::from_utf8(moosicbox::decode(sent.as_bytes())) {
        Ok(token) if !token.is_empty() => Ok((sent, token)),
        _ => Err(Cause::BadRequest("the magic token must be text, and not empty")),
    }
}

fn refusal(error: RegistryError) -> Cause {
    match error {
        // Its access token was good a moment ago.
        RegistryError::UnknownClient => Cause::Unauthorized,
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_magic_token_is_there_once_and_is_text() {
        assert_eq!(
            magic_token(Some("a=1&magicToken=%61%2Bb")),
            Ok(("%61%2Bb", "a+b".to_owned()))
        );
        for bad in [
            None,
            Some(""),
            Some("magicToken"),
            Some("magicToken="),
            Some("magicToken=a&magicToken=a"),
            Some("magicToken=%ff"),
            Some("magictoken=a"),
        ] {
            assert!(matches!(magic_token(bad), Err(Cause::BadRequest(_))), "{bad:?}");
        }
    }
}
