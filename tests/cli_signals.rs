//! SIGINT and SIGTERM while `seal` and `repair` are at work: the exit code says which one it was, and nothing is left. (`convert` is in
//! `cli_convert.rs`, verbs that only read are in `cli.rs`.)

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests fail by panicking, and say when they install something"
)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::ask::{ok, text};
use support::{copy_tree, files_below, fixture, program, scratch};
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::zarr::Compression;

const SIGNALS: [(&str, i32); 2] = [("INT", 130), ("TERM", 143)];

/// Every file below a directory, with its length.
fn files(dir: &Path) -> BTreeMap<PathBuf, u64> {
    files_below(dir).into_iter().map(|path| (path.clone(), fs::metadata(path).unwrap().len())).collect()
}

fn start(args: &[&str]) -> Child {
    program(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Sends a signal; the exit code.
fn interrupt(mut child: Child, signal: &str) -> Option<i32> {
    assert!(Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success());
    child.wait().unwrap().code()
}

#[test]
fn a_repair_that_is_interrupted_leaves_nothing() {
    let folder = scratch("cli-signals-repair");
    let (from, to) = (folder.join("from"), folder.join("to"));
    copy_tree(&fixture("v0_unmerged").join("ckpt"), &from);
    // It copies what it does not know, too: this takes long enough to be met in the middle.
    File::create(from.join("notes")).unwrap().set_len(4 << 30).unwrap();
    let before = files(&folder);
    for (signal, code) in SIGNALS {
        let child = start(&["repair", &text(&from), &text(&to)]);
        let begun = Instant::now();
        while files(&folder).values().sum::<u64>() <= (4 << 30) + (1 << 20) {
            assert!(begun.elapsed() < Duration::from_secs(60), "nothing is copied");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(interrupt(child, signal), Some(code), "SIG{signal}");
        assert!(files(&folder) == before, "SIG{signal}: {:?}", files(&folder));
    }
    fs::remove_file(from.join("notes")).unwrap();
    ok(&["repair", &text(&from), &text(&to)]);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_seal_that_is_interrupted_writes_nothing() {
    let folder = scratch("cli-signals-seal");
    let path = folder.join("c");
    // Small to write, and long to decode.
    let tree = Tree::new().with("w", NewArray::new(&[1 << 30], touchdown::DType::UInt8, vec![7; 1 << 30]));
    let leaf = LeafOptions { compression: Some(Compression::Zstd { level: 1 }), ..LeafOptions::default() };
    touchdown::save(&path, &tree, &SaveOptions { leaf, ..SaveOptions::default() }).unwrap();
    drop(tree);
    for (signal, code) in SIGNALS {
        // A machine that is fast, or busy elsewhere, may have done it by then: earlier next time.
        let met = [80, 40, 20, 10, 5, 2].into_iter().find(|wait| {
            let copy = folder.join(format!("{signal}-{wait}"));
            copy_tree(&path, &copy);
            let before = files(&copy);
            let child = start(&["seal", &text(&copy), "--threads", "1"]);
            std::thread::sleep(Duration::from_millis(*wait));
            // Before the program listens, a signal ends it as the system does.
            let met = interrupt(child, signal) == Some(code);
            assert!(!met || files(&copy) == before, "SIG{signal}: {:?}", files(&copy));
            met
        });
        assert!(met.is_some(), "SIG{signal} never met it at work");
    }
    ok(&["seal", &text(&path)]);
    ok(&["verify", &text(&path), "--deep"]);
    fs::remove_dir_all(&folder).unwrap();
}

/// Sends a signal as soon as something is so; the exit code, and whether it was so while the program ran.
fn interrupt_when(mut child: Child, signal: &str, met: impl Fn() -> bool) -> (Option<i32>, bool) {
    loop {
        if met() {
            return (interrupt(child, signal), true);
        }
        if let Some(status) = child.try_wait().unwrap() {
            return (status.code(), false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_dump_that_is_interrupted_leaves_nothing() {
    let folder = scratch("cli-signals-dump");
    let path = folder.join("c");
    let array = || NewArray::new(&[64 << 20], touchdown::DType::UInt8, vec![7; 64 << 20]);
    let tree = (0..16).fold(Tree::new(), |tree, n| tree.with(format!("w{n:02}").as_str(), array()));
    touchdown::save(&path, &tree, &SaveOptions::default()).unwrap();
    drop(tree);
    for (signal, code) in SIGNALS {
        let ended = (0..5).any(|attempt| {
            let out = folder.join(format!("{signal}-{attempt}"));
            let child = start(&["load", &text(&path), "--dump", &text(&out)]);
            let (found, met) = interrupt_when(child, signal, || out.join("0.0.bin").exists());
            // One that was too fast is whole.
            let is_whole = found == Some(0) && out.join("dump.json").exists();
            assert!(
                is_whole || met && found == Some(code) && !out.exists(),
                "SIG{signal}: {found:?} {:?}",
                files(&out)
            );
            found == Some(code)
        });
        assert!(ended, "SIG{signal} never met it at work");
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn pruning_that_is_interrupted_ends_between_two_steps() {
    let folder = scratch("cli-signals-prune");
    let steps = |root: &Path| -> Vec<String> {
        let entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        // The lock is held while there is somebody who holds it.
        let rest = ["0", "5", "_ROOT_METADATA", ".touchdown-lock"];
        entries.filter(|name| !rest.contains(&name.as_str())).collect()
    };
    for (signal, code) in SIGNALS {
        let root = folder.join(signal);
        copy_tree(&fixture("v1_training_steps").join("ckpt"), &root);
        let one = root.join("10");
        // Long enough to be met in the middle.
        (100..400).for_each(|step| copy_tree(&one, &root.join(step.to_string())));
        let before = steps(&root).len();
        let child = start(&["prune", &text(&root), "--keep-latest", "1"]);
        let (found, met) = interrupt_when(child, signal, || steps(&root).len() + 2 < before);
        assert!(met && found == Some(code), "SIG{signal}: {found:?}");
        let left = steps(&root);
        assert!(left.len() > 1 && left.iter().all(|name| name.parse::<u64>().is_ok()), "SIG{signal}: {left:?}");
        ok(&["verify", &text(&root), "--deep"]);
    }
    fs::remove_dir_all(&folder).unwrap();
}
