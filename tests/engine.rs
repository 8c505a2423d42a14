//! The engine from outside: jobs, cancelling, memory that the caller owns, files that change, budgets, and what is left
//! behind. Checkpoints are written here, byte by byte.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, LazyLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde_json::json;
use touchdown::dtype::CastPolicy;
use touchdown::io::{Buffer, Io};
use touchdown::place::{Destination, Memory, ShardSpec};
use touchdown::plan::{Device, Mesh};
use touchdown::tree::{Checkpoint, Engine, EngineOptions, Job, OpenOptions, Target};
use touchdown::{DType, Error, ErrorKind, spec};

/// Tests that count threads, files or memory of the process run alone; all others beside each other.
static ALONE: RwLock<()> = RwLock::new(());

fn together() -> RwLockReadGuard<'static, ()> {
    ALONE.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn alone() -> RwLockWriteGuard<'static, ()> {
    ALONE.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A whole number below 65521 that looks random: half of its bytes do not compress.
fn value(number: usize) -> f32 {
    let mixed = (number as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((mixed >> 33) % 65_521) as f32
}

fn values(count: usize) -> Vec<u8> {
    let all: Vec<f32> = (0..count).map(value).collect();
    bytemuck::cast_slice(&all).to_vec()
}

/// A zarr v3 array of f32 in chunks of so many rows.
fn write_array(dir: &Path, name: &str, shape: [usize; 2], rows: usize, codec: &str) {
    let dir = dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    let mut codecs = vec![json!({"name": "bytes", "configuration": {"endian": "little"}})];
    match codec {
        "" => {}
        "zstd" => codecs.push(json!({"name": "zstd", "configuration": {"level": 1, "checksum": false}})),
        other => codecs.push(json!({"name": other, "configuration": {"level": 1}})),
    }
    let meta = json!({
        "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, shape[1]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": codecs, "fill_value": 0.0, "attributes": {},
    });
    fs::write(dir.join("zarr.json"), meta.to_string()).unwrap();
    let all = values(shape[0] * shape[1]);
    for (number, chunk) in all.chunks(rows * shape[1] * 4).enumerate() {
        let stored = match codec {
            "zstd" => zstd::bulk::compress(chunk, 1).unwrap(),
            "gzip" => gzip(chunk),
            _ => chunk.to_vec(),
        };
        fs::write(dir.join(format!("c.{number}.0")), stored).unwrap();
    }
}

#[cfg(feature = "gzip")]
fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

#[cfg(not(feature = "gzip"))]
fn gzip(_: &[u8]) -> Vec<u8> {
    panic!("this build has no gzip")
}

/// A checkpoint of so many arrays `a00`, `a01`, .. of 64 x 1024 f32 in four chunks.
fn small(count: usize) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    (0..count)
        .for_each(|number| write_array(dir.path(), &format!("a{number:02}"), [64, 1024], 16, ["", "zstd"][number % 2]));
    let checkpoint = open(dir.path());
    (dir, checkpoint)
}

fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, &OpenOptions::default()).unwrap()
}

fn engine(staging_bytes: u64) -> Engine {
    let options = EngineOptions { staging_bytes, threads: 2, io: io(), reader_threads: 2, ..EngineOptions::default() };
    let engine = Engine::new(options).unwrap();
    let name = match io() {
        Io::Uring => "uring",
        Io::Pread => "pread",
        Io::Auto => "auto",
    };
    assert_eq!(engine.reader(), name);
    engine
}

/// What this binary reads with: `engine_uring.rs` runs the same tests with io_uring, where the machine has it.
fn io() -> Io {
    static IO: LazyLock<Io> = LazyLock::new(|| {
        if env!("CARGO_CRATE_NAME") != "engine_uring" {
            return Io::Pread;
        }
        match touchdown::io::uring_setup() {
            Ok(()) => Io::Uring,
            Err(error) => {
                // Past the capturing of tests; where stderr is closed there is nobody to tell.
                let _ = writeln!(std::io::stderr(), "skipped: the engine is not tested with io_uring: {error:?}");
                Io::Pread
            }
        }
    });
    *IO
}

