//! One item: `_METADATA`, the msgpack file, strings, shardings and key types, combined into a list of leaves.

use std::collections::HashMap;

use bytes::Bytes;
use serde_json::Value;

use super::metadata::{Container, TreeMetadata, ValueType, collisions, param_name, shared_names};
use super::msgpack::{self, Node};
use super::sharding::SavedSharding;
use super::sums::{self, SUMS_FILE, Sums, ValueSums};
use super::{array_metadata, json, metadata, sharding, strings};
use crate::error::{Error, Result};
use crate::keypath::{Key, KeyPath};
use crate::layout::batch::{bytes, corrupt, files, has_dir, has_file, kind};
use crate::limits::{METADATA_FILE_BYTES_MAX, MSGPACK_FILE_BYTES_MAX};
use crate::need::{Asker, DirEntry, Need};
use crate::relpath::RelPath;

/// What an item directory says about its tree.
#[derive(Debug)]
pub enum TreeRead {
    /// Its leaves.
    Tree(Box<TreeItem>),
    /// Neither `_METADATA` nor `checkpoint`: only the stored keys tell what there is.
    NoStructure {
        /// The entries of the item directory.
        listing: Vec<DirEntry>,
        /// Checksums of its values, if it was sealed.
        sums: Option<ValueSums>,
    },
}

/// The leaves of one item.
#[derive(Debug)]
pub struct TreeItem {
    /// The leaves, in the order of the file that names them.
    pub leaves: Vec<StoredLeaf>,
    /// The hint of `_METADATA` whether the arrays lie in an OCDBT database; the files decide.
    pub use_ocdbt: Option<bool>,
    /// The hint of `_METADATA` whether the arrays are zarr v3; the keys decide.
    pub use_zarr3: Option<bool>,
    /// Whether a chunk that is missing is damage and not the fill value.
    pub every_chunk_stored: bool,
    /// The tree's own user metadata.
    pub custom_metadata: Option<Value>,
    /// Which sequences are tuples and which mappings namedtuples, where rich types were saved; sorted by path.
    pub containers: Vec<(KeyPath, Container)>,
    /// Storage names that several leaves share: the data of all but one of them is lost.
    pub collisions: Vec<(String, Vec<KeyPath>)>,
    /// Files that only advise (`_sharding`, `array_metadatas`) and could not be read.
    pub notes: Vec<Error>,
    /// The entries of the item directory.
    pub listing: Vec<DirEntry>,
    /// Checksums of its values, if it was sealed.
    pub sums: Option<ValueSums>,
    /// Checksums of its arrays' metadata, where they are files and have some.
    pub documents: Sums,
}

/// One leaf.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredLeaf {
    /// Where it lies in the tree.
    pub path: KeyPath,
    /// What is stored for it.
    pub kind: StoredKind,
    /// How it was laid out over devices when it was saved.
    pub sharding: Option<SavedSharding>,
    /// The implementation of a typed PRNG key.
    pub key_impl: Option<String>,
    /// The chunks' shape, as it was recorded beside the array's own metadata.
    pub chunk_shape: Option<Vec<u64>>,
}

/// What is stored for a leaf.
#[derive(Clone, Debug, PartialEq)]
pub enum StoredKind {
    /// A zarr array under this parameter name.
    Stored {
        /// The prefix of its keys, without the `/`.
        name: String,
        /// What it was in memory; unknown in files before 0.4.3.
        value_type: Option<ValueType>,
    },
    /// A string, and its text.
    Text(String),
    /// None.
    None,
    /// A container without elements.
    Empty(Container),
    /// A value in the msgpack file.
    Inline(Node),
    /// A leaf that cannot be read, and why; the others can.
    Unsupported {
        /// What `_METADATA` says it is; empty where nothing says so.
        value_type: String,
        /// Why it cannot be read.
        reason: String,
    },
}

/// The name of the legacy msgpack file.
pub const MSGPACK_FILE: &str = "checkpoint";
/// The name of the tree's metadata file.
pub const METADATA_FILE: &str = "_METADATA";
/// The file of the shardings with which arrays were saved.
pub const SHARDING_FILE: &str = "_sharding";
/// The file of string leaves.
pub const STRINGS_FILE: &str = "_strings.json";
/// The directory of the records of arrays on devices.
pub const ARRAY_METADATA_DIR: &str = "array_metadatas";
/// The first process's record, and the only one of most items.
pub const FIRST_ARRAY_METADATA_FILE: &str = "array_metadatas/process_0";

