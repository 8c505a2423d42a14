//! Streams: a thread each, which runs one task after the other. Events order the tasks of different streams.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::Code;

type Task = Box<dyn FnOnce() -> Result<(), Code> + Send>;

pub(crate) struct Stream {
    pub(crate) device: usize,
    tasks: Mutex<Option<Sender<Task>>>,
    /// Tasks that have not ended.
    waiting: Arc<(Mutex<u64>, Condvar)>,
    /// The first failure of the device: as on a real one, everything fails from then on.
    failed: Arc<AtomicU32>,
}

impl Stream {
    /// A stream whose tasks start after a random time below `delay_us`.
    pub(crate) fn new(device: usize, failed: Arc<AtomicU32>, delay_us: u64, seed: u64) -> Arc<Self> {
        let (sender, receiver) = channel::<Task>();
        let waiting = Arc::new((Mutex::new(0u64), Condvar::new()));
        let (ended, sticky) = (Arc::clone(&waiting), Arc::clone(&failed));
        let mut random = seed | 1;
        let run = move || {
            for task in receiver {
                if delay_us > 0 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    std::thread::sleep(Duration::from_micros(random % delay_us));
                }
                if let Err(code) = task() {
                    let _ = sticky.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
                }
                *ended.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
                ended.1.notify_all();
            }
        };
        std::thread::Builder::new().name("fakecuda-stream".to_owned()).spawn(run).expect("a thread for a stream");
        Arc::new(Self { device, tasks: Mutex::new(Some(sender)), waiting, failed })
    }

    pub(crate) fn push(&self, task: impl FnOnce() -> Result<(), Code> + Send + 'static) {
        *self.waiting.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks
            .as_ref()
            .expect("a stream that was not destroyed")
            .send(Box::new(task))
            .expect("the stream's thread runs");
    }

    /// Waits for all tasks.
    pub(crate) fn synchronize(&self) -> Result<(), Code> {
        let mut waiting = self.waiting.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *waiting > 0 {
            waiting = self.waiting.1.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        match self.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            code => Err(code),
        }
    }

    /// Takes no more tasks; those that wait are done.
    pub(crate) fn close(&self) {
        *self.tasks.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// An event: how often it was recorded, and the latest of these records that was reached.
#[derive(Default)]
pub(crate) struct Event {
    counts: Mutex<(u64, u64)>,
    reached: Condvar,
}

impl Event {
    pub(crate) fn record(self: &Arc<Self>, stream: &Stream) {
        let number = {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            counts.0 += 1;
            counts.0
        };
        let event = Arc::clone(self);
        stream.push(move || {
            let mut counts = event.counts.lock().unwrap_or_else(PoisonError::into_inner);
            counts.1 = counts.1.max(number);
            event.reached.notify_all();
            Ok(())
        });
    }

    /// The latest record.
    pub(crate) fn recorded(&self) -> u64 {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn is_reached(&self) -> bool {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.1 >= counts.0
    }

    pub(crate) fn wait(&self, number: u64) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        while counts.1 < number {
            counts = self.reached.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
