//! Leaves and stored arrays of one item: layout, database and array metadata put together.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use super::checkpoint::ask;
use super::inline::{read_elements, whole_wants};
use super::value::Value;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::Root;
use crate::keypath::KeyPath;
use crate::kv::{self, Index, ocdbt};
use crate::layout::orbax::metadata::{Container, ValueType, key_prefix};
use crate::layout::orbax::msgpack::Node;
use crate::layout::orbax::sharding::{SavedMesh, SavedSharding};
use crate::layout::orbax::sums::{Sums, ValueSums};
use crate::layout::orbax::tree::{StoredKind, StoredLeaf, TreeItem, TreeRead, read_tree};
use crate::limits::{CHUNKS_LOOKED_UP_MAX, LEAVES_MAX, ZARR_JSON_BYTES_MAX};
use crate::need::{Answer, Asker, DirEntry, EntryKind, Need, unfit};
use crate::plan::{StoredArray, Values, stored_positions};
use crate::relpath::RelPath;
use crate::shape::{Region, element_count};
use crate::zarr::{ArrayMeta, ByteCodec, Chunk, ChunkKeys, Endian, Grid, Layout, MetaError, parse_v2, parse_v3};

/// What one item holds.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    pub(super) leaves: Vec<LeafInfo>,
    pub(super) arrays: Vec<StoredArray>,
    pub(super) meshes: Vec<Arc<SavedMesh>>,
    /// Which sequences are tuples and which mappings namedtuples, where that is recorded.
    pub(super) containers: Vec<(KeyPath, Container)>,
    /// The user's metadata of the tree.
    pub(super) custom_metadata: Option<serde_json::Value>,
    /// The user's metadata of the checkpoint, where the tree's own files have it.
    pub(super) checkpoint_metadata: Option<serde_json::Value>,
    /// The documents of JSON items, where the tree's own files have them.
    pub(super) json_items: BTreeMap<String, String>,
    pub(super) notes: Vec<Error>,
}

/// One leaf of a checkpoint.
#[derive(Clone, Debug)]
pub struct LeafInfo {
    /// Where it lies in the tree.
    pub path: KeyPath,
    /// What it is.
    pub kind: LeafKind,
    /// How it was laid out over devices when it was saved, where that is known.
    pub saved: Option<SavedSpec>,
}

/// What a leaf is.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum LeafKind {
    /// An array, by its position in [`Checkpoint::arrays`](super::Checkpoint::arrays).
    Array(usize),
    /// The key data of a typed JAX PRNG key, and the implementation's name.
    Key(usize, String),
    /// A number or bool.
    Scalar {
        /// Its stored array; `None` when it stands in a metadata file.
        array: Option<usize>,
        /// Stored type.
        dtype: DType,
        /// Its value.
        value: Value,
    },
    /// A string.
    Text(String),
    /// `None`.
    None,
    /// An empty container.
    Empty(Container),
    /// Something that is damaged, missing or not supported, and why; the other leaves can be read.
    Unreadable(Arc<Error>),
}

/// How an array was laid out when it was saved. Advisory: any other layout can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedSpec {
    /// Which of the checkpoint's meshes.
    pub mesh: usize,
    /// For every dimension the axes that divide it; may be shorter than the rank.
    pub spec: Vec<Vec<String>>,
}

impl LeafKind {
    /// The name in `ls --json`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Array(_) => "array",
            Self::Key(..) => "key",
            Self::Scalar { .. } => "scalar",
            Self::Text(_) => "string",
            Self::None => "none",
            Self::Empty(_) => "empty",
            Self::Unreadable(_) => "unreadable",
        }
    }

    /// The stored array behind it.
    pub fn array(&self) -> Option<usize> {
        match self {
            Self::Array(array) | Self::Key(array, _) => Some(*array),
            Self::Scalar { array, .. } => *array,
            _ => None,
        }
    }
}

fn unreadable(error: Error) -> LeafKind {
    LeafKind::Unreadable(Arc::new(error))
}

