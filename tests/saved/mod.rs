//! Random trees to save, and what a judge must find in them: a dump in the form of `touchdown load --dump`, with the type of
//! value and the sharding that each leaf is to come back with.

#![allow(dead_code, unreachable_pub, reason = "every test binary uses its own part of this module")]

use std::fs;
use std::path::Path;

use bytes::Bytes;
use serde_json::{Value as Json, json};
use touchdown::layout::orbax::metadata::Container;
use touchdown::shape::Region;
use touchdown::transform::cpu::normalise;
use touchdown::tree::save::{LeafOptions, NewArray, NewLeaf, Tree};
use touchdown::zarr::{Compression, Format};
use touchdown::{DType, Device, Key, KeyPath, Mesh, SaveOptions, Sharding, Spec, Value};

/// What TensorStore has no type for.
const NOT_STORABLE: [DType; 5] =
    [DType::UInt2, DType::UInt4, DType::Float8E4M3, DType::Float6E2M3FN, DType::Float6E3M2FN];

const NAMES: [&str; 22] = [
    "kernel",
    "bias",
    "w",
    "params",
    "layer_0",
    "layer_10",
    "a b",
    "it's",
    "q\"uote",
    "日本",
    "ünï",
    "0",
    "007",
    "zarr.json",
    ".zarray",
    "manifest",
    "st*r",
    "x=y",
    "com,ma",
    "$1",
    "tab\there",
    "p/q",
];

const MESHES: [&[(&str, u64)]; 8] = [
    &[("x", 1)],
    &[("x", 2)],
    &[("x", 4)],
    &[("x", 8)],
    &[("data", 2), ("model", 2)],
    &[("data", 2), ("model", 4)],
    &[("data", 2), ("fsdp", 2), ("tensor", 2)],
    &[("a", 3), ("b", 2)],
];

/// A small generator: the same seed gives the same trees everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random =
            Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ stream.wrapping_mul(0xD1B5_4A32_D192_ED03) | 1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 8
    }

    /// Below this.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// A random tree and the rows that its dump must have.
pub struct RandomTree {
    pub tree: Tree,
    pub containers: Vec<(KeyPath, Container)>,
    pub custom: Option<Json>,
    rows: Vec<Json>,
    files: Vec<Vec<u8>>,
    random: Random,
}

