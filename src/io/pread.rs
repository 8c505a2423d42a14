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
    submit: Option<Sender<(Ticket, ReadAt)>>,
    events: Events,
    threads: Vec<JoinHandle<()>>,
}

impl PreadReader {
    /// A reader with so many threads, at least one.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub fn new(threads: usize) -> Result<Self> {
        let (submit, work) = channel::<(Ticket, ReadAt)>();
        let (send, events) = Events::new();
        let work = Arc::new(Mutex::new(work));
        let mut reader = Self { submit: Some(submit), events, threads: Vec::new() };
        for index in 0..threads.max(1) {
            let (work, send) = (Arc::clone(&work), send.clone());
            let thread = std::thread::Builder::new()
                .name(format!("touchdown-read-{index}"))
                .spawn(move || serve(&work, &send))
                .map_err(|error| Error::new(ErrorKind::Io, "the system starts no more threads").caused_by(error))?;
            reader.threads.push(thread);
        }
        Ok(reader)
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
        if let Some(submit) = &self.submit {
            // The threads live as long as the reader, so the send succeeds.
            let _ = submit.send((ticket, read));
        }
    }

    fn next(&mut self, deadline: Option<Instant>) -> Option<Completion> {
        self.events.next(deadline)
    }

    fn depth(&self) -> usize {
        // One read at work and one waiting per thread keeps every thread busy.
        self.threads.len() * 2
    }

    fn waker(&self) -> Arc<dyn ReaderWaker> {
        self.events.waker()
    }

    fn name(&self) -> &'static str {
        "pread"
    }
}

impl Drop for PreadReader {
    fn drop(&mut self) {
        self.submit = None;
        for thread in self.threads.drain(..) {
            // A reading thread runs nothing that panics; if it did, its read is lost with it.
            let _ = thread.join();
        }
    }
}
