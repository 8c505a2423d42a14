//! The files that values are written to: which are open, what is on its way to them, and when they are made durable.
//!
//! Few are open at once: one that is full is made durable and closed as soon as nothing is being written to it. A file of a value
//! of its own is made durable by whoever writes the last of its bytes.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use rayon::ThreadPool;

use super::array::Body;
use super::disk_thread::DiskThread;
use super::item::Item;
use super::options::SaveOptions;
use super::spare::{Spare, WorkCredit};
use super::value_file::ValueFile;
use crate::error::{Error, Result};
use crate::io::store::random_name;
use crate::io::{StagedDir, StoreFile};
use crate::kv::{Extent, FileId, Value};
use crate::limits::{ALIGN_BYTES, SAVE_OPEN_FILES_MAX};
use crate::relpath::RelPath;

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

/// What is to be on stable storage when a save ends, and how it gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tree) enum Durable {
    /// Nothing has to be.
    No,
    /// Files are synced.
    Synced,
    /// The same, and large values of a database go past the page cache where the file system lets them.
    Direct,
}

impl Durable {
    /// What these options mean.
    pub(in crate::tree) fn of(options: &SaveOptions) -> Self {
        match (options.sync, options.direct) {
            (false, _) => Self::No,
            (true, false) => Self::Synced,
            (true, true) => Self::Direct,
        }
    }

    pub(super) fn syncs(self) -> bool {
        self != Self::No
    }
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
    pub(in crate::tree) file: Arc<ValueFile>,
    /// How long it is.
    pub(in crate::tree) end: u64,
}

impl Written {
    /// Nothing, with room for the keys of a tree.
    pub(in crate::tree) fn of(item: &Item) -> Self {
        let keys = item.jobs.iter().map(|job| job.chunk_count().saturating_add(1)).fold(0, u64::saturating_add);
        // It was planned to fit.
        Self { entries: Vec::with_capacity(usize::try_from(keys).unwrap_or(0)), ..Self::default() }
    }

    /// The path of a data file.
    pub(in crate::tree) fn path(&self, file: FileId) -> Result<&RelPath> {
        self.files.get(file.0 as usize).ok_or_else(|| Error::bug("a data file without a path"))
    }

    pub(super) fn add_file(&mut self, path: RelPath) -> FileId {
        self.files.push(path);
        FileId(u32::try_from(self.files.len() - 1).unwrap_or(u32::MAX))
    }
}

/// What became of a write or a sync.
pub(super) enum Report {
    /// `closed`: it was the last write to a file of its own.
    Written { to: Place, result: std::io::Result<()>, closed: bool },
    /// `full`: the data file is closed now.
    Flushed { file: FileId, full: bool, result: std::io::Result<()> },
}

/// A file that values are written to.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Data(FileId),
    Own(RelPath),
}

/// A value that is being written, piece by piece.
pub(super) struct OpenValue {
    file: Arc<ValueFile>,
    place: Place,
    /// Where it starts in its file.
    start: u64,
    /// Its length so far.
    pub(super) len: u64,
    /// Where its inner chunks lie in it: offset and length, so far.
    pub(super) entries: Vec<Option<(u64, u64)>>,
    /// Writes of a file of its own that are not done, and one for more to come.
    pending: Arc<AtomicUsize>,
}

/// A data file that is being written to.
struct Writing {
    file: Arc<ValueFile>,
    /// Writes that have not reported.
    pending: usize,
    /// Whether no more will come.
    full: bool,
}

/// Tells the driver of a save.
pub(super) type Tell = Arc<dyn Fn(Report) + Send + Sync>;

/// The files of one tree that is being written.
pub(super) struct Files<'a> {
    staged: &'a mut StagedDir,
    /// The directory of the item.
    dir: RelPath,
    storage: Storage,
    durable: Durable,
    tell: Tell,
    pub(super) written: Written,
    /// Files that are open, about to be closed or written by a task.
    open: usize,
    /// Reports that will come.
    pending: usize,
    /// Data files that are written to or full and not yet durable.
    writing: HashMap<FileId, Writing>,
    /// Bytes written to data files since they were last made durable.
    unflushed: u64,
    /// The thread that does so, and whether it is at work.
    flusher: Option<DiskThread>,
    flushing: bool,
    /// The thread that writes past the page cache.
    writer: Option<DiskThread>,
}

impl<'a> Files<'a> {
    pub(super) fn new(
        staged: &'a mut StagedDir,
        (dir, storage): (RelPath, Storage),
        durable: Durable,
        written: Written,
        tell: Tell,
    ) -> Self {
        let open = usize::from(written.open.is_some());
        Self {
            staged,
            dir,
            storage,
            durable,
            tell,
            written,
            open,
            pending: 0,
            writing: HashMap::new(),
            unflushed: 0,
            flusher: None,
            flushing: false,
            writer: None,
        }
    }

