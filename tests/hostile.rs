//! Checkpoints that lie: every file of a real one is changed in every way we can think of, and nothing may come of it
//! but the true values or an error that says what is wrong. No panic, no signal, no hang, no memory beyond measure;
//! where checksums exist, no other value than the true one.
//!
//! `TOUCHDOWN_HOSTILE_SEED` and `TOUCHDOWN_HOSTILE_COUNT` choose other and more changes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{Output, copy_tree, finish, fixture, number_from_environment, scratch};
use touchdown::ErrorKind;
use touchdown::tree::seal::seal;
use touchdown::tree::verify::verify;
use touchdown::tree::{Checkpoint, Database, Engine, EngineOptions, Leaf, OpenOptions, State};

/// Fixture, path below `ckpt`, item.
const SUBJECTS: [(&str, &str, Option<&str>); 24] = [
    ("v1_basic", "", None),
    ("v1_shard2d_2x4", "", None),
    ("v1_checkpointables", "", Some("conf")),
    ("v1_prng", "", None),
    ("v1_nested", "", None),
    ("v1_training_steps", "", None),
    ("v1_json_item", "", None),
    ("v0_manager", "", None),
    ("v0_composite", "", Some("nk/np_random_key")),
    ("v0_unmerged", "", None),
    ("v0_uncommitted", "", None),
    ("ocdbt_frames", "", None),
    ("ocdbt_transitive", "", None),
    ("zarr2_codecs", "", None),
    ("zarr3_codecs", "", None),
    ("msgpack_bare", "", None),
    ("msgpack_with_metadata", "", None),
    ("names_in_names", "", None),
    ("safetensors_index", "", None),
    ("safetensors_types", "", None),
    ("safetensors_sub_byte", "", None),
    ("safetensors_single", "model.safetensors", None),
    ("orbax_0.2.6__default", "", None),
    ("orbax_0.5.14__default", "", None),
];

/// Fixtures of Orbax and TensorStore that are changed once more after they were sealed: then no change may give other values.
const SEALED: [&str; 6] =
    ["quickstart", "v1_nested", "zarr2_codecs", "zarr3_codecs", "msgpack_bare", "orbax_0.2.6__default"];

/// A case that takes this long hangs.
const HANG: Duration = Duration::from_secs(30);

/// Loads larger than this are only planned here; the binary gets them under a limit.
const LOADED_MAX: u64 = 64 << 20;

/// One case in this many also goes through the binary.
const BINARY_EVERY: u64 = 12;

#[test]
fn nothing_comes_of_changed_bytes_but_truth_or_an_error() {
    let seed = number_from_environment("TOUCHDOWN_HOSTILE_SEED", 1);
    let count = number_from_environment("TOUCHDOWN_HOSTILE_COUNT", 1200);
    let folder = scratch("hostile");
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|panic| PANICS.lock().unwrap().push(panic.to_string())));
    let next = AtomicU64::new(0);
    let tally = Mutex::new(Tally::default());
    let workers = 2;
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (next, tally, folder) = (&next, &tally, &folder);
            scope.spawn(move || {
                let engine = Engine::new(options()).expect("an engine");
                loop {
                    let subject = next.fetch_add(1, Ordering::Relaxed);
                    let subject = usize::try_from(subject).unwrap();
                    let sealed = subject.checked_sub(SUBJECTS.len());
                    let (name, below, item) = match sealed {
                        None => SUBJECTS[subject],
                        Some(number) if number < SEALED.len() => (SEALED[number], "", None),
                        Some(_) => return,
                    };
                    let share = count / (SUBJECTS.len() + SEALED.len()) as u64;
                    let work = folder.join(format!("{worker}-{name}"));
                    let original = fixture(name).join("ckpt");
                    let original = match sealed {
                        None => original,
                        Some(_) => {
                            let copy = folder.join(format!("sealed-{name}"));
                            copy_tree(&original, &copy);
                            seal(&copy, &OpenOptions::default(), &options()).unwrap();
                            copy
                        }
                    };
                    let subject = (name, original, sealed.is_some());
                    let mut campaign = Campaign::new(&engine, subject, &work, below, item, seed);
                    (0..share).for_each(|number| campaign.case(number));
                    tally.lock().unwrap().add(campaign.tally);
                    fs::remove_dir_all(&work).unwrap();
                }
            });
        }
    });
    std::panic::set_hook(hook);
    let tally = tally.into_inner().unwrap();
    println!("seed {seed}: {tally}");
    let shown: Vec<&str> = tally.failures.iter().take(20).map(String::as_str).collect();
    assert!(tally.failures.is_empty(), "{} failures:\n{}", tally.failures.len(), shown.join("\n"));
    assert!(tally.refused > 0 && tally.same > 0, "hardly anything was tried");
    assert!(count < 1000 || tally.protected > 100, "hardly any change met a checksum");
    fs::remove_dir_all(&folder).unwrap();
}

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn options() -> EngineOptions {
    EngineOptions { threads: 1, reader_threads: 1, staging_bytes: 64 << 20, ..EngineOptions::default() }
}

