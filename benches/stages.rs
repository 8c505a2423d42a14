//! Speed of the stages of a load, one core each but for the reads, beside what the machine allows: a memory copy.
//!
//!     cargo bench --bench stages
//!     cargo bench --bench stages -- decoders      # only zstd: libzstd beside what loads decode with
//!
//! Every figure is the best of several rounds in GB/s of the bytes named in its row, but for the decoders, which take turns and
//! show medians; inputs are made here, from a fixed seed.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints and may stop")]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use touchdown::encode::{Checksums, Encoder};
use touchdown::io::{self, Io, ReadAt, Reader, Ring, Root, Ticket};
use touchdown::limits::READER_THREADS_MIN;
use touchdown::relpath::RelPath;
use touchdown::transform::cpu::{SharedBytes, convert, execute};
use touchdown::transform::{Convert, Op};
use touchdown::zarr::{ByteCodec, Compression};
use touchdown::{CastPolicy, DType, decode};

/// Bytes that each stage works on: more than any cache of the machines that this is for.
const BYTES: usize = 256 << 20;

/// Bytes of one read, or of one encoded chunk.
const PIECE: usize = 4 << 20;

/// Rounds of each measurement; the best one is printed.
const ROUNDS: usize = 5;

/// Bytes that the decoders work on: more than a core's own caches, little enough for many rounds.
const DECODER_BYTES: usize = 64 << 20;

/// Rounds of the decoders, which take turns; the median is printed.
const DECODER_ROUNDS: usize = 15;

fn main() {
    let only_decoders = std::env::args().any(|argument| argument == "decoders");
    let weights = weights(if only_decoders { DECODER_BYTES / 2 } else { BYTES / 4 });
    decoders(&weights);
    if only_decoders {
        return;
    }
    let mut out = vec![0u8; BYTES];

    row("memory copy", BYTES, || out.copy_from_slice(&weights));

    for (from, to) in
        [(DType::Float32, DType::BFloat16), (DType::Float32, DType::Float16), (DType::BFloat16, DType::Float32)]
    {
        let count = BYTES / from.size().max(to.size());
        let (source, target) = (&weights[..count * from.size()], &mut out[..count * to.size()]);
        row(&format!("cast {from} to {to}, read and written"), count * (from.size() + to.size()), || {
            black_box(convert(from, to, CastPolicy::Saturate, source, target).unwrap());
        });
    }

    let side = 8192u64;
    let matrix = (side * side * 4) as usize;
    for (name, target_strides) in [("columns of a matrix, copied", vec![side / 4, 1]), ("transpose", vec![1, side])] {
        let extent = if target_strides[1] == 1 { vec![side, side / 4] } else { vec![side, side] };
        let bytes = (extent[0] * extent[1] * 4) as usize;
        let convert = Convert { from: DType::Float32, to: DType::Float32, swap: false, policy: CastPolicy::Saturate };
        let op =
            Op { extent, source_strides: vec![side, 1], target_strides, source_start: 0, target_start: 0, convert };
        row(name, bytes, || {
            #[allow(unsafe_code)]
            // SAFETY: `out` is borrowed for the whole call and nothing else uses it.
            unsafe {
                let target = SharedBytes::new(out.as_mut_ptr(), out.len());
                execute(&op, &weights[..matrix], &target).unwrap();
            }
        });
    }

    for level in [1, 3] {
        let frame = zstd::bulk::compress(&weights, level).unwrap();
        let ratio = frame.len() as f64 / weights.len() as f64;
        row(&format!("zstd decode, level {level}, ratio {ratio:.2}, bytes out"), BYTES, || {
            decode::decode_all(&[ByteCodec::Zstd], &frame, &mut out, true).unwrap();
        });
    }
    for compression in [Compression::Gpu, Compression::Zstd { level: 1 }, Compression::Zstd { level: 3 }] {
        let mut encoder = Encoder::new(compression, Checksums { frame: true, crc32c: false }).unwrap();
        let (mut encoded, mut chunk) = (0, Vec::new());
        let mut encode = || {
            encoded = 0;
            for piece in weights.chunks(PIECE) {
                chunk.clear();
                encoder.encode(piece, &mut chunk).unwrap();
                encoded += chunk.len();
            }
        };
        encode();
        row(&format!("encode {compression:?} with checksums, bytes in"), BYTES, &mut encode);
        println!("             ratio {:.3}", encoded as f64 / BYTES as f64);
    }
    row("crc32c", BYTES, || {
        black_box(crc32c::crc32c(&weights));
    });

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), &weights).unwrap();
    for (io, threads) in [(Io::Pread, 1), (Io::Pread, 2), (Io::Pread, READER_THREADS_MIN), (Io::Uring, 1)] {
        match io::reader(io, threads) {
            Ok(mut reader) => {
                let ring = Ring::new(PIECE);
                let name = format!("{}, {threads} threads, a file in the page cache", reader.name());
                row(&name, BYTES, || read(reader.as_mut(), &ring, dir.path()));
            }
            Err(error) => println!("      -       {io:?}: {error}"),
        }
    }
}

