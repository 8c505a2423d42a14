//! Modules and launches. A module is made of real PTX text and knows the entry points that stand in it; what a launch runs is
//! the same kernel compiled for the host (`tests/kernels/shim.cpp`), after a look at what it is going to touch.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::sync::Arc;

use libloading::Library;

use crate::state::{State, locked};
use crate::{Code, code};

/// What every kernel of this project takes: table, first tiles, number of boxes, tallies.
pub(crate) type Parameters = (u64, u64, u32, u64);

type Launch = unsafe extern "C" fn(u64, u64, u64, u32, u64);
type Spans = unsafe extern "C" fn(u64, u64, u32, u64, extern "C" fn(*mut c_void, u64, u64, u32), *mut c_void);

pub(crate) struct Kernels {
    library: Library,
    /// What a launch reads of its tables, and then what the boxes in them touch.
    table_spans: Spans,
    box_spans: Spans,
}

pub(crate) struct Module {
    entries: BTreeSet<String>,
}

#[derive(Clone, Copy)]
pub(crate) struct Function {
    launch: Launch,
}

impl Kernels {
    pub(crate) fn load(path: &Path) -> Self {
        // SAFETY: the library is the tests' own and has no initialisers; the symbols have the types that it declares.
        unsafe {
            let library = Library::new(path).expect("the kernels that were compiled for the host");
            let table_spans = *library.get::<Spans>(b"table_spans").expect("`table_spans`");
            let box_spans = *library.get::<Spans>(b"box_spans").expect("`box_spans`");
            Self { library, table_spans, box_spans }
        }
    }

    /// The function of an entry point that stands in a module.
    pub(crate) fn function(&self, module: &Module, name: &str) -> Result<Function, Code> {
        if !module.entries.contains(name) {
            return Err(code::NOT_FOUND);
        }
        let symbol = CString::new(format!("launch_{name}")).map_err(|_| code::NOT_FOUND)?;
        // SAFETY: `shim.cpp` gives every entry point this signature.
        let launch = unsafe { self.library.get::<Launch>(symbol.as_bytes_with_nul()) };
        Ok(Function { launch: *launch.map_err(|_| code::NOT_FOUND)? })
    }

    /// Runs a launch on a device, if all that it touches is live memory of that device.
    pub(crate) fn run(
        &self,
        state: &State,
        device: usize,
        function: Function,
        blocks: u32,
        (table, first_tile, boxes, tallies): Parameters,
    ) -> Result<(), Code> {
        for spans in [self.table_spans, self.box_spans] {
            let mut touched = Touched::default();
            let who = (&raw mut touched).cast();
            // SAFETY: the tables are checked before the boxes are read from them; `note` takes what `who` points to.
            unsafe { spans(table, first_tile, boxes, tallies, note, who) };
            let memory = locked(&state.memory);
            for (address, bytes) in touched.0 {
                if bytes > 0 && memory.device_of(address as usize, bytes as usize) != Some(device) {
                    state.violation(Some(format!("a kernel of device {device} reaches {bytes} bytes at {address:#x}")));
                    return Err(code::ILLEGAL_ADDRESS);
                }
            }
        }
        // SAFETY: all that the boxes name was checked; who frees memory waits for the device's streams first.
        unsafe { (function.launch)(u64::from(blocks), table, first_tile, boxes, tallies) };
        Ok(())
    }
}

#[derive(Default)]
struct Touched(Vec<(u64, u64)>);

extern "C" fn note(who: *mut c_void, address: u64, bytes: u64, _writes: u32) {
    // SAFETY: `run` passes a `Touched` of its own.
    unsafe { &mut *who.cast::<Touched>() }.0.push((address, bytes));
}

/// A module of an image: PTX text of a version that the driver knows, for a device that it has.
pub(crate) unsafe fn module(driver: i32, image: *const u8) -> Result<Arc<Module>, Code> {
    // SAFETY: the caller gives an image: text that ends with a zero byte, or a file that begins with its mark.
    let head = unsafe { std::slice::from_raw_parts(image, 4) };
    if head == b"\x7FELF" {
        // Code for a device: here is none.
        return Err(code::NO_BINARY_FOR_GPU);
    }
    // SAFETY: as above.
    let text = unsafe { CStr::from_ptr(image.cast()) }.to_str().map_err(|_| code::INVALID_IMAGE)?;
    let directive = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
    let version = directive(".version").and_then(|version| version.split_once('.')).ok_or(code::INVALID_IMAGE)?;
    let number = |text: &str| text.trim().parse::<i32>().map_err(|_| code::INVALID_IMAGE);
    if (number(version.0)?, number(version.1)?) > ptx_version(driver) {
        return Err(code::UNSUPPORTED_PTX_VERSION);
    }
    let target = directive(".target").and_then(|target| target.strip_prefix("sm_")).ok_or(code::INVALID_IMAGE)?;
    if number(target)? > COMPUTE_CAPABILITY.0 * 10 + COMPUTE_CAPABILITY.1 {
        return Err(code::NO_BINARY_FOR_GPU);
    }
    let entries = text.lines().filter_map(|line| line.trim().strip_prefix(".visible .entry "));
    Ok(Arc::new(Module { entries: entries.map(|line| line.trim_end_matches('(').trim().to_owned()).collect() }))
}

/// The newest PTX that a driver takes: 11.0 came with 7.0, and each minor release with the next one.
fn ptx_version(driver: i32) -> (i32, i32) {
    match (driver / 1000, driver % 1000 / 10) {
        (..=10, _) => (6, 5),
        (11, minor) => (7, minor.min(8)),
        (12, minor) => (8, minor.min(8)),
        (_, minor) => (9, minor),
    }
}

/// Of every simulated device.
pub(crate) const COMPUTE_CAPABILITY: (i32, i32) = (9, 0);