#[derive(Default)]
struct Tally {
    cases: BTreeMap<&'static str, u64>,
    same: u64,
    other: u64,
    refused: u64,
    protected: u64,
    planned_only: u64,
    runs: u64,
    failures: Vec<String>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        other.cases.into_iter().for_each(|(name, count)| *self.cases.entry(name).or_default() += count);
        self.same += other.same;
        self.other += other.other;
        self.refused += other.refused;
        self.protected += other.protected;
        self.planned_only += other.planned_only;
        self.runs += other.runs;
        self.failures.extend(other.failures);
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { same, other, refused, protected, planned_only, runs, .. } = self;
        let total: u64 = self.cases.values().sum();
        write!(
            f,
            "{total} changed checkpoints: {same} loaded as before, {other} otherwise (their bytes have no checksum), "
        )?;
        write!(f, "{refused} refused, {planned_only} only planned; {protected} changes under a checksum; ")?;
        write!(f, "{runs} runs of the binary; {:?}", self.cases)
    }
}

/// One fixture and what is done to a copy of it.
struct Campaign<'a> {
    engine: &'a Engine,
    name: &'static str,
    original: PathBuf,
    /// Whether every value has a checksum.
    sealed: bool,
    work: PathBuf,
    below: &'static str,
    options: OpenOptions,
    item: Option<&'static str>,
    files: Vec<PathBuf>,
    truth: BTreeMap<String, Vec<u8>>,
    step: Option<u64>,
    seed: u64,
    tally: Tally,
}

/// What a checkpoint says, and how it ended.
enum Outcome {
    /// Every leaf; and the step, for another one is chosen where the latest is not whole.
    Loaded(BTreeMap<String, Vec<u8>>, Option<u64>),
    Planned,
    Refused(touchdown::Error),
}

