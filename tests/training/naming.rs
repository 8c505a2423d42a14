//! Names of steps: leading zeros are not mixed, and numbers below 0 are none.

use std::time::Duration;

use touchdown::training::{
    Checkpointer, CheckpointerOptions, PreservationPolicy, Pruning, StepNames, StepOptions, Watch, WatchOptions, prune,
};
use touchdown::{Error, ErrorKind};

use crate::common::{copy, keeping, listed, names, options, tree};

fn digits(digits: usize) -> CheckpointerOptions {
    CheckpointerOptions { names: StepNames::default().digits(digits), ..options() }
}

#[test]
fn a_writer_does_not_mix_leading_zeros() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), digits(6)).unwrap();
    (1..=2).for_each(|step| assert!(steps.save(step, &tree(step), &StepOptions::default()).unwrap().is_some()));
    steps.close().unwrap();
    let refused = |options| -> Error { Checkpointer::open(root.path(), options).unwrap_err() };
    let error = refused(options());
    assert!(
        error.kind() == ErrorKind::Invalid && error.to_string().contains("expected names like `1`, found `000001`")
    );
    assert_eq!(error.advice(), Some("set `digits` of `names` to 6"));
    assert_eq!(refused(digits(4)).advice(), Some("set `digits` of `names` to 6"));
    // Who only reads does not mind, and neither does who writes them as they are.
    let reader = Checkpointer::open(root.path(), CheckpointerOptions::read_only()).unwrap();
    assert_eq!(listed(&reader), [1, 2]);
    let steps = Checkpointer::open(root.path(), digits(6)).unwrap();
    steps.save(1_234_567, &tree(1_234_567), &StepOptions::default()).unwrap();
    steps.close().unwrap();
    assert_eq!(names(root.path()), ["000001", "000002", "1234567"]);
    // Numbers that have no zeros to lose fit any form; those of several forms fit none.
    ["000001", "000002"].iter().for_each(|name| std::fs::remove_dir_all(root.path().join(name)).unwrap());
    [0, 4, 7].iter().for_each(|width| drop(Checkpointer::open(root.path(), digits(*width)).unwrap()));
    assert_eq!(refused(digits(8)).advice(), Some("set `digits` of `names` to 0"));
    ["02", "003"].iter().for_each(|name| copy(&root.path().join("1234567"), &root.path().join(name)));
    assert!(refused(digits(2)).advice().unwrap().contains("rename them"));
}

#[test]
fn numbers_below_zero_are_no_steps() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(1))).unwrap();
    steps.save(3, &tree(3), &StepOptions::default()).unwrap();
    ["-5", "ckpt_-5"].iter().for_each(|name| copy(&root.path().join("3"), &root.path().join(name)));
    steps.reload().unwrap();
    steps.save(4, &tree(4), &StepOptions::default()).unwrap();
    steps.wait().unwrap();
    assert_eq!(listed(&steps), [4]);
    steps.close().unwrap();
    let pruned = prune(root.path(), &Pruning { policy: PreservationPolicy::latest(1), ..Pruning::default() }).unwrap();
    assert_eq!((pruned.kept.len(), pruned.removed.len(), pruned.skipped.len()), (1, 0, 0));
    let mut watch = Watch::new(root.path(), WatchOptions::default());
    assert_eq!(watch.next(Duration::ZERO).unwrap().map(|step| step.step), Some(4));
    assert_eq!(watch.next(Duration::ZERO).unwrap(), None);
    assert_eq!(names(root.path()), ["-5", "4", "ckpt_-5"]);
}
