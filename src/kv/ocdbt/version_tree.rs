//! Versions: the roots of a database's B+tree, one for each commit.

use super::codec::{Cursor, put_uleb, put_ulebs};
use super::data_ref::{DataRef, decode_file_id};
use super::{OcdbtError, Result};

/// One version of a database.
///
/// n versions are stored as columns:
///
/// | column                   | encoding | |
/// |--------------------------|----------|-|
/// | num_versions n           | uleb     | 1..=2^arity_log2 in a manifest |
/// | generation               | uleb     | ascending from 1 |
/// | root_height              | u8       | |
/// | root: file id            | uleb     | |
/// | root: offset             | uleb     | 2^64-1, as the length, if the version has no keys |
/// | root: length             | uleb     | |
/// | num_keys                 | uleb     | statistic, not read |
/// | num_tree_bytes           | uleb     | statistic, not read |
/// | num_indirect_value_bytes | uleb     | statistic, not read |
/// | commit_time              | u64le    | nanoseconds since 1970, not read |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    /// Counts the commits, from 1.
    pub(super) generation: u64,
    /// Height of the root node; 0 if it is a leaf.
    pub(super) root_height: u8,
    /// The root node; none if the version has no keys.
    pub(super) root: Option<DataRef>,
}

/// What references to a node say of the tree below it, in this order. No reader needs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Statistics {
    /// Number of keys.
    pub(super) key_count: u64,
    /// Bytes of the nodes as they are stored, the one referred to included.
    pub(super) tree_bytes: u64,
    /// Bytes of the values out of line.
    pub(super) indirect_bytes: u64,
}

impl Statistics {
    /// Of two trees together, or `None` beyond 64 bits.
    pub(super) fn plus(self, other: Self) -> Option<Self> {
        Some(Self {
            key_count: self.key_count.checked_add(other.key_count)?,
            tree_bytes: self.tree_bytes.checked_add(other.tree_bytes)?,
            indirect_bytes: self.indirect_bytes.checked_add(other.indirect_bytes)?,
        })
    }

    /// In the order of the columns.
    pub(super) const fn columns(self) -> [u64; STATISTICS] {
        [self.key_count, self.tree_bytes, self.indirect_bytes]
    }
}

/// Writes one version as columns; `commit_time` is in nanoseconds since 1970.
pub(super) fn encode_version(body: &mut Vec<u8>, version: &Version, statistics: Statistics, commit_time: u64) {
    // Even a version without keys names a file, the first one.
    let (file, offset, len) = version.root.map_or((0, u64::MAX, u64::MAX), |root| (root.file, root.offset, root.len));
    put_ulebs(body, [1, version.generation]);
    body.push(version.root_height);
    put_uleb(body, file as u64);
    put_ulebs(body, [offset, len]);
    put_ulebs(body, statistics.columns());
    body.extend_from_slice(&commit_time.to_le_bytes());
}

/// The latest of the versions that a manifest holds; the earlier ones are checked and dropped.
pub(super) fn decode_versions(body: &mut Cursor<'_>, arity_log2: u8, file_count: usize) -> Result<Version> {
    let count = body.count("the number of versions", 1, 1 << arity_log2)?;
    let generations = body.column(count, Cursor::uleb)?;
    let heights = body.column(count, Cursor::u8)?;
    let files = body.column(count, Cursor::uleb)?;
    let offsets = body.column(count, Cursor::uleb)?;
    let lens = body.column(count, Cursor::uleb)?;
    skip_columns(body, count, STATISTICS)?;
    body.bytes(count as u64 * COMMIT_TIME_BYTES)?;

    let (mut latest, mut previous) = (None, 0);
    let places = files.into_iter().zip(offsets).zip(lens);
    for ((&generation, root_height), ((file, offset), len)) in generations.iter().zip(heights).zip(places) {
        if generation <= previous {
            return Err(OcdbtError::Generation { previous, found: generation });
        }
        previous = generation;
        let root = if (offset, len) == (u64::MAX, u64::MAX) {
            // Even a version without keys names a file of the table, one with an empty path.
            decode_file_id(file, file_count)?;
            if root_height != 0 {
                return Err(OcdbtError::Height { expected: 0, found: root_height });
            }
            None
        } else {
            Some(DataRef::new(file, offset, len, file_count)?)
        };
        latest = Some(Version { generation, root_height, root });
    }
    let (Some(&first), Some(latest)) = (generations.first(), latest) else {
        return Err(OcdbtError::Truncated);
    };
    if (first - 1) >> arity_log2 != (latest.generation - 1) >> arity_log2 {
        return Err(OcdbtError::GenerationBlock { first, last: latest.generation, arity_log2 });
    }
    Ok(latest)
}

