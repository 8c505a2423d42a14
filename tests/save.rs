//! Saves: what is saved is loaded again, whatever the options; nothing that goes wrong costs a checkpoint.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

mod stopping;
mod trees;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use serde_json::json;
use stopping::{Operation, Watched, stopping};
use touchdown::io::store::{LeftoverKind, leftovers};
use touchdown::tree::save::{LeafOptions, NewArray, NewLeaf, SaveOptions, Tree, TreeItem};
use touchdown::zarr::{Compression, Format};
use touchdown::{DType, Device, Engine, EngineOptions, ErrorKind, KeyPath, Leaf, Mesh, Sharding, State, Value, spec};
use trees::{array, every_kind, names, noise};

fn engine() -> Engine {
    Engine::new(EngineOptions { threads: 2, staging_bytes: 32 << 20, ..EngineOptions::default() }).unwrap()
}

fn save(engine: &Engine, path: &Path, tree: &Tree, options: &SaveOptions) -> touchdown::Result<()> {
    engine.save(path, tree, options)?.wait().map(drop)
}

fn load(engine: &Engine, path: &Path) -> State {
    let checkpoint = touchdown::open(path).unwrap();
    engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap()
}

/// Every leaf as text, with a hash of its bytes: equal trees give equal maps.
fn contents(state: &State) -> BTreeMap<String, String> {
    let leaf = |leaf: &Leaf| match leaf {
        Leaf::Array(array) => {
            let shards =
                array.shards().iter().map(|shard| (shard.region.clone(), crc32c::crc32c(shard.bytes().unwrap())));
            format!("{} {:?} {:?} {:?}", array.dtype, array.shape, array.key_impl, shards.collect::<Vec<_>>())
        }
        other => format!("{other:?}"),
    };
    state.leaves().map(|(path, value)| (format!("{path:?}"), leaf(value))).collect()
}

fn expected(tree: &Tree, engine: &Engine) -> BTreeMap<String, String> {
    // What a plain save gives, itself checked against the bytes below.
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("plain");
    let plain = SaveOptions {
        leaf: LeafOptions { compression: Some(Compression::None), ..LeafOptions::default() },
        checksum: Some(false),
        ..SaveOptions::default()
    };
    save(engine, &path, tree, &plain).unwrap();
    contents(&load(engine, &path))
}

#[test]
fn what_is_saved_is_loaded_whatever_the_options() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let tree = every_kind();
    let expected = expected(&tree, &engine);
    let mut number = 0;
    for zarr in [Format::V2, Format::V3] {
        for ocdbt in [true, false] {
            for compression in [Compression::None, Compression::Gpu, Compression::Zstd { level: 3 }] {
                for (chunk_bytes, data_file_bytes) in [(None, 2 << 30), (Some(40_000), 100_000)] {
                    let path = home.path().join(format!("{number}"));
                    number += 1;
                    let leaf = LeafOptions { compression: Some(compression), chunk_bytes, ..LeafOptions::default() };
                    let options = SaveOptions {
                        zarr,
                        ocdbt,
                        leaf,
                        data_file_bytes,
                        sync: false,
                        custom_metadata: Some(json!({"run": 7})),
                        ..SaveOptions::default()
                    };
                    save(&engine, &path, &tree, &options).unwrap();
                    assert_eq!(contents(&load(&engine, &path)), expected, "{options:?}");
                    let checkpoint = touchdown::open(&path).unwrap();
                    assert_eq!(checkpoint.custom_metadata(), Some(&json!({"tree": [1, 2.5, null]})));
                    assert_eq!(checkpoint.description().custom_metadata, Some(json!({"run": 7})));
                }
            }
        }
    }
    let kernel = load(&engine, &home.path().join("5"));
    let NewLeaf::Array(saved) = &tree.leaves()[0].1 else { panic!("an array") };
    assert_eq!(kernel.array("params/dense/kernel").unwrap().shards()[0].bytes().unwrap(), &saved.parts[0].data[..]);
    println!("{number} ways to save");
}

