//! What the [`Checkpointer`](super::Checkpointer), its thread and its handles share: the series as it is known, what is going
//! on, and what has failed and was not told yet.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use super::handle::Slot;
use super::history::StepInfo;
use super::lock::LockedFile;
use super::options::CheckpointerOptions;
use super::root::{SeriesStep, final_name, scan};
use crate::error::{Error, Result};
use crate::layout::StepState;
use crate::tree::Engine;
use crate::tree::save::SaveJob;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) root: PathBuf,
    pub(super) options: CheckpointerOptions,
    /// What a writer's lock is on.
    pub(super) locked: OnceLock<LockedFile>,
    state: Mutex<State>,
    /// Looking at the root and changing it take turns, so that a late look undoes nothing.
    disk: Mutex<()>,
    /// Notified when a save has ended, or a task of the series' thread.
    changed: Condvar,
    pub(super) saver: LazyEngine,
    pub(super) loader: LazyEngine,
}

/// What changes.
#[derive(Debug, Default)]
pub(super) struct State {
    /// By number and name; incomplete ones included.
    pub(super) steps: Vec<SeriesStep>,
    /// The names of those that were looked into, beyond listings, and found whole, with their fingerprints before that. It
    /// holds as long as those are the same.
    pub(super) checked: HashMap<String, u64>,
    /// Those that are being read through this object, by name, and how often.
    reading: HashMap<String, usize>,
    pub(super) in_flight: Option<InFlight>,
    /// Tasks that the series' thread has not finished.
    pub(super) tasks: usize,
    failures: Vec<Failure>,
}

/// A save that has not been committed yet.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) info: StepInfo,
    /// The name of its directory, which nobody removes meanwhile.
    pub(super) name: String,
    /// Whether a step has that name already, which is being replaced.
    pub(super) replaces: bool,
    /// `None` until it has been started.
    pub(super) job: Option<SaveJob>,
}

/// What a look into a step finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checked {
    Whole,
    Damaged,
    /// It was removed, or replaced by another.
    Gone,
}

/// Something that went wrong in the background.
#[derive(Debug)]
struct Failure {
    error: Error,
    /// The handle that tells it, too, if there is one.
    slot: Option<Arc<Slot>>,
}

