//! A file that values are written to, through the page cache or past it.
//!
//! A synced save waits for the disk in any case. What of it lies at pages, in memory and in the file, then goes straight there,
//! which spares the processors the copying. The rest of the last page, small values and nodes go through the cache; no page is
//! written both ways, because values that are large start at pages.

use std::io;
use std::sync::{Arc, OnceLock};

use crate::io::StoreFile;
use crate::limits::ALIGN_BYTES;

/// A file that values are written to.
#[derive(Debug)]
pub(in crate::tree) struct ValueFile {
    cached: Box<dyn StoreFile>,
    /// The same past the cache, opened by the first write that is worth it; `None` if it is not to be had, or not wanted.
    direct: OnceLock<Option<Box<dyn StoreFile>>>,
}

impl ValueFile {
    /// A file, and whether large writes may go past the cache.
    pub(in crate::tree) fn new(file: Box<dyn StoreFile>, direct: bool) -> Arc<Self> {
        let cell = OnceLock::new();
        if !direct {
            // It is empty until now.
            let _ = cell.set(None);
        }
        Arc::new(Self { cached: file, direct: cell })
    }

    /// Whether a write of these bytes waits for the disk instead of taking a processor.
    pub(super) fn waits(&self, bytes: &[u8], offset: u64) -> bool {
        let fits = bytes.len() >= DIRECT_BYTES_MIN && at_page(bytes.as_ptr() as u64) && at_page(offset);
        fits && self.direct.get_or_init(|| self.cached.direct()).is_some()
    }

    /// Writes a piece of a value, in two parts.
    pub(super) fn write(&self, (body, tail): (&[u8], &[u8]), offset: u64) -> io::Result<()> {
        let mut written = 0;
        if self.waits(body, offset)
            && let Some(Some(direct)) = self.direct.get()
        {
            let pages = body.len() - body.len() % PAGE_BYTES;
            match direct.write_at(&body[..pages], offset) {
                Ok(()) => written = pages,
                // Some file systems have it and then refuse it.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                Err(error) => return Err(error),
            }
        }
        for (bytes, at) in [(&body[written..], written), (tail, body.len())] {
            if !bytes.is_empty() {
                self.cached.write_at(bytes, offset + at as u64)?;
            }
        }
        Ok(())
    }

    /// Writes all bytes at this offset, through the cache.
    pub(in crate::tree) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.cached.write_at(bytes, offset)
    }

    /// Makes the contents durable.
    pub(in crate::tree) fn sync(&self) -> io::Result<()> {
        self.cached.sync()
    }
}

/// Leaves room in an empty buffer for so many bytes that start at a page of memory; where they start.
pub(super) fn page_start(buffer: &mut Vec<u8>, room: usize) -> usize {
    if room < DIRECT_BYTES_MIN || buffer.try_reserve(room.saturating_add(PAGE_BYTES)).is_err() {
        // Whoever writes to it says that there is no memory.
        return 0;
    }
    let start = buffer.as_ptr().align_offset(PAGE_BYTES);
    buffer.resize(start, 0);
    start
}

const fn at_page(number: u64) -> bool {
    number.is_multiple_of(ALIGN_BYTES)
}

/// What direct writes start at and are made of, in bytes, in memory and in the file.
#[allow(clippy::cast_possible_truncation, reason = "a small number")]
const PAGE_BYTES: usize = ALIGN_BYTES as usize;

/// Smaller writes go through the cache, in bytes: each direct one waits for the disk once.
const DIRECT_BYTES_MIN: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Tells how it was written to.
    #[derive(Debug)]
    struct Told {
        writes: Arc<Mutex<Vec<(bool, u64, usize)>>>,
        direct: bool,
        refuses: Option<io::ErrorKind>,
    }

    impl StoreFile for Told {
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            if let (true, Some(kind)) = (self.direct, self.refuses) {
                return Err(kind.into());
            }
            self.writes.lock().unwrap().push((self.direct, offset, bytes.len()));
            Ok(())
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
        fn direct(&self) -> Option<Box<dyn StoreFile>> {
            Some(Box::new(Self { writes: Arc::clone(&self.writes), direct: true, ..*self }))
        }
    }

    fn written(direct: bool, refuses: Option<io::ErrorKind>, offset: u64) -> io::Result<Vec<(bool, u64, usize)>> {
        let writes = Arc::default();
        let file = ValueFile::new(Box::new(Told { writes: Arc::clone(&writes), direct: false, refuses }), direct);
        let mut buffer = Vec::new();
        let start = page_start(&mut buffer, 300_000);
        buffer.resize(start + 300_000, 1);
        file.write((&buffer[start..], &[1, 2, 3]), offset)?;
        let written = writes.lock().unwrap().clone();
        Ok(written)
    }

    #[test]
    fn whole_pages_go_past_the_cache_and_the_rest_through_it() {
        let pages = 300_000 / 4096 * 4096;
        let apart = [(true, 8192, pages), (false, 8192 + pages as u64, 300_000 - pages), (false, 8192 + 300_000, 3)];
        assert_eq!(written(true, None, 8192).unwrap(), apart);
        let together = |at| [(false, at, 300_000), (false, at + 300_000, 3)];
        assert_eq!(written(true, None, 8193).unwrap(), together(8193), "not at a page");
        assert_eq!(written(false, None, 8192).unwrap(), together(8192), "not wanted");
        assert_eq!(written(true, Some(io::ErrorKind::InvalidInput), 8192).unwrap(), together(8192), "refused");
        assert!(written(true, Some(io::ErrorKind::StorageFull), 8192).is_err());
    }
}
