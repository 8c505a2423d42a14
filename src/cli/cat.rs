//! `touchdown cat`: the values of one leaf.

use std::process::ExitCode;

use serde_json::{Value as Json, json};

use super::options::{EngineArgs, SourceArgs};
use super::output;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::keypath::KeyPath;
use crate::limits::CAT_EMPTY_ROWS_MAX;
use crate::plan::Verify;
use crate::plan::explain::human_bytes;
use crate::tree::{Array, Checkpoint, Engine, Leaf, Pattern, State, Take, Value, no_leaf};

pub(super) const EXAMPLE: &str =
    "Example:\n  touchdown cat tests/fixtures/quickstart/ckpt params/layer_0/kernel --slice 0:4,:";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// The leaf's path, as `ls` prints it.
    leaf: String,
    /// For each dimension an index, a range START:STOP, or `:`; missing ones are whole.
    #[arg(long, value_name = "0:4,:")]
    slice: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
    /// One JSON object; numbers exact, NaN and infinities as strings.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, quiet: bool) -> Result<ExitCode> {
    let state = args.source.with(quiet, |checkpoint| load(args, checkpoint))?;
    let unverified = state.report().bytes_unverified;
    if !quiet && unverified > 0 && args.engine.options()?.verify != Verify::Off {
        output::note(&format!(
            "{} of chunks were read in part and compared with no checksum; `--verify full` reads chunks whole and compares them",
            human_bytes(unverified)
        ));
    }
    let (path, leaf) = state.leaves().next().ok_or_else(|| Error::bug("a selected leaf was not loaded"))?;
    let (dtype, shape, value) = match leaf {
        Leaf::Array(array) => (Some(array.dtype), Some(array.shape.clone()), nested(array)?),
        Leaf::Value { value, dtype } => (*dtype, dtype.map(|_| Vec::new()), value.json()),
        Leaf::None => (None, None, Json::Null),
        Leaf::Empty(container) => (None, None, json!(container.name())),
    };
    if args.json {
        output::json(&json!({
            "schema": 1, "path": path, "dtype": dtype.map(DType::name), "shape": shape, "value": value,
        }))?;
    } else {
        let mut text = String::new();
        write_value(&value, 0, &mut text);
        output::text(&(text + "\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The leaf alone.
fn load(args: &Args, checkpoint: &Checkpoint) -> Result<State> {
    let pattern = || Pattern::glob(&KeyPath::from_escaped(&args.leaf).to_string());
    if !checkpoint.leaves().iter().any(|leaf| pattern().matches(&leaf.path)) {
        return Err(no_leaf(&args.leaf, checkpoint.leaves().iter().map(|leaf| leaf.path.to_string())));
    }
    let mut target = checkpoint.target().only([pattern()]);
    target.check()?;
    let kind = checkpoint.leaves().iter().find(|leaf| pattern().matches(&leaf.path)).map(|leaf| &leaf.kind);
    let shape = kind.and_then(|kind| kind.array()).map(|array| checkpoint.arrays()[array].meta.shape.clone());
    if let Some(slice) = &args.slice {
        let shape = shape.unwrap_or_default();
        // From the last dimension on, so that taking an index does not move the ones still to come.
        for take in takes(slice, &shape)?.into_iter().rev() {
            target = target.take([(pattern(), take)]);
        }
    }
    Engine::new(args.engine.options()?)?.load(checkpoint, &target)?.wait()
}

/// `0:4,:,3` as takes, in the order of dimensions.
fn takes(slice: &str, shape: &[u64]) -> Result<Vec<Take>> {
    let bad = |part: &str| {
        Error::invalid(format!("`{part}` in `--slice {slice}` selects nothing"))
            .expected("INDEX, START:STOP or `:` for each dimension")
    };
    let parts: Vec<&str> = slice.split(',').map(str::trim).collect();
    if parts.len() > shape.len() {
        return Err(Error::invalid("the slice has more parts than the leaf has dimensions")
            .expected(format_args!("at most {} parts, for {shape:?}", shape.len()))
            .found(format_args!("`{slice}`")));
    }
    let mut takes = Vec::new();
    for (dim, part) in parts.into_iter().enumerate() {
        let number = |text: &str, default: u64| match text.trim() {
            "" => Ok(default),
            text => text.parse::<u64>().map_err(|_| bad(part)),
        };
        match part.split_once(':') {
            Some((start, stop)) => {
                let (start, stop) = (number(start, 0)?, number(stop, shape[dim])?);
                takes.push(Take::Range { dim, start, stop: stop.min(shape[dim]) });
            }
            None => takes.push(Take::Index { dim, index: part.parse().map_err(|_| bad(part))? }),
        }
    }
    Ok(takes)
}

/// The elements as nested lists.
fn nested(array: &Array) -> Result<Json> {
    // Without elements the rows are all there is, and nothing else bounds them.
    let rows =
        array.shape.iter().take_while(|&&extent| extent > 0).try_fold(1u64, |rows, extent| rows.checked_mul(*extent));
    if array.shape.contains(&0) && rows.is_none_or(|rows| rows > CAT_EMPTY_ROWS_MAX) {
        return Err(Error::invalid("there are too many empty rows to print")
            .found(format_args!("the shape {}", output::shape(&array.shape)))
            .hint("print a part with --slice"));
    }
    let shard = array.shards().first().ok_or_else(|| Error::bug("an array without shards"))?;
    let mut elements = shard.bytes()?.chunks_exact(array.dtype.size());
    level(array.dtype, &array.shape, &mut elements)
}

fn level<'a>(dtype: DType, shape: &[u64], elements: &mut impl Iterator<Item = &'a [u8]>) -> Result<Json> {
    let Some((extent, rest)) = shape.split_first() else {
        let element = elements.next().ok_or_else(|| Error::bug("an array with too few elements"))?;
        return Ok(Value::from_element(dtype, element)?.json());
    };
    (0..*extent).map(|_| level(dtype, rest, elements)).collect::<Result<Vec<_>>>().map(Json::Array)
}

/// Nested lists as numpy prints them: innermost lists on one line.
fn write_value(value: &Json, depth: usize, out: &mut String) {
    match value {
        Json::Array(values) if values.iter().any(Json::is_array) => {
            out.push('[');
            for (index, value) in values.iter().enumerate() {
                if index > 0 {
                    out.push('\n');
                    out.extend(std::iter::repeat_n(' ', depth + 1));
                }
                write_value(value, depth + 1, out);
            }
            out.push(']');
        }
        Json::Array(values) => {
            let cells: Vec<String> = values.iter().map(plain).collect();
            *out += &format!("[{}]", cells.join(" "));
        }
        value => *out += &plain(value),
    }
}

fn plain(value: &Json) -> String {
    match value {
        Json::String(text) => text.clone(),
        Json::Null => "None".to_owned(),
        value => value.to_string(),
    }
}
