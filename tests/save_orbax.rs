//! What is saved here, judged by the real Orbax, jax and TensorStore; and what Orbax saved, loaded and saved here and judged
//! again.
//!
//! `TOUCHDOWN_DIFFERENTIAL_SEED` and `TOUCHDOWN_SAVE_COUNT` choose other and more trees. A failure leaves its files in place.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod saved;
mod support;

use std::fs;
use std::path::Path;

use saved::{Random, RandomTree, random_options};
use serde_json::{Value as Json, json};
use support::dump::{Comparison, compare_dumps};
use support::{number_from_environment, python, read_json, run_python, scratch, touchdown};
use touchdown::tree::save::{NewArray, NewLeaf, TreeItem};
use touchdown::zarr::Format;
use touchdown::{DType, Device, Engine, EngineOptions, KeyPath, SaveOptions, Tree};

fn engine() -> Engine {
    Engine::new(EngineOptions { threads: 2, staging_bytes: 32 << 20, ..EngineOptions::default() }).unwrap()
}

fn save(engine: &Engine, path: &Path, items: &[(String, TreeItem)], options: &SaveOptions) {
    let saved = engine.save_items(path, items, options).and_then(|job| job.wait());
    saved.unwrap_or_else(|error| panic!("{}: {error:?}", path.display()));
}

fn seed() -> u64 {
    number_from_environment("TOUCHDOWN_DIFFERENTIAL_SEED", 1)
}

fn write_json(path: &Path, value: &Json) {
    fs::write(path, value.to_string()).unwrap();
}

/// One case: what to save, and what the judge is told of it.
fn write_case(engine: &Engine, case: &Path, trees: &[(&str, RandomTree)], options: &SaveOptions, json_item: bool) {
    let mut items: Vec<(String, TreeItem)> = Vec::new();
    let mut told = serde_json::Map::new();
    for (name, tree) in trees {
        tree.write(&case.join(format!("want-{name}")));
        told.insert((*name).to_owned(), tree.facts(options));
        items.push(((*name).to_owned(), tree.tree.clone().into()));
    }
    let config = json!({"lr": 1e-5, "name": "é", "layers": [1, null, true, 9_007_199_254_740_993_i64]});
    if json_item {
        items.push(("config".to_owned(), config.clone().into()));
    }
    save(engine, &case.join("ckpt"), &items, options);
    write_json(
        &case.join("facts.json"),
        &json!({"items": told, "custom": options.custom_metadata, "json": json_item.then_some(config)}),
    );
}

/// Orbax loads every tree, with and without targets, on 1, 2, 4 and 8 devices; TensorStore opens every array, and adds to the
/// databases; then everything is here as it was.
#[test]
fn orbax_loads_what_is_saved() {
    let Some(python) = python("orbax_loads_what_is_saved") else { return };
    let (engine, folder) = (engine(), scratch("save-orbax"));
    let count = number_from_environment("TOUCHDOWN_SAVE_COUNT", 40);
    for number in 0..count {
        let mut random = Random::new(seed(), 1000 + number);
        let mut options = random_options(&mut random);
        options.custom_metadata = random.one_in(2).then(|| json!({"case": number, "ünï \"q\"": [1.5, null]}));
        let mut trees = vec![(
            "state",
            match number {
                // Both versions of the format, both storages.
                0..4 => {
                    options.zarr = if number < 2 { Format::V2 } else { Format::V3 };
                    options.ocdbt = number % 2 == 0;
                    RandomTree::every_dtype(seed())
                }
                _ => RandomTree::new(seed(), 2 * number),
            },
        )];
        if random.one_in(3) {
            trees.push(("ema", RandomTree::new(seed(), 2 * number + 1)));
        }
        let json_item = random.one_in(3);
        write_case(&engine, &folder.join(number.to_string()), &trees, &options, json_item);
    }
    write_json(&folder.join("index.json"), &json!({"count": count, "checkpoint": "ckpt", "append": true}));
    print!("seed {}: {}", seed(), run_python(&python, "oracle.py", ["saved", "--out", folder.to_str().unwrap()]));
    let mut compared = Comparison::default();
    for number in 0..count {
        compared.add(dumps(&folder.join(number.to_string()), "ckpt"));
    }
    finish(&folder, &compared);
}

/// Orbax's random trees, sharded over up to eight devices, are loaded and saved here, and Orbax finds the same.
#[test]
fn what_orbax_saved_is_saved_again() {
    let Some(python) = python("what_orbax_saved_is_saved_again") else { return };
    let (engine, folder) = (engine(), scratch("save-orbax-again"));
    let count = number_from_environment("TOUCHDOWN_SAVE_COUNT", 40) / 2;
    let out = folder.to_str().unwrap();
    let args = ["saved-make", "--out", out, "--seed", &seed().to_string(), "--count", &count.to_string()];
    run_python(&python, "oracle.py", args);
    for number in 0..count {
        let case = folder.join(number.to_string());
        let facts = read_json(&case.join("facts.json"));
        let checkpoint = touchdown::open(case.join("ckpt")).unwrap();
        let target = match number % 2 {
            0 => checkpoint.target(),
            _ => checkpoint.target().shard_as_saved(&Device::cpus(facts["devices"].as_u64().unwrap() as u32)),
        };
        let state = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
        let mut options = random_options(&mut Random::new(seed(), 5000 + number));
        options.custom_metadata.clone_from(&checkpoint.description().custom_metadata);
        // Names that only a database can hold.
        options.ocdbt |= facts["items"]["state"]["ocdbt"] == true;
        options.rich_types = true;
        save(&engine, &case.join("again"), &[("state".to_owned(), Tree::of(&checkpoint, &state).into())], &options);
        let mut facts = facts.clone();
        facts["items"]["state"]["ocdbt"] = options.ocdbt.into();
        facts["items"]["state"]["zarr3"] = (options.zarr == Format::V3).into();
        write_json(&case.join("facts.json"), &facts);
    }
    write_json(&folder.join("index.json"), &json!({"count": count, "checkpoint": "again", "append": false}));
    print!("seed {}: {}", seed(), run_python(&python, "oracle.py", ["saved", "--out", out]));
    let mut compared = Comparison::default();
    for number in 0..count {
        compared.add(dumps(&folder.join(number.to_string()), "again"));
    }
    finish(&folder, &compared);
}