#[test]
fn shards_are_saved_once_and_the_sharding_comes_back() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let mesh = Mesh::new([("data", 2), ("model", 4)], Device::cpus(8)).unwrap();
    let whole: Vec<u16> = (0..30 * 18).collect();
    let mut parts = 0;
    let sharding = Sharding::new(Arc::clone(&mesh), spec!["model"], 2).unwrap();
    let array = NewArray::sharded(&[30, 18], DType::UInt16, sharding, |region| {
        parts += 1;
        let rows = region.start[0]..region.end(0);
        let values = rows.flat_map(|row| whole[row as usize * 18..][..18].iter().flat_map(|value| value.to_le_bytes()));
        Ok(values.collect::<Vec<u8>>().into())
    });
    let tree = Tree::new().with("w", array.unwrap());
    assert_eq!(parts, 4, "replicas are asked for once");
    let path = home.path().join("c");
    save(&engine, &path, &tree, &SaveOptions::default()).unwrap();
    let checkpoint = touchdown::open(&path).unwrap();
    assert_eq!(checkpoint.arrays()[0].meta.grid.chunk_shape(), [8, 18], "30 rows over 4 are chunks of 8");
    let saved = checkpoint.metadata().leaves[0].saved.clone().unwrap();
    assert_eq!(
        (saved.0.axes.as_slice(), saved.0.shape.as_slice()),
        (&["data".to_owned(), "model".to_owned()][..], &[2, 4][..])
    );
    let target = checkpoint.target().shard_as_saved(&Device::cpus(8));
    let state = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
    // A loaded state is a tree to save, with its sharding and without a copy.
    let again = home.path().join("again");
    save(&engine, &again, &Tree::from(&state), &SaveOptions::default()).unwrap();
    let loaded = load(&engine, &again);
    let values: &[u16] = loaded.array("w").unwrap().shards()[0].as_slice().unwrap();
    assert_eq!(values, whole);
    assert_eq!(touchdown::open(&again).unwrap().metadata().leaves[0].saved.clone().unwrap().1, spec!["model"]);
}

#[test]
fn storage_types_chunks_and_compression_are_chosen_per_leaf() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let tree = Tree::new()
        .with("a/w", NewArray::from_vec(&[4, 4], vec![1.5f32; 16]))
        .with("b/w", NewArray::from_vec(&[4, 4], vec![300.0f32; 16]))
        .with("n", NewArray::from_vec(&[3], vec![1i32, 2, 3]));
    let rules = vec![
        ("b/**".into(), LeafOptions { dtype: Some(DType::UInt8), ..LeafOptions::default() }),
        (
            "**/w".into(),
            LeafOptions { dtype: Some(DType::BFloat16), chunk_shape: Some(vec![2, 3]), ..LeafOptions::default() },
        ),
    ];
    let each = |path: &KeyPath, _: &NewLeaf| LeafOptions {
        compression: (path.to_string() == "n").then_some(Compression::None),
        ..LeafOptions::default()
    };
    let options = SaveOptions { rules, each: Some(Arc::new(each)), ..SaveOptions::default() };
    let path = home.path().join("c");
    let report = engine.save(&path, &tree, &options).unwrap().wait().unwrap();
    assert_eq!(report.lossy, [("state: b/w".to_owned(), 16)]);
    let state = load(&engine, &path);
    let dtypes = ["a/w", "b/w", "n"].map(|path| state.array(path).unwrap().dtype);
    assert_eq!(dtypes, [DType::BFloat16, DType::UInt8, DType::Int32]);
    assert_eq!(state.array("b/w").unwrap().shards()[0].bytes().unwrap(), [255; 16]);
    let chunks = touchdown::open(&path).unwrap().arrays()[0].meta.grid.chunk_shape().to_vec();
    assert_eq!(chunks, [2, 3]);
    // A policy that refuses leaves nothing behind.
    let strict = SaveOptions { cast_policy: touchdown::dtype::CastPolicy::Error, ..options };
    let error = save(&engine, &home.path().join("d"), &tree, &strict).unwrap_err();
    assert_eq!(error.list(), ["state: b/w: 16 elements"]);
    assert_eq!(names(home.path()), ["c"]);
}

