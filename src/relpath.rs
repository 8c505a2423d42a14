//! Relative paths that cannot leave the directory they are relative to.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::limits::PATH_BYTES_MAX;

/// A path of a file or directory inside a checkpoint. The empty path is the checkpoint's root.
///
/// The constructor proves that the path is relative and has no `..`, so that joining it to a directory stays inside
/// (symbolic links are the opener's business). Paths are raw bytes, as OCDBT stores them.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelPath(Arc<[u8]>);

/// Why a path in a file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// It starts with `/`.
    #[error("the absolute path `{0}` leaves the checkpoint")]
    Absolute(String),
    /// It has a `..` element.
    #[error("the path `{0}` leaves the checkpoint by `..`")]
    Parent(String),
    /// It contains a NUL byte.
    #[error("the path `{0}` contains a NUL byte")]
    Nul(String),
    /// It is longer than any file system takes.
    #[error("a path of {0} bytes is longer than {PATH_BYTES_MAX}")]
    Long(usize),
}

impl From<BadPath> for crate::Error {
    fn from(bad: BadPath) -> Self {
        Self::corrupt(bad.to_string()).hint("the checkpoint names a file outside its own directory; do not trust it")
    }
}

impl RelPath {
    /// Checks a path. Empty elements and `.` are dropped.
    ///
    /// # Errors
    /// A path that is absolute, has a `..` element or a NUL byte, or is too long.
    pub fn new(path: impl AsRef<[u8]>) -> Result<Self, BadPath> {
        let path = path.as_ref();
        let text = || String::from_utf8_lossy(path).into_owned();
        if path.len() > PATH_BYTES_MAX {
            return Err(BadPath::Long(path.len()));
        }
        if path.first() == Some(&b'/') {
            return Err(BadPath::Absolute(text()));
        }
        if path.contains(&0) {
            return Err(BadPath::Nul(text()));
        }
        let mut clean = Vec::with_capacity(path.len());
        for element in path.split(|&byte| byte == b'/') {
            match element {
                b"" | b"." => continue,
                b".." => return Err(BadPath::Parent(text())),
                element => {
                    if !clean.is_empty() {
                        clean.push(b'/');
                    }
                    clean.extend_from_slice(element);
                }
            }
        }
        Ok(Self(clean.into()))
    }

    /// The checkpoint's root.
    pub fn root() -> Self {
        Self(Arc::from([]))
    }

    /// The path of something below this directory; the same checks apply to `below`.
    ///
    /// # Errors
    /// See [`new`](Self::new).
    pub fn join(&self, below: impl AsRef<[u8]>) -> Result<Self, BadPath> {
        let below = Self::new(below)?;
        if self.0.is_empty() {
            return Ok(below);
        }
        if below.0.is_empty() {
            return Ok(self.clone());
        }
        let joined = [&*self.0, b"/", &*below.0].concat();
        if joined.len() > PATH_BYTES_MAX {
            return Err(BadPath::Long(joined.len()));
        }
        Ok(Self(joined.into()))
    }

    /// The path for the operating system; `.` for the root.
    pub fn as_path(&self) -> &Path {
        use std::os::unix::ffi::OsStrExt;
        let bytes = if self.0.is_empty() { b"." } else { &*self.0 };
        Path::new(std::ffi::OsStr::from_bytes(bytes))
    }

    /// The raw bytes; empty for the root.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { ".".into() } else { String::from_utf8_lossy(&self.0) }.as_ref())
    }
}

impl serde::Serialize for RelPath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_are_refused() {
        assert!(matches!(RelPath::new("/etc/passwd"), Err(BadPath::Absolute(_))));
        assert!(matches!(RelPath::new("a/../../b"), Err(BadPath::Parent(_))));
        assert!(matches!(RelPath::new("a\0b"), Err(BadPath::Nul(_))));
        assert!(matches!(RelPath::new(vec![b'a'; PATH_BYTES_MAX + 1]), Err(BadPath::Long(_))));
        assert_eq!(RelPath::new("a//./b/").unwrap().to_string(), "a/b");
        assert_eq!(RelPath::root().join("d/x").unwrap().to_string(), "d/x");
        assert!(RelPath::new("a").unwrap().join("/b").is_err());
    }
}
