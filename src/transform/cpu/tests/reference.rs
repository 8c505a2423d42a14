//! The rules once more, one element at a time and by search: slow, and sharing nothing with the code under test.

use crate::dtype::{Class, DType};
use crate::transform::CastPolicy;

/// A real value: what every type but a complex one holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    Int(i128),
    Float(f64),
}

/// The type of a part, and how many parts an element has.
pub(super) fn parts_of(dtype: DType) -> (DType, usize) {
    match dtype {
        DType::Complex64 => (DType::Float32, 2),
        DType::Complex128 => (DType::Float64, 2),
        real => (real, 1),
    }
}

/// The value of a real element.
fn value(dtype: DType, bytes: &[u8]) -> Value {
    let mut wide = [0; 16];
    wide[..bytes.len()].copy_from_slice(bytes);
    let bits = i128::from_le_bytes(wide);
    match dtype.class() {
        Class::Bool | Class::UInt(_) => Value::Int(bits),
        Class::Int(width) => Value::Int(bits << (128 - width) >> (128 - width)),
        _ => Value::Float(decode(dtype, bytes)),
    }
}

/// Exponent bits, mantissa bits and bias of a float of at most 16 bits.
fn layout(dtype: DType) -> (u32, u32, i32) {
    match dtype {
        DType::Float4E2M1FN => (2, 1, 1),
        DType::Float6E2M3FN => (2, 3, 1),
        DType::Float6E3M2FN => (3, 2, 3),
        DType::Float8E3M4 => (3, 4, 3),
        DType::Float8E4M3 | DType::Float8E4M3FN => (4, 3, 7),
        DType::Float8E4M3FNUZ => (4, 3, 8),
        DType::Float8E4M3B11FNUZ => (4, 3, 11),
        DType::Float8E5M2 => (5, 2, 15),
        DType::Float8E5M2FNUZ => (5, 2, 16),
        DType::Float16 => (5, 10, 15),
        DType::BFloat16 => (8, 7, 127),
        other => panic!("{other} has no layout"),
    }
}

fn is_fnuz(dtype: DType) -> bool {
    matches!(dtype, DType::Float8E4M3FNUZ | DType::Float8E4M3B11FNUZ | DType::Float8E5M2FNUZ)
}

fn is_finite_only(dtype: DType) -> bool {
    matches!(dtype, DType::Float4E2M1FN | DType::Float6E2M3FN | DType::Float6E3M2FN)
}

/// The value of a float element.
pub(super) fn decode(dtype: DType, bytes: &[u8]) -> f64 {
    match *bytes {
        [code] if dtype == DType::Float8E8M0FNU => {
            if code == 255 {
                f64::NAN
            } else {
                2f64.powi(i32::from(code) - 127)
            }
        }
        [code] => decode_code(dtype, u32::from(code)),
        [a, b] => decode_code(dtype, u32::from(u16::from_le_bytes([a, b]))),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).into(),
        _ => f64::from_le_bytes(bytes.try_into().unwrap()),
    }
}

fn decode_code(dtype: DType, code: u32) -> f64 {
    let (exponent_bits, mantissa_bits, bias) = layout(dtype);
    let sign = 1 << (exponent_bits + mantissa_bits);
    let (negative, magnitude) = (code & sign != 0, code & (sign - 1));
    let (exponent, mantissa) = (magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1));
    let top = exponent == (1 << exponent_bits) - 1;
    let fraction = f64::from(mantissa) / f64::from(1 << mantissa_bits);
    let ieee = !is_fnuz(dtype) && !is_finite_only(dtype) && dtype != DType::Float8E4M3FN;
    let size = match () {
        () if dtype == DType::Float8E4M3FN && magnitude == sign - 1 => f64::NAN,
        () if is_fnuz(dtype) && code == sign => f64::NAN,
        () if ieee && top && mantissa == 0 => f64::INFINITY,
        () if ieee && top => f64::NAN,
        () if exponent == 0 => fraction * 2f64.powi(1 - bias),
        () => (1.0 + fraction) * 2f64.powi(exponent as i32 - bias),
    };
    size.copysign(if negative { -1.0 } else { 1.0 })
}

/// What one element becomes, and whether that is lossy.
pub(super) struct Reference {
    from: DType,
    to: DType,
    policy: CastPolicy,
    /// The non-negative finite values of the target in code order, if it is a float of at most 16 bits.
    values: Vec<f64>,
}

impl Reference {
    pub(super) fn new(from: DType, to: DType, policy: CastPolicy) -> Self {
        let narrow = to.is_float() && to.size() <= 2 && to != DType::Float8E8M0FNU;
        let codes = if narrow { 1 << (layout(to).0 + layout(to).1) } else { 0 };
        let values = (0..codes).map(|code| decode_code(to, code)).take_while(|value| value.is_finite()).collect();
        Self { from, to, policy, values }
    }

    pub(super) fn cast(&self, element: &[u8]) -> (Vec<u8>, bool) {
        let (from, from_parts) = parts_of(self.from);
        let (to, to_parts) = parts_of(self.to);
        let part = |index: usize| match index < from_parts {
            true => value(from, &element[index * from.size()..][..from.size()]),
            false => Value::Int(0),
        };
        let dropped = from_parts > to_parts && !matches!(part(1), Value::Float(0.0));
        let (mut bytes, mut lossy) = self.cast_real(to, part(0));
        if to_parts == 2 {
            let (imaginary, lossy_too) = self.cast_real(to, part(1));
            bytes.extend(imaginary);
            lossy |= lossy_too;
        }
        (bytes, lossy | dropped)
    }

