//! A thin layer over the driver: owned contexts, streams, events, modules and memory, and calls that return what failed.
//!
//! Calls need their context to be the thread's current one: [`Context::enter`] makes it so, and what can be called then are the
//! methods of [`Current`]. The caller's own context is back when that value is dropped. Objects release themselves.

use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::Arc;

use super::library::{Copy2D, Handle, Library, Pointer, library};
use crate::error::{Error, ErrorKind};
use crate::place::CudaProbe;

/// A call that the driver refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed with {name} ({code})")]
pub(super) struct DriverError {
    call: &'static str,
    code: c_int,
    name: String,
}

pub(super) type Outcome<T> = Result<T, DriverError>;

/// The primary context of a device, which every library of the process shares: addresses are valid for all of them.
pub(crate) struct Context {
    library: &'static Library,
    ordinal: u32,
    device: c_int,
    handle: Handle,
}

// SAFETY: the driver's handles may be used from any thread; what a call needs of its thread `enter` provides.
unsafe impl Send for Context {}
// SAFETY: as above: the driver locks its objects.
unsafe impl Sync for Context {}

/// The context while it is the current one of this thread.
pub(super) struct Current<'c> {
    context: &'c Context,
    /// It says something about this thread alone.
    _thread: std::marker::PhantomData<*mut ()>,
}

macro_rules! call {
    ($library:expr, $name:ident($($argument:expr),* $(,)?)) => {
        checked($library, stringify!($name), ($library.$name)($($argument),*))
    };
}

impl Context {
    /// Retains the context of the device with this ordinal.
    pub(super) fn open(ordinal: u32) -> Result<Arc<Self>, Error> {
        let unusable = |found: &CudaProbe| {
            Error::new(ErrorKind::Device, "there is no usable CUDA device")
                .at("device", format_args!("cuda:{ordinal}"))
                .found(found)
                .hint("`touchdown doctor` shows what this machine has; `--devices cpu:N` needs no GPU")
        };
        let library = library().map_err(|found| unusable(&found))?;
        let (mut count, mut device, mut handle) = (0, 0, ptr::null_mut());
        let failed = |error: DriverError| error.on(ordinal, "the CUDA device cannot be used");
        // SAFETY: it writes one int.
        unsafe { call!(library, cuDeviceGetCount(&mut count)) }.map_err(failed)?;
        let wanted = c_int::try_from(ordinal).ok().filter(|wanted| *wanted < count);
        let Some(wanted) = wanted else {
            return Err(Error::new(ErrorKind::Device, "there is no such CUDA device")
                .found(format_args!("cuda:{ordinal}"))
                .expected(format_args!("an ordinal below {count}, the number of devices")));
        };
        // SAFETY: it writes one int.
        unsafe { call!(library, cuDeviceGet(&mut device, wanted)) }.map_err(failed)?;
        // SAFETY: it writes one handle, which `Drop` releases.
        unsafe { call!(library, cuDevicePrimaryCtxRetain(&mut handle, device)) }.map_err(failed)?;
        Ok(Arc::new(Self { library, ordinal, device, handle }))
    }

