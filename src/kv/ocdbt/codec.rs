//! What manifests and nodes have in common: the envelope, integers, columns and front-coded strings.

use std::borrow::Cow;
use std::io::Read;

use super::manifest::Compression;
use super::{OcdbtError, Result};
use crate::limits::OCDBT_NODE_DECODED_MAX;

/// First field of a manifest.
pub(super) const MANIFEST_MAGIC: u32 = 0x0cdb_3a2a;

/// First field of a B+tree node.
pub(super) const NODE_MAGIC: u32 = 0x0cdb_20de;

/// Opens the envelope around a manifest or node and returns its body, decompressed.
///
/// | field       | encoding | |
/// |-------------|----------|-|
/// | magic       | u32be    | says what the object is |
/// | length      | u64le    | of all fields together |
/// | version     | uleb     | 0 |
/// | compression | uleb     | 0: the body as it is; 1: one zstd frame |
/// | body        |          | |
/// | checksum    | u32le    | CRC-32C of all bytes before it |
///
/// The checksum comes before the version here, so that damage is not reported as an unknown version.
pub(super) fn decode_envelope(encoded: &[u8], magic: u32) -> Result<Cow<'_, [u8]>> {
    let mut fields = Cursor::new(encoded);
    let found = u32::from_be_bytes(fields.array()?);
    if found != magic {
        return Err(OcdbtError::Magic { expected: magic, found });
    }
    let stored = fields.u64_le()?;
    if stored != encoded.len() as u64 {
        return Err(OcdbtError::Length { stored, found: encoded.len() as u64 });
    }
    let (covered, checksum) = encoded.split_last_chunk().ok_or(OcdbtError::Truncated)?;
    let (stored, computed) = (u32::from_le_bytes(*checksum), crc32c::crc32c(covered));
    if stored != computed {
        return Err(OcdbtError::Crc { stored, computed });
    }
    let mut fields = Cursor::new(covered.get(MAGIC_AND_LENGTH..).ok_or(OcdbtError::Truncated)?);
    match fields.uleb()? {
        FORMAT_VERSION => {}
        found => return Err(OcdbtError::Version { found }),
    }
    match fields.uleb()? {
        STORED if fields.0.len() as u64 > OCDBT_NODE_DECODED_MAX => Err(decoded_limit(fields.0.len() as u64)),
        STORED => Ok(Cow::Borrowed(fields.0)),
        ZSTD => decode_zstd(fields.0, OCDBT_NODE_DECODED_MAX).map(Cow::Owned),
        found => Err(OcdbtError::Compression { found }),
    }
}

