//! The index of a zarr shard: where its inner chunks stand.
//!
//! Source: Zarr v3 specification, sharding codec 1.0. The inner chunks are numbered in C order of their grid. The index
//! has one entry an inner chunk, and a CRC-32C behind it if the metadata's index codecs say so:
//!
//! | bytes | field |
//! |---|---|
//! | 8 | offset of the inner chunk from the start of the shard's value |
//! | 8 | its encoded length in bytes; both are 2^64-1 for an inner chunk that is not stored |
//! | ... | the other entries |
//! | 4 | CRC-32C of the entries, u32 little-endian (optional) |

use std::ops::Range;

use super::{Endian, IndexLocation};
use crate::limits::INNER_CHUNKS_MAX;

/// The places of a shard's inner chunks.
///
/// Inner chunks may stand anywhere in the value, in any order, with gaps, and may share bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardIndex {
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    offset: u64,
    len: u64,
}

/// Why a shard's index cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// The value is too short to hold its index.
    #[error("shard of {value_len} bytes is shorter than its index of {index_len} bytes")]
    Short {
        /// Length of the shard's value in bytes.
        value_len: u64,
        /// Length of the index in bytes.
        index_len: u64,
    },
    /// The bytes given are not as many as the index has.
    #[error("shard index has {found} bytes, expected {expected}")]
    Length {
        /// Bytes of an index of this many inner chunks.
        expected: u64,
        /// Bytes given.
        found: u64,
    },
    /// More inner chunks than [`INNER_CHUNKS_MAX`].
    #[error("shard has {0} inner chunks, at most {INNER_CHUNKS_MAX} are read")]
    Count(u64),
    /// The checksum does not fit.
    #[error("crc32c of the shard index is {computed:#010x}, stored is {stored:#010x}")]
    Checksum {
        /// From behind the entries.
        stored: u32,
        /// Of the entries.
        computed: u32,
    },
    /// An inner chunk reaches beyond the value.
    #[error("inner chunk {inner} has {len} bytes at {offset}, beyond the shard of {value_len} bytes")]
    Bounds {
        /// Number of the inner chunk.
        inner: u64,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Length of the shard's value in bytes.
        value_len: u64,
    },
}

impl From<ShardError> for crate::Error {
    fn from(error: ShardError) -> Self {
        match error {
            ShardError::Count(_) => Self::unsupported(error.to_string()),
            _ => Self::corrupt(error.to_string()),
        }
    }
}

/// Length in bytes of the index of this many inner chunks, its checksum included.
///
/// # Errors
/// [`ShardError::Count`] beyond [`INNER_CHUNKS_MAX`].
pub fn index_len(inner_count: u64, crc32c: bool) -> Result<u64, ShardError> {
    if inner_count > INNER_CHUNKS_MAX {
        return Err(ShardError::Count(inner_count));
    }
    Ok(inner_count * ENTRY_BYTES + if crc32c { CHECKSUM_BYTES } else { 0 })
}

/// The bytes of a shard's value of `value_len` bytes that hold its index.
///
/// # Errors
/// [`ShardError::Count`], or [`ShardError::Short`] when the value cannot hold the index.
pub fn index_range(
    location: IndexLocation,
    value_len: u64,
    inner_count: u64,
    crc32c: bool,
) -> Result<Range<u64>, ShardError> {
    let index_len = index_len(inner_count, crc32c)?;
    let before = value_len.checked_sub(index_len).ok_or(ShardError::Short { value_len, index_len })?;
    Ok(match location {
        IndexLocation::Start => 0..index_len,
        IndexLocation::End => before..value_len,
    })
}

/// The bytes of an index of inner chunks with these offsets and lengths, `None` for one that is not stored: the inverse
/// of [`ShardIndex::parse`]. Where it stands and that the places lie inside the value is the caller's business.
///
/// # Errors
/// [`ShardError::Count`] beyond [`INNER_CHUNKS_MAX`].
pub fn encode_index(places: &[Option<(u64, u64)>], endian: Endian, crc32c: bool) -> Result<Vec<u8>, ShardError> {
    let len = index_len(places.len() as u64, crc32c)?;
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or_default());
    for place in places {
        let Entry { offset, len } = place.map_or(ABSENT, |(offset, len)| Entry { offset, len });
        for word in [offset, len] {
            bytes.extend_from_slice(&match endian {
                Endian::Little => word.to_le_bytes(),
                Endian::Big => word.to_be_bytes(),
            });
        }
    }
    if crc32c {
        let checksum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
    }
    Ok(bytes)
}

