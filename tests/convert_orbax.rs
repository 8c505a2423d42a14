//! `touchdown convert`, judged by the packages that own the formats: Orbax loads what Orbax's checkpoints become, safetensors
//! loads the tensors, and Orbax finds what safetensors wrote.
//!
//! `TOUCHDOWN_DIFFERENTIAL_SEED` and `TOUCHDOWN_SAVE_COUNT` choose other and more trees. A failure leaves its files in place.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod saved;
mod support;

use std::fs;
use std::path::Path;

use saved::Random;
use serde_json::{Value as Json, json};
use support::dump::{Comparison, compare_dumps};
use support::{number_from_environment, python, read_json, run_python, scratch, touchdown};
use touchdown::layout::safetensors::header::dtype_name;
use touchdown::{DType, KeyPath};

fn seed() -> u64 {
    number_from_environment("TOUCHDOWN_DIFFERENTIAL_SEED", 1)
}

fn count() -> u64 {
    number_from_environment("TOUCHDOWN_SAVE_COUNT", 40) / 2
}

fn text(path: &Path) -> String {
    path.to_str().expect("a UTF-8 path").to_owned()
}

fn write_json(path: &Path, value: &Json) {
    fs::write(path, value.to_string()).unwrap();
}

/// How a new Orbax checkpoint is stored, by the roll of dice.
fn storage(random: &mut Random) -> Vec<&'static str> {
    let mut flags = vec!["--to", "orbax"];
    let zarr2 = random.one_in(2);
    if zarr2 {
        flags.extend(["--zarr", "2"]);
    }
    match random.below(4) {
        0 => flags.extend(["--compression", "none"]),
        1 => flags.extend(["--compression", "zstd:3", "--checksum", "on"]),
        2 => flags.extend(["--compression", "zstd:-5", "--checksum", "off"]),
        _ => {}
    }
    if random.one_in(3) {
        flags.extend(["--chunk-bytes", "256"]);
    }
    flags
}

/// Converts, or says why not.
fn convert(args: &[&str]) -> Result<Json, String> {
    let run = touchdown(["convert"].iter().chain(args).chain(&["--json"]));
    match run.code {
        Some(0) => Ok(serde_json::from_str(&run.stdout).unwrap()),
        Some(2) => Err(run.stderr),
        code => panic!("{args:?}: {code:?}: {}", run.stderr),
    }
}

/// Orbax's random trees, sharded over up to eight devices, of both formats and storages, become other ones that Orbax loads
/// through all of its doors: values, types, shardings, containers, metadata.
#[test]
fn orbax_loads_what_its_checkpoints_become() {
    let Some(python) = python("orbax_loads_what_its_checkpoints_become") else { return };
    let folder = scratch("convert-orbax");
    let out = text(&folder);
    let (seed, count) = (seed() + 100, count());
    let args = ["saved-make", "--out", &out, "--seed", &seed.to_string(), "--count", &count.to_string()];
    run_python(&python, "oracle.py", args);
    let mut compared = Comparison::default();
    for number in 0..count {
        let case = folder.join(number.to_string());
        let mut random = Random::new(seed, number);
        let mut facts = read_json(&case.join("facts.json"));
        let mut flags = storage(&mut random);
        // Some names only a database can hold.
        let ocdbt = facts["items"]["state"]["ocdbt"] == true || random.one_in(2);
        if !ocdbt {
            flags.push("--no-ocdbt");
        }
        let (from, to) = (text(&case.join("ckpt")), text(&case.join("again")));
        let report = convert(&[&[from.as_str(), &to], &flags[..]].concat()).unwrap();
        assert!(report["leaves"].as_u64() > Some(0), "{report}");
        facts["items"]["state"]["ocdbt"] = ocdbt.into();
        facts["items"]["state"]["zarr3"] = (!flags.contains(&"--zarr")).into();
        write_json(&case.join("facts.json"), &facts);
        let dump = case.join("got-state");
        let run = touchdown(["load", &to, "--devices", "cpu:1", "--dump", &text(&dump)]);
        assert_eq!(run.code, Some(0), "{}: {}", case.display(), run.error());
        compared.add(compare_dumps(&case.join("want-state"), &dump));
    }
    write_json(&folder.join("index.json"), &json!({"count": count, "checkpoint": "again", "append": false}));
    print!("seed {seed}: {}", run_python(&python, "oracle.py", ["saved", "--out", &out]));
    println!("{} leaves, {} bytes compared", compared.leaves, compared.bytes);
    assert!(compared.differences.is_empty(), "{out}:\n{}", compared.differences.join("\n"));
    assert!(compared.leaves as u64 > count && compared.bytes > 0, "nothing was compared");
    fs::remove_dir_all(&folder).unwrap();
}

