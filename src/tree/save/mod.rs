//! Saving: a tree in memory becomes a checkpoint that Orbax loads.
//!
//! ```text
//!   Tree ──► Item (item.rs): arrays to write, files that describe them ──► write_arrays (write.rs) ──► commit (work.rs)
//!   tree.rs    problems, all of them, before anything is written            gather.rs, encode            one rename
//! ```

mod array;
mod delete;
mod disk_thread;
mod files;
mod finish;
mod gather;
mod item;
mod job;
mod memory;
mod options;
mod spare;
mod tree;
mod value_file;
mod work;
mod write;

pub use delete::{delete, delete_item};
pub(in crate::tree) use files::{DataFile, Durable, Storage, Written};
pub(in crate::tree) use finish::{JsonItem, finish_checkpoint, finish_tree, now_ns, write_database};
pub(in crate::tree) use item::{Elements, Item, element};
pub(in crate::tree) use job::Progress;
pub use job::{SaveJob, SaveProgress, SaveReport};
pub(in crate::tree) use memory::{Held, INLINE_PER_BUDGET};
pub use options::{LeafChoice, LeafOptions, SaveOptions};
pub(in crate::tree) use tree::Loaded;
pub use tree::{NewArray, NewLeaf, NewPart, Tree, TreeItem};
pub(in crate::tree) use value_file::ValueFile;
pub(in crate::tree) use work::{SaveWork, check_destination};
pub(in crate::tree) use write::{Context, write_arrays};
