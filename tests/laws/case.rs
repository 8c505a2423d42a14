//! A checkpoint at random, what is wanted of it, and where.

use touchdown::tree::{Checkpoint, OpenOptions};

use super::grid::indices;
use super::store::{Stored, element};
use super::tape::Tape;
use super::want::{Layout, PAD, Request, Wanted};

/// A checkpoint on disk, what is wanted of it, and where.
#[derive(Debug)]
pub struct Case {
    pub stored: Stored,
    pub layout: Layout,
    pub request: Request,
    pub checkpoint: Checkpoint,
    _dir: tempfile::TempDir,
}

impl Case {
    pub fn new(tape: &mut Tape<'_>, long: bool) -> Self {
        Self::on(tape, long, |layout, _| layout)
    }

    /// The same on other devices.
    pub fn on(tape: &mut Tape<'_>, long: bool, place: impl Fn(Layout, &mut Tape<'_>) -> Layout) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stored = Stored::write(dir.path(), tape, long);
        let layout = Layout::random(tape);
        let layout = place(layout, tape);
        let request = Request::random(&stored, &layout, tape);
        let checkpoint = Checkpoint::open(dir.path(), &OpenOptions::default()).unwrap();
        Self { stored, layout, request, checkpoint, _dir: dir }
    }

    pub fn ranks(&self) -> std::ops::Range<u32> {
        0..self.layout.world
    }

    /// Positions in the mesh of the devices of a rank.
    pub fn local(&self, rank: u32) -> Vec<usize> {
        (0..self.layout.devices.len()).filter(|&at| self.layout.devices[at].rank == rank).collect()
    }

    /// The indices of the elements that a device holds of a leaf.
    pub fn held(&self, leaf: &Wanted, device: usize) -> Vec<Vec<u64>> {
        let bounds = self.layout.bounds(&leaf.shape, &leaf.spec, device);
        let extent: Vec<u64> = bounds.iter().map(|(start, end)| end - start).collect();
        let moved = |index: Vec<u64>| index.iter().zip(&bounds).map(|(at, (start, _))| at + start).collect();
        indices(&extent).into_iter().map(moved).collect()
    }

    /// What a device holds of a leaf, as bytes.
    pub fn expected(&self, leaf: &Wanted, device: usize) -> Vec<u8> {
        let value = |index: &Vec<u64>| leaf.at(index).map_or(PAD, |number| self.stored.values[number]);
        self.held(leaf, device).iter().flat_map(|index| element(leaf.dtype, value(index))).collect()
    }
}
