//! `repair`: a checkpoint whose save never merged its databases is copied with the manifest that it lacks, whole or not at all;
//! Orbax loads the copy, and the original is only read.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod stopping;
mod support;

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use stopping::stopping;
use support::{contents_below, copy_tree, fixture, python, read_json, run_python, scratch, touchdown};
use touchdown::ErrorKind;
use touchdown::tree::diff::diff;
use touchdown::tree::repair::{Repaired, repair};
use touchdown::tree::save::SaveOptions;
use touchdown::tree::verify::verify;
use touchdown::tree::{EngineOptions, OpenOptions};

fn options() -> EngineOptions {
    EngineOptions { threads: 1, reader_threads: 1, ..EngineOptions::default() }
}

fn repaired(from: &Path, to: &Path) -> touchdown::Result<Repaired> {
    repair(from, to, &OpenOptions::default(), &SaveOptions::default(), &|| false)
}

/// What is wrong, in words.
fn problems(path: &Path) -> Vec<String> {
    let found = verify(path, &OpenOptions::default(), true, &options()).unwrap();
    found.problems.into_iter().map(|problem| problem.message).collect()
}

#[test]
fn orbax_loads_what_was_repaired() {
    let Some(python) = python("orbax_loads_what_was_repaired") else { return };
    let folder = scratch("repair-orbax");
    let (made, mended) = (folder.join("made"), folder.join("mended"));
    [&made, &mended].iter().for_each(|dir| fs::create_dir(dir).unwrap());
    run_python(&python, "oracle.py", ["sealed-make", "--out", made.to_str().unwrap()]);
    let cases = read_json(&made.join("cases.json"));
    let mut merged = Vec::new();
    for case in cases.as_array().unwrap() {
        let (name, item) = (case["name"].as_str().unwrap(), case["item"].as_str().unwrap_or_default());
        let (from, to) = (made.join(name), mended.join(name));
        let database = from.join(item);
        if !database.join("manifest.ocdbt").exists() {
            assert_eq!(repaired(&from, &to).unwrap_err().kind(), ErrorKind::Invalid, "{name}");
            continue;
        }
        // As if the save had ended before it merged the databases.
        fs::remove_file(database.join("manifest.ocdbt")).unwrap();
        fs::remove_dir_all(database.join("d")).unwrap();
        assert!(problems(&from).iter().any(|problem| problem.contains("manifest.ocdbt")), "{name}");
        let before = contents_below(&from);
        let run = touchdown(["repair", from.to_str().unwrap(), to.to_str().unwrap()]);
        assert_eq!(run.code, Some(0), "{name}: {}", run.stderr);
        assert!(before == contents_below(&from), "{name}: the original was touched");
        assert_eq!(problems(&to), [""; 0], "{name}");
        merged.push(case.clone());
    }
    assert_eq!(merged.len(), 8, "{merged:?}");
    fs::write(mended.join("cases.json"), serde_json::Value::from(merged).to_string()).unwrap();
    print!("{}", run_python(&python, "oracle.py", ["sealed", "--out", mended.to_str().unwrap()]));
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_lacks_a_value_or_no_manifest_is_refused() {
    let folder = scratch("repair-refusals");
    let from = folder.join("from");
    copy_tree(&fixture("v0_unmerged").join("ckpt"), &from);
    let to = folder.join("to");
    let before = contents_below(&from);
    let done = repaired(&from, &to).unwrap();
    assert_eq!((done.items.len(), done.files), (1, before.len() as u64), "{done:?}");
    let [old, new] = [&from, &to].map(|path| touchdown::open(path).unwrap());
    assert!(diff(&old, &new, &options()).unwrap().different.is_empty());
    assert_eq!(problems(&to), [""; 0]);
    assert_eq!(repaired(&from, &to).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(repaired(&to, &folder.join("again")).unwrap_err().kind(), ErrorKind::Invalid);
    let inside = repaired(&from, &from.join("copy")).unwrap_err();
    assert!(inside.to_string().contains("lies in the source"), "{inside}");
    // A named pipe, a link to a directory, a link that leaves.
    let odd = folder.join("odd");
    let strange: [&dyn Fn(&Path); 3] = [
        &|path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success()),
        &|path| std::os::unix::fs::symlink("d", path).unwrap(),
        &|path| std::os::unix::fs::symlink("/etc/passwd", path).unwrap(),
    ];
    for make in strange {
        copy_tree(&from, &odd);
        make(&odd.join("ocdbt.process_0/strange"));
        let error = repaired(&odd, &folder.join("third")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3, "nothing is left behind");
        fs::remove_dir_all(&odd).unwrap();
    }
    // Told to stop, it leaves nothing.
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() > 2
    };
    let error = repair(&from, &odd, &OpenOptions::default(), &SaveOptions::default(), &stop).unwrap_err();
    assert_eq!((error.kind(), fs::read_dir(&folder).unwrap().count()), (ErrorKind::Cancelled, 2));
    assert!(before == contents_below(&from), "the original was touched");
    fs::remove_dir_all(&folder).unwrap();
}

/// Values that are not all there are no checkpoint.
#[test]
fn a_lost_data_file_is_named() {
    let folder = scratch("repair-lost");
    let from = folder.join("from");
    let values = vec![7_u8; 5000];
    let tree = touchdown::Tree::new()
        .with("w", touchdown::tree::save::NewArray::new(&[5000], touchdown::DType::UInt8, values));
    let save = SaveOptions {
        leaf: touchdown::tree::save::LeafOptions {
            compression: Some(touchdown::zarr::Compression::None),
            ..Default::default()
        },
        ..SaveOptions::default()
    };
    touchdown::save(&from, &tree, &save).unwrap();
    // Our own database in the place of a process's.
    let item = from.join("state");
    fs::create_dir(item.join("ocdbt.process_0")).unwrap();
    for name in ["manifest.ocdbt", "d"] {
        fs::rename(item.join(name), item.join("ocdbt.process_0").join(name)).unwrap();
    }
    repaired(&from, &folder.join("good")).unwrap();
    let data = fs::read_dir(item.join("ocdbt.process_0/d")).unwrap().next().unwrap().unwrap().path();
    let bytes = fs::read(&data).unwrap();
    fs::write(&data, &bytes[..100]).unwrap();
    assert_eq!(repaired(&from, &folder.join("bad")).unwrap_err().kind(), ErrorKind::Corrupt);
    fs::remove_file(&data).unwrap();
    assert_eq!(repaired(&from, &folder.join("bad")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "nothing is left behind");
    fs::remove_dir_all(&folder).unwrap();
}

/// Killed at any operation, it leaves no destination, or a whole one.
#[test]
fn a_repair_that_stops_anywhere_leaves_nothing_or_the_whole() {
    let folder = scratch("repair-stops");
    let from = fixture("v0_unmerged").join("ckpt");
    let (mut absent, mut whole) = (0, 0);
    for operations in 0.. {
        let to = folder.join(operations.to_string()).join("to");
        fs::create_dir(to.parent().unwrap()).unwrap();
        let save = SaveOptions { store: Arc::new(stopping(operations, true)), ..SaveOptions::default() };
        let done = repair(&from, &to, &OpenOptions::default(), &save, &|| false);
        match to.exists() {
            true => {
                assert_eq!(problems(&to), [""; 0], "after {operations} operations");
                whole += 1;
            }
            false => absent += 1,
        }
        if done.is_ok() {
            break;
        }
    }
    assert!(absent > 20 && whole > 1, "{absent} times nothing, {whole} times the whole");
    println!("{absent} times nothing, {whole} times the whole");
    fs::remove_dir_all(&folder).unwrap();
}
