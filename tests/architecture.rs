//! The shape of the code, read off the sources: who imports whom, who may touch the system, what may be unsafe or print,
//! and what a build without features pulls in. The order of the folders is the way of a byte through the library.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Modules that anything may use.
const LEAVES: [&str; 9] = ["dtype", "shape", "limits", "error", "keypath", "relpath", "need", "frame", "spec"];

/// Folders, each of which uses only those before it.
const FOLDERS: &[&str] =
    &["layout", "kv", "zarr", "plan", "io", "decode", "encode", "transform", "place", "tree", "training", "cli"];

/// What the crate's root re-exports from the leaf modules.
const ROOT_NAMES: [&str; 5] = ["Error", "ErrorKind", "Result", "DType", "CastPolicy"];

/// Imports against the order: the file, what it imports, and why it may.
const IMPORTS_ALLOWED: [(&str, &str, &str); 0] = [];

/// Folders that are told what the bytes are.
const WITHOUT_IO: [&str; 4] = ["layout", "kv", "zarr", "plan"];

const SYSTEM: [&str; 9] = [
    "std::fs",
    "std::net",
    "std::thread",
    "std::process",
    "std::os",
    "File::open",
    "std::io::stdin",
    "rustix",
    "rayon",
];

/// Files with `unsafe` code, and what for.
const UNSAFE_ALLOWED: &[(&str, &str)] = &[
    ("decode/huff/kernel.rs", "loads of a frame's bytes without a check, in a function compiled for some processors"),
    ("encode/context.rs", "libzstd is called through C: its safe binding has no sequence producers"),
    ("io/buffer.rs", "aligned memory, and memory that a caller lends"),
    ("io/cached.rs", "asking the kernel what it has cached: no library binds `cachestat`"),
    ("io/ring.rs", "slots outlive the locks on their memory"),
    ("io/uring/registered.rs", "the kernel is told of slots that it may write into"),
    ("io/uring/thread.rs", "the kernel writes into buffers that a read in flight owns"),
    ("place/absent.rs", "it has the signatures of what it stands for"),
    ("place/cuda/crossing.rs", "a copy in flight borrows memory until it was waited for"),
    ("place/cuda/delivery.rs", "copies and launches in flight borrow memory until they were waited for"),
    ("place/cuda/download.rs", "memory in flight"),
    ("place/cuda/driver.rs", "the driver is called through C"),
    ("place/cuda/gpu.rs", "memory in flight, and host memory that is locked"),
    ("place/cuda/lane.rs", "memory that is locked"),
    ("place/cuda/library.rs", "the driver's library is loaded, and asked what it drives"),
    ("place/cuda/measure.rs", "copies and launches in flight on memory of its own"),
    ("place/cudarc.rs", "slices over memory that is not theirs to free, or that nobody else frees"),
    ("place/device.rs", "device memory that the caller names"),
    ("transform/cpu/place.rs", "workers write disjoint elements of one shard"),
    ("transform/mod.rs", "executors write shards that others write too"),
    ("transform/cpu/wide.rs", "a function compiled for wider registers is called where they are"),
    ("tree/carry.rs", "devices are given slabs, and shards of a load that nobody has yet"),
    ("tree/cudarc.rs", "shards seen as slices of somebody else's type"),
    ("tree/inline.rs", "a load into a buffer of its own"),
    ("tree/land.rs", "the shards of a load are shared by its workers"),
    ("tree/save/gather.rs", "parts of arrays are read on their devices"),
    ("tree/lend.rs", "memory that a caller, or a state, lends to a load"),
    ("tree/shard.rs", "a shard that is complete is read on its device"),
    ("tree/warm.rs", "a unit is on its way to a device while the next is read"),
    ("tree/work.rs", "the shards of a load are shared by its workers"),
];

/// Crates that only features bring in.
const DENIED_WITHOUT_FEATURES: &[&str] = &[
    "clap",
    "clap_complete",
    "indicatif",
    "signal-hook",
    "tracing-subscriber",
    "tokio",
    "flate2",
    "bzip2",
    "lz4_flex",
    "snap",
    "libloading",
    "io-uring",
    "cudarc",
    "zarrs",
    "proptest",
    "loom",
];

