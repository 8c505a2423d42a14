//! The series' own thread: it waits for saves to be committed, then removes what is no longer preserved.
//!
//! One thread for the life of the [`Checkpointer`](super::Checkpointer), which joins it. Tasks are done one after the other: the
//! next save runs on the engine meanwhile.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use super::handle::Slot;
use super::remove::remove_aside;
use super::shared::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::tree::save::{SaveJob, SaveReport};

#[derive(Debug)]
pub(super) struct Worker {
    // Dropped first, which tells the thread to end.
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

pub(super) enum Task {
    /// Wait for a save, then retain.
    Finish(Finish),
    /// Remove what crashes left behind.
    Tidy(Vec<PathBuf>),
}

pub(super) struct Finish {
    pub(super) step: u64,
    pub(super) name: String,
    pub(super) job: SaveJob,
    pub(super) slot: Arc<Slot>,
}

impl Worker {
    pub(super) fn start(shared: &Arc<Shared>) -> Result<Self> {
        let (tasks, queue) = channel::<Task>();
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new()
            .name("touchdown-steps".to_owned())
            .spawn(move || {
                while let Ok(task) = queue.recv() {
                    run(&shared, task);
                    shared.lock().tasks -= 1;
                    shared.notify();
                }
            })
            .map_err(|error| Error::new(ErrorKind::Io, "the system starts no more threads").caused_by(error))?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread) })
    }

    /// Gives it a task.
    pub(super) fn send(&self, shared: &Shared, task: Task) -> Result<()> {
        shared.lock().tasks += 1;
        let sent = self.tasks.as_ref().is_some_and(|tasks| tasks.send(task).is_ok());
        if !sent {
            shared.lock().tasks -= 1;
            return Err(Error::bug("the thread of a series has ended"));
        }
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // Its tasks catch their panics; one that panicked all the same has ended.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, task: Task) {
    let result = match task {
        Task::Finish(task) => {
            commit(shared, task);
            caught(|| shared.retain())
        }
        Task::Tidy(left) => {
            let store = &*shared.options.save.store;
            let errors: Vec<Error> =
                left.iter().filter_map(|path| caught(|| remove_aside(store, path)).err()).collect();
            Error::merged(errors).map_or(Ok(()), Err)
        }
    };
    if let Err(error) = result {
        tracing::warn!(%error, "a series of steps could not be tidied up");
        shared.fail(error, None);
    }
}

/// Waits for a save and takes its step in.
fn commit(shared: &Shared, task: Finish) {
    let Finish { step, name, job, slot } = task;
    let result = caught(|| job.wait()).and_then(|report: SaveReport| {
        // It is committed; what lists it reads it back.
        shared.look_at(&name)?;
        Ok(report)
    });
    let result = result.map_err(|error| error.at("step", step));
    let failure = match &result {
        // Whoever cancels knows.
        Err(error) if error.kind() != ErrorKind::Cancelled => Some(error.duplicate()),
        _ => None,
    };
    if let Some(error) = failure {
        tracing::warn!(step, %error, "a step was not saved");
        shared.fail(error, Some(Arc::clone(&slot)));
    }
    // At once: who sees that no save is going on finds its handle finished, and the other way round.
    let waker = {
        let mut state = shared.lock();
        state.in_flight = None;
        slot.publish(result)
    };
    shared.notify();
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// A panic is a bug; whoever waits must hear of it.
fn caught<T>(task: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(task)).unwrap_or_else(|_| Err(Error::bug("a task of a series panicked")))
}
