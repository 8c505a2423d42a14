//! What lies in a root: its steps with what they say about themselves, whether they are whole, and the user's metadata.
//!
//! Everything here only reads, and never trusts a step because its neighbour is fine.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::history::StepInfo;
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::{Becomes, StagedDir, Store, is_staging};
use crate::io::{Root, serve};
use crate::layout::orbax::{checkpoint, step};
use crate::layout::series::{self, Listed, Notes};
use crate::layout::{Item, StepState};
use crate::limits::STEP_GONE_RETRIES_MAX;
use crate::need::{Asker, Machine};
use crate::relpath::RelPath;
use crate::tree::EngineOptions;
use crate::tree::verify::damage;

/// A step of a root.
#[derive(Clone, Debug, PartialEq)]
pub struct SeriesStep {
    /// Its number.
    pub step: u64,
    /// The name of its directory.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Whether it is whole, and why not.
    pub state: StepState,
    /// Its items, by name; their directories are relative to the root.
    pub items: Vec<Item>,
    /// When its save began, in nanoseconds since the Unix epoch, where that is recorded.
    pub init_ns: Option<i64>,
    /// When it was committed, in nanoseconds since the Unix epoch, where that is recorded.
    pub commit_ns: Option<i64>,
    /// The user's metadata of the step.
    pub custom_metadata: Option<Value>,
    /// Its metrics; NaN and infinities as strings.
    pub metrics: Option<Arc<Value>>,
    /// Why it has metrics that cannot be read.
    pub metrics_damage: Option<String>,
    /// When it was committed, or its directory last changed.
    pub time: SystemTime,
    /// Which directory it was before it was looked at; `None` if it came later.
    pub(super) identity: Option<Identity>,
}

/// Which directory, of those that have had a name: another one that takes the name differs, and so does one whose own entries
/// have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

impl Identity {
    /// Of what has this path now. Links are not followed.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let found = std::fs::symlink_metadata(path).ok()?;
        Some(Self { device: found.dev(), inode: found.ino(), changed: (found.mtime(), found.mtime_nsec()) })
    }

    /// Whether both are of one directory, whatever has changed in it.
    pub(super) fn is_of(self, other: Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

impl SeriesStep {
    /// Whether it is whole, as far as it was looked at.
    pub fn is_whole(&self) -> bool {
        self.state == StepState::Whole
    }

    /// Why it is not whole.
    pub fn reason(&self) -> Option<&str> {
        match &self.state {
            StepState::Whole => None,
            StepState::Incomplete(reason) => Some(reason),
        }
    }

    /// What policies see of it.
    pub fn info(&self) -> StepInfo {
        StepInfo { step: self.step, time: self.time, metrics: self.metrics.clone() }
    }

    /// Bytes of all files in it.
    ///
    /// # Errors
    /// A directory that cannot be listed.
    pub fn size_bytes(&self) -> Result<u64> {
        size_bytes(&self.path).map_err(|error| {
            Error::new(ErrorKind::Io, "cannot look through a step").at("path", self.path.display()).caused_by(error)
        })
    }

    /// Whether its path still leads to the directory that was looked at.
    pub(super) fn is_same(&self) -> bool {
        self.identity.is_some() && Identity::of(&self.path) == self.identity
    }

    /// Whether a save of it is going on, or was not finished: what is in it changes.
    fn is_unfinished(&self) -> bool {
        is_temporary(&self.name) && self.path.exists()
    }

    /// Whether the other is what was found under the same name in the same directory.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        self.name == other.name && self.identity == other.identity
    }

    /// Whether it is a link to a directory: it can be read, but it is no copy of what it leads to.
    pub(super) fn is_link(&self) -> bool {
        std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.is_symlink())
    }

    /// A number that changes whenever a file in it appears, disappears, or gets another size, time or permission. Links are not
    /// followed. `None` if it cannot be looked through.
    pub(super) fn fingerprint(&self) -> Option<u64> {
        let mut hasher = DefaultHasher::new();
        fingerprint(&self.path, &mut hasher).ok()?;
        Some(hasher.finish())
    }

    /// Why it is not whole now: by its listings, which may have changed since its root was looked at, then by what is in it.
    pub(super) fn judge(&self, root: &Path, data: bool, engine: &EngineOptions) -> Result<Option<String>> {
        let listed = scan(root, &|name| name == self.name)?;
        match listed.first().and_then(Self::reason) {
            Some(reason) => Ok(Some(reason.to_owned())),
            None => self.damage(data, engine),
        }
    }

    /// Looks into it, beyond what listings tell: metadata, manifests and every reference; with `data` all stored values, too.
    /// The reason if it is damaged.
    pub(super) fn damage(&self, data: bool, engine: &EngineOptions) -> Result<Option<String>> {
        damage(&self.path, data, engine).map_err(|error| error.at("step", self.step))
    }
}

