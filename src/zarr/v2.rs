//! Metadata of zarr version 2: the `.zarray` document.
//!
//! Source: Zarr v2 specification, "Metadata"; data types by their bare ml_dtypes names as TensorStore writes them.

use serde_json::{Map, Value};

use super::json::{document, extents, grid, list, member, object, separator, short, text, version, wrong};
use super::{ArrayMeta, ByteCodec, Chunk, ChunkKeys, Endian, Layout, MetaError, fill};
use crate::dtype::DType;

/// Reads a `.zarray` document.
///
/// # Errors
/// [`MetaError::Malformed`] for bytes that are no such document, [`MetaError::Unsupported`] for filters, structured and
/// other data types and unknown compressors, [`MetaError::Size`] for shapes beyond the limits.
pub fn parse(json: &[u8]) -> Result<ArrayMeta, MetaError> {
    let members = document(json)?;
    version(&members, 2)?;
    let shape = extents(member(&members, "shape")?, "shape")?;
    let (dtype, endian) = data_type(member(&members, "dtype")?)?;
    let grid = grid(&shape, extents(member(&members, "chunks")?, "chunks")?, dtype, "chunks")?;
    check_filters(&members)?;
    let codecs = compressor(member(&members, "compressor")?)?.into_iter().collect();
    let order = order(member(&members, "order")?, shape.len())?;
    let fill = fill::parse_v2(dtype, endian, members.get("fill_value").unwrap_or(&Value::Null))?;
    let separator =
        members.get("dimension_separator").map_or(Ok('.'), |value| separator(value, "dimension_separator"))?;
    let layout = Layout::Plain(Chunk { order, endian, codecs });
    Ok(ArrayMeta { shape, dtype, grid, layout, fill, keys: ChunkKeys::V2 { separator } })
}

/// `<f4`, `|b1`, or a bare ml_dtypes name, which is little-endian.
fn data_type(value: &Value) -> Result<(DType, Endian), MetaError> {
    let unsupported = || MetaError::Unsupported { what: "dtype", found: short(value), supported: DTYPES };
    let name = match value {
        Value::String(name) => name.as_str(),
        Value::Array(_) => return Err(unsupported()),
        _ => return Err(wrong("dtype", "text", value)),
    };
    if let Some(dtype) = DType::ALL.into_iter().find(|dtype| numpy_code(*dtype).is_none() && dtype.name() == name) {
        return Ok((dtype, Endian::Little));
    }
    let Some((order, code)) = name.split_at_checked(1) else {
        return Err(unsupported());
    };
    let dtype = DType::ALL.into_iter().find(|dtype| numpy_code(*dtype) == Some(code)).ok_or_else(unsupported)?;
    match order {
        "<" => Ok((dtype, Endian::Little)),
        ">" => Ok((dtype, Endian::Big)),
        "|" if dtype.size() == 1 => Ok((dtype, Endian::Little)),
        _ => Err(unsupported()),
    }
}

/// Kind and size as numpy spells them; `None` for the types that only ml_dtypes has.
pub(super) const fn numpy_code(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::Bool => "b1",
        DType::Int8 => "i1",
        DType::Int16 => "i2",
        DType::Int32 => "i4",
        DType::Int64 => "i8",
        DType::UInt8 => "u1",
        DType::UInt16 => "u2",
        DType::UInt32 => "u4",
        DType::UInt64 => "u8",
        DType::Float16 => "f2",
        DType::Float32 => "f4",
        DType::Float64 => "f8",
        DType::Complex64 => "c8",
        DType::Complex128 => "c16",
        _ => return None,
    })
}

