//! Two blocks in flight, decoded in lockstep.

use std::cell::Cell;
use std::collections::VecDeque;

use super::blocks::{Coded, Literals};
use super::checksum::{self, Checksum, STRIPE};
use super::sequences::Assembly;
use super::tree::Table;

/// Symbols that a stream decodes between two refills: as many codes of at most 11 bits as 56 bits hold.
pub(super) const SYMBOLS_PER_REFILL: usize = 5;

/// Iterations of one call of the kernel. What it leaves in the staging, 20 KiB, fits the fastest cache beside the tables; a
/// quarter of them is 3 % slower, because a call costs as much as a few iterations.
pub(super) const ITERATIONS: usize = 512;

pub(super) const STREAMS: usize = 8;

/// Streams of one block.
pub(super) const BLOCK_STREAMS: usize = 4;

/// Where in a frame a stream begins at the earliest, so that there are bytes for one iteration in front of every position in a
/// stream. Frame, block and literals have headers of at least 12 bytes, a jump table has 6, and the first block has a tree.
pub(super) const STREAM_START_MIN: usize = 16;

/// One iteration's symbols: a row of one symbol of each stream, and the next.
pub(super) type Rows = [Cell<u8>; SYMBOLS_PER_REFILL * STREAMS];

/// The tables of both blocks.
pub(super) type Tables = [Table; 2];

/// Positions of all streams: the number, in the frame, of the bit to be decoded next.
pub(super) type Positions = [usize; STREAMS];

/// What decodes rows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Bmi(super::kernel::Bmi),
    #[cfg(test)]
    Twin,
}

impl Kernel {
    /// The kernel of this processor; `None` if libzstd is as good.
    pub(super) fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return super::kernel::Bmi::detect().map(Self::Bmi);
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// Decodes iterations of all streams, or of the first block's with `both` unset, and moves their positions. Returns how many:
    /// none if a position lies too close to the front of the frame or outside of it, at most as many as `staging` has.
    pub(super) fn run(
        self,
        both: bool,
        frame: &[u8],
        tables: &Tables,
        positions: &mut Positions,
        staging: &[Rows],
    ) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Bmi(kernel) => kernel.run(both, frame, tables, positions, staging),
            #[cfg(test)]
            Self::Twin => super::twin::run(both, frame, tables, positions, staging),
        }
    }

    /// Writes each stream's column of the staging to its output, which is as long as the rows are many, or empty. Takes whole
    /// stripes of `content` into the checksum on the way.
    fn transpose(
        self,
        staging: &[Rows],
        columns: [&mut [u8]; STREAMS],
        content: &[[u8; STRIPE]],
        hash: &mut checksum::Lanes,
    ) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Bmi(kernel) => kernel.transpose(staging, columns, content, hash),
            #[cfg(test)]
            Self::Twin => super::twin::transpose(staging, columns, content, hash),
        }
    }
}

/// Decodes literals two blocks at a time into their places in the output, and follows with the output's checksum. What is not
/// literals the caller writes, before it puts what comes behind.
pub(super) struct Lanes<'f> {
    kernel: Kernel,
    frame: &'f [u8],
    /// The tree that was read last, which blocks without one use.
    table: Table,
    has_table: bool,
    lanes: [Option<Lane>; 2],
    /// Blocks with sequences whose literals are not all decoded, or that lie behind such a block, in order.
    waiting: VecDeque<Assembly>,
    tables: Tables,
    positions: Positions,
    staging: [Rows; ITERATIONS],
    checksum: Option<Checksum>,
}

/// A block in flight.
#[derive(Clone, Copy, Debug)]
struct Lane {
    /// Where its output begins.
    out: usize,
    /// Bytes that each stream decodes to; the last one has fewer.
    stream_len: usize,
    last_len: usize,
    /// Bytes that each stream has decoded.
    done: usize,
    /// Where the streams begin.
    starts: [usize; BLOCK_STREAMS],
}

impl Lane {
    /// Whole iterations that are left for all four streams.
    const fn iterations(&self) -> usize {
        (self.last_len - self.done) / SYMBOLS_PER_REFILL
    }

    const fn len_of(&self, stream: usize) -> usize {
        if stream + 1 < BLOCK_STREAMS { self.stream_len } else { self.last_len }
    }
}

impl<'f> Lanes<'f> {
    pub(super) fn new(kernel: Kernel, frame: &'f [u8], has_checksum: bool) -> Self {
        Self {
            kernel,
            frame,
            table: Table::new(),
            has_table: false,
            lanes: [None; 2],
            waiting: VecDeque::new(),
            tables: [const { Table::new() }; 2],
            positions: [0; STREAMS],
            staging: [const { [const { Cell::new(0) }; SYMBOLS_PER_REFILL * STREAMS] }; ITERATIONS],
            checksum: has_checksum.then(Checksum::new),
        }
    }

