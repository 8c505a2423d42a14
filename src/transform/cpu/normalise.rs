//! Stored elements into memory form.

use super::cast::CastError;
use crate::dtype::DType;

/// Brings elements as a file stores them, one a byte where they are narrower, into memory form, in place.
///
/// Files may hold `int4` -1 as `0x0F` or `0xFF`; in memory it is `0xFF`. The bits above a sub-byte element are ignored,
/// as TensorStore ignores them: `int2` and `int4` are sign-extended, `uint2`, `uint4`, `float4` and `float6`
/// zero-extended. A bool other than 0 or 1 is an error, as in TensorStore. All other types are left alone.
pub fn normalise(dtype: DType, data: &mut [u8]) -> Result<(), CastError> {
    match dtype {
        DType::Bool => {
            let wrong = data.iter().enumerate().find(|(_, byte)| **byte > 1);
            return wrong.map_or(Ok(()), |(index, byte)| Err(CastError::BoolByte { index, byte: *byte }));
        }
        DType::Int2 => each(data, |byte| ((byte << 6) as i8 >> 6) as u8),
        DType::Int4 => each(data, |byte| ((byte << 4) as i8 >> 4) as u8),
        DType::UInt2 => each(data, |byte| byte & 0x03),
        DType::UInt4 | DType::Float4E2M1FN => each(data, |byte| byte & 0x0F),
        DType::Float6E2M3FN | DType::Float6E3M2FN => each(data, |byte| byte & 0x3F),
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn each(data: &mut [u8], rule: impl Fn(u8) -> u8) {
    data.iter_mut().for_each(|byte| *byte = rule(*byte));
}
