//! Which byte ranges of a chunk are worth reading, and how a large chunk passes through small buffers.
//!
//! Both questions have the same answer. Take a row-major box whose elements lie `stride[d]` bytes apart along dimension
//! `d`, and the first dimension `L` whose stride is at most some size. Indices of the dimensions before `L` are far apart
//! and are taken one by one; along `L` neighbours are near, so an interval of indices is one byte range.

use crate::shape::{Region, strides};

/// A byte range of an uncompressed chunk, and the box of the chunk that it lies in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawRange {
    /// One index of every outer dimension, an interval of one, all of the inner ones.
    pub(super) region: Region,
    /// First byte, from the start of the chunk.
    pub(super) offset: u64,
    /// Number of bytes.
    pub(super) len: u64,
}

/// Cuts a chunk of this shape into the byte ranges that cover `regions`: gaps of at most `gap` bytes are read along, no
/// range is longer than `max` bytes (which is at least `gap` and one element). `None` if that makes more than `count_max` ranges.
pub(super) fn raw_ranges(
    shape: &[u64],
    element: u64,
    regions: &[Region],
    gap: u64,
    max: u64,
    count_max: u64,
) -> Option<Vec<RawRange>> {
    if shape.is_empty() {
        return Some(vec![RawRange { region: Region::whole(shape), offset: 0, len: element }]);
    }
    let cut = Cut { shape, stride: byte_strides(shape, element), element, gap, max, count_max, level: 0 };
    let cut = Cut { level: level(&cut.stride, gap), ..cut };
    let mut ranges = Vec::new();
    let active: Vec<&Region> = regions.iter().filter(|region| !region.is_empty()).collect();
    cut.descend(0, &active, &Region { start: vec![0; shape.len()], extent: vec![1; shape.len()] }, 0, &mut ranges)?;
    Some(ranges)
}

struct Cut<'a> {
    shape: &'a [u64],
    stride: Vec<u64>,
    element: u64,
    gap: u64,
    max: u64,
    count_max: u64,
    level: usize,
}

impl Cut<'_> {
    /// Walks the outer dimensions; `at` holds the indices chosen so far and `offset` their bytes.
    fn descend(&self, dim: usize, active: &[&Region], at: &Region, offset: u64, out: &mut Vec<RawRange>) -> Option<()> {
        if dim == self.level {
            return self.intervals(active, at, offset, out);
        }
        let mut bounds: Vec<u64> = active.iter().flat_map(|region| [region.start[dim], region.end(dim)]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        for pair in bounds.windows(2) {
            let (from, to) = (pair[0], pair[1]);
            let inside: Vec<&Region> =
                active.iter().copied().filter(|region| region.start[dim] <= from && to <= region.end(dim)).collect();
            if inside.is_empty() {
                continue;
            }
            // Every index of [from, to) is wanted by the same regions, so the ranges below are the same but for their place.
            let first = out.len();
            let mut at = at.clone();
            at.start[dim] = from;
            self.descend(dim + 1, &inside, &at, offset + from * self.stride[dim], out)?;
            let pattern = out[first..].to_vec();
            for index in from + 1..to {
                if (out.len() + pattern.len()) as u64 > self.count_max {
                    return None;
                }
                out.extend(pattern.iter().cloned().map(|mut range| {
                    range.region.start[dim] = index;
                    range.offset += (index - from) * self.stride[dim];
                    range
                }));
            }
        }
        Some(())
    }

    /// Merges what is wanted along the level dimension into intervals, and cuts those at the size limit.
    fn intervals(&self, active: &[&Region], at: &Region, offset: u64, out: &mut Vec<RawRange>) -> Option<()> {
        let (dim, stride) = (self.level, self.stride[self.level]);
        // First and one-past-last byte that a region needs, within this row of outer indices.
        let span = |region: &Region| {
            let first: u64 = (dim..self.shape.len()).map(|d| region.start[d] * self.stride[d]).sum();
            let last: u64 = (dim..self.shape.len()).map(|d| (region.end(d) - 1) * self.stride[d]).sum();
            (first, last + self.element)
        };
        let mut spans: Vec<(u64, u64)> = active.iter().map(|region| span(region)).collect();
        spans.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (first, end) in spans {
            match merged.last_mut() {
                Some(last) if first <= last.1.saturating_add(self.gap) => last.1 = last.1.max(end),
                _ => merged.push((first, end)),
            }
        }
        let rows_max = (self.max / stride).max(1);
        for (first, end) in merged {
            let mut row = first / stride;
            let row_end = end.div_ceil(stride);
            while row < row_end {
                let stop = (row + rows_max).min(row_end);
                let (from, to) = (first.max(row * stride), end.min(stop * stride));
                if out.len() as u64 >= self.count_max {
                    return None;
                }
                let mut region = at.clone();
                region.start[dim] = row;
                region.extent[dim] = stop - row;
                for inner in dim + 1..self.shape.len() {
                    region.extent[inner] = self.shape[inner];
                }
                out.push(RawRange { region, offset: offset + from, len: to - from });
                row = stop;
            }
        }
        Some(())
    }
}

