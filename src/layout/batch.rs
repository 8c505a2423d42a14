//! Batches of like needs, with typed answers.

use bytes::Bytes;

use crate::error::{Error, ErrorKind, Result};
use crate::limits::METADATA_FILE_BYTES_MAX;
use crate::need::{Answer, Asker, DirEntry, EntryKind, Need, unfit};
use crate::relpath::RelPath;

/// Asks for whole files of metadata; `None` for one that does not exist.
pub(super) async fn files(ask: &Asker, paths: impl IntoIterator<Item = RelPath>) -> Result<Vec<Option<Bytes>>> {
    let needs = paths.into_iter().map(|path| Need::File { path, max: METADATA_FILE_BYTES_MAX }).collect();
    ask.ask(needs).await?.into_iter().map(bytes).collect()
}

/// The entries of a directory, `None` if it does not exist, or why they cannot be had.
pub(super) type Entries = Result<Option<Vec<DirEntry>>, String>;

/// Asks for the entries of directories.
pub(super) async fn lists(ask: &Asker, paths: impl IntoIterator<Item = RelPath>) -> Result<Vec<Entries>> {
    let needs = paths.into_iter().map(|path| Need::List { path }.or_refused()).collect();
    let listing = |answer| match answer {
        Answer::Listing(entries) => Ok(Ok(Some(entries))),
        Answer::Missing => Ok(Ok(None)),
        Answer::Refused(reason) => Ok(Err(reason.to_string())),
        other => Err(unfit(Some(&other))),
    };
    ask.ask(needs).await?.into_iter().map(listing).collect()
}

/// Asks for whole files of metadata, each of which may be missing, or be refused for a reason.
pub(super) async fn files_or_reasons(ask: &Asker, needs: Vec<Need>) -> Result<Vec<Result<Option<Bytes>, String>>> {
    let answers = ask.ask(needs.into_iter().map(Need::or_refused).collect()).await?;
    let file = |answer| match answer {
        Answer::Refused(reason) => Ok(Err(reason.to_string())),
        answer => bytes(answer).map(Ok),
    };
    answers.into_iter().map(file).collect()
}

/// Asks for the sizes of files, all of which must exist.
pub(super) async fn sizes(ask: &Asker, paths: &[RelPath]) -> Result<Vec<u64>> {
    let needs = paths.iter().map(|path| Need::Size { path: path.clone() }).collect();
    let size = |(answer, path): (Answer, &RelPath)| match answer {
        Answer::Size(size) => Ok(size),
        Answer::Missing => Err(Error::not_found("no such file").at("file", path)),
        other => Err(unfit(Some(&other))),
    };
    ask.ask(needs).await?.into_iter().zip(paths).map(size).collect()
}

/// The bytes of an answer to a need of bytes.
pub(super) fn bytes(answer: Answer) -> Result<Option<Bytes>> {
    match answer {
        Answer::Bytes(bytes) => Ok(Some(bytes)),
        Answer::Missing => Ok(None),
        other => Err(unfit(Some(&other))),
    }
}

/// Whether a listing has this name and it is no directory. A FIFO or a dangling link counts: reading it tells what it is.
pub(super) fn has_file(entries: &[DirEntry], name: &str) -> bool {
    kind(entries, name).is_some_and(|kind| kind != EntryKind::Dir)
}

/// Whether a listing has a directory of this name.
pub(super) fn has_dir(entries: &[DirEntry], name: &str) -> bool {
    kind(entries, name) == Some(EntryKind::Dir)
}

/// What a listing has under this name.
pub(super) fn kind(entries: &[DirEntry], name: &str) -> Option<EntryKind> {
    // Listings are sorted by name, and those of old items have one entry a parameter.
    let found = entries.binary_search_by(|entry| entry.name.as_str().cmp(name)).ok()?;
    entries.get(found).map(|entry| entry.kind)
}

/// The error for a file whose bytes contradict its format.
pub(super) fn corrupt(error: impl std::error::Error, offset: Option<u64>, path: &RelPath) -> Error {
    let corrupt = Error::new(ErrorKind::Corrupt, error.to_string());
    match offset {
        Some(offset) => corrupt.at("offset", offset),
        None => corrupt,
    }
    .at("file", path)
}
