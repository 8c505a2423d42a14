//! Sequences: so many literals, then so many bytes again that stand so far before.
//!
//! ```text
//!   the block's place in the output   [ room for all that is repeated ][ literals, as they were decoded    ]
//!   a sequence moves literals forward [lits]                 <-  [lits][ ..                                ]
//!   and repeats what stands before    [lits][again]          the room shrinks by what is repeated
//!   behind the last one               [lits][again][lits][again][ literals that are where they belong      ]
//! ```
//!
//! So literals are decoded into the output, and the last of them are not moved at all. Sequences are read before the literals are
//! decoded, because they say how long the block is; they are carried out once all in front of them is there.
//!
//! Source: RFC 8878, sections 3.1.1.3.2 (section), 3.1.1.4 (execution), 3.1.1.5 (repeat offsets).

use super::fse::{BackwardBits, State, read_states, spread};

/// What sequences of a frame's blocks hand on to the next: how their parts are coded, and the offsets used last.
pub(super) struct Sequences {
    literals: Coding<LITERAL_LENGTH_STATES>,
    offsets: Coding<OFFSET_STATES>,
    matches: Coding<MATCH_LENGTH_STATES>,
    recent: [usize; 3],
}

/// A block whose literals, once decoded, are to be put in their places.
#[derive(Debug)]
pub(super) struct Assembly {
    /// Where the block begins in the output.
    pub(super) start: usize,
    /// Where its literals are decoded to.
    pub(super) literals: usize,
    /// Where it ends, as its literals do.
    pub(super) end: usize,
    sequences: Vec<Sequence>,
}

#[derive(Clone, Copy, Debug)]
struct Sequence {
    literals: u32,
    matched: u32,
    offset: u32,
}

impl Sequences {
    pub(super) const fn new() -> Self {
        Self { literals: Coding::new(), offsets: Coding::new(), matches: Coding::new(), recent: [1, 4, 8] }
    }

    /// Reads so many sequences of a block that has so many literals and begins at `start` in the output.
    pub(super) fn read(&mut self, section: &[u8], count: usize, literals_len: usize, start: usize) -> Option<Assembly> {
        let (&modes, mut rest) = section.split_first()?;
        if modes & 3 != 0 {
            return None;
        }
        self.literals.read(modes >> 6, &mut rest, &LITERAL_LENGTH_COUNTS)?;
        self.offsets.read(modes >> 4 & 3, &mut rest, &OFFSET_COUNTS)?;
        self.matches.read(modes >> 2 & 3, &mut rest, &MATCH_LENGTH_COUNTS)?;
        let mut bits = BackwardBits::new(rest)?;
        let (mut literals, mut offsets, mut matches) =
            (self.literals.first(&mut bits)?, self.offsets.first(&mut bits)?, self.matches.first(&mut bits)?);
        let mut sequences = Vec::with_capacity(count);
        let (mut literals_left, mut room) = (literals_len, 0usize);
        for left in (0..count).rev() {
            let offset_bits = u32::from(offsets.symbol);
            let stated = (1usize << offset_bits) + bits.take(offset_bits)?;
            let matched = length(&MATCH_LENGTHS, matches, &mut bits)?;
            let literal_len = length(&LITERAL_LENGTHS, literals, &mut bits)?;
            let offset = self.offset(stated, literal_len == 0)?;
            literals_left = literals_left.checked_sub(literal_len)?;
            room += matched;
            sequences.push(Sequence {
                literals: u32::try_from(literal_len).ok()?,
                matched: u32::try_from(matched).ok()?,
                offset: u32::try_from(offset).ok()?,
            });
            if left > 0 {
                literals = self.literals.next(literals, &mut bits)?;
                matches = self.matches.next(matches, &mut bits)?;
                offsets = self.offsets.next(offsets, &mut bits)?;
            }
        }
        let literals = start.checked_add(room)?;
        let end = literals.checked_add(literals_len)?;
        bits.is_empty().then_some(Assembly { start, literals, end, sequences })
    }

    /// The offset that a stated one means: one of the last three, or one less than the last, or three less than is stated.
    fn offset(&mut self, stated: usize, no_literals: bool) -> Option<usize> {
        let [first, second, third] = self.recent;
        let (offset, recent) = match stated.checked_sub(RECENT + 1) {
            Some(less) => (less + 1, [less + 1, first, second]),
            // Without literals between, the last one would have made one longer match: the others move up.
            None => match stated + usize::from(no_literals) {
                1 => (first, self.recent),
                2 => (second, [second, first, third]),
                3 => (third, [third, first, second]),
                _ => {
                    let less = first.checked_sub(1)?;
                    (less, [less, first, second])
                }
            },
        };
        self.recent = recent;
        (offset > 0).then_some(offset)
    }
}

impl Assembly {
    /// How many sequences it has.
    pub(super) fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Carries out the sequences in an output in which everything in front of the block and its literals are there.
    pub(super) fn run(self, out: &mut [u8]) -> Option<()> {
        let out = out.get_mut(..self.end)?;
        let (mut from, mut to) = (self.literals, self.start);
        for Sequence { literals, matched, offset } in self.sequences {
            let (literals, matched, offset) = (literals as usize, matched as usize, offset as usize);
            // Never behind `from`: the room between is what the matches to come take.
            if to + matched > from || from + literals > self.end {
                return None;
            }
            out.copy_within(from..from + literals, to);
            (from, to) = (from + literals, to + literals);
            let source = to.checked_sub(offset)?;
            // A match may reach into itself, and then repeats itself: more of it at every turn.
            let mut done = 0;
            while done < matched {
                let len = (matched - done).min(offset + done);
                out.copy_within(source..source + len, to + done);
                done += len;
            }
            to += matched;
        }
        (from == to).then_some(())
    }
}

