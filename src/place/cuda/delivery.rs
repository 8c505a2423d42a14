//! Parcels to copies and launches, on one device.
//!
//! What can be copied is copied to where it belongs. What needs a kernel is staged: the part of a slab that is needed, with its
//! neighbours, in one copy, or boxes that the processor packs. Staged boxes wait until there is enough for a launch: many small
//! arrays are one launch, and many small copies become a staged one.

use std::mem::size_of;
use std::ops::Range;

use super::driver::{CopyRows, Current, Outcome};
use super::gpu::Gpu;
use super::lane::{Lane, STAGING_ALIGN, TABLE_BYTES};
use crate::error::{Error, Result};
use crate::limits::{GATHER_COPIES_MIN, GATHER_COPY_BYTES, KERNEL_RANK_MAX, LAUNCH_BOXES_MAX, PACK_BYTES};
use crate::place::parcel::{Carried, Counted, Delivered, Parcel, Span};
use crate::plan::Slabs;
use crate::plan::route::{Route, Rows};
use crate::shape::strides;
use crate::transform::cpu::{OpError, execute_in};
use crate::transform::cuda::{Placement, THREADS, Tally, lower, rank};
use crate::transform::{Convert, Op};

/// Parcels on their way to one device. Dropping it waits until nothing of it is on the way any more.
#[derive(Debug)]
pub(crate) struct Delivery<'g> {
    gpu: &'g Gpu,
    /// Back to the device in the end.
    lane: Option<Lane>,
    /// Staging memory and packing memory that is in use.
    staged: usize,
    packed: usize,
    /// Boxes for the next launch.
    queued: Vec<Queued>,
    /// The shard of every tally of the launch at work.
    launched: Vec<u32>,
    /// Whether anything was given to the streams since they were waited for.
    at_work: bool,
    done: Delivered,
}

/// A staged box.
#[derive(Debug)]
struct Queued {
    op: Op,
    source: Span,
    target: Span,
    shard: u32,
}

impl<'g> Delivery<'g> {
    pub(super) fn new(gpu: &'g Gpu, lane: Lane) -> Self {
        let (queued, launched, done) = Default::default();
        Self { gpu, lane: Some(lane), staged: 0, packed: 0, queued, launched, at_work: false, done }
    }

    /// Waits until everything is where it belongs; what was done and counted on the way.
    ///
    /// # Errors
    /// A device that fails.
    pub(crate) fn finish(mut self) -> Result<Delivered> {
        self.wait().map_err(|error| self.gpu.failed(error))?;
        Ok(std::mem::take(&mut self.done))
    }

