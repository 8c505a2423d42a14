//! One unit of a plan: stored bytes in, elements in their shards out.
//!
//! [`Landing`] is what all workers of a load share. A unit that fits a slot is landed in one call; a larger one is a
//! [`Stream`] that is fed its stored bytes piece by piece and passes them on slab by slab, so that a chunk of any size
//! needs two slots. What goes to host memory is written there and then; what goes to devices a [`Carrier`] takes along.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::bus::Bus;
use super::carry::{Carrier, Place, Stored};
use super::stream::Stream;
use super::warm::{CRC_BYTES, DeviceRun};
use crate::decode;
use crate::dtype::CastPolicy;
use crate::error::{Error, Result};
use crate::io::Ring;
use crate::layout::orbax::sums::ValueSum;
use crate::place::Gpu;
use crate::place::parcel::{Carried, Span};
use crate::plan::route::{Elements, Route, routes};
use crate::plan::{Placement, Plan, PlannedShard, SingleShard, Source, Unit, UnitArray, Verify};
use crate::shape::{Region, strides};
use crate::transform::cpu::{Cpu, OpError, SharedBytes, convert};
use crate::transform::{Convert, Executor, Op, Step};
use crate::zarr::shard::{ShardError, ShardIndex, index_range};
use crate::zarr::{ByteCodec, Endian};

/// A load at work: the plan, the memory of its shards, and what is counted on the way.
#[derive(Debug)]
pub(super) struct Landing {
    pub(super) plan: Plan,
    /// Memory of every shard of the plan.
    targets: Vec<Target>,
    /// Shards that are copied from another device's, and from which, by leaf.
    pub(super) copies: HashMap<usize, Vec<(usize, usize)>>,
    /// Units that a leaf still waits for.
    pending: Vec<AtomicU64>,
    /// Whether a shard's memory is known to be zero where no unit has written.
    blank: Vec<bool>,
    /// Lossy elements of every leaf.
    pub(super) lossy: Vec<AtomicU64>,
    /// Kernels launched on devices.
    pub(super) launches: AtomicU64,
    /// Time and bytes of decoding, of transforming in host memory, and of bringing to devices.
    pub(super) decode: StageCount,
    pub(super) transform: StageCount,
    pub(super) copy: StageCount,
    /// Units on their way to devices.
    pub(super) bus: Bus,
    /// Stored bytes whose unit was read in part, or was not to be checked.
    pub(super) unverified: AtomicU64,
}

/// The memory of a shard.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Host(SharedBytes),
    Device(Arc<Gpu>, Span),
}

/// Busy time and bytes of one stage, added up by all workers.
#[derive(Debug, Default)]
pub(super) struct StageCount {
    pub(super) busy_ns: AtomicU64,
    pub(super) bytes: AtomicU64,
}

