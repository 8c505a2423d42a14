//! The arrays of one tree on their way to disk.
//!
//! ```text
//!   units in order ──► gather, cast, encode (any order, on the workers) ──► placed in order ──► written (any order)
//!                      credits bound what is in memory                      offsets follow from the lengths before
//! ```
//!
//! A unit is an inner chunk, or a chunk without inner chunks. Because offsets are given in order, the same tree makes the same
//! files whatever the timing. A chunk whose inner chunks are too large for the budget is encoded piece by piece into a file of its
//! own.
//!
//! Few files are open at once: one that is full is made durable and closed as soon as nothing is being written to it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use rayon::ThreadPool;

use super::array::{ArrayJob, Payload, Unit, Units};
use super::encoders::Encoders;
use super::flush::Flusher;
use super::job::Progress;
use super::options::SaveOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::random_name;
use crate::io::{Budget, Credit, StagedDir, StoreFile};
use crate::kv::{Extent, FileId, Value};
use crate::layout::orbax::metadata::key_prefix;
use crate::limits::{
    ALIGN_BYTES, ALIGNED_VALUE_BYTES_MIN, SAVE_INLINE_BYTES_MAX, SAVE_OPEN_FILES_MAX, TASKS_PER_WORKER,
};
use crate::relpath::RelPath;
use crate::zarr::Endian;
use crate::zarr::shard::encode_index;

/// Where values go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tree) enum Storage {
    /// Data files of a database, cut when they have reached this many bytes.
    Database { data_file_bytes: u64 },
    /// One file a value.
    Directories,
}

impl Storage {
    /// What these options mean.
    pub(in crate::tree) fn of(options: &SaveOptions) -> Self {
        match options.ocdbt {
            true => Self::Database { data_file_bytes: options.data_file_bytes },
            false => Self::Directories,
        }
    }
}

/// What a write needs from outside.
pub(in crate::tree) struct Context<'a> {
    pub(in crate::tree) pool: &'a ThreadPool,
    /// Memory beyond the arrays themselves.
    pub(in crate::tree) budget: &'a Arc<Budget>,
    pub(in crate::tree) progress: &'a Arc<Progress>,
    pub(in crate::tree) staged: &'a mut StagedDir,
    /// The directory of the item.
    pub(in crate::tree) dir: RelPath,
    pub(in crate::tree) storage: Storage,
    pub(in crate::tree) sync: bool,
}

/// What was written: the entries of the database and its files, or nothing where every value is a file. Later arrays can be
/// written after it.
#[derive(Debug, Default)]
pub(in crate::tree) struct Written {
    /// Data files.
    pub(in crate::tree) files: Vec<RelPath>,
    pub(in crate::tree) entries: Vec<(Bytes, Value)>,
    /// The data file that is not full yet, where later values and the nodes go. All others are closed.
    pub(in crate::tree) open: Option<DataFile>,
    /// Bytes of all values.
    pub(in crate::tree) bytes: u64,
    /// Every file that was made.
    pub(in crate::tree) made_files: Vec<RelPath>,
    /// Directories of values that exist.
    pub(in crate::tree) made_dirs: HashSet<RelPath>,
}

/// A data file that is not full.
#[derive(Clone, Debug)]
pub(in crate::tree) struct DataFile {
    pub(in crate::tree) id: FileId,
    pub(in crate::tree) file: Arc<dyn StoreFile>,
    /// How long it is.
    pub(in crate::tree) end: u64,
}

impl Written {
    /// The path of a data file.
    pub(in crate::tree) fn path(&self, file: FileId) -> Result<&RelPath> {
        self.files.get(file.0 as usize).ok_or_else(|| Error::bug("a data file without a path"))
    }

    pub(super) fn add_file(&mut self, path: RelPath) -> FileId {
        self.files.push(path);
        FileId(u32::try_from(self.files.len() - 1).unwrap_or(u32::MAX))
    }
}

/// Writes the parts of all arrays in whole chunks, and their metadata, after what was written before.
///
/// # Errors
/// The first failure in the order of units; a cancel. What was written before is lost then, too.
pub(in crate::tree) fn write_arrays(
    context: Context<'_>,
    jobs: &Arc<Vec<ArrayJob>>,
    written: Written,
) -> Result<Written> {
    let (send, receive) = channel();
    let mut drive = Drive {
        jobs,
        units: Units::new(jobs, context.budget.total()),
        send,
        receive,
        encoders: Arc::default(),
        encoded: BTreeMap::new(),
        admitted: 0,
        placed: 0,
        at_work: 0,
        encoding: 0,
        open_files: usize::from(written.open.is_some()),
        writing: HashMap::new(),
        error: None,
        value: None,
        written,
        unflushed: 0,
        flusher: None,
        flushing: false,
        context,
    };
    drive.run()?;
    Ok(drive.written)
}