    /// Gives parcels to the streams.
    pub(super) fn add(&mut self, parcels: &[Parcel<'_>]) -> Result<()> {
        let small = |carried: &Carried| carried.route == Route::Direct && target_bytes(&carried.op) < GATHER_COPY_BYTES;
        let boxes = || parcels.iter().flat_map(|parcel| &parcel.boxes);
        let gather = boxes().filter(|carried| small(carried)).count() >= GATHER_COPIES_MIN;
        let mut staged: Vec<(usize, Range<usize>, &Carried)> = Vec::new();
        for (number, parcel) in parcels.iter().enumerate() {
            for carried in parcel.boxes.iter().filter(|carried| !carried.op.extent.contains(&0)) {
                let part = touched(&carried.op);
                match carried.route {
                    Route::Direct if !(gather && small(carried)) => self.copy(parcel, carried)?,
                    Route::Rows(rows) if pitches_fit(rows) => self.copy_rows(parcel, carried, rows)?,
                    Route::Pack => self.pack(parcel, carried)?,
                    // More than staging holds: the processor hands it over piece by piece.
                    _ if part.len() > self.gpu.staging.slot_bytes => self.pack(parcel, carried)?,
                    _ => staged.push((number, parcel.start + part.start..parcel.start + part.end, carried)),
                }
            }
        }
        self.stage(parcels, staged)
    }

    /// Sends what kernels need of each slab, neighbours in one copy, and queues the boxes.
    fn stage(&mut self, parcels: &[Parcel<'_>], mut boxes: Vec<(usize, Range<usize>, &Carried)>) -> Result<()> {
        let memory = |number: usize| parcels[number].memory;
        boxes.sort_by_key(|(number, part, _)| (memory(*number).as_ptr(), part.start));
        let mut rest = boxes.as_slice();
        while let Some((number, first, _)) = rest.first() {
            let (bytes, mut span) = (memory(*number), first.clone());
            let joins = |span: &Range<usize>, (number, part, _): &(usize, Range<usize>, &Carried)| {
                let end = span.end.max(part.end);
                let near = part.start <= span.end + STAGE_GAP_BYTES && end - span.start <= self.gpu.staging.slot_bytes;
                near && memory(*number).as_ptr() == bytes.as_ptr() && memory(*number).len() == bytes.len()
            };
            let mut count = 0;
            while let Some(next) = rest.get(count).filter(|next| joins(&span, next)) {
                span.end = span.end.max(next.1.end);
                count += 1;
            }
            let (group, after) = rest.split_at(count.max(1));
            rest = after;
            let source = bytes.get(span.clone()).ok_or_else(|| Error::bug("a box lies outside its slab"))?;
            let staged = self.send(source)?;
            for (number, part, carried) in group {
                let size = carried.op.convert.from.size() as u64;
                let skipped = (part.start - parcels[*number].start) as u64;
                let op = Op { source_start: carried.op.source_start - skipped / size, ..carried.op.clone() };
                let source = Span { pointer: staged + (part.start - span.start) as u64, len: part.len() as u64 };
                self.queue(op, source, carried)?;
            }
        }
        Ok(())
    }

    /// Copies a run to where it belongs.
    fn copy(&mut self, parcel: &Parcel<'_>, carried: &Carried) -> Result<()> {
        let part = touched(&carried.op);
        let source = parcel.bytes().get(part).ok_or_else(|| Error::bug("a box lies outside its slab"))?;
        let target = target_of(carried, source.len() as u64)?;
        self.at_work = true;
        self.with(|current, gpu, _| {
            // SAFETY: `Gpu::start`'s caller keeps both sides until this delivery is dropped, which waits.
            unsafe { current.upload(target, source.as_ptr(), source.len(), &gpu.copies) }
        })
    }

    /// Copies equal pieces at equal distances.
    fn copy_rows(&mut self, parcel: &Parcel<'_>, carried: &Carried, rows: Rows) -> Result<()> {
        let part = touched(&carried.op);
        let source = parcel.bytes().get(part).ok_or_else(|| Error::bug("a box lies outside its slab"))?;
        let last = rows.count.saturating_sub(1);
        let target = target_of(carried, last * rows.target_pitch + rows.bytes)?;
        if last * rows.source_pitch + rows.bytes > source.len() as u64 {
            return Err(Error::bug("rows lie outside their slab"));
        }
        let size = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let rows = CopyRows {
            source: source.as_ptr(),
            source_pitch: size(rows.source_pitch),
            target,
            target_pitch: size(rows.target_pitch),
            width: size(rows.bytes),
            height: size(rows.count),
        };
        self.at_work = true;
        self.with(|current, gpu, _| {
            // SAFETY: as in `copy`, for every row, which were compared with both sides.
            unsafe { current.upload_rows(rows, &gpu.copies) }
        })
    }

    /// Packs a box piece by piece, cast by the processor where that makes it smaller, and queues the pieces.
    fn pack(&mut self, parcel: &Parcel<'_>, carried: &Carried) -> Result<()> {
        let Op { convert: Convert { from, to, swap, policy }, .. } = carried.op;
        let between = if to.size() < from.size() { to } else { from };
        let element = between.size();
        for (piece, _) in Slabs::new(&carried.op.extent, element, PACK_BYTES as u64) {
            let moved = |strides: &[u64]| piece.start.iter().zip(strides).map(|(at, stride)| at * stride).sum::<u64>();
            let len = usize::try_from(piece.volume()).unwrap_or(usize::MAX).saturating_mul(element);
            let packed = strides(&piece.extent);
            let here = Op {
                extent: piece.extent.clone(),
                source_strides: carried.op.source_strides.clone(),
                target_strides: packed.clone(),
                source_start: carried.op.source_start + moved(&carried.op.source_strides),
                target_start: 0,
                convert: Convert { from, to: between, swap, policy },
            };
            if len > PACK_BYTES - self.packed {
                self.flush()?;
            }
            let at = self.packed;
            let gpu = self.gpu;
            let pack = self.lane()?.with_pack(gpu)?;
            let room = pack.get_mut(at..at + len).ok_or_else(|| Error::bug("a packed piece is too large"))?;
            let lossy = execute_in(&here, parcel.bytes(), room).map_err(op_error)?;
            let start = room.as_ptr();
            self.packed = (at + len).next_multiple_of(STAGING_ALIGN).min(PACK_BYTES);
            if lossy > 0 {
                self.done.counted.push(Counted { shard: carried.shard, lossy, invalid: 0 });
            }
            let pointer = self.send_from(start, len)?;
            let there = Op {
                extent: piece.extent.clone(),
                source_strides: packed,
                target_strides: carried.op.target_strides.clone(),
                source_start: 0,
                target_start: carried.op.target_start + moved(&carried.op.target_strides),
                convert: Convert { from: between, to, swap: false, policy },
            };
            self.queue(there, Span { pointer, len: len as u64 }, carried)?;
        }
        Ok(())
    }

    /// Copies bytes to staging; their address there.
    fn send(&mut self, source: &[u8]) -> Result<u64> {
        self.send_from(source.as_ptr(), source.len())
    }

    fn send_from(&mut self, source: *const u8, len: usize) -> Result<u64> {
        let gpu = self.gpu;
        let (staging, room) = self.lane()?.staging(gpu).map_err(|error| gpu.failed(error))?;
        let place = |staged: usize| staged.next_multiple_of(STAGING_ALIGN) + source.addr() % STAGING_ALIGN;
        if place(self.staged) + len > room {
            let packed = self.packed;
            self.flush()?;
            // What is sent may have just been packed.
            self.packed = packed;
        }
        let at = place(self.staged);
        if at + len > room {
            return Err(Error::bug("a slab is larger than staging memory"));
        }
        self.staged = at + len;
        self.at_work = true;
        let target = staging + at as u64;
        self.with(|current, gpu, _| {
            // SAFETY: the parcel's memory and the lane's stay as they are until they were waited for, and this part of staging
            // is nobody else's.
            unsafe { current.upload(target, source, len, &gpu.copies) }
        })?;
        Ok(target)
    }

    /// Queues a staged box, in boxes of few enough dimensions.
    fn queue(&mut self, op: Op, source: Span, carried: &Carried) -> Result<()> {
        let too_many = op.extent.len() > KERNEL_RANK_MAX && rank(&op) > KERNEL_RANK_MAX;
        if let ([extent, ..], true) = (op.extent.as_slice(), too_many) {
            for index in 0..*extent {
                let inner = Op {
                    extent: op.extent[1..].to_vec(),
                    source_strides: op.source_strides[1..].to_vec(),
                    target_strides: op.target_strides[1..].to_vec(),
                    source_start: op.source_start + index * op.source_strides[0],
                    target_start: op.target_start + index * op.target_strides[0],
                    convert: op.convert,
                };
                self.queue(inner, source, carried)?;
            }
            return Ok(());
        }
        if (self.queued.len() + 1) * BOXES_PER_OP > LAUNCH_BOXES_MAX {
            // What is staged stays where it is.
            self.launch().and_then(|()| self.wait()).map_err(|error| self.gpu.failed(error))?;
        }
        self.queued.push(Queued { op, source, target: carried.target, shard: carried.shard });
        Ok(())
    }

    /// Launches what is queued and waits, so that staging and packing memory are free again.
    fn flush(&mut self) -> Result<()> {
        self.launch().and_then(|()| self.wait()).map_err(|error| self.gpu.failed(error))?;
        (self.staged, self.packed) = (0, 0);
        Ok(())
    }

    /// Gives what is queued to the kernels. Nothing else of this delivery is with them.
    pub(super) fn launch(&mut self) -> Outcome<()> {
        let queued = std::mem::take(&mut self.queued);
        if queued.is_empty() {
            return Ok(());
        }
        let (Some(lane), gpu) = (&mut self.lane, self.gpu) else { return Ok(()) };
        self.launched.clear();
        let mut placements = Vec::with_capacity(queued.len());
        for Queued { op, source, target, shard } in &queued {
            if self.launched.last() != Some(shard) {
                self.launched.push(*shard);
            }
            placements.push(Placement {
                op,
                source: source.pointer,
                source_bytes: usize::try_from(source.len).unwrap_or(usize::MAX),
                target: target.pointer,
                target_bytes: usize::try_from(target.len).unwrap_or(usize::MAX),
                counter: u32::try_from(self.launched.len() - 1).unwrap_or(u32::MAX),
            });
        }
        let launches = lower(&placements).map_err(|error| super::driver::DriverError::local(error.to_string()))?;
        // The tables: cleared tallies, then each kernel's first tiles and boxes.
        let results = self.launched.len() * size_of::<Tally>();
        let mut used = results;
        lane.host_tables[..used].fill(0);
        let mut write = |bytes: &[u8]| {
            let at = used;
            used += bytes.len();
            lane.host_tables[at..used].copy_from_slice(bytes);
            at as u64
        };
        let tables = lane.tables.pointer();
        let mut calls = Vec::with_capacity(launches.len());
        for launch in &launches {
            let first_tile = tables + write(bytemuck::cast_slice(&launch.first_tile));
            let boxes = tables + write(bytemuck::cast_slice(&launch.descriptors));
            let count = u32::try_from(launch.descriptors.len()).unwrap_or(u32::MAX);
            calls.push((gpu.function(launch.kernel), launch.blocks(), (boxes, first_tile, count, tables)));
        }
        self.at_work = true;
        let current = gpu.context.enter()?;
        // SAFETY: the lane's memory is this delivery's until it has waited. The boxes were checked against both of their sides,
        // which `Gpu::start`'s caller keeps.
        unsafe {
            current.upload(tables, lane.host_tables.as_ptr(), used, &gpu.copies)?;
            current.record(&lane.copied, &gpu.copies)?;
            current.wait_on(&gpu.kernels, &lane.copied)?;
            for (function, blocks, arguments) in calls {
                current.launch(function, (blocks, THREADS), arguments, &gpu.kernels)?;
                self.done.launches += 1;
            }
            current.download(lane.host_tables[TABLE_BYTES..].as_mut_ptr(), tables, results, &gpu.kernels)
        }
    }

    /// Waits for what was given to the streams, and takes in what was counted.
    fn wait(&mut self) -> Outcome<()> {
        let (Some(lane), gpu) = (&self.lane, self.gpu) else { return Ok(()) };
        if !self.at_work {
            return Ok(());
        }
        let current = gpu.context.enter()?;
        if self.launched.is_empty() {
            current.record(&lane.copied, &gpu.copies)?;
            current.wait(&lane.copied)?;
        } else {
            // Copies may have been given after the launch.
            current.record(&lane.copied, &gpu.copies)?;
            current.wait_on(&gpu.kernels, &lane.copied)?;
            current.record(&lane.launched, &gpu.kernels)?;
            current.wait(&lane.launched)?;
        }
        self.at_work = false;
        // The tables are aligned to pages, and what comes back to words.
        let results = &lane.host_tables[TABLE_BYTES..][..self.launched.len() * size_of::<Tally>()];
        let tallies: &[Tally] = bytemuck::try_cast_slice(results).unwrap_or_default();
        for (shard, Tally { lossy, invalid }) in self.launched.drain(..).zip(tallies) {
            self.done.counted.push(Counted { shard, lossy: *lossy, invalid: *invalid });
        }
        Ok(())
    }

    fn lane(&mut self) -> Result<&mut Lane> {
        self.lane.as_mut().ok_or_else(|| Error::bug("a delivery without a lane"))
    }

    fn with(&mut self, call: impl FnOnce(&Current<'_>, &Gpu, &mut Lane) -> Outcome<()>) -> Result<()> {
        let gpu = self.gpu;
        let lane = self.lane()?;
        gpu.context.enter().and_then(|current| call(&current, gpu, lane)).map_err(|error| gpu.failed(error))
    }
}

impl Drop for Delivery<'_> {
    fn drop(&mut self) {
        let Some(lane) = self.lane.take() else { return };
        if self.at_work {
            // An error ended it early. What is on its way must end before its memory is used for something else.
            let drain = || {
                let current = self.gpu.context.enter()?;
                current.drain(&self.gpu.copies).and(current.drain(&self.gpu.kernels))
            };
            if let Err(error) = drain().or_else(|_| drain()) {
                tracing::warn!(%error, "a device does not say whether it still works; its staging memory is given up");
                std::mem::forget(lane);
                return;
            }
        }
        self.gpu.give_back(lane);
    }
}

/// The bytes of a parcel that an op reads.
fn touched(op: &Op) -> Range<usize> {
    let reach: u64 =
        op.extent.iter().zip(&op.source_strides).map(|(extent, stride)| extent.saturating_sub(1) * stride).sum();
    let size = op.convert.from.size() as u64;
    let byte = |element: u64| usize::try_from(element.saturating_mul(size)).unwrap_or(usize::MAX);
    byte(op.source_start)..byte(op.source_start + reach + 1)
}

fn target_bytes(op: &Op) -> u64 {
    op.extent.iter().product::<u64>() * op.convert.to.size() as u64
}

/// The address of a box in its shard, if so many bytes from there on belong to it.
fn target_of(carried: &Carried, len: u64) -> Result<u64> {
    let start = carried.op.target_start * carried.op.convert.to.size() as u64;
    let fits = start.checked_add(len).is_some_and(|end| end <= carried.target.len);
    fits.then_some(carried.target.pointer + start).ok_or_else(|| Error::bug("a box lies outside its shard"))
}

/// Whether the driver takes a copy of such rows: it counts pitches in an int.
fn pitches_fit(rows: Rows) -> bool {
    rows.source_pitch.max(rows.target_pitch) <= i32::MAX as u64
}

fn op_error(error: OpError) -> Error {
    match error {
        OpError::Outside { .. } => Error::bug(error.to_string()),
        OpError::Cast(cast) => Error::corrupt(cast.to_string()),
    }
}

/// A run becomes a head, a middle and a tail at most.
const BOXES_PER_OP: usize = 3;

/// Bytes between two needed parts that are sent along rather than begin another copy.
const STAGE_GAP_BYTES: usize = 4096;
