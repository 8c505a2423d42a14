//! Pruning a root from outside: what a policy does not preserve is removed once, without a series being open.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::lock::WriterLock;
use super::names::{StepNames, prefix};
use super::preservation::{PreservationPolicy, removable};
use super::recovery::Recovery;
use super::remove::{decide, remove_aside, remove_set_aside, set_judged_aside};
use super::root::{SeriesStep, final_name, refuse_checkpoint, scan, scan_renamed};
use crate::error::{Error, ErrorKind, Result};
use crate::io::LocalStore;
use crate::io::store::{Store, leftovers};
use crate::layout::StepState;
use crate::layout::orbax::step;
use crate::tree::EngineOptions;

/// How a root is pruned.
#[derive(Clone, Debug)]
pub struct Pruning {
    /// Which steps stay.
    pub policy: PreservationPolicy,
    /// The prefix of the steps' names, for a root with several series; `None` for the only one.
    pub prefix: Option<String>,
    /// Only say what would be done.
    pub dry_run: bool,
    /// How steps are looked into.
    pub engine: EngineOptions,
    /// Where they are removed.
    pub store: Arc<dyn Store>,
    /// Set it to end pruning before the next step.
    pub stop: Arc<AtomicBool>,
}

impl Default for Pruning {
    fn default() -> Self {
        let (policy, engine, store) = (PreservationPolicy::default(), EngineOptions::default(), Arc::new(LocalStore));
        Self { policy, prefix: None, dry_run: false, engine, store, stop: Arc::default() }
    }
}

/// What pruning did, or would do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PruneReport {
    /// The whole steps that stay.
    pub kept: Vec<SeriesStep>,
    /// Those that are removed, with the bytes of their files.
    pub removed: Vec<(SeriesStep, u64)>,
    /// Those that are not whole, and those that became another while they were judged. They do not count, and stay.
    pub skipped: Vec<SeriesStep>,
    /// The steps that an interrupted overwrite had moved aside, which get their names back, and are judged like the others.
    pub restored: Vec<PathBuf>,
    /// What crashes had left behind, and is removed, too.
    pub leftovers: Vec<PathBuf>,
    /// What could not be removed, and why. Steps among them are steps no more, or stay in [`kept`](Self::kept).
    pub failed: Vec<(PathBuf, String)>,
}

/// Removes the steps of a root that a policy does not preserve; see [`PreservationPolicy`]. It takes the root's lock, so that it
/// does not run beside a writer of this library; a dry run only reads, and tells what would be done. What cannot be removed is
/// reported, and does not keep the rest from it.
///
/// # Errors
/// Kind `Busy` if another writer has the root; several series and no prefix; what cannot be read. Kind `Cancelled` if it was
/// stopped: steps that were not removed by then are as they were.
pub fn prune(root: impl AsRef<Path>, pruning: &Pruning) -> Result<PruneReport> {
    let root = root.as_ref();
    pruning.policy.check()?;
    refuse_checkpoint(root)?;
    let names = series_names(root, pruning.prefix.as_deref())?;
    let _lock = if pruning.dry_run { None } else { Some(WriterLock::take(root)?) };
    let mut report = PruneReport::default();
    let found = report.recover(root, &names, pruning)?;
    let whole = report.judge(found, &pruning.engine)?;
    let steps: Vec<SeriesStep> = whole.iter().map(|whole| whole.step.clone()).collect();
    let gone = removable(&decide(&pruning.policy, &steps)?, |_| false);
    let (mut stay, mut go) = (Vec::new(), Vec::new());
    for (index, whole) in whole.into_iter().enumerate() {
        if gone.contains(&index) { go.push(whole.step) } else { stay.push(whole) }
    }
    for step in go {
        if pruning.stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, "pruning was stopped").at("step", &step.name));
        }
        let bytes = step.size_bytes().unwrap_or_default();
        if pruning.dry_run {
            report.removed.push((step, bytes));
        } else if has_whole(root, &stay, &pruning.engine)? {
            report.remove(step, bytes, &*pruning.store);
        } else {
            report.kept.push(step);
        }
    }
    report.kept.extend(stay.into_iter().map(|whole| whole.step));
    report.kept.sort_by(|a, b| (a.step, &a.name).cmp(&(b.step, &b.name)));
    Ok(report)
}

