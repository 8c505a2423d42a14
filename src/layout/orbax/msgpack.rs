//! `checkpoint`: the msgpack file of Orbax up to 0.5, in the encoding of `flax.serialization`.
//!
//! Containers are maps and arrays; a leaf is a plain value, a string `PLACEHOLDER://<param name>` (the array lies in the
//! zarr storage beside), or an extension: 1 an ndarray, 3 a numpy scalar (both: msgpack of `[shape, dtype name, raw C-order
//! bytes]`), 2 a complex number (`[re, im]`), 4 a tuple (its array). Arrays above 2^30 bytes are maps of flat pieces.
//!
//! The bytes of arrays are slices of the file. Recursion is bounded by [`NESTING_MAX`], and no allocation trusts a count
//! in the file.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};

use crate::dtype::DType;
use crate::limits::{MSGPACK_NODES_MAX, NESTING_MAX, RANK_MAX};

/// A decoded value.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// A dict or a namedtuple, in the file's order; keys are distinct.
    Map(Vec<(Key, Self)>),
    /// A list, or a tuple that was converted to one.
    List(Vec<Self>),
    /// A tuple.
    Tuple(Vec<Self>),
    /// None.
    Nil,
    /// A boolean.
    Bool(bool),
    /// An integer.
    Int(i128),
    /// A float.
    Float(f64),
    /// A complex number.
    Complex {
        /// The real part.
        re: f64,
        /// The imaginary part.
        im: f64,
    },
    /// A string.
    Str(String),
    /// A byte string.
    Bytes(Bytes),
    /// An array, or a numpy scalar.
    Array(InlineArray),
    /// The leaf lies in the zarr storage under this parameter name.
    Placeholder(String),
    /// Something that has no meaning here, and what it is.
    Unsupported(String),
}

/// An array whose bytes are in the msgpack file.
#[derive(Clone, Debug, PartialEq)]
pub struct InlineArray {
    /// Element type.
    pub dtype: DType,
    /// Extents, slowest dimension first.
    pub shape: Vec<u64>,
    /// Whether it was a numpy scalar, which has no dimensions either.
    pub is_scalar: bool,
    /// The elements, little-endian, row-major, `dtype.size()` bytes each as ml_dtypes holds them: below a byte, the high
    /// bits of an element mean nothing.
    pub data: Bytes,
}

/// The key of a map's member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// A string.
    Name(String),
    /// An integer.
    Int(i128),
}

/// Why a msgpack file cannot be read, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct MsgpackError {
    /// The byte at which the value in question starts.
    pub offset: u64,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a msgpack value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It needs more bytes than are left.
    #[error("the value ends early: {needed} bytes needed, {left} left")]
    Truncated {
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that are left.
        left: u64,
    },
    /// It is nested too deeply.
    #[error("values are nested more than {NESTING_MAX} deep")]
    Deep,
    /// There are too many values.
    #[error("more than {MSGPACK_NODES_MAX} values")]
    Many,
    /// A string is not UTF-8.
    #[error("a string is not UTF-8")]
    Utf8,
    /// A type byte that msgpack never uses.
    #[error("the type byte 0xc1 is not msgpack")]
    Reserved,
    /// A map key that is neither string nor integer.
    #[error("a map key is neither a string nor an integer")]
    KeyType,
    /// A map with a key twice.
    #[error("a map has the key {0} twice")]
    Duplicate(Key),
    /// Something else than the format has there.
    #[error("expected {0}")]
    Expected(&'static str),
    /// An array whose bytes do not fit its shape and type.
    #[error("an array {dtype}{shape:?} of {found} bytes")]
    ArrayBytes {
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<u64>,
        /// Its bytes.
        found: u64,
    },
    /// Bytes after the value.
    #[error("{0} bytes follow the value")]
    Trailing(u64),
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => write!(f, "`{name}`"),
            Self::Int(int) => write!(f, "{int}"),
        }
    }
}

