//! The driver's library: looked for at run time, entry by entry, so that a machine without it, or with an old one, gets an
//! answer and no build needs anything of CUDA.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library as Shared;

use super::super::CudaProbe;

/// A device address.
pub(super) type Pointer = u64;

/// What the driver knows a context, stream, event, module or function by.
pub(super) type Handle = *mut c_void;

macro_rules! library {
    ($($name:ident: fn($($argument:ty),* $(,)?);)*) => {
        /// The entry points that are used, all of them present. Signatures are those of `cuda.h`; every one of them is in every
        /// driver since CUDA 11.0.
        #[allow(non_snake_case)]
        pub(super) struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> c_int,)*
            // Keeps the code of the functions mapped.
            _library: Shared,
        }

        impl Library {
            fn bind(library: Shared) -> Result<Self, CudaProbe> {
                $(
                    // SAFETY: the signature is the driver's, unchanged since the entry's version was made.
                    #[allow(non_snake_case)]
                    let $name = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> c_int>(stringify!($name).as_bytes()) };
                    #[allow(non_snake_case)]
                    let $name = *$name.map_err(|_| CudaProbe::MissingSymbol(stringify!($name).to_owned()))?;
                )*
                Ok(Self { $($name,)* _library: library })
            }
        }
    };
}

library! {
    cuInit: fn(c_uint);
    cuDriverGetVersion: fn(*mut c_int);
    cuDeviceGetCount: fn(*mut c_int);
    cuDeviceGet: fn(*mut c_int, c_int);
    cuDeviceGetName: fn(*mut c_char, c_int, c_int);
    cuDeviceGetAttribute: fn(*mut c_int, c_uint, c_int);
    cuDeviceCanAccessPeer: fn(*mut c_int, c_int, c_int);
    cuDevicePrimaryCtxRetain: fn(*mut Handle, c_int);
    cuDevicePrimaryCtxRelease_v2: fn(c_int);
    cuCtxPushCurrent_v2: fn(Handle);
    cuCtxPopCurrent_v2: fn(*mut Handle);
    cuCtxSynchronize: fn();
    cuCtxEnablePeerAccess: fn(Handle, c_uint);
    cuMemGetInfo_v2: fn(*mut usize, *mut usize);
    cuMemAlloc_v2: fn(*mut Pointer, usize);
    cuMemFree_v2: fn(Pointer);
    cuMemHostRegister_v2: fn(*mut c_void, usize, c_uint);
    cuMemHostUnregister: fn(*mut c_void);
    cuMemcpyHtoDAsync_v2: fn(Pointer, *const c_void, usize, Handle);
    cuMemcpyDtoHAsync_v2: fn(*mut c_void, Pointer, usize, Handle);
    cuMemcpyDtoDAsync_v2: fn(Pointer, Pointer, usize, Handle);
    cuMemcpy2DAsync_v2: fn(*const Copy2D, Handle);
    cuMemcpyPeerAsync: fn(Pointer, Handle, Pointer, Handle, usize, Handle);
    cuStreamCreate: fn(*mut Handle, c_uint);
    cuStreamDestroy_v2: fn(Handle);
    cuStreamSynchronize: fn(Handle);
    cuStreamWaitEvent: fn(Handle, Handle, c_uint);
    cuEventCreate: fn(*mut Handle, c_uint);
    cuEventDestroy_v2: fn(Handle);
    cuEventRecord: fn(Handle, Handle);
    cuEventSynchronize: fn(Handle);
    cuModuleLoadData: fn(*mut Handle, *const c_void);
    cuModuleUnload: fn(Handle);
    cuModuleGetFunction: fn(*mut Handle, Handle, *const c_char);
    cuLaunchKernel: fn(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void,
    );
    cuGetErrorName: fn(c_int, *mut *const c_char);
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub(super) struct Copy2D {
    pub(super) source_x_bytes: usize,
    pub(super) source_y: usize,
    pub(super) source_kind: c_uint,
    pub(super) source_host: *const c_void,
    pub(super) source_device: Pointer,
    pub(super) source_array: Handle,
    pub(super) source_pitch: usize,
    pub(super) target_x_bytes: usize,
    pub(super) target_y: usize,
    pub(super) target_kind: c_uint,
    pub(super) target_host: *mut c_void,
    pub(super) target_device: Pointer,
    pub(super) target_array: Handle,
    pub(super) target_pitch: usize,
    pub(super) width_bytes: usize,
    pub(super) height: usize,
}

/// The driver, ready to use: found, complete, initialised and new enough. Looked for until there is one; it stays loaded, because
/// drivers do not expect to be unloaded.
pub(super) fn library() -> Result<&'static Library, CudaProbe> {
    static FOUND: OnceLock<Library> = OnceLock::new();
    if let Some(library) = FOUND.get() {
        return Ok(library);
    }
    let name = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty());
    let name = name.unwrap_or_else(|| LIBRARY_NAME.into());
    // SAFETY: the driver's library is meant to be loaded; its initialisers are the vendor's.
    let shared = unsafe { Shared::new(name) }.map_err(|error| CudaProbe::NoLibrary(error.to_string()))?;
    let library = Library::bind(shared)?;
    // SAFETY: 0 is the only legal flag.
    match unsafe { (library.cuInit)(0) } {
        0 => {}
        STUB_LIBRARY => return Err(CudaProbe::Stub),
        NO_DEVICE => return Err(CudaProbe::NoDevice),
        code => return Err(CudaProbe::Failed(code)),
    }
    let mut driver = 0;
    // SAFETY: it writes one int.
    match unsafe { (library.cuDriverGetVersion)(&mut driver) } {
        0 if driver < DRIVER_VERSION_MIN => return Err(CudaProbe::OldDriver(driver)),
        0 => {}
        code => return Err(CudaProbe::Failed(code)),
    }
    Ok(FOUND.get_or_init(|| library))
}

