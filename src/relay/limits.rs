//! What one client and one address may ask of this node: requests a second, and requests at a time. Zero is no limit, and
//! costs nothing. Memory is bounded: rates are remembered of a bounded number of names, places only while they are taken.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;

use super::downstream::caps::block_of;
use crate::{config::LimitsConfig, error::Cause, exchange::Clock, ids::ClientId, telemetry::Limited};

/// Who has been silent may ask for so many seconds' worth at once: a page comes with its pictures.
const BURST_SECONDS: u64 = 2;
/// Names whose rate is remembered, about 1 MiB. Of more the rarest are forgotten: a flood from so many addresses is not
/// stopped by counting them.
const NAMES: u64 = 10_000;
/// A name that has not asked for so long starts anew, as it would anyhow.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);
/// When a place may be free again is not known: the least that can be said.
const PLACE_RETRY: u32 = 1;
const MICROS: u64 = 1_000_000;

/// The limits of a node. One a node; each node counts for itself.
pub struct Limits {
    clock: Clock,
    /// The load balancers in front, which speak for everyone.
    unlimited: Vec<IpNet>,
    client_rate: Option<Rate<ClientId>>,
    client_places: Option<Arc<Places<ClientId>>>,
    address_rate: Option<Rate<IpAddr>>,
    address_places: Option<Arc<Places<IpAddr>>>,
}

/// A request's places: given back on drop.
#[derive(Default)]
pub struct Taken {
    address: Option<Place<IpAddr>>,
    client: Option<Place<ClientId>>,
}

/// Which limit, and for how many seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded(pub Limited, u32);

impl From<Exceeded> for Cause {
    fn from(Exceeded(limit, seconds): Exceeded) -> Self {
        let why = match limit {
            Limited::ClientRate => "this client is asked more often than the relay's operator allows",
            Limited::ClientConcurrent => "this client has as many requests in flight as the relay's operator allows",
            Limited::AddressRate => "your address asks more often than the relay's operator allows",
            Limited::AddressConcurrent => "your address has as many requests in flight as the relay's operator allows",
        };
        Cause::TooMany(why, seconds)
    }
}

impl Limits {
    /// Nothing asked yet.
    pub fn new(config: &LimitsConfig, unlimited: Vec<IpNet>, clock: Clock) -> Self {
        Self {
            clock,
            unlimited,
            client_rate: Rate::of(config.client_requests_per_second),
            client_places: Places::of(config.client_concurrent),
            address_rate: Rate::of(config.address_requests_per_second),
            address_places: Places::of(config.address_concurrent),
        }
    }

    /// One more request from this address, before anything is known of it.
    pub fn of_address(&self, address: IpAddr, taken: &mut Taken) -> Result<(), Exceeded> {
        if self.address_rate.is_none() && self.address_places.is_none() {
            return Ok(());
        }
        let block = block_of(address);
        if self.unlimited.iter().any(|net| net.contains(&block)) {
            return Ok(());
        }
        ask(&self.address_rate, &block, self.clock, Limited::AddressRate)?;
        taken.address = enter(&self.address_places, &block, Limited::AddressConcurrent)?;
        Ok(())
    }

    /// One more request for this client, of somebody who is let in: what strangers try is not counted against it.
    pub fn of_client(&self, client_id: &ClientId, taken: &mut Taken) -> Result<(), Exceeded> {
        ask(&self.client_rate, client_id, self.clock, Limited::ClientRate)?;
        taken.client = enter(&self.client_places, client_id, Limited::ClientConcurrent)?;
        Ok(())
    }
}

fn ask<K>(rate: &Option<Rate<K>>, key: &K, clock: Clock, limit: Limited) -> Result<(), Exceeded>
where
    K: Hash + Eq + Clone + Send + Sync + 'static,
{
    let Some(rate) = rate else { return Ok(()) };
    rate.ask(key, clock.now()).map_err(|wait| Exceeded(limit, wait))
}

fn enter<K>(places: &Option<Arc<Places<K>>>, key: &K, limit: Limited) -> Result<Option<Place<K>>, Exceeded>
where
    K: Hash + Eq + Clone,
{
    let Some(places) = places else { return Ok(None) };
    let place = places.enter(key).ok_or(Exceeded(limit, PLACE_RETRY))?;
    Ok(Some(place))
}

/// Requests a second of each name: the generic cell rate algorithm (ITU-T I.371), whose state is one number.
struct Rate<K> {
    /// Between two requests at the full rate, microseconds.
    interval: u64,
    /// How far ahead of the clock a name may be, microseconds.
    burst: u64,
    /// By when what a name has asked for would be served at the full rate.
    served_by: moka::sync::Cache<K, Arc<AtomicU64>>,
}

