//! Arrays of very many chunks: what is stored is listed, and what is not becomes a few large boxes of fill values.
//!
//! A few hundred bytes of metadata may claim millions of chunks of which none exists. Looking each one up, and remembering it,
//! would cost memory and time that only the claim justifies; what exists is bounded by what is on disk.

use super::{StoredArray, Values};
use crate::error::{Error, Result};
use crate::need::{Answer, Asker, DirEntry, EntryKind, Need, unfit};
use crate::relpath::RelPath;
use crate::shape::{Region, element_count};
use crate::zarr::{ChunkKeys, Grid};

/// A block of grid positions: the first and one past the last, a pair a dimension.
pub(super) type Block = (Vec<u64>, Vec<u64>);

/// The positions of the chunks of an array that are stored, in C order.
///
/// # Errors
/// A directory that cannot be listed.
pub async fn stored_positions(ask: &Asker, stored: &StoredArray) -> Result<Vec<Vec<u64>>> {
    match stored.meta.grid.block(&Region::whole(&stored.meta.shape)) {
        Some(block) => positions_in(ask, stored, &[block]).await,
        None => Ok(Vec::new()),
    }
}

/// The positions of the chunks of an array that are stored and lie in one of the blocks, in C order.
pub(super) async fn positions_in(ask: &Asker, stored: &StoredArray, blocks: &[Block]) -> Result<Vec<Vec<u64>>> {
    let (rank, keys) = (stored.meta.shape.len(), stored.meta.keys);
    let mut positions: Vec<Vec<u64>> = match &stored.values {
        Values::Keys { index, prefix } => {
            let below = index.with_prefix(prefix).iter().map(|(key, _)| &key[prefix.len()..]);
            below.filter_map(|key| keys.position(std::str::from_utf8(key).ok()?, rank)).collect()
        }
        Values::Directory(dir) => listed(ask, dir, stored, blocks).await?,
        Values::Extent { .. } => vec![vec![0; rank]],
    };
    positions.retain(|position| blocks.iter().any(|block| inside(block, position)));
    positions.sort_unstable();
    positions.dedup();
    Ok(positions)
}

/// The positions in these blocks whose chunks were files when the array was sealed.
pub(super) fn sealed_positions<'a>(stored: &'a StoredArray, blocks: &'a [Block]) -> impl Iterator<Item = Vec<u64>> {
    let (rank, keys) = (stored.meta.shape.len(), stored.meta.keys);
    let dir = match &stored.values {
        Values::Directory(dir) => Some(dir),
        Values::Keys { .. } | Values::Extent { .. } => None,
    };
    let files = stored.sums.iter().zip(dir).flat_map(|(sums, dir)| sums.below(dir));
    let positions = files.filter_map(move |file| keys.position(std::str::from_utf8(file).ok()?, rank));
    positions.filter(|position| blocks.iter().any(|block| inside(block, position)))
}

/// The positions of an array's chunks that are files.
async fn listed(ask: &Asker, dir: &RelPath, stored: &StoredArray, blocks: &[Block]) -> Result<Vec<Vec<u64>>> {
    let (rank, keys) = (stored.meta.shape.len(), stored.meta.keys);
    let named = |bad| Error::from(bad).at("array", &stored.name);
    let nested = match keys {
        ChunkKeys::Default { separator: '/' } => Some(dir.join("c").map_err(named)?),
        ChunkKeys::V2 { separator: '/' } => Some(dir.clone()),
        ChunkKeys::Default { .. } | ChunkKeys::V2 { .. } => None,
    };
    let Some(top) = nested else {
        let entries = list(ask, std::slice::from_ref(dir)).await?;
        return Ok(entries.iter().flatten().filter_map(|entry| keys.position(&entry.name, rank)).collect());
    };
    if rank == 0 {
        return Ok(vec![Vec::new()]);
    }
    // One level of directories a dimension; only numbers that some block has are followed.
    let mut found: Vec<(Vec<u64>, RelPath)> = vec![(Vec::new(), top)];
    for dim in 0..rank {
        let dirs: Vec<RelPath> = found.iter().map(|(_, dir)| dir.clone()).collect();
        let entries = list(ask, &dirs).await?;
        let mut below = Vec::new();
        for ((position, dir), entries) in found.into_iter().zip(entries) {
            for entry in entries {
                let Some(index) = canonical(&entry.name) else { continue };
                let wanted = blocks.iter().any(|(first, end)| (first[dim]..end[dim]).contains(&index));
                if wanted && (dim + 1 == rank || entry.kind == EntryKind::Dir) {
                    let path = dir.join(&entry.name).map_err(named)?;
                    below.push(([&position[..], &[index]].concat(), path));
                }
            }
        }
        found = below;
    }
    Ok(found.into_iter().map(|(position, _)| position).collect())
}

