//! Metadata of zarr version 3: the `zarr.json` document of an array.
//!
//! Sources: Zarr v3 core specification, "Array metadata"; the specifications of the codecs `transpose`, `bytes`,
//! `sharding_indexed`, `gzip`, `zstd`, `crc32c` and `blosc`.

use serde_json::{Map, Value};

use super::json::{document, extents, grid, list, member, object, separator, short, text, version, wrong};
use super::{ArrayMeta, ByteCodec, Chunk, ChunkKeys, Endian, IndexLocation, Layout, MetaError, Sharded, fill};
use crate::dtype::DType;
use crate::limits::{CODEC_CHAIN_MAX, INNER_CHUNKS_MAX, SHARDING_DEPTH_MAX};
use crate::shape::element_count;

/// Reads the `zarr.json` document of an array.
///
/// # Errors
/// [`MetaError::Malformed`] for bytes that are no such document, [`MetaError::Unsupported`] for data types, grids, codecs
/// and extensions that are not read, [`MetaError::Size`] for shapes beyond the limits or that contradict each other.
pub fn parse(json: &[u8]) -> Result<ArrayMeta, MetaError> {
    let members = document(json)?;
    version(&members, 3)?;
    let node_type = member(&members, "node_type")?;
    if node_type.as_str() != Some("array") {
        return Err(wrong("node_type", "`array`", node_type));
    }
    check_extensions(&members)?;
    let shape = extents(member(&members, "shape")?, "shape")?;
    let dtype = data_type(member(&members, "data_type")?)?;
    let chunk_shape = chunk_grid(member(&members, "chunk_grid")?)?;
    let grid = grid(&shape, chunk_shape, dtype, "chunk_shape")?;
    let layout = layout(list(member(&members, "codecs")?, "codecs")?, grid.chunk_shape(), dtype, 0)?;
    let fill = fill::parse_v3(dtype, member(&members, "fill_value")?)?;
    let keys = chunk_keys(member(&members, "chunk_key_encoding")?)?;
    Ok(ArrayMeta { shape, dtype, grid, layout, fill, keys })
}

/// An extension point: `{"name": .., "configuration": {..}}`, or the name alone.
struct Named<'a> {
    name: &'a str,
    configuration: Option<&'a Map<String, Value>>,
}

impl<'a> Named<'a> {
    fn new(value: &'a Value, what: &'static str) -> Result<Self, MetaError> {
        if let Some(name) = value.as_str() {
            return Ok(Self { name, configuration: None });
        }
        let members = object(value, what)?;
        let name = text(member(members, "name")?, what)?;
        let configuration = members.get("configuration").map(|value| object(value, "configuration")).transpose()?;
        Ok(Self { name, configuration })
    }

    /// A member of the configuration that may be missing.
    fn option(&self, name: &str) -> Option<&'a Value> {
        self.configuration?.get(name)
    }

    /// A member of the configuration that must be there.
    fn required(&self, name: &str) -> Result<&'a Value, MetaError> {
        let missing =
            || MetaError::Malformed(format!("member `{name}` of the configuration of `{}` is missing", self.name));
        self.option(name).ok_or_else(missing)
    }

    fn unsupported(&self, what: &'static str, supported: &'static str) -> MetaError {
        MetaError::Unsupported { what, found: self.name.chars().take(80).collect(), supported }
    }
}

/// Members that are not known must say that they need not be understood.
fn check_extensions(members: &Map<String, Value>) -> Result<(), MetaError> {
    if let Some(transformers) = members.get("storage_transformers")
        && !list(transformers, "storage_transformers")?.is_empty()
    {
        let found = short(transformers);
        return Err(MetaError::Unsupported { what: "storage_transformers", found, supported: "an empty list" });
    }
    for (name, value) in members {
        let optional = value.get("must_understand").and_then(Value::as_bool) == Some(false);
        if !MEMBERS.contains(&name.as_str()) && !optional {
            let found = name.chars().take(80).collect();
            return Err(MetaError::Unsupported { what: "member", found, supported: "the members of zarr 3.0" });
        }
    }
    Ok(())
}

