//! Memory that cudarc allocates, so that arrays become its `CudaSlice`s without a copy (feature `cudarc`).
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use touchdown::cudarc::driver::{CudaContext, CudaSlice};
//! use touchdown::place::{cudarc::CudarcDestination, gpus};
//! use touchdown::{Engine, EngineOptions, Leaf, Mesh, Otherwise};
//!
//! let checkpoint = touchdown::open("tests/fixtures/quickstart/ckpt")?;
//! let target = checkpoint.target().on(&Mesh::line(gpus())?).otherwise(Otherwise::Replicate);
//! let stream = CudaContext::new(0)?.new_stream()?; // the one that will use the arrays, and free them
//! let mut memory = CudarcDestination::new([stream]);
//! let engine = Engine::new(EngineOptions::default())?;
//! let state = engine.load_to(&checkpoint, &target, &mut memory)?.wait()?;
//! for (path, leaf) in state.into_leaves() {
//!     let Leaf::Array(array) = leaf else { continue };
//!     for shard in array.into_shards() {
//!         let slice: CudaSlice<f32> = shard.into_cuda_slice()?; // yours
//!         println!("{path}: {} elements", slice.len());
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! candle takes such a slice with `CudaStorage::wrap_cuda_slice`; the stream is then its `CudaDevice::cuda_stream()`.
//!
//! A `CudaSlice` frees its memory itself, on its own stream, so each needs an allocation of its own, made on the stream that will
//! use it: [`CudarcDestination`] makes them. Memory that an engine allocates is shared by small arrays; it is seen as a
//! `CudaSlice` through a [`SharedSlice`], which does not free it. cudarc panics where there is no driver:
//! [`probe_cuda`](super::probe_cuda) says whether there is one.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;

use ::cudarc::driver::sys::CUresult;
use ::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError};

use super::device::Hold;
use super::room::too_little;
use super::{Destination, DeviceMemory, Element, HostDestination, Memory, ShardSpec};
use crate::error::{Error, ErrorKind, Result};

/// Gives each shard on a GPU a `CudaSlice`, and shards on processors host memory. Once the load is done
/// [`Shard::into_cuda_slice`](crate::Shard::into_cuda_slice) hands the slices over.
pub struct CudarcDestination {
    streams: Vec<Arc<CudaStream>>,
}

impl CudarcDestination {
    /// A stream of the primary context (`CudaContext::new`) of every device that a load is for: memory is allocated on it, and
    /// written once what the stream has been given is done.
    pub fn new(streams: impl IntoIterator<Item = Arc<CudaStream>>) -> Self {
        Self { streams: streams.into_iter().collect() }
    }

    fn allocate(&self, shard: &ShardSpec, ordinal: u32, shards: &[ShardSpec]) -> Result<DeviceMemory> {
        let fits = |stream: &&Arc<CudaStream>| u32::try_from(stream.context().ordinal()) == Ok(ordinal);
        let stream = self.streams.iter().find(fits).ok_or_else(|| {
            Error::new(ErrorKind::Device, "the destination has no stream of the shard's device")
                .at("leaf", &shard.path)
                .found(shard.device)
                .hint("give `CudarcDestination::new` a stream of every device of the mesh")
        })?;
        let len = usize::try_from(shard.bytes).map_err(|_| Error::bug("a shard is larger than the address space"))?;
        // The driver allocates no empty memory, and a slice is freed whatever its length.
        // SAFETY: the bytes are written before anybody reads them: a load that fails hands nothing out.
        let slice = unsafe { stream.alloc::<u8>(len.max(1)) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = stream.context().mem_get_info().map(|(free, _)| format!("{free} bytes"));
                let free = free.unwrap_or_else(|_| "an unknown number of bytes".to_owned());
                let all = shards.iter().filter(|other| other.device.gpu() == Some(ordinal));
                let expected = format_args!("{len} bytes for a shard of {}", shard.path);
                too_little(ordinal, all, (expected, format_args!("{free} free beside those before it")))
            }
            _ => refused("the device gives no memory for results", ordinal, error).at("leaf", &shard.path),
        })?;
        let (pointer, _) = slice.device_ptr(stream);
        Ok(DeviceMemory::given(pointer, shard.bytes, handle(stream), Arc::new(slice)))
    }
}

