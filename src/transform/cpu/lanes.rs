//! Source bytes into a lane: the value of every element, exactly, or rounded once where the rules say so.

#![allow(
    clippy::cast_possible_truncation,
    reason = "casts are what this is for; each keeps the bits that its comment says"
)]

use super::float::{self, Format};
use super::wide;
use crate::dtype::DType;

/// Decodes as many elements as the lane has places.
pub(super) type Decode<L> = fn(&[u8], &mut [L]);

/// The lanes that hold the values of a source type, and the way into each.
pub(super) enum Source {
    /// A float of at most 32 bits, or the real part of a complex one: exact.
    Single(Decode<f32>),
    /// `float64`, or the real part of `complex128`.
    Double(Decode<f64>),
    /// An integer that `i64` holds; rounded to nearest even on the way to a float.
    Integer(Decode<f32>, Decode<f64>, Decode<i64>),
    /// `uint64`.
    Unsigned(Decode<f32>, Decode<f64>, Decode<u64>),
}

impl Source {
    /// The lanes of this type. Bits above a sub-byte element are ignored, and any nonzero bool is true.
    pub(super) fn of(from: DType) -> Self {
        /// From the bytes of an element to its value.
        macro_rules! single {
            ($read:expr) => {
                Self::Single(|src, lane| each(src, lane, $read))
            };
        }
        /// From the code of a small float to its value.
        macro_rules! small {
            ($format:ident) => {
                single!(|[code]: [u8; 1]| Format::$format.decode(code.into()))
            };
        }
        /// From the bytes of an element to a value that `as` takes to each lane.
        macro_rules! integer {
            ($read:expr) => {
                integer!($read, i64, Integer)
            };
            ($read:expr, $lane:ty, $variant:ident) => {
                Self::$variant(
                    |src, lane| each(src, lane, |bytes| $read(bytes) as f32),
                    |src, lane| each(src, lane, |bytes| $read(bytes) as f64),
                    |src, lane| each(src, lane, |bytes| $read(bytes) as $lane),
                )
            };
        }
        match from {
            DType::Bool => integer!(|[byte]: [u8; 1]| u8::from(byte != 0)),
            DType::Int2 => integer!(|[byte]: [u8; 1]| (byte << 6) as i8 >> 6),
            DType::Int4 => integer!(|[byte]: [u8; 1]| (byte << 4) as i8 >> 4),
            DType::Int8 => integer!(i8::from_le_bytes),
            DType::Int16 => integer!(i16::from_le_bytes),
            DType::Int32 => integer!(i32::from_le_bytes),
            DType::Int64 => integer!(i64::from_le_bytes),
            DType::UInt2 => integer!(|[byte]: [u8; 1]| byte & 0x03),
            DType::UInt4 => integer!(|[byte]: [u8; 1]| byte & 0x0F),
            DType::UInt8 => integer!(u8::from_le_bytes),
            DType::UInt16 => integer!(u16::from_le_bytes),
            DType::UInt32 => integer!(u32::from_le_bytes),
            DType::UInt64 => integer!(u64::from_le_bytes, u64, Unsigned),
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
            DType::Float8E8M0FNU => single!(|[code]: [u8; 1]| float::e8m0_decode(code)),
            DType::Float16 => single!(|bytes| Format::FLOAT16.decode(u16::from_le_bytes(bytes).into())),
            DType::BFloat16 => single!(|[low, high]: [u8; 2]| f32::from_le_bytes([0, 0, low, high])),
            DType::Float32 => single!(f32::from_le_bytes),
            DType::Complex64 => single!(|bytes| f32::from_bits(u64::from_le_bytes(bytes) as u32)),
            DType::Float64 => Self::Double(|src, lane| each(src, lane, f64::from_le_bytes)),
            DType::Complex128 => Self::Double(|src, lane| {
                each(src, lane, |bytes| f64::from_bits(u128::from_le_bytes(bytes) as u64));
            }),
        }
    }
}

struct Each<'a, L, const N: usize, F> {
    elements: &'a [[u8; N]],
    lane: &'a mut [L],
    read: F,
}

impl<L, const N: usize, F: Fn([u8; N]) -> L> wide::Loop for Each<'_, L, N, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (bytes, value) in self.elements.iter().zip(self.lane) {
            *value = (self.read)(*bytes);
        }
    }
}

#[inline(always)]
fn each<L, const N: usize>(src: &[u8], lane: &mut [L], read: impl Fn([u8; N]) -> L) {
    wide::run(Each { elements: src.as_chunks().0, lane, read });
}
