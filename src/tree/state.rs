//! What a load leaves behind: a tree of sharded arrays and values, and a report.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use super::shard::Shard;
use super::value::Value;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::keypath::KeyPath;
use crate::layout::orbax::metadata::Container;
use crate::plan::{Device, Sharding};

/// A loaded tree: every leaf that was asked for, in the target's order.
#[derive(Debug, Default)]
pub struct State {
    leaves: Vec<(KeyPath, Leaf)>,
    /// Position of every leaf by its path's string form.
    index: HashMap<String, usize>,
    report: Report,
}

/// One loaded leaf.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum Leaf {
    /// A sharded array.
    Array(Array),
    /// A number, bool or string.
    Value {
        /// The value.
        value: Value,
        /// Its type; `None` for a string.
        dtype: Option<DType>,
    },
    /// `None`.
    None,
    /// An empty container.
    Empty(Container),
}

/// A global array, of which this process holds shards.
#[derive(Clone, Debug)]
pub struct Array {
    /// Where it lies in the tree.
    pub path: KeyPath,
    /// Global extents.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: DType,
    /// Who holds what.
    pub sharding: Sharding,
    /// The implementation's name when the array is the key data of a typed JAX PRNG key.
    pub key_impl: Option<String>,
    /// Elements that the cast changed beyond ordinary rounding.
    pub lossy: u64,
    pub(super) shards: Vec<Shard>,
}

/// What a load did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// From the call to the last array ready; opening is included where the call opened, engine start-up is not.
    pub elapsed: Duration,
    /// Target bytes of all arrays, counted once.
    pub bytes_logical: u64,
    /// Stored bytes that some shard needs, before merging.
    pub bytes_needed: u64,
    /// Data bytes read: requested from files, or values that came with the metadata.
    pub bytes_read: u64,
    /// Bytes that came out of decoding, uncompressed bytes included.
    pub bytes_decoded: u64,
    /// Stored bytes that were not checked: parts of units, or everything with verification off.
    pub bytes_unverified: u64,
    /// The most host memory held at once: results and staging, by the engine's own count.
    pub peak_host_bytes: u64,
    /// The most memory of GPUs held at once, of all of them together: results and staging, by the engine's own count.
    pub peak_device_bytes: u64,
    /// Requests made.
    pub requests: u64,
    /// Kernels launched on GPUs.
    pub launches: u64,
    /// Lossy elements of every leaf that has any.
    pub lossy: BTreeMap<String, u64>,
    /// Leaves of the checkpoint that the target leaves out.
    pub skipped: Vec<KeyPath>,
    /// Leaves of the target that the checkpoint lacks.
    pub missing: Vec<KeyPath>,
    /// Result bytes of each local device.
    pub devices: Vec<(Device, u64)>,
    /// Where the time went.
    pub stages: Stages,
}

/// Busy and blocked time and bytes of every stage. Busy time is summed over threads.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct Stages {
    pub open: Stage,
    pub plan: Stage,
    pub read: Stage,
    pub decode: Stage,
    pub transform: Stage,
    pub copy: Stage,
}

/// One stage of a load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stage {
    /// Time at work, summed over threads.
    pub busy: Duration,
    /// Time waiting for another stage: reads for memory, workers for bytes.
    pub blocked: Duration,
    /// Bytes that came out.
    pub bytes: u64,
}

impl State {
    pub(super) fn new(leaves: Vec<(KeyPath, Leaf)>, report: Report) -> Self {
        let index = leaves.iter().enumerate().map(|(at, (path, _))| (path.to_string(), at)).collect();
        Self { leaves, index, report }
    }

    /// Every leaf, in the target's order.
    pub fn leaves(&self) -> impl ExactSizeIterator<Item = (&KeyPath, &Leaf)> {
        self.leaves.iter().map(|(path, leaf)| (path, leaf))
    }

    /// The leaf whose path prints as this.
    pub fn leaf(&self, path: &str) -> Option<&Leaf> {
        self.index.get(path).map(|&at| &self.leaves[at].1)
    }

    /// The array whose path prints as this.
    ///
    /// # Errors
    /// No such leaf, or one that is no array.
    pub fn array(&self, path: &str) -> Result<&Array> {
        match self.leaf(path) {
            Some(Leaf::Array(array)) => Ok(array),
            Some(_) => Err(Error::invalid("the leaf is no array").at("leaf", path)),
            None => {
                let names = self.leaves.iter().map(|(path, _)| path.to_string());
                Err(super::rules::no_leaf(path, names))
            }
        }
    }

    /// What the load did.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Every leaf, in the target's order, without the tree.
    pub fn into_leaves(self) -> impl ExactSizeIterator<Item = (KeyPath, Leaf)> {
        self.leaves.into_iter()
    }

    /// The leaf at a path, to change it in place.
    pub(super) fn leaf_mut(&mut self, path: &str) -> Option<&mut Leaf> {
        self.index.get(path).map(|&at| &mut self.leaves[at].1)
    }

    /// Takes in what another load into these arrays has found; arrays keep their memory.
    pub(super) fn take_in(&mut self, other: Self) {
        for (path, leaf) in other.leaves {
            match (self.leaf_mut(&path.to_string()), leaf) {
                (Some(Leaf::Array(own)), Leaf::Array(new)) => (own.key_impl, own.lossy) = (new.key_impl, new.lossy),
                (Some(own), leaf) => *own = leaf,
                (None, leaf) => {
                    self.index.insert(path.to_string(), self.leaves.len());
                    self.leaves.push((path, leaf));
                }
            }
        }
        self.report = other.report;
    }
}

impl Array {
    /// The shards of this process, in mesh order. Replicas on devices that share memory share it here too.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The same without the array.
    pub fn into_shards(self) -> Vec<Shard> {
        self.shards
    }
}
