//! Every checked-in checkpoint with true values, through `touchdown load --dump`.
//!
//! `tests/fixtures/*/expected.json` tells what `ckpt/` beside it holds; where the fixtures come from: the
//! corpus of real checkpoints, and `tests/orbax/fixtures.py`. Needs no Python.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use support::dump::first_difference;
use support::{copy_tree, fixture, read_json, scratch, touchdown};

#[test]
fn fixtures_load_as_their_true_values() {
    let folder = scratch("fixtures");
    let mut tally = Tally::default();
    for path in fixtures() {
        let expected = read_json(&path.join("expected.json"));
        let name = path.file_name().expect("a fixture has a name").to_string_lossy().into_owned();
        let kind = expected["kind"].as_str().unwrap_or_else(|| panic!("{name}: no kind"));
        match kind {
            "orbax" | "steps" | "safetensors" => {
                let values = fs::read(path.join("expected.bin")).unwrap_or_default();
                let items = expected["items"].as_object().unwrap_or_else(|| panic!("{name}: no items"));
                for (item, leaves) in items {
                    let dump = folder.join(format!("{name}-{}", item.replace('/', "-")));
                    let args = arguments(kind, &path.join("ckpt"), item);
                    tally.check_item(&format!("{name} [{item}]"), &args, &dump, &leaves["leaves"], &values);
                }
                tally.fixtures += 1;
            }
            // Other tests ask these: bare stores, bare arrays, and what must be refused.
            _ => tally.left_out += 1,
        }
    }
    println!(
        "{} fixtures, {} leaves, {} bytes compared; {} fixtures of other kinds left out",
        tally.fixtures, tally.leaves, tally.bytes, tally.left_out
    );
    let shown = tally.failures.iter().take(40).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(tally.failures.is_empty(), "{} failures:\n{shown}", tally.failures.len());
    assert!(tally.leaves > 100, "hardly anything was compared: are the fixtures there?");
    fs::remove_dir_all(&folder).expect("the dumps can be removed");
}

/// Refused fixtures end with the exit code that they name and an `error:` line; nothing is dumped.
#[test]
fn refused_fixtures_are_refused() {
    let folder = scratch("refused");
    let mut checked = 0;
    for path in fixtures() {
        let expected = read_json(&path.join("expected.json"));
        if expected["kind"] != "refused" {
            continue;
        }
        let name = path.file_name().expect("a fixture has a name").to_string_lossy().into_owned();
        // A copy, because a name may have to point to where this repository lies.
        let work = folder.join(&name);
        copy_tree(&path, &work);
        let metadata = work.join("ckpt/_METADATA");
        if let Ok(text) = fs::read_to_string(&metadata) {
            let outside = fixture("zarr2_codecs/ckpt/none");
            assert!(outside.join(".zarray").exists(), "{} is no array: nothing would be proven", outside.display());
            let outside = outside.to_str().expect("a UTF-8 path").to_owned();
            fs::write(&metadata, text.replace("@OUTSIDE@", &outside)).expect("the copy can be changed");
        }
        let dump = work.join("dump");
        let run = touchdown([
            "load".as_ref(),
            work.join("ckpt").as_os_str(),
            "--devices".as_ref(),
            "cpu:1".as_ref(),
            "--dump".as_ref(),
            dump.as_os_str(),
        ]);
        let code = expected["exit"].as_i64().unwrap_or_else(|| panic!("{name}: no exit code"));
        assert_eq!(run.code.map(i64::from), Some(code), "{name}: {}", run.stderr);
        assert!(run.stderr.lines().any(|line| line.starts_with("error:")), "{name}: {:?}", run.stderr);
        assert!(!dump.join("dump.json").exists(), "{name}: refused, and dumped all the same");
        checked += 1;
    }
    println!("{checked} refused fixtures");
    assert!(checked > 0, "no refused fixture was found");
    fs::remove_dir_all(&folder).expect("the copies can be removed");
}

fn fixtures() -> Vec<PathBuf> {
    let root = fixture("");
    let entries = fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.join("expected.json").exists())
        .collect();
    folders.sort();
    folders
}

/// How a reader is asked for one item: a step's directory by path, a safetensors file by path.
fn arguments(kind: &str, checkpoint: &Path, item: &str) -> Vec<String> {
    let text = |path: PathBuf| path.to_str().expect("a UTF-8 path").to_owned();
    match (kind, item) {
        (_, "") => vec![text(checkpoint.to_path_buf())],
        ("safetensors", file) => vec![text(checkpoint.join(file))],
        ("steps", item) => {
            let (step, name) = item.split_once('/').unwrap_or((item, ""));
            vec![text(checkpoint.join(step)), "--item".to_owned(), name.to_owned()]
        }
        (_, item) => vec![text(checkpoint.to_path_buf()), "--item".to_owned(), item.to_owned()],
    }
}

