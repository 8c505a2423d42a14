//! Targets: which leaves are wanted, as what, where.
//!
//! A [`Target`] starts as the whole checkpoint as stored. Each method takes it and gives it back changed; rules speak of the
//! paths and dimensions that the target has at that moment. A leaf's sharding follows its dimensions when they are
//! permuted. What does not fit (a rule that matches nothing, say) is remembered and reported, all of it in one error, when
//! the target is planned or loaded, or by [`Target::check`]. Nothing is read.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::catalog::{LeafKind, SavedSpec};
use super::checkpoint::Checkpoint;
use super::rules::{Pattern, Rules, no_such, regex};
use super::value::Value;
use crate::dtype::{CastPolicy, DType};
use crate::error::{Error, Result};
use crate::keypath::{Key, KeyPath};
use crate::layout::orbax::metadata::Container;
use crate::plan::{Device, Mesh, Sharding, Spec, View};

/// What is wanted of a checkpoint.
#[derive(Clone, Debug)]
pub struct Target {
    pub(super) checkpoint: Checkpoint,
    pub(super) leaves: Vec<TargetLeaf>,
    pub(super) skipped: Vec<KeyPath>,
    pub(super) missing: Vec<KeyPath>,
    pub(super) mesh: Option<Arc<Mesh>>,
    pub(super) otherwise: Option<Otherwise>,
    pub(super) pad: Option<Value>,
    pub(super) policy: CastPolicy,
    pub(super) even: bool,
    /// Rules that did not fit, in the order in which they were given; see [`Target::check`].
    pub(super) problems: Vec<Arc<Error>>,
    /// Leaves that did not fit the rows that this target was made of.
    pub(super) unfit: Vec<UnfitRow>,
}

/// A row of a target that does not fit the checkpoint, and why in one line.
#[derive(Clone, Debug)]
pub(super) enum UnfitRow {
    /// The checkpoint has no such leaf.
    Absent(String),
    /// The leaf is not what the row says, or cannot be made into it.
    Other(String),
}

impl UnfitRow {
    pub(super) fn line(&self) -> &str {
        match self {
            Self::Absent(line) | Self::Other(line) => line,
        }
    }
}

/// What happens to arrays that no sharding rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// Every device holds all of it.
    Replicate,
    /// It is an error.
    Refuse,
}

/// What happens when a target names a leaf that the checkpoint lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Missing {
    /// It is an error.
    #[default]
    Error,
    /// It is left out and reported.
    Keep,
}

/// One wanted leaf.
#[derive(Clone, Debug)]
pub(super) struct TargetLeaf {
    pub(super) path: KeyPath,
    /// The checkpoint's leaf, by position, where it is one.
    pub(super) source: Option<usize>,
    pub(super) what: What,
    pub(super) priority: u32,
}

#[derive(Clone, Debug)]
pub(super) enum What {
    Array(ArrayWant),
    Scalar { dtype: DType, value: Value },
    Text(String),
    None,
    Empty(Container),
    Unreadable(Arc<Error>),
}

#[derive(Clone, Debug)]
pub(super) struct ArrayWant {
    pub(super) view: View,
    pub(super) shape: Vec<u64>,
    pub(super) dtype: DType,
    pub(super) sharding: Option<(Arc<Mesh>, Spec)>,
    pub(super) key_impl: Option<String>,
}

impl ArrayWant {
    /// Whether it has the stored type and extents.
    pub(super) fn is_as_stored(&self, checkpoint: &Checkpoint) -> bool {
        let types = self.view.pieces.iter().map(|piece| checkpoint.arrays()[piece.array].meta.dtype);
        self.shape == self.view.shape && types.into_iter().all(|dtype| dtype == self.dtype)
    }

    /// The saved spec, as it is for this view: a transposed or narrowed one keeps the axes of the stored dimensions that it
    /// shows.
    pub(super) fn saved_spec(&self, saved: &SavedSpec) -> Spec {
        let spec = |dim: &Option<usize>| dim.and_then(|dim| saved.spec.get(dim).cloned()).unwrap_or_default();
        match self.view.pieces.as_slice() {
            [piece] if piece.dims.iter().copied().ne((0..piece.base.len()).map(Some)) => {
                Spec(piece.dims.iter().map(spec).collect())
            }
            _ => Spec(saved.spec.clone()),
        }
    }

