//! Staging slots: the buffers through which stored bytes pass.

use std::any::Any;
use std::sync::{Arc, PoisonError};

use super::buffer::Buffer;
use super::sync::Mutex;
use crate::error::Result;

/// Locks memory, so that devices copy from it without a detour.
pub trait Pinner: std::fmt::Debug + Send + Sync {
    /// Locks a buffer's memory until the returned value is dropped.
    ///
    /// # Errors
    /// Memory that cannot be locked.
    ///
    /// # Safety
    /// 1. The buffer outlives the returned value.
    #[allow(unsafe_code)]
    unsafe fn pin(&self, buffer: &Buffer) -> Result<Pin>;
}

/// Keeps memory locked.
pub type Pin = Arc<dyn Any + Send + Sync>;

/// A pool of equal buffers, made when first needed and reused by every load of an engine.
///
/// A slot's state is who owns it: **free** in the ring; **reading** inside a [`ReadAt`](super::ReadAt); **decoding** in
/// the hands of a worker; **copying** with whoever waits for a device to have taken its bytes; and free again when it is
/// dropped. No slot can be in two states, and none can be reused while somebody still holds it.
#[derive(Debug)]
pub struct Ring {
    slot_bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Memory>,
    /// How many slots there are, out or not.
    made: usize,
    /// Who locks slots, once a device is there to copy from them.
    pinner: Option<Arc<dyn Pinner>>,
}

/// The memory of a slot. The lock, which may be that of several, is dropped first.
#[derive(Debug)]
struct Memory {
    pin: Option<Pin>,
    buffer: Buffer,
}

/// One staging buffer; goes back to its ring when it is dropped.
#[derive(Debug)]
pub struct Slot {
    memory: Option<Memory>,
    ring: Arc<Ring>,
}

impl Ring {
    /// A ring of slots of so many bytes.
    pub fn new(slot_bytes: usize) -> Arc<Self> {
        Arc::new(Self { slot_bytes, state: Mutex::new(State::default()) })
    }

    /// Size of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// From now on slots are locked, and so many exist. New ones are made and locked in one piece: nearly all of that is large pages,
    /// which devices copy from faster, and one call locks it.
    ///
    /// # Errors
    /// No memory, or memory that cannot be locked.
    pub fn pin(self: &Arc<Self>, pinner: Arc<dyn Pinner>, count: usize) -> Result<()> {
        let (free, missing) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.pinner.get_or_insert_with(|| Arc::clone(&pinner));
            (state.free.len(), count.saturating_sub(state.made))
        };
        // Slots that are out are locked when they are taken the next time.
        let locked: Vec<Slot> = (0..free).map(|_| self.slot()).collect::<Result<_>>()?;
        let parts = Buffer::zeroed_parts(&vec![self.slot_bytes; missing])?;
        if let Some(first) = parts.first() {
            #[allow(unsafe_code)]
            // SAFETY: every part keeps the whole, and lies beside the lock, which is dropped first.
            let pin = unsafe { pinner.pin(first.whole()) }?;
            let made = parts.into_iter().map(|buffer| Memory { pin: Some(Arc::clone(&pin)), buffer });
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.made += missing;
            state.free.extend(made);
        }
        drop(locked);
        Ok(())
    }

    /// A free slot, or a new one. How many may be out is the [`Budget`](super::Budget)'s business.
    ///
    /// # Errors
    /// The system has no memory, or memory that is to be locked cannot be.
    pub fn slot(self: &Arc<Self>) -> Result<Slot> {
        let (free, pinner) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.free.pop(), state.pinner.clone())
        };
        let memory = match free {
            Some(memory) => memory,
            None => {
                let buffer = Buffer::zeroed(self.slot_bytes)?;
                self.state.lock().unwrap_or_else(PoisonError::into_inner).made += 1;
                Memory { pin: None, buffer }
            }
        };
        let mut slot = Slot { memory: Some(memory), ring: Arc::clone(self) };
        if let (Some(pinner), Some(memory @ Memory { pin: None, .. })) = (pinner, &mut slot.memory) {
            #[allow(unsafe_code)]
            // SAFETY: the lock lies beside its buffer and is dropped first.
            let pin = unsafe { pinner.pin(&memory.buffer) }?;
            memory.pin = Some(pin);
        }
        Ok(slot)
    }

    /// How many slots have been made and are not out.
    #[cfg(all(test, loom))]
    pub(super) fn free_count(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).free.len()
    }
}

impl Slot {
    /// The number of its memory, which no other memory of this process ever has.
    #[cfg(feature = "uring")]
    pub(super) fn id(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.buffer.id())
    }

    /// Gives the memory up for good: somebody may write into it at any time, so that it can neither be reused nor freed.
    /// What is left is an empty slot.
    #[cfg(feature = "uring")]
    pub(super) fn abandon(&mut self) {
        std::mem::forget(self.memory.take());
    }
}

impl std::ops::Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory.buffer)
    }
}

impl std::ops::DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().map_or(&mut [], |memory| &mut memory.buffer)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.ring.state.lock().unwrap_or_else(PoisonError::into_inner).free.push(memory);
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
