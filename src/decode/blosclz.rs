//! blosclz, the LZ77 codec of blosc.
//!
//! Source: c-blosc, `blosc/blosclz.c`. A token is a control byte and what follows it:
//!
//! | control byte | meaning |
//! |---|---|
//! | 000lllll | `l + 1` literal bytes follow |
//! | lllhhhhh | copy `l + 2` bytes from `256 h + next byte + 1` behind the output's end |
//! | 111hhhhh | the same, with length bytes before the distance byte: each is added to the length, 255 says that one more follows |
//! | lll11111, distance byte 255 | a far copy: the distance is 8192 + a u16 big-endian that follows |
//!
//! The first token is always literal: its upper three bits are a version.

/// Decodes a stream into the front of `output` and says how many bytes that made, or `None` when the stream is damaged
/// or does not fit.
pub(super) fn decode_into(input: &[u8], output: &mut [u8]) -> Option<usize> {
    let mut input = Input(input);
    let mut written = 0;
    let Some(first) = input.byte() else {
        return Some(0);
    };
    let mut control = usize::from(first & 31);
    loop {
        if control < 32 {
            let literals = input.take(control + 1)?;
            output.get_mut(written..)?.get_mut(..literals.len())?.copy_from_slice(literals);
            written += literals.len();
        } else {
            let (distance, len) = input.copy(control)?;
            copy(output, written, distance, len)?;
            written += len;
        }
        match input.byte() {
            Some(next) => control = usize::from(next),
            None => return Some(written),
        }
    }
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }

    /// Distance and length of the copy that this control byte begins.
    fn copy(&mut self, control: usize) -> Option<(usize, usize)> {
        let mut len = (control >> 5) + 2;
        if control >> 5 == 7 {
            loop {
                let more = self.byte()?;
                len = len.checked_add(usize::from(more))?;
                if more < 255 {
                    break;
                }
            }
        }
        let (high, low) = (control & 31, usize::from(self.byte()?));
        let distance = if (high, low) == (31, 255) {
            FAR_DISTANCE + (usize::from(self.byte()?) << 8) + usize::from(self.byte()?)
        } else {
            (high << 8) + low
        };
        Some((distance + 1, len))
    }
}

/// Copies `len` bytes from `distance` bytes before `at`. The two may overlap: the pattern then repeats.
fn copy(output: &mut [u8], at: usize, distance: usize, len: usize) -> Option<()> {
    let from = at.checked_sub(distance)?;
    let end = at.checked_add(len).filter(|end| *end <= output.len())?;
    let mut at = at;
    // What is between `from` and `at` is a whole number of patterns, so it can be doubled.
    while at < end {
        let count = (at - from).min(end - at);
        output.copy_within(from..from + count, at);
        at += count;
    }
    Some(())
}

/// `MAX_DISTANCE` of blosclz: the nearest distance that does not fit the short form.
const FAR_DISTANCE: usize = 8191;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn copies_repeat_their_pattern() {
        let mut output = [0; 10];
        // Two literals, then 5 bytes from distance 2, then 3 bytes from distance 1.
        assert_eq!(decode_into(&[0x21, b'a', b'b', 0x60, 1, 0x20, 0], &mut output), Some(10));
        assert_eq!(&output, b"abababaaaa");
    }

    #[test]
    fn copies_from_before_the_start_are_damage() {
        assert_eq!(decode_into(&[0, b'a', 0x20, 1], &mut [0; 10]), None);
        assert_eq!(decode_into(&[0, b'a', 0xff, 255, 255], &mut [0; 10]), None);
        assert_eq!(decode_into(&[0, b'a', 0x20, 0], &mut [0; 3]), None);
        assert_eq!(decode_into(&[], &mut [0; 3]), Some(0));
    }

    proptest! {
        #[test]
        fn any_bytes_return(input in prop::collection::vec(any::<u8>(), 0..100), room in 0usize..300) {
            if let Some(written) = decode_into(&input, &mut vec![0; room]) {
                prop_assert!(written <= room);
            }
        }
    }
}
