//! Loads onto devices at random: whatever the checkpoint, the target, the mesh, the reads that fail and the bytes that are changed,
//! devices hold what the model and the processors hold, or the error is the same and nothing is left on them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests panic to fail and print their counts"
)]

mod faulty;
mod laws;
mod simulated;
mod support;

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use faulty::{Faulty, ReadFault};
use laws::case::Case;
use laws::tape::Tape;
use laws::want::Layout;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use simulated::loads::{contents, onto, options, saved};
use simulated::{Bed, Machine, gpus, logical};
use support::{copy_tree, files_below, number_from_environment, scratch};
use touchdown::plan::MeshDevice;
use touchdown::zarr::Compression;
use touchdown::{Device, Engine, ErrorKind, Target, Verify};

/// Puts each device of a layout on one of so many GPUs, several on one if need be, or leaves it a processor.
fn on_devices(layout: Layout, tape: &mut Tape<'_>) -> Layout {
    let (gpus, mixed) = (tape.one_of(&[1, 2, 8]), tape.once_in(3));
    let place = |(at, device): (usize, &MeshDevice)| {
        let number = at as u32;
        let on = if mixed && at % 3 == 0 { Device::Cpu(number) } else { logical(number % gpus, 32)[at] };
        MeshDevice { device: on, ..*device }
    };
    Layout { devices: layout.devices.iter().enumerate().map(place).collect(), ..layout }
}

