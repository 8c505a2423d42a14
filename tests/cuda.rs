//! Loads onto devices of the simulated driver: the same bits as on the processor, whatever the mesh; errors that are clean; nothing
//! that leaks. No figure of the simulator says anything about a GPU.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared; the driver is called through C"
)]

#[path = "simulated/mod.rs"]
mod simulated;
#[path = "kernels/specimens.rs"]
mod specimens;
mod support;

use std::sync::Arc;

use simulated::loads::{array, assert_same, contents, noise, onto, options, saved};
use simulated::{Bed, Machine, Simulator, gpus, logical};
use specimens::stored_specimens;
use touchdown::transform::cpu::castable;
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::zarr::Compression;
use touchdown::{
    CastPolicy, Checkpoint, DType, Device, Engine, EngineOptions, ErrorKind, Mesh, Otherwise, Target, Verify, spec,
};

#[test]
fn meshes_of_devices_hold_what_meshes_of_processors_hold() {
    let test = "meshes_of_devices_hold_what_meshes_of_processors_hold";
    let Some(bed) = Bed::start(test, Machine::default()) else { return };
    let mut compared = 0;
    for compression in [Compression::None, Compression::Zstd { level: 1 }] {
        let (_dir, checkpoint) = saved(compression);
        for (a, b, devices) in [
            (1, 1, gpus(1)),
            (2, 1, gpus(2)),
            (4, 2, gpus(8)),
            (4, 1, logical(0, 4)),
            (2, 2, [Device::cpus(2), gpus(2)].concat()),
            (3, 2, [logical(1, 2), gpus(1), Device::cpus(3)].concat()),
        ] {
            bed.reset(Machine { delay_us: 100, seed: compared as u64 + 1, ..Machine::default() });
            let cpu = Engine::new(options()).unwrap();
            let gpu = Engine::new(options()).unwrap();
            let cpus = Mesh::new([("a", a), ("b", b)], Device::cpus((a * b) as u32)).unwrap();
            let mesh = Mesh::new([("a", a), ("b", b)], devices.clone()).unwrap();
            for (what, build) in LAYOUTS {
                let what = format!("{what} on {a}x{b} {devices:?} from {compression:?}");
                let want = cpu.load(&checkpoint, &build(&checkpoint, &cpus)).unwrap().wait().unwrap();
                let got = gpu
                    .load(&checkpoint, &build(&checkpoint, &mesh))
                    .unwrap()
                    .wait()
                    .unwrap_or_else(|e| panic!("{what}: {e:?}"));
                compared += assert_same(&want, &got, &what);
            }
            drop((cpu, gpu));
            assert_eq!(bed.report(), "", "{a}x{b}");
        }
    }
    println!("{compared} bytes compared");
}