    fn cast_real(&self, to: DType, value: Value) -> (Vec<u8>, bool) {
        match (to.class(), value) {
            (Class::Bool, Value::Int(value)) => (vec![u8::from(value != 0)], false),
            (Class::Bool, Value::Float(value)) => (vec![u8::from(value != 0.0)], false),
            (Class::Int(_) | Class::UInt(_), value) => self.cast_to_int(to, value),
            _ => self.cast_to_float(to, value),
        }
    }

    fn cast_to_int(&self, to: DType, value: Value) -> (Vec<u8>, bool) {
        let (low, high) = range(to);
        let wrap = |value: i128| {
            let value = value.rem_euclid(high - low + 1);
            if value > high { value - (high - low + 1) } else { value }
        };
        let (result, lossy) = match value {
            Value::Int(value) => (wrap(value), wrap(value) != value),
            Value::Float(value) if value.is_nan() => (0, true),
            Value::Float(value) => {
                let whole = value.trunc();
                let inside = whole >= low as f64 && whole < (high + 1) as f64;
                let result = match self.policy {
                    CastPolicy::Wrap if whole.is_infinite() => 0,
                    CastPolicy::Wrap => wrap((whole % 2f64.powi(64)) as i128),
                    _ => (whole as i128).clamp(low, high),
                };
                (result, !inside || (result == 0 && value != 0.0))
            }
        };
        (result.to_le_bytes()[..to.size()].to_vec(), lossy)
    }

    fn cast_to_float(&self, to: DType, value: Value) -> (Vec<u8>, bool) {
        let single = match value {
            Value::Int(value) => f64::from(value as f32),
            Value::Float(value) => f64::from(value as f32),
        };
        let exact = match value {
            Value::Int(value) => value as f64,
            Value::Float(value) => value,
        };
        let (bytes, saturated) = match to {
            DType::Float64 => (exact.to_le_bytes().to_vec(), false),
            DType::Float32 => ((single as f32).to_le_bytes().to_vec(), false),
            DType::Float16 | DType::BFloat16 => self.nearest(single),
            DType::Float8E8M0FNU => (vec![nearest_power(single)], single > 0.0 && single < 0.75 * 2f64.powi(-127)),
            _ if matches!(value, Value::Int(_)) => self.nearest(single),
            _ => self.nearest(exact),
        };
        let result = decode(to, &bytes);
        let lossy = saturated
            || (exact.is_finite() && !result.is_finite())
            || (exact.is_infinite() && result.is_finite())
            || (exact != 0.0 && result == 0.0);
        (bytes, lossy)
    }

    /// The nearest code, ties to even, and whether a finite value was clamped to the largest.
    fn nearest(&self, value: f64) -> (Vec<u8>, bool) {
        let to = self.to;
        let (exponent_bits, mantissa_bits, _) = layout(to);
        let sign = 1u32 << (exponent_bits + mantissa_bits);
        let count = self.values.len();
        let largest = self.values[count - 1];
        let size = value.abs();
        let below = self.values.partition_point(|value| *value <= size).max(1) - 1;
        let above = self.values.get(below + 1).copied().unwrap_or(2.0 * largest - self.values[count - 2]);
        let up = match (size - self.values[below]).partial_cmp(&(above - size)) {
            Some(std::cmp::Ordering::Equal) => below % 2 == 1,
            order => order == Some(std::cmp::Ordering::Greater),
        };
        let code = below + usize::from(up);
        let past = code == count || size.is_infinite();
        let infinite = match () {
            () if is_fnuz(to) => sign,
            () if is_finite_only(to) => sign - 1,
            () => count as u32,
        };
        let nan = match () {
            () if is_fnuz(to) || is_finite_only(to) => sign,
            () => sign - 1,
        };
        let code = match () {
            () if value.is_nan() => nan,
            () if past => infinite,
            () => code as u32,
        };
        let signless = is_fnuz(to) && (code == 0 || code == sign);
        let code = if value.is_sign_negative() && !signless { code ^ sign } else { code };
        (code.to_le_bytes()[..to.size()].to_vec(), past && is_finite_only(to))
    }
}

/// `float8_e8m0fnu`, by value.
fn nearest_power(value: f64) -> u8 {
    if value.is_nan() || value <= 0.0 || value >= 1.5 * 2f64.powi(127) {
        return 255;
    }
    if value < 2f64.powi(-126) {
        return u8::from(value > 2f64.powi(-127));
    }
    let exponent = (-126..=127).rev().find(|exponent| 2f64.powi(*exponent) <= value).unwrap();
    let up = value >= 1.5 * 2f64.powi(exponent);
    (exponent + 127 + i32::from(up)) as u8
}

/// The smallest and largest value of an integer type.
fn range(dtype: DType) -> (i128, i128) {
    match dtype.class() {
        Class::Int(bits) => (-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
        Class::UInt(bits) => (0, (1 << bits) - 1),
        class => panic!("{dtype} is {class:?}"),
    }
}

/// Whether C++ leaves this cast undefined: a float whose truncation the integer cannot hold.
pub(super) fn out_of_range(from: DType, to: DType, element: &[u8]) -> bool {
    let (part, _) = parts_of(from);
    match value(part, &element[..part.size()]) {
        Value::Float(value) if to.is_int() => {
            let (low, high) = range(to);
            !(value.trunc() >= low as f64 && value.trunc() < (high + 1) as f64)
        }
        _ => false,
    }
}
