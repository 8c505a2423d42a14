//! The walk from a manifest to every key, one batch of reads a level of the tree.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

use super::OcdbtError;
use super::btree::{Entries, Expected, InteriorEntry, LeafEntry, LeafValue, Node};
use super::data_ref::{DataFileTable, DataRef};
use super::manifest::{Config, Manifest};
use super::version_tree::Version;
use crate::error::{Error, Result};
use crate::kv::{Extent, FileId, Index, Value};
use crate::limits::{
    OCDBT_HEIGHT_MAX, OCDBT_KEYS_MAX, OCDBT_NODE_ENCODED_MAX, OCDBT_NODES_MAX, OCDBT_TREE_BYTES_FREE,
    OCDBT_TREE_BYTES_MAX, OCDBT_TREE_GROWTH_MAX,
};
use crate::need::{Answer, Asker, DirEntry, EntryKind, Need, unfit};
use crate::relpath::RelPath;

/// The latest version of one OCDBT database.
#[derive(Clone, Debug)]
pub struct Database {
    /// Every key. Files are relative to the checkpoint's root.
    pub index: Index,
    /// How the database was configured.
    pub config: Config,
    /// The generation of the version that was read.
    pub generation: u64,
    /// Height of the tree; 0 if its root is a leaf or if it has no keys.
    pub height: u8,
    /// How many nodes were read.
    pub node_count: usize,
    /// Where they are: file, first byte, number of bytes.
    pub nodes: Vec<(RelPath, u64, u64)>,
}

/// The latest versions of several databases, seen as one.
#[derive(Clone, Debug)]
pub struct Union {
    /// Every key of any database; of equal keys, that of the database named first. Files are relative to the
    /// checkpoint's root.
    pub index: Index,
    /// The directories that hold no manifest, in the order given.
    pub missing: Vec<RelPath>,
    /// How many nodes were read.
    pub node_count: usize,
}

/// Reads the database in the directory `root` of a checkpoint; `None` if it has no `manifest.ocdbt`.
///
/// Costs one read for the manifest and one batch of reads a level of the tree. No value out of line is read, and none
/// is proven to exist.
///
/// # Errors
/// Damaged or unsupported manifests and nodes, with their file and offset; nodes whose file is missing; references
/// that leave the checkpoint; databases beyond the [limits](crate::limits).
pub async fn scan(ask: &Asker, root: &RelPath) -> Result<Option<Database>> {
    let mut walk = Walk::default();
    let Some(head) = read_manifest(ask, root).await? else { return Ok(None) };
    walk.tree(ask, root, &head).await?;
    let height = head.latest.root_height;
    let (node_count, generation, config) = (walk.budget.node_count, head.latest.generation, head.config);
    let nodes = std::mem::take(&mut walk.nodes);
    Ok(Some(Database { index: walk.into_index(), config, generation, height, node_count, nodes }))
}

/// Reads the databases in several directories as one: what a save leaves that never merged its processes' databases.
///
/// The metadata keys that all of them hold are identical and other keys are disjoint, so the first of equal keys is
/// kept. `None` if no directory holds a database.
///
/// # Errors
/// See [`scan`].
pub async fn scan_processes(ask: &Asker, roots: &[RelPath]) -> Result<Option<Union>> {
    let mut walk = Walk::default();
    let mut missing = Vec::new();
    for root in roots {
        match read_manifest(ask, root).await? {
            Some(head) => walk.tree(ask, root, &head).await?,
            None => missing.push(root.clone()),
        }
    }
    if missing.len() == roots.len() {
        return Ok(None);
    }
    let node_count = walk.budget.node_count;
    Ok(Some(Union { index: walk.into_index(), missing, node_count }))
}

/// What the manifests of a database say of its latest version.
struct Head {
    config: Config,
    files: DataFileTable,
    latest: Version,
    /// The manifest that names the root node.
    manifest: RelPath,
}

