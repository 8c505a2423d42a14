//! Is there a CUDA driver, and what does it drive? Asking loads the driver's library at run time; it never panics.

use std::fmt;

use crate::error::Result;
use crate::plan::Device;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CudaProbe {
    /// This build has no CUDA support.
    NotBuilt,
    /// There is no driver library.
    NoLibrary(String),
    /// A library that lacks a function every driver since CUDA 11 has.
    MissingSymbol(String),
    /// The library is a stub for linking, not a driver.
    Stub,
    /// A driver, but no device.
    NoDevice,
    /// A driver of this version, which is too old (10020 is CUDA 10.2).
    OldDriver(i32),
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
            Self::OldDriver(_) => "old-driver",
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
        let version = |driver: &i32| format!("{}.{}", driver / 1000, driver % 1000 / 10);
        match self {
            Self::NotBuilt => f.write_str("not part of this build (feature `cuda`)"),
            Self::NoLibrary(error) => write!(f, "no driver: {error}"),
            Self::MissingSymbol(symbol) => write!(f, "the driver library has no {symbol}: too old, or no driver"),
            Self::Stub => f.write_str("the driver library is a stub for linking; remove it from the library path"),
            Self::NoDevice => f.write_str("a driver, but no device"),
            Self::OldDriver(driver) => write!(f, "the driver is for CUDA {}; 11.0 or newer is needed", version(driver)),
            Self::Failed(code) => write!(f, "the driver failed with error {code}"),
            Self::Devices { driver, names } => write!(f, "driver for CUDA {}: {}", version(driver), names.join(", ")),
        }
    }
}

/// All GPUs of this machine, in the order of their ordinals; none, whatever is wrong with its driver.
pub fn gpus() -> Vec<Device> {
    let count = u32::try_from(probe_cuda().count()).unwrap_or(0);
    (0..count).map(|ordinal| Device::Cuda { ordinal, logical: None }).collect()
}

/// Free memory of a GPU, in bytes. It costs the start of the device's context, unless somebody in the process has started it.
///
/// # Errors
/// No driver, no such device, or one that fails.
pub fn free_bytes(ordinal: u32) -> Result<u64> {
    #[cfg(feature = "cuda")]
    return super::cuda::free_bytes(ordinal);
    #[cfg(not(feature = "cuda"))]
    super::absent::free_bytes(ordinal)
}

/// Looks for a driver.
pub fn probe_cuda() -> CudaProbe {
    #[cfg(feature = "cuda")]
    return super::cuda::probe();
    #[cfg(not(feature = "cuda"))]
    CudaProbe::NotBuilt
}
