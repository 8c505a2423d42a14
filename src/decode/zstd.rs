//! zstd: one frame, and whatever follows it is ignored, as TensorStore does.
//!
//! Source: RFC 8878, section 3.1.1. The frame's header is read here before libzstd sees it, so that lengths, windows and
//! dictionaries are refused by name and no header makes libzstd allocate more than the output needs.

use std::cell::RefCell;

use zstd::zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer};

#[cfg(any(test, target_arch = "x86_64"))]
use super::huff;
use super::{DecodeError, DecodedLen, Decoder, Step, ZSTD_WINDOW_MAX};
use crate::limits::{HUFFMAN_SHARED_SEQUENCES_MAX, ZSTD_WINDOW_LOG_MAX};

/// Decodes one frame.
pub(super) struct Zstd {
    context: DCtx<'static>,
    decoded_len: DecodedLen,
    /// The largest window that it may hold.
    window_max: u64,
    head: [u8; HEADER_BYTES_MAX],
    head_len: usize,
    state: State,
    /// Whether libzstd may hold output: the last call filled all the room it had.
    holds: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Gathering the header.
    Header,
    Frame,
    /// The frame is complete: what follows is ignored.
    End,
}

impl Zstd {
    pub(super) fn new(decoded_len: DecodedLen, window_max: u64) -> Result<Self, DecodeError> {
        let mut context = DCtx::try_create().ok_or(DecodeError::NoMemory { codec: CODEC })?;
        context.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX)).map_err(corrupt)?;
        Ok(Self {
            context,
            decoded_len,
            window_max,
            head: [0; HEADER_BYTES_MAX],
            head_len: 0,
            state: State::Header,
            holds: false,
        })
    }

    /// Takes bytes until the header is complete, then gives it to libzstd. Returns how many were taken.
    fn header(&mut self, input: &[u8]) -> Result<usize, DecodeError> {
        for (taken, byte) in input.iter().enumerate() {
            if let Some(slot) = self.head.get_mut(self.head_len) {
                *slot = *byte;
                self.head_len += 1;
            }
            let head = self.head.get_mut(..self.head_len).unwrap_or_default();
            if let Some(header) = Header::parse(head)? {
                header.check(self.decoded_len)?;
                // Never more than reaches over all of the output, see `shrink_window`; libzstd does the same by itself where
                // the header states the content size.
                let needed = header.window_size.min(window_needed(self.decoded_len));
                if needed > self.window_max {
                    return Err(DecodeError::Window { needed, allowed: self.window_max });
                }
                header.shrink_window(head, self.decoded_len);
                self.state = State::Frame;
                let (mut source, mut target) = (InBuffer::around(head), OutBuffer::around(&mut [] as &mut [u8]));
                self.context.decompress_stream(&mut target, &mut source).map_err(corrupt)?;
                if source.pos() < head.len() {
                    return Err(DecodeError::Corrupt { codec: CODEC, what: "the frame has no block".to_owned() });
                }
                return Ok(taken + 1);
            }
        }
        Ok(input.len())
    }
}

impl Decoder for Zstd {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        match self.state {
            State::End => Ok(Step { read: input.len(), written: 0 }),
            State::Header => Ok(Step { read: self.header(input)?, written: 0 }),
            // libzstd takes repeated calls without progress for a caller's error.
            State::Frame if output.is_empty() || (input.is_empty() && !self.holds) => Ok(Step::default()),
            State::Frame => {
                let room = output.len();
                let (mut source, mut target) = (InBuffer::around(input), OutBuffer::around(output));
                let hint = self.context.decompress_stream(&mut target, &mut source).map_err(corrupt)?;
                let step = Step { read: source.pos(), written: target.pos() };
                self.holds = step.written == room;
                if hint == 0 {
                    self.state = State::End;
                }
                Ok(step)
            }
        }
    }

    fn finish(&mut self) -> Result<(), DecodeError> {
        if self.state == State::End { Ok(()) } else { Err(DecodeError::Truncated { codec: CODEC }) }
    }
}

