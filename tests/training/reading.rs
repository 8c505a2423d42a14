//! Reading: roots of Orbax, items of any number and kind, and steps that another process removes meanwhile.

use std::path::Path;

use serde_json::json;
use touchdown::training::{
    Checkpointer, CheckpointerOptions, PreservationPolicy, StepChoice, StepItem, StepNames, StepOptions,
};
use touchdown::tree::save::TreeItem;
use touchdown::{Checkpoint, Error, ErrorKind, State};

use crate::common::{keeping, options, tree, whole};

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

#[test]
fn steps_of_any_items_are_loaded_and_described() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), options()).unwrap();
    let config = || ("config".to_owned(), TreeItem::from(json!({"lr": 1})));
    let item = |name: &str, step| (name.to_owned(), TreeItem::from(tree(step)));
    steps.save_items(1, &[item("a", 1), item("b", 10), config()], &StepOptions::default()).unwrap();
    steps.save_items(2, &[config()], &StepOptions::default()).unwrap();
    steps.save_items(3, &[item("state", 3), item("ema", 30)], &StepOptions::default()).unwrap();

    // All of them.
    let names = |step| steps.load_items(step).unwrap().into_keys().collect::<Vec<_>>();
    assert_eq!([names(1), names(2), names(3)], [vec!["a", "b", "config"], vec!["config"], vec!["ema", "state"]]);
    assert_eq!(steps.load_items(2).unwrap()["config"].json(), Some(&json!({"lr": 1})));
    // One tree by the name of its item, in every way.
    let value = |state: State| state.array("w").unwrap().shards()[0].as_slice::<i32>().unwrap()[0];
    assert_eq!((value(steps.load((1, "b")).unwrap()), value(steps.load(3).unwrap())), (10, 3));
    assert_eq!(value(steps.load_async((StepChoice::Latest, "ema")).unwrap().wait().unwrap()), 30);
    let only = |checkpoint: &Checkpoint| checkpoint.target().only(["w"]);
    assert_eq!(steps.load_with((1, "a"), only).unwrap().leaves().len(), 1);
    assert_eq!(value(steps.load_async_with((1, "a"), only).unwrap().wait().unwrap()), 1);
    assert_eq!(steps.open_step((3, "ema")).unwrap().item(), Some("ema"));
    // What a step says of itself needs no tree, and no usual name.
    let trees = |step| steps.metadata(step).unwrap().trees.into_keys().collect::<Vec<_>>();
    assert_eq!([trees(1), trees(2), trees(3)], [vec!["a", "b"], vec![], vec!["ema", "state"]]);
    let (first, third) = (steps.metadata(1).unwrap(), steps.metadata(3).unwrap());
    assert_eq!((first.tree(), first.trees["a"].leaves.len(), first.step.items.len()), (None, 2, 3));
    assert_eq!((third.tree(), steps.metadata(2).unwrap().tree()), (third.trees.get("state"), None));

    // What cannot be meant is said, with what to do.
    let refused = |error: Error| (error.kind(), format!("{error}; {}", error.advice().unwrap_or_default()));
    for (which, say) in [
        (StepItem::from(1), ["the checkpoint has several items", "found a, b; name the one"]),
        (2.into(), ["no item that is a tree", "found config; items that are JSON are loaded by `load_items`"]),
        ((1, "c").into(), ["there is no item `c`", "nearest are a, b"]),
        ((1, "config").into(), ["the item is no tree of arrays", "item config"]),
    ] {
        for error in [
            steps.load(which.clone()).unwrap_err(),
            steps.load_async(which.clone()).unwrap_err(),
            steps.open_step(which.clone()).unwrap_err(),
        ] {
            let (kind, message) = refused(error);
            assert!(kind == ErrorKind::Invalid && say.iter().all(|say| message.contains(say)), "{message}");
        }
    }
    // Without the files that name its items, a step is one by the trees that it holds.
    for mark in ["_CHECKPOINT_METADATA", "orbax.checkpoint", "_touchdown_sums.json"] {
        std::fs::remove_file(root.path().join("1").join(mark)).unwrap();
    }
    steps.delete(3).unwrap();
    steps.delete(2).unwrap();
    steps.reload().unwrap();
    assert_eq!(steps.latest().unwrap().unwrap().step, 1);
    assert_eq!(value(steps.load((1, "b")).unwrap()), 10);
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
