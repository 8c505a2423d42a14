//! Metadata of new arrays, as Orbax has TensorStore write it.
//!
//! Sources: what Orbax 0.12 writes, byte for byte; the Zarr specifications named in `v2` and `v3`.

use serde_json::{Value, json};

use super::v2::numpy_code;
use super::{ArrayMeta, ByteCodec, Chunk, ChunkKeys, Endian, Grid, IndexLocation, Layout, Sharded};
use crate::dtype::{Class, DType};
use crate::limits::{CHUNKS_MAX, INNER_CHUNKS_MAX, RANK_MAX, SHARDED_RANK_MAX, ZSTD_LEVEL_MAX, ZSTD_LEVEL_MIN};
use crate::shape::{byte_count, element_count};

/// An array that is to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewArray {
    /// Extents, slowest dimension first. An extent of 0 makes an array without chunks.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: DType,
    /// Extents of a chunk, each at least 1. What one key stores; a shard in version 3.
    pub chunk_shape: Vec<u64>,
    /// Which version of zarr.
    pub format: Format,
    /// Extents of an inner chunk of a version 3 shard. `None`: those of the chunk, one inner chunk a shard, as Orbax
    /// writes.
    pub inner_shape: Option<Vec<u64>>,
    /// How chunks (inner chunks in version 3) are compressed.
    pub compression: Compression,
    /// Whether stored elements carry checksums: inside the zstd frame, and in version 3 a CRC-32C behind what is stored,
    /// because the frame's own leaves out its header.
    pub checksum: bool,
}

/// The version of zarr that an array is stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// One `.zarray` and a chunk a key.
    V2,
    /// One `zarr.json` and a shard a key (`sharding_indexed`).
    V3,
}

/// How the elements of a chunk are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    None,
    /// One zstd frame a chunk.
    Zstd {
        /// [`ZSTD_LEVEL_MIN`] to [`ZSTD_LEVEL_MAX`]; 0 is libzstd's default. Orbax uses 1 in version 2, 3 in version 3.
        level: i32,
    },
    /// One zstd frame a chunk whose blocks hold no sequences, only Huffman-coded literals: every zstd decoder reads it,
    /// and its blocks can be decoded side by side. About as small as level 3 for trained floating-point weights.
    Gpu,
}

/// Why an array cannot be stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NewArrayError {
    /// TensorStore, and so Orbax, has no such type.
    #[error("elements of type {0} cannot be stored in zarr arrays that TensorStore reads")]
    DType(DType),
    /// More than [`RANK_MAX`] dimensions.
    #[error("{0} dimensions, at most {RANK_MAX} are stored")]
    Rank(usize),
    /// More than [`SHARDED_RANK_MAX`] dimensions in version 3, where every chunk is a shard.
    #[error("{0} dimensions, at most {SHARDED_RANK_MAX} are stored in zarr v3: TensorStore reads no shards of more")]
    ShardedRank(usize),
    /// A chunk shape that does not fit the array.
    #[error("the chunk shape {chunk:?} has not as many extents as the shape {shape:?}, or one that is 0")]
    Chunk {
        /// Extents of a chunk.
        chunk: Vec<u64>,
        /// Extents of the array.
        shape: Vec<u64>,
    },
    /// An inner chunk that does not divide its shard.
    #[error("the inner chunk shape {inner:?} does not divide the chunk shape {chunk:?}")]
    Inner {
        /// Extents of an inner chunk.
        inner: Vec<u64>,
        /// Extents of a chunk.
        chunk: Vec<u64>,
    },
    /// Inner chunks in version 2.
    #[error("zarr v2 has no inner chunks")]
    InnerInV2,
    /// A checksum of uncompressed chunks in version 2.
    #[error("zarr v2 has no checksum of chunks that are not compressed")]
    ChecksumInV2,
    /// A zstd level that libzstd does not have.
    #[error("zstd level {0} is outside {ZSTD_LEVEL_MIN}..={ZSTD_LEVEL_MAX}")]
    Level(i32),
    /// Beyond the limits in bytes or in number of chunks.
    #[error("{what} {shape:?} of {dtype} is too large")]
    Size {
        /// What the extents are of.
        what: &'static str,
        /// The extents.
        shape: Vec<u64>,
        /// Element type.
        dtype: DType,
    },
}

