//! An open checkpoint: what is in it, without a byte of data read.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::catalog::{Catalog, LeafInfo, LeafKind, read_orbax};
use super::engine::EngineOptions;
use super::land::decoder_cost;
use super::target::Target;
use super::tensors::read_safetensors;
use super::verify::damage;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::store::{Leftover, LeftoverKind, leftovers};
use crate::io::{Root, serve};
use crate::keypath::KeyPath;
use crate::layout::orbax::metadata::Container;
use crate::layout::{self, Description, Entry, Format, Item, ItemKind, LayoutKind, Step, StepChoice, default_item};
use crate::limits::{METADATA_FILE_BYTES_MAX, REPLACED_TRIES_MAX};
use crate::need::{Asker, Machine};
use crate::plan::{self, Limits, Plan, Spec, StoredArray};
use crate::relpath::RelPath;

/// How to open a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Which item; `None` for `state`, `pytree`, `default`, `params`, or the only tree.
    pub item: Option<String>,
    /// Which step of a root of steps.
    pub step: StepChoice,
    /// Open a directory whose name says that its save was not finished.
    pub force: bool,
}

/// An open checkpoint, or one item of it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Checkpoint(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: Arc<Root>,
    description: Description,
    item: Option<String>,
    catalog: Catalog,
    opening: Duration,
}

/// What a checkpoint says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Metadata {
    /// Every leaf of the tree, in stored order: Orbax's abstract tree.
    pub leaves: Vec<LeafMetadata>,
    /// The user's metadata.
    pub custom_metadata: Option<serde_json::Value>,
    /// When the save began, in nanoseconds since the Unix epoch.
    pub init_ns: Option<i64>,
    /// When it was committed, in nanoseconds since the Unix epoch.
    pub commit_ns: Option<i64>,
}

/// A leaf without its value.
#[derive(Clone, Debug, PartialEq)]
pub struct LeafMetadata {
    /// Where it lies in the tree.
    pub path: KeyPath,
    /// `array`, `key`, `scalar`, `string`, `none`, `empty` or `unreadable`.
    pub kind: &'static str,
    /// Element type of arrays, keys and scalars.
    pub dtype: Option<DType>,
    /// Extents of arrays and keys; empty for scalars.
    pub shape: Option<Vec<u64>>,
    /// Extents of a stored chunk.
    pub chunk_shape: Option<Vec<u64>>,
    /// The mesh on which it was saved, and the axes of every dimension.
    pub saved: Option<(Arc<layout::orbax::sharding::SavedMesh>, Spec)>,
}

