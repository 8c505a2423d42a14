//! The one writer of a root.
//!
//! The lock is the kernel's (`flock`) on a file of the root whose name every reader passes over: it ends with the process that
//! holds it, however that ends, so a stale one cannot be. What the file says is for the error alone.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::limits::LOCK_FILE_BYTES_MAX;

/// The right to write to a root, as long as it lives.
#[derive(Debug)]
pub(super) struct WriterLock {
    file: File,
}

/// Which file a lock is on. Who removes that file, or puts another in its place, lets a second writer in.
#[derive(Debug)]
pub(super) struct LockedFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl LockedFile {
    /// # Errors
    /// Kind `Busy` if another file, or none, has the name of the lock by now.
    pub(super) fn check(&self) -> Result<()> {
        let now = std::fs::symlink_metadata(&self.path).map(|found| (found.dev(), found.ino())).ok();
        if now == Some(self.identity) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Busy, "the lock of this writer was removed: another may have the root")
            .at("file", self.path.display())
            .hint("open the root again, which takes the lock if nobody has it; leave the file in its place"))
    }
}

impl Drop for WriterLock {
    fn drop(&mut self) {
        // Closing it is not enough: a process that is being started by another thread has a copy for a moment.
        let _ = self.file.unlock();
    }
}

impl WriterLock {
    /// Takes the root's lock, and tells which file that is on.
    ///
    /// # Errors
    /// Kind `Busy` if another writer has it; a file system that cannot lock.
    pub(super) fn take(root: &Path) -> Result<(Self, LockedFile)> {
        let path = root.join(LOCK_FILE);
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Io, "cannot lock the root of the steps").at("file", path.display()).caused_by(error)
        };
        let flags = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).custom_flags(flags);
        let mut file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // It may be in the middle of writing it; the lock is what counts.
                let _ = (&file).take(LOCK_FILE_BYTES_MAX).read_to_string(&mut holder);
                let error = Error::new(ErrorKind::Busy, "another writer has the root of the steps")
                    .at("root", root.display())
                    .hint("wait until it has ended, or open the root read-only: readers need no lock");
                return Err(match holder.trim() {
                    "" => error,
                    holder => error.found(holder),
                });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let of = file.metadata().map_err(failed)?;
        file.set_len(0).and_then(|()| writeln!(file, "process {}", std::process::id())).map_err(failed)?;
        Ok((Self { file }, LockedFile { identity: (of.dev(), of.ino()), path }))
    }
}

/// Orbax takes no name that starts with a dot for a step.
const LOCK_FILE: &str = ".touchdown-lock";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_at_a_time_and_a_stale_file_is_no_lock() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join(LOCK_FILE), "process 1 long ago, with more text than the new one has").unwrap();
        let (lock, file) = WriterLock::take(root.path()).unwrap();
        file.check().unwrap();
        let error = WriterLock::take(root.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().ends_with(&format!("found process {}", std::process::id())), "{error}");
        // A copy of the file is no lock.
        let copy = lock.file.try_clone().unwrap();
        drop(lock);
        drop((WriterLock::take(root.path()).unwrap(), copy));
        let (_lock, file) = WriterLock::take(root.path()).unwrap();
        std::fs::remove_file(root.path().join(LOCK_FILE)).unwrap();
        assert_eq!(file.check().unwrap_err().kind(), ErrorKind::Busy);
        let second = WriterLock::take(root.path()).unwrap();
        assert_eq!(file.check().unwrap_err().kind(), ErrorKind::Busy);
        second.1.check().unwrap();
    }
}
