//! OCDBT databases: a copy-on-write B+tree of keys and values in a few files.
//!
//! [`scan()`] reads the latest version of one database and returns an [`Index`](crate::kv::Index) of all its keys. The
//! source of the format is TensorStore's own description (the OCDBT pages of its manual).
//!
//! ```text
//!   manifest.ocdbt            config, the latest versions ──┐ root node: file, offset, length, height
//!                                                           v
//!   d/<hex>   [value value .. node node ..]       interior node   key -> child node     height n
//!                                                   |       |
//!                                                   v       v
//!                                            leaf node   leaf node   key -> bytes, or    height 0
//!                                                                    key -> (file, offset, length)
//! ```
//!
//! A node stores its keys without the prefix that they share; its parent knows that prefix. It names files relative to
//! a directory that depends on the references followed so far (see `data_ref`), which is how a merged database points
//! into the databases of the processes that wrote it.
//!
//! [`write()`] is the inverse: an index becomes the bytes of a manifest and of nodes.
//!
//! The decoders are pure functions of bytes and return [`OcdbtError`]; only the walk in `scan` asks for bytes, one
//! batch a level of the tree, and turns errors into [`Error`] with the file and offset. Statistics, commit times and
//! the tree of older versions are parsed only to pass over them.
//!
//! Must not know: what keys and values mean, where files really are. Start reading at `scan`, then `btree`.

mod btree;
mod codec;
mod data_ref;
mod manifest;
mod scan;
mod version_tree;
mod write;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod testing;

pub use manifest::{Compression, Config};
pub use scan::{Database, Union, scan, scan_processes};
pub use write::{NodePlace, WriteError, Written, write};

use crate::error::Error;

/// Why bytes are not the OCDBT object that they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum OcdbtError {
    #[error("an OCDBT object ends early")]
    Truncated,
    #[error("{count} bytes follow the end of an OCDBT object's body")]
    Trailing { count: u64 },
    #[error("wrong magic number of an OCDBT object (expected {expected:#010x}, found {found:#010x})")]
    Magic { expected: u32, found: u32 },
    #[error("wrong length of an OCDBT object (it says {stored} bytes, and has {found})")]
    Length { stored: u64, found: u64 },
    #[error("wrong crc32c of an OCDBT object (stored {stored:#010x}, computed {computed:#010x})")]
    Crc { stored: u32, computed: u32 },
    #[error("OCDBT format version {found} (supported: 0)")]
    Version { found: u64 },
    #[error("OCDBT compression method {found} (supported: 0, none; 1, zstd)")]
    Compression { found: u64 },
    #[error("zstd level {found} of the OCDBT configuration is outside -131072..=22")]
    Level { found: i32 },
    #[error("OCDBT manifest kind {found} (supported: 0, single; 1, numbered)")]
    ManifestKind { found: u8 },
    #[error("bad zstd frame: {0}")]
    Zstd(String),
    #[error("a variable-length integer is wider than 64 bits")]
    Uleb,
    /// Beyond what the format allows.
    #[error("{what} is {found}, outside {min}..={max}")]
    Range { what: &'static str, min: u64, max: u64, found: u64 },
    /// Allowed by the format, but beyond what this library reads.
    #[error("{what} is {found}, more than the {max} that are read")]
    Limit { what: &'static str, max: u64, found: u64 },
    #[error("string {index} shares {prefix} bytes with its predecessor of {previous} bytes")]
    Prefix { index: usize, prefix: u16, previous: u16 },
    #[error("path {index} of a data file table shares bytes beyond a base path that differs from its predecessor's")]
    Base { index: usize },
    #[error("file {found} of a data file table of {count}")]
    FileId { found: u64, count: usize },
    #[error("the byte range of {len} bytes at {offset} does not fit in a file")]
    Extent { offset: u64, len: u64 },
    #[error("a reference names no file")]
    NoFile,
    #[error("generation {found} after {previous}: generations must ascend from 1")]
    Generation { previous: u64, found: u64 },
    #[error("generations {first} and {last} do not belong in one manifest of arity 2^{arity_log2}")]
    GenerationBlock { first: u64, last: u64, arity_log2: u8 },
    #[error("wrong height of a B+tree node (expected {expected}, found {found})")]
    Height { expected: u8, found: u8 },
    #[error("key {index} of a B+tree node is not greater than the key before it")]
    Unsorted { index: usize },
    #[error("the first key of a B+tree node is less than its parent says")]
    KeyBelowParent,
    #[error("the subtree prefix of entry {index} has {prefix} bytes, its key {key}")]
    SubtreePrefix { index: usize, prefix: u16, key: u16 },
    #[error("value kind {found} (supported: 0, inline; 1, out of line)")]
    ValueKind { found: u8 },
}

impl From<OcdbtError> for Error {
    fn from(error: OcdbtError) -> Self {
        match error {
            OcdbtError::Version { .. }
            | OcdbtError::Compression { .. }
            | OcdbtError::ManifestKind { .. }
            | OcdbtError::Limit { .. } => Self::unsupported(error.to_string()),
            _ => Self::corrupt(error.to_string()),
        }
    }
}

type Result<T, E = OcdbtError> = std::result::Result<T, E>;
