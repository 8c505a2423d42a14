//! A checkpoint whose save never merged the databases of its processes becomes one that Orbax loads: a copy, with the missing
//! manifest.
//!
//! The copy appears whole or not at all, and the original is only read. Values stay where they are in the copy; what is new are
//! nodes that refer to them, and the manifest.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::checkpoint::{OpenOptions, ask, describe};
use super::land::usize_of;
use super::save::{SaveOptions, Written, write_database};
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::is_staging;
use crate::io::{OpenFile, Root, StagedDir, read_error, short_file};
use crate::kv::{FileId, Index, Value, ocdbt};
use crate::layout::{Format, ItemKind, LayoutKind};
use crate::limits::{DIR_ENTRIES_MAX, SLOT_BYTES};
use crate::need::{DirEntry, EntryKind};
use crate::relpath::RelPath;

/// What [`repair`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// The items whose databases were merged.
    pub items: Vec<String>,
    /// Their keys.
    pub keys: u64,
    /// Files that were copied.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Copies a checkpoint and gives every item whose processes' databases were never merged the manifest that it lacks. `stop` is
/// asked between pieces of files; if it says so, nothing is left behind. Of `save` only the store and whether to sync matter.
///
/// # Errors
/// A path without an Orbax checkpoint; one that lacks no manifest; references to what is not there; a destination that exists or
/// lies in the source; whatever the file system refuses; [`ErrorKind::Cancelled`] if it was stopped.
pub fn repair(
    from: &Path,
    to: &Path,
    options: &OpenOptions,
    save: &SaveOptions,
    stop: &dyn Fn() -> bool,
) -> Result<Repaired> {
    let (root, description) = describe(from, options)?;
    let refused = |what: &str| Error::invalid(what.to_owned()).at("path", from.display());
    if description.format == Format::Safetensors {
        return Err(refused("safetensors have no manifest").expected("an Orbax checkpoint"));
    }
    if description.layout == LayoutKind::Steps {
        return Err(refused("a root of steps is not repaired at once").hint("give the directory of one step"));
    }
    let wanted = |name: &str| options.item.as_ref().is_none_or(|item| item == name);
    let trees = description.items.iter().filter(|item| item.kind == ItemKind::Tree && wanted(&item.name));
    let mut unmerged = Vec::new();
    for item in trees {
        if let Some(index) = merged(&root, &item.dir)? {
            references(&root, &index).map_err(|error| error.at("item", &item.name))?;
            unmerged.push((item, index));
        }
    }
    if unmerged.is_empty() {
        return Err(refused("nothing is to be repaired")
            .expected("an item with `ocdbt.process_*` and without `manifest.ocdbt`")
            .hint("`touchdown verify` lists what else is wrong"));
    }
    refuse_inside(from, to)?;
    let mut staged = StagedDir::create(Arc::clone(&save.store), to, false)?;
    let mut repaired = Repaired::default();
    let mut copy = Copy { root: &root, staged: &mut staged, save, stop, repaired: &mut repaired, entries: 0 };
    copy.directory(&RelPath::root())?;
    for (item, index) in unmerged {
        staged.dir(&item.dir)?;
        repaired.keys += index.entries().len() as u64;
        repaired.items.push(item.name.clone());
        let (files, entries) = (index.files().to_vec(), index.entries().to_vec());
        let written = Written { files, entries, ..Written::default() };
        write_database(&mut staged, &item.dir, written, save)?;
    }
    staged.commit(save.sync)?;
    Ok(repaired)
}

/// Every key of an item whose databases were not merged.
fn merged(root: &Root, dir: &RelPath) -> Result<Option<Index>> {
    let listing = root.list(dir)?.unwrap_or_default();
    if listing.iter().any(|entry| entry.name == "manifest.ocdbt") {
        return Ok(None);
    }
    let is_process = |entry: &&DirEntry| entry.kind == EntryKind::Dir && entry.name.starts_with("ocdbt.process_");
    let roots = listing.iter().filter(is_process).map(|entry| dir.join(&entry.name)).collect::<Result<Vec<_>, _>>()?;
    if roots.is_empty() {
        return Ok(None);
    }
    let union = ask(root, |asker| async move { ocdbt::scan_processes(&asker, &roots).await })?;
    Ok(union.map(|union| union.index))
}