/// A source file, path below `src`, without comments and without what only tests see.
struct Source {
    path: String,
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut sources = Vec::new();
    let mut waiting = vec![root.clone()];
    while let Some(dir) = waiting.pop() {
        let mut entries: Vec<PathBuf> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                waiting.push(path);
            } else if name.ends_with(".rs") {
                sources.push(Source { code: code(&fs::read_to_string(&path).unwrap()), path: name });
            }
        }
    }
    // Modules that stand behind `#[cfg(test)]` lie in files of their own.
    let only_tests: BTreeSet<String> = sources.iter().flat_map(test_modules).collect();
    let below = |path: &str| {
        only_tests.iter().any(|test| path == format!("{test}.rs") || path.starts_with(&format!("{test}/")))
    };
    sources.retain(|source| !below(&source.path));
    sources.iter_mut().for_each(|source| source.code = without_tests(&source.code));
    assert!(sources.len() > 50, "only {} sources were found", sources.len());
    sources
}

/// Lines without comments. String literals with `//` in them are cut short, which hides nothing that is looked for.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The modules, as paths without ending, that a file declares behind `#[cfg(test)]`.
fn test_modules(source: &Source) -> Vec<String> {
    let dir = match source.path.strip_suffix("/mod.rs") {
        Some(dir) => format!("{dir}/"),
        None if source.path == "lib.rs" => String::new(),
        None => format!("{}/", source.path.trim_end_matches(".rs")),
    };
    let lines: Vec<&str> = source.code.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let module = |pair: &[&str]| {
        let name = pair[1].split_once("mod ")?.1.strip_suffix(';')?;
        only_tests_see(pair[0]).then(|| format!("{dir}{name}"))
    };
    lines.windows(2).filter_map(module).collect()
}

fn only_tests_see(line: &str) -> bool {
    ["#[cfg(test)]", "#[cfg(all(test, ", "#[cfg(any(test, fuzzing))]"].iter().any(|start| line.starts_with(start))
}

/// Cuts out the blocks behind `#[cfg(test)]`: from the attribute to the line that closes it at its own indentation.
fn without_tests(code: &str) -> String {
    let mut kept = Vec::new();
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        if !only_tests_see(line.trim_start()) {
            kept.push(line);
            continue;
        }
        let indentation = &line[..line.len() - line.trim_start().len()];
        for line in lines.by_ref() {
            let ends = line.trim_end();
            if ends == format!("{indentation}}}")
                || (ends.ends_with(';') && !ends.starts_with(&format!("{indentation} ")))
            {
                break;
            }
        }
    }
    kept.join("\n")
}

/// The first elements of all `crate::..` paths, groups taken apart.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let name =
            |text: &str| text.chars().take_while(|char| char.is_alphanumeric() || *char == '_').collect::<String>();
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(name(rest));
            continue;
        };
        let mut depth = 0;
        let mut element = String::new();
        for char in group.chars() {
            match char {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    found.insert(name(element.trim()));
                    element.clear();
                    continue;
                }
                _ => {}
            }
            element.push(char);
        }
        found.insert(name(element.trim()));
    }
    found.remove("");
    found
}

fn folder(path: &str) -> &str {
    path.split_once('/').map_or_else(|| path.trim_end_matches(".rs"), |(folder, _)| folder)
}

#[test]
fn folders_import_only_what_lies_before_them() {
    let mut count = 0;
    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    for source in sources() {
        let own = folder(&source.path);
        if matches!(own, "lib" | "bin") {
            continue;
        }
        let place = FOLDERS.iter().position(|folder| *folder == own);
        assert!(place.is_some() || LEAVES.contains(&own), "{}: a folder that the design does not know", source.path);
        for name in imports(&source.code) {
            count += 1;
            let known = FOLDERS.iter().position(|folder| *folder == name);
            let fits = match (place, known) {
                _ if LEAVES.contains(&name.as_str()) || ROOT_NAMES.contains(&name.as_str()) => true,
                (Some(own), Some(other)) => other <= own,
                _ => false,
            };
            let allowed = IMPORTS_ALLOWED.iter().position(|(path, import, _)| *path == source.path && *import == name);
            used.extend(allowed);
            if !fits && allowed.is_none() {
                wrong.push(format!("{} imports {name}", source.path));
            }
        }
    }
    println!("{count} imports checked");
    assert!(count > 100, "the sources import nothing that was recognised");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(used.len(), IMPORTS_ALLOWED.len(), "an allowance is not needed any more");
}

