//! Checkpoints whose metadata this crate writes and whose arrays TensorStore writes, loaded by the real Orbax; safetensors
//! headers, loaded by the real package.
//!
//! `TOUCHDOWN_LAYOUT_SEED` and `TOUCHDOWN_LAYOUT_COUNT` choose other and more trees. A failure leaves its files in place.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod support;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use support::dump::{Comparison, compare_dumps};
use support::{number_from_environment, python, read_json, run_python, scratch, touchdown};
use touchdown::layout::orbax::array_metadata::{self, ArrayMetadata};
use touchdown::layout::orbax::checkpoint::{self, CheckpointMetadata};
use touchdown::layout::orbax::metadata::{Container, Entry, TreeMetadata, ValueType, param_name};
use touchdown::layout::orbax::metadata_write::member_name;
use touchdown::layout::orbax::names::{Storage, check_item_name, check_tree};
use touchdown::layout::orbax::sharding::{self, SavedMesh, SavedSharding};
use touchdown::layout::orbax::{json as orbax_json, strings};
use touchdown::layout::safetensors::header::{dtype_name, packed_bits, stored_bytes};
use touchdown::layout::safetensors::index::Index;
use touchdown::layout::safetensors::write::{NewTensor, file_name, index_bytes, new_file};
use touchdown::{DType, KeyPath};

#[test]
fn orbax_loads_what_is_written() {
    let Some(python) = python("orbax_loads_what_is_written") else {
        return;
    };
    let seed = number_from_environment("TOUCHDOWN_LAYOUT_SEED", 1).to_string();
    let count = number_from_environment("TOUCHDOWN_LAYOUT_COUNT", 25);
    let folder = scratch("save-layout");
    let out = folder.join("cases");
    let oracle = |verb: &str| {
        let (out, count) = (out.to_str().expect("a UTF-8 target directory"), count.to_string());
        run_python(&python, "oracle.py", [verb, "--seed", &seed, "--count", &count, "--out", out])
    };
    oracle("layout-describe");
    for number in 0..count {
        write_checkpoint(&out.join(number.to_string()));
    }
    print!("seed {seed}: {}", oracle("layout-judge"));
    let mut compared = Comparison::default();
    for number in 0..count {
        let case = out.join(number.to_string());
        let path = |name: &str| case.join(name).display().to_string();
        let run = touchdown(["load", &path("ckpt"), "--item", "state", "--devices", "cpu:1", "--dump", &path("got")]);
        assert_eq!(run.code, Some(0), "{}: {}", case.display(), run.error());
        compared.add(compare_dumps(&case.join("want"), &case.join("got")));
        let opened = touchdown::open(case.join("ckpt")).expect("the checkpoint opens");
        let facts = read_json(&case.join("leaves.json"));
        assert_eq!(opened.custom_metadata(), Some(&facts["custom"]), "{}", case.display());
    }
    println!("{} leaves, {} bytes compared", compared.leaves, compared.bytes);
    assert!(compared.differences.is_empty(), "{}:\n{}", out.display(), compared.differences.join("\n"));
    assert!(compared.leaves > 0 && compared.bytes > 0, "nothing was compared");
    fs::remove_dir_all(&folder).expect("the cases can be removed");
}

