//! Everything between two resets: devices, and the objects behind handles.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::kernels::{Function, Kernels, Module};
use crate::memory::Memory;
use crate::stream::{Event, Stream};
use crate::{Code, code};

/// What machine is simulated.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) devices: usize,
    pub(crate) memory_bytes: usize,
    /// 1000 * major + 10 * minor.
    pub(crate) driver: i32,
    /// What `cuInit` answers.
    pub(crate) init: Code,
    /// Tasks of streams start after a random time below this.
    pub(crate) delay_us: u64,
    pub(crate) seed: u64,
    /// The kernels compiled for the host.
    pub(crate) kernels: Option<PathBuf>,
}

impl Config {
    /// From `FAKECUDA_*`, for programs that the tests start.
    pub(crate) fn from_env() -> Self {
        let number = |name: &str, default: u64| {
            std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or(default)
        };
        Self {
            devices: number("FAKECUDA_DEVICES", 2) as usize,
            memory_bytes: number("FAKECUDA_MEMORY", 1 << 30) as usize,
            driver: number("FAKECUDA_DRIVER", 12_040) as i32,
            init: number("FAKECUDA_INIT", 0) as Code,
            delay_us: number("FAKECUDA_DELAY_US", 0),
            seed: number("FAKECUDA_SEED", 1),
            kernels: std::env::var_os("FAKECUDA_KERNELS").map(PathBuf::from),
        }
    }
}

/// Calls are counted and made to fail outside the state: they happen before there is one.
#[derive(Default)]
pub(crate) struct Calls {
    pub(crate) counts: BTreeMap<&'static str, u64>,
    pub(crate) total: u64,
    /// Bytes that were sent to devices.
    pub(crate) uploaded: u64,
    /// Entry, or `*` for any; the number of the call that fails; with what.
    pub(crate) fault: Option<(String, u64, Code)>,
}

pub(crate) static CALLS: Mutex<Calls> =
    Mutex::new(Calls { counts: BTreeMap::new(), total: 0, uploaded: 0, fault: None });

static STATE: Mutex<Option<Arc<State>>> = Mutex::new(None);

pub(crate) struct State {
    pub(crate) config: Config,
    pub(crate) memory: Mutex<Memory>,
    pub(crate) objects: Mutex<Objects>,
    pub(crate) kernels: Option<Kernels>,
    /// Per device the failure after which nothing works any more.
    pub(crate) failed: Vec<Arc<AtomicU32>>,
    defaults: Vec<Arc<Stream>>,
    violations: Mutex<Vec<String>>,
    next_handle: AtomicU64,
}

#[derive(Default)]
pub(crate) struct Objects {
    pub(crate) streams: HashMap<usize, Arc<Stream>>,
    pub(crate) events: HashMap<usize, Arc<Event>>,
    pub(crate) modules: HashMap<usize, Arc<Module>>,
    /// Functions belong to modules and end with them.
    pub(crate) functions: HashMap<usize, (usize, Function)>,
    /// How often the context of a device is retained.
    pub(crate) contexts: BTreeMap<usize, u64>,
    /// Devices, and those whose memory they may use.
    pub(crate) peers: HashSet<(usize, usize)>,
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state, once `cuInit` was called.
pub(crate) fn state() -> Result<Arc<State>, Code> {
    locked(&STATE).clone().ok_or(code::NOT_INITIALIZED)
}

/// Starts with this configuration unless there is a state.
pub(crate) fn start() -> Result<(), Code> {
    let mut state = locked(&STATE);
    if state.is_none() {
        *state = Some(State::new(Config::from_env()));
        // SAFETY: the function is this library's, which stays loaded: drivers are not unloaded.
        unsafe { libc::atexit(report_at_exit) };
    }
    match state.as_ref().map_or(0, |state| state.config.init) {
        0 => Ok(()),
        code => Err(code),
    }
}

/// Writes what a program has left alive into the file that `FAKECUDA_REPORT` names.
extern "C" fn report_at_exit() {
    if let (Some(file), Ok(state)) = (std::env::var_os("FAKECUDA_REPORT"), state()) {
        let _ = std::fs::write(file, state.report());
    }
}

/// Forgets everything and starts anew.
pub(crate) fn reset(config: Config) {
    *locked(&CALLS) = Calls::default();
    let before = locked(&STATE).replace(State::new(config));
    if let Some(before) = before {
        before.defaults.iter().for_each(|stream| stream.close());
        locked(&before.objects).streams.values().for_each(|stream| stream.close());
    }
}

impl State {
    fn new(config: Config) -> Arc<Self> {
        let failed: Vec<Arc<AtomicU32>> = (0..config.devices).map(|_| Arc::default()).collect();
        let default = |(device, failed): (usize, &Arc<AtomicU32>)| {
            Stream::new(device, Arc::clone(failed), config.delay_us, config.seed + device as u64)
        };
        Arc::new(Self {
            defaults: failed.iter().enumerate().map(default).collect(),
            kernels: config.kernels.as_deref().map(Kernels::load),
            failed,
            config,
            memory: Mutex::default(),
            objects: Mutex::default(),
            violations: Mutex::default(),
            next_handle: AtomicU64::new(0x10_0000),
        })
    }

