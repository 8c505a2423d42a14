//! A Huffman tree's description to its weights, and those to a table.
//!
//! Source: RFC 8878, sections 4.1 (FSE) and 4.2 (Huffman coding).

use std::cell::Cell;

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
    let mut states = [State::default(); 1 << FSE_LOG_MAX];
    let (log, used) = fse_states(bytes, &mut states)?;
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

/// A state: its symbol, and the states that may follow, which are `base` and as many bits.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    base: u8,
    bits: u8,
    symbol: u8,
}

/// Reads how often symbols occur, and spreads them over states. Returns the logarithm of the number of states, and the
/// length of the description.
fn fse_states(bytes: &[u8], states: &mut [State; 1 << FSE_LOG_MAX]) -> Option<(u32, usize)> {
    let mut bits = ForwardBits { bytes, at: 0 };
    let log = u32::try_from(bits.take(4)).ok()? + FSE_LOG_MIN;
    if log > FSE_LOG_MAX {
        return None;
    }
    let mut counts = [0i8; SYMBOLS_MAX];
    let mut remaining = 1usize << log;
    let mut symbol = 0;
    while remaining > 0 {
        // A number of 0..=remaining + 1, the small ones with a bit less.
        let width = (remaining + 1).ilog2() + 1;
        let short = (1 << width) - 2 - remaining;
        let low = bits.peek(width - 1);
        let value = if low < short {
            bits.take(width - 1)
        } else {
            let value = bits.take(width);
            if value >= 1 << (width - 1) { value - short } else { value }
        };
        // 0 stands for a symbol that is less than one state's worth; it has one.
        let count = i8::try_from(value).ok()? - 1;
        *counts.get_mut(symbol)? = count;
        symbol += 1;
        remaining = remaining.checked_sub(usize::from(count.unsigned_abs()))?;
        if count == 0 {
            loop {
                let repeat = bits.take(2);
                symbol += repeat;
                if repeat < 3 {
                    break;
                }
                if symbol > SYMBOLS_MAX {
                    return None;
                }
            }
        }
    }
    let used = bits.at.div_ceil(8);
    (used <= bytes.len()).then_some(())?;
    spread(&counts, log, states)?;
    Some((log, used))
}

/// Gives each symbol as many states as its count says, in the order that encoders use.
fn spread(counts: &[i8; SYMBOLS_MAX], log: u32, states: &mut [State; 1 << FSE_LOG_MAX]) -> Option<()> {
    let len = 1usize << log;
    let states = states.get_mut(..len)?;
    let mut seen = [0u8; SYMBOLS_MAX];
    let mut high = len;
    for (symbol, count) in counts.iter().enumerate() {
        if *count == -1 {
            high = high.checked_sub(1)?;
            states.get_mut(high)?.symbol = u8::try_from(symbol).ok()?;
        }
        seen[symbol] = count.unsigned_abs();
    }
    let (step, mut at) = (len / 2 + len / 8 + 3, 0);
    for (symbol, count) in counts.iter().enumerate() {
        for _ in 0..(*count).max(0) {
            states.get_mut(at)?.symbol = u8::try_from(symbol).ok()?;
            at = (at + step) % len;
            while at >= high {
                at = (at + step) % len;
            }
        }
    }
    for state in states {
        let number = &mut seen[usize::from(state.symbol)];
        let bits = log.checked_sub(number.checked_ilog2()?)?;
        state.bits = u8::try_from(bits).ok()?;
        state.base = u8::try_from((usize::from(*number) << bits).checked_sub(len)?).ok()?;
        *number += 1;
    }
    Some(())
}

/// Bits from the front, lowest first. Behind the end they are zeros: the caller compares `at` with the length.
struct ForwardBits<'a> {
    bytes: &'a [u8],
    /// Bits taken.
    at: usize,
}

impl ForwardBits<'_> {
    /// The next bits, at most eight.
    fn peek(&self, count: u32) -> usize {
        let byte = |at: usize| self.bytes.get(at).copied().map_or(0, usize::from);
        let word = byte(self.at / 8) | byte(self.at / 8 + 1) << 8;
        (word >> (self.at % 8)) & ((1 << count) - 1)
    }

    fn take(&mut self, count: u32) -> usize {
        let bits = self.peek(count);
        self.at += count as usize;
        bits
    }
}

/// Bits from the end, highest first; the highest bit that is set only marks the end.
struct BackwardBits<'a> {
    bytes: &'a [u8],
    /// Bits left.
    left: usize,
}

impl<'a> BackwardBits<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let mark = bytes.last()?.checked_ilog2()?;
        Some(Self { bytes, left: (bytes.len() - 1) * 8 + mark as usize })
    }

    /// The next bits, at most eight; `None` if there are fewer.
    fn take(&mut self, count: u32) -> Option<usize> {
        self.left = self.left.checked_sub(count as usize)?;
        Some(ForwardBits { bytes: self.bytes, at: self.left }.peek(count))
    }
}

/// Symbols are bytes.
const SYMBOLS_MAX: usize = 256;

/// From here on, the first byte of a description says that weights are packed in half bytes, one less than their number.
const PACKED_HEAD: usize = 128;

/// Weights have at most 64 states.
const FSE_LOG_MAX: u32 = 6;

const FSE_LOG_MIN: u32 = 5;