/// Reads what an Orbax item directory says about its leaves.
pub(super) async fn read_orbax(ask: &Asker, dir: &RelPath) -> Result<Catalog> {
    let tree = read_tree(ask, dir).await?;
    let (listing, sums) = match &tree {
        TreeRead::Tree(item) => (&item.listing, &item.sums),
        TreeRead::NoStructure { listing, sums } => (listing, sums),
    };
    let store = Store::open(ask, dir, listing, sums.clone()).await?;
    let item = match tree {
        TreeRead::Tree(item) => *item,
        TreeRead::NoStructure { listing, .. } => store.item_from_keys(ask, listing).await?,
    };
    let mut builder = Builder { store, catalog: Catalog::default(), parsed: HashMap::new() };
    builder.build(ask, item).await?;
    Ok(builder.catalog)
}

/// Where an item's keys are.
struct Store {
    dir: RelPath,
    index: Option<Arc<Index>>,
    /// Checksums of what lies in files, if the item was sealed.
    sums: Option<Arc<ValueSums>>,
}

impl Store {
    /// The item's own database; else the databases of the processes that wrote it; else files.
    async fn open(ask: &Asker, dir: &RelPath, listing: &[DirEntry], sums: Option<ValueSums>) -> Result<Self> {
        let has = |name: &str| listing.iter().any(|entry| entry.name == name);
        let mut index = None;
        if has("manifest.ocdbt") {
            index = ocdbt::scan(ask, dir).await?.map(|database| database.index);
        } else {
            let processes =
                listing.iter().filter(|entry| entry.kind == EntryKind::Dir && entry.name.starts_with("ocdbt.process_"));
            let roots = processes.map(|entry| dir.join(&entry.name)).collect::<Result<Vec<_>, _>>()?;
            if !roots.is_empty() {
                index = ocdbt::scan_processes(ask, &roots).await?.map(|union| union.index);
            }
        }
        if let Some(sums) = &sums {
            let found = index.as_ref().map_or(0, |index| index.crc32c(dir));
            sums.check_keys(found).map_err(|error| error.at("database", dir))?;
        }
        Ok(Self { dir: dir.clone(), index: index.map(Arc::new), sums: sums.map(Arc::new) })
    }

    /// A tree made from nothing but the stored names, for items without a structure file.
    async fn item_from_keys(&self, ask: &Asker, listing: Vec<DirEntry>) -> Result<TreeItem> {
        let mut names: Vec<String> = Vec::new();
        if let Some(index) = &self.index {
            for (key, _) in index.entries() {
                let key = String::from_utf8_lossy(key);
                if let Some(name) = META_KEYS.iter().find_map(|meta| key.strip_suffix(meta)) {
                    names.push(name.trim_end_matches('/').to_owned());
                }
            }
        } else {
            let dirs: Vec<&str> =
                listing.iter().filter(|entry| entry.kind == EntryKind::Dir).map(|entry| entry.name.as_str()).collect();
            let mut needs = Vec::new();
            for name in &dirs {
                for meta in META_KEYS {
                    needs.push(Need::Size { path: self.dir.join(name)?.join(meta)? }.or_refused());
                }
            }
            let answers = ask.ask(needs).await?;
            // What is there and no file is damage, which is told when it is read.
            let is_there = |answer: &Answer| matches!(answer, Answer::Size(_) | Answer::Refused(_));
            let found = answers.chunks(META_KEYS.len()).map(|pair| pair.iter().any(is_there));
            names.extend(dirs.iter().zip(found).filter(|(_, found)| *found).map(|(name, _)| (*name).to_owned()));
        }
        if names.is_empty() {
            return Err(Error::not_found("the item has neither structure files nor arrays")
                .at("item", &self.dir)
                .expected("`_METADATA`, `checkpoint`, or zarr arrays"));
        }
        names.sort();
        names.dedup();
        self.none_is_lost(&names)?;
        let split = |name: &String| KeyPath::names(name.split('.'));
        let paths: Vec<KeyPath> = names.iter().map(split).collect();
        // Sorted by elements, a path that is a prefix of another stands right before it or its siblings.
        let mut sorted: Vec<&KeyPath> = paths.iter().collect();
        sorted.sort();
        let clash = sorted.windows(2).any(|pair| pair[1].0.starts_with(&pair[0].0));
        let leaf = |(name, path): (String, KeyPath)| StoredLeaf {
            path: if clash { KeyPath::names([name.as_str()]) } else { path },
            kind: StoredKind::Stored { name, value_type: None },
            sharding: None,
            key_impl: None,
            chunk_shape: None,
        };
        Ok(TreeItem {
            leaves: names.into_iter().zip(paths).map(leaf).collect(),
            use_ocdbt: None,
            use_zarr3: None,
            every_chunk_stored: false,
            custom_metadata: None,
            containers: Vec::new(),
            collisions: Vec::new(),
            notes: Vec::new(),
            listing,
            sums: None,
            documents: Sums::default(),
        })
    }

