//! `_METADATA` as Orbax 0.12 writes it: the inverse of [`metadata::parse`](super::metadata::parse).

use std::collections::HashMap;

use super::metadata::{Container, DICT, Entry, SEQUENCE, TreeMetadata, ValueType};
use super::python::{Doc, repr_tuple};
use super::rich;
use crate::keypath::{Key, KeyPath};

impl Entry {
    /// A leaf as a saver describes it: its value is in the array storage or in `_strings.json`, or it has none.
    pub fn new(path: KeyPath, value_type: ValueType) -> Self {
        Self { path, skip_deserialize: !value_type.has_data(), value_type, write_shape: None }
    }
}

impl TreeMetadata {
    /// The file's bytes, the entries in the order that they have here.
    ///
    /// Where [`containers`](Self::containers) names any, `value_metadata_tree` is added, which is what lets Orbax (with
    /// `support_rich_types`) and this crate tell tuples and namedtuples from lists and dicts. A container that no entry
    /// lies in is not written: an empty one is an entry itself.
    ///
    /// Parsing the bytes gives this value again, if `containers` is sorted and no entry lies inside another.
    pub fn to_bytes(&self) -> Vec<u8> {
        let leaves = self.entries.iter().map(|entry| (member_name(&entry.path), leaf(entry)));
        let custom = self.custom_text.as_deref().map(Doc::Bare).or(self.custom_metadata.as_ref().map(Doc::Value));
        let mut members = Vec::new();
        members.extend(self.use_ocdbt.map(|value| ("use_ocdbt", Doc::Bool(value))));
        members.extend(self.use_zarr3.map(|value| ("use_zarr3", Doc::Bool(value))));
        members.push(("store_array_data_equal_to_fill_value", Doc::Bool(self.every_chunk_stored)));
        members.push(("custom_metadata", Doc::or_null(custom)));
        if !self.containers.is_empty() {
            members.push(("value_metadata_tree", Doc::Text(rich::text(&self.entries, &self.containers).into())));
        }
        Doc::dumps_many(("tree_metadata", leaves), &members).into_bytes()
    }

    /// Sorts the entries as JAX flattens trees: dict keys by code points, positions by number. The fields of a namedtuple
    /// keep the order in which they first occur, which is that of their declaration.
    pub fn sort(&mut self) {
        let mut fields: HashMap<KeyPath, HashMap<Key, usize>> = HashMap::new();
        for (path, _) in self.containers.iter().filter(|(_, kind)| *kind == Container::NamedTuple) {
            fields.insert(path.clone(), HashMap::new());
        }
        let mut keyed = Vec::with_capacity(self.entries.len());
        for entry in self.entries.drain(..) {
            let mut parent = KeyPath::ROOT;
            let mut rank = Vec::with_capacity(entry.path.0.len());
            for key in &entry.path.0 {
                let field = fields.get_mut(&parent).map_or(0, |ranks| {
                    let next = ranks.len();
                    *ranks.entry(key.clone()).or_insert(next)
                });
                rank.push((field, key.clone()));
                parent.0.push(key.clone());
            }
            keyed.push((rank, entry));
        }
        keyed.sort_by(|(a, _), (b, _)| a.cmp(b));
        self.entries.extend(keyed.into_iter().map(|(_, entry)| entry));
    }
}

/// The name of a leaf's member in `tree_metadata`: Python's `repr` of the tuple of its keys, `('params', 'w')`.
pub fn member_name(path: &KeyPath) -> String {
    repr_tuple(path.elements())
}

/// What `_METADATA` says of a leaf's value; also the leaf of `value_metadata_tree`.
pub(super) fn value(entry: &Entry) -> Doc<'_> {
    let mut members = vec![
        ("value_type", Doc::text(entry.value_type.name())),
        ("skip_deserialize", Doc::Bool(entry.skip_deserialize)),
    ];
    members.extend(entry.write_shape.as_ref().map(|shape| ("write_shape", Doc::sizes(shape))));
    Doc::object(members)
}

