use crate::layout::testing::Dir;

use super::*;

const METADATA: &str = r#"{"tree_metadata": {"('w',)": {"key_metadata": [{"key": "w", "key_type": 2}], "value_metadata": {"value_type": "jax.Array", "skip_deserialize": false, "write_shape": [4]}}, "('s',)": {"key_metadata": [{"key": "s", "key_type": 2}], "value_metadata": {"value_type": "string", "skip_deserialize": false}}, "('n',)": {"key_metadata": [{"key": "n", "key_type": 2}], "value_metadata": {"value_type": "None", "skip_deserialize": true}}, "('l', '0')": {"key_metadata": [{"key": "l", "key_type": 2}, {"key": "0", "key_type": 1}], "value_metadata": {"value_type": "scalar", "skip_deserialize": false}}, "('odd',)": {"key_metadata": [{"key": "odd", "key_type": 2}], "value_metadata": {"value_type": "my.Type", "skip_deserialize": false}}}, "use_ocdbt": true, "use_zarr3": true, "store_array_data_equal_to_fill_value": true, "custom_metadata": {"a": 1}}"#;
const SHARDING: &str = r#"{"dw==":"{\"sharding_type\": \"SingleDeviceSharding\", \"device_str\": \"cpu:0\"}"}"#;
const ARRAYS: &str = r#"{"array_metadatas": [{"array_metadata": {"param_name": "w", "write_shape": [4], "chunk_shape": [4], "ext_metadata": {"random_key_impl": "rbg"}}}]}"#;

fn tree(dir: &Dir) -> TreeItem {
    match dir.run(|ask| async move { read_tree(&ask, &RelPath::new("item").unwrap()).await }).unwrap() {
        TreeRead::Tree(tree) => *tree,
        other => panic!("{other:?}"),
    }
}

fn leaf(tree: &TreeItem, path: &str) -> StoredLeaf {
    tree.leaves.iter().find(|leaf| leaf.path.to_string() == path).unwrap().clone()
}

fn error(dir: &Dir) -> Error {
    dir.run(|ask| async move { read_tree(&ask, &RelPath::new("item").unwrap()).await }).unwrap_err()
}

