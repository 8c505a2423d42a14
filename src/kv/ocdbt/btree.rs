//! Nodes of the B+tree.

use bytes::Bytes;

use super::codec::{Cursor, FrontCoded, NODE_MAGIC, decode_envelope};
use super::data_ref::{DataFileTable, DataRef};
use super::version_tree::{STATISTICS, skip_columns};
use super::{OcdbtError, Result};
use crate::limits::{OCDBT_INLINE_BYTES_MAX, OCDBT_KEY_BYTES_MAX, OCDBT_NODE_ENTRIES_MAX};

/// A node of the B+tree.
///
/// | field                                | encoding | |
/// |--------------------------------------|----------|-|
/// | height                               | u8       | 0 in a leaf |
/// | data files                           |          | see [`DataFileTable`] |
/// | num_entries n                        | uleb     | 1..=2^20 |
/// | key_prefix_len\[1..n\]               | uleb     | see [`FrontCoded`] |
/// | key_suffix_len\[0..n\]               | uleb     | |
/// | subtree_common_prefix_len\[0..n\]    | uleb     | only if the height is not 0 |
/// | key suffix bytes                     |          | |
/// | entries                              |          | columns: see [`LeafEntry`], [`InteriorEntry`] |
///
/// A node stores its keys without a prefix that only its ancestors know: that of the root is empty, and that of a child
/// is its parent's followed by the first subtree_common_prefix_len bytes of its stored key in the parent. Decoding puts
/// the prefix back, so all keys here are whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// The files that the entries refer to.
    pub(super) files: DataFileTable,
    /// At least one, in ascending order of their keys.
    pub(super) entries: Entries,
    /// Memory in bytes that decoding took: the decompressed body, the keys and the inline values.
    pub(super) decoded_bytes: u64,
}

/// The entries of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entries {
    /// Height 0.
    Leaf(Vec<LeafEntry>),
    /// Any other height.
    Interior(Vec<InteriorEntry>),
}

/// A key and its value.
///
/// | column     | encoding | |
/// |------------|----------|-|
/// | value_len  | uleb     | |
/// | value_kind | u8       | 0 inline, 1 out of line |
/// | file id    | uleb     | only of values out of line |
/// | offset     | uleb     | only of values out of line |
/// | bytes      |          | of the inline values, concatenated |
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeafEntry {
    /// The whole key.
    pub(super) key: Bytes,
    /// Its value.
    pub(super) value: LeafValue,
}

/// The value of a leaf's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LeafValue {
    /// The value itself.
    Inline(Bytes),
    /// Where the value is.
    OutOfLine(DataRef),
}

/// A child node.
///
/// | column                   | encoding | |
/// |--------------------------|----------|-|
/// | file id                  | uleb     | |
/// | offset                   | uleb     | |
/// | length                   | uleb     | |
/// | num_keys                 | uleb     | statistic, not read |
/// | num_tree_bytes           | uleb     | statistic, not read |
/// | num_indirect_value_bytes | uleb     | statistic, not read |
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InteriorEntry {
    /// Whole; no key below the child is less.
    pub(super) key: Bytes,
    /// How much of the key the child's keys are stored without.
    pub(super) prefix_len: usize,
    /// Where the child is.
    pub(super) child: DataRef,
}

/// What a parent says of its child.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Expected<'a> {
    /// The child's height.
    pub(super) height: u8,
    /// No key below the child is less.
    pub(super) key: &'a [u8],
    /// How much of `key` the child's keys are stored without.
    pub(super) prefix_len: usize,
}

impl Node {
    pub(super) fn decode(encoded: &[u8], expected: Expected<'_>) -> Result<Self> {
        let body = decode_envelope(encoded, NODE_MAGIC)?;
        let body_bytes = body.len() as u64;
        let mut body = Cursor::new(&body);
        let height = body.u8()?;
        if height != expected.height {
            return Err(OcdbtError::Height { expected: expected.height, found: height });
        }
        let files = DataFileTable::decode(&mut body)?;
        let count = body.count("the number of entries of a B+tree node", 1, OCDBT_NODE_ENTRIES_MAX)?;
        let keys = FrontCoded::decode_lens(&mut body, KEY_LEN, count)?;
        let (entries, arena_bytes) = if height == 0 {
            decode_leaf(&mut body, keys, files.count(), expected)?
        } else {
            decode_interior(&mut body, keys, files.count(), expected)?
        };
        body.finish()?;
        Ok(Self { files, entries, decoded_bytes: body_bytes + arena_bytes })
    }
}

