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

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use rayon::ThreadPool;

use super::array::{ArrayJob, Body, Payload, Unit, Units};
use super::files::{self, Durable, Files, OpenValue, Storage, Written, aligned};
use super::job::Progress;
use super::spare::{Spare, WorkCredit};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Budget, StagedDir};
use crate::kv::Value;
use crate::layout::orbax::metadata::key_prefix;
use crate::limits::{ALIGNED_VALUE_BYTES_MIN, SAVE_INLINE_BYTES_MAX, TASKS_PER_WORKER};
use crate::relpath::RelPath;
use crate::zarr::Endian;
use crate::zarr::shard::encode_index;

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
    pub(in crate::tree) durable: Durable,
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
    let Context { pool, budget, progress, staged, dir, storage, durable } = context;
    let files = {
        let send = send.clone();
        // The driver waits for every report, so somebody receives it.
        let tell = Arc::new(move |report| _ = send.send(Report::File(report)));
        Files::new(staged, (dir, storage), durable, written, tell)
    };
    let mut drive = Drive {
        jobs,
        pool,
        budget,
        progress,
        sync: durable.syncs(),
        units: Units::new(jobs, budget.total()),
        send,
        receive,
        spare: Arc::default(),
        encoded: BTreeMap::new(),
        admitted: 0,
        placed: 0,
        encoding: 0,
        error: None,
        value: None,
        files,
    };
    drive.run()?;
    Ok(drive.files.written)
}

/// What a task reports.
enum Report {
    Encoded { number: u64, encoded: Result<Encoded>, streamed: bool },
    File(files::Report),
}

/// A unit that is ready to be placed.
struct Encoded {
    unit: Unit,
    payload: Payload,
    room: WorkCredit,
}

