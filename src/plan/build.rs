//! Makes a [`Plan`]: demands per stored array, located chunks, units, batches.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;

use super::ranges::{Slabs, raw_ranges, union_volume};
use super::{
    Batch, DecoderCost, Limits, Part, Placement, Plan, PlannedLeaf, PlannedShard, ReadRange, SingleShard, Source,
    StoredArray, Unit, UnitArray, Values, Verify, Want,
};
use crate::error::{Error, Result};
use crate::kv::Value;
use crate::limits::{CHUNKS_MAX, RANGES_PER_CHUNK_MAX, SLOT_BYTES};
use crate::need::{Answer, Asker, Need, unfit};
use crate::relpath::RelPath;
use crate::shape::{Region, byte_count, strides};
use crate::zarr::shard::{ShardError, ShardIndex, index_range};
use crate::zarr::{ByteCodec, Chunk, Grid, Layout, Sharded};

/// Plans a load of `wants` from `arrays`. Asks for the sizes of chunk files and for shard indexes, and for no data.
///
/// # Errors
/// A stored array that contradicts itself (a chunk of the wrong size, an index beyond its value, a missing chunk where the
/// writer promised all), a cast that is not defined, or a unit that needs more memory than the budget.
pub async fn build(
    ask: &Asker,
    arrays: &[StoredArray],
    wants: Vec<Want>,
    limits: Limits,
    cost: DecoderCost,
) -> Result<Plan> {
    let mut planner = Planner::new(arrays, limits, cost);
    for want in wants {
        planner.want(want)?;
    }
    let chunks = planner.chunks()?;
    let mut parts = planner.locate(ask, chunks).await?;
    // One round for each level of shards inside shards; nearly always none or one.
    while !parts.is_empty() {
        parts = planner.expand(ask, parts).await?;
    }
    planner.finish()
}

struct Planner<'a> {
    arrays: &'a [StoredArray],
    limits: Limits,
    cost: DecoderCost,
    leaves: Vec<PlannedLeaf>,
    shards: Vec<PlannedShard>,
    /// Per stored array: what is wanted of it.
    demands: BTreeMap<usize, Vec<Demand>>,
    /// Stored array to position in `unit_arrays`.
    unit_array_of: HashMap<usize, u32>,
    unit_arrays: Vec<UnitArray>,
    files: Vec<RelPath>,
    file_of: HashMap<RelPath, u32>,
    units: Vec<Unit>,
}

/// A box of a stored array that goes to a shard.
struct Demand {
    /// In the stored array's own dimensions.
    stored: Region,
    shard: u32,
    /// For every stored dimension the distance of neighbours in the shard, in elements; 0 where only one index is taken.
    strides: Vec<u64>,
    /// Where the first element goes in the shard.
    start: u64,
}

/// A chunk of which something is wanted.
struct Wanted {
    array: usize,
    position: Vec<u64>,
    /// Indices into the array's demands.
    demands: Vec<usize>,
}

/// A chunk, or an inner chunk of a shard: where its value is and what of it goes where.
struct StoredPart {
    array: usize,
    position: Vec<u64>,
    inner: Option<u64>,
    place: Place,
    layout: Arc<Layout>,
    /// Extents, in the dimension order of whatever contains this part.
    extent: Vec<u64>,
    /// Boxes of this part, in the same dimension order.
    placements: Vec<Placement>,
}

#[derive(Clone)]
enum Place {
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

impl<'a> Planner<'a> {
    fn new(arrays: &'a [StoredArray], limits: Limits, cost: DecoderCost) -> Self {
        Self {
            arrays,
            limits,
            cost,
            leaves: Vec::new(),
            shards: Vec::new(),
            demands: BTreeMap::new(),
            unit_array_of: HashMap::new(),
            unit_arrays: Vec::new(),
            files: Vec::new(),
            file_of: HashMap::new(),
            units: Vec::new(),
        }
    }

