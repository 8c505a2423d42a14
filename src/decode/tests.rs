//! Laws that every codec keeps: pieces do not matter, lengths are exact, damage is an error.

use std::io::Write;

use proptest::prelude::*;

use super::*;

/// Bytes that compress somewhat.
fn sample(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i / 9 * 7) as u8 ^ ((i * i) >> 11) as u8).collect()
}

/// The chain's encoding, by the reference encoders.
fn encode(chain: &[ByteCodec], decoded: &[u8]) -> Vec<u8> {
    chain.iter().fold(decoded.to_vec(), |bytes, codec| match codec {
        ByteCodec::Zstd => ::zstd::encode_all(bytes.as_slice(), 1).unwrap(),
        ByteCodec::Crc32c => [bytes.as_slice(), &::crc32c::crc32c(&bytes).to_le_bytes()].concat(),
        #[cfg(feature = "gzip")]
        ByteCodec::Gzip => {
            let header = flate2::GzBuilder::new().filename("name").comment("text").extra(vec![7; 300]);
            let mut encoder = header.write(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&bytes).unwrap();
            encoder.finish().unwrap()
        }
        #[cfg(feature = "gzip")]
        ByteCodec::Zlib => {
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&bytes).unwrap();
            encoder.finish().unwrap()
        }
        #[cfg(feature = "bz2")]
        ByteCodec::Bz2 => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            encoder.write_all(&bytes).unwrap();
            encoder.finish().unwrap()
        }
        // Stored plain, in blocks of 1000 bytes; the other kinds come from c-blosc.
        #[cfg(feature = "blosc")]
        ByteCodec::Blosc => {
            let len = bytes.len() as u32;
            let sizes = [len, len.min(1000), len + 16].map(u32::to_le_bytes).concat();
            [&[2, 1, 2, 4], sizes.as_slice(), &bytes].concat()
        }
        _ => unreachable!("the tests encode what this build decodes"),
    })
}

/// Runs a decoder over pieces whose sizes go round.
fn in_pieces(
    chain: &[ByteCodec],
    encoded: &[u8],
    out: &mut [u8],
    verify: bool,
    pieces: &[(usize, usize)],
) -> Result<(), DecodeError> {
    let mut decoder = decoder(chain, encoded.len() as u64, out.len() as u64, verify, u64::MAX)?;
    let mut total = Step::default();
    let mut idle = 0;
    for (input, output) in pieces.iter().cycle() {
        let input_end = (total.read + input).min(encoded.len());
        let output_end = (total.written + output).min(out.len());
        let step = decoder.step(&encoded[total.read..input_end], &mut out[total.written..output_end])?;
        total.read += step.read;
        total.written += step.written;
        idle = if step == Step::default() { idle + 1 } else { 0 };
        if idle > pieces.len() {
            break;
        }
    }
    decoder.finish()
}

/// Every codec of this build alone, and chains of them.
fn chains() -> Vec<Vec<ByteCodec>> {
    use ByteCodec::{Blosc, Bz2, Crc32c, Gzip, Zlib, Zstd};
    let chains = [
        vec![],
        vec![Zstd],
        vec![Gzip],
        vec![Zlib],
        vec![Bz2],
        vec![Blosc],
        vec![Crc32c],
        vec![Crc32c, Crc32c],
        vec![Zstd, Crc32c],
        vec![Crc32c, Zstd],
        vec![Crc32c, Zstd, Crc32c],
        vec![Zstd, Zstd],
        vec![Zstd, Crc32c, Gzip, Crc32c],
        vec![Blosc, Crc32c, Zstd],
        vec![Gzip, Blosc, Crc32c],
        vec![Bz2, Zlib],
    ];
    chains.into_iter().filter(|chain| check(chain).is_ok()).collect()
}

fn any_chain() -> impl Strategy<Value = Vec<ByteCodec>> {
    prop::sample::select(chains())
}

