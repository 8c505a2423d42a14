//! Arrays in pieces that fit the memory: which rows are converted together.
//!
//! ```text
//!   array a  ├────────┤ array b ├──┤ array c ├──────────────────────────────┤
//!   waves    └───────── 1 ─────────┘         └──── 2 ────┘└──── 3 ────┘└ 4 ┘
//! ```
//!
//! A wave is what is loaded, then written, at once. An array larger than a wave is cut along its first dimension where both
//! sides may be cut: where a stored unit of the source ends, so that none is decoded twice, and where a chunk of the destination
//! ends, so that each is written once. Where there is no such place, the rest of the array is one piece, through a scratch file.

use std::ops::Range;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::keypath::KeyPath;
use crate::limits::CUTS_TRIED_MAX;
use crate::plan::{StoredArray, View};
use crate::shape::{Region, byte_count};
use crate::tree::save::element;
use crate::tree::target::{ArrayWant, Target, TargetLeaf, What};
use crate::zarr::{ArrayMeta, Layout};

/// An array, or a number, to convert.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) path: KeyPath,
    /// New extents.
    pub(super) shape: Vec<u64>,
    pub(super) elements: Elements,
    /// Bytes of one row in memory; of everything for an array without dimensions.
    pub(super) row_bytes: u64,
    /// The destination may be cut at multiples of this many rows.
    pub(super) step: u64,
}

/// Where a task's elements come from.
#[derive(Debug)]
pub(super) enum Elements {
    /// They are loaded.
    Stored(Box<ArrayWant>),
    /// They are here.
    Held(Bytes),
}

/// Rows of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) task: usize,
    pub(super) rows: Range<u64>,
    /// Whether it is larger than a wave may be.
    pub(super) oversized: bool,
}

/// Where the next wave begins: a task and a row of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    pub(super) task: usize,
    pub(super) row: u64,
}

impl Task {
    /// The arrays and numbers of a target, in its order.
    ///
    /// # Errors
    /// A number that no element type holds.
    pub(super) fn all(target: &Target) -> Result<Vec<Self>> {
        let mut tasks = Vec::new();
        for leaf in &target.leaves {
            let (shape, size, elements) = match &leaf.what {
                What::Array(array) => {
                    let mut want = array.clone();
                    want.sharding = None;
                    (array.shape.clone(), array.dtype.size(), Elements::Stored(Box::new(want)))
                }
                What::Scalar { dtype, value } => {
                    let (dtype, bytes) = element(value, Some(*dtype)).map_err(|error| error.at("leaf", &leaf.path))?;
                    (Vec::new(), dtype.size(), Elements::Held(bytes.into()))
                }
                _ => continue,
            };
            let row = shape.get(1..).unwrap_or_default();
            let row_bytes = byte_count(&shape, size).and(byte_count(row, size)).ok_or_else(|| {
                Error::invalid("the array is too large").at("leaf", &leaf.path).found(format_args!("{shape:?}"))
            })?;
            tasks.push(Self { path: leaf.path.clone(), shape, elements, row_bytes, step: 1 });
        }
        Ok(tasks)
    }

    /// Rows in all; 1 for an array without dimensions.
    pub(super) fn rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.rows().saturating_mul(self.row_bytes)
    }

    /// The elements of these rows.
    pub(super) fn region(&self, rows: &Range<u64>) -> Region {
        let mut region = Region::whole(&self.shape);
        if let (Some(start), Some(extent)) = (region.start.first_mut(), region.extent.first_mut()) {
            (*start, *extent) = (rows.start, rows.end - rows.start);
        }
        region
    }

    /// Where the piece ends that begins at this row and has at most this many rows, if there is such a piece.
    fn cut(&self, arrays: &[StoredArray], row: u64, rows_max: u64) -> Option<u64> {
        let (last, end) = (row.saturating_add(rows_max), self.rows());
        if last >= end {
            return Some(end);
        }
        let Elements::Stored(want) = &self.elements else { return Some(end) };
        let step = self.step.max(1);
        let candidates = (row / step + 1..=last / step).rev().take(CUTS_TRIED_MAX).map(|number| number * step);
        candidates.into_iter().find(|cut| divides(&want.view, arrays, *cut))
    }

    /// The leaf of a target that has these rows only.
    ///
    /// # Errors
    /// None, for rows of the task.
    fn target_leaf(&self, want: &ArrayWant, rows: &Range<u64>) -> Result<TargetLeaf> {
        let mut want = want.clone();
        if *rows != (0..self.rows()) {
            // The view may be shorter than what is wanted, which is padded then.
            let stored = want.view.shape.first().copied().unwrap_or(1);
            want.view = want.view.range(0, rows.start.min(stored), rows.end.min(stored))?;
            if let Some(extent) = want.shape.first_mut() {
                *extent = rows.end - rows.start;
            }
        }
        Ok(TargetLeaf { path: self.path.clone(), source: None, what: What::Array(want), priority: 0 })
    }
}

