use proptest::prelude::*;

use super::*;
use crate::decode::decode_all;
use crate::zarr::ByteCodec;

const COMPRESSIONS: [Compression; 6] = [
    Compression::None,
    Compression::Gpu,
    Compression::Zstd { level: -7 },
    Compression::Zstd { level: 0 },
    Compression::Zstd { level: 3 },
    Compression::Zstd { level: 19 },
];

/// What metadata says of such chunks.
fn chain(compression: Compression, checksum: bool) -> &'static [ByteCodec] {
    match (compression, checksum) {
        (Compression::None, false) => &[],
        (Compression::None, true) => &[ByteCodec::Crc32c],
        (_, false) => &[ByteCodec::Zstd],
        (_, true) => &[ByteCodec::Zstd, ByteCodec::Crc32c],
    }
}

/// All of them, or none.
fn sums(checksum: bool) -> Checksums {
    Checksums { frame: checksum, crc32c: checksum }
}

/// What the blocks of one frame are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Blocks {
    raw: usize,
    rle: usize,
    compressed: usize,
    sequences: usize,
}

/// Walks the blocks of exactly one frame (RFC 8878, sections 3.1.1.1 to 3.1.1.3) and checks its header. With checksums,
/// four bytes of CRC-32C follow it.
fn walk(frame: &[u8], content_len: u64, checksum: bool) -> Blocks {
    let frame = &frame[..frame.len() - if checksum { CRC32C_BYTES } else { 0 }];
    assert_eq!(frame[..4], [0x28, 0xb5, 0x2f, 0xfd]);
    let descriptor = frame[4];
    let single_segment = descriptor & 0x20 != 0;
    assert_eq!(descriptor & 0x04 != 0, checksum, "checksum flag");
    assert_eq!(descriptor & 0x03, 0, "no dictionary");
    let mut at = 5 + usize::from(!single_segment);
    let size_len = [usize::from(single_segment), 2, 4, 8][usize::from(descriptor >> 6)];
    assert!(size_len > 0, "no content size");
    let mut size = [0; 8];
    size[..size_len].copy_from_slice(&frame[at..at + size_len]);
    let size = u64::from_le_bytes(size) + if size_len == 2 { 256 } else { 0 };
    assert_eq!(size, content_len);
    at += size_len;
    let mut blocks = Blocks::default();
    loop {
        let header = u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], 0]);
        let len = (header >> 3) as usize;
        at += 3;
        match header >> 1 & 3 {
            0 => blocks.raw += 1,
            1 => blocks.rle += 1,
            2 => {
                blocks.compressed += 1;
                blocks.sequences += sequence_count(&frame[at..at + len]);
            }
            other => panic!("block type {other}"),
        }
        // A run-length block is one byte, whatever its length says.
        at += if header >> 1 & 3 == 1 { 1 } else { len };
        if header & 1 == 1 {
            break;
        }
    }
    assert_eq!(frame.len(), at + if checksum { 4 } else { 0 }, "bytes after the last block");
    blocks
}

/// The number of sequences of a compressed block: behind its literals section.
fn sequence_count(block: &[u8]) -> usize {
    let bits = |len: usize| block[..len].iter().rev().fold(0_u64, |bits, &byte| bits << 8 | u64::from(byte));
    let literals = match (block[0] & 3, block[0] >> 2 & 3) {
        // Raw and run-length literals: a size of 5, 12 or 20 bits.
        (kind @ (0 | 1), format) => {
            let (header, size) = match format {
                1 => (2, bits(2) >> 4),
                3 => (3, bits(3) >> 4),
                _ => (1, bits(1) >> 3),
            };
            header + if kind == 0 { size as usize } else { 1 }
        }
        // Huffman-coded: two sizes of 10, 14 or 18 bits.
        (_, format) => {
            let (header, width) = [(3, 10), (3, 10), (4, 14), (5, 18)][usize::from(format)];
            header + (bits(header) >> (4 + width) & ((1 << width) - 1)) as usize
        }
    };
    let count = &block[literals..];
    match count[0] {
        0 => {
            assert_eq!(count.len(), 1, "bytes after no sequences");
            0
        }
        few @ 1..=127 => few.into(),
        255 => usize::from(count[1]) + (usize::from(count[2]) << 8) + 0x7f00,
        many => ((usize::from(many) - 128) << 8) + usize::from(count[1]),
    }
}