/// Decodes one frame straight into the whole of `out`: here, if it is of the kind that is decoded faster so, or else by
/// libzstd, whose errors count.
pub(super) fn decode_into(encoded: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let (header, frame) = Header::of_whole(encoded, out.len() as u64)?;
    #[cfg(target_arch = "x86_64")]
    if huff::decode(header.literals(frame), out).is_some() {
        return Ok(());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = header;
    decompress(frame, out)
}

/// Decodes one frame straight into the whole of `out`, with a context that the thread keeps.
pub(super) fn decompress(frame: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let expected = out.len() as u64;
    let written = with_context(|context| context.decompress(out, frame))?.map_err(|code| match code {
        DESTINATION_TOO_SMALL => DecodeError::Long { expected, found: expected.saturating_add(1) },
        _ => corrupt(code),
    })?;
    DecodedLen::Exactly(expected).check(written as u64)
}

/// Decodes frames as libzstd does, into the front of `out`. For containers that have frames inside.
#[cfg(feature = "blosc")]
pub(super) fn decode_inner(encoded: &[u8], out: &mut [u8]) -> Result<usize, DecodeError> {
    with_context(|context| context.decompress(out, encoded))?.map_err(corrupt)
}

/// Most bytes that a decoder holds to decode this many bytes: the window, two blocks, and libzstd's state.
pub(super) fn working_bytes(decoded_len: DecodedLen, window_max: u64) -> u64 {
    window_needed(decoded_len).min(window_max).saturating_add(CONTEXT_BYTES)
}

/// Runs with the context of this thread, which holds no window because it only decodes in one go.
fn with_context<T>(run: impl FnOnce(&mut DCtx<'static>) -> T) -> Result<T, DecodeError> {
    thread_local! {
        static CONTEXT: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = DCtx::try_create();
        }
        slot.as_mut().map(run).ok_or(DecodeError::NoMemory { codec: CODEC })
    })
}

/// What a frame's header says.
///
/// | bytes | field |
/// |---|---|
/// | 4 | magic number 0xFD2FB528, little-endian |
/// | 1 | descriptor: bits 7-6 size of the content size, 5 single segment, 3 reserved, 2 checksum, 1-0 size of the dictionary id |
/// | 0-1 | window descriptor, unless single segment: bits 7-3 exponent, 2-0 mantissa |
/// | 0-4 | dictionary id |
/// | 0-8 | content size |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    content_size: Option<u64>,
    window_size: u64,
    has_window_descriptor: bool,
    has_checksum: bool,
    dictionary_id: u32,
    /// Bytes of the header itself.
    len: usize,
}

impl Header {
    /// The header of the frame at the front of what is encoded, and that frame, which must decode to so many bytes as far as
    /// headers tell.
    pub(super) fn of_whole(encoded: &[u8], decoded_len: u64) -> Result<(Self, &[u8]), DecodeError> {
        let header = Self::parse(encoded)?.ok_or(DecodeError::Truncated { codec: CODEC })?;
        header.check(DecodedLen::Exactly(decoded_len))?;
        let len =
            zstd_safe::find_frame_compressed_size(encoded).map_err(|_| DecodeError::Truncated { codec: CODEC })?;
        let frame = encoded.get(..len).ok_or(DecodeError::Truncated { codec: CODEC })?;
        Ok((header, frame))
    }

