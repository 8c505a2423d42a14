//! What the caller of an asynchronous save or load holds.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::shared::Reading;
use crate::error::{Error, Result};
use crate::tree::save::{SaveJob, SaveProgress, SaveReport};
use crate::tree::{Engine, Job, Progress, State};

/// A step that is being saved: a future, and a handle to wait, ask how far it is, or cancel. Dropping it ends nothing; a failure
/// that nobody asked it for is told by [`wait`](super::Checkpointer::wait), or by the next save.
#[derive(Debug)]
pub struct StepSave {
    pub(super) step: u64,
    pub(super) job: SaveJob,
    pub(super) slot: Arc<Slot>,
}

impl StepSave {
    /// Which step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// How far it is.
    pub fn progress(&self) -> SaveProgress {
        self.job.progress()
    }

    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_finished(&self) -> bool {
        self.slot.lock().ended
    }

    /// Asks it to stop; what was written so far is removed.
    pub fn cancel(&self) {
        self.job.cancel();
    }

    /// Blocks until the step is in place. Steps that are no longer preserved are removed after that, in the background.
    ///
    /// # Errors
    /// Whatever the save failed with; the series is as it was before.
    pub fn wait(self) -> Result<SaveReport> {
        let mut state = self.slot.lock();
        loop {
            if let Some(result) = self.slot.take(&mut state) {
                return result;
            }
            state = self.slot.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Future for StepSave {
    type Output = Result<SaveReport>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<SaveReport>> {
        let mut state = self.slot.lock();
        match self.slot.take(&mut state) {
            Some(result) => Poll::Ready(result),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// The result of a save on its way from the series' thread to whoever holds the handle.
#[derive(Debug, Default)]
pub(super) struct Slot {
    state: Mutex<SlotState>,
    changed: Condvar,
    /// Whether the holder has been told.
    seen: AtomicBool,
}

#[derive(Debug, Default)]
struct SlotState {
    ended: bool,
    result: Option<Result<SaveReport>>,
    waker: Option<Waker>,
}

impl Slot {
    /// Ends it, once. Whoever polled it is to be woken by the caller, who may hold locks.
    #[must_use]
    pub(super) fn publish(&self, result: Result<SaveReport>) -> Option<Waker> {
        let mut state = self.lock();
        if !state.ended {
            (state.ended, state.result) = (true, Some(result));
        }
        self.changed.notify_all();
        state.waker.take()
    }

    /// Whether a failure of it has been told.
    pub(super) fn is_seen(&self) -> bool {
        self.seen.load(Ordering::Acquire)
    }

    fn take(&self, state: &mut SlotState) -> Option<Result<SaveReport>> {
        let taken = || Err(Error::invalid("the result of the save was taken already"));
        state.ended.then(|| {
            self.seen.store(true, Ordering::Release);
            state.result.take().unwrap_or_else(taken)
        })
    }

    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A step that is being loaded: a future of its [`State`]. The step is not removed meanwhile by the series. Dropping it cancels.
#[derive(Debug)]
pub struct StepLoad {
    // Dropped in this order: the load ends, then the step may be removed.
    pub(super) job: Job,
    pub(super) _engine: Arc<Engine>,
    pub(super) _reading: Reading,
    pub(super) step: u64,
}

impl StepLoad {
    /// Which step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.job.progress()
    }

    /// Asks it to stop.
    pub fn cancel(&self) {
        self.job.cancel();
    }

    /// Blocks until everything is loaded.
    ///
    /// # Errors
    /// See [`Job::wait`].
    pub fn wait(self) -> Result<State> {
        self.job.wait()
    }
}

impl Future for StepLoad {
    type Output = Result<State>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<State>> {
        Pin::new(&mut self.job).poll(context)
    }
}
