//! Checksums of the files that describe a checkpoint and its items: strings and JSON values are data too, and neither JSON nor
//! msgpack has a checksum of its own.
//!
//! ```text
//!   _touchdown_sums.json    {"_METADATA":"5b1c02d4","_strings.json":"00c3a1f7"}      CRC-32C, hexadecimal
//! ```
//!
//! There is one in the directory of each item and one in the checkpoint's own. Orbax ignores files that it does not know. A
//! checkpoint without them is whole without them.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{checkpoint, tree};
use crate::error::{Error, Result};
use crate::relpath::RelPath;

/// The file, in the directory of what it speaks of.
pub const SUMS_FILE: &str = "_touchdown_sums.json";

/// Every file whose checksum is kept.
const SUMMED_FILES: [&str; 8] = [
    tree::METADATA_FILE,
    tree::SHARDING_FILE,
    tree::STRINGS_FILE,
    tree::FIRST_ARRAY_METADATA_FILE,
    tree::JSON_FILES[0],
    tree::JSON_FILES[1],
    tree::JSON_FILES[2],
    checkpoint::METADATA_FILE,
];

/// Checksums by the names of the files, relative to the directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums(BTreeMap<String, u32>);

impl Sums {
    /// Takes note of a file.
    pub fn add(&mut self, name: &str, contents: &[u8]) {
        self.0.insert(name.to_owned(), crc32c::crc32c(contents));
    }

    /// The file's contents.
    pub fn to_bytes(&self) -> Vec<u8> {
        let members = self.0.iter().map(|(name, sum)| (name.clone(), serde_json::Value::String(format!("{sum:08x}"))));
        serde_json::Value::Object(members.collect()).to_string().into_bytes()
    }

    /// Reads the file. Names must be among the known ones: another is a damaged one.
    ///
    /// # Errors
    /// What is no map of known names to checksums.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let damaged = || Error::corrupt("the file of checksums makes no sense");
        let members: BTreeMap<String, String> =
            serde_json::from_slice(bytes).map_err(|error| damaged().caused_by(error))?;
        let mut sums = BTreeMap::new();
        for (name, text) in members {
            let known = text.len() == 8 && SUMMED_FILES.contains(&name.as_str());
            let sum = u32::from_str_radix(&text, 16).ok().filter(|_| known);
            sums.insert(name, sum.ok_or_else(damaged)?);
        }
        Ok(Self(sums))
    }

    /// Checks a file.
    ///
    /// # Errors
    /// Other contents than were saved.
    pub fn check(&self, name: &str, contents: &[u8]) -> Result<()> {
        let found = crc32c::crc32c(contents);
        match self.0.get(name) {
            Some(&stored) if stored != found => Err(Error::corrupt("a file is not as it was saved")
                .expected(format_args!("crc32c {stored:08x}"))
                .found(format_args!("{found:08x}"))
                .hint(format!("if it was changed on purpose, remove `{SUMS_FILE}` beside it"))),
            _ => Ok(()),
        }
    }
}

/// Checks files of a directory by its file of checksums, if there is one.
///
/// # Errors
/// A file that is not as it was saved, or a damaged file of checksums.
pub fn check<'a>(
    dir: &RelPath,
    sums: Option<&Bytes>,
    files: impl IntoIterator<Item = (&'a str, Option<&'a Bytes>)>,
) -> Result<()> {
    let Some(sums) = sums else { return Ok(()) };
    let at = |error: Error, name: &str| error.at("file", dir.join(name).unwrap_or_else(|_| dir.clone()));
    let sums = Sums::parse(sums).map_err(|error| at(error, SUMS_FILE))?;
    files.into_iter().try_for_each(|(name, file)| match file {
        Some(file) => sums.check(name, file).map_err(|error| at(error, name)),
        None => Ok(()),
    })
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
