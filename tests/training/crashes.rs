//! Killed at every file operation of saving, removing, pruning and tidying up.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use touchdown::SaveOptions;
use touchdown::io::{LocalStore, Store};
use touchdown::training::{
    Checkpointer, CheckpointerOptions, PreservationPolicy, Pruning, StepOptions, prune, root_metadata,
};

use crate::common::{keeping, listed, loss, names, options, tree, whole};
use crate::stopping::stopping;

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
        // What earlier crashes have left behind: 2, which was being overwritten, and something that is removed.
        std::fs::rename(root.join("2"), root.join(".touchdown-old-2-00")).unwrap();
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
        let found = check_after_crash(&root, &[4], &[2], 5, &format!("pruning stopped at {stops}"));
        *seen.entry(found).or_insert(0) += 1;
        if pruned.is_ok_and(|report| report.failed.is_empty()) {
            break;
        }
        stops += 1;
    }
    println!("pruning stopped at {stops} operations: {seen:?}");
    // 2 put back or not yet, then 1 gone, then 3.
    let states = [vec![1, 3, 4], vec![1, 2, 3, 4], vec![2, 3, 4], vec![2, 4]];
    assert!(stops > 20 && states.iter().all(|state| seen.contains_key(state)), "{seen:?}");
}

#[test]
fn a_crash_at_any_operation_of_deleting_a_step_leaves_it_whole_or_gone() {
    let home = tempfile::tempdir().unwrap();
    let (mut stops, mut seen) = (0, BTreeMap::new());
    loop {
        let root = home.path().join(stops.to_string());
        let more = CheckpointerOptions { custom_metadata: Some(json!({"run": 1})), ..options() };
        let steps = Checkpointer::open(&root, more).unwrap();
        (1..=3).for_each(|step| assert!(steps.save(step, &tree(step), &StepOptions::default()).unwrap().is_some()));
        steps.close().unwrap();
        let save = SaveOptions { store: Arc::new(stopping(stops, true)), ..SaveOptions::default() };
        let steps = Checkpointer::open(&root, CheckpointerOptions { save, ..options() }).unwrap();
        let deleted = steps.delete(2);
        drop(steps);
        let found = check_after_crash(&root, &[1, 3], &[], 4, &format!("deleting stopped at {stops}"));
        *seen.entry(found).or_insert(0) += 1;
        if deleted.is_ok() {
            break;
        }
        stops += 1;
    }
    println!("deleting stopped at {stops} operations: {seen:?}");
    assert!(stops > 4 && seen.keys().eq([&vec![1, 2, 3], &vec![1, 3]]), "{seen:?}");
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
