//! Is a checkpoint intact? Structure and every reference; with `deep` every stored byte is read, checked and decoded.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::catalog::LeafKind;
use super::check::{check_unit, each_unit};
use super::checkpoint::{Checkpoint, OpenOptions, ask, describe_listed, directory_name};
use super::engine::EngineOptions;
use super::inline::whole_wants;
use super::land::decoder_cost;
pub use super::orphans::Orphan;
use super::orphans::{orphans, values_without_leaf};
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::{Leftover, leftovers};
use crate::io::{Ring, Root};
use crate::layout::orbax::step::is_temporary;
use crate::layout::orbax::tree::read_json;
use crate::layout::orbax::{checkpoint, tree};
use crate::layout::{Description, Format, ItemKind};
use crate::limits::UNCOUNTED_UNITS_MAX;
use crate::plan::{self, Limits, Plan, Verify};
use crate::relpath::RelPath;

/// What [`verify`] finds.
#[derive(Debug, Default)]
pub struct Verified {
    /// Trees and JSON items looked at.
    pub items: u64,
    /// Leaves of all trees.
    pub leaves: u64,
    /// Stored units that were checked.
    pub chunks: u64,
    /// Their stored bytes.
    pub bytes_stored: u64,
    /// Bytes that they decoded to; 0 unless deep.
    pub bytes_decoded: u64,
    /// Everything that is wrong, each once.
    pub problems: Vec<Problem>,
    /// What crashed saves left beside it under its name, and in it: no damage, and safe to remove unless it is the only copy.
    pub leftovers: Vec<Leftover>,
    /// Bytes that nothing refers to, by file, and values that no leaf has: no damage, and the first are normal in databases.
    pub orphans: Vec<Orphan>,
    /// What was told already, so that many of a kind cost no more than their number.
    told: HashSet<String>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The item it belongs to.
    pub item: String,
    /// The leaf or stored array, where it belongs to one.
    pub leaf: Option<String>,
    /// The file.
    pub file: Option<String>,
    /// The byte in that file.
    pub offset: Option<u64>,
    /// Whether values of leaves are lost by it.
    pub data_affected: bool,
    /// What is wrong, in one line.
    pub message: String,
}

/// Checks a checkpoint: all its trees and JSON items. Of a root of steps it is the latest step that is whole by its listings:
/// one that is damaged is what is to be told, and not to be passed over.
///
/// # Errors
/// A path that is missing or holds no checkpoint, or an environment that fails (permission, I/O); damage is no error here
/// but a [`Problem`].
pub fn verify(path: &Path, options: &OpenOptions, deep: bool, engine: &EngineOptions) -> Result<Verified> {
    let mut found = Verified { leftovers: leftovers_of(path), ..Verified::default() };
    let (root, description) = match describe_listed(path, options, &BTreeMap::new()) {
        Ok((root, description)) => (Arc::new(root), description),
        // A path that is there and says that it is a checkpoint is one, however damaged.
        Err(error) if is_marked(path) => {
            found.problem("", None, true, error)?;
            return Ok(found);
        }
        Err(error) => return Err(error),
    };
    missing_files(&root, &description, &mut found)?;
    let names: Vec<Option<String>> = match (description.format, &options.item) {
        (Format::Safetensors, _) => vec![None],
        (_, Some(item)) => vec![Some(item.clone())],
        _ => description
            .items
            .iter()
            .filter(|item| item.kind == ItemKind::Tree)
            .map(|item| Some(item.name.clone()))
            .collect(),
    };
    let json = description.items.iter().filter(|item| item.kind == ItemKind::Json);
    let json = json.filter(|item| options.item.as_ref().is_none_or(|wanted| *wanted == item.name));
    let json: Vec<_> = json.collect();
    let names: Vec<Option<String>> =
        names.into_iter().filter(|name| !json.iter().any(|item| name.as_ref() == Some(&item.name))).collect();
    for item in json {
        let dir = item.dir.clone();
        found.items += 1;
        if let Err(error) = ask(&root, |asker| async move { read_json(&asker, &dir).await }) {
            found.problem(&item.name, None, true, error.at("item", &item.name))?;
        }
    }
    for name in names {
        let shown = name.clone().unwrap_or_default();
        found.items += 1;
        let described = (Arc::clone(&root), description.clone());
        match Checkpoint::described(path, described, name.as_deref(), Instant::now()) {
            Ok(checkpoint) => verify_tree(&checkpoint, &shown, &root, deep, engine, &mut found)?,
            Err(error) => found.problem(&shown, None, true, error)?,
        }
    }
    Ok(found)
}