/// Reads the structure of the item in this directory, in two batches (three for aggregated or very old items).
///
/// # Errors
/// A directory that does not exist; `_METADATA`, `checkpoint` or `_strings.json` that contradict their format (kind
/// `Corrupt`, with file and offset); a checkpoint of T5X (kind `Unsupported`).
pub async fn read_tree(ask: &Asker, item_dir: &RelPath) -> Result<TreeRead> {
    let Some(listing) = ask.list(item_dir.clone()).await? else {
        return Err(Error::not_found("no such item directory, although the metadata list the item")
            .at("directory", item_dir)
            .hint("it was lost or removed; other items are opened by name (`--item`)"));
    };
    let item = Item { ask, dir: item_dir, listing: &listing };
    let mut parts = item.read_parts().await?;
    let mut notes = Vec::new();
    let mut tree = match (&parts.metadata, &parts.msgpack) {
        (Some(file), _) => item.described_by_metadata(file, &parts).await?,
        (None, Some(file)) => item.described_by_msgpack(file, &parts).await?,
        (None, None) => return Ok(TreeRead::NoStructure { listing, sums: parts.sums }),
    };
    item.add_shardings(&mut tree, &parts, &mut notes);
    item.add_key_types(&mut tree, &parts, &mut notes).await?;
    tree.notes = notes;
    tree.listing = listing;
    tree.sums = parts.sums.take();
    tree.documents = std::mem::take(&mut parts.documents);
    Ok(TreeRead::Tree(Box::new(tree)))
}

/// Reads the value of a JSON item: `data.json` (v1), `metadata` (v0) or `metrics`.
///
/// # Errors
/// None of these files, or one that is no JSON.
pub async fn read_json(ask: &Asker, item_dir: &RelPath) -> Result<Value> {
    Ok(read_json_text(ask, item_dir).await?.0)
}

/// The same, and the text that it has in the file.
///
/// # Errors
/// As [`read_json`].
pub async fn read_json_text(ask: &Asker, item_dir: &RelPath) -> Result<(Value, Bytes)> {
    let paths = JSON_FILES.iter().map(|name| item_dir.join(name)).collect::<Result<Vec<_>, _>>()?;
    let mut read = files(ask, paths.iter().cloned().chain([item_dir.join(SUMS_FILE)?])).await?;
    let sums = read.pop().flatten();
    sums::check(item_dir, sums.as_ref(), JSON_FILES.into_iter().zip(read.iter().map(Option::as_ref)))?;
    let there = read.into_iter().zip(&paths).find_map(|(file, path)| Some((file?, path)));
    if let Some((file, path)) = there {
        let value = json::parse(&file).map_err(|error| corrupt(&error, Some(error.offset), path))?;
        return Ok((value, file));
    }
    let looked_for = JSON_FILES.join(", ");
    Err(Error::not_found("the item has no JSON file")
        .at("directory", item_dir)
        .expected(format_args!("one of {looked_for}")))
}

/// The files that make a JSON item, by preference.
pub const JSON_FILES: [&str; 3] = ["data.json", "metadata", "metrics"];

struct Item<'a> {
    ask: &'a Asker,
    dir: &'a RelPath,
    listing: &'a [DirEntry],
}

/// The files of an item that are there.
#[derive(Default)]
struct Parts {
    metadata: Option<Bytes>,
    msgpack: Option<Bytes>,
    sharding: Option<Bytes>,
    strings: Option<Value>,
    array_metadata: Option<Bytes>,
    sums: Option<ValueSums>,
    documents: Sums,
}

