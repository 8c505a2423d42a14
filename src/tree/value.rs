//! Leaves that are values: numbers, bools, strings.

use crate::dtype::{CastPolicy, Class, DType};
use crate::error::{Error, Result};
use crate::transform::cpu::convert;

/// A scalar or string leaf.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A bool.
    Bool(bool),
    /// An integer of any width.
    Int(i128),
    /// A floating-point number.
    Float(f64),
    /// A complex number: real and imaginary part.
    Complex(f64, f64),
    /// A string.
    Text(String),
}

/// The Python type that a scalar target asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ScalarType {
    Bool,
    Int,
    Float,
}

macro_rules! from_numbers {
    ($($rust:ty => $variant:ident;)+) => {$(
        impl From<$rust> for Value {
            fn from(value: $rust) -> Self {
                Self::$variant(value.into())
            }
        }
    )+};
}

from_numbers! {
    bool => Bool;
    i32 => Int;
    i64 => Int;
    u64 => Int;
    f32 => Float;
    f64 => Float;
}

impl Value {
    /// The value of one stored element, in memory form.
    ///
    /// # Errors
    /// Never for elements of the right size.
    pub fn from_element(dtype: DType, element: &[u8]) -> Result<Self> {
        let as_type = |to: DType, out: &mut [u8]| {
            convert(dtype, to, CastPolicy::Saturate, element, out).map_err(|error| Error::corrupt(error.to_string()))
        };
        let mut wide = [0; 16];
        Ok(match dtype.class() {
            Class::Bool => Self::Bool(element.first().is_some_and(|byte| *byte != 0)),
            Class::Int(_) => {
                as_type(DType::Int64, &mut wide[..8])?;
                Self::Int(i128::from(i64::from_le_bytes(first_eight(&wide))))
            }
            Class::UInt(_) => {
                as_type(DType::UInt64, &mut wide[..8])?;
                Self::Int(i128::from(u64::from_le_bytes(first_eight(&wide))))
            }
            Class::Float => {
                as_type(DType::Float64, &mut wide[..8])?;
                Self::Float(f64::from_le_bytes(first_eight(&wide)))
            }
            Class::Complex => {
                as_type(DType::Complex128, &mut wide)?;
                let imaginary = first_eight(&[wide[8..].as_ref(), &[0; 8]].concat());
                Self::Complex(f64::from_le_bytes(first_eight(&wide)), f64::from_le_bytes(imaginary))
            }
        })
    }

    /// The value as another Python scalar type, by Python's own rules: `int()` truncates and refuses NaN and infinities,
    /// `float()` rounds, `bool()` is "not zero".
    ///
    /// # Errors
    /// A string, a complex number, or a float that has no integer.
    pub fn convert(&self, to: ScalarType) -> Result<Self> {
        let refused =
            |why: &str| Err(Error::invalid(format!("{why} cannot become {to:?}").to_lowercase()).found(self.json()));
        Ok(match (self, to) {
            (Self::Text(_), _) => return refused("a string"),
            (Self::Complex(..), _) => return refused("a complex number"),
            (Self::Bool(value), ScalarType::Int) => Self::Int(i128::from(*value)),
            (Self::Bool(value), ScalarType::Float) => Self::Float(f64::from(u8::from(*value))),
            (Self::Int(value), ScalarType::Bool) => Self::Bool(*value != 0),
            (Self::Int(value), ScalarType::Float) => Self::Float(*value as f64),
            (Self::Float(value), ScalarType::Bool) => Self::Bool(*value != 0.0),
            (Self::Float(value), ScalarType::Int) => {
                let whole = value.trunc();
                if !whole.is_finite() || whole.abs() >= 2f64.powi(126) {
                    return refused("a number without an integer value");
                }
                #[allow(clippy::cast_possible_truncation, reason = "it is whole and below 2^126")]
                Self::Int(whole as i128)
            }
            _ => self.clone(),
        })
    }

    /// The value as an element of this type holds it: floats are rounded, integers must fit.
    ///
    /// # Errors
    /// An integer beyond the type.
    pub fn fit(self, dtype: DType) -> Result<Self> {
        match (&self, dtype.class()) {
            (Self::Int(value), Class::Int(bits)) if !(-(1i128 << (bits - 1))..1i128 << (bits - 1)).contains(value) => {
                Err(Error::invalid(format!("the value does not fit {dtype}")).found(value))
            }
            (Self::Int(value), Class::UInt(bits)) if !(0..1i128 << bits).contains(value) => {
                Err(Error::invalid(format!("the value does not fit {dtype}")).found(value))
            }
            (Self::Float(value), Class::Float) => {
                let mut element = [0; 8];
                let element = &mut element[..dtype.size()];
                convert(DType::Float64, dtype, CastPolicy::Saturate, &value.to_le_bytes(), element)
                    .map_err(|error| Error::invalid(error.to_string()))?;
                Self::from_element(dtype, element)
            }
            _ => Ok(self),
        }
    }

    /// The JSON form: numbers as they are, `"NaN"`, `"Infinity"`, `"-Infinity"` as strings, complex as `[re, im]`.
    pub fn json(&self) -> serde_json::Value {
        let float = |value: f64| match value {
            value if value.is_nan() => "NaN".into(),
            f64::INFINITY => "Infinity".into(),
            f64::NEG_INFINITY => "-Infinity".into(),
            value => value.into(),
        };
        match self {
            Self::Bool(value) => (*value).into(),
            Self::Int(value) => match (i64::try_from(*value), u64::try_from(*value)) {
                (Ok(value), _) => value.into(),
                (_, Ok(value)) => value.into(),
                // Beyond 64 bits JSON readers disagree; the digits are exact.
                _ => value.to_string().into(),
            },
            Self::Float(value) => float(*value),
            Self::Complex(real, imaginary) => vec![float(*real), float(*imaginary)].into(),
            Self::Text(text) => text.as_str().into(),
        }
    }
}

fn first_eight(bytes: &[u8]) -> [u8; 8] {
    let mut eight = [0; 8];
    eight.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    eight
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_convert_as_python_does() {
        assert_eq!(Value::Float(-13.5).convert(ScalarType::Int).unwrap(), Value::Int(-13));
        assert_eq!(Value::Float(1e20).convert(ScalarType::Int).unwrap(), Value::Int(100_000_000_000_000_000_000));
        assert!(Value::Float(f64::NAN).convert(ScalarType::Int).is_err());
        assert_eq!(Value::Int((1 << 60) + 1).convert(ScalarType::Float).unwrap(), Value::Float(1.152921504606847e18));
        assert!(Value::Text("3".into()).convert(ScalarType::Int).is_err());
        assert_eq!(Value::from_element(DType::BFloat16, &[0x80, 0x3F]).unwrap(), Value::Float(1.0));
        assert_eq!(Value::from_element(DType::UInt64, &[0xFF; 8]).unwrap().json(), serde_json::json!(u64::MAX));
        assert_eq!(Value::from_element(DType::Int4, &[0xFF]).unwrap(), Value::Int(-1));
    }
}
