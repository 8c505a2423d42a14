//! Touchdown lands Orbax checkpoints on devices.
//!
//! JAX programs save checkpoints with Orbax: an OCDBT database of zarr arrays, compressed with zstd. This crate opens them
//! without Python, maps a device mesh and partition specs to the shards that each device needs, reads only those bytes,
//! casts, pads, truncates and rearranges them on the way, and leaves sharded arrays in memory that the caller owns. It reads
//! safetensors with the same planner.
//!
//! ```text
//!   directory ─► layout ─► kv ─► zarr ─► plan ─► io ─► decode ─► transform ─► place ─► your arrays
//!               what is   key   array   which    bytes  stored   element      host
//!               this?     to    to      bytes    in     to       bytes to     or device
//!                         range chunks  where    motion elements wanted ones memory
//! ```
//!
//! # Start here
//!
//! ```
//! use touchdown::{Checkpoint, DType, Device, Engine, EngineOptions, Mesh, Otherwise, spec};
//!
//! # fn main() -> touchdown::Result<()> {
//! let checkpoint = touchdown::open("tests/fixtures/quickstart/ckpt")?;        // metadata only
//! let mesh = Mesh::new([("data", 2), ("model", 4)], Device::cpus(8))?;
//! let target = checkpoint
//!     .target()                                                               // everything, as stored
//!     .skip(["opt_state/**"])                                                // a rule without a match is an error
//!     .shard(&mesh, [("**/kernel", spec![_, "model"]), ("**/bias", spec!["model"])])
//!     .otherwise(Otherwise::Replicate)                                        // said, never assumed
//!     .cast([("params/**", DType::BFloat16)])
//!     .rename([("^params/(.*)/kernel$", "$1.weight")])
//!     .transpose([("*.weight", vec![1, 0])]);                                // JAX [in, out] becomes [out, in]
//! println!("{}", checkpoint.plan(&target)?);                                  // bytes, requests, peak memory: before any read
//!
//! let engine = Engine::new(EngineOptions::default())?;                        // threads and staging memory, reusable
//! let state = engine.load(&checkpoint, &target)?.wait()?;
//! let weight = state.array("layer_0.weight")?;
//! let first = weight.shards()[0].as_ndarray::<half::bf16>()?;                 // no copy
//! assert_eq!((weight.shape.as_slice(), first.shape()), (&[128, 64][..], &[32, 64][..]));
//! # Ok(())
//! # }
//! ```
//!
//! [`open`] finds out what a path holds. A [`Target`] says what is wanted of it, as rules over key paths. A [`Plan`] says
//! what that costs. An [`Engine`] does it; its [`Job`] is an iterator over finished arrays, a future, and a
//! handle to cancel. [`load`] and [`load_async`] make an engine for one load. [`save()`] is the other direction, and a
//! [`training::Checkpointer`] keeps a series of steps.
//!
//! # Words
//!
//! **Checkpoint**: a directory of *items*, each a tree or JSON. **Tree**, **leaf**, **key path**: `params/layer_0/kernel`.
//! **Array**: a stored N-D array. **Chunk**: what one key stores. **Inner chunk**: a part of it under zarr's
//! `sharding_indexed`. **Unit**: what is decoded in one go. **Mesh**, **axis**, **partition spec**, **sharding** = mesh +
//! spec, as in JAX. **Shard**: the part of an array that one device holds (never zarr's shard, unless said so).
//! **Replica**: an equal shard on another device. **Target**: what the caller wants. **View**: how a target array lies in
//! stored ones. **Plan**: all reads, decodes and placements, complete before the first data byte is read.
//!
//! # Promises
//!
//! - The plan exists before the first data byte is read; peak memory and bytes read are known, printable and kept to.
//! - Every stored unit that is wanted is read and decoded once, whatever number of devices want parts of it.
//! - Nothing is guessed: rules that match nothing, leaves that do not fit and names that are ambiguous are errors that list
//!   everything at once, with the nearest names.
//! - No input makes the library panic, read outside the checkpoint, or allocate what a file merely claims.
//! - A call prints nothing and leaves no thread behind, unless the caller made an engine.
//! - Casts equal TensorStore's bit for bit wherever TensorStore defines them; see [`transform::cpu`].
//!
//! `ARCHITECTURE.md` in the repository explains the folders, the decisions behind them and the invariants.

// Sizes come from files. In tests they are written down.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

pub mod dtype;
pub mod error;
pub mod keypath;
pub mod limits;
pub mod need;
pub mod relpath;
pub mod shape;

pub mod decode;
pub mod encode;
#[doc(hidden)]
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod io;
pub mod kv;
pub mod layout;
pub mod place;
pub mod plan;
pub mod training;
pub mod transform;
pub mod tree;
pub mod zarr;

#[cfg(feature = "cli")]
pub mod cli;

pub use dtype::{CastPolicy, DType};
pub use error::{Error, ErrorKind, Result};
pub use io::Io;
pub use keypath::{Key, KeyPath};
pub use plan::{Device, Mesh, MeshDevice, Plan, Process, Sharding, Spec, Verify};
pub use tree::convert::{ConvertOptions, ConvertProgress, ConvertReport, ConvertTo, convert};
pub use tree::save::{SaveOptions, Tree, delete, delete_item};
pub use tree::{
    Array, Checkpoint, Engine, EngineOptions, Job, Leaf, Load, LoadedItem, Missing, OpenOptions, Otherwise, Pattern,
    Save, Shard, State, Take, Target, Value, load, load_async, load_items, metadata, open, save, save_async,
    save_items,
};

// Types of these crates stand in our signatures.
#[cfg(feature = "cudarc")]
pub use cudarc;
pub use half;
pub use ndarray;