impl Item<'_> {
    async fn read_parts(&self) -> Result<Parts> {
        // A directory of that name is damage, which reading it reports.
        let is_described = kind(self.listing, METADATA_FILE).is_some();
        // With `_METADATA` the msgpack file is wanted only for values that it says are there, and may be large.
        let wants_msgpack = has_file(self.listing, MSGPACK_FILE) && !is_described;
        let is_tree = is_described || wants_msgpack;
        let has = |name: &str| is_tree && has_file(self.listing, name);
        let needs = [
            (is_described, METADATA_FILE, METADATA_FILE_BYTES_MAX),
            (wants_msgpack, MSGPACK_FILE, MSGPACK_FILE_BYTES_MAX),
            (has(SHARDING_FILE), SHARDING_FILE, METADATA_FILE_BYTES_MAX),
            (has(STRINGS_FILE), STRINGS_FILE, METADATA_FILE_BYTES_MAX),
            (is_tree && has_dir(self.listing, ARRAY_METADATA_DIR), FIRST_ARRAY_METADATA_FILE, METADATA_FILE_BYTES_MAX),
            (has_file(self.listing, SUMS_FILE), SUMS_FILE, METADATA_FILE_BYTES_MAX),
        ];
        let wanted = needs.iter().filter(|(wanted, ..)| *wanted);
        let wanted = wanted.map(|&(_, name, max)| Ok(Need::File { path: self.path(name)?, max }));
        let mut answers = self.ask.ask(wanted.collect::<Result<_>>()?).await?.into_iter();
        let mut answer = |wanted: bool| match wanted.then(|| answers.next()).flatten() {
            Some(answer) => bytes(answer),
            None => Ok(None),
        };
        let [metadata, msgpack, sharding, strings, array_metadata, sums] = needs.map(|(wanted, ..)| answer(wanted));
        let (metadata, msgpack, sharding, strings, array_metadata) =
            (metadata?, msgpack?, sharding?, strings?, array_metadata?);
        let checked = [
            (METADATA_FILE, metadata.as_ref()),
            (SHARDING_FILE, sharding.as_ref()),
            (STRINGS_FILE, strings.as_ref()),
            (FIRST_ARRAY_METADATA_FILE, array_metadata.as_ref()),
        ];
        let sums = sums::check(self.dir, sums?.as_ref(), checked)?;
        let (values, documents) = (sums.values(self.dir)?, sums.documents());
        if let Some(values) = &values {
            let path = self.path(MSGPACK_FILE)?;
            match &msgpack {
                Some(file) => values.check_file(&path, file)?,
                // Beside `_METADATA` it may not be wanted.
                None if !is_described && values.has(&path) => {
                    let lost = "a file is missing that was there when the checkpoint was sealed";
                    return Err(Error::not_found(lost).at("file", path));
                }
                None => {}
            }
        }
        let strings = match strings {
            Some(file) => {
                Some(json::parse(&file).map_err(|error| self.corrupt(&error, Some(error.offset), STRINGS_FILE))?)
            }
            None => None,
        };
        Ok(Parts { metadata, msgpack, sharding, strings, array_metadata, sums: values, documents })
    }

    /// The tree that `_METADATA` describes.
    async fn described_by_metadata(&self, file: &[u8], parts: &Parts) -> Result<TreeItem> {
        let metadata = metadata::parse(file).map_err(|error| self.corrupt(&error, error.offset(), METADATA_FILE))?;
        let is_aggregated = metadata.entries.iter().any(|entry| entry.skip_deserialize && entry.value_type.has_data());
        let mut aggregated = HashMap::new();
        if is_aggregated
            && has_file(self.listing, MSGPACK_FILE)
            && let Some(file) = self.ask.file(self.path(MSGPACK_FILE)?, MSGPACK_FILE_BYTES_MAX).await?
        {
            // Positions are written as list indices or as map keys: what identifies a leaf is the text.
            if let Some(sums) = &parts.sums {
                sums.check_file(&self.path(MSGPACK_FILE)?, &file)?;
            }
            let leaves = self.msgpack_leaves(&file)?.into_iter();
            aggregated = leaves.map(|(path, kind)| (texts(&path), kind)).collect();
        }
        let collisions = collisions(&metadata.entries);
        let TreeMetadata { entries, use_ocdbt, use_zarr3, every_chunk_stored, custom_metadata, containers, .. } =
            metadata;
        let leaves = entries.into_iter().map(|entry| {
            let kind = match entry.value_type {
                ValueType::None => StoredKind::None,
                ValueType::Empty(container) => StoredKind::Empty(container),
                value_type if entry.skip_deserialize => match aggregated.remove(&texts(&entry.path)) {
                    Some(StoredKind::Stored { name, .. }) => StoredKind::Stored { name, value_type: Some(value_type) },
                    Some(kind) => kind,
                    None => unsupported(&value_type, "its value is in the msgpack file `checkpoint`, which lacks it"),
                },
                ValueType::String => self.text(parts, &param_name(&entry.path)),
                ValueType::Other(_) => unsupported(&entry.value_type, "no handler for this type is built in"),
                value_type => StoredKind::Stored { name: param_name(&entry.path), value_type: Some(value_type) },
            };
            StoredLeaf { path: entry.path, kind, sharding: None, key_impl: None, chunk_shape: None }
        });
        let leaves = leaves.collect();
        let (notes, listing, sums, documents) = (Vec::new(), Vec::new(), None, Sums::default());
        Ok(TreeItem {
            leaves,
            use_ocdbt,
            use_zarr3,
            every_chunk_stored,
            custom_metadata,
            containers,
            collisions,
            notes,
            listing,
            sums,
            documents,
        })
    }

    /// The tree that only the msgpack file describes: releases before 0.4.3.
    async fn described_by_msgpack(&self, file: &Bytes, parts: &Parts) -> Result<TreeItem> {
        let mut leaves = self.msgpack_leaves(file)?;
        self.find_texts(&mut leaves, parts).await?;
        let stored = leaves.iter().filter_map(|(path, kind)| match kind {
            StoredKind::Stored { name, .. } => Some((name.clone(), path)),
            _ => None,
        });
        let collisions = shared_names(stored);
        let leaf = |(path, kind)| StoredLeaf { path, kind, sharding: None, key_impl: None, chunk_shape: None };
        Ok(TreeItem {
            leaves: leaves.into_iter().map(leaf).collect(),
            use_ocdbt: None,
            use_zarr3: None,
            every_chunk_stored: false,
            custom_metadata: None,
            containers: Vec::new(),
            collisions,
            notes: Vec::new(),
            listing: Vec::new(),
            sums: None,
            documents: Sums::default(),
        })
    }

    /// Turns the placeholders of strings into their texts. Nothing but a file tells a string from an array here:
    /// releases 0.3 wrote `<name>/_strings.json`, later ones one file.
    async fn find_texts(&self, leaves: &mut [(KeyPath, StoredKind)], parts: &Parts) -> Result<()> {
        let mut places = Vec::new();
        for (index, (_, kind)) in leaves.iter_mut().enumerate() {
            let StoredKind::Stored { name, .. } = kind else { continue };
            let first = name.split('/').next().unwrap_or_default();
            if let Some(Ok(text)) = parts.strings.as_ref().map(|strings| strings::lookup(strings, name)) {
                *kind = StoredKind::Text(text.to_owned());
            } else if !name.is_empty() && has_dir(self.listing, first) {
                // A name that is no path inside the item cannot have such a file.
                places.extend(
                    self.dir.join(name.as_str()).and_then(|dir| dir.join(STRINGS_FILE)).map(|path| (index, path)),
                );
            }
        }
        let found = files(self.ask, places.iter().map(|(_, path)| path.clone())).await?;
        for ((index, path), file) in places.into_iter().zip(found) {
            if let (Some(file), Some((_, kind))) = (file, leaves.get_mut(index)) {
                let strings = json::parse(&file).map_err(|error| corrupt(&error, Some(error.offset), &path))?;
                let StoredKind::Stored { name, .. } = &*kind else { continue };
                *kind = match strings::lookup(&strings, name) {
                    Ok(text) => StoredKind::Text(text.to_owned()),
                    Err(error) => unsupported(&ValueType::String, error),
                };
            }
        }
        Ok(())
    }

    fn msgpack_leaves(&self, file: &Bytes) -> Result<Vec<(KeyPath, StoredKind)>> {
        let root = msgpack::parse(file).map_err(|error| self.corrupt(&error, Some(error.offset), MSGPACK_FILE))?;
        if msgpack::is_t5x(&root) {
            return Err(Error::unsupported("a native T5X checkpoint")
                .at("file", self.path(MSGPACK_FILE)?)
                .expected("an Orbax checkpoint or safetensors")
                .hint("convert it with T5X's or Flax's own tools and save it with Orbax"));
        }
        let mut leaves = Vec::new();
        flatten(root, &mut KeyPath(Vec::new()), &mut leaves);
        Ok(leaves)
    }

    fn text(&self, parts: &Parts, name: &str) -> StoredKind {
        match parts.strings.as_ref().map(|strings| strings::lookup(strings, name)) {
            Some(Ok(text)) => StoredKind::Text(text.to_owned()),
            Some(Err(error)) => unsupported(&ValueType::String, error),
            None => unsupported(&ValueType::String, "its text is in _strings.json, which is missing"),
        }
    }

    fn add_shardings(&self, tree: &mut TreeItem, parts: &Parts, notes: &mut Vec<Error>) {
        let Some(file) = &parts.sharding else { return };
        match sharding::parse(file) {
            Ok(shardings) => tree.leaves.iter_mut().for_each(|leaf| {
                if let StoredKind::Stored { name, .. } = &leaf.kind {
                    leaf.sharding = shardings.get(name).cloned();
                }
            }),
            Err(error) => notes.push(self.corrupt(&error, Some(error.offset), SHARDING_FILE)),
        }
    }

    async fn add_key_types(&self, tree: &mut TreeItem, parts: &Parts, notes: &mut Vec<Error>) -> Result<()> {
        let (file, path) = match &parts.array_metadata {
            Some(file) => (file.clone(), self.path(FIRST_ARRAY_METADATA_FILE)?),
            None if has_dir(self.listing, ARRAY_METADATA_DIR) => match self.other_array_metadata().await? {
                Some(found) => found,
                None => return Ok(()),
            },
            None => return Ok(()),
        };
        match array_metadata::parse(&file) {
            Ok(mut records) => tree.leaves.iter_mut().for_each(|leaf| {
                if let StoredKind::Stored { name, .. } = &leaf.kind {
                    let record = records.get_mut(name).map(std::mem::take).unwrap_or_default();
                    (leaf.key_impl, leaf.chunk_shape) = (record.random_key_impl, record.chunk_shape);
                }
            }),
            Err(error) => notes.push(corrupt(&error, Some(error.offset), &path)),
        }
        Ok(())
    }

    /// The file of another process than 0. All have the same content.
    async fn other_array_metadata(&self) -> Result<Option<(Bytes, RelPath)>> {
        let entries = self.ask.list(self.path(ARRAY_METADATA_DIR)?).await?.unwrap_or_default();
        // The first process has none, or it had been found.
        let Some(entry) = entries.iter().find(|entry| entry.name.starts_with("process_")) else { return Ok(None) };
        let path = self.path(ARRAY_METADATA_DIR)?.join(&entry.name)?;
        Ok(self.ask.file(path.clone(), METADATA_FILE_BYTES_MAX).await?.map(|file| (file, path)))
    }

    fn path(&self, name: &str) -> Result<RelPath> {
        Ok(self.dir.join(name)?)
    }

    fn corrupt(&self, error: impl std::error::Error, offset: Option<u64>, name: &str) -> Error {
        // A constant name below a directory that was listed is a good path.
        let path = self.dir.join(name).unwrap_or_else(|_| self.dir.clone());
        corrupt(error, offset, &path)
    }
}

