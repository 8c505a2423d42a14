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
use std::process::{Command, Stdio};

use serde_json::Value;
use support::ask::{object, ok, parsed, paths, refused, text};
use support::{scratch, touchdown};
use touchdown::tree::save::{NewArray, SaveOptions, Tree};
use touchdown::zarr::shard::encode_index;
use touchdown::zarr::{Compression, Endian, Format};

const NAMES: [&str; 6] = ["absent", "fifo", "intact", "large", "link", "other"];

/// Saves arrays without checksums.
fn save(path: &Path, names: &[&str], options: SaveOptions) {
    let array = |n: usize| NewArray::from_vec(&[64, 1024], vec![n as f32; 64 << 10]);
    let tree = names.iter().enumerate().fold(Tree::new(), |tree, (n, name)| tree.with(*name, array(n)));
    let options = SaveOptions { checksum: Some(false), sync: false, ..options };
    touchdown::save(path, &tree, &options).unwrap();
}

/// The metadata of an array of bytes that is one chunk.
fn bytes_in_one_chunk(shape: &str, codecs: &str) -> String {
    format!(
        r#"{{"zarr_format":3,"node_type":"array","shape":[{shape}],"data_type":"uint8","chunk_grid":{{"name":"regular","configuration":{{"chunk_shape":[{shape}]}}}},"chunk_key_encoding":{{"name":"default"}},"fill_value":0,"codecs":[{codecs}]}}"#
    )
}

