//! The questions in their order: a file, safetensors, a bare item, steps, a composite; and what is said where none fits.

use bytes::Bytes;

use super::batch::{corrupt, files, has_file, sizes};
use super::orbax::checkpoint::{self, CheckpointMetadata};
use super::orbax::step;
use super::orbax::sums::{self, SUMS_FILE};
use super::safetensors::Source;
use super::steps::{self, Found};
use super::survey::{Holds, Survey, has_marker};
use super::{Description, Entry, Format, Item, ItemKind, LayoutKind, Options, Step, StepChoice, StepState};
use crate::error::{Error, Result};
use crate::limits::ERROR_LINES_MAX;
use crate::need::{Asker, DirEntry, EntryKind};
use crate::relpath::RelPath;

/// Finds out what the path that the user gave is, relative to the checkpoint's root.
///
/// Lenient: markers, commit files and metadata files are all optional, and an item's own directory will do. At most four
/// batches of listings, then a batch or two of small files.
///
/// # Errors
/// `NotFound`: nothing there, or no checkpoint, with what was looked for. `Corrupt`: a save that was not finished (unless
/// forced), no whole step. `Unsupported`: checkpoints of other programs. `Invalid`: a step where there are none.
pub async fn describe(ask: &Asker, options: &Options) -> Result<Description> {
    let root = RelPath::root();
    if let Some(name) = options.name.as_deref().filter(|name| step::is_temporary(name) && !options.force) {
        return Err(Error::corrupt("the save was not finished: its directory still has a temporary name")
            .at("directory", name)
            .hint("open it as it is with --force"));
    }
    if let Entry::File(name) = &options.entry {
        let source = file(ask, name).await?;
        return without_steps(of_safetensors(source), &options.step);
    }
    let mut survey = Survey::new(ask);
    survey.list(vec![root.clone()]).await?;
    survey.insist(&root).await?;
    let Some(entries) = survey.entries(&root) else {
        return Err(Error::not_found("no such directory").at("directory", options.name.as_deref().unwrap_or(".")));
    };
    let is_orbax = has_marker(entries) || has_file(entries, "_METADATA") || has_file(entries, "manifest.ocdbt");
    if let Some(source) = Source::of_dir(entries).filter(|_| !is_orbax) {
        return without_steps(of_safetensors(source), &options.step);
    }
    let is_marked = has_marker(entries);
    let is_v1 = has_file(entries, checkpoint::V1_MARKER);
    let entries = entries.to_vec();
    let holds = survey.classify(std::slice::from_ref(&root)).await?.pop().unwrap_or(Holds::Nothing);
    let is_item = matches!(holds, Holds::Item(ItemKind::Tree));
    if !is_item
        && !is_marked
        && let Some(found) = steps::find(ask, &mut survey, &root).await?
    {
        return of_steps(ask, &mut survey, found, options).await;
    }
    // One bad step spoils itself alone; one bad item spoils its checkpoint.
    survey.insist(&root).await?;
    let layout = match &holds {
        Holds::Nothing => return Err(no_checkpoint(&entries)),
        Holds::Item(_) => LayoutKind::V0Direct,
        Holds::Composite(_) if is_v1 => LayoutKind::V1,
        Holds::Composite(_) => LayoutKind::V0Composite,
    };
    let own = Own::read(ask, &survey, &root, options.force).await?;
    if own.is_being_deleted && !options.force {
        return Err(Error::corrupt("the checkpoint is being deleted")
            .at("file", checkpoint::DELETION_FILE)
            .hint("open what is left of it with --force"));
    }
    let items = own.items(&root, &holds)?;
    if items.is_empty() {
        let named = own.metadata.item_handlers.keys().cloned().collect::<Vec<_>>().join(", ");
        let error = Error::corrupt("the checkpoint has no items").at("directory", &root);
        return Err(if named.is_empty() { error } else { error.expected(format_args!("the items {named}")) });
    }
    let description = own.description(layout, items);
    without_steps(description, &options.step)
}

/// What a file is, by its name.
async fn file(ask: &Asker, name: &str) -> Result<Source> {
    let path = RelPath::new(name)?;
    sizes(ask, std::slice::from_ref(&path)).await?;
    if let Some(source) = Source::of_file(&path) {
        return Ok(source);
    }
    if PARTS_OF_A_CHECKPOINT.contains(&name) {
        return Err(Error::invalid("the path is one file of a checkpoint")
            .at("file", name)
            .hint("give the directory that holds it"));
    }
    if is_flax_legacy(name) {
        return Err(flax_legacy(name));
    }
    Err(Error::unsupported("the file is no checkpoint")
        .at("file", name)
        .expected("*.safetensors, *.safetensors.index.json, or a directory"))
}