    /// Refuses a cast that has no meaning.
    pub(super) fn check_cast(&self, checkpoint: &Checkpoint, to: DType) -> Result<()> {
        let mut types = self.view.pieces.iter().map(|piece| checkpoint.arrays()[piece.array].meta.dtype);
        match types.find(|dtype| !dtype.casts_to(to)) {
            Some(_) => Err(Error::invalid("a complex array cannot be cast to bool")),
            None => Ok(()),
        }
    }
}

impl Target {
    /// Everything as stored.
    pub(super) fn of(checkpoint: Checkpoint) -> Self {
        let array_want = |array: usize, key_impl: Option<String>| {
            let meta = &checkpoint.arrays()[array].meta;
            let (view, shape) = (View::whole(array, &meta.shape), meta.shape.clone());
            What::Array(ArrayWant { view, shape, dtype: meta.dtype, sharding: None, key_impl })
        };
        let what = |kind: &LeafKind| match kind {
            LeafKind::Array(array) => array_want(*array, None),
            LeafKind::Key(array, key_impl) => array_want(*array, Some(key_impl.clone())),
            LeafKind::Scalar { dtype, value, .. } => What::Scalar { dtype: *dtype, value: value.clone() },
            LeafKind::Text(text) => What::Text(text.clone()),
            LeafKind::None => What::None,
            LeafKind::Empty(container) => What::Empty(*container),
            LeafKind::Unreadable(error) => What::Unreadable(Arc::clone(error)),
        };
        let leaves = checkpoint.leaves().iter().enumerate().map(|(source, info)| TargetLeaf {
            path: info.path.clone(),
            source: Some(source),
            what: what(&info.kind),
            priority: 0,
        });
        Self {
            leaves: leaves.collect(),
            checkpoint,
            skipped: Vec::new(),
            missing: Vec::new(),
            mesh: None,
            otherwise: None,
            pad: None,
            policy: CastPolicy::default(),
            even: false,
            problems: Vec::new(),
            unfit: Vec::new(),
        }
    }

    /// Whether everything that was said fits: what planning and loading ask first.
    ///
    /// # Errors
    /// Everything that does not fit, in one error: rules that match no leaf or not what they are for, leaves whose shape,
    /// type or sharding is impossible, in the order in which it was said, with the nearest names.
    pub fn check(&self) -> Result<()> {
        self.wants().map(drop)
    }

