//! The object that a training loop holds: opening, the series, reading. Saving is in `saving.rs`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::choose::{OpenStep, StepItem, best, latest, with_reading, with_step};
use super::handle::StepLoad;
use super::history::Metric;
use super::lock::WriterLock;
use super::names::prefix;
use super::options::CheckpointerOptions;
use super::preservation::PreservationPolicy;
use super::recovery::Recovery;
use super::root::{
    SeriesStep, final_name, is_temporary, orbax_temporaries, refuse_checkpoint, root_metadata, scan,
    write_root_metadata,
};
use super::shared::Shared;
use super::worker::{Task, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{StepChoice, default_item};
use crate::tree::save::delete_item;
use crate::tree::{Checkpoint, LoadedItem, Metadata, State, Target, load_items_on, trees};

/// A series of steps in a root directory: saves them as policies say, removes those that need not be preserved, and finds the
/// latest and the best that are whole.
///
/// ```no_run
/// use touchdown::training::{Checkpointer, CheckpointerOptions, PreservationPolicy, SavePolicy, StepChoice, StepOptions};
/// # use touchdown::Tree;
/// # fn main() -> touchdown::Result<()> {
/// # let (state, loss) = (Tree::new().with("w", 1.0), 0.5);
/// let steps = Checkpointer::open("runs/llm", CheckpointerOptions {
///     save_policy: SavePolicy::interval(100),
///     preservation: PreservationPolicy::any([PreservationPolicy::latest(2), PreservationPolicy::best(3, "-loss")]),
///     ..CheckpointerOptions::default()
/// })?;
/// let start = match steps.latest()? {
///     Some(step) => { let loaded = steps.load(step.step)?; step.step + 1 }
///     None => 0,
/// };
/// for step in start..10_000 {
///     // .. train ..
///     steps.save_async(step, &state, &StepOptions::metric("loss", loss))?;
/// }
/// steps.close()
/// # }
/// ```
///
/// A step is whole if it is committed and its metadata, its manifests and every reference in them can be read; with
/// [`verify_data`](CheckpointerOptions::verify_data) its data, too. Others are passed over, never removed by a policy, and
/// [`steps`](Self::steps) has the reason. One without `_CHECKPOINT_METADATA` is whole if its items are, as for Orbax's
/// `CheckpointManager` (its `training.Checkpointer` refuses it), unless checksums tell that it had that file.
///
/// **Snapshot.** What is saved is the tree as it is when the call is made: its bytes are shared and immutable.
///
/// **Failures** of an asynchronous save are told by its handle or, if nobody asks that, once by [`wait`](Self::wait),
/// [`close`](Self::close) or the next save, which is started all the same. The series goes on as if that step had not been saved.
///
/// **One writer.** Opening a root that another writer has is an error of kind [`Busy`](crate::ErrorKind::Busy), in this process
/// or another. Readers need no lock. Dropping the object waits until everything is saved and removed, and joins its threads.
///
/// What is known of the root is kept: what other processes add or remove is seen after [`reload`](Self::reload). That a step
/// was whole holds as long as none of its files has changed; every step is looked at again before one is removed.
#[derive(Debug)]
pub struct Checkpointer {
    // In this order: the thread ends, then the lock.
    pub(super) worker: Option<Worker>,
    _lock: Option<WriterLock>,
    /// Saves are started one at a time.
    pub(super) turn: Mutex<()>,
    pub(super) shared: Arc<Shared>,
}

/// A step and the trees that its items hold.
#[derive(Clone, Debug, PartialEq)]
pub struct StepMetadata {
    /// The step: its items, metrics, times and custom metadata.
    pub step: SeriesStep,
    /// Its trees by the names of their items: leaves, shapes, types, saved shardings. The name of a bare item is empty.
    pub trees: BTreeMap<String, Metadata>,
}

impl StepMetadata {
    /// The tree that is loaded if no item is named; `None` if there is none, or one of several would have to be named.
    pub fn tree(&self) -> Option<&Metadata> {
        let item = default_item(&self.step.items, None).ok()?;
        self.trees.get(&item.name)
    }
}

impl Checkpointer {
    /// Opens a root; a writer makes it if it does not exist, takes its lock, puts back what an interrupted overwrite moved aside,
    /// and removes what crashes left behind, in the background.
    ///
    /// # Errors
    /// Another writer (kind `Busy`), options that cannot be meant, a checkpoint, steps of other names only, for a writer also steps
    /// whose numbers have other leading zeros, a root that cannot be read or made.
    pub fn open(root: impl AsRef<Path>, options: CheckpointerOptions) -> Result<Self> {
        options.names.check()?;
        options.save_policy.check()?;
        options.preservation.check()?;
        let root = std::path::absolute(root.as_ref())
            .map_err(|error| Error::invalid("the root is no path").caused_by(error))?;
        refuse_checkpoint(&root)?;
        let writes = !options.read_only;
        let shared = Arc::new(Shared::new(root, options));
        let (mut lock, mut left) = (None, Vec::new());
        if writes {
            make_root(&shared)?;
            let (taken, file) = WriterLock::take(&shared.root)?;
            lock = Some(taken);
            shared.locked.get_or_init(|| file);
            let found = Recovery::find(&shared.root, &shared.options.names)?;
            left = found.put_back(&*shared.options.save.store)?.left;
        }
        shared.reload()?;
        refuse_other_names(&shared)?;
        let mut worker = None;
        if writes {
            if shared.options.remove_orbax_temporaries {
                left.extend(orbax_temporaries(&shared.lock().steps));
            }
            if let Some(metadata) = &shared.options.custom_metadata {
                let save = &shared.options.save;
                match root_metadata(&shared.root) {
                    Ok(None) => write_root_metadata(&save.store, &shared.root, metadata, save.sync)?,
                    Ok(Some(_)) => {}
                    // The series does not depend on it; asking for it tells, and setting it replaces it.
                    Err(error) if error.is_of_one_path() => {
                        tracing::warn!(%error, "the root's metadata cannot be read")
                    }
                    Err(error) => return Err(error),
                }
            }
            let started = Worker::start(&shared)?;
            if !left.is_empty() {
                // What is being removed is no step any more.
                shared.lock().steps.retain(|step| !left.contains(&step.path));
                started.send(&shared, Task::Tidy(left))?;
            }
            worker = Some(started);
        }
        Ok(Self { worker, _lock: lock, turn: Mutex::new(()), shared })
    }

    /// The directory of the steps.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Its options.
    pub fn options(&self) -> &CheckpointerOptions {
        &self.shared.options
    }

    // ---------------------------------------------------------------- the series

    /// The steps, by number; those that are not whole have a reason. They are judged by their listings; what is damaged within a
    /// step is told once [`latest`](Self::latest), [`best`](Self::best), a load or a removal has looked into it.
    /// [`steps`](super::steps) of a root looks into all.
    pub fn steps(&self) -> Vec<SeriesStep> {
        self.shared.lock().steps.clone()
    }

    /// The latest whole step.
    ///
    /// # Errors
    /// An environment that fails while it is looked into. Damage is none: the step before is taken.
    pub fn latest(&self) -> Result<Option<SeriesStep>> {
        latest(&self.shared)
    }

    /// The best whole step by a metric, `"accuracy"` or, where the smallest is best, `"-loss"`; of equals the latest. It is the
    /// step that `--step best:METRIC` opens.
    ///
    /// # Errors
    /// As [`latest`](Self::latest).
    pub fn best(&self, metric: impl Into<Metric>) -> Result<Option<SeriesStep>> {
        best(&self.shared, &metric.into())
    }

    /// Looks at the root again: for steps that other processes added or removed.
    ///
    /// # Errors
    /// A root that cannot be read.
    pub fn reload(&self) -> Result<()> {
        self.shared.reload()
    }

    /// What this policy would remove now, without doing it. What is being read through this object is not among it.
    ///
    /// # Errors
    /// As [`latest`](Self::latest).
    pub fn would_remove(&self, policy: &PreservationPolicy) -> Result<Vec<SeriesStep>> {
        policy.check()?;
        Ok(self.shared.judged(policy)?.go)
    }

    /// Removes a step, whole or not, whatever the preservation policy says.
    ///
    /// # Errors
    /// No such step; one that is being read or saved (kind `Busy`); whatever the file system refuses.
    pub fn delete(&self, step: u64) -> Result<()> {
        for found in self.removable_by_hand(step)? {
            self.shared.remove(&found, true)?;
        }
        Ok(())
    }

    /// Removes one item of a step of several.
    ///
    /// # Errors
    /// As [`delete`](Self::delete), no such item, or the only one.
    pub fn delete_item(&self, step: u64, item: &str) -> Result<()> {
        for found in self.removable_by_hand(step)? {
            if self.shared.lock().is_read(&found.name) {
                return Err(Error::new(ErrorKind::Busy, "the step is being read").at("step", step));
            }
            delete_item(&found.path, item)?;
            self.shared.look_at(&found.name)?;
        }
        Ok(())
    }

    fn removable_by_hand(&self, step: u64) -> Result<Vec<SeriesStep>> {
        self.writer()?;
        let state = self.shared.lock();
        if state.in_flight.as_ref().is_some_and(|save| save.info.step == step) {
            return Err(Error::new(ErrorKind::Busy, "the step is being saved").at("step", step));
        }
        let found = state.steps.iter().filter(|have| have.step == step && !is_temporary(&have.name));
        let found: Vec<SeriesStep> = found.cloned().collect();
        if found.is_empty() {
            return Err(Error::invalid(format!("there is no step {step}")).at("root", self.shared.root.display()));
        }
        Ok(found)
    }

    pub(super) fn writer(&self) -> Result<&Worker> {
        let worker = self
            .worker
            .as_ref()
            .ok_or_else(|| Error::invalid("the series was opened read-only").at("root", self.shared.root.display()))?;
        self.shared.check_lock()?;
        Ok(worker)
    }

    // ---------------------------------------------------------------- reading

    /// Opens a tree of a step: of a number, [`StepChoice::Latest`] or a [`Metric`], its usual item or `(step, "item")`. As long as
    /// the result lives, the series does not remove the step.
    ///
    /// # Errors
    /// No such step, none that is whole, damage; a step of several items none of which is the usual one, or of none that is a
    /// tree: [`load_items`](Self::load_items) loads what a step has, whatever it is.
    pub fn open_step(&self, which: impl Into<StepItem>) -> Result<OpenStep> {
        with_step(&self.shared, &which.into(), Ok)
    }

    /// Loads a step's tree into host memory, as stored.
    ///
    /// # Errors
    /// As [`open_step`](Self::open_step), and of loading.
    pub fn load(&self, which: impl Into<StepItem>) -> Result<State> {
        self.load_with(which, Checkpoint::target)
    }

    /// Loads what a target wants of a step's tree.
    ///
    /// # Errors
    /// As [`load`](Self::load), and a target that does not fit.
    pub fn load_with(
        &self,
        which: impl Into<StepItem>,
        mut target: impl FnMut(&Checkpoint) -> Target,
    ) -> Result<State> {
        let engine = self.shared.load_engine()?;
        with_step(&self.shared, &which.into(), |open| {
            let target = target(&open.checkpoint);
            engine.load(&open.checkpoint, &target)?.wait()
        })
    }

    /// Starts loading a step's tree, as stored.
    ///
    /// # Errors
    /// As [`open_step`](Self::open_step); everything later comes from the handle.
    pub fn load_async(&self, which: impl Into<StepItem>) -> Result<StepLoad> {
        self.load_async_with(which, Checkpoint::target)
    }

    /// Starts loading what a target wants of a step's tree.
    ///
    /// # Errors
    /// As [`load_async`](Self::load_async), and a target that does not fit.
    pub fn load_async_with(
        &self,
        which: impl Into<StepItem>,
        mut target: impl FnMut(&Checkpoint) -> Target,
    ) -> Result<StepLoad> {
        let engine = self.shared.load_engine()?;
        with_step(&self.shared, &which.into(), |open| {
            let target = target(&open.checkpoint);
            let job = engine.load(&open.checkpoint, &target)?;
            Ok(StepLoad { job, _engine: Arc::clone(&engine), step: open.step.step, _reading: open.reading })
        })
    }

    /// Loads every item of a step, trees as stored, whatever their number and kind.
    ///
    /// # Errors
    /// No such step, none that is whole, damage; of loading.
    pub fn load_items(&self, step: impl Into<StepChoice>) -> Result<BTreeMap<String, LoadedItem>> {
        let engine = self.shared.load_engine()?;
        with_reading(&self.shared, &step.into(), |step, _reading| load_items_on(&engine, &step.path))
    }

    /// What a step says about itself, without its data: of all its items, whatever their number and kind.
    ///
    /// # Errors
    /// No such step, none that is whole, damage.
    pub fn metadata(&self, step: impl Into<StepChoice>) -> Result<StepMetadata> {
        with_reading(&self.shared, &step.into(), |step, _reading| Ok(StepMetadata { trees: trees(&step.path)?, step }))
    }

    /// The user's metadata of the root, read anew.
    ///
    /// # Errors
    /// A file that is damaged or cannot be read.
    pub fn root_metadata(&self) -> Result<Option<Value>> {
        root_metadata(&self.shared.root)
    }

    /// Replaces the user's metadata of the root: an object.
    ///
    /// # Errors
    /// A value that is no object; whatever the file system refuses.
    pub fn set_root_metadata(&self, metadata: &Value) -> Result<()> {
        self.writer()?;
        let save = &self.shared.options.save;
        write_root_metadata(&save.store, &self.shared.root, metadata, save.sync)
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.worker = None;
        // Open steps share what is known of the series, but need no threads.
        self.shared.saver.end();
        self.shared.loader.end();
    }
}

/// Makes the root, whose own name is durable before a step is.
fn make_root(shared: &Shared) -> Result<()> {
    let (root, save) = (&shared.root, &shared.options.save);
    let make = || match root.parent() {
        _ if root.is_dir() => Ok(()),
        Some(parent) if save.sync => std::fs::create_dir_all(root).and_then(|()| save.store.sync_dir(parent)),
        _ => std::fs::create_dir_all(root),
    };
    make().map_err(|error| {
        Error::new(ErrorKind::Io, "cannot make the root of the steps").at("path", root.display()).caused_by(error)
    })
}

/// A root that only has steps of other names is more likely a mistake than a new series: the loop would start anew. And Orbax
/// reads numbers of one form: a writer does not put `2` beside `000001`.
fn refuse_other_names(shared: &Shared) -> Result<()> {
    let (names, steps) = (&shared.options.names, shared.lock().steps.clone());
    if !steps.is_empty() {
        let numbers = || steps.iter().filter(|step| !step.items.is_empty()).map(|step| (step.step, step.name.as_str()));
        return match numbers().find(|(step, name)| final_name(name) != names.name(*step)) {
            Some((step, other)) if !shared.options.read_only => Err(Error::invalid(
                "the numbers of the steps in the root have other leading zeros than these options say",
            )
            .at("root", shared.root.display())
            .expected(format_args!("names like `{}`", names.name(step)))
            .found(format_args!("`{other}`"))
            .hint(match names.fitting(numbers()) {
                Some(fitting) => format!("set `digits` of `names` to {}", fitting.digits),
                None => "they have several forms: rename them to one, or open the root read-only".to_owned(),
            })),
            _ => Ok(()),
        };
    }
    let others = scan(&shared.root, &|name| !is_temporary(name))?;
    let Some(other) = others.iter().find(|step| step.is_whole()) else { return Ok(()) };
    let hint = match prefix(final_name(&other.name)) {
        Some(prefix) => format!("set `names` to `StepNames::prefixed({prefix:?})`"),
        None => "set `names` to `StepNames::default()`".to_owned(),
    };
    Err(Error::invalid("the steps in the root have other names than these options say")
        .at("root", shared.root.display())
        .expected(format_args!("names like `{}`", shared.options.names.name(0)))
        .found(format_args!("`{}`", other.name))
        .hint(hint))
}
