//! One array on its way to disk: its units, and how each is encoded.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::gather::Source;
use super::job::Progress;
use super::tree::NewPart;
use super::value_file::{ValueFile, page_start};
use crate::encode::{Checksums, Encoder};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{ALIGN_BYTES, SLOT_BYTES};
use crate::plan::Slabs;
use crate::relpath::RelPath;
use crate::shape::Region;
use crate::zarr::shard::encode_index;
use crate::zarr::{self, ChunkKeys, Compression, Endian, Format, Grid, Positions};

/// An array to write.
#[derive(Debug)]
pub(in crate::tree) struct ArrayJob {
    /// The name under which it is stored.
    pub(super) name: String,
    pub(super) source: Source,
    pub(in crate::tree) new: zarr::NewArray,
    pub(super) grid: Grid,
    pub(super) keys: ChunkKeys,
    /// The elements that it writes, in whole chunks: all of them, or some rows where an array is written piece by piece.
    pub(super) part: Region,
    /// Whether the array's metadata document is written already.
    pub(super) described: bool,
    /// Whether its small values may stand in the nodes of a database.
    pub(super) inline: bool,
    /// Lossy elements so far.
    pub(super) lossy: AtomicU64,
}

/// A unit: which chunk of which array, and which inner chunk of it.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    pub(super) array: usize,
    pub(super) chunk: Vec<u64>,
    pub(super) inner: usize,
    /// Inner chunks of its chunk; 1 for a unit that is a whole chunk.
    pub(super) of: usize,
    /// What it takes. One that is streamed is a whole chunk with all of its inner chunks.
    pub(super) cost: Cost,
}

/// What a unit takes of the memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Its encoder.
    pub(super) encoder: u64,
    /// Its elements, gathered and encoded.
    pub(super) work: u64,
    /// The most of it that the elements are encoded to; none if they are stored as they are, or piece by piece.
    pub(super) encoded: u64,
    /// Bytes of a piece, if its inner chunks are encoded piece by piece because they are too large to be in memory whole.
    pub(super) pieces: Option<u64>,
}

impl Cost {
    pub(super) const fn streamed(self) -> bool {
        self.pieces.is_some()
    }

    pub(super) fn total(self) -> u64 {
        self.encoder.saturating_add(self.work)
    }
}

/// All units, in order.
pub(super) struct Units<'a> {
    jobs: &'a [ArrayJob],
    budget: u64,
    array: usize,
    chunks: Option<Positions>,
    /// The chunk at hand and its next inner chunk.
    chunk: Option<(Vec<u64>, usize)>,
}

/// An encoded unit.
pub(super) enum Payload {
    /// Stored bytes in two pieces: the elements, and what follows them.
    Bytes(Body, Vec<u8>),
    /// No element of the array is in it.
    Absent,
    /// It has a file of its own already, of this length.
    File(RelPath, u64),
}

/// The elements of a unit as they are stored.
pub(super) enum Body {
    /// Not encoded; perhaps the caller's memory.
    Plain(Bytes),
    /// Encoded into a unit's buffer, from this byte on.
    Encoded(Vec<u8>, usize),
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Plain(bytes) => bytes,
            Self::Encoded(buffer, start) => &buffer[*start..],
        }
    }
}

impl Body {
    /// The buffer, for the next unit.
    pub(super) fn into_buffer(self) -> Vec<u8> {
        match self {
            Self::Plain(_) => Vec::new(),
            Self::Encoded(buffer, _) => buffer,
        }
    }
}

impl ArrayJob {
    /// The job of writing one part of the array, whose elements are these. The part ends where chunks or the array do.
    pub(in crate::tree) fn piece(&self, part: Region, data: Bytes, described: bool) -> Self {
        let parts = vec![NewPart::new(part.clone(), data)];
        let source = Source { shape: self.source.shape.clone(), parts, convert: self.source.convert };
        let (name, new) = (self.name.clone(), self.new.clone());
        let (grid, keys, lossy) = (self.grid.clone(), self.keys, AtomicU64::new(0));
        Self { name, source, new, grid, keys, part, described, inline: self.inline, lossy }
    }

    /// Whether elements change their type on the way.
    pub(in crate::tree) fn casts(&self) -> bool {
        self.source.convert.from != self.source.convert.to
    }

    /// Extent of a chunk along the first dimension; 1 for an array without dimensions.
    pub(in crate::tree) fn chunk_rows(&self) -> u64 {
        self.new.chunk_shape.first().copied().unwrap_or(1)
    }

    /// The checksums of its chunks.
    pub(super) fn checksums(&self) -> Checksums {
        let (sums, compressed) = (self.new.checksum, self.new.compression != Compression::None);
        Checksums { frame: sums && compressed, crc32c: sums && self.new.format == Format::V3 }
    }

    /// Bytes of the elements of an inner chunk.
    pub(super) fn inner_bytes(&self) -> u64 {
        let size = self.source.dtype().size() as u64;
        self.new.inner_shape().iter().fold(size, |bytes, extent| bytes.saturating_mul(*extent))
    }

