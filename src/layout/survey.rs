//! What directories hold, from their listings and those of the two levels below.
//!
//! A directory is an item if it has files of one (`_METADATA`, `checkpoint`, `manifest.ocdbt`, ..) or children that are
//! zarr arrays, and a composite if it has a marker or children that are items. Listings are asked for level by level, one
//! batch each, and kept, so that a root's grandchildren are its steps' children without a second look.

use std::collections::HashMap;

use super::batch::{has_dir, has_file, kind, lists};
use super::orbax::sums::SUMS_FILE;
use super::orbax::tree::{JSON_FILES, METADATA_FILE, MSGPACK_FILE};
use super::orbax::{checkpoint, step};
use super::{Item, ItemKind};
use crate::error::Result;
use crate::limits::PROBED_DIRS_MAX;
use crate::need::{Asker, DirEntry, EntryKind, Need};
use crate::relpath::RelPath;

/// What a directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// It is an item itself.
    Item(ItemKind),
    /// Its children are items.
    Composite(Composite),
    /// Nothing that belongs to a checkpoint.
    Nothing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Composite {
    /// Every child directory that is not reserved or unfinished, and the items one level further down.
    pub(super) items: Vec<Item>,
    /// The names of items whose save was not finished.
    pub(super) unfinished: Vec<String>,
}

/// The listings so far.
pub(super) struct Survey<'a> {
    ask: &'a Asker,
    seen: HashMap<RelPath, Option<Vec<DirEntry>>>,
    /// The directories that cannot be listed, and why: links that leave, no permission.
    refused: Vec<(RelPath, String)>,
}

impl<'a> Survey<'a> {
    pub(super) fn new(ask: &'a Asker) -> Self {
        Self { ask, seen: HashMap::new(), refused: Vec::new() }
    }

    /// Lists those directories that were not listed before, in one batch, up to the limit for all batches together.
    pub(super) async fn list(&mut self, dirs: Vec<RelPath>) -> Result<()> {
        let mut dirs: Vec<RelPath> = dirs.into_iter().filter(|dir| !self.seen.contains_key(dir)).collect();
        dirs.truncate(PROBED_DIRS_MAX.saturating_sub(self.seen.len()));
        let listings = lists(self.ask, dirs.iter().cloned()).await?;
        for (dir, listing) in dirs.into_iter().zip(listings) {
            let entries = listing.unwrap_or_else(|reason| {
                self.refused.push((dir.clone(), reason));
                None
            });
            self.seen.insert(dir, entries);
        }
        Ok(())
    }

    /// Why a directory, or one of those that were listed in it, cannot be listed.
    pub(super) fn refusal(&self, dir: &RelPath) -> Option<&str> {
        let within = |(refused, _): &&(RelPath, String)| refused.as_path().starts_with(dir.as_path());
        self.refused.iter().find(within).map(|(_, reason)| reason.as_str())
    }

    /// Fails as the directories in this one do that cannot be listed.
    pub(super) async fn insist(&self, dir: &RelPath) -> Result<()> {
        let within = self.refused.iter().filter(|(refused, _)| refused.as_path().starts_with(dir.as_path()));
        self.ask.ask(within.map(|(path, _)| Need::List { path: path.clone() }).collect()).await.map(drop)
    }

    /// The entries of a directory that was listed; `None` if it does not exist or was not listed.
    pub(super) fn entries(&self, dir: &RelPath) -> Option<&[DirEntry]> {
        self.seen.get(dir)?.as_deref()
    }

    /// Finds out what these directories hold, in at most three batches.
    pub(super) async fn classify(&mut self, dirs: &[RelPath]) -> Result<Vec<Holds>> {
        self.list(dirs.to_vec()).await?;
        let unclear = |survey: &Self, dir: &RelPath| !survey.is_tree_by_its_files(dir);
        let open: Vec<RelPath> = dirs.iter().filter(|dir| unclear(self, dir)).cloned().collect();
        self.list(open.iter().flat_map(|dir| self.children(dir)).map(|(_, path)| path).collect()).await?;
        let open: Vec<RelPath> = open.into_iter().filter(|dir| !self.has_arrays(dir)).collect();
        let children = open.iter().flat_map(|dir| self.children(dir)).map(|(_, path)| path);
        let children: Vec<RelPath> = children.filter(|dir| unclear(self, dir)).collect();
        self.list(children.iter().flat_map(|dir| self.children(dir)).map(|(_, path)| path).collect()).await?;
        Ok(dirs.iter().map(|dir| self.holds(dir)).collect())
    }

