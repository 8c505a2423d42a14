//! Shards as cudarc's slices.

use std::sync::Arc;

use ::cudarc::driver::{CudaSlice, CudaStream};

use super::shard::Shard;
use crate::error::{Error, Result};
use crate::place::cudarc::{SharedSlice, taken};
use crate::place::{Element, Memory};

impl Shard {
    /// Hands the shard over as a `CudaSlice`, without a copy. It was loaded to a
    /// [`CudarcDestination`](crate::place::cudarc::CudarcDestination), and is complete: any stream may use it.
    ///
    /// # Errors
    /// A Rust type that does not hold this element type; a shard in host memory or in memory that the engine has allocated; one of
    /// which there are clones.
    pub fn into_cuda_slice<T: Element>(self) -> Result<CudaSlice<T>> {
        self.expect_type::<T>()?;
        let ordinal = self.device.gpu().ok_or_else(|| self.not_on_a_device())?;
        if !self.device_memory().is_some_and(|memory| memory.is_given()) {
            return Err(Error::invalid("the shard's memory is the engine's")
                .hint("load to a `CudarcDestination`, or look at it with `cuda_slice`"));
        }
        match Arc::into_inner(self.memory) {
            Some(Memory::Device(memory)) => taken(memory, ordinal),
            _ => Err(Error::invalid("the shard's memory is shared with its clones").hint("drop them first")),
        }
    }

    /// The shard seen as a `CudaSlice` of this stream, without a copy, whoever has allocated it.
    ///
    /// # Errors
    /// A Rust type that does not hold this element type, a shard in host memory, or a stream of another device.
    pub fn cuda_slice<T: Element>(&self, stream: &Arc<CudaStream>) -> Result<SharedSlice<T>> {
        self.expect_type::<T>()?;
        let (Some(memory), Some(ordinal)) = (self.device_memory(), self.device.gpu()) else {
            return Err(self.not_on_a_device());
        };
        #[allow(unsafe_code)]
        // SAFETY: a shard that was handed out is complete; its memory lives as long as the clone, and the types were compared.
        unsafe {
            SharedSlice::new(memory, ordinal, stream, Arc::clone(&self.memory) as _)
        }
    }
}
