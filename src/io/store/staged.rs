//! Directories that appear whole or not at all.
//!
//! ```text
//!   run7.orbax-checkpoint-tmp-touchdown-5f0c..   everything is written and synced here
//!        │ rename, which must not replace                    │ overwrite: exchange, in one step
//!        ▼                                                   ▼
//!   run7                                               run7 (new)  and the old one under the temporary name, then removed
//! ```
//!
//! A target that is one file appears in the same way: it is written inside the temporary directory and renamed out of it.
//!
//! Orbax ignores names with `.orbax-checkpoint-tmp` in them, and so do we. Where the file system cannot exchange, the old
//! directory is first renamed to `.touchdown-old-run7-..`, from which the next save, or [`remove_leftover`](super::remove_leftover)'s caller, can tell
//! what happened. The saver holds an advisory lock on its temporary directory as long as it lives: one that can be locked is left
//! over from a crash.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::names::{part_of, replaced_name, staging_name};
use super::remove::{remove_any, remove_tree};
use super::{Store, StoreFile, failed};
use crate::error::{Error, ErrorKind, Result};
use crate::relpath::RelPath;

/// A directory that is being written under a temporary name. Dropped before it is committed, it is removed.
#[derive(Debug)]
pub struct StagedDir {
    store: Arc<dyn Store>,
    target: PathBuf,
    parent: PathBuf,
    staging: PathBuf,
    overwrite: bool,
    /// What was at the target at the start: nothing else is replaced.
    found: Option<Identity>,
    /// Locked as long as this process works on the directory.
    _lock: Option<File>,
    /// Directories below the staging directory, parents first.
    dirs: Vec<RelPath>,
    /// The same, to look one up.
    made: HashSet<RelPath>,
    becomes: Becomes,
    /// Whether it stays when it is dropped before it is committed, to be gone on with.
    kept: bool,
    committed: bool,
}

/// Which file or directory it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    /// Numbers are used again; with the time at which it was made, where the file system knows that, it is no other.
    made: Option<std::time::SystemTime>,
}

