//! Members of a metadata document, and the checks that both versions share.

use serde_json::{Map, Value};

use super::{Grid, MetaError};
use crate::dtype::DType;
use crate::limits::{RANK_MAX, ZARR_JSON_BYTES_MAX};
use crate::shape::byte_count;

/// Reads a document that must be a JSON object.
pub(super) fn document(json: &[u8]) -> Result<Map<String, Value>, MetaError> {
    if json.len() as u64 > ZARR_JSON_BYTES_MAX {
        return Err(MetaError::Size(format!(
            "metadata of {} bytes, at most {ZARR_JSON_BYTES_MAX} are read",
            json.len()
        )));
    }
    match serde_json::from_slice(json) {
        Ok(Value::Object(members)) => Ok(members),
        Ok(other) => Err(MetaError::Malformed(format!("metadata is no JSON object but {}", short(&other)))),
        Err(error) => Err(MetaError::Malformed(format!("metadata is no JSON: {error}"))),
    }
}

/// A member that must be there.
pub(super) fn member<'a>(members: &'a Map<String, Value>, name: &str) -> Result<&'a Value, MetaError> {
    members.get(name).ok_or_else(|| MetaError::Malformed(format!("member `{name}` is missing")))
}

/// A member that must be an object.
pub(super) fn object<'a>(value: &'a Value, name: &str) -> Result<&'a Map<String, Value>, MetaError> {
    value.as_object().ok_or_else(|| wrong(name, "an object", value))
}

/// A member that must be text.
pub(super) fn text<'a>(value: &'a Value, name: &str) -> Result<&'a str, MetaError> {
    value.as_str().ok_or_else(|| wrong(name, "text", value))
}

/// A member that must be a list.
pub(super) fn list<'a>(value: &'a Value, name: &str) -> Result<&'a [Value], MetaError> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| wrong(name, "a list", value))
}

/// A member that must be a list of at most [`RANK_MAX`] extents.
pub(super) fn extents(value: &Value, name: &str) -> Result<Vec<u64>, MetaError> {
    let values = list(value, name)?;
    if values.len() > RANK_MAX {
        return Err(MetaError::Size(format!("{name} has {} dimensions, at most {RANK_MAX} are read", values.len())));
    }
    values.iter().map(|value| value.as_u64().ok_or_else(|| wrong(name, "a list of extents", value))).collect()
}

/// A member that says which format version this is.
pub(super) fn version(members: &Map<String, Value>, expected: u64) -> Result<(), MetaError> {
    let value = member(members, "zarr_format")?;
    if value.as_u64() == Some(expected) { Ok(()) } else { Err(wrong("zarr_format", &expected.to_string(), value)) }
}

/// A member that separates the indices of a chunk's key.
pub(super) fn separator(value: &Value, name: &str) -> Result<char, MetaError> {
    match value.as_str() {
        Some("/") => Ok('/'),
        Some(".") => Ok('.'),
        _ => Err(wrong(name, "`/` or `.`", value)),
    }
}

/// The grid of an array, after checking that both the array and one chunk have sizes within the limits.
pub(super) fn grid(shape: &[u64], chunk_shape: Vec<u64>, dtype: DType, name: &str) -> Result<Grid, MetaError> {
    if chunk_shape.len() != shape.len() {
        let (chunk, array) = (chunk_shape.len(), shape.len());
        return Err(MetaError::Size(format!("{name} has {chunk} dimensions, the array has {array}")));
    }
    for (what, shape) in [("shape", shape), (name, &chunk_shape)] {
        if byte_count(shape, dtype.size()).is_none() {
            return Err(MetaError::Size(format!("{what} {shape:?} of {dtype} is too large")));
        }
    }
    let unfit = MetaError::Size(format!("{name} {chunk_shape:?} has an extent that is 0 or too large"));
    Grid::new(chunk_shape).ok_or(unfit)
}

/// A member of the wrong type or value.
pub(super) fn wrong(name: &str, expected: &str, found: &Value) -> MetaError {
    MetaError::Malformed(format!("{name}: expected {expected}, found {}", short(found)))
}

/// The beginning of a value's JSON, for messages.
pub(super) fn short(value: &Value) -> String {
    const CHARS_MAX: usize = 80;
    // A value may be as large as the document, so a long one is only named.
    let text = match value {
        Value::Array(values) if values.len() > CHARS_MAX => return format!("a list of {} values", values.len()),
        Value::Object(members) if members.len() > CHARS_MAX => {
            return format!("an object of {} members", members.len());
        }
        other => other.to_string(),
    };
    if text.chars().nth(CHARS_MAX).is_none() {
        return text;
    }
    text.chars().take(CHARS_MAX).chain("...".chars()).collect()
}
