//! The engine: threads, staging memory and budgets, made once and used for many loads.
//!
//! ```text
//!  caller ──load()──► driver thread ──reads──► reader threads ──bytes──► driver ──tasks──► workers (decode, cast, place)
//!    ▲                    ▲                                                                   │
//!    └──finished leaves───┴───────────────────── done ◄────────────────────────────────────────┘
//! ```
//!
//! The driver admits work in plan order as the [`Budget`] allows; everything else follows from completions. Loads of one
//! engine run one after the other, and so do saves. Dropping the engine cancels the load at work and those that are queued,
//! finishes saves, waits for reads in flight and joins its threads; nothing outlives it.
//!
//! [`Budget`]: crate::io::Budget

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use super::checkpoint::Checkpoint;
use super::devices::{DeviceStartup, Devices, Gpus, OwnMemory};
use super::drive::run;
use super::job::Job;
use super::save::{SaveJob, SaveOptions, SaveWork, Tree, TreeItem};
use super::target::Target;
use super::work::Work;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{self, Io, Reader, Ring};
use crate::limits::{
    DEVICE_STAGING_BYTES_DEFAULT, LANE_EXTRA_BYTES, MERGE_GAP_BYTES_DEFAULT, READER_THREADS_MIN, SLOT_BYTES,
    SLOT_SLACK_BYTES, SLOTS_MIN, STAGING_BYTES_DEFAULT, STALL_AFTER_DEFAULT,
};
use crate::place::{Destination, Memory, ShardSpec};
use crate::plan::{Limits, Plan, Verify};

/// How an engine works. `Default` suits a local disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Staging memory beyond the results, in bytes; at least a few MiB.
    pub staging_bytes: u64,
    /// Memory of each GPU in which slabs wait for kernels, in bytes: a slot for each worker.
    pub device_staging_bytes: u64,
    /// Workers that decode and place; 0 for one a core.
    pub threads: usize,
    /// How files are read.
    pub io: Io,
    /// Threads that do positioned reads; 0 for half as many as workers, but at least four. io_uring has one thread.
    pub reader_threads: usize,
    /// Reads whose gap is at most this are merged, in bytes.
    pub merge_gap_bytes: u64,
    /// When checksums are checked.
    pub verify: Verify,
    /// What is done about reads that do not come back.
    pub stall: Stall,
}

/// What is done about reads that do not come back: a disk that hangs, a network file system whose server is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// When a read is reported, with its file and offset, as a warning of `tracing`; never, if `None`.
    pub after: Option<Duration>,
    /// Whether the load then fails, too, instead of waiting on. The engine stays usable, but the read keeps its staging slot
    /// until it comes back, and dropping the engine waits for it: the kernel may still write there.
    pub aborts: bool,
}

impl Default for Stall {
    fn default() -> Self {
        Self { after: Some(STALL_AFTER_DEFAULT), aborts: false }
    }
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            staging_bytes: STAGING_BYTES_DEFAULT,
            device_staging_bytes: DEVICE_STAGING_BYTES_DEFAULT,
            threads: 0,
            io: Io::Auto,
            reader_threads: 0,
            merge_gap_bytes: MERGE_GAP_BYTES_DEFAULT,
            verify: Verify::Auto,
            stall: Stall::default(),
        }
    }
}

impl EngineOptions {
    /// How many workers these options mean on this machine.
    pub fn workers(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }

    /// How many threads for positioned reads these options mean on this machine.
    pub fn readers(&self) -> usize {
        match self.reader_threads {
            0 => (self.workers() / 2).max(READER_THREADS_MIN),
            threads => threads,
        }
    }

