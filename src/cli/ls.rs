//! `touchdown ls`: what is in a checkpoint.

use std::process::ExitCode;

use serde_json::{Value as Json, json};

use super::options::SourceArgs;
use super::output;
use crate::error::Result;
use crate::layout::{ItemKind, Step, StepState};
use crate::plan::explain::human_bytes;
use crate::tree::{Checkpoint, LeafInfo, LeafKind};

pub(super) const EXAMPLE: &str = "Example:\n  touchdown ls tests/fixtures/quickstart/ckpt\n  touchdown ls tests/fixtures/v1_training_steps/ckpt --step latest --json > target.json";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// One JSON object, which `load --target` reads back.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, quiet: bool) -> Result<ExitCode> {
    let (checkpoint, stored) =
        args.source.with(quiet, |checkpoint| Ok((checkpoint.clone(), checkpoint.stored_bytes()?)))?;
    let bytes = |leaf: &LeafInfo| leaf.kind.array().and_then(|array| stored[array]);
    if !quiet {
        checkpoint.notes().iter().for_each(|note| output::note(&note.to_string()));
    }
    if args.json {
        output::json(&document(&checkpoint, bytes))?;
    } else {
        output::text(&rows(&checkpoint, bytes))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The JSON object of `ls`, schema 1.
fn document(checkpoint: &Checkpoint, bytes: impl Fn(&LeafInfo) -> Option<u64>) -> Json {
    let description = checkpoint.description();
    let items = description.items.iter().map(|item| {
        let mut row = json!({"name": item.name, "kind": item.kind.as_str()});
        if item.kind == ItemKind::Json {
            // A neighbour that is damaged must not hide the tree.
            match checkpoint.json_item(&item.name) {
                Ok(value) => row["value"] = value,
                Err(error) => row["error"] = json!(error.to_string()),
            }
        }
        row
    });
    let meshes: Vec<Json> =
        checkpoint.meshes().iter().map(|mesh| json!({"axes": mesh.axes, "shape": mesh.shape})).collect();
    let mut document = json!({
        "schema": 1,
        "format": description.format.as_str(),
        "layout": description.layout.as_str(),
        "items": items.collect::<Vec<_>>(),
        "item": checkpoint.item(),
        "mesh": meshes.first(),
        "meshes": meshes,
        "custom_metadata": checkpoint.custom_metadata(),
        "leaves": checkpoint.leaves().iter().map(|leaf| row(checkpoint, leaf, bytes(leaf))).collect::<Vec<_>>(),
    });
    if let Some(step) = &description.step {
        document["step"] = json!(step.number);
        let step = |step: &Step| match &step.state {
            StepState::Whole => json!({"step": step.number, "name": step.name, "state": "whole"}),
            StepState::Incomplete(why) => {
                json!({"step": step.number, "name": step.name, "state": "incomplete", "reason": why})
            }
        };
        document["steps"] = description.steps.iter().map(step).collect();
    }
    document
}

fn row(checkpoint: &Checkpoint, leaf: &LeafInfo, bytes: Option<u64>) -> Json {
    let meta = leaf.kind.array().map(|array| &checkpoint.arrays()[array].meta);
    let dim = |axes: &Vec<String>| match axes.as_slice() {
        [] => Json::Null,
        [one] => json!(one),
        many => json!(many),
    };
    let mut row = json!({
        "path": leaf.path,
        "kind": leaf.kind.name(),
        "dtype": meta.map(|meta| meta.dtype.name()),
        "shape": meta.map(|meta| &meta.shape),
        "spec": leaf.saved.as_ref().map(|saved| saved.spec.iter().map(dim).collect::<Vec<_>>()),
        "mesh": leaf.saved.as_ref().map(|saved| saved.mesh),
        "chunk_shape": meta.map(|meta| meta.grid.chunk_shape()),
        "stored_bytes": bytes,
        "value": null,
    });
    match &leaf.kind {
        LeafKind::Scalar { dtype, value, .. } => {
            row["dtype"] = json!(dtype.name());
            row["shape"] = json!([]);
            row["value"] = value.json();
        }
        LeafKind::Text(text) => row["value"] = json!(text),
        LeafKind::Empty(container) => row["container"] = json!(container.name()),
        LeafKind::Key(_, key_impl) => row["key_impl"] = json!(key_impl),
        LeafKind::Unreadable(error) => row["reason"] = json!(error.to_string()),
        LeafKind::Array(_) | LeafKind::None => {}
    }
    row
}

fn rows(checkpoint: &Checkpoint, bytes: impl Fn(&LeafInfo) -> Option<u64>) -> String {
    let description = checkpoint.description();
    let mut text = format!("{} {}", description.format.as_str(), description.layout.as_str());
    if let Some(step) = &description.step {
        text += &format!(", step {}", step.number);
    }
    if let Some(item) = checkpoint.item().filter(|item| !item.is_empty()) {
        let others = description.items.iter().filter(|other| other.name != item).map(|other| other.name.as_str());
        let others: Vec<&str> = others.collect();
        text += &format!(", item {item}");
        if !others.is_empty() {
            text += &format!(" (also {})", others.join(", "));
        }
    }
    for mesh in checkpoint.meshes() {
        let axes: Vec<String> =
            mesh.axes.iter().zip(&mesh.shape).map(|(axis, size)| format!("{axis}={size}")).collect();
        text += &format!(", saved on {}", axes.join(","));
    }
    text.push('\n');
    let mut table = Vec::new();
    let (mut total, mut arrays) = (0, 0);
    for leaf in checkpoint.leaves() {
        let meta = leaf.kind.array().map(|array| &checkpoint.arrays()[array].meta);
        let path = match leaf.path.to_string() {
            path if path.is_empty() => "(root)".to_owned(),
            path => path,
        };
        let spec =
            leaf.saved.as_ref().map(|saved| crate::plan::Spec(saved.spec.clone()).to_string()).unwrap_or_default();
        let size = bytes(leaf).map(human_bytes).unwrap_or_default();
        table.push(match (&leaf.kind, meta) {
            (LeafKind::Scalar { dtype, value, .. }, _) => vec![path, dtype.to_string(), value.json().to_string()],
            (LeafKind::Text(text), _) => vec![path, "string".to_owned(), format!("{text:?}")],
            (LeafKind::Empty(container), _) => vec![path, "empty".to_owned(), container.name().to_owned()],
            (LeafKind::Unreadable(error), _) => vec![path, "unreadable".to_owned(), error.to_string()],
            (kind, Some(meta)) => {
                let dtype = match kind {
                    LeafKind::Key(_, key_impl) => format!("{} key {key_impl}", meta.dtype),
                    _ => meta.dtype.to_string(),
                };
                arrays += 1;
                total += bytes(leaf).unwrap_or(0);
                let chunks = output::shape(meta.grid.chunk_shape());
                vec![path, dtype, output::shape(&meta.shape), spec, format!("chunks {chunks}"), size]
            }
            (kind, None) => vec![path, kind.name().to_owned()],
        });
    }
    text += &output::table(&table);
    text + &format!("{} leaves, {arrays} arrays, {} stored\n", checkpoint.leaves().len(), human_bytes(total))
}
