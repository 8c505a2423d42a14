//! Integers of 2 to 64 bits as targets: from floats by truncation under a policy, from integers modulo 2^n.

#![allow(
    clippy::cast_possible_truncation,
    reason = "casts are what this is for; each keeps the bits that its comment says"
)]

/// An integer type: `BITS` bits, two's complement if `SIGNED`. Values travel as `u64`, sign-extended.
pub(super) struct Int<const SIGNED: bool, const BITS: u32>;

impl<const SIGNED: bool, const BITS: u32> Int<SIGNED, BITS> {
    const MIN: i64 = if SIGNED { i64::MIN >> (64 - BITS) } else { 0 };
    /// As bits: `u64::MAX` for `uint64`.
    const MAX: u64 = u64::MAX >> (64 - BITS) >> (SIGNED as u32);
    /// 2^n: the smallest float past the range. Every power of two in question is exact, in `f32` too.
    const PAST: f64 = (Self::MAX / 2 + 1) as f64 * 2.0;

    /// The low bits, sign-extended to the 64 that the wider part of a target word is cut from.
    #[inline(always)]
    fn wrap(bits: u64) -> u64 {
        if SIGNED { ((bits << (64 - BITS)) as i64 >> (64 - BITS)) as u64 } else { bits & Self::MAX }
    }

    /// From an `i64`: modulo 2^n, lossy if that changes the value.
    #[inline(always)]
    pub(super) fn from_i64(value: i64) -> (u64, bool) {
        let past = value >= 0 && value as u64 > Self::MAX;
        (Self::wrap(value as u64), value < Self::MIN || past)
    }

    /// From a `u64`: modulo 2^n, lossy if that changes the value.
    #[inline(always)]
    pub(super) fn from_u64(value: u64) -> (u64, bool) {
        (Self::wrap(value), value > Self::MAX)
    }
}

/// A conversion from one float type.
macro_rules! from_float {
    ($name:ident, $float:ty) => {
        impl<const SIGNED: bool, const BITS: u32> Int<SIGNED, BITS> {
            /// Truncated; out of range modulo 2^n if `WRAP`, with 0 for infinities, else saturated; NaN is 0.
            ///
            /// Lossy out of range, from NaN, and where a fraction became 0.
            #[inline(always)]
            pub(super) fn $name<const WRAP: bool>(value: $float) -> (u64, bool) {
                /// The largest float that truncates to less than -2^(BITS-1), or to less than 0.
                const fn below(signed: bool, bits: u32) -> $float {
                    let min: $float = if signed { -((1u64 << (bits - 1)) as $float) } else { 0.0 };
                    let next = min - 1.0;
                    if next < min { next } else { min.next_down() }
                }
                let in_range = (value > const { below(SIGNED, BITS) }) & (value < const { Self::PAST as $float });
                let vanished = (value != 0.0) & (value.abs() < 1.0);
                let bits = if WRAP {
                    Self::wrap(modulo_u64(value.into()))
                } else if BITS <= 16 || (SIGNED && BITS == 32) {
                    (value as i32).clamp(Self::MIN as i32, Self::MAX as i32) as i64 as u64
                } else if SIGNED || BITS < 64 {
                    (value as i64).clamp(Self::MIN, (Self::MAX & i64::MAX as u64) as i64) as u64
                } else {
                    value as u64
                };
                (bits, !in_range | vanished)
            }
        }
    };
}
from_float!(from_f32, f32);
from_float!(from_f64, f64);

/// The truncated value modulo 2^64, exactly, however large; 0 for infinities and NaN.
#[inline(always)]
fn modulo_u64(value: f64) -> u64 {
    const MANTISSA_BITS: u32 = f64::MANTISSA_DIGITS - 1;
    if value.abs() < 9_223_372_036_854_775_808.0 {
        return value as i64 as u64;
    }
    let bits = value.to_bits();
    let exponent = (bits >> MANTISSA_BITS & 0x7FF) as u32;
    let mantissa = bits & ((1 << MANTISSA_BITS) - 1) | 1 << MANTISSA_BITS;
    // At least 2^63, so the mantissa moves up; infinities and NaN have the largest exponent and move out altogether.
    let magnitude = mantissa.checked_shl(exponent.saturating_sub(1023 + MANTISSA_BITS)).unwrap_or(0);
    if value < 0.0 { magnitude.wrapping_neg() } else { magnitude }
}