impl ShardIndex {
    /// Reads an index from exactly its bytes. Checks the checksum and that every entry lies inside the value.
    ///
    /// Takes 16 bytes an inner chunk.
    ///
    /// # Errors
    /// [`ShardError`]: another length than [`index_len`], a wrong checksum, an entry beyond `value_len`.
    pub fn parse(
        bytes: &[u8],
        inner_count: u64,
        endian: Endian,
        crc32c: bool,
        value_len: u64,
    ) -> Result<Self, ShardError> {
        let expected = index_len(inner_count, crc32c)?;
        let length = ShardError::Length { expected, found: bytes.len() as u64 };
        if bytes.len() as u64 != expected {
            return Err(length);
        }
        let body = if crc32c {
            let (body, stored) = bytes.split_last_chunk::<4>().ok_or(length)?;
            let (stored, computed) = (u32::from_le_bytes(*stored), crc32c::crc32c(body));
            if stored != computed {
                return Err(ShardError::Checksum { stored, computed });
            }
            body
        } else {
            bytes
        };
        let (words, _) = body.as_chunks::<8>();
        let word = |bytes: &[u8; 8]| match endian {
            Endian::Little => u64::from_le_bytes(*bytes),
            Endian::Big => u64::from_be_bytes(*bytes),
        };
        let mut entries = Vec::with_capacity(words.len() / 2);
        for (inner, pair) in words.as_chunks::<2>().0.iter().enumerate() {
            let entry = Entry { offset: word(&pair[0]), len: word(&pair[1]) };
            let inside = entry.offset.checked_add(entry.len).is_some_and(|end| end <= value_len);
            if entry != ABSENT && !inside {
                let Entry { offset, len } = entry;
                return Err(ShardError::Bounds { inner: inner as u64, offset, len, value_len });
            }
            entries.push(entry);
        }
        Ok(Self { entries })
    }

    /// Number of inner chunks, stored or not.
    pub fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Whether the shard has no inner chunks at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Offset and length in bytes of inner chunk `inner` within the shard's value, or `None` when it is not stored.
    pub fn entry(&self, inner: u64) -> Option<(u64, u64)> {
        let entry = *self.entries.get(usize::try_from(inner).ok()?)?;
        (entry != ABSENT).then_some((entry.offset, entry.len))
    }
}

/// What stands for an inner chunk that is not stored.
const ABSENT: Entry = Entry { offset: u64::MAX, len: u64::MAX };

const ENTRY_BYTES: u64 = 16;

const CHECKSUM_BYTES: u64 = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(entries: &[(u64, u64)], endian: Endian, crc: bool) -> Vec<u8> {
        let words = entries.iter().flat_map(|&(offset, len)| [offset, len]);
        let mut bytes: Vec<u8> = words
            .flat_map(|word| if endian == Endian::Little { word.to_le_bytes() } else { word.to_be_bytes() })
            .collect();
        if crc {
            bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        }
        bytes
    }

    const NONE: (u64, u64) = (u64::MAX, u64::MAX);

    #[test]
    fn entries_come_back_and_may_overlap() {
        for endian in [Endian::Little, Endian::Big] {
            for crc in [false, true] {
                let bytes = encode(&[(3, 7), NONE, (0, 10), (10, 0)], endian, crc);
                assert_eq!(index_len(4, crc).unwrap(), bytes.len() as u64);
                let index = ShardIndex::parse(&bytes, 4, endian, crc, 10).unwrap();
                let entries: Vec<_> = (0..5).map(|inner| index.entry(inner)).collect();
                assert_eq!(entries, [Some((3, 7)), None, Some((0, 10)), Some((10, 0)), None]);
            }
        }
    }

    #[test]
    fn the_index_stands_at_the_start_or_the_end() {
        assert_eq!(index_range(IndexLocation::Start, 100, 2, true), Ok(0..36));
        assert_eq!(index_range(IndexLocation::End, 100, 2, false), Ok(68..100));
        assert_eq!(
            index_range(IndexLocation::End, 35, 2, true),
            Err(ShardError::Short { value_len: 35, index_len: 36 })
        );
        assert_eq!(index_len(u64::MAX, true), Err(ShardError::Count(u64::MAX)));
    }

    #[test]
    fn a_wrong_checksum_is_named() {
        let mut bytes = encode(&[(0, 1)], Endian::Little, true);
        bytes[8] ^= 2;
        let error = ShardIndex::parse(&bytes, 1, Endian::Little, true, 10).unwrap_err();
        assert!(matches!(error, ShardError::Checksum { stored, computed } if stored != computed));
    }

    #[test]
    fn ranges_beyond_the_value_are_refused() {
        for (offset, len) in [(5, 6), (11, 0), (u64::MAX, 1), (u64::MAX, 0), (1, u64::MAX), (0, u64::MAX)] {
            let bytes = encode(&[(0, 10), (offset, len)], Endian::Little, false);
            let expected = ShardError::Bounds { inner: 1, offset, len, value_len: 10 };
            assert_eq!(ShardIndex::parse(&bytes, 2, Endian::Little, false, 10), Err(expected));
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_parsed(
            places in prop::collection::vec(prop::option::of((0_u64..1 << 40, 0_u64..1 << 40)), 0..20),
            big: bool,
            crc: bool,
        ) {
            let endian = if big { Endian::Big } else { Endian::Little };
            let bytes = encode_index(&places, endian, crc).unwrap();
            let index = ShardIndex::parse(&bytes, places.len() as u64, endian, crc, 1 << 41).unwrap();
            let found: Vec<_> = (0..index.len()).map(|inner| index.entry(inner)).collect();
            prop_assert_eq!(found, places);
        }

        #[test]
        fn any_bytes_are_an_index_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..80), count in 0u64..5, crc: bool, value_len: u64,
        ) {
            if let Ok(index) = ShardIndex::parse(&bytes, count, Endian::Little, crc, value_len) {
                prop_assert_eq!(index.len(), count);
                for (offset, len) in (0..count).filter_map(|inner| index.entry(inner)) {
                    prop_assert!(offset + len <= value_len);
                }
            }
        }
    }
}
