//! What the machine can do with the bytes of a plan: read them, decode them, write and copy as many.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::devices::Gauges;
use super::{Clock, Measured, Sample};
use crate::decode;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Buffer, OpenFile, Root, read_error};
use crate::limits::READER_THREADS_MIN;
use crate::plan::{Device, Plan, Source, Unit};
use crate::tree::Checkpoint;
use crate::tree::land::inner_chunk;
use crate::tree::state::Report;

/// What is measured of the machine.
pub(super) struct Machine {
    root: Arc<Root>,
    files: Vec<OpenFile>,
    /// File, offset and length of reads, none longer than [`PIECE`].
    ranges: Vec<Range>,
    units: Vec<Encoded>,
    chains: Vec<Chain>,
    result_bytes: usize,
    workers: usize,
    pool: ThreadPool,
    cold: bool,
    largest: Duration,
    read: Vec<Sample>,
    direct: Vec<Sample>,
    one: Vec<Sample>,
    all: Vec<Sample>,
    fill: Vec<Sample>,
    copy: Vec<Sample>,
}

/// A unit that is decoded.
struct Encoded {
    unit: Unit,
    /// Of the plan; it says which chain decodes the unit.
    array: usize,
    /// Whether one core decodes it, too.
    alone: bool,
}

/// How the units of an array are decoded.
struct Chain {
    codecs: Arc<[crate::zarr::ByteCodec]>,
    single: Option<crate::plan::SingleShard>,
}

impl Machine {
    /// Opens the files of a plan.
    ///
    /// # Errors
    /// Files that are missing, no threads.
    pub(super) fn new(checkpoint: &Checkpoint, plan: &Plan, workers: usize, cold: bool) -> Result<Self> {
        let root = checkpoint.root();
        let open = |path| {
            root.file(path)?.ok_or_else(|| Error::not_found("a data file is missing").at("file", root.shown(path)))
        };
        let files = plan.files.iter().map(open).collect::<Result<Vec<_>>>()?;
        let mut ranges = Vec::new();
        for read in plan.batches.iter().filter_map(|batch| batch.read) {
            let mut at = 0;
            while at < read.len {
                let len = (read.len - at).min(PIECE as u64);
                ranges.push((read.file as usize, read.offset + at, usize::try_from(len).unwrap_or(PIECE)));
                at += len;
            }
        }
        let chains: Vec<Chain> =
            plan.arrays.iter().map(|array| Chain { codecs: Arc::clone(&array.codecs), single: array.single }).collect();
        let encoded = |unit: &&Unit| {
            let stored = matches!(unit.source, Source::File { .. }) && unit.whole;
            stored && !chains[unit.array as usize].codecs.is_empty()
        };
        let mut units: Vec<Encoded> = plan
            .units
            .iter()
            .filter(encoded)
            .map(|unit| Encoded { unit: unit.clone(), array: unit.array as usize, alone: false })
            .collect();
        choose_alone(&mut units);
        let pool = ThreadPoolBuilder::new()
            .num_threads(workers)
            .build()
            .map_err(|error| Error::new(ErrorKind::Io, "the system starts no more threads").caused_by(error))?;
        let result_bytes = usize::try_from(plan.bytes_logical()).unwrap_or(MEMORY_MAX).clamp(1, MEMORY_MAX);
        Ok(Self {
            root,
            files,
            ranges,
            units,
            chains,
            result_bytes,
            workers,
            pool,
            cold,
            largest: Duration::ZERO,
            read: Vec::new(),
            direct: Vec::new(),
            one: Vec::new(),
            all: Vec::new(),
            fill: Vec::new(),
            copy: Vec::new(),
        })
    }

    /// Measures everything once, and remembers it if it counts.
    ///
    /// # Errors
    /// Whatever fails.
    pub(super) fn round(&mut self, counts: bool) -> Result<()> {
        self.prepare()?;
        let read = self.read(&|file| Some(file.file()))?;
        self.prepare()?;
        let direct = self.read_directly()?;
        let (one, all, largest) = self.decode()?;
        let (fill, copy) = self.memory()?;
        if counts {
            self.read.extend(read);
            self.direct.extend(direct);
            self.one.extend(one);
            self.all.extend(all);
            self.largest = self.largest.max(largest);
            self.fill.push(fill);
            self.copy.push(copy);
        }
        Ok(())
    }

