//! Array to chunks: zarr v2 and v3 metadata, chunk grids, codec chains and shard indexes.
//!
//! One [`ArrayMeta`] describes an array of either version. It says which key holds which part of the array and how the
//! bytes under a key become elements; a [`NewArray`] becomes the metadata of one. Nothing here reads or decompresses anything.
//!
//! Must not know: where keys are stored, devices, files.

mod codecs;
mod fill;
mod grid;
mod json;
pub mod shard;
mod v2;
mod v3;
mod write;

pub use codecs::{ByteCodec, Chunk, Endian, IndexLocation, Layout, Sharded};
pub use grid::{Grid, Positions};
pub use v2::parse as parse_v2;
pub use v3::parse as parse_v3;
pub use write::{Compression, Format, NewArray, NewArrayError};

use crate::dtype::DType;

/// What a zarr array is: shape, type, chunk grid, codecs.
#[derive(Clone, Debug, PartialEq)]
pub struct ArrayMeta {
    /// Extents, slowest dimension first.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: DType,
    /// The regular chunk grid. Every chunk is stored whole; at the high edges it reaches beyond the array.
    pub grid: Grid,
    /// How a chunk's value becomes elements.
    pub layout: Layout,
    /// The element of chunks that are not stored, in memory form (`dtype.size()` bytes); zeros where none is given.
    pub fill: Vec<u8>,
    /// How chunk keys are spelt.
    pub keys: ChunkKeys,
}

/// How the key of a chunk is spelt, relative to the array's own prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKeys {
    /// `c/0/1`; a 0-d array's chunk is `c`.
    Default {
        /// `/` or `.`
        separator: char,
    },
    /// `0.1`; a 0-d array's chunk is `0`.
    V2 {
        /// `.` or `/`
        separator: char,
    },
}

/// Why an array's metadata cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// Not JSON, or a member is missing or of the wrong type.
    #[error("{0}")]
    Malformed(String),
    /// Well formed, but outside what this reader knows.
    #[error("unsupported {what} `{found}` (supported: {supported})")]
    Unsupported {
        /// The member.
        what: &'static str,
        /// Its value.
        found: String,
        /// What would be read.
        supported: &'static str,
    },
    /// Sizes beyond the limits, or that contradict each other.
    #[error("{0}")]
    Size(String),
}

impl From<MetaError> for crate::Error {
    fn from(error: MetaError) -> Self {
        match error {
            MetaError::Unsupported { .. } => Self::unsupported(error.to_string()),
            MetaError::Malformed(_) | MetaError::Size(_) => Self::corrupt(error.to_string()),
        }
    }
}

impl ChunkKeys {
    /// The key of the chunk at this grid position.
    pub fn key(self, position: &[u64]) -> String {
        let joined = |separator: char| {
            position.iter().map(u64::to_string).collect::<Vec<_>>().join(separator.encode_utf8(&mut [0; 4]))
        };
        match self {
            Self::Default { .. } if position.is_empty() => "c".to_owned(),
            Self::Default { separator } => format!("c{separator}{}", joined(separator)),
            Self::V2 { .. } if position.is_empty() => "0".to_owned(),
            Self::V2 { separator } => joined(separator),
        }
    }

    /// The grid position that a key of an array of this rank spells; `None` for any other key.
    pub fn position(self, key: &str, rank: usize) -> Option<Vec<u64>> {
        let (separator, body) = match self {
            _ if rank == 0 => return (self.key(&[]) == key).then(Vec::new),
            Self::Default { separator } => (separator, key.strip_prefix('c')?.strip_prefix(separator)?),
            Self::V2 { separator } => (separator, key),
        };
        let position: Option<Vec<u64>> = body.split(separator).map(|number| number.parse().ok()).collect();
        position.filter(|position| position.len() == rank && self.key(position) == key)
    }
}
