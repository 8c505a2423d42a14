//! What the engine gives a device, and what it gets back.

use crate::plan::route::Route;
use crate::transform::Op;

/// Decoded elements in host memory, and the boxes of them that a device wants.
#[derive(Debug)]
pub(crate) struct Parcel<'a> {
    /// The memory in which they lie. Parcels of one memory that are neighbours cross the bus together.
    pub(crate) memory: &'a [u8],
    /// Their first byte in it.
    pub(crate) start: usize,
    /// How many bytes they are.
    pub(crate) len: usize,
    /// What goes where.
    pub(crate) boxes: Vec<Carried>,
}

/// A box on its way to a shard.
#[derive(Clone, Debug)]
pub(crate) struct Carried {
    /// The box copy; the source is the parcel, the target the shard.
    pub(crate) op: Op,
    /// How it gets there.
    pub(crate) route: Route,
    /// The shard's memory.
    pub(crate) target: Span,
    /// The shard, for which lossy elements are counted.
    pub(crate) shard: u32,
}

/// Memory of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// The first byte's address.
    pub(crate) pointer: u64,
    /// Number of bytes.
    pub(crate) len: u64,
}

/// What a device has done for one batch.
#[derive(Debug, Default)]
pub(crate) struct Delivered {
    /// What was counted, several times for a shard if it comes in several launches.
    pub(crate) counted: Vec<Counted>,
    /// Kernels launched.
    pub(crate) launches: u64,
}

/// What was counted for a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    /// The shard.
    pub(crate) shard: u32,
    /// How many elements were lossy.
    pub(crate) lossy: u64,
    /// How many stored bools were neither 0 nor 1.
    pub(crate) invalid: u64,
}

impl<'a> Parcel<'a> {
    /// The elements.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.memory.get(self.start..).and_then(|rest| rest.get(..self.len)).unwrap_or_default()
    }
}