impl<'a> Campaign<'a> {
    fn new(
        engine: &'a Engine,
        (name, original, sealed): (&'static str, PathBuf, bool),
        work: &Path,
        below: &'static str,
        item: Option<&'static str>,
        seed: u64,
    ) -> Self {
        copy_tree(&original, work);
        let mut files = Vec::new();
        collect(&original, Path::new(""), &mut files);
        files.sort();
        let options = OpenOptions { item: item.map(str::to_owned), ..OpenOptions::default() };
        let mut campaign = Self {
            engine,
            name,
            original,
            sealed,
            work: work.to_path_buf(),
            below,
            options,
            item,
            files,
            truth: BTreeMap::new(),
            step: None,
            seed: seed ^ name.bytes().fold(0, |hash: u64, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte))),
            tally: Tally::default(),
        };
        match campaign.load() {
            Outcome::Loaded(values, step) => (campaign.truth, campaign.step) = (values, step),
            Outcome::Planned => panic!("{name}: too large"),
            Outcome::Refused(error) => panic!("{name}: {error:?}"),
        }
        campaign
    }

    fn path(&self) -> PathBuf {
        self.work.join(self.below)
    }

    /// Everything that the library does with a checkpoint.
    fn load(&self) -> Outcome {
        let load = || -> touchdown::Result<Option<(State, Option<u64>)>> {
            let checkpoint = Checkpoint::open(self.path(), &self.options)?;
            let target = checkpoint.target();
            let plan = checkpoint.plan_within(&target, self.engine.limits())?;
            if plan.result_bytes() > LOADED_MAX {
                return Ok(None);
            }
            let step = checkpoint.description().step.as_ref().map(|step| step.number);
            Ok(Some((self.engine.load(&checkpoint, &target)?.wait()?, step)))
        };
        match load() {
            Ok(Some((state, step))) => Outcome::Loaded(values(&state), step),
            Ok(None) => Outcome::Planned,
            Err(error) => Outcome::Refused(error),
        }
    }

    /// Changes the copy, looks at it in every way, and restores it.
    fn case(&mut self, number: u64) {
        let mut random = Random(self.seed.wrapping_mul(0x9e37_79b9).wrapping_add(number));
        (0..3).for_each(|_| _ = random.next());
        let file = self.files[random.below(self.files.len())].clone();
        let mut change = change(&mut random, &self.original, &self.work, &file, &self.files);
        // Only a checksum that was made right again is believed.
        change.protected |= self.sealed && change.kind != "sealed";
        *self.tally.cases.entry(change.kind).or_default() += 1;
        let told = format!("{} case {number}: {} in {}: {}", self.name, change.kind, file.display(), change.what);
        let start = Instant::now();
        let watch = Watch::start(told.clone());

        let outcome = catch_unwind(AssertUnwindSafe(|| self.load()));
        let verified = catch_unwind(AssertUnwindSafe(|| verify(&self.path(), &self.options, true, &options())));
        let _ = catch_unwind(AssertUnwindSafe(|| {
            if let Ok(database) = Database::open(&self.path(), &self.options) {
                database.index().entries().iter().for_each(|(_, value)| drop(database.read(value)));
            }
        }));
        for panic in std::mem::take(&mut *PANICS.lock().unwrap()) {
            self.tally.failures.push(format!("{told}: {panic}"));
        }
        self.judge(&told, &change, outcome.ok(), verified.ok());
        if number.is_multiple_of(BINARY_EVERY) || change.absurd {
            self.run_binary(&told, &mut random);
        }
        if start.elapsed() > HANG / 2 {
            self.tally.failures.push(format!("{told}: took {:?}", start.elapsed()));
        }
        drop(watch);
        self.restore(&file, change.structural);
    }

    fn judge(
        &mut self,
        told: &str,
        change: &Change,
        outcome: Option<Outcome>,
        verified: Option<touchdown::Result<touchdown::tree::verify::Verified>>,
    ) {
        if let Some(Err(error)) = &verified {
            self.judge_error(told, "verify", error);
        }
        match outcome {
            Some(Outcome::Loaded(values, step)) => {
                self.tally.protected += u64::from(change.protected);
                if values == self.truth {
                    self.tally.same += 1;
                } else {
                    self.tally.other += 1;
                    if change.protected && step == self.step {
                        let leaf = self.truth.iter().find(|(path, value)| values.get(*path) != Some(value));
                        let leaf = leaf.map_or("a leaf too many", |(path, _)| path);
                        self.tally.failures.push(format!("{told}: silently another value: {leaf}"));
                    }
                }
            }
            Some(Outcome::Planned) => self.tally.planned_only += 1,
            Some(Outcome::Refused(error)) => {
                self.tally.protected += u64::from(change.protected);
                self.tally.refused += 1;
                self.judge_error(told, "load", &error);
                // What a load refuses as damage, verify names.
                let damage = matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound | ErrorKind::Unsupported);
                if damage && verified.is_some_and(|found| found.is_ok_and(|found| found.problems.is_empty())) {
                    self.tally.failures.push(format!("{told}: verify finds nothing where load says: {error}"));
                }
            }
            None => {}
        }
    }

    /// A changed file is never the environment's fault, nor ours.
    fn judge_error(&mut self, told: &str, what: &str, error: &touchdown::Error) {
        let kinds = [
            ErrorKind::Corrupt,
            ErrorKind::NotFound,
            ErrorKind::Unsupported,
            ErrorKind::Invalid,
            ErrorKind::Budget,
            ErrorKind::OutOfMemory,
        ];
        if !kinds.contains(&error.kind()) {
            self.tally.failures.push(format!("{told}: {what}: {error:?}"));
        }
    }

    fn run_binary(&mut self, told: &str, random: &mut Random) {
        let path = self.path().display().to_string();
        let original = self.original.join(self.below).display().to_string();
        let args: Vec<&str> = match random.below(8) {
            0 => vec!["ls", &path, "--json"],
            1 => vec!["plan", &path, "--json", "--devices", "cpu:8"],
            2 => vec!["verify", &path, "--deep", "--json"],
            3 => vec!["kv", &path],
            4 => vec!["diff", &path, &original],
            5 => vec!["ls", &path],
            _ => vec!["load", &path, "--json", "--devices", "cpu:2"],
        };
        let args: Vec<&str> = args.into_iter().chain(self.item.iter().flat_map(|item| ["--item", *item])).collect();
        let run = limited(&args);
        self.tally.runs += 1;
        if let Err(what) = acceptable(args[0], &run) {
            self.tally.failures.push(format!("{told}: touchdown {}: {what}", args.join(" ")));
        }
    }

    fn restore(&self, file: &Path, structural: bool) {
        let path = self.work.join(file);
        let parent = path.parent().unwrap();
        if !parent.exists() {
            let below = file.parent().unwrap();
            return copy_tree(&self.original.join(below), parent);
        }
        match path.symlink_metadata() {
            Ok(found) if structural && found.is_dir() => fs::remove_dir_all(&path).unwrap(),
            Ok(_) if structural => fs::remove_file(&path).unwrap(),
            _ => {}
        }
        fs::copy(self.original.join(file), path).unwrap();
    }
}

