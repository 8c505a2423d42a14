//! Fill values: from JSON to the bytes of one element in memory.
//!
//! Sources: Zarr v2 specification, "Fill value encoding"; Zarr v3 specification, "Fill value" of the core data types.

use serde_json::Value;

use super::{Endian, MetaError};
use crate::dtype::{Class, DType};

/// The element of a v2 `fill_value`, in memory form (`dtype.size()` bytes): `null` is zeros, `"NaN"`, `"Infinity"` and
/// `"-Infinity"` are numbers, any other text is the stored element in base64, in the array's byte order.
///
/// # Errors
/// [`MetaError::Malformed`] for a value that is none of this or does not fit the type.
pub(super) fn parse_v2(dtype: DType, endian: Endian, value: &Value) -> Result<Vec<u8>, MetaError> {
    let element = match value {
        Value::Null => Some(vec![0; dtype.size()]),
        Value::String(text) if special(text).is_none() => from_base64(text).and_then(|raw| stored(dtype, endian, raw)),
        _ => number(dtype, value),
    };
    element.ok_or_else(|| unfit(dtype, value))
}

/// The element of a v3 `fill_value`, in memory form (`dtype.size()` bytes): besides numbers, floating-point types have
/// `"NaN"`, `"Infinity"`, `"-Infinity"` and their bits as `"0x7fc00000"`.
///
/// # Errors
/// [`MetaError::Malformed`] for a value that is none of this or does not fit the type.
pub(super) fn parse_v3(dtype: DType, value: &Value) -> Result<Vec<u8>, MetaError> {
    let element = match (dtype.class(), value) {
        (Class::Float, Value::String(text)) if text.starts_with("0x") => {
            bits(text, dtype.size()).filter(|element| canonical(dtype, element).as_ref() == Some(element))
        }
        (Class::Complex, Value::Array(parts)) => match parts.as_slice() {
            [real, imaginary] => part_v3(dtype, real).zip(part_v3(dtype, imaginary)).map(|(re, im)| [re, im].concat()),
            _ => None,
        },
        _ => number(dtype, value),
    };
    element.ok_or_else(|| unfit(dtype, value))
}

/// One part of a complex v3 value, which is spelt like a floating-point value.
fn part_v3(dtype: DType, value: &Value) -> Option<Vec<u8>> {
    let part = part(dtype);
    match value {
        Value::String(text) if text.starts_with("0x") => bits(text, part.size()),
        _ => number(part, value),
    }
}

/// The element of a number, a truth value or a pair of numbers.
fn number(dtype: DType, value: &Value) -> Option<Vec<u8>> {
    let float = |value: &Value| match value {
        Value::String(text) => special(text),
        _ => value.as_f64(),
    };
    match dtype.class() {
        Class::Bool => match (value, integer(value)) {
            (Value::Bool(truth), _) => Some(vec![u8::from(*truth)]),
            (_, Some(truth @ (0 | 1))) => Some(vec![u8::from(truth == 1)]),
            _ => None,
        },
        Class::Int(bits) => {
            let value = integer(value)?;
            let limit = 1i128 << (bits - 1);
            (-limit..limit).contains(&value).then(|| low_bytes(value, dtype.size()))
        }
        Class::UInt(bits) => {
            let value = integer(value)?;
            (0..1i128 << bits).contains(&value).then(|| low_bytes(value, dtype.size()))
        }
        Class::Float => float(value).map(|value| encode_float(dtype, value)),
        Class::Complex => {
            let parts = match value {
                Value::Array(parts) => match parts.as_slice() {
                    [real, imaginary] => [float(real)?, float(imaginary)?],
                    _ => return None,
                },
                // numpy writers give a plain number for a real fill value.
                _ => [float(value)?, 0.0],
            };
            Some(parts.into_iter().flat_map(|value| encode_float(part(dtype), value)).collect())
        }
    }
}

/// The nearest element to a number, ties to even, in memory form. Zeros for types that are not floating-point.
///
/// Numbers beyond the largest become infinity, NaN or the largest, whichever the type has, as in ml_dtypes.
pub(super) fn encode_float(dtype: DType, value: f64) -> Vec<u8> {
    match dtype {
        DType::Float64 => value.to_le_bytes().to_vec(),
        #[expect(clippy::cast_possible_truncation, reason = "rounds to nearest even, which is what is wanted")]
        DType::Float32 => (value as f32).to_le_bytes().to_vec(),
        DType::Float16 => half::f16::from_f64(value).to_le_bytes().to_vec(),
        DType::BFloat16 => half::bf16::from_f64(value).to_le_bytes().to_vec(),
        DType::Float8E8M0FNU => vec![encode_power(value)],
        _ => match Small::of(dtype) {
            Some(small) => vec![small.encode(value)],
            None => vec![0; dtype.size()],
        },
    }
}

