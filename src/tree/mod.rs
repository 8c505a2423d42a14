//! What people call: open, target, plan, load.
//!
//! ```text
//!   Checkpoint::open ──► Target (rules) ──► Plan ──► Engine::load ──► Job ──► State
//!     catalog.rs           target.rs     plan::build   work.rs, drive.rs,    job.rs  state.rs
//!                                                      land.rs, carry.rs, bus.rs, devices.rs
//! ```
//!
//! This folder and `cli` drive I/O; everything before it is told what the bytes are.

mod api;
pub mod bench;
mod bus;
mod carry;
mod catalog;
mod check;
mod checkpoint;
pub mod convert;
#[cfg(feature = "cudarc")]
mod cudarc;
mod database;
mod devices;
pub mod diff;
mod drive;
mod engine;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod inline;
mod job;
mod land;
mod lend;
mod orphans;
pub mod repair;
mod resolve;
mod rows;
mod rules;
pub mod save;
pub mod seal;
mod shard;
mod state;
mod stream;
mod target;
mod tensors;
mod value;
pub mod verify;
mod warm;
mod work;

pub use api::{Load, LoadedItem, Save, load, load_async, load_items, metadata, open, save, save_async, save_items};
pub(crate) use api::{load_items_on, trees};
pub use catalog::{LeafInfo, LeafKind, SavedSpec};
pub use checkpoint::{Checkpoint, LeafMetadata, Metadata, OpenOptions};
pub use database::Database;
pub use devices::DeviceStartup;
pub use engine::{Engine, EngineOptions, Stall};
pub use job::{Job, Progress};
pub use rows::{Row, RowView};
#[cfg(feature = "cli")]
pub(crate) use rules::no_leaf;
pub use rules::{Filter, Pattern};
pub use shard::Shard;
pub use state::{Array, Leaf, Report, Stage, Stages, State};
pub use target::{Missing, Otherwise, Take, Target};
pub use value::{ScalarType, Value};
