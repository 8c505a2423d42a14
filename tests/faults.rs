//! Failing machines: reads that fail, come short or in another order; disks that are full, refuse or die at any operation;
//! processes that are killed at any operation; files that shrink or vanish; few descriptors and one core; many loads and saves.
//! After each: a clear error or the whole result, and what was there before is whole.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod faulty;
mod stopping;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use faulty::{Faulty, ReadFault};
use stopping::{Operation, Watched};
use support::{copy_tree, fixture, scratch};
use touchdown::io::store::leftovers;
use touchdown::io::{LocalStore, Store};
use touchdown::training::{Checkpointer, CheckpointerOptions, PreservationPolicy, Pruning, StepOptions, prune};
use touchdown::tree::repair::repair;
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::tree::seal::{Seal, seal};
use touchdown::tree::verify::verify;
use touchdown::zarr::Compression;
use touchdown::{ConvertOptions, DType, Engine, EngineOptions, ErrorKind, OpenOptions, convert};

fn options() -> EngineOptions {
    EngineOptions { threads: 1, reader_threads: 1, staging_bytes: 16 << 20, ..EngineOptions::default() }
}

/// A tree of one value everywhere.
fn tree(value: u8) -> Tree {
    let array = |len: usize| NewArray::new(&[len as u64], DType::UInt8, vec![value; len]);
    let leaves = (0..6).map(|number| (format!("w{number}"), array(1500 + number)));
    leaves.fold(Tree::new().with("n", i64::from(value)), |tree, (name, array)| tree.with(name.as_str(), array))
}

fn saving() -> SaveOptions {
    let leaf = LeafOptions { compression: Some(Compression::None), ..LeafOptions::default() };
    SaveOptions { leaf, sync: true, ..SaveOptions::default() }
}

/// The value that every leaf of a checkpoint has.
fn loaded(engine: &Engine, path: &Path) -> touchdown::Result<u8> {
    let checkpoint = touchdown::open(path)?;
    let state = engine.load(&checkpoint, &checkpoint.target())?.wait()?;
    let mut values: Vec<u8> = (0..6)
        .flat_map(|number| state.array(&format!("w{number}")).unwrap().shards()[0].bytes().unwrap().to_vec())
        .collect();
    assert_eq!(values.len(), 9015, "{}", path.display());
    values.dedup();
    assert_eq!(values.len(), 1, "{}: a mixture", path.display());
    Ok(values[0])
}

// ---------------------------------------------------------------- reads

#[test]
fn a_read_that_fails_ends_its_load_and_nothing_else() {
    let folder = scratch("faults-reads");
    let (mut cases, mut ended) = (0, BTreeMap::new());
    for fault in ReadFault::ALL {
        for at in 0.. {
            let path = folder.join(format!("{fault:?}-{at}"));
            // Reads of their own: nothing is merged.
            let save = SaveOptions { data_file_bytes: 1, ocdbt: at % 2 == 0, ..saving() };
            touchdown::save(&path, &tree(1), &save).unwrap();
            let (reader, seen) = Faulty::new(fault, at, &path);
            let engine = Engine::with_reader(options(), Box::new(reader)).unwrap();
            let result = loaded(&engine, &path);
            let happened = seen.swap(u64::MAX / 2, Ordering::SeqCst) > at;
            cases += u64::from(happened);
            let how = match (fault, result) {
                (ReadFault::Vanishes | ReadFault::Reordered, result) => {
                    assert_eq!(result.unwrap(), 1, "{fault:?} at {at}");
                    "whole"
                }
                (_, Ok(value)) => {
                    assert!(!happened && value == 1, "{fault:?} at {at} went unnoticed");
                    "whole"
                }
                (ReadFault::Short | ReadFault::Shrinks, Err(error)) => {
                    let told = error.to_string();
                    assert!(error.kind() == ErrorKind::Corrupt && told.contains("a file ends before"), "{error:?}");
                    assert!(error.places().any(|(name, _)| name == "array"), "{error:?}");
                    "corrupt"
                }
                (ReadFault::Errno(number), Err(error)) => {
                    assert_eq!(error.kind(), ErrorKind::Io, "{error:?}");
                    let places: Vec<&str> = error.places().map(|(name, _)| name).collect();
                    assert!(places.contains(&"file") && places.contains(&"offset"), "{places:?}");
                    let cause = std::error::Error::source(&error).unwrap().downcast_ref::<io::Error>().unwrap();
                    assert_eq!(cause.raw_os_error(), Some(number));
                    "i/o"
                }
            };
            *ended.entry(how).or_insert(0) += 1;
            // Memory and files that it held are free again, so that the engine goes on.
            fs::remove_dir_all(&path).unwrap();
            touchdown::save(&path, &tree(2), &saving()).unwrap();
            assert_eq!(loaded(&engine, &path).unwrap(), 2, "{fault:?} at {at}");
            if !happened || (fault == ReadFault::Reordered && at > 0) {
                break;
            }
        }
    }
    println!("{cases} faults of reads: {ended:?}");
    assert!(cases > 25, "{cases} faults");
    fs::remove_dir_all(&folder).unwrap();
}