impl From<NewArrayError> for crate::Error {
    fn from(error: NewArrayError) -> Self {
        match error {
            NewArrayError::DType(_) => Self::unsupported(error.to_string()),
            _ => Self::invalid(error.to_string()),
        }
    }
}

impl Format {
    /// The key of an array's metadata, relative to the array's own prefix.
    pub const fn metadata_key(self) -> &'static str {
        match self {
            Self::V2 => ".zarray",
            Self::V3 => "zarr.json",
        }
    }

    /// How the keys of chunks are spelt.
    pub const fn chunk_keys(self) -> ChunkKeys {
        match self {
            Self::V2 => ChunkKeys::V2 { separator: '.' },
            Self::V3 => ChunkKeys::Default { separator: '/' },
        }
    }
}

impl Compression {
    /// The level that metadata states. The GPU profile has none of its own: what comes nearest is said, for those who
    /// rewrite chunks.
    const fn level(self) -> Option<i32> {
        match self {
            Self::None => None,
            Self::Zstd { level } => Some(level),
            Self::Gpu => Some(-7),
        }
    }
}

impl NewArray {
    /// Checks that Orbax, TensorStore and this library would read the array.
    ///
    /// # Errors
    /// [`NewArrayError`].
    pub fn check(&self) -> Result<(), NewArrayError> {
        self.meta().map(drop)
    }

