//! Reads each file as it suits: past the page cache through io_uring, or with positioned reads on threads.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use io_uring::IoUring;

use super::events::{Event, Events};
use super::pread::Threads;
use super::reader::{Completion, ReadAt, Reader, ReaderWaker, Ticket};
use super::uring::{Handle, Mode};
use crate::error::Result;
use crate::limits::URING_DEPTH;

/// Threads, and a ring from the first file on that wants one.
#[derive(Debug)]
pub(super) struct EitherReader {
    threads: Threads,
    ring: Ring,
    build: fn(Mode) -> io::Result<IoUring>,
    send: Sender<Event>,
    events: Events,
}

#[derive(Debug)]
enum Ring {
    NotYet,
    Running(Handle),
    /// The system refuses it: everything is read with positioned reads.
    Refused,
}

impl EitherReader {
    /// A reader with so many threads.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub(super) fn new(threads: usize) -> Result<Self> {
        Self::with(threads, Mode::build)
    }

    /// As [`new`](Self::new), with rings from elsewhere.
    pub(super) fn with(threads: usize, build: fn(Mode) -> io::Result<IoUring>) -> Result<Self> {
        let (send, events) = Events::new();
        Ok(Self { threads: Threads::new(threads, &send)?, ring: Ring::NotYet, build, send, events })
    }

    fn ring(&mut self) -> Option<&mut Handle> {
        if let Ring::NotYet = self.ring {
            self.ring = match Handle::new(self.build, self.send.clone()) {
                Ok(ring) => Ring::Running(ring),
                Err(error) => {
                    tracing::info!(%error, "files are read through the page cache");
                    Ring::Refused
                }
            };
        }
        match &mut self.ring {
            Ring::Running(ring) => Some(ring),
            _ => None,
        }
    }
}

impl Reader for EitherReader {
    fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        if read.file.direct().is_some()
            && let Some(ring) = self.ring()
        {
            return ring.submit(ticket, read);
        }
        self.threads.submit(ticket, read);
    }

    fn next(&mut self, deadline: Option<Instant>) -> Option<Completion> {
        self.events.next(deadline)
    }

    fn depth(&self) -> usize {
        match self.ring {
            Ring::Running(_) => URING_DEPTH,
            _ => self.threads.depth(),
        }
    }

    fn waker(&self) -> Arc<dyn ReaderWaker> {
        self.events.waker()
    }

    fn leaves_warm_reads(&self) -> bool {
        true
    }

    fn name(&self) -> &'static str {
        "auto"
    }

    fn reads_directly(&self) -> bool {
        !matches!(self.ring, Ring::Refused)
    }
}
