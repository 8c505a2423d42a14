//! Targets as rows: exactly these leaves, each with what is said about it. A target file and a loaded tree are such lists.

use std::collections::HashMap;
use std::sync::Arc;

use super::catalog::LeafKind;
use super::checkpoint::Checkpoint;
use super::rules::no_leaf;
use super::state::{Leaf, State};
use super::target::{ArrayWant, Missing, Target, TargetLeaf, UnfitRow, What};
use super::value::{ScalarType, Value};
use crate::dtype::{Class, DType};
use crate::error::{Error, Result};
use crate::keypath::KeyPath;
use crate::layout::nearest;
use crate::plan::{Mesh, Spec, View};

/// One row of a target: what is said about a leaf. What is not said is as stored.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// The leaf; with a view the name of the new leaf.
    pub path: KeyPath,
    /// `array`, `scalar`, ..: scalars and 0-d arrays turn into each other, other kinds must be as stored.
    pub kind: Option<String>,
    /// Element type; of a scalar the type that its value is converted to.
    pub dtype: Option<DType>,
    /// Extents of the same rank; other extents need [`Target::pad`].
    pub shape: Option<Vec<u64>>,
    /// Who holds what.
    pub sharding: Option<(Arc<Mesh>, Spec)>,
    /// What the leaf is made of, if it is not one of the checkpoint.
    pub view: Option<RowView>,
}

/// A row that is made of other leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowView {
    /// The leaves side by side along a new dimension.
    Stack {
        /// The leaves.
        of: Vec<KeyPath>,
        /// Where the new dimension stands.
        dim: usize,
    },
    /// The leaves one after the other along a dimension.
    Concatenate {
        /// The leaves.
        of: Vec<KeyPath>,
        /// The dimension.
        dim: usize,
    },
    /// The indices `[start, stop)` of a dimension of one leaf.
    Split {
        /// The leaf.
        of: KeyPath,
        /// The dimension.
        dim: usize,
        /// First index.
        start: u64,
        /// One past the last index.
        stop: u64,
    },
}

impl Target {
    /// Wants what a loaded tree has: its leaves with their shapes, types and shardings. Leaves of the checkpoint that the
    /// tree lacks are skipped. Leaves that the checkpoint lacks (unless they are kept) or that are of another kind do not fit.
    #[must_use]
    pub fn like(self, state: &State, missing: Missing) -> Self {
        let rows = state.leaves().map(|(path, leaf)| {
            let row = |kind: &str| Row { path: path.clone(), kind: Some(kind.to_owned()), ..Row::default() };
            match leaf {
                Leaf::Array(array) => Row {
                    dtype: Some(array.dtype),
                    shape: Some(array.shape.clone()),
                    sharding: Some((Arc::clone(&array.sharding.mesh), array.sharding.spec.clone())),
                    path: path.clone(),
                    ..Row::default()
                },
                Leaf::Value { value: Value::Text(_), .. } => row("string"),
                Leaf::Value { dtype, .. } => Row { dtype: *dtype, ..row("scalar") },
                Leaf::None => row("none"),
                Leaf::Empty(_) => row("empty"),
            }
        });
        let rows: Vec<Row> = rows.collect();
        self.rows(rows, missing)
    }

    /// Wants exactly these rows, in their order; `ls --json`, edited, is such a list. Leaves without a row are skipped.
    ///
    /// Rows that the checkpoint lacks (unless they are kept), two rows of one name, kinds and ranks that differ do not fit.
    #[must_use]
    pub fn rows(mut self, rows: Vec<Row>, missing: Missing) -> Self {
        let mut unfit = Vec::new();
        let mut wanted = Vec::new();
        // Paths that print alike name the same leaf: target files come from people.
        let names: Vec<String> = self.leaves.iter().map(|leaf| leaf.path.to_string()).collect();
        let at: HashMap<&str, usize> = names.iter().enumerate().map(|(at, name)| (name.as_str(), at)).collect();
        let mut leaves: Vec<Option<TargetLeaf>> = std::mem::take(&mut self.leaves).into_iter().map(Some).collect();
        let arrays: HashMap<&str, ArrayWant> = names
            .iter()
            .zip(&leaves)
            .filter(|_| rows.iter().any(|row| row.view.is_some()))
            .filter_map(|(name, leaf)| match leaf.as_ref().map(|leaf| &leaf.what) {
                Some(What::Array(array)) => Some((name.as_str(), array.clone())),
                _ => None,
            })
            .collect();
        let mut used: Vec<usize> = Vec::new();
        for row in rows {
            if let Some(view) = row.view.clone() {
                used.extend(view.parts().iter().filter_map(|part| at.get(part.to_string().as_str())));
                let parts = view.parts().iter().map(|part| {
                    let name = part.to_string();
                    let array = arrays.get(name.as_str()).cloned();
                    array.ok_or_else(|| no_leaf(&name, arrays.keys().map(|name| (*name).to_owned())))
                });
                let made = parts.collect::<Result<Vec<_>>>().and_then(|parts| view.array(&parts)).and_then(|array| {
                    let path = row.path.clone();
                    let mut leaf = TargetLeaf { path, source: None, what: What::Array(array), priority: 0 };
                    row.clone().apply(&mut leaf, &self.checkpoint)?;
                    Ok(leaf)
                });
                match made {
                    Ok(leaf) => wanted.push(leaf),
                    Err(error) => unfit.push(UnfitRow::Other(format!("{}: {error}", row.path))),
                }
                continue;
            }
            let found = at.get(row.path.to_string().as_str()).map(|&at| leaves[at].take());
            if let Some(None) = found {
                unfit.push(UnfitRow::Other(format!("{}: named twice in the target", row.path)));
                continue;
            }
            let Some(mut leaf) = found.flatten() else {
                match missing {
                    Missing::Keep => self.missing.push(row.path),
                    Missing::Error => {
                        let wanted = row.path.to_string();
                        let near = nearest(&wanted, names.iter().map(String::as_str)).join(", ");
                        let near = if near.is_empty() { near } else { format!("; nearest: {near}") };
                        unfit.push(UnfitRow::Absent(format!("{wanted}: not in the checkpoint{near}")));
                    }
                }
                continue;
            };
            if let Err(error) = row.apply(&mut leaf, &self.checkpoint) {
                unfit.push(UnfitRow::Other(format!("{}: {error}", leaf.path)));
            }
            wanted.push(leaf);
        }
        self.unfit.extend(unfit);
        // A leaf that only stands inside another row is neither loaded by itself nor skipped.
        used.iter().for_each(|&at| leaves[at] = None);
        self.skipped.extend(leaves.into_iter().flatten().map(|leaf| leaf.path));
        self.leaves = wanted;
        self.noting(|target| target.check_names())
    }
}