    /// Makes a change; what fails is remembered until the target is used.
    pub(super) fn noting(mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Self {
        if let Err(error) = change(&mut self) {
            self.problems.push(Arc::new(error));
        }
        self
    }

    /// Keeps the leaves that match one of the patterns. A pattern that matches no leaf does not fit.
    #[must_use]
    pub fn only<P: Into<Pattern>>(self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.noting(|target| target.select("only", patterns, true))
    }

    /// Leaves out the leaves that match one of the patterns. A pattern that matches no leaf does not fit.
    #[must_use]
    pub fn skip<P: Into<Pattern>>(self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.noting(|target| target.select("skip", patterns, false))
    }

    fn select<P: Into<Pattern>>(
        &mut self,
        option: &'static str,
        patterns: impl IntoIterator<Item = P>,
        keep: bool,
    ) -> Result<()> {
        let mut rules = Rules::new(option, patterns.into_iter().map(|pattern| (pattern, ())));
        let matched: Vec<bool> =
            self.leaves.iter().map(|leaf| rules.first(&leaf.path, leaf.dtype()).is_some()).collect();
        if !rules.all_used() {
            // `only` and `skip` each speak of the whole checkpoint, not of what the other left over.
            let skipped: HashSet<&KeyPath> = self.skipped.iter().collect();
            for leaf in self.checkpoint.leaves().iter().filter(|leaf| skipped.contains(&leaf.path)) {
                rules.first(&leaf.path, self.checkpoint.dtype(&leaf.kind));
            }
        }
        let checked = rules.check(self.leaves.iter().map(|leaf| &leaf.path).chain(&self.skipped));
        // A misspelt `only` must not make every later rule fail too: what nothing matched changes nothing.
        if checked.is_err() && !matched.contains(&true) {
            return checked;
        }
        let leaves = std::mem::take(&mut self.leaves).into_iter().zip(matched);
        let (kept, left): (Vec<_>, Vec<_>) = leaves.partition(|(_, matched)| *matched == keep);
        self.leaves = kept.into_iter().map(|(leaf, _)| leaf).collect();
        self.skipped.extend(left.into_iter().map(|(leaf, _)| leaf.path));
        checked
    }

    /// Divides arrays over a mesh: the first matching rule gives an array its partition spec. Arrays without a rule follow
    /// [`otherwise`](Self::otherwise). Rules that match no leaf or name something other than an array do not fit, nor specs
    /// that do not fit the mesh or the rank.
    #[must_use]
    pub fn shard<P: Into<Pattern>>(mut self, mesh: &Arc<Mesh>, rules: impl IntoIterator<Item = (P, Spec)>) -> Self {
        self.mesh = Some(Arc::clone(mesh));
        self.arrays("spec", rules, |array, spec| {
            Sharding::new(Arc::clone(mesh), spec.clone(), array.shape.len())?;
            array.sharding = Some((Arc::clone(mesh), spec.clone()));
            Ok(())
        })
    }

    /// Gives arrays without a sharding the one they were saved with, by position over these devices, where their mesh had
    /// as many devices. What does not fit is left to [`otherwise`](Self::otherwise): the saved sharding only advises.
    #[must_use]
    pub fn shard_as_saved(mut self, devices: &[Device]) -> Self {
        let mut meshes: Vec<Option<Arc<Mesh>>> = Vec::new();
        for saved in self.checkpoint.meshes() {
            let count = crate::shape::element_count(&saved.shape);
            let fits = count == Some(devices.len() as u64) && saved.axes.len() == saved.shape.len();
            let axes = saved.axes.iter().cloned().zip(saved.shape.iter().copied());
            meshes.push(if fits { Mesh::new(axes, devices.iter().copied()).ok() } else { None });
        }
        for leaf in &mut self.leaves {
            let (What::Array(array), Some(source)) = (&mut leaf.what, leaf.source) else { continue };
            let Some(saved) = &self.checkpoint.leaves()[source].saved else { continue };
            let Some(mesh) = meshes.get(saved.mesh).cloned().flatten() else { continue };
            let spec = array.saved_spec(saved);
            // Advisory: what does not fit any more is left to `otherwise`.
            if array.sharding.is_none() && Sharding::new(Arc::clone(&mesh), spec.clone(), array.shape.len()).is_ok() {
                array.sharding = Some((mesh, spec));
            }
        }
        self
    }

    /// The mesh of arrays that [`otherwise`](Self::otherwise) replicates.
    #[must_use]
    pub fn on(mut self, mesh: &Arc<Mesh>) -> Self {
        self.mesh = Some(Arc::clone(mesh));
        self
    }

    /// What happens to arrays that no sharding rule matched. It must be said once a mesh is given.
    #[must_use]
    pub fn otherwise(mut self, otherwise: Otherwise) -> Self {
        self.otherwise = Some(otherwise);
        self
    }

    /// Refuses dimensions that their axes do not divide evenly, as JAX does.
    #[must_use]
    pub fn even(mut self) -> Self {
        self.even = true;
        self
    }

    /// Casts arrays: the first matching rule gives the type. Rules that match no leaf or name something other than an array
    /// do not fit, nor complex to bool.
    #[must_use]
    pub fn cast<P: Into<Pattern>>(self, rules: impl IntoIterator<Item = (P, DType)>) -> Self {
        let checkpoint = self.checkpoint.clone();
        self.arrays("cast", rules, |array, dtype| {
            array.check_cast(&checkpoint, *dtype)?;
            array.dtype = *dtype;
            Ok(())
        })
    }

    /// What happens to values that a type cannot hold.
    #[must_use]
    pub fn cast_policy(mut self, policy: CastPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Wants other extents; needs [`pad`](Self::pad) unless they are equal. Rules that match no leaf or name something other
    /// than an array do not fit, nor another rank.
    #[must_use]
    pub fn shape<P: Into<Pattern>>(self, rules: impl IntoIterator<Item = (P, Vec<u64>)>) -> Self {
        self.arrays("shape", rules, |array, shape| {
            if shape.len() != array.shape.len() {
                return Err(Error::invalid("a shape must keep the rank")
                    .expected(format_args!("{} dimensions, as in {:?}", array.shape.len(), array.shape))
                    .found(format_args!("{shape:?}")));
            }
            array.shape.clone_from(shape);
            Ok(())
        })
    }

    /// Allows shapes that differ from the stored ones: low indices are kept, what is beyond is cut off, and what is missing
    /// becomes `value`, cast to the wanted type as the policy says.
    #[must_use]
    pub fn pad(mut self, value: impl Into<Value>) -> Self {
        self.pad = Some(value.into());
        self
    }

    /// Permutes dimensions: new dimension `i` is old dimension `order[i]`; JAX's `[in, out]` becomes `[out, in]` by `[1, 0]`.
    /// Rules that match no leaf or name something other than an array do not fit, nor orders of another rank.
    #[must_use]
    pub fn transpose<P: Into<Pattern>>(self, rules: impl IntoIterator<Item = (P, Vec<usize>)>) -> Self {
        self.arrays("transpose", rules, |array, order| {
            array.view = array.view.transpose(order)?;
            array.shape = order.iter().map(|&dim| array.shape[dim]).collect();
            if let Some((_, spec)) = &mut array.sharding {
                *spec = spec.permuted(order);
            }
            Ok(())
        })
    }

    /// Takes one index of a dimension, which disappears, or a range of it: `[L, ...]` stacks of layers become single ones.
    /// Rules that match no leaf or name something other than an array do not fit, nor an index or range outside.
    #[must_use]
    pub fn take<P: Into<Pattern>>(self, rules: impl IntoIterator<Item = (P, Take)>) -> Self {
        self.arrays("take", rules, |array, take| {
            if array.shape != array.view.shape {
                return Err(Error::invalid("take comes before a change of shape"));
            }
            array.view = match *take {
                Take::Index { dim, index } => array.view.index(dim, index)?,
                Take::Range { dim, start, stop } => array.view.range(dim, start, stop)?,
            };
            array.shape.clone_from(&array.view.shape);
            if let (Take::Index { dim, .. }, Some((_, spec))) = (take, &mut array.sharding)
                && *dim < spec.0.len()
            {
                spec.0.remove(*dim);
            }
            Ok(())
        })
    }

    /// Renames leaves: the first rule whose regular expression is found in the path's string form replaces that part;
    /// `$1` or `${name}` stand for groups. The result is split at `/` again. Texts that are no regular expressions, rules
    /// that match no leaf and two leaves of one name do not fit.
    #[must_use]
    pub fn rename<'r>(self, rules: impl IntoIterator<Item = (&'r str, &'r str)>) -> Self {
        self.noting(|target| target.renamed(rules))
    }

    fn renamed<'r>(&mut self, rules: impl IntoIterator<Item = (&'r str, &'r str)>) -> Result<()> {
        let rules = rules.into_iter().map(|(from, to)| Ok((regex(from)?, to, from))).collect::<Result<Vec<_>>>()?;
        let mut used = vec![false; rules.len()];
        for leaf in &mut self.leaves {
            let text = leaf.path.to_string();
            let mut renamed = None;
            for (index, (pattern, to, _)) in rules.iter().enumerate() {
                if pattern.is_match(&text) {
                    used[index] = true;
                    renamed = renamed.or_else(|| Some(pattern.replace(&text, *to).into_owned()));
                }
            }
            if let Some(renamed) = renamed.filter(|renamed| *renamed != text) {
                leaf.path = reparsed(&renamed, &leaf.path);
            }
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            let names = self.leaves.iter().map(|leaf| leaf.path.to_string());
            return Err(no_such("rename", rules[unused].2, names));
        }
        self.check_names()
    }