impl Destination for CudarcDestination {
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>> {
        let host: Vec<ShardSpec> = shards.iter().filter(|shard| shard.device.is_host()).cloned().collect();
        let mut host = HostDestination.prepare(&host)?.into_iter();
        let memory = shards.iter().map(|shard| match shard.device.gpu() {
            Some(ordinal) => self.allocate(shard, ordinal, shards).map(Memory::Device),
            None => host.next().ok_or_else(|| Error::bug("a shard without host memory")),
        });
        memory.collect()
    }
}

impl fmt::Debug for CudarcDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ordinals: Vec<usize> = self.streams.iter().map(|stream| stream.context().ordinal()).collect();
        f.debug_struct("CudarcDestination").field("devices", &ordinals).finish()
    }
}

/// A shard seen as a `CudaSlice`: the shard's memory lives as long as this value, which does not free it by itself.
#[derive(Debug)]
pub struct SharedSlice<T> {
    slice: ManuallyDrop<CudaSlice<T>>,
    _hold: Hold,
}

impl<T> SharedSlice<T> {
    /// # Safety
    /// 1. The memory is complete, holds elements of `T`, and lives as long as `hold`.
    pub(crate) unsafe fn new(
        memory: &DeviceMemory,
        ordinal: u32,
        stream: &Arc<CudaStream>,
        hold: Hold,
    ) -> Result<Self> {
        if u32::try_from(stream.context().ordinal()) != Ok(ordinal) {
            return Err(Error::new(ErrorKind::Device, "the stream is of another device than the shard")
                .expected(format_args!("a stream of cuda:{ordinal}"))
                .found(format_args!("one of cuda:{}", stream.context().ordinal())));
        }
        expect_events(stream, ordinal)?;
        let len = usize::try_from(memory.len()).unwrap_or(usize::MAX) / size_of::<T>();
        // SAFETY: the caller's promise; `Drop` keeps it from being freed.
        let slice = unsafe { stream.upgrade_device_ptr(memory.pointer(), len) };
        Ok(Self { slice: ManuallyDrop::new(slice), _hold: hold })
    }
}

impl<T> Deref for SharedSlice<T> {
    type Target = CudaSlice<T>;

    fn deref(&self) -> &CudaSlice<T> {
        &self.slice
    }
}

impl<T> Drop for SharedSlice<T> {
    fn drop(&mut self) {
        // SAFETY: it is taken once, and not used after.
        let slice = unsafe { ManuallyDrop::take(&mut self.slice) };
        let stream = Arc::clone(slice.stream());
        slice.leak();
        // What the stream was given to do with it must end before the memory may go.
        if let Err(error) = stream.synchronize() {
            tracing::warn!(%error, "a stream does not say whether it still uses a shard");
        }
    }
}

/// The slice of a destination's memory, for good.
pub(crate) fn taken<T: Element>(memory: DeviceMemory, ordinal: u32) -> Result<CudaSlice<T>> {
    let bytes = memory.len();
    let slice = memory.into_given().and_then(|hold| Arc::downcast::<CudaSlice<u8>>(hold).ok());
    let own = slice.and_then(Arc::into_inner).ok_or_else(|| Error::bug("a slice that somebody else has"))?;
    let stream = Arc::clone(own.stream());
    expect_events(&stream, ordinal)?;
    let pointer = own.leak();
    let len = usize::try_from(bytes).unwrap_or(usize::MAX) / size_of::<T>();
    // SAFETY: an allocation of that stream, which nobody else frees any more; the caller has compared the types.
    Ok(unsafe { stream.upgrade_device_ptr(pointer, len) })
}

/// cudarc makes two events for a slice and panics where it gets none: a device that is broken is noticed before.
fn expect_events(stream: &Arc<CudaStream>, ordinal: u32) -> Result<()> {
    let events = [stream.context().new_event(None), stream.context().new_event(None)];
    events
        .into_iter()
        .try_for_each(|event| event.map(drop).map_err(|error| refused("the device gives no events", ordinal, error)))
}

/// The driver's handle of a stream, as a number.
fn handle(stream: &CudaStream) -> u64 {
    stream.cu_stream().addr() as u64
}

fn refused(what: &str, ordinal: u32, error: DriverError) -> Error {
    Error::new(ErrorKind::Device, what)
        .at("device", format_args!("cuda:{ordinal}"))
        .found(format_args!("{:?}", error.0))
}
