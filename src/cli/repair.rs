//! `touchdown repair`: a checkpoint whose save was not finished becomes one that Orbax loads.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::options::SourceArgs;
use super::output;
use super::signals::Signals;
use crate::error::Result;
use crate::plan::explain::human_bytes;
use crate::tree::repair::repair;
use crate::tree::save::SaveOptions;

pub(super) const EXAMPLE: &str = "A save that was interrupted before the databases of its processes were merged lacks `manifest.ocdbt`. The copy has it;\nthe original is only read.\n\nExample:\n  touchdown repair tests/fixtures/v0_unmerged/ckpt repaired";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// The new directory; it must not exist.
    destination: PathBuf,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, signals: &Signals) -> Result<ExitCode> {
    signals.hold();
    let stop = || signals.exit_code().is_some();
    let (from, options) = (&args.source.path, args.source.options()?);
    let repaired = repair(from, &args.destination, &options, &SaveOptions::default(), &stop)?;
    if args.json {
        output::json(&json!({
            "schema": 1,
            "items": repaired.items,
            "keys": repaired.keys,
            "files": repaired.files,
            "bytes": repaired.bytes,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::text(&format!(
        "{} items merged, {} keys; {} files copied, {}\n",
        repaired.items.len(),
        repaired.keys,
        repaired.files,
        human_bytes(repaired.bytes)
    ))?;
    Ok(ExitCode::SUCCESS)
}
