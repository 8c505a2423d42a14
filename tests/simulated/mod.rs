//! The simulated driver (`tests/fakecuda`) as the tests use it: one machine at a time.

#![allow(unsafe_code, dead_code, unreachable_pub, reason = "every test binary uses its own part of this module")]

use std::ffi::{CString, c_char};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::{Library, Symbol};

use crate::support::{SKIP_KERNELS_VARIABLE, is_set, kernels_of_the_host, skipped};

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    pub devices: u64,
    pub memory_bytes: u64,
    /// Tasks of a stream start after a random time below this.
    pub delay_us: u64,
    pub seed: u64,
}

impl Default for Machine {
    fn default() -> Self {
        Self { devices: 8, memory_bytes: 1 << 30, delay_us: 0, seed: 1 }
    }
}

/// The driver and the kernels, found once.
#[derive(Debug)]
pub struct Files {
    /// The library that takes the place of the driver's.
    pub driver: PathBuf,
    /// The kernels that it runs.
    pub kernels: PathBuf,
}

/// The simulator, for one test at a time.
#[derive(Debug)]
pub struct Simulator {
    library: &'static Library,
    files: &'static Files,
    _turn: MutexGuard<'static, ()>,
}

/// Where driver and kernels are; `None` (and a printed line) if the caller is to be skipped.
pub fn files(test: &str) -> Option<&'static Files> {
    static FILES: OnceLock<Files> = OnceLock::new();
    if is_set(SKIP_KERNELS_VARIABLE) {
        skipped(test, &format!("{SKIP_KERNELS_VARIABLE} is set"));
        return None;
    }
    Some(FILES.get_or_init(|| {
        let kernels = kernels_of_the_host().unwrap_or_else(|reason| {
            panic!("{test}: {reason}; {SKIP_KERNELS_VARIABLE}=1 skips the tests that need a compiler")
        });
        // Cargo builds the simulator beside the tests, because they depend on it.
        let beside = std::env::current_exe().expect("the test's own path").with_file_name("libfakecuda.so");
        assert!(beside.is_file(), "{}: cargo builds it with the tests", beside.display());
        Files { driver: beside, kernels }
    }))
}

impl Simulator {
    /// Starts a machine; `None` (and a printed line) if the caller is to be skipped.
    pub fn start(test: &str, machine: Machine) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        let files = files(test)?;
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let library = LIBRARY.get_or_init(|| {
            // SAFETY: all that reads this variable is behind this function and waits for it.
            unsafe { std::env::set_var("TOUCHDOWN_LIBCUDA", &files.driver) };
            // SAFETY: the library is ours and has no initialisers.
            unsafe { Library::new(&files.driver) }.unwrap_or_else(|e| panic!("{}: {e}", files.driver.display()))
        });
        let simulator = Self { library, files, _turn: turn };
        simulator.reset(machine);
        Some(simulator)
    }

    /// Another machine.
    pub fn reset(&self, machine: Machine) {
        let Machine { devices, memory_bytes, delay_us, seed } = machine;
        let kernels = CString::new(self.files.kernels.to_str().expect("a path in UTF-8")).expect("a path without zero");
        let reset = self.symbol::<unsafe extern "C" fn(u64, u64, i32, u64, u64, *const c_char)>("fakecuda_reset");
        // SAFETY: as the simulator declares it.
        unsafe { reset(devices, memory_bytes, 12_040, delay_us, seed, kernels.as_ptr()) };
    }

    /// The `nth` call of an entry point from now on fails with this code; `*` is any entry point.
    pub fn fail(&self, entry: &str, nth: u64, code: u32) {
        let entry = CString::new(entry).expect("a name");
        // SAFETY: as the simulator declares it.
        unsafe {
            self.symbol::<unsafe extern "C" fn(*const c_char, u64, u32)>("fakecuda_fail")(entry.as_ptr(), nth, code)
        };
    }

    /// Whether a failure that was asked for has not happened.
    pub fn fault_waits(&self) -> bool {
        // SAFETY: as the simulator declares it.
        unsafe { self.symbol::<unsafe extern "C" fn() -> bool>("fakecuda_fault_waits")() }
    }

    /// How often each entry point was called since the machine started or a failure was asked for.
    pub fn calls(&self) -> Vec<(String, u64)> {
        let text = self.text("fakecuda_calls");
        let call = |line: &str| {
            let (entry, count) = line.split_once(' ').expect("an entry and a count");
            (entry.to_owned(), count.parse().expect("a count"))
        };
        text.lines().map(call).collect()
    }

    /// How often one was called.
    pub fn count(&self, entry: &str) -> u64 {
        self.calls().into_iter().find(|(name, _)| name == entry).map_or(0, |(_, count)| count)
    }

    /// What is alive and what went wrong unnoticed; empty if all is well.
    pub fn report(&self) -> String {
        self.text("fakecuda_report")
    }

    /// The bytes that were sent to devices since the machine started or a failure was asked for.
    pub fn uploaded_bytes(&self) -> u64 {
        // SAFETY: as the simulator declares it.
        unsafe { self.symbol::<unsafe extern "C" fn() -> u64>("fakecuda_uploaded_bytes")() }
    }

    /// The most memory of a device that was ever allocated.
    pub fn peak_bytes(&self, device: u64) -> u64 {
        // SAFETY: as the simulator declares it.
        unsafe { self.symbol::<unsafe extern "C" fn(u64) -> u64>("fakecuda_peak_bytes")(device) }
    }

    /// An entry point, for tests that use the driver themselves.
    pub fn symbol<T>(&self, name: &str) -> Symbol<'static, T> {
        // SAFETY: callers name the type that the simulator declares.
        unsafe { self.library.get(name.as_bytes()) }.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn text(&self, name: &str) -> String {
        let mut text = vec![0; 1 << 16];
        // SAFETY: as the simulator declares it.
        let len = unsafe {
            self.symbol::<unsafe extern "C" fn(*mut u8, u64) -> u64>(name)(text.as_mut_ptr(), text.len() as u64)
        };
        text.truncate(len as usize);
        String::from_utf8(text).expect("text")
    }
}
