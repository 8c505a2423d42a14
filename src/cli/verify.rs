//! `touchdown verify`: is a checkpoint intact?

use std::process::ExitCode;

use serde_json::json;

use super::exit;
use super::options::{EngineArgs, SourceArgs, is_failed_by_files, settled};
use super::output;
use crate::error::Result;
use crate::plan::explain::human_bytes;
use crate::tree::verify::{Orphan, Problem, Verified, verify};

pub(super) const EXAMPLE: &str = "Example:\n  touchdown verify tests/fixtures/quickstart/ckpt --deep";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Read, check and decode every stored value.
    #[arg(long)]
    deep: bool,
    #[command(flatten)]
    engine: EngineArgs,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let (path, options, engine) = (&args.source.path, args.source.options()?, args.engine.options()?);
    // What is missing of a step that was removed meanwhile is no damage.
    let is_off = |found: &Result<Verified>| match found {
        Ok(found) => !found.problems.is_empty(),
        found => is_failed_by_files(found),
    };
    let found = settled(path, is_off, || verify(path, &options, args.deep, &engine))?;
    let said = if args.json {
        let problem = |problem: &Problem| {
            json!({
                "item": problem.item, "leaf": problem.leaf, "file": problem.file, "offset": problem.offset,
                "data_affected": problem.data_affected, "message": problem.message,
            })
        };
        output::json(&json!({
            "schema": 1,
            "ok": found.problems.is_empty(),
            "deep": args.deep,
            "items": found.items,
            "leaves": found.leaves,
            "chunks": found.chunks,
            "bytes_stored": found.bytes_stored,
            "bytes_decoded": found.bytes_decoded,
            "problems": found.problems.iter().map(problem).collect::<Vec<_>>(),
            "leftovers": output::leftovers_json(&found.leftovers),
            "orphans": found.orphans.iter().map(|orphan| json!({"path": orphan.path, "bytes": orphan.bytes, "key": orphan.key})).collect::<Vec<_>>(),
        }))
    } else {
        let mut text = String::new();
        for problem in &found.problems {
            let affected = if problem.data_affected { "damaged" } else { "metadata" };
            text += &format!("{affected}: {}\n", problem.message);
        }
        text += &output::leftovers_text(&found.leftovers);
        if !found.orphans.is_empty() {
            let (values, rest): (Vec<&Orphan>, Vec<&Orphan>) =
                found.orphans.iter().partition(|orphan| orphan.key.is_some());
            let bytes = |orphans: &[&Orphan]| human_bytes(orphans.iter().map(|orphan| orphan.bytes).sum());
            if !rest.is_empty() {
                let (files, bytes) = (rest.len(), bytes(&rest));
                text +=
                    &format!("nothing refers to {bytes} in {files} files, which does no harm (--json names them)\n");
            }
            if !values.is_empty() {
                let (keys, bytes) = (values.len(), bytes(&values));
                text += &format!(
                    "{keys} keys of the database ({bytes}) belong to no leaf, which does no harm (--json names them)\n"
                );
            }
        }
        let checked = if args.deep { "decoded and checked" } else { "references checked" };
        text += &format!(
            "{} items, {} leaves, {} chunks, {} stored: {checked}, {} problems\n",
            found.items,
            found.leaves,
            found.chunks,
            human_bytes(found.bytes_stored),
            found.problems.len()
        );
        output::text(&text)
    };
    // The answer is no, whether or not somebody reads why.
    if found.problems.is_empty() {
        said.map(|()| ExitCode::SUCCESS)
    } else {
        exit::or_closed(said).map(|()| ExitCode::from(exit::NO))
    }
}
