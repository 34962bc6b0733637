//! The registry as one node sees it: who holds what, who may, and what it must write about itself.
//!
//! Look-ups go through a cache that outlives the database's absences; writes about this node's tunnels go through
//! [`presence`], which catches up when the database returns. Changes by the operator ([`clients`]) bite at once here
//! and are announced as [`RegistryEvent`]s.

mod clients;
mod held;
mod magic;
mod overview;
mod peers;
mod presence;

use std::{sync::Arc, sync::OnceLock, time::Duration};

use tokio::sync::broadcast;

use self::presence::Presence;
pub use self::{
    clients::{NewAuth, RegistryError},
    presence::{Node, Watch},
};
pub use super::store::{Client, ClientSummary, ConnectionRow, DownstreamAuth, Holder, NodeRow, TokenRecord, TokenRow};
use super::{
    cache::{Cache, FRESH_FOR, OfClient},
    hash::TokenHash,
    now_ms,
    store::{Store, StoreError},
};
use crate::{
    ids::{ClientId, NodeId, TokenId},
    secret::Secret,
    telemetry::RegistryMeter,
};

/// How long a signature is good: 14 days, what MoosicBox's apps count on.
pub const SIGNATURE_LIFETIME: Duration = Duration::from_secs(14 * 24 * 3600);
/// Who holds what changes often: an answer is shared by those who ask together, no longer.
const HOLDERS_FRESH_FOR: Duration = Duration::from_millis(100);
/// Events that a slow receiver may be behind by. Operators make a few a minute; past this it is told that it lagged.
const EVENTS: usize = 256;
/// Where the admin token's hash is kept.
const ADMIN_TOKEN_SETTING: &str = "admin_token_sha256";

/// The database does not answer, and memory does not have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the registry's database is away")]
pub struct RegistryAway;

/// What an operator changed on this node, for whoever holds tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistryEvent {
    /// Tunnels opened with this token must close.
    TokenRevoked {
        /// Whose token.
        client_id: ClientId,
        /// Which.
        token_id: TokenId,
    },
    /// All tunnels of this client must close.
    ClientDeleted {
        /// Whose.
        client_id: ClientId,
    },
    /// What its downstreams must show has changed; tunnels may stay.
    ClientChanged {
        /// Whose.
        client_id: ClientId,
    },
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct SignatureKey(ClientId, TokenHash);

impl OfClient for SignatureKey {
    fn client_id(&self) -> &ClientId {
        &self.0
    }
}

/// See the module.
pub struct Registry {
    store: Store,
    presence: Presence,
    clients: Cache<ClientId, Option<Arc<Client>>>,
    /// Until when a signature is good; `None`: there is none such.
    signatures: Cache<SignatureKey, Option<i64>>,
    holders: Cache<ClientId, Arc<[Holder]>>,
    admin_token: OnceLock<TokenHash>,
    events_tx: broadcast::Sender<RegistryEvent>,
}

impl Registry {
    /// Touches nothing yet; [`Registry::run`] registers the node.
    pub fn new(store: Store, node: Node) -> Self {
        Self::with_freshness(store, node, FRESH_FOR)
    }

    /// Like [`Registry::new`], asking the database again about what is older than this: zero means every time.
    pub fn with_freshness(store: Store, node: Node, fresh_for: Duration) -> Self {
        let meter = store.meter();
        Self {
            presence: Presence::new(node),
            clients: Cache::new(fresh_for, meter.clone()),
            signatures: Cache::new(fresh_for, meter.clone()),
            holders: Cache::new(fresh_for.min(HOLDERS_FRESH_FOR), meter.clone()),
            store,
            admin_token: OnceLock::new(),
            events_tx: broadcast::Sender::new(EVENTS),
        }
    }

    /// This node's id.
    pub fn node_id(&self) -> NodeId {
        self.presence.node().node_id
    }

    /// What asking it costs.
    pub fn meter(&self) -> RegistryMeter {
        self.store.meter().clone()
    }

    /// The client of this name, if there is one. At most 10 s old while the database answers, and at most an hour while
    /// it does not; changes made through this registry are seen at once.
    pub async fn client(&self, client_id: &ClientId) -> Result<Option<Arc<Client>>, RegistryAway> {
        let load = || async { Ok(self.store.client(client_id).await?.map(Arc::new)) };
        self.clients
            .get(client_id, load)
            .await
            .map_err(away("look up a client"))
    }

    /// Who holds tunnels of this client, on all nodes, oldest first. Who asks at the same time shares an answer, and the
    /// last known one stands in for a database that is away; the caller decides how often to ask.
    pub async fn holders(&self, client_id: &ClientId) -> Result<Arc<[Holder]>, RegistryAway> {
        let load = || async { Ok(self.store.holders(client_id).await?.into()) };
        self.holders.get(client_id, load).await.map_err(away("look up tunnels"))
    }

    /// Whether the database was away when this node last had something to write, and is not known to be back.
    pub fn is_away(&self) -> bool {
        self.presence.is_behind()
    }

    /// Whether there are other nodes that are not leaving.
    pub async fn has_peers(&self) -> Result<bool, RegistryAway> {
        let nodes = self.store.nodes().await.map_err(away("look for other nodes"))?;
        let mut others = nodes.iter().filter(|node| node.node_id != self.node_id());
        Ok(others.any(|node| !node.draining))
    }

    /// Another node's operator changed something about this client: it is looked up again.
    pub fn heard_of_change(&self, client_id: &ClientId) {
        self.clients.forget(client_id);
        self.signatures.forget(client_id);
    }

