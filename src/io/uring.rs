//! Reads through io_uring: one thread owns a ring and keeps a bounded number of reads in flight.
//!
//! ```text
//!  submit ──channel──► ring thread ──requests──► kernel ──results──► ring thread ──events──► next
//!     └────eventfd───────► (a poll in the ring wakes it)
//! ```
//!
//! The thread is the ring's only issuer, so that kernels which can (6.1) run completion work when the thread asks for it
//! and not in interrupts. Buffered reads of plain buffers and files for now: a page-cache hit is copied by the one
//! thread, inside the submitting system call.
//!
//! Must not know: when io_uring is the better choice (`choose.rs`).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::events::{Event, Events};
use super::reader::{Completion, ReadAt, Reader, ReaderWaker, Ticket, too_long};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{URING_AGAIN_MAX, URING_DEPTH, URING_REQUEST_BYTES_MAX};

/// A thread with a ring.
#[derive(Debug)]
pub struct UringReader {
    submit: Option<Sender<(Ticket, ReadAt)>>,
    events: Events,
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
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = Arc::new(eventfd(0, flags).map_err(|errno| unavailable(errno.into()))?);
        let (submit, work) = channel();
        let (events, waiting) = Events::new();
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
        let reader = Self { submit: Some(submit), events: waiting, bell, thread: Some(thread) };
        said.recv().unwrap_or_else(|_| Err(Error::bug("the thread of a ring panicked")))?;
        Ok(reader)
    }

    fn ring_bell(&self) {
        // Fails only when the counter is full, and then the bell is ringing.
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.bell, bytemuck::bytes_of(&1u64)));
    }
}

impl Reader for UringReader {
    fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        if let Some(submit) = &self.submit {
            // The thread lives as long as the reader, so the send succeeds.
            let _ = submit.send((ticket, read));
            self.ring_bell();
        }
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
}

impl Drop for UringReader {
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

/// What the ring's thread owns.
struct RingThread {
    ring: IoUring,
    bell: Arc<OwnedFd>,
    work: Receiver<(Ticket, ReadAt)>,
    events: Sender<Event>,
    /// Reads in flight; the position is the request's name in the ring.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Whether the ring has a poll of the bell.
    listening: bool,
    /// Whether more reads may be submitted.
    open: bool,
}

/// A read in flight: the kernel may write into its buffer.
struct Flight {
    ticket: Ticket,
    read: ReadAt,
    /// Bytes that have arrived.
    done: usize,
    again: u32,
    start: Instant,
}

impl RingThread {
    fn new(ring: IoUring, bell: Arc<OwnedFd>, work: Receiver<(Ticket, ReadAt)>, events: Sender<Event>) -> Self {
        let flights = (0..URING_DEPTH).map(|_| None).collect();
        Self { ring, bell, work, events, flights, free: (0..URING_DEPTH).collect(), listening: false, open: true }
    }

