//! `load --dump`: what landed, as files that any program can read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Value as Json, json};

use crate::error::{Error, ErrorKind, Result};
use crate::keypath::KeyPath;
use crate::tree::{Array, Leaf, State, Value};

/// Makes the directory of a dump. It must be new or empty, so that what is in it afterwards is one dump.
pub(super) fn prepare(dir: &Path) -> Result<()> {
    let io = |error: std::io::Error| {
        Error::new(ErrorKind::Io, "cannot make the dump's directory").at("path", dir.display()).caused_by(error)
    };
    match std::fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::new(ErrorKind::Exists, "the dump's directory is not empty")
            .at("path", dir.display())
            .hint("give a new or an empty directory")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => std::fs::create_dir_all(dir).map_err(io),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            Err(Error::new(ErrorKind::Exists, "a file stands where the dump's directory should be")
                .at("path", dir.display()))
        }
        Err(error) => Err(io(error)),
    }
}

/// Writes `dump.json` (schema 1) and one raw little-endian C-order file for every distinct shard.
pub(super) fn dump(state: &State, dir: &Path) -> Result<()> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| {
            Error::new(ErrorKind::Io, "cannot write the dump").at("file", path).caused_by(error)
        }
    };
    let mut leaves = Vec::new();
    for (number, (path, leaf)) in state.leaves().enumerate() {
        leaves.push(match leaf {
            Leaf::Array(array) => array_row(number, path, array, |name, bytes| {
                let file = dir.join(name);
                std::fs::write(&file, bytes).map_err(failed(&file))
            })?,
            Leaf::Value { value: value @ Value::Text(_), .. } => {
                json!({"path": path, "kind": "string", "dtype": null, "shape": null, "value": value.json()})
            }
            Leaf::Value { value, dtype } => {
                json!({"path": path, "kind": "scalar", "dtype": dtype.map(|dtype| dtype.name()), "shape": [], "value": value.json()})
            }
            Leaf::None => json!({"path": path, "kind": "none", "dtype": null, "shape": null, "value": null}),
            Leaf::Empty(container) => {
                json!({"path": path, "kind": "empty", "dtype": null, "shape": null, "value": null, "container": container.name()})
            }
        });
    }
    let index = dir.join("dump.json");
    let file = File::create(&index).map_err(failed(&index))?;
    let mut out = BufWriter::new(file);
    serde_json::to_writer(&mut out, &json!({"schema": 1, "leaves": leaves}))
        .map_err(std::io::Error::from)
        .map_err(failed(&index))?;
    out.flush().map_err(failed(&index))
}

fn array_row(
    number: usize,
    path: &KeyPath,
    array: &Array,
    mut write: impl FnMut(&str, &[u8]) -> Result<()>,
) -> Result<Json> {
    let mut files: HashMap<&[u64], Vec<(&[u64], String)>> = HashMap::new();
    let mut shards = Vec::new();
    for shard in array.shards() {
        let region = &shard.region;
        let written = files.entry(&region.start).or_default();
        let name = match written.iter().find(|(extent, _)| *extent == region.extent) {
            Some((_, name)) => name.clone(),
            None => {
                let name = format!("{number}.{}.bin", shard.position);
                write(&name, &shard.to_host()?)?;
                written.push((&region.extent, name.clone()));
                name
            }
        };
        let index: Vec<[u64; 2]> = (0..region.rank()).map(|dim| [region.start[dim], region.end(dim)]).collect();
        shards.push(json!({"device": shard.position, "index": index, "file": name}));
    }
    let kind = if array.key_impl.is_some() { "key" } else { "array" };
    let mut row = json!({
        "path": path, "kind": kind, "dtype": array.dtype.name(), "shape": array.shape, "value": null, "shards": shards,
    });
    if let Some(key_impl) = &array.key_impl {
        row["key_impl"] = json!(key_impl);
    }
    Ok(row)
}
