//! What is saved: a tree of arrays and values in memory.
//!
//! Array bytes are [`Bytes`]: owned, immutable and shared, so that a save in the background needs no copy and nothing can
//! change under it. A vector, an `ndarray` array and a loaded array become `Bytes` without a copy.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use crate::dtype::{Class, DType};
use crate::error::{Error, Result};
use crate::keypath::{Key, KeyPath};
use crate::layout::orbax::metadata::{Container, ValueType};
use crate::layout::orbax::sharding::SavedMesh;
use crate::place::{Download, Element, Memory};
use crate::plan::{Device, Mesh, Sharding, Spec};
use crate::shape::{Region, byte_count, element_count};
use crate::tree::{Array, Checkpoint, Leaf, Shard, State, Value};

/// A tree to save: its leaves, in the order in which their data are written.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    pub(super) leaves: Vec<(KeyPath, NewLeaf)>,
    pub(in crate::tree) custom_metadata: Option<serde_json::Value>,
    /// Sequences that are tuples, and mappings that are namedtuples.
    pub(in crate::tree) containers: Vec<(KeyPath, Container)>,
}

/// An item of a checkpoint to save: what Orbax calls a checkpointable.
#[derive(Clone, Debug)]
pub enum TreeItem {
    /// A tree of arrays and values.
    Tree(Tree),
    /// Any JSON.
    Json(serde_json::Value),
}

impl From<Tree> for TreeItem {
    fn from(tree: Tree) -> Self {
        Self::Tree(tree)
    }
}

impl From<serde_json::Value> for TreeItem {
    fn from(value: serde_json::Value) -> Self {
        Self::Json(value)
    }
}

/// A leaf of a tree to save.
#[derive(Clone, Debug)]
pub enum NewLeaf {
    /// An array.
    Array(NewArray),
    /// A number, bool or string. Integers are saved as `int64` or, beyond it, `uint64`, floats as `float64`, unless a type is
    /// given. A complex number becomes an array without dimensions: Orbax has no such scalars.
    Value(Value, Option<DType>),
    /// `None`.
    None,
    /// An empty container.
    Empty(Container),
}

/// An array to save, in host memory or, if it was loaded there, in the memory of devices.
#[derive(Clone, Debug)]
pub struct NewArray {
    /// Global extents.
    pub shape: Vec<u64>,
    /// Element type in memory.
    pub dtype: DType,
    /// How it is divided over devices; recorded, so that a load without a target divides it again. `None` for an array that
    /// is on no device (Orbax's `np.ndarray`), which loads anywhere.
    pub sharding: Option<Sharding>,
    /// The parts that are in memory; together they hold every element. Replicas are written once.
    pub parts: Vec<NewPart>,
    /// The implementation's name if this is the key data of a typed JAX PRNG key (`threefry2x32`).
    pub key_impl: Option<String>,
}

/// A part of an array.
#[derive(Clone, Debug)]
pub struct NewPart {
    /// Which elements.
    pub region: Region,
    /// The elements, row-major, little-endian; sub-byte types one byte an element. Empty if they are on a device.
    pub data: Bytes,
    pub(super) device: Option<DevicePart>,
}

/// Elements in the memory of a device, which are copied from there chunk by chunk when they are written.
#[derive(Clone, Debug)]
pub(super) struct DevicePart {
    pub(super) memory: Arc<Memory>,
    pub(super) download: Arc<dyn Download>,
}

impl Tree {
    /// An empty tree; the tree's own root if nothing is added.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a leaf. A path that is there already is a mistake that saving reports.
    #[must_use]
    pub fn with(mut self, path: impl Into<KeyPath>, leaf: impl Into<NewLeaf>) -> Self {
        self.push(path, leaf);
        self
    }

    /// Adds a leaf; see [`with`](Self::with).
    pub fn push(&mut self, path: impl Into<KeyPath>, leaf: impl Into<NewLeaf>) {
        self.leaves.push((path.into(), leaf.into()));
    }

    /// Any JSON that the reader gets back as the tree's custom metadata.
    #[must_use]
    pub fn custom_metadata(mut self, metadata: serde_json::Value) -> Self {
        self.custom_metadata = Some(metadata);
        self
    }

    /// Says that the sequence or mapping at this path is a tuple or a namedtuple; recorded where rich types are saved. A path that
    /// no leaf lies below is a mistake that saving reports.
    #[must_use]
    pub fn container(mut self, path: impl Into<KeyPath>, container: Container) -> Self {
        self.containers.push((path.into(), container));
        self
    }

