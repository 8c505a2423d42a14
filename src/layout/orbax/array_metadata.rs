//! `array_metadatas/process_<p>`: how each `jax.Array` was cut when it was saved, and whether it is a PRNG key.
//!
//! One file a process, all with the same content (`orbax/checkpoint/_src/metadata/array_metadata_store.py`); written since
//! early 2025. A reader needs only the key implementation: the chunk shapes are in the zarr metadata too.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::json::{self, JsonError};
use super::python::Doc;

/// What is recorded for one array.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArrayMetadata {
    /// The largest block that one writer stored.
    pub write_shape: Option<Vec<u64>>,
    /// The chunks' shape.
    pub chunk_shape: Option<Vec<u64>>,
    /// The implementation of a typed PRNG key (`threefry2x32`, `rbg`, `unsafe_rbg`), whose data is stored as uint32.
    pub random_key_impl: Option<String>,
}

/// Parses one file into the record of each parameter name.
///
/// # Errors
/// Bytes that are not of that form.
pub fn parse(bytes: &[u8]) -> Result<HashMap<String, ArrayMetadata>, JsonError> {
    let file: File = json::from_slice(bytes)?;
    let records = file.array_metadatas.into_iter().map(|Wrapper { array_metadata: raw }| {
        let random_key_impl = raw.ext_metadata.as_ref().and_then(|ext| ext.get("random_key_impl")?.as_str());
        let random_key_impl = random_key_impl.map(str::to_owned);
        (raw.param_name, ArrayMetadata { write_shape: raw.write_shape, chunk_shape: raw.chunk_shape, random_key_impl })
    });
    Ok(records.collect())
}

/// The bytes of one process's file, from the parameter names and their records in the tree's order.
pub fn to_bytes<'a>(records: impl IntoIterator<Item = (&'a str, &'a ArrayMetadata)>) -> Vec<u8> {
    let wrapped = records.into_iter().map(|(name, record)| {
        let shape = |shape: &Option<Vec<u64>>| Doc::or_null(shape.as_deref().map(Doc::sizes));
        let key = record.random_key_impl.as_deref().map(|key| Doc::object([("random_key_impl", Doc::text(key))]));
        let members = [
            ("param_name", Doc::text(name)),
            ("write_shape", shape(&record.write_shape)),
            ("chunk_shape", shape(&record.chunk_shape)),
            ("ext_metadata", Doc::or_null(key)),
        ];
        Doc::object([("array_metadata", Doc::object(members))])
    });
    Doc::object([("array_metadatas", Doc::List(wrapped.collect()))]).dumps().into_bytes()
}

#[derive(Deserialize)]
struct File {
    array_metadatas: Vec<Wrapper>,
}

#[derive(Deserialize)]
struct Wrapper {
    array_metadata: Raw,
}

#[derive(Deserialize)]
struct Raw {
    param_name: String,
    write_shape: Option<Vec<u64>>,
    chunk_shape: Option<Vec<u64>>,
    ext_metadata: Option<Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const REAL: &[u8] = br#"{"array_metadatas": [{"array_metadata": {"param_name": "k", "write_shape": [2], "chunk_shape": [2], "ext_metadata": {"random_key_impl": "threefry2x32"}}}, {"array_metadata": {"param_name": "raw", "write_shape": [2], "chunk_shape": [2], "ext_metadata": null}}]}"#;

    #[test]
    fn keys_are_told_from_arrays() {
        let records = parse(REAL).unwrap();
        assert_eq!(records["k"].random_key_impl.as_deref(), Some("threefry2x32"));
        assert_eq!(
            records["raw"],
            ArrayMetadata { write_shape: Some(vec![2]), chunk_shape: Some(vec![2]), random_key_impl: None }
        );
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        for end in 0..REAL.len() {
            assert!(parse(&REAL[..end]).is_err());
        }
    }

    #[test]
    fn a_real_file_is_written_as_it_was() {
        let records = parse(REAL).unwrap();
        let in_order = ["k", "raw"].map(|name| (name, &records[name]));
        assert_eq!(to_bytes(in_order), REAL);
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_read(names: std::collections::HashSet<String>, shape: Option<Vec<u64>>, key: Option<String>) {
            let record = |name: &String| ArrayMetadata {
                write_shape: shape.clone(),
                chunk_shape: Some(vec![name.len() as u64]),
                random_key_impl: key.clone(),
            };
            let records: HashMap<String, ArrayMetadata> = names.iter().map(|name| (name.clone(), record(name))).collect();
            let written = to_bytes(records.iter().map(|(name, record)| (name.as_str(), record)));
            proptest::prop_assert_eq!(parse(&written).unwrap(), records);
        }
    }
}
