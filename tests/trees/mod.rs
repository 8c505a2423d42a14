//! Trees to save: every kind of leaf, with elements that are no trivial ones.

#![allow(dead_code, unreachable_pub, reason = "every test binary uses its own part of this module")]

use std::path::Path;

use serde_json::json;
use touchdown::layout::orbax::metadata::Container;
use touchdown::tree::save::{NewArray, NewLeaf, Tree};
use touchdown::{DType, Key, KeyPath, Value};

/// Bytes that neither compress to nothing nor repeat; below 128, so that floats of them are finite.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8 & 0x7f
    };
    (0..len).map(|_| next()).collect()
}

/// An array of [`noise`], its elements valid ones of their type.
pub fn array(shape: &[u64], dtype: DType, seed: u64) -> NewArray {
    let count: u64 = shape.iter().product();
    let mut bytes = noise(count as usize * dtype.size(), seed);
    let mask = match dtype {
        DType::Bool | DType::Int2 => 1,
        DType::Int4 | DType::Float4E2M1FN => 7,
        _ => 0x7f,
    };
    bytes.iter_mut().for_each(|byte| *byte &= mask);
    NewArray::new(shape, dtype, bytes)
}

/// A tree with every kind of leaf, all of which safetensors can hold in one way or another.
pub fn every_kind() -> Tree {
    let name = |name: &str| Key::Name(name.to_owned());
    let mut tree = Tree::new()
        .with("params/dense/kernel", array(&[130, 70], DType::Float32, 1))
        .with("params/dense/bias", array(&[70], DType::BFloat16, 2))
        .with("params/big", array(&[1500, 110], DType::Float32, 3))
        .with("params/packed", array(&[40, 6], DType::Float4E2M1FN, 8))
        .with("params/zero", array(&[0, 3], DType::Float16, 4))
        .with("params/scalar_array", array(&[], DType::Float64, 5))
        .with("rng", array(&[2], DType::UInt32, 6).key("threefry2x32"))
        .with("step", 1234i64)
        .with("huge", u64::MAX)
        .with("rate", 0.125)
        .with("flag", true)
        .with("name", "a \"string\" with unicode: ü 日本")
        .with("nothing", NewLeaf::None)
        .with("empty_dict", NewLeaf::Empty(Container::Dict))
        .with("empty_list", NewLeaf::Empty(Container::List))
        .with("typed", NewLeaf::Value(Value::Int(7), Some(DType::Int8)))
        .custom_metadata(json!({"tree": [1, 2.5, null]}));
    for index in 0..11 {
        tree.push(KeyPath(vec![name("list"), Key::Index(index)]), NewArray::from_vec(&[2], vec![index as i32, -1]));
    }
    for index in 0..2 {
        tree.push(KeyPath(vec![name("pair"), Key::Index(index)]), NewArray::from_vec(&[1], vec![index as i16]));
    }
    tree.container("pair", Container::Tuple)
}

/// The names in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.map(|entry| entry.file_name());
    let listed: Result<Vec<_>, _> = std::fs::read_dir(dir).and_then(|entries| entries.map(name).collect());
    let listed = listed.unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut names: Vec<String> = listed.into_iter().map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
