//! Elements of fewer than eight bits, packed without gaps: one byte an element comes out.

use super::{DecodeError, Decoder, Step};

/// Unpacks elements of 4 or 6 bits; the first element stands in the lowest bits of the first byte.
pub(super) struct Packed {
    bits: u32,
    /// Bits taken from the input and not yet given out, lowest first.
    held: u32,
    held_bits: u32,
}

impl Packed {
    pub(super) fn new(bits: u32) -> Self {
        Self { bits: bits.clamp(1, 8), held: 0, held_bits: 0 }
    }
}

impl Decoder for Packed {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let mut input = input.iter();
        let available = input.len();
        let mut written = 0;
        for slot in output {
            if self.held_bits < self.bits {
                let Some(byte) = input.next() else { break };
                self.held |= u32::from(*byte) << self.held_bits;
                self.held_bits += 8;
            }
            *slot = u8::try_from(self.held & ((1 << self.bits) - 1)).unwrap_or(0);
            self.held >>= self.bits;
            self.held_bits -= self.bits;
            written += 1;
        }
        Ok(Step { read: available - input.len(), written })
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_come_out_lowest_bits_first() {
        let mut out = [0; 4];
        let step = Packed::new(4).step(&[0x21, 0x43], &mut out).unwrap();
        assert_eq!((out, step), ([1, 2, 3, 4], Step { read: 2, written: 4 }));
        // 1, 2, 3, 63 in six bits each.
        let value = 1u32 | 2 << 6 | 3 << 12 | 63 << 18;
        let step = Packed::new(6).step(&value.to_le_bytes()[..3], &mut out).unwrap();
        assert_eq!((out, step), ([1, 2, 3, 63], Step { read: 3, written: 4 }));
    }
}
