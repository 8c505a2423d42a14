//! Converting: a checkpoint becomes another one, of another format, type, division or compression, without all of it ever being
//! in memory.
//!
//! ```text
//!   Target ──► tasks ──► waves (pieces.rs) ──► Engine::load ──► Sink::write ──► Sink::note ──► journal line
//!   rules      arrays    what fits half the    the other half   orbax.rs        durable        what --resume
//!                        memory                is staging       tensors.rs                     begins after
//! ```
//!
//! Loading and writing alternate. The destination is planned completely before it is begun, appears with one rename, and what an
//! interrupted conversion did can be gone on with.

mod journal;
mod options;
mod orbax;
mod pieces;
mod scratch;
mod sink;
mod tensors;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use options::{ConvertOptions, ConvertProgress, ConvertReport, ConvertTo};

use self::journal::{Fingerprint, Found, Journal};
use self::orbax::OrbaxSink;
use self::pieces::{Cursor, Elements, Piece, Task, next_wave, wave_target};
use self::scratch::Scratch;
use self::sink::{Filled, Io, Sink};
use self::tensors::TensorSink;
use super::engine::{Engine, EngineOptions};
use super::save::check_destination;
use super::target::Target;
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::Becomes;
use crate::io::{Budget, StagedDir};
use crate::layout::Format;
use crate::layout::safetensors::Source;
use crate::limits::RESUME_FILES_MAX;
use crate::plan::Values;
use crate::relpath::RelPath;

/// Converts what a target wants of a checkpoint into a new checkpoint: selection, renames, casts and views as a load would have
/// them, and for Orbax its shardings as the division into chunks, so that loads on them read each byte once. Arrays without a
/// sharding keep the one they were saved with.
///
/// Every unit of a source array is decoded once, whatever the memory; every chunk of the destination is written once.
///
/// # Errors
/// A target that does not fit, a destination that exists, and what the destination's format cannot hold (all of it in one error),
/// before anything is written. Later whatever fails; the destination is then as it was before.
pub fn convert(target: &Target, to: impl AsRef<Path>, options: &ConvertOptions) -> Result<ConvertReport> {
    let start = Instant::now();
    let to = to.as_ref();
    let arrays = target.wants()?.len();
    let mut tasks = Task::all(target)?;
    if target.leaves.is_empty() {
        return Err(Error::invalid("there is nothing to convert").hint("`touchdown ls` shows what there is"));
    }
    refuse_source(target, to)?;
    let (file, budget) = (file_name(to)?, options.engine.staging_bytes);
    let (becomes, mut sink): (_, Box<dyn Sink>) = match options.to {
        ConvertTo::Orbax => (Becomes::Directory, Box::new(OrbaxSink::plan(target, &options.save, budget)?)),
        ConvertTo::Safetensors { max_shard_bytes } => {
            let becomes = if file.is_some() { Becomes::File } else { Becomes::Directory };
            (becomes, Box::new(TensorSink::plan(target, &tasks, file, max_shard_bytes, options.save.sync)?))
        }
    };
    for (task, step) in tasks.iter_mut().zip(sink.steps()) {
        task.step = step;
    }
    // What is left beside what the sink holds is halved between what is converted at once and the work on it.
    let (held, half) = (sink.held(), sink.held().room(budget)? / 2);
    // The plan of a wave is not counted: it follows from how many chunks the source has, and a wave must hold a whole one.
    let engine = Engine::new(EngineOptions { staging_bytes: half, ..options.engine }).map_err(halved)?.uncounted();
    let fingerprint = fingerprint(target, &*sink)?;
    let found = match options.resume {
        true => fitting(journal::find(to)?, &fingerprint)?,
        false => None,
    };
    let mut conversion = Conversion::begin(target, to, becomes, options, &mut *sink, (found, fingerprint))?;
    conversion.report.leaves = target.leaves.len();
    tracing::debug!(arrays, tasks = tasks.len(), resumed = conversion.cursor.task, "converting");
    conversion.run(&engine, &tasks, half)?;
    let Conversion { staged, mut report, .. } = conversion;
    staged.commit(options.save.sync)?;
    report.peak_host_bytes = held.peak(report.peak_host_bytes);
    report.skipped = target.skipped().to_vec();
    report.missing = target.missing().to_vec();
    report.other_items = other_items(target);
    report.elapsed = start.elapsed();
    tracing::info!(ms = report.elapsed.as_secs_f64() * 1e3, waves = report.waves, "converted");
    Ok(report)
}

/// A conversion at work.
struct Conversion<'a> {
    target: &'a Target,
    options: &'a ConvertOptions,
    sink: &'a mut dyn Sink,
    staged: StagedDir,
    journal: Journal,
    cursor: Cursor,
    report: ConvertReport,
}

