//! Every bit of a checkpoint that was saved with defaults is guarded: flipped, it is found by a deep `verify` and by a load.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests panic to fail and print their counts"
)]

mod support;

use std::path::PathBuf;

use support::files_below;
use touchdown::tree::OpenOptions;
use touchdown::tree::save::{NewArray, SaveOptions, Tree, TreeItem};
use touchdown::tree::verify::verify;
use touchdown::zarr::Format;
use touchdown::{DType, Device, Engine, EngineOptions, Mesh, Sharding, spec};

/// Arrays in values of their own and in nodes, a sharded one, a number and a string.
fn tree() -> Tree {
    let mut state = 7_u32;
    let mut noise = |len: usize| -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..len).map(|_| next()).collect()
    };
    let mesh = Mesh::new([("x", 2)], Device::cpus(2)).unwrap();
    let part = noise(8);
    let sharded = NewArray::sharded(&[16], DType::UInt8, Sharding::new(mesh, spec!["x"], 1).unwrap(), |_| {
        Ok(part.clone().into())
    });
    Tree::new()
        .with("value", NewArray::new(&[1100], DType::UInt8, noise(1100)))
        .with("inline", sharded.unwrap())
        .with("count", 7i64)
        .with("name", "a string is a leaf, too")
}

#[test]
fn every_flipped_bit_is_found() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("c");
    let options = EngineOptions { threads: 1, staging_bytes: 8 << 20, ..EngineOptions::default() };
    let engine = Engine::new(options).unwrap();
    let config = serde_json::json!({"rate": 0.1, "name": "a JSON item"});
    let items = [("state".to_owned(), TreeItem::from(tree())), ("config".to_owned(), TreeItem::from(config))];
    let options_of_save =
        SaveOptions { custom_metadata: Some(serde_json::json!({"run": "r17"})), ..SaveOptions::default() };
    engine.save_items(&path, &items, &options_of_save).unwrap().wait().unwrap();
    // As `load_items` does, on one engine.
    let whole = || {
        let checkpoint = touchdown::open(&path)?;
        engine.load(&checkpoint, &checkpoint.target())?.wait()?;
        checkpoint.json_item("config")
    };
    let intact = || verify(&path, &OpenOptions::default(), true, &options).is_ok_and(|found| found.problems.is_empty());
    assert!(whole().is_ok() && intact());
    let mut flipped = 0;
    // The marker is empty, and what the other says nobody reads.
    let says_nothing = |file: &PathBuf| file.ends_with("orbax.checkpoint") || file.ends_with("commit_success.txt");
    for file in files_below(&path).into_iter().filter(|file| !says_nothing(file)) {
        let bytes = std::fs::read(&file).unwrap();
        let is_sums = file.ends_with("_touchdown_sums.json");
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // The case of a checksum's digit says nothing.
            if is_sums && bad[bit / 8].eq_ignore_ascii_case(&bytes[bit / 8]) {
                continue;
            }
            std::fs::write(&file, &bad).unwrap();
            assert!(whole().is_err(), "a load misses bit {bit} of {}", file.display());
            // The same checks: one bit of each byte will do.
            assert!(bit % 8 != bit / 8 % 8 || !intact(), "verify misses bit {bit} of {}", file.display());
            flipped += 1;
        }
        std::fs::write(&file, &bytes).unwrap();
    }
    assert!(whole().is_ok() && intact() && flipped > 20_000);
    println!("{flipped} bits");
}

/// Items and files that are gone are found by `verify`, and no other item is loaded in the place of one.
#[test]
fn everything_that_is_missing_is_found() {
    let home = tempfile::tempdir().unwrap();
    let (path, aside) = (home.path().join("c"), home.path().join("aside"));
    let options = EngineOptions { threads: 1, staging_bytes: 8 << 20, ..EngineOptions::default() };
    let items = [
        (
            "state".to_owned(),
            TreeItem::from(tree().with("key", NewArray::from_vec(&[2], vec![1u32, 2]).key("threefry2x32"))),
        ),
        ("other".to_owned(), TreeItem::from(Tree::new().with("n", 1i64))),
        ("config".to_owned(), TreeItem::from(serde_json::json!({"rate": 0.1}))),
    ];
    for ocdbt in [true, false] {
        let save = SaveOptions { ocdbt, overwrite: true, ..SaveOptions::default() };
        touchdown::save_items(&path, &items, &save).unwrap();
        let intact =
            || verify(&path, &OpenOptions::default(), true, &options).is_ok_and(|found| found.problems.is_empty());
        assert!(intact());
        // Readers need neither of the first two; without the third the checkpoint is one that has no checksums.
        let needed = |file: &PathBuf| {
            !["orbax.checkpoint", "commit_success.txt", "_touchdown_sums.json"].iter().any(|name| file.ends_with(name))
        };
        let dirs = ["state", "other", "config"].map(|name| path.join(name));
        for file in files_below(&path).into_iter().filter(needed).chain(dirs) {
            std::fs::rename(&file, &aside).unwrap();
            assert!(!intact(), "{} is not missed", file.display());
            let loaded = touchdown::load_items(&path);
            assert!(loaded.is_err(), "a load does not miss {}", file.display());
            if file.starts_with(path.join("state")) {
                let load = || touchdown::open(&path).and_then(|open| touchdown::load(&open, &open.target()));
                assert!(load().is_err(), "another item is loaded without {}", file.display());
            }
            std::fs::rename(&aside, &file).unwrap();
        }
    }
}

/// zarr v2 has room for the frame's own checksum only: it guards the elements. Arrays' metadata have one beside them.
#[test]
fn flipped_elements_of_version_2_are_found() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("c");
    let options = SaveOptions { zarr: Format::V2, ocdbt: false, ..SaveOptions::default() };
    touchdown::save(&path, &tree(), &options).unwrap();
    for (file, first) in [("state/value/0", 20), ("state/value/.zarray", 0), ("state/inline/.zarray", 0)] {
        let file = path.join(file);
        let bytes = std::fs::read(&file).unwrap();
        for at in first..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&file, &bad).unwrap();
            let whole = touchdown::open(&path).and_then(|open| touchdown::load(&open, &open.target()));
            assert!(whole.is_err(), "byte {at} of {}", file.display());
        }
        std::fs::write(&file, &bytes).unwrap();
    }
    let open = touchdown::open(&path).unwrap();
    touchdown::load(&open, &open.target()).unwrap();
}