impl StageCount {
    pub(super) fn add(&self, since: Instant, bytes: u64) {
        let ns = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.busy_ns.fetch_add(ns, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Landing {
    /// Prepares a load.
    ///
    /// # Safety
    /// `targets` are the memory of `plan.shards`, in order, valid and untouched by others as long as this value exists.
    #[allow(unsafe_code)]
    pub(super) unsafe fn new(plan: Plan, targets: Vec<Target>, zeroed: &[bool]) -> Self {
        let mut pending = vec![0u64; plan.leaves.len()];
        for unit in &plan.units {
            leaves_of(&plan, unit).into_iter().for_each(|leaf| pending[leaf] += 1);
        }
        let is_blank = |(shard, zeroed): (&PlannedShard, &bool)| {
            *zeroed && shard.init.as_ref().is_none_or(|element| element.iter().all(|byte| *byte == 0))
        };
        let mut copies: HashMap<usize, Vec<(usize, usize)>> = HashMap::new();
        for (shard, planned) in plan.shards.iter().enumerate() {
            if let Some(source) = planned.copy_of {
                copies.entry(planned.leaf as usize).or_default().push((shard, source as usize));
            }
        }
        Self {
            copies,
            blank: plan.shards.iter().zip(zeroed).map(is_blank).collect(),
            targets,
            pending: pending.into_iter().map(AtomicU64::new).collect(),
            lossy: plan.leaves.iter().map(|_| AtomicU64::new(0)).collect(),
            launches: AtomicU64::new(0),
            decode: StageCount::default(),
            transform: StageCount::default(),
            copy: StageCount::default(),
            bus: Bus::new(plan.limits.workers),
            unverified: AtomicU64::new(0),
            plan,
        }
    }

    /// Leaves that no unit belongs to: they are complete once their shards are initialised.
    pub(super) fn leaves_without_units(&self) -> Vec<usize> {
        (0..self.pending.len()).filter(|&leaf| self.pending[leaf].load(Ordering::Acquire) == 0).collect()
    }

    /// Lossy elements of a leaf so far.
    pub(super) fn lossy(&self, leaf: usize) -> u64 {
        self.lossy[leaf].load(Ordering::Acquire)
    }

    /// Stored bytes that no check vouches for.
    pub(super) fn bytes_unverified(&self) -> u64 {
        self.unverified.load(Ordering::Acquire)
    }

    /// Writes the padding element wherever shards are not covered by units; blank memory needs no zeros.
    pub(super) fn initialise(&self, ring: &Arc<Ring>) -> Result<()> {
        let mut carrier = Carrier::new(self, ring);
        for (shard_id, (shard, planned)) in (0..).zip(self.plan.shards.iter().enumerate()) {
            let Some(element) = planned.init.as_deref().filter(|_| !self.blank[shard]) else { continue };
            match &self.targets[shard] {
                Target::Host(target) => {
                    #[allow(unsafe_code)]
                    // SAFETY: shards are initialised before any unit lands, each by one thread.
                    let bytes = unsafe { target.slice_mut(0, target.len()) };
                    bytes.chunks_exact_mut(element.len().max(1)).for_each(|slot| slot.copy_from_slice(element));
                }
                Target::Device(gpu, target) => {
                    let dtype = self.plan.leaves[planned.leaf as usize].dtype;
                    let op = Op {
                        extent: vec![planned.region.volume()],
                        source_strides: vec![0],
                        target_strides: vec![1],
                        source_start: 0,
                        target_start: 0,
                        convert: Convert { from: dtype, to: dtype, swap: false, policy: CastPolicy::Saturate },
                    };
                    let whole = Carried { op, route: Route::Kernel, target: *target, shard: shard_id };
                    carrier.take(Place::Stored(Stored::all(element)), gpu, vec![whole]);
                }
            }
        }
        carrier.send()
    }

    /// Lands a unit whose stored bytes are all at hand; what of it goes to devices is on its way when the carrier is finished.
    /// Returns the leaves that are complete by it.
    ///
    /// # Errors
    /// Bytes that do not decode, with the chunk and the array.
    pub(super) fn land<'s>(
        &'s self,
        position: u32,
        stored: Stored<'s>,
        carrier: &mut Carrier<'s>,
    ) -> Result<Vec<usize>> {
        let unit = &self.plan.units[position as usize];
        let array = &self.plan.arrays[unit.array as usize];
        self.land_whole(unit, array, stored, carrier).map_err(|error| located(error, &self.plan, unit))?;
        carrier.landed(position)
    }

    fn land_whole<'s>(
        &'s self,
        unit: &'s Unit,
        array: &'s UnitArray,
        stored: Stored<'s>,
        carrier: &mut Carrier<'s>,
    ) -> Result<()> {
        if let Source::Fill(element) = &unit.source {
            return self.fill(unit, array, element, carrier);
        }
        if let Some(sum) = unit.sum {
            check_sum(&sum, stored.bytes())?;
        }
        let stored = match (unit.indexed, array.single) {
            (true, Some(single)) => match inner_of(unit, stored.bytes(), single)? {
                Some(inner) => stored
                    .part(inner.start, inner.len())
                    .ok_or_else(|| Error::bug("an inner chunk outside its shard"))?,
                None if array.every_chunk_stored => {
                    return Err(Error::not_found(
                        "a shard is empty, although the checkpoint says that every chunk is stored",
                    ));
                }
                None => return self.fill(unit, array, &array.fill, carrier),
            },
            _ => stored,
        };
        let verify = self.plan.limits.verify != Verify::Off;
        if !unit.whole || !verify {
            self.unverified.fetch_add(stored.len as u64, Ordering::Relaxed);
        }
        let (plain, stored) = match unit.whole.then(|| self.plain(unit, array, stored, verify)).transpose()?.flatten() {
            Some(body) => (true, body),
            None => (!unit.whole, stored),
        };
        if plain {
            expect_len(stored.len as u64, unit.decoded_bytes)?;
            let lies = Lies { strides: strides(&unit.shape), skip_bytes: unit.skip };
            let mut place = Place::Stored(stored);
            let small = stored.len as u64 <= self.plan.limits.slot_bytes;
            if matches!(unit.source, Source::Inline(_)) && small && self.goes_to_devices(unit) {
                // A value of the metadata lies alone in memory that is not locked: here it crosses with its neighbours.
                let (gathered, room) = carrier.room(stored.len)?;
                room.copy_from_slice(stored.bytes());
                place = gathered;
            }
            return self.place(unit, array, &unit.placements, &lies, place, carrier);
        }
        if let Some(target) = self.direct(unit, array) {
            let start = Instant::now();
            decode::decode_all(&array.codecs, stored.bytes(), target, verify)?;
            self.decode.add(start, unit.decoded_bytes);
            return Ok(());
        }
        if unit.decoded_bytes <= self.plan.limits.slot_bytes {
            let (place, decoded) = carrier.room(usize_of(unit.decoded_bytes)?)?;
            let start = Instant::now();
            decode::decode_all(&array.codecs, stored.bytes(), decoded, verify)?;
            self.decode.add(start, unit.decoded_bytes);
            let lies = Lies { strides: strides(&unit.shape), skip_bytes: 0 };
            return self.place(unit, array, &unit.placements, &lies, place, carrier);
        }
        let mut stream = Stream::new(self, unit, stored.len as u64, carrier.ring())?;
        stream.feed(self, unit, stored.bytes(), carrier.ring())?;
        stream.finish(unit)
    }

    /// The elements of a whole unit that is stored as they are, perhaps with checksums behind them; `None` for encoded ones.
    fn plain<'s>(
        &self,
        unit: &Unit,
        array: &UnitArray,
        stored: Stored<'s>,
        verify: bool,
    ) -> Result<Option<Stored<'s>>> {
        let start = Instant::now();
        let Some(body) = decode::plain(&array.codecs, stored.bytes(), verify)? else { return Ok(None) };
        if !array.codecs.is_empty() {
            self.decode.add(start, unit.decoded_bytes);
        }
        Ok(stored.part(0, body.len()))
    }

    /// The memory that it takes to have all stored bytes of a unit at hand and to decode them, if that is faster.
    pub(super) fn whole_bytes(&self, position: u32) -> Option<u64> {
        let unit = &self.plan.units[position as usize];
        let array = &self.plan.arrays[unit.array as usize];
        let working = decode::whole_working_bytes(&array.codecs)?;
        self.direct(unit, array).and(unit.stored_bytes().checked_add(working))
    }

    /// Where in its file a unit lies, and the memory of the shard that wants it just as it is stored there; `None` for other units.
    #[allow(clippy::mut_from_ref, reason = "see `direct`")]
    pub(super) fn as_stored(&self, position: u32) -> Option<(u64, &mut [u8])> {
        let unit = &self.plan.units[position as usize];
        let array = &self.plan.arrays[unit.array as usize];
        let Source::File { offset, len, .. } = unit.source else { return None };
        // What is sealed is checked before it lands.
        let plain = array.codecs.is_empty() && unit.sum.is_none() && !unit.indexed && unit.skip == 0;
        if !plain || len != unit.decoded_bytes {
            return None;
        }
        self.direct(unit, array).map(|target| (offset, target))
    }

    /// Counts off a unit that was read to where [`as_stored`](Self::as_stored) said.
    pub(super) fn landed_as_stored(&self, position: u32) -> Result<Vec<usize>> {
        let unit = &self.plan.units[position as usize];
        if !unit.whole || self.plan.limits.verify == Verify::Off {
            self.unverified.fetch_add(unit.decoded_bytes, Ordering::Relaxed);
        }
        self.landed(position)
    }

    /// Where a unit lies in its file and in the memory of a device, if it is wanted there just as it is stored, with at most a
    /// checksum behind it; `None` for other units.
    pub(super) fn run_on_device(&self, position: u32) -> Option<DeviceRun<'_>> {
        let unit = &self.plan.units[position as usize];
        let array = &self.plan.arrays[unit.array as usize];
        let Source::File { offset, len, .. } = unit.source else { return None };
        let has_sum = unit.whole && array.codecs[..] == [ByteCodec::Crc32c];
        let plain = !unit.whole || array.codecs.is_empty() || has_sum;
        let body = len.checked_sub(if has_sum { CRC_BYTES } else { 0 })?;
        if !plain || unit.sum.is_some() || unit.indexed || unit.skip != 0 || body != unit.decoded_bytes {
            return None;
        }
        let placement = self.as_it_is(unit, array)?;
        let (gpu, target) = self.on_device(placement.shard as usize)?;
        let start = placement.start * array.dtype.size() as u64;
        let pointer = target.pointer + start;
        let target = Span { pointer, len: target.len.checked_sub(start)? };
        Some(DeviceRun { gpu, target, offset, body, has_sum })
    }

    /// The memory of a shard into which a unit can be decoded as it is: same type, same order, nothing left out.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(super) fn direct(&self, unit: &Unit, array: &UnitArray) -> Option<&mut [u8]> {
        let placement = self.as_it_is(unit, array)?;
        let Target::Host(target) = &self.targets[placement.shard as usize] else { return None };
        let size = array.dtype.size();
        let (start, len) = (usize_of(placement.start).ok()? * size, usize_of(unit.decoded_bytes).ok()?);
        // SAFETY: exactly the elements of this placement, inside the shard by construction of the plan (checked in
        // `slice_mut`), and placements of a plan are disjoint.
        Some(unsafe { target.slice_mut(start, len) })
    }

    /// The placement of a unit that one shard wants as a whole, and as one run of the elements as they are decoded.
    fn as_it_is<'u>(&self, unit: &'u Unit, array: &UnitArray) -> Option<&'u Placement> {
        let [placement] = unit.placements.as_slice() else { return None };
        let convert = self.convert(array, placement);
        let elements =
            Elements { from: convert.from.size() as u64, to: convert.to.size() as u64, plain: convert.is_plain() };
        let device = self.plan.device(&self.plan.shards[placement.shard as usize]);
        let whole = Region::whole(&unit.shape);
        let direct = placement.region == whole
            && routes(&unit.shape, &whole, &[(placement, elements)], device) == [Route::Direct];
        direct.then_some(placement)
    }

    fn convert(&self, array: &UnitArray, placement: &Placement) -> Convert {
        let leaf = &self.plan.leaves[self.plan.shards[placement.shard as usize].leaf as usize];
        Convert { from: array.dtype, to: leaf.dtype, swap: array.endian == Endian::Big, policy: leaf.policy }
    }

    /// Writes one element, in memory form, wherever the unit goes.
    fn fill<'s>(&'s self, unit: &Unit, array: &UnitArray, element: &'s [u8], carrier: &mut Carrier<'s>) -> Result<()> {
        let array = UnitArray { endian: Endian::Little, ..array.clone() };
        let mut placements = unit.placements.clone();
        // Zeros onto fresh zero pages would only make the system back them: a claimed shape must cost nothing.
        placements.retain(|placement| {
            let Convert { from, to, policy, .. } = self.convert(&array, placement);
            let mut wanted = vec![1; to.size()];
            let lossy = convert(from, to, policy, element, &mut wanted);
            let nothing_to_do = lossy == Ok(0) && wanted.iter().all(|byte| *byte == 0);
            !(self.blank[placement.shard as usize] && nothing_to_do)
        });
        let lies = Lies { strides: vec![0; unit.shape.len()], skip_bytes: 0 };
        self.place(unit, &array, &placements, &lies, Place::Stored(Stored::all(element)), carrier)
    }

    /// Puts boxes of decoded elements into shards in host memory, and gives the others to the carrier.
    pub(super) fn place<'s>(
        &'s self,
        unit: &Unit,
        array: &UnitArray,
        placements: &[Placement],
        lies: &Lies,
        decoded: Place<'s>,
        carrier: &mut Carrier<'s>,
    ) -> Result<()> {
        let start = Instant::now();
        let mut moved = 0;
        let mut steps = Vec::with_capacity(placements.len());
        let mut carried: Vec<(&'s Arc<Gpu>, Vec<Wanted<'_>>)> = Vec::new();
        for placement in placements {
            let convert = self.convert(array, placement);
            let first: u64 = placement.region.start.iter().zip(&lies.strides).map(|(at, stride)| at * stride).sum();
            let skip = lies.skip_bytes / convert.from.size() as u64;
            let op = Op {
                extent: placement.region.extent.clone(),
                source_strides: lies.strides.clone(),
                target_strides: placement.strides.clone(),
                source_start: first.checked_sub(skip).ok_or_else(|| Error::bug("a box lies before its unit"))?,
                target_start: placement.start,
                convert,
            };
            let (shard, leaf) = (placement.shard as usize, self.plan.shards[placement.shard as usize].leaf as usize);
            match &self.targets[shard] {
                Target::Host(target) => {
                    steps.push(Step { op, target, lossy: &self.lossy[leaf] });
                    moved += placement.region.volume() * convert.to.size() as u64;
                }
                Target::Device(gpu, target) => {
                    let carried_box = Carried { op, route: Route::Kernel, target: *target, shard: placement.shard };
                    let one = (placement, carried_box);
                    match carried.iter_mut().find(|(have, _)| Arc::ptr_eq(have, gpu)) {
                        Some((_, boxes)) => boxes.push(one),
                        None => carried.push((gpu, vec![one])),
                    }
                }
            }
        }
        if !steps.is_empty() {
            #[allow(unsafe_code)]
            // SAFETY: placements of a plan are disjoint, so no other unit writes these elements, and nobody reads them before
            // the leaf is complete.
            unsafe { Cpu.run(carrier.bytes(decoded), &steps) }.map_err(op_error)?;
            self.transform.add(start, moved);
        }
        for (gpu, boxes) in carried {
            let boxes = self.routed(unit, array, boxes, lies, carrier.bytes(decoded).len());
            carrier.take(decoded, gpu, boxes);
        }
        Ok(())
    }

    /// Boxes of one device with the ways that they go.
    fn routed(
        &self,
        unit: &Unit,
        array: &UnitArray,
        boxes: Vec<Wanted<'_>>,
        lies: &Lies,
        bytes: usize,
    ) -> Vec<Carried> {
        // One element everywhere is a kernel's work.
        if !unit.shape.is_empty() && lies.strides.iter().all(|stride| *stride == 0) {
            return boxes.into_iter().map(|(_, carried)| carried).collect();
        }
        let elements = |(_, carried): &Wanted<'_>| {
            let Convert { from, to, .. } = carried.op.convert;
            Elements { from: from.size() as u64, to: to.size() as u64, plain: carried.op.convert.is_plain() }
        };
        let Some((first, _)) = boxes.first() else { return Vec::new() };
        let device = self.plan.device(&self.plan.shards[first.shard as usize]);
        // What would be sent of the slab is what is there of it.
        let slab = Region { start: vec![0], extent: vec![(bytes / array.dtype.size()) as u64] };
        let wanted: Vec<(&Placement, Elements)> = boxes.iter().map(|one| (one.0, elements(one))).collect();
        let ways = routes(&unit.shape, &slab, &wanted, device);
        boxes.into_iter().zip(ways).map(|((_, carried), route)| Carried { route, ..carried }).collect()
    }

    fn goes_to_devices(&self, unit: &Unit) -> bool {
        unit.placements.iter().any(|placement| self.on_device(placement.shard as usize).is_some())
    }

    /// The device and the memory of a shard, if it is on one.
    pub(super) fn on_device(&self, shard: usize) -> Option<(&Arc<Gpu>, Span)> {
        match &self.targets[shard] {
            Target::Host(_) => None,
            Target::Device(gpu, span) => Some((gpu, *span)),
        }
    }

    /// Counts a landed unit off; returns the leaves that it completes, their replicas included.
    pub(super) fn landed(&self, position: u32) -> Result<Vec<usize>> {
        let unit = &self.plan.units[position as usize];
        let done = |leaf: &usize| self.pending[*leaf].fetch_sub(1, Ordering::AcqRel) == 1;
        let complete: Vec<usize> = leaves_of(&self.plan, unit).into_iter().filter(done).collect();
        complete.iter().try_for_each(|leaf| self.replicate(*leaf))?;
        Ok(complete)
    }
}

