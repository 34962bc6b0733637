//! `/api/v1/clients`: one function a route, and the shapes of its JSON.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{
        FromRequest, FromRequestParts, Path, Query, Request, State,
        rejection::{BytesRejection, FailedToBufferBody, QueryRejection},
    },
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::Admin;
use crate::{
    cluster::registry::{ClientSummary, NewAuth, RegistryError, TokenRow},
    error::Cause,
    ids::{ClientId, TokenId},
    secret::Secret,
};

/// Clients or tunnels a page, at most and unless said otherwise.
pub(super) const PAGE: u32 = 1000;
/// What fits a stored row and a line on a screen.
const TEXT_MAX: usize = 255;
/// Longer ones are passphrases nobody types, and work for the hash.
const PASSWORD_MAX: usize = 1024;

const NO_CLIENT: Cause = Cause::NotFound("no client of this name: list them with GET /api/v1/clients");
const NO_TOKEN: Cause = Cause::NotFound("the client has no such token: list them with GET .../tokens");

pub(super) type Shared = State<Arc<Admin>>;

impl From<RegistryError> for Cause {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::ClientExists => {
                Cause::Conflict("a client of this name exists already: choose another, or add a token to it".into())
            }
            RegistryError::UnknownClient => NO_CLIENT,
            RegistryError::UnknownToken => NO_TOKEN,
            RegistryError::TokenTaken => Cause::Conflict("this magic token is taken: make another".into()),
            RegistryError::Store(error) => {
                tracing::warn!(%error, "an operator's request failed: the database did not do it");
                Cause::RegistryAway
            }
        }
    }
}