#[test]
fn what_is_told_the_bytes_never_touches_the_system() {
    let sources = sources();
    let pure: Vec<&Source> = sources.iter().filter(|source| WITHOUT_IO.contains(&folder(&source.path))).collect();
    println!("{} files without I/O checked", pure.len());
    assert!(pure.len() > 30);
    let wrong: Vec<String> = pure
        .iter()
        .flat_map(|source| {
            SYSTEM.iter().filter(|word| source.code.contains(**word)).map(|word| format!("{}: {word}", source.path))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The same words are found where I/O is at home, so the search works.
    assert!(sources.iter().any(|source| folder(&source.path) == "io" && source.code.contains("std::fs")));
}

#[test]
fn unsafe_code_stands_only_where_the_list_says() {
    let is_unsafe = |source: &Source| {
        let words = source.code.split(|char: char| !(char.is_alphanumeric() || char == '_'));
        words.into_iter().any(|word| word == "unsafe")
    };
    let have: BTreeSet<String> = sources().into_iter().filter(is_unsafe).map(|source| source.path).collect();
    let listed: BTreeSet<String> = UNSAFE_ALLOWED.iter().map(|(path, _)| (*path).to_owned()).collect();
    println!("{} files with unsafe code", have.len());
    assert_eq!(have, listed);
}

#[test]
fn only_the_command_line_prints() {
    let prints = |source: &Source| {
        let macros = ["println!", "eprintln!", "print!(", "dbg!(", "std::io::stdout", "std::io::stderr"];
        macros.iter().any(|print| source.code.contains(print))
    };
    let (cli, others): (Vec<Source>, Vec<Source>) =
        sources().into_iter().filter(prints).partition(|source| source.path.starts_with("cli/"));
    assert!(!cli.is_empty(), "the search found not even the command line");
    let others: Vec<String> = others.into_iter().map(|source| source.path).collect();
    assert!(others.is_empty(), "{others:?}");
}

#[test]
fn a_build_without_features_needs_no_crate_of_a_feature() {
    let tree = |features: &[&str]| {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--offline", "--locked", "-e", "normal", "--prefix", "none", "--format", "{p}"])
            .args(features)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("cargo prints text");
        text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect::<BTreeSet<String>>()
    };
    let none = tree(&["--no-default-features"]);
    println!("{} crates without features", none.len());
    assert!(none.contains("touchdown") && none.contains("zstd"), "{none:?}");
    let found: Vec<&&str> = DENIED_WITHOUT_FEATURES.iter().filter(|name| none.contains(**name)).collect();
    assert!(found.is_empty(), "{found:?}");
    assert!(none.len() <= 60, "{} crates: {none:?}", none.len());
    // The names are spelt as cargo spells them: with the program's features all but these are there.
    let all = tree(&["--features", "cli"]);
    let absent: Vec<&&str> = DENIED_WITHOUT_FEATURES.iter().filter(|name| !all.contains(**name)).collect();
    assert_eq!(absent, [&"tokio", &"cudarc", &"zarrs", &"proptest", &"loom"]);
}

/// Names and values of `src/limits.rs` stand in SECURITY.md, and no others.
#[test]
fn the_list_of_limits_is_that_of_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = fs::read_to_string(root.join("src/limits.rs")).unwrap();
    let constants = source.split("pub const ").skip(1).map(|rest| {
        let (name, rest) = rest.split_once(':').unwrap();
        let value = rest.split_once(" = ").unwrap().1.split_once(';').unwrap().0;
        format!("| `{name}` | `{value}` |")
    });
    let constants: BTreeSet<String> = constants.collect();
    let text = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let rows: BTreeSet<String> =
        rows.map(|line| line.splitn(4, '|').take(3).collect::<Vec<_>>().join("|") + "|").collect();
    let missing: Vec<&String> = constants.difference(&rows).collect();
    let outdated: Vec<&String> = rows.difference(&constants).collect();
    assert!(
        missing.is_empty() && outdated.is_empty(),
        "SECURITY.md lacks {missing:#?} and should not have {outdated:#?}"
    );
    assert!(constants.len() > 50, "hardly any limits were found");
}