    fn run(mut self) {
        let mut results = Vec::with_capacity(ENTRIES as usize);
        loop {
            self.take_work();
            if !self.open && self.free.len() == self.flights.len() {
                return;
            }
            self.listen();
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR) => {}
                    // Out of memory for requests, or of room for results: what completes makes some.
                    Some(Errno::AGAIN | Errno::BUSY) => std::thread::sleep(PAUSE),
                    errno => return self.fail(errno.unwrap_or(Errno::IO)),
                },
            }
            results.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
            results.drain(..).for_each(|(name, result)| self.completed(name, result));
        }
    }

    /// Starts what has been submitted, as far as there is room.
    fn take_work(&mut self) {
        while let (true, Some(&free)) = (self.open, self.free.last()) {
            match self.work.try_recv() {
                Ok((ticket, read)) => {
                    let flight = Flight { ticket, read, done: 0, again: 0, start: Instant::now() };
                    if flight.read.len == 0 {
                        self.finish(flight, Ok(()));
                    } else if flight.read.len > flight.read.buffer.len() {
                        self.finish(flight, Err(too_long()));
                    } else {
                        self.free.pop();
                        self.flights[free] = Some(flight);
                        self.request(free);
                    }
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.open = false,
            }
        }
    }

    /// Has the ring poll the bell, so that waiting for completions ends when a read is submitted. The poll looks at once,
    /// so a bell that rang before is heard.
    fn listen(&mut self) {
        if self.listening || !self.open {
            return;
        }
        let poll = opcode::PollAdd::new(types::Fd(self.bell.as_raw_fd()), POLLIN).build().user_data(BELL);
        // SAFETY: a poll touches no memory of ours, and the descriptor is open as long as the ring.
        #[allow(unsafe_code)]
        let pushed = unsafe { self.ring.submission().push(&poll) };
        self.listening = pushed.is_ok();
    }

    /// Asks the kernel for the rest of a read.
    fn request(&mut self, name: usize) {
        let Some(flight) = self.flights.get_mut(name).and_then(Option::as_mut) else { return };
        let read = &mut flight.read;
        // Beyond `i64` there are no positions; all bits set would even mean the file's own.
        let offset = read.offset.checked_add(flight.done as u64).filter(|offset| i64::try_from(*offset).is_ok());
        let (Some(offset), Some(rest)) = (offset, read.buffer.get_mut(flight.done..read.len)) else {
            return self.end(name, Err(Errno::INVAL.into()));
        };
        let len = u32::try_from(rest.len().min(URING_REQUEST_BYTES_MAX)).unwrap_or(u32::MAX);
        // Once refused for lack of resources, a read is left to a kernel thread that may wait.
        let flags = if flight.again > 0 { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let request = opcode::Read::new(types::Fd(read.file.file().as_raw_fd()), rest.as_mut_ptr(), len)
            .offset(offset)
            .build()
            .flags(flags)
            .user_data(name as u64);
        // SAFETY: 1. `len` is at most the length of `rest`, which is memory of the flight's slot: heap or mapped memory
        // that does not move when the slot does. 2. The flight stays in `flights` until the kernel has reported this
        // request, and nothing looks at its buffer meanwhile; should this thread end early, `drop` gives the memory up
        // instead of freeing it. 3. The flight holds the file open. 4. A name has one request at a time.
        #[allow(unsafe_code)]
        let pushed = unsafe { self.ring.submission().push(&request) };
        if pushed.is_err() {
            // Not reached: there are more entries than flights.
            self.end(name, Err(Errno::BUSY.into()));
        }
    }

    /// Takes in one result of the kernel.
    fn completed(&mut self, name: u64, result: i32) {
        if name == BELL {
            self.listening = false;
            // Silences the bell; an error means that it was silent.
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
            return;
        }
        // Names are positions.
        let name = usize::try_from(name).unwrap_or(usize::MAX);
        let Some(flight) = self.flights.get_mut(name).and_then(Option::as_mut) else { return };
        match usize::try_from(result) {
            Ok(0) => self.end(name, Err(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => {
                flight.done += count;
                flight.again = 0;
                if flight.done < flight.read.len { self.request(name) } else { self.end(name, Ok(())) }
            }
            Err(_) => {
                let errno = Errno::from_raw_os_error(result.saturating_neg());
                match errno {
                    Errno::INTR => self.request(name),
                    Errno::AGAIN if flight.again < URING_AGAIN_MAX => {
                        flight.again += 1;
                        self.request(name);
                    }
                    _ => self.end(name, Err(errno.into())),
                }
            }
        }
    }

    /// Gives a read back that the kernel is done with.
    fn end(&mut self, name: usize, result: io::Result<()>) {
        if let Some(flight) = self.flights.get_mut(name).and_then(Option::take) {
            self.free.push(name);
            self.finish(flight, result);
        }
    }

    fn finish(&self, flight: Flight, result: io::Result<()>) {
        let Flight { ticket, read, start, .. } = flight;
        // Nobody listens any more when the reader is being dropped.
        let _ = self.events.send(Event::Done(Completion { ticket, read, result, busy: start.elapsed() }));
    }

    /// The kernel does not serve the ring any more: whatever is in flight or comes later fails.
    fn fail(mut self, errno: Errno) {
        tracing::error!(%errno, "the kernel does not serve the ring any more");
        for name in 0..self.flights.len() {
            if let Some(flight) = &mut self.flights[name] {
                flight.read.buffer.abandon();
                self.end(name, Err(errno.into()));
            }
        }
        while let Ok((ticket, read)) = self.work.recv() {
            self.finish(Flight { ticket, read, done: 0, again: 0, start: Instant::now() }, Err(errno.into()));
        }
    }
}

impl Drop for RingThread {
    fn drop(&mut self) {
        // None unless this thread panicked. Closing a ring does not wait for its reads.
        self.flights.iter_mut().flatten().for_each(|flight| flight.read.buffer.abandon());
    }
}

/// Entries of the submission queue: one request of every flight, and the poll.
#[allow(clippy::cast_possible_truncation, reason = "the depth is a small constant")]
const ENTRIES: u32 = (URING_DEPTH as u32 + 1).next_power_of_two();

/// The name of the poll.
const BELL: u64 = u64::MAX;

/// `POLLIN`, in the width that the ring takes.
const POLLIN: u32 = rustix::event::PollFlags::IN.bits() as u32;

/// How long to wait when the kernel lacks resources.
const PAUSE: Duration = Duration::from_millis(1);
