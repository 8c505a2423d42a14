//! The device's executor of casts and copies, as far as it needs no driver: kernels, and what they are told.
//!
//! ```text
//! [Placement]  --lower-->  [Launch { kernel, descriptors, first_tile }]  --a driver, elsewhere-->  [Tally]
//! ```
//!
//! The kernels are `kernels/*.cu`. Their head comments say how they work, and `tests/kernels.rs` compares them with
//! [`super::cpu`], which defines the answer. [`PTX`] runs on every device since Volta, translated by its driver; [`CUBINS`]
//! are translated already, if the build found a compiler.
//!
//! Must not know: the driver, streams, memory; here an address is a number.

mod batch;
mod descriptor;

pub use batch::{Kernel, Launch, LowerError, Placement, THREADS, lower, rank};
pub use descriptor::{Descriptor, Flags, Tally};

/// The kernels for the driver to translate: PTX 6.0 for `sm_70`, so any driver since CUDA 9 takes it. Made by
/// `kernels/build_ptx.py`; the build fails if the sources have changed since.
pub const PTX: &str = include_str!("../../../kernels/place.ptx");

include!(concat!(env!("OUT_DIR"), "/cubins.rs"));
