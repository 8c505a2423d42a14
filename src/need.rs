//! Metadata without I/O: parsers say which bytes they need and are given them.
//!
//! A [`Machine`] is a state machine that returns [`Progress::Need`] or [`Progress::Done`]. It is written as an
//! `async` block over an [`Asker`], which is how Rust spells a state machine: `ask(needs).await` suspends the machine
//! until its driver calls [`Machine::advance`] with one answer a need. No executor, thread or file is involved, so a
//! machine runs the same over a directory, over bytes in memory and under a fuzzer, and each `ask` is one batch that a
//! driver may serve in parallel.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::relpath::RelPath;

/// Something that a machine wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the variants say what their fields are
pub enum Need {
    /// The whole of a file, which must not be larger than `max` bytes. Answered by bytes or [`Answer::Missing`].
    File { path: RelPath, max: u64 },
    /// Exactly `len` bytes from `offset`. Answered by bytes or [`Answer::Missing`] (no such file).
    /// A file that ends earlier is the driver's error.
    Range { path: RelPath, offset: u64, len: u64 },
    /// The last `len` bytes of a file (or all, if it is shorter) and its size.
    Tail { path: RelPath, len: u64 },
    /// The entries of a directory, sorted by name. Answered by a listing or [`Answer::Missing`].
    List { path: RelPath },
    /// The size of a file. Answered by [`Answer::Size`] or [`Answer::Missing`].
    Size { path: RelPath },
    /// The same as the need in it, but a failure that only concerns its path is answered by [`Answer::Refused`].
    OrRefused(Box<Self>),
}

impl Need {
    /// This need, whose failure is an answer.
    #[must_use]
    pub fn or_refused(self) -> Self {
        Self::OrRefused(Box::new(self))
    }
}

/// The answer to one [`Need`].
#[derive(Clone, Debug)]
#[allow(missing_docs)] // as above
pub enum Answer {
    /// No such file or directory.
    Missing,
    /// The bytes asked for.
    Bytes(Bytes),
    /// The bytes asked for, and the size of the whole file.
    Tail { bytes: Bytes, file_size: u64 },
    /// The entries of the directory.
    Listing(Vec<DirEntry>),
    /// The size of the file in bytes.
    Size(u64),
    /// Why there is no answer.
    Refused(Arc<Error>),
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    /// The name; never `.` or `..`.
    pub name: String,
    /// What it is; a symbolic link counts as what it points at, if that lies inside the checkpoint.
    pub kind: EntryKind,
}

/// What a directory entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum EntryKind {
    File,
    Dir,
    Other,
}

/// What a machine says when it is advanced.
#[derive(Debug)]
pub enum Progress<T> {
    /// It needs these; the next `advance` brings one answer a need, in order.
    Need(Vec<Need>),
    /// It is finished.
    Done(T),
}

/// A resumable computation that reads nothing itself.
pub struct Machine<'a, T> {
    future: Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>,
    exchange: Arc<Mutex<Exchange>>,
}

/// The machine's side of the exchange: asks, and suspends until answered.
#[derive(Clone, Debug)]
pub struct Asker(Arc<Mutex<Exchange>>);

#[derive(Debug, Default)]
struct Exchange {
    needs: Option<Vec<Need>>,
    answers: Option<Vec<Answer>>,
}