impl Checkpoint {
    /// Opens an Orbax checkpoint (any release), a root of steps, or safetensors (a file, an index, a directory). Of a root, the
    /// latest or the best step is one that is whole, every reference in it looked at;
    /// [`passed_over`](Description::passed_over) has those that are not. A step that is named by its number is judged by its
    /// listings.
    ///
    /// # Errors
    /// A path that is missing or holds no checkpoint, an item or step that is not there, metadata that is damaged.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let mut tries = 0;
        loop {
            let (start, before) = (Instant::now(), directory_at(path));
            let described = describe(path, options);
            let root = described.as_ref().ok().map(|(root, _)| Arc::clone(root));
            let result = described.and_then(|found| Self::described(path, found, options.item.as_deref(), start));
            tries += 1;
            // What was replaced while it was opened is being removed: what is there now is opened instead.
            let replaced = directory_at(path) != before || root.is_some_and(|root| root.is_replaced());
            if result.is_ok() || tries == REPLACED_TRIES_MAX || !replaced {
                return result;
            }
        }
    }

    /// Whether another directory has its path by now, or none: it is being removed, and whoever fails to read it may open what
    /// is there now.
    pub fn is_replaced(&self) -> bool {
        self.0.root.is_replaced()
    }

    /// Opens an item of what was described before, since then.
    pub(super) fn described(
        path: &Path,
        (root, description): (Arc<Root>, Description),
        item: Option<&str>,
        start: Instant,
    ) -> Result<Self> {
        let shown = path.display().to_string();
        let (item, catalog) = match (&description.format, &description.safetensors) {
            (Format::Safetensors, Some(source)) => {
                let source = source.clone();
                (None, ask(&root, |asker| async move { read_safetensors(&asker, &source).await })?)
            }
            _ => {
                let item = default_item(&description.items, item).map_err(|error| error.at("checkpoint", &shown))?;
                let Item { name, kind, dir } = item.clone();
                if kind != ItemKind::Tree {
                    return Err(Error::invalid("the item is no tree of arrays")
                        .at("item", &name)
                        .at("checkpoint", &shown)
                        .hint("`touchdown ls --json` prints the values of JSON items"));
                }
                let catalog = ask(&root, |asker| async move { read_orbax(&asker, &dir).await });
                (Some(name), catalog.map_err(|error| error.at("checkpoint", &shown))?)
            }
        };
        let mut catalog = catalog;
        catalog.read_scalars(&root)?;
        tracing::info!(
            path = %shown,
            layout = description.layout.as_str(),
            leaves = catalog.leaves.len(),
            ms = start.elapsed().as_secs_f64() * 1e3,
            "opened"
        );
        Ok(Self(Arc::new(Inner { root, description, item, catalog, opening: start.elapsed() })))
    }

    /// Format, layout, items, steps, custom metadata, timestamps.
    pub fn description(&self) -> &Description {
        &self.0.description
    }

    /// The item whose tree this is; `None` for safetensors, empty for a bare item.
    pub fn item(&self) -> Option<&str> {
        self.0.item.as_deref()
    }

    /// The directory of the item; none of safetensors.
    pub(super) fn item_dir(&self) -> Option<&RelPath> {
        let name = self.item()?;
        self.0.description.items.iter().find(|item| item.name == name).map(|item| &item.dir)
    }

    /// Every leaf, in stored order.
    pub fn leaves(&self) -> &[LeafInfo] {
        &self.0.catalog.leaves
    }

    /// The meshes on which arrays were saved; leaves refer to them by position.
    pub fn meshes(&self) -> &[Arc<layout::orbax::sharding::SavedMesh>] {
        &self.0.catalog.meshes
    }

    /// The user's metadata of the tree or, failing that, of the checkpoint.
    pub fn custom_metadata(&self) -> Option<&serde_json::Value> {
        self.tree_metadata().or(self.checkpoint_metadata())
    }

    /// The user's metadata of the tree alone.
    pub(super) fn tree_metadata(&self) -> Option<&serde_json::Value> {
        self.0.catalog.custom_metadata.as_ref()
    }

    /// The user's metadata of the checkpoint alone.
    pub(super) fn checkpoint_metadata(&self) -> Option<&serde_json::Value> {
        self.0.description.custom_metadata.as_ref().or(self.0.catalog.checkpoint_metadata.as_ref())
    }

    /// The sequences that are tuples and the mappings that are namedtuples, where that is recorded (Orbax's rich types).
    pub fn containers(&self) -> &[(KeyPath, Container)] {
        &self.0.catalog.containers
    }

    /// The value of a JSON item; NaN and infinities as strings.
    ///
    /// # Errors
    /// No such item, one that is no JSON, or one that cannot be read.
    pub fn json_item(&self, name: &str) -> Result<serde_json::Value> {
        Ok(self.json_item_text(name)?.0)
    }

    /// The same, and the text that it has in its file.
    pub(super) fn json_item_text(&self, name: &str) -> Result<(serde_json::Value, Bytes)> {
        if let Some(text) = self.0.catalog.json_items.get(name) {
            let value = layout::orbax::json::parse(text.as_bytes())
                .map_err(|error| Error::corrupt(error.to_string()).at("offset", error.offset).at("item", name))?;
            return Ok((value, text.clone().into()));
        }
        let item = default_item(&self.0.description.items, Some(name))?;
        if item.kind != ItemKind::Json {
            return Err(Error::invalid("the item is no JSON").at("item", name).found(item.kind.as_str()));
        }
        let dir = &item.dir;
        ask(&self.0.root, |asker| async move { layout::orbax::tree::read_json_text(&asker, dir).await })
            .map_err(|error| error.at("item", name))
    }

    /// The names of the JSON items that go along with its tree into a conversion. That of a random key is part of the tree
    /// beside it.
    pub(super) fn json_items(&self) -> impl Iterator<Item = &str> {
        let goes_along =
            |item: &&Item| item.kind == ItemKind::Json && !item.name.contains('/') && !item.name.is_empty();
        let beside = self.description().items.iter().filter(goes_along).map(|item| item.name.as_str());
        beside.chain(self.0.catalog.json_items.keys().map(String::as_str))
    }

    /// What a small file has in it, if it is there.
    pub(super) fn file(&self, path: &RelPath) -> Result<Option<Bytes>> {
        ask(&self.0.root, |asker| async move { asker.file(path.clone(), METADATA_FILE_BYTES_MAX).await })
    }

    /// Everything that the checkpoint says about itself, without what it takes to load it.
    pub fn metadata(&self) -> Metadata {
        let leaf = |leaf: &LeafInfo| {
            let meta = leaf.kind.array().map(|array| &self.arrays()[array].meta);
            let scalar = match &leaf.kind {
                LeafKind::Scalar { dtype, .. } => Some(*dtype),
                _ => None,
            };
            LeafMetadata {
                path: leaf.path.clone(),
                kind: leaf.kind.name(),
                dtype: meta.map(|meta| meta.dtype).or(scalar),
                shape: meta.map(|meta| meta.shape.clone()).or(scalar.map(|_| Vec::new())),
                chunk_shape: meta.map(|meta| meta.grid.chunk_shape().to_vec()),
                saved: leaf
                    .saved
                    .as_ref()
                    .map(|saved| (Arc::clone(&self.meshes()[saved.mesh]), Spec(saved.spec.clone()))),
            }
        };
        let (init_ns, commit_ns) = self.timestamps_ns();
        let custom_metadata = self.custom_metadata().cloned();
        Metadata { leaves: self.leaves().iter().map(leaf).collect(), custom_metadata, init_ns, commit_ns }
    }

    /// When the save began and when it was committed, in nanoseconds since the Unix epoch, where that is recorded.
    pub fn timestamps_ns(&self) -> (Option<i64>, Option<i64>) {
        (self.0.description.init_ns, self.0.description.commit_ns)
    }

    /// Advice in the checkpoint that could not be used (a damaged `_sharding` file, say).
    pub fn notes(&self) -> &[Error] {
        &self.0.catalog.notes
    }

    /// The whole tree as a target: every leaf as stored, on one CPU device.
    pub fn target(&self) -> Target {
        Target::of(self.clone())
    }

    /// What a load of this target would do, under the default limits.
    ///
    /// # Errors
    /// A target that does not fit the checkpoint; damage that planning meets.
    pub fn plan(&self, target: &Target) -> Result<Plan> {
        self.plan_within(target, EngineOptions::default().limits()?)
    }

    /// What a load of this target would do within these limits.
    ///
    /// # Errors
    /// As [`plan`](Self::plan), and units that do not fit the budget.
    pub fn plan_within(&self, target: &Target, limits: Limits) -> Result<Plan> {
        if !Arc::ptr_eq(&self.0, &target.checkpoint().0) {
            return Err(Error::invalid("the target was made from another checkpoint")
                .expected(self.0.root.path().display())
                .found(target.checkpoint().0.root.path().display())
                .hint(
                    "make the target from the checkpoint that is loaded: apply the same rules to `checkpoint.target()`",
                ));
        }
        let wants = target.wants()?;
        let arrays = self.arrays();
        ask(&self.0.root, |asker| async move { plan::build(&asker, arrays, wants, limits, decoder_cost).await })
            .map_err(|error| error.at("checkpoint", self.0.root.path().display()))
    }

    /// The stored arrays that views refer to.
    pub fn arrays(&self) -> &[StoredArray] {
        &self.0.catalog.arrays
    }

    /// The element type of a leaf that has one.
    pub(super) fn dtype(&self, kind: &LeafKind) -> Option<DType> {
        match kind {
            LeafKind::Scalar { dtype, .. } => Some(*dtype),
            kind => kind.array().map(|array| self.arrays()[array].meta.dtype),
        }
    }

    /// Bytes that each array's chunks take, or `None` where they were not counted; asks for file sizes where chunks are
    /// files.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn stored_bytes(&self) -> Result<Vec<Option<u64>>> {
        self.0.catalog.stored_bytes(&self.0.root)
    }

    /// The value of a leaf that has one element.
    ///
    /// # Errors
    /// A leaf of several elements; damage.
    pub(super) fn element(&self, array: usize) -> Result<super::value::Value> {
        self.0.catalog.element(&self.0.root, array)
    }

    pub(super) fn root(&self) -> Arc<Root> {
        Arc::clone(&self.0.root)
    }

    pub(super) fn opening(&self) -> Duration {
        self.0.opening
    }
}

