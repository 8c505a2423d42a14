//! One array on its way to disk: its units, and how each is encoded.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::gather::Source;
use super::tree::NewPart;
use crate::encode::Encoder;
use crate::error::{Error, ErrorKind, Result};
use crate::io::StoreFile;
use crate::limits::SLOT_BYTES;
use crate::plan::Slabs;
use crate::relpath::RelPath;
use crate::shape::Region;
use crate::zarr::shard::encode_index;
use crate::zarr::{self, ArrayMeta, Compression, Endian, Format, Positions};

/// An array to write.
#[derive(Debug)]
pub(in crate::tree) struct ArrayJob {
    /// The name under which it is stored.
    pub(super) name: String,
    pub(super) source: Source,
    pub(in crate::tree) new: zarr::NewArray,
    pub(super) meta: ArrayMeta,
    /// The elements that it writes, in whole chunks: all of them, or some rows where an array is written piece by piece.
    pub(super) part: Region,
    /// Whether the array's metadata document is written already.
    pub(super) described: bool,
    /// Lossy elements so far.
    pub(super) lossy: AtomicU64,
}

/// A unit: which chunk of which array, and which inner chunk of it.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    pub(super) array: usize,
    pub(super) chunk: Vec<u64>,
    pub(super) inner: usize,
    /// Inner chunks of its chunk.
    pub(super) of: usize,
}

/// All units, in order.
pub(super) struct Units<'a> {
    jobs: &'a [ArrayJob],
    array: usize,
    chunks: Option<Positions>,
    /// The chunk at hand and its next inner chunk.
    chunk: Option<(Vec<u64>, usize)>,
}

/// An encoded unit.
pub(super) enum Payload {
    /// Stored bytes in two pieces: the elements, which may be the caller's memory, and what follows them.
    Bytes(Bytes, Vec<u8>),
    /// No element of the array is in it.
    Absent,
    /// It has a file of its own already, of this length.
    File(Arc<dyn StoreFile>, RelPath, u64),
}

impl ArrayJob {
    /// The job of writing one part of the array, whose elements are these. The part ends where chunks or the array do.
    pub(in crate::tree) fn piece(&self, part: Region, data: Bytes, described: bool) -> Self {
        let parts = vec![NewPart::new(part.clone(), data)];
        let source = Source { shape: self.source.shape.clone(), parts, convert: self.source.convert };
        let (name, new, meta) = (self.name.clone(), self.new.clone(), self.meta.clone());
        Self { name, source, new, meta, part, described, lossy: AtomicU64::new(0) }
    }

    /// Whether elements change their type on the way.
    pub(in crate::tree) fn casts(&self) -> bool {
        self.source.convert.from != self.source.convert.to
    }

    /// Extent of a chunk along the first dimension; 1 for an array without dimensions.
    pub(in crate::tree) fn chunk_rows(&self) -> u64 {
        self.new.chunk_shape.first().copied().unwrap_or(1)
    }

    /// The elements of a unit; it may reach beyond the array.
    pub(super) fn unit_region(&self, unit: &Unit) -> Result<Region> {
        let outside = || Error::bug("a chunk lies outside its grid");
        let mut region = self.meta.grid.region(&unit.chunk).ok_or_else(outside)?;
        if unit.of > 1 {
            let inner = self.new.inner_shape();
            let mut rest = unit.inner as u64;
            for dim in (0..inner.len()).rev() {
                let count = region.extent[dim] / inner[dim];
                region.start[dim] += rest % count * inner[dim];
                region.extent[dim] = inner[dim];
                rest /= count;
            }
        }
        Ok(region)
    }

    /// Inner chunks of a chunk; 1 for a chunk that has none.
    fn inner_count(&self) -> usize {
        let counts = self.new.inner_shape().iter().zip(&self.new.chunk_shape).map(|(inner, chunk)| chunk / inner);
        // At most INNER_CHUNKS_MAX, by the check of the new array.
        usize::try_from(counts.product::<u64>()).unwrap_or(usize::MAX)
    }

