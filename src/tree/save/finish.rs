//! What follows the arrays: the database's nodes and manifest, and the files that describe the tree and the checkpoint.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use super::files::{DataFile, Written, new_data_file};
use serde_json::Value;

use super::item::Item;
use super::options::SaveOptions;
use super::value_file::ValueFile;
use super::write::stored_key;
use crate::error::{Error, Result};
use crate::io::{StagedDir, store};
use crate::kv::{Index, ocdbt};
use crate::layout::orbax::sums::{SUMS_FILE, Sums};
use crate::layout::orbax::{array_metadata, checkpoint, json, sharding, strings, tree};
use crate::relpath::RelPath;

/// Writes what makes the arrays of an item a tree. Its directory exists.
///
/// # Errors
/// Whatever the file system refuses.
pub(in crate::tree) fn finish_tree(
    staged: &mut StagedDir,
    item: &Item,
    written: Written,
    options: &SaveOptions,
) -> Result<()> {
    let dir = RelPath::new(&item.name)?;
    if options.ocdbt {
        write_database(staged, &dir, written, options)?;
    }
    if !item.array_metadatas.is_empty() {
        staged.dir(&dir.join(tree::ARRAY_METADATA_DIR)?)?;
    }
    let mut files = Summed::new(staged, dir, options);
    if !item.array_metadatas.is_empty() {
        let records = item.array_metadatas.iter().map(|(name, record)| (name.as_str(), record));
        files.put(tree::FIRST_ARRAY_METADATA_FILE, &array_metadata::to_bytes(records))?;
    }
    if !item.strings.is_empty() {
        let texts = item.strings.iter().map(|(name, text)| (name.as_str(), text.as_str()));
        let bytes = strings::to_bytes(texts).map_err(|_| Error::bug("a string has no place"))?;
        files.put(tree::STRINGS_FILE, &bytes)?;
    }
    if !item.shardings.is_empty() {
        files.put(tree::SHARDING_FILE, &sharding::to_bytes(&item.shardings))?;
    }
    files.put(tree::METADATA_FILE, &item.metadata.to_bytes())?;
    if !options.ocdbt {
        // They were written before the arrays; in a database they stand in its nodes, which have checksums.
        for job in item.jobs.iter() {
            let name = stored_key(&job.name, job.new.format.metadata_key());
            files.sums.add(&name, &job.new.metadata()?);
        }
    }
    files.finish()
}

/// A JSON item: its name, its files, and the handler that the metadata list.
#[derive(Debug)]
pub(in crate::tree) struct JsonItem {
    pub(in crate::tree) name: String,
    pub(in crate::tree) files: &'static [&'static str],
    pub(in crate::tree) handler: &'static str,
    pub(in crate::tree) document: Vec<u8>,
}

impl JsonItem {
    /// The item of this name; that of metrics is written as Orbax's managers write it.
    pub(in crate::tree) fn new(name: &str, value: &Value) -> Self {
        let (files, handler, document) = match name {
            checkpoint::METRICS_ITEM => (METRICS_FILES, checkpoint::METRICS_HANDLER, json::metrics_to_bytes(value)),
            _ => (JSON_FILES, checkpoint::JSON_HANDLER, value.to_string().into_bytes()),
        };
        Self { name: name.to_owned(), files, handler, document }
    }

    /// Writes it.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub(in crate::tree) fn write(&self, staged: &mut StagedDir, options: &SaveOptions) -> Result<()> {
        let dir = RelPath::new(&self.name)?;
        staged.dir(&dir)?;
        let mut files = Summed::new(staged, dir, options);
        for file in self.files {
            files.put(file, &self.document)?;
        }
        files.finish()
    }
}

/// Writes the files of the checkpoint's own directory: what its items are, and that it is whole.
///
/// # Errors
/// Whatever the file system refuses.
pub(in crate::tree) fn finish_checkpoint(
    staged: &StagedDir,
    item_handlers: BTreeMap<String, String>,
    (options, custom_text): (&SaveOptions, Option<&str>),
    started_ns: u64,
) -> Result<()> {
    let metadata = checkpoint::CheckpointMetadata {
        item_handlers,
        init_ns: i64::try_from(started_ns).ok(),
        commit_ns: i64::try_from(now_ns()).ok(),
        custom_metadata: options.custom_metadata.clone(),
        custom_text: custom_text.map(str::to_owned),
    };
    let mut files = Summed::new(staged, RelPath::root(), options);
    files.put(checkpoint::METADATA_FILE, &metadata.to_bytes())?;
    files.finish()?;
    let put = |name: &str, contents: &[u8]| staged.write(&RelPath::new(name)?, contents, options.sync);
    put(checkpoint::V1_MARKER, &[])?;
    put(checkpoint::COMMIT_FILE, checkpoint::commit_text(staged.target().display()).as_bytes())
}

/// The files of a directory whose checksums are kept beside them.
struct Summed<'a> {
    staged: &'a StagedDir,
    dir: RelPath,
    options: &'a SaveOptions,
    sums: Sums,
}

impl<'a> Summed<'a> {
    fn new(staged: &'a StagedDir, dir: RelPath, options: &'a SaveOptions) -> Self {
        Self { staged, dir, options, sums: Sums::default() }
    }

    fn put(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        self.sums.add(name, contents);
        self.staged.write(&self.dir.join(name)?, contents, self.options.sync)
    }

    /// Writes the checksums, unless they are not wanted.
    fn finish(self) -> Result<()> {
        match self.options.checksum {
            Some(false) => Ok(()),
            _ => self.staged.write(&self.dir.join(SUMS_FILE)?, &self.sums.to_bytes(), self.options.sync),
        }
    }
}

/// Nanoseconds since the Unix epoch.
pub(in crate::tree) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Appends the nodes to the last data file, makes the data durable, and writes the manifest that refers to all of it.
///
/// # Errors
/// A key twice; whatever the file system refuses.
pub(in crate::tree) fn write_database(
    staged: &mut StagedDir,
    dir: &RelPath,
    mut written: Written,
    options: &SaveOptions,
) -> Result<()> {
    if written.entries.is_empty() {
        // Without arrays there is no database, as Orbax has it.
        return Ok(());
    }
    let open = match written.open.take() {
        Some(open) => open,
        None => {
            let (file, path) = new_data_file(staged, dir)?;
            DataFile { id: written.add_file(path), file: ValueFile::new(file, false), end: 0 }
        }
    };
    let path = written.path(open.id)?.clone();
    let index = Index::of_new(written.files, written.entries)
        .map_err(|key| Error::bug("a key was written twice").found(String::from_utf8_lossy(&key)))?;
    let mut config = ocdbt::Config::new(store::random_bytes()?);
    config.decoded_node_bytes_max = options.node_bytes;
    let place = ocdbt::NodePlace { root: dir, file: &path, offset: open.end };
    let database = ocdbt::write(&index, place, &config, now_ns())?;
    open.file.write_at(&database.nodes, open.end).map_err(|error| staged.failed(error, "write", &path))?;
    if options.sync {
        // All other data files were made durable when they were full.
        open.file.sync().map_err(|error| staged.failed(error, "sync", &path))?;
    }
    staged.write(&dir.join("manifest.ocdbt")?, &database.manifest, options.sync)
}

/// The files of a JSON item: Orbax v1 reads the first, its managers the second.
const JSON_FILES: &[&str] = &["data.json", "metadata"];
/// The file of the metrics, under which managers and v1 alike look for it.
const METRICS_FILES: &[&str] = &[checkpoint::METRICS_ITEM];
