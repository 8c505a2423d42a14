//! Safetensors: one file, the files of an index, or all files of a directory.
//!
//! [`read`] asks for the sizes and the heads of the files and returns where each tensor's bytes lie. [`header`] parses one
//! file's header, [`index`] a `model.safetensors.index.json`, and [`mod@write`] makes both;
//! [`tree`] is what a tree has beyond tensors. Nothing is read beyond the headers.
//!
//! Must not know: devices, meshes, what the tensors are for.

pub mod header;
pub mod index;
pub mod tree;
pub mod write;

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

pub use header::{Header, HeaderError, Tensor};

use super::batch::{bytes, corrupt, sizes};
use crate::error::{Error, Result};
use crate::limits::{ERROR_LINES_MAX, METADATA_FILE_BYTES_MAX, SAFETENSORS_FILES_MAX, SAFETENSORS_HEAD_BYTES};
use crate::need::{Asker, DirEntry, EntryKind, Need};
use crate::relpath::RelPath;

/// Which files make the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// One file.
    File(RelPath),
    /// The files that this index names.
    Index(RelPath),
    /// These files, sorted by name.
    Dir(Vec<RelPath>),
}

/// One file and its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its path.
    pub path: RelPath,
    /// Its size in bytes.
    pub size: u64,
    /// Where its tensors' bytes begin: 8 and the length of the header.
    pub data_start: u64,
    /// Its tensors, in the header's order.
    pub tensors: Vec<Tensor>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Source {
    /// The source that a file is by its name.
    pub fn of_file(path: &RelPath) -> Option<Self> {
        let name = path.as_bytes();
        if name.ends_with(INDEX_ENDING.as_bytes()) {
            return Some(Self::Index(path.clone()));
        }
        name.ends_with(FILE_ENDING.as_bytes()).then(|| Self::File(path.clone()))
    }

    /// The source that a directory is by the names in it: its index if it has one, else all its files.
    pub fn of_dir(entries: &[DirEntry]) -> Option<Self> {
        let files = entries.iter().filter(|entry| entry.kind == EntryKind::File);
        // A listing's names are plain, so they are good paths.
        let mut indexes: Vec<&str> = Vec::new();
        let mut paths = Vec::new();
        for entry in files {
            if entry.name.ends_with(INDEX_ENDING) {
                indexes.push(&entry.name);
            } else if entry.name.ends_with(FILE_ENDING) {
                paths.extend(RelPath::new(&entry.name));
            }
        }
        let index =
            indexes.iter().find(|name| **name == USUAL_INDEX).or(indexes.first().filter(|_| indexes.len() == 1));
        match index {
            Some(index) => RelPath::new(index).ok().map(Self::Index),
            None => (!paths.is_empty()).then_some(Self::Dir(paths)),
        }
    }
}

/// Reads the headers of all files, in two batches; a third for headers above 128 KiB, one more for an index.
///
/// # Errors
/// A file that is missing or contradicts the format (with file and offset), a tensor in two files, an index that names a
/// tensor that its file lacks.
pub async fn read(ask: &Asker, source: &Source) -> Result<Vec<File>> {
    let mut named = None;
    let paths = match source {
        Source::File(path) => vec![path.clone()],
        Source::Dir(paths) => paths.clone(),
        Source::Index(path) => {
            let Some(file) = ask.file(path.clone(), METADATA_FILE_BYTES_MAX).await? else {
                return Err(Error::not_found("no such file").at("file", path));
            };
            let index = index::parse(&file).map_err(|error| corrupt(&error, error.offset(), path))?;
            let parent = parent(path)?;
            let paths = index.files().into_iter().map(|name| parent.join(name)).collect::<Result<Vec<_>, _>>()?;
            named = Some((path, parent, index));
            paths
        }
    };
    if paths.len() > SAFETENSORS_FILES_MAX {
        return Err(Error::unsupported("too many files")
            .expected(format_args!("at most {SAFETENSORS_FILES_MAX}"))
            .found(paths.len()));
    }
    let files = headers(ask, &paths).await?;
    refuse_duplicates(&files)?;
    if let Some((path, parent, index)) = &named {
        refuse_unfulfilled(path, parent, index, &files)?;
    }
    Ok(files)
}

