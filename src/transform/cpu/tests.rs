//! Casts against a slow reference, against TensorStore's results, against the `half` crate, and by laws.

mod golden;
mod reference;

use super::{CastError, castable, convert, normalise};
use crate::dtype::{Class, DType};
use crate::transform::CastPolicy;
use reference::{Reference, decode, parts_of};

fn cast(from: DType, to: DType, policy: CastPolicy, src: &[u8]) -> (Vec<u8>, u64) {
    let mut dst = vec![0xAA; src.len() / from.size() * to.size()];
    let lossy = convert(from, to, policy, src, &mut dst).unwrap();
    (dst, lossy)
}

/// The `f32` values, as elements of this type.
fn elements(dtype: DType, values: &[f32]) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    cast(DType::Float32, dtype, CastPolicy::Saturate, &bytes).0
}

fn codes(dtype: DType) -> Vec<u8> {
    let mut codes: Vec<u8> = match (dtype, dtype.class()) {
        (DType::Bool, _) => vec![0, 1],
        _ => (0..=255).collect(),
    };
    normalise(dtype, &mut codes).unwrap();
    codes
}

/// A deterministic stream of bits.
fn noise(seed: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |index: u64| {
        let mixed = (index ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9)
    })
}

/// Powers of two and what lies around them and halfway, of either sign, zeros, infinities and NaN.
fn edge_floats() -> Vec<f64> {
    let steps = [1.0, 1.0625, 1.1875, 1.25, 1.75, 1.0 + 2f64.powi(-8), 1.0 + 3.0 * 2f64.powi(-11)];
    let powers = (-12..20)
        .chain([-155, -150, -149, -134, -133, -127, -126, -25, -24, -14, 24, 31, 32, 53, 62, 63, 64, 100, 127, 128]);
    let around = powers.flat_map(|power| steps.map(|step| step * 2f64.powi(power)));
    let named = [0.0, f64::INFINITY, f64::NAN, 448.0, 464.0, 480.0, 57344.0, 61440.0, 65504.0, 65520.0, 1e300, 5e-324];
    let around = around.chain(named).flat_map(|value| [value, value.next_up(), value.next_down()]);
    around.flat_map(|value| [value, -value]).collect()
}

fn edge_ints() -> impl Iterator<Item = u64> {
    (0..64).flat_map(|bit| {
        (0..5).flat_map(move |near| [(1u64 << bit).wrapping_add(near).wrapping_sub(2), (!0 << bit) ^ near])
    })
}

fn specimens(dtype: DType) -> Vec<u8> {
    match (dtype, dtype.class(), dtype.size()) {
        (DType::Complex64 | DType::Complex128, ..) => {
            let (part, _) = parts_of(dtype);
            let reals = specimens(part);
            let imaginary = reals.chunks(part.size()).rev().step_by(5);
            let zero = vec![0; part.size()];
            let imaginary = imaginary.flat_map(|part| [zero.as_slice(), part]);
            reals.chunks(part.size()).zip(imaginary).flat_map(|(real, imaginary)| [real, imaginary].concat()).collect()
        }
        (_, _, 1) => codes(dtype),
        (_, _, 2) => (0..=u16::MAX).step_by(61).flat_map(u16::to_le_bytes).collect(),
        (_, Class::Int(_) | Class::UInt(_), size) => {
            let noise = noise(1).zip(0..200).map(|(bits, index)| bits >> (index % 64));
            edge_ints().chain(noise).flat_map(|bits| bits.to_le_bytes().into_iter().take(size)).collect()
        }
        (_, _, 4) => {
            let edges = edge_floats().into_iter().map(|value| (value as f32).to_bits());
            let noise = noise(2).map(|bits| bits as u32).take(200);
            edges.chain(noise).flat_map(u32::to_le_bytes).collect()
        }
        _ => {
            let edges = edge_floats().into_iter().map(f64::to_bits);
            let between = edge_floats().into_iter().step_by(2).map(|value| value.to_bits() + (1 << 28));
            edges.chain(between).chain(noise(3).take(200)).flat_map(u64::to_le_bytes).collect()
        }
    }
}

