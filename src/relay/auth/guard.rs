//! What guessing costs: failed attempts are counted per address, and checking passwords is bounded and remembered.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use rand::Rng;
use sha2::{Digest, Sha256};
use tokio::{sync::Semaphore, task::JoinError};

use crate::cluster::hash::PasswordHash;

/// Failed attempts that an address has a minute. People mistype; nobody guesses 256 bits, or a decent password, at 20
/// a minute.
const FAILURES: u32 = 20;
const FAILURE_WINDOW_SECONDS: u32 = 60;
/// Addresses remembered: past this the rarest are forgotten, and a flood from so many addresses is not stopped by
/// counting them.
const ADDRESSES: u64 = 10_000;
/// Verdicts remembered, so that a page with a hundred pictures costs one stretched hash, not a hundred.
const VERDICTS: u64 = 10_000;
const VERDICT_LIFETIME: Duration = Duration::from_secs(300);

/// Failed attempts per address within the last minute, counted from the first.
pub(super) struct Failures {
    counts: moka::sync::Cache<IpAddr, Arc<AtomicU32>>,
}

impl Failures {
    pub fn new() -> Self {
        let window = Duration::from_secs(FAILURE_WINDOW_SECONDS.into());
        Self {
            counts: moka::sync::Cache::builder()
                .max_capacity(ADDRESSES)
                .time_to_live(window)
                .build(),
        }
    }

    /// One more; the error is the seconds to wait.
    pub fn count(&self, address: IpAddr) -> Result<(), u32> {
        let count = self.counts.get_with(subject(address), Arc::default);
        match count.fetch_add(1, Ordering::Relaxed) < FAILURES {
            true => Ok(()),
            false => Err(FAILURE_WINDOW_SECONDS),
        }
    }

    /// Whether the next failure will be one too many.
    pub fn too_many(&self, address: IpAddr) -> bool {
        self.counts
            .get(&subject(address))
            .is_some_and(|count| count.load(Ordering::Relaxed) >= FAILURES)
    }
}

/// Who is counted as one: an IPv4 address, or the /64 that one IPv6 host is given (RFC 6177).
fn subject(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

/// Checks passwords, each of which costs about 0.1 s of CPU when it is first seen.
pub(super) struct Passwords {
    /// Keyed by a hash under a key of this process; the password itself is not kept.
    verdicts: moka::future::Cache<[u8; 32], bool>,
    key: [u8; 32],
    /// One core at most works on guesses; who has failed often waits in a queue apart.
    trusted: Semaphore,
    suspect: Semaphore,
}

impl Passwords {
    pub fn new() -> Self {
        let mut key = [0; 32];
        rand::rng().fill_bytes(&mut key);
        Self {
            verdicts: moka::future::Cache::builder()
                .max_capacity(VERDICTS)
                .time_to_live(VERDICT_LIFETIME)
                .build(),
            key,
            trusted: Semaphore::new(1),
            suspect: Semaphore::new(1),
        }
    }

    /// Whether this is the password. `suspect`: the address has failed too often lately.
    pub async fn verify(&self, hash: &PasswordHash, password: Vec<u8>, suspect: bool) -> bool {
        let queue = if suspect { &self.suspect } else { &self.trusted };
        let verdict = self.verdict_key(hash, &password);
        let check = async {
            // An error would mean that the semaphore was closed, which nobody does.
            let _turn = queue.acquire().await;
            let hash = hash.clone();
            tokio::task::spawn_blocking(move || hash.verify(&password)).await
        };
        let checked: Result<bool, Arc<JoinError>> = self.verdicts.try_get_with(verdict, check).await;
        checked.unwrap_or(false)
    }

    /// Depends on the stored hash, salt and all: a changed password has no old verdicts, and no two clients share one.
    fn verdict_key(&self, hash: &PasswordHash, password: &[u8]) -> [u8; 32] {
        let stored = hash.as_str().as_bytes();
        Sha256::new()
            .chain_update(self.key)
            .chain_update(stored)
            .chain_update([0])
            .chain_update(password)
            .finalize()
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    #[test]
    fn the_twenty_first_failure_of_an_address_is_one_too_many() {
        let failures = Failures::new();
        let address: IpAddr = "192.0.2.1".parse().expect("an address");
        for _ in 0..FAILURES {
            assert!(!failures.too_many(address));
            assert_eq!(failures.count(address), Ok(()));
        }
        assert!(failures.too_many(address));
        assert_eq!(failures.count(address), Err(60));
        assert_eq!(failures.count("192.0.2.2".parse().expect("an address")), Ok(()));
    }

    #[test]
    fn a_host_is_counted_as_one_however_many_addresses_it_has() {
        let of = |text: &str| subject(text.parse().expect("an address"));
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), of("2001:db8:1:2::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }

    #[tokio::test]
    async fn a_password_is_checked_and_the_verdict_remembered_for_that_hash_only() {
        let passwords = Passwords::new();
        let hash = PasswordHash::of(&Secret::from("open sesame".to_owned()));
        assert!(passwords.verify(&hash, b"open sesame".to_vec(), false).await);
        assert!(!passwords.verify(&hash, b"open".to_vec(), true).await);
        passwords.verdicts.run_pending_tasks().await;
        assert_eq!(passwords.verdicts.entry_count(), 2);
        let changed = PasswordHash::of(&Secret::from("changed".to_owned()));
        assert!(!passwords.verify(&changed, b"open sesame".to_vec(), false).await);
    }
}
