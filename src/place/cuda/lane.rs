//! What one worker uses of a device while it brings parcels there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::driver::{Context, DeviceBuffer, Event, Outcome, Registration};
use super::gpu::{Gpu, Staging};
use crate::error::Result;
use crate::io::Buffer;
use crate::limits::{LANE_EXTRA_BYTES, LAUNCH_BOXES_MAX, PACK_BYTES};
use crate::transform::cuda::{Descriptor, Kernel, Tally};

/// Staging memory on the device, tables for launches on both sides, and events.
#[derive(Debug)]
pub(super) struct Lane {
    /// Where slabs and packed boxes wait for kernels; made when first needed.
    staging: Option<DeviceBuffer>,
    pub(super) tables: DeviceBuffer,
    /// The same on the host, and behind it what comes back.
    pub(super) host_tables: LockedBuffer,
    /// Where boxes are packed; made when first needed.
    pub(super) pack: Option<LockedBuffer>,
    /// Recorded on the copy stream.
    pub(super) copied: Event,
    /// Recorded on the kernel stream.
    pub(super) launched: Event,
    counts: [(Arc<AtomicU64>, u64); 2],
}

impl Lane {
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        let made = || {
            let (copied, launched) = (Event::new(&gpu.context)?, Event::new(&gpu.context)?);
            Ok((DeviceBuffer::new(&gpu.context, TABLE_BYTES)?, copied, launched))
        };
        let (tables, copied, launched) = made().map_err(|error| gpu.failed(error))?;
        let host_tables = LockedBuffer::new(&gpu.context, TABLE_BYTES + RESULT_BYTES)?;
        let counts = [(Arc::clone(&gpu.lane_bytes), 0), (Arc::clone(&gpu.locked_bytes), 0)];
        let mut lane = Self { staging: None, tables, host_tables, pack: None, copied, launched, counts };
        lane.count(TABLE_BYTES, TABLE_BYTES + RESULT_BYTES);
        Ok(lane)
    }

    /// What a lane takes of the device at most, in bytes.
    pub(super) fn device_bytes(staging: Staging) -> usize {
        staging_bytes(staging) + LANE_EXTRA_BYTES - STAGING_ALIGN
    }

    /// What a lane locks of host memory at most, in bytes.
    pub(super) const fn locked_bytes() -> usize {
        TABLE_BYTES + RESULT_BYTES + PACK_BYTES
    }

    /// Staging memory, and how much of it there is.
    pub(super) fn staging(&mut self, gpu: &Gpu) -> Outcome<(u64, usize)> {
        let staging = match self.staging.take() {
            Some(staging) => staging,
            None => {
                let len = staging_bytes(gpu.staging);
                let staging = DeviceBuffer::new(&gpu.context, len)?;
                self.count(len, 0);
                staging
            }
        };
        let staging = self.staging.insert(staging);
        Ok((staging.pointer(), staging.len()))
    }

    /// Makes sure that there is memory to pack into.
    pub(super) fn with_pack(&mut self, gpu: &Gpu) -> Result<&mut LockedBuffer> {
        let pack = match self.pack.take() {
            Some(pack) => pack,
            None => {
                self.count(0, PACK_BYTES);
                LockedBuffer::new(&gpu.context, PACK_BYTES)?
            }
        };
        Ok(self.pack.insert(pack))
    }

    fn count(&mut self, device: usize, host: usize) {
        for ((total, own), more) in self.counts.iter_mut().zip([device, host]) {
            total.fetch_add(more as u64, Ordering::Relaxed);
            *own += more as u64;
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        for (total, own) in &self.counts {
            total.fetch_sub(*own, Ordering::Relaxed);
        }
    }
}

/// Host memory that the driver has locked.
#[derive(Debug)]
pub(super) struct LockedBuffer {
    // Dropped first.
    _registration: Registration,
    buffer: Buffer,
}

impl LockedBuffer {
    pub(super) fn new(context: &Arc<Context>, len: usize) -> Result<Self> {
        let buffer = Buffer::zeroed(len.next_multiple_of(PAGE))?;
        // SAFETY: the buffer lies beside the registration, which is dropped first.
        let registration = unsafe { Registration::new(context, buffer.as_mut_ptr(), buffer.len()) };
        let registration =
            registration.map_err(|error| error.on(context.ordinal(), "memory for copies cannot be locked"))?;
        Ok(Self { _registration: registration, buffer })
    }
}

impl std::ops::Deref for LockedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer
    }
}

impl std::ops::DerefMut for LockedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

/// A slab, with room to start at the same distance from an aligned address as it has on the host.
fn staging_bytes(staging: Staging) -> usize {
    staging.slot_bytes.max(PACK_BYTES) + STAGING_ALIGN
}

/// What staged bytes keep their distance from: the widest word of a kernel.
pub(super) const STAGING_ALIGN: usize = 16;

/// Cleared tallies, one for each box of a launch at most.
const RESULT_BYTES: usize = LAUNCH_BOXES_MAX * size_of::<Tally>();

/// Tallies, then the first tiles and the boxes of each kernel.
pub(super) const TABLE_BYTES: usize = RESULT_BYTES
    + (LAUNCH_BOXES_MAX + Kernel::ALL.len()) * size_of::<u64>()
    + LAUNCH_BOXES_MAX * size_of::<Descriptor>();

const _: () = assert!(TABLE_BYTES + STAGING_ALIGN <= LANE_EXTRA_BYTES, "what a plan says of a lane is enough");

const PAGE: usize = 4096;