/// Looks for a driver and its devices.
pub(in super::super) fn probe() -> CudaProbe {
    devices().unwrap_or_else(|reason| reason)
}

fn devices() -> Result<CudaProbe, CudaProbe> {
    let library = library()?;
    let checked = |code| if code == 0 { Ok(()) } else { Err(CudaProbe::Failed(code)) };
    let (mut driver, mut count) = (0, 0);
    // SAFETY: each writes one int.
    checked(unsafe { (library.cuDriverGetVersion)(&mut driver) })?;
    // SAFETY: as above.
    checked(unsafe { (library.cuDeviceGetCount)(&mut count) })?;
    if count <= 0 {
        return Err(CudaProbe::NoDevice);
    }
    let mut names = Vec::new();
    for ordinal in 0..count {
        let mut device = 0;
        let mut bytes = [0u8; NAME_BYTES];
        // SAFETY: it writes one int.
        checked(unsafe { (library.cuDeviceGet)(&mut device, ordinal) })?;
        // SAFETY: it writes at most the given length, with a NUL at its end.
        checked(unsafe { (library.cuDeviceGetName)(bytes.as_mut_ptr().cast(), NAME_BYTES_INT, device) })?;
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        names.push(String::from_utf8_lossy(text).into_owned());
    }
    Ok(CudaProbe::Devices { driver, names })
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library").finish_non_exhaustive()
    }
}

/// The driver's library by its versioned name: an unversioned one on a search path is often a stub for linking.
const LIBRARY_NAME: &str = "libcuda.so.1";

/// Names another library: a driver in an unusual place, or a simulated one.
const LIBRARY_VARIABLE: &str = "TOUCHDOWN_LIBCUDA";

/// CUDA 11.0, the first with all entries.
const DRIVER_VERSION_MIN: c_int = 11_000;

const STUB_LIBRARY: c_int = 34;
const NO_DEVICE: c_int = 100;
const NAME_BYTES: usize = 256;
const NAME_BYTES_INT: c_int = 256;