    /// Replaces the leaves that match by one: their arrays side by side along a new dimension, in the target's order. The
    /// new leaf has no sharding yet. A pattern that matches no array, shapes or types that differ and a name that is taken
    /// do not fit.
    #[must_use]
    pub fn stack(self, pattern: impl Into<Pattern>, dim: usize, into: KeyPath) -> Self {
        self.noting(|target| target.join("stack", &pattern.into(), into, |views| View::stack(views, dim)))
    }

    /// Replaces the leaves that match by one: their arrays one after the other along a dimension, in the target's order. The
    /// new leaf has no sharding yet. A pattern that matches no array, shapes that differ elsewhere, types that differ and a
    /// name that is taken do not fit.
    #[must_use]
    pub fn concatenate(self, pattern: impl Into<Pattern>, dim: usize, into: KeyPath) -> Self {
        self.noting(|target| target.join("concatenate", &pattern.into(), into, |views| View::concatenate(views, dim)))
    }

    fn join(
        &mut self,
        option: &'static str,
        pattern: &Pattern,
        into: KeyPath,
        join: impl FnOnce(&[View]) -> Result<View>,
    ) -> Result<()> {
        let mut views = Vec::new();
        let mut first: Option<(usize, ArrayWant)> = None;
        for (position, leaf) in self.leaves.iter().enumerate() {
            let What::Array(array) = &leaf.what else { continue };
            if !(pattern.matches(&leaf.path) && pattern.admits(array.dtype)) {
                continue;
            }
            if array.shape != array.view.shape {
                return Err(Error::invalid(format!("{option} comes before a change of shape")).at("leaf", &leaf.path));
            }
            views.push(array.view.clone());
            let (_, first) = first.get_or_insert_with(|| (position, array.clone()));
            if array.dtype != first.dtype {
                return Err(Error::invalid("arrays of different types cannot be joined")
                    .at("leaf", &leaf.path)
                    .expected(first.dtype)
                    .found(array.dtype)
                    .hint("cast them to one type first"));
            }
        }
        let Some((position, mut array)) = first else {
            let names = self.leaves.iter().map(|leaf| leaf.path.to_string());
            return Err(no_such(option, &pattern.to_string(), names));
        };
        array.view = join(&views).map_err(|error| error.at("leaf", &into))?;
        array.shape.clone_from(&array.view.shape);
        array.sharding = None;
        let joined =
            TargetLeaf { path: into, source: None, what: What::Array(array), priority: self.leaves[position].priority };
        self.leaves.insert(position, joined);
        let mut index = 0;
        self.leaves.retain(|leaf| {
            index += 1;
            let stays = index == position + 1;
            stays
                || !(matches!(&leaf.what, What::Array(array) if pattern.admits(array.dtype))
                    && pattern.matches(&leaf.path))
        });
        self.check_names()
    }

