//! Element bytes to stored bytes: the inverse of `decode` for what this library writes.
//!
//! An [`Encoder`] belongs to one worker and keeps its zstd context. It encodes chunks that are in memory whole, and
//! streams ([`Encoder::stream`]) those that are not. Elements are to be brought into stored form first ([`prepare`]).
//!
//! Must not know: arrays, files, devices.

mod context;

use std::borrow::Cow;

use context::{Context, bound, reserve};

use crate::dtype::{Class, DType};
use crate::zarr::Compression;

/// Encodes chunks, one after the other.
#[derive(Debug)]
pub struct Encoder {
    /// None if elements are stored as they are.
    zstd: Option<Context>,
    /// Whether a CRC-32C of what is stored follows it.
    crc32c: bool,
}

/// The checksums that encoded chunks carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Checksums {
    /// zstd's own, of the content, inside the frame. It says nothing of the frame's header.
    pub frame: bool,
    /// CRC-32C of all stored bytes, behind them.
    pub crc32c: bool,
}

/// One chunk that is encoded piece by piece. Made by [`Encoder::stream`].
#[derive(Debug)]
pub struct Stream<'a> {
    encoder: &'a mut Encoder,
    crc32c: u32,
    /// Bytes of elements announced, and given so far.
    expected: u64,
    given: u64,
}

/// Why elements cannot be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// There is no memory for the context or the output.
    #[error("no memory to encode a chunk")]
    NoMemory,
    /// The caller gave another number of element bytes than announced.
    #[error("given {found} bytes of elements, announced {expected}")]
    Input {
        /// Bytes announced.
        expected: u64,
        /// Bytes given.
        found: u64,
    },
    /// libzstd refused.
    #[error("zstd: {0}")]
    Zstd(String),
}

impl From<EncodeError> for crate::Error {
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::NoMemory => Self::new(crate::ErrorKind::OutOfMemory, error.to_string()),
            EncodeError::Input { .. } | EncodeError::Zstd(_) => Self::bug(error.to_string()),
        }
    }
}

impl Encoder {
    /// An encoder of chunks: the elements, or one zstd frame that states its content size; with these checksums.
    ///
    /// # Errors
    /// [`EncodeError::NoMemory`]. libzstd takes a level beyond its limits for the nearest it has.
    pub fn new(compression: Compression, checksums: Checksums) -> Result<Self, EncodeError> {
        let zstd = match compression {
            Compression::None => None,
            Compression::Zstd { level } => Some(Context::new(level, checksums.frame)?),
            Compression::Gpu => Some(Context::literals_only(checksums.frame)?),
        };
        Ok(Self { zstd, crc32c: checksums.crc32c })
    }

    /// Most bytes that a chunk of this many element bytes is encoded to.
    pub fn encoded_len_max(compression: Compression, len: usize) -> usize {
        match compression {
            Compression::None => len.saturating_add(CRC32C_BYTES),
            Compression::Zstd { .. } | Compression::Gpu => bound(len).saturating_add(CRC32C_BYTES),
        }
    }

    /// Memory that an encoder of chunks of this many element bytes holds beside its input and output, in bytes, by
    /// libzstd's own estimate. It is much less for small chunks.
    pub fn memory(compression: Compression, len: u64) -> u64 {
        match compression {
            Compression::None => 0,
            Compression::Zstd { level } => context::memory(level, len),
            Compression::Gpu => context::memory_literals_only(len),
        }
    }

    /// Appends what a whole chunk is encoded to.
    ///
    /// # Errors
    /// [`EncodeError`]; `out` then holds unspecified bytes behind those it had.
    pub fn encode(&mut self, elements: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match &mut self.zstd {
            Some(context) => {
                let start = out.len();
                context.begin(elements.len() as u64)?;
                context.end(elements, out)?;
                match self.crc32c {
                    true => push_crc32c(crc32c::crc32c(&out[start..]), out),
                    false => Ok(()),
                }
            }
            None => {
                let mut stream = self.stream(elements.len() as u64)?;
                stream.push(elements, out)?;
                stream.finish(out)
            }
        }
    }

    /// Starts a chunk of exactly this many element bytes, which are then pushed. A stream that was begun before is
    /// dropped.
    ///
    /// # Errors
    /// [`EncodeError::NoMemory`], [`EncodeError::Zstd`].
    pub fn stream(&mut self, len: u64) -> Result<Stream<'_>, EncodeError> {
        if let Some(context) = &mut self.zstd {
            context.begin(len)?;
        }
        Ok(Stream { encoder: self, crc32c: 0, expected: len, given: 0 })
    }
}