/// The compressor by its `id`. Its other members (level, blosc's inner codec) only matter when encoding.
fn compressor(value: &Value) -> Result<Option<ByteCodec>, MetaError> {
    if value.is_null() {
        return Ok(None);
    }
    let id = text(member(object(value, "compressor")?, "id")?, "compressor id")?;
    Ok(Some(match id {
        "zstd" => ByteCodec::Zstd,
        "gzip" => ByteCodec::Gzip,
        "zlib" => ByteCodec::Zlib,
        "bz2" => ByteCodec::Bz2,
        "blosc" => ByteCodec::Blosc,
        _ => {
            let found = id.chars().take(80).collect();
            return Err(MetaError::Unsupported { what: "compressor", found, supported: COMPRESSORS });
        }
    }))
}

/// Stored dimension order of a chunk.
fn order(value: &Value, rank: usize) -> Result<Vec<usize>, MetaError> {
    match value.as_str() {
        Some("C") => Ok((0..rank).collect()),
        Some("F") => Ok((0..rank).rev().collect()),
        _ => Err(wrong("order", "`C` or `F`", value)),
    }
}

/// No filter is known.
fn check_filters(members: &Map<String, Value>) -> Result<(), MetaError> {
    match members.get("filters") {
        None | Some(Value::Null) => Ok(()),
        Some(filters) if list(filters, "filters")?.is_empty() => Ok(()),
        Some(filters) => {
            Err(MetaError::Unsupported { what: "filters", found: short(filters), supported: "null or an empty list" })
        }
    }
}

const DTYPES: &str = "numpy codes of booleans, integers, floats and complex numbers such as <f4, |b1; \
                      bfloat16, int4, float8_e4m3fn and the other ml_dtypes names";