#[test]
fn what_cannot_be_saved_is_found_before_anything_is_written() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let short = NewArray::new(&[4], DType::Float32, vec![0; 12]);
    let tree = Tree::new()
        .with("a.b", 1i64)
        .with("a/b", 2i64)
        .with("bits", array(&[4], DType::UInt4, 1))
        .with("short", short)
        .with("big", NewLeaf::Value(Value::Int(1 << 90), None));
    let rules = vec![("nothing/**".into(), LeafOptions::default())];
    let error =
        save(&engine, &home.path().join("c"), &tree, &SaveOptions { rules, ..SaveOptions::default() }).unwrap_err();
    let text = error.to_string();
    for part in ["a.b", "bits", "short", "big", "nothing/**"] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    let options = SaveOptions {
        zarr: Format::V2,
        checksum: Some(true),
        leaf: LeafOptions { compression: Some(Compression::None), ..LeafOptions::default() },
        ..SaveOptions::default()
    };
    let one = Tree::new().with("w", array(&[4], DType::Int8, 1));
    assert!(save(&engine, &home.path().join("c"), &one, &options).unwrap_err().to_string().contains("checksums"));
    assert!(save(&engine, &home.path().join("c"), &Tree::new(), &SaveOptions::default()).is_err());
    for bad in ["metrics", "../x", "a/b", ""] {
        let items = [(bad.to_owned(), TreeItem::from(one.clone()))];
        assert!(engine.save_items(home.path().join("c"), &items, &SaveOptions::default()).is_err(), "{bad}");
    }
    assert!(names(home.path()).is_empty());
}

#[test]
fn elements_levels_and_chunks_that_cannot_be_are_found_together_before_anything_is_written() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let path = home.path().join("c");
    let level = |level| LeafOptions { compression: Some(Compression::Zstd { level }), ..LeafOptions::default() };
    let tree = Tree::new()
        .with("bools", NewArray::new(&[3], DType::Bool, vec![0, 1, 2]))
        .with("nibbles", NewArray::new(&[2], DType::Int4, vec![7, 8]))
        .with("floats", NewArray::new(&[2], DType::Float4E2M1FN, vec![15, 16]))
        .with("large", array(&[4096, 1024], DType::UInt8, 1))
        .with("small", array(&[64, 1024], DType::UInt8, 1))
        .with("padded", array(&[3], DType::UInt8, 1));
    let padded = LeafOptions { chunk_shape: Some(vec![1 << 40]), ..LeafOptions::default() };
    let rules = vec![("large".into(), level(22)), ("small".into(), level(22)), ("padded".into(), padded)];
    let error = save(&engine, &path, &tree, &SaveOptions { rules, ..SaveOptions::default() }).unwrap_err();
    let text = error.to_string();
    for part in ["bools", "nibbles", "floats", "large", "padded"] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    assert!(!text.contains("leaf small"), "an encoder of small chunks is small: {text}");
    // One bad leaf is one error.
    let one = Tree::new().with("bools", NewArray::new(&[3], DType::Bool, vec![0, 1, 2]));
    let error = save(&engine, &path, &one, &SaveOptions::default()).unwrap_err();
    assert!(error.list().is_empty() && error.to_string().contains("no bool"), "{error}");
    assert!(names(home.path()).is_empty());
    let small = Tree::new().with("small", array(&[64, 1024], DType::UInt8, 1));
    save(&engine, &path, &small, &SaveOptions { leaf: level(22), ..SaveOptions::default() }).unwrap();
}

#[test]
fn only_checkpoints_are_overwritten() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let tree = Tree::new().with("w", array(&[9], DType::Int16, 1));
    let over = SaveOptions { overwrite: true, ..SaveOptions::default() };
    let at = |name: &str| home.path().join(name);
    std::fs::create_dir(at("notes")).unwrap();
    std::fs::write(at("notes/today"), "precious").unwrap();
    save(&engine, &at("steps/1"), &tree, &over).unwrap();
    save(&engine, &at("steps/2"), &tree, &over).unwrap();
    for (name, what) in [("notes", "no checkpoint"), ("steps", "a root of steps")] {
        let error = save(&engine, &at(name), &tree, &over).unwrap_err();
        assert!(error.kind() == ErrorKind::Exists && error.to_string().contains(what), "{error}");
    }
    assert_eq!(std::fs::read(at("notes/today")).unwrap(), b"precious");
    assert_eq!(names(&at("steps")), ["1", "2"]);
    std::fs::create_dir(at("empty")).unwrap();
    save(&engine, &at("empty"), &tree, &over).unwrap();
    // A damaged checkpoint is one.
    std::fs::remove_file(at("empty/state/_METADATA")).unwrap();
    std::fs::remove_file(at("empty/state/manifest.ocdbt")).unwrap();
    save(&engine, &at("empty"), &tree, &over).unwrap();
    assert_eq!(contents(&load(&engine, &at("empty"))).len(), 1);
}