impl RowView {
    /// The leaves that it is made of.
    fn parts(&self) -> &[KeyPath] {
        match self {
            Self::Stack { of, .. } | Self::Concatenate { of, .. } => of,
            Self::Split { of, .. } => std::slice::from_ref(of),
        }
    }

    /// The array that it makes of them.
    fn array(&self, parts: &[ArrayWant]) -> Result<ArrayWant> {
        let views: Vec<View> = parts.iter().map(|part| part.view.clone()).collect();
        let view = match (self, views.as_slice()) {
            (Self::Stack { dim, .. }, views) => View::stack(views, *dim)?,
            (Self::Concatenate { dim, .. }, views) => View::concatenate(views, *dim)?,
            (Self::Split { dim, start, stop, .. }, [whole]) => whole.range(*dim, *start, *stop)?,
            (Self::Split { .. }, _) => return Err(Error::bug("a split of several leaves")),
        };
        let dtype = parts.first().map(|part| part.dtype).ok_or_else(|| Error::invalid("a view of no leaves"))?;
        Ok(ArrayWant { shape: view.shape.clone(), view, dtype, sharding: None, key_impl: None })
    }
}

impl Row {
    /// Applies the row to the checkpoint's leaf of that path. Scalars and 0-d arrays turn into each other.
    fn apply(self, leaf: &mut TargetLeaf, checkpoint: &Checkpoint) -> Result<()> {
        let stored = leaf.source.map(|source| &checkpoint.leaves()[source].kind);
        let have = leaf.what.kind();
        let wanted = self.kind.as_deref().unwrap_or(match (have, &self.sharding) {
            ("scalar", Some(_)) => "array",
            (have, _) => have,
        });
        match (have, wanted) {
            (have, wanted) if have == wanted => {}
            ("array", "scalar") => {
                let What::Array(array) = &leaf.what else { return Err(Error::bug("an array is no array")) };
                let [piece] = array.view.pieces.as_slice() else {
                    return Err(Error::invalid("several arrays cannot become a scalar"));
                };
                leaf.what = What::Scalar { dtype: array.dtype, value: checkpoint.element(piece.array)? };
            }
            ("scalar", "array") => {
                let Some(array) = stored.and_then(LeafKind::array) else {
                    return Err(Error::invalid("a scalar that stands in a metadata file cannot become an array"));
                };
                let meta = &checkpoint.arrays()[array].meta;
                let view = View::whole(array, &meta.shape);
                let shape = meta.shape.clone();
                leaf.what = What::Array(ArrayWant { view, shape, dtype: meta.dtype, sharding: None, key_impl: None });
            }
            (have, wanted) => {
                return Err(Error::invalid(format!("a {have} cannot be loaded as {wanted}")));
            }
        }
        match &mut leaf.what {
            What::Array(array) => {
                if let Some(shape) = self.shape {
                    if shape.len() != array.shape.len() {
                        return Err(Error::invalid("the ranks do not fit")
                            .expected(format_args!("{:?}", array.shape))
                            .found(format_args!("{shape:?}")));
                    }
                    array.shape = shape;
                }
                if let Some(dtype) = self.dtype {
                    array.dtype = dtype;
                }
                if array.key_impl.is_some() && !array.is_as_stored(checkpoint) {
                    return Err(Error::invalid("the type and shape of a random key cannot be changed"));
                }
                // Whether it fits the mesh is asked at the end: a rule may still replace it.
                array.sharding = self.sharding.or(array.sharding.take());
            }
            What::Scalar { dtype, value } => {
                if self.shape.is_some_and(|shape| !shape.is_empty()) {
                    return Err(Error::invalid("a scalar has no dimensions"));
                }
                if let Some(wanted) = self.dtype.filter(|wanted| wanted != dtype) {
                    let to = match wanted.class() {
                        Class::Bool => ScalarType::Bool,
                        Class::Int(_) | Class::UInt(_) => ScalarType::Int,
                        Class::Float => ScalarType::Float,
                        Class::Complex => return Err(Error::invalid("a scalar cannot become complex")),
                    };
                    *value = value.convert(to)?.fit(wanted)?;
                    *dtype = wanted;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