/// A small budget: slots of 512 KiB, and room for a zstd decoder.
const SMALL: u64 = (512 << 10) * 2 * 5;

fn load(engine: &Engine, checkpoint: &Checkpoint) -> Job {
    engine.load(checkpoint, &checkpoint.target()).unwrap()
}

fn two_columns(checkpoint: &Checkpoint) -> Target {
    let mesh = Mesh::line(Device::cpus(2)).unwrap();
    checkpoint.target().shard(&mesh, [("**", spec![_, "device"])])
}

fn text(error: &Error) -> String {
    format!("{error:?}")
}

#[test]
fn a_job_is_an_iterator_a_future_and_a_handle() {
    let _together = together();
    let (_dir, checkpoint) = small(6);
    let engine = engine(SMALL);
    let paths: BTreeSet<String> = checkpoint.leaves().iter().map(|leaf| leaf.path.to_string()).collect();

    let mut job = load(&engine, &checkpoint);
    let mut seen = BTreeSet::new();
    for array in job.by_ref() {
        assert!(
            array.shards()[0].bytes().unwrap() == values(64 * 1024),
            "{} is complete when it is handed out",
            array.path
        );
        seen.insert(array.path.to_string());
    }
    assert_eq!(seen, paths);
    let progress = job.progress();
    assert_eq!((progress.bytes_read, progress.leaves_done), (progress.bytes_total, progress.leaves_total));
    assert_eq!(progress.leaves_total, 6);
    assert!(progress.bytes_total > 0 && job.is_finished());
    let state = job.wait().unwrap();
    assert_eq!(state.leaves().len(), 6);
    assert_eq!(state.report().bytes_read, progress.bytes_total);

    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let state = runtime.block_on(load(&engine, &checkpoint)).unwrap();
    assert_eq!(state.array("a03").unwrap().shards()[0].bytes().unwrap(), values(64 * 1024));
}

#[test]
fn a_result_that_was_taken_is_an_error_and_no_hang() {
    let _together = together();
    let (_dir, checkpoint) = small(1);
    let engine = engine(SMALL);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut job = load(&engine, &checkpoint);
    runtime.block_on(&mut job).unwrap();
    assert!(job.is_finished());
    assert_eq!(job.by_ref().count(), 1, "arrays that nobody took are still there");
    assert_eq!(runtime.block_on(&mut job).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(job.wait().unwrap_err().kind(), ErrorKind::Invalid);
}

/// A checkpoint whose only unit streams through many slots.
fn one_large_unit() -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    write_array(dir.path(), "w", [2048, 1024], 2048, "zstd");
    let checkpoint = open(dir.path());
    (dir, checkpoint)
}

#[test]
fn a_cancelled_load_says_so_or_is_whole_and_the_engine_serves_the_next() {
    let _together = together();
    let (_many, many) = small(12);
    let (_one, one) = one_large_unit();
    let engine = engine(4 * SMALL);
    let mut cancelled = 0;
    for (checkpoint, target) in [(&many, many.target()), (&one, one.target()), (&one, two_columns(&one))] {
        for round in 0..20u64 {
            let job = engine.load(checkpoint, &target).unwrap();
            while job.progress().bytes_read < round * job.progress().bytes_total / 24 {
                std::hint::spin_loop();
            }
            job.cancel();
            match job.wait() {
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
                    cancelled += 1;
                }
                // Too late: then nothing may be missing.
                Ok(state) => assert_whole(checkpoint, &state),
            }
        }
    }
    println!("{cancelled} of 60 loads were cancelled in time");
    assert!(cancelled > 0, "no load was cancelled");
    assert_whole(&many, &load(&engine, &many).wait().unwrap());
}

fn assert_whole(checkpoint: &Checkpoint, state: &touchdown::tree::State) {
    assert_eq!(state.leaves().len(), checkpoint.leaves().len());
    for leaf in checkpoint.leaves() {
        let array = state.array(&leaf.path.to_string()).unwrap();
        for shard in array.shards() {
            let have = shard.as_ndarray::<f32>().unwrap();
            for (index, have) in have.indexed_iter() {
                let row = shard.region.start[0] as usize + index[0];
                let column = shard.region.start[1] as usize + index[1];
                assert_eq!(*have, value(row * array.shape[1] as usize + column), "{} {row} {column}", leaf.path);
            }
        }
    }
}