impl Shared {
    pub(super) fn new(root: PathBuf, options: CheckpointerOptions) -> Self {
        let (saver, loader) = (LazyEngine::default(), LazyEngine::default());
        Self {
            root,
            options,
            locked: OnceLock::new(),
            state: Mutex::default(),
            disk: Mutex::default(),
            changed: Condvar::new(),
            saver,
            loader,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else looks at the root or changes it. Taken before the state.
    pub(super) fn disk_turn(&self) -> MutexGuard<'_, ()> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if the writer's lock does not hold any more.
    pub(super) fn check_lock(&self) -> Result<()> {
        self.locked.get().map_or(Ok(()), LockedFile::check)
    }

    /// Waits for a change.
    pub(super) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn notify(&self) {
        self.changed.notify_all();
    }

    /// The engine that saves.
    pub(super) fn save_engine(&self) -> Result<Arc<Engine>> {
        self.saver.of(self.options.engine)
    }

    /// The engine that loads: it does not wait for a save.
    pub(super) fn load_engine(&self) -> Result<Arc<Engine>> {
        self.loader.of(self.options.engine)
    }

    /// Whether a directory of this name is one of the series', or is to become one.
    pub(super) fn is_ours(&self, name: &str) -> bool {
        self.options.names.step(final_name(name)).is_some()
    }

    /// Looks at the root again.
    pub(super) fn reload(&self) -> Result<()> {
        let _turn = self.disk_turn();
        let found = scan(&self.root, &|name| self.is_ours(name))?;
        let mut state = self.lock();
        // Those that were found damaged are looked into again; of the others the fingerprints tell.
        let whole: HashSet<&str> = found.iter().filter(|step| step.is_whole()).map(|step| step.name.as_str()).collect();
        state.checked.retain(|name, _| whole.contains(name.as_str()));
        state.steps = found;
        Ok(())
    }

    /// Takes a step in that has just been committed, or has changed.
    pub(super) fn look_at(&self, name: &str) -> Result<()> {
        let _turn = self.disk_turn();
        let found = scan(&self.root, &|other| other == name)?;
        let mut state = self.lock();
        state.steps.retain(|step| step.name != name);
        state.checked.remove(name);
        state.steps.extend(found);
        state.steps.sort_by(|a, b| (a.step, &a.name).cmp(&(b.step, &b.name)));
        Ok(())
    }

    /// Looks into a step, beyond listings, unless that was done before and nothing of it has changed since. If it is not whole,
    /// the reason is kept and logged; but what was missed in a directory that was replaced meanwhile says nothing about the one
    /// that has its name now.
    pub(super) fn check(&self, step: &SeriesStep) -> Result<Checked> {
        let known = {
            let state = self.lock();
            match state.steps.iter().find(|have| have.is_same_as(step)) {
                Some(have) if !have.is_whole() => return Ok(Checked::Damaged),
                Some(_) => state.checked.get(&step.name).copied(),
                None => return Ok(Checked::Gone),
            }
        };
        let before = step.fingerprint();
        if known.is_some() && known == before {
            return Ok(Checked::Whole);
        }
        let is_known = step.is_same();
        let damage = step.judge(&self.root, self.options.verify_data, &self.options.engine);
        if !step.path.exists() {
            self.lock().steps.retain(|have| !have.is_same_as(step));
            return Ok(Checked::Gone);
        }
        let damage = damage?;
        if !is_known || !step.is_same() || step.fingerprint() != before {
            return Ok(if damage.is_none() && is_known { Checked::Whole } else { Checked::Gone });
        }
        if let Some(reason) = &damage {
            tracing::warn!(step = step.step, path = %step.path.display(), %reason, "passing over a step that is not whole");
        }
        let mut state = self.lock();
        let Some(index) = state.steps.iter().position(|have| have.is_same_as(step)) else { return Ok(Checked::Gone) };
        let Some(reason) = damage else {
            state.checked.extend(before.map(|fingerprint| (step.name.clone(), fingerprint)));
            return Ok(Checked::Whole);
        };
        state.steps[index].state = StepState::Incomplete(reason);
        state.checked.remove(&step.name);
        Ok(Checked::Damaged)
    }

    /// Keeps a failure until somebody is told.
    pub(super) fn fail(&self, error: Error, slot: Option<Arc<Slot>>) {
        self.lock().failures.push(Failure { error, slot });
    }

    /// What has failed since somebody was told, as one error.
    pub(super) fn failure(&self) -> Option<Error> {
        let failures = std::mem::take(&mut self.lock().failures);
        let untold = failures.into_iter().filter(|failure| !failure.slot.as_ref().is_some_and(|slot| slot.is_seen()));
        Error::merged(untold.map(|failure| failure.error))
    }
}

impl State {
    /// The steps that policies see: the whole ones, and the one that is being saved.
    pub(super) fn history(&self) -> Vec<StepInfo> {
        let whole = self.steps.iter().filter(|step| step.is_whole()).map(SeriesStep::info);
        let mut history: Vec<StepInfo> = whole.chain(self.in_flight.iter().map(|save| save.info.clone())).collect();
        history.sort_by_key(|info| info.step);
        history
    }

    /// Whether a save to a directory of this name has not been committed, as far as is known.
    pub(super) fn is_saved(&self, name: &str) -> bool {
        self.in_flight.as_ref().is_some_and(|save| save.name == name)
    }

    /// Whether a step is being read through this object.
    pub(super) fn is_read(&self, name: &str) -> bool {
        self.reading.contains_key(name)
    }
}

/// A step that is being read: it is not removed as long as this lives.
#[derive(Debug)]
pub(super) struct Reading {
    shared: Arc<Shared>,
    name: String,
}

impl Reading {
    /// Begins to read a step, if the series still has it. One that is being replaced is read when it has been.
    pub(super) fn begin(shared: &Arc<Shared>, name: &str) -> Option<Self> {
        let mut state = shared.lock();
        while state.in_flight.as_ref().is_some_and(|save| save.replaces && save.name == name) {
            state = shared.wait(state);
        }
        if !state.steps.iter().any(|step| step.name == name) {
            return None;
        }
        *state.reading.entry(name.to_owned()).or_default() += 1;
        Some(Self { shared: Arc::clone(shared), name: name.to_owned() })
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if let Some(count) = state.reading.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                state.reading.remove(&self.name);
            }
        }
    }
}

/// An engine that is made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct LazyEngine(Mutex<Option<Arc<Engine>>>);

impl LazyEngine {
    fn of(&self, options: crate::tree::EngineOptions) -> Result<Arc<Engine>> {
        let mut engine = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*engine {
            Some(engine) => Ok(Arc::clone(engine)),
            None => Ok(Arc::clone(engine.insert(Arc::new(Engine::new(options)?)))),
        }
    }

    /// Lets go of it; its threads end once nobody uses it.
    pub(super) fn end(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// The step as a history has it from the moment its save starts.
pub(super) fn starting(step: u64, metrics: Option<&serde_json::Value>) -> StepInfo {
    StepInfo { step, time: SystemTime::now(), metrics: metrics.cloned().map(Arc::new) }
}
