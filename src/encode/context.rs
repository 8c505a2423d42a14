//! zstd's compression context, with what the safe binding lacks: frames without sequences.
//!
//! Source: libzstd's `zstd.h`, "Advanced compression API" and "Block-level sequence producer API".

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

use zstd::zstd_safe::zstd_sys as sys;

use super::EncodeError;

/// A compression context. Its parameters stay from frame to frame.
#[derive(Debug)]
pub(super) struct Context(NonNull<sys::ZSTD_CCtx>);

// SAFETY: libzstd's contexts hold no reference to the thread that made them; `&mut self` keeps them to one at a time.
unsafe impl Send for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `ZSTD_createCCtx`, and is freed once.
        unsafe { sys::ZSTD_freeCCtx(self.0.as_ptr()) };
    }
}

impl Context {
    /// A context whose frames state their content size, and carry a checksum if asked for.
    pub(super) fn new(level: i32, checksum: bool) -> Result<Self, EncodeError> {
        // SAFETY: a function without arguments; null says that there is no memory.
        let context = NonNull::new(unsafe { sys::ZSTD_createCCtx() }).ok_or(EncodeError::NoMemory)?;
        let mut context = Self(context);
        context.set(sys::ZSTD_cParameter::ZSTD_c_compressionLevel, level)?;
        context.set(sys::ZSTD_cParameter::ZSTD_c_checksumFlag, c_int::from(checksum))?;
        Ok(context)
    }

    /// A context whose compressed blocks hold no sequences, whatever the data.
    ///
    /// No level promises that: the fastest ones still take the matches that they stumble over. So matches are not
    /// looked for at all: a sequence producer says of each block that it is all literals. The level chooses the window
    /// and the effort, of which none is left; fast levels leave literals as they are unless told otherwise.
    pub(super) fn literals_only(checksum: bool) -> Result<Self, EncodeError> {
        let mut context = Self::new(LITERALS_LEVEL, checksum)?;
        context.set(sys::ZSTD_cParameter::ZSTD_c_windowLog, LITERALS_WINDOW_LOG)?;
        context.set(LITERAL_COMPRESSION_MODE, sys::ZSTD_ParamSwitch_e::ZSTD_ps_enable as c_int)?;
        // A producer that fails must fail the frame rather than bring the match finder back.
        context.set(ENABLE_PRODUCER_FALLBACK, 0)?;
        // SAFETY: the producer needs no state, and lives as long as the program.
        unsafe { sys::ZSTD_registerSequenceProducer(context.0.as_ptr(), std::ptr::null_mut(), Some(produce_literals)) };
        Ok(context)
    }

    fn set(&mut self, parameter: sys::ZSTD_cParameter, value: i32) -> Result<(), EncodeError> {
        // SAFETY: the context lives; libzstd checks the parameter and its value.
        check(unsafe { sys::ZSTD_CCtx_setParameter(self.0.as_ptr(), parameter, value) }).map(drop)
    }

    /// Starts a frame of exactly this many bytes; what was begun before is dropped.
    pub(super) fn begin(&mut self, content_len: u64) -> Result<(), EncodeError> {
        let reset = sys::ZSTD_ResetDirective::ZSTD_reset_session_only;
        // SAFETY: the context lives.
        check(unsafe { sys::ZSTD_CCtx_reset(self.0.as_ptr(), reset) })?;
        // SAFETY: the context lives, and no frame is begun.
        check(unsafe { sys::ZSTD_CCtx_setPledgedSrcSize(self.0.as_ptr(), content_len) }).map(drop)
    }

    /// Appends what `input` is compressed to, as far as it comes out.
    pub(super) fn push(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.stream(input, out, sys::ZSTD_EndDirective::ZSTD_e_continue)
    }

    /// Appends what `input` is compressed to, and ends the frame.
    pub(super) fn end(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        // With room for the worst case libzstd compresses straight from the input into the output.
        reserve(out, bound(input.len()))?;
        self.stream(input, out, sys::ZSTD_EndDirective::ZSTD_e_end)
    }

    fn stream(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        directive: sys::ZSTD_EndDirective,
    ) -> Result<(), EncodeError> {
        let mut source = sys::ZSTD_inBuffer { src: input.as_ptr().cast::<c_void>(), size: input.len(), pos: 0 };
        let ends = directive == sys::ZSTD_EndDirective::ZSTD_e_end;
        loop {
            if out.spare_capacity_mut().is_empty() {
                reserve(out, OUTPUT_BYTES)?;
            }
            let room = out.spare_capacity_mut();
            let mut target = sys::ZSTD_outBuffer { dst: room.as_mut_ptr().cast::<c_void>(), size: room.len(), pos: 0 };
            // SAFETY: `source` and `target` describe the slice and the vector's spare room, neither of which anyone
            // else touches during the call.
            let left =
                check(unsafe { sys::ZSTD_compressStream2(self.0.as_ptr(), &mut target, &mut source, directive) })?;
            let len = out.len() + target.pos.min(out.capacity() - out.len());
            // SAFETY: libzstd wrote the first `pos` bytes of the spare room, and `pos` is at most its size.
            unsafe { out.set_len(len) };
            // Without an end, all input taken is enough: the rest comes out later.
            if source.pos == source.size && (!ends || left == 0) {
                return Ok(());
            }
        }
    }
}

