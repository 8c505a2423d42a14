//! `seal`: checkpoints that Orbax saved, without a checksum of their own, are sealed; from then on no changed bit of a value and no
//! lost or exchanged file goes unnoticed, and Orbax loads them as before.

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

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value as Json;
use stopping::stopping;
use support::{contents_below, copy_tree, fixture, python, read_json, run_python, scratch, touchdown};
use touchdown::io::{LocalStore, Store};
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::tree::seal::{Seal, seal};
use touchdown::tree::verify::verify;
use touchdown::tree::{Checkpoint, EngineOptions, OpenOptions};
use touchdown::zarr::{Compression, Format};
use touchdown::{DType, Engine, ErrorKind, Take, Verify};

const SUMS: &str = "_touchdown_sums.json";

fn options() -> EngineOptions {
    EngineOptions { threads: 1, reader_threads: 1, staging_bytes: 32 << 20, ..EngineOptions::default() }
}

fn load(engine: &Engine, path: &Path) -> touchdown::Result<u64> {
    let checkpoint = Checkpoint::open(path, &OpenOptions::default())?;
    Ok(engine.load(&checkpoint, &checkpoint.target())?.wait()?.report().bytes_unverified)
}

/// Checkpoints of every form that Orbax saves are sealed, nothing in them is touched, and Orbax loads them as before.
#[test]
fn orbax_loads_what_was_sealed() {
    let Some(python) = python("orbax_loads_what_was_sealed") else { return };
    let folder = scratch("seal-orbax");
    run_python(&python, "oracle.py", ["sealed-make", "--out", folder.to_str().unwrap()]);
    let cases = read_json(&folder.join("cases.json"));
    let engine = Engine::new(options()).unwrap();
    let mut values = 0;
    for case in cases.as_array().unwrap() {
        let path = folder.join(case["name"].as_str().unwrap());
        let before = contents_below(&path);
        let run = touchdown(["seal", path.to_str().unwrap(), "--json"]);
        assert_eq!(run.code, Some(0), "{}: {}", path.display(), run.stderr);
        let sealed: Json = serde_json::from_str(&run.stdout).unwrap();
        assert!(sealed["values"].as_u64() >= Some(4) && sealed["unsupported"] == serde_json::json!([]), "{sealed}");
        values += sealed["values"].as_u64().unwrap();
        let mut after = contents_below(&path);
        after.retain(|path, _| !path.ends_with(SUMS));
        assert!(before == after, "{}: a file that Orbax reads was touched", path.display());
        assert_eq!(load(&engine, &path).unwrap(), 0, "{}", path.display());
        // Of the largest file, a byte that is part of a value.
        let (file, bytes) = before.iter().max_by_key(|(_, bytes)| bytes.len()).unwrap();
        let mut bad = bytes.clone();
        bad[bytes.len() / 3] ^= 0x10;
        fs::write(path.join(file), bad).unwrap();
        assert_eq!(load(&engine, &path).unwrap_err().kind(), ErrorKind::Corrupt, "{}", path.display());
        assert_eq!(touchdown(["verify", path.to_str().unwrap(), "--deep"]).code, Some(1));
        fs::write(path.join(file), bytes).unwrap();
    }
    let judged = run_python(&python, "oracle.py", ["sealed", "--out", folder.to_str().unwrap()]);
    print!("{values} values; {judged}");
    fs::remove_dir_all(&folder).unwrap();
}