/// Reads `manifest.ocdbt` and, if it says that versions stand elsewhere, the latest numbered manifest.
async fn read_manifest(ask: &Asker, root: &RelPath) -> Result<Option<Head>> {
    let path = root.join(MANIFEST)?;
    let Some(bytes) = ask.file(path.clone(), OCDBT_NODE_ENCODED_MAX).await? else { return Ok(None) };
    match decode_manifest(&bytes, &path)? {
        Manifest::Single { config, files, latest } => Ok(Some(Head { config, files, latest, manifest: path })),
        Manifest::Numbered { .. } => read_numbered(ask, root).await.map(Some),
    }
}

/// Reads the latest of the manifests whose names carry the last generation that they hold.
async fn read_numbered(ask: &Asker, root: &RelPath) -> Result<Head> {
    let entries = ask.list(root.clone()).await?.unwrap_or_default();
    let Some((number, name)) = entries.iter().filter_map(manifest_number).max() else {
        return Err(Error::not_found("the OCDBT database has no version: its numbered manifests are missing")
            .at("directory", root)
            .hint(INCOMPLETE));
    };
    let path = root.join(name)?;
    let bytes = ask.file(path.clone(), OCDBT_NODE_ENCODED_MAX).await?.ok_or_else(|| missing(&path))?;
    match decode_manifest(&bytes, &path)? {
        Manifest::Single { config, files, latest } if latest.generation == number => {
            Ok(Head { config, files, latest, manifest: path })
        }
        Manifest::Single { latest, .. } => Err(Error::corrupt("a numbered OCDBT manifest ends at another generation")
            .at("file", path)
            .expected(number)
            .found(latest.generation)),
        Manifest::Numbered { .. } => {
            Err(Error::corrupt("a numbered OCDBT manifest refers to numbered manifests").at("file", path))
        }
    }
}

/// The generation in the name of a numbered manifest: `manifest.` and 16 lower-case hexadecimal digits, not all 0.
fn manifest_number(entry: &DirEntry) -> Option<(u64, &str)> {
    let digits = entry.name.strip_prefix("manifest.")?;
    let hex = digits.len() == 16 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    let number = u64::from_str_radix(digits, 16).ok().filter(|&number| hex && number > 0)?;
    (entry.kind == EntryKind::File).then_some((number, &entry.name))
}

fn decode_manifest(bytes: &[u8], path: &RelPath) -> Result<Manifest> {
    Manifest::decode(bytes).map_err(|error| Error::from(error).at("file", path))
}

/// What has been found so far, of one database or several.
#[derive(Default)]
struct Walk {
    nodes: Vec<(RelPath, u64, u64)>,
    entries: Vec<(Bytes, Value)>,
    files: Files,
    budget: Budget,
}

/// The files that values are in, each once.
#[derive(Default)]
struct Files {
    paths: Vec<RelPath>,
    ids: HashMap<RelPath, FileId>,
}

/// A node that is about to be read.
struct Pending {
    file: RelPath,
    /// What the paths of the node's own files are relative to, below the database's directory.
    transitive: Bytes,
    place: DataRef,
    key: Bytes,
    prefix_len: usize,
}

impl Walk {
    /// Adds every key of one database.
    async fn tree(&mut self, ask: &Asker, root: &RelPath, head: &Head) -> Result<()> {
        let Some(place) = head.latest.root else { return Ok(()) };
        let (mut height, root_node) =
            self.root_node(root, head, place).map_err(|error| error.at("file", &head.manifest))?;
        let mut level = vec![root_node];
        // Keys ascend within a database, not from one to the next.
        let first_entry = self.entries.len();
        loop {
            let answers = ask.ask(level.iter().map(Pending::need).collect()).await?;
            self.nodes.extend(level.iter().map(|node| (node.file.clone(), node.place.offset, node.place.len)));
            let mut below = Vec::new();
            for (node, answer) in level.iter().zip(answers) {
                let encoded = match answer {
                    Answer::Bytes(bytes) => bytes,
                    Answer::Missing => return Err(missing(&node.file)),
                    other => return Err(unfit(Some(&other))),
                };
                let expected = Expected { height, key: &node.key, prefix_len: node.prefix_len };
                let decoded = Node::decode(&encoded, expected).map_err(|error| node.locate(error.into()))?;
                let resolver = Resolver::new(root, &node.transitive, &decoded.files);
                let added = self.budget.bytes(decoded.decoded_bytes).and_then(|()| match decoded.entries {
                    Entries::Interior(entries) => self.interior(entries, resolver, &mut below),
                    Entries::Leaf(entries) => self.leaf(entries, resolver, first_entry),
                });
                added.map_err(|error| node.locate(error))?;
            }
            // At height 0 every node was a leaf.
            let Some(next) = height.checked_sub(1) else { return Ok(()) };
            (height, level) = (next, below);
        }
    }

