//! A series of steps: what is saved is found, what is preserved is never lost, whatever is killed, and whoever else is there.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

mod stopping;
#[cfg(feature = "cli")]
#[path = "../examples/training_loop.rs"]
#[allow(dead_code)]
mod training_loop;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use stopping::stopping;
use touchdown::io::{LocalStore, Store, StoreFile};
use touchdown::training::{
    Checkpointer, CheckpointerOptions, PreservationPolicy, Pruning, SavePolicy, SeriesStep, StepChoice, StepNames,
    StepOptions, Watch, WatchOptions, WhenBusy, prune, root_metadata,
};
use touchdown::tree::save::{NewArray, TreeItem};
use touchdown::{EngineOptions, ErrorKind, OpenOptions, SaveOptions, Tree};

fn options() -> CheckpointerOptions {
    let engine = EngineOptions { threads: 1, staging_bytes: 24 << 20, reader_threads: 1, ..EngineOptions::default() };
    let save = SaveOptions { sync: false, ..SaveOptions::default() };
    CheckpointerOptions { engine, save, ..CheckpointerOptions::default() }
}

fn keeping(preservation: PreservationPolicy) -> CheckpointerOptions {
    CheckpointerOptions { preservation, ..options() }
}

/// A tree that tells its step by every element.
fn tree(step: u64) -> Tree {
    Tree::new().with("w", NewArray::from_vec(&[500], vec![step as i32; 500])).with("step", step)
}

fn loss(value: f64) -> StepOptions {
    StepOptions::metric("loss", value)
}

/// The steps that are whole as far as listings tell.
fn listed(steps: &Checkpointer) -> Vec<u64> {
    steps.steps().iter().filter(|step| step.is_whole()).map(|step| step.step).collect()
}

/// The whole steps by number; each is loaded and is what was saved.
fn whole(steps: &Checkpointer) -> Vec<u64> {
    let numbers = listed(steps);
    for &step in &numbers {
        let state = steps.load(step).unwrap();
        let values: &[i32] = state.array("w").unwrap().shards()[0].as_slice().unwrap();
        assert!(values.len() == 500 && values.iter().all(|value| *value == step as i32), "step {step}");
    }
    numbers
}

fn names(dir: &Path) -> Vec<String> {
    let name = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(name).collect();
    names.retain(|name| name != ".touchdown-lock");
    names.sort();
    names
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        std::fs::create_dir(to).unwrap();
        names(from).iter().for_each(|name| copy(&from.join(name), &to.join(name)));
    } else {
        std::fs::copy(from, to).unwrap();
    }
}