/// Says of a block that it is all literals: one sequence that is no match but the block's end.
///
/// libzstd calls it with room for at least one sequence and without a dictionary.
unsafe extern "C" fn produce_literals(
    _state: *mut c_void,
    sequences: *mut sys::ZSTD_Sequence,
    capacity: usize,
    _block: *const c_void,
    block_len: usize,
    _dictionary: *const c_void,
    _dictionary_len: usize,
    _level: c_int,
    _window_len: usize,
) -> usize {
    let (Ok(len), true) = (u32::try_from(block_len), capacity > 0 && !sequences.is_null()) else {
        return PRODUCER_ERROR;
    };
    // SAFETY: libzstd gave room for `capacity` sequences, which is at least one.
    unsafe { sequences.write(sys::ZSTD_Sequence { offset: 0, litLength: len, matchLength: 0, rep: 0 }) };
    1
}

fn check(code: usize) -> Result<usize, EncodeError> {
    // SAFETY: a function of a number.
    if unsafe { sys::ZSTD_isError(code) } == 0 {
        return Ok(code);
    }
    Err(EncodeError::Zstd(zstd::zstd_safe::get_error_name(code).to_owned()))
}

/// Most bytes that a frame of this many may have.
pub(super) fn bound(len: usize) -> usize {
    zstd::zstd_safe::compress_bound(len)
}

/// What a context of this level holds that makes frames of this many bytes, in bytes.
pub(super) fn memory(level: i32, len: u64) -> u64 {
    // SAFETY: a function of numbers.
    estimate(unsafe { sys::ZSTD_getCParams(level, len.max(1), 0) })
}

/// The same for contexts of frames without sequences. libzstd leaves the sequences of a block's producer out of its
/// estimate: room for one every three bytes, twice.
pub(super) fn memory_literals_only(len: u64) -> u64 {
    // SAFETY: a function of numbers.
    let mut parameters = unsafe { sys::ZSTD_getCParams(LITERALS_LEVEL, len.max(1), 0) };
    parameters.windowLog = parameters.windowLog.min(LITERALS_WINDOW_LOG as u32);
    let sequences = len.min(OUTPUT_BYTES as u64) / 3 + 2;
    estimate(parameters) + sequences * (size_of::<sys::ZSTD_Sequence>() as u64 + STORED_SEQUENCE_BYTES)
}

fn estimate(parameters: sys::ZSTD_compressionParameters) -> u64 {
    // SAFETY: a function of numbers.
    let estimate = unsafe { sys::ZSTD_estimateCStreamSize_usingCParams(parameters) };
    estimate as u64 + CONTEXT_BYTES
}

#[cfg(test)]
impl Context {
    /// What it holds now, in bytes.
    pub(super) fn holds(&self) -> u64 {
        // SAFETY: the context lives.
        unsafe { sys::ZSTD_sizeof_CCtx(self.0.as_ptr()) as u64 }
    }
}

pub(super) fn reserve(out: &mut Vec<u8>, more: usize) -> Result<(), EncodeError> {
    out.try_reserve(more).map_err(|_| EncodeError::NoMemory)
}

/// Names of experimental parameters, which the binding only numbers.
const LITERAL_COMPRESSION_MODE: sys::ZSTD_cParameter = sys::ZSTD_cParameter::ZSTD_c_experimentalParam5;
const ENABLE_PRODUCER_FALLBACK: sys::ZSTD_cParameter = sys::ZSTD_cParameter::ZSTD_c_experimentalParam17;

/// A level with a small window and no searching structures to speak of.
const LITERALS_LEVEL: i32 = -7;

/// A window of one block, the largest there is: more would only be memory, here and in decoders.
const LITERALS_WINDOW_LOG: i32 = 17;

/// `ZSTD_SEQUENCE_PRODUCER_ERROR`.
const PRODUCER_ERROR: usize = usize::MAX;

/// What libzstd keeps of a sequence of a block: eight bytes and three codes.
const STORED_SEQUENCE_BYTES: u64 = 11;

/// What estimates are off by at most: tables are aligned, and small contexts are not shrunk at once.
const CONTEXT_BYTES: u64 = 64 << 10;

/// How much the output grows at a time while a frame is streamed: a block.
const OUTPUT_BYTES: usize = 128 << 10;
