//! The fuzz target of whole checkpoints: one in memory is changed anywhere, described, read and planned.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::catalog::read_orbax;
use super::engine::EngineOptions;
use super::inline::whole_wants;
use super::land::decoder_cost;
use super::tensors::read_safetensors;
use crate::error::{Error, Result};
use crate::io::short_file;
use crate::layout::{self, Entry, Format, ItemKind, StepChoice};
use crate::need::{Answer, Asker, DirEntry, EntryKind, Machine, Need};
use crate::plan;
use crate::relpath::RelPath;

type Files = BTreeMap<String, Bytes>;

/// The checkpoints that are changed, below `tests/fixtures`.
const SUBJECTS: [&str; 12] = [
    "v1_basic",
    "v1_checkpointables",
    "v1_nested",
    "v1_training_steps",
    "v0_unmerged",
    "ocdbt_numbered",
    "ocdbt_transitive",
    "zarr2_codecs",
    "zarr3_codecs",
    "msgpack_with_metadata",
    "safetensors_index",
    "orbax_0.2.6__default",
];

/// Changes a checkpoint as the bytes say: the first is which, then edits of six bytes each: file, kind, place, value.
pub(crate) fn directory(bytes: &[u8]) {
    let [subject, edits @ ..] = bytes else { return };
    let mut files = subjects()[usize::from(*subject) % SUBJECTS.len()].clone();
    for edit in edits.chunks_exact(6).take(8) {
        change(&mut files, edit);
    }
    let options = layout::Options {
        entry: Entry::Dir,
        name: None,
        step: StepChoice::Unstated,
        force: true,
        damaged: BTreeMap::new(),
    };
    let Ok(description) = run(&files, |ask| async move { layout::describe(&ask, &options).await }) else { return };
    if let (Format::Safetensors, Some(source)) = (&description.format, &description.safetensors) {
        let catalog = run(&files, |ask| async move { read_safetensors(&ask, source).await });
        plan_all(&files, catalog);
        return;
    }
    for item in description.items.iter().filter(|item| item.kind == ItemKind::Tree).take(4) {
        let catalog = run(&files, |ask| async move { read_orbax(&ask, &item.dir).await });
        plan_all(&files, catalog);
    }
}

fn plan_all(files: &Files, catalog: Result<super::catalog::Catalog>) {
    let (Ok(catalog), Ok(limits)) = (catalog, EngineOptions { threads: 1, ..EngineOptions::default() }.limits()) else {
        return;
    };
    let arrays = &catalog.arrays;
    for array in 0..arrays.len() {
        let wants = whole_wants(arrays, [array]);
        let planned = run(files, |ask| async move { plan::build(&ask, arrays, wants, limits, decoder_cost).await });
        let Ok(plan) = planned else { continue };
        for unit in &plan.units {
            if let plan::Source::File { file, offset, len } = unit.source {
                assert!(offset.checked_add(len).is_some(), "a unit beyond 64 bits of {}", plan.files[file as usize]);
            }
        }
    }
}

/// One edit. Places and lengths are taken modulo what there is.
fn change(files: &mut Files, edit: &[u8]) {
    let [file, kind, high, low, value, more] = *edit else { return };
    let Some(name) = files.keys().nth(usize::from(file) % files.len().max(1)).cloned() else { return };
    let Some(bytes) = files.get(&name) else { return };
    let mut bytes = bytes.to_vec();
    let at = (usize::from(high) << 8 | usize::from(low)) % bytes.len().max(1);
    match kind % 10 {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << (value % 8),
        1 if !bytes.is_empty() => bytes[at] = value,
        2 => bytes.truncate(at),
        3 => drop(bytes.splice(at..at, std::iter::repeat_n(value, usize::from(more)))),
        4 => {
            let end = (at + usize::from(more)).min(bytes.len());
            drop(bytes.drain(at..end));
        }
        5 => {
            let other = files.values().nth(usize::from(value) % files.len()).cloned().unwrap_or_default();
            let from = usize::from(more).min(other.len());
            drop(bytes.splice(at..at, other[from..(from + 64).min(other.len())].iter().copied()));
        }
        // A number becomes an extreme one.
        6 => {
            let digit = |byte: &u8| byte.is_ascii_digit();
            if let Some(start) = bytes[at..].iter().position(digit).map(|next| at + next) {
                let end = bytes[start..].iter().position(|byte| !digit(byte)).map_or(bytes.len(), |len| start + len);
                let number = EXTREMES[usize::from(value) % EXTREMES.len()];
                drop(bytes.splice(start..end, number.bytes()));
            }
        }
        // A checksum is made right again, so that what is behind it is reached.
        7 => reseal(&mut bytes),
        8 => {
            files.remove(&name);
            return;
        }
        _ => {
            files.insert(format!("{name}{value}"), bytes.into());
            return;
        }
    }
    files.insert(name, bytes.into());
}

