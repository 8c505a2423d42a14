//! `_METADATA`: the paths and kinds of a tree's leaves.
//!
//! Written by Orbax since 0.4.3 (`orbax/checkpoint/_src/metadata/tree.py`, `InternalTreeMetadata`). `tree_metadata` has one
//! member a leaf, empty containers included, in JAX's flatten order; the member's name is the `repr` of a Python tuple and
//! opaque, the path is in `key_metadata`. Shapes and types are not here: they are in each array's own zarr metadata.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::json::{self, JsonError};
use super::rich;
use crate::keypath::{Key, KeyPath};
use crate::limits::{KEY_PATH_DEPTH_MAX, LEAVES_MAX};

/// A parsed `_METADATA`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TreeMetadata {
    /// The leaves, in the file's order.
    pub entries: Vec<Entry>,
    /// Whether the arrays lie in an OCDBT database; written since 0.11.31 and only a hint, the files decide.
    pub use_ocdbt: Option<bool>,
    /// Whether the arrays are zarr v3; written since 0.4.8 and only a hint, the keys decide.
    pub use_zarr3: Option<bool>,
    /// Whether every chunk was written, so that a missing one is damage and not the fill value
    /// (`store_array_data_equal_to_fill_value`).
    pub every_chunk_stored: bool,
    /// The tree's own user metadata; `None` for absent and null.
    pub custom_metadata: Option<Value>,
    /// The text of the user's metadata, where it has numbers that a [`Value`] does not hold; it is what is written then.
    pub custom_text: Option<String>,
    /// Which sequences are tuples and which mappings namedtuples, where rich types were saved.
    pub containers: Vec<(KeyPath, Container)>,
}

/// One leaf of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it lies in the tree.
    pub path: KeyPath,
    /// What it is.
    pub value_type: ValueType,
    /// The value is not in the array storage: there is none (empty containers), or it is in the msgpack file.
    pub skip_deserialize: bool,
    /// The largest block that one writer stored, for `jax.Array` since 2025.
    pub write_shape: Option<Vec<u64>>,
}

/// What a leaf is, as Orbax names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ValueType {
    /// `jax.Array`: zarr, with an entry in `_sharding` and `array_metadatas`.
    JaxArray,
    /// `np.ndarray`: zarr.
    NpArray,
    /// `scalar`: a 0-d zarr array of a Python or numpy number.
    Scalar,
    /// `string`: in `_strings.json`.
    String,
    /// `None`: no data.
    None,
    /// An empty container: no data.
    Empty(Container),
    /// A type handler that the user registered.
    Other(String),
}

/// A kind of container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are the documentation
pub enum Container {
    Dict,
    List,
    Tuple,
    NamedTuple,
}

/// Why `_METADATA` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// Not JSON, or a member is missing or of the wrong type.
    #[error("{0}")]
    Json(#[from] JsonError),
    /// A `key_type` other than 1 (sequence) and 2 (dict).
    #[error("key_type {key_type} of key `{key}` of leaf `{path}`")]
    KeyType {
        /// The elements so far.
        path: KeyPath,
        /// The key.
        key: String,
        /// Its type.
        key_type: u64,
    },
    /// A position that is no decimal number.
    #[error("the position `{key}` below `{path}` is no number")]
    Position {
        /// The elements so far.
        path: KeyPath,
        /// The key.
        key: String,
    },
    /// A path with too many elements.
    #[error("a leaf lies {0} levels deep, deeper than {KEY_PATH_DEPTH_MAX}")]
    Deep(usize),
    /// Two entries with the same path.
    #[error("the leaf `{0}` is described twice")]
    Duplicate(KeyPath),
}

impl MetadataError {
    /// The byte at which the parser stopped, where it is known.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Json(error) => Some(error.offset),
            _ => None,
        }
    }
}

/// Parses a `_METADATA` file.
///
/// Every member but `tree_metadata` is optional. An entry whose path is a strict prefix of another's (left by partial
/// saves) is dropped, as Orbax does.
///
/// # Errors
/// Bytes that are not of the form above.
pub fn parse(bytes: &[u8]) -> Result<TreeMetadata, MetadataError> {
    let file: File = json::from_slice(bytes)?;
    let mut entries = Vec::with_capacity(file.tree_metadata.0.len());
    for raw in file.tree_metadata.0 {
        let value = raw.value_metadata;
        entries.push(Entry {
            path: path(raw.key_metadata)?,
            value_type: ValueType::from_name(value.value_type.as_deref().unwrap_or("")),
            skip_deserialize: value.skip_deserialize.unwrap_or(false),
            write_shape: value.write_shape,
        });
    }
    Ok(TreeMetadata {
        entries: without_prefixes(entries)?,
        use_ocdbt: file.use_ocdbt,
        use_zarr3: file.use_zarr3,
        every_chunk_stored: file.store_array_data_equal_to_fill_value.unwrap_or(false),
        custom_metadata: file.custom_metadata.filter(|value| !value.is_null()),
        custom_text: json::inexact_member(bytes, "custom_metadata"),
        containers: file.value_metadata_tree.as_deref().map(rich::containers).unwrap_or_default(),
    })
}

