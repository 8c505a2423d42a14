//! How two checkpoints differ, leaf by leaf.

use std::collections::HashMap;

use super::catalog::{LeafInfo, LeafKind};
use super::checkpoint::Checkpoint;
use super::engine::EngineOptions;
use super::inline::{read_elements, whole_wants};
use crate::error::Result;
use crate::keypath::KeyPath;
use crate::shape::byte_count;

/// What [`diff`] finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// Leaves that only the first has.
    pub only_a: Vec<KeyPath>,
    /// Leaves that only the second has.
    pub only_b: Vec<KeyPath>,
    /// Leaves that both have and that differ.
    pub different: Vec<Difference>,
    /// Number of leaves that are equal.
    pub equal: u64,
}

/// One leaf that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The leaf.
    pub path: KeyPath,
    /// In what: `kind`, `dtype`, `shape` or `value`.
    pub what: &'static str,
    /// What the first has.
    pub a: String,
    /// What the second has.
    pub b: String,
    /// How many elements differ, for values of arrays.
    pub elements: Option<u64>,
}

/// Compares structure, types, shapes and every bit of every value. Layout on disk does not matter. Arrays are read in
/// groups of a limited size; a single array is held whole.
///
/// # Errors
/// Data that cannot be read.
pub fn diff(a: &Checkpoint, b: &Checkpoint, options: &EngineOptions) -> Result<Diff> {
    let mut found = Diff::default();
    let in_b: HashMap<String, &LeafInfo> = b.leaves().iter().map(|leaf| (leaf.path.to_string(), leaf)).collect();
    let in_a: HashMap<String, ()> = a.leaves().iter().map(|leaf| (leaf.path.to_string(), ())).collect();
    found.only_b.extend(
        b.leaves().iter().filter(|leaf| !in_a.contains_key(&leaf.path.to_string())).map(|leaf| leaf.path.clone()),
    );
    let mut pairs: Vec<(&KeyPath, usize, usize)> = Vec::new();
    let mut pending_bytes = 0;
    for leaf in a.leaves() {
        let Some(other) = in_b.get(&leaf.path.to_string()) else {
            found.only_a.push(leaf.path.clone());
            continue;
        };
        match compare(a, b, leaf, other) {
            Compared::Differs(what, left, right) => {
                let path = leaf.path.clone();
                found.different.push(Difference { path, what, a: left, b: right, elements: None });
            }
            Compared::Equal => found.equal += 1,
            Compared::ByValue(left, right) => {
                let meta = &a.arrays()[left].meta;
                pending_bytes += byte_count(&meta.shape, meta.dtype.size()).unwrap_or(u64::MAX);
                pairs.push((&leaf.path, left, right));
                if pending_bytes >= options.staging_bytes / 4 {
                    values(a, b, &pairs, &mut found)?;
                    pairs.clear();
                    pending_bytes = 0;
                }
            }
        }
    }
    values(a, b, &pairs, &mut found)?;
    Ok(found)
}

enum Compared {
    Equal,
    Differs(&'static str, String, String),
    /// Two arrays of equal type and shape.
    ByValue(usize, usize),
}

fn compare(a: &Checkpoint, b: &Checkpoint, left: &LeafInfo, right: &LeafInfo) -> Compared {
    if left.kind.name() != right.kind.name() {
        return Compared::Differs("kind", left.kind.name().to_owned(), right.kind.name().to_owned());
    }
    match (&left.kind, &right.kind) {
        (LeafKind::Scalar { dtype, value, .. }, LeafKind::Scalar { dtype: other_dtype, value: other, .. }) => {
            if dtype != other_dtype {
                return Compared::Differs("dtype", dtype.to_string(), other_dtype.to_string());
            }
            // Compared in their JSON form, in which a NaN equals a NaN.
            let (value, other) = (value.json(), other.json());
            if value == other {
                Compared::Equal
            } else {
                Compared::Differs("value", value.to_string(), other.to_string())
            }
        }
        (LeafKind::Text(text), LeafKind::Text(other)) if text != other => {
            Compared::Differs("value", format!("{text:?}"), format!("{other:?}"))
        }
        (LeafKind::Empty(container), LeafKind::Empty(other)) if container != other => {
            Compared::Differs("kind", container.name().to_owned(), other.name().to_owned())
        }
        (LeafKind::Key(_, key_impl), LeafKind::Key(_, other)) if key_impl != other => {
            Compared::Differs("kind", key_impl.clone(), other.clone())
        }
        (left, right) => match (left.array(), right.array()) {
            (Some(left), Some(right)) => {
                let (meta, other) = (&a.arrays()[left].meta, &b.arrays()[right].meta);
                if meta.dtype != other.dtype {
                    Compared::Differs("dtype", meta.dtype.to_string(), other.dtype.to_string())
                } else if meta.shape != other.shape {
                    Compared::Differs("shape", format!("{:?}", meta.shape), format!("{:?}", other.shape))
                } else {
                    Compared::ByValue(left, right)
                }
            }
            _ => Compared::Equal,
        },
    }
}

fn values(a: &Checkpoint, b: &Checkpoint, pairs: &[(&KeyPath, usize, usize)], found: &mut Diff) -> Result<()> {
    let read = |checkpoint: &Checkpoint, arrays: Vec<usize>| {
        read_elements(&checkpoint.root(), checkpoint.arrays(), whole_wants(checkpoint.arrays(), arrays))
    };
    let left = read(a, pairs.iter().map(|(_, left, _)| *left).collect())?;
    let right = read(b, pairs.iter().map(|(.., right)| *right).collect())?;
    for ((path, array, _), (left, right)) in pairs.iter().zip(left.iter().zip(&right)) {
        if **left == **right {
            found.equal += 1;
            continue;
        }
        let dtype = a.arrays()[*array].meta.dtype;
        let elements = left.chunks_exact(dtype.size()).zip(right.chunks_exact(dtype.size()));
        let count = elements.filter(|(left, right)| left != right).count() as u64;
        found.different.push(Difference {
            path: (*path).clone(),
            what: "value",
            a: format!("{count} of {} elements differ", left.len() / dtype.size()),
            b: String::new(),
            elements: Some(count),
        });
    }
    Ok(())
}
