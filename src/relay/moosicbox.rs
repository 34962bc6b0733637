//! The MoosicBox dialect (`shared/MOOSICBOX.md` has its facts): MoosicBox's servers and apps work against this relay as they
//! are. A server's tunnel serves the same exchanges as an agent's, on one node and across nodes.
//!
//! - [`sender`]: a server's socket · [`serve`]: an exchange served through it · [`requests`]: answers on their way
//! - [`app`]: an app's socket, at any node · [`apps`]: what apps say, at the node of their server

mod app;
mod apps;
mod requests;
mod sender;
mod serve;

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Response};
use hyper_util::rt::TokioIo;

use super::{
    State,
    accept::{self, Knock},
    out_body::OutBody,
};
use crate::{error::Cause, telemetry::AuthFailure, wire::moosicbox::decode};

/// Answers a request for a WebSocket that is not an agent's: a MoosicBox server's, or an app's.
pub async fn accept(
    state: &Arc<State>,
    knock: Knock,
    headers: HeaderMap,
    query: Option<&str>,
) -> Result<Response<OutBody>, Cause> {
    let is_sender = match parameter(query, "sender").as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(Cause::BadRequest("`sender` is `true` or `false`")),
    };
    state
        .auth
        .signature(&knock.client_id, knock.remote, query)
        .await
        .inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Agent))?;
    let client = state.registry.client(&knock.client_id).await?;
    let client = client.ok_or(Cause::Unauthorized)?;
    let profile = parameter(query, "moosicboxProfile").and_then(|profile| HeaderValue::try_from(profile).ok());
    let remote = knock.remote;
    accept::switch(state, knock, headers, None, move |state, upgraded| async move {
        let io = TokioIo::new(upgraded);
        match is_sender {
            true => sender::run(state, client.client_id.clone(), remote, io).await,
            false => app::run(state, client, profile, io).await,
        }
    })
}

/// A parameter of the query, percent-decoded.
fn parameter(query: Option<&str>, name: &str) -> Option<String> {
    let mut pairs = query?.split('&').filter_map(|pair| pair.split_once('='));
    let value = pairs.rfind(|(known, _)| *known == name)?.1;
    String::from_utf8(decode(value.as_bytes())).ok()
}
