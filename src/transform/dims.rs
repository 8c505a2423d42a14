//! The box of an [`Op`] as executors want it: shown to lie inside, and made as simple as it can be.

#![allow(clippy::cast_possible_truncation, reason = "positions were checked against slices, so they fit usize")]

use super::Op;
use super::cpu::OpError;

/// One dimension of a simplified box: its extent and its strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dim {
    pub(super) extent: usize,
    pub(super) source: usize,
    pub(super) target: usize,
}

/// Shows that every element of a box that has some lies inside the two sides, whose lengths are in bytes.
pub(super) fn check_inside(op: &Op, source_len: usize, target_len: usize) -> Result<(), OpError> {
    let reach = |start: u64, strides: &[u64]| -> u64 {
        let far = op.extent.iter().zip(strides).map(|(extent, stride)| (extent - 1).saturating_mul(*stride));
        far.fold(start, u64::saturating_add)
    };
    let outside = |side, element: u64, size: usize, len: usize| {
        let end = element.checked_add(1).and_then(|count| count.checked_mul(size as u64));
        if end.is_some_and(|end| end <= len as u64) { Ok(()) } else { Err(OpError::Outside { side, element, len }) }
    };
    outside("source", reach(op.source_start, &op.source_strides), op.convert.from.size(), source_len)?;
    outside("target", reach(op.target_start, &op.target_strides), op.convert.to.size(), target_len)
}

/// The dimensions that matter, outermost in the target first, merged where both sides are contiguous. The box lies inside.
pub(super) fn simplify(op: &Op) -> Vec<Dim> {
    let dims = op.extent.iter().zip(&op.source_strides).zip(&op.target_strides);
    // The bounds check has shown that all reachable positions fit the two sides, so they fit usize.
    let dims = dims.filter(|((extent, _), _)| **extent > 1).map(|((extent, source), target)| Dim {
        extent: *extent as usize,
        source: *source as usize,
        target: *target as usize,
    });
    merged(dims.collect())
}

/// Sorts dimensions by their stride in the target and merges neighbours that lie on end in both arrays.
pub(super) fn merged(mut dims: Vec<Dim>) -> Vec<Dim> {
    dims.sort_by_key(|dim| std::cmp::Reverse((dim.target, dim.source)));
    let mut merged: Vec<Dim> = Vec::with_capacity(dims.len());
    for dim in dims {
        match merged.last_mut() {
            Some(outer) if outer.source == dim.source * dim.extent && outer.target == dim.target * dim.extent => {
                *outer = Dim { extent: outer.extent * dim.extent, ..dim };
            }
            _ => merged.push(dim),
        }
    }
    merged
}