/// What a task reports.
enum Report {
    Encoded {
        number: u64,
        encoded: Result<Encoded>,
        streamed: bool,
    },
    /// `closed`: it was the last write to a file of its own.
    Written {
        to: Place,
        result: std::io::Result<()>,
        closed: bool,
    },
    Flushed {
        file: FileId,
        full: bool,
        result: std::io::Result<()>,
    },
}

/// A file that values are written to.
#[derive(Clone, Debug)]
enum Place {
    Data(FileId),
    Own(RelPath),
}

/// A data file that is being written to.
struct Writing {
    file: Arc<dyn StoreFile>,
    /// Writes that have not reported.
    pending: usize,
    /// Whether no more will come.
    full: bool,
}

/// A unit that is ready to be placed.
struct Encoded {
    unit: Unit,
    payload: Payload,
    _credit: Credit,
}

/// A value whose inner chunks are being placed.
struct OpenValue {
    file: Arc<dyn StoreFile>,
    place: Place,
    /// Where the value starts in its file; its length so far.
    start: u64,
    len: u64,
    entries: Vec<Option<(u64, u64)>>,
    /// Writes of a file of its own that are not done, and one for more to come.
    pending: Arc<AtomicUsize>,
}

struct Drive<'a> {
    jobs: &'a Arc<Vec<ArrayJob>>,
    units: Units<'a>,
    send: Sender<Report>,
    receive: Receiver<Report>,
    encoders: Arc<Encoders>,
    /// Encoded units by number that wait for earlier ones.
    encoded: BTreeMap<u64, Encoded>,
    admitted: u64,
    placed: u64,
    /// Tasks that have not reported; those of them that encode.
    at_work: usize,
    encoding: usize,
    /// Files that are open, about to be closed or written by a task.
    open_files: usize,
    /// Data files that are written to or full and not yet durable.
    writing: HashMap<FileId, Writing>,
    error: Option<(u64, Error)>,
    value: Option<OpenValue>,
    written: Written,
    /// Bytes written to data files since they were last made durable.
    unflushed: u64,
    /// The thread that does so, and whether it is at work.
    flusher: Option<Flusher<(FileId, bool)>>,
    flushing: bool,
    context: Context<'a>,
}