/// A floating-point format of at most 8 bits with a sign.
struct Small {
    mantissa_bits: i32,
    bias: i32,
    /// The code of the largest finite number.
    largest: u8,
    /// What numbers beyond the largest become, without the sign.
    overflow: u8,
    /// What infinity becomes, without the sign.
    infinity: u8,
    nan: u8,
    sign: u8,
    negative_zero: bool,
}

impl Small {
    /// The numbers of a format (ml_dtypes), or `None` for other types.
    #[rustfmt::skip]
    const fn of(dtype: DType) -> Option<Self> {
        let (mantissa_bits, bias, largest, overflow, infinity, nan, sign, negative_zero) = match dtype {
            DType::Float4E2M1FN       => (1,  1, 0x07, 0x07, 0x07, 0x08, 0x08, true),
            DType::Float6E2M3FN       => (3,  1, 0x1f, 0x1f, 0x1f, 0x20, 0x20, true),
            DType::Float6E3M2FN       => (2,  3, 0x1f, 0x1f, 0x1f, 0x20, 0x20, true),
            DType::Float8E3M4         => (4,  3, 0x6f, 0x70, 0x70, 0x78, 0x80, true),
            DType::Float8E4M3         => (3,  7, 0x77, 0x78, 0x78, 0x7c, 0x80, true),
            DType::Float8E4M3FN       => (3,  7, 0x7e, 0x7f, 0x7f, 0x7f, 0x80, true),
            DType::Float8E4M3FNUZ     => (3,  8, 0x7f, 0x80, 0x80, 0x80, 0x80, false),
            DType::Float8E4M3B11FNUZ  => (3, 11, 0x7f, 0x80, 0x80, 0x80, 0x80, false),
            DType::Float8E5M2         => (2, 15, 0x7b, 0x7c, 0x7c, 0x7e, 0x80, true),
            DType::Float8E5M2FNUZ     => (2, 16, 0x7f, 0x80, 0x80, 0x80, 0x80, false),
            _ => return None,
        };
        Some(Self { mantissa_bits, bias, largest, overflow, infinity, nan, sign, negative_zero })
    }

    /// Rounds to the nearest code, ties to even. Codes are monotonic in the magnitude, so a mantissa that rounds up
    /// carries into the exponent by itself.
    fn encode(&self, value: f64) -> u8 {
        let magnitude = value.abs();
        let code = if value.is_nan() {
            return self.nan;
        } else if value.is_infinite() {
            self.infinity
        } else if magnitude >= f64::from(1u32 << 31) {
            self.overflow
        } else {
            let exponent = exponent(magnitude).max(1 - self.bias);
            let units = (magnitude * power(self.mantissa_bits - exponent)).round_ties_even();
            #[expect(clippy::cast_possible_truncation, reason = "at most 2^(mantissa bits + 1)")]
            let code = ((exponent + self.bias - 1) << self.mantissa_bits) + units as i32;
            u8::try_from(code).ok().filter(|code| *code <= self.largest).unwrap_or(self.overflow)
        };
        if value.is_sign_negative() && (code != 0 || self.negative_zero) { code | self.sign } else { code }
    }
}

/// The nearest code of float8_e8m0fnu, which has powers of two only; NaN for what is not positive.
fn encode_power(value: f64) -> u8 {
    const NAN: u8 = 0xff;
    const BIAS: i32 = 127;
    if value == 0.0 {
        // The type has no zero; who writes a fill value of 0 means bytes of 0, and TensorStore reads them so.
        return 0;
    }
    if value.is_nan() || value < 0.0 {
        return NAN;
    }
    let exponent = exponent(value);
    let rounds_up = value * power(-exponent.max(-1022)) >= 1.5;
    u8::try_from((exponent + BIAS + i32::from(rounds_up)).max(0)).unwrap_or(NAN)
}

/// The binary exponent of a finite number that is not negative; that of the smallest normal one for less.
fn exponent(magnitude: f64) -> i32 {
    let biased = (magnitude.to_bits() >> 52) & 0x7ff;
    i32::try_from(biased.max(1)).unwrap_or_default() - 1023
}

/// Two to this power, which is within the normal range.
fn power(exponent: i32) -> f64 {
    let biased = u64::try_from(exponent + 1023).unwrap_or_default();
    f64::from_bits(biased << 52)
}

