//! The arrays of one tree on their way to disk.
//!
//! ```text
//!   units in order ──► gather, cast, encode (any order, on the workers) ──► placed in order ──► written (any order)
//!                      credits bound what is in memory                      offsets follow from the lengths before
//! ```
//!
//! A unit is an inner chunk, or a chunk without inner chunks. Because offsets are given in order, the same tree makes the same
//! files whatever the timing. A unit too large for the budget is encoded piece by piece into a file of its own.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use rayon::ThreadPool;

use super::array::{ArrayJob, Encoders, Payload, Unit, Units};
use super::flush::Flusher;
use super::job::Progress;
use super::options::SaveOptions;
use crate::encode::Encoder;
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::random_name;
use crate::io::{Budget, Credit, StagedDir, StoreFile};
use crate::kv::{Extent, FileId, Value};
use crate::layout::orbax::metadata::key_prefix;
use crate::limits::{ALIGN_BYTES, ALIGNED_VALUE_BYTES_MIN, SAVE_INLINE_BYTES_MAX, SLOT_BYTES};
use crate::relpath::RelPath;
use crate::shape::Region;
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
    pub(in crate::tree) files: Vec<RelPath>,
    pub(in crate::tree) entries: Vec<(Bytes, Value)>,
    /// Data files; the nodes go to the end of the last one.
    pub(in crate::tree) data: Vec<Arc<dyn StoreFile>>,
    /// How long the last one is; the largest number if nothing can follow there.
    pub(in crate::tree) end: u64,
    /// Bytes of all values.
    pub(in crate::tree) bytes: u64,
    /// Every file that was made.
    pub(in crate::tree) made_files: Vec<RelPath>,
    /// Directories of values that exist.
    pub(in crate::tree) made_dirs: HashSet<RelPath>,
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
        units: Units::new(jobs),
        send,
        receive,
        encoders: Arc::default(),
        encoded: BTreeMap::new(),
        admitted: 0,
        placed: 0,
        at_work: 0,
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
    Encoded { number: u64, encoded: Result<Encoded> },
    Written(std::io::Result<()>, RelPath),
    Flushed(std::io::Result<()>, RelPath),
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
    path: RelPath,
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
    /// Tasks that have not reported.
    at_work: usize,
    error: Option<(u64, Error)>,
    value: Option<OpenValue>,
    written: Written,
    /// Bytes written to data files since they were last made durable.
    unflushed: u64,
    /// The thread that does so, and whether it is at work.
    flusher: Option<Flusher<RelPath>>,
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
            match report {
                Report::Written(Ok(()), path) => self.flush(&path)?,
                Report::Flushed(Ok(()), _) => self.flushing = false,
                Report::Written(Err(error), path) => {
                    let error = self.context.staged.failed(error, "write", &path);
                    self.fail(u64::MAX, error);
                }
                Report::Flushed(Err(error), path) => {
                    let error = self.context.staged.failed(error, "sync", &path);
                    self.fail(u64::MAX, error);
                }
                Report::Encoded { number, encoded: Err(error) } => self.fail(number, error),
                Report::Encoded { number, encoded: Ok(encoded) } => {
                    self.encoded.insert(number, encoded);
                    while let Some(encoded) = self.encoded.remove(&self.placed) {
                        self.placed += 1;
                        if !self.stopping() {
                            self.place(encoded)?;
                        }
                    }
                }
            }
        }
        if let Some((_, error)) = self.error.take() {
            return Err(error);
        }
        if self.context.progress.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "the save was cancelled"));
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
        for job in self.jobs.iter().filter(|job| !job.described) {
            let document = job.new.metadata()?;
            let key = stored_key(&job.name, job.new.format.metadata_key());
            match self.context.storage {
                Storage::Database { .. } => {
                    self.written.entries.push((key.into_bytes().into(), Value::Inline(document.into())));
                }
                Storage::Directories => {
                    let path = self.make_dir_of(&key)?;
                    self.context.staged.write(&path, &document, self.context.sync)?;
                }
            }
        }
        Ok(())
    }

    /// Starts a unit, or gives it back if there is no memory for it now.
    fn admit(&mut self, unit: Unit) -> Result<Option<Unit>> {
        let job = &self.jobs[unit.array];
        let region = job.unit_region(&unit)?;
        let bytes = region.volume().saturating_mul(job.source.dtype().size() as u64);
        // Gathered elements, what they are encoded to, and the encoder.
        let encoded = Encoder::encoded_len_max(job.new.compression, usize::try_from(bytes).unwrap_or(usize::MAX));
        let encoder = Encoder::memory(job.new.compression);
        let whole = bytes.saturating_add(encoded as u64);
        let streamed = whole > self.context.budget.total() / UNITS_PER_BUDGET;
        let needed = encoder.saturating_add(if streamed { STREAM_BYTES } else { whole });
        let Some(credit) = self.context.budget.take(needed) else {
            if self.at_work == 0 {
                return Err(Error::new(ErrorKind::Budget, "the memory budget is too small to save")
                    .at("array", &job.name)
                    .expected(format_args!("at least {needed} bytes"))
                    .found(format_args!("{} bytes", self.context.budget.total())));
            }
            return Ok(Some(unit));
        };
        let number = self.admitted;
        self.admitted += 1;
        let own = match streamed {
            true => Some(self.own_file(&unit)?),
            false => None,
        };
        let (jobs, encoders, progress) =
            (Arc::clone(self.jobs), Arc::clone(&self.encoders), Arc::clone(self.context.progress));
        self.spawn(number, move || {
            let job = &jobs[unit.array];
            let mut encoder = encoders.take(job)?;
            let payload = match own {
                Some((file, path)) => job.stream(&region, &mut encoder, file, path),
                None => job.encode(&unit, &region, &mut encoder),
            };
            encoders.give_back(job, encoder);
            let inside = region.intersect(&Region::whole(&job.source.shape));
            progress.add(inside.map_or(0, |inside| inside.volume()) * job.source.convert.from.size() as u64);
            let payload =
                payload.map_err(|error| error.at("chunk", format_args!("{:?}", unit.chunk)).at("array", &job.name))?;
            Ok(Encoded { unit, payload, _credit: credit })
        });
        Ok(None)
    }

    fn spawn(&mut self, number: u64, task: impl FnOnce() -> Result<Encoded> + Send + 'static) {
        self.at_work += 1;
        let send = self.send.clone();
        self.context.pool.spawn(move || {
            let encoded = catch_unwind(AssertUnwindSafe(task)).unwrap_or_else(|_| Err(Error::bug("a worker panicked")));
            // The driver waits for every report, so somebody receives it.
            let _ = send.send(Report::Encoded { number, encoded });
        });
    }

    /// Gives an encoded unit its place and has it written.
    fn place(&mut self, encoded: Encoded) -> Result<()> {
        let Encoded { unit, payload, _credit: credit } = encoded;
        let job = &self.jobs[unit.array];
        let key = stored_key(&job.name, &job.meta.keys.key(&unit.chunk));
        let (body, mut tail) = match payload {
            Payload::File(file, path, len) => {
                self.written.bytes += len;
                if let Storage::Database { .. } = self.context.storage {
                    let file = self.add_file(path, file);
                    self.written.entries.push((key.into(), Value::Extent(Extent { file, offset: 0, len })));
                    // Later values start a new file.
                    self.written.end = u64::MAX;
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
            None => self.open_value(&key, len)?,
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
            if database {
                self.written.end = value.start + value.len;
                let file = FileId(u32::try_from(self.written.files.len() - 1).unwrap_or(u32::MAX));
                let extent = Extent { file, offset: value.start, len: value.len };
                self.written.entries.push((key.into(), Value::Extent(extent)));
            }
        } else {
            self.value = Some(value);
        }
        Ok(())
    }

    /// Starts a value: where the last one ended in the data file at hand, in a new data file, or in a file of its own.
    fn open_value(&mut self, key: &str, len: u64) -> Result<OpenValue> {
        let pending = Arc::new(AtomicUsize::new(1));
        match self.context.storage {
            Storage::Directories => {
                let path = self.make_dir_of(key)?;
                let file = Arc::from(self.context.staged.file(&path)?);
                Ok(OpenValue { file, path, start: 0, len: 0, entries: Vec::new(), pending })
            }
            Storage::Database { data_file_bytes } => {
                if self.written.data.is_empty() || self.written.end >= data_file_bytes {
                    let (file, path) = self.data_file()?;
                    self.add_file(path, file);
                    self.written.end = 0;
                }
                let end = self.written.end;
                let start = if len >= ALIGNED_VALUE_BYTES_MIN { aligned(end) } else { end };
                let last = self.written.data.last().zip(self.written.files.last());
                let (file, path) = last.ok_or_else(|| Error::bug("a database without data files"))?;
                let (file, path) = (Arc::clone(file), path.clone());
                Ok(OpenValue { file, path, start, len: 0, entries: Vec::new(), pending })
            }
        }
    }

    fn write(&mut self, value: &OpenValue, at: u64, (body, tail): (Bytes, Vec<u8>), credit: Credit, last: bool) {
        let (file, path, offset) = (Arc::clone(&value.file), value.path.clone(), value.start + at);
        // A file of its own is made durable by whoever writes the last of its bytes, so that few files are open at once.
        let own = self.context.sync && self.context.storage == Storage::Directories;
        let pending = Arc::clone(&value.pending);
        if !last {
            pending.fetch_add(1, Ordering::AcqRel);
        }
        self.at_work += 1;
        self.unflushed += (body.len() + tail.len()) as u64;
        let send = self.send.clone();
        self.context.pool.spawn(move || {
            let write = || {
                if !body.is_empty() {
                    file.write_at(&body, offset)?;
                }
                if !tail.is_empty() {
                    file.write_at(&tail, offset + body.len() as u64)?;
                }
                match pending.fetch_sub(1, Ordering::AcqRel) == 1 && own {
                    true => file.sync(),
                    false => Ok(()),
                }
            };
            let result = catch_unwind(AssertUnwindSafe(write));
            let result = result.unwrap_or_else(|_| Err(std::io::Error::other("a worker panicked")));
            drop((body, tail, credit));
            let _ = send.send(Report::Written(result, path));
        });
    }

    /// Has a data file made durable while others are encoded, so that little is left to wait for at the end.
    fn flush(&mut self, path: &RelPath) -> Result<()> {
        let database = matches!(self.context.storage, Storage::Database { .. });
        if !(self.context.sync && database) || self.flushing || self.unflushed < FLUSH_BYTES {
            return Ok(());
        }
        let Some(file) = self.written.files.iter().position(|file| file == path) else { return Ok(()) };
        let flusher = match &mut self.flusher {
            Some(flusher) => flusher,
            none => {
                let send = self.send.clone();
                // The driver waits for every report, so somebody receives it.
                none.insert(Flusher::new(move |synced, path| _ = send.send(Report::Flushed(synced, path)))?)
            }
        };
        flusher.flush(Arc::clone(&self.written.data[file]), path.clone());
        (self.flushing, self.unflushed) = (true, 0);
        self.at_work += 1;
        Ok(())
    }

    /// A file for one unit alone.
    fn own_file(&mut self, unit: &Unit) -> Result<(Arc<dyn StoreFile>, RelPath)> {
        let job = &self.jobs[unit.array];
        match self.context.storage {
            Storage::Database { .. } => self.data_file(),
            Storage::Directories => {
                let path = self.make_dir_of(&stored_key(&job.name, &job.meta.keys.key(&unit.chunk)))?;
                Ok((Arc::from(self.context.staged.file(&path)?), path))
            }
        }
    }

    fn data_file(&mut self) -> Result<(Arc<dyn StoreFile>, RelPath)> {
        let (file, path) = new_data_file(self.context.staged, &self.context.dir)?;
        self.written.made_files.push(path.clone());
        Ok((file, path))
    }

    fn add_file(&mut self, path: RelPath, file: Arc<dyn StoreFile>) -> FileId {
        self.written.files.push(path);
        self.written.data.push(file);
        FileId(u32::try_from(self.written.files.len() - 1).unwrap_or(u32::MAX))
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

const fn aligned(at: u64) -> u64 {
    at.next_multiple_of(ALIGN_BYTES)
}

/// A unit that takes more than this part of the budget is encoded piece by piece.
const UNITS_PER_BUDGET: u64 = 4;

/// Bytes that are written before the disk is asked to make them durable in the background: enough for it to work at full speed.
const FLUSH_BYTES: u64 = 64 << 20;

/// Elements of a slab, and what they are encoded to.
const STREAM_BYTES: u64 = 3 * SLOT_BYTES as u64;