/// In every file that is sealed, bits of every value and of every byte of the checksums.
#[test]
fn every_flipped_bit_of_a_sealed_value_is_found() {
    let folder = scratch("seal-flips");
    let engine = Engine::new(options()).unwrap();
    let mut flipped = 0;
    for name in ["quickstart", "zarr2_codecs", "zarr3_codecs", "names_in_names", "msgpack_bare", "orbax_0.2.6__default"]
    {
        let path = folder.join(name);
        copy_tree(&fixture(name).join("ckpt"), &path);
        let sealed = seal(&path, &OpenOptions::default(), &options()).unwrap();
        assert!(sealed.values > 0, "{name}");
        let again = seal(&path, &OpenOptions::default(), &options()).unwrap();
        assert_eq!(sealed, again, "{name}: it was sealed, and is the same");
        load(&engine, &path).unwrap();
        let all = contents_below(&path);
        let sums = all.iter().find(|(file, _)| file.ends_with(SUMS)).unwrap();
        let item = sums.0.parent().unwrap();
        let members: BTreeMap<String, Json> = serde_json::from_slice(sums.1).unwrap();
        // Of fixtures of very many values some.
        for (file, member) in members.iter().filter(|(name, _)| *name != "*keys").step_by(members.len() / 40 + 1) {
            let file = item.join(file);
            let bytes = &all[&file];
            let ranges: Vec<(usize, usize)> = match member.as_array() {
                None => vec![(0, bytes.len())],
                Some(ranges) => {
                    let number = |value: &Json| usize::try_from(value.as_u64().unwrap()).unwrap();
                    ranges.iter().map(|range| (number(&range[0]), number(&range[1]))).collect()
                }
            };
            for (offset, len) in ranges {
                // Two bits of every value, others of each.
                for byte in (offset..offset + len).step_by(len / 2 + 1) {
                    let bit = byte * 8 + flipped % 8;
                    let mut bad = bytes.clone();
                    bad[bit / 8] ^= 1 << (bit % 8);
                    fs::write(path.join(&file), &bad).unwrap();
                    let told = format!("{name}: bit {bit} of {}", file.display());
                    let error = load(&engine, &path).expect_err(&told);
                    assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{told}: {error:?}");
                    let found = verify(&path, &OpenOptions::default(), true, &options()).unwrap();
                    assert!(!found.problems.is_empty(), "{told}: verify finds nothing");
                    flipped += 1;
                }
            }
            fs::write(path.join(&file), bytes).unwrap();
        }
        load(&engine, &path).unwrap();
        // The legacy file of values: without it the arrays alone would be a tree, of fewer leaves.
        if let Some(bytes) = all.get(Path::new("checkpoint")) {
            fs::remove_file(path.join("checkpoint")).unwrap();
            assert_eq!(load(&engine, &path).unwrap_err().kind(), ErrorKind::NotFound, "{name}");
            fs::write(path.join("checkpoint"), bytes).unwrap();
        }
        // The checksums themselves: one bit of each byte. The case of a digit says nothing.
        let (file, bytes) = (path.join(sums.0), sums.1);
        for byte in (0..bytes.len()).step_by(bytes.len() / 60 + 1) {
            let mut bad = bytes.clone();
            bad[byte] ^= 1 << (byte % 8);
            if bad[byte].eq_ignore_ascii_case(&bytes[byte]) {
                continue;
            }
            fs::write(&file, &bad).unwrap();
            assert!(load(&engine, &path).is_err(), "{name}: byte {byte} of the checksums");
            flipped += 1;
        }
        fs::write(&file, bytes).unwrap();
    }
    println!("{flipped} bits");
    fs::remove_dir_all(&folder).unwrap();
}