#[test]
fn dropped_jobs_and_dropped_engines_end_what_is_queued() {
    let _together = together();
    let (_dir, checkpoint) = small(8);
    let engine = engine(SMALL);
    for _ in 0..10 {
        drop(load(&engine, &checkpoint));
    }
    assert_whole(&checkpoint, &load(&engine, &checkpoint).wait().unwrap());

    let jobs: Vec<Job> = (0..50).map(|_| load(&engine, &checkpoint)).collect();
    drop(engine);
    let (mut whole, mut ended) = (0, 0);
    for job in jobs {
        assert!(job.is_finished(), "a job outlives its engine");
        match job.wait() {
            Ok(state) => {
                assert_whole(&checkpoint, &state);
                whole += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Cancelled);
                assert!(error.to_string().contains("engine was dropped"), "{error}");
                ended += 1;
            }
        }
    }
    println!("{whole} loads were done and {ended} ended when the engine was dropped");
    assert!(ended > 0, "dropping the engine did all queued loads first");
}

#[test]
fn leaves_come_in_the_order_that_the_caller_gave() {
    let _together = together();
    let (dir, _) = small(24);
    // The first takes longest, so that the others are complete before it.
    write_array(dir.path(), "a17", [1024, 1024], 1024, "zstd");
    let checkpoint = open(dir.path());
    let engine = engine(4 * SMALL);
    let first = ["a17", "a03", "a22", "a08"];
    let target = checkpoint.target().order(first);
    for _ in 0..10 {
        let job = engine.load(&checkpoint, &target).unwrap();
        let order: Vec<String> = job.map(|array| array.path.to_string()).collect();
        assert_eq!(order[..4], first);
        assert_eq!(order.len(), 24);
    }
}

#[test]
fn memory_of_the_caller_is_filled_once_a_distinct_shard() {
    let _together = together();
    let (_dir, checkpoint) = small(3);
    let engine = engine(SMALL);
    // Two columns, each on two devices: two distinct shards a leaf.
    let mesh = Mesh::new([("copy", 2), ("column", 2)], Device::cpus(4)).unwrap();
    let target = checkpoint.target().shard(&mesh, [("**", spec![_, "column"])]);
    let mut memory = vec![vec![0xEEu8; 64 * 512 * 4]; 6];
    let mut asked = Vec::new();
    let mut free = memory.iter_mut();
    engine
        .fill(&checkpoint, &target, |shard| {
            asked.push((shard.path.to_string(), shard.region.start[1], shard.bytes));
            Ok(free.next().unwrap().as_mut_slice().into())
        })
        .unwrap();
    assert_eq!(asked.len(), 6);
    for ((path, column, bytes), memory) in asked.iter().zip(&memory) {
        assert_eq!(*bytes, memory.len() as u64);
        let expected: Vec<u8> = (0..64usize)
            .flat_map(|row| (0..512).map(move |at| row * 1024 + *column as usize + at))
            .flat_map(|number| value(number).to_le_bytes())
            .collect();
        assert!(*memory == expected, "{path} {column}");
    }
    assert_eq!(asked.iter().collect::<BTreeSet<_>>().len(), 6, "a shard was asked for twice");

    let mut short = vec![0; 64 * 512 * 4 * 6];
    let mut slices = short.chunks_mut(64 * 512 * 4 - 1);
    let error = engine.fill(&checkpoint, &target, |_| Ok(slices.next().unwrap().into())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("131072 bytes, found 131071 bytes"), "{error}");
    let refused = engine.fill(&checkpoint, &target, |_| Err(Error::new(ErrorKind::Device, "no room"))).unwrap_err();
    assert_eq!((refused.kind(), refused.what()), (ErrorKind::Device, "no room"));
}

