//! Checksums of the files that describe a checkpoint and its items (strings and JSON values are data too, and neither JSON nor
//! msgpack has a checksum of its own) and, in a checkpoint that was sealed, of every value.
//!
//! ```text
//!   _touchdown_sums.json    {"_METADATA":"5b1c02d4","_strings.json":"00c3a1f7",      CRC-32C, hexadecimal
//!                            "d/77ac":[[0,4096,"9a0b1c2d"],[4096,20,"1f00aa31"]],    the same of offset and length
//!                            "*keys":"77d0f3aa"}         of all keys of the database, and of what they stand for
//! ```
//!
//! There is one in the directory of each item and one in the checkpoint's own. Orbax ignores files that it does not know. A
//! checkpoint without them is whole without them.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{checkpoint, tree};
use crate::error::{Error, Result};
use crate::relpath::RelPath;

/// The file, in the directory of what it speaks of.
pub const SUMS_FILE: &str = "_touchdown_sums.json";

/// Every file whose checksum is kept.
pub const SUMMED_FILES: [&str; 8] = [
    tree::METADATA_FILE,
    tree::SHARDING_FILE,
    tree::STRINGS_FILE,
    tree::FIRST_ARRAY_METADATA_FILE,
    tree::JSON_FILES[0],
    tree::JSON_FILES[1],
    tree::JSON_FILES[2],
    checkpoint::METADATA_FILE,
];

/// What stands for the keys of a database, which is no file's name.
const KEYS: &str = "*keys";

/// Arrays' metadata, where every value is a file. They have checksums, too.
const DOCUMENTS: [&str; 2] = ["zarr.json", ".zarray"];

/// Checksums by the names of the files, relative to the directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    files: BTreeMap<String, u32>,
    values: BTreeMap<String, Vec<ValueSum>>,
    /// Of everything that the item's database says.
    keys: Option<u32>,
}

/// What a file's name stands for.
#[derive(Deserialize)]
#[serde(untagged)]
enum Member {
    File(String),
    Values(Vec<(u64, u64, String)>),
}

impl Sums {
    /// Takes note of a file.
    pub fn add(&mut self, name: &str, contents: &[u8]) {
        self.files.insert(name.to_owned(), crc32c::crc32c(contents));
    }

    /// Takes note of a value: of a range of a file. The same range twice is one.
    pub fn add_value(&mut self, name: &str, sum: ValueSum) {
        let sums = self.values.entry(name.to_owned()).or_default();
        let place = |sum: &ValueSum| (sum.offset, sum.len);
        if let Err(at) = sums.binary_search_by_key(&place(&sum), place) {
            sums.insert(at, sum);
        }
    }

    /// Takes note of all keys of the item's database, and of what they stand for: as [`Index::crc32c`](crate::kv::Index::crc32c).
    pub fn add_keys(&mut self, crc: u32) {
        self.keys = Some(crc);
    }

