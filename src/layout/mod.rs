//! What is this directory? Orbax of any release, a step root, or safetensors; and what its files say about the tree.
//!
//! ```text
//! describe ─ survey.rs   which directories are items, from listings of at most three levels
//!          ├ steps.rs    steps, which are whole, which one is meant;  series.rs: all of them, for who keeps a series
//!          └ open.rs     the order of the questions, and what is said where there is no checkpoint
//! orbax/                 the parsers of Orbax's files;  tree.rs: one item's leaves
//! safetensors/           headers and indexes
//! ```
//!
//! Nothing here reads a file: everything is asked for through an [`Asker`](crate::need::Asker), a batch a level, and every
//! parser takes bytes. Must not know: arrays, devices, where files lie. Start reading at [`describe`].

mod batch;
mod nearest;
mod open;
pub mod orbax;
pub mod safetensors;
pub mod series;
mod steps;
mod survey;
#[cfg(test)]
mod testing;

use std::collections::BTreeMap;

use serde_json::Value;

pub(crate) use nearest::nearest;
pub use open::describe;

use crate::error::{Error, Result};
use crate::relpath::RelPath;

/// What the user named, and what they want of it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Whether a directory or a file was named.
    pub entry: Entry,
    /// The name of the directory that the user gave, to refuse an unfinished save.
    pub name: Option<String>,
    /// Which step of a step root.
    pub step: StepChoice,
    /// Open what was not finished.
    pub force: bool,
    /// The steps that are not whole although their listings show nothing of it, by the names of their directories, and why: who
    /// looks into them knows.
    pub damaged: BTreeMap<String, String>,
}

/// What the user's path is. The checkpoint's root is that directory, or the directory of that file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Entry {
    /// A directory.
    #[default]
    Dir,
    /// A file of this name.
    File(String),
}

/// Which step of a step root is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StepChoice {
    /// None was asked for: the latest whole step, if it is a step root.
    #[default]
    Unstated,
    /// The step of this number.
    Number(u64),
    /// The latest whole step.
    Latest,
    /// The whole step with the best value of a metric in `metrics/metrics`.
    Best {
        /// The name of the metric.
        metric: String,
        /// Whether the smallest value is the best.
        smallest: bool,
    },
}

impl From<u64> for StepChoice {
    fn from(step: u64) -> Self {
        Self::Number(step)
    }
}

/// What a path turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// Whose files these are.
    pub format: Format,
    /// How they are arranged.
    pub layout: LayoutKind,
    /// The items of the checkpoint, or of the chosen step, sorted by name. A bare item, and safetensors, have one with an
    /// empty name. Items that are being deleted are left out.
    pub items: Vec<Item>,
    /// The steps of a step root by number, the incomplete ones included; else empty.
    pub steps: Vec<Step>,
    /// The step that was chosen.
    pub step: Option<Step>,
    /// The other whole steps that might have been chosen, the best of them first. None where it was chosen by its number.
    pub alternatives: Vec<Step>,
    /// The steps that were passed over for it because they are not whole: those after the latest one that is; by a metric all of
    /// them. None where the step was chosen by its number.
    pub passed_over: Vec<Step>,
    /// The user's metadata of the checkpoint (of the step, else of its root).
    pub custom_metadata: Option<Value>,
    /// When the save began, in nanoseconds since the Unix epoch.
    pub init_ns: Option<i64>,
    /// When it was committed, in nanoseconds since the Unix epoch.
    pub commit_ns: Option<i64>,
    /// The files of a safetensors checkpoint.
    pub safetensors: Option<safetensors::Source>,
}

/// A family of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are the documentation
pub enum Format {
    Orbax,
    Safetensors,
}

/// How the files of a checkpoint are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutKind {
    /// Items below a directory with the marker `orbax.checkpoint`.
    V1,
    /// Items below a directory, without that marker.
    V0Composite,
    /// The directory is an item itself.
    V0Direct,
    /// Directories that are steps.
    Steps,
    /// One file.
    SafetensorsFile,
    /// The files that an index names.
    SafetensorsIndex,
    /// All files of a directory.
    SafetensorsDir,
}

