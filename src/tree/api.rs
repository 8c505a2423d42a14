//! Loads without an engine of one's own: free functions that make one and join it.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::checkpoint::{Checkpoint, Metadata, OpenOptions};
use super::engine::{Engine, EngineOptions};
use super::job::{Job, Progress};
use super::state::State;
use super::target::Target;
use crate::error::Result;

/// Opens a checkpoint: Orbax of any release, a root of steps (its latest whole step), or safetensors. Reads metadata only.
///
/// # Errors
/// See [`Checkpoint::open`].
pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    Checkpoint::open(path, &OpenOptions::default())
}

/// What a checkpoint says about itself: the whole of Orbax's `metadata`, as one value that needs no open checkpoint.
///
/// # Errors
/// See [`Checkpoint::open`].
pub fn metadata(path: impl AsRef<Path>) -> Result<Metadata> {
    open(path).map(|checkpoint| checkpoint.metadata())
}

/// Loads a target into host memory, on an engine that lives for this call.
///
/// # Errors
/// A target that does not fit, damage, no memory; see [`Job::wait`].
pub fn load(checkpoint: &Checkpoint, target: &Target) -> Result<State> {
    Engine::new(EngineOptions::default())?.load(checkpoint, target)?.wait()
}

/// Starts a load into host memory, on an engine that lives as long as the future. Planning and allocation happen in this
/// call; reading, decoding and placing on the engine's threads, so any executor will do.
///
/// # Errors
/// A target that does not fit, or no memory for its shards; everything later comes from the future.
pub fn load_async(checkpoint: &Checkpoint, target: &Target) -> Result<Load> {
    let engine = Engine::new(EngineOptions::default())?;
    let job = engine.load(checkpoint, target)?;
    Ok(Load { job, _engine: engine })
}

/// A load on an engine of its own: a future of the [`State`].
///
/// Dropping it cancels: nothing new is started, and the drop waits for the reads and decodes in flight (at most the staging
/// budget), so that no thread stays behind.
#[derive(Debug)]
pub struct Load {
    // Dropped in this order: the job cancels, then the engine joins its threads.
    job: Job,
    _engine: Engine,
}

impl Load {
    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.job.progress()
    }

    /// Asks it to stop.
    pub fn cancel(&self) {
        self.job.cancel();
    }
}

impl Future for Load {
    type Output = Result<State>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<State>> {
        Pin::new(&mut self.job).poll(context)
    }
}