#[test]
fn every_cast_lands_as_on_processors() {
    let test = "every_cast_lands_as_on_processors";
    let Some(bed) = Bed::start(test, Machine::default()) else { return };
    let (mut tree, mut casts) = (Tree::new(), Vec::new());
    // Those that no zarr array holds `tests/kernels.rs` has alone.
    use DType::{Float4E2M1FN, Float6E2M3FN, Float6E3M2FN, Float8E4M3, UInt2, UInt4};
    let unstored = [UInt2, UInt4, Float4E2M1FN, Float6E2M3FN, Float6E3M2FN, Float8E4M3];
    for from in DType::ALL.into_iter().filter(|from| !unstored.contains(from)) {
        let stored = stored_specimens(from);
        for to in DType::ALL.into_iter().filter(|to| castable(from, *to)) {
            let name = format!("{from}/{to}");
            let count = (stored.len() / from.size()) as u64;
            tree = tree.with(name.as_str(), NewArray::new(&[count], from, stored.clone()));
            casts.push((name, to));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let leaf = LeafOptions { compression: Some(Compression::None), ..LeafOptions::default() };
    touchdown::save(dir.path().join("ckpt"), &tree, &SaveOptions { leaf, ..SaveOptions::default() }).unwrap();
    let checkpoint = touchdown::open(dir.path().join("ckpt")).unwrap();
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    for policy in [CastPolicy::Saturate, CastPolicy::Wrap] {
        let load = |devices: Vec<Device>| {
            let casts = casts.iter().map(|(name, to)| (name.as_str(), *to));
            let target = onto(checkpoint.target().cast(casts).cast_policy(policy), devices);
            engine.load(&checkpoint, &target).unwrap().wait().unwrap()
        };
        let (want, got) = (load(Device::cpus(1)), load(gpus(1)));
        assert!(want.report().lossy.len() > 200, "{} casts lose nothing", casts.len() - want.report().lossy.len());
        let bytes = assert_same(&want, &got, &format!("{policy:?}"));
        println!("{policy:?}: {} casts, {bytes} bytes equal", casts.len());
    }
    drop(engine);
    assert_eq!(bed.report(), "");
}

#[test]
fn many_small_arrays_are_few_copies_and_launches() {
    let test = "many_small_arrays_are_few_copies_and_launches";
    let Some(simulator) = Simulator::start(test, Machine::default()) else { return };
    for compression in [Compression::None, Compression::Zstd { level: 1 }] {
        let (_dir, checkpoint) = saved(compression);
        for cast in [false, true] {
            let engine = Engine::new(options()).unwrap();
            let target = || {
                let target = checkpoint.target().only(["small/**"]);
                if cast { target.cast([("**", DType::BFloat16)]) } else { target }
            };
            simulator.fail("*", 0, 0);
            let got = engine.load(&checkpoint, &onto(target(), gpus(1))).unwrap().wait().unwrap();
            let (launches, copies) = (simulator.count("cuLaunchKernel"), simulator.count("cuMemcpyHtoDAsync_v2"));
            println!("{compression:?}, cast {cast}: 200 arrays in {launches} launches and {copies} copies");
            assert!(launches <= 12 && copies <= 30, "{launches} launches, {copies} copies");
            let want = engine.load(&checkpoint, &target()).unwrap().wait().unwrap();
            assert_same(&want, &got, "small");
        }
    }
}

#[test]
fn five_thousand_small_arrays_are_a_few_dozen_launches() {
    let test = "five_thousand_small_arrays_are_a_few_dozen_launches";
    let Some(simulator) = Simulator::start(test, Machine::default()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("many.safetensors");
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for number in 0..5000usize {
        let bytes = noise(4 * (200 + number % 100), number as u64 + 1);
        let (start, end) = (data.len(), data.len() + bytes.len());
        let row = serde_json::json!({"dtype": "F32", "shape": [bytes.len() / 4], "data_offsets": [start, end]});
        header.insert(format!("a{number:04}"), row);
        data.extend(bytes);
    }
    let header = serde_json::to_vec(&header).unwrap();
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()).unwrap();
    let checkpoint = touchdown::open(&path).unwrap();
    // As an engine is by default, but for the number of threads.
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let target = || checkpoint.target().cast([("**", DType::BFloat16)]);
    simulator.fail("*", 0, 0);
    let got = engine.load(&checkpoint, &onto(target(), gpus(1))).unwrap().wait().unwrap();
    let (launches, copies) = (simulator.count("cuLaunchKernel"), simulator.count("cuMemcpyHtoDAsync_v2"));
    println!("5000 arrays in {launches} launches and {copies} copies");
    assert!(launches <= 36 && copies <= 36, "{launches} launches, {copies} copies");
    assert_eq!(got.report().launches, launches);
    // One slab, and tables and staging for each of the two workers that had anything to do.
    let allocations = simulator.count("cuMemAlloc_v2");
    assert!(matches!(allocations, 3 | 5), "{allocations} allocations");
    let want = engine.load(&checkpoint, &onto(target(), Device::cpus(1))).unwrap().wait().unwrap();
    assert_same(&want, &got, "5000");
}

/// Such a unit is read and checked piece by piece, then crosses in one copy while the next one is read.
#[test]
fn what_is_wanted_as_it_is_stored_is_checked_on_its_way() {
    let test = "what_is_wanted_as_it_is_stored_is_checked_on_its_way";
    let Some(bed) = Bed::start(test, Machine { delay_us: 200, ..Machine::default() }) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let tree =
        Tree::new().with("w", array(&[4 << 20], DType::UInt8, 1)).with("v", array(&[300_001], DType::Float32, 2));
    let leaf = LeafOptions { compression: Some(Compression::None), ..LeafOptions::default() };
    touchdown::save(&path, &tree, &SaveOptions { leaf, ..SaveOptions::default() }).unwrap();
    let load = |verify, devices: Vec<Device>| {
        let checkpoint = touchdown::open(&path)?;
        let engine = Engine::new(EngineOptions { verify, threads: 2, ..EngineOptions::default() })?;
        let state = engine.load(&checkpoint, &onto(checkpoint.target(), devices))?.wait()?;
        Ok::<_, touchdown::Error>((contents(&state), state.report().bytes_unverified))
    };
    let (want, _) = load(Verify::Auto, Device::cpus(1)).unwrap();
    if let Bed::Simulated(simulator) = &bed {
        simulator.fail("*", 0, 0);
    }
    let (got, unverified) = load(Verify::Auto, gpus(1)).unwrap();
    assert!(got.iter().zip(&want).all(|(got, want)| got.3 == want.3) && unverified == 0);
    if let Bed::Simulated(simulator) = &bed {
        let copies = simulator.count("cuMemcpyHtoDAsync_v2");
        assert!((2..6).contains(&copies), "{copies} copies for two arrays");
    }
    // One bit in the middle of the largest file.
    let file = support::files_below(&path).into_iter().max_by_key(|file| file.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    for devices in [Device::cpus(1), gpus(1)] {
        let error = load(Verify::Auto, devices.clone()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{devices:?}: {error:?}");
        let (other, unverified) = load(Verify::Off, devices).unwrap();
        assert!(unverified > 5 << 20 && other.iter().zip(&want).any(|(other, want)| other.3 != want.3));
    }
    assert_eq!(bed.report(), "");
}

#[test]
fn units_cross_while_the_next_ones_are_read() {
    const TRIES: u32 = 50;
    let Some(simulator) = Simulator::start("units_cross_while_the_next_ones_are_read", Machine::default()) else {
        return;
    };
    // Memory always has what lies in memory.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let tree = (0..6).fold(Tree::new(), |tree, number| {
        tree.with(format!("w{number}").as_str(), array(&[4 << 20], DType::UInt8, number))
    });
    let leaf = LeafOptions { compression: Some(Compression::None), ..LeafOptions::default() };
    touchdown::save(dir.path().join("c"), &tree, &SaveOptions { leaf, ..SaveOptions::default() }).unwrap();
    let checkpoint = touchdown::open(dir.path().join("c")).unwrap();
    let load = |threads| {
        let engine = Engine::new(EngineOptions { threads, ..options() }).unwrap();
        engine.load(&checkpoint, &onto(checkpoint.target(), gpus(1))).unwrap().wait()
    };
    assert_same(&load(1).unwrap(), &load(3).unwrap(), "six arrays");
    // The first wait ends the load. Had every unit been waited for, a single copy would have been begun, however often it is
    // tried; as it is, that happens only where the next unit is read too late.
    let mut copies = (0..TRIES).map(|_| {
        simulator.fail("cuEventSynchronize", 1, 999);
        let error = load(1).unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == ErrorKind::Device && text.contains("cuda:0") && text.contains("leaf w"), "{text}");
        simulator.count("cuMemcpyHtoDAsync_v2")
    });
    let overlapped = copies.any(|begun| (2..6).contains(&begun));
    assert!(overlapped, "one copy at a time");
    assert_eq!(simulator.report(), "");
}

#[test]
fn arrays_of_many_dimensions_are_few_launches_if_few_of_them_matter() {
    let test = "arrays_of_many_dimensions_are_few_launches_if_few_of_them_matter";
    let Some(simulator) = Simulator::start(test, Machine::default()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new().with("w", array(&[64, 64, 8, 1, 1, 1, 1, 1, 1, 2], DType::Float32, 1));
    touchdown::save(dir.path().join("c"), &tree, &SaveOptions::default()).unwrap();
    let checkpoint = touchdown::open(dir.path().join("c")).unwrap();
    let engine = Engine::new(options()).unwrap();
    let load = |devices: Vec<Device>| {
        let target = onto(checkpoint.target().cast([("**", DType::BFloat16)]), devices);
        engine.load(&checkpoint, &target).unwrap().wait().unwrap()
    };
    let (want, got) = (load(Device::cpus(1)), load(gpus(1)));
    assert_same(&want, &got, "ten dimensions");
    assert!((1..=4).contains(&got.report().launches), "{} launches", got.report().launches);
    drop((engine, got));
    assert_eq!(simulator.report(), "");
}

#[test]
fn large_boxes_are_packed_in_pieces() {
    let Some(bed) = Bed::start("large_boxes_are_packed_in_pieces", Machine { delay_us: 20, ..Machine::default() })
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new()
        .with("wide", array(&[1536, 2048], DType::Float32, 1))
        .with("turned", array(&[40, 3000, 24], DType::Float64, 2));
    let leaf = LeafOptions { chunk_bytes: Some(64 << 20), ..LeafOptions::default() };
    touchdown::save(dir.path().join("ckpt"), &tree, &SaveOptions { leaf, ..SaveOptions::default() }).unwrap();
    let checkpoint = touchdown::open(dir.path().join("ckpt")).unwrap();
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let load = |devices: Vec<Device>| {
        let rules = [("wide", spec![_, "device"]), ("turned", spec![_, _, "device"])];
        let target =
            checkpoint.target().shard(&Mesh::line(devices).unwrap(), rules).transpose([("turned", vec![1, 0, 2])]);
        engine.load(&checkpoint, &target.cast([("wide", DType::Float16)])).unwrap().wait().unwrap()
    };
    assert_same(&load(Device::cpus(3)), &load(gpus(3)), "packed");
    drop(engine);
    assert_eq!(bed.report(), "");
}

#[test]
fn devices_are_sent_little_more_than_they_hold() {
    let test = "devices_are_sent_little_more_than_they_hold";
    let Some(simulator) = Simulator::start(test, Machine::default()) else { return };
    let (_dir, checkpoint) = saved(Compression::Zstd { level: 1 });
    let engine = Engine::new(options()).unwrap();
    let mesh = Mesh::new([("a", 8)], gpus(8)).unwrap();
    for (what, leaf, spec, cast, bound) in [
        // Rows of columns; runs; boxes packed and cast on the way; boxes that a kernel casts there.
        ("two-dimensional copies", "params/embed", spec![_, "a"], None, 512 * 640 * 4),
        ("direct copies", "params/embed", spec!["a"], None, 512 * 640 * 4),
        ("packed", "params/embed", spec![_, "a"], Some(DType::BFloat16), 512 * 640 * 2),
        ("packed, short rows", "params/cube", spec![_, _, "a"], None, 24 * 40 * 56 * 2),
        ("by kernels", "params/dense/kernel", spec!["a"], Some(DType::Float32), 256 * 384 * 2),
    ] {
        let target = checkpoint.target().only([leaf]).shard(&mesh, [(leaf, spec)]);
        let target = if let Some(dtype) = cast { target.cast([(leaf, dtype)]) } else { target };
        simulator.fail("*", 0, 0);
        engine.load(&checkpoint, &target).unwrap().wait().unwrap();
        let (sent, launches) = (simulator.uploaded_bytes(), simulator.count("cuLaunchKernel"));
        // Beside the elements, the tables of launches.
        let tables = launches * 4096;
        println!("{what}: {sent} bytes for {bound}, {launches} launches");
        assert!(sent >= bound && sent <= 2 * bound + tables, "{what}: {sent} bytes for {bound}");
    }
}

#[test]
fn replicas_are_read_once_and_copied_between_devices() {
    let test = "replicas_are_read_once_and_copied_between_devices";
    let Some(simulator) = Simulator::start(test, Machine { delay_us: 300, ..Machine::default() }) else { return };
    let (_dir, checkpoint) = saved(Compression::None);
    let engine = Engine::new(options()).unwrap();
    let load = |count: u32| {
        let target = onto(checkpoint.target().only(["params/embed"]), gpus(count));
        simulator.fail("*", 0, 0);
        let state = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
        let uploads = simulator.count("cuMemcpyHtoDAsync_v2");
        (state, uploads, simulator.count("cuMemcpyPeerAsync"))
    };
    let (one, uploads_for_one, none) = load(1);
    let (four, uploads_for_four, peers) = load(4);
    assert_eq!((uploads_for_one, none, peers), (uploads_for_four, 0, 3));
    assert_eq!(one.report().bytes_read, four.report().bytes_read);
    let (one, four) = (contents(&one), contents(&four));
    assert!(four.len() == 4 && four.iter().all(|shard| shard.3 == one[0].3));
}

#[test]
fn too_little_device_memory_is_said_before_anything_is_read() {
    let test = "too_little_device_memory_is_said_before_anything_is_read";
    let machine = Machine { memory_bytes: 3 << 20, ..Machine::default() };
    let Some(simulator) = Simulator::start(test, machine) else { return };
    let (_dir, checkpoint) = saved(Compression::None);
    let engine = Engine::new(options()).unwrap();
    simulator.fail("*", 0, 0);
    let error = engine.load(&checkpoint, &onto(checkpoint.target(), gpus(1))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error:?}");
    let text = format!("{error:?}");
    assert!(text.contains("params/embed: 1310720 bytes") && text.contains("cuda:0") && text.contains("free"), "{text}");
    assert_eq!((simulator.count("cuMemcpyHtoDAsync_v2"), simulator.count("cuMemAlloc_v2")), (0, 0));
    // What fits is loaded by the same engine.
    let target = onto(checkpoint.target().only(["small/**"]), gpus(1));
    engine.load(&checkpoint, &target).unwrap().wait().unwrap();
    drop(engine);
    assert_eq!(simulator.report(), "");
}

#[test]
fn results_outlive_their_engine_and_free_themselves() {
    let test = "results_outlive_their_engine_and_free_themselves";
    let Some(simulator) = Simulator::start(test, Machine::default()) else { return };
    let (_dir, checkpoint) = saved(Compression::Zstd { level: 1 });
    let engine = Engine::new(options()).unwrap();
    let want = engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap();
    let got = engine.load(&checkpoint, &onto(checkpoint.target(), gpus(1))).unwrap().wait().unwrap();
    let report = got.report();
    let (own, simulated) = (report.peak_device_bytes, simulator.peak_bytes(0));
    assert!(own <= simulated && simulated - own < 256 * 300, "{own} reported, {simulated} taken");
    drop(engine);
    assert_same(&want, &got, "after the engine");
    assert!(simulator.report().contains("bytes of device 0"), "{}", simulator.report());
    let one = got.array("params/embed").unwrap().shards()[0].clone();
    drop(got);
    assert_eq!(one.to_host().unwrap().len(), 512 * 640 * 4);
    drop(one);
    assert_eq!(simulator.report(), "");
}

#[test]
fn a_load_that_is_dropped_leaves_nothing_and_the_next_succeeds() {
    let test = "a_load_that_is_dropped_leaves_nothing_and_the_next_succeeds";
    let Some(bed) = Bed::start(test, Machine { delay_us: 500, ..Machine::default() }) else { return };
    let (_dir, checkpoint) = saved(Compression::Zstd { level: 1 });
    let engine = Engine::new(options()).unwrap();
    let target = || onto(checkpoint.target(), gpus(2));
    for arrays in 0..4 {
        let mut job = engine.load(&checkpoint, &target()).unwrap();
        assert_eq!(job.by_ref().take(arrays).count(), arrays);
        drop(job);
    }
    let got = engine.load(&checkpoint, &target()).unwrap().wait().unwrap();
    let want = engine.load(&checkpoint, &onto(checkpoint.target(), Device::cpus(2))).unwrap().wait().unwrap();
    assert_same(&want, &got, "after drops");
    drop((engine.load(&checkpoint, &target()).unwrap(), engine, got));
    assert_eq!(bed.report(), "");
}

#[test]
fn arrays_are_whole_when_they_are_handed_out_in_the_callers_order() {
    let test = "arrays_are_whole_when_they_are_handed_out_in_the_callers_order";
    let Some(bed) = Bed::start(test, Machine { delay_us: 1000, ..Machine::default() }) else { return };
    let (_dir, checkpoint) = saved(Compression::Zstd { level: 1 });
    let engine = Engine::new(options()).unwrap();
    let want = engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap();
    let order = ["params/dense/**", "params/embed", "small/1*", "other/**"];
    let target = onto(checkpoint.target().order(order), gpus(2));
    let mut job = engine.load(&checkpoint, &target).unwrap();
    let mut last = 0;
    for array in job.by_ref() {
        let path = array.path.to_string();
        let rank = order.iter().position(|pattern| path.starts_with(pattern.trim_end_matches('*'))).unwrap_or(4);
        assert!(rank >= last, "{path} comes after arrays of {}", order[last.min(3)]);
        last = rank;
        // Read at once, on a stream of its own.
        let expected = want.array(&path).unwrap().shards()[0].bytes().unwrap();
        assert!(array.shards().iter().all(|shard| shard.to_host().unwrap() == expected), "{path} is not whole");
    }
    job.wait().unwrap();
    drop(engine);
    assert_eq!(bed.report(), "");
}

#[test]
fn bools_that_are_none_are_refused_on_devices_too() {
    let test = "bools_that_are_none_are_refused_on_devices_too";
    let Some(bed) = Bed::start(test, Machine::default()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.safetensors");
    let header = r#"{"b":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0, 1, 2, 1]].concat();
    std::fs::write(&file, bytes).unwrap();
    let checkpoint = touchdown::open(&file).unwrap();
    let engine = Engine::new(options()).unwrap();
    let on = |devices| engine.load(&checkpoint, &onto(checkpoint.target(), devices)).unwrap().wait();
    let (cpu, gpu) = (on(Device::cpus(1)).unwrap_err(), on(gpus(1)).unwrap_err());
    assert_eq!((cpu.kind(), gpu.kind()), (ErrorKind::Corrupt, ErrorKind::Corrupt), "{cpu:?} {gpu:?}");
    drop(engine);
    assert_eq!(bed.report(), "");
}

#[test]
fn arrays_on_devices_are_saved() {
    let Some(bed) = Bed::start("arrays_on_devices_are_saved", Machine { delay_us: 50, ..Machine::default() }) else {
        return;
    };
    let (_dir, checkpoint) = saved(Compression::Zstd { level: 1 });
    let engine = Engine::new(options()).unwrap();
    let mesh = Mesh::new([("a", 2), ("b", 2)], [gpus(3), Device::cpus(1)].concat()).unwrap();
    let rules = [("params/embed", spec!["a", "b"]), ("params/cube", spec!["b"]), ("params/narrow", spec![_, "a"])];
    let target = checkpoint.target().shard(&mesh, rules).otherwise(Otherwise::Replicate);
    let state = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let save = |name: &str, options: &SaveOptions| {
        let path = dir.path().join(name);
        engine.save(&path, &Tree::from(&state), options)?.wait()?;
        let again = touchdown::open(&path)?;
        engine.load(&again, &again.target().on(&Mesh::line(Device::cpus(1))?).otherwise(Otherwise::Replicate))?.wait()
    };
    let want = engine.load(&checkpoint, &onto(checkpoint.target(), Device::cpus(1))).unwrap().wait().unwrap();
    assert_same(&want, &save("plain", &SaveOptions::default()).unwrap(), "saved");
    let chunks = LeafOptions { chunk_bytes: Some(30_000), ..LeafOptions::default() };
    assert_same(&want, &save("chunks", &SaveOptions { leaf: chunks, ..SaveOptions::default() }).unwrap(), "in chunks");
    let Bed::Simulated(simulator) = &bed else { return };
    // Each call that a save makes fails once; nothing appears at the destination then.
    simulator.fail("*", 0, 0);
    save("counted", &SaveOptions::default()).unwrap();
    let mut failed = 0;
    for (entry, count) in simulator.calls().into_iter().filter(|(entry, _)| entry != "cuGetErrorName") {
        let mut nth = 1;
        while nth <= count {
            simulator.fail(&entry, nth, 999);
            let name = format!("{entry}-{nth}");
            match save(&name, &SaveOptions::default()) {
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Device, "{name}: {error:?}");
                    assert!(!dir.path().join(&name).exists(), "{name}");
                    failed += 1;
                }
                Ok(saved) => drop(assert_same(&want, &saved, &name)),
            }
            simulator.fail("*", 0, 0);
            let after = format!("after-{name}");
            assert_same(&want, &save(&after, &SaveOptions::default()).unwrap(), &after);
            nth += 1;
        }
    }
    simulator.fail("*", 0, 0);
    println!("{failed} saves ended with an error");
    assert!(failed > 4);
    assert_same(&want, &save("after", &SaveOptions::default()).unwrap(), "after failures");
    drop((engine, state, want));
    assert_eq!(simulator.report(), "");
}

/// A load that takes every way there is.
fn every_way(checkpoint: &Checkpoint) -> Target {
    let mesh = Mesh::new([("a", 2)], [gpus(2)].concat()).unwrap();
    checkpoint
        .target()
        .only(["params/**", "small/00*", "other/bool"])
        .shard(&mesh, [("params/embed", spec![_, "a"]), ("params/narrow", spec![_, "a"]), ("params/cube", spec!["a"])])
        .otherwise(Otherwise::Replicate)
        .shape([("params/dense/kernel", vec![300, 370])])
        .pad(1.5)
        .cast([("params/narrow", DType::BFloat16), ("params/cube", DType::Float32)])
}

#[test]
fn every_call_of_the_driver_may_fail() {
    let Some(simulator) = Simulator::start("every_call_of_the_driver_may_fail", Machine::default()) else { return };
    let (_dir, checkpoint) = saved(Compression::Zstd { level: 1 });
    let run = || {
        let engine = Engine::new(options())?;
        let state = engine.load(&checkpoint, &every_way(&checkpoint))?.wait()?;
        let contents = state.array("params/embed")?.shards()[0].to_host()?;
        Ok::<_, touchdown::Error>((engine, state, contents))
    };
    simulator.fail("*", 0, 0);
    let (engine, state, embed) = run().unwrap();
    drop((engine, state));
    assert_eq!(simulator.report(), "");
    let calls = simulator.calls();
    for entry in ["cuMemcpy2DAsync_v2", "cuMemcpyPeerAsync", "cuLaunchKernel", "cuMemHostRegister_v2"] {
        assert!(calls.iter().any(|(name, _)| name == entry), "no load calls {entry}");
    }
    let (mut failed, mut survived) = (0, 0);
    for (entry, count) in calls.into_iter().filter(|(entry, _)| entry != "cuGetErrorName") {
        let mut nth = 1;
        while nth <= count {
            simulator.reset(Machine::default());
            simulator.fail(&entry, nth, 999);
            let outcome = run();
            let what = format!("call {nth} of {count} of {entry}");
            let fired = !simulator.fault_waits();
            match outcome {
                Err(error) => {
                    assert!(fired, "{what}: {error:?}");
                    assert_eq!(error.kind(), ErrorKind::Device, "{what}: {error:?}");
                    assert!(error.to_string().contains("cuda:"), "{what}: {error}");
                    failed += 1;
                }
                Ok((engine, state, contents)) => {
                    assert!(contents == embed, "{what}: other bytes");
                    drop((engine, state));
                    survived += 1;
                }
            }
            assert_eq!(simulator.report(), "", "{what} leaks");
            simulator.fail("*", 0, 0);
            let (engine, state, contents) = run().unwrap_or_else(|error| panic!("after {what}: {error:?}"));
            assert!(contents == embed, "after {what}");
            drop((engine, state));
            nth += 1;
        }
    }
    println!("{failed} loads ended with an error, {survived} did not need the call that failed");
    assert!(failed > 100);
}

#[test]
fn an_engine_loads_again_after_a_failure() {
    let Some(simulator) = Simulator::start("an_engine_loads_again_after_a_failure", Machine::default()) else { return };
    let (_dir, checkpoint) = saved(Compression::None);
    let engine = Engine::new(options()).unwrap();
    let load = || engine.load(&checkpoint, &every_way(&checkpoint)).and_then(touchdown::Job::wait);
    let want = contents(&load().unwrap());
    for entry in ["cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuEventSynchronize", "cuMemAlloc_v2", "cuMemcpy2DAsync_v2"]
    {
        simulator.fail(entry, 1, 999);
        let error = load().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device, "{entry}");
        let (text, leaves) = (error.to_string(), ["params", "small", "other"]);
        assert!(text.contains("cuda:") && leaves.iter().any(|leaf| text.contains(leaf)), "{entry}: {text}");
        assert!(contents(&load().unwrap()) == want, "after {entry}");
    }
    // Memory that runs out although it was free a moment ago.
    simulator.fail("cuMemAlloc_v2", 1, 2);
    assert_eq!(load().unwrap_err().kind(), ErrorKind::OutOfMemory);
    drop(engine);
    assert_eq!(simulator.report(), "");
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
        let rules =
            [("params/embed", spec![_, "a"]), ("params/narrow", spec![_, "a"]), ("params/cube", spec!["b", _, "a"])];
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