struct Drive<'a> {
    jobs: &'a Arc<Vec<ArrayJob>>,
    pool: &'a ThreadPool,
    budget: &'a Arc<Budget>,
    progress: &'a Arc<Progress>,
    sync: bool,
    units: Units<'a>,
    send: Sender<Report>,
    receive: Receiver<Report>,
    spare: Arc<Spare>,
    /// Encoded units by number that wait for earlier ones.
    encoded: BTreeMap<u64, Encoded>,
    admitted: u64,
    placed: u64,
    /// Tasks that encode and have not reported.
    encoding: usize,
    error: Option<(u64, Error)>,
    /// The value whose inner chunks are being placed.
    value: Option<OpenValue>,
    files: Files<'a>,
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
            if self.is_idle() {
                break;
            }
            match self.receive.recv().map_err(|_| Error::bug("the tasks of a save are gone"))? {
                Report::Encoded { number, encoded, streamed } => self.heard(number, encoded, streamed),
                Report::File(report) => {
                    if let Some(error) = self.files.heard(report)? {
                        self.fail(u64::MAX, error);
                    }
                }
            }
            while self.files.has_room()
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
        self.progress.refuse_if_cancelled()
    }

    fn heard(&mut self, number: u64, encoded: Result<Encoded>, streamed: bool) {
        self.encoding -= 1;
        if streamed {
            self.files.closed();
        }
        match encoded {
            Ok(encoded) => _ = self.encoded.insert(number, encoded),
            Err(error) => self.fail(number, error),
        }
    }

    /// Whether no task is left.
    fn is_idle(&self) -> bool {
        self.encoding == 0 && self.files.is_idle()
    }

    fn stopping(&self) -> bool {
        self.error.is_some() || self.progress.is_cancelled()
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
            if !self.files.in_database() {
                self.files.document(&key, &document)?;
                continue;
            }
            let document = match documents.get(document.as_slice()) {
                Some(document) => document.clone(),
                None => {
                    let document = Bytes::from(document);
                    documents.insert(document.clone());
                    document
                }
            };
            self.files.written.entries.push((key.into_bytes().into(), Value::Inline(document)));
        }
        Ok(())
    }

    /// Starts a unit, or gives it back if there is no room for it now.
    fn admit(&mut self, unit: Unit) -> Result<Option<Unit>> {
        let (job, cost, budget) = (&self.jobs[unit.array], unit.cost, self.budget);
        let workers = self.pool.current_num_threads();
        if self.encoding >= workers * TASKS_PER_WORKER || cost.streamed() && !self.files.has_room() {
            return Ok(Some(unit));
        }
        let Some((held, room)) = self.spare.take(job, cost, budget) else {
            if self.is_idle() && budget.total() < cost.total() {
                return Err(job.over_budget(budget.total()).unwrap_or_else(|| Error::bug("a unit has no room")));
            }
            if self.encoding == 0 {
                // Better no encoder that waits than none that works.
                self.spare.clear();
                return if self.is_idle() { self.admit(unit) } else { Ok(Some(unit)) };
            }
            return Ok(Some(unit));
        };
        let number = self.admitted;
        self.admitted += 1;
        let own = match cost.streamed() {
            true => Some(self.files.alone(&stored_key(&job.name, &job.keys.key(&unit.chunk)))?),
            false => None,
        };
        let (jobs, spare, progress, sync) =
            (Arc::clone(self.jobs), Arc::clone(&self.spare), Arc::clone(self.progress), self.sync);
        self.spawn(number, cost.streamed(), move || {
            let job = &jobs[unit.array];
            let mut encoder = spare.encoder(&held)?;
            let payload = match own {
                Some((file, path)) => {
                    let streamed = job.stream(&unit, &mut encoder, (&*file, &path), &progress);
                    streamed.and_then(|len| match if sync { file.sync() } else { Ok(()) } {
                        Ok(()) => Ok(Payload::File(path, len)),
                        Err(error) => {
                            Err(Error::new(ErrorKind::Io, "cannot sync a file").at("file", &path).caused_by(error))
                        }
                    })
                }
                None => job.encode(&unit, &mut encoder, spare.buffer(&room), &progress),
            };
            spare.keep_encoder(held, encoder);
            let payload =
                payload.map_err(|error| error.at("chunk", format_args!("{:?}", unit.chunk)).at("array", &job.name))?;
            Ok(Encoded { unit, payload, room })
        });
        Ok(None)
    }

    fn spawn(&mut self, number: u64, streamed: bool, task: impl FnOnce() -> Result<Encoded> + Send + 'static) {
        self.encoding += 1;
        let send = self.send.clone();
        self.pool.spawn(move || {
            let encoded = catch_unwind(AssertUnwindSafe(task)).unwrap_or_else(|_| Err(Error::bug("a worker panicked")));
            // The driver waits for every report, so somebody receives it.
            let _ = send.send(Report::Encoded { number, encoded, streamed });
        });
    }

    /// Gives an encoded unit its place and has it written.
    fn place(&mut self, encoded: Encoded) -> Result<()> {
        let Encoded { unit, payload, room } = encoded;
        let job = &self.jobs[unit.array];
        let key = stored_key(&job.name, &job.keys.key(&unit.chunk));
        let (body, mut tail) = match payload {
            Payload::File(path, len) => {
                self.files.add_alone(key, path, len);
                return Ok(());
            }
            Payload::Bytes(body, tail) => (body, tail),
            Payload::Absent => (Body::Plain(Bytes::new()), Vec::new()),
        };
        let len = (body.len() + tail.len()) as u64;
        if self.files.in_database() && job.inline && unit.of == 1 && len <= SAVE_INLINE_BYTES_MAX {
            self.files.add_inline(key, [&body[..], &tail].concat().into());
            return Ok(());
        }
        // A value with inner chunks, or a large one, is aligned: any of the inner chunks may be worth a read of its own.
        let mut value = match self.value.take() {
            Some(value) => value,
            None => self.files.begin(&key, unit.of > 1 || len >= ALIGNED_VALUE_BYTES_MIN)?,
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
        self.files.write(self.pool, (&value, at), (body, tail), (room, &self.spare), last)?;
        match last {
            true => self.files.end(key, &value),
            false => self.value = Some(value),
        }
        Ok(())
    }
}

/// The key of a value: the array's prefix and the rest.
pub(super) fn stored_key(name: &str, rest: &str) -> String {
    format!("{}{rest}", key_prefix(name))
}
