//! Damage of one array: the others are told and read all the same, and what is told of it cannot pass for anything else.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests fail by panicking, and say when they install something"
)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::ask::{object, ok, parsed, paths, refused, text};
use support::{scratch, touchdown};
use touchdown::tree::save::{NewArray, SaveOptions, Tree};
use touchdown::zarr::Format;

const NAMES: [&str; 6] = ["absent", "fifo", "intact", "large", "link", "other"];

/// Saves arrays without checksums.
fn save(path: &Path, names: &[&str], options: SaveOptions) {
    let array = |n: usize| NewArray::from_vec(&[64, 1024], vec![n as f32; 64 << 10]);
    let tree = names.iter().enumerate().fold(Tree::new(), |tree, (n, name)| tree.with(*name, array(n)));
    let options = SaveOptions { checksum: Some(false), sync: false, ..options };
    touchdown::save(path, &tree, &options).unwrap();
}

fn problems(path: &Path) -> (Value, Vec<(String, String)>) {
    let run = touchdown(["verify", "--deep", "--json", &text(path)]);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    let found = parsed(&run.stdout);
    let text = |problem: &Value, field: &str| problem[field].as_str().unwrap_or_default().to_owned();
    let problems = found["problems"].as_array().unwrap().iter();
    let problems = problems.map(|problem| (text(problem, "leaf"), text(problem, "file"))).collect();
    (found, problems)
}

#[test]
fn bad_metadata_of_arrays_hides_none_of_the_others() {
    for (zarr, meta) in [(Format::V3, "zarr.json"), (Format::V2, ".zarray")] {
        let folder = scratch(&format!("cli-damage-{meta}"));
        let (path, outside) = (folder.join("c"), folder.join("outside"));
        save(&path, &NAMES, SaveOptions { ocdbt: false, zarr, ..SaveOptions::default() });
        let file = |name: &str| path.join("state").join(name).join(meta);
        fs::copy(file("intact"), &outside).unwrap();
        for name in ["absent", "fifo", "link"] {
            fs::remove_file(file(name)).unwrap();
        }
        symlink(&outside, file("link")).unwrap();
        assert!(Command::new("mkfifo").arg(file("fifo")).status().unwrap().success());
        fs::File::options().write(true).open(file("large")).unwrap().set_len(1 << 40).unwrap();
        let (found, problems) = problems(&path);
        assert_eq!((&found["leaves"], &found["chunks"]), (&6.into(), &2.into()), "{found}");
        let leaves: Vec<&str> = problems.iter().map(|(leaf, _)| leaf.as_str()).collect();
        assert_eq!(leaves, ["absent", "fifo", "large", "link"]);
        let named = problems.iter().filter(|(leaf, file)| file.ends_with(&format!("state/{leaf}/{meta}")));
        assert_eq!(named.count(), 3, "{problems:?}");
        assert_eq!(paths(&object(&["ls", &text(&path), "--json"])), NAMES);
        let mut skip = vec!["load".to_owned(), text(&path)];
        for name in ["absent", "fifo", "large", "link"] {
            skip.extend(["--skip".to_owned(), name.to_owned()]);
        }
        ok(&skip.iter().map(String::as_str).collect::<Vec<_>>());
        let error = refused(3, &["load", &text(&path)]);
        assert!(["absent", "fifo", "large", "link"].iter().all(|name| error.contains(name)), "{error}");
        fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn a_lost_data_file_takes_only_the_arrays_in_it() {
    let folder = scratch("cli-damage-data-file");
    let path = folder.join("c");
    let data_file_bytes = 1;
    save(&path, &NAMES, SaveOptions { data_file_bytes, zarr: Format::V2, ..SaveOptions::default() });
    let files: Vec<_> = fs::read_dir(path.join("state/d")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let mut told = BTreeSet::new();
    for file in files {
        let aside = folder.join("aside");
        fs::rename(&file, &aside).unwrap();
        let (found, problems) = problems(&path);
        // Without the nodes of the database there are no leaves.
        if found["leaves"] == 6 {
            assert!(problems.len() < 3, "{found}");
            told.extend(problems.into_iter().map(|(leaf, _)| leaf));
        }
        fs::rename(&aside, &file).unwrap();
    }
    assert!(told.len() > 2, "{told:?}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn names_forge_no_lines_and_drive_no_terminal() {
    let folder = scratch("cli-damage-names");
    let path = folder.join("c");
    let name = "x\nerror: forged\nhint: rm\x1b[31m\r";
    save(&path, &["a", name], SaveOptions { ocdbt: false, ..SaveOptions::default() });
    fs::remove_file(path.join("state").join(name).join("zarr.json")).unwrap();
    let controls = |text: &str| text.contains(|char: char| char.is_control() && char != '\n');
    let run = touchdown(["verify", &text(&path)]);
    assert_eq!((run.code, run.stdout.lines().count(), controls(&run.stdout)), (Some(1), 2, false), "{}", run.stdout);
    let run = touchdown(["load", &text(&path), "--quiet"]);
    let begins = |start: &str| run.stderr.lines().filter(|line| line.starts_with(start)).count();
    assert_eq!((run.code, begins("error:"), begins("hint:")), (Some(3), 1, 1), "{}", run.stderr);
    assert!(!controls(&run.stderr) && run.stderr.contains("forged"), "{}", run.stderr);
    fs::remove_dir_all(&folder).unwrap();
}