/// Puts a body into its envelope: the inverse of [`decode_envelope`].
pub(super) fn encode_envelope(magic: u32, body: &[u8], compression: Compression) -> Result<Vec<u8>> {
    if body.len() as u64 > OCDBT_NODE_DECODED_MAX {
        return Err(decoded_limit(body.len() as u64));
    }
    let (method, body) = match compression {
        Compression::None => (STORED, Cow::Borrowed(body)),
        Compression::Zstd { level } => {
            let frame = zstd::bulk::compress(body, level).map_err(|error| OcdbtError::Zstd(error.to_string()))?;
            (ZSTD, Cow::Owned(frame))
        }
    };
    let mut fields = Vec::new();
    put_uleb(&mut fields, FORMAT_VERSION);
    put_uleb(&mut fields, method);
    let len = MAGIC_AND_LENGTH + fields.len() + body.len() + CHECKSUM_BYTES;
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(&magic.to_be_bytes());
    bytes.extend_from_slice(&(len as u64).to_le_bytes());
    bytes.extend_from_slice(&fields);
    bytes.extend_from_slice(&body);
    let checksum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// Decompresses exactly one zstd frame of at most `max` decoded bytes.
///
/// The output grows with what is really decoded: the content size in a frame's header may be missing or a lie.
fn decode_zstd(frame: &[u8], max: u64) -> Result<Vec<u8>> {
    let bad = |error: std::io::Error| OcdbtError::Zstd(error.to_string());
    let mut decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(bad)?.single_frame();
    let mut body = Vec::new();
    decoder.by_ref().take(max.saturating_add(1)).read_to_end(&mut body).map_err(bad)?;
    if body.len() as u64 > max {
        return Err(decoded_limit(body.len() as u64));
    }
    match decoder.finish().len() {
        0 => Ok(body),
        count => Err(OcdbtError::Trailing { count: count as u64 }),
    }
}

fn decoded_limit(found: u64) -> OcdbtError {
    OcdbtError::Limit { what: "the decoded size of an OCDBT object", max: OCDBT_NODE_DECODED_MAX, found }
}

/// The bytes of a body that are not read yet.
#[derive(Debug)]
pub(super) struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: u64) -> Result<&'a [u8]> {
        let split = usize::try_from(len).ok().and_then(|len| self.0.split_at_checked(len));
        let (bytes, rest) = split.ok_or(OcdbtError::Truncated)?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk().ok_or(OcdbtError::Truncated)?;
        self.0 = rest;
        Ok(*array)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u64_le(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn i32_le(&mut self) -> Result<i32> {
        self.array().map(i32::from_le_bytes)
    }

    /// An unsigned LEB128 integer. Redundant groups are accepted, as TensorStore accepts them.
    pub(super) fn uleb(&mut self) -> Result<u64> {
        let mut value = 0;
        for (index, &byte) in self.0.iter().take(ULEB_BYTES_MAX).enumerate() {
            let group = u64::from(byte & 0x7f);
            if index + 1 == ULEB_BYTES_MAX && byte > 1 {
                return Err(OcdbtError::Uleb);
            }
            value |= group << (7 * index);
            if byte < 0x80 {
                self.0 = self.0.get(index + 1..).unwrap_or_default();
                return Ok(value);
            }
        }
        Err(OcdbtError::Truncated)
    }

    /// An integer that the format bounds.
    pub(super) fn uleb_within(&mut self, what: &'static str, min: u64, max: u64) -> Result<u64> {
        match self.uleb()? {
            value if (min..=max).contains(&value) => Ok(value),
            found => Err(OcdbtError::Range { what, min, max, found }),
        }
    }

    /// The length of a string that the format bounds to 16 bits.
    pub(super) fn len16(&mut self, what: &'static str) -> Result<u16> {
        let len = self.uleb()?;
        u16::try_from(len).map_err(|_| too_long(what, len))
    }

    /// How many entries follow. A count beyond the bytes that are left is refused: each entry takes at least one.
    pub(super) fn count(&mut self, what: &'static str, min: u64, max: u64) -> Result<usize> {
        let count = self.uleb_within(what, min, max)?;
        usize::try_from(count).ok().filter(|&count| count <= self.0.len()).ok_or(OcdbtError::Truncated)
    }

    /// `count` values of one column. Allocates no more than a small multiple of the bytes that are left.
    pub(super) fn column<T>(&mut self, count: usize, mut read: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut column = Vec::with_capacity(count.min(self.0.len()));
        for _ in 0..count {
            column.push(read(self)?);
        }
        Ok(column)
    }

    /// Every byte must have been read.
    pub(super) fn finish(self) -> Result<()> {
        match self.0.len() {
            0 => Ok(()),
            count => Err(OcdbtError::Trailing { count: count as u64 }),
        }
    }
}

/// Strings stored as the length shared with the string before, and the rest ("front coding").
///
/// | column               | encoding | |
/// |----------------------|----------|-|
/// | prefix_len\[1..n\]   | uleb     | bytes shared with the string before; may be fewer than possible |
/// | suffix_len\[0..n\]   | uleb     | length of the rest |
/// | (other columns)      |          | |
/// | suffix bytes         |          | of all strings, concatenated |
#[derive(Debug)]
pub(super) struct FrontCoded<'a> {
    prefix_lens: Vec<u16>,
    lens: Vec<u16>,
    suffixes: &'a [u8],
}

impl<'a> FrontCoded<'a> {
    /// Reads the two columns of lengths of `count` strings.
    pub(super) fn decode_lens(body: &mut Cursor<'a>, what: &'static str, count: usize) -> Result<Self> {
        let mut index = 0;
        let prefix_lens = body.column(count, |body| {
            index += 1;
            if index == 1 { Ok(0) } else { body.len16(what) }
        })?;
        let (mut index, mut previous) = (0, 0);
        let lens = body.column(count, |body| {
            let prefix = prefix_lens.get(index).copied().unwrap_or_default();
            if prefix > previous {
                return Err(OcdbtError::Prefix { index, prefix, previous });
            }
            let len = u64::from(prefix) + u64::from(body.len16(what)?);
            previous = u16::try_from(len).map_err(|_| too_long(what, len))?;
            index += 1;
            Ok(previous)
        })?;
        Ok(Self { prefix_lens, lens, suffixes: &[] })
    }