/// Decodes a whole file.
///
/// # Errors
/// Bytes that are not one msgpack value in the encoding above.
pub fn parse(bytes: &Bytes) -> Result<Node, MsgpackError> {
    let mut nodes_left = MSGPACK_NODES_MAX;
    decode_all(bytes, 0, 0, &mut nodes_left)
}

/// Whether this is a file of T5X's own checkpoints: `{"version": .., "optimizer": ..}`, or any leaf that describes a
/// TensorStore array in a sibling directory.
pub fn is_t5x(node: &Node) -> bool {
    fn has_driver(node: &Node) -> bool {
        match node {
            Node::Map(members) => {
                let member = |name: &str| get(members, name);
                let is_spec = matches!(member("driver"), Some(Node::Str(_))) && member("metadata").is_some();
                is_spec || members.iter().any(|(_, node)| has_driver(node))
            }
            Node::List(nodes) | Node::Tuple(nodes) => nodes.iter().any(has_driver),
            _ => false,
        }
    }
    let Node::Map(members) = node else { return false };
    let native =
        matches!((get(members, "version"), get(members, "optimizer")), (Some(Node::Int(_)), Some(Node::Map(_))));
    native || has_driver(node)
}

fn get<'a>(members: &'a [(Key, Node)], name: &str) -> Option<&'a Node> {
    members.iter().find(|(key, _)| matches!(key, Key::Name(have) if have == name)).map(|(_, node)| node)
}

/// Decodes bytes that must be one value. `base` is where they start in the file.
fn decode_all(bytes: &Bytes, base: u64, depth: usize, nodes_left: &mut usize) -> Result<Node, MsgpackError> {
    let mut reader = Reader { bytes, at: 0, base, nodes_left };
    let node = reader.value(depth)?;
    match reader.left() {
        0 => Ok(node),
        left => Err(reader.error(reader.at, Problem::Trailing(left as u64))),
    }
}

struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
    base: u64,
    nodes_left: &'a mut usize,
}

/// What a type byte announces. Lengths are in bytes, counts in values.
enum Head {
    Node(Node),
    Str(u64),
    Bin(u64),
    List(u64),
    Map(u64),
    Ext(i8, u64),
}