/// Removes a file or directory of a step, with `/*` what is in it; with `{` a file's bytes.
fn spoil(step: &Path, what: &str) {
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

fn file_below(dir: &Path, wanted: &str) -> PathBuf {
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

#[test]
fn steps_are_saved_found_and_loaded() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("deep/run");
    let options = CheckpointerOptions {
        names: StepNames::prefixed("ckpt").digits(4),
        custom_metadata: Some(json!({"model": "tiny"})),
        ..options()
    };
    let steps = Checkpointer::open(&root, options.clone()).unwrap();
    assert_eq!(steps.latest().unwrap(), None);
    assert_eq!(steps.load(StepChoice::Latest).unwrap_err().kind(), ErrorKind::NotFound);
    for (step, value) in [(5, 0.5), (10, 0.25), (15, 0.25), (20, f64::NAN)] {
        let more = loss(value).with_metric("accuracy", step as f64).custom_metadata(json!({"epoch": step}));
        assert!(steps.save(step, &tree(step), &more).unwrap().is_some());
    }
    let items = [("state".to_owned(), TreeItem::from(tree(25))), ("config".to_owned(), json!({"lr": 0.5}).into())];
    steps.save_items(25, &items, &StepOptions::default()).unwrap();
    assert_eq!(whole(&steps), [5, 10, 15, 20, 25]);
    assert_eq!(steps.latest().unwrap().unwrap().name, "ckpt_0025");
    let best = |metric: &str| steps.best(metric).unwrap().map(|step| step.step);
    assert_eq!((best("-loss"), best("loss"), best("accuracy"), best("none")), (Some(15), Some(5), Some(20), None));
    assert_eq!(steps.load_items(25).unwrap()["config"].json(), Some(&json!({"lr": 0.5})));
    let metadata = steps.metadata(20).unwrap();
    assert_eq!((metadata.tree.leaves.len(), &metadata.step.custom_metadata), (2, &Some(json!({"epoch": 20}))));
    assert_eq!(metadata.step.metrics.as_deref(), Some(&json!({"loss": "NaN", "accuracy": 20.0})));
    assert!(metadata.step.size_bytes().unwrap() > 1000);
    assert_eq!(steps.root_metadata().unwrap(), Some(json!({"model": "tiny"})));
    // The same steps that `--step` opens.
    for (choice, number) in [
        (StepChoice::Best { metric: "loss".to_owned(), smallest: true }, 15),
        (StepChoice::Best { metric: "loss".to_owned(), smallest: false }, 5),
        (StepChoice::Latest, 25),
    ] {
        let opened =
            touchdown::Checkpoint::open(&root, &OpenOptions { step: choice.clone(), ..OpenOptions::default() });
        assert_eq!(opened.unwrap().description().step.as_ref().unwrap().number, number);
        assert_eq!(steps.open_step(choice, None).unwrap().step().step, number);
    }
    let future = steps.load_async_with(10, |checkpoint| checkpoint.target().only(["w"])).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert_eq!(runtime.block_on(future).unwrap().leaves().len(), 1);
    // What is there is not saved again, and neither is what comes before; unless that is asked for.
    assert_eq!(steps.save(20, &tree(20), &loss(1.0)).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(steps.save(22, &tree(22), &loss(1.0)).unwrap(), None);
    assert!(steps.why_not(22).unwrap().contains("latest step, 25"), "{:?}", steps.why_not(22));
    assert!(steps.save(22, &tree(22), &loss(1.0).force()).unwrap().is_some());
    assert!(steps.save(20, &tree(20), &loss(0.125).overwrite()).unwrap().is_some());
    assert_eq!(steps.best("-loss").unwrap().unwrap().step, 20);
    steps.delete_item(25, "config").unwrap();
    steps.delete(22).unwrap();
    assert_eq!(steps.delete(22).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(whole(&steps), [5, 10, 15, 20, 25]);
    steps.set_root_metadata(&json!({"model": "small"})).unwrap();
    steps.close().unwrap();
    assert_eq!(names(&root), ["ckpt_0005", "ckpt_0010", "ckpt_0015", "ckpt_0020", "ckpt_0025", "metadata"]);
    // Opened again, the root's metadata stays as it is, and other names are a mistake.
    let again = Checkpointer::open(&root, options).unwrap();
    assert_eq!((whole(&again).len(), root_metadata(&root).unwrap()), (5, Some(json!({"model": "small"}))));
    let error = Checkpointer::open(&root, CheckpointerOptions::read_only()).unwrap_err();
    assert!(error.advice().unwrap().contains(r#"StepNames::prefixed("ckpt")"#), "{error:?}");
}

#[test]
fn roots_that_orbax_wrote_are_read() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for (name, prefix, numbers) in [
        ("v1_training_steps", None, &[0_u64, 5, 10][..]),
        ("orbax_0.11.20__mgr", None, &[0, 1]),
        ("orbax_0.4.3__mgr", None, &[0, 1]),
        ("v0_manager", Some("ckpt"), &[1, 2]),
        ("orbax_0.6.4__mgr2", Some("checkpoint"), &[5]),
    ] {
        let names = StepNames { prefix: prefix.map(str::to_owned), digits: 0 };
        let options = CheckpointerOptions { names, ..CheckpointerOptions::read_only() };
        let steps = Checkpointer::open(fixtures.join(name).join("ckpt"), options).unwrap();
        let found: Vec<u64> = steps.steps().iter().filter(|step| step.is_whole()).map(|step| step.step).collect();
        assert_eq!(found, numbers, "{name}: {:?}", steps.steps());
        let latest = steps.latest().unwrap().unwrap();
        assert_eq!(Some(&latest.step), numbers.last());
        assert!(steps.load(StepChoice::Latest).unwrap().leaves().len() > 0);
        if name == "v1_training_steps" {
            assert_eq!(steps.best("-loss").unwrap().unwrap().step, 10);
            assert_eq!(latest.metrics.as_deref(), Some(&json!({"loss": 0.09090909090909091})));
        }
        assert_eq!(steps.save(99, &tree(99), &StepOptions::default()).unwrap_err().kind(), ErrorKind::Invalid);
    }
}

/// A file system on which saves wait, or fail, at their first file.
#[derive(Debug, Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    fails: AtomicBool,
    keeps_directories: AtomicBool,
}

impl Gate {
    fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }
    fn open(&self) {
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

fn gated(options: CheckpointerOptions) -> (Arc<Gate>, CheckpointerOptions) {
    let gate = Arc::new(Gate::default());
    let save = SaveOptions { store: Arc::clone(&gate) as Arc<dyn Store>, sync: false, ..SaveOptions::default() };
    (gate, CheckpointerOptions { save, ..options })
}

#[test]
fn a_save_while_another_goes_on_waits_is_skipped_or_refused() {
    for (when_busy, kept) in [(WhenBusy::Wait, &[1, 2, 3][..]), (WhenBusy::Skip, &[1, 3]), (WhenBusy::Error, &[1, 3])] {
        let root = tempfile::tempdir().unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        let policy = SavePolicy::any([SavePolicy::interval(1), SavePolicy::OnSignal(Arc::clone(&flag))]);
        let (gate, options) = gated(CheckpointerOptions { when_busy, save_policy: policy, ..options() });
        let steps = Checkpointer::open(root.path(), options).unwrap();
        gate.close();
        let first = steps.save_async(1, &tree(1), &StepOptions::default()).unwrap().unwrap();
        assert!(steps.is_saving() && !first.is_finished());
        assert_eq!(steps.save_async(1, &tree(1), &StepOptions::default()).unwrap_err().kind(), ErrorKind::Exists);
        let opener = |after| {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(after));
                gate.open();
            })
        };
        let opening = (when_busy == WhenBusy::Wait).then(|| opener(50));
        let second = steps.save_async(2, &tree(2), &StepOptions::default());
        match when_busy {
            WhenBusy::Wait => assert!(first.is_finished() && second.unwrap().is_some()),
            WhenBusy::Skip => assert!(second.unwrap().is_none()),
            WhenBusy::Error => assert_eq!(second.unwrap_err().kind(), ErrorKind::Busy),
        }
        // The save of a signal waits whatever the options say: it may be the last.
        flag.store(true, Ordering::SeqCst);
        let opening = opening.unwrap_or_else(|| opener(50));
        assert!(steps.save(3, &tree(3), &StepOptions::default()).unwrap().is_some());
        opening.join().unwrap();
        first.wait().unwrap();
        steps.wait().unwrap();
        assert_eq!(whole(&steps), kept, "{when_busy:?}");
    }
}

#[test]
fn a_step_that_is_being_replaced_is_read_when_it_has_been() {
    let root = tempfile::tempdir().unwrap();
    let (gate, options) = gated(options());
    let steps = Arc::new(Checkpointer::open(root.path(), options).unwrap());
    steps.save(1, &tree(1), &loss(1.0)).unwrap();
    gate.close();
    let replacing = steps.save_async(1, &tree(1).with("new", true), &loss(0.5).overwrite()).unwrap().unwrap();
    let reading = std::thread::spawn({
        let steps = Arc::clone(&steps);
        move || steps.load(1).unwrap().leaves().len()
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!reading.is_finished());
    gate.open();
    replacing.wait().unwrap();
    assert_eq!(
        (reading.join().unwrap(), steps.best("-loss").unwrap().unwrap().metrics.as_deref()),
        (3, Some(&json!({"loss": 0.5})))
    );
}

#[test]
fn policies_decide_which_steps_are_saved() {
    let root = tempfile::tempdir().unwrap();
    let save_policy = SavePolicy::any([SavePolicy::Initial, SavePolicy::interval(10), SavePolicy::steps([13])]);
    let steps = Checkpointer::open(root.path(), CheckpointerOptions { save_policy, ..options() }).unwrap();
    let saved: Vec<u64> = (3..25)
        .filter(|&step| {
            let should = steps.should_save(step);
            let saved = steps.save_async(step, &tree(step), &StepOptions::default()).unwrap().is_some();
            assert_eq!(should, saved);
            saved
        })
        .collect();
    assert_eq!(saved, [3, 10, 13, 20]);
    steps.wait().unwrap();
    assert_eq!(whole(&steps), saved);
    // Continuously: only when no save is going on.
    let root = tempfile::tempdir().unwrap();
    let save_policy = SavePolicy::Continuous { minimum_interval: None };
    let (gate, options) = gated(CheckpointerOptions { save_policy, ..options() });
    let steps = Checkpointer::open(root.path(), options).unwrap();
    gate.close();
    assert!(steps.save_async(0, &tree(0), &StepOptions::default()).unwrap().is_some());
    assert!(steps.save_async(1, &tree(1), &StepOptions::default()).unwrap().is_none());
    gate.open();
    steps.wait().unwrap();
    assert!(steps.save_async(2, &tree(2), &StepOptions::default()).unwrap().is_some());
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [0, 2]);
}

#[test]
fn failures_are_told_once_and_the_series_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let (gate, options) = gated(keeping(PreservationPolicy::latest(2)));
    let steps = Checkpointer::open(root.path(), options).unwrap();
    steps.save(1, &tree(1), &StepOptions::default()).unwrap();
    let failing = |step: u64| {
        gate.fails.store(true, Ordering::SeqCst);
        let handle = steps.save_async(step, &tree(step), &StepOptions::default()).unwrap().unwrap();
        while steps.is_saving() {
            std::thread::yield_now();
        }
        gate.fails.store(false, Ordering::SeqCst);
        handle
    };
    // At the handle, and then nowhere else.
    let error = failing(2).wait().unwrap_err();
    assert!(error.to_string().contains("no space is left") && error.places().any(|place| place == ("step", "2")));
    steps.wait().unwrap();
    // At `wait`.
    drop(failing(3));
    assert!(steps.wait().unwrap_err().to_string().contains("step 3"));
    steps.wait().unwrap();
    // At the next save, which is done all the same.
    drop(failing(4));
    let error = steps.save_async(5, &tree(5), &StepOptions::default()).unwrap_err();
    assert!(error.to_string().contains("step 4") && error.advice().unwrap().contains("step 5"), "{error:?}");
    steps.wait().unwrap();
    drop(failing(6));
    let error = steps.save(7, &tree(7), &StepOptions::default()).unwrap_err();
    assert!(error.to_string().contains("step 6") && error.advice().unwrap().contains("saved all the same"));
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [5, 7]);
    // A removal that fails is told, too; what is left is no step, and the next start removes it.
    gate.keeps_directories.store(true, Ordering::SeqCst);
    steps.save(8, &tree(8), &StepOptions::default()).unwrap();
    assert!(steps.wait().unwrap_err().to_string().contains("cannot remove a step"));
    assert_eq!((whole(&steps), names(root.path()).len()), (vec![7, 8], 3));
    gate.keeps_directories.store(false, Ordering::SeqCst);
    // A cancelled save is what its canceller asked for.
    gate.close();
    let handle = steps.save_async(9, &tree(9), &StepOptions::default()).unwrap().unwrap();
    assert!(steps.cancel());
    gate.open();
    assert_eq!(handle.wait().unwrap_err().kind(), ErrorKind::Cancelled);
    steps.close().unwrap();
    let steps = Checkpointer::open(root.path(), self::options()).unwrap();
    steps.wait().unwrap();
    assert_eq!((whole(&steps), names(root.path())), (vec![7, 8], vec!["7".to_owned(), "8".to_owned()]));
}

