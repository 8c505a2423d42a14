//! Makes a [`Plan`]: what every shard wants of every stored array, and where the chunks of that are.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::held::Making;
use super::parts::{Place, StoredPart};
use super::sparse::{Block, absent, elements, inside, positions_in, sealed_positions};
use super::{
    DecoderCost, Limits, Part, Placement, Plan, PlannedLeaf, PlannedShard, StoredArray, Unit, UnitArray, Values, Want,
    id,
};
use crate::error::{Error, Result};
use crate::kv::Value;
use crate::limits::{CHUNKS_LOOKED_UP_MAX, CHUNKS_MAX};
use crate::need::{Answer, Asker, Need, unfit};
use crate::relpath::RelPath;
use crate::shape::{Region, byte_count, strides};
use crate::zarr::{Grid, Layout};

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
    run(Planner::new(arrays, limits, cost), ask, wants).await
}

/// The same with every stored value (an inner chunk, where a chunk has several) as one unit, also those of which parts would do:
/// for who looks at what is stored.
///
/// # Errors
/// As [`build`].
pub async fn build_whole(
    ask: &Asker,
    arrays: &[StoredArray],
    wants: Vec<Want>,
    limits: Limits,
    cost: DecoderCost,
) -> Result<Plan> {
    let mut planner = Planner::new(arrays, limits, cost);
    planner.whole = true;
    run(planner, ask, wants).await
}

async fn run(mut planner: Planner<'_>, ask: &Asker, wants: Vec<Want>) -> Result<Plan> {
    for want in wants {
        planner.want(want)?;
    }
    let mut chunks = planner.sparse_chunks(ask).await?;
    chunks.extend(planner.chunks()?);
    let mut parts = planner.locate(ask, chunks).await?;
    // One round for each level of shards inside shards; nearly always none or one.
    while !parts.is_empty() {
        parts = planner.expand(ask, parts).await?;
    }
    planner.finish()
}

/// What is known of the plan so far. `parts.rs` makes its units, `order.rs` its batches.
pub(super) struct Planner<'a> {
    pub(super) arrays: &'a [StoredArray],
    pub(super) limits: Limits,
    pub(super) cost: DecoderCost,
    /// Whether stored values are not cut into ranges.
    pub(super) whole: bool,
    pub(super) leaves: Vec<PlannedLeaf>,
    pub(super) shards: Vec<PlannedShard>,
    /// Per stored array: what is wanted of it.
    demands: BTreeMap<usize, Vec<Demand>>,
    /// Stored array to position in `unit_arrays`.
    pub(super) unit_array_of: HashMap<usize, u32>,
    pub(super) unit_arrays: Vec<UnitArray>,
    pub(super) files: Vec<RelPath>,
    pub(super) file_of: HashMap<RelPath, u32>,
    pub(super) units: Vec<Unit>,
    /// What it all takes so far.
    pub(super) making: Making,
    /// The unit that needs the largest budget of those that do not fit this one, and that budget.
    pub(super) over_budget: Option<(u64, Error)>,
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

