//! Staging slots: the buffers through which stored bytes pass.

use std::sync::{Arc, PoisonError};

use super::buffer::Buffer;
use super::sync::Mutex;
use crate::error::Result;

/// A pool of equal buffers, made when first needed and reused by every load of an engine.
///
/// A slot's state is who owns it: **free** in the ring; **reading** inside a [`ReadAt`](super::ReadAt); **decoding** in
/// the hands of a worker; **copying** with whoever waits for a device to have taken its bytes; and free again when it is
/// dropped. No slot can be in two states, and none can be reused while somebody still holds it.
#[derive(Debug)]
pub struct Ring {
    slot_bytes: usize,
    free: Mutex<Vec<Buffer>>,
}

/// One staging buffer; goes back to its ring when it is dropped.
#[derive(Debug)]
pub struct Slot {
    buffer: Option<Buffer>,
    ring: Arc<Ring>,
}

impl Ring {
    /// A ring of slots of so many bytes.
    pub fn new(slot_bytes: usize) -> Arc<Self> {
        Arc::new(Self { slot_bytes, free: Mutex::new(Vec::new()) })
    }

    /// Size of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// A free slot, or a new one. How many may be out is the [`Budget`](super::Budget)'s business.
    ///
    /// # Errors
    /// The system has no memory.
    pub fn slot(self: &Arc<Self>) -> Result<Slot> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let buffer = match free {
            Some(buffer) => buffer,
            None => Buffer::zeroed(self.slot_bytes)?,
        };
        Ok(Slot { buffer: Some(buffer), ring: Arc::clone(self) })
    }

    /// How many slots have been made and are not out.
    #[cfg(all(test, loom))]
    pub(super) fn free_count(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Slot {
    /// The number of its memory, which no other memory of this process ever has.
    #[cfg(feature = "uring")]
    pub(super) fn id(&self) -> u64 {
        self.buffer.as_ref().map_or(0, Buffer::id)
    }

    /// Gives the memory up for good: somebody may write into it at any time, so that it can neither be reused nor freed.
    /// What is left is an empty slot.
    #[cfg(feature = "uring")]
    pub(super) fn abandon(&mut self) {
        std::mem::forget(self.buffer.take());
    }
}

impl std::ops::Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.as_deref().unwrap_or_default()
    }
}

impl std::ops::DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buffer.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.ring.free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_reused() {
        let ring = Ring::new(64);
        let mut slot = ring.slot().unwrap();
        slot[0] = 7;
        let address = slot.as_ptr();
        drop(slot);
        let again = ring.slot().unwrap();
        assert_eq!((again.as_ptr(), again[0], again.len()), (address, 7, 64));
        assert_ne!(ring.slot().unwrap().as_ptr(), address);
    }
}
