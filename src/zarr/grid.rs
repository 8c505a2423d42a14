//! The regular chunk grid: positions, counts and the regions of chunks.

use crate::limits::{ARRAY_BYTES_MAX, RANK_MAX};
use crate::shape::Region;

/// A regular grid: every chunk has the same extents, the first one starts at the array's origin.
///
/// The grid knows no array; methods that need one take its shape. A `position` has one index a dimension and counts
/// chunks, not elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    chunk_shape: Vec<u64>,
}

/// The positions of a block of chunks in C order, one at a time. Made by [`Grid::positions`].
#[derive(Clone, Debug)]
pub struct Positions {
    first: Vec<u64>,
    end: Vec<u64>,
    next: Option<Vec<u64>>,
}

impl Grid {
    /// A grid of chunks with these extents, or `None` when an extent is 0 or beyond [`ARRAY_BYTES_MAX`], or the rank is
    /// beyond [`RANK_MAX`].
    pub fn new(chunk_shape: Vec<u64>) -> Option<Self> {
        let fits =
            chunk_shape.len() <= RANK_MAX && chunk_shape.iter().all(|extent| (1..=ARRAY_BYTES_MAX).contains(extent));
        fits.then_some(Self { chunk_shape })
    }

    /// Extents of a chunk, each at least 1, slowest dimension first.
    pub fn chunk_shape(&self) -> &[u64] {
        &self.chunk_shape
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.chunk_shape.len()
    }

    /// Number of chunks along every dimension of an array of this shape: extents divided by chunk extents, rounded up.
    pub fn counts(&self, shape: &[u64]) -> Vec<u64> {
        debug_assert_eq!(shape.len(), self.rank());
        shape.iter().zip(&self.chunk_shape).map(|(extent, chunk)| extent.div_ceil(*chunk)).collect()
    }

    /// Number of chunks of an array of this shape, or `None` when it does not fit in 64 bits. A 0-d array has one.
    pub fn chunk_count(&self, shape: &[u64]) -> Option<u64> {
        crate::shape::element_count(&self.counts(shape))
    }

    /// Number of chunks that a region touches, or `None` when it does not fit in 64 bits.
    pub fn touched_count(&self, region: &Region) -> Option<u64> {
        match self.block(region) {
            None => Some(0),
            Some((first, end)) => {
                end.iter().zip(&first).try_fold(1u64, |count, (end, first)| count.checked_mul(end - first))
            }
        }
    }

    /// The positions of the chunks that a region touches, in C order.
    ///
    /// Holds one position; nothing is allocated by their number. An empty region touches none, a 0-d one touches one.
    pub fn positions(&self, region: &Region) -> Positions {
        match self.block(region) {
            None => Positions { first: Vec::new(), end: Vec::new(), next: None },
            Some((first, end)) => Positions { next: Some(first.clone()), first, end },
        }
    }

    /// Index of a chunk in C order among `counts` chunks, or `None` when the position is outside or the index does not
    /// fit in 64 bits.
    pub fn index(position: &[u64], counts: &[u64]) -> Option<u64> {
        if position.len() != counts.len() {
            return None;
        }
        position.iter().zip(counts).try_fold(0u64, |index, (&position, &count)| {
            if position >= count {
                return None;
            }
            index.checked_mul(count)?.checked_add(position)
        })
    }

    /// The elements that the chunk at this position stores, reaching beyond the array at its high edges, or `None` when
    /// they do not fit in 64 bits.
    pub fn region(&self, position: &[u64]) -> Option<Region> {
        debug_assert_eq!(position.len(), self.rank());
        let mut start = Vec::with_capacity(self.rank());
        for (&position, &chunk) in position.iter().zip(&self.chunk_shape) {
            let first = position.checked_mul(chunk)?;
            first.checked_add(chunk)?;
            start.push(first);
        }
        Some(Region { start, extent: self.chunk_shape.clone() })
    }

    /// The elements of the array of this shape that the chunk at this position stores, or `None` when there are none.
    pub fn clipped(&self, position: &[u64], shape: &[u64]) -> Option<Region> {
        self.region(position)?.intersect(&Region::whole(shape))
    }

