//! Conversions: the same tree comes out whatever the format, the memory and the interruptions; every unit is decoded once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

mod stopping;
mod support;
mod trees;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;
use stopping::{Operation, Watched, stopping};
use support::fixture;
use touchdown::io::store::leftovers;
use touchdown::layout::ItemKind;
use touchdown::layout::safetensors::header;
use touchdown::tree::LeafKind;
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree, TreeItem};
use touchdown::zarr::{Compression, Format};
use touchdown::{
    CastPolicy, Checkpoint, ConvertOptions, ConvertReport, ConvertTo, DType, Device, EngineOptions, ErrorKind, KeyPath,
    Leaf, Mesh, OpenOptions, Otherwise, Pattern, Target, Value, convert, spec,
};
use trees::{array, every_kind, names};

/// Few threads, so that little memory is enough.
fn options(to: ConvertTo) -> ConvertOptions {
    ConvertOptions {
        to,
        engine: EngineOptions { threads: 2, ..EngineOptions::default() },
        save: SaveOptions { sync: false, ..SaveOptions::default() },
        ..ConvertOptions::default()
    }
}

/// Within so little memory that encoders must have none of their own.
fn within(memory: u64, options: ConvertOptions) -> ConvertOptions {
    ConvertOptions { engine: EngineOptions { staging_bytes: memory, ..options.engine }, ..options }
}

/// No compression, but checksums, so that units are read whole; chunks of at most this many bytes.
fn plain(chunk_bytes: Option<u64>) -> LeafOptions {
    LeafOptions { compression: Some(Compression::None), chunk_bytes, ..LeafOptions::default() }
}

/// Every leaf as text, with a hash of its bytes: equal trees give equal maps.
fn contents(target: &Target) -> BTreeMap<String, String> {
    let state = touchdown::load(target.checkpoint(), target).unwrap();
    let leaf = |leaf: &Leaf| match leaf {
        Leaf::Array(array) => {
            let [shard] = array.shards() else { panic!("one device has one shard") };
            format!(
                "{} {:?} {:?} {:08x}",
                array.dtype,
                array.shape,
                array.key_impl,
                crc32c::crc32c(shard.bytes().unwrap())
            )
        }
        // Orbax has no complex scalars: they are saved as arrays without dimensions, which hold the same element.
        Leaf::Value { value: Value::Complex(real, imaginary), dtype: Some(DType::Complex128) } => {
            let element = [real.to_le_bytes(), imaginary.to_le_bytes()].concat();
            format!("{} [] None {:08x}", DType::Complex128, crc32c::crc32c(&element))
        }
        Leaf::Value { value: Value::Float(value), dtype } => format!("{dtype:?} {:x}", value.to_bits()),
        other => format!("{other:?}"),
    };
    state.leaves().map(|(path, value)| (format!("{:?}", path.0), leaf(value))).collect()
}

fn open(path: &Path) -> Checkpoint {
    touchdown::open(path).unwrap()
}

fn whole(path: &Path) -> BTreeMap<String, String> {
    contents(&open(path).target())
}

fn save(path: &Path, tree: &Tree, options: SaveOptions) -> Checkpoint {
    touchdown::save(path, tree, &SaveOptions { sync: false, ..options }).unwrap();
    open(path)
}

