//! Where results live: memory that is prepared before a load and owned by the caller after it.
//!
//! A [`Destination`] is asked once for the memory of all local shards. [`HostDestination`] allocates it; a caller's own
//! destination hands out memory that it already has. Nothing else allocates result memory.
//!
//! Must not know: files, formats, how bytes arrive.

mod cuda_probe;
mod host;

pub use cuda_probe::{CudaProbe, probe_cuda};
pub use host::{Element, HostDestination};

use crate::dtype::DType;
use crate::error::Result;
use crate::io::Buffer;
use crate::keypath::KeyPath;
use crate::plan::Device;
use crate::shape::Region;

/// One shard that needs memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardSpec {
    /// The array it belongs to.
    pub path: KeyPath,
    /// Element type.
    pub dtype: DType,
    /// Extents of the whole array.
    pub global_shape: Vec<u64>,
    /// Which elements of it, row-major in the shard's memory.
    pub region: Region,
    /// Position in the mesh of the device that holds it; the first one, where several devices share the memory.
    pub position: usize,
    /// That device.
    pub device: Device,
    /// Size in bytes; 0 for an empty shard.
    pub bytes: u64,
}

/// The memory of one shard.
#[non_exhaustive]
#[derive(Debug)]
pub enum Memory {
    /// Host memory of exactly the shard's size.
    Host(Buffer),
    /// Device memory of exactly the shard's size. No engine of this version fills it: such a load is refused before anything
    /// is read.
    Device(DeviceMemory),
}

/// Memory of a device that the caller owns: an address, a length, and the stream in whose order it is written.
#[derive(Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    pointer: u64,
    len: u64,
    stream: u64,
}

impl DeviceMemory {
    /// Names memory that the caller owns.
    ///
    /// # Safety
    /// 1. `pointer` is valid for writes of `len` bytes on the device of the shard until the load has ended.
    /// 2. Nothing else writes those bytes meanwhile, on any stream.
    /// 3. `stream` is a live stream of that device's context until the load has ended.
    #[allow(unsafe_code)]
    pub unsafe fn new(pointer: u64, len: u64, stream: u64) -> Self {
        Self { pointer, len, stream }
    }

    /// Device address of the first byte.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The driver's stream handle: writes are ordered on it, and whoever waits for it sees them.
    pub fn stream(&self) -> u64 {
        self.stream
    }
}

/// Gives the memory of all shards of a load, in one call, before anything is read.
pub trait Destination {
    /// One [`Memory`] for each shard, in order, each of exactly [`ShardSpec::bytes`].
    ///
    /// # Errors
    /// Out of memory, or memory that the caller cannot provide.
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>>;
}
