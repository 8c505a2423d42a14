//! Arrays on their way into safetensors files.
//!
//! Names, types and shapes are known before anything is written, so every file's head is, too, and each tensor has its place:
//! pieces are written where they belong. Files are filled one after the other in the tree's order.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use serde_json::Value as Json;
use serde_json::value::to_raw_value;

use super::journal::Note;
use super::orbax::containers;
use super::pieces::Task;
use super::sink::{Filled, Io, Sink};
use crate::dtype::DType;
use crate::encode::{pack, prepare};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{StagedDir, StoreFile};
use crate::keypath::{Key, KeyPath};
use crate::layout::Format;
use crate::layout::safetensors::header::{packed_bits, stored_bytes};
use crate::layout::safetensors::index::Index;
use crate::layout::safetensors::tree::{self, ENTRY, Leaf};
use crate::layout::safetensors::write::{NewTensor, file_name, index_bytes, new_file, refused};
use crate::limits::SAFETENSORS_FILES_MAX;
use crate::relpath::RelPath;
use crate::shape::strides;
use crate::tree::Checkpoint;
use crate::tree::save::Held;
use crate::tree::target::{ArrayWant, Target, What};

/// Files that are being written.
pub(super) struct TensorSink {
    files: Vec<File>,
    /// Where each task's tensor is.
    places: Vec<Place>,
    /// The name and the contents of the index, if there is one.
    index: Option<(RelPath, Vec<u8>)>,
    /// Files at hand.
    open: BTreeMap<usize, Arc<dyn StoreFile>>,
    /// Files that exist; how many of them are in the journal.
    made: Vec<usize>,
    noted: usize,
    /// Files with writes that are not durable.
    touched: BTreeSet<usize>,
    sync: bool,
}

/// `__metadata__`.
type Strings = BTreeMap<String, String>;

struct File {
    path: RelPath,
    head: Vec<u8>,
    size: u64,
}

struct Place {
    file: usize,
    offset: u64,
    dtype: DType,
    shape: Vec<u64>,
}

impl TensorSink {
    /// Plans the files of a target. With a name all tensors go into one file of that name.
    ///
    /// # Errors
    /// Everything that keeps it from being written, in one error.
    pub(super) fn plan(
        target: &Target,
        tasks: &[Task],
        name: Option<&str>,
        max_shard_bytes: u64,
        sync: bool,
    ) -> Result<Self> {
        let tensors = tensors(target, tasks)?;
        let (metadata, rest) = metadata(target, &tensors)?;
        let limit = if name.is_some() { u64::MAX } else { max_shard_bytes };
        let of = shards(&tensors, limit);
        let count = of.last().map_or(1, |last| last + 1);
        if count > SAFETENSORS_FILES_MAX {
            return Err(Error::invalid("the tensors need too many files")
                .expected(format_args!("at most {SAFETENSORS_FILES_MAX}"))
                .found(count)
                .hint("allow larger files (`--max-shard-bytes`)"));
        }
        let mut grouped: Vec<Vec<NewTensor>> = vec![Vec::new(); count];
        for (tensor, file) in tensors.iter().zip(&of) {
            grouped[*file].push(tensor.clone());
        }
        let (mut files, mut offsets, mut problems) = (Vec::new(), HashMap::new(), Vec::new());
        let mut index = Index { weight_map: BTreeMap::new() };
        let mut total = 0;
        for (number, group) in grouped.into_iter().enumerate() {
            let file_name = name.map_or_else(|| file_name(number + 1, count), str::to_owned);
            // The tree stands in the first file.
            let metadata = if number == 0 { metadata.clone() } else { rest.clone() };
            match new_file(group, metadata) {
                Ok(new) => {
                    for tensor in new.header.tensors {
                        total += tensor.len;
                        index.weight_map.insert(tensor.name.clone(), file_name.clone());
                        offsets.insert(tensor.name, tensor.offset);
                    }
                    files.push(File { path: RelPath::new(file_name)?, head: new.head, size: new.size });
                }
                Err(found) => problems.extend(found),
            }
        }
        if !problems.is_empty() {
            return Err(refused(&problems));
        }
        let index = match count {
            1 => None,
            _ => {
                let bytes = index_bytes(&index, total).map_err(|_| Error::bug("too many files"))?;
                Some((RelPath::new(INDEX_NAME)?, bytes))
            }
        };
        let place = |(NewTensor { name, dtype, shape }, file): (NewTensor, usize)| {
            let offset = offsets.get(&name).copied().ok_or_else(|| Error::bug("a tensor without a place"))?;
            Ok(Place { file, offset, dtype, shape })
        };
        let places = tensors.into_iter().zip(of).map(place).collect::<Result<_>>()?;
        let (open, made, touched) = (BTreeMap::new(), Vec::new(), BTreeSet::new());
        Ok(Self { files, places, index, open, made, noted: 0, touched, sync })
    }

