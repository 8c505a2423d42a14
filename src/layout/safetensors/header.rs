//! The header of a safetensors file: names, types, shapes and byte ranges.
//!
//! ```text
//! offset  bytes
//! 0       8      n, u64 little-endian, at most 100,000,000
//! 8       n      JSON, first byte `{`, may end in spaces:
//!                {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, .., "__metadata__": {..}}
//! 8 + n   ..     the buffer that the offsets count from; covered by the tensors without holes or overlap
//! ```
//!
//! The checks are those of the reference implementation (`safetensors/src/tensor.rs`, `Metadata::validate`): a file that
//! passes has no byte that two tensors claim, and none that nobody does.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::dtype::DType;
use crate::limits::{LEAVES_MAX, RANK_MAX, SAFETENSORS_HEADER_BYTES_MAX};

/// A parsed header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where the tensors' bytes begin in the file.
    pub data_start: u64,
    /// The tensors, in the header's order.
    pub tensors: Vec<Tensor>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// One tensor. Its elements are little-endian, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its extents, slowest dimension first.
    pub shape: Vec<u64>,
    /// Its first byte, counted from the start of the file.
    pub offset: u64,
    /// Its size in bytes.
    pub len: u64,
}

/// Why a header cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The file ends before the header does.
    #[error("the file of {size} bytes ends inside its header, which needs {needed}")]
    Short {
        /// Bytes that the header needs.
        needed: u64,
        /// Bytes in the file.
        size: u64,
    },
    /// A header above the limit.
    #[error("a header of {0} bytes, more than {SAFETENSORS_HEADER_BYTES_MAX}")]
    Large(u64),
    /// The header does not begin with `{`.
    #[error("the header does not begin with {{")]
    Start,
    /// Not JSON, or a member is missing or of the wrong type.
    #[error("{message}")]
    Json {
        /// What the parser says.
        message: String,
        /// The byte of the file at which it stopped.
        offset: u64,
    },
    /// A name that occurs twice.
    #[error("the tensor `{0}` is described twice")]
    Duplicate(String),
    /// A type that the format does not have.
    #[error("the tensor `{tensor}` has the unknown dtype `{dtype}`")]
    DType {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// A shape beyond the limits.
    #[error("the tensor `{tensor}` has the impossible shape {shape:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Offsets that do not fit the shape and the type.
    #[error("the tensor `{tensor}` takes the bytes {begin}..{end}, its shape and dtype need {needed}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Its first byte in the buffer.
        begin: u64,
        /// The byte after its last.
        end: u64,
        /// Its size by shape and type.
        needed: u64,
    },
    /// A tensor that does not begin where the one before ends.
    #[error("the tensor `{tensor}` begins at byte {begin} of the buffer, the one before ends at {expected}")]
    Coverage {
        /// The tensor.
        tensor: String,
        /// Where it begins.
        begin: u64,
        /// Where it should.
        expected: u64,
    },
    /// A buffer of another size than the tensors need.
    #[error("the tensors need a file of {needed} bytes, it has {size}")]
    FileSize {
        /// Bytes that the tensors and the header need.
        needed: u64,
        /// Bytes in the file.
        size: u64,
    },
}

impl HeaderError {
    /// The byte at which the parser stopped, where it is known.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Json { offset, .. } => Some(*offset),
            Self::Start => Some(8),
            Self::Short { .. } | Self::Large(_) => Some(0),
            _ => None,
        }
    }
}

/// The length of the JSON, from the first bytes of a file of this size.
///
/// # Errors
/// A file without room for its header, or a header above the limit.
pub fn length(head: &[u8], size: u64) -> Result<u64, HeaderError> {
    let Some((length, _)) = head.split_first_chunk::<8>() else { return Err(HeaderError::Short { needed: 8, size }) };
    let length = u64::from_le_bytes(*length);
    if length > SAFETENSORS_HEADER_BYTES_MAX {
        return Err(HeaderError::Large(length));
    }
    let needed = 8 + length;
    if needed > size {
        return Err(HeaderError::Short { needed, size });
    }
    Ok(length)
}

