//! One run of bytes on its way to a device, straight to where it belongs: no lane, no kernel, an event of its own.

use std::sync::{Arc, PoisonError};

use super::driver::{Event, Outcome};
use super::gpu::Gpu;
use crate::error::{Error, Result};
use crate::place::parcel::Span;

/// A copy to a device that was begun. Dropping it waits until nothing of it is on the way any more.
#[derive(Debug)]
pub(crate) struct Crossing {
    gpu: Arc<Gpu>,
    /// Recorded behind the copy; `None` once it was waited for.
    ended: Option<Event>,
}

impl Gpu {
    /// Starts to copy bytes to the beginning of a device's memory.
    ///
    /// # Errors
    /// A driver that refuses; nothing is on its way then.
    ///
    /// # Safety
    /// 1. The bytes, which are in locked memory, do not change until the crossing has ended or is dropped, and it is not forgotten.
    /// 2. The target is valid and nobody else touches it until then.
    pub(crate) unsafe fn send(self: &Arc<Self>, bytes: &[u8], target: Span) -> Result<Crossing> {
        if (bytes.len() as u64) > target.len {
            return Err(Error::bug("a run lies outside its shard"));
        }
        let start = || {
            let free = self.events.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let ended = free.map_or_else(|| Event::new(&self.context), Ok)?;
            let crossing = Crossing { gpu: Arc::clone(self), ended: Some(ended) };
            let current = self.context.enter()?;
            // SAFETY: the caller's promise; the crossing exists, so that what comes wrong from here on is waited for.
            unsafe { current.upload(target.pointer, bytes.as_ptr(), bytes.len(), &self.copies) }?;
            crossing.ended.iter().try_for_each(|ended| current.record(ended, &self.copies))?;
            Ok(crossing)
        };
        start().map_err(|error| self.failed(error))
    }
}

impl Crossing {
    /// Waits until the bytes are there.
    ///
    /// # Errors
    /// A device that fails.
    pub(crate) fn finish(mut self) -> Result<()> {
        let wait = |ended: &Event| -> Outcome<()> { self.gpu.context.enter()?.wait(ended) };
        self.ended.iter().try_for_each(wait).map_err(|error| self.gpu.failed(error))?;
        // The next crossing's.
        self.gpu.events.lock().unwrap_or_else(PoisonError::into_inner).extend(self.ended.take());
        Ok(())
    }
}

impl Drop for Crossing {
    fn drop(&mut self) {
        if self.ended.is_none() {
            return;
        }
        let drain = || self.gpu.context.enter()?.drain(&self.gpu.copies);
        if let Err(error) = drain().or_else(|_| drain()) {
            tracing::warn!(%error, "a device does not say whether it still copies");
        }
    }
}