/// Why a checkpoint is damaged: by its metadata, its manifests or any reference; with `data` by its stored values, too. `None` if
/// it is whole.
pub(crate) fn damage(path: &Path, data: bool, engine: &EngineOptions) -> Result<Option<String>> {
    let found = match verify(path, &OpenOptions::default(), data, engine) {
        Ok(found) => found,
        Err(error) if error.is_of_one_path() => return Ok(Some(error.to_string())),
        Err(error) => return Err(error),
    };
    Ok(found.problems.into_iter().find(|problem| problem.data_affected).map(|problem| problem.message))
}

/// Whether a directory has one of the files that only checkpoints have.
pub(super) fn is_marked(path: &Path) -> bool {
    let unfinished = directory_name(path).is_some_and(|name| is_temporary(&name));
    !unfinished && [checkpoint::METADATA_FILE, checkpoint::V1_MARKER].iter().any(|name| path.join(name).is_file())
}

/// Names files that a checkpoint of its kind has and that Orbax needs, although it can be read here without them.
fn missing_files(root: &Root, description: &Description, found: &mut Verified) -> Result<()> {
    if description.format == Format::Safetensors {
        return Ok(());
    }
    let entries = |dir: &RelPath| -> Result<Vec<String>> {
        Ok(root.list(dir)?.unwrap_or_default().into_iter().map(|entry| entry.name).collect())
    };
    let missing = |found: &mut Verified, item: &str, dir: &RelPath, name: &str| -> Result<()> {
        let error = Error::not_found("a file is missing without which Orbax does not load the checkpoint");
        found.problem(item, None, false, error.at("file", root.shown(&dir.join(name)?)))
    };
    for item in description.items.iter().filter(|item| item.kind == ItemKind::Tree) {
        let names = entries(&item.dir)?;
        let has = |name: &str| names.iter().any(|have| have == name);
        // Only saves that write `_METADATA` write these; items of single arrays and very old ones have none of them.
        let described =
            [tree::SHARDING_FILE, tree::STRINGS_FILE, tree::ARRAY_METADATA_DIR].iter().any(|name| has(name));
        if described && !has(tree::METADATA_FILE) {
            missing(found, &item.name, &item.dir, tree::METADATA_FILE)?;
        }
        if names.iter().any(|name| name.starts_with("ocdbt.process_")) && !has("manifest.ocdbt") {
            missing(found, &item.name, &item.dir, "manifest.ocdbt")?;
        }
        if let Some(parent) = item.dir.as_path().parent().filter(|_| !item.name.is_empty()) {
            let parent = RelPath::new(std::os::unix::ffi::OsStrExt::as_bytes(parent.as_os_str()))?;
            let beside = entries(&parent)?;
            let has = |name: &str| beside.iter().any(|have| have == name);
            if has(checkpoint::V1_MARKER) && !has(checkpoint::METADATA_FILE) {
                missing(found, "", &parent, checkpoint::METADATA_FILE)?;
            }
        }
    }
    Ok(())
}

/// Leftovers of the checkpoint's own saves, and of those of its steps or items. A directory that cannot be listed has none
/// to tell of.
fn leftovers_of(path: &Path) -> Vec<Leftover> {
    let Ok(path) = std::path::absolute(path) else { return Vec::new() };
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let mut found = path.parent().and_then(|parent| leftovers(parent).ok()).unwrap_or_default();
    found.retain(|leftover| Some(&leftover.name) == name.as_ref());
    found.extend(leftovers(&path).unwrap_or_default());
    found
}

