//! Random checkpoints written by the real Orbax, loaded in random ways, against what Orbax itself lands
//! on every device (and, where Orbax cannot, against a second computation: see `tests/orbax`).
//!
//! Every load is made on processors, and again on a mesh of devices of the simulated driver, or of the machine's own.
//!
//! `TOUCHDOWN_DIFFERENTIAL_SEED` and `TOUCHDOWN_DIFFERENTIAL_COUNT` choose other and more checkpoints.
//! A failure leaves its checkpoint, the expected and the actual dump in place and says where.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

#[path = "simulated/mod.rs"]
mod simulated;
mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use simulated::Driver;
use support::dump::{Comparison, compare_dumps};
use support::{finish, number_from_environment, program, python, read_json, run_python, scratch, skipped, touchdown};

#[test]
fn loads_land_what_orbax_lands() {
    let Some(python) = python("loads_land_what_orbax_lands") else {
        return;
    };
    let seed = number_from_environment("TOUCHDOWN_DIFFERENTIAL_SEED", 1);
    let count = number_from_environment("TOUCHDOWN_DIFFERENTIAL_COUNT", 60);
    let folder = scratch("differential");
    let out = folder.join("cases");
    let (seed_text, count_text) = (seed.to_string(), count.to_string());
    let out_text = out.to_str().expect("a target directory with a UTF-8 name");
    run_python(&python, "oracle.py", ["differential", "--seed", &seed_text, "--count", &count_text, "--out", out_text]);

    let index = read_json(&out.join("index.json"));
    let cases = index["cases"].as_array().expect("index.json lists cases");
    let (mut compared, mut failures) = (Comparison::default(), Vec::new());
    let readers = readers("loads_land_what_orbax_lands");
    let mut by_reader = vec![0; readers.len()];
    let driver = if cfg!(feature = "cuda") { Driver::find("loads_land_what_orbax_lands on devices") } else { None };
    let mut on_devices = Comparison::default();
    for (number, case) in cases.iter().enumerate() {
        let case = case.as_str().expect("a case is a path");
        let reader = number % readers.len();
        match run_case(&out, case, readers[reader], None) {
            Ok(comparison) => {
                compared.add(comparison);
                by_reader[reader] += 1;
            }
            Err(message) => failures.push(message),
        }
        if let Some(driver) = driver {
            match run_case(&out, case, readers[reader], Some((driver, number))) {
                Ok(comparison) => on_devices.add(comparison),
                Err(message) => failures.push(message),
            }
        }
    }
    println!(
        "{} leaves, {} shards, {} bytes compared on devices ({driver:?})",
        on_devices.leaves, on_devices.shards, on_devices.bytes
    );
    println!(
        "seed {seed}: {} loads, {} leaves, {} shards, {} bytes compared; {} arrays by Orbax itself, {} by the reference",
        cases.len(),
        compared.leaves,
        compared.shards,
        compared.bytes,
        index["arrays_by_orbax"],
        index["arrays_by_reference"],
    );
    println!("readers {readers:?} took {by_reader:?} turns; loads that name one kept it");
    let shown: Vec<&str> = failures.iter().take(10).map(String::as_str).collect();
    assert!(
        failures.is_empty(),
        "{} of {} loads differ (seed {seed}; all is kept below {}):\n{}",
        failures.len(),
        cases.len(),
        out.display(),
        shown.join("\n")
    );
    assert!(compared.leaves > 0 && compared.shards > 0, "nothing was compared");
    fs::remove_dir_all(&folder).expect("the cases can be removed");
}

/// What this machine can read with; the loads take turns.
fn readers(test: &str) -> Vec<&'static str> {
    let doctor = touchdown(["doctor", "--json"]);
    let told: serde_json::Value = serde_json::from_str(&doctor.stdout).expect("doctor prints JSON");
    if told["io"]["uring"] == true {
        return vec!["pread", "uring"];
    }
    skipped(&format!("{test} with io_uring"), told["io"]["uring_detail"].as_str().unwrap_or_default());
    vec!["pread"]
}

/// As many devices as these processors, in one of several kinds of meshes.
fn devices(processors: &str, kind: usize, driver: Driver) -> Option<String> {
    let count: u32 = processors.strip_prefix("cpu:")?.parse().ok()?;
    let half = count / 2;
    Some(match kind % 4 {
        _ if count == 0 => return None,
        // A machine may have one GPU only.
        2 | 3 if half > 0 && matches!(driver, Driver::Real) => format!("cuda:0*{half},cpu:{}", count - half),
        _ if matches!(driver, Driver::Real) => format!("cuda:0*{count}"),
        0 | 1 if (1..=8).contains(&count) => format!("cuda:0-{}", count - 1),
        2 if (1..=8).contains(&half) => format!("cuda:0-{},cpu:{}", half - 1, count - half),
        3 if half > 0 => format!("cuda:1*{half},cuda:0*{}", count - half),
        _ => format!("cuda:0*{count}"),
    })
}

