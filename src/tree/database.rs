//! A bare OCDBT database: keys and values, whatever they mean.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::checkpoint::{OpenOptions, ask, describe, open_root};
use crate::error::{Error, Result};
use crate::io::{Root, serve};
use crate::kv::{Index, Value, ocdbt};
use crate::layout::{Description, Entry, default_item};
use crate::need::{Answer, Asker, EntryKind, Need, unfit};
use crate::relpath::RelPath;

/// An open database.
#[derive(Debug)]
pub struct Database {
    root: Arc<Root>,
    index: Index,
    description: Option<Description>,
}

impl Database {
    /// Opens the database at a path: the one whose manifest is there, the databases of processes that were not merged, or
    /// that of a checkpoint's default item.
    ///
    /// # Errors
    /// No database there, or a damaged one.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let (root, entry) = open_root(path)?;
        if entry != Entry::Dir {
            return Err(Error::invalid("a database is a directory").at("path", path.display()));
        }
        let (mut root, mut description) = (Arc::new(root), None);
        let mut index = ask(&root, |asker| async move { scan(&asker, &RelPath::root()).await })?;
        if index.is_none() {
            let described = describe(path, options)?;
            let dir = default_item(&described.1.items, options.item.as_deref())?.dir.clone();
            (root, description) = (described.0, Some(described.1));
            index = ask(&root, |asker| async move { scan(&asker, &dir).await })?;
        }
        let index = index.ok_or_else(|| {
            Error::not_found("there is no OCDBT database")
                .at("path", path.display())
                .expected("`manifest.ocdbt` or `ocdbt.process_*`")
        })?;
        Ok(Self { root, index, description })
    }

    /// What the checkpoint is that it was found in; `None` if the path is the database itself.
    pub fn description(&self) -> Option<&Description> {
        self.description.as_ref()
    }

    /// Keys and places.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The bytes of a value.
    ///
    /// # Errors
    /// A data file that is missing or too short.
    pub fn read(&self, value: &Value) -> Result<Bytes> {
        let extent = match value {
            Value::Inline(bytes) => return Ok(bytes.clone()),
            Value::Extent(extent) => extent,
        };
        let path = self.index.file(extent.file).clone();
        let shown = self.root.shown(&path);
        match serve(&self.root, &[Need::Range { path, offset: extent.offset, len: extent.len }])?.pop() {
            Some(Answer::Bytes(bytes)) => Ok(bytes),
            Some(Answer::Missing) => Err(Error::not_found("a data file of the database is missing").at("file", shown)),
            other => Err(unfit(other.as_ref())),
        }
    }
}

async fn scan(ask: &Asker, dir: &RelPath) -> Result<Option<Index>> {
    if let Some(database) = ocdbt::scan(ask, dir).await? {
        return Ok(Some(database.index));
    }
    let listing = ask.list(dir.clone()).await?.unwrap_or_default();
    let processes =
        listing.iter().filter(|entry| entry.kind == EntryKind::Dir && entry.name.starts_with("ocdbt.process_"));
    let roots = processes.map(|entry| dir.join(&entry.name)).collect::<Result<Vec<_>, _>>()?;
    if roots.is_empty() {
        return Ok(None);
    }
    Ok(ocdbt::scan_processes(ask, &roots).await?.map(|union| union.index))
}
