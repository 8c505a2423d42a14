//! Which reader an engine reads with.

use super::pread::PreadReader;
use super::reader::Reader;
use crate::error::Result;

/// How files are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// What suits each file: io_uring past the page cache for large files on local disks of which little is cached, else
    /// positioned reads, which share between threads what a ring's one thread would copy by itself. Where there is no
    /// io_uring, positioned reads only.
    #[default]
    Auto,
    /// io_uring for all files, past the page cache where that suits; or an error where it cannot be set up: of kind
    /// [`Io`](crate::ErrorKind::Io) where the system refuses, [`Invalid`](crate::ErrorKind::Invalid) in a build without the
    /// feature `uring`.
    Uring,
    /// Positioned reads on threads: works on every kernel.
    Pread,
}

/// A reader of this kind; positioned reads on so many threads.
///
/// # Errors
/// io_uring is asked for and cannot be set up, or the system starts no more threads.
pub fn reader(io: Io, threads: usize) -> Result<Box<dyn Reader>> {
    let reader: Box<dyn Reader> = match io {
        Io::Uring => uring()?,
        #[cfg(feature = "uring")]
        Io::Auto => Box::new(super::either::EitherReader::new(threads)?),
        #[cfg(not(feature = "uring"))]
        Io::Auto => Box::new(PreadReader::new(threads)?),
        Io::Pread => Box::new(PreadReader::new(threads)?),
    };
    tracing::debug!(asked = ?io, reader = reader.name(), depth = reader.depth(), "reads");
    Ok(reader)
}

/// Sets io_uring up and takes it down again.
///
/// # Errors
/// Why it cannot be used here.
pub fn uring_setup() -> Result<()> {
    uring().map(drop)
}

#[cfg(feature = "uring")]
fn uring() -> Result<Box<dyn Reader>> {
    Ok(Box::new(super::uring::UringReader::new()?))
}

#[cfg(not(feature = "uring"))]
fn uring() -> Result<Box<dyn Reader>> {
    Err(crate::error::Error::invalid("this build has no io_uring reader")
        .hint("build with the feature `uring`, or read with positioned reads: `--io pread`"))
}
