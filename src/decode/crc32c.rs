//! The `crc32c` codec: bytes, then their CRC-32C as u32 little-endian.
//!
//! Source: Zarr v3 specification, CRC32C codec 1.0.

use super::{DecodeError, Decoder, Step};

/// Passes on all but the last four bytes, which it compares with the checksum of the others.
///
/// It need not be told where the end is: four bytes are always held back.
pub(super) struct Crc32c {
    verify: bool,
    computed: u32,
    held: [u8; 4],
    held_len: usize,
}

impl Crc32c {
    pub(super) const fn new(verify: bool) -> Self {
        Self { verify, computed: 0, held: [0; 4], held_len: 0 }
    }
}

impl Decoder for Crc32c {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let known = self.held_len + input.len();
        let written = known.saturating_sub(self.held.len()).min(output.len());
        let (from_held, from_input) = (written.min(self.held_len), written.saturating_sub(self.held_len));
        let output = output.get_mut(..written).unwrap_or_default();
        let (first, second) = output.split_at_mut(from_held);
        first.copy_from_slice(self.held.get(..from_held).unwrap_or_default());
        let (passed, rest) = input.split_at(from_input.min(input.len()));
        second.copy_from_slice(passed);
        if self.verify {
            self.computed = crc32c::crc32c_append(self.computed, output);
        }
        self.held.rotate_left(from_held);
        self.held_len -= from_held;
        let room = self.held.get_mut(self.held_len..).unwrap_or_default();
        let taken = room.len().min(rest.len());
        room.iter_mut().zip(rest).for_each(|(held, byte)| *held = *byte);
        self.held_len += taken;
        Ok(Step { read: passed.len() + taken, written })
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        if self.held_len < self.held.len() {
            return Err(DecodeError::Truncated { codec: CODEC });
        }
        let stored = u32::from_le_bytes(self.held);
        if self.verify && stored != self.computed {
            return Err(DecodeError::Checksum { stored, computed: self.computed });
        }
        Ok(())
    }
}

/// The bytes before the checksum, after comparing it if `verify` says so.
pub(super) fn strip(encoded: &[u8], verify: bool) -> Result<&[u8], DecodeError> {
    let (body, stored) = encoded.split_last_chunk::<4>().ok_or(DecodeError::Truncated { codec: CODEC })?;
    if verify {
        let (stored, computed) = (u32::from_le_bytes(*stored), crc32c::crc32c(body));
        if stored != computed {
            return Err(DecodeError::Checksum { stored, computed });
        }
    }
    Ok(body)
}

const CODEC: &str = "crc32c";
