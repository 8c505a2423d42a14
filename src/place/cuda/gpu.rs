//! One device as the engine uses it: its context, two streams, the kernels, and lanes for workers.

use std::ffi::CString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::delivery::Delivery;
use super::download::Downloader;
use super::driver::{Context, DeviceBuffer, Event, Function, Module, Outcome, Registration, Stream};
use super::lane::Lane;
use crate::error::{Error, Result};
use crate::io::{Buffer, Pin, Pinner};
use crate::place::Download;
use crate::place::device::Hold;
use crate::place::parcel::{Parcel, Span};
use crate::transform::cuda::{CUBINS, Kernel, PTX};

/// A device of this process.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(super) context: Arc<Context>,
    /// Shared by all results, which name it.
    pub(super) copies: Arc<Stream>,
    pub(super) kernels: Stream,
    functions: [Function; Kernel::ALL.len()],
    _module: Module,
    /// Shared by all results, which may outlive the device's other parts.
    downloader: Arc<Downloader>,
    pub(super) staging: Staging,
    /// Lanes that no worker uses.
    lanes: Mutex<Vec<Lane>>,
    /// Events that no crossing uses.
    pub(super) events: Mutex<Vec<Event>>,
    /// Memory of the device that lanes hold, in bytes.
    pub(super) lane_bytes: Arc<AtomicU64>,
    /// Locked host memory that lanes hold, in bytes.
    pub(super) locked_bytes: Arc<AtomicU64>,
}

/// How much of a device workers use on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Staging {
    /// Largest slab, in bytes.
    pub(crate) slot_bytes: usize,
    /// How many workers bring slabs at once.
    pub(crate) workers: usize,
}

impl Gpu {
    /// Starts a device: its context, and the kernels in the form that it takes.
    pub(crate) fn open(ordinal: u32, staging: Staging) -> Result<Arc<Self>> {
        let context = Context::open(ordinal)?;
        let start = || {
            let module = module(&context)?;
            let current = context.enter()?;
            let mut functions = Vec::with_capacity(Kernel::ALL.len());
            for kernel in Kernel::ALL {
                // A name of ours has no zero byte.
                let name = CString::new(kernel.name()).unwrap_or_default();
                functions.push(current.function(&module, &name)?);
            }
            Ok((module, functions, Stream::new(&context)?, Stream::new(&context)?))
        };
        let (module, functions, copies, kernels) = start()
            .map_err(|error: super::driver::DriverError| error.on(ordinal, "the CUDA device cannot be started"))?;
        let functions = functions.try_into().map_err(|_| Error::bug("a kernel is missing"))?;
        let (lanes, events, lane_bytes, locked_bytes) = Default::default();
        let downloader = Arc::new(Downloader::new(Arc::clone(&context)));
        Ok(Arc::new(Self {
            context,
            copies: Arc::new(copies),
            kernels,
            functions,
            _module: module,
            downloader,
            staging,
            lanes,
            events,
            lane_bytes,
            locked_bytes,
        }))
    }

    /// The driver's number of it.
    pub(crate) fn ordinal(&self) -> u32 {
        self.context.ordinal()
    }

