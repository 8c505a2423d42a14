//! Reads through io_uring: one thread owns a ring and keeps a bounded number of reads in flight.
//!
//! ```text
//!  submit ──channel──► ring thread ──requests──► kernel ──results──► ring thread ──events──► next
//!     └────eventfd───────► (a poll in the ring wakes it)
//! ```
//!
//! The thread is the ring's only issuer, so that kernels which can (6.1) run completion work when the thread asks for it
//! and not in interrupts. Files that prefer it ([`OpenFile::direct`](super::OpenFile::direct)) are read past the page cache, in
//! whole blocks; of others a page-cache hit is copied by the one thread, inside the submitting system call. Files and buffers
//! are made known to the kernel when they are first met (`registered.rs`).
//!
//! Must not know: when io_uring is the better choice (`choose.rs`), which files are cached (`cached.rs`).

mod registered;
mod thread;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use io_uring::{IoUring, Probe, opcode};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use self::thread::RingThread;
use super::events::{Event, Events};
use super::reader::{Completion, ReadAt, Reader, ReaderWaker, Ticket};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::URING_DEPTH;

/// A thread with a ring.
#[derive(Debug)]
pub struct UringReader {
    ring: Handle,
    events: Events,
}

/// The thread; it tells its events to whoever made it.
#[derive(Debug)]
pub(super) struct Handle {
    submit: Option<Sender<(Ticket, ReadAt)>>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl UringReader {
    /// A reader with a ring for [`URING_DEPTH`] reads.
    ///
    /// # Errors
    /// The system has no io_uring, does not allow it here, or lacks memory, files or threads for it.
    pub fn new() -> Result<Self> {
        Self::with(Mode::build)
    }

    /// As [`new`](Self::new), with a ring from elsewhere.
    pub(super) fn with(build: fn(Mode) -> io::Result<IoUring>) -> Result<Self> {
        let (send, events) = Events::new();
        Ok(Self { ring: Handle::new(build, send)?, events })
    }
}

impl Handle {
    /// Starts a thread with a ring.
    ///
    /// # Errors
    /// As [`UringReader::new`].
    pub(super) fn new(build: fn(Mode) -> io::Result<IoUring>, events: Sender<Event>) -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = Arc::new(eventfd(0, flags).map_err(|errno| unavailable(errno.into()))?);
        let (submit, work) = channel();
        let (say, said) = sync_channel(1);
        let rung = Arc::clone(&bell);
        // A single-issuer ring belongs to the thread that makes it.
        let serve = move || match set_up(build) {
            Ok(ring) => {
                // Its maker waits for this word.
                let _ = say.send(Ok(()));
                RingThread::new(ring, rung, work, events).run();
            }
            Err(error) => drop(say.send(Err(error))),
        };
        let thread = std::thread::Builder::new()
            .name("touchdown-uring".to_owned())
            .spawn(serve)
            .map_err(|error| Error::new(ErrorKind::Io, "the system starts no more threads").caused_by(error))?;
        let handle = Self { submit: Some(submit), bell, thread: Some(thread) };
        said.recv().unwrap_or_else(|_| Err(Error::bug("the thread of a ring panicked")))?;
        Ok(handle)
    }

    /// As [`Reader::submit`].
    pub(super) fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        if let Some(submit) = &self.submit {
            // The thread lives as long as this, so the send succeeds.
            let _ = submit.send((ticket, read));
            self.ring_bell();
        }
    }

    fn ring_bell(&self) {
        // Fails only when the counter is full, and then the bell is ringing.
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.bell, bytemuck::bytes_of(&1u64)));
    }
}

impl Reader for UringReader {
    fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        self.ring.submit(ticket, read);
    }

    fn next(&mut self, deadline: Option<Instant>) -> Option<Completion> {
        self.events.next(deadline)
    }

    fn depth(&self) -> usize {
        URING_DEPTH
    }

    fn waker(&self) -> Arc<dyn ReaderWaker> {
        self.events.waker()
    }

    fn name(&self) -> &'static str {
        "uring"
    }

    fn reads_directly(&self) -> bool {
        true
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.submit = None;
        self.ring_bell();
        if let Some(thread) = self.thread.take() {
            // It ends when all reads that were submitted are done. If it panicked, their buffers were given up.
            let _ = thread.join();
        }
    }
}

/// How completion work reaches the ring's thread, best first; older kernels refuse the first ones with `EINVAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// When the thread waits for it (Linux 6.1).
    Deferred,
    /// At the thread's next system call (Linux 5.19).
    Cooperative,
    /// By interrupting the thread.
    Plain,
}

impl Mode {
    const ALL: [Self; 3] = [Self::Deferred, Self::Cooperative, Self::Plain];

    pub(super) fn build(self) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        match self {
            Self::Deferred => builder.setup_single_issuer().setup_defer_taskrun(),
            Self::Cooperative => builder.setup_coop_taskrun(),
            Self::Plain => &mut builder,
        };
        builder.build(ENTRIES)
    }
}

/// The best ring that the kernel makes, if it can read.
fn set_up(build: fn(Mode) -> io::Result<IoUring>) -> Result<IoUring> {
    let mut refused = io::Error::from_raw_os_error(Errno::INVAL.raw_os_error());
    for mode in Mode::ALL {
        match build(mode) {
            Ok(ring) => {
                let mut probe = Probe::new();
                let asked = ring.submitter().register_probe(&mut probe);
                if asked.is_err() || !probe.is_supported(opcode::Read::CODE) {
                    return Err(unavailable(Errno::NOSYS.into()).found("a kernel whose io_uring has no plain reads"));
                }
                tracing::debug!(?mode, entries = ENTRIES, "io_uring is set up");
                return Ok(ring);
            }
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => refused = error,
            Err(error) => return Err(unavailable(error)),
        }
    }
    Err(unavailable(refused))
}

/// io_uring cannot be used here.
fn unavailable(error: io::Error) -> Error {
    let why = match Errno::from_io_error(&error) {
        Some(Errno::NOSYS) => "the kernel (or the sandbox in its place) has none, or it is older than 5.6",
        Some(Errno::PERM | Errno::ACCESS) => "the container's seccomp rules or `kernel.io_uring_disabled` forbid it",
        Some(Errno::NOMEM) => "memory for the ring is short; older kernels count it as locked memory (`ulimit -l`)",
        Some(Errno::MFILE | Errno::NFILE) => "too many files are open (`ulimit -n`)",
        _ => "the kernel refuses it",
    };
    Error::new(ErrorKind::Io, "io_uring cannot be set up on this machine")
        .expected(format_args!("a ring of {ENTRIES} entries"))
        .found(&error)
        .hint(format_args!("{why}; positioned reads work everywhere: `--io pread`"))
        .caused_by(error)
}

/// Entries of the submission queue: one request of every flight, and the poll.
#[allow(clippy::cast_possible_truncation, reason = "the depth is a small constant")]
const ENTRIES: u32 = (URING_DEPTH as u32 + 1).next_power_of_two();
