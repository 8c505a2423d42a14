//! A shard in memory: its elements on the host, and where they are on a device.

use std::sync::Arc;

use bytes::Bytes;
use ndarray::ArrayViewD;

use super::save::Loaded;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;
use crate::place::{DeviceEvent, DeviceMemory, DeviceSlice, Download, Element, Memory};
use crate::plan::Device;
use crate::shape::Region;

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

impl Shard {
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents.
    pub fn shape(&self) -> &[u64] {
        &self.region.extent
    }

    /// The elements, row-major, little-endian; sub-byte types one byte an element.
    ///
    /// # Errors
    /// A shard on a device: [`to_host`](Self::to_host) brings it here.
    pub fn bytes(&self) -> Result<&[u8]> {
        match &*self.memory {
            Memory::Host(buffer) => Ok(buffer),
            Memory::Device(_) => Err(Error::new(ErrorKind::Device, "the shard is not in host memory")
                .found(self.device)
                .hint("`to_host` copies it; `device_memory` says where it is")),
        }
    }

    /// The host memory that holds the elements, shared; nothing if the shard is on a device.
    pub(super) fn host_bytes(&self) -> Option<Bytes> {
        matches!(&*self.memory, Memory::Host(_)).then(|| Bytes::from_owner(Loaded(Arc::clone(&self.memory))))
    }

    /// The device memory that holds the elements, row-major, if the shard is on a device: an address, a length and a stream.
    /// Everything is there: any stream may use it at once. An engine's own memory lives as long as the state or any shard does.
    pub fn device_memory(&self) -> Option<&DeviceMemory> {
        match &*self.memory {
            Memory::Host(_) => None,
            Memory::Device(memory) => Some(memory),
        }
    }

    /// An event of the shard's device that is reached when the shard is there: for those who are to be given one. A shard that
    /// was handed out is there, so waiting for it, on the host or on a stream, takes no time; nobody needs it for order.
    ///
    /// # Errors
    /// A shard in host memory, or a device that fails.
    pub fn ready_event(&self) -> Result<DeviceEvent> {
        self.download.as_ref().ok_or_else(|| self.not_on_a_device())?.reached()
    }

    /// The elements in device memory as values: an address and a number.
    ///
    /// # Errors
    /// A Rust type that does not hold this element type, or a shard in host memory.
    pub fn device_slice<T: Element>(&self) -> Result<DeviceSlice<'_, T>> {
        self.expect_type::<T>()?;
        self.device_memory().map(DeviceSlice::of).ok_or_else(|| self.not_on_a_device())
    }

    /// The elements in host memory: shared if they are there, copied from the device otherwise, once that has done everything that
    /// it was given. What is shared lives as long as the state or any of these do.
    ///
    /// # Errors
    /// No host memory, or a device that fails.
    pub fn to_host(&self) -> Result<Bytes> {
        if let Some(bytes) = self.host_bytes() {
            return Ok(bytes);
        }
        let (Some(memory), Some(download)) = (self.device_memory(), &self.download) else {
            return Err(Error::bug("a shard on a device that nobody reaches"));
        };
        let len = usize::try_from(memory.len()).map_err(|_| Error::bug("a shard is larger than the address space"))?;
        let mut buffer = Buffer::zeroed(len)?;
        download.settle()?;
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
        self.expect_type::<T>()?;
        let bytes = self.bytes()?;
        if bytes.is_empty() {
            // An empty shard has no memory, and so no alignment.
            return Ok(&[]);
        }
        bytemuck::try_cast_slice(bytes).map_err(|error| Error::invalid(format!("the memory cannot be viewed: {error}")))
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

    pub(super) fn expect_type<T: Element>(&self) -> Result<()> {
        if T::holds(self.dtype) {
            return Ok(());
        }
        Err(Error::invalid("the shard has another element type")
            .expected(self.dtype)
            .found(std::any::type_name::<T>())
            .hint("load with a cast, or view the bytes"))
    }

    pub(super) fn not_on_a_device(&self) -> Error {
        Error::new(ErrorKind::Device, "the shard is not in device memory")
            .found(self.device)
            .hint("`bytes` and `as_slice` view it; load onto a mesh of GPUs to have it there")
    }
}