/// Every file of a v1 checkpoint but the arrays, and the names of the arrays.
fn write_checkpoint(case: &Path) {
    let facts = read_json(&case.join("leaves.json"));
    let leaves = facts["leaves"].as_array().expect("leaves");
    let is_ocdbt = facts["ocdbt"] == true;
    let mut metadata = TreeMetadata {
        custom_text: None,
        entries: leaves.iter().map(entry).collect(),
        use_ocdbt: Some(is_ocdbt),
        use_zarr3: facts["zarr3"].as_bool(),
        every_chunk_stored: true,
        custom_metadata: None,
        containers: facts["containers"].as_array().expect("containers").iter().map(container).collect(),
    };
    let storage = if is_ocdbt { Storage::Ocdbt } else { Storage::Files };
    assert_eq!(check_tree(&metadata.entries, storage), Ok(()));
    let (mut names, mut texts, mut shardings, mut records) = (Map::new(), Vec::new(), HashMap::new(), Vec::new());
    for (position, (leaf, entry)) in leaves.iter().zip(&metadata.entries).enumerate() {
        let name = param_name(&entry.path);
        if entry.value_type.is_array() {
            names.insert(position.to_string(), Value::from(name.clone()));
        }
        if let Some(text) = leaf["text"].as_str() {
            texts.push((name.clone(), text));
        }
        if entry.value_type == ValueType::JaxArray {
            shardings.insert(name.clone(), saved_sharding(&leaf["sharding"]));
            let shape = entry.write_shape.clone();
            let random_key_impl = leaf["key_impl"].as_str().map(str::to_owned);
            records.push((name, ArrayMetadata { write_shape: shape.clone(), chunk_shape: shape, random_key_impl }));
        }
    }
    // Whatever the order that is given, it must be JAX's in the end; only the fields of namedtuples keep theirs.
    metadata.entries.reverse();
    let fields_first = |entry: &Entry| {
        metadata
            .containers
            .iter()
            .all(|(path, kind)| *kind != Container::NamedTuple || !entry.path.0.starts_with(&path.0))
    };
    let (mut entries, mut in_namedtuples): (Vec<_>, Vec<_>) = metadata.entries.iter().cloned().partition(fields_first);
    in_namedtuples.reverse();
    entries.extend(in_namedtuples);
    metadata.entries = entries;
    metadata.sort();

    let state = case.join("ckpt/state");
    fs::create_dir_all(state.join("array_metadatas")).unwrap();
    fs::create_dir_all(case.join("ckpt/config")).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(case.join("ckpt").join(name), bytes).unwrap();
    write("state/_METADATA", &metadata.to_bytes());
    write("state/_sharding", &sharding::to_bytes(&shardings));
    let records = records.iter().map(|(name, record)| (name.as_str(), record));
    write("state/array_metadatas/process_0", &array_metadata::to_bytes(records));
    let texts = texts.iter().map(|(name, text)| (name.as_str(), *text));
    write("state/_strings.json", &strings::to_bytes(texts).unwrap());
    write("config/data.json", &orbax_json::to_bytes(&facts["config"]));
    write("config/metadata", &orbax_json::to_bytes(&facts["config"]));
    for item in ["state", "config"] {
        assert_eq!(check_item_name(item), Ok(()));
    }
    let handlers = [("state", checkpoint::TREE_HANDLER), ("config", checkpoint::JSON_HANDLER)];
    let of_checkpoint = CheckpointMetadata {
        custom_text: None,
        item_handlers: handlers.map(|(name, class)| (name.to_owned(), class.to_owned())).into(),
        init_ns: Some(1_795_527_528_423_193_600),
        commit_ns: Some(1_795_527_528_545_887_154),
        custom_metadata: Some(facts["custom"].clone()),
    };
    write(checkpoint::METADATA_FILE, &of_checkpoint.to_bytes());
    write(checkpoint::V1_MARKER, b"");
    write(checkpoint::COMMIT_FILE, checkpoint::commit_text(case.join("ckpt").display()).as_bytes());
    fs::write(case.join("names.json"), Value::Object(names).to_string()).unwrap();
}

fn entry(leaf: &Value) -> Entry {
    let mut entry = Entry::new(key_path(&leaf["path"]), ValueType::from_name(leaf["type"].as_str().unwrap()));
    entry.write_shape = leaf.get("write_shape").map(|shape| serde_json::from_value(shape.clone()).unwrap());
    entry
}

fn key_path(path: &Value) -> KeyPath {
    serde_json::from_value(path.clone()).expect("a path is a list of names and positions")
}

fn container(row: &Value) -> (KeyPath, Container) {
    let kind = if row[1] == "Tuple" { Container::Tuple } else { Container::NamedTuple };
    (key_path(&row[0]), kind)
}

fn saved_sharding(told: &Value) -> SavedSharding {
    if let Some(device) = told["device"].as_str() {
        return SavedSharding::Single { device: device.to_owned() };
    }
    let field = |name: &str| told[name].clone();
    let mesh = SavedMesh {
        axes: serde_json::from_value(field("axes")).unwrap(),
        shape: serde_json::from_value(field("shape")).unwrap(),
        device_ids: serde_json::from_value(field("devices")).unwrap(),
    };
    SavedSharding::Named { mesh: Arc::new(mesh), spec: serde_json::from_value(field("spec")).unwrap() }
}

