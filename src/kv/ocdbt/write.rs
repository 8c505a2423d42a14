//! From every key to a manifest and the nodes of its tree: the inverse of [`scan`](super::scan()).
//!
//! A tree is built from the leaves up. A level's entries are cut into runs that stay below the node limit; each run
//! becomes a node, and an entry of the level above. A node's keys are stored without the prefix that they share, which
//! is never longer than what all nodes below it leave out as well. Children stand before their parents, so every place
//! is known when it is referred to.
//!
//! Must not know: when and where the bytes are written, which commit they are.

use bytes::Bytes;

use super::OcdbtError;
use super::btree::{INLINE, OUT_OF_LINE};
use super::codec::{NODE_MAGIC, common_prefix, encode_envelope, put_front_coded, put_uleb, put_ulebs};
use super::data_ref::{DataFileTable, DataRef};
use super::manifest::{Config, encode_manifest};
use super::version_tree::{Statistics, Version};
use crate::error::Error;
use crate::kv::{FileId, Index, Value};
use crate::limits::{
    OCDBT_INLINE_BYTES_MAX, OCDBT_KEY_BYTES_MAX, OCDBT_KEYS_MAX, OCDBT_NODE_DECODED_MAX, OCDBT_NODE_ENTRIES_MAX,
};
use crate::relpath::RelPath;

/// Where the nodes of a database will stand.
#[derive(Clone, Copy, Debug)]
pub struct NodePlace<'a> {
    /// The database's directory, relative to the same directory as the files of the index.
    pub root: &'a RelPath,
    /// The data file that the nodes are appended to, below `root`.
    pub file: &'a RelPath,
    /// How many bytes that file has before the nodes.
    pub offset: u64,
}

/// A database as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What to append to the file of the [`NodePlace`]. Nothing if there is no key.
    pub nodes: Vec<u8>,
    /// What `manifest.ocdbt` of the database's directory holds. To be written when all else is on disk.
    pub manifest: Vec<u8>,
    /// Height of the tree; 0 if its root is a leaf or if it has no keys.
    pub height: u8,
    /// Number of nodes.
    pub node_count: usize,
}

/// Why an index cannot be written as a database.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Keys must ascend bytewise, each once.
    #[error("key {index} is not greater than the key before it")]
    Unsorted {
        /// Position of the later key.
        index: usize,
    },
    /// A key beyond [`OCDBT_KEY_BYTES_MAX`].
    #[error("key {index} has {len} bytes, more than {OCDBT_KEY_BYTES_MAX}")]
    Key {
        /// Position of the key.
        index: usize,
        /// Its length in bytes.
        len: usize,
    },
    /// A value beyond [`OCDBT_INLINE_BYTES_MAX`] that is not in a file.
    #[error("the inline value of key {index} has {len} bytes, more than {OCDBT_INLINE_BYTES_MAX}")]
    Inline {
        /// Position of the key.
        index: usize,
        /// Length of the value in bytes.
        len: usize,
    },
    /// More keys than [`OCDBT_KEYS_MAX`].
    #[error("{0} keys, more than {OCDBT_KEYS_MAX}")]
    Keys(usize),
    /// An extent in a file that the index does not have.
    #[error("the value of key {index} is in file {file}, which the index does not have")]
    File {
        /// Position of the key.
        index: usize,
        /// The file.
        file: u32,
    },
    /// A file that is not below the database's directory.
    #[error("the file `{0}` is outside the database's directory")]
    Outside(RelPath),
    /// A sum of sizes beyond 64 bits.
    #[error("the sizes of the values do not add up to a 64-bit number")]
    Size,
    /// A field that the format bounds.
    #[error(transparent)]
    Format(#[from] OcdbtError),
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        Self::invalid(error.to_string())
    }
}