/// Every tree of every fixture, by name.
fn fixtures() -> Vec<(String, Checkpoint)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(fixture("")).unwrap() {
        let path = entry.unwrap().path().join("ckpt");
        let name = path.parent().unwrap().file_name().unwrap().to_string_lossy().into_owned();
        let Ok(checkpoint) = touchdown::open(&path).or_else(|_| {
            Checkpoint::open(&path, &OpenOptions { item: Some("params".into()), ..OpenOptions::default() })
        }) else {
            continue;
        };
        for item in &checkpoint.description().items {
            if item.kind == ItemKind::Tree {
                let options =
                    OpenOptions { item: (!item.name.is_empty()).then(|| item.name.clone()), ..OpenOptions::default() };
                let one = Checkpoint::open(&path, &options).unwrap_or_else(|error| panic!("{name}: {error:?}"));
                found.push((format!("{name} [{}]", item.name), one));
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// A pattern that matches one path.
fn exactly(path: &KeyPath) -> Pattern {
    Pattern::glob(&path.to_string())
}

/// The leaves that safetensors can hold.
fn storable(checkpoint: &Checkpoint) -> Target {
    let mut refused = Vec::new();
    for leaf in checkpoint.leaves() {
        let stored = |array: usize| {
            let meta = &checkpoint.arrays()[array].meta;
            header::dtype_name(meta.dtype).is_some() && header::stored_bytes(meta.dtype, &meta.shape).is_some()
        };
        let fits = match &leaf.kind {
            LeafKind::Scalar { dtype, .. } => header::dtype_name(*dtype).is_some(),
            kind => kind.array().is_none_or(stored),
        };
        if !fits {
            refused.push(exactly(&leaf.path));
        }
    }
    readable(checkpoint).skip(refused)
}

fn readable(checkpoint: &Checkpoint) -> Target {
    let unreadable = |leaf: &&touchdown::tree::LeafInfo| matches!(leaf.kind, LeafKind::Unreadable(_));
    checkpoint.target().skip(checkpoint.leaves().iter().filter(unreadable).map(|leaf| exactly(&leaf.path)))
}

#[test]
fn every_fixture_becomes_every_format_and_comes_back() {
    let home = tempfile::tempdir().unwrap();
    let (mut trees, mut leaves, mut refused) = (0, 0, Vec::new());
    for (number, (name, checkpoint)) in fixtures().into_iter().enumerate() {
        let at = |what: &str| home.path().join(format!("{number}-{what}"));
        for (zarr, ocdbt) in [(Format::V3, true), (Format::V3, false), (Format::V2, true), (Format::V2, false)] {
            let target = readable(&checkpoint);
            if target.paths().len() == 0 {
                continue;
            }
            let to = at(&format!("{zarr:?}-{ocdbt}"));
            let mut options = options(ConvertTo::Orbax);
            (options.save.zarr, options.save.ocdbt) = (zarr, ocdbt);
            match convert(&target, &to, &options) {
                Ok(report) => {
                    assert_eq!(whole(&to), contents(&target), "{name} {zarr:?} {ocdbt}");
                    assert_eq!(report.leaves, target.paths().len());
                    assert_eq!(open(&to).custom_metadata(), checkpoint.custom_metadata(), "{name}");
                    leaves += report.leaves;
                }
                Err(error) => {
                    assert!(matches!(error.kind(), ErrorKind::Invalid), "{name}: {error:?}");
                    assert!(!to.exists());
                    refused.push(format!("{name} {zarr:?} {ocdbt}: {}", error.what()));
                }
            }
        }
        // There and back again.
        let target = storable(&checkpoint);
        if target.paths().len() == 0 {
            continue;
        }
        let expected = contents(&target);
        for (form, max_shard_bytes) in [("whole.safetensors", 1), ("dir", u64::MAX), ("dirs", 100)] {
            let to = at(form);
            let tensors = options(ConvertTo::Safetensors { max_shard_bytes });
            if let Err(error) = convert(&target, &to, &tensors) {
                assert!(matches!(error.kind(), ErrorKind::Invalid), "{name}: {error:?}");
                refused.push(format!("{name} {form}: {error}"));
                continue;
            }
            assert_eq!(to.is_file(), form == "whole.safetensors");
            let tensors = open(&to);
            assert!(tensors.notes().is_empty(), "{name}: {:?}", tensors.notes());
            assert_eq!(contents(&tensors.target()), expected, "{name} {form}");
            assert_eq!(tensors.custom_metadata(), checkpoint.custom_metadata(), "{name}");
            let back = at(&format!("{form}-back"));
            match convert(&tensors.target(), &back, &options(ConvertTo::Orbax)) {
                Ok(_) => {
                    assert_eq!(whole(&back), expected, "{name} {form} and back");
                    assert_eq!(open(&back).custom_metadata(), checkpoint.custom_metadata(), "{name}");
                }
                Err(error) => refused.push(format!("{name} {form} back: {error}")),
            }
        }
        trees += 1;
    }
    refused.iter().for_each(|line| println!("refused: {line}"));
    println!("{trees} trees, {leaves} leaves in Orbax forms; {} conversions refused", refused.len());
    assert!(trees > 25 && leaves > 300);
}

#[test]
fn a_tree_of_every_kind_goes_there_and_back() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let save_options =
        SaveOptions { rich_types: true, custom_metadata: Some(json!({"run": 7})), ..SaveOptions::default() };
    let source = save(&at("a"), &every_kind(), save_options);
    let expected = whole(&at("a"));
    for (form, max_shard_bytes) in [("one.safetensors", 1), ("dir", 1 << 30), ("shards", 300_000)] {
        let tensors = options(ConvertTo::Safetensors { max_shard_bytes });
        convert(&source.target(), at(form), &tensors).unwrap();
        assert_eq!(whole(&at(form)), expected, "{form}");
        let back = at(&format!("{form}-back"));
        convert(&open(&at(form)).target(), &back, &options(ConvertTo::Orbax)).unwrap();
        assert_eq!(whole(&back), expected, "{form}");
        let (one, other) = (source.description(), open(&back));
        assert_eq!(other.description().custom_metadata, one.custom_metadata);
        assert_eq!(other.custom_metadata(), Some(&json!({"tree": [1, 2.5, null]})));
        let rich = fs::read_to_string(back.join("state/_METADATA")).unwrap();
        assert!(rich.contains("value_metadata_tree"), "the tuple is one again");
    }
    let shards: Vec<String> =
        fs::read_dir(at("shards")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(shards.len() == 4 && shards.contains(&"model-00001-of-00003.safetensors".to_owned()), "{shards:?}");
    // Onto itself: tensors stay plain tensors, and their metadata what it was.
    let plain = home.path().join("plain.safetensors");
    convert(&open(&fixture("safetensors_single/ckpt")).target(), &plain, &options(ConvertTo::SAFETENSORS)).unwrap();
    let (one, other) = (open(&fixture("safetensors_single/ckpt")), open(&plain));
    assert_eq!(other.custom_metadata(), one.custom_metadata());
    assert!(!String::from_utf8_lossy(&fs::read(&plain).unwrap()).contains("\"touchdown\""));
}

#[test]
fn what_a_format_cannot_hold_is_refused_by_name_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let tree = Tree::new()
        .with("a/w", array(&[4, 4], DType::Int4, 1))
        .with("a/z", array(&[3], DType::Complex128, 2))
        .with("ok", array(&[3], DType::Float32, 3))
        .with("odd", array(&[3], DType::Float4E2M1FN, 3));
    let source = save(&at("a"), &tree, SaveOptions::default());
    let tensors = options(ConvertTo::SAFETENSORS);
    let error = convert(&source.target(), at("b"), &tensors).unwrap_err();
    assert_eq!(error.list().len(), 3);
    for name in ["a.w", "a.z", "odd"] {
        assert!(error.list().iter().any(|line| line.contains(&format!("`{name}`"))), "{error}");
    }
    assert!(error.advice().unwrap().contains("cast"));
    let fitting = source.target().cast([("a/w", DType::Int8), ("a/z", DType::Complex64), ("odd", DType::Float32)]);
    convert(&fitting, at("b"), &tensors).unwrap();
    assert_eq!(whole(&at("b")), contents(&fitting));
    // Names that meet.
    let home_two = at("two");
    let both = Tree::new().with("a/b", 1i64).with("c", 3i64);
    let source = save(&home_two, &both, SaveOptions::default());
    let error = convert(&source.target().rename([("^c$", "a.b")]), at("c"), &tensors).unwrap_err();
    assert!(error.to_string().contains("a/b and a.b would both be `a.b`"), "{error}");
    // Options that a conversion does not take, and nothing to do.
    let mut cast = options(ConvertTo::Orbax);
    cast.save.leaf.dtype = Some(DType::Float64);
    assert!(convert(&source.target(), at("d"), &cast).unwrap_err().to_string().contains("casts by its target"));
    assert!(convert(&source.target().skip(["**"]), at("d"), &options(ConvertTo::Orbax)).is_err());
    // A cast that loses values, where that is an error.
    let strict = open(&at("a")).target().only(["ok"]).cast([("ok", DType::UInt8)]).cast_policy(CastPolicy::Error);
    assert!(convert(&strict, at("d"), &options(ConvertTo::Orbax)).is_err());
    assert_eq!(names(home.path()), ["a", "b", "two"]);
}

#[test]
fn chunks_are_the_shards_of_the_mesh_that_is_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let source = open(&fixture("quickstart/ckpt"));
    let mesh = Mesh::new([("data", 2), ("model", 4)], Device::cpus(8)).unwrap();
    let shard = |checkpoint: &Checkpoint| {
        let rules = [("**/kernel", spec![_, "model"]), ("**/bias", spec!["model"])];
        checkpoint.target().shard(&mesh, rules).otherwise(Otherwise::Replicate)
    };
    for (number, zarr) in [Format::V2, Format::V3].into_iter().enumerate() {
        let to = home.path().join(number.to_string());
        let mut options = options(ConvertTo::Orbax);
        options.save.zarr = zarr;
        convert(
            &shard(&source).cast([(Pattern::glob("params/**").only(touchdown::tree::Filter::Float), DType::BFloat16)]),
            &to,
            &options,
        )
        .unwrap();
        let made = open(&to);
        let target = shard(&made);
        let plan = made.plan(&target).unwrap();
        let arrays: Vec<_> = plan.units.iter().map(|unit| &unit.placements).collect();
        assert!(arrays.iter().all(|placements| placements.len() == 1), "every unit belongs to one shard");
        let logical: u64 = plan.leaves.iter().map(|leaf| leaf.bytes_logical).sum();
        let decoded: u64 = plan.units.iter().map(|unit| unit.decoded_bytes).sum();
        assert_eq!(decoded, logical);
        let saved = made.metadata();
        let kernel = saved.leaves.iter().find(|leaf| leaf.path.to_string().ends_with("kernel")).unwrap();
        assert_eq!(kernel.saved.as_ref().unwrap().1.0[1], ["model"]);
        assert_eq!(kernel.chunk_shape.as_ref().unwrap()[1] * 4, kernel.shape.as_ref().unwrap()[1]);
        // Without a mesh the saved one is kept.
        let again = home.path().join(format!("{number}-again"));
        convert(&made.target(), &again, &options).unwrap();
        assert_eq!(open(&again).metadata().leaves, saved.leaves);
    }
}

/// The plan's bytes of the whole target, decoded and read.
fn decoded_in_one_go(target: &Target) -> u64 {
    target.checkpoint().plan(target).unwrap().units.iter().map(|unit| unit.decoded_bytes).sum()
}

#[test]
fn arrays_larger_than_memory_go_in_ranges_or_through_a_scratch_file() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let tree = Tree::new()
        .with("rows", array(&[4001, 300], DType::Float32, 1))
        .with("columns", array(&[2000, 400], DType::Float32, 2))
        .with("small", array(&[30, 30], DType::Int8, 3))
        .with("packed", array(&[1999, 600], DType::Float4E2M1FN, 4));
    let chunks: [(Pattern, LeafOptions); 3] = [
        ("rows".into(), LeafOptions { chunk_shape: Some(vec![100, 300]), ..plain(None) }),
        ("columns".into(), LeafOptions { chunk_shape: Some(vec![2000, 20]), ..plain(None) }),
        ("packed".into(), LeafOptions { chunk_shape: Some(vec![70, 600]), ..plain(None) }),
    ];
    let saved = SaveOptions { rules: chunks.to_vec(), leaf: plain(None), ..SaveOptions::default() };
    let source = save(&at("a"), &tree, saved);
    let (expected, decoded) = (whole(&at("a")), decoded_in_one_go(&source.target()));
    let mut number = 0;
    let mut go = |target: &Target, options: ConvertOptions, decoded: u64| -> (PathBuf, ConvertReport) {
        number += 1;
        let to = at(&format!("{number}"));
        let report = convert(target, &to, &within(2 << 20, options)).unwrap();
        assert_eq!(report.bytes_decoded, decoded, "each unit once");
        assert!(report.peak_host_bytes <= 2 << 20, "{}", report.peak_host_bytes);
        (to, report)
    };
    let mut small = options(ConvertTo::Orbax);
    small.save.leaf = plain(Some(84_000));
    let (to, report) = go(&source.target(), small.clone(), decoded);
    assert_eq!(whole(&to), expected);
    assert_eq!((report.ranged, report.scratched), (2, 1), "{report:?}");
    let (tensors, report) = go(&source.target(), options(ConvertTo::SAFETENSORS), decoded);
    assert_eq!(whole(&tensors), expected);
    assert_eq!((report.ranged, report.scratched), (2, 1), "{report:?}");
    // From safetensors: rows of what is stored as it is, one chunk for packed elements.
    let tensors = open(&tensors);
    let (to, report) = go(&tensors.target(), small.clone(), decoded_in_one_go(&tensors.target()));
    assert_eq!(whole(&to), expected);
    assert_eq!((report.ranged, report.scratched), (2, 1), "{report:?}");
    // Views: transposed, padded, narrowed, stacked.
    let view = source
        .target()
        .skip(["packed"])
        .transpose([("columns", vec![1, 0])])
        .shape([("rows", vec![5000, 310])])
        .pad(3.0)
        .cast([("rows", DType::Float16)]);
    let (to, report) = go(&view, small, decoded_in_one_go(&view));
    assert_eq!(whole(&to), contents(&view));
    assert_eq!((report.ranged, report.scratched), (2, 0), "{report:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the extents, the chunks on both sides and the memory: the same elements, each unit decoded once.
    #[test]
    fn memory_changes_nothing_but_the_waves(
        rows in 1u64..2500,
        columns in 1u64..900,
        from in (1u64..200, 1u64..200),
        to in (1u64..200, 1u64..200),
        compressed in any::<bool>(),
        zarr3 in any::<bool>(),
        tensors in any::<bool>(),
    ) {
        // The least memory here keeps track of some 10,000 chunks, and says so of more.
        let chunks = |(rows_of, columns_of): (u64, u64)| rows.div_ceil(rows_of) * columns.div_ceil(columns_of);
        prop_assume!(chunks(from).max(chunks(to)) <= 3000);
        let home = tempfile::tempdir().unwrap();
        let tree = Tree::new().with("w", array(&[rows, columns], DType::Float32, rows)).with("n", 3i64);
        let leaf = |(rows_of, columns_of): (u64, u64), compression| LeafOptions {
            chunk_shape: Some(vec![rows_of.min(rows), columns_of.min(columns)]),
            compression: Some(compression),
            ..LeafOptions::default()
        };
        let compression = if compressed { Compression::Zstd { level: 1 } } else { Compression::None };
        let rules = vec![("w".into(), leaf(from, compression))];
        let zarr = if zarr3 { Format::V3 } else { Format::V2 };
        let source = save(&home.path().join("a"), &tree, SaveOptions { zarr, rules, ..SaveOptions::default() });
        let mut options = options(if tensors { ConvertTo::SAFETENSORS } else { ConvertTo::Orbax });
        options.save.rules = vec![("w".into(), leaf(to, Compression::Gpu))];
        let target = source.target();
        let (mut first, mut waves) = (None, Vec::new());
        for memory in [6 << 20, 8 << 20, 64 << 20] {
            let path = home.path().join(memory.to_string());
            let report = convert(&target, &path, &within(memory, options.clone())).unwrap();
            let decoded = decoded_in_one_go(&target);
            // Of a chunk that is stored as it is, parts are read; what lies between two of them need not be read at all.
            let once = if compressed { report.bytes_decoded == decoded } else { report.bytes_decoded <= decoded };
            prop_assert!(once && report.bytes_decoded >= rows * columns * 4, "{} {decoded}", report.bytes_decoded);
            let found = whole(&path);
            prop_assert_eq!(first.get_or_insert_with(|| found.clone()), &found);
            waves.push(report.waves);
        }
        prop_assert_eq!(first.unwrap(), contents(&target));
        // A little more memory may mean more waves: what fits in pieces goes through no scratch file, which is one wave.
        prop_assert_eq!(waves.iter().min(), waves.last(), "{:?}", waves);
    }
}

/// All files below a directory, or the one file, whose bytes do not depend on time and chance.
fn fixed_files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    if path.is_file() {
        return BTreeMap::from([(String::new(), fs::read(path).unwrap())]);
    }
    let mut found = BTreeMap::new();
    for name in names(path) {
        let below = path.join(&name);
        // Data files have random names, and nodes point to them; stamps have times.
        let of_stamps = name == "_touchdown_sums.json" && path.join("_CHECKPOINT_METADATA").exists();
        if of_stamps || ["d", "manifest.ocdbt", "_CHECKPOINT_METADATA", "commit_success.txt"].contains(&name.as_str()) {
            continue;
        }
        found.extend(fixed_files(&below).into_iter().map(|(rest, bytes)| (format!("{name}/{rest}"), bytes)));
    }
    found
}

