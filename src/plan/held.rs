//! What a plan itself takes of the memory budget.
//!
//! A plan has an entry for everything that is read, so very many tiny chunks make one that is larger than the data. It is counted
//! while it is made, by estimates that were measured and rounded up, so that one that does not fit is refused early, and again
//! when it is complete, beside what its work takes.

use super::build::Planner;
use super::{Batch, Limits, Placement, Plan, STREAM_SLOTS, Unit};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{SLOT_BYTES, SLOT_SLACK_BYTES, UNCOUNTED_UNITS_MAX};

/// Memory of a plan in the making.
#[derive(Debug, Default)]
pub(super) struct Making {
    bytes: u64,
    units: u64,
}

impl Making {
    /// Counts one chunk, inner chunk or range with so many dimensions, and parts that go to shards; whether there is room for it.
    #[must_use]
    pub(super) fn add(&mut self, limits: &Limits, rank: usize, placements: usize) -> bool {
        self.bytes = self.bytes.saturating_add(in_the_making(1, rank, placements as u64));
        self.units += 1;
        match limits.counts_plan {
            true => self.bytes <= limits.staging_bytes.max(MAKING_BYTES_MIN),
            false => self.units <= UNCOUNTED_UNITS_MAX,
        }
    }
}

/// The error of plans that no budget counts.
pub(crate) fn too_many_uncounted() -> Error {
    Error::invalid("there are too many chunks to look at in one go")
        .expected(format_args!("at most {UNCOUNTED_UNITS_MAX}"))
        .hint("take less at a time: an item (`--item`), or some leaves where there is `--only`")
}

impl Planner<'_> {
    /// The error of a plan for which there is no room. It may have got half way, so the rest is estimated.
    pub(super) fn too_many(&self) -> Error {
        if !self.limits.counts_plan {
            return too_many_uncounted();
        }
        let (mut bytes, mut units) = (0_u64, 0_u64);
        for (rank, chunks) in self.touched() {
            bytes = bytes.saturating_add(in_the_making(chunks, rank, chunks));
            units = units.saturating_add(chunks);
        }
        refused(&self.limits, bytes.max(self.making.bytes), units.max(self.making.units))
    }
}

impl Plan {
    /// The plan, if it fits the budget beside the work that takes most.
    pub(super) fn checked(mut self) -> Result<Self> {
        let units = self.units.iter().map(held_by_unit).sum::<u64>();
        let held = units + (self.batches.len() * size_of::<Batch>()) as u64;
        if held < HELD_BYTES_MIN || !self.limits.counts_plan {
            return Ok(self);
        }
        self.held_bytes = held;
        let working = self.units.iter().map(|unit| unit.working_bytes).max().unwrap_or(0);
        let needed = held.saturating_add(working).saturating_add(slots(&self.limits) * self.limits.slot_memory());
        match needed <= self.limits.staging_bytes {
            true => Ok(self),
            false => Err(refused(&self.limits, held.saturating_add(working), self.units.len() as u64)),
        }
    }
}

/// Slots that are held at once at most: one a worker, and those of one large unit.
fn slots(limits: &Limits) -> u64 {
    u64::from(limits.workers) + STREAM_SLOTS
}

/// What chunks take while a plan is made.
fn in_the_making(chunks: u64, rank: usize, placements: u64) -> u64 {
    let extents = rank as u64 * size_of::<u64>() as u64;
    let placements = placements.saturating_mul(PLACEMENT_BYTES + 3 * extents);
    chunks.saturating_mul(UNIT_BYTES + 2 * extents).saturating_add(placements)
}

fn refused(limits: &Limits, held: u64, units: u64) -> Error {
    // A larger budget has larger slots, up to a size.
    let needed = held.saturating_add(slots(limits) * (SLOT_BYTES as u64 + SLOT_SLACK_BYTES));
    Error::new(ErrorKind::Budget, "the memory budget is too small for so many chunks")
        .expected(format_args!("at least {needed} bytes to keep track of {units} chunks"))
        .found(format_args!("{} bytes", limits.staging_bytes))
        .hint(format!("give `--memory {needed}` or more, or load fewer leaves at a time (`--only`)"))
}

/// What a unit takes, with what it points to.
fn held_by_unit(unit: &Unit) -> u64 {
    let numbers = |len: usize| ALLOCATION_BYTES + (len * size_of::<u64>()) as u64;
    let rank = unit.shape.len();
    let placement = size_of::<Placement>() as u64 + 3 * numbers(rank);
    let placements = unit.placements.len() as u64 * placement + ALLOCATION_BYTES;
    size_of::<Unit>() as u64 + numbers(unit.chunk.len()) + numbers(rank) + placements
}

/// What the allocator adds to an allocation, and rounds it up by.
const ALLOCATION_BYTES: u64 = 16;
/// A unit in the making, with where its value was found.
const UNIT_BYTES: u64 = 600;
/// A part of a unit that goes to a shard, in the making.
const PLACEMENT_BYTES: u64 = 250;
/// Smaller plans are not counted, in bytes: the process itself takes more.
const HELD_BYTES_MIN: u64 = 1 << 20;
/// The same while they are made.
const MAKING_BYTES_MIN: u64 = 4 << 20;
