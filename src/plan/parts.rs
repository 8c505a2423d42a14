//! Chunks to units: shards are taken apart, addressable chunks cut into the ranges that are worth reading.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::build::Planner;
use super::ranges::{raw_ranges, union_volume};
use super::{Placement, STREAM_SLOTS, SingleShard, Source, Unit, UnitArray, Verify, id};
use crate::error::{Error, Result};
use crate::layout::orbax::sums::ValueSum;
use crate::limits::{RANGES_PER_CHUNK_MAX, SLOT_BYTES, SLOT_SLACK_BYTES};
use crate::need::{Answer, Asker, Need, unfit};
use crate::relpath::RelPath;
use crate::shape::{Region, byte_count, strides};
use crate::zarr::shard::{ShardError, ShardIndex, index_range};
use crate::zarr::{ByteCodec, Chunk, Grid, Layout, Sharded};

/// A chunk, or an inner chunk of a shard: where its value is and what of it goes where.
pub(super) struct StoredPart {
    pub(super) array: usize,
    pub(super) position: Vec<u64>,
    pub(super) inner: Option<u64>,
    pub(super) place: Place,
    pub(super) layout: Arc<Layout>,
    /// Extents, in the dimension order of whatever contains this part.
    pub(super) extent: Vec<u64>,
    /// Boxes of this part, in the same dimension order.
    pub(super) placements: Vec<Placement>,
}

/// Where a value is.
#[derive(Clone)]
pub(super) enum Place {
    Inline(Bytes),
    File { path: RelPath, offset: u64, len: u64 },
}

impl Place {
    fn len(&self) -> u64 {
        match self {
            Self::Inline(bytes) => bytes.len() as u64,
            Self::File { len, .. } => *len,
        }
    }

    /// A part of the value. The caller has checked that it lies inside.
    fn part(&self, offset: u64, len: u64) -> Result<Self> {
        match self {
            Self::Inline(bytes) => {
                let range = usize::try_from(offset).ok().zip(usize::try_from(offset + len).ok());
                let part = range.and_then(|(from, to)| (to <= bytes.len()).then(|| bytes.slice(from..to)));
                part.map(Self::Inline).ok_or_else(|| Error::bug("a unit reaches beyond an inline value"))
            }
            Self::File { path, offset: base, .. } => {
                let offset =
                    base.checked_add(offset).ok_or_else(|| Error::corrupt("an offset does not fit 64 bits"))?;
                Ok(Self::File { path: path.clone(), offset, len })
            }
        }
    }
}

