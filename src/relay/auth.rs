//! Who is let in: agents by an access token, downstreams by what their client asks for.
//!
//! Every refusal of a credential looks the same, whatever is wrong with it. An address that keeps failing is told to
//! wait, but a valid credential is never blocked: it may come from behind the same NAT as the attack.

mod credential;
mod guard;

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use http::HeaderMap;
use subtle::ConstantTimeEq;

pub use credential::Consumed;
pub(super) use credential::bearer;

use crate::{
    cluster::{
        hash::{PasswordHash, TokenHash},
        registry::{Client, DownstreamAuth, Registry, RegistryAway, TokenRecord},
    },
    error::Cause,
    ids::{ClientId, TokenId},
};
use guard::{Failures, Passwords};

/// Stands in for the tokens of a client that does not exist, so that its refusal takes as long.
static NOBODY: LazyLock<[TokenRecord; 1]> = LazyLock::new(|| {
    [TokenRecord {
        token_id: TokenId::from_bytes([0; 16]),
        hash: TokenHash::of("nobody"),
    }]
});

impl From<RegistryAway> for Cause {
    fn from(_: RegistryAway) -> Self {
        Cause::RegistryAway
    }
}

/// Which of the client's access tokens this is. Any text may be presented; every token is compared.
pub fn verify_token(client: &Client, presented: &str) -> Option<TokenId> {
    matching(&client.tokens, presented)
}

fn matching(tokens: &[TokenRecord], presented: &str) -> Option<TokenId> {
    let presented = TokenHash::of(presented);
    tokens.iter().fold(None, |found, token| {
        if token.hash.matches(&presented) {
            Some(token.token_id)
        } else {
            found
        }
    })
}

/// The relay's doorkeeper. One a node.
pub struct Auth {
    registry: Arc<Registry>,
    failures: Failures,
    passwords: Passwords,
}

impl Auth {
    /// Judges by what this registry knows.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self {
            registry,
            failures: Failures::new(),
            passwords: Passwords::new(),
        }
    }

    /// An agent that wants to open a tunnel of this client: the access token that it may do so with. A wrong token,
    /// another client's, and an unknown client are one and the same [`Cause::Unauthorized`].
    pub async fn agent(&self, client_id: &ClientId, remote_ip: IpAddr, headers: &HeaderMap) -> Result<TokenId, Cause> {
        let presented = credential::bearer(headers).ok_or(Cause::Unauthorized)?;
        let client = self.registry.client(client_id).await?;
        let tokens = client.as_ref().map_or(NOBODY.as_slice(), |client| &client.tokens);
        matching(tokens, presented)
            .filter(|_| client.is_some())
            .ok_or_else(|| self.refuse(remote_ip, Cause::Unauthorized))
    }

    /// The relay's operator, by the admin token.
    pub fn operator(&self, remote_ip: IpAddr, headers: &HeaderMap) -> Result<(), Cause> {
        let presented = credential::bearer(headers).ok_or(Cause::Unauthorized)?;
        match self.registry.check_admin(presented) {
            true => Ok(()),
            false => Err(self.refuse(remote_ip, Cause::Unauthorized)),
        }
    }

    /// Whoever has a signature of this client, in the query.
    pub async fn signature(&self, client_id: &ClientId, remote_ip: IpAddr, query: Option<&str>) -> Result<(), Cause> {
        let presented = credential::signature(query).ok_or(Cause::Unauthorized)?;
        match self.registry.verify_signature(client_id, presented).await? {
            true => Ok(()),
            false => Err(self.refuse(remote_ip, Cause::Unauthorized)),
        }
    }

    /// The client that this magic token leads to.
    pub async fn magic_token(&self, remote_ip: IpAddr, presented: &str) -> Result<Arc<Client>, Cause> {
        let found = match self.registry.client_of_magic_token(presented).await? {
            Some(client_id) => self.registry.client(&client_id).await?,
            None => None,
        };
        found.ok_or_else(|| self.refuse(remote_ip, Cause::Unauthorized))
    }

    /// A downstream that wants to reach this client: the client, and what of the request was the relay's to consume
    /// and must be stripped ([`Consumed::strip`]) before it goes on.
    pub async fn authorize_downstream(
        &self,
        client_id: &ClientId,
        remote_ip: IpAddr,
        headers: &HeaderMap,
        query: Option<&str>,
    ) -> Result<(Arc<Client>, Consumed), Cause> {
        let Some(client) = self.registry.client(client_id).await? else {
            return Err(match credential::any(headers, query) {
                true => self.refuse(remote_ip, Cause::Unauthorized),
                false => Cause::UnknownClient,
            });
        };
        let consumed = match &client.auth {
            DownstreamAuth::Public => Consumed::Nothing,
            DownstreamAuth::Token => self.token(&client, remote_ip, headers, query).await?,
            DownstreamAuth::Basic { user, hash } => self.basic(user, hash, remote_ip, headers).await?,
        };
        Ok((client, consumed))
    }

    async fn token(
        &self,
        client: &Client,
        remote_ip: IpAddr,
        headers: &HeaderMap,
        query: Option<&str>,
    ) -> Result<Consumed, Cause> {
        let (presented, consumed) = credential::token(headers, query).ok_or(Cause::Unauthorized)?;
        let valid = match consumed {
            Consumed::Signature => self.registry.verify_signature(&client.client_id, presented).await?,
            _ => verify_token(client, presented).is_some(),
        };
        valid
            .then_some(consumed)
            .ok_or_else(|| self.refuse(remote_ip, Cause::Unauthorized))
    }

    async fn basic(
        &self,
        user: &str,
        hash: &PasswordHash,
        remote_ip: IpAddr,
        headers: &HeaderMap,
    ) -> Result<Consumed, Cause> {
        if !headers.contains_key(http::header::AUTHORIZATION) {
            return Err(Cause::UnauthorizedBasic);
        }
        let Some((given_user, password)) = credential::basic(headers) else {
            return Err(self.refuse(remote_ip, Cause::UnauthorizedBasic));
        };
        // The password is checked whatever the user, so that the time taken does not tell which was wrong.
        let good_password = self
            .passwords
            .verify(hash, password, self.failures.too_many(remote_ip))
            .await;
        let good_user = bool::from(given_user.as_slice().ct_eq(user.as_bytes()));
        (good_password & good_user)
            .then_some(Consumed::Authorization)
            .ok_or_else(|| self.refuse(remote_ip, Cause::UnauthorizedBasic))
    }

    /// A credential was presented and is not good.
    fn refuse(&self, remote_ip: IpAddr, cause: Cause) -> Cause {
        match self.failures.count(remote_ip) {
            Ok(()) => cause,
            Err(wait) => Cause::TooMany("too many failed attempts from this address", wait),
        }
    }
}
