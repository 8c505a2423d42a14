//! The engine's driver: admits the work of a plan in order, as memory allows, and reacts to what completes.
//!
//! Everything runs on one thread and never blocks but in [`Reader::next`]: reads complete there, and tasks on the workers
//! wake it. A batch that fits a slot is one read and one task; a unit larger than a slot is a [`Flow`].

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rayon::ThreadPool;

use super::engine::Stall;
use super::land::{FirstError, located};
use super::state::Stage;
use super::stream::Stream;
use super::warm::{land_batch, land_warm};
use super::work::{self, Work};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Budget, Completion, Credit, OpenFile, ReadAt, Reader, Ring, Slot, Ticket, read_error, short_file};
use crate::limits::{LOAD_OPEN_FILES_MAX, TASKS_PER_WORKER, WHOLE_UNITS_MIN};
use crate::plan::ReadRange;

/// Does one load on the driver's thread. Stops early when `closing` is set.
pub(super) fn run(
    mut work: Work,
    reader: &mut dyn Reader,
    pool: &ThreadPool,
    ring: &Arc<Ring>,
    stall: Stall,
    closing: &AtomicBool,
) {
    work.status.lock().driver = Some(reader.waker());
    let mut drive = Drive {
        work: &work,
        closing,
        reader,
        pool,
        ring,
        budget: Budget::new(work.batch_budget()),
        error: Arc::new(FirstError::default()),
        done: Arc::new(Mutex::new(Vec::new())),
        tasks: 0,
        next_batch: 0,
        reads: HashMap::new(),
        depth: reads_at_first(&work),
        streams: HashMap::new(),
        files: HashMap::new(),
        read: Stage::default(),
        requests: 0,
        stall,
        lost: false,
    };
    let empty = work.landing.leaves_without_units();
    match empty.iter().try_for_each(|leaf| work.landing.replicate(*leaf)) {
        Ok(()) => work.complete(empty),
        Err(error) => drive.error.put(0, error),
    }
    drive.run();
    // A load that ended early may have left something on its way.
    work.landing.bus.clear();
    let result = match drive.error.take() {
        Some(error) => Err(error),
        None if work.is_complete() => work.state(&drive.counted()),
        None if work.status.cancelled.load(Ordering::Acquire) => {
            Err(Error::new(ErrorKind::Cancelled, "the load was cancelled"))
        }
        None if closing.load(Ordering::Acquire) => Err(work::engine_dropped()),
        None => Err(Error::bug("a load ended before all of its leaves were complete")),
    };
    tracing::info!(
        bytes_read = drive.read.bytes,
        requests = drive.requests,
        ms = work.start.elapsed().as_secs_f64() * 1e3,
        ok = result.is_ok(),
        "loaded"
    );
    drop(drive);
    work.release();
    work.status.publish(result);
}

/// The driver's bookkeeping for one load.
struct Drive<'a> {
    work: &'a Work,
    closing: &'a AtomicBool,
    reader: &'a mut dyn Reader,
    pool: &'a ThreadPool,
    ring: &'a Arc<Ring>,
    budget: Arc<Budget>,
    error: Arc<FirstError>,
    done: Arc<Mutex<Vec<Done>>>,
    /// Tasks that have not reported back.
    tasks: usize,
    next_batch: usize,
    /// Reads in flight.
    reads: HashMap<Ticket, InFlight>,
    /// How many there may be by now.
    depth: usize,
    /// Units larger than a slot, by batch.
    streams: HashMap<usize, Flow>,
    files: HashMap<u32, Arc<OpenFile>>,
    read: Stage,
    requests: u64,
    stall: Stall,
    /// Whether a read did not come back in time and the load ends without it.
    lost: bool,
}

/// A read in flight.
struct InFlight {
    reading: Reading,
    file: Arc<OpenFile>,
    offset: u64,
    since: Instant,
    /// Whether it has been said that it does not come back.
    told: bool,
}

/// What a read in flight is for.
enum Reading {
    Batch { batch: usize, credit: Credit },
    Segment { batch: usize },
}

