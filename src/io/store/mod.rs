//! Where saves write: the few operations that a save is made of, and directories that appear whole or not at all.
//!
//! A [`Store`] is a file system as a saver sees it; [`LocalStore`] is the real one, and a test's own may fail or stop at any
//! operation. [`StagedDir`] writes under a temporary name beside the target and puts everything in place with one rename.
//!
//! Must not know: what the files hold.

mod local;
mod staged;

use std::fmt::Debug;
use std::io;
use std::path::Path;

pub use local::LocalStore;
pub use staged::{
    Becomes, Leftover, LeftoverKind, StagedDir, deleted_name, is_staging, leftovers, random_bytes, random_name,
    remove_leftover, remove_tree,
};

/// A file system as a saver sees it. Every method is one operation: a saver that stops between any two leaves the earlier ones
/// done and the later ones not.
pub trait Store: Send + Sync + Debug {
    /// Makes a directory whose parent exists; `AlreadyExists` if the name is taken.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes a file whose name must be free.
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoreFile>>;

    /// Opens a file that was made earlier, to write on; `Unsupported` where that cannot be done.
    fn open(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        let _ = path;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes the entries of a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Gives a directory or file another name, which must be free: `AlreadyExists` otherwise, even when another process takes it at
    /// this moment.
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Swaps two names in one step; `Unsupported` where the file system cannot.
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()>;

    /// Removes a file or link.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// A file that is being written.
pub trait StoreFile: Send + Sync + Debug {
    /// Writes all bytes at this offset; several threads may write disjoint ranges.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the contents durable.
    fn sync(&self) -> io::Result<()>;
}
