//! Element bytes of one type to element bytes of another: which way a pair goes.
//!
//! # The values
//!
//! Results are those of TensorStore's `cast` driver, bit for bit, wherever C++ defines them (all pairs were compared
//! exhaustively for sources of up to 16 bits, and on edges and random bits for wider ones). As facts:
//!
//! - integer to narrower integer, to `int4` and `int2` too, wraps modulo 2^n under every policy;
//! - integer to `float32` and `float64` rounds once, to nearest even; to any narrower float it goes through `float32`;
//! - `float64` to `float16`, `bfloat16` and `float8_e8m0fnu` goes through `float32` and so rounds twice; to every other
//!   narrow float it rounds once;
//! - overflow gives infinity where the type has one, else NaN (`float8_e4m3fn`, the `fnuz` types), else the largest
//!   finite value (`float4`, `float6`), and an infinity goes the same way;
//! - NaN keeps its sign where the type has a signed NaN. `float4` and `float6` have none: NaN becomes -0 and a negative
//!   NaN +0, as in ml_dtypes. The `fnuz` types have one NaN and no -0. `float32` to `bfloat16` keeps the high payload
//!   bits;
//! - `float8_e8m0fnu` follows ml_dtypes, because TensorStore loses the bias there: the nearest power of two *by value*,
//!   ties upwards; NaN for zero, negative values and overflow; what is below 2^-127 becomes 2^-127, but what is
//!   strictly between 2^-127 and 2^-126, a subnormal `float32`, becomes 2^-126;
//! - anything to bool is `x != 0`, so NaN and subnormals are true;
//! - complex to real drops the imaginary part, complex to complex casts each part, complex to bool is refused.
//!
//! Types that TensorStore lacks (`uint2`, `uint4`, `float6_*`, `float8_e4m3`) follow the rule of their neighbours and
//! agree with ml_dtypes. Float to integer out of range is undefined in C++; here [`CastPolicy`] decides.
//!
//! # The algorithm
//!
//! Thirty types make nine hundred pairs: too many loops to compile one for each, and a decision for each element would
//! be slow. So an element travels through one of four wide *lanes* that hold its value exactly:
//!
//! ```text
//! for each block of 512 elements:
//!     decode(block of source bytes) -> lane: [f32 | f64 | i64 | u64; 512]      one function a (source, lane)
//!     encode(lane) -> block of target bytes, lossy elements of the block       one function a (lane, target)
//! ```
//!
//! The pair picks two function pointers once; most are branch-free loops which the compiler vectorises, twice
//! ([`super::wide`]), and the lane stays in the first-level cache. Which lane is part of the rules above: integers go
//! to narrow floats in the `f32` lane, which is where their first rounding happens, and to `float64` in the `f64` lane.
//!
//! Two refinements. A source element of one byte has 256 values, so long runs are looked up in a table that the lanes
//! fill ([`super::table`]). And an element that is lossy twice over (an imaginary part dropped from a value that
//! overflows) counts once, so blocks in which both happen are counted again one element at a time.

use super::encode::{Encode, Integers, Target};
use super::lanes::{Decode, Source};
use super::table;
use crate::dtype::{Class, DType};
use crate::transform::CastPolicy;

/// Elements of a block: a lane of 4 KiB at most, and the bytes of both sides beside it, in the first-level cache.
const BLOCK: usize = 512;

/// Runs this short use a lane of this length, which costs less to clear than the run to convert.
const BLOCK_SHORT: usize = 16;

/// Why elements cannot be cast or brought into memory form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CastError {
    /// The buffers do not hold the same whole number of elements.
    #[error(
        "cast of {from} to {to} between buffers of different length: {src_bytes} source bytes, {dst_bytes} target bytes"
    )]
    Length {
        /// Source type.
        from: DType,
        /// Target type.
        to: DType,
        /// Length of the source in bytes.
        src_bytes: usize,
        /// Length of the target in bytes.
        dst_bytes: usize,
    },
    /// A complex number has no truth value here.
    #[error("no cast of {from} to bool: cast to a real type first")]
    ComplexToBool {
        /// Source type.
        from: DType,
    },
    /// A stored bool is neither 0 nor 1.
    #[error("bool element {index} is stored as {byte}: expected 0 or 1")]
    BoolByte {
        /// Index of the element in the buffer.
        index: usize,
        /// What is stored.
        byte: u8,
    },
}