/// Every character as a key, quoted as Python quotes it.
#[test]
fn names_are_quoted_as_python_quotes_them() {
    let Some(python) = python("names_are_quoted_as_python_quotes_them") else {
        return;
    };
    let folder = scratch("save-layout-reprs");
    let told: Map<String, Value> = ('\0'..=char::MAX)
        .map(|char| (u32::from(char).to_string(), member_name(&KeyPath::names([&*char.to_string()])).into()))
        .collect();
    fs::write(folder.join("reprs.json"), Value::Object(told).to_string()).unwrap();
    print!("{}", run_python(&python, "oracle.py", ["layout-reprs", "--out", folder.to_str().expect("a UTF-8 path")]));
    fs::remove_dir_all(&folder).expect("the scratch directory can be removed");
}

/// Files of our headers and arbitrary data: one of every type, one of what numpy has, an empty one, two with an index.
#[test]
fn safetensors_loads_what_is_written() {
    let Some(python) = python("safetensors_loads_what_is_written") else {
        return;
    };
    let folder = scratch("save-layout-tensors");
    let numpy = |dtype: &DType| {
        let name = dtype.name();
        ["bool", "int", "uint", "complex"].iter().any(|family| name.starts_with(family))
            || matches!(name, "float16" | "float32" | "float64")
    };
    let storable: Vec<DType> = DType::ALL.into_iter().filter(|dtype| dtype_name(*dtype).is_some()).collect();
    let with_numpy: Vec<DType> = storable.iter().copied().filter(numpy).collect();
    assert_eq!((storable.len(), with_numpy.len()), (22, 13));
    let one_note = BTreeMap::from([("format".to_owned(), "é\"\u{7f}".to_owned())]);
    let files = [
        write_tensors(&folder, "all.safetensors", &storable, one_note.clone()),
        write_tensors(&folder, "numpy.safetensors", &with_numpy, one_note),
        write_tensors(&folder, "none.safetensors", &[], BTreeMap::new()),
        write_tensors(&folder, &file_name(1, 2), &with_numpy[..4], BTreeMap::new()),
        write_tensors(&folder, &file_name(2, 2), &with_numpy[4..], BTreeMap::new()),
    ];
    let mut weight_map = BTreeMap::new();
    for file in &files[3..] {
        for tensor in file["tensors"].as_array().unwrap() {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            weight_map.insert(text(&tensor["name"]), text(&file["file"]));
        }
    }
    let index = folder.join("model.safetensors.index.json");
    fs::write(&index, index_bytes(&Index { weight_map: weight_map.clone() }, 1).unwrap()).unwrap();
    assert_eq!(touchdown::open(&index).expect("the index opens").leaves().len(), weight_map.len());
    fs::write(folder.join("tensors.json"), json!(files).to_string()).unwrap();
    print!("{}", run_python(&python, "oracle.py", ["layout-tensors", "--out", folder.to_str().expect("a UTF-8 path")]));
    fs::remove_dir_all(&folder).expect("the scratch directory can be removed");
}

/// Writes a file with three tensors of each of these types and says what is in it.
fn write_tensors(folder: &Path, name: &str, dtypes: &[DType], metadata: BTreeMap<String, String>) -> Value {
    let shapes: [&[u64]; 3] = [&[2, 4], &[0, 8], &[8]];
    let tensors = dtypes.iter().enumerate().flat_map(|(number, &dtype)| {
        shapes.iter().map(move |shape| NewTensor {
            name: format!("w{}é\"{}", (number * 7) % 10, shape.len() as u64 * 100 + shape[0] + 1000 * number as u64),
            dtype,
            shape: shape.to_vec(),
        })
    });
    let file = new_file(tensors.collect(), metadata.clone()).unwrap();
    let mut bytes = file.head.clone();
    let mut told = Vec::new();
    for tensor in &file.header.tensors {
        assert_eq!((bytes.len() as u64, Some(tensor.len)), (tensor.offset, stored_bytes(tensor.dtype, &tensor.shape)));
        let is_bool = tensor.dtype == DType::Bool;
        let data: Vec<u8> =
            (0..tensor.len).map(|byte| (byte * 37 + tensor.len) as u8 % if is_bool { 2 } else { 251 }).collect();
        bytes.extend(&data);
        let packed = packed_bits(tensor.dtype).is_some();
        told.push(json!({
            "name": tensor.name, "tag": dtype_name(tensor.dtype), "shape": tensor.shape, "bytes": data,
            "dtype": if packed { "uint8" } else { tensor.dtype.name() },
        }));
    }
    assert_eq!(bytes.len() as u64, file.size);
    fs::write(folder.join(name), bytes).unwrap();
    let metadata = (!metadata.is_empty()).then_some(metadata);
    json!({"file": name, "tensors": told, "metadata": metadata})
}