#[test]
fn what_a_policy_does_not_keep_is_removed_but_never_what_is_read_or_the_only_step() {
    let root = tempfile::tempdir().unwrap();
    let policy = PreservationPolicy::any([PreservationPolicy::latest(1), PreservationPolicy::best(2, "-loss")]);
    let steps = Checkpointer::open(root.path(), keeping(policy)).unwrap();
    for (step, value) in [(1, 0.5), (2, 0.1), (3, 0.9), (4, 0.3)] {
        steps.save_async(step, &tree(step), &loss(value)).unwrap();
    }
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [2, 4]);
    // Asked without doing it.
    let would: Vec<u64> =
        steps.would_remove(&PreservationPolicy::latest(1)).unwrap().iter().map(|step| step.step).collect();
    assert_eq!((would, whole(&steps)), (vec![2], vec![2, 4]));
    let reading = steps.open_step(2, None).unwrap();
    let loading = steps.load_async(4).unwrap();
    for (step, value) in [(5, 0.01), (6, 0.02)] {
        steps.save(step, &tree(step), &loss(value)).unwrap();
    }
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [2, 4, 5, 6], "what is being read stays");
    assert_eq!(steps.delete(2).unwrap_err().kind(), ErrorKind::Busy);
    let refused = steps.save(2, &tree(2), &StepOptions::default().overwrite()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(reading.leaves().len() == 2 && loading.wait().unwrap().leaves().len() == 2);
    drop(reading);
    steps.save(7, &tree(7), &loss(0.03)).unwrap();
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [5, 6, 7]);
    steps.close().unwrap();
    // A policy that keeps nothing keeps the latest; one that panics keeps everything, and says so.
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(0))).unwrap();
    steps.save(8, &tree(8), &StepOptions::default()).unwrap();
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [8]);
    steps.close().unwrap();
    let panics = PreservationPolicy::custom(|_, _| panic!("a closure of the user"));
    let steps = Checkpointer::open(root.path(), keeping(panics)).unwrap();
    steps.save(9, &tree(9), &StepOptions::default()).unwrap();
    assert!(steps.wait().unwrap_err().to_string().contains("panicked"));
    assert_eq!(whole(&steps), [8, 9]);
}

#[test]
fn a_step_that_was_replaced_after_it_was_judged_is_not_removed() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_owned();
    let (deciding, decided) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
    let keeps = {
        let (deciding, decided, path) = (Arc::clone(&deciding), Arc::clone(&decided), path.clone());
        // Judged are 1 to 4. Until the decision is carried out, the series overwrites 1, and somebody else 2.
        move |steps: &[touchdown::training::StepInfo], _| {
            if decided.load(Ordering::SeqCst) {
                return vec![true; steps.len()];
            }
            deciding.store(true, Ordering::SeqCst);
            while !decided.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            std::fs::rename(path.join("2"), path.join("away")).unwrap();
            copy(&path.join("4"), &path.join("2"));
            vec![false, false, false, true]
        }
    };
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::custom(keeps))).unwrap();
    for step in 1..=3 {
        steps.save(step, &tree(step), &loss(1.0)).unwrap();
    }
    steps.wait().unwrap();
    let inode = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path.join("1")).unwrap());
    let old = inode();
    decided.store(false, Ordering::SeqCst);
    steps.save(4, &tree(4), &loss(0.5)).unwrap();
    while !deciding.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let overwriting = steps.save_async(1, &tree(1).with("new", true), &loss(0.0).overwrite()).unwrap().unwrap();
    while inode() == old {
        std::thread::yield_now();
    }
    decided.store(true, Ordering::SeqCst);
    overwriting.wait().unwrap();
    steps.wait().unwrap();
    assert_eq!(steps.load(1).unwrap().leaves().len(), 3, "{:?}", steps.steps());
    assert!(path.join("2/state/_METADATA").exists() && !path.join("3").exists());
    steps.reload().unwrap();
    assert_eq!(listed(&steps), [1, 2, 4]);
}

