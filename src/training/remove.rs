//! Removing steps so that a crash at any moment leaves whole steps or leftovers, and nothing between.
//!
//! ```text
//!   1000 ── rename ──► 1000.orbax-checkpoint-tmp-touchdown-..  ── root synced ──► files removed one by one
//!           one step: no reader takes it for a step any more;      a crash from here on leaves what the next
//!           the rename is durable before a file of it is gone      writer's start, or anybody, removes
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::history::StepInfo;
use super::lock::WriterLock;
use super::names::{StepNames, prefix};
use super::preservation::{PreservationPolicy, removable};
use super::root::{SeriesStep, final_name, recover, refuse_checkpoint, scan, steps};
use super::shared::{Checked, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::io::LocalStore;
use crate::io::store::{Store, deleted_name, remove_tree};
use crate::layout::StepState;
use crate::tree::EngineOptions;

/// Takes a directory out of the series: one rename, durable if `sync`. Gives where it is now.
pub(super) fn set_aside(store: &dyn Store, dir: &Path, sync: bool) -> Result<PathBuf> {
    let aside = deleted_name(dir)?;
    store.rename_new(dir, &aside).map_err(|error| failed(error, dir))?;
    if let (true, Some(root)) = (sync, dir.parent()) {
        store.sync_dir(root).map_err(|error| failed(error, dir))?;
    }
    Ok(aside)
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
    Error::new(ErrorKind::Io, "cannot remove a step").at("path", path.display()).caused_by(error)
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
        let aside = set_aside(store, &step.path, sync);
        drop(turn);
        match aside {
            Ok(aside) => remove_aside(store, &aside),
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
fn decide(policy: &PreservationPolicy, whole: &[SeriesStep]) -> Result<Vec<bool>> {
    let infos: Vec<StepInfo> = whole.iter().map(SeriesStep::info).collect();
    catch_unwind(AssertUnwindSafe(|| policy.keeps(&infos, SystemTime::now())))
        .map_err(|_| Error::invalid("the preservation policy panicked; every step is kept"))
}

/// How a root is pruned.
#[derive(Clone, Debug)]
pub struct Pruning {
    /// Which steps stay.
    pub policy: PreservationPolicy,
    /// The prefix of the steps' names, for a root with several series; `None` for the only one.
    pub prefix: Option<String>,
    /// Only say what would be removed.
    pub dry_run: bool,
    /// How steps are looked into.
    pub engine: EngineOptions,
    /// Where they are removed.
    pub store: Arc<dyn Store>,
}

impl Default for Pruning {
    fn default() -> Self {
        let (policy, engine, store) = (PreservationPolicy::default(), EngineOptions::default(), Arc::new(LocalStore));
        Self { policy, prefix: None, dry_run: false, engine, store }
    }
}

/// What pruning did, or would do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PruneReport {
    /// The whole steps that stay.
    pub kept: Vec<SeriesStep>,
    /// Those that are removed, with the bytes of their files.
    pub removed: Vec<(SeriesStep, u64)>,
    /// Those that are not whole. They do not count, and stay.
    pub skipped: Vec<SeriesStep>,
    /// What crashes had left behind, and is removed, too.
    pub leftovers: Vec<PathBuf>,
}

/// Removes the steps of a root that a policy does not preserve; see [`PreservationPolicy`]. It takes the root's lock, so that it
/// does not run beside a writer of this library; a dry run only reads.
///
/// # Errors
/// Kind `Busy` if another writer has the root; several series and no prefix; what cannot be read or removed.
pub fn prune(root: impl AsRef<Path>, pruning: &Pruning) -> Result<PruneReport> {
    let (root, store) = (root.as_ref(), &*pruning.store);
    pruning.policy.check()?;
    refuse_checkpoint(root)?;
    let names = series_names(root, &scan(root, &|_| true)?, pruning.prefix.as_deref())?;
    let mut report = PruneReport::default();
    let _lock = if pruning.dry_run { None } else { Some(WriterLock::take(root)?) };
    if !pruning.dry_run {
        // What is there now that nobody else writes.
        report.leftovers = recover(store, root, &names)?;
        for leftover in &report.leftovers {
            remove_aside(store, leftover)?;
        }
    }
    let mut found = steps(root, false, &pruning.engine)?;
    found.retain(|step| names.step(final_name(&step.name)).is_some());
    for step in found.iter_mut().filter(|step| step.is_link()) {
        step.state = StepState::Incomplete("it is a symbolic link".to_owned());
    }
    let (whole, skipped): (Vec<_>, Vec<_>) = found.into_iter().partition(SeriesStep::is_whole);
    report.skipped = skipped;
    let kept = decide(&pruning.policy, &whole)?;
    let gone = removable(&kept, |_| false);
    for (index, step) in whole.into_iter().enumerate() {
        if !gone.contains(&index) {
            report.kept.push(step);
            continue;
        }
        let bytes = step.size_bytes()?;
        if !pruning.dry_run {
            remove_aside(store, &set_aside(store, &step.path, true)?)?;
        }
        report.removed.push((step, bytes));
    }
    Ok(report)
}

/// The names of the series that is meant.
fn series_names(root: &Path, found: &[SeriesStep], wanted: Option<&str>) -> Result<StepNames> {
    let mut prefixes: Vec<Option<&str>> = found.iter().map(|step| prefix(final_name(&step.name))).collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    if let Some(wanted) = wanted {
        let wanted = Some(wanted).filter(|prefix| !prefix.is_empty());
        prefixes.retain(|prefix| *prefix == wanted);
    }
    match prefixes[..] {
        [] => Err(Error::not_found("the directory holds no steps").at("path", root.display())),
        [one] => Ok(StepNames { prefix: one.map(str::to_owned), digits: 0 }),
        _ => {
            let shown =
                prefixes.iter().map(|prefix| prefix.map_or("no prefix".to_owned(), |prefix| format!("`{prefix}`")));
            Err(Error::invalid("the root holds several series of steps")
                .at("path", root.display())
                .found(shown.collect::<Vec<_>>().join(", "))
                .hint("say which one: --prefix NAME, or --prefix '' for the steps without one"))
        }
    }
}