/// A placement and what a device is given for it.
type Wanted<'p> = (&'p Placement, Carried);

/// How a box of elements lies in decoded bytes: the distances of its elements, and how many bytes of it lie before them.
pub(super) struct Lies {
    pub(super) strides: Vec<u64>,
    pub(super) skip_bytes: u64,
}

/// What the planner asks of the decoders.
pub(super) fn decoder_cost(chain: &[ByteCodec], encoded: u64, decoded: u64, window_max: u64) -> u64 {
    decode::cost(chain, encoded, decoded, window_max).working_bytes
}

/// Errors with the place in the file, the chunk and the array they belong to.
pub(super) fn located(error: Error, plan: &Plan, unit: &Unit) -> Error {
    let array = &plan.arrays[unit.array as usize];
    let has_file = error.places().any(|(place, _)| place == "file");
    let error = match unit.source {
        Source::File { file, offset, .. } if !has_file => {
            error.at("offset", offset).at("file", &plan.files[file as usize])
        }
        _ => error,
    };
    let error = match unit.inner {
        Some(inner) => error.at("inner chunk", inner),
        None => error,
    };
    error.at("chunk", format_args!("{:?}", unit.chunk)).at("array", &array.name)
}

/// The leaves that a unit belongs to.
pub(super) fn leaves_of(plan: &Plan, unit: &Unit) -> Vec<usize> {
    let mut leaves: Vec<usize> =
        unit.placements.iter().map(|placement| plan.shards[placement.shard as usize].leaf as usize).collect();
    leaves.sort_unstable();
    leaves.dedup();
    leaves
}

