//! Loads that are too small for an engine: single elements, done on the caller's thread.

use std::collections::HashMap;

use super::carry::{Carrier, Stored};
use super::checkpoint::ask;
use super::land::{Landing, Target, decoder_cost, part_of_read};
use crate::dtype::CastPolicy;
use crate::error::{Error, Result};
use crate::io::{Buffer, Ring, Root, serve};
use crate::keypath::KeyPath;
use crate::need::{Answer, Need, unfit};
use crate::plan::{self, Mesh, Sharding, Source, Spec, StoredArray, View, Want};
use crate::transform::cpu::SharedBytes;

/// Wants the whole of some arrays, as stored, on one device.
pub(super) fn whole_wants(arrays: &[StoredArray], wanted: impl IntoIterator<Item = usize>) -> Vec<Want> {
    let mesh = Mesh::single();
    let want = |array: usize| {
        let stored = &arrays[array];
        Want {
            path: KeyPath::from_escaped(&stored.name),
            view: View::whole(array, &stored.meta.shape),
            shape: stored.meta.shape.clone(),
            dtype: stored.meta.dtype,
            sharding: Sharding { mesh: std::sync::Arc::clone(&mesh), spec: Spec::REPLICATED },
            pad: vec![0; stored.meta.dtype.size()],
            policy: CastPolicy::Saturate,
            priority: 0,
        }
    };
    wanted.into_iter().map(want).collect()
}

/// The bytes of every want, in order.
pub(super) fn read_elements(root: &Root, arrays: &[StoredArray], wants: Vec<Want>) -> Result<Vec<Buffer>> {
    if wants.is_empty() {
        return Ok(Vec::new());
    }
    let limits = super::engine::EngineOptions { threads: 1, ..Default::default() }.limits()?;
    let plan = ask(root, |asker| async move { plan::build(&asker, arrays, wants, limits, decoder_cost).await })?;
    let memory = plan
        .shards
        .iter()
        .map(|shard| {
            let len = usize::try_from(shard.bytes)
                .map_err(|_| Error::corrupt("an array is larger than the address space"))?;
            Buffer::zeroed(len)
        })
        .collect::<Result<Vec<_>>>()?;
    #[allow(unsafe_code)]
    // SAFETY: the buffers outlive the landing, which is dropped at the end of this function, and only this thread uses them.
    let landing = unsafe {
        let host = |buffer: &Buffer| Target::Host(SharedBytes::new(buffer.as_mut_ptr(), buffer.len()));
        let targets = memory.iter().map(host).collect();
        Landing::new(plan, targets, &vec![true; memory.len()])
    };
    let plan = &landing.plan;
    let needs: Vec<Need> = plan
        .batches
        .iter()
        .filter_map(|batch| batch.read)
        .map(|read| Need::Range { path: plan.files[read.file as usize].clone(), offset: read.offset, len: read.len })
        .collect();
    let mut answers = serve(root, &needs)?.into_iter();
    let ring = Ring::new(usize::try_from(limits.slot_bytes).unwrap_or(crate::limits::SLOT_BYTES));
    landing.initialise(&ring)?;
    for batch in &plan.batches {
        let bytes = match batch.read {
            None => None,
            Some(read) => match answers.next() {
                Some(Answer::Bytes(bytes)) => Some((read, bytes)),
                Some(Answer::Missing) => {
                    return Err(Error::not_found("a data file of the checkpoint is missing")
                        .at("file", root.shown(&plan.files[read.file as usize]))
                        .hint("the checkpoint is incomplete; copy it again"));
                }
                other => return Err(unfit(other.as_ref())),
            },
        };
        let mut carrier = Carrier::new(&landing, &ring);
        for position in batch.units.clone() {
            let unit = &plan.units[position as usize];
            let stored: Stored<'_> = match (&unit.source, &bytes) {
                (Source::File { offset, len, .. }, Some((read, bytes))) => {
                    part_of_read(bytes, offset - read.offset, *len)?
                }
                (Source::Inline(bytes) | Source::Fill(bytes), _) => Stored::all(bytes),
                (Source::File { .. }, None) => return Err(Error::bug("a unit has no bytes")),
            };
            landing.land(position, stored, &mut carrier)?;
        }
        carrier.finish()?;
    }
    // One want may share its shard with no other, so shards are in the order of wants.
    let by_leaf: HashMap<u32, usize> =
        plan.shards.iter().enumerate().map(|(shard, planned)| (planned.leaf, shard)).collect();
    let mut memory: Vec<Option<Buffer>> = memory.into_iter().map(Some).collect();
    let take =
        |leaf: usize| by_leaf.get(&u32::try_from(leaf).unwrap_or(u32::MAX)).and_then(|&shard| memory[shard].take());
    (0..plan.leaves.len()).map(take).map(|buffer| buffer.ok_or_else(|| Error::bug("a want has no shard"))).collect()
}