#[test]
fn what_was_whole_is_looked_at_again_before_anything_is_removed() {
    for damage in ["state/d", "state/manifest.ocdbt", "state/_METADATA", "state", "state/*", "_CHECKPOINT_METADATA{"] {
        for reload in [false, true] {
            let root = tempfile::tempdir().unwrap();
            let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::best(1, "-loss"))).unwrap();
            steps.save(1, &tree(1), &loss(5.0)).unwrap();
            steps.save(2, &tree(2), &loss(1.0)).unwrap();
            steps.wait().unwrap();
            assert_eq!((whole(&steps), steps.latest().unwrap().unwrap().step), (vec![2], 2));
            spoil(&root.path().join("2"), damage);
            if reload {
                steps.reload().unwrap();
            }
            steps.save(3, &tree(3), &loss(3.0)).unwrap();
            steps.wait().unwrap();
            assert_eq!((steps.latest().unwrap().unwrap().step, whole(&steps)), (3, vec![3]), "{damage}");
            assert!(steps.steps().iter().any(|step| step.step == 2 && !step.is_whole()), "{damage}");
            // Resumed where the newest step is damaged, the loop saves that number again.
            spoil(&root.path().join("3"), damage);
            assert_eq!(steps.latest().unwrap(), None);
            assert!(steps.save(3, &tree(3), &loss(2.0)).unwrap().is_some());
            steps.wait().unwrap();
            assert_eq!(whole(&steps), [3], "{damage}");
        }
    }
}

#[test]
fn a_step_that_lacks_what_its_metadata_list_is_not_whole() {
    for (damage, reason) in [
        ("state/_METADATA", "2/state has no _METADATA"),
        ("state/*", "2/state is empty"),
        ("other/*", "2/other is empty"),
        ("other", "its item `other`, which _CHECKPOINT_METADATA lists, is missing"),
        ("config", "its item `config`, which _CHECKPOINT_METADATA lists, is missing"),
        ("_CHECKPOINT_METADATA{", "2/_CHECKPOINT_METADATA is not valid"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let steps = Checkpointer::open(root.path(), options()).unwrap();
        for step in 1..=2 {
            let items = [
                ("state".to_owned(), TreeItem::from(tree(step))),
                ("other".to_owned(), tree(step).into()),
                ("config".to_owned(), json!({"lr": 0.5}).into()),
            ];
            steps.save_items(step, &items, &loss(1.0)).unwrap();
        }
        assert_eq!(steps.latest().unwrap().unwrap().step, 2);
        spoil(&root.path().join("2"), damage);
        steps.reload().unwrap();
        assert_eq!(steps.latest().unwrap().unwrap().step, 1, "{damage}");
        let found = steps.steps()[1].reason().unwrap().to_owned();
        assert!(found.contains(reason), "{damage}: {found}");
        let opened = touchdown::Checkpoint::open(root.path(), &OpenOptions::default()).unwrap();
        assert_eq!(opened.description().step.as_ref().unwrap().number, 1, "{damage}");
        // An item that was deleted is not missed.
        steps.delete_item(1, "other").unwrap();
        assert_eq!((steps.latest().unwrap().unwrap().step, steps.load_items(1).unwrap().len()), (1, 2 + 1));
    }
}

#[test]
fn a_bad_step_spoils_itself_alone() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let steps = Checkpointer::open(root.path(), options()).unwrap();
    for step in 1..=7 {
        steps.save(step, &tree(step), &loss(1.0)).unwrap();
    }
    steps.close().unwrap();
    let dir = |step: u64| root.path().join(step.to_string());
    let away = |step: u64, part: &str| {
        let away = outside.path().join(step.to_string());
        let part = if part.is_empty() { dir(step) } else { dir(step).join(part) };
        std::fs::rename(&part, &away).unwrap();
        symlink(&away, part).unwrap();
    };
    away(4, "");
    std::fs::remove_file(dir(5).join("state/_METADATA")).unwrap();
    assert!(Command::new("mkfifo").arg(dir(5).join("state/_METADATA")).status().unwrap().success());
    away(6, "state");
    std::fs::set_permissions(dir(7), std::fs::Permissions::from_mode(0o0)).unwrap();
    let may_read_all = std::fs::read_dir(dir(7)).is_ok();
    // A link to a step inside is no copy of it.
    symlink("3", root.path().join("8")).unwrap();

    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(1))).unwrap();
    steps.latest().unwrap();
    let reasons: BTreeMap<u64, String> =
        steps.steps().iter().filter_map(|step| Some((step.step, step.reason()?.to_owned()))).collect();
    println!("{reasons:#?}");
    let bad: &[u64] = if may_read_all { &[4, 5, 6] } else { &[4, 5, 6, 7] };
    assert!(reasons.keys().eq(bad), "{reasons:?}");
    assert!(
        reasons[&4].contains("link") && reasons[&6].contains("link") && reasons[&5].contains("FIFO"),
        "{reasons:?}"
    );
    let opened = touchdown::Checkpoint::open(root.path(), &OpenOptions::default()).unwrap();
    assert_eq!(opened.description().step.as_ref().unwrap().number, 8);
    for by_hand in [false, true] {
        let pruning = Pruning { policy: PreservationPolicy::latest(1), dry_run: true, ..Pruning::default() };
        let dry = prune(root.path(), &pruning).unwrap();
        let gone: Vec<u64> = dry.removed.iter().map(|(step, _)| step.step).collect();
        assert!(gone.starts_with(&[1, 2]) && !gone.contains(&8) && dry.skipped.len() == bad.len() + 1, "{dry:?}");
        if by_hand {
            steps.delete(8).unwrap();
            steps.delete(4).unwrap();
            assert!(outside.path().join("4/state/_METADATA").exists() && dir(3).exists() && !dir(4).exists());
        }
    }
    steps.save(9, &tree(9), &loss(1.0)).unwrap();
    steps.wait().unwrap();
    assert!(steps.latest().unwrap().unwrap().step == 9 && !dir(1).exists() && !dir(3).exists());
    assert!(dir(5).exists() && outside.path().join("6/_METADATA").exists());
    if !may_read_all {
        std::fs::set_permissions(dir(7), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn checkpoints_and_roots_of_roots_are_no_series() {
    let home = tempfile::tempdir().unwrap();
    // Its items have names like steps.
    let checkpoint = home.path().join("checkpoint");
    let items = |names: [&str; 2]| names.map(|name| (name.to_owned(), TreeItem::from(tree(1))));
    touchdown::save_items(&checkpoint, &items(["model_1", "model_2"]), &SaveOptions::default()).unwrap();
    let named = CheckpointerOptions { names: StepNames::prefixed("model"), ..options() };
    let unmarked = home.path().join("unmarked");
    touchdown::save_items(&unmarked, &items(["state", "model_2"]), &SaveOptions::default()).unwrap();
    for name in ["_CHECKPOINT_METADATA", "orbax.checkpoint"] {
        let _ = std::fs::remove_file(unmarked.join(name));
    }
    let latest = Pruning { policy: PreservationPolicy::latest(1), ..Pruning::default() };
    for path in [&checkpoint, &unmarked, &checkpoint.join("model_1")] {
        let before = names(path);
        for options in [named.clone(), CheckpointerOptions { read_only: true, ..named.clone() }] {
            let error = Checkpointer::open(path, options).unwrap_err();
            assert!(error.to_string().contains("is a checkpoint"), "{error}");
        }
        let error = prune(path, &latest).unwrap_err();
        assert!(error.to_string().contains("is a checkpoint"), "{error}");
        assert_eq!(names(path), before);
    }
    // Experiments, each with steps of its own.
    let runs = home.path().join("runs");
    for name in ["exp_1", "exp_2"] {
        let steps = Checkpointer::open(runs.join(name), options()).unwrap();
        steps.save(1, &tree(1), &loss(1.0)).unwrap();
        steps.save(2, &tree(2), &loss(1.0)).unwrap();
    }
    assert_eq!(prune(&runs, &latest).unwrap_err().kind(), ErrorKind::NotFound);
    let steps = Checkpointer::open(
        &runs,
        CheckpointerOptions { names: StepNames::prefixed("exp"), ..keeping(PreservationPolicy::latest(1)) },
    )
    .unwrap();
    assert!(steps.steps().is_empty() && steps.delete(1).is_err(), "{:?}", steps.steps());
    assert!(steps.save(2, &tree(2), &StepOptions::default().overwrite()).is_err());
    steps.save(3, &tree(3), &StepOptions::default()).unwrap();
    steps.wait().unwrap();
    assert_eq!(
        (names(&runs), names(&runs.join("exp_2"))),
        (["exp_1", "exp_2", "exp_3"].map(str::to_owned).to_vec(), ["1", "2"].map(str::to_owned).to_vec())
    );
}

#[test]
fn all_items_of_a_step_are_loaded_whatever_they_are() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), options()).unwrap();
    let several = ["a", "b"].map(|name| (name.to_owned(), TreeItem::from(tree(1))));
    steps.save_items(1, &several, &StepOptions::default()).unwrap();
    steps.save_items(2, &[("config".to_owned(), json!({"lr": 1}).into())], &StepOptions::default()).unwrap();
    assert!(steps.load_items(1).unwrap().keys().eq(["a", "b"]));
    assert_eq!(steps.load_items(StepChoice::Latest).unwrap()["config"].json(), Some(&json!({"lr": 1})));
}

