//! Leaves of safetensors files: one a tensor, or the tree that was converted to them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::catalog::{Catalog, LeafInfo, LeafKind, plain_meta};
use super::value::Value;
use crate::error::{Error, Result};
use crate::keypath::{Key, KeyPath};
use crate::layout::safetensors::{self, tree};
use crate::need::Asker;
use crate::plan::{StoredArray, Values};
use crate::zarr::ByteCodec;

/// Reads the headers of safetensors files: a flat tree, one name a leaf, unless the entry [`tree::ENTRY`] says more.
pub(super) async fn read_safetensors(ask: &Asker, source: &safetensors::Source) -> Result<Catalog> {
    let mut catalog = Catalog::default();
    let mut metadata = BTreeMap::new();
    let mut entries = Vec::new();
    for file in safetensors::read(ask, source).await? {
        for tensor in file.tensors {
            let codecs = match safetensors::header::packed_bits(tensor.dtype) {
                Some(bits) => vec![ByteCodec::Packed { bits }],
                None => Vec::new(),
            };
            let meta = plain_meta(tensor.dtype, tensor.shape.clone(), codecs).ok_or_else(|| {
                Error::corrupt("the tensor's shape is absurd")
                    .at("tensor", &tensor.name)
                    .found(format_args!("{:?}", tensor.shape))
            })?;
            let values = Values::Extent { path: file.path.clone(), offset: tensor.offset, len: tensor.len };
            let name = tensor.name.clone();
            let array = StoredArray { name, meta: Arc::new(meta), values, every_chunk_stored: true, sums: None };
            let path = KeyPath(vec![Key::Name(tensor.name)]);
            catalog.leaves.push(LeafInfo { path, kind: LeafKind::Array(catalog.arrays.len()), saved: None });
            catalog.arrays.push(array);
        }
        let mut own = file.metadata;
        entries.extend(own.remove(tree::ENTRY));
        metadata.extend(own);
    }
    let custom = metadata.into_iter().map(|(key, value)| (key, value.into())).collect::<serde_json::Map<_, _>>();
    catalog.custom_metadata = (!custom.is_empty()).then(|| custom.into());
    match entries.as_slice() {
        [] => {}
        [entry] => {
            if let Err(why) = restore(&mut catalog, entry) {
                catalog.notes.push(unused(&why));
            }
        }
        several => catalog.notes.push(unused(&format!("{} files have one", several.len()))),
    }
    Ok(catalog)
}

/// Puts together the tree that the tensors were. What does not fit the tensors (somebody else changed the file) leaves all as it
/// was; tensors that the tree does not name stay leaves of their own.
fn restore(catalog: &mut Catalog, entry: &str) -> Result<(), String> {
    let tree = tree::parse(entry).map_err(|error| error.to_string())?;
    let mut arrays: HashMap<&str, usize> =
        catalog.arrays.iter().enumerate().map(|(number, array)| (array.name.as_str(), number)).collect();
    let mut leaves = Vec::with_capacity(tree.leaves.len());
    for (path, leaf) in tree.leaves {
        let array = match leaf.tensor() {
            Some(tensor) => Some(
                arrays.remove(tensor).ok_or_else(|| format!("it names the tensor `{tensor}`, which is not there"))?,
            ),
            None => None,
        };
        let kind = match (leaf, array) {
            (tree::Leaf::Array { .. }, Some(array)) => LeafKind::Array(array),
            (tree::Leaf::Key { key_impl, .. }, Some(array)) => LeafKind::Key(array, key_impl),
            (tree::Leaf::Scalar { tensor }, Some(array)) => {
                let meta = &catalog.arrays[array].meta;
                if !meta.shape.is_empty() {
                    return Err(format!("the tensor `{tensor}` has dimensions, and is no scalar"));
                }
                // The value is read when all scalars are known, in one go.
                LeafKind::Scalar { array: Some(array), dtype: meta.dtype, value: Value::Bool(false) }
            }
            (tree::Leaf::Text(text), _) => LeafKind::Text(text),
            (tree::Leaf::Empty(container), _) => LeafKind::Empty(container),
            _ => LeafKind::None,
        };
        leaves.push(LeafInfo { path, kind, saved: None });
    }
    let mut rest: Vec<usize> = arrays.into_values().collect();
    rest.sort_unstable();
    let first: HashSet<Option<Key>> = leaves.iter().map(|leaf| leaf.path.0.first().cloned()).collect();
    for array in rest {
        let path = KeyPath(vec![Key::Name(catalog.arrays[array].name.clone())]);
        if first.contains(&None) || first.contains(&path.0.first().cloned()) {
            return Err(format!("the tensor {path} is new, and has the name of a part of the tree"));
        }
        leaves.push(LeafInfo { path, kind: LeafKind::Array(array), saved: None });
    }
    catalog.leaves = leaves;
    catalog.containers = tree.containers;
    catalog.custom_metadata = tree.custom_metadata;
    catalog.checkpoint_metadata = tree.checkpoint_metadata;
    catalog.json_items = tree.json_items;
    Ok(())
}

fn unused(why: &str) -> Error {
    Error::corrupt(format!("the entry `{}` of `__metadata__` is not used: {why}", tree::ENTRY))
        .hint("every tensor is a leaf of its own")
}
