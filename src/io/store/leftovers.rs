//! What crashed saves left behind.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::names::{REPLACED, STAGING, part_of};
use super::remove::remove_any;
use super::{Store, failed};
use crate::error::Result;

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

/// Whether a living saver holds the directory.
fn is_locked(path: &Path) -> bool {
    File::open(path).is_ok_and(|dir| matches!(dir.try_lock(), Err(TryLockError::WouldBlock)))
}