    /// Empties the page cache of the files, if that is how they are measured, and sees that it is empty.
    ///
    /// # Errors
    /// A cache that keeps what it should drop.
    pub(super) fn prepare(&self) -> Result<()> {
        if !self.cold {
            return Ok(());
        }
        for file in &self.files {
            let failed = |error: std::io::Error| {
                Error::new(ErrorKind::Io, "a file cannot be dropped from the page cache")
                    .at("file", self.root.shown(file.path()))
                    .caused_by(error)
            };
            file.file().sync_all().map_err(failed)?;
            rustix::fs::fadvise(file.file(), 0, None, rustix::fs::Advice::DontNeed)
                .map_err(|errno| failed(errno.into()))?;
            let cached = cached(file);
            if cached.is_none_or(|cached| cached > file.size() / COLD_SHARE) {
                return Err(Error::new(ErrorKind::Io, "the page cache keeps what it should drop")
                    .at("file", self.root.shown(file.path()))
                    .expected(format_args!("less than one part in {COLD_SHARE} of it cached"))
                    .found(cached.map_or("a kernel that does not tell".to_owned(), |bytes| format!("{bytes} bytes")))
                    .hint("measure without `--cold`, or have nobody else use the file"));
            }
        }
        Ok(())
    }

    /// Plain positioned reads on all cores, nothing done with the bytes; `None` without anything to read.
    fn read<'f>(&'f self, file: &(dyn Fn(&'f OpenFile) -> Option<&'f File> + Sync)) -> Result<Option<Sample>> {
        self.read_ranges(PIECE, &|buffer, (number, offset, len)| {
            let open = &self.files[number];
            let Some(file) = file(open) else { return Ok(()) };
            file.read_exact_at(&mut buffer[..len], offset)
                .map_err(|error| read_error(error, &self.root.shown(open.path()), offset, len as u64, open.size()))
        })
    }

    /// The same past the page cache, in whole blocks; `None` where the file system has no such reads.
    #[cfg(feature = "uring")]
    fn read_directly(&self) -> Result<Option<Sample>> {
        let direct: Option<Vec<_>> = self.files.iter().map(OpenFile::open_direct).collect();
        let Some(direct) = direct.filter(|_| self.cold) else { return Ok(None) };
        let room = PIECE + 2 * usize::try_from(crate::limits::ALIGN_BYTES).unwrap_or(0);
        self.read_ranges(room, &|buffer, (number, offset, len)| {
            let (file, align) = (direct[number].file(), direct[number].align());
            let first = offset - offset % align;
            let len = (offset + len as u64).next_multiple_of(align) - first;
            // The last block of a file ends where the file does.
            let read = file.read_at(&mut buffer[..usize::try_from(len).unwrap_or(room)], first);
            read.map(drop)
                .map_err(|error| read_error(error, &self.root.shown(self.files[number].path()), first, len, u64::MAX))
        })
    }