/// The name under which a leaf is stored: the path's elements joined by `.`, nothing escaped; empty for a bare leaf.
pub fn param_name(path: &KeyPath) -> String {
    let mut name = String::new();
    for (index, element) in path.elements().enumerate() {
        if index > 0 {
            name.push('.');
        }
        name.push_str(&element);
    }
    name
}

/// What stands before an array's own keys (`zarr.json`, `c/0`), by its parameter name. Names are used verbatim; one that ends
/// in `/` gets no second one, so that `a` and `a/` are one array.
pub fn key_prefix(name: &str) -> String {
    if name.is_empty() || name.ends_with('/') { name.to_owned() } else { format!("{name}/") }
}

/// The names that several leaves share, so that all but one of them lost their data: `{"a.b": x, "a": {"b": y}}`.
///
/// Strings are stored apart from arrays, so a string and an array may share a name.
pub fn collisions(entries: &[Entry]) -> Vec<(String, Vec<KeyPath>)> {
    let stored = |is_string: bool| {
        let has_data = move |entry: &&Entry| entry.value_type.has_data() && !entry.skip_deserialize;
        let here = move |entry: &&Entry| (entry.value_type == ValueType::String) == is_string;
        entries.iter().filter(has_data).filter(here).map(|entry| (param_name(&entry.path), &entry.path))
    };
    let mut shared = shared_names(stored(false));
    shared.extend(shared_names(stored(true)));
    shared
}

/// The names that occur several times, sorted, with their paths.
pub(super) fn shared_names<'a>(names: impl Iterator<Item = (String, &'a KeyPath)>) -> Vec<(String, Vec<KeyPath>)> {
    let mut sorted: Vec<_> = names.collect();
    sorted.sort();
    let groups = sorted.chunk_by(|(a, _), (b, _)| a == b).filter(|group| group.len() > 1);
    let shared = groups.filter_map(|group| {
        let (name, _) = group.first()?;
        Some((name.clone(), group.iter().map(|(_, path)| (*path).clone()).collect()))
    });
    shared.collect()
}

impl ValueType {
    /// The type with this name in `_METADATA`.
    pub fn from_name(name: &str) -> Self {
        match name {
            "jax.Array" => Self::JaxArray,
            "np.ndarray" => Self::NpArray,
            "scalar" => Self::Scalar,
            "string" => Self::String,
            "None" => Self::None,
            "Dict" => Self::Empty(Container::Dict),
            "List" => Self::Empty(Container::List),
            "Tuple" => Self::Empty(Container::Tuple),
            "NamedTuple" => Self::Empty(Container::NamedTuple),
            other => Self::Other(other.to_owned()),
        }
    }

    /// The name in `_METADATA`.
    pub fn name(&self) -> &str {
        match self {
            Self::JaxArray => "jax.Array",
            Self::NpArray => "np.ndarray",
            Self::Scalar => "scalar",
            Self::String => "string",
            Self::None => "None",
            Self::Empty(container) => container.name(),
            Self::Other(name) => name,
        }
    }

    /// Whether something is stored for such a leaf; empties have nothing but their entry.
    pub fn has_data(&self) -> bool {
        !matches!(self, Self::None | Self::Empty(_))
    }

    /// Whether the leaf is stored as a zarr array.
    pub fn is_array(&self) -> bool {
        matches!(self, Self::JaxArray | Self::NpArray | Self::Scalar)
    }
}

impl Container {
    /// The name in `_METADATA` and in `ls --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dict => "Dict",
            Self::List => "List",
            Self::Tuple => "Tuple",
            Self::NamedTuple => "NamedTuple",
        }
    }
}

#[derive(Deserialize)]
struct File {
    tree_metadata: Leaves,
    use_ocdbt: Option<bool>,
    use_zarr3: Option<bool>,
    store_array_data_equal_to_fill_value: Option<bool>,
    custom_metadata: Option<Value>,
    value_metadata_tree: Option<String>,
}