const EXTREMES: [&str; 8] =
    ["0", "1", "4294967296", "9223372036854775807", "18446744073709551615", "18446744073709551616", "1e308", "33"];

/// Gives the OCDBT object that a file begins with the checksum of its bytes.
fn reseal(bytes: &mut [u8]) {
    let Some(body) = bytes.len().checked_sub(4).filter(|_| bytes.starts_with(&[0x0c, 0xdb])) else { return };
    let crc = crc32c::crc32c(&bytes[..body]).to_le_bytes();
    bytes[body..].copy_from_slice(&crc);
}

fn subjects() -> &'static [Files] {
    static SUBJECTS_READ: OnceLock<Vec<Files>> = OnceLock::new();
    SUBJECTS_READ.get_or_init(|| {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        SUBJECTS.iter().map(|name| read(&fixtures.join(name).join("ckpt"))).collect()
    })
}

fn read(root: &Path) -> Files {
    let mut files = Files::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            match (path.is_dir(), std::fs::read(&path), path.strip_prefix(root)) {
                (true, ..) => waiting.push(path),
                (false, Ok(bytes), Ok(below)) => drop(files.insert(below.display().to_string(), bytes.into())),
                _ => {}
            }
        }
    }
    files
}

fn run<'a, T, F: Future<Output = Result<T>> + Send + 'a>(files: &Files, body: impl FnOnce(Asker) -> F) -> Result<T> {
    Machine::new(body).drive(|needs| needs.iter().map(|need| answer(files, need)).collect())
}

fn answer(files: &Files, need: &Need) -> Result<Answer> {
    let file = |path: &RelPath| files.get(&path.to_string()).cloned();
    Ok(match need {
        Need::OrRefused(need) => answer(files, need).unwrap_or_else(|error| Answer::Refused(Arc::new(error))),
        Need::File { path, max } => match file(path) {
            Some(bytes) if bytes.len() as u64 > *max => return Err(Error::corrupt("a metadata file is too large")),
            Some(bytes) => Answer::Bytes(bytes),
            None => Answer::Missing,
        },
        Need::Range { path, offset, len } => match file(path) {
            Some(bytes) => {
                let size = bytes.len() as u64;
                match offset.checked_add(*len).filter(|end| *end <= size) {
                    Some(end) => Answer::Bytes(bytes.slice(place(*offset)..place(end))),
                    None => return Err(short_file(&path.to_string(), *offset, *len, size)),
                }
            }
            None => Answer::Missing,
        },
        Need::Tail { path, len } => match file(path) {
            Some(bytes) => {
                let from = bytes.len().saturating_sub(place(*len));
                Answer::Tail { bytes: bytes.slice(from..), file_size: bytes.len() as u64 }
            }
            None => Answer::Missing,
        },
        Need::Size { path } => file(path).map_or(Answer::Missing, |bytes| Answer::Size(bytes.len() as u64)),
        Need::List { path } => list(files, path),
    })
}

fn list(files: &Files, path: &RelPath) -> Answer {
    let prefix = if path.as_bytes().is_empty() { String::new() } else { format!("{path}/") };
    let below = files.keys().filter_map(|name| name.strip_prefix(&prefix));
    let entries: BTreeSet<DirEntry> = below
        .map(|name| match name.split_once('/') {
            Some((dir, _)) => DirEntry { name: dir.to_owned(), kind: EntryKind::Dir },
            None => DirEntry { name: name.to_owned(), kind: EntryKind::File },
        })
        .collect();
    if entries.is_empty() && !prefix.is_empty() {
        Answer::Missing
    } else {
        Answer::Listing(entries.into_iter().collect())
    }
}

/// A place in a file that is in memory.
fn place(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX)
}
