//! Whether a file is better read past the page cache.
//!
//! A cached file is read five to fifteen times as fast from the cache as from its disk, and a cold one costs a half to a fifth of
//! the processor's time when its pages need not pass through the cache. So the kernel is asked, file by file: what of it is
//! cached (`cachestat`, Linux 6.5; a handful of reads that must not wait where that is missing), what its file system is
//! (network file systems read ahead better than we do), and which alignment direct reads need (`statx`, Linux 6.1).
//!
//! Must not know: who reads, and how.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::direct::{alignment, is_local, reopened};
use super::fs::Direct;
use crate::limits::DIRECT_FILE_BYTES_MIN;

/// The file again, for direct reads; `None` where the page cache serves it better.
pub(super) fn direct(file: &File, size: u64) -> Option<Direct> {
    if size < DIRECT_FILE_BYTES_MIN || !is_local(file) || cached_bytes(file, size)? * CACHED_SHARE > size {
        return None;
    }
    open_direct(file)
}

/// The file again, for direct reads; `None` where the file system has none.
pub(super) fn open_direct(file: &File) -> Option<Direct> {
    let align = alignment(file)?;
    Some(Direct::new(reopened(file, OFlags::RDONLY)?, align))
}

/// About how many bytes of a file the page cache holds; `None` if the kernel does not tell.
pub fn cached_bytes(file: &File, size: u64) -> Option<u64> {
    cachestat(file).or_else(|| probed(file, size))
}

/// Asks `cachestat(2)` about the whole file.
#[allow(unsafe_code)]
fn cachestat(file: &File) -> Option<u64> {
    /// `struct cachestat_range`: all of the file if the length is 0.
    #[repr(C)]
    struct Range {
        offset: u64,
        len: u64,
    }
    let range = Range { offset: 0, len: 0 };
    // `struct cachestat`: pages that are cached, dirty, being written, evicted, recently evicted.
    let mut pages = [0u64; 5];
    // SAFETY: the kernel reads a `cachestat_range` and writes a `cachestat`, five numbers of 64 bits; both live here.
    let done = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, pages.as_mut_ptr(), 0) };
    (done == 0).then(|| pages[0].saturating_mul(rustix::param::page_size() as u64))
}

/// Reads a byte here and there without waiting. This may make the kernel read ahead, so the places are few.
fn probed(file: &File, size: u64) -> Option<u64> {
    let mut cached = 0;
    for place in 0..PROBES {
        let offset = size / PROBES * place;
        let mut byte = [0; 1];
        match rustix::io::preadv2(file, &mut [std::io::IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT) {
            Ok(_) => cached += 1,
            Err(Errno::AGAIN) => {}
            Err(_) => return None,
        }
    }
    Some(size / PROBES * cached)
}

/// The number of `cachestat` on every architecture but Alpha.
const CACHESTAT: libc::c_long = 451;

/// A file of which one part in so many is cached is read through the cache.
const CACHED_SHARE: u64 = 4;

/// Where a file is probed that the kernel tells nothing about.
const PROBES: u64 = 16;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_written_is_cached_until_it_is_dropped() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("f");
        let size = 8 << 20;
        let mut file = File::create(&path).unwrap();
        file.write_all(&vec![1; size as usize]).unwrap();
        file.sync_all().unwrap();
        let file = File::open(&path).unwrap();
        let Some(cached) = cached_bytes(&file, size) else {
            let _ = writeln!(std::io::stderr(), "skipped: this kernel does not tell what is cached");
            return;
        };
        assert!(cached > size / 2, "{cached}");
        assert!(direct(&file, size).is_none(), "a cached file is read from the cache");
        assert!(direct(&file, 100).is_none(), "so is a small one");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let left = cached_bytes(&file, size).unwrap();
        match direct(&file, size) {
            Some(direct) => assert!(left < size / 2 && direct.align().is_power_of_two()),
            None => {
                let why = "this file system is not local, has no direct reads, or keeps its pages";
                let _ = writeln!(std::io::stderr(), "skipped: {why} ({left} bytes cached)");
            }
        }
    }
}