    /// Has a thread a core, and at least a few, read all ranges (file, offset, length), each into a buffer of its own; `None` without any.
    fn read_ranges(
        &self,
        room: usize,
        read: &(dyn Fn(&mut Buffer, Range) -> Result<()> + Sync),
    ) -> Result<Option<Sample>> {
        let next = AtomicUsize::new(0);
        let threads = self.workers.max(READER_THREADS_MIN);
        let buffers = (0..threads).map(|_| Buffer::zeroed(room)).collect::<Result<Vec<_>>>()?;
        let clock = Clock::start();
        let work = |mut buffer: Buffer| -> Result<()> {
            while let Some(range) = self.ranges.get(next.fetch_add(1, Ordering::Relaxed)) {
                read(&mut buffer, *range)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = buffers.into_iter().map(|buffer| scope.spawn(|| work(buffer))).collect();
            let panicked = || Err(Error::bug("a reading thread panicked"));
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| panicked()))
        })?;
        let bytes = self.ranges.iter().map(|(.., len)| *len as u64).sum();
        Ok((bytes > 0).then(|| clock.stop(bytes)))
    }

    #[cfg(not(feature = "uring"))]
    fn read_directly(&self) -> Result<Option<Sample>> {
        Ok(None)
    }

    /// Decodes every encoded unit on all cores, and a share of them on one, a group of them at a time so that their bytes fit in
    /// memory; and the longest that one took.
    fn decode(&self) -> Result<(Option<Sample>, Option<Sample>, Duration)> {
        let (mut one, mut all, mut largest) = (Sample::default(), Sample::default(), Duration::ZERO);
        let scratch = self.units.iter().map(|encoded| encoded.unit.decoded_bytes).max().unwrap_or(0);
        let scratch = usize::try_from(scratch).unwrap_or(usize::MAX);
        let mut own = Buffer::zeroed(scratch)?;
        own.fill(1);
        let mut rest = self.units.as_slice();
        while !rest.is_empty() {
            let mut group = Vec::new();
            let mut held = 0;
            while let Some((encoded, after)) = rest.split_first()
                && (held == 0 || held + encoded.unit.stored_bytes() <= GROUP_BYTES)
            {
                held += encoded.unit.stored_bytes();
                group.push((encoded, &self.chains[encoded.array], self.stored(&encoded.unit)?));
                rest = after;
            }
            let clock = Clock::start();
            let mut bytes = 0;
            for (Encoded { unit, .. }, chain, stored) in group.iter().filter(|(encoded, ..)| encoded.alone) {
                let start = Instant::now();
                decode_unit(unit, chain, stored, &mut own)?;
                largest = largest.max(start.elapsed());
                bytes += unit.decoded_bytes;
            }
            add(&mut one, &clock.stop(bytes));
            let bytes: u64 = group.iter().map(|(encoded, ..)| encoded.unit.decoded_bytes).sum();
            let buffers = || {
                let mut buffer = Buffer::zeroed(scratch)?;
                buffer.fill(1);
                Ok(buffer)
            };
            let all_sample = self.pool.install(|| {
                // Every worker has touched its memory before the clock starts.
                let buffers: Vec<std::sync::Mutex<Buffer>> =
                    (0..self.workers).map(|_| buffers().map(std::sync::Mutex::new)).collect::<Result<_>>()?;
                let clock = Clock::start();
                group.par_iter().try_for_each(|(Encoded { unit, .. }, chain, stored)| {
                    let worker = rayon::current_thread_index().unwrap_or(0);
                    let mut buffer = buffers[worker].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    decode_unit(unit, chain, stored, &mut buffer)
                })?;
                Ok::<_, Error>(clock.stop(bytes))
            })?;
            add(&mut all, &all_sample);
        }
        let measured = |sample: Sample| (sample.bytes > 0).then_some(sample);
        Ok((measured(one), measured(all), largest))
    }

    fn stored(&self, unit: &Unit) -> Result<Vec<u8>> {
        let Source::File { file, offset, len } = unit.source else { return Ok(Vec::new()) };
        let file = &self.files[file as usize];
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| Error::corrupt("a chunk is too large"))?];
        file.file()
            .read_exact_at(&mut bytes, offset)
            .map_err(|error| read_error(error, &self.root.shown(file.path()), offset, len, file.size()))?;
        Ok(bytes)
    }

    /// Writes fresh memory, as large as the result up to a bound, and copies it.
    fn memory(&self) -> Result<(Sample, Sample)> {
        let part = self.result_bytes.div_ceil(self.workers).max(1);
        let clock = Clock::start();
        let mut fresh = Buffer::zeroed(self.result_bytes)?;
        self.pool.scope(|scope| fresh.chunks_mut(part).for_each(|part| scope.spawn(|_| part.fill(0xA5))));
        let fill = clock.stop(self.result_bytes as u64);
        let mut other = Buffer::zeroed(self.result_bytes)?;
        self.pool.scope(|scope| other.chunks_mut(part).for_each(|part| scope.spawn(|_| part.fill(0x5A))));
        let clock = Clock::start();
        self.pool.scope(|scope| {
            for (to, from) in other.chunks_mut(part).zip(fresh.chunks(part)) {
                scope.spawn(|_| to.copy_from_slice(from));
            }
        });
        Ok((fill, clock.stop(self.result_bytes as u64)))
    }

    /// The slowest stage that a load cannot avoid, and how long it takes by itself.
    pub(super) fn limit(&self, report: &Report, gauges: &Gauges<'_>) -> (&'static str, Duration) {
        let rate = |samples: &Vec<Sample>| Measured { name: "", samples: samples.clone() }.rate();
        let time = |bytes: u64, rate: f64| Duration::from_secs_f64(if rate > 0.0 { bytes as f64 / rate } else { 0.0 });
        let read = time(report.bytes_read, rate(&self.read).max(rate(&self.direct)));
        // On all cores at best, but a unit is decoded by one.
        let decode = match self.units.is_empty() {
            true => Duration::ZERO,
            false => {
                let alone = time(report.bytes_decoded, rate(&self.one));
                (alone / u32::try_from(self.workers).unwrap_or(1)).max(self.largest.min(alone))
            }
        };
        let on_gpus = |(device, bytes): &(Device, u64)| device.gpu().map_or(0, |_| *bytes);
        let held: u64 = report.devices.iter().map(|(_, bytes)| bytes).sum();
        let on_gpus: u64 = report.devices.iter().map(on_gpus).sum();
        // What is on devices is not written to host memory. Replicas cross the bus once, and casts on whichever side is smaller.
        let host_share = 1.0 - on_gpus as f64 / held.max(1) as f64;
        let write = time(report.bytes_logical, rate(&self.fill)).mul_f64(host_share);
        let crossing = report.bytes_logical.min(report.bytes_decoded);
        let upload = gauges.upload_time(crossing).mul_f64(1.0 - host_share);
        [("read", read), ("decode", decode), ("write", write), ("upload", upload)]
            .into_iter()
            .max_by_key(|(_, time)| *time)
            .unwrap_or_default()
    }

    /// The longest that one unit took.
    pub(super) fn largest_unit(&self) -> Duration {
        self.largest
    }

    /// Everything that was measured, under its name.
    pub(super) fn measured(self) -> Vec<Measured> {
        let all = [
            ("read", self.read),
            ("read, direct", self.direct),
            ("decode, one core", self.one),
            ("decode, all cores", self.all),
            ("write fresh memory", self.fill),
            ("copy memory", self.copy),
        ];
        all.into_iter()
            .filter(|(_, samples)| !samples.is_empty())
            .map(|(name, samples)| Measured { name, samples })
            .collect()
    }
}