/// A box cut, in the order of its bytes, into slabs that each fit a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slabs {
    shape: Vec<u64>,
    level: usize,
    rows: u64,
    element: u64,
    next: Option<Vec<u64>>,
}

impl Slabs {
    /// Slabs of at most `max` bytes of a box of elements of `element` bytes. `max` is at least one element.
    pub fn new(shape: &[u64], element: usize, max: u64) -> Self {
        let element = element as u64;
        let stride = byte_strides(shape, element);
        let level = level(&stride, max);
        let rows = stride.get(level).map_or(1, |stride| (max / stride).max(1));
        let next = (!shape.contains(&0)).then(|| vec![0; shape.len()]);
        Self { shape: shape.to_vec(), level, rows, element, next }
    }
}

impl Iterator for Slabs {
    /// The box of the slab and its length in bytes; each slab starts where the last one ended.
    type Item = (Region, u64);

    fn next(&mut self) -> Option<(Region, u64)> {
        let start = self.next.take()?;
        if self.shape.is_empty() {
            return Some((Region::whole(&[]), self.element));
        }
        let mut region = Region { start, extent: vec![1; self.shape.len()] };
        region.extent[self.level] = self.rows.min(self.shape[self.level] - region.start[self.level]);
        region.extent[self.level + 1..].copy_from_slice(&self.shape[self.level + 1..]);
        // Carry: the level dimension advances by the slab, outer ones by one when it wraps.
        let mut following = region.start.clone();
        following[self.level] += region.extent[self.level];
        for dim in (0..=self.level).rev() {
            if following[dim] < self.shape[dim] {
                self.next = Some(following);
                break;
            }
            following[dim] = 0;
            if dim > 0 {
                following[dim - 1] += 1;
            }
        }
        let bytes = region.volume() * self.element;
        Some((region, bytes))
    }
}

/// Number of elements in the union of boxes.
pub(super) fn union_volume(regions: &[Region]) -> u64 {
    let mut wanted: Vec<&Region> = regions.iter().filter(|region| !region.is_empty()).collect();
    match wanted.first().map(|region| region.rank()) {
        None => 0,
        Some(rank) => volume_from(0, rank, &mut wanted),
    }
}

/// The same of what the boxes are from a dimension on. Sweeps the dimension: between two neighbouring bounds the same boxes are
/// met, so that boxes side by side cost their number and not its square.
fn volume_from(dim: usize, rank: usize, regions: &mut [&Region]) -> u64 {
    if dim == rank {
        return 1;
    }
    regions.sort_unstable_by_key(|region| region.start[dim]);
    let mut bounds: Vec<u64> = regions.iter().flat_map(|region| [region.start[dim], region.end(dim)]).collect();
    bounds.sort_unstable();
    bounds.dedup();
    let mut coming = regions.iter().copied().peekable();
    let mut met: Vec<&Region> = Vec::new();
    let mut volume = 0;
    for pair in bounds.windows(2) {
        met.retain(|region| region.end(dim) > pair[0]);
        while let Some(region) = coming.next_if(|region| region.start[dim] <= pair[0]) {
            met.push(region);
        }
        if !met.is_empty() {
            volume += (pair[1] - pair[0]) * volume_from(dim + 1, rank, &mut met.clone());
        }
    }
    volume
}

fn byte_strides(shape: &[u64], element: u64) -> Vec<u64> {
    strides(shape).into_iter().map(|stride| stride * element).collect()
}