// ---------------------------------------------------------------- writers

#[derive(Clone, Copy, Debug, PartialEq)]
enum WriteFault {
    /// The operation fails with this number, and what follows does not.
    Errno(i32),
    /// The process ends there.
    Kill,
}

/// A file system with one fault, at the operation of a number; how many were begun, and whether the fault was at removing
/// something.
fn faulty(fault: WriteFault, at: u64) -> (Watched, Arc<AtomicU64>, Arc<AtomicBool>) {
    let (begun, removing): (Arc<AtomicU64>, Arc<AtomicBool>) = Default::default();
    let told = (Arc::clone(&begun), Arc::clone(&removing));
    let store = Watched::new(move |operation| {
        if operation == Operation::Close || begun.fetch_add(1, Ordering::SeqCst) != at {
            return Ok(());
        }
        let removes = matches!(operation, Operation::RemoveFile(_) | Operation::RemoveDir(_));
        removing.fetch_or(removes, Ordering::SeqCst);
        match fault {
            WriteFault::Errno(number) => Err(io::Error::from_raw_os_error(number)),
            WriteFault::Kill => std::process::abort(),
        }
    });
    (store, told.0, told.1)
}

/// What writes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Writer {
    Save,
    Overwrite,
    Convert,
    ConvertOver,
    Repair,
    Seal,
    Prune,
}

const WRITERS: [Writer; 7] = [
    Writer::Save,
    Writer::Overwrite,
    Writer::Convert,
    Writer::ConvertOver,
    Writer::Repair,
    Writer::Seal,
    Writer::Prune,
];

impl Writer {
    /// What is there before: the old value at `run`, and what is read at `from`.
    fn prepare(self, home: &Path) {
        let (run, from) = (home.join("work/run"), home.join("from"));
        fs::create_dir_all(home.join("work")).unwrap();
        match self {
            Self::Save => {}
            Self::Overwrite | Self::Seal => touchdown::save(&run, &tree(1), &saving()).map(drop).unwrap(),
            Self::Convert => touchdown::save(&from, &tree(2), &saving()).map(drop).unwrap(),
            Self::ConvertOver => {
                touchdown::save(&from, &tree(2), &saving()).unwrap();
                touchdown::save(&run, &tree(1), &saving()).unwrap();
            }
            Self::Repair => {
                touchdown::save(&from, &tree(2), &saving()).unwrap();
                let item = from.join("state");
                fs::create_dir(item.join("ocdbt.process_0")).unwrap();
                for name in ["manifest.ocdbt", "d"] {
                    fs::rename(item.join(name), item.join("ocdbt.process_0").join(name)).unwrap();
                }
            }
            Self::Prune => {
                let steps = Checkpointer::open(&run, CheckpointerOptions::default()).unwrap();
                (1..=3).for_each(|step| drop(steps.save(step, &tree(1), &StepOptions::default()).unwrap()));
                steps.close().unwrap();
            }
        }
    }

    fn run(self, home: &Path, store: Arc<dyn Store>) -> touchdown::Result<()> {
        let (run, from) = (home.join("work/run"), home.join("from"));
        let over = matches!(self, Self::Overwrite | Self::ConvertOver);
        let save = SaveOptions { store, overwrite: over, ..saving() };
        match self {
            Self::Save | Self::Overwrite => touchdown::save(&run, &tree(2), &save).map(drop),
            Self::Convert | Self::ConvertOver => {
                let options = ConvertOptions { save, engine: options(), ..ConvertOptions::default() };
                convert(&touchdown::open(&from)?.target(), &run, &options).map(drop)
            }
            Self::Repair => repair(&from, &run, &OpenOptions::default(), &save, &|| false).map(drop),
            Self::Seal => Seal::of(&run, &OpenOptions::default(), &options())?.write(&save.store),
            Self::Prune => {
                let policy = PreservationPolicy::latest(1);
                prune(&run, &Pruning { policy, store: save.store, ..Pruning::default() }).map(drop)
            }
        }
    }