/// `tests/plan_laws.rs` holds processors against the same model.
#[test]
fn shards_on_devices_are_the_naive_slices_of_the_stored_values() {
    let Some(bed) = Bed::start("shards_on_devices_are_the_naive_slices_of_the_stored_values", Machine::default())
    else {
        return;
    };
    let compared = AtomicU64::new(0);
    let cases = number_from_environment("TOUCHDOWN_LAW_CASES", 200) as u32;
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    let law = |numbers: Vec<u32>| {
        let mut tape = Tape::new(&numbers);
        let case = Case::on(&mut tape, false, on_devices);
        bed.reset(Machine { delay_us: 50, seed: u64::from(tape.below(1000) as u32) + 1, ..Machine::default() });
        let verify = tape.one_of(&[Verify::Auto, Verify::Full, Verify::Off]);
        let engine = Engine::new(touchdown::EngineOptions { verify, ..options() }).unwrap();
        for rank in case.ranks() {
            let target = case.request.target(&case.checkpoint, &case.layout.mesh(rank));
            let state = engine.load(&case.checkpoint, &target).unwrap().wait().unwrap();
            for leaf in &case.request.wanted {
                let array = state.array(&leaf.name).unwrap();
                assert_eq!((&array.shape, array.dtype, array.lossy), (&leaf.shape, leaf.dtype, 0));
                let positions: Vec<usize> = array.shards().iter().map(|shard| shard.position).collect();
                assert_eq!(positions, case.local(rank), "only the rank's own devices, in mesh order");
                for shard in array.shards() {
                    assert_eq!(shard.device, case.layout.devices[shard.position].device);
                    let expected = case.expected(leaf, shard.position);
                    assert!(shard.to_host().unwrap() == expected, "{} on {:?}", leaf.name, shard.device);
                    compared.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        drop(engine);
        assert_eq!(bed.report(), "");
        Ok(())
    };
    TestRunner::new(config)
        .run(&prop::collection::vec(any::<u32>(), 400), law)
        .unwrap_or_else(|error| panic!("{error}"));
    let compared = compared.into_inner();
    println!("{cases} cases, {compared} shards compared");
    assert!(compared > 0);
}

/// Every leaf on two GPUs and a processor.
fn mixed(checkpoint: &touchdown::Checkpoint) -> Target {
    onto(checkpoint.target(), [gpus(2), vec![Device::Cpu(0)]].concat())
}

#[test]
fn a_read_that_fails_ends_its_load_and_leaves_nothing_on_devices() {
    let test = "a_read_that_fails_ends_its_load_and_leaves_nothing_on_devices";
    let Some(bed) = Bed::start(test, Machine::default()) else { return };
    let folder = scratch("cuda-laws-reads");
    let (mut failed, mut whole) = (0, 0);
    for compression in [Compression::None, Compression::Zstd { level: 1 }] {
        let (dir, checkpoint) = saved(compression);
        let want =
            contents(&Engine::new(options()).unwrap().load(&checkpoint, &mixed(&checkpoint)).unwrap().wait().unwrap());
        for fault in ReadFault::ALL {
            for at in [0, 1, 2, 5] {
                let path = folder.join(format!("{compression:?}-{fault:?}-{at}"));
                copy_tree(&dir.path().join("ckpt"), &path);
                // What the page cache has is not asked of the reader.
                let copied = touchdown::open(&path).unwrap();
                evict(&path);
                bed.reset(Machine { delay_us: 50, seed: at + 1, ..Machine::default() });
                let (reader, seen) = Faulty::new(fault, at, &path);
                let engine = Engine::with_reader(options(), Box::new(reader)).unwrap();
                let result = engine.load(&copied, &mixed(&copied)).and_then(touchdown::Job::wait);
                let happened = seen.swap(u64::MAX / 2, Ordering::SeqCst) > at;
                match result {
                    Ok(state) => {
                        let harmless = matches!(fault, ReadFault::Vanishes | ReadFault::Reordered);
                        assert!(harmless || !happened, "{fault:?} at {at} went unnoticed");
                        assert!(contents(&state) == want, "{fault:?} at {at}");
                        whole += 1;
                    }
                    Err(error) => {
                        assert!(matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt), "{error:?}");
                        failed += 1;
                    }
                }
                // The engine and its devices go on.
                let next = engine.load(&checkpoint, &mixed(&checkpoint)).unwrap().wait().unwrap();
                assert!(contents(&next) == want, "after {fault:?} at {at}");
                drop((next, engine));
                assert_eq!(bed.report(), "", "{fault:?} at {at}");
                fs::remove_dir_all(&path).unwrap();
            }
        }
    }
    println!("{failed} loads failed, {whole} were whole");
    assert!(failed > 10 && whole > 10, "{failed}, {whole}");
    fs::remove_dir_all(&folder).unwrap();
}

/// Takes the files below a directory out of the page cache, as far as the system does so.
fn evict(path: &std::path::Path) {
    for file in files_below(path) {
        let file = fs::File::open(file).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

#[test]
fn changed_bytes_do_on_devices_what_they_do_on_processors() {
    let test = "changed_bytes_do_on_devices_what_they_do_on_processors";
    let Some(bed) = Bed::start(test, Machine::default()) else { return };
    let folder = scratch("cuda-laws-changed");
    let (mut same, mut refused) = (0, 0);
    for compression in [Compression::None, Compression::Zstd { level: 1 }] {
        let (dir, _) = saved(compression);
        for seed in 0..number_from_environment("TOUCHDOWN_CHANGED_CASES", 30) {
            let path = folder.join(format!("{compression:?}-{seed}"));
            copy_tree(&dir.path().join("ckpt"), &path);
            change(&path, seed);
            bed.reset(Machine { delay_us: 20, seed: seed + 1, ..Machine::default() });
            // One that is read in the same order, so that both meet the same damage first.
            let engine = Engine::new(touchdown::EngineOptions { threads: 1, ..options() }).unwrap();
            let load = |devices: Vec<Device>| {
                let checkpoint = touchdown::open(&path)?;
                engine.load(&checkpoint, &onto(checkpoint.target(), devices))?.wait()
            };
            match (load(Device::cpus(2)), load(gpus(2))) {
                (Ok(want), Ok(have)) => {
                    let bytes = |state| {
                        contents(state).into_iter().map(|(path, at, _, bytes)| (path, at, bytes)).collect::<Vec<_>>()
                    };
                    assert!(bytes(&want) == bytes(&have), "seed {seed}");
                    same += 1;
                }
                (Err(want), Err(have)) => {
                    assert_eq!(want.kind(), have.kind(), "seed {seed}: {want}, {have}");
                    refused += 1;
                }
                (want, have) => panic!("seed {seed}: {want:?} on processors, {have:?} on devices"),
            }
            drop(engine);
            assert_eq!(bed.report(), "", "seed {seed}");
            fs::remove_dir_all(&path).unwrap();
        }
    }
    println!("{same} loads gave the same, {refused} failed alike");
    assert!(same > 0 && refused > 0);
    fs::remove_dir_all(&folder).unwrap();
}

/// Flips a bit of a file, or cuts it, or swaps two pages.
fn change(path: &std::path::Path, seed: u64) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut below = |end: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % end.max(1)
    };
    let files: Vec<_> = files_below(path).into_iter().filter(|file| file.metadata().unwrap().len() > 0).collect();
    // Most bytes are in the largest file.
    let largest = files.iter().max_by_key(|file| file.metadata().unwrap().len()).unwrap();
    let file = if seed.is_multiple_of(2) { largest } else { &files[below(files.len() as u64) as usize] };
    let mut bytes = fs::read(file).unwrap();
    let len = bytes.len() as u64;
    match below(4) {
        0 => bytes.truncate(below(len) as usize),
        1 if len > 8192 => {
            let (a, b) = (below(len / 4096) as usize * 4096, below(len / 4096) as usize * 4096);
            (0..4096).for_each(|at| bytes.swap(a + at, b + at));
        }
        _ => bytes[below(len) as usize] ^= 1 << below(8),
    }
    fs::write(file, bytes).unwrap();
}
