//! A thread that makes data files durable while others are encoded.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::error::{Error, ErrorKind, Result};
use crate::io::StoreFile;

/// A thread that makes files durable, one at a time, so that no worker waits for the disk.
#[derive(Debug)]
pub(super) struct Flusher<T> {
    files: Option<Sender<(Arc<dyn StoreFile>, T)>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Flusher<T> {
    /// Starts the thread; `done` hears of every file.
    pub(super) fn new(done: impl Fn(std::io::Result<()>, T) + Send + 'static) -> Result<Self> {
        let (files, queue) = channel::<(Arc<dyn StoreFile>, T)>();
        let flush = move || {
            while let Ok((file, tag)) = queue.recv() {
                let synced = catch_unwind(AssertUnwindSafe(|| file.sync()));
                done(synced.unwrap_or_else(|_| Err(std::io::Error::other("the store panicked"))), tag);
            }
        };
        let thread = std::thread::Builder::new().name("touchdown-flush".to_owned()).spawn(flush);
        let thread =
            thread.map_err(|error| Error::new(ErrorKind::Io, "the system starts no more threads").caused_by(error))?;
        Ok(Self { files: Some(files), thread: Some(thread) })
    }

    /// Has a file made durable.
    pub(super) fn flush(&self, file: Arc<dyn StoreFile>, tag: T) {
        // The thread lives as long as this value, so somebody receives it.
        let _ = self.files.as_ref().map(|files| files.send((file, tag)));
    }
}

impl<T> Drop for Flusher<T> {
    fn drop(&mut self) {
        self.files = None;
        if let Some(thread) = self.thread.take() {
            // Panics of the store are caught; there is nothing else to report.
            let _ = thread.join();
        }
    }
}