    /// Replaces one array by several: consecutive ranges of a dimension with these extents and names. A path that is no
    /// array, extents that do not add up to the dimension and a name that is taken do not fit.
    #[must_use]
    pub fn split(self, path: &str, dim: usize, parts: impl IntoIterator<Item = (KeyPath, u64)>) -> Self {
        self.noting(|target| target.divide(path, dim, parts))
    }

    fn divide(&mut self, path: &str, dim: usize, parts: impl IntoIterator<Item = (KeyPath, u64)>) -> Result<()> {
        let position =
            self.leaves.iter().position(|leaf| leaf.path.to_string() == path && matches!(leaf.what, What::Array(_)));
        let Some(position) = position else {
            return Err(no_such("split", path, self.leaves.iter().map(|leaf| leaf.path.to_string())));
        };
        let leaf = &self.leaves[position];
        let What::Array(array) = &leaf.what else { return Err(Error::bug("a split leaf is no array")) };
        if array.shape != array.view.shape {
            return Err(Error::invalid("split comes before a change of shape").at("leaf", path));
        }
        let mut start = 0u64;
        let mut made = Vec::new();
        for (path_of_part, extent) in parts {
            let mut part = array.clone();
            let stop = start.saturating_add(extent);
            part.view = array.view.range(dim, start, stop).map_err(|error| error.at("leaf", path))?;
            part.shape.clone_from(&part.view.shape);
            made.push(TargetLeaf {
                path: path_of_part,
                source: leaf.source,
                what: What::Array(part),
                priority: leaf.priority,
            });
            start = stop;
        }
        let whole = array.shape.get(dim).copied().unwrap_or(0);
        if start != whole {
            return Err(Error::invalid("the parts do not add up to the dimension")
                .at("leaf", path)
                .expected(whole)
                .found(start));
        }
        self.leaves.splice(position..=position, made);
        self.check_names()
    }

    /// Reads leaves in this order: those that match the first pattern first, and so on; the rest last. A pattern that matches
    /// no leaf does not fit.
    #[must_use]
    pub fn order<P: Into<Pattern>>(self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.noting(|target| target.ordered(patterns))
    }

    fn ordered<P: Into<Pattern>>(&mut self, patterns: impl IntoIterator<Item = P>) -> Result<()> {
        let numbered = patterns
            .into_iter()
            .enumerate()
            .map(|(number, pattern)| (pattern, u32::try_from(number).unwrap_or(u32::MAX)));
        let mut rules = Rules::new("order", numbered);
        for leaf in &mut self.leaves {
            let dtype = leaf.dtype();
            leaf.priority = rules.first(&leaf.path, dtype).map_or(u32::MAX, |(_, number)| *number);
        }
        rules.check(self.leaves.iter().map(|leaf| &leaf.path))
    }

