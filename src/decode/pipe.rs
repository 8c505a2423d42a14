//! Decoders of decoders: two in a row, and one whose lengths are checked.

use super::{DecodeError, Decoder, Step};

/// Two decoders in a row, with a buffer of [`BUFFER_BYTES`] between them.
pub(super) struct Pipe {
    first: Box<dyn Decoder>,
    second: Box<dyn Decoder>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Pipe {
    pub(super) fn new(first: Box<dyn Decoder>, second: Box<dyn Decoder>) -> Self {
        Self { first, second, buffer: vec![0; BUFFER_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Moves what the second decoder takes from the buffer into the output.
    fn drain(&mut self, output: &mut [u8]) -> Result<Step, DecodeError> {
        let waiting = self.buffer.get(self.start..self.end).unwrap_or_default();
        let step = self.second.step(waiting, output)?;
        self.start += step.read;
        Ok(step)
    }

    /// Refills the buffer, once all of it was taken.
    fn fill(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        if self.start < self.end {
            return Ok(Step::default());
        }
        let step = self.first.step(input, &mut self.buffer)?;
        (self.start, self.end) = (0, step.written);
        Ok(step)
    }
}

impl Decoder for Pipe {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let mut total = Step::default();
        loop {
            let room = output.get_mut(total.written..).unwrap_or_default();
            if room.is_empty() {
                return Ok(total);
            }
            let drained = self.drain(room)?;
            let filled = self.fill(input.get(total.read..).unwrap_or_default())?;
            total.written += drained.written;
            total.read += filled.read;
            if drained == Step::default() && filled == Step::default() {
                return Ok(total);
            }
        }
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        self.first.finish()?;
        self.second.finish()
    }
}

/// A decoder that takes and writes exact numbers of bytes.
pub(super) struct Exact {
    inner: Box<dyn Decoder>,
    encoded_len: u64,
    decoded_len: u64,
    read: u64,
    written: u64,
}

impl Exact {
    pub(super) fn new(inner: Box<dyn Decoder>, encoded_len: u64, decoded_len: u64) -> Self {
        Self { inner, encoded_len, decoded_len, read: 0, written: 0 }
    }

    /// Lets the inner decoder go on behind the end of the output, where it may read but not write.
    fn step_behind_end(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        let step = self.inner.step(input, &mut [0])?;
        if step.written > 0 {
            return Err(DecodeError::Long { expected: self.decoded_len, found: self.decoded_len.saturating_add(1) });
        }
        Ok(step)
    }
}

impl Decoder for Exact {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let given = self.read.saturating_add(input.len() as u64);
        if given > self.encoded_len {
            return Err(DecodeError::Input { expected: self.encoded_len, found: given });
        }
        let wanted = self.decoded_len - self.written;
        let step = if wanted == 0 {
            self.step_behind_end(input)?
        } else {
            let room = usize::try_from(wanted).unwrap_or(usize::MAX).min(output.len());
            self.inner.step(input, output.get_mut(..room).unwrap_or_default())?
        };
        self.read += step.read as u64;
        self.written += step.written as u64;
        Ok(step)
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        if self.read < self.encoded_len {
            return Err(DecodeError::Input { expected: self.encoded_len, found: self.read });
        }
        if self.written == self.decoded_len {
            self.step_behind_end(&[])?;
        }
        self.inner.finish()?;
        if self.written < self.decoded_len {
            return Err(DecodeError::Short { expected: self.decoded_len, found: self.written });
        }
        Ok(())
    }
}

/// Runs a decoder over a whole value.
pub(super) fn run(decoder: &mut dyn Decoder, encoded: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let mut total = Step::default();
    loop {
        let input = encoded.get(total.read..).unwrap_or_default();
        let output = out.get_mut(total.written..).unwrap_or_default();
        let step = decoder.step(input, output)?;
        if step == Step::default() {
            return decoder.finish();
        }
        total.read += step.read;
        total.written += step.written;
    }
}

/// Size of the buffer between two codecs: within a core's cache, and large beside the cost of a call.
pub(super) const BUFFER_BYTES: usize = 64 << 10;
