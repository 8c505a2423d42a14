//! zstd frames of nearly nothing but literals, faster than libzstd.
//!
//! Weights hardly repeat, so zstd finds next to no matches in them: their frames are blocks of up to 128 KiB of Huffman-coded
//! literals, at levels that search longer with a short match here and there (`sequences`). libzstd decodes such a block as four
//! bit streams side by side, which is limited by latency: shift, look up, shift, seven cycles until a stream's next symbol is
//! known, with four streams to fill them. Here **two blocks** are decoded at a time, eight streams, one symbol of each, then the
//! next of each:
//!
//! ```text
//!   frame   [header][block: tree, s0 s1 s2 s3][block: tree, s4 s5 s6 s7][block ..
//!                         |  |  |  |                |  |  |  |     eight 64-bit registers of bits, read from the
//!                         v  v  v  v                v  v  v  v     end of each stream towards its start
//!   staging  row 0        .  .  .  .                .  .  .  .     eight bytes a row: all stores of a row meet in one
//!            row 1        .  .  .  .                .  .  .  .     cache line, where eight outputs 32 KiB apart would
//!            ..                                                    meet in one set of the cache
//!   output   [s0][s1][s2][s3][s4][s5][s6][s7]                      2,560 rows at a time, transposed
//! ```
//!
//! A refill gives a stream at least 56 bits, enough for five codes of at most 11; a bit below them marks the end, so that
//! counting trailing zeros says how many were used. Tables have 2,048 entries of symbol and length.
//!
//! **libzstd stays the reference.** [`decode`] says `None` of every frame that it does not want (many matches, small blocks, codes
//! of 12 bits) and of every frame in which it finds anything wrong; the caller then gives the whole frame to libzstd, whose
//! result and whose error count. So this code may refuse what is fine, but must not accept what libzstd refuses, nor decode
//! it to other bytes; the tests compare both on damaged frames.
//!
//! # Why hostile bytes do no harm
//!
//! All of it but one load is checked by the language. That load, in `kernel`, reads eight bytes of the frame without a check,
//! because checks there cost a sixth to a third of the speed. It stays inside the frame, whatever positions and tables say, since
//!
//! 1. each stream's position is compared with the frame's ends when the kernel is called;
//! 2. one iteration moves it towards the front by at most eight bytes: the number of trailing zeros of 64 bits, in bytes;
//! 3. the iterations of a call are at most the eighth part of the bytes in front of each stream's position.
//!
//! A damaged stream may so run into its neighbours, and decodes garbage there, but never leaves the frame; positions are
//! compared with the streams' starts after each call, and a stream must end exactly at its start. What a block writes lies in
//! the range that its header and its sequences say, which is compared with the output's length before anything of it is decoded.
//!
//! | file | |
//! |---|---|
//! | `blocks` | frame to blocks: kinds, sizes, where streams lie |
//! | `fse` | finite-state entropy, which trees and sequences are described in |
//! | `tree` | the description of a Huffman tree to weights to a table |
//! | `sequences` | what is repeated between the literals |
//! | `lanes` | two blocks in flight, a chunk of rows at a time |
//! | `groups` | a large frame by several threads |
//! | `checksum` | XXH64 |
//! | `kernel` | the loop, and the way out of the staging (x86-64) |
//! | `twin` | the same in safe code that does one stream after the other: what the tests compare the kernel with |
//!
//! The loop's stores must be seen as possibly changing the tables (hence the `Cell`s): otherwise LLVM gathers the symbols of a
//! row in a vector register, which takes three times as long. `cargo bench --bench stages -- decoders` shows it at once.
//!
//! What limits: 8 streams of 7 cycles a symbol are 0.9 cycles, two shifts a symbol and two a refill on two ports 1.2; 1.5 are
//! measured (Zen 4). Tried without gain: more symbols a refill where codes are short, tables of two symbols, prefetching,
//! transposing by AVX2 or by way of a buffer; 16-byte stores past the cache lose a sixth.
//!
//! Must not know: codec chains, who wants the bytes.

mod blocks;
mod checksum;
mod fse;
mod groups;
#[cfg(target_arch = "x86_64")]
mod kernel;
mod lanes;
mod sequences;
mod tree;
#[cfg(test)]
mod twin;

use blocks::{Block, Blocks, Literals};
use lanes::{Kernel, Lanes};
use sequences::{Assembly, Sequences};

use crate::limits::{HUFFMAN_BLOCK_BYTES_MIN, HUFFMAN_SHARED_BYTES_MIN};

