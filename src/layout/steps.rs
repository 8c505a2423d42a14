//! Step roots: which steps there are, which are whole, and which one is meant.

use std::cmp::Ordering;

use bytes::Bytes;

use super::batch::{files_or_reasons, has_dir, has_file};
use super::orbax::metadata::{self, param_name};
use super::orbax::tree::{ARRAY_METADATA_DIR, METADATA_FILE, MSGPACK_FILE, SHARDING_FILE, STRINGS_FILE};
use super::orbax::{checkpoint, json, step};
use super::survey::{Holds, MANIFEST_FILE, PROCESS_DIR, Survey, has_marker};
use super::{Item, ItemKind, Step, StepChoice, StepState};
use crate::error::{Error, Result};
use crate::limits::{ERROR_LINES_MAX, METADATA_FILE_BYTES_MAX, METRICS_BYTES_MAX};
use crate::need::{Answer, Asker, EntryKind, Need, unfit};
use crate::relpath::RelPath;

/// A step and what its directory holds.
pub(super) struct Found {
    pub(super) step: Step,
    pub(super) holds: Holds,
}

/// The steps below `root`, by number and name; `None` if it is no step root.
///
/// It is one if a child that is named like a step holds an item or was left unfinished, and no other child shows that these are
/// items. (Orbax asks that every child be a step; logs beside the steps are common.)
pub(super) async fn find(ask: &Asker, survey: &mut Survey<'_>, root: &RelPath) -> Result<Option<Vec<Found>>> {
    let named = named(survey, root, &|_| true);
    let mut steps = classified(survey, named).await?;
    steps.retain(|found| !holds_steps(survey, found));
    if tree_beside(survey, root, &steps).is_some() {
        return Ok(None);
    }
    let is_root = steps.iter().any(|found| found.holds != Holds::Nothing);
    let unfinished = unfinished(survey, root);
    if !is_root && unfinished.is_empty() {
        return Ok(None);
    }
    judge(ask, survey, &mut steps).await?;
    steps.extend(unfinished);
    steps.sort_by(|a, b| (a.step.number, &a.step.name).cmp(&(b.step.number, &b.step.name)));
    Ok(Some(steps))
}

/// The children with a wanted name that are named like steps: number, name and directory.
pub(super) fn named(
    survey: &Survey<'_>,
    root: &RelPath,
    wanted: &(dyn Fn(&str) -> bool + Sync),
) -> Vec<(u64, String, RelPath)> {
    let children = survey.children(root).into_iter().filter(|(name, _)| wanted(name));
    children.filter_map(|(name, dir)| Some((step::parse(&name)?, name, dir))).collect()
}

/// A tree beside these children, which shows that they are no steps but items like itself: unless one of them holds items, as
/// only steps do.
pub(super) fn tree_beside(survey: &Survey<'_>, root: &RelPath, steps: &[Found]) -> Option<String> {
    let holds_items = |found: &Found| match &found.holds {
        Holds::Composite(composite) => {
            let is_of_step = |item: &Item| item.kind == ItemKind::Tree && !RANDOM_KEYS.contains(&item.name.as_str());
            composite.items.iter().any(is_of_step)
        }
        _ => false,
    };
    let is_tree = |(name, dir): &(String, RelPath)| step::parse(name).is_none() && survey.is_tree(dir);
    let beside = survey.children(root).into_iter().find(is_tree);
    beside.map(|(name, _)| name).filter(|_| !steps.iter().any(holds_items))
}

/// The children that are named like steps, with what they hold.
pub(super) async fn classified(survey: &mut Survey<'_>, named: Vec<(u64, String, RelPath)>) -> Result<Vec<Found>> {
    let dirs: Vec<RelPath> = named.iter().map(|(_, _, dir)| dir.clone()).collect();
    let holds = survey.classify(&dirs).await?;
    let found =
        |((number, name, dir), holds)| Found { step: Step { number, name, dir, state: StepState::Whole }, holds };
    Ok(named.into_iter().zip(holds).map(found).collect())
}