    /// The device's ordinal.
    pub(super) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Makes it this thread's current context for a while.
    pub(super) fn enter(&self) -> Outcome<Current<'_>> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { call!(self.library, cuCtxPushCurrent_v2(self.handle)) }?;
        Ok(Current { context: self, _thread: std::marker::PhantomData })
    }

    /// 10 * major + minor of the compute capability.
    pub(super) fn capability(&self) -> Outcome<u32> {
        const MAJOR: u32 = 75;
        const MINOR: u32 = 76;
        let attribute = |attribute| {
            let mut value: c_int = 0;
            // SAFETY: it writes one int.
            unsafe { call!(self.library, cuDeviceGetAttribute(&mut value, attribute, self.device)) }?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        Ok(10 * attribute(MAJOR)? + attribute(MINOR)?)
    }

    /// Lets copies from a peer's memory to this device's go without a detour over the host, where the machine can.
    pub(super) fn reach(&self, peer: &Self) -> Outcome<()> {
        const UNSUPPORTED: c_int = 217;
        const ALREADY_ENABLED: c_int = 704;
        const TOO_MANY_PEERS: c_int = 711;
        let mut can: c_int = 0;
        // SAFETY: it writes one int.
        unsafe { call!(self.library, cuDeviceCanAccessPeer(&mut can, self.device, peer.device)) }?;
        if can == 0 {
            return Ok(());
        }
        let _current = self.enter()?;
        // SAFETY: both contexts are retained; 0 is the only legal flag.
        match unsafe { call!(self.library, cuCtxEnablePeerAccess(peer.handle, 0)) } {
            // The detour does it, too.
            Err(error) if [UNSUPPORTED, ALREADY_ENABLED, TOO_MANY_PEERS].contains(&error.code) => Ok(()),
            other => other,
        }
    }

    /// Releases something. A driver may answer any call with the failure of something earlier, so a failed release is tried once
    /// more; if that fails too, the device is lost, and its memory with it.
    fn release(&self, what: &'static str, call: impl Fn() -> c_int) {
        let once = || {
            let _current = self.enter()?;
            checked(self.library, what, call())
        };
        if let Err(error) = once().or_else(|_| once()) {
            tracing::warn!(device = self.ordinal, %error, "something of a device could not be released");
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`.
        let release = || unsafe { call!(self.library, cuDevicePrimaryCtxRelease_v2(self.device)) };
        if let Err(error) = release().or_else(|_| release()) {
            tracing::warn!(device = self.ordinal, %error, "a context could not be released");
        }
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        let library = self.context.library;
        // SAFETY: it writes one handle; the context was pushed on this thread.
        let mut pop = || unsafe { call!(library, cuCtxPopCurrent_v2(&mut popped)) };
        if let Err(error) = pop().or_else(|_| pop()) {
            tracing::warn!(%error, "a context stays current");
        }
    }
}

/// Memory of a device.
pub(super) struct DeviceBuffer {
    context: Arc<Context>,
    pointer: Pointer,
    len: usize,
}

/// A stream of a device, independent of the default stream.
pub(super) struct Stream {
    context: Arc<Context>,
    handle: Handle,
}

/// An event of a device, for order alone; whoever waits for it sleeps.
pub(super) struct Event {
    context: Arc<Context>,
    handle: Handle,
}

/// Loaded kernels.
pub(super) struct Module {
    context: Arc<Context>,
    handle: Handle,
}

/// A kernel; it belongs to a module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function(Handle);

/// Host memory that the driver has locked, so that copies need no detour. Dropped before the memory is given back.
pub(super) struct Registration {
    context: Arc<Context>,
    start: *mut c_void,
}

macro_rules! shared {
    ($($kind:ty),*) => {$(
        // SAFETY: as for contexts.
        unsafe impl Send for $kind {}
        // SAFETY: as for contexts.
        unsafe impl Sync for $kind {}
    )*};
}

shared!(Stream, Event, Module, Function, Registration);

/// Rows to a device: lengths in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyRows {
    pub(super) source: *const u8,
    pub(super) source_pitch: usize,
    pub(super) target: Pointer,
    pub(super) target_pitch: usize,
    pub(super) width: usize,
    pub(super) height: usize,
}

impl Current<'_> {
    fn library(&self) -> &'static Library {
        self.context.library
    }

    /// Free memory of the device, in bytes.
    pub(super) fn free_bytes(&self) -> Outcome<u64> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: it writes two sizes.
        unsafe { call!(self.library(), cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok(free as u64)
    }

    /// Copies to the device once earlier work of the stream is done.
    ///
    /// # Safety
    /// 1. `source` is valid for reads and unchanged, and `target` valid for writes, of `len` bytes until the copy has ended.
    pub(super) unsafe fn upload(&self, target: Pointer, source: *const u8, len: usize, stream: &Stream) -> Outcome<()> {
        // SAFETY: the caller's promise.
        unsafe { call!(self.library(), cuMemcpyHtoDAsync_v2(target, source.cast(), len, stream.handle)) }
    }

    /// Copies from the device once earlier work of the stream is done.
    ///
    /// # Safety
    /// 1. `target` is valid for writes and untouched by others, and `source` valid for reads, of `len` bytes until the copy has
    ///    ended.
    pub(super) unsafe fn download(&self, target: *mut u8, source: Pointer, len: usize, stream: &Stream) -> Outcome<()> {
        // SAFETY: the caller's promise.
        unsafe { call!(self.library(), cuMemcpyDtoHAsync_v2(target.cast(), source, len, stream.handle)) }
    }

    /// Copies rows to the device once earlier work of the stream is done.
    ///
    /// # Safety
    /// 1. As [`upload`](Self::upload), for every row.
    pub(super) unsafe fn upload_rows(&self, rows: CopyRows, stream: &Stream) -> Outcome<()> {
        const HOST: u32 = 1;
        const DEVICE: u32 = 2;
        let copy = Copy2D {
            source_x_bytes: 0,
            source_y: 0,
            source_kind: HOST,
            source_host: rows.source.cast(),
            source_device: 0,
            source_array: ptr::null_mut(),
            source_pitch: rows.source_pitch,
            target_x_bytes: 0,
            target_y: 0,
            target_kind: DEVICE,
            target_host: ptr::null_mut(),
            target_device: rows.target,
            target_array: ptr::null_mut(),
            target_pitch: rows.target_pitch,
            width_bytes: rows.width,
            height: rows.height,
        };
        // SAFETY: the description is read during the call; the rest is the caller's promise.
        unsafe { call!(self.library(), cuMemcpy2DAsync_v2(&copy, stream.handle)) }
    }

    /// Copies on the device once earlier work of the stream is done.
    ///
    /// # Safety
    /// 1. Both sides are valid for `len` bytes and nobody else writes them until the copy has ended.
    pub(super) unsafe fn copy_on_device(
        &self,
        target: Pointer,
        source: Pointer,
        len: usize,
        stream: &Stream,
    ) -> Outcome<()> {
        // SAFETY: the caller's promise.
        unsafe { call!(self.library(), cuMemcpyDtoDAsync_v2(target, source, len, stream.handle)) }
    }

    /// Copies from another device's memory to this one's once earlier work of the stream, one of this device, is done.
    ///
    /// # Safety
    /// 1. Both sides are valid for `len` bytes and nobody else writes them until the copy has ended.
    pub(super) unsafe fn copy_from_peer(
        &self,
        target: Pointer,
        (source, peer): (Pointer, &Context),
        len: usize,
        stream: &Stream,
    ) -> Outcome<()> {
        let (to, from) = (self.context.handle, peer.handle);
        // SAFETY: the caller's promise; both contexts are retained.
        unsafe { call!(self.library(), cuMemcpyPeerAsync(target, to, source, from, len, stream.handle)) }
    }

    /// Launches blocks of `threads` threads over a table.
    ///
    /// # Safety
    /// 1. The arguments are those that the function takes; all memory that it touches is valid until it has ended.
    pub(super) unsafe fn launch(
        &self,
        function: Function,
        (blocks, threads): (u32, u32),
        (table, first_tile, boxes, tallies): (Pointer, Pointer, u32, Pointer),
        stream: &Stream,
    ) -> Outcome<()> {
        let (mut table, mut first_tile, mut boxes, mut tallies) = (table, first_tile, boxes, tallies);
        let mut arguments: [*mut c_void; 4] =
            [(&raw mut table).cast(), (&raw mut first_tile).cast(), (&raw mut boxes).cast(), (&raw mut tallies).cast()];
        let (arguments, none) = (arguments.as_mut_ptr(), ptr::null_mut());
        // SAFETY: the arguments are read during the call; the rest is the caller's promise.
        unsafe {
            let (one, stream) = (1, stream.handle);
            call!(
                self.library(),
                cuLaunchKernel(function.0, blocks, one, one, threads, one, one, 0, stream, arguments, none)
            )
        }
    }

    /// Marks what the stream has been given so far.
    pub(super) fn record(&self, event: &Event, stream: &Stream) -> Outcome<()> {
        // SAFETY: both live.
        unsafe { call!(self.library(), cuEventRecord(event.handle, stream.handle)) }
    }

    /// The same for a stream of somebody else.
    ///
    /// # Safety
    /// 1. It is a live stream of this context, or one of the driver's special handles.
    pub(super) unsafe fn record_foreign(&self, event: &Event, stream: u64) -> Outcome<()> {
        // A handle is a number that the driver gave out.
        let stream = ptr::without_provenance_mut(usize::try_from(stream).unwrap_or(usize::MAX));
        // SAFETY: the caller's promise.
        unsafe { call!(self.library(), cuEventRecord(event.handle, stream)) }
    }

    /// Lets the stream's later work wait for an event.
    pub(super) fn wait_on(&self, stream: &Stream, event: &Event) -> Outcome<()> {
        // SAFETY: both live; 0 is the only legal flag.
        unsafe { call!(self.library(), cuStreamWaitEvent(stream.handle, event.handle, 0)) }
    }

    /// Sleeps until what was recorded has ended.
    pub(super) fn wait(&self, event: &Event) -> Outcome<()> {
        // SAFETY: the event lives.
        unsafe { call!(self.library(), cuEventSynchronize(event.handle)) }
    }

    /// Waits until a stream has nothing to do.
    pub(super) fn drain(&self, stream: &Stream) -> Outcome<()> {
        // SAFETY: the stream lives.
        unsafe { call!(self.library(), cuStreamSynchronize(stream.handle)) }
    }

    /// Waits until no stream of the context has anything to do.
    pub(super) fn drain_all(&self) -> Outcome<()> {
        // SAFETY: it takes nothing.
        unsafe { call!(self.library(), cuCtxSynchronize()) }
    }

    /// A kernel of a module.
    pub(super) fn function(&self, module: &Module, name: &CStr) -> Outcome<Function> {
        let mut handle = ptr::null_mut();
        // SAFETY: it writes one handle.
        unsafe { call!(self.library(), cuModuleGetFunction(&mut handle, module.handle, name.as_ptr())) }?;
        Ok(Function(handle))
    }
}

impl DeviceBuffer {
    /// `len` bytes, which is not 0, with any contents.
    pub(super) fn new(context: &Arc<Context>, len: usize) -> Outcome<Self> {
        let current = context.enter()?;
        let mut pointer = 0;
        // SAFETY: it writes one address, which `Drop` frees.
        unsafe { call!(current.library(), cuMemAlloc_v2(&mut pointer, len)) }?;
        Ok(Self { context: Arc::clone(context), pointer, len })
    }

    pub(super) fn pointer(&self) -> Pointer {
        self.pointer
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`. The driver waits for what still uses it.
        self.context.release("cuMemFree_v2", || unsafe { (self.context.library.cuMemFree_v2)(self.pointer) });
    }
}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Outcome<Self> {
        const NON_BLOCKING: u32 = 1;
        let current = context.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: it writes one handle, which `Drop` destroys.
        unsafe { call!(current.library(), cuStreamCreate(&mut handle, NON_BLOCKING)) }?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    /// The driver's handle, as a number.
    pub(super) fn raw(&self) -> u64 {
        self.handle.addr() as u64
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created in `new`; work that is queued is still done.
        self.context
            .release("cuStreamDestroy_v2", || unsafe { (self.context.library.cuStreamDestroy_v2)(self.handle) });
    }
}

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Outcome<Self> {
        const BLOCKING_SYNC: u32 = 1;
        const DISABLE_TIMING: u32 = 2;
        let current = context.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: it writes one handle, which `Drop` destroys.
        unsafe { call!(current.library(), cuEventCreate(&mut handle, BLOCKING_SYNC | DISABLE_TIMING)) }?;
        Ok(Self { context: Arc::clone(context), handle })
    }
}

