//! A load as the driver gets it: plan, memory, and how its results become a [`State`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::checkpoint::Checkpoint;
use super::devices::Gpus;
use super::job::{Count, Job, Shared, Status};
use super::land::{Landing, StageCount, Target as Memories};
use super::resolve::Assembled;
use super::shard::Shard;
use super::state::{Array, Leaf, Report, Stage, Stages, State};
use super::target::Target;
use crate::dtype::CastPolicy;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Ring, Root};
use crate::keypath::KeyPath;
use crate::place::Memory;
use crate::plan::{Limits, Plan, PlannedShard};
use crate::transform::cpu::SharedBytes;

/// A load as the driver gets it.
pub(super) struct Work {
    pub(super) landing: Arc<Landing>,
    memory: Vec<Arc<Memory>>,
    gpus: Gpus,
    pub(super) root: Arc<Root>,
    leaves: Vec<(KeyPath, Assembled)>,
    /// For every planned leaf the implementation of the PRNG key that it is the data of.
    key_impls: Vec<Option<String>>,
    skipped: Vec<KeyPath>,
    missing: Vec<KeyPath>,
    pub(super) status: Arc<Status>,
    pub(super) limits: Limits,
    pub(super) start: Instant,
    opened: Duration,
    planned: Duration,
}

/// What the driver counted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    /// Reads: time, waiting for memory, bytes.
    pub(super) read: Stage,
    pub(super) requests: u64,
    /// The most staging memory that was out at once.
    pub(super) staging_peak_bytes: u64,
}

