//! A reader with one fault.

#![allow(unreachable_pub, reason = "a module of test binaries")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use touchdown::io::{Completion, PreadReader, ReadAt, Reader, ReaderWaker, Ticket};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ReadFault {
    /// The read fails with this number.
    Errno(i32),
    /// The file ends in the middle of it.
    Short,
    /// The file is cut before the read is done.
    Shrinks,
    /// The file is gone before the read is done; it is open.
    Vanishes,
    /// Everything arrives, the last read first.
    Reordered,
}

impl ReadFault {
    pub const ALL: [Self; 6] =
        [Self::Errno(5), Self::Errno(4), Self::Short, Self::Shrinks, Self::Vanishes, Self::Reordered];
}

/// Reads with one fault, at the read of a number.
pub struct Faulty {
    inner: PreadReader,
    fault: ReadFault,
    at: u64,
    seen: Arc<AtomicU64>,
    root: PathBuf,
    failed: Option<Completion>,
    held: Vec<Completion>,
    in_flight: usize,
}

impl Faulty {
    /// A fault at a read of files below a directory, and how many reads there were.
    pub fn new(fault: ReadFault, at: u64, root: &Path) -> (Self, Arc<AtomicU64>) {
        let (inner, seen) = (PreadReader::new(1).unwrap(), Arc::new(AtomicU64::new(0)));
        let root = root.to_owned();
        let reader =
            Self { inner, fault, at, seen: Arc::clone(&seen), root, failed: None, held: Vec::new(), in_flight: 0 };
        (reader, seen)
    }
}

impl Reader for Faulty {
    fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        let here = self.seen.fetch_add(1, Ordering::SeqCst) == self.at;
        let path = self.root.join(read.file.path().as_path());
        self.in_flight += 1;
        match self.fault {
            ReadFault::Errno(_) | ReadFault::Short if here => {
                let error = match self.fault {
                    ReadFault::Errno(number) => io::Error::from_raw_os_error(number),
                    _ => io::ErrorKind::UnexpectedEof.into(),
                };
                self.failed = Some(Completion { ticket, read, result: Err(error), busy: Default::default() });
                return;
            }
            ReadFault::Shrinks if here => {
                fs::File::options().write(true).open(path).unwrap().set_len(read.offset + read.len as u64 / 2).unwrap();
            }
            ReadFault::Vanishes if here => fs::remove_file(path).unwrap(),
            _ => {}
        }
        self.inner.submit(ticket, read);
    }

    fn next(&mut self, deadline: Option<Instant>) -> Option<Completion> {
        if let Some(failed) = self.failed.take() {
            self.in_flight -= 1;
            return Some(failed);
        }
        if self.fault != ReadFault::Reordered {
            let done = self.inner.next(deadline)?;
            self.in_flight -= 1;
            return Some(done);
        }
        // Whatever is in flight is waited for, and the last of it is given first.
        while self.held.len() < self.in_flight {
            self.held.push(self.inner.next(deadline)?);
        }
        let last = self.held.pop();
        self.in_flight -= usize::from(last.is_some());
        match last {
            None => self.inner.next(deadline),
            last => last,
        }
    }

    fn depth(&self) -> usize {
        8
    }

    fn waker(&self) -> Arc<dyn ReaderWaker> {
        self.inner.waker()
    }

    fn name(&self) -> &'static str {
        "faulty"
    }
}