/// Whether [`convert`] takes this pair: all but complex to bool.
pub fn castable(from: DType, to: DType) -> bool {
    !(from.class() == Class::Complex && to == DType::Bool)
}

/// Casts contiguous little-endian elements in memory form and returns how many were lossy.
///
/// `src` holds `n * from.size()` bytes and `dst`, which is overwritten, `n * to.size()`. An element is lossy, once, if
/// it was finite and became infinite or NaN, was saturated, wrapped, was NaN and became an integer, was nonzero and
/// became zero, or lost a nonzero imaginary part. Rounding and truncation in range are not lossy, nor is infinity to
/// NaN. Saturated is also what rounds below the smallest `float8_e8m0fnu`; a float type without NaN makes it a zero,
/// which is lossy. [`CastPolicy::Error`] gives the values of [`CastPolicy::Saturate`]; the caller acts on the count.
///
/// No allocation. One core of a 2.6 GHz Zen 4, of source bytes: `float32` to `bfloat16` 17 GB/s, back 17; `float32` to
/// `float16` and `float8` 11; `float16` to `float32` 7; from types of one byte 3; the slowest pair, `float16` to
/// `uint8` wrapping, 1; complex elements that are all lossy 0.3.
pub fn convert(from: DType, to: DType, policy: CastPolicy, src: &[u8], dst: &mut [u8]) -> Result<u64, CastError> {
    if !castable(from, to) {
        return Err(CastError::ComplexToBool { from });
    }
    let whole = src.len().is_multiple_of(from.size()) && dst.len().is_multiple_of(to.size());
    if !whole || src.len() / from.size() != dst.len() / to.size() {
        return Err(CastError::Length { from, to, src_bytes: src.len(), dst_bytes: dst.len() });
    }
    if from == to {
        dst.copy_from_slice(src);
        return Ok(0);
    }
    Ok(Route::of(from, to, policy).run(src, dst))
}

/// How one pair of different types is converted; chosen once a call.
#[derive(Clone, Copy)]
enum Route {
    /// Source elements of one byte.
    Byte(Through),
    /// Real source elements of more than a byte.
    Real(Through),
    /// Complex source elements: both parts at once, each as a real element.
    Parts(Through),
    /// Complex source elements of which only the real part is taken.
    RealPart(Through),
}

/// A walk through one lane, from elements of `from_size` bytes to elements of `to_size`.
#[derive(Clone, Copy)]
pub(super) struct Through {
    path: Path,
    pub(super) from_size: usize,
    pub(super) to_size: usize,
}

#[derive(Clone, Copy)]
enum Path {
    F32(Decode<f32>, Encode<f32>),
    F64(Decode<f64>, Encode<f64>),
    I64(Decode<i64>, Encode<i64>),
    U64(Decode<u64>, Encode<u64>),
}

impl Route {
    fn of(from: DType, to: DType, policy: CastPolicy) -> Self {
        match (from, to) {
            (DType::Complex64, DType::Complex128) => Self::Parts(Through::of(DType::Float32, DType::Float64, policy)),
            (DType::Complex128, DType::Complex64) => Self::Parts(Through::of(DType::Float64, DType::Float32, policy)),
            (DType::Complex64 | DType::Complex128, _) => Self::RealPart(Through::of(from, to, policy)),
            _ if from.size() == 1 => Self::Byte(Through::of(from, to, policy)),
            _ => Self::Real(Through::of(from, to, policy)),
        }
    }

    fn run(self, src: &[u8], dst: &mut [u8]) -> u64 {
        match self {
            Self::Byte(through) if src.len() >= table::WORTH_ELEMENTS => table::look_up(through, src, dst),
            Self::Byte(through) | Self::Real(through) => through.run(src, dst),
            Self::Parts(through) => through.run_complex(2, src, dst, |_| false),
            Self::RealPart(through) => through.run_complex(1, src, dst, has_imaginary_part),
        }
    }
}

