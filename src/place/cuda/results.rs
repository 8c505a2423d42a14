//! Memory for shards: looked for before anything is read, and taken in few pieces.

use std::sync::Arc;

use super::Gpu;
use crate::error::{Error, Result};
use crate::limits::{DEVICE_ALIGN, DEVICE_SLAB_BYTES, DEVICE_SLAB_SHARD_BYTES_MAX};
use crate::place::room::too_little;
use crate::place::{DeviceMemory, ShardSpec};

impl Gpu {
    /// Memory for all shards of a load that are this device's, in their order. Large ones get memory of their own, which is given
    /// back as soon as they are dropped; the others share slabs.
    ///
    /// # Errors
    /// Less free memory than shards and staging need: nothing is allocated then.
    pub(crate) fn prepare(self: &Arc<Self>, shards: &[&ShardSpec]) -> Result<Vec<DeviceMemory>> {
        self.expect_room(shards)?;
        let mut slabs: Vec<(u64, Vec<usize>)> = Vec::new();
        // The slab that small shards go to.
        let mut open: Option<usize> = None;
        for (index, shard) in shards.iter().enumerate() {
            let bytes = aligned(shard.bytes);
            let small = bytes <= DEVICE_SLAB_SHARD_BYTES_MAX;
            match open.filter(|&open| small && slabs[open].0 + bytes <= DEVICE_SLAB_BYTES) {
                _ if bytes == 0 => {}
                Some(open) => {
                    slabs[open].0 += bytes;
                    slabs[open].1.push(index);
                }
                None => {
                    open = if small { Some(slabs.len()) } else { open };
                    slabs.push((bytes, vec![index]));
                }
            }
        }
        // An empty shard has no memory.
        let mut memory: Vec<DeviceMemory> =
            shards.iter().map(|_| DeviceMemory::held(0, 0, self.stream(), self.stream_hold())).collect();
        for (bytes, members) in slabs {
            let bytes = usize::try_from(bytes).map_err(|_| Error::bug("a slab is larger than the address space"))?;
            let (mut pointer, hold) =
                self.allocate(bytes).map_err(|error| error.at("leaf", &shards[members[0]].path))?;
            for index in members {
                let len = shards[index].bytes;
                memory[index] = DeviceMemory::held(pointer, len, self.stream(), Arc::clone(&hold));
                pointer += aligned(len);
            }
        }
        Ok(memory)
    }

    /// Whether the device has memory for shards, and for what workers stage in.
    ///
    /// # Errors
    /// Too little, with what each leaf needs.
    pub(crate) fn expect_room(&self, shards: &[&ShardSpec]) -> Result<()> {
        let results: u64 = shards.iter().map(|shard| aligned(shard.bytes)).sum();
        let staging = self.lane_bytes_missing();
        let free = self.free_bytes()?;
        if results.saturating_add(staging) <= free {
            return Ok(());
        }
        let expected = format_args!("{results} bytes for shards and {staging} bytes for staging");
        Err(too_little(self.ordinal(), shards.iter().copied(), (expected, format_args!("{free} bytes free"))))
    }
}

/// What memory of a shard takes in a slab.
fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(DEVICE_ALIGN)
}