/// Ends the process with a word about the case if it takes too long: a hang in this process cannot be ended otherwise.
struct Watch {
    _open: std::sync::mpsc::Sender<()>,
}

impl Watch {
    fn start(told: String) -> Self {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            if receiver.recv_timeout(HANG) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("hangs: {told}");
                std::process::abort();
            }
        });
        Self { _open: sender }
    }
}

/// Every leaf by its path, as bytes that tell kind, type, shape and value.
fn values(state: &State) -> BTreeMap<String, Vec<u8>> {
    let value = |leaf: &Leaf| match leaf {
        Leaf::Array(array) => {
            let head = format!("{} {:?} {:?} ", array.dtype, array.shape, array.key_impl).into_bytes();
            array.shards().iter().fold(head, |mut all, shard| {
                all.extend_from_slice(shard.bytes().unwrap());
                all
            })
        }
        Leaf::Value { value, dtype } => format!("{} {dtype:?}", value.json()).into_bytes(),
        other => format!("{other:?}").into_bytes(),
    };
    state.leaves().map(|(path, leaf)| (path.to_string(), value(leaf))).collect()
}

fn limited(args: &[&str]) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 2097152; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_touchdown")]).args(args);
    command.env("RUST_BACKTRACE", "0");
    finish(command, HANG)
}

fn acceptable(verb: &str, run: &Output) -> Result<(), String> {
    let told = |what: &str| Err(format!("{what}: exit {:?}: {}", run.code, run.stderr.trim_end()));
    match run.code {
        None => told("a signal or a hang"),
        Some(0) => Ok(()),
        Some(1) if matches!(verb, "verify" | "diff") => Ok(()),
        Some(2..=4) if !run.stderr.lines().any(|line| line.starts_with("error: ")) => told("no error: line"),
        Some(2..=4) if !run.stdout.is_empty() => told("an error, and data on stdout"),
        Some(2..=4) => Ok(()),
        Some(_) => told("another exit code"),
    }
}

fn collect(root: &Path, below: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(root.join(below)).unwrap() {
        let entry = entry.unwrap();
        let path = below.join(entry.file_name());
        if entry.path().is_dir() {
            collect(root, &path, files);
        } else {
            files.push(path);
        }
    }
}

// ---------------------------------------------------------------- changes

/// What was done to one file.
struct Change {
    kind: &'static str,
    what: String,
    /// Every changed byte lies under a checksum, so that no other value may come of it.
    protected: bool,
    /// More than the file's content changed.
    structural: bool,
    /// Large numbers: worth a run under a limit of memory.
    absurd: bool,
}