/// The pieces of the next wave: as many as fit these bytes, or a larger one alone, and none after that with which they are `enough`
/// bytes. Empty at the end.
pub(super) fn next_wave(
    tasks: &[Task],
    arrays: &[StoredArray],
    cursor: &mut Cursor,
    wave_bytes: u64,
    enough: u64,
) -> Vec<Piece> {
    let mut wave = Vec::new();
    let mut room = wave_bytes;
    while let Some(task) = tasks.get(cursor.task).filter(|_| wave.is_empty() || wave_bytes - room < enough) {
        let end = task.rows();
        let bytes = (end - cursor.row).saturating_mul(task.row_bytes);
        if bytes > room && !wave.is_empty() {
            break;
        }
        let cut = match bytes > room {
            true => task.cut(arrays, cursor.row, room / task.row_bytes.max(1)),
            false => Some(end),
        };
        let rows = cursor.row..cut.unwrap_or(end);
        room = room.saturating_sub((rows.end - rows.start).saturating_mul(task.row_bytes).saturating_add(PIECE_BYTES));
        *cursor = match rows.end == end {
            true => Cursor { task: cursor.task + 1, row: 0 },
            false => Cursor { task: cursor.task, row: rows.end },
        };
        let whole = rows.end == end;
        wave.push(Piece { task: cursor.task - usize::from(whole), rows, oversized: cut.is_none() });
        if !whole || cut.is_none() {
            break;
        }
    }
    wave
}

/// What a piece takes beside its elements: its place in the plan of a load, and the job of writing it.
const PIECE_BYTES: u64 = 8 << 10;

/// The target that loads the pieces of a wave, each into one shard in host memory; pieces whose elements are here are left out.
///
/// # Errors
/// None, for pieces of these tasks.
pub(super) fn wave_target(target: &Target, tasks: &[Task], wave: &[Piece]) -> Result<Target> {
    let mut leaves = Vec::new();
    for piece in wave {
        let task = &tasks[piece.task];
        if let Elements::Stored(want) = &task.elements {
            leaves.push(task.target_leaf(want, &piece.rows)?);
        }
    }
    Ok(Target {
        leaves,
        checkpoint: target.checkpoint.clone(),
        skipped: Vec::new(),
        missing: Vec::new(),
        mesh: None,
        otherwise: None,
        pad: target.pad.clone(),
        policy: target.policy,
        even: false,
        problems: Vec::new(),
        unfit: Vec::new(),
    })
}

/// Whether no stored unit lies on both sides of this row.
fn divides(view: &View, arrays: &[StoredArray], row: u64) -> bool {
    view.pieces.iter().all(|piece| {
        let (Some(&start), Some(&extent)) = (piece.at.start.first(), piece.at.extent.first()) else { return true };
        if row <= start || row >= start + extent {
            return true;
        }
        let Some(dim) = piece.dims.first().copied().flatten() else { return true };
        (piece.base[dim] + (row - start)).is_multiple_of(unit_rows(&arrays[piece.array].meta, dim))
    })
}

/// How far apart along a dimension an array may be cut without cutting what is decoded in one go.
fn unit_rows(meta: &ArrayMeta, dim: usize) -> u64 {
    let chunk = meta.grid.chunk_shape()[dim];
    match &meta.layout {
        // Rows of elements that are stored as they are can be read by themselves.
        Layout::Plain(plain) if plain.codecs.is_empty() && plain.order.first() == Some(&dim) => 1,
        Layout::Plain(_) => chunk,
        Layout::Sharded(sharded) => {
            let stored = sharded.order.iter().position(|array_dim| *array_dim == dim);
            stored.and_then(|stored| sharded.inner_shape.get(stored)).copied().unwrap_or(chunk)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(rows: u64, row_bytes: u64) -> Task {
        Task {
            path: KeyPath::ROOT,
            shape: vec![rows, row_bytes],
            elements: Elements::Held(Bytes::new()),
            row_bytes,
            step: 1,
        }
    }

    fn waves(tasks: &[Task], wave_bytes: u64, enough: u64) -> Vec<Vec<(usize, Range<u64>)>> {
        let mut cursor = Cursor::default();
        let mut all = Vec::new();
        loop {
            let wave = next_wave(tasks, &[], &mut cursor, wave_bytes, enough);
            if wave.is_empty() {
                return all;
            }
            all.push(wave.into_iter().map(|piece| (piece.task, piece.rows)).collect());
        }
    }

    #[test]
    fn small_arrays_share_a_wave_and_every_row_is_in_one() {
        let tasks = [task(4, 10_000), task(0, 10), task(6, 10_000), task(1, 500_000), task(2, 1)];
        let wave_bytes = 100_000 + 2 * PIECE_BYTES;
        assert_eq!(
            waves(&tasks, wave_bytes, u64::MAX),
            [vec![(0, 0..4), (1, 0..0), (2, 0..6)], vec![(3, 0..1)], vec![(4, 0..2)]]
        );
        // No array is cut for being enough.
        assert_eq!(
            waves(&tasks, wave_bytes, 1),
            [vec![(0, 0..4)], vec![(1, 0..0)], vec![(2, 0..6)], vec![(3, 0..1)], vec![(4, 0..2)]]
        );
        // What a piece itself takes counts, too.
        let tasks = [task(4, 1), task(4, 1), task(4, 1)];
        assert_eq!(waves(&tasks, 2 * PIECE_BYTES, u64::MAX), [vec![(0, 0..4), (1, 0..4)], vec![(2, 0..4)]]);
        assert_eq!(waves(&[], 100, u64::MAX), Vec::<Vec<_>>::new());
    }
}