/// The value of the JSON item in this directory.
pub(super) fn read_json(root: &Root, dir: &RelPath) -> Result<serde_json::Value> {
    ask(root, |asker| async move { layout::orbax::tree::read_json(&asker, dir).await })
}

/// Opens a path and finds out what it is. Of a root of steps the latest or best step is looked into, as a series does before it
/// gives one: what is damaged beyond what its listings show is passed over. The step is held: what is read of it is of one save,
/// also if it is replaced meanwhile.
pub(super) fn describe(path: &Path, options: &OpenOptions) -> Result<(Arc<Root>, Description)> {
    let is_named = options.force || matches!(options.step, StepChoice::Number(_));
    let (mut damaged, mut whole) = (BTreeMap::new(), None);
    loop {
        let (root, description) = describe_listed(path, options, &damaged)?;
        let is_known = |step: &Step| is_named || whole.as_ref() == Some(&step.name);
        let Some(step) = description.step.as_ref().filter(|step| !is_known(step)) else {
            return held(root, description, options);
        };
        // Looked into are as many as need be before the root is listed again.
        for step in std::iter::once(step).chain(&description.alternatives) {
            match damage(&root.path().join(step.dir.as_path()), false, &EngineOptions::default())? {
                Some(reason) => _ = damaged.insert(step.name.clone(), reason),
                None if damaged.is_empty() => return held(root, description, options),
                None => {
                    whole = Some(step.name.clone());
                    break;
                }
            }
        }
    }
}