#[test]
fn a_conversion_that_stops_anywhere_leaves_the_old_or_the_new_and_is_gone_on_with() {
    let home = tempfile::tempdir().unwrap();
    let tree = Tree::new()
        .with("a", array(&[500], DType::Float32, 1))
        .with("w", array(&[700, 400], DType::Float32, 2))
        .with("z", array(&[300, 700], DType::Float32, 3))
        .with("n", 7i64)
        .with("text", "new");
    let leaf = plain(Some(90_000));
    let source = save(&home.path().join("source"), &tree, SaveOptions { leaf: leaf.clone(), ..SaveOptions::default() });
    let new = contents(&source.target());
    let old_source = save(&home.path().join("old"), &Tree::new().with("text", "old"), SaveOptions::default());
    let old = contents(&old_source.target());
    let forms = [
        ("database", ConvertTo::Orbax, true, "run"),
        ("directories", ConvertTo::Orbax, false, "run"),
        ("file", ConvertTo::SAFETENSORS, true, "run.safetensors"),
        ("files", ConvertTo::Safetensors { max_shard_bytes: 900_000 }, true, "run"),
    ];
    for (form, to, ocdbt, name) in forms {
        for overwrite in [false, true] {
            let mut base = within(1_530_000, options(to));
            base.save.leaf = leaf.clone();
            (base.save.ocdbt, base.save.sync, base.save.overwrite) = (ocdbt, true, overwrite);
            base.save.data_file_bytes = 500_000;
            let uninterrupted = home.path().join(form).join("whole").join(name);
            if !overwrite {
                convert(&source.target(), &uninterrupted, &base).unwrap();
            }
            let (mut stops, mut resumed, mut seen) = (0, Vec::new(), BTreeMap::new());
            loop {
                let place = home.path().join(form).join(format!("{overwrite}-{stops}"));
                fs::create_dir_all(&place).unwrap();
                let path = place.join(name);
                if overwrite {
                    let plain = ConvertOptions { resume: false, ..base.clone() };
                    convert(&old_source.target(), &path, &plain).unwrap();
                }
                let mut stopped = ConvertOptions { resume: true, ..base.clone() };
                stopped.save.store = Arc::new(stopping(stops, true));
                let result = convert(&source.target(), &path, &stopped);
                let found = match touchdown::open(&path) {
                    Ok(checkpoint) if contents(&checkpoint.target()) == new => "new",
                    Ok(checkpoint) => {
                        assert_eq!(contents(&checkpoint.target()), old, "{form}: stopped at {stops}");
                        "old"
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::NotFound);
                        assert!(!overwrite, "{form}: stopped at {stops}: the old one is gone");
                        "none"
                    }
                };
                let left = leftovers(&place).unwrap();
                assert!(left.iter().all(|one| one.name == name), "{left:?}");
                assert_eq!(names(&place).len(), left.len() + usize::from(path.exists()));
                *seen.entry(found).or_insert(0) += 1;
                if result.is_ok() {
                    assert!(left.is_empty(), "{left:?}");
                    break;
                }
                // Gone on with, it is what it would have been.
                if found != "new" {
                    let report = convert(&source.target(), &path, &ConvertOptions { resume: true, ..base.clone() });
                    let report = report.unwrap_or_else(|error| panic!("{form}: stopped at {stops}: {error:?}"));
                    resumed.push(report.bytes_resumed);
                    assert_eq!(whole(&path), new, "{form}: stopped at {stops}");
                    assert!(fixed_files(&path) == fixed_files(&uninterrupted), "{form}: stopped at {stops}");
                    // A journal is used up; what has no line of one stays, as any save's leftover does.
                    for left in leftovers(&place).unwrap() {
                        let journal = fs::read(left.path.join(".touchdown-convert")).unwrap_or_default();
                        assert!(!journal.contains(&b'\n'), "{form}: stopped at {stops}: {left:?}");
                    }
                }
                fs::remove_dir_all(&place).unwrap();
                stops += 1;
            }
            let steps = resumed.iter().filter(|bytes| **bytes > 0).collect::<std::collections::BTreeSet<_>>().len();
            println!("{form}, overwrite {overwrite}: stopped at {stops} operations: {seen:?}; {steps} places to go on");
            assert!(stops > 20 && steps >= 2, "{resumed:?}");
            assert!(seen.contains_key("new") && seen.contains_key(if overwrite { "old" } else { "none" }));
        }
    }
}

