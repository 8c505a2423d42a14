//! Stored bytes to element bytes: decompression and checksums.
//!
//! A [`Decoder`] is fed pieces of a stored value and writes into output that the caller gives, so that a chunk of any
//! size passes through buffers of a fixed size. [`decoder`] builds one for a codec chain and [`cost`] tells the planner
//! what it holds in memory. A value that is in memory whole is decoded faster by [`decode_all`].
//!
//! ```text
//!   encoded pieces -> Exact( Pipe( crc32c -> 64 KiB -> zstd ) ) -> the caller's output
//!                     lengths      one stage a codec, last codec first
//! ```
//!
//! What a header claims never decides how much is allocated: the caller's `decoded_len` does.
//!
//! Must not know: arrays, files, devices.

#[cfg(feature = "blosc")]
mod blosc;
#[cfg(feature = "blosc")]
mod blosclz;
#[cfg(feature = "bz2")]
mod bz2;
mod crc32c;
#[cfg(feature = "gzip")]
mod gzip;
#[cfg(any(test, target_arch = "x86_64"))]
mod huff;
mod packed;
mod pipe;
mod raw;
#[cfg(feature = "blosc")]
mod shuffle;
mod zstd;

use crate::limits::{CODEC_CHAIN_MAX, WINDOWS_PER_BUDGET, ZSTD_WINDOW_LOG_MAX};
use crate::zarr::ByteCodec;

/// What one call of [`Decoder::step`] did, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Bytes taken from the front of the input.
    pub read: usize,
    /// Bytes written to the front of the output.
    pub written: usize,
}

/// Decodes one value piece by piece.
///
/// The caller gives pieces of any size in order, and calls [`step`](Self::step) until all input was taken and all output
/// was written, then [`finish`](Self::finish).
pub trait Decoder: Send {
    /// Decodes from `input` into `output` and says how much of each was used.
    ///
    /// Makes progress while there is room in the output and either input or output held inside. Empty input asks for
    /// what is held inside; `Step::default()` then says that nothing is.
    ///
    /// # Errors
    /// [`DecodeError`]. A decoder that failed must not be used again.
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError>;

    /// Checks what can only be checked at the end: lengths, the end of frames, checksums.
    ///
    /// # Errors
    /// [`DecodeError`]; the output must then not be used.
    fn finish(&mut self) -> Result<(), DecodeError>;
}

/// What a decoder needs, for the planner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Most bytes of memory that it holds inside, beyond the pieces of input and output that it is given.
    pub working_bytes: u64,
    /// Whether it writes output while input still arrives. One that does not holds the whole of both.
    pub streams: bool,
}

/// Why bytes cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The codec is known, but this build does not have it.
    #[error("codec {codec} is not part of this build")]
    NotBuilt {
        /// The codec.
        codec: &'static str,
        /// The cargo feature that brings it.
        feature: &'static str,
    },
    /// The data is well formed, but uses something that is not read.
    #[error("{codec} data with {what} is not read")]
    Unsupported {
        /// The codec.
        codec: &'static str,
        /// What it uses.
        what: String,
    },
    /// The data contradicts its format.
    #[error("{codec} data is damaged: {what}")]
    Corrupt {
        /// The codec.
        codec: &'static str,
        /// How.
        what: String,
    },
    /// The data stops before its end.
    #[error("{codec} data ends too early")]
    Truncated {
        /// The codec.
        codec: &'static str,
    },
    /// A CRC-32C does not fit its bytes.
    #[error("crc32c is {computed:#010x}, stored is {stored:#010x}")]
    Checksum {
        /// From behind the bytes.
        stored: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// The data decodes to fewer bytes than it must.
    #[error("decodes to {found} bytes, expected {expected}")]
    Short {
        /// Bytes that it must decode to.
        expected: u64,
        /// Bytes that it decodes to.
        found: u64,
    },
    /// The data decodes to more bytes than it must.
    #[error("decodes to at least {found} bytes, expected {expected}")]
    Long {
        /// Bytes that it must decode to.
        expected: u64,
        /// Bytes that it decodes to, or one more than expected where decoding stopped there.
        found: u64,
    },
    /// The caller gave another number of encoded bytes than announced.
    #[error("given {found} encoded bytes, announced {expected}")]
    Input {
        /// Bytes announced.
        expected: u64,
        /// Bytes given so far.
        found: u64,
    },
    /// A zstd frame whose window is larger than the decoder may hold.
    #[error("zstd data needs a window of {needed} bytes, {allowed} are allowed")]
    Window {
        /// Bytes of the window.
        needed: u64,
        /// Bytes that the decoder was given.
        allowed: u64,
    },
    /// More codecs than [`CODEC_CHAIN_MAX`].
    #[error("a chain of {0} codecs, at most {CODEC_CHAIN_MAX} are decoded")]
    Chain(usize),
    /// There is no memory for the decoder.
    #[error("no memory for a decoder of {codec} data")]
    NoMemory {
        /// The codec.
        codec: &'static str,
    },
}

