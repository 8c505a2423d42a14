//! Batches that workers read by themselves: what memory already has is copied by the core that needs it, in pieces that stay in
//! its caches, and straight to where it belongs if it is wanted as it is stored; on its way to a device a piece is on the bus while the
//! next one is read. A reader's thread would copy it on another core.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::carry::{Carrier, Stored};
use super::land::{FirstError, Landing, located, part_of_read, usize_of};
use crate::decode::DecodeError;
use crate::error::{Error, Result};
use crate::io::{OpenFile, Ring, Root, read_error};
use crate::place::Gpu;
use crate::place::parcel::{Carried, Parcel, Span};
use crate::plan::route::Route;
use crate::plan::{Source, Verify};
use crate::transform::{Convert, Op};

/// Reads a batch out of memory and lands it; the leaves that are complete by it, and how long reading took. `None` if memory does
/// not have all of it: then it has to land as a whole.
pub(super) fn land_warm(
    landing: &Landing,
    number: usize,
    (root, file): (&Root, &OpenFile),
    ring: &Arc<Ring>,
    errors: &FirstError,
) -> Option<(Vec<usize>, Duration)> {
    let batch = &landing.plan.batches[number];
    let first = batch.units.start;
    let mut source = Warm { file, root, busy: Duration::ZERO };
    let mut land = || {
        let range = batch.read.ok_or_else(|| Error::bug("a batch has nothing to read"))?;
        if batch.units.len() == 1
            && let Some((offset, target)) = landing.as_stored(first)
        {
            return if source.read(target, offset)? { landing.landed_as_stored(first).map(Some) } else { Ok(None) };
        }
        let mut slot = ring.slot()?;
        let room = slot.get_mut(..usize_of(range.len)?).ok_or_else(|| Error::bug("a batch is larger than a slot"))?;
        if batch.units.len() == 1
            && let Some(run) = landing.run_on_device(first)
        {
            return if send_run(landing, &run, room, &mut source)? {
                landing.landed_as_stored(first).map(Some)
            } else {
                Ok(None)
            };
        }
        let read = source.read(room, range.offset)?;
        Ok(read.then(|| land_batch(landing, number, room, ring, errors)))
    };
    let landed = land().unwrap_or_else(|error| {
        errors.put(first, located(error, &landing.plan, &landing.plan.units[first as usize]));
        Some(Vec::new())
    });
    landed.map(|leaves| (leaves, source.busy))
}

/// A file of which memory has some.
struct Warm<'f> {
    file: &'f OpenFile,
    root: &'f Root,
    /// How long reading took.
    busy: Duration,
}

impl Warm<'_> {
    /// As [`OpenFile::read_warm`].
    fn read(&mut self, target: &mut [u8], offset: u64) -> Result<bool> {
        let (start, len) = (Instant::now(), target.len() as u64);
        let read = self.file.read_warm(target, offset);
        self.busy += start.elapsed();
        read.map_err(|error| read_error(error, &self.root.shown(self.file.path()), offset, len, self.file.size()))
    }
}

/// A unit that is one run in its file and one in the memory of a device.
pub(super) struct DeviceRun<'l> {
    pub(super) gpu: &'l Arc<Gpu>,
    /// The shard's memory, and the first element of the run in it.
    pub(super) target: Span,
    pub(super) shard: u32,
    pub(super) start: u64,
    pub(super) convert: Convert,
    /// Where it begins in its file.
    pub(super) offset: u64,
    /// Bytes of the elements.
    pub(super) body: u64,
    /// Whether their CRC-32C follows them.
    pub(super) has_sum: bool,
}

impl DeviceRun<'_> {
    /// Some of its bytes, which are whole elements, on their way; `at` says where in the run they begin.
    fn parcel<'p>(&self, bytes: &'p [u8], at: u64) -> Parcel<'p> {
        let size = self.convert.to.size() as u64;
        let op = Op {
            extent: vec![bytes.len() as u64 / size],
            source_strides: vec![1],
            target_strides: vec![1],
            source_start: 0,
            target_start: self.start + at / size,
            convert: self.convert,
        };
        let boxes = vec![Carried { op, route: Route::Direct, target: self.target, shard: self.shard }];
        Parcel { memory: bytes, start: 0, len: bytes.len(), boxes }
    }
}