impl<'a> Conversion<'a> {
    /// Takes the destination's temporary name, or takes up what was found under one.
    fn begin(
        target: &'a Target,
        to: &Path,
        becomes: Becomes,
        options: &'a ConvertOptions,
        sink: &'a mut dyn Sink,
        (found, fingerprint): (Option<Found>, Fingerprint),
    ) -> Result<Self> {
        let (store, save) = (Arc::clone(&options.save.store), &options.save);
        check_destination(to, save.overwrite)?;
        let mut report = ConvertReport::default();
        let (staged, journal, cursor) = match found {
            None => {
                let mut staged = StagedDir::start(store, to, save.overwrite, becomes)?;
                staged.keep(options.resume);
                let journal = Journal::start(&staged, fingerprint, save.sync)?;
                sink.open(&mut staged)?;
                (staged, journal, Cursor::default())
            }
            Some(mut found) => {
                let (mut staged, files) = StagedDir::resume(store, to, save.overwrite, becomes, &found.staging)?;
                staged.keep(true);
                let known = sink.restore(&staged, std::mem::take(&mut found.notes))?;
                // What was written after the last note is written again.
                for file in
                    files.iter().filter(|file| !known.contains(*file) && file.as_bytes() != journal::FILE.as_bytes())
                {
                    staged.remove(file)?;
                }
                sink.open(&mut staged)?;
                let journal = Journal::resume(&staged, &found, save.sync)?;
                report.lossy = std::mem::take(&mut found.lossy);
                (staged, journal, found.next)
            }
        };
        Ok(Self { target, options, sink, staged, journal, cursor, report })
    }

    /// Converts what is left to convert, a wave at a time.
    fn run(&mut self, engine: &Engine, tasks: &[Task], wave_bytes: u64) -> Result<()> {
        let progress = &self.options.progress.0;
        self.report.bytes_logical = tasks.iter().map(Task::bytes).fold(0, u64::saturating_add);
        self.report.bytes_resumed = done(tasks, self.cursor);
        progress.set_total(self.report.bytes_logical);
        progress.add(self.report.bytes_resumed);
        let budget = Budget::new(engine.limits().staging_bytes);
        let arrays = self.target.checkpoint.arrays();
        let mut pace = Pace::of(self.options);
        loop {
            let from = self.cursor;
            let begun = Instant::now();
            let wave = next_wave(tasks, arrays, &mut self.cursor, wave_bytes, pace.bytes);
            if wave.is_empty() {
                break;
            }
            self.refuse_if_cancelled()?;
            self.count(tasks, from, &wave);
            let filled = self.load(engine, tasks, &wave).map_err(halved)?;
            self.refuse_if_cancelled()?;
            let held: u64 = filled.iter().map(|filled| filled.data.len() as u64).sum();
            let mut io = Io { pool: engine.pool(), budget: &budget, progress, staged: &mut self.staged };
            self.sink.write(&mut io, filled).map_err(halved)?;
            let scratch = wave.iter().any(|piece| piece.oversized);
            let peak = budget.peak().saturating_add(if scratch { 0 } else { held });
            self.report.peak_host_bytes = self.report.peak_host_bytes.max(peak);
            let note = self.sink.note(&self.staged)?;
            self.journal.note(&self.staged, self.cursor, &self.report.lossy, note)?;
            pace.took(begun.elapsed());
        }
        self.report.bytes_stored = self.sink.finish(&mut self.staged)?;
        // The last moment: without its journal it cannot be gone on with.
        self.refuse_if_cancelled()?;
        self.journal.remove(&self.staged)
    }

    /// The elements of a wave's pieces.
    fn load(&mut self, engine: &Engine, tasks: &[Task], wave: &[Piece]) -> Result<Vec<Filled>> {
        let target = wave_target(self.target, tasks, wave)?;
        let scratch = wave.iter().any(|piece| piece.oversized);
        let mut loaded = Vec::new();
        if !target.leaves.is_empty() {
            let job = match scratch {
                true => {
                    let mut memory = Scratch { dir: self.staged.path().to_owned() };
                    engine.load_to(&target.checkpoint, &target, &mut memory)?
                }
                false => engine.load(&target.checkpoint, &target)?,
            };
            let state = job.wait()?;
            let report = state.report();
            let results = if scratch { report.bytes_logical } else { 0 };
            self.report.bytes_read += report.bytes_read;
            self.report.bytes_decoded += report.bytes_decoded;
            self.report.peak_host_bytes =
                self.report.peak_host_bytes.max(report.peak_host_bytes.saturating_sub(results));
            for (path, count) in &report.lossy {
                *self.report.lossy.entry(path.clone()).or_default() += count;
            }
            for (path, leaf) in state.leaves() {
                let crate::tree::Leaf::Array(array) = leaf else { continue };
                let [shard] = array.shards() else {
                    return Err(Error::bug("a piece came in several shards").at("leaf", path));
                };
                loaded.push(shard.to_host()?);
            }
        }
        let mut loaded = loaded.into_iter();
        let fill = |piece: &Piece| {
            let task = &tasks[piece.task];
            let data = match &task.elements {
                Elements::Held(bytes) => Some(bytes.clone()),
                Elements::Stored(_) => loaded.next(),
            };
            let data = data.ok_or_else(|| Error::bug("a piece was not loaded").at("leaf", &task.path))?;
            Ok(Filled { task: piece.task, region: task.region(&piece.rows), data })
        };
        wave.iter().map(fill).collect()
    }

