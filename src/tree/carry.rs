//! What one task of a load has decoded for devices and not yet sent.
//!
//! Units are decoded one after the other, into one slot as long as they fit, and cross the bus together: thousands of small
//! arrays are a few copies and launches. Everything is sent, and waited for, before the slot is used again and before the task
//! ends; only then are the units counted off.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::land::{Landing, located};
use crate::error::{Error, Result};
use crate::io::{Ring, Slot};
use crate::limits::ERROR_LINES_MAX;
use crate::place::parcel::{Carried, Counted, Delivered, Parcel};
use crate::place::{Delivery, Gpu};

/// Bytes of a unit that somebody else holds: where they begin in that memory, and how many they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored<'s> {
    pub(super) memory: &'s [u8],
    pub(super) start: usize,
    pub(super) len: usize,
}

/// Where decoded elements are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place<'s> {
    /// With somebody else.
    Stored(Stored<'s>),
    /// In the carrier's own slot: first byte and number of bytes.
    Scratch(usize, usize),
}

/// Decoded elements on their way to devices, and a slot to decode into.
pub(super) struct Carrier<'s> {
    landing: &'s Landing,
    ring: &'s Arc<Ring>,
    slot: Option<Slot>,
    /// Bytes of the slot that wait to be sent.
    filled: usize,
    waiting: Vec<Waiting<'s>>,
    /// Units whose elements wait, in [`Plan::units`](crate::plan::Plan::units).
    units: Vec<u32>,
}

struct Waiting<'s> {
    place: Place<'s>,
    gpu: &'s Arc<Gpu>,
    boxes: Vec<Carried>,
}

impl<'s> Stored<'s> {
    /// All of some memory.
    pub(super) fn all(memory: &'s [u8]) -> Self {
        Self { memory, start: 0, len: memory.len() }
    }

    pub(super) fn bytes(&self) -> &'s [u8] {
        self.memory.get(self.start..).and_then(|rest| rest.get(..self.len)).unwrap_or_default()
    }

    /// A part of these bytes.
    pub(super) fn part(&self, start: usize, len: usize) -> Option<Self> {
        let fits = start.checked_add(len).is_some_and(|end| end <= self.len);
        fits.then_some(Self { memory: self.memory, start: self.start + start, len })
    }
}

impl<'s> Carrier<'s> {
    pub(super) fn new(landing: &'s Landing, ring: &'s Arc<Ring>) -> Self {
        Self { landing, ring, slot: None, filled: 0, waiting: Vec::new(), units: Vec::new() }
    }

