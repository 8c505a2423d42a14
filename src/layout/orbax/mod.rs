//! Orbax's own files: each parser takes bytes, and [`tree`] combines them into the leaves of one item. Beside each parser
//! stands its inverse, `to_bytes`.
//!
//! ```text
//! <step>/_CHECKPOINT_METADATA      checkpoint.rs      item handlers, timestamps, user metadata
//!        <item>/_METADATA          metadata.rs        paths and kinds of leaves (rich.rs: tuples, namedtuples);
//!                                                     metadata_write.rs writes it
//!               _sharding          sharding.rs        mesh and spec of each jax.Array (base64.rs: its keys)
//!               _strings.json      strings.rs         text of string leaves
//!               array_metadatas/   array_metadata.rs  PRNG key types
//!               checkpoint         msgpack.rs         tree and small values of old releases
//! ```
//!
//! [`names`] finds what cannot be saved; `json.rs` reads and `python.rs` writes JSON as Python does.
//!
//! Must not know: how arrays are stored, devices, files. Start at [`tree::read_tree`].

pub mod array_metadata;
mod base64;
pub mod checkpoint;
pub mod json;
pub mod metadata;
pub mod metadata_write;
pub mod msgpack;
pub mod names;
mod python;
mod rich;
pub mod sharding;
pub mod step;
pub mod strings;
pub mod sums;
pub mod tree;
