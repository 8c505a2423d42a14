//! A large frame by several threads: its literals group by group of blocks, then what is repeated, from the front.
//!
//! Blocks are independent but for trees (a block may use that of one before, so a group begins with reading that), for
//! what sequences repeat (which is done when all literals are decoded) and for the checksum (which is added up last).

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::blocks::{Coded, Literals};
use super::checksum::Checksum;
use super::lanes::{Kernel, Lanes};
use super::{Frame, Placed, Placing};
use crate::limits::HUFFMAN_SHARED_SEQUENCES_MAX;

/// Blocks, the part of the output that they make, and where in the output it begins.
struct Group<'a, 'o> {
    /// What has the tree that its first block may use.
    tree: Option<Coded>,
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

/// Groups of blocks of at least so many bytes.
fn divided<'a, 'o>(blocks: &'a [Placed<'a>], group_bytes: usize, out: &'o mut [u8]) -> Option<Vec<Group<'a, 'o>>> {
    let (mut groups, mut rest, mut first, mut from, mut tree) = (Vec::new(), out, 0, 0, None);
    let mut last_tree = None;
    for (number, Placed { start, literals, .. }) in blocks.iter().enumerate() {
        if start - from >= group_bytes {
            let (out, behind) = rest.split_at_mut_checked(start - from)?;
            groups.push(Group { tree, blocks: blocks.get(first..number)?, start: from, out });
            (rest, first, from, tree) = (behind, number, *start, last_tree);
        }
        if let Literals::Huffman(coded) = literals
            && coded.has_tree
        {
            last_tree = Some(*coded);
        }
    }
    groups.push(Group { tree, blocks: blocks.get(first..)?, start: from, out: rest });
    Some(groups)
}

/// Decodes the literals of a group to the ends of their blocks.
///
/// Who waits for others runs other work of the pool meanwhile, on top of its own stack: which must not hold the lanes' buffers.
#[inline(never)]
fn literals(kernel: Kernel, frame: Frame<'_>, group: Group<'_, '_>) -> Option<()> {
    let mut lanes = Lanes::new(kernel, frame.bytes, false);
    if let Some(tree) = group.tree {
        lanes.read_tree(tree)?;
    }
    for Placed { literals, at, .. } in group.blocks {
        lanes.take(*literals, at.checked_sub(group.start)?, group.out)?;
    }
    lanes.finish(group.out).map(|_| ())
}