impl Work {
    /// Pairs a plan with its memory. The clock runs since the call; planning took part of it.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        target: &Target,
        plan: Plan,
        (start, planned): (Instant, Duration),
        memory: Vec<Memory>,
        (gpus, ring): (Gpus, &Arc<Ring>),
        limits: Limits,
    ) -> Result<(Self, Job)> {
        let zeroed = |memory: &Memory| matches!(memory, Memory::Host(buffer) if buffer.starts_zeroed());
        let zeroed: Vec<bool> = memory.iter().map(zeroed).collect();
        let targets = targets(&plan, &memory, &gpus)?;
        #[allow(unsafe_code)]
        // SAFETY: each target is memory that lives in `memory`, inside this work or inside arrays that are handed out only when
        // complete, or that its owner keeps; the landing is dropped before or with the work.
        let landing = unsafe { Landing::new(plan, targets, &zeroed) };
        landing.initialise(ring)?;
        let count = Count {
            bytes_read: AtomicU64::new(0),
            bytes_total: landing.plan.bytes_requested(),
            leaves_done: AtomicU64::new(0),
            leaves_total: landing.plan.leaves.len() as u64,
        };
        let mut waiting = BTreeMap::new();
        landing.plan.leaves.iter().for_each(|leaf| *waiting.entry(leaf.priority).or_insert(0) += 1);
        let status = Arc::new(Status {
            shared: Mutex::new(Shared { waiting, ..Shared::default() }),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            count,
        });
        let leaves = target.assembled();
        let mut key_impls = vec![None; landing.plan.leaves.len()];
        for (_, assembled) in &leaves {
            if let Assembled::Planned { leaf, key_impl } = assembled {
                key_impls[*leaf].clone_from(key_impl);
            }
        }
        let work = Self {
            landing: Arc::new(landing),
            memory: memory.into_iter().map(Arc::new).collect(),
            gpus,
            root: checkpoint.root(),
            leaves,
            key_impls,
            skipped: target.skipped().to_vec(),
            missing: target.missing().to_vec(),
            status: Arc::clone(&status),
            limits,
            start,
            opened: checkpoint.opening(),
            planned,
        };
        Ok((work, Job { status, finished: false }))
    }

    /// One complete array.
    fn array(&self, leaf: usize) -> Array {
        let planned = &self.landing.plan.leaves[leaf];
        let local = planned.parts.iter().enumerate().filter_map(|(position, part)| Some((position, part, part.shard?)));
        let shards = local.map(|(position, part, shard)| {
            let device = planned.sharding.mesh.devices()[position].device;
            Shard {
                position,
                device,
                region: part.region.clone(),
                dtype: planned.dtype,
                memory: Arc::clone(&self.memory[shard as usize]),
                download: device.gpu().and_then(|ordinal| self.gpus.get(ordinal)).map(|gpu| gpu.downloader()),
            }
        });
        Array {
            path: planned.path.clone(),
            shape: planned.shape.clone(),
            dtype: planned.dtype,
            sharding: planned.sharding.clone(),
            key_impl: self.key_impls[leaf].clone(),
            lossy: self.landing.lossy(leaf),
            shards: shards.collect(),
        }
    }

    /// Staging memory for batches at work: what is left beside the plan, a slot for every worker to decode into, and what workers lock
    /// for devices; but no less than the largest batch takes, for which the planner has seen to it that the budget is enough without
    /// devices.
    pub(super) fn batch_budget(&self) -> u64 {
        let plan = &self.landing.plan;
        let slots = u64::from(self.limits.workers) * self.limits.slot_memory();
        let left = self.limits.staging_bytes.saturating_sub(slots).saturating_sub(plan.held_bytes);
        let largest = plan.batches.iter().map(|batch| plan.batch_bytes(batch)).max().unwrap_or(0);
        left.saturating_sub(self.gpus.locked_bytes_at_most()).max(largest.min(left))
    }

    /// Lets go of the results' memory, which is only the caller's from then on.
    pub(super) fn release(&mut self) {
        self.memory.clear();
    }

    pub(super) fn complete(&self, leaves: impl IntoIterator<Item = usize>) {
        let priority = |leaf: usize| self.landing.plan.leaves[leaf].priority;
        let arrays: Vec<(u32, Array)> = leaves.into_iter().map(|leaf| (priority(leaf), self.array(leaf))).collect();
        if arrays.is_empty() {
            return;
        }
        self.status.count.leaves_done.fetch_add(arrays.len() as u64, Ordering::Relaxed);
        self.status.lock().park(arrays);
        self.status.changed.notify_all();
    }

    /// Whether every leaf has all of its elements.
    pub(super) fn is_complete(&self) -> bool {
        self.status.count.leaves_done.load(Ordering::Relaxed) == self.status.count.leaves_total
    }

    /// The whole tree, once every unit has landed.
    pub(super) fn state(&self, done: &Done) -> Result<State> {
        let plan = &self.landing.plan;
        let refused = (0..plan.leaves.len()).filter(|&leaf| plan.leaves[leaf].policy == CastPolicy::Error);
        let refused: Vec<String> = refused
            .filter(|&leaf| self.landing.lossy(leaf) > 0)
            .map(|leaf| format!("{}: {} elements", plan.leaves[leaf].path, self.landing.lossy(leaf)))
            .collect();
        if !refused.is_empty() {
            return Err(Error::invalid("casting would lose values")
                .lines(refused)
                .hint("cast to a wider type, or allow it with the policy `saturate` or `wrap`"));
        }
        let leaf = |assembled: &Assembled| match assembled {
            Assembled::Planned { leaf, .. } => Leaf::Array(self.array(*leaf)),
            Assembled::Ready(leaf) => leaf.clone(),
        };
        let leaves = self.leaves.iter().map(|(path, assembled)| (path.clone(), leaf(assembled))).collect();
        Ok(State::new(leaves, self.report(done)))
    }

    fn report(&self, done: &Done) -> Report {
        let plan = &self.landing.plan;
        let loading = self.start.elapsed().saturating_sub(self.planned);
        let stage = |count: &StageCount| Stage {
            busy: Duration::from_nanos(count.busy_ns.load(Ordering::Relaxed)),
            blocked: Duration::ZERO,
            bytes: count.bytes.load(Ordering::Relaxed),
        };
        let (mut decode, transform) = (stage(&self.landing.decode), stage(&self.landing.transform));
        let copy = stage(&self.landing.copy);
        decode.blocked = (loading * self.limits.workers).saturating_sub(decode.busy + transform.busy + copy.busy);
        let lossy = (0..plan.leaves.len()).map(|leaf| (plan.leaves[leaf].path.to_string(), self.landing.lossy(leaf)));
        let (staged, locked) = self.gpus.held_bytes();
        let scratch = if decode.bytes > 0 { u64::from(self.limits.workers) * self.limits.slot_memory() } else { 0 };
        Report {
            elapsed: self.opened + self.start.elapsed(),
            bytes_logical: plan.bytes_logical(),
            bytes_needed: plan.bytes_needed(),
            bytes_read: done.read.bytes + plan.bytes_inline(),
            bytes_decoded: plan.bytes_decoded(),
            bytes_unverified: self.landing.bytes_unverified(),
            peak_host_bytes: plan.result_bytes() + plan.held_bytes + done.staging_peak_bytes + scratch + locked,
            peak_device_bytes: plan.gpu_bytes().iter().map(|(_, bytes)| bytes).sum::<u64>() + staged,
            requests: done.requests,
            launches: self.landing.launches.load(Ordering::Relaxed),
            lossy: lossy.filter(|(_, count)| *count > 0).collect(),
            skipped: self.skipped.clone(),
            missing: self.missing.clone(),
            devices: plan.device_bytes(),
            stages: Stages {
                open: Stage { busy: self.opened, ..Stage::default() },
                plan: Stage { busy: self.planned, ..Stage::default() },
                read: done.read,
                decode,
                transform,
                copy,
            },
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Tasks that a panicking driver left behind still write into the shards' memory, which may be lent: it is given
        // back only when they are done. Otherwise none is left here, and this is one comparison.
        while Arc::strong_count(&self.landing) > 1 {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Reached without a result only if the driver panicked or ended early: nobody may wait for ever.
        self.status.publish(Err(engine_dropped()));
    }
}

/// What the landing writes to: the memory of every shard, with its device. From here on the devices' work comes after what callers
/// have given their own streams.
fn targets(plan: &Plan, memory: &[Memory], gpus: &Gpus) -> Result<Vec<Memories>> {
    let mut followed: Vec<(u32, u64)> = Vec::new();
    let mut target = |(shard, memory): (&PlannedShard, &Memory)| match (memory, plan.device(shard).gpu()) {
        (Memory::Host(buffer), None) => {
            #[allow(unsafe_code)]
            // SAFETY: a buffer's own memory, which lives as long as the load; see `Work::new`.
            let shared = unsafe { SharedBytes::new(buffer.as_mut_ptr(), buffer.len()) };
            Ok(Memories::Host(shared))
        }
        (Memory::Device(memory), Some(ordinal)) => {
            let gpu = gpus.of(ordinal)?;
            if let Some(stream) = memory.stream_to_follow().filter(|stream| !followed.contains(&(ordinal, *stream))) {
                #[allow(unsafe_code)]
                // SAFETY: who made the memory's description promises a live stream, and this is the thread that called.
                unsafe { gpu.follow(stream) }?;
                followed.push((ordinal, stream));
            }
            Ok(Memories::Device(Arc::clone(gpu), memory.span()))
        }
        _ => Err(Error::bug("a shard has memory of another kind than its device")),
    };
    plan.shards.iter().zip(memory).map(&mut target).collect()
}

/// What a load ends with whose engine is gone.
pub(super) fn engine_dropped() -> Error {
    Error::new(ErrorKind::Cancelled, "the engine was dropped before the load was done")
}
