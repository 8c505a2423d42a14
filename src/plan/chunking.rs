//! How an array that is to be saved is divided into chunks and inner chunks.
//!
//! ```text
//!   array ──► chunks: one a distinct shard, so that a load on the same sharding reads each byte once
//!               └─► inner chunks: along the leading axes, a few MiB each, so that every core and every device has work and a
//!                   partial read stays verifiable
//! ```
//!
//! zarr wants one extent of chunks for the whole array and inner chunks that divide chunks, so both follow from divisors; an
//! array without good divisors gets fewer, larger ones.

use crate::limits::{CHUNK_PIECE_BYTES_MIN, DIVISORS_TRIED_MAX, INNER_CHUNK_BYTES};
use crate::shape::Region;

/// Extents of an array's chunks and of the inner chunks in them; at least 1 everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunking {
    /// Extents of a chunk.
    pub chunk: Vec<u64>,
    /// Extents of an inner chunk; they divide the chunk's.
    pub inner: Vec<u64>,
}

/// What divides an array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Divide {
    /// Largest chunk in bytes, where divisors allow; `None` for as large as a shard.
    pub chunk_bytes: Option<u64>,
    /// Whether chunks may have inner chunks.
    pub inner: bool,
}

/// The chunking of an array of these extents and bytes an element, whose elements are held in these regions (distinct ones,
/// in any order).
///
/// A chunk is a region if all regions lie on one grid, as the shards of a mesh do; otherwise the whole array is one. If it is
/// larger than `chunk_bytes`, its leading axes are divided.
pub fn chunking(shape: &[u64], element: u64, regions: &[Region], divide: Divide) -> Chunking {
    let mut chunk = grid_of(shape, regions).unwrap_or_else(|| shape.to_vec());
    chunk.iter_mut().for_each(|extent| *extent = (*extent).max(1));
    if shape.contains(&0) && bytes(&chunk, element) > INNER_CHUNK_BYTES {
        // Its other extents are no measure of anything: no chunk of it is ever written.
        let chunk = cut_to(&chunk, element, INNER_CHUNK_BYTES);
        return Chunking { inner: chunk.clone(), chunk };
    }
    if let Some(limit) = divide.chunk_bytes {
        let (parts, least) = (divided(&chunk, element, limit, 1), limit / SMALLER_CHUNKS_MAX);
        // Without good divisors nothing is cut into single elements: the last chunk of a whole array may reach beyond it, and
        // chunks of shards, which cannot, are larger than they should be.
        chunk = match (bytes(&parts, element) < least, is_whole(&chunk, shape)) {
            (false, _) => parts,
            (true, true) => cut_to(&chunk, element, limit),
            (true, false) => divided(&chunk, element, limit, least),
        };
    }
    if !divide.inner {
        return Chunking { inner: chunk.clone(), chunk };
    }
    let inner = divided(&chunk, element, INNER_CHUNK_BYTES, CHUNK_PIECE_BYTES_MIN);
    let whole = is_whole(&chunk, shape);
    if bytes(&inner, element) > 2 * INNER_CHUNK_BYTES && whole {
        // No divisor is near; but an array that is one chunk may have several whose last one reaches beyond it.
        if let Some(cut) = cut(&chunk, element, INNER_CHUNK_BYTES) {
            return Chunking { inner: cut.clone(), chunk: cut };
        }
    }
    Chunking { chunk, inner }
}

/// The extents of the grid on which all regions lie, if they do: each starts at a multiple of the largest extent along every
/// dimension and is cut off by the array's end only.
fn grid_of(shape: &[u64], regions: &[Region]) -> Option<Vec<u64>> {
    let filled: Vec<&Region> = regions.iter().filter(|region| !region.is_empty()).collect();
    let largest = |dim: usize| filled.iter().map(|region| region.extent[dim]).max().unwrap_or(shape[dim]);
    let extents: Vec<u64> = (0..shape.len()).map(largest).collect();
    let on_grid = |region: &&Region| {
        (0..shape.len()).all(|dim| {
            let (start, extent) = (region.start[dim], region.extent[dim]);
            start.is_multiple_of(extents[dim]) && extent == extents[dim].min(shape[dim] - start)
        })
    };
    filled.iter().all(on_grid).then_some(extents)
}

