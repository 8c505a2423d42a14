//! What the two destinations have in common.

use std::collections::HashSet;
use std::sync::Arc;

use super::journal::Note;
use bytes::Bytes;
use rayon::ThreadPool;

use crate::error::Result;
use crate::io::{Budget, StagedDir};
use crate::relpath::RelPath;
use crate::shape::Region;
use crate::tree::save::{Held, Progress};

/// A destination that is being written, wave by wave. It was planned completely before: what it cannot hold is known by then.
pub(super) trait Sink {
    /// For every task the number of rows at whose multiples pieces may end.
    fn steps(&self) -> Vec<u64>;

    /// What it holds of the arrays beside their elements.
    fn held(&self) -> Held;

    /// Bytes that are equal for two conversions only if they write the same things in the same way.
    ///
    /// # Errors
    /// None, for what could be planned.
    fn identity(&self) -> Result<Vec<u8>>;

    /// Begins a new destination.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    fn open(&mut self, staged: &mut StagedDir) -> Result<()>;

    /// Writes pieces. Those of one task come in order.
    ///
    /// # Errors
    /// The first failure; a cancel.
    fn write(&mut self, io: &mut Io<'_>, pieces: Vec<Filled>) -> Result<()>;

    /// Makes what was written durable, and says what [`restore`](Self::restore) needs to know of it.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    fn note(&mut self, staged: &StagedDir) -> Result<Note>;

    /// Takes up what was noted, and names the files that this rests on.
    ///
    /// # Errors
    /// Notes that make no sense, files that cannot be opened.
    fn restore(&mut self, staged: &StagedDir, notes: Vec<Note>) -> Result<HashSet<RelPath>>;

    /// Writes what is still missing when all pieces are written; the bytes that are stored.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    fn finish(&mut self, staged: &mut StagedDir) -> Result<u64>;
}

/// A piece with its elements.
pub(super) struct Filled {
    pub(super) task: usize,
    pub(super) region: Region,
    /// Row-major, in memory form.
    pub(super) data: Bytes,
}

/// What a sink writes with.
pub(super) struct Io<'a> {
    pub(super) pool: &'a ThreadPool,
    pub(super) budget: &'a Arc<Budget>,
    pub(super) progress: &'a Arc<Progress>,
    pub(super) staged: &'a mut StagedDir,
}