    pub(super) fn ring(&self) -> &'s Arc<Ring> {
        self.ring
    }

    /// Room for so many decoded bytes, at most a slot; what waits is sent if there is too little.
    pub(super) fn room(&mut self, len: usize) -> Result<(Place<'s>, &mut [u8])> {
        if len > self.ring.slot_bytes() - self.filled {
            self.send()?;
        }
        let slot = match self.slot.take() {
            Some(slot) => slot,
            None => self.ring.slot()?,
        };
        let slot = self.slot.insert(slot);
        let room =
            slot.get_mut(self.filled..self.filled + len).ok_or_else(|| Error::bug("a unit does not fit a slot"))?;
        Ok((Place::Scratch(self.filled, len), room))
    }

    /// The elements at a place.
    pub(super) fn bytes(&self, place: Place<'s>) -> &[u8] {
        self.stored(place).bytes()
    }

    fn stored(&self, place: Place<'s>) -> Stored<'_> {
        match place {
            Place::Stored(stored) => stored,
            Place::Scratch(start, len) => Stored { memory: self.slot.as_deref().unwrap_or_default(), start, len },
        }
    }

    /// Takes boxes along for a device.
    pub(super) fn take(&mut self, place: Place<'s>, gpu: &'s Arc<Gpu>, boxes: Vec<Carried>) {
        if let Place::Scratch(start, len) = place {
            self.filled = (start + len).next_multiple_of(ALIGN).min(self.ring.slot_bytes());
        }
        self.waiting.push(Waiting { place, gpu, boxes });
    }

    /// Counts a unit off: now, or once its elements are sent. Returns the leaves that are complete.
    pub(super) fn landed(&mut self, unit: u32) -> Result<Vec<usize>> {
        if self.waiting.is_empty() {
            return self.landing.landed(unit);
        }
        self.units.push(unit);
        Ok(Vec::new())
    }

    /// Sends what waits, and returns the leaves that are complete by it.
    pub(super) fn finish(&mut self) -> Result<Vec<usize>> {
        self.send()?;
        let mut leaves = Vec::new();
        for unit in std::mem::take(&mut self.units) {
            leaves.extend(self.landing.landed(unit)?);
        }
        Ok(leaves)
    }

    /// Sends what waits and waits for it.
    pub(super) fn send(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        self.filled = 0;
        if waiting.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        let plan = &self.landing.plan;
        let shards = waiting.iter().flat_map(|waiting| &waiting.boxes).map(|carried| carried.shard as usize);
        let leaves: BTreeSet<u32> = shards.map(|shard| plan.shards[shard].leaf).collect();
        let mut devices: Vec<(&Arc<Gpu>, Vec<Parcel<'_>>)> = Vec::new();
        let mut bytes = 0;
        for Waiting { place, gpu, boxes } in waiting {
            let Stored { memory, start, len } = self.stored(place);
            let size =
                |carried: &Carried| carried.op.extent.iter().product::<u64>() * carried.op.convert.to.size() as u64;
            bytes += boxes.iter().map(size).sum::<u64>();
            let parcel = Parcel { memory, start, len, boxes };
            match devices.iter_mut().find(|(have, _)| Arc::ptr_eq(have, gpu)) {
                Some((_, parcels)) => parcels.push(parcel),
                None => devices.push((gpu, vec![parcel])),
            }
        }
        let unit = self.units.first().copied();
        let delivered = deliver(&devices);
        self.landing.copy.add(start, bytes);
        let Delivered { counted, launches } = delivered.map_err(|error| {
            // They are brought together: what fails concerns them all.
            let paths = leaves.iter().map(|leaf| &plan.leaves[*leaf as usize].path);
            match (leaves.len(), unit) {
                (1, Some(unit)) => located(error, plan, &plan.units[unit as usize]),
                // Padding belongs to no unit.
                (1, None) => paths.fold(error, |error, path| error.at("leaf", path)),
                _ => error.lines(paths.take(ERROR_LINES_MAX).map(|path| path.to_string())),
            }
        })?;
        self.landing.launches.fetch_add(launches, Ordering::Relaxed);
        self.landing.count(&counted)
    }
}

/// Gives every device its parcels, then waits for all of them.
fn deliver(devices: &[(&Arc<Gpu>, Vec<Parcel<'_>>)]) -> Result<Delivered> {
    let mut deliveries: Vec<Delivery<'_>> = Vec::with_capacity(devices.len());
    for (gpu, parcels) in devices {
        #[allow(unsafe_code)]
        // SAFETY: the parcels' memory is borrowed until this function returns, and the deliveries are dropped before. Targets are
        // memory of the load's shards, which its landing keeps, and placements of a plan are disjoint.
        deliveries.push(unsafe { gpu.start(parcels) }?);
    }
    let mut all = Delivered::default();
    for delivery in deliveries {
        let Delivered { counted, launches } = delivery.finish()?;
        all.counted.extend(counted);
        all.launches += launches;
    }
    Ok(all)
}

impl Landing {
    /// Takes in what devices have counted.
    fn count(&self, counted: &[Counted]) -> Result<()> {
        for Counted { shard, lossy, invalid } in counted {
            let planned = &self.plan.shards[*shard as usize];
            if !planned.counted_elsewhere {
                self.lossy[planned.leaf as usize].fetch_add(*lossy, Ordering::Relaxed);
            }
            if *invalid > 0 {
                return Err(Error::corrupt("bools are stored as something else than 0 or 1")
                    .at("leaf", &self.plan.leaves[planned.leaf as usize].path)
                    .found(format_args!("{invalid} of them")));
            }
        }
        Ok(())
    }

    /// Copies the replicas of a complete leaf from device to device.
    pub(super) fn replicate(&self, leaf: usize) -> Result<()> {
        for &(shard, source) in self.copies.get(&leaf).into_iter().flatten() {
            let (Some((to, target)), Some((from, source))) = (self.on_device(shard), self.on_device(source)) else {
                return Err(Error::bug("a replica is in host memory"));
            };
            #[allow(unsafe_code)]
            // SAFETY: both are memory of this load's shards. All units of the leaf have landed, and it is not handed out yet.
            unsafe { to.copy_from(target, source, from) }
                .map_err(|error| error.at("leaf", &self.plan.leaves[leaf].path))?;
        }
        Ok(())
    }
}

/// What decoded units are aligned to in a slot.
const ALIGN: usize = 16;
