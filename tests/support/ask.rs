//! Asking the program: arguments in, JSON or an error out, and what the command line's contract promises of both.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{fixture, read_json, touchdown};

/// The path of a fixture's checkpoint.
pub fn checkpoint(name: &str) -> String {
    text(&fixture(name).join("ckpt"))
}

pub fn text(path: &Path) -> String {
    path.to_str().expect("a UTF-8 path").to_owned()
}

/// Runs it and wants exit code 0; gives stdout.
#[track_caller]
pub fn ok(args: &[&str]) -> String {
    let run = touchdown(args);
    assert_eq!(run.code, Some(0), "{args:?}: {}", run.stderr);
    run.stdout
}

/// Runs it and wants one JSON object of schema 1.
#[track_caller]
pub fn object(args: &[&str]) -> Value {
    parsed(&ok(args))
}

#[track_caller]
pub fn parsed(stdout: &str) -> Value {
    let value: Value = serde_json::from_str(stdout).unwrap_or_else(|e| panic!("no JSON: {e}: {stdout:?}"));
    assert!(value.is_object() && value["schema"] == 1, "no object of schema 1: {stdout}");
    assert!(stdout.ends_with('\n') && stdout.trim_end().lines().count() == 1, "more than one line: {stdout:?}");
    value
}

/// Runs it and wants this exit code, an `error:` line first on stderr, nothing on stdout; gives stderr.
#[track_caller]
pub fn refused(code: i32, args: &[&str]) -> String {
    let run = touchdown(args);
    assert_eq!(run.code, Some(code), "{args:?}: {}", run.stderr);
    assert_eq!(run.stdout, "", "{args:?}: an error, and data on stdout");
    let first = run.stderr.lines().next().unwrap_or_default();
    assert!(first.starts_with("error: ") && first.len() > 12, "{args:?}: {:?}", run.stderr);
    run.stderr
}

/// A field has one of these types: `number|null` and so on.
#[track_caller]
pub fn has(value: &Value, field: &str, types: &str) {
    let found = value.get(field).unwrap_or_else(|| panic!("no field `{field}` in {value}"));
    let name = match found {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    };
    assert!(types == "any" || types.split('|').any(|wanted| wanted == name), "`{field}` is {found}, wanted {types}");
}

#[track_caller]
pub fn has_all(value: &Value, fields: &[(&str, &str)]) {
    fields.iter().for_each(|(field, types)| has(value, field, types));
}

pub fn rows(document: &Value) -> &Vec<Value> {
    document["leaves"].as_array().expect("a list of leaves")
}

/// The row of a path in its string form (without escapes).
#[track_caller]
pub fn row<'d>(document: &'d Value, path: &str) -> &'d Value {
    let shown = |row: &Value| {
        let elements = row["path"].as_array().expect("a path is a list").iter();
        elements.map(|e| e.as_str().map_or_else(|| e.to_string(), str::to_owned)).collect::<Vec<_>>().join("/")
    };
    rows(document).iter().find(|row| shown(row) == path).unwrap_or_else(|| panic!("no leaf {path}: {document}"))
}

pub fn paths(document: &Value) -> Vec<String> {
    let element = |e: &Value| e.as_str().map_or_else(|| e.to_string(), str::to_owned);
    let path = |row: &Value| row["path"].as_array().unwrap().iter().map(element).collect::<Vec<_>>().join("/");
    rows(document).iter().map(path).collect()
}

/// Loads with a dump into a fresh directory; gives the dump's index, the directory and the report.
#[track_caller]
pub fn load(folder: &Path, args: &[&str]) -> (Value, PathBuf, Value) {
    let dump = folder.join("dump");
    if dump.exists() {
        fs::remove_dir_all(&dump).unwrap();
    }
    let dump_text = text(&dump);
    let mut all = vec!["load"];
    all.extend(args);
    all.extend(["--json", "--dump", &dump_text]);
    let report = object(&all);
    (read_json(&dump.join("dump.json")), dump, report)
}

/// Shard indexes of a dumped leaf.
pub fn indexes(row: &Value) -> Vec<Value> {
    row["shards"].as_array().expect("shards").iter().map(|shard| shard["index"].clone()).collect()
}

pub fn shard_bytes(dump: &Path, row: &Value, shard: usize) -> Vec<u8> {
    fs::read(dump.join(row["shards"][shard]["file"].as_str().expect("a file"))).expect("a shard's file")
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
}

/// A safetensors file of these tensors: name, type, shape, data.
pub fn safetensors(path: &Path, tensors: &[(&str, &str, &[u64], &[u8])]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        header.insert((*name).to_owned(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = fs::File::create(path).expect("a file");
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&data).unwrap();
}

pub fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