    /// The limits under which loads are planned.
    ///
    /// # Errors
    /// A budget too small to work with.
    pub fn limits(&self) -> Result<Limits> {
        let workers = self.workers() as u64;
        // One slot a worker decodes into, the rest is read into; half of the budget is left to decoders' own memory.
        let slots = workers + SLOTS_MIN as u64;
        let of_device = (self.device_staging_bytes / workers).saturating_sub(LANE_EXTRA_BYTES as u64);
        let share = (self.staging_bytes / (2 * slots)).min(of_device);
        let slot_bytes = share.saturating_sub(SLOT_SLACK_BYTES).min(SLOT_BYTES as u64) / PAGE * PAGE;
        if slot_bytes < SLOT_BYTES_MIN {
            let needed = (SLOT_BYTES_MIN + SLOT_SLACK_BYTES) * 2 * slots;
            return Err(Error::new(ErrorKind::Budget, "the memory budget is too small")
                .expected(format_args!("at least {needed} bytes with {workers} workers"))
                .found(format_args!("{} bytes", self.staging_bytes.min(self.device_staging_bytes)))
                .hint(format!("give `--memory {needed}` or more, or fewer `--threads`")));
        }
        Ok(Limits {
            staging_bytes: self.staging_bytes,
            slot_bytes,
            workers: u32::try_from(workers).unwrap_or(u32::MAX),
            merge_gap_bytes: self.merge_gap_bytes,
            verify: self.verify,
            counts_plan: true,
        })
    }
}

/// Threads, staging memory and budgets for loads.
#[derive(Debug)]
pub struct Engine {
    options: EngineOptions,
    limits: Limits,
    reader: &'static str,
    startup: Duration,
    devices: Devices,
    /// Tells the driver to end the load at work, and those that are queued.
    closing: Arc<AtomicBool>,
    jobs: Option<Sender<Request>>,
    workers: Arc<Workers>,
    driver: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts an engine.
    ///
    /// # Errors
    /// A budget too small to work with, a system that starts no more threads, or [`Io::Uring`] where there is none.
    pub fn new(options: EngineOptions) -> Result<Self> {
        Self::started(options, Instant::now(), io::reader(options.io, options.readers())?)
    }

