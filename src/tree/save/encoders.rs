//! Encoders that wait for work, and the memory that they hold.
//!
//! ```text
//!   driver: reserve ──► idle one of the kind, or credit for a new one ──► worker: ready, encode ──► give_back ──► idle
//!                       (idle ones of other kinds make room)                                        with its credit
//! ```
//!
//! A context is made by the worker that needs it first and is charged as long as it exists, idle or not.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::array::ArrayJob;
use crate::encode::{Checksums, Encoder};
use crate::error::Result;
use crate::io::{Budget, Credit};
use crate::zarr::Compression;

/// Encoders without work.
#[derive(Debug, Default)]
pub(super) struct Encoders(Mutex<Vec<Reserved>>);

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

impl Encoders {
    /// An encoder for units of this array which take this much memory for it; `None` if there is none for now.
    pub(super) fn reserve(&self, job: &ArrayJob, memory: u64, budget: &Arc<Budget>) -> Option<Reserved> {
        let kind = Kind { compression: job.new.compression, checksums: job.checksums(), memory };
        let mut idle = self.lock();
        if let Some(at) = idle.iter().rposition(|one| one.kind == kind) {
            return Some(idle.swap_remove(at));
        }
        let credit = budget.take(memory).or_else(|| {
            idle.clear();
            budget.take(memory)
        })?;
        Some(Reserved { kind, encoder: None, _credit: credit })
    }

    /// Keeps an encoder for the next unit of its kind.
    pub(super) fn give_back(&self, reserved: Reserved) {
        self.lock().push(reserved);
    }

    /// Gives the memory of all idle ones back.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Reserved>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
