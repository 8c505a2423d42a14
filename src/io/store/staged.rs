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
//! directory is first renamed to `.touchdown-old-run7-..`, from which the next save, or [`remove_leftover`]'s caller, can tell
//! what happened. The saver holds an advisory lock on its temporary directory as long as it lives: one that can be locked is left
//! over from a crash.

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Store, StoreFile};
use crate::error::{Error, ErrorKind, Result};
use crate::relpath::RelPath;

/// What the temporary name of a save has after the name of its target.
const STAGING: &str = ".orbax-checkpoint-tmp-touchdown-";

/// What the name of a replaced directory starts with while it waits for its removal.
const REPLACED: &str = ".touchdown-old-";

/// Longest part of the target's name in the names above; a name may have 255 bytes in all.
const NAME_PART_MAX: usize = 180;

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
        let staging = parent.join(format!("{name}{STAGING}{}", random_name()?));
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

    /// Goes on with what a saver that ended left behind: a [`Leftover`] of this target. Returns the files in it, too.
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
                let old = self.parent.join(format!("{REPLACED}{name}-{}", random_name()?));
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

/// What a crashed save left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub kind: LeftoverKind,
    /// The name of the checkpoint that it was to become or used to be, as far as it is known.
    pub name: String,
}

/// What a leftover is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftoverKind {
    /// A save that was not finished, or a checkpoint that was replaced and not yet removed.
    Staging,
    /// A checkpoint that was moved aside to be replaced; if there is none of its name, it is the only one.
    Replaced,
}

impl Leftover {
    /// Whether it was to become, or used to be, this path; only the directory that it lies in is not compared.
    pub fn is_of(&self, target: &Path) -> bool {
        target.file_name().is_some_and(|name| part_of(name) == self.name)
    }
}