impl Identity {
    /// What is at this path now; a link is what it is itself.
    fn of(path: &Path) -> io::Result<Option<Self>> {
        match std::fs::symlink_metadata(path) {
            Ok(metadata) => {
                let (device, inode) = (metadata.dev(), metadata.ino());
                Ok(Some(Self { device, inode, made: metadata.created().ok() }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What a staged directory becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Becomes {
    /// The target is the directory itself.
    Directory,
    /// The target is a file: the one of the target's name inside.
    File,
}

impl StagedDir {
    /// Starts a directory that will appear as `target`. Missing parents are made.
    ///
    /// # Errors
    /// A target that exists (unless it may be overwritten and is a directory), or a place where nothing can be written.
    pub fn create(store: Arc<dyn Store>, target: &Path, overwrite: bool) -> Result<Self> {
        Self::start(store, target, overwrite, Becomes::Directory)
    }

    /// The same for a target that may be one file.
    ///
    /// # Errors
    /// As [`create`](Self::create); only a file is overwritten by a file.
    pub fn start(store: Arc<dyn Store>, target: &Path, overwrite: bool, becomes: Becomes) -> Result<Self> {
        let (target, parent, name) = check_target(target, overwrite, becomes)?;
        create_parents(&*store, &parent)?;
        let found = Identity::of(&target).map_err(|error| failed(error, "look at", &target))?;
        let staging = parent.join(staging_name(&name)?);
        store.create_dir(&staging).map_err(|error| failed(error, "make", &staging))?;
        let lock = File::open(&staging).ok().filter(|dir| dir.try_lock().is_ok());
        Ok(Self {
            store,
            target,
            parent,
            staging,
            overwrite,
            found,
            _lock: lock,
            dirs: Vec::new(),
            made: HashSet::new(),
            becomes,
            kept: false,
            committed: false,
        })
    }

    /// Goes on with what a saver that ended left behind: a [`Leftover`](super::Leftover) of this target. Returns the files in it, too.
    ///
    /// # Errors
    /// As [`start`](Self::start); a directory that cannot be listed, or that a living saver works on.
    pub fn resume(
        store: Arc<dyn Store>,
        target: &Path,
        overwrite: bool,
        becomes: Becomes,
        staging: &Path,
    ) -> Result<(Self, Vec<RelPath>)> {
        let (target, parent, _) = check_target(target, overwrite, becomes)?;
        let lock = File::open(staging).map_err(|error| failed(error, "open", staging))?;
        if lock.try_lock().is_err() {
            return Err(Error::new(ErrorKind::Exists, "another process works on it").at("path", staging.display()));
        }
        let found = Identity::of(&target).map_err(|error| failed(error, "look at", &target))?;
        let (mut dirs, mut files) = (Vec::new(), Vec::new());
        list(staging, &RelPath::root(), &mut dirs, &mut files)?;
        let (staging, lock) = (staging.to_owned(), Some(lock));
        let staged = Self {
            store,
            target,
            parent,
            staging,
            overwrite,
            found,
            _lock: lock,
            made: dirs.iter().cloned().collect(),
            dirs,
            becomes,
            kept: false,
            committed: false,
        };
        Ok((staged, files))
    }

    /// Says whether it stays when it is dropped before it is committed, so that a later process can go on with it.
    pub fn keep(&mut self, kept: bool) {
        self.kept = kept;
    }

    /// The path that it will have.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The path that it has now.
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// Makes a directory and its parents below, those that are not there yet.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn dir(&mut self, path: &RelPath) -> Result<()> {
        let bytes = path.as_bytes();
        let ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).chain([bytes.len()]);
        for end in ends.filter(|end| *end > 0) {
            let dir = RelPath::new(&bytes[..end])?;
            if !self.made.contains(&dir) {
                let full = self.staging.join(dir.as_path());
                self.store.create_dir(&full).map_err(|error| failed(error, "make", &full))?;
                self.made.insert(dir.clone());
                self.dirs.push(dir);
            }
        }
        Ok(())
    }

    /// Makes a file; its directory exists.
    ///
    /// # Errors
    /// A name that is taken, or whatever the file system refuses.
    pub fn file(&self, path: &RelPath) -> Result<Box<dyn StoreFile>> {
        let full = self.staging.join(path.as_path());
        self.store.create(&full).map_err(|error| failed(error, "make", &full))
    }

    /// Opens a file that was made before; see [`resume`](Self::resume).
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn open(&self, path: &RelPath) -> Result<Box<dyn StoreFile>> {
        let full = self.staging.join(path.as_path());
        self.store.open(&full).map_err(|error| failed(error, "open", &full))
    }

    /// Removes a file.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn remove(&self, path: &RelPath) -> Result<()> {
        let full = self.staging.join(path.as_path());
        self.store.remove_file(&full).map_err(|error| failed(error, "remove", &full))
    }

    /// Makes the entries of a directory below durable before all is: what is written after that can rely on them.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn sync_dir(&self, path: &RelPath) -> Result<()> {
        let full = self.staging.join(path.as_path());
        self.store.sync_dir(&full).map_err(|error| failed(error, "sync", &full))
    }

    /// Makes a small file with these contents, durable if `sync`.
    ///
    /// # Errors
    /// As [`file`](Self::file), and of writing.
    pub fn write(&self, path: &RelPath, contents: &[u8], sync: bool) -> Result<()> {
        let file = self.file(path)?;
        let result = file.write_at(contents, 0).and_then(|()| if sync { file.sync() } else { Ok(()) });
        result.map_err(|error| self.failed(error, "write", path))
    }

    /// The error of an operation on a file below.
    pub fn failed(&self, error: io::Error, verb: &str, path: &RelPath) -> Error {
        failed(error, verb, &self.staging.join(path.as_path()))
    }

    /// Puts the directory in place. Its files are durable already if `sync`; its directories and its name are then, too. What it
    /// replaced is removed.
    ///
    /// # Errors
    /// Somebody else made the target meanwhile; whatever the file system refuses. The target is then as it was before.
    pub fn commit(mut self, sync: bool) -> Result<()> {
        if sync {
            for dir in self.dirs.iter().rev() {
                let full = self.staging.join(dir.as_path());
                self.store.sync_dir(&full).map_err(|error| failed(error, "sync", &full))?;
            }
            self.store.sync_dir(&self.staging).map_err(|error| failed(error, "sync", &self.staging))?;
        }
        let replaced = self.put_in_place()?;
        self.committed = true;
        if sync {
            self.store.sync_dir(&self.parent).map_err(|error| {
                failed(error, "sync", &self.parent)
                    .hint("the new checkpoint is in place, but may not survive a power failure")
            })?;
        }
        let staging = (self.becomes == Becomes::File).then(|| self.staging.clone());
        for old in replaced.into_iter().chain(staging) {
            remove_any(&*self.store, &old).map_err(|error| {
                failed(error, "remove", &old).hint("the new checkpoint is in place; remove the old one by hand")
            })?;
        }
        Ok(())
    }

    /// Gives it its name; where the old directory is now, if there was one.
    fn put_in_place(&self) -> Result<Option<PathBuf>> {
        let content = match (self.becomes, self.target.file_name()) {
            (Becomes::File, Some(name)) => self.staging.join(name),
            _ => self.staging.clone(),
        };
        let renamed = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(exists(&self.target)),
            other => other.map_err(|error| failed(error, "rename", &content)),
        };
        let new = || renamed(self.store.rename_new(&content, &self.target));
        if !self.overwrite {
            return new().map(|()| None);
        }
        self.refuse_another(&self.target)?;
        match self.store.exchange(&content, &self.target) {
            // Another may have come in between: it gets its name back.
            Ok(()) => match self.refuse_another(&content) {
                Ok(()) => Ok(Some(content)),
                Err(error) => {
                    self.store.exchange(&content, &self.target).map_err(|error| {
                        failed(error, "exchange", &self.target).hint(format!("what it was is at {}", content.display()))
                    })?;
                    Err(error)
                }
            },
            // There is nothing to replace.
            Err(error) if error.kind() == io::ErrorKind::NotFound => new().map(|()| None),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let name = self.target.file_name().map(part_of).unwrap_or_default();
                let old = self.parent.join(replaced_name(&name)?);
                match self.store.rename_new(&self.target, &old) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return new().map(|()| None),
                    Err(error) => return Err(failed(error, "rename", &self.target)),
                }
                let put = self.refuse_another(&old).and_then(|()| new());
                put.map_err(|error| match self.store.rename_new(&old, &self.target) {
                    Ok(()) => error,
                    Err(_) => error.hint(format!("the old checkpoint is now at {}", old.display())),
                })?;
                Ok(Some(old))
            }
            Err(error) => Err(failed(error, "exchange", &self.target)),
        }
    }
}