    /// Notes that the next block, whose literals are about to be put or written, has sequences.
    pub(super) fn expect(&mut self, assembly: Assembly, out: &mut [u8]) -> Option<()> {
        // They take memory, and a block in flight that has no partner may keep them from being of use.
        if self.waiting.len() >= WAITING_MAX {
            self.run(out, 0)?;
        }
        self.waiting.push_back(assembly);
        Some(())
    }

    /// Takes the literals of the next block, which go to `out[at..]`: writes them, or decodes until one more block can be taken.
    pub(super) fn take(&mut self, literals: Literals<'_>, at: usize, out: &mut [u8]) -> Option<()> {
        let len = literals.len();
        match literals {
            Literals::Raw { bytes } => out.get_mut(at..at + len)?.copy_from_slice(bytes),
            Literals::Rle { byte, .. } => out.get_mut(at..at + len)?.fill(byte),
            Literals::Huffman(coded) => self.put(coded, at, out)?,
        }
        Some(())
    }

    /// Reads the tree of literals that have one, for them and for blocks without; its length.
    pub(super) fn read_tree(&mut self, literals: Coded) -> Option<usize> {
        let len = self.table.read(self.frame.get(literals.start..literals.end)?)?;
        self.has_table = true;
        Some(len)
    }

    fn put(&mut self, literals: Coded, at: usize, out: &mut [u8]) -> Option<()> {
        let mut streams = literals.start;
        if literals.has_tree {
            streams += self.read_tree(literals)?;
        }
        if !self.has_table || literals.len == 0 {
            return None;
        }
        if !literals.four_streams {
            let (position, out) = (last_bit(self.frame, streams, literals.end)?, out.get_mut(at..at + literals.len)?);
            return careful(self.frame, &self.table, position, streams, out);
        }
        let lane = usize::from(self.lanes[0].is_some());
        self.start(lane, literals, streams, at)?;
        if lane == 1 {
            self.run(out, 1)?;
        }
        Some(())
    }

    /// Decodes what is in flight. Returns the checksum of the output, of which then all must be written, if it has one.
    pub(super) fn finish(mut self, out: &mut [u8]) -> Option<Option<u32>> {
        self.run(out, 0)?;
        match self.checksum {
            Some(checksum) => checksum.finish(out).map(Some),
            None => Some(None),
        }
    }

    /// Puts a block with four streams into a lane that is free.
    fn start(&mut self, lane: usize, literals: Coded, jump_table: usize, out: usize) -> Option<()> {
        let first = jump_table + JUMP_TABLE_BYTES;
        let jumps = self.frame.get(jump_table..first)?;
        let mut starts = [first; BLOCK_STREAMS];
        for (stream, len) in jumps.chunks_exact(2).enumerate() {
            starts[stream + 1] = starts[stream] + usize::from(u16::from_le_bytes(len.try_into().ok()?));
        }
        let stream_len = literals.len.div_ceil(BLOCK_STREAMS);
        let last_len = literals.len.checked_sub(stream_len * (BLOCK_STREAMS - 1))?;
        if literals.len < FOUR_STREAMS_LEN_MIN || first < STREAM_START_MIN {
            return None;
        }
        for stream in 0..BLOCK_STREAMS {
            let end = starts.get(stream + 1).copied().unwrap_or(literals.end);
            // A stream may not reach beyond the literals, nor the last one begin behind them.
            if end > literals.end {
                return None;
            }
            self.positions[lane * BLOCK_STREAMS + stream] = last_bit(self.frame, starts[stream], end)?;
        }
        self.tables[lane].copy_from(&self.table);
        self.lanes[lane] = Some(Lane { out, stream_len, last_len, done: 0, starts });
        Some(())
    }

    /// Decodes until at most so many blocks are in flight; what is left then is in the first lane.
    fn run(&mut self, out: &mut [u8], left: usize) -> Option<()> {
        while self.lanes.iter().flatten().count() > left {
            if self.lanes[0].is_none() {
                self.move_to_first();
            }
            let wanted = self.lanes.iter().flatten().map(Lane::iterations).min()?.min(ITERATIONS);
            if wanted > 0 {
                self.chunk(wanted, out)?;
            }
            for lane in 0..2 {
                if self.lanes[lane].is_some_and(|lane| lane.iterations() == 0) {
                    self.complete(lane, out)?;
                }
            }
            self.assemble(out)?;
        }
        self.assemble(out)?;
        if self.lanes[0].is_none() {
            self.move_to_first();
        }
        Some(())
    }