    /// Cuts a wanted array into shards and notes what each needs of the stored ones.
    fn want(&mut self, want: Want) -> Result<()> {
        let size = want.dtype.size();
        let at = |error: Error| error.at("leaf", &want.path);
        let bytes_logical = byte_count(&want.shape, size).ok_or_else(|| {
            at(Error::invalid("the wanted array is too large").found(format_args!("{:?}", want.shape)))
        })?;
        if want.view.shape.len() != want.shape.len() {
            return Err(at(Error::invalid("the wanted rank differs from the stored one")
                .expected(format_args!("{:?}", want.view.shape))
                .found(format_args!("{:?}", want.shape))));
        }
        let leaf = self.leaves.len() as u32;
        let mut shard_of: HashMap<Region, u32> = HashMap::new();
        let mut parts = Vec::with_capacity(want.sharding.mesh.devices().len());
        let process = want.sharding.mesh.process();
        for (position, device) in want.sharding.mesh.devices().iter().enumerate() {
            let region = want.sharding.region(&want.shape, position);
            let local = device.rank == process.rank;
            let shard = local.then(|| {
                let shard = *shard_of.entry(region.clone()).or_insert_with(|| {
                    let bytes = region.volume() * size as u64;
                    self.shards.push(PlannedShard {
                        leaf,
                        region: region.clone(),
                        devices: Vec::new(),
                        bytes,
                        init: None,
                    });
                    (self.shards.len() - 1) as u32
                });
                self.shards[shard as usize].devices.push(position as u32);
                shard
            });
            parts.push(Part { region, shard });
        }
        let mut shards: Vec<(Region, u32)> = shard_of.into_iter().collect();
        shards.sort_unstable_by_key(|(_, shard)| *shard);
        for (region, shard) in shards {
            self.demand(&want, &region, shard)?;
        }
        self.leaves.push(PlannedLeaf {
            path: want.path,
            shape: want.shape,
            dtype: want.dtype,
            sharding: want.sharding,
            parts,
            policy: want.policy,
            priority: want.priority,
            bytes_logical,
            bytes_needed: 0,
            bytes_decoded: 0,
            bytes_read: 0,
            units: 0,
        });
        Ok(())
    }

    /// Notes what one shard needs of each piece of its view; what no piece covers is padding.
    fn demand(&mut self, want: &Want, shard_region: &Region, shard: u32) -> Result<()> {
        let shard_strides = strides(&shard_region.extent);
        let mut covered = 0;
        for piece in &want.view.pieces {
            let stored = &self.arrays[piece.array];
            if !stored.meta.dtype.casts_to(want.dtype) {
                return Err(Error::invalid("a complex array cannot be cast to bool").at("leaf", &want.path));
            }
            let Some(target) = piece.at.intersect(shard_region) else { continue };
            covered += target.volume();
            let mut strides = vec![0; piece.base.len()];
            for (dim, stored_dim) in piece.dims.iter().enumerate() {
                if let Some(stored_dim) = *stored_dim {
                    strides[stored_dim] = shard_strides[dim];
                }
            }
            let start =
                (0..target.rank()).map(|dim| (target.start[dim] - shard_region.start[dim]) * shard_strides[dim]).sum();
            let demand = Demand { stored: piece.stored(&target), shard, strides, start };
            self.demands.entry(piece.array).or_default().push(demand);
        }
        if covered < shard_region.volume() {
            self.shards[shard as usize].init = Some(want.pad.clone());
        }
        Ok(())
    }

    /// The chunks that some demand touches, array by array, in grid order.
    fn chunks(&self) -> Result<Vec<Wanted>> {
        let mut chunks = Vec::new();
        for (&array, demands) in &self.demands {
            let stored = &self.arrays[array];
            let mut touched: BTreeMap<Vec<u64>, Vec<usize>> = BTreeMap::new();
            for (index, demand) in demands.iter().enumerate() {
                let count = stored.meta.grid.touched_count(&demand.stored);
                if count.is_none_or(|count| count.saturating_add(chunks.len() as u64) > CHUNKS_MAX) {
                    return Err(Error::corrupt("too many chunks are wanted")
                        .at("array", &stored.name)
                        .expected(format_args!("at most {CHUNKS_MAX}")));
                }
                for position in stored.meta.grid.positions(&demand.stored) {
                    touched.entry(position).or_default().push(index);
                }
            }
            chunks.extend(touched.into_iter().map(|(position, demands)| Wanted { array, position, demands }));
        }
        Ok(chunks)
    }