impl From<DecodeError> for crate::Error {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::NotBuilt { feature, .. } => Self::unsupported(error.to_string())
                .hint(format_args!("build touchdown with the cargo feature `{feature}`")),
            DecodeError::Unsupported { .. } | DecodeError::Chain(_) => Self::unsupported(error.to_string()),
            DecodeError::Input { .. } => Self::bug(error.to_string()),
            DecodeError::Window { needed, .. } => {
                let memory = needed.saturating_mul(WINDOWS_PER_BUDGET);
                Self::new(crate::ErrorKind::Budget, error.to_string())
                    .hint(format_args!("give `--memory {memory}` or more"))
            }
            DecodeError::NoMemory { .. } => Self::new(crate::ErrorKind::OutOfMemory, error.to_string()),
            _ => Self::corrupt(error.to_string()),
        }
    }
}

/// Checks that this build can decode a chain, without decoding anything.
///
/// # Errors
/// [`DecodeError::NotBuilt`] for the first codec whose feature is off, [`DecodeError::Chain`] for too many codecs.
pub fn check(chain: &[ByteCodec]) -> Result<(), DecodeError> {
    if chain.len() > CODEC_CHAIN_MAX {
        return Err(DecodeError::Chain(chain.len()));
    }
    chain.iter().try_for_each(|codec| match feature(*codec) {
        Some((feature, false)) => Err(DecodeError::NotBuilt { codec: codec.name(), feature }),
        _ => Ok(()),
    })
}

/// A decoder of a value of exactly `encoded_len` bytes into exactly `decoded_len` bytes.
///
/// `verify` says whether the `crc32c` codec is checked; checksums inside compressed data always are. A zstd frame that needs
/// a window of more than `window_max` bytes is refused when its header is read. Nothing but the decoder's own state is
/// allocated here; see [`cost`].
///
/// # Errors
/// As [`check`]; [`DecodeError::NoMemory`].
pub fn decoder(
    chain: &[ByteCodec],
    encoded_len: u64,
    decoded_len: u64,
    verify: bool,
    window_max: u64,
) -> Result<Box<dyn Decoder>, DecodeError> {
    check(chain)?;
    let mut stages: Option<Box<dyn Decoder>> = None;
    for (index, codec) in chain.iter().enumerate().rev() {
        let limits = Limits::of(chain, index, encoded_len, decoded_len);
        let stage = stage(*codec, limits, verify, window_max)?;
        stages = Some(match stages {
            None => stage,
            Some(before) => Box::new(pipe::Pipe::new(before, stage)),
        });
    }
    let stages = stages.unwrap_or_else(|| Box::new(raw::Raw));
    Ok(Box::new(pipe::Exact::new(stages, encoded_len, decoded_len)))
}

/// What [`decode_all`] holds in memory at most, beside what is stored and what it writes, if it decodes values of this chain
/// faster than a [`Decoder`] does.
pub fn whole_working_bytes(chain: &[ByteCodec]) -> Option<u64> {
    matches!(chain, [ByteCodec::Zstd] | [ByteCodec::Zstd, ByteCodec::Crc32c]).then_some(zstd::WHOLE_BYTES)
}

