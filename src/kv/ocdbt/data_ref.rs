//! References into data files: the table of files that a manifest or node refers to, and ranges of them.

use bytes::Bytes;

use super::codec::{Cursor, FrontCoded, put_front_coded, put_uleb};
use super::{OcdbtError, Result};
use crate::limits::OCDBT_NODE_ENTRIES_MAX;

/// The files that one manifest or node refers to; a file's id is its position.
///
/// | field                   | encoding | |
/// |-------------------------|----------|-|
/// | num_files n             | uleb     | each is referred to, so no more than entries; if 0, nothing follows |
/// | path_prefix_len\[1..n\] | uleb     | bytes of base ++ relative shared with the path before |
/// | path_suffix_len\[0..n\] | uleb     | length of the rest |
/// | base_len\[0..n\]        | uleb     | how much of the path is its base |
/// | suffix bytes            |          | of all paths, concatenated |
///
/// Below the database's directory, the path of a file is `transitive ++ base ++ relative`, a plain concatenation. The
/// transitive part is empty for the manifest. For a node it is `transitive ++ base` of the file that the node itself
/// was found in, so that a tree keeps its meaning when another database refers to it from a directory above.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DataFileTable(Vec<DataFile>);

/// One file of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DataFile {
    path: Bytes,
    base_len: usize,
}

/// A byte range of one file of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DataRef {
    /// Position in the table; proven to be within it.
    pub(super) file: usize,
    /// First byte.
    pub(super) offset: u64,
    /// Number of bytes.
    pub(super) len: u64,
}

impl DataFileTable {
    pub(super) fn decode(body: &mut Cursor<'_>) -> Result<Self> {
        let count = body.count("the number of data files", 0, OCDBT_NODE_ENTRIES_MAX)?;
        let mut paths = FrontCoded::decode_lens(body, "the length of a data file's path", count)?;
        let mut index = 0;
        let mut previous = 0;
        let base_lens = body.column(count, |body| {
            let base = body.len16("the length of a data file's base path")?;
            let len = paths.lens().get(index).copied().unwrap_or_default();
            let prefix = paths.prefix_lens().get(index).copied().unwrap_or_default();
            // A shared prefix may run into the relative part only if both bases are the same.
            if base > len || (base != previous && prefix > base.min(previous)) {
                return Err(OcdbtError::Base { index });
            }
            index += 1;
            previous = base;
            Ok(usize::from(base))
        })?;
        paths.decode_suffixes(body)?;

        let arena = Bytes::from(paths.expand(b"", 0)?);
        let mut start = 0;
        let files = paths.lens().iter().zip(base_lens).map(|(&len, base_len)| {
            let end = start + usize::from(len);
            let path = arena.slice(start..end);
            start = end;
            DataFile { path, base_len }
        });
        Ok(Self(files.collect()))
    }

    /// A table of these files, given as their whole path and the length of their base. Paths and bases have been read or
    /// checked before: each fits in 16 bits.
    pub(super) fn new(files: impl IntoIterator<Item = (Bytes, usize)>) -> Self {
        Self(files.into_iter().map(|(path, base_len)| DataFile { path, base_len }).collect())
    }

