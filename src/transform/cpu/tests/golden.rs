//! Every pair against digests of what TensorStore and ml_dtypes make of the same patterns: see `golden.py`.

use super::reference::{decode, out_of_range, parts_of};
use crate::dtype::{Class, DType};
use crate::transform::CastPolicy;
use crate::transform::cpu::{castable, convert};

/// Elements of the wide types; narrow ones take every value.
const COUNT: u64 = 1 << 14;
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The source elements that `golden.py` casts.
fn patterns(dtype: DType) -> Vec<u8> {
    let mixed = |index: u64| index.wrapping_mul(GOLDEN);
    let bytes = |size: usize, value: &dyn Fn(u64) -> u64| {
        (0..COUNT).flat_map(|index| value(index).to_le_bytes().into_iter().take(size)).collect()
    };
    match (dtype, dtype.class(), dtype.size()) {
        (DType::Complex64, ..) => patterns(DType::Float32),
        (DType::Complex128, ..) => patterns(DType::Float64),
        (DType::Bool, ..) => vec![0, 1],
        (DType::Float4E2M1FN, ..) => (0..16).collect(),
        (DType::Float6E2M3FN | DType::Float6E3M2FN, ..) => (0..64).collect(),
        (_, Class::Int(bits @ ..8), _) => {
            (0..1u8 << bits).map(|b| ((b << (8 - bits)) as i8 >> (8 - bits)) as u8).collect()
        }
        (_, Class::UInt(bits @ ..8), _) => (0..1 << bits).collect(),
        (_, _, 1) => (0..=255).collect(),
        (_, _, 2) => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
        (_, Class::Int(_) | Class::UInt(_), size) => bytes(size, &|index| mixed(index) >> (index % 64)),
        (_, _, 4) => bytes(4, &|index| match mixed(index) >> 32 {
            far if index < COUNT / 2 => far,
            mixed => 0x3000_0000 + (mixed >> 3) + ((index & 1) << 31),
        }),
        _ => bytes(8, &|index| match mixed(index) {
            far if index < COUNT / 2 => far,
            mixed => 0x3E00_0000_0000_0000 + (mixed >> 6) + ((index & 1) << 63),
        }),
    }
}

/// The digest that `golden.py` computes: NaNs are all ones, and what C++ leaves undefined is left out.
fn digest(to: DType, dst: &[u8], is_undefined: impl Fn(usize) -> bool) -> u64 {
    let (part, parts) = parts_of(to);
    let (float, size) = (part.is_float(), part.size());
    let mut digest = 0u64;
    for (index, bytes) in dst.chunks(size).enumerate() {
        if is_undefined(index / parts) {
            continue;
        }
        let mut word = [0; 8];
        word[..size].copy_from_slice(bytes);
        let word = if float && decode(part, bytes).is_nan() { u64::MAX } else { u64::from_le_bytes(word) };
        let weight = (2 * index as u64 + 1).wrapping_mul(GOLDEN);
        digest = digest.wrapping_add(word.wrapping_add(1).wrapping_mul(weight));
    }
    digest
}

#[test]
fn every_pair_casts_as_tensorstore_does() {
    let mut pairs = 0;
    let mut source = (None, Vec::new());
    for line in include_str!("golden.txt").lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (from, to): (DType, DType) = (fields[0].parse().unwrap(), fields[1].parse().unwrap());
        if source.0 != Some(from) {
            source = (Some(from), patterns(from));
        }
        let src = &source.1;
        let mut dst = vec![0; src.len() / from.size() * to.size()];
        convert(from, to, CastPolicy::Saturate, src, &mut dst).unwrap();
        let undefined = |index: usize| out_of_range(from, to, &src[index * from.size()..][..from.size()]);
        let digest = match to.is_int() && (from.is_float() || from.class() == Class::Complex) {
            true => digest(to, &dst, undefined),
            false => digest(to, &dst, |_| false),
        };
        assert_eq!(format!("{digest:016x}"), fields[2], "{from} to {to}");
        pairs += 1;
    }
    let all = DType::ALL.iter().flat_map(|from| DType::ALL.map(|to| (*from, to)));
    assert_eq!(pairs, all.filter(|(from, to)| castable(*from, *to)).count());
}