/// What a downstream shall show, as JSON says it.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Token,
    Basic,
    Public,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateClient {
    client_id: ClientId,
    auth: Option<Mode>,
    basic_user: Option<String>,
    basic_password: Option<Secret>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UpdateClient {
    auth: Mode,
    basic_user: Option<String>,
    basic_password: Option<Secret>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateToken {
    label: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct PageQuery {
    #[serde(default)]
    after: String,
    limit: Option<u32>,
}

/// A credential, shown this once.
#[derive(Serialize)]
struct Created<'a> {
    client_id: &'a ClientId,
    token_id: TokenId,
    token: &'a str,
}

#[derive(Serialize)]
struct ClientList {
    clients: Vec<ClientSummary>,
    /// Where the next page starts (`?after=`); null: this was the last one.
    next: Option<ClientId>,
}

#[derive(Serialize)]
struct TokenList {
    tokens: Vec<TokenRow>,
}

pub(super) async fn list_clients(
    State(admin): Shared,
    page: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Response, Cause> {
    let Query(page) = page.map_err(|_| Cause::Invalid("`limit` is a number of clients, `after` a client id".into()))?;
    let limit = page.limit.unwrap_or(PAGE).clamp(1, PAGE);
    let mut clients = admin.registry.list_clients(&page.after, limit + 1).await?;
    let more = clients.len() > limit as usize;
    clients.truncate(limit as usize);
    let next = clients.last().filter(|_| more).map(|client| client.client_id.clone());
    Ok(Json(ClientList { clients, next }).into_response())
}

pub(super) async fn create_client(State(admin): Shared, Body(new): Body<CreateClient>) -> Result<Response, Cause> {
    let auth = new_auth(new.auth.unwrap_or(Mode::Token), new.basic_user, new.basic_password)?;
    let (token_id, secret) = admin.registry.create_client(&new.client_id, auth).await?;
    Ok(created(&new.client_id, token_id, &secret))
}

pub(super) async fn get_client(State(admin): Shared, OfClient(client_id): OfClient) -> Result<Response, Cause> {
    Ok(Json(admin.registry.describe_client(&client_id).await?).into_response())
}

pub(super) async fn update_client(
    State(admin): Shared,
    OfClient(client_id): OfClient,
    Body(change): Body<UpdateClient>,
) -> Result<Response, Cause> {
    let auth = new_auth(change.auth, change.basic_user, change.basic_password)?;
    admin.registry.update_client(&client_id, auth).await?;
    Ok(Json(admin.registry.describe_client(&client_id).await?).into_response())
}

pub(super) async fn delete_client(State(admin): Shared, OfClient(client_id): OfClient) -> Result<StatusCode, Cause> {
    admin.registry.delete_client(&client_id).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn list_tokens(State(admin): Shared, OfClient(client_id): OfClient) -> Result<Response, Cause> {
    let tokens = admin.registry.list_tokens(&client_id).await?;
    Ok(Json(TokenList { tokens }).into_response())
}

pub(super) async fn create_token(
    State(admin): Shared,
    OfClient(client_id): OfClient,
    Body(new): Body<CreateToken>,
) -> Result<Response, Cause> {
    if let Some(label) = &new.label {
        check_text("label", label)?;
    }
    let (token_id, secret) = admin.registry.create_token(&client_id, new.label.as_deref()).await?;
    Ok(created(&client_id, token_id, &secret))
}

pub(super) async fn revoke_token(
    State(admin): Shared,
    OfToken(client_id, token_id): OfToken,
) -> Result<StatusCode, Cause> {
    admin.registry.revoke_token(&client_id, token_id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn created(client_id: &ClientId, token_id: TokenId, secret: &Secret) -> Response {
    (
        StatusCode::CREATED,
        Json(Created {
            client_id,
            token_id,
            token: secret.expose(),
        }),
    )
        .into_response()
}

fn new_auth(mode: Mode, user: Option<String>, password: Option<Secret>) -> Result<NewAuth, Cause> {
    match (mode, user, password) {
        (Mode::Token, None, None) => Ok(NewAuth::Token),
        (Mode::Public, None, None) => Ok(NewAuth::Public),
        (Mode::Basic, Some(user), Some(password)) => {
            check_text("basic_user", &user)?;
            if user.contains(':') {
                return Err(Cause::Invalid(
                    "`basic_user` must not contain a colon (RFC 7617)".into(),
                ));
            }
            if password.expose().is_empty() || password.expose().len() > PASSWORD_MAX {
                return Err(Cause::Invalid(format!("`basic_password` is 1 to {PASSWORD_MAX} bytes")));
            }
            Ok(NewAuth::Basic { user, password })
        }
        (Mode::Basic, ..) => Err(Cause::Invalid(
            "auth `basic` needs `basic_user` and `basic_password`".into(),
        )),
        _ => Err(Cause::Invalid(
            "`basic_user` and `basic_password` go with auth `basic` only".into(),
        )),
    }
}

fn check_text(field: &str, text: &str) -> Result<(), Cause> {
    match text.is_empty() || text.len() > TEXT_MAX || text.chars().any(char::is_control) {
        true => Err(Cause::Invalid(format!(
            "`{field}` is 1 to {TEXT_MAX} bytes without control characters"
        ))),
        false => Ok(()),
    }
}

/// The `{client_id}` of the path. What cannot be a client id is no client.
pub(super) struct OfClient(ClientId);

impl<S: Send + Sync> FromRequestParts<S> for OfClient {
    type Rejection = Cause;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Cause> {
        let Path(client_id) = Path::from_request_parts(parts, state).await.map_err(|_| NO_CLIENT)?;
        Ok(Self(client_id))
    }
}

/// The `{client_id}` and `{token_id}` of the path.
pub(super) struct OfToken(ClientId, TokenId);

impl<S: Send + Sync> FromRequestParts<S> for OfToken {
    type Rejection = Cause;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Cause> {
        let Path((client_id, token_id)) = Path::from_request_parts(parts, state).await.map_err(|_| NO_TOKEN)?;
        Ok(Self(client_id, token_id))
    }
}

/// A JSON body; none is an empty object.
pub(super) struct Body<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Cause;
    async fn from_request(request: Request, state: &S) -> Result<Self, Cause> {
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(|rejection| match rejection {
                BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => Cause::BodyTooLarge,
                _ => Cause::BadRequest("the request body broke off"),
            })?;
        let json: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(json)
            .map(Self)
            .map_err(|error| match error.is_data() {
                true => Cause::Invalid(error.to_string()),
                false => Cause::BadRequest("the request body is not JSON"),
            })
    }
}
