//! A directory in memory that answers needs, for the tests of this folder.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;

use bytes::Bytes;

use crate::error::Result;
use crate::need::{Answer, Asker, DirEntry, EntryKind, Machine, Need};

#[derive(Default)]
pub(crate) struct Dir {
    files: BTreeMap<String, Bytes>,
    dirs: BTreeSet<String>,
    batches: Cell<usize>,
}

impl Dir {
    pub(crate) fn new() -> Self {
        Self { dirs: BTreeSet::from([String::new()]), ..Self::default() }
    }

    pub(crate) fn file(mut self, path: &str, bytes: impl Into<Vec<u8>>) -> Self {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self = self.dir(parent);
        }
        self.files.insert(path.to_owned(), Bytes::from(bytes.into()));
        self
    }

    pub(crate) fn dir(mut self, path: &str) -> Self {
        let mut parent = path;
        loop {
            self.dirs.insert(parent.to_owned());
            match parent.rsplit_once('/') {
                Some((shorter, _)) => parent = shorter,
                None => return self,
            }
        }
    }

    /// How many batches the last run asked for.
    pub(crate) fn batches(&self) -> usize {
        self.batches.get()
    }

    pub(crate) fn run<T, F: Future<Output = Result<T>> + Send>(&self, body: impl FnOnce(Asker) -> F) -> Result<T> {
        self.batches.set(0);
        Machine::new(body).drive(|needs| {
            self.batches.set(self.batches.get() + 1);
            Ok(needs.iter().map(|need| self.answer(need)).collect())
        })
    }

    fn answer(&self, need: &Need) -> Answer {
        if let Need::OrRefused(need) = need {
            return self.answer(need);
        }
        let text = |path: &crate::relpath::RelPath| String::from_utf8(path.as_bytes().to_vec()).unwrap();
        let file = |path| self.files.get(&text(path)).cloned();
        let answer = match need {
            Need::File { path, .. } => {
                assert!(!self.dirs.contains(&text(path)), "{path} is a directory");
                file(path).map(Answer::Bytes)
            }
            Need::Range { path, offset, len } => {
                file(path).map(|bytes| Answer::Bytes(bytes.slice(*offset as usize..(offset + len) as usize)))
            }
            Need::Tail { path, len } => file(path).map(|bytes| Answer::Tail {
                file_size: bytes.len() as u64,
                bytes: bytes.slice(bytes.len().saturating_sub(*len as usize)..),
            }),
            Need::Size { path } => file(path).map(|bytes| Answer::Size(bytes.len() as u64)),
            Need::List { path } => self.dirs.contains(&text(path)).then(|| Answer::Listing(self.list(&text(path)))),
            Need::OrRefused(_) => None,
        };
        answer.unwrap_or(Answer::Missing)
    }

    fn list(&self, dir: &str) -> Vec<DirEntry> {
        let child = |path: &str| {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            (parent == dir && !name.is_empty()).then(|| name.to_owned())
        };
        let entry = |kind| move |name| DirEntry { name, kind };
        let files = self.files.keys().filter_map(|path| child(path)).map(entry(EntryKind::File));
        let dirs = self.dirs.iter().filter_map(|path| child(path)).map(entry(EntryKind::Dir));
        let mut entries: Vec<_> = files.chain(dirs).collect();
        entries.sort();
        entries
    }
}
