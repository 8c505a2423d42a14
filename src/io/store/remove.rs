//! Removing what is there.

use std::io;
use std::path::Path;

use super::Store;

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

/// Removes a file, or a directory and what is in it.
pub(super) fn remove_any(store: &dyn Store, path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => store.remove_file(path),
        _ => remove_tree(store, path),
    }
}
