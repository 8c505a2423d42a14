//! Two directories in the form of `touchdown load --dump`, compared leaf by leaf and shard by shard.
//!
//! Values must be equal bit for bit (`-0.0` is not `0.0`), except that any NaN equals any NaN of its
//! type: hardware and libraries differ in payloads. Leaves may come in any order.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::read_json;

/// What `compare_dumps` found, and how much it looked at.
#[derive(Debug, Default)]
pub struct Comparison {
    pub leaves: usize,
    pub shards: usize,
    pub bytes: usize,
    pub differences: Vec<String>,
}

impl Comparison {
    pub fn add(&mut self, other: Self) {
        self.leaves += other.leaves;
        self.shards += other.shards;
        self.bytes += other.bytes;
        self.differences.extend(other.differences);
    }

    fn differs(&mut self, what: String) {
        self.differences.push(what);
    }
}

pub fn compare_dumps(want_dir: &Path, got_dir: &Path) -> Comparison {
    let mut result = Comparison::default();
    let want = leaves(&want_dir.join("dump.json"));
    let got = leaves(&got_dir.join("dump.json"));
    for path in got.keys().filter(|path| !want.contains_key(*path)) {
        result.differs(format!("{path}: a leaf too many"));
    }
    for (path, want) in &want {
        result.leaves += 1;
        match got.get(path) {
            None => result.differs(format!("{path}: missing")),
            Some(got) => compare_leaf(&mut result, path, want, got, want_dir, got_dir),
        }
    }
    result
}

/// Leaves by their path, which is written as JSON so that index 0 and key "0" differ.
fn leaves(file: &Path) -> BTreeMap<String, Value> {
    let dump = read_json(file);
    assert_eq!(dump["schema"], 1, "{}: schema", file.display());
    let rows = dump["leaves"].as_array().unwrap_or_else(|| panic!("{}: no list of leaves", file.display()));
    let mut leaves = BTreeMap::new();
    for row in rows {
        let path = row["path"].to_string();
        assert!(row["path"].is_array(), "{}: path {path} is not a list", file.display());
        let twice = leaves.insert(path.clone(), row.clone()).is_some();
        assert!(!twice, "{}: {path} is there twice", file.display());
    }
    leaves
}

fn compare_leaf(result: &mut Comparison, path: &str, want: &Value, got: &Value, want_dir: &Path, got_dir: &Path) {
    let kind = want["kind"].as_str().unwrap_or_default();
    // What has no data has neither type nor shape worth telling; the other fields must be equal.
    let fields: &[&str] = match kind {
        "none" | "empty" => &["kind"],
        "string" => &["kind", "value"],
        "scalar" => &["kind", "dtype"],
        "array" => &["kind", "dtype", "shape"],
        "key" => &["kind", "dtype", "shape", "key_impl"],
        other => panic!("{path}: expected kind {other:?} is unknown"),
    };
    for field in fields {
        if want[field] != got[field] {
            result.differs(format!("{path}: {field} is {}, expected {}", got[field], want[field]));
            return;
        }
    }
    if kind == "scalar" && !scalars_equal(&want["value"], &got["value"]) {
        result.differs(format!("{path}: value is {}, expected {}", got["value"], want["value"]));
    }
    let (want_shards, got_shards) = (shards(want), shards(got));
    if want_shards.len() != got_shards.len() {
        result.differs(format!("{path}: {} shards, expected {}", got_shards.len(), want_shards.len()));
        return;
    }
    for (position, (want_shard, got_shard)) in want_shards.iter().zip(got_shards).enumerate() {
        result.shards += 1;
        let place = format!("{path} on device {position}");
        for field in ["device", "index"] {
            if want_shard[field] != got_shard[field] {
                result.differs(format!("{place}: {field} is {}, expected {}", got_shard[field], want_shard[field]));
                return;
            }
        }
        let dtype = want["dtype"].as_str().unwrap_or_default();
        let (want_data, got_data) = (shard_data(want_dir, want_shard), shard_data(got_dir, got_shard));
        result.bytes += want_data.len();
        if let Some(difference) = first_difference(dtype, &want_data, &got_data) {
            result.differs(format!("{place}, {dtype} {}: {difference}", want_shard["index"]));
            return;
        }
    }
}

fn shards(leaf: &Value) -> &[Value] {
    leaf["shards"].as_array().map_or(&[], Vec::as_slice)
}

fn shard_data(folder: &Path, shard: &Value) -> Vec<u8> {
    let name = shard["file"].as_str().unwrap_or_else(|| panic!("{}: a shard without file", folder.display()));
    let path = folder.join(name);
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// 1 and 1.0 are one value only if both are written as numbers of the same kind; -0.0 is not 0.0.
fn scalars_equal(want: &Value, got: &Value) -> bool {
    match (want.as_f64(), got.as_f64()) {
        (Some(a), Some(b)) if want.is_f64() && got.is_f64() => a.to_bits() == b.to_bits(),
        _ => want == got,
    }
}

/// The first element that differs, told with its bytes; `None` if the two are equal.
pub fn first_difference(dtype: &str, want: &[u8], got: &[u8]) -> Option<String> {
    if want.len() != got.len() {
        return Some(format!("{} bytes, expected {}", got.len(), want.len()));
    }
    if want == got {
        return None;
    }
    let (part, width) = parts(dtype);
    let differing =
        want.chunks(width).zip(got.chunks(width)).position(|(a, b)| a != b && !(is_nan(part, a) && is_nan(part, b)))?;
    let range = differing * width..(differing + 1) * width;
    let hex = |data: &[u8]| data.iter().rev().map(|byte| format!("{byte:02x}")).collect::<String>();
    Some(format!("element part {differing} is 0x{}, expected 0x{}", hex(&got[range.clone()]), hex(&want[range])))
}

/// Complex elements compare as their two halves. Returns the type and the width of a half.
pub fn parts(dtype: &str) -> (&str, usize) {
    match dtype {
        "complex64" => ("float32", 4),
        "complex128" => ("float64", 8),
        "float64" | "int64" | "uint64" => (dtype, 8),
        "float32" | "int32" | "uint32" => (dtype, 4),
        "float16" | "bfloat16" | "int16" | "uint16" => (dtype, 2),
        _ => (dtype, 1),
    }
}

/// Is this little-endian element a NaN? Types without NaN never are.
pub fn is_nan(dtype: &str, element: &[u8]) -> bool {
    let bits = element.iter().rev().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
    // Without its sign, a NaN lies above infinity, or is the one pattern that the type sets aside.
    match dtype {
        "float64" => bits & (u64::MAX >> 1) > 0x7ff0_0000_0000_0000,
        "float32" => bits & 0x7fff_ffff > 0x7f80_0000,
        "float16" => bits & 0x7fff > 0x7c00,
        "bfloat16" => bits & 0x7fff > 0x7f80,
        "float8_e3m4" => bits & 0x7f > 0x70,
        "float8_e4m3" => bits & 0x7f > 0x78,
        "float8_e5m2" => bits & 0x7f > 0x7c,
        "float8_e4m3fn" => bits & 0x7f == 0x7f,
        "float8_e4m3fnuz" | "float8_e4m3b11fnuz" | "float8_e5m2fnuz" => bits == 0x80,
        "float8_e8m0fnu" => bits == 0xff,
        _ => false,
    }
}