    /// Starts an engine that reads with the caller's reader: one for storage that this crate does not know, or one that fails
    /// on purpose. `options.io` and `options.reader_threads` mean nothing then.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_reader(options: EngineOptions, reader: Box<dyn Reader>) -> Result<Self> {
        Self::started(options, Instant::now(), reader)
    }

    fn started(options: EngineOptions, start: Instant, mut reader: Box<dyn Reader>) -> Result<Self> {
        let limits = options.limits()?;
        let no_threads = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(ErrorKind::Io, "the system starts no more threads").caused_by(error)
        };
        let workers = Arc::new(Workers::new(options.workers()).map_err(|error| no_threads(error.into()))?);
        let drivers = Arc::clone(&workers);
        let reader_name = reader.name();
        let ring = Ring::new(usize::try_from(limits.slot_memory()).unwrap_or(SLOT_BYTES));
        let devices = Devices::new(Arc::clone(&ring), &limits);
        let (jobs, queue) = channel::<Request>();
        let closing = Arc::new(AtomicBool::new(false));
        let closed = Arc::clone(&closing);
        let driver = std::thread::Builder::new()
            .name("touchdown-driver".to_owned())
            .spawn(move || {
                while let Ok(request) = queue.recv() {
                    match request {
                        Request::Load(work) => {
                            run(*work, reader.as_mut(), drivers.pool(), &ring, options.stall, &closed);
                        }
                        Request::Save(work) => work.run(drivers.pool()),
                    }
                }
            })
            .map_err(|error| no_threads(error.into()))?;
        let (jobs, driver) = (Some(jobs), Some(driver));
        let startup = start.elapsed();
        Ok(Self { options, limits, reader: reader_name, startup, devices, closing, jobs, workers, driver })
    }

    /// The same engine, whose loads do not count their plans.
    pub(super) fn uncounted(mut self) -> Self {
        self.limits.counts_plan = false;
        self
    }

    /// What it was started with.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// The limits under which it plans.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What it reads with, `uring` or `pread`: what [`Io::Auto`] has come to.
    pub fn reader(&self) -> &'static str {
        self.reader
    }

    /// Its workers, for work that is neither a load nor a save.
    pub(super) fn pool(&self) -> &ThreadPool {
        self.workers.pool()
    }

    /// How long starting took: threads and the reader. Devices are started by the first load that needs them.
    pub fn startup(&self) -> Duration {
        self.startup
    }

    /// What starting devices has cost so far. No load counts it as its own.
    pub fn device_startup(&self) -> DeviceStartup {
        self.devices.startup()
    }

    /// Loads a target into memory that is allocated here, on the host and on devices. Returns at once; see [`Job`].
    ///
    /// # Errors
    /// A target that cannot be planned, a device that cannot be used, or no memory for its shards: on a device that is found
    /// before anything is read.
    pub fn load(&self, checkpoint: &Checkpoint, target: &Target) -> Result<Job> {
        self.load_with(checkpoint, target, None)
    }

    /// Loads a target into memory that a destination gives.
    ///
    /// # Errors
    /// A target that cannot be planned, or a destination that gives no or the wrong memory.
    pub fn load_to(&self, checkpoint: &Checkpoint, target: &Target, to: &mut dyn Destination) -> Result<Job> {
        self.load_with(checkpoint, target, Some(to))
    }

    fn load_with(&self, checkpoint: &Checkpoint, target: &Target, to: Option<&mut dyn Destination>) -> Result<Job> {
        let start = Instant::now();
        let plan = checkpoint.plan_within(target, self.limits)?;
        self.load_planned(checkpoint, target, plan, (start, start.elapsed()), to)
    }

    /// Loads what was planned since `start`, which took so long.
    pub(super) fn load_planned(
        &self,
        checkpoint: &Checkpoint,
        target: &Target,
        plan: Plan,
        (start, planned): (Instant, Duration),
        to: Option<&mut dyn Destination>,
    ) -> Result<Job> {
        // Starting devices is not the load's time.
        let starting = Instant::now();
        let gpus = self.devices.open(&plan)?;
        let start = start + starting.elapsed();
        let memory = match to {
            Some(to) => {
                let memory = prepare(&plan, to)?;
                gpus.expect_staging()?;
                memory
            }
            None => prepare(&plan, &mut OwnMemory(gpus.clone()))?,
        };
        let (work, job) =
            Work::new(checkpoint, target, plan, (start, planned), memory, (gpus, self.devices.ring()), self.limits)?;
        self.send(Request::Load(Box::new(work)))?;
        Ok(job)
    }

    /// Saves a tree as the item `state` of a new checkpoint, where Orbax looks first. Returns once the tree is checked and the
    /// destination's temporary directory exists.
    ///
    /// The snapshot is the call: array bytes in host memory are shared and immutable, so the caller may go on at once, and nothing
    /// is copied. Arrays on devices are copied back while the save goes on: what their devices were given before the call is
    /// waited for, and nobody may write to them until the save has ended.
    ///
    /// # Errors
    /// A destination that exists, leaves that cannot be saved (all of them in one error); nothing is written then. Everything
    /// later comes from the [`SaveJob`].
    pub fn save(&self, path: impl AsRef<Path>, tree: &Tree, options: &SaveOptions) -> Result<SaveJob> {
        self.save_items(path, &[(STATE_ITEM.to_owned(), TreeItem::Tree(tree.clone()))], options)
    }

    /// Saves several items in one checkpoint: all of them appear at once or none does. See [`save`](Self::save).
    ///
    /// # Errors
    /// As [`save`](Self::save), and names that cannot be items'.
    pub fn save_items(
        &self,
        path: impl AsRef<Path>,
        items: &[(String, TreeItem)],
        options: &SaveOptions,
    ) -> Result<SaveJob> {
        let (work, job) = SaveWork::new(path.as_ref(), items, options, self.limits.staging_bytes)?;
        items.iter().try_for_each(|(_, item)| item.settle())?;
        self.send(Request::Save(Box::new(work)))?;
        Ok(job)
    }

    /// The devices of a plan, started.
    pub(super) fn start_devices(&self, plan: &Plan) -> Result<Gpus> {
        self.devices.open(plan)
    }

    /// Waits until the devices of a plan have done what they were given.
    pub(super) fn settle(&self, plan: &Plan) -> Result<()> {
        self.start_devices(plan)?.settle()
    }

    fn send(&self, request: Request) -> Result<()> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(request).is_ok());
        if sent { Ok(()) } else { Err(Error::bug("the engine's driver has ended")) }
    }
}

