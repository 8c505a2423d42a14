//! What is said when shards do not fit a device's memory.

use std::collections::BTreeMap;
use std::fmt;

use super::ShardSpec;
use crate::error::{Error, ErrorKind};

/// Shards of one device that it has no memory for: what was expected and found, and what each leaf needs, the largest first.
pub(super) fn too_little<'s>(
    ordinal: u32,
    shards: impl IntoIterator<Item = &'s ShardSpec>,
    (expected, found): (impl fmt::Display, impl fmt::Display),
) -> Error {
    let mut leaves: BTreeMap<String, u64> = BTreeMap::new();
    for shard in shards {
        *leaves.entry(shard.path.to_string()).or_default() += shard.bytes;
    }
    let mut leaves: Vec<(String, u64)> = leaves.into_iter().collect();
    leaves.sort_by(|(a_path, a), (b_path, b)| b.cmp(a).then_with(|| a_path.cmp(b_path)));
    Error::new(ErrorKind::OutOfMemory, "the shards do not fit the device's free memory")
        .at("device", format_args!("cuda:{ordinal}"))
        .expected(expected)
        .found(found)
        .lines(leaves.into_iter().map(|(path, bytes)| format!("{path}: {bytes} bytes")))
        .hint("load fewer leaves (`--only`), a narrower type (`--cast`), or onto more devices")
}