    /// The most that the elements of an inner chunk are encoded to.
    fn encoded_len_max(&self) -> u64 {
        let (bytes, compression) = (self.inner_bytes(), self.new.compression);
        match compression {
            Compression::None => bytes,
            _ => Encoder::encoded_len_max(compression, usize::try_from(bytes).unwrap_or(usize::MAX)) as u64,
        }
    }

    /// The most that a chunk of one inner chunk is stored as: with its checksum and index.
    pub(super) fn stored_len_max(&self) -> u64 {
        self.encoded_len_max().saturating_add(CHUNK_TAIL_BYTES_MAX)
    }

    /// Chunks of the whole array.
    pub(super) fn chunk_count(&self) -> u64 {
        self.grid.chunk_count(&self.new.shape).unwrap_or(u64::MAX)
    }

    /// What a unit takes of a budget. Piece by piece is slower, and chosen where a unit would take much of the budget, and
    /// only if it takes less that way.
    pub(super) fn cost(&self, budget: u64) -> Cost {
        let (bytes, compression) = (self.inner_bytes(), self.new.compression);
        let encoder = Encoder::memory(compression, bytes);
        // What is not compressed is stored as it was gathered.
        let encoded =
            if compression == Compression::None { 0 } else { self.encoded_len_max().saturating_add(ALIGN_BYTES) };
        let whole = bytes.saturating_add(encoded).saturating_add(SMALL_BYTES);
        let much = whole > budget / UNITS_PER_BUDGET || whole.saturating_add(encoder) > budget;
        let piece = (budget / PIECES_PER_BUDGET).clamp(PIECE_BYTES_MIN, SLOT_BYTES as u64);
        match much && whole > STREAMED_PIECES * piece {
            true => Cost { encoder, work: STREAMED_PIECES * piece, encoded: 0, pieces: Some(piece) },
            false => Cost { encoder, work: whole, encoded, pieces: None },
        }
    }

    /// Why it cannot be written under a budget, if it cannot.
    pub(in crate::tree) fn over_budget(&self, budget: u64) -> Option<Error> {
        let cost = self.cost(budget);
        (cost.total() > budget).then(|| {
            Error::new(ErrorKind::Budget, "the memory budget is too small to save")
                .at("array", &self.name)
                .expected(format_args!("at least {} bytes, {} of them for its encoder", cost.total(), cost.encoder))
                .found(format_args!("{budget} bytes"))
                .hint("give it more memory, or choose a lower level of zstd or smaller chunks")
        })
    }

    /// The elements of an inner chunk; they may reach beyond the array.
    pub(super) fn region(&self, chunk: &[u64], inner: usize) -> Result<Region> {
        let outside = || Error::bug("a chunk lies outside its grid");
        let mut region = self.grid.region(chunk).ok_or_else(outside)?;
        let extents = self.new.inner_shape();
        let mut rest = inner as u64;
        for dim in (0..extents.len()).rev() {
            let count = region.extent[dim] / extents[dim];
            region.start[dim] += rest % count * extents[dim];
            region.extent[dim] = extents[dim];
            rest /= count;
        }
        Ok(region)
    }

    /// Bytes in the caller's memory of the elements in a box.
    fn bytes_in(&self, region: &Region) -> u64 {
        let inside = region.intersect(&Region::whole(&self.source.shape));
        inside.map_or(0, |inside| inside.volume()) * self.source.convert.from.size() as u64
    }

    /// Inner chunks of a chunk; 1 for a chunk that has none.
    pub(super) fn inner_count(&self) -> usize {
        let counts = self.new.inner_shape().iter().zip(&self.new.chunk_shape).map(|(inner, chunk)| chunk / inner);
        // At most INNER_CHUNKS_MAX, by the check of the new array.
        usize::try_from(counts.product::<u64>()).unwrap_or(usize::MAX)
    }

    /// Gathers, casts and encodes a unit, into the buffer if need be. A chunk of one inner chunk gets its index at once.
    pub(super) fn encode(
        &self,
        unit: &Unit,
        encoder: &mut Encoder,
        mut buffer: Vec<u8>,
        progress: &Progress,
    ) -> Result<Payload> {
        let region = self.region(&unit.chunk, unit.inner)?;
        if unit.of > 1 && region.intersect(&Region::whole(&self.source.shape)).is_none() {
            return Ok(Payload::Absent);
        }
        let (elements, lossy) = self.source.elements(&region)?;
        self.lossy.fetch_add(lossy, Ordering::Relaxed);
        let elements = elements.stored(self.source.dtype());
        let (body, mut tail) = match self.new.compression {
            Compression::None => {
                let tail =
                    if self.new.checksum { crc32c::crc32c(&elements).to_le_bytes().to_vec() } else { Vec::new() };
                (Body::Plain(elements), tail)
            }
            _ => {
                let start = page_start(&mut buffer, Encoder::encoded_len_max(self.new.compression, elements.len()));
                encoder.encode(&elements, &mut buffer)?;
                (Body::Encoded(buffer, start), Vec::new())
            }
        };
        if self.new.format == Format::V3 && unit.of == 1 {
            let len = (body.len() + tail.len()) as u64;
            let index = encode_index(&[Some((0, len))], Endian::Little, true);
            tail.extend(index.map_err(|error| Error::bug(error.to_string()))?);
        }
        progress.add(self.bytes_in(&region));
        Ok(Payload::Bytes(body, tail))
    }

