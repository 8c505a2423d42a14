//! Saving a step: the save policy, one save at a time, and who is told of failures.

use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use super::checkpointer::Checkpointer;
use super::handle::{Slot, StepSave};
use super::options::{StepOptions, WhenBusy};
use super::root::{SeriesStep, is_temporary};
use super::save_policy::SaveContext;
use super::shared::{Checked, InFlight, State, starting};
use super::worker::{Finish, Task, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::STEP_GONE_RETRIES_MAX;
use crate::tree::save::{SaveOptions, SaveReport, Tree, TreeItem};

/// What comes of asking for a save.
struct Submitted {
    save: Option<StepSave>,
    /// What failed before and nobody was told.
    earlier: Option<Error>,
}

impl Checkpointer {
    /// Whether a save of this step would be started now, by the save policy.
    pub fn should_save(&self, step: u64) -> bool {
        self.why_not(step).is_none()
    }

    /// Why a save of this step would be skipped; `None` if it would be started.
    pub fn why_not(&self, step: u64) -> Option<String> {
        if self.worker.is_none() {
            return Some("the series was opened read-only".to_owned());
        }
        let saving = self.is_saving();
        // A save would tell the error.
        self.skipped(step, saving)
            .unwrap_or_else(|error| Some(format!("the latest step cannot be looked into: {error}")))
    }

    /// The reason to skip a save of this step, which would begin while another is going on or not.
    fn skipped(&self, step: u64, saving: bool) -> Result<Option<String>> {
        let shared = &self.shared;
        self.look_into(|have| have.step >= step)?;
        let history = shared.lock().history();
        if let Some(last) = history.last().filter(|last| last.step >= step) {
            return Ok(Some(format!("it does not come after the latest step, {}", last.step)));
        }
        let context = SaveContext { step, now: SystemTime::now(), saving };
        let policy = &shared.options.save_policy;
        Ok((!policy.saves(&history, &context)).then(|| format!("the save policy {policy:?} does not save it")))
    }

    /// Looks into the latest of these steps, until one is whole: those that are damaged stand in no save's way.
    fn look_into(&self, wanted: impl Fn(&SeriesStep) -> bool) -> Result<()> {
        let shared = &self.shared;
        let wanted = |step: &&SeriesStep| step.is_whole() && wanted(step);
        for _ in 0..=STEP_GONE_RETRIES_MAX {
            let steps: Vec<SeriesStep> = shared.lock().steps.iter().rev().filter(wanted).cloned().collect();
            let mut is_old = false;
            for step in steps {
                match shared.check(&step)? {
                    Checked::Whole => return Ok(()),
                    Checked::Damaged => {}
                    Checked::Gone => is_old = true,
                }
            }
            if !is_old {
                break;
            }
            shared.reload()?;
        }
        Ok(())
    }

    /// Saves a tree as the item `state` of a step, and blocks until the step is in place; a save that is going on is waited for
    /// first. `None` if it was skipped, by the save policy or because a later whole step exists; [`why_not`](Self::why_not) has
    /// the reason. A step of that number that is not whole is replaced once the new one is. Steps that are no longer preserved
    /// are removed after that, in the background.
    ///
    /// A series that a `CheckpointManager` began with `args.StandardSave(..)` has the item `default`: [`save_items`](Self::save_items)
    /// of that name goes on with it so that the manager restores these steps as it does its own.
    ///
    /// # Errors
    /// The step exists and is not to be overwritten; leaves that cannot be saved; whatever the file system refuses. Also what
    /// failed in the background before and was not told yet: this step is saved all the same.
    pub fn save(&self, step: u64, tree: &Tree, options: &StepOptions) -> Result<Option<SaveReport>> {
        self.save_items(step, &[(STATE_ITEM.to_owned(), TreeItem::Tree(tree.clone()))], options)
    }

    /// The same with several items.
    ///
    /// # Errors
    /// As [`save`](Self::save), and names that cannot be items'.
    pub fn save_items(
        &self,
        step: u64,
        items: &[(String, TreeItem)],
        options: &StepOptions,
    ) -> Result<Option<SaveReport>> {
        let Submitted { save, earlier } = self.submit(step, items, options, true)?;
        let result = save.map(StepSave::wait).transpose();
        match (result, earlier) {
            (result, None) => result,
            (Ok(_), Some(earlier)) => Err(earlier.hint(format!("step {step} is saved all the same"))),
            (Err(error), Some(earlier)) => Err(merged(earlier, error)),
        }
    }

    /// Starts saving a tree as the item `state` of a step. The tree is checked in this call, and shared: the caller may change or
    /// drop what it has at once. `None` if it was skipped, by the save policy, because a later step exists, or because another
    /// save is going on and [`when_busy`](super::CheckpointerOptions::when_busy) says so.
    ///
    /// # Errors
    /// As [`save`](Self::save), but for what comes later: the handle tells that.
    pub fn save_async(&self, step: u64, tree: &Tree, options: &StepOptions) -> Result<Option<StepSave>> {
        self.save_items_async(step, &[(STATE_ITEM.to_owned(), TreeItem::Tree(tree.clone()))], options)
    }

    /// The same with several items.
    ///
    /// # Errors
    /// As [`save_async`](Self::save_async), and names that cannot be items'.
    pub fn save_items_async(
        &self,
        step: u64,
        items: &[(String, TreeItem)],
        options: &StepOptions,
    ) -> Result<Option<StepSave>> {
        let Submitted { save, earlier } = self.submit(step, items, options, false)?;
        match earlier {
            None => Ok(save),
            Some(earlier) => {
                Err(earlier.hint(format!("the save of step {step} was started all the same; `wait` tells how it ends")))
            }
        }
    }

    /// Starts a save. One whose caller `blocks` waits for the one that is going on; others do what the options say.
    fn submit(
        &self,
        step: u64,
        items: &[(String, TreeItem)],
        options: &StepOptions,
        blocks: bool,
    ) -> Result<Submitted> {
        let worker = self.writer()?;
        let shared = &self.shared;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.look_into(|have| have.step == step)?;
        let existing = self.existing(&shared.lock(), step, options.overwrite)?;
        // What is to be overwritten is there because a policy once saved it.
        let asked = options.force || (options.overwrite && existing.is_some());
        let saving = !blocks && self.is_saving();
        if let Some(why) = self.skipped(step, saving)?.filter(|_| !asked) {
            tracing::debug!(step, %why, "a step is not saved");
            return Ok(Submitted { save: None, earlier: None });
        }
        // Who blocks waits anyway, and what may be the last save is not skipped.
        let must = blocks || options.force || shared.options.save_policy.signalled();
        let mut state = shared.lock();
        while let Some(save) = &state.in_flight {
            match shared.options.when_busy {
                WhenBusy::Skip if !must => {
                    tracing::debug!(step, "a step is not saved: another save is going on");
                    return Ok(Submitted { save: None, earlier: None });
                }
                WhenBusy::Error if !must => {
                    return Err(Error::new(ErrorKind::Busy, "another step is being saved")
                        .at("step", step)
                        .found(format_args!("a save of step {}", save.info.step)));
                }
                _ => state = shared.wait(state),
            }
        }
        drop(state);
        let (name, replaces) = self.claim(step, options)?;
        let earlier = shared.failure();
        match self.start(worker, (step, name, replaces), items, options) {
            Ok(save) => Ok(Submitted { save: Some(save), earlier }),
            Err(error) => {
                shared.lock().in_flight = None;
                shared.notify();
                let error = error.at("step", step);
                Err(match earlier {
                    Some(earlier) => merged(earlier, error),
                    None => error,
                })
            }
        }
    }

    /// Says that a step is going to be saved, and gives the name of its directory and whether that is replaced. From then on nobody removes or begins to read
    /// what has that name: removals take the same turn, from their last look at what they remove to its rename.
    fn claim(&self, step: u64, options: &StepOptions) -> Result<(String, bool)> {
        let shared = &self.shared;
        let _turn = shared.disk_turn();
        let mut state = shared.lock();
        // It may have been removed, or saved, meanwhile.
        let existing = self.existing(&state, step, options.overwrite)?;
        let replaces = existing.is_some();
        let name = existing.unwrap_or_else(|| shared.options.names.name(step));
        if state.is_read(&name) {
            return Err(
                Error::new(ErrorKind::Busy, "the step that is to be overwritten is being read").at("step", step)
            );
        }
        let info = starting(step, options.metrics.as_ref());
        state.in_flight = Some(InFlight { info, name: name.clone(), replaces, job: None });
        Ok((name, replaces))
    }

    fn start(
        &self,
        worker: &Worker,
        (step, name, replaces): (u64, String, bool),
        items: &[(String, TreeItem)],
        options: &StepOptions,
    ) -> Result<StepSave> {
        let shared = &self.shared;
        let save = SaveOptions {
            custom_metadata: options.custom_metadata.clone().or_else(|| shared.options.save.custom_metadata.clone()),
            metrics: options.metrics.clone(),
            // What has the name and is no step is nobody's to replace.
            overwrite: replaces,
            ..shared.options.save.clone()
        };
        let job = shared.save_engine()?.save_items(shared.root.join(&name), items, &save)?;
        let slot = Arc::new(Slot::default());
        if let Some(save) = &mut shared.lock().in_flight {
            save.job = Some(job.share());
        }
        let handle = StepSave { step, job: job.share(), slot: Arc::clone(&slot) };
        worker.send(shared, Task::Finish(Finish { step, name, job, slot }))?;
        Ok(handle)
    }

    /// The name of the directory that a step has already, which is an error unless it may be overwritten or is not whole.
    fn existing(&self, state: &State, step: u64, overwrite: bool) -> Result<Option<String>> {
        let exists = |what: &str| Error::new(ErrorKind::Exists, what).at("step", step);
        if state.in_flight.as_ref().is_some_and(|save| save.info.step == step) && !overwrite {
            return Err(exists("the step is being saved already"));
        }
        let have = state.steps.iter().rev().find(|have| have.step == step && !is_temporary(&have.name));
        match (have, overwrite) {
            (None, _) => Ok(None),
            (Some(have), true) => Ok(Some(have.name.clone())),
            // The series goes on past what is damaged.
            (Some(have), false) if !have.is_whole() => Ok(Some(have.name.clone())),
            (Some(_), false) => Err(exists("the step exists")
                .at("root", self.shared.root.display())
                .hint("overwrite it, or resume after the latest step")),
        }
    }

    /// Whether a save is going on.
    pub fn is_saving(&self) -> bool {
        self.shared.lock().in_flight.is_some()
    }

    /// Asks the save that is going on to stop; what it wrote is removed. Returns whether there was one.
    pub fn cancel(&self) -> bool {
        let state = self.shared.lock();
        let job = state.in_flight.as_ref().and_then(|save| save.job.as_ref());
        job.inspect(|job| job.cancel()).is_some()
    }

    /// Blocks until nothing is going on in the background: saves, removals, tidying up.
    ///
    /// # Errors
    /// What failed in the background and was not told yet.
    pub fn wait(&self) -> Result<()> {
        let mut state = self.shared.lock();
        while state.tasks > 0 {
            state = self.shared.wait(state);
        }
        drop(state);
        self.shared.failure().map_or(Ok(()), Err)
    }

    /// Waits, and ends the object: its threads and its lock.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn close(self) -> Result<()> {
        self.wait()
    }
}

/// Two failures as one; the first says what to do.
fn merged(earlier: Error, error: Error) -> Error {
    Error::merged([earlier, error]).unwrap_or_else(|| Error::bug("two errors are none"))
}

/// The item that Orbax's `save` writes and its `load` looks for first.
const STATE_ITEM: &str = "state";
