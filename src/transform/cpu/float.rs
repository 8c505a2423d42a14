//! Floats narrower than `f32`: one description for all of them, one decoder, one encoder for each width of source.
//!
//! # Encoding
//!
//! With `M` mantissa bits kept of `f32`'s 23, and magnitudes as bit patterns, which order like the values:
//!
//! ```text
//! normal:     (bits + half an ulp - 1 + the lowest kept bit) >> (23 - M), minus the difference of the biases
//! subnormal:  bits(magnitude + magic) - bits(magic), where one ulp of magic is the smallest subnormal of the target,
//!             so the addition itself rounds to nearest even
//! overflow:   bits >= the pattern from which rounding leaves the finite range
//! ```
//!
//! All are computed and the right one selected, so the loop has no branch. What is lossy follows from the same
//! patterns: at or past overflow but not infinite, or so far below the smallest subnormal that it rounds to zero.
//! All constants depend on the [`Format`] alone and fold away.

#![allow(
    clippy::cast_possible_truncation,
    reason = "casts are what this is for; each keeps the bits that its comment says"
)]

/// What the codes above the finite range mean.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Specials {
    /// The top exponent holds infinity and NaNs, as in IEEE 754.
    Ieee,
    /// No infinity; the top code of either sign is NaN.
    Fn,
    /// No infinity, no -0: the code of -0 is NaN.
    Fnuz,
    /// Neither: every code is finite.
    Finite,
}

/// A sign, an exponent and a mantissa, with subnormals, of at most 16 bits.
#[derive(Clone, Copy)]
pub(super) struct Format {
    exponent_bits: u32,
    mantissa_bits: u32,
    bias: u32,
    specials: Specials,
}

impl Format {
    pub(super) const FLOAT4_E2M1FN: Self = Self::new(2, 1, 1, Specials::Finite);
    pub(super) const FLOAT6_E2M3FN: Self = Self::new(2, 3, 1, Specials::Finite);
    pub(super) const FLOAT6_E3M2FN: Self = Self::new(3, 2, 3, Specials::Finite);
    pub(super) const FLOAT8_E3M4: Self = Self::new(3, 4, 3, Specials::Ieee);
    pub(super) const FLOAT8_E4M3: Self = Self::new(4, 3, 7, Specials::Ieee);
    pub(super) const FLOAT8_E4M3FN: Self = Self::new(4, 3, 7, Specials::Fn);
    pub(super) const FLOAT8_E4M3FNUZ: Self = Self::new(4, 3, 8, Specials::Fnuz);
    pub(super) const FLOAT8_E4M3B11FNUZ: Self = Self::new(4, 3, 11, Specials::Fnuz);
    pub(super) const FLOAT8_E5M2: Self = Self::new(5, 2, 15, Specials::Ieee);
    pub(super) const FLOAT8_E5M2FNUZ: Self = Self::new(5, 2, 16, Specials::Fnuz);
    pub(super) const FLOAT16: Self = Self::new(5, 10, 15, Specials::Ieee);

    const fn new(exponent_bits: u32, mantissa_bits: u32, bias: u32, specials: Specials) -> Self {
        Self { exponent_bits, mantissa_bits, bias, specials }
    }

    const fn sign(self) -> u32 {
        1 << (self.exponent_bits + self.mantissa_bits)
    }

    /// The code of the largest finite magnitude.
    const fn max(self) -> u32 {
        match self.specials {
            Specials::Ieee => self.overflow() - 1,
            Specials::Fn => self.sign() - 2,
            Specials::Fnuz | Specials::Finite => self.sign() - 1,
        }
    }

    /// The code of infinity and of what rounds past the largest finite magnitude.
    const fn overflow(self) -> u32 {
        match self.specials {
            Specials::Ieee => self.sign() - (1 << self.mantissa_bits),
            Specials::Fn | Specials::Finite => self.sign() - 1,
            Specials::Fnuz => self.sign(),
        }
    }

    /// The code of a positive NaN.
    const fn nan(self) -> u32 {
        match self.specials {
            Specials::Ieee => self.overflow() | 1 << (self.mantissa_bits - 1),
            Specials::Fn => self.sign() - 1,
            Specials::Fnuz | Specials::Finite => self.sign(),
        }
    }

    /// The exact value of a code, whose bits above the format are ignored.
    #[inline(always)]
    pub(super) fn decode(self, code: u32) -> f32 {
        let magnitude = code & (self.sign() - 1);
        let shift = 23 - self.mantissa_bits;
        let subnormal = (magnitude as i32 as f32) * power_of_two(1 - self.bias as i32 - self.mantissa_bits as i32);
        let normal = (magnitude << shift) + ((127 - self.bias) << 23);
        let finite = if magnitude < 1 << self.mantissa_bits { subnormal.to_bits() } else { normal };
        let special = magnitude << shift | F32_INFINITY;
        let bits = match self.specials {
            Specials::Ieee if magnitude >= self.overflow() => special,
            Specials::Fn if magnitude == self.nan() => special,
            Specials::Fnuz if code & (self.sign() * 2 - 1) == self.nan() => F32_INFINITY | 1 << 22,
            _ => finite,
        };
        f32::from_bits(bits | u32::from(code & self.sign() != 0) << 31)
    }
}

