//! Is there a CUDA driver, and what does it drive? Asks by loading the driver's library at run time; never panics.

use std::fmt;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CudaProbe {
    /// This build has no CUDA support.
    NotBuilt,
    /// There is no driver library.
    NoLibrary(String),
    /// A library that lacks a function every driver has.
    MissingSymbol(String),
    /// The library is a stub for linking, not a driver.
    Stub,
    /// A driver, but no device.
    NoDevice,
    /// The driver failed with this code.
    Failed(i32),
    /// A driver of this version (13000 is CUDA 13.0) and the names of its devices.
    Devices {
        /// What the driver supports, as 1000 * major + 10 * minor.
        driver: i32,
        /// Names in the order of ordinals.
        names: Vec<String>,
    },
}

impl CudaProbe {
    /// One word for programs.
    pub fn state(&self) -> &'static str {
        match self {
            Self::NotBuilt => "not-built",
            Self::NoLibrary(_) => "no-library",
            Self::MissingSymbol(_) => "missing-symbol",
            Self::Stub => "stub",
            Self::NoDevice => "no-device",
            Self::Failed(_) => "failed",
            Self::Devices { .. } => "devices",
        }
    }

    /// Number of devices.
    pub fn count(&self) -> usize {
        match self {
            Self::Devices { names, .. } => names.len(),
            _ => 0,
        }
    }
}

impl fmt::Display for CudaProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt => f.write_str("not part of this build (feature `cuda`)"),
            Self::NoLibrary(error) => write!(f, "no driver: {error}"),
            Self::MissingSymbol(symbol) => write!(f, "the driver library has no {symbol}: too old, or no driver"),
            Self::Stub => f.write_str("the driver library is a stub for linking; remove it from the library path"),
            Self::NoDevice => f.write_str("a driver, but no device"),
            Self::Failed(code) => write!(f, "the driver failed with error {code}"),
            Self::Devices { driver, names } => {
                write!(f, "driver for CUDA {}.{}: {}", driver / 1000, driver % 1000 / 10, names.join(", "))
            }
        }
    }
}

/// Looks for a driver.
#[cfg(not(feature = "cuda"))]
pub fn probe_cuda() -> CudaProbe {
    CudaProbe::NotBuilt
}

/// Looks for a driver.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub fn probe_cuda() -> CudaProbe {
    use libloading::{Library, Symbol};
    use std::ffi::{c_char, c_int, c_uint};

    const STUB_LIBRARY: c_int = 34;
    const NO_DEVICE: c_int = 100;
    const NAME_BYTES: usize = 256;
    const NAME_BYTES_INT: c_int = 256;

    // SAFETY: the driver's library is meant to be loaded; its initialisers are the vendor's.
    let library = match unsafe { Library::new("libcuda.so.1") } {
        Ok(library) => library,
        Err(error) => return CudaProbe::NoLibrary(error.to_string()),
    };
    macro_rules! symbol {
        ($name:literal: $kind:ty) => {{
            // SAFETY: the signature is that of the CUDA driver API, unchanged since CUDA 2.
            let found: Result<Symbol<'_, $kind>, _> = unsafe { library.get($name) };
            match found {
                Ok(found) => found,
                Err(_) => return CudaProbe::MissingSymbol(String::from_utf8_lossy($name).into_owned()),
            }
        }};
    }
    let init = symbol!(b"cuInit": unsafe extern "C" fn(c_uint) -> c_int);
    let version = symbol!(b"cuDriverGetVersion": unsafe extern "C" fn(*mut c_int) -> c_int);
    let count = symbol!(b"cuDeviceGetCount": unsafe extern "C" fn(*mut c_int) -> c_int);
    let get = symbol!(b"cuDeviceGet": unsafe extern "C" fn(*mut c_int, c_int) -> c_int);
    let name = symbol!(b"cuDeviceGetName": unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int);
    // SAFETY: 0 is the only legal flag.
    match unsafe { init(0) } {
        0 => {}
        STUB_LIBRARY => return CudaProbe::Stub,
        NO_DEVICE => return CudaProbe::NoDevice,
        code => return CudaProbe::Failed(code),
    }
    let (mut driver, mut devices) = (0, 0);
    // SAFETY: both write one int.
    match unsafe { (version(&mut driver), count(&mut devices)) } {
        (0, 0) => {}
        (0, code) | (code, _) => return CudaProbe::Failed(code),
    }
    if devices == 0 {
        return CudaProbe::NoDevice;
    }
    let mut names = Vec::new();
    for ordinal in 0..devices {
        let mut device = 0;
        let mut bytes = [0u8; NAME_BYTES];
        // SAFETY: `get` writes one int; `name` writes at most the given length, with a NUL at its end.
        let code = unsafe {
            match get(&mut device, ordinal) {
                0 => name(bytes.as_mut_ptr().cast(), NAME_BYTES_INT, device),
                code => code,
            }
        };
        if code != 0 {
            return CudaProbe::Failed(code);
        }
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        names.push(String::from_utf8_lossy(text).into_owned());
    }
    CudaProbe::Devices { driver, names }
}