#[test]
fn keeping_more_than_there_can_be_keeps_all() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(usize::MAX))).unwrap();
    for step in 0..3 {
        steps.save(step, &tree(step), &StepOptions::default()).unwrap();
        steps.wait().unwrap();
    }
    assert_eq!(whole(&steps), [0, 1, 2]);
}

#[test]
fn retention_counts_by_the_order_of_steps() {
    // Orbax's manager counts by the order of saving: there saving 3 after 7 would remove 5.
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(2))).unwrap();
    for step in [5, 7, 3] {
        steps.save(step, &tree(step), &StepOptions::default().force()).unwrap();
    }
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [5, 7]);
}

#[test]
fn damaged_steps_are_passed_over_with_a_reason_and_never_count() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), options()).unwrap();
    for step in 1..=7 {
        // Bytes that stay long when they are compressed, so that they stand in the data file and not in its nodes.
        let noise = (0..4096_u32).map(|index| (index.wrapping_mul(2_654_435_769) >> 13) as u8).collect();
        let tree = tree(step).with("noise", NewArray::from_vec::<u8>(&[4096], noise));
        steps.save(step, &tree, &loss(1.0 / step as f64)).unwrap();
    }
    steps.close().unwrap();
    let dir = |step: u64| root.path().join(step.to_string());
    let cut = |path: PathBuf, keep: f64| {
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..(bytes.len() as f64 * keep) as usize]).unwrap();
    };
    // Its metadata is cut short; its manifest is; a node of its database is gone; its own metadata is no JSON; one bit of its data.
    cut(dir(7).join("state/_METADATA"), 0.5);
    cut(dir(6).join("state/manifest.ocdbt"), 0.9);
    cut(file_below(&dir(5), "d/*"), 0.5);
    std::fs::write(dir(4).join("_CHECKPOINT_METADATA"), "{").unwrap();
    let data = file_below(&dir(3), "d/*");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    std::fs::create_dir(root.path().join("8.orbax-checkpoint-tmp")).unwrap();
    std::fs::create_dir(root.path().join("9")).unwrap();
    std::fs::write(root.path().join("10"), "a file").unwrap();

    let read = |verify_data| {
        let options = CheckpointerOptions { verify_data, read_only: true, ..options() };
        Checkpointer::open(root.path(), options).unwrap()
    };
    let (plain, deep) = (read(false), read(true));
    assert_eq!(plain.latest().unwrap().unwrap().step, 3, "{:?}", plain.steps());
    assert_eq!(deep.latest().unwrap().unwrap().step, 2);
    assert_eq!(plain.best("-loss").unwrap().unwrap().step, 3);
    let reasons: BTreeMap<String, String> =
        deep.steps().iter().filter_map(|step| Some((step.name.clone(), step.reason()?.to_owned()))).collect();
    println!("{reasons:#?}");
    assert_eq!(reasons.keys().collect::<Vec<_>>(), ["3", "4", "5", "6", "7", "8.orbax-checkpoint-tmp", "9"]);
    assert!(reasons["7"].contains("_METADATA") && reasons["6"].contains("manifest"), "{reasons:?}");
    let error = deep.load(6).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("not whole"), "{error:?}");

    // Retention counts whole steps and leaves the damaged ones alone.
    let keep = CheckpointerOptions { verify_data: true, ..keeping(PreservationPolicy::latest(2)) };
    let steps = Checkpointer::open(root.path(), keep).unwrap();
    steps.save(11, &tree(11), &StepOptions::default()).unwrap();
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [2, 11], "{:?}", steps.steps());
    // A damaged step is not in the way of its number.
    steps.save(7, &tree(7), &StepOptions::default().force()).unwrap();
    steps.wait().unwrap();
    assert_eq!(whole(&steps), [7, 11]);
    assert!(dir(3).exists() && dir(5).exists() && root.path().join("8.orbax-checkpoint-tmp").exists());
    steps.close().unwrap();
    let tidy = CheckpointerOptions { remove_orbax_temporaries: true, ..options() };
    Checkpointer::open(root.path(), tidy).unwrap().close().unwrap();
    assert!(!root.path().join("8.orbax-checkpoint-tmp").exists());
}

