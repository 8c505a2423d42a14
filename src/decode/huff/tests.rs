//! What is decoded here is what libzstd decodes, whole or damaged, by the kernel and by its twin.

use std::cell::Cell;
use std::io::Write;

use zstd::zstd_safe::{CParameter, ParamSwitch};

use super::blocks::{Block, Blocks, Coded, Literals};
use super::checksum::Checksum;
use super::lanes::{ITERATIONS, Kernel, Positions, Rows, STREAMS, SYMBOLS_PER_REFILL, Tables};
use super::tree::Table;
use super::{Frame, decode, decode_with};
use crate::decode::zstd::{Header, decompress};
use crate::encode::{Checksums, Encoder};
use crate::zarr::Compression;

/// What came of a comparison with libzstd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Both decoded it, to the same bytes.
    Same,
    /// It was left to libzstd, which decoded it.
    Left,
    /// Both refused.
    Refused,
}

/// Decodes any bytes as a frame of so many decoded bytes, here and by libzstd. The body of a fuzzer: it panics if something is
/// accepted that libzstd refuses, or decoded to other bytes.
fn compare(kernel: Kernel, encoded: &[u8], decoded_len: usize) -> Verdict {
    let Ok((header, frame)) = Header::of_whole(encoded, decoded_len as u64) else { return Verdict::Refused };
    let (mut own, mut reference) = (vec![0xaa; decoded_len], vec![0x55; decoded_len]);
    let accepted = decode_with(kernel, 1, usize::MAX, header.literals(frame), &mut own).is_some();
    // The same in groups of one block or more.
    let mut shared = vec![0x77; decoded_len];
    let group_bytes = [1, 100_000, 300_000][encoded.len() % 3];
    let in_groups = decode_with(kernel, 1, group_bytes, header.literals(frame), &mut shared).is_some();
    assert!(in_groups == accepted && (!accepted || shared == own), "groups of {group_bytes} bytes are another matter");
    match (accepted, decompress(frame, &mut reference)) {
        (true, Ok(())) => {
            assert!(own == reference, "decoded to other bytes");
            Verdict::Same
        }
        (true, Err(error)) => panic!("accepted, but libzstd says: {error}"),
        (false, Ok(())) => Verdict::Left,
        (false, Err(_)) => Verdict::Refused,
    }
}

/// Both kernels, or the twin alone on other processors.
fn kernels() -> Vec<Kernel> {
    [Kernel::detect(), Some(Kernel::Twin)].into_iter().flatten().collect()
}

fn frame_of(encoded: &[u8], decoded_len: usize) -> Frame<'_> {
    let (header, frame) = Header::of_whole(encoded, decoded_len as u64).unwrap();
    header.literals(frame)
}

/// A generator of numbers: `xorshift64`.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// About normally distributed, with a standard deviation of 0.02.
    fn weight(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32).sum();
        (sum - 6.0) * 0.02
    }
}

/// Bytes of many kinds, `len` of each.
fn kinds(len: usize) -> Vec<(&'static str, Vec<u8>)> {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let weights: Vec<f32> = (0..len.div_ceil(2)).map(|_| numbers.weight()).collect();
    let bf16 = weights.iter().flat_map(|weight| half::bf16::from_f32(*weight).to_le_bytes());
    let f16 = weights.iter().flat_map(|weight| half::f16::from_f32(*weight).to_le_bytes());
    let float = weights.iter().flat_map(|weight| weight.to_le_bytes());
    let mut kinds: Vec<(&'static str, Vec<u8>)> = vec![
        ("bf16", bf16.collect()),
        ("f16", f16.collect()),
        ("f32", float.collect()),
        ("random bytes", (0..len).map(|_| numbers.next() as u8).collect()),
        ("few symbols", (0..len).map(|_| [0, 0, 0, 1, 1, 7, 200][numbers.below(7)]).collect()),
        ("small integers", (0..len).flat_map(|_| (numbers.below(300) as i32 - 150).to_le_bytes()).collect()),
        ("counting", (0..len as u32).flat_map(u32::to_le_bytes).collect()),
        ("zeros", vec![0; len]),
        ("half zeros", (0..len).map(|at| if at % 90_000 < 45_000 { 0 } else { numbers.next() as u8 >> 2 }).collect()),
    ];
    kinds.iter_mut().for_each(|(_, bytes)| bytes.truncate(len));
    kinds
}

/// A frame of one block a piece, as far as libzstd does not split them, with Huffman-coded literals at every level.
fn encode(pieces: &[&[u8]], level: i32, checksum: bool, content_size: bool) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), level).unwrap();
    encoder.set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable)).unwrap();
    encoder.include_checksum(checksum).unwrap();
    if content_size {
        encoder.set_pledged_src_size(Some(pieces.iter().map(|piece| piece.len() as u64).sum())).unwrap();
    }
    for piece in pieces {
        encoder.write_all(piece).unwrap();
        encoder.flush().unwrap();
    }
    encoder.finish().unwrap()
}