fn any_pieces() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let size = || prop_oneof![1usize..4, 1usize..300, 1000usize..100_000];
    prop::collection::vec((size(), size()), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn pieces_do_not_matter(
        chain in any_chain(),
        len in prop_oneof![0usize..20, 1000usize..5000, 100_000usize..200_000],
        pieces in any_pieces(),
        verify: bool,
    ) {
        let decoded = sample(len);
        let encoded = encode(&chain, &decoded);
        let mut whole = vec![0xaa; len];
        prop_assert_eq!(decode_all(&chain, &encoded, &mut whole, verify), Ok(()));
        prop_assert!(whole == decoded);
        let mut pieced = vec![0xaa; len];
        prop_assert_eq!(in_pieces(&chain, &encoded, &mut pieced, verify, &pieces), Ok(()));
        prop_assert!(pieced == decoded);
    }

    #[test]
    fn another_length_is_an_error(chain in any_chain(), len in 0usize..3000, more in 1usize..100) {
        let encoded = encode(&chain, &sample(len));
        // A checksum cannot tell that its place moved, so it is left out here.
        for verify in [false, true] {
            let found = decode_all(&chain, &encoded, &mut vec![0; len + more], verify);
            prop_assert!(found.is_err());
            let found = in_pieces(&chain, &encoded, &mut vec![0; len + more], verify, &[(77, 99)]);
            prop_assert!(found.is_err());
            if more <= len {
                let found = decode_all(&chain, &encoded, &mut vec![0; len - more], verify);
                prop_assert!(found.is_err());
                let found = in_pieces(&chain, &encoded, &mut vec![0; len - more], verify, &[(77, 99)]);
                prop_assert!(found.is_err());
            }
        }
    }

    #[test]
    fn truncation_is_an_error(chain in any_chain(), len in 1usize..3000, cut: prop::sample::Index) {
        let encoded = encode(&chain, &sample(len));
        let encoded = &encoded[..cut.index(encoded.len())];
        prop_assert!(decode_all(&chain, encoded, &mut vec![0; len], true).is_err());
        prop_assert!(in_pieces(&chain, encoded, &mut vec![0; len], true, &[(100, 100)]).is_err());
    }

    #[test]
    fn damage_is_an_error_or_harmless(
        chain in any_chain(),
        len in 1usize..3000,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
        verify: bool,
    ) {
        let decoded = sample(len);
        let mut encoded = encode(&chain, &decoded);
        for (at, bit) in flips {
            let at = at.index(encoded.len());
            encoded[at] ^= 1 << bit;
        }
        let (mut whole, mut pieced) = (vec![0; len], vec![0; len]);
        let one = decode_all(&chain, &encoded, &mut whole, verify);
        let other = in_pieces(&chain, &encoded, &mut pieced, verify, &[(50, 50)]);
        if one.is_ok() && other.is_ok() {
            prop_assert!(whole == pieced);
        }
        if verify && chain.last() == Some(&ByteCodec::Crc32c) && one.is_ok() {
            prop_assert!(whole == decoded);
        }
    }

    #[test]
    fn any_bytes_return(
        chain in any_chain(), encoded in prop::collection::vec(any::<u8>(), 0..200), len in 0usize..500,
    ) {
        let one = decode_all(&chain, &encoded, &mut vec![0; len], true);
        let other = in_pieces(&chain, &encoded, &mut vec![0; len], true, &[(7, 13)]);
        prop_assert_eq!(one.is_ok(), other.is_ok());
    }
}

#[test]
fn checksums_are_compared_only_on_request() {
    for chain in [vec![ByteCodec::Crc32c], vec![ByteCodec::Zstd, ByteCodec::Crc32c]] {
        let mut encoded = encode(&chain, &sample(100));
        *encoded.last_mut().unwrap() ^= 1;
        let mut out = [0; 100];
        for pieces in [[(1, 1)], [(500, 500)]] {
            let found = in_pieces(&chain, &encoded, &mut out, true, &pieces);
            assert!(matches!(found, Err(DecodeError::Checksum { .. })), "{found:?}");
            assert_eq!(in_pieces(&chain, &encoded, &mut out, false, &pieces), Ok(()));
        }
        assert!(matches!(decode_all(&chain, &encoded, &mut out, true), Err(DecodeError::Checksum { .. })));
        assert_eq!(decode_all(&chain, &encoded, &mut out, false), Ok(()));
        assert_eq!(out.as_slice(), sample(100));
    }
}

#[test]
fn frames_of_every_kind_are_read_and_what_follows_is_ignored() {
    let decoded = sample(300_000);
    for checksum in [false, true] {
        for stated in [false, true] {
            let mut encoder = ::zstd::Encoder::new(Vec::new(), 3).unwrap();
            encoder.include_checksum(checksum).unwrap();
            encoder.include_contentsize(stated).unwrap();
            if stated {
                encoder.set_pledged_src_size(Some(decoded.len() as u64)).unwrap();
            }
            encoder.write_all(&decoded).unwrap();
            let mut encoded = encoder.finish().unwrap();
            encoded.extend(b"what follows");
            encoded.extend(::zstd::encode_all(b"more".as_slice(), 1).unwrap());
            let mut out = vec![0; decoded.len()];
            assert_eq!(decode_all(&[ByteCodec::Zstd], &encoded, &mut out, true), Ok(()));
            assert!(out == decoded);
            out.fill(0);
            assert_eq!(in_pieces(&[ByteCodec::Zstd], &encoded, &mut out, true, &[(4000, 70_000)]), Ok(()));
            assert!(out == decoded);
        }
    }
}