    /// A handle that was never given out before, so that stale ones are noticed.
    pub(crate) fn handle(&self) -> usize {
        self.next_handle.fetch_add(0x10, Ordering::Relaxed) as usize
    }

    pub(crate) fn stream(&self, handle: usize) -> Result<Arc<Stream>, Code> {
        // The default stream, and its special handles.
        if handle <= 2 {
            return Ok(Arc::clone(&self.defaults[self.device()?]));
        }
        locked(&self.objects).streams.get(&handle).cloned().ok_or(code::INVALID_HANDLE)
    }

    pub(crate) fn event(&self, handle: usize) -> Result<Arc<Event>, Code> {
        locked(&self.objects).events.get(&handle).cloned().ok_or(code::INVALID_HANDLE)
    }

    pub(crate) fn new_stream(&self) -> Result<usize, Code> {
        let (device, handle) = (self.device()?, self.handle());
        let seed = self.config.seed.wrapping_mul(0x9E37_79B9).wrapping_add(handle as u64);
        let stream = Stream::new(device, Arc::clone(&self.failed[device]), self.config.delay_us, seed);
        locked(&self.objects).streams.insert(handle, stream);
        Ok(handle)
    }

    /// The device of the calling thread's context, which must be retained and whole.
    pub(crate) fn device(&self) -> Result<usize, Code> {
        let context = CURRENT.with_borrow(|stack| stack.last().copied()).unwrap_or(0);
        self.device_of(context)
    }

    pub(crate) fn device_of(&self, context: usize) -> Result<usize, Code> {
        let device = context.checked_sub(CONTEXT_HANDLES).ok_or(code::INVALID_CONTEXT)?;
        if device >= self.config.devices || locked(&self.objects).contexts.get(&device).is_none_or(|count| *count == 0)
        {
            return Err(code::INVALID_CONTEXT);
        }
        match self.failed[device].load(Ordering::Acquire) {
            0 => Ok(device),
            code => Err(code),
        }
    }

    /// Waits for all streams of a device.
    pub(crate) fn synchronize(&self, device: usize) -> Result<(), Code> {
        let streams: Vec<Arc<Stream>> = locked(&self.objects).streams.values().cloned().collect();
        let own = streams.iter().chain([&self.defaults[device]]).filter(|stream| stream.device == device);
        own.map(|stream| stream.synchronize()).fold(Ok(()), Result::and)
    }

    /// Something that a driver would not notice, or answer with wrong bytes.
    pub(crate) fn violation(&self, what: Option<String>) {
        locked(&self.violations).extend(what);
    }

    /// What is alive and what was wrong, one a line.
    pub(crate) fn report(&self) -> String {
        let objects = locked(&self.objects);
        let mut lines = locked(&self.memory).alive();
        let counts =
            [(objects.streams.len(), "streams"), (objects.events.len(), "events"), (objects.modules.len(), "modules")];
        lines.extend(counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")));
        let retained = objects.contexts.iter().filter(|(_, count)| **count > 0);
        lines.extend(retained.map(|(device, count)| format!("the context of device {device}, {count} times")));
        lines.extend(locked(&self.violations).iter().map(|what| format!("violation: {what}")));
        lines.join("\n")
    }
}

thread_local! {
    /// The contexts of this thread, the current one last.
    pub(crate) static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// The handle of device 0's context.
pub(crate) const CONTEXT_HANDLES: usize = 0x1000;
