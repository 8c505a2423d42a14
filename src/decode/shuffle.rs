//! The filters of blosc, undone: byte shuffle and bit shuffle.
//!
//! Both rearrange the elements of a block into planes. Byte plane `j` holds byte `j` of every element; bit plane `8j+k`
//! holds bit `k` of byte `j` of every element, the first element in the lowest bit.

/// Puts the bytes of a byte-shuffled block back. `source` and `target` have the same length.
///
/// Bytes beyond the last whole element stand unchanged at the end.
pub(super) fn unshuffle(element_size: usize, source: &[u8], target: &mut [u8]) {
    match element_size {
        2 => unshuffle_sized::<2>(source, target),
        4 => unshuffle_sized::<4>(source, target),
        8 => unshuffle_sized::<8>(source, target),
        16 => unshuffle_sized::<16>(source, target),
        _ => unshuffle_any(element_size, source, target),
    }
}

/// Puts the bits of a bit-shuffled block back. `source` and `target` have the same length.
///
/// A block whose number of elements is no multiple of 8 was not shuffled.
pub(super) fn unshuffle_bits(element_size: usize, source: &[u8], target: &mut [u8]) {
    debug_assert_eq!(source.len(), target.len());
    let count = source.len() / element_size.max(1);
    if !count.is_multiple_of(8) || count == 0 {
        target.copy_from_slice(source);
        return;
    }
    let plane_len = count / 8;
    let planes_len = count * element_size;
    for (byte, planes) in source[..planes_len].chunks_exact(8 * plane_len).enumerate() {
        for group in 0..plane_len {
            let mut columns = [0u8; 8];
            for (plane, column) in columns.iter_mut().enumerate() {
                *column = planes[plane * plane_len + group];
            }
            let rows = transpose_bits(u64::from_le_bytes(columns)).to_le_bytes();
            for (row, bits) in rows.into_iter().enumerate() {
                target[(8 * group + row) * element_size + byte] = bits;
            }
        }
    }
    target[planes_len..].copy_from_slice(&source[planes_len..]);
}

/// Transposes 8 by 8 bits: bit `k` of byte `j` becomes bit `j` of byte `k` (Hacker's Delight, 7-3).
const fn transpose_bits(mut bits: u64) -> u64 {
    let mut swap = (bits ^ (bits >> 7)) & 0x00aa_00aa_00aa_00aa;
    bits ^= swap ^ (swap << 7);
    swap = (bits ^ (bits >> 14)) & 0x0000_cccc_0000_cccc;
    bits ^= swap ^ (swap << 14);
    swap = (bits ^ (bits >> 28)) & 0x0000_0000_f0f0_f0f0;
    bits ^ swap ^ (swap << 28)
}

fn unshuffle_sized<const SIZE: usize>(source: &[u8], target: &mut [u8]) {
    debug_assert_eq!(source.len(), target.len());
    let count = source.len() / SIZE;
    if count == 0 {
        target.copy_from_slice(source);
        return;
    }
    let planes: [&[u8]; SIZE] = std::array::from_fn(|plane| &source[plane * count..][..count]);
    let (elements, rest) = target.as_chunks_mut::<SIZE>();
    for (index, element) in elements.iter_mut().enumerate() {
        for (byte, plane) in element.iter_mut().zip(planes) {
            *byte = plane[index];
        }
    }
    rest.copy_from_slice(&source[count * SIZE..]);
}

fn unshuffle_any(element_size: usize, source: &[u8], target: &mut [u8]) {
    debug_assert_eq!(source.len(), target.len());
    let count = source.len() / element_size.max(1);
    if count == 0 {
        target.copy_from_slice(source);
        return;
    }
    let planes_len = count * element_size;
    for (byte, plane) in source[..planes_len].chunks_exact(count).enumerate() {
        for (element, value) in target.chunks_exact_mut(element_size).zip(plane) {
            element[byte] = *value;
        }
    }
    target[planes_len..].copy_from_slice(&source[planes_len..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn planes_become_elements(element_size in 1usize..20, source in prop::collection::vec(any::<u8>(), 0..200)) {
            let count = source.len() / element_size;
            let mut expected = source.clone();
            for index in 0..count {
                for byte in 0..element_size {
                    expected[index * element_size + byte] = source[byte * count + index];
                }
            }
            let mut found = vec![0; source.len()];
            unshuffle(element_size, &source, &mut found);
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn bit_planes_become_elements(element_size in 1usize..20, source in prop::collection::vec(any::<u8>(), 0..400)) {
            let count = source.len() / element_size;
            let mut expected = source.clone();
            if count % 8 == 0 {
                expected[..count * element_size].fill(0);
                for index in 0..count {
                    for bit in 0..8 * element_size {
                        let value = source[bit * count / 8 + index / 8] >> (index % 8) & 1;
                        expected[index * element_size + bit / 8] |= value << (bit % 8);
                    }
                }
            }
            let mut found = vec![0; source.len()];
            unshuffle_bits(element_size, &source, &mut found);
            prop_assert_eq!(found, expected);
        }
    }
}
