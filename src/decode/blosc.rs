//! blosc (version 1) containers.
//!
//! Source: c-blosc, `README_CHUNK_FORMAT.rst` and `blosc/blosc.c`. A container is a header, the offsets of its blocks and
//! the blocks; all numbers are little-endian:
//!
//! | bytes | field |
//! |---|---|
//! | 1 | format version, 2 |
//! | 1 | format version of the inner codec, 1 |
//! | 1 | flags: bit 0 byte shuffle, 1 stored plain, 2 bit shuffle, 4 blocks are not split, 7-5 inner codec |
//! | 1 | element size |
//! | 4 | decoded length |
//! | 4 | block size: every block decodes to as many bytes, the last one may be shorter |
//! | 4 | encoded length, this header included |
//! | 4 a block | offset of the block from the start of the container |
//!
//! A block is one stream, or one stream a byte of the element if it was split: a u32 length, then that many bytes, which
//! are plain when they are as many as they decode to. A container that is stored plain has no offsets.

use super::shuffle::{unshuffle, unshuffle_bits};
use super::{DecodeError, DecodedLen, Decoder, Limits, Step, blosclz, gzip, zstd};

/// Gathers a container, then decodes it block by block.
pub(super) struct Blosc {
    limits: Limits,
    container: Vec<u8>,
    header: Option<Header>,
    /// The next block to decode.
    next: usize,
    /// The last block decoded, where the output had no room for all of it, and how much of it was given.
    block: Vec<u8>,
    given: usize,
    scratch: Vec<u8>,
}

impl Blosc {
    pub(super) const fn new(limits: Limits) -> Self {
        Self { limits, container: Vec::new(), header: None, next: 0, block: Vec::new(), given: 0, scratch: Vec::new() }
    }

    /// Takes input until the container is complete. Returns how much was taken and the header once that is so.
    fn gather(&mut self, input: &[u8]) -> Result<(usize, Option<Header>), DecodeError> {
        let mut read = 0;
        loop {
            let wanted = match self.header {
                None => HEADER_BYTES,
                Some(header) => header.encoded_len,
            };
            let missing = wanted.saturating_sub(self.container.len());
            let piece = input.get(read..).unwrap_or_default();
            let piece = piece.get(..missing).unwrap_or(piece);
            self.container.extend_from_slice(piece);
            read += piece.len();
            if piece.len() < missing || self.header.is_some() {
                return Ok((read, self.header.filter(|_| piece.len() == missing)));
            }
            let header = Header::parse(&self.container)?;
            self.limits.decoded.check(header.decoded_len as u64)?;
            if header.encoded_len as u64 > self.limits.encoded {
                return Err(DecodeError::Truncated { codec: CODEC });
            }
            self.container.reserve_exact(header.encoded_len.saturating_sub(self.container.len()));
            self.header = Some(header);
        }
    }
}

impl Decoder for Blosc {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let (read, header) = self.gather(input)?;
        let Some(header) = header else {
            return Ok(Step { read, written: 0 });
        };
        if read < input.len() {
            return Err(damaged("bytes behind its end"));
        }
        let mut written = 0;
        loop {
            let held = self.block.get(self.given..).unwrap_or_default();
            let room = output.get_mut(written..).unwrap_or_default();
            let count = held.len().min(room.len());
            room.iter_mut().zip(held).for_each(|(target, source)| *target = *source);
            self.given += count;
            written += count;
            let block_len = header.block_len(self.next);
            if self.given < self.block.len() || block_len == 0 || written == output.len() {
                return Ok(Step { read, written });
            }
            match output.get_mut(written..).and_then(|room| room.get_mut(..block_len)) {
                Some(target) => {
                    header.decode_block(&self.container, self.next, target, &mut self.scratch)?;
                    self.block.clear();
                    written += block_len;
                }
                None => {
                    self.block.resize(block_len, 0);
                    header.decode_block(&self.container, self.next, &mut self.block, &mut self.scratch)?;
                }
            }
            self.given = 0;
            self.next += 1;
        }
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        match self.header {
            Some(header) if self.container.len() == header.encoded_len => Ok(()),
            _ => Err(DecodeError::Truncated { codec: CODEC }),
        }
    }
}