/// The first dimension whose neighbours are at most `near` bytes apart; the last one if none is.
fn level(stride: &[u64], near: u64) -> usize {
    stride.iter().position(|&bytes| bytes <= near).unwrap_or(stride.len().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offsets(shape: &[u64], element: u64, region: &Region) -> Vec<u64> {
        let mut all = vec![0];
        for (dim, stride) in byte_strides(shape, element).into_iter().enumerate() {
            all = all
                .iter()
                .flat_map(|base| (region.start[dim]..region.end(dim)).map(move |index| base + index * stride))
                .collect();
        }
        all
    }

    fn boxes() -> impl Strategy<Value = (Vec<u64>, Vec<Region>)> {
        prop::collection::vec(1u64..7, 0..4).prop_flat_map(|shape| {
            let dims: Vec<_> = shape.iter().map(|&n| (0..n).prop_flat_map(move |s| (Just(s), 1..=n - s))).collect();
            let region = dims.prop_map(|dims| {
                let (start, extent) = dims.into_iter().unzip();
                Region { start, extent }
            });
            (Just(shape), prop::collection::vec(region, 1..4))
        })
    }

    #[test]
    fn many_boxes_side_by_side_cost_their_number() {
        let columns: Vec<Region> =
            (0..50_000).map(|at| Region { start: vec![0, at * 3], extent: vec![7, 2] }).collect();
        let rows: Vec<Region> = (0..50_000).map(|at| Region { start: vec![at, 1], extent: vec![1, 4] }).collect();
        let start = std::time::Instant::now();
        assert_eq!((union_volume(&columns), union_volume(&rows)), (50_000 * 14, 50_000 * 4));
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
        assert_eq!(union_volume(&[Region::whole(&[]), Region::whole(&[])]), 1);
    }

    proptest! {
        #[test]
        fn ranges_cover_what_is_wanted_once_and_gaps_stay_small((shape, regions) in boxes(), gap in 0u64..40, max in 8u64..64) {
            let element = 2;
            let max = max.max(gap);
            let ranges = raw_ranges(&shape, element, &regions, gap, max, u64::MAX).unwrap();
            let mut covered = std::collections::BTreeSet::new();
            for range in &ranges {
                prop_assert!(range.len <= max.max(element) && range.len % element == 0);
                let inside = offsets(&shape, element, &range.region);
                for byte in (range.offset..range.offset + range.len).step_by(element as usize) {
                    prop_assert!(inside.contains(&byte), "a range leaves its box");
                    prop_assert!(covered.insert(byte), "byte {} is read twice", byte);
                }
            }
            let wanted: std::collections::BTreeSet<u64> =
                regions.iter().flat_map(|region| offsets(&shape, element, region)).collect();
            prop_assert!(wanted.is_subset(&covered));
            prop_assert_eq!(union_volume(&regions), wanted.len() as u64);
            // A byte that nobody wants is read only as part of a gap of at most `gap` bytes.
            let wanted: Vec<u64> = wanted.into_iter().collect();
            for byte in covered.iter().filter(|byte| wanted.binary_search(byte).is_err()) {
                let next = wanted.partition_point(|have| have < byte);
                prop_assert!(next > 0 && next < wanted.len());
                prop_assert!(wanted[next] - wanted[next - 1] - element <= gap);
            }
        }

        #[test]
        fn slabs_walk_the_box_in_byte_order(shape in prop::collection::vec(1u64..6, 0..4), max in 1u64..100) {
            let element = 2usize;
            let mut at = 0;
            for (region, bytes) in Slabs::new(&shape, element, max.max(2)) {
                let inside = offsets(&shape, 2, &region);
                prop_assert_eq!(inside[0], at);
                prop_assert_eq!(inside.len() as u64 * 2, bytes);
                prop_assert_eq!(inside[inside.len() - 1] + 2, at + bytes);
                prop_assert!(bytes <= max.max(2));
                at += bytes;
            }
            prop_assert_eq!(at, shape.iter().product::<u64>() * 2);
        }
    }

    #[test]
    fn too_many_ranges_are_given_up() {
        let column = Region { start: vec![0, 0], extent: vec![1000, 1] };
        assert_eq!(raw_ranges(&[1000, 1000], 4, std::slice::from_ref(&column), 0, 4096, 100), None);
        assert_eq!(raw_ranges(&[1000, 1000], 4, &[column], 4000, 1 << 20, 100).map(|ranges| ranges.len()), Some(4));
    }
}
