//! A save as the engine's driver gets it: items under a temporary name, then one rename.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rayon::ThreadPool;

use super::files::{Durable, Storage, Written};
use super::finish::{JsonItem, finish_checkpoint, finish_tree, now_ns};
use super::item::{Elements, Item};
use super::job::{Progress, SaveJob, SaveReport};
use super::memory::{Held, INLINE_PER_BUDGET};
use super::options::{SaveOptions, too_deep};
use super::tree::TreeItem;
use super::write::{Context, write_arrays};
use crate::dtype::CastPolicy;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Budget, StagedDir};
use crate::layout::LayoutKind;
use crate::layout::orbax::{checkpoint, names, step};
use crate::relpath::RelPath;
use crate::tree::OpenOptions;
use crate::tree::checkpoint::describe_listed;
use crate::tree::verify::is_marked;

/// A save as the driver gets it.
pub(in crate::tree) struct SaveWork {
    staged: StagedDir,
    items: Vec<Planned>,
    options: SaveOptions,
    progress: Arc<Progress>,
    held: Held,
    /// Memory for units.
    room: u64,
    bytes_logical: u64,
    started_ns: u64,
}

/// One item, ready to be written.
enum Planned {
    Tree(Box<Item>),
    Json(JsonItem),
}

impl SaveWork {
    /// Checks everything that can be checked before a byte is written, and takes the destination's temporary name.
    pub(in crate::tree) fn new(
        path: &Path,
        items: &[(String, TreeItem)],
        options: &SaveOptions,
        staging_bytes: u64,
    ) -> Result<(Self, SaveJob)> {
        let mut problems: Vec<Error> = Vec::new();
        let mut planned = Vec::new();
        options.check_custom_metadata(&mut problems);
        if items.is_empty() {
            problems.push(Error::invalid("there is nothing to save"));
        }
        let trees = items.iter().filter(|(_, item)| matches!(item, TreeItem::Tree(_))).count();
        let inline_bytes = staging_bytes / INLINE_PER_BUDGET / trees.max(1) as u64;
        for (number, (name, item)) in items.iter().enumerate() {
            if items[..number].iter().any(|(have, _)| have == name) {
                problems.push(Error::invalid("two items have one name").at("item", name));
            }
            match item {
                TreeItem::Tree(tree) => {
                    planned.push(Planned::Tree(Box::new(Item::plan(
                        name,
                        tree,
                        (Elements::Held, inline_bytes),
                        options,
                        &mut problems,
                    ))));
                }
                TreeItem::Json(value) => {
                    if let Err(error) = names::check_item_name(name) {
                        problems.push(Error::invalid(format!("an item cannot be named `{name}`: {error}")));
                    }
                    match too_deep("a JSON item", value, 0) {
                        Some(error) => problems.push(error.at("item", name)),
                        None => planned.push(Planned::Json(JsonItem::new(name, value))),
                    }
                }
            }
        }
        if let Some(metrics) = &options.metrics {
            if !metrics.is_object() {
                problems.push(Error::invalid("metrics must be a JSON object").found(metrics));
            }
            match too_deep("metrics", metrics, 0) {
                Some(error) => problems.push(error),
                None => planned.push(Planned::Json(JsonItem::new(checkpoint::METRICS_ITEM, metrics))),
            }
        }
        let trees = || {
            planned.iter().filter_map(|item| match item {
                Planned::Tree(item) => Some(&**item),
                Planned::Json(_) => None,
            })
        };
        let held = Held::of(trees(), options);
        let room = held.room(staging_bytes).unwrap_or_else(|error| {
            problems.push(error);
            staging_bytes
        });
        problems.extend(trees().flat_map(|item| item.over_budget(room)));
        if let Some(error) = Error::merged(problems) {
            return Err(error.at("destination", path.display()));
        }
        let bytes = |item: &(String, TreeItem)| match &item.1 {
            TreeItem::Tree(tree) => tree.bytes(),
            TreeItem::Json(_) => 0,
        };
        let bytes_logical = items.iter().map(bytes).sum();
        check_destination(path, options.overwrite)?;
        let staged = StagedDir::create(Arc::clone(&options.store), path, options.overwrite)?;
        let progress = Progress::new(bytes_logical);
        let job = SaveJob { progress: Arc::clone(&progress) };
        let started_ns = now_ns();
        let options = options.clone();
        Ok((Self { staged, items: planned, options, progress, held, room, bytes_logical, started_ns }, job))
    }