/// The leaves of a msgpack tree, in the file's order. The parser bounds the depth.
fn flatten(node: Node, path: &mut KeyPath, leaves: &mut Vec<(KeyPath, StoredKind)>) {
    let kind = match node {
        Node::Map(members) if members.is_empty() => StoredKind::Empty(Container::Dict),
        Node::List(nodes) if nodes.is_empty() => StoredKind::Empty(Container::List),
        Node::Tuple(nodes) if nodes.is_empty() => StoredKind::Empty(Container::Tuple),
        Node::Map(members) => {
            for (key, node) in members {
                path.0.push(Key::Name(match key {
                    msgpack::Key::Name(name) => name,
                    msgpack::Key::Int(int) => int.to_string(),
                }));
                flatten(node, path, leaves);
                path.0.pop();
            }
            return;
        }
        Node::List(nodes) | Node::Tuple(nodes) => {
            for (index, node) in nodes.into_iter().enumerate() {
                path.0.push(Key::Index(index as u64));
                flatten(node, path, leaves);
                path.0.pop();
            }
            return;
        }
        Node::Nil => StoredKind::None,
        Node::Placeholder(name) => StoredKind::Stored { name, value_type: None },
        Node::Str(text) => StoredKind::Text(text),
        Node::Unsupported(what) => unsupported(&ValueType::Other(String::new()), what),
        value => StoredKind::Inline(value),
    };
    leaves.push((path.clone(), kind));
}

fn unsupported(value_type: &ValueType, reason: impl std::fmt::Display) -> StoredKind {
    StoredKind::Unsupported { value_type: value_type.name().to_owned(), reason: reason.to_string() }
}

fn texts(path: &KeyPath) -> Vec<String> {
    path.elements().map(std::borrow::Cow::into_owned).collect()
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
