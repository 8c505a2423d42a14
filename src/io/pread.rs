//! Positioned reads on a few threads: works on every file system and kernel.

use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::events::{Event, Events};
use super::reader::{Completion, ReadAt, Reader, ReaderWaker, Ticket, too_long};
use crate::error::{Error, ErrorKind, Result};

/// Threads that each do one positioned read at a time.
#[derive(Debug)]
pub struct PreadReader {
    threads: Threads,
    events: Events,
}

impl PreadReader {
    /// A reader with so many threads, at least one.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub fn new(threads: usize) -> Result<Self> {
        let (send, events) = Events::new();
        Ok(Self { threads: Threads::new(threads, &send)?, events })
    }
}

/// The threads; they tell their events to whoever made them.
#[derive(Debug)]
pub(super) struct Threads {
    submit: Option<Sender<(Ticket, ReadAt)>>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// So many threads, at least one.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub(super) fn new(threads: usize, send: &Sender<Event>) -> Result<Self> {
        let (submit, work) = channel::<(Ticket, ReadAt)>();
        let work = Arc::new(Mutex::new(work));
        let mut all = Self { submit: Some(submit), threads: Vec::new() };
        for index in 0..threads.max(1) {
            let (work, send) = (Arc::clone(&work), send.clone());
            let thread = std::thread::Builder::new()
                .name(format!("touchdown-read-{index}"))
                .spawn(move || serve(&work, &send))
                .map_err(|error| Error::new(ErrorKind::Io, "the system starts no more threads").caused_by(error))?;
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// As [`Reader::submit`].
    pub(super) fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        if let Some(submit) = &self.submit {
            // The threads live as long as this, so the send succeeds.
            let _ = submit.send((ticket, read));
        }
    }

    /// One read at work and one waiting per thread keeps every thread busy.
    pub(super) fn depth(&self) -> usize {
        self.threads.len() * 2
    }
}

/// One thread: take a read, do it, give it back; ends when the reader is dropped.
fn serve(work: &Mutex<Receiver<(Ticket, ReadAt)>>, send: &Sender<Event>) {
    loop {
        let next = work.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((ticket, mut read)) = next else { return };
        let (len, start) = (read.len, Instant::now());
        let result = match read.buffer.get_mut(..len) {
            // Repeats short reads and EINTR.
            Some(bytes) => read.file.file().read_exact_at(bytes, read.offset),
            None => Err(too_long()),
        };
        if send.send(Event::Done(Completion { ticket, read, result, busy: start.elapsed() })).is_err() {
            return;
        }
    }
}

impl Reader for PreadReader {
    fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        self.threads.submit(ticket, read);
    }

    fn next(&mut self, deadline: Option<Instant>) -> Option<Completion> {
        self.events.next(deadline)
    }

    fn depth(&self) -> usize {
        self.threads.depth()
    }

    fn waker(&self) -> Arc<dyn ReaderWaker> {
        self.events.waker()
    }

    fn leaves_warm_reads(&self) -> bool {
        true
    }

    fn name(&self) -> &'static str {
        "pread"
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.submit = None;
        for thread in self.threads.drain(..) {
            // A reading thread runs nothing that panics; if it did, its read is lost with it.
            let _ = thread.join();
        }
    }
}