#[test]
fn only_the_same_conversion_is_gone_on_with() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let tree = |seed| {
        Tree::new()
            .with("v", array(&[300, 300], DType::Float32, seed))
            .with("w", array(&[400, 300], DType::Float32, seed))
    };
    let small = SaveOptions { leaf: plain(Some(50_000)), ..SaveOptions::default() };
    let source = save(&at("a"), &tree(1), small.clone());
    let mut base = within(1_530_000, options(ConvertTo::Orbax));
    (base.save.leaf, base.resume) = (small.leaf.clone(), true);
    let interrupt = |steps| {
        let mut stopped = base.clone();
        stopped.save.store = Arc::new(stopping(steps, true));
        let error = convert(&source.target(), at("b"), &stopped).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
    };
    interrupt(40);
    let other = source.target().cast([("w", DType::Float16)]);
    let error = convert(&other, at("b"), &base).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    let lines = error.list().join(" ");
    assert!(lines.contains("what is converted") && lines.contains("what is written"), "{error}");
    assert!(!lines.contains("source"), "{error}");
    // Another source of the same shape, at the same place.
    fs::rename(at("a"), at("a-before")).unwrap();
    let changed = save(&at("a"), &tree(2), small);
    let error = convert(&changed.target(), at("b"), &base).unwrap_err();
    assert_eq!(error.list(), ["the source's files: not the same"]);
    fs::remove_dir_all(at("a")).unwrap();
    fs::rename(at("a-before"), at("a")).unwrap();
    // What is left over is no obstacle for one that begins anew, and the memory may be another.
    convert(&other, at("c"), &base).unwrap();
    let more = within(8 << 20, base.clone());
    let report = convert(&source.target(), at("b"), &more).unwrap();
    assert!(report.bytes_resumed > 0, "{report:?}");
    assert_eq!(whole(&at("b")), whole(&at("a")));
    // Cancelled, it is left behind or not, as was said.
    for resume in [true, false] {
        let cancelled = ConvertOptions { resume, progress: Default::default(), ..base.clone() };
        cancelled.progress.cancel();
        assert_eq!(convert(&source.target(), at("d"), &cancelled).unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(leftovers(home.path()).unwrap().len(), usize::from(resume), "{:?}", names(home.path()));
        convert(&source.target(), at("d"), &ConvertOptions { progress: Default::default(), ..base.clone() }).unwrap();
        fs::remove_dir_all(at("d")).unwrap();
    }
    assert_eq!(names(home.path()), ["a", "b", "c"]);
}