/// One item of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its name, which is that of its directory; empty if the checkpoint is a bare item. An item inside a random-key item
    /// has both names, joined by `/`.
    pub name: String,
    /// What it holds.
    pub kind: ItemKind,
    /// Its directory.
    pub dir: RelPath,
}

/// What an item holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ItemKind {
    /// A tree of arrays and other leaves.
    Tree,
    /// A JSON value, see [`read_json`](orbax::tree::read_json).
    Json,
    /// Something else: protocol buffers, assets, random keys.
    Other,
}

/// One step of a step root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number.
    pub number: u64,
    /// The name of its directory.
    pub name: String,
    /// Its directory.
    pub dir: RelPath,
    /// Whether it can be read.
    pub state: StepState,
}

/// Whether a step can be read, as far as its listings and the ends of its metadata files tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StepState {
    /// Nothing is missing.
    Whole,
    /// Something is, and what.
    Incomplete(String),
}

/// The item that is meant: the wanted one; else `state`, `pytree`, `default` or `params`; else the only tree.
///
/// # Errors
/// No item of that name, or several trees and none of the usual names (kind `Invalid`, with the names).
pub fn default_item<'a>(items: &'a [Item], wanted: Option<&str>) -> Result<&'a Item> {
    if let Some(wanted) = wanted {
        return items.iter().find(|item| item.name == wanted).ok_or_else(|| no_such_item(items, wanted));
    }
    let trees: Vec<&Item> = items.iter().filter(|item| item.kind == ItemKind::Tree).collect();
    let usual = USUAL_ITEMS.iter().find_map(|name| trees.iter().find(|item| item.name == *name));
    // The inner tree of a random-key item is never meant, unless there is nothing else.
    let mut outer = trees.iter().filter(|item| !item.name.contains('/'));
    let only = match (outer.next(), outer.next()) {
        (Some(only), None) => Some(only),
        (None, _) if trees.len() == 1 => trees.first(),
        _ => None,
    };
    usual.or(only).copied().ok_or_else(|| {
        let names =
            |items: &mut dyn Iterator<Item = &Item>| items.map(|item| item.name.clone()).collect::<Vec<_>>().join(", ");
        if trees.is_empty() {
            Error::invalid("the checkpoint has no item that is a tree")
                .found(names(&mut items.iter()))
                .hint("items that are JSON are loaded by `load_items` of the library")
        } else {
            Error::invalid("the checkpoint has several items")
                .found(names(&mut trees.iter().copied()))
                .hint("name the one that is meant (`--item`)")
        }
    })
}

fn no_such_item(items: &[Item], wanted: &str) -> Error {
    let error = Error::invalid(format!("there is no item `{wanted}`"));
    match items {
        [only] if only.name.is_empty() => error.found("a path that is an item itself").hint("leave out --item"),
        _ => {
            let near = nearest(wanted, items.iter().map(|item| item.name.as_str()));
            let near = if near.is_empty() { items.iter().map(|item| item.name.as_str()).collect() } else { near };
            error.found(format_args!("{} items, the nearest are {}", items.len(), near.join(", ")))
        }
    }
}

impl Format {
    /// The name in `ls --json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Orbax => "orbax",
            Self::Safetensors => "safetensors",
        }
    }
}

impl LayoutKind {
    /// The name in `ls --json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V0Composite => "v0-composite",
            Self::V0Direct => "v0-direct",
            Self::Steps => "steps",
            Self::SafetensorsFile => "safetensors-file",
            Self::SafetensorsIndex => "safetensors-index",
            Self::SafetensorsDir => "safetensors-dir",
        }
    }
}

impl ItemKind {
    /// The name in `ls --json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tree => "tree",
            Self::Json => "json",
            Self::Other => "other",
        }
    }
}

/// Orbax's own names for the item with the model's state: v1, v1 before 0.12, v0's manager; and the common one for weights.
const USUAL_ITEMS: [&str; 4] = ["state", "pytree", "default", "params"];

#[cfg(test)]
mod tests;
