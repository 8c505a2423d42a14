//! Memory credits: what a load may hold beyond its results.

use std::sync::Arc;

use super::sync::{AtomicU64, Ordering};

/// A number of bytes that work in progress may hold.
///
/// Only the thread that admits work takes credits, in plan order, and it takes everything that a piece of work will ever
/// need before the work starts. Work in progress therefore never waits for memory, so it always finishes and gives its
/// credits back: no deadlock is possible.
#[derive(Debug)]
pub struct Budget {
    total: u64,
    used: AtomicU64,
    peak: AtomicU64,
}

/// Credits held by one piece of work; given back on drop.
#[derive(Debug)]
pub struct Credit {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(total: u64) -> Arc<Self> {
        Arc::new(Self { total, used: AtomicU64::new(0), peak: AtomicU64::new(0) })
    }

    /// Takes credits if they are free. That no deadlock is possible needs the admitting thread to be the only one that
    /// calls this; that the total is never passed does not.
    pub fn take(self: &Arc<Self>, bytes: u64) -> Option<Credit> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.total);
        let before = self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).ok()?;
        self.peak.fetch_max(before + bytes, Ordering::AcqRel);
        Some(Credit { budget: Arc::clone(self), bytes })
    }

    /// All credits, in bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The most credits that were ever out at once, in bytes.
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Acquire)
    }
}

impl Drop for Credit {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credits_come_back() {
        let budget = Budget::new(10);
        let six = budget.take(6).unwrap();
        assert!(budget.take(5).is_none());
        drop(six);
        assert!(budget.take(10).is_some());
        assert!(budget.take(u64::MAX).is_none());
        assert_eq!(budget.peak(), 10);
    }
}