async fn headers(ask: &Asker, paths: &[RelPath]) -> Result<Vec<File>> {
    let sizes = sizes(ask, paths).await?;
    let needs = paths.iter().zip(&sizes).map(|(path, &size)| range(path, 0, size.min(SAFETENSORS_HEAD_BYTES)));
    let mut heads = present(ask.ask(needs.collect()).await?, paths)?;
    let mut lengths = Vec::with_capacity(paths.len());
    for ((head, &size), path) in heads.iter().zip(&sizes).zip(paths) {
        lengths.push(header::length(head, size).map_err(|error| corrupt(&error, Some(0), path))?);
    }
    // What does not fit into the first read is read whole: rare, and simpler than a second piece.
    let is_long = |index: &usize| matches!((heads.get(*index), lengths.get(*index)), (Some(head), Some(&length)) if 8 + length > head.len() as u64);
    let long: Vec<usize> = (0..paths.len()).filter(is_long).collect();
    let needs = long.iter().filter_map(|&index| Some(range(paths.get(index)?, 0, 8 + lengths.get(index)?)));
    let whole = present(ask.ask(needs.collect()).await?, paths)?;
    for (&index, file) in long.iter().zip(whole) {
        if let Some(head) = heads.get_mut(index) {
            *head = file;
        }
    }
    let mut files = Vec::with_capacity(paths.len());
    for ((head, &size), path) in heads.iter().zip(&sizes).zip(paths) {
        let header = header::parse(head, size).map_err(|error| corrupt(&error, error.offset(), path))?;
        let Header { data_start, tensors, metadata } = header;
        files.push(File { path: path.clone(), size, data_start, tensors, metadata });
    }
    Ok(files)
}

fn present(answers: Vec<crate::need::Answer>, paths: &[RelPath]) -> Result<Vec<Bytes>> {
    let present = |answer| {
        bytes(answer)?
            .ok_or_else(|| Error::not_found("a file was removed while it was read").at("file", path_list(paths)))
    };
    answers.into_iter().map(present).collect()
}

fn path_list(paths: &[RelPath]) -> String {
    match paths {
        [path] => path.to_string(),
        paths => format!("(one of {} files)", paths.len()),
    }
}

fn range(path: &RelPath, offset: u64, len: u64) -> Need {
    Need::Range { path: path.clone(), offset, len }
}

fn refuse_duplicates(files: &[File]) -> Result<()> {
    let mut owners: HashMap<&str, &RelPath> = HashMap::new();
    let mut twice = Vec::new();
    for file in files {
        for tensor in &file.tensors {
            if let Some(other) = owners.insert(&tensor.name, &file.path) {
                twice.push(format!("`{}` in {other} and {}", tensor.name, file.path));
            }
        }
    }
    if twice.is_empty() {
        return Ok(());
    }
    twice.sort();
    Err(Error::corrupt(format!("{} tensors are in two files", twice.len()))
        .lines(twice)
        .hint("the directory holds several models, or a sharded and a whole copy of one: give one file, or the index"))
}

fn refuse_unfulfilled(path: &RelPath, parent: &RelPath, index: &index::Index, files: &[File]) -> Result<()> {
    let mut tensors: HashMap<&RelPath, HashMap<&str, ()>> = HashMap::new();
    for file in files {
        tensors.insert(&file.path, file.tensors.iter().map(|tensor| (tensor.name.as_str(), ())).collect());
    }
    let mut missing = Vec::new();
    for (tensor, name) in &index.weight_map {
        let path = parent.join(name)?;
        if !tensors.get(&path).is_some_and(|names| names.contains_key(tensor.as_str())) {
            missing.push(format!("`{tensor}` is not in {path}"));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let count = missing.len();
    missing.truncate(ERROR_LINES_MAX + 1);
    Err(Error::corrupt(format!("{count} tensors are not where the index says")).at("file", path).lines(missing))
}

fn parent(path: &RelPath) -> Result<RelPath> {
    let bytes = path.as_bytes();
    let end = bytes.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    Ok(RelPath::new(bytes.get(..end).unwrap_or_default())?)
}

const FILE_ENDING: &str = ".safetensors";
const INDEX_ENDING: &str = ".safetensors.index.json";
const USUAL_INDEX: &str = "model.safetensors.index.json";

#[cfg(test)]
mod tests;