    /// The metadata document, the value of [`Format::metadata_key`]: compact JSON with sorted members.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn metadata(&self) -> Result<Vec<u8>, NewArrayError> {
        self.check()?;
        let document = match self.format {
            Format::V2 => self.document_v2(),
            Format::V3 => self.document_v3(),
        };
        Ok(document.to_string().into_bytes())
    }

    /// What reading [`metadata`](Self::metadata) gives.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn meta(&self) -> Result<ArrayMeta, NewArrayError> {
        if !is_storable(self.dtype) {
            return Err(NewArrayError::DType(self.dtype));
        }
        if self.shape.len() > RANK_MAX {
            return Err(NewArrayError::Rank(self.shape.len()));
        }
        if self.format == Format::V3 && self.shape.len() > SHARDED_RANK_MAX {
            return Err(NewArrayError::ShardedRank(self.shape.len()));
        }
        if let Some(level) = self.compression.level()
            && !(ZSTD_LEVEL_MIN..=ZSTD_LEVEL_MAX).contains(&level)
        {
            return Err(NewArrayError::Level(level));
        }
        let size = |what, shape: &[u64]| NewArrayError::Size { what, shape: shape.to_vec(), dtype: self.dtype };
        if self.chunk_shape.len() != self.shape.len() || self.chunk_shape.contains(&0) {
            return Err(NewArrayError::Chunk { chunk: self.chunk_shape.clone(), shape: self.shape.clone() });
        }
        for (what, shape) in [("shape", &self.shape), ("chunk shape", &self.chunk_shape)] {
            byte_count(shape, self.dtype.size()).ok_or_else(|| size(what, shape))?;
        }
        let grid = Grid::new(self.chunk_shape.clone()).ok_or_else(|| size("chunk shape", &self.chunk_shape))?;
        if grid.chunk_count(&self.shape).is_none_or(|count| count > CHUNKS_MAX) {
            return Err(size("the number of chunks of", &self.shape));
        }
        Ok(ArrayMeta {
            shape: self.shape.clone(),
            dtype: self.dtype,
            grid,
            layout: self.layout()?,
            fill: vec![0; self.dtype.size()],
            keys: self.format.chunk_keys(),
        })
    }

    /// Extents of an inner chunk, or of the chunk if it has none.
    pub fn inner_shape(&self) -> &[u64] {
        self.inner_shape.as_deref().unwrap_or(&self.chunk_shape)
    }

    fn layout(&self) -> Result<Layout, NewArrayError> {
        let mut codecs = match self.compression {
            Compression::None => Vec::new(),
            Compression::Zstd { .. } | Compression::Gpu => vec![ByteCodec::Zstd],
        };
        // Version 2 has only the frame's own.
        if self.checksum && (self.format == Format::V3 || codecs.is_empty()) {
            codecs.push(ByteCodec::Crc32c);
        }
        let order: Vec<usize> = (0..self.shape.len()).collect();
        let chunk = Chunk { order: order.clone(), endian: Endian::Little, codecs };
        match (self.format, self.inner_shape.is_some()) {
            (Format::V2, true) => Err(NewArrayError::InnerInV2),
            (Format::V2, _) if chunk.codecs == [ByteCodec::Crc32c] => Err(NewArrayError::ChecksumInV2),
            (Format::V2, _) => Ok(Layout::Plain(chunk)),
            (Format::V3, _) => Ok(Layout::Sharded(Box::new(Sharded {
                order,
                counts: self.inner_counts()?,
                inner_shape: self.inner_shape().to_vec(),
                inner: Layout::Plain(chunk),
                index_location: IndexLocation::End,
                index_endian: Endian::Little,
                index_crc32c: true,
            }))),
        }
    }

    fn inner_counts(&self) -> Result<Vec<u64>, NewArrayError> {
        let (inner, chunk) = (self.inner_shape(), &self.chunk_shape);
        let divides = |(inner, chunk): (&u64, &u64)| chunk.checked_rem(*inner) == Some(0);
        if inner.len() != chunk.len() || !inner.iter().zip(chunk).all(divides) {
            return Err(NewArrayError::Inner { inner: inner.to_vec(), chunk: chunk.clone() });
        }
        let counts: Vec<u64> =
            inner.iter().zip(chunk).map(|(inner, chunk)| chunk.checked_div(*inner).unwrap_or_default()).collect();
        match element_count(&counts) {
            Some(count) if count <= INNER_CHUNKS_MAX => Ok(counts),
            _ => {
                let what = "the number of inner chunks of";
                Err(NewArrayError::Size { what, shape: chunk.clone(), dtype: self.dtype })
            }
        }
    }

    /// `.zarray`. The frame's own checksum has no place in it.
    fn document_v2(&self) -> Value {
        let compressor = self.compression.level().map(|level| json!({"id": "zstd", "level": level}));
        json!({
            "chunks": self.chunk_shape,
            "compressor": compressor,
            "dimension_separator": ".",
            "dtype": dtype_v2(self.dtype),
            "fill_value": null,
            "filters": null,
            "order": "C",
            "shape": self.shape,
            "zarr_format": 2,
        })
    }

    /// `zarr.json`.
    fn document_v3(&self) -> Value {
        let little = json!({"configuration": {"endian": "little"}, "name": "bytes"});
        // Elements of one byte have no byte order.
        let bytes = if self.dtype.size() == 1 { json!({"name": "bytes"}) } else { little.clone() };
        let mut codecs = vec![bytes];
        if let Some(level) = self.compression.level() {
            codecs.push(json!({"configuration": {"checksum": self.checksum, "level": level}, "name": "zstd"}));
        }
        if self.checksum {
            codecs.push(json!({"name": "crc32c"}));
        }
        let sharding = json!({
            "configuration": {
                "chunk_shape": self.inner_shape(),
                "codecs": codecs,
                "index_codecs": [little, {"name": "crc32c"}],
            },
            "name": "sharding_indexed",
        });
        json!({
            "chunk_grid": {"configuration": {"chunk_shape": self.chunk_shape}, "name": "regular"},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [sharding],
            "data_type": self.dtype.name(),
            "fill_value": zero(self.dtype),
            "node_type": "array",
            "shape": self.shape,
            "zarr_format": 3,
        })
    }
}

