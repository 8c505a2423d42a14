//! A lane into target bytes, counting lossy elements: one loop for each lane and target.

#![allow(
    clippy::cast_possible_truncation,
    reason = "casts are what this is for; each keeps the bits that its comment says"
)]

use super::float::{Format, bf16_encode, e8m0_encode};
use super::int::Int;
use super::wide;
use crate::dtype::DType;

/// Encodes the lane into as many elements and returns how many were lossy.
pub(super) type Encode<L> = fn(&[L], &mut [u8]) -> u64;

/// The ways to a target type, from each lane.
pub(super) struct Target {
    pub(super) f32: Encode<f32>,
    pub(super) f64: Encode<f64>,
    pub(super) integers: Integers,
}

/// How integers get to a target type.
pub(super) enum Integers {
    /// In their own lanes.
    Exact(Encode<i64>, Encode<u64>),
    /// Rounded to `f32` on the way in.
    ThroughF32,
    /// Rounded to `f64` on the way in.
    ThroughF64,
}

impl Target {
    /// The ways to this type; floats out of an integer's range wrap or else saturate.
    pub(super) fn of(to: DType, wrap: bool) -> Self {
        match to {
            DType::Bool => Self {
                f32: |lane, dst| each(lane, dst, |value| (u8::from(value != 0.0), false)),
                f64: |lane, dst| each(lane, dst, |value| (u8::from(value != 0.0), false)),
                integers: Integers::Exact(
                    |lane, dst| each(lane, dst, |value| (u8::from(value != 0), false)),
                    |lane, dst| each(lane, dst, |value| (u8::from(value != 0), false)),
                ),
            },
            DType::Int2 => Self::integer::<true, 2, u8>(wrap),
            DType::Int4 => Self::integer::<true, 4, u8>(wrap),
            DType::Int8 => Self::integer::<true, 8, u8>(wrap),
            DType::Int16 => Self::integer::<true, 16, u16>(wrap),
            DType::Int32 => Self::integer::<true, 32, u32>(wrap),
            DType::Int64 => Self::integer::<true, 64, u64>(wrap),
            DType::UInt2 => Self::integer::<false, 2, u8>(wrap),
            DType::UInt4 => Self::integer::<false, 4, u8>(wrap),
            DType::UInt8 => Self::integer::<false, 8, u8>(wrap),
            DType::UInt16 => Self::integer::<false, 16, u16>(wrap),
            DType::UInt32 => Self::integer::<false, 32, u32>(wrap),
            DType::UInt64 => Self::integer::<false, 64, u64>(wrap),
            DType::Float4E2M1FN => small!(FLOAT4_E2M1FN),
            DType::Float6E2M3FN => small!(FLOAT6_E2M3FN),
            DType::Float6E3M2FN => small!(FLOAT6_E3M2FN),
            DType::Float8E3M4 => small!(FLOAT8_E3M4),
            DType::Float8E4M3 => small!(FLOAT8_E4M3),
            DType::Float8E4M3FN => small!(FLOAT8_E4M3FN),
            DType::Float8E4M3FNUZ => small!(FLOAT8_E4M3FNUZ),
            DType::Float8E4M3B11FNUZ => small!(FLOAT8_E4M3B11FNUZ),
            DType::Float8E5M2 => small!(FLOAT8_E5M2),
            DType::Float8E5M2FNUZ => small!(FLOAT8_E5M2FNUZ),
            DType::Float8E8M0FNU => through_f32!(e8m0_encode),
            DType::Float16 => through_f32!(f16_encode),
            DType::BFloat16 => through_f32!(bf16_encode),
            DType::Float32 => through_f32!(|value: f32| (value.to_bits(), false)),
            DType::Complex64 => through_f32!(|value: f32| (u64::from(value.to_bits()), false)),
            DType::Float64 => through_f64!(f64::to_bits),
            DType::Complex128 => through_f64!(|value: f64| u128::from(value.to_bits())),
        }
    }