    /// A file, ready to be written to.
    fn file(&mut self, staged: &StagedDir, number: usize) -> Result<Arc<dyn StoreFile>> {
        if let Some(file) = self.open.get(&number) {
            return Ok(Arc::clone(file));
        }
        let File { path, head, .. } = &self.files[number];
        let file: Arc<dyn StoreFile> = if self.made.contains(&number) {
            Arc::from(staged.open(path)?)
        } else {
            let file = staged.file(path)?;
            file.write_at(head, 0).map_err(|error| staged.failed(error, "write", path))?;
            self.made.push(number);
            self.touched.insert(number);
            Arc::from(file)
        };
        self.open.insert(number, Arc::clone(&file));
        Ok(file)
    }

    /// Makes everything durable that was written. Only the last file at hand stays open: the others are done, nearly always.
    fn flush(&mut self, staged: &StagedDir) -> Result<()> {
        for number in std::mem::take(&mut self.touched) {
            if let (true, Some(file)) = (self.sync, self.open.get(&number)) {
                file.sync().map_err(|error| staged.failed(error, "sync", &self.files[number].path))?;
            }
        }
        if let Some(last) = self.open.keys().next_back().copied() {
            self.open.retain(|number, _| *number == last);
        }
        Ok(())
    }
}

impl Sink for TensorSink {
    fn steps(&self) -> Vec<u64> {
        self.places.iter().map(Place::step).collect()
    }

    fn held(&self) -> Held {
        // Its files' headers.
        Held::steady(self.files.iter().map(|file| file.head.len() as u64).sum())
    }

    fn identity(&self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for File { path, head, size } in &self.files {
            all.extend(format!("{path} {size} ").into_bytes());
            all.extend(head);
        }
        Ok(all)
    }

    fn open(&mut self, _: &mut StagedDir) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, io: &mut Io<'_>, pieces: Vec<Filled>) -> Result<()> {
        let mut blocks = Vec::new();
        for Filled { task, region, data } in pieces {
            let file = self.places[task].file;
            let handle = self.file(io.staged, file)?;
            self.touched.insert(file);
            let Place { offset, dtype, shape, .. } = &self.places[task];
            let row = region.start.first().copied().unwrap_or(0) * strides(shape).first().copied().unwrap_or(1);
            let at = offset + stored_bytes(*dtype, &[row]).ok_or_else(|| Error::bug("a piece ends inside a byte"))?;
            blocks.extend(blocks_of(&handle, file, *dtype, data, at)?);
        }
        let write = |block: &Block| -> Result<()> {
            if io.progress.is_cancelled() {
                return Err(Error::new(ErrorKind::Cancelled, "the conversion was cancelled"));
            }
            let failed = |error| io.staged.failed(error, "write", &self.files[block.number].path);
            let stored = prepare(block.dtype, &block.data);
            match packed_bits(block.dtype) {
                Some(bits) => block.file.write_at(&pack(bits, &stored), block.at),
                None => block.file.write_at(&stored, block.at),
            }
            .map_err(failed)?;
            io.progress.add(block.data.len() as u64);
            Ok(())
        };
        // Every failure is looked at, so that the first one in order is told.
        let written: Vec<Result<()>> = io.pool.install(|| blocks.par_iter().map(write).collect());
        written.into_iter().collect()
    }

    fn note(&mut self, staged: &StagedDir) -> Result<Note> {
        let new = self.made[self.noted..].to_vec();
        self.flush(staged)?;
        if self.sync && !new.is_empty() {
            staged.sync_dir(&RelPath::root())?;
        }
        self.noted = self.made.len();
        to_raw_value(&new).map_err(|error| Error::bug(error.to_string()))
    }

    fn restore(&mut self, staged: &StagedDir, notes: Vec<Note>) -> Result<HashSet<RelPath>> {
        for note in notes {
            let made: Vec<usize> = serde_json::from_str(note.get())
                .map_err(|error| Error::corrupt("the journal makes no sense").caused_by(error))?;
            self.made.extend(made);
        }
        let path = |number: &usize| {
            let file = self.files.get(*number).ok_or_else(|| Error::corrupt("the journal names no file of these"))?;
            // It must be there, and be one that can be written to.
            staged.open(&file.path)?;
            Ok(file.path.clone())
        };
        let known = self.made.iter().map(path).collect::<Result<_>>()?;
        self.noted = self.made.len();
        Ok(known)
    }

    fn finish(&mut self, staged: &mut StagedDir) -> Result<u64> {
        let staged = &*staged;
        for number in 0..self.files.len() {
            // A file without elements has not been met yet.
            if !self.made.contains(&number) {
                self.file(staged, number)?;
                self.flush(staged)?;
            }
        }
        self.flush(staged)?;
        if let Some((path, bytes)) = &self.index {
            staged.write(path, bytes, self.sync)?;
        }
        Ok(self.files.iter().map(|file| file.size).sum())
    }
}