impl Stream<'_> {
    /// Takes the next element bytes, and appends what comes out.
    ///
    /// # Errors
    /// [`EncodeError::Input`] beyond what was announced, [`EncodeError::NoMemory`], [`EncodeError::Zstd`]. The stream
    /// must not be used any more.
    pub fn push(&mut self, elements: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.given = self.given.saturating_add(elements.len() as u64);
        if self.given > self.expected {
            return Err(EncodeError::Input { expected: self.expected, found: self.given });
        }
        let start = out.len();
        match &mut self.encoder.zstd {
            Some(context) => context.push(elements, out)?,
            None => {
                reserve(out, elements.len())?;
                out.extend_from_slice(elements);
            }
        }
        self.sum(&out[start..]);
        Ok(())
    }

    /// Appends the end of the chunk.
    ///
    /// # Errors
    /// [`EncodeError::Input`] short of what was announced, [`EncodeError::NoMemory`], [`EncodeError::Zstd`].
    pub fn finish(mut self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        if self.given != self.expected {
            return Err(EncodeError::Input { expected: self.expected, found: self.given });
        }
        if let Some(context) = &mut self.encoder.zstd {
            let start = out.len();
            context.end(&[], out)?;
            self.sum(&out[start..]);
        }
        match self.encoder.crc32c {
            true => push_crc32c(self.crc32c, out),
            false => Ok(()),
        }
    }

    fn sum(&mut self, stored: &[u8]) {
        if self.encoder.crc32c {
            self.crc32c = crc32c::crc32c_append(self.crc32c, stored);
        }
    }
}

fn push_crc32c(sum: u32, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    reserve(out, CRC32C_BYTES)?;
    out.extend_from_slice(&sum.to_le_bytes());
    Ok(())
}

/// Elements in memory form, in the form in which zarr stores them: truth values as 0 or 1, types below a byte in the low
/// bits with zeros above (in memory, signed integers are sign-extended). Borrowed where nothing is to be changed.
pub fn prepare(dtype: DType, elements: &[u8]) -> Cow<'_, [u8]> {
    let Some(stored) = stored_form(dtype) else { return Cow::Borrowed(elements) };
    if elements.iter().all(|&byte| stored(byte) == byte) {
        return Cow::Borrowed(elements);
    }
    Cow::Owned(elements.iter().map(|&byte| stored(byte)).collect())
}

/// The same in place.
pub fn prepare_in_place(dtype: DType, elements: &mut [u8]) {
    if let Some(stored) = stored_form(dtype) {
        elements.iter_mut().for_each(|byte| *byte = stored(*byte));
    }
}

/// Elements of one byte in the low bits of each, one after the other without gaps: the first stands in the lowest bits of the
/// first byte. A last byte that is not full has zeros above. The reverse of decoding `ByteCodec::Packed`.
pub fn pack(bits: u32, elements: &[u8]) -> Vec<u8> {
    let bits = bits.clamp(1, 8);
    let mut packed = Vec::with_capacity((elements.len() * bits as usize).div_ceil(8));
    let (mut held, mut held_bits) = (0_u32, 0);
    for element in elements {
        held |= (u32::from(*element) & ((1 << bits) - 1)) << held_bits;
        held_bits += bits;
        while held_bits >= 8 {
            packed.push((held & 0xff) as u8);
            held >>= 8;
            held_bits -= 8;
        }
    }
    if held_bits > 0 {
        packed.push((held & 0xff) as u8);
    }
    packed
}

/// What becomes of an element of one byte; `None` for types whose bytes are stored as they are.
fn stored_form(dtype: DType) -> Option<fn(u8) -> u8> {
    match (dtype.class(), dtype) {
        (Class::Bool, _) => Some(|byte| u8::from(byte != 0)),
        (Class::Int(2) | Class::UInt(2), _) => Some(|byte| byte & 0x03),
        (Class::Int(4) | Class::UInt(4), _) | (_, DType::Float4E2M1FN) => Some(|byte| byte & 0x0f),
        (_, DType::Float6E2M3FN | DType::Float6E3M2FN) => Some(|byte| byte & 0x3f),
        _ => None,
    }
}

const CRC32C_BYTES: usize = 4;

#[cfg(test)]
mod tests;
