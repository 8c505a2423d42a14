//! Loads onto devices of the simulated driver: the same bits as on the processor, whatever the mesh; errors that are clean; nothing
//! that leaks. No figure of the simulator says anything about a GPU.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking and say what they compared; the driver is called through C"
)]

#[path = "simulated/mod.rs"]
mod simulated;
mod support;

use std::path::Path;
use std::sync::Arc;

use simulated::{Machine, Simulator};
use touchdown::place::{Destination, DeviceMemory, Memory, ShardSpec};
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::zarr::{Compression, Format};
use touchdown::{
    Checkpoint, DType, Device, Engine, EngineOptions, ErrorKind, Leaf, Mesh, Otherwise, State, Target, spec,
};

/// Small slots, so that ordinary arrays are larger.
fn options() -> EngineOptions {
    EngineOptions { staging_bytes: 6 << 20, threads: 2, reader_threads: 2, ..EngineOptions::default() }
}

fn gpus(count: u32) -> Vec<Device> {
    (0..count).map(|ordinal| Device::Cuda { ordinal, logical: None }).collect()
}

fn logical(ordinal: u32, count: u32) -> Vec<Device> {
    (0..count).map(|logical| Device::Cuda { ordinal, logical: Some(logical) }).collect()
}

/// Bytes that do not repeat.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// An array of any type whose stored form is valid.
fn array(shape: &[u64], dtype: DType, seed: u64) -> NewArray {
    let count: u64 = shape.iter().product();
    let mut bytes = noise(count as usize * dtype.size(), seed);
    match dtype {
        DType::Bool => bytes.iter_mut().for_each(|byte| *byte &= 1),
        DType::Int4 => bytes.iter_mut().for_each(|byte| *byte = ((*byte << 4) as i8 >> 4) as u8),
        _ => {}
    }
    NewArray::new(shape, dtype, bytes)
}

/// Arrays of many types and shapes, large and small.
fn tree() -> Tree {
    use DType::*;
    let mut tree = Tree::new()
        .with("params/embed", array(&[512, 640], Float32, 1))
        .with("params/dense/kernel", array(&[256, 384], BFloat16, 2))
        .with("params/dense/bias", array(&[384], Float32, 3))
        .with("params/cube", array(&[24, 40, 56], Float16, 4))
        .with("params/deep", array(&[3, 2, 3, 2, 3, 2, 3, 2, 3, 8], Float32, 5))
        .with("params/narrow", array(&[4096, 6], Float64, 6))
        .with("other/int4", array(&[64, 128], Int4, 7))
        .with("other/bool", array(&[33, 65], Bool, 8))
        .with("other/complex", array(&[40, 72], Complex64, 9))
        .with("other/int64", array(&[100, 24], Int64, 10))
        .with("other/fp8", array(&[128, 96], Float8E4M3FN, 11))
        .with("other/scalar", array(&[], Float32, 12))
        .with("other/empty", array(&[0, 16], Float32, 13));
    for number in 0..200u64 {
        tree = tree.with(format!("small/{number:03}").as_str(), array(&[8 + number % 24], Float32, 20 + number));
    }
    tree
}

fn saved(compression: Compression, ocdbt: bool) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ckpt");
    let leaf = LeafOptions { compression: Some(compression), ..LeafOptions::default() };
    let checksum = (compression == Compression::None).then_some(false);
    touchdown::save(&path, &tree(), &SaveOptions { ocdbt, leaf, checksum, zarr: Format::V3, ..SaveOptions::default() })
        .unwrap();
    let checkpoint = touchdown::open(&path).unwrap();
    (dir, checkpoint)
}

/// Every shard: where it belongs and what it holds.
fn contents(state: &State) -> Vec<(String, usize, Vec<u64>, Vec<u8>)> {
    let mut all = Vec::new();
    for (path, leaf) in state.leaves() {
        let Leaf::Array(array) = leaf else { continue };
        for shard in array.shards() {
            assert_eq!(shard.device_memory().is_some(), !shard.device.is_host(), "{path} on {}", shard.device);
            let bytes = shard.to_host().unwrap();
            assert_eq!(bytes.len() as u64, shard.region.volume() * array.dtype.size() as u64, "{path}");
            all.push((path.to_string(), shard.position, shard.region.start.clone(), bytes.to_vec()));
        }
    }
    all
}

