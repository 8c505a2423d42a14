//! What the caller of a save holds: a [`SaveJob`], and the progress that it shares with the engine's driver.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// A save in progress.
///
/// It is a future, and a handle to wait, ask how far it is, or cancel. Dropping it does not end the save: the engine finishes it.
#[derive(Debug)]
pub struct SaveJob {
    pub(super) progress: Arc<Progress>,
}

/// What a save did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SaveReport {
    /// From the start of the work to the checkpoint being in place.
    pub elapsed: Duration,
    /// Bytes of all arrays in memory, replicas counted once.
    pub bytes_logical: u64,
    /// Bytes of all values as they are stored.
    pub bytes_stored: u64,
    /// The most memory beyond the caller's arrays, in bytes, by the engine's own count.
    pub peak_host_bytes: u64,
    /// Lossy elements of every array that has any, by `item: path`.
    pub lossy: Vec<(String, u64)>,
}

/// How far a save is, in bytes of arrays in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SaveProgress {
    /// Encoded so far.
    pub bytes_done: u64,
    /// In all.
    pub bytes_total: u64,
}

impl SaveJob {
    /// Blocks until the checkpoint is in place.
    ///
    /// # Errors
    /// The first failure; nothing is in place then, and what was there before is as it was.
    pub fn wait(self) -> Result<SaveReport> {
        let mut shared = self.progress.lock();
        loop {
            if let Some(result) = shared.take() {
                return result;
            }
            shared = self.progress.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Another handle on the same save. The result is given once, to whoever waits first.
    pub(crate) fn share(&self) -> Self {
        Self { progress: Arc::clone(&self.progress) }
    }

    /// How far it is.
    pub fn progress(&self) -> SaveProgress {
        self.progress.so_far()
    }

    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_finished(&self) -> bool {
        self.progress.lock().ended
    }

    /// Asks it to stop; what was written so far is removed. The result becomes
    /// [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) unless the checkpoint is in place already.
    pub fn cancel(&self) {
        self.progress.cancel();
    }
}

impl Future for SaveJob {
    type Output = Result<SaveReport>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<SaveReport>> {
        let mut shared = self.progress.lock();
        match shared.take() {
            Some(result) => Poll::Ready(result),
            None => {
                shared.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// What the job and the driver share.
#[derive(Debug)]
pub(in crate::tree) struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    shared: Mutex<Shared>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Shared {
    ended: bool,
    result: Option<Result<SaveReport>>,
    waker: Option<Waker>,
}

impl Shared {
    /// The result, once; later it is an error to ask.
    fn take(&mut self) -> Option<Result<SaveReport>> {
        let taken = || Err(Error::invalid("the result of the save was taken already"));
        self.ended.then(|| self.result.take().unwrap_or_else(taken))
    }
}

impl Progress {
    pub(in crate::tree) fn new(total: u64) -> Arc<Self> {
        Arc::new(Self {
            done: AtomicU64::new(0),
            total: AtomicU64::new(total),
            cancelled: AtomicBool::new(false),
            shared: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Says how many bytes there are in all, where that is found out later.
    pub(in crate::tree) fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    pub(in crate::tree) fn so_far(&self) -> SaveProgress {
        SaveProgress { bytes_done: self.done.load(Ordering::Relaxed), bytes_total: self.total.load(Ordering::Relaxed) }
    }

    pub(in crate::tree) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::tree) fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(in crate::tree) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// # Errors
    /// [`ErrorKind::Cancelled`] once somebody asked to stop.
    pub(in crate::tree) fn refuse_if_cancelled(&self) -> Result<()> {
        match self.is_cancelled() {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Cancelled, "the writing was cancelled")),
        }
    }

    /// Ends the save, once.
    pub(super) fn publish(&self, result: Result<SaveReport>) {
        let mut shared = self.lock();
        if !shared.ended {
            (shared.ended, shared.result) = (true, Some(result));
        }
        let waker = shared.waker.take();
        drop(shared);
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}
