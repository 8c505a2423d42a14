use super::testing::Dir;
use super::*;
use crate::error::ErrorKind;

const TREE: &str = r#"{"tree_metadata": {"('w',)": {"key_metadata": [{"key": "w", "key_type": 2}], "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": false}}}, "use_ocdbt": true}"#;
const CHECKPOINT: &str =
    r#"{"item_handlers": {}, "init_timestamp_nsecs": 1, "commit_timestamp_nsecs": 2, "custom_metadata": {"k": 1}}"#;

/// A manifest whose envelope is right.
fn manifest() -> Vec<u8> {
    [&[0x0c, 0xdb, 0x3a, 0x2a, 16, 0, 0, 0, 0, 0, 0, 0], [0; 4].as_slice()].concat()
}

/// Adds an item with an OCDBT database.
fn item(dir: Dir, path: &str) -> Dir {
    dir.file(&format!("{path}/_METADATA"), TREE).file(&format!("{path}/manifest.ocdbt"), manifest())
}

fn open(dir: &Dir, options: Options) -> Result<Description> {
    dir.run(|ask| async move { describe(&ask, &options).await })
}

fn at_step(step: StepChoice) -> Options {
    Options { step, ..Options::default() }
}

fn names(description: &Description) -> Vec<(&str, &str)> {
    description.items.iter().map(|item| (item.name.as_str(), item.kind.as_str())).collect()
}

fn describe_ok(dir: &Dir) -> Description {
    open(dir, Options::default()).unwrap()
}

fn describe_err(dir: &Dir) -> Error {
    open(dir, Options::default()).unwrap_err()
}