    /// Finds the value of every chunk; chunks that are not stored become fill units.
    async fn locate(&mut self, ask: &Asker, chunks: Vec<Wanted>) -> Result<Vec<StoredPart>> {
        let mut places: Vec<Option<Place>> = Vec::with_capacity(chunks.len());
        let mut asked = Vec::new();
        let mut needs = Vec::new();
        for wanted in &chunks {
            let stored = &self.arrays[wanted.array];
            let key = stored.meta.keys.key(&wanted.position);
            places.push(match &stored.values {
                Values::Keys { index, prefix } => {
                    index.get(&[prefix, key.as_bytes()].concat()).map(|value| match value {
                        Value::Inline(bytes) => Place::Inline(bytes.clone()),
                        Value::Extent(extent) => Place::File {
                            path: index.file(extent.file).clone(),
                            offset: extent.offset,
                            len: extent.len,
                        },
                    })
                }
                Values::Directory(dir) => {
                    let path = dir.join(&key).map_err(|bad| Error::from(bad).at("array", &stored.name))?;
                    asked.push((places.len(), path.clone()));
                    needs.push(Need::Size { path });
                    None
                }
                Values::Extent { path, offset, len } => {
                    Some(Place::File { path: path.clone(), offset: *offset, len: *len })
                }
            });
        }
        for ((at, path), answer) in asked.into_iter().zip(ask.ask(needs).await?) {
            places[at] = match answer {
                Answer::Size(len) => Some(Place::File { path, offset: 0, len }),
                Answer::Missing => None,
                other => return Err(unfit(Some(&other))),
            };
        }
        let mut parts = Vec::with_capacity(chunks.len());
        for (wanted, place) in chunks.into_iter().zip(places) {
            let stored = &self.arrays[wanted.array];
            let region = self.region(&stored.meta.grid, wanted.array, &wanted.position)?;
            let placements = self.placements(&wanted, &region);
            let Wanted { array, position, .. } = wanted;
            match place {
                Some(place) => {
                    let layout = Arc::new(stored.meta.layout.clone());
                    parts.push(StoredPart {
                        array,
                        position,
                        inner: None,
                        place,
                        layout,
                        extent: region.extent,
                        placements,
                    });
                }
                None if stored.every_chunk_stored => {
                    let error =
                        Error::not_found("a chunk is missing, although the checkpoint says that every chunk is stored")
                            .hint(
                                "the checkpoint is incomplete: copy it again; `touchdown verify` lists what is missing",
                            );
                    return Err(self.chunk_error(array, &position, error));
                }
                None => self.push_fill(array, &position, None, &region.extent, placements),
            }
        }
        Ok(parts)
    }

    /// Makes the units of parts that are plain chunks, and takes shards apart: gives the inner chunks that are wanted.
    async fn expand(&mut self, ask: &Asker, parts: Vec<StoredPart>) -> Result<Vec<StoredPart>> {
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

    /// The elements of a chunk of a grid.
    fn region(&self, grid: &Grid, array: usize, position: &[u64]) -> Result<Region> {
        grid.region(position)
            .ok_or_else(|| self.chunk_error(array, position, Error::corrupt("a chunk's indices do not fit 64 bits")))
    }

    /// Where the demands on a chunk go, as boxes relative to the chunk.
    fn placements(&self, wanted: &Wanted, chunk: &Region) -> Vec<Placement> {
        let Some(demands) = self.demands.get(&wanted.array) else { return Vec::new() };
        let place = |&index: &usize| {
            let Demand { stored, shard, strides, start } = &demands[index];
            let whole = Placement { shard: *shard, region: stored.clone(), strides: strides.clone(), start: *start };
            whole.clip(chunk).map(|clipped| clipped.relative_to(chunk))
        };
        wanted.demands.iter().filter_map(place).collect()
    }

    /// A unit that is not stored.
    fn push_fill(
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
            let checked = !chunk.codecs.is_empty();
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
            if !whole_is_better {
                return self.push_ranges(part, &chunk.order, decoded);
            }
        }
        self.push_whole(part, &chunk.order, &chunk.codecs, false)
    }

