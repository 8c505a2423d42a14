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
}

/// Gives the memory of all shards of a load, in one call, before anything is read.
pub trait Destination {
    /// One [`Memory`] for each shard, in order, each of exactly [`ShardSpec::bytes`].
    ///
    /// # Errors
    /// Out of memory, or memory that the caller cannot provide.
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>>;
}
