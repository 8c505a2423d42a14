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
use crate::limits::{CHUNKS_MAX, RANGES_PER_CHUNK_MAX};
use crate::need::{Answer, Asker, Need, unfit};
use crate::relpath::RelPath;
use crate::shape::{Region, byte_count, strides};
use crate::zarr::shard::{ShardError, ShardIndex, index_range};
use crate::zarr::{ByteCodec, Chunk, Grid, Layout};

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
    let located = planner.locate(ask, chunks).await?;
    for chunk in located {
        planner.units_of(chunk)?;
    }
    planner.finish()
}

struct Planner<'a> {
    arrays: &'a [StoredArray],
    limits: Limits,
    cost: DecoderCost,
    leaves: Vec<PlannedLeaf>,
    priorities: Vec<u32>,
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

/// A chunk and where its value is; for shards of several inner chunks also their index.
struct Located {
    wanted: Wanted,
    value: Option<Place>,
    index: Option<ShardIndex>,
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
            priorities: Vec::new(),
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
            bytes_logical,
            bytes_needed: 0,
            bytes_decoded: 0,
            bytes_read: 0,
            units: 0,
        });
        self.priorities.push(want.priority);
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

    /// Finds every chunk's value: two batches of questions at most, sizes first, then shard indexes.
    async fn locate(&self, ask: &Asker, chunks: Vec<Wanted>) -> Result<Vec<Located>> {
        let mut located: Vec<Located> = Vec::with_capacity(chunks.len());
        let mut sizes = Vec::new();
        for wanted in chunks {
            let stored = &self.arrays[wanted.array];
            let key = stored.meta.keys.key(&wanted.position);
            let value = match &stored.values {
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
                    sizes.push((located.len(), Need::Size { path: path.clone() }));
                    Some(Place::File { path, offset: 0, len: 0 })
                }
                Values::Extent { path, offset, len } => {
                    Some(Place::File { path: path.clone(), offset: *offset, len: *len })
                }
            };
            located.push(Located { wanted, value, index: None });
        }
        let answers = ask.ask(sizes.iter().map(|(_, need)| need.clone()).collect()).await?;
        for ((index, _), answer) in sizes.into_iter().zip(answers) {
            match (answer, &mut located[index].value) {
                (Answer::Size(size), Some(Place::File { len, .. })) => *len = size,
                (Answer::Missing, value) => *value = None,
                (other, _) => return Err(unfit(Some(&other))),
            }
        }
        self.read_shard_indexes(ask, &mut located).await?;
        Ok(located)
    }

    /// Reads the index of every shard whose inner chunks are wanted apart.
    async fn read_shard_indexes(&self, ask: &Asker, located: &mut [Located]) -> Result<()> {
        let mut asked = Vec::new();
        let mut needs = Vec::new();
        for (position, chunk) in located.iter_mut().enumerate() {
            let stored = &self.arrays[chunk.wanted.array];
            let Layout::Sharded { index_crc32c, index_location, .. } = &stored.meta.layout else { continue };
            let Some(place) = &chunk.value else { continue };
            if self.reads_shard_whole(stored, place) {
                continue;
            }
            let inner_count = stored.meta.inner_count();
            let range = index_range(*index_location, place.len(), inner_count, *index_crc32c)
                .map_err(|error| self.shard_error(&chunk.wanted, &error))?;
            match place.part(range.start, range.end - range.start)? {
                Place::Inline(bytes) => chunk.index = Some(self.shard_index(&chunk.wanted, place.len(), &bytes)?),
                Place::File { path, offset, len } => {
                    asked.push(position);
                    needs.push(Need::Range { path, offset, len });
                }
            }
        }
        let answers = ask.ask(needs).await?;
        for (position, answer) in asked.into_iter().zip(answers) {
            let chunk = &mut located[position];
            match answer {
                Answer::Bytes(bytes) => {
                    let value_len = chunk.value.as_ref().map_or(0, Place::len);
                    chunk.index = Some(self.shard_index(&chunk.wanted, value_len, &bytes)?);
                }
                Answer::Missing => {
                    let error = Error::not_found("a data file of the checkpoint is missing");
                    return Err(self.chunk_error(&chunk.wanted, error));
                }
                other => return Err(unfit(Some(&other))),
            }
        }
        Ok(())
    }

    fn shard_index(&self, wanted: &Wanted, value_len: u64, bytes: &[u8]) -> Result<ShardIndex> {
        let meta = &self.arrays[wanted.array].meta;
        let Layout::Sharded { index_endian, index_crc32c, .. } = &meta.layout else {
            return Err(Error::bug("an array without shards has no shard index"));
        };
        ShardIndex::parse(bytes, meta.inner_count(), *index_endian, *index_crc32c, value_len)
            .map_err(|error| self.shard_error(wanted, &error))
    }

    fn shard_error(&self, wanted: &Wanted, error: &ShardError) -> Error {
        self.chunk_error(wanted, Error::corrupt(error.to_string()))
    }

    /// Whether a shard is one unit whose index is followed while decoding: it has one inner chunk, which must be decoded
    /// whole anyway, and it fits a slot. This saves a request per chunk for what Orbax writes by default.
    fn reads_shard_whole(&self, stored: &StoredArray, place: &Place) -> bool {
        let Layout::Sharded { inner, .. } = &stored.meta.layout else { return false };
        stored.meta.inner_count() == 1 && !addressable(&inner.codecs) && place.len() <= self.limits.slot_bytes
    }

    /// Makes the units of one chunk.
    fn units_of(&mut self, located: Located) -> Result<()> {
        let Located { wanted, value, index } = located;
        let stored = &self.arrays[wanted.array];
        let meta = Arc::clone(&stored.meta);
        let chunk_region = self.region(&meta.grid, &wanted, &wanted.position)?;
        let array = self.unit_array(wanted.array);
        let Some(place) = value else {
            if stored.every_chunk_stored {
                let error = Error::not_found("a chunk is missing, although the checkpoint says that every chunk is stored")
                    .hint("the checkpoint is incomplete; copy it again, or `touchdown verify` lists everything that is missing");
                return Err(self.chunk_error(&wanted, error));
            }
            let placements = self.placements(&wanted, &chunk_region, &identity(chunk_region.rank()));
            return self.push_fill(array, &wanted, None, &chunk_region.extent, placements);
        };
        match &meta.layout {
            Layout::Plain(chunk) => {
                let placements = self.placements(&wanted, &chunk_region, &chunk.order);
                let shape = permuted(&chunk_region.extent, &chunk.order);
                self.push_units(array, &wanted, None, &place, chunk, shape, placements)
            }
            Layout::Sharded { order, inner_shape, inner, .. } => {
                let outer_shape = permuted(&chunk_region.extent, order);
                if index.is_none() {
                    let order = compose(order, &inner.order);
                    let placements = self.placements(&wanted, &chunk_region, &order);
                    let shape = permuted(&chunk_region.extent, &order);
                    return self.push_indexed(array, &wanted, place, inner, shape, placements);
                }
                let Some(index) = index else { return Err(Error::bug("a shard was not given its index")) };
                // Everything below is in stored dimension order: demands of the chunk, then of each inner chunk.
                let in_chunk = self.placements(&wanted, &chunk_region, order);
                let counts: Vec<u64> =
                    outer_shape.iter().zip(inner_shape).map(|(outer, inner)| outer / inner).collect();
                let inner_strides = strides(&counts);
                let mut touched: BTreeMap<u64, Vec<Placement>> = BTreeMap::new();
                let grid =
                    Grid::new(inner_shape.clone()).ok_or_else(|| Error::bug("a parsed inner chunk has no extent"))?;
                for placement in &in_chunk {
                    for position in grid.positions(&placement.region) {
                        let number = position.iter().zip(&inner_strides).map(|(at, stride)| at * stride).sum();
                        let inner_region = self.region(&grid, &wanted, &position)?;
                        let Some(mut part) = placement.clip(&inner_region) else { continue };
                        for dim in 0..part.region.rank() {
                            part.region.start[dim] -= inner_region.start[dim];
                        }
                        touched.entry(number).or_default().push(part.permuted(&inner.order));
                    }
                }
                for (number, placements) in touched {
                    let shape = permuted(inner_shape, &inner.order);
                    match index.entry(number) {
                        Some((offset, len)) => {
                            let part = place.part(offset, len)?;
                            self.push_units(array, &wanted, Some(number), &part, inner, shape, placements)?;
                        }
                        None if stored.every_chunk_stored && meta.inner_count() == 1 => {
                            let error = Error::not_found(
                                "a shard is empty, although the checkpoint says that every chunk is stored",
                            );
                            return Err(self.chunk_error(&wanted, error));
                        }
                        None => self.push_fill(array, &wanted, Some(number), &shape, placements)?,
                    }
                }
                Ok(())
            }
        }
    }

    /// The elements of a chunk of a grid.
    fn region(&self, grid: &Grid, wanted: &Wanted, position: &[u64]) -> Result<Region> {
        grid.region(position)
            .ok_or_else(|| self.chunk_error(wanted, Error::corrupt("a chunk's indices do not fit 64 bits")))
    }

    /// Where the demands on a chunk go: boxes relative to the chunk, with dimensions in stored order.
    fn placements(&self, wanted: &Wanted, chunk: &Region, order: &[usize]) -> Vec<Placement> {
        let Some(demands) = self.demands.get(&wanted.array) else { return Vec::new() };
        let place = |&index: &usize| {
            let demand = &demands[index];
            let whole = Placement {
                shard: demand.shard,
                region: demand.stored.clone(),
                strides: demand.strides.clone(),
                start: demand.start,
            };
            let mut part = whole.clip(chunk)?;
            for dim in 0..part.region.rank() {
                part.region.start[dim] -= chunk.start[dim];
            }
            Some(part.permuted(order))
        };
        wanted.demands.iter().filter_map(place).collect()
    }

    /// A unit that is not stored.
    fn push_fill(
        &mut self,
        array: u32,
        wanted: &Wanted,
        inner: Option<u64>,
        shape: &[u64],
        placements: Vec<Placement>,
    ) -> Result<()> {
        let fill = Bytes::copy_from_slice(&self.arrays[wanted.array].meta.fill);
        self.units.push(Unit {
            array,
            chunk: wanted.position.clone(),
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
        Ok(())
    }

    /// A shard of one inner chunk, read and decoded whole, its index followed on the way.
    fn push_indexed(
        &mut self,
        array: u32,
        wanted: &Wanted,
        place: Place,
        chunk: &Chunk,
        shape: Vec<u64>,
        placements: Vec<Placement>,
    ) -> Result<()> {
        let decoded = self.decoded_bytes(wanted, &shape)?;
        let working_bytes = (self.cost)(&chunk.codecs, place.len(), decoded);
        self.check_budget(wanted, working_bytes)?;
        let source = self.source(place);
        let whole = true;
        self.push_unit(Unit {
            array,
            chunk: wanted.position.clone(),
            inner: None,
            source,
            shape,
            skip: 0,
            decoded_bytes: decoded,
            whole,
            indexed: true,
            working_bytes,
            placements,
        });
        Ok(())
    }

    /// The units of one encoded chunk or inner chunk: ranges if it is addressable, else one.
    #[allow(clippy::too_many_arguments)] // one call site each for chunks and inner chunks; a struct would only rename them
    fn push_units(
        &mut self,
        array: u32,
        wanted: &Wanted,
        inner: Option<u64>,
        place: &Place,
        chunk: &Chunk,
        shape: Vec<u64>,
        placements: Vec<Placement>,
    ) -> Result<()> {
        let decoded = self.decoded_bytes(wanted, &shape)?;
        let element = self.arrays[wanted.array].meta.dtype.size() as u64;
        let trailer = 4 * chunk.codecs.len() as u64;
        let checked = !chunk.codecs.is_empty();
        if addressable(&chunk.codecs) {
            if place.len() != decoded + trailer {
                let error = Error::corrupt("an uncompressed chunk has the wrong size")
                    .expected(format_args!("{} bytes", decoded + trailer))
                    .found(format_args!("{} bytes", place.len()));
                return Err(self.chunk_error(wanted, error));
            }
            let whole_is_better = match self.limits.verify {
                Verify::Full => checked,
                Verify::Auto => {
                    checked && {
                        let regions: Vec<Region> =
                            placements.iter().map(|placement| placement.region.clone()).collect();
                        (decoded - union_volume(&regions) * element) <= self.limits.merge_gap_bytes
                    }
                }
                Verify::Off => false,
            };
            if !whole_is_better {
                return self.push_ranges(array, wanted, inner, place, shape, placements);
            }
        }
        let working_bytes = (self.cost)(&chunk.codecs, place.len(), decoded);
        self.check_budget(wanted, working_bytes)?;
        let source = self.source(place.clone());
        self.push_unit(Unit {
            array,
            chunk: wanted.position.clone(),
            inner,
            source,
            shape,
            skip: 0,
            decoded_bytes: decoded,
            whole: true,
            indexed: false,
            working_bytes,
            placements,
        });
        Ok(())
    }

    /// The needed byte ranges of an uncompressed chunk, each a unit of its own.
    fn push_ranges(
        &mut self,
        array: u32,
        wanted: &Wanted,
        inner: Option<u64>,
        place: &Place,
        shape: Vec<u64>,
        placements: Vec<Placement>,
    ) -> Result<()> {
        let element = self.arrays[wanted.array].meta.dtype.size() as u64;
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
        let checked = place.len() != self.decoded_bytes(wanted, &shape)?;
        for range in ranges {
            let placements = placements.iter().filter_map(|placement| {
                let mut part = placement.clip(&range.region)?;
                for dim in 0..part.region.rank() {
                    part.region.start[dim] -= range.region.start[dim];
                }
                Some(part)
            });
            let base: u64 =
                strides(&shape).iter().zip(&range.region.start).map(|(stride, at)| stride * at * element).sum();
            let whole = range.len == place.len() && !checked;
            let placements = placements.collect();
            let source = self.source(place.part(range.offset, range.len)?);
            self.push_unit(Unit {
                array,
                chunk: wanted.position.clone(),
                inner,
                source,
                shape: range.region.extent,
                skip: range.offset - base,
                decoded_bytes: range.len,
                whole,
                indexed: false,
                working_bytes: 0,
                placements,
            });
        }
        Ok(())
    }

    fn push_unit(&mut self, unit: Unit) {
        self.units.push(unit);
    }

    fn decoded_bytes(&self, wanted: &Wanted, shape: &[u64]) -> Result<u64> {
        byte_count(shape, self.arrays[wanted.array].meta.dtype.size())
            .ok_or_else(|| self.chunk_error(wanted, Error::corrupt("the chunk is too large")))
    }

    /// Refuses a unit whose decoder needs more than the budget leaves beside the slots it works with.
    fn check_budget(&self, wanted: &Wanted, working_bytes: u64) -> Result<()> {
        let slots = (u64::from(self.limits.workers) + 2) * self.limits.slot_bytes;
        let needed = working_bytes.saturating_add(slots);
        if needed <= self.limits.staging_bytes {
            return Ok(());
        }
        let error = Error::new(crate::ErrorKind::Budget, "a chunk cannot be decoded within the memory budget")
            .expected(format_args!("a budget of at least {needed} bytes"))
            .found(format_args!("{} bytes", self.limits.staging_bytes))
            .hint(format!("this codec decodes a chunk only as a whole; give `--memory {needed}` or more"));
        Err(self.chunk_error(wanted, error))
    }

    fn chunk_error(&self, wanted: &Wanted, error: Error) -> Error {
        let stored = &self.arrays[wanted.array];
        error.at("chunk", format_args!("{:?}", wanted.position)).at("array", &stored.name)
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
        let (chunk, single) = match &stored.meta.layout {
            Layout::Plain(chunk) => (chunk, None),
            Layout::Sharded { inner, index_location, index_endian, index_crc32c, .. } => {
                let single = SingleShard { location: *index_location, endian: *index_endian, crc32c: *index_crc32c };
                (inner, Some(single))
            }
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
            unit.placements.iter().map(|placement| self.priorities[leaf_of(placement)]).min().unwrap_or(u32::MAX)
        };
        let mut units: Vec<((u32, Option<(u32, u64)>), Unit)> = std::mem::take(&mut self.units)
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

fn identity(rank: usize) -> Vec<usize> {
    (0..rank).collect()
}

fn permuted(values: &[u64], order: &[usize]) -> Vec<u64> {
    order.iter().map(|&dim| values[dim]).collect()
}

/// First `outer`, then `inner`: dimension `i` of the result is dimension `outer[inner[i]]`.
fn compose(outer: &[usize], inner: &[usize]) -> Vec<usize> {
    inner.iter().map(|&dim| outer[dim]).collect()
}

/// How many units without a read one task takes: enough to make the task worth its scheduling.
const INLINE_UNITS_PER_BATCH: u32 = 64;

/// A unit's slabs, when it does not fit one slot.
impl Unit {
    /// The unit in pieces of at most `slot_bytes`, in the order of its bytes.
    pub fn slabs(&self, element: usize, slot_bytes: u64) -> Slabs {
        Slabs::new(&self.shape, element, slot_bytes.max(element as u64))
    }
}