/// Whether TensorStore has the type. (It has no 2- and 4-bit unsigned integers and no 6-bit floating-point numbers.)
const fn is_storable(dtype: DType) -> bool {
    !matches!(dtype, DType::UInt2 | DType::UInt4 | DType::Float8E4M3 | DType::Float6E2M3FN | DType::Float6E3M2FN)
}

/// numpy's code with its byte order, or the bare ml_dtypes name.
fn dtype_v2(dtype: DType) -> String {
    match numpy_code(dtype) {
        None => dtype.name().to_owned(),
        Some(code) if dtype.size() == 1 => format!("|{code}"),
        Some(code) => format!("<{code}"),
    }
}

/// A fill value of zero as version 3 spells it.
fn zero(dtype: DType) -> Value {
    match dtype.class() {
        Class::Bool => json!(false),
        Class::Int(_) | Class::UInt(_) => json!(0),
        Class::Float => json!(0.0),
        Class::Complex => json!([0.0, 0.0]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::zarr::{parse_v2, parse_v3};

    fn array(format: Format) -> NewArray {
        let compression = Compression::Zstd { level: if format == Format::V2 { 1 } else { 3 } };
        NewArray {
            shape: vec![2, 3],
            dtype: DType::Float32,
            chunk_shape: vec![2, 3],
            format,
            inner_shape: None,
            compression,
            checksum: false,
        }
    }

    fn text(array: &NewArray) -> String {
        String::from_utf8(array.metadata().unwrap()).unwrap()
    }

    #[test]
    fn the_bytes_are_those_of_orbax() {
        assert_eq!(
            text(&array(Format::V2)),
            r#"{"chunks":[2,3],"compressor":{"id":"zstd","level":1},"dimension_separator":".","dtype":"<f4","fill_value":null,"filters":null,"order":"C","shape":[2,3],"zarr_format":2}"#,
        );
        assert_eq!(
            text(&array(Format::V3)),
            r#"{"chunk_grid":{"configuration":{"chunk_shape":[2,3]},"name":"regular"},"chunk_key_encoding":{"name":"default"},"codecs":[{"configuration":{"chunk_shape":[2,3],"codecs":[{"configuration":{"endian":"little"},"name":"bytes"},{"configuration":{"checksum":false,"level":3},"name":"zstd"}],"index_codecs":[{"configuration":{"endian":"little"},"name":"bytes"},{"name":"crc32c"}]},"name":"sharding_indexed"}],"data_type":"float32","fill_value":0.0,"node_type":"array","shape":[2,3],"zarr_format":3}"#,
        );
        let scalar = NewArray {
            shape: Vec::new(),
            chunk_shape: Vec::new(),
            dtype: DType::Bool,
            compression: Compression::None,
            ..array(Format::V2)
        };
        assert_eq!(
            text(&scalar),
            r#"{"chunks":[],"compressor":null,"dimension_separator":".","dtype":"|b1","fill_value":null,"filters":null,"order":"C","shape":[],"zarr_format":2}"#,
        );
        assert_eq!(scalar.meta().unwrap().keys.key(&[]), "0");
        assert_eq!((Format::V2.metadata_key(), Format::V3.metadata_key()), (".zarray", "zarr.json"));
        assert_eq!(
            (Format::V2.chunk_keys().key(&[1, 2]), Format::V3.chunk_keys().key(&[1, 2])),
            ("1.2".into(), "c/1/2".into())
        );
    }

    #[test]
    fn elements_of_one_byte_have_no_byte_order_and_checksums_stand_behind_them() {
        let array = NewArray {
            dtype: DType::Int4,
            compression: Compression::None,
            checksum: true,
            inner_shape: Some(vec![1, 3]),
            ..array(Format::V3)
        };
        assert!(text(&array).contains(r#"{"chunk_shape":[1,3],"codecs":[{"name":"bytes"},{"name":"crc32c"}],"#));
    }

    #[test]
    fn what_cannot_be_stored_is_named() {
        let error = |array: NewArray| {
            let error = array.check().unwrap_err();
            assert_eq!((array.metadata().unwrap_err(), array.meta().unwrap_err()), (error.clone(), error.clone()));
            error
        };
        for format in [Format::V2, Format::V3] {
            let good = array(format);
            assert_eq!(good.check(), Ok(()));
            for dtype in ["uint2", "uint4", "float8_e4m3", "float6_e2m3fn", "float6_e3m2fn"] {
                let dtype: DType = dtype.parse().unwrap();
                assert_eq!(error(NewArray { dtype, ..good.clone() }), NewArrayError::DType(dtype));
            }
            for chunk_shape in [vec![2, 0], vec![2], vec![2, 3, 1]] {
                let chunk = NewArrayError::Chunk { chunk: chunk_shape.clone(), shape: vec![2, 3] };
                assert_eq!(error(NewArray { chunk_shape, ..good.clone() }), chunk);
            }
            let deep = NewArray { shape: vec![1; 33], chunk_shape: vec![1; 33], ..good.clone() };
            assert_eq!(error(deep), NewArrayError::Rank(33));
            for level in [23, -131_073] {
                let compression = Compression::Zstd { level };
                assert_eq!(error(NewArray { compression, ..good.clone() }), NewArrayError::Level(level));
            }
            let large = [(vec![1 << 40, 1 << 40], vec![1, 1]), (vec![1, 1], vec![1 << 40, 1 << 40])];
            for (shape, chunk_shape) in large.into_iter().chain([(vec![1 << 20, 1 << 20], vec![1, 1])]) {
                assert!(matches!(error(NewArray { shape, chunk_shape, ..good.clone() }), NewArrayError::Size { .. }));
            }
        }
        for inner_shape in [vec![2, 2], vec![2], vec![0, 3], vec![4, 3]] {
            let inner = NewArrayError::Inner { inner: inner_shape.clone(), chunk: vec![2, 3] };
            assert_eq!(error(NewArray { inner_shape: Some(inner_shape), ..array(Format::V3) }), inner);
        }
        let wide = NewArray { chunk_shape: vec![1 << 20, 1 << 20], inner_shape: Some(vec![1, 1]), ..array(Format::V3) };
        assert!(matches!(error(wide), NewArrayError::Size { .. }));
        let inner = NewArray { inner_shape: Some(vec![2, 3]), ..array(Format::V2) };
        assert_eq!(error(inner), NewArrayError::InnerInV2);
        let summed = NewArray { compression: Compression::None, checksum: true, ..array(Format::V2) };
        assert_eq!(error(summed), NewArrayError::ChecksumInV2);
    }

    proptest! {
        #[test]
        fn what_is_written_is_parsed(
            dtype in prop::sample::select(DType::ALL.to_vec()),
            dims in prop::collection::vec((0_u64..9, 1_u64..4, 1_u64..4), 0..4),
            v3: bool,
            inner: bool,
            level in prop::option::of(-9..23),
            gpu: bool,
            checksum: bool,
        ) {
            let compression = match (level, gpu) {
                (_, true) => Compression::Gpu,
                (Some(level), _) => Compression::Zstd { level },
                (None, _) => Compression::None,
            };
            let array = NewArray {
                shape: dims.iter().map(|dim| dim.0).collect(),
                dtype,
                chunk_shape: dims.iter().map(|dim| dim.1 * dim.2).collect(),
                format: if v3 { Format::V3 } else { Format::V2 },
                inner_shape: inner.then(|| dims.iter().map(|dim| dim.2).collect()),
                compression,
                checksum,
            };
            let refused = !is_storable(dtype) || !v3 && (inner || checksum && compression == Compression::None);
            prop_assert_eq!(array.check().is_err(), refused);
            if !refused {
                let json = array.metadata().unwrap();
                let parsed = if v3 { parse_v3(&json) } else { parse_v2(&json) };
                prop_assert_eq!(parsed.unwrap(), array.meta().unwrap());
            }
        }
    }
}