#[test]
fn a_link_to_a_checkpoint_is_not_deleted() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let tree = Tree::new().with("w", array(&[9], DType::Int16, 1));
    let (path, link) = (home.path().join("c"), home.path().join("link"));
    save(&engine, &path, &tree, &SaveOptions::default()).unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for link in [link.clone(), link.join("")] {
        let error = touchdown::delete(link).unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
    }
    assert_eq!(contents(&load(&engine, &link)).len(), 1);
    assert_eq!(names(home.path()), ["c", "link"]);
}

/// Every data file is closed when it is full, and every value of its own when it is written.
#[test]
fn many_small_files_do_not_take_many_descriptors() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let mut tree = Tree::new();
    for index in 0..600 {
        tree.push(format!("a{index}").as_str(), array(&[3000], DType::UInt8, index));
    }
    let most = Arc::new(AtomicU64::new(0));
    for ocdbt in [true, false] {
        let (open, seen) = (AtomicU64::new(0), Arc::clone(&most));
        let store = Arc::new(Watched::new(move |operation| {
            match operation {
                Operation::Create(_) | Operation::Open(_) => {
                    _ = seen.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst)
                }
                Operation::Close => _ = open.fetch_sub(1, Ordering::SeqCst),
                _ => {}
            }
            Ok(())
        }));
        let options = SaveOptions { ocdbt, data_file_bytes: 1, store, ..SaveOptions::default() };
        let path = home.path().join(format!("{ocdbt}"));
        save(&engine, &path, &tree, &options).unwrap();
        assert_eq!(contents(&load(&engine, &path)).len(), 600);
    }
    let most = most.load(Ordering::SeqCst);
    assert!(most <= 70, "{most} files were open at once");
}

/// Large chunks go past the page cache where the file system lets them, and the checkpoint says the same.
#[test]
fn what_goes_past_the_page_cache_is_the_same() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let big = [noise(3 << 20, 5), vec![7; 3 << 20], noise(3 << 20, 6)].concat();
    let tree = Tree::new()
        .with("small", array(&[5000], DType::UInt8, 1))
        .with("big", NewArray::new(&[9 << 10, 1 << 10], DType::UInt8, big))
        .with("odd", array(&[1_000_003], DType::UInt8, 2))
        .with("last", array(&[70], DType::Float32, 3));
    let opened = Arc::new(AtomicU64::new(0));
    for zarr in [Format::V2, Format::V3] {
        for compression in [Compression::Gpu, Compression::Zstd { level: 1 }, Compression::None] {
            for direct in [false, true] {
                let seen = Arc::clone(&opened);
                let store = Arc::new(Watched::new(move |operation| {
                    if let Operation::Open(_) = operation {
                        assert!(direct, "a second descriptor is for direct writes");
                        seen.fetch_add(1, Ordering::SeqCst);
                    }
                    Ok(())
                }));
                let leaf = LeafOptions { compression: Some(compression), ..LeafOptions::default() };
                let options = SaveOptions { zarr, leaf, direct, store, ..SaveOptions::default() };
                let path = home.path().join(format!("{zarr:?}-{compression:?}-{direct}"));
                save(&engine, &path, &tree, &options).unwrap();
                assert_eq!(contents(&load(&engine, &path)), expected(&tree, &engine));
            }
        }
    }
    if opened.load(Ordering::SeqCst) == 0 {
        println!("skipped in part: this file system has no direct writes");
    }
}

/// An array whose first inner chunk is small when it is compressed: the others are aligned all the same.
#[test]
fn inner_chunks_are_aligned_whatever_the_first_one_is() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let mut big = vec![0; 4 << 20];
    big.extend(noise(8 << 20, 3));
    let tree = Tree::new()
        .with("a", array(&[5000], DType::UInt8, 1))
        .with("b", NewArray::new(&[12, 1 << 20], DType::UInt8, big));
    let path = home.path().join("c");
    save(&engine, &path, &tree, &SaveOptions::default()).unwrap();
    let checkpoint = touchdown::open(&path).unwrap();
    let plan = checkpoint.plan(&checkpoint.target()).unwrap();
    let extents = plan.units.iter().filter_map(|unit| match unit.source {
        touchdown::plan::Source::File { offset, len, .. } => Some((offset, len)),
        _ => None,
    });
    let large: Vec<(u64, u64)> = extents.filter(|(_, len)| *len >= 1 << 20).collect();
    assert!(large.len() == 2 && large.iter().all(|(offset, _)| offset.is_multiple_of(4096)), "{large:?}");
}