    /// What was loaded of a checkpoint, with what a state does not tell: the tree's custom metadata, which containers are
    /// tuples, and, of arrays that were loaded whole, the sharding that they were saved with. Memory is shared.
    ///
    /// What Orbax had on a single device is saved as an array on none, which loads anywhere. The checkpoint's own custom
    /// metadata ([`Checkpoint::description`]) goes into the options.
    pub fn of(checkpoint: &Checkpoint, state: &State) -> Self {
        let mut tree = Self::from(state);
        tree.custom_metadata = checkpoint.tree_metadata().cloned();
        let above = tree.above_leaves();
        let stored = checkpoint.containers().iter();
        tree.containers = stored.filter(|(path, _)| above.contains(path.0.as_slice())).cloned().collect();
        let saved: HashMap<&KeyPath, _> = checkpoint.leaves().iter().map(|leaf| (&leaf.path, leaf)).collect();
        for (path, leaf) in &mut tree.leaves {
            let NewLeaf::Array(array) = leaf else { continue };
            let Some(info) = saved.get(path).filter(|_| array.sharding.is_none()) else { continue };
            let shape = info.kind.array().map(|array| &checkpoint.arrays()[array].meta.shape);
            if let (Some(saved), true) = (&info.saved, shape == Some(&array.shape)) {
                // What cannot be a sharding here only advises: the array is saved as one on no device.
                array.sharding = sharding(&checkpoint.meshes()[saved.mesh], &saved.spec, array.shape.len());
            }
        }
        tree
    }

    /// The paths that a leaf lies below.
    pub(super) fn above_leaves(&self) -> HashSet<&[Key]> {
        let paths = self.leaves.iter().map(|(path, _)| path.0.as_slice());
        paths.flat_map(|path| (0..path.len()).map(|len| &path[..len])).collect()
    }

    /// The leaves, in order.
    pub fn leaves(&self) -> &[(KeyPath, NewLeaf)] {
        &self.leaves
    }

    /// Bytes of all arrays in memory, replicas counted once.
    pub fn bytes(&self) -> u64 {
        let bytes = |leaf: &NewLeaf| match leaf {
            NewLeaf::Array(array) => byte_count(&array.shape, array.dtype.size()).unwrap_or(0),
            _ => 0,
        };
        self.leaves.iter().map(|(_, leaf)| bytes(leaf)).sum()
    }
}

/// A recorded sharding on CPU devices of the recorded numbers.
fn sharding(saved: &SavedMesh, spec: &[Vec<String>], rank: usize) -> Option<Sharding> {
    let count = element_count(&saved.shape)?;
    let axes = saved.axes.iter().cloned().zip(saved.shape.iter().copied());
    let devices: Vec<Device> = match &saved.device_ids {
        Some(ids) => ids.iter().map(|&id| u32::try_from(id).ok().map(Device::Cpu)).collect::<Option<_>>()?,
        None => Device::cpus(u32::try_from(count).ok()?),
    };
    Sharding::new(Mesh::new(axes, devices).ok()?, Spec(spec.to_vec()), rank).ok()
}

impl From<&State> for Tree {
    /// A loaded tree, sharing its memory. Arrays on more than one device keep their sharding.
    fn from(state: &State) -> Self {
        let leaves = state.leaves().map(|(path, leaf)| (path.clone(), NewLeaf::from(leaf))).collect();
        Self { leaves, ..Self::default() }
    }
}

impl NewLeaf {
    /// What it is in `_METADATA`.
    pub(super) fn value_type(&self) -> ValueType {
        match self {
            // Orbax keeps the implementations of random keys for arrays on devices only.
            Self::Array(array) if array.even_sharding().is_none() && array.key_impl.is_none() => ValueType::NpArray,
            Self::Array(_) => ValueType::JaxArray,
            Self::Value(Value::Text(_), _) => ValueType::String,
            // Orbax loads no tree in which such a scalar stands; an array of the one number it does.
            Self::Value(Value::Complex(..), _) => ValueType::NpArray,
            Self::Value(..) => ValueType::Scalar,
            Self::None => ValueType::None,
            Self::Empty(container) => ValueType::Empty(*container),
        }
    }
}

impl From<&Leaf> for NewLeaf {
    fn from(leaf: &Leaf) -> Self {
        match leaf {
            Leaf::Array(array) => NewArray::from(array).into(),
            Leaf::Value { value, dtype } => Self::Value(value.clone(), *dtype),
            Leaf::None => Self::None,
            Leaf::Empty(container) => Self::Empty(*container),
        }
    }
}