#[test]
fn lengths_are_named() {
    let encoded = encode(&[ByteCodec::Crc32c], &sample(10));
    let chain = [ByteCodec::Crc32c];
    assert_eq!(
        in_pieces(&chain, &encoded, &mut [0; 9], false, &[(100, 100)]),
        Err(DecodeError::Long { expected: 9, found: 10 })
    );
    assert_eq!(
        in_pieces(&chain, &encoded, &mut [0; 11], true, &[(100, 100)]),
        Err(DecodeError::Short { expected: 11, found: 10 })
    );
    let mut decoder = decoder(&chain, 14, 10, true, u64::MAX).unwrap();
    assert_eq!(decoder.step(&[0; 15], &mut [0; 10]), Err(DecodeError::Input { expected: 14, found: 15 }));
    assert_eq!(decoder.finish(), Err(DecodeError::Input { expected: 14, found: 0 }));
}

#[test]
fn a_chain_is_bounded() {
    let chain = vec![ByteCodec::Crc32c; CODEC_CHAIN_MAX + 1];
    assert_eq!(check(&chain), Err(DecodeError::Chain(CODEC_CHAIN_MAX + 1)));
    assert_eq!(decode_all(&chain, &[], &mut [], true), Err(DecodeError::Chain(CODEC_CHAIN_MAX + 1)));
}

#[test]
fn costs_follow_the_chain() {
    let streams = |chain: &[ByteCodec]| cost(chain, 1 << 20, 2 << 20, ZSTD_WINDOW_MAX).streams;
    assert!(streams(&[ByteCodec::Crc32c, ByteCodec::Zstd, ByteCodec::Gzip]));
    assert!(!streams(&[ByteCodec::Blosc, ByteCodec::Crc32c]));
    let bytes = |chain: &[ByteCodec], decoded| cost(chain, 1 << 20, decoded, ZSTD_WINDOW_MAX).working_bytes;
    assert!(bytes(&[], u64::MAX) < 1 << 20);
    assert!(bytes(&[ByteCodec::Zstd], 1 << 20) < 2 << 20);
    assert!(bytes(&[ByteCodec::Zstd], u64::MAX) < (128 << 20) + (1 << 20));
    assert!(bytes(&[ByteCodec::Blosc], 1 << 20) >= 3 << 20);
    assert_eq!(cost(&[ByteCodec::Blosc, ByteCodec::Zstd], u64::MAX, u64::MAX, ZSTD_WINDOW_MAX).working_bytes, u64::MAX);
}

#[cfg(not(feature = "gzip"))]
#[test]
fn codecs_that_are_not_built_name_their_feature() {
    let missing = |codec, feature| Err(DecodeError::NotBuilt { codec, feature });
    assert_eq!(decode_all(&[ByteCodec::Gzip], &[], &mut [], true), missing("gzip", "gzip"));
    assert_eq!(decode_all(&[ByteCodec::Zlib], &[], &mut [], true), missing("zlib", "gzip"));
    assert!(decoder(&[ByteCodec::Zstd, ByteCodec::Gzip], 0, 0, true, u64::MAX).is_err());
}

#[cfg(all(feature = "gzip", feature = "bz2"))]
#[test]
fn members_may_follow_one_another() {
    for chain in [[ByteCodec::Gzip], [ByteCodec::Bz2]] {
        let (first, second) = (sample(100), sample(2000));
        let mut encoded = [encode(&chain, &first), encode(&chain, &second)].concat();
        let mut out = vec![0; 2100];
        assert_eq!(in_pieces(&chain, &encoded, &mut out, true, &[(1, 1)]), Ok(()));
        assert_eq!(out, [first, second].concat());
        assert_eq!(decode_all(&chain, &encoded, &mut out, true), Ok(()));
        encoded.push(0);
        assert!(decode_all(&chain, &encoded, &mut out, true).is_err());
        assert!(in_pieces(&chain, &encoded, &mut out, true, &[(1, 1)]).is_err());
    }
}

#[cfg(feature = "blosc")]
mod blosc_vectors {
    use super::*;

    struct Vector {
        name: String,
        decoded: Vec<u8>,
        container: Vec<u8>,
    }

    /// Containers written by c-blosc; see `tests/fixtures/blosc/make.py`.
    fn vectors() -> Vec<Vector> {
        let mut bytes = include_bytes!("../../tests/fixtures/blosc/vectors.bin").as_slice();
        let mut take = |count: usize| {
            let (front, rest) = bytes.split_at_checked(count)?;
            bytes = rest;
            Some(front)
        };
        let mut vectors = Vec::new();
        while let Some(&[name_len]) = take(1) {
            let name = String::from_utf8(take(usize::from(name_len)).unwrap().to_vec()).unwrap();
            let (shuffle, size) = (take(1).unwrap()[0], take(1).unwrap()[0]);
            let mut number = || u32::from_le_bytes(*take(4).unwrap().first_chunk().unwrap()) as usize;
            let (decoded_len, container_len) = (number(), number());
            let container = take(container_len).unwrap().to_vec();
            let noise = decoded_len == 640;
            let decoded = (0..decoded_len as u64)
                .map(|i| {
                    if noise {
                        (((i * 2_654_435_761) & 0xffff_ffff) >> 13) as u8
                    } else {
                        (i / 64 * 7) as u8 ^ ((i % 4) << 3) as u8
                    }
                })
                .collect();
            vectors.push(Vector { name: format!("{name} {shuffle} {size} {decoded_len}"), decoded, container });
        }
        vectors
    }

