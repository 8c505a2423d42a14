//! Lowering against a model of the kernels that only knows what a descriptor says. The real kernels: `tests/kernels.rs`.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::shape::strides;

/// Every byte that a descriptor of a copying kernel writes, and where it comes from; with the alignment that kernels rely on.
fn moved(kernel: Kernel, box_: &Descriptor) -> BTreeMap<u64, u64> {
    let rank = box_.rank as usize;
    let aligned = |address: u64, unit: u16| match kernel {
        Kernel::Copy => assert!(address.is_multiple_of(unit.into()), "{address:#x}: {box_:?}"),
        Kernel::Cast => assert!(address.is_multiple_of(u64::from(unit).min(16)), "{address:#x}: {box_:?}"),
        _ => {}
    };
    let mut bytes = BTreeMap::new();
    for number in 0..box_.count {
        let (mut rest, mut source, mut target) = (number, 0, 0);
        for dim in (0..rank).rev() {
            source += rest % box_.extent[dim] * box_.source_stride[dim];
            target += rest % box_.extent[dim] * box_.target_stride[dim];
            rest /= box_.extent[dim];
        }
        source = box_.source + source * u64::from(box_.source_unit);
        target = box_.target + target * u64::from(box_.target_unit);
        aligned(source, box_.source_unit);
        aligned(target, box_.target_unit);
        for byte in 0..u64::from(box_.target_unit) {
            assert_eq!(bytes.insert(target + byte, source + byte), None, "a byte is written twice");
        }
    }
    bytes
}

fn op(extent: &[u64], order: &[usize], gaps: (u64, u64), from: DType, to: DType) -> Op {
    let rank = extent.len();
    let outer = |gap: u64, extent: &[u64]| -> Vec<u64> {
        // A box inside a larger array: the innermost dimension is `gap` longer there.
        let mut larger = extent.to_vec();
        larger.last_mut().into_iter().for_each(|last| *last += gap);
        strides(&larger)
    };
    let turned: Vec<u64> = order.iter().map(|&dim| extent[dim]).collect();
    let turned_strides = outer(gaps.1, &turned);
    let mut target_strides = vec![0; rank];
    for (at, &dim) in order.iter().enumerate() {
        target_strides[dim] = turned_strides[at];
    }
    Op {
        extent: extent.to_vec(),
        source_strides: outer(gaps.0, extent),
        target_strides,
        source_start: gaps.0,
        target_start: gaps.1,
        convert: Convert { from, to, swap: false, policy: CastPolicy::Saturate },
    }
}

const BYTES: usize = 1 << 20;

fn placement(op: &Op, source: u64, target: u64) -> Placement<'_> {
    Placement { op, source, source_bytes: BYTES, target, target_bytes: BYTES, counter: 0 }
}

fn kernels(launches: &[Launch]) -> Vec<Kernel> {
    launches.iter().map(|launch| launch.kernel).collect()
}

proptest! {
    #[test]
    fn plain_boxes_move_the_same_bytes_whatever_the_kernel(
        extent in prop::collection::vec(1u64..20, 0..4),
        long in prop::option::of(200u64..600),
        seed in any::<u64>(),
        gaps in (0u64..20, 0u64..20),
        shifts in (0u64..20, 0u64..20),
        dtype in prop::sample::select(vec![DType::Int8, DType::Int16, DType::Float32, DType::Int64, DType::Complex128]),
    ) {
        let extent = long.map_or(extent, |long| vec![long]);
        let mut order: Vec<usize> = (0..extent.len()).collect();
        order.sort_by_key(|&dim| seed.rotate_left(dim as u32 * 7) % 97);
        let op = op(&extent, &order, gaps, dtype, dtype);
        let (source, target) = (0x1000_0000 + shifts.0, 0x2000_0000 + shifts.1);
        let launches = lower(&[placement(&op, source, target)]).unwrap();

        let mut got = BTreeMap::new();
        for launch in &launches {
            prop_assert_eq!(launch.first_tile.len(), launch.descriptors.len() + 1);
            prop_assert!(launch.first_tile.is_sorted_by(|a, b| a < b), "a box without tiles");
            for box_ in &launch.descriptors {
                for (target, source) in moved(launch.kernel, box_) {
                    prop_assert_eq!(got.insert(target, source), None);
                }
            }
        }
        let size = dtype.size() as u64;
        let whole = Descriptor { source: source + op.source_start * size, target: target + op.target_start * size,
            count: extent.iter().product(), rank: extent.len() as u32, source_unit: size as u16, target_unit: size as u16,
            ..Descriptor::default() };
        let mut want = whole;
        for dim in 0..extent.len() {
            want.extent[dim] = op.extent[dim];
            want.source_stride[dim] = op.source_strides[dim];
            want.target_stride[dim] = op.target_strides[dim];
        }
        prop_assert_eq!(got, moved(Kernel::Place, &want));
    }
}