    /// Reads a header from the front of a frame, or says `None` when there are too few bytes.
    fn parse(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let Some((magic, rest)) = bytes.split_first_chunk::<4>() else {
            return Ok(None);
        };
        match u32::from_le_bytes(*magic) {
            MAGIC => {}
            SKIPPABLE_FIRST..=SKIPPABLE_LAST => {
                return Err(DecodeError::Unsupported { codec: CODEC, what: "a skippable frame".to_owned() });
            }
            other => {
                let what = format!("it starts with {other:#010x}, expected {MAGIC:#010x}");
                return Err(DecodeError::Corrupt { codec: CODEC, what });
            }
        }
        let Some((&descriptor, rest)) = rest.split_first() else {
            return Ok(None);
        };
        if descriptor & 0b1000 != 0 {
            return Err(DecodeError::Unsupported { codec: CODEC, what: "a reserved bit".to_owned() });
        }
        let single_segment = descriptor & 0b10_0000 != 0;
        let dictionary_bytes = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let content_bytes = match descriptor >> 6 {
            0 => usize::from(single_segment),
            power => 1 << power,
        };
        let (window, rest) = match (single_segment, rest.split_first()) {
            (true, _) => (None, rest),
            (false, Some((window, rest))) => (Some(*window), rest),
            (false, None) => return Ok(None),
        };
        let Some((dictionary, rest)) = rest.split_at_checked(dictionary_bytes) else {
            return Ok(None);
        };
        let Some(content) = rest.get(..content_bytes) else {
            return Ok(None);
        };
        let little_endian = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let content_size = match content_bytes {
            0 => None,
            // Sizes of two bytes start at 256, because smaller ones fit in one.
            2 => Some(little_endian(content) + 256),
            _ => Some(little_endian(content)),
        };
        let window_size = match window {
            None => content_size.unwrap_or_default(),
            Some(window) => {
                let base = 1u64 << (10 + (window >> 3));
                base + base / 8 * u64::from(window & 7)
            }
        };
        let dictionary_id = u32::try_from(little_endian(dictionary)).unwrap_or_default();
        Ok(Some(Self {
            content_size,
            window_size,
            has_window_descriptor: window.is_some(),
            has_checksum: descriptor & 0b100 != 0,
            dictionary_id,
            len: bytes.len() - rest.len() + content_bytes,
        }))
    }

    /// The frame with this header as [`huff`] takes it.
    #[cfg(any(test, target_arch = "x86_64"))]
    pub(super) fn literals<'a>(&self, frame: &'a [u8]) -> huff::Frame<'a> {
        let block_max = usize::try_from(self.window_size.min(BLOCK_BYTES_MAX)).unwrap_or_default();
        huff::Frame { bytes: frame, header_len: self.len, block_max, has_checksum: self.has_checksum }
    }

    fn check(&self, decoded_len: DecodedLen) -> Result<(), DecodeError> {
        let unsupported = |what| Err(DecodeError::Unsupported { codec: CODEC, what });
        if self.dictionary_id != 0 {
            return unsupported(format!("dictionary {}", self.dictionary_id));
        }
        if let Some(content_size) = self.content_size {
            decoded_len.check(content_size)?;
        }
        if self.window_size > ZSTD_WINDOW_MAX {
            return unsupported(format!("a window of {} bytes (at most {ZSTD_WINDOW_MAX})", self.window_size));
        }
        Ok(())
    }

    /// Rewrites the window descriptor of a header to a window just large enough for all of the output. Matches cannot
    /// reach farther back than that, and libzstd allocates by the window when the content size is not stated.
    fn shrink_window(&self, head: &mut [u8], decoded_len: DecodedLen) {
        let needed = window_needed(decoded_len);
        if self.has_window_descriptor
            && self.content_size.is_none()
            && self.window_size > needed
            && let Some(descriptor) = head.get_mut(WINDOW_DESCRIPTOR_AT)
        {
            // A power of two, so the mantissa is 0.
            *descriptor = u8::try_from(needed.trailing_zeros().saturating_sub(10) << 3).unwrap_or(*descriptor);
        }
    }
}

/// The window that reaches over all of the output: a power of two, and not below the largest block.
fn window_needed(decoded_len: DecodedLen) -> u64 {
    decoded_len.at_most().min(ZSTD_WINDOW_MAX).next_power_of_two().max(BLOCK_BYTES_MAX)
}

fn corrupt(code: usize) -> DecodeError {
    DecodeError::Corrupt { codec: CODEC, what: zstd_safe::get_error_name(code).to_owned() }
}

const CODEC: &str = "zstd";

const MAGIC: u32 = 0xfd2f_b528;

const SKIPPABLE_FIRST: u32 = 0x184d_2a50;

const SKIPPABLE_LAST: u32 = 0x184d_2a5f;

const WINDOW_DESCRIPTOR_AT: usize = 5;

/// Magic number, descriptor, window descriptor, dictionary id and content size.
const HEADER_BYTES_MAX: usize = 18;

/// The largest block that the format allows.
const BLOCK_BYTES_MAX: u64 = 128 << 10;

/// libzstd 1.5: 96 KiB of tables and buffers, one block of input and two blocks behind the window.
pub(super) const CONTEXT_BYTES: u64 = 640 << 10;

