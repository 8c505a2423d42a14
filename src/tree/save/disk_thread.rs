//! Threads that wait for the disk, so that no worker does.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::error::{Error, ErrorKind, Result};

/// A thread that does one job after the other.
#[derive(Debug)]
pub(super) struct DiskThread {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// It must not panic: its thread would end.
type Job = Box<dyn FnOnce() + Send>;

impl DiskThread {
    /// Starts it.
    pub(super) fn new(name: &str) -> Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let work = move || queue.into_iter().for_each(|job| job());
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        let thread =
            thread.map_err(|error| Error::new(ErrorKind::Io, "the system starts no more threads").caused_by(error))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Has it do a job, after those before.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // The thread lives as long as this value, so somebody receives it.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(Box::new(job)));
    }
}

impl Drop for DiskThread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Jobs do not panic; there is nothing else to report.
            let _ = thread.join();
        }
    }
}
