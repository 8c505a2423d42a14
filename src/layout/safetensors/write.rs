//! The heads of new safetensors files, and the index and names of several.
//!
//! The order is that of the reference implementation (`safetensors/src/tensor.rs`, `prepare`): the types of widest
//! elements first, then by name, so that every tensor is aligned to its own element. The header is padded with spaces
//! like there, but further: the data begin at a page, so that they can be written and read past the page cache, and mapped.
//!
//! Must not know: where the data come from.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};

use super::header::{Header, METADATA, Tensor, dtype_name, order, stored_bytes};
use super::index::Index;
use crate::dtype::DType;
use crate::error::{Error, counted};
use crate::limits::{LEAVES_MAX, SAFETENSORS_DATA_ALIGN, SAFETENSORS_FILES_MAX, SAFETENSORS_HEADER_BYTES_MAX};

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its extents, slowest dimension first.
    pub shape: Vec<u64>,
}

/// A file that is to be written: `head`, then the tensors' bytes without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// What a reader parses out of `head`. The tensors are in the order of their bytes.
    pub header: Header,
    /// The first bytes of the file, up to `header.data_start`.
    pub head: Vec<u8>,
    /// The size of the file in bytes.
    pub size: u64,
}

/// One thing that keeps tensors from being written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unwritable {
    /// An element type that the format does not have.
    #[error("`{name}` is {dtype}, which safetensors cannot store")]
    DType {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: DType,
    },
    /// A shape beyond the limits, or packed elements that fill no whole bytes.
    #[error("`{name}` has the shape {shape:?}, which is too large or fills no whole bytes")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Two tensors of one name.
    #[error("two tensors have the name `{0}`")]
    Duplicate(String),
    /// `__metadata__`, which is no tensor in a header.
    #[error("no tensor can have the name `{METADATA}`")]
    Reserved,
    /// More tensors than a reader takes.
    #[error("{0} tensors are more than {LEAVES_MAX}")]
    ManyTensors(usize),
    /// All the data of a file together are too large.
    #[error("the data are larger than a file can be")]
    LargeData,
    /// A header above the format's limit.
    #[error("the header has {0} bytes, more than {SAFETENSORS_HEADER_BYTES_MAX}")]
    LargeHeader(u64),
}