fn data_type(value: &Value) -> Result<DType, MetaError> {
    let named = Named::new(value, "data_type")?;
    let known = DType::ALL.into_iter().find(|dtype| dtype.name() == named.name);
    known.ok_or_else(|| named.unsupported("data_type", DTYPES))
}

fn chunk_grid(value: &Value) -> Result<Vec<u64>, MetaError> {
    let named = Named::new(value, "chunk_grid")?;
    match named.name {
        "regular" => extents(named.required("chunk_shape")?, "chunk_shape"),
        _ => Err(named.unsupported("chunk_grid", "regular")),
    }
}

fn chunk_keys(value: &Value) -> Result<ChunkKeys, MetaError> {
    let named = Named::new(value, "chunk_key_encoding")?;
    let separator = |default| named.option("separator").map_or(Ok(default), |value| separator(value, "separator"));
    match named.name {
        "default" => Ok(ChunkKeys::Default { separator: separator('/')? }),
        "v2" => Ok(ChunkKeys::V2 { separator: separator('.')? }),
        _ => Err(named.unsupported("chunk_key_encoding", "default, v2")),
    }
}

/// How a chunk of this shape is stored.
fn layout(codecs: &[Value], chunk_shape: &[u64], dtype: DType, depth: usize) -> Result<Layout, MetaError> {
    let chain = Chain::new(codecs, chunk_shape.len())?;
    if chain.to_bytes.name != "sharding_indexed" {
        return chain.chunk(dtype).map(Layout::Plain);
    }
    if let Some(codec) = chain.codecs.first() {
        let found = format!("{} after sharding_indexed", codec.name());
        return Err(MetaError::Unsupported { what: "codec", found, supported: "codecs inside sharding_indexed" });
    }
    let stored_shape: Vec<u64> = chain.order.iter().filter_map(|dim| chunk_shape.get(*dim).copied()).collect();
    let inner_shape =
        inner_shape(extents(chain.to_bytes.required("chunk_shape")?, "inner chunk_shape")?, &stored_shape)?;
    if depth == SHARDING_DEPTH_MAX {
        return Err(MetaError::Size(format!("shards are nested deeper than {SHARDING_DEPTH_MAX}")));
    }
    let inner = list(chain.to_bytes.required("codecs")?, "inner codecs")?;
    let inner = layout(inner, &inner_shape, dtype, depth + 1)?;
    let (index_endian, index_crc32c) = index_codecs(list(chain.to_bytes.required("index_codecs")?, "index_codecs")?)?;
    let index_location = match chain.to_bytes.option("index_location") {
        None => IndexLocation::End,
        Some(value) => match value.as_str() {
            Some("end") => IndexLocation::End,
            Some("start") => IndexLocation::Start,
            _ => return Err(wrong("index_location", "`start` or `end`", value)),
        },
    };
    let counts = inner_shape.iter().zip(&stored_shape).map(|(inner, stored)| stored / inner).collect();
    let order = chain.order;
    Ok(Layout::Sharded(Box::new(Sharded {
        order,
        counts,
        inner_shape,
        inner,
        index_location,
        index_endian,
        index_crc32c,
    })))
}

/// The extents of an inner chunk, which must divide those of the chunk as it is stored.
fn inner_shape(inner_shape: Vec<u64>, stored_shape: &[u64]) -> Result<Vec<u64>, MetaError> {
    let divides = |(inner, stored): (&u64, &u64)| stored.checked_rem(*inner) == Some(0);
    if inner_shape.len() != stored_shape.len() || !inner_shape.iter().zip(stored_shape).all(divides) {
        return Err(MetaError::Size(format!(
            "inner chunk_shape {inner_shape:?} does not divide the chunk {stored_shape:?}"
        )));
    }
    let counts: Vec<u64> = inner_shape.iter().zip(stored_shape).map(|(inner, stored)| stored / inner).collect();
    match element_count(&counts) {
        Some(count) if count <= INNER_CHUNKS_MAX => Ok(inner_shape),
        _ => Err(MetaError::Size(format!("a chunk has {counts:?} inner chunks, at most {INNER_CHUNKS_MAX} are read"))),
    }
}

