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
#[cfg(target_arch = "x86_64")]
mod kernel;
mod lanes;
mod sequences;
mod tree;
#[cfg(test)]
mod twin;

use blocks::{Block, Blocks, Literals};
use lanes::{Kernel, Lanes};
use sequences::Sequences;

use crate::limits::HUFFMAN_BLOCK_BYTES_MIN;

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

/// Decodes a frame into the whole of `out`, on this thread, if this processor and the frame are of the kind that is
/// decoded faster so. Returns `None` if not, and of damaged frames; `out` then holds unspecified bytes.
pub(super) fn decode(frame: Frame<'_>, out: &mut [u8]) -> Option<()> {
    decode_with(Kernel::detect()?, HUFFMAN_BLOCK_BYTES_MIN, frame, out)
}

/// The same with a kernel, for frames whose Huffman-coded blocks have at least so many bytes on average.
fn decode_with(kernel: Kernel, block_bytes_min: usize, frame: Frame<'_>, out: &mut [u8]) -> Option<()> {
    let end = Blocks::new(frame).survey(out.len(), block_bytes_min)?;
    let stored_checksum = match frame.bytes.get(end..)? {
        [] if !frame.has_checksum => None,
        stored if frame.has_checksum => Some(u32::from_le_bytes(stored.try_into().ok()?)),
        _ => return None,
    };
    let mut written = 0;
    let mut lanes = Lanes::new(kernel, frame.bytes, frame.has_checksum);
    let mut sequences = Sequences::new();
    for block in Blocks::new(frame) {
        let Block { literals, sequence_count, sequences: section } = block?;
        let start = written;
        let assembly = match sequence_count {
            0 => None,
            count => Some(sequences.read(section, count, literals.len(), start)?),
        };
        // The literals of a block stand at its end, with room in front for what is repeated.
        let at = assembly.as_ref().map_or(start, |assembly| assembly.literals);
        written = at + literals.len();
        if written > out.len() || written - start > frame.block_max {
            return None;
        }
        if let Some(assembly) = assembly {
            lanes.expect(assembly, out)?;
        }
        match literals {
            Literals::Raw { bytes } => out.get_mut(at..written)?.copy_from_slice(bytes),
            Literals::Rle { byte, .. } => out.get_mut(at..written)?.fill(byte),
            Literals::Huffman(coded) => lanes.put(coded, at, out)?,
        }
    }
    (written == out.len() && lanes.finish(out)? == stored_checksum).then_some(())
}

#[cfg(test)]
mod tests;
