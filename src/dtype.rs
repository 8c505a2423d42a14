//! Element types: every data type that zarr as written by TensorStore, or safetensors, can hold.
//!
//! In memory an element takes [`DType::size`] bytes, little-endian. Types below a byte take one byte an element:
//! signed integers sign-extended, all others zero-extended.

use std::fmt;
use std::str::FromStr;

/// An element type, named as numpy and ml_dtypes name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are the documentation
#[rustfmt::skip]
pub enum DType {
    Bool,
    Int2, Int4, Int8, Int16, Int32, Int64,
    UInt2, UInt4, UInt8, UInt16, UInt32, UInt64,
    Float4E2M1FN, Float6E2M3FN, Float6E3M2FN,
    Float8E3M4, Float8E4M3, Float8E4M3FN, Float8E4M3FNUZ, Float8E4M3B11FNUZ, Float8E5M2, Float8E5M2FNUZ, Float8E8M0FNU,
    Float16, BFloat16, Float32, Float64,
    Complex64, Complex128,
}

/// The arithmetic family of an element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// 0 or 1.
    Bool,
    /// Two's complement of this many bits.
    Int(u32),
    /// Unsigned of this many bits.
    UInt(u32),
    /// A binary floating-point type.
    Float,
    /// Two floating-point parts, real first.
    Complex,
}

impl DType {
    /// Every element type, in a fixed order.
    #[rustfmt::skip]
    pub const ALL: [Self; 30] = [
        Self::Bool,
        Self::Int2, Self::Int4, Self::Int8, Self::Int16, Self::Int32, Self::Int64,
        Self::UInt2, Self::UInt4, Self::UInt8, Self::UInt16, Self::UInt32, Self::UInt64,
        Self::Float4E2M1FN, Self::Float6E2M3FN, Self::Float6E3M2FN,
        Self::Float8E3M4, Self::Float8E4M3, Self::Float8E4M3FN, Self::Float8E4M3FNUZ, Self::Float8E4M3B11FNUZ,
        Self::Float8E5M2, Self::Float8E5M2FNUZ, Self::Float8E8M0FNU,
        Self::Float16, Self::BFloat16, Self::Float32, Self::Float64,
        Self::Complex64, Self::Complex128,
    ];

    /// Bytes of one element in memory; at least 1, a power of two.
    pub const fn size(self) -> usize {
        match self {
            Self::Int16 | Self::UInt16 | Self::Float16 | Self::BFloat16 => 2,
            Self::Int32 | Self::UInt32 | Self::Float32 => 4,
            Self::Int64 | Self::UInt64 | Self::Float64 | Self::Complex64 => 8,
            Self::Complex128 => 16,
            _ => 1,
        }
    }

    /// Bytes of the unit that a byte swap reverses: half of a complex element, else the element.
    pub const fn swap_size(self) -> usize {
        match self {
            Self::Complex64 => 4,
            Self::Complex128 => 8,
            other => other.size(),
        }
    }

    /// Whether an element's stored byte may differ from the one in memory (sub-byte types) or may be invalid (bools), so
    /// that stored elements cannot be copied as they are.
    pub const fn stored_form_differs(self) -> bool {
        matches!(
            self,
            Self::Bool
                | Self::Int2
                | Self::Int4
                | Self::UInt2
                | Self::UInt4
                | Self::Float4E2M1FN
                | Self::Float6E2M3FN
                | Self::Float6E3M2FN
        )
    }

    /// The arithmetic family.
    pub const fn class(self) -> Class {
        match self {
            Self::Bool => Class::Bool,
            Self::Int2 => Class::Int(2),
            Self::Int4 => Class::Int(4),
            Self::Int8 => Class::Int(8),
            Self::Int16 => Class::Int(16),
            Self::Int32 => Class::Int(32),
            Self::Int64 => Class::Int(64),
            Self::UInt2 => Class::UInt(2),
            Self::UInt4 => Class::UInt(4),
            Self::UInt8 => Class::UInt(8),
            Self::UInt16 => Class::UInt(16),
            Self::UInt32 => Class::UInt(32),
            Self::UInt64 => Class::UInt(64),
            Self::Complex64 | Self::Complex128 => Class::Complex,
            _ => Class::Float,
        }
    }

    /// Whether this is a binary floating-point type (complex types are not).
    pub const fn is_float(self) -> bool {
        matches!(self.class(), Class::Float)
    }

