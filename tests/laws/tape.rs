//! Choices from a tape of numbers: proptest makes and shrinks the tape, the generators read it.
//!
//! Later choices depend on earlier ones (which dimension of which array is split), so the generators are plain code. A
//! tape of zeros takes the first choice everywhere, which is always the simplest, and so is what shrinking ends at.

/// Numbers that are read one after the other; zeros when it is used up.
#[derive(Debug)]
pub struct Tape<'a> {
    numbers: &'a [u32],
    at: usize,
}

impl<'a> Tape<'a> {
    pub fn new(numbers: &'a [u32]) -> Self {
        Self { numbers, at: 0 }
    }

    /// A number below `count`, which is at least 1.
    pub fn below(&mut self, count: u64) -> u64 {
        let number = self.numbers.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        u64::from(number) % count
    }

    /// True once in `count` times, and never on a tape of zeros.
    pub fn once_in(&mut self, count: u64) -> bool {
        self.below(count) == count - 1
    }

    pub fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize].clone()
    }

    /// A permutation of `0..count`.
    pub fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for at in 1..count {
            let other = at - self.below(at as u64 + 1) as usize;
            order.swap(at, other);
        }
        order
    }
}