/// Parses a header from the first bytes of a file of this size; `head` must reach to the header's end.
///
/// # Errors
/// See [`HeaderError`].
pub fn parse(head: &[u8], size: u64) -> Result<Header, HeaderError> {
    let length = length(head, size)?;
    let data_start = 8 + length;
    let end = usize::try_from(data_start).ok();
    let Some(json) = end.and_then(|end| head.get(8..end)) else {
        return Err(HeaderError::Short { needed: data_start, size: head.len() as u64 });
    };
    if json.first() != Some(&b'{') {
        return Err(HeaderError::Start);
    }
    let Members(members) = serde_json::from_slice(json).map_err(|error| HeaderError::Json {
        // The header is one line, nearly always: the column is the offset.
        offset: 8 + if error.line() == 1 { error.column() as u64 } else { 0 },
        message: error.to_string(),
    })?;
    let mut metadata = None;
    let mut tensors = Vec::with_capacity(members.len());
    let mut names = HashSet::with_capacity(members.len());
    for (name, member) in members {
        if !names.insert(name.clone()) {
            return Err(HeaderError::Duplicate(name));
        }
        match member {
            Member::Metadata(map) => metadata = Some(map),
            Member::Tensor(raw) => tensors.push(tensor(name, raw, data_start)?),
        }
    }
    check_coverage(&tensors, data_start, size)?;
    Ok(Header { data_start, tensors, metadata: metadata.unwrap_or_default() })
}

/// The bits that one element takes in a file, where that is less than a byte; elements are then packed without gaps.
pub const fn packed_bits(dtype: DType) -> Option<u32> {
    match dtype {
        DType::Float4E2M1FN => Some(4),
        DType::Float6E2M3FN | DType::Float6E3M2FN => Some(6),
        _ => None,
    }
}

/// The element type with this name in a header.
pub fn dtype_from_name(name: &str) -> Option<DType> {
    DTYPES.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype)
}

/// The name in a header; `None` for a type that the format does not have.
pub fn dtype_name(dtype: DType) -> Option<&'static str> {
    DTYPES.iter().find(|(_, known)| *known == dtype).map(|(name, _)| *name)
}

/// The bytes that an array takes in a file; `None` if it is too large or its packed elements fill no whole bytes.
pub fn stored_bytes(dtype: DType, shape: &[u64]) -> Option<u64> {
    let bits = packed_bits(dtype).map_or(8 * dtype.size() as u64, u64::from);
    let bits = shape.iter().try_fold(bits, |bits, &extent| bits.checked_mul(extent));
    bits.filter(|bits| shape.len() <= RANK_MAX && bits % 8 == 0).map(|bits| bits / 8)
}

/// The place of a type in the format's own order, from narrow to wide elements.
pub(super) fn order(dtype: DType) -> Option<usize> {
    DTYPES.iter().position(|(_, known)| *known == dtype)
}

impl Header {
    /// The tensors sorted by name.
    pub fn sorted(&self) -> Vec<&Tensor> {
        let mut sorted: Vec<&Tensor> = self.tensors.iter().collect();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        sorted
    }
}

fn tensor(name: String, raw: RawTensor, data_start: u64) -> Result<Tensor, HeaderError> {
    let RawTensor { dtype, shape, data_offsets: [begin, end] } = raw;
    let Some(dtype) = dtype_from_name(&dtype) else { return Err(HeaderError::DType { tensor: name, dtype }) };
    let Some(needed) = stored_bytes(dtype, &shape) else {
        return Err(HeaderError::Shape { tensor: name, shape });
    };
    match (end.checked_sub(begin), data_start.checked_add(begin)) {
        (Some(len), Some(offset)) if len == needed => Ok(Tensor { name, dtype, shape, offset, len }),
        _ => Err(HeaderError::Length { tensor: name, begin, end, needed }),
    }
}

/// Checks that the tensors cover the buffer: each begins where the one before ends, and the last ends with the file.
fn check_coverage(tensors: &[Tensor], data_start: u64, size: u64) -> Result<(), HeaderError> {
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by_key(|tensor| (tensor.offset, tensor.len));
    let mut end = data_start;
    for tensor in order {
        if tensor.offset != end {
            let (begin, expected) = (tensor.offset - data_start, end - data_start);
            return Err(HeaderError::Coverage { tensor: tensor.name.clone(), begin, expected });
        }
        end = tensor.offset.saturating_add(tensor.len);
    }
    if end == size { Ok(()) } else { Err(HeaderError::FileSize { needed: end, size }) }
}

/// The members of the header in their order, duplicates included.
struct Members(Vec<(String, Member)>);