/// What must hold after a crash: the preserved steps are whole, the others are whole or gone, and a writer goes on.
/// What a reader may not see until a writer has tidied up is in `restored`.
fn check_after_crash(root: &Path, preserved: &[u64], restored: &[u64], saving: u64, context: &str) -> Vec<u64> {
    // A reader first, as the crash has left it.
    let reader = Checkpointer::open(root, CheckpointerOptions { read_only: true, ..options() }).unwrap();
    let found = whole(&reader);
    assert!(preserved.iter().all(|step| found.contains(step)), "{context}: {preserved:?} of {found:?}");
    assert!(reader.latest().unwrap().is_some());
    drop(reader);
    // Then a writer that is killed while it tidies up, at every operation in turn.
    for stops in 0..4 {
        let save = SaveOptions { store: Arc::new(stopping(stops, true)), ..SaveOptions::default() };
        let killed = Checkpointer::open(root, CheckpointerOptions { save, ..options() });
        drop(killed.map(|steps| steps.wait()));
        let reader = Checkpointer::open(root, CheckpointerOptions { read_only: true, ..options() }).unwrap();
        let found = listed(&reader);
        assert!(preserved.iter().all(|step| found.contains(step)), "{context}: {preserved:?} of {found:?}");
    }
    // Then one that tidies up and goes on.
    let steps = Checkpointer::open(root, keeping(PreservationPolicy::latest(2))).unwrap();
    steps.wait().unwrap();
    let again = listed(&steps);
    assert!(preserved.iter().chain(restored).all(|step| again.contains(step)), "{context}: {again:?}");
    steps.save(saving, &tree(saving), &StepOptions::default().overwrite()).unwrap();
    steps.save(saving + 1, &tree(saving + 1), &StepOptions::default()).unwrap();
    steps.wait().unwrap();
    assert_eq!(listed(&steps), [saving, saving + 1], "{context}");
    steps.close().unwrap();
    assert_eq!(names(root), [saving.to_string(), (saving + 1).to_string(), "metadata".to_owned()], "{context}");
    assert_eq!(root_metadata(root).unwrap(), Some(json!({"run": 1})), "{context}");
    found
}

#[test]
fn a_crash_at_any_operation_of_a_save_or_a_removal_loses_nothing_that_is_preserved() {
    let home = tempfile::tempdir().unwrap();
    for (overwrite, exchanges) in [(false, true), (true, true), (true, false)] {
        let (mut stops, mut seen) = (0, BTreeMap::new());
        loop {
            let root = home.path().join(format!("{overwrite}-{exchanges}-{stops}"));
            let more = CheckpointerOptions { custom_metadata: Some(json!({"run": 1})), ..options() };
            let steps = Checkpointer::open(&root, more).unwrap();
            // Two that the next retention removes, one that it keeps, and one that is overwritten or saved anew.
            for step in if overwrite { 1..=4 } else { 1..=3 } {
                steps.save(step, &tree(step), &loss(0.5)).unwrap();
            }
            steps.close().unwrap();
            let save = SaveOptions { store: Arc::new(stopping(stops, exchanges)), ..SaveOptions::default() };
            let crashing = CheckpointerOptions { save, ..keeping(PreservationPolicy::latest(2)) };
            let steps = Checkpointer::open(&root, crashing).unwrap();
            let with = StepOptions { overwrite, ..loss(0.25) };
            let saved = steps.save(4, &tree(4), &with).and(steps.wait());
            drop(steps);
            let context = format!("overwrite {overwrite}, exchanges {exchanges}, stopped at {stops}");
            let found = check_after_crash(&root, &[3], if overwrite { &[4] } else { &[] }, 4, &context);
            *seen.entry(found).or_insert(0) += 1;
            if saved.is_ok() {
                break;
            }
            stops += 1;
        }
        println!("overwrite {overwrite}, exchanges {exchanges}: stopped at {stops} operations: {seen:?}");
        assert!(stops > 40 && seen.contains_key(&vec![3, 4]) && seen.len() >= 3, "{seen:?}");
    }
}

