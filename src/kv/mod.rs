//! Key to byte range: where a stored value lies.
//!
//! Orbax keeps arrays under keys such as `params.w/c/0/1`, either in an OCDBT database (a copy-on-write B+tree in a few
//! files) or as one file a key below the item directory. Both answer the same question: which bytes of which file hold
//! the value of this key? Nothing here reads a file: the [`ocdbt`] walk is a [`Machine`](crate::need::Machine).
//!
//! Must not know: what the keys mean, what the values hold.

pub mod ocdbt;

use bytes::Bytes;

use crate::relpath::RelPath;

/// Where the value of one key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// In the index itself.
    Inline(Bytes),
    /// In a file.
    Extent(Extent),
}

/// A byte range of one of an index's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Extent {
    /// Which file of the index.
    pub file: FileId,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// Position of a file in [`Index::files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// Every key of a database, in byte order, with the place of its value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    files: Vec<RelPath>,
    entries: Vec<(Bytes, Value)>,
}

impl Index {
    /// An index of these entries, sorted here; of equal keys the first one given stays.
    pub fn new(files: Vec<RelPath>, mut entries: Vec<(Bytes, Value)>) -> Self {
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        entries.dedup_by(|later, earlier| later.0 == earlier.0);
        Self { files, entries }
    }

    /// An index that is to be written: no two entries may have one key.
    ///
    /// # Errors
    /// A key that is there twice.
    pub fn of_new(files: Vec<RelPath>, mut entries: Vec<(Bytes, Value)>) -> Result<Self, Bytes> {
        // In place: there may be very many.
        entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        match entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(pair[0].0.clone()),
            None => Ok(Self { files, entries }),
        }
    }

    /// The files that extents refer to, relative to the checkpoint's root.
    pub fn files(&self) -> &[RelPath] {
        &self.files
    }

    /// The path of one file.
    pub fn file(&self, id: FileId) -> &RelPath {
        &self.files[id.0 as usize]
    }

    /// The CRC-32C of all keys and of what they stand for: the bytes, or where they are, below this directory.
    pub fn crc32c(&self, dir: &RelPath) -> u32 {
        let number = |crc: u32, number: u64| crc32c::crc32c_append(crc, &number.to_le_bytes());
        let bytes = |crc: u32, bytes: &[u8]| crc32c::crc32c_append(number(crc, bytes.len() as u64), bytes);
        self.entries.iter().fold(0, |crc, (key, value)| match value {
            Value::Inline(inline) => bytes(number(bytes(crc, key), 0), inline),
            Value::Extent(extent) => {
                let path = self.file(extent.file).as_bytes();
                let below = path.strip_prefix(dir.as_bytes()).unwrap_or(path);
                let below = below.strip_prefix(b"/").unwrap_or(below);
                [extent.offset, extent.len].into_iter().fold(bytes(number(bytes(crc, key), 1), below), number)
            }
        })
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<&Value> {
        self.entries.binary_search_by(|(have, _)| have.as_ref().cmp(key)).ok().map(|index| &self.entries[index].1)
    }

    /// All entries, in byte order of their keys.
    pub fn entries(&self) -> &[(Bytes, Value)] {
        &self.entries
    }

    /// The entries whose keys start with `prefix`, in order.
    pub fn with_prefix(&self, prefix: &[u8]) -> &[(Bytes, Value)] {
        let start = self.entries.partition_point(|(key, _)| key.as_ref() < prefix);
        let count = self.entries[start..].partition_point(|(key, _)| key.starts_with(prefix));
        &self.entries[start..start + count]
    }
}

impl Value {
    /// Length of the value in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Inline(bytes) => bytes.len() as u64,
            Self::Extent(extent) => extent.len,
        }
    }

    /// Whether the value has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