    pub(super) fn in_database(&self) -> bool {
        matches!(self.storage, Storage::Database { .. })
    }

    /// Whether another file may be opened.
    pub(super) fn has_room(&self) -> bool {
        self.open < SAVE_OPEN_FILES_MAX
    }

    /// Whether nothing is on its way to a file.
    pub(super) fn is_idle(&self) -> bool {
        self.pending == 0
    }

    /// Writes a small value that is a file.
    pub(super) fn document(&mut self, key: &str, contents: &[u8]) -> Result<()> {
        let path = self.make_dir_of(key)?;
        self.staged.write(&path, contents, self.durable.syncs())
    }

    /// A file that a task writes alone, until [`closed`](Self::closed).
    pub(super) fn alone(&mut self, key: &str) -> Result<(Arc<ValueFile>, RelPath)> {
        self.open += 1;
        match self.storage {
            Storage::Database { .. } => self.data_file(),
            Storage::Directories => {
                let path = self.make_dir_of(key)?;
                Ok((ValueFile::new(self.staged.file(&path)?, false), path))
            }
        }
    }

    /// A task has closed its file.
    pub(super) fn closed(&mut self) {
        self.open -= 1;
    }

    /// Takes note of a value that has a data file for itself.
    pub(super) fn add_alone(&mut self, key: String, path: RelPath, len: u64) {
        self.written.bytes += len;
        if self.in_database() {
            let file = self.written.add_file(path);
            self.written.entries.push((key.into(), Value::Extent(Extent { file, offset: 0, len })));
        }
    }

    /// Takes note of a value that lies in a node.
    pub(super) fn add_inline(&mut self, key: String, value: Bytes) {
        self.written.bytes += value.len() as u64;
        self.written.entries.push((key.into(), Value::Inline(value)));
    }