#[test]
fn a_crash_at_any_operation_of_pruning_loses_nothing_that_is_kept() {
    let home = tempfile::tempdir().unwrap();
    let (mut stops, mut seen) = (0, BTreeMap::new());
    loop {
        let root = home.path().join(stops.to_string());
        let more = CheckpointerOptions { custom_metadata: Some(json!({"run": 1})), ..options() };
        let steps = Checkpointer::open(&root, more).unwrap();
        (1..=4).for_each(|step| assert!(steps.save(step, &tree(step), &StepOptions::default()).unwrap().is_some()));
        steps.close().unwrap();
        // What an earlier crash has left behind is removed, too.
        std::fs::create_dir(root.join("1.orbax-checkpoint-tmp-touchdown-00")).unwrap();
        let pruning = |store: Arc<dyn Store>| Pruning {
            policy: PreservationPolicy::any([PreservationPolicy::latest(1), PreservationPolicy::every_steps(2)]),
            store,
            ..Pruning::default()
        };
        let dry = prune(&root, &Pruning { dry_run: true, ..pruning(Arc::new(LocalStore)) }).unwrap();
        assert_eq!(dry.removed.iter().map(|(step, _)| step.step).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(names(&root).len(), 6);
        let pruned = prune(&root, &pruning(Arc::new(stopping(stops, true))));
        let found = check_after_crash(&root, &[2, 4], &[], 5, &format!("pruning stopped at {stops}"));
        *seen.entry(found).or_insert(0) += 1;
        if pruned.is_ok() {
            break;
        }
        stops += 1;
    }
    println!("pruning stopped at {stops} operations: {seen:?}");
    assert!(stops > 20 && seen.len() == 3, "{seen:?}");
}

#[test]
fn a_crash_while_the_roots_metadata_are_written_leaves_the_old_or_the_new() {
    let home = tempfile::tempdir().unwrap();
    for first in [true, false] {
        let (mut stops, mut seen) = (0, BTreeMap::new());
        loop {
            let root = home.path().join(format!("{first}-{stops}"));
            let steps = Checkpointer::open(&root, options()).unwrap();
            if !first {
                steps.set_root_metadata(&json!({"old": 1})).unwrap();
            }
            steps.close().unwrap();
            let save = SaveOptions { store: Arc::new(stopping(stops, true)), ..SaveOptions::default() };
            let steps = Checkpointer::open(&root, CheckpointerOptions { save, ..options() }).unwrap();
            let set = steps.set_root_metadata(&json!({"new": 1}));
            drop(steps);
            *seen.entry(root_metadata(&root).unwrap().map(|found| found.to_string())).or_insert(0) += 1;
            let steps = Checkpointer::open(&root, options()).unwrap();
            steps.set_root_metadata(&json!({"new": 1})).unwrap();
            steps.close().unwrap();
            assert_eq!(
                (names(&root), names(&root.join("metadata"))),
                (vec!["metadata".to_owned()], vec!["_ROOT_METADATA".to_owned()])
            );
            if set.is_ok() {
                break;
            }
            stops += 1;
        }
        println!("stopped at {stops} operations: {seen:?}");
        assert!(seen.len() == 2 && stops > 4);
    }
}

#[test]
fn a_watch_gives_each_whole_step_once() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("later");
    let watching = WatchOptions { interval: Duration::from_millis(5), ..WatchOptions::default() };
    let mut watch = Watch::new(&root, watching.clone());
    let soon = Duration::from_millis(20);
    assert_eq!(watch.next(soon).unwrap(), None, "the root does not exist yet");
    let writer = std::thread::spawn({
        let root = root.clone();
        move || {
            let steps = Checkpointer::open(&root, options()).unwrap();
            for step in 1..=5 {
                steps.save_async(step, &tree(step), &loss(1.0)).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
            steps.close().unwrap();
        }
    });
    let long = Duration::from_secs(60);
    let given: Vec<u64> = (0..5).map(|_| watch.next(long).unwrap().unwrap().step).collect();
    writer.join().unwrap();
    assert_eq!(given, [1, 2, 3, 4, 5]);
    let start = Instant::now();
    assert_eq!(watch.next(soon).unwrap(), None);
    assert!(start.elapsed() >= soon);
    // A step that is copied bit by bit is given once it is whole, with a reason until then.
    let part = root.join("6");
    std::fs::create_dir_all(part.join("state")).unwrap();
    assert_eq!(watch.next(soon).unwrap(), None);
    assert_eq!(watch.skipped().keys().collect::<Vec<_>>(), ["6"]);
    std::fs::remove_dir_all(&part).unwrap();
    std::fs::rename(root.join("5"), &part).unwrap();
    assert_eq!(watch.next(long).unwrap().map(|step| (step.step, step.name)), Some((6, "6".to_owned())));
    // One that starts late, from a step on, and one that only wants the latest.
    let mut late = Watch::new(&root, WatchOptions { after: Some(2), ..watching.clone() });
    assert_eq!((late.next(soon).unwrap().unwrap().step, late.next_latest(soon).unwrap().unwrap().step), (3, 6));
    assert_eq!(late.next(soon).unwrap(), None);
    assert_eq!(Watch::new(&root, watching).next_latest(soon).unwrap().unwrap().step, 6);
}

#[test]
fn a_reader_takes_another_step_if_its_own_is_removed() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(1))).unwrap();
    steps.save(1, &tree(1), &StepOptions::default()).unwrap();
    let reader = Checkpointer::open(root.path(), CheckpointerOptions::read_only()).unwrap();
    steps.save(2, &tree(2), &StepOptions::default()).unwrap();
    steps.wait().unwrap();
    assert_eq!(reader.steps().len(), 1, "what is known is kept until it is looked at again");
    let state = reader.load(StepChoice::Latest).unwrap();
    assert_eq!(state.array("w").unwrap().shards()[0].as_slice::<i32>().unwrap()[0], 2);
    steps.save(3, &tree(3), &StepOptions::default()).unwrap();
    steps.wait().unwrap();
    let error = reader.load(2).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("removed meanwhile"), "{error:?}");
    assert_eq!(whole(&reader), [3]);
}

// ---------------------------------------------------------------- several processes

/// Runs one of the ignored tests below in a process of its own.
fn child(test: &str, root: &Path, arguments: &str) -> Process {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", test, "--nocapture", "--test-threads", "1"])
        .env("TOUCHDOWN_TEST_ROOT", root)
        .env("TOUCHDOWN_TEST_ARGUMENTS", arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn();
    Process(child.unwrap())
}

/// A process that does not outlive the test.
struct Process(Child);

impl std::ops::Deref for Process {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already unless the test fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn child_root() -> PathBuf {
    std::env::var_os("TOUCHDOWN_TEST_ROOT").map(PathBuf::from).unwrap()
}

/// Blocks until the child prints a line with this in it.
fn until_line(child: &mut Child, line: &str) {
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|found| found.unwrap().contains(line)), "the child never said `{line}`");
}

/// Saves steps without end, as fast as it can, and removes all but three.
#[test]
#[ignore = "run by other tests in a process of its own, which they kill"]
fn child_that_saves_for_ever() {
    let steps = Checkpointer::open(child_root(), keeping(PreservationPolicy::latest(3))).unwrap();
    let start = steps.latest().unwrap().map_or(0, |step| step.step + 1);
    println!("started");
    let begin = Instant::now();
    for step in start.. {
        steps.save_async(step, &tree(step), &loss(1.0)).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(60), "nobody killed it");
    }
}

