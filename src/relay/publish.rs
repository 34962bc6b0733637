//! `POST /adit/publish?clientId=…` on the relay's own host: one message to the client's subscribers. For whoever has an
//! access token of the client.

use std::{net::IpAddr, sync::Arc};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, header, request::Parts};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    BUFFER_UNIT, State,
    fanout::{Audience, MAX_MESSAGE, PublishError},
};
use crate::{error::Cause, ids::ClientId, telemetry::AuthFailure};

impl From<PublishError> for Cause {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::TooLong => Cause::BodyTooLarge,
            PublishError::BusAway => Cause::Unavailable(
                "the relay's nodes cannot speak with each other right now: not all subscribers would get it",
            ),
        }
    }
}

/// Takes the message, and answers once the bus has it.
pub(super) async fn publish(
    state: &Arc<State>,
    client_id: &ClientId,
    remote: IpAddr,
    parts: &Parts,
    body: Incoming,
) -> Result<Value, Cause> {
    if parts.method != Method::POST {
        return Err(Cause::MethodNotAllowed);
    }
    let let_in = state.auth.agent(client_id, remote, &parts.headers).await;
    let_in.inspect_err(|cause| state.count_auth_failure(cause, AuthFailure::Agent))?;
    let (message, _budget) = collect(state, &parts.headers, body).await?;
    let position = state.board.fanout.publish(client_id, Audience::All, message).await?;
    Ok(json!({ "position": position.as_str() }))
}

/// The whole body, and its share of the memory for such.
async fn collect(
    state: &State,
    headers: &HeaderMap,
    mut body: Incoming,
) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Cause> {
    let declared = headers.get(header::CONTENT_LENGTH);
    let declared = declared.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > MAX_MESSAGE as u64) {
        return Err(Cause::BodyTooLarge);
    }
    let (mut whole, mut budget) = (BytesMut::new(), None::<OwnedSemaphorePermit>);
    let idle = state.config.http.body_idle_timeout;
    loop {
        let frame = tokio::time::timeout(idle, body.frame()).await;
        let Some(frame) = frame.map_err(|_| Cause::RequestTimeout)? else {
            break;
        };
        let frame = frame.map_err(|_| Cause::BadRequest("the request body broke off: send it again"))?;
        let Ok(data) = frame.into_data() else { continue };
        let length = whole.len() + data.len();
        if length > MAX_MESSAGE {
            return Err(Cause::BodyTooLarge);
        }
        let held = budget.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = length.div_ceil(BUFFER_UNIT).saturating_sub(held);
        let more = state.buffers.clone().try_acquire_many_owned(missing as u32);
        let more = more.map_err(|_| Cause::Unavailable("the relay buffers as much as it may: try again"))?;
        match &mut budget {
            Some(budget) => budget.merge(more),
            None => budget = Some(more),
        }
        whole.extend_from_slice(&data);
    }
    Ok((whole.freeze(), budget))
}