    /// Puts blocks together that wait for it, as far as their literals and all bytes in front of them are there.
    fn assemble(&mut self, out: &mut [u8]) -> Option<()> {
        let in_flight = self.lanes.iter().flatten().map(|lane| lane.out).min().unwrap_or(usize::MAX);
        while self.waiting.front().is_some_and(|assembly| assembly.end <= in_flight) {
            self.waiting.pop_front()?.run(out)?;
        }
        Some(())
    }

    /// The second lane becomes the first.
    fn move_to_first(&mut self) {
        self.lanes.swap(0, 1);
        self.positions.copy_within(BLOCK_STREAMS.., 0);
        self.tables[0].copy_from(&self.tables[1]);
    }

    /// Decodes at most so many iterations of what is in flight.
    fn chunk(&mut self, wanted: usize, out: &mut [u8]) -> Option<()> {
        let both = self.lanes[1].is_some();
        let staging = &self.staging[..wanted];
        let iterations = self.kernel.run(both, self.frame, &self.tables, &mut self.positions, staging);
        if iterations == 0 {
            return None;
        }
        let rows = iterations * SYMBOLS_PER_REFILL;
        let mut ranges = [const { 0..0 }; STREAMS + 1];
        for (lane, state) in self.lanes.iter_mut().enumerate() {
            let Some(state) = state else { continue };
            for (stream, start) in state.starts.iter().enumerate() {
                let number = lane * BLOCK_STREAMS + stream;
                if self.positions[number] + 1 < start * 8 {
                    return None;
                }
                let at = state.out + stream * state.stream_len + state.done;
                ranges[number] = at..at + rows;
            }
            state.done += rows;
        }
        // As many bytes of blocks that are complete follow into the checksum: they are in the second cache still.
        let in_flight = self.lanes.iter().flatten().map(|lane| lane.out).min()?;
        let complete = self.waiting.front().map_or(in_flight, |assembly| assembly.start.min(in_flight));
        let mut none = checksum::Lanes::default();
        let hash = match &mut self.checksum {
            Some(checksum) => {
                ranges[STREAMS] = checksum.next(complete, rows * STREAMS);
                checksum.lanes_mut()
            }
            None => &mut none,
        };
        let [columns @ .., content] = out.get_disjoint_mut(ranges).ok()?;
        self.kernel.transpose(&self.staging[..iterations], columns, content.as_chunks().0, hash);
        Some(())
    }

    /// Decodes the last symbols of a lane's streams and frees it.
    fn complete(&mut self, lane: usize, out: &mut [u8]) -> Option<()> {
        let Some(state) = self.lanes[lane].take() else { return Some(()) };
        for (stream, start) in state.starts.iter().enumerate() {
            let at = state.out + stream * state.stream_len;
            let out = out.get_mut(at + state.done..at + state.len_of(stream))?;
            let position = self.positions[lane * BLOCK_STREAMS + stream];
            careful(self.frame, &self.tables[lane], position, *start, out)?;
        }
        Some(())
    }
}

/// Decodes symbols one by one, to the end of a stream that begins at byte `start`: it must end exactly there.
fn careful(frame: &[u8], table: &Table, mut position: usize, start: usize, out: &mut [u8]) -> Option<()> {
    for byte in out {
        let (symbol, bits) = table.symbol(bits_at(frame, position)?);
        *byte = symbol;
        position = position.checked_sub(bits).filter(|position| position + 1 >= start * 8)?;
    }
    (position + 1 == start * 8).then_some(())
}

/// The bit of a stream that is decoded first: below the highest bit that is set, which only marks the end.
fn last_bit(frame: &[u8], start: usize, end: usize) -> Option<usize> {
    let (last, _) = frame.get(start..end)?.split_last()?;
    let mark = last.checked_ilog2()? as usize;
    ((end - 1) * 8 + mark).checked_sub(1)
}

/// Bits of a frame from a position towards its front, the first in the highest bit.
pub(super) fn bits_at(frame: &[u8], position: usize) -> Option<u64> {
    let at = (position / 8).checked_sub(7)?;
    let word = frame.get(at..at + 8)?;
    Some(u64::from_le_bytes(word.try_into().ok()?) << (7 - position % 8))
}

/// Most blocks that wait until they can be put together: two in flight, and what came between them.
const WAITING_MAX: usize = 4;

/// Bytes in front of four streams: the lengths of three.
const JUMP_TABLE_BYTES: usize = 6;

/// Fewest bytes that four streams decode to.
const FOUR_STREAMS_LEN_MIN: usize = 6;