impl StagedDir {
    /// Refuses to replace what is at a path now if it was not at the target at the start: another saver's finished work.
    fn refuse_another(&self, path: &Path) -> Result<()> {
        let now = Identity::of(path).map_err(|error| failed(error, "look at", path))?;
        match now {
            None => Ok(()),
            now if now == self.found => Ok(()),
            Some(_) => Err(Error::new(ErrorKind::Exists, "the destination was replaced by somebody else meanwhile")
                .at("path", self.target.display())
                .hint("what is there now is kept; save again to replace it")),
        }
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if !self.committed && !self.kept {
            // The save has failed or was cancelled and says so; what cannot be removed is found as a leftover.
            let _ = remove_tree(&*self.store, &self.staging);
        }
    }
}

/// The directories and files below a directory, parents first.
fn list(staging: &Path, below: &RelPath, dirs: &mut Vec<RelPath>, files: &mut Vec<RelPath>) -> Result<()> {
    let full = staging.join(below.as_path());
    let listed = |error| failed(error, "list", &full);
    for entry in std::fs::read_dir(&full).map_err(listed)? {
        let entry = entry.map_err(listed)?;
        let path = below.join(entry.file_name().as_encoded_bytes())?;
        if entry.file_type().map_err(listed)?.is_dir() {
            dirs.push(path.clone());
            list(staging, &path, dirs, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Whether something can appear at a target: its absolute path, its directory, and the part of its name in others.
fn check_target(target: &Path, overwrite: bool, becomes: Becomes) -> Result<(PathBuf, PathBuf, String)> {
    let target =
        std::path::absolute(target).map_err(|error| Error::invalid("the destination is no path").caused_by(error))?;
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Error::invalid("the destination has no name").at("path", target.display()));
    };
    match std::fs::symlink_metadata(&target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error, "look at", &target)),
        Ok(_) if !overwrite => return Err(exists(&target)),
        Ok(metadata) if metadata.is_dir() == (becomes == Becomes::Directory) && !metadata.is_symlink() => {}
        Ok(_) => {
            let what = match becomes {
                Becomes::Directory => "the destination is no directory, so it is not overwritten",
                Becomes::File => "the destination is no file, so it is not overwritten",
            };
            return Err(Error::new(ErrorKind::Exists, what)
                .at("path", target.display())
                .hint("remove it, or choose another name"));
        }
    }
    let (parent, name) = (parent.to_owned(), part_of(name));
    Ok((target, parent, name))
}

fn create_parents(store: &dyn Store, dir: &Path) -> Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
    for dir in missing.into_iter().rev() {
        match store.create_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(|error| failed(error, "make", dir))?,
        }
        if let Some(parent) = dir.parent() {
            // What is put in place below it must not be lost with it.
            store.sync_dir(parent).map_err(|error| failed(error, "sync", parent))?;
        }
    }
    Ok(())
}

fn exists(target: &Path) -> Error {
    Error::new(ErrorKind::Exists, "the destination exists")
        .at("path", target.display())
        .hint("choose another name, or overwrite it (`--overwrite`)")
}

#[cfg(test)]
#[path = "staged_tests.rs"]
mod tests;