fn change(random: &mut Random, original: &Path, work: &Path, file: &Path, files: &[PathBuf]) -> Change {
    let target = work.join(file);
    let bytes = fs::read(original.join(file)).unwrap();
    let done = |kind, what: String, structural| Change { kind, what, protected: false, structural, absurd: false };
    if random.below(8) == 0 {
        return structural(random, work, file, done);
    }
    let is_json = matches!(bytes.iter().find(|byte| !byte.is_ascii_whitespace()), Some(b'{' | b'['));
    // The header of safetensors is JSON, too.
    let header = safetensors_header(&bytes).filter(|_| file.extension().is_some_and(|ext| ext == "safetensors"));
    if (is_json || header.is_some()) && random.below(4) > 0 {
        let (kind, changed) = match header {
            Some(header) => {
                let (kind, text) = change_json(random, &bytes[header.clone()]);
                let len = if random.below(8) > 0 { text.len() as u64 } else { random.extreme() };
                (kind, [&len.to_le_bytes(), text.as_slice(), &bytes[header.end..]].concat())
            }
            None => change_json(random, &bytes),
        };
        fs::write(&target, &changed).unwrap();
        let mut done = done(kind, shown(&changed), false);
        done.absurd = kind == "number" && random.below(3) == 0;
        return done;
    }
    let envelopes = envelopes(&bytes);
    if !envelopes.is_empty() && random.below(3) == 0 {
        // Deeper than the checksum: it is made right again, and what it covers is wrong.
        let mut changed = bytes;
        let envelope = envelopes[random.below(envelopes.len())].clone();
        let body = envelope.start + 12..envelope.end - 4;
        let what = (0..=random.below(3)).map(|_| overwrite(random, &mut changed, body.clone())).collect::<Vec<_>>();
        let crc = crc32c::crc32c(&changed[envelope.start..body.end]).to_le_bytes();
        changed[body.end..envelope.end].copy_from_slice(&crc);
        fs::write(&target, &changed).unwrap();
        return done("sealed", format!("{what:?}"), false);
    }
    let mut changed = bytes.clone();
    let len = bytes.len();
    let all = 0..len;
    let (kind, what) = match random.below(7) {
        _ if len == 0 => {
            changed = vec![0x5a; random.below(200)];
            ("append", String::new())
        }
        0 | 1 => {
            let mut flip = || {
                let at = random.below(len);
                changed[at] ^= 1 << random.below(8);
                at
            };
            let what = format!("{:?}", [flip(), flip()]);
            ("flip", what)
        }
        2 => {
            changed.truncate(random.below(len));
            ("truncate", format!("to {} of {len}", changed.len()))
        }
        3 => {
            let part = random.range(len);
            let at = random.below(len);
            changed.splice(at..at, bytes[part.clone()].iter().copied());
            ("splice", format!("{part:?} into {at}"))
        }
        4 => {
            let donor = fs::read(original.join(&files[random.below(files.len())])).unwrap();
            let part = if donor.is_empty() { 0..0 } else { random.range(donor.len()) };
            let at = random.below(len);
            let end = (at + part.len()).min(len);
            changed[at..end].copy_from_slice(&donor[part.start..part.start + end - at]);
            ("swap", format!("{at}..{end}"))
        }
        5 => {
            changed.extend((0..=random.below(64)).map(|_| random.next() as u8));
            ("append", String::new())
        }
        _ => ("extreme", overwrite(random, &mut changed, all)),
    };
    fs::write(&target, &changed).unwrap();
    let mut done = done(kind, what, false);
    let covered: usize = envelopes.iter().map(ExactSizeIterator::len).sum();
    let differs = |at: usize| changed[at] != bytes[at];
    done.protected = len > 0
        && (covered == len
            || checked_chunk(file)
            || (changed.len() == len && (0..len).all(|at| !differs(at) || envelopes.iter().any(|e| e.contains(&at)))));
    done
}

/// Chunks whose codecs have a checksum, in the fixtures of codecs.
fn checked_chunk(file: &Path) -> bool {
    let text = file.to_str().unwrap();
    let array = text.split('/').next().unwrap_or_default();
    text.contains("/c/") && ["zstd_crc32c", "zstd_checksum", "gzip"].contains(&array)
}