const COMPRESSORS: &str = "null, zstd, gzip, zlib, bz2, blosc";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zarr::Grid;
    use proptest::prelude::*;
    use serde_json::json;

    const ORBAX: &[u8] = br#"{"chunks":[2,3],"compressor":{"id":"zstd","level":1},"dimension_separator":".","dtype":"<f4","fill_value":null,"filters":null,"order":"C","shape":[2,3],"zarr_format":2}"#;

    /// The Orbax document with one member changed (or removed, by `null` of a name that starts with `-`).
    fn with(changes: Value) -> Result<ArrayMeta, MetaError> {
        let mut document: Value = serde_json::from_slice(ORBAX).unwrap();
        for (name, value) in changes.as_object().unwrap() {
            match name.strip_prefix('-') {
                Some(name) => drop(document.as_object_mut().unwrap().remove(name)),
                None => document[name] = value.clone(),
            }
        }
        parse(document.to_string().as_bytes())
    }

    fn chunk(meta: ArrayMeta) -> Chunk {
        match meta.layout {
            Layout::Plain(chunk) => chunk,
            Layout::Sharded { .. } => panic!("version 2 has no shards"),
        }
    }

    #[test]
    fn what_orbax_writes_is_read() {
        let meta = parse(ORBAX).unwrap();
        assert_eq!(
            meta,
            ArrayMeta {
                shape: vec![2, 3],
                dtype: DType::Float32,
                grid: Grid::new(vec![2, 3]).unwrap(),
                layout: Layout::Plain(Chunk {
                    order: vec![0, 1],
                    endian: Endian::Little,
                    codecs: vec![ByteCodec::Zstd]
                }),
                fill: vec![0; 4],
                keys: ChunkKeys::V2 { separator: '.' },
            }
        );
        assert_eq!(meta.keys.key(&[0, 1]), "0.1");
        let scalar = with(json!({"shape": [], "chunks": [], "compressor": null})).unwrap();
        assert_eq!(scalar.keys.key(&[]), "0");
        assert_eq!(chunk(scalar), Chunk { order: vec![], endian: Endian::Little, codecs: vec![] });
    }

    #[test]
    fn older_and_foreign_documents_are_read() {
        for (id, codec) in [
            ("zstd", ByteCodec::Zstd),
            ("gzip", ByteCodec::Gzip),
            ("zlib", ByteCodec::Zlib),
            ("bz2", ByteCodec::Bz2),
            ("blosc", ByteCodec::Blosc),
        ] {
            let compressor = json!({"id": id, "level": 9, "cname": "lz4", "shuffle": -1, "blocksize": 0});
            assert_eq!(chunk(with(json!({"compressor": compressor})).unwrap()).codecs, [codec]);
        }
        assert_eq!(chunk(with(json!({"order": "F"})).unwrap()).order, [1, 0]);
        let slashes = with(json!({"dimension_separator": "/", "filters": []})).unwrap();
        assert_eq!(slashes.keys.key(&[3, 4]), "3/4");
        assert_eq!(with(json!({"-dimension_separator": null})).unwrap().keys, ChunkKeys::V2 { separator: '.' });
        let big = with(json!({"dtype": ">f4", "fill_value": 1.5})).unwrap();
        assert_eq!(big.fill, 1.5f32.to_le_bytes());
        assert_eq!(chunk(big).endian, Endian::Big);
    }

    #[test]
    fn every_data_type_has_one_name() {
        for (name, dtype) in [
            ("|b1", DType::Bool),
            ("|i1", DType::Int8),
            ("<u8", DType::UInt64),
            ("<f2", DType::Float16),
            ("<c8", DType::Complex64),
            (">c16", DType::Complex128),
            ("bfloat16", DType::BFloat16),
            ("int4", DType::Int4),
            ("float8_e4m3b11fnuz", DType::Float8E4M3B11FNUZ),
        ] {
            assert_eq!(with(json!({"dtype": name})).unwrap().dtype, dtype);
        }
        for name in ["", "<", "f4", "float32", "|f4", "<f3", "<V4", "<U4", "|O", "<M8[ns]", "bf16", "é4"] {
            let error = with(json!({"dtype": name})).unwrap_err();
            assert!(matches!(error, MetaError::Unsupported { what: "dtype", .. }), "{name}: {error}");
        }
        assert!(matches!(with(json!({"dtype": [["x", "<f4"]]})), Err(MetaError::Unsupported { .. })));
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        let refused = |changes: Value, part: &str| {
            let error = with(changes).unwrap_err().to_string();
            assert!(error.contains(part), "`{error}` does not say `{part}`");
        };
        refused(json!({"filters": [{"id": "delta"}]}), "delta");
        refused(json!({"compressor": {"id": "lzma"}}), "unsupported compressor `lzma`");
        refused(json!({"compressor": "zstd"}), "compressor: expected an object");
        refused(json!({"zarr_format": 3}), "zarr_format: expected 2, found 3");
        refused(json!({"order": "A"}), "order");
        refused(json!({"dimension_separator": "-"}), "dimension_separator");
        refused(json!({"chunks": [2]}), "chunks has 1 dimensions, the array has 2");
        refused(json!({"chunks": [2, 0]}), "chunks [2, 0]");
        refused(json!({"chunks": [2, 1u64 << 60]}), "too large");
        refused(json!({"shape": [u64::MAX, 3]}), "too large");
        refused(json!({"shape": [-1, 3]}), "shape");
        refused(json!({"shape": vec![0; 33], "chunks": vec![1; 33]}), "33 dimensions");
        refused(json!({"fill_value": "x"}), "fill_value");
        for name in ["shape", "chunks", "dtype", "compressor", "order", "zarr_format"] {
            refused(json!({format!("-{name}"): null}), &format!("`{name}` is missing"));
        }
        assert!(matches!(parse(b"[]"), Err(MetaError::Malformed(_))));
        assert!(matches!(parse(&[b'['; 1000]), Err(MetaError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn damaged_documents_are_read_or_refused(at in 0..ORBAX.len(), byte: u8, cut in 0..ORBAX.len()) {
            let mut bytes = ORBAX.to_vec();
            bytes[at] = byte;
            let _ = parse(&bytes);
            prop_assert!(parse(&ORBAX[..cut]).is_err());
        }
    }
}