/// Checks that every value is there: a manifest says that a checkpoint is whole.
fn references(root: &Root, index: &Index) -> Result<()> {
    let mut sizes: HashMap<FileId, u64> = HashMap::new();
    for (key, value) in index.entries() {
        let Value::Extent(extent) = value else { continue };
        let shown = root.shown(index.file(extent.file));
        let at_key = |error: Error| error.at("key", String::from_utf8_lossy(key));
        let size = match sizes.get(&extent.file) {
            Some(size) => *size,
            None => {
                let missing = || Error::not_found("a data file of the checkpoint is missing").at("file", &shown);
                let file = root.file(index.file(extent.file))?.ok_or_else(missing).map_err(at_key)?;
                sizes.insert(extent.file, file.size());
                file.size()
            }
        };
        if extent.offset.checked_add(extent.len).is_none_or(|end| end > size) {
            return Err(at_key(short_file(&shown, extent.offset, extent.len, size)));
        }
    }
    Ok(())
}

/// Refuses a destination below the source, which would be copied into itself.
fn refuse_inside(from: &Path, to: &Path) -> Result<()> {
    let absolute = |path: &Path| std::path::absolute(path).ok();
    let source = std::fs::canonicalize(from).ok();
    let ends = [absolute(from), source];
    let to = absolute(to);
    let there = to.iter().flat_map(|to| to.ancestors()).flat_map(|dir| [Some(dir.to_owned()), dir.canonicalize().ok()]);
    let mut there = there.flatten();
    if there.any(|dir| ends.iter().flatten().any(|end| *end == dir)) {
        return Err(Error::invalid("the destination lies in the source")
            .at("path", from.display())
            .hint("a checkpoint is never repaired in place: choose a directory beside it"));
    }
    Ok(())
}

/// A copy of a checkpoint at work.
struct Copy<'a> {
    root: &'a Root,
    staged: &'a mut StagedDir,
    save: &'a SaveOptions,
    stop: &'a dyn Fn() -> bool,
    repaired: &'a mut Repaired,
    entries: usize,
}

impl Copy<'_> {
    fn directory(&mut self, dir: &RelPath) -> Result<()> {
        for DirEntry { name, kind } in self.root.list(dir)?.unwrap_or_default() {
            let path = dir.join(&name)?;
            let shown = self.root.shown(&path);
            self.entries += 1;
            if self.entries > DIR_ENTRIES_MAX {
                return Err(Error::corrupt("a checkpoint has too many files")
                    .at("file", shown)
                    .expected(format_args!("at most {DIR_ENTRIES_MAX}")));
            }
            match kind {
                EntryKind::Dir if is_staging(&name) => {}
                EntryKind::Dir => {
                    // Through links a directory may contain itself.
                    if std::fs::symlink_metadata(&shown).is_ok_and(|found| found.is_symlink()) {
                        return Err(Error::corrupt("a link to a directory is not copied").at("file", shown));
                    }
                    self.staged.dir(&path)?;
                    self.directory(&path)?;
                }
                EntryKind::File => {
                    let gone = || Error::not_found("a file vanished while it was copied").at("file", &shown);
                    let file = self.root.file(&path)?.ok_or_else(gone)?;
                    self.file(&file, &path)?;
                }
                EntryKind::Other => {
                    return Err(Error::corrupt("a file of the checkpoint is no regular file").at("file", shown));
                }
            }
        }
        Ok(())
    }

    fn file(&mut self, file: &OpenFile, path: &RelPath) -> Result<()> {
        let new = self.staged.file(path)?;
        let mut piece = vec![0; usize_of(file.size().min(SLOT_BYTES as u64))?];
        let mut at = 0;
        while at < file.size() {
            if (self.stop)() {
                return Err(Error::new(ErrorKind::Cancelled, "the repair was cancelled"));
            }
            let part = usize_of((file.size() - at).min(piece.len() as u64))?;
            file.file()
                .read_exact_at(&mut piece[..part], at)
                .map_err(|error| read_error(error, &self.root.shown(path), at, part as u64, file.size()))?;
            new.write_at(&piece[..part], at).map_err(|error| self.staged.failed(error, "write", path))?;
            at += part as u64;
        }
        if self.save.sync {
            new.sync().map_err(|error| self.staged.failed(error, "sync", path))?;
        }
        self.repaired.files += 1;
        self.repaired.bytes += file.size();
        Ok(())
    }
}
