//! Element bytes to wanted elements: one description, several executors.
//!
//! An [`Op`] copies a box of elements from a decoded buffer into a box of a shard, with any strides, and on the way swaps
//! bytes and casts. [`cpu`] executes it and defines the answer; any other executor must give the same bits (NaN as a class).
//!
//! Must not know: files, formats, plans.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dims;

pub use crate::dtype::CastPolicy;

use std::sync::atomic::AtomicU64;

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

impl Convert {
    /// Whether the stored bytes of an element are the wanted ones.
    pub fn is_plain(&self) -> bool {
        self.from == self.to && !self.from.stored_form_differs() && !(self.swap && self.from.swap_size() > 1)
    }
}

/// One op of a batch: where its elements go and where its lossy elements are counted.
#[derive(Debug)]
pub struct Step<'a, T> {
    /// The box copy.
    pub op: Op,
    /// The memory of the shard.
    pub target: &'a T,
    /// Lossy elements are added here, at the latest when the executor's work is known to have ended.
    pub lossy: &'a AtomicU64,
}

/// What runs ops: [`cpu::Cpu`] here, kernels of a device elsewhere. A batch is what one decoded buffer holds; a device runs it
/// with at most one launch a kernel, whatever the number of shards.
pub trait Executor {
    /// Decoded elements: host bytes, or staging memory of a device.
    type Source: ?Sized;
    /// The memory of a shard.
    type Target;
    /// Why ops were refused or failed.
    type Error;

    /// Runs the steps of a batch, or queues them behind the executor's earlier work: an executor that returns before its work
    /// has ended says when the source may be reused.
    ///
    /// # Errors
    /// A box that reaches outside, a cast that is undefined, an invalid stored element, or a device that fails.
    ///
    /// # Safety
    /// Until the work has ended nobody else reads or writes the target elements of the steps, which are disjoint.
    #[allow(unsafe_code)]
    unsafe fn run(&self, source: &Self::Source, steps: &[Step<'_, Self::Target>]) -> Result<(), Self::Error>;
}