fn structural(
    random: &mut Random,
    work: &Path,
    file: &Path,
    done: impl Fn(&'static str, String, bool) -> Change,
) -> Change {
    let target = work.join(file);
    let parent = target.parent().unwrap().to_path_buf();
    let link = |to: &str| {
        fs::remove_file(&target).unwrap();
        std::os::unix::fs::symlink(to, &target).unwrap();
        format!("to {to}")
    };
    match random.below(7) {
        0 => {
            fs::remove_file(&target).unwrap();
            done("remove", String::new(), true)
        }
        1 if parent != work => {
            fs::remove_dir_all(&parent).unwrap();
            done("remove directory", parent.display().to_string(), true)
        }
        2 => {
            fs::remove_file(&target).unwrap();
            fs::create_dir(&target).unwrap();
            done("directory", String::new(), true)
        }
        3 => {
            fs::remove_file(&target).unwrap();
            assert!(Command::new("mkfifo").arg(&target).status().unwrap().success());
            done("fifo", String::new(), true)
        }
        4 => {
            let to =
                ["/dev/zero", "/etc/passwd", "../../../../../../../../etc/passwd", "/proc/self/mem"][random.below(4)];
            done("link out", link(to), true)
        }
        5 => done("link loop", link(target.file_name().unwrap().to_str().unwrap()), true),
        _ => {
            let part = fs::read(&target).unwrap();
            fs::write(&target, &part[..0]).unwrap();
            done("empty", String::new(), true)
        }
    }
}

/// Writes extreme bytes somewhere within a range.
fn overwrite(random: &mut Random, bytes: &mut [u8], within: Range<usize>) -> String {
    if within.is_empty() {
        return String::new();
    }
    let width = [1, 2, 4, 8, 10][random.below(5)].min(within.len());
    let at = within.start + random.below(within.len() - width + 1);
    let pattern: Vec<u8> = match random.below(6) {
        0 => vec![0; width],
        1 => vec![0xff; width],
        // A varint that does not end, one that is as large as can be, a number of random size.
        2 => vec![0x80; width],
        3 => [vec![0xff; width - 1], vec![0x7f]].concat(),
        4 => random.extreme().to_le_bytes().iter().copied().chain([0; 2]).take(width).collect(),
        _ => random.next().to_le_bytes().iter().copied().chain([1; 2]).take(width).collect(),
    };
    bytes[at..at + width].copy_from_slice(&pattern);
    format!("{pattern:02x?} at {at}")
}

/// Another number, another word, less or more structure.
fn change_json(random: &mut Random, text: &[u8]) -> (&'static str, Vec<u8>) {
    let numbers = runs(text, |byte| byte.is_ascii_digit() || matches!(byte, b'-' | b'.'));
    let words = runs(text, |byte| byte.is_ascii_alphabetic() || byte == b'_');
    let replace = |range: Range<usize>, with: &[u8]| [&text[..range.start], with, &text[range.end..]].concat();
    match random.below(10) {
        0..=4 if !numbers.is_empty() => {
            let with = [
                "0",
                "-1",
                "1",
                "3",
                "4294967296",
                "9223372036854775807",
                "9223372036854775808",
                "18446744073709551615",
                "18446744073709551616",
                "1000000000000000",
                "1e15",
                "1e308",
                "1e400",
                "0.5",
                "-0",
                "null",
                "\"7\"",
                "[]",
                "1000000007",
                "65536",
                "true",
            ];
            let with = with[random.below(with.len())];
            ("number", replace(numbers[random.below(numbers.len())].clone(), with.as_bytes()))
        }
        5 if !words.is_empty() => {
            let other = words[random.below(words.len())].clone();
            ("word", replace(words[random.below(words.len())].clone(), &text[other]))
        }
        6 if !words.is_empty() => {
            let with = ["", "..", "/", "a/../..", "\\u0000", "NaN", "float99", "\\ud800"][random.below(8)];
            ("word", replace(words[random.below(words.len())].clone(), with.as_bytes()))
        }
        7 => {
            let part = random.range(text.len());
            ("cut", replace(part, b""))
        }
        8 => {
            let at = random.below(text.len());
            let deep = [b"[".repeat(100_000), b"{\"a\":".repeat(50_000), b"[{\"a\":[".repeat(100)];
            ("deep", replace(at..at, &deep[random.below(3)]))
        }
        _ => {
            let part = random.range(text.len());
            let at = random.below(text.len());
            ("copy", replace(at..at, &text[part]))
        }
    }
}

/// Maximal runs of bytes of a class.
fn runs(text: &[u8], class: impl Fn(u8) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, byte) in text.iter().enumerate() {
        match runs.last_mut() {
            _ if !class(*byte) => {}
            Some(run) if run.end == at => run.end += 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

/// Parts of an OCDBT file that carry a checksum: magic, length of all, body, crc32c of all before.
fn envelopes(bytes: &[u8]) -> Vec<Range<usize>> {
    let at = |start: usize| {
        let head = bytes.get(start..start + 12)?;
        let len = usize::try_from(u64::from_le_bytes(head[4..].try_into().unwrap())).ok()?;
        let whole = bytes.get(start..start.checked_add(len)?).filter(|whole| whole.len() >= 16)?;
        let (covered, crc) = whole.split_at(whole.len() - 4);
        (crc32c::crc32c(covered).to_le_bytes() == crc).then(|| start..start + len)
    };
    let magic = |start: &usize| bytes[*start..].starts_with(&[0x0c, 0xdb]);
    (0..bytes.len()).filter(magic).filter_map(at).collect()
}

fn safetensors_header(bytes: &[u8]) -> Option<Range<usize>> {
    let len = usize::try_from(u64::from_le_bytes(bytes.get(..8)?.try_into().unwrap())).ok()?;
    bytes.get(8..len.checked_add(8)?).map(|_| 8..8 + len)
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(120).collect()
}

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }

    /// A part of `0..len` that is not empty and usually short.
    fn range(&mut self, len: usize) -> Range<usize> {
        let start = self.below(len);
        let longest = if self.below(2) == 0 { 16 } else { len };
        start..start + 1 + self.below((len - start).min(longest))
    }

    fn extreme(&mut self) -> u64 {
        [0, 1, 0x7f, 0xffff, 1 << 31, u64::from(u32::MAX), 1 << 40, 1 << 62, i64::MAX as u64, u64::MAX][self.below(10)]
    }
}

// ---------------------------------------------------------------- absurd shapes

/// Shapes and chunks of absurd extent are refused, or planned without being allocated.
#[test]
fn absurd_shapes_cost_nothing() {
    let folder = scratch("absurd");
    let mut runs = 0;
    for (name, array, meta) in [("zarr3_codecs", "gzip", "zarr.json"), ("zarr2_codecs", "none", ".zarray")] {
        let copy = folder.join(name);
        copy_tree(&fixture(name).join("ckpt"), &copy);
        let file = copy.join(array).join(meta);
        let stored: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let rank = stored["shape"].as_array().unwrap().len();
        for shape_extent in [1_000_000_000_000_000_u64, 1 << 62, u64::MAX] {
            for chunk_extent in [None, Some(1), Some(1_u64 << 50), Some(0)] {
                let mut changed = stored.clone();
                changed["shape"][rank - 1] = shape_extent.into();
                if let Some(extent) = chunk_extent {
                    let chunks = match meta {
                        "zarr.json" => &mut changed["chunk_grid"]["configuration"]["chunk_shape"],
                        _ => &mut changed["chunks"],
                    };
                    chunks[rank - 1] = extent.into();
                }
                fs::write(&file, changed.to_string()).unwrap();
                let path = copy.display().to_string();
                for args in [
                    &["plan", &path, "--only", array, "--devices", "cpu:4", "--spec", "**=device"][..],
                    &["load", &path, "--only", array],
                    &["load", &path, "--only", array, "--take", &format!("{array}={}:0..2", rank - 1)],
                    &["verify", &path],
                ] {
                    let run = limited(args);
                    runs += 1;
                    if let Err(what) = acceptable(args[0], &run) {
                        panic!("shape {shape_extent}, chunk {chunk_extent:?}: {args:?}: {what}");
                    }
                }
            }
        }
    }
    println!("{runs} runs of the binary with absurd shapes");
    fs::remove_dir_all(&folder).unwrap();
}
