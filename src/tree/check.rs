//! Units of plans for `verify` and `seal`: read, checked, decoded, and forgotten.
//!
//! What is stored once is looked at once, however many chunks refer to it: nobody has asked for the array's real size here, so
//! that a kilobyte which a million chunks share must cost a kilobyte's work. Chunks that share bytes but differ in their ends or in how they are decoded are damage.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::land::{inner_of, located, usize_of};
use crate::decode::{self, Decoder};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::{OpenFile, Ring, Root, Slot, read_error, short_file};
use crate::layout::orbax::sums::ValueSum;
use crate::limits::ZSTD_WINDOW_LOG_MAX;
use crate::plan::{Plan, SingleShard, Source, Unit, UnitArray};
use crate::relpath::RelPath;
use crate::zarr::ByteCodec;

/// Does something with every unit of these plans, on so many threads, and with the file that it is in, which is there and long
/// enough; of units that are the same stored bytes, decoded in the same way, only with the first. What comes of each, in order;
/// errors say where.
pub(super) fn each_unit<T: Clone + Send>(
    plans: &[Plan],
    root: &Root,
    workers: usize,
    work: impl Fn(&Plan, &Unit, Option<&OpenFile>) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let units: Vec<(&Plan, &Unit)> =
        plans.iter().flat_map(|plan| plan.units.iter().map(move |unit| (plan, unit))).collect();
    let roles = roles(&units);
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Result<T>)>> = Mutex::new(Vec::with_capacity(units.len()));
    let some = || {
        while let Some(number) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < units.len()) {
            let (plan, unit) = units[number];
            let result = match roles[number] {
                Role::First => file_of(plan, unit, root).and_then(|file| work(plan, unit, file.as_ref())),
                Role::SameAs(_) => continue,
                Role::Overlaps { other } => Err(overlap(units[other])),
            };
            done.lock().unwrap_or_else(PoisonError::into_inner).push((number, result));
        }
    };
    std::thread::scope(|scope| {
        // Where no more threads can be had, those that are there do it.
        let spawn = || std::thread::Builder::new().spawn_scoped(scope, some);
        let _ = (1..workers.min(units.len())).try_for_each(|_| spawn().map(drop));
        some();
    });
    let firsts: HashMap<usize, Result<T>> =
        done.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect();
    let result_of = |number: usize| {
        let first = match roles[number] {
            Role::SameAs(first) => first,
            Role::First | Role::Overlaps { .. } => number,
        };
        let (plan, unit) = units[number];
        match firsts.get(&first) {
            Some(Ok(value)) => Ok(value.clone()),
            Some(Err(error)) => Err(located(error.duplicate(), plan, unit)),
            None => Err(Error::bug("a stored unit was passed over")),
        }
    };
    (0..units.len()).map(result_of).collect()
}

/// What is done with a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It is looked at.
    First,
    /// It is what that unit is, which is looked at.
    SameAs(usize),
    /// It shares some bytes with that unit, but is another.
    Overlaps { other: usize },
}

fn roles(units: &[(&Plan, &Unit)]) -> Vec<Role> {
    let mut roles = vec![Role::First; units.len()];
    let mut inline: HashMap<(&[u8], Reading<'_>), usize> = HashMap::new();
    let mut stored: Vec<(&RelPath, u64, u64, usize)> = Vec::new();
    for (number, (plan, unit)) in units.iter().enumerate() {
        match &unit.source {
            Source::Inline(bytes) => {
                let first = *inline.entry((bytes, Reading::of(units[number]))).or_insert(number);
                roles[number] = if first == number { Role::First } else { Role::SameAs(first) };
            }
            Source::File { file, offset, len: len @ 1.. } => {
                stored.push((&plan.files[*file as usize], *offset, *len, number));
            }
            Source::File { .. } | Source::Fill(_) => (),
        }
    }
    stored.sort_unstable();
    let mut last: Option<(&RelPath, u64, u64, usize)> = None;
    for (path, offset, len, number) in stored {
        // Those that are looked at do not overlap, so that the last of them is the only one that this one can reach into.
        let before = last.filter(|(before, start, bytes, _)| *before == path && offset < start.saturating_add(*bytes));
        let Some((_, start, bytes, other)) = before else {
            last = Some((path, offset, len, number));
            continue;
        };
        let same = (start, bytes) == (offset, len) && Reading::of(units[other]) == Reading::of(units[number]);
        roles[number] = if same { Role::SameAs(other) } else { Role::Overlaps { other } };
    }
    roles
}

/// How the stored bytes of a unit are checked and decoded: all that [`check_unit`] knows of it but the bytes.
#[derive(PartialEq, Eq, Hash)]
struct Reading<'a> {
    skip: u64,
    decoded_bytes: u64,
    whole: bool,
    indexed: bool,
    sum: Option<ValueSum>,
    bools: bool,
    codecs: &'a [ByteCodec],
    single: Option<SingleShard>,
    every_chunk_stored: bool,
}

impl<'a> Reading<'a> {
    fn of((plan, unit): (&'a Plan, &'a Unit)) -> Self {
        let array = &plan.arrays[unit.array as usize];
        Self {
            skip: unit.skip,
            decoded_bytes: unit.decoded_bytes,
            whole: unit.whole,
            indexed: unit.indexed,
            sum: unit.sum,
            bools: array.dtype == DType::Bool,
            codecs: &array.codecs,
            single: array.single,
            every_chunk_stored: array.every_chunk_stored,
        }
    }
}