#[test]
fn a_destination_of_the_callers_own_holds_the_result() {
    struct Boxes {
        addresses: Vec<usize>,
        drop_one: bool,
    }
    impl Destination for Boxes {
        fn prepare(&mut self, shards: &[ShardSpec]) -> touchdown::Result<Vec<Memory>> {
            let mut memory = Vec::new();
            for shard in shards.iter().skip(usize::from(self.drop_one)) {
                // Not zeroed: what is not stored must be written too.
                let buffer = Buffer::from(vec![0xEE; shard.bytes as usize]);
                self.addresses.push(buffer.as_ptr() as usize);
                memory.push(Memory::Host(buffer));
            }
            Ok(memory)
        }
    }
    let _together = together();
    let (dir, checkpoint) = small(2);
    fs::remove_file(dir.path().join("a00/c.2.0")).unwrap();
    let engine = engine(SMALL);
    let target = checkpoint.target().shape([("a01", vec![65, 1024])]).pad(0.0);
    let mut boxes = Boxes { addresses: Vec::new(), drop_one: false };
    let state = engine.load_to(&checkpoint, &target, &mut boxes).unwrap().wait().unwrap();
    let have: Vec<usize> =
        ["a00", "a01"].map(|name| state.array(name).unwrap().shards()[0].bytes().unwrap().as_ptr() as usize).into();
    assert_eq!(have, boxes.addresses, "the result lies where the destination said");
    let (chunk, all) = (16 * 1024 * 4, values(64 * 1024));
    let hole = [&all[..2 * chunk], &vec![0; chunk], &all[3 * chunk..]].concat();
    assert!(state.array("a00").unwrap().shards()[0].bytes().unwrap() == hole);
    assert!(state.array("a01").unwrap().shards()[0].bytes().unwrap() == [all, vec![0; 1024 * 4]].concat());

    let mut few = Boxes { addresses: Vec::new(), drop_one: true };
    let error = engine.load_to(&checkpoint, &target, &mut few).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn threads_share_one_engine() {
    let _together = together();
    let (_dir, checkpoint) = small(5);
    let engine = Arc::new(engine(SMALL));
    std::thread::scope(|scope| {
        for number in 0..6 {
            let (engine, checkpoint) = (Arc::clone(&engine), checkpoint.clone());
            scope.spawn(move || {
                for _ in 0..5 {
                    let target = if number % 2 == 0 { checkpoint.target() } else { two_columns(&checkpoint) };
                    assert_whole(&checkpoint, &engine.load(&checkpoint, &target).unwrap().wait().unwrap());
                }
            });
        }
    });
}

#[test]
fn a_file_that_changes_after_planning_is_named() {
    let _together = together();
    let engine = engine(SMALL);
    for zstd in [false, true] {
        let name = if zstd { "a01" } else { "a00" };
        for truncated in [false, true] {
            let (dir, checkpoint) = small(2);
            let victim = dir.path().join(name).join("c.2.0");
            // Planning ends before memory is asked for; that is when the file goes.
            struct Saboteur<'a>(&'a dyn Fn());
            impl Destination for Saboteur<'_> {
                fn prepare(&mut self, shards: &[ShardSpec]) -> touchdown::Result<Vec<Memory>> {
                    (self.0)();
                    touchdown::place::HostDestination.prepare(shards)
                }
            }
            let harm = || {
                if truncated {
                    fs::OpenOptions::new().write(true).open(&victim).unwrap().set_len(1000).unwrap();
                } else {
                    fs::remove_file(&victim).unwrap();
                }
            };
            let job = engine.load_to(&checkpoint, &checkpoint.target(), &mut Saboteur(&harm)).unwrap();
            let error = job.wait().unwrap_err();
            let kind = if truncated { ErrorKind::Corrupt } else { ErrorKind::NotFound };
            assert_eq!(error.kind(), kind, "{error}");
            assert!(text(&error).contains(&format!("{name}/c.2.0")), "{error:?}");
            assert!(error.to_string().contains(&format!("array {name}")), "{error}");
        }
    }
    let (_dir, checkpoint) = small(2);
    assert_whole(&checkpoint, &load(&engine, &checkpoint).wait().unwrap());
}

