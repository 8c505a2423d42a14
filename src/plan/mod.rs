//! Mesh, spec and view to reads, decodes and placements.
//!
//! ```text
//!   stored arrays + target leaves ──► demands: which box of which stored array goes to which shard
//!                  per stored array ──► per chunk ──► unit: what is read and decoded in one go
//!                                                      └─ placements: box of the unit ─► box of a shard
//!                            units ──► batches: neighbouring units read by one request, in order
//! ```
//!
//! A [`Plan`] exists completely before the first data byte is read. It is deterministic and says what will be read,
//! decoded and held; [`explain`] prints it, and it serialises whole. Every stored unit that is wanted appears once, whatever number of devices
//! want parts of it.
//!
//! Must not know: how bytes are read (it asks through [`Asker`](crate::need::Asker) for sizes and shard indexes), how they
//! are decoded or cast, where results live.

mod build;
pub mod chunking;
pub mod explain;
mod held;
mod mesh;
mod order;
mod parts;
mod ranges;
pub mod route;
mod sparse;
pub mod svg;
mod view;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;

pub use build::{build, build_whole};
pub(crate) use held::too_many_uncounted;
pub use mesh::{Device, Mesh, MeshDevice, Process, Sharding, Spec};
pub use ranges::Slabs;
pub use sparse::stored_positions;
pub use view::{Piece, View};

use crate::dtype::{CastPolicy, DType};
use crate::keypath::KeyPath;
use crate::kv;
use crate::layout::orbax::sums::{ValueSum, ValueSums};
use crate::limits::{SLOT_SLACK_BYTES, WINDOWS_PER_BUDGET, ZSTD_WINDOW_BYTES_MIN, ZSTD_WINDOW_LOG_MAX};
use crate::relpath::RelPath;
use crate::shape::Region;
use crate::zarr::{ArrayMeta, ByteCodec, Endian, IndexLocation};

/// A stored array: what it is and where its values are.
#[derive(Clone, Debug)]
pub struct StoredArray {
    /// The name under which it is stored, for messages.
    pub name: String,
    /// Shape, type, chunks, codecs.
    pub meta: Arc<ArrayMeta>,
    /// Where its chunks are.
    pub values: Values,
    /// Whether a missing chunk is an error (the writer says that it stored every chunk), not a chunk of fill values.
    pub every_chunk_stored: bool,
    /// Checksums of the values that lie in files, if they were sealed.
    pub sums: Option<Arc<ValueSums>>,
}

/// Where the chunks of a stored array are.
#[derive(Clone, Debug)]
pub enum Values {
    /// Under keys of a database, after this prefix.
    Keys {
        /// The database.
        index: Arc<kv::Index>,
        /// What stands before the chunk's own key: `params.w/`.
        prefix: Vec<u8>,
    },
    /// One file a chunk below this directory.
    Directory(RelPath),
    /// The only chunk is this range of a file.
    Extent {
        /// The file.
        path: RelPath,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
}

/// One array that is wanted.
#[derive(Clone, Debug)]
pub struct Want {
    /// What the caller calls it.
    pub path: KeyPath,
    /// How it lies in stored arrays.
    pub view: View,
    /// Wanted extents: what the view lacks is padded at the high end, what it has beyond is cut off.
    pub shape: Vec<u64>,
    /// Wanted element type.
    pub dtype: DType,
    /// Who holds what.
    pub sharding: Sharding,
    /// The padding element, in the wanted type.
    pub pad: Vec<u8>,
    /// What happens to values that the wanted type cannot hold.
    pub policy: CastPolicy,
    /// Leaves of a lower number are read first.
    pub priority: u32,
}

/// When checksums are checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Verify {
    /// Wherever a unit is read whole.
    #[default]
    Auto,
    /// Always: a unit with a checksum is read whole even when a part would do.
    Full,
    /// Never.
    Off,
}

/// What a plan may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Staging memory beyond the results, in bytes.
    pub staging_bytes: u64,
    /// Size of one staging slot: the largest read and the largest slab, in bytes.
    pub slot_bytes: u64,
    /// How many workers decode at once; each needs a slot to decode into.
    pub workers: u32,
    /// Reads whose gap is at most this are merged, in bytes.
    pub merge_gap_bytes: u64,
    /// When checksums are checked.
    pub verify: Verify,
    /// Whether the plan itself counts as staging memory and is refused where there is no room for it. What looks at all that is
    /// stored plans without: it holds a small multiple of the metadata.
    pub counts_plan: bool,
}