fn encode_gpu(bytes: &[u8], checksum: bool) -> Vec<u8> {
    let mut encoded = Vec::new();
    let checksums = Checksums { frame: checksum, crc32c: false };
    Encoder::new(Compression::Gpu, checksums).unwrap().encode(bytes, &mut encoded).unwrap();
    encoded
}

#[test]
fn every_level_and_kind_decodes_as_libzstd_does() {
    let mut same = 0;
    for (name, bytes) in kinds(140_001) {
        for level in -7..=19 {
            let encoded = encode(&[&bytes], level, level % 2 == 0, level % 3 == 0);
            for kernel in kernels() {
                let verdict = compare(kernel, &encoded, bytes.len());
                assert_ne!(verdict, Verdict::Refused, "{name} at level {level}");
                same += usize::from(verdict == Verdict::Same);
            }
        }
    }
    println!("{same} frames were decoded without libzstd");
    assert!(same > 100, "{same}");
}

#[test]
fn frames_without_sequences_are_never_left_to_libzstd() {
    for (name, bytes) in kinds(600_000) {
        for checksum in [false, true] {
            let encoded = encode_gpu(&bytes, checksum);
            for kernel in kernels() {
                let verdict = compare(kernel, &encoded, bytes.len());
                // Blocks that do not compress are raw, constant ones are a byte: libzstd only copies and fills, too.
                let copied = matches!(name, "random bytes" | "zeros");
                assert_eq!(verdict, if copied { Verdict::Left } else { Verdict::Same }, "{name}");
            }
        }
    }
}

#[test]
fn every_length_decodes() {
    let (_, bytes) = kinds(3 << 20).swap_remove(0);
    let mut lens: Vec<usize> = (0..40).collect();
    lens.extend([255, 256, 257, 1023, 1024, 1025, 4000]);
    for blocks in 1..=4 {
        lens.extend([0, 299, 300, 301, 305, 556, 40_300].map(|more| (blocks << 17) - 300 + more));
    }
    lens.push(bytes.len());
    let mut same = 0;
    for len in lens {
        let encoded = [encode_gpu(&bytes[..len], true), encode(&[&bytes[..len]], 1, false, false)];
        for (encoded, kernel) in encoded.iter().zip(kernels().into_iter().cycle()) {
            let verdict = compare(kernel, encoded, len);
            assert_ne!(verdict, Verdict::Refused, "{len}");
            assert!(len < 131_100 || verdict == Verdict::Same || encoded.len() > len, "{len}: {verdict:?}");
            same += usize::from(verdict == Verdict::Same);
        }
    }
    assert!(same > 40, "{same}");
}

/// Pieces of a frame that has blocks of every kind and of all sizes.
fn mixed(numbers: &mut Numbers, kinds: &[(&str, Vec<u8>)], blocks: usize, len_max: usize) -> Vec<u8> {
    let mut pieces = Vec::new();
    // Alike blocks share a tree.
    let kinds = if numbers.below(3) == 0 { &kinds[..1] } else { kinds };
    for _ in 0..blocks {
        let (_, bytes) = &kinds[numbers.below(kinds.len())];
        let len = 1 + numbers.below(len_max);
        let start = numbers.below(bytes.len() - len);
        pieces.push(&bytes[start..start + len]);
    }
    let level = [-7, 1, 3, 6][numbers.below(4)];
    encode(&pieces, level, numbers.below(4) == 0, numbers.below(2) == 0)
}

fn decoded_len(frame: &[u8]) -> usize {
    zstd::decode_all(frame).unwrap().len()
}

#[test]
fn blocks_of_all_kinds_mix() {
    let mut numbers = Numbers(7);
    let kinds = kinds(300_000);
    let (mut raw, mut rle, mut tree, mut treeless, mut single, mut sequences, mut same) = (0, 0, 0, 0, 0, 0, 0);
    for _ in 0..200 {
        let encoded = mixed(&mut numbers, &kinds, 8, 5000);
        let len = decoded_len(&encoded);
        for block in Blocks::new(frame_of(&encoded, len)).flatten() {
            sequences += block.sequence_count;
            match block.literals {
                Literals::Raw { .. } => raw += 1,
                Literals::Rle { .. } => rle += 1,
                Literals::Huffman(Coded { four_streams: false, .. }) => single += 1,
                Literals::Huffman(Coded { has_tree: true, .. }) => tree += 1,
                Literals::Huffman(_) => treeless += 1,
            }
        }
        for kernel in kernels() {
            let verdict = compare(kernel, &encoded, len);
            assert_ne!(verdict, Verdict::Refused);
            same += usize::from(verdict == Verdict::Same);
        }
    }
    println!(
        "raw {raw}, rle {rle}, tree {tree}, treeless {treeless}, one stream {single}, sequences {sequences}, decoded here {same}"
    );
    assert!([raw, rle, tree, treeless, single, sequences, same].iter().all(|count| *count > 10));
}

