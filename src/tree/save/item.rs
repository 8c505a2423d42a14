//! What becomes of one tree: arrays to write, and the files that describe them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::array::ArrayJob;
use super::gather::Source;
use super::memory::choose_inline;
use super::options::{SaveOptions, too_deep};
use super::tree::{NewArray, NewLeaf, NewPart, Tree};
use crate::dtype::{CastPolicy, DType};
use crate::error::{Error, Result};
use crate::keypath::KeyPath;
use crate::layout::orbax::array_metadata::ArrayMetadata;
use crate::layout::orbax::metadata::{Entry, TreeMetadata, ValueType, param_name};
use crate::layout::orbax::names;
use crate::layout::orbax::sharding::{SavedMesh, SavedSharding};
use crate::limits::{CHUNK_PADDING_BYTES_MAX, CHUNK_PADDING_FACTOR};
use crate::plan::chunking::{Chunking, Divide, chunking};
use crate::plan::{Device, Sharding};
use crate::shape::Region;
use crate::transform::Convert;
use crate::transform::cpu::convert;
use crate::tree::Value;
use crate::zarr::{self, Compression, Format};

/// A tree, ready to be written.
#[derive(Debug)]
pub(in crate::tree) struct Item {
    pub(super) name: String,
    pub(in crate::tree) jobs: Arc<Vec<ArrayJob>>,
    pub(in crate::tree) metadata: TreeMetadata,
    pub(super) shardings: HashMap<String, SavedSharding>,
    /// The meshes in them.
    meshes: Vec<Arc<SavedMesh>>,
    pub(super) array_metadatas: Vec<(String, ArrayMetadata)>,
    pub(super) strings: BTreeMap<String, String>,
    /// The paths of the jobs' leaves.
    pub(in crate::tree) paths: Vec<KeyPath>,
}

/// Where the elements of a tree's arrays are when it is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tree) enum Elements {
    /// In memory, all of them.
    Held,
    /// They come later: parts say only how the array is divided.
    Later,
}

impl Item {
    /// Plans the writing of a tree whose small values may take so many bytes in nodes. What cannot be saved is added to the
    /// problems, all of it.
    pub(in crate::tree) fn plan(
        name: &str,
        tree: &Tree,
        (elements, inline_bytes): (Elements, u64),
        options: &SaveOptions,
        problems: &mut Vec<Error>,
    ) -> Self {
        let mut item = Self {
            name: name.to_owned(),
            jobs: Arc::default(),
            metadata: TreeMetadata {
                entries: Vec::new(),
                use_ocdbt: Some(options.ocdbt),
                use_zarr3: Some(options.zarr == Format::V3),
                every_chunk_stored: true,
                custom_metadata: tree.custom_metadata.clone(),
                custom_text: None,
                containers: if options.rich_types { tree.containers.clone() } else { Vec::new() },
            },
            shardings: HashMap::new(),
            meshes: Vec::new(),
            array_metadatas: Vec::new(),
            strings: BTreeMap::new(),
            paths: Vec::new(),
        };
        let custom = tree.custom_metadata.as_ref();
        let deep = custom.and_then(|custom| too_deep("custom metadata of a tree", custom, 1));
        problems.extend(deep.map(|error| error.at("item", name)));
        let mut jobs = Vec::new();
        let mut used = vec![false; options.rules.len()];
        for (path, leaf) in &tree.leaves {
            for (used, (pattern, _)) in used.iter_mut().zip(&options.rules) {
                *used |= pattern.matches(path);
            }
            match item.leaf(path, leaf, elements, options) {
                Ok(None) => {}
                Ok(Some(job)) => {
                    item.paths.push(path.clone());
                    jobs.push(job);
                }
                Err(error) => problems.push(error.at("leaf", path)),
            }
        }
        item.metadata.sort();
        problems.extend(check_containers(tree).map(|error| error.at("item", name)));
        let unused = options.rules.iter().zip(used).filter(|(_, used)| !used);
        problems.extend(
            unused.map(|((pattern, _), _)| {
                Error::invalid(format!("no leaf matches the rule `{pattern}`")).at("item", name)
            }),
        );
        choose_inline(&mut jobs, inline_bytes);
        item.jobs = Arc::new(jobs);
        if let Err(error) = names::check_item_name(name) {
            problems.push(Error::invalid(format!("an item cannot be named `{name}`: {error}")));
        }
        let storage = if options.ocdbt { names::Storage::Ocdbt } else { names::Storage::Files };
        if let Err(found) = names::check_tree(&item.metadata.entries, storage) {
            problems.push(names::refused(&found).at("item", name));
        }
        item
    }