    /// The root node that a manifest refers to, and its height.
    fn root_node(&mut self, root: &RelPath, head: &Head, place: DataRef) -> Result<(u8, Pending)> {
        let height = head.latest.root_height;
        within("the height of an OCDBT tree", OCDBT_HEIGHT_MAX.into(), height.into())?;
        let mut resolver = Resolver::new(root, b"", &head.files);
        let Source { path, transitive, .. } = resolver.source(place, &mut self.budget)?;
        let (file, transitive) = (path.clone(), transitive.clone());
        self.budget.admit(&file, place)?;
        Ok((height, Pending { file, transitive, place, key: Bytes::new(), prefix_len: 0 }))
    }

    /// Adds the children of an interior node to the level below.
    fn interior(
        &mut self,
        entries: Vec<InteriorEntry>,
        mut resolver: Resolver<'_>,
        below: &mut Vec<Pending>,
    ) -> Result<()> {
        for InteriorEntry { key, prefix_len, child: place } in entries {
            let Source { path, transitive, .. } = resolver.source(place, &mut self.budget)?;
            let (file, transitive) = (path.clone(), transitive.clone());
            // Before it is queued: the queue itself must stay bounded.
            self.budget.admit(&file, place)?;
            below.push(Pending { file, transitive, place, key, prefix_len });
        }
        Ok(())
    }

    /// Adds the keys of a leaf.
    fn leaf(&mut self, entries: Vec<LeafEntry>, mut resolver: Resolver<'_>, first_entry: usize) -> Result<()> {
        self.budget.keys(self.entries.len() + entries.len())?;
        let before = self.entries.get(first_entry..).and_then(<[_]>::last);
        if before.zip(entries.first()).is_some_and(|((before, _), first)| first.key <= before) {
            return Err(OcdbtError::Unsorted { index: 0 }.into());
        }
        self.entries.reserve(entries.len());
        for LeafEntry { key, value } in entries {
            let value = match value {
                LeafValue::Inline(bytes) => Value::Inline(bytes),
                // It may name no file at all.
                LeafValue::OutOfLine(place) if place.len == 0 => Value::Inline(Bytes::new()),
                LeafValue::OutOfLine(place) => {
                    let Source { path, id, .. } = resolver.source(place, &mut self.budget)?;
                    let file = *id.get_or_insert_with(|| self.files.id(path));
                    Value::Extent(Extent { file, offset: place.offset, len: place.len })
                }
            };
            self.entries.push((key, value));
        }
        Ok(())
    }

    fn into_index(self) -> Index {
        Index::new(self.files.paths, self.entries)
    }
}

impl Pending {
    fn need(&self) -> Need {
        Need::Range { path: self.file.clone(), offset: self.place.offset, len: self.place.len }
    }

    /// The error, with where this node is.
    fn locate(&self, error: Error) -> Error {
        error.at("offset", self.place.offset).at("file", &self.file)
    }
}

impl Files {
    fn id(&mut self, path: &RelPath) -> FileId {
        *self.ids.entry(path.clone()).or_insert_with(|| {
            // Each file holds a value of some key, and keys are bounded far below 2^32.
            let id = FileId(u32::try_from(self.paths.len()).unwrap_or(u32::MAX));
            self.paths.push(path.clone());
            id
        })
    }
}

/// Turns a node's files into paths, each when it is first referred to.
struct Resolver<'a> {
    root: &'a RelPath,
    transitive: &'a [u8],
    table: &'a DataFileTable,
    sources: Vec<Option<Source>>,
}

/// One file of a node.
struct Source {
    /// Relative to the checkpoint's root.
    path: RelPath,
    /// What the files of nodes in this file are relative to, below the database's directory.
    transitive: Bytes,
    /// Its number in the index, once a value in it was found.
    id: Option<FileId>,
}

