//! Executes an [`Op`] in host memory.
//!
//! The box is first made as simple as it can be: dimensions of extent 1 vanish, the rest are sorted by their stride in the
//! target and neighbours that lie on end in both arrays are merged. Then there are two cases.
//!
//! - **Runs**: the innermost dimension is contiguous on both sides. Every run is one copy or one conversion.
//! - **Gather**: it is not (a transpose, a column). Elements are gathered into a small block, converted there, and written.
//!   The dimension along which the *source* is densest is the loop right outside the block, so that the cache lines which a
//!   block touches are used up by the following blocks before they are evicted.

#![allow(clippy::cast_possible_truncation, reason = "positions were checked against slices, so they fit usize")]

use std::sync::atomic::Ordering;

use super::{CastError, convert, normalise};
use crate::transform::dims::{Dim, check_inside, simplify};
use crate::transform::{Convert, Executor, Op, Step};

/// Memory of which several workers write disjoint elements at the same time.
#[derive(Clone, Copy, Debug)]
pub struct SharedBytes {
    start: *mut u8,
    len: usize,
}

// SAFETY: the pointer is only dereferenced in `execute`, whose caller promises that no two threads touch one element.
#[allow(unsafe_code)]
unsafe impl Send for SharedBytes {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for SharedBytes {}

/// Why an operation was refused. Nothing has been written then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// The box reaches beyond the source or the target.
    #[error("an operation reaches element {element} of a {side} of {len} bytes")]
    Outside {
        /// `source` or `target`.
        side: &'static str,
        /// The last element it reaches.
        element: u64,
        /// The size of that side.
        len: usize,
    },
    /// The cast is not defined, or a stored element is not valid.
    #[error(transparent)]
    Cast(#[from] CastError),
}

impl SharedBytes {
    /// Memory to write to.
    ///
    /// # Safety
    /// 1. `start` is valid for writes of `len` bytes as long as this value or a copy of it is used.
    /// 2. Meanwhile nothing else reads or writes the bytes that operations on it write.
    #[allow(unsafe_code)]
    pub unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self { start, len }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to write to.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes `[offset, offset + len)`, which must lie inside.
    ///
    /// # Safety
    /// Nothing else reads or writes these bytes while the slice lives.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub unsafe fn slice_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "a slice beyond the memory");
        // SAFETY: inside the allocation by the assertion, valid by the constructor's promise, exclusive by this function's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

/// The processor, as an executor: ops run at once, on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Executor for Cpu {
    type Source = [u8];
    type Target = SharedBytes;
    type Error = OpError;

