//! What a tree has and tensors have not: the entry `touchdown` of a file's `__metadata__`.
//!
//! A safetensors file holds names and tensors. Trees have more: nested paths, positions, numbers, strings, `None`, empty
//! containers, random keys. What a converted tree has of those stands in one entry, as JSON, so that nothing is lost on the way
//! there and back:
//!
//! ```text
//! {"version": 1,
//!  "leaves": [{"path": ["layers", 0, "w"], "kind": "array", "tensor": "layers.0.w"},   in the tree's order
//!             {"path": ["step"], "kind": "scalar", "tensor": "step"},                  a tensor without dimensions
//!             {"path": ["rng"], "kind": "key", "tensor": "rng", "key_impl": "threefry2x32"},
//!             {"path": ["name"], "kind": "string", "value": "run 7"},
//!             {"path": ["mask"], "kind": "none"}, {"path": ["aux"], "kind": "empty", "container": "Dict"}],
//!  "containers": [{"path": ["layers"], "container": "Tuple"}],
//!  "custom_metadata": .., "checkpoint_metadata": ..,
//!  "json_items": {"config": "{\"rate\": 0.5}"}}                                    the documents of JSON items, as they were
//! ```
//!
//! Other readers see ordinary tensors and a string that they ignore.
//!
//! Must not know: where the tensors' bytes are.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::keypath::KeyPath;
use crate::layout::orbax::metadata::Container;
use crate::limits::{KEY_PATH_DEPTH_MAX, LEAVES_MAX};

/// The key of the entry in `__metadata__`.
pub const ENTRY: &str = "touchdown";

/// What tensors do not say about the tree that they are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tree {
    /// Every leaf, in the tree's order.
    pub leaves: Vec<(KeyPath, Leaf)>,
    /// Sequences that are tuples, and mappings that are namedtuples.
    pub containers: Vec<(KeyPath, Container)>,
    /// The user's metadata of the tree.
    pub custom_metadata: Option<Value>,
    /// The user's metadata of the checkpoint that it was an item of.
    pub checkpoint_metadata: Option<Value>,
    /// The JSON items beside it, by name: their documents as they stood in their files.
    pub json_items: BTreeMap<String, String>,
}

/// What a leaf is, and the tensor that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are the tensor's name and what the type says
pub enum Leaf {
    /// An array.
    Array { tensor: String },
    /// The data of a typed JAX PRNG key, and the implementation's name.
    Key { tensor: String, key_impl: String },
    /// A number or bool: a tensor without dimensions.
    Scalar { tensor: String },
    /// A string.
    Text(String),
    /// `None`.
    None,
    /// An empty container.
    Empty(Container),
}

/// Why the entry cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Not JSON, or a member is missing or of the wrong type.
    #[error("{0}")]
    Json(String),
    /// Of a later version.
    #[error("version {0}, this reader knows version {VERSION}")]
    Version(u64),
    /// A kind of leaf that is not known, or lacks what its kind needs.
    #[error("the leaf {path} of kind `{kind}` cannot be understood")]
    Kind {
        /// The leaf.
        path: KeyPath,
        /// Its kind.
        kind: String,
    },
    /// A path that occurs twice, lies inside a leaf, or is too deep.
    #[error("the path {0} occurs twice, lies inside a leaf or is too deep")]
    Path(KeyPath),
    /// A tensor that two leaves claim.
    #[error("two leaves claim the tensor `{0}`")]
    Tensor(String),
    /// More leaves than a tree may have.
    #[error("{0} leaves are more than {LEAVES_MAX}")]
    ManyLeaves(usize),
}

impl Leaf {
    /// The tensor that holds it.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            Self::Array { tensor } | Self::Key { tensor, .. } | Self::Scalar { tensor } => Some(tensor),
            Self::Text(_) | Self::None | Self::Empty(_) => None,
        }
    }
}

