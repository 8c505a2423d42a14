//! gzip members and zlib streams, both around deflate.
//!
//! Sources: RFC 1952 (gzip; members may follow one another), RFC 1950 (zlib; nothing may follow).

use flate2::{Crc, Decompress, FlushDecompress, Status};

use super::{DecodeError, Decoder, Step};

/// Decodes gzip members until the input ends.
pub(super) struct Gzip {
    deflate: Decompress,
    checksum: Crc,
    state: State,
    /// Members that are complete.
    members: u64,
}

/// Where in a member the next byte belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Byte `at` of the fixed header.
    Fixed {
        at: u8,
        flags: u8,
    },
    /// The low, then the high byte of the extra field's length.
    ExtraLow {
        flags: u8,
    },
    ExtraHigh {
        flags: u8,
        low: u8,
    },
    /// The extra field.
    Extra {
        flags: u8,
        left: u16,
    },
    /// File name, then comment: text that ends with 0.
    Name {
        flags: u8,
    },
    Comment {
        flags: u8,
    },
    /// The checksum of the header.
    HeaderChecksum {
        left: u8,
    },
    Deflate,
    /// CRC-32 and length modulo 2^32, both u32 little-endian.
    Trailer {
        at: u8,
        value: u64,
    },
}

impl Gzip {
    pub(super) fn new() -> Self {
        Self { deflate: Decompress::new(false), checksum: Crc::new(), state: State::START, members: 0 }
    }

    /// Takes one byte of the trailer.
    fn trailer(&mut self, at: u8, value: u64, byte: u8) -> Result<State, DecodeError> {
        let value = value | u64::from(byte) << (8 * at);
        if at < 7 {
            return Ok(State::Trailer { at: at + 1, value });
        }
        let computed = u64::from(self.checksum.amount()) << 32 | u64::from(self.checksum.sum());
        if value != computed {
            return Err(damaged(GZIP, "checksum or length does not fit"));
        }
        self.members += 1;
        self.deflate.reset(false);
        self.checksum.reset();
        Ok(State::START)
    }
}

impl State {
    const START: Self = Self::Fixed { at: 0, flags: 0 };

    /// Takes one byte of a header.
    fn header(self, byte: u8) -> Result<Self, DecodeError> {
        Ok(match self {
            Self::Fixed { at, flags } => match (at, byte) {
                (0, 0x1f) | (1, 0x8b) | (2, 8) => Self::Fixed { at: at + 1, flags },
                (0..=2, _) => return Err(damaged(GZIP, "no gzip header")),
                (3, flags) if flags & 0xe0 != 0 => return Err(damaged(GZIP, "unknown header flags")),
                (3, flags) => Self::Fixed { at: at + 1, flags },
                (9.., _) if flags & EXTRA != 0 => Self::ExtraLow { flags },
                (9.., _) => Self::after_extra(flags),
                _ => Self::Fixed { at: at + 1, flags },
            },
            Self::ExtraLow { flags } => Self::ExtraHigh { flags, low: byte },
            Self::ExtraHigh { flags, low } => match u16::from_le_bytes([low, byte]) {
                0 => Self::after_extra(flags),
                left => Self::Extra { flags, left },
            },
            Self::Extra { flags, left: 0 | 1 } => Self::after_extra(flags),
            Self::Extra { flags, left } => Self::Extra { flags, left: left - 1 },
            Self::Name { flags } if byte == 0 => Self::after_name(flags),
            Self::Comment { flags } if byte == 0 => Self::after_comment(flags),
            Self::HeaderChecksum { left: 0 | 1 } => Self::Deflate,
            Self::HeaderChecksum { left } => Self::HeaderChecksum { left: left - 1 },
            unchanged => unchanged,
        })
    }

    const fn after_extra(flags: u8) -> Self {
        if flags & NAME != 0 { Self::Name { flags } } else { Self::after_name(flags) }
    }

