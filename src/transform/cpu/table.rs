//! Long runs of one-byte source elements: every answer worked out once, then looked up.

#![allow(
    clippy::cast_possible_truncation,
    reason = "casts are what this is for; each keeps the bits that its comment says"
)]

use super::cast::Through;

/// From here on the 256 answers, each with its own lossy bit, cost less than they save.
pub(super) const WORTH_ELEMENTS: usize = 8192;

/// The widest target element.
const SIZE_MAX: usize = 16;

/// As [`Through::run`], for source elements of one byte.
pub(super) fn look_up(through: Through, src: &[u8], dst: &mut [u8]) -> u64 {
    let codes: [u8; 256] = std::array::from_fn(|code| code as u8);
    let mut answers = [0; 256 * SIZE_MAX];
    let answers = &mut answers[..256 * through.to_size];
    let any_lossy = through.run(&codes, answers) > 0;
    let mut lossy = [0; 256];
    if any_lossy {
        let mut unused = [0; SIZE_MAX];
        for (code, lossy) in codes.iter().zip(&mut lossy) {
            *lossy = through.run(&[*code], &mut unused[..through.to_size]) as u8;
        }
    }
    match through.to_size {
        1 => copy::<1>(answers, src, dst),
        2 => copy::<2>(answers, src, dst),
        4 => copy::<4>(answers, src, dst),
        8 => copy::<8>(answers, src, dst),
        _ => copy::<16>(answers, src, dst),
    }
    if any_lossy { src.iter().map(|code| u64::from(lossy[usize::from(*code)])).sum() } else { 0 }
}

fn copy<const N: usize>(answers: &[u8], src: &[u8], dst: &mut [u8]) {
    let Some(answers) = answers.as_chunks::<N>().0.first_chunk::<256>() else { return };
    for (code, out) in src.iter().zip(dst.as_chunks_mut::<N>().0) {
        *out = answers[usize::from(*code)];
    }
}