/// libzstd and this library's decoder on the same frames, in turns: bfloat16 and float32, chunks of [`PIECE`] bytes in the
/// profile that is saved by default, and as other programs write them.
fn decoders(weights: &[u8]) {
    let floats = &weights[..DECODER_BYTES];
    // The upper halves: rounding would change no figure.
    let halves: Vec<u8> = weights[..2 * DECODER_BYTES].chunks_exact(4).flat_map(|float| [float[2], float[3]]).collect();
    println!("GB/s of decoded bytes, one core: medians of {DECODER_ROUNDS} rounds, and the best of each frame");
    println!("  libzstd   here  ratio  libzstd   here  ratio");
    for (dtype, elements) in [("bfloat16", halves.as_slice()), ("float32", floats)] {
        for (name, compression, checksum) in [
            ("gpu profile, checksums", Compression::Gpu, true),
            ("gpu profile", Compression::Gpu, false),
            ("level 1", Compression::Zstd { level: 1 }, false),
            ("level 3", Compression::Zstd { level: 3 }, false),
        ] {
            let mut encoder = Encoder::new(compression, Checksums { frame: checksum, crc32c: false }).unwrap();
            let frame = |piece: &[u8]| {
                let mut frame = Vec::new();
                encoder.encode(piece, &mut frame).unwrap();
                frame
            };
            let frames: Vec<Vec<u8>> = elements.chunks(PIECE).map(frame).collect();
            let stored: usize = frames.iter().map(Vec::len).sum();
            compare(
                &format!("{dtype}, {name}, stored {:.3}", stored as f64 / elements.len() as f64),
                &frames,
                elements,
            );
        }
    }
}

/// One row of [`decoders`].
fn compare(name: &str, frames: &[Vec<u8>], elements: &[u8]) {
    let mut out = vec![0; elements.len()];
    let mut libzstd = zstd::bulk::Decompressor::new().unwrap();
    // Of each round the sum, and of each frame the best: the latter is what a core to itself would do.
    let (mut rounds, mut best) = (Vec::new(), vec![[f64::INFINITY; 2]; frames.len()]);
    for round in 0..DECODER_ROUNDS {
        let mut sum = [0.0; 2];
        out.fill(0);
        for ((frame, piece), best) in frames.iter().zip(out.chunks_mut(PIECE)).zip(&mut best) {
            // Turns of a few milliseconds: what else the machine does meets both.
            for turn in 0..2 {
                let who = (round + turn) % 2;
                let start = Instant::now();
                if who == 0 {
                    libzstd.decompress_to_buffer(frame, piece).unwrap();
                } else {
                    decode::decode_all(&[ByteCodec::Zstd], frame, piece, true).unwrap();
                }
                let seconds = start.elapsed().as_secs_f64();
                sum[who] += seconds;
                best[who] = best[who].min(seconds);
            }
        }
        assert!(out == elements, "decoded to other bytes");
        rounds.push(sum);
    }
    let median = |value: fn(&[f64; 2]) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let speed = |seconds: f64| elements.len() as f64 / seconds / 1e9;
    let [libzstd, here] = [median(|sum| sum[0]), median(|sum| sum[1])].map(speed);
    let ratio = median(|[libzstd, here]| libzstd / here);
    let [best_libzstd, best_here] = [0, 1].map(|who| speed(best.iter().map(|best| best[who]).sum()));
    let best_ratio = best_here / best_libzstd;
    println!("{libzstd:>9.2}{here:>7.2}{ratio:>7.2}{best_libzstd:>9.2}{best_here:>7.2}{best_ratio:>7.2}  {name}");
}

/// Reads the file into slots, as many at once as the reader likes.
fn read(reader: &mut dyn Reader, ring: &Arc<Ring>, dir: &Path) {
    let file = Root::open(dir).unwrap().file(&RelPath::new("f").unwrap()).unwrap().unwrap();
    let (file, mut left, mut offset) = (Arc::new(file), BYTES / PIECE, 0);
    while left > 0 {
        let in_flight = offset as usize / PIECE + left - BYTES / PIECE;
        if offset < BYTES as u64 && in_flight < reader.depth() {
            let read = ReadAt::new(Arc::clone(&file), offset, PIECE, ring.slot().unwrap());
            reader.submit(Ticket(offset), read);
            offset += PIECE as u64;
        } else {
            reader.next(None).unwrap().result.unwrap();
            left -= 1;
        }
    }
}

/// Times a stage and prints its speed.
fn row(name: &str, bytes: usize, mut stage: impl FnMut()) {
    let round = |_| {
        let start = Instant::now();
        stage();
        start.elapsed().as_secs_f64()
    };
    let best = (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min);
    println!("{:>7.2} GB/s  {name}", bytes as f64 / best / 1e9);
}

/// Gaussian float32 weights of standard deviation 0.02, as bytes: the sum of twelve uniform numbers, from a fixed seed.
fn weights(count: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).flat_map(|_| (((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 0.02).to_le_bytes()).collect()
}
