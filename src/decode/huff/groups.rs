//! A large frame by several threads: its literals group by group of blocks, then what is repeated, from the front.
//!
//! Blocks are independent but for trees (a block may use that of one before, so a group begins with a block that has one), for
//! what sequences repeat (which is done when all literals are decoded) and for the checksum (which is added up last).

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::blocks::Literals;
use super::checksum::Checksum;
use super::lanes::{Kernel, Lanes};
use super::{Frame, Placed, Placing};
use crate::limits::HUFFMAN_SHARED_SEQUENCES_MAX;

/// Blocks, the part of the output that they make, and where in the output it begins.
struct Group<'a, 'o> {
    blocks: &'a [Placed<'a>],
    start: usize,
    out: &'o mut [u8],
}

/// Decodes a frame in groups of at least so many bytes; the checksum of the output, if the frame has one.
pub(super) fn decode(kernel: Kernel, group_bytes: usize, frame: Frame<'_>, out: &mut [u8]) -> Option<Option<u32>> {
    let (mut blocks, mut sequences) = (Vec::new(), 0);
    for placed in Placing::new(frame, out.len()) {
        let placed = placed?;
        sequences += placed.assembly.as_ref().map_or(0, |assembly| assembly.len());
        // They are all in memory until the literals are decoded.
        if sequences > HUFFMAN_SHARED_SEQUENCES_MAX {
            return super::in_order(kernel, frame, out);
        }
        blocks.push(placed);
    }
    let groups = divided(&blocks, group_bytes, out)?;
    groups.into_par_iter().map(|group| literals(kernel, frame, group)).collect::<Option<()>>()?;
    for Placed { assembly, .. } in blocks {
        if let Some(assembly) = assembly {
            assembly.run(out)?;
        }
    }
    if frame.has_checksum { Checksum::new().finish(out).map(Some) } else { Some(None) }
}

/// Groups of blocks, each of which begins with a tree of its own before one is needed.
fn divided<'a, 'o>(blocks: &'a [Placed<'a>], group_bytes: usize, out: &'o mut [u8]) -> Option<Vec<Group<'a, 'o>>> {
    let mut cuts = Vec::new();
    let (mut end, mut may_begin) = (out.len(), true);
    for (number, Placed { start, literals, .. }) in blocks.iter().enumerate().rev() {
        if let Literals::Huffman(coded) = literals {
            may_begin = coded.has_tree;
        }
        if number == 0 || (may_begin && end - start >= group_bytes && *start >= group_bytes) {
            cuts.push((number, *start));
            end = *start;
        }
    }
    let (mut groups, mut rest, mut last) = (Vec::with_capacity(cuts.len()), out, blocks.len());
    for (first, start) in cuts {
        let (front, out) = rest.split_at_mut_checked(start)?;
        groups.push(Group { blocks: blocks.get(first..last)?, start, out });
        (rest, last) = (front, first);
    }
    Some(groups)
}

/// Decodes the literals of a group to the ends of their blocks.
///
/// Who waits for others runs other work of the pool meanwhile, on top of its own stack: which must not hold the lanes' buffers.
#[inline(never)]
fn literals(kernel: Kernel, frame: Frame<'_>, group: Group<'_, '_>) -> Option<()> {
    let mut lanes = Lanes::new(kernel, frame.bytes, false);
    for Placed { literals, at, .. } in group.blocks {
        lanes.take(*literals, at.checked_sub(group.start)?, group.out)?;
    }
    lanes.finish(group.out).map(|_| ())
}