    /// Whether this is a signed or unsigned integer type (bool is not).
    pub const fn is_int(self) -> bool {
        matches!(self.class(), Class::Int(_) | Class::UInt(_))
    }

    /// The numpy or ml_dtypes name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::Int2 => "int2",
            Self::Int4 => "int4",
            Self::Int8 => "int8",
            Self::Int16 => "int16",
            Self::Int32 => "int32",
            Self::Int64 => "int64",
            Self::UInt2 => "uint2",
            Self::UInt4 => "uint4",
            Self::UInt8 => "uint8",
            Self::UInt16 => "uint16",
            Self::UInt32 => "uint32",
            Self::UInt64 => "uint64",
            Self::Float4E2M1FN => "float4_e2m1fn",
            Self::Float6E2M3FN => "float6_e2m3fn",
            Self::Float6E3M2FN => "float6_e3m2fn",
            Self::Float8E3M4 => "float8_e3m4",
            Self::Float8E4M3 => "float8_e4m3",
            Self::Float8E4M3FN => "float8_e4m3fn",
            Self::Float8E4M3FNUZ => "float8_e4m3fnuz",
            Self::Float8E4M3B11FNUZ => "float8_e4m3b11fnuz",
            Self::Float8E5M2 => "float8_e5m2",
            Self::Float8E5M2FNUZ => "float8_e5m2fnuz",
            Self::Float8E8M0FNU => "float8_e8m0fnu",
            Self::Float16 => "float16",
            Self::BFloat16 => "bfloat16",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Complex64 => "complex64",
            Self::Complex128 => "complex128",
        }
    }

    /// Short forms that the command line and Rust users write.
    const ALIASES: [(&'static str, Self); 27] = [
        ("i2", Self::Int2),
        ("i4", Self::Int4),
        ("i8", Self::Int8),
        ("i16", Self::Int16),
        ("i32", Self::Int32),
        ("i64", Self::Int64),
        ("u2", Self::UInt2),
        ("u4", Self::UInt4),
        ("u8", Self::UInt8),
        ("u16", Self::UInt16),
        ("u32", Self::UInt32),
        ("u64", Self::UInt64),
        ("f4", Self::Float4E2M1FN),
        ("f8_e3m4", Self::Float8E3M4),
        ("f8_e4m3", Self::Float8E4M3FN),
        ("f8_e4m3fn", Self::Float8E4M3FN),
        ("f8_e4m3fnuz", Self::Float8E4M3FNUZ),
        ("f8_e4m3b11fnuz", Self::Float8E4M3B11FNUZ),
        ("f8_e5m2", Self::Float8E5M2),
        ("f8_e5m2fnuz", Self::Float8E5M2FNUZ),
        ("f8_e8m0", Self::Float8E8M0FNU),
        ("f16", Self::Float16),
        ("bf16", Self::BFloat16),
        ("f32", Self::Float32),
        ("f64", Self::Float64),
        ("c64", Self::Complex64),
        ("c128", Self::Complex128),
    ];
}

/// What happens to values that the target type cannot hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize)]
pub enum CastPolicy {
    /// Float to integer saturates and NaN becomes 0; integer to narrower integer wraps, as TensorStore does.
    #[default]
    Saturate,
    /// To an integer: modulo 2^n everywhere; NaN and infinities become 0.
    Wrap,
    /// As `Saturate`, and the load fails if any element was lossy.
    Error,
}

impl DType {
    /// Whether a cast to `to` is defined. Everything is, but complex to bool (as in TensorStore).
    pub const fn casts_to(self, to: Self) -> bool {
        !(matches!(self.class(), Class::Complex) && matches!(to, Self::Bool))
    }
}

impl serde::Serialize for DType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no element type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown data type `{0}` (numpy and ml_dtypes names such as float32, bfloat16, int4, float8_e4m3fn; or f32, bf16)"
)]
pub struct UnknownDType(pub String);

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(name: &str) -> Result<Self, UnknownDType> {
        let by_name = Self::ALL.into_iter().find(|dtype| dtype.name() == name);
        let by_alias = || Self::ALIASES.into_iter().find(|(alias, _)| *alias == name).map(|(_, dtype)| dtype);
        by_name.or_else(by_alias).ok_or_else(|| UnknownDType(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_are_distinct() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
            assert!(dtype.size().is_power_of_two());
        }
        assert_eq!("bf16".parse(), Ok(DType::BFloat16));
        assert!("float7".parse::<DType>().is_err());
    }
}