/// Lays out one file: the order of the tensors, their offsets, the header. Parsing `head` gives `header`.
///
/// # Errors
/// Everything that keeps the tensors from being written.
pub fn new_file(tensors: Vec<NewTensor>, metadata: BTreeMap<String, String>) -> Result<NewFile, Vec<Unwritable>> {
    let mut problems = unwritable(&tensors);
    let mut placed = place(tensors);
    let size =
        |begin: u64| placed.last().map_or(Some(begin), |last| last.offset.checked_add(last.len)?.checked_add(begin));
    if size(0)
        .and_then(|data| data.checked_add(SAFETENSORS_HEADER_BYTES_MAX))
        .is_none_or(|size| i64::try_from(size).is_err())
    {
        problems.push(Unwritable::LargeData);
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let head = head(&placed, &metadata)?;
    let data_start = head.len() as u64;
    let size = size(data_start).ok_or_else(|| vec![Unwritable::LargeData])?;
    for tensor in &mut placed {
        tensor.offset = tensor.offset.saturating_add(data_start);
    }
    Ok(NewFile { header: Header { data_start, tensors: placed, metadata }, head, size })
}

/// Everything that was found as one error, a line each.
pub fn refused(problems: &[Unwritable]) -> Error {
    Error::invalid(format!("the tensors cannot be written for {}", counted(problems.len(), "reason", "reasons")))
        .lines(problems.iter().map(ToString::to_string))
        .hint("cast what safetensors cannot store, or leave it out")
}

/// The name of one of several files, counted from 1, as Hugging Face names them; `model.safetensors` if there is one.
pub fn file_name(number: usize, count: usize) -> String {
    match count {
        0 | 1 => "model.safetensors".to_owned(),
        _ => format!("model-{number:05}-of-{count:05}.safetensors"),
    }
}

/// The bytes of the index of these files, as Hugging Face writes it. `total_size` is the bytes of all tensors.
///
/// # Errors
/// More files than a reader takes: their number.
pub fn index_bytes(index: &Index, total_size: u64) -> Result<Vec<u8>, usize> {
    let files = index.files().len();
    if files > SAFETENSORS_FILES_MAX {
        return Err(files);
    }
    let index = json!({"metadata": {"total_size": total_size}, "weight_map": index.weight_map});
    Ok(format!("{index:#}\n").into_bytes())
}

fn unwritable(tensors: &[NewTensor]) -> Vec<Unwritable> {
    let mut problems = Vec::new();
    if tensors.len() > LEAVES_MAX {
        problems.push(Unwritable::ManyTensors(tensors.len()));
    }
    let mut names = HashSet::with_capacity(tensors.len());
    for NewTensor { name, dtype, shape } in tensors {
        if name == METADATA {
            problems.push(Unwritable::Reserved);
        }
        if !names.insert(name) {
            problems.push(Unwritable::Duplicate(name.clone()));
        }
        if dtype_name(*dtype).is_none() {
            problems.push(Unwritable::DType { name: name.clone(), dtype: *dtype });
        } else if stored_bytes(*dtype, shape).is_none() {
            problems.push(Unwritable::Shape { name: name.clone(), shape: shape.clone() });
        }
    }
    problems
}

/// The tensors in their order, one behind the other from offset 0. Overflowing offsets stop at the largest number.
fn place(mut tensors: Vec<NewTensor>) -> Vec<Tensor> {
    tensors.sort_by(|a, b| order(b.dtype).cmp(&order(a.dtype)).then_with(|| a.name.cmp(&b.name)));
    let mut offset = 0_u64;
    let place = |NewTensor { name, dtype, shape }| {
        let len = stored_bytes(dtype, &shape).unwrap_or(0);
        let tensor = Tensor { name, dtype, shape, offset, len };
        offset = offset.saturating_add(len);
        tensor
    };
    tensors.into_iter().map(place).collect()
}

/// The length, the JSON and its padding.
fn head(tensors: &[Tensor], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, Vec<Unwritable>> {
    let mut members = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        members.push(format!("{}:{}", Value::from(METADATA), json!(metadata)));
    }
    for Tensor { name, dtype, shape, offset, len } in tensors {
        let (name, dtype, shape) = (Value::from(name.as_str()), json!(dtype_name(*dtype)), json!(shape));
        let end = offset.saturating_add(*len);
        members.push(format!(r#"{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":[{offset},{end}]}}"#));
    }
    let json = format!("{{{}}}", members.join(","));
    let length = (8 + json.len() as u64).next_multiple_of(SAFETENSORS_DATA_ALIGN) - 8;
    // The padding alone must not make a header too large.
    let length = if length > SAFETENSORS_HEADER_BYTES_MAX { (json.len() as u64).next_multiple_of(8) } else { length };
    if length > SAFETENSORS_HEADER_BYTES_MAX {
        return Err(vec![Unwritable::LargeHeader(length)]);
    }
    let mut head = length.to_le_bytes().to_vec();
    head.extend(json.into_bytes());
    while (head.len() as u64) < 8 + length {
        head.push(b' ');
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{header, index};
    use super::*;

    fn tensor(name: &str, dtype: DType, shape: &[u64]) -> NewTensor {
        NewTensor { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    /// The order and the offsets of a real file, written by the reference implementation.
    #[test]
    fn the_order_is_that_of_the_reference() {
        let tensors = vec![
            tensor("e", DType::Float32, &[0, 3]),
            tensor("a.weight", DType::Float32, &[3, 4]),
            tensor("bf", DType::BFloat16, &[3]),
            tensor("s", DType::Float64, &[]),
            tensor("b", DType::Int64, &[5]),
        ];
        let file = new_file(tensors, BTreeMap::new()).unwrap();
        let start = file.header.data_start;
        let placed: Vec<_> =
            file.header.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.offset - start)).collect();
        assert_eq!(placed, [("b", 0), ("s", 40), ("a.weight", 48), ("e", 96), ("bf", 96)]);
        assert_eq!((start % SAFETENSORS_DATA_ALIGN, file.size), (0, start + 102));
    }

    #[test]
    fn everything_that_cannot_be_written_is_told() {
        let max = u64::MAX;
        let problems = new_file(
            vec![
                tensor("a", DType::Int4, &[1]),
                tensor("b", DType::Float32, &[max, max]),
                tensor("c", DType::Float4E2M1FN, &[3]),
                tensor("d", DType::UInt8, &[max / 16]),
                tensor("d", DType::Bool, &[max / 16]),
                tensor("__metadata__", DType::Bool, &[1]),
            ],
            BTreeMap::new(),
        )
        .unwrap_err();
        let shape = |name: &str, shape: &[u64]| Unwritable::Shape { name: name.to_owned(), shape: shape.to_vec() };
        let expected = [
            Unwritable::DType { name: "a".into(), dtype: DType::Int4 },
            shape("b", &[max, max]),
            shape("c", &[3]),
            Unwritable::Duplicate("d".into()),
            Unwritable::Reserved,
        ];
        assert_eq!(problems, expected);
        assert!(refused(&problems).to_string().contains("for 5 reasons"));
        let large = (0..9).map(|index| tensor(&index.to_string(), DType::UInt8, &[max / 16])).collect();
        assert_eq!(new_file(large, BTreeMap::new()), Err(vec![Unwritable::LargeData]));
        let long = vec![tensor(&"n".repeat(100_000_001), DType::UInt8, &[0])];
        assert!(matches!(new_file(long, BTreeMap::new()).unwrap_err()[..], [Unwritable::LargeHeader(_)]));
    }

    #[test]
    fn files_are_named_as_hugging_face_names_them() {
        assert_eq!(file_name(1, 1), "model.safetensors");
        assert_eq!(file_name(2, 12), "model-00002-of-00012.safetensors");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            tensors in proptest::collection::btree_map(
                any::<String>(),
                (proptest::sample::select(&DType::ALL[..]), proptest::collection::vec(0_u64..9, 0..4)),
                0..12,
            ),
            metadata: BTreeMap<String, String>,
        ) {
            let storable = |dtype: DType| header::dtype_name(dtype).is_some();
            let tensors: Vec<NewTensor> = tensors
                .iter()
                .filter(|(_, (dtype, _))| storable(*dtype))
                // Eight elements of any packed type are whole bytes.
                .map(|(name, (dtype, shape))| tensor(name, *dtype, &[&shape[..], &[8]].concat()))
                .collect();
            let file = new_file(tensors.clone(), metadata).unwrap();
            prop_assert_eq!(header::parse(&file.head, file.size).unwrap(), file.header.clone());
            prop_assert_eq!(file.header.tensors.len(), tensors.len());
            for tensor in &file.header.tensors {
                let align = if header::packed_bits(tensor.dtype).is_some() { 1 } else { tensor.dtype.swap_size() as u64 };
                prop_assert_eq!(tensor.offset % align, 0);
            }
        }

        #[test]
        fn an_index_is_read_again(weight_map in proptest::collection::btree_map(any::<String>(), "[a-z.é-]{3,9}", 0..9), size: u64) {
            let written = Index { weight_map };
            let read = index::parse(&index_bytes(&written, size).unwrap());
            prop_assert!(written.files().iter().any(|name| *name == "..") || read == Ok(written));
        }
    }
}
