//! Magic tokens: made by a client itself, to be found again by whoever was told one and knows nothing else.

use super::{Registry, RegistryAway, RegistryError, away};
use crate::{
    cluster::{hash::TokenHash, now_ms, store::StoreError},
    ids::ClientId,
};

impl Registry {
    /// From now on this magic token leads to this client. To say so again changes nothing.
    pub async fn register_magic_token(&self, client_id: &ClientId, token: &str) -> Result<(), RegistryError> {
        let hash = TokenHash::of(token);
        match self.store.insert_magic_token(client_id, hash, now_ms()).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(RegistryError::UnknownClient),
            Err(StoreError::Exists) => match self.store.magic_token(hash).await? {
                Some((_, whose)) if whose == *client_id => Ok(()),
                _ => Err(RegistryError::TokenTaken),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// The client that this magic token leads to. It does so until the client is deleted.
    pub async fn client_of_magic_token(&self, presented: &str) -> Result<Option<ClientId>, RegistryAway> {
        let hash = TokenHash::of(presented);
        let found = self.store.magic_token(hash).await;
        let found = found.map_err(away("look up a magic token"))?;
        Ok(found.and_then(|(stored, client_id)| stored.matches(&hash).then_some(client_id)))
    }
}
