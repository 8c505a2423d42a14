//! The command line's contract, verb by verb, through the binary: fields, rules, exit codes, messages.
//!
//! Other programs parse it, so these tests know nothing of the library. Values are judged by `fixtures_golden`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::ask::{
    checkpoint, floats, has, has_all, indexes, little_endian, load, object, ok, parsed, paths, refused, row, rows,
    safetensors, shard_bytes, text,
};
use support::{copy_tree, finish, fixture, program, read_json, scratch, skipped, touchdown};

// ---------------------------------------------------------------- ls

#[test]
fn ls_prints_every_field_of_its_schema() {
    for (name, format, layout, item) in [
        ("v1_basic", "orbax", "v1", json!("state")),
        ("v1_shard2d_2x4", "orbax", "v1", json!("state")),
        ("v1_nested", "orbax", "v1", json!("state")),
        ("v1_prng", "orbax", "v1", json!("state")),
        ("v0_composite", "orbax", "v0-composite", json!("state")),
        ("v0_manager", "orbax", "steps", json!("default")),
        ("v0_unmerged", "orbax", "v0-direct", json!("")),
        ("safetensors_index", "safetensors", "safetensors-index", Value::Null),
        ("safetensors_directory", "safetensors", "safetensors-dir", Value::Null),
    ] {
        let listed = object(&["ls", &checkpoint(name), "--json"]);
        assert_eq!(listed["format"], format, "{name}");
        assert_eq!(listed["layout"], layout, "{name}");
        assert_eq!(listed["item"], item, "{name}");
        has_all(&listed, &[("items", "list"), ("mesh", "object|null"), ("custom_metadata", "any"), ("leaves", "list")]);
        for item in listed["items"].as_array().unwrap() {
            has_all(item, &[("name", "string"), ("kind", "string")]);
            assert!(["tree", "json", "other"].contains(&item["kind"].as_str().unwrap()), "{name}: {item}");
        }
        for row in rows(&listed) {
            has_all(
                row,
                &[
                    ("path", "list"),
                    ("kind", "string"),
                    ("dtype", "string|null"),
                    ("shape", "list|null"),
                    ("spec", "list|null"),
                    ("mesh", "number|null"),
                    ("chunk_shape", "list|null"),
                    ("stored_bytes", "number|null"),
                    ("value", "any"),
                ],
            );
            let kind = row["kind"].as_str().unwrap();
            assert!(["array", "scalar", "string", "none", "empty", "key"].contains(&kind), "{name}: {row}");
            match kind {
                "array" => {
                    assert!(row["dtype"].is_string() && row["shape"].is_array() && row["chunk_shape"].is_array())
                }
                "scalar" => assert!(!row["value"].is_null() && row["shape"] == json!([]), "{row}"),
                "string" => has(row, "value", "string"),
                "empty" => has(row, "container", "string"),
                "key" => has(row, "key_impl", "string"),
                _ => {}
            }
        }
    }
    let file = text(&fixture("safetensors_single/ckpt/model.safetensors"));
    let listed = object(&["ls", &file, "--json"]);
    assert_eq!(listed["layout"], "safetensors-file");
    assert_eq!(row(&listed, "s")["kind"], "array", "a 0-d array of safetensors is an array");
}

#[test]
fn ls_tells_kinds_values_and_saved_shardings() {
    let listed = object(&["ls", &checkpoint("v1_basic"), "--json"]);
    let told = |path: &str, field: &str| row(&listed, path)[field].clone();
    assert_eq!(told("a", "shape"), json!([3, 4]));
    assert_eq!(told("b", "dtype"), "bfloat16");
    assert_eq!((told("f", "kind"), told("f", "value")), (json!("scalar"), json!(13.5)));
    assert_eq!((told("s", "kind"), told("s", "value")), (json!("scalar"), json!(5)));
    assert_eq!((told("str", "kind"), told("str", "value")), (json!("string"), json!("hello")));
    assert_eq!((told("empty", "kind"), told("empty", "container")), (json!("empty"), json!("Dict")));
    assert_eq!(told("none", "kind"), "none");
    assert_eq!((told("opt/0", "kind"), told("opt/0", "shape")), (json!("array"), json!([])));
    assert_eq!(told("opt/0", "path"), json!(["opt", 0]), "a sequence position is an integer");

    let listed = object(&["ls", &checkpoint("v1_shard2d_2x4"), "--json"]);
    assert_eq!(listed["mesh"], json!({"axes": ["x", "y"], "shape": [2, 4]}));
    assert_eq!(row(&listed, "3d")["spec"], json!(["x", null, "y"]));
    assert_eq!(row(&listed, "_y")["spec"], json!([null, "y"]));
    assert_eq!(row(&listed, "xyjoint")["spec"][0], json!(["x", "y"]));
    assert_eq!(row(&listed, "xy")["mesh"], 0);

    let listed = object(&["ls", &checkpoint("v1_prng"), "--json"]);
    assert_eq!(row(&listed, "k")["key_impl"], "threefry2x32");
    assert_eq!(row(&listed, "rbg")["key_impl"], "rbg");

    let listed = object(&["ls", &checkpoint("v1_nested"), "--json"]);
    assert_eq!(row(&listed, "et")["container"], "Tuple");
    assert_eq!(row(&listed, "el")["container"], "List");
    assert_eq!(row(&listed, "pybool")["value"], true);
    assert_eq!(row(&listed, "big")["value"], 4_611_686_018_427_387_904_u64);

    let people = ok(&["ls", &checkpoint("v1_nested")]);
    assert!(people.contains(r"a\/b") && people.contains(r"back\\slash"), "paths print escaped: {people}");
}

