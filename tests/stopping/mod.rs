//! Watched file systems: every operation of a save or a removal is told before it is done, and may be refused. One that stops is
//! a process that is killed between any two operations.

#![allow(dead_code, unreachable_pub, reason = "every test binary uses its own part of this module")]

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use touchdown::io::{LocalStore, Store, StoreFile};
use touchdown::limits::ALIGN_BYTES;

/// What is about to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    CreateDir(&'a Path),
    Create(&'a Path),
    Open(&'a Path),
    /// So many bytes.
    Write(&'a Path, usize),
    Sync(&'a Path),
    /// The file is let go.
    Close,
    SyncDir(&'a Path),
    Rename(&'a Path, &'a Path),
    Exchange(&'a Path, &'a Path),
    RemoveFile(&'a Path),
    RemoveDir(&'a Path),
}

type Watch = Arc<dyn Fn(Operation<'_>) -> io::Result<()> + Send + Sync>;

/// The local file system behind a watch.
#[derive(Clone)]
pub struct Watched(Watch);

impl Watched {
    pub fn new(watch: impl Fn(Operation<'_>) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(watch))
    }
}

/// A file system that stops at an operation: that one and all later ones fail, so that what is on disk stays as if the process
/// had been killed there. `exchanges`: whether two names can be exchanged in one step.
pub fn stopping(operations: u64, exchanges: bool) -> Watched {
    let left = AtomicU64::new(operations);
    Watched::new(move |operation| {
        if operation == Operation::Close {
            return Ok(());
        }
        let done = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        done.map_err(|_| io::Error::other("stopped"))?;
        match operation {
            Operation::Exchange(..) if !exchanges => Err(io::ErrorKind::Unsupported.into()),
            _ => Ok(()),
        }
    })
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watched")
    }
}

struct WatchedFile {
    file: Box<dyn StoreFile>,
    path: PathBuf,
    watch: Watch,
    /// Whether it takes whole pages alone.
    direct: bool,
}

impl fmt::Debug for WatchedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WatchedFile({})", self.path.display())
    }
}

impl Drop for WatchedFile {
    fn drop(&mut self) {
        drop((self.watch)(Operation::Close));
    }
}

impl StoreFile for WatchedFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // One that fails, or dies, has written half.
        let unit = if self.direct { ALIGN_BYTES as usize } else { 1 };
        let (half, rest) = bytes.split_at(bytes.len() / 2 / unit * unit);
        self.file.write_at(half, offset)?;
        (self.watch)(Operation::Write(&self.path, bytes.len()))?;
        self.file.write_at(rest, offset + half.len() as u64)
    }
    fn sync(&self) -> io::Result<()> {
        // The machine keeps running, so what was written is there all the same.
        (self.watch)(Operation::Sync(&self.path))
    }
    fn direct(&self) -> Option<Box<dyn StoreFile>> {
        let (path, watch) = (self.path.clone(), Arc::clone(&self.watch));
        (self.watch)(Operation::Open(&self.path)).ok()?;
        Some(Box::new(Self { file: self.file.direct()?, path, watch, direct: true }))
    }
}

impl Watched {
    fn file(&self, file: Box<dyn StoreFile>, path: &Path) -> Box<dyn StoreFile> {
        Box::new(WatchedFile { file, path: path.to_owned(), watch: Arc::clone(&self.0), direct: false })
    }
}

impl Store for Watched {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        (self.0)(Operation::CreateDir(path))?;
        LocalStore.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        (self.0)(Operation::Create(path))?;
        Ok(self.file(LocalStore.create(path)?, path))
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        (self.0)(Operation::Open(path))?;
        Ok(self.file(LocalStore.open(path)?, path))
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        (self.0)(Operation::SyncDir(path))
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        (self.0)(Operation::Rename(from, to))?;
        LocalStore.rename_new(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        (self.0)(Operation::Exchange(one, other))?;
        LocalStore.exchange(one, other)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        (self.0)(Operation::RemoveFile(path))?;
        LocalStore.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        (self.0)(Operation::RemoveDir(path))?;
        LocalStore.remove_dir(path)
    }
}
