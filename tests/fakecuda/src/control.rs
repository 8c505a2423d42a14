//! What tests ask of the simulator itself.

use std::ffi::{CStr, c_char};
use std::path::PathBuf;

use crate::state::{CALLS, Config, locked, reset, state};

/// Another machine: everything before is forgotten. `kernels` is the library of the kernels that were compiled for the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fakecuda_reset(
    devices: u64,
    memory_bytes: u64,
    driver: i32,
    delay_us: u64,
    seed: u64,
    kernels: *const c_char,
) {
    // SAFETY: the caller gives null or text that ends with a zero byte.
    let kernels = (!kernels.is_null()).then(|| unsafe { CStr::from_ptr(kernels) }.to_string_lossy().into_owned());
    reset(Config {
        devices: devices as usize,
        memory_bytes: memory_bytes as usize,
        driver,
        init: 0,
        delay_us,
        seed,
        kernels: kernels.map(PathBuf::from),
    });
}

/// The `nth` call from now on (1 is the next) of this entry point, or of any if it is `*`, fails with this code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fakecuda_fail(entry: *const c_char, nth: u64, code: u32) {
    // SAFETY: the caller gives text that ends with a zero byte.
    let entry = unsafe { CStr::from_ptr(entry) }.to_string_lossy().into_owned();
    let mut calls = locked(&CALLS);
    calls.counts.clear();
    (calls.total, calls.uploaded) = (0, 0);
    calls.fault = (nth > 0).then_some((entry, nth, code));
}

/// Whether a failure that was asked for has not happened yet.
#[unsafe(no_mangle)]
pub extern "C" fn fakecuda_fault_waits() -> bool {
    locked(&CALLS).fault.is_some()
}

/// The calls since the last reset or order to fail, `entry count` a line. Returns the length, at most `capacity`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fakecuda_calls(text: *mut u8, capacity: u64) -> u64 {
    let lines: Vec<String> = locked(&CALLS).counts.iter().map(|(entry, count)| format!("{entry} {count}")).collect();
    // SAFETY: passed on.
    unsafe { hand_out(&lines.join("\n"), text, capacity) }
}

/// The bytes that were sent to devices since then.
#[unsafe(no_mangle)]
pub extern "C" fn fakecuda_uploaded_bytes() -> u64 {
    locked(&CALLS).uploaded
}

/// What is alive, and what went wrong unnoticed, one a line; nothing if all is well. Returns the length, at most `capacity`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fakecuda_report(text: *mut u8, capacity: u64) -> u64 {
    let report = state().map_or_else(|_| String::new(), |state| state.report());
    // SAFETY: passed on.
    unsafe { hand_out(&report, text, capacity) }
}

/// The most memory of a device that was allocated at once, in bytes.
#[unsafe(no_mangle)]
pub extern "C" fn fakecuda_peak_bytes(device: u64) -> u64 {
    state().map_or(0, |state| locked(&state.memory).peak(device as usize) as u64)
}

unsafe fn hand_out(from: &str, text: *mut u8, capacity: u64) -> u64 {
    let len = from.len().min(capacity as usize);
    // SAFETY: the caller has room for `capacity` bytes.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), text, len) };
    len as u64
}