/// The members of `tree_metadata` in the file's order, which a map type would lose.
struct Leaves(Vec<RawEntry>);

#[derive(Deserialize)]
struct RawEntry {
    key_metadata: Vec<RawKey>,
    value_metadata: RawValue,
}

#[derive(Deserialize)]
struct RawKey {
    key: String,
    key_type: u64,
}

#[derive(Deserialize)]
struct RawValue {
    value_type: Option<String>,
    skip_deserialize: Option<bool>,
    write_shape: Option<Vec<u64>>,
}

impl<'de> Deserialize<'de> for Leaves {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Leaves;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one member a leaf")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Leaves, A::Error> {
                let mut leaves = Vec::new();
                while let Some((_, leaf)) = map.next_entry::<IgnoredAny, RawEntry>()? {
                    if leaves.len() == LEAVES_MAX {
                        return Err(serde::de::Error::custom(format_args!("more than {LEAVES_MAX} leaves")));
                    }
                    leaves.push(leaf);
                }
                Ok(Leaves(leaves))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

fn path(keys: Vec<RawKey>) -> Result<KeyPath, MetadataError> {
    if keys.len() > KEY_PATH_DEPTH_MAX {
        return Err(MetadataError::Deep(keys.len()));
    }
    let mut path = KeyPath(Vec::with_capacity(keys.len()));
    for RawKey { key, key_type } in keys {
        path.0.push(match key_type {
            SEQUENCE => match key.parse() {
                Ok(position) => Key::Index(position),
                Err(_) => return Err(MetadataError::Position { path, key }),
            },
            DICT => Key::Name(key),
            key_type => return Err(MetadataError::KeyType { path, key, key_type }),
        });
    }
    Ok(path)
}

/// Drops the entries whose path is a strict prefix of another's.
fn without_prefixes(entries: Vec<Entry>) -> Result<Vec<Entry>, MetadataError> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    let path = |index: usize| entries.get(index).map(|entry| &entry.path);
    order.sort_by(|&a, &b| path(a).cmp(&path(b)));
    let mut dropped = vec![false; entries.len()];
    // In lexicographic order a path stands right before the first of those that it is a prefix of.
    for pair in order.windows(2) {
        let [shorter, longer] = pair else { continue };
        if let (Some(short), Some(long)) = (path(*shorter), path(*longer)) {
            if short == long {
                return Err(MetadataError::Duplicate(short.clone()));
            }
            if let Some(mark) = dropped.get_mut(*shorter) {
                *mark = long.0.starts_with(&short.0);
            }
        }
    }
    let mut dropped = dropped.into_iter();
    Ok(entries.into_iter().filter(|_| dropped.next() != Some(true)).collect())
}

