//! The checkpoints that the orbax-checkpoint package carries for its own compatibility tests: whole ones
//! load as Orbax loads them, damaged ones are refused with a message. Never a panic, never a signal.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod support;

use std::fs;

use support::dump::{Comparison, compare_dumps};
use support::{python, read_json, run_python, scratch, touchdown};

#[test]
fn packaged_checkpoints_load_or_are_refused() {
    let Some(python) = python("packaged_checkpoints_load_or_are_refused") else {
        return;
    };
    let folder = scratch("compat");
    let out = folder.join("truth");
    run_python(&python, "oracle.py", ["compat", "--out", out.to_str().expect("a UTF-8 target directory")]);

    let index = read_json(&out.join("index.json"));
    let cases = index["cases"].as_array().expect("index.json lists cases");
    let (mut compared, mut refused, mut failures) = (Comparison::default(), 0, Vec::new());
    for (number, case) in cases.iter().enumerate() {
        let text = |field: &str| case[field].as_str().unwrap_or_else(|| panic!("{case}: no {field}"));
        let dump = folder.join(format!("dump-{number}"));
        let mut args = vec!["load".to_owned(), text("path").to_owned()];
        let given = case["args"].as_array().expect("a case has arguments");
        args.extend(given.iter().map(|arg| arg.as_str().expect("an argument is a string").to_owned()));
        args.extend(["--dump".to_owned(), dump.display().to_string()]);
        let run = touchdown(&args);

        let exits = case["exits"].as_array().expect("a case has exit codes");
        if !run.code.is_some_and(|code| exits.iter().any(|exit| *exit == code)) {
            failures.push(format!("{}: exit {:?}, expected one of {exits:?}: {}", text("name"), run.code, run.error()));
        } else if run.code == Some(0) {
            let comparison = compare_dumps(&out.join(text("want")), &dump);
            failures.extend(comparison.differences.iter().map(|what| format!("{}: {what}", text("name"))));
            compared.add(comparison);
        } else if run.stderr.lines().any(|line| line.starts_with("error:")) {
            refused += 1;
        } else {
            failures.push(format!("{}: refused without an error: line: {:?}", text("name"), run.stderr));
        }
    }
    println!(
        "{} checkpoints: {} leaves, {} bytes compared; {refused} refused",
        cases.len(),
        compared.leaves,
        compared.bytes
    );
    assert!(failures.is_empty(), "{} of {} differ:\n{}", failures.len(), cases.len(), failures.join("\n"));
    assert!(compared.leaves > 0 && refused > 0, "one side of the test compared nothing");
    fs::remove_dir_all(&folder).expect("the dumps can be removed");
}