/// What a decoder of such a value holds in memory, as an upper bound in bytes.
///
/// Codecs that this build lacks cost as if it had them. [`decode_all`] never holds more.
pub fn cost(chain: &[ByteCodec], encoded_len: u64, decoded_len: u64, window_max: u64) -> Cost {
    let pipes = chain.len().saturating_sub(1) as u64 * pipe::BUFFER_BYTES as u64;
    let mut total = Cost { working_bytes: STATE_BYTES.saturating_add(pipes), streams: true };
    for (index, codec) in chain.iter().enumerate() {
        let Limits { encoded, decoded } = Limits::of(chain, index, encoded_len, decoded_len);
        let bytes = match codec {
            ByteCodec::Zstd => zstd::working_bytes(decoded, window_max),
            ByteCodec::Gzip | ByteCodec::Zlib => GZIP_BYTES,
            ByteCodec::Bz2 => BZ2_BYTES,
            ByteCodec::Crc32c | ByteCodec::Packed { .. } => 0,
            // The whole container, one block and that block before unshuffling; a block may be everything.
            ByteCodec::Blosc => {
                encoded.saturating_add(decoded.at_most().saturating_mul(2)).saturating_add(zstd::CONTEXT_BYTES)
            }
        };
        total.working_bytes = total.working_bytes.saturating_add(bytes);
        total.streams &= *codec != ByteCodec::Blosc;
    }
    total
}

/// The elements of a value that is stored as they are, with nothing but checksums behind them; `None` for other chains.
///
/// # Errors
/// [`DecodeError`]: a checksum that is wrong or missing.
pub fn plain<'v>(chain: &[ByteCodec], encoded: &'v [u8], verify: bool) -> Result<Option<&'v [u8]>, DecodeError> {
    if chain.iter().any(|codec| *codec != ByteCodec::Crc32c) {
        return Ok(None);
    }
    check(chain)?;
    stripped(chain, encoded, verify).map(|(_, body)| Some(body))
}

/// A value without its trailing checksums, which are checked in place, and the codecs that are left.
fn stripped<'c, 'v>(
    chain: &'c [ByteCodec],
    encoded: &'v [u8],
    verify: bool,
) -> Result<(&'c [ByteCodec], &'v [u8]), DecodeError> {
    let (mut rest, mut body) = (chain, encoded);
    while let [before @ .., ByteCodec::Crc32c] = rest {
        body = crc32c::strip(body, verify)?;
        rest = before;
    }
    Ok((rest, body))
}

/// Decodes a whole value into the whole of `out`.
///
/// The fast path: trailing checksums are checked in place and a single zstd frame or blosc container is decoded straight
/// into `out` with a context that the thread keeps (about 160 KiB); a frame of large blocks without sequences is decoded
/// faster than libzstd does it, with 30 KiB of stack. Other chains run through a [`decoder`].
///
/// # Errors
/// [`DecodeError`]; `out` then holds unspecified bytes.
pub fn decode_all(chain: &[ByteCodec], encoded: &[u8], out: &mut [u8], verify: bool) -> Result<(), DecodeError> {
    check(chain)?;
    let (rest, body) = stripped(chain, encoded, verify)?;
    match rest {
        [] => raw::copy(body, out),
        [ByteCodec::Zstd] => zstd::decode_into(body, out),
        #[cfg(feature = "blosc")]
        [ByteCodec::Blosc] => blosc::decode_into(body, out),
        _ => {
            let mut decoder = decoder(rest, body.len() as u64, out.len() as u64, verify, ZSTD_WINDOW_MAX)?;
            pipe::run(decoder.as_mut(), body, out)
        }
    }
}

/// How many bytes one codec of a chain decodes from and to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    /// Most encoded bytes.
    encoded: u64,
    decoded: DecodedLen,
}

/// What is known of the length that one codec of a chain decodes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DecodedLen {
    /// Only checksums follow: exactly this many bytes.
    Exactly(u64),
    /// Another decompressor follows.
    AtMost(u64),
}