pub(super) const SEQUENCE: u64 = 1;
pub(super) const DICT: u64 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(name: &str, keys: &[(&str, u64)], value: &str) -> String {
        let keys: Vec<_> =
            keys.iter().map(|(key, kind)| format!(r#"{{"key": "{key}", "key_type": {kind}}}"#)).collect();
        format!(r#""{name}": {{"key_metadata": [{}], "value_metadata": {value}}}"#, keys.join(", "))
    }

    fn file(leaves: &[String]) -> Vec<u8> {
        format!(r#"{{"tree_metadata": {{{}}}}}"#, leaves.join(", ")).into_bytes()
    }

    const ARRAY: &str = r#"{"value_type": "np.ndarray", "skip_deserialize": false}"#;

    /// From a real file of 0.12.8.
    const REAL: &str = r#"{"tree_metadata": {"('w',)": {"key_metadata": [{"key": "w", "key_type": 2}], "value_metadata": {"value_type": "jax.Array", "skip_deserialize": false, "write_shape": [4]}}, "('e',)": {"key_metadata": [{"key": "e", "key_type": 2}], "value_metadata": {"value_type": "Dict", "skip_deserialize": true}}, "('l', '10')": {"key_metadata": [{"key": "l", "key_type": 2}, {"key": "10", "key_type": 1}], "value_metadata": {"value_type": "string", "skip_deserialize": false}}}, "use_ocdbt": true, "use_zarr3": true, "store_array_data_equal_to_fill_value": true, "custom_metadata": null}"#;

    #[test]
    fn a_real_file_keeps_its_order() {
        let metadata = parse(REAL.as_bytes()).unwrap();
        let paths: Vec<_> = metadata.entries.iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(paths, ["w", "e", "l/10"]);
        assert_eq!(metadata.entries[0].write_shape, Some(vec![4]));
        assert_eq!(metadata.entries[1].value_type, ValueType::Empty(Container::Dict));
        assert_eq!(metadata.entries[2].path.0, [Key::Name("l".into()), Key::Index(10)]);
        assert_eq!(
            (metadata.use_ocdbt, metadata.use_zarr3, metadata.every_chunk_stored),
            (Some(true), Some(true), true)
        );
        assert_eq!(metadata.custom_metadata, None);
    }

    #[test]
    fn the_oldest_form_has_only_the_tree() {
        let metadata =
            parse(&file(&[leaf("()", &[], r#"{"value_type": "scalar", "skip_deserialize": false}"#)])).unwrap();
        assert_eq!(metadata.entries[0].path, KeyPath::ROOT);
        assert_eq!(param_name(&metadata.entries[0].path), "");
        assert_eq!((metadata.use_ocdbt, metadata.use_zarr3, metadata.every_chunk_stored), (None, None, false));
    }

    #[test]
    fn nan_in_custom_metadata_is_tolerated() {
        let metadata = parse(br#"{"tree_metadata": {}, "custom_metadata": {"x": NaN}, "later": 1}"#).unwrap();
        assert_eq!(metadata.custom_metadata, Some(serde_json::json!({"x": "NaN"})));
    }

    #[test]
    fn a_strict_prefix_is_dropped_wherever_it_stands() {
        let leaves = [
            leaf("1", &[("a", 2), ("b", 2)], ARRAY),
            leaf("2", &[("a", 2)], ARRAY),
            leaf("3", &[("a!", 2)], ARRAY),
            leaf("4", &[("ab", 2)], ARRAY),
        ];
        let paths: Vec<_> = parse(&file(&leaves)).unwrap().entries.iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(paths, ["a/b", "a!", "ab"]);
    }

    #[test]
    fn wrong_keys_are_named() {
        let error = |keys: &[(&str, u64)]| parse(&file(&[leaf("x", keys, ARRAY)])).unwrap_err();
        assert!(matches!(error(&[("a", 2), ("x", 1)]), MetadataError::Position { key, .. } if key == "x"));
        assert!(matches!(error(&[("-1", 1)]), MetadataError::Position { .. }));
        assert!(matches!(error(&[("a", 7)]), MetadataError::KeyType { key_type: 7, .. }));
        assert_eq!(error(&vec![("a", 2); KEY_PATH_DEPTH_MAX + 1]), MetadataError::Deep(KEY_PATH_DEPTH_MAX + 1));
        let twice = file(&[leaf("x", &[("a", 2)], ARRAY), leaf("y", &[("a", 2)], ARRAY)]);
        assert_eq!(parse(&twice), Err(MetadataError::Duplicate(KeyPath::names(["a"]))));
    }

    #[test]
    fn shared_names_are_found_per_storage() {
        let string = r#"{"value_type": "string", "skip_deserialize": false}"#;
        let empty = r#"{"value_type": "Dict", "skip_deserialize": true}"#;
        let leaves = [
            leaf("1", &[("a.b", 2)], ARRAY),
            leaf("2", &[("a", 2), ("b", 2)], ARRAY),
            leaf("3", &[("c.d", 2)], ARRAY),
            leaf("4", &[("c", 2), ("d", 2)], string),
            leaf("5", &[("e.f", 2)], ARRAY),
            leaf("6", &[("e", 2), ("f", 2)], empty),
        ];
        let found = collisions(&parse(&file(&leaves)).unwrap().entries);
        assert_eq!(found, [("a.b".to_owned(), vec![KeyPath::names(["a", "b"]), KeyPath::names(["a.b"])])]);
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        for end in 0..REAL.len() {
            assert!(parse(&REAL.as_bytes()[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn a_hundred_thousand_leaves_are_quick() {
        let leaves: Vec<_> =
            (0..100_000).map(|i| leaf(&i.to_string(), &[("layer", 2), (&i.to_string(), 1)], ARRAY)).collect();
        let bytes = file(&leaves);
        let start = std::time::Instant::now();
        assert_eq!(parse(&bytes).unwrap().entries.len(), 100_000);
        // Measured 0.19 s optimised and 0.65 s without, on a busy two-core machine; the bound only catches a quadratic step.
        assert!(start.elapsed().as_secs() < 5);
    }
}
