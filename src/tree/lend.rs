//! Loads into memory that is there already: a caller's, or that of arrays that were loaded before.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use super::checkpoint::Checkpoint;
use super::engine::Engine;
use super::shard::Shard;
use super::state::{Array, Report, State};
use super::target::Target;
use crate::error::{Error, Result};
use crate::io::Buffer;
use crate::place::{Destination, Memory, ShardSpec, Slot};
use crate::plan::{Plan, PlannedLeaf};

impl Engine {
    /// Loads a target into memory that the caller lends, one slot for every distinct local shard, and blocks until it is full.
    /// Nothing else of the result's size is allocated. A slot is a slice of host memory or, for a shard on a device, an address, a
    /// length and the stream that has used the memory so far ([`DeviceMemory::new`](crate::place::DeviceMemory::new)).
    ///
    /// # Errors
    /// As [`load_to`](Self::load_to); a slot of another size than [`ShardSpec::bytes`]; whatever the load fails with. The
    /// contents of the slots are unspecified then.
    pub fn fill<'m>(
        &self,
        checkpoint: &Checkpoint,
        target: &Target,
        mut slot: impl FnMut(&ShardSpec) -> Result<Slot<'m>>,
    ) -> Result<Report> {
        let lend = |shard: &ShardSpec| {
            Ok(match slot(shard)? {
                // The slice is borrowed exclusively for 'm, which outlives this call; it ends only after the job has ended and
                // its state, the last user of this buffer, is dropped.
                Slot::Host(slice) => Memory::Host(lent(NonNull::from(&mut *slice).cast(), slice.len())),
                Slot::Device(memory) => Memory::Device(memory),
            })
        };
        let state = self.load_to(checkpoint, target, &mut Lend(lend))?.wait()?;
        Ok(state.report().clone())
    }

    /// Loads a target into the arrays of a state that was loaded before, and blocks until they are full: addresses stay, nothing
    /// else of the result's size is allocated. Values of the target replace the state's; arrays that the target leaves out keep
    /// what they hold. The report is the state's then.
    ///
    /// What programs have given to the devices before is waited for, whatever the stream.
    ///
    /// # Errors
    /// Arrays that the state lacks, or has with another type, shape or sharding, all of them in one error; arrays of which
    /// somebody else has a part or a copy that shares their memory, or whose memory a caller has lent ([`fill`](Self::fill) fills
    /// that). Nothing has changed then. Whatever the load fails with: the contents of the target's arrays are unspecified then.
    pub fn load_into(&self, checkpoint: &Checkpoint, target: &Target, state: &mut State) -> Result<()> {
        let start = Instant::now();
        let plan = checkpoint.plan_within(target, self.limits())?;
        expect_same(&plan, state)?;
        let mut memory = Vec::with_capacity(plan.shards.len());
        for shard in &plan.shards {
            let leaf = &plan.leaves[shard.leaf as usize];
            let own = state.array(&leaf.path.to_string())?.shards().iter();
            let own = own.clone().find(|own| shard.devices.contains(&u32::try_from(own.position).unwrap_or(u32::MAX)));
            let own =
                own.ok_or_else(|| Error::bug("a shard of the plan is not in the state").at("leaf", &leaf.path))?;
            memory.push(match &*own.memory {
                // The state is borrowed exclusively until this call ends, and nobody else has a part of the array.
                Memory::Host(buffer) => match NonNull::new(buffer.as_mut_ptr()) {
                    Some(first) => Memory::Host(lent(first, buffer.len())),
                    None => return Err(Error::bug("a buffer without an address")),
                },
                Memory::Device(memory) => Memory::Device(memory.again()),
            });
        }
        let mut memory = memory.into_iter();
        let mut next = Lend(|_: &ShardSpec| memory.next().ok_or_else(|| Error::bug("more shards than were planned")));
        let planned = start.elapsed();
        self.settle(&plan)?;
        let loaded = self.load_planned(checkpoint, target, plan, (start, planned), Some(&mut next))?.wait()?;
        state.take_in(loaded);
        Ok(())
    }
}

/// A destination of memory that somebody else keeps.
struct Lend<F>(F);

impl<F: FnMut(&ShardSpec) -> Result<Memory>> Destination for Lend<F> {
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>> {
        shards.iter().map(&mut self.0).collect()
    }
}

/// Host memory that somebody else keeps, and lets alone, until the load has ended.
fn lent(start: NonNull<u8>, len: usize) -> Buffer {
    #[allow(unsafe_code)]
    // SAFETY: both callers say why.
    unsafe {
        Buffer::foreign(start, len)
    }
}

/// Whether a plan's arrays are those of a state, and nobody else's.
fn expect_same(plan: &Plan, state: &State) -> Result<()> {
    let mut wrong = Vec::new();
    for leaf in &plan.leaves {
        let path = leaf.path.to_string();
        let reason = match state.array(&path) {
            Err(_) => Some("the state has no such array".to_owned()),
            Ok(array) => difference(leaf, array),
        };
        wrong.extend(reason.map(|reason| format!("{path}: {reason}")));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Error::invalid("the target cannot be loaded into the arrays of the state")
        .lines(wrong)
        .hint("make the target as for the state's own load, or load into new memory with `Engine::load`"))
}

/// Why an array cannot take a leaf.
fn difference(leaf: &PlannedLeaf, array: &Array) -> Option<String> {
    let differs = |what: &str, wanted: String, has: String| Some(format!("{what} {wanted} is loaded, {has} is there"));
    if leaf.dtype != array.dtype {
        return differs("type", leaf.dtype.to_string(), array.dtype.to_string());
    }
    if leaf.shape != array.shape {
        return differs("shape", format!("{:?}", leaf.shape), format!("{:?}", array.shape));
    }
    if leaf.sharding != array.sharding {
        let shown = |sharding: &crate::plan::Sharding| format!("`{}` on {}", sharding.spec, sharding.mesh);
        return differs("sharding", shown(&leaf.sharding), shown(&array.sharding));
    }
    // Replicas on processors share their memory; whoever else shares it would see it change.
    let mut own: HashMap<*const Memory, usize> = HashMap::new();
    array.shards().iter().for_each(|shard| *own.entry(Arc::as_ptr(&shard.memory)).or_default() += 1);
    let shared = |shard: &Shard| Arc::strong_count(&shard.memory) > own[&Arc::as_ptr(&shard.memory)];
    if array.shards().iter().any(shared) {
        return Some("its memory is shared with a copy of the array, a part of it, or a save".to_owned());
    }
    let lent = array.shards().iter().any(|shard| shard.device_memory().is_some_and(|memory| memory.is_lent()));
    lent.then(|| "its memory was lent by a caller for one load; lend it again with `Engine::fill`".to_owned())
}