fn of_safetensors(source: Source) -> Description {
    let layout = match &source {
        Source::File(_) => LayoutKind::SafetensorsFile,
        Source::Index(_) => LayoutKind::SafetensorsIndex,
        Source::Dir(_) => LayoutKind::SafetensorsDir,
    };
    Description {
        format: Format::Safetensors,
        layout,
        items: vec![Item { name: String::new(), kind: ItemKind::Tree, dir: RelPath::root() }],
        steps: Vec::new(),
        step: None,
        alternatives: Vec::new(),
        passed_over: Vec::new(),
        custom_metadata: None,
        init_ns: None,
        commit_ns: None,
        safetensors: Some(source),
    }
}

async fn of_steps(
    ask: &Asker,
    survey: &mut Survey<'_>,
    mut found: Vec<Found>,
    options: &Options,
) -> Result<Description> {
    for Found { step, .. } in found.iter_mut().filter(|found| found.step.state == StepState::Whole) {
        if let Some(reason) = options.damaged.get(&step.name) {
            step.state = StepState::Incomplete(reason.clone());
        }
    }
    let chosen = steps::choose(ask, &found, &options.step, options.force).await?;
    let Some((chosen, others)) = chosen.split_first() else { return Err(Error::bug("a step was chosen, but none")) };
    let alternatives = others.iter().map(|found| found.step.clone()).collect();
    let (step, mut holds) = (chosen.step.clone(), chosen.holds.clone());
    if holds == Holds::Nothing {
        // A forced step with a temporary name was not looked into.
        holds = survey.classify(std::slice::from_ref(&step.dir)).await?.pop().unwrap_or(Holds::Nothing);
    }
    survey.insist(&step.dir).await?;
    let own = Own::read(ask, survey, &step.dir, options.force).await?;
    let items = own.items(&step.dir, &holds)?;
    if items.is_empty() {
        return Err(Error::corrupt(format!("step {} has no items", step.number)).at("step", &step.dir));
    }
    let mut description = own.description(LayoutKind::Steps, items);
    if description.custom_metadata.is_none() {
        description.custom_metadata = root_metadata(ask, survey).await?;
    }
    description.steps = found.into_iter().map(|found| found.step).collect();
    description.passed_over = passed_over(&description.steps, &step, &options.step);
    description.alternatives = alternatives;
    description.step = Some(step);
    Ok(description)
}

/// The steps that might have been chosen but are not whole. Which of them a metric would have preferred is not known.
fn passed_over(steps: &[Step], chosen: &Step, choice: &StepChoice) -> Vec<Step> {
    let at = steps.iter().position(|step| step.name == chosen.name).unwrap_or(steps.len());
    let candidates = match choice {
        StepChoice::Number(_) => &[],
        StepChoice::Unstated | StepChoice::Latest => steps.get(at + 1..).unwrap_or_default(),
        StepChoice::Best { .. } => steps,
    };
    candidates.iter().filter(|step| step.state != StepState::Whole && step.name != chosen.name).cloned().collect()
}

/// The user's metadata of a step root; a broken file is passed over, it stops nothing.
async fn root_metadata(ask: &Asker, survey: &Survey<'_>) -> Result<Option<serde_json::Value>> {
    let dir = RelPath::root().join(checkpoint::ROOT_METADATA_DIR)?;
    let entries = survey.entries(&dir).unwrap_or_default();
    let (name, parse): (_, fn(&[u8]) -> _) = if has_file(entries, checkpoint::ROOT_METADATA_FILE) {
        (checkpoint::ROOT_METADATA_FILE, checkpoint::parse_root)
    } else if has_file(entries, checkpoint::OLD_ROOT_METADATA_FILE) {
        (checkpoint::OLD_ROOT_METADATA_FILE, checkpoint::parse_old_root)
    } else {
        return Ok(None);
    };
    let file = files(ask, [dir.join(name)?]).await?.pop().flatten();
    Ok(file.and_then(|file| parse(&file).ok()).flatten())
}

/// The files of a checkpoint's or step's own directory.
#[derive(Default)]
struct Own {
    metadata: CheckpointMetadata,
    deleted_item: Option<String>,
    is_being_deleted: bool,
}

impl Own {
    async fn read(ask: &Asker, survey: &Survey<'_>, dir: &RelPath, force: bool) -> Result<Self> {
        let entries = survey.entries(dir).unwrap_or_default();
        let mut own = Self::default();
        let names = [checkpoint::METADATA_FILE, checkpoint::DELETION_FILE, SUMS_FILE];
        let there = names.map(|name| has_file(entries, name));
        let paths = names.iter().zip(there).filter(|(_, there)| *there).map(|(name, _)| dir.join(name));
        let mut read = files(ask, paths.collect::<Result<Vec<_>, _>>()?).await?.into_iter();
        let [metadata, deletion, sums] = there.map(|there| there.then(|| read.next()).flatten().flatten());
        let parse = |file: &Bytes| {
            let path = dir.join(checkpoint::METADATA_FILE)?;
            let parsed = checkpoint::parse(file).map_err(|error| corrupt(&error, Some(error.offset), &path));
            parsed.map_err(|error| error.hint("open the checkpoint without its metadata by --force"))
        };
        let checked = sums::check(dir, sums.as_ref(), [(checkpoint::METADATA_FILE, metadata.as_ref())]);
        own.metadata = match checked.and_then(|_| metadata.as_ref().map(parse).transpose()) {
            Ok(metadata) => metadata.unwrap_or_default(),
            // The items do not depend on it.
            Err(_) if force => CheckpointMetadata::default(),
            Err(error) => return Err(error),
        };
        if let Some(file) = deletion {
            own.deleted_item = checkpoint::pending_deletion(&file);
            own.is_being_deleted = own.deleted_item.is_none();
        }
        Ok(own)
    }

