//! Where saves write: the few operations that a save is made of, and directories that appear whole or not at all.
//!
//! A [`Store`] is a file system as a saver sees it; [`LocalStore`] is the real one, and a test's own may fail or stop at any
//! operation. [`StagedDir`] writes under a temporary name beside the target and puts everything in place with one rename.
//!
//! Must not know: what the files hold.

mod leftovers;
mod local;
mod names;
mod remove;
mod staged;

use std::fmt::Debug;
use std::io;
use std::path::Path;

pub use leftovers::{Leftover, LeftoverKind, leftovers, remove_leftover};
pub use local::LocalStore;
pub use names::{deleted_name, is_staging, random_bytes, random_name};
pub use remove::remove_tree;
pub use staged::{Becomes, StagedDir};

use crate::error::{Error, ErrorKind};

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

    /// The same file for writes that go straight to a local disk and wait for it: of whole pages of
    /// [`ALIGN_BYTES`](crate::limits::ALIGN_BYTES), from memory and to offsets that start at pages. `None` where there are none.
    fn direct(&self) -> Option<Box<dyn StoreFile>> {
        None
    }
}

/// The error of an operation on a file or directory that is being written.
fn failed(error: io::Error, verb: &str, path: &Path) -> Error {
    let what = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "no space is left on the device".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        io::ErrorKind::NotFound => "a directory vanished while it was written".to_owned(),
        _ => format!("cannot {verb} a file or directory"),
    };
    Error::new(ErrorKind::Io, what).at("path", path.display()).caused_by(error)
}
