//! What is loaded onto devices in the tests, and how it is compared with what processors hold.

use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::zarr::{Compression, Format};
use touchdown::{Checkpoint, DType, Device, EngineOptions, Leaf, Mesh, Otherwise, State, Target};

/// Small slots, so that ordinary arrays are larger.
pub fn options() -> EngineOptions {
    EngineOptions { staging_bytes: 6 << 20, threads: 2, reader_threads: 2, ..EngineOptions::default() }
}

/// Everything on every device.
pub fn onto(target: Target, devices: impl IntoIterator<Item = Device>) -> Target {
    target.on(&Mesh::line(devices).unwrap()).otherwise(Otherwise::Replicate)
}

/// Bytes that do not repeat.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
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
pub fn array(shape: &[u64], dtype: DType, seed: u64) -> NewArray {
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
pub fn tree() -> Tree {
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

pub fn saved(compression: Compression) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ckpt");
    let leaf = LeafOptions { compression: Some(compression), ..LeafOptions::default() };
    let checksum = (compression == Compression::None).then_some(false);
    touchdown::save(&path, &tree(), &SaveOptions { leaf, checksum, zarr: Format::V3, ..SaveOptions::default() })
        .unwrap();
    let checkpoint = touchdown::open(&path).unwrap();
    (dir, checkpoint)
}

/// Every shard: where it belongs and what it holds.
pub fn contents(state: &State) -> Vec<(String, usize, Vec<u64>, Vec<u8>)> {
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
pub fn assert_same(cpu: &State, gpu: &State, what: &str) -> usize {
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
