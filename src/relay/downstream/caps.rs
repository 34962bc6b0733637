//! How many downstream connections are open, in all and per address: counted by guards, refused over the cap.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use ipnet::IpNet;

/// The counts of one listener. Shared by the accept loop, the guards and whoever exports metrics.
#[derive(Debug)]
pub struct Caps {
    max_total: usize,
    max_per_address: usize,
    /// Addresses without a cap of their own: the load balancers in front, which speak for everyone.
    uncapped: Vec<IpNet>,
    total: AtomicUsize,
    refused: AtomicU64,
    accept_errors: AtomicU64,
    /// Connections by address block; a block with none has no entry.
    per_address: Mutex<HashMap<IpAddr, usize>>,
}

impl Caps {
    /// Nothing open yet.
    pub fn new(max_total: usize, max_per_address: usize, uncapped: Vec<IpNet>) -> Self {
        Self {
            max_total,
            max_per_address,
            uncapped,
            total: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
            accept_errors: AtomicU64::new(0),
            per_address: Mutex::default(),
        }
    }

    /// Connections open now, upgraded ones included.
    pub fn open(&self) -> usize {
        self.total.load(Relaxed)
    }

    /// Connections closed at once because of a cap, since the start.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// Failed `accept` calls since the start (`EMFILE` and the like).
    pub fn accept_errors(&self) -> u64 {
        self.accept_errors.load(Relaxed)
    }

    pub(super) fn count_accept_error(&self) {
        self.accept_errors.fetch_add(1, Relaxed);
    }

    /// A place for one more connection from `address`, or `None` (counted) when a cap is reached.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Slot> {
        let slot = self.try_enter(block_of(address));
        if slot.is_none() {
            self.refused.fetch_add(1, Relaxed);
        }
        slot
    }

    fn try_enter(self: &Arc<Self>, block: IpAddr) -> Option<Slot> {
        let capped = !self.uncapped.iter().any(|net| net.contains(&block));
        let mut per_address = self.per_address.lock().unwrap_or_else(PoisonError::into_inner);
        let here = per_address.get(&block).copied().unwrap_or(0);
        if self.total.load(Relaxed) >= self.max_total || (capped && here >= self.max_per_address) {
            return None;
        }
        per_address.insert(block, here + 1);
        self.total.fetch_add(1, Relaxed);
        Some(Slot {
            caps: self.clone(),
            block,
        })
    }

    fn leave(&self, block: IpAddr) {
        let mut per_address = self.per_address.lock().unwrap_or_else(PoisonError::into_inner);
        match per_address.get_mut(&block) {
            Some(here) if *here > 1 => *here -= 1,
            _ => drop(per_address.remove(&block)),
        }
        self.total.fetch_sub(1, Relaxed);
    }
}

/// One connection's place: given back on drop.
#[derive(Debug)]
pub struct Slot {
    caps: Arc<Caps>,
    block: IpAddr,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.caps.leave(self.block);
    }
}

/// What is counted as one address: an IPv4 address, or an IPv6 /64 (the least that one subscriber is given, RFC 6177).
pub(in crate::relay) fn block_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let prefix = v6.to_bits() >> 64 << 64;
            IpAddr::V6(prefix.into())
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_slot_counts_until_it_is_dropped() {
        let caps = Arc::new(Caps::new(3, 2, Vec::new()));
        let first = caps.enter(ip("192.0.2.1")).expect("room");
        let _second = caps
            .enter(ip("::ffff:192.0.2.1"))
            .expect("room: the same address, mapped");
        assert!(caps.enter(ip("192.0.2.1")).is_none(), "two per address");
        let _third = caps.enter(ip("192.0.2.2")).expect("room for another address");
        assert!(caps.enter(ip("192.0.2.3")).is_none(), "three in all");
        assert_eq!((caps.open(), caps.refused()), (3, 2));
        drop(first);
        assert!(caps.enter(ip("192.0.2.1")).is_some());
        assert_eq!(caps.open(), 2, "the last one was dropped again");
    }

    #[test]
    fn ipv6_counts_by_64_and_balancers_have_no_cap_of_their_own() {
        let caps = Arc::new(Caps::new(100, 1, vec!["10.0.0.0/8".parse().expect("a net")]));
        let _one = caps.enter(ip("2001:db8::1")).expect("room");
        assert!(caps.enter(ip("2001:db8::2")).is_none());
        let _other = caps.enter(ip("2001:db8:0:1::2")).expect("another /64");
        let _many: Vec<_> = (0..5).map(|_| caps.enter(ip("10.1.2.3")).expect("uncapped")).collect();
    }

    #[test]
    fn nothing_is_left_when_all_have_gone() {
        let caps = Arc::new(Caps::new(10, 10, Vec::new()));
        drop((0..5).filter_map(|_| caps.enter(ip("192.0.2.1"))).collect::<Vec<_>>());
        assert_eq!(caps.open(), 0);
        assert!(caps.per_address.lock().expect("not poisoned").is_empty());
    }
}
