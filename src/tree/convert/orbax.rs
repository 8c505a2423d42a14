//! Arrays on their way into an Orbax checkpoint.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::to_raw_value;

use super::journal;
use super::sink::{Filled, Io, Sink};
use crate::error::{Error, ErrorKind, Result};
use crate::io::StagedDir;
use crate::keypath::KeyPath;
use crate::kv::{Extent, FileId, Value};
use crate::layout::Format;
use crate::layout::orbax::{checkpoint, json, tree};
use crate::plan::{Device, Mesh, Sharding, Spec};
use crate::relpath::RelPath;
use crate::shape::Region;
use crate::tree::save::{
    Context, DataFile, Durable, Elements, Held, INLINE_PER_BUDGET, Item, JsonItem, NewArray, NewLeaf, NewPart,
    SaveOptions, Storage, Tree, ValueFile, Written, finish_checkpoint, finish_tree, now_ns, write_arrays,
};
use crate::tree::target::{ArrayWant, Target, TargetLeaf, What};
use crate::tree::{LeafKind, Value as Scalar};

/// A checkpoint of one item that is being written.
pub(super) struct OrbaxSink {
    item: Item,
    /// The JSON items that lie beside it.
    beside: Vec<JsonItem>,
    held: Held,
    /// The checkpoint's custom metadata as they are written in the source, where a value does not hold them.
    custom_text: Option<String>,
    dir: RelPath,
    options: SaveOptions,
    written: Written,
    started_ns: u64,
    /// How much of what was written is in the journal.
    noted: Noted,
}

#[derive(Clone, Copy, Default)]
struct Noted {
    entries: usize,
    files: usize,
    made: usize,
}

/// What the journal keeps of a wave.
#[derive(Serialize, Deserialize)]
struct Note {
    entries: Vec<Entry>,
    files: Vec<String>,
    made: Vec<String>,
    /// The data file that is not full, and how long it is.
    open: Option<(u32, u64)>,
    bytes: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Place {
    Text(String),
    Bytes(Vec<u8>),
    At(u32, u64, u64),
}

type Entry = (String, Place);

impl OrbaxSink {
    /// Plans the checkpoint of a target; its shardings say how arrays are divided into chunks.
    ///
    /// # Errors
    /// Everything that keeps it from being written, in one error.
    pub(super) fn plan(target: &Target, options: &SaveOptions, budget: u64) -> Result<Self> {
        let mut tree = Tree::new();
        let mut problems = Vec::new();
        for leaf in &target.leaves {
            match new_leaf(target, leaf) {
                Ok(new) => tree.push(leaf.path.clone(), new),
                Err(error) => problems.push(error.at("leaf", &leaf.path)),
            }
        }
        for (path, container) in containers(target) {
            tree = tree.container(path, container);
        }
        tree.custom_metadata = target.checkpoint.tree_metadata().cloned();
        let texts = match Texts::read(target) {
            Ok(texts) => texts,
            Err(error) => {
                problems.push(error);
                Texts::default()
            }
        };
        let mut options = options.clone();
        options.rich_types |= !tree.containers.is_empty();
        let custom_text = match options.custom_metadata {
            None => texts.of_checkpoint,
            Some(_) => None,
        };
        options.custom_metadata = options.custom_metadata.or_else(|| target.checkpoint.checkpoint_metadata().cloned());
        options.check_custom_metadata(&mut problems);
        let beside = match json_items(target) {
            Ok(beside) => beside,
            Err(error) => {
                problems.push(error);
                Vec::new()
            }
        };
        let inline_bytes = budget / INLINE_PER_BUDGET;
        let mut item = Item::plan(ITEM, &tree, (Elements::Later, inline_bytes), &options, &mut problems);
        item.metadata.custom_text = texts.of_tree;
        let held = Held::of_conversion(&item, &options);
        match held.room(budget) {
            Ok(room) => problems.extend(item.over_budget(room / 2).map(super::halved)),
            Err(error) => problems.push(error),
        }
        let cast = item.paths.iter().zip(item.jobs.iter()).filter(|(_, job)| job.casts());
        problems.extend(
            cast.map(|(path, _)| {
                Error::invalid("a conversion casts by its target, not by save options").at("leaf", path)
            }),
        );
        let written = if problems.is_empty() { Written::of(&item) } else { Written::default() };
        match Error::merged(problems) {
            // What zarr has no type for is nothing that is wrong with the source.
            Some(error) if error.kind() == ErrorKind::Unsupported => {
                let lines = match error.list() {
                    [] => vec![error.to_string()],
                    lines => lines.to_vec(),
                };
                Err(Error::invalid("an Orbax checkpoint cannot hold everything")
                    .lines(lines)
                    .hint("cast what it cannot hold (`--cast`), or leave it out (`--skip`)"))
            }
            Some(error) => Err(error),
            None => Ok(Self {
                item,
                beside,
                held,
                custom_text,
                dir: RelPath::new(ITEM)?,
                options,
                written,
                started_ns: now_ns(),
                noted: Noted::default(),
            }),
        }
    }
}

impl Sink for OrbaxSink {
    fn steps(&self) -> Vec<u64> {
        self.item.jobs.iter().map(|job| job.chunk_rows()).collect()
    }