    /// Whether it speaks of nothing.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.values.is_empty() && self.keys.is_none()
    }

    /// The file's contents.
    pub fn to_bytes(&self) -> Vec<u8> {
        let hex = |crc: u32| serde_json::Value::String(format!("{crc:08x}"));
        let keys = self.keys.iter().map(|crc| (KEYS.to_owned(), hex(*crc)));
        let files = self.files.iter().map(|(name, crc)| (name.clone(), hex(*crc))).chain(keys);
        let value = |sum: &ValueSum| serde_json::json!([sum.offset, sum.len, hex(sum.crc)]);
        let values = self.values.iter().map(|(name, sums)| (name.clone(), sums.iter().map(value).collect()));
        serde_json::Value::Object(files.chain(values).collect()).to_string().into_bytes()
    }

    /// Reads the file. Names of whole files must be among the known ones: another is a damaged one.
    ///
    /// # Errors
    /// What is no map of known names to checksums, or of names to ranges that ascend.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let damaged = || Error::corrupt("the file of checksums makes no sense");
        let crc = |text: &str| u32::from_str_radix(text, 16).ok().filter(|_| text.len() == 8).ok_or_else(damaged);
        let members: BTreeMap<String, Member> =
            serde_json::from_slice(bytes).map_err(|error| damaged().caused_by(error))?;
        let mut sums = Self::default();
        for (name, member) in members {
            match member {
                Member::File(text) if SUMMED_FILES.contains(&name.as_str()) || is_document(&name) => {
                    sums.files.insert(name, crc(&text)?);
                }
                Member::File(text) if name == KEYS => sums.keys = Some(crc(&text)?),
                Member::File(_) => return Err(damaged()),
                Member::Values(ranges) => {
                    let value = |(offset, len, text): &(u64, u64, String)| {
                        Ok(ValueSum { offset: *offset, len: *len, crc: crc(text)? })
                    };
                    let values = ranges.iter().map(value).collect::<Result<Vec<_>>>()?;
                    let ascend = values.is_sorted_by(|a, b| (a.offset, a.len) < (b.offset, b.len));
                    if values.is_empty() || !ascend || values.iter().any(|sum| sum.end().is_none()) {
                        return Err(damaged());
                    }
                    sums.values.insert(name, values);
                }
            }
        }
        Ok(sums)
    }

    /// The checksums of whole files alone.
    #[must_use]
    pub fn without_values(self) -> Self {
        Self { files: self.files, ..Self::default() }
    }

    /// The checksums of the values of the item in this directory; `None` if it was never sealed.
    ///
    /// # Errors
    /// A name that leaves the directory.
    pub fn values(&self, dir: &RelPath) -> Result<Option<ValueSums>> {
        let files = self.values.iter().map(|(name, sums)| Ok((dir.join(name)?, sums.clone())));
        let files = files.collect::<Result<BTreeMap<_, _>>>()?;
        Ok((!files.is_empty() || self.keys.is_some()).then_some(ValueSums { files, keys: self.keys }))
    }

    /// Those of arrays' metadata alone.
    pub fn documents(&self) -> Self {
        let files = self.files.iter().filter(|(name, _)| is_document(name));
        Self { files: files.map(|(name, crc)| (name.clone(), *crc)).collect(), ..Self::default() }
    }

    /// The names of the files that have checksums.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Checks a file.
    ///
    /// # Errors
    /// Other contents than were saved.
    pub fn check(&self, name: &str, contents: &[u8]) -> Result<()> {
        let found = crc32c::crc32c(contents);
        match self.files.get(name) {
            Some(&stored) if stored != found => Err(differs("a file is not as it was saved", stored, found)),
            _ => Ok(()),
        }
    }

    /// Checks that a file that is not there was not there either.
    ///
    /// # Errors
    /// It was.
    pub fn check_absent(&self, name: &str) -> Result<()> {
        match self.files.contains_key(name) {
            false => Ok(()),
            true => Err(Error::not_found("a file is missing that was there when the checkpoint was saved or sealed")
                .hint(format!("if it was removed on purpose, remove `{SUMS_FILE}` beside it, too"))),
        }
    }
}

fn is_document(name: &str) -> bool {
    name.rsplit('/').next().is_some_and(|last| DOCUMENTS.contains(&last))
}

/// Checks files of a directory by its file of checksums, if there is one, and gives what else that says.
///
/// # Errors
/// A file that is not as it was saved, or not there any more; a damaged file of checksums.
pub fn check<'a>(
    dir: &RelPath,
    sums: Option<&Bytes>,
    files: impl IntoIterator<Item = (&'a str, Option<&'a Bytes>)>,
) -> Result<Sums> {
    let Some(sums) = sums else { return Ok(Sums::default()) };
    let at = |error: Error, name: &str| error.at("file", dir.join(name).unwrap_or_else(|_| dir.clone()));
    let sums = Sums::parse(sums).map_err(|error| at(error, SUMS_FILE))?;
    for (name, file) in files {
        let result = file.map_or_else(|| sums.check_absent(name), |file| sums.check(name, file));
        result.map_err(|error| at(error, name))?;
    }
    Ok(sums)
}

/// The checksum of a range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ValueSum {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Their CRC-32C.
    pub crc: u32,
}

impl ValueSum {
    fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }

    /// Compares it with the checksum of what was read.
    ///
    /// # Errors
    /// Another one.
    pub fn check(&self, found: u32) -> Result<()> {
        match self.crc == found {
            true => Ok(()),
            false => Err(differs("a value is not as it was sealed", self.crc, found)),
        }
    }
}