impl Reader<'_> {
    fn value(&mut self, depth: usize) -> Result<Node, MsgpackError> {
        let start = self.at;
        if depth > NESTING_MAX {
            return Err(self.error(start, Problem::Deep));
        }
        *self.nodes_left = self.nodes_left.checked_sub(1).ok_or_else(|| self.error(start, Problem::Many))?;
        match self.head()? {
            Head::Node(node) => Ok(node),
            Head::Str(len) => {
                let text = self.text(len)?;
                Ok(match text.strip_prefix(PLACEHOLDER) {
                    Some(name) => Node::Placeholder(name.to_owned()),
                    None => Node::Str(text),
                })
            }
            Head::Bin(len) => self.take(len).map(Node::Bytes),
            Head::List(count) => self.list(count, depth).map(Node::List),
            Head::Map(count) => self.map(start, count, depth),
            Head::Ext(kind, len) => self.extension(kind, len, depth),
        }
    }

    /// Reads a type byte and what belongs to it: a number's bytes, a length.
    fn head(&mut self) -> Result<Head, MsgpackError> {
        let start = self.at;
        let [byte] = self.array()?;
        Ok(match byte {
            0x00..=0x7f => Head::Node(Node::Int(i128::from(byte))),
            0x80..=0x8f => Head::Map(u64::from(byte & 0x0f)),
            0x90..=0x9f => Head::List(u64::from(byte & 0x0f)),
            0xa0..=0xbf => Head::Str(u64::from(byte & 0x1f)),
            0xc0 => Head::Node(Node::Nil),
            0xc1 => return Err(self.error(start, Problem::Reserved)),
            0xc2 | 0xc3 => Head::Node(Node::Bool(byte == 0xc3)),
            0xc4 => Head::Bin(self.unsigned::<1>()?),
            0xc5 => Head::Bin(self.unsigned::<2>()?),
            0xc6 => Head::Bin(self.unsigned::<4>()?),
            0xc7 => self.ext_head::<1>()?,
            0xc8 => self.ext_head::<2>()?,
            0xc9 => self.ext_head::<4>()?,
            0xca => Head::Node(Node::Float(f64::from(f32::from_be_bytes(self.array()?)))),
            0xcb => Head::Node(Node::Float(f64::from_be_bytes(self.array()?))),
            0xcc => Head::Node(Node::Int(i128::from(self.unsigned::<1>()?))),
            0xcd => Head::Node(Node::Int(i128::from(self.unsigned::<2>()?))),
            0xce => Head::Node(Node::Int(i128::from(self.unsigned::<4>()?))),
            0xcf => Head::Node(Node::Int(i128::from(self.unsigned::<8>()?))),
            0xd0 => Head::Node(Node::Int(i128::from(i8::from_be_bytes(self.array()?)))),
            0xd1 => Head::Node(Node::Int(i128::from(i16::from_be_bytes(self.array()?)))),
            0xd2 => Head::Node(Node::Int(i128::from(i32::from_be_bytes(self.array()?)))),
            0xd3 => Head::Node(Node::Int(i128::from(i64::from_be_bytes(self.array()?)))),
            0xd4..=0xd8 => {
                let [kind] = self.array()?;
                Head::Ext(i8::from_be_bytes([kind]), 1 << (byte - 0xd4))
            }
            0xd9 => Head::Str(self.unsigned::<1>()?),
            0xda => Head::Str(self.unsigned::<2>()?),
            0xdb => Head::Str(self.unsigned::<4>()?),
            0xdc => Head::List(self.unsigned::<2>()?),
            0xdd => Head::List(self.unsigned::<4>()?),
            0xde => Head::Map(self.unsigned::<2>()?),
            0xdf => Head::Map(self.unsigned::<4>()?),
            0xe0..=0xff => Head::Node(Node::Int(i128::from(i8::from_be_bytes([byte])))),
        })
    }

    fn ext_head<const N: usize>(&mut self) -> Result<Head, MsgpackError> {
        let len = self.unsigned::<N>()?;
        let [kind] = self.array()?;
        Ok(Head::Ext(i8::from_be_bytes([kind]), len))
    }

    fn list(&mut self, count: u64, depth: usize) -> Result<Vec<Node>, MsgpackError> {
        self.need(count)?;
        let mut nodes = Vec::new();
        for _ in 0..count {
            nodes.push(self.value(depth + 1)?);
        }
        Ok(nodes)
    }

    fn map(&mut self, start: usize, count: u64, depth: usize) -> Result<Node, MsgpackError> {
        self.need(count.saturating_mul(2))?;
        let mut members = Vec::new();
        for _ in 0..count {
            let key_at = self.at;
            let key = match self.head()? {
                Head::Str(len) => Key::Name(self.text(len)?),
                Head::Node(Node::Int(int)) => Key::Int(int),
                _ => return Err(self.error(key_at, Problem::KeyType)),
            };
            members.push((key, self.value(depth + 1)?));
        }
        let mut keys: Vec<&Key> = members.iter().map(|(key, _)| key).collect();
        keys.sort_unstable();
        if let Some(&twice) = keys.windows(2).find_map(|pair| match pair {
            [a, b] if a == b => Some(a),
            _ => None,
        }) {
            return Err(self.error(start, Problem::Duplicate(twice.clone())));
        }
        match get(&members, CHUNKED_ARRAY) {
            Some(Node::Bool(true)) => self.joined(start, &members),
            _ => Ok(Node::Map(members)),
        }
    }

    /// Joins the flat pieces of a big array.
    fn joined(&self, start: usize, members: &[(Key, Node)]) -> Result<Node, MsgpackError> {
        let expected = |what| self.error(start, Problem::Expected(what));
        let Some(Node::Map(extents)) = get(members, "shape") else {
            return Err(expected("the shape of a chunked array"));
        };
        let Some(Node::Map(pieces)) = get(members, "chunks") else {
            return Err(expected("the chunks of a chunked array"));
        };
        let mut shape = Vec::new();
        for index in 0..extents.len() {
            match get(extents, &index.to_string()) {
                Some(Node::Int(extent)) if shape.len() < RANK_MAX => {
                    shape.push(u64::try_from(*extent).map_err(|_| expected("an extent of a chunked array"))?);
                }
                _ => return Err(expected("the extents of a chunked array, numbered from 0")),
            }
        }
        let named = pieces.iter().filter_map(|(key, node)| match key {
            Key::Name(name) => Some((name.as_str(), node)),
            Key::Int(_) => None,
        });
        // They may be many.
        let named: HashMap<&str, &Node> = named.collect();
        let mut arrays = Vec::new();
        for index in 0..pieces.len() {
            match named.get(index.to_string().as_str()) {
                Some(Node::Array(piece)) => arrays.push(piece),
                _ => return Err(expected("the chunks of a chunked array, numbered from 0")),
            }
        }
        let Some(dtype) = arrays.first().map(|piece| piece.dtype) else {
            return Err(expected("chunks of a chunked array"));
        };
        if arrays.iter().any(|piece| piece.dtype != dtype) {
            return Err(expected("chunks of one data type"));
        }
        let mut data = BytesMut::with_capacity(arrays.iter().map(|piece| piece.data.len()).sum());
        arrays.iter().for_each(|piece| data.extend_from_slice(&piece.data));
        self.array_node(start, dtype, shape, false, data.freeze())
    }

    fn extension(&mut self, kind: i8, len: u64, depth: usize) -> Result<Node, MsgpackError> {
        let start = self.at;
        let base = self.base + start as u64;
        let payload = self.take(len)?;
        match kind {
            EXT_NDARRAY | EXT_NUMPY_SCALAR => {
                let mut reader = Reader { bytes: &payload, at: 0, base, nodes_left: self.nodes_left };
                reader.ndarray(kind == EXT_NUMPY_SCALAR)
            }
            EXT_COMPLEX => match decode_all(&payload, base, depth + 1, self.nodes_left)? {
                Node::List(parts) => match parts.as_slice() {
                    [re, im] => match (float(re), float(im)) {
                        (Some(re), Some(im)) => Ok(Node::Complex { re, im }),
                        _ => Err(self.error(start, Problem::Expected("two numbers in a complex number"))),
                    },
                    _ => Err(self.error(start, Problem::Expected("two parts of a complex number"))),
                },
                _ => Err(self.error(start, Problem::Expected("the parts of a complex number"))),
            },
            EXT_TUPLE => match decode_all(&payload, base, depth + 1, self.nodes_left)? {
                Node::List(nodes) => Ok(Node::Tuple(nodes)),
                _ => Err(self.error(start, Problem::Expected("the elements of a tuple"))),
            },
            other => Ok(Node::Unsupported(format!("msgpack extension type {other}"))),
        }
    }

    /// Reads `[shape, dtype name, bytes]`, the whole of the reader's bytes.
    fn ndarray(&mut self, is_scalar: bool) -> Result<Node, MsgpackError> {
        let Head::List(3) = self.head()? else { return Err(self.error(0, Problem::Expected("[shape, dtype, bytes]"))) };
        let shape_at = self.at;
        let rank = match self.head()? {
            Head::List(rank) if rank <= RANK_MAX as u64 => rank,
            _ => return Err(self.error(shape_at, Problem::Expected("a shape of at most 32 dimensions"))),
        };
        let mut shape = Vec::new();
        for _ in 0..rank {
            let at = self.at;
            match self.head()? {
                Head::Node(Node::Int(extent)) if let Ok(extent) = u64::try_from(extent) => shape.push(extent),
                _ => return Err(self.error(at, Problem::Expected("an extent"))),
            }
        }
        let name_at = self.at;
        let name = match self.head()? {
            Head::Str(len) | Head::Bin(len) => self.text(len)?,
            _ => return Err(self.error(name_at, Problem::Expected("the name of a data type"))),
        };
        let data_at = self.at;
        let data = match self.head()? {
            Head::Str(len) | Head::Bin(len) => self.take(len)?,
            _ => return Err(self.error(data_at, Problem::Expected("the bytes of an array"))),
        };
        if self.left() > 0 {
            return Err(self.error(self.at, Problem::Trailing(self.left() as u64)));
        }
        // Only numpy's own names: `i4` would be taken for a 4-bit type.
        match DType::ALL.into_iter().find(|dtype| dtype.name() == name) {
            Some(dtype) => self.array_node(data_at, dtype, shape, is_scalar, data),
            None => Ok(Node::Unsupported(format!("array of data type `{name}`"))),
        }
    }

    fn array_node(
        &self,
        at: usize,
        dtype: DType,
        shape: Vec<u64>,
        is_scalar: bool,
        data: Bytes,
    ) -> Result<Node, MsgpackError> {
        let size = shape.iter().try_fold(dtype.size() as u64, |size, &extent| size.checked_mul(extent));
        if size == Some(data.len() as u64) {
            Ok(Node::Array(InlineArray { dtype, shape, is_scalar, data }))
        } else {
            Err(self.error(at, Problem::ArrayBytes { dtype, shape, found: data.len() as u64 }))
        }
    }

    fn text(&mut self, len: u64) -> Result<String, MsgpackError> {
        let start = self.at;
        let bytes = self.take(len)?;
        String::from_utf8(bytes.into()).map_err(|_| self.error(start, Problem::Utf8))
    }

    fn unsigned<const N: usize>(&mut self) -> Result<u64, MsgpackError> {
        Ok(self.array::<N>()?.into_iter().fold(0, |value, byte| value << 8 | u64::from(byte)))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MsgpackError> {
        let bytes = self.take(N as u64)?;
        <[u8; N]>::try_from(bytes.as_ref()).map_err(|_| self.error(self.at, Problem::Expected("bytes")))
    }

    fn take(&mut self, len: u64) -> Result<Bytes, MsgpackError> {
        let len = self.need(len)?;
        let start = self.at;
        self.at += len;
        Ok(self.bytes.slice(start..self.at))
    }

    /// Checks that so many bytes are left. A container's values take at least a byte each, so this bounds counts too.
    fn need(&self, needed: u64) -> Result<usize, MsgpackError> {
        let left = self.left();
        match usize::try_from(needed) {
            Ok(needed) if needed <= left => Ok(needed),
            _ => Err(self.error(self.at, Problem::Truncated { needed, left: left as u64 })),
        }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn error(&self, at: usize, problem: Problem) -> MsgpackError {
        MsgpackError { offset: self.base + at as u64, problem }
    }
}

fn float(node: &Node) -> Option<f64> {
    match node {
        Node::Float(float) => Some(*float),
        Node::Int(int) => Some(*int as f64),
        _ => None,
    }
}

const PLACEHOLDER: &str = "PLACEHOLDER://";
const CHUNKED_ARRAY: &str = "__msgpack_chunked_array__";
const EXT_NDARRAY: i8 = 1;
const EXT_COMPLEX: i8 = 2;
const EXT_NUMPY_SCALAR: i8 = 3;
const EXT_TUPLE: i8 = 4;

#[cfg(test)]
#[path = "msgpack_tests.rs"]
mod tests;
