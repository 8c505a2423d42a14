//! Element bytes to wanted elements: one description, several executors.
//!
//! An [`Op`] copies a box of elements from a decoded buffer into a box of a shard, with any strides, and on the way swaps
//! bytes and casts. [`cpu`] executes it and defines the answer; any other executor must give the same bits (NaN as a class).
//!
//! Must not know: files, formats, plans.

pub mod cpu;

pub use crate::dtype::CastPolicy;

use crate::dtype::DType;

/// One box copy: which elements of a buffer go where in a shard, and what happens to them on the way.
///
/// Source and target are arrays of whole elements. Dimension `d` of the box runs over `extent[d]` elements, `source_strides[d]`
/// apart in the source and `target_strides[d]` apart in the target; any order of dimensions, so a transpose is an `Op` too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// Extents of the box.
    pub extent: Vec<u64>,
    /// Distance, in elements, of neighbours along each dimension in the source.
    pub source_strides: Vec<u64>,
    /// Distance, in elements, of neighbours along each dimension in the target.
    pub target_strides: Vec<u64>,
    /// Position of the box's first element in the source.
    pub source_start: u64,
    /// Position of the box's first element in the target.
    pub target_start: u64,
    /// What happens to every element.
    pub convert: Convert,
}

/// What happens to every element of an [`Op`]: bytes are swapped, stored sub-byte forms are normalised, values are cast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Convert {
    /// Type in the source.
    pub from: DType,
    /// Type in the target.
    pub to: DType,
    /// Whether the source is big-endian.
    pub swap: bool,
    /// What happens to values that the target type cannot hold.
    pub policy: CastPolicy,
}
