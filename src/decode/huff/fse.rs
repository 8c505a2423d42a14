//! Finite-state entropy: how a description becomes states, and the bits that lead from one to the next.
//!
//! Source: RFC 8878, section 4.1.

/// A state: its symbol, and the states that may follow, which are `base` and as many bits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct State {
    pub(super) base: u16,
    pub(super) bits: u8,
    pub(super) symbol: u8,
}

/// Reads how often each of at most so many symbols occurs, and spreads them over states, of which there are at most as many as given
/// here. Returns the logarithm of the number of states, and the length of the description.
pub(super) fn read_states(bytes: &[u8], symbols_max: usize, states: &mut [State]) -> Option<(u32, usize)> {
    let mut bits = ForwardBits { bytes, at: 0 };
    let log = u32::try_from(bits.take(4)).ok()? + LOG_MIN;
    if 1 << log > states.len() {
        return None;
    }
    let mut counts = [0i16; SYMBOLS_MAX];
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
        let count = i16::try_from(value).ok()? - 1;
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
    (used <= bytes.len() && symbol <= symbols_max).then_some(())?;
    spread(&counts, log, states)?;
    Some((log, used))
}

/// Gives each symbol as many states as its count says, in the order that encoders use.
pub(super) fn spread(counts: &[i16], log: u32, states: &mut [State]) -> Option<()> {
    let len = 1usize << log;
    let states = states.get_mut(..len)?;
    let mut seen = [0u16; SYMBOLS_MAX];
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
        state.base = u16::try_from((usize::from(*number) << bits).checked_sub(len)?).ok()?;
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
    fn peek(&self, count: u32) -> usize {
        bits_at(self.bytes, self.at, count)
    }

    fn take(&mut self, count: u32) -> usize {
        let bits = self.peek(count);
        self.at += count as usize;
        bits
    }
}

/// Bits from the end, highest first; the highest bit that is set only marks the end.
pub(super) struct BackwardBits<'a> {
    bytes: &'a [u8],
    /// Bits left.
    left: usize,
}

impl<'a> BackwardBits<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Option<Self> {
        let mark = bytes.last()?.checked_ilog2()?;
        Some(Self { bytes, left: (bytes.len() - 1) * 8 + mark as usize })
    }

    /// The next bits, at most 32; `None` if there are fewer.
    pub(super) fn take(&mut self, count: u32) -> Option<usize> {
        self.left = self.left.checked_sub(count as usize)?;
        Some(bits_at(self.bytes, self.left, count))
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.left == 0
    }
}

/// So many bits, at most 32, from a bit's position on; zeros behind the end.
#[allow(clippy::cast_possible_truncation, reason = "only the low bits are kept")]
fn bits_at(bytes: &[u8], at: usize, count: u32) -> usize {
    let rest = bytes.get(at / 8..).unwrap_or_default();
    let word = match rest.first_chunk() {
        Some(word) => u64::from_le_bytes(*word),
        None => rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    };
    (word >> (at % 8)) as usize & ((1 << count) - 1)
}

/// Symbols are bytes.
pub(super) const SYMBOLS_MAX: usize = 256;

const LOG_MIN: u32 = 5;