/// Byte order of an index, and whether a checksum follows it: the codecs must keep its length fixed.
fn index_codecs(codecs: &[Value]) -> Result<(Endian, bool), MetaError> {
    // The index is an array of u64 with one dimension more than the chunk; without `transpose` its rank does not matter.
    let chain = Chain::new(codecs, 0)?;
    let crc32c = match chain.codecs.as_slice() {
        [] => false,
        [ByteCodec::Crc32c] => true,
        [first, ..] => {
            let found = first.name().to_owned();
            return Err(MetaError::Unsupported { what: "index codec", found, supported: INDEX_CODECS });
        }
    };
    if chain.to_bytes.name != "bytes" || chain.transposed {
        let found = if chain.transposed { "transpose" } else { chain.to_bytes.name };
        return Err(MetaError::Unsupported { what: "index codec", found: found.to_owned(), supported: INDEX_CODECS });
    }
    Ok((endian(&chain.to_bytes, 8)?, crc32c))
}

/// A well formed codec chain: array to array, once array to bytes, bytes to bytes.
struct Chain<'a> {
    /// Stored dimension `i` is dimension `order[i]`.
    order: Vec<usize>,
    transposed: bool,
    /// `bytes` or `sharding_indexed`.
    to_bytes: Named<'a>,
    codecs: Vec<ByteCodec>,
}

impl<'a> Chain<'a> {
    fn new(codecs: &'a [Value], rank: usize) -> Result<Self, MetaError> {
        if codecs.len() > CODEC_CHAIN_MAX {
            return Err(MetaError::Size(format!(
                "a chain of {} codecs, at most {CODEC_CHAIN_MAX} are read",
                codecs.len()
            )));
        }
        let mut order: Vec<usize> = (0..rank).collect();
        let mut transposed = false;
        let mut to_bytes = None;
        let mut byte_codecs = Vec::new();
        for value in codecs {
            let codec = Named::new(value, "codec")?;
            match (codec.name, to_bytes.is_some()) {
                ("transpose", false) => {
                    let next = transpose(codec.required("order")?, rank)?;
                    order = next.iter().filter_map(|dim| order.get(*dim).copied()).collect();
                    transposed = true;
                }
                ("bytes" | "sharding_indexed", false) => to_bytes = Some(codec),
                ("transpose" | "bytes" | "sharding_indexed", true) => {
                    return Err(MetaError::Malformed(format!("codec `{}` after the array was made bytes", codec.name)));
                }
                (_, is_bytes) => {
                    let byte_codec = byte_codec(&codec)?;
                    if !is_bytes {
                        return Err(MetaError::Malformed(format!(
                            "codec `{}` before the array was made bytes",
                            codec.name
                        )));
                    }
                    byte_codecs.push(byte_codec);
                }
            }
        }
        let none = || MetaError::Malformed("the codecs have none that makes bytes of the array".to_owned());
        Ok(Self { order, transposed, to_bytes: to_bytes.ok_or_else(none)?, codecs: byte_codecs })
    }

    /// The chain of a chunk that is made bytes by `bytes`.
    fn chunk(self, dtype: DType) -> Result<Chunk, MetaError> {
        Ok(Chunk { endian: endian(&self.to_bytes, dtype.size())?, order: self.order, codecs: self.codecs })
    }
}

/// The codec by its name. Its configuration (level, blosc's inner codec) only matters when encoding.
fn byte_codec(codec: &Named<'_>) -> Result<ByteCodec, MetaError> {
    Ok(match codec.name {
        "zstd" => ByteCodec::Zstd,
        "gzip" => ByteCodec::Gzip,
        "crc32c" => ByteCodec::Crc32c,
        "blosc" => ByteCodec::Blosc,
        _ => return Err(codec.unsupported("codec", CODECS)),
    })
}