/// Also where each chunk of the source is a file.
#[test]
fn a_source_whose_chunks_changed_is_not_gone_on_with() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let tree = Tree::new().with("w", array(&[400, 300], DType::Float32, 1));
    let files = SaveOptions { ocdbt: false, leaf: plain(Some(50_000)), ..SaveOptions::default() };
    let source = save(&at("a"), &tree, files);
    let mut base = within(1_530_000, options(ConvertTo::Orbax));
    (base.save.leaf, base.resume) = (plain(Some(50_000)), true);
    let mut stopped = base.clone();
    stopped.save.store = Arc::new(stopping(8, true));
    convert(&source.target(), at("b"), &stopped).unwrap_err();
    assert_eq!(leftovers(home.path()).unwrap().len(), 1);
    let chunk = at("a/state/w/c/0/0");
    let mut bytes = fs::read(&chunk).unwrap();
    bytes.push(0);
    fs::write(&chunk, &bytes).unwrap();
    let error = convert(&source.target(), at("b"), &base).unwrap_err();
    assert_eq!(error.list(), ["the source's files: not the same"]);
}

/// A high level asks for much memory only of large chunks: the default is enough for chunks as they are by default.
#[test]
fn high_levels_need_no_more_memory_than_there_is_by_default() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let tree = Tree::new().with("w", array(&[3, 1 << 18], DType::Float32, 1));
    let source = save(&at("a"), &tree, SaveOptions::default());
    let mut high = options(ConvertTo::Orbax);
    high.save.leaf.compression = Some(Compression::Zstd { level: 20 });
    convert(&source.target(), at("b"), &high).unwrap();
    assert_eq!(whole(&at("b")), whole(&at("a")));
}

