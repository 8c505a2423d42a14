//! The types that the host and the kernels share. `kernels/descriptor.cuh` has the same; `tests/kernels.rs` compares the
//! layouts.

use crate::dtype::DType;
use crate::limits::KERNEL_RANK_MAX;

/// One box copy as a kernel reads it. A box is an array of *units*: elements, or words or vectors of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Descriptor {
    /// Address of the first unit in the source.
    pub source: u64,
    /// Address of the first unit in the target.
    pub target: u64,
    /// Units of the box: the product of the extents, at least 1.
    pub count: u64,
    /// Units along each dimension; the last dimension is the densest in the target.
    pub extent: [u64; KERNEL_RANK_MAX],
    /// Distance of neighbours in the source, in units.
    pub source_stride: [u64; KERNEL_RANK_MAX],
    /// Distance of neighbours in the target, in units.
    pub target_stride: [u64; KERNEL_RANK_MAX],
    /// Dimensions in use: at least 1.
    pub rank: u32,
    /// Which [`Tally`] counts.
    pub counter: u32,
    /// Bytes of a unit in the source.
    pub source_unit: u16,
    /// Bytes of a unit in the target.
    pub target_unit: u16,
    /// Type of the source's elements: its place in [`DType::ALL`].
    pub from: u8,
    /// Type of the target's elements: its place in [`DType::ALL`].
    pub to: u8,
    /// [`Flags`].
    pub flags: u8,
    /// Zero.
    pub unused: u8,
}

/// Bits of [`Descriptor::flags`].
#[derive(Clone, Copy, Debug)]
pub struct Flags;

impl Flags {
    /// The source is big-endian.
    pub const SWAP: u8 = 1;
    /// Floats out of an integer's range wrap; without it they saturate.
    pub const WRAP: u8 = 2;
    /// The box is walked in squares of its last two dimensions.
    pub const SQUARES: u8 = 4;
}

/// What kernels count, by addition: cleared before the first launch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Tally {
    /// Lossy elements, as [`crate::transform::cpu::convert`] defines them.
    pub lossy: u64,
    /// Stored bools that were neither 0 nor 1. If there are any, the batch has failed: the processor would have refused it.
    pub invalid: u64,
}

/// The number by which kernels know an element type: its place in [`DType::ALL`].
pub(super) fn code(dtype: DType) -> u8 {
    dtype as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_places_in_the_list() {
        for (place, dtype) in DType::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(code(dtype)), place);
        }
    }
}