    /// Changes every array that a rule matches.
    fn arrays<P: Into<Pattern>, V>(
        mut self,
        option: &'static str,
        rules: impl IntoIterator<Item = (P, V)>,
        mut change: impl FnMut(&mut ArrayWant, &V) -> Result<()>,
    ) -> Self {
        let mut rules = Rules::new(option, rules);
        let mut failed = Vec::new();
        for leaf in &mut self.leaves {
            let dtype = leaf.dtype();
            let Some((pattern, value)) = rules.first(&leaf.path, dtype) else { continue };
            match &mut leaf.what {
                What::Array(array) if array.key_impl.is_none() || !KEYS_UNTOUCHED.contains(&option) => {
                    if let Err(error) = change(array, value) {
                        failed.push(error.at("leaf", &leaf.path));
                    }
                }
                _ if pattern.is_literal() => {
                    failed.push(
                        Error::invalid(format!("a {option} rule names a leaf that is no array")).at("leaf", &leaf.path),
                    );
                }
                _ => {}
            }
        }
        let unmatched = rules.check(self.leaves.iter().map(|leaf| &leaf.path)).err();
        self.problems.extend(unmatched.into_iter().chain(failed).map(Arc::new));
        self
    }

    /// Refuses two leaves of one name.
    pub(super) fn check_names(&self) -> Result<()> {
        let mut leaves: BTreeMap<String, Vec<&TargetLeaf>> = BTreeMap::new();
        for leaf in &self.leaves {
            leaves.entry(leaf.path.to_string()).or_default().push(leaf);
        }
        let stored = |leaf: &&TargetLeaf| match leaf.source {
            Some(source) => self.checkpoint.leaves()[source].path.to_string(),
            None => "one that is made of others".to_owned(),
        };
        let twice: Vec<String> = leaves
            .iter()
            .filter(|(_, same)| same.len() > 1)
            .map(|(name, same)| format!("{name}: {}", same.iter().map(stored).collect::<Vec<_>>().join(", ")))
            .collect();
        if twice.is_empty() {
            return Ok(());
        }
        Err(Error::invalid("several leaves have one name")
            .lines(twice)
            .hint("keep in the new names what tells the leaves apart, or leave some out with `--skip`"))
    }

    /// The checkpoint that this is a target of.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Leaves of the checkpoint that are left out, under the names they had then.
    pub fn skipped(&self) -> &[KeyPath] {
        &self.skipped
    }

    /// Leaves that were asked for and that the checkpoint lacks.
    pub fn missing(&self) -> &[KeyPath] {
        &self.missing
    }

    /// The paths that a load gives, in order.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &KeyPath> {
        self.leaves.iter().map(|leaf| &leaf.path)
    }
}

/// What is taken of a dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// One index; the dimension disappears.
    Index {
        /// The dimension.
        dim: usize,
        /// The index.
        index: u64,
    },
    /// The indices `[start, stop)`; the dimension stays.
    Range {
        /// The dimension.
        dim: usize,
        /// First index.
        start: u64,
        /// One past the last index.
        stop: u64,
    },
}

impl What {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Array(array) if array.key_impl.is_some() => "key",
            Self::Array(_) => "array",
            Self::Scalar { .. } => "scalar",
            Self::Text(_) => "string",
            Self::None => "none",
            Self::Empty(_) => "empty",
            Self::Unreadable(..) => "unreadable",
        }
    }
}

impl TargetLeaf {
    fn dtype(&self) -> Option<DType> {
        match &self.what {
            What::Array(array) => Some(array.dtype),
            What::Scalar { dtype, .. } => Some(*dtype),
            _ => None,
        }
    }
}

/// A renamed path: elements that are decimal numbers stay positions if the old path had that position.
fn reparsed(text: &str, old: &KeyPath) -> KeyPath {
    let mut path = KeyPath::from_escaped(text);
    for key in &mut path.0 {
        if let Key::Name(name) = key
            && let Ok(index) = name.parse::<u64>()
            && old.0.contains(&Key::Index(index))
        {
            *key = Key::Index(index);
        }
    }
    path
}

/// Options that leave the key data of PRNG keys alone: it is no number.
const KEYS_UNTOUCHED: [&str; 3] = ["cast", "shape", "spec"];