#[derive(Default)]
struct Tally {
    fixtures: usize,
    left_out: usize,
    leaves: usize,
    bytes: usize,
    failures: Vec<String>,
}

impl Tally {
    fn check_item(&mut self, name: &str, args: &[String], dump: &Path, leaves: &Value, values: &[u8]) {
        let dump_text = dump.to_str().expect("a UTF-8 path");
        let fixed = ["--devices", "cpu:1", "--dump", dump_text].map(str::to_owned);
        let run = touchdown(["load".to_owned()].iter().chain(args).chain(&fixed));
        if run.code != Some(0) {
            self.failures.push(format!("{name}: exit {:?}: {}", run.code, run.error()));
            return;
        }
        let body = read_json(&dump.join("dump.json"));
        let rows = body["leaves"].as_array().unwrap_or_else(|| panic!("{name}: the dump lists no leaves"));
        let mut got = BTreeMap::new();
        for row in rows {
            let path = path_of(&row["path"], |element| element);
            if got.insert(path.clone(), row).is_some() {
                self.failures.push(format!("{name} {path:?}: dumped twice"));
            }
        }
        for leaf in leaves.as_array().unwrap_or_else(|| panic!("{name}: no list of expected leaves")) {
            let path = path_of(&leaf["path"], |element| &element[1]);
            let where_ = format!("{name} {}", path.join("/"));
            let outcome = match got.remove(&path) {
                None => Err("missing".to_owned()),
                Some(row) => check_leaf(leaf, row, values, dump),
            };
            match outcome {
                Ok(bytes) => self.bytes += bytes,
                Err(message) => self.failures.push(format!("{where_}: {message}")),
            }
            self.leaves += 1;
        }
        for path in got.keys() {
            self.failures.push(format!("{name} {}: a leaf too many", path.join("/")));
        }
    }
}

/// Elements as text: the corpus does not tell positions of very old tuples from keys.
fn path_of<'a>(path: &'a Value, element: impl Fn(&'a Value) -> &'a Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    path.as_array().expect("a path is a list").iter().map(|e| text(element(e))).collect()
}

/// The number of bytes that were equal, or what differs.
fn check_leaf(want: &Value, got: &Value, values: &[u8], dump: &Path) -> Result<usize, String> {
    let kind = want["kind"].as_str().unwrap_or_default();
    let shards = got["shards"].as_array().map_or(&[][..], Vec::as_slice);
    let differs = |field: &str| format!("{field} is {}, expected {}", got[field], want[field]);
    match kind {
        "string" if got["kind"] == "string" && got["value"] == want["value"] => return Ok(0),
        "string" => return Err(differs("value")),
        "empty" if matches!(got["kind"].as_str(), Some("none" | "empty")) => return Ok(0),
        "empty" => return Err(differs("kind")),
        "scalar" if shards.is_empty() && values_equal(&want["value"], &got["value"]) => {
            return Ok(0);
        }
        "scalar" if shards.is_empty() => return Err(differs("value")),
        "key" if got["key_impl"] != want["key_impl"] => return Err(differs("key_impl")),
        "array" | "key" | "scalar" => {}
        other => panic!("expected kind {other:?} is unknown"),
    }
    if got["dtype"] != want["dtype"] {
        return Err(differs("dtype"));
    }
    if got["shape"] != want["shape"] {
        return Err(differs("shape"));
    }
    let [shard] = shards else {
        return Err(format!("{} shards on one device", shards.len()));
    };
    let whole: Vec<Value> = want["shape"]
        .as_array()
        .expect("a shape")
        .iter()
        .map(|n| Value::from(vec![Value::from(0), n.clone()]))
        .collect();
    if shard["index"] != Value::from(whole) {
        return Err(format!("index is {}, which is not the whole", shard["index"]));
    }
    let number =
        |field: &str| usize::try_from(want[field].as_u64().expect("a position in expected.bin")).expect("a small file");
    let want_data = &values[number("offset")..number("offset") + number("nbytes")];
    let file = dump.join(shard["file"].as_str().unwrap_or_default());
    let got_data = fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let dtype = want["dtype"].as_str().unwrap_or_default();
    first_difference(dtype, want_data, &got_data).map_or(Ok(want_data.len()), Err)
}

/// 1 and 1.0 are equal here: older truths do not tell int from float.
fn values_equal(want: &Value, got: &Value) -> bool {
    match (want.as_f64(), got.as_f64()) {
        (Some(a), Some(b)) if want.is_f64() || got.is_f64() => a == b && a.is_sign_negative() == b.is_sign_negative(),
        _ => want == got,
    }
}