    /// The child directories that may be items or steps: neither reserved nor unfinished.
    pub(super) fn children(&self, dir: &RelPath) -> Vec<(String, RelPath)> {
        let dirs = self.entries(dir).unwrap_or_default().iter().filter(|entry| entry.kind == EntryKind::Dir);
        let names = dirs.map(|entry| &entry.name).filter(|name| !step::is_reserved(name) && !step::is_temporary(name));
        // A name that a listing gave is a good path, unless the whole is too long to be opened anyway.
        names.filter_map(|name| Some((name.clone(), dir.join(name).ok()?))).collect()
    }

    /// Whether this directory is a tree item, as far as the listings tell.
    pub(super) fn is_tree(&self, dir: &RelPath) -> bool {
        self.is_tree_by_its_files(dir) || self.has_arrays(dir)
    }

    fn holds(&self, dir: &RelPath) -> Holds {
        if self.is_tree(dir) {
            return Holds::Item(ItemKind::Tree);
        }
        let entries = self.entries(dir).unwrap_or_default();
        let mut items = Vec::new();
        for (name, path) in self.children(dir) {
            let kind = self.item_kind(&path);
            let below = if kind == ItemKind::Other { self.children(&path) } else { Vec::new() };
            items.push(Item { name: name.clone(), kind, dir: path });
            // Random-key items keep a tree and a JSON item in one directory.
            items.extend(below.into_iter().filter_map(|(below, path)| match self.item_kind(&path) {
                ItemKind::Other => None,
                kind => Some(Item { name: format!("{name}/{below}"), kind, dir: path }),
            }));
        }
        let has_tree = items.iter().any(|item| item.kind == ItemKind::Tree);
        if has_tree || has_marker(entries) {
            let unfinished = entries.iter().filter_map(|entry| step::finished_name(&entry.name));
            let unfinished = unfinished.filter(|name| !has_dir(entries, name)).map(str::to_owned).collect();
            return Holds::Composite(Composite { items, unfinished });
        }
        match self.item_kind(dir) {
            ItemKind::Other => Holds::Nothing,
            kind => Holds::Item(kind),
        }
    }

    fn item_kind(&self, dir: &RelPath) -> ItemKind {
        let entries = self.entries(dir).unwrap_or_default();
        let only_json = |entry: &DirEntry| {
            JSON_FILES.contains(&entry.name.as_str())
                || [checkpoint::COMMIT_FILE, SUMS_FILE].contains(&entry.name.as_str())
        };
        if self.is_tree(dir) {
            ItemKind::Tree
        } else if JSON_FILES.iter().any(|name| has_file(entries, name)) && entries.iter().all(only_json) {
            ItemKind::Json
        } else {
            ItemKind::Other
        }
    }

    fn is_tree_by_its_files(&self, dir: &RelPath) -> bool {
        self.entries(dir).is_some_and(|entries| {
            let is_process = |entry: &DirEntry| entry.kind == EntryKind::Dir && entry.name.starts_with(PROCESS_DIR);
            kind(entries, METADATA_FILE).is_some()
                || has_file(entries, MSGPACK_FILE)
                || has_file(entries, MANIFEST_FILE)
                || is_array(entries)
                || entries.iter().any(is_process)
        })
    }

    /// Whether a child is an array. One that also has a tree's metadata is an item whose only leaf lies in its own directory.
    fn has_arrays(&self, dir: &RelPath) -> bool {
        let is_plain_array = |entries| is_array(entries) && kind(entries, METADATA_FILE).is_none();
        self.children(dir).iter().any(|(_, child)| self.entries(child).is_some_and(is_plain_array))
    }
}

/// Whether a listing has a file that marks a checkpoint directory.
pub(super) fn has_marker(entries: &[DirEntry]) -> bool {
    has_file(entries, checkpoint::METADATA_FILE) || has_file(entries, checkpoint::V1_MARKER)
}

fn is_array(entries: &[DirEntry]) -> bool {
    has_file(entries, ".zarray") || has_file(entries, "zarr.json")
}

/// The root manifest of an OCDBT database.
pub(super) const MANIFEST_FILE: &str = "manifest.ocdbt";
/// How the directories of the processes' own databases begin.
pub(super) const PROCESS_DIR: &str = "ocdbt.process_";