#[test]
fn a_chunk_larger_than_the_budget_is_saved_within_it() {
    let home = tempfile::tempdir().unwrap();
    let engine =
        Engine::new(EngineOptions { threads: 2, staging_bytes: 24 << 20, ..EngineOptions::default() }).unwrap();
    // A chunk of 40 MB that v2 cannot divide into inner chunks.
    let tree =
        Tree::new().with("w", array(&[10, 1000, 1001], DType::Float32, 9)).with("v", array(&[9], DType::Int8, 1));
    for (number, (ocdbt, compression)) in
        [(true, Compression::Gpu), (false, Compression::None), (true, Compression::Zstd { level: 1 })]
            .into_iter()
            .enumerate()
    {
        let leaf = LeafOptions { compression: Some(compression), ..LeafOptions::default() };
        let path = home.path().join(number.to_string());
        let options = SaveOptions { zarr: Format::V2, ocdbt, leaf, sync: false, ..SaveOptions::default() };
        let report = engine.save(&path, &tree, &options).unwrap().wait().unwrap();
        assert!(report.peak_host_bytes <= 24 << 20, "{}", report.peak_host_bytes);
        let state = load(&self::engine(), &path);
        let NewLeaf::Array(saved) = &tree.leaves()[0].1 else { panic!("an array") };
        assert_eq!(state.array("w").unwrap().shards()[0].bytes().unwrap(), &saved.parts[0].data[..]);
    }
}

/// The text of the leaf `name` of a checkpoint, all of which is checked against one of the trees.
fn whole_name(engine: &Engine, path: &Path, trees: &[&Tree]) -> String {
    let state = load(engine, path);
    let Some(Leaf::Value { value: Value::Text(name), .. }) = state.leaf("name") else { panic!("no name") };
    let named = |tree: &&&Tree| {
        tree.leaves().iter().any(|(_, leaf)| matches!(leaf, NewLeaf::Value(Value::Text(text), _) if text == name))
    };
    let NewLeaf::Array(array) = &trees.iter().find(named).unwrap().leaves()[0].1 else { panic!("an array") };
    assert_eq!(state.array("w").unwrap().shards()[0].bytes().unwrap(), &array.parts[0].data[..]);
    name.clone()
}

#[test]
fn a_save_that_stops_at_any_operation_leaves_the_old_or_the_new_checkpoint() {
    let engine = engine();
    let old = Tree::new().with("w", array(&[300], DType::Float32, 1)).with("name", "old");
    let new = Tree::new().with("w", array(&[500, 500], DType::Float32, 2)).with("name", "new").with("v", 1.5);
    // Onto nothing, onto an old checkpoint, and the same on a file system that cannot exchange names.
    for (overwrite, exchanges) in [(false, true), (true, true), (true, false)] {
        for ocdbt in [true, false] {
            let (mut stops, mut seen) = (0, BTreeMap::new());
            loop {
                let home = tempfile::tempdir().unwrap();
                let path: PathBuf = home.path().join("run");
                let base = SaveOptions { ocdbt, data_file_bytes: 300_000, ..SaveOptions::default() };
                if overwrite {
                    save(&engine, &path, &old, &base).unwrap();
                }
                let store = Arc::new(stopping(stops, exchanges));
                let options = SaveOptions { overwrite, store, ..base.clone() };
                let result = save(&engine, &path, &new, &options);
                let left = leftovers(home.path()).unwrap();
                assert!(left.iter().all(|one| one.name == "run"), "{left:?}");
                let aside = left.iter().find(|one| one.kind == LeftoverKind::Replaced);
                let found = match (touchdown::open(&path), aside) {
                    (Ok(_), _) => whole_name(&engine, &path, &[&old, &new]),
                    // The old one stands beside, and the error says where.
                    (Err(error), Some(aside)) => {
                        assert!(!exchanges && error.advice().unwrap().contains(aside.path.to_str().unwrap()));
                        assert_eq!(whole_name(&engine, &aside.path, &[&old]), "old");
                        "aside".to_owned()
                    }
                    (Err(error), None) => {
                        assert_eq!(error.kind(), ErrorKind::NotFound);
                        let advice = error.advice().unwrap();
                        assert!(left.iter().all(|one| advice.contains(one.path.to_str().unwrap())), "{advice}");
                        assert!(!overwrite, "stopped at {stops}: the old checkpoint is gone: {error:?}");
                        "none".to_owned()
                    }
                };
                // What is left over is recognised, and no obstacle.
                assert_eq!(names(home.path()).len(), left.len() + usize::from(path.exists()));
                *seen.entry(found).or_insert(0) += 1;
                save(&engine, &path, &new, &SaveOptions { overwrite: true, ..base }).unwrap();
                assert_eq!(whole_name(&engine, &path, &[&new]), "new");
                if result.is_ok() {
                    break;
                }
                stops += 1;
            }
            println!(
                "overwrite {overwrite}, exchanges {exchanges}, ocdbt {ocdbt}: stopped at {stops} operations: {seen:?}"
            );
            let before = if overwrite { "old" } else { "none" };
            assert!(stops > 20 && seen.contains_key(before) && seen.contains_key("new"));
        }
    }
}

