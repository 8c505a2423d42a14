//! Removing steps so that a crash at any moment leaves whole steps or leftovers, and nothing between.
//!
//! ```text
//!   1000 ── rename ──► 1000.orbax-checkpoint-tmp-touchdown-..  ── root synced ──► files removed one by one
//!           one step: no reader takes it for a step any more;      a crash from here on leaves what the next
//!           the rename is durable before a file of it is gone      writer's start, or anybody, removes
//! ```

use std::io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::history::StepInfo;
use super::preservation::{PreservationPolicy, removable};
use super::root::{Identity, SeriesStep};
use super::shared::{Checked, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::{Store, deleted_name, remove_tree};

/// Takes a directory out of the series: one rename. Gives where it is now.
fn set_aside(store: &dyn Store, dir: &Path) -> Result<PathBuf> {
    let aside = deleted_name(dir)?;
    store.rename_new(dir, &aside).map_err(|error| failed(error, dir))?;
    Ok(aside)
}

/// The same for a step that was judged. `None` if another has its name by now, which stays, or nobody.
pub(super) fn set_judged_aside(store: &dyn Store, step: &SeriesStep) -> Result<Option<PathBuf>> {
    if !step.is_same() {
        return Ok(None);
    }
    let aside = set_aside(store, &step.path)?;
    if Identity::of(&aside) == step.identity {
        return Ok(Some(aside));
    }
    // Another has come in between: it gets its name back.
    store.rename_new(&aside, &step.path).map_err(|error| {
        failed(error, &step.path).hint(format!("what came in its place meanwhile is at {}", aside.display()))
    })?;
    Ok(None)
}

/// Removes a step that was set aside; if `sync`, once that is durable.
pub(super) fn remove_set_aside(store: &dyn Store, step: &SeriesStep, aside: &Path, sync: bool) -> Result<()> {
    if let (true, Some(root)) = (sync, step.path.parent()) {
        store.sync_dir(root).map_err(|error| failed(error, aside))?;
    }
    remove_aside(store, aside)
}

/// Removes what was set aside, or left over.
pub(super) fn remove_aside(store: &dyn Store, aside: &Path) -> Result<()> {
    let removed = match std::fs::symlink_metadata(aside) {
        Ok(metadata) if !metadata.is_dir() => store.remove_file(aside),
        _ => remove_tree(store, aside),
    };
    removed.map_err(|error| {
        failed(error, aside).hint("it is no step any more; the next start of a writer tries again to remove it")
    })
}

fn failed(error: std::io::Error, path: &Path) -> Error {
    let what = match error.kind() {
        StorageFull | QuotaExceeded => "cannot remove a step: no space is left on the device",
        ReadOnlyFilesystem => "cannot remove a step: the file system is read-only",
        _ => "cannot remove a step",
    };
    Error::new(ErrorKind::Io, what).at("path", path.display()).caused_by(error)
}

impl Shared {
    /// What the policy would remove of the whole steps now, and those that would stay. Every step is judged anew: what was whole
    /// once may be damaged, or another one.
    pub(super) fn judged(&self, policy: &PreservationPolicy) -> Result<Judged> {
        let listed = || self.lock().steps.iter().filter(|step| step.is_whole()).cloned().collect::<Vec<SeriesStep>>();
        for step in listed().iter().filter(|step| !step.is_same()) {
            self.look_at(&step.name)?;
        }
        let mut listed = listed();
        // Of a step and a link to it, one must not be kept in place of the other.
        listed.retain(|step| !step.is_link());
        let mut whole = Vec::new();
        for step in listed {
            // A step that is damaged must not count for one that is whole.
            if self.check(&step)? == Checked::Whole {
                whole.push(step);
            }
        }
        let kept = decide(policy, &whole)?;
        let state = self.lock();
        let gone = removable(&kept, |index| state.is_read(&whole[index].name) || state.is_saved(&whole[index].name));
        let (mut stay, mut go) = (Vec::new(), Vec::new());
        for (index, step) in whole.into_iter().enumerate() {
            if gone.contains(&index) { go.push(step) } else { stay.push(step) }
        }
        Ok(Judged { stay, go })
    }

    /// Removes what the policy does not preserve, the oldest first, as long as a step that stays is whole. What is being read, or
    /// has become another step since it was judged, stays until the next time.
    pub(super) fn retain(&self) -> Result<()> {
        let policy = &self.options.preservation;
        if policy.keeps_all() {
            return Ok(());
        }
        let mut errors = Vec::new();
        let Judged { stay, go } = self.judged(policy)?;
        for step in go {
            // As many are removed, it may take long.
            if !self.has_whole(&stay)? {
                break;
            }
            self.check_lock()?;
            errors.extend(self.remove(&step, false).err());
        }
        Error::merged(errors).map_or(Ok(()), Err)
    }

    /// Whether one of these is whole still; the latest is most likely to be.
    fn has_whole(&self, steps: &[SeriesStep]) -> Result<bool> {
        for step in steps.iter().rev() {
            if self.check(step)? == Checked::Whole {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes one step. If somebody reads it through this object, that is an error, or with `!asked` a reason to leave it.
    pub(super) fn remove(&self, step: &SeriesStep, asked: bool) -> Result<()> {
        let turn = self.disk_turn();
        {
            let mut state = self.lock();
            let busy = match (state.is_read(&step.name), state.is_saved(&step.name)) {
                (true, _) => Some("the step is being read"),
                (_, true) => Some("the step is being saved"),
                _ => None,
            };
            match busy {
                Some(why) if asked => return Err(Error::new(ErrorKind::Busy, why).at("step", &step.name)),
                Some(_) => return Ok(()),
                // It is not the one that was judged. Saves take the same turn to claim a name.
                None if !asked && !step.is_same() => return Ok(()),
                None => {}
            }
            // From here on nobody can begin to read it through this object.
            state.steps.retain(|have| have.name != step.name);
            state.checked.remove(&step.name);
        }
        let (store, sync) = (&*self.options.save.store, self.options.save.sync);
        let aside = match asked {
            true => set_aside(store, &step.path).map(Some),
            false => set_judged_aside(store, step),
        };
        drop(turn);
        match aside {
            Ok(Some(aside)) => remove_set_aside(store, step, &aside, sync),
            Ok(None) => self.look_at(&step.name),
            // Somebody else removed it.
            Err(_) if !step.path.exists() => Ok(()),
            Err(error) => {
                // It is still there.
                self.look_at(&step.name).and(Err(error))
            }
        }
    }
}

/// What retention would do.
pub(super) struct Judged {
    /// Whole steps that stay.
    pub(super) stay: Vec<SeriesStep>,
    /// Whole steps that are removed.
    pub(super) go: Vec<SeriesStep>,
}

/// What a policy says of these steps; one that panics keeps everything.
pub(super) fn decide(policy: &PreservationPolicy, whole: &[SeriesStep]) -> Result<Vec<bool>> {
    let infos: Vec<StepInfo> = whole.iter().map(SeriesStep::info).collect();
    catch_unwind(AssertUnwindSafe(|| policy.keeps(&infos, SystemTime::now())))
        .map_err(|_| Error::invalid("the preservation policy panicked; every step is kept"))
}