/// Checks the part of a unit's stored bytes that was sealed.
fn check_sum(sum: &ValueSum, stored: &[u8]) -> Result<()> {
    let end = sum.offset.saturating_add(sum.len);
    let part = stored.get(usize_of(sum.offset)?..usize_of(end)?);
    sum.check(crc32c::crc32c(part.ok_or_else(|| Error::bug("a unit ends before its checksum"))?))
}

/// Where the only inner chunk of a unit's value is in it; `None` if it is absent. If it was sealed, it is what was sealed.
pub(super) fn inner_of(unit: &Unit, stored: &[u8], single: SingleShard) -> Result<Option<std::ops::Range<usize>>> {
    let inner = inner_chunk(stored, single)?;
    let range = inner.clone().unwrap_or(0..stored.len());
    let sealed = unit.sum.is_none_or(|sum| (sum.offset, sum.len) == (range.start as u64, range.len() as u64));
    if sealed {
        Ok(inner)
    } else {
        Err(Error::corrupt("a shard's index points at another place than when it was sealed"))
    }
}

/// Where the only inner chunk of a shard is in it; `None` if it is absent.
pub(super) fn inner_chunk(stored: &[u8], single: SingleShard) -> Result<Option<std::ops::Range<usize>>> {
    let damaged = |error: ShardError| Error::corrupt(error.to_string());
    let len = stored.len() as u64;
    let range = index_range(single.location, len, 1, single.crc32c).map_err(damaged)?;
    let index = stored.get(usize_of(range.start)?..usize_of(range.end)?).unwrap_or_default();
    let index = ShardIndex::parse(index, 1, single.endian, single.crc32c, len).map_err(damaged)?;
    let Some((offset, len)) = index.entry(0) else { return Ok(None) };
    let range = usize_of(offset)?..usize_of(offset + len)?;
    stored
        .get(range.clone())
        .map(|_| Some(range))
        .ok_or_else(|| Error::corrupt("the shard's index points beyond the shard"))
}