    /// What is there, and what the metadata say should be: opening that tells that it is missing.
    fn items(&self, dir: &RelPath, holds: &Holds) -> Result<Vec<Item>> {
        let composite = match holds {
            Holds::Nothing => return Ok(Vec::new()),
            Holds::Item(kind) => return Ok(vec![Item { name: String::new(), kind: *kind, dir: dir.clone() }]),
            Holds::Composite(composite) => composite,
        };
        let is_deleted = |name: &str| self.deleted_item.as_deref() == name.split('/').next();
        let mut items: Vec<Item> = composite.items.iter().filter(|item| !is_deleted(&item.name)).cloned().collect();
        for (name, handler) in self.metadata.item_handlers.iter().filter(|(name, _)| !is_deleted(name)) {
            // Others may have had nothing to write.
            let Some(kind) = steps::written_by(handler) else { continue };
            match items.iter_mut().find(|item| item.name == *name) {
                Some(item) if item.kind == ItemKind::Other => item.kind = kind,
                Some(_) => {}
                None => items.push(Item { name: name.clone(), kind, dir: dir.join(name.as_str())? }),
            }
        }
        items.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(items)
    }

    fn description(self, layout: LayoutKind, items: Vec<Item>) -> Description {
        Description {
            format: Format::Orbax,
            layout,
            items,
            steps: Vec::new(),
            step: None,
            alternatives: Vec::new(),
            passed_over: Vec::new(),
            custom_metadata: self.metadata.custom_metadata,
            init_ns: self.metadata.init_ns,
            commit_ns: self.metadata.commit_ns,
            safetensors: None,
        }
    }
}

/// A description of something without steps, unless a step was asked for.
fn without_steps(description: Description, choice: &StepChoice) -> Result<Description> {
    if *choice == StepChoice::Unstated {
        return Ok(description);
    }
    Err(Error::invalid("a step was asked for, but the path is no step root")
        .found(format_args!("layout {}", description.layout.as_str()))
        .hint("leave out --step, or give the directory that holds the steps"))
}

/// The error for a directory that is nothing of ours.
fn no_checkpoint(entries: &[DirEntry]) -> Error {
    if let Some(entry) = entries.iter().find(|entry| entry.kind == EntryKind::File && is_flax_legacy(&entry.name)) {
        return flax_legacy(&entry.name);
    }
    let unfinished: Vec<_> = entries.iter().filter(|entry| step::is_temporary(&entry.name)).collect();
    if !unfinished.is_empty() && unfinished.len() == entries.len() {
        return Error::corrupt("the directory holds only saves that were not finished")
            .lines(unfinished.iter().take(ERROR_LINES_MAX).map(|entry| entry.name.clone()))
            .hint("open one of them as it is with --force");
    }
    let found = match entries {
        [] => "an empty directory".to_owned(),
        entries => {
            let names: Vec<_> = entries.iter().take(5).map(|entry| entry.name.as_str()).collect();
            let more = if entries.len() > names.len() { ", .." } else { "" };
            format!("{} entries: {}{more}", entries.len(), names.join(", "))
        }
    };
    Error::not_found("the directory is no checkpoint").expected(LOOKED_FOR).found(found)
}

/// Whether this is a name that `flax.training.checkpoints` gave a file.
fn is_flax_legacy(name: &str) -> bool {
    name.strip_prefix("checkpoint_").is_some_and(|_| step::parse(name).is_some())
}

fn flax_legacy(name: &str) -> Error {
    Error::unsupported("a legacy Flax checkpoint, which is one file")
        .at("file", name)
        .expected("an Orbax checkpoint or safetensors")
        .hint("restore it with flax.training.checkpoints and save it with Orbax")
}

const LOOKED_FOR: &str = "_METADATA, checkpoint, manifest.ocdbt, ocdbt.process_*, .zarray or zarr.json here or in a \
                          directory below, _CHECKPOINT_METADATA, orbax.checkpoint, or *.safetensors";

const PARTS_OF_A_CHECKPOINT: [&str; 10] = [
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "_sharding",
    "_strings.json",
    "checkpoint",
    "commit_success.txt",
    "manifest.ocdbt",
    "orbax.checkpoint",
    ".zarray",
    "zarr.json",
];
