//! Targets: which leaves are wanted, as what, where.
//!
//! A [`Target`] starts as the whole checkpoint as stored. Each method takes it and gives it back changed; rules speak of the
//! paths and dimensions that the target has at that moment. A leaf's sharding follows its dimensions when they are
//! permuted. Nothing is read.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::catalog::LeafKind;
use super::checkpoint::Checkpoint;
use super::rules::{Pattern, Rules, no_such, regex};
use super::state::{Leaf, State};
use super::value::{ScalarType, Value};
use crate::dtype::{CastPolicy, Class, DType};
use crate::error::{Error, ErrorKind, Result};
use crate::keypath::{Key, KeyPath};
use crate::layout::nearest;
use crate::plan::{Device, Mesh, Sharding, Spec, View, Want};
use crate::transform::cpu::convert;

/// What is wanted of a checkpoint.
#[derive(Clone, Debug)]
pub struct Target {
    checkpoint: Checkpoint,
    pub(super) leaves: Vec<TargetLeaf>,
    pub(super) skipped: Vec<KeyPath>,
    pub(super) missing: Vec<KeyPath>,
    mesh: Option<Arc<Mesh>>,
    otherwise: Option<Otherwise>,
    pad: Option<f64>,
    policy: CastPolicy,
    even: bool,
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
    Empty(&'static str),
    Unreadable(ErrorKind, String),
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
    fn is_as_stored(&self, checkpoint: &Checkpoint) -> bool {
        let types = self.view.pieces.iter().map(|piece| checkpoint.arrays()[piece.array].meta.dtype);
        self.shape == self.view.shape && types.into_iter().all(|dtype| dtype == self.dtype)
    }

    /// Refuses a cast that has no meaning.
    fn check_cast(&self, checkpoint: &Checkpoint, to: DType) -> Result<()> {
        let mut types = self.view.pieces.iter().map(|piece| checkpoint.arrays()[piece.array].meta.dtype);
        match types.find(|dtype| !dtype.casts_to(to)) {
            Some(_) => Err(Error::invalid("a complex array cannot be cast to bool")),
            None => Ok(()),
        }
    }
}

/// A leaf of the result: ready now, or an array of the plan.
#[derive(Clone, Debug)]
pub(super) enum Assembled {
    Planned { leaf: usize, key_impl: Option<String> },
    Ready(Leaf),
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
            LeafKind::Empty(container) => What::Empty(container.name()),
            LeafKind::Unreadable { kind, why } => What::Unreadable(*kind, why.clone()),
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
        }
    }

    /// Keeps the leaves that match one of the patterns.
    ///
    /// # Errors
    /// A pattern that matches no leaf.
    pub fn only<P: Into<Pattern>>(self, patterns: impl IntoIterator<Item = P>) -> Result<Self> {
        self.select("only", patterns, true)
    }

    /// Leaves out the leaves that match one of the patterns.
    ///
    /// # Errors
    /// A pattern that matches no leaf.
    pub fn skip<P: Into<Pattern>>(self, patterns: impl IntoIterator<Item = P>) -> Result<Self> {
        self.select("skip", patterns, false)
    }

    fn select<P: Into<Pattern>>(
        mut self,
        option: &'static str,
        patterns: impl IntoIterator<Item = P>,
        keep: bool,
    ) -> Result<Self> {
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
        rules.check(self.leaves.iter().map(|leaf| &leaf.path).chain(&self.skipped))?;
        let (kept, left): (Vec<_>, Vec<_>) =
            self.leaves.into_iter().zip(matched).partition(|(_, matched)| *matched == keep);
        self.leaves = kept.into_iter().map(|(leaf, _)| leaf).collect();
        self.skipped.extend(left.into_iter().map(|(leaf, _)| leaf.path));
        Ok(self)
    }

    /// Divides arrays over a mesh: the first matching rule gives an array its partition spec. Arrays without a rule follow
    /// [`otherwise`](Self::otherwise).
    ///
    /// # Errors
    /// A rule that matches no leaf, or names something other than an array; a spec that does not fit the mesh or the rank.
    pub fn shard<P: Into<Pattern>>(
        mut self,
        mesh: &Arc<Mesh>,
        rules: impl IntoIterator<Item = (P, Spec)>,
    ) -> Result<Self> {
        self.mesh = Some(Arc::clone(mesh));
        self.arrays("spec", rules, |array, spec| {
            Sharding::new(Arc::clone(mesh), spec.clone(), array.shape.len())?;
            array.sharding = Some((Arc::clone(mesh), spec.clone()));
            Ok(())
        })
    }

    /// Gives arrays without a sharding the one they were saved with, by position over these devices, where their mesh had
    /// as many devices.
    ///
    /// # Errors
    /// A saved mesh that contradicts itself.
    pub fn shard_as_saved(mut self, devices: &[Device]) -> Result<Self> {
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
            let spec = Spec(saved.spec.clone());
            // Advisory: what does not fit any more is left to `otherwise`.
            if array.sharding.is_none() && Sharding::new(Arc::clone(&mesh), spec.clone(), array.shape.len()).is_ok() {
                array.sharding = Some((mesh, spec));
            }
        }
        Ok(self)
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

    /// Casts arrays: the first matching rule gives the type.
    ///
    /// # Errors
    /// A rule that matches no leaf, or names something other than an array; complex to bool.
    pub fn cast<P: Into<Pattern>>(self, rules: impl IntoIterator<Item = (P, DType)>) -> Result<Self> {
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

    /// Wants other extents; needs [`pad`](Self::pad) unless they are equal. The rank stays.
    ///
    /// # Errors
    /// A rule that matches no leaf, or names something other than an array; another rank.
    pub fn shape<P: Into<Pattern>>(self, rules: impl IntoIterator<Item = (P, Vec<u64>)>) -> Result<Self> {
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
    /// becomes `value` (in the wanted type).
    #[must_use]
    pub fn pad(mut self, value: f64) -> Self {
        self.pad = Some(value);
        self
    }

    /// Permutes dimensions: new dimension `i` is old dimension `order[i]`; JAX's `[in, out]` becomes `[out, in]` by `[1, 0]`.
    ///
    /// # Errors
    /// A rule that matches no leaf, or names something other than an array; an order that does not fit.
    pub fn transpose<P: Into<Pattern>>(self, rules: impl IntoIterator<Item = (P, Vec<usize>)>) -> Result<Self> {
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
    ///
    /// # Errors
    /// A rule that matches no leaf, or names something other than an array; an index or range outside.
    pub fn take<P: Into<Pattern>>(self, rules: impl IntoIterator<Item = (P, Take)>) -> Result<Self> {
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
    /// `$1` or `${name}` stand for groups. The result is split at `/` again.
    ///
    /// # Errors
    /// A text that is no regular expression, a rule that matches no leaf, two leaves of one name.
    pub fn rename<'r>(mut self, rules: impl IntoIterator<Item = (&'r str, &'r str)>) -> Result<Self> {
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
        self.check_names()?;
        Ok(self)
    }

    /// Replaces the leaves that match by one: their arrays side by side along a new dimension, in the target's order.
    ///
    /// # Errors
    /// A pattern that matches no array, shapes that differ, a name that is taken.
    pub fn stack(self, pattern: impl Into<Pattern>, dim: usize, into: KeyPath) -> Result<Self> {
        self.join("stack", &pattern.into(), into, |views| View::stack(views, dim))
    }

    /// Replaces the leaves that match by one: their arrays one after the other along a dimension, in the target's order.
    ///
    /// # Errors
    /// A pattern that matches no array, shapes that differ elsewhere, a name that is taken.
    pub fn concatenate(self, pattern: impl Into<Pattern>, dim: usize, into: KeyPath) -> Result<Self> {
        self.join("concatenate", &pattern.into(), into, |views| View::concatenate(views, dim))
    }

    fn join(
        mut self,
        option: &'static str,
        pattern: &Pattern,
        into: KeyPath,
        join: impl FnOnce(&[View]) -> Result<View>,
    ) -> Result<Self> {
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
            first.get_or_insert_with(|| (position, array.clone()));
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
        self.check_names()?;
        Ok(self)
    }

    /// Replaces one array by several: consecutive ranges of a dimension with these extents and names.
    ///
    /// # Errors
    /// No such array, extents that do not add up to the dimension, a name that is taken.
    pub fn split(mut self, path: &str, dim: usize, parts: impl IntoIterator<Item = (KeyPath, u64)>) -> Result<Self> {
        let position =
            self.leaves.iter().position(|leaf| leaf.path.to_string() == path && matches!(leaf.what, What::Array(_)));
        let Some(position) = position else {
            return Err(no_such("split", path, self.leaves.iter().map(|leaf| leaf.path.to_string())));
        };
        let leaf = self.leaves.remove(position);
        let What::Array(array) = &leaf.what else { return Err(Error::bug("a split leaf is no array")) };
        if array.shape != array.view.shape {
            return Err(Error::invalid("split comes before a change of shape").at("leaf", path));
        }
        let mut start = 0u64;
        let mut at = position;
        for (part_path, extent) in parts {
            let mut part = array.clone();
            let stop = start.saturating_add(extent);
            part.view = array.view.range(dim, start, stop).map_err(|error| error.at("leaf", path))?;
            part.shape.clone_from(&part.view.shape);
            let made =
                TargetLeaf { path: part_path, source: leaf.source, what: What::Array(part), priority: leaf.priority };
            self.leaves.insert(at, made);
            (start, at) = (stop, at + 1);
        }
        let whole = array.shape.get(dim).copied().unwrap_or(0);
        if start != whole {
            return Err(Error::invalid("the parts do not add up to the dimension")
                .at("leaf", path)
                .expected(whole)
                .found(start));
        }
        self.check_names()?;
        Ok(self)
    }

    /// Reads leaves in this order: those that match the first pattern first, and so on; the rest last.
    ///
    /// # Errors
    /// A pattern that matches no leaf.
    pub fn order<P: Into<Pattern>>(mut self, patterns: impl IntoIterator<Item = P>) -> Result<Self> {
        let numbered = patterns.into_iter().enumerate().map(|(number, pattern)| (pattern, number as u32));
        let mut rules = Rules::new("order", numbered);
        for leaf in &mut self.leaves {
            let dtype = leaf.dtype();
            leaf.priority = rules.first(&leaf.path, dtype).map_or(u32::MAX, |(_, number)| *number);
        }
        rules.check(self.leaves.iter().map(|leaf| &leaf.path))?;
        Ok(self)
    }

    /// Wants what a loaded tree has: its leaves with their shapes, types and shardings. Leaves of the checkpoint that the
    /// tree lacks are skipped.
    ///
    /// # Errors
    /// All differences in one: leaves that the checkpoint lacks (unless they are kept) or that are of another kind.
    pub fn like(self, state: &State, missing: Missing) -> Result<Self> {
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
    /// # Errors
    /// All problems in one: rows that the checkpoint lacks (unless they are kept), kinds and ranks that do not fit.
    pub fn rows(mut self, rows: Vec<Row>, missing: Missing) -> Result<Self> {
        let mut lines = Vec::new();
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
                    array.ok_or_else(|| no_such("view", &name, arrays.keys().map(|name| (*name).to_owned())))
                });
                let made = parts.collect::<Result<Vec<_>>>().and_then(|parts| view.array(&parts)).and_then(|array| {
                    let path = row.path.clone();
                    let mut leaf = TargetLeaf { path, source: None, what: What::Array(array), priority: 0 };
                    row.clone().apply(&mut leaf, &self.checkpoint)?;
                    Ok(leaf)
                });
                match made {
                    Ok(leaf) => wanted.push(leaf),
                    Err(error) => lines.push(format!("{}: {error}", row.path)),
                }
                continue;
            }
            let found = at.get(row.path.to_string().as_str()).map(|&at| leaves[at].take());
            if let Some(None) = found {
                lines.push(format!("{}: named twice in the target", row.path));
                continue;
            }
            let Some(mut leaf) = found.flatten() else {
                match missing {
                    Missing::Keep => self.missing.push(row.path),
                    Missing::Error => {
                        let wanted = row.path.to_string();
                        let near = nearest(&wanted, names.iter().map(String::as_str)).join(", ");
                        lines.push(format!("{wanted}: not in the checkpoint; nearest: {near}"));
                    }
                }
                continue;
            };
            if let Err(error) = row.apply(&mut leaf, &self.checkpoint) {
                lines.push(format!("{}: {error}", leaf.path));
            }
            wanted.push(leaf);
        }
        if !lines.is_empty() {
            return Err(Error::invalid(format!("the target does not fit the checkpoint in {} leaves", lines.len()))
                .lines(lines)
                .hint(
                    "`touchdown ls --json` prints a target that fits; `--missing keep` leaves out what is not there",
                ));
        }
        // A leaf that only stands inside another row is neither loaded by itself nor skipped.
        used.iter().for_each(|&at| leaves[at] = None);
        self.skipped.extend(leaves.into_iter().flatten().map(|leaf| leaf.path));
        self.leaves = wanted;
        self.check_names()?;
        Ok(self)
    }

    /// Changes every array that a rule matches.
    fn arrays<P: Into<Pattern>, V>(
        mut self,
        option: &'static str,
        rules: impl IntoIterator<Item = (P, V)>,
        mut change: impl FnMut(&mut ArrayWant, &V) -> Result<()>,
    ) -> Result<Self> {
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
        rules.check(self.leaves.iter().map(|leaf| &leaf.path))?;
        match failed.len() {
            0 => Ok(self),
            1 => Err(failed.remove(0)),
            count => Err(Error::invalid(format!("a {option} rule does not fit {count} leaves"))
                .lines(failed.iter().map(Error::to_string))),
        }
    }

    /// Refuses two leaves of one name.
    fn check_names(&self) -> Result<()> {
        let mut names: Vec<String> = self.leaves.iter().map(|leaf| leaf.path.to_string()).collect();
        names.sort_unstable();
        let twice: Vec<String> =
            names.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0].clone()).collect();
        if twice.is_empty() {
            return Ok(());
        }
        Err(Error::invalid("two leaves have one name").lines(twice))
    }

    /// The arrays to plan, after everything was said; all problems in one error.
    pub(super) fn wants(&self) -> Result<Vec<Want>> {
        let mut lines = Vec::new();
        let mut wants = Vec::new();
        let mut hint = None;
        let mut kind = ErrorKind::Invalid;
        let single = Mesh::single();
        for leaf in &self.leaves {
            let array = match &leaf.what {
                What::Array(array) => array,
                What::Unreadable(why_kind, why) => {
                    kind = *why_kind;
                    hint = hint.or(Some("leave such leaves out with `--skip`"));
                    lines.push(format!("{}: {why}", leaf.path));
                    continue;
                }
                _ => continue,
            };
            let sharding = match (&array.sharding, &self.mesh, self.otherwise) {
                (Some((mesh, spec)), ..) => Sharding::new(Arc::clone(mesh), spec.clone(), array.shape.len()),
                (None, Some(mesh), Some(Otherwise::Replicate)) => {
                    Ok(Sharding { mesh: Arc::clone(mesh), spec: Spec::REPLICATED })
                }
                (None, None, None | Some(Otherwise::Replicate)) => {
                    Ok(Sharding { mesh: Arc::clone(&single), spec: Spec::REPLICATED })
                }
                (None, ..) => {
                    hint = hint.or(Some("give them a rule, or say `otherwise replicate`"));
                    Err(Error::invalid("no sharding rule matches"))
                }
            };
            let cast = array.check_cast(&self.checkpoint, array.dtype);
            let sharding = match cast.and(sharding) {
                Ok(sharding) => sharding,
                Err(error) => {
                    lines.push(format!("{}: {error}", leaf.path));
                    continue;
                }
            };
            if array.shape != array.view.shape && self.pad.is_none() {
                hint = hint.or(Some("`--pad` pads and truncates"));
                lines.push(format!("{}: wanted {:?}, stored {:?}", leaf.path, array.shape, array.view.shape));
                continue;
            }
            if let (true, Some((dim, extent, parts))) = (self.even, sharding.uneven(&array.shape)) {
                hint = hint.or(Some("leave out `--even` to allow short and empty shards"));
                lines.push(format!("{}: dimension {dim} of extent {extent} is not divisible by {parts}", leaf.path));
                continue;
            }
            wants.push(Want {
                path: leaf.path.clone(),
                view: array.view.clone(),
                shape: array.shape.clone(),
                dtype: array.dtype,
                sharding,
                pad: self.pad_element(array.dtype)?,
                policy: self.policy,
                priority: leaf.priority,
            });
        }
        if lines.is_empty() {
            return Ok(wants);
        }
        let what =
            if kind == ErrorKind::Invalid { "the target does not fit in" } else { "the target cannot be loaded in" };
        let error = Error::new(kind, format!("{what} {} leaves", lines.len())).lines(lines);
        Err(match hint {
            Some(hint) => error.hint(hint),
            None => error,
        })
    }

    fn pad_element(&self, dtype: DType) -> Result<Vec<u8>> {
        let mut element = vec![0; dtype.size()];
        let value = self.pad.unwrap_or(0.0);
        convert(DType::Float64, dtype, CastPolicy::Saturate, &value.to_le_bytes(), &mut element)
            .map_err(|error| Error::invalid(error.to_string()))?;
        Ok(element)
    }

    /// The leaves of the result, in order; arrays by their position among the wants.
    pub(super) fn assembled(&self) -> Vec<(KeyPath, Assembled)> {
        let mut planned = 0;
        let leaf = |leaf: &TargetLeaf| {
            let assembled = match &leaf.what {
                What::Array(array) => {
                    planned += 1;
                    Assembled::Planned { leaf: planned - 1, key_impl: array.key_impl.clone() }
                }
                What::Scalar { dtype, value } => {
                    Assembled::Ready(Leaf::Value { value: value.clone(), dtype: Some(*dtype) })
                }
                What::Text(text) => Assembled::Ready(Leaf::Value { value: Value::Text(text.clone()), dtype: None }),
                What::None | What::Unreadable(..) => Assembled::Ready(Leaf::None),
                What::Empty(container) => Assembled::Ready(Leaf::Empty(container)),
            };
            (leaf.path.clone(), assembled)
        };
        self.leaves.iter().map(leaf).collect()
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
                return Err(Error::invalid("the kinds do not fit").expected(have).found(wanted));
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
                    *value = value.convert(to)?;
                    *dtype = wanted;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl What {
    fn kind(&self) -> &'static str {
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