/// What a decoder of a chain holds in memory beside its input and output, in bytes, given the encoded and decoded length and
/// the largest zstd window.
/// The caller supplies it: how bytes are decoded is not this folder's business.
pub type DecoderCost = fn(&[ByteCodec], u64, u64, u64) -> u64;

impl Limits {
    /// Memory that a slot takes: its bytes, and room for the rest of the blocks that a direct read takes.
    pub fn slot_memory(&self) -> u64 {
        self.slot_bytes.saturating_add(SLOT_SLACK_BYTES)
    }

    /// The largest zstd window that a unit of this plan is decoded with, in bytes; a frame that needs more is refused when
    /// it is met, with the budget that would do.
    pub fn window_bytes_max(&self) -> u64 {
        (self.staging_bytes / WINDOWS_PER_BUDGET).clamp(ZSTD_WINDOW_BYTES_MIN, 1 << ZSTD_WINDOW_LOG_MAX)
    }
}

/// Everything a load will do.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// What was wanted, in the caller's order.
    pub leaves: Vec<PlannedLeaf>,
    /// Distinct local shards: one a leaf, region and memory, whatever number of devices of that memory hold it. Host memory is
    /// one memory, and each GPU's is one.
    pub shards: Vec<PlannedShard>,
    /// The arrays that units belong to.
    pub arrays: Vec<UnitArray>,
    /// Files that units read.
    pub files: Vec<RelPath>,
    /// What is read and decoded in one go, in the order of work.
    pub units: Vec<Unit>,
    /// Requests, in the order of work; together they name every unit once.
    pub batches: Vec<Batch>,
    /// What units and batches take of the budget themselves, in bytes.
    pub held_bytes: u64,
    /// Under what limits this was planned.
    pub limits: Limits,
}

/// One wanted array and what it costs.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedLeaf {
    /// What the caller calls it.
    pub path: KeyPath,
    /// Global extents.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: DType,
    /// Who holds what.
    pub sharding: Sharding,
    /// For every device of the mesh its part and, for local devices, the shard in [`Plan::shards`].
    pub parts: Vec<Part>,
    /// What happens to values that the type cannot hold.
    pub policy: CastPolicy,
    /// Leaves of a lower number are read first and reported first.
    pub priority: u32,
    /// Bytes of the whole array in its wanted type, counted once.
    pub bytes_logical: u64,
    /// Stored bytes that some local shard needs. Of an uncompressed chunk the needed elements, else the whole unit.
    pub bytes_needed: u64,
    /// Bytes that its units decode to.
    pub bytes_decoded: u64,
    /// Bytes that its units read, gaps between them not counted.
    pub bytes_read: u64,
    /// Units that it takes part in.
    pub units: u64,
}

/// What one device of the mesh holds of a leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Which elements.
    pub region: Region,
    /// Its memory, if the device belongs to this process.
    pub shard: Option<u32>,
}

/// One local shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedShard {
    /// The leaf it belongs to.
    pub leaf: u32,
    /// Which elements of the leaf.
    pub region: Region,
    /// Positions of the local devices that hold it.
    pub devices: Vec<u32>,
    /// Its size.
    pub bytes: u64,
    /// The element to fill it with first; `None` when units cover it completely.
    pub init: Option<Vec<u8>>,
    /// The equal shard of another GPU that it is copied from once that is complete; no unit goes to it then.
    pub copy_of: Option<u32>,
    /// Whether a shard in host memory has the same elements, so that lossy ones are counted there.
    pub counted_elsewhere: bool,
}

/// What units of one stored array have in common.
#[derive(Clone, Debug, Serialize)]
pub struct UnitArray {
    /// The stored name.
    pub name: String,
    /// Stored type.
    pub dtype: DType,
    /// Byte order of stored elements.
    pub endian: Endian,
    /// How a unit is decoded.
    pub codecs: Arc<[ByteCodec]>,
    /// The element of what is not stored, in memory form.
    pub fill: Bytes,
    /// Whether something that is not stored is an error.
    pub every_chunk_stored: bool,
    /// Set when a unit is a whole zarr shard with one inner chunk: its index stands in the value.
    pub single: Option<SingleShard>,
}