#[test]
fn the_fastest_kernel_is_chosen() {
    let rows = |from, to| op(&[32, 64], &[0, 1], (64, 0), from, to);
    let turned = |dtype| op(&[32, 64], &[1, 0], (0, 0), dtype, dtype);
    let choose = |op: &Op, source, target| kernels(&lower(&[placement(op, source, target)]).unwrap());
    use DType::{BFloat16, Bool, Complex128, Float8E4M3FN, Float8E5M2, Float16, Float32, Int8};
    assert_eq!(choose(&rows(Float32, Float32), 0, 0), [Kernel::Copy]);
    assert_eq!(choose(&rows(Bool, Bool), 0, 0), [Kernel::Place]);
    assert_eq!(choose(&turned(Float32), 4, 4), [Kernel::Transpose]);
    assert_eq!(choose(&turned(Complex128), 0, 0), [Kernel::Place]);
    assert_eq!(choose(&rows(Float32, BFloat16), 0, 0), [Kernel::Cast]);
    assert_eq!(choose(&rows(Float32, BFloat16), 8, 0), [Kernel::Place]);
    assert_eq!(choose(&rows(Float32, Int8), 0, 0), [Kernel::Place]);
    assert_eq!(choose(&rows(Float32, Float8E4M3FN), 0, 8), [Kernel::Cast]);
    assert_eq!(choose(&rows(Float8E5M2, BFloat16), 8, 16), [Kernel::Cast]);
    assert_eq!(choose(&rows(Float8E5M2, BFloat16), 4, 16), [Kernel::Place]);
    assert_eq!(choose(&rows(Float8E5M2, Float8E4M3FN), 0, 0), [Kernel::Place]);
    assert_eq!(choose(&rows(Float16, Float8E4M3FN), 0, 0), [Kernel::Place]);
    let run = op(&[1000], &[0], (0, 0), Float32, BFloat16);
    assert_eq!(choose(&run, 8, 4), [Kernel::Place, Kernel::Cast]);
    assert_eq!(choose(&run, 8, 2), [Kernel::Place]);
    let mut fill = rows(Float32, BFloat16);
    fill.source_strides = vec![0, 0];
    let launches = lower(&[placement(&fill, 0, 0)]).unwrap();
    assert_eq!((kernels(&launches), launches[0].descriptors[0].target_unit), (vec![Kernel::Fill], 16));
}

#[test]
fn copies_use_the_largest_words_that_fit() {
    let unit = |op: &Op, source, target| {
        let launches = lower(&[placement(op, source, target)]).unwrap();
        launches.iter().flat_map(|launch| &launch.descriptors).map(|box_| box_.source_unit).collect::<Vec<_>>()
    };
    let rows = op(&[32, 64], &[0, 1], (64, 0), DType::Float32, DType::Float32);
    assert_eq!(unit(&rows, 0, 0), [16]);
    assert_eq!(unit(&rows, 8, 0), [8]);
    assert_eq!(unit(&rows, 0, 1), [1]);
    // A run that is aligned nowhere at its ends, but alike on both sides.
    let run = op(&[1000], &[0], (0, 0), DType::Int8, DType::Int8);
    assert_eq!(unit(&run, 3, 3 + 16), [16, 1, 1]);
    assert_eq!(unit(&run, 3, 4), [1]);
    assert_eq!(unit(&op(&[8, 64], &[0, 1], (3, 0), DType::Int16, DType::Int16), 0, 0), [2]);
}

#[test]
fn a_box_of_more_tiles_than_the_kernel_counts_is_placed() {
    let kernel = |outer: u64| {
        let turned = op(&[outer, 2, 8], &[0, 2, 1], (0, 0), DType::Int8, DType::Int8);
        let huge = Placement { source_bytes: 1 << 40, target_bytes: 1 << 40, ..placement(&turned, 0, 0) };
        kernels(&lower(&[huge]).unwrap())
    };
    assert_eq!(kernel((1 << 32) - 1), [Kernel::Transpose]);
    assert_eq!(kernel(1 << 32), [Kernel::Place]);
}

#[test]
fn many_small_boxes_are_one_launch_and_empty_ones_none() {
    let small = op(&[3, 5], &[0, 1], (0, 0), DType::Float32, DType::Float16);
    let empty = op(&[3, 0], &[0, 1], (0, 0), DType::Float32, DType::Float16);
    let placements: Vec<_> =
        (0..5000).flat_map(|at| [placement(&small, at * 64, at * 32), placement(&empty, 0, 0)]).collect();
    let launches = lower(&placements).unwrap();
    assert_eq!(launches.len(), 1);
    // What counts runs in fewer blocks than there are tiles.
    assert_eq!((launches[0].descriptors.len(), launches[0].tiles(), launches[0].blocks()), (5000, 5000, 4096));
    assert_eq!(lower(&placements[1..2]), Ok(vec![]));
}

#[test]
fn what_kernels_cannot_do_is_refused() {
    let refused = |op: &Op| lower(&[placement(op, 0, 0)]).unwrap_err();
    let plain = |extent: &[u64], order: &[usize]| op(extent, order, (0, 0), DType::Int8, DType::Int8);
    // Reversed, no two dimensions can be merged.
    let order: Vec<usize> = (0..9).rev().collect();
    assert_eq!(refused(&plain(&[2; 9], &order)), LowerError::Rank { rank: 9 });
    assert!(lower(&[placement(&plain(&[2; 9], &(0..9).collect::<Vec<_>>()), 0, 0)]).is_ok());
    assert!(lower(&[placement(&plain(&[2; 8], &order[1..]), 0, 0)]).is_ok());

    let far = plain(&[BYTES as u64 + 1], &[0]);
    assert!(matches!(refused(&far), LowerError::Op(OpError::Outside { side: "source", .. })));
    let complex = op(&[1], &[0], (0, 0), DType::Complex64, DType::Bool);
    assert!(matches!(refused(&complex), LowerError::Op(OpError::Cast(CastError::ComplexToBool { .. }))));
    let mut twice = plain(&[1 << 40, 1 << 40], &[0, 1]);
    (twice.source_strides, twice.target_strides) = (vec![0, 0], vec![0, 0]);
    assert!(matches!(refused(&twice), LowerError::Overlap { .. }));
    let past = lower(&[placement(&plain(&[1], &[0]), u64::MAX, 0)]).unwrap_err();
    assert_eq!(past, LowerError::Memory { address: u64::MAX, bytes: BYTES });
}