/// Chunks that are files: one that is lost is no chunk of fill values, and two that were exchanged are found.
#[test]
fn lost_and_exchanged_files_of_a_sealed_checkpoint_are_found() {
    let folder = scratch("seal-files");
    let engine = Engine::new(options()).unwrap();
    let elements: Vec<u8> = (0..200u32).flat_map(u32::to_le_bytes).collect();
    for (number, (zarr, shape)) in [(Format::V2, [200]), (Format::V3, [200])].into_iter().enumerate() {
        for chunk in [50, 2] {
            let path = folder.join(format!("{number}-{chunk}"));
            let leaf = LeafOptions {
                chunk_shape: Some(vec![chunk]),
                compression: Some(Compression::None),
                ..LeafOptions::default()
            };
            let save = SaveOptions { zarr, ocdbt: false, checksum: Some(false), leaf, ..SaveOptions::default() };
            let tree = Tree::new().with("w", NewArray::new(&shape, DType::UInt32, elements.clone()));
            touchdown::save(&path, &tree, &save).unwrap();
            // What is not stored is a fill value here, as in checkpoints of old releases.
            let metadata = path.join("state/_METADATA");
            let text = fs::read_to_string(&metadata).unwrap();
            let changed = text.replace("equal_to_fill_value\": true", "equal_to_fill_value\": false");
            assert_ne!(text, changed);
            fs::write(&metadata, changed).unwrap();
            let dir = path.join("state/w");
            let (one, other) = match zarr {
                Format::V2 => (dir.join("0"), dir.join("1")),
                Format::V3 => (dir.join("c/0"), dir.join("c/1")),
            };
            let (first, second) = (fs::read(&one).unwrap(), fs::read(&other).unwrap());
            fs::remove_file(&one).unwrap();
            load(&engine, &path).expect("a chunk that is not there is one of fill values");
            fs::write(&one, &first).unwrap();
            seal(&path, &OpenOptions::default(), &options()).unwrap();
            assert_eq!(load(&engine, &path).unwrap(), 0, "everything is read whole, and checked");
            fs::remove_file(&one).unwrap();
            assert_eq!(load(&engine, &path).unwrap_err().kind(), ErrorKind::NotFound);
            fs::write(&one, &second).unwrap();
            fs::write(&other, &first).unwrap();
            assert_eq!(load(&engine, &path).unwrap_err().kind(), ErrorKind::Corrupt);
            let error = seal(&path, &OpenOptions::default(), &options()).unwrap_err();
            assert!(error.to_string().contains("not as it was sealed"), "damage is not sealed: {error}");
            fs::write(&one, &first).unwrap();
            fs::write(&other, &second).unwrap();
            load(&engine, &path).unwrap();
        }
    }
    fs::remove_dir_all(&folder).unwrap();
}

/// A value without compression may be read in part; then it is not checked, and counted as such. Read whole, it is, also when it is
/// larger than the memory.
#[test]
fn what_is_read_in_part_is_counted_and_what_is_read_whole_is_checked() {
    let folder = scratch("seal-parts");
    let engine = Engine::new(options()).unwrap();
    let full = Engine::new(EngineOptions { verify: Verify::Full, ..options() }).unwrap();
    let off = Engine::new(EngineOptions { verify: Verify::Off, ..options() }).unwrap();
    let len: u64 = 12 << 20;
    let mut state = 7_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let elements: Vec<u8> = (0..len).map(|_| noise()).collect();
    // One chunk of 12 MiB without compression; one with inner chunks, of which a row is many whole ones.
    for (zarr, compression, raw) in [
        (Format::V2, Compression::None, true),
        (Format::V3, Compression::None, true),
        (Format::V3, Compression::Zstd { level: 1 }, false),
    ] {
        let told = format!("{zarr:?} {compression:?}");
        let path = folder.join(&told);
        let leaf = LeafOptions { compression: Some(compression), ..LeafOptions::default() };
        let save = SaveOptions { checksum: Some(false), leaf, zarr, ..SaveOptions::default() };
        let tree = Tree::new().with("w", NewArray::new(&[4, len / 4], DType::UInt8, elements.clone()));
        touchdown::save(&path, &tree, &save).unwrap();
        let sealed = seal(&path, &OpenOptions::default(), &options()).unwrap();
        assert_eq!((sealed.items, sealed.values > 1), (1, !raw), "{told}: {sealed:?}");
        let row = |engine: &Engine| {
            let checkpoint = touchdown::open(&path)?;
            let target = checkpoint.target().take([("w", Take::Index { dim: 0, index: 2 })]);
            Ok::<_, touchdown::Error>(engine.load(&checkpoint, &target)?.wait()?.report().bytes_unverified)
        };
        assert_eq!((load(&engine, &path).unwrap(), row(&full).unwrap()), (0, 0), "{told}");
        assert_eq!(row(&engine).unwrap(), if raw { len / 4 } else { 0 }, "{told}");
        let (file, mut bytes) =
            contents_below(&path.join("state")).into_iter().max_by_key(|(_, bytes)| bytes.len()).unwrap();
        let middle = bytes.len() * 5 / 8;
        bytes[middle] ^= 1;
        fs::write(path.join("state").join(file), bytes).unwrap();
        assert_eq!(row(&engine).is_ok(), raw, "{told}: a part is not checked");
        load(&off, &path).expect("nothing is checked");
        for error in [load(&engine, &path).unwrap_err(), row(&full).unwrap_err()] {
            assert!(error.kind() == ErrorKind::Corrupt, "{told}: {error}");
            assert!(!raw || error.to_string().contains("not as it was sealed"), "{told}: {error}");
        }
        let found = verify(&path, &OpenOptions::default(), true, &options()).unwrap();
        assert_eq!(found.problems.len(), 1, "{:?}", found.problems);
    }
    fs::remove_dir_all(&folder).unwrap();
}