    #[allow(unsafe_code)]
    unsafe fn run(&self, source: &[u8], steps: &[Step<'_, SharedBytes>]) -> Result<(), OpError> {
        for step in steps {
            // SAFETY: the caller's promise for every step.
            let lossy = unsafe { execute(&step.op, source, step.target) }?;
            step.lossy.fetch_add(lossy, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Copies the box, and returns how many elements were lossy.
///
/// # Errors
/// A box that reaches outside, an undefined cast, or an invalid stored element (a bool that is neither 0 nor 1).
///
/// # Safety
/// No other thread reads or writes the target elements of the box meanwhile.
#[allow(unsafe_code)]
pub unsafe fn execute(op: &Op, source: &[u8], target: &SharedBytes) -> Result<u64, OpError> {
    if op.extent.contains(&0) {
        return Ok(0);
    }
    let to = op.convert.to;
    check_inside(op, source.len(), target.len())?;

    let mut dims = simplify(op);
    let inner = dims.pop().unwrap_or(Dim { extent: 1, source: 1, target: 1 });
    let state = Walk { convert: op.convert, source, target, inner };
    let broadcast = inner.source == 0 && dims.iter().all(|dim| dim.source == 0);
    let block = match (broadcast, inner.source, inner.target) {
        (true, ..) => {
            let mut element = [0u8; 16];
            let element = &mut element[..to.size()];
            let lossy = state.converted(op.source_start as usize, 1, 1, element)?;
            let volume: u64 = op.extent.iter().product();
            walk(&dims, 0, op.target_start as usize, &mut |_, at| {
                // SAFETY: these are target elements of the box, inside by the check above; the caller keeps others away.
                unsafe { state.write_repeated(at, element) };
                Ok(0)
            })?;
            return Ok(lossy * volume);
        }
        (false, 1, 1) => inner.extent,
        _ => GATHER_BLOCK,
    };
    if block != inner.extent {
        // The densest source dimension goes right outside the block.
        if let Some(dense) = (0..dims.len()).min_by_key(|&index| dims[index].source) {
            let dim = dims.remove(dense);
            dims.push(dim);
        }
    }
    let (outer, dense) = match (block != inner.extent, dims.split_last()) {
        (true, Some((dense, outer))) => (outer, Some(*dense)),
        _ => (&dims[..], None),
    };
    walk(outer, op.source_start as usize, op.target_start as usize, &mut |from_at, to_at| {
        let (mut lossy, mut first) = (0, 0);
        while first < inner.extent {
            let count = block.min(inner.extent - first);
            let (mut from_at, mut to_at) = (from_at + first * inner.source, to_at + first * inner.target);
            for _ in 0..dense.map_or(1, |dim| dim.extent) {
                // SAFETY: as above.
                lossy += unsafe { state.block(from_at, to_at, count) }?;
                from_at += dense.map_or(0, |dim| dim.source);
                to_at += dense.map_or(0, |dim| dim.target);
            }
            first += count;
        }
        Ok(lossy)
    })
}

/// [`execute`] into memory that nobody else has.
///
/// # Errors
/// See [`execute`].
pub fn execute_in(op: &Op, source: &[u8], target: &mut [u8]) -> Result<u64, OpError> {
    #[allow(unsafe_code)]
    // SAFETY: the slice is borrowed exclusively for the whole call, so only this thread touches it.
    unsafe {
        execute(op, source, &SharedBytes::new(target.as_mut_ptr(), target.len()))
    }
}

/// Calls `visit` with the source and target position of every index of the outer dimensions; sums what it returns.
fn walk(
    dims: &[Dim],
    source: usize,
    target: usize,
    visit: &mut impl FnMut(usize, usize) -> Result<u64, OpError>,
) -> Result<u64, OpError> {
    let Some((dim, rest)) = dims.split_first() else { return visit(source, target) };
    let mut lossy = 0;
    for index in 0..dim.extent {
        lossy += walk(rest, source + index * dim.source, target + index * dim.target, visit)?;
    }
    Ok(lossy)
}

struct Walk<'a> {
    convert: Convert,
    source: &'a [u8],
    target: &'a SharedBytes,
    inner: Dim,
}

impl Walk<'_> {
    /// Moves `count` elements of the inner dimension.
    ///
    /// # Safety
    /// The target elements lie inside the target and nobody else touches them.
    #[allow(unsafe_code)]
    unsafe fn block(&self, from_at: usize, to_at: usize, count: usize) -> Result<u64, OpError> {
        let to = self.convert.to.size();
        if self.inner.target == 1 {
            // SAFETY: `count` contiguous target elements of the box; exclusive by this function's contract.
            let out = unsafe { self.target.slice_mut(to_at * to, count * to) };
            return self.converted(from_at, self.inner.source, count, out);
        }
        let mut scratch = [0u8; GATHER_BLOCK * 16];
        let scratch = &mut scratch[..count * to];
        let lossy = self.converted(from_at, self.inner.source, count, scratch)?;
        for (index, element) in scratch.chunks_exact(to).enumerate() {
            // SAFETY: one target element of the box; exclusive by this function's contract.
            unsafe { self.target.slice_mut((to_at + index * self.inner.target) * to, to) }.copy_from_slice(element);
        }
        Ok(lossy)
    }

    /// Writes one element to every position of the inner dimension.
    ///
    /// # Safety
    /// As [`block`](Self::block).
    #[allow(unsafe_code)]
    unsafe fn write_repeated(&self, at: usize, element: &[u8]) {
        let size = element.len();
        if self.inner.target == 1 {
            // SAFETY: contiguous target elements of the box; exclusive by this function's contract.
            let out = unsafe { self.target.slice_mut(at * size, self.inner.extent * size) };
            if element.iter().all(|byte| *byte == element[0]) {
                out.fill(element[0]);
            } else {
                out.chunks_exact_mut(size).for_each(|slot| slot.copy_from_slice(element));
            }
            return;
        }
        for index in 0..self.inner.extent {
            // SAFETY: one target element of the box; exclusive by this function's contract.
            unsafe { self.target.slice_mut((at + index * self.inner.target) * size, size) }.copy_from_slice(element);
        }
    }

    /// Converts `count` source elements, `stride` apart, into contiguous target elements.
    fn converted(&self, at: usize, stride: usize, count: usize, out: &mut [u8]) -> Result<u64, OpError> {
        let Convert { from, to, swap, policy } = self.convert;
        let size = from.size();
        let prepared = swap && from.swap_size() > 1 || from.stored_form_differs();
        if stride == 1 && !prepared {
            let run = &self.source[at * size..(at + count) * size];
            return Ok(convert(from, to, policy, run, out)?);
        }
        if from == to && !prepared {
            gather(&self.source[at * size..], size, stride, out);
            return Ok(0);
        }
        let mut lossy = 0;
        let mut scratch = [0u8; GATHER_BLOCK * 16];
        for (index, out) in out.chunks_mut(GATHER_BLOCK * to.size()).enumerate() {
            let count = out.len() / to.size();
            let scratch = &mut scratch[..count * size];
            gather(&self.source[(at + index * GATHER_BLOCK * stride) * size..], size, stride, scratch);
            if swap {
                scratch.chunks_exact_mut(from.swap_size()).for_each(<[u8]>::reverse);
            }
            normalise(from, scratch)?;
            lossy += convert(from, to, policy, scratch, out)?;
        }
        Ok(lossy)
    }
}

/// Copies elements that lie `stride` elements apart. The last one lies inside `source`, by the bounds check of the box.
fn gather(source: &[u8], size: usize, stride: usize, out: &mut [u8]) {
    fn fixed<const SIZE: usize>(source: &[u8], stride: usize, out: &mut [u8]) {
        for (index, slot) in out.chunks_exact_mut(SIZE).enumerate() {
            let at = index * stride * SIZE;
            slot.copy_from_slice(&source[at..at + SIZE]);
        }
    }
    if stride == 1 {
        return out.copy_from_slice(&source[..out.len()]);
    }
    match size {
        1 => fixed::<1>(source, stride, out),
        2 => fixed::<2>(source, stride, out),
        4 => fixed::<4>(source, stride, out),
        8 => fixed::<8>(source, stride, out),
        _ => fixed::<16>(source, stride, out),
    }
}

/// Elements that are gathered at a time: a block of the largest element is 4 KiB, a sixth of the smallest first-level cache.
const GATHER_BLOCK: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{CastPolicy, DType};
    use proptest::prelude::*;

    fn copy(dtype: DType) -> Convert {
        Convert { from: dtype, to: dtype, swap: false, policy: CastPolicy::Saturate }
    }

    proptest! {
        #[test]
        fn a_permuted_box_lands_where_the_strides_say(
            extent in prop::collection::vec(1u64..6, 0..4),
            seed in any::<u64>(),
            wide in any::<bool>(),
        ) {
            let rank = extent.len();
            let mut order: Vec<usize> = (0..rank).collect();
            order.sort_by_key(|&dim| seed.rotate_left(dim as u32 * 7) % 97);
            let source_strides = crate::shape::strides(&extent);
            let turned: Vec<u64> = order.iter().map(|&dim| extent[dim]).collect();
            let turned_strides = crate::shape::strides(&turned);
            let mut target_strides = vec![0; rank];
            for (at, &dim) in order.iter().enumerate() {
                target_strides[dim] = turned_strides[at];
            }
            let count: u64 = extent.iter().product();
            let dtype = if wide { DType::Float32 } else { DType::Int16 };
            let size = dtype.size();
            let source: Vec<u8> = (0..count as usize * size).map(|byte| (byte * 31 % 251) as u8).collect();
            let op = Op { extent: extent.clone(), source_strides: source_strides.clone(), target_strides: target_strides.clone(),
                source_start: 0, target_start: 0, convert: copy(dtype) };
            let mut target = vec![0xEE; source.len()];
            prop_assert_eq!(execute_in(&op, &source, &mut target), Ok(0));
            for number in 0..count {
                let (mut rest, mut at) = (number, 0);
                for dim in (0..rank).rev() {
                    at += rest % extent[dim] * target_strides[dim];
                    rest /= extent[dim];
                }
                let (from, to) = (number as usize * size, at as usize * size);
                prop_assert_eq!(&source[from..from + size], &target[to..to + size]);
            }
        }
    }

    #[test]
    fn large_transposes_and_swaps_agree_with_the_plain_loop() {
        let (rows, columns) = (700u64, 300u64);
        let source: Vec<u8> = (0..rows * columns).flat_map(|value| (value as u32).to_be_bytes()).collect();
        let op = Op {
            extent: vec![rows, columns],
            source_strides: vec![columns, 1],
            target_strides: vec![1, rows],
            source_start: 0,
            target_start: 0,
            convert: Convert { from: DType::UInt32, to: DType::UInt64, swap: true, policy: CastPolicy::Saturate },
        };
        let mut target = vec![0; source.len() * 2];
        assert_eq!(execute_in(&op, &source, &mut target), Ok(0));
        for (at, value) in target.chunks_exact(8).enumerate() {
            let (column, row) = (at as u64 / rows, at as u64 % rows);
            assert_eq!(u64::from_le_bytes(value.try_into().unwrap()), row * columns + column);
        }
    }

    #[test]
    fn a_broadcast_fills_and_counts_every_lossy_element() {
        let op = Op {
            extent: vec![2, 3],
            source_strides: vec![0, 0],
            target_strides: vec![4, 1],
            source_start: 0,
            target_start: 1,
            convert: Convert { from: DType::Float32, to: DType::UInt8, swap: false, policy: CastPolicy::Saturate },
        };
        let mut target = vec![9; 8];
        assert_eq!(execute_in(&op, &300f32.to_le_bytes(), &mut target), Ok(6));
        assert_eq!(target, [9, 255, 255, 255, 9, 255, 255, 255]);
    }

    #[test]
    fn boxes_that_reach_outside_are_refused() {
        let mut op = Op {
            extent: vec![4],
            source_strides: vec![1],
            target_strides: vec![1],
            source_start: 1,
            target_start: 0,
            convert: copy(DType::UInt8),
        };
        assert!(matches!(execute_in(&op, &[0; 4], &mut [0; 4]), Err(OpError::Outside { side: "source", .. })));
        op.source_start = 0;
        op.target_strides = vec![u64::MAX];
        assert!(matches!(execute_in(&op, &[0; 4], &mut [0; 4]), Err(OpError::Outside { side: "target", .. })));
    }
}