    /// Starts to bring parcels to shards of this device.
    ///
    /// # Errors
    /// A driver that refuses; nothing is on its way then.
    ///
    /// # Safety
    /// 1. The memory of the parcels does not change until the delivery is dropped, which is not forgotten.
    /// 2. The boxes' targets are valid and nobody else touches those elements until then.
    pub(crate) unsafe fn start<'g>(&'g self, parcels: &[Parcel<'_>]) -> Result<Delivery<'g>> {
        let mut delivery = Delivery::new(self, self.lane()?);
        delivery.add(parcels)?;
        delivery.launch().map_err(|error| self.failed(error))?;
        Ok(delivery)
    }

    /// Copies a shard from another device. Returns when it is there.
    ///
    /// # Errors
    /// A driver that refuses.
    ///
    /// # Safety
    /// 1. Both sides are valid, and nobody else touches them meanwhile.
    pub(crate) unsafe fn copy_from(&self, target: Span, source: Span, peer: &Self) -> Result<()> {
        let copy = || {
            let done = Event::new(&self.context)?;
            let current = self.context.enter()?;
            let len = usize::try_from(target.len.min(source.len)).unwrap_or(0);
            // SAFETY: the caller's promise, and the wait below.
            unsafe { current.copy_from_peer(target.pointer, (source.pointer, &peer.context), len, &self.copies) }?;
            let waited = current.record(&done, &self.copies).and_then(|()| current.wait(&done));
            // A copy that may still run must not outlive the memory.
            waited.or_else(|error| current.drain(&self.copies).and(Err(error)))
        };
        copy().map_err(|error| error.on(self.ordinal(), "a copy between devices failed"))
    }

    /// Lets copies from a peer be direct, where the machine can.
    pub(crate) fn reach(&self, peer: &Self) -> Result<()> {
        self.context
            .reach(&peer.context)
            .map_err(|error| error.on(self.ordinal(), "a peer of the device cannot be reached"))
    }

    /// Waits until the device has done everything that it was given, on whatever stream.
    pub(crate) fn settle(&self) -> Result<()> {
        let waited = self.context.enter().and_then(|current| current.drain_all());
        waited.map_err(|error| error.on(self.ordinal(), "the device does not end what it was given"))
    }

    /// Orders everything that is given from now on behind what a stream of the caller has now.
    ///
    /// # Safety
    /// 1. It is a live stream of this device's primary context, or a special handle as this thread means it.
    pub(crate) unsafe fn follow(&self, stream: u64) -> Result<()> {
        let follow = || {
            let event = Event::new(&self.context)?;
            let current = self.context.enter()?;
            // SAFETY: the caller's promise.
            unsafe { current.record_foreign(&event, stream) }?;
            current.wait_on(&self.copies, &event)?;
            current.wait_on(&self.kernels, &event)
        };
        follow().map_err(|error| error.on(self.ordinal(), "the caller's stream cannot be followed"))
    }

    /// Free memory of the device, in bytes.
    pub(crate) fn free_bytes(&self) -> Result<u64> {
        free_in(&self.context)
    }

    /// Memory of the device that workers will take at most beyond what they have, in bytes.
    pub(crate) fn lane_bytes_missing(&self) -> u64 {
        let all = (Lane::device_bytes(self.staging) * self.staging.workers) as u64;
        all.saturating_sub(self.lane_bytes.load(Ordering::Relaxed))
    }

    /// Locked host memory that workers will have at most, beside slots, in bytes.
    pub(crate) fn locked_bytes_at_most(&self) -> u64 {
        (Lane::locked_bytes() * self.staging.workers) as u64
    }

    /// Memory of the device and locked host memory that workers have, in bytes.
    pub(crate) fn held_bytes(&self) -> (u64, u64) {
        (self.lane_bytes.load(Ordering::Relaxed), self.locked_bytes.load(Ordering::Relaxed))
    }

    /// Memory for results, which is freed with the last one that holds it, and its address. The stream that they name lives as
    /// long.
    pub(crate) fn allocate(&self, len: usize) -> Result<(u64, Hold)> {
        let buffer = DeviceBuffer::new(&self.context, len).map_err(|error| {
            error
                .on(self.ordinal(), "the device gives no memory for results")
                .expected(format_args!("{len} bytes in one piece"))
        })?;
        Ok((buffer.pointer(), Arc::new((buffer, self.stream_hold()))))
    }

    /// The stream on which shards are written, for those who want to order work behind it.
    pub(crate) fn stream(&self) -> u64 {
        self.copies.raw()
    }

    /// What keeps that stream.
    pub(crate) fn stream_hold(&self) -> Hold {
        Arc::clone(&self.copies) as Hold
    }

    /// Who locks host memory for copies.
    pub(crate) fn pinner(&self) -> Arc<dyn Pinner> {
        Arc::new(Locker(Arc::clone(&self.context)))
    }

    /// Who brings results back, as long as they live.
    pub(crate) fn downloader(&self) -> Arc<dyn Download> {
        Arc::clone(&self.downloader) as _
    }

    pub(super) fn function(&self, kernel: Kernel) -> Function {
        self.functions[kernel as usize]
    }

    pub(super) fn failed(&self, error: super::driver::DriverError) -> Error {
        error.on(self.ordinal(), "the device failed while shards were brought to it")
    }

    fn lane(&self) -> Result<Lane> {
        let free = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.map_or_else(|| Lane::new(self), Ok)
    }

    pub(super) fn give_back(&self, lane: Lane) {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
    }
}

/// Free memory of a device, in bytes.
pub(in super::super) fn free_bytes(ordinal: u32) -> Result<u64> {
    free_in(&*Context::open(ordinal)?)
}

fn free_in(context: &Context) -> Result<u64> {
    let free = context.enter().and_then(|current| current.free_bytes());
    free.map_err(|error| error.on(context.ordinal(), "the device does not say how much memory is free"))
}

/// The kernels in the form that the device takes: translated in advance if the build has such, else for the driver to translate.
fn module(context: &Arc<Context>) -> Outcome<Module> {
    let capability = context.capability()?;
    let fitting = CUBINS.iter().filter(|(made_for, _)| made_for / 10 == capability / 10 && *made_for <= capability);
    if let Some((_, cubin)) = fitting.max_by_key(|(made_for, _)| made_for) {
        match Module::load(context, cubin) {
            Err(error) if error.is_unfit_image() => tracing::debug!(%error, "kernels made in advance do not fit"),
            other => return other,
        }
    }
    let mut text = PTX.as_bytes().to_vec();
    text.push(0);
    Module::load(context, &text)
}

/// Locks slots of the ring.
#[derive(Debug)]
struct Locker(Arc<Context>);

impl Pinner for Locker {
    unsafe fn pin(&self, buffer: &Buffer) -> Result<Pin> {
        // SAFETY: the caller keeps the buffer until the registration is dropped.
        let registration = unsafe { Registration::new(&self.0, buffer.as_mut_ptr(), buffer.len()) };
        let registration = registration.map_err(|error| {
            error
                .on(self.0.ordinal(), "staging memory cannot be locked")
                .expected(format_args!("{} bytes", buffer.len()))
                .hint("a smaller `--memory` locks less; the limit on locked memory may be low (`touchdown doctor`)")
        })?;
        Ok(Arc::new(registration))
    }
}