impl DecodedLen {
    const fn at_most(self) -> u64 {
        match self {
            Self::Exactly(len) | Self::AtMost(len) => len,
        }
    }

    /// Checks a length that a header claims.
    fn check(self, claimed: u64) -> Result<(), DecodeError> {
        match self {
            Self::Exactly(expected) if claimed < expected => Err(DecodeError::Short { expected, found: claimed }),
            Self::Exactly(expected) | Self::AtMost(expected) if claimed > expected => {
                Err(DecodeError::Long { expected, found: claimed })
            }
            _ => Ok(()),
        }
    }
}

impl Limits {
    /// Lengths around the codec at `index` of a chain. Data between two compressors may be at most twice the decoded
    /// length and 1 MiB: no compressor expands by more.
    fn of(chain: &[ByteCodec], index: usize, encoded_len: u64, decoded_len: u64) -> Self {
        let (before, from) = chain.split_at_checked(index).unwrap_or((chain, &[]));
        let is_checksum = |codec: &ByteCodec| *codec == ByteCodec::Crc32c;
        let checksums = 4 * before.iter().filter(|codec| is_checksum(codec)).count() as u64;
        let between = decoded_len.saturating_mul(2).saturating_add(BETWEEN_BYTES);
        let only_checksums = before.iter().all(is_checksum);
        let decoded = if only_checksums {
            DecodedLen::Exactly(decoded_len.saturating_add(checksums))
        } else {
            DecodedLen::AtMost(between)
        };
        let outermost = from.iter().skip(1).all(is_checksum);
        Self { encoded: if outermost { encoded_len } else { between }, decoded }
    }
}

/// The decoder of one codec.
fn stage(codec: ByteCodec, limits: Limits, verify: bool, window_max: u64) -> Result<Box<dyn Decoder>, DecodeError> {
    Ok(match codec {
        ByteCodec::Zstd => Box::new(zstd::Zstd::new(limits.decoded, window_max)?),
        ByteCodec::Crc32c => Box::new(crc32c::Crc32c::new(verify)),
        ByteCodec::Packed { bits } => Box::new(packed::Packed::new(bits)),
        #[cfg(feature = "gzip")]
        ByteCodec::Gzip => Box::new(gzip::Gzip::new()),
        #[cfg(feature = "gzip")]
        ByteCodec::Zlib => Box::new(gzip::Zlib::new()),
        #[cfg(feature = "bz2")]
        ByteCodec::Bz2 => Box::new(bz2::Bz2::new()),
        #[cfg(feature = "blosc")]
        ByteCodec::Blosc => Box::new(blosc::Blosc::new(limits)),
        #[cfg(not(all(feature = "gzip", feature = "bz2", feature = "blosc")))]
        _ => {
            let (feature, _) = feature(codec).unwrap_or_default();
            return Err(DecodeError::NotBuilt { codec: codec.name(), feature });
        }
    })
}

/// The cargo feature that brings a codec and whether it is on; `None` for what is always there.
const fn feature(codec: ByteCodec) -> Option<(&'static str, bool)> {
    match codec {
        ByteCodec::Zstd | ByteCodec::Crc32c | ByteCodec::Packed { .. } => None,
        ByteCodec::Gzip | ByteCodec::Zlib => Some(("gzip", cfg!(feature = "gzip"))),
        ByteCodec::Bz2 => Some(("bz2", cfg!(feature = "bz2"))),
        ByteCodec::Blosc => Some(("blosc", cfg!(feature = "blosc"))),
    }
}

/// Largest window of a zstd frame in bytes.
const ZSTD_WINDOW_MAX: u64 = 1 << ZSTD_WINDOW_LOG_MAX;

/// The state of any decoder besides its buffers.
const STATE_BYTES: u64 = 16 << 10;

/// Inflate's 32 KiB window and tables.
const GZIP_BYTES: u64 = 64 << 10;

/// bzip2's largest block of 900,000 bytes as u32, and tables.
const BZ2_BYTES: u64 = 4 << 20;

/// What data between two compressors may have beyond twice the decoded length.
const BETWEEN_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests;
