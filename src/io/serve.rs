//! Answers the questions of metadata machines from the files of a checkpoint.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use super::fs::{OpenFile, Root, io_error};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{METADATA_OPEN_FILES_MAX, METADATA_THREADS_MAX};
use crate::need::{Answer, Need};
use crate::relpath::RelPath;

/// Answers one batch of needs, in order; large batches on several threads, which end with the call.
///
/// # Errors
/// The first need, in order, that cannot be answered: a file that is too large, too short, unreadable, or no file.
pub fn serve(root: &Root, needs: &[Need]) -> Result<Vec<Answer>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(needs.len() / NEEDS_PER_THREAD_MIN);
    let threads = threads.min(METADATA_THREADS_MAX);
    if threads < 2 {
        let mut open = Open::new(root);
        return needs.iter().map(|need| open.answer(need)).collect();
    }
    let next = AtomicUsize::new(0);
    let mut parts: Vec<(usize, Result<Vec<Answer>>)> = std::thread::scope(|scope| {
        let work = || {
            let mut open = Open::new(root);
            let mut parts = Vec::new();
            loop {
                let start = next.fetch_add(NEEDS_PER_THREAD_MIN, Ordering::Relaxed);
                let Some(part) = needs.get(start..(start + NEEDS_PER_THREAD_MIN).min(needs.len())) else {
                    return parts;
                };
                if part.is_empty() {
                    return parts;
                }
                parts.push((start, part.iter().map(|need| open.answer(need)).collect()));
            }
        };
        // Where no more threads can be had, those that are there do it.
        let spawn = || std::thread::Builder::new().spawn_scoped(scope, work);
        let handles: Vec<_> = (1..threads).map_while(|_| spawn().ok()).collect();
        let own = work();
        handles.into_iter().flat_map(|handle| handle.join().unwrap_or_default()).chain(own).collect()
    });
    parts.sort_by_key(|(start, _)| *start);
    let answers: Vec<Answer> = parts.into_iter().map(|(_, part)| part).collect::<Result<Vec<_>>>()?.concat();
    if answers.len() == needs.len() { Ok(answers) } else { Err(Error::bug("a thread that reads metadata panicked")) }
}

/// Files that this thread has open: a few, since neighbouring needs mostly speak of the same file.
struct Open<'a> {
    root: &'a Root,
    files: HashMap<RelPath, Option<Arc<OpenFile>>>,
}

impl<'a> Open<'a> {
    fn new(root: &'a Root) -> Self {
        Self { root, files: HashMap::new() }
    }

    fn file(&mut self, path: &RelPath) -> Result<Option<Arc<OpenFile>>> {
        if let Some(file) = self.files.get(path) {
            return Ok(file.clone());
        }
        if self.files.len() >= METADATA_OPEN_FILES_MAX {
            self.files.clear();
        }
        let file = self.root.file(path)?.map(Arc::new);
        self.files.insert(path.clone(), file.clone());
        Ok(file)
    }

    fn answer(&mut self, need: &Need) -> Result<Answer> {
        match need {
            Need::OrRefused(need) => match self.answer(need) {
                Err(error) if error.is_of_one_path() => Ok(Answer::Refused(Arc::new(error))),
                answer => answer,
            },
            Need::File { path, max } => {
                let Some(file) = self.file(path)? else { return Ok(Answer::Missing) };
                if file.size() > *max {
                    return Err(Error::corrupt("a metadata file is too large")
                        .at("file", self.root.shown(path))
                        .expected(format_args!("at most {max} bytes"))
                        .found(format_args!("{} bytes", file.size())));
                }
                self.read(&file, 0, file.size()).map(Answer::Bytes)
            }
            Need::Range { path, offset, len } => {
                let Some(file) = self.file(path)? else { return Ok(Answer::Missing) };
                self.read(&file, *offset, *len).map(Answer::Bytes)
            }
            Need::Tail { path, len } => {
                let Some(file) = self.file(path)? else { return Ok(Answer::Missing) };
                let len = (*len).min(file.size());
                let bytes = self.read(&file, file.size() - len, len)?;
                Ok(Answer::Tail { bytes, file_size: file.size() })
            }
            Need::List { path } => Ok(self.root.list(path)?.map_or(Answer::Missing, Answer::Listing)),
            Need::Size { path } => Ok(self.file(path)?.map_or(Answer::Missing, |file| Answer::Size(file.size()))),
        }
    }

    fn read(&self, file: &OpenFile, offset: u64, len: u64) -> Result<Bytes> {
        let end = offset.checked_add(len).filter(|end| *end <= file.size());
        let (Some(_), Ok(count)) = (end, usize::try_from(len)) else {
            return Err(short_file(&self.root.shown(file.path()), offset, len, file.size()));
        };
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(count).map_err(|_| {
            Error::new(ErrorKind::OutOfMemory, "the system has not enough host memory")
                .at("file", self.root.shown(file.path()))
                .expected(format_args!("{count} bytes in one piece"))
        })?;
        bytes.resize(count, 0);
        match file.file().read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes.into()),
            Err(error) => Err(read_error(error, &self.root.shown(file.path()), offset, len, file.size())),
        }
    }
}

/// The error for a reference beyond the end of a file.
pub(crate) fn short_file(file: &str, offset: u64, len: u64, size: u64) -> Error {
    Error::corrupt("a file ends before what the checkpoint refers to")
        .at("offset", offset)
        .at("file", file)
        .expected(format_args!("{len} bytes there"))
        .found(format_args!("a file of {size} bytes"))
        .hint("the file is truncated; copy the checkpoint again")
}

/// The error for a read that failed.
pub(crate) fn read_error(error: std::io::Error, file: &str, offset: u64, len: u64, size: u64) -> Error {
    if error.kind() == std::io::ErrorKind::UnexpectedEof {
        return short_file(file, offset, len, size);
    }
    let errno = rustix::io::Errno::from_io_error(&error);
    let known = errno.map(|errno| io_error(errno, "read"));
    known
        .unwrap_or_else(|| Error::new(ErrorKind::Io, "cannot read a file").caused_by(error))
        .at("offset", offset)
        .at("file", file)
}

/// Below this many needs a thread, starting threads costs more than it saves.
const NEEDS_PER_THREAD_MIN: usize = 64;