    fn held(&self) -> Held {
        self.held
    }

    fn identity(&self) -> Result<Vec<u8>> {
        let mut all = self.item.description();
        for job in self.item.jobs.iter() {
            all.extend(job.new.metadata()?);
        }
        all.extend(format!("{:?} {}", Storage::of(&self.options), self.dir).into_bytes());
        all.extend(format!("{:?}{:?}{:?}", self.options.custom_metadata, self.custom_text, self.beside).into_bytes());
        Ok(all)
    }

    fn open(&mut self, staged: &mut StagedDir) -> Result<()> {
        staged.dir(&self.dir)
    }

    fn write(&mut self, io: &mut Io<'_>, pieces: Vec<Filled>) -> Result<()> {
        let jobs = pieces.into_iter().map(|Filled { task, region, data }| {
            let begun = region.start.first().is_some_and(|start| *start > 0);
            self.item.jobs[task].piece(region, data, begun)
        });
        let jobs = Arc::new(jobs.collect::<Vec<_>>());
        let context = Context {
            pool: io.pool,
            budget: io.budget,
            progress: io.progress,
            staged: io.staged,
            dir: self.dir.clone(),
            storage: Storage::of(&self.options),
            durable: Durable::of(&self.options),
        };
        self.written = write_arrays(context, &jobs, std::mem::take(&mut self.written))?;
        Ok(())
    }

    fn note(&mut self, staged: &StagedDir) -> Result<journal::Note> {
        let from = self.noted;
        if self.options.sync {
            // Files that are full are durable.
            if let Some(open) = &self.written.open {
                open.file.sync().map_err(|error| match self.written.path(open.id) {
                    Ok(path) => staged.failed(error, "sync", path),
                    Err(error) => error,
                })?;
            }
            for dir in parents(&self.written.made_files[from.made..])? {
                staged.sync_dir(&dir)?;
            }
        }
        let note = Note {
            entries: self.written.entries[from.entries..].iter().map(entry).collect::<Result<_>>()?,
            files: self.written.files[from.files..].iter().map(RelPath::to_string).collect(),
            made: self.written.made_files[from.made..].iter().map(RelPath::to_string).collect(),
            open: self.written.open.as_ref().map(|open| (open.id.0, open.end)),
            bytes: self.written.bytes,
        };
        self.noted = Noted {
            entries: self.written.entries.len(),
            files: self.written.files.len(),
            made: self.written.made_files.len(),
        };
        to_raw_value(&note).map_err(|error| Error::bug(error.to_string()))
    }

    fn restore(&mut self, staged: &StagedDir, notes: Vec<journal::Note>) -> Result<HashSet<RelPath>> {
        let mut open = None;
        for note in notes {
            let note: Note = serde_json::from_str(note.get())
                .map_err(|error| Error::corrupt("the journal makes no sense").caused_by(error))?;
            let written = &mut self.written;
            for (key, place) in note.entries {
                let value = match place {
                    Place::Text(text) => Value::Inline(Bytes::from(text)),
                    Place::Bytes(bytes) => Value::Inline(bytes.into()),
                    Place::At(file, offset, len) => Value::Extent(Extent { file: FileId(file), offset, len }),
                };
                written.entries.push((key.into(), value));
            }
            for path in note.files {
                written.files.push(RelPath::new(path)?);
            }
            for path in note.made {
                written.made_files.push(RelPath::new(path)?);
            }
            open = note.open;
            written.bytes = note.bytes;
        }
        if let Some((id, end)) = open {
            let id = FileId(id);
            let file = ValueFile::new(staged.open(self.written.path(id)?)?, false);
            self.written.open = Some(DataFile { id, file, end });
        }
        let files = self.written.files.len();
        let known = |value: &Value| match value {
            Value::Extent(extent) => (extent.file.0 as usize) < files,
            Value::Inline(_) => true,
        };
        if !self.written.entries.iter().all(|(_, value)| known(value)) {
            return Err(Error::corrupt("the journal names a data file that it does not have"));
        }
        self.noted = Noted { entries: self.written.entries.len(), files, made: self.written.made_files.len() };
        Ok(self.written.made_files.iter().cloned().collect())
    }

