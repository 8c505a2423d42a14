//! What an interrupted conversion leaves behind so that another can go on with it.
//!
//! ```text
//!   line 1      <crc32c> {"journal": 2, "fingerprint": {..}}          of what, into what, with which options
//!   line n      <crc32c> {"next": [task, row], "lossy": {..}, "sink": {..}}    everything before `next` is on disk
//! ```
//!
//! A line is written after what it speaks of is durable. A last line that does not fit its checksum was being written when the
//! end came, and counts for nothing. The journal lies in the temporary directory and is removed before that is put in place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::pieces::Cursor;
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::{Leftover, LeftoverKind, leftovers};
use crate::io::{StagedDir, StoreFile};
use crate::limits::JOURNAL_BYTES_MAX;
use crate::relpath::RelPath;

/// The journal's name in the temporary directory.
pub(super) const FILE: &str = ".touchdown-convert";

/// What must be equal for a conversion to go on: aspects by name, in words or as checksums.
pub(super) type Fingerprint = BTreeMap<String, String>;

/// What a sink notes, as JSON text: of very many chunks it takes far less memory than as values.
pub(super) type Note = Box<RawValue>;

/// A journal that is being written.
#[derive(Debug)]
pub(super) struct Journal {
    file: Box<dyn StoreFile>,
    end: u64,
    sync: bool,
}

/// What a journal says.
#[derive(Debug)]
pub(super) struct Found {
    /// The directory that it lies in.
    pub(super) staging: PathBuf,
    pub(super) fingerprint: Fingerprint,
    pub(super) next: Cursor,
    pub(super) lossy: BTreeMap<String, u64>,
    /// What the sink noted, in order.
    pub(super) notes: Vec<Note>,
    /// Where the next line goes.
    end: u64,
}

#[derive(Serialize, Deserialize)]
struct First {
    journal: u64,
    fingerprint: Fingerprint,
}

#[derive(Serialize, Deserialize)]
struct Line {
    next: [u64; 2],
    lossy: BTreeMap<String, u64>,
    sink: Note,
}

impl Journal {
    /// Starts the journal of a new conversion.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub(super) fn start(staged: &StagedDir, fingerprint: Fingerprint, sync: bool) -> Result<Self> {
        let mut journal = Self { file: staged.file(&path()?)?, end: 0, sync };
        journal.line(staged, &First { journal: VERSION, fingerprint })?;
        if sync {
            staged.sync_dir(&RelPath::root())?;
        }
        Ok(journal)
    }

    /// Goes on with a journal that was found.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub(super) fn resume(staged: &StagedDir, found: &Found, sync: bool) -> Result<Self> {
        Ok(Self { file: staged.open(&path()?)?, end: found.end, sync })
    }

    /// Notes that everything before this is done. What it rests on is durable already.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub(super) fn note(
        &mut self,
        staged: &StagedDir,
        next: Cursor,
        lossy: &BTreeMap<String, u64>,
        sink: Note,
    ) -> Result<()> {
        self.line(staged, &Line { next: [next.task as u64, next.row], lossy: lossy.clone(), sink })
    }

    /// Takes it away: what it speaks of is about to be put in place.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub(super) fn remove(&self, staged: &StagedDir) -> Result<()> {
        staged.remove(&path()?)
    }

    fn line(&mut self, staged: &StagedDir, line: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(line).map_err(|error| Error::bug(error.to_string()))?;
        let text = format!("{:08x} {text}\n", crc32c::crc32c(text.as_bytes()));
        let written = self.file.write_at(text.as_bytes(), self.end);
        let synced = written.and_then(|()| if self.sync { self.file.sync() } else { Ok(()) });
        synced.map_err(|error| match path() {
            Ok(path) => staged.failed(error, "write", &path),
            Err(error) => error,
        })?;
        self.end += text.len() as u64;
        Ok(())
    }
}

/// What interrupted conversions to this target left behind, the newest first.
///
/// # Errors
/// A directory that cannot be listed.
pub(super) fn find(target: &Path) -> Result<Vec<Found>> {
    let failed = |error: std::io::Error, path: &Path| {
        Error::new(ErrorKind::Io, "what is left over cannot be read").at("path", path.display()).caused_by(error)
    };
    let target = std::path::absolute(target).map_err(|error| failed(error, target))?;
    let Some(parent) = target.parent() else { return Ok(Vec::new()) };
    let left = match leftovers(parent) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|error| failed(error, parent))?,
    };
    let ours = |one: &Leftover| one.kind == LeftoverKind::Staging && one.is_of(&target);
    let mut found = Vec::new();
    for leftover in left.into_iter().filter(ours) {
        let file = leftover.path.join(FILE);
        let metadata = match std::fs::symlink_metadata(&file) {
            Ok(metadata) if metadata.is_file() => metadata,
            _ => continue,
        };
        if metadata.len() > JOURNAL_BYTES_MAX {
            return Err(Error::unsupported("the journal is too large")
                .at("path", file.display())
                .expected(format_args!("at most {JOURNAL_BYTES_MAX} bytes"))
                .found(metadata.len()));
        }
        let bytes = std::fs::read(&file).map_err(|error| failed(error, &file))?;
        let written = metadata.modified().map_err(|error| failed(error, &file))?;
        found.extend(parse(&bytes, leftover.path).map(|journal| (written, journal)));
    }
    found.sort_by_key(|(written, _)| std::cmp::Reverse(*written));
    Ok(found.into_iter().map(|(_, journal)| journal).collect())
}