/// One core decodes so many units, evenly distributed, and the largest one.
fn choose_alone(units: &mut [Encoded]) {
    let all: u64 = units.iter().map(|encoded| encoded.unit.decoded_bytes).sum();
    let every = usize::try_from(all.div_ceil(ALONE_BYTES)).unwrap_or(usize::MAX).max(1);
    units.iter_mut().step_by(every).for_each(|encoded| encoded.alone = true);
    if let Some(largest) = units.iter_mut().max_by_key(|encoded| encoded.unit.decoded_bytes) {
        largest.alone = true;
    }
}

fn decode_unit(unit: &Unit, chain: &Chain, stored: &[u8], out: &mut [u8]) -> Result<()> {
    let stored = match (unit.indexed, chain.single) {
        (true, Some(single)) => match inner_chunk(stored, single)? {
            Some(inner) => &stored[inner],
            None => return Ok(()),
        },
        _ => stored,
    };
    let out = usize::try_from(unit.decoded_bytes).ok().and_then(|len| out.get_mut(..len));
    let out = out.ok_or_else(|| Error::bug("a unit is larger than the largest"))?;
    Ok(decode::decode_all(&chain.codecs, stored, out, true)?)
}

fn add(sum: &mut Sample, part: &Sample) {
    sum.elapsed += part.elapsed;
    sum.cpu += part.cpu;
    sum.bytes += part.bytes;
}

#[cfg(feature = "uring")]
fn cached(file: &OpenFile) -> Option<u64> {
    crate::io::cached_bytes(file.file(), file.size())
}

#[cfg(not(feature = "uring"))]
fn cached(_: &OpenFile) -> Option<u64> {
    None
}

/// Bytes of one read: where reads reach full speed.
const PIECE: usize = 4 << 20;

/// About how many decoded bytes one core is measured with, so that large checkpoints do not take minutes.
const ALONE_BYTES: u64 = 1 << 30;

/// Encoded bytes that are held in memory at once while they are decoded.
const GROUP_BYTES: u64 = 256 << 20;

/// Most memory that is written and copied: more than any cache.
const MEMORY_MAX: usize = 1 << 30;

/// A file of which at most one part in so many is cached is cold.
const COLD_SHARE: u64 = 100;

/// A part of a file: which, where, how long.
type Range = (usize, u64, usize);