/// Decodes a whole container straight into the whole of `out`. Holds one block where it is shuffled.
pub(super) fn decode_into(encoded: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let header = Header::parse(encoded)?;
    DecodedLen::Exactly(out.len() as u64).check(header.decoded_len as u64)?;
    match encoded.len() {
        len if len < header.encoded_len => return Err(DecodeError::Truncated { codec: CODEC }),
        len if len > header.encoded_len => return Err(damaged("bytes behind its end")),
        _ => {}
    }
    let mut scratch = Vec::new();
    let blocks = out.chunks_mut(header.block_size.max(1));
    blocks.enumerate().try_for_each(|(index, block)| header.decode_block(encoded, index, block, &mut scratch))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    filter: Filter,
    plain: bool,
    split: bool,
    inner: Inner,
    element_size: usize,
    decoded_len: usize,
    block_size: usize,
    encoded_len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filter {
    None,
    Bytes,
    Bits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inner {
    BloscLz,
    Lz4,
    Snappy,
    Zlib,
    Zstd,
}

impl Header {
    /// Reads the header from the front of a container.
    fn parse(container: &[u8]) -> Result<Self, DecodeError> {
        let header = container.first_chunk::<HEADER_BYTES>().ok_or(DecodeError::Truncated { codec: CODEC })?;
        let [version, inner_version, flags, element_size, sizes @ ..] = *header;
        if version != VERSION {
            return Err(unsupported(format!("format version {version}")));
        }
        if flags & 0b1000 != 0 {
            return Err(unsupported("a reserved flag".to_owned()));
        }
        let inner = match flags >> 5 {
            0 => Inner::BloscLz,
            1 => Inner::Lz4,
            2 => Inner::Snappy,
            3 => Inner::Zlib,
            4 => Inner::Zstd,
            other => return Err(unsupported(format!("inner codec {other}"))),
        };
        let plain = flags & 0b10 != 0;
        if inner_version != INNER_VERSION && !plain {
            return Err(unsupported(format!("version {inner_version} of its inner codec")));
        }
        let [decoded_len, block_size, encoded_len] = [0, 4, 8].map(|at| u32_at(&sizes, at).unwrap_or_default());
        let filter = match (flags & 1 != 0, flags & 0b100 != 0) {
            (true, _) => Filter::Bytes,
            (false, true) => Filter::Bits,
            (false, false) => Filter::None,
        };
        let (split, element_size) = (flags & 0b1_0000 == 0, usize::from(element_size));
        let header = Self { filter, plain, split, inner, element_size, decoded_len, block_size, encoded_len };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), DecodeError> {
        let [decoded_len, block_size, encoded_len] = [self.decoded_len, self.block_size, self.encoded_len];
        if self.element_size == 0 {
            return Err(damaged("its element size is 0"));
        }
        if decoded_len > 0 && (block_size == 0 || block_size > decoded_len) {
            return Err(damaged(&format!("blocks of {block_size} bytes in {decoded_len}")));
        }
        let blocks = if self.plain { decoded_len } else { self.block_count().saturating_mul(4) };
        if encoded_len < HEADER_BYTES.saturating_add(blocks) {
            return Err(damaged(&format!("{encoded_len} bytes cannot hold its blocks")));
        }
        if self.plain && encoded_len != HEADER_BYTES + decoded_len {
            return Err(damaged(&format!("{decoded_len} plain bytes in {encoded_len}")));
        }
        Ok(())
    }

    fn block_count(&self) -> usize {
        if self.decoded_len == 0 { 0 } else { self.decoded_len.div_ceil(self.block_size.max(1)) }
    }

    /// Bytes that a block decodes to; 0 behind the last one.
    fn block_len(&self, index: usize) -> usize {
        let before = index.saturating_mul(self.block_size).min(self.decoded_len);
        (self.decoded_len - before).min(self.block_size)
    }

    /// Decodes a block of a complete container into `target`, which has the length of that block.
    fn decode_block(
        &self,
        container: &[u8],
        index: usize,
        target: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        if self.plain {
            let start = HEADER_BYTES.saturating_add(index.saturating_mul(self.block_size));
            let plain = container.get(start..).and_then(|rest| rest.get(..target.len())).ok_or(CUT)?;
            target.copy_from_slice(plain);
            return Ok(());
        }
        let shuffled = match self.filter {
            Filter::None => false,
            Filter::Bytes => self.element_size > 1,
            Filter::Bits => target.len() >= self.element_size,
        };
        if !shuffled {
            return self.decode_streams(container, index, target);
        }
        scratch.resize(target.len(), 0);
        self.decode_streams(container, index, scratch)?;
        match self.filter {
            Filter::Bits => unshuffle_bits(self.element_size, scratch, target),
            _ => unshuffle(self.element_size, scratch, target),
        }
        Ok(())
    }

    /// Decodes the streams of a block, without undoing its filter.
    fn decode_streams(&self, container: &[u8], index: usize, target: &mut [u8]) -> Result<(), DecodeError> {
        let offset = u32_at(container, HEADER_BYTES.saturating_add(index.saturating_mul(4))).ok_or(CUT)?;
        let mut rest = container.get(offset..).ok_or(CUT)?;
        let streams = if self.is_split(target.len()) { self.element_size } else { 1 };
        if !target.len().is_multiple_of(streams) {
            return Err(damaged(&format!("a block of {} bytes in {streams} streams", target.len())));
        }
        for part in target.chunks_mut((target.len() / streams).max(1)) {
            let (len, behind) = rest.split_first_chunk::<4>().ok_or(CUT)?;
            let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| CUT)?;
            let (stream, behind) = behind.split_at_checked(len).ok_or(CUT)?;
            rest = behind;
            if stream.len() == part.len() {
                part.copy_from_slice(stream);
            } else if self.inner.decode_into(stream, part)? != part.len() {
                return Err(damaged("a block is shorter than the header says"));
            }
        }
        Ok(())
    }

    /// Whether a block of this length has one stream a byte of the element. The header's flag says so, within the bounds
    /// by which older writers, which knew no flag, decided. The shorter last block is never split.
    fn is_split(&self, block_len: usize) -> bool {
        self.split
            && block_len == self.block_size
            && self.element_size <= SPLITS_MAX
            && self.block_size / self.element_size.max(1) >= SPLIT_BYTES_MIN
    }
}

impl Inner {
    /// Decodes one stream into the front of `target` and says how many bytes that made.
    fn decode_into(self, stream: &[u8], target: &mut [u8]) -> Result<usize, DecodeError> {
        match self {
            Self::BloscLz => blosclz::decode_into(stream, target).ok_or_else(|| damaged("a blosclz stream")),
            Self::Lz4 => lz4_flex::block::decompress_into(stream, target).map_err(|error| damaged(&error.to_string())),
            Self::Snappy => {
                snap::raw::Decoder::new().decompress(stream, target).map_err(|error| damaged(&error.to_string()))
            }
            Self::Zlib => gzip::decode_inner(stream, target),
            Self::Zstd => zstd::decode_inner(stream, target),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let number = bytes.get(at..)?.first_chunk::<4>()?;
    usize::try_from(u32::from_le_bytes(*number)).ok()
}

fn damaged(what: &str) -> DecodeError {
    DecodeError::Corrupt { codec: CODEC, what: what.to_owned() }
}

fn unsupported(what: String) -> DecodeError {
    DecodeError::Unsupported { codec: CODEC, what }
}

const CODEC: &str = "blosc";

/// Something reaches beyond the container.
const CUT: DecodeError = DecodeError::Truncated { codec: CODEC };

const VERSION: u8 = 2;

const INNER_VERSION: u8 = 1;

const HEADER_BYTES: usize = 16;

/// c-blosc's `MAX_SPLITS`: larger elements are never split.
const SPLITS_MAX: usize = 16;

/// c-blosc's `MIN_BUFFERSIZE`: shorter streams are never split.
const SPLIT_BYTES_MIN: usize = 128;
