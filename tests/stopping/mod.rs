//! A store that stops: saves and removals are killed between any two operations.

#![allow(dead_code, unreachable_pub, reason = "every test binary uses its own part of this module")]

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use touchdown::io::{LocalStore, Store, StoreFile};

/// A file system that stops at an operation: that one and all later ones fail, so that what is on disk stays as if the process
/// had been killed there.
#[derive(Debug)]
pub struct Stopping {
    left: Arc<AtomicU64>,
    /// Whether two names can be exchanged in one step.
    exchanges: bool,
}

impl Stopping {
    /// One that does so many operations.
    pub fn new(operations: u64, exchanges: bool) -> Self {
        Self { left: Arc::new(AtomicU64::new(operations)), exchanges }
    }

    fn step(left: &AtomicU64) -> io::Result<()> {
        let done = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        done.map(drop).map_err(|_| io::Error::other("stopped"))
    }
}

#[derive(Debug)]
struct StoppingFile(Box<dyn StoreFile>, Arc<AtomicU64>);

impl StoreFile for StoppingFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // Killed in the middle: half of it is there.
        Stopping::step(&self.1).inspect_err(|_| drop(self.0.write_at(&bytes[..bytes.len() / 2], offset)))?;
        self.0.write_at(bytes, offset)
    }
    fn sync(&self) -> io::Result<()> {
        // The machine keeps running, so what was written is there all the same.
        Stopping::step(&self.1)
    }
}

impl Store for Stopping {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        Self::step(&self.left)?;
        LocalStore.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        Self::step(&self.left)?;
        Ok(Box::new(StoppingFile(LocalStore.create(path)?, Arc::clone(&self.left))))
    }
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Self::step(&self.left)
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        Self::step(&self.left)?;
        LocalStore.rename_new(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        Self::step(&self.left)?;
        if !self.exchanges {
            return Err(io::ErrorKind::Unsupported.into());
        }
        LocalStore.exchange(one, other)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        Self::step(&self.left)?;
        LocalStore.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        Self::step(&self.left)?;
        LocalStore.remove_dir(path)
    }
}