#[test]
fn saves_run_in_the_background_and_can_be_cancelled() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let tree = Tree::new().with("w", array(&[3000, 1000], DType::Float32, 1));
    let job = engine.save(home.path().join("a"), &tree, &SaveOptions::default()).unwrap();
    // Dropped handles do not end a save, and neither does dropping the engine.
    drop(engine.save(home.path().join("b"), &tree, &SaveOptions::default()).unwrap());
    let cancelled = engine.save(home.path().join("c"), &tree, &SaveOptions::default()).unwrap();
    cancelled.cancel();
    assert_eq!(job.progress().bytes_total, 12_000_000);
    job.wait().unwrap();
    assert_eq!(cancelled.wait().unwrap_err().kind(), ErrorKind::Cancelled);
    drop(engine);
    assert_eq!(names(home.path()), ["a", "b"]);
    let future = touchdown::save_async(home.path().join("d"), &tree, &SaveOptions::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let report = runtime.block_on(future).unwrap();
    assert_eq!(report.bytes_logical, 12_000_000);
    touchdown::delete(home.path().join("a")).unwrap();
    assert_eq!(names(home.path()), ["b", "d"]);
}

/// A chunk that is encoded piece by piece: what is done of it shows, and a cancel is heeded within it.
#[test]
fn a_save_of_one_large_chunk_shows_its_progress_and_is_cancelled_within_it() {
    let home = tempfile::tempdir().unwrap();
    let engine =
        Engine::new(EngineOptions { threads: 1, staging_bytes: 24 << 20, ..EngineOptions::default() }).unwrap();
    let tree = Tree::new().with("w", array(&[10, 1000, 1001], DType::Float32, 9));
    for cancel_at in [None, Some(3)] {
        // Every large write waits until it was seen here.
        let (tell, told) = channel::<Sender<()>>();
        let store = Watched::new(move |operation| {
            if matches!(operation, Operation::Write(_, len) if len > 100_000) {
                let (answer, answered) = channel();
                tell.send(answer).unwrap();
                answered.recv().unwrap();
            }
            Ok(())
        });
        let leaf = LeafOptions { compression: Some(Compression::None), ..LeafOptions::default() };
        let options = SaveOptions { zarr: Format::V2, leaf, store: Arc::new(store), ..SaveOptions::default() };
        let job = engine.save(home.path().join("c"), &tree, &options).unwrap();
        drop(options);
        let mut seen = Vec::new();
        for answer in told {
            seen.push(job.progress().bytes_done);
            if Some(seen.len()) == cancel_at {
                job.cancel();
            }
            answer.send(()).unwrap();
        }
        match (cancel_at, job.wait()) {
            (None, result) => {
                assert_eq!(result.unwrap().bytes_logical, 40_040_000);
                assert!(seen.len() > 4 && seen.is_sorted() && seen[seen.len() - 1] > 20_000_000, "{seen:?}");
                touchdown::delete(home.path().join("c")).unwrap();
            }
            (Some(writes), result) => {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
                assert_eq!((seen.len(), names(home.path()).len()), (writes, 0));
            }
        }
    }
}