/// The entries of directories; none of one that is not there.
async fn list(ask: &Asker, dirs: &[RelPath]) -> Result<Vec<Vec<DirEntry>>> {
    let answers = ask.ask(dirs.iter().map(|path| Need::List { path: path.clone() }).collect()).await?;
    let entries = answers.into_iter().map(|answer| match answer {
        Answer::Listing(entries) => Ok(entries),
        Answer::Missing => Ok(Vec::new()),
        other => Err(unfit(Some(&other))),
    });
    entries.collect()
}

/// A number in decimal, without leading zeros.
fn canonical(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// Whether a position lies in a block.
pub(super) fn inside((first, end): &Block, position: &[u64]) -> bool {
    position.iter().zip(first.iter().zip(end)).all(|(at, (first, end))| (first..end).contains(&at))
}

/// The positions of a block that are not among these (sorted ones), as boxes: at most two a dimension for each gap. `None` if the
/// block has more positions than 64 bits count.
pub(super) fn absent((first, end): &Block, present: &[Vec<u64>]) -> Option<Vec<Block>> {
    let extent: Vec<u64> = first.iter().zip(end).map(|(first, end)| end - first).collect();
    let count = element_count(&extent)?;
    let number = |position: &[u64]| -> Option<u64> {
        let relative: Vec<u64> = position.iter().zip(first).map(|(at, first)| at - first).collect();
        Grid::index(&relative, &extent)
    };
    let mut boxes = Vec::new();
    let mut next = 0;
    let inside = present.iter().filter(|position| inside(&(first.clone(), end.clone()), position));
    for at in inside.filter_map(|position| number(position)).chain([count]) {
        runs(next, at, &extent, &mut |start, size| {
            let start: Vec<u64> = start.iter().zip(first).map(|(at, first)| at + first).collect();
            let stop = start.iter().zip(&size).map(|(at, size)| at + size).collect();
            boxes.push((start, stop));
        });
        next = at + 1;
    }
    Some(boxes)
}

/// Cuts the C-order numbers `[from, to)` of a block into boxes: start and extent.
fn runs(mut from: u64, to: u64, extent: &[u64], emit: &mut impl FnMut(Vec<u64>, Vec<u64>)) {
    let strides = crate::shape::strides(extent);
    while from < to {
        let mut start = Vec::with_capacity(extent.len());
        let mut rest = from;
        for stride in &strides {
            start.push(rest / stride);
            rest %= stride;
        }
        // The outermost dimension at which whole slices from here on fit.
        let fits = |dim: usize| start[dim + 1..].iter().all(|at| *at == 0) && strides[dim] <= to - from;
        let Some(dim) = (0..extent.len()).find(|dim| fits(*dim)) else { return };
        let count = ((to - from) / strides[dim]).min(extent[dim] - start[dim]);
        let mut size = vec![1; extent.len()];
        size[dim] = count;
        size[dim + 1..].copy_from_slice(&extent[dim + 1..]);
        emit(start, size);
        from += count * strides[dim];
    }
}

/// The elements of a block of chunks.
pub(super) fn elements(grid: &Grid, (first, end): &Block) -> Option<Region> {
    let low = grid.region(first)?;
    let last: Vec<u64> = end.iter().map(|end| end.saturating_sub(1)).collect();
    let high = grid.region(&last)?;
    let extent = (0..low.rank()).map(|dim| high.end(dim) - low.start[dim]).collect();
    Some(Region { start: low.start, extent })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_absent_is_covered_once_by_few_boxes(
            dims in prop::collection::vec((0u64..5, 1u64..7), 1..4),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let first: Vec<u64> = dims.iter().map(|(first, _)| *first).collect();
            let end: Vec<u64> = dims.iter().map(|(first, extent)| first + extent).collect();
            let mut all = vec![vec![]];
            for (first, end) in first.iter().zip(&end) {
                all = all.into_iter().flat_map(|at: Vec<u64>| (*first..*end).map(move |i| [&at[..], &[i]].concat())).collect();
            }
            let mut present: Vec<Vec<u64>> = picks.iter().map(|pick| all[pick.index(all.len())].clone()).collect();
            present.sort_unstable();
            present.dedup();
            let boxes = absent(&(first, end), &present).unwrap();
            prop_assert!(boxes.len() <= (present.len() + 1) * (2 * dims.len() - 1));
            for position in &all {
                let times = boxes.iter().filter(|block| inside(block, position)).count();
                prop_assert_eq!(times, usize::from(!present.contains(position)), "{:?}", position);
            }
        }
    }
}
