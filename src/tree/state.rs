//! What a load leaves behind: a tree of sharded arrays and values, and a report.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ndarray::ArrayViewD;

use super::save::Loaded;
use super::value::Value;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;
use crate::keypath::KeyPath;
use crate::layout::orbax::metadata::Container;
use crate::place::{DeviceMemory, Download, Element, Memory};
use crate::plan::{Device, Sharding};
use crate::shape::Region;

/// A loaded tree: every leaf that was asked for, in the target's order.
#[derive(Debug, Default)]
pub struct State {
    leaves: Vec<(KeyPath, Leaf)>,
    /// Position of every leaf by its path's string form.
    index: HashMap<String, usize>,
    report: Report,
}

/// One loaded leaf.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum Leaf {
    /// A sharded array.
    Array(Array),
    /// A number, bool or string.
    Value {
        /// The value.
        value: Value,
        /// Its type; `None` for a string.
        dtype: Option<DType>,
    },
    /// `None`.
    None,
    /// An empty container.
    Empty(Container),
}

/// A global array, of which this process holds shards.
#[derive(Clone, Debug)]
pub struct Array {
    /// Where it lies in the tree.
    pub path: KeyPath,
    /// Global extents.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: DType,
    /// Who holds what.
    pub sharding: Sharding,
    /// The implementation's name when the array is the key data of a typed JAX PRNG key.
    pub key_impl: Option<String>,
    /// Elements that the cast changed beyond ordinary rounding.
    pub lossy: u64,
    pub(super) shards: Vec<Shard>,
}

/// The part of an array that one device holds.
#[derive(Clone, Debug)]
pub struct Shard {
    /// The device's position in the mesh.
    pub position: usize,
    /// The device.
    pub device: Device,
    /// Which elements of the array.
    pub region: Region,
    pub(super) dtype: DType,
    pub(super) memory: Arc<Memory>,
    /// Who brings it to the host, if it is on a device.
    pub(super) download: Option<Arc<dyn Download>>,
}

/// What a load did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// From the call to the last array ready; opening is included where the call opened, engine start-up is not.
    pub elapsed: Duration,
    /// Target bytes of all arrays, counted once.
    pub bytes_logical: u64,
    /// Stored bytes that some shard needs, before merging.
    pub bytes_needed: u64,
    /// Data bytes read: requested from files, or values that came with the metadata.
    pub bytes_read: u64,
    /// Bytes that came out of decoding, uncompressed bytes included.
    pub bytes_decoded: u64,
    /// Stored bytes that were not checked: parts of units, or everything with verification off.
    pub bytes_unverified: u64,
    /// The most host memory held at once: results and staging, by the engine's own count.
    pub peak_host_bytes: u64,
    /// The most memory of GPUs held at once, of all of them together: results and staging, by the engine's own count.
    pub peak_device_bytes: u64,
    /// Requests made.
    pub requests: u64,
    /// Lossy elements of every leaf that has any.
    pub lossy: BTreeMap<String, u64>,
    /// Leaves of the checkpoint that the target leaves out.
    pub skipped: Vec<KeyPath>,
    /// Leaves of the target that the checkpoint lacks.
    pub missing: Vec<KeyPath>,
    /// Result bytes of each local device.
    pub devices: Vec<(Device, u64)>,
    /// Where the time went.
    pub stages: Stages,
}

/// Busy and blocked time and bytes of every stage. Busy time is summed over threads.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct Stages {
    pub open: Stage,
    pub plan: Stage,
    pub read: Stage,
    pub decode: Stage,
    pub transform: Stage,
    pub copy: Stage,
}

/// One stage of a load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stage {
    /// Time at work, summed over threads.
    pub busy: Duration,
    /// Time waiting for another stage: reads for memory, workers for bytes.
    pub blocked: Duration,
    /// Bytes that came out.
    pub bytes: u64,
}

impl State {
    pub(super) fn new(leaves: Vec<(KeyPath, Leaf)>, report: Report) -> Self {
        let index = leaves.iter().enumerate().map(|(at, (path, _))| (path.to_string(), at)).collect();
        Self { leaves, index, report }
    }