/// The index of a zarr shard that holds exactly one inner chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct SingleShard {
    /// Where the index stands.
    pub location: IndexLocation,
    /// Its byte order.
    pub endian: Endian,
    /// Whether a CRC-32C follows it.
    pub crc32c: bool,
}

/// What is read and decoded in one go: a chunk, an inner chunk, or a byte range of an uncompressed one.
#[derive(Clone, Debug, Serialize)]
pub struct Unit {
    /// The array, in [`Plan::arrays`].
    pub array: u32,
    /// Grid position of the chunk.
    pub chunk: Vec<u64>,
    /// Which inner chunk, if the chunk is a zarr shard of several.
    pub inner: Option<u64>,
    /// Where the stored bytes are.
    pub source: Source,
    /// Extents of the unit in stored order. Decoded elements lie row-major in it.
    pub shape: Vec<u64>,
    /// How many bytes of that box lie before the first byte of the source, when only a range of it is read.
    pub skip: u64,
    /// Length in bytes once decoded.
    pub decoded_bytes: u64,
    /// Whether the stored unit is read whole, so that its checksums can be checked.
    pub whole: bool,
    /// Whether the value is a whole shard whose index must be followed ([`UnitArray::single`]).
    pub indexed: bool,
    /// Memory that the decoder holds while it runs, in bytes.
    pub working_bytes: u64,
    /// What a part of the source must have as its checksum, its offset counted from the source; known of what was sealed.
    pub sum: Option<ValueSum>,
    /// Where the elements go.
    pub placements: Vec<Placement>,
}

/// Where the stored bytes of a unit are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Source {
    /// In a file of [`Plan::files`].
    File {
        /// Which file.
        file: u32,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// In the metadata.
    Inline(Bytes),
    /// Not stored: every element is this one (in the stored type, memory form).
    Fill(Bytes),
}

/// Where a box of a unit goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// The shard, in [`Plan::shards`].
    pub shard: u32,
    /// Which elements of the unit.
    pub region: Region,
    /// For every dimension of the unit the distance, in elements, of neighbours in the shard.
    pub strides: Vec<u64>,
    /// Where in the shard the region's first element goes, in elements.
    pub start: u64,
}

/// One request and the units it serves; or units that need no request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Batch {
    /// What is read; `None` for inline and fill units.
    pub read: Option<ReadRange>,
    /// Positions in [`Plan::units`].
    pub units: Range<u32>,
}

/// A byte range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ReadRange {
    /// Which file of [`Plan::files`].
    pub file: u32,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// Slots of a unit that is larger than a slot: read into, decoded from, decoded into.
const STREAM_SLOTS: u64 = 3;

/// The position of something as the plan stores it. What a plan holds is bounded far below 2^32.
fn id(position: usize) -> u32 {
    u32::try_from(position).unwrap_or(u32::MAX)
}

impl Unit {
    /// Number of stored bytes; 0 for fill units.
    pub fn stored_bytes(&self) -> u64 {
        match &self.source {
            Source::File { len, .. } => *len,
            Source::Inline(bytes) => bytes.len() as u64,
            Source::Fill(_) => 0,
        }
    }
}

impl Placement {
    /// The part of this placement inside a slab of its unit.
    pub fn clip(&self, slab: &Region) -> Option<Self> {
        let region = self.region.intersect(slab)?;
        let moved: u64 =
            (0..region.rank()).map(|dim| (region.start[dim] - self.region.start[dim]) * self.strides[dim]).sum();
        Some(Self { shard: self.shard, region, strides: self.strides.clone(), start: self.start + moved })
    }
}

impl Plan {
    /// The host memory of this process that results take, replicas counted once, in bytes.
    pub fn result_bytes(&self) -> u64 {
        self.shards.iter().filter(|shard| self.device(shard).is_host()).map(|shard| shard.bytes).sum()
    }

    /// The memory that results take of every GPU, by ordinal, replicas on one GPU counted once, in bytes.
    pub fn gpu_bytes(&self) -> Vec<(u32, u64)> {
        let mut bytes = BTreeMap::new();
        for shard in &self.shards {
            if let Some(ordinal) = self.device(shard).gpu() {
                *bytes.entry(ordinal).or_insert(0) += shard.bytes;
            }
        }
        bytes.into_iter().collect()
    }

