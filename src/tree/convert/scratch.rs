//! Memory for arrays that are larger than the conversion may hold: a file without a name beside what is written.

use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;
use crate::place::{Destination, Memory, ShardSpec};

/// Gives memory that is backed by files in a directory: the system writes it out when memory is short.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) dir: PathBuf,
}

impl Destination for Scratch {
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>> {
        let memory = |shard: &ShardSpec| {
            let len = usize::try_from(shard.bytes)
                .map_err(|_| Error::new(ErrorKind::OutOfMemory, "an array is larger than the address space"))?;
            Buffer::in_file(&self.dir, len).map(Memory::Host).map_err(|error| error.at("leaf", &shard.path))
        };
        shards.iter().map(memory).collect()
    }
}
