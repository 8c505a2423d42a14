//! Retention: what a policy does not keep is removed, and nothing else ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use touchdown::ErrorKind;
use touchdown::training::{Checkpointer, PreservationPolicy, StepInfo, StepOptions};

use crate::common::{copy, keeping, listed, loss, options, spoil, tree, whole};
use crate::stopping::{Operation, Watched};

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
    let reading = steps.open_step(2).unwrap();
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
        move |steps: &[StepInfo], _| {
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
fn what_stops_removals_is_told_by_its_name_and_how_many_failed() {
    let root = tempfile::tempdir().unwrap();
    let filler = Checkpointer::open(root.path(), options()).unwrap();
    for step in 1..=3 {
        filler.save(step, &tree(step), &StepOptions::default()).unwrap();
    }
    filler.close().unwrap();
    let full = Watched::new(|operation| match operation {
        // Steps have their numbers as names; what is saved has not yet.
        Operation::Rename(from, _) if from.file_name().is_some_and(|name| name.len() == 1) => {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        _ => Ok(()),
    });
    let mut options = keeping(PreservationPolicy::latest(1));
    options.save.store = Arc::new(full);
    let steps = Checkpointer::open(root.path(), options).unwrap();
    assert!(steps.delete(2).unwrap_err().to_string().contains("no space is left"));
    steps.save(4, &tree(4), &StepOptions::default()).unwrap();
    let error = steps.wait().unwrap_err();
    assert!(error.to_string().contains("3 things failed"), "{error}");
    assert_eq!(whole(&steps), [1, 2, 3, 4]);
}
