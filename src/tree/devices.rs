//! The devices of an engine: started by the first load that needs them, kept for the next.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::io::Ring;
use crate::limits::SLOT_BYTES;
use crate::place::{Destination, Gpu, HostDestination, Memory, ShardSpec, Staging};
use crate::plan::{Limits, Plan};

/// What starting devices has cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStartup {
    /// Contexts, streams, and the translation of kernels.
    pub cuda: Duration,
    /// Locking staging memory for copies.
    pub pin: Duration,
}

/// GPUs that are started, by ordinal.
#[derive(Clone, Debug, Default)]
pub(super) struct Gpus(Vec<Arc<Gpu>>);

/// Those of an engine.
#[derive(Debug)]
pub(super) struct Devices {
    ring: Arc<Ring>,
    staging: Staging,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    gpus: Gpus,
    /// Pairs between which copies are direct, where the machine can.
    reached: Vec<(u32, u32)>,
    startup: DeviceStartup,
}

impl Devices {
    pub(super) fn new(ring: Arc<Ring>, limits: &Limits) -> Self {
        let slot_bytes = usize::try_from(limits.slot_bytes).unwrap_or(SLOT_BYTES);
        let staging = Staging { slot_bytes, workers: limits.workers as usize };
        Self { ring, staging, open: Mutex::default() }
    }

    pub(super) fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    pub(super) fn startup(&self) -> DeviceStartup {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).startup
    }

    /// The GPUs of a plan, started, and as many slots locked as it needs.
    pub(super) fn open(&self, plan: &Plan) -> Result<Gpus> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        let mut wanted = Vec::new();
        for (ordinal, _) in plan.gpu_bytes() {
            let gpu = match open.gpus.get(ordinal) {
                Some(gpu) => Arc::clone(gpu),
                None => {
                    let gpu = Gpu::open(ordinal, self.staging)?;
                    open.gpus.0.push(Arc::clone(&gpu));
                    gpu
                }
            };
            wanted.push(gpu);
        }
        let wanted = Gpus(wanted);
        for shard in &plan.shards {
            let source = shard.copy_of.and_then(|source| plan.device(&plan.shards[source as usize]).gpu());
            let (Some(to), Some(from)) = (plan.device(shard).gpu(), source) else { continue };
            if !open.reached.contains(&(to, from)) {
                wanted.of(to)?.reach(wanted.of(from)?)?;
                open.reached.push((to, from));
            }
        }
        open.startup.cuda += start.elapsed();
        if let Some(first) = wanted.0.first() {
            let start = Instant::now();
            self.ring.pin(first.pinner(), usize::try_from(plan.slots()).unwrap_or(0))?;
            open.startup.pin += start.elapsed();
        }
        Ok(wanted)
    }
}

impl Gpus {
    pub(super) fn get(&self, ordinal: u32) -> Option<&Arc<Gpu>> {
        self.0.iter().find(|gpu| gpu.ordinal() == ordinal)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Gpu> {
        self.0.iter().map(|gpu| &**gpu)
    }

    pub(super) fn of(&self, ordinal: u32) -> Result<&Arc<Gpu>> {
        self.get(ordinal)
            .ok_or_else(|| Error::bug("a device was not started").at("device", format_args!("cuda:{ordinal}")))
    }

    /// Whether each has memory for what workers stage in, beside results that it has already.
    pub(super) fn expect_staging(&self) -> Result<()> {
        self.0.iter().try_for_each(|gpu| gpu.expect_room(&[]))
    }

    /// Waits until all of them have done what they were given, by whomever.
    pub(super) fn settle(&self) -> Result<()> {
        self.0.iter().try_for_each(|gpu| gpu.settle())
    }

    /// Locked host memory that workers will have at most, beside slots, in bytes.
    pub(super) fn locked_bytes_at_most(&self) -> u64 {
        self.0.iter().map(|gpu| gpu.locked_bytes_at_most()).sum()
    }

    /// Memory of devices, and locked host memory, that is used on the way, in bytes.
    pub(super) fn held_bytes(&self) -> (u64, u64) {
        self.0.iter().map(|gpu| gpu.held_bytes()).fold((0, 0), |sum, held| (sum.0 + held.0, sum.1 + held.1))
    }
}

/// Memory that the engine allocates: of the host, and of devices in slabs.
#[derive(Debug)]
pub(super) struct OwnMemory(pub(super) Gpus);

impl Destination for OwnMemory {
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>> {
        let mut memory: Vec<Option<Memory>> = shards.iter().map(|_| None).collect();
        let mut take = |gpu: Option<u32>, make: &mut dyn FnMut(&[&ShardSpec]) -> Result<Vec<Memory>>| {
            let (places, own): (Vec<usize>, Vec<&ShardSpec>) =
                shards.iter().enumerate().filter(|(_, shard)| shard.device.gpu() == gpu).unzip();
            for (place, made) in places.into_iter().zip(make(&own)?) {
                memory[place] = Some(made);
            }
            Ok::<(), Error>(())
        };
        for gpu in &self.0.0 {
            take(Some(gpu.ordinal()), &mut |own| Ok(gpu.prepare(own)?.into_iter().map(Memory::Device).collect()))?;
        }
        take(None, &mut |own| HostDestination.prepare(&own.iter().map(|shard| (*shard).clone()).collect::<Vec<_>>()))?;
        memory.into_iter().map(|memory| memory.ok_or_else(|| Error::bug("a shard without a device"))).collect()
    }
}
