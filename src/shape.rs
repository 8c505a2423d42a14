//! Shapes, strides and regions: checked arithmetic on boxes of array elements.
//!
//! A shape is a slice of `u64` extents, slowest dimension first. Sizes come from files, so every product is checked.

use crate::limits::{ARRAY_BYTES_MAX, RANK_MAX};

/// Number of elements of a shape, or `None` when it does not fit in 64 bits. A 0-d shape has one element.
pub fn element_count(shape: &[u64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1u64, |count, &extent| count.checked_mul(extent))
}

/// Number of bytes of a shape with elements of `element_size` bytes, or `None` when the rank or the size is beyond
/// [`RANK_MAX`] and [`ARRAY_BYTES_MAX`].
pub fn byte_count(shape: &[u64], element_size: usize) -> Option<u64> {
    if shape.len() > RANK_MAX {
        return None;
    }
    let bytes = element_count(shape)?.checked_mul(element_size as u64)?;
    (bytes <= ARRAY_BYTES_MAX).then_some(bytes)
}

/// Row-major strides in elements. The caller has checked the shape with [`byte_count`].
pub fn strides(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim].saturating_mul(shape[dim].max(1));
    }
    strides
}

/// A box of elements: for every dimension a start and an extent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Region {
    /// First index of every dimension.
    pub start: Vec<u64>,
    /// Number of indices of every dimension; 0 anywhere makes the region empty.
    pub extent: Vec<u64>,
}

impl Region {
    /// The whole of an array.
    pub fn whole(shape: &[u64]) -> Self {
        Self { start: vec![0; shape.len()], extent: shape.to_vec() }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.extent.len()
    }

    /// One past the last index of a dimension.
    pub fn end(&self, dim: usize) -> u64 {
        self.start[dim] + self.extent[dim]
    }

    /// Whether no element is inside. A 0-d region holds one element.
    pub fn is_empty(&self) -> bool {
        self.extent.contains(&0)
    }

    /// Number of elements. Regions lie inside checked shapes, so the product fits.
    pub fn volume(&self) -> u64 {
        self.extent.iter().product()
    }

    /// The common part, or `None` when it is empty. Both have the same rank.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        debug_assert_eq!(self.rank(), other.rank());
        let mut common = Self { start: Vec::with_capacity(self.rank()), extent: Vec::with_capacity(self.rank()) };
        for dim in 0..self.rank() {
            let start = self.start[dim].max(other.start[dim]);
            let end = self.end(dim).min(other.end(dim));
            if end <= start {
                return None;
            }
            common.start.push(start);
            common.extent.push(end - start);
        }
        Some(common)
    }

    /// Whether every element of `other` lies in this region.
    pub fn contains(&self, other: &Self) -> bool {
        other.is_empty()
            || (0..self.rank()).all(|dim| self.start[dim] <= other.start[dim] && other.end(dim) <= self.end(dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert_eq!(element_count(&[]), Some(1));
        assert_eq!(element_count(&[u64::MAX, 2]), None);
        assert_eq!(element_count(&[u64::MAX, 2, 0]), Some(0));
        assert_eq!(byte_count(&[1 << 59], 8), None);
        assert_eq!(byte_count(&[1; RANK_MAX + 1], 1), None);
    }

    #[test]
    fn regions_intersect_per_dimension() {
        let a = Region { start: vec![0, 4], extent: vec![4, 4] };
        let b = Region { start: vec![2, 0], extent: vec![4, 5] };
        assert_eq!(a.intersect(&b), Some(Region { start: vec![2, 4], extent: vec![2, 1] }));
        let c = Region { start: vec![4, 0], extent: vec![1, 8] };
        assert_eq!(a.intersect(&c), None);
        assert_eq!(Region::whole(&[]).intersect(&Region::whole(&[])), Some(Region::whole(&[])));
    }
}