#[test]
fn only_safetensors_are_overwritten_by_safetensors() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let source = save(&at("source"), &Tree::new().with("w", array(&[9], DType::Int16, 1)), SaveOptions::default());
    let mut over = options(ConvertTo::SAFETENSORS);
    over.save.overwrite = true;
    fs::write(at("notes.safetensors"), "precious").unwrap();
    fs::create_dir(at("notes")).unwrap();
    fs::write(at("notes/today"), "precious").unwrap();
    fs::create_dir(at("dir.safetensors")).unwrap();
    for (name, what) in
        [("notes.safetensors", "no safetensors file"), ("notes", "no checkpoint"), ("dir.safetensors", "no file")]
    {
        let error = convert(&source.target(), at(name), &over).unwrap_err();
        assert!(error.kind() == ErrorKind::Exists && error.to_string().contains(what), "{name}: {error}");
    }
    assert_eq!(fs::read(at("notes.safetensors")).unwrap(), b"precious");
    assert_eq!(fs::read(at("notes/today")).unwrap(), b"precious");
    let other = save(&at("other"), &Tree::new().with("v", array(&[5], DType::Int8, 2)), SaveOptions::default());
    convert(&source.target(), at("w.safetensors"), &over).unwrap();
    convert(&other.target(), at("w.safetensors"), &over).unwrap();
    assert_eq!(whole(&at("w.safetensors")), whole(&at("other")));
    assert_eq!(
        names(home.path()),
        ["dir.safetensors", "notes", "notes.safetensors", "other", "source", "w.safetensors"]
    );
}