/// Whether what is named like a step is a root of steps itself, as experiments beside each other are.
pub(super) fn holds_steps(survey: &Survey<'_>, found: &Found) -> bool {
    let Holds::Composite(composite) = &found.holds else { return false };
    let is_marked = survey.entries(&found.step.dir).is_some_and(has_marker);
    let is_of_step = |item: &Item| {
        let first = item.name.split('/').next().unwrap_or_default();
        let is_number = first.bytes().all(|byte| byte.is_ascii_digit());
        step::parse(first).is_some() && (is_number || item.name.contains('/'))
    };
    let mut trees = composite.items.iter().filter(|item| item.kind == ItemKind::Tree);
    !is_marked && trees.any(is_of_step)
}

/// The steps whose directories have the name of a save that was not finished.
pub(super) fn unfinished(survey: &Survey<'_>, root: &RelPath) -> Vec<Found> {
    let dirs = survey.entries(root).unwrap_or_default().iter().filter(|entry| entry.kind == EntryKind::Dir);
    let steps = dirs.filter_map(|entry| {
        let number = step::parse(step::finished_name(&entry.name)?)?;
        let dir = root.join(&entry.name).ok()?;
        let state = StepState::Incomplete("its save was not finished (temporary name)".to_owned());
        Some(Found { step: Step { number, name: entry.name.clone(), dir, state }, holds: Holds::Nothing })
    });
    steps.collect()
}