const F32_INFINITY: u32 = f32::INFINITY.to_bits();

/// 2^exponent, for exponents of normal numbers.
const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// An encoder from one IEEE 754 type: see the module's head.
macro_rules! encoder {
    ($name:ident, $float:ty, $bits:ty, $mantissa_bits:literal, $bias:literal) => {
        impl Format {
            /// The code of the nearest value, ties to even, and whether it is lossy.
            #[inline(always)]
            pub(super) fn $name(self, value: $float) -> (u32, bool) {
                const INFINITY: $bits = <$float>::INFINITY.to_bits();
                let shift = $mantissa_bits - self.mantissa_bits;
                let (kept, bias) = (self.mantissa_bits as $bits, self.bias as $bits);
                let rebias = ($bias - bias) << kept;
                let half: $bits = 1 << (shift - 1);
                // The middle between the largest finite value and the next step; an odd code gives the tie away.
                let max = self.max() as $bits;
                let past_max = ((max + rebias) << shift) + half + (1 - (max & 1));
                let min_normal = ($bias + 1 - bias) << $mantissa_bits;
                let vanishing: $bits = ($bias - bias - kept) << $mantissa_bits;
                let magic = <$float>::from_bits(($bias + $mantissa_bits + 1 - bias - kept) << $mantissa_bits);

                let bits = value.to_bits();
                let magnitude = bits & (<$bits>::MAX >> 1);
                let rounded = magnitude.wrapping_add(half - 1 + ((magnitude >> shift) & 1)) >> shift;
                let normal = rounded.wrapping_sub(rebias);
                let subnormal = (<$float>::from_bits(magnitude) + magic).to_bits().wrapping_sub(magic.to_bits());
                let code = if magnitude < min_normal { subnormal } else { normal } as u32;
                let code = if magnitude >= past_max { self.overflow() } else { code };
                let code = if magnitude > INFINITY { self.nan() } else { code };

                let sign = ((bits >> (<$bits>::BITS - 1)) as u32) << (self.exponent_bits + self.mantissa_bits);
                let signless = self.specials == Specials::Fnuz && (code == 0 || code == self.sign());
                let code = code ^ if signless { 0 } else { sign };

                let past = if self.specials == Specials::Finite { <$bits>::MAX } else { INFINITY };
                let lossy = (magnitude >= past_max) & (magnitude < past) | (magnitude != 0) & (magnitude <= vanishing);
                (code, lossy)
            }
        }
    };
}
encoder!(encode_f32, f32, u32, 23, 127);
encoder!(encode_f64, f64, u64, 52, 1023);

/// `bfloat16` is the upper half of `f32`, rounded to nearest even; NaN keeps its payload and is made quiet as
/// TensorStore does, with a bit that any shift keeps.
#[inline(always)]
pub(super) fn bf16_encode(value: f32) -> (u16, bool) {
    const PAST_MAX: u32 = 0x7F7F_8000;
    const VANISHING: u32 = 0x8000;
    const QUIET: u32 = 0x0020_0000;
    let bits = value.to_bits();
    let magnitude = bits & 0x7FFF_FFFF;
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let code = if magnitude > F32_INFINITY { bits | QUIET } else { rounded };
    let overflow = magnitude.wrapping_sub(PAST_MAX) < F32_INFINITY - PAST_MAX;
    let vanished = magnitude.wrapping_sub(1) < VANISHING;
    ((code >> 16) as u16, overflow | vanished)
}

/// The code of NaN in `float8_e8m0fnu`; a code `c` below it is 2^(c - 127), without a sign.
const E8M0_NAN: u8 = 0xFF;

/// The exact value; 2^-127 is a subnormal `f32`.
#[inline(always)]
pub(super) fn e8m0_decode(code: u8) -> f32 {
    f32::from_bits(match code {
        0 => 1 << 22,
        E8M0_NAN => f32::NAN.to_bits(),
        _ => u32::from(code) << 23,
    })
}

/// The nearest power of two as ml_dtypes finds it: half an exponent is added to the pattern, except to subnormals.
#[inline(always)]
pub(super) fn e8m0_encode(value: f32) -> (u8, bool) {
    const HALF: u32 = 1 << 22;
    /// 0.75 * 2^-127: what is below would round to a smaller power, if there were one.
    const SATURATED: u32 = HALF / 4 * 3;
    const PAST_MAX: u32 = F32_INFINITY - HALF;
    let bits = value.to_bits();
    let magnitude = bits & 0x7FFF_FFFF;
    let subnormal = u32::from(bits > HALF);
    let normal = (bits.wrapping_add(HALF)) >> 23;
    let code = if bits < 1 << 23 { subnormal } else { normal } as u8;
    let refused = bits == 0 || bits >= PAST_MAX;
    let lossy = magnitude < F32_INFINITY && (refused || bits < SATURATED);
    (if refused { E8M0_NAN } else { code }, lossy)
}
