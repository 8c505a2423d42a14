//! What devices can do: copies to them and on them, and the kernels' fast paths.

use std::time::Duration;

use super::{Measured, MeasuredDevice, Sample};
use crate::error::Result;
use crate::place::{DEVICE_COPY, Gauge, Gpu, UPLOAD};
use crate::tree::devices::Gpus;

/// A device under measurement.
pub(super) struct Gauges<'g>(Vec<(&'g Gpu, Gauge<'g>, Vec<Measured>)>);

impl<'g> Gauges<'g> {
    /// Takes memory of every device: as much as a result has, up to a bound.
    ///
    /// # Errors
    /// Too little memory, or a device that fails.
    pub(super) fn new(gpus: &'g Gpus, result_bytes: u64) -> Result<Self> {
        let bytes = usize::try_from(result_bytes).unwrap_or(MEMORY_MAX).min(MEMORY_MAX);
        let gauges = gpus.iter().map(|gpu| Ok((gpu, Gauge::new(gpu, bytes)?, Vec::new())));
        gauges.collect::<Result<_>>().map(Self)
    }

    /// Measures everything once, and remembers it if it counts.
    ///
    /// # Errors
    /// A device that fails.
    pub(super) fn round(&mut self, counts: bool) -> Result<()> {
        for (_, gauge, measured) in &mut self.0 {
            let rates = gauge.round()?;
            measured.resize_with(rates.len(), Measured::default);
            for (rate, measured) in rates.into_iter().zip(measured).filter(|_| counts) {
                measured.name = rate.name;
                measured.samples.push(Sample { elapsed: rate.elapsed, cpu: Duration::ZERO, bytes: rate.bytes });
            }
        }
        Ok(())
    }

    /// How long these bytes take to all devices at once, at their rates; nothing without devices.
    pub(super) fn upload_time(&self, bytes: u64) -> Duration {
        let rates = self.0.iter().flat_map(|(.., measured)| measured).filter(|measured| measured.name == UPLOAD);
        let rate: f64 = rates.map(Measured::rate).sum();
        Duration::from_secs_f64(if rate > 0.0 { bytes as f64 / rate } else { 0.0 })
    }

    /// Everything that was measured.
    pub(super) fn measured(self) -> Vec<MeasuredDevice> {
        let device = |(gpu, gauge, measured): (&Gpu, Gauge<'_>, Vec<Measured>)| {
            let copy = measured.iter().find(|measured| measured.name == DEVICE_COPY).map_or(0.0, Measured::rate);
            MeasuredDevice { ordinal: gpu.ordinal(), bytes: gauge.bytes(), copy_rate: copy, measured }
        };
        self.0.into_iter().map(device).collect()
    }
}

/// Most memory that is copied at once, in bytes: several times any cache of a device.
const MEMORY_MAX: usize = 256 << 20;
