//! Saves under small budgets: chunks and inner chunks that do not fit in memory are written piece by piece, into one value, and
//! memory stays within the budget.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::tree::{OpenOptions, verify::verify};
use touchdown::zarr::{Compression, Format};
use touchdown::{ConvertOptions, DType, Device, Engine, EngineOptions, Mesh, Sharding, State, spec};

fn options(staging_bytes: u64) -> EngineOptions {
    EngineOptions { threads: 2, staging_bytes, ..EngineOptions::default() }
}

fn load(path: &Path) -> State {
    let checkpoint = touchdown::open(path).unwrap();
    touchdown::load(&checkpoint, &checkpoint.target()).unwrap()
}

/// Half of it noise, half of it compressible.
fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = vec![0; len];
    for (number, word) in bytes.chunks_exact_mut(8).enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let mask = if number >> 12 & 1 == 0 { u64::MAX } else { 0x0000_0f00_0000_000f };
        word.copy_from_slice(&(state & mask).to_le_bytes());
    }
    bytes
}

/// An array divided over the devices of a mesh by its rows or its columns.
fn sharded(shape: [u64; 2], devices: u32, columns: bool, data: &[u8]) -> NewArray {
    let mesh = Mesh::new([("x", u64::from(devices))], Device::cpus(devices)).unwrap();
    let sharding = Sharding::new(mesh, if columns { spec![_, "x"] } else { spec!["x"] }, 2).unwrap();
    let part = |region: &touchdown::shape::Region| {
        let rows = region.start[0]..region.end(0);
        let row = |row: u64| &data[(row * shape[1] + region.start[1]) as usize..][..region.extent[1] as usize];
        Ok(rows.flat_map(row).copied().collect::<Vec<u8>>().into())
    };
    NewArray::sharded(&shape, DType::UInt8, sharding, part).unwrap()
}

fn intact(path: &Path) {
    let found = verify(path, &OpenOptions::default(), true, &options(64 << 20)).unwrap();
    assert!(found.problems.is_empty() && found.chunks > 0, "{:?}", found.problems);
}

/// How many chunks the array `w` has.
fn values(path: &Path) -> usize {
    let checkpoint = touchdown::open(path).unwrap();
    let array = checkpoint.arrays().iter().find(|array| array.name == "w").unwrap();
    array.meta.grid.chunk_count(&array.meta.shape).unwrap() as usize
}

#[test]
fn large_inner_chunks_of_one_value_stay_in_one_value() {
    let home = tempfile::tempdir().unwrap();
    let shape = [6, 3_600_007];
    let data = bytes((shape[0] * shape[1]) as usize, 1);
    let tree = Tree::new().with("w", sharded(shape, 2, false, &data)).with("small", 7i64);
    for ocdbt in [true, false] {
        let (path, again) = (home.path().join(format!("{ocdbt}")), home.path().join(format!("{ocdbt}-again")));
        let engine = Engine::new(options(8 << 20)).unwrap();
        let report =
            engine.save(&path, &tree, &SaveOptions { ocdbt, ..SaveOptions::default() }).unwrap().wait().unwrap();
        assert!(report.peak_host_bytes <= 8 << 20, "{}", report.peak_host_bytes);
        assert_eq!(values(&path), 2, "a value for each shard, of three inner chunks");
        intact(&path);
        assert_eq!(load(&path).array("w").unwrap().shards()[0].bytes().unwrap(), data);
        // The same through a conversion with little memory.
        let checkpoint = touchdown::open(&path).unwrap();
        let convert = ConvertOptions { engine: options(20 << 20), ..ConvertOptions::default() };
        touchdown::convert(&checkpoint.target(), &again, &convert).unwrap();
        intact(&again);
        assert_eq!(load(&again).array("w").unwrap().shards()[0].bytes().unwrap(), data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 0, ..ProptestConfig::default() })]

    #[test]
    fn what_is_saved_within_a_small_budget_is_loaded(
        rows in 1_u64..9,
        row_bytes in 1_u64..1_500_000,
        devices in prop::sample::select(vec![1, 2, 3, 4]),
        columns: bool,
        budget in (12_u64 << 20)..(24 << 20),
        v3: bool,
        ocdbt: bool,
        compression in prop::sample::select(vec![
            Compression::None, Compression::Gpu, Compression::Zstd { level: 1 }, Compression::Zstd { level: 4 },
        ]),
        chunk_bytes in prop::option::of(100_000_u64..3_000_000),
        data_file_bytes in prop::sample::select(vec![1, 1 << 20, 1 << 30]),
    ) {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("c");
        let shape = [rows, row_bytes];
        let data = bytes((rows * row_bytes) as usize, rows ^ row_bytes);
        let tree = Tree::new()
            .with("w", sharded(shape, devices, columns, &data))
            .with("x", NewArray::new(&[3000], DType::UInt8, bytes(3000, 5)))
            .with("z", NewArray::new(&[row_bytes], DType::UInt8, data[..row_bytes as usize].to_vec()));
        let save = SaveOptions {
            zarr: if v3 { Format::V3 } else { Format::V2 },
            ocdbt,
            leaf: LeafOptions { compression: Some(compression), chunk_bytes, ..LeafOptions::default() },
            data_file_bytes,
            sync: false,
            ..SaveOptions::default()
        };
        let engine = Engine::new(options(budget)).unwrap();
        let report = engine.save(&path, &tree, &save).unwrap().wait().unwrap();
        prop_assert!(report.peak_host_bytes <= budget);
        intact(&path);
        let state = load(&path);
        prop_assert_eq!(state.array("w").unwrap().shards()[0].bytes().unwrap(), &data[..]);
        prop_assert_eq!(state.array("x").unwrap().shards()[0].bytes().unwrap(), bytes(3000, 5));
        prop_assert_eq!(state.array("z").unwrap().shards()[0].bytes().unwrap(), &data[..row_bytes as usize]);
    }
}

/// What a save holds of the arrays themselves is part of the budget, too: it is small enough for many of them.
#[test]
fn many_tiny_arrays_stay_within_the_budget() {
    let home = tempfile::tempdir().unwrap();
    let mut tree = Tree::new();
    for number in 0..20_000 {
        let path = format!("group{}/array{number}", number / 100);
        tree.push(path.as_str(), NewArray::new(&[16], DType::UInt8, vec![number as u8; 16]));
    }
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    let (done, before) = (Arc::new(AtomicBool::new(false)), resident());
    let watched = Arc::clone(&done);
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        while !watched.load(Ordering::Acquire) {
            most = most.max(resident());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        most
    });
    let engine = Engine::new(options(64 << 20)).unwrap();
    let report = engine.save(home.path().join("c"), &tree, &SaveOptions::default()).unwrap().wait().unwrap();
    done.store(true, Ordering::Release);
    let grown = watch.join().unwrap().saturating_sub(before);
    println!("{} of {grown} bytes", report.peak_host_bytes);
    assert!(report.peak_host_bytes >= 20_000 << 10 && report.peak_host_bytes <= 64 << 20);
    // Other tests of this process take memory meanwhile, too.
    assert!(grown <= 192 << 20, "{grown}");
}