impl Planner<'_> {
    /// Makes the units of parts that are plain chunks, and takes shards apart: gives the inner chunks that are wanted.
    pub(super) async fn expand(&mut self, ask: &Asker, parts: Vec<StoredPart>) -> Result<Vec<StoredPart>> {
        let mut shards = Vec::new();
        let mut needs = Vec::new();
        for part in parts {
            let layout = Arc::clone(&part.layout);
            let sharded = match &*layout {
                Layout::Plain(chunk) => {
                    self.push_part(part, chunk)?;
                    continue;
                }
                Layout::Sharded(sharded) => sharded,
            };
            if let Some(chunk) = self.read_whole(&part, sharded) {
                self.push_indexed(part, sharded, chunk)?;
                continue;
            }
            let count = sharded.inner_count();
            let range = index_range(sharded.index_location, part.place.len(), count, sharded.index_crc32c)
                .map_err(|error| self.shard_error(&part, &error))?;
            let bytes = match part.place.part(range.start, range.end - range.start)? {
                Place::Inline(bytes) => Some(bytes),
                Place::File { path, offset, len } => {
                    needs.push(Need::Range { path, offset, len });
                    None
                }
            };
            shards.push((part, bytes));
        }
        let mut answers = ask.ask(needs).await?.into_iter();
        let mut inner = Vec::new();
        for (part, bytes) in shards {
            let bytes = match bytes {
                Some(bytes) => bytes,
                None => match answers.next() {
                    Some(Answer::Bytes(bytes)) => bytes,
                    Some(Answer::Missing) => {
                        let error = Error::not_found("a data file of the checkpoint is missing");
                        return Err(self.chunk_error(part.array, &part.position, error));
                    }
                    other => return Err(unfit(other.as_ref())),
                },
            };
            self.take_apart(part, &bytes, &mut inner)?;
        }
        Ok(inner)
    }

    /// The wanted inner chunks of a shard. What is absent becomes a fill unit.
    fn take_apart(&mut self, part: StoredPart, index: &[u8], inner: &mut Vec<StoredPart>) -> Result<()> {
        let layout = Arc::clone(&part.layout);
        let Layout::Sharded(sharded) = &*layout else { return Err(Error::bug("a plain chunk has no index")) };
        let count = sharded.inner_count();
        let index = ShardIndex::parse(index, count, sharded.index_endian, sharded.index_crc32c, part.place.len())
            .map_err(|error| self.shard_error(&part, &error))?;
        let grid =
            Grid::new(sharded.inner_shape.clone()).ok_or_else(|| Error::bug("a parsed inner chunk has no extent"))?;
        let mut touched: BTreeMap<u64, Vec<Placement>> = BTreeMap::new();
        for placement in part.placements {
            let placement = placement.permuted(&sharded.order);
            for position in grid.positions(&placement.region) {
                let number =
                    Grid::index(&position, &sharded.counts).ok_or_else(|| Error::bug("an inner chunk lies outside"))?;
                let region = self.region(&grid, part.array, &position)?;
                if !self.making.add(&self.limits, region.rank(), 1) {
                    return Err(self.too_many());
                }
                touched
                    .entry(number)
                    .or_default()
                    .extend(placement.clip(&region).map(|clipped| clipped.relative_to(&region)));
            }
        }
        let inner_layout = Arc::new(sharded.inner.clone());
        for (number, placements) in touched {
            match index.entry(number) {
                Some((offset, len)) => inner.push(StoredPart {
                    array: part.array,
                    position: part.position.clone(),
                    inner: Some(number),
                    place: part.place.part(offset, len)?,
                    layout: Arc::clone(&inner_layout),
                    extent: sharded.inner_shape.clone(),
                    placements,
                }),
                None if count == 1 && self.arrays[part.array].every_chunk_stored => {
                    let error =
                        Error::not_found("a shard is empty, although the checkpoint says that every chunk is stored");
                    return Err(self.chunk_error(part.array, &part.position, error));
                }
                None => self.push_fill(part.array, &part.position, Some(number), &sharded.inner_shape, placements),
            }
        }
        Ok(())
    }

    /// The chain of a shard's only inner chunk, if the shard is one unit whose index is followed while decoding: the chunk
    /// must be decoded whole anyway, and the shard fits a slot. Saves a request a chunk for what Orbax writes by default.
    fn read_whole<'s>(&self, part: &StoredPart, sharded: &'s Sharded) -> Option<&'s Chunk> {
        match &sharded.inner {
            Layout::Plain(chunk) => {
                let whole = sharded.inner_count() == 1 && part.inner.is_none();
                (whole && !addressable(&chunk.codecs) && part.place.len() <= self.limits.slot_bytes).then_some(chunk)
            }
            Layout::Sharded(_) => None,
        }
    }

    /// A unit that is not stored.
    pub(super) fn push_fill(
        &mut self,
        array: usize,
        position: &[u64],
        inner: Option<u64>,
        shape: &[u64],
        placements: Vec<Placement>,
    ) {
        let fill = Bytes::copy_from_slice(&self.arrays[array].meta.fill);
        let array = self.unit_array(array);
        self.units.push(Unit {
            array,
            chunk: position.to_vec(),
            inner,
            source: Source::Fill(fill),
            shape: shape.to_vec(),
            skip: 0,
            decoded_bytes: 0,
            whole: true,
            indexed: false,
            working_bytes: 0,
            sum: None,
            placements,
        });
    }

    /// A shard of one inner chunk, read and decoded whole, its index followed on the way.
    fn push_indexed(&mut self, part: StoredPart, sharded: &Sharded, chunk: &Chunk) -> Result<()> {
        let order = compose(&sharded.order, &chunk.order);
        self.push_whole(part, &order, &chunk.codecs, true)
    }

    /// The units of one encoded chunk or inner chunk: ranges if it is addressable, else one.
    fn push_part(&mut self, part: StoredPart, chunk: &Chunk) -> Result<()> {
        let element = self.arrays[part.array].meta.dtype.size() as u64;
        if addressable(&chunk.codecs) {
            let decoded = self.decoded_bytes(&part)?;
            let checked = !chunk.codecs.is_empty() || self.is_sealed(&part);
            let expected = decoded + CRC32C_BYTES * chunk.codecs.len() as u64;
            if part.place.len() != expected {
                let error = Error::corrupt("an uncompressed chunk has the wrong size")
                    .expected(format_args!("{expected} bytes"))
                    .found(format_args!("{} bytes", part.place.len()));
                return Err(self.chunk_error(part.array, &part.position, error));
            }
            let whole_is_better = match self.limits.verify {
                Verify::Full => checked,
                Verify::Auto => {
                    checked && {
                        let regions: Vec<Region> = part.placements.iter().map(|place| place.region.clone()).collect();
                        (decoded - union_volume(&regions) * element) <= self.limits.merge_gap_bytes
                    }
                }
                Verify::Off => false,
            };
            if !whole_is_better && !self.whole {
                return self.push_ranges(part, &chunk.order, decoded);
            }
        }
        self.push_whole(part, &chunk.order, &chunk.codecs, false)
    }

    /// One unit of everything that is stored.
    fn push_whole(&mut self, part: StoredPart, order: &[usize], codecs: &[ByteCodec], indexed: bool) -> Result<()> {
        let decoded_bytes = self.decoded_bytes(&part)?;
        // What fits a slot on both sides is decoded in one go, which needs no window.
        let in_one_go = part.place.len().max(decoded_bytes) <= self.limits.slot_bytes;
        let window = if in_one_go { 0 } else { self.limits.window_bytes_max() };
        let working_bytes = (self.cost)(codecs, part.place.len(), decoded_bytes, window);
        self.check_budget(&part, working_bytes);
        let sum = self.sum(&part, indexed)?;
        let unit = Unit {
            array: self.unit_array(part.array),
            source: self.source(part.place),
            chunk: part.position,
            inner: part.inner,
            shape: permuted(&part.extent, order),
            skip: 0,
            decoded_bytes,
            whole: true,
            indexed,
            working_bytes,
            sum,
            placements: part.placements.into_iter().map(|placement| placement.permuted(order)).collect(),
        };
        self.units.push(unit);
        Ok(())
    }

    /// The needed byte ranges of an uncompressed chunk, each a unit of its own.
    fn push_ranges(&mut self, part: StoredPart, order: &[usize], decoded: u64) -> Result<()> {
        let element = self.arrays[part.array].meta.dtype.size() as u64;
        let shape = permuted(&part.extent, order);
        let placements: Vec<Placement> =
            part.placements.into_iter().map(|placement| placement.permuted(order)).collect();
        let regions: Vec<Region> = placements.iter().map(|placement| placement.region.clone()).collect();
        let max = self.limits.slot_bytes.max(element);
        let mut gap = self.limits.merge_gap_bytes.min(max);
        let ranges = loop {
            match raw_ranges(&shape, element, &regions, gap, max, RANGES_PER_CHUNK_MAX) {
                Some(ranges) => break ranges,
                None if gap < max => gap = (gap * 4).max(element * 4).min(max),
                None => break raw_ranges(&shape, element, &regions, gap, max, u64::MAX).unwrap_or_default(),
            }
        };
        let array = self.unit_array(part.array);
        // Without a checksum there is nothing that a partial read leaves unchecked, once every byte is read.
        let complete = part.place.len() == decoded && ranges.iter().map(|range| range.len).sum::<u64>() == decoded;
        let strides = strides(&shape);
        for range in ranges {
            if !self.making.add(&self.limits, shape.len(), placements.len()) {
                return Err(self.too_many());
            }
            let base: u64 = strides.iter().zip(&range.region.start).map(|(stride, at)| stride * at * element).sum();
            let clipped = placements.iter().filter_map(|placement| placement.clip(&range.region));
            let placements = clipped.map(|placement| placement.relative_to(&range.region)).collect();
            let source = self.source(part.place.part(range.offset, range.len)?);
            self.units.push(Unit {
                array,
                chunk: part.position.clone(),
                inner: part.inner,
                source,
                shape: range.region.extent,
                skip: range.offset - base,
                decoded_bytes: range.len,
                whole: complete,
                indexed: false,
                working_bytes: 0,
                sum: None,
                placements,
            });
        }
        Ok(())
    }

    fn is_sealed(&self, part: &StoredPart) -> bool {
        self.arrays[part.array].sums.is_some() && matches!(part.place, Place::File { .. })
    }

    /// The checksum of a part, if it was sealed. A shard that is read with its index has one of what the index points at. What
    /// stands in the nodes of a database has theirs.
    fn sum(&self, part: &StoredPart, indexed: bool) -> Result<Option<ValueSum>> {
        let (Some(sums), Place::File { path, offset, len }) = (&self.arrays[part.array].sums, &part.place) else {
            return Ok(None);
        };
        if self.limits.verify == Verify::Off {
            return Ok(None);
        }
        let sum = if indexed { sums.within(path, *offset, *len) } else { sums.of(path, *offset, *len) };
        let relative = sum.map(|sum| Some(ValueSum { offset: sum.offset - offset, ..sum }));
        relative.map_err(|error| self.chunk_error(part.array, &part.position, error))
    }

    fn decoded_bytes(&self, part: &StoredPart) -> Result<u64> {
        byte_count(&part.extent, self.arrays[part.array].meta.dtype.size())
            .ok_or_else(|| self.chunk_error(part.array, &part.position, Error::corrupt("the chunk is too large")))
    }

    /// Notes a unit whose decoder needs more than the budget leaves beside the slots it works with.
    fn check_budget(&mut self, part: &StoredPart, working_bytes: u64) {
        let slots = u64::from(self.limits.workers) + STREAM_SLOTS;
        let beside = slots * self.limits.slot_memory();
        if working_bytes.saturating_add(beside) <= self.limits.staging_bytes {
            return;
        }
        // A larger budget has larger slots, up to a size, but gives them no more than half of itself: either makes enough.
        let beside = beside.max(working_bytes.min(slots * (SLOT_BYTES as u64 + SLOT_SLACK_BYTES)));
        let needed = working_bytes.saturating_add(beside);
        if self.over_budget.as_ref().is_some_and(|(most, _)| *most >= needed) {
            return;
        }
        let error = Error::new(crate::ErrorKind::Budget, "a chunk cannot be decoded within the memory budget")
            .expected(format_args!("a budget of at least {needed} bytes"))
            .found(format_args!("{} bytes", self.limits.staging_bytes))
            .hint(format!(
                "its decoder may hold {working_bytes} bytes beside the staging slots; give `--memory {needed}` or more"
            ));
        self.over_budget = Some((needed, self.chunk_error(part.array, &part.position, error)));
    }

    fn shard_error(&self, part: &StoredPart, error: &ShardError) -> Error {
        self.chunk_error(part.array, &part.position, Error::corrupt(error.to_string()))
    }

    pub(super) fn chunk_error(&self, array: usize, position: &[u64], error: Error) -> Error {
        error.at("chunk", format_args!("{position:?}")).at("array", &self.arrays[array].name)
    }

    fn source(&mut self, place: Place) -> Source {
        match place {
            Place::Inline(bytes) => Source::Inline(bytes),
            Place::File { path, offset, len } => {
                let file = match self.file_of.get(&path) {
                    Some(file) => *file,
                    None => {
                        let file = id(self.files.len());
                        self.files.push(path.clone());
                        self.file_of.insert(path, file);
                        file
                    }
                };
                Source::File { file, offset, len }
            }
        }
    }

    /// What the units of a stored array have in common, made once.
    fn unit_array(&mut self, array: usize) -> u32 {
        if let Some(&have) = self.unit_array_of.get(&array) {
            return have;
        }
        let stored = &self.arrays[array];
        let chunk = stored.meta.layout.innermost();
        let single = match &stored.meta.layout {
            Layout::Plain(_) => None,
            Layout::Sharded(sharded) => Some(SingleShard {
                location: sharded.index_location,
                endian: sharded.index_endian,
                crc32c: sharded.index_crc32c,
            }),
        };
        self.unit_arrays.push(UnitArray {
            name: stored.name.clone(),
            dtype: stored.meta.dtype,
            endian: chunk.endian,
            codecs: chunk.codecs.clone().into(),
            fill: Bytes::copy_from_slice(&stored.meta.fill),
            every_chunk_stored: stored.every_chunk_stored,
            single,
        });
        let made = id(self.unit_arrays.len() - 1);
        self.unit_array_of.insert(array, made);
        made
    }
}