/// What a task reports.
enum Done {
    Batch {
        leaves: Vec<usize>,
    },
    /// A batch of so many bytes that the worker has read out of memory.
    Warm {
        leaves: Vec<usize>,
        len: u64,
        busy: Duration,
    },
    /// A batch whose bytes memory does not have.
    Cold {
        batch: usize,
        file: Arc<OpenFile>,
        credit: Credit,
    },
    Segment {
        batch: usize,
        stream: Option<Box<Stream>>,
    },
    Finished {
        batch: usize,
        leaves: Vec<usize>,
    },
}

/// A unit larger than a slot on its way: at most two slots, one being read while the other is decoded, beside the slab in
/// its decoder.
struct Flow {
    unit: u32,
    file: Arc<OpenFile>,
    /// Next byte to read, and the end.
    next: u64,
    end: u64,
    /// Segments that have arrived and wait for the decoder, in order.
    ready: VecDeque<ReadAt>,
    reading: bool,
    /// The decoder, unless a task has it.
    stream: Option<Box<Stream>>,
    busy: bool,
    _credit: Credit,
}

impl Drive<'_> {
    fn counted(&self) -> work::Done {
        work::Done { read: self.read, requests: self.requests, staging_peak_bytes: self.budget.peak() }
    }

    fn run(&mut self) {
        loop {
            // First what has ended gives its memory back, then what waits for memory is tried.
            self.collect();
            if self.lost && self.tasks == 0 {
                return;
            }
            let blocked = self.admit();
            if self.tasks == 0 && !self.work.landing.bus.is_empty() {
                // No worker that sends something waits for it.
                self.spawn_arrivals();
            }
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
            let completion = self.reader.next(self.next_stall());
            if blocked {
                self.read.blocked += waited.elapsed();
            }
            match completion {
                Some(completion) => self.completed(completion),
                None => self.lost |= self.stalled(),
            }
        }
    }

    /// When the next read will have been away for too long.
    fn next_stall(&self) -> Option<Instant> {
        let after = self.stall.after?;
        let reads = self.reads.values().filter(|read| !read.told);
        reads.map(|read| read.since).min().and_then(|since| since.checked_add(after))
    }

    /// Says which reads have been away for too long. Returns whether the load is to end without them.
    fn stalled(&mut self) -> bool {
        let Some(after) = self.stall.after else { return false };
        let plan = &self.work.landing.plan;
        let mut lost = false;
        for read in self.reads.values_mut() {
            if read.since.elapsed() < after {
                continue;
            }
            lost = true;
            if std::mem::replace(&mut read.told, true) {
                continue;
            }
            let file = self.work.root.shown(read.file.path());
            tracing::warn!(
                file,
                offset = read.offset,
                seconds = read.since.elapsed().as_secs(),
                "a read does not come back"
            );
            if self.stall.aborts {
                let (Reading::Batch { batch, .. } | Reading::Segment { batch }) = &read.reading;
                let unit = plan.batches[*batch].units.start;
                let error = Error::new(ErrorKind::Io, "a read does not come back")
                    .at("offset", read.offset)
                    .at("file", file)
                    .expected(format_args!("an answer within {after:?}"))
                    .hint("see whether the disk or the network file system still answers");
                self.error.put(unit, located(error, plan, &plan.units[unit as usize]));
            }
        }
        lost && self.stall.aborts
    }

    fn stopping(&self) -> bool {
        self.error.is_set()
            || self.work.status.cancelled.load(Ordering::Acquire)
            || self.closing.load(Ordering::Acquire)
    }

    /// Lets more reads be in flight if a worker has nothing to do while this one arrives. So there come to be as many as the
    /// storage's bandwidth times its latency asks for, and no more: slots that were just used are still in the caches.
    fn deepen(&mut self) {
        let starving = self.tasks < self.work.limits.workers as usize && self.reads.len() >= self.depth;
        self.depth = (self.depth + usize::from(starving)).min(self.reader.depth());
    }

    /// Starts batches as memory and the depth allow. Returns whether memory was what stopped it.
    fn admit(&mut self) -> bool {
        let plan = &self.work.landing.plan;
        while !self.stopping() && self.next_batch < plan.batches.len() {
            if self.reads.len() >= self.depth || self.tasks >= TASKS_PER_WORKER * self.work.limits.workers as usize {
                return false;
            }
            let number = self.next_batch;
            let batch = &plan.batches[number];
            let units = &plan.units[batch.units.start as usize..batch.units.end as usize];
            let Some(read) = batch.read else {
                self.next_batch += 1;
                self.spawn_batch(number, None);
                continue;
            };
            let whole = self.whole_bytes(number);
            let Some(credit) = self.budget.take(plan.batch_bytes(batch).max(whole.unwrap_or(0))) else { return true };
            self.next_batch += 1;
            tracing::debug!(batch = number, offset = read.offset, len = read.len, units = units.len(), "read");
            if let Err(error) = self.start(number, read, whole.is_some(), credit) {
                let first = &plan.units[batch.units.start as usize];
                self.error.put(batch.units.start, located(error, plan, first));
            }
        }
        false
    }

    /// What a batch larger than a slot takes if it is read as a whole, where that is worth it and leaves memory for others: decoders of
    /// whole values are faster, and share a large one among the workers.
    fn whole_bytes(&self, number: usize) -> Option<u64> {
        let landing = &self.work.landing;
        let batch = &landing.plan.batches[number];
        let is_large = batch.read.is_some_and(|read| read.len > self.work.limits.slot_bytes);
        let whole = if is_large { landing.whole_bytes(batch.units.start)? } else { return None };
        let share = self.budget.total() / WHOLE_UNITS_MIN.min(u64::from(self.work.limits.workers)).max(1);
        (whole <= share.max(landing.plan.batch_bytes(batch))).then_some(whole)
    }

    fn start(&mut self, batch: usize, read: ReadRange, whole: bool, credit: Credit) -> Result<()> {
        let ReadRange { file, offset, len } = read;
        let file = self.file(file)?;
        if offset.checked_add(len).is_none_or(|end| end > file.size()) {
            return Err(short_file(&self.work.root.shown(file.path()), offset, len, file.size()));
        }
        let fits = len <= self.work.limits.slot_bytes;
        let is_warm = self.reader.leaves_warm_reads() && file.direct().is_none() && file.is_likely_warm();
        if is_warm && (fits || whole) {
            self.spawn_warm(batch, file, len, credit);
            return Ok(());
        }
        self.read(batch, file, credit)
    }

    /// Has the reader read a batch, into a slot or segment by segment.
    fn read(&mut self, batch: usize, file: Arc<OpenFile>, credit: Credit) -> Result<()> {
        let Some(ReadRange { offset, len, .. }) = self.work.landing.plan.batches[batch].read else { return Ok(()) };
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
            end: offset.saturating_add(len),
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
        let ticket = Ticket(NEXT_TICKET.fetch_add(1, Ordering::Relaxed));
        self.requests += 1;
        self.read.bytes += len;
        let in_flight = InFlight { reading, file: Arc::clone(&file), offset, since: Instant::now(), told: false };
        self.reads.insert(ticket, in_flight);
        // At most a slot, which is a usize.
        self.reader.submit(ticket, ReadAt::new(file, offset, usize::try_from(len).unwrap_or(usize::MAX), buffer));
    }

    fn file(&mut self, number: u32) -> Result<Arc<OpenFile>> {
        if let Some(file) = self.files.get(&number) {
            return Ok(Arc::clone(file));
        }
        if self.files.len() >= LOAD_OPEN_FILES_MAX {
            self.files.clear();
        }
        let path = &self.work.landing.plan.files[number as usize];
        #[cfg_attr(not(feature = "uring"), expect(unused_mut, reason = "only a ring reads past the cache"))]
        let mut file = self.work.root.file(path)?.ok_or_else(|| {
            Error::not_found("a data file of the checkpoint is missing")
                .at("file", self.work.root.shown(path))
                .hint("the checkpoint is incomplete; copy it again")
        })?;
        #[cfg(feature = "uring")]
        if self.reader.reads_directly() {
            file.prefer_direct();
        }
        let file = Arc::new(file);
        self.files.insert(number, Arc::clone(&file));
        Ok(file)
    }

    /// Takes a finished read to the workers.
    fn completed(&mut self, completion: Completion) {
        let Completion { ticket, read, result, busy } = completion;
        self.read.busy += busy;
        self.deepen();
        // A read of a load that was given up comes back to nobody.
        let Some(InFlight { reading, .. }) = self.reads.remove(&ticket) else { return };
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
            Reading::Batch { batch, credit } => self.spawn_batch(batch, Some((read, credit))),
            Reading::Segment { batch } => {
                if let Some(flow) = self.streams.get_mut(&batch) {
                    flow.reading = false;
                    flow.ready.push_back(read);
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

    /// Has the reader read what a worker did not find in memory.
    fn read_cold(&mut self, batch: usize, file: Arc<OpenFile>, credit: Credit) {
        if self.stopping() {
            return;
        }
        if let Err(error) = self.read(batch, file, credit) {
            self.error.put(u32::MAX, error);
        }
    }

    /// Decodes every unit of a batch in one task.
    fn spawn_batch(&mut self, number: usize, read: Option<(ReadAt, Credit)>) {
        let (landing, ring, error) = (Arc::clone(&self.work.landing), Arc::clone(self.ring), Arc::clone(&self.error));
        self.spawn(move || {
            let bytes = read.as_ref().map_or(&[][..], |(read, _)| read.bytes());
            Done::Batch { leaves: land_batch(&landing, number, bytes, &ring, &error) }
        });
    }

    /// Has a worker read a batch out of memory and decode it. What memory does not have comes back, for the reader.
    fn spawn_warm(&mut self, number: usize, file: Arc<OpenFile>, len: u64, credit: Credit) {
        let (landing, ring, error) = (Arc::clone(&self.work.landing), Arc::clone(self.ring), Arc::clone(&self.error));
        let root = Arc::clone(&self.work.root);
        self.spawn(move || match land_warm(&landing, number, (&root, &file), credit, &ring, &error) {
            Ok((leaves, busy)) => Done::Warm { leaves, len, busy },
            Err(credit) => Done::Cold { batch: number, file, credit },
        });
    }

    /// Has a worker wait for what is on its way to devices.
    fn spawn_arrivals(&mut self) {
        let (landing, error) = (Arc::clone(&self.work.landing), Arc::clone(&self.error));
        self.spawn(move || Done::Batch { leaves: landing.all_arrived(&error) });
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
        let (landing, ring, error) = (Arc::clone(&self.work.landing), Arc::clone(self.ring), Arc::clone(&self.error));
        self.spawn(move || {
            let unit = &landing.plan.units[position as usize];
            let fail = |failed: Error| error.put(position, located(failed, &landing.plan, unit));
            match segment {
                Some(read) => match stream.feed(&landing, unit, read.bytes(), &ring) {
                    Ok(()) => Done::Segment { batch, stream: Some(stream) },
                    Err(failed) => {
                        fail(failed);
                        Done::Segment { batch, stream: None }
                    }
                },
                None => {
                    let leaves = match stream.finish(unit).and_then(|()| landing.landed(position)) {
                        Ok(leaves) => leaves,
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
                Done::Warm { leaves, len, busy } => {
                    self.read.busy += busy;
                    self.requests += 1;
                    self.read.bytes += len;
                    self.work.status.count.bytes_read.fetch_add(len, Ordering::Relaxed);
                    self.work.complete(leaves);
                }
                Done::Cold { batch, file, credit } => self.read_cold(batch, file, credit),
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

/// Reads in flight when a load starts: what every worker decodes next, and a little more.
fn reads_at_first(work: &Work) -> usize {
    work.limits.workers as usize + 2
}

/// No ticket is used twice, so that a read which comes back after its load was given up is taken for none of another load.
static NEXT_TICKET: AtomicU64 = AtomicU64::new(0);