#[test]
fn the_policy_error_lists_every_lossy_leaf() {
    let _together = together();
    let (_dir, checkpoint) = small(4);
    let engine = engine(SMALL);
    let target = checkpoint.target().cast([("a00", DType::UInt8), ("a02", DType::Int16), ("a03", DType::Float64)]);
    let target = target.cast_policy(CastPolicy::Error);
    let error = engine.load(&checkpoint, &target).unwrap().wait().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let count = |max: f32| (0..64 * 1024).filter(|&number| value(number) > max).count();
    assert_eq!(error.list(), [format!("a00: {} elements", count(255.0)), format!("a02: {} elements", count(32767.0))]);
    let state = engine.load(&checkpoint, &target.cast_policy(CastPolicy::Saturate)).unwrap().wait().unwrap();
    let lossy: Vec<(String, u64)> = state.report().lossy.clone().into_iter().collect();
    assert_eq!(lossy, [("a00".to_owned(), count(255.0) as u64), ("a02".to_owned(), count(32767.0) as u64)]);
}

#[test]
fn arrays_of_different_types_are_not_joined() {
    let _together = together();
    let (_dir, checkpoint) = small(2);
    let target = checkpoint.target().cast([("a01", DType::Int16)]);
    let error = target.stack("**", 0, touchdown::keypath::KeyPath::names(["all"])).check().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("float32") && error.to_string().contains("int16"), "{error}");
}

/// Loads an array of so many rows of 16 KiB in one chunk, in four columns and cast, and compares every element.
fn stream(codec: &str, rows: usize, budget: impl Fn(&Checkpoint, &Target) -> u64) {
    let dir = tempfile::tempdir().unwrap();
    write_array(dir.path(), "w", [rows, 4096], rows, codec);
    let checkpoint = open(dir.path());
    let mesh = Mesh::line(Device::cpus(4)).unwrap();
    let target = checkpoint.target().cast([("**", DType::Int32)]);
    let target = target.shard(&mesh, [("**", spec![_, "device"])]);
    let budget = budget(&checkpoint, &target);
    let state = engine(budget).load(&checkpoint, &target).unwrap().wait().unwrap();
    let mut compared = 0;
    for shard in state.array("w").unwrap().shards() {
        let start = shard.region.start[1] as usize;
        for (row, have) in shard.as_slice::<i32>().unwrap().chunks(1024).enumerate() {
            let right = have.iter().enumerate().all(|(at, have)| *have == value(row * 4096 + start + at) as i32);
            assert!(right, "row {row} from column {start}");
            compared += have.len();
        }
    }
    println!("{compared} elements compared under a budget of {budget} bytes");
    assert_eq!(compared, rows * 4096);
    let report = state.report();
    let staging = report.peak_host_bytes - report.bytes_logical;
    assert!(staging <= budget, "{staging} bytes of staging");
    assert_eq!(report.bytes_decoded, rows as u64 * 4096 * 4);
}

#[test]
fn a_raw_chunk_larger_than_the_budget_streams_through_it() {
    let _together = together();
    stream("", 4096, |_, _| 8 << 20);
}

#[cfg(feature = "gzip")]
#[test]
fn a_compressed_chunk_larger_than_the_budget_streams_through_it() {
    let _together = together();
    stream("gzip", 2048, |_, _| 8 << 20);
}

/// A zstd frame may refer back to all of its output, and only its header tells; the budget must hold that window.
#[test]
fn a_zstd_chunk_streams_through_the_budget_that_holds_its_window() {
    let _together = together();
    stream("zstd", 2048, |checkpoint, target| {
        let error = engine(8 << 20).load(checkpoint, target).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Budget);
        let needed = budget_named(&error);
        assert!(needed < 64 << 20, "{needed} bytes: the chunk could as well be decoded whole");
        needed
    });
}