impl<'a> Planner<'a> {
    fn new(arrays: &'a [StoredArray], limits: Limits, cost: DecoderCost) -> Self {
        Self {
            arrays,
            limits,
            cost,
            whole: false,
            leaves: Vec::new(),
            shards: Vec::new(),
            demands: BTreeMap::new(),
            unit_array_of: HashMap::new(),
            unit_arrays: Vec::new(),
            files: Vec::new(),
            file_of: HashMap::new(),
            units: Vec::new(),
            making: Making::default(),
            over_budget: None,
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
        let leaf = id(self.leaves.len());
        let mut shard_of: HashMap<(Region, Option<u32>), u32> = HashMap::new();
        let mut parts = Vec::with_capacity(want.sharding.mesh.devices().len());
        let process = want.sharding.mesh.process();
        for (position, device) in want.sharding.mesh.devices().iter().enumerate() {
            let region = want.sharding.region(&want.shape, position);
            let local = device.rank == process.rank;
            let shard = local.then(|| {
                let shard = *shard_of.entry((region.clone(), device.device.gpu())).or_insert_with(|| {
                    let bytes = region.volume() * size as u64;
                    self.shards.push(PlannedShard {
                        leaf,
                        region: region.clone(),
                        devices: Vec::new(),
                        bytes,
                        init: None,
                        copy_of: None,
                        counted_elsewhere: false,
                    });
                    id(self.shards.len() - 1)
                });
                self.shards[shard as usize].devices.push(id(position));
                shard
            });
            parts.push(Part { region, shard });
        }
        let mut shards: Vec<((Region, Option<u32>), u32)> = shard_of.into_iter().collect();
        shards.sort_unstable_by_key(|(_, shard)| *shard);
        for ((region, gpu), shard) in &shards {
            let on_host = shards.iter().any(|((other, on), _)| other == region && on.is_none());
            self.shards[*shard as usize].counted_elsewhere = gpu.is_some() && on_host;
            // Of replicas on several GPUs one is loaded, a different one for every leaf, and the others are copies of it.
            let equal: Vec<u32> = shards
                .iter()
                .filter(|((other, on), _)| other == region && on.is_some())
                .map(|(_, shard)| *shard)
                .collect();
            match equal.get(leaf as usize % equal.len().max(1)) {
                Some(first) if gpu.is_some() && first != shard => self.shards[*shard as usize].copy_of = Some(*first),
                _ => self.demand(&want, region, *shard)?,
            }
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

    /// Ranks of the arrays that are wanted, and about how many chunks and inner chunks are.
    pub(super) fn touched(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.demands.iter().map(|(&array, demands)| {
            let meta = &self.arrays[array].meta;
            let inner = match &meta.layout {
                Layout::Plain(_) => 0,
                Layout::Sharded(sharded) => sharded.inner_count(),
            };
            let touched = demands.iter().map(|demand| meta.grid.touched_count(&demand.stored).unwrap_or(u64::MAX));
            let touched = touched.fold(0, u64::saturating_add);
            (meta.shape.len(), touched.saturating_mul(1 + inner).min(CHUNKS_MAX))
        })
    }

    /// Whether so many chunks of an array are wanted that those which exist are listed instead of being looked up.
    fn is_sparse(&self, array: usize) -> bool {
        let grid = &self.arrays[array].meta.grid;
        let wanted = self.demands.get(&array).into_iter().flatten().map(|demand| grid.touched_count(&demand.stored));
        let wanted = wanted.into_iter().try_fold(0u64, |sum, count| sum.checked_add(count?));
        wanted.is_none_or(|wanted| wanted > CHUNKS_LOOKED_UP_MAX)
    }

    /// The stored chunks of arrays of very many; what of them is not stored becomes a few fill units.
    async fn sparse_chunks(&mut self, ask: &Asker) -> Result<Vec<Wanted>> {
        let mut chunks = Vec::new();
        let arrays: Vec<usize> = self.demands.keys().copied().filter(|array| self.is_sparse(*array)).collect();
        for array in arrays {
            let grid = self.arrays[array].meta.grid.clone();
            let demands = self.demands.get(&array).map_or(0, Vec::len);
            let block = |planner: &Self, index: usize| grid.block(&planner.demands[&array][index].stored);
            let blocks: Vec<Block> = (0..demands).filter_map(|index| block(self, index)).collect();
            let present = positions_in(ask, &self.arrays[array], &blocks).await?;
            let too_many = || {
                Error::corrupt("too many chunks are wanted")
                    .at("array", &self.arrays[array].name)
                    .expected(format_args!("at most {CHUNKS_MAX}"))
            };
            if present.len() as u64 > CHUNKS_MAX {
                return Err(too_many());
            }
            if let Some(lost) = sealed_positions(&self.arrays[array], &blocks).find(|at| !present.contains(at)) {
                return Err(self.chunk_error(array, &lost, sealed_chunk()));
            }
            let mut fills = Vec::new();
            for index in 0..demands {
                let Some(block) = block(self, index) else { continue };
                for absent in absent(&block, &present).ok_or_else(too_many)? {
                    let region = elements(&grid, &absent).ok_or_else(too_many)?;
                    let wanted = Wanted { array, position: absent.0, demands: vec![index] };
                    let placements = self.placements(&wanted, &region);
                    fills.push((wanted.position, region.extent, placements));
                }
            }
            for (position, extent, placements) in fills {
                if self.arrays[array].every_chunk_stored {
                    return Err(self.chunk_error(array, &position, missing_chunk()));
                }
                self.push_fill(array, &position, None, &extent, placements);
            }
            for position in present {
                let touches = |index: &usize| block(self, *index).is_some_and(|block| inside(&block, &position));
                let demands: Vec<usize> = (0..demands).filter(touches).collect();
                if !self.making.add(&self.limits, position.len(), demands.len()) {
                    return Err(self.too_many());
                }
                chunks.push(Wanted { array, position, demands });
            }
        }
        Ok(chunks)
    }

    /// The chunks that some demand touches, array by array, in grid order; those of arrays of very many are found apart.
    fn chunks(&mut self) -> Result<Vec<Wanted>> {
        let mut chunks = Vec::new();
        for (&array, demands) in &self.demands {
            let stored = &self.arrays[array];
            if self.is_sparse(array) {
                continue;
            }
            let mut touched: BTreeMap<Vec<u64>, Vec<usize>> = BTreeMap::new();
            for (index, demand) in demands.iter().enumerate() {
                for position in stored.meta.grid.positions(&demand.stored) {
                    touched.entry(position).or_default().push(index);
                }
            }
            for (position, demands) in touched {
                if !self.making.add(&self.limits, position.len(), demands.len()) {
                    return Err(self.too_many());
                }
                chunks.push(Wanted { array, position, demands });
            }
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
            let array = chunks[at].array;
            let sealed = || self.arrays[array].sums.as_ref().is_some_and(|sums| sums.has(&path));
            places[at] = match answer {
                Answer::Size(len) => Some(Place::File { path, offset: 0, len }),
                Answer::Missing if sealed() => {
                    return Err(self.chunk_error(array, &chunks[at].position, sealed_chunk()));
                }
                Answer::Missing => None,
                other => return Err(unfit(Some(&other))),
            };
        }
        let mut parts = Vec::with_capacity(chunks.len());
        self.units.reserve(chunks.len());
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
                    return Err(self.chunk_error(array, &position, missing_chunk()));
                }
                None => self.push_fill(array, &position, None, &region.extent, placements),
            }
        }
        Ok(parts)
    }

    /// The elements of a chunk of a grid.
    pub(super) fn region(&self, grid: &Grid, array: usize, position: &[u64]) -> Result<Region> {
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
}

/// The error for a chunk that is not stored although it should be.
fn missing_chunk() -> Error {
    Error::not_found("a chunk is missing, although the checkpoint says that every chunk is stored")
        .hint("the checkpoint is incomplete: copy it again; `touchdown verify` lists what is missing")
}

/// The error for a chunk that is not stored although it was when the checkpoint was sealed.
fn sealed_chunk() -> Error {
    Error::not_found("a chunk is missing that was there when the checkpoint was sealed")
        .hint("the checkpoint is incomplete: copy it again; `touchdown verify` lists what is missing")
}
