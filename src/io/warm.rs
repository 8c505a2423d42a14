//! Reads of what memory already has, without waiting for anything: by whoever needs the bytes, in the caches of its own core.
//!
//! `preadv2(RWF_NOWAIT)` copies from the page cache and refuses where that would have to wait for a disk. File systems in memory
//! (tmpfs, ramfs) do not know the flag and need none. A file that misses more often than it hits is not tried any more.
//!
//! Must not know: who reads what is refused here.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::io::{Errno, ReadWriteFlags};

/// What is known about a file in memory.
#[derive(Debug, Default)]
pub(super) struct Warmth {
    hits: AtomicU32,
    misses: AtomicU32,
    /// It lies in memory and nowhere else.
    in_memory: AtomicBool,
}

impl Warmth {
    /// Whether a try is worth it.
    pub(super) fn is_likely(&self) -> bool {
        self.misses.load(Ordering::Relaxed) <= self.hits.load(Ordering::Relaxed)
    }

    /// Fills a buffer from an offset on if memory has all of it. `false`: it does not, and what the buffer holds is not said.
    ///
    /// # Errors
    /// What the system says, `UnexpectedEof` if the file ends before.
    pub(super) fn read(&self, file: &File, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        let hit = self.try_read(file, buffer, offset)?;
        let count = if hit { &self.hits } else { &self.misses };
        count.fetch_add(1, Ordering::Relaxed);
        Ok(hit)
    }

    fn try_read(&self, file: &File, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        let mut done = 0;
        while done < buffer.len() {
            let (at, rest) = (offset + done as u64, &mut buffer[done..]);
            if self.in_memory.load(Ordering::Relaxed) {
                return file.read_exact_at(rest, at).map(|()| true);
            }
            match rustix::io::preadv2(file, &mut [IoSliceMut::new(rest)], at, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                // Not this way: an old kernel or a file system that does not know the flag.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) if is_in_memory(file) => {
                    self.in_memory.store(true, Ordering::Relaxed);
                }
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(true)
    }
}

fn is_in_memory(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|system| MEMORY.contains(&(system.f_type as u64 & 0xffff_ffff)))
}

/// `statfs` types of tmpfs and ramfs: `linux/magic.h`.
const MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of known bytes, below a directory.
    fn written(dir: &std::path::Path, bytes: &[u8]) -> File {
        std::fs::write(dir.join("f"), bytes).unwrap();
        File::open(dir.join("f")).unwrap()
    }

    #[test]
    fn what_was_just_written_is_there_and_what_lies_behind_the_end_is_not() {
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n * 7 / 8) as u8).collect();
        for dir in [tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap()] {
            let (file, warmth) = (written(dir.path(), &bytes), Warmth::default());
            let mut found = vec![0; 60_001];
            // A system may take pages away at any time, so a miss is no failure where there is a disk; wrong bytes are.
            let hit = warmth.read(&file, &mut found, 33_333).unwrap();
            assert!(hit || !is_in_memory(&file), "a file in memory is always there");
            assert!(!hit || (warmth.is_likely() && found == bytes[33_333..93_334]));
            match warmth.read(&file, &mut found, 50_000) {
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof),
                Ok(hit) => assert!(!hit, "more bytes than the file has"),
            }
        }
    }

    #[test]
    fn a_file_that_misses_more_often_than_it_hits_is_given_up() {
        let warmth = Warmth::default();
        assert!(warmth.is_likely(), "nothing is known yet");
        let file = File::open("/proc/self/status").unwrap();
        // No file of this file system can be read without waiting.
        assert!(!warmth.read(&file, &mut [0; 8], 0).unwrap());
        assert!(!warmth.is_likely());
    }
}