impl From<&Array> for NewArray {
    fn from(array: &Array) -> Self {
        let mut parts: Vec<NewPart> = Vec::new();
        for shard in array.shards() {
            if parts.iter().all(|part| part.region != shard.region) {
                parts.push(NewPart::from(shard));
            }
        }
        let several = array.sharding.mesh.devices().len() > 1;
        Self {
            shape: array.shape.clone(),
            dtype: array.dtype,
            sharding: several.then(|| array.sharding.clone()),
            parts,
            key_impl: array.key_impl.clone(),
        }
    }
}

impl NewArray {
    /// An array that is whole in memory: its elements row-major, little-endian.
    pub fn new(shape: &[u64], dtype: DType, data: impl Into<Bytes>) -> Self {
        let parts = vec![NewPart::new(Region::whole(shape), data)];
        Self { shape: shape.to_vec(), dtype, sharding: None, parts, key_impl: None }
    }

    /// An array of these values, row-major, without a copy.
    pub fn from_vec<T: Element>(shape: &[u64], values: Vec<T>) -> Self {
        Self::new(shape, T::DTYPE, Bytes::from_owner(Owned(values)))
    }

    /// An array that is divided over the devices of a mesh: `part` gives the elements of every region that a device of this
    /// process holds, once for every distinct region.
    ///
    /// # Errors
    /// Whatever `part` fails with.
    pub fn sharded(
        shape: &[u64],
        dtype: DType,
        sharding: Sharding,
        mut part: impl FnMut(&Region) -> Result<Bytes>,
    ) -> Result<Self> {
        let mut parts: Vec<NewPart> = Vec::new();
        for position in sharding.mesh.local() {
            let region = sharding.region(shape, position);
            if parts.iter().all(|part| part.region != region) {
                let data = part(&region)?;
                parts.push(NewPart::new(region, data));
            }
        }
        Ok(Self { shape: shape.to_vec(), dtype, sharding: Some(sharding), parts, key_impl: None })
    }

    /// Marks it as the key data of a typed PRNG key: its last dimension is the key's words.
    #[must_use]
    pub fn key(mut self, implementation: impl Into<String>) -> Self {
        self.key_impl = Some(implementation.into());
        self
    }

    /// Its sharding, if JAX has such: an uneven one would keep Orbax from loading the checkpoint without a target.
    pub(super) fn even_sharding(&self) -> Option<&Sharding> {
        self.sharding.as_ref().filter(|sharding| sharding.uneven(&self.shape).is_none())
    }

    /// Checks that the parts hold every element, and gives back the distinct ones.
    pub(super) fn distinct_parts(&self) -> Result<Vec<NewPart>> {
        let size = self.dtype.size();
        let Some(bytes) = byte_count(&self.shape, size) else {
            return Err(
                Error::invalid("the shape is beyond what can be stored").found(format_args!("{:?}", self.shape))
            );
        };
        let whole = Region::whole(&self.shape);
        let mut distinct: Vec<NewPart> = Vec::new();
        for part in &self.parts {
            if part.region.rank() != self.shape.len() || !whole.contains(&part.region) {
                return Err(Error::invalid("a part reaches outside the array").found(format_args!("{:?}", part.region)));
            }
            let expected = part.region.volume() * size as u64;
            if part.len() != expected {
                return Err(Error::invalid("a part has another size than its region")
                    .expected(format_args!("{expected} bytes"))
                    .found(format_args!("{} bytes", part.len())));
            }
            if let Some(at) = first_invalid(self.dtype, &part.data) {
                return Err(Error::invalid(format!("an element is no {}", self.dtype))
                    .at("byte", at)
                    .at("part", format_args!("{:?}", part.region))
                    .found(part.data[at]));
            }
            if part.region.is_empty() || distinct.iter().any(|have| have.region == part.region) {
                continue;
            }
            if distinct.iter().any(|have| have.region.intersect(&part.region).is_some()) {
                return Err(Error::invalid("two parts overlap, and are not the same"));
            }
            distinct.push(part.clone());
        }
        let held: u64 = distinct.iter().map(NewPart::len).sum();
        if held != bytes {
            return Err(Error::invalid("not every element is in this process's memory")
                .expected(format_args!("{bytes} bytes"))
                .found(format_args!("{held} bytes"))
                .hint("an array whose shards lie in several processes cannot be saved by one of them"));
        }
        // There may be very many arrays, of one part each.
        distinct.shrink_to_fit();
        Ok(distinct)
    }
}

