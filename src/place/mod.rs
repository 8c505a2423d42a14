//! Where results live: memory that is prepared before a load and owned by the caller after it.
//!
//! ```text
//!   host.rs   host memory, typed views of it       parcel.rs  slabs and boxes on their way to a device
//!   probe.rs  is there a driver?                   cuda/      CUDA devices; absent.rs where they are not built
//! ```
//!
//! A [`Destination`] is asked once for the memory of all local shards. An engine's own allocates it, on the host and on devices
//! ([`HostDestination`] on the host alone); a caller's own destination hands out memory that it already has. Nothing else
//! allocates result memory.
//!
//! Must not know: files, formats, how bytes arrive.

#[cfg(not(feature = "cuda"))]
#[allow(unsafe_code)]
mod absent;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod cuda;
mod host;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only devices read it"))]
pub(crate) mod parcel;
mod probe;

#[cfg(not(feature = "cuda"))]
pub(crate) use absent::{Delivery, Gpu, Staging};
#[cfg(feature = "cuda")]
pub(crate) use cuda::{Delivery, Gpu, Staging};
pub use host::{Element, HostDestination};
pub use probe::{CudaProbe, gpus, probe_cuda};

use std::any::Any;
use std::sync::Arc;

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
    /// Device memory of exactly the shard's size.
    Device(DeviceMemory),
}

impl Memory {
    /// Number of bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Host(buffer) => buffer.len() as u64,
            Self::Device(memory) => memory.len,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Keeps memory that an engine has allocated.
pub(crate) type Hold = Arc<dyn Any + Send + Sync>;

/// Brings bytes of a device to host memory.
pub(crate) trait Download: std::fmt::Debug + Send + Sync {
    /// Copies runs of device memory, one behind the other, until there is no more room, and returns when they are here.
    ///
    /// # Errors
    /// A device that fails, or runs that are shorter than the room.
    ///
    /// # Safety
    /// 1. The runs are valid, and nobody writes them meanwhile.
    #[allow(unsafe_code)]
    unsafe fn download(&self, runs: &mut dyn Iterator<Item = parcel::Span>, to: &mut [u8]) -> Result<()>;
}

/// Memory of a device: an address, a length, and a stream.
///
/// The stream of a caller's memory is the one that has used it so far: an engine writes once what that stream has now is done.
/// The stream of an engine's own memory is the one that it writes on; nothing of a shard that was handed out is left on it, so
/// that any stream may use the shard at once.
pub struct DeviceMemory {
    pointer: u64,
    len: u64,
    stream: u64,
    /// Whether an engine has allocated it, and what keeps it then.
    owned: bool,
    _hold: Option<Hold>,
}

impl std::fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceMemory({} bytes at {:#x})", self.len, self.pointer)
    }
}

impl DeviceMemory {
    /// Names memory that the caller owns.
    ///
    /// # Safety
    /// 1. `pointer` is valid for writes of `len` bytes in the primary context of the shard's device until the load has ended, and
    ///    for reads as long as its shard is used.
    /// 2. Nothing else writes those bytes meanwhile, on any stream, beyond what `stream` was given before the load was called.
    /// 3. `stream` is a live stream of that context, or one of the driver's special handles as the thread that calls the load
    ///    means it, until that call has returned.
    #[allow(unsafe_code)]
    pub unsafe fn new(pointer: u64, len: u64, stream: u64) -> Self {
        Self { pointer, len, stream, owned: false, _hold: None }
    }

    /// Memory that an engine has allocated and this value keeps.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "devices make it"))]
    pub(crate) fn held(pointer: u64, len: u64, stream: u64, hold: Hold) -> Self {
        Self { pointer, len, stream, owned: true, _hold: Some(hold) }
    }

    /// No memory.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "devices make it"))]
    pub(crate) fn empty(stream: u64) -> Self {
        Self { pointer: 0, len: 0, stream, owned: true, _hold: None }
    }

    /// Whether the caller owns it.
    pub(crate) fn is_foreign(&self) -> bool {
        !self.owned
    }

    pub(crate) fn span(&self) -> parcel::Span {
        parcel::Span { pointer: self.pointer, len: self.len }
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

    /// The driver's stream handle.
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