/// Brings a unit to a device piece by piece: one is on the bus while the next is read and checked. Returns whether memory has all of
/// it; what has been sent is sent again otherwise.
///
/// # Errors
/// As of reads, a device that fails, a checksum that is wrong: what is in the device's memory is not said then.
#[allow(unsafe_code)]
fn send_run(landing: &Landing, run: &DeviceRun<'_>, room: &mut [u8], source: &mut Warm<'_>) -> Result<bool> {
    let (body, sum) =
        room.split_at_mut_checked(usize_of(run.body)?).ok_or_else(|| Error::bug("a run lies outside its batch"))?;
    let verify = run.has_sum && landing.plan.limits.verify != Verify::Off;
    let piece_bytes = (body.len() / PIECES_MIN).next_multiple_of(PIECE_ALIGN).clamp(PIECE_ALIGN, PIECE_BYTES);
    let (mut at, mut computed) = (0, 0);
    // SAFETY: nothing is given yet.
    let mut delivery = unsafe { run.gpu.start(&[]) }?;
    for piece in body.chunks_mut(piece_bytes) {
        if !source.read(piece, run.offset + at)? {
            return Ok(false);
        }
        if verify {
            let start = Instant::now();
            computed = crc32c::crc32c_append(computed, piece);
            landing.decode.add(start, piece.len() as u64);
        }
        // SAFETY: the room outlives the delivery and each piece of it is written once, before this. The target is the load's shard,
        // which its landing keeps, and placements of a plan are disjoint.
        unsafe { delivery.more(&run.parcel(piece, at)) }?;
        at += piece.len() as u64;
    }
    if run.has_sum && !source.read(sum, run.offset + at)? {
        return Ok(false);
    }
    if verify {
        let stored = sum.try_into().map(u32::from_le_bytes).map_err(|_| Error::bug("a checksum of another length"))?;
        if stored != computed {
            return Err(DecodeError::Checksum { stored, computed }.into());
        }
    }
    let start = Instant::now();
    delivery.finish()?;
    landing.copy.add(start, run.body);
    Ok(true)
}

/// Lands every unit of a batch, whose bytes were read; the leaves that are complete by it.
pub(super) fn land_batch(
    landing: &Landing,
    number: usize,
    read: &[u8],
    ring: &Arc<Ring>,
    errors: &FirstError,
) -> Vec<usize> {
    let batch = &landing.plan.batches[number];
    let mut leaves = Vec::new();
    let mut carrier = Carrier::new(landing, ring);
    for position in batch.units.clone() {
        let stored: Result<Stored<'_>> = match (&landing.plan.units[position as usize].source, batch.read) {
            (Source::File { offset, len, .. }, Some(range)) => part_of_read(read, offset - range.offset, *len),
            (Source::Inline(bytes) | Source::Fill(bytes), _) => Ok(Stored::all(bytes)),
            (Source::File { .. }, None) => Err(Error::bug("a unit has no bytes")),
        };
        match stored.and_then(|stored| landing.land(position, stored, &mut carrier)) {
            Ok(done) => leaves.extend(done),
            Err(failed) => errors.put(position, failed),
        }
    }
    match carrier.finish() {
        Ok(done) => leaves.extend(done),
        Err(failed) => errors.put(batch.units.start, failed),
    }
    leaves
}

/// Bytes of a checksum behind elements.
pub(super) const CRC_BYTES: u64 = 4;

/// What is read, checked and sent at a time: it stays in the caches of a core.
const PIECE_BYTES: usize = 1 << 20;

/// Smaller units are cut, too, so that sending overlaps reading.
const PIECES_MIN: usize = 4;

/// Pieces are whole elements, and begin at whole pages of their slot.
const PIECE_ALIGN: usize = 4096;