    const fn after_name(flags: u8) -> Self {
        if flags & COMMENT != 0 { Self::Comment { flags } } else { Self::after_comment(flags) }
    }

    const fn after_comment(flags: u8) -> Self {
        if flags & HEADER_CHECKSUM != 0 { Self::HeaderChecksum { left: 2 } } else { Self::Deflate }
    }
}

impl Decoder for Gzip {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let mut read = 0;
        while self.state != State::Deflate {
            let Some(&byte) = input.get(read) else {
                return Ok(Step { read, written: 0 });
            };
            self.state = match self.state {
                State::Trailer { at, value } => self.trailer(at, value, byte)?,
                header => header.header(byte)?,
            };
            read += 1;
        }
        let (step, ended) = inflate(&mut self.deflate, input.get(read..).unwrap_or_default(), output, GZIP)?;
        self.checksum.update(output.get(..step.written).unwrap_or_default());
        if ended {
            self.state = State::Trailer { at: 0, value: 0 };
        }
        Ok(Step { read: read + step.read, written: step.written })
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        let complete = self.state == State::START && self.members > 0;
        if complete { Ok(()) } else { Err(DecodeError::Truncated { codec: GZIP }) }
    }
}

/// Decodes one zlib stream.
pub(super) struct Zlib {
    deflate: Decompress,
    ended: bool,
}

impl Zlib {
    pub(super) fn new() -> Self {
        Self { deflate: Decompress::new(true), ended: false }
    }
}

impl Decoder for Zlib {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        if self.ended {
            return if input.is_empty() { Ok(Step::default()) } else { Err(damaged(ZLIB, "bytes behind its end")) };
        }
        let (step, ended) = inflate(&mut self.deflate, input, output, ZLIB)?;
        self.ended = ended;
        Ok(step)
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        if self.ended { Ok(()) } else { Err(DecodeError::Truncated { codec: ZLIB }) }
    }
}

/// Decodes a whole zlib stream into the front of `out`. For containers that have streams inside.
#[cfg(feature = "blosc")]
pub(super) fn decode_inner(encoded: &[u8], out: &mut [u8]) -> Result<usize, DecodeError> {
    let (mut zlib, mut total) = (Zlib::new(), Step::default());
    loop {
        let input = encoded.get(total.read..).unwrap_or_default();
        // Behind the end of the output there is one byte more, into which nothing may be written.
        let mut behind = [0];
        let room = out.get_mut(total.written..).filter(|room| !room.is_empty()).unwrap_or(&mut behind);
        let step = zlib.step(input, room)?;
        total.read += step.read;
        total.written += step.written;
        if total.written > out.len() {
            return Err(damaged(ZLIB, "longer than its container says"));
        }
        if zlib.ended {
            return Ok(total.written);
        }
        if step == Step::default() {
            return Err(DecodeError::Truncated { codec: ZLIB });
        }
    }
}

/// One call of inflate: what it did, and whether the stream ended.
fn inflate(
    deflate: &mut Decompress,
    input: &[u8],
    output: &mut [u8],
    codec: &'static str,
) -> Result<(Step, bool), DecodeError> {
    let (read, written) = (deflate.total_in(), deflate.total_out());
    let status = deflate
        .decompress(input, output, FlushDecompress::None)
        .map_err(|error| DecodeError::Corrupt { codec, what: error.to_string() })?;
    // Both are at most the lengths of the slices.
    let used = |total: u64, before: u64| usize::try_from(total.wrapping_sub(before)).unwrap_or_default();
    let step = Step { read: used(deflate.total_in(), read), written: used(deflate.total_out(), written) };
    Ok((step, status == Status::StreamEnd))
}

fn damaged(codec: &'static str, what: &str) -> DecodeError {
    DecodeError::Corrupt { codec, what: what.to_owned() }
}

const GZIP: &str = "gzip";

const ZLIB: &str = "zlib";

const HEADER_CHECKSUM: u8 = 2;

const EXTRA: u8 = 4;

const NAME: u8 = 8;

const COMMENT: u8 = 16;