    /// Gathers, casts and encodes a unit. A chunk of one inner chunk gets its index at once.
    pub(super) fn encode(&self, unit: &Unit, region: &Region, encoder: &mut Encoder) -> Result<Payload> {
        if unit.of > 1 && region.intersect(&Region::whole(&self.source.shape)).is_none() {
            return Ok(Payload::Absent);
        }
        let (elements, lossy) = self.source.elements(region)?;
        self.lossy.fetch_add(lossy, Ordering::Relaxed);
        let elements = elements.stored(self.source.dtype());
        let (body, mut tail) = match self.new.compression {
            Compression::None => {
                let tail =
                    if self.new.checksum { crc32c::crc32c(&elements).to_le_bytes().to_vec() } else { Vec::new() };
                (elements, tail)
            }
            _ => {
                let mut body = Vec::new();
                encoder.encode(&elements, &mut body)?;
                (Bytes::from(body), Vec::new())
            }
        };
        if self.new.format == Format::V3 && unit.of == 1 {
            let len = (body.len() + tail.len()) as u64;
            let index = encode_index(&[Some((0, len))], Endian::Little, true);
            tail.extend(index.map_err(|error| Error::bug(error.to_string()))?);
        }
        Ok(Payload::Bytes(body, tail))
    }

    /// Encodes a unit piece by piece into a file of its own.
    pub(super) fn stream(
        &self,
        region: &Region,
        encoder: &mut Encoder,
        file: Arc<dyn StoreFile>,
        path: RelPath,
    ) -> Result<Payload> {
        let size = self.source.dtype().size();
        let failed =
            |error: std::io::Error| Error::new(ErrorKind::Io, "cannot write a file").at("file", &path).caused_by(error);
        let mut at = 0;
        let mut out = Vec::new();
        let mut encoding = encoder.stream(region.volume() * size as u64)?;
        for (slab, _) in Slabs::new(&region.extent, size, SLOT_BYTES as u64) {
            let start = slab.start.iter().zip(&region.start).map(|(at, from)| at + from).collect();
            let (elements, lossy) = self.source.elements(&Region { start, extent: slab.extent })?;
            self.lossy.fetch_add(lossy, Ordering::Relaxed);
            encoding.push(&elements.stored(self.source.dtype()), &mut out)?;
            file.write_at(&out, at).map_err(failed)?;
            at += out.len() as u64;
            out.clear();
        }
        encoding.finish(&mut out)?;
        if self.new.format == Format::V3 {
            let index = encode_index(&[Some((0, at + out.len() as u64))], Endian::Little, true);
            out.extend(index.map_err(|error| Error::bug(error.to_string()))?);
        }
        file.write_at(&out, at).and_then(|()| file.sync()).map_err(failed)?;
        let len = at + out.len() as u64;
        Ok(Payload::File(file, path, len))
    }
}

impl<'a> Units<'a> {
    pub(super) fn new(jobs: &'a [ArrayJob]) -> Self {
        Self { jobs, array: 0, chunks: None, chunk: None }
    }
}

impl Iterator for Units<'_> {
    type Item = Unit;

    fn next(&mut self) -> Option<Unit> {
        loop {
            let job = self.jobs.get(self.array)?;
            if let Some((chunk, inner)) = &mut self.chunk {
                let of = job.inner_count();
                let unit = Unit { array: self.array, chunk: chunk.clone(), inner: *inner, of };
                *inner += 1;
                if *inner == of {
                    self.chunk = None;
                }
                return Some(unit);
            }
            let chunks = self.chunks.get_or_insert_with(|| job.meta.grid.positions(&job.part));
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

/// Encoders that wait for work, by what they make. A worker takes one for a unit.
#[derive(Debug, Default)]
pub(super) struct Encoders(Mutex<HashMap<(Compression, bool), Vec<Encoder>>>);

impl Encoders {
    pub(super) fn take(&self, job: &ArrayJob) -> Result<Encoder> {
        let (compression, checksum) = (job.new.compression, job.new.checksum);
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match waiting.get_mut(&(compression, checksum)).and_then(Vec::pop) {
            Some(encoder) => Ok(encoder),
            None => Ok(Encoder::new(compression, checksum)?),
        }
    }

    pub(super) fn give_back(&self, job: &ArrayJob, encoder: Encoder) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.entry((job.new.compression, job.new.checksum)).or_default().push(encoder);
    }
}
