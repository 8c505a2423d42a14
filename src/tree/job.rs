//! What the caller of a load holds: a [`Job`], and the status that it shares with the engine's driver.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::state::{Array, State};
use crate::error::{Error, Result};
use crate::io::ReaderWaker;

/// A load in progress.
///
/// It is three things at once: an iterator that blocks for the next finished array, a future of the whole [`State`], and a
/// handle to ask how far it is or to cancel it. Dropping it cancels: reads in flight are waited for by the engine, not by
/// the dropping thread.
#[derive(Debug)]
pub struct Job {
    pub(super) status: Arc<Status>,
    /// Whether the result was taken, so that dropping need not cancel.
    pub(super) finished: bool,
}

/// How far a load is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Data bytes that have arrived.
    pub bytes_read: u64,
    /// Data bytes that will be read in all.
    pub bytes_total: u64,
    /// Arrays that are complete.
    pub leaves_done: u64,
    /// Arrays in all.
    pub leaves_total: u64,
}

impl Job {
    /// Blocks until everything is loaded.
    ///
    /// # Errors
    /// The first failure in plan order; [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) after [`cancel`](Self::cancel).
    pub fn wait(mut self) -> Result<State> {
        self.finished = true;
        let mut shared = self.status.lock();
        loop {
            if let Some(result) = shared.take() {
                return result;
            }
            shared = self.status.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let count = &self.status.count;
        Progress {
            bytes_read: count.bytes_read.load(Ordering::Relaxed),
            bytes_total: count.bytes_total,
            leaves_done: count.leaves_done.load(Ordering::Relaxed),
            leaves_total: count.leaves_total,
        }
    }

    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_finished(&self) -> bool {
        self.status.lock().ended
    }

    /// Asks it to stop. Work in progress is finished, nothing new is started; the result becomes
    /// [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) unless everything was done already.
    pub fn cancel(&self) {
        self.status.cancel();
    }
}

impl Iterator for Job {
    type Item = Array;

    /// The next finished array, blocking: in the caller's order where one was given (leaves of one pattern as they complete),
    /// otherwise as they complete. `None` when no more will come: [`Job::wait`] tells whether the load succeeded.
    fn next(&mut self) -> Option<Array> {
        let mut shared = self.status.lock();
        loop {
            if let Some(array) = shared.ready.pop_front() {
                return Some(array);
            }
            if shared.ended {
                return None;
            }
            shared = self.status.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Future for Job {
    type Output = Result<State>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<State>> {
        let result = {
            let mut shared = self.status.lock();
            let result = shared.take();
            if result.is_none() {
                shared.waker = Some(context.waker().clone());
            }
            result
        };
        match result {
            Some(result) => {
                self.finished = true;
                Poll::Ready(result)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.finished {
            self.status.cancel();
        }
        // What nobody has taken is nobody's any more: it must not share memory with the state that was.
        let untaken = {
            let mut shared = self.status.lock();
            (std::mem::take(&mut shared.ready), std::mem::take(&mut shared.parked))
        };
        drop(untaken);
    }
}

/// What the job and the driver share.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) shared: Mutex<Shared>,
    pub(super) changed: Condvar,
    pub(super) cancelled: AtomicBool,
    pub(super) count: Count,
}

#[derive(Default)]
pub(super) struct Shared {
    pub(super) ready: VecDeque<Array>,
    /// Complete, but leaves that the caller wants earlier are not.
    pub(super) parked: Vec<(u32, Array)>,
    /// For every priority how many leaves are not complete.
    pub(super) waiting: BTreeMap<u32, usize>,
    /// Whether there is, or was, a result.
    pub(super) ended: bool,
    pub(super) result: Option<Result<State>>,
    pub(super) waker: Option<Waker>,
    /// Wakes the driver out of waiting for a read, so that a cancel is seen at once.
    pub(super) driver: Option<Arc<dyn ReaderWaker>>,
}

impl Shared {
    /// The result, once; later it is an error to ask.
    fn take(&mut self) -> Option<Result<State>> {
        let taken = || Err(Error::invalid("the result of the load was taken already"));
        self.ended.then(|| self.result.take().unwrap_or_else(taken))
    }

    /// Takes complete arrays in and releases those that nothing earlier is waited for.
    pub(super) fn park(&mut self, arrays: Vec<(u32, Array)>) {
        for (priority, _) in &arrays {
            if let Some(waiting) = self.waiting.get_mut(priority) {
                *waiting -= 1;
                if *waiting == 0 {
                    self.waiting.remove(priority);
                }
            }
        }
        self.parked.extend(arrays);
        let turn = self.waiting.keys().next().copied().unwrap_or(u32::MAX);
        let (mut now, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.parked).into_iter().partition(|(priority, _)| *priority <= turn);
        now.sort_by_key(|(priority, _)| *priority);
        self.ready.extend(now.into_iter().map(|(_, array)| array));
        self.parked = later;
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("ready", &self.ready.len()).field("result", &self.result).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub(super) struct Count {
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_total: u64,
    pub(super) leaves_done: AtomicU64,
    pub(super) leaves_total: u64,
}

impl Status {
    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        let driver = self.lock().driver.clone();
        if let Some(driver) = driver {
            driver.wake();
        }
    }

    pub(super) fn publish(&self, result: Result<State>) {
        let mut shared = self.lock();
        if !shared.ended {
            (shared.ended, shared.result) = (true, Some(result));
        }
        shared.driver = None;
        let waker = shared.waker.take();
        drop(shared);
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}
