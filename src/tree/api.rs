//! Loads and saves without an engine of one's own: free functions that make one and join it.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::checkpoint::{Checkpoint, Metadata, OpenOptions, describe, read_json};
use super::engine::{Engine, EngineOptions};
use super::job::{Job, Progress};
use super::save::{SaveJob, SaveOptions, SaveProgress, SaveReport, Tree, TreeItem};
use super::state::State;
use super::target::Target;
use crate::error::Result;
use crate::io::Root;
use crate::layout::{Item, ItemKind};
use crate::relpath::RelPath;

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

/// Loads a target onto its devices, host memory unless it says otherwise, on an engine that lives for this call.
///
/// # Errors
/// A target that does not fit, damage, no memory; see [`Job::wait`].
pub fn load(checkpoint: &Checkpoint, target: &Target) -> Result<State> {
    Engine::new(EngineOptions::default())?.load(checkpoint, target)?.wait()
}

/// Starts a load onto the target's devices, on an engine that lives as long as the future. Planning and allocation happen in this
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

/// An item that was loaded.
#[non_exhaustive]
#[derive(Debug)]
pub enum LoadedItem {
    /// A tree.
    Tree(Box<State>),
    /// Any JSON.
    Json(serde_json::Value),
}

impl LoadedItem {
    /// The tree, if it is one.
    pub fn tree(&self) -> Option<&State> {
        match self {
            Self::Tree(state) => Some(state),
            Self::Json(_) => None,
        }
    }

    /// The JSON, if it is that.
    pub fn json(&self) -> Option<&serde_json::Value> {
        match self {
            Self::Tree(_) => None,
            Self::Json(value) => Some(value),
        }
    }
}

/// Loads every item of a checkpoint, trees as stored, into host memory: Orbax's `load_checkpointables`. Items of other kinds are
/// left out; [`Checkpoint::description`] names them.
///
/// # Errors
/// See [`Checkpoint::open`] and [`load`].
pub fn load_items(path: impl AsRef<Path>) -> Result<BTreeMap<String, LoadedItem>> {
    load_items_on(&Engine::new(EngineOptions::default())?, path.as_ref())
}

/// The same on an engine of one's own.
pub(crate) fn load_items_on(engine: &Engine, path: &Path) -> Result<BTreeMap<String, LoadedItem>> {
    each_item(path, |item| {
        Ok(Some(match item {
            OpenItem::Tree(tree) => LoadedItem::Tree(Box::new(engine.load(&tree, &tree.target())?.wait()?)),
            OpenItem::Json(root, dir) => LoadedItem::Json(read_json(root, dir)?),
        }))
    })
}

/// What every tree of a checkpoint says about itself, by item: Orbax's `checkpointables_metadata`.
pub(crate) fn trees(path: &Path) -> Result<BTreeMap<String, Metadata>> {
    each_item(path, |item| match item {
        OpenItem::Tree(tree) => Ok(Some(tree.metadata())),
        OpenItem::Json(..) => Ok(None),
    })
}

/// An item that can be read.
enum OpenItem<'a> {
    Tree(Checkpoint),
    Json(&'a Root, &'a RelPath),
}

/// What comes of each item of a checkpoint, by its name. Items that are neither trees nor JSON are left out.
fn each_item<T>(path: &Path, mut of: impl FnMut(OpenItem<'_>) -> Result<Option<T>>) -> Result<BTreeMap<String, T>> {
    let (root, description) = describe(path, &OpenOptions::default())?;
    let mut all = BTreeMap::new();
    for Item { name, kind, dir } in &description.items {
        let item = match kind {
            ItemKind::Tree => {
                let described = (Arc::clone(&root), description.clone());
                OpenItem::Tree(Checkpoint::described(path, described, Some(name), Instant::now())?)
            }
            ItemKind::Json => OpenItem::Json(&root, dir),
            ItemKind::Other => continue,
        };
        if let Some(made) = of(item)? {
            all.insert(name.clone(), made);
        }
    }
    Ok(all)
}

/// Saves a tree as a new checkpoint, on an engine that lives for this call; see [`Engine::save`].
///
/// # Errors
/// A destination that exists, leaves that cannot be saved, whatever the file system refuses. The destination is as it was then.
pub fn save(path: impl AsRef<Path>, tree: &Tree, options: &SaveOptions) -> Result<SaveReport> {
    Engine::new(EngineOptions::default())?.save(path, tree, options)?.wait()
}

/// Saves several items as one new checkpoint; see [`Engine::save_items`].
///
/// # Errors
/// As [`save`], and names that cannot be items'.
pub fn save_items(path: impl AsRef<Path>, items: &[(String, TreeItem)], options: &SaveOptions) -> Result<SaveReport> {
    Engine::new(EngineOptions::default())?.save_items(path, items, options)?.wait()
}

/// Starts a save on an engine that lives as long as the handle. The tree is checked in this call, and its bytes are shared: the
/// snapshot is now, and the caller may change or drop what it has at once. Of arrays on devices it is what stands in them until the
/// save has ended, see [`Engine::save`].
///
/// # Errors
/// A destination that exists, or leaves that cannot be saved; everything later comes from the handle.
pub fn save_async(path: impl AsRef<Path>, tree: &Tree, options: &SaveOptions) -> Result<Save> {
    let engine = Engine::new(EngineOptions::default())?;
    let job = engine.save(path, tree, options)?;
    Ok(Save { job, _engine: engine })
}

/// A save on an engine of its own: a future of the [`SaveReport`]. Dropping it waits until the save is done: it is not lost, and
/// no thread stays behind.
#[derive(Debug)]
pub struct Save {
    job: SaveJob,
    // Dropped last: it finishes the save and joins its threads.
    _engine: Engine,
}

impl Save {
    /// How far it is.
    pub fn progress(&self) -> SaveProgress {
        self.job.progress()
    }

    /// Asks it to stop; what was written so far is removed.
    pub fn cancel(&self) {
        self.job.cancel();
    }

    /// Blocks until the checkpoint is in place.
    ///
    /// # Errors
    /// See [`SaveJob::wait`].
    pub fn wait(self) -> Result<SaveReport> {
        self.job.wait()
    }
}

impl Future for Save {
    type Output = Result<SaveReport>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<SaveReport>> {
        Pin::new(&mut self.job).poll(context)
    }
}
