//! Pruning: a dry run tells what is done, nothing is removed but what was judged, and what cannot be removed is told.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use touchdown::io::Store;
use touchdown::training::{Checkpointer, PreservationPolicy, PruneReport, Pruning, SeriesStep, StepOptions, prune};

use crate::common::{Gate, copy, loss, names, options, spoil, tree};

/// Steps 1 to 4, of which 2 has the smallest loss.
fn series() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), options()).unwrap();
    for (step, value) in [(1, 0.5), (2, 0.1), (3, 0.9), (4, 0.3)] {
        steps.save(step, &tree(step), &loss(value)).unwrap();
    }
    steps.close().unwrap();
    root
}

fn latest_and_best() -> Pruning {
    let policy = PreservationPolicy::any([PreservationPolicy::latest(1), PreservationPolicy::best(1, "-loss")]);
    Pruning { policy, ..Pruning::default() }
}

/// What a report says, by names.
fn told(report: &PruneReport) -> [Vec<String>; 6] {
    let steps = |steps: &[SeriesStep]| steps.iter().map(|step| step.name.clone()).collect();
    let paths = |paths: &[PathBuf]| {
        let mut names: Vec<String> =
            paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().into()).collect();
        names.sort();
        names
    };
    [
        steps(&report.kept),
        report.removed.iter().map(|(step, _)| step.name.clone()).collect(),
        steps(&report.skipped),
        paths(&report.restored),
        paths(&report.leftovers),
        paths(&report.failed.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>()),
    ]
}

#[test]
fn a_dry_run_tells_what_pruning_does() {
    let root = series();
    let at = |name: &str| root.path().join(name);
    // Overwriting 2, the best, was interrupted, so was removing an old 4, and saving 7; and two at Orbax's hands.
    std::fs::rename(at("2"), at(".touchdown-old-2-00")).unwrap();
    copy(&at("1"), &at(".touchdown-old-2-01"));
    copy(&at("4"), &at(".touchdown-old-4-00"));
    copy(&at("4"), &at("7.orbax-checkpoint-tmp-touchdown-00"));
    ["8", "9.orbax-checkpoint-tmp"].iter().for_each(|name| std::fs::create_dir(at(name)).unwrap());
    let before = names(root.path());
    let dry = prune(root.path(), &Pruning { dry_run: true, ..latest_and_best() }).unwrap();
    assert_eq!((names(root.path()), at(".touchdown-lock").exists()), (before, true), "a dry run only reads");
    let done = prune(root.path(), &latest_and_best()).unwrap();
    let [kept, removed, skipped, restored, leftovers, failed] = told(&done);
    assert_eq!((kept, removed), (vec!["2".to_owned(), "4".to_owned()], vec!["1".to_owned(), "3".to_owned()]));
    assert_eq!(
        (skipped, restored, failed),
        (vec!["8".to_owned(), "9.orbax-checkpoint-tmp".to_owned()], vec!["2".to_owned()], vec![])
    );
    assert_eq!(leftovers.len(), 3);
    assert_eq!(told(&dry), told(&done));
    let bytes = |report: &PruneReport| report.removed.iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>();
    assert_eq!(bytes(&dry), bytes(&done));
    assert_eq!(names(root.path()), ["2", "4", "8", "9.orbax-checkpoint-tmp"]);
    // A root whose only step was moved aside holds a step, and keeps it.
    ["4", "8", "9.orbax-checkpoint-tmp"].iter().for_each(|name| spoil(root.path(), name));
    std::fs::rename(at("2"), at(".touchdown-old-2-00")).unwrap();
    for dry_run in [true, false] {
        let none = Pruning { policy: PreservationPolicy::latest(0), dry_run, ..Pruning::default() };
        let [kept, removed, _, restored, ..] = told(&prune(root.path(), &none).unwrap());
        assert_eq!((kept, removed.len(), restored), (vec!["2".to_owned()], 0, vec!["2".to_owned()]));
    }
    assert_eq!(names(root.path()), ["2"]);
}

