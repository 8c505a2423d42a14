//! Codec chains: how the value of a chunk becomes elements.

/// How the value stored under a chunk's key becomes the chunk's elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One chunk, encoded by one chain.
    Plain(Chunk),
    /// zarr v3 `sharding_indexed`: a shard.
    Sharded(Box<Sharded>),
}

/// A chunk that is a shard: inner chunks, and an index of their places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sharded {
    /// Order in which the outer chunk's dimensions are stored: stored dimension `i` is array dimension `order[i]`.
    pub order: Vec<usize>,
    /// Number of inner chunks along every stored dimension.
    pub counts: Vec<u64>,
    /// Extents of an inner chunk, in stored dimension order.
    pub inner_shape: Vec<u64>,
    /// How one inner chunk is stored; its own order permutes the stored dimensions once more.
    pub inner: Layout,
    /// Where the index stands in the value.
    pub index_location: IndexLocation,
    /// Byte order of the index.
    pub index_endian: Endian,
    /// Whether a CRC-32C follows the index.
    pub index_crc32c: bool,
}

/// One chunk's chain: elements in a stated order and byte order, then byte codecs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Stored dimension `i` is dimension `order[i]` of the chunk; the identity for C order, reversed for F order.
    pub order: Vec<usize>,
    /// Byte order of an element.
    pub endian: Endian,
    /// Applied in this order when encoding, in reverse when decoding. Empty: the value is the elements.
    pub codecs: Vec<ByteCodec>,
}

/// Bytes to bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum ByteCodec {
    /// One zstd frame.
    Zstd,
    /// A gzip member.
    Gzip,
    /// A zlib stream.
    Zlib,
    /// A bzip2 stream.
    Bz2,
    /// A blosc (version 1) container, which names its own inner codec.
    Blosc,
    /// The bytes, then their CRC-32C as u32 little-endian.
    Crc32c,
    /// Elements of fewer than eight bits, one after the other from the low bits of each byte; safetensors' form, not zarr's.
    Packed {
        /// 4 or 6.
        bits: u32,
    },
}

/// Byte order of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[allow(missing_docs)]
pub enum Endian {
    Little,
    Big,
}

/// Where the index of a shard stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[allow(missing_docs)]
pub enum IndexLocation {
    Start,
    End,
}

impl ByteCodec {
    /// The name that zarr metadata uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
            Self::Zlib => "zlib",
            Self::Bz2 => "bz2",
            Self::Blosc => "blosc",
            Self::Crc32c => "crc32c",
            Self::Packed { .. } => "packed",
        }
    }
}

impl Layout {
    /// The chain of the innermost chunks: what one unit is decoded by.
    pub fn innermost(&self) -> &Chunk {
        match self {
            Self::Plain(chunk) => chunk,
            Self::Sharded(sharded) => sharded.inner.innermost(),
        }
    }
}

impl Sharded {
    /// Number of inner chunks of one shard. Checked against the limits by the parser.
    pub fn inner_count(&self) -> u64 {
        self.counts.iter().product()
    }
}