#[test]
fn the_files_of_an_item_are_combined_in_two_batches() {
    let dir = Dir::new()
        .file("item/_METADATA", METADATA)
        .file("item/_sharding", SHARDING)
        .file("item/_strings.json", r#"{"s":"text"}"#)
        .file("item/array_metadatas/process_0", ARRAYS)
        .file("item/manifest.ocdbt", "");
    let tree = tree(&dir);
    assert_eq!(dir.batches(), 2);
    let w = leaf(&tree, "w");
    assert_eq!(w.kind, StoredKind::Stored { name: "w".into(), value_type: Some(ValueType::JaxArray) });
    assert_eq!(w.sharding, Some(SavedSharding::Single { device: "cpu:0".into() }));
    assert_eq!(w.key_impl.as_deref(), Some("rbg"));
    assert_eq!(leaf(&tree, "s").kind, StoredKind::Text("text".into()));
    assert_eq!(leaf(&tree, "n").kind, StoredKind::None);
    assert_eq!(leaf(&tree, "l/0").kind, StoredKind::Stored { name: "l.0".into(), value_type: Some(ValueType::Scalar) });
    assert!(matches!(leaf(&tree, "odd").kind, StoredKind::Unsupported { value_type, .. } if value_type == "my.Type"));
    assert_eq!((tree.use_ocdbt, tree.every_chunk_stored), (Some(true), true));
    assert_eq!(tree.custom_metadata, Some(serde_json::json!({"a": 1})));
    assert!(has_file(&tree.listing, "manifest.ocdbt") && tree.notes.is_empty());
}

#[test]
fn advice_that_cannot_be_read_stops_nothing() {
    let dir = Dir::new()
        .file("item/_METADATA", METADATA)
        .file("item/_sharding", "{")
        .file("item/array_metadatas/process_abc", "[]");
    let tree = tree(&dir);
    assert_eq!(tree.leaves.len(), 5);
    assert_eq!(tree.notes.len(), 2);
    assert!(tree.notes[0].to_string().contains("item/_sharding"), "{}", tree.notes[0]);
    assert!(tree.notes[1].to_string().contains("process_abc"), "{}", tree.notes[1]);
    assert!(
        matches!(leaf(&tree, "s").kind, StoredKind::Unsupported { reason, .. } if reason.contains("_strings.json"))
    );
}

#[test]
fn the_msgpack_file_alone_is_a_tree() {
    let mut file = vec![0x86];
    file.extend(b"\xa2ed\x80\xa1l\x92\xb1PLACEHOLDER://l.0\xb1PLACEHOLDER://l.1\xa4none\xc0\xa1s\xaFPLACEHOLDER://s");
    file.extend(b"\x07\xcb\x3f\xe0\0\0\0\0\0\0\xa3txt\xa2hi");
    let dir = Dir::new().file("item/checkpoint", file).file("item/s/_strings.json", r#"{"s": "old"}"#).dir("item/l.0");
    let tree = tree(&dir);
    let paths: Vec<_> = tree.leaves.iter().map(|leaf| leaf.path.to_string()).collect();
    assert_eq!(paths, ["ed", "l/0", "l/1", "none", "s", "7", "txt"]);
    assert_eq!(leaf(&tree, "ed").kind, StoredKind::Empty(Container::Dict));
    assert_eq!(leaf(&tree, "l/1").kind, StoredKind::Stored { name: "l.1".into(), value_type: None });
    assert_eq!(leaf(&tree, "s").kind, StoredKind::Text("old".into()));
    assert_eq!(leaf(&tree, "7").kind, StoredKind::Inline(Node::Float(0.5)));
    assert_eq!(leaf(&tree, "txt").kind, StoredKind::Text("hi".into()));
    assert_eq!(leaf(&tree, "none").kind, StoredKind::None);
}

#[test]
fn aggregated_values_come_from_the_msgpack_file() {
    let metadata = METADATA.replacen(r#""skip_deserialize": false"#, r#""skip_deserialize": true"#, 1);
    let metadata =
        metadata.replacen(r#""scalar", "skip_deserialize": false"#, r#""scalar", "skip_deserialize": true"#, 1);
    let dir = Dir::new()
        .file("item/_METADATA", metadata)
        .file("item/checkpoint", b"\x83\xa1w\x05\xa1n\xb0PLACEHOLDER://n!\xa1l\x91\xb1PLACEHOLDER://l.0".to_vec());
    let tree = tree(&dir);
    assert_eq!(leaf(&tree, "w").kind, StoredKind::Inline(Node::Int(5)));
    assert_eq!(leaf(&tree, "n").kind, StoredKind::None);
    assert_eq!(leaf(&tree, "l/0").kind, StoredKind::Stored { name: "l.0".into(), value_type: Some(ValueType::Scalar) });
    let missing = Dir::new().file("item/_METADATA", METADATA.replacen("false", "true", 1));
    assert!(matches!(self::tree(&missing).leaves[0].kind, StoredKind::Unsupported { .. }));
}

#[test]
fn an_item_without_structure_says_so() {
    let dir = Dir::new().file("item/w/.zarray", "{}").file("item/_sharding", "{");
    let read = dir.run(|ask| async move { read_tree(&ask, &RelPath::new("item").unwrap()).await }).unwrap();
    assert!(matches!(read, TreeRead::NoStructure { listing, .. } if listing.len() == 2));
    assert_eq!(error(&Dir::new()).kind(), crate::ErrorKind::NotFound);
}

#[test]
fn damage_names_file_and_offset() {
    let damaged = error(&Dir::new().file("item/_METADATA", r#"{"tree_metadata": ]"#));
    assert_eq!(damaged.kind(), crate::ErrorKind::Corrupt);
    assert_eq!(damaged.places().collect::<Vec<_>>(), [("offset", "19"), ("file", "item/_METADATA")]);
    let t5x = error(&Dir::new().file("item/checkpoint", b"\x82\xa7version\x03\xa9optimizer\x80".to_vec()));
    assert_eq!(t5x.kind(), crate::ErrorKind::Unsupported);
    assert!(t5x.to_string().contains("T5X"));
}

#[test]
fn names_that_leave_the_item_are_never_opened() {
    let mut file = vec![0x81, 0xa1, b'x'];
    let name = "PLACEHOLDER://../s";
    file.push(0xa0 | name.len() as u8);
    file.extend(name.as_bytes());
    let dir = Dir::new().file("item/checkpoint", file).file("s/_strings.json", r#"{"../s": "outside"}"#);
    assert_eq!(leaf(&tree(&dir), "x").kind, StoredKind::Stored { name: "../s".into(), value_type: None });
}

#[test]
fn json_items_are_read_from_any_of_their_files() {
    let value = |name: &str| {
        let dir = Dir::new().file(name, r#"{"loss": NaN}"#);
        dir.run(|ask| async move { read_json(&ask, &RelPath::new("item").unwrap()).await })
    };
    for name in JSON_FILES {
        assert_eq!(value(&format!("item/{name}")).unwrap(), serde_json::json!({"loss": "NaN"}));
    }
    assert_eq!(value("item/other").unwrap_err().kind(), crate::ErrorKind::NotFound);
}