/// The steps of a root, of any names, by number and name; unfinished and damaged ones have a reason. Of each, metadata,
/// manifests and references are looked at, with `data` every stored value.
///
/// # Errors
/// No such directory; what cannot be read.
pub fn steps(root: impl AsRef<Path>, data: bool, engine: &EngineOptions) -> Result<Vec<SeriesStep>> {
    let root = root.as_ref();
    let mut steps = Vec::new();
    for step in scan(root, &|_| true)? {
        steps.extend(looked_into(root, step, data, engine)?);
    }
    Ok(steps)
}

/// A step with what a look into it finds: `None` if it was removed meanwhile, and of one that was replaced its successor.
fn looked_into(root: &Path, mut step: SeriesStep, data: bool, engine: &EngineOptions) -> Result<Option<SeriesStep>> {
    for _ in 0..=STEP_GONE_RETRIES_MAX {
        let reason = if step.is_whole() { step.damage(data, engine)? } else { None };
        if step.is_same() || step.is_unfinished() {
            step.state = reason.map_or(step.state, StepState::Incomplete);
            return Ok(Some(step));
        }
        match scan(root, &|name| name == step.name)?.pop() {
            Some(successor) => step = successor,
            None => return Ok(None),
        }
    }
    Ok(Some(step))
}

/// The steps whose directories have a wanted name, judged by their listings and the ends of their metadata files.
pub(super) fn scan(root: &Path, wanted: &(dyn Fn(&str) -> bool + Sync)) -> Result<Vec<SeriesStep>> {
    scan_renamed(root, wanted, &[])
}

/// The same, and these directories of the root as if they had the names that they are to get.
pub(super) fn scan_renamed(
    root: &Path,
    wanted: &(dyn Fn(&str) -> bool + Sync),
    renamed: &[(RelPath, String)],
) -> Result<Vec<SeriesStep>> {
    let is_put_back = |name: &str| renamed.iter().any(|(dir, _)| dir.as_path() == Path::new(name));
    let before = identities(root, &|name| wanted(name) || is_put_back(name));
    let mut found = scan_once(root, wanted, renamed, &before)?;
    let is_renamed = |step: &SeriesStep| renamed.iter().any(|(_, name)| *name == step.name);
    for _ in 0..STEP_GONE_RETRIES_MAX {
        // What was removed or replaced meanwhile may have been found without its files, and is no step that is damaged.
        let is_settled = |step: &SeriesStep| is_renamed(step) || step.is_same() || step.is_unfinished();
        let (same, other): (Vec<_>, Vec<_>) = found.into_iter().partition(is_settled);
        found = same;
        if other.is_empty() {
            break;
        }
        let again = |name: &str| other.iter().any(|step| step.name == name);
        let before = identities(root, &again);
        found.extend(scan_once(root, &again, &[], &before)?);
    }
    found.sort_by(|a, b| (a.step, &a.name).cmp(&(b.step, &b.name)));
    Ok(found)
}

/// Which directories have the wanted names now.
fn identities(root: &Path, wanted: &(dyn Fn(&str) -> bool + Sync)) -> HashMap<String, Identity> {
    // What cannot be listed is told by who goes on to look at it.
    let names = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| wanted(name))
        .filter_map(|name| Some((Identity::of(&root.join(&name))?, name)))
        .map(|(of, name)| (name, of))
        .collect()
}

fn scan_once(
    root: &Path,
    wanted: &(dyn Fn(&str) -> bool + Sync),
    renamed: &[(RelPath, String)],
    before: &HashMap<String, Identity>,
) -> Result<Vec<SeriesStep>> {
    let dir = open(root)?;
    let listed = ask(&dir, |asker| async move { series::list(&asker, wanted, renamed).await })?.unwrap_or_default();
    let notes = ask(&dir, |asker| {
        let listed = &listed;
        async move { series::notes(&asker, listed).await }
    })?;
    let record = |(listed, notes): (Listed, Notes)| {
        let identity = before.get(listed.step.dir.as_path().to_str()?).copied();
        Some(record(root, listed, notes, identity))
    };
    Ok(listed.into_iter().zip(notes).filter_map(record).collect())
}

fn record(root: &Path, listed: Listed, notes: Notes, identity: Option<Identity>) -> SeriesStep {
    let path = root.join(listed.step.dir.as_path());
    let committed = notes.commit_ns.and_then(|ns| u64::try_from(ns).ok()).map(Duration::from_nanos);
    let changed = || std::fs::metadata(&path).and_then(|metadata| metadata.modified()).unwrap_or(UNIX_EPOCH);
    let state = match (listed.step.state, notes.damage) {
        (StepState::Whole, Some(damage)) => StepState::Incomplete(damage),
        (state, _) => state,
    };
    SeriesStep {
        step: listed.step.number,
        name: listed.step.name,
        identity,
        time: committed.map_or_else(changed, |since| UNIX_EPOCH + since),
        path,
        state,
        items: listed.items,
        init_ns: notes.init_ns,
        commit_ns: notes.commit_ns,
        custom_metadata: notes.custom_metadata,
        metrics: notes.metrics.map(Arc::new),
        metrics_damage: notes.metrics_damage,
    }
}