impl<'a> Resolver<'a> {
    fn new(root: &'a RelPath, transitive: &'a [u8], table: &'a DataFileTable) -> Self {
        let sources = std::iter::repeat_with(|| None).take(table.count()).collect();
        Self { root, transitive, table, sources }
    }

    /// The file that this reference is to.
    fn source(&mut self, place: DataRef, budget: &mut Budget) -> Result<&mut Source> {
        let (id, count) = (place.file, self.table.count());
        let slot = self.sources.get_mut(id).ok_or(OcdbtError::FileId { found: id as u64, count })?;
        if let Some(source) = slot {
            return Ok(source);
        }
        let file = self.table.file(id)?;
        let path = self.root.join([self.transitive, file.path()].concat())?;
        if path == *self.root {
            return Err(OcdbtError::NoFile.into());
        }
        let transitive = Bytes::from([self.transitive, file.base()].concat());
        budget.bytes(path.as_bytes().len() as u64 + transitive.len() as u64)?;
        Ok(slot.insert(Source { path, transitive, id: None }))
    }
}

/// What a walk may still use up. Nodes that refer to the same node again and again pass every check of a node, so what
/// they add up to is bounded here.
struct Budget {
    node_count: usize,
    nodes_max: usize,
    keys_max: usize,
    /// Encoded and decoded bytes of all nodes, and their paths.
    tree_bytes: u64,
    tree_bytes_max: u64,
    /// The bytes of nodes as they are stored, each counted once, and where they are: start and end in each file.
    stored_bytes: u64,
    stored: HashMap<RelPath, BTreeMap<u64, u64>>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            node_count: 0,
            nodes_max: OCDBT_NODES_MAX,
            keys_max: OCDBT_KEYS_MAX,
            tree_bytes: 0,
            tree_bytes_max: OCDBT_TREE_BYTES_MAX,
            stored_bytes: 0,
            stored: HashMap::new(),
        }
    }
}

impl Budget {
    /// Counts a node that a reference was found to. The same node twice is no more to read from; nodes never overlap.
    fn admit(&mut self, file: &RelPath, place: DataRef) -> Result<()> {
        self.node_count += 1;
        within("the number of nodes of an OCDBT tree", self.nodes_max as u64, self.node_count as u64)?;
        within("the size of an OCDBT node", OCDBT_NODE_ENCODED_MAX, place.len)?;
        let end = place.offset.saturating_add(place.len);
        let stored = self.stored.entry(file.clone()).or_default();
        let before = stored.range(..end).next_back().map(|(start, end)| (*start, *end));
        match before {
            Some(same) if same == (place.offset, end) => {}
            Some((_, last)) if last > place.offset => {
                return Err(Error::corrupt("two nodes of an OCDBT tree overlap")
                    .at("offset", place.offset)
                    .at("file", file));
            }
            _ => {
                stored.insert(place.offset, end);
                self.stored_bytes = self.stored_bytes.saturating_add(place.len);
            }
        }
        self.bytes(place.len.saturating_add(NODE_BYTES))
    }

    fn bytes(&mut self, count: u64) -> Result<()> {
        self.tree_bytes = self.tree_bytes.saturating_add(count);
        let grown = self.stored_bytes.saturating_mul(OCDBT_TREE_GROWTH_MAX).saturating_add(OCDBT_TREE_BYTES_FREE);
        within("the size of an OCDBT tree in memory", self.tree_bytes_max.min(grown), self.tree_bytes)
    }

    fn keys(&self, count: usize) -> Result<()> {
        within("the number of keys of an OCDBT tree", self.keys_max as u64, count as u64)
    }
}

fn within(what: &'static str, max: u64, found: u64) -> Result<()> {
    if found > max { Err(OcdbtError::Limit { what, max, found }.into()) } else { Ok(()) }
}

fn missing(file: &RelPath) -> Error {
    Error::not_found("the checkpoint is incomplete: it refers to a file that is missing")
        .at("file", file)
        .hint(INCOMPLETE)
}

const MANIFEST: &str = "manifest.ocdbt";

/// What is kept of a node, beside its bytes.
const NODE_BYTES: u64 = 256;