/// Runs one load as its `args.json` says, with this reader unless it names one, on devices if there is a driver. An error is a
/// message with the command line that shows it.
fn run_case(out: &Path, case: &str, reader: &str, driver: Option<(Driver, usize)>) -> Result<Comparison, String> {
    let folder = out.join(case);
    let plan = read_json(&folder.join("args.json"));
    let checkpoint = out.join(plan["path"].as_str().expect("args.json has a path"));
    let got = folder.join(if driver.is_some() { "got-on-devices" } else { "got" });
    let mut args = vec!["load".to_owned(), checkpoint.display().to_string()];
    let given = plan["args"].as_array().expect("args.json has arguments");
    args.extend(given.iter().map(|arg| arg.as_str().expect("an argument is a string").to_owned()));
    if !args.iter().any(|arg| arg == "--io") {
        args.extend(["--io".to_owned(), reader.to_owned()]);
    }
    args.extend(["--dump".to_owned(), got.display().to_string()]);

    let mut command = program(&[] as &[&str]);
    if let Some((driver, kind)) = driver {
        let at = args.iter().position(|arg| arg == "--devices").map(|at| at + 1);
        let Some((at, devices)) = at.and_then(|at| Some((at, devices(args.get(at)?, kind, driver)?))) else {
            return Ok(Comparison::default());
        };
        args[at] = devices;
        driver.tell(&mut command, 50, kind as u64);
    }
    command.args(&args);
    let run = finish(command, Duration::from_secs(120));
    let told = |what: String| format!("  {case}: {what}\n    touchdown {}\n    ({})", quoted(&args), plan["notes"]);
    let code = i32::try_from(plan["exit"].as_i64().expect("args.json has an exit code")).expect("a small exit code");
    if run.code != Some(code) {
        return Err(told(format!("exit {:?}, expected {code}: {}", run.code, run.error())));
    }
    if code != 0 {
        return match run.stderr.lines().any(|line| line.starts_with("error:")) {
            true => Ok(Comparison::default()),
            false => Err(told(format!("no error: line in {:?}", run.stderr))),
        };
    }
    let comparison = compare_dumps(&folder.join("want"), &got);
    match comparison.differences.first() {
        None => Ok(comparison),
        Some(first) => Err(told(format!("{} differences, first {first}", comparison.differences.len()))),
    }
}

fn quoted(args: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@".contains(c);
    let quote = |arg: &String| match !arg.is_empty() && arg.chars().all(plain) {
        true => arg.clone(),
        false => format!("'{}'", arg.replace('\'', r"'\''")),
    };
    args.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// The comparison itself can fail: every kind of change to a dump is seen.
#[test]
fn a_changed_dump_is_seen() {
    let folder = scratch("changed-dump");
    let dump = |name: &str, leaf: &str, data: &[u8]| {
        let dir = folder.join(name);
        fs::create_dir_all(&dir).expect("a folder");
        fs::write(dir.join("dump.json"), format!(r#"{{"schema":1,"leaves":[{leaf}]}}"#)).expect("a dump");
        fs::write(dir.join("0.bin"), data).expect("a shard");
        dir
    };
    let leaf = r#"{"path":["a",0],"kind":"array","dtype":"float8_e4m3fnuz","shape":[2],"value":null,
        "shards":[{"device":0,"index":[[0,2]],"file":"0.bin"}]}"#;
    let scalar = r#"{"path":["s"],"kind":"scalar","dtype":"float64","shape":[],"value":-0.0,"shards":[]}"#;
    let want = dump("want", leaf, &[0x80, 0x01]);
    let differences = |got: &Path| compare_dumps(&want, got).differences.len();
    assert_eq!(differences(&dump("same", leaf, &[0x80, 0x01])), 0);
    assert_eq!(differences(&dump("byte", leaf, &[0x80, 0x02])), 1);
    assert_eq!(differences(&dump("short", leaf, &[0x80])), 1);
    for (old, new) in [
        (r#"["a",0]"#, r#"["a","0"]"#), // two differences: one missing, one too many
        (r#""array""#, r#""key""#),
        ("fnuz", "fn"),
        (r#""shape":[2]"#, r#""shape":[2,1]"#),
        ("[[0,2]]", "[[1,3]]"),
        (r#""device":0"#, r#""device":1"#),
    ] {
        let changed = dump("changed", &leaf.replacen(old, new, 1), &[0x80, 0x01]);
        assert!(differences(&changed) >= 1, "{old} -> {new} was not seen");
    }
    let want = dump("want-scalar", scalar, &[]);
    assert_eq!(compare_dumps(&want, &want).differences.len(), 0);
    let changed = dump("changed-scalar", &scalar.replace("-0.0", "0.0"), &[]);
    assert_eq!(compare_dumps(&want, &changed).differences.len(), 1);
    fs::remove_dir_all(&folder).expect("the scratch directory can be removed");
}

/// Any NaN is any NaN, of whatever width; zero keeps its sign.
#[test]
fn nan_is_a_class_and_zero_has_a_sign() {
    use support::dump::first_difference;
    let equal = |dtype, a: &[u8], b: &[u8]| first_difference(dtype, a, b).is_none();
    assert!(equal("bfloat16", &[0xc0, 0x7f], &[0xe0, 0xff]));
    assert!(!equal("bfloat16", &[0xc0, 0x7f], &[0x80, 0x7f]), "NaN is not infinity");
    assert!(equal("float8_e5m2", &[0x7d], &[0xff]) && !equal("float8_e5m2", &[0x7c], &[0x7d]));
    assert!(equal("float8_e3m4", &[0x71], &[0xf8]) && !equal("float8_e4m3fn", &[0x7e], &[0x7f]));
    assert!(!equal("float32", &0f32.to_le_bytes(), &(-0f32).to_le_bytes()));
    let complex = |re: f32, im: f32| [re.to_le_bytes(), im.to_le_bytes()].concat();
    assert!(equal("complex64", &complex(1.0, f32::NAN), &complex(1.0, -f32::NAN)));
    assert!(!equal("complex64", &complex(1.0, f32::NAN), &complex(2.0, f32::NAN)));
}