/// Extents that divide these and make pieces of at most `limit` bytes: leading axes are divided first, because then a piece is
/// one run of memory. An axis is left whole rather than cut into pieces below `least` bytes.
fn divided(extents: &[u64], element: u64, limit: u64, least: u64) -> Vec<u64> {
    let mut extents = extents.to_vec();
    for dim in 0..extents.len() {
        let now = bytes(&extents, element);
        if now <= limit {
            break;
        }
        let extent = extents[dim];
        let rest = now / extent;
        // The largest divisor that is small enough; if pieces of one index are too small, the smallest that is large enough.
        let fits = divisors(extent).filter(|part| part * rest <= limit.max(rest));
        let best = fits.filter(|part| part * rest >= least.min(limit)).max();
        let best = best.or_else(|| divisors(extent).filter(|part| part * rest >= least).min());
        extents[dim] = best.unwrap_or(extent);
    }
    extents
}

/// Pieces of at most `limit` bytes, leading axes first, which need not divide them.
fn cut_to(extents: &[u64], element: u64, limit: u64) -> Vec<u64> {
    let mut extents = extents.to_vec();
    for dim in 0..extents.len() {
        let whole = extents[dim];
        extents[dim] = 1;
        extents[dim] = (limit / bytes(&extents, element).max(1)).clamp(1, whole);
    }
    extents
}

/// Pieces of at most `limit` bytes of the first axis that is longer than one, which need not divide it.
fn cut(extents: &[u64], element: u64, limit: u64) -> Option<Vec<u64>> {
    let dim = extents.iter().position(|extent| *extent > 1)?;
    let rest = bytes(extents, element) / extents[dim];
    let mut cut = extents.to_vec();
    cut[dim] = (limit / rest).clamp(1, extents[dim]);
    Some(cut)
}

fn is_whole(chunk: &[u64], shape: &[u64]) -> bool {
    chunk.iter().zip(shape).all(|(chunk, extent)| chunk >= extent)
}

fn bytes(extents: &[u64], element: u64) -> u64 {
    extents.iter().fold(element, |bytes, extent| bytes.saturating_mul(*extent))
}

/// The divisors of a number; of a very large one only the smallest and what is left of the number by each.
fn divisors(number: u64) -> impl Iterator<Item = u64> {
    let small = 1..=number.isqrt().min(DIVISORS_TRIED_MAX);
    let small = small.filter(move |part| number.is_multiple_of(*part));
    small.flat_map(move |part| [part, number / part])
}