    fn finish(&mut self, staged: &mut StagedDir) -> Result<u64> {
        let written = std::mem::take(&mut self.written);
        let bytes = written.bytes;
        finish_tree(staged, &self.item, written, &self.options)?;
        let mut handlers = BTreeMap::from([(ITEM.to_owned(), checkpoint::TREE_HANDLER.to_owned())]);
        for item in &self.beside {
            item.write(staged, &self.options)?;
            handlers.insert(item.name.clone(), item.handler.to_owned());
        }
        finish_checkpoint(staged, handlers, (&self.options, self.custom_text.as_deref()), self.started_ns)?;
        Ok(bytes)
    }
}

/// Custom metadata as the source has them written, where they have numbers that a value does not hold: `NaN`, or integers beyond
/// 64 bits.
#[derive(Default)]
struct Texts {
    of_checkpoint: Option<String>,
    of_tree: Option<String>,
}

impl Texts {
    fn read(target: &Target) -> Result<Self> {
        let (checkpoint, description) = (&target.checkpoint, target.checkpoint.description());
        if description.format != Format::Orbax {
            return Ok(Self::default());
        }
        let items = &description.items;
        let item = items.iter().find(|item| Some(item.name.as_str()) == checkpoint.item());
        let item = item.map_or_else(RelPath::root, |item| item.dir.clone());
        let step = description.step.as_ref().map_or_else(RelPath::root, |step| step.dir.clone());
        let root = RelPath::root().join(checkpoint::ROOT_METADATA_DIR)?;
        let of = |paths: &[RelPath], value: Option<&serde_json::Value>| -> Result<Option<String>> {
            let Some(value) = value else { return Ok(None) };
            for path in paths {
                let Some(bytes) = checkpoint.file(path)? else { continue };
                let members = ["custom_metadata", "custom"].map(|name| json::inexact_member(&bytes, name));
                let whole = json::is_inexact(&bytes).then(|| String::from_utf8_lossy(&bytes).into_owned());
                // Which of several files counts is known by what was read of it.
                let text = members.into_iter().flatten().chain(whole);
                if let Some(text) = text.into_iter().find(|text| json::parse(text.as_bytes()).as_ref() == Ok(value)) {
                    return Ok(Some(text));
                }
            }
            Ok(None)
        };
        let own = [
            step.join(checkpoint::METADATA_FILE)?,
            root.join(checkpoint::ROOT_METADATA_FILE)?,
            root.join(checkpoint::OLD_ROOT_METADATA_FILE)?,
        ];
        Ok(Self {
            of_checkpoint: of(&own, checkpoint.checkpoint_metadata())?,
            of_tree: of(&[item.join(tree::METADATA_FILE)?], checkpoint.tree_metadata())?,
        })
    }
}

/// The JSON items of the source, all of which the new checkpoint has, too.
fn json_items(target: &Target) -> Result<Vec<JsonItem>> {
    let item = |name: &str| {
        if name == ITEM {
            return Err(Error::invalid("a JSON item has the name that the tree is to have").at("item", ITEM));
        }
        // Names in a file of tensors are anything.
        RelPath::root().join(name).map_err(|error| Error::from(error).at("item", name))?;
        let (value, text) = target.checkpoint.json_item_text(name)?;
        // The text is what may have numbers that no value holds.
        Ok(JsonItem { document: text.to_vec(), ..JsonItem::new(name, &value) })
    };
    target.checkpoint.json_items().map(item).collect()
}

/// The tuples and namedtuples of the source below which leaves are still where they were.
pub(super) fn containers(target: &Target) -> Vec<(KeyPath, crate::layout::orbax::metadata::Container)> {
    let stored = target.checkpoint.leaves();
    let mut above: HashSet<&[crate::keypath::Key]> = HashSet::new();
    for leaf in &target.leaves {
        let kept = leaf.source.is_some_and(|source| stored[source].path == leaf.path);
        if kept {
            above.extend((0..leaf.path.0.len()).map(|len| &leaf.path.0[..len]));
        }
    }
    let containers = target.checkpoint.containers().iter();
    containers.filter(|(path, _)| above.contains(path.0.as_slice())).cloned().collect()
}

fn new_leaf(target: &Target, leaf: &TargetLeaf) -> Result<NewLeaf> {
    Ok(match &leaf.what {
        What::Array(array) => NewLeaf::Array(new_array(target, leaf, array)?),
        What::Scalar { dtype, value } => NewLeaf::Value(value.clone(), Some(*dtype)),
        What::Text(text) => NewLeaf::Value(Scalar::Text(text.clone()), None),
        What::None => NewLeaf::None,
        What::Empty(container) => NewLeaf::Empty(*container),
        What::Unreadable(error) => return Err(error.duplicate()),
    })
}

/// An array that comes later: the regions of its shards, as the target divides it, or else as it was saved.
fn new_array(target: &Target, leaf: &TargetLeaf, array: &ArrayWant) -> Result<NewArray> {
    let rank = array.shape.len();
    let sharding = match (&array.sharding, &target.mesh) {
        (Some((mesh, spec)), _) => Some(Sharding::new(Arc::clone(mesh), spec.clone(), rank)?),
        (None, Some(mesh)) => Some(Sharding { mesh: Arc::clone(mesh), spec: Spec::REPLICATED }),
        (None, None) => saved_sharding(target, leaf, array),
    };
    let mut regions: Vec<Region> = Vec::new();
    match &sharding {
        Some(sharding) => {
            let mut seen = HashSet::new();
            for position in 0..sharding.mesh.devices().len() {
                let region = sharding.region(&array.shape, position);
                if seen.insert(region.clone()) {
                    regions.push(region);
                }
            }
        }
        None => regions.push(Region::whole(&array.shape)),
    }
    let parts = regions.into_iter().map(|region| NewPart::new(region, Bytes::new())).collect();
    let (shape, dtype, key_impl) = (array.shape.clone(), array.dtype, array.key_impl.clone());
    Ok(NewArray { shape, dtype, sharding, parts, key_impl })
}

/// How the array was divided when it was saved, devices by their numbers then. What does not fit any more is left out: it is
/// advice.
fn saved_sharding(target: &Target, leaf: &TargetLeaf, array: &ArrayWant) -> Option<Sharding> {
    let info = &target.checkpoint.leaves()[leaf.source?];
    let saved = info.saved.as_ref().filter(|_| matches!(info.kind, LeafKind::Array(_) | LeafKind::Key(..)))?;
    let mesh = target.checkpoint.meshes().get(saved.mesh)?;
    let count = u32::try_from(crate::shape::element_count(&mesh.shape)?).ok()?;
    let numbered = mesh.device_ids.as_ref().and_then(|ids| {
        let devices = ids.iter().map(|id| u32::try_from(*id).ok().map(Device::Cpu)).collect::<Option<Vec<_>>>()?;
        let distinct: HashSet<Device> = devices.iter().copied().collect();
        (distinct.len() == ids.len() && ids.len() == count as usize).then_some(devices)
    });
    if count > crate::limits::CPU_DEVICES_MAX {
        return None;
    }
    let axes = mesh.axes.iter().cloned().zip(mesh.shape.iter().copied());
    let mesh = Mesh::new(axes, numbered.unwrap_or_else(|| Device::cpus(count))).ok()?;
    Sharding::new(mesh, array.saved_spec(saved), array.shape.len()).ok()
}

fn entry((key, value): &(Bytes, Value)) -> Result<Entry> {
    let key = String::from_utf8(key.to_vec()).map_err(|_| Error::bug("a key that is no text"))?;
    let place = match value {
        Value::Extent(extent) => Place::At(extent.file.0, extent.offset, extent.len),
        Value::Inline(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Place::Text(text.to_owned()),
            Err(_) => Place::Bytes(bytes.to_vec()),
        },
    };
    Ok((key, place))
}

/// The directories that lead to files, the innermost first.
fn parents(files: &[RelPath]) -> Result<Vec<RelPath>> {
    let mut dirs = BTreeSet::from([RelPath::root()]);
    for file in files {
        let bytes = file.as_bytes();
        for (at, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            dirs.insert(RelPath::new(&bytes[..at])?);
        }
    }
    Ok(dirs.into_iter().rev().collect())
}

/// The name of the item, where Orbax and this crate look first.
const ITEM: &str = "state";
