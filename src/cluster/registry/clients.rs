//! What operators do: clients and access tokens, made, changed and revoked. Each change bites on this node at once.

use super::{ClientSummary, Registry, RegistryEvent, TokenRow};
use crate::{
    cluster::{
        hash::{PasswordHash, TokenHash},
        now_ms,
        store::{Client, DownstreamAuth, StoreError, TokenRecord},
    },
    ids::{ClientId, TokenId},
    secret::Secret,
};

/// Why an operator's change was not made.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The name is taken.
    #[error("a client of this name exists already")]
    ClientExists,
    /// No client of this name.
    #[error("no client of this name")]
    UnknownClient,
    /// The client has no such token.
    #[error("the client has no such token")]
    UnknownToken,
    /// A magic token that another client has made before.
    #[error("this magic token is another client's")]
    TokenTaken,
    /// The database did not do it.
    #[error(transparent)]
    Store(StoreError),
}

impl From<StoreError> for RegistryError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Exists => RegistryError::ClientExists,
            error => RegistryError::Store(error),
        }
    }
}

/// What a downstream shall show, as an operator says it.
#[derive(Debug, Clone)]
pub enum NewAuth {
    /// An access token of the client, or a signature.
    Token,
    /// A user name and a password.
    Basic {
        /// The user name.
        user: String,
        /// The password, in the clear.
        password: Secret,
    },
    /// Nothing.
    Public,
}

impl NewAuth {
    /// Stretches the password, where that may block.
    async fn stretched(self) -> Result<DownstreamAuth, RegistryError> {
        match self {
            NewAuth::Token => Ok(DownstreamAuth::Token),
            NewAuth::Public => Ok(DownstreamAuth::Public),
            NewAuth::Basic { user, password } => {
                let stretch = tokio::task::spawn_blocking(move || PasswordHash::of(&password));
                let hash = stretch.await.map_err(|_| StoreError::Slow)?;
                Ok(DownstreamAuth::Basic { user, hash })
            }
        }
    }
}

impl Registry {
    /// A new client and its first access token. The secret is returned here and never again.
    pub async fn create_client(&self, client_id: &ClientId, auth: NewAuth) -> Result<(TokenId, Secret), RegistryError> {
        let (token_id, secret) = (TokenId::new(), Secret::new_token());
        let token = TokenRecord {
            token_id,
            hash: TokenHash::of(secret.expose()),
        };
        let auth = auth.stretched().await?;
        let client = Client {
            client_id: client_id.clone(),
            auth,
            tokens: vec![token],
            last_seen_at_ms: None,
        };
        let created = self.store.insert_client(&client, None, now_ms()).await;
        self.written(client_id, created).await?;
        Ok((token_id, secret))
    }

    /// Changes what a downstream must show.
    pub async fn update_client(&self, client_id: &ClientId, auth: NewAuth) -> Result<(), RegistryError> {
        let updated = self.store.update_auth(client_id, &auth.stretched().await?).await;
        let known = self.written(client_id, updated).await?;
        self.announce(RegistryEvent::ClientChanged {
            client_id: client_id.clone(),
        });
        known.then_some(()).ok_or(RegistryError::UnknownClient)
    }

    /// Removes a client, its tokens and its signatures; its tunnels are told to close.
    pub async fn delete_client(&self, client_id: &ClientId) -> Result<(), RegistryError> {
        let deleted = self.store.delete_client(client_id).await;
        let known = self.written(client_id, deleted).await?;
        self.announce(RegistryEvent::ClientDeleted {
            client_id: client_id.clone(),
        });
        known.then_some(()).ok_or(RegistryError::UnknownClient)
    }

    /// Up to `limit` clients in the order of their names, from the first one after `after`.
    pub async fn list_clients(&self, after: &str, limit: u32) -> Result<Vec<ClientSummary>, RegistryError> {
        Ok(self.store.clients(after, limit).await?)
    }

    /// One client, as the list shows it.
    pub async fn describe_client(&self, client_id: &ClientId) -> Result<ClientSummary, RegistryError> {
        self.store
            .client_summary(client_id)
            .await?
            .ok_or(RegistryError::UnknownClient)
    }

    /// One more access token. The secret is returned here and never again.
    pub async fn create_token(
        &self,
        client_id: &ClientId,
        label: Option<&str>,
    ) -> Result<(TokenId, Secret), RegistryError> {
        let (token_id, secret) = (TokenId::new(), Secret::new_token());
        let hash = TokenHash::of(secret.expose());
        let created = self
            .store
            .insert_token(token_id, client_id, hash, label, now_ms())
            .await;
        match self.written(client_id, created).await? {
            true => Ok((token_id, secret)),
            false => Err(RegistryError::UnknownClient),
        }
    }

    /// One more access token of a client, which is made if there is none of this name, with downstreams that show a
    /// token. The secret is returned here and never again.
    pub async fn register_client(&self, client_id: &ClientId, label: &str) -> Result<Secret, RegistryError> {
        let made = match self.create_client(client_id, NewAuth::Token).await {
            Err(RegistryError::ClientExists) => self.create_token(client_id, Some(label)).await,
            made => made,
        };
        let (_, secret) = made?;
        // Whoever uses it next may come to another node, which has looked the client up before.
        self.announce(RegistryEvent::ClientChanged {
            client_id: client_id.clone(),
        });
        Ok(secret)
    }

    /// A client's access tokens, without their secrets.
    pub async fn list_tokens(&self, client_id: &ClientId) -> Result<Vec<TokenRow>, RegistryError> {
        self.describe_client(client_id).await?;
        Ok(self.store.tokens(client_id).await?)
    }

    /// Revokes an access token; tunnels that it opened are told to close.
    pub async fn revoke_token(&self, client_id: &ClientId, token_id: TokenId) -> Result<(), RegistryError> {
        let revoked = self.store.delete_token(client_id, token_id).await;
        let known = self.written(client_id, revoked).await?;
        self.announce(RegistryEvent::TokenRevoked {
            client_id: client_id.clone(),
            token_id,
        });
        known.then_some(()).ok_or(RegistryError::UnknownToken)
    }

    /// After a change, what was known is void. After a failed write the old answer may still stand in for a database
    /// that is away, but the database is asked again as soon as it is back: the write may have arrived all the same.
    async fn written<T>(&self, client_id: &ClientId, outcome: Result<T, StoreError>) -> Result<T, RegistryError> {
        match outcome {
            Ok(outcome) => {
                self.clients.forget(client_id);
                self.signatures.forget(client_id);
                Ok(outcome)
            }
            Err(error) => {
                self.clients.expire(client_id).await;
                Err(error.into())
            }
        }
    }

    /// Also when there was nothing to change: it may be the second try of a change whose first did arrive.
    fn announce(&self, event: RegistryEvent) {
        // An error means that nobody listens: then nobody holds tunnels.
        let _ = self.events_tx.send(event);
    }
}
