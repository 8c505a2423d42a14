//! A simulated CUDA driver: what the tests load in the place of `libcuda.so.1`.
//!
//! ```text
//!   api.rs       the entry points, one C function each: counted, made to fail on demand, then
//!   state.rs     contexts, streams, events, modules behind handles; configuration; what is still alive
//!   memory.rs    device memory of a limited size, fenced and poisoned; host memory that is registered
//!   stream.rs    a thread for every stream, events between them, delays
//!   kernels.rs   modules from PTX text; launches of the same kernels compiled for the host, their accesses checked first
//!   control.rs   what a test asks of the simulator itself (`fakecuda_*`)
//! ```
//!
//! It shows whether the host's side is right: order, lifetimes, bounds, errors. It is no device: it says nothing about speed,
//! and nothing about code for a device. What it is stricter about than a driver must be: pinned memory that changes between
//! the call of a copy and the copy is a violation, the target of a download is poisoned until it has arrived, and a kernel may
//! only touch live memory of its own device.

#![allow(non_snake_case, clippy::missing_safety_doc)]

mod api;
mod control;
mod kernels;
mod memory;
mod state;
mod stream;

/// A driver's result; 0 is success.
type Code = u32;

/// Results that the simulator gives, with the driver's numbers and names.
mod code {
    use super::Code;

    pub(crate) const INVALID_VALUE: Code = 1;
    pub(crate) const OUT_OF_MEMORY: Code = 2;
    pub(crate) const NOT_INITIALIZED: Code = 3;
    pub(crate) const INVALID_DEVICE: Code = 101;
    pub(crate) const INVALID_IMAGE: Code = 200;
    pub(crate) const INVALID_CONTEXT: Code = 201;
    pub(crate) const NO_BINARY_FOR_GPU: Code = 209;
    pub(crate) const UNSUPPORTED_PTX_VERSION: Code = 222;
    pub(crate) const INVALID_HANDLE: Code = 400;
    pub(crate) const NOT_FOUND: Code = 500;
    pub(crate) const NOT_READY: Code = 600;
    pub(crate) const ILLEGAL_ADDRESS: Code = 700;
    pub(crate) const PEER_ACCESS_ALREADY_ENABLED: Code = 704;
    pub(crate) const HOST_MEMORY_ALREADY_REGISTERED: Code = 712;
    pub(crate) const HOST_MEMORY_NOT_REGISTERED: Code = 713;
    pub(crate) const LAUNCH_FAILED: Code = 719;

    pub(crate) fn name(code: Code) -> &'static std::ffi::CStr {
        match code {
            0 => c"CUDA_SUCCESS",
            INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
            OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
            NOT_INITIALIZED => c"CUDA_ERROR_NOT_INITIALIZED",
            34 => c"CUDA_ERROR_STUB_LIBRARY",
            100 => c"CUDA_ERROR_NO_DEVICE",
            INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
            INVALID_IMAGE => c"CUDA_ERROR_INVALID_IMAGE",
            INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
            NO_BINARY_FOR_GPU => c"CUDA_ERROR_NO_BINARY_FOR_GPU",
            UNSUPPORTED_PTX_VERSION => c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
            INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
            NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
            NOT_READY => c"CUDA_ERROR_NOT_READY",
            ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
            PEER_ACCESS_ALREADY_ENABLED => c"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED",
            HOST_MEMORY_ALREADY_REGISTERED => c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
            HOST_MEMORY_NOT_REGISTERED => c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
            LAUNCH_FAILED => c"CUDA_ERROR_LAUNCH_FAILED",
            _ => c"CUDA_ERROR_UNKNOWN",
        }
    }
}
