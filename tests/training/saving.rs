//! Saving: what is found again, which steps are saved, one save at a time, and who is told of failures.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use touchdown::training::{
    Checkpointer, CheckpointerOptions, PreservationPolicy, SavePolicy, StepChoice, StepNames, StepOptions, WhenBusy,
    root_metadata,
};
use touchdown::tree::save::TreeItem;
use touchdown::{ErrorKind, OpenOptions};

use crate::common::{gated, keeping, loss, names, options, tree, whole};

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
    assert_eq!(
        (metadata.tree().unwrap().leaves.len(), &metadata.step.custom_metadata),
        (2, &Some(json!({"epoch": 20})))
    );
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
        assert_eq!(steps.open_step(choice).unwrap().step().step, number);
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
    // Opened again, the root's metadata stays as it is, damaged as it may be until it is set; and other names are a mistake.
    let file = root.join("metadata/_ROOT_METADATA");
    let again = Checkpointer::open(&root, options.clone()).unwrap();
    assert_eq!((whole(&again).len(), root_metadata(&root).unwrap()), (5, Some(json!({"model": "small"}))));
    drop(again);
    std::fs::write(&file, "{").unwrap();
    let again = Checkpointer::open(&root, options).unwrap();
    assert_eq!((whole(&again).len(), again.root_metadata().unwrap_err().kind()), (5, ErrorKind::Corrupt));
    again.set_root_metadata(&json!({"model": "large"})).unwrap();
    assert_eq!(again.root_metadata().unwrap(), Some(json!({"model": "large"})));
    let error = Checkpointer::open(&root, CheckpointerOptions::read_only()).unwrap_err();
    assert!(error.advice().unwrap().contains(r#"StepNames::prefixed("ckpt")"#), "{error:?}");
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
fn a_save_that_blocks_waits_for_the_one_that_is_going_on() {
    let continuous = SavePolicy::Continuous { minimum_interval: None };
    for when_busy in [WhenBusy::Wait, WhenBusy::Skip, WhenBusy::Error] {
        for save_policy in [SavePolicy::Always, continuous.clone()] {
            let root = tempfile::tempdir().unwrap();
            let (gate, options) = gated(CheckpointerOptions { when_busy, save_policy, ..options() });
            let steps = Arc::new(Checkpointer::open(root.path(), options).unwrap());
            gate.close();
            let first = steps.save_async(1, &tree(1), &StepOptions::default()).unwrap().unwrap();
            let second = std::thread::spawn({
                let steps = Arc::clone(&steps);
                move || steps.save(2, &tree(2), &StepOptions::default())
            });
            // However late the other thread comes, it saves; one that does not wait has ended by then.
            std::thread::sleep(Duration::from_millis(50));
            gate.open();
            assert!(second.join().unwrap().unwrap().is_some(), "{when_busy:?}");
            first.wait().unwrap();
            assert_eq!(whole(&steps), [1, 2]);
        }
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