/// The manifest and the nodes of a database of one version (generation 1) that holds what the index says.
///
/// Its files must be below `place.root`. `config` is stored in the manifest; its node limit and compression are also
/// kept to here, while its limit for inline values is the caller's to keep. `commit_time` is in nanoseconds since 1970.
/// Values of no bytes are stored inline, whatever file they are said to be in. The same arguments give the same bytes.
///
/// # Errors
/// [`WriteError`].
pub fn write(index: &Index, place: NodePlace<'_>, config: &Config, commit_time: u64) -> Result<Written, WriteError> {
    check_keys(index)?;
    let files = Files::new(index, place.root);
    let node_file = below(place.file, place.root).ok_or_else(|| WriteError::Outside(place.file.clone()))?;
    let mut nodes = Nodes { bytes: Vec::new(), count: 0, place, node_file, config };
    let entries = index.entries();
    if entries.is_empty() {
        // A manifest must name a file even so; an empty path is what stands for none.
        let version = Version { generation: 1, root_height: 0, root: None };
        let none = DataFileTable::new([(Bytes::new(), 0)]);
        let manifest = encode_manifest(config, &none, &version, Statistics::default(), commit_time)?;
        return Ok(Written { nodes: Vec::new(), manifest, height: 0, node_count: 0 });
    }

    let sizes = entries.iter().map(|(key, value)| leaf_entry_bytes(key, value, &files));
    let runs = cut(sizes, nodes.limit(), 1);
    let alone = runs.len() == 1;
    let mut level = Vec::with_capacity(runs.len());
    let mut start = 0;
    for count in runs {
        let Some(run) = entries.get(start..start + count) else { return Err(WriteError::Size) };
        level.push(nodes.leaf(run, start, &files, alone)?);
        start += count;
    }
    let mut height = 0_u8;
    while level.len() > 1 {
        height = height.checked_add(1).ok_or(WriteError::Size)?;
        let path_len = nodes.node_file.len();
        let runs = cut(level.iter().map(|child| interior_entry_bytes(child, path_len)), nodes.limit(), 2);
        let alone = runs.len() == 1;
        let mut above = Vec::with_capacity(runs.len());
        let mut rest = level.as_slice();
        for count in runs {
            let Some((run, after)) = rest.split_at_checked(count) else { return Err(WriteError::Size) };
            above.push(nodes.interior(run, height, alone)?);
            rest = after;
        }
        level = above;
    }
    let Some(root) = level.first() else { return Err(WriteError::Size) };
    let version = Version { generation: 1, root_height: height, root: Some(root.place) };
    let manifest = encode_manifest(config, &nodes.table(), &version, root.statistics, commit_time)?;
    Ok(Written { nodes: nodes.bytes, manifest, height, node_count: nodes.count })
}

fn check_keys(index: &Index) -> Result<(), WriteError> {
    let entries = index.entries();
    if entries.len() > OCDBT_KEYS_MAX {
        return Err(WriteError::Keys(entries.len()));
    }
    let mut previous: Option<&Bytes> = None;
    for (index, (key, value)) in entries.iter().enumerate() {
        if key.len() as u64 > OCDBT_KEY_BYTES_MAX {
            return Err(WriteError::Key { index, len: key.len() });
        }
        if previous.is_some_and(|previous| key <= previous) {
            return Err(WriteError::Unsorted { index });
        }
        if let Value::Inline(bytes) = value
            && bytes.len() as u64 > OCDBT_INLINE_BYTES_MAX
        {
            return Err(WriteError::Inline { index, len: bytes.len() });
        }
        previous = Some(key);
    }
    Ok(())
}

/// How many entries each node of a level gets: at least `min`, and no more than fit in `limit` bytes or in a node.
///
/// A remainder below `min` joins the run before it, which has room: `min` is far below the most that a node may have.
fn cut(sizes: impl Iterator<Item = u64>, limit: u64, min: usize) -> Vec<usize> {
    let mut runs: Vec<usize> = Vec::new();
    let (mut count, mut bytes) = (0, 0_u64);
    for size in sizes {
        let full = bytes.saturating_add(size) > limit || count as u64 + min as u64 > OCDBT_NODE_ENTRIES_MAX;
        if full && count >= min {
            runs.push(std::mem::take(&mut count));
            bytes = 0;
        }
        count += 1;
        bytes = bytes.saturating_add(size);
    }
    match runs.last_mut() {
        Some(last) if count < min => *last += count,
        _ => runs.push(count),
    }
    runs
}

/// TensorStore's estimate of what an entry of a leaf adds to it; never less than it does.
fn leaf_entry_bytes(key: &[u8], value: &Value, files: &Files) -> u64 {
    let value = match value {
        Value::Inline(bytes) => bytes.len(),
        Value::Extent(extent) if extent.len == 0 => 0,
        Value::Extent(extent) => ENTRY_OVERHEAD + files.get(extent.file).map_or(0, |file| file.path.len()),
    };
    (ENTRY_OVERHEAD + key.len() + value) as u64
}

/// The same for an entry of an interior node: the integers of all columns at their longest.
fn interior_entry_bytes(child: &Child, path_len: usize) -> u64 {
    (INTERIOR_ENTRY_OVERHEAD + child.key.len() + path_len) as u64
}

/// The files of an index as a database names them.
struct Files {
    /// In the order of the index; `None` for a file outside the database's directory.
    by_id: Vec<Option<usize>>,
    /// By base and relative path, each once.
    sorted: Vec<File>,
    /// As in the index, for messages.
    paths: Vec<RelPath>,
}

/// One file, below the database's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct File {
    path: Bytes,
    base_len: usize,
}