    /// The device of a shard; the first one, where several share its memory.
    pub fn device(&self, shard: &PlannedShard) -> Device {
        let position = shard.devices.first().map_or(0, |&position| position as usize);
        self.leaves[shard.leaf as usize].sharding.mesh.devices()[position].device
    }

    /// The most slots that work holds at once: those that batches read into, and one a worker to decode into.
    pub fn slots(&self) -> u64 {
        let reads = self.batches.iter().filter_map(|batch| batch.read);
        let read = |read: ReadRange| if read.len > self.limits.slot_bytes { STREAM_SLOTS } else { 1 };
        let workers = u64::from(self.limits.workers).min(self.batches.len() as u64);
        let most = self.limits.staging_bytes / self.limits.slot_bytes.max(1);
        (reads.map(read).sum::<u64>() + workers).min(most)
    }

    /// Bytes requested from files: what units need and the gaps that merging bridges.
    pub fn bytes_requested(&self) -> u64 {
        self.batches.iter().filter_map(|batch| batch.read).map(|read| read.len).sum()
    }

    /// Bytes of values that came with the metadata, so that nothing is requested for them.
    pub fn bytes_inline(&self) -> u64 {
        let inline = self.units.iter().filter(|unit| matches!(unit.source, Source::Inline(_)));
        inline.map(Unit::stored_bytes).sum()
    }

    /// Data bytes read, by requests or with the metadata; at least what is needed.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_requested() + self.bytes_inline()
    }

    /// Number of requests, large units cut into slots.
    pub fn requests(&self) -> u64 {
        let reads = self.batches.iter().filter_map(|batch| batch.read);
        reads.map(|read| read.len.div_ceil(self.limits.slot_bytes.max(1)).max(1)).sum()
    }

    /// Stored bytes that some local shard needs.
    pub fn bytes_needed(&self) -> u64 {
        self.leaves.iter().map(|leaf| leaf.bytes_needed).sum()
    }

    /// Bytes that are decoded, raw bytes included.
    pub fn bytes_decoded(&self) -> u64 {
        self.units.iter().filter(|unit| !matches!(unit.source, Source::Fill(_))).map(|unit| unit.decoded_bytes).sum()
    }

    /// Target bytes of all leaves, counted once.
    pub fn bytes_logical(&self) -> u64 {
        self.leaves.iter().map(|leaf| leaf.bytes_logical).sum()
    }

    /// The staging memory that a batch takes while it is at work, in bytes, beside the slot that every worker has to
    /// decode into: a slot to read into and what the decoder holds. A unit larger than a slot keeps three: one is read while
    /// another is decoded, and the slab stays half full between the two.
    pub fn batch_bytes(&self, batch: &Batch) -> u64 {
        let Some(read) = batch.read else { return 0 };
        let units = &self.units[batch.units.start as usize..batch.units.end as usize];
        let working = units.iter().map(|unit| unit.working_bytes).max().unwrap_or(0);
        let slots = if read.len > self.limits.slot_bytes { STREAM_SLOTS } else { 1 };
        (slots * self.limits.slot_memory()).saturating_add(working)
    }

    /// The most memory beyond the results that is in use at once, in bytes: the budget, or less when there is less to do.
    pub fn staging_bytes(&self) -> u64 {
        let workers = self.limits.slot_memory() * u64::from(self.limits.workers);
        let batches = self.batches.iter().fold(0u64, |sum, batch| sum.saturating_add(self.batch_bytes(batch)));
        workers.saturating_add(batches).saturating_add(self.held_bytes).min(self.limits.staging_bytes)
    }

    /// Result bytes of every device of this process, by position in the mesh of the leaf.
    pub fn device_bytes(&self) -> Vec<(Device, u64)> {
        let mut bytes: Vec<(Device, u64)> = Vec::new();
        for leaf in &self.leaves {
            for position in leaf.sharding.mesh.local() {
                let device = leaf.sharding.mesh.devices()[position].device;
                let size = leaf.parts[position].region.volume() * leaf.dtype.size() as u64;
                match bytes.iter_mut().find(|(have, _)| *have == device) {
                    Some((_, total)) => *total += size,
                    None => bytes.push((device, size)),
                }
            }
        }
        bytes
    }
}
