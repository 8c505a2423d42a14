//! How an engine reads: cold files past the page cache, with the same result; reads that never come back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests panic to fail and print their counts"
)]

mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::files_below;
use touchdown::io::{Completion, Io, PreadReader, ReadAt, Reader, ReaderWaker, Ticket};
use touchdown::tree::Stall;
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::zarr::Compression;
use touchdown::{Checkpoint, Device, Engine, EngineOptions, ErrorKind, Mesh, Otherwise, spec};

fn noise(len: usize) -> Vec<u8> {
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Two arrays of some megabytes, with a small one between, so that little begins at a block.
fn saved(home: &Path, compression: Compression) -> Checkpoint {
    let array = |rows: u64, columns: u64| {
        NewArray::new(&[rows, columns], touchdown::DType::UInt8, noise((rows * columns) as usize))
    };
    let tree = Tree::new().with("a", array(1999, 2003)).with("b", array(7, 11)).with("c", array(3001, 1009));
    let leaf = LeafOptions { compression: Some(compression), ..LeafOptions::default() };
    touchdown::save(home.join("c"), &tree, &SaveOptions { leaf, ..SaveOptions::default() }).unwrap();
    touchdown::open(home.join("c")).unwrap()
}

fn drop_from_cache(dir: &Path) {
    for path in files_below(dir) {
        let file = std::fs::File::open(path).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

#[cfg(feature = "uring")]
fn cached(dir: &Path) -> u64 {
    let of = |path: PathBuf| {
        let file = std::fs::File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        touchdown::io::cached_bytes(&file, size).unwrap()
    };
    files_below(dir).into_iter().map(of).sum()
}

/// Whole arrays and columns over four devices, from a cold cache, by every reader.
#[cfg(feature = "uring")]
#[test]
fn cold_files_are_read_past_the_cache_and_land_the_same() {
    let home = tempfile::tempdir().unwrap();
    let mesh = Mesh::new([("x", 4)], Device::cpus(4)).unwrap();
    let mut read_directly = 0;
    for (number, compression) in [Compression::None, Compression::Gpu].into_iter().enumerate() {
        let home = home.path().join(number.to_string());
        let checkpoint = saved(&home, compression);
        let columns = |checkpoint: &Checkpoint| {
            checkpoint.target().shard(&mesh, [("*", spec![_, "x"])]).otherwise(Otherwise::Replicate)
        };
        let mut expected: Option<Vec<Vec<u8>>> = None;
        for io in [Io::Pread, Io::Auto, Io::Uring] {
            let Ok(engine) = Engine::new(EngineOptions { io, threads: 2, ..EngineOptions::default() }) else {
                let _ = writeln!(std::io::stderr(), "skipped: {io:?} is not there");
                continue;
            };
            for target in [checkpoint.target(), columns(&checkpoint)] {
                drop_from_cache(&home);
                let before = cached(&home);
                let state = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
                let grown = cached(&home).saturating_sub(before);
                read_directly += usize::from(io != Io::Pread && grown < 1 << 20);
                let mut bytes: Vec<Vec<u8>> = Vec::new();
                for name in ["a", "b", "c"] {
                    bytes.extend(
                        state.array(name).unwrap().shards().iter().map(|shard| shard.bytes().unwrap().to_vec()),
                    );
                }
                let whole: Vec<Vec<u8>> = match bytes.len() {
                    3 => bytes,
                    _ => continue,
                };
                assert_eq!(expected.get_or_insert_with(|| whole.clone()), &whole, "{io:?}");
            }
        }
        let mut all = Vec::new();
        for io in [Io::Pread, Io::Auto] {
            let engine = Engine::new(EngineOptions { io, threads: 2, ..EngineOptions::default() }).unwrap();
            drop_from_cache(&home);
            let state = engine.load(&checkpoint, &columns(&checkpoint)).unwrap().wait().unwrap();
            let shards = ["a", "b", "c"].map(|name| state.array(name).unwrap().shards().to_vec());
            all.push(shards.concat().iter().map(|shard| shard.bytes().unwrap().to_vec()).collect::<Vec<_>>());
        }
        assert_eq!(all[0], all[1]);
        assert_eq!(all[0].len(), 12);
    }
    if read_directly == 0 {
        let why = "the machine's temporary files have no direct reads, or it has no io_uring";
        let _ = writeln!(std::io::stderr(), "skipped: nothing was read past the cache: {why}");
    }
    println!("{read_directly} loads past the cache");
}

/// Counts the reads in flight, and gives none back before all that the engine wants to have in flight are: a slow disk.
struct Slow {
    inner: PreadReader,
    /// In flight whenever the engine waits.
    seen: Arc<Mutex<Vec<usize>>>,
    in_flight: usize,
}

impl Reader for Slow {
    fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        self.in_flight += 1;
        self.inner.submit(ticket, read);
    }
    fn next(&mut self, deadline: Option<Instant>) -> Option<Completion> {
        // So long that the workers are done with all that came before.
        std::thread::sleep(Duration::from_millis(2));
        self.seen.lock().unwrap().push(self.in_flight);
        let completion = self.inner.next(deadline);
        self.in_flight -= usize::from(completion.is_some());
        completion
    }
    fn depth(&self) -> usize {
        12
    }
    fn waker(&self) -> Arc<dyn ReaderWaker> {
        self.inner.waker()
    }
    fn name(&self) -> &'static str {
        "slow"
    }
}

#[test]
fn reads_in_flight_grow_while_workers_starve() {
    let home = tempfile::tempdir().unwrap();
    let mut tree = Tree::new();
    for index in 0..40 {
        tree.push(format!("a{index}").as_str(), NewArray::new(&[700_000], touchdown::DType::UInt8, noise(700_000)));
    }
    let leaf = LeafOptions { compression: Some(Compression::None), ..LeafOptions::default() };
    touchdown::save(home.path().join("c"), &tree, &SaveOptions { leaf, ..SaveOptions::default() }).unwrap();
    let checkpoint = touchdown::open(home.path().join("c")).unwrap();
    let seen: Arc<Mutex<Vec<usize>>> = Arc::default();
    let reader = Slow { inner: PreadReader::new(2).unwrap(), seen: Arc::clone(&seen), in_flight: 0 };
    let options = EngineOptions { threads: 2, merge_gap_bytes: 0, ..EngineOptions::default() };
    let engine = Engine::with_reader(options, Box::new(reader)).unwrap();
    engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap();
    let seen = seen.lock().unwrap();
    let most = seen.iter().max();
    assert!(seen[0] == 4 && most > Some(&6) && most <= Some(&12), "{seen:?}");
}

/// Swallows reads of one range, as a dead disk would.
struct Losing {
    inner: PreadReader,
    from: u64,
    lost: Vec<ReadAt>,
}

impl Reader for Losing {
    fn submit(&mut self, ticket: Ticket, read: ReadAt) {
        if read.offset >= self.from && self.lost.is_empty() {
            return self.lost.push(read);
        }
        self.inner.submit(ticket, read);
    }
    fn next(&mut self, deadline: Option<Instant>) -> Option<Completion> {
        self.inner.next(deadline)
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn waker(&self) -> Arc<dyn ReaderWaker> {
        self.inner.waker()
    }
    fn name(&self) -> &'static str {
        "losing"
    }
}

#[test]
fn a_read_that_never_comes_back_ends_the_load_that_is_told_so() {
    let home = tempfile::tempdir().unwrap();
    let checkpoint = saved(home.path(), Compression::None);
    let stall = Stall { after: Some(Duration::from_millis(100)), aborts: true };
    let reader = Losing { inner: PreadReader::new(2).unwrap(), from: 1 << 20, lost: Vec::new() };
    let options = EngineOptions { threads: 2, stall, ..EngineOptions::default() };
    let engine = Engine::with_reader(options, Box::new(reader)).unwrap();
    assert_eq!(engine.reader(), "losing");
    let start = Instant::now();
    let error = engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap_err();
    assert!(start.elapsed() >= Duration::from_millis(100));
    assert_eq!(error.kind(), ErrorKind::Io);
    let text = format!("{error}");
    assert!(text.contains("does not come back") && text.contains("/d/") && text.contains("100ms"), "{text}");
    // The engine goes on, and knows nothing of the old load's tickets.
    let state = engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap();
    assert_eq!(state.array("a").unwrap().shards()[0].bytes().unwrap(), noise(1999 * 2003));
}

/// Opened through its root, a step is what it was then, whatever has its name when it is read.
#[test]
fn a_step_is_read_as_it_was_when_it_was_opened() {
    let home = tempfile::tempdir().unwrap();
    let step = |name: &str, fill: u8| {
        let array = |_| NewArray::new(&[3000], touchdown::DType::UInt8, vec![fill; 3000]);
        let tree = ["a", "b", "c"].into_iter().fold(Tree::new(), |tree, name| tree.with(name, array(name)));
        // With names of files that do not depend on chance.
        touchdown::save(home.path().join(name), &tree, &SaveOptions { ocdbt: false, ..SaveOptions::default() })
            .unwrap();
    };
    step("4", 1);
    step("5", 2);
    step("new", 3);
    let bytes = |checkpoint: &Checkpoint| {
        let state = touchdown::load(checkpoint, &checkpoint.target()).unwrap();
        ["a", "b", "c"].map(|name| state.array(name).unwrap().shards()[0].bytes().unwrap()[7])
    };
    let opened = touchdown::open(home.path()).unwrap();
    assert!(!opened.is_replaced());
    std::fs::rename(home.path().join("5"), home.path().join("old")).unwrap();
    assert!(opened.is_replaced());
    std::fs::rename(home.path().join("new"), home.path().join("5")).unwrap();
    assert_eq!((bytes(&opened), opened.is_replaced()), ([2; 3], true));
    let opened = touchdown::open(home.path()).unwrap();
    assert_eq!((bytes(&opened), opened.is_replaced()), ([3; 3], false));
}