#[test]
fn one_process_writes_and_when_it_is_killed_another_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let mut latest = None;
    for round in 0..12 {
        let mut writer = child("child_that_saves_for_ever", root.path(), "");
        until_line(&mut writer, "started");
        let refused = Checkpointer::open(root.path(), options()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains(&format!("process {}", writer.id())), "{refused}");
        assert_eq!(
            prune(root.path(), &Pruning { policy: PreservationPolicy::latest(1), ..Pruning::default() })
                .map(drop)
                .map_err(|error| error.kind())
                .err()
                .filter(|kind| *kind != ErrorKind::NotFound)
                .unwrap_or(ErrorKind::Busy),
            ErrorKind::Busy
        );
        // Readers are safe, whatever is going on.
        let reader = Checkpointer::open(root.path(), CheckpointerOptions::read_only()).unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50 + 37 * round) {
            reader.reload().unwrap();
            if reader.latest().unwrap().is_some() {
                let state = reader.load(StepChoice::Latest).unwrap();
                let values: &[i32] = state.array("w").unwrap().shards()[0].as_slice().unwrap();
                assert!(values.iter().all(|value| *value == values[0]));
            }
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        // Nothing that was whole is lost: the latest only grows, and with two before it.
        reader.reload().unwrap();
        let found = whole(&reader);
        assert!(found.last().copied() >= latest, "{found:?} after {latest:?}");
        assert!(found.len() >= 3 || found.last().is_none_or(|last| *last < 2), "{found:?}");
        latest = found.last().copied();
    }
    println!("killed 12 times, at step {latest:?}");
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(3))).unwrap();
    steps.wait().unwrap();
    let (found, left) = (whole(&steps), names(root.path()));
    // Three, one whose retention was interrupted, and one that was committed meanwhile.
    assert!(latest.is_some() && found.len() <= 5, "{found:?}");
    let mut wanted: Vec<String> = found.iter().map(u64::to_string).collect();
    wanted.sort();
    assert_eq!(left, wanted, "leftovers are gone");
}

#[cfg(feature = "cli")]
#[test]
#[ignore = "run by another test in a process of its own, which it kills"]
fn child_that_trains() {
    let last = std::env::var("TOUCHDOWN_TEST_ARGUMENTS").unwrap().parse().unwrap();
    let stop = touchdown::training::flag_on_sigterm().unwrap();
    training_loop::run(child_root().to_str().unwrap(), last, &stop).unwrap();
    println!("ended well");
}

/// The example: killed, it resumes; told to end, it saves; at the end it has the latest and the best three.
#[cfg(feature = "cli")]
#[test]
fn the_training_loop_resumes_when_it_is_killed_and_saves_when_it_is_told_to_end() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("run");
    let latest = || {
        let steps = Checkpointer::open(&root, CheckpointerOptions::read_only()).unwrap();
        steps.latest().unwrap().map_or(0, |step| step.step)
    };
    let mut killed = child("child_that_trains", &root, "20000");
    until_line(&mut killed, "step 100: loss");
    killed.kill().unwrap();
    killed.wait().unwrap();
    let first = latest();
    assert!(first >= 80 && first % 20 == 0, "{first}");
    let mut told = child("child_that_trains", &root, "20000");
    until_line(&mut told, &format!("starting at step {}", first + 1));
    // Twice, as `timeout` does.
    let kill = format!("kill -TERM {0}; kill -TERM {0}", told.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    let mut output = String::new();
    io::Read::read_to_string(&mut told.stdout.take().unwrap(), &mut output).unwrap();
    assert!(told.wait().unwrap().success() && output.contains("ended well"), "{output}");
    let second = latest();
    assert!(second > first && output.contains(&format!("asked to stop: saved step {second}")), "{second}: {output}");
    let mut ends = child("child_that_trains", &root, "300");
    until_line(&mut ends, "ended well");
    assert!(ends.wait().unwrap().success());
    let steps = Checkpointer::open(&root, CheckpointerOptions::read_only()).unwrap();
    let best = steps.best("-loss").unwrap().unwrap().step;
    let kept: Vec<u64> = steps.steps().iter().map(|step| step.step).collect();
    assert!(steps.latest().unwrap().unwrap().step == 300 && kept.contains(&best), "{kept:?}");
    assert!((3..=4).contains(&kept.len()), "{kept:?}");
}

/// Memory in bytes and threads of this process.
fn memory_and_threads() -> (u64, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    (field("VmRSS:") << 10, field("Threads:") as usize)
}

#[test]
#[ignore = "run by another test in a process of its own: its memory and threads are measured"]
fn child_that_saves_three_hundred_times() {
    let before = memory_and_threads();
    let policy = PreservationPolicy::any([PreservationPolicy::latest(2), PreservationPolicy::best(3, "-loss")]);
    let steps = Checkpointer::open(child_root(), keeping(policy)).unwrap();
    let state = Tree::new()
        .with("w", NewArray::from_vec(&[500], vec![7_i32; 500]))
        .with("big", NewArray::from_vec(&[1 << 18], vec![0.5_f32; 1 << 18]));
    let mut seen = Vec::new();
    for step in 0..300_u64 {
        let value = (step as f64 * 0.7).sin();
        steps.save_async(step, &state, &loss(value)).unwrap();
        if step % 50 == 49 {
            steps.wait().unwrap();
            seen.push(memory_and_threads());
        }
    }
    steps.close().unwrap();
    let after = memory_and_threads();
    println!("before {before:?}, every 50 saves {seen:?}, after {after:?}");
    assert_eq!(after.1, before.1, "no thread is left");
    assert!(seen.iter().all(|(_, threads)| *threads == seen[0].1), "{seen:?}");
    // From the first 50 saves on, which warm allocators and pools up.
    let grown = seen[5].0.saturating_sub(seen[0].0);
    assert!(grown < 8 << 20, "memory grew by {grown} bytes: {seen:?}");
    println!("flat");
}

#[test]
fn three_hundred_asynchronous_saves_leave_memory_and_threads_as_they_were() {
    let root = tempfile::tempdir().unwrap();
    let mut child = child("child_that_saves_three_hundred_times", root.path(), "");
    let mut output = String::new();
    io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut output).unwrap();
    assert!(child.wait().unwrap().success() && output.contains("flat"), "{output}");
    println!("{}", output.lines().find(|line| line.contains("every 50")).unwrap_or_default());
    let left: Vec<SeriesStep> = Checkpointer::open(root.path(), CheckpointerOptions::read_only()).unwrap().steps();
    assert!((3..=5).contains(&left.len()) && left.last().unwrap().step == 299, "{left:?}");
}
