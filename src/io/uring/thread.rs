//! The ring's thread: requests to the kernel, and what becomes of them.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;

use super::ENTRIES;
use super::registered::Registered;
use crate::io::events::Event;
use crate::io::reader::{Completion, ReadAt, Ticket, too_long};
use crate::limits::{URING_AGAIN_MAX, URING_DEPTH, URING_REQUEST_BYTES_MAX};

/// What the ring's thread owns.
pub(super) struct RingThread {
    ring: IoUring,
    registered: Registered,
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
    /// Set as long as it goes past the page cache.
    blocks: Option<Blocks>,
    /// Bytes that have arrived.
    done: usize,
    again: u32,
    start: Instant,
}

/// The whole blocks that a direct read takes.
struct Blocks {
    offset: u64,
    len: usize,
    /// Bytes before the first one that is wanted.
    lead: usize,
}

impl Flight {
    fn new(ticket: Ticket, read: ReadAt) -> Self {
        let blocks = Blocks::around(&read);
        Self { ticket, read, blocks, done: 0, again: 0, start: Instant::now() }
    }

    /// Bytes that must arrive.
    fn needed(&self) -> usize {
        self.read.len + self.blocks.as_ref().map_or(0, |blocks| blocks.lead)
    }
}

impl Blocks {
    /// `None` where the read goes through the page cache: the file does not want it otherwise, or the buffer has no room.
    fn around(read: &ReadAt) -> Option<Self> {
        let align = read.file.direct()?.align();
        let offset = read.offset - read.offset % align;
        let end = read.offset.checked_add(read.len as u64)?.checked_next_multiple_of(align)?;
        let (len, lead) = (usize::try_from(end - offset).ok()?, usize::try_from(read.offset - offset).ok()?);
        let fits = len <= read.buffer.len() && (read.buffer.as_ptr() as usize as u64).is_multiple_of(align);
        fits.then_some(Self { offset, len, lead })
    }
}

impl RingThread {
    pub(super) fn new(
        ring: IoUring,
        bell: Arc<OwnedFd>,
        work: Receiver<(Ticket, ReadAt)>,
        events: Sender<Event>,
    ) -> Self {
        let flights = (0..URING_DEPTH).map(|_| None).collect();
        let registered = Registered::new(&ring);
        Self {
            ring,
            registered,
            bell,
            work,
            events,
            flights,
            free: (0..URING_DEPTH).collect(),
            listening: false,
            open: true,
        }
    }

    pub(super) fn run(mut self) {
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
                    let flight = Flight::new(ticket, read);
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
        let (first, end) = match &flight.blocks {
            Some(blocks) => (blocks.offset, blocks.len),
            None => (flight.read.offset, flight.read.len),
        };
        let slot = &mut flight.read.buffer;
        let buffer = self.registered.buffer(&self.ring, slot);
        // Beyond `i64` there are no positions; all bits set would even mean the file's own.
        let offset = first.checked_add(flight.done as u64).filter(|offset| i64::try_from(*offset).is_ok());
        let (Some(offset), Some(rest)) = (offset, slot.get_mut(flight.done..end)) else {
            return self.end(name, Err(Errno::INVAL.into()));
        };
        let len = u32::try_from(rest.len().min(URING_REQUEST_BYTES_MAX)).unwrap_or(u32::MAX);
        let to = rest.as_mut_ptr();
        let direct = flight.read.file.direct().filter(|_| flight.blocks.is_some());
        let fixed = direct.and_then(|direct| self.registered.file(&self.ring, direct));
        let file = types::Fd(direct.map_or(flight.read.file.file(), |direct| direct.file()).as_raw_fd());
        let request = match (fixed, buffer) {
            (Some(file), Some(buffer)) => opcode::ReadFixed::new(file, to, len, buffer).offset(offset).build(),
            (Some(file), None) => opcode::Read::new(file, to, len).offset(offset).build(),
            (None, Some(buffer)) => opcode::ReadFixed::new(file, to, len, buffer).offset(offset).build(),
            (None, None) => opcode::Read::new(file, to, len).offset(offset).build(),
        };
        // Once refused for lack of resources, a read is left to a kernel thread that may wait.
        let flags = if flight.again > 0 { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let request = request.flags(flags).user_data(name as u64);
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
            Ok(count) => {
                flight.done += count;
                flight.again = 0;
                if flight.done >= flight.needed() {
                    flight.read.start = flight.blocks.as_ref().map_or(0, |blocks| blocks.lead);
                    self.end(name, Ok(()));
                } else if flight.blocks.is_some() {
                    // The file has become shorter, or its system reads less than it was asked for.
                    self.through_the_cache(name);
                } else if count == 0 {
                    self.end(name, Err(io::ErrorKind::UnexpectedEof.into()));
                } else {
                    self.request(name);
                }
            }
            Err(_) => {
                let errno = Errno::from_raw_os_error(result.saturating_neg());
                match errno {
                    Errno::INTR => self.request(name),
                    Errno::AGAIN if flight.again < URING_AGAIN_MAX => {
                        flight.again += 1;
                        self.request(name);
                    }
                    // It promised more than it keeps.
                    Errno::INVAL | Errno::OPNOTSUPP if flight.blocks.is_some() => {
                        if let Some(direct) = flight.read.file.direct() {
                            tracing::debug!(file = %flight.read.file.path(), %errno, "direct reads are refused");
                            direct.refuse();
                        }
                        self.through_the_cache(name);
                    }
                    _ => self.end(name, Err(errno.into())),
                }
            }
        }
    }

    /// Begins a direct read again, as an ordinary one.
    fn through_the_cache(&mut self, name: usize) {
        if let Some(flight) = self.flights.get_mut(name).and_then(Option::as_mut) {
            (flight.blocks, flight.done, flight.again) = (None, 0, 0);
            self.request(name);
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
            self.finish(Flight::new(ticket, read), Err(errno.into()));
        }
    }
}

impl Drop for RingThread {
    fn drop(&mut self) {
        // None unless this thread panicked. Closing a ring does not wait for its reads.
        self.flights.iter_mut().flatten().for_each(|flight| flight.read.buffer.abandon());
    }
}
/// The name of the poll.
const BELL: u64 = u64::MAX;

/// `POLLIN`, in the width that the ring takes.
const POLLIN: u32 = rustix::event::PollFlags::IN.bits() as u32;

/// How long to wait when the kernel lacks resources.
const PAUSE: Duration = Duration::from_millis(1);