/// Cancelled while the last file of the new checkpoint is written, it is not put in place; kept, it is gone on with.
#[test]
fn a_conversion_is_cancelled_until_it_is_put_in_place() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let source = save(&at("source"), &every_kind(), SaveOptions::default());
    for resume in [false, true] {
        let mut cancelled = ConvertOptions { resume, ..options(ConvertTo::Orbax) };
        let progress = cancelled.progress.clone();
        cancelled.save.store = Arc::new(Watched::new(move |operation| {
            if matches!(operation, Operation::Write(path, _) if path.ends_with("commit_success.txt")) {
                progress.cancel();
            }
            Ok(())
        }));
        assert_eq!(convert(&source.target(), at("to"), &cancelled).unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!((at("to").exists(), leftovers(home.path()).unwrap().len()), (false, usize::from(resume)));
    }
    let report = convert(&source.target(), at("to"), &ConvertOptions { resume: true, ..options(ConvertTo::Orbax) });
    let report = report.unwrap();
    assert_eq!(report.bytes_resumed, report.bytes_logical);
    assert_eq!(
        (whole(&at("to")), names(home.path())),
        (whole(&at("source")), vec!["source".to_owned(), "to".to_owned()])
    );
}

#[test]
fn json_items_go_along_and_the_source_is_never_lost() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let tree = |n: i64| TreeItem::from(Tree::new().with("n", n));
    let config = ("config".to_owned(), TreeItem::from(json!({"rate": 0.5})));
    let metrics = Some(json!({"loss": 0.25}));
    let save = SaveOptions { metrics, sync: false, ..SaveOptions::default() };
    touchdown::save_items(at("two"), &[("state".to_owned(), tree(1)), config.clone()], &save).unwrap();
    touchdown::save_items(at("three"), &[("state".to_owned(), tree(1)), ("other".to_owned(), tree(2)), config], &save)
        .unwrap();
    let mut over = options(ConvertTo::Orbax);
    over.save.overwrite = true;
    let items = |path: &Path| touchdown::load_items(path).unwrap().into_keys().collect::<Vec<_>>();
    let report = convert(&open(&at("three")).target(), at("new"), &over).unwrap();
    assert_eq!(
        (items(&at("new")), report.other_items),
        (vec!["config".into(), "metrics".into(), "state".into()], vec!["other".to_owned()])
    );
    assert_eq!(open(&at("new")).json_item("metrics").unwrap(), json!({"loss": 0.25}));
    // In its own place, if nothing of it is lost.
    convert(&open(&at("two")).target(), at("two"), &over).unwrap();
    assert_eq!(items(&at("two")), ["config", "metrics", "state"]);
    let mut tensors = options(ConvertTo::SAFETENSORS);
    tensors.save.overwrite = true;
    for (from, to, options, what) in [
        ("three", "three", &over, "whose other items would be lost"),
        ("three", "three", &tensors, "whose other items would be lost"),
        ("two/state", "two", &over, "the source lies within the destination"),
        ("two", "two/new", &over, "the destination lies within the source"),
        ("two", "two/state/x.safetensors", &tensors, "the destination lies within the source"),
    ] {
        let error = convert(&open(&at(from)).target(), at(to), options).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains(what), "{from} to {to}: {error}");
    }
    assert_eq!(items(&at("three")), ["config", "metrics", "other", "state"]);
    assert_eq!(names(home.path()), ["new", "three", "two"]);
    // Through safetensors and back, documents as they are written, and again as tensors.
    let document = b"{\"rate\": NaN, \"big\": 1180591620717411303424}";
    fs::write(at("new").join("config/data.json"), document).unwrap();
    fs::remove_file(at("new").join("config/_touchdown_sums.json")).unwrap();
    for (from, to, options) in [
        ("new", "new.safetensors", &tensors),
        ("new.safetensors", "again.safetensors", &tensors),
        ("again.safetensors", "back", &over),
    ] {
        let report = convert(&open(&at(from)).target(), at(to), options).unwrap();
        assert_eq!(
            (report.other_items.len(), open(&at(to)).json_item("config").unwrap()["rate"].clone()),
            (0, json!("NaN"))
        );
    }
    assert_eq!(items(&at("back")), ["config", "metrics", "state"]);
    for file in ["config/data.json", "metrics/metrics"] {
        assert_eq!(fs::read(at("back").join(file)).unwrap(), fs::read(at("new").join(file)).unwrap(), "{file}");
    }
}