enum Member {
    Tensor(RawTensor),
    Metadata(BTreeMap<String, String>),
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one member a tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if members.len() == LEAVES_MAX {
                        return Err(serde::de::Error::custom(format_args!("more than {LEAVES_MAX} tensors")));
                    }
                    let member = match name.as_str() {
                        METADATA => Member::Metadata(map.next_value()?),
                        _ => Member::Tensor(map.next_value()?),
                    };
                    members.push((name, member));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

pub(super) const METADATA: &str = "__metadata__";

/// The format's types, in its own order. `F8_E4M3` is what ml_dtypes calls `float8_e4m3fn`.
const DTYPES: [(&str, DType); 22] = [
    ("BOOL", DType::Bool),
    ("F4", DType::Float4E2M1FN),
    ("F6_E2M3", DType::Float6E2M3FN),
    ("F6_E3M2", DType::Float6E3M2FN),
    ("U8", DType::UInt8),
    ("I8", DType::Int8),
    ("F8_E5M2", DType::Float8E5M2),
    ("F8_E4M3", DType::Float8E4M3FN),
    ("F8_E8M0", DType::Float8E8M0FNU),
    ("F8_E4M3FNUZ", DType::Float8E4M3FNUZ),
    ("F8_E5M2FNUZ", DType::Float8E5M2FNUZ),
    ("I16", DType::Int16),
    ("U16", DType::UInt16),
    ("F16", DType::Float16),
    ("BF16", DType::BFloat16),
    ("I32", DType::Int32),
    ("U32", DType::UInt32),
    ("F32", DType::Float32),
    ("C64", DType::Complex64),
    ("F64", DType::Float64),
    ("I64", DType::Int64),
    ("U64", DType::UInt64),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The header of a real file, written by the reference implementation.
    const REAL: &str = r#"{"__metadata__":{"format":"np","note":"hé"},"b":{"dtype":"I64","shape":[5],"data_offsets":[0,40]},"s":{"dtype":"F64","shape":[],"data_offsets":[40,48]},"a.weight":{"dtype":"F32","shape":[3,4],"data_offsets":[48,96]},"e":{"dtype":"F32","shape":[0,3],"data_offsets":[96,96]},"bf":{"dtype":"BF16","shape":[3],"data_offsets":[96,102]}}      "#;

    fn read(json: &str, data: u64) -> Result<Header, HeaderError> {
        let head = [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
        parse(&head, head.len() as u64 + data)
    }

    fn one(dtype: &str, shape: &str, offsets: &str, data: u64) -> Result<Header, HeaderError> {
        read(&format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), data)
    }

    #[test]
    fn a_real_header_is_read_in_its_order() {
        let header = read(REAL, 102).unwrap();
        assert_eq!(header.data_start, 8 + REAL.len() as u64);
        let names: Vec<_> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["b", "s", "a.weight", "e", "bf"]);
        assert_eq!(header.sorted()[0].name, "a.weight");
        assert_eq!(header.metadata["note"], "hé");
        let bf = &header.tensors[4];
        assert_eq!((bf.dtype, bf.offset, bf.len), (DType::BFloat16, header.data_start + 96, 6));
    }

    #[test]
    fn every_dtype_has_its_size() {
        for (name, dtype) in DTYPES {
            let bytes = 8 * packed_bits(dtype).map_or(8 * dtype.size() as u64, u64::from) / 8;
            let header = one(name, "[8]", &format!("[0,{bytes}]"), bytes).unwrap();
            assert_eq!(header.tensors[0].dtype, dtype);
            assert_eq!(dtype_name(dtype), Some(name));
        }
        assert!(matches!(one("I4", "[2]", "[0,1]", 1), Err(HeaderError::DType { dtype, .. }) if dtype == "I4"));
        assert!(matches!(one("F4", "[3]", "[0,2]", 2), Err(HeaderError::Shape { .. })), "12 bits are no whole bytes");
        assert_eq!(dtype_name(DType::Int4), None);
    }