/// Holds the step that was chosen, and describes what is held.
fn held(mut root: Root, mut description: Description, options: &OpenOptions) -> Result<(Arc<Root>, Description)> {
    let Some(step) = description.step.as_ref().map(|step| step.dir.clone()) else {
        return Ok((Arc::new(root), description));
    };
    root.hold(&step)?;
    let whole = layout::Options {
        entry: Entry::Dir,
        name: None,
        step: StepChoice::Unstated,
        force: options.force,
        damaged: BTreeMap::new(),
    };
    let own = ask(&root.below(&step)?, |asker| async move { layout::describe(&asker, &whole).await })
        .map_err(|error| error.at("step", root.shown(&step)))?;
    // Items with numbers for names look like steps, but of a step they are the items that they were found to be.
    if own.layout != LayoutKind::Steps {
        let below = |item: Item| Ok(Item { dir: step.join(item.dir.as_bytes())?, ..item });
        description.items = own.items.into_iter().map(below).collect::<Result<_>>()?;
        description.custom_metadata = own.custom_metadata.or(description.custom_metadata);
        (description.init_ns, description.commit_ns) = (own.init_ns, own.commit_ns);
    }
    Ok((Arc::new(root), description))
}

/// The same, judging steps by their listings, and by what is known of them already: for who looks into what it is for damage.
pub(super) fn describe_listed(
    path: &Path,
    options: &OpenOptions,
    damaged: &BTreeMap<String, String>,
) -> Result<(Root, Description)> {
    let (root, entry) = open_root(path)?;
    let wanted = layout::Options {
        entry,
        name: directory_name(path),
        step: options.step.clone(),
        force: options.force,
        damaged: damaged.clone(),
    };
    let description = ask(&root, |asker| async move { layout::describe(&asker, &wanted).await })
        .map_err(|error| error.at("checkpoint", path.display()))?;
    if description.format == Format::Safetensors && options.item.is_some() {
        return Err(Error::invalid("safetensors have no items")
            .at("checkpoint", path.display())
            .hint("leave out --item"));
    }
    Ok((root, description))
}

/// Runs a metadata machine over the files of a directory.
pub(super) fn ask<'a, T, F>(root: &Root, body: impl FnOnce(Asker) -> F) -> Result<T>
where
    F: Future<Output = Result<T>> + Send + 'a,
{
    Machine::new(body).drive(|needs| serve(root, &needs))
}

/// Opens a directory, or the directory of a file.
pub(super) fn open_root(path: &Path) -> Result<(Root, Entry)> {
    let metadata = std::fs::metadata(path).map_err(|error| {
        let errno = rustix::io::Errno::from_io_error(&error);
        let known = errno.map(|errno| crate::io::io_error(errno, "open"));
        let error = known.unwrap_or_else(|| Error::not_found("no such path").caused_by(error));
        match error.kind() {
            crate::ErrorKind::NotFound => {
                let error = error.at("path", path.display());
                let Some(left) = left_over(path) else {
                    return error.hint("give the directory of a checkpoint or a .safetensors file");
                };
                let left_at = left.path.display();
                error.hint(match left.kind {
                    LeftoverKind::Replaced => {
                        format!("replacing it was interrupted; the old checkpoint is at {left_at}: rename it back")
                    }
                    LeftoverKind::Staging => format!("a save of it was not finished; what it left is at {left_at}"),
                })
            }
            _ => error.at("path", path.display()),
        }
    })?;
    if metadata.is_dir() {
        return Ok((Root::open(path)?, Entry::Dir));
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let (Some(name), true) = (name, metadata.is_file()) else {
        return Err(Error::corrupt("the path is neither a directory nor a regular file").at("path", path.display()));
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((Root::open(parent)?, Entry::File(name)))
}

/// Which directory or file is at a path now, by its device and number.
fn directory_at(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// What an interrupted save left of a checkpoint that is not there: the old one that was moved aside, rather than a new one.
fn left_over(path: &Path) -> Option<Leftover> {
    let path = std::path::absolute(path).ok()?;
    let left = leftovers(path.parent()?).ok()?;
    left.into_iter().filter(|one| one.is_of(&path)).max_by_key(|one| one.kind == LeftoverKind::Replaced)
}

/// The name of the directory that was given, whatever way it was spelt (`.`, a trailing `/`).
pub(super) fn directory_name(path: &Path) -> Option<String> {
    let whole = std::fs::canonicalize(path).ok()?;
    whole.file_name().map(|name| name.to_string_lossy().into_owned())
}