/// Leftovers of crashed saves among the entries of a directory, by name. Directories that a living saver works on are none.
///
/// # Errors
/// A directory that cannot be listed.
pub fn leftovers(dir: &Path) -> io::Result<Vec<Leftover>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let (kind, of) = match (name.split_once(STAGING), name.strip_prefix(REPLACED)) {
            (Some((of, _)), _) => (LeftoverKind::Staging, of),
            (_, Some(rest)) => (LeftoverKind::Replaced, rest.rsplit_once('-').map_or(rest, |(of, _)| of)),
            _ => continue,
        };
        let path = entry.path();
        let is_dir = entry.file_type()?.is_dir();
        if (is_dir && !is_locked(&path)) || (!is_dir && kind == LeftoverKind::Replaced) {
            found.push(Leftover { path, kind, name: of.to_owned() });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Whether it is a temporary name that is given here, not by Orbax.
pub fn is_staging(name: &str) -> bool {
    name.contains(STAGING)
}

/// Removes a leftover; one that a living saver works on by now stays.
///
/// # Errors
/// Whatever the file system refuses.
pub fn remove_leftover(store: &dyn Store, leftover: &Leftover) -> Result<()> {
    if is_locked(&leftover.path) {
        return Ok(());
    }
    remove_any(store, &leftover.path).map_err(|error| failed(error, "remove", &leftover.path))
}

/// Removes a file, or a directory and what is in it.
fn remove_any(store: &dyn Store, path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => store.remove_file(path),
        _ => remove_tree(store, path),
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

/// Whether a living saver holds the directory.
fn is_locked(path: &Path) -> bool {
    File::open(path).is_ok_and(|dir| matches!(dir.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Removes a directory and what is in it; links are removed, not followed.
///
/// # Errors
/// The first entry that cannot be removed; what is gone already is fine.
pub fn remove_tree(store: &dyn Store, path: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => return gone(store.remove_file(path)),
        _ => {}
    }
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => remove_tree(store, &entry.path())?,
            false => gone(store.remove_file(&entry.path()))?,
        }
    }
    gone(store.remove_dir(path))
}

/// Sixteen random hexadecimal digits: a name that nobody else has.
///
/// # Errors
/// A system without random numbers.
pub fn random_name() -> Result<String> {
    Ok(random_bytes()?.iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// Sixteen random bytes.
///
/// # Errors
/// A system without random numbers.
pub fn random_bytes() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(|errno| {
        Error::new(ErrorKind::Io, "the system gives no random numbers").caused_by(io::Error::from(errno))
    })?;
    Ok(bytes)
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

/// A free name beside this path for what is about to be removed: one that readers ignore and that is found as a leftover.
///
/// # Errors
/// A path without a name; a system without random numbers.
pub fn deleted_name(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(|error| Error::invalid("no path").caused_by(error))?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::invalid("the path has no name").at("path", path.display()));
    };
    Ok(parent.join(format!("{}{STAGING}{}", part_of(name), random_name()?)))
}

/// The beginning of a name, short enough to be part of another.
fn part_of(name: &std::ffi::OsStr) -> String {
    let name = name.to_string_lossy();
    let end = name.char_indices().map(|(at, char)| at + char.len_utf8()).take_while(|end| *end <= NAME_PART_MAX).last();
    name[..end.unwrap_or(0)].to_owned()
}

fn exists(target: &Path) -> Error {
    Error::new(ErrorKind::Exists, "the destination exists")
        .at("path", target.display())
        .hint("choose another name, or overwrite it (`--overwrite`)")
}

fn failed(error: io::Error, verb: &str, path: &Path) -> Error {
    let what = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "no space is left on the device".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        io::ErrorKind::NotFound => "a directory vanished while it was written".to_owned(),
        _ => format!("cannot {verb} a file or directory"),
    };
    Error::new(ErrorKind::Io, what).at("path", path.display()).caused_by(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::LocalStore;

    #[test]
    fn a_file_appears_whole_and_is_gone_on_with() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("model.bin");
        let start = |overwrite| StagedDir::start(Arc::new(LocalStore), &target, overwrite, Becomes::File);
        let fill = |dir: StagedDir, text: &str| {
            dir.write(&path("model.bin"), text.as_bytes(), true).unwrap();
            dir
        };
        let names = || std::fs::read_dir(home.path()).unwrap().count();
        fill(start(false).unwrap(), "one").commit(true).unwrap();
        assert_eq!((std::fs::read(&target).unwrap(), names()), (b"one".to_vec(), 1));
        assert_eq!(start(false).unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(staged(&target, true).unwrap_err().kind(), ErrorKind::Exists, "a directory replaces no file");
        // One that is kept is found, and gone on with.
        let mut left = fill(start(true).unwrap(), "two");
        left.dir(&path("deep/er")).unwrap();
        left.write(&path("deep/er/file"), b"x", true).unwrap();
        left.keep(true);
        let at = left.path().to_owned();
        let resume = || StagedDir::resume(Arc::new(LocalStore), &target, true, Becomes::File, &at);
        assert_eq!(resume().unwrap_err().kind(), ErrorKind::Exists, "its saver lives");
        drop(left);
        assert_eq!(leftovers(home.path()).unwrap()[0].name, "model.bin");
        let (mut dir, mut files) = resume().unwrap();
        files.sort();
        assert_eq!(files, [path("deep/er/file"), path("model.bin")]);
        dir.dir(&path("deep/er")).unwrap();
        dir.open(&path("model.bin")).unwrap().write_at(b"2", 0).unwrap();
        dir.remove(&path("deep/er/file")).unwrap();
        dir.commit(true).unwrap();
        assert_eq!((std::fs::read(&target).unwrap(), names()), (b"2wo".to_vec(), 1));
        let plain = |text| fill(StagedDir::start(Arc::new(Plain), &target, true, Becomes::File).unwrap(), text);
        plain("four").commit(true).unwrap();
        assert_eq!((std::fs::read(&target).unwrap(), names()), (b"four".to_vec(), 1));
    }

    fn staged(target: &Path, overwrite: bool) -> Result<StagedDir> {
        StagedDir::create(Arc::new(LocalStore), target, overwrite)
    }

    fn path(text: &str) -> RelPath {
        RelPath::new(text).unwrap()
    }

    fn fill(mut dir: StagedDir, text: &str) -> StagedDir {
        dir.dir(&path("a/b")).unwrap();
        dir.write(&path("a/b/file"), text.as_bytes(), true).unwrap();
        dir
    }

    #[test]
    fn a_directory_appears_whole_or_not_at_all() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("deep/er/run7");
        let read = || std::fs::read_to_string(target.join("a/b/file"));
        let names = || std::fs::read_dir(target.parent().unwrap()).unwrap().count();
        drop(fill(staged(&target, false).unwrap(), "one"));
        assert_eq!(names(), 0, "a dropped save leaves nothing");
        let dir = fill(staged(&target, false).unwrap(), "one");
        assert!(read().is_err() && dir.path().file_name().unwrap().to_str().unwrap().contains(".orbax-checkpoint-tmp"));
        let rival = fill(staged(&target, false).unwrap(), "two");
        dir.commit(true).unwrap();
        assert_eq!(read().unwrap(), "one");
        assert_eq!(rival.commit(true).unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!((read().unwrap().as_str(), names()), ("one", 1), "the loser destroyed nothing and left nothing");
        assert_eq!(staged(&target, false).unwrap_err().kind(), ErrorKind::Exists);
        fill(staged(&target, true).unwrap(), "three").commit(false).unwrap();
        assert_eq!((read().unwrap().as_str(), names()), ("three", 1));
        std::fs::write(home.path().join("plain"), "").unwrap();
        assert_eq!(staged(&home.path().join("plain"), true).unwrap_err().kind(), ErrorKind::Exists);
    }

    /// A file system that cannot exchange names.
    #[derive(Debug)]
    struct Plain;

    impl Store for Plain {
        fn create_dir(&self, path: &Path) -> io::Result<()> {
            LocalStore.create_dir(path)
        }
        fn create(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
            LocalStore.create(path)
        }
        fn sync_dir(&self, path: &Path) -> io::Result<()> {
            LocalStore.sync_dir(path)
        }
        fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
            LocalStore.rename_new(from, to)
        }
        fn exchange(&self, _: &Path, _: &Path) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn remove_file(&self, path: &Path) -> io::Result<()> {
            LocalStore.remove_file(path)
        }
        fn remove_dir(&self, path: &Path) -> io::Result<()> {
            LocalStore.remove_dir(path)
        }
    }

    /// Two savers that both may overwrite: the second one to finish does not take away what the first has finished.
    #[test]
    fn only_what_was_there_at_the_start_is_replaced() {
        for store in [Arc::new(LocalStore) as Arc<dyn Store>, Arc::new(Plain)] {
            let home = tempfile::tempdir().unwrap();
            let target = home.path().join("run");
            let begin = |text| fill(StagedDir::create(Arc::clone(&store), &target, true).unwrap(), text);
            for before in ["none", "old"] {
                let (first, second) = (begin("first"), begin("second"));
                first.commit(true).unwrap();
                assert_eq!(second.commit(true).unwrap_err().kind(), ErrorKind::Exists, "{before}");
                assert_eq!(std::fs::read_to_string(target.join("a/b/file")).unwrap(), "first");
                assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
            }
            // What is gone meanwhile is nothing to lose.
            let third = begin("third");
            std::fs::remove_dir_all(&target).unwrap();
            third.commit(true).unwrap();
        }
    }

    #[test]
    fn a_link_is_removed_and_not_followed() {
        let home = tempfile::tempdir().unwrap();
        let (real, link) = (home.path().join("real"), home.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::fs::write(real.join("file"), "kept").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        remove_tree(&LocalStore, &link).unwrap();
        assert!(real.join("file").exists() && std::fs::symlink_metadata(&link).is_err());
    }

    #[test]
    fn without_exchange_the_old_one_is_moved_aside() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("run");
        for text in ["one", "two"] {
            fill(StagedDir::create(Arc::new(Plain), &target, true).unwrap(), text).commit(true).unwrap();
            assert_eq!(std::fs::read_to_string(target.join("a/b/file")).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_are_those_that_nobody_works_on() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("run");
        let living = staged(&target, false).unwrap();
        assert!(leftovers(home.path()).unwrap().is_empty());
        let dead = home.path().join("run.orbax-checkpoint-tmp-touchdown-00");
        std::fs::create_dir(&dead).unwrap();
        std::fs::create_dir(home.path().join(".touchdown-old-a-b-00")).unwrap();
        let found = leftovers(home.path()).unwrap();
        let short: Vec<_> = found.iter().map(|one| (one.kind, one.name.as_str())).collect();
        assert_eq!(short, [(LeftoverKind::Replaced, "a-b"), (LeftoverKind::Staging, "run")]);
        found.iter().for_each(|one| remove_leftover(&LocalStore, one).unwrap());
        assert!(!dead.exists() && living.path().exists());
    }
}
