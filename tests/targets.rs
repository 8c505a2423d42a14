//! Targets over a real checkpoint: every view and rule against a plain load of the same leaves.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use touchdown::ndarray::{ArrayD, Axis, Slice, concatenate, stack};
use touchdown::{
    CastPolicy, Checkpoint, DType, Device, ErrorKind, KeyPath, Leaf, Mesh, Missing, Otherwise, State, Take, Target,
    Value, spec,
};

fn checkpoint() -> Checkpoint {
    touchdown::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quickstart/ckpt")).unwrap()
}

fn load(target: &Target) -> State {
    touchdown::load(target.checkpoint(), target).unwrap()
}

/// The whole of an array that one device holds.
fn whole(state: &State, path: &str) -> ArrayD<f32> {
    state.array(path).unwrap().shards()[0].as_ndarray::<f32>().unwrap().to_owned()
}

/// An array put together from its shards.
fn assembled(state: &State, path: &str) -> ArrayD<f32> {
    let array = state.array(path).unwrap();
    let shape: Vec<usize> = array.shape.iter().map(|&extent| extent as usize).collect();
    let mut out = ArrayD::from_elem(shape, f32::NAN);
    for shard in array.shards() {
        let region = &shard.region;
        let mut part = out.slice_each_axis_mut(|axis| {
            let dim = axis.axis.index();
            Slice::from(region.start[dim] as usize..region.end(dim) as usize)
        });
        part.assign(&shard.as_ndarray::<f32>().unwrap());
    }
    out
}

#[test]
fn stacked_concatenated_and_split_arrays_equal_what_numpy_would_make() {
    let checkpoint = checkpoint();
    let plain = load(&checkpoint.target());
    let kernels = [whole(&plain, "params/layer_0/kernel"), whole(&plain, "params/layer_1/kernel")];
    let mesh = Mesh::new([("a", 2), ("b", 3)], Device::cpus(6)).unwrap();
    for dim in 0..3 {
        let target = checkpoint.target().stack("params/*/kernel", dim, KeyPath::names(["layers"]));
        let target = target.shard(&mesh, [("layers", spec!["a", "b"])]).otherwise(Otherwise::Replicate);
        let state = load(&target);
        assert_eq!(assembled(&state, "layers"), stack(Axis(dim), &[kernels[0].view(), kernels[1].view()]).unwrap());
        assert!(state.leaf("params/layer_0/kernel").is_none() && state.leaf("params/embed").is_some());
    }
    for dim in 0..2 {
        let target = checkpoint.target().concatenate("params/*/kernel", dim, KeyPath::names(["long"]));
        let joined = concatenate(Axis(dim), &[kernels[0].view(), kernels[1].view()]).unwrap();
        assert_eq!(whole(&load(&target), "long"), joined);
        // A part of the joined array that crosses the seam, turned.
        let part = Take::Range { dim, start: 30, stop: 70 };
        let target = target.take([("long", part)]).transpose([("long", vec![1, 0])]);
        let expected = joined.slice_axis(Axis(dim), Slice::from(30..70)).reversed_axes();
        assert_eq!(whole(&load(&target), "long"), expected);
    }
    let parts = [("q", 40), ("k", 0), ("v", 88)].map(|(name, extent)| (KeyPath::names([name]), extent));
    let state = load(&checkpoint.target().split("params/layer_0/kernel", 1, parts));
    assert_eq!(whole(&state, "q"), kernels[0].slice_axis(Axis(1), Slice::from(0..40)));
    assert_eq!(state.array("k").unwrap().shape, [64, 0]);
    assert_eq!(whole(&state, "v"), kernels[0].slice_axis(Axis(1), Slice::from(40..128)));
    let short = [(KeyPath::names(["q"]), 40)];
    assert_eq!(
        checkpoint.target().split("params/layer_0/kernel", 1, short).check().unwrap_err().kind(),
        ErrorKind::Invalid
    );
}

