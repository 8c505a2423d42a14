//! What crashes left in a root, and what a writer does with it: found first, so that a dry run can tell; then done.

use std::collections::HashSet;
use std::io::ErrorKind::AlreadyExists;
use std::path::{Path, PathBuf};

use super::names::StepNames;
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::{Leftover, LeftoverKind, Store, leftovers};
use crate::layout::orbax::checkpoint;
use crate::relpath::RelPath;

/// What is left of the steps of one series, and of the root's metadata.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    /// What an interrupted overwrite has moved aside, and the name that it gets back.
    pub(super) put_back: Vec<(PathBuf, PathBuf)>,
    /// What is removed.
    pub(super) left: Vec<PathBuf>,
}

impl Recovery {
    /// Finds it. Only reads.
    ///
    /// # Errors
    /// A root that cannot be listed.
    pub(super) fn find(root: &Path, names: &StepNames) -> Result<Self> {
        let mut found = Self::default();
        let is_ours = |left: &Leftover| left.name == checkpoint::ROOT_METADATA_DIR || names.step(&left.name).is_some();
        found.sort(root, is_ours)?;
        let metadata = root.join(checkpoint::ROOT_METADATA_DIR);
        if metadata.is_dir() {
            found.sort(&metadata, |_| true)?;
        }
        Ok(found)
    }

    /// Sorts what is left in a directory.
    fn sort(&mut self, dir: &Path, is_ours: impl Fn(&Leftover) -> bool) -> Result<()> {
        let mut taken: HashSet<PathBuf> = HashSet::new();
        for leftover in leftovers(dir).map_err(|error| failed(error, dir))?.into_iter().filter(is_ours) {
            let target = dir.join(&leftover.name);
            // If there is one of that name, the new one is in place.
            let is_free = std::fs::symlink_metadata(&target).is_err();
            if leftover.kind == LeftoverKind::Replaced && is_free && taken.insert(target.clone()) {
                self.put_back.push((leftover.path, target));
            } else {
                self.left.push(leftover.path);
            }
        }
        Ok(())
    }

    /// The directories that get their names back, with these: both are relative to the root.
    pub(super) fn renamed(&self, root: &Path) -> Vec<(RelPath, String)> {
        let dirs = self.put_back.iter().filter(|(from, to)| from.is_dir() && to.parent() == Some(root));
        let renamed = dirs.filter_map(|(from, to)| {
            let from = RelPath::new(from.file_name()?.as_encoded_bytes()).ok()?;
            Some((from, to.file_name()?.to_str()?.to_owned()))
        });
        renamed.collect()
    }

    /// Puts back what is to be. What has found its name taken by then is left over; what else is left is still to be removed.
    ///
    /// # Errors
    /// Whatever the file system refuses: a step that is not in its place must not be taken for one that is gone.
    pub(super) fn put_back(mut self, store: &dyn Store) -> Result<Self> {
        for (from, to) in std::mem::take(&mut self.put_back) {
            match store.rename_new(&from, &to) {
                Ok(()) => {
                    tracing::warn!(path = %from.display(), name = %to.display(), "put back what an interrupted overwrite had moved aside");
                    self.put_back.push((from, to));
                }
                Err(error) if error.kind() == AlreadyExists => self.left.push(from),
                Err(error) => return Err(failed(error, &from)),
            }
        }
        Ok(self)
    }
}

fn failed(error: std::io::Error, path: &Path) -> Error {
    Error::new(ErrorKind::Io, "cannot tidy up after a crash").at("path", path.display()).caused_by(error)
}
