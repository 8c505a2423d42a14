//! The driver that the tests load: the simulated one (`tests/fakecuda`), one machine at a time, or the machine's own.

#![allow(unsafe_code, dead_code, unreachable_pub, reason = "every test binary uses its own part of this module")]

pub mod loads;

use std::ffi::{CString, c_char};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::{Library, Symbol};

use touchdown::Device;

use crate::support::{SKIP_KERNELS_VARIABLE, is_set, kernels_of_the_host, pack, skipped};

/// Set where tests are to use the machine's own driver and devices. Those that need the simulator are skipped then.
const REAL_VARIABLE: &str = "TOUCHDOWN_TEST_GPU";

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

/// What a program that a test starts is told, so that it finds devices.
#[derive(Clone, Copy, Debug)]
pub enum Driver {
    Simulated(&'static Files),
    Real,
}

impl Driver {
    /// `None` (and a printed line) if the caller is to be skipped.
    pub fn find(test: &str) -> Option<Self> {
        if real_devices().is_some() { Some(Self::Real) } else { files(test).map(Self::Simulated) }
    }

    /// The variables by which the program finds eight devices, or the machine's own.
    pub fn tell(self, command: &mut Command, delay_us: u64, seed: u64) {
        if let Self::Simulated(files) = self {
            command.env("TOUCHDOWN_LIBCUDA", &files.driver).env("FAKECUDA_KERNELS", &files.kernels);
            command.env("FAKECUDA_DEVICES", "8").env("FAKECUDA_SEED", seed.to_string());
            command.env("FAKECUDA_DELAY_US", delay_us.to_string());
        }
    }
}

/// How many devices the machine's own driver has, if the tests are to use that.
pub fn real_devices() -> Option<u32> {
    is_set(REAL_VARIABLE).then(|| {
        let found = touchdown::place::probe_cuda();
        assert!(found.count() > 0, "{REAL_VARIABLE} is set, but: {found}");
        found.count() as u32
    })
}

/// So many devices; where a machine has fewer GPUs, they are logical ones.
pub fn gpus(count: u32) -> Vec<Device> {
    (0..count).map(|number| device(number, None)).collect()
}

/// So many logical devices on one GPU.
pub fn logical(ordinal: u32, count: u32) -> Vec<Device> {
    (0..count).map(|logical| device(ordinal, Some(logical))).collect()
}

fn device(number: u32, logical: Option<u32>) -> Device {
    match real_devices() {
        // Every device that the tests speak of is another one here, too.
        Some(real) if real < 8 => {
            let place = (number / real) * 16 + logical.map_or(0, |logical| logical + 1);
            Device::Cuda { ordinal: number % real, logical: Some(place) }
        }
        _ => Device::Cuda { ordinal: number, logical },
    }
}

/// What a test of loads runs on: the simulator or the machine's own devices.
#[derive(Debug)]
pub enum Bed {
    Simulated(Simulator),
    Real,
}

impl Bed {
    /// `None` (and a printed line) if the caller is to be skipped.
    pub fn start(test: &str, machine: Machine) -> Option<Self> {
        match real_devices() {
            Some(_) => Some(Self::Real),
            None => Simulator::start(test, machine).map(Self::Simulated),
        }
    }

    /// Another machine, of the simulated ones.
    pub fn reset(&self, machine: Machine) {
        if let Self::Simulated(simulator) = self {
            simulator.reset(machine);
        }
    }

    /// What is alive and what went wrong unnoticed, as far as this driver tells.
    pub fn report(&self) -> String {
        match self {
            Self::Simulated(simulator) => simulator.report(),
            Self::Real => String::new(),
        }
    }
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
    if is_set(REAL_VARIABLE) {
        skipped(test, &format!("it needs the simulator, and {REAL_VARIABLE} is set"));
        return None;
    }
    if is_set(SKIP_KERNELS_VARIABLE) {
        skipped(test, &format!("{SKIP_KERNELS_VARIABLE} is set"));
        return None;
    }
    Some(FILES.get_or_init(|| {
        let kernels = kernels_of_the_host().unwrap_or_else(|reason| {
            panic!("{test}: {reason}; {SKIP_KERNELS_VARIABLE}=1 skips the tests that need a compiler")
        });
        // Cargo builds the simulator beside the tests, because they depend on it.
        let beside = || std::env::current_exe().expect("the test's own path").with_file_name("libfakecuda.so");
        let beside = pack().map_or_else(beside, |pack| pack.join("lib/libfakecuda.so"));
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
