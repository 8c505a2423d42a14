//! The loads that are measured: what people do with a checkpoint, made of whatever arrays it has.

use std::sync::Arc;

use crate::dtype::{Class, DType};
use crate::error::Result;
use crate::plan::{Device, Mesh, Spec};
use crate::tree::{Checkpoint, Missing, Otherwise, Row, RowView, Target};

/// A load.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) target: Target,
}

/// An array of the checkpoint.
struct Stored<'c> {
    path: &'c crate::keypath::KeyPath,
    shape: &'c [u64],
    dtype: DType,
}

impl Case {
    /// Every load that makes sense of this checkpoint; the first one is all arrays as stored. None without arrays.
    ///
    /// # Errors
    /// Devices that make no mesh.
    pub(super) fn all(checkpoint: &Checkpoint, devices: &[Device]) -> Result<Vec<Self>> {
        let arrays: Vec<Stored<'_>> = checkpoint
            .leaves()
            .iter()
            .filter_map(|leaf| {
                let meta = &checkpoint.arrays()[leaf.kind.array()?].meta;
                Some(Stored { path: &leaf.path, shape: &meta.shape, dtype: meta.dtype })
            })
            .collect();
        let mesh = Mesh::line(devices.iter().copied())?;
        let case = |name, rows: Vec<Row>| {
            let target = checkpoint.target().rows(rows, Missing::Error).otherwise(Otherwise::Replicate);
            // What is not divided goes to all GPUs; processors share it anyway.
            let target = if devices.iter().all(|device| device.gpu().is_some()) { target.on(&mesh) } else { target };
            Self { name, target: target.shard_as_saved(devices) }
        };
        let of = |array: &Stored<'_>| Row { path: array.path.clone(), ..Row::default() };
        let mut cases = Vec::new();
        let mut add = |name, rows: Vec<Row>| {
            if !rows.is_empty() {
                cases.push(case(name, rows));
            }
        };
        add(AS_STORED, arrays.iter().map(of).collect());
        let resharded = |array: &Stored<'_>| Row { sharding: last_dimension(&mesh, array.shape), ..of(array) };
        add("by columns over the devices", arrays.iter().map(resharded).collect());
        let parts = devices.len().max(2) as u64;
        let columns = arrays.iter().filter_map(|array| {
            let (dim, extent) = (array.shape.len().checked_sub(1)?, *array.shape.last()?);
            let view = RowView::Split { of: array.path.clone(), dim, start: 0, stop: extent / parts };
            (dim > 0 && extent >= parts).then(|| Row { view: Some(view), ..of(array) })
        });
        add("the first columns only", columns.collect());
        let cast = arrays.iter().map(|array| {
            let to = match array.dtype {
                DType::BFloat16 => Some(DType::Float32),
                dtype if dtype.class() == Class::Float => Some(DType::BFloat16),
                _ => None,
            };
            Row { dtype: to, ..of(array) }
        });
        add("cast between float32 and bfloat16", cast.collect());
        let bytes =
            |array: &&Stored<'_>| array.shape.iter().fold(array.dtype.size() as u64, |all, n| all.saturating_mul(*n));
        add("the largest array only", arrays.iter().max_by_key(bytes).map(of).into_iter().collect());
        Ok(cases)
    }
}

/// The last dimension of a matrix over the mesh; nothing for what has no columns.
fn last_dimension(mesh: &Arc<Mesh>, shape: &[u64]) -> Option<(Arc<Mesh>, Spec)> {
    let dims = shape.len().checked_sub(1).filter(|dims| *dims > 0)?;
    let mut spec = vec![Vec::new(); dims];
    spec.push(vec!["device".to_owned()]);
    Some((Arc::clone(mesh), Spec(spec)))
}

/// The load whose plan says which ranges and units the machine is measured with.
pub(super) const AS_STORED: &str = "as stored";