    /// What is there afterwards: it is one of the two wholes, and whatever was read is as it was.
    fn judge(self, engine: &Engine, home: &Path, told: &str) -> &'static str {
        let (run, from) = (home.join("work/run"), home.join("from"));
        if matches!(self, Self::Convert | Self::ConvertOver | Self::Repair) {
            assert_eq!(loaded(engine, &from).unwrap(), 2, "{told}: the source is another");
        }
        let found = match self {
            Self::Prune => {
                let options = OpenOptions { step: touchdown::layout::StepChoice::Latest, ..OpenOptions::default() };
                let checkpoint = touchdown::Checkpoint::open(&run, &options).unwrap();
                assert_eq!(checkpoint.description().step.as_ref().map(|step| step.number), Some(3), "{told}");
                assert_eq!(loaded(engine, &run.join("3")).unwrap(), 1, "{told}: the step that stays");
                if run.join("1").exists() || run.join("2").exists() { "old" } else { "new" }
            }
            Self::Seal => {
                assert_eq!(loaded(engine, &run).unwrap(), 1, "{told}");
                let found = verify(&run, &OpenOptions::default(), true, &options()).unwrap();
                assert!(found.problems.is_empty(), "{told}: {:?}", found.problems);
                let sums = fs::read_to_string(run.join("state/_touchdown_sums.json")).unwrap();
                if sums.contains("[[") { "new" } else { "old" }
            }
            _ => match loaded(engine, &run) {
                Ok(2) => "new",
                Ok(value) => {
                    assert!(value == 1 && matches!(self, Self::Overwrite | Self::ConvertOver), "{told}: {value}");
                    "old"
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NotFound, "{told}: {error:?}");
                    assert!(matches!(self, Self::Save | Self::Convert | Self::Repair), "{told}: the old one is gone");
                    "none"
                }
            },
        };
        // Whatever else is there is known as left over.
        let dirs = [home.join("work"), run.join("state")];
        for dir in dirs.iter().filter(|dir| dir.exists()) {
            let known = leftovers(dir).unwrap();
            let temporary = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
            let temporary: Vec<PathBuf> = temporary
                .filter(|path| {
                    path.to_str().is_some_and(|name| name.contains("tmp-touchdown") || name.contains(".touchdown-old"))
                })
                .collect();
            assert!(temporary.iter().all(|path| known.iter().any(|one| one.path == *path)), "{told}: {temporary:?}");
        }
        found
    }
}

fn temporaries(home: &Path) -> usize {
    let mut waiting = vec![home.to_owned()];
    let mut count = 0;
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains("tmp-touchdown") || name.contains(".touchdown-old") {
                count += 1;
            } else if entry.file_type().unwrap().is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    count
}

/// Full disks, quotas, read-only and failing disks: at each operation of each writer.
#[test]
fn a_disk_that_refuses_any_operation_leaves_the_old_or_the_new() {
    let folder = scratch("faults-writes");
    let engine = Engine::new(options()).unwrap();
    let mut counts = BTreeMap::new();
    for writer in WRITERS {
        let mut seen = BTreeMap::new();
        for at in 0.. {
            // ENOSPC, EIO, EACCES, EDQUOT, EROFS
            let number = [28, 5, 13, 122, 30][usize::try_from(at % 5).unwrap()];
            let home = folder.join(format!("{writer:?}-{at}"));
            writer.prepare(&home);
            let (store, done, removing) = faulty(WriteFault::Errno(number), at);
            let result = writer.run(&home, Arc::new(store));
            let told = format!("{writer:?} with {number} at {at}");
            let found = writer.judge(&engine, &home, &told);
            let happened = done.load(Ordering::SeqCst) > at;
            match result {
                Ok(()) => assert!(found == "new" || writer == Writer::Prune, "{told}: {found}"),
                Err(error) => {
                    assert!(happened && error.kind() == ErrorKind::Io, "{told}: {error:?}");
                    let full = number == 28 && writer != Writer::Prune;
                    assert!(!full || error.to_string().contains("no space is left"), "{told}: {error}");
                }
            }
            // A failure is cleaned up after. What could not be removed is left over, and so is the old one where the disk does not
            // say that the new one is durable.
            let left = removing.load(Ordering::SeqCst) || found == "new" || writer == Writer::Prune;
            assert!(left || temporaries(&home) == 0, "{told}: something is left behind");
            *seen.entry(found).or_insert(0) += 1;
            fs::remove_dir_all(&home).unwrap();
            if !happened {
                break;
            }
        }
        counts.insert(format!("{writer:?}"), seen);
    }
    println!("refused at every operation: {counts:?}");
    fs::remove_dir_all(&folder).unwrap();
}

