//! One load: what the caller holds ([`Job`]) and what the engine's driver does ([`run`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rayon::ThreadPool;

use super::checkpoint::Checkpoint;
use super::land::{FirstError, Landing, Stream, located};
use super::state::{Array, Leaf, Report, Shard, Stage, Stages, State};
use super::target::{Assembled, Target};
use crate::dtype::CastPolicy;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{
    Budget, Buffer, Completion, Credit, OpenFile, ReadAt, Reader, ReaderWaker, Ring, Root, Slot, Ticket, read_error,
    short_file,
};
use crate::keypath::KeyPath;
use crate::plan::{Limits, Plan, Source};
use crate::transform::cpu::SharedBytes;

/// A load in progress.
///
/// It is three things at once: an iterator that blocks for the next finished array, a future of the whole [`State`], and a
/// handle to ask how far it is or to cancel it. Dropping it cancels: reads in flight are waited for by the engine, not by
/// the dropping thread.
#[derive(Debug)]
pub struct Job {
    status: Arc<Status>,
    /// Whether the result was taken, so that dropping need not cancel.
    finished: bool,
}

/// How far a load is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Data bytes that have arrived.
    pub bytes_read: u64,
    /// Data bytes that will be read in all.
    pub bytes_total: u64,
    /// Arrays that are complete.
    pub leaves_done: u64,
    /// Arrays in all.
    pub leaves_total: u64,
}

impl Job {
    /// Blocks until everything is loaded.
    ///
    /// # Errors
    /// The first failure in plan order; [`ErrorKind::Cancelled`] after [`cancel`](Self::cancel).
    pub fn wait(mut self) -> Result<State> {
        self.finished = true;
        let mut shared = self.status.lock();
        loop {
            if let Some(result) = shared.result.take() {
                return result;
            }
            shared = self.status.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let count = &self.status.count;
        Progress {
            bytes_read: count.bytes_read.load(Ordering::Relaxed),
            bytes_total: count.bytes_total,
            leaves_done: count.leaves_done.load(Ordering::Relaxed),
            leaves_total: count.leaves_total,
        }
    }

    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_finished(&self) -> bool {
        self.status.lock().result.is_some()
    }

    /// Asks it to stop. Work in progress is finished, nothing new is started; the result becomes
    /// [`ErrorKind::Cancelled`] unless everything was done already.
    pub fn cancel(&self) {
        self.status.cancel();
    }
}

impl Iterator for Job {
    type Item = Array;