/// A frame whose header was read and found acceptable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame<'a> {
    /// The frame, from its magic number to its last byte.
    pub(super) bytes: &'a [u8],
    pub(super) header_len: usize,
    /// Most bytes that one of its blocks may have, encoded or decoded.
    pub(super) block_max: usize,
    /// Whether a checksum of the content follows the last block.
    pub(super) has_checksum: bool,
}

/// Decodes a frame into the whole of `out`, if this processor and the frame are of the kind that is decoded faster so: on this
/// thread, or a large frame with the help of others if this is a thread of a pool. Returns `None` if not, and of damaged frames;
/// `out` then holds unspecified bytes.
pub(super) fn decode(frame: Frame<'_>, out: &mut [u8]) -> Option<()> {
    let has_help = rayon::current_thread_index().is_some() && rayon::current_num_threads() > 1;
    let group_bytes = if has_help && out.len() >= HUFFMAN_SHARED_BYTES_MIN { GROUP_BYTES } else { usize::MAX };
    decode_with(Kernel::detect()?, HUFFMAN_BLOCK_BYTES_MIN, group_bytes, frame, out)
}

/// The same with a kernel, for frames whose Huffman-coded blocks have at least so many bytes on average, in groups of blocks of at
/// least so many bytes.
fn decode_with(
    kernel: Kernel,
    block_bytes_min: usize,
    group_bytes: usize,
    frame: Frame<'_>,
    out: &mut [u8],
) -> Option<()> {
    let end = Blocks::new(frame).survey(out.len(), block_bytes_min)?;
    let stored_checksum = match frame.bytes.get(end..)? {
        [] if !frame.has_checksum => None,
        stored if frame.has_checksum => Some(u32::from_le_bytes(stored.try_into().ok()?)),
        _ => return None,
    };
    let found = match out.len() > group_bytes {
        true => groups::decode(kernel, group_bytes, frame, out)?,
        false => in_order(kernel, frame, out)?,
    };
    (found == stored_checksum).then_some(())
}

/// Decodes block after block; the checksum of the output, if the frame has one.
fn in_order(kernel: Kernel, frame: Frame<'_>, out: &mut [u8]) -> Option<Option<u32>> {
    let mut lanes = Lanes::new(kernel, frame.bytes, frame.has_checksum);
    for placed in Placing::new(frame, out.len()) {
        let Placed { literals, at, assembly, .. } = placed?;
        if let Some(assembly) = assembly {
            lanes.expect(assembly, out)?;
        }
        lanes.take(literals, at, out)?;
    }
    lanes.finish(out)
}

/// A block, and where in the output it belongs.
struct Placed<'a> {
    start: usize,
    literals: Literals<'a>,
    /// Where its literals are decoded to: its end, with room in front for what is repeated.
    at: usize,
    assembly: Option<Assembly>,
}

/// Where the blocks of a frame belong, in order; an item is `None`, and the last one, where a block is damaged or they do not make
/// the output.
struct Placing<'a> {
    blocks: Blocks<'a>,
    block_max: usize,
    sequences: Sequences,
    written: usize,
    out_len: usize,
    ended: bool,
}

impl<'a> Placing<'a> {
    fn new(frame: Frame<'a>, out_len: usize) -> Self {
        let (blocks, sequences) = (Blocks::new(frame), Sequences::new());
        Self { blocks, block_max: frame.block_max, sequences, written: 0, out_len, ended: false }
    }

    fn place(&mut self, block: Block<'a>) -> Option<Placed<'a>> {
        let Block { literals, sequence_count, sequences } = block;
        let start = self.written;
        let assembly = match sequence_count {
            0 => None,
            count => Some(self.sequences.read(sequences, count, literals.len(), start)?),
        };
        let at = assembly.as_ref().map_or(start, |assembly| assembly.literals);
        self.written = at + literals.len();
        let fits = self.written <= self.out_len && self.written - start <= self.block_max;
        fits.then_some(Placed { start, literals, at, assembly })
    }
}

impl<'a> Iterator for Placing<'a> {
    type Item = Option<Placed<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let block = match self.blocks.next() {
            _ if self.ended => return None,
            None if self.written == self.out_len => return None,
            None | Some(None) => None,
            Some(Some(block)) => Some(block),
        };
        let placed = block.and_then(|block| self.place(block));
        self.ended = placed.is_none();
        Some(placed)
    }
}

/// Output of a group of blocks at least: what makes up for the tables and the buffer of its lanes.
const GROUP_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;