fn leaf(entry: &Entry) -> Doc<'_> {
    let key = |key: &Key, text| {
        let key_type = if matches!(key, Key::Index(_)) { SEQUENCE } else { DICT };
        Doc::object([("key", Doc::Text(text)), ("key_type", Doc::Size(key_type))])
    };
    let keys = entry.path.0.iter().zip(entry.path.elements()).map(|(element, text)| key(element, text)).collect();
    Doc::object([("key_metadata", Doc::List(keys)), ("value_metadata", value(entry))])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::metadata::{param_name, parse};
    use super::*;

    /// Made by Orbax 0.12.8 with `support_rich_types`.
    const RICH: &str = r#"{"tree_metadata": {"('n', 'nu')": {"key_metadata": [{"key": "n", "key_type": 2}, {"key": "nu", "key_type": 2}], "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": false}}, "('n', 'mu', 'a')": {"key_metadata": [{"key": "n", "key_type": 2}, {"key": "mu", "key_type": 2}, {"key": "a", "key_type": 2}], "value_metadata": {"value_type": "None", "skip_deserialize": true}}, "('t', '0')": {"key_metadata": [{"key": "t", "key_type": 2}, {"key": "0", "key_type": 1}], "value_metadata": {"value_type": "jax.Array", "skip_deserialize": false, "write_shape": [2]}}}, "use_ocdbt": true, "use_zarr3": false, "store_array_data_equal_to_fill_value": true, "custom_metadata": null, "value_metadata_tree": "{\"n\": {\"category\": \"namedtuple\", \"module\": \"touchdown\", \"clazz\": \"NamedTuple\", \"entries\": [{\"key\": \"nu\", \"value\": {\"category\": \"custom\", \"clazz\": \"ValueMetadataEntry\", \"data\": {\"value_type\": \"np.ndarray\", \"skip_deserialize\": false}}}, {\"key\": \"mu\", \"value\": {\"a\": {\"category\": \"custom\", \"clazz\": \"ValueMetadataEntry\", \"data\": {\"value_type\": \"None\", \"skip_deserialize\": true}}}}]}, \"t\": {\"category\": \"custom\", \"clazz\": \"tuple\", \"entries\": [{\"category\": \"custom\", \"clazz\": \"ValueMetadataEntry\", \"data\": {\"value_type\": \"jax.Array\", \"skip_deserialize\": false, \"write_shape\": [2]}}]}}"}"#;

    fn entry(path: &[Key], value_type: ValueType) -> Entry {
        Entry::new(KeyPath(path.to_vec()), value_type)
    }

    fn name(name: &str) -> Key {
        Key::Name(name.to_owned())
    }

    #[test]
    fn a_rich_file_is_written_as_orbax_writes_it() {
        let metadata = parse(RICH.as_bytes()).unwrap();
        assert_eq!(metadata.containers.len(), 2);
        assert_eq!(String::from_utf8(metadata.to_bytes()).unwrap(), RICH);
    }

    #[test]
    fn the_order_is_that_of_jax() {
        let path = |keys: &[Key]| entry(keys, ValueType::Scalar);
        let mut metadata = TreeMetadata {
            entries: vec![
                path(&[name("n"), name("nu")]),
                path(&[name("n"), name("mu")]),
                path(&[name("l"), Key::Index(10)]),
                path(&[name("é")]),
                path(&[name("l"), Key::Index(9)]),
                path(&[name("Z")]),
            ],
            containers: vec![(KeyPath(vec![name("n")]), Container::NamedTuple)],
            ..TreeMetadata::default()
        };
        metadata.sort();
        let order: Vec<_> = metadata.entries.iter().map(|entry| param_name(&entry.path)).collect();
        assert_eq!(order, ["Z", "l.9", "l.10", "n.nu", "n.mu", "é"]);
    }

    /// A tree as nested containers; `None` is a leaf.
    #[derive(Clone, Debug)]
    enum Tree {
        Leaf(ValueType),
        Branch(Container, Vec<(String, Self)>),
    }

    fn trees() -> impl Strategy<Value = Tree> {
        use ValueType as T;
        let kinds = [
            T::JaxArray,
            T::NpArray,
            T::Scalar,
            T::String,
            T::None,
            T::Empty(Container::Dict),
            T::Empty(Container::List),
            T::Empty(Container::Tuple),
            T::Empty(Container::NamedTuple),
            T::Other("my.Type".into()),
        ];
        let leaf = proptest::sample::select(kinds.to_vec()).prop_map(Tree::Leaf);
        leaf.prop_recursive(4, 40, 6, |inner| {
            let kind = proptest::sample::select(vec![
                Container::Dict,
                Container::List,
                Container::Tuple,
                Container::NamedTuple,
            ]);
            // Keys with quotes, escapes, the words of the rich form, and anything else.
            let key = prop_oneof!["[a-z'\"\\\\./~ é]{0,4}", Just("category".to_owned()), any::<String>()];
            (kind, proptest::collection::vec((key, inner), 1..14)).prop_map(|(kind, children)| {
                let mut seen = std::collections::HashSet::new();
                Tree::Branch(kind, children.into_iter().filter(|(key, _)| seen.insert(key.clone())).collect())
            })
        })
    }

    fn flatten(tree: &Tree, path: &KeyPath, metadata: &mut TreeMetadata) {
        match tree {
            Tree::Leaf(value_type) => {
                let write_shape = (*value_type == ValueType::JaxArray).then(|| vec![3, 1]);
                metadata.entries.push(Entry { write_shape, ..Entry::new(path.clone(), value_type.clone()) });
            }
            Tree::Branch(kind, children) => {
                if matches!(kind, Container::Tuple | Container::NamedTuple) {
                    metadata.containers.push((path.clone(), *kind));
                }
                for (index, (key, child)) in children.iter().enumerate() {
                    let is_sequence = matches!(kind, Container::List | Container::Tuple);
                    let key = if is_sequence { Key::Index(index as u64) } else { Key::Name(key.clone()) };
                    flatten(child, &path.child(key), metadata);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(tree in trees(), ocdbt: Option<bool>, zarr3: Option<bool>, stored: bool, user: Option<String>) {
            let mut metadata = TreeMetadata {
                use_ocdbt: ocdbt,
                use_zarr3: zarr3,
                every_chunk_stored: stored,
                custom_metadata: user.map(|user| serde_json::json!({"user": user})),
                ..TreeMetadata::default()
            };
            flatten(&tree, &KeyPath::ROOT, &mut metadata);
            metadata.containers.sort();
            prop_assert_eq!(&parse(&metadata.to_bytes()).unwrap(), &metadata);
            metadata.sort();
            prop_assert_eq!(&parse(&metadata.to_bytes()).unwrap(), &metadata);
            let once = metadata.clone();
            metadata.sort();
            prop_assert_eq!(metadata, once);
        }
    }
}