    fn count(&mut self, tasks: &[Task], from: Cursor, wave: &[Piece]) {
        self.report.waves += 1;
        self.report.scratched += wave.iter().filter(|piece| piece.oversized).count() as u64;
        let cut = |piece: &&Piece| {
            // An array counts where its first range ends, or where this conversion goes on with it.
            piece.rows.end < tasks[piece.task].rows()
                && piece.rows.start == if piece.task == from.task { from.row } else { 0 }
        };
        let first = self.report.waves == 1;
        self.report.ranged += wave.iter().filter(cut).filter(|piece| piece.rows.start == 0 || first).count() as u64;
    }

    fn refuse_if_cancelled(&self) -> Result<()> {
        match self.options.progress.is_cancelled() {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Cancelled, "the conversion was cancelled")),
        }
    }
}

/// After how many bytes of whole arrays a wave ends, whatever the memory: a conversion that can be gone on with keeps what was done
/// up to the last wave, so that one takes about a second.
struct Pace {
    bytes: u64,
}

impl Pace {
    fn of(options: &ConvertOptions) -> Self {
        Self { bytes: if options.resume { RESUME_WAVE_BYTES } else { u64::MAX } }
    }

    /// Larger waves if that was a short one, and smaller ones if it was long.
    fn took(&mut self, elapsed: Duration) {
        if elapsed < RESUME_WAVE_TIME / 2 {
            self.bytes = self.bytes.saturating_mul(2);
        } else if elapsed > RESUME_WAVE_TIME * 2 {
            self.bytes = (self.bytes / 2).max(1);
        }
    }
}

/// Bytes of the first wave of a conversion that can be gone on with, and the time that one is to take.
const RESUME_WAVE_BYTES: u64 = 8 << 20;
const RESUME_WAVE_TIME: Duration = Duration::from_secs(1);

/// An error that tells a budget which is half of what was given.
fn halved(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Budget => {
            error.hint("a conversion has half of its memory for this: give `--memory` twice as much or more")
        }
        _ => error,
    }
}

/// The newest journal that fits.
fn fitting(found: Vec<Found>, fingerprint: &Fingerprint) -> Result<Option<Found>> {
    let Some(newest) = found.first() else { return Ok(None) };
    let (differ, at) = (journal::differences(&newest.fingerprint, fingerprint), newest.staging.display().to_string());
    match found.into_iter().find(|one| one.fingerprint == *fingerprint) {
        Some(one) => Ok(Some(one)),
        None => Err(Error::new(ErrorKind::Exists, "what is left over is of another conversion")
            .at("path", &at)
            .lines(differ.into_iter().map(|name| format!("{name}: not the same")))
            .hint("remove it, or leave out `--resume` to begin anew")),
    }
}

/// What must be equal for a conversion to be gone on with.
fn fingerprint(target: &Target, sink: &dyn Sink) -> Result<Fingerprint> {
    let checkpoint = &target.checkpoint;
    let root = checkpoint.root();
    let sum = |bytes: &[u8]| format!("{:08x}, {} bytes", crc32c::crc32c(bytes), bytes.len());
    let mut wanted = format!("{:?} {:?}\n", target.pad, target.policy);
    for leaf in &target.leaves {
        use super::target::What;
        wanted += &match &leaf.what {
            What::Array(array) => {
                format!("{} {:?} {:?} {} {:?}\n", leaf.path, array.view, array.shape, array.dtype, array.key_impl)
            }
            other => format!("{} {other:?}\n", leaf.path),
        };
    }
    let path = std::fs::canonicalize(root.path()).unwrap_or_else(|_| root.path().to_owned());
    Ok(Fingerprint::from([
        ("the source".to_owned(), format!("{} {:?}", path.display(), checkpoint.item())),
        ("the source's files".to_owned(), sum(&source_files(target)?)),
        ("what is converted".to_owned(), sum(wanted.as_bytes())),
        ("what is written".to_owned(), sum(&sink.identity()?)),
    ]))
}