#[test]
fn a_sharding_follows_its_dimensions_when_they_are_permuted() {
    let checkpoint = checkpoint();
    let mesh = Mesh::line(Device::cpus(4)).unwrap();
    let target = checkpoint.target().only(["params/layer_0/kernel"]);
    let target = target.shard(&mesh, [("**", spec![_, "device"])]).transpose([("**", vec![1, 0])]);
    let state = load(&target);
    let array = state.array("params/layer_0/kernel").unwrap();
    assert_eq!((array.shape.as_slice(), array.shards()[1].region.extent.as_slice()), (&[128, 64][..], &[32, 64][..]));
    let plain = whole(&load(&checkpoint.target()), "params/layer_0/kernel");
    assert_eq!(assembled(&state, "params/layer_0/kernel"), plain.reversed_axes());
}

#[test]
fn a_loaded_tree_is_a_target() {
    let checkpoint = checkpoint();
    let mesh = Mesh::line(Device::cpus(2)).unwrap();
    let wanted = checkpoint.target().skip(["opt_state/**"]).cast([("params/**", DType::Float16)]);
    let wanted = wanted.shard(&mesh, [("**/kernel", spec!["device"])]).otherwise(Otherwise::Replicate);
    let first = load(&wanted);
    let again = load(&checkpoint.target().like(&first, Missing::Error));
    assert_eq!(again.leaves().len(), first.leaves().len());
    for ((path, a), (_, b)) in first.leaves().zip(again.leaves()) {
        match (a, b) {
            (Leaf::Array(a), Leaf::Array(b)) => {
                assert_eq!((&a.shape, a.dtype, &a.sharding), (&b.shape, b.dtype, &b.sharding), "{path}");
                assert!(
                    a.shards().iter().zip(b.shards()).all(|(a, b)| a.bytes().unwrap() == b.bytes().unwrap()),
                    "{path}"
                );
            }
            (Leaf::Value { value: a, .. }, Leaf::Value { value: b, .. }) => assert_eq!(a, b, "{path}"),
            (a, b) => panic!("{path}: {a:?} is not {b:?}"),
        }
    }
    assert_eq!(again.report().skipped.len(), 2);
    assert_eq!(again.leaf("name").map(|leaf| matches!(leaf, Leaf::Value { value: Value::Text(_), .. })), Some(true));
}

#[test]
fn problems_come_together_with_the_nearest_names() {
    let checkpoint = checkpoint();
    let target = checkpoint.target().shape([("params/*/bias", vec![100]), ("params/embed", vec![300, 64])]);
    let error = touchdown::load(&checkpoint, &target).unwrap_err();
    assert_eq!((error.kind(), error.list().len()), (ErrorKind::Invalid, 3));
    assert!(error.advice().unwrap().contains("--pad"));
    let padded = load(&target.pad(-1.0));
    let embed = whole(&padded, "params/embed");
    assert!(embed.slice_axis(Axis(0), Slice::from(256..300)).iter().all(|value| *value == -1.0));
    let error = checkpoint.target().cast([("params/layer_0/kernle", DType::Float16)]).check().unwrap_err();
    assert!(error.to_string().contains("params/layer_0/kernel"), "{error}");
    let error = checkpoint.target().rename([("layer_[01]", "layer")]).check().unwrap_err();
    assert_eq!(
        error.list(),
        [
            "params/layer/bias: params/layer_0/bias, params/layer_1/bias",
            "params/layer/kernel: params/layer_0/kernel, params/layer_1/kernel"
        ]
    );
    // Rules of different options, and leaves, are one error in the order in which they were said.
    let target = checkpoint.target().skip(["opt_stat/**"]).cast([("params/layer_0/kernle", DType::Float16)]);
    let error = target.shape([("params/embed", vec![300, 64])]).check().unwrap_err();
    assert_eq!(error.list().len(), 4, "{error}");
    for (line, text) in error.list().iter().zip(["opt_stat", "params/layer_0/kernel", "1 leaf", "params/embed"]) {
        assert!(line.contains(text), "{line}");
    }
    let mesh = Mesh::line(Device::cpus(2)).unwrap();
    let unsaid = checkpoint.target().shard(&mesh, [("**/kernel", spec!["device"])]);
    let error = checkpoint.plan(&unsaid).unwrap_err();
    assert!(error.list().len() == 5 && error.to_string().contains("no sharding rule"), "{error}");
}