/// The first byte that is no element of its type, for types that do not fill their bytes.
fn first_invalid(dtype: DType, bytes: &[u8]) -> Option<usize> {
    let valid: fn(u8) -> bool = match (dtype.class(), dtype) {
        (Class::Bool, _) => |byte| byte <= 1,
        (Class::Int(2), _) => |byte| (-2..=1).contains(&byte.cast_signed()),
        (Class::Int(4), _) => |byte| (-8..=7).contains(&byte.cast_signed()),
        (Class::UInt(2), _) => |byte| byte <= 3,
        (Class::UInt(4), _) | (_, DType::Float4E2M1FN) => |byte| byte <= 0x0f,
        (_, DType::Float6E2M3FN | DType::Float6E3M2FN) => |byte| byte <= 0x3f,
        _ => return None,
    };
    bytes.iter().position(|byte| !valid(*byte))
}

/// Values as bytes, freed as values.
struct Owned<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for Owned<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl From<NewArray> for NewLeaf {
    fn from(array: NewArray) -> Self {
        Self::Array(array)
    }
}

impl<T: Element, D: ndarray::Dimension> From<ndarray::Array<T, D>> for NewArray {
    /// The array's elements in C order; no copy if that is how they lie.
    fn from(array: ndarray::Array<T, D>) -> Self {
        let shape: Vec<u64> = array.shape().iter().map(|&extent| extent as u64).collect();
        let values = match array.is_standard_layout() {
            true => {
                let len = array.len();
                let (values, offset) = array.into_raw_vec_and_offset();
                match offset {
                    None | Some(0) if values.len() == len => values,
                    offset => values[offset.unwrap_or(0)..][..len].to_vec(),
                }
            }
            false => array.iter().copied().collect(),
        };
        Self::from_vec(&shape, values)
    }
}

impl<T: Element, D: ndarray::Dimension> From<ndarray::Array<T, D>> for NewLeaf {
    fn from(array: ndarray::Array<T, D>) -> Self {
        Self::Array(array.into())
    }
}

impl From<Value> for NewLeaf {
    fn from(value: Value) -> Self {
        Self::Value(value, None)
    }
}

macro_rules! scalars {
    ($($rust:ty => $variant:ident;)+) => {$(
        impl From<$rust> for NewLeaf {
            fn from(value: $rust) -> Self {
                Self::Value(Value::$variant(value.into()), None)
            }
        }
    )+};
}

scalars! {
    bool => Bool;
    i32 => Int;
    i64 => Int;
    u32 => Int;
    u64 => Int;
    f32 => Float;
    f64 => Float;
    &str => Text;
    String => Text;
}

impl TreeItem {
    /// Waits until the devices that hold arrays have done what they were given.
    pub(in crate::tree) fn settle(&self) -> Result<()> {
        let Self::Tree(tree) = self else { return Ok(()) };
        let arrays = tree.leaves.iter().filter_map(|(_, leaf)| match leaf {
            NewLeaf::Array(array) => Some(array),
            _ => None,
        });
        let mut settled: Vec<&Arc<dyn Download>> = Vec::new();
        for device in arrays.flat_map(|array| &array.parts).filter_map(|part| part.device.as_ref()) {
            if !settled.iter().any(|have| Arc::ptr_eq(have, &device.download)) {
                device.download.settle()?;
                settled.push(&device.download);
            }
        }
        Ok(())
    }
}

impl NewPart {
    /// A part in host memory.
    pub fn new(region: Region, data: impl Into<Bytes>) -> Self {
        Self { region, data: data.into(), device: None }
    }

    /// Number of bytes, wherever they are.
    pub(super) fn len(&self) -> u64 {
        self.device.as_ref().map_or(self.data.len() as u64, |device| device.memory.len())
    }
}

impl From<&Shard> for NewPart {
    fn from(shard: &Shard) -> Self {
        let download = shard.download.as_ref();
        let device =
            download.map(|download| DevicePart { memory: Arc::clone(&shard.memory), download: Arc::clone(download) });
        Self { region: shard.region.clone(), data: shard.host_bytes().unwrap_or_default(), device }
    }
}

/// A loaded shard's host memory as shared bytes.
pub(in crate::tree) struct Loaded(pub(in crate::tree) Arc<Memory>);

impl AsRef<[u8]> for Loaded {
    fn as_ref(&self) -> &[u8] {
        match &*self.0 {
            Memory::Host(buffer) => buffer,
            Memory::Device(_) => &[],
        }
    }
}