#[track_caller]
fn assert_same(cpu: &State, gpu: &State, what: &str) -> usize {
    let (want, got) = (contents(cpu), contents(gpu));
    assert_eq!(want.len(), got.len(), "{what}");
    for (want, got) in want.iter().zip(&got) {
        assert_eq!((&want.0, want.1, &want.2), (&got.0, got.1, &got.2), "{what}");
        if want.3 != got.3 {
            let at = want.3.iter().zip(&got.3).position(|(a, b)| a != b);
            panic!("{what}: {} on device {} differs at byte {at:?} of {}", want.0, want.1, want.3.len());
        }
    }
    assert_eq!(cpu.report().lossy, gpu.report().lossy, "{what}");
    got.iter().map(|(.., bytes)| bytes.len()).sum()
}

#[test]
fn meshes_of_devices_hold_what_meshes_of_processors_hold() {
    let test = "meshes_of_devices_hold_what_meshes_of_processors_hold";
    let Some(simulator) = Simulator::start(test, Machine::default()) else { return };
    let mut compared = 0;
    for (compression, ocdbt) in [(Compression::None, true), (Compression::Zstd { level: 1 }, true), (Compression::Zstd { level: 1 }, false)] {
        let (_dir, checkpoint) = saved(compression, ocdbt);
        for (a, b, devices) in [
            (1, 1, gpus(1)),
            (2, 1, gpus(2)),
            (4, 2, gpus(8)),
            (4, 1, logical(0, 4)),
            (2, 2, [Device::cpus(2), gpus(2)].concat()),
            (3, 2, [logical(1, 2), gpus(1), Device::cpus(3)].concat()),
        ] {
            simulator.reset(Machine { delay_us: 200, seed: compared as u64 + 1, ..Machine::default() });
            let cpu = Engine::new(options()).unwrap();
            let gpu = Engine::new(options()).unwrap();
            let cpus = Mesh::new([("a", a), ("b", b)], Device::cpus((a * b) as u32)).unwrap();
            let mesh = Mesh::new([("a", a), ("b", b)], devices.clone()).unwrap();
            for (what, build) in LAYOUTS {
                let what = format!("{what} on {a}x{b} {devices:?} from {compression:?}");
                let want = cpu.load(&checkpoint, &build(&checkpoint, &cpus)).unwrap().wait().unwrap();
                let got = gpu.load(&checkpoint, &build(&checkpoint, &mesh)).unwrap().wait().unwrap_or_else(|e| panic!("{what}: {e:?}"));
                compared += assert_same(&want, &got, &what);
            }
            drop((cpu, gpu));
            assert_eq!(simulator.report(), "", "{a}x{b}");
        }
    }
    println!("{compared} bytes compared");
}

type Layout = fn(&Checkpoint, &Arc<Mesh>) -> Target;

/// Ways to lay the tree on a mesh of an axis `a` and an axis `b`.
const LAYOUTS: [(&str, Layout); 5] = [
    ("replicated", |checkpoint, mesh| {
        checkpoint.target().shard(mesh, [("params/embed", spec![])]).otherwise(Otherwise::Replicate)
    }),
    ("rows", |checkpoint, mesh| {
        checkpoint
            .target()
            .skip(["other/scalar"])
            .shard(mesh, [("small/**", spec![]), ("params/cube", spec!["b" + "a"]), ("**", spec!["a"])])
    }),
    ("columns, cast", |checkpoint, mesh| {
        let rules = [
            ("params/embed", spec![_, "a"]),
            ("params/narrow", spec![_, "a"]),
            ("params/dense/kernel", spec!["b", "a"]),
            ("params/cube", spec![_, "b", "a"]),
            ("params/deep", spec![_, _, _, _, _, _, _, _, _, "a"]),
            ("other/fp8", spec![_, "b"]),
        ];
        checkpoint.target().shard(mesh, rules).otherwise(Otherwise::Replicate).cast([
            ("params/dense/kernel", DType::Float32),
            ("params/**", DType::BFloat16),
            ("other/int64", DType::Float16),
            ("other/complex", DType::Float32),
            ("other/fp8", DType::Int8),
            ("small/**", DType::Float16),
        ])
    }),
    ("columns", |checkpoint, mesh| {
        let rules = [("params/embed", spec![_, "a"]), ("params/narrow", spec![_, "a"]), ("params/cube", spec!["b", _, "a"])];
        checkpoint.target().shard(mesh, rules).otherwise(Otherwise::Replicate)
    }),
    ("transposed, padded", |checkpoint, mesh| {
        checkpoint
            .target()
            .transpose([("params/embed", vec![1, 0]), ("params/cube", vec![2, 0, 1]), ("other/bool", vec![1, 0])])
            .shape([("params/dense/kernel", vec![300, 370]), ("other/int4", vec![70, 128])])
            .pad(1.5)
            .shard(mesh, [("params/embed", spec!["a", "b"]), ("params/dense/kernel", spec!["a"])])
            .otherwise(Otherwise::Replicate)
            .cast([("other/bool", DType::Float32)])
    }),
];