    /// Arrays whose chunks are too large to be encoded within so much memory.
    pub(in crate::tree) fn over_budget(&self, room: u64) -> impl Iterator<Item = Error> {
        let jobs = self.paths.iter().zip(self.jobs.iter());
        jobs.filter_map(move |(path, job)| job.over_budget(room).map(|error| error.at("leaf", path)))
    }

    /// The files that describe the tree, one after the other.
    pub(in crate::tree) fn description(&self) -> Vec<u8> {
        let mut all = self.metadata.to_bytes();
        // A map has no order of its own.
        let shardings: BTreeMap<&String, &SavedSharding> = self.shardings.iter().collect();
        all.extend(format!("{shardings:?}{:?}{:?}", self.array_metadatas, self.strings).into_bytes());
        all
    }

    fn leaf(
        &mut self,
        path: &KeyPath,
        leaf: &NewLeaf,
        elements: Elements,
        options: &SaveOptions,
    ) -> Result<Option<ArrayJob>> {
        let name = param_name(path);
        let value_type = leaf.value_type();
        // It is in the tree even if it cannot be saved: its name may be at fault, too.
        let at = self.metadata.entries.len();
        self.metadata.entries.push(Entry::new(path.clone(), value_type.clone()));
        let job = match leaf {
            NewLeaf::None | NewLeaf::Empty(_) => None,
            NewLeaf::Value(Value::Text(text), _) => {
                self.strings.insert(name, text.clone());
                None
            }
            NewLeaf::Value(value, dtype) => {
                let (dtype, element) = element(value, *dtype)?;
                let scalar = NewArray::new(&[], dtype, element);
                let leaf = NewLeaf::Array(scalar.clone());
                Some(array_job(name, path, &leaf, (&scalar, Elements::Held), options)?)
            }
            NewLeaf::Array(array) => {
                let job = array_job(name.clone(), path, leaf, (array, elements), options)?;
                if value_type == ValueType::JaxArray {
                    let chunk = Some(job.new.chunk_shape.clone());
                    self.metadata.entries[at].write_shape.clone_from(&chunk);
                    let key = array.key_impl.clone();
                    let record = ArrayMetadata { write_shape: chunk.clone(), chunk_shape: chunk, random_key_impl: key };
                    self.array_metadatas.push((name.clone(), record));
                    let saved = self.saved_sharding(array.even_sharding());
                    self.shardings.insert(name, saved);
                } else if array.sharding.is_some() {
                    // Orbax does not look at it, and we divide the array again.
                    let saved = self.saved_sharding(array.sharding.as_ref());
                    self.shardings.insert(name, saved);
                }
                Some(job)
            }
        };
        Ok(job)
    }

    /// A sharding as Orbax records it: devices by their number, as JAX numbers them.
    fn saved_sharding(&mut self, sharding: Option<&Sharding>) -> SavedSharding {
        let Some(sharding) = sharding else { return SavedSharding::Single { device: "cpu:0".to_owned() } };
        let mesh = &sharding.mesh;
        let number = |(position, device): (usize, &crate::plan::MeshDevice)| match device.device {
            Device::Cpu(index) => i64::from(index),
            Device::Cuda { ordinal, logical: None } => i64::from(ordinal),
            Device::Cuda { .. } => position as i64,
        };
        let mut ids: Vec<i64> = mesh.devices().iter().enumerate().map(number).collect();
        let mut distinct = ids.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.len() < ids.len() {
            // CPU and GPU devices, or devices of several processes, in one mesh: their positions tell them apart.
            ids = (0..mesh.devices().len() as i64).collect();
        }
        let (axes, shape) = mesh.axes().iter().cloned().unzip();
        let mesh = SavedMesh { axes, shape, device_ids: Some(ids) };
        // Most arrays of a tree have the same one.
        let mesh = match self.meshes.iter().find(|have| ***have == mesh) {
            Some(have) => Arc::clone(have),
            None => {
                let mesh = Arc::new(mesh);
                self.meshes.push(Arc::clone(&mesh));
                mesh
            }
        };
        SavedSharding::Named { mesh, spec: sharding.spec.0.clone() }
    }
}