/// Chunks that divide an array are at most this many times smaller than they may be: many small ones cost more than a last
/// one that is padded.
const SMALLER_CHUNKS_MAX: u64 = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_prime_extent_is_not_cut_into_single_elements() {
        let limit = |bytes| Divide { chunk_bytes: Some(bytes), inner: false };
        assert_eq!(chunking(&[1_014_539], 1, &whole(&[1_014_539]), limit(700_000)).chunk, [700_000]);
        assert_eq!(chunking(&[3, 1_014_539], 1, &whole(&[3, 1_014_539]), limit(700_000)).chunk, [1, 700_000]);
        // Three shards of columns: chunks must divide them, and the only divisors of their rows are one and all.
        let columns = [0, 1, 2].map(|shard| Region { start: vec![0, shard * 395_273], extent: vec![8, 395_273] });
        assert_eq!(chunking(&[8, 3 * 395_273], 1, &columns, limit(123_745)).chunk, [1, 395_273]);
        // With a divisor above the limit, it is that one.
        let columns = [0, 1].map(|shard| Region { start: vec![0, shard * 3 * 70_001], extent: vec![2, 3 * 70_001] });
        assert_eq!(chunking(&[2, 6 * 70_001], 1, &columns, limit(60_000)).chunk, [1, 70_001]);
    }

    const INNER: Divide = Divide { chunk_bytes: None, inner: true };

    fn whole(shape: &[u64]) -> Vec<Region> {
        vec![Region::whole(shape)]
    }

    #[test]
    fn chunks_are_shards_and_inner_chunks_a_few_mebibytes() {
        // 4096 x 4096 f32 in four row shards: chunks of 16 MiB, inner chunks of 4 MiB.
        let shards: Vec<Region> =
            (0..4).map(|part| Region { start: vec![part * 1024, 0], extent: vec![1024, 4096] }).collect();
        let made = chunking(&[4096, 4096], 4, &shards, INNER);
        assert_eq!(made, Chunking { chunk: vec![1024, 4096], inner: vec![256, 4096] });
        let limited = Divide { chunk_bytes: Some(1 << 20), inner: false };
        assert_eq!(chunking(&[4096, 4096], 4, &shards, limited).chunk, [64, 4096]);
        // Uneven shards, the last of them short, one empty.
        let uneven = [(0, 4), (4, 4), (8, 2), (10, 0)]
            .map(|(start, extent)| Region { start: vec![start], extent: vec![extent] });
        assert_eq!(chunking(&[10], 8, &uneven, INNER).chunk, [4]);
        // Regions that are no grid.
        let odd = [(0, 3), (3, 7)].map(|(start, extent)| Region { start: vec![start], extent: vec![extent] });
        assert_eq!(chunking(&[10], 8, &odd, INNER).chunk, [10]);
        // A prime number of elements is cut where it does not divide.
        let prime = chunking(&[12_500_003], 4, &whole(&[12_500_003]), INNER);
        assert_eq!(prime, Chunking { chunk: vec![1 << 20], inner: vec![1 << 20] });
        assert_eq!(chunking(&[], 4, &whole(&[]), INNER), Chunking { chunk: vec![], inner: vec![] });
        assert_eq!(chunking(&[0, 3], 4, &whole(&[0, 3]), INNER).chunk, [1, 3]);
    }

    #[test]
    fn huge_extents_are_divided_in_bounded_time() {
        // A prime, and a number of two large prime factors: trial division would not end.
        for extent in [1_000_000_000_000_000_003, 1_000_000_007 * 1_000_000_009] {
            for shape in [vec![extent, 0], vec![0, extent], vec![extent], vec![extent, 1, 0, extent]] {
                let regions = if shape.contains(&0) { Vec::new() } else { whole(&shape) };
                for divide in [INNER, Divide::default(), Divide { chunk_bytes: Some(100), inner: true }] {
                    let made = chunking(&shape, 4, &regions, divide);
                    assert!(made.chunk.iter().zip(&made.inner).all(|(chunk, inner)| chunk.is_multiple_of(*inner)));
                    assert!(!shape.contains(&0) || bytes(&made.chunk, 4) <= INNER_CHUNK_BYTES, "{shape:?}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn inner_chunks_divide_chunks_and_stay_in_bounds(
            shape in prop::collection::vec(1u64..3000, 0..4),
            element in prop::sample::select(vec![1u64, 2, 4, 8, 16]),
            limit in prop::option::of(1u64..1 << 24),
            inner in any::<bool>(),
        ) {
            let made = chunking(&shape, element, &whole(&shape), Divide { chunk_bytes: limit, inner });
            for ((inner, chunk), extent) in made.inner.iter().zip(&made.chunk).zip(&shape) {
                prop_assert!(*inner >= 1 && chunk.is_multiple_of(*inner) && chunk <= extent);
            }
            if !inner {
                prop_assert_eq!(&made.inner, &made.chunk);
                // A limit is kept to: in the worst case by chunks of one element.
                let limit = limit.unwrap_or(u64::MAX).max(element);
                prop_assert!(bytes(&made.chunk, element) <= limit);
            }
            if bytes(&made.inner, element) < bytes(&made.chunk, element) {
                prop_assert!(bytes(&made.inner, element) >= CHUNK_PIECE_BYTES_MIN.min(bytes(&made.chunk, element)));
            }
        }
    }
}
