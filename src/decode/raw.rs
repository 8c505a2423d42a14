//! No codec: the stored bytes are the decoded ones.

use super::{DecodeError, Decoder, Step};

/// Copies.
pub(super) struct Raw;

impl Decoder for Raw {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let count = input.len().min(output.len());
        let (source, target) = (input.get(..count).unwrap_or_default(), output.get_mut(..count).unwrap_or_default());
        target.copy_from_slice(source);
        Ok(Step { read: count, written: count })
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        Ok(())
    }
}

/// Copies all of `encoded` to all of `out`.
pub(super) fn copy(encoded: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let (expected, found) = (out.len() as u64, encoded.len() as u64);
    super::DecodedLen::Exactly(expected).check(found)?;
    out.copy_from_slice(encoded);
    Ok(())
}
