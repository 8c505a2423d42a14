//! What the threads of a reader tell the thread that waits in [`Reader::next`](super::Reader::next).

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::reader::{Completion, ReaderWaker};

/// Something to return from `next` for.
#[derive(Debug)]
pub(super) enum Event {
    Done(Completion),
    Wake,
}

/// The waiting end.
#[derive(Debug)]
pub(super) struct Events {
    receiver: Receiver<Event>,
    waker: Arc<Waker>,
}

#[derive(Debug)]
struct Waker(Sender<Event>);

impl Events {
    /// The telling end, for every thread of the reader, and the waiting one.
    pub(super) fn new() -> (Sender<Event>, Self) {
        let (send, receiver) = channel();
        (send.clone(), Self { receiver, waker: Arc::new(Waker(send)) })
    }

    /// As [`Reader::next`](super::Reader::next).
    pub(super) fn next(&self, deadline: Option<Instant>) -> Option<Completion> {
        let event = match deadline {
            None => self.receiver.recv().ok(),
            Some(deadline) => self.receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok(),
        };
        match event? {
            Event::Done(completion) => Some(completion),
            Event::Wake => None,
        }
    }

    /// As [`Reader::waker`](super::Reader::waker).
    pub(super) fn waker(&self) -> Arc<dyn ReaderWaker> {
        Arc::clone(&self.waker) as Arc<dyn ReaderWaker>
    }
}

impl ReaderWaker for Waker {
    fn wake(&self) {
        // A reader that is gone needs no waking.
        let _ = self.0.send(Event::Wake);
    }
}