/// The same beside what `huff` holds: sequences of a large frame, its blocks, and the buffers of a group in the hands of each
/// thread.
pub(super) const WHOLE_BYTES: u64 = CONTEXT_BYTES + 12 * HUFFMAN_SHARED_SEQUENCES_MAX as u64 + (2 << 20);

/// `ZSTD_error_dstSize_tooSmall` as libzstd returns it.
const DESTINATION_TOO_SMALL: usize = 0usize.wrapping_sub(70);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::pipe::{Exact, run};
    use std::io::Write;

    /// A frame of `len` zeros by a writer that does not state the size, with a window of `1 << window_log`.
    fn frame(len: usize, window_log: u32, content_size: bool) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        encoder.include_contentsize(content_size).unwrap();
        if content_size {
            encoder.set_pledged_src_size(Some(len as u64)).unwrap();
        }
        for piece in vec![0; len].chunks(1000) {
            encoder.write_all(piece).unwrap();
        }
        encoder.finish().unwrap()
    }

    #[test]
    fn a_window_costs_no_more_than_the_output() {
        for (len, window_log) in [(1000, 27), (300_000, 27), (3_000_000, 23), (3_000_000, 12)] {
            let encoded = frame(len, window_log, false);
            let header = Header::parse(&encoded).unwrap().unwrap();
            assert_eq!((header.content_size, header.window_size), (None, 1 << window_log));
            let mut decoder = Zstd::new(DecodedLen::Exactly(len as u64), ZSTD_WINDOW_MAX).unwrap();
            let mut out = vec![1; len];
            run(&mut decoder, &encoded, &mut out).unwrap();
            assert!(out.iter().all(|byte| *byte == 0));
            let bound = working_bytes(DecodedLen::Exactly(len as u64), ZSTD_WINDOW_MAX);
            assert!(decoder.context.sizeof() as u64 <= bound, "{} > {bound}", decoder.context.sizeof());
        }
    }

    #[test]
    fn windows_beyond_the_limit_are_refused() {
        let encoded = frame(10, 28, false);
        let decoder = Box::new(Zstd::new(DecodedLen::Exactly(10), ZSTD_WINDOW_MAX).unwrap());
        let mut out = [0; 10];
        let streamed = run(&mut Exact::new(decoder, encoded.len() as u64, 10), &encoded, &mut out);
        let expected = DecodeError::Unsupported {
            codec: "zstd",
            what: "a window of 268435456 bytes (at most 134217728)".to_owned(),
        };
        assert_eq!(streamed, Err(expected.clone()));
        assert_eq!(decode_into(&encoded, &mut out), Err(expected));
    }

    #[test]
    fn dictionaries_and_skippable_frames_are_refused() {
        let with_dictionary = [0x28, 0xb5, 0x2f, 0xfd, 0x01, 0x00, 0x07, 0, 0, 0];
        let refused = |what: &str| Err(DecodeError::Unsupported { codec: "zstd", what: what.to_owned() });
        assert_eq!(decode_into(&with_dictionary, &mut [0; 4]), refused("dictionary 7"));
        let skippable = [0x53, 0x2a, 0x4d, 0x18, 0, 0, 0, 0];
        assert_eq!(decode_into(&skippable, &mut []), refused("a skippable frame"));
        assert_eq!(decode_into(&[0x28, 0xb5, 0x2f, 0xfd, 0x08], &mut []), refused("a reserved bit"));
        assert!(matches!(decode_into(&[0; 9], &mut []), Err(DecodeError::Corrupt { .. })));
    }

    #[test]
    fn stated_sizes_are_compared_before_decoding() {
        let encoded = frame(300, 17, true);
        assert_eq!(Header::parse(&encoded).unwrap().unwrap().content_size, Some(300));
        assert_eq!(decode_into(&encoded, &mut [0; 299]), Err(DecodeError::Long { expected: 299, found: 300 }));
        assert_eq!(decode_into(&encoded, &mut [0; 301]), Err(DecodeError::Short { expected: 301, found: 300 }));
        let unstated = frame(300, 17, false);
        assert_eq!(decode_into(&unstated, &mut [0; 299]), Err(DecodeError::Long { expected: 299, found: 300 }));
        assert_eq!(decode_into(&unstated, &mut [0; 301]), Err(DecodeError::Short { expected: 301, found: 300 }));
    }
}