fn same(dtype: DType, a: &[u8], b: &[u8]) -> bool {
    let (part, _) = parts_of(dtype);
    let nan = |bytes: &[u8]| part.is_float() && decode(part, bytes).is_nan();
    a.chunks(part.size()).zip(b.chunks(part.size())).all(|(a, b)| a == b || (nan(a) && nan(b)))
}

#[test]
fn every_pair_and_policy_agrees_with_the_reference() {
    for from in DType::ALL {
        let src = specimens(from);
        for (to, policy) in DType::ALL.into_iter().flat_map(|to| [(to, CastPolicy::Saturate), (to, CastPolicy::Wrap)]) {
            if from == to || !castable(from, to) || (policy == CastPolicy::Wrap && !to.is_int()) {
                continue;
            }
            let reference = Reference::new(from, to, policy);
            let (dst, lossy) = cast(from, to, policy, &src);
            let mut expected_lossy = 0;
            for (element, got) in src.chunks(from.size()).zip(dst.chunks(to.size())) {
                let (expected, is_lossy) = reference.cast(element);
                assert!(
                    same(to, got, &expected),
                    "{from} to {to}, {policy:?}: {element:02x?} is {got:02x?}, not {expected:02x?}"
                );
                expected_lossy += u64::from(is_lossy);
                if is_lossy && (to.size() == 1 || to.size() == 16) {
                    let alone = cast(from, to, policy, element);
                    assert_eq!(
                        alone,
                        (got.to_vec(), u64::from(is_lossy)),
                        "{from} to {to}, {policy:?}: {element:02x?}"
                    );
                }
            }
            assert_eq!(lossy, expected_lossy, "{from} to {to}, {policy:?}");
            if policy == CastPolicy::Saturate {
                assert_eq!(cast(from, to, CastPolicy::Error, &src), (dst, lossy), "{from} to {to}");
            }
        }
    }
}

#[test]
fn long_runs_of_bytes_cast_as_short_ones() {
    for (from, to) in DType::ALL.into_iter().flat_map(|from| DType::ALL.map(|to| (from, to))) {
        if from.size() == 1 {
            let src = codes(from);
            let (dst, lossy) = cast(from, to, CastPolicy::Saturate, &src);
            let times = super::table::WORTH_ELEMENTS / src.len() + 1;
            let long = cast(from, to, CastPolicy::Saturate, &src.repeat(times));
            assert_eq!(long, (dst.repeat(times), lossy * times as u64), "{from} to {to}");
        }
    }
}

#[test]
fn halves_agree_with_the_half_crate() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let (f16, _) = cast(DType::Float16, DType::Float32, CastPolicy::Saturate, &all);
    let (bf16, _) = cast(DType::BFloat16, DType::Float32, CastPolicy::Saturate, &all);
    for bits in 0..=u16::MAX {
        let expected = half::f16::from_bits(bits).to_f32().to_le_bytes();
        assert!(same(DType::Float32, &f16[usize::from(bits) * 4..][..4], &expected), "{bits:04x}");
        let expected = half::bf16::from_bits(bits).to_f32().to_le_bytes();
        assert!(same(DType::Float32, &bf16[usize::from(bits) * 4..][..4], &expected), "{bits:04x}");
    }
    let floats: Vec<f32> = (0..=u16::MAX)
        .flat_map(|high| [0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0xF000].map(|low| u32::from(high) << 16 | low))
        .map(f32::from_bits)
        .collect();
    let (f16, bf16) = (elements(DType::Float16, &floats), elements(DType::BFloat16, &floats));
    for (index, value) in floats.iter().enumerate() {
        assert!(same(DType::Float16, &f16[index * 2..][..2], &half::f16::from_f32(*value).to_le_bytes()), "{value:e}");
        assert!(
            same(DType::BFloat16, &bf16[index * 2..][..2], &half::bf16::from_f32(*value).to_le_bytes()),
            "{value:e}"
        );
    }
}