impl Tree {
    /// The entry's text. Parsing it gives this value again, unless metadata is nested more deeply than JSON is read.
    pub fn to_text(&self) -> String {
        let leaves = self.leaves.iter().map(|(path, leaf)| row(path, leaf)).collect();
        let named = |(path, container): &(KeyPath, Container)| Named {
            path: path.clone(),
            container: container.name().to_owned(),
        };
        let document = Document {
            version: VERSION,
            leaves,
            containers: self.containers.iter().map(named).collect(),
            custom_metadata: self.custom_metadata.clone(),
            checkpoint_metadata: self.checkpoint_metadata.clone(),
            json_items: self.json_items.clone(),
        };
        // Maps with string keys and plain values: there is nothing that cannot be written.
        serde_json::to_string(&document).unwrap_or_default()
    }
}

/// Parses the entry.
///
/// # Errors
/// See [`TreeError`].
pub fn parse(text: &str) -> Result<Tree, TreeError> {
    let document: Document = serde_json::from_str(text).map_err(|error| TreeError::Json(error.to_string()))?;
    if document.version != VERSION {
        return Err(TreeError::Version(document.version));
    }
    if document.leaves.len() > LEAVES_MAX {
        return Err(TreeError::ManyLeaves(document.leaves.len()));
    }
    let leaves = document.leaves.into_iter().map(leaf).collect::<Result<Vec<_>, _>>()?;
    check_paths(&leaves)?;
    let mut claimed = HashSet::new();
    if let Some(twice) = leaves.iter().filter_map(|(_, leaf)| leaf.tensor()).find(|tensor| !claimed.insert(*tensor)) {
        return Err(TreeError::Tensor(twice.to_owned()));
    }
    let named = |Named { path, container }: Named| match container_of(&container) {
        Some(container) => Ok((path, container)),
        None => Err(TreeError::Kind { path, kind: container }),
    };
    Ok(Tree {
        leaves,
        containers: document.containers.into_iter().map(named).collect::<Result<_, _>>()?,
        custom_metadata: document.custom_metadata,
        checkpoint_metadata: document.checkpoint_metadata,
        json_items: document.json_items,
    })
}

/// Refuses paths that no tree can have together.
fn check_paths(leaves: &[(KeyPath, Leaf)]) -> Result<(), TreeError> {
    // Sorted by elements, a path that is a prefix of another stands right before one that it is a prefix of.
    let mut sorted: Vec<&KeyPath> = leaves.iter().map(|(path, _)| path).collect();
    sorted.sort();
    if let Some(deep) = sorted.iter().find(|path| path.0.len() > KEY_PATH_DEPTH_MAX) {
        return Err(TreeError::Path((*deep).clone()));
    }
    match sorted.windows(2).find(|pair| pair[1].0.starts_with(&pair[0].0)) {
        Some(pair) => Err(TreeError::Path(pair[1].clone())),
        None => Ok(()),
    }
}

fn row(path: &KeyPath, leaf: &Leaf) -> Row {
    let mut row = Row { path: path.clone(), tensor: leaf.tensor().map(str::to_owned), ..Row::default() };
    row.kind = match leaf {
        Leaf::Array { .. } => "array",
        Leaf::Key { key_impl, .. } => {
            row.key_impl = Some(key_impl.clone());
            "key"
        }
        Leaf::Scalar { .. } => "scalar",
        Leaf::Text(text) => {
            row.value = Some(text.clone());
            "string"
        }
        Leaf::None => "none",
        Leaf::Empty(container) => {
            row.container = Some(container.name().to_owned());
            "empty"
        }
    }
    .to_owned();
    row
}

fn leaf(row: Row) -> Result<(KeyPath, Leaf), TreeError> {
    let Row { path, kind, tensor, key_impl, value, container } = row;
    let leaf = match (kind.as_str(), tensor) {
        ("array", Some(tensor)) => Some(Leaf::Array { tensor }),
        ("key", Some(tensor)) => key_impl.map(|key_impl| Leaf::Key { tensor, key_impl }),
        ("scalar", Some(tensor)) => Some(Leaf::Scalar { tensor }),
        ("string", None) => value.map(Leaf::Text),
        ("none", None) => Some(Leaf::None),
        ("empty", None) => container.as_deref().and_then(container_of).map(Leaf::Empty),
        _ => None,
    };
    match leaf {
        Some(leaf) => Ok((path, leaf)),
        None => Err(TreeError::Kind { path, kind }),
    }
}