/// Killed at any operation, it leaves the checkpoint without checksums or with all of them; safetensors are refused.
#[test]
fn sealing_that_stops_leaves_all_checksums_or_none() {
    let folder = scratch("seal-stops");
    let engine = Engine::new(options()).unwrap();
    let (mut stops, mut with, mut without) = (0, 0, 0);
    for operations in 0.. {
        let path = folder.join(operations.to_string());
        copy_tree(&fixture("v1_basic").join("ckpt"), &path);
        let sealing = Seal::of(&path, &OpenOptions::default(), &options()).unwrap();
        let store: Arc<dyn Store> = Arc::new(stopping(operations, true));
        let done = sealing.write(&store);
        load(&engine, &path).unwrap();
        match path.join("state").join(SUMS).exists() {
            true => with += 1,
            false => without += 1,
        }
        // The next one is done, whatever is left.
        sealing.write(&(Arc::new(LocalStore) as Arc<dyn Store>)).unwrap();
        assert!(path.join("state").join(SUMS).exists());
        load(&engine, &path).unwrap();
        if done.is_ok() {
            break;
        }
        stops += 1;
    }
    assert!(stops > 4 && with > 1 && without > 2, "{stops} stops, {with} with, {without} without");
    let run = touchdown(["seal", fixture("safetensors_single/model.safetensors").to_str().unwrap()]);
    assert_eq!(run.code, Some(3), "{}", run.stderr);
    fs::remove_dir_all(&folder).unwrap();
}

/// What stands in the nodes of a database has no file of its own.
#[test]
fn an_exchanged_database_is_found() {
    let folder = scratch("seal-databases");
    let save = |name: &str, value: f32| {
        let tree = Tree::new().with("a", NewArray::from_vec(&[4], vec![value; 4]));
        let path = folder.join(name);
        let options = SaveOptions { checksum: Some(false), sync: false, ..SaveOptions::default() };
        touchdown::save(&path, &tree, &options).unwrap();
        seal(&path, &OpenOptions::default(), &self::options()).unwrap();
        path
    };
    let (one, other) = (save("one", 1.0), save("other", 9.0));
    let engine = Engine::new(options()).unwrap();
    load(&engine, &one).unwrap();
    for name in ["state/manifest.ocdbt", "state/d"] {
        let (from, to) = (other.join(name), one.join(name));
        if from.is_dir() {
            fs::remove_dir_all(&to).unwrap();
            copy_tree(&from, &to);
        } else {
            fs::copy(from, to).unwrap();
        }
    }
    let error = load(&engine, &one).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("sealed"), "{error:?}");
    assert!(!verify(&one, &OpenOptions::default(), true, &options()).unwrap().problems.is_empty());
    fs::remove_dir_all(&folder).unwrap();
}

/// Genuine roots of steps have items and metrics under the names of files.
#[test]
fn roots_of_steps_are_sealed() {
    let folder = scratch("seal-steps");
    for name in ["v1_training_steps", "v0_manager", "v0_composite", "orbax_0.11.20__mgr", "orbax_0.4.3__mgr"] {
        let path = folder.join(name);
        copy_tree(&fixture(name).join("ckpt"), &path);
        let sealed = seal(&path, &OpenOptions::default(), &options()).unwrap();
        assert!(sealed.items > 0, "{name}");
        let found = verify(&path, &OpenOptions::default(), true, &options()).unwrap();
        assert!(found.problems.is_empty(), "{name}: {:?}", found.problems);
    }
    fs::remove_dir_all(&folder).unwrap();
}
