//! Batches that workers read by themselves: what memory already has is copied by the core that needs it, in pieces that stay in
//! its caches, and straight to where it belongs if it is wanted as it is stored; on its way to a device it is on the bus while the
//! next one is read. A reader's thread would copy it on another core.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bus::Sent;
use super::carry::{Carrier, Stored};
use super::land::{FirstError, Landing, located, part_of_read, usize_of};
use crate::decode::DecodeError;
use crate::error::{Error, Result};
use crate::io::{Buffer, Credit, OpenFile, Ring, Root, Slot, read_error};
use crate::place::parcel::Span;
use crate::place::{Crossing, Gpu};
use crate::plan::{Source, Verify};

/// What came of a batch.
enum Landed {
    /// These leaves are complete by it.
    Here(Vec<usize>),
    /// It is one run, which is on its way to a device out of this slot.
    Sent(Crossing, Slot, u64),
    /// Memory does not have all of it.
    Absent,
}

/// Reads a batch out of memory and lands it; the leaves that are complete by it or by what was sent before, and how long reading
/// took. The credit comes back if memory does not have all of it: then it has to land as a whole.
pub(super) fn land_warm(
    landing: &Landing,
    number: usize,
    (root, file): (&Root, &OpenFile),
    credit: Credit,
    ring: &Arc<Ring>,
    errors: &FirstError,
) -> std::result::Result<(Vec<usize>, Duration), Credit> {
    let unit = landing.plan.batches[number].units.start;
    let mut source = Warm { file, root, busy: Duration::ZERO };
    let leaves = match land(landing, number, &mut source, ring, errors) {
        Ok(Landed::Absent) => return Err(credit),
        Ok(Landed::Here(leaves)) => leaves,
        Ok(Landed::Sent(crossing, slot, bytes)) => {
            let oldest = landing.bus.take(Sent { crossing, slot, credit, unit, bytes });
            oldest.map(|oldest| landing.arrived(oldest, errors)).unwrap_or_default()
        }
        Err(error) => {
            errors.put(unit, located(error, &landing.plan, &landing.plan.units[unit as usize]));
            Vec::new()
        }
    };
    Ok((leaves, source.busy))
}

fn land(
    landing: &Landing,
    number: usize,
    source: &mut Warm<'_>,
    ring: &Arc<Ring>,
    errors: &FirstError,
) -> Result<Landed> {
    let batch = &landing.plan.batches[number];
    let first = batch.units.start;
    let range = batch.read.ok_or_else(|| Error::bug("a batch has nothing to read"))?;
    let is_one = batch.units.len() == 1;
    if is_one && let Some((offset, target)) = landing.as_stored(first) {
        let read = source.read(target, offset)?;
        return if read { landing.landed_as_stored(first).map(Landed::Here) } else { Ok(Landed::Absent) };
    }
    let len = usize_of(range.len)?;
    if len > ring.slot_bytes() {
        let mut room = Buffer::zeroed(len)?;
        let read = source.read(&mut room, range.offset)?;
        return Ok(if read { Landed::Here(land_batch(landing, number, &room, ring, errors)) } else { Landed::Absent });
    }
    let mut slot = ring.slot()?;
    let room = slot.get_mut(..len).ok_or_else(|| Error::bug("a batch is larger than a slot"))?;
    if is_one && let Some(run) = landing.run_on_device(first) {
        return send_run(landing, &run, slot, source);
    }
    let read = source.read(room, range.offset)?;
    Ok(if read { Landed::Here(land_batch(landing, number, room, ring, errors)) } else { Landed::Absent })
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
    /// Where it begins in the shard's memory, and what is left of that.
    pub(super) target: Span,
    /// Where it begins in its file.
    pub(super) offset: u64,
    /// Bytes of the elements.
    pub(super) body: u64,
    /// Whether their CRC-32C follows them.
    pub(super) has_sum: bool,
}

/// Reads and checks a unit piece by piece, then sends it.
///
/// # Errors
/// As of reads, a device that refuses, a checksum that is wrong.
#[allow(unsafe_code)]
fn send_run(landing: &Landing, run: &DeviceRun<'_>, mut slot: Slot, source: &mut Warm<'_>) -> Result<Landed> {
    let sum_bytes = if run.has_sum { CRC_BYTES } else { 0 };
    let stored = slot.get_mut(..usize_of(run.body + sum_bytes)?);
    let stored = stored.ok_or_else(|| Error::bug("a run lies outside its batch"))?;
    let verify = run.has_sum && landing.plan.limits.verify != Verify::Off;
    let body = usize_of(run.body)?;
    let (mut at, mut computed) = (0, 0);
    for piece in stored.chunks_mut(PIECE_BYTES) {
        if !source.read(piece, run.offset + at as u64)? {
            return Ok(Landed::Absent);
        }
        if verify {
            let start = Instant::now();
            let elements = &piece[..piece.len().min(body.saturating_sub(at))];
            computed = crc32c::crc32c_append(computed, elements);
            landing.decode.add(start, elements.len() as u64);
        }
        at += piece.len();
    }
    if verify {
        let stored = stored[body..].try_into().map(u32::from_le_bytes);
        let stored = stored.map_err(|_| Error::bug("a checksum of another length"))?;
        if stored != computed {
            return Err(DecodeError::Checksum { stored, computed }.into());
        }
    }
    // SAFETY: the slot is kept with the crossing, unchanged. The target is the load's shard, which its landing keeps, and placements
    // of a plan are disjoint.
    let crossing = unsafe { run.gpu.send(&slot[..body], run.target) }?;
    Ok(Landed::Sent(crossing, slot, run.body))
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

/// What is read and checked at a time: it stays in the caches of a core.
const PIECE_BYTES: usize = 1 << 20;
