//! A frame's blocks: their literals, and where their sequences stand.
//!
//! Source: RFC 8878, sections 3.1.1.2 (blocks), 3.1.1.3.1 (literals) and 3.1.1.3.2.1 (number of sequences).

use super::Frame;
use crate::limits::HUFFMAN_LITERALS_PER_SEQUENCE_MIN;

/// A block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a> {
    pub(super) literals: Literals<'a>,
    /// How many times something is repeated between the literals.
    pub(super) sequence_count: usize,
    /// What says so, behind the number; empty if there are none.
    pub(super) sequences: &'a [u8],
}

/// What the literals of a block decode to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Literals<'a> {
    /// These bytes.
    Raw { bytes: &'a [u8] },
    /// One byte, again and again.
    Rle { byte: u8, len: usize },
    /// What is Huffman-coded.
    Huffman(Coded),
}

/// Huffman-coded literals. Positions are those of bytes in the frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Coded {
    /// Bytes that they decode to.
    pub(super) len: usize,
    pub(super) has_tree: bool,
    /// Where the tree's description begins, or the streams if there is none.
    pub(super) start: usize,
    /// Where the streams end.
    pub(super) end: usize,
    /// Four streams behind a jump table, or one without.
    pub(super) four_streams: bool,
}

impl<'a> Literals<'a> {
    /// Bytes that they decode to.
    pub(super) const fn len(&self) -> usize {
        match self {
            Self::Raw { bytes } => bytes.len(),
            Self::Rle { len, .. } | Self::Huffman(Coded { len, .. }) => *len,
        }
    }

    /// A block of nothing else.
    const fn alone(self) -> Block<'a> {
        Block { literals: self, sequence_count: 0, sequences: &[] }
    }
}

/// Walks a frame's blocks; an item is `None`, and the last one, where a block is damaged.
#[derive(Clone, Debug)]
pub(super) struct Blocks<'a> {
    frame: &'a [u8],
    at: usize,
    block_max: usize,
    ended: bool,
}

impl<'a> Blocks<'a> {
    pub(super) const fn new(frame: Frame<'a>) -> Self {
        Self { frame: frame.bytes, at: frame.header_len, block_max: frame.block_max, ended: false }
    }

    /// Looks through all headers: whether the blocks are of the kind that is decoded faster here, with Huffman-coded ones of so
    /// many bytes on average and few sequences, and may make `decoded_len` bytes. Returns the position behind the last block.
    pub(super) fn survey(mut self, decoded_len: usize, block_bytes_min: usize) -> Option<usize> {
        let (mut len, mut coded, mut coded_blocks) = (0usize, 0usize, 0usize);
        for block in &mut self {
            let Block { literals, sequence_count, .. } = block?;
            len = len.checked_add(literals.len()).filter(|len| *len <= decoded_len)?;
            if sequence_count > literals.len() / HUFFMAN_LITERALS_PER_SEQUENCE_MIN {
                return None;
            }
            if let Literals::Huffman(literals) = literals {
                coded += literals.len;
                coded_blocks += 1;
            }
        }
        // A lone block has no partner, and small ones spend their time in tables and tails.
        (coded_blocks >= 2 && coded / coded_blocks >= block_bytes_min).then_some(self.at)
    }

    fn block(&mut self) -> Option<Block<'a>> {
        let header = little_endian(self.frame, self.at, BLOCK_HEADER_BYTES)?;
        let (is_last, kind, size) = (header & 1 == 1, header >> 1 & 3, header >> 3);
        let start = self.at + BLOCK_HEADER_BYTES;
        if size > self.block_max {
            return None;
        }
        let end = start + if kind == BLOCK_RLE { 1 } else { size };
        let body = self.frame.get(start..end)?;
        (self.at, self.ended) = (end, is_last);
        let block = match kind {
            BLOCK_RAW => Literals::Raw { bytes: body }.alone(),
            BLOCK_RLE => Literals::Rle { byte: *body.first()?, len: size }.alone(),
            BLOCK_COMPRESSED => compressed(body, start)?,
            _ => return None,
        };
        (block.literals.len() <= self.block_max).then_some(block)
    }
}

impl<'a> Iterator for Blocks<'a> {
    type Item = Option<Block<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let block = self.block();
        self.ended |= block.is_none();
        Some(block)
    }
}

/// A compressed block that lies at `start` in the frame: literals, and a section of sequences that begins with their number.
fn compressed(body: &[u8], start: usize) -> Option<Block<'_>> {
    let (literals, section) = literals(body, start)?;
    let (&first, rest) = section.split_first()?;
    let (sequence_count, sequences) = match (first, rest) {
        (0, []) => return Some(literals.alone()),
        (1..=127, rest) => (usize::from(first), rest),
        (128..=254, [low, rest @ ..]) => (usize::from(first - 128) << 8 | usize::from(*low), rest),
        (255, [low, high, rest @ ..]) => (usize::from(u16::from_le_bytes([*low, *high])) + MANY_SEQUENCES, rest),
        _ => return None,
    };
    (sequence_count > 0).then_some(Block { literals, sequence_count, sequences })
}

/// The literals of a compressed block, and what stands behind them.
///
/// | bits | field of the literals' header |
/// |---|---|
/// | 0-1 | raw, one byte repeated, Huffman-coded with a tree, with the tree of a block before |
/// | 2-3 | how long the sizes are, and of coded literals the number of streams |
/// | then | decoded size, and of coded literals the encoded size |
fn literals(body: &[u8], start: usize) -> Option<(Literals<'_>, &[u8])> {
    let first = usize::from(*body.first()?);
    let (kind, format) = (first & 3, first >> 2 & 3);
    if kind == LITERALS_RAW || kind == LITERALS_RLE {
        let (header_len, shift) = [(1, 3), (2, 4), (1, 3), (3, 4)][format];
        let len = little_endian(body, 0, header_len)? >> shift;
        let (bytes, rest) = body.get(header_len..)?.split_at_checked(if kind == LITERALS_RLE { 1 } else { len })?;
        return Some(match bytes.first() {
            Some(byte) if kind == LITERALS_RLE => (Literals::Rle { byte: *byte, len }, rest),
            _ => (Literals::Raw { bytes }, rest),
        });
    }
    let (header_len, size_bits) = [(3, 10), (3, 10), (4, 14), (5, 18)][format];
    let sizes = little_endian(body, 0, header_len)? >> 4;
    let (len, encoded_len) = (sizes & ((1 << size_bits) - 1), sizes >> size_bits);
    let end = header_len + encoded_len;
    let literals = Literals::Huffman(Coded {
        len,
        has_tree: kind == LITERALS_TREE,
        start: start + header_len,
        end: start + end,
        four_streams: format != 0,
    });
    Some((literals, body.get(end..)?))
}

/// The number that so many bytes, at most eight, from a position make.
fn little_endian(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    let field = bytes.get(at..at.checked_add(len)?)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
}

const BLOCK_HEADER_BYTES: usize = 3;

const BLOCK_RAW: usize = 0;

const BLOCK_RLE: usize = 1;

const BLOCK_COMPRESSED: usize = 2;

const LITERALS_RAW: usize = 0;

const LITERALS_RLE: usize = 1;

const LITERALS_TREE: usize = 2;

/// What a number of sequences in three bytes counts from.
const MANY_SEQUENCES: usize = 0x7f00;
