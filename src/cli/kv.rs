//! `touchdown kv`: an OCDBT database as what it is, keys and values.

use std::process::ExitCode;

use serde_json::json;

use super::options::SourceArgs;
use super::output;
use crate::error::{Error, Result};
use crate::kv::Value;
use crate::tree::Database;

pub(super) const EXAMPLE: &str =
    "Example:\n  touchdown kv runs/llm/1000\n  touchdown kv runs/llm/1000/state params.w/zarr.json";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Print the value of this key to stdout.
    key: Option<String>,
    /// One JSON object: keys in order, with lengths and places.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let database = Database::open(&args.source.path, &args.source.options()?)?;
    if let Some(key) = &args.key {
        let Some(value) = database.index().get(key.as_bytes()) else {
            let names: Vec<String> =
                database.index().entries().iter().map(|(key, _)| String::from_utf8_lossy(key).into_owned()).collect();
            let near = crate::layout::nearest(key, names.iter().map(String::as_str)).join(", ");
            return Err(Error::invalid(format!("there is no key `{key}`")).found(format_args!("nearest: {near}")));
        };
        output::bytes(&database.read(value)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let index = database.index();
    if args.json {
        let entry = |(key, value): &(bytes::Bytes, Value)| {
            let key = String::from_utf8_lossy(key);
            match value {
                Value::Inline(bytes) => json!({"key": key, "length": bytes.len(), "inline": true}),
                Value::Extent(extent) => json!({
                    "key": key, "length": extent.len, "inline": false,
                    "file": index.file(extent.file).to_string(), "offset": extent.offset,
                }),
            }
        };
        output::json(&json!({"schema": 1, "keys": index.entries().iter().map(entry).collect::<Vec<_>>()}))?;
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