fn child(test: &str, root: &Path, arguments: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", test, "--nocapture", "--test-threads", "1"]);
    command.env("TOUCHDOWN_TEST_ROOT", root).env("TOUCHDOWN_TEST_ARGUMENTS", arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn child_root() -> PathBuf {
    std::env::var_os("TOUCHDOWN_TEST_ROOT").map(PathBuf::from).unwrap()
}

#[test]
#[ignore = "started by another test"]
fn child_that_is_killed_at_an_operation() {
    let arguments = std::env::var("TOUCHDOWN_TEST_ARGUMENTS").unwrap();
    let (writer, at) = arguments.split_once(' ').unwrap();
    let writer = WRITERS.into_iter().find(|one| format!("{one:?}") == writer).unwrap();
    let (store, ..) = faulty(WriteFault::Kill, at.parse().unwrap());
    writer.run(&child_root(), Arc::new(store)).unwrap();
    println!("done");
}

/// No destructor runs, no lock is released by hand: as with `kill -9`.
#[test]
fn a_process_that_dies_at_any_operation_leaves_the_old_or_the_new() {
    let folder = scratch("faults-kills");
    let engine = Engine::new(options()).unwrap();
    let mut counts = BTreeMap::new();
    for writer in WRITERS {
        let mut seen = BTreeMap::new();
        // What is done between two operations differs little: every second one will do.
        for at in (0..).step_by(2) {
            let home = folder.join(format!("{writer:?}-{at}"));
            writer.prepare(&home);
            let output =
                child("child_that_is_killed_at_an_operation", &home, &format!("{writer:?} {at}")).output().unwrap();
            let told = format!("{writer:?} killed at {at}");
            let found = writer.judge(&engine, &home, &told);
            *seen.entry(found).or_insert(0) += 1;
            let done = output.status.success() && String::from_utf8_lossy(&output.stdout).contains("done");
            assert!(done || output.status.code().is_none(), "{told}: {output:?}");
            // Who comes next is not kept from its work, and takes away what was left.
            if !done && matches!(writer, Writer::Overwrite | Writer::ConvertOver | Writer::Seal) {
                writer.run(&home, Arc::new(LocalStore)).unwrap();
                assert_eq!(writer.judge(&engine, &home, &told), "new");
            }
            fs::remove_dir_all(&home).unwrap();
            if done {
                break;
            }
        }
        counts.insert(format!("{writer:?}"), seen);
    }
    println!("killed at every second operation: {counts:?}");
    fs::remove_dir_all(&folder).unwrap();
}

// ---------------------------------------------------------------- at the same time, and for long

/// A load while the checkpoint is replaced, over and over, gives one of the two, or an error; never a mixture.
#[test]
fn a_load_while_another_overwrites_gives_the_old_the_new_or_an_error() {
    let folder = scratch("faults-overwriting");
    let path = folder.join("run");
    let save = SaveOptions { sync: false, overwrite: true, ..saving() };
    touchdown::save(&path, &tree(1), &save).unwrap();
    let (stop, engine) = (AtomicBool::new(false), Engine::new(options()).unwrap());
    let mut seen = BTreeMap::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 1;
            while !stop.load(Ordering::SeqCst) {
                value = 3 - value;
                touchdown::save(&path, &tree(value), &save).unwrap();
            }
        });
        // The writer ends whatever happens here.
        let _end = OnDrop(|| stop.store(true, Ordering::SeqCst));
        for _ in 0..150 {
            let how = match loaded(&engine, &path) {
                Ok(value) => ["old", "new"][usize::from(value - 1)],
                Err(error) => {
                    assert!(matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt), "{error:?}");
                    "error"
                }
            };
            *seen.entry(how).or_insert(0) += 1;
        }
    });
    println!("150 loads: {seen:?}");
    loaded(&engine, &path).unwrap();
    fs::remove_dir_all(&folder).unwrap();
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn threads_and_processes_load_one_checkpoint_together() {
    let folder = scratch("faults-together");
    let path = folder.join("run");
    touchdown::save(&path, &tree(7), &saving()).unwrap();
    let processes: Vec<_> = (0..6)
        .map(|_| {
            let mut command = support::program(["load", path.to_str().unwrap(), "--json", "--threads", "1"]);
            command.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let engine = Engine::new(options()).unwrap();
                (0..10).for_each(|_| assert_eq!(loaded(&engine, &path).unwrap(), 7));
            });
        }
    });
    for process in processes {
        let output = process.wait_with_output().unwrap();
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["leaves"], 7, "{report}");
    }
    fs::remove_dir_all(&folder).unwrap();
}