impl Placement {
    /// The same placement, counted from the first element of a box that it lies in.
    pub(super) fn relative_to(mut self, to: &Region) -> Self {
        for dim in 0..self.region.rank() {
            self.region.start[dim] -= to.start[dim];
        }
        self
    }

    /// The same placement with the unit's dimensions in another order: new dimension `i` is old dimension `order[i]`.
    pub(super) fn permuted(self, order: &[usize]) -> Self {
        let region =
            Region { start: permuted(&self.region.start, order), extent: permuted(&self.region.extent, order) };
        Self { shard: self.shard, region, strides: permuted(&self.strides, order), start: self.start }
    }
}

/// Whether elements can be read by offset: nothing but checksums behind the elements.
pub(super) fn addressable(codecs: &[ByteCodec]) -> bool {
    codecs.iter().all(|codec| matches!(codec, ByteCodec::Crc32c))
}

fn permuted(values: &[u64], order: &[usize]) -> Vec<u64> {
    order.iter().map(|&dim| values[dim]).collect()
}

/// First `outer`, then `inner`: dimension `i` of the result is dimension `outer[inner[i]]`.
fn compose(outer: &[usize], inner: &[usize]) -> Vec<usize> {
    inner.iter().map(|&dim| outer[dim]).collect()
}

/// What the `crc32c` codec adds to a chunk.
const CRC32C_BYTES: u64 = 4;