    /// Checks that every array that was sealed is among these: nothing else says what there should be.
    fn none_is_lost(&self, names: &[String]) -> Result<()> {
        let sealed = self.sums.iter().flat_map(|sums| sums.below(&self.dir)).filter_map(|file| {
            let file = std::str::from_utf8(file).ok()?;
            META_KEYS.iter().find_map(|meta| Some(file.strip_suffix(meta)?.trim_end_matches('/').to_owned()))
        });
        match sealed.into_iter().find(|name| names.binary_search(name).is_err()) {
            None => Ok(()),
            Some(lost) => {
                Err(Error::not_found("an array is missing that was there when the checkpoint was sealed")
                    .at("array", lost))
            }
        }
    }

    /// The file of an array's metadata.
    fn meta_file(&self, name: &str, meta: &str) -> Result<RelPath> {
        Ok(self.dir.join(name)?.join(meta)?)
    }

    /// The metadata of every named array, or why that of one cannot be had, in two batches at most: what the database points at
    /// or the likelier file name, then the other file name.
    async fn metas(&self, ask: &Asker, names: &[String], zarr3: Option<bool>) -> Result<Vec<Metas>> {
        let mut found: Vec<Metas> = Vec::with_capacity(names.len());
        let mut asked = Vec::new();
        let mut needs = Vec::new();
        for (number, name) in names.iter().enumerate() {
            let prefix = key_prefix(name).into_bytes();
            let hit = self.index.as_ref().and_then(|index| {
                let key = |meta: &str| [prefix.as_slice(), meta.as_bytes()].concat();
                META_KEYS.iter().find_map(|meta| Some((*meta, index, index.get(&key(meta))?)))
            });
            found.push(match hit {
                None => Ok(None),
                Some((meta, _, kv::Value::Inline(bytes))) => {
                    Ok(Some(Found { meta, bytes: bytes.clone(), in_index: true }))
                }
                Some((_, _, kv::Value::Extent(extent))) if extent.len > ZARR_JSON_BYTES_MAX => {
                    Err(Error::corrupt("the array's metadata is too large")
                        .at("array", name)
                        .expected(format_args!("at most {ZARR_JSON_BYTES_MAX} bytes"))
                        .found(extent.len))
                }
                Some((meta, index, kv::Value::Extent(extent))) => {
                    let path = index.file(extent.file).clone();
                    needs.push(Need::Range { path, offset: extent.offset, len: extent.len }.or_refused());
                    asked.push((number, meta, true));
                    Ok(None)
                }
            });
        }
        let order = if zarr3 == Some(false) { [META_KEYS[1], META_KEYS[0]] } else { META_KEYS };
        let pointed_at: HashSet<usize> = asked.iter().map(|(number, ..)| *number).collect();
        for meta in order {
            for (number, name) in names.iter().enumerate() {
                if !matches!(found[number], Ok(None)) || pointed_at.contains(&number) {
                    continue;
                }
                match self.meta_file(name, meta) {
                    Ok(path) => {
                        needs.push(Need::File { path, max: ZARR_JSON_BYTES_MAX }.or_refused());
                        asked.push((number, meta, false));
                    }
                    Err(error) => found[number] = Err(error),
                }
            }
            for ((number, meta, in_index), answer) in asked.drain(..).zip(ask.ask(std::mem::take(&mut needs)).await?) {
                found[number] = match answer {
                    Answer::Bytes(bytes) => match self.sums.as_ref().filter(|_| !in_index) {
                        Some(sums) => {
                            self.meta_file(&names[number], meta).and_then(|file| sums.check_file(&file, &bytes))
                        }
                        None => Ok(()),
                    }
                    .map(|()| Some(Found { meta, bytes, in_index })),
                    Answer::Missing if in_index => Err(Error::not_found("a data file of the checkpoint is missing")
                        .at("array", &names[number])
                        .hint("the checkpoint is incomplete; copy it again")),
                    Answer::Missing => continue,
                    Answer::Refused(error) => Err(error.duplicate().at("array", &names[number])),
                    other => return Err(unfit(Some(&other))),
                };
            }
        }
        Ok(found)
    }
}