    /// The next finished array, blocking: in the caller's order where one was given (leaves of one pattern as they complete),
    /// otherwise as they complete. `None` when no more will come: [`Job::wait`] tells whether the load succeeded.
    fn next(&mut self) -> Option<Array> {
        let mut shared = self.status.lock();
        loop {
            if let Some(array) = shared.ready.pop_front() {
                return Some(array);
            }
            if shared.result.is_some() {
                return None;
            }
            shared = self.status.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Future for Job {
    type Output = Result<State>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<State>> {
        let result = {
            let mut shared = self.status.lock();
            let result = shared.result.take();
            if result.is_none() {
                shared.waker = Some(context.waker().clone());
            }
            result
        };
        match result {
            Some(result) => {
                self.finished = true;
                Poll::Ready(result)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.finished {
            self.status.cancel();
        }
    }
}

/// What the job and the driver share.
#[derive(Debug)]
struct Status {
    shared: Mutex<Shared>,
    changed: Condvar,
    cancelled: AtomicBool,
    count: Count,
}

#[derive(Default)]
struct Shared {
    ready: VecDeque<Array>,
    /// Complete, but leaves that the caller wants earlier are not.
    parked: Vec<(u32, Array)>,
    /// For every priority how many leaves are not complete.
    waiting: BTreeMap<u32, usize>,
    result: Option<Result<State>>,
    waker: Option<Waker>,
    /// Wakes the driver out of waiting for a read, so that a cancel is seen at once.
    driver: Option<Arc<dyn ReaderWaker>>,
}

impl Shared {
    /// Takes complete arrays in and releases those that nothing earlier is waited for.
    fn park(&mut self, arrays: Vec<(u32, Array)>) {
        for (priority, _) in &arrays {
            if let Some(waiting) = self.waiting.get_mut(priority) {
                *waiting -= 1;
                if *waiting == 0 {
                    self.waiting.remove(priority);
                }
            }
        }
        self.parked.extend(arrays);
        let turn = self.waiting.keys().next().copied().unwrap_or(u32::MAX);
        let (mut now, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.parked).into_iter().partition(|(priority, _)| *priority <= turn);
        now.sort_by_key(|(priority, _)| *priority);
        self.ready.extend(now.into_iter().map(|(_, array)| array));
        self.parked = later;
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("ready", &self.ready.len()).field("result", &self.result).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Count {
    bytes_read: AtomicU64,
    bytes_total: u64,
    leaves_done: AtomicU64,
    leaves_total: u64,
}

impl Status {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        let driver = self.lock().driver.clone();
        if let Some(driver) = driver {
            driver.wake();
        }
    }

    fn publish(&self, result: Result<State>) {
        let mut shared = self.lock();
        if shared.result.is_none() {
            shared.result = Some(result);
        }
        shared.driver = None;
        let waker = shared.waker.take();
        drop(shared);
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A load as the driver gets it.
pub(super) struct Work {
    landing: Arc<Landing>,
    memory: Vec<Arc<Buffer>>,
    root: Arc<Root>,
    leaves: Vec<(KeyPath, Assembled)>,
    /// For every planned leaf the implementation of the PRNG key that it is the data of.
    key_impls: Vec<Option<String>>,
    skipped: Vec<KeyPath>,
    missing: Vec<KeyPath>,
    status: Arc<Status>,
    limits: Limits,
    start: Instant,
    opened: Duration,
    planned: Duration,
}

impl Work {
    /// Pairs a plan with its memory.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        target: &Target,
        plan: Plan,
        planned: Duration,
        memory: Vec<Buffer>,
        limits: Limits,
    ) -> Result<(Self, Job)> {
        let start = Instant::now();
        let zeroed: Vec<bool> = memory.iter().map(Buffer::starts_zeroed).collect();
        #[allow(unsafe_code)]
        // SAFETY: each pointer is the start of a buffer that lives in `memory`, inside this work or inside arrays that are
        // handed out only when complete; the landing is dropped before or with the work.
        let landing = unsafe {
            let targets = memory.iter().map(|buffer| SharedBytes::new(buffer.as_mut_ptr(), buffer.len())).collect();
            Landing::new(plan, targets)
        };
        for (shard, zeroed) in zeroed.into_iter().enumerate() {
            landing.initialise(shard, zeroed);
        }
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
        let shards = local.map(|(position, part, shard)| Shard {
            position,
            device: planned.sharding.mesh.devices()[position].device,
            region: part.region.clone(),
            dtype: planned.dtype,
            data: Arc::clone(&self.memory[shard as usize]),
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

    fn complete(&self, leaves: impl IntoIterator<Item = usize>) {
        let priority = |leaf: usize| self.landing.plan.leaves[leaf].priority;
        let arrays: Vec<(u32, Array)> = leaves.into_iter().map(|leaf| (priority(leaf), self.array(leaf))).collect();
        if arrays.is_empty() {
            return;
        }
        self.status.count.leaves_done.fetch_add(arrays.len() as u64, Ordering::Relaxed);
        self.status.lock().park(arrays);
        self.status.changed.notify_all();
    }

    /// The whole tree, once every unit has landed.
    fn state(&self, drive: &Drive<'_>) -> Result<State> {
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
        Ok(State { leaves, report: self.report(drive) })
    }

    fn report(&self, drive: &Drive<'_>) -> Report {
        let plan = &self.landing.plan;
        let loading = self.start.elapsed();
        let stage = |count: &super::land::StageCount| Stage {
            busy: Duration::from_nanos(count.busy_ns.load(Ordering::Relaxed)),
            blocked: Duration::ZERO,
            bytes: count.bytes.load(Ordering::Relaxed),
        };
        let (mut decode, transform) = (stage(&self.landing.decode), stage(&self.landing.transform));
        decode.blocked = (loading * self.limits.workers).saturating_sub(decode.busy + transform.busy);
        let lossy = (0..plan.leaves.len()).map(|leaf| (plan.leaves[leaf].path.to_string(), self.landing.lossy(leaf)));
        let scratch = if decode.bytes > 0 { u64::from(self.limits.workers) * self.limits.slot_bytes } else { 0 };
        Report {
            elapsed: self.opened + self.planned + loading,
            bytes_logical: plan.bytes_logical(),
            bytes_needed: plan.bytes_needed(),
            bytes_read: drive.read.bytes + plan.bytes_inline(),
            bytes_decoded: plan.bytes_decoded(),
            bytes_unverified: self.landing.bytes_unverified(),
            peak_host_bytes: plan.result_bytes() + drive.budget.peak() + scratch,
            requests: drive.requests,
            lossy: lossy.filter(|(_, count)| *count > 0).collect(),
            skipped: self.skipped.clone(),
            missing: self.missing.clone(),
            devices: plan.device_bytes(),
            stages: Stages {
                open: Stage { busy: self.opened, ..Stage::default() },
                plan: Stage { busy: self.planned, ..Stage::default() },
                read: drive.read,
                decode,
                transform,
                copy: Stage::default(),
            },
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Reached without a result only if the driver panicked or ended early: nobody may wait for ever.
        self.status.publish(Err(Error::new(ErrorKind::Cancelled, "the engine was dropped before the load was done")));
    }
}

/// Does one load on the driver's thread.
pub(super) fn run(work: Work, reader: &mut dyn Reader, pool: &ThreadPool, ring: &Arc<Ring>) {
    work.status.lock().driver = Some(reader.waker());
    let reserved = u64::from(work.limits.workers) * work.limits.slot_bytes;
    let mut drive = Drive {
        work: &work,
        reader,
        pool,
        ring,
        budget: Budget::new(work.limits.staging_bytes.saturating_sub(reserved)),
        error: Arc::new(FirstError::default()),
        done: Arc::new(Mutex::new(Vec::new())),
        tasks: 0,
        next_batch: 0,
        next_ticket: 0,
        reads: HashMap::new(),
        streams: HashMap::new(),
        files: HashMap::new(),
        read: Stage::default(),
        requests: 0,
    };
    work.complete(work.landing.leaves_without_units());
    drive.run();
    let cancelled = work.status.cancelled.load(Ordering::Acquire) && drive.next_batch < work.landing.plan.batches.len();
    let result = match drive.error.take() {
        Some(error) => Err(error),
        None if cancelled => Err(Error::new(ErrorKind::Cancelled, "the load was cancelled")),
        None => work.state(&drive),
    };
    tracing::info!(
        bytes_read = drive.read.bytes,
        requests = drive.requests,
        ms = work.start.elapsed().as_millis() as u64,
        ok = result.is_ok(),
        "loaded"
    );
    work.status.publish(result);
}

/// The driver's bookkeeping for one load.
struct Drive<'a> {
    work: &'a Work,
    reader: &'a mut dyn Reader,
    pool: &'a ThreadPool,
    ring: &'a Arc<Ring>,
    budget: Arc<Budget>,
    error: Arc<FirstError>,
    done: Arc<Mutex<Vec<Done>>>,
    /// Tasks that have not reported back.
    tasks: usize,
    next_batch: usize,
    next_ticket: u64,
    /// Reads in flight.
    reads: HashMap<Ticket, Reading>,
    /// Units larger than a slot, by batch.
    streams: HashMap<usize, Flow>,
    files: HashMap<u32, Arc<OpenFile>>,
    read: Stage,
    requests: u64,
}

/// What a read in flight is for.
enum Reading {
    Batch { batch: usize, credit: Credit },
    Segment { batch: usize },
}

/// What a task reports.
enum Done {
    Batch { leaves: Vec<usize> },
    Segment { batch: usize, stream: Option<Box<Stream>> },
    Finished { batch: usize, leaves: Vec<usize> },
}

/// A unit larger than a slot on its way: at most two slots, one being read while the other is decoded.
struct Flow {
    unit: u32,
    file: Arc<OpenFile>,
    /// Next byte to read, and the end.
    next: u64,
    end: u64,
    /// Segments that have arrived and wait for the decoder, in order.
    ready: VecDeque<(Slot, usize)>,
    reading: bool,
    /// The decoder, unless a task has it.
    stream: Option<Box<Stream>>,
    busy: bool,
    _credit: Credit,
}

impl Drive<'_> {
    fn run(&mut self) {
        loop {
            let blocked = self.admit();
            self.collect();
            if self.reads.is_empty() && self.tasks == 0 && self.streams.is_empty() {
                if self.stopping() || self.next_batch == self.work.landing.plan.batches.len() {
                    return;
                }
                if blocked {
                    // Nothing is at work, so nothing will free memory: the planner has promised that this cannot be.
                    let error = Error::bug("a unit waits for memory that nobody holds");
                    self.error.put(u32::MAX, error);
                }
                continue;
            }
            let waited = Instant::now();
            let completion = self.reader.next(None);
            if blocked {
                self.read.blocked += waited.elapsed();
            }
            if let Some(completion) = completion {
                self.completed(completion);
            }
        }
    }

    fn stopping(&self) -> bool {
        self.error.is_set() || self.work.status.cancelled.load(Ordering::Acquire)
    }

    /// Starts batches as memory and the reader's depth allow. Returns whether memory was what stopped it.
    fn admit(&mut self) -> bool {
        let plan = &self.work.landing.plan;
        while !self.stopping() && self.next_batch < plan.batches.len() {
            if self.reads.len() >= self.reader.depth()
                || self.tasks >= TASKS_PER_WORKER * self.work.limits.workers as usize
            {
                return false;
            }
            let number = self.next_batch;
            let batch = &plan.batches[number];
            let units = &plan.units[batch.units.start as usize..batch.units.end as usize];
            let working = units.iter().map(|unit| unit.working_bytes).max().unwrap_or(0);
            let Some(read) = batch.read else {
                self.next_batch += 1;
                self.spawn_batch(number, None);
                continue;
            };
            let slots = if read.len > self.work.limits.slot_bytes { 2 } else { 1 };
            let Some(credit) = self.budget.take(slots * self.work.limits.slot_bytes + working) else { return true };
            self.next_batch += 1;
            tracing::debug!(batch = number, offset = read.offset, len = read.len, units = units.len(), "read");
            if let Err(error) = self.start(number, read.file, read.offset, read.len, credit) {
                let first = &plan.units[batch.units.start as usize];
                self.error.put(batch.units.start, located(error, plan, first));
            }
        }
        false
    }

    fn start(&mut self, batch: usize, file: u32, offset: u64, len: u64, credit: Credit) -> Result<()> {
        let file = self.file(file)?;
        let end = offset.checked_add(len).filter(|end| *end <= file.size());
        let Some(end) = end else {
            return Err(short_file(&self.work.root.shown(file.path()), offset, len, file.size()));
        };
        if len <= self.work.limits.slot_bytes {
            let buffer = self.ring.slot()?;
            self.submit(Reading::Batch { batch, credit }, file, offset, len, buffer);
            return Ok(());
        }
        let unit = self.work.landing.plan.batches[batch].units.start;
        let stream = Stream::new(&self.work.landing, &self.work.landing.plan.units[unit as usize], len, self.ring)?;
        let flow = Flow {
            unit,
            file,
            next: offset,
            end,
            ready: VecDeque::new(),
            reading: false,
            stream: Some(Box::new(stream)),
            busy: false,
            _credit: credit,
        };
        self.streams.insert(batch, flow);
        self.advance(batch);
        Ok(())
    }

    fn submit(&mut self, reading: Reading, file: Arc<OpenFile>, offset: u64, len: u64, buffer: Slot) {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.requests += 1;
        self.read.bytes += len;
        self.reads.insert(ticket, reading);
        // At most a slot, which is a usize.
        self.reader.submit(ticket, ReadAt { file, offset, len: len as usize, buffer });
    }

    fn file(&mut self, number: u32) -> Result<Arc<OpenFile>> {
        if let Some(file) = self.files.get(&number) {
            return Ok(Arc::clone(file));
        }
        if self.files.len() >= OPEN_FILES_MAX {
            self.files.clear();
        }
        let path = &self.work.landing.plan.files[number as usize];
        let file = self.work.root.file(path)?.ok_or_else(|| {
            Error::not_found("a data file of the checkpoint is missing")
                .at("file", self.work.root.shown(path))
                .hint("the checkpoint is incomplete; copy it again")
        })?;
        let file = Arc::new(file);
        self.files.insert(number, Arc::clone(&file));
        Ok(file)
    }

    /// Takes a finished read to the workers.
    fn completed(&mut self, completion: Completion) {
        let Completion { ticket, read, result, busy } = completion;
        self.read.busy += busy;
        let Some(reading) = self.reads.remove(&ticket) else { return };
        self.work.status.count.bytes_read.fetch_add(read.len as u64, Ordering::Relaxed);
        let plan = &self.work.landing.plan;
        let batch = match &reading {
            Reading::Batch { batch, .. } | Reading::Segment { batch } => *batch,
        };
        if let Err(error) = result {
            let shown = self.work.root.shown(read.file.path());
            let error = read_error(error, &shown, read.offset, read.len as u64, read.file.size());
            let unit = plan.batches[batch].units.start;
            let first = &plan.units[unit as usize];
            self.error.put(unit, located(error, plan, first));
            self.abandon(batch);
            return;
        }
        match reading {
            Reading::Batch { batch, credit } => self.spawn_batch(batch, Some((read.buffer, credit))),
            Reading::Segment { batch } => {
                if let Some(flow) = self.streams.get_mut(&batch) {
                    flow.reading = false;
                    flow.ready.push_back((read.buffer, read.len));
                }
                self.advance(batch);
            }
        }
    }

    /// Gives a stream up, unless a task still has its decoder.
    fn abandon(&mut self, batch: usize) {
        if let Some(flow) = self.streams.get_mut(&batch) {
            flow.reading = false;
            flow.ready.clear();
            if !flow.busy {
                self.streams.remove(&batch);
            }
        }
    }

    /// Decodes every unit of a batch in one task.
    fn spawn_batch(&mut self, number: usize, read: Option<(Slot, Credit)>) {
        let (landing, ring, error) = (Arc::clone(&self.work.landing), Arc::clone(self.ring), Arc::clone(&self.error));
        self.spawn(move || {
            let batch = &landing.plan.batches[number];
            let mut leaves = Vec::new();
            for position in batch.units.clone() {
                let unit = &landing.plan.units[position as usize];
                let stored: Result<&[u8]> = match (&unit.source, &read, batch.read) {
                    (Source::File { offset, len, .. }, Some((slot, _)), Some(range)) => {
                        let from = (offset - range.offset) as usize;
                        slot.get(from..from + *len as usize).ok_or_else(|| Error::bug("a unit lies outside its read"))
                    }
                    (Source::Inline(bytes), ..) => Ok(bytes),
                    (Source::Fill(element), ..) => Ok(element),
                    _ => Err(Error::bug("a unit has no bytes")),
                };
                match stored.and_then(|stored| landing.land(unit, stored, &ring)) {
                    Ok(done) => leaves.extend(done),
                    Err(failed) => error.put(position, failed),
                }
            }
            Done::Batch { leaves }
        });
    }

    /// Moves a stream on: reads ahead, decodes what has arrived, ends it.
    fn advance(&mut self, batch: usize) {
        let stopping = self.stopping();
        let slot_bytes = self.work.limits.slot_bytes;
        let Some(flow) = self.streams.get_mut(&batch) else { return };
        if stopping {
            flow.ready.clear();
            if !flow.busy && !flow.reading {
                self.streams.remove(&batch);
            }
            return;
        }
        let held = flow.ready.len() + usize::from(flow.busy) + usize::from(flow.reading);
        if !flow.reading && flow.next < flow.end && held < 2 {
            let (file, offset, len) = (Arc::clone(&flow.file), flow.next, slot_bytes.min(flow.end - flow.next));
            flow.next += len;
            flow.reading = true;
            match self.ring.slot() {
                Ok(buffer) => self.submit(Reading::Segment { batch }, file, offset, len, buffer),
                Err(error) => {
                    self.error.put(u32::MAX, error);
                    return self.abandon(batch);
                }
            }
        }
        let Some(flow) = self.streams.get_mut(&batch) else { return };
        if flow.busy {
            return;
        }
        let ended = flow.next == flow.end && !flow.reading && flow.ready.is_empty();
        let segment = flow.ready.pop_front();
        if segment.is_none() && !ended {
            return;
        }
        let Some(mut stream) = flow.stream.take() else { return };
        flow.busy = true;
        let position = flow.unit;
        let (landing, error) = (Arc::clone(&self.work.landing), Arc::clone(&self.error));
        self.spawn(move || {
            let unit = &landing.plan.units[position as usize];
            let fail = |failed: Error| error.put(position, located(failed, &landing.plan, unit));
            match segment {
                Some((slot, len)) => match stream.feed(&landing, unit, &slot[..len]) {
                    Ok(()) => Done::Segment { batch, stream: Some(stream) },
                    Err(failed) => {
                        fail(failed);
                        Done::Segment { batch, stream: None }
                    }
                },
                None => {
                    let leaves = match stream.finish(unit) {
                        Ok(()) => landing.landed(unit),
                        Err(failed) => {
                            fail(failed);
                            Vec::new()
                        }
                    };
                    Done::Finished { batch, leaves }
                }
            }
        });
    }

    /// Runs a task on the workers. A panic in it is a bug and fails the load instead of the process.
    fn spawn(&mut self, task: impl FnOnce() -> Done + Send + 'static) {
        self.tasks += 1;
        let (done, error, waker) = (Arc::clone(&self.done), Arc::clone(&self.error), self.reader.waker());
        self.pool.spawn(move || {
            let report = catch_unwind(AssertUnwindSafe(task)).unwrap_or_else(|_| {
                error.put(0, Error::bug("a worker panicked"));
                Done::Batch { leaves: Vec::new() }
            });
            done.lock().unwrap_or_else(PoisonError::into_inner).push(report);
            waker.wake();
        });
    }

    /// Takes in what tasks have reported.
    fn collect(&mut self) {
        let done = std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner));
        for report in done {
            self.tasks -= 1;
            match report {
                Done::Batch { leaves } => self.work.complete(leaves),
                Done::Segment { batch, stream } => {
                    if let Some(flow) = self.streams.get_mut(&batch) {
                        flow.busy = false;
                        flow.stream = stream;
                    }
                    self.advance(batch);
                }
                Done::Finished { batch, leaves } => {
                    self.streams.remove(&batch);
                    self.work.complete(leaves);
                }
            }
        }
        if self.stopping() && self.tasks == 0 && self.reads.is_empty() {
            self.streams.clear();
        }
    }
}

/// Tasks queued for each worker before the driver waits: enough that none runs dry.
const TASKS_PER_WORKER: usize = 8;

/// Files kept open at once by a load.
const OPEN_FILES_MAX: usize = 16;