/// A step root as CheckpointManager writes it.
fn manager() -> Dir {
    let dir =
        Dir::new().file("metadata/_ROOT_METADATA", r#"{"internal_metadata": {}, "custom_metadata": {"exp": "hi"}}"#);
    let dir = item(item(item(dir, "ckpt_00001/default"), "ckpt_00002/default"), "ckpt_00010/default");
    dir.file("ckpt_00001/metrics/metrics", r#"{"loss": 0.25, "acc": NaN}"#)
        .file("ckpt_00002/metrics/metrics", r#"{"loss": 0.5}"#)
        .file("ckpt_00010/metrics/metrics", r#"{"loss": 0.25}"#)
}

#[test]
fn a_v1_checkpoint() {
    let dir = item(Dir::new(), "state").file("_CHECKPOINT_METADATA", CHECKPOINT).file("orbax.checkpoint", "");
    let dir = dir.file("conf/data.json", "{}").dir("opt.orbax-checkpoint-tmp").dir("assets");
    let description = describe_ok(&dir);
    assert_eq!((description.format, description.layout), (Format::Orbax, LayoutKind::V1));
    assert_eq!(names(&description), [("assets", "other"), ("conf", "json"), ("state", "tree")]);
    assert_eq!(description.custom_metadata, Some(serde_json::json!({"k": 1})));
    assert_eq!((description.init_ns, description.commit_ns, description.step), (Some(1), Some(2), None));
    assert!(dir.batches() <= 4);
}

#[test]
fn a_bare_item_of_any_age() {
    let files =
        ["_METADATA", "checkpoint", "manifest.ocdbt", "w/.zarray", "w/zarr.json", "zarr.json", "ocdbt.process_0/d/x"];
    for file in files {
        let description = describe_ok(&Dir::new().file(file, ""));
        assert_eq!((description.layout, names(&description)), (LayoutKind::V0Direct, vec![("", "tree")]), "{file}");
        assert_eq!(default_item(&description.items, None).unwrap().dir, RelPath::root());
    }
    let marked = Dir::new().file("_METADATA", TREE).file("_CHECKPOINT_METADATA", CHECKPOINT);
    assert_eq!((describe_ok(&marked).layout, describe_ok(&marked).commit_ns), (LayoutKind::V0Direct, Some(2)));
    assert_eq!(names(&describe_ok(&Dir::new().file("metrics", "{}").file("commit_success.txt", ""))), [("", "json")]);
}

#[test]
fn a_composite_with_and_without_markers() {
    let dir = item(Dir::new(), "params").file("arr/checkpoint/.zarray", "{}").file("meta/metadata", "{}");
    let dir = item(dir, "nk/np_random_key").file("nk/np_random_key_metadata/metadata", "{}");
    let expected = vec![
        ("arr", "tree"),
        ("meta", "json"),
        ("nk", "other"),
        ("nk/np_random_key", "tree"),
        ("nk/np_random_key_metadata", "json"),
        ("params", "tree"),
    ];
    let description = describe_ok(&dir);
    assert_eq!((description.layout, names(&description)), (LayoutKind::V0Composite, expected.clone()));
    assert_eq!(names(&describe_ok(&dir.file("_CHECKPOINT_METADATA", CHECKPOINT))), expected);
}

#[test]
fn an_item_whose_only_leaf_is_its_own_directory_is_no_array() {
    let dir = Dir::new().file("_CHECKPOINT_METADATA", CHECKPOINT).file("orbax.checkpoint", "");
    let dir = dir.file("state/_METADATA", TREE).file("state/zarr.json", "{}").dir("state/c");
    let description = describe_ok(&dir);
    assert_eq!((description.layout, names(&description)), (LayoutKind::V1, vec![("state", "tree")]));
}

#[test]
fn marked_items_named_like_steps_are_items() {
    let dir = item(item(Dir::new(), "model_1"), "model_2").file("orbax.checkpoint", "");
    assert_eq!(describe_ok(&dir).layout, LayoutKind::V1);
    let unmarked = item(item(Dir::new(), "model_1"), "model_2");
    assert_eq!(describe_ok(&unmarked).layout, LayoutKind::Steps);
    let mixed = item(item(Dir::new(), "model_1"), "params");
    assert_eq!(describe_ok(&mixed).layout, LayoutKind::V0Composite);
}

#[test]
fn items_being_deleted_are_hidden() {
    let dir = item(item(Dir::new(), "state"), "opt").file("orbax.checkpoint", "");
    let one = dir.file("_CHECKPOINT_DELETION", r#"{"checkpointable_name": "opt"}"#);
    assert_eq!(names(&describe_ok(&one)), [("state", "tree")]);
    let all = one.file("_CHECKPOINT_DELETION", r#"{"checkpointable_name": null}"#);
    assert_eq!(describe_err(&all).kind(), ErrorKind::Corrupt);
    assert!(open(&all, Options { force: true, ..Options::default() }).is_ok());
}

#[test]
fn the_latest_step_is_chosen_by_number() {
    let dir = manager();
    let description = describe_ok(&dir);
    assert_eq!((description.layout, description.step.as_ref().unwrap().number), (LayoutKind::Steps, 10));
    assert_eq!(description.steps.iter().map(|step| step.number).collect::<Vec<_>>(), [1, 2, 10]);
    assert!(description.steps.iter().all(|step| step.state == StepState::Whole));
    assert_eq!(names(&description), [("default", "tree"), ("metrics", "json")]);
    assert_eq!(default_item(&description.items, None).unwrap().dir.to_string(), "ckpt_00010/default");
    assert_eq!(description.custom_metadata, Some(serde_json::json!({"exp": "hi"})));
    assert!(dir.batches() <= 6, "{}", dir.batches());
}

#[test]
fn steps_are_chosen_by_number_and_by_metric() {
    let number = |choice| open(&manager(), at_step(choice)).map(|description| description.step.unwrap().number);
    let best = |metric: &str, smallest| StepChoice::Best { metric: metric.to_owned(), smallest };
    assert_eq!(number(StepChoice::Number(2)).unwrap(), 2);
    assert_eq!(number(StepChoice::Latest).unwrap(), 10);
    assert_eq!(number(best("loss", false)).unwrap(), 2);
    assert_eq!(number(best("loss", true)).unwrap(), 10, "of equals the latest");
    let nan = number(best("acc", false)).unwrap_err();
    assert_eq!((nan.kind(), nan.to_string().contains("loss")), (ErrorKind::Invalid, true));
    let missing = number(StepChoice::Number(3)).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Invalid);
    assert!(missing.to_string().contains("the nearest are 2, 1, 10"), "{missing}");
}

#[test]
fn steps_that_are_not_whole_are_skipped_with_a_reason() {
    let cut = |name: &str, bytes: Vec<u8>| {
        item(manager(), "ckpt_00011/default").file(&format!("ckpt_00011/default/{name}"), bytes)
    };
    let no_database = Dir::new().file("ckpt_00001/default/_METADATA", TREE);
    let cases = [
        (manager().dir("ckpt_00011"), "holds no item"),
        (manager().dir("ckpt_00011.orbax-checkpoint-tmp/default"), "temporary"),
        (item(manager(), "ckpt_00011/default.orbax-checkpoint-tmp"), "holds no item"),
        (
            item(manager(), "ckpt_00011/params").dir("ckpt_00011/default.orbax-checkpoint-tmp"),
            "`default` was not finished",
        ),
        (
            manager().file("ckpt_00011/metrics/metrics", "{}").file("ckpt_00011/_CHECKPOINT_METADATA", "{}"),
            "no item with data",
        ),
        (manager().file("ckpt_00011/default/_METADATA", TREE), "neither manifest.ocdbt nor ocdbt.process_*"),
        (
            manager().file("ckpt_00011/default/_METADATA", TREE.replace("true", "false")),
            "no directory for the array `w`",
        ),
        (cut("_METADATA", TREE.as_bytes()[..TREE.len() - 9].to_vec()), "cut short"),
        (cut("_METADATA", Vec::new()), "cut short"),
        (cut("manifest.ocdbt", manifest()[..15].to_vec()), "cut short"),
        (cut("manifest.ocdbt", Vec::new()), "cut short"),
        (item(manager(), "ckpt_00011/default").file("ckpt_00011/_CHECKPOINT_DELETION", "{}"), "being deleted"),
    ];
    for (dir, reason) in cases {
        let description = describe_ok(&dir);
        assert_eq!(description.step.unwrap().number, 10, "{reason}");
        let StepState::Incomplete(found) = &description.steps[3].state else { panic!("{reason}") };
        assert!(found.contains(reason), "{found}");
        let error = open(&dir, at_step(StepChoice::Number(11))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    let error = describe_err(&no_database);
    assert_eq!((error.kind(), error.list().len()), (ErrorKind::Corrupt, 1));
}

#[test]
fn steps_that_are_passed_over_are_told() {
    let dir = manager().dir("ckpt_00005").dir("ckpt_00011").dir("ckpt_00012.orbax-checkpoint-tmp/default");
    let passed = |options: Options| {
        let description = open(&dir, options).unwrap();
        let names: Vec<String> = description.passed_over.iter().map(|step| step.name.clone()).collect();
        (description.step.unwrap().number, names)
    };
    let later = ["ckpt_00011", "ckpt_00012.orbax-checkpoint-tmp"];
    assert_eq!(passed(Options::default()), (10, later.map(str::to_owned).to_vec()));
    let best = StepChoice::Best { metric: "loss".to_owned(), smallest: false };
    let others = |step| {
        let others = open(&dir, at_step(step)).unwrap().alternatives;
        others.iter().map(|step| step.number).collect::<Vec<_>>()
    };
    assert_eq!(others(StepChoice::Latest), [2, 1]);
    assert_eq!(
        (others(best.clone()), others(StepChoice::Number(1))),
        (vec![10, 1], vec![]),
        "of equals the latest first"
    );
    let all = [&["ckpt_00005"][..], &later].concat();
    assert_eq!(passed(at_step(best.clone())), (2, all.iter().map(|name| (*name).to_owned()).collect()));
    assert_eq!(passed(at_step(StepChoice::Number(1))), (1, Vec::new()));
    // What is known of a step counts as what its listings tell.
    let damaged = || ["ckpt_00010", "ckpt_00002"].map(|name| (name.to_owned(), "a bit".to_owned())).into();
    let known = |step| passed(Options { damaged: damaged(), ..at_step(step) });
    assert_eq!((known(StepChoice::Latest).0, known(StepChoice::Latest).1.len(), known(best).0), (1, 5, 1));
    let error = open(&dir, Options { damaged: damaged(), ..at_step(StepChoice::Number(10)) }).unwrap_err();
    assert!(error.to_string().contains("step 10 is not whole: a bit"), "{error}");
}

#[test]
fn a_tree_beside_what_is_named_like_steps_tells_whether_they_are() {
    let layout = |dir: Dir| describe_ok(&dir).layout;
    let beside = |dir: Dir| item(dir, "export");
    assert_eq!(layout(beside(item(Dir::new(), "5"))), LayoutKind::V0Composite, "items like itself");
    assert_eq!(layout(beside(item(Dir::new(), "5/state"))), LayoutKind::Steps, "only steps hold items");
    assert_eq!(layout(beside(item(Dir::new(), "key_5/np_random_key"))), LayoutKind::V0Composite, "or random keys");
    // Items of any name are a checkpoint, and a step.
    let dir = item(item(Dir::new(), "weights"), "opt");
    assert_eq!(
        (layout(dir), describe_ok(&item(Dir::new(), "5/weights")).layout),
        (LayoutKind::V0Composite, LayoutKind::Steps)
    );
}

#[test]
fn a_step_without_arrays_needs_no_database() {
    let strings = TREE.replace("np.ndarray", "string");
    let dir = manager().file("ckpt_00011/default/_METADATA", strings).file("ckpt_00011/default/_strings.json", "{}");
    assert_eq!(describe_ok(&dir).step.unwrap().number, 11);
    let plain = TREE.replace("true", "false");
    let dir = manager().file("ckpt_00012/_METADATA", plain).file("ckpt_00012/w/.zarray", "{}");
    let description = describe_ok(&dir);
    assert_eq!((description.step.as_ref().unwrap().number, names(&description)), (12, vec![("", "tree")]));
}

#[test]
fn logs_beside_the_steps_are_ignored_and_equal_numbers_go_by_name() {
    let dir = item(item(Dir::new(), "5"), "05").file("logs/events.out", "").file("notes.txt", "");
    assert_eq!(describe_ok(&dir).step.unwrap().name, "5");
}

#[test]
fn unfinished_saves_are_refused_unless_forced() {
    let dir = item(Dir::new(), "default");
    for name in ["2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17", "x.partial_save_1"] {
        let options = |force| Options { name: Some(name.to_owned()), force, ..Options::default() };
        let error = open(&dir, options(false)).unwrap_err();
        assert_eq!((error.kind(), error.advice().unwrap().contains("--force")), (ErrorKind::Corrupt, true));
        assert!(open(&dir, options(true)).is_ok());
    }
    let only = item(Dir::new(), "2.orbax-checkpoint-tmp/default");
    assert_eq!(describe_err(&only).kind(), ErrorKind::Corrupt);
    let forced = open(&only, Options { force: true, ..Options::default() }).unwrap();
    assert_eq!(forced.items[0].dir.to_string(), "2.orbax-checkpoint-tmp/default");
    assert_eq!(describe_err(&item(Dir::new(), "x.orbax-checkpoint-tmp")).kind(), ErrorKind::Corrupt);
}

#[test]
fn a_step_of_something_without_steps_is_invalid() {
    for dir in [item(Dir::new(), "state"), Dir::new().file("_METADATA", TREE), Dir::new().file("a.safetensors", "")] {
        assert_eq!(open(&dir, at_step(StepChoice::Latest)).unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[test]
fn what_is_no_checkpoint_says_what_was_looked_for() {
    let empty = describe_err(&Dir::new());
    assert_eq!(empty.kind(), ErrorKind::NotFound);
    assert!(empty.to_string().contains("_METADATA") && empty.to_string().contains("an empty directory"), "{empty}");
    let other = describe_err(&Dir::new().file("2024/photo.jpg", "").file("readme", ""));
    assert!(other.to_string().contains("2024, readme"), "{other}");
    assert_eq!(describe_err(&Dir::new().file("orbax.checkpoint", "")).kind(), ErrorKind::Corrupt);
    assert_eq!(describe_err(&Dir::default()).to_string(), "no such directory in directory .");
}

#[test]
fn checkpoints_of_other_programs_are_named() {
    let flax = describe_err(&Dir::new().file("checkpoint_100", ""));
    assert_eq!((flax.kind(), flax.to_string().contains("legacy Flax")), (ErrorKind::Unsupported, true));
    let file = |name: &str| {
        let options = Options { entry: Entry::File(name.to_owned()), ..Options::default() };
        open(&Dir::new().file(name, ""), options).map(|description| description.layout)
    };
    assert_eq!(file("m.safetensors").unwrap(), LayoutKind::SafetensorsFile);
    assert_eq!(file("m.safetensors.index.json").unwrap(), LayoutKind::SafetensorsIndex);
    assert_eq!(file("checkpoint_100").unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(file("weights.npz").unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(file("manifest.ocdbt").unwrap_err().kind(), ErrorKind::Invalid);
    let missing = Options { entry: Entry::File("m.safetensors".to_owned()), ..Options::default() };
    assert_eq!(open(&Dir::new(), missing).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn safetensors_directories() {
    let plain = Dir::new().file("a.safetensors", "").file("config.json", "");
    assert_eq!(describe_ok(&plain).layout, LayoutKind::SafetensorsDir);
    let indexed = plain.file("model.safetensors.index.json", "");
    let description = describe_ok(&indexed);
    assert_eq!((description.format, description.layout), (Format::Safetensors, LayoutKind::SafetensorsIndex));
    assert!(matches!(description.safetensors, Some(safetensors::Source::Index(_))));
    let orbax = Dir::new().file("a.safetensors", "").file("_METADATA", TREE);
    assert_eq!(describe_ok(&orbax).layout, LayoutKind::V0Direct);
}

#[test]
fn a_broken_checkpoint_metadata_names_the_file() {
    let dir = item(Dir::new(), "state").file("_CHECKPOINT_METADATA", "{");
    let error = describe_err(&dir);
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(error.places().collect::<Vec<_>>(), [("offset", "1"), ("file", "_CHECKPOINT_METADATA")]);
    assert!(open(&dir, Options { force: true, ..Options::default() }).is_ok());
}

#[test]
fn the_default_item() {
    let description = |names: &[&str]| {
        let dir = names
            .iter()
            .fold(Dir::new().file("orbax.checkpoint", "").file("conf/data.json", "{}"), |dir, name| item(dir, name));
        describe_ok(&dir)
    };
    let default = |names: &[&str]| default_item(&description(names).items, None).map(|item| item.name.clone());
    assert_eq!(default(&["params", "state", "a"]).unwrap(), "state");
    assert_eq!(default(&["params", "opt"]).unwrap(), "params");
    assert_eq!(default(&["weights"]).unwrap(), "weights");
    assert_eq!(default(&["weights", "jk/inner"]).unwrap(), "weights");
    assert_eq!(default(&["jk/inner"]).unwrap(), "jk/inner");
    let several = default(&["cfg", "opt"]).unwrap_err();
    assert_eq!((several.kind(), several.to_string().contains("cfg, opt")), (ErrorKind::Invalid, true));
    assert!(default(&[]).unwrap_err().to_string().contains("conf"));
    let wrong = default_item(&description(&["params", "opt"]).items, Some("parms")).unwrap_err();
    assert!(wrong.to_string().contains("params"), "{wrong}");
    assert_eq!(default_item(&description(&["params"]).items, Some("conf")).unwrap().kind, ItemKind::Json);
}