/// Marks the steps that are not whole. Two batches, a third where arrays seem to be missing.
pub(super) async fn judge(ask: &Asker, survey: &Survey<'_>, steps: &mut [Found]) -> Result<()> {
    // What each tree item must be asked about: (step, item, file).
    let mut checks: Vec<(usize, &'static str, RelPath)> = Vec::new();
    let mut suspects: Vec<(usize, RelPath, RelPath)> = Vec::new();
    // The step's own files: its metadata, and the record of what is being deleted.
    let mut own: Vec<(usize, &'static str, RelPath)> = Vec::new();
    for (index, found) in steps.iter_mut().enumerate() {
        let refusal = survey.refusal(&found.step.dir).map(str::to_owned);
        let trees = match refusal.or_else(|| incomplete(&found.holds)) {
            Some(reason) => {
                found.step.state = StepState::Incomplete(reason);
                continue;
            }
            None => trees(found),
        };
        if let Some(reason) = hollow(survey, found, &trees) {
            found.step.state = StepState::Incomplete(reason);
            continue;
        }
        for name in [checkpoint::DELETION_FILE, checkpoint::METADATA_FILE] {
            if survey.entries(&found.step.dir).is_some_and(|entries| has_file(entries, name)) {
                own.push((index, name, found.step.dir.join(name)?));
            }
        }
        for dir in trees {
            let entries = survey.entries(&dir).unwrap_or_default();
            for name in [METADATA_FILE, MANIFEST_FILE] {
                if has_file(entries, name) {
                    checks.push((index, name, dir.join(name)?));
                }
            }
            let has_process = entries.iter().any(|entry| entry.name.starts_with(PROCESS_DIR));
            if has_file(entries, METADATA_FILE) && !has_file(entries, MANIFEST_FILE) && !has_process {
                suspects.push((index, dir.join(METADATA_FILE)?, dir));
            }
        }
    }
    let mark = |steps: &mut [Found], index: usize, reason: String| {
        if let Some(found) = steps.get_mut(index).filter(|found| found.step.state == StepState::Whole) {
            found.step.state = StepState::Incomplete(reason);
        }
    };
    let tails =
        checks.iter().map(|(_, _, path)| Need::Tail { path: path.clone(), len: TAIL_BYTES }.or_refused()).collect();
    for ((index, name, path), answer) in checks.iter().zip(ask.ask(tails).await?) {
        match answer {
            Answer::Tail { bytes, file_size } if is_cut_short(name, &bytes, file_size) => {
                mark(steps, *index, format!("{path} is cut short ({file_size} bytes)"));
            }
            Answer::Tail { .. } => {}
            Answer::Refused(reason) => mark(steps, *index, reason.to_string()),
            Answer::Missing => mark(steps, *index, format!("{path} is missing")),
            other => return Err(unfit(Some(&other))),
        }
    }
    let file = |path: &RelPath| Need::File { path: path.clone(), max: METADATA_FILE_BYTES_MAX };
    let described = files_or_reasons(ask, suspects.iter().map(|(_, path, _)| file(path)).collect()).await?;
    for ((index, path, dir), file) in suspects.iter().zip(described) {
        let reason = match file {
            Ok(file) => file.and_then(|file| missing_arrays(survey, dir, path, &file)),
            Err(reason) => Some(reason),
        };
        if let Some(reason) = reason {
            mark(steps, *index, reason);
        }
    }
    let read = files_or_reasons(ask, own.iter().map(|(_, _, path)| file(path)).collect()).await?;
    // The item of each step that is being deleted.
    let mut deleted: Vec<Option<String>> = vec![None; steps.len()];
    for ((index, name, path), file) in own.iter().zip(read) {
        let file = match file {
            Ok(Some(file)) => file,
            Ok(None) => continue,
            Err(reason) => {
                mark(steps, *index, reason);
                continue;
            }
        };
        if *name == checkpoint::DELETION_FILE {
            match checkpoint::pending_deletion(&file) {
                Some(item) => deleted[*index] = Some(item),
                None => mark(steps, *index, "it is being deleted".to_owned()),
            }
            continue;
        }
        let reason = match checkpoint::parse(&file) {
            Ok(metadata) => {
                let listed = metadata.item_handlers.iter();
                let listed = listed.filter(|(item, _)| deleted[*index].as_ref() != Some(item));
                let steps = &steps;
                let lacking = |(item, handler): (&String, &String)| lacks(survey, steps.get(*index)?, item, handler);
                listed.into_iter().find_map(lacking)
            }
            Err(error) => Some(format!("{path} is not valid: {error}")),
        };
        if let Some(reason) = reason {
            mark(steps, *index, reason);
        }
    }
    Ok(())
}

/// Why what the listings show of a step cannot be all of it: an item without a file, or a tree that its save described in
/// `_METADATA`, which is missing. Saves without that file kept the tree in `checkpoint`, or had a directory for each array.
fn hollow(survey: &Survey<'_>, found: &Found, trees: &[RelPath]) -> Option<String> {
    if let Holds::Composite(composite) = &found.holds {
        let is_empty = |item: &&Item| survey.entries(&item.dir).is_some_and(<[_]>::is_empty);
        if let Some(item) = composite.items.iter().find(is_empty) {
            return Some(format!("{} is empty", item.dir));
        }
    }
    let lacks = |dir: &&RelPath| {
        let entries = survey.entries(dir).unwrap_or_default();
        let is_of_described = |name: &str| {
            [SHARDING_FILE, STRINGS_FILE, ARRAY_METADATA_DIR, MANIFEST_FILE].contains(&name)
                || name.starts_with(PROCESS_DIR)
        };
        !has_file(entries, METADATA_FILE)
            && !has_file(entries, MSGPACK_FILE)
            && entries.iter().any(|entry| is_of_described(&entry.name))
    };
    trees.iter().find(lacks).map(|dir| format!("{dir} has no {METADATA_FILE}"))
}

/// Why an item that a step's metadata lists is not what they say; `None` if it is, as far as its files tell.
fn lacks(survey: &Survey<'_>, found: &Found, item: &str, handler: &str) -> Option<String> {
    let Holds::Composite(composite) = &found.holds else { return None };
    let named = format!("its item `{item}`, which {} lists,", checkpoint::METADATA_FILE);
    let entries = survey.entries(&found.step.dir)?;
    let written = written_by(handler)?;
    if !has_dir(entries, item) {
        return Some(format!("{named} is missing"));
    }
    let kind = composite.items.iter().find(|have| have.name == item)?.kind;
    match written {
        ItemKind::Tree => (kind != ItemKind::Tree).then(|| format!("{named} holds no tree")),
        _ => (kind == ItemKind::Other).then(|| format!("{named} holds no JSON")),
    }
}

/// What a handler that the metadata list has written for sure. Others may have had nothing to write: Orbax lists its
/// `descriptor` whether there is one or not.
pub(super) fn written_by(handler: &str) -> Option<ItemKind> {
    let class = handler.rsplit('.').next().unwrap_or_default();
    if TREE_CLASSES.contains(&class) {
        return Some(ItemKind::Tree);
    }
    JSON_CLASSES.contains(&class).then_some(ItemKind::Json)
}

/// Why what a step's directory holds is not a whole step; `None` if the listings say nothing against it.
fn incomplete(holds: &Holds) -> Option<String> {
    let composite = match holds {
        Holds::Item(ItemKind::Tree) => return None,
        Holds::Item(_) | Holds::Nothing => return Some("it holds no item".to_owned()),
        Holds::Composite(composite) => composite,
    };
    if let Some(name) = composite.unfinished.first() {
        return Some(format!("its item `{name}` was not finished"));
    }
    let counts = |item: &Item| item.kind == ItemKind::Tree || (item.kind == ItemKind::Json && item.name != METRICS);
    (!composite.items.iter().any(counts)).then(|| "it holds no item with data".to_owned())
}

fn trees(found: &Found) -> Vec<RelPath> {
    match &found.holds {
        Holds::Item(_) => vec![found.step.dir.clone()],
        Holds::Composite(composite) => {
            let trees = composite.items.iter().filter(|item| item.kind == ItemKind::Tree);
            trees.map(|item| item.dir.clone()).collect()
        }
        Holds::Nothing => Vec::new(),
    }
}

/// Whether the end of a metadata file shows that the rest of it is missing: a crash without fsync, a broken download.
fn is_cut_short(name: &str, tail: &[u8], file_size: u64) -> bool {
    if name == METADATA_FILE {
        return !tail.trim_ascii_end().ends_with(b"}");
    }
    // FORMAT of the OCDBT envelope: u32be magic, u64le length of the whole file.
    let Some((head, _)) = tail.split_at_checked(12).filter(|_| file_size == tail.len() as u64) else {
        return file_size < 12;
    };
    let (magic, length) = head.split_at(4);
    let length = length.iter().rev().fold(0, |length: u64, &byte| length << 8 | u64::from(byte));
    magic != MANIFEST_MAGIC || length != file_size
}

/// Why an item without a database cannot have its arrays; `None` if it can, or has none.
fn missing_arrays(survey: &Survey<'_>, dir: &RelPath, path: &RelPath, file: &Bytes) -> Option<String> {
    let metadata = match metadata::parse(file) {
        Ok(metadata) => metadata,
        Err(error) => return Some(format!("{path} is not valid: {error}")),
    };
    let arrays = || metadata.entries.iter().filter(|entry| entry.value_type.is_array() && !entry.skip_deserialize);
    if metadata.use_ocdbt == Some(true) {
        return arrays().next().map(|_| format!("{dir} has neither {MANIFEST_FILE} nor {PROCESS_DIR}*"));
    }
    let entries = survey.entries(dir).unwrap_or_default();
    let is_missing = |name: &String| match name.split('/').next() {
        Some("") | None => false,
        Some(first) => !has_dir(entries, first),
    };
    let name = arrays().map(|entry| param_name(&entry.path)).find(is_missing)?;
    Some(format!("{dir} has no directory for the array `{name}`"))
}

/// Which of the steps is meant; after it those that would be if it were not there, the best first.
pub(super) async fn choose<'a>(
    ask: &Asker,
    steps: &'a [Found],
    choice: &StepChoice,
    force: bool,
) -> Result<Vec<&'a Found>> {
    let whole = || steps.iter().filter(|found| found.step.state == StepState::Whole);
    match choice {
        StepChoice::Number(number) => {
            let numbered = || steps.iter().filter(|found| found.step.number == *number);
            let wanted =
                numbered().rfind(|found| found.step.state == StepState::Whole).or_else(|| numbered().next_back());
            match wanted {
                None => Err(no_such_step(steps, *number)),
                Some(found) => match &found.step.state {
                    StepState::Incomplete(reason) if !force => {
                        Err(Error::corrupt(format!("step {number} is not whole: {reason}"))
                            .at("step", &found.step.dir)
                            .hint("choose another step, or open it as it is with --force"))
                    }
                    _ => Ok(vec![found]),
                },
            }
        }
        StepChoice::Unstated | StepChoice::Latest => match (whole().rev().collect::<Vec<_>>(), steps.last()) {
            (whole, _) if !whole.is_empty() => Ok(whole),
            (_, Some(found)) if force => Ok(vec![found]),
            _ => Err(none_whole(steps)),
        },
        StepChoice::Best { metric, smallest } => {
            let whole: Vec<&Found> = whole().collect();
            if whole.is_empty() {
                return Err(none_whole(steps));
            }
            ranked(ask, &whole, metric, *smallest).await
        }
    }
}

