//! The interface of everything that reads: submit owned buffers, get them back filled.

use std::sync::Arc;
use std::time::Instant;

use super::fs::OpenFile;
use super::ring::Slot;

/// Something that reads byte ranges of files into buffers, many at a time.
///
/// Submitting moves the buffer into the reader; the completion gives it back, whether the read succeeded or not. Reads
/// complete in any order. A reader may be dropped with reads in flight: it waits for them, because the kernel may still be
/// writing into their buffers.
pub trait Reader: Send {
    /// Starts a read. Never blocks; a reader with a bounded queue keeps the rest itself.
    fn submit(&mut self, ticket: Ticket, read: ReadAt);

    /// The next finished read. `None` at the deadline, or when [`ReaderWaker::wake`] was called.
    fn next(&mut self, deadline: Option<Instant>) -> Option<Completion>;

    /// How many reads are worth having in flight.
    fn depth(&self) -> usize;

    /// What makes [`next`](Self::next) return early, from any thread.
    fn waker(&self) -> Arc<dyn ReaderWaker>;

    /// What it reads with, as the command line's `--io` calls it.
    fn name(&self) -> &'static str;

    /// Whether those who need bytes are to look by themselves first whether memory has them ([`OpenFile::read_warm`]): this reader
    /// would only copy them, on another core.
    fn leaves_warm_reads(&self) -> bool {
        false
    }

    /// Whether it reads past the page cache where a file prefers that ([`OpenFile::direct`]).
    fn reads_directly(&self) -> bool {
        false
    }
}

/// Wakes the thread that waits in [`Reader::next`].
pub trait ReaderWaker: Send + Sync {
    /// Makes the present or the coming call of `next` return.
    fn wake(&self);
}

/// The caller's name for a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A read to do: `len` bytes from `offset` of `file` into `buffer`.
#[derive(Debug)]
pub struct ReadAt {
    /// The file; kept open until the completion.
    pub file: Arc<OpenFile>,
    /// First byte.
    pub offset: u64,
    /// Number of bytes; more than the buffer's length completes as `InvalidInput`.
    pub len: usize,
    /// Where they go. What is in the rest of it afterwards is not said.
    pub buffer: Slot,
    /// Where in the buffer they begin, once the read is done: a direct read takes whole blocks.
    pub start: usize,
}

impl ReadAt {
    /// A read of `len` bytes from `offset`.
    pub fn new(file: Arc<OpenFile>, offset: u64, len: usize, buffer: Slot) -> Self {
        Self { file, offset, len, buffer, start: 0 }
    }

    /// The bytes that were read, once the read is done.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

/// A finished read.
#[derive(Debug)]
pub struct Completion {
    /// The caller's name for it.
    pub ticket: Ticket,
    /// The read, with its buffer.
    pub read: ReadAt,
    /// Whether all bytes arrived; a file that ends before is `UnexpectedEof`.
    pub result: std::io::Result<()>,
    /// How long the read was at work.
    pub busy: std::time::Duration,
}

/// What a read of more bytes than its buffer has completes with.
pub(super) fn too_long() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidInput, "a read is longer than its buffer")
}