/// The codec of shards with inner chunks of this shape and these codecs.
fn sharded(inner_shape: &str, codecs: &str) -> String {
    format!(
        r#"{{"name":"sharding_indexed","configuration":{{"chunk_shape":[{inner_shape}],"codecs":[{codecs}],"index_codecs":[{{"name":"bytes","configuration":{{"endian":"little"}}}},{{"name":"crc32c"}}]}}}}"#
    )
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

/// Each takes bytes that cost next to nothing; before, each cost a hang, gigabytes or a panic.
#[test]
fn small_files_cost_little() {
    let folder = scratch("cli-small-files");
    // Links that lead back, below an array of many dimensions.
    let array = folder.join("links/a");
    fs::create_dir_all(&array).unwrap();
    let ones = vec!["1"; 31].join(",");
    fs::write(array.join("zarr.json"), bytes_in_one_chunk(&ones, r#"{"name":"bytes"}"#)).unwrap();
    symlink(".", array.join("l0")).unwrap();
    symlink(".", array.join("l1")).unwrap();
    let run = touchdown(["verify", &text(&folder.join("links"))]);
    assert!(matches!(run.code, Some(0 | 1 | 3)), "{:?}: {}", run.code, run.stderr);
    // Names as long as a format's width, and with control characters.
    let names = ["n".repeat(1 << 16), "\u{1b}[31mred\nforged".to_owned()];
    let entry = |(number, name): (usize, &String)| {
        let offsets = [number * 4, number * 4 + 4];
        (name.clone(), serde_json::json!({"dtype": "F32", "shape": [1], "data_offsets": offsets}))
    };
    let header = Value::Object(names.iter().enumerate().map(entry).collect()).to_string().into_bytes();
    let file = folder.join("names.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &[0; 8]].concat();
    fs::write(&file, bytes).unwrap();
    let run = touchdown(["plan", &text(&file)]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let said = &run.stdout;
    assert!(!said.contains('\u{1b}') && !said.lines().any(|line| line.starts_with("forged")));
    // Pieces of an array, one byte each.
    let piece = |number: usize| {
        let name = number.to_string();
        let key = [&[0xa0 | name.len() as u8][..], name.as_bytes()].concat();
        [key, vec![0xc7, 9, 1, 0x93, 0x91, 1, 0xa5, b'u', b'i', b'n', b't', b'8'], vec![0xc4, 1, 7]].concat()
    };
    // The length of the extension counts what follows its type.
    let mut pieces: Vec<u8> = vec![0xdf, 0, 1, 0, 0];
    for number in 0..1 << 16 {
        let mut one = piece(number);
        let at = one.iter().position(|byte| *byte == 0xc7).unwrap();
        one[at + 1] = u8::try_from(one.len() - at - 3).unwrap();
        pieces.extend(one);
    }
    let string = |text: &str| [&[0xd9, text.len() as u8][..], text.as_bytes()].concat();
    let mut file = vec![0x81, 0xa1, b'a', 0x83];
    file.extend([string("__msgpack_chunked_array__"), vec![0xc3], string("shape"), vec![0x81, 0xa1, b'0']].concat());
    file.extend([&[0xce][..], &(1u32 << 16).to_be_bytes(), &string("chunks"), &pieces].concat());
    let path = folder.join("msgpack");
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("checkpoint"), file).unwrap();
    let run = touchdown(["ls", &text(&path)]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    fs::remove_dir_all(&folder).unwrap();
}

/// The answer is no, whether or not somebody reads why.
#[test]
fn a_closed_pipe_is_no_good_news() {
    let folder = scratch("cli-closed-pipe");
    let path = folder.join("c");
    save(&path, &NAMES[2..3], SaveOptions { ocdbt: false, ..SaveOptions::default() });
    fs::remove_file(path.join("state/intact/zarr.json")).unwrap();
    let mut verifying = Command::new(env!("CARGO_BIN_EXE_touchdown"))
        .args(["verify", &text(&path), "--deep"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(verifying.stdout.take());
    assert_eq!(verifying.wait().unwrap().code(), Some(1));
    fs::remove_dir_all(&folder).unwrap();
}

/// A file that may not grow is an error of the write, not the end of the program.
#[test]
fn a_limit_on_files_is_an_error_and_leaves_nothing() {
    let folder = scratch("cli-file-limit");
    let (path, out) = (folder.join("c"), folder.join("out"));
    save(&path, &NAMES, SaveOptions::default());
    let verbs = [
        format!("load {} --dump {}", text(&path), text(&out)),
        format!("convert {} {} --to safetensors", text(&path), text(&out)),
    ];
    for verb in verbs {
        let script = format!("ulimit -f 1; exec {} {verb}", env!("CARGO_BIN_EXE_touchdown"));
        let run = Command::new("bash").args(["-c", &script]).output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.code() == Some(4) && said.contains("error:"), "{verb}: {:?}: {said}", run.status);
        assert!(!out.exists() || fs::read_dir(&out).unwrap().count() == 0, "{verb}");
    }
    fs::remove_dir_all(&folder).unwrap();
}

/// A shard of 32,768 inner chunks of 16 MiB, all of which are one frame of zeros: `verify` decodes it once, `seal` reads it once. One that
/// reaches into another is damage.
#[test]
fn what_chunks_share_is_looked_at_once() {
    const INNER: usize = 32_768;
    let folder = scratch("cli-shared-chunks");
    let array = folder.join("c/a");
    fs::create_dir_all(array.join("c/0")).unwrap();
    let zstd = r#"{"name":"bytes"},{"name":"zstd","configuration":{"level":1,"checksum":false}}"#;
    let codecs = sharded("1,16777216", zstd);
    fs::write(array.join("zarr.json"), bytes_in_one_chunk(&format!("{INNER},16777216"), &codecs)).unwrap();
    let frame = zstd::encode_all(&vec![0; 16 << 20][..], 1).unwrap();
    let write = |places: &[Option<(u64, u64)>]| {
        let mut value = [&frame[..], &frame[..]].concat();
        value.extend(encode_index(places, Endian::Little, true).unwrap());
        fs::write(array.join("c/0/0"), value).unwrap();
    };
    let len = frame.len() as u64;
    let mut places = vec![Some((len, len)); INNER];
    write(&places);
    let path = folder.join("c");
    let found = object(&["verify", "--deep", "--json", &text(&path)]);
    assert_eq!((&found["chunks"], &found["problems"]), (&INNER.into(), &Value::Array(Vec::new())), "{found}");
    ok(&["seal", &text(&path)]);
    object(&["verify", "--deep", "--json", &text(&path)]);
    fs::remove_file(path.join("_touchdown_sums.json")).unwrap();
    places[5] = Some((len - 1, len));
    places[7] = Some((0, 2 * len));
    write(&places);
    let (found, problems) = problems(&path);
    assert!(!problems.is_empty() && found.to_string().contains("shares bytes with another"), "{found}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn cat_says_what_no_checksum_could_tell() {
    let folder = scratch("cli-cat-unverified");
    let path = folder.join("c");
    let tree = Tree::new().with("w", NewArray::from_vec(&[4, 3 << 20], vec![1.0_f32; 12 << 20]));
    let mut options = SaveOptions { checksum: Some(false), sync: false, zarr: Format::V2, ..SaveOptions::default() };
    options.leaf.compression = Some(Compression::None);
    touchdown::save(&path, &tree, &options).unwrap();
    ok(&["seal", &text(&path)]);
    let cat = |args: &[&str]| touchdown([&["cat", &text(&path), "w", "--slice", "2,0:4"], args].concat());
    let note = "`--verify full` reads chunks whole and compares them";
    for (args, told) in
        [(&[][..], true), (&["--quiet"], false), (&["--verify", "off"], false), (&["--verify", "full"], false)]
    {
        let run = cat(args);
        assert_eq!((run.code, run.stdout.as_str()), (Some(0), "[1.0 1.0 1.0 1.0]\n"), "{}", run.stderr);
        assert_eq!(run.stderr.contains(note), told, "{args:?}: {}", run.stderr);
    }
    fs::remove_dir_all(&folder).unwrap();
}

/// Four shards in one another, all of whose entries point at the same bytes: 5 KB that claim 65 million chunks.
#[test]
fn more_chunks_than_can_be_kept_track_of_are_refused() {
    const ENTRIES: u64 = 90;
    let folder = scratch("cli-nested-shards");
    let array = folder.join("c/a");
    fs::create_dir_all(array.join("c")).unwrap();
    let (mut value, mut extent, mut codecs) = (vec![7_u8], 1, r#"{"name":"bytes"}"#.to_owned());
    for _ in 0..4 {
        let place = Some((0, value.len() as u64));
        value.extend(encode_index(&vec![place; ENTRIES as usize], Endian::Little, true).unwrap());
        codecs = sharded(&extent.to_string(), &codecs);
        extent *= ENTRIES;
    }
    fs::write(array.join("zarr.json"), bytes_in_one_chunk(&extent.to_string(), &codecs)).unwrap();
    fs::write(array.join("c/0"), value).unwrap();
    let path = folder.join("c");
    // What cannot be looked at is not called damaged.
    for verb in ["verify", "seal"] {
        let error = refused(2, &[verb, &text(&path)]);
        assert!(error.contains("too many chunks"), "{error}");
    }
    fs::remove_dir_all(&folder).unwrap();
}