/// The byte order that a `bytes` codec states; elements of one byte need none.
fn endian(bytes: &Named<'_>, element_size: usize) -> Result<Endian, MetaError> {
    match bytes.option("endian") {
        None if element_size == 1 => Ok(Endian::Little),
        None => Err(MetaError::Malformed("member `endian` of the configuration of `bytes` is missing".to_owned())),
        Some(value) => match value.as_str() {
            Some("little") => Ok(Endian::Little),
            Some("big") => Ok(Endian::Big),
            _ => Err(wrong("endian", "`little` or `big`", value)),
        },
    }
}

/// A permutation of the dimensions, or `C` (none) or `F` (reversed) as earlier drafts had it.
fn transpose(value: &Value, rank: usize) -> Result<Vec<usize>, MetaError> {
    match value.as_str() {
        Some("C") => return Ok((0..rank).collect()),
        Some("F") => return Ok((0..rank).rev().collect()),
        _ => {}
    }
    let order: Vec<usize> = extents(value, "order")?.into_iter().filter_map(|dim| usize::try_from(dim).ok()).collect();
    let mut sorted = order.clone();
    sorted.sort_unstable();
    if sorted.into_iter().eq(0..rank) {
        Ok(order)
    } else {
        Err(wrong("order", "a permutation of the dimensions", value))
    }
}

const MEMBERS: [&str; 11] = [
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "fill_value",
    "attributes",
    "dimension_names",
    "storage_transformers",
];

const DTYPES: &str = "bool, integers, floats and complex numbers by their numpy and ml_dtypes names";

const CODECS: &str = "transpose, bytes, sharding_indexed, zstd, gzip, crc32c, blosc";

