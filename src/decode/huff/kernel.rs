//! The kernel for x86-64 with BMI: shifts that leave the flags alone, and counting zeros.

#![allow(unsafe_code)]

use std::arch::x86_64::{__m128i, _mm_unpackhi_epi8, _mm_unpacklo_epi8};
use std::array::from_fn;

use super::checksum::{self, STRIPE, stripe};
use super::lanes::{BLOCK_STREAMS, Positions, Rows, STREAMS, SYMBOLS_PER_REFILL, Tables};
use super::tree::CODE_BITS_MAX;

/// The kernel; a value says that this processor has what it needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bmi(());

impl Bmi {
    pub(super) fn detect() -> Option<Self> {
        let found = std::arch::is_x86_feature_detected!("bmi1") && std::arch::is_x86_feature_detected!("bmi2");
        found.then_some(Self(()))
    }

    /// See `Kernel::run`.
    pub(super) fn run(
        self,
        both: bool,
        frame: &[u8],
        tables: &Tables,
        positions: &mut Positions,
        staging: &[Rows],
    ) -> usize {
        let active = &positions[..if both { STREAMS } else { BLOCK_STREAMS }];
        let (mut lowest, mut highest) = (usize::MAX, 0);
        for position in active {
            lowest = lowest.min(position / 8);
            highest = highest.max(position / 8);
        }
        if highest >= frame.len() {
            return 0;
        }
        let iterations = staging.len().min(lowest.saturating_sub(WORD_BYTES - 1) / WORD_BYTES);
        let staging = &staging[..iterations];
        if iterations > 0 {
            // SAFETY:
            // 1. a `Bmi` exists, so this processor has BMI1 and BMI2;
            // 2. all active positions lie in bytes of the frame, and as many times eight bytes and seven more in front of them as
            //    there are iterations: `lowest` and `highest` bound them, and `lowest` is at least 7 as `iterations` is not 0.
            unsafe {
                if both {
                    decode::<STREAMS>(frame, tables, positions, staging);
                } else {
                    decode::<BLOCK_STREAMS>(frame, tables, positions, staging);
                }
            }
        }
        iterations
    }

    /// See `Kernel::transpose`.
    pub(super) fn transpose(
        self,
        staging: &[Rows],
        columns: [&mut [u8]; STREAMS],
        content: &[[u8; STRIPE]],
        hash: &mut checksum::Lanes,
    ) {
        // SAFETY: every x86-64 processor has SSE2.
        unsafe { transpose(staging, columns, content, hash) }
    }
}

/// Decodes as many iterations of the first `N` streams as `staging` has.
///
/// A stream is two registers: `word`, where the frame's 64 bits begin that were loaded last, and `bits`, what of them is not
/// decoded yet, in the highest bits, with a bit set below that counts how many are gone: five codes take at most 55 bits, a
/// load leaves 56 in front of the set bit.
///
/// The stores into the staging may, for all that the compiler knows, change tables: both are `Cell`s behind shared references.
/// So it keeps each symbol's look-up behind the store before, which is the order wanted here. Without that it would collect the
/// symbols of a row in a vector.
///
/// # Safety
/// 1. The processor has BMI1 and BMI2.
/// 2. For each of the first `N` positions: its byte lies in the frame, and in front of that byte lie 7 bytes and 8 more for each
///    iteration.
#[target_feature(enable = "bmi1,bmi2")]
unsafe fn decode<const N: usize>(frame: &[u8], tables: &Tables, positions: &mut Positions, staging: &[Rows]) {
    let load = |at: usize| {
        // SAFETY: `at` is the byte of a position less 7, less at most 8 for each iteration begun: the trailing zeros of 64 bits
        // are at most 64. By the caller's promise that is a byte of the frame with 7 more behind it.
        let word = unsafe { frame.as_ptr().add(at).cast::<[u8; WORD_BYTES]>().read_unaligned() };
        u64::from_le_bytes(word) | 1
    };
    let (mut word, mut bits) = ([0; N], [0; N]);
    for stream in 0..N {
        word[stream] = positions[stream] / 8 - (WORD_BYTES - 1);
        bits[stream] = load(word[stream]) << (7 - positions[stream] % 8);
    }
    for rows in staging {
        // Unrolled by hand, the inner loop by the compiler: all bits stay in registers.
        macro_rules! row {
            ($row:literal) => {
                for stream in 0..N {
                    let table = tables[stream / BLOCK_STREAMS].entries();
                    let entry = table[(bits[stream] >> (u64::BITS - CODE_BITS_MAX)) as usize].get();
                    bits[stream] <<= entry & 63;
                    rows[$row * STREAMS + stream].set((entry >> 8) as u8);
                }
            };
        }
        const { assert!(SYMBOLS_PER_REFILL == 5) };
        row!(0);
        row!(1);
        row!(2);
        row!(3);
        row!(4);
        for stream in 0..N {
            let used = bits[stream].trailing_zeros();
            word[stream] -= (used / 8) as usize;
            bits[stream] = load(word[stream]) << (used % 8);
        }
    }
    for stream in 0..N {
        positions[stream] = word[stream] * 8 + u64::BITS as usize - 1 - bits[stream].trailing_zeros() as usize;
    }
}