/// 64 descriptors and, where the system has a way to ask for it, one core.
#[test]
fn few_descriptors_and_one_core_are_enough() {
    let folder = scratch("faults-few");
    let many = folder.join("many");
    let leaves = (0..200).map(|number| (format!("w{number}"), NewArray::new(&[1100], DType::UInt8, vec![3; 1100])));
    let tree = leaves.fold(Tree::new(), |tree, (name, array)| tree.with(name.as_str(), array));
    touchdown::save(&many, &tree, &SaveOptions { ocdbt: false, sync: false, ..saving() }).unwrap();
    let database = folder.join("unmerged");
    copy_tree(&fixture("v0_unmerged").join("ckpt"), &database);
    let place = |name: &str| folder.join(name).display().to_string();
    let runs = [
        vec!["load".to_owned(), place("many")],
        vec!["verify".to_owned(), place("many"), "--deep".to_owned()],
        vec!["seal".to_owned(), place("many")],
        vec![
            "convert".to_owned(),
            place("many"),
            place("single.safetensors"),
            "--to".to_owned(),
            "safetensors".to_owned(),
        ],
        vec![
            "convert".to_owned(),
            place("many"),
            place("again"),
            "--to".to_owned(),
            "orbax".to_owned(),
            "--no-ocdbt".to_owned(),
        ],
        vec!["diff".to_owned(), place("many"), place("again")],
        vec!["repair".to_owned(), place("unmerged"), place("merged")],
    ];
    let limits = "ulimit -n 64; if taskset -c 0 true 2>/dev/null; then exec taskset -c 0 \"$0\" \"$@\"; else exec \"$0\" \"$@\"; fi";
    for arguments in runs {
        let mut command = Command::new("sh");
        command.args(["-c", limits, env!("CARGO_BIN_EXE_touchdown")]).args(&arguments);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    fs::remove_dir_all(&folder).unwrap();
}

/// Resident memory in KiB, open files and threads of this process.
fn held() -> (u64, usize, usize) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let count = |dir: &str| fs::read_dir(dir).unwrap().count();
    (line.trim().trim_end_matches(" kB").parse().unwrap(), count("/proc/self/fd"), count("/proc/self/task"))
}

#[test]
#[ignore = "started by another test"]
fn child_that_loads_and_saves_for_long() {
    let root = child_root();
    let (path, sealed) = (root.join("run"), root.join("sealed"));
    let save = SaveOptions { sync: false, overwrite: true, ..saving() };
    touchdown::save(&sealed, &tree(9), &save).unwrap();
    seal(&sealed, &OpenOptions::default(), &options()).unwrap();
    let engine = Engine::new(options()).unwrap();
    let mut seen = Vec::new();
    for round in 0..1000_u32 {
        assert_eq!(loaded(&engine, &sealed).unwrap(), 9);
        if round % 10 < 3 {
            engine.save(&path, &tree((round % 200) as u8), &save).unwrap().wait().unwrap();
        }
        if round % 200 == 199 {
            // Files of the last load are closed by whoever reads next.
            assert_eq!(u32::from(loaded(&engine, &path).unwrap()), (round / 10 * 10 + 2) % 200);
            seen.push(held());
        }
    }
    println!("every 200 loads and 60 saves, KiB, files, threads: {seen:?}");
    let (first, last) = (seen[0], seen[4]);
    assert!(last.0.saturating_sub(first.0) < 8 << 10, "memory grew: {seen:?}");
    assert!(last.1 <= first.1 + 2 && last.2 == first.2, "files or threads grew: {seen:?}");
    println!("flat");
}

#[test]
fn a_thousand_loads_and_three_hundred_saves_leave_memory_files_and_threads_as_they_were() {
    let folder = scratch("faults-long");
    let output = child("child_that_loads_and_saves_for_long", &folder, "").stderr(Stdio::inherit()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("flat"), "{said}");
    println!("{}", said.lines().find(|line| line.contains("every 200")).unwrap_or_default());
    fs::remove_dir_all(&folder).unwrap();
}