    /// Starts a value: where the last one ended in the data file at hand, in a new data file, or in a file of its own. An aligned
    /// one starts where direct reads can start.
    pub(super) fn begin(&mut self, key: &str, align: bool) -> Result<OpenValue> {
        let pending = Arc::new(AtomicUsize::new(1));
        let Storage::Database { data_file_bytes } = self.storage else {
            let path = self.make_dir_of(key)?;
            let file = ValueFile::new(self.staged.file(&path)?, false);
            self.open += 1;
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
                self.open += 1;
                let id = self.written.add_file(path);
                self.written.open.insert(DataFile { id, file, end: 0 })
            }
        };
        let start = if align { aligned(open.end) } else { open.end };
        let (file, place) = (Arc::clone(&open.file), Place::Data(open.id));
        Ok(OpenValue { file, place, start, len: 0, entries: Vec::new(), pending })
    }

    /// Has a piece of a value written, at an offset within the value; its memory is spare when it is. A worker copies it to the page
    /// cache, or a thread waits for the disk.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub(super) fn write(
        &mut self,
        pool: &ThreadPool,
        (value, at): (&OpenValue, u64),
        (body, tail): (Body, Vec<u8>),
        (room, spare): (WorkCredit, &Arc<Spare>),
        last: bool,
    ) -> Result<()> {
        let (file, to, offset) = (Arc::clone(&value.file), value.place.clone(), value.start + at);
        let own = matches!(to, Place::Own(_));
        let sync = self.durable.syncs() && own;
        let (pending, len) = (Arc::clone(&value.pending), (body.len() + tail.len()) as u64);
        if !last {
            pending.fetch_add(1, Ordering::AcqRel);
        }
        if let Place::Data(id) = to {
            let new = || Writing { file: Arc::clone(&file), pending: 0, full: false };
            self.writing.entry(id).or_insert_with(new).pending += 1;
        }
        self.pending += 1;
        let (tell, spare) = (Arc::clone(&self.tell), Arc::clone(spare));
        let waits = file.waits(&body, offset);
        let task = move || {
            let mut closed = false;
            let mut result = guarded(|| file.write((&body, &tail), offset));
            if pending.fetch_sub(1, Ordering::AcqRel) == 1 && own {
                closed = true;
                if sync && result.is_ok() {
                    result = guarded(|| file.sync());
                }
            }
            drop((file, tail));
            spare.keep_buffer(room, body.into_buffer());
            tell(Report::Written { to, result, closed });
        };
        match waits {
            true => started(&mut self.writer, "touchdown-write")?.run(task),
            false => {
                self.unflushed += len;
                pool.spawn(task);
            }
        }
        Ok(())
    }

    /// Ends a value whose last piece is on its way.
    pub(super) fn end(&mut self, key: String, value: &OpenValue) {
        self.written.bytes += value.len;
        if let (Place::Data(file), Some(open)) = (&value.place, &mut self.written.open) {
            open.end = value.start + value.len;
            let extent = Extent { file: *file, offset: value.start, len: value.len };
            self.written.entries.push((key.into(), Value::Extent(extent)));
        }
    }

    /// Takes a report; what failed, if something did.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub(super) fn heard(&mut self, report: Report) -> Result<Option<Error>> {
        self.pending -= 1;
        match report {
            Report::Written { to, result, closed } => {
                self.open -= usize::from(closed);
                let failed = match (result, &to) {
                    (Ok(()), _) => None,
                    (Err(error), Place::Data(file)) => {
                        Some(self.staged.failed(error, "write", self.written.path(*file)?))
                    }
                    (Err(error), Place::Own(path)) => Some(self.staged.failed(error, "write", path)),
                };
                if let Place::Data(file) = to {
                    if let Some(writing) = self.writing.get_mut(&file) {
                        writing.pending -= 1;
                    }
                    self.seal(file)?;
                    self.flush(file)?;
                }
                Ok(failed)
            }
            Report::Flushed { file, full, result } => {
                match full {
                    true => self.open -= 1,
                    false => self.flushing = false,
                }
                match result {
                    Ok(()) => Ok(None),
                    Err(error) => Ok(Some(self.staged.failed(error, "sync", self.written.path(file)?))),
                }
            }
        }
    }

    /// Makes a full data file durable and closes it, if nothing is being written to it any more.
    fn seal(&mut self, id: FileId) -> Result<()> {
        if !self.writing.get(&id).is_some_and(|writing| writing.full && writing.pending == 0) {
            return Ok(());
        }
        let Some(writing) = self.writing.remove(&id) else { return Ok(()) };
        if !self.durable.syncs() {
            self.open -= 1;
            return Ok(());
        }
        self.sync(writing.file, (id, true))
    }

    /// Has a data file made durable while others are encoded, so that little is left to wait for at the end.
    fn flush(&mut self, id: FileId) -> Result<()> {
        if !self.durable.syncs() || self.flushing || self.unflushed < FLUSH_BYTES {
            return Ok(());
        }
        let Some(writing) = self.writing.get(&id) else { return Ok(()) };
        let file = Arc::clone(&writing.file);
        (self.flushing, self.unflushed) = (true, 0);
        self.sync(file, (id, false))
    }

    fn sync(&mut self, synced: Arc<ValueFile>, (file, full): (FileId, bool)) -> Result<()> {
        let tell = Arc::clone(&self.tell);
        let task = move || {
            let result = guarded(|| synced.sync());
            drop(synced);
            tell(Report::Flushed { file, full, result });
        };
        started(&mut self.flusher, "touchdown-flush")?.run(task);
        self.pending += 1;
        Ok(())
    }

    fn data_file(&mut self) -> Result<(Arc<ValueFile>, RelPath)> {
        let (file, path) = new_data_file(self.staged, &self.dir)?;
        self.written.made_files.push(path.clone());
        Ok((ValueFile::new(file, self.durable == Durable::Direct), path))
    }

    /// The path of a value that is a file, after making its directories.
    fn make_dir_of(&mut self, key: &str) -> Result<RelPath> {
        let path = self.dir.join(key)?;
        if let Some((dir, _)) = key.rsplit_once('/') {
            let dir = self.dir.join(dir)?;
            if !self.written.made_dirs.contains(&dir) {
                self.staged.dir(&dir)?;
                self.written.made_dirs.insert(dir);
            }
        }
        self.written.made_files.push(path.clone());
        Ok(path)
    }
}

/// A data file of a database, with a name that no other has, as TensorStore names them.
pub(super) fn new_data_file(staged: &mut StagedDir, database: &RelPath) -> Result<(Box<dyn StoreFile>, RelPath)> {
    let dir = database.join("d")?;
    staged.dir(&dir)?;
    let path = dir.join(format!("{}{}", random_name()?, random_name()?))?;
    Ok((staged.file(&path)?, path))
}

/// The thread, started when it is first needed.
fn started<'a>(thread: &'a mut Option<DiskThread>, name: &str) -> Result<&'a DiskThread> {
    match thread {
        Some(thread) => Ok(thread),
        none => Ok(none.insert(DiskThread::new(name)?)),
    }
}

/// Does what a store does, which may panic.
fn guarded(operation: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
    let panicked = |_| Err(std::io::Error::other("the store panicked"));
    catch_unwind(AssertUnwindSafe(operation)).unwrap_or_else(panicked)
}

/// The next offset at which direct reads can start.
pub(super) const fn aligned(at: u64) -> u64 {
    at.next_multiple_of(ALIGN_BYTES)
}

/// Bytes that are written before the disk is asked to make them durable in the background: enough for it to work at full speed.
const FLUSH_BYTES: u64 = 64 << 20;
