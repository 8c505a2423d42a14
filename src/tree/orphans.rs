//! Bytes of an item that nothing leads to: what earlier commits of a database left behind, chunks outside their array's grid, keys
//! that belong to no leaf.
//!
//! They are no damage, and normal in a database that was written in several commits.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use super::catalog::META_KEYS;
use super::checkpoint::ask;
use super::land::usize_of;
use crate::error::Result;
use crate::io::{OpenFile, Root, read_error};
use crate::kv::{Index, Value, ocdbt};
use crate::limits::ALIGN_BYTES;
use crate::need::EntryKind;
use crate::plan::{Plan, StoredArray, Values};
use crate::relpath::RelPath;

/// Bytes of a file that nothing refers to, or a value that no leaf has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// The file; the database of a value that lies in its nodes.
    pub path: String,
    /// How many of its bytes.
    pub bytes: u64,
    /// The key in the database, if it is a value.
    pub key: Option<String>,
}

/// Ranges that are referred to: first and one past the last byte.
type Used = BTreeMap<RelPath, Vec<(u64, u64)>>;

/// The orphans of an item, sorted by file. `plans` are those of these whole arrays.
pub(super) fn orphans(root: &Root, dir: &RelPath, arrays: &[&StoredArray], plans: &[Plan]) -> Result<Vec<Orphan>> {
    let mut used = Used::new();
    let mut dirs = BTreeSet::new();
    for database in databases(root, dir)? {
        dirs.insert(database.join("d")?);
        // What cannot be read leads nowhere; that the item's own database is damaged is told elsewhere.
        let scanned = ask(root, |asker| async move { ocdbt::scan(&asker, &database).await });
        let Ok(Some(scanned)) = scanned else { continue };
        for (file, offset, len) in scanned.nodes {
            used.entry(file).or_default().push((offset, offset.saturating_add(len)));
        }
        for (_, value) in scanned.index.entries() {
            if let Value::Extent(extent) = value {
                let range = (extent.offset, extent.offset.saturating_add(extent.len));
                used.entry(scanned.index.file(extent.file).clone()).or_default().push(range);
            }
        }
    }
    let mut found = Vec::new();
    for dir in dirs {
        for entry in root.list(&dir)?.unwrap_or_default().iter().filter(|entry| entry.kind == EntryKind::File) {
            let path = dir.join(&entry.name)?;
            let Some(file) = root.file(&path)? else { continue };
            let bytes = unused(root, &file, used.remove(&path).unwrap_or_default())?;
            found.extend((bytes > 0).then(|| Orphan { path: root.shown(&path), bytes, key: None }));
        }
    }
    let chunks: BTreeSet<&RelPath> = plans.iter().flat_map(|plan| &plan.files).collect();
    for array in arrays {
        if let Values::Directory(dir) = &array.values {
            files(root, dir, array.meta.shape.len() + 1, &mut |path, size| {
                let name = path.as_path().file_name().map(|name| name.to_string_lossy().into_owned());
                let known = chunks.contains(path) || META_KEYS.iter().any(|meta| name.as_deref() == Some(meta));
                found.extend((!known).then(|| Orphan { path: root.shown(path), bytes: size, key: None }));
            })?;
        }
    }
    found.sort_by(|a, b| (&a.path, &a.key).cmp(&(&b.path, &b.key)));
    found.dedup();
    Ok(found)
}

/// The values of an item's database that are of no array of these: what stands under other names, and chunks outside their array.
pub(super) fn values_without_leaf(root: &Root, dir: &RelPath, arrays: &[&StoredArray]) -> Vec<Orphan> {
    let mut owners: HashMap<&[u8], &StoredArray> = HashMap::new();
    let mut database = None;
    for array in arrays {
        if let Values::Keys { index, prefix } = &array.values {
            owners.insert(prefix, array);
            database = Some(index);
        }
    }
    let owned = |key: &[u8]| {
        // Names may lie below each other, so every part of the key may be one.
        let cuts =
            std::iter::once(0).chain(key.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at + 1));
        cuts.filter_map(|cut| Some((owners.get(&key[..cut])?, std::str::from_utf8(&key[cut..]).ok()?))).any(
            |(array, rest)| {
                let meta = &array.meta;
                let is_chunk = |position: Vec<u64>| {
                    meta.grid.clipped(&position, &meta.shape).is_some_and(|region| !region.is_empty())
                };
                META_KEYS.contains(&rest) || meta.keys.position(rest, meta.shape.len()).is_some_and(is_chunk)
            },
        )
    };
    let entries = database.into_iter().flat_map(|index| index.entries().iter().map(move |entry| (index, entry)));
    let lost = entries.filter(|(_, (key, _))| !owned(key));
    let orphan = |(index, (key, value)): (&Arc<Index>, &(Bytes, Value))| {
        let (path, bytes) = match value {
            Value::Inline(bytes) => (dir, bytes.len() as u64),
            Value::Extent(extent) => (index.file(extent.file), extent.len),
        };
        Orphan { path: root.shown(path), bytes, key: Some(String::from_utf8_lossy(key).into_owned()) }
    };
    lost.map(orphan).collect()
}

/// The directories of an item's databases: its own, and those of the processes that wrote it.
fn databases(root: &Root, dir: &RelPath) -> Result<Vec<RelPath>> {
    let mut found = vec![dir.clone()];
    for entry in root.list(dir)?.unwrap_or_default() {
        if entry.kind == EntryKind::Dir && entry.name.starts_with("ocdbt.process_") {
            found.push(dir.join(&entry.name)?);
        }
    }
    Ok(found)
}

/// How many bytes of a file lie in no range. Gaps of zeros that are shorter than a page are padding.
fn unused(root: &Root, file: &OpenFile, mut ranges: Vec<(u64, u64)>) -> Result<u64> {
    ranges.sort_unstable();
    ranges.push((file.size(), file.size()));
    let (mut at, mut count) = (0, 0);
    for (start, end) in ranges {
        let gap = start.min(file.size()).saturating_sub(at);
        let padding = gap < ALIGN_BYTES && {
            let mut bytes = vec![0; usize_of(gap)?];
            file.file()
                .read_exact_at(&mut bytes, at)
                .map_err(|error| read_error(error, &root.shown(file.path()), at, gap, file.size()))?;
            bytes.iter().all(|byte| *byte == 0)
        };
        count += if padding { 0 } else { gap };
        at = at.max(end);
    }
    Ok(count)
}

/// The files below a directory, no deeper than chunks of an array lie. Links to directories are not followed: they
/// could lead back.
fn files(root: &Root, dir: &RelPath, depth: usize, found: &mut impl FnMut(&RelPath, u64)) -> Result<()> {
    for entry in root.list(dir)?.unwrap_or_default() {
        let path = dir.join(&entry.name)?;
        match entry.kind {
            EntryKind::Dir if depth > 0 && !root.is_link(&path)? => files(root, &path, depth - 1, found)?,
            EntryKind::File => {
                if let Some(file) = root.file(&path)? {
                    found(&path, file.size());
                }
            }
            EntryKind::Dir | EntryKind::Other => {}
        }
    }
    Ok(())
}