const INDEX_CODECS: &str = "bytes, then crc32c or nothing";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zarr::Grid;
    use proptest::prelude::*;
    use serde_json::json;

    const ORBAX: &[u8] = br#"{"chunk_grid":{"configuration":{"chunk_shape":[2,3]},"name":"regular"},"chunk_key_encoding":{"name":"default"},"codecs":[{"configuration":{"chunk_shape":[2,3],"codecs":[{"configuration":{"endian":"little"},"name":"bytes"},{"configuration":{"checksum":false,"level":3},"name":"zstd"}],"index_codecs":[{"configuration":{"endian":"little"},"name":"bytes"},{"name":"crc32c"}]},"name":"sharding_indexed"}],"data_type":"float32","fill_value":0.0,"node_type":"array","shape":[2,3],"zarr_format":3}"#;

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

    fn codecs(codecs: Value) -> Result<Layout, MetaError> {
        with(json!({"codecs": codecs})).map(|meta| meta.layout)
    }

    fn refused(result: Result<impl std::fmt::Debug, MetaError>, part: &str) {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part), "`{error}` does not say `{part}`");
    }

    fn bytes() -> Value {
        json!({"name": "bytes", "configuration": {"endian": "little"}})
    }

    fn sharding(inner_shape: Value, inner: Value) -> Value {
        let configuration = json!({"chunk_shape": inner_shape, "codecs": inner, "index_codecs": [bytes()]});
        json!({"name": "sharding_indexed", "configuration": configuration})
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
                layout: Layout::Sharded(Box::new(Sharded {
                    order: vec![0, 1],
                    counts: vec![1, 1],
                    inner_shape: vec![2, 3],
                    inner: Layout::Plain(Chunk {
                        order: vec![0, 1],
                        endian: Endian::Little,
                        codecs: vec![ByteCodec::Zstd],
                    }),
                    index_location: IndexLocation::End,
                    index_endian: Endian::Little,
                    index_crc32c: true,
                })),
                fill: vec![0; 4],
                keys: ChunkKeys::Default { separator: '/' },
            }
        );
        assert_eq!(meta.keys.key(&[0, 1]), "c/0/1");
        assert_eq!(meta.keys.key(&[]), "c");
    }

    #[test]
    fn elements_of_one_byte_need_no_byte_order() {
        let plain = json!({"codecs": [{"name": "bytes"}], "data_type": "int4", "fill_value": 0});
        let expected = Chunk { order: vec![0, 1], endian: Endian::Little, codecs: vec![] };
        assert_eq!(with(plain).unwrap().layout, Layout::Plain(expected));
        refused(codecs(json!([{"name": "bytes"}])), "`endian`");
        refused(codecs(json!([{"name": "bytes", "configuration": {"endian": "middle"}}])), "endian");
    }

    #[test]
    fn chains_are_read_in_order() {
        let crc = json!({"name": "crc32c"});
        let zstd = json!({"name": "zstd", "configuration": {"level": 0, "checksum": true}});
        let gzip = json!({"name": "gzip", "configuration": {"level": 5}});
        let Layout::Plain(chunk) = codecs(json!([bytes(), crc, zstd, gzip, {"name": "blosc"}, crc])).unwrap() else {
            panic!("not sharded");
        };
        let expected = [ByteCodec::Crc32c, ByteCodec::Zstd, ByteCodec::Gzip, ByteCodec::Blosc, ByteCodec::Crc32c];
        assert_eq!(chunk.codecs, expected);
        refused(codecs(json!([])), "none that makes bytes");
        refused(codecs(json!([zstd, bytes()])), "`zstd` before");
        refused(codecs(json!([bytes(), bytes()])), "`bytes` after");
        refused(
            codecs(json!([bytes(), {"name": "transpose", "configuration": {"order": [0, 1]}}])),
            "`transpose` after",
        );
        refused(codecs(json!([bytes(), {"name": "lzma"}])), "unsupported codec `lzma`");
        refused(codecs(json!(vec![crc; 10_000])), "10000 codecs");
        refused(codecs(json!({})), "codecs: expected a list");
    }

    #[test]
    fn transposes_compose() {
        let rank_3 = |codecs: Value| {
            let grid = json!({"name": "regular", "configuration": {"chunk_shape": [2, 3, 4]}});
            with(json!({"shape": [2, 3, 4], "chunk_grid": grid, "codecs": codecs})).map(|meta| meta.layout)
        };
        let transpose = |order: Value| json!({"name": "transpose", "configuration": {"order": order}});
        let order = |codecs| match rank_3(codecs).unwrap() {
            Layout::Plain(chunk) => chunk.order,
            Layout::Sharded(sharded) => sharded.order,
        };
        assert_eq!(order(json!([transpose(json!([2, 0, 1])), bytes()])), [2, 0, 1]);
        assert_eq!(order(json!([transpose(json!("F")), bytes()])), [2, 1, 0]);
        assert_eq!(order(json!([transpose(json!("C")), bytes()])), [0, 1, 2]);
        // [a, b, c] is stored as [c, a, b], and that reversed is [b, a, c].
        assert_eq!(order(json!([transpose(json!([2, 0, 1])), transpose(json!("F")), bytes()])), [1, 0, 2]);
        let inner = json!([transpose(json!([1, 0, 2])), bytes()]);
        let layout = rank_3(json!([transpose(json!([2, 0, 1])), sharding(json!([2, 2, 3]), inner)])).unwrap();
        let Layout::Sharded(sharded) = layout else { panic!("sharded") };
        let inner_order = sharded.inner.innermost().order.clone();
        assert_eq!((sharded.order, sharded.inner_shape, inner_order), (vec![2, 0, 1], vec![2, 2, 3], vec![1, 0, 2]));
        for unfit in [json!([0, 1]), json!([0, 0, 1]), json!([0, 1, 3]), json!("A"), json!([0, 1, 1u64 << 40])] {
            refused(rank_3(json!([transpose(unfit), bytes()])), "order");
        }
    }

    #[test]
    fn shards_must_be_of_the_known_kind() {
        let inner = || json!([bytes()]);
        let located = |location: &str| {
            let mut codec = sharding(json!([1, 3]), inner());
            codec["configuration"]["index_location"] = json!(location);
            codecs(json!([codec]))
        };
        assert!(
            matches!(located("start"), Ok(Layout::Sharded(sharded)) if sharded.index_location == IndexLocation::Start)
        );
        refused(located("middle"), "index_location");
        refused(codecs(json!([sharding(json!([2, 2]), inner())])), "does not divide");
        refused(codecs(json!([sharding(json!([2, 0]), inner())])), "does not divide");
        refused(codecs(json!([sharding(json!([2]), inner())])), "does not divide");
        let nested = sharding(json!([1, 3]), json!([sharding(json!([1, 1]), inner())]));
        let Layout::Sharded(outer) = codecs(json!([nested])).unwrap() else { panic!("sharded") };
        assert_eq!((outer.inner_count(), matches!(outer.inner, Layout::Sharded(_))), (2, true));
        let deep = (0..=SHARDING_DEPTH_MAX).fold(inner(), |inner, _| json!([sharding(json!([1, 1]), inner)]));
        refused(codecs(json!([sharding(json!([1, 1]), deep)])), "nested deeper");
        refused(codecs(json!([sharding(json!([1, 3]), inner()), {"name": "zstd"}])), "zstd after sharding_indexed");
        for (index, part) in [
            (json!([bytes(), {"name": "zstd"}]), "zstd"),
            (json!([bytes(), {"name": "crc32c"}, {"name": "crc32c"}]), "crc32c"),
            (json!([{"name": "bytes"}]), "endian"),
            (json!([sharding(json!([]), inner())]), "sharding_indexed"),
            (json!([{"name": "transpose", "configuration": {"order": []}}, bytes()]), "transpose"),
        ] {
            let mut codec = sharding(json!([1, 3]), inner());
            codec["configuration"]["index_codecs"] = index;
            refused(codecs(json!([codec])), part);
        }
        let wide = json!({"name": "regular", "configuration": {"chunk_shape": [1u64 << 20, 1u64 << 20]}});
        refused(with(json!({"chunk_grid": wide, "codecs": [sharding(json!([1, 1]), inner())]})), "inner chunks");
    }

    #[test]
    fn keys_are_spelt_as_stated() {
        let key = |encoding: Value| with(json!({"chunk_key_encoding": encoding})).map(|meta| meta.keys.key(&[1, 2]));
        assert_eq!(key(json!({"name": "default", "configuration": {"separator": "."}})).unwrap(), "c.1.2");
        assert_eq!(key(json!({"name": "v2"})).unwrap(), "1.2");
        assert_eq!(key(json!({"name": "v2", "configuration": {"separator": "/"}})).unwrap(), "1/2");
        assert_eq!(key(json!("default")).unwrap(), "c/1/2");
        refused(key(json!({"name": "hashed"})), "hashed");
        refused(key(json!({"name": "v2", "configuration": {"separator": ""}})), "separator");
    }

    #[test]
    fn unknown_members_must_be_optional() {
        let known = json!({
            "attributes": {"a": 1}, "dimension_names": ["x", null], "storage_transformers": [],
            "extra": {"must_understand": false},
        });
        assert_eq!(with(known), parse(ORBAX));
        refused(with(json!({"extra": {"must_understand": true}})), "unsupported member `extra`");
        refused(with(json!({"extra": 1})), "unsupported member `extra`");
        refused(with(json!({"storage_transformers": [{"name": "x"}]})), "storage_transformers");
        refused(with(json!({"node_type": "group"})), "node_type");
        refused(with(json!({"data_type": "r16"})), "unsupported data_type `r16`");
        refused(with(json!({"data_type": "f4"})), "unsupported data_type `f4`");
        refused(with(json!({"chunk_grid": {"name": "rectilinear"}})), "rectilinear");
        refused(with(json!({"shape": [2]})), "dimensions");
        for name in ["shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value", "node_type"] {
            refused(with(json!({format!("-{name}"): null})), &format!("`{name}` is missing"));
        }
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