impl Files {
    fn new(index: &Index, root: &RelPath) -> Self {
        let files: Vec<Option<File>> =
            index.files().iter().map(|path| below(path, root).map(|path| File::new(&path))).collect();
        let mut sorted: Vec<File> = files.iter().flatten().cloned().collect();
        sorted.sort_by(|a, b| a.split().cmp(&b.split()));
        sorted.dedup();
        let rank = |file: &File| sorted.binary_search_by(|other| other.split().cmp(&file.split())).ok();
        let by_id = files.iter().map(|file| file.as_ref().and_then(rank)).collect();
        Self { by_id, sorted, paths: index.files().to_vec() }
    }

    /// Position of a file among the sorted ones; `index` is that of the key which refers to it.
    fn rank(&self, id: FileId, index: usize) -> Result<usize, WriteError> {
        let at = id.0 as usize;
        match (self.by_id.get(at), self.paths.get(at)) {
            (Some(Some(rank)), _) => Ok(*rank),
            (_, Some(path)) => Err(WriteError::Outside(path.clone())),
            _ => Err(WriteError::File { index, file: id.0 }),
        }
    }

    fn get(&self, id: FileId) -> Option<&File> {
        self.sorted.get((*self.by_id.get(id.0 as usize)?)?)
    }
}

impl File {
    /// What stands before the last `d/<name>` is the base: the directory of the database that the file belongs to.
    fn new(path: &Bytes) -> Self {
        let is_slash = |byte: &u8| *byte == b'/';
        let name = path.iter().rposition(is_slash).unwrap_or_default();
        let directory = path.get(..name).unwrap_or_default();
        let base_len = match directory.iter().rposition(is_slash) {
            Some(slash) if directory.get(slash + 1..) == Some(DATA_DIRECTORY) => slash + 1,
            _ => 0,
        };
        Self { path: path.clone(), base_len }
    }

    /// Base and relative path.
    fn split(&self) -> (&[u8], &[u8]) {
        self.path.split_at_checked(self.base_len).unwrap_or_default()
    }
}

/// The path of a file relative to a directory that it is below.
fn below(path: &RelPath, root: &RelPath) -> Option<Bytes> {
    let rest = match root.as_bytes() {
        b"" => path.as_bytes(),
        root => path.as_bytes().strip_prefix(root)?.strip_prefix(b"/")?,
    };
    (!rest.is_empty()).then(|| Bytes::copy_from_slice(rest))
}

/// A node as the level above refers to it.
struct Child {
    /// The first key below it.
    key: Bytes,
    /// How much of its keys it is stored without.
    prefix_len: usize,
    place: DataRef,
    statistics: Statistics,
}

/// The nodes written so far.
struct Nodes<'a> {
    bytes: Vec<u8>,
    count: usize,
    place: NodePlace<'a>,
    node_file: Bytes,
    config: &'a Config,
}

/// A value as a leaf stores it.
enum Stored<'a> {
    Inline(&'a [u8]),
    /// Position of the file among the sorted ones, offset, length.
    OutOfLine(usize, u64, u64),
}