fn overlap((plan, other): (&Plan, &Unit)) -> Error {
    let array = &plan.arrays[other.array as usize].name;
    Error::corrupt("a stored chunk shares bytes with another, from which it differs")
        .found(format_args!("bytes of chunk {:?} of {array}", other.chunk))
}

/// The file of a unit, if it is in one.
fn file_of(plan: &Plan, unit: &Unit, root: &Root) -> Result<Option<OpenFile>> {
    let Source::File { file, offset, len } = unit.source else { return Ok(None) };
    let path = &plan.files[file as usize];
    let open = root
        .file(path)?
        .ok_or_else(|| Error::not_found("a data file of the checkpoint is missing").at("file", root.shown(path)))?;
    match offset.checked_add(len).filter(|end| *end <= open.size()) {
        Some(_) => Ok(Some(open)),
        None => Err(short_file(&root.shown(path), offset, len, open.size())),
    }
}

/// Reads a unit in pieces of a slot, checks and decodes it, and keeps nothing but the checksum of what is stored, its offset
/// counted from the source: that of a shard's inner chunk, where the unit is a shard that has one.
pub(super) fn check_unit(
    plan: &Plan,
    unit: &Unit,
    file: Option<&OpenFile>,
    root: &Root,
    ring: &Arc<Ring>,
) -> Result<ValueSum> {
    let array = &plan.arrays[unit.array as usize];
    let mut checked = Checked {
        unit,
        array,
        out: ring.slot()?,
        decoder: None,
        read: 0,
        written: 0,
        sum: ValueSum { offset: 0, len: 0, crc: 0 },
    };
    match (&unit.source, file) {
        (Source::Fill(_), _) => return Ok(checked.sum),
        (Source::Inline(bytes), _) => checked.feed(bytes)?,
        (Source::File { offset, len, .. }, Some(file)) => {
            let mut slot = ring.slot()?;
            let mut at = 0;
            // At least once: an empty file is no encoding of anything, which only the decoder can say.
            loop {
                let part = usize_of((*len - at).min(slot.len() as u64))?;
                let from = offset + at;
                file.file()
                    .read_exact_at(&mut slot[..part], from)
                    .map_err(|error| read_error(error, &root.shown(file.path()), from, part as u64, file.size()))?;
                checked.feed(&slot[..part])?;
                at += part as u64;
                if at >= *len {
                    break;
                }
            }
        }
        (Source::File { .. }, None) => return Err(Error::bug("a unit has no file")),
    }
    checked.finish()
}

/// A unit whose stored bytes come piece by piece.
struct Checked<'a> {
    unit: &'a Unit,
    array: &'a UnitArray,
    out: Slot,
    decoder: Option<Box<dyn Decoder>>,
    read: u64,
    written: u64,
    sum: ValueSum,
}

impl Checked<'_> {
    fn feed(&mut self, piece: &[u8]) -> Result<()> {
        // A shard that carries its own index comes in one piece, by the plan.
        let stored = match (self.unit.indexed, self.array.single) {
            (true, Some(single)) => match inner_of(self.unit, piece, single)? {
                None if self.array.every_chunk_stored => {
                    return Err(Error::not_found(
                        "a shard is empty, although the checkpoint says that every chunk is stored",
                    ));
                }
                None => {
                    self.note(0, piece);
                    return Ok(());
                }
                Some(inner) => {
                    self.note(inner.start as u64, &piece[inner.clone()]);
                    &piece[inner]
                }
            },
            _ => {
                self.note(0, piece);
                piece
            }
        };
        if !self.unit.whole || self.array.codecs.is_empty() {
            memory_form(self.array.dtype, stored, self.unit.skip + self.read)?;
            self.read += stored.len() as u64;
            return Ok(());
        }
        self.decode(stored)
    }

    fn note(&mut self, offset: u64, stored: &[u8]) {
        let ValueSum { len, crc, .. } = self.sum;
        self.sum = ValueSum { offset, len: len + stored.len() as u64, crc: crc32c::crc32c_append(crc, stored) };
    }

    fn decode(&mut self, mut stored: &[u8]) -> Result<()> {
        let encoded = if self.unit.indexed { stored.len() as u64 } else { self.unit.stored_bytes() };
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => none.insert(decode::decoder(
                &self.array.codecs,
                encoded,
                self.unit.decoded_bytes,
                true,
                1 << ZSTD_WINDOW_LOG_MAX,
            )?),
        };
        loop {
            // The decoder may write exactly what is missing, so that the format's trailer is read with no output left.
            let room = usize_of((self.unit.decoded_bytes - self.written).min(self.out.len() as u64))?;
            let step = decoder.step(stored, &mut self.out[..room])?;
            memory_form(self.array.dtype, &self.out[..step.written], self.written)?;
            self.written += step.written as u64;
            stored = &stored[step.read..];
            if step.read == 0 && step.written == 0 {
                return Ok(());
            }
        }
    }

    fn finish(mut self) -> Result<ValueSum> {
        if let Some(sealed) = self.unit.sum {
            sealed.check(self.sum.crc)?;
        }
        if let Some(decoder) = &mut self.decoder {
            decoder.finish()?;
        }
        Ok(self.sum)
    }
}

/// Checks elements whose bytes are restricted: bools. `at` is the position of the bytes within the unit.
fn memory_form(dtype: DType, bytes: &[u8], at: u64) -> Result<()> {
    if dtype != DType::Bool {
        return Ok(());
    }
    match bytes.iter().position(|byte| *byte > 1) {
        None => Ok(()),
        Some(index) => {
            Err(Error::corrupt("a bool is neither 0 nor 1").at("byte", at + index as u64).found(bytes[index]))
        }
    }
}