    fn integer<const SIGNED: bool, const BITS: u32, W: Word>(wrap: bool) -> Self {
        Self {
            f32: match wrap {
                true => |lane, dst| each(lane, dst, |value| W::cut(Int::<SIGNED, BITS>::from_f32::<true>(value))),
                false => |lane, dst| each(lane, dst, |value| W::cut(Int::<SIGNED, BITS>::from_f32::<false>(value))),
            },
            f64: match wrap {
                true => |lane, dst| each(lane, dst, |value| W::cut(Int::<SIGNED, BITS>::from_f64::<true>(value))),
                false => |lane, dst| each(lane, dst, |value| W::cut(Int::<SIGNED, BITS>::from_f64::<false>(value))),
            },
            integers: Integers::Exact(
                |lane, dst| each(lane, dst, |value| W::cut(Int::<SIGNED, BITS>::from_i64(value))),
                |lane, dst| each(lane, dst, |value| W::cut(Int::<SIGNED, BITS>::from_u64(value))),
            ),
        }
    }
}

/// A float of at most 8 bits, rounded once from either lane.
macro_rules! small {
    ($format:ident) => {
        Self {
            f32: |lane, dst| each(lane, dst, |value| byte(Format::$format.encode_f32(value))),
            f64: |lane, dst| each(lane, dst, |value| byte(Format::$format.encode_f64(value))),
            integers: Integers::ThroughF32,
        }
    };
}

/// A type that `f64` reaches through `f32`, rounded and possibly lossy in both steps.
macro_rules! through_f32 {
    ($encode:expr) => {
        Self {
            f32: |lane, dst| each(lane, dst, $encode),
            f64: |lane, dst| {
                each(lane, dst, |value| {
                    let (value, lossy) = f32_encode(value);
                    let (word, lossy_again) = $encode(value);
                    (word, lossy | lossy_again)
                })
            },
            integers: Integers::ThroughF32,
        }
    };
}

/// A type of double width, which holds every float exactly.
macro_rules! through_f64 {
    ($encode:expr) => {
        Self {
            f32: |lane, dst| each(lane, dst, |value| ($encode(f64::from(value)), false)),
            f64: |lane, dst| each(lane, dst, |value| ($encode(value), false)),
            integers: Integers::ThroughF64,
        }
    };
}
use {small, through_f32, through_f64};

#[inline(always)]
fn byte((code, lossy): (u32, bool)) -> (u8, bool) {
    (code as u8, lossy)
}

#[inline(always)]
fn f16_encode(value: f32) -> (u16, bool) {
    let (code, lossy) = Format::FLOAT16.encode_f32(value);
    (code as u16, lossy)
}

/// To nearest even; lossy if a finite value overflowed or a nonzero one vanished.
#[inline(always)]
fn f32_encode(value: f64) -> (f32, bool) {
    let rounded = value as f32;
    let overflow = (rounded.abs() == f32::INFINITY) & (value.abs() != f64::INFINITY);
    let vanished = (rounded == 0.0) & (value != 0.0);
    (rounded, overflow | vanished)
}

/// The bits of an element: an unsigned integer of its size.
trait Word: Copy {
    /// The low bits of an integer.
    fn cut(wide: (u64, bool)) -> (Self, bool);

    /// Encodes every value of the lane and counts what was lossy.
    fn fill<L: Copy>(lane: &[L], dst: &mut [u8], encode: impl Fn(L) -> (Self, bool)) -> u64;
}

macro_rules! word {
    ($($word:ty),*) => {
        $(impl Word for $word {
            #[inline(always)]
            fn cut((bits, lossy): (u64, bool)) -> (Self, bool) {
                (bits as Self, lossy)
            }

            #[inline(always)]
            fn fill<L: Copy>(lane: &[L], dst: &mut [u8], encode: impl Fn(L) -> (Self, bool)) -> u64 {
                let mut lossy_count = 0u32;
                for (value, out) in lane.iter().zip(dst.as_chunks_mut::<{ size_of::<Self>() }>().0) {
                    let (word, lossy) = encode(*value);
                    *out = word.to_le_bytes();
                    lossy_count += u32::from(lossy);
                }
                lossy_count.into()
            }
        })*
    };
}
word!(u8, u16, u32, u64, u128);

struct Each<'a, L, F> {
    lane: &'a [L],
    dst: &'a mut [u8],
    encode: F,
}

impl<L: Copy, W: Word, F: Fn(L) -> (W, bool)> wide::Loop for Each<'_, L, F> {
    type Output = u64;

    #[inline(always)]
    fn run(self) -> u64 {
        W::fill(self.lane, self.dst, self.encode)
    }
}

#[inline(always)]
fn each<L: Copy, W: Word>(lane: &[L], dst: &mut [u8], encode: impl Fn(L) -> (W, bool)) -> u64 {
    wide::run(Each { lane, dst, encode })
}
