//! A Huffman tree's description to its weights, and those to a table.
//!
//! Source: RFC 8878, section 4.2.

use std::cell::Cell;

use super::fse::{BackwardBits, SYMBOLS_MAX, State, read_states};

/// Most bits of a code in a table; the format allows twelve for one that libzstd never writes.
pub(super) const CODE_BITS_MAX: u32 = 11;

/// Entries of a table: one for all that the next bits can be.
pub(super) const TABLE_LEN: usize = 1 << CODE_BITS_MAX;

/// What the next [`CODE_BITS_MAX`] bits of a stream mean: the first symbol in them in the high byte, the bits of its code, 1 to
/// [`CODE_BITS_MAX`], in the low one.
///
/// The entries are `Cell`s for the kernel's sake, see there.
#[derive(Debug)]
pub(super) struct Table {
    entries: [Cell<u16>; TABLE_LEN],
}

impl Table {
    /// A table of which nothing was read yet.
    pub(super) const fn new() -> Self {
        Self { entries: [const { Cell::new(1) }; TABLE_LEN] }
    }

    pub(super) const fn entries(&self) -> &[Cell<u16>; TABLE_LEN] {
        &self.entries
    }

    pub(super) fn copy_from(&self, other: &Self) {
        self.entries.iter().zip(&other.entries).for_each(|(own, entry)| own.set(entry.get()));
    }

    /// The symbol that the highest bits of `bits` begin with, and how many of them it takes.
    pub(super) fn symbol(&self, bits: u64) -> (u8, usize) {
        let [len, symbol] = self.entries[(bits >> (u64::BITS - CODE_BITS_MAX)) as usize].get().to_le_bytes();
        (symbol, usize::from(len))
    }

    /// Reads the description that stands at the front of `bytes`, and returns its length.
    pub(super) fn read(&self, bytes: &[u8]) -> Option<usize> {
        let mut weights = [0; SYMBOLS_MAX];
        let (&head, rest) = bytes.split_first()?;
        let head = usize::from(head);
        let (count, len) = if head >= PACKED_HEAD {
            let count = head + 1 - PACKED_HEAD;
            let packed = rest.get(..count.div_ceil(2))?;
            for (pair, byte) in weights.chunks_exact_mut(2).zip(packed) {
                pair.copy_from_slice(&[byte >> 4, byte & 15]);
            }
            (count, packed.len())
        } else {
            (fse_weights(rest.get(..head)?, &mut weights)?, head)
        };
        self.fill(&mut weights, count)?;
        Some(1 + len)
    }

    /// Fills the table by the weights of so many symbols. Weight 0 says that a symbol does not occur, weight `w` that its code
    /// takes `2^(w-1)` parts of the whole; the last symbol's weight is what completes a power of two.
    fn fill(&self, weights: &mut [u8; SYMBOLS_MAX], count: usize) -> Option<()> {
        let parts = |weight: u8| (1usize << weight) >> 1;
        let stated = weights.get(..count)?;
        if stated.iter().any(|weight| u32::from(*weight) > CODE_BITS_MAX) {
            return None;
        }
        let sum: usize = stated.iter().map(|weight| parts(*weight)).sum();
        let code_bits = sum.checked_ilog2()? + 1;
        let missing = (1 << code_bits) - sum;
        if code_bits > CODE_BITS_MAX || !missing.is_power_of_two() {
            return None;
        }
        *weights.get_mut(count)? = u8::try_from(missing.ilog2() + 1).ok()?;
        let mut ranks = [0usize; CODE_BITS_MAX as usize + 1];
        let weights = weights.get(..=count)?;
        weights.iter().for_each(|weight| ranks[usize::from(*weight)] += 1);
        // The longest codes come in pairs, or the tree has a leaf without a sibling.
        if ranks[1] < 2 || ranks[1] % 2 == 1 {
            return None;
        }
        // Long codes first; a shorter code's entries are more.
        let spread = CODE_BITS_MAX - code_bits;
        let mut next = [0usize; CODE_BITS_MAX as usize + 1];
        let mut at = 0;
        for weight in 1..=code_bits as usize {
            next[weight] = at;
            at += ranks[weight] << (weight - 1) << spread;
        }
        for (symbol, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0) {
            let start = &mut next[usize::from(*weight)];
            let len = parts(*weight) << spread;
            let bits = u8::try_from(code_bits + 1 - u32::from(*weight)).ok()?;
            let entry = u16::from_le_bytes([bits, u8::try_from(symbol).ok()?]);
            self.entries.get(*start..*start + len)?.iter().for_each(|cell| cell.set(entry));
            *start += len;
        }
        (at == TABLE_LEN).then_some(())
    }
}

/// Weights that are coded by finite-state entropy: two states take turns. Returns how many there are.
fn fse_weights(bytes: &[u8], weights: &mut [u8; SYMBOLS_MAX]) -> Option<usize> {
    let mut states = [State::default(); 1 << WEIGHT_STATES_LOG_MAX];
    let (log, used) = read_states(bytes, SYMBOLS_MAX, &mut states)?;
    let mut bits = BackwardBits::new(bytes.get(used..)?)?;
    let mut turns = [bits.take(log)?, bits.take(log)?];
    // The last symbol's weight is not stored, and the end is found after one symbol more.
    for at in 0..SYMBOLS_MAX - 2 {
        let state = states[turns[at % 2] & (states.len() - 1)];
        weights[at] = state.symbol;
        match bits.take(u32::from(state.bits)) {
            Some(more) => turns[at % 2] = usize::from(state.base) + more,
            None => {
                weights[at + 1] = states[turns[(at + 1) % 2] & (states.len() - 1)].symbol;
                return Some(at + 2);
            }
        }
    }
    None
}

/// From here on, the first byte of a description says that weights are packed in half bytes, one less than their number.
const PACKED_HEAD: usize = 128;

/// Weights have at most so many states.
const WEIGHT_STATES_LOG_MAX: u32 = 6;