/// Damages a frame: bits, bytes, a cut, or a piece of another frame.
fn mutate(numbers: &mut Numbers, frame: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=numbers.below(3) {
        // Headers and trees are where damage shows: they stand in front.
        let reach = if numbers.below(2) == 0 { frame.len().min(200) } else { frame.len() };
        let at = numbers.below(reach.max(1));
        match numbers.below(8) {
            0 => frame.truncate(at),
            1 => {
                let len = (1 + numbers.below(60)).min(other.len());
                let start = numbers.below(other.len() - len + 1);
                let end = (at + len).min(frame.len());
                frame.splice(at..end, other[start..start + len].iter().copied());
            }
            2 => frame.iter_mut().skip(at).take(1).for_each(|byte| *byte = numbers.next() as u8),
            3 => frame.insert(at, numbers.next() as u8),
            4 => drop(frame.splice(at..(at + 1).min(frame.len()), [])),
            _ => frame.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << numbers.below(8)),
        }
        if frame.is_empty() {
            return;
        }
    }
}

#[test]
fn damaged_frames_decode_as_libzstd_decodes_them() {
    let cases = match std::env::var("TOUCHDOWN_FUZZ_CASES") {
        Ok(cases) => cases.parse().unwrap(),
        Err(_) => 20_000,
    };
    let seed = match std::env::var("TOUCHDOWN_FUZZ_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => 1,
    };
    let mut numbers = Numbers(seed);
    let kinds: Vec<_> = kinds(100_000).into_iter().filter(|(name, _)| *name != "counting").collect();
    let frames: Vec<(Vec<u8>, usize)> = std::iter::repeat_with(|| {
        let (blocks, len_max) = if numbers.below(20) == 0 { (3, 40_000) } else { (4, 700) };
        let frame = mixed(&mut numbers, &kinds, blocks, len_max);
        let len = decoded_len(&frame);
        (frame, len)
    })
    .filter(|(frame, len)| compare(Kernel::Twin, frame, *len) == Verdict::Same)
    .take(100)
    .collect();
    let kernels = kernels();
    let mut counts = [0usize; 3];
    for case in 0..cases {
        let (mut frame, len) = frames[numbers.below(frames.len())].clone();
        let other = &frames[numbers.below(frames.len())].0;
        mutate(&mut numbers, &mut frame, other);
        counts[compare(kernels[case % kernels.len()], &frame, len) as usize] += 1;
    }
    let [same, left, refused] = counts;
    println!("of {cases} damaged frames {same} were decoded alike, {left} left to libzstd, {refused} refused by both");
    assert!(same * 50 > cases && refused * 50 > cases);
}

#[test]
fn what_follows_a_frame_is_not_taken_for_it() {
    let (_, bytes) = kinds(300_000).swap_remove(0);
    for checksum in [false, true] {
        let encoded = encode_gpu(&bytes, checksum);
        let frame = frame_of(&encoded, bytes.len());
        let mut out = vec![0; bytes.len()];
        assert_eq!(decode_with(Kernel::Twin, 1, usize::MAX, frame, &mut out), Some(()));
        assert!(out == bytes);
        for more in [&[0][..], &[0; 4], &encoded] {
            let followed = [&encoded, more].concat();
            let frame = Frame { bytes: &followed, ..frame };
            assert_eq!(decode_with(Kernel::Twin, 1, usize::MAX, frame, &mut out), None);
            assert_eq!(compare(Kernel::Twin, &followed, bytes.len()), Verdict::Same);
        }
        // Another length than that of the output is libzstd's business.
        assert_eq!(decode_with(Kernel::Twin, 1, usize::MAX, frame, &mut vec![0; bytes.len() + 1]), None);
        assert_eq!(decode_with(Kernel::Twin, 1, usize::MAX, frame, &mut vec![0; bytes.len() - 1]), None);
    }
}

#[test]
fn a_wrong_checksum_is_left_to_libzstd() {
    let (_, bytes) = kinds(300_000).swap_remove(0);
    let mut encoded = encode_gpu(&bytes, true);
    *encoded.last_mut().unwrap() ^= 1;
    for kernel in kernels() {
        assert_eq!(compare(kernel, &encoded, bytes.len()), Verdict::Refused);
    }
}