/// Containers that no leaf lies in.
fn check_containers(tree: &Tree) -> Option<Error> {
    let above = tree.above_leaves();
    let nowhere = tree.containers.iter().filter(|(path, _)| !above.contains(path.0.as_slice()));
    let lines: Vec<String> = nowhere.map(|(path, container)| format!("{path}: {container:?}")).collect();
    (!lines.is_empty()).then(|| {
        Error::invalid("no leaf lies in what was said to be a container")
            .lines(lines)
            .hint("an empty container is a leaf itself (`NewLeaf::Empty`)")
    })
}

/// How one array is written.
fn array_job(
    name: String,
    path: &KeyPath,
    leaf: &NewLeaf,
    (array, elements): (&NewArray, Elements),
    options: &SaveOptions,
) -> Result<ArrayJob> {
    let wanted = options.of(path, leaf);
    let to = wanted.dtype.unwrap_or(array.dtype);
    if !array.dtype.casts_to(to) {
        return Err(Error::invalid("a complex array cannot be cast to bool"));
    }
    if array.key_impl.is_some() && to != array.dtype {
        return Err(Error::invalid("the type of a random key cannot be changed"));
    }
    if let Some(implementation) = &array.key_impl {
        check_key(implementation, array, elements)?;
    }
    let compression = wanted.compression.unwrap_or(Compression::Gpu);
    let checksum = options.checksum_of(compression)?;
    let parts = match elements {
        Elements::Held => array.distinct_parts()?,
        Elements::Later => array.parts.clone(),
    };
    let v3 = options.zarr == Format::V3;
    let Chunking { chunk, inner } = match wanted.chunk_shape {
        Some(chunk) => Chunking { inner: chunk.clone(), chunk },
        None => {
            let regions = shards(array, &parts);
            // Parts of raw chunks can be read as they are; only checksums and frames ask for smaller pieces.
            let inner = v3 && (compression != Compression::None || checksum);
            chunking(&array.shape, to.size() as u64, &regions, Divide { chunk_bytes: wanted.chunk_bytes, inner })
        }
    };
    let new = zarr::NewArray {
        shape: array.shape.clone(),
        dtype: to,
        inner_shape: (v3 && inner != chunk).then_some(inner),
        chunk_shape: chunk,
        format: options.zarr,
        compression,
        checksum,
    };
    let meta = new.meta()?;
    check_padding(&new)?;
    let convert = Convert { from: array.dtype, to, swap: false, policy: options.cast_policy };
    let parts = if elements == Elements::Held { parts } else { Vec::new() };
    let source = Source { shape: array.shape.clone(), parts, convert };
    let part = Region::whole(&array.shape);
    let (grid, keys, lossy) = (meta.grid, meta.keys, AtomicU64::new(0));
    Ok(ArrayJob { name, source, new, grid, keys, part, described: false, inline: false, lossy })
}