/// The entries, and the size of the buffer that their keys and inline values share.
fn decode_leaf<'a>(
    body: &mut Cursor<'a>,
    mut keys: FrontCoded<'a>,
    file_count: usize,
    expected: Expected<'_>,
) -> Result<(Entries, u64)> {
    let count = keys.lens().len();
    keys.decode_suffixes(body)?;
    let lens = body.column(count, Cursor::uleb)?;
    let kinds = body.column(count, Cursor::u8)?;
    let (mut inline_bytes, mut out_of_line_count) = (0, 0);
    for (&len, &kind) in lens.iter().zip(&kinds) {
        match kind {
            INLINE if len > OCDBT_INLINE_BYTES_MAX => {
                let what = "the length of an inline value";
                return Err(OcdbtError::Range { what, min: 0, max: OCDBT_INLINE_BYTES_MAX, found: len });
            }
            INLINE => inline_bytes += len,
            OUT_OF_LINE => out_of_line_count += 1,
            found => return Err(OcdbtError::ValueKind { found }),
        }
    }
    let files = body.column(out_of_line_count, Cursor::uleb)?;
    let offsets = body.column(out_of_line_count, Cursor::uleb)?;
    let inline = body.bytes(inline_bytes)?;

    let mut arena = keys.expand(expected.prefix(), inline_bytes)?;
    let mut start = arena.len();
    arena.extend_from_slice(inline);
    let arena = Bytes::from(arena);
    let mut places = files.into_iter().zip(offsets);
    let mut entries = Vec::with_capacity(count);
    for ((key, len), kind) in whole_keys(&arena, &keys, expected)?.into_iter().zip(lens).zip(kinds) {
        let value = if kind == INLINE {
            // `inline_bytes` is the sum of these lengths, all of which lie in the arena.
            let end = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
            LeafValue::Inline(arena.slice(std::mem::replace(&mut start, end)..end))
        } else {
            let (file, offset) = places.next().ok_or(OcdbtError::Truncated)?;
            LeafValue::OutOfLine(DataRef::new(file, offset, len, file_count)?)
        };
        entries.push(LeafEntry { key, value });
    }
    Ok((Entries::Leaf(entries), arena.len() as u64))
}

/// The entries, and the size of the buffer that their keys share.
fn decode_interior<'a>(
    body: &mut Cursor<'a>,
    mut keys: FrontCoded<'a>,
    file_count: usize,
    expected: Expected<'_>,
) -> Result<(Entries, u64)> {
    let count = keys.lens().len();
    let prefix_lens = body.column(count, |body| body.len16("the length of a subtree's prefix"))?;
    for (index, (&prefix, &key)) in prefix_lens.iter().zip(keys.lens()).enumerate() {
        if prefix > key {
            return Err(OcdbtError::SubtreePrefix { index, prefix, key });
        }
    }
    keys.decode_suffixes(body)?;
    let files = body.column(count, Cursor::uleb)?;
    let offsets = body.column(count, Cursor::uleb)?;
    let lens = body.column(count, Cursor::uleb)?;
    skip_columns(body, count, STATISTICS)?;

    let head = expected.prefix();
    let arena = Bytes::from(keys.expand(head, 0)?);
    let places = files.into_iter().zip(offsets).zip(lens);
    let keys = whole_keys(&arena, &keys, expected)?;
    let entries = keys.into_iter().zip(prefix_lens).zip(places).map(|((key, prefix), ((file, offset), len))| {
        let child = DataRef::new(file, offset, len, file_count)?;
        Ok(InteriorEntry { key, prefix_len: head.len() + usize::from(prefix), child })
    });
    Ok((Entries::Interior(entries.collect::<Result<_>>()?), arena.len() as u64))
}

/// The keys at the start of the arena, where [`FrontCoded::expand`] wrote them, proven to ascend.
fn whole_keys(arena: &Bytes, stored: &FrontCoded<'_>, expected: Expected<'_>) -> Result<Vec<Bytes>> {
    let head = expected.prefix().len();
    let mut keys: Vec<Bytes> = Vec::with_capacity(stored.lens().len());
    let mut start = 0;
    for (index, &len) in stored.lens().iter().enumerate() {
        let len = head + usize::from(len);
        if len as u64 > OCDBT_KEY_BYTES_MAX {
            return Err(OcdbtError::Range { what: KEY_LEN, min: 0, max: OCDBT_KEY_BYTES_MAX, found: len as u64 });
        }
        let key = arena.slice(start..start + len);
        start += len;
        match keys.last() {
            None if key < expected.key => return Err(OcdbtError::KeyBelowParent),
            Some(previous) if key <= previous => return Err(OcdbtError::Unsorted { index }),
            _ => keys.push(key),
        }
    }
    Ok(keys)
}