    /// Takes the suffix bytes.
    pub(super) fn decode_suffixes(&mut self, body: &mut Cursor<'a>) -> Result<()> {
        let all: u64 = self.lens.iter().map(|&len| u64::from(len)).sum();
        let shared: u64 = self.prefix_lens.iter().map(|&len| u64::from(len)).sum();
        self.suffixes = body.bytes(all - shared)?;
        Ok(())
    }

    /// The length of each string.
    pub(super) fn lens(&self) -> &[u16] {
        &self.lens
    }

    /// The length that each string shares with the one before.
    pub(super) fn prefix_lens(&self) -> &[u16] {
        &self.prefix_lens
    }

    /// All strings, each behind `head`, in one buffer with room for `spare` more bytes.
    pub(super) fn expand(&self, head: &[u8], spare: u64) -> Result<Vec<u8>> {
        let heads = self.lens.len() as u64 * head.len() as u64;
        let found = self.lens.iter().map(|&len| u64::from(len)).sum::<u64>() + heads + spare;
        let capacity = match usize::try_from(found) {
            Ok(capacity) if found <= OCDBT_NODE_DECODED_MAX => capacity,
            _ => return Err(decoded_limit(found)),
        };
        let mut arena = Vec::with_capacity(capacity);
        let mut suffixes = Cursor::new(self.suffixes);
        let mut previous = 0;
        for (&prefix, &len) in self.prefix_lens.iter().zip(&self.lens) {
            let start = arena.len();
            arena.extend_from_slice(head);
            // `decode_lens` proved the prefix to lie within the string before.
            arena.extend_from_within(previous..previous + usize::from(prefix));
            arena.extend_from_slice(suffixes.bytes(u64::from(len) - u64::from(prefix))?);
            previous = start + head.len();
        }
        Ok(arena)
    }
}

/// Writes an unsigned LEB128 integer in its shortest form.
pub(super) fn put_uleb(body: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        // The low seven bits, and the bit that says that more follow.
        body.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    body.push(value.to_le_bytes()[0]);
}

/// Writes a column of integers.
pub(super) fn put_ulebs(body: &mut Vec<u8>, values: impl IntoIterator<Item = u64>) {
    values.into_iter().for_each(|value| put_uleb(body, value));
}

/// Writes the columns of [`FrontCoded`] strings, with the longest prefixes that `limit` (of a position) allows, and
/// `between` before the suffix bytes.
pub(super) fn put_front_coded(
    body: &mut Vec<u8>,
    strings: &[&[u8]],
    limit: impl Fn(usize) -> usize,
    between: impl IntoIterator<Item = u64>,
) {
    let shared = strings.windows(2).enumerate().map(|(before, pair)| match pair {
        [previous, string] => common_prefix(previous, string).min(limit(before + 1)),
        _ => 0,
    });
    let prefix_lens: Vec<usize> = shared.collect();
    put_ulebs(body, prefix_lens.iter().map(|&len| len as u64));
    // The first string shares nothing, and its prefix is not stored.
    let suffixes = || strings.iter().zip(std::iter::once(&0).chain(&prefix_lens));
    let suffixes = || suffixes().map(|(string, &prefix)| string.get(prefix..).unwrap_or_default());
    put_ulebs(body, suffixes().map(|suffix| suffix.len() as u64));
    put_ulebs(body, between);
    suffixes().for_each(|suffix| body.extend_from_slice(suffix));
}

/// Number of bytes that two strings start with in common.
pub(super) fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn too_long(what: &'static str, found: u64) -> OcdbtError {
    OcdbtError::Range { what, min: 0, max: u16::MAX.into(), found }
}

/// The only version of the format.
const FORMAT_VERSION: u64 = 0;

/// Values of the compression field of envelopes and of a database's configuration.
pub(super) const STORED: u64 = 0;
pub(super) const ZSTD: u64 = 1;

const CHECKSUM_BYTES: usize = 4;

/// Bytes of the magic and length fields, which come before the version.
const MAGIC_AND_LENGTH: usize = 12;

/// A 64-bit LEB128 integer has at most ten groups of seven bits.
const ULEB_BYTES_MAX: usize = 10;

#[cfg(test)]
mod tests {
    use super::super::testing::{envelope, hex, seal};
    use super::*;