/// The entries of directories that a save makes above its destination are durable before it is in place.
#[test]
fn new_directories_above_a_checkpoint_are_made_durable() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let store = {
        let (seen, root) = (Arc::clone(&seen), home.path().to_owned());
        Watched::new(move |operation| {
            let short = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
            let line = match operation {
                Operation::CreateDir(path) => format!("make {}", short(path)),
                Operation::SyncDir(path) => format!("sync {}", short(path)),
                Operation::Rename(_, to) => format!("rename {}", short(to)),
                _ => return Ok(()),
            };
            seen.lock().unwrap().push(line);
            Ok(())
        })
    };
    let options = SaveOptions { store: Arc::new(store), ..SaveOptions::default() };
    save(&engine, &home.path().join("new/deeper/c"), &Tree::new().with("n", 1i64), &options).unwrap();
    let seen = seen.lock().unwrap();
    let at = |line: &str| seen.iter().position(|seen| seen == line).unwrap_or_else(|| panic!("{line}: {seen:?}"));
    let order = ["make new", "sync ", "make new/deeper", "sync new", "rename new/deeper/c", "sync new/deeper"].map(at);
    assert!(order.is_sorted(), "{order:?}");
}

#[test]
fn items_are_saved_loaded_and_deleted() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("c");
    let items = [
        ("params".to_owned(), TreeItem::from(Tree::new().with("w", array(&[9], DType::Int16, 1)))),
        ("opt".to_owned(), TreeItem::from(Tree::new().with("count", 3i64))),
        ("config".to_owned(), TreeItem::from(json!({"layers": 3, "rate": 0.5}))),
    ];
    touchdown::save_items(&path, &items, &SaveOptions::default()).unwrap();
    let loaded = touchdown::load_items(&path).unwrap();
    assert_eq!(loaded.keys().collect::<Vec<_>>(), ["config", "opt", "params"]);
    assert_eq!(loaded["config"].json(), Some(&json!({"layers": 3, "rate": 0.5})));
    assert_eq!(loaded["params"].tree().unwrap().array("w").unwrap().dtype, DType::Int16);
    touchdown::delete_item(&path, "opt").unwrap();
    assert_eq!(touchdown::load_items(&path).unwrap().keys().collect::<Vec<_>>(), ["config", "params"]);
    assert!(path.join("_touchdown_sums.json").is_file(), "the metadata that lack the item have a checksum again");
    assert_eq!(touchdown::delete_item(&path, "opt").unwrap_err().kind(), ErrorKind::Invalid);
}

/// TensorStore writes no second slash after a name that ends in one, and neither does a save; `a` and `a/` are one array.
#[test]
fn names_that_end_in_slashes_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine();
    let tree =
        Tree::new().with(KeyPath::names(["a/"]), array(&[3], DType::Int8, 1)).with("b", array(&[2], DType::Int8, 2));
    save(&engine, &dir.path().join("ckpt"), &tree, &SaveOptions::default()).unwrap();
    assert_eq!(contents(&load(&engine, &dir.path().join("ckpt"))).len(), 2);
    let both = tree.with(KeyPath::names(["a"]), array(&[3], DType::Int8, 3));
    let refused = save(&engine, &dir.path().join("both"), &both, &SaveOptions::default()).unwrap_err();
    assert!(refused.to_string().contains("stored under the name `a/`"), "{refused}");
}

#[test]
fn large_inner_chunks_start_where_direct_reads_can() {
    let (engine, home) = (engine(), tempfile::tempdir().unwrap());
    let tree = Tree::new()
        .with("a", array(&[7], DType::Int8, 1))
        .with("big", array(&[3000, 1500], DType::Float32, 2))
        .with("b", array(&[700], DType::Float64, 3))
        .with("other", array(&[1 << 20], DType::BFloat16, 4));
    for compression in [Compression::None, Compression::Gpu] {
        let path = home.path().join(format!("{compression:?}"));
        let leaf = LeafOptions { compression: Some(compression), ..LeafOptions::default() };
        save(&engine, &path, &tree, &SaveOptions { leaf, ..SaveOptions::default() }).unwrap();
        let checkpoint = touchdown::open(&path).unwrap();
        let plan = checkpoint.plan(&checkpoint.target()).unwrap();
        let extents = plan.units.iter().filter_map(|unit| match unit.source {
            touchdown::plan::Source::File { offset, len, .. } => Some((offset, len)),
            _ => None,
        });
        let large: Vec<(u64, u64)> = extents.filter(|(_, len)| *len >= 1 << 20).collect();
        assert!(large.len() >= 6, "18 MB are several inner chunks: {large:?}");
        assert!(large.iter().all(|(offset, _)| offset.is_multiple_of(4096)), "{large:?}");
        // Every unit carries a checksum and is read whole.
        let report = engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap().report().clone();
        assert_eq!(report.bytes_unverified, 0);
    }
}