impl<K: Hash + Eq + Clone + Send + Sync + 'static> Rate<K> {
    fn of(per_second: u32) -> Option<Self> {
        let interval = MICROS.checked_div(per_second.into())?.max(1);
        Some(Self {
            interval,
            burst: (BURST_SECONDS * MICROS).max(interval),
            served_by: moka::sync::Cache::builder()
                .max_capacity(NAMES)
                .time_to_idle(FORGOTTEN_AFTER)
                .build(),
        })
    }

    /// The error is the whole seconds after which one more would do.
    fn ask(&self, key: &K, now: Duration) -> Result<(), u32> {
        let now = u64::try_from(now.as_micros()).unwrap_or(u64::MAX / 2);
        let served_by = self.served_by.get_with_by_ref(key, Arc::default);
        let next = |by: u64| Some(by.max(now) + self.interval).filter(|by| *by <= now + self.burst);
        let asked = served_by.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        asked.map(drop).map_err(|by| {
            let wait = (by + self.interval).saturating_sub(now + self.burst);
            u32::try_from(wait.div_ceil(MICROS)).unwrap_or(u32::MAX).max(1)
        })
    }
}

/// Requests in flight of each name; a name with none has no entry.
struct Places<K> {
    limit: usize,
    /// Guards the counts; held for a look-up.
    taken: Mutex<HashMap<K, usize>>,
}

impl<K: Hash + Eq + Clone> Places<K> {
    fn of(limit: usize) -> Option<Arc<Self>> {
        let taken = Mutex::new(HashMap::new());
        (limit > 0).then(|| Arc::new(Self { limit, taken }))
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, key: &K) -> Option<Place<K>> {
        let mut taken = self.taken();
        let here = taken.get(key).copied().unwrap_or(0);
        if here >= self.limit {
            return None;
        }
        taken.insert(key.clone(), here + 1);
        Some(Place {
            places: self.clone(),
            key: key.clone(),
        })
    }
}

/// One place of a name: given back on drop.
struct Place<K: Hash + Eq + Clone> {
    places: Arc<Places<K>>,
    key: K,
}

impl<K: Hash + Eq + Clone> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        match taken.get_mut(&self.key) {
            Some(here) if *here > 1 => *here -= 1,
            _ => drop(taken.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_lets_a_burst_through_and_then_what_it_says() {
        let rate = Rate::of(10).expect("a limit");
        let at = |ms: u64| Duration::from_millis(ms);
        let through = |now| (0..100).take_while(|_| rate.ask(&"home", now).is_ok()).count();
        assert_eq!(through(at(0)), 20);
        assert_eq!(rate.ask(&"home", at(0)), Err(1));
        assert_eq!(rate.ask(&"other", at(0)), Ok(()));
        assert_eq!(through(at(1000)), 10);
        assert_eq!(through(at(10_000)), 20, "no more is saved up than a burst");
    }

    #[test]
    fn a_slow_rate_says_how_long_to_wait() {
        let rate = Rate::of(1).expect("a limit");
        assert_eq!(
            (rate.ask(&1, Duration::ZERO), rate.ask(&1, Duration::ZERO)),
            (Ok(()), Ok(()))
        );
        assert_eq!(rate.ask(&1, Duration::ZERO), Err(1));
        assert!(Rate::<u8>::of(0).is_none(), "zero is no limit");
    }

    #[test]
    fn places_are_given_back_and_leave_nothing() {
        let places = Places::of(2).expect("a limit");
        let (one, two) = (places.enter(&"home"), places.enter(&"home"));
        assert!(one.is_some() && two.is_some() && places.enter(&"home").is_none());
        assert!(places.enter(&"other").is_some());
        drop(one);
        assert!(places.enter(&"home").is_some());
        drop(two);
        assert!(places.taken().is_empty());
    }

    #[test]
    fn load_balancers_have_no_limit_and_a_host_is_one_however_many_addresses_it_has() {
        let config = LimitsConfig {
            client_requests_per_second: 0,
            client_concurrent: 0,
            address_requests_per_second: 0,
            address_concurrent: 1,
        };
        let nets = vec!["10.0.0.0/8".parse().expect("a net")];
        let limits = Limits::new(&config, nets, Clock::default());
        let enter = |address: &str| {
            let mut taken = Taken::default();
            let entered = limits.of_address(address.parse().expect("an address"), &mut taken);
            (entered.is_ok(), taken)
        };
        let _here = enter("2001:db8::1");
        assert!(!enter("2001:db8::2").0 && enter("2001:db8:0:1::1").0);
        let _many = [enter("10.0.0.1"), enter("10.0.0.1")].map(|(entered, _)| assert!(entered));
    }
}
