//! bzip2: one or more streams, one after another, as Python's `bz2` reads them.

use bzip2::{Decompress, Status};

use super::{DecodeError, Decoder, Step};

/// Decodes streams until the input ends.
pub(super) struct Bz2 {
    stream: Decompress,
    /// At least one stream is complete and no other has begun.
    between: bool,
}

impl Bz2 {
    pub(super) fn new() -> Self {
        Self { stream: Decompress::new(false), between: false }
    }
}

impl Decoder for Bz2 {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        if self.between {
            if input.is_empty() {
                return Ok(Step::default());
            }
            *self = Self::new();
        }
        let (read, written) = (self.stream.total_in(), self.stream.total_out());
        let status = self
            .stream
            .decompress(input, output)
            .map_err(|error| DecodeError::Corrupt { codec: CODEC, what: error.to_string() })?;
        match status {
            Status::StreamEnd => self.between = true,
            Status::MemNeeded => return Err(DecodeError::NoMemory { codec: CODEC }),
            _ => {}
        }
        // Both are at most the lengths of the slices.
        let used = |total: u64, before: u64| usize::try_from(total.wrapping_sub(before)).unwrap_or_default();
        Ok(Step { read: used(self.stream.total_in(), read), written: used(self.stream.total_out(), written) })
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        if self.between { Ok(()) } else { Err(DecodeError::Truncated { codec: CODEC }) }
    }
}

const CODEC: &str = "bz2";