    /// First and one past the last position that a region touches; `None` for an empty region.
    pub fn block(&self, region: &Region) -> Option<(Vec<u64>, Vec<u64>)> {
        debug_assert_eq!(region.rank(), self.rank());
        if region.is_empty() {
            return None;
        }
        let first = region.start.iter().zip(&self.chunk_shape).map(|(start, chunk)| start / chunk).collect();
        let ends = region.start.iter().zip(&region.extent).map(|(start, extent)| start.saturating_add(*extent));
        let end = ends.zip(&self.chunk_shape).map(|(end, chunk)| end.div_ceil(*chunk)).collect();
        Some((first, end))
    }
}

impl Iterator for Positions {
    type Item = Vec<u64>;

    fn next(&mut self) -> Option<Vec<u64>> {
        let current = self.next.take()?;
        let mut following = current.clone();
        for ((index, first), end) in following.iter_mut().zip(&self.first).zip(&self.end).rev() {
            if *index + 1 < *end {
                *index += 1;
                self.next = Some(following);
                break;
            }
            *index = *first;
        }
        Some(current)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn grid(chunk_shape: &[u64]) -> Grid {
        Grid::new(chunk_shape.to_vec()).unwrap()
    }

    #[test]
    fn chunks_without_extent_are_refused() {
        assert_eq!(Grid::new(vec![2, 0]), None);
        assert_eq!(Grid::new(vec![u64::MAX]), None);
        assert_eq!(Grid::new(vec![1; RANK_MAX + 1]), None);
    }

    #[test]
    fn a_zero_dimensional_array_has_one_chunk() {
        let grid = grid(&[]);
        assert_eq!(grid.chunk_count(&[]), Some(1));
        assert_eq!(grid.positions(&Region::whole(&[])).collect::<Vec<_>>(), vec![Vec::<u64>::new()]);
        assert_eq!(grid.clipped(&[], &[]), Some(Region::whole(&[])));
        assert_eq!(Grid::index(&[], &[]), Some(0));
    }

    #[test]
    fn edge_chunks_reach_beyond_the_array() {
        let grid = grid(&[4, 3]);
        assert_eq!(grid.counts(&[5, 6]), [2, 2]);
        assert_eq!(grid.region(&[1, 1]), Some(Region { start: vec![4, 3], extent: vec![4, 3] }));
        assert_eq!(grid.clipped(&[1, 1], &[5, 6]), Some(Region { start: vec![4, 3], extent: vec![1, 3] }));
        assert_eq!(grid.clipped(&[2, 0], &[5, 6]), None);
        assert_eq!(grid.region(&[u64::MAX, 0]), None);
    }

    #[test]
    fn a_huge_region_is_walked_without_being_listed() {
        let grid = grid(&[1]);
        let region = Region { start: vec![7], extent: vec![1 << 60] };
        assert_eq!(grid.touched_count(&region), Some(1 << 60));
        assert_eq!(grid.positions(&region).take(2).collect::<Vec<_>>(), [[7], [8]]);
    }

    proptest! {
        #[test]
        fn positions_are_exactly_the_chunks_that_meet_the_region(
            dims in prop::collection::vec((1u64..5, 0u64..9, 0u64..6), 0..4),
        ) {
            let grid = grid(&dims.iter().map(|dim| dim.0).collect::<Vec<_>>());
            let region = Region {
                start: dims.iter().map(|dim| dim.1).collect(),
                extent: dims.iter().map(|dim| dim.2).collect(),
            };
            let shape: Vec<u64> = dims.iter().map(|_| 16).collect();
            let counts = grid.counts(&shape);
            let expected: Vec<Vec<u64>> = grid
                .positions(&Region::whole(&shape))
                .filter(|position| grid.region(position).unwrap().intersect(&region).is_some() || dims.is_empty())
                .collect();
            let found: Vec<Vec<u64>> = grid.positions(&region).collect();
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(grid.touched_count(&region), Some(found.len() as u64));
            let indexes: Vec<u64> = grid.positions(&Region::whole(&shape)).map(|p| Grid::index(&p, &counts).unwrap()).collect();
            prop_assert_eq!(indexes, (0..grid.chunk_count(&shape).unwrap()).collect::<Vec<_>>());
        }
    }
}
