//! Steps that are not whole: found, passed over with a reason, never counted; and what is no series at all.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use touchdown::training::{
    Checkpointer, CheckpointerOptions, Metric, PreservationPolicy, Pruning, StepChoice, StepNames, StepOptions, prune,
};
use touchdown::tree::save::{NewArray, TreeItem};
use touchdown::tree::verify::verify;
use touchdown::{Checkpoint, ErrorKind, OpenOptions, SaveOptions};

use crate::common::{file_below, keeping, loss, names, options, spoil, tree, whole};

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
        let opened = Checkpoint::open(root.path(), &OpenOptions::default()).unwrap();
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
    let opened = Checkpoint::open(root.path(), &OpenOptions::default()).unwrap();
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
    // Of any names: only that there is a tree tells.
    let unusual = home.path().join("unusual");
    touchdown::save_items(&unusual, &items(["weights", "model_2"]), &SaveOptions::default()).unwrap();
    for path in [&unmarked, &unusual] {
        ["_CHECKPOINT_METADATA", "orbax.checkpoint"].iter().for_each(|mark| spoil(path, mark));
    }
    let latest = Pruning { policy: PreservationPolicy::latest(1), ..Pruning::default() };
    for path in [&checkpoint, &unmarked, &unusual, &checkpoint.join("model_1")] {
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

/// A path of a root leads to the step that the series gives: both judge by every reference, data files included.
#[test]
fn a_root_is_opened_at_the_step_that_the_series_gives() {
    for (ocdbt, damage) in [(true, "state/d"), (true, "state/d/*"), (false, "state/w/c"), (true, "state/_METADATA{")] {
        let root = tempfile::tempdir().unwrap();
        let save = SaveOptions { ocdbt, ..options().save };
        let steps = Checkpointer::open(root.path(), CheckpointerOptions { save, ..options() }).unwrap();
        for (step, value) in [(1, 3.0), (2, 2.0), (3, 1.0)] {
            steps.save(step, &tree(step), &loss(value)).unwrap();
        }
        spoil(&root.path().join("3"), damage);
        steps.reload().unwrap();
        for choice in [StepChoice::Unstated, StepChoice::Latest, Metric::smallest("loss").into()] {
            let opened = Checkpoint::open(root.path(), &OpenOptions { step: choice.clone(), ..OpenOptions::default() });
            let description = opened.unwrap().description().clone();
            assert_eq!(description.step.unwrap().number, steps.open_step(choice).unwrap().step().step, "{damage}");
            let [passed] = &description.passed_over[..] else { panic!("{damage}: {:?}", description.passed_over) };
            let known = steps.steps().into_iter().find(|step| step.step == 3).unwrap();
            assert_eq!((passed.number, &passed.state), (3, &known.state), "{damage}");
        }
        assert!(touchdown::load_items(root.path()).unwrap()["state"].tree().is_some());
        // Who looks for damage is told of it, and who names the step, or insists, gets that step.
        let verified = verify(root.path(), &OpenOptions::default(), false, &options().engine).unwrap();
        assert!(damage.ends_with('{') || !verified.problems.is_empty(), "{damage}: {verified:?}");
        let latest = |force| OpenOptions { step: StepChoice::Latest, force, ..OpenOptions::default() };
        let forced = Checkpoint::open(root.path(), &latest(true)).map(|opened| opened.description().clone());
        assert!(forced.map_or(true, |forced| forced.passed_over.len() == usize::from(damage.ends_with('{'))));
        // Where no step is whole, all reasons are told.
        spoil(&root.path().join("1"), damage);
        spoil(&root.path().join("2"), damage);
        let error = Checkpoint::open(root.path(), &latest(false)).unwrap_err();
        assert_eq!((error.kind(), error.list().len()), (ErrorKind::Corrupt, 3), "{error}");
    }
}

#[test]
fn a_damaged_step_stands_in_no_saves_way() {
    // Only a look into the step, beyond its listing, tells: a byte in the middle of a file is another.
    let damaged = |root: &std::path::Path| {
        let steps = Checkpointer::open(root, options()).unwrap();
        for step in [10, 20, 100] {
            steps.save(step, &tree(step), &StepOptions::default()).unwrap();
        }
        steps.close().unwrap();
        let path = root.join("100/state/_METADATA");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[1] = b'#';
        std::fs::write(path, bytes).unwrap();
        Checkpointer::open(root, options()).unwrap()
    };
    let root = tempfile::tempdir().unwrap();
    let steps = damaged(root.path());
    assert!(steps.should_save(30), "{:?}", steps.why_not(30));
    assert!(!steps.should_save(15));
    steps.reload().unwrap();
    assert!(steps.save(30, &tree(30), &StepOptions::default()).unwrap().is_some());
    // Resumed by number, without a look at the latest step.
    let root = tempfile::tempdir().unwrap();
    let steps = damaged(root.path());
    steps.load(20).unwrap();
    assert!(steps.save(31, &tree(31), &StepOptions::default()).unwrap().is_some());
    assert_eq!(steps.latest().unwrap().unwrap().step, 31);
    // A step of the same number is replaced.
    steps.reload().unwrap();
    assert!(steps.save(100, &tree(100), &StepOptions::default()).unwrap().is_some());
    assert_eq!(whole(&steps), [10, 20, 31, 100]);
    assert_eq!(steps.save(100, &tree(100), &StepOptions::default()).unwrap_err().kind(), ErrorKind::Exists);
}

#[test]
fn both_files_of_a_json_item_count() {
    // Orbax's v1 reads one of them and its managers the other.
    for (file, remove) in [("data.json", false), ("metadata", false), ("data.json", true), ("metadata", true)] {
        let root = tempfile::tempdir().unwrap();
        let steps = Checkpointer::open(root.path(), options()).unwrap();
        for step in 1..=2 {
            let items =
                [("state".to_owned(), TreeItem::from(tree(step))), ("config".to_owned(), json!({"a": 1}).into())];
            steps.save_items(step, &items, &StepOptions::default()).unwrap();
        }
        let path = root.path().join("2/config").join(file);
        if remove {
            std::fs::remove_file(path).unwrap()
        } else {
            std::fs::write(path, r#"{"a":2}"#).unwrap()
        }
        assert_eq!(steps.latest().unwrap().unwrap().step, 1, "{file}");
        assert!(steps.load_items(2).is_err());
    }
}

#[test]
fn what_is_said_of_a_step_is_not_hidden_by_an_unfinished_save_of_it() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), options()).unwrap();
    steps.save(5, &tree(5), &StepOptions::default()).unwrap();
    spoil(&root.path().join("5"), "state/_METADATA");
    std::fs::create_dir(root.path().join("5.orbax-checkpoint-tmp-1")).unwrap();
    steps.reload().unwrap();
    let errors = [steps.load(5).unwrap_err(), steps.metadata(5).unwrap_err()];
    assert!(errors.iter().all(|error| error.to_string().contains("5/state has no _METADATA")), "{errors:?}");
}