    /// The inverse of [`decode`](Self::decode).
    pub(super) fn encode(&self, body: &mut Vec<u8>) {
        put_uleb(body, self.0.len() as u64);
        if self.0.is_empty() {
            return;
        }
        let paths: Vec<&[u8]> = self.0.iter().map(DataFile::path).collect();
        // A shared prefix may run into the relative part only if both bases are the same.
        let limit = |index: usize| match self.0.get(index.saturating_sub(1)..=index) {
            Some([before, file]) if before.base_len != file.base_len => before.base_len.min(file.base_len),
            _ => usize::MAX,
        };
        put_front_coded(body, &paths, limit, self.0.iter().map(|file| file.base_len as u64));
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// A file by its id.
    pub(super) fn file(&self, id: usize) -> Result<&DataFile> {
        self.0.get(id).ok_or(OcdbtError::FileId { found: id as u64, count: self.0.len() })
    }
}

impl DataFile {
    /// `base ++ relative`; empty for a file that holds nothing.
    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// The part of the path that nodes in this file are relative to.
    pub(super) fn base(&self) -> &[u8] {
        self.path.get(..self.base_len).unwrap_or_default()
    }
}

impl DataRef {
    /// A range of one of `file_count` files. Like every file's size, its end fits in an `i64`.
    pub(super) fn new(file: u64, offset: u64, len: u64, file_count: usize) -> Result<Self> {
        let file = decode_file_id(file, file_count)?;
        match offset.checked_add(len) {
            Some(end) if end <= i64::MAX as u64 => Ok(Self { file, offset, len }),
            _ => Err(OcdbtError::Extent { offset, len }),
        }
    }
}

/// A file id that must be within a table.
pub(super) fn decode_file_id(id: u64, file_count: usize) -> Result<usize> {
    match usize::try_from(id) {
        Ok(index) if index < file_count => Ok(index),
        _ => Err(OcdbtError::FileId { found: id, count: file_count }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::hex;
    use super::*;

    fn decode(body: &str) -> Result<DataFileTable> {
        let body = hex(body);
        let mut body = Cursor::new(&body);
        let table = DataFileTable::decode(&mut body)?;
        body.finish()?;
        Ok(table)
    }

    #[test]
    fn paths_are_rebuilt_and_split() {
        // "p0/" ++ "d/a", "p0/" ++ "d/b" (sharing all but the last byte), "p1/" ++ "d/c" (sharing "p")
        let table = decode("03 05 01 06 01 05 03 03 03 70302f642f61 62 312f642f63").unwrap();
        let files: Vec<_> = (0..3).map(|id| table.file(id).unwrap()).map(|file| (file.base(), file.path())).collect();
        assert_eq!(files, [(&b"p0/"[..], &b"p0/d/a"[..]), (b"p0/", b"p0/d/b"), (b"p1/", b"p1/d/c")]);
        assert_eq!(table.file(3), Err(OcdbtError::FileId { found: 3, count: 3 }));
        assert_eq!(decode("00"), Ok(DataFileTable::default()));
    }

    proptest::proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            files in proptest::collection::vec((proptest::collection::vec(0_u8..3, 0..6), 0_usize..6), 0..6),
        ) {
            let files = files.into_iter().map(|(path, base_len)| (Bytes::from(path.clone()), base_len.min(path.len())));
            let table = DataFileTable::new(files);
            let mut bytes = Vec::new();
            table.encode(&mut bytes);
            let mut body = Cursor::new(&bytes);
            proptest::prop_assert_eq!(DataFileTable::decode(&mut body), Ok(table));
            proptest::prop_assert_eq!(body.finish(), Ok(()));
        }
    }

    #[test]
    fn a_file_may_have_no_name() {
        assert_eq!(decode("01 00 00").unwrap().file(0).unwrap().path(), b"");
    }

    #[test]
    fn contradicting_lengths_are_refused() {
        // The second path shares "p0/d/" but has another base.
        assert_eq!(decode("02 05 06 01 03 02 70302f642f61 62").unwrap_err(), OcdbtError::Base { index: 1 });
        // A base longer than its path.
        assert_eq!(decode("01 01 02 61").unwrap_err(), OcdbtError::Base { index: 0 });
        // A prefix longer than the path before.
        let error = decode("02 02 01 01 00 00 61 62").unwrap_err();
        assert_eq!(error, OcdbtError::Prefix { index: 1, prefix: 2, previous: 1 });
        // 65,535 + 1 bytes.
        assert!(matches!(decode("01 808004 00").unwrap_err(), OcdbtError::Range { found: 65_536, .. }));
        assert_eq!(decode("02 00 01 01 00 00 61").unwrap_err(), OcdbtError::Truncated);
    }
}