impl<'a> Expected<'a> {
    /// What the child's keys are stored without.
    fn prefix(&self) -> &'a [u8] {
        self.key.get(..self.prefix_len).unwrap_or_default()
    }
}

/// Values of the value_kind column.
pub(super) const INLINE: u8 = 0;
pub(super) const OUT_OF_LINE: u8 = 1;

const KEY_LEN: &str = "the length of a key";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{hex, seal};
    use super::*;

    /// A leaf that TensorStore wrote: inline and out-of-line values, no compression.
    fn leaf() -> Vec<u8> {
        hex("0cdb20de5600000000000000000000012200642f663236643336376264333437343361353833313133353435396164616136
             3430030202090101612f2e7a6172726179303102080300010000007b7d78797a591c1684")
    }

    /// An interior node that TensorStore wrote: two children.
    fn root() -> Vec<u8> {
        hex("0cdb20de4f00000000000000000001012200642f616233353432323835346232393034663132383933613439313265626536
             393102030401030361626330320000002222220202222200001d673ae8")
    }

    const ROOT: Expected<'_> = Expected { height: 1, key: b"", prefix_len: 0 };

    fn leaf_entries(node: Node) -> Vec<LeafEntry> {
        match node.entries {
            Entries::Leaf(entries) => entries,
            Entries::Interior(_) => panic!("a leaf"),
        }
    }

    #[test]
    fn a_leaf_of_tensorstore_is_read() {
        let node = Node::decode(&leaf(), Expected::default()).unwrap();
        assert_eq!(node.files.file(0).unwrap().path(), b"d/f26d367bd34743a5831135459adaa640");
        let entry = |key: &'static [u8], value| LeafEntry { key: Bytes::from_static(key), value };
        let inline = |value: &'static [u8]| LeafValue::Inline(Bytes::from_static(value));
        let expected = [
            entry(b"a/.zarray", inline(b"{}")),
            entry(b"a/0", LeafValue::OutOfLine(DataRef { file: 0, offset: 0, len: 8 })),
            entry(b"a/1", inline(b"xyz")),
        ];
        assert_eq!(leaf_entries(node), expected);
    }

    #[test]
    fn an_interior_node_of_tensorstore_is_read() {
        let node = Node::decode(&root(), ROOT).unwrap();
        let entry = |key: &'static [u8], offset| InteriorEntry {
            key: Bytes::from_static(key),
            prefix_len: 3,
            child: DataRef { file: 0, offset, len: 34 },
        };
        assert_eq!(node.entries, Entries::Interior(vec![entry(b"abc0", 0), entry(b"abc2", 34)]));
    }

    #[test]
    fn a_compressed_leaf_of_tensorstore_is_read() {
        let bytes = hex("0cdb20de2500000000000000000128b52ffd200a510000000001026b30020076308a4bcd80");
        let entries = leaf_entries(Node::decode(&bytes, Expected::default()).unwrap());
        let value = LeafValue::Inline(Bytes::from_static(b"v0"));
        assert_eq!(entries, [LeafEntry { key: Bytes::from_static(b"k0"), value }]);
    }

    #[test]
    fn the_prefix_that_the_parent_knows_is_put_back() {
        let bytes = hex("0cdb20de2200000000000000000000000200010132330202000076327633ac92a94a");
        let node = Node::decode(&bytes, Expected { height: 0, key: b"abc2", prefix_len: 3 }).unwrap();
        let keys: Vec<_> = leaf_entries(node).into_iter().map(|entry| entry.key).collect();
        assert_eq!(keys, [&b"abc2"[..], b"abc3"]);
        let late = Expected { height: 0, key: b"abc3", prefix_len: 3 };
        assert_eq!(Node::decode(&bytes, late), Err(OcdbtError::KeyBelowParent));
        let high = Expected { height: 1, key: b"abc2", prefix_len: 3 };
        assert_eq!(Node::decode(&bytes, high), Err(OcdbtError::Height { expected: 1, found: 0 }));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_an_error() {
        for (good, expected) in [(leaf(), Expected::default()), (root(), ROOT)] {
            assert!(Node::decode(&good, expected).is_ok());
            for len in 0..good.len() {
                assert!(Node::decode(&good[..len], expected).is_err(), "{len}");
            }
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(Node::decode(&bad, expected).is_err(), "{bit}");
            }
        }
    }

    /// Decodes a sealed leaf with this body.
    fn leaf_body(body: &str) -> Result<Node> {
        Node::decode(&seal(NODE_MAGIC, &hex(body), false), Expected::default())
    }

    #[test]
    fn keys_out_of_order_are_refused() {
        // height, no files, two entries, prefix 0, suffixes 1 1, keys, empty inline values
        assert!(leaf_body("00 00 02 00 0101 6162 0000 0000").is_ok());
        assert_eq!(leaf_body("00 00 02 00 0101 6261 0000 0000").unwrap_err(), OcdbtError::Unsorted { index: 1 });
        assert_eq!(leaf_body("00 00 02 00 0101 6161 0000 0000").unwrap_err(), OcdbtError::Unsorted { index: 1 });
        // The empty key is a key.
        assert!(leaf_body("00 00 02 00 0001 61 0000 0000").is_ok());
    }

    #[test]
    fn counts_beyond_the_body_are_refused_before_anything_is_allocated() {
        assert_eq!(leaf_body("00 00 808040").unwrap_err(), OcdbtError::Truncated);
        assert!(matches!(leaf_body("00 00 818040").unwrap_err(), OcdbtError::Range { found: 0x10_0001, .. }));
        assert!(matches!(leaf_body("00 00 00").unwrap_err(), OcdbtError::Range { found: 0, .. }));
        assert!(matches!(leaf_body("00 ffffffffffffffffff01").unwrap_err(), OcdbtError::Range { found: u64::MAX, .. }));
        assert_eq!(leaf_body("00 808040").unwrap_err(), OcdbtError::Truncated);
        assert_eq!(leaf_body("00 ffffffffffffffffff02").unwrap_err(), OcdbtError::Uleb);
        assert!(matches!(leaf_body("00 00 01 808004 00 00").unwrap_err(), OcdbtError::Range { found: 65_536, .. }));
    }

    #[test]
    fn keys_that_expand_beyond_the_limit_are_refused() {
        // 4,200 keys of 65,535 bytes in a body of under 100 KB: each shares 65,533 bytes with the one before.
        let count = 4_200_u16;
        let mut body = hex("00 00 e820");
        body.extend((1..count).flat_map(|_| hex("fdff03")));
        body.extend(hex("ffff03"));
        body.extend((1..count).map(|_| 2));
        body.extend(vec![0; 65_533]);
        body.extend((0..count).flat_map(u16::to_be_bytes));
        body.extend(vec![0; 2 * usize::from(count)]);
        let error = Node::decode(&seal(NODE_MAGIC, &body, true), Expected::default()).unwrap_err();
        assert!(matches!(error, OcdbtError::Limit { found: 275_247_000, .. }), "{error:?}");
    }

    #[test]
    fn references_out_of_range_are_refused() {
        // One file "f"; one key "a"; value of 1 byte out of line.
        let value = |id_and_offset: &str| leaf_body(&format!("00 01 01 00 66 01 01 61 01 01 {id_and_offset}"));
        assert!(value("00 00").is_ok());
        assert_eq!(value("01 00").unwrap_err(), OcdbtError::FileId { found: 1, count: 1 });
        assert!(matches!(value("00 ffffffffffffffffff01").unwrap_err(), OcdbtError::Extent { .. }));
        assert_eq!(leaf_body("00 00 01 01 61 01 02 00 00").unwrap_err(), OcdbtError::ValueKind { found: 2 });
    }

    #[test]
    fn values_without_framing_must_fill_the_body() {
        assert_eq!(leaf_body("00 00 01 01 61 01 00 78 79").unwrap_err(), OcdbtError::Trailing { count: 1 });
        assert_eq!(leaf_body("00 00 01 01 61 02 00 78").unwrap_err(), OcdbtError::Truncated);
        assert!(matches!(leaf_body("00 00 01 01 61 818040 00 78").unwrap_err(), OcdbtError::Range { .. }));
    }

    proptest! {
        #[test]
        fn any_body_is_decoded_or_refused(body in prop::collection::vec(any::<u8>(), 0..200), compress in any::<bool>()) {
            for height in [0, 1] {
                let mut body = body.clone();
                body.insert(0, height);
                let expected = Expected { height, key: b"ab", prefix_len: 1 };
                let _ = Node::decode(&seal(NODE_MAGIC, &body, compress), expected);
            }
        }

        #[test]
        fn a_damaged_body_is_decoded_or_refused(at in 0_usize..70, byte in any::<u8>(), interior in any::<bool>()) {
            let (good, expected) = if interior { (root(), ROOT) } else { (leaf(), Expected::default()) };
            let mut body = good[14..good.len() - 4].to_vec();
            let at = at % body.len();
            body[at] = byte;
            let _ = Node::decode(&seal(NODE_MAGIC, &body, false), expected);
        }
    }
}
