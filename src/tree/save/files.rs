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
use super::flush::Flusher;
use super::item::Item;
use super::options::SaveOptions;
use super::spare::{Room, Spare};
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
    file: Arc<dyn StoreFile>,
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
    file: Arc<dyn StoreFile>,
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
    sync: bool,
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
    flusher: Option<Flusher<(FileId, bool)>>,
    flushing: bool,
}

impl<'a> Files<'a> {
    pub(super) fn new(
        staged: &'a mut StagedDir,
        (dir, storage): (RelPath, Storage),
        sync: bool,
        written: Written,
        tell: Tell,
    ) -> Self {
        let open = usize::from(written.open.is_some());
        let (writing, unflushed, flusher, flushing) = (HashMap::new(), 0, None, false);
        Self { staged, dir, storage, sync, tell, written, open, pending: 0, writing, unflushed, flusher, flushing }
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
        self.staged.write(&path, contents, self.sync)
    }

    /// A file that a task writes alone, until [`closed`](Self::closed).
    pub(super) fn alone(&mut self, key: &str) -> Result<(Arc<dyn StoreFile>, RelPath)> {
        self.open += 1;
        match self.storage {
            Storage::Database { .. } => self.data_file(),
            Storage::Directories => {
                let path = self.make_dir_of(key)?;
                Ok((Arc::from(self.staged.file(&path)?), path))
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
            let file = Arc::from(self.staged.file(&path)?);
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

    /// Has a piece of a value written on a worker, at an offset within the value; its memory is spare when it is.
    pub(super) fn write(
        &mut self,
        pool: &ThreadPool,
        (value, at): (&OpenValue, u64),
        (body, tail): (Body, Vec<u8>),
        (room, spare): (Room, &Arc<Spare>),
        last: bool,
    ) {
        let (file, to, offset) = (Arc::clone(&value.file), value.place.clone(), value.start + at);
        let own = matches!(to, Place::Own(_));
        let sync = self.sync && own;
        let pending = Arc::clone(&value.pending);
        if !last {
            pending.fetch_add(1, Ordering::AcqRel);
        }
        if let Place::Data(id) = to {
            let new = || Writing { file: Arc::clone(&file), pending: 0, full: false };
            self.writing.entry(id).or_insert_with(new).pending += 1;
        }
        self.pending += 1;
        self.unflushed += (body.len() + tail.len()) as u64;
        let (tell, spare) = (Arc::clone(&self.tell), Arc::clone(spare));
        pool.spawn(move || {
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
            drop((file, tail));
            spare.keep_room(room, body.into_buffer());
            tell(Report::Written { to, result, closed });
        });
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
        if !self.sync {
            self.open -= 1;
            return Ok(());
        }
        self.flusher()?.flush(writing.file, (id, true));
        self.pending += 1;
        Ok(())
    }

    /// Has a data file made durable while others are encoded, so that little is left to wait for at the end.
    fn flush(&mut self, id: FileId) -> Result<()> {
        if !self.sync || self.flushing || self.unflushed < FLUSH_BYTES {
            return Ok(());
        }
        let Some(writing) = self.writing.get(&id) else { return Ok(()) };
        let file = Arc::clone(&writing.file);
        self.flusher()?.flush(file, (id, false));
        (self.flushing, self.unflushed) = (true, 0);
        self.pending += 1;
        Ok(())
    }

    fn flusher(&mut self) -> Result<&Flusher<(FileId, bool)>> {
        match &mut self.flusher {
            Some(flusher) => Ok(flusher),
            none => {
                let tell = Arc::clone(&self.tell);
                let done = move |result, (file, full)| tell(Report::Flushed { file, full, result });
                Ok(none.insert(Flusher::new(done)?))
            }
        }
    }

    fn data_file(&mut self) -> Result<(Arc<dyn StoreFile>, RelPath)> {
        let (file, path) = new_data_file(self.staged, &self.dir)?;
        self.written.made_files.push(path.clone());
        Ok((file, path))
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
pub(super) fn new_data_file(staged: &mut StagedDir, database: &RelPath) -> Result<(Arc<dyn StoreFile>, RelPath)> {
    let dir = database.join("d")?;
    staged.dir(&dir)?;
    let path = dir.join(format!("{}{}", random_name()?, random_name()?))?;
    Ok((Arc::from(staged.file(&path)?), path))
}

fn panicked() -> std::io::Error {
    std::io::Error::other("a worker panicked")
}

/// The next offset at which direct reads can start.
pub(super) const fn aligned(at: u64) -> u64 {
    at.next_multiple_of(ALIGN_BYTES)
}

/// Bytes that are written before the disk is asked to make them durable in the background: enough for it to work at full speed.
const FLUSH_BYTES: u64 = 64 << 20;