/// Refuses key data that JAX makes no random keys of. A name that is not known here may be one that the program which saved a
/// checkpoint has registered with JAX, so what is converted may have it.
fn check_key(implementation: &str, array: &NewArray, elements: Elements) -> Result<()> {
    let Some((_, words)) = KEY_WORDS.iter().find(|(name, _)| *name == implementation) else {
        let names = KEY_WORDS.map(|(name, _)| name).join(", ");
        return match elements {
            Elements::Later => Ok(()),
            Elements::Held => Err(Error::invalid("JAX has no such implementation of random keys")
                .expected(format_args!("one of {names}"))
                .found(implementation)),
        };
    };
    if array.dtype == DType::UInt32 && array.shape.last() == Some(words) {
        return Ok(());
    }
    Err(Error::invalid(format!("this is no key data of {implementation}"))
        .expected(format_args!("uint32, the last dimension {words}"))
        .found(format_args!("{}, the shape {:?}", array.dtype, array.shape)))
}

/// Refuses chunks that are mostly padding.
fn check_padding(new: &zarr::NewArray) -> Result<()> {
    let size = new.dtype.size() as u128;
    let bytes = |extents: &mut dyn Iterator<Item = u64>| {
        extents.fold(size, |bytes, extent| bytes.saturating_mul(extent.into()))
    };
    let array = bytes(&mut new.shape.iter().copied());
    let padded = new.shape.iter().zip(&new.chunk_shape).map(|(extent, chunk)| extent.next_multiple_of(*chunk));
    let stored = bytes(&mut padded.into_iter());
    let most = array.saturating_mul(CHUNK_PADDING_FACTOR.into()).max(array + u128::from(CHUNK_PADDING_BYTES_MAX));
    if stored <= most {
        return Ok(());
    }
    Err(Error::invalid("the chunk shape is mostly padding")
        .expected(format_args!("chunks of at most {most} bytes in all, of an array of {array}"))
        .found(format_args!("{stored} bytes in chunks of {:?}", new.chunk_shape))
        .hint("choose chunks within the array"))
}

/// The distinct regions that loads will ask for, where that is known: those of the devices, also when the array is whole here.
fn shards(array: &NewArray, parts: &[NewPart]) -> Vec<Region> {
    match &array.sharding {
        Some(sharding) if parts.len() == 1 => {
            let positions = 0..sharding.mesh.devices().len();
            let mut regions: Vec<Region> = positions.map(|position| sharding.region(&array.shape, position)).collect();
            regions.retain(|region| !region.is_empty());
            regions.sort_by(|a, b| a.start.cmp(&b.start));
            regions.dedup();
            regions
        }
        _ => parts.iter().map(|part| part.region.clone()).collect(),
    }
}

/// The element that holds a scalar, and its type.
pub(in crate::tree) fn element(value: &Value, dtype: Option<DType>) -> Result<(DType, Vec<u8>)> {
    let (wide, bytes) = match value {
        Value::Bool(value) => (DType::Bool, vec![u8::from(*value)]),
        Value::Int(value) => match (i64::try_from(*value), u64::try_from(*value)) {
            (Ok(value), _) => (DType::Int64, value.to_le_bytes().to_vec()),
            (_, Ok(value)) => (DType::UInt64, value.to_le_bytes().to_vec()),
            _ => return Err(Error::invalid("an integer of more than 64 bits cannot be stored").found(value)),
        },
        Value::Float(value) => (DType::Float64, value.to_le_bytes().to_vec()),
        Value::Complex(real, imaginary) => (DType::Complex128, [real.to_le_bytes(), imaginary.to_le_bytes()].concat()),
        Value::Text(_) => return Err(Error::bug("a string is no element")),
    };
    let Some(to) = dtype.filter(|dtype| *dtype != wide) else { return Ok((wide, bytes)) };
    let mut element = vec![0; to.size()];
    let lossy = convert(wide, to, CastPolicy::Saturate, &bytes, &mut element);
    match lossy.map_err(|error| Error::invalid(error.to_string()))? {
        0 => Ok((to, element)),
        _ => Err(Error::invalid(format!("the value does not fit {to}")).found(value.json())),
    }
}

/// The implementations of random keys that JAX has, and how many words a key of each is.
const KEY_WORDS: [(&str, u64); 6] =
    [("threefry2x32", 2), ("rbg", 4), ("unsafe_rbg", 4), ("threefry4x32", 4), ("philox2x32", 1), ("philox4x32", 2)];