#[test]
fn lossy_casts_are_counted_or_refused() {
    let checkpoint = checkpoint();
    let target = checkpoint.target().only(["params/layer_0/bias"]).cast([("**", DType::Int8)]);
    // Values around 0.02 all become 0: every nonzero element is lossy.
    let nonzero =
        whole(&load(&checkpoint.target()), "params/layer_0/bias").iter().filter(|value| **value != 0.0).count();
    let report = load(&target).report().clone();
    assert_eq!(report.lossy.get("params/layer_0/bias"), Some(&(nonzero as u64)));
    let error = touchdown::load(&checkpoint, &target.cast_policy(CastPolicy::Error)).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.list()[0].contains("params/layer_0/bias"), "{error}");
}

#[test]
fn a_target_belongs_to_its_checkpoint() {
    let (one, other) = (checkpoint(), checkpoint());
    let error = touchdown::load(&other, &one.target()).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("another checkpoint"), "{error}");
}

#[test]
fn a_claimed_shape_without_chunks_costs_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("w")).unwrap();
    // 64 GiB of zeros that nobody stored: address space, but no memory.
    let meta = r#"{"chunks":[1048576],"compressor":null,"dtype":"<f4","fill_value":0,"filters":null,"order":"C","shape":[17179869184],"zarr_format":2}"#;
    std::fs::write(folder.path().join("w/.zarray"), meta).unwrap();
    let checkpoint = touchdown::open(folder.path()).unwrap();
    match touchdown::load(&checkpoint, &checkpoint.target()) {
        Ok(state) => assert_eq!(state.array("w").unwrap().shards()[0].bytes().unwrap()[1 << 35], 0),
        // Where the system does not promise memory that it may not have.
        Err(error) => assert_eq!(error.kind(), ErrorKind::OutOfMemory),
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak_kib < 1 << 20, "{peak_kib} KiB resident");
}

#[test]
fn claimed_chunks_that_do_not_exist_cost_nothing() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("w")).unwrap();
    let meta = r#"{"chunks":[1],"compressor":null,"dtype":"<f4","fill_value":1.5,"filters":null,"order":"C","shape":[4000000],"zarr_format":2}"#;
    std::fs::write(folder.path().join("w/.zarray"), meta).unwrap();
    std::fs::write(folder.path().join("w/77"), 3f32.to_le_bytes()).unwrap();
    let checkpoint = touchdown::open(folder.path()).unwrap();
    assert_eq!(checkpoint.stored_bytes().unwrap(), [Some(4)]);
    let mesh = Mesh::line(Device::cpus(2)).unwrap();
    let target = checkpoint.target().shard(&mesh, [("**", spec!["device"])]).otherwise(Otherwise::Replicate);
    let plan = checkpoint.plan(&target).unwrap();
    assert!(plan.units.len() <= 4, "one chunk and the gaps around it: {}", plan.units.len());
    let state = load(&target);
    let first: &[f32] = state.array("w").unwrap().shards()[0].as_slice().unwrap();
    assert!(first.iter().enumerate().all(|(at, value)| *value == if at == 77 { 3.0 } else { 1.5 }));
}

#[test]
fn arrays_of_many_chunks_of_which_some_exist_load_as_if_each_were_looked_up() {
    let (rows, columns) = (40u64, 31u64);
    let stored = |row: u64, column: u64| (row / 3 * 5 + column / 2 * 3) % 4 != 1;
    let value = |row: u64, column: u64| (row * columns + column) as u16;
    for nested in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let array = folder.path().join("w");
        std::fs::create_dir(&array).unwrap();
        let (name, meta) = if nested {
            (
                "zarr.json",
                r#"{"chunk_grid":{"configuration":{"chunk_shape":[3,2]},"name":"regular"},"chunk_key_encoding":{"name":"default"},"codecs":[{"configuration":{"endian":"little"},"name":"bytes"}],"data_type":"uint16","fill_value":9,"node_type":"array","shape":[40,31],"zarr_format":3}"#,
            )
        } else {
            (
                ".zarray",
                r#"{"chunks":[3,2],"compressor":null,"dtype":"<u2","fill_value":9,"filters":null,"order":"C","shape":[40,31],"zarr_format":2}"#,
            )
        };
        std::fs::write(array.join(name), meta).unwrap();
        for (i, j) in (0..rows.div_ceil(3)).flat_map(|i| (0..columns.div_ceil(2)).map(move |j| (i, j))) {
            if !stored(i * 3, j * 2) {
                continue;
            }
            let elements = (0..6).flat_map(|at| value(i * 3 + at / 2, j * 2 + at % 2).to_le_bytes());
            let path = if nested { array.join(format!("c/{i}/{j}")) } else { array.join(format!("{i}.{j}")) };
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, elements.collect::<Vec<u8>>()).unwrap();
        }
        // What is no chunk of the array does not matter.
        std::fs::write(array.join("999.0"), "x").unwrap();
        let checkpoint = touchdown::open(folder.path()).unwrap();
        let mesh = Mesh::new([("a", 2), ("b", 3)], Device::cpus(6)).unwrap();
        let target = checkpoint.target().cast([("w", DType::Float32)]).shard(&mesh, [("**", spec!["a", "b"])]);
        let state = load(&target.otherwise(Otherwise::Replicate));
        let whole = assembled(&state, "w");
        for (at, found) in whole.indexed_iter() {
            let (row, column) = (at[0] as u64, at[1] as u64);
            let expected = if stored(row, column) { value(row, column) } else { 9 };
            assert_eq!(*found, f32::from(expected), "{at:?}, nested: {nested}");
        }
    }
}