#[test]
fn small_blocks_and_lone_ones_are_left_to_libzstd() {
    let (_, bytes) = kinds(300_000).swap_remove(0);
    let pieces: Vec<&[u8]> = bytes.chunks(3000).collect();
    for (encoded, len) in
        [(encode(&pieces, 1, false, true), bytes.len()), (encode_gpu(&bytes[..131_072], false), 131_072)]
    {
        let frame = frame_of(&encoded, len);
        assert_eq!(decode(frame, &mut vec![0; len]), None);
    }
    let encoded = encode_gpu(&bytes, false);
    let taken = decode(frame_of(&encoded, bytes.len()), &mut vec![0; bytes.len()]);
    assert_eq!(taken.is_some(), Kernel::detect().is_some());
}

#[test]
fn checksums_are_those_of_libzstd() {
    let mut numbers = Numbers(3);
    for len in (0..200).chain([1000, 1023, 1024, 5000]) {
        let bytes: Vec<u8> = (0..len).map(|_| numbers.next() as u8).collect();
        let frame = encode(&[&bytes], 1, true, true);
        let stored = u32::from_le_bytes(*frame.last_chunk().unwrap());
        assert_eq!(Checksum::new().finish(&bytes), Some(stored), "{len}");
        let mut followed = Checksum::new();
        let range = followed.next(len, 100);
        assert!(range.len() <= 100 && range.len().is_multiple_of(32));
        bytes[range].as_chunks().0.iter().for_each(|stripe| super::checksum::stripe(followed.lanes_mut(), stripe));
        assert_eq!(followed.finish(&bytes), Some(stored), "{len}");
    }
}

/// The tables of the first blocks with a tree of some frame.
fn tables(kinds: &[(&str, Vec<u8>)]) -> Tables {
    let tables = [Table::new(), Table::new()];
    for (table, (_, bytes)) in tables.iter().zip(kinds) {
        let encoded = encode_gpu(bytes, false);
        let frame = frame_of(&encoded, bytes.len());
        let trees = Blocks::new(frame).filter_map(|block| match block {
            Some(Block { literals: Literals::Huffman(coded), .. }) if coded.has_tree => Some(coded),
            _ => None,
        });
        let literals = trees.take(1).next().unwrap();
        table.read(&encoded[literals.start..literals.end]).unwrap();
    }
    tables
}

#[test]
fn the_kernel_does_what_its_twin_does_and_stays_inside_the_frame() {
    let Some(kernel) = Kernel::detect() else { return };
    let tables = tables(&kinds(50_000)[1..3]);
    let mut numbers = Numbers(11);
    let staging = || -> Vec<Rows> { (0..ITERATIONS).map(|_| std::array::from_fn(|_| Cell::new(0))).collect() };
    let (own, twin) = (staging(), staging());
    let mut decoded = 0;
    for case in 0..1000 {
        // The allocation ends where the frame does, so that tools which watch memory see a read beyond it.
        let frame: Vec<u8> = (0..numbers.below(3000)).map(|_| numbers.next() as u8).collect();
        let end = (frame.len() + if case % 10 == 0 { 2 } else { 0 }) * 8;
        let positions: Positions = std::array::from_fn(|_| numbers.below(end.max(1)));
        let both = numbers.below(2) == 0;
        let wanted = 1 + numbers.below(ITERATIONS);
        let (mut own_positions, mut twin_positions) = (positions, positions);
        let count = kernel.run(both, &frame, &tables, &mut own_positions, &own[..wanted]);
        let twin_count = Kernel::Twin.run(both, &frame, &tables, &mut twin_positions, &twin[..count]);
        assert_eq!((count, own_positions), (twin_count, twin_positions));
        let streams = if both { STREAMS } else { STREAMS / 2 };
        for (own, twin) in own[..count].iter().zip(&twin) {
            for row in 0..SYMBOLS_PER_REFILL {
                let (start, end) = (row * STREAMS, row * STREAMS + streams);
                assert_eq!(own[start..end], twin[start..end]);
            }
        }
        decoded += count;
    }
    assert!(decoded > 1000, "{decoded}");
}

/// How a pool decodes what one thread decodes, and that it does so by itself.
#[test]
fn large_frames_are_decoded_by_several_threads() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for (kind, bytes) in kinds(9 << 20).into_iter().filter(|(kind, _)| ["bf16", "f32", "small integers"].contains(kind))
    {
        for level in [-1, 3] {
            let encoded = encode(&[&bytes], level, level > 0, true);
            let frame = frame_of(&encoded, bytes.len());
            let mut out = vec![0; bytes.len()];
            let here = decode(frame, &mut out);
            assert!(here.is_none() || out == bytes, "{kind}, level {level}");
            out.fill(1);
            assert_eq!(pool.install(|| decode(frame, &mut out)), here, "{kind}, level {level}");
            assert!(here.is_none() || out == bytes, "{kind}, level {level}, in groups");
        }
    }
}
