//! How fast a checkpoint loads on this machine, and how fast it could: both measured in one run, on the same bytes, in turns.
//!
//! ```text
//!   round 1   read, decode on one core, decode on all, fill, copy, devices │ load as stored, resharded, columns, cast, one array
//!   round 2   ..
//!             what the machine can do with these files (limits.rs, devices.rs)  what loads take (cases.rs)
//! ```
//!
//! The **limit** of a load is the slowest stage that it cannot avoid: reading the bytes that it reads at the rate at which plain
//! reads come, decoding them on all cores (but no faster than the largest unit on one), writing its results into fresh
//! memory, or copying them to devices at the rate of plain copies from locked memory. Stages overlap at best, so a load that takes as long as the slowest one is at its limit.

mod cases;
mod devices;
mod limits;

use std::time::{Duration, Instant};

use self::cases::Case;
use self::devices::Gauges;
use self::limits::Machine;
use super::checkpoint::Checkpoint;
use super::devices::DeviceStartup;
use super::engine::{Engine, EngineOptions};
use super::state::Report;
use crate::error::{Error, Result};
use crate::plan::Device;

/// What is measured.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Devices over which resharded loads are divided.
    pub devices: Vec<Device>,
    /// Rounds that count; one more before them does not.
    pub rounds: usize,
    /// Whether the checkpoint's files are dropped from the page cache before every reading measurement. Others that use them
    /// will notice.
    pub cold: bool,
    /// How loads work.
    pub engine: EngineOptions,
}

/// One measurement of one round.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Time on the clock.
    pub elapsed: Duration,
    /// Processor time of the whole process meanwhile, kernel included.
    pub cpu: Duration,
    /// Bytes of what was measured: read, decoded, written, or wanted.
    pub bytes: u64,
}

/// All rounds of one measurement.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// What was measured.
    pub name: &'static str,
    /// Every round that counts.
    pub samples: Vec<Sample>,
}

/// A load and its limit.
#[derive(Clone, Debug)]
pub struct MeasuredLoad {
    /// Time from the call to the last array; bytes wanted.
    pub measured: Measured,
    /// Of the last round.
    pub report: Report,
    /// The time that the slowest unavoidable stage takes by itself.
    pub limit: Duration,
    /// Which stage that is.
    pub limited_by: &'static str,
}

/// What one GPU does by itself, as its driver moves bytes.
#[derive(Clone, Debug)]
pub struct MeasuredDevice {
    /// Its ordinal.
    pub ordinal: u32,
    /// Bytes of the memory that was copied, from as much to as much.
    pub bytes: usize,
    /// Bytes a second of the driver's own copy on the device, read and written ones.
    pub copy_rate: f64,
    /// Copies from locked host memory; the driver's own copy on the device; kernels. The latter by the bytes that they read and
    /// write. Processor time is not measured.
    pub measured: Vec<Measured>,
}

/// What a run found.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Plain reads of the same ranges, decoding of the same units, writing fresh memory, copying.
    pub machine: Vec<Measured>,
    /// The longest that one unit took to decode.
    pub largest_unit: Duration,
    /// The GPUs among the devices.
    pub devices: Vec<MeasuredDevice>,
    /// Loads.
    pub loads: Vec<MeasuredLoad>,
    /// Workers of the engine.
    pub workers: usize,
    /// Whether the files came from the page cache (`false`) or not.
    pub cold: bool,
    /// Starting the engine, which no load includes.
    pub startup: Duration,
    /// Starting devices, which no load includes either.
    pub device_startup: DeviceStartup,
}

impl Measured {
    /// The median time.
    pub fn median(&self) -> Duration {
        let mut all: Vec<Duration> = self.samples.iter().map(|sample| sample.elapsed).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or_default()
    }

    /// Bytes a second at the median time; 0 if nothing was measured.
    pub fn rate(&self) -> f64 {
        let bytes = self.samples.first().map_or(0, |sample| sample.bytes);
        let seconds = self.median().as_secs_f64();
        if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 }
    }

    /// Median processor time for each second's worth of 10^9 bytes.
    pub fn cpu_seconds_per_gb(&self) -> f64 {
        let mut all: Vec<Duration> = self.samples.iter().map(|sample| sample.cpu).collect();
        all.sort_unstable();
        let cpu = all.get(all.len() / 2).copied().unwrap_or_default();
        let bytes = self.samples.first().map_or(0, |sample| sample.bytes);
        if bytes > 0 { cpu.as_secs_f64() * 1e9 / bytes as f64 } else { 0.0 }
    }
}

/// Measures a checkpoint.
///
/// # Errors
/// A checkpoint without arrays, one that does not load, a page cache that cannot be emptied where it should be.
pub fn bench(checkpoint: &Checkpoint, options: &BenchOptions) -> Result<Bench> {
    let engine = Engine::new(options.engine)?;
    let cases = Case::all(checkpoint, &options.devices)?;
    let Some(whole) = cases.first() else {
        return Err(Error::invalid("there are no arrays to load").hint("`touchdown ls` shows what there is"));
    };
    let plan = checkpoint.plan_within(&whole.target, engine.limits())?;
    let mut machine = Machine::new(checkpoint, &plan, engine.options().workers(), options.cold)?;
    let gpus = engine.start_devices(&plan)?;
    let mut gauges = Gauges::new(&gpus, plan.bytes_logical())?;
    let mut loads: Vec<(Vec<Sample>, Report)> = cases.iter().map(|_| (Vec::new(), Report::default())).collect();
    for round in 0..=options.rounds {
        tracing::info!(round, "measuring");
        machine.round(round > 0)?;
        gauges.round(round > 0)?;
        for (case, (samples, last)) in cases.iter().zip(&mut loads) {
            machine.prepare()?;
            let clock = Clock::start();
            let state = engine.load(checkpoint, &case.target)?.wait()?;
            let sample = clock.stop(state.report().bytes_logical);
            if round > 0 {
                samples.push(sample);
                *last = state.report().clone();
            }
        }
    }
    let loads = cases.into_iter().zip(loads).map(|(case, (samples, report))| {
        let (limited_by, limit) = machine.limit(&report, &gauges);
        MeasuredLoad { measured: Measured { name: case.name, samples }, report, limit, limited_by }
    });
    let loads = loads.collect();
    let (startup, workers) = (engine.startup(), engine.options().workers());
    let (largest_unit, cold) = (machine.largest_unit(), options.cold);
    let (devices, device_startup) = (gauges.measured(), engine.device_startup());
    Ok(Bench { machine: machine.measured(), largest_unit, devices, loads, workers, cold, startup, device_startup })
}

/// Time on the wall and of the processor.
struct Clock(Instant, Duration);

impl Clock {
    fn start() -> Self {
        Self(Instant::now(), cpu_time())
    }

    fn stop(self, bytes: u64) -> Sample {
        Sample { elapsed: self.0.elapsed(), cpu: cpu_time().saturating_sub(self.1), bytes }
    }
}

/// Processor time of this process so far.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