/// What the driver is asked to do.
enum Request {
    Load(Box<Work>),
    Save(Box<SaveWork>),
}

/// The item that Orbax's `save` writes and its `load` looks for first.
const STATE_ITEM: &str = "state";

impl Drop for Engine {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Release);
        self.jobs = None;
        if let Some(driver) = self.driver.take() {
            // The driver reports through jobs; a panic there has already failed them.
            let _ = driver.join();
        }
    }
}

/// The threads that decode and place, shared by the engine and its driver, which ends first. A pool by itself only tells its threads to end; this waits until they have.
#[derive(Debug)]
struct Workers {
    // Dropped first, which tells the threads to end.
    pool: ThreadPool,
    _threads: Joined,
}

#[derive(Debug)]
struct Joined(Vec<JoinHandle<()>>);

impl Workers {
    fn new(count: usize) -> Result<Self, ThreadPoolBuildError> {
        let mut threads = Vec::with_capacity(count);
        let pool = ThreadPoolBuilder::new()
            .num_threads(count)
            .spawn_handler(|thread| {
                let name = format!("touchdown-work-{}", thread.index());
                threads.push(std::thread::Builder::new().name(name).spawn(|| thread.run())?);
                Ok(())
            })
            .build()?;
        Ok(Self { pool, _threads: Joined(threads) })
    }
}

impl Workers {
    fn pool(&self) -> &ThreadPool {
        &self.pool
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        for thread in self.0.drain(..) {
            // Tasks catch their panics; a thread that panicked all the same has ended.
            let _ = thread.join();
        }
    }
}

/// Asks for the memory of every distinct local shard and checks that it fits.
fn prepare(plan: &Plan, to: &mut dyn Destination) -> Result<Vec<Memory>> {
    let specs: Vec<ShardSpec> = plan
        .shards
        .iter()
        .map(|shard| {
            let leaf = &plan.leaves[shard.leaf as usize];
            ShardSpec {
                path: leaf.path.clone(),
                dtype: leaf.dtype,
                global_shape: leaf.shape.clone(),
                region: shard.region.clone(),
                position: shard.devices.first().map_or(0, |&position| position as usize),
                device: plan.device(shard),
                bytes: shard.bytes,
            }
        })
        .collect();
    let memory = to.prepare(&specs)?;
    if memory.len() != specs.len() {
        return Err(Error::invalid("the destination gave memory for another number of shards")
            .expected(specs.len())
            .found(memory.len()));
    }
    for (memory, spec) in memory.iter().zip(&specs) {
        if spec.device.is_host() != matches!(memory, Memory::Host(_)) {
            let found = if spec.device.is_host() { "device memory" } else { "host memory" };
            return Err(Error::new(
                ErrorKind::Device,
                "the destination gave memory of another kind than the device has",
            )
            .at("leaf", &spec.path)
            .expected(format_args!("memory of {}", spec.device))
            .found(found));
        }
        if memory.len() != spec.bytes {
            return Err(Error::invalid("the destination gave memory of the wrong size")
                .at("leaf", &spec.path)
                .expected(format_args!("{} bytes", spec.bytes))
                .found(format_args!("{} bytes", memory.len())));
        }
    }
    Ok(memory)
}

/// Granularity of slots: what direct reads and page-locking need.
const PAGE: u64 = 4096;

/// Smallest useful slot: below this a request costs more than its bytes.
const SLOT_BYTES_MIN: u64 = 64 << 10;
