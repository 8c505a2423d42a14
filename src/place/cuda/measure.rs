//! How fast a device is: copies to it and on it, and beside them the kernels' fast paths.
//!
//! Each is given to a stream several times, then waited for, so that the wait does not count. Copies and kernels on the device
//! are counted by the bytes that they read and write, so that their rates compare.

use std::mem::size_of;
use std::time::{Duration, Instant};

use super::driver::{Current, DeviceBuffer, Outcome};
use super::gpu::Gpu;
use super::lane::{LockedBuffer, TABLE_BYTES};
use crate::dtype::{CastPolicy, DType};
use crate::error::{Error, Result};
use crate::place::{DEVICE_COPY, Rate, UPLOAD};
use crate::shape::strides;
use crate::transform::cuda::{Launch, Placement, THREADS, Tally, lower};
use crate::transform::{Convert, Op};

/// Memory of a device to measure with.
#[derive(Debug)]
pub(crate) struct Gauge<'g> {
    gpu: &'g Gpu,
    bytes: usize,
    source: DeviceBuffer,
    target: DeviceBuffer,
    tables: DeviceBuffer,
    /// What is copied to the device; launches' tables go through its beginning.
    locked: LockedBuffer,
}

/// A kernel's work: its name, and what it copies.
struct Case {
    name: &'static str,
    op: Op,
    /// Bytes that are read and written.
    moved: u64,
}

impl<'g> Gauge<'g> {
    /// Takes `bytes` of memory twice, which is rounded to whole tiles.
    ///
    /// # Errors
    /// Too little memory, or a device that fails.
    pub(crate) fn new(gpu: &'g Gpu, bytes: usize) -> Result<Self> {
        let bytes = (bytes / GRAIN).max(1) * GRAIN;
        let mut locked = LockedBuffer::new(&gpu.context, bytes.min(LOCKED_BYTES))?;
        // Floats like weights: what is lossy is rare, and no page is zero.
        let mut state = 1u32;
        for element in locked.chunks_exact_mut(size_of::<f32>()) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            element.copy_from_slice(&((state as i32) as f32 / i32::MAX as f32).to_le_bytes());
        }
        let make = |len| DeviceBuffer::new(&gpu.context, len).map_err(|error| gpu.failed(error));
        let (source, target, tables) = (make(bytes)?, make(bytes)?, make(TABLE_BYTES)?);
        let gauge = Self { gpu, bytes, source, target, tables, locked };
        gauge.timed(1, |current| gauge.upload(current, &gauge.source))?;
        Ok(gauge)
    }

    /// Bytes of each copy.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Measures everything once.
    ///
    /// # Errors
    /// A device that fails.
    pub(crate) fn round(&mut self) -> Result<Vec<Rate>> {
        let mut rates = Vec::new();
        let elapsed = self.timed(1, |current| self.upload(current, &self.target))?;
        rates.push(Rate { name: UPLOAD, bytes: self.bytes as u64, elapsed });
        let elapsed = self.timed(REPEATS, |current| {
            let (target, source) = (self.target.pointer(), self.source.pointer());
            // SAFETY: both are this value's, and it waits before they are used otherwise.
            unsafe { current.copy_on_device(target, source, self.bytes, &self.gpu.copies) }
        })?;
        rates.push(Rate { name: DEVICE_COPY, bytes: 2 * self.bytes as u64, elapsed });
        for case in cases(self.bytes as u64) {
            rates.push(Rate { name: case.name, bytes: case.moved, elapsed: self.kernel(&case.op)? });
        }
        Ok(rates)
    }

    /// The time that a kernel takes.
    fn kernel(&mut self, op: &Op) -> Result<Duration> {
        let placement = Placement {
            op,
            source: self.source.pointer(),
            source_bytes: self.bytes,
            target: self.target.pointer(),
            target_bytes: self.bytes,
            counter: 0,
        };
        let launches = lower(&[placement]).map_err(|error| Error::bug(error.to_string()))?;
        let mut calls = Vec::new();
        let (mut table, pointer) = (vec![0u8; size_of::<Tally>()], self.tables.pointer());
        for launch in &launches {
            let mut write = |bytes: &[u8]| {
                table.extend_from_slice(bytes);
                pointer + (table.len() - bytes.len()) as u64
            };
            let first_tile = write(bytemuck::cast_slice(&launch.first_tile));
            let boxes = write(bytemuck::cast_slice(&launch.descriptors));
            calls.push((launch, first_tile, boxes));
        }
        let room = self.locked.get_mut(..table.len()).ok_or_else(|| Error::bug("tables are larger than their room"))?;
        let kept = room.to_vec();
        room.copy_from_slice(&table);
        let sent = self.timed(1, |current| {
            // SAFETY: the locked memory and the tables are this value's; `timed` waits for the copy.
            unsafe { current.upload(pointer, self.locked.as_ptr(), table.len(), &self.gpu.copies) }
        });
        self.locked[..table.len()].copy_from_slice(&kept);
        sent?;
        self.timed(REPEATS, |current| {
            calls.iter().try_for_each(|&(launch, first_tile, boxes)| self.launch(current, launch, first_tile, boxes))
        })
    }

    fn launch(&self, current: &Current<'_>, launch: &Launch, first_tile: u64, boxes: u64) -> Outcome<()> {
        let count = u32::try_from(launch.descriptors.len()).unwrap_or(u32::MAX);
        let arguments = (boxes, first_tile, count, self.tables.pointer());
        let function = self.gpu.function(launch.kernel);
        // SAFETY: the tables have arrived, and the boxes lie in this value's memory: `lower` has compared them with it.
        unsafe { current.launch(function, (launch.blocks(), THREADS), arguments, &self.gpu.kernels) }
    }

    /// Fills memory from the locked memory.
    fn upload(&self, current: &Current<'_>, to: &DeviceBuffer) -> Outcome<()> {
        for at in (0..self.bytes).step_by(self.locked.len()) {
            let len = self.locked.len().min(self.bytes - at);
            let target = to.pointer() + at as u64;
            // SAFETY: both are this value's and long enough; `timed` waits for the copy.
            unsafe { current.upload(target, self.locked.as_ptr(), len, &self.gpu.copies) }?;
        }
        Ok(())
    }

    /// How long one of several calls takes that are given one behind the other.
    fn timed(&self, repeats: u32, call: impl Fn(&Current<'_>) -> Outcome<()>) -> Result<Duration> {
        let run = || {
            let current = self.gpu.context.enter()?;
            let start = Instant::now();
            let given = (0..repeats).try_for_each(|_| call(&current));
            let ended = current.drain(&self.gpu.copies).and(current.drain(&self.gpu.kernels));
            given.and(ended).map(|()| start.elapsed() / repeats)
        };
        run().map_err(|error| self.gpu.failed(error))
    }
}

