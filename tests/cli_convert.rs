//! The command line's contract of `convert`: fields, refusals, exit codes, signals. What comes out is judged by
//! `convert_orbax`, and by `convert` through the library.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests fail by panicking, and say when they install something"
)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use support::ask::{checkpoint, has_all, object, ok, refused, row, safetensors, text};
use support::{program, scratch};

#[test]
fn no_item_stays_behind_unless_one_is_named() {
    let folder = scratch("cli-convert-items");
    let (from, to) = (checkpoint("v1_checkpointables"), text(&folder.join("a")));
    for form in ["orbax", "safetensors"] {
        let error = refused(2, &["convert", &from, &to, "--to", form, "--quiet"]);
        assert!(error.contains("extra") && error.contains("--item state"), "{error}");
        let report = object(&["convert", &from, &to, "--to", form, "--item", "state", "--overwrite", "--json"]);
        assert!(report["other_items"].as_array().unwrap().contains(&json!("extra")), "{report}");
        fs::remove_dir_all(&to).unwrap();
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn every_field_of_the_report_is_there() {
    let folder = scratch("cli-convert");
    let to = text(&folder.join("a"));
    let report = object(&["convert", &checkpoint("quickstart"), &to, "--to", "orbax", "--json"]);
    let fields = [
        ("seconds", "number"),
        ("leaves", "number"),
        ("bytes_logical", "number"),
        ("bytes_resumed", "number"),
        ("bytes_read", "number"),
        ("bytes_decoded", "number"),
        ("bytes_stored", "number"),
        ("peak_host_bytes", "number"),
        ("waves", "number"),
        ("arrays_in_ranges", "number"),
        ("arrays_through_scratch", "number"),
        ("lossy", "object"),
        ("skipped", "list"),
        ("missing", "list"),
        ("other_items", "list"),
    ];
    has_all(&report, &fields);
    assert!(report["bytes_logical"].as_u64() > Some(0) && report["seconds"].as_f64() > Some(0.0), "{report}");
    ok(&["diff", &checkpoint("quickstart"), &to]);
    // As text, and with an item left behind.
    let other = text(&folder.join("b"));
    let shown = ok(&["convert", &checkpoint("v1_checkpointables"), &other, "--to", "orbax", "--item", "extra"]);
    assert!(shown.contains("leaves") && shown.contains("stored"), "{shown}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn selection_renames_casts_and_divisions_are_those_of_a_load() {
    let folder = scratch("cli-convert-rules");
    let to = text(&folder.join("a"));
    let report = object(&[
        "convert",
        &checkpoint("quickstart"),
        &to,
        "--to",
        "orbax",
        "--skip",
        "opt_state/**",
        "--cast",
        "**@float=bfloat16",
        "--rename",
        "^params/(.*)$=$1",
        "--transpose",
        "**/kernel=1,0",
        "--mesh",
        "data=2,model=4",
        "--spec",
        "**/kernel=model",
        "--zarr",
        "2",
        "--no-ocdbt",
        "--compression",
        "zstd:3",
        "--json",
    ]);
    assert!(!report["skipped"].as_array().unwrap().is_empty(), "{report}");
    let listed = object(&["ls", &to, "--json"]);
    let kernel = row(&listed, "layer_0/kernel");
    assert_eq!(kernel["dtype"], "bfloat16");
    assert_eq!(kernel["spec"][0], json!("model"));
    let (shape, chunk) = (&kernel["shape"], &kernel["chunk_shape"]);
    assert_eq!(shape[0].as_u64().unwrap(), chunk[0].as_u64().unwrap() * 4, "{kernel}");
    assert_eq!(listed["mesh"], json!({"axes": ["data", "model"], "shape": [2, 4]}));
    assert!(Path::new(&to).join("state/layer_0.kernel/.zarray").exists());
    ok(&["verify", &to, "--deep"]);
    // A target file, too: one leaf that is made of others.
    let file = text(&folder.join("target.json"));
    fs::write(&file, json!({"schema": 1, "leaves": [{"path": ["all"], "view": {"stack": {"of": [["layer_0", "kernel"], ["layer_1", "kernel"]], "dim": 0}}}]}).to_string()).unwrap();
    let stacked = text(&folder.join("stacked.safetensors"));
    ok(&["convert", &to, &stacked, "--to", "safetensors", "--target", &file]);
    let listed = object(&["ls", &stacked, "--json"]);
    assert_eq!(row(&listed, "all")["shape"][0], 2);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_written() {
    let folder = scratch("cli-convert-refused");
    let (from, to) = (checkpoint("quickstart"), text(&folder.join("a")));
    let tensors = text(&folder.join("a.safetensors"));
    let base = ["convert", from.as_str(), to.as_str(), "--to", "orbax"];
    let with = |more: &[&'static str]| [&base[..], more].concat();
    assert!(refused(2, &with(&["--skip", "nothing"])).contains("nothing"));
    assert!(refused(2, &with(&["--compression", "lz4"])).contains("zstd:LEVEL"));
    refused(2, &with(&["--zarr", "1"]));
    assert!(
        refused(2, &with(&["--zarr", "2", "--compression", "none", "--checksum", "on"]))
            .contains("cannot carry checksums")
    );
    assert!(refused(2, &with(&["--spec", "**=x"])).contains("--mesh"));
    refused(2, &with(&["--mesh", "x=0"]));
    refused(2, &with(&["--mesh", "x=99999999999"]));
    assert!(refused(2, &with(&["--max-shard-bytes", "1GB"])).contains("--max-shard-bytes means nothing"));
    assert!(refused(2, &with(&["--memory", "1kB"])).contains("--memory"));
    let foreign = ["convert", &from, &tensors, "--to", "safetensors", "--zarr", "2", "--no-ocdbt"];
    assert!(refused(2, &foreign).contains("--zarr, --no-ocdbt mean"), "plural");
    // Both rules that do not fit are in one error.
    let both = refused(2, &with(&["--skip", "nothing", "--cast", "**=float99"]));
    assert!(both.contains("nothing") && both.contains("float99"), "{both}");
    refused(3, &["convert", "nowhere", &to, "--to", "orbax"]);
    // What safetensors cannot hold is named, all of it.
    let odd = refused(2, &["convert", &checkpoint("v1_nested"), &to, "--to", "safetensors", "--cast", "**=int4"]);
    assert!(odd.contains("int4") && odd.contains("hint:"), "{odd}");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "nothing was written");
    // What exists stays, unless it may be replaced.
    ok(&with(&[]));
    let again = refused(2, &with(&["--only", "params/**"]));
    assert!(again.contains("exists") && again.contains("--overwrite"), "{again}");
    ok(&["diff", &from, &to]);
    ok(&with(&["--only", "params/**", "--overwrite"]));
    refused_diff(&from, &to);
    fs::remove_dir_all(&folder).unwrap();
}

#[track_caller]
fn refused_diff(one: &str, other: &str) {
    assert_eq!(support::touchdown(["diff", one, other]).code, Some(1));
}

/// A file of noise, and so little memory that converting it takes many waves, each of which is synced.
fn slow(folder: &Path) -> (String, Vec<&'static str>) {
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 59) as u8
    })
    .take(192 << 20)
    .collect();
    let file = folder.join("slow.safetensors");
    let parts: Vec<(String, &[u8])> =
        noise.chunks(1 << 20).enumerate().map(|(n, part)| (format!("w{n}"), part)).collect();
    let tensors: Vec<(&str, &str, &[u64], &[u8])> =
        parts.iter().map(|(name, part)| (name.as_str(), "U8", &[1 << 20][..], *part)).collect();
    safetensors(&file, &tensors);
    (text(&file), vec!["--to", "orbax", "--memory", "32MiB", "--threads", "1"])
}

fn staged(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| text(path).contains("-tmp-touchdown-")).collect()
}