    /// Every leaf, in the target's order.
    pub fn leaves(&self) -> impl ExactSizeIterator<Item = (&KeyPath, &Leaf)> {
        self.leaves.iter().map(|(path, leaf)| (path, leaf))
    }

    /// The leaf whose path prints as this.
    pub fn leaf(&self, path: &str) -> Option<&Leaf> {
        self.index.get(path).map(|&at| &self.leaves[at].1)
    }

    /// The array whose path prints as this.
    ///
    /// # Errors
    /// No such leaf, or one that is no array.
    pub fn array(&self, path: &str) -> Result<&Array> {
        match self.leaf(path) {
            Some(Leaf::Array(array)) => Ok(array),
            Some(_) => Err(Error::invalid("the leaf is no array").at("leaf", path)),
            None => {
                let names = self.leaves.iter().map(|(path, _)| path.to_string());
                Err(super::rules::no_such("leaf", path, names))
            }
        }
    }

    /// What the load did.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

impl Array {
    /// The shards of this process, in mesh order. Replicas on devices that share memory share it here too.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }
}

impl Shard {
    /// The elements, row-major, little-endian; sub-byte types one byte an element. Empty if the shard is on a device:
    /// [`to_host`](Self::to_host) brings it here.
    pub fn bytes(&self) -> &[u8] {
        match &*self.memory {
            Memory::Host(buffer) => buffer,
            Memory::Device(_) => &[],
        }
    }

    /// The same, shared: the memory lives as long as the state or any of these do.
    pub fn shared_bytes(&self) -> Bytes {
        Bytes::from_owner(Loaded(Arc::clone(&self.memory)))
    }

    /// The device memory that holds the elements, row-major, if the shard is on a device: an address, a length and a stream.
    /// Everything is there: any stream may use it at once. An engine's own memory lives as long as the state or any shard does.
    pub fn device_memory(&self) -> Option<&DeviceMemory> {
        match &*self.memory {
            Memory::Host(_) => None,
            Memory::Device(memory) => Some(memory),
        }
    }

    /// The elements in host memory: shared if they are there, copied from the device otherwise.
    ///
    /// # Errors
    /// No host memory, or a device that fails.
    pub fn to_host(&self) -> Result<Bytes> {
        let (Memory::Device(memory), Some(download)) = (&*self.memory, &self.download) else {
            return Ok(self.shared_bytes());
        };
        let len = usize::try_from(memory.len()).map_err(|_| Error::bug("a shard is larger than the address space"))?;
        let mut buffer = Buffer::zeroed(len)?;
        #[allow(unsafe_code)]
        // SAFETY: the shard's own memory, which is complete and kept; of a caller's memory the caller has promised it.
        unsafe { download.download(&mut std::iter::once(memory.span()), &mut buffer) }?;
        Ok(Bytes::from_owner(Loaded(Arc::new(Memory::Host(buffer)))))
    }

    /// The elements as values.
    ///
    /// # Errors
    /// A Rust type that does not hold this element type, or a shard on a device.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        if !T::holds(self.dtype) {
            return Err(Error::invalid("the shard has another element type")
                .expected(self.dtype)
                .found(std::any::type_name::<T>())
                .hint("load with a cast, or view the bytes"));
        }
        let Memory::Host(buffer) = &*self.memory else {
            return Err(Error::new(ErrorKind::Device, "the shard is not in host memory")
                .found(self.device)
                .hint("`to_host` copies it; `device_memory` says where it is"));
        };
        if buffer.is_empty() {
            // An empty shard has no memory, and so no alignment.
            return Ok(&[]);
        }
        bytemuck::try_cast_slice(buffer)
            .map_err(|error| Error::invalid(format!("the memory cannot be viewed: {error}")))
    }

    /// The elements as an `ndarray` view, without a copy.
    ///
    /// # Errors
    /// See [`as_slice`](Self::as_slice).
    pub fn as_ndarray<T: Element>(&self) -> Result<ArrayViewD<'_, T>> {
        let shape: Vec<usize> =
            self.region.extent.iter().map(|&extent| usize::try_from(extent).unwrap_or(usize::MAX)).collect();
        ArrayViewD::from_shape(shape, self.as_slice()?)
            .map_err(|error| Error::invalid(format!("the shard's shape does not fit ndarray: {error}")))
    }
}
