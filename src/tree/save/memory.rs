//! What a save holds beside the elements that it is working on, known when it is planned.
//!
//! ```text
//!   plan ──────► arrays written ──────► nodes ──────► files that describe the tree
//!   ├── always: arrays, keys, small values ─────────────────────────────────────┤
//!                ├── units ──┤           ├──────────── at the end ──────────────┤
//! ```
//!
//! The numbers are what was measured, rounded up. They follow from the arrays and their chunks alone, so that what does not fit
//! is refused before a byte is written.

use super::array::ArrayJob;
use super::item::Item;
use super::options::SaveOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::keypath::KeyPath;
use crate::layout::orbax::sharding::SavedSharding;
use crate::limits::SAVE_INLINE_BYTES_MAX;

/// Memory beside that of units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::tree) struct Held {
    /// From the plan to the end.
    pub(in crate::tree) always: u64,
    /// When no unit is left: the nodes, and what is written after them.
    pub(in crate::tree) at_end: u64,
    arrays: u64,
    chunks: u64,
}

impl Held {
    /// What items hold together.
    pub(in crate::tree) fn of<'a>(items: impl IntoIterator<Item = &'a Item>, options: &SaveOptions) -> Self {
        let mut all = Self::default();
        for item in items {
            let own = Self::of_item(item, options);
            // They are written one after the other.
            all.at_end = all.at_end.max(own.at_end);
            all.always = all.always.saturating_add(own.always);
            all.arrays += own.arrays;
            all.chunks = all.chunks.saturating_add(own.chunks);
        }
        all
    }

    /// What a conversion holds of the item that it writes: also what it is made of, and what is noted of it.
    pub(in crate::tree) fn of_conversion(item: &Item, options: &SaveOptions) -> Self {
        let held = Self::of_item(item, options);
        let entries = held.chunks.saturating_add(held.arrays);
        Self {
            always: held.always.saturating_add(held.arrays * CONVERTED_BYTES),
            at_end: held.at_end.max(entries.saturating_mul(NOTE_BYTES)).max(held.arrays * IDENTITY_BYTES),
            ..held
        }
    }

    /// So many bytes all the time.
    pub(in crate::tree) fn steady(bytes: u64) -> Self {
        Self { always: bytes, ..Self::default() }
    }

    fn of_item(item: &Item, options: &SaveOptions) -> Self {
        let (mut always, mut entries, mut body, mut inline, mut chunks) = (0_u64, 0_u64, 0_u64, 0_u64, 0_u64);
        let mut index = 0;
        for job in item.jobs.iter() {
            let (rank, count) = (job.new.shape.len() as u64, job.chunk_count());
            let key = job.name.len() as u64 + KEY_BYTES + rank * POSITION_BYTES;
            let own = inline_bytes(job);
            let parts = job.source.parts.len().max(1) as u64;
            let array = ARRAY_BYTES + 3 * job.name.len() as u64 + parts * (PART_BYTES + rank * EXTENT_BYTES);
            always += array + rank * 6 * EXTENT_BYTES;
            entries = entries.saturating_add((count + 1).saturating_mul(ENTRY_BYTES + key));
            inline = inline.saturating_add(own);
            body = body.saturating_add((count + 1).saturating_mul(STORED_BYTES + key)).saturating_add(DOCUMENT_BYTES);
            chunks = chunks.saturating_add(count);
            index = index.max(job.inner_count() as u64 * INDEX_BYTES);
        }
        let mut text = 0;
        for entry in &item.metadata.entries {
            always += 2 * path_bytes(&entry.path);
            let letters: usize = entry.path.elements().map(|element| element.len()).sum();
            text += TEXT_BYTES + entry.path.0.len() as u64 * TEXT_KEY_BYTES + 2 * letters as u64;
        }
        let strings: usize = item.strings.iter().map(|(name, text)| name.len() + text.len()).sum();
        let described = |sharding: &SavedSharding| match sharding {
            SavedSharding::Named { mesh, .. } => mesh.device_ids.as_ref().map_or(0, Vec::len) as u64 * DEVICE_BYTES,
            _ => 0,
        };
        let shardings: u64 = item.shardings.values().map(|sharding| SHARDING_BYTES + described(sharding)).sum();
        always += item.shardings.len() as u64 * SHARDING_BYTES + strings as u64 * 2 + index;
        let node = match options.ocdbt {
            true => {
                let body = body.saturating_add(inline);
                let nodes = chunks.saturating_add(item.jobs.len() as u64).saturating_mul(STORED_BYTES);
                2 * body.min(options.node_bytes.into()) + nodes.saturating_add(inline)
            }
            false => 0,
        };
        Self {
            always: always.saturating_add(entries).saturating_add(inline),
            at_end: node.max(text.max(shardings).max(strings as u64 * 3)),
            arrays: item.jobs.len() as u64,
            chunks,
        }
    }

    /// What is left for units under a budget.
    ///
    /// # Errors
    /// Nothing is.
    pub(in crate::tree) fn room(self, budget: u64) -> Result<u64> {
        let needed = self.always.saturating_add(self.at_end);
        match budget.checked_sub(self.always) {
            Some(room) if needed <= budget => Ok(room),
            _ => Err(Error::new(ErrorKind::Budget, "the memory budget is too small for so many arrays and chunks")
                .expected(format_args!(
                    "at least {needed} bytes to keep track of {} arrays in {} chunks",
                    self.arrays, self.chunks
                ))
                .found(format_args!("{budget} bytes"))
                .hint("give it more memory (`--memory`), or choose larger chunks (`--chunk-bytes`)")),
        }
    }

    /// The most that was held, with what units held at once.
    pub(in crate::tree) fn peak(self, units: u64) -> u64 {
        self.always.saturating_add(units.max(self.at_end))
    }
}

