//! What a target comes to: the arrays to plan, and how the loaded tree is put together.

use std::sync::Arc;

use super::save::element;
use super::state::Leaf;
use super::target::{Otherwise, Target, TargetLeaf, UnfitRow, What};
use super::value::Value;
use crate::dtype::{CastPolicy, DType};
use crate::error::{Error, ErrorKind, Result, counted};
use crate::keypath::KeyPath;
use crate::plan::{Mesh, Sharding, Spec, Want};
use crate::transform::cpu::convert;

/// A leaf of the result: ready now, or an array of the plan.
#[derive(Clone, Debug)]
pub(super) enum Assembled {
    Planned { leaf: usize, key_impl: Option<String> },
    Ready(Leaf),
}

impl Target {
    /// The arrays to plan, after everything was said; all problems in one error.
    pub(super) fn wants(&self) -> Result<Vec<Want>> {
        let mut lines: Vec<String> = self.unfit.iter().map(|row| row.line().to_owned()).collect();
        let mut wants = Vec::new();
        let absent = self.unfit.iter().any(|row| matches!(row, UnfitRow::Absent(_)));
        let mut hint = (!lines.is_empty()).then_some(match absent {
            true => "`touchdown ls --json` prints a target that fits; `--missing keep` leaves out what is not there",
            false => "`touchdown ls --json` prints a target that fits",
        });
        let mut kind = ErrorKind::Invalid;
        let single = Mesh::single();
        for leaf in &self.leaves {
            let array = match &leaf.what {
                What::Array(array) => array,
                What::Unreadable(error) => {
                    kind = error.kind();
                    hint = hint.or(Some("leave such leaves out with `--skip`"));
                    lines.push(format!("{}: {error}", leaf.path));
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
                    hint = hint.or(Some("give them a rule, or have them replicated (`--otherwise replicate`)"));
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
            let pad = match self.pad_element(array.dtype) {
                Ok(pad) => pad,
                Err(error) if array.shape != array.view.shape => {
                    lines.push(format!("{}: {error}", leaf.path));
                    continue;
                }
                // Nothing is padded here.
                Err(_) => vec![0; array.dtype.size()],
            };
            wants.push(Want {
                path: leaf.path.clone(),
                view: array.view.clone(),
                shape: array.shape.clone(),
                dtype: array.dtype,
                sharding,
                pad,
                policy: self.policy,
                priority: leaf.priority,
            });
        }
        let leaves = (!lines.is_empty()).then(|| {
            let what = match kind {
                ErrorKind::Invalid => "the target does not fit in",
                _ => "the target cannot be loaded in",
            };
            let error = Error::new(kind, format!("{what} {}", counted(lines.len(), "leaf", "leaves"))).lines(lines);
            match hint {
                Some(hint) => error.hint(hint),
                None => error,
            }
        });
        let rules = self.problems.iter().map(|error| error.duplicate());
        match Error::merged(rules.chain(leaves)) {
            Some(error) => Err(error),
            None => Ok(wants),
        }
    }

    /// The padding value as an element: cast as the policy says, from an integer or a float, whichever it was given as.
    fn pad_element(&self, dtype: DType) -> Result<Vec<u8>> {
        let mut padding = vec![0; dtype.size()];
        let Some(value) = &self.pad else { return Ok(padding) };
        let (wide, exact) = element(value, None)?;
        let lossy = convert(wide, dtype, self.policy, &exact, &mut padding);
        match lossy.map_err(|error| Error::invalid(error.to_string()))? {
            lossy if lossy > 0 && self.policy == CastPolicy::Error => {
                Err(Error::invalid(format!("the padding value does not fit {dtype}")).found(value.json()))
            }
            _ => Ok(padding),
        }
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
                What::Empty(container) => Assembled::Ready(Leaf::Empty(*container)),
            };
            (leaf.path.clone(), assembled)
        };
        self.leaves.iter().map(leaf).collect()
    }
}