impl Place {
    /// The fewest rows that fill whole bytes.
    fn step(&self) -> u64 {
        let row = strides(&self.shape).first().copied().unwrap_or(1);
        let whole = |rows: &u64| row.checked_mul(*rows).and_then(|elements| stored_bytes(self.dtype, &[elements]));
        (1..=8).find(|rows| whole(rows).is_some()).unwrap_or(1)
    }
}

/// Some elements and where they go.
struct Block {
    file: Arc<dyn StoreFile>,
    number: usize,
    dtype: DType,
    data: Bytes,
    at: u64,
}

/// A piece in blocks that the workers share.
fn blocks_of(file: &Arc<dyn StoreFile>, number: usize, dtype: DType, data: Bytes, at: u64) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    for start in (0..data.len()).step_by(BLOCK_BYTES) {
        let end = data.len().min(start + BLOCK_BYTES);
        let elements = (start / dtype.size()) as u64;
        let offset = stored_bytes(dtype, &[elements]).and_then(|offset| offset.checked_add(at));
        let at = offset.ok_or_else(|| Error::bug("a block ends inside a byte"))?;
        blocks.push(Block { file: Arc::clone(file), number, dtype, data: data.slice(start..end), at });
    }
    Ok(blocks)
}

/// One tensor a task: elements joined by dots.
fn tensors(target: &Target, tasks: &[Task]) -> Result<Vec<NewTensor>> {
    let mut named: HashMap<String, &KeyPath> = HashMap::new();
    let mut twice = Vec::new();
    let mut tensors = Vec::with_capacity(tasks.len());
    let leaves = target.leaves.iter().filter_map(|leaf| match &leaf.what {
        What::Array(ArrayWant { dtype, .. }) | What::Scalar { dtype, .. } => Some(*dtype),
        _ => None,
    });
    for (task, dtype) in tasks.iter().zip(leaves) {
        let name = name_of(&task.path);
        if let Some(other) = named.insert(name.clone(), &task.path) {
            twice.push(format!("{other} and {} would both be `{name}`", task.path));
        }
        tensors.push(NewTensor { name, dtype, shape: task.shape.clone() });
    }
    match twice.is_empty() {
        true => Ok(tensors),
        false => {
            Err(Error::invalid("tensors would have one name").lines(twice).hint("rename one of them (`--rename`)"))
        }
    }
}

fn name_of(path: &KeyPath) -> String {
    path.elements().collect::<Vec<_>>().join(".")
}