#[test]
fn widening_and_narrowing_again_is_the_identity() {
    for narrow in DType::ALL.into_iter().filter(|dtype| dtype.size() <= 2 && *dtype != DType::Bool) {
        let src = if narrow.size() == 1 { codes(narrow) } else { specimens(narrow) };
        for wide in [DType::Float32, DType::Float64, DType::Complex64, DType::Complex128] {
            let (widened, lossy) = cast(narrow, wide, CastPolicy::Error, &src);
            assert_eq!(lossy, 0, "{narrow} to {wide}");
            let (back, lossy) = cast(wide, narrow, CastPolicy::Error, &widened);
            assert!(lossy == 0 && same(narrow, &src, &back), "{narrow} to {wide} and back");
        }
    }
    for dtype in DType::ALL {
        let src = specimens(dtype);
        assert_eq!(cast(dtype, dtype, CastPolicy::Error, &src), (src, 0));
    }
}

#[test]
fn casts_to_floats_and_saturating_casts_are_monotonic() {
    let mut values: Vec<f32> =
        edge_floats().into_iter().map(|value| value as f32).filter(|value| !value.is_nan()).collect();
    values.sort_by(f32::total_cmp);
    for to in DType::ALL {
        if to == DType::Bool || to.class() == Class::Complex {
            continue;
        }
        let wide = cast(to, DType::Float64, CastPolicy::Saturate, &elements(to, &values)).0;
        let wide: Vec<f64> =
            wide.chunks(8).map(|bytes| decode(DType::Float64, bytes)).filter(|value| !value.is_nan()).collect();
        assert!(wide.is_sorted(), "{to}");
    }
}

#[test]
fn named_edges() {
    use DType::*;
    let table: &[(DType, f32, i64, u64)] = &[
        (Float8E4M3FN, 464.0, 0x7E, 0),
        (Float8E4M3FN, 480.0, 0x7F, 1),
        (Float8E4M3FN, f32::INFINITY, 0x7F, 0),
        (Float8E5M2, 61440.0, 0x7C, 1),
        (Float8E5M2FNUZ, -0.0, 0x00, 0),
        (Float8E4M3FNUZ, f32::NEG_INFINITY, 0x80, 0),
        (Float8E4M3B11FNUZ, 1e30, 0x80, 1),
        (Float8E3M4, 15.9, 0x70, 1),
        (Float4E2M1FN, 7.0, 0x7, 1),
        (Float4E2M1FN, 6.9, 0x7, 0),
        (Float4E2M1FN, f32::NEG_INFINITY, 0xF, 1),
        (Float4E2M1FN, f32::NAN, 0x8, 1),
        (Float4E2M1FN, -f32::NAN, 0x0, 1),
        (Float8E8M0FNU, 1.0, 127, 0),
        (Float8E8M0FNU, 3.0, 129, 0),
        (Float8E8M0FNU, 0.0, 255, 1),
        (Float8E8M0FNU, -1.0, 255, 1),
        (Float8E8M0FNU, f32::INFINITY, 255, 0),
        (Float8E8M0FNU, 1e-45, 0, 1),
        (Float16, 65519.0, 0x7BFF, 0),
        (Float16, 65520.0, 0x7C00, 1),
        (BFloat16, f32::MAX, 0x7F80, 1),
        (BFloat16, 1e-45, 0, 1),
        (Bool, f32::NAN, 1, 0),
        (Bool, 1e-45, 1, 0),
        (Int8, -0.5, 0, 1),
        (Int8, -128.9, -128, 0),
        (Int8, -129.0, -128, 1),
        (Int4, 100.0, 7, 1),
        (UInt2, f32::INFINITY, 3, 1),
        (UInt8, f32::NAN, 0, 1),
        (UInt32, -1.0, 0, 1),
        (Int64, 1e30, i64::MAX, 1),
        (UInt64, 1e30, -1, 1),
    ];
    for (to, value, expected, lossy) in table {
        let got = cast(Float32, *to, CastPolicy::Saturate, &value.to_le_bytes());
        assert_eq!(got, (expected.to_le_bytes()[..to.size()].to_vec(), *lossy), "{value} to {to}");
    }
    let wrapped: &[(DType, f32, i64)] = &[
        (Int4, 100.0, 4),
        (Int8, 200.0, -56),
        (UInt8, -1.0, 255),
        (Int32, 4_294_967_296.0 * 3.0 + 1024.0, 1024),
        (Int64, 1e30, 0),
        (Int64, 2f32.powi(63) * 1.5, i64::MIN + (1 << 62)),
        (UInt64, -(2f32.powi(64) + 2f32.powi(41)), -(1 << 41)),
        (Int16, f32::INFINITY, 0),
    ];
    for (to, value, expected) in wrapped {
        let got = cast(Float32, *to, CastPolicy::Wrap, &value.to_le_bytes());
        assert_eq!(got, (expected.to_le_bytes()[..to.size()].to_vec(), 1), "{value} to {to}");
    }
}