impl<'a, T> Machine<'a, T> {
    /// A machine that runs this `async` body.
    pub fn new<F: Future<Output = Result<T>> + Send + 'a>(body: impl FnOnce(Asker) -> F) -> Self {
        let exchange = Arc::new(Mutex::new(Exchange::default()));
        Self { future: Box::pin(body(Asker(Arc::clone(&exchange)))), exchange }
    }

    /// Runs until the machine needs something or is done. The first call brings no answers.
    ///
    /// # Errors
    /// Whatever the machine fails with. A machine that failed or finished must not be advanced again.
    pub fn advance(&mut self, answers: Vec<Answer>) -> Result<Progress<T>> {
        lock(&self.exchange).answers = Some(answers);
        match self.future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => result.map(Progress::Done),
            Poll::Pending => match lock(&self.exchange).needs.take() {
                Some(needs) => Ok(Progress::Need(needs)),
                None => Err(Error::bug("a metadata machine suspended without a need")),
            },
        }
    }

    /// Drives the machine to its end with a function that serves one batch of needs.
    ///
    /// # Errors
    /// The machine's or the server's.
    pub fn drive(mut self, mut serve: impl FnMut(Vec<Need>) -> Result<Vec<Answer>>) -> Result<T> {
        let mut answers = Vec::new();
        loop {
            match self.advance(answers)? {
                Progress::Done(value) => return Ok(value),
                Progress::Need(needs) => answers = serve(needs)?,
            }
        }
    }
}

impl<T> std::fmt::Debug for Machine<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("exchange", &self.exchange).finish_non_exhaustive()
    }
}

impl Asker {
    /// Asks for a batch and waits for one answer a need, in order. An empty batch is answered at once.
    ///
    /// # Errors
    /// A driver that answers with another number of answers.
    pub async fn ask(&self, needs: Vec<Need>) -> Result<Vec<Answer>> {
        let count = needs.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        {
            let mut exchange = lock(&self.0);
            exchange.needs = Some(needs);
            exchange.answers = None;
        }
        let answers = std::future::poll_fn(|_| match lock(&self.0).answers.take() {
            Some(answers) => Poll::Ready(answers),
            None => Poll::Pending,
        })
        .await;
        if answers.len() == count {
            Ok(answers)
        } else {
            Err(Error::bug("a driver answered another number of needs").expected(count).found(answers.len()))
        }
    }

    /// Asks for one whole file; `None` if it does not exist.
    ///
    /// # Errors
    /// See [`ask`](Self::ask).
    pub async fn file(&self, path: RelPath, max: u64) -> Result<Option<Bytes>> {
        match self.ask(vec![Need::File { path, max }]).await?.pop() {
            Some(Answer::Bytes(bytes)) => Ok(Some(bytes)),
            Some(Answer::Missing) => Ok(None),
            other => Err(unfit(other.as_ref())),
        }
    }

    /// Asks for the entries of one directory; `None` if it does not exist.
    ///
    /// # Errors
    /// See [`ask`](Self::ask).
    pub async fn list(&self, path: RelPath) -> Result<Option<Vec<DirEntry>>> {
        match self.ask(vec![Need::List { path }]).await?.pop() {
            Some(Answer::Listing(entries)) => Ok(Some(entries)),
            Some(Answer::Missing) => Ok(None),
            other => Err(unfit(other.as_ref())),
        }
    }
}

/// The error for an answer of the wrong kind: the driver's bug.
pub fn unfit(answer: Option<&Answer>) -> Error {
    Error::bug("a driver answered a need with the wrong kind of answer").found(format_args!("{answer:?}"))
}

/// The exchange holds plain data, so a panic elsewhere cannot leave it half changed.
fn lock(exchange: &Mutex<Exchange>) -> std::sync::MutexGuard<'_, Exchange> {
    exchange.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_suspended_at_each_batch() {
        let path = |name: &str| RelPath::new(name).unwrap();
        let machine = Machine::new(|ask| async move {
            let first = ask.file(path("a"), 10).await?;
            let second = ask.file(path("b"), 10).await?;
            Ok((first, second))
        });
        let mut batches = 0;
        let done = machine.drive(|needs| {
            batches += 1;
            Ok(needs
                .iter()
                .map(|need| match need {
                    Need::File { path, .. } if path.to_string() == "a" => Answer::Bytes(Bytes::from_static(b"x")),
                    _ => Answer::Missing,
                })
                .collect())
        });
        assert_eq!(done.unwrap(), (Some(Bytes::from_static(b"x")), None));
        assert_eq!(batches, 2);
    }
}