/// The metadata of an array, if there is one, or why it cannot be had.
type Metas = Result<Option<Found>>;

/// Checks arrays' metadata that are files by the checksums that the item has of them, all of which must be of one.
///
/// # Errors
/// A file is missing of an array that is not among these. What is wrong with one of them takes its place.
fn check_documents(dir: &RelPath, documents: &Sums, names: &[String], found: &mut [Metas]) -> Result<()> {
    if documents.is_empty() {
        return Ok(());
    }
    let failed = |error: Error, file: &str| error.at("file", format!("{dir}/{file}"));
    let mut seen = HashSet::new();
    for (name, metas) in names.iter().zip(found.iter_mut()) {
        let Ok(Some(one)) = metas else { continue };
        if one.in_index {
            continue;
        }
        let file = format!("{}{}", key_prefix(name), one.meta);
        let checked = documents.check(&file, &one.bytes);
        if let Err(error) = checked {
            *metas = Err(failed(error, &file));
        }
        seen.insert(file);
    }
    let numbers: HashMap<&str, usize> =
        names.iter().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
    for lost in documents.names().filter(|name| !seen.contains(*name)) {
        let Err(error) = documents.check_absent(lost) else { continue };
        let name = META_KEYS.iter().find_map(|meta| lost.strip_suffix(meta)).map(|name| name.trim_end_matches('/'));
        match name.and_then(|name| numbers.get(name)) {
            // What is wrong with it already is why it is not among those that were seen.
            Some(&number) if found[number].is_err() => {}
            Some(&number) => found[number] = Err(failed(error, lost)),
            None => return Err(failed(error, lost)),
        }
    }
    Ok(())
}

/// One array's metadata and where it was found.
#[derive(Clone)]
struct Found {
    meta: &'static str,
    bytes: Bytes,
    in_index: bool,
}

impl Found {
    fn parse(&self) -> Result<ArrayMeta, MetaError> {
        if self.meta == META_KEYS[0] { parse_v3(&self.bytes) } else { parse_v2(&self.bytes) }
    }
}