fn container_of(name: &str) -> Option<Container> {
    [Container::Dict, Container::List, Container::Tuple, Container::NamedTuple]
        .into_iter()
        .find(|container| container.name() == name)
}

/// The version of the entry that is written and read.
const VERSION: u64 = 1;

#[derive(Serialize, Deserialize)]
struct Document {
    version: u64,
    leaves: Vec<Row>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    containers: Vec<Named>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    custom_metadata: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checkpoint_metadata: Option<Value>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    json_items: BTreeMap<String, String>,
}

#[derive(Default, Serialize, Deserialize)]
struct Row {
    path: KeyPath,
    kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tensor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_impl: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    container: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Named {
    path: KeyPath,
    container: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::keypath::Key;

    fn any_leaf() -> impl Strategy<Value = Leaf> {
        let container =
            prop::sample::select(vec![Container::Dict, Container::List, Container::Tuple, Container::NamedTuple]);
        prop_oneof![
            any::<String>().prop_map(|tensor| Leaf::Array { tensor }),
            any::<(String, String)>().prop_map(|(tensor, key_impl)| Leaf::Key { tensor, key_impl }),
            any::<String>().prop_map(|tensor| Leaf::Scalar { tensor }),
            any::<String>().prop_map(Leaf::Text),
            Just(Leaf::None),
            container.prop_map(Leaf::Empty),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            leaves in prop::collection::btree_map(any::<(u64, String)>(), any_leaf(), 0..8),
            tuple: Option<String>,
            note: Option<String>,
            json_items: BTreeMap<String, String>,
        ) {
            let mut claimed = HashSet::new();
            let leaves = leaves
                .into_iter()
                .filter(|(_, leaf)| leaf.tensor().is_none_or(|tensor| claimed.insert(tensor.to_owned())))
                .map(|((index, name), leaf)| (KeyPath(vec![Key::Index(index), Key::Name(name)]), leaf))
                .collect();
            let containers = tuple.map(|name| (KeyPath(vec![Key::Name(name)]), Container::Tuple)).into_iter().collect();
            let custom_metadata = note.map(|note| serde_json::json!({"note": note, "x": [1, 2.5, null]}));
            let tree = Tree { leaves, containers, custom_metadata, checkpoint_metadata: None, json_items };
            prop_assert_eq!(parse(&tree.to_text()), Ok(tree));
        }

        #[test]
        fn any_text_is_an_answer(text: String) {
            // Whatever stands there, it is refused or understood.
            let _ = parse(&text);
        }
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        let parse = |leaves: &str| parse(&format!(r#"{{"version": 1, "leaves": [{leaves}]}}"#));
        assert!(matches!(super::parse(r#"{"version": 2, "leaves": []}"#), Err(TreeError::Version(2))));
        for bad in [
            r#"{"path": ["a"], "kind": "array"}"#,
            r#"{"path": ["a"], "kind": "key", "tensor": "a"}"#,
            r#"{"path": ["a"], "kind": "none", "tensor": "a"}"#,
            r#"{"path": ["a"], "kind": "empty", "container": "Set"}"#,
            r#"{"path": ["a"], "kind": "thing"}"#,
        ] {
            assert!(matches!(parse(bad), Err(TreeError::Kind { .. })), "{bad}");
        }
        let none = |path: &str| format!(r#"{{"path": {path}, "kind": "none"}}"#);
        for (one, other) in [(r#"["a"]"#, r#"["a"]"#), ("[]", r#"["a"]"#), (r#"["a", 0, "b"]"#, r#"["a", 0]"#)] {
            assert!(
                matches!(parse(&format!("{}, {}", none(one), none(other))), Err(TreeError::Path(_))),
                "{one} {other}"
            );
        }
        assert!(parse(&format!("{}, {}", none(r#"["a", 0]"#), none(r#"["a", "0"]"#))).is_ok());
        let array = |path: &str| format!(r#"{{"path": {path}, "kind": "array", "tensor": "t"}}"#);
        assert_eq!(
            parse(&format!("{}, {}", array(r#"["a"]"#), array(r#"["b"]"#))),
            Err(TreeError::Tensor("t".to_owned()))
        );
    }
}