impl Event {
    /// The driver's handle, as a number.
    pub(super) fn raw(&self) -> u64 {
        self.handle.addr() as u64
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `new`.
        self.context.release("cuEventDestroy_v2", || unsafe { (self.context.library.cuEventDestroy_v2)(self.handle) });
    }
}

impl Module {
    /// Loads code for the device, or PTX that ends with a zero byte.
    pub(super) fn load(context: &Arc<Context>, image: &[u8]) -> Outcome<Self> {
        let current = context.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the image is whole and says by itself where it ends; the handle is unloaded in `Drop`.
        unsafe { call!(current.library(), cuModuleLoadData(&mut handle, image.as_ptr().cast())) }?;
        Ok(Self { context: Arc::clone(context), handle })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded in `load`; whoever launches its kernels has waited for them.
        self.context.release("cuModuleUnload", || unsafe { (self.context.library.cuModuleUnload)(self.handle) });
    }
}

impl Registration {
    /// Locks memory, for copies to and from every device.
    ///
    /// # Safety
    /// 1. The memory is mapped until the registration is dropped.
    pub(super) unsafe fn new(context: &Arc<Context>, start: *mut u8, len: usize) -> Outcome<Self> {
        const PORTABLE: u32 = 1;
        let current = context.enter()?;
        // SAFETY: the caller's promise; unregistered in `Drop`.
        unsafe { call!(current.library(), cuMemHostRegister_v2(start.cast(), len, PORTABLE)) }?;
        Ok(Self { context: Arc::clone(context), start: start.cast() })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: registered in `new`; whoever gave copies from it has waited for them.
        self.context
            .release("cuMemHostUnregister", || unsafe { (self.context.library.cuMemHostUnregister)(self.start) });
    }
}

