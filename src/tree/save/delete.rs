//! Deleting checkpoints and items.
//!
//! What is deleted first gets a name that readers ignore, in one step, and is then removed: a delete that stops half-way leaves
//! no half checkpoint behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};
use crate::io::store::{deleted_name, remove_tree};
use crate::io::{LocalStore, Store};
use crate::layout::Format;
use crate::layout::orbax::sums::{SUMS_FILE, Sums};
use crate::layout::orbax::{checkpoint, json};
use crate::tree::OpenOptions;
use crate::tree::checkpoint::{describe, describe_listed};

/// Removes a checkpoint: an Orbax directory, a root of steps with all of them, or safetensors.
///
/// # Errors
/// A path that is no checkpoint, a symbolic link (nothing is removed then), or one that cannot be removed.
pub fn delete(path: impl AsRef<Path>) -> Result<()> {
    let path = &refuse_link(path.as_ref())?;
    // Whatever it is, it must be one of ours to delete.
    describe_listed(path, &OpenOptions { force: true, ..OpenOptions::default() }, &BTreeMap::new())?;
    if path.is_dir() {
        return remove_directory(&LocalStore, path);
    }
    LocalStore.remove_file(path).map_err(|error| failed(error, path))
}

/// Removes one item of a checkpoint of several.
///
/// # Errors
/// No such item, the only item (delete the checkpoint), or one that cannot be removed.
pub fn delete_item(path: impl AsRef<Path>, name: &str) -> Result<()> {
    let path = &refuse_link(path.as_ref())?;
    let (_, description) = describe(path, &OpenOptions::default())?;
    let names: Vec<&str> = description.items.iter().map(|item| item.name.as_str()).collect();
    let item = description.items.iter().find(|item| item.name == name);
    let (Some(item), false) = (item, description.format == Format::Safetensors || name.is_empty()) else {
        return Err(Error::invalid("there is no such item")
            .at("checkpoint", path.display())
            .expected(format_args!("one of {}", names.join(", ")))
            .found(name));
    };
    if names.len() == 1 {
        return Err(Error::invalid("it is the checkpoint's only item")
            .at("item", name)
            .at("checkpoint", path.display())
            .hint("delete the checkpoint"));
    }
    let dir = refuse_link(&path.join(item.dir.as_path()))?;
    let Some(checkpoint_dir) = dir.parent() else { return Err(Error::bug("an item without a checkpoint")) };
    // In this order: an item that the metadata list and that is missing would be damage.
    forget_item(&checkpoint_dir.join(checkpoint::METADATA_FILE), name)?;
    // Beside the checkpoint: within it every directory is an item to Orbax, whatever its name.
    let removed = deleted_name(checkpoint_dir)?;
    match LocalStore.rename_new(&dir, &removed) {
        // The metadata alone had it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|error| failed(error, &dir))?,
    }
    remove_tree(&LocalStore, &removed).map_err(|error| failed(error, &removed))
}

/// Removes a directory, which first vanishes from readers in one step.
///
/// # Errors
/// Whatever the file system refuses.
pub(in crate::tree) fn remove_directory(store: &dyn Store, dir: &Path) -> Result<()> {
    let removed = set_aside(store, dir)?;
    remove_tree(store, &removed).map_err(|error| failed(error, &removed))
}

/// Renames a directory to what readers ignore.
fn set_aside(store: &dyn Store, dir: &Path) -> Result<PathBuf> {
    let aside = deleted_name(dir)?;
    store.rename_new(dir, &aside).map_err(|error| failed(error, dir))?;
    Ok(aside)
}

/// The path without trailing slashes, which would hide that it is a link. Links are not followed: what they point to may be
/// somebody else's.
fn refuse_link(path: &Path) -> Result<PathBuf> {
    let path: PathBuf = path.components().collect();
    match std::fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_symlink() => Err(Error::invalid("it is a symbolic link, which is not followed")
            .at("path", path.display())
            .hint("delete what it points to, or remove the link itself")),
        _ => Ok(path),
    }
}

/// Takes an item out of the checkpoint's metadata, if there is any, and keeps the checksum with it.
fn forget_item(file: &Path, name: &str) -> Result<()> {
    let bytes = match std::fs::read(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|error| failed(error, file))?,
    };
    let mut document =
        json::parse(&bytes).map_err(|error| Error::corrupt(error.to_string()).at("file", file.display()))?;
    let Some(handlers) = document.get_mut("item_handlers").and_then(Value::as_object_mut) else { return Ok(()) };
    handlers.remove(name);
    let new = json::to_bytes(&document);
    let sums_file = file.with_file_name(SUMS_FILE);
    let sums = match std::fs::remove_file(&sums_file) {
        // Without checksums the file is whole; with those of the old one it would be damaged.
        Ok(()) => {
            if let Some(dir) = file.parent() {
                LocalStore.sync_dir(dir).map_err(|error| failed(error, dir))?;
            }
            let mut sums = Sums::default();
            sums.add(checkpoint::METADATA_FILE, &new);
            Some(sums.to_bytes())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error, &sums_file)),
    };
    replace(file, &new)?;
    sums.map_or(Ok(()), |sums| replace(&sums_file, &sums))
}

/// Gives a file new contents in one step.
fn replace(file: &Path, contents: &[u8]) -> Result<()> {
    let new = deleted_name(file)?;
    let put = || -> std::io::Result<()> {
        let out = LocalStore.create(&new)?;
        out.write_at(contents, 0)?;
        out.sync()?;
        std::fs::rename(&new, file)
    };
    put().map_err(|error| failed(error, file))
}

fn failed(error: std::io::Error, path: &Path) -> Error {
    let what = match error.kind() {
        std::io::ErrorKind::NotFound => "it is gone already",
        _ => "cannot remove it",
    };
    Error::new(ErrorKind::Io, what).at("path", path.display()).caused_by(error)
}