impl Drive<'_> {
    fn run(&mut self) -> Result<()> {
        self.write_metadata()?;
        let mut next = self.units.next();
        loop {
            while let Some(unit) = next.take() {
                if self.stopping() {
                    break;
                }
                match self.admit(unit)? {
                    None => next = self.units.next(),
                    waiting => {
                        next = waiting;
                        break;
                    }
                }
            }
            if self.at_work == 0 {
                break;
            }
            let report = self.receive.recv().map_err(|_| Error::bug("the tasks of a save are gone"))?;
            self.at_work -= 1;
            self.heard(report)?;
            while self.open_files < SAVE_OPEN_FILES_MAX
                && let Some(encoded) = self.encoded.remove(&self.placed)
            {
                self.placed += 1;
                if !self.stopping() {
                    self.place(encoded)?;
                }
            }
        }
        if let Some((_, error)) = self.error.take() {
            return Err(error);
        }
        self.context.progress.refuse_if_cancelled()
    }

    fn heard(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Encoded { number, encoded, streamed } => {
                self.encoding -= 1;
                self.open_files -= usize::from(streamed);
                match encoded {
                    Ok(encoded) => _ = self.encoded.insert(number, encoded),
                    Err(error) => self.fail(number, error),
                }
            }
            Report::Written { to, result, closed } => {
                self.open_files -= usize::from(closed);
                if let Err(error) = result {
                    let path = match &to {
                        Place::Data(file) => self.written.path(*file)?,
                        Place::Own(path) => path,
                    };
                    let error = self.context.staged.failed(error, "write", path);
                    self.fail(u64::MAX, error);
                }
                if let Place::Data(file) = to {
                    if let Some(writing) = self.writing.get_mut(&file) {
                        writing.pending -= 1;
                    }
                    self.seal(file)?;
                    self.flush(file)?;
                }
            }
            Report::Flushed { file, full, result } => {
                if let Err(error) = result {
                    let error = self.context.staged.failed(error, "sync", self.written.path(file)?);
                    self.fail(u64::MAX, error);
                }
                match full {
                    true => self.open_files -= 1,
                    false => self.flushing = false,
                }
            }
        }
        Ok(())
    }

    fn stopping(&self) -> bool {
        self.error.is_some() || self.context.progress.is_cancelled()
    }

    fn fail(&mut self, number: u64, error: Error) {
        if self.error.as_ref().is_none_or(|(have, _)| number < *have) {
            self.error = Some((number, error));
        }
    }

    /// Every array's metadata document: an entry of the database, or a file.
    fn write_metadata(&mut self) -> Result<()> {
        // Arrays that are alike have one document in memory.
        let mut documents: HashSet<Bytes> = HashSet::new();
        for job in self.jobs.iter().filter(|job| !job.described) {
            let document = job.new.metadata()?;
            let key = stored_key(&job.name, job.new.format.metadata_key());
            match self.context.storage {
                Storage::Database { .. } => {
                    let document = match documents.get(document.as_slice()) {
                        Some(document) => document.clone(),
                        None => {
                            let document = Bytes::from(document);
                            documents.insert(document.clone());
                            document
                        }
                    };
                    self.written.entries.push((key.into_bytes().into(), Value::Inline(document)));
                }
                Storage::Directories => {
                    let path = self.make_dir_of(&key)?;
                    self.context.staged.write(&path, &document, self.context.sync)?;
                }
            }
        }
        Ok(())
    }

    /// Starts a unit, or gives it back if there is no room for it now.
    fn admit(&mut self, unit: Unit) -> Result<Option<Unit>> {
        let (job, cost, budget) = (&self.jobs[unit.array], unit.cost, self.context.budget);
        let workers = self.context.pool.current_num_threads();
        if self.encoding >= workers * TASKS_PER_WORKER || cost.streamed() && self.open_files >= SAVE_OPEN_FILES_MAX {
            return Ok(Some(unit));
        }
        let reserved = self.encoders.reserve(job, cost.encoder, budget);
        let taken = reserved.and_then(|reserved| match budget.take(cost.work) {
            Some(credit) => Some((reserved, credit)),
            None => {
                self.encoders.give_back(reserved);
                None
            }
        });
        let Some((mut reserved, credit)) = taken else {
            if self.at_work == 0 && budget.total() < cost.total() {
                return Err(job.over_budget(budget.total()).unwrap_or_else(|| Error::bug("a unit has no room")));
            }
            if self.encoding == 0 {
                // Better no encoder that waits than none that works.
                self.encoders.clear();
                return if self.at_work == 0 { self.admit(unit) } else { Ok(Some(unit)) };
            }
            return Ok(Some(unit));
        };
        let number = self.admitted;
        self.admitted += 1;
        let own = match cost.streamed() {
            true => Some(self.own_file(&unit)?),
            false => None,
        };
        let (jobs, encoders, progress, sync) =
            (Arc::clone(self.jobs), Arc::clone(&self.encoders), Arc::clone(self.context.progress), self.context.sync);
        self.spawn(number, cost.streamed(), move || {
            let job = &jobs[unit.array];
            let encoder = reserved.ready()?;
            let payload = match own {
                Some((file, path)) => {
                    let streamed = job.stream(&unit, encoder, (&*file, &path), &progress);
                    streamed.and_then(|len| match if sync { file.sync() } else { Ok(()) } {
                        Ok(()) => Ok(Payload::File(path, len)),
                        Err(error) => {
                            Err(Error::new(ErrorKind::Io, "cannot sync a file").at("file", &path).caused_by(error))
                        }
                    })
                }
                None => job.encode(&unit, encoder, &progress),
            };
            encoders.give_back(reserved);
            let payload =
                payload.map_err(|error| error.at("chunk", format_args!("{:?}", unit.chunk)).at("array", &job.name))?;
            Ok(Encoded { unit, payload, _credit: credit })
        });
        Ok(None)
    }

    fn spawn(&mut self, number: u64, streamed: bool, task: impl FnOnce() -> Result<Encoded> + Send + 'static) {
        self.at_work += 1;
        self.encoding += 1;
        let send = self.send.clone();
        self.context.pool.spawn(move || {
            let encoded = catch_unwind(AssertUnwindSafe(task)).unwrap_or_else(|_| Err(Error::bug("a worker panicked")));
            // The driver waits for every report, so somebody receives it.
            let _ = send.send(Report::Encoded { number, encoded, streamed });
        });
    }

    /// Gives an encoded unit its place and has it written.
    fn place(&mut self, encoded: Encoded) -> Result<()> {
        let Encoded { unit, payload, _credit: credit } = encoded;
        let job = &self.jobs[unit.array];
        let key = stored_key(&job.name, &job.keys.key(&unit.chunk));
        let (body, mut tail) = match payload {
            Payload::File(path, len) => {
                self.written.bytes += len;
                if let Storage::Database { .. } = self.context.storage {
                    let file = self.written.add_file(path);
                    self.written.entries.push((key.into(), Value::Extent(Extent { file, offset: 0, len })));
                }
                return Ok(());
            }
            Payload::Bytes(body, tail) => (body, tail),
            Payload::Absent => (Bytes::new(), Vec::new()),
        };
        let len = (body.len() + tail.len()) as u64;
        let database = matches!(self.context.storage, Storage::Database { .. });
        if database && unit.of == 1 && len <= SAVE_INLINE_BYTES_MAX {
            self.written.bytes += len;
            self.written.entries.push((key.into(), Value::Inline([&body[..], &tail].concat().into())));
            return Ok(());
        }
        let mut value = match self.value.take() {
            Some(value) => value,
            None => self.open_value(&key, unit.of > 1 || len >= ALIGNED_VALUE_BYTES_MIN)?,
        };
        // Inner chunks that are worth a read of their own start where direct reads can start.
        let at = if len >= ALIGNED_VALUE_BYTES_MIN && unit.of > 1 { aligned(value.len) } else { value.len };
        value.entries.push((len > 0).then_some((at, len)));
        if len > 0 {
            value.len = at + len;
        }
        let last = unit.inner + 1 == unit.of;
        let at = if len > 0 { at } else { value.len };
        if last && unit.of > 1 {
            let index =
                encode_index(&value.entries, Endian::Little, true).map_err(|error| Error::bug(error.to_string()))?;
            value.len += index.len() as u64;
            tail.extend(index);
        }
        self.write(&value, at, (body, tail), credit, last);
        if last {
            self.written.bytes += value.len;
            if let (Place::Data(file), Some(open)) = (&value.place, &mut self.written.open) {
                open.end = value.start + value.len;
                let extent = Extent { file: *file, offset: value.start, len: value.len };
                self.written.entries.push((key.into(), Value::Extent(extent)));
            }
        } else {
            self.value = Some(value);
        }
        Ok(())
    }

    /// Starts a value: where the last one ended in the data file at hand, in a new data file, or in a file of its own. One with
    /// inner chunks, or a large one, is aligned: any of the inner chunks may be worth a read of its own.
    fn open_value(&mut self, key: &str, align: bool) -> Result<OpenValue> {
        let pending = Arc::new(AtomicUsize::new(1));
        let Storage::Database { data_file_bytes } = self.context.storage else {
            let path = self.make_dir_of(key)?;
            let file = Arc::from(self.context.staged.file(&path)?);
            self.open_files += 1;
            return Ok(OpenValue { file, place: Place::Own(path), start: 0, len: 0, entries: Vec::new(), pending });
        };
        if let Some(full) = self.written.open.take_if(|open| open.end >= data_file_bytes) {
            self.writing.entry(full.id).or_insert(Writing { file: full.file, pending: 0, full: true }).full = true;
            self.seal(full.id)?;
        }
        let open = match &self.written.open {
            Some(open) => open,
            None => {
                let (file, path) = self.data_file()?;
                self.open_files += 1;
                let id = self.written.add_file(path);
                self.written.open.insert(DataFile { id, file, end: 0 })
            }
        };
        let start = if align { aligned(open.end) } else { open.end };
        let (file, place) = (Arc::clone(&open.file), Place::Data(open.id));
        Ok(OpenValue { file, place, start, len: 0, entries: Vec::new(), pending })
    }

    fn write(&mut self, value: &OpenValue, at: u64, (body, tail): (Bytes, Vec<u8>), credit: Credit, last: bool) {
        let (file, to, offset) = (Arc::clone(&value.file), value.place.clone(), value.start + at);
        let own = matches!(to, Place::Own(_));
        // A file of its own is made durable by whoever writes the last of its bytes.
        let sync = self.context.sync && own;
        let pending = Arc::clone(&value.pending);
        if !last {
            pending.fetch_add(1, Ordering::AcqRel);
        }
        if let Place::Data(id) = to {
            let new = || Writing { file: Arc::clone(&file), pending: 0, full: false };
            self.writing.entry(id).or_insert_with(new).pending += 1;
        }
        self.at_work += 1;
        self.unflushed += (body.len() + tail.len()) as u64;
        let send = self.send.clone();
        self.context.pool.spawn(move || {
            let mut closed = false;
            let write = || {
                if !body.is_empty() {
                    file.write_at(&body, offset)?;
                }
                if !tail.is_empty() {
                    file.write_at(&tail, offset + body.len() as u64)?;
                }
                Ok(())
            };
            let mut result = catch_unwind(AssertUnwindSafe(write)).unwrap_or_else(|_| Err(panicked()));
            if pending.fetch_sub(1, Ordering::AcqRel) == 1 && own {
                closed = true;
                if sync && result.is_ok() {
                    result = catch_unwind(AssertUnwindSafe(|| file.sync())).unwrap_or_else(|_| Err(panicked()));
                }
            }
            drop((file, body, tail, credit));
            let _ = send.send(Report::Written { to, result, closed });
        });
    }

    /// Makes a full data file durable and closes it, if nothing is being written to it any more.
    fn seal(&mut self, id: FileId) -> Result<()> {
        if !self.writing.get(&id).is_some_and(|writing| writing.full && writing.pending == 0) {
            return Ok(());
        }
        let Some(writing) = self.writing.remove(&id) else { return Ok(()) };
        match self.context.sync {
            true => self.flusher()?.flush(writing.file, (id, true)),
            false => {
                self.open_files -= 1;
                return Ok(());
            }
        }
        self.at_work += 1;
        Ok(())
    }

    /// Has a data file made durable while others are encoded, so that little is left to wait for at the end.
    fn flush(&mut self, id: FileId) -> Result<()> {
        if !self.context.sync || self.flushing || self.unflushed < FLUSH_BYTES {
            return Ok(());
        }
        let Some(writing) = self.writing.get(&id) else { return Ok(()) };
        let file = Arc::clone(&writing.file);
        self.flusher()?.flush(file, (id, false));
        (self.flushing, self.unflushed) = (true, 0);
        self.at_work += 1;
        Ok(())
    }

    fn flusher(&mut self) -> Result<&Flusher<(FileId, bool)>> {
        match &mut self.flusher {
            Some(flusher) => Ok(flusher),
            none => {
                let send = self.send.clone();
                // The driver waits for every report, so somebody receives it.
                let done = move |result, (file, full)| _ = send.send(Report::Flushed { file, full, result });
                Ok(none.insert(Flusher::new(done)?))
            }
        }
    }

    /// A file for one unit alone.
    fn own_file(&mut self, unit: &Unit) -> Result<(Arc<dyn StoreFile>, RelPath)> {
        self.open_files += 1;
        let job = &self.jobs[unit.array];
        match self.context.storage {
            Storage::Database { .. } => self.data_file(),
            Storage::Directories => {
                let path = self.make_dir_of(&stored_key(&job.name, &job.keys.key(&unit.chunk)))?;
                Ok((Arc::from(self.context.staged.file(&path)?), path))
            }
        }
    }

    fn data_file(&mut self) -> Result<(Arc<dyn StoreFile>, RelPath)> {
        let (file, path) = new_data_file(self.context.staged, &self.context.dir)?;
        self.written.made_files.push(path.clone());
        Ok((file, path))
    }

    /// The path of a value that is a file, after making its directories.
    fn make_dir_of(&mut self, key: &str) -> Result<RelPath> {
        let path = self.context.dir.join(key)?;
        if let Some((dir, _)) = key.rsplit_once('/') {
            let dir = self.context.dir.join(dir)?;
            if !self.written.made_dirs.contains(&dir) {
                self.context.staged.dir(&dir)?;
                self.written.made_dirs.insert(dir);
            }
        }
        self.written.made_files.push(path.clone());
        Ok(path)
    }
}

/// A data file of a database, with a name that no other has, as TensorStore names them.
pub(super) fn new_data_file(staged: &mut StagedDir, database: &RelPath) -> Result<(Arc<dyn StoreFile>, RelPath)> {
    let dir = database.join("d")?;
    staged.dir(&dir)?;
    let path = dir.join(format!("{}{}", random_name()?, random_name()?))?;
    Ok((Arc::from(staged.file(&path)?), path))
}

/// The key of a value: the array's prefix and the rest.
fn stored_key(name: &str, rest: &str) -> String {
    format!("{}{rest}", key_prefix(name))
}

fn panicked() -> std::io::Error {
    std::io::Error::other("a worker panicked")
}

const fn aligned(at: u64) -> u64 {
    at.next_multiple_of(ALIGN_BYTES)
}

/// Bytes that are written before the disk is asked to make them durable in the background: enough for it to work at full speed.
const FLUSH_BYTES: u64 = 64 << 20;
