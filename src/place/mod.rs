//! Where results live: memory that is prepared before a load and owned by the caller after it.
//!
//! ```text
//!   host.rs   host memory, typed views of it       device.rs  device memory as a value
//!   probe.rs  is there a driver?                   parcel.rs  slabs and boxes on their way to a device
//!   cuda/     CUDA devices                         absent.rs  the same where they are not built
//!   cudarc.rs memory that cudarc allocates, for those who use it
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
#[cfg(feature = "cudarc")]
#[allow(unsafe_code)]
pub mod cudarc;
mod device;
mod host;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only devices read it"))]
pub(crate) mod parcel;
mod probe;
#[cfg(feature = "cuda")]
mod room;

#[cfg(not(feature = "cuda"))]
pub(crate) use absent::{Crossing, Delivery, Gauge, Gpu, Staging};
#[cfg(feature = "cuda")]
pub(crate) use cuda::{Crossing, Delivery, Gauge, Gpu, Staging};
pub(crate) use device::Download;
pub use device::{DeviceEvent, DeviceMemory, DeviceSlice};
pub use host::{Element, HostDestination};
pub use probe::{CudaProbe, free_bytes, gpus, probe_cuda};

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
            Self::Device(memory) => memory.len(),
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Memory of one shard that a caller lends to [`Engine::fill`](crate::Engine::fill).
#[non_exhaustive]
#[derive(Debug)]
pub enum Slot<'m> {
    /// Host memory.
    Host(&'m mut [u8]),
    /// Memory of the shard's device.
    Device(DeviceMemory),
}

impl<'m> From<&'m mut [u8]> for Slot<'m> {
    fn from(slice: &'m mut [u8]) -> Self {
        Self::Host(slice)
    }
}

impl From<DeviceMemory> for Slot<'_> {
    fn from(memory: DeviceMemory) -> Self {
        Self::Device(memory)
    }
}

/// One measurement of a device: what it did, the bytes that moved, and how long it took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    pub(crate) name: &'static str,
    pub(crate) bytes: u64,
    pub(crate) elapsed: std::time::Duration,
}

/// Copying to the device from locked memory.
pub(crate) const UPLOAD: &str = "copy to the device";

/// The driver's own copy on the device, with which kernels are compared.
pub(crate) const DEVICE_COPY: &str = "copy on the device";

/// Gives the memory of all shards of a load, in one call, before anything is read.
pub trait Destination {
    /// One [`Memory`] for each shard, in order, each of exactly [`ShardSpec::bytes`].
    ///
    /// # Errors
    /// Out of memory, or memory that the caller cannot provide.
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>>;
}