/// Passes over the references to version tree nodes, which hold older versions.
///
/// | column                    | encoding | |
/// |---------------------------|----------|-|
/// | num_version_nodes n       | uleb     | |
/// | generation                | uleb     | the latest one below |
/// | file id, offset, length   | uleb     | three columns |
/// | num_generations           | uleb     | |
/// | commit_time               | u64le    | the earliest one below |
/// | height                    | u8       | |
pub(super) fn skip_version_nodes(body: &mut Cursor<'_>, file_count: usize) -> Result<()> {
    let count = body.count("the number of version nodes", 0, u64::MAX)?;
    skip_columns(body, count, 1)?;
    for _ in 0..count {
        decode_file_id(body.uleb()?, file_count)?;
    }
    skip_columns(body, count, 3)?;
    body.bytes(count as u64 * (COMMIT_TIME_BYTES + 1))?;
    Ok(())
}

/// Passes over columns of integers.
pub(super) fn skip_columns(body: &mut Cursor<'_>, count: usize, columns: usize) -> Result<()> {
    for _ in 0..count * columns {
        body.uleb()?;
    }
    Ok(())
}

/// Columns of statistics of a subtree: its keys, its encoded bytes, the bytes of its values out of line.
pub(super) const STATISTICS: usize = 3;

const COMMIT_TIME_BYTES: u64 = 8;

#[cfg(test)]
mod tests {
    use super::super::testing::hex;
    use super::*;

    fn decode(body: &str) -> Result<Version> {
        let body = hex(body);
        let mut body = Cursor::new(&body);
        let version = decode_versions(&mut body, 4, 1)?;
        body.finish()?;
        Ok(version)
    }

    /// Two versions with these generations, heights, file ids, offsets and lengths.
    fn two(columns: &str) -> Result<Version> {
        decode(&format!("02 {columns} 0000 0000 0000 {}", "00".repeat(16)))
    }

    const MISSING: &str = "ffffffffffffffffff01";

    #[test]
    fn the_last_version_is_the_current_one() {
        let root = Some(DataRef { file: 0, offset: 8, len: 20 });
        assert_eq!(two("0102 0001 0000 0708 1e14"), Ok(Version { generation: 2, root_height: 1, root }));
        let empty = two(&format!("0102 0000 0000 07{MISSING} 1e{MISSING}"));
        assert_eq!(empty, Ok(Version { generation: 2, root_height: 0, root: None }));
    }

    #[test]
    fn generations_must_ascend_within_their_block() {
        assert_eq!(two("0202 0001 0000 0708 1e14"), Err(OcdbtError::Generation { previous: 2, found: 2 }));
        assert_eq!(two("0201 0001 0000 0708 1e14"), Err(OcdbtError::Generation { previous: 2, found: 1 }));
        assert!(two("1120 0001 0000 0708 1e14").is_ok());
        let error = OcdbtError::GenerationBlock { first: 16, last: 17, arity_log2: 4 };
        assert_eq!(two("1011 0001 0000 0708 1e14"), Err(error));
    }

    #[test]
    fn a_version_without_keys_has_height_0_and_a_file() {
        assert_eq!(
            two(&format!("0102 0001 0000 07{MISSING} 1e{MISSING}")),
            Err(OcdbtError::Height { expected: 0, found: 1 }),
        );
        assert_eq!(
            two(&format!("0102 0000 0001 07{MISSING} 1e{MISSING}")),
            Err(OcdbtError::FileId { found: 1, count: 1 }),
        );
    }
}
