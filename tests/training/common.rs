//! Small trees and steps, damage, and a file system that waits or fails.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use touchdown::io::{LocalStore, Store, StoreFile};
use touchdown::training::{Checkpointer, CheckpointerOptions, PreservationPolicy, StepOptions};
use touchdown::tree::save::NewArray;
use touchdown::{EngineOptions, SaveOptions, Tree};

pub(crate) fn options() -> CheckpointerOptions {
    let engine = EngineOptions { threads: 1, staging_bytes: 24 << 20, reader_threads: 1, ..EngineOptions::default() };
    let save = SaveOptions { sync: false, ..SaveOptions::default() };
    CheckpointerOptions { engine, save, ..CheckpointerOptions::default() }
}

pub(crate) fn keeping(preservation: PreservationPolicy) -> CheckpointerOptions {
    CheckpointerOptions { preservation, ..options() }
}

/// A tree that tells its step by every element.
pub(crate) fn tree(step: u64) -> Tree {
    Tree::new().with("w", NewArray::from_vec(&[500], vec![step as i32; 500])).with("step", step)
}

pub(crate) fn loss(value: f64) -> StepOptions {
    StepOptions::metric("loss", value)
}

/// The steps that are whole as far as listings tell.
pub(crate) fn listed(steps: &Checkpointer) -> Vec<u64> {
    steps.steps().iter().filter(|step| step.is_whole()).map(|step| step.step).collect()
}

/// The whole steps by number; each is loaded and is what was saved.
pub(crate) fn whole(steps: &Checkpointer) -> Vec<u64> {
    let numbers = listed(steps);
    for &step in &numbers {
        let state = steps.load(step).unwrap();
        let values: &[i32] = state.array("w").unwrap().shards()[0].as_slice().unwrap();
        assert!(values.len() == 500 && values.iter().all(|value| *value == step as i32), "step {step}");
    }
    numbers
}

pub(crate) fn names(dir: &Path) -> Vec<String> {
    let name = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(name).collect();
    names.retain(|name| name != ".touchdown-lock");
    names.sort();
    names
}

pub(crate) fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        std::fs::create_dir(to).unwrap();
        names(from).iter().for_each(|name| copy(&from.join(name), &to.join(name)));
    } else {
        std::fs::copy(from, to).unwrap();
    }
}

/// Removes a file or directory of a step, with `/*` what is in it; with `{` a file's bytes.
pub(crate) fn spoil(step: &Path, what: &str) {
    let path = step.join(what.trim_end_matches(['/', '*', '{']));
    if what.ends_with('{') {
        std::fs::write(path, "{").unwrap();
    } else if path.is_dir() {
        std::fs::remove_dir_all(&path).unwrap();
        if what.ends_with('*') {
            std::fs::create_dir(path).unwrap();
        }
    } else {
        std::fs::remove_file(path).unwrap();
    }
}

pub(crate) fn file_below(dir: &Path, wanted: &str) -> PathBuf {
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => waiting.push(entry.path()),
                false if entry.file_name() == wanted || (wanted == "d/*" && dir.ends_with("d")) => return entry.path(),
                false => {}
            }
        }
    }
    panic!("no {wanted} below {}", dir.display());
}

/// A file system on which saves wait, or fail, at their first file, and removals fail, or come late.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    pub(crate) fails: AtomicBool,
    pub(crate) keeps_directories: AtomicBool,
    before_rename: Mutex<Option<Hook>>,
}

/// Something that is done once.
struct Hook(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook(..)")
    }
}

impl Gate {
    pub(crate) fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }
    /// Has something done right before the next rename.
    pub(crate) fn before_rename(&self, hook: impl FnOnce() + Send + 'static) {
        *self.before_rename.lock().unwrap() = Some(Hook(Box::new(hook)));
    }
    pub(crate) fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.opened.notify_all();
    }
}

impl Store for Gate {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        LocalStore.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            closed = self.opened.wait(closed).unwrap();
        }
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        LocalStore.create(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        LocalStore.sync_dir(path)
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        if let Some(Hook(hook)) = self.before_rename.lock().unwrap().take() {
            hook();
        }
        LocalStore.rename_new(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        LocalStore.exchange(one, other)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        LocalStore.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        if self.keeps_directories.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        LocalStore.remove_dir(path)
    }
}

pub(crate) fn gated(options: CheckpointerOptions) -> (Arc<Gate>, CheckpointerOptions) {
    let gate = Arc::new(Gate::default());
    let save = SaveOptions { store: Arc::clone(&gate) as Arc<dyn Store>, sync: false, ..SaveOptions::default() };
    (gate, CheckpointerOptions { save, ..options })
}