/// The same trees become safetensors that the safetensors package loads, in one file and in several.
#[test]
fn safetensors_loads_what_orbax_checkpoints_become() {
    let Some(python) = python("safetensors_loads_what_orbax_checkpoints_become") else { return };
    let folder = scratch("convert-tensors");
    let out = text(&folder);
    let (seed, count) = (seed() + 200, count());
    let args = ["saved-make", "--out", &out, "--seed", &seed.to_string(), "--count", &count.to_string()];
    run_python(&python, "oracle.py", args);
    let (mut cases, mut left_out) = (Vec::new(), 0);
    for number in 0..count {
        let case = folder.join(number.to_string());
        let from = text(&case.join("ckpt"));
        let listed: Json = serde_json::from_str(&touchdown(["ls", &from, "--json"]).stdout).unwrap();
        let (mut skips, mut skipped) = (Vec::new(), Vec::new());
        for row in listed["leaves"].as_array().unwrap() {
            let dtype = row["dtype"].as_str().and_then(|name| name.parse::<DType>().ok());
            // Two elements of four bits fill a byte, and a tensor whole bytes.
            let odd = row["shape"]
                .as_array()
                .is_some_and(|shape| shape.iter().map(|extent| extent.as_u64().unwrap()).product::<u64>() % 2 == 1);
            if dtype.is_some_and(|dtype| dtype_name(dtype).is_none() || (dtype == DType::Float4E2M1FN && odd)) {
                let path: KeyPath = serde_json::from_value(row["path"].clone()).unwrap();
                skips.extend(["--skip".to_owned(), path.to_string()]);
                skipped.push(row["path"].clone());
            }
        }
        left_out += skipped.len();
        if skipped.len() == listed["leaves"].as_array().unwrap().len() {
            continue;
        }
        write_json(&case.join("skipped.json"), &skipped.into());
        let skips: Vec<&str> = skips.iter().map(String::as_str).collect();
        let (one, several) = (text(&case.join("tensors.safetensors")), text(&case.join("tensors")));
        let to = ["--to", "safetensors"];
        let first = convert(&[&[from.as_str(), &one], &to[..], &skips].concat());
        match first {
            // Elements of a path are joined by dots: two leaves may come to one name.
            Err(why) => assert!(why.contains("would both be"), "{why}"),
            Ok(_) => {
                convert(&[&[from.as_str(), &several], &to[..], &["--max-shard-bytes", "300"], &skips].concat())
                    .unwrap();
                cases.push(number.to_string());
            }
        }
    }
    write_json(&folder.join("index.json"), &json!({"tensors": cases, "orbax": []}));
    let report: Json = serde_json::from_str(&run_python(&python, "oracle.py", ["converted", "--out", &out])).unwrap();
    println!("seed {seed}: {report}, {left_out} leaves that the format cannot hold left out");
    assert!(cases.len() as u64 * 2 > count && report["tensors"].as_u64() > Some(count * 4), "{report}");
    fs::remove_dir_all(&folder).unwrap();
}

/// Files of the safetensors package become checkpoints that Orbax loads.
#[test]
fn orbax_loads_what_safetensors_become() {
    let Some(python) = python("orbax_loads_what_safetensors_become") else { return };
    let folder = scratch("convert-from-tensors");
    let out = text(&folder);
    let count = count();
    let args = ["converted-make", "--out", &out, "--seed", &seed().to_string(), "--count", &count.to_string()];
    run_python(&python, "oracle.py", args);
    let mut cases = Vec::new();
    for number in 0..count {
        let case = folder.join(number.to_string());
        let (from, to) = (text(&case.join("source.safetensors")), text(&case.join("ckpt")));
        let flags = storage(&mut Random::new(seed(), 900 + number));
        convert(&[&[from.as_str(), &to], &flags[..]].concat()).unwrap();
        cases.push(number.to_string());
    }
    write_json(&folder.join("index.json"), &json!({"tensors": [], "orbax": cases}));
    let report: Json = serde_json::from_str(&run_python(&python, "oracle.py", ["converted", "--out", &out])).unwrap();
    println!("{report}");
    assert!(report["arrays"].as_u64() > Some(count), "{report}");
    fs::remove_dir_all(&folder).unwrap();
}