/// The steps that have a metric, the best first; of equals the latest.
async fn ranked<'a>(ask: &Asker, whole: &[&'a Found], metric: &str, smallest: bool) -> Result<Vec<&'a Found>> {
    let paths = whole.iter().map(|found| metrics_file(&found.step.dir)).collect::<Result<Vec<_>>>()?;
    let needs = paths.into_iter().map(|path| Need::File { path, max: METRICS_BYTES_MAX }).collect();
    let mut ranked: Vec<(f64, &Found)> = Vec::new();
    let mut names: Vec<String> = Vec::new();
    for (found, answer) in whole.iter().zip(files_or_reasons(ask, needs).await?) {
        // Metrics that cannot be read are none.
        let Ok(Some(file)) = answer else { continue };
        let Ok(metrics) = json::parse(&file) else { continue };
        let Some(value) = metrics.get(metric).and_then(json::number) else {
            names.extend(metrics.as_object().into_iter().flat_map(|metrics| metrics.keys().cloned()));
            continue;
        };
        if !value.is_nan() {
            ranked.push((if smallest { -value } else { value }, found));
        }
    }
    if ranked.is_empty() {
        names.sort();
        names.dedup();
        let found = if names.is_empty() { "no metrics".to_owned() } else { names.join(", ") };
        return Err(Error::invalid(format!("no whole step has the metric `{metric}` with a number")).found(found));
    }
    // Stable: of equals the latest, which stands last, comes first. No NaN is left.
    ranked.reverse();
    ranked.sort_by(|(a, _), (b, _)| b.partial_cmp(a).unwrap_or(Ordering::Equal));
    Ok(ranked.into_iter().map(|(_, found)| found).collect())
}