    /// One unit of everything that is stored.
    fn push_whole(&mut self, part: StoredPart, order: &[usize], codecs: &[ByteCodec], indexed: bool) -> Result<()> {
        let decoded_bytes = self.decoded_bytes(&part)?;
        let working_bytes = (self.cost)(codecs, part.place.len(), decoded_bytes);
        self.check_budget(&part, working_bytes)?;
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
                placements,
            });
        }
        Ok(())
    }

    fn decoded_bytes(&self, part: &StoredPart) -> Result<u64> {
        byte_count(&part.extent, self.arrays[part.array].meta.dtype.size())
            .ok_or_else(|| self.chunk_error(part.array, &part.position, Error::corrupt("the chunk is too large")))
    }

    /// Refuses a unit whose decoder needs more than the budget leaves beside the slots it works with.
    fn check_budget(&self, part: &StoredPart, working_bytes: u64) -> Result<()> {
        let workers = u64::from(self.limits.workers);
        let needed_now = working_bytes.saturating_add((workers + 2) * self.limits.slot_bytes);
        if needed_now <= self.limits.staging_bytes {
            return Ok(());
        }
        // Slots take about half of any budget, up to their full size: what is enough leaves the decoder its part.
        let with_its_slots = working_bytes.saturating_mul(2 * (workers + 3)).div_ceil(workers + 4);
        let with_full_slots = working_bytes.saturating_add((workers + 2) * SLOT_BYTES as u64);
        let needed = with_its_slots.min(with_full_slots).max(needed_now);
        let error = Error::new(crate::ErrorKind::Budget, "a chunk cannot be decoded within the memory budget")
            .expected(format_args!("a budget of at least {needed} bytes"))
            .found(format_args!("{} bytes", self.limits.staging_bytes))
            .hint(format!("this codec decodes a chunk only as a whole; give `--memory {needed}` or more"));
        Err(self.chunk_error(part.array, &part.position, error))
    }

    fn shard_error(&self, part: &StoredPart, error: &ShardError) -> Error {
        self.chunk_error(part.array, &part.position, Error::corrupt(error.to_string()))
    }

    fn chunk_error(&self, array: usize, position: &[u64], error: Error) -> Error {
        error.at("chunk", format_args!("{position:?}")).at("array", &self.arrays[array].name)
    }

    fn source(&mut self, place: Place) -> Source {
        match place {
            Place::Inline(bytes) => Source::Inline(bytes),
            Place::File { path, offset, len } => {
                let file = match self.file_of.get(&path) {
                    Some(file) => *file,
                    None => {
                        let file = self.files.len() as u32;
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
        let made = (self.unit_arrays.len() - 1) as u32;
        self.unit_array_of.insert(array, made);
        made
    }

    /// Orders the units, sums up the leaves and groups neighbouring reads.
    fn finish(mut self) -> Result<Plan> {
        let priority = |unit: &Unit| {
            let leaf_of = |placement: &Placement| self.shards[placement.shard as usize].leaf as usize;
            unit.placements.iter().map(|placement| self.leaves[leaf_of(placement)].priority).min().unwrap_or(u32::MAX)
        };
        let mut units: Vec<(Turn, Unit)> = std::mem::take(&mut self.units)
            .into_iter()
            .filter(|unit| !unit.placements.is_empty())
            .map(|unit| {
                let at = match unit.source {
                    Source::File { file, offset, .. } => Some((file, offset)),
                    Source::Inline(_) | Source::Fill(_) => None,
                };
                ((priority(&unit), at), unit)
            })
            .collect();
        units.sort_by_key(|(key, _)| *key);
        let priorities: Vec<u32> = units.iter().map(|((priority, _), _)| *priority).collect();
        let units: Vec<Unit> = units.into_iter().map(|(_, unit)| unit).collect();
        self.count(&units);
        let batches = self.batches(&units, &priorities);
        Ok(Plan {
            leaves: self.leaves,
            shards: self.shards,
            arrays: self.unit_arrays,
            files: self.files,
            units,
            batches,
            limits: self.limits,
        })
    }

    /// Adds every unit to the counts of the leaves it serves. What several leaves share counts for the first.
    fn count(&mut self, units: &[Unit]) {
        for unit in units {
            let mut leaves: Vec<usize> =
                unit.placements.iter().map(|placement| self.shards[placement.shard as usize].leaf as usize).collect();
            leaves.sort_unstable();
            leaves.dedup();
            for &leaf in &leaves {
                self.leaves[leaf].units += 1;
            }
            let array = &self.unit_arrays[unit.array as usize];
            let needed = match unit.source {
                Source::Fill(_) => 0,
                _ if addressable(&array.codecs) && !unit.indexed => {
                    let regions: Vec<Region> =
                        unit.placements.iter().map(|placement| placement.region.clone()).collect();
                    union_volume(&regions) * array.dtype.size() as u64
                }
                _ => unit.stored_bytes(),
            };
            if let Some(leaf) = leaves.first().and_then(|&first| self.leaves.get_mut(first)) {
                leaf.bytes_needed += needed;
                leaf.bytes_read += unit.stored_bytes();
                leaf.bytes_decoded += unit.decoded_bytes;
            }
        }
    }

    /// Groups units whose bytes lie near each other in one file, as far as a slot reaches.
    fn batches(&self, units: &[Unit], priorities: &[u32]) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        for (position, unit) in units.iter().enumerate() {
            let position = position as u32;
            let Source::File { file, offset, len } = unit.source else {
                match batches.last_mut() {
                    Some(Batch { read: None, units }) if units.end - units.start < INLINE_UNITS_PER_BATCH => {
                        units.end += 1
                    }
                    _ => batches.push(Batch { read: None, units: position..position + 1 }),
                }
                continue;
            };
            if let Some(Batch { read: Some(read), units }) = batches.last_mut() {
                let end = offset.saturating_add(len).max(read.offset + read.len);
                let near = read.file == file
                    && offset <= (read.offset + read.len).saturating_add(self.limits.merge_gap_bytes)
                    && end - read.offset <= self.limits.slot_bytes
                    && priorities[units.start as usize] == priorities[position as usize];
                if near {
                    read.len = end - read.offset;
                    units.end += 1;
                    continue;
                }
            }
            batches.push(Batch { read: Some(ReadRange { file, offset, len }), units: position..position + 1 });
        }
        batches
    }
}

impl Placement {
    /// The same placement, counted from the first element of a box that it lies in.
    fn relative_to(mut self, to: &Region) -> Self {
        for dim in 0..self.region.rank() {
            self.region.start[dim] -= to.start[dim];
        }
        self
    }

    /// The same placement with the unit's dimensions in another order: new dimension `i` is old dimension `order[i]`.
    fn permuted(self, order: &[usize]) -> Self {
        let region =
            Region { start: permuted(&self.region.start, order), extent: permuted(&self.region.extent, order) };
        Self { shard: self.shard, region, strides: permuted(&self.strides, order), start: self.start }
    }
}

/// Whether elements can be read by offset: nothing but checksums behind the elements.
fn addressable(codecs: &[ByteCodec]) -> bool {
    codecs.iter().all(|codec| matches!(codec, ByteCodec::Crc32c))
}

fn permuted(values: &[u64], order: &[usize]) -> Vec<u64> {
    order.iter().map(|&dim| values[dim]).collect()
}

/// First `outer`, then `inner`: dimension `i` of the result is dimension `outer[inner[i]]`.
fn compose(outer: &[usize], inner: &[usize]) -> Vec<usize> {
    inner.iter().map(|&dim| outer[dim]).collect()
}

/// When a unit has its turn: by priority, then by file and offset; units without a read come first.
type Turn = (u32, Option<(u32, u64)>);

/// What the `crc32c` codec adds to a chunk.
const CRC32C_BYTES: u64 = 4;

/// How many units without a read one task takes: enough to make the task worth its scheduling.
const INLINE_UNITS_PER_BATCH: u32 = 64;

/// A unit's slabs, when it does not fit one slot.
impl Unit {
    /// The unit in pieces of at most `slot_bytes`, in the order of its bytes.
    pub fn slabs(&self, element: usize, slot_bytes: u64) -> Slabs {
        Slabs::new(&self.shape, element, slot_bytes.max(element as u64))
    }
}