/// States of one part of sequences, and how many bits say which is the first.
struct Coding<const STATES: usize> {
    states: [State; STATES],
    log: u32,
    is_there: bool,
}

impl<const STATES: usize> Coding<STATES> {
    const fn new() -> Self {
        Self { states: [State { base: 0, bits: 0, symbol: 0 }; STATES], log: 0, is_there: false }
    }

    /// Reads how the part is coded: as the format says, by one symbol only, as described here, or as in the block before.
    fn read(&mut self, mode: u8, bytes: &mut &[u8], predefined: &Predefined) -> Option<()> {
        let Predefined { log, counts, symbols } = *predefined;
        match mode {
            MODE_PREDEFINED => {
                spread(counts, log, &mut self.states)?;
                self.log = log;
            }
            MODE_ONE_SYMBOL => {
                let (&symbol, rest) = bytes.split_first()?;
                if usize::from(symbol) >= symbols {
                    return None;
                }
                self.states[0] = State { base: 0, bits: 0, symbol };
                (self.log, *bytes) = (0, rest);
            }
            MODE_DESCRIBED => {
                let (log, used) = read_states(bytes, symbols, &mut self.states)?;
                (self.log, *bytes) = (log, bytes.get(used..)?);
            }
            _ if !self.is_there => return None,
            _ => {}
        }
        self.is_there = true;
        Some(())
    }

    fn first(&self, bits: &mut BackwardBits<'_>) -> Option<State> {
        self.states.get(bits.take(self.log)?).copied()
    }

    fn next(&self, state: State, bits: &mut BackwardBits<'_>) -> Option<State> {
        self.states.get(usize::from(state.base) + bits.take(u32::from(state.bits))?).copied()
    }
}

/// The length that a symbol and the bits behind it mean.
fn length(lengths: &[(u32, u8)], state: State, bits: &mut BackwardBits<'_>) -> Option<usize> {
    let (base, more) = *lengths.get(usize::from(state.symbol))?;
    Some(base as usize + bits.take(u32::from(more))?)
}

/// How a part is coded where nothing is described, and how many symbols it may have.
struct Predefined {
    log: u32,
    counts: &'static [i16],
    symbols: usize,
}

const MODE_PREDEFINED: u8 = 0;

const MODE_ONE_SYMBOL: u8 = 1;

const MODE_DESCRIBED: u8 = 2;

/// Stated offsets up to this many mean recent ones.
const RECENT: usize = 3;

const LITERAL_LENGTH_STATES: usize = 1 << 9;

const OFFSET_STATES: usize = 1 << 8;

const MATCH_LENGTH_STATES: usize = 1 << 9;

/// Section 3.1.1.3.2.2 of the RFC.
const LITERAL_LENGTH_COUNTS: Predefined = Predefined {
    log: 6,
    counts: &[
        4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1,
    ],
    symbols: LITERAL_LENGTHS.len(),
};

const MATCH_LENGTH_COUNTS: Predefined = Predefined {
    log: 6,
    counts: &[
        1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
        1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1,
    ],
    symbols: MATCH_LENGTHS.len(),
};

const OFFSET_COUNTS: Predefined = Predefined {
    log: 5,
    counts: &[1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1],
    symbols: 32,
};

/// What each symbol of a literal length begins at, and how many bits say how much more it is.
const LITERAL_LENGTHS: [(u32, u8); 36] =
    lengths(0, 16, [1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);

const MATCH_LENGTHS: [(u32, u8); 53] =
    lengths(3, 32, [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);

/// So many lengths of no more bits from the first one on, then some with so many bits, each where the one before ends. From the
/// first with more than four or five bits on they begin at powers of two behind the first length.
const fn lengths<const ALL: usize, const LONG: usize>(first: u32, short: usize, long: [u8; LONG]) -> [(u32, u8); ALL] {
    assert!(short + LONG == ALL);
    let mut all = [(0, 0); ALL];
    let (mut at, mut base) = (0, first);
    while at < ALL {
        let bits = if at < short { 0 } else { long[at - short] };
        all[at] = (base, bits);
        base += 1 << bits;
        at += 1;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_format() {
        assert_eq!(LITERAL_LENGTHS[15..19], [(15, 0), (16, 1), (18, 1), (20, 1)]);
        assert_eq!(LITERAL_LENGTHS[20..26], [(24, 2), (28, 2), (32, 3), (40, 3), (48, 4), (64, 6)]);
        assert_eq!(LITERAL_LENGTHS[26..28], [(128, 7), (256, 8)]);
        assert_eq!(LITERAL_LENGTHS[35], (65_536, 16));
        assert_eq!(MATCH_LENGTHS[31..33], [(34, 0), (35, 1)]);
        assert_eq!(MATCH_LENGTHS[36..44], [(43, 2), (47, 2), (51, 3), (59, 3), (67, 4), (83, 4), (99, 5), (131, 7)]);
        assert_eq!(MATCH_LENGTHS[44], (259, 8));
        assert_eq!(MATCH_LENGTHS[52], (65_539, 16));
    }
}
