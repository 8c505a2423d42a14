//! Bytes in motion: files, buffers, reads.
//!
//! [`Root`] opens files of one checkpoint and never leaves it. A [`Reader`] takes reads together with the buffer that they
//! fill and gives both back: a buffer in flight is owned by the reader, so nothing can free or change it. [`Ring`] holds
//! the staging buffers and [`Budget`] counts the memory.
//!
//! Must not know: formats, arrays, devices.

mod budget;
mod buffer;
#[cfg(feature = "uring")]
mod cached;
mod choose;
mod direct;
#[cfg(feature = "uring")]
mod either;
mod events;
mod fs;
#[cfg(all(test, loom))]
mod loom_models;
mod pread;
mod reader;
#[cfg(test)]
mod reader_tests;
mod ring;
mod serve;
pub mod store;
mod sync;
#[cfg(feature = "uring")]
mod uring;
mod warm;

pub use budget::{Budget, Credit};
pub use buffer::Buffer;
#[cfg(feature = "uring")]
pub use cached::cached_bytes;
pub use choose::{Io, reader, uring_setup};
pub(crate) use fs::io_error;
pub use fs::{Direct, OpenFile, Root};
pub use pread::PreadReader;
pub use reader::{Completion, ReadAt, Reader, ReaderWaker, Ticket};
pub use ring::{Pin, Pinner, Ring, Slot};
pub use serve::serve;
pub(crate) use serve::{read_error, short_file};
pub use store::{LocalStore, StagedDir, Store, StoreFile};
#[cfg(feature = "uring")]
pub use uring::UringReader;