#[test]
fn complex_elements_count_once() {
    let both: Vec<u8> =
        [1e300, 1.0, 1.0, 1e300, 1e300, 1e300, 1.0, -0.0].into_iter().flat_map(f64::to_le_bytes).collect();
    assert_eq!(cast(DType::Complex128, DType::Complex64, CastPolicy::Saturate, &both).1, 3);
    assert_eq!(cast(DType::Complex128, DType::Float32, CastPolicy::Saturate, &both).1, 3);
    assert_eq!(cast(DType::Complex128, DType::Float64, CastPolicy::Saturate, &both).1, 3);
    let many = both.repeat(1000);
    assert_eq!(cast(DType::Complex128, DType::Float32, CastPolicy::Saturate, &many).1, 3000);
}

#[test]
fn mismatched_buffers_and_complex_to_bool_are_refused() {
    let mut dst = [0; 8];
    let length = convert(DType::Float32, DType::Int8, CastPolicy::Saturate, &[0; 8], &mut dst[..3]);
    assert!(matches!(length, Err(CastError::Length { src_bytes: 8, dst_bytes: 3, .. })));
    let ragged = convert(DType::Float32, DType::Float64, CastPolicy::Saturate, &[0; 6], &mut dst);
    assert!(matches!(ragged, Err(CastError::Length { .. })));
    let refused = convert(DType::Complex64, DType::Bool, CastPolicy::Saturate, &[0; 8], &mut dst[..1]);
    assert_eq!(refused, Err(CastError::ComplexToBool { from: DType::Complex64 }));
    assert_eq!(convert(DType::Float16, DType::Bool, CastPolicy::Saturate, &[], &mut []), Ok(0));
}

#[test]
fn stored_elements_come_into_memory_form() {
    let mut data = [0x0F, 0xFF, 0x87, 0x08];
    normalise(DType::Int4, &mut data).unwrap();
    assert_eq!(data, [0xFF, 0xFF, 0x07, 0xF8]);
    let mut data = [0x0F, 0x12];
    normalise(DType::Int2, &mut data).unwrap();
    assert_eq!(data, [0xFF, 0xFE]);
    let mut data = [0x1F, 0xFF];
    normalise(DType::Float4E2M1FN, &mut data).unwrap();
    assert_eq!(data, [0x0F, 0x0F]);
    assert_eq!(normalise(DType::Bool, &mut [0, 1, 2]), Err(CastError::BoolByte { index: 2, byte: 2 }));
}
