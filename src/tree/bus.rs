//! Units on their way to devices while workers read the next ones.
//!
//! A worker that waited for its own copy would leave its core idle, and the bus too, whenever all of them read. So it hands over
//! what it has sent and goes on; only when as many are under way as keep the bus busy does it wait, for the oldest.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::land::{FirstError, Landing, located};
use crate::io::{Credit, Slot};
use crate::place::Crossing;

/// A unit whose bytes were sent.
#[derive(Debug)]
pub(super) struct Sent {
    // Dropped first: it waits until nobody reads the slot any more.
    pub(super) crossing: Crossing,
    pub(super) slot: Slot,
    /// The memory that it holds of the budget.
    pub(super) credit: Credit,
    /// In [`Plan::units`](crate::plan::Plan::units).
    pub(super) unit: u32,
    pub(super) bytes: u64,
}

/// Units on their way, in the order in which they were sent.
#[derive(Debug)]
pub(super) struct Bus {
    sent: Mutex<VecDeque<Sent>>,
    max: usize,
}

impl Bus {
    /// One for so many workers.
    pub(super) fn new(workers: u32) -> Self {
        // Half of them: twice as many slots at work as there are workers fall out of the processor's caches.
        let max = usize::try_from(workers.div_ceil(2)).unwrap_or(usize::MAX);
        Self { sent: Mutex::default(), max }
    }

    /// Takes a unit, and gives back the oldest one if there are enough without it.
    pub(super) fn take(&self, sent: Sent) -> Option<Sent> {
        let mut queue = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back(sent);
        if queue.len() > self.max { queue.pop_front() } else { None }
    }

    /// Whether nothing is on its way, as far as is known here.
    pub(super) fn is_empty(&self) -> bool {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Gives up what is on its way, once it has arrived.
    pub(super) fn clear(&self) {
        let sent = std::mem::take(&mut *self.sent.lock().unwrap_or_else(PoisonError::into_inner));
        drop(sent);
    }

    fn oldest(&self) -> Option<Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

impl Landing {
    /// Waits for a unit that was sent, and counts it off; the leaves that are complete by it.
    pub(super) fn arrived(&self, sent: Sent, errors: &FirstError) -> Vec<usize> {
        let Sent { crossing, slot, credit, unit, bytes } = sent;
        let start = Instant::now();
        let crossed = crossing.finish();
        self.copy.add(start, bytes);
        drop((slot, credit));
        let fail = |error| errors.put(unit, located(error, &self.plan, &self.plan.units[unit as usize]));
        crossed.and_then(|()| self.landed_as_stored(unit)).map_err(fail).unwrap_or_default()
    }

    /// Waits for all that was sent; the leaves that are complete by it.
    pub(super) fn all_arrived(&self, errors: &FirstError) -> Vec<usize> {
        std::iter::from_fn(|| self.bus.oldest()).flat_map(|sent| self.arrived(sent, errors)).collect()
    }
}
