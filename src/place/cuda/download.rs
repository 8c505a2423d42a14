//! Results back to host memory, for whoever looks at them or saves them.
//!
//! Bytes come through locked buffers of a fixed size, one for each thread that asks at once, kept for the next.

use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Context, DriverError, Event, Outcome, Stream};
use super::lane::LockedBuffer;
use crate::error::{Error, Result};
use crate::limits::DOWNLOAD_BYTES;
use crate::place::parcel::Span;
use crate::place::{DeviceEvent, Download};

/// Brings memory of one device to the host.
#[derive(Debug)]
pub(super) struct Downloader {
    context: Arc<Context>,
    /// Those that nobody uses.
    ways: Mutex<Vec<Way>>,
}

/// What one download uses.
#[derive(Debug)]
struct Way {
    stream: Stream,
    buffer: LockedBuffer,
}

impl Downloader {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self { context, ways: Mutex::default() }
    }

    fn failed(&self, error: DriverError) -> Error {
        error.on(self.context.ordinal(), "a shard cannot be copied from its device")
    }

    fn way(&self) -> Result<Way> {
        if let Some(way) = self.ways.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(way);
        }
        let stream = Stream::new(&self.context).map_err(|error| self.failed(error))?;
        Ok(Way { stream, buffer: LockedBuffer::new(&self.context, DOWNLOAD_BYTES)? })
    }

    /// Fills a part of the buffer with runs and waits until they are there. The second value says whether nothing is on its way
    /// any more, as it should be whatever failed.
    ///
    /// # Safety
    /// 1. The runs are valid, and nobody writes them meanwhile.
    unsafe fn fetch(&self, way: &mut Way, runs: &[Span]) -> (Outcome<()>, bool) {
        let current = match self.context.enter() {
            Ok(current) => current,
            Err(error) => return (Err(error), true),
        };
        let mut copied = Ok(());
        let mut at = 0usize;
        for run in runs {
            let len = usize::try_from(run.len).unwrap_or(usize::MAX);
            let Some(room) = way.buffer.get_mut(at..at.saturating_add(len)) else { break };
            at += len;
            // SAFETY: the caller's promise for the runs; the buffer is not looked at before the wait below.
            copied = copied.and(unsafe { current.download(room.as_mut_ptr(), run.pointer, len, &way.stream) });
        }
        let waited = current.drain(&way.stream);
        let drained = waited.is_ok() || current.drain(&way.stream).is_ok();
        (copied.and(waited), drained)
    }
}

impl Download for Downloader {
    fn settle(&self) -> Result<()> {
        let waited = self.context.enter().and_then(|current| current.drain_all());
        waited.map_err(|error| error.on(self.context.ordinal(), "the device does not end what it was given"))
    }

    /// An event that was never recorded is reached, says the driver's manual, and so is the memory that it is asked for.
    fn reached(&self) -> Result<DeviceEvent> {
        let event =
            Event::new(&self.context).map_err(|error| error.on(self.context.ordinal(), "no event can be made"))?;
        Ok(DeviceEvent::held(event.raw(), Arc::new(event)))
    }

    unsafe fn download(&self, runs: &mut dyn Iterator<Item = Span>, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let mut way = self.way()?;
        let mut rest = Span { pointer: 0, len: 0 };
        let mut filled = 0;
        while filled < to.len() {
            // As many runs, or as much of one, as the buffer and the room take.
            let most = (to.len() - filled).min(way.buffer.len()) as u64;
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while bytes < most {
                if rest.len == 0 {
                    match runs.next() {
                        Some(run) => rest = run,
                        None => break,
                    }
                    continue;
                }
                let len = rest.len.min(most - bytes);
                batch.push(Span { pointer: rest.pointer, len });
                rest = Span { pointer: rest.pointer + len, len: rest.len - len };
                bytes += len;
            }
            if bytes == 0 {
                return Err(Error::bug("a download of fewer bytes than were asked for"));
            }
            // SAFETY: the caller's promise.
            let (fetched, drained) = unsafe { self.fetch(&mut way, &batch) };
            if let Err(error) = fetched {
                if !drained {
                    // The device may still write into the buffer: it can neither be used again nor freed.
                    std::mem::forget(way);
                }
                return Err(self.failed(error));
            }
            let bytes = usize::try_from(bytes).unwrap_or(0);
            to[filled..filled + bytes].copy_from_slice(&way.buffer[..bytes]);
            filled += bytes;
        }
        self.ways.lock().unwrap_or_else(PoisonError::into_inner).push(way);
        Ok(())
    }
}