/// Bytes from a seed, of different kinds.
fn data(kind: u8, len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    match kind {
        0 => vec![seed as u8; len],
        1 => (0..len).map(|_| random()).collect(),
        // Repetitive: a match everywhere.
        2 => (0..len).map(|at| b"the same words again and again, "[at % 32]).collect(),
        // Skewed, as exponents are.
        3 => (0..len).map(|_| (random() & random() & random()) | 0x30).collect(),
        // bfloat16: exponents, then mantissas; with long runs of zeros in between.
        4 => (0..len)
            .map(|at| {
                if at % 5000 < 900 {
                    0
                } else if at % 2 == 0 {
                    random()
                } else {
                    0x3c | random() & 3
                }
            })
            .collect(),
        // Blocks of all kinds, one after the other.
        _ => (0..len)
            .map(|at| match at >> 17 & 3 {
                0 => 0,
                1 => random(),
                2 => (at % 7) as u8,
                _ => random() & 7,
            })
            .collect(),
    }
}

fn encode(encoder: &mut Encoder, elements: &[u8]) -> Vec<u8> {
    let mut out = b"before".to_vec();
    encoder.encode(elements, &mut out).unwrap();
    assert!(out.len() - 6 <= Encoder::encoded_len_max(Compression::Gpu, elements.len()));
    assert_eq!(out.drain(..6).as_slice(), b"before");
    out
}

fn stream(encoder: &mut Encoder, elements: &[u8], piece: usize) -> Vec<u8> {
    let mut out = b"before".to_vec();
    let mut stream = encoder.stream(elements.len() as u64).unwrap();
    for piece in elements.chunks(piece) {
        stream.push(piece, &mut out).unwrap();
    }
    stream.finish(&mut out).unwrap();
    assert_eq!(out.drain(..6).as_slice(), b"before");
    out
}

fn decode(compression: Compression, checksum: bool, encoded: &[u8], len: usize) -> Vec<u8> {
    let mut out = vec![0xee; len];
    decode_all(chain(compression, checksum), encoded, &mut out, true).unwrap();
    out
}

#[test]
fn frames_of_the_gpu_profile_hold_no_sequences_whatever_the_data() {
    for checksum in [false, true] {
        let mut encoder = Encoder::new(Compression::Gpu, sums(checksum)).unwrap();
        for kind in 0..6 {
            for len in [0, 1, 2, 10, 63, 100, 1000, 1024, 4096, 131_071, 131_072, 131_073, 300_000, 1 << 20] {
                let elements = data(kind, len, 5);
                for encoded in [encode(&mut encoder, &elements), stream(&mut encoder, &elements, 70_000)] {
                    let blocks = walk(&encoded, len as u64, checksum);
                    assert_eq!(blocks.sequences, 0, "kind {kind}, {len} bytes: {blocks:?}");
                    assert!(kind != 3 || len < 1000 || blocks.compressed > 0, "{len} bytes: {blocks:?}");
                    let frame = &encoded[..encoded.len() - if checksum { CRC32C_BYTES } else { 0 }];
                    assert_eq!(zstd::bulk::decompress(frame, len).unwrap(), elements);
                    assert_eq!(decode(Compression::Gpu, checksum, &encoded, len), elements);
                }
            }
        }
    }
}

/// The walker would see sequences: there are some at ordinary levels, the fastest included.
#[test]
fn ordinary_frames_hold_sequences() {
    for level in [-7, 1, 3, 19] {
        let mut encoder = Encoder::new(Compression::Zstd { level }, sums(false)).unwrap();
        for len in [1000, 300_000] {
            let blocks = walk(&encode(&mut encoder, &data(2, len, 1)), len as u64, false);
            assert!(blocks.sequences > 0, "level {level}, {len} bytes: {blocks:?}");
        }
    }
}

#[test]
fn the_gpu_profile_is_as_small_as_the_entropy_allows() {
    let elements = data(3, 1 << 20, 9);
    let mut encoder = Encoder::new(Compression::Gpu, sums(false)).unwrap();
    // Six independent bits that are set once in eight (two are always set): 0.544 bits each.
    let encoded = encode(&mut encoder, &elements);
    let bits = encoded.len() as f64 * 8.0 / elements.len() as f64;
    assert!(bits < 6.0 * 0.544 + 0.15, "{bits} bits a byte");
}