/// Parses metadata documents, each different one once (arrays of one shape and type have the same), on all cores if there are
/// many. Those that make no sense are left out. No document is both of v2 and of v3.
fn parse_all<'a>(found: impl Iterator<Item = &'a Found>) -> HashMap<Bytes, Arc<ArrayMeta>> {
    let mut seen = HashSet::new();
    let distinct: Vec<&Found> = found.filter(|found| seen.insert(&found.bytes)).collect();
    let parse = |some: &[&Found]| -> Vec<(Bytes, Arc<ArrayMeta>)> {
        some.iter().filter_map(|found| Some((found.bytes.clone(), Arc::new(found.parse().ok()?)))).collect()
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    if threads == 1 || distinct.len() < DOCUMENTS_PARSED_ALONE {
        return parse(&distinct).into_iter().collect();
    }
    std::thread::scope(|scope| {
        let parts = distinct.chunks(distinct.len().div_ceil(threads));
        let spawn = |part| std::thread::Builder::new().spawn_scoped(scope, move || parse(part));
        let parts: Vec<_> = parts.map(spawn).collect();
        // A part that is lost, or that no thread could be had for, is parsed again where it is needed.
        parts.into_iter().flatten().flat_map(|part| part.join().unwrap_or_default()).collect()
    })
}

struct Builder {
    store: Store,
    catalog: Catalog,
    parsed: HashMap<Bytes, Arc<ArrayMeta>>,
}

impl Builder {
    async fn build(&mut self, ask: &Asker, item: TreeItem) -> Result<()> {
        if item.leaves.len() > LEAVES_MAX {
            return Err(Error::corrupt("the tree has too many leaves").expected(LEAVES_MAX).found(item.leaves.len()));
        }
        let ambiguous: HashMap<&str, &Vec<KeyPath>> =
            item.collisions.iter().map(|(name, paths)| (name.as_str(), paths)).collect();
        let mut names: Vec<String> = Vec::new();
        for leaf in &item.leaves {
            if let StoredKind::Stored { name, .. } = &leaf.kind
                && !ambiguous.contains_key(name.as_str())
            {
                names.push(name.clone());
            }
        }
        let mut found = self.store.metas(ask, &names, item.use_zarr3).await?;
        check_documents(&self.store.dir, &item.documents, &names, &mut found)?;
        self.parsed = parse_all(found.iter().flatten().flatten());
        let mut found = names.iter().zip(found);
        let mut meshes: HashMap<Arc<SavedMesh>, usize> = HashMap::new();
        for leaf in &item.leaves {
            let kind = match &leaf.kind {
                StoredKind::Stored { name, .. } if ambiguous.contains_key(name.as_str()) => {
                    let paths = ambiguous
                        .get(name.as_str())
                        .map(|paths| paths.iter().map(KeyPath::to_string).collect::<Vec<_>>());
                    unreadable(Error::corrupt(format!(
                        "the stored name `{name}` is shared by {}: only one of them was kept when the checkpoint was saved, and nothing tells which",
                        paths.unwrap_or_default().join(" and ")
                    )))
                }
                StoredKind::Stored { value_type, .. } => {
                    let Some((name, found)) = found.next() else {
                        return Err(Error::bug("an array was not looked up"));
                    };
                    match found.and_then(|found| self.array(name, found.as_ref(), item.every_chunk_stored)) {
                        Ok(array) => {
                            self.compare_records(leaf, array);
                            self.stored_kind(array, value_type.as_ref(), leaf.key_impl.as_deref())
                        }
                        Err(error) => unreadable(error),
                    }
                }
                StoredKind::Text(text) => LeafKind::Text(text.clone()),
                StoredKind::None => LeafKind::None,
                StoredKind::Empty(container) => LeafKind::Empty(*container),
                StoredKind::Inline(node) => self.inline_kind(&leaf.path, node)?,
                StoredKind::Unsupported { reason, .. } => unreadable(Error::unsupported(reason)),
            };
            let saved = match &leaf.sharding {
                Some(SavedSharding::Named { mesh, spec }) => {
                    let next = meshes.len();
                    let number = *meshes.entry(Arc::clone(mesh)).or_insert(next);
                    Some(SavedSpec { mesh: number, spec: spec.clone() })
                }
                _ => None,
            };
            self.catalog.leaves.push(LeafInfo { path: leaf.path.clone(), kind, saved });
        }
        let mut ordered: Vec<(usize, Arc<SavedMesh>)> =
            meshes.into_iter().map(|(mesh, number)| (number, mesh)).collect();
        ordered.sort_by_key(|(number, _)| *number);
        self.catalog.meshes = ordered.into_iter().map(|(_, mesh)| mesh).collect();
        self.catalog.containers = item.containers;
        self.catalog.custom_metadata = item.custom_metadata;
        self.catalog.notes.extend(item.notes);
        Ok(())
    }

    fn array(&mut self, name: &str, found: Option<&Found>, every_chunk_stored: bool) -> Result<usize> {
        let found = found.ok_or_else(|| {
            Error::not_found("the metadata names an array that is not stored")
                .at("array", name)
                .expected("`zarr.json` or `.zarray`")
        })?;
        let meta = match self.parsed.get(&found.bytes) {
            Some(meta) => Arc::clone(meta),
            // It is one that makes no sense: parsed again, it says why.
            None => Arc::new(
                found.parse().map_err(|error| Error::from(error).at("metadata", found.meta).at("array", name))?,
            ),
        };
        let values = match (&self.store.index, found.in_index) {
            (Some(index), true) => Values::Keys { index: Arc::clone(index), prefix: key_prefix(name).into_bytes() },
            _ => Values::Directory(self.store.dir.join(name)?),
        };
        self.catalog.arrays.push(StoredArray {
            name: name.to_owned(),
            meta,
            values,
            every_chunk_stored,
            sums: self.store.sums.clone(),
        });
        Ok(self.catalog.arrays.len() - 1)
    }

    /// Notes where what was recorded beside an array contradicts its own metadata, which are what is read.
    fn compare_records(&mut self, leaf: &StoredLeaf, array: usize) {
        let stored = &self.catalog.arrays[array];
        let Some(recorded) = &leaf.chunk_shape else { return };
        let mut shapes = vec![stored.meta.grid.chunk_shape().to_vec()];
        if let Layout::Sharded(sharded) = &stored.meta.layout {
            let mut inner = sharded.inner_shape.clone();
            sharded.order.iter().zip(&sharded.inner_shape).for_each(|(dim, extent)| inner[*dim] = *extent);
            shapes.push(inner);
        }
        if !shapes.contains(recorded) {
            let note = Error::corrupt("`array_metadatas` records other chunks than the array has")
                .at("array", &stored.name)
                .expected(format_args!("{:?}", shapes.last().map_or(&[][..], Vec::as_slice)))
                .found(format_args!("{recorded:?}"));
            self.catalog.notes.push(note);
        }
    }

    fn stored_kind(&self, array: usize, value_type: Option<&ValueType>, key_impl: Option<&str>) -> LeafKind {
        let meta = &self.catalog.arrays[array].meta;
        if let Some(key_impl) = key_impl {
            return LeafKind::Key(array, key_impl.to_owned());
        }
        match value_type {
            Some(ValueType::Scalar) | None if meta.shape.is_empty() => {
                // The value is read when all scalars are known, in one go.
                LeafKind::Scalar { array: Some(array), dtype: meta.dtype, value: Value::Bool(false) }
            }
            _ => LeafKind::Array(array),
        }
    }

    /// A value of the legacy msgpack file.
    fn inline_kind(&mut self, path: &KeyPath, node: &Node) -> Result<LeafKind> {
        let scalar = |dtype, value| LeafKind::Scalar { array: None, dtype, value };
        Ok(match node {
            Node::Nil => LeafKind::None,
            Node::Bool(value) => scalar(DType::Bool, Value::Bool(*value)),
            Node::Int(value) => {
                let dtype = if i64::try_from(*value).is_ok() { DType::Int64 } else { DType::UInt64 };
                scalar(dtype, Value::Int(*value))
            }
            Node::Float(value) => scalar(DType::Float64, Value::Float(*value)),
            Node::Complex { re, im } => scalar(DType::Complex128, Value::Complex(*re, *im)),
            Node::Str(text) => LeafKind::Text(text.clone()),
            Node::Array(inline) if inline.is_scalar => {
                let mut element = inline.data.to_vec();
                crate::transform::cpu::normalise(inline.dtype, &mut element)
                    .map_err(|error| Error::corrupt(error.to_string()).at("leaf", path))?;
                scalar(inline.dtype, Value::from_element(inline.dtype, &element)?)
            }
            Node::Array(inline) => {
                let name = path.to_string();
                let meta = plain_meta(inline.dtype, inline.shape.clone(), Vec::new()).ok_or_else(|| {
                    Error::corrupt("the array's shape is absurd")
                        .at("leaf", path)
                        .found(format_args!("{:?}", inline.shape))
                })?;
                let key = meta.keys.key(&vec![0; inline.shape.len()]);
                let index = Index::new(Vec::new(), vec![(Bytes::from(key), kv::Value::Inline(inline.data.clone()))]);
                let values = Values::Keys { index: Arc::new(index), prefix: Vec::new() };
                let meta = Arc::new(meta);
                self.catalog.arrays.push(StoredArray { name, meta, values, every_chunk_stored: true, sums: None });
                LeafKind::Array(self.catalog.arrays.len() - 1)
            }
            Node::Unsupported(what) => unreadable(Error::unsupported(what)),
            Node::Map(_) | Node::List(_) | Node::Tuple(_) | Node::Bytes(_) | Node::Placeholder(_) => {
                unreadable(Error::unsupported("a msgpack value that is no leaf of a tree"))
            }
        })
    }
}

impl Catalog {
    /// Reads the values of all scalars at once.
    pub(super) fn read_scalars(&mut self, root: &Root) -> Result<()> {
        let scalars: Vec<(usize, usize)> = self
            .leaves
            .iter()
            .enumerate()
            .filter_map(|(leaf, info)| match info.kind {
                LeafKind::Scalar { array: Some(array), .. } => Some((leaf, array)),
                _ => None,
            })
            .collect();
        let wants = whole_wants(&self.arrays, scalars.iter().map(|(_, array)| *array));
        let elements = read_elements(root, &self.arrays, wants)?;
        for ((leaf, array), element) in scalars.into_iter().zip(elements) {
            let read = Value::from_element(self.arrays[array].meta.dtype, &element)?;
            if let LeafKind::Scalar { value, .. } = &mut self.leaves[leaf].kind {
                *value = read;
            }
        }
        Ok(())
    }

    /// The value of an array of one element.
    pub(super) fn element(&self, root: &Root, array: usize) -> Result<Value> {
        let stored = &self.arrays[array];
        if element_count(&stored.meta.shape) != Some(1) || !stored.meta.shape.is_empty() {
            return Err(Error::invalid("an array of several elements cannot become a scalar")
                .found(format_args!("{:?}", stored.meta.shape)));
        }
        let elements = read_elements(root, &self.arrays, whole_wants(&self.arrays, [array]))?;
        let element = elements.first().ok_or_else(|| Error::bug("an element was not read"))?;
        Value::from_element(stored.meta.dtype, element)
    }

    /// Bytes that the chunks of each array take.
    pub(super) fn stored_bytes(&self, root: &Root) -> Result<Vec<Option<u64>>> {
        let mut bytes: Vec<Option<u64>> = vec![Some(0); self.arrays.len()];
        let mut asked = Vec::new();
        let mut needs = Vec::new();
        for (number, array) in self.arrays.iter().enumerate() {
            match &array.values {
                Values::Extent { len, .. } => bytes[number] = Some(*len),
                Values::Keys { index, prefix } => {
                    let chunks = index.with_prefix(prefix).iter().filter(|(key, _)| {
                        let below = &key[prefix.len()..];
                        // An empty prefix, and a name with a `/` in it, have the keys of other arrays below them too.
                        is_chunk_key(&array.meta, below)
                    });
                    bytes[number] = Some(chunks.map(|(_, value)| value.len()).sum());
                }
                Values::Directory(dir) => {
                    let grid = &array.meta.grid;
                    let few = grid.chunk_count(&array.meta.shape).is_some_and(|count| count <= CHUNKS_LOOKED_UP_MAX);
                    let positions: Vec<Vec<u64>> = match few {
                        true => grid.positions(&Region::whole(&array.meta.shape)).collect(),
                        false => ask(root, |asker| async move { stored_positions(&asker, array).await })?,
                    };
                    for position in positions {
                        asked.push(number);
                        needs.push(Need::Size { path: dir.join(array.meta.keys.key(&position))? });
                    }
                }
            }
        }
        for (number, answer) in asked.into_iter().zip(crate::io::serve(root, &needs)?) {
            if let (Answer::Size(size), Some(total)) = (answer, &mut bytes[number]) {
                *total += size;
            }
        }
        Ok(bytes)
    }
}

/// Whether a key, relative to an array's prefix, is that of one of its chunks.
pub(super) fn is_chunk_key(meta: &ArrayMeta, key: &[u8]) -> bool {
    let Ok(key) = std::str::from_utf8(key) else { return false };
    let (separator, body) = match meta.keys {
        ChunkKeys::Default { separator } => match key.strip_prefix('c') {
            Some("") => return meta.shape.is_empty(),
            Some(rest) => match rest.strip_prefix(separator) {
                Some(rest) => (separator, rest),
                None => return false,
            },
            None => return false,
        },
        ChunkKeys::V2 { separator } => (separator, key),
    };
    let numbers = body.split(separator);
    let rank = meta.shape.len().max(usize::from(matches!(meta.keys, ChunkKeys::V2 { .. })));
    numbers.clone().count() == rank
        && numbers.into_iter().all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

/// An array of one uncompressed (or packed) chunk.
pub(super) fn plain_meta(dtype: DType, shape: Vec<u64>, codecs: Vec<ByteCodec>) -> Option<ArrayMeta> {
    let chunk_shape: Vec<u64> = shape.iter().map(|&extent| extent.max(1)).collect();
    let order = (0..shape.len()).collect();
    Some(ArrayMeta {
        grid: Grid::new(chunk_shape)?,
        shape,
        dtype,
        layout: Layout::Plain(Chunk { order, endian: Endian::Little, codecs }),
        fill: vec![0; dtype.size()],
        keys: ChunkKeys::V2 { separator: '.' },
    })
}

/// The keys of array metadata, zarr v3 first.
pub(super) const META_KEYS: [&str; 2] = ["zarr.json", ".zarray"];

/// As many metadata documents are parsed before a thread has been started.
const DOCUMENTS_PARSED_ALONE: usize = 256;