/// Sizes and times of the source's files: those of the item's own directory, data files, tensor files, and of arrays that are
/// directories the files in them, up to a number.
fn source_files(target: &Target) -> Result<Vec<u8>> {
    let checkpoint = &target.checkpoint;
    let root = checkpoint.root();
    let mut paths = BTreeSet::new();
    for array in checkpoint.arrays() {
        match &array.values {
            Values::Keys { index, .. } => paths.extend(index.files().iter().cloned()),
            Values::Extent { path, .. } => _ = paths.insert(path.clone()),
            Values::Directory(dir) => list_files(&root.path().join(dir.as_path()), dir, &mut paths),
        }
    }
    if checkpoint.description().format == Format::Orbax {
        let items = &checkpoint.description().items;
        let dir = items.iter().find(|item| Some(item.name.as_str()) == checkpoint.item());
        let dir = dir.map_or_else(RelPath::root, |item| item.dir.clone());
        for entry in root.list(&dir)?.unwrap_or_default() {
            paths.insert(dir.join(&entry.name)?);
        }
    }
    let mut all = BTreeMap::new();
    for path in paths {
        // What cannot be looked at fails when it is read.
        let Ok(metadata) = std::fs::metadata(root.path().join(path.as_path())) else { continue };
        if metadata.is_file() {
            all.insert(path.to_string(), format!("{} {:?}", metadata.len(), metadata.modified().ok()));
        }
    }
    Ok(format!("{all:?}").into_bytes())
}

/// The files of an array's directory and those below it, in order of their names.
fn list_files(full: &Path, dir: &RelPath, paths: &mut BTreeSet<RelPath>) {
    // What cannot be listed fails when it is read.
    let Ok(entries) = std::fs::read_dir(full) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if paths.len() >= RESUME_FILES_MAX {
            return;
        }
        let Ok(path) = dir.join(entry.file_name().as_encoded_bytes()) else { continue };
        match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => list_files(&entry.path(), &path, paths),
            false => _ = paths.insert(path),
        }
    }
}

/// Bytes of everything before a cursor.
fn done(tasks: &[Task], cursor: Cursor) -> u64 {
    let before = tasks.iter().take(cursor.task).map(Task::bytes).fold(0, u64::saturating_add);
    let rows = tasks.get(cursor.task).map_or(0, |task| cursor.row.saturating_mul(task.row_bytes));
    before.saturating_add(rows)
}

/// Items of the source that stay behind.
pub(crate) fn other_items(target: &Target) -> Vec<String> {
    let Some(own) = target.checkpoint.item() else { return Vec::new() };
    let along: HashSet<&str> = target.checkpoint.json_items().collect();
    let items = target.checkpoint.description().items.iter().map(|item| item.name.as_str());
    items.filter(|name| *name != own && !along.contains(name)).map(str::to_owned).collect()
}

/// Refuses destinations whose making would change or remove the source: within it, around it, or in its place when it has more
/// than is converted.
fn refuse_source(target: &Target, to: &Path) -> Result<()> {
    let real = |path: &Path| path.canonicalize().ok();
    let parent = |path: &Path| std::path::absolute(path).ok().and_then(|path| real(path.parent()?));
    let (root, description) = (target.checkpoint.root(), target.checkpoint.description());
    let source = match (&description.safetensors, &description.step) {
        (Some(Source::File(file) | Source::Index(file)), _) => root.path().join(file.as_path()),
        (_, Some(step)) => root.path().join(step.dir.as_path()),
        _ => root.path().to_owned(),
    };
    let (Some(source), Some(dir), Some(name)) = (real(&source), parent(to), to.file_name()) else { return Ok(()) };
    let destination = dir.join(name);
    let refused = |what: &str| Error::invalid(what).at("destination", to.display()).hint("choose another destination");
    // Within a directory of safetensors it would be no part of them.
    if destination != source && destination.starts_with(&source) && description.format == Format::Orbax {
        return Err(refused("the destination lies within the source"));
    }
    if destination != source && source.starts_with(&destination) {
        return Err(refused("the source lies within the destination, which would be replaced"));
    }
    match other_items(target).as_slice() {
        others if destination == source && !others.is_empty() => {
            Err(refused("the destination is the source, whose other items would be lost").found(others.join(", ")))
        }
        _ => Ok(()),
    }
}

/// The name of the one file that a safetensors destination is, if it is one.
fn file_name(to: &Path) -> Result<Option<&str>> {
    let Some(name) = to.file_name() else { return Ok(None) };
    match name.to_str() {
        Some(name) => Ok(Some(name).filter(|name| name.ends_with(FILE_ENDING))),
        None if !name.as_encoded_bytes().ends_with(FILE_ENDING.as_bytes()) => Ok(None),
        None => Err(Error::invalid("the name of a safetensors file must be UTF-8").at("destination", to.display())),
    }
}

const FILE_ENDING: &str = ".safetensors";