/// Writes columns of the staging, 16 rows at a time, and hashes as many bytes meanwhile.
#[target_feature(enable = "sse2")]
fn transpose(
    staging: &[Rows],
    mut columns: [&mut [u8]; STREAMS],
    content: &[[u8; STRIPE]],
    hash: &mut checksum::Lanes,
) {
    let (squares, rest) = staging.as_flattened().as_chunks::<SQUARE>();
    let (stripes, rest_of_content) = content.as_chunks::<{ SQUARE / STRIPE }>();
    let mut lanes = *hash;
    for (number, square) in squares.iter().enumerate() {
        if let Some(stripes) = stripes.get(number) {
            stripes.iter().for_each(|bytes| stripe(&mut lanes, bytes));
        }
        let rows: [__m128i; STREAMS] = from_fn(|pair| {
            let bytes: [u8; 16] = from_fn(|at| square[pair * 16 + at].get());
            bytemuck::cast(bytes)
        });
        for (column, bytes) in columns.iter_mut().zip(transposed(rows)) {
            if let Some(target) = column.as_chunks_mut::<16>().0.get_mut(number) {
                *target = bytemuck::cast(bytes);
            }
        }
    }
    let left = stripes.get(squares.len()..).unwrap_or_default().as_flattened();
    left.iter().chain(rest_of_content).for_each(|bytes| stripe(&mut lanes, bytes));
    *hash = lanes;
    let done = squares.len() * 16;
    for (row, symbols) in rest.chunks_exact(STREAMS).enumerate() {
        for (column, symbol) in columns.iter_mut().zip(symbols) {
            if let Some(target) = column.get_mut(done + row) {
                *target = symbol.get();
            }
        }
    }
}

/// 16 rows of 8 bytes, two in each vector, as 8 columns of 16 bytes.
///
/// Each step interleaves the bytes of vectors that differ in one bit of the row's number: that bit moves to the lowest place
/// in the number of a byte, whose highest bit takes its place in the number of the vector. After four steps they have
/// changed places.
#[inline]
#[target_feature(enable = "sse2")]
fn transposed(mut rows: [__m128i; STREAMS]) -> [__m128i; STREAMS] {
    for distance in [4, 2, 1] {
        rows = interleaved(rows, distance);
    }
    // In the vectors' numbers now are, from the highest bit: the row's lowest bit, the stream's highest and middle one.
    let rows = interleaved(rows, 4);
    // And now the stream's lowest, highest and middle bit.
    [rows[0], rows[4], rows[1], rows[5], rows[2], rows[6], rows[3], rows[7]]
}

#[inline]
#[target_feature(enable = "sse2")]
fn interleaved(vectors: [__m128i; STREAMS], distance: usize) -> [__m128i; STREAMS] {
    from_fn(|number| {
        let (low, high) = (vectors[number & !distance], vectors[number | distance]);
        if number & distance == 0 { _mm_unpacklo_epi8(low, high) } else { _mm_unpackhi_epi8(low, high) }
    })
}

const WORD_BYTES: usize = 8;

/// Bytes of a square of the staging that is transposed at once.
const SQUARE: usize = 16 * STREAMS;