    #[test]
    fn what_c_blosc_writes_is_read() {
        let vectors = vectors();
        assert_eq!(vectors.len(), 5 * (3 * 6 * 2 + 1));
        for Vector { name, decoded, container } in vectors {
            let mut out = vec![0; decoded.len()];
            assert_eq!(decode_all(&[ByteCodec::Blosc], &container, &mut out, true), Ok(()), "{name}");
            assert!(out == decoded, "{name}");
            for pieces in [[(1, 1)], [(100, 3000)], [(10_000, 10_000)]] {
                out.fill(0);
                assert_eq!(in_pieces(&[ByteCodec::Blosc], &container, &mut out, true, &pieces), Ok(()), "{name}");
                assert!(out == decoded, "{name}");
            }
        }
    }

    #[test]
    fn snappy_streams_are_read() {
        let decoded = sample(3000);
        let blocks = decoded.chunks(2000).map(|block| snap::raw::Encoder::new().compress_vec(block).unwrap());
        let (mut offsets, mut body) = (Vec::new(), Vec::new());
        for block in blocks {
            offsets.extend((16 + 8 + body.len() as u32).to_le_bytes());
            body.extend((block.len() as u32).to_le_bytes());
            body.extend(block);
        }
        let sizes = [3000, 2000, (16 + 8 + body.len()) as u32].map(u32::to_le_bytes).concat();
        let container = [&[2, 1, 2 << 5 | 16, 1], sizes.as_slice(), &offsets, &body].concat();
        let mut out = vec![0; 3000];
        assert_eq!(decode_all(&[ByteCodec::Blosc], &container, &mut out, true), Ok(()));
        assert!(out == decoded);
    }

    #[test]
    fn absurd_headers_are_refused() {
        let header = |head: [u8; 4], sizes: [u32; 3]| [head.as_slice(), &sizes.map(u32::to_le_bytes).concat()].concat();
        let decode = |container: &[u8], len: usize| {
            let mut out = vec![0; len];
            let whole = decode_all(&[ByteCodec::Blosc], container, &mut out, true);
            assert_eq!(in_pieces(&[ByteCodec::Blosc], container, &mut out, true, &[(5, 5)]).is_ok(), whole.is_ok());
            whole
        };
        assert_eq!(decode(&header([2, 1, 0, 1], [0, 0, 16]), 0), Ok(()));
        for (head, sizes) in [
            ([3, 1, 0, 1], [8, 8, 16]),
            ([2, 2, 0, 1], [8, 8, 24]),
            ([2, 1, 0xa0, 1], [8, 8, 24]),
            ([2, 1, 8, 1], [8, 8, 24]),
            ([2, 1, 0, 0], [8, 8, 24]),
            ([2, 1, 0, 1], [8, 0, 24]),
            ([2, 1, 0, 1], [8, 9, 24]),
            ([2, 1, 0, 1], [8, 1, 47]),
            ([2, 1, 2, 1], [8, 8, 25]),
            ([2, 1, 0, 1], [u32::MAX, u32::MAX, u32::MAX]),
        ] {
            assert!(decode(&header(head, sizes), 8).is_err(), "{head:?} {sizes:?}");
        }
        let error = decode(&header([2, 1, 0, 1], [1 << 30, 1 << 20, 1 << 20]), 8);
        assert_eq!(error, Err(DecodeError::Long { expected: 8, found: 1 << 30 }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn damaged_containers_return(
            vector in prop::sample::select(vectors().into_iter().map(|v| (v.decoded.len(), v.container)).collect::<Vec<_>>()),
            at: prop::sample::Index,
            near_start: bool,
            byte: u8,
        ) {
            let (len, mut container) = vector;
            let bound = if near_start { 40.min(container.len()) } else { container.len() };
            let at = at.index(bound);
            container[at] = byte;
            let (mut whole, mut pieced) = (vec![0; len], vec![0; len]);
            let one = decode_all(&[ByteCodec::Blosc], &container, &mut whole, true);
            let other = in_pieces(&[ByteCodec::Blosc], &container, &mut pieced, true, &[(500, 300)]);
            prop_assert_eq!(one.is_ok(), other.is_ok());
            prop_assert!(one.is_err() || whole == pieced);
        }
    }
}