impl Verified {
    /// Keeps damage as a problem; what is no damage stays an error.
    fn problem(&mut self, item: &str, leaf: Option<&str>, data_affected: bool, error: Error) -> Result<()> {
        if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound | ErrorKind::Unsupported) {
            return Err(error);
        }
        let place = |name: &str| error.places().find(|(have, _)| *have == name).map(|(_, place)| place.to_owned());
        let problem = Problem {
            item: item.to_owned(),
            leaf: leaf.map(str::to_owned).or_else(|| place("leaf")).or_else(|| place("array")),
            file: place("file"),
            offset: place("offset").and_then(|offset| offset.parse().ok()),
            data_affected,
            message: error.to_string(),
        };
        // A file that is not there is missing once for each array in it, whatever the number of its chunks.
        let chunkless = error.kind() == ErrorKind::NotFound && problem.file.is_some();
        let what = if chunkless { error.what() } else { &problem.message };
        if self.told.insert(format!("{item}\0{:?}\0{:?}\0{what}", problem.leaf, problem.file)) {
            self.problems.push(problem);
        }
        Ok(())
    }
}

fn verify_tree(
    checkpoint: &Checkpoint,
    item: &str,
    root: &Root,
    deep: bool,
    engine: &EngineOptions,
    found: &mut Verified,
) -> Result<()> {
    found.leaves += checkpoint.leaves().len() as u64;
    for note in checkpoint.notes() {
        found.problem(item, None, false, note.duplicate())?;
    }
    let limits = EngineOptions { verify: Verify::Full, ..*engine }.limits()?;
    let limits = Limits { counts_plan: false, ..limits };
    let mut plans: Vec<Plan> = Vec::new();
    let mut planned = Vec::new();
    let (mut units, mut readable) = (0, true);
    for leaf in checkpoint.leaves() {
        let path = leaf.path.to_string();
        if let LeafKind::Unreadable(error) = &leaf.kind {
            readable = false;
            found.problem(item, Some(&path), true, error.duplicate().at("leaf", &path))?;
        }
        let Some(array) = leaf.kind.array() else { continue };
        let wants = whole_wants(checkpoint.arrays(), [array]);
        let arrays = checkpoint.arrays();
        match ask(root, |asker| async move { plan::build(&asker, arrays, wants, limits, decoder_cost).await }) {
            Ok(plan) if units + plan.units.len() as u64 > UNCOUNTED_UNITS_MAX => {
                readable = false;
                found.problem(item, Some(&path), true, plan::too_many_uncounted().at("leaf", &path))?;
            }
            Ok(plan) => {
                units += plan.units.len() as u64;
                plans.push(plan);
                planned.push(&arrays[array]);
            }
            Err(error) => {
                readable = false;
                found.problem(item, Some(&path), true, error.at("leaf", &path))?;
            }
        }
    }
    if let Some(dir) = checkpoint.item_dir() {
        // Those of a bare item are the checkpoint's.
        if !dir.as_bytes().is_empty() {
            found.leftovers.extend(leftovers(&root.path().join(dir.as_path())).unwrap_or_default());
        }
        match orphans(root, dir, &planned, &plans) {
            Ok(orphans) => found.orphans.extend(orphans),
            Err(error) => found.problem(item, None, false, error)?,
        }
        // Whose keys those of a leaf are that cannot be read is not known.
        if readable {
            found.orphans.extend(values_without_leaf(root, dir, &planned));
        }
    }
    let ring = Ring::new(usize::try_from(limits.slot_bytes).unwrap_or(crate::limits::SLOT_BYTES));
    let checked = each_unit(&plans, root, engine.workers(), |plan, unit, file| match deep {
        true => check_unit(plan, unit, file, root, &ring).map(drop),
        false => Ok(()),
    });
    for plan in &plans {
        found.chunks += plan.units.len() as u64;
        found.bytes_stored += plan.units.iter().map(plan::Unit::stored_bytes).sum::<u64>();
        found.bytes_decoded += if deep { plan.bytes_decoded() } else { 0 };
    }
    checked.into_iter().filter_map(Result::err).try_for_each(|error| found.problem(item, None, true, error))
}
