//! What of an answer its downstream has not taken: a little in memory, the rest in a file that nobody sees. A MoosicBox
//! server cannot be slowed down, and a player reads a track as it plays it.
//!
//! The file is read and written where it is needed, a packet at a time: that is a copy to or from the system's cache.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;

/// What waits in memory, bytes; more goes to the file.
pub(super) const MAX_MEMORY: usize = 4 * 1024 * 1024;
/// Read from the file at a time, bytes.
const READ: usize = 64 * 1024;

/// What all files of a node together may still hold, bytes.
#[derive(Debug)]
pub struct Budget(AtomicU64);

impl Budget {
    /// So many bytes.
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(bytes)))
    }

    fn take(&self, bytes: u64) -> bool {
        let less = |left: u64| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// First in, first out.
pub(super) struct Spool {
    budget: Arc<Budget>,
    first: VecDeque<Bytes>,
    /// Behind `first`.
    disk: Option<Disk>,
    /// Behind the file, which takes no more.
    late: VecDeque<Bytes>,
    in_memory: usize,
}

struct Disk {
    file: File,
    written: u64,
    read: u64,
    budget: Arc<Budget>,
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.budget.give_back(self.written);
    }
}

impl Spool {
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            first: VecDeque::new(),
            disk: None,
            late: VecDeque::new(),
            in_memory: 0,
        }
    }

    /// Takes it, wherever there is room. When there is none any more, [`is_full`](Self::is_full).
    pub fn push(&mut self, bytes: Bytes) {
        let fits = self.disk.is_none() && self.in_memory + bytes.len() <= MAX_MEMORY;
        if !fits && self.late.is_empty() && self.goes_to_disk(&bytes) {
            return;
        }
        self.in_memory += bytes.len();
        match self.disk {
            None => self.first.push_back(bytes),
            Some(_) => self.late.push_back(bytes),
        }
    }

    /// Whether nothing more should come before something is taken.
    pub fn is_full(&self) -> bool {
        self.in_memory >= MAX_MEMORY && (self.disk.is_none() || !self.late.is_empty())
    }

    fn goes_to_disk(&mut self, bytes: &[u8]) -> bool {
        if !self.budget.take(bytes.len() as u64) {
            return false;
        }
        let written = self.write(bytes);
        if let Err(error) = &written {
            self.budget.give_back(bytes.len() as u64);
            tracing::warn!(%error, "what a slow downstream has not taken cannot be kept in a file: is there a directory for temporary files, and room in it?");
        }
        written.is_ok()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.disk.is_none() {
            self.disk = Some(Disk {
                file: tempfile::tempfile()?,
                written: 0,
                read: 0,
                budget: self.budget.clone(),
            });
        }
        if let Some(disk) = &mut self.disk {
            disk.file.write_all_at(bytes, disk.written)?;
            disk.written += bytes.len() as u64;
        }
        Ok(())
    }

    /// Drops all.
    pub fn clear(&mut self) {
        *self = Self::new(self.budget.clone());
    }

    /// The next bytes; `None`: nothing is here.
    pub fn pop(&mut self) -> io::Result<Option<Bytes>> {
        if let Some(bytes) = self.first.pop_front() {
            self.in_memory -= bytes.len();
            return Ok(Some(bytes));
        }
        let Some(disk) = &mut self.disk else { return Ok(None) };
        let length = READ.min((disk.written - disk.read) as usize);
        if length == 0 {
            self.disk = None;
            self.first = std::mem::take(&mut self.late);
            return self.pop();
        }
        let mut bytes = vec![0; length];
        disk.file.read_exact_at(&mut bytes, disk.read)?;
        disk.read += length as u64;
        Ok(Some(bytes.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(number: u8) -> Bytes {
        vec![number; 1024 * 1024].into()
    }

    fn read(spool: &mut Spool) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = spool.pop().expect("a file") {
            all.extend_from_slice(&bytes);
        }
        all
    }

    fn written(numbers: impl Iterator<Item = u8>) -> Vec<u8> {
        numbers.flat_map(piece).collect()
    }

    #[test]
    fn what_memory_does_not_hold_comes_back_from_the_file_in_order() {
        let budget = Budget::new(100 << 20);
        let mut spool = Spool::new(budget.clone());
        (0..10).for_each(|number| spool.push(piece(number)));
        assert!(!spool.is_full());
        assert_eq!(spool.in_memory, MAX_MEMORY);
        assert_eq!(spool.pop().expect("a file"), Some(piece(0)));
        (10..12).for_each(|number| spool.push(piece(number)));
        assert!(read(&mut spool) == written(1..12));
        assert_eq!(budget.0.load(Ordering::Relaxed), 100 << 20, "all is given back");
        (0..6).for_each(|number| spool.push(piece(number)));
        assert!(read(&mut spool) == written(0..6));
    }

    #[test]
    fn without_room_for_files_it_is_full_and_loses_nothing() {
        for room in [0, 3 << 20] {
            let budget = Budget::new(room);
            let mut spool = Spool::new(budget.clone());
            (0..12).for_each(|number| spool.push(piece(number)));
            assert!(spool.is_full());
            assert!(read(&mut spool) == written(0..12), "{room}");
            drop(spool);
            assert_eq!(budget.0.load(Ordering::Relaxed), room);
        }
    }
}