impl DriverError {
    /// Something that was refused before the driver was asked.
    pub(super) fn local(reason: String) -> Self {
        Self { call: "lowering ops to kernels", code: -1, name: reason }
    }

    /// For the user: what could not be done, on which device.
    pub(super) fn on(self, ordinal: u32, what: &str) -> Error {
        const OUT_OF_MEMORY: c_int = 2;
        let kind = if self.code == OUT_OF_MEMORY { ErrorKind::OutOfMemory } else { ErrorKind::Device };
        Error::new(kind, what).at("device", format_args!("cuda:{ordinal}")).found(&self)
    }

    /// Whether the driver refused the code, so that other code may do.
    pub(super) fn is_unfit_image(&self) -> bool {
        // Invalid image, no binary for the device, unsupported PTX version, invalid PTX.
        matches!(self.code, 200 | 209 | 218 | 222)
    }
}

/// The outcome of a call. A driver that is gone cannot name its errors.
fn checked(library: &Library, call: &'static str, code: c_int) -> Outcome<()> {
    if code == 0 {
        return Ok(());
    }
    let mut name = ptr::null();
    // SAFETY: it writes one pointer.
    let named = unsafe { (library.cuGetErrorName)(code, &mut name) } == 0 && !name.is_null();
    let name = match named {
        // SAFETY: what it has written points to text that lives as long as the library.
        true => unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned(),
        false => "an error".to_owned(),
    };
    Err(DriverError { call, code, name })
}

macro_rules! debug {
    ($($kind:ident),*) => {$(
        impl fmt::Debug for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($kind), "(cuda:{})"), self.context.ordinal)
            }
        }
    )*};
}

debug!(DeviceBuffer, Stream, Event, Module, Registration);

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context(cuda:{})", self.ordinal)
    }
}