#[test]
fn everything_that_does_not_fit_is_one_error() {
    use touchdown::tree::Row;
    let checkpoint = checkpoint();
    let row = |names: &[&str]| Row { path: KeyPath::names(names.iter().copied()), ..Row::default() };
    let rows = vec![
        Row { kind: Some("array".into()), ..row(&["name"]) },
        Row { shape: Some(vec![300, 64]), ..row(&["params", "embed"]) },
        Row { dtype: Some(DType::Int8), ..row(&["step"]) },
        row(&["params", "embd"]),
    ];
    let error = checkpoint.plan(&checkpoint.target().rows(rows, Missing::Error)).unwrap_err();
    assert_eq!(error.list().len(), 4, "{error}");
    assert!(error.to_string().contains("nearest: params/embed"), "{error}");
}

#[test]
fn metadata_says_what_a_load_gives() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quickstart/ckpt");
    let metadata = touchdown::metadata(path).unwrap();
    assert_eq!(metadata.custom_metadata.unwrap()["run"], "quickstart");
    assert!(metadata.init_ns < metadata.commit_ns && metadata.init_ns.is_some());
    let state = load(&checkpoint().target());
    assert_eq!(metadata.leaves.len(), state.leaves().len());
    for (leaf, (path, loaded)) in metadata.leaves.iter().zip(state.leaves()) {
        assert_eq!(leaf.path, *path);
        if let Leaf::Array(array) = loaded {
            assert_eq!((leaf.dtype, leaf.shape.as_ref()), (Some(array.dtype), Some(&array.shape)), "{path}");
        }
    }
    let kernel = metadata.leaves.iter().find(|leaf| leaf.path.to_string() == "params/layer_0/kernel").unwrap();
    let (mesh, saved) = kernel.saved.as_ref().unwrap();
    assert_eq!((mesh.shape.as_slice(), saved), (&[2, 4][..], &spec![_, "model"]));
}

#[test]
fn a_plan_serialises_whole() {
    let checkpoint = checkpoint();
    let plan = checkpoint.plan(&checkpoint.target()).unwrap();
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["units"].as_array().unwrap().len(), plan.units.len());
    assert_eq!(json["leaves"][1]["dtype"], "float32");
}

#[test]
fn device_memory_is_refused_before_anything_is_read() {
    use touchdown::place::{Destination, DeviceMemory, Memory, ShardSpec};
    struct Gpu;
    impl Destination for Gpu {
        fn prepare(&mut self, shards: &[ShardSpec]) -> touchdown::Result<Vec<Memory>> {
            // SAFETY: the memory does not exist, and is refused without being touched.
            #[allow(unsafe_code)]
            let memory = |shard: &ShardSpec| unsafe { Memory::Device(DeviceMemory::new(0, shard.bytes, 0)) };
            Ok(shards.iter().map(memory).collect())
        }
    }
    let checkpoint = checkpoint();
    let engine = touchdown::Engine::new(touchdown::EngineOptions::default()).unwrap();
    let error = engine.load_to(&checkpoint, &checkpoint.target(), &mut Gpu).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
}
