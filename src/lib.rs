//! Touchdown lands Orbax checkpoints on devices.

pub mod dtype;
pub mod error;
pub mod keypath;
pub mod limits;
pub mod need;
pub mod relpath;
pub mod shape;

pub mod decode;
pub mod io;
pub mod kv;
pub mod layout;
pub mod place;
pub mod plan;
pub mod transform;
pub mod tree;

#[cfg(feature = "cli")]
pub mod cli;
pub mod zarr;

pub use dtype::{CastPolicy, DType};
pub use error::{Error, ErrorKind, Result};