/// Where a step's metrics are.
pub(super) fn metrics_file(step: &RelPath) -> Result<RelPath> {
    Ok(step.join(METRICS)?.join(METRICS)?)
}

fn no_such_step(steps: &[Found], number: u64) -> Error {
    let mut near: Vec<u64> = steps.iter().map(|found| found.step.number).collect();
    near.sort_by_key(|&other| (other.abs_diff(number), other));
    near.dedup();
    let count = near.len();
    near.truncate(crate::limits::NEAREST_NAMES_MAX);
    let near: Vec<String> = near.iter().map(u64::to_string).collect();
    Error::invalid(format!("there is no step {number}"))
        .found(format_args!("{count} steps, the nearest are {}", near.join(", ")))
        .hint("`--step latest` opens the newest whole one; `touchdown ls --json` lists all of them")
}

fn none_whole(steps: &[Found]) -> Error {
    let reasons = steps.iter().rev().take(ERROR_LINES_MAX).filter_map(|found| match &found.step.state {
        StepState::Incomplete(reason) => Some(format!("{}: {reason}", found.step.name)),
        StepState::Whole => None,
    });
    Error::corrupt(format!("none of the {} steps is whole", steps.len()))
        .lines(reasons.collect::<Vec<_>>())
        .hint("wait until a save is finished, or open a step's own directory with --force")
}

/// The trees in an item that is a random key, which is no step.
const RANDOM_KEYS: [&str; 2] = ["jax_random_key", "np_random_key"];
const METRICS: &str = checkpoint::METRICS_ITEM;
/// The last parts of the names of handlers whose items are trees.
const TREE_CLASSES: [&str; 3] = ["PyTreeHandler", "PyTreeCheckpointHandler", "StandardCheckpointHandler"];
/// The same of items that are JSON.
const JSON_CLASSES: [&str; 2] = ["JsonHandler", "JsonCheckpointHandler"];
/// Manifests of real checkpoints take about 150 bytes; a longer one is not judged by its length.
const TAIL_BYTES: u64 = 4096;
const MANIFEST_MAGIC: [u8; 4] = [0x0c, 0xdb, 0x3a, 0x2a];