    #[test]
    fn an_integer_may_be_redundant_but_not_wider_than_64_bits() {
        let uleb = |bytes: &str| Cursor::new(&hex(bytes)).uleb();
        assert_eq!(uleb("00"), Ok(0));
        assert_eq!(uleb("80808004"), Ok(8 << 20));
        assert_eq!(uleb("848000"), Ok(4));
        assert_eq!(uleb("84808080808080808000"), Ok(4));
        assert_eq!(uleb("ffffffffffffffffff01"), Ok(u64::MAX));
        assert_eq!(uleb("ffffffffffffffffff02"), Err(OcdbtError::Uleb));
        assert_eq!(uleb("8080808080808080808000"), Err(OcdbtError::Uleb));
        assert_eq!(uleb("80"), Err(OcdbtError::Truncated));
        assert_eq!(uleb(""), Err(OcdbtError::Truncated));
    }

    #[test]
    fn an_envelope_says_what_is_wrong_with_it() {
        let good = seal(NODE_MAGIC, b"body", false);
        assert_eq!(decode_envelope(&good, NODE_MAGIC).unwrap(), &b"body"[..]);
        let error = decode_envelope(&good, MANIFEST_MAGIC).unwrap_err();
        assert_eq!(error, OcdbtError::Magic { expected: MANIFEST_MAGIC, found: NODE_MAGIC });
        let error = decode_envelope(&good[..good.len() - 1], NODE_MAGIC).unwrap_err();
        assert_eq!(error, OcdbtError::Length { stored: 22, found: 21 });
        let mut bad = good;
        bad[15] ^= 1;
        assert!(matches!(decode_envelope(&bad, NODE_MAGIC).unwrap_err(), OcdbtError::Crc { .. }));
        let error = decode_envelope(&envelope(NODE_MAGIC, 2, b"body"), NODE_MAGIC).unwrap_err();
        assert_eq!(error, OcdbtError::Compression { found: 2 });
        // The length and checksum are right, but there is no room for anything else.
        for len in 0..18_u64 {
            let mut short = NODE_MAGIC.to_be_bytes().to_vec();
            short.extend(len.to_le_bytes());
            short.resize((len as usize).saturating_sub(4), 0);
            short.extend(crc32c::crc32c(&short).to_le_bytes());
            assert!(decode_envelope(&short, NODE_MAGIC).is_err(), "{len}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_put_into_an_envelope_comes_out(body: Vec<u8>, level in -5..6) {
            for compression in [Compression::None, Compression::Zstd { level }] {
                let sealed = encode_envelope(NODE_MAGIC, &body, compression).unwrap();
                proptest::prop_assert_eq!(&*decode_envelope(&sealed, NODE_MAGIC).unwrap(), &body[..]);
            }
        }

        #[test]
        fn integers_come_back(value: u64, bits in 0_u32..64) {
            let value = value >> bits;
            let mut bytes = Vec::new();
            put_uleb(&mut bytes, value);
            let mut cursor = Cursor::new(&bytes);
            proptest::prop_assert_eq!(cursor.uleb(), Ok(value));
            proptest::prop_assert_eq!(cursor.finish(), Ok(()));
        }
    }

    #[test]
    fn a_compressed_body_is_exactly_one_frame() {
        let decode = |frame: &[u8]| decode_envelope(&envelope(NODE_MAGIC, 1, frame), NODE_MAGIC).map(Cow::into_owned);
        let frame = zstd::encode_all(&b"body"[..], 3).unwrap();
        assert_eq!(decode(&frame), Ok(b"body".to_vec()));
        assert_eq!(decode_envelope(&seal(NODE_MAGIC, b"body", true), NODE_MAGIC).unwrap(), &b"body"[..]);
        let error = decode(&[&*frame, &*frame].concat()).unwrap_err();
        assert_eq!(error, OcdbtError::Trailing { count: frame.len() as u64 });
        assert!(matches!(decode(&frame[..frame.len() - 1]).unwrap_err(), OcdbtError::Zstd(_)));
        assert!(matches!(decode(b"no frame").unwrap_err(), OcdbtError::Zstd(_)));
        assert!(matches!(decode(b"").unwrap_err(), OcdbtError::Zstd(_)));
    }

    #[test]
    fn a_decompression_bomb_stops_at_the_limit() {
        let bomb = zstd::encode_all(&vec![0; 1 << 20][..], 3).unwrap();
        assert!(bomb.len() < 200);
        assert!(matches!(decode_zstd(&bomb, (1 << 20) - 1).unwrap_err(), OcdbtError::Limit { .. }));
        assert_eq!(decode_zstd(&bomb, 1 << 20).unwrap().len(), 1 << 20);
        // A header that promises 2^62 bytes allocates none of them.
        let lie = hex("28b52ffd e0 0000000000000040 010000");
        assert!(matches!(decode_zstd(&lie, 1 << 20).unwrap_err(), OcdbtError::Zstd(_)));
    }
}