/// Whatever the memory, what is to be gone on with is kept array by array.
#[test]
fn finished_arrays_are_kept_although_memory_would_take_all_at_once() {
    let home = tempfile::tempdir().unwrap();
    let tree =
        (0..4).fold(Tree::new(), |tree, n| tree.with(format!("w{n}").as_str(), array(&[3 << 20], DType::Float32, n)));
    let source = save(&home.path().join("source"), &tree, SaveOptions { sync: false, ..SaveOptions::default() });
    for (to, name) in [(ConvertTo::Orbax, "to"), (ConvertTo::SAFETENSORS, "to.safetensors")] {
        let [to, mut stopped] = [(); 2].map(|()| ConvertOptions { resume: true, ..options(to) });
        let progress = stopped.progress.clone();
        stopped.save.store = Arc::new(Watched::new(move |_| {
            if progress.so_far().bytes_done > 14 << 20 {
                progress.cancel();
            }
            Ok(())
        }));
        let path = home.path().join(name);
        assert_eq!(convert(&source.target(), &path, &stopped).unwrap_err().kind(), ErrorKind::Cancelled);
        let report = convert(&source.target(), &path, &to).unwrap();
        assert!(report.bytes_resumed >= 12 << 20, "{report:?}");
        assert_eq!(contents(&open(&path).target()), contents(&source.target()));
    }
}

/// Numbers that no JSON value here holds: they go along as they are written.
#[test]
fn custom_metadata_and_json_items_keep_their_numbers() {
    let home = tempfile::tempdir().unwrap();
    let (from, to, again) = (home.path().join("from"), home.path().join("to"), home.path().join("again"));
    let custom = serde_json::json!({"marker": 1});
    let tree = Tree::new().with("w", NewArray::from_vec(&[2], vec![1.0_f32, 2.0])).custom_metadata(custom.clone());
    let items = [("state".to_owned(), tree.into()), ("config".to_owned(), custom.clone().into())];
    // Without checksums of its files, which are changed here.
    let save = SaveOptions { custom_metadata: Some(custom), checksum: Some(false), ..SaveOptions::default() };
    touchdown::save_items(&from, &items, &save).unwrap();
    let numbers = r#"{"loss": NaN, "big": 1180591620717411303424, "low": [-Infinity, "NaN"], "marker": 1}"#;
    let files = ["_CHECKPOINT_METADATA", "state/_METADATA", "config/data.json"];
    for file in files {
        let path = from.join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        let changed = text.replace(r#"{"marker": 1}"#, numbers).replace(r#"{"marker":1}"#, numbers);
        assert_ne!(text, changed, "{file}");
        std::fs::write(path, changed).unwrap();
    }
    for (from, to) in [(&from, &to), (&to, &again)] {
        let checkpoint = touchdown::open(from).unwrap();
        convert(&checkpoint.target(), to, &options(ConvertTo::Orbax)).unwrap();
        for file in files {
            let text = std::fs::read_to_string(to.join(file)).unwrap();
            assert!(text.contains(numbers), "{file}: {text}");
        }
        touchdown::load_items(to).unwrap();
    }
    // What is given for the new checkpoint takes the place of the source's.
    let mut given = options(ConvertTo::Orbax);
    given.save.custom_metadata = Some(serde_json::json!({"new": true}));
    let other = home.path().join("other");
    convert(&touchdown::open(&from).unwrap().target(), &other, &given).unwrap();
    assert!(!std::fs::read_to_string(other.join("_CHECKPOINT_METADATA")).unwrap().contains("NaN"));
}
