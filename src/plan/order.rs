//! Units to batches: the order of work, the sums, the requests.

use super::build::Planner;
use super::parts::addressable;
use super::ranges::{Slabs, union_volume};
use super::{Batch, Placement, Plan, ReadRange, Source, Unit, id};
use crate::error::Result;
use crate::shape::Region;

impl Planner<'_> {
    /// Orders the units, sums up the leaves and groups neighbouring reads.
    pub(super) fn finish(mut self) -> Result<Plan> {
        if let Some((_, error)) = self.over_budget.take() {
            return Err(error);
        }
        let priority = |unit: &Unit| {
            let leaf_of = |placement: &Placement| self.shards[placement.shard as usize].leaf as usize;
            unit.placements.iter().map(|placement| self.leaves[leaf_of(placement)].priority).min().unwrap_or(u32::MAX)
        };
        let turn = |unit: &Unit| -> Turn {
            let at = match unit.source {
                Source::File { file, offset, .. } => Some((file, offset)),
                Source::Inline(_) | Source::Fill(_) => None,
            };
            (priority(unit), at)
        };
        let mut units = std::mem::take(&mut self.units);
        units.retain(|unit| !unit.placements.is_empty());
        units.sort_by_cached_key(turn);
        let priorities: Vec<u32> = units.iter().map(priority).collect();
        self.count(&units);
        let batches = self.batches(&units, &priorities);
        let plan = Plan {
            leaves: self.leaves,
            shards: self.shards,
            arrays: self.unit_arrays,
            files: self.files,
            units,
            batches,
            held_bytes: 0,
            limits: self.limits,
        };
        plan.checked()
    }

    /// Adds every unit to the counts of the leaves it serves. What several leaves share counts for the first.
    fn count(&mut self, units: &[Unit]) {
        for unit in units {
            let mut leaves: Vec<usize> =
                unit.placements.iter().map(|placement| self.shards[placement.shard as usize].leaf as usize).collect();
            leaves.sort_unstable();
            leaves.dedup();
            for &leaf in &leaves {
                self.leaves[leaf].units += 1;
            }
            let array = &self.unit_arrays[unit.array as usize];
            let needed = match unit.source {
                Source::Fill(_) => 0,
                _ if addressable(&array.codecs) && !unit.indexed => {
                    let regions: Vec<Region> =
                        unit.placements.iter().map(|placement| placement.region.clone()).collect();
                    union_volume(&regions) * array.dtype.size() as u64
                }
                _ => unit.stored_bytes(),
            };
            if let Some(leaf) = leaves.first().and_then(|&first| self.leaves.get_mut(first)) {
                leaf.bytes_needed += needed;
                leaf.bytes_read += unit.stored_bytes();
                leaf.bytes_decoded += unit.decoded_bytes;
            }
        }
    }

    /// Groups units whose bytes lie near each other in one file, as far as a slot reaches.
    fn batches(&self, units: &[Unit], priorities: &[u32]) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        for (position, unit) in units.iter().enumerate() {
            let position = id(position);
            let Source::File { file, offset, len } = unit.source else {
                match batches.last_mut() {
                    Some(Batch { read: None, units }) if units.end - units.start < INLINE_UNITS_PER_BATCH => {
                        units.end += 1
                    }
                    _ => batches.push(Batch { read: None, units: position..position + 1 }),
                }
                continue;
            };
            if let Some(Batch { read: Some(read), units }) = batches.last_mut() {
                let end = offset.saturating_add(len).max(read.offset + read.len);
                let near = read.file == file
                    && offset <= (read.offset + read.len).saturating_add(self.limits.merge_gap_bytes)
                    && end - read.offset <= self.limits.slot_bytes
                    && priorities[units.start as usize] == priorities[position as usize];
                if near {
                    read.len = end - read.offset;
                    units.end += 1;
                    continue;
                }
            }
            batches.push(Batch { read: Some(ReadRange { file, offset, len }), units: position..position + 1 });
        }
        batches
    }
}

/// How many units without a read one task takes: enough to make the task worth its scheduling.
const INLINE_UNITS_PER_BATCH: u32 = 64;

/// When a unit has its turn: by priority, then by file and offset; units without a read come first.
type Turn = (u32, Option<(u32, u64)>);

impl Unit {
    /// The unit in pieces of at most `slot_bytes`, in the order of its bytes.
    pub fn slabs(&self, element: usize, slot_bytes: u64) -> Slabs {
        Slabs::new(&self.shape, element, slot_bytes.max(element as u64))
    }
}