/// The type of one part of a complex type.
const fn part(dtype: DType) -> DType {
    match dtype {
        DType::Complex64 => DType::Float32,
        _ => DType::Float64,
    }
}

/// The names that both versions give to numbers which JSON cannot spell.
fn special(text: &str) -> Option<f64> {
    match text {
        "NaN" => Some(f64::NAN),
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

/// A JSON number with no fraction, also when it is spelt `0.0`.
fn integer(value: &Value) -> Option<i128> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let number = value.as_number()?;
    if let Some(value) = number.as_i64() {
        return Some(i128::from(value));
    }
    if let Some(value) = number.as_u64() {
        return Some(i128::from(value));
    }
    #[expect(clippy::cast_possible_truncation, reason = "checked to be an integer below 2^53")]
    number.as_f64().filter(|value| value.fract() == 0.0 && value.abs() <= EXACT).map(|value| value as i128)
}

fn low_bytes(value: i128, size: usize) -> Vec<u8> {
    value.to_le_bytes().into_iter().take(size).collect()
}

/// `0x` and the bits of an element of `size` bytes, most significant first.
fn bits(text: &str, size: usize) -> Option<Vec<u8>> {
    let digits = text.strip_prefix("0x")?;
    let hexadecimal = digits.len() == 2 * size && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let bits = hexadecimal.then(|| u64::from_str_radix(digits, 16).ok())??;
    Some(bits.to_le_bytes().into_iter().take(size).collect())
}

/// The memory form of an element as it is stored in chunks.
fn stored(dtype: DType, endian: Endian, mut raw: Vec<u8>) -> Option<Vec<u8>> {
    if raw.len() != dtype.size() {
        return None;
    }
    if endian == Endian::Big {
        raw.chunks_exact_mut(dtype.swap_size()).for_each(<[u8]>::reverse);
    }
    canonical(dtype, &raw)
}

/// The memory form of a little-endian element: the meaningful bits, sign-extended for signed integers below a byte.
/// `None` for a bool other than 0 and 1.
fn canonical(dtype: DType, element: &[u8]) -> Option<Vec<u8>> {
    let &[byte] = element else {
        return Some(element.to_vec());
    };
    let unused = 8u32.saturating_sub(width(dtype));
    match dtype.class() {
        Class::Bool => (byte <= 1).then(|| vec![byte]),
        Class::Int(_) => Some(vec![((byte << unused).cast_signed() >> unused).cast_unsigned()]),
        _ => Some(vec![byte << unused >> unused]),
    }
}

/// Meaningful bits of an element of one byte.
const fn width(dtype: DType) -> u32 {
    match dtype.class() {
        Class::Int(bits) | Class::UInt(bits) => bits,
        _ => match dtype {
            DType::Float4E2M1FN => 4,
            DType::Float6E2M3FN | DType::Float6E3M2FN => 6,
            _ => 8,
        },
    }
}

/// Standard base64 with padding (RFC 4648, section 4).
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let (groups, rest) = text.as_bytes().as_chunks::<4>();
    if !rest.is_empty() {
        return None;
    }
    let mut raw = Vec::with_capacity(groups.len() * 3);
    for (index, group) in groups.iter().enumerate() {
        let padding = group.iter().rev().take_while(|byte| **byte == b'=').count();
        if padding > 2 || (padding > 0 && index + 1 < groups.len()) {
            return None;
        }
        let mut bits = 0u32;
        for (place, &byte) in group.iter().enumerate() {
            bits = bits << 6 | u32::from(if place < 4 - padding { digit(byte)? } else { 0 });
        }
        let [_, bytes @ ..] = bits.to_be_bytes();
        raw.extend(bytes.into_iter().take(3 - padding));
    }
    Some(raw)
}