impl RandomTree {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut tree = Self { random: Random::new(seed, stream), ..Self::empty(seed) };
        match tree.random.one_in(16) {
            true => tree.array(KeyPath::ROOT),
            false => tree.container(&KeyPath::ROOT, 0),
        }
        if tree.random.one_in(2) {
            let custom = json!({"stream": stream, "ünï \"q\"": [1.5, null, {"deep": -3}]});
            tree.tree = tree.tree.custom_metadata(custom.clone());
            tree.custom = Some(custom);
        }
        for (path, container) in &tree.containers {
            tree.tree = tree.tree.clone().container(path.clone(), *container);
        }
        tree
    }

    /// Every type that can be stored, each as an array of a few elements.
    pub fn every_dtype(seed: u64) -> Self {
        let mut tree = Self::empty(seed);
        for dtype in storable() {
            tree.array_of(KeyPath::names(["numpy", dtype.name()]), &[3, 16], dtype, None, None);
            let mesh = Mesh::new([("x", 8)], Device::cpus(8)).unwrap();
            let sharding = Sharding::new(mesh, Spec(vec![vec![], vec!["x".to_owned()]]), 2).unwrap();
            tree.array_of(KeyPath::names(["jax", dtype.name()]), &[3, 16], dtype, Some(sharding), None);
        }
        tree
    }

    fn empty(seed: u64) -> Self {
        let random = Random::new(seed, 0);
        Self { tree: Tree::new(), containers: Vec::new(), custom: None, rows: Vec::new(), files: Vec::new(), random }
    }

    /// As many small arrays.
    pub fn many(count: u64) -> Self {
        let mut tree = Self::empty(count);
        for number in 0..count {
            let path = KeyPath::names(["layers", &(number / 100).to_string(), &number.to_string()]);
            tree.array_of(path, &[number % 4 + 1], DType::UInt16, None, None);
        }
        tree
    }

    /// Arrays of no elements, on devices and not, and others beside them.
    pub fn without_elements() -> Self {
        let mut tree = Self::empty(1);
        let mesh = Mesh::new([("x", 2)], Device::cpus(2)).unwrap();
        for (name, shape) in [("none", &[0][..]), ("rows", &[0, 3]), ("columns", &[4, 0]), ("some", &[4, 3])] {
            tree.array_of(KeyPath::names(["numpy", name]), shape, DType::Float32, None, None);
            let sharding =
                Sharding::new(std::sync::Arc::clone(&mesh), Spec(vec![vec!["x".to_owned()]]), shape.len()).unwrap();
            tree.array_of(KeyPath::names(["jax", name]), shape, DType::Float32, Some(sharding), None);
        }
        tree
    }

    fn container(&mut self, path: &KeyPath, depth: u32) {
        let count = 1 + self.random.below(5);
        let roll = if depth == 0 { 0 } else { self.random.below(8) };
        let kind = match roll {
            0..=3 => Container::Dict,
            4..=5 => Container::List,
            6 => Container::Tuple,
            _ => Container::NamedTuple,
        };
        if matches!(kind, Container::Tuple | Container::NamedTuple) {
            self.containers.push((path.clone(), kind));
        }
        let mut used = Vec::new();
        for index in 0..count {
            let key = match kind {
                Container::Dict => Key::Name(self.random.of(&NAMES).to_owned()),
                Container::NamedTuple => Key::Name(format!("{}{index}", self.random.of(&["nu", "mu", "count"]))),
                _ => Key::Index(index),
            };
            if used.contains(&key) {
                continue;
            }
            used.push(key.clone());
            let child = path.child(key);
            match depth < 4 && self.random.one_in(3) {
                true => self.container(&child, depth + 1),
                false => self.leaf(child),
            }
        }
    }

    fn leaf(&mut self, path: KeyPath) {
        match self.random.below(20) {
            0..=12 => self.array(path),
            13 => self.key(path),
            14 => {
                let text = self.random.of(&["", "hello", "zwei\nlines", "ünï \u{2603}", "\"quoted\" \\", "[1, 2]"]);
                self.row(&path, "string", json!({"value": text, "value_type": "string"}));
                self.tree.push(path, text);
            }
            15..=17 => self.scalar(path),
            _ => {
                let empties = [Container::Dict, Container::List, Container::Tuple];
                let (leaf, kind, value_type) = match self.random.below(4) {
                    3 => (NewLeaf::None, "none", "None"),
                    at => (NewLeaf::Empty(empties[at as usize]), "empty", empties[at as usize].name()),
                };
                self.row(&path, kind, json!({"value_type": value_type}));
                self.tree.push(path, leaf);
            }
        }
    }

    fn scalar(&mut self, path: KeyPath) {
        let (value, dtype, stored) = match self.random.below(14) {
            0 => (Value::Int(i128::from(self.random.next() as i64)), None, DType::Int64),
            1 => (Value::Int(-1), None, DType::Int64),
            2 => (Value::Int(i128::from(u64::MAX)), None, DType::UInt64),
            3 => (Value::Float(0.1), None, DType::Float64),
            4 => (Value::Float(-0.0), None, DType::Float64),
            5 => (Value::Float(f64::NAN), None, DType::Float64),
            6 => (Value::Float(f64::NEG_INFINITY), None, DType::Float64),
            7 => (Value::Float(5e-324), None, DType::Float64),
            8 => (Value::Bool(true), None, DType::Bool),
            9 => (Value::Bool(false), None, DType::Bool),
            10 => (Value::Int(-3), Some(DType::Int8), DType::Int8),
            11 => (Value::Float(1.5), Some(DType::BFloat16), DType::BFloat16),
            12 => (Value::Int(65_535), Some(DType::UInt16), DType::UInt16),
            _ => (Value::Complex(1.5, -2.0), None, DType::Complex128),
        };
        if let Value::Complex(real, imaginary) = value {
            // Orbax has no such scalars: it becomes an array without dimensions.
            let facts = json!({"dtype": stored.name(), "shape": [], "value_type": "np.ndarray",
                "shards": [{"device": 0, "index": [], "file": format!("{}.bin", self.files.len())}]});
            self.row(&path, "array", facts);
            self.files.push([real.to_le_bytes(), imaginary.to_le_bytes()].concat());
        } else {
            let facts = json!({"dtype": stored.name(), "shape": [], "value": value.json(), "value_type": "scalar"});
            self.row(&path, "scalar", facts);
        }
        self.tree.push(path, NewLeaf::Value(value, dtype));
    }

    fn array(&mut self, path: KeyPath) {
        let rank = self.random.of(&[0, 1, 1, 2, 2, 2, 3, 4]);
        let shape: Vec<u64> = (0..rank).map(|_| self.random.of(&[1, 2, 3, 4, 5, 7, 8, 8, 12, 16])).collect();
        let dtype = self.random.of(&storable());
        let sharding = (!self.random.one_in(3)).then(|| self.sharding(&shape));
        self.array_of(path, &shape, dtype, sharding, None);
    }

    fn key(&mut self, path: KeyPath) {
        let (words, implementation) = self.random.of(&[(2, "threefry2x32"), (4, "rbg"), (4, "unsafe_rbg")]);
        let shape = if self.random.one_in(2) { vec![words] } else { vec![3, words] };
        self.array_of(path, &shape, DType::UInt32, None, Some(implementation));
    }

    fn sharding(&mut self, shape: &[u64]) -> Sharding {
        let axes = self.random.of(&MESHES);
        let count: u64 = axes.iter().map(|axis| axis.1).product();
        let mut devices = Device::cpus(count as u32);
        if self.random.one_in(3) {
            devices.reverse();
        }
        let mut free: Vec<String> = axes.iter().map(|axis| axis.0.to_owned()).collect();
        let mut spec = Vec::new();
        for _ in 0..self.random.below(shape.len() as u64 + 1) {
            let take = self.random.of(&[0, 1, 1, 1, 2]).min(free.len());
            spec.push((0..take).map(|_| free.remove(self.random.below(free.len() as u64) as usize)).collect());
        }
        Sharding::new(Mesh::new(axes.iter().copied(), devices).unwrap(), Spec(spec), shape.len()).unwrap()
    }

    fn array_of(
        &mut self,
        path: KeyPath,
        shape: &[u64],
        dtype: DType,
        sharding: Option<Sharding>,
        key_impl: Option<&str>,
    ) {
        let whole = self.elements(shape, dtype);
        let mut array = match &sharding {
            None => NewArray::new(shape, dtype, whole.clone()),
            Some(sharding) => {
                let part = |region: &Region| Ok(cut(&whole, shape, region, dtype.size()));
                NewArray::sharded(shape, dtype, sharding.clone(), part).unwrap()
            }
        };
        // An uneven sharding is no JAX sharding: such an array is one on no device for Orbax.
        let even = sharding.filter(|sharding| sharding.uneven(shape).is_none());
        let value_type = if even.is_some() || key_impl.is_some() { "jax.Array" } else { "np.ndarray" };
        let facts = json!({"dtype": dtype.name(), "shape": shape, "value_type": value_type, "shards": [{
            "device": 0, "index": shape.iter().map(|extent| [0, *extent]).collect::<Vec<_>>(),
            "file": format!("{}.bin", self.files.len())}],
            "sharding": even.as_ref().map(describe), "key_impl": key_impl});
        let kind = if key_impl.is_some() { "key" } else { "array" };
        self.row(&path, kind, facts);
        self.files.push(whole);
        if let Some(key_impl) = key_impl {
            array = array.key(key_impl);
        }
        self.tree.push(path, array);
    }

    /// Any bits that are an element, in memory form.
    fn elements(&mut self, shape: &[u64], dtype: DType) -> Vec<u8> {
        let count = shape.iter().product::<u64>() as usize * dtype.size();
        let mut bytes: Vec<u8> = (0..count).map(|_| self.random.next() as u8).collect();
        if dtype == DType::Bool {
            bytes.iter_mut().for_each(|byte| *byte &= 1);
        }
        normalise(dtype, &mut bytes).unwrap();
        bytes
    }

    fn row(&mut self, path: &KeyPath, kind: &str, facts: Json) {
        let keys = path.0.iter().map(|key| match key {
            Key::Name(name) => json!(name),
            Key::Index(index) => json!(index),
        });
        let mut row = json!({"path": keys.collect::<Vec<_>>(), "kind": kind, "dtype": null, "shape": null, "value": null,
            "shards": []});
        row.as_object_mut().unwrap().extend(facts.as_object().unwrap().clone());
        self.rows.push(row);
    }

    /// Writes the dump.
    pub fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        for (number, data) in self.files.iter().enumerate() {
            fs::write(folder.join(format!("{number}.bin")), data).unwrap();
        }
        let dump = json!({"schema": 1, "leaves": self.rows});
        fs::write(folder.join("dump.json"), dump.to_string()).unwrap();
    }

    /// What the judge is told beside the dump.
    pub fn facts(&self, options: &SaveOptions) -> Json {
        let containers = self.containers.iter().map(|(path, kind)| {
            let path: Vec<String> = path.elements().map(|element| element.to_string()).collect();
            json!([path, kind.name()])
        });
        json!({"ocdbt": options.ocdbt, "zarr3": options.zarr == Format::V3, "custom": self.custom,
            "containers": options.rich_types.then(|| containers.collect::<Vec<_>>())})
    }
}