impl Nodes<'_> {
    /// Bytes at which a node is split. Keys are front-coded, so that what is read stays below the reader's bound even
    /// for the few entries that a node must have.
    fn limit(&self) -> u64 {
        u64::from(self.config.decoded_node_bytes_max).min(OCDBT_NODE_DECODED_MAX / 2)
    }

    /// The table of an interior node or manifest: all nodes stand in one file. It has no base, so that the nodes' own
    /// tables are relative to the database's directory.
    fn table(&self) -> DataFileTable {
        DataFileTable::new([(self.node_file.clone(), 0)])
    }

    /// Writes a leaf of these entries, the first of which is number `first`. A node that stands `alone` at its level is
    /// the root, which leaves nothing out.
    fn leaf(
        &mut self,
        entries: &[(Bytes, Value)],
        first: usize,
        files: &Files,
        alone: bool,
    ) -> Result<Child, WriteError> {
        let (Some((key, _)), Some((last, _))) = (entries.first(), entries.last()) else {
            return Err(WriteError::Size);
        };
        let prefix_len = if alone { 0 } else { common_prefix(key, last) };
        let mut values = Vec::with_capacity(entries.len());
        let mut used = Vec::new();
        let mut indirect_bytes = 0_u64;
        for (at, (_, value)) in entries.iter().enumerate() {
            values.push(match value {
                Value::Inline(bytes) => Stored::Inline(bytes),
                Value::Extent(extent) if extent.len == 0 => Stored::Inline(&[]),
                Value::Extent(extent) => {
                    let rank = files.rank(extent.file, first + at)?;
                    // The same bounds as when reading.
                    DataRef::new(0, extent.offset, extent.len, 1)?;
                    indirect_bytes = indirect_bytes.checked_add(extent.len).ok_or(WriteError::Size)?;
                    used.push(rank);
                    Stored::OutOfLine(rank, extent.offset, extent.len)
                }
            });
        }
        used.sort_unstable();
        used.dedup();
        let table = used.iter().filter_map(|&rank| files.sorted.get(rank));

        let mut body = vec![0];
        DataFileTable::new(table.map(|file| (file.path.clone(), file.base_len))).encode(&mut body);
        put_uleb(&mut body, entries.len() as u64);
        let keys: Vec<&[u8]> = entries.iter().map(|(key, _)| key.get(prefix_len..).unwrap_or_default()).collect();
        put_front_coded(&mut body, &keys, |_| usize::MAX, []);
        put_ulebs(
            &mut body,
            values.iter().map(|value| match value {
                Stored::Inline(bytes) => bytes.len() as u64,
                Stored::OutOfLine(_, _, len) => *len,
            }),
        );
        body.extend(values.iter().map(|value| match value {
            Stored::Inline(_) => INLINE,
            Stored::OutOfLine(..) => OUT_OF_LINE,
        }));
        let places = || {
            values.iter().filter_map(|value| match value {
                Stored::Inline(_) => None,
                Stored::OutOfLine(rank, offset, _) => Some((used.binary_search(rank).unwrap_or_default(), *offset)),
            })
        };
        put_ulebs(&mut body, places().map(|(file, _)| file as u64));
        put_ulebs(&mut body, places().map(|(_, offset)| offset));
        for value in &values {
            if let Stored::Inline(bytes) = value {
                body.extend_from_slice(bytes);
            }
        }
        let statistics = Statistics { key_count: entries.len() as u64, tree_bytes: 0, indirect_bytes };
        self.push(&body, key.clone(), prefix_len, statistics)
    }

    /// Writes an interior node over these children.
    fn interior(&mut self, children: &[Child], height: u8, alone: bool) -> Result<Child, WriteError> {
        let (Some(first), Some(last)) = (children.first(), children.last()) else { return Err(WriteError::Size) };
        let shared = common_prefix(&first.key, &last.key);
        // A child must leave out at least what this node leaves out: it does not know its parents' keys.
        let prefix_len = if alone { 0 } else { children.iter().map(|child| child.prefix_len).fold(shared, usize::min) };

        let mut body = vec![height];
        self.table().encode(&mut body);
        put_uleb(&mut body, children.len() as u64);
        let keys: Vec<&[u8]> = children.iter().map(|child| child.key.get(prefix_len..).unwrap_or_default()).collect();
        let prefixes = children.iter().map(|child| child.prefix_len.saturating_sub(prefix_len) as u64);
        put_front_coded(&mut body, &keys, |_| usize::MAX, prefixes);
        put_ulebs(&mut body, children.iter().map(|child| child.place.file as u64));
        put_ulebs(&mut body, children.iter().map(|child| child.place.offset));
        put_ulebs(&mut body, children.iter().map(|child| child.place.len));
        let columns: Vec<[u64; 3]> = children.iter().map(|child| child.statistics.columns()).collect();
        for column in 0..3 {
            put_ulebs(&mut body, columns.iter().filter_map(|columns| columns.get(column).copied()));
        }
        let sum = children.iter().try_fold(Statistics::default(), |sum, child| sum.plus(child.statistics));
        self.push(&body, first.key.clone(), prefix_len, sum.ok_or(WriteError::Size)?)
    }

    /// Appends a node; `below` are the statistics of the tree without the node itself.
    fn push(&mut self, body: &[u8], key: Bytes, prefix_len: usize, below: Statistics) -> Result<Child, WriteError> {
        let encoded = encode_envelope(NODE_MAGIC, body, self.config.compression)?;
        let len = encoded.len() as u64;
        let offset = self.place.offset.checked_add(self.bytes.len() as u64).ok_or(WriteError::Size)?;
        let place = DataRef::new(0, offset, len, 1)?;
        let own = Statistics { key_count: 0, tree_bytes: len, indirect_bytes: 0 };
        let statistics = below.plus(own).ok_or(WriteError::Size)?;
        self.bytes.extend_from_slice(&encoded);
        self.count += 1;
        Ok(Child { key, prefix_len, place, statistics })
    }
}

/// The directory of data files in a database that TensorStore writes.
const DATA_DIRECTORY: &[u8] = b"d";

/// Bytes that an entry of a leaf needs beside its key and inline value, and a place beside its path.
const ENTRY_OVERHEAD: usize = 16;

/// Bytes that an entry of an interior node needs beside its key and path: nine integers of at most ten bytes.
const INTERIOR_ENTRY_OVERHEAD: usize = 90;

#[cfg(test)]
mod tests;