fn unfit(dtype: DType, value: &Value) -> MetaError {
    MetaError::Malformed(format!("fill_value {} is no element of {dtype}", super::json::short(value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn integers_of_every_width_are_checked_for_range() {
        assert_eq!(parse_v3(DType::Int4, &json!(-8)), Ok(vec![0xf8]));
        assert!(parse_v3(DType::Int4, &json!(8)).is_err());
        assert_eq!(parse_v3(DType::UInt2, &json!(3)), Ok(vec![3]));
        assert_eq!(parse_v3(DType::Int16, &json!(-2)), Ok(vec![0xfe, 0xff]));
        assert_eq!(parse_v3(DType::UInt64, &json!(u64::MAX)), Ok(vec![0xff; 8]));
        assert_eq!(parse_v3(DType::Int64, &json!(i64::MIN)), Ok(i64::MIN.to_le_bytes().to_vec()));
        assert!(parse_v3(DType::Int64, &json!(u64::MAX)).is_err());
        assert_eq!(parse_v3(DType::Int32, &json!(5.0)), Ok(vec![5, 0, 0, 0]));
        assert!(parse_v3(DType::Int32, &json!(5.5)).is_err());
        assert!(parse_v3(DType::UInt8, &json!(-1)).is_err());
        assert!(parse_v3(DType::Int32, &json!("NaN")).is_err());
        assert!(parse_v3(DType::Int32, &json!(null)).is_err());
    }

    #[test]
    fn floats_have_names_and_bits() {
        let f32 = |bits: u32| Ok(bits.to_le_bytes().to_vec());
        assert_eq!(parse_v3(DType::Float32, &json!(1.5)), f32(0x3fc0_0000));
        assert_eq!(parse_v3(DType::Float32, &json!(-0.0)), f32(0x8000_0000));
        assert_eq!(parse_v3(DType::Float32, &json!("NaN")), f32(0x7fc0_0000));
        assert_eq!(parse_v3(DType::Float32, &json!("-Infinity")), f32(0xff80_0000));
        assert_eq!(parse_v3(DType::Float32, &json!("0x7fC00001")), f32(0x7fc0_0001));
        assert_eq!(parse_v3(DType::BFloat16, &json!("0x7fc1")), Ok(vec![0xc1, 0x7f]));
        assert_eq!(parse_v3(DType::Float8E5M2, &json!("0x7f")), Ok(vec![0x7f]));
        assert!(parse_v3(DType::Float4E2M1FN, &json!("0x10")).is_err());
        for unfit in ["0x7fc0", "0x+fc00000", "0xg0000000", "0x", "nan", "AADAfw=="] {
            assert!(parse_v3(DType::Float32, &json!(unfit)).is_err(), "{unfit}");
        }
        assert_eq!(parse_v3(DType::Float64, &json!(0.1)), Ok(0.1f64.to_le_bytes().to_vec()));
    }

    #[test]
    fn complex_values_are_pairs() {
        let expected = Ok([1.5f32.to_le_bytes(), f32::INFINITY.to_le_bytes()].concat());
        assert_eq!(parse_v2(DType::Complex64, Endian::Little, &json!([1.5, "Infinity"])), expected);
        assert_eq!(parse_v3(DType::Complex64, &json!(["0x3fc00000", "Infinity"])), expected);
        assert!(parse_v3(DType::Complex64, &json!([1.0])).is_err());
        assert_eq!(parse_v2(DType::Complex128, Endian::Big, &json!(0)), Ok(vec![0; 16]));
    }

    #[test]
    fn other_text_in_version_2_is_the_stored_element() {
        assert_eq!(parse_v2(DType::Float32, Endian::Little, &json!("AADAfw==")), Ok(vec![0, 0, 0xc0, 0x7f]));
        assert_eq!(parse_v2(DType::Float32, Endian::Big, &json!("f8AAAA==")), Ok(vec![0, 0, 0xc0, 0x7f]));
        assert_eq!(parse_v2(DType::Int4, Endian::Little, &json!("Dw==")), Ok(vec![0xff]));
        assert!(parse_v2(DType::Bool, Endian::Little, &json!("Dw==")).is_err());
        for unfit in ["", "AADAfw=", "AADA====", "A===", "AA=Afw==", "AADAfwAA", "AAD*fw=="] {
            assert!(parse_v2(DType::Float32, Endian::Little, &json!(unfit)).is_err(), "{unfit}");
        }
        assert_eq!(parse_v2(DType::Bool, Endian::Little, &json!(true)), Ok(vec![1]));
        assert_eq!(parse_v2(DType::Bool, Endian::Little, &json!(1)), Ok(vec![1]));
        assert_eq!(parse_v2(DType::Int16, Endian::Little, &Value::Null), Ok(vec![0, 0]));
    }

    /// Codes from ml_dtypes 0.6: 0, -0, 1, -1, NaN, inf, -inf, 1e30, -1e30, 1e-30, -1e-30, 1.01 max.
    #[test]
    fn small_floats_round_as_ml_dtypes_does() {
        const VALUES: [f64; 11] =
            [0.0, -0.0, 1.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e30, -1e30, 1e-30, -1e-30];
        let check = |dtype, codes: [u8; 11], largest: f64, at_largest: u8, beyond: u8| {
            let found = VALUES.map(|value| encode_float(dtype, value)[0]);
            assert_eq!(found, codes, "{dtype}");
            assert_eq!(encode_float(dtype, largest), [at_largest], "{dtype}");
            assert_eq!(encode_float(dtype, largest * 1.01), [at_largest], "{dtype}");
            assert_eq!(encode_float(dtype, largest * 1.2), [beyond], "{dtype}");
        };
        let e2m1 = [0x00, 0x08, 0x02, 0x0a, 0x08, 0x07, 0x0f, 0x07, 0x0f, 0x00, 0x08];
        check(DType::Float4E2M1FN, e2m1, 6.0, 0x07, 0x07);
        let e2m3 = [0x00, 0x20, 0x08, 0x28, 0x20, 0x1f, 0x3f, 0x1f, 0x3f, 0x00, 0x20];
        check(DType::Float6E2M3FN, e2m3, 7.5, 0x1f, 0x1f);
        let e3m2 = [0x00, 0x20, 0x0c, 0x2c, 0x20, 0x1f, 0x3f, 0x1f, 0x3f, 0x00, 0x20];
        check(DType::Float6E3M2FN, e3m2, 28.0, 0x1f, 0x1f);
        let e3m4 = [0x00, 0x80, 0x30, 0xb0, 0x78, 0x70, 0xf0, 0x70, 0xf0, 0x00, 0x80];
        check(DType::Float8E3M4, e3m4, 15.5, 0x6f, 0x70);
        let e4m3 = [0x00, 0x80, 0x38, 0xb8, 0x7c, 0x78, 0xf8, 0x78, 0xf8, 0x00, 0x80];
        check(DType::Float8E4M3, e4m3, 240.0, 0x77, 0x78);
        let e4m3fn = [0x00, 0x80, 0x38, 0xb8, 0x7f, 0x7f, 0xff, 0x7f, 0xff, 0x00, 0x80];
        check(DType::Float8E4M3FN, e4m3fn, 448.0, 0x7e, 0x7f);
        let e4m3fnuz = [0x00, 0x00, 0x40, 0xc0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00, 0x00];
        check(DType::Float8E4M3FNUZ, e4m3fnuz, 240.0, 0x7f, 0x80);
        let e4m3b11 = [0x00, 0x00, 0x58, 0xd8, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00, 0x00];
        check(DType::Float8E4M3B11FNUZ, e4m3b11, 30.0, 0x7f, 0x80);
        let e5m2 = [0x00, 0x80, 0x3c, 0xbc, 0x7e, 0x7c, 0xfc, 0x7c, 0xfc, 0x00, 0x80];
        check(DType::Float8E5M2, e5m2, 57344.0, 0x7b, 0x7c);
        let e5m2fnuz = [0x00, 0x00, 0x40, 0xc0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00, 0x00];
        check(DType::Float8E5M2FNUZ, e5m2fnuz, 57344.0, 0x7f, 0x80);
        for (value, code) in [
            (0.0, 0x00),
            (-1.0, 0xff),
            (f64::NAN, 0xff),
            (f64::INFINITY, 0xff),
            (1.0, 0x7f),
            (1.4, 0x7f),
            (1.5, 0x80),
            (3.0, 0x81),
            (1e30, 0xe3),
            (1e-30, 0x1b),
            (1e-39, 0x00),
            (2.5e38, 0xfe),
            (2.6e38, 0xff),
        ] {
            assert_eq!(encode_float(DType::Float8E8M0FNU, value), [code], "{value}");
        }
    }

    /// Every finite code of float8_e4m3fn encodes to itself, and a value between two codes to the nearer or even one.
    #[test]
    fn neighbours_are_found_by_rounding() {
        let decode = |code: u8| {
            let (exponent, mantissa) = (i32::from(code >> 3), f64::from(code & 7));
            if exponent == 0 { mantissa * power(-9) } else { (8.0 + mantissa) * power(exponent - 10) }
        };
        for code in 0..0x7eu8 {
            let (this, next) = (decode(code), decode(code + 1));
            assert_eq!(encode_float(DType::Float8E4M3FN, this), [code]);
            let middle = f64::midpoint(this, next);
            assert_eq!(encode_float(DType::Float8E4M3FN, middle), [code + (code & 1)]);
            assert_eq!(encode_float(DType::Float8E4M3FN, -middle.next_up()), [(code + 1) | 0x80]);
            assert_eq!(encode_float(DType::Float8E4M3FN, middle.next_down()), [code]);
        }
    }
}