/// Lets small values stand in nodes as long as all of them together stay within these bytes, arrays of the smallest first. They
/// are in memory until the nodes are written; where the others lie takes far less.
pub(super) fn choose_inline(jobs: &mut [ArrayJob], most: u64) {
    let mut order: Vec<(u64, usize)> = Vec::with_capacity(jobs.len());
    for (at, job) in jobs.iter_mut().enumerate() {
        job.inline = true;
        order.push((inline_bytes(job), at));
    }
    order.sort_unstable();
    let mut all = 0_u64;
    for (bytes, at) in order {
        all = all.saturating_add(bytes);
        jobs[at].inline = all <= most;
    }
}

/// The most that the values of an array may take in nodes.
fn inline_bytes(job: &ArrayJob) -> u64 {
    match job.inline && job.inner_count() == 1 {
        true => job.chunk_count().saturating_mul(job.stored_len_max().min(SAVE_INLINE_BYTES_MAX)),
        false => 0,
    }
}

/// What a path takes, with what the allocator adds.
fn path_bytes(path: &KeyPath) -> u64 {
    path.elements().map(|element| ELEMENT_BYTES + element.len() as u64).sum()
}

/// Small values have this part of the budget.
pub(in crate::tree) const INLINE_PER_BUDGET: u64 = 32;

/// An array in the plan, without its name, path and extents.
const ARRAY_BYTES: u64 = 960;
/// A part of it that is in memory, without its extents.
const PART_BYTES: u64 = 128;
/// An extent, wherever shapes and boxes are kept.
const EXTENT_BYTES: u64 = 24;
/// An element of a path, without its text.
const ELEMENT_BYTES: u64 = 72;
/// A key in the index, and what it leads to, without the key's text.
const ENTRY_BYTES: u64 = 112;
/// A key's text beside the array's name: `/c`, and what the allocator adds; and a position in the grid.
const KEY_BYTES: u64 = 16;
const POSITION_BYTES: u64 = 8;
/// What a node stores of an entry beside its key.
const STORED_BYTES: u64 = 48;
/// An array's own document, in a node.
const DOCUMENT_BYTES: u64 = 1024;
/// What `_METADATA` says of a leaf, and of each element of its path.
const TEXT_BYTES: u64 = 160;
const TEXT_KEY_BYTES: u64 = 48;
/// What is recorded of a sharding, and what of each device.
const SHARDING_BYTES: u64 = 896;
const DEVICE_BYTES: u64 = 12;
/// Where an inner chunk lies, as long as its chunk is written.
const INDEX_BYTES: u64 = 48;
/// What an array is made of, in a conversion.
const CONVERTED_BYTES: u64 = 1024;
/// What an interrupted conversion is compared by, an array.
const IDENTITY_BYTES: u64 = 1536;
/// An entry of a conversion's journal while it is written, if one wave has all of them.
const NOTE_BYTES: u64 = 384;