#[test]
fn ls_edited_is_a_target() {
    let folder = scratch("cli-target");
    let path = checkpoint("v1_basic");
    let listed = object(&["ls", &path, "--json"]);
    let file = folder.join("target.json");
    let file_text = text(&file);
    let write = |document: &Value| fs::write(&file, document.to_string()).unwrap();
    let args = [path.as_str(), "--devices", "cpu:1", "--target", file_text.as_str()];
    let with = |more: &[&str]| load(&folder, &[args.as_slice(), more].concat());

    // Unedited: the same as without.
    write(&listed);
    let (targeted, dump, report) = with(&[]);
    let (plain, plain_dump, _) = load(&folder.join("plain"), &[&path, "--devices", "cpu:1"]);
    assert_eq!(targeted["leaves"], plain["leaves"]);
    assert_eq!(shard_bytes(&dump, row(&targeted, "a"), 0), shard_bytes(&plain_dump, row(&plain, "a"), 0));
    assert_eq!((&report["skipped"], &report["missing"]), (&json!([]), &json!([])));

    // dtype, shape and kind; a removed row is skipped and reported in string form.
    let mut edited = listed.clone();
    edited["leaves"].as_array_mut().unwrap().retain(|row| row["path"] != json!(["opt", 1]));
    for row in edited["leaves"].as_array_mut().unwrap() {
        match row["path"][0].as_str().unwrap() {
            "a" => {
                row["dtype"] = json!("float16");
                row["shape"] = json!([2, 6]);
            }
            "opt" => row["kind"] = json!("scalar"),
            "s" => row["kind"] = json!("array"),
            "f" => row["dtype"] = json!("int64"),
            _ => {}
        }
    }
    write(&edited);
    let message = refused(2, &[&["load"], args.as_slice()].concat());
    assert!(message.contains("a: wanted [2, 6], stored [3, 4]") && message.contains("--pad"), "{message}");
    let (dumped, dump, report) = with(&["--pad", "--pad-value", "7"]);
    let a = row(&dumped, "a");
    assert_eq!((&a["dtype"], &a["shape"]), (&json!("float16"), &json!([2, 6])));
    let seven = 0x4700_u16.to_le_bytes();
    assert_eq!(shard_bytes(&dump, a, 0)[8..12], [seven, seven].concat(), "padded at the high end");
    assert_eq!((&row(&dumped, "opt/0")["kind"], &row(&dumped, "s")["kind"]), (&json!("scalar"), &json!("array")));
    assert_eq!(row(&dumped, "f")["value"], 13, "int() of 13.5");
    assert_eq!(report["skipped"], json!(["opt/1"]));
    assert!(!paths(&dumped).contains(&"opt/1".to_owned()), "skipped leaves are absent from the dump");

    // Flags override the file.
    let (dumped, ..) = with(&["--pad", "--cast", "a=float64", "--shape", "a=1,1"]);
    assert_eq!((&row(&dumped, "a")["dtype"], &row(&dumped, "a")["shape"]), (&json!("float64"), &json!([1, 1])));

    // A row that the checkpoint lacks.
    let mut more = listed.clone();
    more["leaves"].as_array_mut().unwrap().push(json!({"path": ["opt", "mu", 3], "kind": "array"}));
    write(&more);
    let message = refused(2, &[&["load"], args.as_slice()].concat());
    assert!(message.contains("opt/mu/3") && message.contains("opt/1"), "the nearest names: {message}");
    let (dumped, _, report) = with(&["--missing", "keep"]);
    assert_eq!(report["missing"], json!(["opt/mu/3"]));
    assert_eq!(paths(&dumped).len(), rows(&listed).len());

    // Every misfit is in one error.
    let mut bad = listed.clone();
    for row in bad["leaves"].as_array_mut().unwrap() {
        match row["path"][0].as_str().unwrap() {
            "a" => row["kind"] = json!("string"),
            "n" => row["shape"] = json!([6]),
            "str" => row["kind"] = json!("array"),
            _ => {}
        }
    }
    bad["leaves"].as_array_mut().unwrap().push(json!({"path": ["zz"]}));
    write(&bad);
    let message = refused(2, &[&["load"], args.as_slice()].concat());
    assert!(["a: ", "n: ", "str: ", "zz: "].iter().all(|leaf| message.contains(leaf)), "{message}");

    // Only the fields that are read need be there; a row said twice, other JSON and no JSON are refused.
    write(&json!({"leaves": [{"path": ["a"]}]}));
    assert_eq!(paths(&with(&[]).0), ["a"]);
    write(&json!({"leaves": [{"path": ["a"]}, {"path": ["a"], "dtype": "int8"}]}));
    let message = refused(2, &[&["load"], args.as_slice(), &["--missing", "keep"]].concat());
    assert!(message.contains("twice"), "{message}");
    for wrong in [json!([]), json!({"leaves": 3}), json!({"leaves": [{"path": "a"}]})] {
        write(&wrong);
        refused(2, &[&["load"], args.as_slice()].concat());
    }
    write(&json!({"leaves": [{"path": ["a"], "dtype": "float33"}]}));
    assert!(refused(2, &[&["load"], args.as_slice()].concat()).contains("float33"));
    fs::write(&file, "{").unwrap();
    assert!(refused(2, &[&["load"], args.as_slice()].concat()).contains("caused by: "));
    fs::remove_file(&file).unwrap();
    refused(2, &[&["load"], args.as_slice()].concat());
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_target_touches_no_keys_and_no_impossible_casts() {
    let folder = scratch("cli-target-keys");
    let path = checkpoint("v1_prng");
    let file = text(&folder.join("target.json"));
    let args = ["load", &path, "--devices", "cpu:1", "--target", &file];
    let listed = object(&["ls", &path, "--json"]);
    fs::write(&file, listed.to_string()).unwrap();
    let (dumped, ..) = load(&folder, &args[1..]);
    assert_eq!((&row(&dumped, "k")["kind"], &row(&dumped, "k")["key_impl"]), (&json!("key"), &json!("threefry2x32")));
    for (field, value) in [("dtype", json!("float32")), ("shape", json!([3]))] {
        let mut edited = listed.clone();
        edited["leaves"][0][field] = value;
        fs::write(&file, edited.to_string()).unwrap();
        assert!(refused(2, &args).contains("k: "), "{field}");
    }
    let complex = folder.join("complex.safetensors");
    safetensors(&complex, &[("c", "C64", &[1], &[0; 8])]);
    let path = text(&complex);
    fs::write(&file, json!({"leaves": [{"path": ["c"], "dtype": "bool"}]}).to_string()).unwrap();
    assert!(refused(2, &["load", &path, "--target", &file]).contains("complex"));
    assert!(refused(2, &["load", &path, "--cast", "c=bool"]).contains("complex"));
    fs::remove_dir_all(&folder).unwrap();
}

// ---------------------------------------------------------------- globs and rules

#[test]
fn globs_select_whole_paths() {
    let path = checkpoint("v1_nested");
    let selected = |args: &[&str]| {
        let mut found = paths(&object(&[&["plan", &path, "--json", "--devices", "cpu:1"], args].concat()));
        found.sort();
        found
    };
    assert_eq!(selected(&["--only", "dc/w"]), ["dc/w"]);
    assert_eq!(selected(&["--only", "deep/**"]), ["deep/a/b/c/d"]);
    assert_eq!(selected(&["--only", "deep/**/d"]), ["deep/a/b/c/d"]);
    assert_eq!(selected(&["--only", "**/w"]), ["dc/w"]);
    assert_eq!(selected(&["--only", "**/0"]), ["0", "cust/0", "list/0", "list/4/0/0", "long_list/0"]);
    assert_eq!(selected(&["--only", "long_list/1?"]), ["long_list/10", "long_list/11"]);
    assert_eq!(selected(&["--only", "long_list/*", "--skip", "long_list/1*"]).len(), 9);
    assert_eq!(selected(&["--only", r"a\/b"]), ["a/b"], "an escaped slash is part of a name");
    assert_eq!(selected(&["--only", "a?b"]), ["a.b", "a/b", "a~b"], "`?` is any character of one element");
    assert_eq!(selected(&["--only", r"back\\slash"]), [r"back\slash"]);
    assert_eq!(selected(&["--only", "quo'te", "--only", "日*"]), ["quo'te", "日本"]);
    assert_eq!(selected(&["--only", "**", "--skip", "**/?*"]), Vec::<String>::new());
    // No classes, no braces; a glob is no prefix.
    for none in ["[d]c/w", "{dc}/w", "dc", "d", "DC/w", "dc/w/x", ""] {
        let message = refused(2, &["plan", &path, "--only", none]);
        assert!(message.contains("no leaf matches"), "{none}: {message}");
    }
    assert_eq!(selected(&["--regex", "--only", "^dc/.$"]), ["dc/w"]);
    assert_eq!(selected(&["--regex", "--only", r"^long_list/1\d$"]), ["long_list/10", "long_list/11"]);
    refused(2, &["plan", &path, "--regex", "--only", "("]);
}

#[test]
fn a_rule_without_a_match_names_its_neighbours() {
    let path = checkpoint("v1_nested");
    for args in [
        ["--only", "dc/v"],
        ["--skip", "dc/v"],
        ["--spec", "dc/v=device"],
        ["--cast", "dc/v=float16"],
        ["--shape", "dc/v=3"],
        ["--transpose", "dc/v=0"],
        ["--take", "dc/v=0:0"],
        ["--order", "dc/v"],
        ["--rename", "^dc/v$=x"],
    ] {
        let message = refused(2, &["load", &path, args[0], args[1]]);
        assert!(message.contains("dc/v"), "{args:?}: {message}");
        assert!(message.contains("dc/w") || args[0] == "--rename", "{args:?}: no nearest names: {message}");
        assert!(message.lines().any(|line| line.starts_with("hint: ")), "{args:?}: {message}");
    }
    // However far they are, some names are told; a filter that does not fit is part of the rule.
    for far in ["zzzzzzzzzzzz", "**/zzzzzzzzzzzz"] {
        assert!(refused(2, &["load", &path, "--skip", far]).contains("nearest names: "));
    }
    let message = refused(2, &["load", &path, "--skip", "**/kernel", "--skip", "nope/**"]);
    assert!(!message.contains("nearest \n") && message.matches("nearest ").count() == 2, "{message}");
    assert!(refused(2, &["load", &path, "--cast", "dc/w@int=f16"]).contains("`dc/w@int`"));
    let message = refused(2, &["cat", &path, "dc/v"]);
    assert!(message.contains("there is no leaf `dc/v`") && message.contains("dc/w"), "{message}");
    let message = refused(2, &["load", &path, "--rename", ".*=x"]);
    assert!(message.contains("x: ") && message.contains("dc/w") && message.contains("hint: "), "{message}");
    // Several at once: one error that lists all.
    let message = refused(2, &["load", &path, "--cast", "dc/v=f16", "--cast", "lsit/0=f16", "--cast", "dc/w=f16"]);
    assert!(message.contains("dc/v") && message.contains("lsit/0"), "{message}");
    // Rules of different options, rules that cannot be read and rows of a target file are one error too.
    let file = text(&scratch("cli-one-error").join("target.json"));
    let rows = r#"{"schema":1,"leaves":[{"path":["dc","w"],"dtype":"float33"},{"path":["nothing"]}]}"#;
    fs::write(&file, rows).unwrap();
    let options = ["--skip", "dc/v", "--cast", "lsit/0=f16", "--cast", "dc/w=f44", "--spec", "*"];
    let message = refused(2, &[&["load", &path, "--target", &file], &options[..]].concat());
    for text in ["float33", "dc/v", "lsit/0", "f44", "--spec *", "nothing: not in the checkpoint; nearest"] {
        assert!(message.contains(text), "{text} is missing in\n{message}");
    }
    // `--skip` is judged by the checkpoint, not by what `--only` leaves.
    ok(&["load", &path, "--only", "dc/**", "--skip", "list/**"]);
    // A filter that admits nothing matches nothing, strings and scalars of other types included.
    for rule in ["str@float=bf16", "none@int=int8", "dc/w@int=int8", "int@float=bf16"] {
        refused(2, &["load", &path, "--cast", rule]);
    }
}

#[test]
fn the_first_matching_rule_wins() {
    let folder = scratch("cli-first");
    let path = checkpoint("v1_basic");
    let args =
        [&path, "--devices", "cpu:1", "--cast", "a=float16", "--cast", "**@float=bfloat16", "--cast", "**@int=int8"];
    let (dumped, ..) = load(&folder, &args);
    let dtype = |path: &str| row(&dumped, path)["dtype"].as_str().unwrap().to_owned();
    assert_eq!([dtype("a"), dtype("b"), dtype("n"), dtype("opt/1")], ["float16", "bfloat16", "int8", "bfloat16"]);
    assert_eq!(dtype("opt/0"), "bfloat16", "0-d arrays are arrays");
    assert_eq!([dtype("f"), dtype("s")], ["float64", "int64"], "scalars are unchanged by a glob");
    assert_eq!(row(&dumped, "str")["value"], "hello");

    // The other way round the second rule never applies, which is no error: it matches.
    let (dumped, ..) = load(&folder, &[&path, "--cast", "**@float=f64", "--cast", "a=f16"]);
    assert_eq!(row(&dumped, "a")["dtype"], "float64");

    // `=` splits at the last one.
    let equals = folder.join("equals.safetensors");
    safetensors(&equals, &[("x=y", "F32", &[1], &[0; 4])]);
    let (dumped, ..) = load(&folder, &[&text(&equals), "--cast", "x=y=f64"]);
    assert_eq!(row(&dumped, "x=y")["dtype"], "float64");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_literal_path_to_another_kind_is_refused() {
    let basic = checkpoint("v1_basic");
    for leaf in ["f", "s", "str", "none", "empty"] {
        for (option, value) in [("--cast", "float16"), ("--shape", "3"), ("--spec", "device")] {
            let message = refused(2, &["load", &basic, option, &format!("{leaf}={value}")]);
            assert!(message.contains(leaf), "{option} {leaf}: {message}");
        }
    }
    let keys = checkpoint("v1_prng");
    refused(2, &["load", &keys, "--cast", "k=float32"]);
    ok(&["load", &keys, "--cast", "**=float32"]);
    ok(&["load", &basic, "--spec", "s*=", "--cast", "**=float16"]);
}

#[test]
fn dtype_names_are_those_of_numpy_and_short_ones() {
    let folder = scratch("cli-dtypes");
    let path = checkpoint("v1_basic");
    for (short, name) in [
        ("f32", "float32"),
        ("bf16", "bfloat16"),
        ("f16", "float16"),
        ("f64", "float64"),
        ("i8", "int8"),
        ("u64", "uint64"),
    ] {
        for spelt in [short, name] {
            let (dumped, ..) = load(&folder, &[&path, "--only", "a", "--cast", &format!("a={spelt}")]);
            assert_eq!(row(&dumped, "a")["dtype"], name);
        }
    }
    for name in ["bool", "int4", "uint4", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128", "uint16"] {
        let (dumped, dump, _) = load(&folder, &[&path, "--only", "a", "--cast", &format!("a={name}")]);
        let width = if name == "complex128" {
            16
        } else if name == "complex64" {
            8
        } else {
            usize::from(name == "uint16") + 1
        };
        assert_eq!(shard_bytes(&dump, row(&dumped, "a"), 0).len(), 12 * width, "{name}");
    }
    assert!(refused(2, &["load", &path, "--cast", "a=float33"]).contains("float33"));
    refused(2, &["load", &path, "--cast", "a"]);
    refused(2, &["load", &path, "--cast", "a="]);
    fs::remove_dir_all(&folder).unwrap();
}

// ---------------------------------------------------------------- devices, meshes, placement

#[test]
fn devices_and_meshes_that_do_not_fit_are_refused() {
    let path = checkpoint("v1_basic");
    for devices in ["cpu", "cpu:0", "cpu:-1", "cpu:x", "tpu:0", "", "cuda:3-1", "cuda:", "cpu:99999999999", "cuda:0*0"]
    {
        refused(2, &["load", &path, &format!("--devices={devices}")]);
    }
    for mesh in ["x=3", "x=2,y=4", "x=0", "x", "x=2,x=2", "=4", "x=4,", "x=18446744073709551615,y=2"] {
        refused(2, &["load", &path, "--devices", "cpu:4", "--mesh", mesh]);
    }
    let on = ["load", &path, "--devices", "cpu:4", "--mesh", "x=2,y=2", "--spec"];
    for spec in ["a=z", "a=x,x", "a=x+x", "a=x,y,_", "a=x+", "a=,,,", "b=x,_"] {
        refused(2, &[on.as_slice(), &[spec]].concat());
    }
    for spec in ["a=x", "a=x,y", "a=_,x+y", "a=y+x", "a=", "a=_", "a= x , y "] {
        ok(&[on.as_slice(), &[spec]].concat());
    }
    ok(&["load", &path, "--devices", "auto"]);
    assert!(matches!(touchdown(["load", &path, "--devices", "cuda:0"]).code, Some(0 | 4)), "no device is exit 4");
}

#[test]
fn specs_divide_as_the_contract_says() {
    let folder = scratch("cli-specs");
    let path = checkpoint("v1_shard2d_2x4");
    let on = [path.as_str(), "--devices", "cpu:4", "--mesh", "a=2,b=2", "--only", "rep5", "--spec"];
    let index = |spec: &str| indexes(row(&load(&folder, &[on.as_slice(), &[spec]].concat()).0, "rep5"));
    // [5, 7]: three and two rows; four and three columns.
    assert_eq!(
        index("rep5=a"),
        [json!([[0, 3], [0, 7]]), json!([[0, 3], [0, 7]]), json!([[3, 5], [0, 7]]), json!([[3, 5], [0, 7]])]
    );
    assert_eq!(
        index("rep5=_,b"),
        [json!([[0, 5], [0, 4]]), json!([[0, 5], [4, 7]]), json!([[0, 5], [0, 4]]), json!([[0, 5], [4, 7]])]
    );
    assert_eq!(index("rep5=a+b"), [[0, 2], [2, 4], [4, 5], [5, 5]].map(|rows| json!([rows, [0, 7]])));
    assert_eq!(index("rep5=b+a"), [[0, 2], [4, 5], [2, 4], [5, 5]].map(|rows| json!([rows, [0, 7]])), "major first");
    assert_eq!(index("rep5="), vec![json!([[0, 5], [0, 7]]); 4]);
    let (dumped, dump, _) = load(&folder, &[on.as_slice(), &["rep5=a+b"]].concat());
    let rep5 = row(&dumped, "rep5");
    let devices: Vec<&Value> = rep5["shards"].as_array().unwrap().iter().map(|shard| &shard["device"]).collect();
    assert_eq!(devices, [0, 1, 2, 3], "one entry a device, in mesh order");
    assert_eq!(shard_bytes(&dump, rep5, 3).len(), 0, "an empty shard has a 0-byte file");
    assert_eq!(shard_bytes(&dump, rep5, 0).len(), 2 * 7 * 4);

    let message = refused(2, &[&["load"], on.as_slice(), &["rep5=a", "--even"]].concat());
    assert!(message.contains("rep5") && message.contains('5') && message.contains("--even"), "{message}");
    ok(&["load", &path, "--devices", "cpu:4", "--mesh", "a=2,b=2", "--only", "xy", "--spec", "xy=a,b", "--even"]);
    // Shape changes come before sharding: padded to 6, five rows divide evenly.
    let padded = ["rep5=a", "--even", "--shape", "rep5=6,7", "--pad"];
    assert_eq!(indexes(row(&load(&folder, &[on.as_slice(), &padded].concat()).0, "rep5"))[3], json!([[3, 6], [0, 7]]));
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn placement_follows_its_precedence() {
    let folder = scratch("cli-placement");
    let path = checkpoint("v1_shard2d_2x4");
    let spec_of = |args: &[&str], leaf: &str| {
        let plan = object(&[&["plan", &path, "--json"], args].concat());
        let leaf = row(&plan, leaf).clone();
        (leaf["spec"].as_str().unwrap().to_owned(), leaf["shards"].as_array().unwrap().len())
    };
    let told = |spec: &str, devices: usize| (spec.to_owned(), devices);
    // The saved sharding where no mesh is given and the count is that of the saved mesh; else replicated.
    assert_eq!(spec_of(&["--devices", "cpu:8"], "3d"), told("x,_,y", 8));
    assert_eq!(spec_of(&["--devices", "cpu:8"], "xyjoint").0.trim_end_matches(",_"), "x+y");
    for devices in ["cpu:4", "cpu:1"] {
        assert_eq!(spec_of(&["--devices", devices], "3d").0.replace([',', '_'], ""), "", "{devices}");
    }
    let meshed = ["--devices", "cpu:8", "--mesh", "x=2,y=4"];
    assert_eq!(spec_of(&meshed, "3d").0.replace([',', '_'], ""), "", "with --mesh nothing is as saved");
    // The target file's spec, and a rule before it.
    let file = text(&folder.join("target.json"));
    let mut edited = object(&["ls", &path, "--json"]);
    let position = rows(&edited).iter().position(|row| row["path"] == json!(["xy"])).unwrap();
    fs::write(&file, edited.to_string()).unwrap();
    let unedited = ["--devices", "cpu:8", "--target", &file];
    assert_eq!(spec_of(&unedited, "3d"), told("x,_,y", 8));
    let meshed = [&meshed[..], &["--target", &file]].concat();
    assert_eq!(spec_of(&meshed, "3d"), told("x,_,y", 8), "an unedited row keeps its spec on a mesh with these axes");
    edited["leaves"][position]["spec"] = json!([null, ["y", "x"]]);
    fs::write(&file, edited.to_string()).unwrap();
    assert_eq!(spec_of(&meshed, "xy"), told("_,y+x", 8));
    assert_eq!(spec_of(&unedited, "xy"), told("_,y+x", 8), "an edited spec speaks of the saved axes");
    assert_eq!(spec_of(&[&meshed[..], &["--spec", "xy=y"]].concat(), "xy"), told("y", 8));
    // A rule wins even where the file's spec cannot be met: flags override the file.
    let elsewhere = ["--devices", "cpu:2", "--mesh", "m=2", "--target", &file];
    let message = refused(2, &[&["plan", &path], elsewhere.as_slice()].concat());
    assert!(message.contains("xy: ") && message.contains("3d: ") && message.contains("axis"), "{message}");
    assert_eq!(spec_of(&[&elsewhere[..], &["--spec", "**=m"]].concat(), "xy"), told("m", 2));
    // What nothing places is refused if so asked.
    let refuse = ["plan", &path, "--devices", "cpu:2", "--mesh", "m=2", "--otherwise", "refuse", "--spec"];
    let message = refused(2, &[refuse.as_slice(), &["x*=m"]].concat());
    assert!(message.contains("3d: ") && message.contains("rep5: ") && !message.contains("xy: "), "{message}");
    ok(&[refuse.as_slice(), &["**="]].concat());
    fs::remove_dir_all(&folder).unwrap();
}

// ---------------------------------------------------------------- steps, items, temporary names

#[test]
fn steps_are_chosen() {
    let root = checkpoint("v1_training_steps");
    let step = |choice: &str| object(&["ls", &root, "--step", choice, "--json"])["step"].clone();
    assert_eq!(object(&["ls", &root, "--json"])["step"], 10, "the latest whole step");
    assert_eq!([step("latest"), step("5"), step("0")], [10, 5, 0]);
    assert_eq!([step("best:loss"), step("best:-loss")], [0, 10], "with `-` the smallest is best");
    assert_eq!(ok(&["cat", &root, "step", "--step", "5"]), "5\n");
    let message = refused(2, &["ls", &root, "--step", "7"]);
    assert!(message.contains('5') && message.contains("10"), "the nearest steps: {message}");
    assert!(refused(2, &["ls", &root, "--step", "best:accuracy"]).contains("loss"));
    for wrong in ["last", "", "1.5", "best"] {
        refused(2, &["ls", &root, &format!("--step={wrong}")]);
    }
    let manager = checkpoint("v0_manager");
    assert_eq!(object(&["ls", &manager, "--step", "best:loss", "--json"])["step"], 1);
    // On anything else, a step's own directory and safetensors included, it is refused.
    for other in
        [checkpoint("v1_basic"), format!("{root}/5"), checkpoint("safetensors_index"), checkpoint("v0_unmerged")]
    {
        for choice in ["1", "latest", "best:loss"] {
            refused(2, &["ls", &other, "--step", choice]);
        }
    }
    ok(&["ls", &format!("{root}/5")]);
}

#[test]
fn a_step_that_is_removed_while_it_is_read_is_chosen_again() {
    let dir = scratch("removed-while-read");
    let (root, pipe) = (dir.join("root"), dir.join("target.json"));
    // Arrays that are too big to be read when it is opened.
    for step in ["5", "10"] {
        copy_tree(Path::new(&checkpoint("quickstart")), &root.join(step));
    }
    let target = ok(&["ls", &text(&root), "--json"]);
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // The target is read when the step was chosen and opened: that pipe has a reader tells that.
    let removing = std::thread::spawn({
        let (root, pipe) = (root.clone(), pipe.clone());
        move || {
            let mut file = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
            fs::remove_dir_all(root.join("10")).unwrap();
            // For the step that is chosen then it is a plain file.
            let plain = pipe.with_extension("plain");
            fs::write(&plain, &target).unwrap();
            fs::rename(plain, &pipe).unwrap();
            file.write_all(target.as_bytes()).unwrap();
        }
    });
    let loaded = object(&["load", &text(&root), "--step", "latest", "--target", &text(&pipe), "--json"]);
    assert_eq!(loaded["step"], 5);
    removing.join().unwrap();
}

#[test]
fn an_unfinished_save_is_not_opened_unless_forced() {
    let root = checkpoint("v0_uncommitted");
    assert_eq!(object(&["ls", &root, "--json"])["step"], 1, "the unfinished step 2 is passed over");
    let unfinished = format!("{root}/2.orbax-checkpoint-tmp");
    for verb in ["ls", "load", "plan", "verify"] {
        let message = refused(3, &[verb, &unfinished]);
        assert!(message.contains("--force"), "{verb}: {message}");
    }
    refused(3, &["ls", &root, "--step", "2"]);
    let forced = touchdown(["ls", &unfinished, "--force", "--json"]);
    assert!(matches!(forced.code, Some(0 | 3)), "what is missing inside is missing: {}", forced.stderr);

    // A whole checkpoint under a temporary name is read as soon as it is forced.
    let folder = scratch("cli-tmp");
    let whole = folder.join("7.orbax-checkpoint-tmp-123");
    copy_tree(&fixture("v1_basic/ckpt"), &whole);
    assert!(refused(3, &["ls", &text(&whole)]).contains("--force"));
    assert_eq!(rows(&object(&["ls", &text(&whole), "--force", "--json"])).len(), 12);
    ok(&["load", &text(&whole), "--force"]);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn of_nothing_but_json_it_is_said_who_reads_that() {
    let root = scratch("cli-only-json");
    fs::create_dir_all(root.join("1/conf")).unwrap();
    fs::write(root.join("1/orbax.checkpoint"), "").unwrap();
    fs::write(root.join("1/conf/data.json"), "{}").unwrap();
    assert!(refused(2, &["ls", &text(&root)]).contains("`load_items` of the library"));
}

#[test]
fn items_have_a_default_and_a_name() {
    let several = checkpoint("v1_checkpointables");
    assert_eq!(object(&["ls", &several, "--json"])["item"], "state");
    let extra = object(&["ls", &several, "--item", "extra", "--json"]);
    assert_eq!((&extra["item"], paths(&extra)), (&json!("extra"), vec!["b".to_owned()]));
    let message = refused(2, &["ls", &several, "--item", "stat"]);
    assert!(message.contains("state"), "{message}");
    refused(2, &["ls", &checkpoint("v1_json_item"), "--item", "metadata_that_is_not_there"]);
    // An item that the metadata list and that is gone is missed; others are opened by name.
    let folder = scratch("cli-items");
    let copy = folder.join("several");
    copy_tree(&fixture("v1_checkpointables/ckpt"), &copy);
    fs::rename(copy.join("state"), copy.join("weights")).unwrap();
    let message = refused(3, &["load", &text(&copy)]);
    assert!(["no such item", "state", "--item"].iter().all(|word| message.contains(word)), "{message}");
    ok(&["ls", &text(&copy), "--item", "weights"]);
    // No usual name among several: the names are told.
    fs::remove_file(copy.join("_CHECKPOINT_METADATA")).unwrap();
    let message = refused(2, &["ls", &text(&copy)]);
    assert!(["weights", "extra", "conf", "--item"].iter().all(|word| message.contains(word)), "{message}");
    ok(&["ls", &text(&copy), "--item", "weights"]);
    // JSON items are items, but no trees.
    let json_items = object(&["ls", &checkpoint("v1_json_item"), "--json"]);
    let named =
        json_items["items"].as_array().unwrap().iter().find(|item| item["kind"] == "json").expect("a JSON item");
    refused(2, &["load", &checkpoint("v1_json_item"), "--item", named["name"].as_str().unwrap()]);
    // Safetensors have none.
    refused(2, &["ls", &checkpoint("safetensors_index"), "--item", "state"]);
    fs::remove_dir_all(&folder).unwrap();
}

// ---------------------------------------------------------------- shapes, casts, views

#[test]
fn shapes_need_pad_and_keep_their_rank() {
    let folder = scratch("cli-shapes");
    let path = checkpoint("v1_basic");
    let message = refused(2, &["load", &path, "--shape", "a=4,4", "--shape", "b=2", "--shape", "n=2,3"]);
    assert!(message.contains("a: wanted [4, 4], stored [3, 4]") && message.contains("b: wanted [2]"), "{message}");
    assert!(!message.contains("n: "), "equal shapes are no difference: {message}");
    refused(2, &["load", &path, "--shape", "a=12", "--pad"]);
    refused(2, &["load", &path, "--shape", "a=x", "--pad"]);
    refused(2, &["load", &path, "--shape", "a=-1,4", "--pad"]);
    refused(2, &["load", &path, "--pad-value", "1"]);
    let (dumped, dump, report) =
        load(&folder, &[&path, "--only", "a", "--shape", "a=2,6", "--pad", "--pad-value", "-1.5"]);
    let stored = floats(&fs::read(fixture("v1_basic/expected.bin")).unwrap()[..48]);
    let rows_of = |row: usize| [&stored[row * 4..row * 4 + 4], &[-1.5, -1.5]].concat();
    assert_eq!(floats(&shard_bytes(&dump, row(&dumped, "a"), 0)), [rows_of(0), rows_of(1)].concat());
    assert_eq!(report["bytes_logical"], 48);
    let (dumped, dump, _) = load(&folder, &[&path, "--only", "a", "--shape", "a=0,4", "--pad"]);
    assert_eq!(shard_bytes(&dump, row(&dumped, "a"), 0).len(), 0);
    let (dumped, dump, _) = load(&folder, &[&path, "--only", "n", "--shape", "n=3,3", "--pad", "--pad-value", "nan"]);
    assert_eq!(shard_bytes(&dump, row(&dumped, "n"), 0)[48..], [0; 24], "NaN as an integer is 0");
    let exact = ["--only", "n", "--shape", "n=3,3", "--pad", "--pad-value", "9007199254740993"];
    let (dumped, dump, _) = load(&folder, &[&[path.as_str()], &exact[..]].concat());
    assert_eq!(
        shard_bytes(&dump, row(&dumped, "n"), 0)[64..],
        9_007_199_254_740_993i64.to_le_bytes(),
        "integers are exact"
    );
    // An absurd shape is refused for want of memory or as such, at once, and planned without being allocated.
    let absurd = ["--only", "a", "--shape", "a=1000000000000,1000", "--pad"];
    let run = touchdown([&["load", path.as_str()], absurd.as_slice()].concat());
    assert!(matches!(run.code, Some(2..=4)) && run.error().starts_with("error: "), "{run:?}");
    let planned = touchdown([&["plan", path.as_str(), "--json"], absurd.as_slice()].concat());
    if planned.code == Some(0) {
        assert_eq!(parsed(&planned.stdout)["fits"], false);
    } else {
        assert!(matches!(planned.code, Some(2 | 3)), "{planned:?}");
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn cast_policies_do_what_they_say() {
    let folder = scratch("cli-casts");
    let file = folder.join("x.safetensors");
    let values = [1.5, 300.0, -7.0, f32::NAN];
    safetensors(&file, &[("x", "F32", &[4], &little_endian(&values)), ("i", "I32", &[1], &300_i32.to_le_bytes())]);
    let path = text(&file);
    let cast = |policy: &str| {
        let (dumped, dump, report) =
            load(&folder, &[&path, "--cast", "x=uint8", "--cast", "i=int8", "--cast-policy", policy]);
        (shard_bytes(&dump, row(&dumped, "x"), 0), shard_bytes(&dump, row(&dumped, "i"), 0), report["lossy"].clone())
    };
    assert_eq!(
        cast("saturate"),
        (vec![1, 255, 0, 0], vec![44], json!({"x": 3, "i": 1})),
        "integers wrap as TensorStore's do"
    );
    let (wrapped, _, lossy) = cast("wrap");
    assert_eq!((&wrapped[..3], &lossy), (&[1, 44, 249][..], &json!({"x": 3, "i": 1})));
    let message = refused(2, &["load", &path, "--cast", "x=uint8", "--cast", "i=int8", "--cast-policy", "error"]);
    assert!(message.contains("x: 3 elements") && message.contains("i: 1 elements"), "{message}");
    ok(&["load", &path, "--cast", "x=float16", "--cast-policy", "error"]);
    refused(2, &["load", &path, "--cast-policy", "clamp"]);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn views_are_taken_permuted_shaped_and_renamed_in_this_order() {
    let folder = scratch("cli-views");
    let path = checkpoint("v1_shard2d_2x4");
    let shape = |args: &[&str], leaf: &str| {
        row(&load(&folder, &[&[path.as_str(), "--only", "3d"], args].concat()).0, leaf)["shape"].clone()
    };
    assert_eq!(shape(&["--take", "3d=0:1"], "3d"), json!([6, 8]));
    assert_eq!(shape(&["--take", "3d=1:2..5"], "3d"), json!([4, 3, 8]));
    assert_eq!(shape(&["--transpose", "3d=2,0,1"], "3d"), json!([8, 4, 6]));
    // take, then transpose, then shape (all by the stored name), then rename; cast and spec by the new name.
    let all = [
        "--take",
        "3d=0:1",
        "--transpose",
        "3d=1,0",
        "--shape",
        "3d=8,3",
        "--pad",
        "--rename",
        "^3d$=m/w.${0}",
        "--cast",
        "m/*=f16",
        "--devices",
        "cpu:2",
        "--mesh",
        "x=2",
        "--spec",
        "m/*=x",
    ];
    let (dumped, ..) = load(&folder, &[&[path.as_str(), "--only", "3d"], all.as_slice()].concat());
    let leaf = row(&dumped, "m/w.3d");
    assert_eq!(
        (&leaf["shape"], &leaf["dtype"], indexes(leaf)[1].clone()),
        (&json!([8, 3]), &json!("float16"), json!([[4, 8], [0, 3]]))
    );
    for (option, value) in [
        ("--take", "3d=3:0"),
        ("--take", "3d=0:4"),
        ("--take", "3d=0:3..9"),
        ("--take", "3d=0:3..1"),
        ("--take", "3d=0"),
        ("--transpose", "3d=0,1"),
        ("--transpose", "3d=0,1,1"),
        ("--transpose", "3d=0,1,3"),
        ("--transpose", "3d=a"),
        ("--rename", "^x.$=same"),
        ("--rename", "(=x"),
        ("--rename", "noequals"),
    ] {
        refused(2, &["load", &path, option, value]);
    }
    fs::remove_dir_all(&folder).unwrap();
}

/// `uring` where this machine has it. Where not, that refusal is checked, and positioned reads stand in.
fn uring_or_pread() -> &'static str {
    if object(&["doctor", "--json"])["io"]["uring"] == true {
        return "uring";
    }
    skipped("loads with --io uring", "this machine has no io_uring");
    let told = refused(4, &["load", &checkpoint("quickstart"), "--io", "uring"]);
    assert!(told.contains("io_uring") && told.contains("--io pread"), "{told}");
    "pread"
}

#[test]
fn order_memory_threads_and_verification_change_no_value() {
    let folder = scratch("cli-engine");
    let path = checkpoint("v1_shard2d_2x4");
    let (plain, plain_dump, _) = load(&folder.join("plain"), &[&path, "--devices", "cpu:2"]);
    for args in [
        &["--order", "yx", "--order", "x*"][..],
        &["--memory", "8MiB", "--threads", "1"],
        &["--threads", "3", "--io", "pread"],
        &["--threads", "1", "--io", uring_or_pread()],
        &["--verify", "off"],
        &["--verify", "full"],
        &["--regex", "--order", "^y"],
    ] {
        let (dumped, dump, report) = load(&folder, &[&[path.as_str(), "--devices", "cpu:2"], args].concat());
        assert_eq!(paths(&dumped), paths(&plain), "{args:?}");
        for (got, want) in rows(&dumped).iter().zip(rows(&plain)) {
            assert!(shard_bytes(&dump, got, 0) == shard_bytes(&plain_dump, want, 0), "{args:?} {got}");
        }
        let unverified = report["bytes_unverified"].as_u64().unwrap();
        assert!((unverified > 0) == args.contains(&"off"), "{args:?}: {unverified} bytes unverified");
    }
    let message = refused(2, &["load", &path, "--memory", "1000"]);
    assert!(message.contains("--memory") && message.contains("1000"), "the number needed: {message}");
    // The number in the hint is enough, or leads to the next one: a chunk may need more than the engine itself.
    let mut memory = "1000".to_owned();
    let enough = (0..12).any(|_| {
        let run = touchdown(["load", &path, "--memory", &memory]);
        if run.code == Some(0) {
            return true;
        }
        assert_eq!(run.code, Some(2), "{}", run.stderr);
        let hint =
            run.stderr.split("give `--memory ").nth(1).and_then(|rest| rest.split('`').next()).expect("a number");
        assert!(hint.parse::<u64>().unwrap() > memory.parse().unwrap(), "{hint} after {memory}");
        hint.clone_into(&mut memory);
        false
    });
    assert!(enough, "not even {memory} bytes are enough");
    for wrong in
        [["--memory", "much"], ["--memory", "-5"], ["--threads", "-1"], ["--threads", "99999"], ["--verify", "maybe"]]
    {
        refused(2, &["load", &path, &format!("{}={}", wrong[0], wrong[1])]);
    }
    fs::remove_dir_all(&folder).unwrap();
}

// ---------------------------------------------------------------- load, plan

#[test]
fn load_reports_every_field_and_plan_agrees() {
    let folder = scratch("cli-load");
    for (name, args) in [
        ("v1_basic", &["--devices", "cpu:1"][..]),
        ("v1_shard2d_2x4", &["--devices", "cpu:8"]),
        ("v1_shard2d_2x4", &["--devices", "cpu:3", "--mesh", "m=3", "--spec", "**=m"]),
        ("v1_shard2d_2x4", &["--take", "x*=0:1", "--cast", "**=f64"]),
        ("safetensors_index", &["--devices", "cpu:2"]),
        ("zarr2_codecs", &["--devices", "cpu:2"]),
        ("zarr3_codecs", &["--only", "**@float"]),
    ] {
        let path = checkpoint(name);
        let loaded = object(&[&["load", &path, "--json"], args].concat());
        has_all(
            &loaded,
            &[
                ("seconds", "number"),
                ("bytes_logical", "number"),
                ("bytes_needed", "number"),
                ("bytes_read", "number"),
                ("bytes_decoded", "number"),
                ("bytes_unverified", "number"),
                ("peak_host_bytes", "number"),
                ("peak_device_bytes", "number"),
                ("launches", "number"),
                ("leaves", "number"),
                ("lossy", "object"),
                ("skipped", "list"),
                ("missing", "list"),
                ("startup", "object"),
                ("stages", "object"),
                ("devices", "list"),
            ],
        );
        has_all(&loaded["startup"], &[("cuda", "number"), ("pin", "number")]);
        for stage in ["open", "plan", "read", "decode", "transform", "copy"] {
            has(&loaded["stages"], stage, "object");
            has_all(&loaded["stages"][stage], &[("busy", "number"), ("blocked", "number"), ("bytes", "number")]);
        }
        for device in loaded["devices"].as_array().unwrap() {
            has_all(device, &[("device", "string"), ("bytes", "number")]);
        }
        let plan = object(&[&["plan", &path, "--json"], args].concat());
        for field in ["bytes_logical", "bytes_needed", "bytes_read", "bytes_decoded"] {
            assert_eq!(plan[field], loaded[field], "{name} {args:?}: {field}");
        }
        let (planned, had) = (plan["devices"].as_array().unwrap(), loaded["devices"].as_array().unwrap());
        assert_eq!(planned.len(), had.len());
        for (planned, had) in planned.iter().zip(had) {
            assert_eq!((&planned["device"], &planned["bytes"]), (&had["device"], &had["bytes"]), "{name} {args:?}");
            has_all(planned, &[("bytes_needed", "number"), ("bytes_read", "number"), ("bytes_decoded", "number")]);
        }
        has_all(
            &plan,
            &[("requests", "number"), ("peak_host_bytes", "number"), ("fits", "bool"), ("shortages", "list")],
        );
        for leaf in rows(&plan) {
            has_all(leaf, &[("path", "list"), ("amplification", "number"), ("shards", "list")]);
        }
        assert!(loaded["peak_host_bytes"].as_u64() <= plan["peak_host_bytes"].as_u64(), "{name}: {loaded} {plan}");
        ok(&[&["plan", &path], args].concat());
        ok(&[&["load", &path], args].concat());
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn dumps_tell_kinds_and_values() {
    let folder = scratch("cli-dump");
    let (dumped, dump, _) = load(&folder, &[&checkpoint("v1_basic"), "--devices", "cpu:2"]);
    has_all(&dumped, &[("schema", "number"), ("leaves", "list")]);
    for row in rows(&dumped) {
        has_all(
            row,
            &[("path", "list"), ("kind", "string"), ("dtype", "string|null"), ("shape", "list|null"), ("value", "any")],
        );
    }
    assert_eq!(row(&dumped, "f")["value"], 13.5);
    assert!(row(&dumped, "f")["shards"].as_array().is_none_or(Vec::is_empty), "scalars have no shards");
    assert_eq!(row(&dumped, "none")["kind"], "none");
    assert_eq!(row(&dumped, "empty")["kind"], "empty");
    let zero_d = row(&dumped, "opt/0");
    assert_eq!(indexes(zero_d), [json!([]), json!([])], "a 0-d array's index is empty");
    assert_eq!(shard_bytes(&dump, zero_d, 1).len(), 4);
    // Floats that JSON has no number for, and integers beyond 2^53.
    let file = folder.join("x.safetensors");
    safetensors(&file, &[("x", "F32", &[4], &little_endian(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]))]);
    let cat = object(&["cat", &text(&file), "x", "--json"]);
    assert_eq!(cat["value"].to_string(), r#"["NaN","Infinity","-Infinity",-0.0]"#);
    assert_eq!(ok(&["cat", &checkpoint("v1_nested"), "big"]), "4611686018427387904\n");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn plan_draws_well_formed_xml() {
    let folder = scratch("cli-svg");
    let odd = folder.join("odd.safetensors");
    safetensors(&odd, &[("<a&\"b'>\u{1}\u{7f}\u{fffe}é", "F32", &[1], &[0; 4]), ("z", "F32", &[1 << 50, 0], &[])]);
    let nested = checkpoint("v1_nested");
    let meshed = checkpoint("v1_shard2d_2x4");
    for args in [
        &[text(&odd).as_str(), "--devices", "cpu:3"][..],
        &[&nested, "--devices", "cpu:1"],
        &[&meshed, "--devices", "cpu:8"],
        &[&meshed, "--devices", "cpu:8", "--mesh", "a<&\u{1}=2,b=4", "--spec", "**=a<&\u{1}"],
        &[&meshed, "--devices", "cpu:4096"],
    ] {
        let file = folder.join("plan.svg");
        ok(&[&["plan", "--svg", &text(&file)], args].concat());
        let picture = fs::read_to_string(&file).unwrap();
        assert!(picture.starts_with("<svg "), "{args:?}");
        if let Err(what) = well_formed(&picture) {
            panic!("{args:?}: {what}");
        }
    }
    refused(4, &["plan", &nested, "--svg", &text(&folder.join("no/such/dir.svg"))]);
    assert!(
        well_formed("<a><b></a></b>").is_err()
            && well_formed("<a b=c/>").is_err()
            && well_formed("<a>&x;</a>").is_err()
    );
    fs::remove_dir_all(&folder).unwrap();
}

/// Whether tags are balanced, attributes quoted, entities known and characters allowed. Comments and such are not.
fn well_formed(text: &str) -> Result<(), String> {
    if let Some(bad) =
        text.chars().find(|&c| (c < ' ' && !"\t\r\n".contains(c)) || matches!(c, '\u{fffe}' | '\u{ffff}'))
    {
        return Err(format!("the character {bad:?}"));
    }
    let entities = |text: &str| {
        text.split('&').skip(1).try_for_each(|rest| match rest.split_once(';').map(|(name, _)| name) {
            Some("lt" | "gt" | "amp" | "quot" | "apos") => Ok(()),
            Some(number) if number.starts_with('#') => Ok(()),
            other => Err(format!("the entity {other:?}")),
        })
    };
    let mut open: Vec<&str> = Vec::new();
    let mut parts = text.split('<');
    let before = parts.next().unwrap_or_default();
    if !before.trim().is_empty() {
        return Err(format!("text before the root: {before:?}"));
    }
    let mut roots = 0;
    for part in parts {
        let (tag, between) = part.split_once('>').ok_or_else(|| format!("an open tag: {part:?}"))?;
        entities(between)?;
        if let Some(name) = tag.strip_prefix('/') {
            if open.pop() != Some(name.trim()) {
                return Err(format!("</{name}> closes another tag"));
            }
            continue;
        }
        let (tag, alone) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, mut attributes) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
        while !attributes.trim().is_empty() {
            let (key, rest) = attributes.split_once("=\"").ok_or_else(|| format!("unquoted: {attributes:?}"))?;
            if key.trim().is_empty() || key.trim().contains(|c: char| !(c.is_ascii_alphanumeric() || "-:_".contains(c)))
            {
                return Err(format!("the attribute {key:?}"));
            }
            let (value, rest) = rest.split_once('"').ok_or_else(|| format!("an open value: {rest:?}"))?;
            entities(value)?;
            attributes = rest;
        }
        roots += usize::from(open.is_empty());
        if !alone {
            open.push(name);
        }
    }
    if open.is_empty() && roots == 1 { Ok(()) } else { Err(format!("{roots} roots, {open:?} left open")) }
}

// ---------------------------------------------------------------- cat, kv, verify, diff, doctor

#[test]
fn cat_prints_values_and_slices() {
    let folder = scratch("cli-cat");
    let file = folder.join("x.safetensors");
    safetensors(
        &file,
        &[
            ("m", "F32", &[2, 3], &little_endian(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.5])),
            ("a/b", "U8", &[2], &[7, 8]),
            ("a*", "U8", &[1], &[9]),
            ("ab", "U8", &[1], &[1]),
            ("wide", "U8", &[1 << 60, 0], &[]),
        ],
    );
    let path = text(&file);
    let value = |args: &[&str]| object(&[&["cat", &path, "--json"], args].concat())["value"].clone();
    assert_eq!(ok(&["cat", &path, "m"]), "[[0.0 1.0 2.0]\n [3.0 4.0 5.5]]\n");
    assert_eq!(value(&["m"]), json!([[0.0, 1.0, 2.0], [3.0, 4.0, 5.5]]));
    assert_eq!(value(&["m", "--slice", "1"]), json!([3.0, 4.0, 5.5]));
    assert_eq!(value(&["m", "--slice", ":,1"]), json!([1.0, 4.0]));
    assert_eq!(value(&["m", "--slice", "0:1,1:"]), json!([[1.0, 2.0]]));
    assert_eq!(value(&["m", "--slice", "1,2"]), json!(5.5));
    assert_eq!(value(&["m", "--slice", ":99,:1"]), json!([[0.0], [3.0]]), "a stop beyond the end is the end");
    let told = object(&["cat", &path, "m", "--slice", "0:1", "--json"]);
    assert_eq!((&told["path"], &told["dtype"], &told["shape"]), (&json!(["m"]), &json!("float32"), &json!([1, 3])));
    for slice in ["2", "0,0,0", "x", "1:0", "", "-1", ":,3", "9:12"] {
        let run = touchdown(["cat", &path, "m", &format!("--slice={slice}")]);
        assert!(run.code == Some(2) || (slice.is_empty() && run.code == Some(0)), "{slice}: {run:?}");
    }
    assert_eq!(value(&[r"a\/b"]), json!([7, 8]));
    assert_eq!(value(&[r"a\*"]), json!([9]), "a literal path, not a glob");
    assert_eq!(value(&["a*"]), json!([9]), "a literal path, not a glob");
    let message = refused(2, &["cat", &path, "mm"]);
    assert!(message.contains("nearest names: ") && message.contains('m'), "{message}");
    // A huge number of empty rows is an answer or an error, not the end of memory.
    let run = finish(limited(&["cat", &path, "wide"]), Duration::from_secs(60));
    assert!(matches!(run.code, Some(0 | 2)), "{run:?}");
    let basic = checkpoint("v1_basic");
    assert_eq!(ok(&["cat", &basic, "str"]), "hello\n");
    assert_eq!(ok(&["cat", &basic, "none"]), "None\n");
    assert_eq!(ok(&["cat", &basic, "f"]), "13.5\n");
    assert_eq!(object(&["cat", &basic, "opt/0", "--json"])["shape"], json!([]));
    refused(2, &["cat", &basic, "f", "--slice", "0"]);
    fs::remove_dir_all(&folder).unwrap();
}

/// The binary with 2 GiB of address space.
fn limited(args: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 2097152; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_touchdown")]).args(args);
    command
}

#[test]
fn kv_lists_keys_and_prints_values() {
    for path in [checkpoint("v1_basic"), format!("{}/state", checkpoint("v1_basic")), checkpoint("v0_unmerged")] {
        let listed = object(&["kv", &path, "--json"]);
        let entries = listed["keys"].as_array().expect("keys");
        assert!(!entries.is_empty());
        let names: Vec<&str> = entries.iter().map(|entry| entry["key"].as_str().unwrap()).collect();
        assert!(names.is_sorted(), "keys in order: {names:?}");
        for entry in entries {
            has_all(entry, &[("key", "string"), ("length", "number"), ("inline", "bool")]);
            let value = program(["kv", &path, entry["key"].as_str().unwrap()]).output().unwrap();
            assert_eq!(value.status.code(), Some(0));
            assert_eq!(Some(value.stdout.len() as u64), entry["length"].as_u64(), "{entry}");
        }
        assert_eq!(ok(&["kv", &path]).lines().count(), entries.len());
        let (key, wrong) = (names[0].to_owned(), format!("{}x", names[0]));
        let (key, wrong) = (key.as_str(), wrong.as_str());
        let value = ok(&["kv", &path, key]);
        let entry = object(&["kv", &path, key, "--json"]);
        assert_eq!(entry["key"], key);
        assert!(entry["value"].is_null() || entry["value"] == value, "text, or nothing: {entry}");
        let message = refused(2, &["kv", &path, wrong]);
        assert!(message.contains(wrong) && message.contains(key), "{message}");
    }
    let meta = object(&["kv", &checkpoint("v1_basic"), "a/zarr.json", "--json"])["value"].clone();
    let meta: Value = serde_json::from_str(meta.as_str().expect("text")).expect("the array's metadata");
    assert_eq!(meta["zarr_format"], 3);
    assert!(refused(2, &["kv", &checkpoint("v1_basic"), "nothing/at/all/like/it"]).contains("nearest"));
    refused(3, &["kv", &checkpoint("zarr2_codecs")]);
    refused(2, &["kv", &text(&fixture("safetensors_single/ckpt/model.safetensors"))]);
}

#[test]
fn verify_names_what_is_missing_or_makes_no_sense() {
    let folder = scratch("cli-missing");
    for (number, file) in ["state/_METADATA", "state/manifest.ocdbt", "_CHECKPOINT_METADATA"].into_iter().enumerate() {
        let copy = folder.join(number.to_string());
        copy_tree(&fixture("quickstart/ckpt"), &copy);
        assert_eq!(touchdown(["verify", &text(&copy)]).code, Some(0));
        fs::remove_file(copy.join(file)).unwrap();
        let run = touchdown(["verify", "--json", &text(&copy)]);
        assert_eq!(run.code, Some(1), "{file}: {}", run.stderr);
        let problems = parsed(&run.stdout)["problems"].clone();
        assert_eq!(problems.as_array().unwrap().len(), 1, "{problems}");
        assert!(problems[0]["file"].as_str().unwrap().ends_with(file) && problems[0]["data_affected"] == false);
    }
    let copy = folder.join("garbage");
    copy_tree(&fixture("quickstart/ckpt"), &copy);
    fs::write(copy.join("_CHECKPOINT_METADATA"), "garbage").unwrap();
    let run = touchdown(["verify", "--json", &text(&copy)]);
    assert_eq!((run.code, parsed(&run.stdout)["ok"].clone()), (Some(1), Value::Bool(false)));
    fs::remove_dir_all(copy.join("state")).unwrap();
    assert_eq!(touchdown(["verify", &text(&copy)]).code, Some(1));
}

#[test]
fn what_crashed_saves_left_is_listed_and_no_checkpoint() {
    let folder = scratch("cli-leftovers");
    let dead = folder.join("run.orbax-checkpoint-tmp-touchdown-0011223344556677");
    let aside = folder.join(".touchdown-old-run-0011223344556677");
    fs::create_dir(&dead).unwrap();
    fs::create_dir(&aside).unwrap();
    let run = text(&folder.join("run"));
    let message = refused(3, &["ls", &run]);
    assert!(message.contains(".touchdown-old-run"), "the hint says where the old one is: {message}");
    refused(3, &["ls", &text(&dead)]);
    copy_tree(Path::new(&checkpoint("v1_basic")), Path::new(&run));
    let kinds = |value: &Value| -> Vec<String> {
        let entries = value["leftovers"].as_array().unwrap();
        entries
            .iter()
            .map(|one| format!("{} {}", one["kind"].as_str().unwrap(), one["name"].as_str().unwrap()))
            .collect()
    };
    assert_eq!(kinds(&object(&["verify", &run, "--json"])), ["replaced run", "staging run"]);
    assert_eq!(kinds(&object(&["doctor", &text(&folder), "--json"])), ["replaced run", "staging run"]);
    assert!(ok(&["doctor", &text(&folder)]).contains("rename it back"));
    assert!(kinds(&object(&["verify", &checkpoint("v1_basic"), "--json"])).is_empty());
}

#[test]
fn verify_tells_what_nothing_refers_to_and_a_lost_file_once() {
    let folder = scratch("cli-orphans");
    let verify = |path: &Path| parsed(&touchdown(["verify", "--json", &text(path)]).stdout);
    let bytes = |found: &Value| -> u64 {
        found["orphans"].as_array().unwrap().iter().map(|one| one["bytes"].as_u64().unwrap()).sum()
    };
    // A database: bytes behind the last value.
    let copy = folder.join("database");
    copy_tree(&fixture("quickstart/ckpt"), &copy);
    let before = verify(&copy);
    let data = fs::read_dir(copy.join("state/ocdbt.process_0/d")).unwrap().map(|entry| entry.unwrap().path());
    let data = data.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let whole = fs::read(&data).unwrap();
    fs::write(&data, [whole.as_slice(), &[0x55; 5000]].concat()).unwrap();
    let found = verify(&copy);
    assert_eq!((bytes(&found), &found["ok"]), (bytes(&before) + 5000, &json!(true)), "{found}");
    fs::write(copy.join("state/d/stray"), [1; 77]).unwrap();
    assert_eq!(bytes(&verify(&copy)), bytes(&before) + 5077);
    assert!(ok(&["verify", &text(&copy)]).contains("nothing refers to"));
    // Keys that the metadata name no leaf of.
    let copy = folder.join("keys");
    copy_tree(&fixture("quickstart/ckpt"), &copy);
    let metadata = copy.join("state/_METADATA");
    let mut tree = read_json(&metadata);
    tree["tree_metadata"].as_object_mut().unwrap().remove("('learning_rate',)").unwrap();
    fs::write(&metadata, tree.to_string()).unwrap();
    let found = verify(&copy);
    let keys: Vec<&str> =
        found["orphans"].as_array().unwrap().iter().filter_map(|orphan| orphan["key"].as_str()).collect();
    assert_eq!((keys, &found["ok"]), (vec!["learning_rate/c", "learning_rate/zarr.json"], &json!(true)));
    assert!(ok(&["verify", &text(&copy)]).contains("2 keys of the database"));
    // Chunks in files: one outside its array, and leftovers in the item.
    let copy = folder.join("files");
    copy_tree(&fixture("zarr2_codecs/ckpt"), &copy);
    assert_eq!(bytes(&verify(&copy)), 0);
    fs::copy(copy.join("gzip/0.0"), copy.join("gzip/7.0")).unwrap();
    let found = verify(&copy);
    let size = fs::metadata(copy.join("gzip/7.0")).unwrap().len();
    assert_eq!((bytes(&found), &found["ok"]), (size, &json!(true)), "{found}");
    // Records that contradict the arrays are told; what is loaded is what the arrays say.
    let copy = folder.join("records");
    copy_tree(&fixture("v1_shard2d_2x4/ckpt"), &copy);
    let records = copy.join("state/array_metadatas/process_0");
    let text = fs::read_to_string(&records).unwrap();
    let changed = text.replacen("\"chunk_shape\": [", "\"chunk_shape\": [1", 1);
    assert_ne!(text, changed, "{text}");
    fs::write(&records, changed).unwrap();
    let found = verify(&copy);
    let problems = found["problems"].as_array().unwrap();
    assert!(problems.len() == 1 && problems[0]["data_affected"] == false, "{found}");
    assert!(problems[0]["message"].as_str().unwrap().contains("array_metadatas"), "{found}");
    assert_eq!(touchdown(["diff", &checkpoint("v1_shard2d_2x4"), copy.to_str().unwrap()]).code, Some(0));
    // A data file that is gone is one problem for each array in it, whatever the number of its chunks.
    let copy = folder.join("lost");
    copy_tree(&fixture("quickstart/ckpt"), &copy);
    fs::remove_file(copy.join("state/ocdbt.process_0/d").join(data.file_name().unwrap())).unwrap();
    let found = verify(&copy);
    let problems = found["problems"].as_array().unwrap();
    let leaves: BTreeSet<String> = problems.iter().map(|problem| problem["leaf"].to_string()).collect();
    assert!(problems.len() > 1 && leaves.len() == problems.len(), "{found}");
    assert!(problems.iter().all(|problem| problem["data_affected"] == true && problem["file"].is_string()), "{found}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn verify_says_yes_or_names_the_damage() {
    for name in ["v1_basic", "v1_shard2d_2x4", "v0_composite", "v0_manager", "safetensors_index", "zarr3_codecs"] {
        for deep in [&[][..], &["--deep"]] {
            let found = object(&[&["verify", &checkpoint(name), "--json"], deep].concat());
            has_all(
                &found,
                &[
                    ("ok", "bool"),
                    ("problems", "list"),
                    ("items", "number"),
                    ("leaves", "number"),
                    ("chunks", "number"),
                ],
            );
            assert_eq!((&found["ok"], &found["problems"]), (&json!(true), &json!([])), "{name}");
            assert!(found["chunks"].as_u64() > Some(0), "{name}: {found}");
        }
        ok(&["verify", &checkpoint(name)]);
    }
    let folder = scratch("cli-verify");
    let copy = folder.join("c");
    copy_tree(&fixture("v1_basic/ckpt"), &copy);
    let path = text(&copy);
    let data = copy.join("state/d").read_dir().unwrap().next().unwrap().unwrap().path();
    let data_name = data.file_name().unwrap().to_str().unwrap();
    let bytes = fs::read(&data).unwrap();
    let found = |args: &[&str]| {
        let run = touchdown([&["verify", "--json"], args].concat());
        assert_eq!(run.code, Some(1), "{args:?}: {}", run.stderr);
        let found = parsed(&run.stdout);
        assert_eq!(found["ok"], false);
        for problem in found["problems"].as_array().unwrap() {
            has_all(
                problem,
                &[
                    ("item", "string"),
                    ("leaf", "string|null"),
                    ("file", "string|null"),
                    ("offset", "number|null"),
                    ("data_affected", "bool"),
                    ("message", "string"),
                ],
            );
        }
        found["problems"][0].clone()
    };
    // Nodes that are cut short, changed or missing are found without reading values.
    for damage in [Some(bytes[..bytes.len() / 2].to_vec()), Some(vec![0; bytes.len()]), None] {
        match damage {
            Some(damage) => fs::write(&data, damage).unwrap(),
            None => fs::remove_file(&data).unwrap(),
        }
        let problem = found(&[&path]);
        assert!(problem["message"].as_str().unwrap().contains(data_name), "{problem}");
        let run = touchdown(["verify", &path]);
        assert!(run.code == Some(1) && run.stdout.contains(data_name), "{run:?}");
    }
    fs::write(&data, &bytes).unwrap();
    ok(&["verify", &path, "--deep"]);
    // A value's damage is found by reading it; leaf, file and offset are named. In a database and in files.
    let composite = folder.join("composite");
    copy_tree(&fixture("v0_composite/ckpt"), &composite);
    let composite_text = text(&composite);
    let listed = object(&["kv", &composite_text, "--item", "nk/np_random_key", "--json"]);
    let chunk = listed["keys"].as_array().unwrap().iter().find(|entry| entry["key"] == "1/0").expect("a chunk");
    assert_eq!(chunk["inline"], false, "the fixture proves nothing");
    let file = composite.join(chunk["file"].as_str().unwrap());
    let mut changed = fs::read(&file).unwrap();
    let (offset, length) = (chunk["offset"].as_u64().unwrap(), chunk["length"].as_u64().unwrap());
    changed[offset as usize..(offset + length) as usize].fill(0xff);
    fs::write(&file, &changed).unwrap();
    ok(&["verify", &composite_text]);
    let problem = found(&[&composite_text, "--deep"]);
    assert_eq!((&problem["item"], &problem["leaf"]), (&json!("nk/np_random_key"), &json!("1")), "{problem}");
    assert!(problem["file"].as_str().unwrap().ends_with(file.file_name().unwrap().to_str().unwrap()), "{problem}");
    assert!((offset..offset + length).contains(&problem["offset"].as_u64().expect("an offset")), "{problem}");
    refused(3, &["load", &composite_text, "--item", "nk/np_random_key", "--only", "1"]);
    ok(&["load", &composite_text, "--item", "nk/np_random_key", "--skip", "1"]);
    let files = folder.join("files");
    copy_tree(&fixture("zarr3_codecs/ckpt"), &files);
    let chunk = biggest_file(&files.join("zstd_checksum/c"));
    let mut changed = fs::read(&chunk).unwrap();
    changed.pop();
    fs::write(&chunk, &changed).unwrap();
    let problem = found(&[&text(&files), "--deep"]);
    assert_eq!(problem["leaf"], "zstd_checksum", "{problem}");
    assert!(problem["file"].as_str().unwrap().contains("zstd_checksum/c"), "{problem}");
    // Advice that cannot be used is a problem, and no value is affected.
    fs::write(copy.join("state/_sharding"), "{").unwrap();
    let run = touchdown(["verify", &path, "--json"]);
    assert_eq!((run.code, &parsed(&run.stdout)["problems"][0]["data_affected"]), (Some(1), &json!(false)));
    // A note on stderr that nobody reads is no reason to fail.
    let mut quiet = program(["ls", &path]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(quiet.stdout(Stdio::null()).stderr(writer).status().unwrap().code(), Some(0));
    refused(3, &["verify", &text(&folder.join("nothing"))]);
    fs::remove_dir_all(&folder).unwrap();
}

fn biggest_file(folder: &Path) -> PathBuf {
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push((path.metadata().unwrap().len(), path));
            }
        }
    }
    found.into_iter().max().expect("a file").1
}

#[test]
fn diff_says_equal_or_what_differs() {
    let folder = scratch("cli-diff");
    let basic = checkpoint("v1_basic");
    let same = object(&["diff", &basic, &basic, "--json"]);
    assert_eq!(same, json!({"schema": 1, "same": true, "equal": 12, "only_a": [], "only_b": [], "different": []}));
    ok(&["diff", &basic, &basic]);
    let (a, b) = (folder.join("a.safetensors"), folder.join("b.safetensors"));
    safetensors(
        &a,
        &[
            ("v", "U8", &[3], &[1, 2, 3]),
            ("t", "U8", &[1], &[0]),
            ("s", "U8", &[1], &[0]),
            ("x", "U8", &[1], &[0]),
            ("same", "F32", &[1], &little_endian(&[f32::NAN])),
        ],
    );
    safetensors(
        &b,
        &[
            ("v", "U8", &[3], &[1, 9, 9]),
            ("t", "I8", &[1], &[0]),
            ("s", "U8", &[1, 1], &[0]),
            ("y", "U8", &[1], &[0]),
            ("same", "F32", &[1], &little_endian(&[f32::NAN])),
        ],
    );
    let run = touchdown(["diff", &text(&a), &text(&b), "--json"]);
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), ""));
    let found = parsed(&run.stdout);
    assert_eq!(
        (&found["same"], &found["equal"], &found["only_a"], &found["only_b"]),
        (&json!(false), &json!(1), &json!(["x"]), &json!(["y"]))
    );
    let what =
        |path: &str| found["different"].as_array().unwrap().iter().find(|one| one["path"] == path).unwrap().clone();
    assert_eq!([&what("v")["what"], &what("t")["what"], &what("s")["what"]], ["value", "dtype", "shape"]);
    assert_eq!(what("v")["elements"], 2);
    let run = touchdown(["diff", &text(&a), &text(&b)]);
    assert!(run.code == Some(1) && run.stdout.contains("v: value"), "{run:?}");
    assert_eq!(touchdown(["diff", &basic, &checkpoint("v1_prng")]).code, Some(1));
    refused(3, &["diff", &basic, &text(&folder.join("nothing"))]);
    refused(2, &["diff", &basic]);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn steps_are_listed_and_pruned() {
    let root = scratch("steps");
    copy_tree(&fixture("v1_training_steps").join("ckpt"), &root);
    let path = text(&root);
    fs::create_dir(root.join("20.orbax-checkpoint-tmp")).unwrap();
    fs::create_dir(root.join("7.orbax-checkpoint-tmp-touchdown-00")).unwrap();
    copy_tree(&root.join("10"), &root.join("15"));
    let manifest = root.join("15/state/manifest.ocdbt");
    let bytes = fs::read(&manifest).unwrap();
    fs::write(&manifest, &bytes[..bytes.len() / 2]).unwrap();
    fs::write(root.join("15/metrics/metrics"), "{").unwrap();
    let told = object(&["steps", &path, "--json"]);
    has_all(&told, &[("latest", "number"), ("custom_metadata", "null"), ("steps", "list"), ("leftovers", "list")]);
    let names = |told: &Value, field: &str| -> Vec<String> {
        told[field].as_array().unwrap().iter().map(|step| step["name"].as_str().unwrap().to_owned()).collect()
    };
    let left = "7.orbax-checkpoint-tmp-touchdown-00";
    assert_eq!(names(&told, "steps"), ["0", "5", left, "10", "15", "20.orbax-checkpoint-tmp"]);
    assert_eq!((&told["latest"], told["leftovers"].as_array().unwrap().len()), (&json!(10), 1));
    for step in told["steps"].as_array().unwrap() {
        has_all(
            step,
            &[
                ("step", "number"),
                ("state", "string"),
                ("time", "string"),
                ("bytes", "number"),
                ("items", "list"),
                ("init_ns", "number|null"),
                ("commit_ns", "number|null"),
                ("metrics", "object|null"),
                ("custom_metadata", "any"),
            ],
        );
        assert_eq!(step["state"] == "whole", step.get("reason").is_none(), "{step}");
    }
    let ten = &told["steps"][3];
    assert_eq!(
        (&ten["metrics"], &ten["time"]),
        (&json!({"loss": 0.09090909090909091}), &json!("2026-11-23T14:32:30Z"))
    );
    assert_eq!(ten["items"], json!([{"name": "state", "kind": "tree"}]));
    assert!(told["steps"][4]["reason"].as_str().unwrap().contains("manifest.ocdbt is cut short"));
    assert!(told["steps"][4]["metrics_error"].as_str().unwrap().contains("not valid"));
    let shown = ok(&["steps", &path]);
    assert!(shown.starts_with("step ") && shown.contains("6 steps, 3 whole, latest 10"), "{shown}");
    assert!(ok(&["steps", &path, "--deep"]).contains("6 steps, 3 whole"));
    // A bit of a database's node, which no listing shows.
    let data = fs::read_dir(root.join("5/state/d")).unwrap().map(|entry| entry.unwrap().path());
    for file in data {
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
    }
    assert!(ok(&["steps", &path]).contains("6 steps, 2 whole"));
    assert!(refused(3, &["steps", &checkpoint("v1_basic")]).contains("no steps"));
    assert!(refused(3, &["steps", &text(&root.join("none"))]).contains("no such directory"));

    assert!(refused(2, &["prune", &path]).contains("--keep-latest"));
    refused(2, &["prune", &path, "--keep-every", "0"]);
    assert!(refused(3, &["prune", &path, "--keep-latest", "1", "--prefix", "x"]).contains("no steps"));
    let args = ["prune", &path, "--keep-latest", "1", "--keep-best", "1:loss", "--json"];
    let dry = object(&[&args[..], &["--dry-run"]].concat());
    has_all(
        &dry,
        &[
            ("dry_run", "bool"),
            ("kept", "list"),
            ("removed", "list"),
            ("skipped", "list"),
            ("bytes", "number"),
            ("restored", "list"),
            ("leftovers", "list"),
            ("failed", "list"),
        ],
    );
    let removed = names(&dry, "removed");
    assert_eq!(names(&dry, "kept"), ["0", "10"]);
    assert!(root.join(left).exists() && !root.join(".touchdown-lock").exists(), "a dry run only reads");
    let done = object(&args);
    for (field, told) in done.as_object().unwrap().iter().filter(|(field, _)| *field != "dry_run") {
        assert_eq!(told, &dry[field], "a dry run tells what is done: {field}");
    }
    assert_eq!(done["leftovers"], json!([text(&root.join(left))]));
    assert!(removed.iter().all(|name| !root.join(name).exists()) && !root.join(left).exists());
    assert!(root.join("15").exists() && root.join("20.orbax-checkpoint-tmp").exists(), "what is not whole stays");
    // Never the only whole one, and never beside another series unasked.
    assert!(ok(&["prune", &path, "--keep-latest", "0"]).contains("1 kept, 1 removed"));
    copy_tree(&root.join("10"), &root.join("ema_10"));
    assert!(refused(2, &["prune", &path, "--keep-latest", "0"]).contains("several series"));
    assert!(ok(&["prune", &path, "--keep-latest", "0", "--prefix", "ema"]).contains("1 kept, 0 removed"));
    // Another writer has it.
    let lock = fs::File::open(root.join(".touchdown-lock")).unwrap();
    lock.lock().unwrap();
    assert!(refused(4, &["prune", &path, "--keep-latest", "1", "--prefix", ""]).contains("another writer"));
    assert!(ok(&["prune", &path, "--keep-latest", "1", "--prefix", "", "--dry-run"]).contains("1 kept"));
}

/// A root whose newest step lacks its data files: no listing shows it.
fn root_with_a_damaged_step(name: &str) -> std::path::PathBuf {
    let root = scratch(name);
    copy_tree(&fixture("v1_training_steps").join("ckpt"), &root);
    for dir in ["10/state/d", "10/state/ocdbt.process_0/d"].map(|dir| root.join(dir)) {
        if dir.exists() {
            fs::remove_dir_all(dir).unwrap();
        }
    }
    root
}

#[test]
fn a_step_that_is_passed_over_is_told() {
    let root = root_with_a_damaged_step("cli-passed-over");
    let path = text(&root);
    fs::create_dir(root.join("20.orbax-checkpoint-tmp")).unwrap();
    let notes = |args: &[&str]| -> Vec<String> {
        let run = touchdown(args);
        assert_eq!(run.code, Some(0), "{args:?}: {}", run.stderr);
        run.stderr.lines().filter(|line| line.starts_with("note: step")).map(str::to_owned).collect()
    };
    for verb in [&["ls"][..], &["load"], &["plan"], &["cat", "step"], &["bench", "--rounds", "1"], &["kv"]] {
        let args = [&[verb[0], &path], &verb[1..]].concat();
        let told = notes(&args);
        let [ten, twenty, used] = &told[..] else { panic!("{verb:?}: {told:?}") };
        assert!(ten.starts_with("note: step 10 was passed over: ") && ten.contains("missing"), "{ten}");
        assert!(twenty.starts_with("note: step 20.orbax-checkpoint-tmp was passed over: its save was not"), "{twenty}");
        assert_eq!(used, "note: step 5 is used");
        assert!(notes(&[&args[..], &["--quiet"]].concat()).is_empty(), "{verb:?}");
        assert!(notes(&[&args[..], &["--step", "5"]].concat()).is_empty(), "a step that was named: {verb:?}");
    }
    let to = tempfile::tempdir().unwrap();
    assert_eq!(notes(&["convert", &path, &text(&to.path().join("new")), "--to", "orbax"]).len(), 3);
    // The best by the metric is damaged, too; and of a root that is whole nothing is told.
    let told = object(&["load", &path, "--step", "best:-loss", "--json"]);
    let names: Vec<&str> =
        told["passed_over"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!((&told["step"], names), (&json!(5), vec!["10", "20.orbax-checkpoint-tmp"]));
    assert!(told["passed_over"][0]["reason"].as_str().unwrap().contains("missing"), "{told}");
    let whole = object(&["load", &checkpoint("v1_training_steps"), "--json"]);
    assert_eq!((&whole["step"], &whole["passed_over"]), (&json!(10), &json!([])));
    assert!(object(&["load", &checkpoint("v1_basic"), "--json"]).get("step").is_none());
    // `ls` has the reason among all steps, `steps` the same latest; `verify` looks at the damaged step.
    let listed = object(&["ls", &path, "--json"]);
    let ten = listed["steps"].as_array().unwrap().iter().find(|step| step["name"] == "10").unwrap();
    assert!(ten["state"] == "incomplete" && ten["reason"].as_str().unwrap().contains("missing"), "{listed}");
    assert_eq!(object(&["steps", &path, "--json"])["latest"], 5);
    let verified = touchdown(["verify", &path]);
    assert!(verified.code == Some(1) && verified.stdout.contains("missing"), "{}", verified.stdout);
    fs::remove_dir_all(&root).unwrap();
}

#[test]
fn diff_compares_steps() {
    let root = checkpoint("v1_training_steps");
    let different = |args: &[&str]| -> Value {
        let run = touchdown([&["diff", &root, &root, "--json"], args].concat());
        assert!(matches!(run.code, Some(0 | 1)), "{args:?}: {}", run.stderr);
        let told: Value = serde_json::from_str(&run.stdout).unwrap();
        told["different"].as_array().unwrap().iter().find(|row| row["path"] == "step").cloned().unwrap_or(Value::Null)
    };
    assert_eq!(different(&["--step", "5"]), Value::Null, "one for both");
    for args in [["--step", "5", "--step", "latest"], ["--step", "5", "--step", "best:-loss"]] {
        let row = different(&args);
        assert!(row["a"].to_string().contains('5') && row["b"].to_string().contains("10"), "{row}");
    }
    let basic = checkpoint("v1_basic");
    assert!(refused(2, &["diff", &root, &basic, "--step", "5"]).contains("no step root"));
    assert!(refused(2, &["diff", &root, &root, "--step", "1.5"]).contains("no step"));
    assert!(refused(2, &["diff", &root, &root, "--step=5", "--step=5", "--step=5"]).contains("too many steps"));
    refused(2, &["diff", &root, &root, "--step=-5"]);
    let damaged = root_with_a_damaged_step("cli-diff-steps");
    let run = touchdown(["diff", &format!("{root}/5"), &text(&damaged)]);
    assert!(run.code == Some(0) && run.stderr.contains("note: step 10 was passed over"), "{run:?}");
    fs::remove_dir_all(&damaged).unwrap();
}

#[test]
fn what_is_damaged_or_stuck_in_a_root_does_not_hide_the_rest() {
    use std::os::unix::fs::PermissionsExt;
    let root = scratch("cli-stuck");
    copy_tree(&fixture("v1_training_steps").join("ckpt"), &root);
    let path = text(&root);
    fs::create_dir_all(root.join("metadata")).unwrap();
    fs::write(root.join("metadata/_ROOT_METADATA"), "{").unwrap();
    let told = object(&["steps", &path, "--json"]);
    assert_eq!((&told["latest"], &told["custom_metadata"]), (&json!(10), &Value::Null));
    assert!(told["custom_metadata_error"].as_str().unwrap().contains("_ROOT_METADATA"), "{told}");
    assert!(ok(&["steps", &path]).contains("the root's metadata cannot be read"));
    assert_eq!(object(&["ls", &path, "--json"])["step"], 10);
    // A leftover that cannot be removed, unless one may do everything.
    let (left, stuck) = ("7.orbax-checkpoint-tmp-touchdown-00", root.join("7.orbax-checkpoint-tmp-touchdown-00/stuck"));
    fs::create_dir_all(&stuck).unwrap();
    fs::write(stuck.join("file"), "").unwrap();
    fs::set_permissions(&stuck, fs::Permissions::from_mode(0o500)).unwrap();
    let may_do_all = fs::write(stuck.join("other"), "").is_ok();
    let run = touchdown(["prune", &path, "--keep-latest", "1", "--json"]);
    let told: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(told["removed"].as_array().unwrap().len(), 2, "{told}");
    if may_do_all {
        println!("skipped: a directory that cannot be changed (this user may change all)");
        assert_eq!((run.code, root.join(left).exists()), (Some(0), false));
    } else {
        assert!(run.code == Some(4) && run.stderr.contains(left) && run.stderr.contains("hint:"), "{}", run.stderr);
        assert!(told["failed"][0]["path"].as_str().unwrap().ends_with(left), "{told}");
        fs::set_permissions(&stuck, fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::remove_dir_all(&root).unwrap();
}

#[test]
fn doctor_tells_about_this_machine() {
    let told = object(&["doctor", "--json"]);
    has_all(
        &told,
        &[
            ("version", "string"),
            ("cores", "number"),
            ("io", "object"),
            ("limits", "object"),
            ("cuda", "object"),
            ("codecs", "list"),
        ],
    );
    has_all(&told["io"], &[("pread", "bool"), ("uring", "bool"), ("uring_detail", "string")]);
    has_all(&told["cuda"], &[("state", "string"), ("detail", "string"), ("devices", "number")]);
    assert!(
        ["zstd", "gzip", "bz2", "blosc"].iter().all(|codec| told["codecs"].as_array().unwrap().contains(&json!(codec)))
    );
    assert!(ok(&["doctor"]).contains("CUDA"));
}

// ---------------------------------------------------------------- the program

#[test]
fn exit_codes_tell_whose_fault_it_is() {
    let folder = scratch("cli-codes");
    let basic = checkpoint("v1_basic");
    // 2: usage.
    for args in [
        &["lss"][..],
        &["ls"],
        &["ls", &basic, "--jason"],
        &["ls", &basic, "--color", "green"],
        &["completions", "tcl"],
    ] {
        refused(2, args);
    }
    assert_eq!(touchdown::<&str>([]).code, Some(2));
    // 3: the path, or what is in it.
    let message = refused(3, &["ls", &text(&folder.join("nothing"))]);
    assert!(message.contains("nothing"), "{message}");
    refused(3, &["ls", &text(&folder)]);
    refused(3, &["load", "/dev/null"]);
    refused(3, &["ls", &format!("{basic}/orbax.checkpoint/x")]);
    std::os::unix::fs::symlink("loop", folder.join("loop")).unwrap();
    refused(3, &["ls", &text(&folder.join("loop"))]);
    let fifo = folder.join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    refused(3, &["ls", &text(&fifo)]);
    let copy = |name: &str, change: &dyn Fn(&Path)| {
        let to = folder.join(name);
        copy_tree(&fixture("v1_basic/ckpt"), &to);
        change(&to.join("state"));
        text(&to)
    };
    let manifest = |state: &Path| state.join("manifest.ocdbt");
    refused(3, &["load", &copy("removed", &|state| fs::remove_dir_all(state.join("d")).unwrap())]);
    refused(3, &["load", &copy("empty", &|state| fs::write(manifest(state), []).unwrap())]);
    refused(
        3,
        &[
            "load",
            &copy("dir", &|state| {
                fs::remove_file(manifest(state)).unwrap();
                fs::create_dir(manifest(state)).unwrap();
            }),
        ],
    );
    refused(
        3,
        &[
            "load",
            &copy("fifo2", &|state| {
                fs::remove_file(manifest(state)).unwrap();
                assert!(Command::new("mkfifo").arg(manifest(state)).status().unwrap().success());
            }),
        ],
    );
    let message = refused(
        3,
        &[
            "load",
            &copy("crc", &|state| {
                let mut bytes = fs::read(manifest(state)).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(manifest(state), bytes).unwrap();
            }),
        ],
    );
    assert!(message.contains("manifest.ocdbt"), "{message}");
    // 4: the environment. Too few files; a full disk.
    let mut starved = Command::new("sh");
    starved.args(["-c", "ulimit -n 4; exec \"$0\" load \"$1\"", env!("CARGO_BIN_EXE_touchdown"), &basic]);
    let run = finish(starved, Duration::from_secs(60));
    assert!(run.code == Some(4) && run.error().starts_with("error: "), "{run:?}");
    if Path::new("/dev/full").exists() {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = program(["ls", &basic]).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "no space on stdout");
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: "));
    }
    refused(4, &["load", &basic, "--dump", "/proc/nowhere"]);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn errors_have_causes_and_hints_on_their_own_lines() {
    let folder = scratch("cli-errors");
    let run = touchdown(["load", &checkpoint("v1_basic"), "--target", &text(&folder.join("none.json"))]);
    let lines: Vec<&str> = run.stderr.lines().collect();
    assert!(lines[0].starts_with("error: ") && lines[1].starts_with("caused by: "), "{lines:?}");
    let message = refused(2, &["ls", &checkpoint("v1_basic"), "--item", "x"]);
    assert!(!message.contains('\u{1b}'), "no colour where stderr is no terminal: {message:?}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn colour_is_where_it_is_asked_for() {
    let stderr = |color: &[&str], no_color: Option<&str>| {
        let mut command = program([&["load", "/nowhere/at/all"], color].concat());
        match no_color {
            Some(value) => command.env("NO_COLOR", value),
            None => command.env_remove("NO_COLOR"),
        };
        finish(command, Duration::from_secs(60)).stderr
    };
    assert!(stderr(&["--color", "always"], None).contains("\u{1b}["));
    assert!(stderr(&["--color", "always"], Some("1")).contains("\u{1b}["), "a flag is stronger than the environment");
    for plain in [stderr(&[], None), stderr(&["--color", "auto"], Some("1")), stderr(&["--color", "never"], None)] {
        assert!(plain.starts_with("error: ") && !plain.contains('\u{1b}'), "{plain:?}");
    }
}

#[test]
fn bench_measures_loads_beside_limits() {
    let found = object(&["bench", &checkpoint("quickstart"), "--rounds", "2", "--devices", "cpu:4", "--json"]);
    has_all(
        &found,
        &[("cold", "bool"), ("workers", "number"), ("startup", "number"), ("largest_unit_seconds", "number")],
    );
    let names = |field: &str| -> Vec<String> {
        let rows = found[field].as_array().unwrap().iter();
        rows.map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    };
    let machine = ["read", "decode, one core", "decode, all cores", "write fresh memory", "copy memory"];
    assert_eq!(names("machine"), machine);
    assert_eq!(names("loads").len(), 5, "{:?}", names("loads"));
    for row in found["machine"].as_array().unwrap().iter().chain(found["loads"].as_array().unwrap()) {
        let figures = ["bytes", "seconds", "gb_per_second", "cpu_seconds_per_gb"];
        assert!(figures.iter().all(|field| row[*field].is_number()), "{row}");
        assert!(row["seconds"].as_f64() > Some(0.0) && row["bytes"].as_u64() > Some(0), "{row}");
        assert_eq!(row["samples"].as_array().unwrap().len(), 2, "{row}");
    }
    for load in found["loads"].as_array().unwrap() {
        has_all(load, &[("limit_seconds", "number"), ("limited_by", "string"), ("fraction_of_limit", "number")]);
        has_all(load, &[("stages", "object"), ("bytes_read", "number"), ("peak_host_bytes", "number")]);
    }
    // The part of the columns is a part of the whole.
    let whole = &found["loads"][0];
    assert!(found["loads"][2]["bytes"].as_u64() < whole["bytes"].as_u64(), "{found}");
    assert!(refused(2, &["bench", &checkpoint("quickstart"), "--rounds", "0"]).contains("rounds"));
}

#[test]
fn help_shows_an_example_that_works() {
    // In a folder of its own that has the fixtures: examples write files.
    let folder = scratch("examples");
    for name in ["quickstart", "v1_basic", "v1_training_steps", "v0_unmerged"] {
        copy_tree(&fixture(name), &folder.join("tests/fixtures").join(name));
    }
    let help = ok(&["--help"]);
    let verbs: Vec<&str> = help
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| line.starts_with("  "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help" && verb.chars().all(|c| c.is_ascii_lowercase()))
        .collect();
    assert!(
        [
            "ls",
            "load",
            "plan",
            "convert",
            "cat",
            "kv",
            "verify",
            "seal",
            "repair",
            "diff",
            "steps",
            "prune",
            "bench",
            "doctor",
            "completions",
        ]
        .iter()
        .all(|verb| verbs.contains(verb)),
        "{verbs:?}"
    );
    let mut examples = 0;
    for verb in verbs {
        let help = ok(&[verb, "--help"]);
        let shown: Vec<&str> = help
            .lines()
            .filter_map(|line| line.trim().strip_prefix("touchdown "))
            .filter(|line| line.starts_with(verb))
            .collect();
        assert!(!shown.is_empty() && help.contains("Example"), "{verb}: no example:\n{help}");
        for example in shown {
            let args = words(example.split(" > ").next().unwrap_or_default());
            let run = Command::new(env!("CARGO_BIN_EXE_touchdown")).args(&args).current_dir(&folder).output().unwrap();
            let expected = if verb == "diff" { 1 } else { 0 };
            let said = String::from_utf8_lossy(&run.stderr);
            assert_eq!(run.status.code(), Some(expected), "{example}: {said}");
            examples += 1;
        }
        assert!(!ok(&[verb, "-h"]).is_empty());
    }
    println!("{examples} examples");
    assert!(ok(&["--version"]).starts_with("touchdown "));
}

/// Words as a shell splits them, with single quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (number, part) in line.split('\'').enumerate() {
        if number % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}

#[test]
fn completions_are_scripts_of_their_shell() {
    for (shell, marks) in [("bash", "complete -F"), ("zsh", "#compdef touchdown"), ("fish", "complete -c touchdown")] {
        let script = ok(&["completions", shell]);
        assert!(script.contains(marks) && script.contains("--slice") | script.contains("slice"), "{shell}");
        let checker = if shell == "fish" { "fish" } else { shell };
        let file = scratch("cli-completions").join(shell);
        fs::write(&file, script).unwrap();
        match Command::new(checker).arg("-n").arg(&file).output() {
            Ok(output) => assert!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr)),
            Err(_) => println!("skipped: the syntax of {shell}'s completions ({shell} is not here)"),
        }
        fs::remove_dir_all(file.parent().unwrap()).unwrap();
    }
}

/// A checkpoint whose listing does not fit into a pipe.
fn long_listing(folder: &Path) -> String {
    let names: Vec<String> = (0..4000).map(|number| format!("layer_{number}/a_rather_long_name_of_a_kernel")).collect();
    let tensors: Vec<(&str, &str, &[u64], &[u8])> =
        names.iter().map(|name| (name.as_str(), "U8", &[1][..], &[0_u8][..])).collect();
    let file = folder.join("long.safetensors");
    safetensors(&file, &tensors);
    text(&file)
}

#[test]
fn a_broken_pipe_is_no_failure() {
    let folder = scratch("cli-pipe");
    let long = long_listing(&folder);
    for args in [&["ls", long.as_str()][..], &["ls", &long, "--json"], &["plan", &long]] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut child = program(args).stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let mut some = [0; 10];
        reader.read_exact(&mut some).unwrap();
        drop(reader);
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""), "{args:?}");
    }
    let script = "set -o pipefail; \"$0\" ls \"$1\" --json | head -c 10 >/dev/null";
    let status = Command::new("bash").args(["-c", script, env!("CARGO_BIN_EXE_touchdown"), &long]).status();
    if let Ok(status) = status {
        assert_eq!(status.code(), Some(0));
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn signals_end_it_with_their_codes() {
    let folder = scratch("cli-signals");
    let long = long_listing(&folder);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        // Nobody reads the pipe beyond its first byte, so it is in the middle of its work.
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut child = program(["ls", &long, "--json"]).stdin(Stdio::null()).stdout(writer).spawn().unwrap();
        reader.read_exact(&mut [0]).unwrap();
        let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("SIG{signal} did not end it");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        assert_eq!(status.code(), Some(code), "SIG{signal}");
    }
    fs::remove_dir_all(&folder).unwrap();
}
