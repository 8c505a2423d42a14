//! Orbax's own files: each parser takes bytes, and [`tree`] combines them into the leaves of one item.
//!
//! ```text
//! <step>/_CHECKPOINT_METADATA      checkpoint.rs      item handlers, timestamps, user metadata
//!        <item>/_METADATA          metadata.rs        paths and kinds of leaves (rich.rs: tuples, namedtuples)
//!               _sharding          sharding.rs        mesh and spec of each jax.Array (base64.rs: its keys)
//!               _strings.json      strings.rs         text of string leaves
//!               array_metadatas/   array_metadata.rs  PRNG key types
//!               checkpoint         msgpack.rs         tree and small values of old releases
//! ```
//!
//! Must not know: how arrays are stored, devices, files. Start at [`tree::read_tree`].

pub mod array_metadata;
mod base64;
pub mod checkpoint;
pub mod json;
pub mod metadata;
pub mod msgpack;
mod rich;
pub mod sharding;
pub mod step;
pub mod strings;
pub mod tree;
