//! `touchdown kv`: an OCDBT database as what it is, keys and values.

use std::process::ExitCode;

use serde_json::{Value as Json, json};

use super::options::{SourceArgs, note_passed_over};
use super::output;
use crate::error::{Error, Result};
use crate::kv::{Index, Value};
use crate::tree::Database;

pub(super) const EXAMPLE: &str = "Example:\n  touchdown kv tests/fixtures/quickstart/ckpt\n  touchdown kv tests/fixtures/quickstart/ckpt/state params.embed/zarr.json";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Print the value of this key to stdout.
    key: Option<String>,
    /// One JSON object: keys in order, with lengths and places; of one key also the value, where it is text.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, quiet: bool) -> Result<ExitCode> {
    let database = Database::open(&args.source.path, &args.source.options()?)?;
    if let Some(description) = database.description().filter(|_| !quiet) {
        note_passed_over(description);
    }
    if let Some(key) = &args.key {
        let Some(value) = database.index().get(key.as_bytes()) else {
            let names: Vec<String> =
                database.index().entries().iter().map(|(key, _)| String::from_utf8_lossy(key).into_owned()).collect();
            let near = crate::layout::nearest(key, names.iter().map(String::as_str));
            let error = Error::invalid(format!("there is no key `{key}`")).at("database", args.source.path.display());
            let error = if near.is_empty() { error } else { error.found(format_args!("nearest: {}", near.join(", "))) };
            return Err(error.hint("`touchdown kv` without a key lists them"));
        };
        let bytes = database.read(value)?;
        if args.json {
            let mut document = entry(database.index(), key.as_bytes(), value);
            document["schema"] = json!(1);
            document["value"] = json!(std::str::from_utf8(&bytes).ok());
            output::json(&document)?;
        } else {
            output::bytes(&bytes)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let index = database.index();
    if args.json {
        let keys: Vec<_> = index.entries().iter().map(|(key, value)| entry(index, key, value)).collect();
        output::json(&json!({"schema": 1, "keys": keys}))?;
    } else {
        let row = |(key, value): &(bytes::Bytes, Value)| {
            let place = match value {
                Value::Inline(_) => "inline".to_owned(),
                Value::Extent(extent) => format!("{} at {}", index.file(extent.file), extent.offset),
            };
            vec![String::from_utf8_lossy(key).escape_debug().to_string(), value.len().to_string(), place]
        };
        output::text(&output::table(&index.entries().iter().map(row).collect::<Vec<_>>()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A key and where its value is.
fn entry(index: &Index, key: &[u8], value: &Value) -> Json {
    let key = String::from_utf8_lossy(key);
    match value {
        Value::Inline(bytes) => json!({"key": key, "length": bytes.len(), "inline": true}),
        Value::Extent(extent) => json!({
            "key": key, "length": extent.len, "inline": false,
            "file": index.file(extent.file).to_string(), "offset": extent.offset,
        }),
    }
}