/// Checksums of values by files and ranges, files relative to the checkpoint's root.
///
/// What was sealed was sealed whole: a value that is not here is as wrong as one that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueSums {
    files: BTreeMap<RelPath, Vec<ValueSum>>,
    keys: Option<u32>,
}

impl ValueSums {
    /// The checksum of exactly this range.
    ///
    /// # Errors
    /// None was sealed.
    pub fn of(&self, file: &RelPath, offset: u64, len: u64) -> Result<ValueSum> {
        let sums = self.files.get(file).map_or(&[][..], Vec::as_slice);
        let found = sums.binary_search_by_key(&(offset, len), |sum| (sum.offset, sum.len)).ok();
        found.map(|at| sums[at]).ok_or_else(|| unsealed(file, offset))
    }

    /// The checksum of the only range within this one.
    ///
    /// # Errors
    /// None was sealed, or several.
    pub fn within(&self, file: &RelPath, offset: u64, len: u64) -> Result<ValueSum> {
        let sums = self.files.get(file).map_or(&[][..], Vec::as_slice);
        let end = offset.saturating_add(len);
        let first = sums.partition_point(|sum| sum.offset < offset);
        let started = sums[first..].iter().take_while(|sum| sum.offset < end);
        let mut inside = started.filter(|sum| sum.end().is_some_and(|last| last <= end));
        match (inside.next(), inside.next()) {
            (Some(sum), None) => Ok(*sum),
            _ => Err(unsealed(file, offset)),
        }
    }

    /// Compares what the item's database says with what was sealed; what an earlier release has sealed says nothing of it.
    ///
    /// # Errors
    /// Another database.
    pub fn check_keys(&self, found: u32) -> Result<()> {
        match self.keys {
            Some(stored) if stored != found => Err(differs("the database is not as it was sealed", stored, found)),
            _ => Ok(()),
        }
    }

    /// Checks a file that is one value.
    ///
    /// # Errors
    /// Other contents than were sealed, or a file that was not there.
    pub fn check_file(&self, file: &RelPath, contents: &[u8]) -> Result<()> {
        let sum = self.of(file, 0, contents.len() as u64)?;
        sum.check(crc32c::crc32c(contents)).map_err(|error| error.at("file", file))
    }

    /// The sealed files of a directory and those below it, relative to it.
    pub fn below<'a>(&'a self, dir: &'a RelPath) -> impl Iterator<Item = &'a [u8]> {
        let files = self.files.range(dir.clone()..).map(|(file, _)| file.as_bytes());
        let inside = files.take_while(move |file| file.starts_with(dir.as_bytes()));
        inside.filter_map(move |file| match dir.as_bytes() {
            [] => Some(file),
            dir => file.strip_prefix(dir)?.strip_prefix(b"/"),
        })
    }

    /// Whether anything of a file was sealed.
    pub fn has(&self, file: &RelPath) -> bool {
        self.files.contains_key(file)
    }
}

fn differs(what: &str, stored: u32, found: u32) -> Error {
    Error::corrupt(what)
        .expected(format_args!("crc32c {stored:08x}"))
        .found(format_args!("{found:08x}"))
        .hint(format!("if it was changed on purpose, remove `{SUMS_FILE}` beside it"))
}

fn unsealed(file: &RelPath, offset: u64) -> Error {
    Error::corrupt("a value is none of those that were sealed")
        .at("offset", offset)
        .at("file", file)
        .hint(format!("if the checkpoint was changed on purpose, remove `{SUMS_FILE}` and seal it again"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found() {
        let (name, contents) = ("_strings.json", br#"{"name":"text"}"#);
        let mut sums = Sums::default();
        sums.add(name, contents);
        let mut file = sums.to_bytes();
        let check = |file: &[u8], contents: &[u8]| Sums::parse(file)?.check(name, contents);
        check(&file, contents).unwrap();
        for bit in 0..contents.len() * 8 {
            let mut bad = contents.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&file, &bad).is_err());
        }
        for bit in 0..file.len() * 8 {
            file[bit / 8] ^= 1 << (bit % 8);
            let digit = file[bit / 8].is_ascii_hexdigit() && bit % 8 == 5;
            assert!(digit || check(&file, contents).is_err(), "bit {bit}: {}", String::from_utf8_lossy(&file));
            file[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