/// The fast paths: boxes that fill the memory on the side that is larger.
fn cases(bytes: u64) -> Vec<Case> {
    use DType::{BFloat16, Float8E4M3FN, Float16, Float32};
    let case = |name, from: DType, to: DType, extent: [u64; 2], source_strides: Vec<u64>, target_strides: Vec<u64>| {
        let convert = Convert { from, to, swap: false, policy: CastPolicy::Saturate };
        let moved = extent[0] * extent[1] * (from.size() + to.size()) as u64;
        let op =
            Op { extent: extent.to_vec(), source_strides, target_strides, source_start: 0, target_start: 0, convert };
        Case { name, op, moved }
    };
    let plain = |name, from: DType, to: DType| {
        let extent = [bytes / (from.size().max(to.size()) as u64 * COLUMNS), COLUMNS];
        case(name, from, to, extent, strides(&extent), strides(&extent))
    };
    let turned = |name, dtype: DType| {
        let extent = [COLUMNS, bytes / (dtype.size() as u64 * COLUMNS)];
        case(name, dtype, dtype, extent, vec![1, COLUMNS], strides(&extent))
    };
    let rows = bytes / (4 * COLUMNS);
    vec![
        plain("copy", Float32, Float32),
        case("half of the columns", Float32, Float32, [rows, COLUMNS / 2], vec![COLUMNS, 1], vec![COLUMNS / 2, 1]),
        turned("transpose, 4 bytes", Float32),
        turned("transpose, 2 bytes", BFloat16),
        plain("float32 to bfloat16", Float32, BFloat16),
        plain("bfloat16 to float32", BFloat16, Float32),
        plain("float32 to float16", Float32, Float16),
        plain("float16 to float32", Float16, Float32),
        plain("float32 to float8_e4m3fn", Float32, Float8E4M3FN),
        plain("float8_e4m3fn to bfloat16", Float8E4M3FN, BFloat16),
    ]
}

/// How often a copy or a kernel is given before it is waited for.
const REPEATS: u32 = 10;

/// Elements of a row: a usual width of a layer.
const COLUMNS: u64 = 4096;

/// The memory is whole rows of the widest elements, of at least a tile.
const GRAIN: usize = 1 << 20;

/// Locked memory that uploads come from: large copies, and little time to lock it.
const LOCKED_BYTES: usize = 32 << 20;
