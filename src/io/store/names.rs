//! The names that saves give to what is not in place: not yet, or not any more.
//!
//! ```text
//!   run7.orbax-checkpoint-tmp-touchdown-5f0c..    being written, or about to be removed
//!   .touchdown-old-run7-5f0c..                    moved aside, where names cannot be exchanged
//! ```
//!
//! Orbax ignores names with `.orbax-checkpoint-tmp` in them, and so do we.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// What the temporary name of a save has after the name of its target.
pub(super) const STAGING: &str = ".orbax-checkpoint-tmp-touchdown-";

/// What the name of a replaced directory starts with while it waits for its removal.
pub(super) const REPLACED: &str = ".touchdown-old-";

/// Longest part of the target's name in the names above; a name may have 255 bytes in all.
const NAME_PART_MAX: usize = 180;

/// Whether it is a temporary name that is given here, not by Orbax.
pub fn is_staging(name: &str) -> bool {
    name.contains(STAGING)
}

/// A free temporary name for what this is to become, or was.
///
/// # Errors
/// A system without random numbers.
pub(super) fn staging_name(part: &str) -> Result<String> {
    Ok(format!("{part}{STAGING}{}", random_name()?))
}

/// A free name for what is moved aside.
///
/// # Errors
/// A system without random numbers.
pub(super) fn replaced_name(part: &str) -> Result<String> {
    Ok(format!("{REPLACED}{part}-{}", random_name()?))
}

/// A free name beside this path for what is about to be removed: one that readers ignore and that is found as a leftover.
///
/// # Errors
/// A path without a name; a system without random numbers.
pub fn deleted_name(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(|error| Error::invalid("no path").caused_by(error))?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::invalid("the path has no name").at("path", path.display()));
    };
    Ok(parent.join(staging_name(&part_of(name))?))
}

/// The beginning of a name, short enough to be part of another.
pub(super) fn part_of(name: &OsStr) -> String {
    let name = name.to_string_lossy();
    let end = name.char_indices().map(|(at, char)| at + char.len_utf8()).take_while(|end| *end <= NAME_PART_MAX).last();
    name[..end.unwrap_or(0)].to_owned()
}

/// Sixteen random hexadecimal digits: a name that nobody else has.
///
/// # Errors
/// A system without random numbers.
pub fn random_name() -> Result<String> {
    Ok(random_bytes()?.iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// Sixteen random bytes.
///
/// # Errors
/// A system without random numbers.
pub fn random_bytes() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(|errno| {
        Error::new(ErrorKind::Io, "the system gives no random numbers").caused_by(io::Error::from(errno))
    })?;
    Ok(bytes)
}