const INCOMPLETE: &str = "copy or download the checkpoint again; all files below it belong to it";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::testing::{self, Stored, Written, hex, interior_node, leaf_node};
    use super::*;
    use crate::error::ErrorKind;
    use crate::need::Machine;

    /// Scans a database held in memory and counts the batches of reads.
    fn scan_at(files: &testing::Files, root: &str) -> (Result<Option<Database>>, usize) {
        let root = RelPath::new(root).unwrap();
        let mut batches = 0;
        let machine = Machine::new(|ask| async move { scan(&ask, &root).await });
        let result = machine.drive(|needs| {
            batches += 1;
            Ok(needs.iter().map(|need| testing::serve(files, need)).collect())
        });
        (result, batches)
    }

    fn scan_root(files: &testing::Files) -> Result<Option<Database>> {
        scan_at(files, "").0
    }

    fn union_of(files: &testing::Files, roots: &[&str]) -> Result<Option<Union>> {
        let roots: Vec<_> = roots.iter().map(|root| RelPath::new(root).unwrap()).collect();
        Machine::new(|ask| async move { scan_processes(&ask, &roots).await })
            .drive(|needs| Ok(needs.iter().map(|need| testing::serve(files, need)).collect()))
    }

    /// An index as the test encoder's input.
    fn contents(index: &Index) -> BTreeMap<Vec<u8>, Stored> {
        let stored = |value: &Value| match value {
            Value::Inline(bytes) => Stored::Inline(bytes.to_vec()),
            Value::Extent(extent) => Stored::OutOfLine(index.file(extent.file).to_string(), extent.offset, extent.len),
        };
        index.entries().iter().map(|(key, value)| (key.to_vec(), stored(value))).collect()
    }

    /// A database that TensorStore wrote: four keys in two leaves under one interior node, no compression.
    fn two_levels() -> testing::Files {
        let manifest =
            "0cdb3a2a5f000000000000000000000102030405060708090a0b0c0d0e0f00043c0400012200642f61623335343232383534
            6232393034663132383933613439313265626536393101010100444f04930100da6d674e3db3ea1800193fd6f8";
        let data = "0cdb20de22000000000000000000000002000101303102020000763076318ceb2c9a
            0cdb20de2200000000000000000000000200010132330202000076327633ac92a94a
            0cdb20de4f00000000000000000001012200642f616233353432323835346232393034663132383933613439313265626536
            393102030401030361626330320000002222220202222200001d673ae8";
        testing::Files::from([("manifest.ocdbt".to_owned(), hex(manifest)), (TWO_LEVELS_DATA.to_owned(), hex(data))])
    }

    const TWO_LEVELS_DATA: &str = "d/ab35422854b2904f12893a4912ebe691";

    #[test]
    fn a_tree_of_tensorstore_is_read_one_batch_a_level() {
        let (database, batches) = scan_at(&two_levels(), "");
        let database = database.unwrap().unwrap();
        let expected = (0..4).map(|n| (format!("abc{n}").into_bytes(), Stored::Inline(format!("v{n}").into_bytes())));
        assert_eq!(contents(&database.index), expected.collect());
        assert_eq!((database.generation, database.height, database.node_count, batches), (1, 1, 3, 3));
    }

    #[test]
    fn a_database_below_a_directory_is_relative_to_the_checkpoint() {
        let below = |(path, bytes): (String, Vec<u8>)| (format!("state/{path}"), bytes);
        let files = two_levels().into_iter().map(below).collect();
        assert_eq!(scan_at(&files, "state").0.unwrap().unwrap().index.entries().len(), 4);
        assert!(scan_root(&files).unwrap().is_none());
    }

    #[test]
    fn an_empty_database_has_no_keys() {
        let files = testing::Files::from([("manifest.ocdbt".to_owned(), testing::manifest(None, 3))]);
        let database = scan_root(&files).unwrap().unwrap();
        assert_eq!((database.index.entries().len(), database.generation, database.node_count), (0, 3, 0));
    }

    #[test]
    fn every_damaged_or_shortened_node_is_an_error_that_says_where() {
        let good = two_levels();
        let data = &good[TWO_LEVELS_DATA];
        for at in 0..data.len() {
            let mut bad = good.clone();
            bad.get_mut(TWO_LEVELS_DATA).unwrap()[at] ^= 0x10;
            let error = scan_root(&bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let offset = if at < 34 {
                0
            } else if at < 68 {
                34
            } else {
                68
            }
            .to_string();
            assert_eq!(error.places().collect::<Vec<_>>(), [("offset", &*offset), ("file", TWO_LEVELS_DATA)]);
        }
        for len in 0..data.len() {
            let mut bad = good.clone();
            bad.get_mut(TWO_LEVELS_DATA).unwrap().truncate(len);
            assert_eq!(scan_root(&bad).unwrap_err().kind(), ErrorKind::Corrupt, "{len}");
        }
        // What follows the last node is nobody's.
        let mut padded = good.clone();
        padded.get_mut(TWO_LEVELS_DATA).unwrap().extend([0; 4096]);
        assert!(scan_root(&padded).is_ok());
    }

    #[test]
    fn a_missing_data_file_is_named() {
        let mut files = two_levels();
        files.remove(TWO_LEVELS_DATA);
        let error = scan_root(&files).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(error.places().collect::<Vec<_>>(), [("file", TWO_LEVELS_DATA)]);
    }

    /// A database of these nodes, all in the file `d`, that starts at the last of them.
    fn of_nodes(height: u8, nodes: &[Vec<u8>]) -> testing::Files {
        let root_len = nodes.last().unwrap().len();
        let data = nodes.concat();
        let root = (height, "d", (data.len() - root_len) as u64, root_len as u64);
        testing::Files::from([("manifest.ocdbt".to_owned(), testing::manifest(Some(root), 1)), ("d".to_owned(), data)])
    }

    #[test]
    fn leaves_must_ascend_from_one_to_the_next() {
        let (a, b) = (leaf_node(&["a", "m"]), leaf_node(&["m", "z"]));
        let root = interior_node(1, &[("a", 0, 0, a.len() as u64), ("b", 0, a.len() as u64, b.len() as u64)]);
        let error = scan_root(&of_nodes(1, &[a.clone(), b, root])).unwrap_err();
        assert!(error.what().contains("not greater than the key before it"), "{error}");

        let b = leaf_node(&["n", "z"]);
        let root = interior_node(1, &[("a", 0, 0, a.len() as u64), ("b", 0, a.len() as u64, b.len() as u64)]);
        assert_eq!(scan_root(&of_nodes(1, &[a, b, root])).unwrap().unwrap().index.entries().len(), 4);
    }

    #[test]
    fn a_node_that_refers_to_itself_has_the_wrong_height() {
        let len = interior_node(1, &[("a", 0, 0, 100)]).len() as u64;
        let error = scan_root(&of_nodes(1, &[interior_node(1, &[("a", 0, 0, len)])])).unwrap_err();
        assert!(error.what().contains("wrong height"), "{error}");
        let error = scan_root(&of_nodes(200, &[interior_node(200, &[("a", 0, 0, len)])])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn nodes_that_share_children_are_bounded() {
        // Each level refers to the one below twice, under the prefixes "a" and "b": 2^height leaves in a few bytes.
        let tree = |height: u8| {
            let mut nodes = vec![leaf_node(&["x"])];
            let mut offset = 0;
            for height in 1..=height {
                let len = nodes.last().unwrap().len() as u64;
                nodes.push(interior_node(height, &[("a", 1, offset, len), ("b", 1, offset, len)]));
                offset += len;
            }
            of_nodes(height, &nodes)
        };
        assert_eq!(scan_root(&tree(5)).unwrap().unwrap().index.entries().len(), 32);
        // A few bytes are not blown up to gigabytes, whatever the absolute limits.
        assert_eq!(scan_root(&tree(18)).unwrap_err().kind(), ErrorKind::Unsupported);
        let files = tree(12);
        let within = |budget: Budget| {
            let mut walk = Walk { budget, ..Walk::default() };
            let machine = Machine::new(|ask| async move {
                let head = read_manifest(&ask, &RelPath::root()).await?.unwrap();
                walk.tree(&ask, &RelPath::root(), &head).await
            });
            machine.drive(|needs| Ok(needs.iter().map(|need| testing::serve(&files, need)).collect()))
        };
        assert!(within(Budget::default()).is_ok());
        for budget in [
            Budget { nodes_max: 1000, ..Budget::default() },
            Budget { keys_max: 1000, ..Budget::default() },
            Budget { tree_bytes_max: 1 << 15, ..Budget::default() },
        ] {
            assert_eq!(within(budget).unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }

    #[test]
    fn references_that_leave_the_checkpoint_are_refused() {
        for path in ["../d", "/etc/passwd", "a/../../d", "", "."] {
            let files =
                testing::Files::from([("manifest.ocdbt".to_owned(), testing::manifest(Some((0, path, 0, 100)), 1))]);
            let error = scan_root(&files).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{path}");
            assert_eq!(error.places().collect::<Vec<_>>(), [("file", "manifest.ocdbt")]);
        }
    }

    #[test]
    fn numbered_manifests_are_read_from_the_largest_number() {
        let mut files = two_levels();
        let single = files.insert("manifest.ocdbt".to_owned(), testing::numbered_manifest()).unwrap();
        assert_eq!(scan_root(&files).unwrap_err().kind(), ErrorKind::NotFound);

        files.insert("manifest.0000000000000000".to_owned(), vec![1]);
        files.insert("manifest.000000000000000G".to_owned(), vec![1]);
        files.insert("manifest.000000000000000F".to_owned(), vec![1]);
        files.insert("manifest.0000000000000001".to_owned(), single.clone());
        assert_eq!(scan_root(&files).unwrap().unwrap().index.entries().len(), 4);

        // It must end at the generation that its name says.
        files.insert("manifest.000000000000000a".to_owned(), single);
        assert_eq!(scan_root(&files).unwrap_err().kind(), ErrorKind::Corrupt);
        files.insert("manifest.000000000000000a".to_owned(), testing::manifest(None, 10));
        assert_eq!(scan_root(&files).unwrap().unwrap().generation, 10);
        files.insert("manifest.000000000000000b".to_owned(), testing::numbered_manifest());
        assert_eq!(scan_root(&files).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn of_equal_keys_the_first_database_wins() {
        let mut files = testing::Files::new();
        for (root, keys) in [("p/0", ["a", "c"]), ("p/1", ["b", "c"])] {
            let leaf = leaf_node(&keys);
            let manifest = testing::manifest(Some((0, "d/0", 0, leaf.len() as u64)), 1);
            files.extend([(format!("{root}/manifest.ocdbt"), manifest), (format!("{root}/d/0"), leaf)]);
        }
        let both = union_of(&files, &["p/0", "p/1", "p/2"]).unwrap().unwrap();
        let keys: Vec<_> = both.index.entries().iter().map(|(key, _)| key.to_vec()).collect();
        assert_eq!(keys, [b"a", b"b", b"c"]);
        assert_eq!(both.missing, [RelPath::new("p/2").unwrap()]);
        assert_eq!(both.node_count, 2);
        assert!(union_of(&files, &["p/2", "p/3"]).unwrap().is_none());
        assert!(union_of(&files, &[]).unwrap().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn what_is_encoded_is_scanned(
            keys in prop::collection::btree_set(prop::collection::vec(0_u8..3, 0..8), 1..200),
            seed in any::<u64>(),
        ) {
            let Written { files, expected, height, node_count } = testing::write_database(keys, seed);
            let (database, batches) = scan_at(&files, "");
            let database = database.unwrap().unwrap();
            prop_assert_eq!(contents(&database.index), expected);
            prop_assert_eq!((database.height, database.node_count), (height, node_count));
            prop_assert_eq!(batches, usize::from(height) + 2);
        }

        #[test]
        fn a_database_with_damage_under_valid_checksums_is_read_or_refused(
            keys in prop::collection::btree_set(prop::collection::vec(0_u8..3, 0..8), 1..20),
            seed in any::<u64>(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let damaged = |body: &mut Vec<u8>| {
                for (at, byte) in &damage {
                    let at = at.index(body.len());
                    body[at] = *byte;
                }
            };
            let Written { files, .. } = testing::write_damaged(keys, seed, &damaged);
            let _ = scan_root(&files);
        }
    }
}