    /// Does the save, and tells whoever waits for it.
    pub(in crate::tree) fn run(mut self, pool: &ThreadPool) {
        let start = Instant::now();
        let progress = Arc::clone(&self.progress);
        // A panic is a bug; whoever waits must hear of it.
        let ended = Ended(&progress);
        let result = self.write(pool, start).and_then(|report| {
            // The last moment: from here on it is in place.
            self.progress.refuse_if_cancelled()?;
            self.staged.commit(self.options.sync)?;
            Ok(SaveReport { elapsed: start.elapsed(), ..report })
        });
        tracing::info!(ms = start.elapsed().as_secs_f64() * 1e3, ok = result.is_ok(), "saved");
        progress.publish(result);
        drop(ended);
    }

    fn write(&mut self, pool: &ThreadPool, start: Instant) -> Result<SaveReport> {
        let budget = Budget::new(self.room);
        let mut report = SaveReport { bytes_logical: self.bytes_logical, ..SaveReport::default() };
        let mut handlers = BTreeMap::new();
        let items = std::mem::take(&mut self.items);
        for item in &items {
            match item {
                Planned::Json(item) => {
                    item.write(&mut self.staged, &self.options)?;
                    handlers.insert(item.name.clone(), item.handler.to_owned());
                }
                Planned::Tree(item) => {
                    report.bytes_stored += self.write_tree(pool, &budget, item)?;
                    let lossy = item.paths.iter().zip(item.jobs.iter()).filter_map(|(path, job)| {
                        let count = job.lossy.load(Ordering::Relaxed);
                        (count > 0).then(|| (format!("{}: {path}", item.name), count))
                    });
                    report.lossy.extend(lossy);
                    handlers.insert(item.name.clone(), checkpoint::TREE_HANDLER.to_owned());
                }
            }
        }
        if self.options.cast_policy == CastPolicy::Error && !report.lossy.is_empty() {
            let line = |(path, count): &(String, u64)| format!("{path}: {count} elements");
            return Err(Error::invalid("casting would lose values").lines(report.lossy.iter().map(line)));
        }
        finish_checkpoint(&self.staged, handlers, (&self.options, None), self.started_ns)?;
        report.peak_host_bytes = self.held.peak(budget.peak());
        report.elapsed = start.elapsed();
        Ok(report)
    }

    /// Writes one tree; the bytes of its values.
    fn write_tree(&mut self, pool: &ThreadPool, budget: &Arc<Budget>, item: &Item) -> Result<u64> {
        let dir = RelPath::new(&item.name)?;
        self.staged.dir(&dir)?;
        let context = Context {
            pool,
            budget,
            progress: &self.progress,
            staged: &mut self.staged,
            dir,
            storage: Storage::of(&self.options),
            durable: Durable::of(&self.options),
        };
        let written = write_arrays(context, &item.jobs, Written::of(item))?;
        let bytes = written.bytes;
        finish_tree(&mut self.staged, item, written, &self.options)?;
        Ok(bytes)
    }
}

/// Refuses a name under which nothing would be found again, and to overwrite what is no checkpoint: a directory of other files,
/// or a root of steps, which holds many.
pub(in crate::tree) fn check_destination(path: &Path, overwrite: bool) -> Result<()> {
    if path.file_name().is_some_and(|name| step::is_temporary(&name.to_string_lossy())) {
        return Err(Error::invalid("the destination has the name of a save that was not finished")
            .at("path", path.display())
            .hint("choose another name: readers pass over one like this"));
    }
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    // What exists otherwise, and links, are refused when the save begins.
    if !overwrite || metadata.is_symlink() || (metadata.is_file() && metadata.len() == 0) {
        return Ok(());
    }
    if metadata.is_dir() && std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none()) {
        return Ok(());
    }
    let refused = |what: &str| {
        Err(Error::new(ErrorKind::Exists, format!("the destination is {what}, so it is not overwritten"))
            .at("path", path.display())
            .hint("remove it, or choose another name"))
    };
    // A damaged checkpoint is one.
    match describe_listed(path, &OpenOptions { force: true, ..OpenOptions::default() }, &BTreeMap::new()) {
        Ok((_, description)) if description.layout == LayoutKind::Steps => refused("a root of steps"),
        Ok(_) if metadata.is_file() && !starts_as_safetensors(path) => refused("no safetensors file"),
        Ok(_) => Ok(()),
        Err(_) if is_marked(path) => Ok(()),
        Err(_) => refused("no checkpoint"),
    }
}

/// Whether a file begins as every safetensors file does, damaged ones too: after the header's length comes a JSON object.
fn starts_as_safetensors(path: &Path) -> bool {
    let mut start = [0; 9];
    File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok_and(|()| start[8] == b'{')
}

/// Publishes a failure if the driver panics.
struct Ended<'a>(&'a Arc<Progress>);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        // After the result this does nothing.
        self.0.publish(Err(Error::new(ErrorKind::Bug, "the engine ended before the save was done")));
    }
}
