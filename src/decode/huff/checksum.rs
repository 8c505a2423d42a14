//! XXH64 with seed 0, whose low half is zstd's checksum of a frame's content.
//!
//! Source: the xxHash specification, XXH64. A hash runs at latency, five cycles for 32 bytes, and leaves the rest of the
//! processor idle; the transposition is the other way round. So [`stripe`] is open to those who mix both, and the checksum costs
//! next to nothing.

use std::array::from_fn;
use std::ops::Range;

/// The checksum of an output that is written bit by bit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checksum {
    lanes: Lanes,
    /// Bytes of the output that are in it: a multiple of [`STRIPE`].
    hashed: usize,
}

/// Four hashes, of every fourth word each.
pub(super) type Lanes = [u64; 4];

impl Checksum {
    pub(super) const fn new() -> Self {
        let lanes = [PRIMES[0].wrapping_add(PRIMES[1]), PRIMES[1], 0, 0u64.wrapping_sub(PRIMES[0])];
        Self { lanes, hashed: 0 }
    }

    /// Which bytes follow next of an output that is written up to `complete`, at most so many: whole stripes, which the caller
    /// takes into the lanes.
    pub(super) fn next(&mut self, complete: usize, max: usize) -> Range<usize> {
        let start = self.hashed;
        self.hashed += complete.saturating_sub(start).min(max) / STRIPE * STRIPE;
        start..self.hashed
    }

    pub(super) const fn lanes_mut(&mut self) -> &mut Lanes {
        &mut self.lanes
    }

    /// What zstd stores of an output, once all of it is written.
    pub(super) fn finish(mut self, out: &[u8]) -> Option<u32> {
        let (stripes, rest) = out.get(self.hashed..)?.as_chunks();
        stripes.iter().for_each(|bytes| stripe(&mut self.lanes, bytes));
        let mut hash = PRIMES[4];
        if out.len() >= STRIPE {
            let turned = [1, 7, 12, 18].iter().zip(self.lanes).map(|(turn, lane)| lane.rotate_left(*turn));
            hash = turned.fold(0, u64::wrapping_add);
            for lane in self.lanes {
                hash = (hash ^ round(0, lane)).wrapping_mul(PRIMES[0]).wrapping_add(PRIMES[3]);
            }
        }
        hash = hash.wrapping_add(out.len() as u64);
        let (words, rest) = rest.as_chunks();
        for word in words {
            hash = (hash ^ round(0, u64::from_le_bytes(*word))).rotate_left(27);
            hash = hash.wrapping_mul(PRIMES[0]).wrapping_add(PRIMES[3]);
        }
        let (halves, rest) = rest.as_chunks();
        for half in halves {
            hash = (hash ^ u64::from(u32::from_le_bytes(*half)).wrapping_mul(PRIMES[0])).rotate_left(23);
            hash = hash.wrapping_mul(PRIMES[1]).wrapping_add(PRIMES[2]);
        }
        for byte in rest {
            hash = (hash ^ u64::from(*byte).wrapping_mul(PRIMES[4])).rotate_left(11).wrapping_mul(PRIMES[0]);
        }
        hash = (hash ^ hash >> 33).wrapping_mul(PRIMES[1]);
        hash = (hash ^ hash >> 29).wrapping_mul(PRIMES[2]);
        Some(((hash ^ hash >> 32) & 0xffff_ffff) as u32)
    }
}

/// Takes the next bytes in.
#[inline(always)]
pub(super) fn stripe(lanes: &mut Lanes, bytes: &[u8; STRIPE]) {
    let (words, _) = bytes.as_chunks();
    *lanes = from_fn(|lane| round(lanes[lane], u64::from_le_bytes(words[lane])));
}

#[inline(always)]
const fn round(lane: u64, word: u64) -> u64 {
    lane.wrapping_add(word.wrapping_mul(PRIMES[1])).rotate_left(31).wrapping_mul(PRIMES[0])
}

/// Bytes that are taken in at once.
pub(super) const STRIPE: usize = 32;

const PRIMES: [u64; 5] =
    [0x9e37_79b1_85eb_ca87, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0x85eb_ca77_c2b2_ae63, 0x27d4_eb2f_1656_67c5];