/// Waits until a conversion has finished some arrays, and sends the signal.
fn interrupt(child: &mut Child, folder: &Path, signal: &str) -> Option<i32> {
    let start = Instant::now();
    let noted = || {
        let journals =
            staged(folder).into_iter().map(|dir| fs::read(dir.join(".touchdown-convert")).unwrap_or_default());
        journals.map(|journal| journal.iter().filter(|byte| **byte == b'\n').count()).max().unwrap_or(0)
    };
    while noted() < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be interrupted");
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was converted");
        std::thread::sleep(Duration::from_millis(2));
    }
    let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    child.wait().unwrap().code()
}

#[test]
fn a_signal_cleans_up_or_leaves_what_the_next_one_goes_on_with() {
    let folder = scratch("cli-convert-signals");
    let (from, flags) = slow(&folder);
    let to = text(&folder.join("to"));
    let args = |more: &[&'static str]| [&["convert", from.as_str(), to.as_str()], &flags[..], more].concat();
    let start =
        |more| program(args(more)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        assert_eq!(interrupt(&mut start(&[]), &folder, signal), Some(code), "SIG{signal}");
        assert!(staged(&folder).is_empty() && !Path::new(&to).exists(), "SIG{signal}: something is left");
    }
    // One that may be gone on with is killed the hard way; only the same conversion goes on.
    assert_eq!(interrupt(&mut start(&["--resume"]), &folder, "KILL"), None);
    assert_eq!(staged(&folder).len(), 1);
    let left = ok(&["doctor", &text(&folder)]);
    assert!(left.contains("left over"), "{left}");
    let other = refused(2, &args(&["--resume", "--zarr", "2"]));
    assert!(other.contains("what is written: not the same"), "{other}");
    let report = object(&args(&["--resume", "--json"]));
    assert!(report["bytes_resumed"].as_u64() >= Some(2 << 20), "{report}");
    assert!(staged(&folder).is_empty());
    ok(&["diff", &from, &to]);
    fs::remove_dir_all(&folder).unwrap();
}