/// Refuses a directory that is a checkpoint itself: its items may be named like steps. One that does not exist is none.
pub(super) fn refuse_checkpoint(root: &Path) -> Result<()> {
    let dir = match open(root) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        dir => dir?,
    };
    match ask(&dir, |asker| async move { series::checkpoint_mark(&asker).await })? {
        None => Ok(()),
        Some(mark) => Err(Error::invalid("the directory is a checkpoint, no root of steps")
            .at("path", root.display())
            .found(mark)
            .hint("give the directory that holds the steps")),
    }
}

/// The name that a directory has or was to get.
pub(super) fn final_name(name: &str) -> &str {
    step::finished_name(name).unwrap_or(name)
}

/// Whether it is the name of a save that was not finished.
pub(super) fn is_temporary(name: &str) -> bool {
    step::is_temporary(name)
}

/// Where the unfinished saves of Orbax are among these steps. Those of this library are known by their locks.
pub(super) fn orbax_temporaries(steps: &[SeriesStep]) -> Vec<PathBuf> {
    let theirs = steps.iter().filter(|step| is_temporary(&step.name) && !is_staging(&step.name));
    theirs.map(|step| step.path.clone()).collect()
}

/// The user's metadata of a root.
///
/// # Errors
/// No such directory; a file that is damaged or cannot be read.
pub fn root_metadata(root: impl AsRef<Path>) -> Result<Option<Value>> {
    let root = root.as_ref();
    let read = ask(&open(root)?, |asker| async move { series::root_notes(&asker).await });
    read.map_err(|error| error.at("root", root.display()))
}

/// Writes the user's metadata of a root, in place of what was there. It appears whole or not at all.
pub(super) fn write_root_metadata(store: &Arc<dyn Store>, root: &Path, metadata: &Value, sync: bool) -> Result<()> {
    if !metadata.is_object() {
        return Err(Error::invalid("custom metadata of a root must be a JSON object").found(metadata));
    }
    let dir = root.join(checkpoint::ROOT_METADATA_DIR);
    let name = RelPath::new(checkpoint::ROOT_METADATA_FILE)?;
    // Orbax takes a directory without the file for damage, so they come together the first time.
    let (target, becomes) = match dir.is_dir() {
        true => (dir.join(checkpoint::ROOT_METADATA_FILE), Becomes::File),
        false => (dir, Becomes::Directory),
    };
    let staged = StagedDir::start(Arc::clone(store), &target, true, becomes)?;
    staged.write(&name, &checkpoint::root_to_bytes(Some(metadata)), sync)?;
    staged.commit(sync)
}

fn open(root: &Path) -> Result<Root> {
    match std::fs::metadata(root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::not_found("no such directory").at("path", root.display()))
        }
        _ => Root::open(root),
    }
}

/// Runs a metadata machine over the files of a root.
fn ask<'a, T, F>(root: &Root, body: impl FnOnce(Asker) -> F) -> Result<T>
where
    F: Future<Output = Result<T>> + Send + 'a,
{
    Machine::new(body).drive(|needs| serve(root, &needs))
}

fn fingerprint(path: &Path, hasher: &mut DefaultHasher) -> std::io::Result<()> {
    let found = std::fs::symlink_metadata(path)?;
    (found.dev(), found.ino(), found.mode(), found.len()).hash(hasher);
    (found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()).hash(hasher);
    if found.is_dir() {
        let mut names = std::fs::read_dir(path)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<std::io::Result<Vec<_>>>()?;
        names.sort();
        for name in names {
            name.hash(hasher);
            fingerprint(&path.join(name), hasher)?;
        }
    }
    Ok(())
}

fn size_bytes(dir: &Path) -> std::io::Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        total += if kind.is_dir() { size_bytes(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::tree::Engine;
    use crate::tree::save::{SaveOptions, Tree};

    #[test]
    fn a_step_that_is_replaced_or_removed_while_its_root_is_listed_is_no_damage() {
        for removes in [false, true] {
            let root = tempfile::tempdir().unwrap();
            let engine = Engine::new(EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap();
            let save = |dir: PathBuf| {
                engine.save(dir, &Tree::new().with("a", 1), &SaveOptions::default()).unwrap().wait().unwrap();
            };
            save(root.path().join("4"));
            save(root.path().join("5"));
            save(root.path().join("other"));
            let asked = AtomicUsize::new(0);
            // First it is asked which directories there are, then their names are chosen, and then they are listed.
            let wanted = |name: &str| {
                if name == "5" && asked.fetch_add(1, Ordering::SeqCst) == 1 {
                    std::fs::remove_dir_all(root.path().join("5")).unwrap();
                    if !removes {
                        std::fs::rename(root.path().join("other"), root.path().join("5")).unwrap();
                    }
                }
                name != "other"
            };
            let found = scan(root.path(), &wanted).unwrap();
            assert!(asked.into_inner() > 1 && found.iter().all(SeriesStep::is_whole), "{found:?}");
            assert!(found.iter().all(SeriesStep::is_same));
            let numbers: Vec<u64> = found.iter().map(|step| step.step).collect();
            assert_eq!(numbers, if removes { vec![4] } else { vec![4, 5] });
        }
    }
}