    /// What operators change from now on.
    ///
    /// A receiver that hears `Lagged` has missed events and recovers by looking at what it holds instead: for each of
    /// its tunnels, [`Registry::client`], and close those whose client is `None` or has no such token
    /// ([`Client::has_token`]). The cache is invalidated before the event is sent, so the look-up is never too old.
    pub fn events(&self) -> broadcast::Receiver<RegistryEvent> {
        self.events_tx.subscribe()
    }

    /// A new signature of this client, good for [`SIGNATURE_LIFETIME`]. Many may be valid at once.
    pub async fn create_signature(&self, client_id: &ClientId) -> Result<Secret, RegistryError> {
        let (secret, now) = (Secret::new_token(), now_ms());
        let expires_at = now.saturating_add_unsigned(SIGNATURE_LIFETIME.as_millis() as u64);
        match self
            .store
            .insert_signature(client_id, TokenHash::of(secret.expose()), now, expires_at)
            .await?
        {
            true => Ok(secret),
            false => Err(RegistryError::UnknownClient),
        }
    }

    /// Whether this is a signature of this client that is still good.
    pub async fn verify_signature(&self, client_id: &ClientId, presented: &str) -> Result<bool, RegistryAway> {
        self.verify_signature_at(client_id, presented, now_ms()).await
    }

    async fn verify_signature_at(&self, client_id: &ClientId, presented: &str, now: i64) -> Result<bool, RegistryAway> {
        let hash = TokenHash::of(presented);
        let load = || self.store.signature_expiry(client_id, hash);
        let key = SignatureKey(client_id.clone(), hash);
        let expiry = self
            .signatures
            .get(&key, load)
            .await
            .map_err(away("look up a signature"))?;
        Ok(expiry.is_some_and(|expires_at| now < expires_at))
    }

    /// Settles what the admin token is: the given one (kept as a hash in memory only), else the one whose hash is
    /// stored, else a new one, which is returned to be shown once. Called once, at start.
    pub async fn ensure_admin_token(&self, given: Option<&str>) -> Result<Option<Secret>, StoreError> {
        if let Some(given) = given {
            self.admin_token.get_or_init(|| TokenHash::of(given));
            return Ok(None);
        }
        let made = Secret::new_token();
        let hash = TokenHash::of(made.expose());
        let stored = match self.store.setting(ADMIN_TOKEN_SETTING).await? {
            Some(stored) => Some(stored),
            None => match self.store.insert_setting(ADMIN_TOKEN_SETTING, &hash.to_hex()).await {
                Ok(()) => None,
                // Another node was first: its token is the one that was shown.
                Err(StoreError::Exists) => self.store.setting(ADMIN_TOKEN_SETTING).await?,
                Err(error) => return Err(error),
            },
        };
        let Some(stored) = stored else {
            self.admin_token.get_or_init(|| hash);
            return Ok(Some(made));
        };
        let stored = stored.parse().map_err(|_| StoreError::Corrupt(ADMIN_TOKEN_SETTING))?;
        self.admin_token.get_or_init(|| stored);
        Ok(None)
    }

    /// Whether this is the admin token. Before [`Registry::ensure_admin_token`] nothing is.
    pub fn check_admin(&self, presented: &str) -> bool {
        let presented = TokenHash::of(presented);
        self.admin_token.get().is_some_and(|token| token.matches(&presented))
    }
}

impl Client {
    /// Whether this token is (still) one of the client's.
    pub fn has_token(&self, token_id: TokenId) -> bool {
        self.tokens.iter().any(|token| token.token_id == token_id)
    }
}

/// Logs why, where it is handled, and leaves the caller what it can act on.
fn away<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> RegistryAway {
    move |error| {
        tracing::debug!(%error, "could not {what}: the database is away");
        RegistryAway
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn registry() -> Registry {
        Registry::new(
            Store::open("sqlite::memory:").await.expect("a store"),
            Node::new("test"),
        )
    }

    #[tokio::test]
    async fn a_signature_is_good_for_its_client_for_fourteen_days() {
        let registry = registry().await;
        let (home, other): (ClientId, ClientId) = ("home".parse().expect("id"), "other".parse().expect("id"));
        assert!(matches!(
            registry.create_signature(&home).await,
            Err(RegistryError::UnknownClient)
        ));
        for client in [&home, &other] {
            registry.create_client(client, NewAuth::Token).await.expect("created");
        }
        let (first, second) = (
            registry.create_signature(&home).await.expect("one"),
            registry.create_signature(&home).await.expect("two"),
        );
        for signature in [&first, &second] {
            assert_eq!(registry.verify_signature(&home, signature.expose()).await, Ok(true));
        }
        assert_eq!(registry.verify_signature(&other, first.expose()).await, Ok(false));
        assert_eq!(registry.verify_signature(&home, "guess").await, Ok(false));
        let later = now_ms() + SIGNATURE_LIFETIME.as_millis() as i64;
        assert_eq!(
            registry.verify_signature_at(&home, first.expose(), later).await,
            Ok(false)
        );
        assert_eq!(registry.store.delete_expired_signatures(later).await.expect("swept"), 2);
    }

    #[tokio::test]
    async fn the_admin_token_is_given_or_made_once_and_remembered() {
        let registry = registry().await;
        assert!(!registry.check_admin(""));
        let made = registry
            .ensure_admin_token(None)
            .await
            .expect("settled")
            .expect("a new one");
        assert!(registry.check_admin(made.expose()) && !registry.check_admin("guess"));

        let restarted = Registry::new(registry.store.clone(), Node::new("test"));
        assert!(restarted.ensure_admin_token(None).await.expect("settled").is_none());
        assert!(restarted.check_admin(made.expose()));

        let given = Registry::new(registry.store.clone(), Node::new("test"));
        assert!(
            given
                .ensure_admin_token(Some("given"))
                .await
                .expect("settled")
                .is_none()
        );
        assert!(given.check_admin("given") && !given.check_admin(made.expose()));
    }
}
