//! Encoders and output buffers that wait for work, and the memory that is set aside for them.
//!
//! ```text
//!   driver: take ──► credits that are idle, or new ones ──► worker: encoder, buffer ──► encode, write ──► keep
//!                    (idle ones of other kinds make room)   used last, or made now                         all of it
//! ```
//!
//! Credits are given to units when they are admitted, encoders and buffers when their turn has come: a worker gets what was used
//! last, which the processor's caches still have, and no more of them are made than are at work at once. Large buffers are kept
//! because fresh memory costs: the kernel clears every page of it when it is first written to. There are never more encoders and
//! buffers than credits for them, because what is idle of both is given up together.

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
    credits: Vec<(Kind, Credit)>,
    encoders: Vec<(Kind, Encoder)>,
    buffers: Vec<(Kind, Vec<u8>)>,
}

/// Memory for what is used alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Encoder {
        compression: Compression,
        checksums: Checksums,
        memory: u64,
    },
    /// For the elements of a unit, gathered and encoded.
    Work {
        bytes: u64,
        encoded: u64,
    },
}

/// What one unit holds until it is encoded.
#[derive(Debug)]
pub(super) struct EncoderCredit(Kind, Credit);

/// What one unit holds until it is written.
#[derive(Debug)]
pub(super) struct WorkCredit(Kind, Credit);

impl Spare {
    /// Memory for a unit; `None` if there is none now.
    pub(super) fn take(&self, job: &ArrayJob, cost: Cost, budget: &Arc<Budget>) -> Option<(EncoderCredit, WorkCredit)> {
        let mut idle = self.lock();
        let (compression, checksums, memory) = (job.new.compression, job.checksums(), cost.encoder);
        let encoder = Kind::Encoder { compression, checksums, memory };
        let held = idle.credit(encoder, memory, budget)?;
        let work = Kind::Work { bytes: cost.work, encoded: cost.encoded };
        match idle.credit(work, cost.work, budget) {
            Some(credit) => Some((EncoderCredit(encoder, held), WorkCredit(work, credit))),
            None => {
                idle.credits.push((encoder, held));
                None
            }
        }
    }

    /// An encoder that was used last, or a new one.
    pub(super) fn encoder(&self, credit: &EncoderCredit) -> Result<Encoder> {
        if let Some(encoder) = last(&mut self.lock().encoders, credit.0) {
            return Ok(encoder);
        }
        match credit.0 {
            Kind::Encoder { compression, checksums, .. } => Ok(Encoder::new(compression, checksums)?),
            Kind::Work { .. } => Err(crate::Error::bug("credit for work is none for an encoder")),
        }
    }

    /// A buffer that was used last, or one without memory. It is empty.
    pub(super) fn buffer(&self, credit: &WorkCredit) -> Vec<u8> {
        last(&mut self.lock().buffers, credit.0).unwrap_or_default()
    }

    /// Takes an encoder back, with its memory.
    pub(super) fn keep_encoder(&self, EncoderCredit(kind, credit): EncoderCredit, encoder: Encoder) {
        let mut idle = self.lock();
        idle.credits.push((kind, credit));
        idle.encoders.push((kind, encoder));
    }

    /// Takes the memory of a unit that is done back, with its buffer, if another one may use it.
    pub(super) fn keep_buffer(&self, WorkCredit(kind, credit): WorkCredit, mut buffer: Vec<u8>) {
        if buffer.capacity() < KEPT_BYTES_MIN {
            drop(buffer);
            return;
        }
        buffer.clear();
        let mut idle = self.lock();
        idle.credits.push((kind, credit));
        idle.buffers.push((kind, buffer));
    }

    /// Gives the memory of all that is idle back.
    pub(super) fn clear(&self) {
        *self.lock() = Idle::default();
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Idle {
    /// Credit that is idle, or new one, for which whatever is idle makes room.
    fn credit(&mut self, kind: Kind, bytes: u64, budget: &Arc<Budget>) -> Option<Credit> {
        last(&mut self.credits, kind).or_else(|| budget.take(bytes)).or_else(|| {
            *self = Self::default();
            budget.take(bytes)
        })
    }
}

/// The last one of a kind, taken out.
fn last<T>(all: &mut Vec<(Kind, T)>, kind: Kind) -> Option<T> {
    let at = all.iter().rposition(|(have, _)| *have == kind)?;
    Some(all.remove(at).1)
}

/// Smaller buffers are not kept, in bytes: the allocator does so itself.
const KEPT_BYTES_MIN: usize = 1 << 20;
