//! `load --dump`: what landed, as files that any program can read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use crate::error::{Error, ErrorKind, Result};
use crate::keypath::KeyPath;
use crate::tree::{Array, Leaf, State, Value};

/// Refuses a directory that is not new or empty: what is in it afterwards is one dump.
pub(super) fn check(dir: &Path) -> Result<()> {
    match std::fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::new(ErrorKind::Exists, "the dump's directory is not empty")
            .at("path", dir.display())
            .hint("give a new or an empty directory")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            Err(Error::new(ErrorKind::Exists, "a file stands where the dump's directory should be")
                .at("path", dir.display()))
        }
        Err(error) => Err(cannot_make(dir, error)),
    }
}

fn cannot_make(dir: &Path, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "cannot make the dump's directory").at("path", dir.display()).caused_by(error)
}

/// Writes `dump.json` (schema 1) and one raw little-endian C-order file for every distinct shard: all of them or, if one cannot
/// be written or it is told to `stop`, none.
pub(super) fn dump(state: &State, dir: &Path, stop: &dyn Fn() -> bool) -> Result<()> {
    let is_new = !dir.exists();
    std::fs::create_dir_all(dir).map_err(|error| cannot_make(dir, error))?;
    let mut files = Files { dir, stop, written: Vec::new() };
    let result = write_all(state, &mut files);
    if result.is_err() {
        // That it failed is told; what cannot be removed then is not worth more.
        files.written.iter().for_each(|file| drop(std::fs::remove_file(file)));
        if is_new {
            drop(std::fs::remove_dir(dir));
        }
    }
    result
}

/// The files of a dump.
struct Files<'a> {
    dir: &'a Path,
    stop: &'a dyn Fn() -> bool,
    /// Those that have been begun.
    written: Vec<PathBuf>,
}

impl Files<'_> {
    fn write(&mut self, name: &str, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
        if (self.stop)() {
            return Err(Error::new(ErrorKind::Cancelled, "the dump was stopped").at("path", self.dir.display()));
        }
        let path = self.dir.join(name);
        let result = File::create(&path).and_then(|mut file| {
            self.written.push(path.clone());
            write(&mut file)
        });
        result.map_err(|error| {
            Error::new(ErrorKind::Io, "cannot write the dump").at("file", path.display()).caused_by(error)
        })
    }
}

fn write_all(state: &State, files: &mut Files<'_>) -> Result<()> {
    let mut leaves = Vec::new();
    for (number, (path, leaf)) in state.leaves().enumerate() {
        leaves.push(match leaf {
            Leaf::Array(array) => array_row(number, path, array, |name, bytes| {
                files.write(name, |file| file.write_all(bytes))
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
    files.write("dump.json", |file| {
        let mut out = BufWriter::new(file);
        serde_json::to_writer(&mut out, &json!({"schema": 1, "leaves": leaves}))?;
        out.flush()
    })
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
