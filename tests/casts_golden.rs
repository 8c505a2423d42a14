//! Every cast against golden tables from TensorStore and ml_dtypes: all bit patterns of sources of up to
//! 16 bits, edge values, ties and random bits of the wider ones. What the tables hold: `tests/orbax/casts.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use support::dump::{is_nan, parts};
use support::{python, read_json, run_python, scratch};
use touchdown::transform::cpu::convert;
use touchdown::{CastPolicy, DType};

#[test]
fn every_cast_equals_its_golden_table() {
    let Some(python) = python("every_cast_equals_its_golden_table") else {
        return;
    };
    let folder = scratch("casts");
    let out = folder.join("tables");
    run_python(&python, "oracle.py", ["casts", "--out", out.to_str().expect("a UTF-8 target directory")]);

    let index = read_json(&out.join("index.json"));
    let mut sources = HashMap::new();
    let (mut compared, mut refused, mut failures) = (0, 0, Vec::new());
    let pairs = index["pairs"].as_array().expect("index.json lists pairs");
    for pair in pairs {
        let name = pair["source"].as_str().expect("a pair names its source");
        let source = sources.entry(name.to_owned()).or_insert_with(|| read(&out.join(name)));
        match check_pair(&out, pair, source) {
            Ok(Checked::Equal(elements)) => compared += elements,
            Ok(Checked::Refused) => refused += 1,
            Err(message) => failures.push(message),
        }
    }
    println!("{} casts: {compared} elements compared, {refused} refused as they must be", pairs.len());
    assert!(
        failures.is_empty(),
        "{} of {} casts differ:\n{}",
        failures.len(),
        pairs.len(),
        failures[..failures.len().min(40)].join("\n")
    );
    assert!(compared > 1_000_000 && refused > 0, "hardly anything was compared");
    fs::remove_dir_all(&folder).expect("the tables can be removed");
}

enum Checked {
    Equal(usize),
    Refused,
}

fn check_pair(out: &Path, pair: &Value, source: &[u8]) -> Result<Checked, String> {
    let text = |field: &str| pair[field].as_str().unwrap_or_else(|| panic!("{pair}: no {field}"));
    let (from, to) = (text("from"), text("to"));
    let dtype = |name: &str| name.parse::<DType>().unwrap_or_else(|e| panic!("{name} is not understood: {e:?}"));
    if pair["refused"] == true {
        return match convert(dtype(from), dtype(to), CastPolicy::Saturate, source, &mut vec![0; source.len()]) {
            Ok(_) => Err(format!("{from} to {to}: done, where it must be refused")),
            Err(_) => Ok(Checked::Refused),
        };
    }
    let (want, mask) = (read(&out.join(text("result"))), read(&out.join(text("mask"))));
    // 0xa5: an element that is not written must not look right by chance.
    let mut got = vec![0xa5; want.len()];
    let lossy = convert(dtype(from), dtype(to), CastPolicy::Saturate, source, &mut got)
        .map_err(|e| format!("{from} to {to}: {e:?}"))?;

    let width = want.len() / mask.len();
    let (mut wrong, mut first) = (0, None);
    let judged = if got == want { 0 } else { mask.len() };
    for (i, judge) in mask[..judged].iter().enumerate().filter(|(_, judge)| **judge != 0) {
        let at = i * width..(i + 1) * width;
        if !elements_equal(to, &want[at.clone()], &got[at.clone()]) {
            wrong += 1;
            first.get_or_insert((i, *judge, at));
        }
    }
    if let Some((i, judge, at)) = first {
        let source_width = source.len() / mask.len();
        let judge = if judge == 1 { "the reference" } else { "the rule" };
        return Err(format!(
            "{from} to {to}: {wrong} of {} differ, first 0x{} gives 0x{}, by {judge} 0x{}",
            mask.len(),
            hex(&source[i * source_width..(i + 1) * source_width]),
            hex(&got[at.clone()]),
            hex(&want[at]),
        ));
    }
    let bound = |field: &str| pair[field].as_u64().unwrap_or_else(|| panic!("{pair}: no {field}"));
    let (low, high) = (bound("lossy_min"), bound("lossy_max"));
    if !(low..=high).contains(&lossy) {
        return Err(format!("{from} to {to}: {lossy} lossy elements counted, expected {low} to {high}"));
    }
    Ok(Checked::Equal(mask.iter().filter(|judge| **judge != 0).count()))
}

/// Equal bits, or NaN for NaN; complex elements half by half.
fn elements_equal(dtype: &str, want: &[u8], got: &[u8]) -> bool {
    let (part, width) = parts(dtype);
    want.chunks(width).zip(got.chunks(width)).all(|(a, b)| a == b || (is_nan(part, a) && is_nan(part, b)))
}

fn hex(little_endian: &[u8]) -> String {
    little_endian.iter().rev().map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
