//! Elements that casts may go wrong with.

#![allow(unreachable_pub, dead_code, reason = "every test binary uses its own part of this module")]

use touchdown::DType;

pub fn noise(seed: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |index: u64| {
        let mixed = (index ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9)
    })
}

/// Elements that matter: every bit pattern of up to 16 bits; of wider ones every exponent with mantissas around the points at
/// which any narrower type rounds, powers of two and their neighbours, and random bits of every magnitude.
pub fn specimens(dtype: DType) -> Vec<u8> {
    let words = |bits: u32, mantissa_bits: u32| -> Vec<u64> {
        let mantissas = (0..=mantissa_bits.min(12)).flat_map(|kept| {
            let half = 1u64 << (mantissa_bits - kept) >> 1;
            [0u64, 1, 3].map(|odd| odd << (mantissa_bits - kept) | half)
        });
        let mantissas: Vec<u64> = mantissas
            .flat_map(|point| [point, point.wrapping_sub(1), point + 1])
            .map(|mantissa| mantissa & ((1 << mantissa_bits) - 1))
            .collect();
        let exponents = 1u64 << (bits - 1 - mantissa_bits);
        // All of f32, and of f64 those that other types reach, and the ends.
        let wanted = (0..exponents).filter(|at| exponents < 2048 || (850..1160).contains(at) || *at < 3 || *at > 2044);
        let floats = wanted.flat_map(|exponent| {
            let mantissas = mantissas.iter().skip((exponent % 3) as usize).step_by(3);
            mantissas
                .flat_map(move |mantissa| [0, 1].map(|sign| sign << (bits - 1) | exponent << mantissa_bits | mantissa))
        });
        let powers = (0..bits).flat_map(|bit| (0..5).map(move |near| (1u64 << bit).wrapping_add(near).wrapping_sub(2)));
        let powers = powers.flat_map(|value| [value, value.wrapping_neg()]);
        let random = noise(7).zip(0..2000).map(|(word, at)| word >> (at % 64));
        floats.chain(powers).chain(random).collect()
    };
    let bytes = |words: Vec<u64>, size: usize| -> Vec<u8> {
        words.into_iter().flat_map(|word| word.to_le_bytes().into_iter().take(size)).collect()
    };
    match (dtype, dtype.size()) {
        (DType::Bool, _) => vec![0, 1],
        (DType::Complex64 | DType::Complex128, size) => {
            let parts = specimens(if size == 8 { DType::Float32 } else { DType::Float64 });
            let zero = vec![0; size / 2];
            let imaginary = parts.rchunks(size / 2).flat_map(|part| [zero.as_slice(), part]);
            parts.chunks(size / 2).zip(imaginary).flat_map(|(real, imaginary)| [real, imaginary].concat()).collect()
        }
        (_, 1) => (0..=255).collect(),
        (_, 2) => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
        (_, 4) => bytes(words(32, 23), 4),
        _ => bytes(words(64, 52), 8),
    }
}

/// The same without bytes that are no stored form of their type.
pub fn stored_specimens(dtype: DType) -> Vec<u8> {
    let mut bytes = specimens(dtype);
    let signed = |byte: u8, unused: u32| ((byte << unused) as i8 >> unused) as u8;
    for byte in &mut bytes {
        *byte = match dtype {
            DType::Int2 => signed(*byte, 6),
            DType::Int4 => signed(*byte, 4),
            DType::UInt2 => *byte & 3,
            DType::UInt4 | DType::Float4E2M1FN => *byte & 15,
            DType::Float6E2M3FN | DType::Float6E3M2FN => *byte & 63,
            _ => *byte,
        };
    }
    bytes
}
