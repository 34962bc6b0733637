//! A cache of what the database says about clients: soon refreshed, at once forgotten, and still there when the
//! database is not.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::store::StoreError;
use crate::{ids::ClientId, telemetry::RegistryMeter};

/// Entries of either kind, known and unknown names alike; about 1 KiB each at most, so some 10 MiB.
const ENTRIES: u64 = 10_000;
/// How long an answer is used without asking again: the longest that a change made on another node goes unnoticed.
pub(super) const FRESH_FOR: Duration = Duration::from_secs(10);
/// How long an old answer may stand in while the database is away.
const KEPT_FOR: Duration = Duration::from_secs(3600);
/// How long a caller waits for a better answer than the old one.
const REFRESH_PATIENCE: Duration = Duration::from_millis(250);
/// Clients share this many generations: forgetting one makes 1 in 1,024 others ask the database once more.
const GENERATIONS: usize = 1024;

/// A key whose entry is forgotten with its client.
pub(super) trait OfClient: Hash + Eq + Clone + Send + Sync + 'static {
    fn client_id(&self) -> &ClientId;
}

impl OfClient for ClientId {
    fn client_id(&self) -> &ClientId {
        self
    }
}

#[derive(Clone)]
struct Stamped<V> {
    value: V,
    /// The client's generation when the database was asked.
    generation: u64,
}

/// See the module. An entry counts only while its generation is its client's: so what [`Cache::forget`] forgets is not
/// brought back by a look-up that was under way, neither now nor when the database is away later.
pub(super) struct Cache<K, V> {
    fresh: moka::future::Cache<K, Stamped<V>>,
    last_known: moka::sync::Cache<K, Stamped<V>>,
    generations: Box<[AtomicU64]>,
    hasher: RandomState,
    meter: RegistryMeter,
}

impl<K: OfClient, V: Clone + Send + Sync + 'static> Cache<K, V> {
    pub fn new(fresh_for: Duration, meter: RegistryMeter) -> Self {
        Self {
            fresh: moka::future::Cache::builder()
                .max_capacity(ENTRIES)
                .time_to_live(fresh_for)
                .build(),
            last_known: moka::sync::Cache::builder()
                .max_capacity(ENTRIES)
                .time_to_live(KEPT_FOR)
                .build(),
            generations: (0..GENERATIONS).map(|_| AtomicU64::new(0)).collect(),
            hasher: RandomState::new(),
            meter,
        }
    }

    /// The fresh answer, or a new one from `load`, or, if that fails, the last known one. Concurrent misses share one
    /// `load`, and its error.
    pub async fn get<F, Fut>(&self, key: &K, load: F) -> Result<V, Arc<StoreError>>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<V, StoreError>>,
    {
        self.meter.looked_up();
        loop {
            let found = self.fresh.try_get_with_by_ref(key, self.refresh(key, &load)).await?;
            if found.generation == self.generation(key.client_id()).load(Ordering::Acquire) {
                return Ok(found.value);
            }
            self.fresh.invalidate(key).await;
        }
    }

    /// Something about this client has changed: what was known of it must not be used again.
    pub fn forget(&self, client_id: &ClientId) {
        self.generation(client_id).fetch_add(1, Ordering::AcqRel);
    }

    /// The database knows better, but the old answer may still stand in for it.
    pub async fn expire(&self, key: &K) {
        self.fresh.invalidate(key).await;
    }

    async fn refresh<F, Fut>(&self, key: &K, load: &F) -> Result<Stamped<V>, StoreError>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<V, StoreError>>,
    {
        self.meter.missed();
        // Read before the database is: a change during the read makes this answer void.
        let generation = self.generation(key.client_id()).load(Ordering::Acquire);
        let known = self.last_known.get(key).filter(|known| known.generation == generation);
        let loaded = match known {
            Some(_) => tokio::time::timeout(REFRESH_PATIENCE, load())
                .await
                .unwrap_or(Err(StoreError::Slow)),
            None => load().await,
        };
        match (loaded, known) {
            (Ok(value), _) => {
                let stamped = Stamped { value, generation };
                self.last_known.insert(key.clone(), stamped.clone());
                Ok(stamped)
            }
            (Err(error), Some(known)) => {
                tracing::debug!(client.id = %key.client_id(), %error, "answering from memory: the database is away");
                Ok(known)
            }
            (Err(error), None) => Err(error),
        }
    }

    fn generation(&self, client_id: &ClientId) -> &AtomicU64 {
        let hash = self.hasher.hash_one(client_id);
        // The remainder is below GENERATIONS, and so is the index.
        &self.generations[(hash % GENERATIONS as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use tokio::sync::Notify;

    use super::*;

    fn home() -> ClientId {
        "home".parse().expect("a client id")
    }

    async fn down() -> Result<u32, StoreError> {
        Err(StoreError::Slow)
    }

    #[tokio::test]
    async fn a_fresh_answer_is_not_asked_for_again_until_it_is_forgotten() {
        let cache = Cache::new(FRESH_FOR, RegistryMeter::default());
        let asked = AtomicU32::new(0);
        let ask = || async { Ok(asked.fetch_add(1, Ordering::Relaxed)) };
        assert_eq!(cache.get(&home(), &ask).await.expect("loaded"), 0);
        assert_eq!(cache.get(&home(), &ask).await.expect("cached"), 0);
        cache.expire(&home()).await;
        assert_eq!(cache.get(&home(), &ask).await.expect("asked again"), 1);
        cache.forget(&home());
        assert_eq!(cache.get(&home(), &ask).await.expect("asked again"), 2);
    }

    #[tokio::test]
    async fn a_stale_answer_stands_in_for_the_database_but_a_forgotten_one_does_not() {
        let cache = Cache::new(FRESH_FOR, RegistryMeter::default());
        cache.get(&home(), || async { Ok(7) }).await.expect("loaded");
        cache.expire(&home()).await;
        assert_eq!(cache.get(&home(), down).await.expect("stale"), 7);
        cache.forget(&home());
        assert!(cache.get(&home(), down).await.is_err());
    }

    #[tokio::test]
    async fn a_look_up_under_way_does_not_bring_back_what_was_forgotten() {
        let cache = Cache::new(FRESH_FOR, RegistryMeter::default());
        let (reading, go_on) = (Notify::new(), Notify::new());
        let answer = AtomicU32::new(1);
        let slow = || async {
            let read = answer.load(Ordering::Relaxed);
            reading.notify_one();
            go_on.notified().await;
            Ok(read)
        };
        let home = home();
        let change = async {
            reading.notified().await;
            answer.store(2, Ordering::Relaxed);
            cache.forget(&home);
            go_on.notify_one();
            reading.notified().await;
            go_on.notify_one();
        };
        let (found, ()) = tokio::join!(cache.get(&home, &slow), change);
        assert_eq!(found.expect("loaded"), 2);
    }

    #[tokio::test]
    async fn concurrent_misses_share_one_question() {
        let cache = Cache::new(FRESH_FOR, RegistryMeter::default());
        let asked = AtomicU32::new(0);
        let ask = || async {
            asked.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Ok(())
        };
        let home = home();
        let _ = tokio::join!(cache.get(&home, &ask), cache.get(&home, &ask), cache.get(&home, &ask));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