/// A step that was whole when its files were as this fingerprint says.
struct Whole {
    step: SeriesStep,
    fingerprint: Option<u64>,
}

impl PruneReport {
    /// Deals with what crashes have left, and gives the steps that there are then, by their listings.
    fn recover(&mut self, root: &Path, names: &StepNames, pruning: &Pruning) -> Result<Vec<SeriesStep>> {
        let (found, store) = (Recovery::find(root, names)?, &*pruning.store);
        let (renamed, recovery) = match pruning.dry_run {
            true => (found.renamed(root), found),
            false => (Vec::new(), found.put_back(store)?),
        };
        let is_left = |name: &str| recovery.left.iter().any(|left| *left == root.join(name));
        let is_ours = |name: &str| names.step(final_name(name)).is_some() && !is_left(name);
        let steps = scan_renamed(root, &is_ours, &renamed)?;
        for left in &recovery.left {
            let removed = if pruning.dry_run { Ok(()) } else { remove_aside(store, left) };
            match removed {
                Ok(()) => self.leftovers.push(left.clone()),
                Err(error) => self.failed.push((left.clone(), reason(&error))),
            }
        }
        self.restored = recovery.put_back.into_iter().map(|(_, name)| name).collect();
        Ok(steps)
    }

    /// Gives the steps that are whole; the others are passed over.
    fn judge(&mut self, found: Vec<SeriesStep>, engine: &EngineOptions) -> Result<Vec<Whole>> {
        let mut whole = Vec::new();
        for mut step in found {
            let fingerprint = step.fingerprint();
            if step.is_link() {
                step.state = StepState::Incomplete("it is a symbolic link".to_owned());
            } else if step.is_whole()
                && let Some(reason) = step.damage(false, engine)?
            {
                step.state = StepState::Incomplete(reason);
            }
            match step.is_whole() {
                true => whole.push(Whole { step, fingerprint }),
                false => self.skipped.push(step),
            }
        }
        Ok(whole)
    }

    /// Removes a step, if it is still the one that was judged.
    fn remove(&mut self, mut step: SeriesStep, bytes: u64, store: &dyn Store) {
        match set_judged_aside(store, &step) {
            Ok(Some(aside)) => {
                if let Err(error) = remove_set_aside(store, &step, &aside, true) {
                    self.failed.push((aside, reason(&error)));
                }
                self.removed.push((step, bytes));
            }
            // Somebody else has removed it.
            _ if !step.path.exists() => {}
            Ok(None) => {
                step.state = StepState::Incomplete("another came in its place while it was judged".to_owned());
                self.skipped.push(step);
            }
            Err(error) => {
                self.failed.push((step.path.clone(), reason(&error)));
                self.kept.push(step);
            }
        }
    }
}

/// Whether one of the steps that stay is whole still: as many are removed, it may take long. The latest is most likely to be.
fn has_whole(root: &Path, stay: &[Whole], engine: &EngineOptions) -> Result<bool> {
    for Whole { step, fingerprint } in stay.iter().rev() {
        let is_untouched = fingerprint.is_some() && step.fingerprint() == *fingerprint;
        if is_untouched || step.judge(root, false, engine)?.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// An error in one line, with its cause.
fn reason(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// The names of the series that is meant.
fn series_names(root: &Path, wanted: Option<&str>) -> Result<StepNames> {
    let steps = scan(root, &|_| true)?;
    // A step that was being replaced counts by the name that it gets back.
    let aside = leftovers(root).map_err(|error| {
        Error::new(ErrorKind::Io, "cannot list the root of the steps").at("path", root.display()).caused_by(error)
    })?;
    let aside = aside.iter().map(|leftover| leftover.name.as_str()).filter(|name| step::parse(name).is_some());
    let names = steps.iter().map(|step| final_name(&step.name)).chain(aside);
    let mut prefixes: Vec<Option<&str>> = names.map(prefix).collect();
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