/// 5,000 leaves in a tall B+tree, which Orbax loads.
#[test]
fn many_leaves_make_a_tall_tree_that_orbax_loads() {
    let Some(python) = python("many_leaves_make_a_tall_tree_that_orbax_loads") else { return };
    let (engine, folder) = (engine(), scratch("save-orbax-many"));
    let case = folder.join("0");
    let tree = RandomTree::many(5000);
    write_case(&engine, &case, &[("state", tree)], &SaveOptions { node_bytes: 2000, ..SaveOptions::default() }, false);
    write_json(&folder.join("index.json"), &json!({"count": 1, "checkpoint": "ckpt", "append": true}));
    print!("{}", run_python(&python, "oracle.py", ["saved", "--out", folder.to_str().unwrap()]));
    finish(&folder, &dumps(&case, "ckpt"));
}

/// What `load --dump` finds of every item, beside what must be there.
fn dumps(case: &Path, checkpoint: &str) -> Comparison {
    let mut compared = Comparison::default();
    let facts = read_json(&case.join("facts.json"));
    for name in facts["items"].as_object().unwrap().keys() {
        let got = case.join(format!("got-{name}"));
        let (path, dump) = (case.join(checkpoint).display().to_string(), got.display().to_string());
        let run = touchdown(["load", &path, "--item", name, "--devices", "cpu:1", "--dump", &dump]);
        assert_eq!(run.code, Some(0), "{}: {}", case.display(), run.error());
        compared.add(compare_dumps(&case.join(format!("want-{name}")), &got));
    }
    compared
}

fn finish(folder: &Path, compared: &Comparison) {
    println!("{} leaves, {} bytes compared", compared.leaves, compared.bytes);
    assert!(compared.differences.is_empty(), "{}:\n{}", folder.display(), compared.differences.join("\n"));
    assert!(compared.leaves > 0 && compared.bytes > 0, "nothing was compared");
    fs::remove_dir_all(folder).expect("the cases can be removed");
}

/// Arrays without elements: Orbax itself saves none that is on a device, but what we save of them it must load, or leave the
/// other leaves alone.
#[test]
fn arrays_without_elements_do_no_harm() {
    let Some(python) = python("arrays_without_elements_do_no_harm") else { return };
    let (engine, folder) = (engine(), scratch("save-orbax-empty"));
    let mut number = 0;
    for zarr in [Format::V2, Format::V3] {
        for ocdbt in [true, false] {
            let case = folder.join(number.to_string());
            number += 1;
            let tree = RandomTree::without_elements();
            write_case(
                &engine,
                &case,
                &[("state", tree)],
                &SaveOptions { zarr, ocdbt, ..SaveOptions::default() },
                false,
            );
        }
    }
    write_json(&folder.join("index.json"), &json!({"count": number, "checkpoint": "ckpt", "append": false}));
    print!("{}", run_python(&python, "oracle.py", ["saved", "--out", folder.to_str().unwrap()]));
    let mut compared = Comparison::default();
    (0..number).for_each(|number| compared.add(dumps(&folder.join(number.to_string()), "ckpt")));
    finish(&folder, &compared);
}

/// 100,000 small leaves are saved and loaded in a time that does not grow with their square.
#[test]
fn a_hundred_thousand_leaves_are_saved_and_loaded() {
    // What so many arrays are planned in fits the default budget.
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let home = tempfile::tempdir().unwrap();
    let mut tree = Tree::new();
    for number in 0..100_000_u32 {
        let path = KeyPath::names(["layers", &(number / 100).to_string(), &(number % 100).to_string()]);
        tree.push(path, NewArray::from_vec(&[3], vec![number, !number, 7]));
    }
    let start = std::time::Instant::now();
    engine.save(home.path().join("c"), &tree, &SaveOptions::default()).unwrap().wait().unwrap();
    let saved = start.elapsed();
    let checkpoint = touchdown::open(home.path().join("c")).unwrap();
    let state = engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap();
    println!("saved in {saved:?}, opened and loaded in {:?}", start.elapsed() - saved);
    for ((path, leaf), number) in tree.leaves().iter().zip(0_u32..).step_by(997) {
        let NewLeaf::Array(array) = leaf else { panic!("an array") };
        let found = state.array(&path.to_string()).unwrap();
        assert_eq!(
            (found.dtype, found.shards()[0].bytes().unwrap()),
            (DType::UInt32, &array.parts[0].data[..]),
            "{number}"
        );
    }
    assert_eq!(state.leaves().len(), 100_000);
}
