//! `value_metadata_tree`: which containers are tuples and namedtuples, where rich types were saved.
//!
//! The member of `_METADATA` is a string that holds JSON. An object without `category` is a dict, an array a list,
//! `{"category": "custom", "clazz": "tuple", "entries": [..]}` a tuple, `{"category": "namedtuple", .., "entries":
//! [{"key": .., "value": ..}]}` a namedtuple, and `clazz` `ValueMetadataEntry` a leaf. It only adds to `tree_metadata`, so
//! whatever does not fit is passed over.

use serde_json::Value;

use super::json;
use super::metadata::Container;
use crate::keypath::{Key, KeyPath};
use crate::limits::KEY_PATH_DEPTH_MAX;

/// The tuples and namedtuples of the tree, by path, sorted.
pub(super) fn containers(text: &str) -> Vec<(KeyPath, Container)> {
    let mut found = Vec::new();
    if let Ok(tree) = json::parse(text.as_bytes()) {
        walk(&tree, &mut KeyPath::ROOT.clone(), &mut found);
    }
    found.sort();
    found
}

fn walk(node: &Value, path: &mut KeyPath, found: &mut Vec<(KeyPath, Container)>) {
    if path.0.len() > KEY_PATH_DEPTH_MAX {
        return;
    }
    match node {
        Value::Array(items) => items.iter().enumerate().for_each(|(index, item)| below(item, index, path, found)),
        Value::Object(members) => {
            let text = |name: &str| members.get(name).and_then(Value::as_str);
            let entries = || members.get("entries").and_then(Value::as_array).into_iter().flatten();
            match (text("category"), text("clazz")) {
                (Some("custom"), Some("tuple")) => {
                    found.push((path.clone(), Container::Tuple));
                    entries().enumerate().for_each(|(index, item)| below(item, index, path, found));
                }
                (Some("namedtuple"), _) => {
                    found.push((path.clone(), Container::NamedTuple));
                    for entry in entries() {
                        if let (Some(key), Some(value)) = (entry.get("key").and_then(Value::as_str), entry.get("value"))
                        {
                            step(value, Key::Name(key.to_owned()), path, found);
                        }
                    }
                }
                (Some("custom"), _) => {}
                _ => members.iter().for_each(|(key, value)| step(value, Key::Name(key.clone()), path, found)),
            }
        }
        _ => {}
    }
}

fn below(node: &Value, index: usize, path: &mut KeyPath, found: &mut Vec<(KeyPath, Container)>) {
    step(node, Key::Index(index as u64), path, found);
}

fn step(node: &Value, key: Key, path: &mut KeyPath, found: &mut Vec<(KeyPath, Container)>) {
    path.0.push(key);
    walk(node, path, found);
    path.0.pop();
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: &str = r#"{"category": "custom", "clazz": "ValueMetadataEntry", "data": {"value_type": "scalar"}}"#;

    #[test]
    fn tuples_and_namedtuples_are_found_at_their_paths() {
        let tree = format!(
            r#"{{"t": {{"category": "custom", "clazz": "tuple", "entries": [{LEAF}, {{"category": "namedtuple", "module": "m",
            "clazz": "N", "entries": [{{"key": "mu", "value": {LEAF}}}]}}]}}, "l": [{LEAF}], "x": {LEAF}}}"#
        );
        let found: Vec<_> = containers(&tree).into_iter().map(|(path, kind)| (path.to_string(), kind)).collect();
        assert_eq!(found, [("t".to_owned(), Container::Tuple), ("t/1".to_owned(), Container::NamedTuple)]);
    }

    #[test]
    fn what_does_not_fit_is_passed_over() {
        for odd in
            ["", "3", "{", r#"{"category": 3, "clazz": []}"#, r#"{"category": "namedtuple", "entries": [1, {}]}"#]
        {
            assert!(containers(odd).len() <= 1, "{odd}");
        }
    }
}