impl Through {
    fn of(from: DType, to: DType, policy: CastPolicy) -> Self {
        let target = Target::of(to, policy == CastPolicy::Wrap);
        let path = match (Source::of(from), target.integers) {
            (Source::Single(decode), _) => Path::F32(decode, target.f32),
            (Source::Double(decode), _) => Path::F64(decode, target.f64),
            (Source::Integer(_, _, decode), Integers::Exact(encode, _)) => Path::I64(decode, encode),
            (Source::Unsigned(_, _, decode), Integers::Exact(_, encode)) => Path::U64(decode, encode),
            (Source::Integer(decode, ..) | Source::Unsigned(decode, ..), Integers::ThroughF32) => {
                Path::F32(decode, target.f32)
            }
            (Source::Integer(_, decode, _) | Source::Unsigned(_, decode, _), Integers::ThroughF64) => {
                Path::F64(decode, target.f64)
            }
        };
        Self { path, from_size: from.size(), to_size: to.size() }
    }

    /// Converts whole elements; both slices hold the same number of them.
    pub(super) fn run(self, src: &[u8], dst: &mut [u8]) -> u64 {
        match self.path {
            Path::F32(decode, encode) => self.blocks(decode, encode, src, dst),
            Path::F64(decode, encode) => self.blocks(decode, encode, src, dst),
            Path::I64(decode, encode) => self.blocks(decode, encode, src, dst),
            Path::U64(decode, encode) => self.blocks(decode, encode, src, dst),
        }
    }

    fn blocks<L: Copy + Default>(self, decode: Decode<L>, encode: Encode<L>, src: &[u8], dst: &mut [u8]) -> u64 {
        if src.len() <= BLOCK_SHORT * self.from_size {
            let lane = &mut [L::default(); BLOCK_SHORT][..src.len() / self.from_size];
            decode(src, lane);
            return encode(lane, dst);
        }
        let mut lane = [L::default(); BLOCK];
        let blocks = src.chunks(BLOCK * self.from_size).zip(dst.chunks_mut(BLOCK * self.to_size));
        let mut lossy = 0;
        for (src, dst) in blocks {
            let lane = &mut lane[..src.len() / self.from_size];
            decode(src, lane);
            lossy += encode(lane, dst);
        }
        lossy
    }

    /// Converts complex elements of `parts` walks each, counting an element that is `dropped` or lossy in any part once.
    fn run_complex(self, parts: usize, src: &[u8], dst: &mut [u8], dropped: impl Fn(&[u8]) -> bool) -> u64 {
        let (from_size, to_size) = (parts * self.from_size, parts * self.to_size);
        let blocks = src.chunks(BLOCK * from_size).zip(dst.chunks_mut(BLOCK * to_size));
        let mut lossy = 0;
        for (src, dst) in blocks {
            let elements = || src.chunks_exact(from_size);
            let in_parts = self.run(src, dst);
            let in_drops = elements().map(|element| u64::from(dropped(element))).sum();
            lossy += match (in_parts, in_drops) {
                (0, drops) => drops,
                (lossy, 0) if parts == 1 => lossy,
                _ => {
                    let pairs = elements().zip(dst.chunks_exact_mut(to_size));
                    pairs.map(|(src, dst)| u64::from((self.run(src, dst) > 0) | dropped(src))).sum()
                }
            };
        }
        lossy
    }
}

/// Whether the imaginary half of a complex element is neither zero nor minus zero.
fn has_imaginary_part(element: &[u8]) -> bool {
    match (element.len(), element.last_chunk::<4>(), element.last_chunk::<8>()) {
        (8, Some(bytes), _) => u32::from_le_bytes(*bytes) << 1 != 0,
        (_, _, Some(bytes)) => u64::from_le_bytes(*bytes) << 1 != 0,
        _ => false,
    }
}
