//! What could not be opened again, by us or by Orbax, is refused before the first byte is written.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests panic to fail")]

use std::path::Path;

use serde_json::{Value, json};
use touchdown::layout::orbax::metadata::Container;
use touchdown::tree::save::{NewArray, NewLeaf, SaveOptions, Tree, TreeItem};
use touchdown::zarr::Format;
use touchdown::{ConvertOptions, ConvertTo, DType, ErrorKind, Key, KeyPath, load_items, save, save_items};

fn one() -> Tree {
    Tree::new().with("w", NewArray::from_vec(&[4], vec![1.0_f32, 2.0, 3.0, 4.0]))
}

fn quick() -> SaveOptions {
    SaveOptions { sync: false, ..SaveOptions::default() }
}

/// Saves at `home/c`; what comes of it, and on failure that nothing is left there.
fn saved(home: &Path, items: &[(String, TreeItem)], options: &SaveOptions) -> Result<(), touchdown::Error> {
    let path = home.join("c");
    let result = save_items(&path, items, options).map(drop);
    match &result {
        Ok(()) => {
            load_items(&path).unwrap();
            std::fs::remove_dir_all(&path).unwrap();
        }
        Err(_) => assert_eq!(std::fs::read_dir(home).unwrap().count(), 0),
    }
    result
}

fn tree(tree: Tree) -> Vec<(String, TreeItem)> {
    vec![("state".to_owned(), tree.into())]
}

/// An object in which something is nested this deep.
fn nested(levels: usize) -> Value {
    (1..levels).fold(json!({}), |value, _| json!({ "a": value }))
}

#[test]
fn json_that_is_nested_too_deep_to_be_read_is_refused_with_all_else() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let custom = |levels| SaveOptions { custom_metadata: Some(nested(levels)), ..quick() };
    let metrics = |levels| SaveOptions { metrics: Some(nested(levels)), ..quick() };
    let of_tree = |levels| tree(one().custom_metadata(nested(levels)));
    let json_item = |levels| vec![("state".to_owned(), one().into()), ("config".to_owned(), nested(levels).into())];
    saved(home, &json_item(127), &metrics(127)).unwrap();
    saved(home, &of_tree(126), &custom(126)).unwrap();
    for (items, options, name) in [
        (tree(one()), custom(127), "custom metadata of a checkpoint"),
        (tree(one()), metrics(128), "metrics"),
        (of_tree(127), quick(), "custom metadata of a tree"),
        (json_item(128), quick(), "a JSON item"),
    ] {
        let error = saved(home, &items, &options).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains(name), "{error}");
    }
    let mut all = json_item(128);
    all[0].1 = one().custom_metadata(nested(500)).into();
    let error = saved(home, &all, &SaveOptions { custom_metadata: custom(300).custom_metadata, ..metrics(400) });
    assert_eq!(error.unwrap_err().list().len(), 4);
}

#[test]
fn a_destination_with_a_temporary_name_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let source = home.path().join("source");
    save(&source, &one(), &quick()).unwrap();
    let checkpoint = touchdown::open(&source).unwrap();
    for name in ["x.orbax-checkpoint-tmp-9", "x.orbax-checkpoint-tmp", "x.partial_save", "checkpoint_3.tmp-17"] {
        let path = home.path().join(name);
        let error = save(&path, &one(), &quick()).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("not finished"), "{error}");
        for to in [ConvertTo::Orbax, ConvertTo::SAFETENSORS] {
            let options = ConvertOptions { to, ..ConvertOptions::default() };
            let error = touchdown::convert(&checkpoint.target(), &path, &options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
    }
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
}

#[test]
fn ranks_that_tensorstore_refuses_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let of = |rank, zarr| {
        let items = tree(Tree::new().with("w", NewArray::from_vec(&vec![1; rank], vec![1.0_f32])));
        saved(home.path(), &items, &SaveOptions { zarr, ..quick() })
    };
    of(31, Format::V3).unwrap();
    of(32, Format::V2).unwrap();
    for (rank, zarr) in [(32, Format::V3), (33, Format::V3), (33, Format::V2)] {
        assert_eq!(of(rank, zarr).unwrap_err().kind(), ErrorKind::Invalid, "{rank} {zarr:?}");
    }
}

#[test]
fn key_data_that_jax_makes_no_keys_of_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let of = |name: &str, dtype: DType, shape: &[u64]| {
        let bytes = shape.iter().product::<u64>() as usize * dtype.size();
        let key = NewArray::new(shape, dtype, vec![0; bytes]).key(name);
        saved(home.path(), &tree(Tree::new().with("k", key)), &quick())
    };
    for (name, words) in [("threefry2x32", 2), ("rbg", 4), ("unsafe_rbg", 4)] {
        of(name, DType::UInt32, &[words]).unwrap();
        of(name, DType::UInt32, &[3, words]).unwrap();
        for (dtype, shape) in [
            (DType::Int32, vec![words]),
            (DType::Float32, vec![words]),
            (DType::UInt32, vec![3]),
            (DType::UInt32, vec![]),
        ] {
            let error = of(name, dtype, &shape).unwrap_err();
            assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains(name), "{error}");
        }
    }
    let error = of("no_such_impl", DType::UInt32, &[2]).unwrap_err();
    assert!(error.to_string().contains("threefry2x32") && error.to_string().contains("no_such_impl"), "{error}");
}

#[test]
fn containers_that_are_none_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let rich = SaveOptions { rich_types: true, ..quick() };
    let pair = |position| KeyPath(vec![Key::Name("pair".to_owned()), Key::Index(position)]);
    let right = one().with(pair(0), 1).with(pair(1), 2).with("e", NewLeaf::Empty(Container::List));
    let right = right.container("pair", Container::Tuple);
    saved(home.path(), &tree(right.clone()), &rich).unwrap();
    for wrong in ["nowhere", "w", "pair/0", "e"] {
        for options in [&rich, &quick()] {
            let error =
                saved(home.path(), &tree(right.clone().container(wrong, Container::Tuple)), options).unwrap_err();
            assert!(error.to_string().contains(&format!("{wrong}: Tuple")), "{error}");
        }
    }
    // What was loaded of a part of a tree says nothing of the rest.
    let path = home.path().join("whole");
    save(&path, &right, &rich).unwrap();
    let checkpoint = touchdown::open(&path).unwrap();
    let state = touchdown::load(&checkpoint, &checkpoint.target().skip(["pair/*"])).unwrap();
    save(home.path().join("part"), &Tree::of(&checkpoint, &state), &rich).unwrap();
}

#[test]
fn huge_arrays_without_elements_are_saved_at_once() {
    let home = tempfile::tempdir().unwrap();
    for shape in [vec![1_000_000_000_000_000_003, 0], vec![0, 1_000_000_000_000_000_003]] {
        for zarr in [Format::V2, Format::V3] {
            let empty = NewArray::new(&shape, DType::UInt8, Vec::new());
            saved(home.path(), &tree(Tree::new().with("w", empty)), &SaveOptions { zarr, ..quick() }).unwrap();
        }
    }
}

#[test]
fn an_item_cannot_have_the_name_of_a_file_beside_it() {
    let home = tempfile::tempdir().unwrap();
    for name in ["_touchdown_sums.json", "_CHECKPOINT_METADATA", "commit_success.txt"] {
        let items = [("state".to_owned(), one().into()), (name.to_owned(), one().into())];
        assert_eq!(saved(home.path(), &items, &quick()).unwrap_err().kind(), ErrorKind::Invalid);
    }
}
