//! The same loop, compiled twice on x86-64: for the baseline and for AVX2.
//!
//! The baseline (SSE2) has registers of 16 bytes and no unsigned comparison; with AVX2 the loops of [`super::encode`]
//! and [`super::lanes`] run at twice the speed. The source is one and nothing in it depends on the instruction set
//! (Rust neither fuses nor reorders float operations), so neither do the results.
#![allow(unsafe_code)]

/// A loop over a lane that wants to be compiled for the widest registers there are.
pub(super) trait Loop {
    /// What it returns.
    type Output;

    /// Runs it. Implementations are `#[inline(always)]`, which is what makes the wide copy wide.
    fn run(self) -> Self::Output;
}

/// Runs the loop in the widest copy that this processor has.
#[inline(always)]
pub(super) fn run<T: Loop>(work: T) -> T::Output {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: `avx2` only requires the processor feature that was found just now.
        return unsafe { avx2(work) };
    }
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<T: Loop>(work: T) -> T::Output {
    work.run()
}
