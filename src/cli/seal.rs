//! `touchdown seal`: checksums for a checkpoint that has none.

use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;

use super::options::{EngineArgs, SourceArgs};
use super::output;
use super::signals::Signals;
use crate::error::{Result, printable};
use crate::io::store::{LocalStore, Store};
use crate::plan::explain::human_bytes;
use crate::tree::seal::Seal;

pub(super) const EXAMPLE: &str = "Every value is read and decoded first: damage is not sealed. Sealing again compares. Orbax ignores the file that is written.\n\nExample:\n  touchdown seal tests/fixtures/quickstart/ckpt";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, signals: &Signals) -> Result<ExitCode> {
    let seal = Seal::of(&args.source.path, &args.source.options()?, &args.engine.options()?)?;
    // What is left takes no time, and would leave a temporary file if it ended in between.
    signals.hold();
    seal.write(&(Arc::new(LocalStore) as Arc<dyn Store>))?;
    let sealed = &seal.sealed;
    if args.json {
        output::json(&json!({
            "schema": 1,
            "items": sealed.items,
            "values": sealed.values,
            "bytes_stored": sealed.bytes,
            "unsupported": sealed.unsupported,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for leaf in &sealed.unsupported {
        text += &format!("not sealed, since it cannot be read here: {}\n", printable(leaf));
    }
    text += &format!("{} items, {} values, {} sealed\n", sealed.items, sealed.values, human_bytes(sealed.bytes));
    output::text(&text)?;
    Ok(ExitCode::SUCCESS)
}