    #[test]
    fn holes_overlaps_and_wrong_sizes_are_refused() {
        let two = |a: &str, b: &str, data| {
            let tensor = |offsets| format!(r#"{{"dtype":"U8","shape":[4],"data_offsets":{offsets}}}"#);
            read(&format!(r#"{{"a":{},"b":{}}}"#, tensor(a), tensor(b)), data)
        };
        assert!(two("[4,8]", "[0,4]", 8).is_ok());
        assert!(matches!(two("[0,4]", "[5,9]", 9), Err(HeaderError::Coverage { begin: 5, expected: 4, .. })));
        assert!(matches!(two("[0,4]", "[3,7]", 7), Err(HeaderError::Coverage { begin: 3, expected: 4, .. })));
        assert!(matches!(two("[0,4]", "[0,4]", 4), Err(HeaderError::Coverage { .. })));
        assert!(matches!(two("[1,5]", "[5,9]", 9), Err(HeaderError::Coverage { begin: 1, expected: 0, .. })));
        assert!(matches!(two("[0,4]", "[4,8]", 9), Err(HeaderError::FileSize { .. })));
        assert!(matches!(two("[0,4]", "[4,8]", 7), Err(HeaderError::FileSize { .. })));
        assert!(matches!(one("U8", "[4]", "[0,5]", 5), Err(HeaderError::Length { needed: 4, .. })));
        assert!(matches!(one("U8", "[4]", "[4,0]", 4), Err(HeaderError::Length { .. })));
    }

    #[test]
    fn overflow_is_an_error_not_a_wrap() {
        let max = u64::MAX;
        assert!(matches!(one("F32", &format!("[{max},{max}]"), "[0,4]", 4), Err(HeaderError::Shape { .. })));
        assert!(matches!(one("U8", "[2305843009213693952]", "[0,0]", 0), Err(HeaderError::Shape { .. })));
        assert!(matches!(one("U8", "[1]", &format!("[{},{max}]", max - 1), 1), Err(HeaderError::Length { .. })));
        assert!(matches!(one("U8", "[-1]", "[0,1]", 1), Err(HeaderError::Json { .. })));
        assert!(matches!(one("U8", &format!("[{}1]", "1,".repeat(32)), "[0,1]", 1), Err(HeaderError::Shape { .. })));
    }

    #[test]
    fn names_are_distinct() {
        let tensor = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
        assert_eq!(read(&format!(r#"{{"a":{tensor},"a":{tensor}}}"#), 0), Err(HeaderError::Duplicate("a".into())));
        let metadata = r#"{"__metadata__":{},"__metadata__":{}}"#;
        assert_eq!(read(metadata, 0), Err(HeaderError::Duplicate("__metadata__".into())));
    }

    #[test]
    fn lengths_at_the_extremes() {
        assert_eq!(parse(&[], 0), Err(HeaderError::Short { needed: 8, size: 0 }));
        assert_eq!(parse(&u64::MAX.to_le_bytes(), 8), Err(HeaderError::Large(u64::MAX)));
        assert_eq!(parse(&100_000_000_u64.to_le_bytes(), 8), Err(HeaderError::Short { needed: 100_000_008, size: 8 }));
        assert_eq!(parse(&[0; 8], 8), Err(HeaderError::Start));
        assert_eq!(read("[]", 0), Err(HeaderError::Start));
        assert_eq!(read(" {}", 0), Err(HeaderError::Start));
        assert_eq!(read("{}  ", 0).unwrap().tensors, []);
        assert!(matches!(read("{} x", 0), Err(HeaderError::Json { offset: 12, .. })));
        assert!(matches!(read(&format!(r#"{{"a":{}"#, "[".repeat(100_000)), 0), Err(HeaderError::Json { .. })));
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        let head = [&(REAL.len() as u64).to_le_bytes(), REAL.as_bytes()].concat();
        for end in 0..head.len() {
            assert!(parse(&head[..end], end as u64).is_err(), "{end}");
            assert!(parse(&head[..end], head.len() as u64 + 102).is_err(), "{end}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_return(bytes: Vec<u8>, size: u64) {
            let _ = parse(&bytes, size);
            let _ = read(&String::from_utf8_lossy(&bytes), size >> 8);
        }

        /// Whatever is accepted covers the buffer exactly once.
        #[test]
        fn accepted_tensors_partition_the_buffer(cuts in proptest::collection::vec(0_u64..20, 0..6), shift in 0_u64..3) {
            let mut at = shift;
            let mut members = Vec::new();
            for (index, len) in cuts.iter().enumerate() {
                members.push(format!(r#""{index}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{at},{}]}}"#, at + len));
                at += len;
            }
            let header = read(&format!("{{{}}}", members.join(",")), at);
            prop_assert_eq!(header.is_ok(), shift == 0, "{:?}", header);
            if let Ok(header) = header {
                prop_assert_eq!(header.tensors.iter().map(|tensor| tensor.len).sum::<u64>(), at);
            }
        }
    }
}
