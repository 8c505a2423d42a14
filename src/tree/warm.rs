//! Batches that workers read by themselves: what memory already has is copied by the core that needs it, in pieces that stay in
//! its caches, and straight to where it belongs if it is wanted as it is stored. A reader's thread would copy it on another core.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::carry::{Carrier, Stored};
use super::land::{FirstError, Landing, located, part_of_read, usize_of};
use crate::error::{Error, Result};
use crate::io::{OpenFile, Ring, Root, read_error};
use crate::plan::Source;

/// Reads a batch out of memory and lands it; the leaves that are complete by it, and how long reading took. `None` if memory does
/// not have all of it: then nothing has landed.
pub(super) fn land_warm(
    landing: &Landing,
    number: usize,
    (root, file): (&Root, &OpenFile),
    ring: &Arc<Ring>,
    errors: &FirstError,
) -> Option<(Vec<usize>, Duration)> {
    let batch = &landing.plan.batches[number];
    let start = Instant::now();
    let land = || {
        let range = batch.read.ok_or_else(|| Error::bug("a batch has nothing to read"))?;
        let read = |target: &mut [u8], offset: u64| {
            let len = target.len() as u64;
            file.read_warm(target, offset)
                .map_err(|error| read_error(error, &root.shown(file.path()), offset, len, file.size()))
        };
        if batch.units.len() == 1
            && let Some((offset, target)) = landing.as_stored(batch.units.start)
        {
            if !read(target, offset)? {
                return Ok(None);
            }
            let busy = start.elapsed();
            return Ok(Some((landing.landed_as_stored(batch.units.start)?, busy)));
        }
        let mut slot = ring.slot()?;
        let room = slot.get_mut(..usize_of(range.len)?).ok_or_else(|| Error::bug("a batch is larger than a slot"))?;
        if !read(room, range.offset)? {
            return Ok(None);
        }
        let busy = start.elapsed();
        Ok(Some((land_batch(landing, number, room, ring, errors), busy)))
    };
    land().unwrap_or_else(|error| {
        let first = &landing.plan.units[batch.units.start as usize];
        errors.put(batch.units.start, located(error, &landing.plan, first));
        Some((Vec::new(), start.elapsed()))
    })
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