#[test]
fn a_damaged_chunk_with_a_checksum_is_refused() {
    for compression in COMPRESSIONS {
        let elements = data(1, 500, 3);
        let mut encoded = encode(&mut Encoder::new(compression, sums(true)).unwrap(), &elements);
        // Every bit, those of the frame's header included.
        for bit in 0..encoded.len() * 8 {
            encoded[bit / 8] ^= 1 << (bit % 8);
            let decoded = decode_all(chain(compression, true), &encoded, &mut vec![0; 500], true);
            assert!(decoded.is_err(), "{compression:?}, bit {bit}");
            encoded[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

/// Memory is promised before an encoder works; whatever it worked on before, it holds no more.
#[test]
fn an_encoder_holds_what_it_says_it_does() {
    let levels = [-7, 1, 3, 9, 12].map(|level| Compression::Zstd { level });
    for compression in levels.into_iter().chain([Compression::Gpu]) {
        let promised = |len: usize| Encoder::memory(compression, len as u64);
        for len in [0, 1, 64, 3000, 16_384, 16_385, 70_000, 1 << 20] {
            let mut encoder = Encoder::new(compression, sums(true)).unwrap();
            let elements = data(3, len, 7);
            for piece in [len.max(1), 100_000] {
                stream(&mut encoder, &elements, piece);
                encode(&mut encoder, &elements);
                let holds = encoder.zstd.as_ref().unwrap().holds();
                assert!(holds <= promised(len), "{compression:?}, {len} bytes: {holds} over {}", promised(len));
            }
        }
        assert!(promised(64) < promised(1 << 20));
    }
    // The highest level fits small chunks.
    assert!(Encoder::memory(Compression::Zstd { level: 22 }, 1 << 20) < 64 << 20);
}

#[test]
fn another_number_of_bytes_than_announced_is_refused() {
    for compression in COMPRESSIONS {
        let mut encoder = Encoder::new(compression, sums(true)).unwrap();
        let mut out = Vec::new();
        let mut stream = encoder.stream(3).unwrap();
        assert_eq!(stream.push(b"four", &mut out), Err(EncodeError::Input { expected: 3, found: 4 }));
        let mut stream = encoder.stream(3).unwrap();
        stream.push(b"ab", &mut out).unwrap();
        assert_eq!(stream.finish(&mut out), Err(EncodeError::Input { expected: 3, found: 2 }));
        // The encoder is good for the next chunk.
        let elements = data(4, 10_000, 1);
        assert_eq!(decode(compression, true, &encode(&mut encoder, &elements), 10_000), elements);
    }
}

#[test]
fn elements_are_brought_into_stored_form() {
    let stored = |name: &str, elements: &[u8]| {
        let dtype: DType = name.parse().unwrap();
        let mut in_place = elements.to_vec();
        prepare_in_place(dtype, &mut in_place);
        let prepared = prepare(dtype, elements);
        assert_eq!(*prepared, in_place);
        assert_eq!(matches!(prepared, Cow::Borrowed(_)), in_place == elements);
        in_place
    };
    assert_eq!(stored("int4", &[0xff, 0xf8, 0x07, 0]), [0x0f, 0x08, 0x07, 0]);
    assert_eq!(stored("int2", &[0xff, 0xfe, 0x01]), [0x03, 0x02, 0x01]);
    assert_eq!(stored("float4_e2m1fn", &[0x0f, 0x1f]), [0x0f, 0x0f]);
    assert_eq!(stored("bool", &[0, 1, 2, 0xff]), [0, 1, 1, 1]);
    for name in ["int8", "uint8", "float8_e4m3fn", "float8_e8m0fnu", "bfloat16", "complex128"] {
        assert_eq!(stored(name, &[0xff, 0x80, 0x7f, 0]), [0xff, 0x80, 0x7f, 0]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn what_is_encoded_is_decoded(
        kind in 0_u8..6, len in 0_usize..400_000, small: bool, seed: u64, piece in 1_usize..200_000, checksum: bool,
    ) {
        let elements = data(kind, if small { len % 300 } else { len }, seed);
        for compression in COMPRESSIONS {
            if matches!(compression, Compression::Zstd { level: 19 }) && !small {
                continue;
            }
            let mut encoder = Encoder::new(compression, sums(checksum)).unwrap();
            for encoded in [
                encode(&mut encoder, &elements),
                stream(&mut encoder, &elements, if small { piece % 50 + 1 } else { piece }),
                encode(&mut encoder, &elements),
            ] {
                if compression != Compression::None {
                    walk(&encoded, elements.len() as u64, checksum);
                }
                prop_assert_eq!(&decode(compression, checksum, &encoded, elements.len()), &elements);
            }
        }
    }
}