/// The types of the format, but those that TensorStore lacks.
pub fn storable() -> Vec<DType> {
    DType::ALL.into_iter().filter(|dtype| !NOT_STORABLE.contains(dtype)).collect()
}

/// Some way to save.
pub fn random_options(random: &mut Random) -> SaveOptions {
    let compression =
        random.of(&[Compression::None, Compression::Gpu, Compression::Gpu, Compression::Zstd { level: 3 }]);
    let leaf = LeafOptions {
        compression: Some(compression),
        chunk_bytes: random.of(&[None, None, Some(16), Some(200)]),
        ..LeafOptions::default()
    };
    SaveOptions {
        zarr: random.of(&[Format::V2, Format::V3, Format::V3]),
        // Names with slashes are refused without a database only where they are ambiguous.
        ocdbt: !random.one_in(3),
        checksum: random.of(&[None, None, Some(false)]),
        data_file_bytes: random.of(&[512, 1 << 20]),
        node_bytes: random.of(&[1, 300, 8 << 20]),
        rich_types: random.one_in(2),
        sync: false,
        leaf,
        ..SaveOptions::default()
    }
}

fn describe(sharding: &Sharding) -> Json {
    let (axes, shape): (Vec<_>, Vec<_>) = sharding.mesh.axes().iter().cloned().unzip();
    let id = |device: &touchdown::MeshDevice| match device.device {
        Device::Cpu(id) => id,
        Device::Cuda { .. } => panic!("the tests save from CPU devices"),
    };
    let devices: Vec<u32> = sharding.mesh.devices().iter().map(id).collect();
    json!({"axes": axes, "shape": shape, "devices": devices, "spec": sharding.spec.0})
}

/// The elements of a region, row by row.
fn cut(whole: &[u8], shape: &[u64], region: &Region, size: usize) -> Bytes {
    let mut out = Vec::new();
    let mut index = region.start.clone();
    if region.is_empty() {
        return Bytes::new();
    }
    loop {
        let at = index.iter().zip(shape).fold(0, |at, (index, extent)| at * extent + index) as usize * size;
        out.extend_from_slice(&whole[at..at + size]);
        let Some(dim) = (0..shape.len()).rev().find(|&dim| index[dim] + 1 < region.end(dim)) else { break };
        index[dim] += 1;
        (dim + 1..shape.len()).for_each(|dim| index[dim] = region.start[dim]);
    }
    out.into()
}