/// `__metadata__` of the first file, and of the others.
fn metadata(target: &Target, tensors: &[NewTensor]) -> Result<(Strings, Strings)> {
    let checkpoint = &target.checkpoint;
    let custom = checkpoint.tree_metadata();
    let plain = strings(custom);
    let flat = |leaf: &crate::tree::target::TargetLeaf| {
        matches!(&leaf.what, What::Array(array) if array.key_impl.is_none())
            && matches!(leaf.path.0.as_slice(), [Key::Name(_)])
    };
    let from_tensors =
        checkpoint.description().format == Format::Safetensors && checkpoint.json_items().next().is_none();
    if let (true, Some(plain), None) = (from_tensors, &plain, checkpoint.checkpoint_metadata())
        && target.leaves.iter().all(flat)
    {
        // Tensors stay tensors: there is nothing to add.
        return Ok((plain.clone(), Strings::new()));
    }
    let mut names = tensors.iter().map(|tensor| tensor.name.clone());
    let mut next = || names.next().ok_or_else(|| Error::bug("a leaf without a tensor"));
    let mut leaves = Vec::with_capacity(target.leaves.len());
    for leaf in &target.leaves {
        let what = match &leaf.what {
            What::Array(ArrayWant { key_impl: Some(key_impl), .. }) => {
                Leaf::Key { tensor: next()?, key_impl: key_impl.clone() }
            }
            What::Array(_) => Leaf::Array { tensor: next()? },
            What::Scalar { .. } => Leaf::Scalar { tensor: next()? },
            What::Text(text) => Leaf::Text(text.clone()),
            What::None => Leaf::None,
            What::Empty(container) => Leaf::Empty(*container),
            What::Unreadable(error) => return Err(error.duplicate().at("leaf", &leaf.path)),
        };
        leaves.push((leaf.path.clone(), what));
    }
    let tree = tree::Tree {
        leaves,
        containers: containers(target),
        custom_metadata: custom.cloned(),
        checkpoint_metadata: checkpoint.checkpoint_metadata().cloned(),
        json_items: checkpoint.json_items().map(|name| json_item(checkpoint, name)).collect::<Result<_>>()?,
    };
    let text = tree.to_text();
    match tree::parse(&text) {
        Ok(read) if read == tree => {}
        Ok(_) => return Err(Error::invalid("the custom metadata cannot be kept in safetensors")),
        Err(error) => return Err(Error::invalid("the tree cannot be kept in safetensors").caused_by(error)),
    }
    let mut metadata = format_mark();
    metadata.extend(plain.unwrap_or_default());
    metadata.insert(ENTRY.to_owned(), text);
    Ok((metadata, format_mark()))
}

/// The name and the document of a JSON item.
fn json_item(checkpoint: &Checkpoint, name: &str) -> Result<(String, String)> {
    let (_, text) = checkpoint.json_item_text(name)?;
    let text = String::from_utf8(text.to_vec());
    Ok((name.to_owned(), text.map_err(|_| Error::corrupt("the document is no UTF-8").at("item", name))?))
}

/// What Hugging Face's readers want to see: plain row-major tensors.
fn format_mark() -> Strings {
    Strings::from([("format".to_owned(), "pt".to_owned())])
}

/// Custom metadata as a safetensors file has it by itself: strings by name.
fn strings(custom: Option<&Json>) -> Option<Strings> {
    match custom {
        None => Some(Strings::new()),
        Some(Json::Object(members)) if !members.contains_key(ENTRY) => {
            members.iter().map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
        }
        Some(_) => None,
    }
}

/// The file of each tensor: in order, a new one where the limit would be passed.
fn shards(tensors: &[NewTensor], limit: u64) -> Vec<usize> {
    let (mut file, mut bytes) = (0, 0_u64);
    let mut of = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let len = stored_bytes(tensor.dtype, &tensor.shape).unwrap_or(0);
        if bytes > 0 && bytes.saturating_add(len) > limit {
            (file, bytes) = (file + 1, 0);
        }
        bytes = bytes.saturating_add(len);
        of.push(file);
    }
    of
}

/// What is written at once: a multiple of every element's size and of eight elements.
const BLOCK_BYTES: usize = 4 << 20;

const INDEX_NAME: &str = "model.safetensors.index.json";