/// What differs between two fingerprints.
pub(super) fn differences(one: &Fingerprint, other: &Fingerprint) -> Vec<String> {
    let names = one.keys().chain(other.keys()).collect::<std::collections::BTreeSet<_>>();
    names.into_iter().filter(|name| one.get(*name) != other.get(*name)).cloned().collect()
}

/// Reads a journal up to its last whole line; `None` if not even the first one is.
fn parse(bytes: &[u8], staging: PathBuf) -> Option<Found> {
    let mut lines = whole_lines(bytes);
    let (first, mut end) = lines.next()?;
    let first: First = serde_json::from_str(first).ok().filter(|first: &First| first.journal == VERSION)?;
    let (mut next, mut lossy, mut notes) = (Cursor::default(), BTreeMap::new(), Vec::new());
    for (text, line_end) in lines {
        let Ok(line) = serde_json::from_str::<Line>(text) else { break };
        next = Cursor { task: usize::try_from(line.next[0]).ok()?, row: line.next[1] };
        (lossy, end) = (line.lossy, line_end);
        notes.push(line.sink);
    }
    Some(Found { staging, fingerprint: first.fingerprint, next, lossy, notes, end })
}

/// The texts of lines that fit their checksums, up to the first that does not, and where each ends.
fn whole_lines(bytes: &[u8]) -> impl Iterator<Item = (&str, u64)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(at..)?;
        let len = rest.iter().position(|byte| *byte == b'\n')?;
        let line = std::str::from_utf8(&rest[..len]).ok()?;
        let (sum, text) = line.split_once(' ')?;
        if u32::from_str_radix(sum, 16).ok()? != crc32c::crc32c(text.as_bytes()) {
            return None;
        }
        at += len + 1;
        Some((text, at as u64))
    })
}

fn path() -> Result<RelPath> {
    Ok(RelPath::new(FILE)?)
}

const VERSION: u64 = 2;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::io::LocalStore;

    fn note(value: &impl Serialize) -> Note {
        serde_json::value::to_raw_value(value).unwrap()
    }

    #[test]
    fn a_journal_is_read_up_to_its_last_whole_line_and_gone_on_with() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("out");
        let mut staged = StagedDir::create(Arc::new(LocalStore), &target, false).unwrap();
        staged.keep(true);
        let fingerprint = Fingerprint::from([("source".to_owned(), "a".to_owned())]);
        let mut journal = Journal::start(&staged, fingerprint.clone(), true).unwrap();
        let lossy = BTreeMap::from([("w".to_owned(), 3)]);
        for row in 1..4 {
            journal.note(&staged, Cursor { task: 0, row }, &lossy, note(&row)).unwrap();
        }
        let file = staged.path().join(FILE);
        drop(staged);
        let whole = std::fs::read(&file).unwrap();
        // Cut anywhere: what is whole counts.
        for len in 0..=whole.len() {
            std::fs::write(&file, &whole[..len]).unwrap();
            let lines = whole[..len].iter().filter(|byte| **byte == b'\n').count();
            let found = find(&target).unwrap();
            assert_eq!(found.len(), lines.min(1), "{len}");
            let Some(found) = found.first() else { continue };
            assert_eq!(found.fingerprint, fingerprint);
            assert_eq!((found.next.row, found.notes.len()), (lines as u64 - 1, lines - 1));
        }
        // A line that goes over a torn one.
        std::fs::write(&file, &whole[..whole.len() - 3]).unwrap();
        let found = find(&target).unwrap().remove(0);
        let left = found.staging.clone();
        let becomes = crate::io::store::Becomes::Directory;
        let (staged, _) = StagedDir::resume(Arc::new(LocalStore), &target, false, becomes, &left).unwrap();
        let mut journal = Journal::resume(&staged, &found, true).unwrap();
        journal.note(&staged, Cursor { task: 1, row: 0 }, &BTreeMap::new(), note(&())).unwrap();
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(parse(&bytes, left).unwrap().next, Cursor { task: 1, row: 0 });
        // One that was changed counts for nothing from there on.
        let mut bad = whole.clone();
        let at = whole.iter().position(|byte| *byte == b'\n').unwrap() + 20;
        bad[at] ^= 1;
        assert!(parse(&bad, PathBuf::new()).unwrap().notes.is_empty());
        let other = Fingerprint::from([("source".to_owned(), "b".to_owned()), ("files".to_owned(), String::new())]);
        assert_eq!(differences(&fingerprint, &other), ["files", "source"]);
    }
}
