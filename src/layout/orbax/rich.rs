//! `value_metadata_tree`: which containers are tuples and namedtuples, where rich types were saved.
//!
//! The member of `_METADATA` is a string that holds JSON. An object without `category` is a dict, an array a list,
//! `{"category": "custom", "clazz": "tuple", "entries": [..]}` a tuple, `{"category": "namedtuple", .., "entries":
//! [{"key": .., "value": ..}]}` a namedtuple, and `clazz` `ValueMetadataEntry` a leaf. It only adds to `tree_metadata`, so
//! whatever does not fit is passed over.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::Value;

use super::metadata::{Container, Entry};
use super::python::Doc;
use super::{json, metadata_write};
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

/// The member for a tree with these leaves and these tuples and namedtuples. Leaves of one container need not be neighbours.
///
/// Orbax makes a namedtuple type of the names of module and class when it reads; ours are not known, so they are
/// constants, and the fields tell such types apart.
pub(super) fn text(entries: &[Entry], containers: &[(KeyPath, Container)]) -> String {
    let mut root = Branch::default();
    for entry in entries {
        let mut branch = &mut root;
        for key in &entry.path.0 {
            branch = branch.child(key);
        }
        branch.leaf = Some(entry);
    }
    let containers = containers.iter().map(|(path, kind)| (path, *kind)).collect();
    root.doc(&mut KeyPath(Vec::new()), &containers).dumps()
}

/// A node of the tree that is written; its children are in the order in which they first occur.
#[derive(Default)]
struct Branch<'a> {
    leaf: Option<&'a Entry>,
    children: Vec<(&'a Key, Self)>,
    places: HashMap<&'a Key, usize>,
}

impl<'a> Branch<'a> {
    fn child(&mut self, key: &'a Key) -> &mut Self {
        let next = self.children.len();
        let place = *self.places.entry(key).or_insert(next);
        if place == next {
            self.children.push((key, Self::default()));
        }
        &mut self.children[place].1
    }

    fn doc(&self, path: &mut KeyPath, containers: &HashMap<&KeyPath, Container>) -> Doc<'a> {
        if let (Some(entry), []) = (self.leaf, self.children.as_slice()) {
            return Doc::object([
                ("category", Doc::text("custom")),
                ("clazz", Doc::text("ValueMetadataEntry")),
                ("data", metadata_write::value(entry)),
            ]);
        }
        let container = containers.get(path).copied();
        let mut below = Vec::with_capacity(self.children.len());
        for (key, child) in &self.children {
            path.0.push((*key).clone());
            below.push((*key, child.doc(path, containers)));
            path.0.pop();
        }
        let is_list = matches!(below.first(), Some((Key::Index(_), _)));
        match container {
            Some(Container::Tuple) => Doc::object([
                ("category", Doc::text("custom")),
                ("clazz", Doc::text("tuple")),
                ("entries", Doc::List(below.into_iter().map(|(_, doc)| doc).collect())),
            ]),
            Some(Container::NamedTuple) => {
                let field = |(key, doc)| Doc::object([("key", Doc::Text(name(key))), ("value", doc)]);
                Doc::object([
                    ("category", Doc::text("namedtuple")),
                    ("module", Doc::text("touchdown")),
                    ("clazz", Doc::text("NamedTuple")),
                    ("entries", Doc::List(below.into_iter().map(field).collect())),
                ])
            }
            _ if is_list => Doc::List(below.into_iter().map(|(_, doc)| doc).collect()),
            _ => Doc::Object(below.into_iter().map(|(key, doc)| (name(key), doc)).collect()),
        }
    }
}

fn name(key: &Key) -> Cow<'_, str> {
    match key {
        Key::Index(index) => index.to_string().into(),
        Key::Name(name) => name.as_str().into(),
    }
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