    /// Encodes a chunk, one inner chunk after the other and each piece by piece, into a file of its own; the file's length.
    pub(super) fn stream(
        &self,
        unit: &Unit,
        encoder: &mut Encoder,
        (file, path): (&ValueFile, &RelPath),
        progress: &Progress,
    ) -> Result<u64> {
        let failed =
            |error: std::io::Error| Error::new(ErrorKind::Io, "cannot write a file").at("file", path).caused_by(error);
        let (count, piece) = (self.inner_count(), unit.cost.pieces.unwrap_or(SLOT_BYTES as u64));
        let (mut entries, mut end) = (Vec::new(), 0_u64);
        for inner in 0..count {
            let region = self.region(&unit.chunk, inner)?;
            if count > 1 && region.intersect(&Region::whole(&self.source.shape)).is_none() {
                entries.push(None);
                continue;
            }
            let start = end.next_multiple_of(ALIGN_BYTES);
            let write = |bytes: &[u8], at: u64| file.write_at(bytes, start + at).map_err(failed);
            let len = self.stream_inner((&region, piece), encoder, &write, progress)?;
            entries.push(Some((start, len)));
            end = start + len;
        }
        if self.new.format == Format::V3 {
            let index = encode_index(&entries, Endian::Little, true).map_err(|error| Error::bug(error.to_string()))?;
            file.write_at(&index, end).map_err(failed)?;
            end += index.len() as u64;
        }
        Ok(end)
    }

    /// Encodes one inner chunk piece by piece; its stored length.
    fn stream_inner(
        &self,
        (region, piece): (&Region, u64),
        encoder: &mut Encoder,
        write: &dyn Fn(&[u8], u64) -> Result<()>,
        progress: &Progress,
    ) -> Result<u64> {
        let size = self.source.dtype().size();
        let (mut at, mut out) = (0, Vec::new());
        let mut encoding = encoder.stream(region.volume() * size as u64)?;
        for (slab, _) in Slabs::new(&region.extent, size, piece) {
            progress.refuse_if_cancelled()?;
            let start = slab.start.iter().zip(&region.start).map(|(at, from)| at + from).collect();
            let piece = Region { start, extent: slab.extent };
            let (elements, lossy) = self.source.elements(&piece)?;
            self.lossy.fetch_add(lossy, Ordering::Relaxed);
            encoding.push(&elements.stored(self.source.dtype()), &mut out)?;
            write(&out, at)?;
            at += out.len() as u64;
            out.clear();
            progress.add(self.bytes_in(&piece));
        }
        encoding.finish(&mut out)?;
        write(&out, at)?;
        Ok(at + out.len() as u64)
    }
}

impl<'a> Units<'a> {
    /// The units of these arrays under a budget.
    pub(super) fn new(jobs: &'a [ArrayJob], budget: u64) -> Self {
        Self { jobs, budget, array: 0, chunks: None, chunk: None }
    }
}

impl Iterator for Units<'_> {
    type Item = Unit;

    fn next(&mut self) -> Option<Unit> {
        loop {
            let job = self.jobs.get(self.array)?;
            if let Some((chunk, inner)) = &mut self.chunk {
                let cost = job.cost(self.budget);
                let of = if cost.streamed() { 1 } else { job.inner_count() };
                let unit = Unit { array: self.array, chunk: chunk.clone(), inner: *inner, of, cost };
                *inner += 1;
                if *inner == of {
                    self.chunk = None;
                }
                return Some(unit);
            }
            let chunks = self.chunks.get_or_insert_with(|| job.grid.positions(&job.part));
            match chunks.next() {
                Some(chunk) => self.chunk = Some((chunk, 0)),
                None => {
                    self.chunks = None;
                    self.array += 1;
                }
            }
        }
    }
}

/// A unit that takes more than this part of the budget is encoded piece by piece.
const UNITS_PER_BUDGET: u64 = 4;

/// A piece has this part of the budget, within limits.
const PIECES_PER_BUDGET: u64 = 16;

/// Smaller pieces are mostly calls, in bytes.
const PIECE_BYTES_MIN: u64 = 64 << 10;

/// Pieces that encoding one at a time takes: its elements, and room for what they are encoded to, which grows by doubling.
const STREAMED_PIECES: u64 = 3;

/// What every unit takes however small: its index, key and place in the queues.
const SMALL_BYTES: u64 = 1 << 10;

/// What follows the elements of a chunk: a checksum, and an index of one inner chunk with its own.
const CHUNK_TAIL_BYTES_MAX: u64 = 4 + 16 + 4;