/// Has another step take the place of this one, as somebody else might.
fn replace(root: &Path, step: &str, with: &str) {
    std::fs::rename(root.join(step), root.join("away")).unwrap();
    copy(&root.join(with), &root.join(step));
}

#[test]
fn a_step_that_was_replaced_after_it_was_judged_is_not_pruned() {
    // Before it is looked at for the last time, and between that and its rename.
    for late in [false, true] {
        let root = series();
        let path = root.path().to_owned();
        let gate = Arc::new(Gate::default());
        let swap = move || replace(&path, "1", "4");
        let keep_latest = |steps: &[_]| (1..=steps.len()).map(|nth| nth == steps.len()).collect::<Vec<bool>>();
        let policy = match late {
            false => PreservationPolicy::custom(move |steps, _| {
                swap();
                keep_latest(steps)
            }),
            true => {
                gate.before_rename(swap);
                PreservationPolicy::custom(move |steps, _| keep_latest(steps))
            }
        };
        let pruning = Pruning { policy, store: Arc::clone(&gate) as Arc<dyn Store>, ..Pruning::default() };
        let report = prune(root.path(), &pruning).unwrap();
        let [kept, removed, skipped, ..] = told(&report);
        assert_eq!((kept, removed, skipped), (vec!["4".into()], vec!["2".into(), "3".into()], vec!["1".into()]));
        assert!(report.skipped[0].reason().unwrap().contains("another came in its place"));
        assert_eq!(names(root.path()), ["1", "4", "away"]);
        let steps = Checkpointer::open(root.path(), options()).unwrap();
        assert_eq!(steps.load(1).unwrap().array("w").unwrap().shards()[0].as_slice::<i32>().unwrap()[0], 4);
    }
}

#[test]
fn nothing_is_pruned_once_no_step_that_stays_is_whole() {
    let root = series();
    let newest = root.path().join("4");
    let policy = PreservationPolicy::custom(move |steps, _| {
        spoil(&newest, "state/_METADATA");
        steps.iter().map(|step| step.step == 4).collect()
    });
    let report = prune(root.path(), &Pruning { policy, ..Pruning::default() }).unwrap();
    assert_eq!((report.kept.len(), report.removed.len(), names(root.path()).len()), (4, 0, 4));
}

#[test]
fn what_cannot_be_removed_is_told_and_the_rest_is_done() {
    let root = series();
    std::fs::create_dir(root.path().join("1.orbax-checkpoint-tmp-touchdown-00")).unwrap();
    let gate = Arc::new(Gate::default());
    gate.keeps_directories.store(true, Ordering::SeqCst);
    let pruning = Pruning { store: Arc::clone(&gate) as Arc<dyn Store>, ..latest_and_best() };
    let report = prune(root.path(), &pruning).unwrap();
    let [kept, removed, _, _, leftovers, failed] = told(&report);
    assert_eq!((kept, removed), (vec!["2".to_owned(), "4".to_owned()], vec!["1".to_owned(), "3".to_owned()]));
    assert_eq!((leftovers.len(), failed.len()), (0, 3), "one from before, and what the two steps became");
    assert!(report.failed.iter().all(|(_, reason)| reason.contains("cannot remove a step")), "{report:?}");
    gate.keeps_directories.store(false, Ordering::SeqCst);
    let [kept, removed, skipped, _, leftovers, failed] = told(&prune(root.path(), &pruning).unwrap());
    assert_eq!([kept.len(), removed.len(), skipped.len(), leftovers.len(), failed.len()], [2, 0, 0, 3, 0]);
    assert_eq!(names(root.path()), ["2", "4"]);
    // A series tells it, too, and goes on.
    std::fs::create_dir(root.path().join("1.orbax-checkpoint-tmp-touchdown-00")).unwrap();
    gate.keeps_directories.store(true, Ordering::SeqCst);
    let mut keeping = options();
    keeping.save.store = Arc::clone(&gate) as Arc<dyn Store>;
    let steps = Checkpointer::open(root.path(), keeping).unwrap();
    assert!(steps.wait().unwrap_err().to_string().contains("cannot remove a step"));
    assert!(steps.save(5, &tree(5), &StepOptions::default()).unwrap().is_some());
}
