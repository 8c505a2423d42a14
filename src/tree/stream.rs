//! Units that are larger than a slot: fed their stored bytes piece by piece, they pass elements on slab by slab.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::carry::{Carrier, Place, Stored};
use super::land::{Landing, Lies, usize_of};
use crate::decode::{self, Decoder};
use crate::error::{Error, Result};
use crate::io::{Ring, Slot};
use crate::layout::orbax::sums::ValueSum;
use crate::plan::{Placement, Slabs, Unit, UnitArray, Verify};
use crate::shape::strides;

/// A unit larger than a slot, decoded piece by piece.
pub(super) struct Stream {
    decoder: Box<dyn Decoder>,
    output: Output,
    /// The checksum that is wanted of all that is fed, and that of what was.
    sum: Option<(ValueSum, u32)>,
}

enum Output {
    /// Straight into the shard; how many bytes are written.
    Direct(usize),
    /// Through a slab.
    Slabs { slabs: Slabs, slab: Option<(crate::shape::Region, u64)>, buffer: Slot, filled: usize },
}

impl Stream {
    /// Starts a unit of so many stored bytes.
    pub(super) fn new(landing: &Landing, unit: &Unit, encoded: u64, ring: &Arc<Ring>) -> Result<Self> {
        let array = &landing.plan.arrays[unit.array as usize];
        let verify = landing.plan.limits.verify != Verify::Off;
        if !verify {
            landing.unverified.fetch_add(encoded, Ordering::Relaxed);
        }
        let decoder = decode::decoder(
            &array.codecs,
            encoded,
            unit.decoded_bytes,
            verify,
            landing.plan.limits.window_bytes_max(),
        )?;
        let output = if landing.direct(unit, array).is_some() {
            Output::Direct(0)
        } else {
            let mut slabs = unit.slabs(array.dtype.size(), landing.plan.limits.slot_bytes);
            let slab = slabs.next();
            Output::Slabs { slabs, slab, buffer: ring.slot()?, filled: 0 }
        };
        Ok(Self { decoder, output, sum: unit.sum.map(|sum| (sum, 0)) })
    }

    /// Decodes the next stored bytes, and places every slab that they complete.
    pub(super) fn feed(&mut self, landing: &Landing, unit: &Unit, mut stored: &[u8], ring: &Arc<Ring>) -> Result<()> {
        let array = &landing.plan.arrays[unit.array as usize];
        if let Some((_, crc)) = &mut self.sum {
            *crc = crc32c::crc32c_append(*crc, stored);
        }
        loop {
            let start = Instant::now();
            let step = match &mut self.output {
                Output::Direct(written) => {
                    let target =
                        landing.direct(unit, array).ok_or_else(|| Error::bug("a direct unit lost its target"))?;
                    let step = self.decoder.step(stored, &mut target[*written..])?;
                    *written += step.written;
                    step
                }
                Output::Slabs { slab, buffer, filled, .. } => {
                    let room = match slab {
                        Some((_, bytes)) => usize_of(*bytes)?,
                        None => 0,
                    };
                    let step = self.decoder.step(stored, &mut buffer[*filled..room])?;
                    *filled += step.written;
                    step
                }
            };
            landing.decode.add(start, step.written as u64);
            stored = &stored[step.read..];
            let placed = self.place_full_slab(landing, unit, array, ring)?;
            // Either everything is used up, or the output is complete and the format ignores what follows.
            if step.read == 0 && step.written == 0 && !placed {
                return Ok(());
            }
        }
    }

    fn place_full_slab(&mut self, landing: &Landing, unit: &Unit, array: &UnitArray, ring: &Arc<Ring>) -> Result<bool> {
        let Output::Slabs { slabs, slab, buffer, filled } = &mut self.output else { return Ok(false) };
        let Some((region, bytes)) = slab else { return Ok(false) };
        if (*filled as u64) < *bytes {
            return Ok(false);
        }
        // Positions in the slab: strides of the whole unit, counted from the slab's first element.
        let unit_strides = strides(&unit.shape);
        let first: u64 = region.start.iter().zip(&unit_strides).map(|(at, stride)| at * stride).sum();
        let clipped: Vec<Placement> = unit.placements.iter().filter_map(|placement| placement.clip(region)).collect();
        let skip = first * array.dtype.size() as u64;
        let lies = Lies { strides: unit_strides, skip_bytes: skip };
        let mut carrier = Carrier::new(landing, ring);
        let slab_bytes = Place::Stored(Stored { memory: buffer, start: 0, len: *filled });
        landing.place(unit, array, &clipped, &lies, slab_bytes, &mut carrier)?;
        // The slab is decoded into again as soon as devices have it.
        carrier.send()?;
        *slab = slabs.next();
        *filled = 0;
        Ok(true)
    }

    /// Ends the unit: everything was fed.
    pub(super) fn finish(mut self, unit: &Unit) -> Result<()> {
        if let Some((sum, crc)) = self.sum {
            sum.check(crc)?;
        }
        self.decoder.finish()?;
        let complete = match &self.output {
            Output::Direct(written) => *written as u64 == unit.decoded_bytes,
            Output::Slabs { slab, .. } => slab.is_none(),
        };
        if complete { Ok(()) } else { Err(Error::corrupt("a chunk decodes to fewer bytes than its shape needs")) }
    }
}