/// The number of bytes that an error asks for.
fn budget_named(error: &Error) -> u64 {
    let message = error.to_string();
    let number = message.split("at least ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    number.parse().unwrap_or_else(|_| panic!("no number: {message}"))
}

#[cfg(feature = "blosc")]
#[test]
fn the_budget_that_an_error_names_is_enough() {
    let _together = together();
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("w")).unwrap();
    // Blosc decodes a chunk only as a whole. 12 MiB of bytes, stored without inner compression.
    let len: u32 = 12 << 20;
    let bytes: Vec<u8> = (0..len).map(|number| (number % 251) as u8).collect();
    let mut chunk = vec![2, 1, 0x02, 1];
    [len, len, len + 16].iter().for_each(|number| chunk.extend(number.to_le_bytes()));
    chunk.extend(&bytes);
    fs::write(dir.path().join("w/0"), chunk).unwrap();
    let meta = json!({"zarr_format": 2, "shape": [len], "chunks": [len], "dtype": "|u1", "order": "C", "filters": null,
        "compressor": {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 0}, "fill_value": 0});
    fs::write(dir.path().join("w/.zarray"), meta.to_string()).unwrap();
    let checkpoint = open(dir.path());
    let target = checkpoint.target().cast([("w", DType::Int16)]);
    for budget in [SMALL, 8 << 20, 24 << 20] {
        let error = engine(budget).load(&checkpoint, &target).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Budget, "{error}");
        let needed = budget_named(&error);
        assert!(error.advice().unwrap().contains(&format!("--memory {needed}")), "{error:?}");
        let state = engine(needed).load(&checkpoint, &target).unwrap().wait().unwrap();
        let have = state.array("w").unwrap().shards()[0].as_slice::<i16>().unwrap();
        assert!(have.iter().zip(&bytes).all(|(have, byte)| *have == i16::from(*byte)) && have.len() == bytes.len());
        let report = state.report();
        assert!(report.peak_host_bytes - report.bytes_logical <= needed);
    }
}

/// Threads of engines, and open files, of this process.
fn left_behind() -> (usize, usize) {
    let names = fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = names.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    let threads = names.filter(|name| name.starts_with("touchdown")).count();
    (threads, fs::read_dir("/proc/self/fd").unwrap().count())
}

/// Memory of this process, in KiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn an_engine_leaves_no_thread_and_no_file_behind() {
    let _alone = alone();
    let (_dir, checkpoint) = small(4);
    let before = left_behind();
    assert_eq!(before.0, 0);
    for round in 0..30 {
        let engine = engine(SMALL);
        let job = load(&engine, &checkpoint);
        match round % 3 {
            0 => {
                job.wait().unwrap();
                // A driver, two readers, two workers; a thread that has not run yet has no name.
                assert!((1..=5).contains(&left_behind().0), "{:?}", left_behind());
            }
            1 => drop(job),
            _ => {}
        }
        drop(engine);
        // A thread that was joined may stand in /proc for a moment more.
        let start = std::time::Instant::now();
        while left_behind() != before && start.elapsed().as_secs() < 30 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(left_behind(), before, "after round {round}");
    }
}

#[test]
fn hundreds_of_loads_on_one_engine_need_no_more_than_a_few() {
    let _alone = alone();
    let (_dir, checkpoint) = small(4);
    let engine = engine(SMALL);
    let once = || {
        load(&engine, &checkpoint).wait().unwrap();
        engine.load(&checkpoint, &two_columns(&checkpoint)).unwrap().wait().unwrap();
    };
    (0..20).for_each(|_| once());
    let (before, memory) = (left_behind(), resident());
    (0..150).for_each(|_| once());
    let grown = resident().saturating_sub(memory);
    println!("300 loads of 1 MiB: {grown} KiB more");
    // One result is 1 MiB: a load that kept anything of its own would show as hundreds.
    assert!(grown < 16 << 10, "{grown} KiB more after 300 loads");
    // The driver lets go of a load's files right after it has answered.
    drop(engine);
    let after = left_behind();
    assert!(after.1 <= before.1, "{before:?} {after:?}");
}

#[cfg(feature = "cli")]
#[test]
fn sixty_four_open_files_are_enough() {
    let _together = together();
    let dir = tempfile::tempdir().unwrap();
    for number in 0..300 {
        write_array(dir.path(), &format!("a{number:03}"), [8, 4], 2, "");
    }
    let command = "ulimit -n 64; exec \"$0\" load \"$1\" --threads 4 --json";
    let output = std::process::Command::new("sh")
        .args(["-c", command, env!("CARGO_BIN_EXE_touchdown")])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["leaves"], &report["bytes_read"]), (&json!(300), &json!(300 * 8 * 4 * 4)));
}