fn expect_len(found: u64, expected: u64) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::corrupt("a chunk has the wrong size")
        .expected(format_args!("{expected} bytes"))
        .found(format_args!("{found} bytes")))
}

/// The bytes of a unit within those of the read that brought it.
pub(super) fn part_of_read(read: &[u8], offset: u64, len: u64) -> Result<Stored<'_>> {
    let part = Stored::all(read).part(usize_of(offset)?, usize_of(len)?);
    part.ok_or_else(|| Error::bug("a unit lies outside its read"))
}

pub(super) fn usize_of(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::corrupt("a size does not fit the address space").found(value))
}

fn op_error(error: OpError) -> Error {
    match error {
        OpError::Outside { .. } => Error::bug(error.to_string()),
        OpError::Cast(cast) => Error::corrupt(cast.to_string()),
    }
}

/// Keeps an error of the lowest unit, so that the same damage gives the same message whatever the timing.
#[derive(Debug, Default)]
pub(super) struct FirstError(Mutex<Option<(u32, Error)>>);

impl FirstError {
    pub(super) fn put(&self, unit: u32, error: Error) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if first.as_ref().is_none_or(|(have, _)| unit < *have) {
            *first = Some((unit, error));
        }
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(super) fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().map(|(_, error)| error)
    }
}
