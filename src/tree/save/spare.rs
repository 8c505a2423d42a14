//! Encoders and output buffers that wait for work, and the memory that they hold.
//!
//! ```text
//!   driver: take ──► idle one of the kind, or credit for a new one ──► worker: encode, write ──► give back ──► idle
//!                    (idle ones of other kinds make room)                                        with its credit
//! ```
//!
//! An encoder's context is made by the worker that needs it first and is charged as long as it exists, idle or not. Large buffers
//! are kept because fresh memory costs: the kernel clears every page of it when it is first written to.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::array::{ArrayJob, Cost};
use crate::encode::{Checksums, Encoder};
use crate::error::Result;
use crate::io::{Budget, Credit};
use crate::zarr::Compression;

/// What waits for work.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<Idle>);

#[derive(Debug, Default)]
struct Idle {
    encoders: Vec<Reserved>,
    rooms: Vec<Room>,
}

/// An encoder, or the memory for one.
#[derive(Debug)]
pub(super) struct Reserved {
    kind: Kind,
    encoder: Option<Encoder>,
    _credit: Credit,
}

/// What encoders have in common that can stand in for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    compression: Compression,
    checksums: Checksums,
    memory: u64,
}

/// Memory for the elements of a unit, gathered and encoded.
#[derive(Debug)]
pub(super) struct Room {
    work: u64,
    encoded: u64,
    /// Where it is encoded to. Empty, with or without memory.
    pub(super) buffer: Vec<u8>,
    _credit: Credit,
}

impl Spare {
    /// What a unit takes; `None` if there is no memory for it now.
    pub(super) fn take(&self, job: &ArrayJob, cost: Cost, budget: &Arc<Budget>) -> Option<(Reserved, Room)> {
        let kind = Kind { compression: job.new.compression, checksums: job.checksums(), memory: cost.encoder };
        let mut idle = self.lock();
        let reserved = match idle.encoders.iter().rposition(|one| one.kind == kind) {
            Some(at) => idle.encoders.swap_remove(at),
            None => Reserved { kind, encoder: None, _credit: idle.credit(kind.memory, budget)? },
        };
        let (work, encoded) = (cost.work, cost.encoded);
        if let Some(at) = idle.rooms.iter().rposition(|room| (room.work, room.encoded) == (work, encoded)) {
            return Some((reserved, idle.rooms.swap_remove(at)));
        }
        match idle.credit(work, budget) {
            Some(credit) => Some((reserved, Room { work, encoded, buffer: Vec::new(), _credit: credit })),
            None => {
                idle.encoders.push(reserved);
                None
            }
        }
    }

    /// Keeps an encoder for the next unit of its kind.
    pub(super) fn keep_encoder(&self, reserved: Reserved) {
        self.lock().encoders.push(reserved);
    }

    /// Keeps the memory of a unit that is done, with its buffer, for the next one of the same size, if that is worth it.
    pub(super) fn keep_room(&self, room: Room, mut buffer: Vec<u8>) {
        if buffer.capacity() >= KEPT_BYTES_MIN {
            buffer.clear();
            self.lock().rooms.push(Room { buffer, ..room });
        }
    }

    /// Gives the memory of all idle ones back.
    pub(super) fn clear(&self) {
        *self.lock() = Idle::default();
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Idle {
    /// Credit for something new, for which idle things make room.
    fn credit(&mut self, bytes: u64, budget: &Arc<Budget>) -> Option<Credit> {
        budget.take(bytes).or_else(|| {
            *self = Self::default();
            budget.take(bytes)
        })
    }
}

impl Reserved {
    /// The encoder, made now if this is its first unit.
    pub(super) fn ready(&mut self) -> Result<&mut Encoder> {
        match &mut self.encoder {
            Some(encoder) => Ok(encoder),
            none => Ok(none.insert(Encoder::new(self.kind.compression, self.kind.checksums)?)),
        }
    }
}

/// Smaller buffers are not kept, in bytes: the allocator does so itself.
const KEPT_BYTES_MIN: usize = 1 << 20;
